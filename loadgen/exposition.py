"""A running replay's own figures at ``/metrics``, for a Prometheus that also reads the servers'. Loopback, read only.

What is there: docs/grafana/steelyard.json shows all of it beside the servers' own metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from loadgen.live import Histogram, Live
from traces.errors import InputError

HISTOGRAMS = {
    "ttft": "From due to the first token.",
    "tpot": "Per output token after the first.",
    "e2e": "From due to the last token.",
    "lag": "How late the generator sent.",
}


class Watched(Collector):
    """Metric families of the run that goes on, or of the last one that did. Every series carries the run's number."""

    def __init__(self) -> None:
        self.live: Live | None = None

    def collect(self) -> Iterator[Any]:
        """Everything, read now."""
        live = self.live
        if live is None:
            return
        run = [str(live.run.id)]
        about = InfoMetricFamily("steelyard_run", "The run, and what it asks of whom.", labels=["run"])
        about.add_metric(
            run,
            {
                "name": live.run.name,
                "trace": live.run.trace,
                "endpoint": live.run.endpoint,
                "model": live.run.model,
                "policy": live.run.policy,
                "slo": live.run.slo,
                "version": live.run.version,
            },
        )
        yield about

        def gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
            family = GaugeMetricFamily(f"steelyard_{name}", text, labels=["run"])
            family.add_metric(run, value)
            return family

        def counter(name: str, text: str, value: float) -> CounterMetricFamily:
            family = CounterMetricFamily(f"steelyard_{name}", text, labels=["run"])
            family.add_metric(run, value)
            return family

        figures, totals = live.figures(), live.totals
        yield gauge("requests_scheduled", "Requests of the schedule.", live.scheduled)
        yield gauge("requests_in_flight", "Requests that were due and have not ended.", figures.pending)
        left = live.left_s()
        yield gauge("schedule_left_seconds", "Until the last request is due.", left if left == left else 0.0)
        yield counter("requests_due", "Requests whose time has come.", live.due())
        yield counter("requests_good", "Requests that met the SLO; without one, all that were ok.", totals.good)
        yield counter("prompt_tokens", "Prompt tokens of ok requests.", totals.prompt_tokens)
        yield counter("output_tokens", "Output tokens of ok requests.", totals.output_tokens)
        ended = CounterMetricFamily(
            "steelyard_requests", "Requests that ended, by how.", labels=["run", "status", "error"]
        )
        for (status, error), n in sorted(totals.ended.items()):
            ended.add_metric([*run, status, error], n)
        yield ended
        for name, text in HISTOGRAMS.items():
            histogram: Histogram = getattr(totals, name)
            held = HistogramMetricFamily(f"steelyard_{name}_seconds", text, labels=["run"])
            held.add_metric(run, histogram.buckets(), histogram.sum_s)
            yield held
        workers = GaugeMetricFamily(
            "steelyard_server_workers", "Servers that were read, by role.", labels=["run", "role"]
        )
        roles = [s.role for s in live.readings]
        for role in sorted(set(roles)):
            workers.add_metric([*run, role], roles.count(role))
        yield workers


@contextmanager
def exposed(port: int) -> Iterator[tuple[str, Callable[[Live], None]]]:
    """Serve ``/metrics`` on loopback until the block ends: (URL, on_live for :func:`loadgen.replay.replay`). 0: a free port."""
    watched = Watched()
    registry = CollectorRegistry()
    registry.register(watched)
    try:
        server, thread = start_http_server(port, addr="127.0.0.1", registry=registry)
    except OSError as error:
        raise InputError(
            f"--metrics-port {port}: cannot be used ({error.strerror}). Give another port, or 0."
        ) from None

    def watch(live: Live) -> None:
        watched.live = live

    try:
        yield f"http://127.0.0.1:{server.server_port}/metrics", watch
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
