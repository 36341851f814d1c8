"""A running replay's own figures at ``/metrics``, for a Prometheus that also reads the servers'. Read only.

What is there: docs/grafana/steelyard.json shows all of it beside the servers' own metrics.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.exposition import ThreadingWSGIServer
from prometheus_client.registry import Collector

from loadgen.live import Histogram, Live
from loadgen.ports import HERE, Door
from traces.errors import InputError

WARM = "The warm-up counts too, which the run's own figures leave out."

HISTOGRAMS = {
    "ttft": f"From due to the first token. {WARM}",
    "tpot": f"Per output token after the first. {WARM}",
    "e2e": f"From due to the last token. {WARM}",
    "lag": f"How late the generator sent. {WARM}",
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
        pending = (
            "Requests that were due and have not ended: in flight, late, or held back by an order or a conversation."
        )
        yield gauge("requests_in_flight", pending, figures.pending)
        left = live.left_s()
        yield gauge("schedule_left_seconds", "Until the last request is due.", left if left == left else 0.0)
        yield counter("requests_due", "Requests whose time has come.", live.due())
        good = f"Requests that met the SLO; without one, all that were ok. {WARM}"
        yield counter("requests_good", good, totals.good)
        yield counter("prompt_tokens", f"Prompt tokens of ok requests. {WARM}", totals.prompt_tokens)
        yield counter("output_tokens", f"Output tokens of ok requests. {WARM}", totals.output_tokens)
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


class _Handler(WSGIRequestHandler):
    timeout = 10
    """Seconds that a client may say nothing, in the middle of a TLS greeting too."""

    def log_message(self, *_: Any) -> None:
        """Nothing: the terminal is the user's."""


class _Server(ThreadingWSGIServer):
    def __init__(self, door: Door, page: Any) -> None:
        self.address_family = socket.AF_INET6 if ":" in door.host else socket.AF_INET
        super().__init__((door.host, door.port), _Handler)
        self.set_app(page)

    def handle_error(self, *_: Any) -> None:
        """Nothing: a client went away, or does not speak TLS."""


@contextmanager
def exposed(door: Door = HERE) -> Iterator[tuple[str, Callable[[Live], None]]]:
    """Serve ``/metrics`` until the block ends: (URL, on_live for :func:`loadgen.replay.replay`)."""
    door.check("--metrics-port", "other machines could read it", "Set STEELYARD_WEB_TOKEN or --web-token-file")
    tls = door.context()
    watched = Watched()
    registry = CollectorRegistry()
    registry.register(watched)
    page = make_wsgi_app(registry)

    def guarded(environ: Any, start_response: Any) -> Any:
        headers = {k[5:].replace("_", "-").title(): v for k, v in environ.items() if k.startswith("HTTP_")}
        if refused := door.foreign(headers):
            status, why = refused
            start_response(f"{status} {HTTPStatus(status).phrase}", [("Content-Type", "text/plain")])
            return [why.encode()]
        if not door.bearer(headers.get("Authorization", "")):
            start_response("401 Unauthorized", [("Content-Type", "text/plain"), ("WWW-Authenticate", "Bearer")])
            return [b"a bearer token is needed"]
        return page(environ, start_response)

    try:
        server = _Server(door, guarded)
    except OSError as error:
        raise InputError(
            f"--metrics-port {door.port}: cannot be used ({error.strerror}). Give another port, or 0."
        ) from None
    if tls is not None:  # the greeting is the business of the connection's own thread
        server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, name="steelyard-metrics", daemon=True)
    thread.start()

    def watch(live: Live) -> None:
        watched.live = live

    try:
        yield f"{door.url(server.server_port)}/metrics", watch
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
