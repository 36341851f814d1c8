"""loadgen.scrape: metrics text becomes samples; what is absent stays absent."""

from __future__ import annotations

import time

import pytest

from loadgen.client import target
from loadgen.cluster.embedded import embedded
from loadgen.control import Endpoint
from loadgen.engines import dialect
from loadgen.scrape import Scraper, samples
from traces.records import Fleet, Sample

VLLM = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="m"} NaN
# TYPE vllm:request_success_total counter
vllm:request_success_total{engine="0",finished_reason="stop",model_name="m"} 4.0
vllm:request_success_total{engine="0",finished_reason="length",model_name="m"} 5.0
# TYPE other_thing gauge
other_thing 1.0
"""


def test_only_known_names_count_and_counters_add_up() -> None:
    """Reasons of a counter are summed, unknown names and NaN are left out, absent is None and not 0."""
    assert samples(VLLM, dialect("vllm"), 1.5) == [
        Sample(1.5, "0", "mixed", waiting_requests=2.0, running_requests=3.0, finished_total=9.0)
    ]
    assert samples(VLLM, dialect("vllm"), 1.5, roles={"0": "decode"})[0].role == "decode"
    assert samples(VLLM, dialect("openai"), 1.5) == []
    assert samples("", dialect("vllm"), 0.0) == []


def test_a_role_label_gives_the_role() -> None:
    """SGLang says engine_type; a role we do not know is mixed."""
    text = 'sglang:num_queue_reqs{engine_type="%s",tp_rank="0"} 1.0\n'
    assert samples(text % "prefill", dialect("sglang"), 0.0) == [Sample(0.0, "0", "prefill", waiting_requests=1.0)]
    assert samples(text % "unified", dialect("sglang"), 0.0)[0].role == "mixed"


def test_what_is_no_exposition_is_a_value_error() -> None:
    """A web page is not metrics."""
    with pytest.raises(ValueError, match=r".*"):
        samples("<html>not { metrics", dialect("vllm"), 0.0)


def test_the_reference_endpoint_is_read_by_worker_and_role() -> None:
    """Every worker of the fleet gives a reading with its role, at growing times, off the request path."""
    found: list[Sample] = []
    with embedded("constant", Fleet(2, 3)) as url:
        endpoint = Endpoint(target(url))
        with Scraper(endpoint, dialect("reference"), time.monotonic(), found.extend, period_s=0.05) as scraper:
            until = time.monotonic() + 10
            while scraper.readings < 3 and time.monotonic() < until:
                time.sleep(0.02)
    assert scraper.failures == 0
    first = [s for s in found if s.at_s == found[0].at_s]
    assert sorted(s.role for s in first) == ["decode"] * 3 + ["prefill"] * 2
    assert len({s.worker for s in first}) == 5
    assert all(s.waiting_requests == 0 and s.busy_s_total is not None and s.finished_total == 0 for s in first)
    assert all(s.kv_used_ratio is None for s in first)
    assert found[-1].at_s > found[0].at_s >= 0


def test_a_server_without_metrics_costs_nothing() -> None:
    """After five readings that did not come the scraper gives up."""
    endpoint = Endpoint(target("http://127.0.0.1:1"))
    with Scraper(endpoint, dialect("reference"), time.monotonic(), lambda _: None, period_s=0.01) as scraper:
        until = time.monotonic() + 10
        while scraper.failures < 5 and time.monotonic() < until:
            time.sleep(0.02)
    assert (scraper.failures, scraper.readings) == (5, 0)
