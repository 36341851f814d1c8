"""loadgen.scrape: metrics pages become samples and histograms; what is absent stays absent."""

from __future__ import annotations

import _thread
import contextlib
import json
import math
import threading
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.client import target
from loadgen.cluster.embedded import embedded
from loadgen.control import Endpoint
from loadgen.discover import Discovery
from loadgen.engines import Worker, engine
from loadgen.scrape import GIVE_UP, Scraper, page_of, read, samples
from loadgen.served import Served
from tests.pages import Ask, Pages
from traces.errors import EndpointError
from traces.measures import parts_of
from traces.records import Fleet, Histogram, Sample

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
    assert samples(VLLM, Worker(""), 1.5) == [
        Sample(1.5, "0", "mixed", waiting_requests=2.0, running_requests=3.0, finished_total=9.0)
    ]
    assert samples(VLLM, Worker("d0", "decode"), 1.5)[0] == Sample(
        1.5, "d0", "decode", waiting_requests=2.0, running_requests=3.0, finished_total=9.0
    )
    assert samples("", Worker(""), 0.0) == []
    assert samples("other_thing 1.0\n", Worker(""), 0.0) == []


def test_a_role_label_gives_the_role_where_nobody_else_did() -> None:
    """SGLang says engine_type; a role we do not know is mixed; what the list of workers says stands."""
    text = 'sglang:num_queue_reqs{engine_type="%s",tp_rank="0"} 1.0\n'
    assert samples(text % "prefill", Worker(""), 0.0) == [Sample(0.0, "0", "prefill", waiting_requests=1.0)]
    assert samples(text % "unified", Worker(""), 0.0)[0].role == "mixed"
    assert samples(text % "something", Worker(""), 0.0)[0].role == "mixed"
    assert samples(text % "prefill", Worker("w", "decode"), 0.0)[0].role == "decode"


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        # The older spelling counts alone, and does not count twice beside the newer.
        ("vllm:gpu_cache_usage_perc 0.4\n", {"kv_used_ratio": 0.4}),
        ("vllm:gpu_cache_usage_perc 0.4\nvllm:kv_cache_usage_perc 0.5\n", {"kv_used_ratio": 0.5}),
        ("vllm:gpu_prefix_cache_hits_total 7\n", {"cached_tokens_total": 7.0}),
        # Three queues of SGLang are one; the hand-shake queue has two names.
        (
            "sglang:num_queue_reqs 1\nsglang:num_prefill_prealloc_queue_reqs 2\nsglang:num_decode_prealloc_queue_reqs 4\n",
            {"waiting_requests": 7.0},
        ),
        (
            "sglang:num_prefill_bootstrap_queue_reqs 2\nsglang:num_prefill_prealloc_queue_reqs 2\n",
            {"waiting_requests": 2.0},
        ),
        # Copies of one process count once, data-parallel ranks add up, shares are averaged.
        ('sglang:num_running_reqs{tp_rank="0"} 3\nsglang:num_running_reqs{tp_rank="1"} 3\n', {"running_requests": 3.0}),
        ('sglang:num_running_reqs{dp_rank="0"} 3\nsglang:num_running_reqs{dp_rank="1"} 4\n', {"running_requests": 7.0}),
        (
            'vllm:kv_cache_usage_perc{engine="0"} 0.25\nvllm:kv_cache_usage_perc{engine="1"} 0.75\n',
            {"kv_used_ratio": 0.5},
        ),
        # Milliseconds and megabytes become seconds and bytes; a latency that was a gauge is one.
        ("sglang:kv_transfer_latency_ms 12.5\n", {"transfer_s": 0.0125}),
        ("sglang:kv_transfer_latency_ms_sum 60\n", {"transfer_s_total": 0.06}),
        ("sglang:kv_transfer_total_mb_sum 3\n", {"transfer_bytes_total": 3e6}),
        # GPUs of a worker: the counter that works under MIG comes first.
        ('DCGM_FI_DEV_GPU_UTIL{gpu="0"} 100\nDCGM_FI_DEV_GPU_UTIL{gpu="1"} 50\n', {"gpu_busy_ratio": 0.75}),
        ("DCGM_FI_DEV_GPU_UTIL 90\nDCGM_FI_PROF_GR_ENGINE_ACTIVE 0.5\n", {"gpu_busy_ratio": 0.5}),
        # Blocks times what a block holds, where the page says it; else nothing.
        (
            'vllm:kv_cache_usage_perc 0.25\nvllm:cache_config_info{block_size="16",num_gpu_blocks="100"} 1\n',
            {"kv_used_ratio": 0.25, "kv_used_tokens": 400.0},
        ),
        (
            'vllm:kv_cache_usage_perc 0.25\nvllm:cache_config_info{block_size="16",num_gpu_blocks="None"} 1\n',
            {"kv_used_ratio": 0.25},
        ),
        (  # what no database takes
            'vllm:kv_cache_usage_perc 0.25\nvllm:cache_config_info{block_size="nan",num_gpu_blocks="100"} 1\n',
            {"kv_used_ratio": 0.25},
        ),
        ("vllm:num_requests_running +Inf\n", {}),
        # TensorRT-LLM's worker, and Dynamo's own word on a worker's cache in its older spelling.
        (
            "trtllm_num_requests_waiting 3\ntrtllm_num_paused_requests 1\ntrtllm_kv_cache_utilization 0.5\n",
            {"waiting_requests": 3.0, "paused_requests": 1.0, "kv_used_ratio": 0.5},
        ),
        ("dynamo_component_kvstats_gpu_cache_usage_percent 0.25\n", {"kv_used_ratio": 0.25}),
    ],
)
def test_names_are_read_by_the_tables(page: str, expected: dict[str, float]) -> None:
    """One row a rule of the tables."""
    found = samples(page, Worker("w", "mixed"), 0.0)
    assert found == ([Sample(0.0, "w", "mixed", **expected)] if expected else [])


SAMPLES = Path(__file__).parent / "data" / "samples"
EXPECTED: dict[str, Any] = json.loads((SAMPLES / "expected.json").read_text())


def test_no_recorded_page_is_left_out() -> None:
    """Each metrics page has its expected rows."""
    assert sorted(EXPECTED) == sorted(str(p.relative_to(SAMPLES)) for p in SAMPLES.glob("*/metrics_*.txt"))


@pytest.mark.parametrize("file", sorted(EXPECTED))
def test_a_recorded_page_gives_exactly_its_rows(file: str) -> None:
    """Every value, whose it is and by which name it was read; every histogram with its buckets; and nothing else."""
    told = EXPECTED[file]
    found = read((SAMPLES / file).read_text(), Worker(*told["page"]))
    assert found.id == told["id"]
    assert found.fields == told["fields"]
    assert [[*key, values] for key, values in sorted(found.samples.items())] == told["rows"]
    assert [[*key, values] for key, values in sorted(found.others.items())] == told["rows_of_others"]
    histograms = [
        [*key, name, c.source, c.count, c.total, [[None if b == math.inf else b, n] for b, n in c.buckets.items()]]
        for key, held in sorted(found.histograms.items())
        for name, c in sorted(held.items())
    ]
    assert histograms == told["histograms"]


def test_the_role_is_seen_in_recorded_pages_of_vllm() -> None:
    """By the source of the prompts' KV: NIXL on both sides, and the file connector, which recomputes a tail."""
    for file, role in (
        ("vllm/metrics_prefill.txt", "prefill"),
        ("vllm/metrics_decode.txt", "decode"),
        ("vllm/metrics_decode_file_connector_excerpt.txt", "decode"),
    ):
        (sample,) = samples((SAMPLES / file).read_text(), Worker("w"), 0.0)
        assert engine("vllm").role(None, sample) == role


def test_sglang_has_its_kv_before_it_queues_to_decode() -> None:
    """The queue of its decode engine begins when the KV is there (vLLM's waits for it): it is no part of the transfer."""
    page = (SAMPLES / "sglang-router" / "metrics_stub_decode.txt").read_text()
    staged = "".join(
        f'sglang:per_stage_req_latency_seconds_{end}{{engine_type="prefill",stage="prefill_transfer_kv_cache"}} {value}\n'
        f'sglang:queue_time_seconds_{end}{{engine_type="prefill"}} {value}\n'
        for end, value in (("count", 5), ("sum", 0.05))
    )
    for text, role, queues, transfer_s in ((page, "decode", [], 0.003), (staged, "prefill", ["queue_s"], 0.01)):
        held = [
            Histogram(*whose, name, counted.source, counted.count, counted.total)
            for whose, told in read(text, Worker("w0")).histograms.items()
            for name, counted in told.items()
        ]
        parts = {p.name: p for p in parts_of(lambda name: (0.1, 20) if name == "ttft_sent_s" else (math.nan, 0), held)}
        assert sorted(parts) == sorted([*queues, "transfer_s", "rest"])
        assert parts["transfer_s"].mean_s == pytest.approx(transfer_s)
        assert parts["transfer_s"].source.endswith(f" of {role}")


def test_a_gateway_speaks_of_its_pods_and_of_itself() -> None:
    """llm-d's endpoint picker: queues by pod, under the role of the pod's own list; averages over a pool are the router's."""
    page = (
        'inference_pool_per_pod_queue_size{name="pool",model_server_pod="d-0"} 4\n'
        'inference_pool_average_running_requests{name="pool"} 2.5\n'
        'inference_pool_ready_pods{name="pool"} 4\n'
        "inference_model_request_ttft_seconds_count 3\ninference_model_request_ttft_seconds_sum 1.5\n"
        "inference_objective_request_ttft_seconds_count 5\ninference_objective_request_ttft_seconds_sum 2.5\n"
    )
    found = read(page, Worker("router", "router"), "llm-d")
    assert found.others == {("d-0", ""): {"waiting_requests": 4.0}}
    assert found.samples == {("router", "router"): {"running_requests": 10.0}}
    counted = found.histograms["router", "router"]["ttft_s"]
    assert (counted.source, counted.count) == ("inference_objective_request_ttft_seconds", 5)  # the newer name


def test_an_orchestrator_counts_both_stages_apart() -> None:
    """TensorRT-LLM's ctx_ histograms are the prefill workers', gen_ the decode workers', all of a kind together."""
    page = "".join(
        f"{stage}_first_token_latency_seconds_{end} {value}\n"
        for stage, count, total in (("ctx", 4, 1.0), ("gen", 4, 2.0))
        for end, value in (("count", count), ("sum", total))
    )
    found = read(page, Worker("router", "router"), "trtllm")
    assert {role: held["ttft_s"].total for (_, role), held in found.histograms.items()} == {
        "prefill": 1.0,
        "decode": 2.0,
    }


def test_every_metric_goes_where_there_is_a_place() -> None:
    """A table's field is one of Sample, or a histogram whose name ends with its unit."""
    from loadgen.engines import engines

    places = {f.name for f in fields(Sample)[3:]}
    for known in engines().values():
        for metric in known.metrics:
            if metric.histogram:
                assert metric.to.endswith(("_s", "_bytes")), metric
            else:
                assert metric.to in places, metric


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("<html>not { metrics", id="web page"),
        pytest.param("just words here and there\n", id="words"),
        pytest.param('{"error": "no"}', id="JSON"),
        pytest.param("vllm:num_requests_running{ 3\n", id="half a line"),
        pytest.param('vllm:num_requests_running{a="b", ="c"} 3\n', id="no name"),
        pytest.param(f"vllm:num_requests_running {'9' * 400}\n", id="no float"),
        pytest.param(f"vllm:num_requests_running 3 {'9' * 400}\n", id="no time"),
        # A thousand times as long it would take half an hour.
        pytest.param('vllm:num_requests_running{a="' + '\\"' * 5000 + '"} 3\n', id="long line"),
    ],
)
def test_what_is_no_exposition_is_a_value_error(text: str) -> None:
    """A web page is not metrics, nor is a line that is longer than any server's."""
    with pytest.raises(ValueError, match=r".*"):
        samples(text, Worker(""), 0.0)


@given(st.text(max_size=300))
def test_no_text_breaks_the_reader(text: str) -> None:
    """Any text is read or refused with a ValueError."""
    with contextlib.suppress(ValueError):
        read(text, Worker("w"))


def test_the_reference_endpoint_is_read_by_worker_and_role() -> None:
    """Every worker of the fleet gives a reading with its role, at growing times, off the request path."""
    found: list[Sample] = []
    with embedded("constant", Fleet(2, 3)) as url:
        endpoint = Endpoint(target(url))
        with Scraper(endpoint, time.monotonic(), found.extend, period_s=0.05, engine="reference") as scraper:
            until = time.monotonic() + 10
            while scraper.readings < 3 and time.monotonic() < until:
                time.sleep(0.02)
    assert scraper.failures == 0
    first = [s for s in found if s.at_s == found[0].at_s]
    assert sorted(s.role for s in first) == ["decode"] * 3 + ["prefill"] * 2
    assert len({s.worker for s in first}) == 5
    assert all(s.waiting_requests == 0 and s.busy_s_total is not None and s.finished_total == 0 for s in first)
    assert all(s.gpu_busy_ratio is None for s in first)
    assert found[-1].at_s > found[0].at_s >= 0


def test_a_worker_that_changes_its_role_is_read_on_in_the_new_one() -> None:
    """The reference endpoint lists no workers: what its page says of a role comes before what it said before."""
    found: list[Sample] = []
    with embedded("constant", Fleet(2, 2)) as url:
        endpoint = Endpoint(target(url))
        with Scraper(endpoint, time.monotonic(), found.extend, period_s=0.05, engine="reference") as scraper:
            until(lambda: len(scraper.last) == 4)
            endpoint.ask_fleet(Fleet(1, 3))
            until(lambda: sum(s.role == "decode" for s in scraper.last.values()) == 3)
            last = scraper.last["1"].at_s
            until(lambda: scraper.last["1"].at_s > last)
    assert [s.role for s in found if s.worker == "1"][-1] == "decode"


def test_a_server_without_metrics_costs_nothing() -> None:
    """After five readings that did not come the scraper gives up."""
    endpoint = Endpoint(target("http://127.0.0.1:1"))
    with Scraper(endpoint, time.monotonic(), lambda _: None, period_s=0.01) as scraper:
        until = time.monotonic() + 10
        while scraper.failures < 5 and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(0.1)
    assert (scraper.failures, scraper.readings) == (5, 0)


def scraper_of(
    pages: Pages, workers: list[Worker], found: list[Sample], period_s: float = 0.02, **more: Any
) -> Scraper:
    """A scraper on test pages, every 20 ms. It waits as long for a page: what must come together is read less often."""
    return Scraper(Endpoint(target(pages.url)), time.monotonic(), found.extend, period_s, workers=workers, **more)


def until(condition: Any, limit_s: float = 10.0) -> None:
    """Wait until it holds."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def test_a_workers_own_page_comes_before_what_the_router_says_of_it() -> None:
    """One row a worker: the router fills in only what the worker's page lacks; a stale line of another role is passed over."""
    found: list[Sample] = []
    with Pages() as pages:
        pages["/p"] = "vllm:num_requests_waiting 2\n"
        router = pages["/metrics"] = (
            f'vllm_router_pd_active_prefill_tokens{{worker="{pages.url}"}} 900\n'
            f'vllm_router_pd_pending_decode_requests{{worker="{pages.url}"}} 5\n'
        )
        workers = [Worker("p0", "prefill", url=pages.url, metrics=f"{pages.url}/p")]
        with scraper_of(pages, workers, found, 5.0):
            until(lambda: any(s.waiting_tokens for s in found))
    assert router
    both = [s for s in found if s.waiting_tokens is not None]
    assert {(s.worker, s.role, s.waiting_requests, s.waiting_tokens) for s in both} == {("p0", "prefill", 2.0, 900.0)}


def test_dynamo_workers_are_known_by_the_id_on_their_page() -> None:
    """The frontend's decimal id and the page's hexadecimal one are the same worker, under the name in the targets file, from when
    its page was read."""
    found: list[Sample] = []
    with Pages() as pages:
        pages["/metrics"] = (SAMPLES / "dynamo" / "metrics_frontend.txt").read_text()
        pages["/d"] = (SAMPLES / "dynamo" / "metrics_decode.txt").read_text()
        with scraper_of(pages, [Worker("d0", "decode", metrics=f"{pages.url}/d")], found, 5.0) as scraper:
            until(lambda: any(s.worker == "d0" and s.kv_used_tokens for s in found))
    row = next(s for s in found if s.worker == "d0" and s.kv_used_tokens)
    assert (row.role, row.running_requests, row.waiting_requests, row.kv_used_tokens) == ("decode", 33, 6, 97152)
    assert row.kv_used_ratio == pytest.approx(0.09735, abs=1e-5)  # the engine's own, not the router's estimate
    assert scraper.names["9056671568221448396"] == "d0"
    known = next(k for k, s in enumerate(found) if s.worker == "d0")
    assert "9056671568221448396" not in {s.worker for s in found[known:]}
    assert {s.worker for s in found if s.role == "prefill"} == {"729612501040516471", "8371612583015157541"}
    assert {s.worker for s in found if s.role == "router"} == {"router"}


def queued(count: int, total: float, fast: int) -> str:
    """A page with vLLM's histogram of queue times."""
    return (
        f'vllm:request_queue_time_seconds_bucket{{le="0.1"}} {fast}\n'
        f'vllm:request_queue_time_seconds_bucket{{le="+Inf"}} {count}\n'
        f"vllm:request_queue_time_seconds_count {count}\nvllm:request_queue_time_seconds_sum {total}\n"
    )


def test_histograms_are_kept_as_the_difference_over_the_run() -> None:
    """What was counted before the first reading is not the run's; a server that began anew adds what it has counted since, and
    one that shows a histogram from its first observation on all of it; a change of role is no beginning."""
    page = queued
    with Pages() as pages:
        pages["/p"] = page(100, 50.0, 90)
        scraper = scraper_of(pages, [Worker("p0", "prefill", metrics=f"{pages.url}/p")], [], 0.2)
        with scraper:
            until(lambda: scraper.readings >= 1)
            pages["/p"] = page(110, 53.0, 95)
            until(lambda: [h.count for h in scraper.histograms()] == [10])
            pages["/p"] = page(4, 1.0, 1)  # restarted
            until(lambda: [h.count for h in scraper.histograms()] == [14])
            late = page(7, 0.7, 7).replace("queue", "prefill")
            pages["/p"] = page(4, 1.0, 1) + late
            until(lambda: len(scraper.histograms()) == 2)
            scraper.assign({"decode": ["p0"]})
            until(lambda: len(scraper.histograms()) == 4)
            pages["/p"] = page(5, 1.5, 2) + late  # read when the run has ended
        queue, prefill = "vllm:request_queue_time_seconds", "vllm:request_prefill_time_seconds"
        assert scraper.histograms() == [
            Histogram("p0", "decode", "prefill_s", prefill, 0, 0.0, ((0.1, 0), (math.inf, 0))),
            Histogram("p0", "decode", "queue_s", queue, 1, 0.5, ((0.1, 1), (math.inf, 1))),
            Histogram("p0", "prefill", "prefill_s", prefill, 7, 0.7, ((0.1, 7), (math.inf, 7))),
            Histogram("p0", "prefill", "queue_s", queue, 14, 4.0, ((0.1, 6), (math.inf, 14))),
        ]


def test_a_page_made_before_the_end_is_not_the_reading_of_the_end() -> None:
    """One that was asked for before, and comes after, is taken for what it is; another is asked for."""
    found: list[Sample] = []
    asked = threading.Event()

    def slow(ask: Ask) -> str:
        asked.set()
        scraper._stop.wait(10)
        time.sleep(0.3)
        return queued(102, 51.0, 91)

    with Pages() as pages:
        pages["/p"] = queued(100, 50.0, 90)
        scraper = scraper_of(pages, [Worker("p0", "prefill", metrics=f"{pages.url}/p")], found)
        with scraper:
            until(lambda: scraper.readings >= 1)
            pages["/p"] = slow
            assert asked.wait(10)
            pages["/p"] = queued(105, 52.0, 93) + "vllm:num_requests_waiting 2\n"
    assert [(h.count, h.total) for h in scraper.histograms()] == [(5, 2.0)]
    assert found[-1].waiting_requests == 2


def test_a_slow_page_holds_up_no_other() -> None:
    """The others are read at their pace while one page hangs; it counts when it comes."""
    found: list[Sample] = []
    with Pages() as pages:
        pages["/fast"] = "vllm:num_requests_waiting 1\n"
        pages["/slow"] = (3.0, "vllm:num_requests_waiting 2\n")
        workers = [Worker(n, "decode", metrics=f"{pages.url}/{n}") for n in ("fast", "slow")]
        with scraper_of(pages, workers, found):
            until(lambda: any(s.worker == "slow" for s in found))
    assert sum(s.worker == "fast" for s in found) >= 10


def test_who_reads_now_and_the_thread_take_nothing_from_each_other() -> None:
    """The controller's reading is there whoever of both fetched the page, and whole; a worker that is gone is not in it."""
    found: list[Sample] = []
    with Pages() as pages:
        pages["/p"] = (0.05, "vllm:num_requests_waiting 2\n")
        pages["/router"] = f'vllm_router_pd_active_prefill_tokens{{worker="{pages.url}"}} 900\n'
        pages["/q"] = "vllm:num_requests_waiting 2\n"
        workers = [
            Worker("router", "router", metrics=f"{pages.url}/router"),
            Worker("p", "prefill", pages.url, metrics=f"{pages.url}/p"),
            Worker("q", "decode", metrics=f"{pages.url}/q"),
        ]
        with scraper_of(pages, workers, found, 0.2) as scraper:
            for _ in range(30):
                (sample,) = [s for s in scraper.read() if s.worker == "p"]
                assert (sample.waiting_requests, sample.waiting_tokens) == (2, 900)
            del pages["/q"]
            until(lambda: [s.worker for s in scraper.silent()] == ["q"])
            time.sleep(0.3)  # longer than a page is taken for one of now
            assert {s.worker: s.waiting_requests for s in scraper.read()} == {"p": 2, "q": None}
            scraper.assign({"prefill": ["p", "new"]})  # by who sets the fleet, q has left and another ought to tell
            assert {s.worker: (s.role, s.waiting_requests) for s in scraper.read()} == {
                "p": ("prefill", 2),
                "new": ("prefill", None),
            }
    assert [s.at_s for s in found if s.worker == "p"] == sorted({s.at_s for s in found if s.worker == "p"})


def test_a_page_without_end_is_bounded() -> None:
    """A page larger than the bound is a failure, not a full memory."""
    from loadgen.scrape import MOST_BYTES

    with Pages() as pages:
        pages["/metrics"] = "x" * (MOST_BYTES + 100_000)
        with scraper_of(pages, [], []) as scraper:
            until(lambda: scraper.failures >= 1)
    assert scraper.readings == 0


def test_a_worker_that_stops_telling_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the time of its last reading; one that is new is read from when it is listed."""
    monkeypatch.setattr("loadgen.scrape.SILENT_S", 0.5)
    found: list[Sample] = []
    listed = []
    with Pages() as pages:
        pages["/a"] = pages["/b"] = "vllm:num_requests_waiting 1\n"
        listed = [Worker("a", "prefill", metrics=f"{pages.url}/a")]
        later = [*listed, Worker("b", "decode", metrics=f"{pages.url}/b")]
        scraper = scraper_of(pages, listed, found, find=lambda: later)
        scraper._found_at -= 60  # asked at once, not after FIND_S
        with scraper:
            until(lambda: any(s.worker == "b" for s in found))
            del pages["/a"]
            until(lambda: [s.worker for s in scraper.silent()] == ["a"], 12)
    assert scraper.silent()[0].at_s < found[-1].at_s
    # Nobody's doing is a fault of the run; a worker that we took away ourselves is not.
    nobody = Discovery(engine("vllm"), "", "", (), "")
    words = {moved: Served().reasons(nobody, None, scraper, moved=moved) for moved in (False, True)}
    assert [word for word, _ in words[False]] == ["degraded"]
    assert [word for word, _ in words[True]] == ["valid"]
    assert all("worker a told nothing after" in why for ((_, why),) in words.values())


def test_a_page_whose_thread_never_ran_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that is denied memory ends without a word: its page failed, and the search for workers is made again."""
    monkeypatch.setattr("loadgen.scrape.PAGE_S", 0.2)
    monkeypatch.setattr("loadgen.scrape.FIND_S", 0.05)
    start, denied = _thread.start_new_thread, []

    def starts(work: Callable[[], None], given: tuple[()]) -> int:
        if work.__qualname__.startswith("Scraper._apart") and len(denied) < 2:
            denied.append(work)
            return 0
        return start(work, given)

    monkeypatch.setattr("loadgen.scrape._thread.start_new_thread", starts)
    found: list[Sample] = []
    with Pages() as pages:
        pages["/a"] = pages["/b"] = "vllm:num_requests_waiting 1\n"
        listed = [Worker("a", "prefill", metrics=f"{pages.url}/a")]
        later = [*listed, Worker("b", "decode", metrics=f"{pages.url}/b")]
        with scraper_of(pages, listed, found, find=lambda: later) as scraper:
            until(lambda: {s.worker for s in found} == {"a", "b"}, 20)
    assert len(denied) == 2
    assert scraper.failures >= 1


def test_the_role_of_a_vllm_worker_follows_where_its_kv_comes_from() -> None:
    """Prompt tokens that another worker computed make a decode worker; a flip is seen at the next reading with traffic."""
    vllm = engine("vllm")

    def sample(**values: float) -> Sample:
        return Sample(0.0, "w", "mixed", **values)

    prefill = sample(prompt_tokens_total=1000, received_tokens_total=0, finished_total=10, output_tokens_total=10)
    decode = sample(prompt_tokens_total=3000, received_tokens_total=1900, finished_total=30, output_tokens_total=900)
    assert vllm.role(None, prefill) == "prefill"
    assert vllm.role(prefill, decode) == "decode"
    alone = sample(prompt_tokens_total=1000, received_tokens_total=0, finished_total=10, output_tokens_total=500)
    assert vllm.role(None, alone) == "mixed"
    kept = {"prompt_tokens_total": 10000.0, "received_tokens_total": 7000.0, "finished_total": 10.0}
    # From a KV store, one token a request: a prefill worker that is listed as one did no decode.
    assert vllm.role(None, sample(**kept, output_tokens_total=10)) == ""
    assert vllm.role(None, sample(**kept, output_tokens_total=300)) == "decode"
    assert vllm.role(prefill, prefill) == ""  # nothing moved
    assert vllm.role(None, sample(prompt_tokens_total=1000)) == ""  # an older release does not say


def test_who_sets_the_fleet_says_the_roles_after_a_change(tmp_path: Path) -> None:
    """A targets file tells of the beginning. A worker's second page (its GPUs') follows its role."""
    found: list[Sample] = []
    with Pages() as pages:
        pages["/metrics"], pages["/gpu"] = "vllm:num_requests_waiting 3\n", "DCGM_FI_DEV_GPU_UTIL 50\n"
        workers = [
            Worker("a", "prefill", pages.url, f"{pages.url}/metrics"),
            Worker("a", "prefill", metrics=f"{pages.url}/gpu"),
        ]
        scraper = scraper_of(pages, workers, found)
        assert {s.role for s in scraper.read()} == {"prefill"}
        scraper.assign({"prefill": ("http://elsewhere:1",), "decode": (pages.url,)})
        other, sample = sorted(scraper.read(), key=lambda s: s.worker == "a")
        assert other == Sample(other.at_s, "elsewhere:1", "prefill")  # nothing came of it
        assert (sample.worker, sample.role, sample.waiting_requests, sample.gpu_busy_ratio) == ("a", "decode", 3, 0.5)


def test_workers_that_a_change_brings_are_read_and_those_that_left_hold_nobody_up() -> None:
    """Pods of other names come where a file lists the first; the address of one that left swallows every question."""
    with Pages() as pages:
        pages["/a"] = pages["/b"] = "vllm:num_requests_waiting 3\n"
        pages["/metrics"] = 'inference_pool_per_pod_queue_size{model_server_pod="c"} 4\n'
        listed = [Worker("a", "prefill", metrics=f"{pages.url}/a"), Worker("x", "decode", metrics=f"{pages.url}/x")]
        scraper = scraper_of(pages, listed, [], 1.0, engine="llm-d")
        scraper.assign({"prefill": ["a"]}, {"a": f"{pages.url}/a"})
        assert {s.worker: s.role for s in scraper.read()} == {"a": "prefill", "c": "mixed"}
        pages["/a"] = (2.0, "vllm:num_requests_waiting 3\n")
        began = time.monotonic()
        scraper.assign({"prefill": ["b"], "decode": ["c"]}, {"b": f"{pages.url}/b"})
        for _ in range(3):
            told = {s.worker: (s.role, s.waiting_requests) for s in scraper.read()}
            assert (told["b"], told["c"]) == (("prefill", 3), ("decode", 4))
        assert time.monotonic() - began < 4  # and not three times the two seconds that a's page takes
        assert scraper.unheard() == {}
        scraper.assign({"prefill": ["b", "d"], "decode": ["c"]})
        assert scraper.unheard() == {"d": "prefill"}
        reasons = Served().reasons(Discovery(engine("vllm"), "", "", (), ""), None, scraper, moved=True)
        assert ("valid", "no metrics of prefill came from d: what is read of the role is of the others") in reasons
        far = scraper_of(pages, [], [], engine="llm-d")  # where the router alone is read, no pod's page is looked for
        far.assign({"prefill": ["b"], "decode": ["c"]}, {"b": f"{pages.url}/b"})
        assert [s.worker for s in far.read() if s.waiting_requests is not None] == ["c"]


def test_a_pod_that_comes_back_under_its_name_is_read_at_its_new_address() -> None:
    """A StatefulSet's. What is at another port (one that is forwarded here, the page of its GPUs) is no such page, and stays."""
    with Pages() as pages, Pages() as others:
        pages["/p"] = "vllm:num_requests_waiting 3\n"
        others["/metrics"], others["/gpu"] = "vllm:num_requests_waiting 4\n", "DCGM_FI_DEV_GPU_UTIL 50\n"
        here, there = f"{pages.url}/p", f"{pages.url}/p".replace("127.0.0.1", "localhost")
        listed = [
            Worker("p-0", "prefill", metrics=here),
            Worker("p-0", "prefill", metrics=f"{others.url}/gpu"),
            Worker("d-0", "decode", metrics=f"{others.url}/metrics"),
        ]
        scraper = scraper_of(pages, listed, [], 1.0)
        asked = {"prefill": ["p-0"], "decode": ["d-0"]}
        for pod in (here, there):  # also where only the address is another: both seen between two looks
            scraper.assign(asked, {"p-0": pod, "d-0": here})
            scraper.assign(asked, {"p-0": pod, "d-0": there})
            pages.asked.clear()
            told = {s.worker: (s.waiting_requests, s.gpu_busy_ratio) for s in scraper.read()}
            assert told == {"p-0": (3, 0.5), "d-0": (4, None)}
            assert [ask.headers["host"] for ask in pages.asked if ask.path == "/p"] == [urlsplit(pod).netloc]
            assert scraper.sources()["d-0"]["metrics"] == f"{others.url}/metrics"
        for pod in (here, there):  # one that a change brought
            scraper.assign({"prefill": ["new"], "decode": ["d-0"]}, {"new": f"{pod}/new"})
            assert scraper.sources()["new"]["metrics"] == f"{pod}/new"


@pytest.mark.parametrize("page", ["betrays", "says"])
def test_a_second_page_does_not_hide_the_role_that_the_first_tells(page: str) -> None:
    """A GPU's page betrays nothing: the worker's role is what its pages tell together, from the first reading on."""
    recorded = (SAMPLES / "vllm" / "metrics_decode.txt").read_text()
    with Pages() as pages:
        pages["/metrics"] = recorded if page == "betrays" else 'sglang:num_running_reqs{engine_type="decode"} 3\n'
        pages["/gpu"] = "DCGM_FI_DEV_GPU_UTIL 50\n"
        workers = [Worker("a", "", pages.url, f"{pages.url}/metrics"), Worker("a", "", metrics=f"{pages.url}/gpu")]
        scraper = scraper_of(pages, workers, [])
        for _ in range(2):
            (sample,) = [s for s in scraper.read() if s.worker == "a"]
            assert (sample.role, sample.gpu_busy_ratio) == ("decode", 0.5)
            assert sample.running_requests is not None


def test_a_role_that_a_worker_has_given_up_is_not_told_of_it() -> None:
    """vllm-router names a worker that was flipped in both roles for ever; seen on a live one."""
    with Pages() as pages:
        label = f'worker="{pages.url}",rank="aggregate"'
        pages["/router"] = (
            f"vllm_router_pd_prefill_occupancy{{{label}}} 0\nvllm_router_pd_active_decode_requests{{{label}}} 3\n"
        )
        workers = [
            Worker("router", "router", metrics=f"{pages.url}/router"),
            Worker("a", "prefill", pages.url, f"{pages.url}/metrics"),
        ]
        scraper = scraper_of(pages, workers, [])
        scraper.assign({"decode": (pages.url,)})
        for page in ("vllm:num_requests_running 3\n", None):  # also in a round to which its own page does not come
            if page:
                pages["/metrics"] = page
            else:
                del pages["/metrics"]
            assert [s.role for s in scraper.read() if s.worker == "a"] == ["decode"]


def test_a_worker_that_starts_late_is_read_when_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadgen.scrape.FIND_S", 0.3)
    found: list[Sample] = []
    with Pages() as pages, scraper_of(pages, [Worker("a", "decode", metrics=f"{pages.url}/late")], found):
        until(lambda: sum(ask.path == "/late" for ask in pages.asked) >= GIVE_UP)
        time.sleep(0.1)
        assert sum(ask.path == "/late" for ask in pages.asked) <= GIVE_UP + 1
        pages["/late"] = "vllm:num_requests_waiting 3\n"
        until(lambda: found)
    assert found[0].worker == "a"


def test_credentials_go_to_the_endpoint_alone() -> None:
    """A worker's page elsewhere gets no token of the endpoint's."""
    server = Endpoint(target("http://127.0.0.1:8000", api_key="secret-token"))
    own, _ = page_of(server, Worker("r", metrics="http://127.0.0.1:8000/metrics"))
    other, path = page_of(server, Worker("w", metrics="http://127.0.0.1:8001/metrics?x=1"))
    assert own.where.headers["Authorization"] == "Bearer secret-token"
    assert (dict(other.where.headers), path) == ({}, "/metrics?x=1")
    with pytest.raises(EndpointError) as caught:
        other.fetch("GET", "/metrics?token=pl4n ted")  # as a list may give it
    assert str(caught.value).startswith(
        "http://127.0.0.1:8001/metrics: the URL holds a character that HTTP does not allow."
    )
