"""Secrets come from files, the environment or a keyring, and are in no message."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from loadgen import secret
from loadgen.replay import read_api_key
from traces.credentials import read_secret
from traces.errors import InputError, StoreError
from traces.store import Store, open_store, redact

WORD = "pw-planted-33cc/@:?&="


@pytest.fixture
def ring(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A keyring in a file of this test's own, with one entry; its name."""
    keyring = pytest.importorskip("keyring")
    plaintext = pytest.importorskip("keyrings.alt.file")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    before, mine = keyring.get_keyring(), plaintext.PlaintextKeyring()
    mine.file_path = str(tmp_path / "ring.cfg")
    keyring.set_keyring(mine)
    keyring.set_password("steelyard/team", "db", WORD)
    try:
        yield "keyring:steelyard/team/db"
    finally:
        keyring.set_keyring(before)


def test_a_secret_is_read_from_a_file_or_a_keyring(ring: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """API key, swarm secret and database password, each from either; what is set in the environment is not asked for."""
    file = tmp_path / "secret"
    file.write_text(WORD + "\n", encoding="utf-8")
    for named in (str(file), ring):
        assert read_api_key(named) == WORD
        monkeypatch.delenv("STEELYARD_SWARM_SECRET", raising=False)
        monkeypatch.setenv("STEELYARD_SWARM_SECRET_FILE", named)
        assert secret.given() == WORD.encode()
    monkeypatch.setenv("STEELYARD_API_KEY", "of the environment")
    assert read_api_key(None) == "of the environment"


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ("keyring:steelyard/team/nobody", "no such entry. Make it: keyring set steelyard/team nobody"),
        ("keyring:steelyard", "write keyring:SERVICE/USER"),
        ("keyring:", "write keyring:SERVICE/USER"),
        ("no-such-file", "cannot be read .No such file"),
        ("empty", "alone, on one line"),
        ("two", "alone, on one line"),
        ("binary", "cannot be read .not text"),
        (".", "cannot be read .Is a directory"),
    ],
)
def test_what_cannot_be_read_is_said_without_it(
    named: str, words: str, ring: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line: which option, which place, why, what to do."""
    monkeypatch.chdir(tmp_path)
    for name, held in (("empty", b"\n"), ("two", WORD.encode() + b"\n" + WORD.encode()), ("binary", b"\xff\xfe")):
        (tmp_path / name).write_bytes(held)
    with pytest.raises(InputError, match=words) as caught:
        read_secret(named, "--api-key-file")
    assert WORD not in str(caught.value)
    assert str(caught.value).startswith(f"--api-key-file {named}")


def test_a_keyring_that_fails_is_one_line() -> None:
    """A backend's own error, and no backend at all (the usual one on a server), are said; what a backend says is not repeated."""
    keyring, fail = pytest.importorskip("keyring"), pytest.importorskip("keyring.backends.fail")
    before = keyring.get_keyring()
    keyring.set_keyring(fail.Keyring())
    try:
        with pytest.raises(InputError, match=r"keyring:a/b: the keyring cannot be asked \(NoKeyringError\)"):
            read_secret("keyring:a/b", "--api-key-file")
    finally:
        keyring.set_keyring(before)


def test_a_database_password_comes_from_anywhere_but_the_url(
    postgres_url: str, ring: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A PostgreSQL role that must give a password gets in by file, keyring and environment; no message, no shown URL, no name of
    waiting rows holds it, and without it nobody gets in."""
    admin = sa.create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        rules = Path(connection.execute(sa.text("SHOW hba_file")).scalar_one())
        before = rules.read_text()
        rules.write_text("local all secretive scram-sha-256\n" + before)
        connection.execute(sa.text("DROP ROLE IF EXISTS secretive"))
        connection.exec_driver_sql("CREATE ROLE secretive SUPERUSER LOGIN PASSWORD '" + WORD + "'")
        connection.execute(sa.text("SELECT pg_reload_conf()"))
    url = sa.make_url(postgres_url).set(drivername="postgresql", username="secretive")
    plain = url.render_as_string(hide_password=False)
    file = tmp_path / "password"
    file.write_text(WORD)
    join = "&" if "?" in plain else "?"
    try:
        for named in (str(file), ring):
            with open_store(f"{plain}{join}password_file={named}") as store:
                assert store.runs() == []
                assert WORD not in store.url
                assert (named in store.url, store.place) == (True, redact(plain))
        for variable, value in (("STEELYARD_DB_PASSWORD", WORD), ("STEELYARD_DB_PASSWORD_FILE", ring)):
            with monkeypatch.context() as patch:
                patch.setenv(variable, value)
                open_store(plain).close()
        for wrong in (plain, f"{plain}{join}password_file={rules.parent / 'PG_VERSION'}"):
            with pytest.raises(StoreError) as caught:
                open_store(wrong)
            assert WORD not in str(caught.value)
        with pytest.raises(InputError, match=r"password_file= .*cannot be read"):
            open_store(f"{plain}{join}password_file={tmp_path / 'none'}")
    finally:
        rules.write_text(before)
        with admin.connect() as connection:
            connection.execute(sa.text("SELECT pg_reload_conf()"))
            connection.execute(
                sa.text(f"REASSIGN OWNED BY secretive TO {connection.engine.url.username or 'postgres'}")
            )
            connection.execute(sa.text("DROP OWNED BY secretive"))
            connection.execute(sa.text("DROP ROLE secretive"))
        admin.dispose()


def test_the_password_of_our_database_is_not_told_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """STEELYARD_DB_PASSWORD is for the --db alone: a LiteLLM database that is read does not get it."""
    from traces import store

    monkeypatch.setenv("STEELYARD_DB_PASSWORD", WORD)
    for ours, password in ((True, WORD), (False, None)):
        engine = store._engine("postgresql://me@127.0.0.1:1/x", create=False, ours=ours)
        assert engine.url.password == password
        engine.dispose()
    for given in ("postgresql://me:mine@127.0.0.1:1/x", "sqlite:///x.db"):
        engine = store._engine(given, create=True)
        assert engine.url.password in ("mine", None)
        engine.dispose()
    assert Store(engine, "postgresql://h/x?password_file=a&sslmode=require").place == "postgresql://h/x?sslmode=require"
    assert Store(engine, "postgresql://h/x?a=b&password_file=a").place == "postgresql://h/x?a=b"
