"""loadgen.replay and its verbs, end to end: a real endpoint, a real swarm, real rows in SQL."""

from __future__ import annotations

import _thread
import contextlib
import csv
import fcntl
import http.server
import io
import json
import math
import os
import re
import resource
import shlex
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

import loadgen.live
import loadgen.swarm
import traces.measures
import traces.store
from advisor.cli import main
from loadgen.client import target
from loadgen.cluster.embedded import embedded
from loadgen.control import Endpoint
from loadgen.control.journal import Journal
from loadgen.control.online import Planned
from loadgen.control.reference import Reference
from loadgen.engines import WORDS, single_token_words
from loadgen.replay import GRACE_S, Writer, read_api_key, replay
from loadgen.spool import Spool, Steered, folder
from loadgen.spool import waiting as spooled
from loadgen.swarm import Swarm
from loadgen.sweep import plan, saturate, sweep
from traces.errors import EndpointError, InputError, StoreError
from traces.ingest import ingest
from traces.measures import Slo, summarise
from traces.records import Decision, Feed, Fleet, FleetChange, Histogram, Observations, Run, Sample, Schedule
from traces.shape import ramp, to_rate
from traces.shipped import shipped
from traces.store import Store, open_store

SLO = Slo.parse("ttft<0.5s tpot<50ms")


def schedule(n: int, rate_per_s: float, output_tokens: int = 10) -> Schedule:
    gaps = np.random.default_rng(1).exponential(1 / rate_per_s, n)
    due = np.cumsum(gaps) - gaps[0]
    return Schedule("t", np.arange(n), due, np.full(n, 40), np.full(n, output_tokens))


def constant(n: int, rate_per_s: float) -> Schedule:
    """Equal gaps, one answer token."""
    return Schedule("t", np.arange(n), np.arange(n) / rate_per_s, np.full(n, 40), np.full(n, 1))


@pytest.fixture(autouse=True)
def waiting(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that one test leaves on disk are not in the way of another that says there are none, whichever comes first."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("waiting")))


@pytest.fixture(scope="module")
def swarm() -> Iterator[Swarm]:
    with Swarm(workers=2) as made:
        yield made


@pytest.fixture
def store(made_url: str) -> Iterator[Store]:
    with open_store(made_url) as made:
        yield made


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with embedded("constant", Fleet(4, 4)) as url:
        yield url


@pytest.mark.timed
def test_known_truth(store: Store, swarm: Swarm, endpoint: str) -> None:
    """Latencies from sent, through Locust into SQL, agree with the server's own log of the same requests."""
    asked = schedule(100, 40.0)
    run = replay(store, swarm, asked, endpoint, slo=SLO)
    rows = store.observations(run.id)
    assert run.counts == {"ok": 100}
    assert run.complete
    assert (run.engine, run.model, run.profile, run.fleet) == ("reference", "constant", "constant", Fleet(4, 4))
    assert run.engine_version == "profile constant"  # what the reference endpoint says of itself
    with urllib.request.urlopen(endpoint + "/log", timeout=10) as answer:
        log = list(csv.DictReader(io.StringIO(answer.read().decode())))
    theirs = {int(r["id"].rpartition("-")[2]): r for r in log[-100:]}
    assert len(theirs) == 100
    first = np.array([float(theirs[i]["first_s"]) - float(theirs[i]["arrive_s"]) for i in rows.index])
    last = np.array([float(theirs[i]["last_s"]) - float(theirs[i]["arrive_s"]) for i in rows.index])
    ttft_ms = (rows.ttft_sent_s - first) * 1e3
    e2e_ms = (rows.e2e_sent_s - last) * 1e3
    print(f"TTFT error ms p50 {np.median(ttft_ms):.2f} p99 {np.quantile(ttft_ms, 0.99):.2f}")
    assert abs(np.median(ttft_ms)) < 5
    assert abs(np.median(e2e_ms)) < 5
    assert 0.045 < np.median(rows.ttft_sent_s) < 0.060
    assert 0.009 < np.median(rows.tpot_s) < 0.012
    assert (rows.prompt_tokens == 40).all()
    assert (rows.output_tokens == 10).all()
    assert (rows.chunks == 10).all()
    roles = {s.role for s in store.samples(run.id)}
    assert roles == {"prefill", "decode"}


def test_a_fleet_is_put_in_force_first(store: Store, swarm: Swarm) -> None:
    """The run starts when the fleet is the one that was asked for, and an impossible one is refused with the reason."""
    with embedded("demo", Fleet(4, 4)) as url:
        run = replay(store, swarm, schedule(5, 20.0, 3), url, fleet=Fleet(2, 6))
        assert run.fleet == Fleet(2, 6)
        assert Endpoint(target(url)).fleet() == Fleet(2, 6)
        with pytest.raises(EndpointError, match=r"refused the fleet 9:9 .*8 workers"):
            replay(store, swarm, schedule(5, 20.0, 3), url, fleet=Fleet(9, 9))
    assert len(store.runs()) == 1


def test_every_tenth_request_fails_and_the_run_finishes(store: Store, swarm: Swarm) -> None:
    """Failures are stored by kind; the run is whole and its verdict speaks of the generator alone."""
    for kind, name in (("status", "status"), ("reset", "reset"), ("html", "malformed")):
        with embedded("constant", Fleet(1, 1), fail_every=10, fail_kind=kind) as url:
            run = replay(store, swarm, schedule(60, 60.0), url)
            rows = store.observations(run.id)
        assert run.complete
        assert run.counts == {"ok": 54, "failed": 6, f"failed.{name}": 6}
        assert len(rows) == 60
        assert set(rows.error) == {"", name}
        assert {len(d) > 0 for d in rows.detail[rows.error == name]} == {True}


def test_a_stalled_request_times_out(store: Store, swarm: Swarm) -> None:
    """A server that never ends an answer costs the timeout and a named row."""
    with embedded("constant", Fleet(1, 1), fail_every=5, fail_kind="stall") as url:
        run = replay(store, swarm, schedule(10, 50.0), url, timeout_s=5.0)
    assert run.counts == {"ok": 8, "failed": 2, "failed.timeout": 2}


def test_a_killed_worker_leaves_an_incomplete_run(store: Store, endpoint: str) -> None:
    """SIGKILL of one of two workers in the middle: marked incomplete, every row of the other is in the database."""
    import os

    asked, killed = schedule(120, 40.0), list[int]()
    asked.output_tokens[-2:] = 400  # seconds: the victim is at work when it is killed, however late
    with Swarm(workers=2) as pair:

        def kill(ended: int, _: int) -> None:
            if ended >= 10 and not killed:
                killed.append(pair.processes[0])
                os.kill(killed[0], signal.SIGKILL)

        run = replay(store, pair, asked, endpoint, on_progress=kill)
    rows = store.observations(run.id)
    assert not run.complete
    assert "killed by signal 9" in run.reason
    assert len(rows) == 120
    assert set(rows.status[rows.worker == 1]) == {"ok"}
    assert (rows.worker == 1).sum() == 60
    assert run.counts["lost"] > 0
    assert store.run(run.id).counts == run.counts


def serve_raw(answer: bytes | None) -> tuple[str, socket.socket]:
    """A server that gives every request the same bytes, or nothing at all."""
    listener = socket.create_server(("127.0.0.1", 0))

    def loop() -> None:
        held = []
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            held.append(connection)
            connection.recv(65536)
            if answer is not None:
                connection.sendall(answer)
                connection.close()

    threading.Thread(target=loop, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}", listener


def raw(status: str, kind: str, body: bytes) -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (raw("500 Oops", "text/plain", b"\x1b[31mout of memory"), "HTTP 500: out of memory"),
        (raw("200 OK", "text/html", b"<html>gateway</html>"), "web page"),
        (raw("401 No", "application/json", b"{}"), "STEELYARD_API_KEY"),
        (raw("200 OK", "application/json", b'{"data": [{"id": "qwen3-32b"}]}'), "the model 'mine'. It serves: qwen3-32b."),
        (raw("404 No", "text/plain", b"nothing here"), "HTTP 404"),
        (raw("200 OK", "text/plain", b"ok"), "not JSON"),
        (b"SSH-2.0-x\r\n", "no HTTP answer"),
        (b"", "no HTTP answer"),
    ],
)  # fmt: skip
def test_an_endpoint_that_cannot_be_used_is_one_line(store: Store, swarm: Swarm, answer: bytes, words: str) -> None:
    """Before anything is stored: what, where, got, next step."""
    url, listener = serve_raw(answer)
    with listener, pytest.raises(EndpointError) as caught:
        replay(store, swarm, schedule(2, 10.0), target(url, headers={"X-Model": "qwen3-32b"}), model="mine")
    assert words in str(caught.value)
    assert url in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert store.runs() == []


def test_an_endpoint_that_never_answers_is_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that accepts and says nothing is given up after the time allowed."""
    url, listener = serve_raw(None)
    with listener, pytest.raises(EndpointError, match=r"no answer within 0\.5 s"):
        Endpoint(target(url)).fetch("GET", "/v1/models", timeout_s=0.5)


@pytest.mark.parametrize("path", ["/workers/tok%41-3141592653", "/workers/tok%2541-3141592653"])
def test_what_was_asked_for_is_named_without_secrets(path: str) -> None:
    """A secret with a percent sign is looked for before what a path encodes is decoded, and after."""
    url, listener = serve_raw(None)
    with listener, pytest.raises(EndpointError, match=r"/workers/\*+: no answer") as caught:
        Endpoint(target(url, headers={"Authorization": "tok%41-3141592653"})).fetch("GET", path, timeout_s=0.2)
    assert "3141592653" not in str(caught.value)


def test_secrets_are_never_stored(store: Store, swarm: Swarm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A password in the URL and a token in the environment work, and appear nowhere in the database."""
    monkeypatch.setenv("STEELYARD_API_KEY", "tok-3141592653")
    command = [sys.executable, "-c", (
        "import sys; from pathlib import Path; from loadgen.cluster.server import run; from loadgen.cluster.laws import Profile;"
        "from loadgen.ports import Door; from traces.records import Fleet; "
        "run(Profile.load('constant'), Fleet(1, 1), door=Door(token='tok-3141592653'))"
    )]  # fmt: skip
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        url = server.stdout.readline().split()[-1]
        run = replay(store, swarm, schedule(4, 20.0), url.replace("//", "//user:pass2718@"))
        assert run.counts == {"ok": 4}
        assert run.endpoint == url
        monkeypatch.delenv("STEELYARD_API_KEY")
        with pytest.raises(EndpointError, match="wants credentials"):
            replay(store, swarm, schedule(4, 20.0), url)
    finally:
        server.terminate()
        server.wait(10)
        server.stdout.close()
    held = b"".join(p.read_bytes() for p in tmp_path.iterdir())
    assert b"tok-3141592653" not in held
    assert b"pass2718" not in held


def test_a_token_file_holds_a_token(tmp_path: Path) -> None:
    """A missing, empty or many-lined file is an input error that does not show what it holds."""
    good = tmp_path / "key"
    good.write_text("abc\n")
    assert read_api_key(good) == "abc"
    for content in ("", "a\nb"):
        good.write_text(content)
        with pytest.raises(InputError, match="secret alone"):
            read_api_key(good)
    with pytest.raises(InputError, match="cannot be read"):
        read_api_key(tmp_path / "none")


def test_a_sweep_measures_every_fleet_and_puts_the_old_one_back(store: Store, swarm: Swarm) -> None:
    """Each fleet once a repeat, in an order that the seed decides, under one group; then the fleet from before. The same again
    asks nothing, and is refused where another system, or another goal, would be said to have been measured."""
    asked, said = schedule(3, 30.0, 2), list[str]()
    with embedded("demo", Fleet(4, 4)) as url, embedded("demo", Fleet(3, 5)) as other:
        fleets = [Fleet(1, 7), Fleet(3, 5), Fleet(6, 2)]
        group, runs, _ = sweep(store, swarm, asked, target(url), fleets, seed=3, repeats=2, slo=SLO)
        assert Endpoint(target(url)).fleet() == Fleet(4, 4)
        runs = [replace(run, verdict="valid", reason="") for run in runs]  # however busy this machine was
        for run in runs:
            store.end_run(run)
        usual: dict[str, Any] = {"seed": 3, "repeats": 2, "slo": SLO, "group": group, "say": said.append}
        again = sweep(store, swarm, asked, target(other), fleets, **usual)[1]  # the same profile at another port
        assert [run.id for run in again] == [run.id for run in runs]
        assert said == [f"group {group}: 6 of 6 cells were measured before"]
        for changed in ({"slo": None}, {"warmup_s": 0.01}, {"gpus_per_worker": (2, 1)}, {"engine": "openai"}):
            (name,) = changed
            with pytest.raises(InputError, match=f"group '{group}': run 1 asked .* with another {name}"):
                sweep(store, swarm, asked, target(url), fleets, **usual | changed)
        store.end_run(replace(runs[0], engine="openai", endpoint="http://old"))
        with pytest.raises(InputError, match=rf"another endpoint \('http://old', now '{url}'\). Give another --group"):
            sweep(store, swarm, asked, target(url), fleets, **usual | {"engine": "openai"})
        for run in runs:
            store.end_run(replace(run, engine="openai", endpoint=url))  # which says no version
        sweep(store, swarm, asked, target(url), fleets, **usual | {"engine": "openai"})
        assert (
            said[-1] == f"group {group}: 6 of 6 cells were measured before (engine's version not known: the server now)"
        )
        for run in runs:
            store.end_run(run)
        store.end_run(replace(runs[0], engine_version=""))  # as before 0008, or where the server did not say it
        again = sweep(store, swarm, asked, target(other), [Fleet(2, 6), runs[0].fleet], **usual | {"repeats": 1})[1]
        assert {run.fleet: run.id for run in again} == {runs[0].fleet: 1, Fleet(2, 6): 7}
        assert said[-1] == f"group {group}: 1 of 2 cells were measured before (engine's version not known: run 1)"
        store.end_run(runs[0])
    assert sorted(run.fleet for run in runs[:3] if run.fleet) == fleets
    assert sorted(run.fleet for run in runs[3:] if run.fleet) == fleets
    assert {run.group for run in runs} == {group}
    assert [r.id for r in store.runs(group=group)] == [*(r.id for r in runs), 7]


def test_cells_are_shuffled_and_an_anchor_stands_between_the_repeats() -> None:
    """Every cell once a repeat; the middle one at the beginning and after each; another seed, another order."""
    fleets = [Fleet(1, 3), Fleet(2, 2), Fleet(3, 1)]
    order = plan(fleets, 2, seed=1, repeats=2, anchor=True)
    cells = {(f, k) for f in fleets for k in range(2)}
    assert (len(order), order[0], order[7], order[14]) == (15, (Fleet(2, 2), 1), (Fleet(2, 2), 1), (Fleet(2, 2), 1))
    assert set(order[1:7]) == set(order[8:14]) == cells
    assert order[1:7] != plan(fleets, 2, seed=2, repeats=2, anchor=True)[1:7]


@pytest.mark.timed
def test_a_sweep_that_was_broken_off_goes_on(store: Store, swarm: Swarm) -> None:
    """Of a group that is there, complete runs are taken as they are; incomplete and invalid ones are measured again."""
    fleets = [Fleet(1, 3), Fleet(2, 2)]
    rates = [schedule(4, 40.0, 2), schedule(4, 20.0, 2)]
    with embedded("constant", Fleet(2, 2)) as url:
        group, runs, drift = sweep(store, swarm, rates, target(url), fleets, anchor=True, slo=SLO, factors=(4.0, 2.0))
        assert drift is not None
        assert all(run.rate_factor == (4.0 if run.rate_per_s == rates[0].rate_per_s else 2.0) for run in runs)
        assert len(drift.runs) == 3
        assert 0 <= drift.largest < 1.0
        store.end_run(replace(store.run(runs[1].id), complete=False))
        store.end_run(replace(store.run(runs[-1].id), verdict="invalid"))
        _, again, _ = sweep(store, swarm, rates, target(url), fleets, anchor=True, slo=SLO, group=group)
        new = [run.id for run in again if run.id > runs[-1].id]
        assert len(new) == 2
        assert len(again) == len(runs) == 6
        assert {run.id for run in again} - set(new) == {run.id for run in runs[:-1]} - {runs[1].id}
        _, third, _ = sweep(store, swarm, rates, target(url), fleets, anchor=True, slo=SLO, group=group)
        assert {run.id for run in third} == {run.id for run in again}


@pytest.mark.timed
def test_the_rate_that_a_fleet_sustains_is_bracketed(store: Store, swarm: Swarm, tmp_path: Path) -> None:
    """One prefill worker with 25 ms a step (one request each): above 40/s its queue grows. Found within the tolerance."""
    profile = tmp_path / "gate.toml"
    profile.write_text(
        'name = "gate"\ndescription = "one request a step"\na_s = 0.025\nmax_batch_requests = 1\nc0_s = 0.001\n'
    )
    asked = constant(80, 30.0)
    with embedded(str(profile), Fleet(1, 1)) as url:
        found = saturate(
            store, swarm, lambda rate: to_rate(asked, rate), target(url), Fleet(1, 1),
            slo=Slo.parse("ttft<0.3s"), start_per_s=30.0, tolerance=0.2, group="limit",
        )  # fmt: skip
    assert 36 < found.held_per_s < found.failed_per_s < 60
    assert found.failed_per_s / found.held_per_s <= 1.2
    assert len(found.runs) == len(store.runs(group="limit")) <= 12
    assert found.goodput_per_s > 0.8 * found.held_per_s


def test_a_search_ends_where_no_queue_could_fail_the_slo(store: Store, swarm: Swarm, endpoint: str) -> None:
    """Ten requests that are sent within the time that one may wait say nothing of a rate: at least, and how many are needed."""
    asked = constant(10, 10.0)
    found = saturate(
        store, swarm, lambda rate: to_rate(asked, rate), target(endpoint), None, slo=Slo.parse("ttft<2s"), start_per_s=2.5
    )  # fmt: skip
    assert (found.held_per_s, math.isnan(found.failed_per_s)) == (2.5, True)
    assert "10 requests at 5/s are sent within 1.8 s" in found.reason
    assert "at least --requests 100" in found.reason


def test_a_search_ends_where_the_warm_up_would_leave_no_request(store: Store, swarm: Swarm, endpoint: str) -> None:
    """What was found is not lost: at least, and how many requests are needed beside those of the warm-up."""
    asked = constant(30, 20.0)
    found = saturate(
        store, swarm, lambda rate: to_rate(asked, rate), target(endpoint), None,
        slo=Slo.parse("ttft<5s"), start_per_s=20.0, warmup_s=1.0,
    )  # fmt: skip
    assert (found.held_per_s, math.isnan(found.failed_per_s)) == (20.0, True)
    assert {store.run(n).verdict for n in found.runs[:-1]} <= {"invalid"}  # spoiled by a busy machine, and made again
    assert "30 requests at 40/s are sent within 0 s after the warm-up" in found.reason
    assert "at least --requests 2040" in found.reason


def test_a_search_ramps_at_every_rate_alike(
    db: str, endpoint: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trace is scaled to each rate and then ramped; the rate is that after the ramp, its factor stands with the run.
    The fleet that a crash left here does not come back: exit code 1."""
    monkeypatch.setattr(traces.measures, "LAG_LIMIT_S", 50.0)  # no run is spoiled by a busy machine
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    file = tmp_path / "control.toml"
    file.write_text('kind = "command"\nset = ["false", "{prefill}", "{decode}"]\nget = ["echo", "4:4"]\n')
    journal = Journal(str(file), "x")
    journal.lock("sweep")
    journal.begin("sweep", Fleet(3, 5), Fleet(4, 4))
    journal.unlock()
    command = [
        "sweep",
        "azure-2023-conv",
        "--endpoint",
        endpoint,
        "--fleets",
        "4:4",
        "--workers",
        "1",
        "--db",
        db,
        "--json",
    ]
    few = ["--requests", "12", "--slo", "ttft_p10<0.25s"]
    assert main([*command, *few, "--saturate", "--rate", "10", "--ramp", "0.5", "--control", str(file)]) == 1
    found = said(capsys)
    assert found["put_back"] is False
    tried = found["fleets"][0]["runs"]
    with open_store(db) as store:
        recorded = store.schedule("azure-2023-conv").take(np.arange(12)).rate_per_s
        runs = [store.run(n) for n in tried]
    assert [run.rate_factor for run in runs] == pytest.approx([10 / recorded, 20 / recorded])
    for run in runs:
        assert run.changes == ("first 12 of 9754 requests", f"rate x{run.rate_factor:.6g}", "ramp over 0.5 s")


def test_a_rate_holds_where_the_constraints_on_quantiles_are_met(
    store: Store, swarm: Swarm, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An SLO of constraints alone has no limit that a request could miss: its quantiles decide, whatever the attainment."""
    monkeypatch.setattr(traces.measures, "LAG_LIMIT_S", 50.0)  # no run is spoiled by a busy machine
    asked = constant(10, 20.0)
    for text, holds in (("ttft_p50<1ms tpot_p99<1s", False), ("ttft_p99<5s", True)):
        found = saturate(
            store, swarm, lambda rate: to_rate(asked, rate), target(endpoint), None, slo=Slo.parse(text), start_per_s=20.0, most=1
        )  # fmt: skip
        assert (math.isnan(found.failed_per_s), found.held_per_s == 20.0) == (holds, holds)


def test_a_warm_up_is_measured_and_stands_in_no_figure(store: Store, swarm: Swarm, endpoint: str) -> None:
    """Its rows are stored and counted; latencies and lag are those of the rest; a ramp rises to the rate."""
    asked = ramp(constant(60, 30.0), 1.0)
    assert np.diff(asked.due_s)[:3].mean() > 3 * np.diff(asked.due_s)[-3:].mean()
    run = replay(store, swarm, asked, endpoint, warmup_s=1.0)
    rows = store.observations(run.id)
    assert (run.warmup_s, run.counts, len(rows)) == (1.0, {"ok": 60}, 60)
    late = rows.take(rows.due_s >= 1.0)
    assert store.run(run.id).counted(rows).index.tolist() == late.index.tolist()
    assert 0 < len(late) < 60
    assert run.lag_max_ms == pytest.approx(float(late.lag_s.max()) * 1e3)
    with pytest.raises(InputError, match="--warmup 9 s leaves no request"):
        replay(store, swarm, asked, endpoint, warmup_s=9.0)


class Counting(http.server.BaseHTTPRequestHandler):
    """An OpenAI-shaped server whose ``usage`` counts prompts by a function of its own."""

    protocol_version = "HTTP/1.1"
    count: Callable[[str], int]

    def answer(self, kind: str, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        models = {"data": [{"id": "m", "owned_by": "else"}]}
        if self.path == "/v1/models":
            self.answer("application/json", json.dumps(models).encode())
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
        usage = {"prompt_tokens": type(self).count(text), "completion_tokens": body["max_tokens"]}
        events = [{"choices": [{"index": 0, "text": " a", "delta": {"content": " a"}}]}] * body["max_tokens"]
        parts = [f"data: {json.dumps(e)}\n\n" for e in [*events, {"choices": [], "usage": usage}]]
        self.answer("text/event-stream", "".join([*parts, "data: [DONE]\n\n"]).encode())

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def counting(count: Callable[[str], int]) -> Iterator[str]:
    handler = type("Handler", (Counting,), {"count": staticmethod(count)})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def lengths(n: int) -> Schedule:
    """Prompts of 20 to 1,000 tokens."""
    return Schedule("t", np.arange(n), np.arange(n) * 0.02, np.linspace(20, 1000, n).astype(np.int64), np.full(n, 2))


@pytest.mark.parametrize("chat", [False, True])
def test_prompts_are_made_to_the_server_s_own_count(store: Store, swarm: Swarm, chat: bool) -> None:
    """A server that counts 1.37 tokens a word and 11 for its template: after a few questions the lengths are those asked for."""
    with counting(lambda text: 11 + math.ceil(1.37 * len(text.split()))) as url:
        run = replay(store, swarm, lengths(40), url, text=True, chat=chat)
    rows = store.observations(run.id)
    assert set(rows.status.tolist()) == {"ok"}
    off = rows.prompt_tokens - rows.requested_prompt_tokens
    assert int(np.abs(off).max()) <= 1
    assert any("calibrated: 1.37 tokens a unit and 11" in change for change in run.changes)


def test_a_cell_of_a_long_trace_is_known_again(store: Store, swarm: Swarm) -> None:
    """Calibration is a change that the run names, not another schedule: a sweep that goes on finds a feed's run."""
    whole = lengths(4)
    asked = Feed("t", 4, whole.span_s, whole.longest_prompt, "test", lambda: iter([whole]))
    with counting(lambda text: 11 + len(text.split())) as url:
        run = replay(store, swarm, asked, url, text=True)
    assert any("calibrated" in change for change in run.changes)
    assert run.schedule_digest == asked.digest()


def test_words_of_unlike_counts_even_out(store: Store, swarm: Swarm) -> None:
    """Where some words are one token and others three, a prompt is off by what a part of the word list is, however long it is."""
    long = Schedule(
        "t", np.arange(20), np.arange(20) * 0.02, np.linspace(100, 9000, 20).astype(np.int64), np.full(20, 2)
    )
    with counting(lambda text: sum(1 + 2 * (len(word) > 5) for word in text.split())) as url:
        run = replay(store, swarm, long, url, text=True)
    rows = store.observations(run.id)
    assert int(np.abs(rows.prompt_tokens - rows.requested_prompt_tokens).max()) <= 30


def test_a_tokenizer_makes_text_exact(store: Store, swarm: Swarm, tmp_path: Path) -> None:
    """Words that are one token each, of the model's own tokenizer.json; its template's tokens are found by calibration."""
    made = tokenizers.ByteLevelBPETokenizer()
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(WORDS, 200)) for _ in range(60)]
    made.train_from_iterator(texts, vocab_size=700, min_frequency=2)
    made._tokenizer.save(str(tmp_path / "tokenizer.json"))
    words = single_token_words(tmp_path)
    assert 64 <= len(words) < len(WORDS) + 700
    with counting(lambda text: 5 + len(made.encode(text).ids)) as url:
        run = replay(store, swarm, lengths(40), url, text=True, words=words)
    rows = store.observations(run.id)
    assert rows.prompt_tokens.tolist() == rows.requested_prompt_tokens.tolist()
    for name, text, told in (("none", None, "holds no tokenizer.json"), ("bad", "{", "cannot be read")):
        (tmp_path / name).mkdir()
        if text:
            (tmp_path / name / "tokenizer.json").write_text(text)
        with pytest.raises(InputError, match=told):
            single_token_words(tmp_path / name)


def rename(path: Path, before: str, after: str) -> None:
    """Make the database fail for real, and work again."""
    with contextlib.closing(sqlite3.connect(path, timeout=10)) as connection:
        connection.execute(f"alter table {before} rename to {after}")
        connection.commit()


@pytest.mark.parametrize(
    ("back_in_time", "ask"),
    [(True, []), (False, []), (False, ["runs", "--db", "sqlite:///away.db"])],
    ids=["soon", "asked", "unasked"],
)
def test_a_database_that_goes_away_costs_nothing(
    swarm: Swarm, endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, back_in_time: bool, ask: list[str]
) -> None:
    """Rows wait on disk and are stored when the database is back, by the command that was told or unasked; nothing twice."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "away.db"
    url = f"sqlite:///{path}"
    asked = schedule(60, 15.0)

    def leave() -> None:
        until = time.monotonic() + 60
        with contextlib.closing(sqlite3.connect(path, timeout=10)) as connection:
            while (
                not connection.execute("select count(*) from observations").fetchone()[0] and time.monotonic() < until
            ):
                time.sleep(0.02)
        rename(path, "observations", "hidden")
        if back_in_time:
            time.sleep(1.1)
            rename(path, "hidden", "observations")

    with open_store(url) as store:
        leaving = threading.Thread(target=leave)
        leaving.start()
        if back_in_time:
            run = replay(store, swarm, asked, endpoint)
            assert run.complete
        else:
            with pytest.raises(StoreError, match=r"rows of run 1 wait in .*run: steelyard runs recover") as told:
                replay(store, swarm, asked, endpoint, patience_s=0.0)
            assert list(folder().iterdir())
            assert main(["traces", "--db", url]) == 0  # the table is still away: the rows wait, the verb does its work
            assert list(folder().iterdir())
            with contextlib.closing(
                sqlite3.connect(path)
            ) as connection:  # before the run's own last try finds its table again
                assert connection.execute("select count(*) from hidden").fetchone()[0] < 60
            rename(path, "hidden", "observations")
            # by the command that was told, or by any other on that database, from any folder
            assert main(ask or shlex.split(str(told.value).partition("run: steelyard ")[2])) in (0, 1)
        leaving.join()
        until = time.monotonic() + 10  # the replay's own writer may be at it: then the command leaves it to that
        while any(folder().glob("*")) and time.monotonic() < until:
            time.sleep(0.05)
        run = store.run(1)
        assert (run.ended, run.complete, run.counts) == (True, True, {"ok": 60})
        assert store.observations(1).index.tolist() == asked.index.tolist()
        readings = [(s.at_s, s.worker) for s in store.samples(1)]
        assert len(readings) == len(set(readings)) > 0
    assert not any(folder().glob("*"))
    assert main(["runs", "recover", "--db", url]) == 0


def held_rows(n: int) -> Observations:
    """Rows of a run, as they come from a worker."""
    rows = Observations.unsent(schedule(n, 40.0))
    rows.status[:] = "ok"
    return rows


def begun(store: Store) -> Run:
    asked = schedule(4, 40.0)
    return store.begin_run(
        Run(name="t", trace="t", schedule_digest=asked.digest(), scheduled=4, endpoint="x", engine="openai", model="m",
            fleet=None, started_unix_s=0.0, workers=1, rate_per_s=1.0)
    )  # fmt: skip


def test_rows_are_on_disk_while_the_database_does_not_answer(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found by tests.faults: rows that waited for a lock were in memory only, and lost with a master that was killed. Soon
    they are on disk, also those after them; the end does not wait longer than it may; nothing is stored twice."""
    run = begun(store)
    with contextlib.closing(sqlite3.connect(tmp_path / "made.db", isolation_level=None)) as other:
        with Writer(store, run.id, "steered", every_s=0.1) as writer:
            other.execute("BEGIN IMMEDIATE")
            change = FleetChange(0.5, 1.0, Fleet(1, 1), Fleet(2, 1), "why", 0.75)
            decided = [
                Decision(k, k + 1.0, "move", Fleet(1, 1), after, "why", 2)
                for k, after in enumerate((Fleet(2, 1), None))
            ]
            for k in range(3):
                rows = held_rows(4).take(np.array([k]))
                rows.sent_s[:], rows.last_token_s[:] = 0.4 * k, 0.4 * k + 0.2
                writer.put(rows)
                if k == 1:
                    writer.put(change)
                    for one in decided:
                        writer.put(Steered(one, "c", 1000.0))
                until, waiting = time.monotonic() + 10, ""
                while f'"index": [{k}]' not in waiting and time.monotonic() < until:
                    time.sleep(0.1)
                    waiting = "".join(p.read_text() for p in folder().glob("*.jsonl"))
                assert f'"index": [{k}]' in waiting
        before = time.monotonic()
        with pytest.raises(StoreError, match=r"does not answer.*Nothing is lost.*runs recover"):
            writer.settle(run, 0.5)
        assert time.monotonic() - before < 15.0  # SQLite itself waits 30 s for the lock
        other.execute("ROLLBACK")
    monkeypatch.setenv(
        "STEELYARD_DB", f"sqlite:///{tmp_path}/made.db"
    )  # then the group above stores them, and recover says it
    capsys.readouterr()
    assert main(["runs", "recover", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 3
    assert store.observations(run.id).index.tolist() == [0, 1, 2]
    (back,) = store.fleet_changes(run.id)
    assert (back.reason, back.after, back.joined_s) == ("why", Fleet(2, 1), 0.75)
    assert (back.in_flight, back.failed) == (2, 0)  # by the rows that waited with it
    assert store.decisions(run.id) == decided
    assert not list(folder().iterdir())


def test_a_slow_database_is_asked_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is far away stores a batch a little later than rows may be in memory alone: they are on disk meanwhile, and are
    dropped from there when it has them, instead of being stored again with every batch."""
    run, rows, took = begun(store), held_rows(4), store.add_observations
    asked, copied = list[int](), False

    def slow(run_id: int, batch: Observations) -> None:
        time.sleep(GRACE_S + 0.2)
        took(run_id, batch)
        asked.extend(batch.index.tolist())

    monkeypatch.setattr(store, "add_observations", slow)
    with Writer(store, run.id, every_s=0.05) as writer:
        for k in range(3):
            writer.put(rows.take(np.array([k])))
            until = time.monotonic() + 20
            while (len(asked) <= k or writer.spool.size()) and time.monotonic() < until:
                time.sleep(0.01)
                copied = copied or writer.spool.size() > 0
    assert writer.settle(run, 5.0).ended
    assert copied
    assert asked == [0, 1, 2]


def test_what_a_writer_could_not_do_for_a_moment_is_no_error_of_the_run(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that is denied while a copy is dropped, or while batches are joined, costs no row and no run that is whole."""
    run, rows = begun(store), held_rows(4)

    class Readings(list[Sample]):
        denied = False

        def __iter__(self) -> Iterator[Sample]:
            if not Readings.denied:
                Readings.denied = True
                raise MemoryError
            return super().__iter__()

    def denied(size: int) -> None:
        raise MemoryError

    took = store.add_observations

    def slow(run_id: int, batch: Observations) -> None:
        time.sleep(GRACE_S + 1.0)
        took(run_id, batch)

    with Writer(store, run.id, every_s=0.05) as writer:
        writer.put(rows.take(np.array([0, 1])))
        writer.put(Readings([Sample(1.0, "w", "decode", waiting_requests=1.0)]))
        until = time.monotonic() + 20
        while not (len(store.samples(run.id)) and writer.error is None) and time.monotonic() < until:
            time.sleep(0.02)
        assert writer.error is None  # else the next one might be this one
        monkeypatch.setattr(store, "add_observations", slow)
        monkeypatch.setattr(writer.spool, "forget", denied)
        writer.put(rows.take(np.array([2, 3])))
        while writer.error is None and time.monotonic() < until:
            time.sleep(0.01)
        assert isinstance(writer.error, StoreError)
        assert str(writer.error).startswith("out of memory")
    assert writer.settle(run, 5.0).ended
    assert writer.error is None
    assert store.observations(run.id).index.tolist() == [0, 1, 2, 3]
    assert len(store.samples(run.id)) == 1


def test_a_denied_allocation_ends_no_writer(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by tests.faults: the thread that gathers rows died of a MemoryError, and what came later was stored by nobody."""
    run, rows = begun(store), held_rows(4)

    asked = threading.Event()

    def denied(*_: Any, **__: Any) -> None:
        asked.set()
        raise MemoryError

    with Writer(store, run.id, every_s=0.1) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(np, "concatenate", denied)
            for k in range(2):
                writer.put(rows.take(np.array([k])))
            assert asked.wait(20)
        writer.put(rows.take(np.array([2, 3])))
    assert writer.settle(run, 5.0).ended
    assert store.observations(run.id).index.tolist() == [0, 1, 2, 3]


def test_ctrl_c_while_the_end_is_stored_changes_nothing_of_what_came(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither its verdict, nor where readings came from, nor what its changes of P:D cost: whether the database takes the end
    after all or not, and also when the costs are what is being stored, or the figures are counted."""
    main_thread, end_run, free = threading.main_thread().ident, store.end_run, threading.Event()
    assert main_thread is not None

    def slow(*given: Any, **named: Any) -> Run:
        signal.pthread_kill(main_thread, signal.SIGINT)
        free.wait(30)
        return end_run(*given, **named)

    def lost(*given: Any, **named: Any) -> Run:
        signal.pthread_kill(main_thread, signal.SIGINT)
        free.wait(30)
        raise StoreError("gone.")

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    def ends(run: Run, writer: Writer) -> None:
        with writer.told(lambda: (replace(run, verdict="valid", reason="interrupted"), ())):
            with writer:
                writer.put(held_rows(4))
                writer.put(FleetChange(0.5, 1.0, Fleet(1, 1), Fleet(2, 1), "why", 0.75))
            writer.settle(came, 60.0, counted)

    hooks = [("end_run", slow), ("end_run", lost), ("cost_fleet_changes", interrupted), ("count", interrupted)]
    counted = [Histogram("w", "decode", "itl_s", "m", 3, 0.5, ((1.0, 3), (math.inf, 3)))]
    for name, hook in hooks:
        run = begun(store)
        came = replace(run, complete=True, verdict="invalid", reason="it changed", counts={"ok": 4}, sources={"w": {}})
        free.clear()
        with monkeypatch.context() as patch:
            patch.setattr(store, name, hook)
            writer = Writer(store, run.id, "steered", every_s=0.1)
            with pytest.raises(KeyboardInterrupt):
                ends(run, writer)
            free.set()
            assert writer._asked is not None
            wait([writer._asked], 30)
        for spool in spooled(store):  # as the next command does
            spool.load(store)
        found = store.run(run.id)
        assert (found.ended, found.complete, found.verdict, found.reason) == (True, True, "invalid", came.reason)
        assert (found.counts, found.sources) == (came.counts, came.sources)
        assert store.histograms(run.id) == counted
        (change,) = store.fleet_changes(run.id)
        assert change.in_flight >= 0


def test_a_kill_while_changes_are_costed_leaves_the_end_to_the_next_command(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run of millions of rows that takes a minute, more than who stops a container waits. A database that breaks a costing
    off leaves nothing: it is tried again."""
    run = begun(store)
    came = replace(run, complete=True, verdict="valid", counts={"ok": 4})
    with Writer(store, run.id, "steered", every_s=0.1) as writer:
        writer.put(held_rows(4))
        writer.put(FleetChange(0.5, 1.0, Fleet(1, 1), Fleet(2, 1), "why", 0.75))
    with monkeypatch.context() as patch:

        def broken(*_: Any) -> None:
            ended.append(store.run(run.id).ended)
            if len(ended) == 1:
                raise StoreError("gone.")
            sys.exit(9)  # nothing of ours comes after it

        ended = list[bool]()
        patch.setattr(sys.modules[Writer.__module__], "cost", broken)
        with pytest.raises(SystemExit):
            writer.settle(came, 5.0)
    assert ended == [False, False]
    assert not store.run(run.id).ended
    (spool,) = spooled(store)
    spool.load(store)
    found = store.run(run.id)
    assert (found.ended, found.complete, found.verdict) == (True, True, "valid")
    assert store.fleet_changes(run.id)[0].in_flight >= 0
    assert not spooled(store)


def test_a_batch_that_nothing_takes_costs_no_other(store: Store, tmp_path: Path) -> None:
    """The thread that gathers rows died of a batch that JSON refuses, and what came later was stored by nobody."""
    run, rows = begun(store), held_rows(4)
    writer = Writer(store, run.id, every_s=0.1)
    rename(tmp_path / "made.db", "observations", "hidden")
    writer.put(Steered(Decision(0.0, math.inf, "move", None, None, "why"), "c", 0.0))
    writer.put([Sample(1.0, "w", "decode", running_requests=math.inf, waiting_requests=1.0)])
    writer.put(rows.take(np.array([0, 1])))
    with writer:  # its threads find all three at once
        until = time.monotonic() + 10
        while writer.error is None and time.monotonic() < until:
            time.sleep(0.02)
        writer.put(rows.take(np.array([2, 3])))
    rename(tmp_path / "made.db", "hidden", "observations")
    assert writer.settle(run, 5.0).ended
    assert isinstance(writer.error, ValueError)  # said at the end
    assert store.observations(run.id).index.tolist() == [0, 1, 2, 3]
    assert store.samples(run.id) == [Sample(1.0, "w", "decode", waiting_requests=1.0)]


def test_rows_that_neither_database_nor_disk_takes_wait_in_memory(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by tests.faults: two full disks lost rows for good, though one had space again before the end."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    run = begun(store)
    with Writer(store, run.id, every_s=0.1) as writer:
        rename(tmp_path / "made.db", "observations", "hidden")
        writer.put(held_rows(4))
        until = time.monotonic() + 20
        while writer.error is None and time.monotonic() < until:
            time.sleep(0.01)
        assert isinstance(writer.error, StoreError)
        rename(tmp_path / "made.db", "hidden", "observations")
    assert writer.settle(run, 5.0).ended
    assert writer.error is None
    assert len(store.observations(run.id)) == 4
    with Writer(store, run.id, every_s=0.1) as writer:
        rename(tmp_path / "made.db", "observations", "hidden")
        writer.put(held_rows(4))
    with pytest.raises(StoreError, match="4 rows of run 1 are lost"):
        writer.settle(run, 0.0)


def test_a_disk_that_fills_up_in_the_middle_of_a_line_costs_no_later_line(store: Store, tmp_path: Path) -> None:
    """What was written of a line is taken back whole: half of one would have swallowed the next, when there is space again."""
    run, rows = begun(store), held_rows(4)
    spool = Spool(store, run.id)
    spool.add_observations(rows.take(np.array([0])))
    held = spool.path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(held) + 300, hard))  # as a full disk: some of the line fits
    try:
        with pytest.raises(StoreError, match="cannot be kept on disk either"):
            spool.add_observations(rows.take(np.array([1])))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert spool.path.read_bytes() == held
    spool.add_observations(rows.take(np.array([1, 2, 3])))
    rename(tmp_path / "made.db", "samples", "hidden")
    spool.add_samples([Sample(0.5, "w", "decode")])
    spool.add_observations(rows)
    with pytest.raises(StoreError):
        spool.load(store)  # up to the reading: what is left is what comes after
    left = spool.path.read_bytes()
    assert [next(iter(json.loads(line))) for line in left.splitlines()] == ["samples", "observations"]
    since = spool.path.stat().st_mtime_ns
    with pytest.raises(StoreError):
        spool.load(store)
    assert (spool.path.stat().st_mtime_ns, spool.path.read_bytes()) == (since, left)  # not written again for nothing
    rename(tmp_path / "made.db", "hidden", "samples")
    assert spool.load(store) == 4
    assert store.observations(run.id).index.tolist() == [0, 1, 2, 3]
    assert len(store.samples(run.id)) == 1


def test_what_came_of_a_run_is_stored_after_its_rows(store: Store, tmp_path: Path) -> None:
    """Whatever file it stands in: a run that says complete with half of its rows would be taken for a whole one."""
    run, rows = begun(store), held_rows(4)
    spool = Spool(store, run.id)
    spool.add_observations(rows.take(np.array([0, 1])))
    with spool.path.open("rb") as loading:
        fcntl.flock(loading, fcntl.LOCK_EX)
        spool.add_observations(rows.take(np.array([2, 3])))
        spool.end_run(replace(run, complete=True))
        assert spool.load(store) == 2  # those of the second file; somebody else is at the first one
        assert not store.run(run.id).ended
    rename(tmp_path / "made.db", "observations", "hidden")
    with pytest.raises(StoreError):
        spool.load(store)
    assert not store.run(run.id).ended
    rename(tmp_path / "made.db", "hidden", "observations")
    assert spool.load(store) == 2  # and none of the second file again
    ended = store.run(run.id)
    assert (ended.ended, ended.complete, store.observations(run.id).index.tolist()) == (True, True, [0, 1, 2, 3])
    assert not list(folder().iterdir())


@pytest.mark.parametrize("waits", [False, True])
def test_a_run_has_not_ended_before_what_its_changes_cost_is_there(
    waits: bool, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed, or dumped, in between, it would have ended without for ever; also where its end waited on disk."""
    run, end, seen = begun(store), store.end_run, []

    def ends(*given: Any, **how: Any) -> Run:
        seen.extend(change.in_flight for change in store.fleet_changes(run.id))
        return end(*given, **how)

    monkeypatch.setattr(store, "end_run", ends)
    store.add_observations(run.id, held_rows(4))
    store.add_fleet_change(run.id, FleetChange(0.5, 1.0, Fleet(1, 1), Fleet(2, 1), "why", 0.75))
    if waits:
        spool = Spool(store, run.id)
        spool.end_run(run)
        spool.load(store)
    else:
        with Writer(store, run.id) as writer:
            writer.settle(run, 60.0)
    assert (store.run(run.id).ended, seen) == (True, [0])


def test_a_replay_ends_after_whoever_loads_its_rows(store: Store) -> None:
    """Rows that another command is storing at that moment are rows of the run too."""
    run, ended = begun(store), list[bool]()
    spool = Spool(store, run.id)
    spool.add_observations(held_rows(4))
    with Writer(store, run.id) as writer, spool.path.open("rb") as loading:
        fcntl.flock(loading, fcntl.LOCK_EX)

        def done() -> None:
            ended.append(store.run(run.id).ended)
            fcntl.flock(loading, fcntl.LOCK_UN)

        timer = threading.Timer(0.5, done)
        timer.start()
        assert writer.settle(run, 60.0).ended
        timer.join()
    assert ended == [False]
    assert store.observations(run.id).index.tolist() == [0, 1, 2, 3]
    spool.add_observations(held_rows(4))
    with Writer(store, run.id) as writer, spool.path.open("rb") as loading:
        fcntl.flock(loading, fcntl.LOCK_EX)
        with pytest.raises(
            StoreError, match=r"(storing rows of run 1|does not answer)\. Nothing is lost.*runs recover"
        ):
            writer.settle(run, 0.0)


def test_a_database_that_is_busy_storing_what_waits_answers(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by a reader: of a backlog that took longer than the patience, and of a count of many rows, it was said that the
    database does not answer, though all of it was stored."""
    run, rows = begun(store), held_rows(4)
    stored, figures = store.add_observations, store.figures
    monkeypatch.setattr(traces.store, "EXACT_ROWS", 1)
    monkeypatch.setattr(store, "add_observations", lambda *given: (time.sleep(0.9), stored(*given)))
    monkeypatch.setattr(store, "figures", lambda *given: (time.sleep(3.1), figures(*given))[1])
    with Writer(store, run.id, every_s=10.0) as writer:
        for k in range(4):
            writer.spool.add_observations(rows.take(np.array([k])))
        assert writer.settle(run, 3.0).ended
    assert store.observations(run.id).index.tolist() == [0, 1, 2, 3]


def test_rows_of_a_run_that_is_gone_are_not_the_next_one_s(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A number is given again when its run was deleted, or the database made anew. Old rows keep no others out."""
    gone, rows = begun(store), held_rows(4)
    Spool(store, gone.id).add_observations(rows.take(np.array([0, 1])))
    store.delete_run(gone.id)
    run, url = begun(store), f"sqlite:///{tmp_path}/made.db"
    assert run.id == gone.id
    with Writer(store, run.id, every_s=0.1) as writer:
        writer.put(rows.take(np.array([2])))
    writer.settle(run, 5.0)
    assert store.observations(run.id).index.tolist() == [2]
    other = begun(store)
    Spool(store, other.id).add_observations(rows)
    assert main(["traces", "--db", url]) == 0
    assert len(store.observations(other.id)) == 4
    (left,) = folder().iterdir()
    capsys.readouterr()
    assert main(["runs", "recover", "--db", url]) == 1
    assert f"{left}: its rows are of a run that is not in" in capsys.readouterr().err
    assert store.observations(run.id).index.tolist() == [2]


def test_rows_that_another_process_stores_are_said_to_wait(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody is told that all of a run is stored, while it is not; the run is ended by who has the last of its files."""
    run, rows, url = begun(store), held_rows(4), f"sqlite:///{tmp_path}/made.db"
    spool = Spool(store, run.id)
    spool.add_observations(rows.take(np.array([0, 1])))
    with spool.path.open("rb") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        spool.add_observations(rows.take(np.array([2, 3])))  # into the second file
        spool.end_run(replace(run, complete=True, verdict="valid"))
        assert main(["runs", "recover", "--db", url]) == 1
        assert f"{spool.path}: Others of the same run wait still: another process" in capsys.readouterr().err
        assert main(["traces", "--db", url]) == 0
        assert "wait still: another process" in capsys.readouterr().err
    assert not store.run(run.id).ended
    second = spool.path.with_suffix(".1.jsonl").open("rb")
    fcntl.flock(second, fcntl.LOCK_EX)

    class Passing(Store):
        """The other one, who holds the end, lets go of it while rows are stored here."""

        def add_observations(self, run_id: int, rows: Observations) -> None:
            second.close()
            super().add_observations(run_id, rows)

    store.__class__ = Passing
    assert spool.load(store) == 2
    assert store.run(run.id).ended
    assert not list(folder().iterdir())


def test_two_processes_share_a_spool_without_loss(store: Store, swarm: Swarm, endpoint: str, tmp_path: Path) -> None:
    """Rows are added while others load the file and remove it: each is stored, none twice."""
    run = replay(store, swarm, schedule(4, 40.0), endpoint)
    row = store.observations(run.id).take(np.array([0]))
    spool = Spool(store, run.id, tmp_path / "spool")

    def add() -> None:
        for k in range(200):
            row.index[:] = 1000 + k
            spool.add_observations(row)

    writer = threading.Thread(target=add)
    writer.start()
    while writer.is_alive():
        Spool(store, run.id, tmp_path / "spool").load(store)
    spool.load(store)
    assert sorted(store.observations(run.id).index.tolist())[4:] == list(range(1000, 1200))


def test_a_line_cut_by_a_crash_is_left_out(store: Store, swarm: Swarm, endpoint: str, tmp_path: Path) -> None:
    """What was written whole before a crash is loaded, the torn end is not, and loading twice changes nothing."""
    run = replay(store, swarm, schedule(4, 40.0), endpoint)
    rows = store.observations(run.id)
    spool = Spool(store, run.id, tmp_path / "spool")
    spool.add_observations(rows.take(np.array([0, 1])))
    spool.add_observations(rows)
    held = spool.path.read_bytes()
    spool.path.write_bytes(held + held[:50])
    assert spool.load(store) == 6
    assert len(store.observations(run.id)) == 4
    assert spool.load(store) == 0
    back = store.observations(run.id)
    assert all(np.array_equal(getattr(back, c), getattr(rows, c), equal_nan=c.endswith("_s")) for c in rows.columns())


# --- the verbs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def db(tmp_path: Path) -> str:
    url = f"sqlite:///{tmp_path}/cli.db"
    with open_store(url) as made:
        ingest(made, [shipped("azure-2023-conv")], name="azure-2023-conv")
    return url


def said(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    out = capsys.readouterr().out
    held: dict[str, Any] = json.loads(out)
    return held


@pytest.mark.timed
def test_replay_show_export_and_compare(
    db: str, endpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The verbs of a run, with the keys that other programs rely on."""
    common = ["--endpoint", endpoint, "--requests", "20", "--rate", "40", "--slo", str(SLO), "--db", db]
    common += ["--output-scale", "0.1", "--json"]
    for fleet in ("4:4", "3:5"):
        assert main(["replay", "azure-2023-conv", "--fleet", fleet, "--group", "g", *common]) == 0
        found = said(capsys)
        assert set(found) >= {
            "run", "scheduled", "ok", "failed", "unsent", "verdict", "lag_ms", "ttft_ms", "tpot_ms", "e2e_ms",
            "goodput_per_s", "fleet",
        }  # fmt: skip
        assert set(found["lag_ms"]) >= {"p50", "p99", "max"}
        assert found["fleet"] == {"prefill": int(fleet[0]), "decode": int(fleet[2])}
        assert (found["scheduled"], found["ok"], found["failed"], found["unsent"]) == (20, 20, {}, 0)
        assert found["rate_per_s"] == pytest.approx(40)
    assert main(["runs", "--db", db, "--json"]) == 0
    assert [r["run"] for r in said(capsys)["runs"]] == [1, 2]
    assert main(["runs", "show", "1", "--db", db, "--json"]) == 0
    shown = said(capsys)
    assert shown["run"] == 1
    assert shown["samples"] > 0
    assert sum(w["requests"] for w in shown["lag_by_worker"].values()) == 20
    assert all(w["cpu_s"] > 0 and w["max_stall_s"] >= 0 for w in shown["lag_by_worker"].values())
    assert sum(s["requests"] for s in shown["lag_over_time"]) == 20
    assert main(["runs", "show", "1", "--db", db]) == 0
    assert "worker 0:" in capsys.readouterr().out
    out = tmp_path / "rows.csv"
    assert main(["runs", "export", "1", "--out", str(out), "--db", db]) == 0
    capsys.readouterr()
    with out.open() as file:
        exported = list(csv.DictReader(file))
    assert len(exported) == 20
    assert tuple(exported[0]) == Observations.columns()
    with open_store(db) as store:
        rows = store.observations(1)
        assert float(exported[3]["last_token_s"]) == rows.last_token_s[3]
        assert shown["goodput_per_s"] == pytest.approx(summarise(rows, SLO).goodput_per_s)
    for arguments in (["1", "2"], ["--group", "g"]):
        assert main(["compare", *arguments, "--db", db, "--json"]) == 0
        assert [r["run"] for r in said(capsys)["runs"]] == [1, 2]
    assert main(["compare", "1", "2", "--db", db]) == 0
    assert "4:4" in capsys.readouterr().out
    # another schedule cannot be compared, nor can one run
    with contextlib.closing(sqlite3.connect(tmp_path / "cli.db")) as held, held:
        assert held.execute("UPDATE runs SET schedule_digest = 'other' WHERE id = 2").rowcount == 1
    assert main(["compare", "1", "2", "--db", db]) == 1
    assert "asked another schedule than run 1" in capsys.readouterr().err
    assert main(["compare", "1", "--db", db]) == 1
    assert main(["compare", "1", "99", "--db", db]) == 1
    assert "no run has id 99" in capsys.readouterr().err


def test_a_long_trace_is_read_while_it_is_replayed(
    endpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The verb takes a feed where nothing needs the trace as a whole, and stores the same rows; --thin needs it."""
    monkeypatch.setattr("advisor.cli.replay_verbs.FEED_FROM", 50)
    monkeypatch.setattr("traces.store.FEED_ROWS", 30)
    monkeypatch.setattr("loadgen.swarm.LOOKAHEAD_S", 0.5)
    url = f"sqlite:///{tmp_path}/f.db"
    made = ["synth", "--name", "f", "--requests", "120", "--rate", "40", "--db", url]
    lengths = ["--prompt", "lognormal:median=30,sigma=0.2", "--output", "lognormal:median=4,sigma=0.2"]
    assert main([*made, *lengths]) == 0
    capsys.readouterr()
    ask = ["replay", "f", "--endpoint", endpoint, "--rate", "60", "--db", url, "--json"]
    main([*ask, "--workers", "2"])
    found = said(capsys)
    assert (found["ok"], found["complete"]) == (120, True)
    main([*ask, "--workers", "1", "--thin", "0.5"])
    assert 30 < said(capsys)["ok"] < 90
    with open_store(url) as store:
        run, rows = store.run(1), store.observations(1)
        assert run.schedule_digest == store.feed("f", rate_per_s=60.0).digest()
        assert rows.index.tolist() == list(range(120))
        np.testing.assert_allclose(rows.due_s, to_rate(store.schedule("f"), 60.0).due_s, atol=1e-6)


def test_a_feed_that_cannot_be_read_on_ends_its_run(
    store: Store, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database of a long trace went away for too long, or stands still: the run has an end, says why, and keeps what was
    answered. The feed is not read again to say so."""
    monkeypatch.setattr(loadgen.swarm, "LOOKAHEAD_S", 0.3)
    monkeypatch.setattr(loadgen.swarm, "READ_S", 0.3)
    asked = schedule(60, 40.0)
    over = threading.Event()
    awaited: list[float] = []

    def away() -> None:
        raise StoreError("the database is away.")

    def still() -> None:
        over.wait(30)
        awaited.append(time.monotonic())

    with Swarm(workers=1) as own:
        for fails, said in ((away, "the database is away"), (still, "were not read in 0.3 s")):
            began: list[int] = []

            def pieces(fails: Callable[[], None] = fails, began: list[int] = began) -> Iterator[Schedule]:
                began.append(1)
                yield from (asked.take(np.arange(20)), asked.take(np.arange(20, 40)))
                fails()

            with pytest.raises(StoreError, match=said):
                replay(store, own, Feed("t", 60, asked.span_s, 40, "test", pieces), endpoint)
            assert began == [1]
            run = store.run(len(store.runs()))
            assert (run.ended, run.complete) == (True, False)
            assert said in run.reason
            assert sum(run.counts.values()) == 60
            rows = store.observations(run.id)  # what was in flight is cancelled
            assert len(rows) == 40
            assert Counter(rows.status.tolist()) + Counter(unsent=20) == run.counts
    assert not awaited
    over.set()


@pytest.mark.parametrize("times", [2, 3])
def test_ctrl_c_twice_loses_no_row_that_is_counted(
    store: Store, swarm: Swarm, endpoint: str, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """Both come while answers are handed on: they are counted and stored, or neither. What is in flight is cancelled; a third one
    does not wait to hear so, and it is lost: nobody says of a request that the server has that it was never sent."""
    before, handed = loadgen.live.Live.rows, list[int]()
    heard: set[int] = set()
    asked = schedule(400, 60.0)
    asked.output_tokens[:10] = 2000  # twenty seconds, and sent before anything that is answered

    def rows(self: loadgen.live.Live, found: Observations) -> None:
        handed.append(len(found))
        first = len(heard) < 2
        heard.update(found.worker[found.ok].tolist())
        for _ in range(times * (first and len(heard) == 2)):
            _thread.interrupt_main()
            time.sleep(0.05)
        before(self, found)

    monkeypatch.setattr(loadgen.live.Live, "rows", rows)
    with pytest.raises(KeyboardInterrupt):
        replay(store, swarm, asked, endpoint)
    (run,) = store.runs()
    assert (run.ended, run.complete) == (True, False)
    found = store.observations(run.id)
    assert set(found.status[:10]) == {"cancelled" if times == 2 else "lost"}
    assert found.status[-1] == "unsent"  # due six seconds after the first
    if times == 2:
        assert sum(handed) == len(found) == 400
        assert Counter(found.status.tolist()) == run.counts
        assert np.isfinite(found.sent_s[:10]).all()


def test_the_changes_of_a_run_that_broke_off_are_costed(store: Store, swarm: Swarm) -> None:
    """They were made, and what they cost is in its rows; they count from where its seconds do."""
    moved, at = threading.Event(), list[float]()

    class Noted(Reference):
        def ask(self, fleet: Fleet) -> None:
            super().ask(fleet)
            moved.set()

    def progress(rows: int, scheduled: int) -> None:
        assert not moved.is_set(), "enough"

    with embedded("constant", Fleet(2, 2)) as url, pytest.raises(AssertionError, match="enough"):
        replay(
            store, swarm, schedule(400, 60.0), url, control=Noted(Endpoint(target(url))), on_progress=progress,
            steering=Planned([(0.1, Fleet(1, 3))]), tick_s=0.1, on_live=lambda _: at.append(time.time()),
        )  # fmt: skip
    (run,) = store.runs()
    assert (run.ended, run.complete) == (True, False)
    assert run.started_unix_s > at[0]
    assert run.sources
    (change,) = store.fleet_changes(run.id)
    assert change.in_flight >= 0


@pytest.mark.timed
def test_sweep_with_its_own_endpoint(db: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --endpoint the sweep brings the reference endpoint along."""
    command = [
        "sweep",
        "azure-2023-conv",
        "--profile",
        "constant",
        "--fleets",
        "2:6,4:4",
        "--requests",
        "5",
        "--rate",
        "20",
        "--output-scale",
        "0.1",
        "--workers",
        "1",
    ]
    assert main([*command, "--db", db, "--json"]) == 0
    found = said(capsys)
    assert sorted(r["fleet"]["prefill"] for r in found["runs"]) == [2, 4]
    assert all(r["group"] == found["group"] for r in found["runs"])


def test_ctrl_c_in_the_verb_stores_and_marks(db: str, endpoint: str) -> None:
    """A user's Ctrl-C: the run is stored, marked incomplete, reported; exit code 130, no traceback."""
    command = [
        sys.executable,
        "-m",
        "advisor",
        "replay",
        "azure-2023-conv",
        "--endpoint",
        endpoint,
        "--workers",
        "1",
        "--db",
        db,
        "--json",
    ]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    with open_store(db) as store:
        while time.monotonic() < until and not (store.runs() and len(store.observations(1)) >= 3):
            time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    assert "Traceback" not in err
    found = json.loads(out)
    assert found["complete"] is False
    assert "interrupted" in found["reason"]
    assert found["ok"] >= 3
    assert found["ok"] + found["unsent"] + found["cancelled"] == found["scheduled"] == 9754
    with open_store(db) as store:
        assert len(store.observations(1)) == 9754
        assert store.run(1).verdict == "invalid"


def test_sigterm_before_the_load_and_after_it_ends_the_run(store: Store, swarm: Swarm, endpoint: str) -> None:
    """Only while requests were sent was it Ctrl-C: else the process was gone, and the run said to go on for ever."""
    missed = list[int]()
    before = signal.signal(signal.SIGTERM, lambda number, _: missed.append(number))  # else it would end the tests
    try:
        for edge in ("on_live", "on_outcome"):
            at: dict[str, Any] = {edge: lambda _: os.kill(os.getpid(), signal.SIGTERM)}
            with pytest.raises(KeyboardInterrupt):
                replay(store, swarm, schedule(4, 40.0), endpoint, **at)
            for spool in spooled(store):  # as the next command does
                spool.load(store)
            run = store.runs()[-1]
            assert (run.ended, run.complete, run.scheduled) == (True, False, len(store.observations(run.id)))
            assert "interrupted" in run.reason
            assert bool(run.sources) == (edge == "on_outcome")  # judged by what was in hand
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (len(store.runs()), missed) == (2, [])


def test_a_killed_master_leaves_what_was_finished(db: str, endpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    """kill -9 of the master: what finished more than a second before is in the database, and shown; the run has not ended."""
    command = [sys.executable, "-m", "advisor", "replay", "azure-2023-conv", "--endpoint", endpoint, "--db", db]
    child = subprocess.Popen(
        [*command, "--workers", "1", "--rate", "40"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    until = time.monotonic() + 120
    began = math.inf
    with open_store(db) as store:
        while time.monotonic() < until:
            if began == math.inf and store.runs() and len(store.observations(1)):
                began = time.monotonic()
            if time.monotonic() > began + 6:
                break
            time.sleep(0.05)
        child.kill()
        child.wait()
        rows = store.observations(1)
        assert not store.run(1).ended
        assert len(rows) > 20
        assert set(rows.status) == {"ok"}
        # By their own clock, six seconds after the first was seen: how long workers took to be ready is not in it.
        assert rows.last_token_s.max() - rows.last_token_s.min() > 2.5
        assert len(set(rows.index.tolist())) == len(rows)
    capsys.readouterr()
    assert main(["runs", "show", "1", "--db", db]) == 0
    said = capsys.readouterr()
    with open_store(db) as store:
        there = len(store.observations(1))  # with what waited on disk when it was killed
    assert f"  {there} of " in said.out + said.err
    assert "ms -> running or broken off" in said.out + said.err
    assert "nan" not in (said.out + said.err).split("from sent")[0]
    assert main(["compare", "1", "1", "--db", db]) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nope", "--endpoint", "http://127.0.0.1:1"], 1, "no trace is named 'nope'"),
        (["azure-2023-code", "--endpoint", "http://127.0.0.1:1"], 1, "ships with steelyard .* steelyard ingest azure-2023-code"),
        (["azure-2023-conv", "--endpoint", "http://127.0.0.1:1"], 1, "connection refused"),
        (["azure-2023-conv", "--endpoint", "http://127.0.0.1:9", "--proxy", "http://127.0.0.1:1"], 1,
         "--proxy 127.0.0.1:1: connection refused. Start the proxy"),
        (["azure-2023-conv", "--endpoint", "nonsense"], 1, "base URL"),
        (["azure-2023-conv", "--endpoint", "http://no-such-host.invalid:1"], 1, "host name cannot be resolved"),
        (["azure-2023-conv", "--endpoint", "http://127.0.0.1:1", "--fleet", "0:8"], 1, "at least one worker"),
        (["azure-2023-conv", "--endpoint", "http://127.0.0.1:1", "--slo", "fast"], 1, "SLO term 'fast'"),
        (["azure-2023-conv", "--endpoint", "http://127.0.0.1:1", "--rate", "1", "--rate-factor", "2"], 2, "not both"),
        (["azure-2023-conv", "--endpoint", "http://127.0.0.1:1", "--rate", "0"], 2, "--rate"),
        (["azure-2023-conv", "--endpoint", "http://127.0.0.1:1", "--engine", "x"], 1, "refused|no engine"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line(
    db: str, arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What, where, got, next step; no traceback, nothing stored."""
    assert main(["replay", *arguments, "--workers", "1", "--db", db]) == code
    err = capsys.readouterr().err
    assert re.search(words, err)
    if code == 1:
        assert err.count("\n") == 1
    with open_store(db) as store:
        assert store.runs() == []


@pytest.mark.parametrize("named", ["9" * 20, "\u00b2"])
def test_a_run_that_no_database_could_hold_is_one_line(
    made_url: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["runs", "show", named, "--db", made_url]) == 2
    assert f"no run is named {named!r}" in capsys.readouterr().err


def test_a_worker_without_a_master_is_refused_its_address(capsys: pytest.CaptureFixture[str]) -> None:
    """An address that is none is said to be none."""
    for master in ("nowhere", "host:\u00b2"):
        assert main(["worker", "--master", master]) == 1
        assert "HOST:PORT" in capsys.readouterr().err


@pytest.mark.parametrize("text", [False, True])
def test_what_the_trace_shared_is_shared_again(store: Store, swarm: Swarm, tmp_path: Path, text: bool) -> None:
    """Prompts that begin with the trace's blocks hit the server's prefix cache as often as the simulator says; others do not."""
    from dataclasses import replace

    from loadgen.cluster import Profile, simulate

    laws = replace(Profile.load("demo"), cache_tokens=100_000)
    path = tmp_path / "cached.toml"
    path.write_text(laws.to_toml())
    n = 15
    prompts = np.array([40 + 16 * (i // 3) for i in range(n)])
    blocks = np.empty(n, dtype=object)
    blocks[:] = [tuple(100 * (i % 3) + k for k in range(int(p) // 16)) for i, p in enumerate(prompts)]
    asked = Schedule("talks", np.arange(n), np.arange(n) * 0.4, prompts, np.full(n, 3), (), blocks, 16)

    def computed(url: str) -> float:
        metrics = urllib.request.urlopen(f"{url}/metrics", timeout=20).read().decode()
        (found,) = re.findall(
            r'^steelyard_prompt_tokens_total\{role="prefill",worker="0"\} ([\d.e+]+)$', metrics, re.M
        ) or (re.findall(r'^steelyard_prompt_tokens_total\{worker="0",role="prefill"\} ([\d.e+]+)$', metrics, re.M))
        return float(found)

    def spared(url: str, shared: bool) -> int:
        before = computed(url)
        run = replay(store, swarm, asked, url, text=text, prefixes=shared)
        more = computed(url) - before
        assert run.counts == {"ok": n}
        assert run.changes == store.run(run.id).changes == (("prefixes shared",) if shared else ())
        assert run.schedule_digest == asked.digest()
        rows = store.observations(run.id)
        assert rows.prompt_tokens.tolist() == prompts[rows.index].tolist()
        return int(prompts.sum() + 8 - more)  # the question before the run has a prompt of 8

    with embedded(str(path), Fleet(1, 1)) as url:
        assert spared(url, False) == 0
        assert spared(url, True) == simulate(asked, Fleet(1, 1), laws).cached_tokens > 0
        if text:
            return
        few = asked.take(np.arange(3))  # a sweep that goes on takes no run of the other kind for its own
        ids = []
        for shared in (False, True, True):
            run = sweep(store, swarm, few, target(url), [Fleet(1, 1)], group="g", prefixes=shared)[1][0]
            store.end_run(replace(run, verdict="valid", reason=""))  # however busy this machine was
            ids.append(run.id)
    assert ids[0] < ids[1] == ids[2]
    with pytest.raises(InputError, match="holds no prefix blocks"):
        replay(store, swarm, replace(asked, blocks=None, block_tokens=0), "http://127.0.0.1:9", prefixes=True)
