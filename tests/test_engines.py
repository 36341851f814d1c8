"""loadgen.engines: recorded streams and worker lists of real engines are read as what they say, and no more."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from loadgen.engines import EXACT, Engine, Glance, Measure, Prompts, Worker, dialect, engine, engines, recognise
from loadgen.engines.base import address
from loadgen.stream import Answer
from tests.pages import Pages
from traces.errors import InputError

SAMPLES = Path(__file__).parent / "data" / "samples"


def answered(name: str, file: str, piece: int = 0) -> tuple[Answer, dict[str, Any]]:
    """(what a recorded stream tells, its facts by an engine), pushed in pieces of so many bytes (0: at once)."""
    text = (SAMPLES / file).read_bytes().replace(b"\r\n", b"\n")
    head, body = text.split(b"\n\n", 1) if text.startswith(b"HTTP/") else (b"", text)
    headers = dict(line.decode().lower().split(": ", 1) for line in head.split(b"\n")[1:] if b": " in line)
    known = engine(name)
    answer = Answer(known.keep)
    for at in range(0, len(body), piece or len(body)):
        answer.push(float(at), body[at : at + (piece or len(body))])
    answer.finish(whole=True)
    return answer, known.facts(answer.kept, headers)


DYNAMO = {"prefill_worker": "729612501040516471", "decode_worker": "9056671568221448396", "cached_tokens": 0}
PAIR = {"prefill_worker": "127.0.0.1:8311", "decode_worker": "127.0.0.1:8312"}


@pytest.mark.parametrize("piece", [0, 1, 700])
@pytest.mark.parametrize(
    ("name", "file", "chunks", "expected"),
    [
        (
            "dynamo",
            "dynamo/sse_completions.txt",
            3,
            DYNAMO
            | {
                "queue_s": 0.000712543,
                "prefill_s": 0.018960209,
                "total_time_ms": 40.176711,
                "kv_hit_rate": 0.0,
                "router_queue_depth": 0,
                "kv_transfer_estimated_latency_ms": 8.599231000000001,
            },
        ),
        (
            "dynamo",
            "dynamo/sse_chat.txt",
            3,
            DYNAMO
            | {
                "queue_s": 0.002388073,
                "prefill_s": 0.018658572,
                "total_time_ms": 39.779611,
                "kv_hit_rate": 0.0,
                "router_queue_depth": 0,
                "kv_transfer_estimated_latency_ms": 7.175677,
            },
        ),
        # Behind the router the timings are the decode engine's: its queue is the hand-over.
        (
            "vllm",
            "vllm-router/sse_completions.txt",
            3,
            PAIR
            | {
                "transfer_s": 5.82222455100009,
                "first_step_s": 0.028413624999757303,
                "generation_time_ms": 81.48045200005072,
                "mean_itl_ms": 40.74022600002536,
            },
        ),
        (
            "vllm",
            "vllm-router/sse_chat.txt",
            3,
            PAIR
            | {
                "transfer_s": 0.5549189319999641,
                "first_step_s": 0.06969789400000082,
                "generation_time_ms": 84.22704299982797,
                "mean_itl_ms": 42.113521499913986,
            },
        ),
        # A lone engine merged two tokens into one event: chunks are no tokens.
        (
            "vllm",
            "vllm/sse_engine_direct.txt",
            2,
            {
                "queue_s": 0.0000374539999938861,
                "prefill_s": 0.05457179499990161,
                "generation_time_ms": 25.728884999807633,
                "mean_itl_ms": 12.864442499903816,
            },
        ),
        ("sglang", "sglang-router/sse_completions.txt", 3, {}),
    ],
)
def test_a_recorded_stream_gives_exactly_these_facts(
    name: str, file: str, chunks: int, expected: dict[str, Any], piece: int
) -> None:
    """Nine prompt tokens, three answered, and what the engine said of them, however the bytes were cut."""
    answer, facts = answered(name, file, piece)
    assert (answer.error, answer.said_end) == ("", True)
    assert (answer.prompt_tokens, answer.output_tokens, answer.chunks) == (9, 3, chunks)
    assert facts == pytest.approx(expected)


def test_ids_of_64_bits_stay_exact() -> None:
    """As a float the last digits would be lost; they are text from the beginning."""
    _, facts = answered("dynamo", "dynamo/sse_completions.txt")
    assert int(facts["decode_worker"]) == 9056671568221448396 != int(float(facts["decode_worker"]))


@pytest.mark.parametrize("name", sorted(engines()))
@pytest.mark.parametrize(
    "kept",
    [
        {},
        {"usage": None, "nvext": None, "metrics": None, "meta_info": None, "id": None},
        {"usage": 3, "nvext": [], "metrics": "no", "meta_info": 1, "id": 7},
        {
            "usage": {"prompt_tokens_details": []},
            "nvext": {"worker_id": 3, "timing": "x"},
            "metrics": {"queue_time_ms": "1"},
        },
        {"nvext": {"worker_id": {"prefill_worker_id": "abc"}, "timing": {"prefill_time_ms": None}}, "metrics": {}},
        {"usage": {"prompt_tokens_details": {"cached_tokens": -1}}, "id": "cmpl-___prefill_addr_x"},
        {"id": "___prefill_addr_a___decode_addr_" * 250_000},  # a pattern would look at it for years
        {"id": "___prefill_addr____decode_addr_b_0"},
        {"id": "x___decode_addr_b_0"},
    ],
)
def test_what_a_server_may_say_instead_gives_no_facts(name: str, kept: dict[str, Any]) -> None:
    """Members of another shape are passed over: no fact, and no exception on the way of a request."""
    assert engine(name).facts(kept, {}) == {}


@pytest.mark.parametrize(
    ("counted", "per_unit"), [((1, 2), 1.0), ((5, 5), 1.0), ((8, 80_008), 1.0), ((110, 1212), 1.2)]
)
def test_what_is_no_count_of_tokens_is_not_believed(counted: tuple[int, int], per_unit: float) -> None:
    """Prompts of a thousand ids for every token, or of one id for all, would be made of it."""
    assert Measure.fit([106, 1024], counted).per_unit == pytest.approx(per_unit, abs=1e-3)
    assert (Measure.fit([106, 1024], counted) == EXACT) == (per_unit == 1.0)


def served(pages: Pages, **answers: Any) -> Glance:
    """A glance at pages."""
    from loadgen.client import target
    from loadgen.control import Endpoint

    pages.update({f"/{path.replace('__', '/')}": page for path, page in answers.items()})
    return Glance(Endpoint(target(pages.url)))


def models(owner: str) -> dict[str, Any]:
    return {"object": "list", "data": [{"id": "m", "owned_by": owner}]}


def recorded(file: str) -> Any:
    return json.loads((SAMPLES / file).read_text())


def text(file: str) -> str:
    return (SAMPLES / file).read_text()


@pytest.mark.parametrize(
    ("answers", "name"),
    [
        ({"v1__models": models("steelyard")}, "reference"),
        ({"v1__models": models("vllm")}, "vllm"),
        ({"v1__models": models("sglang")}, "sglang"),
        ({"v1__models": models("tensorrt_llm")}, "trtllm"),
        ({"v1__models": models("nvidia"), "health": recorded("dynamo/health.json")}, "dynamo"),
        ({"workers": recorded("sglang-router/workers.json")}, "sglang"),
        ({"workers": recorded("vllm-router/workers_static_mode.json")}, "vllm"),
        ({"metrics": text("dynamo/metrics_frontend.txt")}, "dynamo"),
        ({"metrics": text("vllm/metrics_prefill.txt")}, "vllm"),
        ({"metrics": text("sglang-router/metrics_stub_decode.txt")}, "sglang"),
        ({"v1__models": (200, models("vllm"), {"server": "envoy"})}, "llm-d"),
        ({"v1__models": (200, models("x"), {"x-went-into-resp-headers": "true"})}, "llm-d"),
        ({"v1__models": models("organization-owner")}, "openai"),
        ({"v1__models": "<html>", "health": "<html>", "workers": [1], "metrics": "<html>"}, "openai"),
        ({}, "openai"),
    ],
)
def test_an_engine_is_recognised_by_what_it_says(answers: dict[str, Any], name: str) -> None:
    """By owner, health, worker list, header or metric names; what nobody recognises is any OpenAI-shaped server."""
    with Pages() as pages:
        found, why = recognise(served(pages, **answers))
        asked = [a.path for a in pages.asked]
    assert found.name == name
    assert why
    assert len(asked) == len(set(asked)), "each question once"


def test_workers_are_listed_with_their_roles() -> None:
    """Recorded lists of each kind."""
    with Pages() as pages:
        found = engine("sglang").workers(served(pages, workers=recorded("sglang-router/workers.json")))
    assert [(w.name, w.role, w.metrics, w.healthy, w.details) for w in found] == [
        ("127.0.0.1:8511", "prefill", "http://127.0.0.1:8511/metrics", True, {"bootstrap_port": 9511}),
        ("127.0.0.1:8512", "prefill", "http://127.0.0.1:8512/metrics", True, {"bootstrap_port": 9512}),
        ("127.0.0.1:8531", "decode", "http://127.0.0.1:8531/metrics", True, {}),
        ("127.0.0.1:8532", "decode", "http://127.0.0.1:8532/metrics", True, {}),
    ]
    assert found[0].id == "499fb325-f309-4b59-abe3-5eb998e7799d"
    with Pages() as pages:
        found = engine("vllm").workers(served(pages, workers=recorded("vllm-router/workers_static_mode.json")))
        none = engine("vllm").workers(served(pages, workers={}))
    assert [(w.name, w.role) for w in found] == [("127.0.0.1:8311", "prefill"), ("127.0.0.1:8331", "decode")]
    assert none == []
    with Pages() as pages:
        held = recorded("vllm-router/workers_discovery_mode.json")
        assert engine("vllm").workers(served(pages, workers=held)) == []
    with Pages() as pages:  # each data-parallel rank is listed: two hosts a role
        hosts = {"prefill": ("10.0.0.1:30000", "10.0.0.2:30000"), "decode": ("10.0.0.3:30000", "10.0.0.4:30000")}
        held = {
            "workers": [
                {"url": f"http://{host}@{rank}", "worker_type": role, "is_healthy": (host[7], rank) != ("2", 0)}
                for role, named in hosts.items()
                for rank in (0, 1)
                for host in named
            ]
        }
        found = engine("sglang").workers(served(pages, workers=held))
    assert [(w.name, w.role, w.metrics, w.healthy) for w in found] == [
        (host, role, f"http://{host}/metrics", host[7] != "2") for role, named in hosts.items() for host in named
    ]
    assert address("http://10.0.0.1:30000@1") == "10.0.0.1:30000"
    assert address("http://me:word@10.0.0.1:30000") == "10.0.0.1:30000"
    assert address("https://me:word@gw/metrics?token=a@b") == "gw"
    for page in ("", text("dynamo/metrics_frontend.txt")):  # with the frontend's word on who is registered, and without
        with Pages() as pages:
            held = recorded("dynamo/health.json")
            held["instances"] += [{"component": "router", "endpoint": "generate", "instance_id": 7}]
            found = engine("dynamo").workers(served(pages, health=held, metrics=page))
        assert found == [
            Worker("729612501040516471", "prefill", id="729612501040516471"),
            Worker("9056671568221448396", "decode", id="9056671568221448396"),
        ]
    cluster = {
        "current_workers": {
            "context_servers": [{"worker_id": "CONTEXT-h:1", "host": "10.0.0.1", "port": 8001, "role": 0}],
            "generation_servers": [{"worker_id": "GENERATION-h:2", "host": "10.0.0.2", "port": 8002, "role": 1}],
        }
    }
    with Pages() as pages:
        found = engine("trtllm").workers(served(pages, cluster_info=cluster))
    assert [(w.name, w.role, w.metrics) for w in found] == [
        ("10.0.0.1:8001", "prefill", "http://10.0.0.1:8001/prometheus/metrics"),
        ("10.0.0.2:8002", "decode", "http://10.0.0.2:8002/prometheus/metrics"),
    ]


def test_a_label_without_end_is_read_in_its_own_length() -> None:
    """A run of letters is no label from each of its letters on: of 200,000 that would take minutes."""
    line = f"dynamo_component_router_worker_registered{{{'a' * 200_000}}} 1\n"
    with Pages() as pages:
        seen = served(pages, health=recorded("dynamo/health.json"), metrics=line)
        began = time.thread_time()
        assert len(engine("dynamo").workers(seen)) == 2
    assert time.thread_time() - began < 5


def test_a_dynamo_without_prefill_workers_serves_both_phases_on_each() -> None:
    """A lone backend is no decode worker."""
    health = recorded("dynamo/health.json")
    health["instances"] = [i for i in health["instances"] if i["component"] == "backend"]
    with Pages() as pages:
        assert [w.role for w in engine("dynamo").workers(served(pages, health=health))] == ["mixed"]


def test_each_dialect_makes_its_own_body() -> None:
    """Dynamo is asked for its facts; sglang-router takes no token ids; a chat has messages."""
    bodies = {
        name: json.loads(Prompts(dialect(name), "m", 16, 1).body(0, 12, 5)) for name in ("dynamo", "sglang", "vllm")
    }
    assert bodies["dynamo"]["nvext"] == {"extra_fields": ["worker_id", "timing"]}
    assert "nvext" not in bodies["vllm"]
    assert [type(bodies[n]["prompt"]) for n in ("dynamo", "sglang", "vllm")] == [list, str, list]
    for body in bodies.values():
        assert (body["max_tokens"], body["min_tokens"], body["ignore_eos"], body["stream"]) == (5, 5, True, True)
        assert body["stream_options"] == {"include_usage": True}
    chat = json.loads(Prompts(dialect("dynamo", chat=True), "m", 16, 1).body(0, 12, 5))
    assert (chat["messages"][0]["role"], "nvext" in chat) == ("user", True)


THEIRS = """
from loadgen.engines import Engine, Metric

class Ours(Engine):
    name = "ours"
    members = {"share": "100%"}
    metrics = (Metric("ours_queue", "waiting_requests"), Metric("ours_wait_ms", "queue_s", scale=0.001, histogram=True))
    keep = ("who",)
    headers = ("x-worker",)

    def recognise(self, seen):
        return "it says so" if "ours" in seen.owners else ""

    def facts(self, kept, headers):
        return {"decode_worker": kept.get("who", ""), "rack": headers.get("x-worker", "")}

ENGINE = Ours()
"""


def test_another_package_adds_an_engine_by_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed entry point of steelyard.engines is known by name, asked first, and its metrics are read."""
    from loadgen import scrape

    (tmp_path / "theirs.py").write_text(THEIRS)
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[steelyard.engines]\nours = theirs:ENGINE\nvllm = theirs:ENGINE\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    caches = (engines, scrape._table, scrape._wanted)
    for held in caches:
        held.cache_clear()
    try:
        found = engine("ours")
        assert isinstance(found, Engine)
        assert engine("vllm").name == "vllm", "a name of ours is not taken"
        assert json.loads(Prompts(dialect("ours"), "m", 8, 1).body(0, 8, 1))["share"] == "100%"
        with Pages() as pages:
            assert recognise(served(pages, v1__models=models("ours")))[0] is found
        page = 'ours_queue{x="1"} 3\nours_wait_ms_count 2\nours_wait_ms_sum 500\n'
        reading = scrape.read(page, Worker("w", "decode"))
        assert reading.samples == {("w", "decode"): {"waiting_requests": 3.0}}
        assert reading.histograms["w", "decode"]["queue_s"].total == 0.5
        (info / "entry_points.txt").write_text("[steelyard.engines]\nbroken = json:dumps\n")
        engines.cache_clear()
        with pytest.raises(InputError, match=r"entry point broken of .* is no Engine"):
            engines()
    finally:
        sys.modules.pop("theirs", None)
        monkeypatch.undo()
        for held in caches:
            held.cache_clear()


def test_an_unknown_engine_is_named_with_those_that_are_known() -> None:
    """A wrong --engine says what there is."""
    with pytest.raises(InputError, match=r"no engine is named 'vlm'\. Known: auto, reference, dynamo, trtllm, sglang"):
        engine("vlm")
