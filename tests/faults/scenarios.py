"""The faults: each function runs one trial in its folder and says what is left. Registered with how often it is tried."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sqlite3
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.lab import Maria, Outcome, Postgres, Proxy, Trial, alive, free_port, mariadb_programs, trial, wait_for

END_S = 45.0
"""The longest that any replay of a trial may take to end by itself after the fault: every wait has a bound."""


@dataclass(frozen=True)
class Scenario:
    """A fault by name; ``times`` it is tried in a whole run of the harness."""

    name: str
    times: int
    run: Callable[[Path, int], Outcome | None]
    """None: it cannot be made here."""


SCENARIOS: list[Scenario] = []


def fault(
    name: str, times: int
) -> Callable[[Callable[[Path, int], Outcome | None]], Callable[[Path, int], Outcome | None]]:
    """Register a scenario."""

    def register(run: Callable[[Path, int], Outcome | None]) -> Callable[[Path, int], Outcome | None]:
        SCENARIOS.append(Scenario(name, times, run))
        return run

    return register


def _begin(t: Trial, *arguments: str, **how: Any) -> None:
    if not t.url:
        t.serve()
    t.replay(*arguments, **how)
    if not t.under_way():
        raise RuntimeError(f"the replay did not begin: {t.said()}")


# --- processes -------------------------------------------------------------------------------------------------------


@fault("kill -9 of a worker", 30)
def kill_worker(folder: Path, seed: int) -> Outcome:
    with trial(folder, seed) as t:
        _begin(t)
        at = t.rest(0.0, 2.5)
        os.kill(t.rng.choice(t.workers()), signal.SIGKILL)
        return t.count(at, hung=not t.ended(END_S))


@fault("kill -9 of every worker", 10)
def kill_workers(folder: Path, seed: int) -> Outcome:
    with trial(folder, seed) as t:
        _begin(t)
        at = t.rest(0.0, 2.5)
        for pid in t.workers():
            os.kill(pid, signal.SIGKILL)
        return t.count(at, hung=not t.ended(END_S))


@fault("SIGSTOP of a worker, for 1 to 3 s", 10)
def stop_worker(folder: Path, seed: int) -> Outcome:
    with trial(folder, seed) as t:
        _begin(t)
        at = t.rest(0.0, 2.0)
        pid = t.rng.choice(t.workers())
        os.kill(pid, signal.SIGSTOP)
        t.rest(1.0, 3.0)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        return t.count(at, hung=not t.ended(END_S))


@fault("SIGSTOP of a worker, for good", 10)
def freeze_worker(folder: Path, seed: int) -> Outcome:
    with trial(folder, seed) as t:
        _begin(t)
        at = t.rest(0.0, 2.0)
        os.kill(t.rng.choice(t.workers()), signal.SIGSTOP)
        return t.count(at, hung=not t.ended(END_S))


def _gone(workers: list[int]) -> bool:
    """Did the workers of a master that was killed end by themselves? Process 1 of a container may let the dead lie."""
    return wait_for(lambda: not any(alive(pid) for pid in workers), 15)


@fault("kill -9 of the master", 30)
def kill_master(folder: Path, seed: int) -> Outcome:
    with trial(folder, seed) as t:
        _begin(t)
        at = t.rest(0.0, 3.0)
        workers = t.workers()
        t.kill_master()
        return t.count(at, hung=not _gone(workers), whole=False)


@fault("kill -9 of the master and its workers", 10)
def kill_all(folder: Path, seed: int) -> Outcome:
    with trial(folder, seed) as t:
        _begin(t)
        at = t.rest(0.0, 3.0)
        workers = t.workers()
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        t.kill_master()
        return t.count(at, hung=not _gone(workers), whole=False)


@fault("SIGSTOP of the master, for 1 to 5 s", 10)
def stop_master(folder: Path, seed: int) -> Outcome:
    with trial(folder, seed) as t:
        _begin(t)
        assert t.master is not None
        at = t.rest(0.0, 2.0)
        t.master.send_signal(signal.SIGSTOP)
        t.rest(1.0, 5.0)
        t.master.send_signal(signal.SIGCONT)
        return t.count(at, hung=not t.ended(END_S))


@fault("kill -9 of the endpoint", 20)
def kill_endpoint(folder: Path, seed: int) -> Outcome:
    with trial(folder, seed) as t:
        _begin(t)
        assert t.endpoint is not None
        at = t.rest(0.0, 2.5, watched=True)
        t.endpoint.kill()
        return t.count(at, hung=not t.ended(END_S), look=False)


@fault("SIGSTOP of the endpoint, for 1 to 3 s", 10)
def stop_endpoint(folder: Path, seed: int) -> Outcome:
    with trial(folder, seed) as t:
        _begin(t)
        assert t.endpoint is not None
        at = t.rest(0.0, 2.5)
        t.endpoint.send_signal(signal.SIGSTOP)
        t.rest(1.0, 3.0)
        t.endpoint.send_signal(signal.SIGCONT)
        return t.count(at, hung=not t.ended(END_S))


@fault("SIGSTOP of the endpoint, for good", 10)
def freeze_endpoint(folder: Path, seed: int) -> Outcome:
    with trial(folder, seed) as t:
        _begin(t)
        assert t.endpoint is not None
        at = t.rest(0.0, 2.5, watched=True)
        t.endpoint.send_signal(signal.SIGSTOP)
        hung = not t.ended(END_S)
        t.endpoint.send_signal(signal.SIGCONT)
        return t.count(at, hung=hung, look=False)


@fault("kill -9 of PostgreSQL, back after 1 to 4 s", 15)
def kill_database(folder: Path, seed: int) -> Outcome:
    return _killed(folder, seed, Postgres)


@fault("kill -9 of MariaDB, back after 1 to 4 s", 5)
def kill_mariadb(folder: Path, seed: int) -> Outcome | None:
    return _killed(folder, seed, Maria) if mariadb_programs() else None


def _killed(folder: Path, seed: int, server_of: type[Postgres | Maria]) -> Outcome:
    with trial(folder, seed, server_of=server_of) as t:
        assert t.server is not None
        _begin(t)
        at = t.rest(0.0, 2.5)
        t.server.kill()
        t.rest(1.0, 4.0)
        t.server.start()
        return t.count(at, hung=not t.ended(END_S))


@fault("kill -9 of PostgreSQL, back after the run", 10)
def lose_database(folder: Path, seed: int) -> Outcome:
    with trial(folder, seed, server_of=Postgres) as t:
        assert t.server is not None
        _begin(t)
        at = t.rest(0.0, 2.5)
        t.server.kill()
        hung = not t.ended(END_S)
        t.server.start()
        return t.count(at, hung=hung)


@fault("SIGSTOP of PostgreSQL, for 1 to 8 s", 10)
def stop_database(folder: Path, seed: int) -> Outcome:
    with trial(folder, seed, server_of=Postgres) as t:
        assert t.server is not None
        _begin(t)
        at = t.rest(0.0, 2.0)
        t.server.signal(signal.SIGSTOP)
        t.rest(1.0, 8.0)
        t.server.signal(signal.SIGCONT)
        return t.count(at, hung=not t.ended(END_S))


@fault("SIGSTOP of PostgreSQL until after the run", 10)
def freeze_database(folder: Path, seed: int) -> Outcome:
    return _frozen(folder, seed, Postgres)


@fault("SIGSTOP of MariaDB until after the run", 5)
def freeze_mariadb(folder: Path, seed: int) -> Outcome | None:
    return _frozen(folder, seed, Maria) if mariadb_programs() else None


def _frozen(folder: Path, seed: int, server_of: type[Postgres | Maria]) -> Outcome:
    with trial(folder, seed, server_of=server_of) as t:
        assert t.server is not None
        _begin(t)
        at = t.rest(0.0, 2.0)
        t.server.signal(signal.SIGSTOP)
        hung = not t.ended(END_S)
        t.server.signal(signal.SIGCONT)
        return t.count(at, hung=hung)


@fault("SIGSTOP of PostgreSQL, then kill -9 of the master", 10)
def freeze_database_kill_master(folder: Path, seed: int) -> Outcome:
    with trial(folder, seed, server_of=Postgres) as t:
        assert t.server is not None
        _begin(t)
        t.rest(0.0, 1.0)
        t.server.signal(signal.SIGSTOP)
        at = t.rest(1.0, 2.5)
        workers = t.workers()
        t.kill_master()
        t.server.signal(signal.SIGCONT)
        return t.count(at, hung=not _gone(workers), whole=False)


# --- the database ----------------------------------------------------------------------------------------------------


@fault("PostgreSQL gone for a minute while the load goes on", 2)
def miss_database(folder: Path, seed: int) -> Outcome:
    with trial(folder, seed, server_of=Postgres, requests=400, rate_per_s=5.0) as t:
        assert t.server is not None
        _begin(t)
        at = t.rest(2.0, 6.0)
        t.server.kill()
        t.rest(60.0, 62.0)
        t.server.start()
        return t.count(at, hung=not t.ended(END_S))


@fault("SQLite locked by another program, for 2 to 6 s", 10)
def lock_database(folder: Path, seed: int) -> Outcome:
    with trial(folder, seed) as t:
        _begin(t)
        at = t.rest(0.0, 1.5)
        with contextlib.closing(sqlite3.connect(folder / "t.db", timeout=30, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            t.rest(2.0, 6.0)
            other.execute("ROLLBACK")
        return t.count(at, hung=not t.ended(END_S))


@fault("SQLite locked, then kill -9 of the master", 10)
def lock_database_kill_master(folder: Path, seed: int, spare_s: float = 0.0) -> Outcome:
    """spare_s: by so much longer than the rule says an answer may have been whole, and the database is held; for a test that
    shares its cores."""
    with trial(folder, seed) as t:
        _begin(t)
        t.rest(0.0, 1.0)
        with contextlib.closing(sqlite3.connect(folder / "t.db", timeout=30, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            at = t.rest(1.0 + spare_s, 2.5 + spare_s)
            workers = t.workers()
            t.kill_master()
            other.execute("ROLLBACK")
        return t.count(at - spare_s, hung=not _gone(workers), whole=False)


@fault("SQLite locked until after the run", 5)
def lock_database_long(folder: Path, seed: int) -> Outcome:
    with trial(folder, seed) as t:
        _begin(t)
        at = t.rest(0.0, 1.5)
        with contextlib.closing(sqlite3.connect(folder / "t.db", timeout=30, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            hung = not t.ended(2 * END_S)
            other.execute("ROLLBACK")
        return t.count(at, hung=hung)


@fault("PostgreSQL read only, for 2 to 5 s", 5)
def read_only_database(folder: Path, seed: int) -> Outcome:
    import psycopg

    with trial(folder, seed, server_of=Postgres) as t:
        assert t.server is not None
        _begin(t)
        at = t.rest(0.0, 1.5)
        with psycopg.connect(t.server.url, autocommit=True) as admin:
            for state in ("on", "off"):
                admin.execute("SET transaction_read_only = off")
                admin.execute(f"ALTER SYSTEM SET default_transaction_read_only = {state}")  # type: ignore[arg-type]
                admin.execute("SELECT pg_reload_conf()")
                if state == "on":
                    admin.execute(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                        "WHERE datname = 'steelyard' AND pid <> pg_backend_pid()"
                    )
                    t.rest(2.0, 5.0)
        return t.count(at, hung=not t.ended(END_S))


@fault("the database's disk full (tmpfs), rows wait on another", 5)
def full_disk(folder: Path, seed: int) -> Outcome | None:
    return _full(folder, seed, both=False)


@fault("SQLite on a disk that is mounted read only", 2)
def read_only_disk(folder: Path, seed: int) -> Outcome | None:
    with _mounted(folder / "held") as held:
        if held is None:
            return None
        with trial(folder, seed, db=f"sqlite:///{held}/t.db") as t:
            t.serve()
            subprocess.run(["mount", "-o", "remount,ro", str(held)], capture_output=True, check=True)
            t.replay()
            outcome = Outcome(hung=not t.ended(END_S), said=t.said())
            if "exit 1" not in outcome.said or "can be written" not in outcome.said:
                outcome.wrong = "did not say that the database cannot be written"
            return outcome


@fault("both disks full, space again before the end", 5)
def full_disks(folder: Path, seed: int) -> Outcome | None:
    return _full(folder, seed, both=True)


@contextlib.contextmanager
def _mounted(where: Path, *options: str) -> Iterator[Path | None]:
    """A disk in memory; None where nothing may be mounted."""
    where.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", *options, "none", str(where)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", str(where)], capture_output=True, check=False)


def _full(folder: Path, seed: int, *, both: bool) -> Outcome | None:
    with _mounted(folder / "small", "-o", "size=2m") as small:
        if small is None:
            return None
        with trial(folder, seed, db=f"sqlite:///{small}/t.db") as t:
            if both:
                t.env["XDG_STATE_HOME"] = str(small)
            _begin(t)
            at = t.rest(0.0, 1.5)
            ballast = small / "ballast"
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(b"x" * 4096)
            t.rest(1.5, 3.0)
            ballast.unlink()
            return t.count(at, hung=not t.ended(END_S))


# --- the network -----------------------------------------------------------------------------------------------------


def _apart(t: Trial, port: int, **how: Any) -> Proxy:
    """Master here, one worker that reaches it through a proxy."""
    proxy = Proxy(port)
    t.serve()
    t.replay("--workers", "1", "--expect-workers", "2", "--bind", f"127.0.0.1:{port}", **how)
    time.sleep(1.0)
    t.others.append(
        subprocess.Popen(
            t.command("worker", "--master", f"127.0.0.1:{proxy.port}"),
            env=t.env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
    )  # fmt: skip
    return proxy


@fault("network between worker and master cut", 8)
def cut_network(folder: Path, seed: int) -> Outcome:
    with trial(folder, seed) as t:
        proxy = _apart(t, free_port())
        if not t.under_way():
            raise RuntimeError(t.said())
        at = t.rest(0.0, 2.0)
        proxy.held = True
        outcome = t.count(at, hung=not t.ended(END_S))
        gone = wait_for(lambda: t.others[0].poll() is not None, 90)
        proxy.close()
        if not gone:
            outcome.wrong = "the worker that was cut off did not end by itself"
        return outcome


@fault("network between worker and master cut for 1 to 3 s", 8)
def blink_network(folder: Path, seed: int) -> Outcome:
    with trial(folder, seed) as t:
        proxy = _apart(t, free_port())
        if not t.under_way():
            raise RuntimeError(t.said())
        at = t.rest(0.0, 2.0)
        proxy.held = True
        t.rest(1.0, 3.0)
        proxy.held = False
        outcome = t.count(at, hung=not t.ended(END_S))
        proxy.close()
        return outcome


@fault("connection between worker and master reset", 8)
def reset_network(folder: Path, seed: int) -> Outcome:
    with trial(folder, seed) as t:
        proxy = _apart(t, free_port())
        if not t.under_way():
            raise RuntimeError(t.said())
        at = t.rest(0.0, 2.0)
        proxy.cut()
        outcome = t.count(at, hung=not t.ended(END_S))
        proxy.close()
        return outcome


@fault("network between worker and master slow (200 ms each way)", 5)
def slow_network(folder: Path, seed: int) -> Outcome:
    with trial(folder, seed) as t:
        port = free_port()
        proxy = Proxy(port)
        proxy.delay_s = 0.2
        t.serve()
        t.replay("--workers", "1", "--expect-workers", "2", "--bind", f"127.0.0.1:{port}")
        time.sleep(1.0)
        t.others.append(subprocess.Popen(t.command("worker", "--master", f"127.0.0.1:{proxy.port}"), env=t.env))
        t.under_way()
        at = t.rest(0.0, 2.0)
        outcome = t.count(at, hung=not t.ended(END_S))
        proxy.close()
        return outcome


# --- the endpoint ----------------------------------------------------------------------------------------------------


def _against(folder: Path, seed: int, **options: Any) -> Outcome:
    with trial(folder, seed) as t:
        t.serve(**options)
        t.replay()
        t.under_way()
        at = t.rest(1.0, 3.0)
        return t.count(at, hung=not t.ended(END_S))


@fault("endpoint resets every 5th request", 3)
def resets(folder: Path, seed: int) -> Outcome:
    return _against(folder, seed, fail_every=5, fail_kind="reset")


@fault("endpoint resets every 5th answer in the middle", 3)
def resets_mid(folder: Path, seed: int) -> Outcome:
    return _against(folder, seed, fail_every=5, fail_kind="reset-mid")


@fault("endpoint stalls every 5th answer in the middle", 3)
def stalls_mid(folder: Path, seed: int) -> Outcome:
    return _against(folder, seed, fail_every=5, fail_kind="stall-mid")


@fault("endpoint reads slowly: 2 s for each request of 100 kB (proxy)", 3)
def slow_reader(folder: Path, seed: int) -> Outcome:
    """The rest of a request stays with the client until the endpoint takes it."""
    with trial(folder, seed, prompt=20_000) as t:
        t.serve()
        proxy = Proxy(int(t.url.rpartition(":")[2]), reads_per_s=50_000)
        t.replay(url=f"http://127.0.0.1:{proxy.port}")
        t.under_way()
        at = t.rest(0.5, 2.5)
        outcome = t.count(at, hung=not t.ended(END_S))
        proxy.close()
        return outcome


@fault("endpoint is far away: 300 ms each way (proxy)", 3)
def slow_endpoint(folder: Path, seed: int) -> Outcome:
    with trial(folder, seed) as t:
        t.serve()
        proxy = Proxy(int(t.url.rpartition(":")[2]))
        proxy.delay_s = 0.3
        t.replay(url=f"http://127.0.0.1:{proxy.port}")
        t.under_way()
        at = t.rest(0.0, 2.0)
        outcome = t.count(at, hung=not t.ended(END_S))
        proxy.close()
        return outcome


@fault("every connection to the endpoint reset in the middle", 5)
def cut_endpoint(folder: Path, seed: int) -> Outcome:
    with trial(folder, seed) as t:
        t.serve()
        proxy = Proxy(int(t.url.rpartition(":")[2]))
        t.replay(url=f"http://127.0.0.1:{proxy.port}")
        t.under_way()
        at = t.rest(0.0, 2.0)
        proxy.cut()
        outcome = t.count(at, hung=not t.ended(END_S))
        proxy.close()
        return outcome


class Refusing:
    """An HTTP server that passes everything on to the endpoint but refuses completions while ``status`` is set."""

    def __init__(self, target: str, extra: str = "") -> None:
        import http.server
        import urllib.error
        import urllib.request

        refusing = self
        self.status = 0
        self.refused = 0

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._pass(None)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if refusing.status:
                    refusing.refused += 1
                    self.send_response(refusing.status)
                    if extra:
                        self.send_header(*extra.split(": "))
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                self._pass(body)

            def _pass(self, body: bytes | None) -> None:
                names = ("Content-Type", "X-Request-Id")
                asked = urllib.request.Request(
                    target + self.path, body, {n: self.headers[n] for n in names if n in self.headers}
                )
                try:
                    with urllib.request.urlopen(asked, timeout=20) as answer:
                        held, kind, status = answer.read(), answer.headers["Content-Type"], 200
                except urllib.error.HTTPError as error:
                    held, kind, status = error.read(), error.headers.get("Content-Type", "text/plain"), error.code
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(held)))
                self.end_headers()
                self.wfile.write(held)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def tls(self, certificate: Path, key: Path) -> str:
        """From now on over TLS; the URL."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        return self.url.replace("http", "https").replace("127.0.0.1", "localhost")

    def close(self) -> None:
        self._server.shutdown()


def _storm(folder: Path, seed: int, status: int, extra: str = "") -> Outcome:
    with trial(folder, seed, rate_per_s=25.0, requests=100) as t:
        t.serve()
        between = Refusing(t.url, extra)
        t.replay(url=between.url)
        t.under_way()
        at = t.rest(1.0, 2.0)
        between.status = status
        t.rest(1.0, 2.0)
        between.status = 0
        outcome = t.count(at, hung=not t.ended(END_S))
        if f"{between.refused} status" not in outcome.said:
            outcome.wrong = f"{between.refused} refused, but: {outcome.said[-80:]}"
        between.close()
        return outcome


@fault("429 with Retry-After for 1 to 2 s", 3)
def too_many(folder: Path, seed: int) -> Outcome:
    return _storm(folder, seed, 429, "Retry-After: 1")


@fault("a storm of 503 for 1 to 2 s", 3)
def storm(folder: Path, seed: int) -> Outcome:
    return _storm(folder, seed, 503)


def _faketime() -> Path | None:
    return next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))), None)


@fault("TLS certificate that has expired", 2)
def expired(folder: Path, seed: int) -> Outcome | None:
    library = _faketime()
    if library is None:
        return None
    with trial(folder, seed) as t:
        key, certificate = folder / "k.pem", folder / "c.pem"
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "30",
             "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"],
            capture_output=True, check=True, env=os.environ | {"LD_PRELOAD": str(library), "FAKETIME": "2020-01-01 00:00:00"},
        )  # fmt: skip
        t.serve()
        between = Refusing(t.url)
        url = between.tls(certificate, key)
        t.replay("--ca-file", str(certificate), url=url)
        outcome = Outcome(hung=not t.ended(END_S), said=t.said())
        between.close()
        if "exit 1" not in outcome.said or "expired" not in outcome.said:
            outcome.wrong = "did not say that the certificate has expired"
        return outcome


@fault("host name that does not resolve", 2)
def no_name(folder: Path, seed: int) -> Outcome:
    with trial(folder, seed) as t:
        t.replay(url="http://no-such-host.invalid:8000")
        outcome = Outcome(hung=not t.ended(END_S), said=t.said())
        if "exit 1" not in outcome.said or "resolve" not in outcome.said:
            outcome.wrong = "did not say that the name cannot be resolved"
        return outcome


# --- the machine -----------------------------------------------------------------------------------------------------


CLOCK = """import os, time
real = time.time
time.time = lambda: real() + float(open(os.environ["STEPPED_CLOCK"]).read() or 0)
"""
"""sitecustomize.py: every process of the trial sees a wall clock that is set by a file. (libfaketime would do, but breaks
clock_nanosleep with an absolute time, which Python's sleep uses.)"""


@fault("wall clock stepped by an hour, back and forth (injected)", 6)
def step_clock(folder: Path, seed: int) -> Outcome:
    with trial(folder, seed) as t:
        offset = folder / "clock"
        offset.write_text("0")
        (folder / "site").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(CLOCK)
        _begin(
            t, env={"STEPPED_CLOCK": str(offset), "PYTHONPATH": f"{folder / 'site'}{os.pathsep}{t.env['PYTHONPATH']}"}
        )
        at = t.rest(1.2, 2.0)
        offset.write_text("3600" if seed % 2 else "-3600")
        t.rest(0.5, 1.5)
        offset.write_text("0")
        outcome = t.count(at, hung=not t.ended(END_S))
        if ": complete, " not in outcome.said:
            outcome.wrong = "the step of the wall clock was taken for a loss"
        return outcome


@fault("file handles exhausted (64 in master and workers)", 5)
def few_files(folder: Path, seed: int) -> Outcome:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    with trial(folder, seed, rate_per_s=400.0, requests=1600) as t:
        t.serve()
        t.replay(preexec_fn=limit)
        t.under_way(seconds=20)
        at = t.rest(1.5, 3.0)
        return t.count(at, hung=not t.ended(END_S))


@fault("memory limit reached during the run (RLIMIT_AS of a worker)", 5)
def little_memory(folder: Path, seed: int) -> Outcome:
    with trial(folder, seed, rate_per_s=150.0, requests=900) as t:
        _begin(t)
        pid = t.workers()[0]
        at = t.rest(0.5, 1.5)
        with contextlib.suppress(OSError):  # it has ended already
            used = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
            resource.prlimit(pid, resource.RLIMIT_AS, (used, used))
        return t.count(at, hung=not t.ended(END_S))


@fault("memory limit reached during the run (RLIMIT_AS of the master)", 5)
def little_memory_master(folder: Path, seed: int) -> Outcome:
    with trial(folder, seed, rate_per_s=150.0, requests=900) as t:
        _begin(t)
        assert t.master is not None
        at = t.rest(1.5, 3.0)
        with contextlib.suppress(OSError):  # it has ended already
            used = int(Path(f"/proc/{t.master.pid}/statm").read_text().split()[0]) * resource.getpagesize()
            resource.prlimit(t.master.pid, resource.RLIMIT_AS, (used, used))
        hung = not t.ended(END_S)
        return t.count(at, hung=hung, whole=False)


@fault("memory limit from the start (RLIMIT_AS of 150 to 700 MiB)", 10)
def memory_at_start(folder: Path, seed: int) -> Outcome:
    with trial(folder, seed) as t:
        most = int(t.rng.integers(150, 700)) << 20

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_AS, (most, most))

        t.serve()
        t.replay(preexec_fn=limit)
        hung = not t.ended(END_S)
        if "exit 0" in t.said():
            return t.count(time.monotonic(), hung=hung)
        said = t.said()
        code = said.split(":")[0]
        wrong = "" if code in ("exit 1", "exit 4") and "TRACEBACK" not in said else f"with {most >> 20} MiB: {said}"
        return Outcome(hung=hung, said=said, wrong=wrong)


@fault("Ctrl-C once", 10)
def interrupt(folder: Path, seed: int) -> Outcome:
    with trial(folder, seed) as t:
        _begin(t)
        assert t.master is not None
        at = t.rest(0.0, 2.0)
        t.master.send_signal(signal.SIGINT)
        outcome = t.count(at, hung=not t.ended(20))
        if "exit 130" not in outcome.said or "interrupted" not in outcome.said:
            outcome.wrong = outcome.wrong or "did not say that it was interrupted"
        return outcome


@fault("Ctrl-C twice", 10)
def interrupt_twice(folder: Path, seed: int) -> Outcome:
    with trial(folder, seed) as t:
        _begin(t)
        assert t.master is not None
        at = t.rest(0.0, 2.0)
        t.master.send_signal(signal.SIGINT)
        t.rest(0.05, 0.6)
        with contextlib.suppress(ProcessLookupError):
            t.master.send_signal(signal.SIGINT)
        outcome = t.count(at, hung=not t.ended(20))
        if not any(
            code in outcome.said for code in ("exit 130", "exit -2")
        ):  # all was said and done: a shell says 130 too
            outcome.wrong = outcome.wrong or "did not end as interrupted"
        return outcome


@fault("Ctrl-C while it starts", 10)
def interrupt_start(folder: Path, seed: int) -> Outcome:
    with trial(folder, seed) as t:
        t.serve()
        t.replay()
        assert t.master is not None
        t.rest(0.5, 4.0)  # the first moments are the interpreter's own
        t.master.send_signal(signal.SIGINT)
        hung = not t.ended(20)
        said = t.said()
        wrong = "" if any(code in said for code in ("exit 130", "exit -2")) else "did not end as interrupted"
        return Outcome(hung=hung, said=said, wrong=wrong)


@fault("SIGTERM of the master", 10)
def terminate(folder: Path, seed: int) -> Outcome:
    with trial(folder, seed) as t:
        _begin(t)
        assert t.master is not None
        at = t.rest(0.0, 2.0)
        t.master.terminate()
        outcome = t.count(at, hung=not t.ended(20))
        if "exit 130" not in outcome.said or "interrupted" not in outcome.said:
            outcome.wrong = outcome.wrong or "did not say that it was interrupted"
        return outcome
