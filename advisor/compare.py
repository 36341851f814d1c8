"""Is one run better than another? Differences with intervals, by a block bootstrap over time.

Requests of one run share a queue: one slow second makes a hundred slow requests, so they are no hundred witnesses. What is
resampled are therefore blocks of time, long enough that what happens in one says little about the next: their length is Politis
and White's (2004, corrected 2009) for the circular bootstrap, from the runs' own autocorrelation. Runs of one schedule are
resampled jointly, the same blocks in both, so that a burst in the traffic is not taken for a difference of the servers.

With few blocks a percentile interval is too narrow; it is widened by Student's t and sqrt(k / (k - 1)) for k blocks (Hesterberg
2015), and by what a simulation says is still missing (WIDER). What differs between repeats of the same run (a restart, a
neighbour on the machine) is in no interval made of one run each.

A run is held as counts by time and by latency, in bins 1 % wide, so a run of millions takes a few megabytes; of a run too long
to be read these are the counts that the store keeps (:mod:`traces.aggregate`), and its figures come from them, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy.special import ndtri, stdtrit
from threadpoolctl import threadpool_limits

from advisor.table import Table
from traces.aggregate import BINS, EDGES, MIDDLES, WIDTH, Bins
from traces.aggregate import bins as latency_bins
from traces.measures import Figures, Slo, met
from traces.records import CAUSAL, CLOSED_LOOP, SHARED, Floats, Ints, Observations, Run
from traces.store import Store

Counts = np.ndarray[tuple[int, int], np.dtype[np.float32]]

TIME_BINS = 200
"""Of a run whose rows are read; one of counts has the slots that they have, at most as many."""

_LOWEST_S = 1e-5

DRAWS = 400
LEVEL = 0.9
STRETCH, SHORTEST = 2, 0.1
"""Blocks are that many times Politis and White's, and no shorter than a tenth of the run: theirs are best for a variance, and
their 90 % intervals missed in 17 to 20 % of pairs of one queue at 70 % load."""

WIDER = 1.1
"""On every half-width, by simulation (benchmarks/compare_coverage.py, other pairs than it now draws): without it 90 % intervals
missed in 10 to 15 % of pairs at 70 and 90 % load, metric by metric. Longer blocks, a jackknife of 6 to 14 blocks and cosine
estimators of the spread missed as often or more: it is not the length of the blocks that is wrong."""

LONGEST = 0.33
"""Share of a run that a block is at most."""

LEAST_BLOCKS, LEAST_ROWS, LEAST_BEYOND = 4, 20, 5
"""Fewer independent blocks than this cannot say how much a run varies, nor can blocks of fewer requests; and with fewer answers
beyond it a quantile is those few answers' own."""

COLUMNS = (
    "index", "due_s", "sent_s", "first_token_s", "last_token_s", "requested_tokens", "output_tokens", "status",
)  # fmt: skip
"""What :func:`binned` uses of a row: reading is most of the work."""

LATENCIES, QUANTILES = ("ttft", "tpot", "e2e"), (0.5, 0.9, 0.99)


@dataclass(frozen=True, eq=False)
class Binned:
    """A run as counts. counts: name -> [k], in k bins of due time. latency: metric -> [k, BINS] of ok requests.

    series: [k, 4], mean log TTFT and E2E, share beyond its P99 TTFT and within the SLO, NaN where a bin is empty. figures: the
    run's own, exact where they come from its rows.
    """

    run: Run
    figures: Figures
    counts: dict[str, Floats]
    latency: dict[str, Counts]
    series: Floats

    @cached_property
    def used(self) -> dict[str, tuple[int, int]]:
        """Metric -> (first, last) of the bins of latency that hold anything."""
        held = {metric: np.flatnonzero(counted.any(axis=0)) for metric, counted in self.latency.items()}
        return {metric: (int(bins[0]), int(bins[-1])) if len(bins) else (0, 0) for metric, bins in held.items()}


@dataclass(frozen=True, slots=True)
class Difference:
    """One metric of a run against the base's. change: other / base - 1, or other - base where ``share`` (both are shares).

    low, high: its 90 % interval. verdict: better, worse or cannot tell. why: what hinders a verdict, or "".
    """

    metric: str
    base: float
    other: float
    change: float
    low: float
    high: float
    share: bool
    verdict: str
    why: str = ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """A run against the base. blocks: independent stretches of time behind the intervals, block_s: their length."""

    run: int
    base: int
    paired: bool
    blocks: float
    block_s: float
    differences: list[Difference]


def read(store: Store, run: Run, slo: Slo) -> Binned:
    """A stored run: from its rows, or, of a long one, from the counts that are kept of it."""
    held = store.bins(run, slo)
    return binned(run, store.observations(run.id, COLUMNS), slo) if held is None else counted(run, held)


def counted(run: Run, held: Bins) -> Binned:
    """A run of which only counts are at hand."""
    mine = held.counted
    counts = {
        name: held.counts[name][: held.slots][mine].astype(float) for name in ("requests", "good", "ok", "tokens")
    }
    latency = {metric: held.over(f"{metric}_s")[mine].astype(np.float32) for metric in LATENCIES}
    figures = held.figures()
    logs = np.log(np.maximum(MIDDLES, _LOWEST_S))
    with np.errstate(invalid="ignore", divide="ignore"):
        means = [latency[metric] @ logs / latency[metric].sum(axis=1) for metric in ("ttft", "e2e")]
        tail = latency["ttft"][:, figures.quantiles["ttft_s"]["p99"] < MIDDLES].sum(axis=1) / counts["requests"]
        series = np.column_stack([*means, tail, counts["good"] / counts["requests"]])
    return Binned(run, figures, counts, latency, series)


def binned(run: Run, rows: Observations, slo: Slo) -> Binned:
    """The counts of a run's rows, those of its warm-up left out."""
    rows = run.counted(rows)
    place = time_bins(rows)
    ok = rows.ok
    good = met(rows, slo)

    def total(weights: Floats) -> Floats:
        return np.asarray(np.bincount(place, weights=weights, minlength=TIME_BINS), dtype=np.float64)

    counts = {
        "requests": total(np.ones(len(rows))),
        "good": total(good.astype(float)),
        "ok": total(ok.astype(float)),
        "tokens": total(np.where(ok, rows.tokens, 0).astype(float)),
    }
    latency: dict[str, Counts] = {}
    figures = Figures.of(rows, slo)
    for metric in LATENCIES:
        values: Floats = getattr(rows, f"{metric}_s")
        keep = ok & np.isfinite(values)
        flat = np.bincount(place[keep] * BINS + latency_bins(values[keep]), minlength=TIME_BINS * BINS)
        latency[metric] = flat.reshape(TIME_BINS, BINS).astype(np.float32)
    with np.errstate(invalid="ignore", divide="ignore"):
        finished = counts["ok"]
        means = [
            total(np.where(ok, np.log(np.maximum(v, _LOWEST_S)), 0.0)) / finished for v in (rows.ttft_s, rows.e2e_s)
        ]
        tail = total((rows.ttft_s > figures.quantiles["ttft_s"]["p99"]).astype(float)) / counts["requests"]
        series = np.column_stack([*means, tail, counts["good"] / counts["requests"]])
    return Binned(run, figures, counts, latency, series)


def time_bins(rows: Observations) -> Ints:
    """The bin (0..TIME_BINS-1) of each row's due time."""
    if not len(rows):
        return np.empty(0, np.int64)
    start, end = float(rows.due_s.min()), float(rows.due_s.max())
    width = max(end - start, 1e-9) / TIME_BINS
    return np.minimum(((rows.due_s - start) / width).astype(np.int64), TIME_BINS - 1)


MANNERS = {SHARED: "shared the trace's prefixes", CAUSAL: "let turns wait for answers"}


def objection(run: Run, base: Run, *, slo_given: bool = False) -> str:
    """Why two runs cannot be compared, in words that follow "run N"; "" if they can."""
    if not run.ended:
        return "has not ended"
    if run.policy == CLOSED_LOOP:
        return "is means of a closed loop, of which no request is known"
    if not run.complete:
        return f"is incomplete ({run.reason})"
    if run.verdict == "invalid":
        return f"is invalid ({run.reason})"
    if run.trace != base.trace:
        return f"asked another trace than run {base.id} ({run.trace}, not {base.trace})"
    if run.seed != base.seed:
        return f"was made with another seed than run {base.id} ({run.seed}, not {base.seed})"
    if run.schedule_digest != base.schedule_digest:
        return f"asked another schedule than run {base.id} ({run.scheduled} requests at {run.rate_per_s:.3g}/s)"
    for word, did in MANNERS.items():
        if (word in run.manner) != (word in base.manner):
            return (
                f"{did}, which run {base.id} did not"
                if word in run.manner
                else f"did not as run {base.id}, which {did}"
            )
    if run.warmup_s != base.warmup_s:
        return f"has another warm-up than run {base.id} ({run.warmup_s:g} s, not {base.warmup_s:g} s)"
    if run.slo != base.slo and not slo_given:
        return f"has another SLO than run {base.id} ({run.slo or 'none'}, not {base.slo or 'none'}; give --slo)"
    return ""


def compare(base: Binned, other: Binned, *, seed: int = 0, draws: int = DRAWS) -> Comparison:
    """Every metric of ``other`` against ``base``. Runs of one schedule are resampled jointly."""
    paired = bool(base.run.schedule_digest) and base.run.schedule_digest == other.run.schedule_digest
    paired = paired and base.series.shape == other.series.shape and base.run.warmup_s == other.run.warmup_s
    paired = paired and base.run.manner == other.run.manner
    series = [other.series - base.series] if paired else [base.series, other.series]
    longest = max(block_length(column) / len(part) for part in series for column in part.T)
    block = min(LONGEST, max(SHORTEST, STRETCH * longest))
    rng = np.random.default_rng(seed)
    ours = _weights(rng, block, draws, len(base.series))
    theirs = ours if paired else _weights(rng, block, draws, len(other.series))
    n = min(one.figures.n for one in (base, other))
    blocks = min(1 / block, n / LEAST_ROWS, *(float((one.counts["requests"] > 0).sum()) for one in (base, other)))
    before = _figures(base, ours, 0.0 if paired else _ends(rng, base, draws))
    after = _figures(other, theirs, _ends(rng, other, draws, base if paired else None))
    before_whole, after_whole = (_figures(one, np.ones((1, len(one.series)), np.float32)) for one in (base, other))
    found = []
    for name in before:
        share = name in ("attainment", "failed")
        a, b = _exact(base, name), _exact(other, name)
        with np.errstate(invalid="ignore"):  # of a run without an answer
            drawn = _change(before[name], after[name], share) - _change(before_whole[name], after_whole[name], share)
        found.append(_difference(name, a, b, drawn, share, blocks, _hindrance(name, base, other, blocks)))
    return Comparison(other.run.id, base.run.id, paired, blocks, base.figures.span_s / max(blocks, 1.0), found)


def block_length(series: Floats) -> int:
    """Bins a block, by Politis and White for the circular bootstrap: 1 for independent bins, more where they hang together."""
    x = series[np.isfinite(series)]
    n = len(x)
    if n < 8 or float(np.ptp(x)) <= 1e-12:
        return 1
    most = math.ceil(min(3 * math.sqrt(n), n / 3))
    x = x - x.mean()
    lags = np.array([float(x[: n - k] @ x[k:]) / n for k in range(n // 2)])
    rho = np.abs(lags / lags[0])
    bound = 2 * math.sqrt(math.log10(n) / n)
    run_of = max(5, math.ceil(math.sqrt(math.log10(n))))
    quiet = (m for m in range(len(rho) - run_of) if (rho[m + 1 : m + 1 + run_of] < bound).all())
    m = max(1, next(quiet, len(rho) // 2))
    k = np.arange(1, min(2 * m, len(lags) - 1) + 1)
    flat_top = np.clip(2 * (1 - k / (2 * m)), 0, 1)
    spread = lags[0] + 2 * float((flat_top * lags[k]).sum())
    g = 2 * float((flat_top * k * lags[k]).sum())
    if spread <= 0:
        return 1
    # D of the circular bootstrap is 4/3 spread^2: b = (2 g^2 / D)^(1/3) n^(1/3).
    return int(np.clip(math.ceil((1.5 * g * g / (spread * spread)) ** (1 / 3) * n ** (1 / 3)), 1, most))


def _weights(rng: np.random.Generator, block: float, draws: int, k: int) -> Counts:
    """[draws, k]: how often each of k bins is in a draw of blocks around the clock; block: the share of them in one."""
    length = max(1, round(block * k))
    starts = rng.integers(0, k, (draws, math.ceil(k / length)))
    bins = (starts[:, :, None] + np.arange(length)).reshape(draws, -1)[:, :k] % k
    flat = (np.arange(draws)[:, None] * k + bins).ravel()
    return np.bincount(flat, minlength=draws * k).reshape(draws, k).astype(np.float32)


def _ends(rng: np.random.Generator, one: Binned, draws: int, base: Binned | None = None) -> Floats:
    """[draws]: seconds by which a run may well have ended later than it did; than a base of the same schedule, if there is one.

    What is left to do when the last request has come varies as the mean E2E does over time, about the line on which a queue
    that grows makes it longer. Of runs of one schedule how many tokens the last answers have is no chance: at one time TTFT
    varies, and the longest answer by TPOT. Else it is: of the last requests the answer that ends last does.
    """
    e2e = _mean(one.latency["e2e"]) - (_mean(base.latency["e2e"]) if base else 0.0)
    at = np.flatnonzero(np.isfinite(e2e))
    if len(at) < LEAST_BLOCKS:
        return np.zeros(draws)
    which = rng.integers(0, len(at), draws)
    found = _level(e2e)[at[which]]
    if base is None:
        away = _away(rng, one, "e2e", at[rng.integers(0, len(at), 10 * draws)])[0]
        gap_s = one.figures.span_s / one.figures.n
        last = np.arange(min(512, 1 + int(np.ptp(away) / gap_s)))
        left = (rng.choice(away, (draws, len(last))) - gap_s * last).max(axis=1)
        return np.asarray(found + left - left.mean(), dtype=np.float64)
    for run, sign in ((one, 1), (base, -1)):
        waited, _ = _away(rng, run, "ttft", at[which])
        slower, mean = _away(rng, run, "tpot", at[which])
        slower = np.divide(slower, mean, out=np.zeros(draws), where=mean > 0)
        found = found + sign * (waited + run.figures.quantiles["e2e_s"]["max"] * slower)
    return np.asarray(found, dtype=np.float64)


def _level(series: Floats) -> Floats:
    """[k]: what a straight line through them leaves of the finite values."""
    at = np.flatnonzero(np.isfinite(series))
    x, y = at - at.mean(), series[at] - series[at].mean()
    left = np.full(len(series), np.nan)
    left[at] = y - x * float(x @ y) / max(float(x @ x), 1e-12)
    return left


def _away(rng: np.random.Generator, one: Binned, metric: str, at: Ints) -> tuple[Floats, Floats]:
    """[len(at)] each: how far one request of every one of these bins of time is from their mean, and the mean; 0 without any."""
    first, last = one.used[metric]
    held, middles = one.latency[metric][at, first : last + 1], MIDDLES[first : last + 1]
    upto = np.cumsum(held, axis=1, dtype=np.float64)
    place = np.minimum((upto < rng.random((len(at), 1)) * upto[:, -1:]).sum(axis=1), last - first)
    mean = np.nan_to_num(_mean(held, middles))
    return np.where(mean > 0, middles[place] - mean, 0.0), mean


def _mean(held: Counts, middles: Floats = MIDDLES) -> Floats:
    """[k]: mean in seconds of each row of counts [k, bins]; NaN of nothing."""
    with np.errstate(invalid="ignore"):
        return np.asarray(held @ middles / held.sum(axis=1), dtype=np.float64)


def _figures(one: Binned, weights: Counts, ends_s: Floats | float = 0.0) -> dict[str, Floats]:
    """Metric -> [draws], of the run with its time bins weighted. ends_s: [draws], how much later it ends; rates are without the
    span that all draws share."""
    spans = np.maximum(1 + ends_s / max(one.figures.span_s, 1e-9), 1e-9)
    n = {name: weights @ column for name, column in one.counts.items()}
    found = {
        "goodput_per_s": n["good"] / spans,
        "throughput_per_s": n["ok"] / spans,
        "output_tokens_per_s": n["tokens"] / spans,
        "attainment": n["good"] / np.maximum(n["requests"], 1e-9),
        "failed": 1 - n["ok"] / np.maximum(n["requests"], 1e-9),
    }
    for metric in LATENCIES:
        first, last = one.used[metric]
        below = np.cumsum(weights @ one.latency[metric][:, first : last + 1], axis=1, dtype=np.float64)
        for q in QUANTILES:
            found[f"{metric}_p{q * 100:g}_s"] = _quantile(below, q, EDGES[first:])
    return found


def _quantile(below: Floats, q: float, edges: Floats) -> Floats:
    """[draws]: the q-quantile from cumulative counts of bins from edges on, log-linear inside a bin; NaN without any."""
    total = below[:, -1]
    wanted = q * total
    k = np.minimum((below < wanted[:, None]).sum(axis=1), below.shape[1] - 1)
    rows = np.arange(len(below))
    before = np.where(k > 0, below[rows, np.maximum(k - 1, 0)], 0.0)
    inside = (wanted - before) / np.maximum(below[rows, k] - before, 1e-9)
    value = edges[k] * np.exp(WIDTH * np.clip(inside, 0, 1))
    return np.where(total > 0, value, np.nan)


def _exact(one: Binned, name: str) -> float:
    said = one.figures
    if name == "failed":
        return 1 - said.ok / said.n if said.n else math.nan
    metric, _, word = name.removesuffix("_s").partition("_")
    held = said.quantiles.get(f"{metric}_s")
    return held[word] if held else float(getattr(said, name))


def _change(before: Floats, after: Floats, share: bool) -> Floats:
    """Differences of shares; of other figures the logarithm of their ratio."""
    if share:
        return np.asarray(after - before, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.log(after / before), dtype=np.float64)


LESS_IS_BETTER = (*LATENCIES, "failed")


def _hindrance(name: str, base: Binned, other: Binned, blocks: float) -> str:
    """Why nothing can be said of a metric, of runs with so many independent blocks; "" if something can."""
    if any((one.counts["requests"] > 0).sum() < LEAST_BLOCKS for one in (base, other)):
        return f"requests due at fewer than {LEAST_BLOCKS} times: how far repeats lie apart tells how much they vary"
    if blocks < LEAST_BLOCKS:
        few = math.floor(blocks * 10) / 10
        return f"{few} independent stretches of time, too few: replay for longer, and not beyond what both hold"
    metric, _, quantile = name.removesuffix("_s").partition("_p")
    if metric in LATENCIES:
        answers = int(min(one.latency[metric].sum() for one in (base, other)))
        if answers * (100 - int(quantile)) < 100 * LEAST_BEYOND:
            return f"{answers} answers, too few to tell a p{quantile}: replay for longer"
    return ""


def _difference(
    name: str, a: float, b: float, drawn: Floats, share: bool, blocks: float, hindrance: str = ""
) -> Difference:
    point = b - a if share else math.log(b / a) if a > 0 and b > 0 else math.nan
    drawn = drawn[np.isfinite(drawn)]
    nothing = Difference(name, a, b, b - a if share else math.nan, math.nan, math.nan, share, "cannot tell")
    if not (math.isfinite(point) and len(drawn) >= 20):
        return replace(nothing, why="one of them has no such figure, or none above 0")
    if hindrance:
        return replace(nothing, change=point if share else math.exp(point) - 1, why=hindrance)
    tail = (1 - LEVEL) / 2
    # Student's t over the normal; scipy.stats says the same, and takes a second to import.
    wider = WIDER * float(stdtrit(blocks - 1, 1 - tail) / ndtri(1 - tail)) * math.sqrt(blocks / (blocks - 1))
    low, high = (point + wider * float(np.quantile(drawn, p)) for p in (tail, 1 - tail))
    if name.split("_")[0] in LATENCIES:  # drawn from bins, and known no better than those
        low, high = min(low, point - WIDTH), max(high, point + WIDTH)
    # Equal to the last bit is no difference, and so is one that rounding makes.
    verdict = "cannot tell"
    if low > 1e-9 or high < -1e-9:
        verdict = "worse" if (low > 0) == (name.split("_")[0] in LESS_IS_BETTER) else "better"
    if not share:
        point, low, high = (math.expm1(v) for v in (point, low, high))
    return Difference(name, a, b, point, low, high, share, verdict)


def against_first(
    store: Store, runs: Sequence[Run], slo: Slo, *, seed: int = 0
) -> tuple[list[Figures], list[Comparison]]:
    """(the figures of each run, every other run against the first). Two are read at a time and let go of: groups are long."""
    # What the database counts, it counts beside us; threads of BLAS, which go on spinning for a while, would take its cores.
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(2) as pool:
        first = pool.submit(read, store, runs[0], slo)

        def against(run: Run) -> tuple[Figures, Comparison]:
            one = read(store, run, slo)
            return one.figures, compare(first.result(), one, seed=seed)

        found = list(pool.map(against, runs[1:]))
    return [first.result().figures, *(figures for figures, _ in found)], [one for _, one in found]


def doubts(run: Run) -> list[str]:
    """What makes a comparison with this run doubtful, though it can be made."""
    return [f"run {run.id} is degraded: {run.reason}"] if run.verdict == "degraded" else []


def as_table(one: Comparison) -> Table:
    """A comparison as a table of texts."""
    head = ["metric", f"run {one.base}", f"run {one.run}", "change", "between", "verdict"]
    return Table(head, [in_words(d) for d in one.differences], "Change against the first run, 90 % intervals.")


def in_words(d: Difference) -> list[str]:
    """Metric, base, other, change, interval and verdict as they are read."""
    name, unit = _unit(d.metric)
    points = " points" if d.share else " %"
    known = math.isfinite(d.low)
    return [
        name,
        _four(d.base * unit),
        _four(d.other * unit),
        f"{d.change * 100:+.3g}{points}" if math.isfinite(d.change) else "–",
        f"{d.low * 100:+.3g} and {d.high * 100:+.3g}" if known else "–",
        d.verdict + (f" ({d.why})" if d.why else ""),
    ]


def _four(value: float) -> str:
    """Four digits or more, never an exponent."""
    if not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 9999.5 else f"{value:.4g}"


def _unit(metric: str) -> tuple[str, float]:
    """(words, factor) in which a metric is shown."""
    if metric in ("attainment", "failed"):
        return {"attainment": "within SLO, %", "failed": "failed, %"}[metric], 100.0
    if metric.endswith("_per_s"):
        return metric.removesuffix("_per_s").replace("_", " ") + "/s", 1.0
    return metric.removesuffix("_s").replace("_", " ").upper().replace(" P", " p") + " ms", 1e3
