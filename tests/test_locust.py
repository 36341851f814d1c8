"""Locust's own command and Locust's own web UI: the replay as a User, and a tab beside the usual statistics."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import gevent
import numpy as np
import pytest

from loadgen.cluster.embedded import embedded
from loadgen.ports import Door
from loadgen.replay import Interrupted, replay
from loadgen.swarm import Swarm
from tests.faults.lab import free_port
from traces.errors import InputError
from traces.ingest import store_schedule
from traces.measures import Slo
from traces.records import Fleet, Schedule
from traces.shape import LogNormal, synthesize
from traces.store import open_store

LOCUSTFILE = Path(__file__).parent.parent / "loadgen" / "locustfile.py"
LENGTHS = LogNormal.parse("lognormal:median=30,sigma=0.3"), LogNormal.parse("lognormal:median=5,sigma=0.3")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with embedded("constant", Fleet(1, 1)) as url:
        yield url


@pytest.fixture
def db(tmp_path: Path) -> str:
    url = f"sqlite:///{tmp_path}/l.db"
    with open_store(url) as store:
        store_schedule(store, synthesize(60, *LENGTHS, rate_per_s=30.0, seed=1, name="t"), options={})
    return url


def locust(*arguments: str, file: Path = LOCUSTFILE, more: dict[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "locust", "-f", str(file), *arguments],
        env=os.environ | {"LOCUST_SKIP_MONKEY_PATCH": "1"} | (more or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.timed
@pytest.mark.parametrize("workers", [0, 2])
def test_the_locustfile_replays_a_trace(workers: int, db: str, endpoint: str) -> None:
    """Alone (with a user too many), and with a master and two workers: every request once, on time, judged, in Locust's
    statistics."""
    asked = ["--trace", "t", "--host", endpoint, "--db", db, "--slo", "ttft<0.5s", "--fleet", "1:1"]
    start = ["--headless", "-u", "2", *asked]
    others: list[subprocess.Popen[str]] = []
    if workers:
        port = str(free_port())
        start += [
            "--master",
            "--expect-workers",
            str(workers),
            "--master-bind-host",
            "127.0.0.1",
            "--master-bind-port",
            port,
        ]
        others = [
            locust("--worker", "--master-host", "127.0.0.1", "--master-port", port, *asked) for _ in range(workers)
        ]
    main = locust(*start)
    try:
        said, _ = main.communicate(timeout=60)
    finally:
        for process in (main, *others):
            process.kill()
            process.communicate()
    assert re.search(r"/v1/completions +60 ", said), said[-3000:]
    assert "steelyard: run 1 {'ok': 60}, valid" in said, said[-3000:]
    with open_store(db) as store:
        run, rows = store.run(1), store.observations(1)
        assert (run.ended, run.complete, run.verdict, run.workers) == (True, True, "valid", max(1, workers))
        assert rows.index.tolist() == list(range(60))
        assert float(rows.ttft_sent_s.min()) == pytest.approx(0.05, abs=0.01)
        assert len(set(rows.worker.tolist())) == max(1, workers)


class Worker:
    """A Locust worker that takes what it is told, and does nothing."""

    def __init__(self, name: str, port: int) -> None:
        from locust import __version__  # not before loadgen.swarm has seen to it that it patches nothing
        from locust.rpc.zmqrpc import Client

        self.rpc = Client("127.0.0.1", port, name)
        self.name = name
        self.say("client_ready", __version__)
        self.beating = gevent.spawn(self.beat)

    def beat(self) -> None:
        while True:
            gevent.sleep(0.5)
            self.say("heartbeat", {"state": "ready", "current_cpu_usage": 0, "current_memory_usage": 0})

    def say(self, kind: str, data: Any = None) -> None:
        from locust.rpc import Message

        self.rpc.send(Message(kind, data, self.name))

    def hear(self, kind: str) -> Any:
        with gevent.Timeout(60):
            while (said := self.rpc.recv()).type != kind:
                pass
        return said.data

    def leave(self) -> None:
        self.beating.kill()
        self.say("quit")
        context = self.rpc.socket.context
        self.rpc.close(linger=1000)
        context.term()


def test_a_share_is_sent_by_the_worker_that_was_told_it_or_by_nobody(db: str, endpoint: str) -> None:
    """One worker is replaced before the start and two leave after it: Locust starts their users anew at the one that is
    left, which sends its own share, every third request, once, and no other. The run ends, incomplete."""
    port = free_port()
    asked = ["--trace", "t", "--db", db, "--host", endpoint]
    master = ["--master", "--expect-workers", "3", "--master-bind-host", "127.0.0.1", "--master-bind-port", str(port)]
    main = locust("--headless", "-u", "3", "-r", "3", *master, *asked)
    replaced, first = (Worker(name, port) for name in ("replaced", "first"))
    replaced.hear("ack")
    first.hear("ack")
    replaced.leave()
    other = locust("--worker", "--master-host", "127.0.0.1", "--master-port", str(port), *asked)
    third = Worker("third", port)
    try:
        for worker in (first, third):
            worker.hear("spawn")
            if worker is third:  # by SIGTERM a worker says so much itself
                worker.say("steelyard.done", {"run": 1, "error": "stopped before its end"})
            worker.leave()
        said, _ = main.communicate(timeout=60)
    finally:
        for process in (main, other):
            process.kill()
            process.communicate()
    assert main.returncode == 1
    assert "steelyard: run 1 {'ok': 20, 'unsent': 40}, invalid: worker " in said, said[-3000:]
    assert re.search(r"worker \d went away;", said), said[-3000:]
    assert re.search(r"worker \d stopped before its end;", said), said[-3000:]
    assert re.search(r"/v1/completions +20 ", said), said[-3000:]
    with open_store(db) as store:
        rows = store.observations(1)
    assert len(set((rows.index[rows.ok] % 3).tolist())) == 1


@pytest.mark.parametrize(
    ("wrong", "words"),
    [(["--trace", "nope"], "'nope'"), (["--trace", "t", "--engine", "vlm"], "'vlm'")],
)
def test_a_wrong_option_ends_locust_with_one_line(wrong: list[str], words: str, db: str, endpoint: str) -> None:
    """Not zero, no traceback, no run, and nobody who waits for one."""
    main = locust("--headless", "--host", endpoint, "--db", db, *wrong)
    try:
        said, _ = main.communicate(timeout=60)
    finally:
        main.kill()
    assert main.returncode not in (0, -9)
    assert sum(words in line for line in said.splitlines()) == 1, said
    assert "Traceback" not in said
    with open_store(db) as store:
        assert store.runs() == []


def failing(mine: Path, endpoint: str, db: str) -> str:
    """What Locust said of a run by a locustfile that fails; it ended by itself, and not with 0."""
    main = locust("--headless", "--host", endpoint, "--trace", "t", "--rate", "5", "--db", db, file=mine)
    try:
        said, _ = main.communicate(timeout=60)
    finally:
        main.kill()
    assert main.returncode not in (0, -9), said
    return str(said)


def test_a_share_that_fails_is_not_sent_again(db: str, endpoint: str, tmp_path: Path) -> None:
    """A mistake in a subclass is said once; nothing is sent after it, the run ends incomplete, and Locust not with 0."""
    mine = tmp_path / "mine.py"
    mine.write_text(
        "import loadgen.locustfile\n\n\nclass Mine(loadgen.locustfile.Replay):\n"
        "    def ended(self, rows):\n        raise ValueError('my mistake')\n"
    )
    said = failing(mine, endpoint, db)
    assert said.count("ValueError: my mistake") == 1, said
    with open_store(db) as store:
        (run,) = store.runs()
        assert (run.ended, run.complete) == (True, False)
        assert run.reason.startswith("my mistake; ")
        assert run.counts["unsent"] > 0
        assert store.observations(run.id).index.tolist() == list(range(60))


def test_rows_that_the_database_did_not_take_go_with_the_next(db: str, endpoint: str, tmp_path: Path) -> None:
    """What was answered is not unsent, though the database was away when it ended."""
    mine = tmp_path / "mine.py"
    mine.write_text(
        "import loadgen.locustfile\nfrom traces.errors import StoreError\nfrom traces.store import Store\n\n"
        "add, failed = Store.add_observations, []\n\n\n"
        "def once(self, run_id, rows):\n    if not failed:\n        failed.append(len(rows))\n"
        "        raise StoreError('locked')\n    add(self, run_id, rows)\n\n\n"
        "Store.add_observations = once\n\n\nclass Mine(loadgen.locustfile.Replay):\n    pass\n"
    )
    failing(mine, endpoint, db)
    with open_store(db) as store:
        (run,) = store.runs()
        assert run.reason.startswith("locked; ")
        assert run.counts["ok"] > 0


class Silent(BaseHTTPRequestHandler):
    """An endpoint that says its model and answers no request; ``came`` are those it got."""

    came: list[str]

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"data": [{"id": "m"}]}')

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.came.append(self.path)
        self.rfile.read(1)  # until the client goes

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize("workers", [0, 1])
def test_what_was_sent_is_no_unsent_request_when_locust_is_stopped(workers: int, db: str, tmp_path: Path) -> None:
    """Start, Stop, Start, Ctrl-C, alone and with a worker, and a database that takes its time: both runs have ended, and what
    was on its way is cancelled, with the time at which it was sent."""
    with open_store(db) as store:
        due = np.repeat([0.0, 600.0], 4)
        store_schedule(store, Schedule("slow", np.arange(8), due, np.full(8, 20), np.full(8, 5)), options={})
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from time import sleep\n\nimport loadgen.locustfile\nfrom traces.store import Store\n\n"
        "add = Store.add_observations\n\n\n"
        "def slowly(self, run_id, rows):\n    sleep(1.5)\n    add(self, run_id, rows)\n\n\n"
        "Store.add_observations = slowly\n\n\nclass Mine(loadgen.locustfile.Replay):\n    pass\n"
    )
    rpc, page = str(free_port()), free_port()
    came: list[str] = []
    silent = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Silent,), {"came": came}))
    threading.Thread(target=silent.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{silent.server_port}"
    asked = ["--trace", "slow", "--db", db, "--host", endpoint]
    start = ["--web-host", "127.0.0.1", "--web-port", str(page), *asked]
    master = ["--master", "--master-bind-host", "127.0.0.1", "--master-bind-port", rpc] if workers else []
    main = locust(*start, *master, file=mine)
    processes = [main]
    if workers:
        there = ["--worker", "--master-host", "127.0.0.1", "--master-port", rpc]
        processes.append(locust(*there, *asked, file=mine))

    def until(sight: Any) -> None:
        end = time.monotonic() + 60
        while not sight():
            assert time.monotonic() < end
            assert main.poll() is None, main.communicate()[0]
            time.sleep(0.1)

    def ready() -> bool:
        try:
            state = json.loads(ask(page, "/stats/requests")[1])
        except OSError:
            return False
        return len(state.get("workers", ())) == workers and state["state"] in ("ready", "stopped")

    try:
        until(ready)
        ask(page, "/swarm", "POST", form="user_count=1&spawn_rate=1")
        until(lambda: len(came) == 4)
        ask(page, "/stop", "POST")
        until(ready)
        ask(page, "/swarm", "POST", form="user_count=1&spawn_rate=1")
        until(lambda: len(came) == 8)
        main.send_signal(signal.SIGINT)
        said, _ = main.communicate(timeout=60)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
        silent.shutdown()
        silent.server_close()
    assert main.returncode == 0, said[-3000:]
    assert "Traceback" not in said
    with open_store(db) as store:
        for run in (1, 2):
            ended, rows = store.run(run), store.observations(run)
            assert (ended.ended, ended.complete) == (True, False), said[-3000:]
            assert ended.counts == {"cancelled": 4, "unsent": 4}, said[-3000:]
            assert ended.reason.startswith("stopped before its end; "), ended.reason
            assert rows.status.tolist() == ["cancelled"] * 4 + ["unsent"] * 4
            assert np.isfinite(rows.sent_s[:4]).all()


def test_locust_with_its_patches_on_is_told(db: str) -> None:
    """One line instead of a replay that cannot be on time."""
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--host", "http://127.0.0.1:1"]
    held = {k: v for k, v in os.environ.items() if k != "LOCUST_SKIP_MONKEY_PATCH"}
    done = subprocess.run(command, env=held, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "Set LOCUST_SKIP_MONKEY_PATCH=1" in done.stdout + done.stderr


def listening(port: int) -> None:
    """Wait until somebody does, half a minute at most."""
    until = time.monotonic() + 30
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=5).close()
        except ConnectionRefusedError:
            assert time.monotonic() < until
            time.sleep(0.05)


def ask(port: int, path: str, method: str = "GET", host: str = "", site: str = "", form: str = "") -> tuple[int, str]:
    headers = {name: value for name, value in (("Host", host), ("Sec-Fetch-Site", site)) if value}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", form.encode() or None, headers=headers, method=method
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_credentials_go_where_the_command_line_says_and_nowhere_else() -> None:
    """Locust's web UI takes a host and a database from whoever posts a form, and its master sends them to whoever joins: no
    request goes to such a host, another page's form is refused, and what is sent holds no password."""
    rpc, page = free_port(), free_port()
    evil = socket.create_server(("127.0.0.1", 0))
    evil.settimeout(0.0)
    more = {"STEELYARD_DB": "postgresql://me:pl4nted@127.0.0.1:1/x", "STEELYARD_API_KEY": "pl4nted-key"}
    ports = ["--web-host", "127.0.0.1", "--web-port", str(page), "--master-bind-host", "127.0.0.1"]
    main = locust(
        "--master",
        *ports,
        "--master-bind-port",
        str(rpc),
        "--trace",
        "t",
        "--host",
        "http://me:pl4nted@127.0.0.1:1",
        more=more,
    )
    worker = Worker("anybody", rpc)
    try:
        worker.hear("ack")
        listening(page)  # some moments later
        form = "user_count=1&spawn_rate=1"
        there = f"http://127.0.0.1:{evil.getsockname()[1]}"
        assert ask(page, "/swarm", "POST", site="cross-site", form=form)[0] == 403
        assert ask(page, "/swarm", "POST", host="evil.example", form=form)[0] == 421
        told = []
        for named in (f"host={there}", "host=http://127.0.0.1:1&db=postgresql://me@127.0.0.1:1/y"):
            assert ask(page, "/swarm", "POST", form=f"{form}&{named}")[0] == 200
            told.append(worker.hear("steelyard.run"))
            told.append(worker.hear("spawn"))
            worker.hear("stop")
            ask(page, "/stop", "POST")  # ends the start, too: it waits for users, and would then say "running"
        assert ask(page, "/")[0] == 200
    finally:
        worker.leave()
        main.kill()
        said, _ = main.communicate()
    with pytest.raises(BlockingIOError):
        evil.accept()
    evil.close()
    assert "pl4nted" not in repr(told)
    assert "alone" in told[0]["error"]
    assert "alone" in told[2]["error"]
    assert "pl4nted" not in said


def test_locusts_ports_stay_on_this_machine_and_a_worker_is_told_the_endpoint() -> None:
    """A web UI and a master on every interface are refused, with why and what to give; so is a worker without its own --host."""
    code = """
import loadgen.locustfile as file
from locust.argument_parser import parse_options
from locust.env import Environment

def environment(*options):
    held = parse_options(args=list(options))
    return Environment(host=held.host, parsed_options=held)

def told(one):
    try:
        file.listen(one)
    except SystemExit as why:
        print(">", why)
    else:
        print("> taken")

HOST = ("--host", "http://127.0.0.1:1")
for host in ("", "10.0.0.1", "127.0.0.1"):
    one = environment(*HOST, "--web-host", host)
    one.create_local_runner()
    one.create_web_ui(host, 0, delayed_start=True)
    told(one)
for host in ("*", "0.0.0.0", "::", "10.0.0.1", "127.0.0.1"):
    master = environment(*HOST)
    runner = master.create_master_runner("127.0.0.1", 0)
    runner.master_bind_host = host  # no test listens elsewhere
    told(master)
worker = environment()
worker.create_worker_runner("127.0.0.1", runner.server.port)
told(worker)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"LOCUST_SKIP_MONKEY_PATCH": "1"},
        cwd=LOCUSTFILE.parent.parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    words = (
        "steelyard: --web-host *: ",
        "steelyard: --web-host 10",
        "taken",
        "steelyard: --master-bind-host *: ",
        "steelyard: --master-bind-host 0.0.0.0: ",
        "steelyard: --master-bind-host ::: ",
        "taken",
        "taken",
        "steelyard: a worker needs --host URL and --db URL",
    )
    lines = [line[2:] for line in done.stdout.splitlines() if line.startswith("> ")]
    assert len(lines) == len(words), done
    assert all(line.startswith(word) for word, line in zip(words, lines, strict=True)), done.stdout
    assert "Give --web-host 127.0.0.1" in lines[0]
    assert "Give --master-bind-host 127.0.0.1" in lines[3]
    assert done.stderr.count("--master-bind-host 10.0.0.1: whoever reaches") == 1


def test_the_web_ui_shows_the_replay_and_stops_it(db: str, endpoint: str) -> None:
    """Our figures in Locust's own answer, its statistics beside them; another host's name and a new swarm are refused;
    Stop drains and stores, and before the load begins nothing is sent. It answers as soon as its address is said, and leaves no
    port taken with nobody behind it."""
    port = free_port()
    n = 800
    asked = Schedule("t", np.arange(n), np.arange(n) / 40.0, np.full(n, 20), np.full(n, 5))
    seen: dict[str, Any] = {}

    def watch() -> None:
        until = time.monotonic() + 60  # workers report to Locust every three seconds, when they are there
        while "/v1/completions" not in (stats := ask(port, "/stats/requests"))[1] and time.monotonic() < until:
            time.sleep(0.5)
        seen["stats"] = stats
        seen["page"] = ask(port, "/?tab=steelyard")
        seen["foreign"] = ask(port, "/stats/requests", host="evil.example")
        seen["page of another site"] = ask(port, "/stop", site="cross-site")
        seen["swarm"] = ask(port, "/swarm", "POST")
        seen["stop"] = ask(port, "/stop")

    def knock(_: str = "") -> None:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()

    def early(_: str) -> None:
        seen["early stop"] = ask(port, "/stop")  # before any worker has joined

    swarm = Swarm(1, web=Door(port=port))
    swarm.on_listen = early
    with swarm, open_store(db) as store:
        with pytest.raises(KeyboardInterrupt):
            replay(store, swarm, asked, endpoint)
        assert store.runs() == []
        thread = threading.Thread(target=watch)
        thread.start()
        with pytest.raises(Interrupted):
            replay(store, swarm, asked, endpoint, slo=Slo.parse("ttft<0.5s"))
        thread.join()
        run = store.run(1)
        # Locust's watch over heartbeats does this a minute after a worker went missing, and ends when it raises.
        assert swarm.environment is not None
        swarm.environment.runner.start(user_count=0, spawn_rate=0)
    with pytest.raises(ConnectionRefusedError):
        knock()
    assert seen["page"][0] == 200
    assert "extended_tabs" in seen["page"][1] or "extendedTabs" in seen["page"][1]
    held = json.loads(seen["stats"][1])
    (ours,) = held["extended_stats"]
    rows = {row["name"]: row["value"] for row in ours["data"]}
    assert " of 800, " in rows["Requests ended"]
    assert rows["Requests ended"].endswith("pending")
    p50, p99 = map(float, re.findall(r"p50 (\S+)  p99 (\S+) ms", rows["TTFT, last 10 s"])[0])
    assert 50.0 <= p50 <= p99 < 15e3  # by the profile 50, and more where this machine is busy
    assert rows["Goodput within ttft<0.5s, last 10 s"].endswith("/s")
    assert any(name.startswith("decode ") for name in rows)
    assert any(row["name"] == "/v1/completions" for row in held["stats"])
    assert seen["foreign"][0] == 421
    assert seen["page of another site"][0] == 403
    assert "start another run" in seen["swarm"][1]
    assert all(json.loads(seen[when][1])["success"] for when in ("early stop", "stop"))
    assert run.ended
    assert not run.complete
    assert 0 < run.counts["ok"] < n
    assert run.counts["ok"] + run.counts["unsent"] == n


def test_the_web_ui_stays_on_this_machine() -> None:
    """On another address it wants a token, and says why."""
    with pytest.raises(InputError, match=r"could stop this run, so it needs a token\. Set STEELYARD_WEB_TOKEN"):
        Swarm(1, web=Door("0.0.0.0", 8089))


def test_the_web_ui_knows_its_own_names_and_stops_for_its_own_page_alone() -> None:
    """On every address of loopback it answers to its own URL. With a token Stop by a cookie is asked for by a page of this
    port, also where the browser leaves Sec-Fetch-Site out; a cookie ends with the process that gave it."""
    with Swarm(1, web=Door("127.0.0.2", 0)) as swarm, urllib.request.urlopen(swarm.web, timeout=60) as answer:
        assert answer.status == 200
    with Swarm(1, web=Door("127.0.0.1", 0, token="t0ken")) as swarm:
        where = swarm.web.partition("/?")[0]
        cookie = Door(token="t0ken").cookie("web")
        port = int(where.rpartition(":")[2])

        def stop(**headers: str) -> int:
            sent = {"Host": f"gpu-host:{port}"} | {k.replace("_", "-"): v for k, v in headers.items()}
            try:
                with urllib.request.urlopen(
                    urllib.request.Request(f"{where}/stop", headers=sent), timeout=60
                ) as answer:
                    return int(answer.status)
            except urllib.error.HTTPError as error:
                return error.code

        known = {"Cookie": f"steelyard-web={cookie}"}
        assert stop(**known) == 403
        assert stop(**known, Referer="http://gpu-host:9000/") == 403
        assert stop(**known, Origin="http://gpu-host:9000") == 403
        assert not swarm._stop_asked.is_set()
        assert stop(**known, Referer=f"http://gpu-host:{port}/?tab=steelyard") == 200
        assert stop(**known, Sec_Fetch_Site="same-origin") == 200
        assert stop(Authorization="Bearer t0ken") == 200
    other = "from loadgen.ports import Door; print(Door(token='t0ken').cookie('web'))"
    done = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() != cookie
