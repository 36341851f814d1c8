"""A long run as counts: its requests by the time at which they were due and by latency, in bins 1 % wide.

A run of ten million requests is some ten megabytes of counts. What is asked of it (figures, a comparison, a report) is answered
from these and not from its rows. The store fills them while rows come in and keeps them with the run when it has ended; where it
has none it fills them from the rows, piece by piece. The formulas are those of :mod:`traces.measures` and
:mod:`traces.records`, on the same columns: a test holds what comes out against the rows.

A bin k holds values from 1.01^k to 1.01^(k+1) seconds; its middle stands for them, so a quantile is off by half a per cent at
most, beside the step from one value to the next. Slots of time begin at the end of the warm-up; there are at most SLOTS, and when
the run outgrows them two become one, so that their width depends on the run alone and not on the order in which rows came.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from typing import Any, Self

import numpy as np

from traces.measures import QUANTILES, Figures, Lag, Slo, Summary, met
from traces.measures import counts as ended
from traces.records import STAGES, STATUSES, Floats, Ints, Observations, Run

WIDTH = math.log(1.01)

LOWEST = math.floor(math.log(1e-7) / WIDTH)
"""The bin of everything at or below 0.1 microseconds, zero and negative values (of a client that was early) included."""

BINS = math.floor(math.log(1e5) / WIDTH) - LOWEST + 1
"""The last one holds everything beyond 28 hours."""

EDGES = np.exp((LOWEST + np.arange(BINS + 1)) * WIDTH)
MIDDLES = np.exp((LOWEST + np.arange(BINS) + 0.5) * WIDTH)
MIDDLES[0] = 0.0

SLOTS = 200
FINEST_S = 2.0**-10
"""Width of a slot before the first two became one."""

MEASURES = ("ttft_s", "tpot_s", "e2e_s", "ttft_sent_s", "e2e_sent_s", "lag_s")
"""What is counted by latency: the first five of finished requests, lag of all that were sent."""

COUNTS = ("requests", "ok", "good", "tokens", "prompt_tokens")
"""What is counted by time alone. tokens: of finished answers; prompt_tokens: of all requests."""

MEANS = (*STAGES, "ttft_sent_s", "e2e_s")
KINDS = 200
"""Kinds of failure that are told apart."""

OTHERS = 8
"""SLOs other than the run's own that are remembered."""

COLUMNS = (
    "index", "worker", "due_s", "dispatch_s", "sent_s", "first_token_s", "last_token_s", "requested_prompt_tokens",
    "requested_tokens", "prompt_tokens", "output_tokens", "status", "error", "detail", *STAGES,
)  # fmt: skip
"""What :meth:`Bins.add` reads of a row."""

EXACT_ROWS = 10_000
"""Up to here what is said of a run comes from its rows; beyond from counts, quantiles from bins 1 % wide: of so many requests
chance alone moves a p99 by three per cent."""

APPROXIMATE = (
    f"Of runs of more than {EXACT_ROWS:,} requests quantiles come from bins 1 % wide, half a per cent off at most."
)

Counts = np.ndarray[Any, np.dtype[np.uint32]]


class Bins:
    """The counts of a run. slo: what ``good`` is counted within. Rows due before warmup_s stand in no figure, but over time.

    latency: [measure, slot, bin]. largest: [measure, slot], -inf where there is nothing. counts: name -> [slot]. rows: how many
    are counted. means: name -> [sum, number] over finished requests. by_worker: load worker -> its lags' [bin]. failures, of all
    rows: kind -> [how many, when the first was due, what was seen then]. others: limits of another SLO -> what :meth:`within`
    takes.
    """

    def __init__(self, slo: str, warmup_s: float = 0.0) -> None:
        self.slo, self.warmup_s = slo, warmup_s
        self.rows = 0
        self.width_s = FINEST_S
        self.base, self.slots = 0, 1  # the first slot's number, negative within the warm-up; slots in use
        self.first_due_s, self.last_due_s = math.inf, -math.inf  # of all rows
        self.from_s, self.to_s = (
            math.inf,
            -math.inf,
        )  # of counted rows that were sent: first due, last due or last token
        self.latency: Counts = np.zeros((len(MEASURES), SLOTS, BINS), dtype=np.uint32)
        self.largest: Floats = np.full((len(MEASURES), SLOTS), -np.inf)
        self.counts: dict[str, Ints] = {name: np.zeros(SLOTS, dtype=np.int64) for name in COUNTS}
        self.means: dict[str, list[float]] = {name: [0.0, 0.0] for name in MEANS}
        self.by_worker: dict[int, Counts] = {}
        self.worker_largest: dict[int, float] = {}
        self.failures: dict[str, list[Any]] = {}
        self.others: dict[str, dict[int, int]] = {}
        self._heard = np.zeros(0, dtype=np.bool_)

    def add_once(self, rows: Observations) -> None:
        """Count rows, those whose index came before left out, as the database does."""
        most = int(rows.index.max(initial=-1))
        if most >= len(self._heard):
            more = np.zeros(max(most + 1 - len(self._heard), len(self._heard), 1024), dtype=np.bool_)
            self._heard = np.concatenate([self._heard, more])
        fresh = ~self._heard[rows.index]
        self._heard[rows.index] = True
        self.add(rows if fresh.all() else rows.take(fresh))

    def add(self, rows: Observations) -> None:
        """Count rows; each comes once."""
        if not len(rows):
            return
        due = np.where(np.isfinite(rows.due_s), rows.due_s, self.warmup_s)
        self._reach(float(due.min()), float(due.max()))
        slot = np.floor((due - self.warmup_s) / self.width_s).astype(np.int64) - self.base
        ok = rows.ok
        done = slot[ok]
        counted = due >= self.warmup_s
        self.rows += len(rows)
        for name, place, weights in (
            ("requests", slot, None),
            ("ok", done, None),
            ("good", slot[met(rows, Slo.parse(self.slo) if self.slo else Slo())], None),
            ("tokens", done, rows.tokens[ok]),
            ("prompt_tokens", slot, rows.prompt_lengths),
        ):
            self.counts[name] += np.bincount(place, weights=weights, minlength=SLOTS).astype(np.int64)
        values: dict[str, Floats] = {name: getattr(rows, name) for name in MEASURES}
        for m, name in enumerate(MEASURES):
            keep = np.isfinite(values[name])
            if name != "lag_s":
                keep &= ok
            self._count(m, slot[keep], values[name][keep])
        last = rows.last_token_s[counted & np.isfinite(rows.last_token_s)]
        self.first_due_s, self.last_due_s = min(self.first_due_s, due.min()), max(self.last_due_s, due.max())
        spanned = counted & (rows.status != "unsent")
        if spanned.any():
            self.from_s = min(self.from_s, float(due[spanned].min()))
            self.to_s = max(self.to_s, float(due[spanned].max()), float(last.max(initial=-np.inf)))
        for name in MEANS:
            held: Floats = getattr(rows, name)[ok & counted]
            held = held[np.isfinite(held)]
            self.means[name][0] += float(held.sum())
            self.means[name][1] += len(held)
        self._by_worker(rows.worker[counted], values["lag_s"][counted])
        self._failed(rows, due, np.flatnonzero(~ok))

    def _count(self, measure: int, slot: Ints, values: Floats) -> None:
        np.add.at(self.latency[measure].reshape(-1), slot * BINS + bins(values), np.uint32(1))
        np.maximum.at(self.largest[measure], slot, values)

    def _by_worker(self, worker: Ints, lag: Floats) -> None:
        sent = np.isfinite(lag)
        for one in np.unique(worker[sent & (worker >= 0)]).tolist():
            mine = lag[sent & (worker == one)]
            held = self.by_worker.setdefault(one, np.zeros(BINS, dtype=np.uint32))
            held += np.bincount(bins(mine), minlength=BINS).astype(np.uint32)
            self.worker_largest[one] = max(self.worker_largest.get(one, -math.inf), float(mine.max()))

    def _failed(self, rows: Observations, due: Floats, bad: Ints) -> None:
        for status, error, detail, at in zip(
            rows.status[bad], rows.error[bad], rows.detail[bad], due[bad].tolist(), strict=True
        ):
            kind = error or status
            if kind not in self.failures and len(self.failures) >= KINDS:
                kind = "other"
            n, first, seen = self.failures.get(kind, (0, math.inf, ""))
            if detail and (at < first or not seen):
                first, seen = at, detail
            self.failures[kind] = [n + 1, first, seen]

    # --- slots of time ---------------------------------------------------------------------------------------------

    def _reach(self, first_s: float, last_s: float) -> None:
        """Make room for rows due from first_s to last_s."""
        if not self.rows:
            self.base = math.floor((first_s - self.warmup_s) / self.width_s)
        doubled = 0
        while True:
            width = self.width_s * 2**doubled
            low, high = (math.floor((t - self.warmup_s) / width) for t in (first_s, last_s))
            low, high = min(low, self.base >> doubled), max(high, (self.base + self.slots - 1) >> doubled)
            if high - low < SLOTS:
                break
            doubled += 1
        if doubled:
            self._widen(doubled)
        if low < self.base:
            by = self.base - low
            # What leaves at the end and comes in at the beginning is empty.
            self.latency, self.largest = np.roll(self.latency, by, axis=1), np.roll(self.largest, by, axis=1)
            self.counts = {name: np.roll(held, by) for name, held in self.counts.items()}
            self.base = low
        self.slots = high - low + 1

    def _widen(self, times: int) -> None:
        """Two slots become one, that many times; how many are in use then, the caller knows."""
        old = self.base + np.arange(SLOTS)
        starts = np.unique(old >> times, return_index=True)[1]
        n = len(starts)
        for name, held in self.counts.items():
            merged = np.zeros_like(held)
            merged[:n] = np.add.reduceat(held, starts)
            self.counts[name] = merged
        latency, largest = np.zeros_like(self.latency), np.full_like(self.largest, -np.inf)
        np.add.reduceat(self.latency, starts, axis=1, out=latency[:, :n])
        largest[:, :n] = np.maximum.reduceat(self.largest, starts, axis=1)
        self.latency, self.largest = latency, largest
        self.base >>= times
        self.width_s *= 2**times

    @property
    def edges_s(self) -> Floats:
        """[slots + 1]: seconds from schedule zero; of the first and the last slot as far as there are requests."""
        edges = self.warmup_s + (self.base + np.arange(self.slots + 1)) * self.width_s
        edges[0], edges[-1] = max(edges[0], self.first_due_s), min(edges[-1], max(self.last_due_s, edges[-2]))
        return np.asarray(edges, dtype=np.float64)

    @property
    def counted(self) -> slice:
        """The slots after the warm-up."""
        return slice(min(max(0, -self.base), self.slots), self.slots)

    def over(self, measure: str) -> Counts:
        """[slots, BINS] of a measure."""
        return self.latency[MEASURES.index(measure), : self.slots]

    def of(self, measure: str) -> Counts:
        """[BINS] of a measure over the counted requests."""
        found: Counts = self.over(measure)[self.counted].sum(axis=0, dtype=np.uint32)
        return found

    def most(self, measure: str) -> Floats:
        """[slots]: the largest value in each, -inf where there is none."""
        return self.largest[MEASURES.index(measure), : self.slots]

    # --- what is said of the run -----------------------------------------------------------------------------------

    def total(self, name: str) -> int:
        """A count over the counted requests."""
        return int(self.counts[name][: self.slots][self.counted].sum())

    @property
    def span_s(self) -> float:
        """As :func:`traces.measures.span_s`."""
        return self.to_s - self.from_s if math.isfinite(self.from_s) else 0.0

    def quantile(self, measure: str, q: float) -> float:
        """The q-quantile (0..1) of a measure in seconds over the counted requests; NaN without any."""
        most = float(self.most(measure)[self.counted].max(initial=-np.inf))
        return float(quantile(self.of(measure)[None], q, np.array([most]))[0])

    def share(self, measure: str, limit_s: float) -> float:
        """Share of the counted requests that have a measure at or below limit_s; NaN without any."""
        counts = self.of(measure)
        place = int(bins(np.array([limit_s]))[0])
        inside = (math.log(limit_s) - math.log(EDGES[place])) / WIDTH if limit_s > EDGES[place] else 0.0
        below = float(counts[:place].sum()) + min(inside, 1.0) * float(counts[place])
        return below / float(counts.sum()) if counts.any() else math.nan

    def mean(self, name: str) -> tuple[float, int]:
        """(mean, of how many) of one of MEANS over the counted finished requests."""
        total, n = self.means[name]
        return (total / n if n else math.nan), int(n)

    def _rate(self, name: str) -> float:
        return self.total(name) / self.span_s if self.span_s > 0 else math.nan

    def figures(self) -> Figures:
        """As :meth:`Figures.of` the rows would say, quantiles from the bins."""
        n = self.total("requests")
        return Figures(
            n=n,
            ok=self.total("ok"),
            goodput_per_s=self._rate("good"),
            throughput_per_s=self._rate("ok"),
            output_tokens_per_s=self._rate("tokens"),
            attainment=self.total("good") / n if n else math.nan,
            span_s=self.span_s,
            exact=False,
            quantiles={m: {word: self.quantile(m, q) for word, q in QUANTILES.items()} for m in MEASURES[:5]},
        )

    def summary(self) -> Summary:
        """As :func:`traces.measures.summarise` of the counted rows would say."""
        f = self.figures()
        wanted = {
            f"{m.removesuffix('_s')}_{word}_s": f.quantiles[m][word]
            for m in MEASURES[:5]
            for word in (("p50", "p99") if "sent" in m else ("p50", "p90", "p99"))
        }
        rates = (f.goodput_per_s, f.attainment, f.throughput_per_s, f.output_tokens_per_s, f.span_s)
        return Summary(f.n, f.ok, *rates, **wanted, e2e_mean_s=self.mean("e2e_s")[0])

    def lag_by_worker(self) -> dict[int, Lag]:
        """As :func:`traces.measures.lag_by_worker` of the counted rows."""
        return {w: _lag(held, self.worker_largest[w]) for w, held in sorted(self.by_worker.items())}

    def lag_over_time(self, stretches: int = 12) -> list[tuple[float, float, Lag]]:
        """As :func:`traces.measures.lag_over_time`; stretches end where slots do."""
        edges, lags, most = self.edges_s, self.over("lag_s"), self.most("lag_s")
        parts = [part for part in np.array_split(np.arange(self.slots), stretches) if len(part)]
        return [
            (float(edges[p[0]]), float(edges[p[-1] + 1]), _lag(lags[p].sum(axis=0), float(most[p].max())))
            for p in parts
        ]

    def within(self, slo: str, good: Mapping[int, int]) -> Self:
        """The same with ``good`` counted within another SLO. good: number of a slot, from 0 at the warm-up's end -> requests.

        What lies in none of the slots came after the rest was counted, in a run that goes on.
        """
        other = copy(self)
        counted = np.zeros(SLOTS, dtype=np.int64)
        for number, n in good.items():
            if 0 <= number - self.base < self.slots:
                counted[number - self.base] += n
        other.slo, other.counts = slo, self.counts | {"good": counted}
        return other

    def keep_other(self, limits: str, good: Mapping[int, int]) -> dict[str, dict[int, int]]:
        """Know what :meth:`within` takes of another SLO as well; of more than OTHERS the one known for longest is dropped."""
        known = {other: held for other, held in self.others.items() if other != limits} | {limits: dict(good)}
        self.others = dict(list(known.items())[-OTHERS:])
        return self.others

    # --- kept ------------------------------------------------------------------------------------------------------

    def pack(self) -> tuple[dict[str, Any], bytes]:
        """(all but latency, as JSON; latency from the first bin to the last that holds anything, compressed)."""
        k = self.slots
        used = np.flatnonzero(self.latency[:, :k].any(axis=(0, 1)))
        first, end = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 0)
        held: dict[str, Any] = {name: getattr(self, name) for name in _PLAIN} | {"bins": [first, end]}
        held["counts"] = {name: array[:k].tolist() for name, array in self.counts.items()}
        held["largest"] = [[v if math.isfinite(v) else None for v in row] for row in self.largest[:, :k].tolist()]
        held["workers"] = [
            [w, self.worker_largest[w], np.flatnonzero(n).tolist(), n[n > 0].tolist()]
            for w, n in self.by_worker.items()
        ]
        held |= {"means": self.means, "failures": self.failures, "others": self.others}
        counted = self.latency[:, :k, first:end].copy()  # rows may come meanwhile
        kind = np.min_scalar_type(counted.max(initial=0)).newbyteorder("<")
        held["size"] = kind.itemsize
        return held, zlib.compress(counted.astype(kind).tobytes(), 1)

    @classmethod
    def unpack(cls, held: Mapping[str, Any], body: bytes) -> Self | None:
        """What :meth:`pack` made; None where that cannot be read (another version wrote it): it is counted again."""
        try:
            made = cls(str(held["slo"]), float(held["warmup_s"]))
            for name in _PLAIN[2:]:
                setattr(made, name, type(getattr(made, name))(held[name]))
            k = made.slots
            first, end = (int(at) for at in held.get("bins", (0, BINS)))  # older ones hold all
            kind = np.dtype(f"<u{int(held.get('size', 4))}")  # of a count; older ones have four bytes each
            if not (1 <= k <= SLOTS and 0 <= first <= end <= BINS and 0 < made.width_s < math.inf):
                return None
            size = len(MEASURES) * k * (end - first) * kind.itemsize
            raw = zlib.decompressobj().decompress(body, size + 1)
            made.latency[:, :k, first:end] = np.frombuffer(raw, dtype=kind).reshape(len(MEASURES), k, end - first)
            for name, array in made.counts.items():
                array[:k] = held["counts"][name]
            made.largest[:, :k] = [[-math.inf if v is None else v for v in row] for row in held["largest"]]
            for worker, most, places, n in held["workers"]:
                made.by_worker[int(worker)] = np.zeros(BINS, dtype=np.uint32)
                made.by_worker[int(worker)][places] = n
                made.worker_largest[int(worker)] = float(most)
            made.means = {name: [float(v) for v in held["means"][name]] for name in MEANS}
            for limits, good in held.get("others", {}).items():
                made.others[str(limits)] = {int(slot): int(n) for slot, n in good.items()}
            made.failures = {str(kind): list(seen) for kind, seen in held["failures"].items()}
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, zlib.error):
            return None
        return made


_PLAIN = (
    "slo", "warmup_s", "rows", "width_s", "base", "slots", "first_due_s", "last_due_s", "from_s", "to_s",
)  # fmt: skip


def so_far(run: Run, held: Observations | Bins) -> Run:
    """A run that goes on or was broken off, with what its rows say: its own counts and lag are written when it ends."""
    if run.ended:
        return run
    if isinstance(held, Bins):
        p50, p99, most = (held.quantile("lag_s", q) * 1e3 for q in (0.5, 0.99, 1.0))
        found = {"ok": int(held.counts["ok"].sum())}  # as of rows, with the warm-up in it
        found |= {kind if kind in STATUSES else f"failed.{kind}": n for kind, (n, *_) in held.failures.items()}
    else:
        lag = Lag.of(run.counted(held))
        p50, p99, most, found = lag.p50_ms, lag.p99_ms, lag.max_ms, ended(held)
    return replace(run, counts=found, lag_p50_ms=p50, lag_p99_ms=p99, lag_max_ms=most)


def bins(values: Floats) -> Ints:
    """The bin (0..BINS-1) of each value in seconds."""
    with np.errstate(divide="ignore", invalid="ignore"):
        place = np.floor(np.log(np.maximum(values, 1e-9)) / WIDTH) - LOWEST
    return np.asarray(np.clip(place, 0, BINS - 1), dtype=np.int64)


def quantile(counts: Counts, q: float, largest: Floats) -> Floats:
    """[k]: the q-quantile (0..1) in seconds of each of k rows of counts [k, BINS]; largest: [k], exact. NaN without values."""
    upto = np.cumsum(counts, axis=1, dtype=np.int64)
    total = upto[:, -1]
    rank = np.floor(q * np.maximum(total - 1, 0)).astype(np.int64)
    k = np.minimum((upto <= rank[:, None]).sum(axis=1), BINS - 1)
    found = largest if q >= 1 else np.minimum(MIDDLES[k], largest)
    return np.asarray(np.where(total > 0, found, np.nan), dtype=np.float64)


def quantiles(counts: Counts, at: Floats, largest: float) -> Floats:
    """[len(at)]: quantiles in seconds of one row of counts [BINS]; NaN without values."""
    upto = np.cumsum(counts, dtype=np.int64)
    if not upto[-1]:
        return np.full(len(at), np.nan)
    k = np.searchsorted(upto, np.floor(at * (upto[-1] - 1)), side="right")
    return np.where(at >= 1, largest, np.minimum(MIDDLES[np.minimum(k, BINS - 1)], largest))


def _lag(counts: Counts, largest: float) -> Lag:
    n = int(counts.sum())
    p50, p99, most = quantiles(counts, np.array([0.5, 0.99, 1.0]), largest) * 1e3
    return Lag(n, float(p50), float(p99), float(most))
