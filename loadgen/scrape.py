"""Prometheus text -> :class:`traces.records.Sample`, and a thread that reads a server's metrics during a run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from loadgen.control import Endpoint
from loadgen.engines import Dialect
from traces.errors import EndpointError
from traces.records import ROLES, Sample

PERIOD_S = 0.5

_SUMMED = "_total"
"""Counters of several label sets (finish reasons) add up; gauges of one worker are taken once."""


def samples(text: str, dialect: Dialect, at_s: float, roles: Mapping[str, str] | None = None) -> list[Sample]:
    """One Sample for each worker that the text speaks of, by name.

    Names of ``dialect.metrics`` only; what is absent stays None. roles: worker -> role, where labels do not say it.
    ValueError when the text is no Prometheus exposition.
    """
    from prometheus_client.parser import text_string_to_metric_families

    names = dialect.metrics or {}
    found: dict[tuple[str, str], dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        for line in family.samples:
            field = names.get(line.name)
            if field is None or line.value != line.value:
                continue
            worker = line.labels.get(dialect.worker_label) or "server"
            role = line.labels.get(dialect.role_label) or (roles or {}).get(worker, "mixed")
            values = found.setdefault((worker, role if role in ROLES else "mixed"), {})
            if field.endswith(_SUMMED) and field in values:
                values[field] += line.value
            else:
                values[field] = line.value
    return [Sample(at_s, worker, role, **values) for (worker, role), values in sorted(found.items())]


class Scraper:
    """Reads ``/metrics`` every ``period_s`` in a thread of its own, off the request path; a context manager.

    on_samples gets each reading; ``at_s`` counts from ``zero`` (monotonic clock). failures: readings that did not
    come; a server without metrics costs nothing but this count.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        dialect: Dialect,
        zero: float,
        on_samples: Callable[[Sequence[Sample]], None],
        period_s: float = PERIOD_S,
    ) -> None:
        self.failures = 0
        self.readings = 0
        self._endpoint, self._dialect, self._zero = endpoint, dialect, zero
        self._on_samples, self._period_s = on_samples, period_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._main, name="steelyard-scraper", daemon=True)

    def __enter__(self) -> Scraper:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join(10)

    def read(self) -> list[Sample]:
        """One reading, now. EndpointError when there is none."""
        answer = self._endpoint.fetch("GET", "/metrics", timeout_s=5.0)
        at_s = time.monotonic() - self._zero
        if answer.status != 200:
            raise EndpointError(f"{self._endpoint.shown}/metrics: HTTP {answer.status}")
        try:
            return samples(answer.text, self._dialect, at_s)
        except (ValueError, KeyError, IndexError):
            raise EndpointError(f"{self._endpoint.shown}/metrics: not Prometheus text") from None

    def _main(self) -> None:
        when = time.monotonic()
        while not self._stop.is_set():
            try:
                found = self.read()
                self.readings += 1
                if found:
                    self._on_samples(found)
            except EndpointError:
                self.failures += 1
                if self.failures >= 5 and not self.readings:
                    return  # this server has no metrics
            when = max(when + self._period_s, time.monotonic())
            self._stop.wait(max(0.0, when - time.monotonic()))
