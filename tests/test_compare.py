"""Comparing runs: better, worse or cannot tell, with intervals that hold for requests that share a queue."""

from __future__ import annotations

import json
import math
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

import advisor.compare
from advisor.cli import main
from advisor.compare import (
    TIME_BINS,
    WIDER,
    Binned,
    Difference,
    _change,
    _difference,
    _ends,
    _figures,
    _quantile,
    _weights,
    against_first,
    binned,
    block_length,
    compare,
    counted,
    doubts,
    in_words,
    objection,
    time_bins,
)
from tests.test_features import run_of
from traces.aggregate import WIDTH, Bins
from traces.measures import Slo, met
from traces.records import Fleet, Observations, Run
from traces.store import open_store

SLO = Slo.parse("ttft<0.5s tpot<50ms")


def run(id: int, **more: Any) -> Run:
    made = replace(run_of(Fleet(2, 2)), id=id, trace="t", schedule_digest="d", slo=str(SLO))
    return replace(made, **more)


def queue(seed: int, slower: float = 1.0, n: int = 3000, load: float = 0.7, traffic: int = 0) -> Observations:
    """A single server's queue (Lindley): Poisson arrivals of seed ``traffic``, exponential service of mean ``load * slower``."""
    due = np.cumsum(np.random.default_rng(traffic).exponential(1.0, n)) * 0.1
    service = np.random.default_rng(1000 + seed).exponential(0.1 * load * slower, n)
    free = 0.0
    done = np.empty(n)
    for k in range(n):
        free = max(due[k], free) + service[k]
        done[k] = free
    rows = Observations.empty(n)
    rows.index[:] = np.arange(n)
    rows.due_s[:] = rows.sent_s[:] = rows.dispatch_s[:] = due
    rows.first_token_s[:] = done
    rows.last_token_s[:] = done + 0.03 * 9
    rows.output_tokens[:] = rows.requested_tokens[:] = 10
    rows.prompt_tokens[:] = rows.requested_prompt_tokens[:] = 100
    rows.status[:] = "ok"
    return rows


def pair(a: Observations, b: Observations, **more: Any) -> tuple[Binned, Binned]:
    return binned(run(1), a, SLO), binned(run(2, **more), b, SLO)


def verdicts(a: Observations, b: Observations) -> dict[str, str]:
    return {d.metric: d.verdict for d in compare(*pair(a, b)).differences}


def test_equal_servers_are_told_apart_no_more_often_than_the_interval_says() -> None:
    """40 pairs of the same queue at 70 % load: 90 % intervals of P99 TTFT, mean-like figures and rates miss about one in ten.

    Requests taken as independent would be wrong in about half of them. Bound: binomial, 9 of 40 has probability 0.01 at 10 %.
    """
    wrong = dict.fromkeys(
        ("ttft_p50_s", "ttft_p99_s", "e2e_p90_s", "goodput_per_s", "throughput_per_s", "output_tokens_per_s"), 0
    )
    for k in range(40):
        found = verdicts(queue(2 * k, traffic=k), queue(2 * k + 1, traffic=k))
        for name in wrong:
            wrong[name] += found[name] != "cannot tell"
    assert max(wrong.values()) <= 9, wrong


def test_a_slower_server_is_worse_and_a_faster_one_better() -> None:
    """15 % longer service at 70 % load is seen in TTFT and attainment, whichever run is named first."""
    slow, fast = queue(1, 1.15), queue(2)
    assert verdicts(fast, slow)["ttft_p50_s"] == "worse"
    assert verdicts(slow, fast)["ttft_p50_s"] == "better"
    assert verdicts(fast, slow)["attainment"] == "worse"
    assert verdicts(slow, fast)["e2e_p90_s"] == "better"


def test_figures_are_the_runs_own_and_lie_in_their_intervals() -> None:
    """The change is that of the exact figures, not of the bins; it lies inside its interval."""
    a, b = pair(queue(1), queue(2, 1.2))
    for d in compare(a, b).differences:
        if d.metric == "ttft_p99_s":
            assert d.base == pytest.approx(float(np.quantile(queue(1).ttft_s, 0.99)))
            assert d.change == pytest.approx(d.other / d.base - 1)
        if np.isfinite(d.low):
            assert d.low <= d.change + 1e-9
            assert d.high >= d.change - 1e-9


def test_the_same_run_twice_cannot_be_told_apart() -> None:
    """No metric of a run is better or worse than its own."""
    assert set(verdicts(queue(1), queue(1)).values()) == {"cannot tell"}


def test_one_congestion_is_not_many_witnesses() -> None:
    """A run that is slow in one stretch of time has few independent blocks, and no verdict follows from that stretch alone."""
    base = queue(1, 0.5)
    slow = replace(base, first_token_s=base.first_token_s + np.where(np.arange(3000) > 1800, 2.0, 0.0))
    made = compare(*pair(base, slow))
    assert made.blocks < 40
    assert next(d for d in made.differences if d.metric == "ttft_p50_s").verdict == "cannot tell"


@settings(max_examples=25)
@given(st.floats(0.0, 0.9), st.integers(0, 1000))
def test_blocks_grow_with_the_correlation(phi: float, seed: int) -> None:
    """Blocks are at least one bin, at most a third of them, and longer for a series that hangs together than for its shuffle."""
    rng = np.random.default_rng(seed)
    x = np.zeros(TIME_BINS)
    for k in range(1, TIME_BINS):
        x[k] = phi * x[k - 1] + rng.normal()
    length = block_length(x)
    assert 1 <= length <= TIME_BINS / 3
    if phi > 0.85:
        assert length > 3


@pytest.mark.parametrize("phi", [0.5, 0.8])
def test_blocks_are_as_long_as_the_theory_of_a_known_series_says(phi: float) -> None:
    """Of x[k] = phi x[k-1] + noise the covariances are known, and with them Politis and White's length for the circular
    bootstrap: b^3 = 2 G^2 n / D, G = 2 sum k c(k) = 2 phi / (1 - phi)^2, D = 4/3 ((1 + phi) / (1 - phi))^2."""
    n = 6000
    found = []
    for seed in range(7):
        noise = np.random.default_rng(seed).normal(size=n)
        x = np.zeros(n)
        for k in range(1, n):
            x[k] = phi * x[k - 1] + noise[k]
        found.append(block_length(x))
        assert block_length(3.0 + 5.0 * x) == found[-1]
    gain, spread = 2 * phi / (1 - phi) ** 2, (1 + phi) / (1 - phi)
    assert np.median(found) == pytest.approx((2 * gain**2 * n / (4 / 3 * spread**2)) ** (1 / 3), rel=0.12)


def politis_white(x: list[float]) -> int:
    """Their rule (2004, with the correction of 2009) for the circular bootstrap, term by term."""
    n, mean = len(x), sum(x) / len(x)
    c = [sum((x[i] - mean) * (x[i + k] - mean) for i in range(n - k)) / n for k in range(n // 2)]
    alike, few = 2 * math.sqrt(math.log10(n) / n), max(5, math.ceil(math.sqrt(math.log10(n))))
    m = 0
    while m + few < len(c) and any(abs(c[m + k] / c[0]) >= alike for k in range(1, few + 1)):
        m += 1
    m = max(1, m if m + few < len(c) else n // 4)
    around = [k for k in range(-2 * m, 2 * m + 1) if abs(k) < len(c)]
    flat = {k: min(1.0, 2 * (1 - abs(k) / (2 * m))) for k in around}
    spread = sum(flat[k] * c[abs(k)] for k in around)
    if spread <= 0:
        return 1
    gain = sum(flat[k] * abs(k) * c[abs(k)] for k in around)
    longest = math.ceil(min(3 * math.sqrt(n), n / 3))
    return min(max(1, math.ceil((2 * gain**2 / (4 / 3 * spread**2) * n) ** (1 / 3))), longest)


@pytest.mark.parametrize("n", [30, 61, 200])
def test_blocks_are_those_of_the_papers_rule(n: int) -> None:
    """For series of every kind of memory, short ones too."""
    lengths = set()
    for seed in range(24):
        phi = (-0.6, 0.0, 0.3, 0.6, 0.9, 0.98)[seed % 6]
        x = [0.0]
        for noise in np.random.default_rng(seed).normal(size=n - 1).tolist():
            x.append(phi * x[-1] + noise)
        lengths.add(block_length(np.array(x)))
        assert block_length(np.array(x)) == politis_white(x), (seed, phi)
    assert len(lengths) > 4


@pytest.mark.parametrize("n", [30, 61, 200])
@pytest.mark.parametrize("period", [3, 6, 8])
def test_blocks_of_waves_are_those_of_the_rule_too(n: int, period: int) -> None:
    """No run of lags is quiet in them: the rule looks at half of those that there are."""
    x = np.sin(np.arange(n) * 2 * np.pi / period) + 0.3 * np.cos(np.arange(n) * 2 * np.pi / n)
    assert block_length(x) == politis_white(x.tolist())


def test_what_does_not_vary_or_is_short_has_blocks_of_one() -> None:
    """No correlation is read out of nothing; bins without a figure are left out; a trend has blocks of a third at most."""
    assert block_length(np.full(200, 3.0)) == block_length(np.arange(7.0)) == 1
    trend = np.arange(90.0)
    assert block_length(trend) == block_length(np.concatenate([trend, np.full(40, np.nan)])) <= 30
    assert block_length(trend) > 15


def test_draws_are_blocks_around_the_clock() -> None:
    """Each draw has as many bins as there are; they come in runs of a block, whichever bin it begins at."""
    weights = _weights(np.random.default_rng(1), 0.25, 2000, 8)
    assert (weights.sum(axis=1) == 8).all()
    assert weights.mean(axis=0) == pytest.approx(np.ones(8), abs=0.08)
    whole = _weights(np.random.default_rng(1), 1.0, 50, 8)
    assert (whole == 1).all()
    assert (weights[:, ::2].sum(axis=1) == 4).all()  # a block of two has one of each
    assert len(np.unique(weights, axis=0)) > 50


def test_a_quantile_of_counts_lies_inside_its_bin() -> None:
    """Log-linear between the edges of the bin in which the rank falls; nothing has none."""
    edges = np.array([0.1, 0.2, 0.4, 0.8])
    below = np.array([[1.0, 3.0, 4.0], [0.0, 0.0, 0.0], [0.0, 0.0, 5.0]])
    wide = np.exp(WIDTH)
    assert _quantile(below, 0.5, edges)[0] == pytest.approx(0.2 * wide**0.5)
    assert _quantile(below, 0.25, edges)[0] == pytest.approx(0.1 * wide)
    assert _quantile(below, 0.9, edges)[0] == pytest.approx(0.4 * wide**0.6)
    assert np.isnan(_quantile(below, 0.5, edges)[1])
    assert _quantile(below, 0.2, edges)[2] == pytest.approx(0.4 * wide**0.2)


@pytest.mark.parametrize("blocks", [4.0, 9.0])
def test_an_interval_is_students_for_the_blocks_that_there_are(blocks: float) -> None:
    """Half-widths of the draws, by Student's t over the normal, sqrt(b / (b - 1)) and WIDER; ratios come back from logarithms."""
    drawn = np.random.default_rng(0).normal(0.0, 0.02, 400)
    factor = WIDER * scipy.stats.t.ppf(0.95, blocks - 1) / scipy.stats.norm.ppf(0.95) * np.sqrt(blocks / (blocks - 1))
    low, high = (factor * float(np.quantile(drawn, q)) for q in (0.05, 0.95))
    made = _difference("ttft_p50_s", 0.1, 0.13, drawn, False, blocks)
    assert (made.change, made.low, made.high) == pytest.approx(
        (0.3, 1.3 * np.exp(low) - 1, 1.3 * np.exp(high) - 1), rel=1e-9
    )
    assert made.verdict == "worse"
    assert _difference("throughput_per_s", 1.0, 1.3, drawn, False, blocks).verdict == "better"
    share = _difference("failed", 0.1, 0.3, drawn, True, blocks)
    assert (share.change, share.low, share.high) == pytest.approx((0.2, 0.2 + low, 0.2 + high), rel=1e-9)
    assert share.verdict == "worse"
    assert _difference("ttft_p50_s", 0.1, 0.1, drawn, False, blocks).verdict == "cannot tell"
    few = _difference("ttft_p50_s", 0.1, 0.13, drawn, False, 3.9, "3.9 independent stretches")
    assert (few.change, few.verdict) == (pytest.approx(0.3), "cannot tell")
    assert np.isnan(few.low)
    assert "3.9 independent stretches" in few.why
    none = _difference("ttft_p50_s", 0.0, 0.13, drawn, False, blocks)
    assert (none.verdict, none.why) == ("cannot tell", "one of them has no such figure, or none above 0")
    assert np.isnan(none.change)
    assert _difference("failed", 0.1, 0.3, drawn[:19], True, blocks).change == pytest.approx(0.2)
    assert _difference("failed", 0.1, 0.3, drawn[:20], True, blocks).verdict == "worse"


def test_no_latency_is_known_better_than_the_bins_it_is_drawn_from() -> None:
    """Found by a user's runs of 60 requests: all of E2E 0.06 % longer fell into the same bins in every draw, and was "worse"."""
    a = queue(1, n=100, load=0.2)
    later = replace(a, last_token_s=a.last_token_s + 0.0006 * a.e2e_s)
    for base, other in ((a, later), (later, a)):
        found = {d.metric: d for d in compare(*pair(base, other)).differences}
        for name in ("e2e_p50_s", "e2e_p90_s", "tpot_p90_s"):
            assert found[name].verdict == "cannot tell", name
            assert found[name].low <= math.expm1(math.log1p(found[name].change) - WIDTH) + 1e-12
            assert found[name].high >= math.expm1(math.log1p(found[name].change) + WIDTH) - 1e-12
    same = np.zeros(400)
    assert _difference("ttft_p99_s", 1.0, 1.02, same, False, 9.0).verdict == "worse"
    assert _difference("ttft_p99_s", 1.02, 1.0, same, False, 9.0).verdict == "better"
    assert _difference("failed", 0.1, 0.1001, same, True, 9.0).verdict == "worse"  # counted, not binned


def test_a_run_ends_when_chance_has_it() -> None:
    """As its E2E varies over time, which for one server is its TTFT; not by a trend, nor by what two runs share."""
    rows = queue(1, n=10_000)
    one = pair(rows, rows)[0]

    def spread(rows: Observations, base: Observations | None = None) -> float:
        one, less = (binned(run(1), held, SLO) if held is not None else None for held in (rows, base))
        assert one is not None
        drawn = _ends(np.random.default_rng(0), one, 4000, less)
        assert abs(drawn.mean()) < 0.1 * drawn.std() + 1e-9
        return float(drawn.std())

    own = float(rows.e2e_s.std())
    assert spread(rows) == pytest.approx(own, rel=0.1)
    assert spread(queue(2, n=10_000), rows) == pytest.approx(math.sqrt(2) * own, rel=0.2)
    growing = rows.due_s * 0.2
    overloaded = replace(rows, first_token_s=rows.first_token_s + growing, last_token_s=rows.last_token_s + growing)
    assert float(overloaded.e2e_s.std()) > 100 * own
    assert spread(overloaded) < 3 * own
    tokens = 1 + np.random.default_rng(0).geometric(0.01, len(rows))
    longer = replace(rows, output_tokens=tokens, last_token_s=rows.first_token_s + 0.03 * (tokens - 1))
    later = replace(longer, last_token_s=longer.last_token_s + 0.01)
    assert float(longer.e2e_s.std()) > 10 * own
    assert spread(later, longer) < 6 * own  # the same tokens are asked of both
    noise = np.random.default_rng(1).lognormal(0, 0.1, len(rows))
    uneven = replace(longer, last_token_s=longer.first_token_s + 0.03 * (tokens - 1) * noise)
    assert 2 * spread(later, longer) < spread(uneven, longer) < float(longer.e2e_s.std())
    few = rows.take(np.arange(3))
    assert spread(few) == 0.0
    even, later = (_figures(one, np.ones((1, TIME_BINS), np.float32), ends) for ends in (0.0, one.figures.span_s))
    for name in ("goodput_per_s", "throughput_per_s", "output_tokens_per_s"):
        assert later[name] == pytest.approx(even[name] / 2)
    assert later["attainment"] == even["attainment"]


@pytest.mark.filterwarnings("error")
def test_what_chance_hides_is_not_told() -> None:
    """All at once there is one stretch of time, however it is cut; of few answers a p99 is the slowest of them; and few requests
    make no ten stretches. A run that answered nothing is compared in what it has."""
    burst = queue(1)
    burst.due_s[:] = burst.sent_s[:] = burst.dispatch_s[:] = 0.0
    slower = replace(burst, first_token_s=burst.first_token_s * 2, last_token_s=burst.last_token_s * 2)
    told = {d.metric: d for d in compare(*pair(burst, slower)).differences}
    assert {d.verdict for d in told.values()} == {"cannot tell"}
    for name in ("throughput_per_s", "e2e_p99_s", "attainment"):
        assert (
            told[name].why == "requests due at fewer than 4 times: how far repeats lie apart tells how much they vary"
        )
    some = queue(1, n=400), replace(queue(1, n=400), first_token_s=queue(1, n=400).first_token_s + 9)
    found = {d.metric: d for d in compare(*pair(*some)).differences}
    assert found["ttft_p99_s"].why == "400 answers, too few to tell a p99: replay for longer"
    assert (found["ttft_p90_s"].verdict, found["ttft_p90_s"].why) == ("worse", "")
    short = compare(*pair(queue(1, n=160, load=0.2), queue(2, n=160, load=0.2)))
    assert short.blocks <= 8
    span = pair(queue(1, n=160, load=0.2), queue(1))[0].figures.span_s
    assert short.blocks * short.block_s == pytest.approx(span)
    few = compare(*pair(queue(1, n=60, load=0.2), queue(2, n=60, load=0.2))).differences
    assert {d.why for d in few} == {
        "3.0 independent stretches of time, too few: replay for longer, and not beyond what both hold"
    }
    none = replace(queue(2), status=np.full(3000, "failed", dtype=object))
    assert {d.metric: d for d in compare(*pair(queue(1), none)).differences}["failed"].verdict == "worse"


def test_what_is_too_few_is_counted_exactly() -> None:
    """80 requests are four stretches of 20, at four times or at 80; 500 answers have five beyond a p99."""

    def of(n: int, times: int = 0) -> dict[str, Difference]:
        made = []
        for seed in (1, 2):
            rows = queue(seed, n=n, load=0.2)
            place = np.arange(n) * times // n if times else np.arange(n)
            made.append(shifted(rows, place * (120.0 / (times or n)) - rows.due_s, "due_s", "sent_s", "dispatch_s"))
        found = compare(*pair(*made))
        blocks.append(found.blocks)
        return {d.metric: d for d in found.differences}

    blocks: list[float] = []
    assert of(79)["ttft_p50_s"].why.startswith("3.9 independent stretches of time, too few")
    assert (of(80)["ttft_p50_s"].why, blocks[-1]) == ("", 4.0)
    assert (of(160)["ttft_p50_s"].why, blocks[-1]) == ("", 8.0)
    assert of(400, 3)["ttft_p50_s"].why.startswith("requests due at fewer than 4 times")
    assert (of(400, 4)["ttft_p50_s"].why, blocks[-1]) == ("", 4.0)
    assert of(499)["ttft_p99_s"].why == "499 answers, too few to tell a p99: replay for longer"
    assert of(500)["ttft_p99_s"].why == ""


def test_a_wave_that_both_runs_share_leaves_them_their_stretches() -> None:
    """What is drawn of runs of one schedule are differences: a wave in both makes no stretch longer."""
    wave = 3 + 2 * np.sin(np.arange(3000) / 300)
    a, b = (shifted(queue(seed, load=0.2), wave) for seed in (1, 2))
    apart = [binned(run(1), a, SLO), binned(run(2, schedule_digest="e"), b, SLO)]
    assert compare(*pair(a, b)).blocks >= advisor.compare.LEAST_BLOCKS > compare(*apart).blocks


def shifted(rows: Observations, by_s: np.ndarray[tuple[int], np.dtype[np.float64]], *more: str) -> Observations:
    """Answers, and more, so much later each."""
    return replace(rows, **{name: getattr(rows, name) + by_s for name in ("first_token_s", "last_token_s", *more)})


def test_that_a_queue_grows_is_no_chance_of_when_it_ends() -> None:
    """Found by a reader: the end of a run was drawn from all of its E2E, and half the throughput was "cannot tell"."""
    for k in range(6):
        a, b = queue(2 * k, 1.0, 3000, 1.05, traffic=k), queue(2 * k + 1, 1.8, 3000, 1.05, traffic=k)
        base, other = pair(a, b)
        drawn = np.abs(_ends(np.random.default_rng(0), other, 400, base))
        assert np.quantile(drawn, 0.9) < 0.25 * (b.last_token_s.max() - a.last_token_s.max())


def test_the_last_answers_length_is_chance_only_where_others_are_asked() -> None:
    """Found by a reader: equal servers whose answers vary in length, without a queue, differed in throughput in a fifth of pairs
    of one schedule and in most of two. Bound as above: 9 of 40."""
    wrong = {True: 0, False: 0}
    for k in range(40):
        found = []
        for seed in (2 * k, 2 * k + 1):
            rng, lengths = np.random.default_rng(5000 + seed), np.random.default_rng(k)
            rows = queue(seed, n=1500, load=0.01, traffic=k)
            tokens = 2 + lengths.lognormal(math.log(200), 1.0, len(rows)).astype(int)
            rows.output_tokens[:] = rows.requested_tokens[:] = tokens
            rows.last_token_s[:] = rows.first_token_s + 0.03 * tokens * rng.lognormal(0, 0.05, len(rows))
            other = rows.take(rng.permutation(len(rows)))
            last = rows.first_token_s + other.last_token_s - other.first_token_s
            found.append((rows, replace(rows, output_tokens=other.output_tokens, last_token_s=last)))
        (a, _), (b, apart) = found
        for paired, rows in ((True, b), (False, apart)):
            one, two = pair(a, rows, schedule_digest="d" if paired else "e")
            (d,) = (d for d in compare(one, two).differences if d.metric == "throughput_per_s")
            wrong[paired] += d.verdict != "cannot tell"
    assert max(wrong.values()) <= 9, wrong


def test_shares_change_by_points_and_figures_by_ratios() -> None:
    """What is drawn is a difference of shares, and of other figures the logarithm of their ratio."""
    before, after = np.array([0.5, 0.4]), np.array([0.25, 0.4])
    assert _change(before, after, True).tolist() == [-0.25, 0.0]
    assert _change(before, after, False).tolist() == [math.log(0.5), 0.0]


def test_a_difference_is_read_in_its_unit() -> None:
    """Latencies in ms, both of them; changes in per cent, those of shares in points."""
    made = Difference("ttft_p50_s", 0.1, 0.2, 1.0, 0.9, 1.1, False, "worse")
    assert in_words(made)[1:] == ["100", "200", "+100 %", "+90 and +110", "worse"]
    made = Difference("failed", 0.1, 0.15, 0.05, 0.04, 0.06, True, "worse")
    assert in_words(made)[1:4] == ["10", "15", "+5 points"]
    made = Difference("attainment", 0.9, 0.8, -0.1, -0.2, 0.0, True, "cannot tell")
    assert in_words(made)[:3] == ["within SLO, %", "90", "80"]
    made = Difference("goodput_per_s", 3.25, 9999.9, 1.0, 0.9, 1.1, False, "better")
    assert in_words(made)[:3] == ["goodput/s", "3.25", "10,000"]
    made = Difference("ttft_p99_s", 12.3456, math.nan, math.nan, math.nan, math.nan, False, "cannot tell")
    assert in_words(made)[1:] == ["12,346", "–", "–", "–", "cannot tell"]


def test_only_a_degraded_run_makes_a_comparison_doubtful() -> None:
    """It is named, with what degraded it."""
    assert doubts(run(1)) == []
    assert doubts(run(3, verdict="degraded", reason="late")) == ["run 3 is degraded: late"]


def test_rows_fall_into_two_hundred_stretches_of_time() -> None:
    """As long as each other, the last with the last row; none without rows. Where all waits are equal none is beyond P99."""
    even = replace(
        queue(3, n=1000), due_s=np.arange(1000.0), sent_s=np.arange(1000.0), first_token_s=np.arange(1000.0) + 1.0
    )
    assert np.bincount(time_bins(even)).tolist() == [5] * 200
    assert time_bins(even.take(np.arange(0))).shape == (0,)
    assert time_bins(even.take(np.arange(1))).tolist() == [0]
    later = replace(even, due_s=even.due_s + 5e4)
    assert time_bins(later).tolist() == time_bins(even).tolist()
    assert (binned(run(1), even, SLO).series[:, 2] == 0).all()


def test_a_drift_leaves_three_stretches_and_no_verdict() -> None:
    """Blocks are a third of a run at most: what grows from its beginning to its end was seen once."""
    base = queue(1, 0.5)
    late = replace(base, first_token_s=base.first_token_s + np.linspace(0.0, 3.0, 3000))
    made = compare(*pair(base, late))
    assert made.blocks == pytest.approx(1 / 0.33)
    assert all("3.0 independent stretches" in d.why for d in made.differences if d.metric.startswith("ttft"))


def test_counts_hang_together_as_the_rows_do() -> None:
    """The series that blocks are measured on: mean log TTFT and E2E, shares beyond the run's P99 TTFT and within the SLO."""
    rows = queue(3)
    held = Bins(str(SLO))
    held.add(rows)
    exact, kept = binned(run(1), rows, SLO), counted(run(1), held)
    for one in (exact, kept):
        n = one.counts["requests"]
        assert n.sum() == 3000
        full = n > 0
        ttft, e2e, tail, good = (one.series[full, k] @ n[full] / 3000 for k in range(4))
        assert (ttft, e2e) == pytest.approx((np.log(rows.ttft_s).mean(), np.log(rows.e2e_s).mean()), abs=0.01)
        assert tail == pytest.approx(0.01, abs=0.002)
        assert good == pytest.approx(float((rows.ttft_s < 0.5).mean()), abs=0.005)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ended": False}, "has not ended"),
        ({"complete": False, "reason": "3 lost"}, "incomplete (3 lost)"),
        ({"verdict": "invalid", "reason": "late"}, "invalid (late)"),
        ({"policy": "closed-loop", "schedule_digest": "e"}, "is means of a closed loop"),
        ({"trace": "u"}, "another trace"),
        ({"seed": 5}, "another seed"),
        ({"schedule_digest": "e"}, "another schedule"),
        ({"slo": "ttft<1s"}, "another SLO"),
        ({"changes": ("prefixes shared",)}, "shared the trace's prefixes, which run 1 did not"),
        ({"changes": ("rate x2", "sessions causal")}, "let turns wait for answers, which run 1 did not"),
        ({"changes": ("prompts calibrated: 1.2 tokens a unit and 3 more",)}, ""),
        ({"warmup_s": 30.0}, "another warm-up than run 1 (30 s, not 0 s)"),
        ({}, ""),
    ],
)
def test_what_is_not_comparable_is_refused_with_the_reason(change: dict[str, Any], words: str) -> None:
    """Each reason by itself; none for runs that asked the same."""
    found = objection(run(2, **change), run(1))
    assert words in found
    assert bool(words) == bool(found)
    assert objection(run(2, slo="ttft<1s"), run(1), slo_given=True) == ""
    if "changes" in change:
        assert bool(objection(run(1), run(2, **change))) == bool(found)


def test_runs_that_asked_different_things_are_resampled_apart() -> None:
    """Forced on other traffic, the comparison says so and its intervals are wider than those of a pair: what congests both runs
    of one schedule at once tells nothing of their difference."""
    a = queue(1)
    b = replace(a, first_token_s=a.first_token_s + 0.02, last_token_s=a.last_token_s + 0.02)
    together = compare(*pair(a, b))
    assert together.paired
    assert together.block_s * together.blocks == pytest.approx(binned(run(1), a, SLO).figures.span_s)
    for other in ({"schedule_digest": "other"}, {"changes": ("prefixes shared",)}):
        apart = compare(*pair(a, b, **other))
        assert not apart.paired
        for one, two in zip(together.differences, apart.differences, strict=True):
            if one.metric in ("ttft_p50_s", "ttft_p90_s", "e2e_p50_s"):
                assert one.high - one.low < (two.high - two.low) / 2, one.metric
                assert (one.verdict, two.verdict) == ("worse", "cannot tell"), one.metric


def test_draws_say_what_their_stretches_hold() -> None:
    """With every stretch once a run's own shares, counts and quantiles; with one alone, those of the requests due in it."""
    rows = queue(1)
    rows.status[::10] = "failed"
    rows.output_tokens[:] = 4 + rows.index % 5
    one = binned(run(1), rows, SLO)
    place = time_bins(rows)
    weights = np.ones((3, len(one.series)), np.float32)
    weights[1:] = 0
    weights[1, 20] = weights[2, 77] = 1
    found = _figures(one, weights)
    for k, inside in enumerate((place >= 0, place == 20, place == 77)):
        mine = rows.take(np.flatnonzero(inside))
        own = met(mine, SLO).sum()
        assert found["attainment"][k] == pytest.approx(own / len(mine))
        assert found["failed"][k] == pytest.approx(1 - mine.ok.mean())
        assert found["goodput_per_s"][k] == pytest.approx(own)
        assert found["throughput_per_s"][k] == pytest.approx(mine.ok.sum())
        assert found["output_tokens_per_s"][k] == pytest.approx(mine.tokens[mine.ok].sum())
        waits = np.sort(mine.ttft_s[mine.ok])
        for q in (50, 90, 99):
            true = waits[math.ceil(q / 100 * len(waits)) - 1]
            assert found[f"ttft_p{q}_s"][k] == pytest.approx(true, rel=0.0101), (k, q)


def test_failed_requests_count_against_a_run() -> None:
    """A run that fails one request in ten is worse in failures, attainment and throughput."""
    bad = queue(1)
    bad.status[::10] = "failed"
    bad.first_token_s[::10] = bad.last_token_s[::10] = np.nan
    found = verdicts(queue(1), bad)
    assert (found["failed"], found["attainment"], found["throughput_per_s"]) == ("worse", "worse", "worse")
    (failed,) = (d for d in compare(*pair(queue(1), bad)).differences if d.metric == "failed")
    assert (failed.base, failed.other) == pytest.approx((0.0, 0.1))


def test_the_command_says_better_worse_or_cannot_tell(tmp_path: Path, capsys: Any) -> None:
    """Verdicts as a table and as JSON; refusals name the run and the reason, --force overrides all but a run that goes on."""
    db = f"sqlite:///{tmp_path}/a.db"
    with open_store(db) as store:
        for rows, more in ((queue(1), {}), (queue(2, 1.3), {}), (queue(3), {"seed": 9}), (queue(4), {"ended": False})):
            begun = store.begin_run(run(0, counts={"ok": 3000}, fleet=Fleet(0, 0, 8), **more))
            store.add_observations(begun.id, rows)
            if begun.ended:
                store.end_run(begun)
    assert main(["compare", "1", "2", "--db", db, "--json"]) == 0
    held = json.loads(capsys.readouterr().out)
    assert (held["base"], held["best"], held["slo"]) == (1, 1, str(SLO))
    assert held["runs"][0]["fleet"] == {"prefill": 0, "decode": 0, "mixed": 8}
    (one,) = held["comparisons"]
    found = {d["metric"]: d["verdict"] for d in one["differences"]}
    assert found["ttft_p50_s"] == "worse"
    assert main(["compare", "1", "2", "--db", db]) == 0
    text = capsys.readouterr().out
    assert "TTFT p50 ms" in text
    assert text.count("0:0+8") == text.count("0:0") == 4
    assert "worse" in text
    assert main(["compare", "1", "3", "--db", db]) == 1
    assert "run 3 was made with another seed than run 1 (9, not 0)" in capsys.readouterr().err
    assert main(["compare", "1", "3", "--force", "--db", db]) == 0
    assert "note: run 3 was made with another seed" in capsys.readouterr().out
    assert main(["compare", "1", "4", "--force", "--db", db]) == 1


def test_runs_of_a_group_are_let_go_of(made_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred runs are compared in the memory of a few: the base, two that are read, and one whose answer is on its way."""
    held: list[weakref.ref[Binned]] = []
    most = 0
    reading = advisor.compare.read

    def noted(*given: Any) -> Binned:
        nonlocal most
        made = reading(*given)
        held.append(weakref.ref(made))
        most = max(most, sum(one() is not None for one in held))
        return made

    monkeypatch.setattr(advisor.compare, "read", noted)
    with open_store(made_url) as store:
        runs = []
        for k in range(12):
            runs.append(store.begin_run(run(0, scheduled=300)))
            store.add_observations(runs[k].id, queue(k, n=300))
        said, compared = against_first(store, runs, SLO)
        wanted = [compare(reading(store, runs[0], SLO), reading(store, other, SLO)) for other in runs[1:]]
    assert repr(compared) == repr(wanted)
    assert [one.n for one in said] == [300] * 12
    assert len(held) == 12
    assert most <= 4
