"""What a decode worker carried, from client timestamps alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from advisor.features import (
    BLOCKS,
    RunData,
    admission_cap,
    decode_load,
    decode_rows,
    kv_capacity,
    prefill_reading_rows,
    quiet_rows,
    time_block,
)
from loadgen.cluster import Profile, simulate
from tests.test_records import one_answer
from traces.records import Fleet, Observations, Run, Sample, Schedule


def run_of(fleet: Fleet, n: int = 1) -> Run:
    return Run(
        name="r",
        trace="t",
        schedule_digest="",
        scheduled=n,
        endpoint="http://127.0.0.1:1",
        engine="reference",
        model="m",
        fleet=fleet,
        started_unix_s=0.0,
        workers=1,
        ended=True,
        complete=True,
        verdict="valid",
    )


def answer(start: float, step: float, tokens: int, prompt: int) -> Observations:
    """A sequence that joins at ``start`` and makes ``tokens`` tokens, one a step."""
    rows = one_answer(due=start, sent=start, first=start + step, last=start + step * tokens, tokens=tokens)
    rows.prompt_tokens[:] = prompt
    return rows


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.floats(0, 5), st.floats(0.01, 0.1), st.integers(2, 40), st.integers(1, 500)),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 4),
)
def test_decode_load_is_what_counting_by_hand_gives(
    sequences: list[tuple[float, float, int, int]], workers: int
) -> None:
    """Mean batch and context between two instants equal a fine numerical integration over the sequences."""
    rows = Observations.concat([answer(*s) for s in sequences])
    load = decode_load(rows, workers)
    start, end = float(rows.first_token_s.min()), float(rows.last_token_s.max())
    if end - start < 1e-3:
        return
    batch, context = load.mean_between(np.array([start]), np.array([end]))
    t = np.linspace(start, end, 40_001)
    t = (t[:-1] + t[1:]) / 2
    active, held = np.zeros_like(t), np.zeros_like(t)
    for begin, step, tokens, prompt in sequences:
        inside = (t >= begin) & (t < begin + step * tokens)
        active += inside
        held += inside * (prompt + (t - begin) / step)
    share = np.where(active > 0, np.maximum(1, active / workers) / np.maximum(active, 1), 0)
    assert batch[0] == pytest.approx(float((share * active).mean()), rel=5e-3, abs=5e-3)
    assert context[0] == pytest.approx(float((share * held).mean()), rel=5e-3, abs=0.5)


def test_a_lone_sequence_is_a_batch_of_one() -> None:
    """One sequence on eight workers is a batch of one, not of an eighth."""
    data = RunData(run_of(Fleet(1, 8)), answer(0.0, 0.05, 20, 100))
    rows = decode_rows(data)
    assert rows.x[0, 1] == pytest.approx(1.0)
    assert rows.y[0] == pytest.approx(0.05)


def test_short_answers_teach_nothing_about_a_step() -> None:
    """Answers of fewer than four tokens are left out."""
    data = RunData(run_of(Fleet(1, 1)), answer(0.0, 0.05, 3, 100))
    assert len(decode_rows(data)) == 0


def test_quiet_requests_are_those_that_met_nobody_else_in_prefill() -> None:
    """Of three requests the two that overlap on one prefill worker are not quiet; on two workers all are."""
    rows = Observations.concat([answer(0.0, 0.5, 9, 10), answer(0.2, 0.5, 9, 10), answer(3.0, 0.5, 9, 10)])
    assert len(quiet_rows(RunData(run_of(Fleet(1, 1)), rows))) == 1
    assert len(quiet_rows(RunData(run_of(Fleet(2, 1)), rows))) == 3


@given(st.lists(st.floats(0, 100), min_size=1, max_size=30))
def test_every_instant_has_a_block(times: list[float]) -> None:
    """Every instant falls in one of the blocks, the span's start in the first and its end in the last."""
    rows = Observations.concat([answer(t, 0.01, 2, 1) for t in [0.0, *times, 100.0]])
    blocks = time_block(rows, rows.due_s)
    assert blocks.min() == 0
    assert blocks.max() == BLOCKS - 1
    assert (np.diff(blocks) >= 0).all()


def readings(waiting: list[float], running: list[float], worker: str = "4") -> list[Sample]:
    return [
        Sample(at_s=i * 0.5, worker=worker, role="decode", waiting_requests=w, running_requests=r)
        for i, (w, r) in enumerate(zip(waiting, running, strict=True))
    ]


@pytest.mark.parametrize(
    ("waiting", "running", "cap"),
    [
        # one reading that catches a request between its transfer and the next step says nothing of a limit
        ([0, 1, 0, 0, 1, 0], [1, 2, 3, 2, 2, 1], 0),
        ([0, 0, 0], [5, 6, 7], 0),
        # a queue that lasts from one reading to the next is a queue before a full batch
        ([0, 3, 5, 4, 0], [18, 20, 20, 20, 12], 20),
        # while it lasts the batch may dip as answers end
        ([2, 2, 1], [20, 19, 20], 20),
    ],
)
def test_a_limit_of_admission_needs_a_queue_that_lasts(waiting: list[float], running: list[float], cap: int) -> None:
    """The batch limit is read off only where sequences waited from one reading to the next."""
    data = RunData(run_of(Fleet(4, 4)), answer(0.0, 0.05, 20, 100), readings(waiting, running))
    assert admission_cap(data) == cap


def test_readings_of_idle_workers_give_the_prefill_law_exactly() -> None:
    """Half-second readings of a quiet fleet, most of them amid a step of some worker: the true law, to a part in a thousand."""
    profile = Profile.load("demo")
    rng = np.random.default_rng(4)
    n = rng.lognormal(6.5, 0.8, 60).astype(np.int64)
    schedule = Schedule("t", np.arange(60), np.cumsum(rng.exponential(0.4, 60)), n, np.full(60, 8))
    samples: list[Sample] = []

    def look(now: float, held: list[Sample], fleet: Fleet, changing: int) -> None:
        samples.extend(held)

    fleet = Fleet(2, 2)
    rows = simulate(schedule, fleet, profile, controller=look, tick_s=0.5).observations
    found = prefill_reading_rows(RunData(run_of(fleet, 60), rows, samples))
    assert len(found) >= 6
    assert found.x[:, :2] @ [profile.a_s, profile.b_s_per_token] == pytest.approx(found.y, rel=1e-3)


@pytest.mark.parametrize(
    ("kv_policy", "decode", "rate_per_s"), [("reserve", 2, 5.0), ("preempt", 2, 5.0), ("reserve", 4, 1.0)]
)
def test_the_kv_cache_is_learned_whatever_its_share_is_of(kv_policy: str, decode: int, rate_per_s: float) -> None:
    """Of what is in place, as engines show it, or of what is reserved: there tokens over share would be half of it, also where
    some workers hold next to nothing."""
    laws = replace(Profile(name="t", c0_s=0.01), kv_tokens=50_000, kv_policy=kv_policy)
    n = 300
    schedule = Schedule("s", np.arange(n), np.arange(n) / rate_per_s, np.full(n, 200), np.full(n, 1000))
    samples: list[Sample] = []

    def watch(now_s: float, held: Sequence[Sample], fleet: Fleet, changing: int) -> None:
        samples.extend(held)

    fleet = Fleet(1, decode)
    rows = simulate(schedule, fleet, laws, controller=watch, tick_s=1.3).observations
    assert kv_capacity(RunData(run_of(fleet, n), rows, samples)) == pytest.approx(50_000, rel=0.03)
    assert kv_capacity(RunData(run_of(fleet, n), rows)) == 0.0
