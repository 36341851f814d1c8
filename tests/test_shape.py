"""Shaping changes what it says and nothing else; synthesis draws what it was asked for."""

from __future__ import annotations

import math
from dataclasses import replace

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
    joined,
    middle,
    piece,
    ramp,
    scale_rate,
    scale_tokens,
    spread,
    superpose,
    synthesize,
    thin,
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
    """Whatever goes, a row continues the latest row of its session that is left; a think time is known of the one before."""
    kept = np.flatnonzero(np.random.default_rng(seed).random(n) < share)
    held = in_sessions(n, users).take(kept)
    assert held.parent is not None
    assert held.session is not None
    for k, session in enumerate(held.session.tolist()):
        before = [i for i in range(k) if held.session[i] == session]
        assert held.parent[k] == (before[-1] if before else -1)
        assert held.think_s is not None
        known = before and held.index[before[-1]] == held.index[k] - users
        assert np.isfinite(held.think_s[k]) == bool(known)


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


# --- the arithmetic, by hand ----------------------------------------------------------------------------------------


def plain(due: list[float], prompt: list[int] | None = None, output: list[int] | None = None) -> Schedule:
    n = len(due)
    lengths = [np.array(v) if v else np.full(n, 10) for v in (prompt, output)]
    return Schedule("s", np.arange(n), np.array(due, dtype=float), *lengths, changes=("before",))


def test_what_was_changed_is_said_after_what_was_said_before() -> None:
    """Each shape adds its words; one that changes nothing adds none."""
    held = plain([0.0, 1.0, 2.0, 3.0], [5, 20, 30, 7])
    assert head(held, 3).changes == ("before", "first 3 of 4 requests")
    assert head(held, 4) is held
    assert window(held, 1, 3).changes == ("before", "window 1 to 3 s")
    assert scale_rate(held, 2).changes == ("before", "rate x2")
    assert scale_rate(held, 1) is held
    assert ramp(held, 2).changes == ("before", "ramp over 2 s")
    assert thin(held, 0.5, 1).changes[1].startswith("thinned to ")
    assert thin(held, np.float64(0.5), 1).changes == thin(held, 0.5, 1).changes  # a share from a grid
    assert thin(held, 1) is held
    assert superpose(held, 2, 7).changes == ("before", "2 copies laid over each other (seed 7)")
    assert superpose(held, 1) is held
    assert scale_tokens(held) is held
    assert spread(held, 0.5) is held
    assert piece(held, 2, 9).changes == ("before", "requests 2 to 4 of 4")


def test_caps_hold_at_the_cap() -> None:
    """A length at the cap is not capped; both columns are counted; 1 is the least cap."""
    held = plain([0.0, 1.0, 2.0], [5, 20, 30], [1, 2, 3])
    cut = clip_tokens(held, 20, 2)
    assert (cut.prompt_tokens.tolist(), cut.output_tokens.tolist()) == ([5, 20, 20], [1, 2, 2])
    assert cut.changes[1] == "1 prompts capped at 20 tokens, 1 outputs capped at 2 tokens"
    assert clip_tokens(held, 30, 3) is held
    assert clip_tokens(held) is held
    assert clip_tokens(held, max_output=1).prompt_tokens.tolist() == [5, 20, 30]
    assert clip_tokens(held, max_output=1).output_tokens.tolist() == [1, 1, 1]
    for caps in ({"max_prompt": 0}, {"max_output": -1}):
        with pytest.raises(InputError, match="at least 1"):
            clip_tokens(held, **caps)


def test_a_ramp_is_linear_in_the_rate() -> None:
    """t = sqrt(2 R u) below R / 2, u + R / 2 after; the rate at the ramp's middle is half the trace's."""
    held = ramp(plain([0.0, 0.5, 1.62, 2.0, 2.5, 10.0]), 4.0)
    assert held.due_s.tolist() == [0.0, 2.0, math.sqrt(8 * 1.62), 4.0, 4.5, 12.0]
    for wrong in (0, -1, math.inf, math.nan):
        with pytest.raises(InputError, match="ramp"):
            ramp(held, wrong)


def test_lengths_are_scaled_and_rounded() -> None:
    """Rounded, at least 1; blocks go with their prompts and stay where only answers change."""
    blocks = np.empty(2, dtype=object)
    blocks[:] = [(1, 2), (3,)]
    held = replace(plain([0.0, 1.0], [5, 1], [7, 3]), blocks=blocks, block_tokens=4)
    more = scale_tokens(held, prompt=1.5)
    assert (more.prompt_tokens.tolist(), more.output_tokens.tolist()) == ([8, 2], [7, 3])
    assert (more.blocks, more.block_tokens, more.changes[1]) == (None, 0, "prompts x1.5")
    less = scale_tokens(held, output=0.1)
    assert less.output_tokens.tolist() == [1, 1]
    assert (less.blocks is blocks, less.block_tokens) == (True, 4)
    assert scale_tokens(held, 2, 3).changes[1] == "prompts x2, outputs x3"
    for wrong in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(InputError, match="length factor"):
            scale_tokens(held, output=wrong)
    with pytest.raises(
        InputError, match=r"outputs x1e.09 reach 7e.09 tokens, more than 2147483647. Give a lower --output-scale"
    ):
        scale_tokens(held, output=1e9)  # no database could hold its rows


def test_a_share_is_kept_by_chance() -> None:
    """About the share is kept, the same by the same seed; none left is refused, as is a share that is none."""
    held = plain([float(i) for i in range(4000)])
    kept = thin(held, 0.25, 3)
    assert 900 < len(kept) < 1100
    assert kept.index.tolist() == thin(held, 0.25, 3).index.tolist() != thin(held, 0.25, 4).index.tolist()
    assert thin(held, 0.25).index.tolist() == thin(held, 0.25, 0).index.tolist()
    assert (kept.due_s == kept.index).all()
    assert f"thinned to {len(kept)} of 4000" in kept.changes[1]
    with pytest.raises(InputError, match="none is left"):
        thin(plain([0.0]), 1e-9)
    for wrong in (0.0, -0.5, 1.01, math.nan):
        with pytest.raises(InputError, match="share to keep"):
            thin(held, wrong)


def test_copies_turn_round_the_span() -> None:
    """Copies hold every request each, turned by one shift within the span and its last gap; blocks stay apart."""
    blocks = np.empty(5, dtype=object)
    blocks[:] = [(0, 1), (2,), (), (0,), (4,)]
    first = replace(plain([3.0, 4.0, 5.0, 7.0, 11.0], [1, 2, 3, 4, 5]), blocks=blocks, block_tokens=8)
    held = superpose(first, 2, 5)
    assert len(held) == 10
    assert held.index.tolist() == list(range(10))
    assert held.blocks is not None
    shift = float(np.random.default_rng(5).uniform(0, 10, 1)[0])
    wanted = sorted(
        [(t, k + 1, blocks[k]) for k, t in enumerate([0.0, 1.0, 2.0, 4.0, 8.0])]
        + [((t + shift) % 10, k + 1, tuple(i + 5 for i in blocks[k])) for k, t in enumerate([0.0, 1.0, 2.0, 4.0, 8.0])]
    )
    assert held.due_s.tolist() == pytest.approx([t for t, _, _ in wanted])
    assert held.prompt_tokens.tolist() == [n for _, n, _ in wanted]
    assert held.blocks.tolist() == [b for _, _, b in wanted]
    once = superpose(plain([2.0, 2.0], [1, 2]), 3)
    assert (once.due_s.tolist(), once.prompt_tokens.tolist()) == ([2.0] * 6, [1, 2] * 3)
    shift = float(np.random.default_rng(5).uniform(0, 4, 1)[0])  # two requests 2 s apart come round every 4 s
    pair = superpose(plain([1.0, 3.0], [1, 2]), 2, 5)
    assert pair.due_s.tolist() == pytest.approx(sorted([0.0, 2.0, shift, (2 + shift) % 4]))
    with pytest.raises(InputError, match="at least once"):
        superpose(first, 0)


def test_copies_of_a_chain_are_chains() -> None:
    """Sessions of a copy are numbered on; a turn goes on from its own copy's, or, cut by the span's end, from nobody."""
    chain = replace(in_sessions(4, 2), session=np.array([0, -1, 0, -1]), parent=np.array([-1, -1, 0, -1]))
    held = superpose(chain, 2, 1)
    assert held.session is not None
    assert held.parent is not None
    assert held.think_s is not None
    assert sorted(held.session.tolist()) == [-1, -1, -1, -1, 0, 0, 1, 1]
    for number in (0, 1):
        one, two = np.flatnonzero(held.session == number).tolist()
        cut = bool(np.isfinite(held.think_s[one]))  # the later turn came round first
        assert held.parent[two] == (-1 if cut else one)
        assert held.parent[one] == -1
    assert (held.parent[held.session < 0] == -1).all()


def test_instants_of_a_coarse_clock_are_spread_over_their_tick() -> None:
    """Only those that share an instant move, within their tick, in microseconds, in order; the same by the same seed."""
    held = plain([0.0, 0.0, 0.0, 3.0, 6.0, 6.0, 9.0, 10.0])
    moved = spread(held, 3.0, 2)
    due = moved.due_s
    assert (due[:3] < 3).all()
    assert len(set(due[:3].tolist())) == 3
    assert due[3] == 3.0
    assert ((due[4:6] >= 6) & (due[4:6] < 9)).all()
    assert due[6:].tolist() == [9.0, 10.0]  # one tick, but the clock told them apart
    assert (np.diff(due) >= 0).all()
    assert np.allclose(due * 1e6, np.rint(due * 1e6), rtol=0, atol=1e-3)
    assert moved.changes[1] == "5 requests spread within a tick of 3 s (seed 2)"
    assert due.tolist() == spread(held, 3.0, 2).due_s.tolist() != spread(held, 3.0, 3).due_s.tolist()
    assert spread(held, 3.0).due_s.tolist() == spread(held, 3.0, 0).due_s.tolist()
    many = spread(plain([0.0] * 2000), 4.0)
    assert float(many.due_s.mean()) == pytest.approx(2.0, abs=0.1)
    assert float(many.due_s.max()) == pytest.approx(4.0, abs=0.02)
    for wrong in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(InputError, match="tick"):
            spread(held, wrong)


def test_a_length_is_drawn_within_its_bounds() -> None:
    """min and max hold, and by default are 1 and what 32 bits hold; a bound may be the other; rounding is to the nearest."""
    rng = np.random.default_rng(0)
    assert LogNormal.parse("lognormal:median=5,sigma=0,min=5,max=5") == LogNormal(math.log(5), 0.0, 5, 5)
    assert LogNormal.parse("lognormal:mu=-2,sigma=1") == LogNormal(-2.0, 1.0, 1, 2**31 - 1)
    assert LogNormal(0.0, 1.0) == LogNormal(0.0, 1.0, 1, 2**31 - 1)
    assert LogNormal.parse("lognormal:median=1,sigma=1").mu == 0.0
    assert LogNormal.parse(" lognormal : mean=9 , sigma=2,").mu == pytest.approx(math.log(9) - 2)
    assert LogNormal(math.log(2.6), 0.0).draw(3, rng).tolist() == [3, 3, 3]
    assert LogNormal(-50.0, 0.0).draw(2, rng).tolist() == [1, 1]
    assert LogNormal(99.0, 0.0).draw(2, rng).tolist() == [2**31 - 1] * 2
    for text in (
        "median=0,sigma=1",
        "median=5,sigma=inf",
        "mu=inf,sigma=1",
        "mu=1,sigma=1,min=0",
        f"mu=1,sigma=1,max={2**31}",
        "mu=1,sigma=1,max=inf",
        "mu=1,sigma=1,min=nan",
        "mu=1,sigma=1,max=10.9",
        "mu=1,sigma=1,min=1.5",
    ):
        with pytest.raises(InputError):
            LogNormal.parse(f"lognormal:{text}")


def test_arrivals_have_the_rate_asked_for() -> None:
    """Constant gaps are 1 / rate; drawn gaps have that mean and their process's variation; the first is due at 0."""

    def due(arrivals: str, n: int = 40_000, cv: float = 2.0) -> np.ndarray:
        return synthesize(n, ORIGIN_PROMPT, ORIGIN_OUTPUT, rate_per_s=4.0, arrivals=arrivals, cv=cv, seed=3).due_s

    assert due("constant", 5).tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    for arrivals, cv, variation in (("poisson", 9.0, 1.0), ("gamma", 0.5, 0.5), ("gamma", 2.0, 2.0)):
        times = due(arrivals, cv=cv)
        gaps = np.diff(times)
        assert times[0] == 0.0
        assert float(gaps.mean()) == pytest.approx(0.25, rel=0.04)
        assert float(gaps.std() / gaps.mean()) == pytest.approx(variation, rel=0.04)
    even = due("uniform", 4000)
    assert float(even.max()) == pytest.approx(1000, rel=0.01)
    assert float(even.mean()) == pytest.approx(500, rel=0.05)
    assert 0 <= float(even.min()) < 1
    times = due("poisson", 100)
    assert np.allclose(times * 1e6, np.rint(times * 1e6), rtol=0, atol=1e-3)
    one = synthesize(1, ORIGIN_PROMPT, ORIGIN_OUTPUT, rate_per_s=4.0)
    assert (one.name, one.index.tolist(), one.due_s.tolist()) == ("synthetic", [0], [0.0])
    for asked, words in (
        ({"n": 0}, "at least one request"),
        ({"arrivals": "tidal"}, "must be one of"),
        ({"rate_per_s": 0.0}, "--rate"),
        ({"rate_per_s": math.inf}, "--rate"),
        ({"arrivals": "gamma", "cv": 0.0}, "--cv"),
        ({"arrivals": "gamma", "cv": math.inf}, "--cv"),
    ):
        with pytest.raises(InputError, match=words):
            synthesize(**({"n": 2, "prompt": ORIGIN_PROMPT, "output": ORIGIN_OUTPUT, "rate_per_s": 1.0} | asked))
    assert len(synthesize(2, ORIGIN_PROMPT, ORIGIN_OUTPUT, rate_per_s=0.0, arrivals="burst")) == 2


def test_a_windows_start_belongs_to_it_and_its_end_does_not() -> None:
    """Requests due at the start are in, at the end are out."""
    assert window(plain([0.0, 1.0, 2.0, 3.0]), 1.0, 3.0).index.tolist() == [1, 2]


def test_windows_are_joined_by_their_mean_gap_and_keep_their_own() -> None:
    """Each begins a mean gap of the one before after its last request; time that is missing is idle between them, what is too
    much is taken from the longest gaps, so that the rate is that of the whole; nothing else changes."""
    parts = [plain([5.0, 6.0, 9.0], [1, 2, 3]), plain([20.0, 21.0, 22.0], [4, 5, 6])]
    as_it_is = plain([0.0, 1.0, 4.0, 6.0, 7.0, 8.0]).rate_per_s
    held = joined(parts, "some", 100, as_it_is)
    assert held.due_s.tolist() == pytest.approx([0.0, 1.0, 4.0, 6.0, 7.0, 8.0])
    assert (held.prompt_tokens.tolist(), held.index.tolist()) == ([1, 2, 3, 4, 5, 6], list(range(6)))
    assert (held.name, held.changes) == ("some", ("2 windows of 3 requests of 100",))
    for rate, due in (
        (None, [0.0, 1.0, 4.0, 6.0, 7.0, 8.0]),
        (as_it_is / 2, [0.0, 1.0, 4.0, 14.0, 15.0, 16.0]),
        (as_it_is * 8 / 7, [0.0, 1.0, 3.0, 5.0, 6.0, 7.0]),
        (as_it_is * 2, [0.0, 0.8, 1.6, 2.4, 3.2, 4.0]),
    ):
        assert joined(parts, "some", 100, rate).due_s.tolist() == pytest.approx(due)
    assert [middle(100, 10, k, 4) for k in range(4)] == [7, 32, 57, 82]
    assert [middle(10, 4, k, 4) for k in range(4)] == [0, 1, 4, 6]
