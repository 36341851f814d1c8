"""What a replay has found so far, for those who watch it: the last ten seconds of its rows, the servers' last readings."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from traces.measures import Slo, met, quantile
from traces.records import Feed, Floats, Observations, Run, Sample, Schedule

WINDOW_S = 10.0

FRESH_S = 0.5
"""How long figures are shown before they are made anew: many may watch, the master has other work."""

EDGES_S = (
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0,
    20.0, 30.0, 60.0, 120.0, 300.0, 600.0,
)  # fmt: skip
"""Upper bounds of the histograms' buckets, in seconds."""


class Histogram:
    """Counts of values at or below each of EDGES_S, and their sum; not a number counts nowhere."""

    def __init__(self) -> None:
        self.counts = np.zeros(len(EDGES_S) + 1, dtype=np.int64)
        self.sum_s = 0.0

    def add(self, values: Floats) -> None:
        """More values, in seconds. What is below 0 counts in the first bucket."""
        values = values[np.isfinite(values)]
        self.counts += np.bincount(np.searchsorted(EDGES_S, values), minlength=len(EDGES_S) + 1)
        self.sum_s += float(values.sum())

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, values at or below it), as Prometheus wants them."""
        bounds = [*(f"{edge:g}" for edge in EDGES_S), "+Inf"]
        return list(zip(bounds, np.cumsum(self.counts).astype(float).tolist(), strict=True))


@dataclass
class Totals:
    """Since the run began. ended: requests by (status, error). good: those that met the SLO, or were ok without one."""

    ended: dict[tuple[str, str], int] = field(default_factory=dict)
    good: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    ttft: Histogram = field(default_factory=Histogram)
    tpot: Histogram = field(default_factory=Histogram)
    e2e: Histogram = field(default_factory=Histogram)
    lag: Histogram = field(default_factory=Histogram)


@dataclass(frozen=True, slots=True)
class Figures:
    """Since the run began: done, pending and not_ok, requests. Of the last WINDOW_S: rates per second, times in ms (p50, p99),
    NaN where there is none yet. pending: requests that were due and have not ended: in flight, or late, or held back by the
    client's own order or by a conversation's turn."""

    done: int
    pending: int
    not_ok: int
    ended_per_s: float
    good_per_s: float
    ttft_ms: tuple[float, float]
    tpot_ms: tuple[float, float]
    lag_ms: tuple[float, float]


class Live:
    """Fed by the replay's threads, read by any other. Every figure is made when it is asked for."""

    def __init__(self, run: Run, schedule: Schedule | Feed, slo: Slo | None) -> None:
        self.run, self.scheduled, self.totals = run, len(schedule), Totals()
        self._schedule, self._slo = schedule, slo
        self._zero = math.nan
        self._lock = threading.Lock()
        self._parts: deque[tuple[float, Observations]] = deque()
        self._samples: dict[str, Sample] = {}
        self._rows = 0
        self._made: tuple[float, Figures] | None = None

    def begin(self, zero: float) -> None:
        """Schedule zero, on the monotonic clock."""
        self._zero = zero

    def rows(self, rows: Observations) -> None:
        """Finished requests, as they arrive."""
        now = time.monotonic()
        ok = rows.take(rows.ok)
        good = int(met(ok, self._slo or Slo()).sum())
        kinds: dict[tuple[str, str], int] = {}
        for key in zip(rows.status.tolist(), rows.error.tolist(), strict=True):
            kinds[key] = kinds.get(key, 0) + 1
        with self._lock:
            held = self.totals
            for key, n in kinds.items():
                held.ended[key] = held.ended.get(key, 0) + n
            held.good += good
            held.prompt_tokens += int(ok.prompt_lengths.sum())
            held.output_tokens += int(ok.tokens.sum())
            for histogram, values in (
                (held.ttft, ok.ttft_s), (held.tpot, ok.tpot_s), (held.e2e, ok.e2e_s), (held.lag, rows.lag_s)
            ):  # fmt: skip
                histogram.add(values)
            self._rows += len(rows)
            self._parts.append((now, rows))
            while self._parts and now - self._parts[0][0] > WINDOW_S:
                self._parts.popleft()

    def samples(self, readings: Sequence[Sample]) -> None:
        """Readings of the servers."""
        with self._lock:
            self._samples |= {s.worker: s for s in readings}

    @property
    def readings(self) -> list[Sample]:
        """The last reading of each server, by role and name."""
        with self._lock:
            return sorted(self._samples.values(), key=lambda s: (s.role, s.worker))

    def due(self) -> int:
        """Requests whose time has come."""
        at = time.monotonic() - self._zero
        if not at >= 0:
            return 0
        if isinstance(self._schedule, Schedule):
            return int(np.searchsorted(self._schedule.due_s, at, side="right"))
        share = at / self._schedule.span_s if self._schedule.span_s > 0 else 1.0
        return round(min(1.0, share) * self.scheduled)

    def left_s(self) -> float:
        """Seconds until the last request is due. NaN before the start, and after: the last answers take what they take."""
        left = self._zero + self._schedule.last_due_s - time.monotonic()
        return left if left > 0 else math.nan

    def figures(self) -> Figures:
        """What was found."""
        now = time.monotonic()
        with self._lock:
            if self._made is not None and now - self._made[0] < FRESH_S:
                return self._made[1]
            parts, done = [p for at, p in self._parts if now - at <= WINDOW_S], self._rows
            not_ok = sum(n for (status, _), n in self.totals.ended.items() if status != "ok")
        rows = Observations.concat(parts)
        ok = rows.take(rows.ok)
        span = max(1.0, min(WINDOW_S, now - self._zero if now > self._zero else 1.0))

        def spread(values: Floats) -> tuple[float, float]:
            return quantile(values, 0.5) * 1e3, quantile(values, 0.99) * 1e3

        made = Figures(
            done,
            max(0, self.due() - done),
            not_ok,
            len(rows) / span,
            int(met(ok, self._slo or Slo()).sum()) / span,
            spread(ok.ttft_s),
            spread(ok.tpot_s),
            spread(rows.lag_s[np.isfinite(rows.lag_s)]),
        )
        with self._lock:
            self._made = (now, made)
        return made

    def line(self) -> str:
        """The figures as one line: rate, pending, TTFT, failures, lag, the servers' queues."""
        f = self.figures()
        parts = [f"{f.ended_per_s:.1f}/s", f"{f.pending} pending"]
        for name, (p50, p99) in (("TTFT", f.ttft_ms), ("TPOT", f.tpot_ms)):
            if p50 == p50:
                parts.append(f"{name} p50 {p50:.0f} p99 {p99:.0f} ms")
        parts.append(f"{f.not_ok} not ok")
        if f.lag_ms[0] == f.lag_ms[0]:
            parts.append(f"lag p99 {f.lag_ms[1]:.1f} ms")
        waiting: dict[str, float] = {}
        for s in self.readings:
            if s.waiting_requests is not None:
                waiting[s.role] = waiting.get(s.role, 0.0) + s.waiting_requests
        if waiting:
            parts.append("queued " + ", ".join(f"{n:g} {role}" for role, n in sorted(waiting.items(), reverse=True)))
        return ", ".join(parts)

    def table(self) -> list[dict[str, str]]:
        """Rows of {"name", "value"}: progress, failures, TTFT, TPOT, goodput, lag, then a row a server."""
        f = self.figures()
        held = [{"name": "Requests ended", "value": f"{f.done} of {self.scheduled}, {f.pending} due and pending"}]

        def spread(name: str, values: tuple[float, float]) -> None:
            p50, p99 = values
            held.append({"name": name, "value": f"p50 {p50:.1f}  p99 {p99:.1f} ms" if p50 == p50 else "none yet"})

        last = f", last {WINDOW_S:g} s"
        held.append({"name": "Requests not ok", "value": str(f.not_ok)})
        spread(f"TTFT{last}", f.ttft_ms)
        spread(f"TPOT{last}", f.tpot_ms)
        held.append({"name": f"Goodput within {self._slo or 'no limit'}{last}", "value": f"{f.good_per_s:.2f}/s"})
        spread(f"Send lag of the generator{last}", f.lag_ms)
        for s in self.readings:
            queue = "?" if s.waiting_requests is None else f"{s.waiting_requests:g}"
            running = "?" if s.running_requests is None else f"{s.running_requests:g}"
            held.append({"name": f"{s.role} {s.worker}", "value": f"{queue} waiting, {running} running"})
        return held
