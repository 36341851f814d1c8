"""One definition of each measure: SLO, goodput, quantiles, verdict. Pure functions of observations.

A simulated run and a measured run are judged by the same code: both are :class:`traces.records.Observations`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import numpy as np

from traces.errors import InputError
from traces.records import STAGES, Floats, Histogram, Ints, Observations, Schedule

LAG_LIMIT_S = 0.5
"""TTFT limit assumed for the verdict when no SLO names one: 5 % of it is the house's 25 ms."""

_METRICS = ("ttft", "tpot", "e2e")
_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "m": 60.0}
_NUMBER = r"(?:\d+(?:\.\d+)?|\.\d+)(?:e[+-]?\d+)?"
_TERM = re.compile(rf"(ttft|tpot|e2e)(?:_p(\d{{1,2}}(?:\.\d+)?))?\s*<=?\s*({_NUMBER})\s*(us|ms|s|m)?")


@dataclass(frozen=True, slots=True)
class Slo:
    """Limits per request (they define goodput) and constraints on quantiles (a fleet must meet them), in seconds.

    limits: {"ttft": 0.5}. constraints: {("ttft", 99.0): 1.0}.
    """

    limits: tuple[tuple[str, float], ...] = ()
    constraints: tuple[tuple[str, float, float], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``ttft<0.5s tpot<50ms ttft_p99<1s``; terms are separated by spaces or commas, the default unit is s."""
        limits: dict[str, float] = {}
        constraints: dict[tuple[str, float], float] = {}
        for term in re.split(r"[\s,]+(?=[a-z])", text.strip().lower()):
            match = _TERM.fullmatch(term.strip())
            if not match:
                raise InputError(
                    f"SLO term {term!r} cannot be read. Write metric<limit with metric ttft, tpot or e2e, "
                    'for example --slo "ttft<0.5s tpot<50ms" or ttft_p99<1s.'
                )
            limit = float(match[3]) * _UNITS[match[4] or "s"]
            if not 0 < limit < math.inf:
                raise InputError(f"SLO term {term!r}: the limit must be above 0 and finite.")
            if match[2] is None:
                limits[match[1]] = limit
            else:
                q = float(match[2])
                if q >= 100:  # so many nines are 100 to a float
                    raise InputError(f"SLO term {term!r}: the quantile must be below 100.")
                constraints[match[1], q] = limit
        return cls(tuple(limits.items()), tuple((m, q, v) for (m, q), v in constraints.items()))

    def limit(self, metric: str) -> float | None:
        """Seconds allowed per request for ``ttft``, ``tpot`` or ``e2e``; None if the SLO does not speak of it."""
        return dict(self.limits).get(metric)

    @property
    def as_limits(self) -> Slo:
        """The SLO as limits per request: a constraint on a quantile becomes a limit where there is none of its metric."""
        known = dict(self.limits)
        for metric, _, value in self.constraints:
            known.setdefault(metric, value)
        return Slo(tuple(known.items()))

    def faster(self, factor: float) -> Slo:
        """The same SLO on a clock on which everything takes ``factor`` times less."""
        return Slo(
            tuple((m, v / factor) for m, v in self.limits), tuple((m, q, v / factor) for m, q, v in self.constraints)
        )

    def __str__(self) -> str:
        def time(v: float) -> str:
            return f"{v * 1e3:g}ms" if v < 0.1 else f"{v:g}s"

        terms = [f"{m}<{time(v)}" for m, v in self.limits]
        # In full and without an exponent: p99.99999 is not p100, and what is written must be read again.
        terms += [f"{m}_p{np.format_float_positional(q, trim='-')}<{time(v)}" for m, q, v in self.constraints]
        return " ".join(terms)


def met(observations: Observations, slo: Slo) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Bool[n]: the request succeeded and kept every per-request limit. A one-token answer has no TPOT to miss."""
    good = observations.ok.copy()
    for metric, limit in slo.limits:
        value: Floats = getattr(observations, f"{metric}_s")
        keeps = value <= limit
        if metric == "tpot":
            keeps |= observations.tokens <= 1
        good &= keeps
    return good


def span_s(observations: Observations) -> float:
    """Seconds from the first due time to the last token (or the last due time, if that is later). What was never sent is left
    out: a run that was stopped ended before it was due."""
    due = observations.due_s[observations.status != "unsent"]
    if not len(due):
        return 0.0
    last = observations.last_token_s[np.isfinite(observations.last_token_s)]
    end = max(float(due.max()), float(last.max()) if len(last) else -math.inf)
    return end - float(due.min())


def goodput_per_s(observations: Observations, slo: Slo) -> float:
    """Requests per second that meet all limits, over :func:`span_s`."""
    span = span_s(observations)
    return float(met(observations, slo).sum()) / span if span > 0 else float("nan")


def quantile(values: Floats, q: float) -> float:
    """The q-quantile (0..1) of the finite values; NaN when there are none."""
    finite = values[np.isfinite(values)]
    return float(np.quantile(finite, q)) if len(finite) else float("nan")


def quantiles(values: Floats, at: Sequence[float]) -> Floats:
    """What np.quantile says of finite values, to the last bit, at a tenth of its cost."""
    return between(np.sort(values), places(len(values), tuple(at)))


def between(ordered: Floats, where: Places) -> Floats:
    """Ordered values interpolated at :func:`places`."""
    below, above, share, late = where
    low, high = ordered[below], ordered[above]
    apart = high - low
    return np.asarray(np.where(late, high - apart * (1 - share), low + apart * share), dtype=np.float64)


Places = tuple[Ints, Ints, Floats, np.ndarray[tuple[int], np.dtype[np.bool_]]]


@lru_cache(maxsize=512)
def places(n: int, at: tuple[float, ...]) -> Places:
    """Of n ordered values: positions below and above each quantile, how far it lies between them, and whether beyond half."""
    where = np.asarray(at) * (n - 1)
    below = np.floor(where).astype(np.int64)
    share = where - below
    return below, np.minimum(below + 1, n - 1), share, share >= 0.5


@dataclass(frozen=True, slots=True)
class Verdict:
    """valid, degraded or invalid, and why; judged from the generator alone."""

    word: str
    reason: str
    lag_p50_ms: float
    lag_p99_ms: float
    lag_max_ms: float


def ttft_limit_s(slo: Slo | None) -> float:
    """What lateness is measured by: the SLO's TTFT limit in seconds, LAG_LIMIT_S where it names none."""
    return (slo.limit("ttft") if slo else None) or LAG_LIMIT_S


def verdict(observations: Observations, slo: Slo | None = None) -> Verdict:
    """Was the generator the bottleneck?

    Send lag p99 over 5 % of the TTFT limit degrades, over 10 % invalidates, as does an unsent request.
    """
    return lateness(observations.lag_s, int((observations.status == "unsent").sum()), slo)


def lateness(lag: Floats, unsent: int, slo: Slo | None = None) -> Verdict:
    """The verdict from send lags in seconds (NaN where nothing was sent) and the number of requests never sent."""
    limit = ttft_limit_s(slo)
    p50, p99 = quantile(lag, 0.5), quantile(lag, 0.99)
    worst = quantile(lag, 1.0)
    words = f"send lag p99 {p99 * 1e3:.1f} ms "
    if slo is not None and slo.limit("ttft"):
        words += f"of {limit * 1e3:g} ms TTFT limit"
    else:
        words += f"(no TTFT limit was given: {limit * 1e3:g} ms is assumed)"
    if unsent:
        word, words = "invalid", f"{unsent} requests were never sent"
    elif not math.isfinite(p99):
        word, words = "invalid", "nothing was sent"
    else:
        word = late_word(p99, slo)
    return Verdict(word, words, p50 * 1e3, p99 * 1e3, worst * 1e3)


def late_word(p99_s: float, slo: Slo | None = None, *, degrades_s: float = math.inf) -> str:
    """``valid``, ``degraded`` or ``invalid`` for something that was this late at p99: over 5 % of the TTFT limit, or over
    ``degrades_s`` where that is less, and over 10 % of the limit."""
    limit = ttft_limit_s(slo)
    if p99_s > 0.10 * limit:
        return "invalid"
    return "degraded" if p99_s > min(0.05 * limit, degrades_s) else "valid"


def counts(rows: Observations) -> dict[str, int]:
    """How many requests ended in each status, and ``failed.<kind>`` for the kinds of failure."""
    found = Counter(rows.status.tolist())
    kinds = Counter(e for s, e in zip(rows.status.tolist(), rows.error.tolist(), strict=True) if s == "failed")
    return dict(sorted(found.items())) | {f"failed.{kind}": n for kind, n in sorted(kinds.items())}


@dataclass(frozen=True, slots=True)
class Lag:
    """How late requests left, in a stretch of time or from one worker; milliseconds, NaN where nothing was sent."""

    requests: int
    p50_ms: float
    p99_ms: float
    max_ms: float

    @classmethod
    def of(cls, rows: Observations) -> Lag:
        """Of some rows."""
        lag = rows.lag_s
        lag = lag[np.isfinite(lag)]
        return cls(len(lag), *(quantile(lag, q) * 1e3 for q in (0.5, 0.99, 1.0)))


def lag_by_worker(rows: Observations) -> dict[int, Lag]:
    """Load worker -> how late its requests left."""
    return {int(w): Lag.of(rows.take(rows.worker == w)) for w in np.unique(rows.worker) if w >= 0}


def lag_over_time(rows: Observations, stretches: int = 12) -> list[tuple[float, float, Lag]]:
    """(from_s, to_s, how late requests due in between left), in equal stretches of the run."""
    if not len(rows):
        return []
    edges = np.linspace(float(rows.due_s.min()), float(rows.due_s.max()), stretches + 1)
    place = np.clip(np.searchsorted(edges, rows.due_s, side="right") - 1, 0, stretches - 1)
    return [(float(edges[k]), float(edges[k + 1]), Lag.of(rows.take(place == k))) for k in range(stretches)]


class Tally:
    """What a run's end needs of its rows, nine bytes a row: how they ended, how late they left, which were heard of."""

    def __init__(self, warmup_s: float) -> None:
        self.counts: Counter[str] = Counter()
        self.rows = 0
        self._warmup_s = warmup_s
        self._lags: list[Floats] = []
        self._heard = np.zeros(1024, dtype=np.bool_)  # by index

    def add(self, rows: Observations) -> None:
        """Count rows; each comes once."""
        if not len(rows):
            return
        self.counts.update(counts(rows))
        self.rows += len(rows)
        self._lags.append(rows.lag_s[rows.due_s >= self._warmup_s])
        most = int(rows.index.max())
        if most >= len(self._heard):
            self._heard = np.concatenate([self._heard, np.zeros(max(most, 2 * len(self._heard)), dtype=np.bool_)])
        self._heard[rows.index] = True

    def unread(self, requests: int) -> None:
        """So many more were never sent, and have no rows: a feed was stopped before they were read from it."""
        if requests:
            self.counts["unsent"] += requests

    def silent(self, schedule: Schedule) -> Ints:
        """Positions in a schedule of which no row came."""
        known = schedule.index < len(self._heard)
        return np.flatnonzero(~(known & self._heard[np.where(known, schedule.index, 0)]))

    def verdict(self, slo: Slo | None) -> Verdict:
        """Lag counts from the end of the warm-up; what was never sent is not excused by it."""
        lag = np.concatenate(self._lags) if self._lags else np.empty(0)
        return lateness(lag, self.counts["unsent"], slo)


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures of one run, measured or simulated. Times in seconds, rates per second, over all ok requests.

    ttft, tpot, e2e count from due; the ``*_sent`` twins from the moment the request left.
    """

    n: int
    ok: int
    goodput_per_s: float
    attainment: float
    throughput_per_s: float
    output_tokens_per_s: float
    span_s: float
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    tpot_p50_s: float
    tpot_p90_s: float
    tpot_p99_s: float
    e2e_p50_s: float
    e2e_p90_s: float
    e2e_p99_s: float
    e2e_mean_s: float
    ttft_sent_p50_s: float
    ttft_sent_p99_s: float
    e2e_sent_p50_s: float
    e2e_sent_p99_s: float


_QUANTILES = (0.5, 0.9, 0.99)


def summarise(observations: Observations, slo: Slo) -> Summary:
    """All measures of one run. NaN where nothing finished."""
    finished = observations.ok
    ok = observations if finished.all() else observations.take(np.flatnonzero(finished))
    span = span_s(observations)
    good = int(met(observations, slo).sum())

    q: dict[tuple[str, float], float] = {}
    for name in ("ttft_s", "tpot_s", "e2e_s", "ttft_sent_s", "e2e_sent_s"):
        values: Floats = getattr(ok, name)
        values = values[np.isfinite(values)]
        found = quantiles(values, _QUANTILES).tolist() if len(values) else [math.nan] * len(_QUANTILES)
        q.update({(name, p): v for p, v in zip(_QUANTILES, found, strict=True)})

    return Summary(
        n=len(observations),
        ok=len(ok),
        goodput_per_s=good / span if span > 0 else float("nan"),
        attainment=good / len(observations) if len(observations) else float("nan"),
        throughput_per_s=len(ok) / span if span > 0 else float("nan"),
        output_tokens_per_s=float(ok.tokens.sum()) / span if span > 0 else float("nan"),
        span_s=span,
        ttft_p50_s=q["ttft_s", 0.5],
        ttft_p90_s=q["ttft_s", 0.9],
        ttft_p99_s=q["ttft_s", 0.99],
        tpot_p50_s=q["tpot_s", 0.5],
        tpot_p90_s=q["tpot_s", 0.9],
        tpot_p99_s=q["tpot_s", 0.99],
        e2e_p50_s=q["e2e_s", 0.5],
        e2e_p90_s=q["e2e_s", 0.9],
        e2e_p99_s=q["e2e_s", 0.99],
        e2e_mean_s=float(ok.e2e_s.mean()) if len(ok) else float("nan"),
        ttft_sent_p50_s=q["ttft_sent_s", 0.5],
        ttft_sent_p99_s=q["ttft_sent_s", 0.99],
        e2e_sent_p50_s=q["e2e_sent_s", 0.5],
        e2e_sent_p99_s=q["e2e_sent_s", 0.99],
    )


QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


@dataclass(frozen=True, slots=True)
class Figures:
    """What is said of a run: rates per second, quantiles over ok requests in seconds (``quantiles["ttft_s"]["p99"]``).

    exact: from the values themselves; otherwise from bins 1 % wide (:mod:`traces.aggregate`).
    """

    n: int
    ok: int
    goodput_per_s: float
    throughput_per_s: float
    output_tokens_per_s: float
    attainment: float
    span_s: float
    exact: bool
    quantiles: dict[str, dict[str, float]]

    @classmethod
    def of(cls, rows: Observations, slo: Slo) -> Self:
        """Of rows that are counted."""
        s = summarise(rows, slo)
        ok = rows.take(np.flatnonzero(rows.ok))
        names = ("ttft_s", "tpot_s", "e2e_s", "ttft_sent_s", "e2e_sent_s")
        spread = {name: {w: quantile(getattr(ok, name), q) for w, q in QUANTILES.items()} for name in names}
        rates = (s.goodput_per_s, s.throughput_per_s, s.output_tokens_per_s, s.attainment)
        return cls(s.n, s.ok, *rates, s.span_s, True, spread)


@dataclass(frozen=True, slots=True)
class Part:
    """One part of TTFT. mean_s: seconds. n: of how many it is the mean. source: "answers", or the servers' metric and role."""

    name: str
    mean_s: float
    n: int
    source: str


_BY_HISTOGRAM = {
    "queue_s": (("queue_s", "prefill"), ("queue_s", "mixed")),
    "prefill_s": (("prefill_s", "prefill"), ("prefill_s", "mixed")),
    # A decode engine's queue_s holds what waits for its KV as well: it is the whole way from one stage to the other.
    "transfer_s": (("queue_s", "decode"), ("transfer_s", "decode"), ("transfer_s", "prefill")),
    "first_step_s": (("prefill_s", "decode"),),
}
"""Part -> (histogram, role) that measure it, the best first. A decode engine calls its first step a prefill."""


def ttft_parts(observations: Observations, histograms: Sequence[Histogram]) -> list[Part]:
    """TTFT = queue + prefill + transfer + first step, means over ok requests, from sent; as far as somebody tells.

    A part is what the answers said, else the mean of the servers' histograms over the run. The last one, "rest", is what the
    parts before it leave of TTFT: the network, the router, and whatever nobody tells. Empty where no part is known.
    """
    ok = observations.take(observations.ok)

    def mean(name: str) -> tuple[float, int]:
        values: Floats = getattr(ok, name)
        values = values[np.isfinite(values)]
        return (float(values.mean()) if len(values) else math.nan), len(values)

    return parts_of(mean, histograms)


def parts_of(mean: Callable[[str], tuple[float, int]], histograms: Sequence[Histogram]) -> list[Part]:
    """:func:`ttft_parts` from means over ok requests: name of a column -> (mean in seconds, of how many)."""
    found: list[Part] = []
    for name in STAGES:
        told, n = mean(name)
        if n:
            found.append(Part(name, told, n, "answers"))
            continue
        for histogram, role in _BY_HISTOGRAM[name]:
            held = [h for h in histograms if (h.name, h.role) == (histogram, role) and h.count > 0]
            if held:
                count = sum(h.count for h in held)
                source = f"{held[0].source} of {role}"
                found.append(Part(name, sum(h.total for h in held) / count, int(count), source))
                break
    ttft, n = mean("ttft_sent_s")
    if found and n:
        rest = ttft - sum(p.mean_s for p in found)
        found.append(Part("rest", rest, n, f"TTFT {ttft * 1e3:.1f} ms less the parts"))
    return found


def meets(summary: Summary, observations: Observations, slo: Slo, attainment: float) -> bool:
    """Does this run meet the SLO: its quantile constraints, or, where it has none, ``attainment`` of the requests?"""
    if not slo.constraints:
        return summary.attainment >= attainment
    return summary.ok == summary.n and all(value <= v for value, v in _constrained(observations, slo))


def _constrained(observations: Observations, slo: Slo) -> list[tuple[float, float]]:
    """(the quantile, the most it may be), of each constraint."""
    return [(quantile(getattr(observations, f"{m}_s"), q / 100), v) for m, q, v in slo.constraints]


def kept(observations: Observations, slo: Slo) -> float:
    """How nearly the constraints on quantiles are met: the least limit / quantile, at most 1; 1 where there is none.

    0 where a quantile is not known.
    """
    shares = [v / max(value, v) if math.isfinite(value) else 0.0 for value, v in _constrained(observations, slo)]
    return min(shares, default=1.0)


def worth_per_s(observations: Observations, slo: Slo) -> float:
    """Goodput by which fleets are compared: less by as much as a constraint is missed (1 s where 0.5 s may be counts half)."""
    return goodput_per_s(observations, slo) * kept(observations, slo)
