"""What a replay has found so far, for those who watch it: the last ten seconds of its rows, the servers' last readings."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence

import numpy as np

from traces.measures import Slo, met, quantile
from traces.records import Observations, Sample

WINDOW_S = 10.0


class Live:
    """Fed by the replay's threads, read by any other. Every value is a text, made when it is asked for."""

    def __init__(self, scheduled: int, slo: Slo | None) -> None:
        self.scheduled, self._slo = scheduled, slo
        self._lock = threading.Lock()
        self._parts: deque[tuple[float, Observations]] = deque()
        self._samples: dict[str, Sample] = {}
        self._rows = 0

    def rows(self, rows: Observations) -> None:
        """Finished requests, as they arrive."""
        now = time.monotonic()
        with self._lock:
            self._rows += len(rows)
            self._parts.append((now, rows))
            while self._parts and now - self._parts[0][0] > WINDOW_S:
                self._parts.popleft()

    def samples(self, readings: Sequence[Sample]) -> None:
        """Readings of the servers."""
        with self._lock:
            self._samples |= {s.worker: s for s in readings}

    def table(self) -> list[dict[str, str]]:
        """Rows of {"name", "value"}: progress, TTFT, TPOT, goodput, failures, lag, then a row a server."""
        with self._lock:
            parts, done, readings = [p for _, p in self._parts], self._rows, list(self._samples.values())
            span = max(1.0, min(WINDOW_S, time.monotonic() - self._parts[0][0])) if self._parts else 1.0
        rows = Observations.concat(parts)
        ok = rows.take(rows.ok)
        held = [{"name": "Requests ended", "value": f"{done} of {self.scheduled}"}]

        def spread(name: str, values: object) -> None:
            p50, p99 = (quantile(np.asarray(values), q) * 1e3 for q in (0.5, 0.99))
            held.append({"name": name, "value": f"p50 {p50:.1f}  p99 {p99:.1f} ms" if p50 == p50 else "none yet"})

        spread(f"TTFT, last {WINDOW_S:g} s", ok.ttft_s)
        spread(f"TPOT, last {WINDOW_S:g} s", ok.tpot_s)
        good = met(ok, self._slo or Slo())
        held.append({"name": f"Goodput within {self._slo or 'no limit'}", "value": f"{int(good.sum()) / span:.2f}/s"})
        held.append({"name": "Not ok", "value": str(len(rows) - len(ok))})
        spread("Send lag of the generator", rows.lag_s[np.isfinite(rows.lag_s)])
        for s in sorted(readings, key=lambda s: (s.role, s.worker)):
            queue = "?" if s.waiting_requests is None else f"{s.waiting_requests:g}"
            running = "?" if s.running_requests is None else f"{s.running_requests:g}"
            held.append({"name": f"{s.role} {s.worker}", "value": f"{queue} waiting, {running} running"})
        return held
