"""loadgen.swarm: a Locust master and its workers; whatever dies, every request ends in exactly one row."""

from __future__ import annotations

import _thread
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import loadgen.secret
import loadgen.swarm
from loadgen.client import FROZEN_S, Row, target
from loadgen.cluster.embedded import embedded
from loadgen.crew import Crew
from loadgen.engines import dialect
from loadgen.policy import Dispatch
from loadgen.swarm import MOST_FACTS, Job, Outcome, Pieces, Swarm, _noted, ended, pack, shares, unpack
from tests.faults.lab import alive
from traces.errors import InputError, SteelyardError, StoreError
from traces.records import Feed, Fleet, Observations, Schedule
from traces.shape import scale_rate


def schedule(n: int, rate_per_s: float, output_tokens: int = 5) -> Schedule:
    gaps = np.random.default_rng(0).exponential(1 / rate_per_s, n)
    due = np.cumsum(gaps) - gaps[0]
    return Schedule("t", np.arange(n) * 3, due, np.full(n, 20), np.full(n, output_tokens))


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with embedded("constant", Fleet(1, 1)) as url:
        yield url


@pytest.fixture(scope="module")
def swarm() -> Iterator[Swarm]:
    with Swarm(workers=2) as made:
        yield made


def job(url: str, timeout_s: float = 20.0) -> Job:
    return Job(target(url), dialect("reference"), "constant", 1, timeout_s)


def run(
    swarm: Swarm,
    asked: Schedule,
    what: Job,
    meanwhile: Callable[[], None] | None = None,
    drain_s: float = 2.0,
    heard: Callable[[Observations], None] = lambda rows: None,
) -> tuple[Outcome, Observations]:
    """One run; ``meanwhile`` happens in a thread from schedule zero, ``heard`` whenever rows come."""
    parts: list[Observations] = []
    thread = threading.Thread(target=meanwhile or (lambda: None))

    def on_start(zero: float, unix: float) -> None:
        thread.start()

    def on_rows(rows: Observations) -> None:
        parts.append(rows)
        heard(rows)

    outcome = swarm.run(asked, what, on_start=on_start, on_rows=on_rows, drain_s=drain_s)
    thread.join()
    return outcome, Observations.concat(parts)


def test_rows_survive_the_journey() -> None:
    """What a worker packs is what the master unpacks, counted from schedule zero."""
    asked = schedule(3, 1.0)
    rows = [
        Row(2, 12.0, 12.1, 12.2, 12.5, 12.6, 20, 5, 5, 0.1, 200, "ok", "", "", 800),
        Row(0, 10.0, *[float("nan")] * 3, 10.1, -1, -1, 0, float("nan"), 0, "failed", "refused", "nobody", 0),
    ]
    found = unpack(pack(rows), asked, 1, 10.0)
    assert found.index.tolist() == [6, 0]
    assert found.worker.tolist() == [1, 1]
    assert found.sent_s.tolist() == [2.0, 0.0]
    assert found.last_token_s[0] == 2.5
    assert np.isnan(found.first_token_s[1])
    assert found.status.tolist() == ["ok", "failed"]
    assert found.error.tolist() == ["", "refused"]
    assert found.detail.tolist() == ["", "nobody"]
    assert found.due_s.tolist() == asked.due_s[[2, 0]].tolist()


def test_lost_rows_say_who_lost_them() -> None:
    """A request that died with its worker has a row with what was asked and nothing measured."""
    rows = ended(schedule(4, 1.0), [1, 3], "lost", 7, "worker 7 was killed by signal 9")
    assert rows.index.tolist() == [3, 9]
    assert set(rows.status) == {"lost"}
    assert rows.worker.tolist() == [7, 7]
    assert rows.requested_tokens.tolist() == [5, 5]
    assert np.isnan(rows.sent_s).all()


def test_two_workers_share_a_schedule_run_after_run(swarm: Swarm, endpoint: str) -> None:
    """One row a request, shards striped over workers, Locust's statistics show them, and the swarm serves again."""
    asked = schedule(60, 60.0)
    for _ in range(2):
        outcome, rows = run(swarm, asked, job(endpoint))
        assert outcome.reason == ""
        assert rows.index.tolist() == asked.index.tolist()
        assert Counter(rows.status) == {"ok": 60}
        assert rows.worker.tolist() == [0, 1] * 30
        assert (rows.sent_s >= rows.due_s).all()
        assert (rows.output_tokens == 5).all()
        assert (rows.prompt_tokens == 20).all()
        assert set(outcome.costs) == {0, 1}
        statistics = swarm.statistics()
        assert statistics["requests"] == 60
        assert statistics["failures"] == 0
        assert statistics["names"] == ["/v1/completions"]
        assert 80 < statistics["median_ms"] < 2000


def conversations() -> Schedule:
    """Six conversations of four turns, recorded a tenth of a second apart; half of the think times are known (80 ms). The
    last one is a subagent of the first one's."""
    n, users = 24, 6
    at = np.arange(n)
    parent = np.where(at >= users, at - users, -1)
    parent[5] = 0
    think = np.where((parent >= 0) & (at % 2 == 0), 0.08, np.nan)
    tokens = np.full(n, 12)
    return Schedule("chat", at, at * 0.1 / users, tokens, tokens, session=at % users, parent=parent, think_s=think)


@pytest.mark.timed
def test_a_turn_waits_for_the_answer_before_it(swarm: Swarm, endpoint: str) -> None:
    """Causal: due when the answer has ended and the think time is over, or at the recorded distance but not before the end;
    latency counts from there; a conversation stays on one worker."""
    asked = conversations()
    outcome, rows = run(swarm, asked, replace(job(endpoint), causal=True))
    assert (outcome.reason, set(rows.status.tolist())) == ("", {"ok"})
    rows = rows.take(np.argsort(rows.index))
    assert asked.parent is not None
    for k, parent in enumerate(asked.parent.tolist()):
        if parent < 0:
            assert rows.due_s[k] == asked.due_s[k]
            continue
        assert rows.worker[k] == rows.worker[parent]
        end, gap = rows.last_token_s[parent], asked.due_s[k] - asked.due_s[parent]
        wanted = end + 0.08 if k % 2 == 0 else max(end, rows.sent_s[parent] + gap)
        assert -0.001 <= rows.due_s[k] - wanted < 0.05  # the answer's last bytes come a moment after its last token
        assert rows.sent_s[k] >= rows.due_s[k]
    assert set(rows.worker.tolist()) == {0, 1}


@pytest.mark.timed
def test_recorded_turns_do_not_wait(swarm: Swarm, endpoint: str) -> None:
    """The same conversations open loop: each turn at its recorded time, on its conversation's worker."""
    asked = conversations()
    _, rows = run(swarm, asked, job(endpoint))
    rows = rows.take(np.argsort(rows.index))
    assert rows.due_s.tolist() == asked.due_s.tolist()
    assert float((rows.sent_s - rows.due_s).max()) < 0.1
    for session in range(6):
        assert len(set(rows.worker[session::6].tolist())) == 1


def test_ctrl_c_leaves_no_turn_without_a_row(swarm: Swarm, endpoint: str) -> None:
    """Turns whose answers never came are unsent."""
    asked = scale_rate(conversations(), 0.01)  # ten seconds from turn to turn
    outcome, rows = run(
        swarm, asked, replace(job(endpoint), causal=True), lambda: (time.sleep(0.9), _thread.interrupt_main())[-1]
    )
    assert outcome.interrupted
    assert len(rows) == len(asked)
    assert set(rows.status.tolist()) <= {"ok", "unsent", "cancelled"}
    assert (rows.status == "unsent").sum() > 12


@given(st.lists(st.tuples(st.integers(-1, 9), st.integers(0, 9)), min_size=1, max_size=60), st.integers(1, 5))
def test_every_request_has_one_worker(rows: list[tuple[int, int]], workers: int) -> None:
    """Shares hold every position once, in order, and no session twice; with a row the one whose answer it continues."""
    n = len(rows)
    ones = np.ones(n, dtype=np.int64)
    sessions, parent = (
        [s for s, _ in rows],
        np.array([k - back if 0 < back <= k else -1 for k, (_, back) in enumerate(rows)]),
    )
    plain = Schedule("s", np.arange(n), np.arange(n) * 1.0, ones, ones)
    for linked in (replace(plain, session=np.array(sessions), parent=parent), replace(plain, parent=parent)):
        found = shares(linked, workers)
        assert sorted(np.concatenate(found).tolist()) == list(range(n))
        home = {p: k for k, part in enumerate(found) for p in part.tolist()}
        assert all(home[k] == home[before] for k, before in enumerate(parent.tolist()) if before >= 0)
    parts = shares(replace(plain, session=np.array(sessions)), workers)
    assert sorted(np.concatenate(parts).tolist()) == list(range(n))
    for part in parts:
        assert part.tolist() == sorted(part.tolist())
    homes = [{sessions[p] for p in part.tolist()} - {-1} for part in parts]
    assert sum(map(len, homes)) == len(set(sessions) - {-1})


def feed(n: int, rate_per_s: float, piece: int, taken: list[int] | None = None) -> Feed:
    """The schedule of the other tests in pieces; ``taken`` gets the time each was read."""
    whole = schedule(n, rate_per_s)

    def pieces() -> Iterator[Schedule]:
        for start in range(0, n, piece):
            if taken is not None:
                taken.append(start)
            yield whole.take(np.arange(start, min(n, start + piece)))

    return Feed("t", n, whole.span_s, 20, "test", pieces)


def run_feed(
    swarm: Swarm, asked: Feed, what: Job, meanwhile: Callable[[], None] | None = None
) -> tuple[Outcome, Observations]:
    return run(swarm, asked, what, meanwhile)  # type: ignore[arg-type]


@pytest.mark.timed
def test_a_feed_is_read_while_it_is_replayed(swarm: Swarm, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece is read when its time comes, not before; every request ends in one row, on time, by either worker."""
    monkeypatch.setattr(loadgen.swarm, "LOOKAHEAD_S", 0.6)
    taken: list[int] = []
    early: list[int] = []
    asked = feed(140, 50.0, 20, taken)
    outcome, rows = run_feed(swarm, asked, job(endpoint), lambda: (time.sleep(0.2), early.extend(taken))[-1])
    whole = schedule(140, 50.0)
    assert outcome.reason == ""
    assert rows.index.tolist() == whole.index.tolist()
    assert rows.due_s.tolist() == whole.due_s.tolist()
    assert set(rows.status.tolist()) == {"ok"}
    assert set(rows.worker.tolist()) == {0, 1}
    assert float(rows.lag_s.max()) < 0.1
    assert len(early) < 6 < len(taken) == 7


def test_a_feed_goes_to_those_who_still_send(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that has stopped (it had stood still) gets no more pieces: they would be lost, half of the load with them."""
    monkeypatch.setattr(loadgen.swarm, "LOOKAHEAD_S", 0.6)
    with Swarm(workers=2) as swarm:
        told: list[tuple[Any, str]] = []
        send = swarm._send

        def note(kind: str, data: Any, client_id: str = "") -> None:
            if kind == "steelyard.go":
                told.append((data["run"], client_id))
            send(kind, data, client_id)

        monkeypatch.setattr(swarm, "_send", note)

        def stop() -> None:
            time.sleep(1.0)
            send("steelyard.stop", {"run": told[1][0], "drain_s": 0.0}, told[1][1])

        outcome, rows = run_feed(swarm, feed(200, 40.0, 20), job(endpoint), stop)
    assert outcome.reason == ""
    assert sorted(rows.index.tolist()) == schedule(200, 40.0).index.tolist()
    assert set(rows.status.tolist()) <= {"ok", "unsent", "cancelled"}
    later = rows.take(rows.due_s > 3.5)
    assert len(later) > 50
    assert set(later.status.tolist()) == {"ok"}
    assert len(set(later.worker.tolist())) == 1


@pytest.mark.parametrize("last", [False, True])
def test_a_share_that_crosses_with_its_workers_end_comes_back_unsent(
    endpoint: str, monkeypatch: pytest.MonkeyPatch, last: bool
) -> None:
    """A worker says that it is over while the master sends it more; last: no other worker is left, either."""
    monkeypatch.setattr(loadgen.swarm, "LOOKAHEAD_S", 0.6)
    with Swarm(workers=1 if last else 2) as swarm:
        goes: list[tuple[Any, str]] = []
        ends: list[tuple[Any, ...]] = []
        crossed: list[Any] = []
        send, accept = swarm._send, swarm._accept

        def note(kind: str, data: Any, client_id: str = "") -> None:
            send(kind, data, client_id)
            if kind == "steelyard.go":
                goes.append((data["run"], client_id))
            if kind == "steelyard.shard" and ends and client_id == ends[0][0][1] and not crossed:
                crossed.append(data)
                accept(*ends[0])

        def hear(found: Any, *rest: Any) -> None:
            if found[0] == "finished" and found[1] == goes[-1][1] and not ends:
                ends.append((found, *rest))  # not heard of before the next piece is on its way
            else:
                accept(found, *rest)

        monkeypatch.setattr(swarm, "_send", note)
        monkeypatch.setattr(swarm, "_accept", hear)

        def stop() -> None:
            time.sleep(1.0)
            send("steelyard.stop", {"run": goes[-1][0], "drain_s": 0.0}, goes[-1][1])

        outcome, rows = run_feed(swarm, feed(200, 40.0, 20), job(endpoint), stop)
    assert len(crossed) == 1
    assert outcome.reason == ""
    never = np.frombuffer(crossed[0]["position"], dtype=np.int64)
    assert {rows.status[rows.index.tolist().index(i)] for i in schedule(200, 40.0).index[never].tolist()} == {"unsent"}
    assert len(rows) + outcome.unread == 200
    assert len(set(rows.index.tolist())) == len(rows)


def test_ctrl_c_ends_a_feed_that_stands_still_with_a_row_for_every_request_that_was_read(
    swarm: Swarm, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped database is awaited by a thread of its own: rows are handed on, Ctrl-C is heard, and what was never read from
    the feed is counted alone, and not read to say so: there may be millions of it."""
    monkeypatch.setattr(loadgen.swarm, "LOOKAHEAD_S", 0.5)
    whole = schedule(300, 30.0)
    over = threading.Event()
    awaited: list[float] = []

    def pieces() -> Iterator[Schedule]:
        yield from (whole.take(np.arange(20)), whole.take(np.arange(20, 40)))
        over.wait(30)
        awaited.append(time.monotonic())

    parts: list[Observations] = []

    def interrupt() -> None:
        until = time.monotonic() + 15
        while sum(map(len, parts)) < 32 and time.monotonic() < until:  # it is due before the last twenty are
            time.sleep(0.05)
        _thread.interrupt_main()

    thread = threading.Thread(target=interrupt)
    outcome = swarm.run(
        Feed("t", 300, whole.span_s, 20, "test", pieces),
        job(endpoint),
        on_start=lambda zero, unix: thread.start(),
        on_rows=parts.append,
    )
    assert not awaited
    over.set()
    thread.join()
    assert outcome.interrupted
    assert outcome.unread == 260
    rows = Observations.concat(parts)
    assert rows.index.tolist() == whole.index.tolist()[:40]
    assert set(rows.status.tolist()) <= {"ok", "unsent", "cancelled"}


def test_a_feed_goes_on_without_a_dead_worker(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the dead one had is lost; pieces read later go to the living one alone."""
    monkeypatch.setattr(loadgen.swarm, "LOOKAHEAD_S", 0.5)
    with Swarm(workers=2) as swarm:
        outcome, rows = run_feed(
            swarm, feed(200, 40.0, 20), job(endpoint), lambda: (time.sleep(1.5), os.kill(swarm.processes[0], 9))[-1]
        )
    assert "killed by signal 9" in outcome.reason
    assert rows.index.tolist() == schedule(200, 40.0).index.tolist()
    found = Counter(rows.status.tolist())
    assert found["lost"] < 60
    assert found["ok"] + found["lost"] == 200
    assert set(rows.worker[-40:].tolist()) == {1}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_two_ctrl_c_are_noted_and_the_third_is_raised(number: int) -> None:
    """No message is cut in the middle by the first two, the second ends the block; a user who insists gets out. SIGTERM is the
    same."""
    said: list[list[int]] = []
    for times in (2, 3):
        with pytest.raises(KeyboardInterrupt), _noted() as stops:  # noqa: PT012 - the point is what runs before it
            for _ in range(times):
                _thread.interrupt_main(number)
                time.sleep(0.05)
                said.append([*stops])
    assert said == [[number], [number] * 2] * 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


CLOCK = """import os, time
real = time.time
time.time = lambda: real() + float(open(os.environ["STEPPED_CLOCK"]).read() or 0)  # empty while it is written
"""


def test_a_wall_clock_that_is_set_costs_nothing(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by tests.faults: Locust measures its master's silence by the wall clock, and a step of an hour ended the workers.
    An hour forward in one run, and an hour back in the next."""
    clock = tmp_path / "clock"
    clock.write_text("0")
    (tmp_path / "sitecustomize.py").write_text(CLOCK)
    monkeypatch.setenv("STEPPED_CLOCK", str(clock))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Swarm(workers=1) as swarm:
        for now_s in ("3600", "0"):
            outcome, rows = run(
                swarm, schedule(120, 40.0), job(endpoint), lambda to=now_s: (time.sleep(0.8), clock.write_text(to))[0]
            )
            assert outcome.reason == ""
            assert set(rows.status) == {"ok"}


def test_pieces_let_go_what_was_heard() -> None:
    """Columns of any positions over the pieces; a piece that was heard of whole is not held."""
    whole = schedule(50, 10.0)
    pieces = Pieces(feed(50, 10.0, 20))
    while pieces.more:
        pieces.take()
    at = np.array([45, 3, 21, 19, 20])
    index, due, _, output = pieces.at(at)
    assert (index.tolist(), due.tolist()) == (whole.index[at].tolist(), whole.due_s[at].tolist())
    assert set(output.tolist()) == {5}
    pieces.heard(np.arange(20))
    pieces.heard(np.arange(20, 39))
    assert sorted(pieces._held) == [20, 40]
    assert pieces.at(np.array([3, 21]))[0][1] == whole.index[21]


def test_what_servers_said_survives_the_journey() -> None:
    """Facts that have a column come into it, the rest as JSON; what JSON cannot hold or what is endless is left out."""
    asked = schedule(5, 1.0)
    nan = float("nan")
    told: list[Any] = [
        {"queue_s": 0.25, "cached_tokens": 16, "prefill_worker": "p\x1b0", "decode_worker": 3, "rank": 2},
        None,
        {"queue_s": nan},
        {"x": "y" * (MOST_FACTS - 8)},  # with its braces, quotes and colon just as long as may be
        {"x": "y" * (MOST_FACTS - 7), "queue_s": "soon"},
    ]
    rows = [
        Row(k, 10.0 + k, nan, nan, nan, 11.0, -1, -1, 0, nan, 503, "failed", "other", "", 0, 9.5 if k else nan, told[k])
        for k in range(5)
    ]
    message = pack(rows)
    assert sorted(message["facts"]) == ["0", "3"]
    assert message["detail"] == {}
    found = unpack(message, asked, 1, 9.0)
    assert found.queue_s[0] == 0.25
    assert np.isnan(found.queue_s[1:]).all()
    assert np.isnan(found.first_step_s).all()
    assert found.cached_tokens.tolist() == [16, -1, -1, -1, -1]
    assert "\x1b" not in found.prefill_worker[0]
    assert found.prefill_worker.tolist()[1:] == [""] * 4
    assert found.decode_worker[0] == "3"
    assert found.facts.tolist() == ['{"rank":2}', "", "", told[3]["x"].join(['{"x":"', '"}']), ""]
    assert found.dispatch_s.tolist() == [asked.due_s[0], 0.5, 0.5, 0.5, 0.5]
    assert found.due_s.tolist() == asked.due_s.tolist()
    assert unpack(message, asked, 1, 9.0, causal=True).due_s.tolist() == found.dispatch_s.tolist()
    assert found.http_status.tolist() == [503] * 5
    assert found.error.tolist() == ["other"] * 5
    assert found.requested_prompt_tokens.tolist() == [20] * 5
    no_facts = {name: value for name, value in message.items() if name != "facts"}
    assert unpack(no_facts, asked, 1, 9.0).facts.tolist() == [""] * 5


def test_a_number_that_no_column_holds_costs_the_fact_alone() -> None:
    """A server that says it had 10**30 tokens in its cache ends no run, and keeps no row out of the database."""
    asked = schedule(2, 1.0)
    nan = float("nan")
    facts = [{"cached_tokens": 10**30, "queue_s": 10**400, "rank": 2}, {"cached_tokens": 2**31, "prefill_s": 0.5}]
    rows = [
        Row(k, 10.0, nan, nan, nan, 11.0, -1, -1, 0, nan, 200, "ok", "", "", 0, nan, told)
        for k, told in enumerate(facts)
    ]
    found = unpack(pack(rows), asked, 1, 9.0)
    assert found.cached_tokens.tolist() == [-1, -1]
    assert np.isnan(found.queue_s).all()
    assert found.prefill_s[1] == 0.5
    assert found.facts.tolist() == ['{"rank":2}', ""]


def test_rows_of_pieces_are_rows_of_the_schedule() -> None:
    """A message over pieces is the message over the whole; who is not heard of any more ends with what was asked."""
    whole = schedule(50, 10.0)
    pieces = Pieces(feed(50, 10.0, 20))
    assert pieces.next_due_s == 0.0
    starts = []
    while pieces.more:
        starts.append(pieces.take()[0])
        next_s = whole.due_s[starts[-1] + 20] if starts[-1] < 40 else 0.0
        assert pieces.next_due_s == next_s
        assert not pieces.due(next_s)
        assert pieces.due(next_s + 1e-6) == pieces.more
    assert starts == [0, 20, 40]
    rows = [Row(k, 1.0, 2.0, 3.0, 4.0, 4.0, 7, 8, 9, 0.5, 200, "ok", "", "", 0) for k in (49, 20, 0, 19)]
    one, two = unpack(pack(rows), pieces, 3, 0.5), unpack(pack(rows), whole, 3, 0.5)
    for name in Observations.columns():
        assert getattr(one, name).tolist() == pytest.approx(getattr(two, name).tolist(), nan_ok=True), name
    assert (one.first_byte_s[0], one.first_token_s[0], one.last_token_s[0], one.max_gap_s[0]) == (1.5, 2.5, 3.5, 0.5)
    assert (one.prompt_tokens[0], one.output_tokens[0], one.chunks[0]) == (7, 8, 9)
    gone = pieces.ended(np.array([40, 5]), "cancelled", 2, "why")
    assert gone.index.tolist() == whole.index[[40, 5]].tolist()
    assert gone.due_s.tolist() == gone.dispatch_s.tolist() == whole.due_s[[40, 5]].tolist()
    assert (gone.requested_prompt_tokens.tolist(), gone.requested_tokens.tolist()) == ([20, 20], [5, 5])
    assert (gone.status.tolist(), gone.worker.tolist(), gone.detail.tolist()) == (
        ["cancelled"] * 2,
        [2, 2],
        ["why"] * 2,
    )
    assert np.isnan(gone.sent_s).all()


def test_a_schedule_is_one_piece_and_stays() -> None:
    """All of a schedule is held to the end, however much of it was heard of."""
    whole = schedule(4, 1.0)
    pieces = Pieces(whole)
    assert pieces.more
    assert pieces.take() == (0, whole)
    assert not pieces.more
    assert pieces.next_due_s == 0.0
    pieces.heard(np.arange(4))
    assert pieces.at(np.array([3, 0]))[0].tolist() == [9, 0]


def test_a_feed_that_ends_early_is_said() -> None:
    """Its workers would wait for the rest; and a piece that is not there is not due before the one in hand has ended."""
    whole, there = schedule(50, 10.0), threading.Event()

    def cut() -> Iterator[Schedule]:
        yield whole.take(np.arange(20))
        there.wait(30)

    pieces = Pieces(Feed("t", 50, whole.span_s, 20, "test", cut))
    pieces.take()
    ends_s = float(whole.due_s[19])
    for at_s in (ends_s - 1, ends_s + 0.5, ends_s + 0.5 + loadgen.swarm.READ_S):
        assert not pieces.due(at_s)
    with pytest.raises(StoreError, match="from number 20 on were not read in 20 s"):
        pieces.due(ends_s + 0.6 + loadgen.swarm.READ_S)
    there.set()
    with pytest.raises(StoreError, match="only 20 of its 50 requests"):
        pieces.take()


def test_shares_are_even() -> None:
    """Requests of nobody go in turn; a session goes to who has fewest requests, all of it counted at once."""
    ones = np.ones(7, dtype=np.int64)
    plain = Schedule("s", np.arange(7), np.arange(7) * 1.0, ones, ones)
    assert [p.tolist() for p in shares(plain, 3)] == [[0, 3, 6], [1, 4], [2, 5]]
    assert [p.tolist() for p in shares(plain, 1)] == [list(range(7))]
    some = replace(plain, session=np.array([4, 0, -1, 4, 0, -1, 4]))
    assert [p.tolist() for p in shares(some, 2)] == [[0, 3, 5, 6], [1, 2, 4]]
    assert [p.tolist() for p in shares(some, 1)] == [list(range(7))]
    mixed = replace(plain, session=np.array([-1, 0, 0, -1, -1, 1, -1]))  # one alone weighs one, a session its size
    assert [p.tolist() for p in shares(mixed, 2)] == [[0, 3, 4, 6], [1, 2, 5]]
    alone = replace(plain, session=np.full(7, -1))
    assert [p.tolist() for p in shares(alone, 2)] == [[0, 2, 4, 6], [1, 3, 5]]


def dispersion(times: Any, window_s: float) -> float:
    """Variance over mean of the counts in windows: 1 for Poisson arrivals, 0 for constant ones."""
    counts = np.bincount(np.floor(times / window_s).astype(int))[:-1]
    return float(counts.var() / counts.mean())


@pytest.mark.timed
def test_poisson_from_two_workers_is_poisson_and_constant_is_constant(swarm: Swarm, endpoint: str) -> None:
    """What left is as dispersed as what was due, and gaps of a constant rate stay gaps, though two workers made them."""
    n, rate = 500, 200.0
    asked = schedule(n, rate, 2)
    _, rows = run(swarm, asked, job(endpoint))
    due, sent = dispersion(asked.due_s, 0.05), dispersion(np.sort(rows.sent_s), 0.05)
    assert 0.6 < due < 1.5
    assert sent == pytest.approx(due, abs=0.25)
    n = 300
    even = Schedule("c", np.arange(n), np.arange(n) / rate, np.full(n, 20), np.full(n, 2))
    _, rows = run(swarm, even, job(endpoint))
    assert set(rows.worker.tolist()) == {0, 1}
    gaps = np.diff(np.sort(rows.sent_s))
    assert float(np.median(np.abs(gaps - 1 / rate))) < 1e-3
    assert dispersion(np.sort(rows.sent_s), 0.05) < 0.1


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="Linux's")
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_that_share_a_core_do_not_interrupt_each_other(workers: int) -> None:
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        with Crew(workers) as one_core:  # a swarm's workers are a crew
            policies = {os.sched_getscheduler(pid) for pid in one_core.processes}
    finally:
        os.sched_setaffinity(0, cores)
    assert policies == {os.SCHED_BATCH if workers > 1 else os.SCHED_OTHER}


def test_an_idle_worker_does_no_harm(swarm: Swarm, endpoint: str) -> None:
    """Fewer requests than workers is a run like any other."""
    outcome, rows = run(swarm, schedule(1, 1.0), job(endpoint))
    assert outcome.reason == ""
    assert rows.status.tolist() == ["ok"]


def test_a_refusing_endpoint_is_rows_not_a_crash(swarm: Swarm) -> None:
    """Failures are data: every request ends as refused, and Locust counts them as failures."""
    outcome, rows = run(swarm, schedule(20, 200.0), job("http://127.0.0.1:1"))
    assert outcome.reason == ""
    assert Counter(rows.error) == {"refused": 20}
    assert swarm.statistics()["failures"] == 20


def test_ctrl_c_stops_sending_and_leaves_a_row_for_every_request(swarm: Swarm, endpoint: str) -> None:
    """After Ctrl-C nothing more is sent, answers in flight are awaited for the drain, the rest is named."""
    asked = schedule(400, 20.0, output_tokens=20)
    outcome, rows = run(swarm, asked, job(endpoint), lambda: (time.sleep(1.0), _thread.interrupt_main())[1])  # type: ignore[func-returns-value]
    assert outcome.interrupted
    assert outcome.reason == "interrupted"
    assert len(rows) == 400
    counts = Counter(rows.status)
    assert counts["ok"] >= 5
    assert counts["unsent"] > 300
    assert counts["ok"] + counts["unsent"] + counts["cancelled"] == 400
    assert counts["lost"] == 0
    # and the swarm is ready for the next run
    assert run(swarm, schedule(4, 50.0), job(endpoint))[0].reason == ""


@pytest.mark.parametrize("last", [False, True])
def test_ctrl_c_at_the_start_and_in_the_last_moment_counts(
    swarm: Swarm, endpoint: str, monkeypatch: pytest.MonkeyPatch, last: bool
) -> None:
    """Before the first worker has heard that it goes, and while the last one says that it is over: the run drains, or is whole,
    and whoever would begin another is told."""
    send, accept, done = swarm._send, swarm._accept, []

    def note(kind: str, data: Any, client_id: str = "") -> None:
        if kind == "steelyard.go" and not last and not done:
            done.append(_thread.interrupt_main())
        send(kind, data, client_id)

    def hear(found: Any, *rest: Any) -> None:
        if found[0] == "finished" and last and len(rest[5]) == 1:
            done.append(_thread.interrupt_main())
        accept(found, *rest)

    monkeypatch.setattr(swarm, "_send", note)
    monkeypatch.setattr(swarm, "_accept", hear)
    outcome, rows = run(swarm, schedule(10, 50.0), job(endpoint))
    assert len(done) == 1
    assert outcome.interrupted
    assert outcome.reason == ("" if last else "interrupted")
    assert len(rows) == 10
    assert not last or set(rows.status) == {"ok"}


def test_few_in_flight_may_take_as_long_as_their_answers_do(
    swarm: Swarm, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, one at a time: the deadline counts a timeout for each in turn, not one for the whole batch."""
    monkeypatch.setattr(loadgen.swarm, "SLACK_S", 1.0)
    n = 12
    order = Dispatch(((tuple(range(n)), None),), in_flight=1)
    asked = schedule(n, 1e3, output_tokens=20)
    outcome, rows = run(swarm, asked, replace(job(endpoint, timeout_s=0.5), dispatch=order))
    assert time.monotonic() - outcome.zero > 2.0  # what one batch had before
    assert outcome.reason == ""
    assert len(rows) == n


def test_after_the_deadline_nothing_is_asked_any_more(swarm: Swarm, endpoint: str) -> None:
    """Workers are told that it is over, and what they were at has its rows; the next run's are its own."""
    parts: list[Observations] = []
    outcome = swarm.run(schedule(20, 20.0, output_tokens=3000), job(endpoint), on_rows=parts.append, deadline_s=-0.3)
    assert outcome.reason.startswith("the deadline passed")
    counts = Counter(Observations.concat(parts).status)
    assert counts["cancelled"] > 0
    assert counts["cancelled"] + counts["unsent"] == 20
    until = time.monotonic() + 10  # the endpoint sees closed connections a moment later
    running = ["1"]
    while sum(map(float, running)) and time.monotonic() < until:
        with urllib.request.urlopen(f"{endpoint}/metrics", timeout=20) as answer:
            page = answer.read().decode()
        running = re.findall(r"^steelyard_running_requests{.*} (.*)$", page, re.M)
    assert sum(map(float, running)) == 0 < len(running)
    outcome, rows = run(swarm, schedule(20, 100.0), job(endpoint))
    assert (outcome.reason, set(rows.status)) == ("", {"ok"})


def finished(url: str, what: str = "finished_requests_total") -> float:
    """Requests that an endpoint has ended, or another of its counts."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=20) as page:
        told = page.read().decode()
    return sum(float(v) for v in re.findall(rf"^steelyard_{what}\S* (\S+)$", told, re.M))


def test_what_is_left_of_a_run_that_broke_off_is_not_sent_into_the_next(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller's own mistake ends the run: its workers stop, also where they do not hear of it, and its rows are nobody's."""

    def mistake(rows: Observations) -> None:
        raise ZeroDivisionError

    with embedded("demo", Fleet(1, 1)) as url:
        what = replace(job(url), model="demo")
        for halting in (swarm._halting, lambda *_: contextlib.nullcontext()):
            monkeypatch.setattr(swarm, "_halting", halting)
            with pytest.raises(ZeroDivisionError):
                swarm.run(schedule(800, 40.0), what, on_rows=mistake)
            outcome, rows = run(swarm, schedule(10, 20.0, output_tokens=7), what)
            assert outcome.reason == ""
            assert Counter(rows.status) == {"ok": 10}
            assert set(rows.output_tokens.tolist()) == {7}
        before = finished(url)
        time.sleep(0.5)
        assert finished(url) == before > 0


def test_a_drain_that_is_too_short_cancels_what_is_in_flight(swarm: Swarm) -> None:
    """An answer that outlasts the drain is cancelled and keeps the tokens that came."""
    asked = schedule(10, 50.0, output_tokens=3000)

    def interrupt() -> None:
        until = time.monotonic() + 15
        while finished(url, 'running_requests{[^}]*role="decode"') < 10 and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(2.0)  # for the first tokens to arrive
        _thread.interrupt_main()

    with embedded("demo", Fleet(1, 1)) as url:
        outcome, rows = run(swarm, asked, replace(job(url), model="demo"), interrupt, drain_s=0.2)
    assert outcome.interrupted
    assert set(rows.status) == {"cancelled"}
    assert (rows.chunks > 0).all()
    assert np.isfinite(rows.first_token_s).all()


def test_a_killed_worker_loses_its_own_requests_and_no_others(endpoint: str) -> None:
    """SIGKILL of one of two workers: the run ends with the reason, every row of the other worker is there."""
    asked = schedule(120, 40.0)
    asked.output_tokens[-2:] = 400  # seconds: the victim is at work when it is killed, however late
    with Swarm(workers=2) as swarm:
        victims = [swarm.processes[1]]

        def kill(rows: Observations) -> None:
            if victims and 1 in rows.worker:
                os.kill(victims.pop(), signal.SIGKILL)

        before = time.monotonic()
        outcome, rows = run(swarm, asked, job(endpoint), heard=kill)
        assert time.monotonic() - before < asked.span_s + 15
        assert "worker 1 was killed by signal 9" in outcome.reason
        assert rows.index.tolist() == asked.index.tolist()
        mine = rows.worker == 0
        assert mine.sum() == 60
        assert set(rows.status[mine]) == {"ok"}
        theirs = Counter(rows.status[rows.worker == 1])
        assert theirs["ok"] + theirs["lost"] == 60
        assert theirs["ok"] > 0
        assert theirs["lost"] > 0
        # the rest of the swarm goes on working
        outcome, rows = run(swarm, schedule(10, 100.0), job(endpoint))
        assert outcome.reason == ""
        assert set(rows.worker) == {0}


def test_a_worker_that_was_taken_for_dead_sends_nothing_when_it_wakes() -> None:
    """What it had still to send is lost, not sent at once into whatever runs then (a paused machine does that). It was taken for
    dead later than it gives itself up."""
    with embedded("demo", Fleet(1, 1)) as url, Swarm(workers=2) as swarm:
        assert loadgen.swarm.HEARTBEATS > FROZEN_S  # the last heartbeat may be a second old
        frozen = swarm.processes[1]
        still: list[float] = []

        def freeze() -> None:
            time.sleep(0.3)
            os.kill(frozen, signal.SIGSTOP)
            still.append(time.monotonic())

        def heard(rows: Observations) -> None:
            if "lost" in rows.status:
                still.append(time.monotonic())

        try:
            what = replace(job(url), model="demo")
            outcome, rows = run(swarm, schedule(200, 100.0), what, freeze, heard=heard)
            before = finished(url)
        finally:
            os.kill(frozen, signal.SIGCONT)
        time.sleep(1.5)
        assert finished(url) == before > 0
    assert "worker 1 sent no heartbeat" in outcome.reason
    assert still[1] - still[0] > FROZEN_S
    assert Counter(rows.status[rows.worker == 1])["lost"] > 10


def test_ctrl_c_is_heard_though_a_worker_has_died(endpoint: str) -> None:
    """The rows of the living are no last words of the dead: whoever waits for those hears a stop all the same."""
    with Swarm(workers=2) as swarm:
        victim = swarm.processes[1]

        def meanwhile() -> None:
            time.sleep(1.0)
            os.kill(victim, signal.SIGKILL)
            time.sleep(1.0)
            _thread.interrupt_main()

        outcome, rows = run(swarm, schedule(4000, 200.0), job(endpoint), meanwhile)
        assert outcome.interrupted
        assert time.monotonic() - outcome.zero < 15
    assert "worker 1 was killed by signal 9" in outcome.reason
    assert len(rows) == 4000
    assert Counter(rows.status[rows.worker == 0])["unsent"] > 400


def test_a_worker_that_dies_before_the_start_is_named_and_the_other_waited_for(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is killed when it is ready and the other is not yet: the run begins when that one is, not before."""
    with Swarm(workers=2) as swarm:
        first, second = swarm.processes[0], swarm.processes[1]
        heard = swarm._next

        def watched(timeout_s: float) -> tuple[str, str, Any] | None:
            found = heard(timeout_s)
            if found is not None and found[0] == "ready" and swarm._workers[found[1]].index == 0:
                os.kill(first, signal.SIGKILL)
                threading.Timer(0.5, os.kill, (second, signal.SIGCONT)).start()
            return found

        send, went = swarm._send, []

        def note(kind: str, data: Any, client_id: str = "") -> None:
            if kind == "steelyard.go":
                went.append(swarm._workers[client_id].index)
            send(kind, data, client_id)

        monkeypatch.setattr(swarm, "_next", watched)
        monkeypatch.setattr(swarm, "_send", note)
        os.kill(second, signal.SIGSTOP)
        outcome, rows = run(swarm, schedule(20, 100.0), job(endpoint))
    assert went == [1]
    assert "worker 0 was killed by signal 9, 10 of its 10 requests are lost" in outcome.reason
    assert Counter(zip(rows.worker.tolist(), rows.status.tolist(), strict=True)) == {(0, "lost"): 10, (1, "ok"): 10}


def test_both_workers_killed_ends_the_run(endpoint: str) -> None:
    """With nobody left the run ends at once; nothing hangs."""
    asked = schedule(200, 10.0)
    with Swarm(workers=2) as swarm:
        victims = list(swarm.processes.values())

        def kill() -> None:
            time.sleep(0.5)
            for victim in victims:
                os.kill(victim, signal.SIGKILL)

        before = time.monotonic()
        outcome, rows = run(swarm, asked, job(endpoint), kill)
        assert time.monotonic() - before < 10
        assert "worker 0" in outcome.reason
        assert "worker 1" in outcome.reason
        assert len(rows) == 200


def test_workers_begun_before_their_swarm_join_it(endpoint: str) -> None:
    """Processes that were there first are the swarm's workers; they prove themselves though nobody waits for them yet; of a crew
    that no swarm came to none is left."""
    with Crew(1) as crew, Swarm(workers=1, crew=crew) as swarm:
        first = swarm._inbox.get(timeout=30)
        assert first[0] == "proof"
        swarm._inbox.put(first)
        begun = list(crew.processes)
        assert list(swarm.processes.values()) == begun
        outcome, rows = run(swarm, schedule(10, 100.0), job(endpoint))
        assert outcome.reason == ""
        assert set(rows.status) == {"ok"}
    with Crew(2) as crew:
        begun += crew.processes
    assert len(begun) == 3
    assert not any(map(alive, begun))


def test_workers_end_with_their_master() -> None:
    """A master that is killed leaves no worker behind, joined or not."""
    code = (
        "import time\nfrom loadgen.crew import Crew\nfrom loadgen.swarm import Swarm\nwith Swarm(1) as s, Crew(1) as c:\n"
        " print(*s.processes.values(), *c.processes, flush=True); time.sleep(60)"
    )
    master = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert master.stdout is not None
    workers = [int(pid) for pid in master.stdout.readline().split()]
    assert len(workers) == 2
    assert all(map(alive, workers))
    master.kill()
    master.wait()
    master.stdout.close()
    until = time.monotonic() + 10
    while any(map(alive, workers)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(alive, workers))


@pytest.mark.timed
def test_a_worker_from_elsewhere_joins_and_its_clock_is_measured(
    endpoint: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """A worker that was started by hand, before its master, does the work; where clocks differ, their offset is measured and
    removed. Others have longer to join than children of the swarm; one too many may come meanwhile. What it lacks is named."""
    monkeypatch.setenv("STEELYARD_SWARM_SECRET", "of this test and nobody else")
    asked = schedule(30, 60.0)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(60)
        port = listening.getsockname()[1]  # free once it is closed
        command = [sys.executable, "-m", "advisor", "worker", "--wait", "--master", f"127.0.0.1:{port}"]
        started = subprocess.Popen(command)
        request.addfinalizer(started.kill)  # it would wait for ever
        listening.accept()[0].close()  # a sidecar whose master is not there yet
    swarm = Swarm(workers=0, expect=1, bind=f"127.0.0.1:{port}")
    swarm._boot = "another machine"
    measure = swarm._measure

    def while_another_joins(worker: Any) -> None:
        nonces, known = (os.urandom(32), os.urandom(32)), swarm._secret
        swarm._greeted["surplus"] = {"pid": 0, "boot": "", "nonce": nonces[0]}, nonces[1]
        said = {"proof": loadgen.secret.proof(known, "worker", *nonces)}
        swarm._inbox.put(("proof", "surplus", said, time.monotonic()))
        measure(worker)
        swarm._workers["surplus"].gone = "went away"

    monkeypatch.setattr(swarm, "_measure", while_another_joins)
    with swarm:
        with monkeypatch.context() as patched:
            patched.setattr(loadgen.swarm, "READY_TIMEOUT_S", 0.0)
            swarm.join()
        monkeypatch.setattr(swarm, "_measure", measure)
        there = replace(target(endpoint), scheme="https", ca_file="/of/the/master/ca.pem")
        with pytest.raises(
            SteelyardError, match=r"worker 0 on .* cannot start: .*/of/the/master/ca.pem cannot.*No such"
        ):
            run(swarm, asked, replace(job(endpoint), where=there))
        outcome, rows = run(swarm, asked, job(endpoint))
        worker = next(iter(swarm._workers.values()))
        offset, worker.offset = worker.offset, 100.0
        again, later = run(swarm, asked, job(endpoint))
        assert abs(worker.offset) < 0.05  # measured anew before each run
    assert started.wait(15) == 0
    assert outcome.reason == ""
    assert set(rows.status) == {"ok"}
    assert abs(offset) < 0.05
    assert (rows.lag_s > -0.05).all()
    assert (np.abs(later.lag_s) < 1.0).all()
    assert abs(again.costs[0]["clock_drift_s"]) < 0.05


def test_a_worker_that_waits_in_a_container_ends_when_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Process 1 has no default for SIGTERM, so an end by the default would be none: its pod would stay for the grace period."""
    monkeypatch.setenv("STEELYARD_SWARM_SECRET", "of this test and nobody else")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(60)
        command = [sys.executable, "-m", "advisor", "worker", "--wait", "--master"]
        with subprocess.Popen([*command, f"127.0.0.1:{listening.getsockname()[1]}"]) as started:
            try:
                listening.accept()[0].close()  # it looks for a master
                started.terminate()
                assert started.wait(30) == 128 + signal.SIGTERM
            finally:
                started.kill()


def test_strangers_are_not_handed_credentials(endpoint: str) -> None:
    """A process that nobody expects may connect to Locust's port; it gets no shard."""
    with Swarm(workers=1) as swarm:
        stranger = subprocess.Popen(
            [sys.executable, "-m", "advisor", "worker", "--master", swarm.address],
            env=os.environ | {"STEELYARD_SWARM_SECRET": "a guess of sixteen"},
            stderr=subprocess.PIPE,
            text=True,
        )
        _, said = stranger.communicate(timeout=30)
        outcome, rows = run(swarm, schedule(10, 100.0), job(endpoint))
        assert outcome.reason == ""
        assert swarm.workers == 1
        assert set(rows.worker) == {0}
    assert stranger.returncode == 1
    assert "does not know our STEELYARD_SWARM_SECRET" in said


def test_importing_the_swarm_patches_nothing() -> None:
    """gevent's monkey patching must never happen in a user's process."""
    code = "import loadgen.swarm, gevent.monkey as m; assert not m.saved, m.saved"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_swarm_needs_a_worker_and_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nonsense is refused before a process is started; who listens everywhere is joined by the machine's name."""
    with pytest.raises(InputError, match="at least one worker"):
        Swarm(workers=0)
    for bind in ("host:port", "host:\u00b2"):
        with pytest.raises(InputError, match="HOST:PORT"):
            Swarm(workers=1, bind=bind)
    monkeypatch.setenv("STEELYARD_SWARM_SECRET", "of this test and nobody else")
    assert Swarm(workers=0, expect=1, bind="0.0.0.0:5557").address == f"{socket.gethostname()}:0"
