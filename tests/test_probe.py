"""loadgen.discover and loadgen.probe: an endpoint is understood, and what is missing is said with its cost."""

from __future__ import annotations

import json
import resource
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from advisor import doctor
from advisor.cli import main
from loadgen.client import target
from loadgen.cluster.embedded import embedded
from loadgen.control import Endpoint
from loadgen.discover import again, discover, read_targets, with_told
from loadgen.engines import Worker
from loadgen.probe import Page, Probe, _of_workers, clock, probe
from loadgen.scrape import Scraper
from tests.pages import Pages, endpoint, stream
from traces.errors import EndpointError, InputError
from traces.records import Fleet

SAMPLES = Path(__file__).parent / "data" / "samples"


def server(pages: Pages, **more: Any) -> Endpoint:
    return Endpoint(target(pages.url, **more))


UNLISTED = (503, "No prefill servers available")


def missing(found: Probe) -> str:
    """All that is missing, with costs, as one text."""
    return "\n".join(f"{one.what}: {one.costs}. {one.do}" for one in found.lacks)


def pool(pages: Pages, roles: str, page: str = "vllm:num_requests_waiting 1\n", **fields: Any) -> dict[str, Any]:
    """The worker list of a router: a letter a worker, p or d, whose pages are on this server too."""
    kinds = {"p": "prefill", "d": "decode"}
    listed = []
    for n, letter in enumerate(roles):
        url = f"{pages.url}/w{n}"
        pages[f"/w{n}/metrics"] = page
        listed.append(
            {"url": url, "worker_type": kinds[letter], "connection_mode": "Http", "is_healthy": True} | fields
        )
    return {"workers": listed}


# --- targets files --------------------------------------------------------------------------------------------------


def test_a_targets_file_names_workers_roles_and_pages(tmp_path: Path) -> None:
    """In TOML, in JSON as a test bed wrote it, and as kubectl prints pods."""
    toml = tmp_path / "targets.toml"
    toml.write_text(
        'engine = "vllm"\nrouter_metrics = "http://10.0.0.9:29000/metrics"\n'
        '[[worker]]\nrole = "prefill"\nurl = "http://10.0.0.1:8000"\nweight = 2\n'
        '[[worker]]\nname = "d0"\nrole = "decode"\nmetrics = "http://10.0.0.2:8000/metrics"\n'
        '[[worker]]\nname = "d0"\nrole = "decode"\nmetrics = "http://10.0.0.2:9400/metrics"\n'
    )
    held = read_targets(toml)
    assert (held.engine, [(w.name, w.role, w.metrics, w.weight) for w in held.workers]) == (
        "vllm",
        [
            ("router", "router", "http://10.0.0.9:29000/metrics", 1),
            ("10.0.0.1:8000", "prefill", "http://10.0.0.1:8000/metrics", 2),
            ("d0", "decode", "http://10.0.0.2:8000/metrics", 1),
            ("d0", "decode", "http://10.0.0.2:9400/metrics", 1),  # its GPUs
        ],
    )
    rig = read_targets(SAMPLES / "dynamo" / "targets.json")
    assert [(w.name, w.role, w.metrics) for w in rig.workers] == [
        ("router", "router", "http://127.0.0.1:8100/metrics"),
        ("127.0.0.1:9101", "prefill", "http://127.0.0.1:9101/metrics"),
        ("127.0.0.1:9201", "decode", "http://127.0.0.1:9201/metrics"),
    ]

    def pod(name: str, ip: str, labels: dict[str, str], ports: list[Any], phase: str = "Running", **notes: str) -> Any:
        return {
            "metadata": {
                "name": name,
                "labels": labels,
                "annotations": {k.replace("_", "/"): v for k, v in notes.items()},
            },
            "spec": {"containers": [{"ports": ports}]},
            "status": {"phase": phase, "podIP": ip},
        }

    http = [{"name": "sidecar", "containerPort": 8000}, {"name": "metrics", "containerPort": 8200}]
    pods = tmp_path / "pods.json"
    pods.write_text(
        json.dumps(
            {
                "kind": "List",
                "items": [
                    pod("p-0", "10.1.0.1", {"llm-d.ai/role": "prefill"}, [{"containerPort": 8000}]),
                    pod("d-0", "10.1.0.2", {"llm-d.ai/role": "decode"}, http),
                    pod("d-1", "10.1.0.3", {"llm-d.ai/role": "decode"}, http, **{"prometheus.io_port": "9000"}),
                    pod("b-0", "10.1.0.4", {"llm-d.ai/role": "both"}, http),
                    pod("d-2", "10.1.0.5", {"llm-d.ai/role": "decode"}, http, phase="Pending"),
                    pod("gateway", "10.1.0.6", {"app": "x"}, http),
                    {
                        "metadata": {"name": "odd", "labels": {"llm-d.ai/role": "decode"}, "annotations": [1]},
                        "spec": {"containers": 3},
                        "status": {"phase": "Running", "podIP": "10.1.0.8"},
                    },
                    pod(
                        "p-1-1",
                        "10.1.0.7",
                        {"llm-d.ai/role": "prefill", "leaderworkerset.sigs.k8s.io/worker-index": "1"},
                        http,
                    ),
                ],
            }
        )
    )
    assert [(w.name, w.role, w.metrics) for w in read_targets(pods).workers] == [
        ("p-0", "prefill", "http://10.1.0.1:8000/metrics"),
        ("d-0", "decode", "http://10.1.0.2:8200/metrics"),
        ("d-1", "decode", "http://10.1.0.3:9000/metrics"),
        ("b-0", "mixed", "http://10.1.0.4:8200/metrics"),
        ("odd", "decode", ""),
    ]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("t.toml", "[[worker]]\nrole = 1\n", "worker 1: role must be text"),
        ("t.toml", '[[worker]]\nrole = "prefil"\n', "role must be one of prefill, decode, mixed, router"),
        ("t.toml", '[[worker]]\nrol = "prefill"\n', "worker 1: 'rol' is not known. Known: id, metrics, name"),
        ("t.toml", '[[worker]]\nmetrics = "10.0.0.1:80"\n', "metrics must be an http or https URL"),
        ("t.toml", '[[worker]]\nmetrics = "me:pw@a:80"\n', "metrics must be an http or https URL (got 'a:80')"),
        (
            "t.toml",
            '[[worker]]\nmetrics = "ftp://me:p w@a:80"\n',
            "metrics must be an http or https URL (got 'ftp://***')",
        ),
        ("t.toml", '[[worker]]\nurl = "http://me:p w@a:80"\n', "worker 1: url must be a URL without blanks. Write %20"),
        ("t.toml", '[[worker]]\nmetrics = ["http://me:pw@a"]\n', "metrics must be text (got ['http://a'])"),
        ("t.toml", '[[worker]]\nrole = "decode"\n', "needs metrics"),
        ("t.toml", '[[worker]]\nname = "a"\nweight = 0\n', "weight must be a whole number"),
        ("t.toml", "[[worker]\n", "is no TOML"),
        ("t.toml", "targets = 3\n", "'targets' is not known"),
        ("t.toml", "", "lists no worker"),
        ("t.json", "{", "is no JSON"),
        ("t.json", "[1]", "must hold a table"),
        ("t.json", '{"items": [{"metadata": {"labels": {}}}]}', "no running pod has a role"),
        ("t.json", '{"items": [{"metadata": {"labels": ["llm-d.ai/role"]}}]}', "no running pod has a role"),
        (
            "t.json",
            '{"items": [{"metadata": {"labels": {"llm-d.ai/role": ["prefill"]}}}]}',
            "no running pod has a role",
        ),
        (
            "t.json",
            '{"workers": [{"name": "a", "role": "prefill"}, {"name": "a", "role": "decode"}]}',
            "two workers are named 'a'",
        ),
        (
            "t.json",
            '{"workers": [{"metrics": "http://a/m?worker=1"}, {"metrics": "http://a/m?worker=2"}]}',
            "two workers are named 'a/m', with different roles or pages that differ behind the ? alone. Name them apart.",
        ),
        ("", "", "cannot be read"),
    ],
)
def test_a_wrong_targets_file_is_one_clear_line(tmp_path: Path, name: str, text: str, words: str) -> None:
    """What is wrong, in which worker, and what would be right."""
    path = tmp_path / (name or "nothing.toml")
    if name:
        path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_targets(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


# --- discovery ------------------------------------------------------------------------------------------------------


def test_workers_roles_and_fleet_are_found() -> None:
    """From the router's list; an ill worker is said to be ill and does not count."""
    with endpoint("vllm", version={"version": "0.32.0"}) as pages:
        held = pool(pages, "ppd")
        held["workers"][1]["is_healthy"] = False
        pages["/workers"] = held
        found = discover(server(pages))
    assert (found.engine.name, found.version, found.fleet, found.lacks) == ("vllm", "0.32.0", Fleet(1, 1), "")
    name = held["workers"][1]["url"].removeprefix("http://")
    assert found.notes == (f"worker {name} (prefill) is not healthy, says the router",)


def test_a_targets_file_and_the_router_may_disagree(tmp_path: Path) -> None:
    """Another role, or a worker that the file lacks, is noted; the file stands."""
    with Pages() as a, Pages() as b, endpoint("vllm") as pages:
        a["/metrics"] = b["/metrics"] = "vllm:num_requests_waiting 1\n"
        listed = [
            {"url": one.url, "worker_type": kind, "connection_mode": "Http"}
            for one, kind in ((a, "decode"), (b, "decode"))
        ]
        pages["/workers"] = {"workers": listed}
        path = tmp_path / "t.json"
        path.write_text(json.dumps({"workers": [{"role": "prefill", "url": a.url}]}))
        found = discover(server(pages), targets=read_targets(path))
    assert [w.role for w in found.workers] == ["prefill"]
    assert "is prefill in" in found.notes[0]
    assert "lists it as decode" in found.notes[0]
    assert "which" in found.notes[1]
    assert "lacks" in found.notes[1]


def test_a_targets_file_may_say_no_more_than_where_the_routers_metrics_are(tmp_path: Path) -> None:
    """A router whose metrics are at a port of their own still lists its workers itself, now and later."""
    with endpoint("sglang") as pages:
        pages["/workers"] = pool(pages, "pd")
        path = tmp_path / "t.toml"
        path.write_text(f'router_metrics = "{pages.url}/router/metrics"')
        found = discover(server(pages), targets=read_targets(path))
        pages["/workers"] = pool(pages, "pdd")
        later = again(server(pages), found)
    assert (found.fleet, later.fleet) == (Fleet(1, 1), Fleet(1, 2))
    assert found.listed
    for one in (found, later):
        assert [w.metrics for w in one.workers if w.role == "router"] == [f"{pages.url}/router/metrics"]


def test_the_workers_that_a_control_names_are_read_where_nobody_lists_any() -> None:
    with endpoint("vllm") as pages:
        found = with_told(discover(server(pages)), {"prefill": ("http://a:1",), "decode": ("http://b:1", "http://c:1")})
    assert [(w.role, w.metrics) for w in found.workers] == [
        ("prefill", "http://a:1/metrics"),
        ("decode", "http://b:1/metrics"),
        ("decode", "http://c:1/metrics"),
    ]
    assert (found.fleet, found.listed) == (Fleet(1, 2), False)


def test_a_control_knows_better_than_counters_who_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """vllm-router's counters forget nobody: one that left its role, or left altogether, would be a change of the fleet.

    Workers that a router lists, with an id, stay as it lists them.
    """
    with Pages() as router, endpoint("vllm", workers={"workers": []}) as pages:
        monkeypatch.setattr("loadgen.engines.vllm.ROUTER_PORT", int(router.url.rpartition(":")[2]))
        listed = pool(pages, "ppd", "vllm:num_requests_waiting 1\n")
        urls = [w["url"] for w in listed["workers"]]
        router["/metrics"] = "".join(
            f'vllm_router_pd_{role}_requests_total{{worker="{url}"}} 7\n'
            for role, url in zip(("prefill", "prefill", "decode"), urls, strict=True)
        )
        found = discover(server(pages))
        assert (found.fleet, found.listed) == (Fleet(2, 1), True)
        told = {"prefill": (urls[0],), "decode": (urls[2],)}
        after = with_told(found, told)
        pages["/workers"] = listed
        known = discover(server(pages))
        assert with_told(known, told) == known
    assert [(w.role, w.url) for w in after.workers if w.role != "router"] == [("prefill", urls[0]), ("decode", urls[2])]
    assert [w.metrics for w in after.workers if w.role == "router"] == [f"{router.url}/metrics"]
    assert (after.fleet, after.by, after.listed) == (Fleet(1, 1), "--control names them", False)


def test_a_role_that_nobody_says_is_read_from_the_metrics(tmp_path: Path) -> None:
    """Two vLLM workers in a targets file without roles are told apart by where their KV came from."""
    with Pages() as a, Pages() as b, endpoint("vllm") as pages:
        a["/metrics"] = (SAMPLES / "vllm" / "metrics_prefill.txt").read_text()
        b["/metrics"] = (SAMPLES / "vllm" / "metrics_decode.txt").read_text()
        path = tmp_path / "t.json"
        path.write_text(json.dumps({"workers": [{"url": a.url}, {"url": b.url}, {"url": "http://127.0.0.1:1"}]}))
        found = discover(server(pages), targets=read_targets(path))
    assert [(w.role, w.healthy) for w in found.workers] == [("prefill", None), ("decode", None), ("", False)]
    assert found.fleet == Fleet(1, 1)


@pytest.mark.parametrize("gpu", ["DCGM_FI_DEV_GPU_UTIL 50\n", None])
@pytest.mark.parametrize("first", ["engine", "gpu"])
def test_a_page_of_gpus_neither_hides_a_role_nor_makes_ill(tmp_path: Path, gpu: str | None, first: str) -> None:
    """A worker with two pages has the role that one of them tells, and is ill where none of them comes."""
    with Pages() as a, endpoint("vllm") as pages:
        a["/metrics"] = (SAMPLES / "vllm" / "metrics_prefill.txt").read_text()
        if gpu is not None:
            a["/gpu"] = gpu
        listed = [{"name": "a", "metrics": f"{a.url}/{page}"} for page in ("metrics", "gpu")]
        gone = [{"name": "b", "metrics": f"{a.url}/b{page}"} for page in ("metrics", "gpu")]
        path = tmp_path / "t.json"
        path.write_text(json.dumps({"workers": (listed if first == "engine" else listed[::-1]) + gone}))
        found = discover(server(pages), targets=read_targets(path))
    assert {(w.name, w.role, w.healthy) for w in found.workers} == {("a", "prefill", None), ("b", "", False)}


# --- the probe ------------------------------------------------------------------------------------------------------


def test_the_reference_endpoint_is_known_in_full() -> None:
    """Engine, fleet that can be set, stream, usage, exact length, metrics, clock; only stage times are missing."""
    with embedded("demo", Fleet(1, 2)) as url:
        found = probe(Endpoint(target(url)))
    told = "\n".join(found.known)
    assert found.found.engine.name == "reference"
    assert "fleet 1:2, which can be changed" in told
    assert "it streams: 1.00 events a token" in told
    assert "answers have exactly the length asked for" in told
    assert found.clock is not None
    assert abs(found.clock[0]) - found.clock[1] < 0.05
    assert [one.what for one in found.lacks] == ["no times of the stages of a request"]


def test_each_engine_is_read_at_its_own_page(tmp_path: Path) -> None:
    """TensorRT-LLM's figures stand at a page of their own; its /metrics is emptied by reading, so no run reads it."""
    with endpoint("tensorrt_llm") as pages:
        pages["/metrics"], pages["/prometheus/metrics"] = "[]", "trtllm_num_requests_waiting 3\n"
        scraper = Scraper(server(pages), 0.0, lambda found: None, engine="trtllm")
        assert [s.waiting_requests for s in scraper.read()] == [3]
        probed = probe(server(pages), engine="trtllm")
        assert [(page.fields, page.problem) for page in probed.pages] == [(("waiting_requests",), "")]
        file = tmp_path / "t.toml"
        file.write_text(f'engine = "trtllm"\n[[worker]]\nrole = "prefill"\nurl = "{pages.url}/w"')
        (worker,) = discover(server(pages), targets=read_targets(file)).workers
        assert worker.metrics == f"{pages.url}/w/prometheus/metrics"
        assert "/metrics" not in [ask.path for ask in pages.asked]
        assert [c.word for c in doctor.endpoint(target(pages.url)) if c.name == "metrics"] == ["ok"]


def test_a_pair_behind_vllm_router_is_known_with_its_facts() -> None:
    """Workers, roles, pages, P and D of each request, and the stages that the decode engine tells."""
    pair = "cmpl-___prefill_addr_10.0.0.1:1___decode_addr_10.0.0.2:2_0123456789abcdef"
    said = {"queue_time_ms": 30.0, "time_to_first_token_ms": 8.0}
    with endpoint("vllm", partial(stream, id=pair, metrics=said)) as pages:
        pages["/workers"] = pool(pages, "pd")
        found = probe(server(pages))
    assert found.rows[0].facts == {
        "prefill_worker": "10.0.0.1:1",
        "decode_worker": "10.0.0.2:2",
        "transfer_s": 0.03,
        "first_step_s": 0.008,
    }
    assert [(p.worker.role, p.fields) for p in found.pages if p.worker.role != "router"] == [
        ("prefill", ("waiting_requests",)),
        ("decode", ("waiting_requests",)),
    ]
    assert "no times" not in missing(found)
    assert "kv_used_ratio in any metrics" in missing(found)
    assert "a counter of prompt tokens: a rule by demand, as advise gives it, moves nothing" in missing(found)
    # As sglang-router alone tells it; a decode worker's counter tells of no new prompts.
    router = Page(Worker("router", "router"), ("inflight_requests",))
    again = Page(Worker("d", "decode"), ("prompt_tokens_total", "kv_used_ratio"))
    said = [one.what for one in _of_workers(found.found, (router, again), True, [])]
    assert said == ["how many of the requests in hand wait", "a counter of prompt tokens"]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (partial(stream, usage=False), "no usage at the end of a stream: tokens are those asked for"),
        (partial(stream, tokens=3), "answers have not the length asked for (3 tokens, 16 asked)"),
        (lambda ask: b"".join(stream(ask, gap_s=0)).decode(), "all tokens of an answer arrive at once"),
        (
            lambda ask: (
                stream(ask) if isinstance(ask.json()["prompt"], str) else (422, {"error": {"message": "text!"}})
            ),
            "prompts of token ids are refused",
        ),
    ],
)
def test_what_an_answer_lacks_is_said_with_its_cost(answer: Any, words: str) -> None:
    """No usage, another length, a proxy that buffers, ids refused."""
    with endpoint(answer=answer) as pages:
        found = probe(server(pages))
    assert words in missing(found)


def test_a_router_that_lists_no_model_while_it_serves_is_probed_by_the_models_name() -> None:
    """vllm-router in its discovery mode, as seen: 503 for the list of models, an empty list of workers, and answers."""
    with endpoint("vllm", v1__models=UNLISTED, workers={"workers": []}) as pages:
        found = probe(server(pages), engine="vllm", model="m")
    assert (found.model, found.models, len(found.rows)) == ("m", (), 3)
    assert all(row.status == "ok" for row in found.rows)


def test_an_endpoint_of_which_nothing_is_known_is_told_what_to_give() -> None:
    """No workers, no metrics: the advice lacks most, and the file that would help is named."""
    with endpoint() as pages:
        said = missing(probe(server(pages)))
    assert "which workers there are" in said
    assert "give --fleet P:D, and --targets FILE" in said
    assert "metrics: the advice rests on client latencies alone" in said


def test_a_clock_that_is_wrong_is_measured() -> None:
    """From Date headers that are cut to seconds, to a fraction of one."""
    import time
    from email.utils import formatdate

    with Pages() as pages:
        pages["/v1/models"] = lambda ask: (200, {}, {"Date": formatdate(int(time.time() + 7.3), usegmt=True)})
        found = clock(server(pages))
    assert found is not None
    assert found[0] == pytest.approx(7.3, abs=found[1] + 0.05)
    assert found[1] < 0.3
    with Pages() as pages:
        pages["/v1/models"] = (200, {}, {"Date": "Thu, 01 Jan 99999999999 00:00:00 GMT"})
        assert clock(server(pages)) is None


@pytest.mark.parametrize(
    ("pages", "options", "words"),
    [
        # Wrong URL, model, kind of server, credentials; a router without decode workers.
        (lambda: Pages(), {}, r"no list|lists no model|HTTP 404"),
        (lambda: endpoint(), {"model": "other"}, r"does not serve the model 'other'\. It serves: m\."),
        (lambda: endpoint(v1__models=UNLISTED), {}, r"No prefill servers available .* name the model with --model"),
        (lambda: endpoint(answer=lambda ask: "<html>hello</html>"), {}, r"web page, not with an event stream"),
        (lambda: endpoint(answer=lambda ask: {"choices": [{"text": "whole"}]}), {}, r"no event stream of tokens"),
        (lambda: endpoint(answer=lambda ask: (401, "no")), {}, r"HTTP 401, it wants credentials\. Set STEELYARD_API_KEY"),
        (
            lambda: endpoint("vllm", workers={"workers": [{"url": "http://127.0.0.1:1", "worker_type": "prefill"}]}),
            {},
            r"no decode worker is behind it, 1 prefill, 0 decode .* lists them\)\. Start one",
        ),
    ],
)  # fmt: skip
def test_an_endpoint_that_cannot_be_used_is_one_clear_line(pages: Any, options: dict[str, Any], words: str) -> None:
    """What is wrong and what to do, before any load."""
    with pages() as held, pytest.raises(EndpointError, match=words) as caught:
        probe(server(held), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("said", "state"),
    [
        ('{"prefill": 2, "decode": 1, "draining": 1e400}', (Fleet(2, 1), False, Fleet(2, 1), 0)),
        ('{"prefill": 2, "decode": 1, "draining": -1}', (Fleet(2, 1), False, Fleet(2, 1), 0)),
        ('{"prefill": 2, "decode": 1000000000000}', None),
        ('{"prefill": 2, "decode": 1, "draining": 1}', (Fleet(2, 1), False, Fleet(2, 1), 1)),
    ],
)
def test_a_fleet_that_can_be_none_is_none(said: str, state: Any) -> None:
    """Numbers that no fleet has, such as infinity, are not worked with."""
    with Pages() as pages:
        pages["/fleet"] = said
        assert server(pages).fleet_state() == state


@pytest.mark.parametrize("url", ["http://a..b", f"http://{'a' * 64}.b"])
def test_a_host_that_no_name_server_takes_is_one_clear_line(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["probe", url], ["probe", "http://127.0.0.1:1", "--proxy", url]):
        assert main(arguments) == 1
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1
        assert "URL" in said


def test_doctor_takes_metrics_that_are_no_prometheus_text_for_none() -> None:
    with endpoint("vllm", metrics={"requests": 3}) as pages:
        pages["/v1/chat/completions"] = pages.pop("/v1/completions")
        checks = {check.name: check for check in doctor.endpoint(target(pages.url), chat=True)}
    assert (checks["metrics"].word, checks["metrics"].found) == ("warning", "/metrics: HTTP 200, nothing we can read")
    assert checks["fleet"].word == "note"


def test_doctor_looks_where_a_replay_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A router shows no metrics of its own at its port; its workers' pages and their roles are what is read."""
    with endpoint("vllm") as pages:
        pages["/workers"] = pool(pages, "pdd")
        checks = {check.name: check for check in doctor.endpoint(target(pages.url))}
    assert (checks["metrics"].word, checks["metrics"].found) == (
        "ok",
        "pages of 3 workers and routers: decode, prefill",
    )
    assert checks["fleet"].found.startswith("1:2, by 1 prefill, 2 decode (")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 256))
    assert "Only root raises the hard limit: 8192 in" in doctor.open_files().advice


def test_the_verb_prints_people_and_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Known, missing and costs for people; one object for programs; exit code 1 and one line where nothing answers.
    In none of it is what is secret in a worker's URL, nor in a run's sources, also where it has no name and its page fails."""

    def cut(ask: Any) -> Any:
        raise ConnectionAbortedError

    with endpoint("vllm") as pages:
        pages["/workers"] = pool(pages, "pd")
        file = tmp_path / "targets.json"
        roles = {"w0": "prefill", "w1": "decode"}
        own = [{"role": role, "url": f"{pages.url.replace('//', '//me:pl4nted@')}/{w}"} for w, role in roles.items()]
        pages["/cut"] = cut
        bare = pages.url.removeprefix("http://")
        own.append({"role": "decode", "metrics": f"http://me:pl4nted@{bare}/cut?n=1&token=pl4nted"})
        file.write_text(json.dumps({"workers": own}))
        assert main(["probe", pages.url, "--targets", str(file)]) == 0
        out = capsys.readouterr().out
        assert "known    vllm" in out
        assert "costs:" in out
        assert f"metrics {pages.url}/w0/metrics" in out
        assert f"worker   {bare}/cut: decode, metrics {pages.url}/cut?n=1&token=***\n" in out
        assert f"worker {bare}/cut ({pages.url}/cut: no HTTP answer" in out
        assert main(["probe", pages.url, "--targets", str(file), "--json"]) == 0
        said = capsys.readouterr().out
        listed = Worker("w", "decode", url="http://me:pl4nted@h:1", id="http://me:pl4nted@h:1")  # of a list without ids
        scraper = Scraper(server(pages), 0.0, lambda samples: None, workers=[*read_targets(file).workers, listed])
        assert scraper.sources()["w"]["id"] == "http://h:1"
        assert "pl4nted" not in out + said + str(scraper.sources())
        held = json.loads(said)
    assert held["engine"] == "vllm"
    assert held["request"]["output_tokens"] == [16, 16, 16]
    assert {"what", "costs", "do"} == set(held["missing"][0])
    assert main(["probe", "http://127.0.0.1:1"]) == 1
    assert "connection refused" in capsys.readouterr().err
