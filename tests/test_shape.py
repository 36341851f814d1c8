"""Shaping changes what it says and nothing else; synthesis draws what it was asked for."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from traces.errors import InputError
from traces.records import Schedule
from traces.shape import (
    ORIGIN_OUTPUT,
    ORIGIN_PROMPT,
    LogNormal,
    clip_tokens,
    head,
    piece,
    scale_rate,
    superpose,
    synthesize,
    to_rate,
    window,
)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    n = draw(st.integers(2, 40))
    due = np.cumsum(draw(st.lists(st.floats(0.001, 10), min_size=n, max_size=n)))
    tokens = st.lists(st.integers(1, 5000), min_size=n, max_size=n)
    return Schedule("s", np.arange(n), due - due[0], np.array(draw(tokens)), np.array(draw(tokens)))


@given(schedules(), st.floats(0.1, 10))
def test_halving_speed_doubles_every_due_time_and_changes_nothing_else(schedule: Schedule, factor: float) -> None:
    """Dividing the rate by a factor multiplies every due time by it; lengths and order stay."""
    slower = scale_rate(schedule, 1 / factor)
    np.testing.assert_allclose(slower.due_s, schedule.due_s * factor)
    assert slower.prompt_tokens is schedule.prompt_tokens
    assert slower.output_tokens is schedule.output_tokens
    assert slower.index is schedule.index


@given(schedules(), st.floats(0.01, 1000))
def test_a_trace_takes_the_rate_it_is_given(schedule: Schedule, rate: float) -> None:
    """After ``to_rate`` the mean rate is the one asked for."""
    assert to_rate(schedule, rate).rate_per_s == pytest.approx(rate)


@given(schedules(), st.integers(1, 60))
def test_head_is_a_prefix(schedule: Schedule, n: int) -> None:
    """The first n requests are the first n requests."""
    cut = head(schedule, n)
    assert cut.due_s.tolist() == schedule.due_s.tolist()[:n]


@given(schedules(), st.integers(1, 5000))
def test_clipping_is_counted(schedule: Schedule, most: int) -> None:
    """No length exceeds the cap, and how many were capped is said."""
    cut = clip_tokens(schedule, max_prompt=most)
    over = int((schedule.prompt_tokens > most).sum())
    assert int(cut.prompt_tokens.max()) <= max(most, 1)
    assert cut.output_tokens.tolist() == schedule.output_tokens.tolist()
    assert any(f"{over} prompts capped" in c for c in cut.changes) == (over > 0)


def test_a_window_counts_from_its_own_start() -> None:
    """A window keeps the requests due in it and starts at zero; an empty one is refused."""
    schedule = Schedule("s", np.arange(5), np.arange(5.0), np.ones(5, int), np.ones(5, int))
    assert window(schedule, 2, 4).due_s.tolist() == [0.0, 1.0]
    with pytest.raises(InputError, match="no request is due"):
        window(schedule, 10, 20)


@pytest.mark.parametrize("factor", [0, -1, math.nan, math.inf])
def test_an_impossible_rate_is_refused(factor: float) -> None:
    """A rate must be a number above 0."""
    schedule = Schedule("s", np.arange(2), np.arange(2.0), np.ones(2, int), np.ones(2, int))
    with pytest.raises(InputError):
        scale_rate(schedule, factor)
    with pytest.raises(InputError):
        to_rate(schedule, factor)


# --- synthesis ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "mu"),
    [
        ("lognormal:median=403,sigma=1", math.log(403)),
        ("lognormal:mean=403,sigma=1", math.log(403) - 0.5),
        ("lognormal:mu=6,sigma=1", 6),
    ],
)
def test_median_mean_and_mu_are_three_words(text: str, mu: float) -> None:
    """The same number as median, mean or mu gives three different distributions."""
    assert LogNormal.parse(text).mu == pytest.approx(mu)


@pytest.mark.parametrize(
    "text",
    [
        "normal:mean=5",
        "lognormal:",
        "lognormal:median=5",
        "lognormal:median=5,mean=6,sigma=1",
        "lognormal:median=-5,sigma=1",
        "lognormal:median=5,sigma=-1",
        "lognormal:median=5,sigma=1,min=9,max=3",
        "lognormal:median=5,sigma=1,middle=3",
        "lognormal:median=x,sigma=1",
        "lognormal:median=nan,sigma=1",
    ],
)
def test_a_distribution_that_makes_no_sense_is_refused(text: str) -> None:
    """Each is one line."""
    with pytest.raises(InputError) as caught:
        LogNormal.parse(text)
    assert "\n" not in str(caught.value)


def test_drawn_lengths_have_the_median_and_spread_asked_for() -> None:
    """Of 200,000 unclipped draws the median is within 1 % and the log's deviation within 1 %."""
    drawn = LogNormal.parse("lognormal:median=403,sigma=1").draw(200_000, np.random.default_rng(1))
    assert float(np.median(drawn)) == pytest.approx(403, rel=0.01)
    assert float(np.log(drawn).std()) == pytest.approx(1.0, rel=0.01)


def test_the_origin_workload_is_clipped_as_the_report_says() -> None:
    """Prompts lie in [10, 4096], outputs in [10, 2048]; the medians, not the means, are 403 and 148."""
    trace = synthesize(50_000, ORIGIN_PROMPT, ORIGIN_OUTPUT, rate_per_s=5, arrivals="uniform", seed=2)
    assert (trace.prompt_tokens.min(), trace.prompt_tokens.max()) == (10, 4096)
    assert trace.output_tokens.min() >= 10
    assert trace.output_tokens.max() <= 2048
    assert float(np.median(trace.prompt_tokens)) == pytest.approx(403, rel=0.02)
    assert float(np.median(trace.output_tokens)) == pytest.approx(148, rel=0.02)


@given(st.integers(0, 2**31), st.sampled_from(["poisson", "uniform", "constant", "gamma", "burst"]))
def test_a_seed_decides_everything(seed: int, arrivals: str) -> None:
    """The same seed gives the same trace; arrivals do not touch lengths."""
    make = [synthesize(50, ORIGIN_PROMPT, ORIGIN_OUTPUT, rate_per_s=3, arrivals=arrivals, seed=seed) for _ in range(2)]
    assert make[0].digest() == make[1].digest()
    other = synthesize(50, ORIGIN_PROMPT, ORIGIN_OUTPUT, rate_per_s=7, arrivals="poisson", seed=seed)
    assert other.prompt_tokens.tolist() == make[0].prompt_tokens.tolist()


def dispersion(due: np.ndarray, width: float) -> float:
    counts = np.bincount((due / width).astype(int))[:-1]
    return float(counts.var() / counts.mean())


@pytest.mark.parametrize(
    ("arrivals", "low", "high"),
    [("poisson", 0.85, 1.15), ("uniform", 0.85, 1.15), ("constant", 0.0, 0.05), ("gamma", 2.5, 5.0)],
)
def test_arrivals_are_as_dispersed_as_their_name_says(arrivals: str, low: float, high: float) -> None:
    """Variance over mean of counts in 1 s windows: 1 for Poisson and uniform, 0 for constant, about CV^2 for gamma."""
    trace = synthesize(20_000, ORIGIN_PROMPT, ORIGIN_OUTPUT, rate_per_s=10, arrivals=arrivals, cv=2.0, seed=5)
    assert low <= dispersion(trace.due_s, 1.0) <= high
    assert trace.rate_per_s == pytest.approx(10, rel=0.05)


def test_a_burst_is_all_at_once() -> None:
    """A burst is due at 0 as a whole and has no rate to scale."""
    trace = synthesize(10, ORIGIN_PROMPT, ORIGIN_OUTPUT, rate_per_s=1, arrivals="burst")
    assert trace.due_s.tolist() == [0.0] * 10
    with pytest.raises(InputError, match="no rate to scale"):
        to_rate(trace, 5)


def in_sessions(n: int, users: int) -> Schedule:
    """n requests of users who take turns, a second of thought each."""
    at = np.arange(n, dtype=np.float64)
    parent = np.arange(n) - users
    return Schedule(
        "s",
        np.arange(n),
        at,
        np.full(n, 10),
        np.full(n, 5),
        session=np.arange(n) % users,
        parent=np.where(parent >= 0, parent, -1),
        think_s=np.where(parent >= 0, 1.0, np.nan),
    )


def test_a_slice_is_counted_from_its_first_request() -> None:
    """Requests 4 to 8 of 12; an empty one is refused."""
    held = piece(in_sessions(12, 3), 4, 8)
    assert (held.index.tolist(), held.due_s.tolist()) == ([4, 5, 6, 7], [0.0, 1.0, 2.0, 3.0])
    assert held.changes == ("requests 4 to 8 of 12",)
    assert held.parent is not None
    assert held.parent.tolist() == [-1, -1, -1, 0]
    with pytest.raises(InputError, match="no request is between 12 and 20"):
        piece(in_sessions(12, 3), 12, 20)


@given(st.integers(1, 60), st.integers(1, 5), st.floats(0.05, 1.0), st.integers(0, 9))
def test_a_thinned_session_stays_a_chain(n: int, users: int, share: float, seed: int) -> None:
    """Whatever goes, a row continues the latest row of its session that is left."""
    kept = np.flatnonzero(np.random.default_rng(seed).random(n) < share)
    held = in_sessions(n, users).take(kept)
    assert held.parent is not None
    assert held.session is not None
    for k, session in enumerate(held.session.tolist()):
        before = [i for i in range(k) if held.session[i] == session]
        assert held.parent[k] == (before[-1] if before else -1)


@given(st.integers(2, 40), st.integers(1, 4), st.integers(2, 4), st.integers(0, 9))
def test_copies_of_sessions_are_other_sessions(n: int, users: int, copies: int, seed: int) -> None:
    """Copies never share a session, a parent comes before its child and is of the same session."""
    held = superpose(in_sessions(n, users), copies, seed)
    assert held.parent is not None
    assert held.session is not None
    assert len(set(held.session.tolist())) == copies * min(n, users)
    linked = held.parent >= 0
    assert (held.session[linked] == held.session[held.parent[linked]]).all()


def test_scaling_time_scales_thinking_too() -> None:
    """Twice as fast is twice as fast in every gap."""
    held = scale_rate(in_sessions(9, 3), 2.0)
    assert held.think_s is not None
    assert held.think_s[3:].tolist() == [0.5] * 6
