"""The reference endpoint over real HTTP: OpenAI-shaped, as slow as its laws say, and on the simulator's schedule."""

from __future__ import annotations

import asyncio
import csv
import http.client
import io
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest

from loadgen.cluster import Profile, simulate
from loadgen.cluster.embedded import embedded
from loadgen.cluster.server import Endpoint, Stream, serve
from loadgen.policy import next_phase
from traces.errors import EndpointError, InputError
from traces.records import Fleet, Floats, Schedule


@pytest.fixture(scope="module")
def demo_url() -> Iterator[str]:
    with embedded("demo", Fleet(4, 4)) as url:
        yield url


@pytest.fixture(scope="module")
def constant_url() -> Iterator[str]:
    with embedded("constant", Fleet(4, 4)) as url:
        yield url


def call(url: str, body: Any = None, method: str = "GET") -> tuple[int, Any]:
    data = None if body is None else (body if isinstance(body, bytes) else json.dumps(body).encode())
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            text = answer.read().decode()
            return answer.status, json.loads(text) if text.startswith(("{", "[")) else text
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def events(text: str) -> list[Any]:
    payloads = [block.removeprefix("data: ") for block in text.split("\n\n") if block]
    return [p if p == "[DONE]" else json.loads(p) for p in payloads]


def test_a_stream_has_one_event_a_token_then_a_finish_then_usage(constant_url: str) -> None:
    """Completions: m tokens, a finish reason, usage when asked for, [DONE]."""
    body = {"model": "constant", "prompt": list(range(30)), "max_tokens": 7, "stream": True, "ignore_eos": True}
    status, text = call(f"{constant_url}/v1/completions", body | {"stream_options": {"include_usage": True}}, "POST")
    assert status == 200
    *tokens, finish, usage, done = events(text)
    assert [t["choices"][0]["text"] for t in tokens] == [" tok"] * 7
    assert finish["choices"][0]["finish_reason"] == "length"
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 30, "completion_tokens": 7, "total_tokens": 37}
    assert done == "[DONE]"
    assert "usage" not in call(f"{constant_url}/v1/completions", body, "POST")[1]


def test_chat_counts_words_and_starts_with_the_role(constant_url: str) -> None:
    """Chat: the first chunk carries the role beside its token; a word is a token."""
    body = {
        "model": "constant",
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "one two three"}],
        "max_completion_tokens": 3,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    *tokens, _, usage, _ = events(call(f"{constant_url}/v1/chat/completions", body, "POST")[1])
    assert tokens[0]["choices"][0]["delta"] == {"role": "assistant", "content": " tok"}
    assert [t["choices"][0]["delta"]["content"] for t in tokens] == [" tok"] * 3
    assert usage["usage"]["prompt_tokens"] == 5


def test_an_answer_may_come_in_one_piece(constant_url: str) -> None:
    """Without ``stream`` the whole answer comes as one JSON object."""
    status, answer = call(f"{constant_url}/v1/completions", {"prompt": "a b c", "max_tokens": 4}, "POST")
    assert status == 200
    assert answer["choices"][0]["text"] == " tok" * 4
    assert answer["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/v1/completions", b"{not json", 400, "not JSON"),
        ("/v1/completions", [1, 2], 400, "JSON object"),
        ("/v1/completions", {"prompt": ""}, 400, "empty"),
        ("/v1/completions", {"prompt": [True]}, 400, "token ids"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
        ("/v1/completions", {"prompt": "a", "max_tokens": "many"}, 400, "max_tokens"),
        ("/v1/completions", {"prompt": "a", "model": "gpt-9"}, 404, "does not exist"),
        ("/v1/chat/completions", {"messages": []}, 400, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}, 400, "content"),
    ],
)
def test_a_bad_request_is_refused_as_openai_does(demo_url: str, path: str, body: Any, status: int, words: str) -> None:
    """Each wrong request gets its status and an error object that says what is wrong."""
    got, answer = call(demo_url + path, body, "POST")
    assert got == status
    assert words in answer["error"]["message"]


def test_models_health_and_metrics_are_there(demo_url: str) -> None:
    """The model list names the profile; metrics have every worker with its role."""
    assert call(f"{demo_url}/v1/models")[1]["data"][0]["id"] == "demo"
    assert call(f"{demo_url}/health")[1]["status"] == "ok"
    text = call(f"{demo_url}/metrics")[1]
    for name in ("waiting_requests", "running_requests", "busy_seconds_total", "steps_total", "prompt_tokens_total"):
        assert text.count(f"\nsteelyard_{name}{{") == 8
    assert 'steelyard_fleet_workers{role="prefill"}' in text


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        {"prefill": 0, "decode": 8},
        {"prefill": 9, "decode": 0},
        {"prefill": 4, "decode": 5},
        {"prefill": True, "decode": 7},
    ],
)
def test_an_impossible_fleet_is_refused(demo_url: str, body: Any) -> None:
    """0:8, 9:0 of 8, another size, no numbers: 400 with one line, and nothing changes."""
    before = call(f"{demo_url}/fleet")[1]
    status, answer = call(f"{demo_url}/fleet", body, "PUT")
    assert status == 400
    assert "\n" not in answer["error"]["message"]
    assert call(f"{demo_url}/fleet")[1] == before


def test_a_fleet_is_put_in_force() -> None:
    """PUT /fleet answers 202; after drain and flip the fleet is the one asked for, and the metrics say so."""
    with embedded("demo", Fleet(4, 4)) as url:
        status, answer = call(f"{url}/fleet", {"prefill": 2, "decode": 6}, "PUT")
        assert status == 202
        assert answer["target"] == {"prefill": 2, "decode": 6}
        assert answer["draining"] == 2
        end = time.monotonic() + 10
        while call(f"{url}/fleet")[1]["draining"] and time.monotonic() < end:
            time.sleep(0.05)
        answer = call(f"{url}/fleet")[1]
        assert (answer["prefill"], answer["decode"], answer["draining"]) == (2, 6, 0)
        assert 'steelyard_fleet_workers{role="decode"} 6.0' in call(f"{url}/metrics")[1]


@pytest.mark.parametrize(("kind", "seen"), [("status", 500), ("html", "<!doctype html>")])
def test_every_nth_request_fails_on_demand(kind: str, seen: Any) -> None:
    """Faults come when asked for, and only then."""
    with embedded("constant", Fleet(1, 1), fail_every=3, fail_kind=kind) as url:
        answers = [call(f"{url}/v1/completions", {"prompt": "a", "max_tokens": 1}, "POST") for _ in range(6)]
    failed = [
        i for i, (status, text) in enumerate(answers) if status == seen or (isinstance(text, str) and seen == text[:15])
    ]
    assert failed == [2, 5]


def test_other_addresses_need_a_token() -> None:
    """Binding beyond loopback without a token is refused; with one, requests without it are."""
    with pytest.raises(EndpointError, match="token"), embedded("demo", Fleet(1, 1), host="0.0.0.0"):
        pass
    with embedded("demo", Fleet(1, 1), token="t0p") as url:
        assert call(f"{url}/v1/models")[0] == 401
        assert call(f"{url}/health")[0] == 200


@pytest.mark.parametrize("fleet", [Fleet(0, 0, 2), Fleet(1, 1, 1)])
def test_roles_on_demand_take_no_mixed_workers(fleet: Fleet) -> None:
    """A mixed worker would take no phase: it would stand idle, and a fleet of such would answer nothing. It is refused."""

    def ready(url: str) -> None:
        raise AssertionError(f"it serves at {url}")

    with pytest.raises(InputError, match=rf"on-demand takes no mixed workers \(got {re.escape(str(fleet))}\)"):
        asyncio.run(serve(Profile.load("demo"), fleet, on_demand=True, ready=ready))


def test_a_port_in_use_is_one_line(demo_url: str) -> None:
    """A second server on the same port says so and ends."""
    with (
        pytest.raises(EndpointError, match="cannot listen"),
        embedded("demo", Fleet(1, 1), port=int(demo_url.rsplit(":", 1)[1])),
    ):
        pass


async def _ask(session: aiohttp.ClientSession, url: str, model: str, at: float, index: int, n: int, m: int) -> None:
    await asyncio.sleep(max(0.0, at - time.monotonic()))
    body = {"model": model, "prompt": [1] * n, "max_tokens": m, "stream": True}
    async with session.post(f"{url}/v1/completions", json=body, headers={"x-request-id": str(index)}) as answer:
        await answer.read()


@pytest.mark.timed
def test_the_server_keeps_the_simulators_schedule() -> None:
    """On the arrivals that its kernel took, the server's own model times are the simulator's; it takes a request soon after it
    came, and its writes follow its model times closely."""
    rng = np.random.default_rng(3)
    n = 60
    prompts, outputs = rng.integers(50, 3000, n), rng.integers(2, 60, n)
    due = np.cumsum(rng.exponential(0.05, n))

    async def load(url: str) -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            start = time.monotonic() + 0.2
            rows = zip(due.tolist(), range(n), prompts.tolist(), outputs.tolist(), strict=True)
            await asyncio.gather(*(_ask(session, url, "demo", start + at, i, p, m) for at, i, p, m in rows))

    with embedded("demo", Fleet(2, 2)) as url:
        asyncio.run(load(url))
        log = list(csv.DictReader(io.StringIO(call(f"{url}/log")[1])))
    assert len(log) == n
    log.sort(key=lambda r: float(r["model_arrive_s"]))

    def column(name: str) -> Floats:
        return np.array([float(r[name]) for r in log])

    taken = column("model_arrive_s")
    seen = Schedule(
        "seen",
        np.array([int(r["id"]) for r in log]),
        taken - taken[0],
        np.array([int(r["prompt_tokens"]) for r in log]),
        np.array([int(r["output_tokens"]) for r in log]),
    )
    assert seen.prompt_tokens.tolist() == prompts[seen.index].tolist()
    assert seen.output_tokens.tolist() == outputs[seen.index].tolist()
    rows = simulate(seen, Fleet(2, 2), Profile.load("demo")).observations
    first, last = column("model_first_s"), column("model_last_s")
    np.testing.assert_allclose(rows.first_token_s, first - taken[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(rows.last_token_s, last - taken[0], rtol=0, atol=1e-6)
    for after, before in ((taken, column("arrive_s")), (column("first_s"), first), (column("last_s"), last)):
        assert (after - before).min() > -0.001
        assert float(np.median(after - before)) < 0.002


class Ticking(Endpoint):
    """Every reading of the clock is 3 ms later than the one before."""

    read_s = 0.0

    def now_s(self) -> float:
        self.read_s += 0.003
        return self.read_s


def test_no_token_is_lost_between_two_readings_of_the_clock() -> None:
    """A request may come at the very moment at which a batch ends: the step's tokens are written before it is over."""

    async def serve() -> list[int]:
        endpoint = Ticking(Profile.load("demo"), Fleet(1, 1))
        streams = [Stream(str(k), None, b"", b"") for k in range(80)]
        for stream in streams:
            endpoint.submit(stream, 100, 20)
        for _ in range(5000):
            endpoint.run_due()
        return [stream.sent for stream in streams]

    assert asyncio.run(serve()) == [20] * 80


def test_a_client_that_leaves_takes_nothing_from_the_others() -> None:
    """Of two answers in a batch one is given up in the middle: the other has its tokens once, and no counter falls."""

    async def serve() -> tuple[int, list[float]]:
        endpoint = Ticking(Profile.load("demo"), Fleet(1, 1))
        first, second = (Stream(str(k), None, b"", b"") for k in range(2))
        jobs = [endpoint.submit(stream, 100, 200) for stream in (first, second)]
        made: list[float] = []
        while not second.done.done():
            endpoint.run_due()
            if second.sent >= 100 and not jobs[0].gone:
                endpoint.cancel(jobs[0])
            made.append(sum(s.output_tokens_total or 0 for s in endpoint.cluster.samples(endpoint.read_s)))
        return second.sent, made

    sent, made = asyncio.run(serve())
    assert sent == 200
    assert made == sorted(made)


def test_a_client_that_leaves_frees_the_cluster(demo_url: str) -> None:
    """A client that disconnects in the middle leaves nothing running."""

    async def leave() -> None:
        async with aiohttp.ClientSession() as session:
            body = {"model": "demo", "prompt": [1] * 10, "max_tokens": 5000, "stream": True}
            answer = await session.post(f"{demo_url}/v1/completions", json=body)
            await answer.content.readany()
            answer.close()

    asyncio.run(leave())
    end = time.monotonic() + 30
    while time.monotonic() < end:
        text = call(f"{demo_url}/metrics")[1]
        running = [float(x.rsplit(" ", 1)[1]) for x in text.splitlines() if x.startswith("steelyard_running_requests{")]
        if sum(running) == 0:
            return
        time.sleep(0.1)
    pytest.fail("a sequence is still running after its client has left")


# --- every mechanism of the model, served ----------------------------------------------------------------------------


def stream_of(url: str, prompt: Any, tokens: int, timeout: float = 20.0) -> tuple[list[Any], Exception | None]:
    """(events, how the connection failed)."""
    model = call(f"{url}/v1/models")[1]["data"][0]["id"]
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    held = b""
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            while piece := answer.read1(65536):
                held += piece
    except (OSError, http.client.HTTPException) as error:
        return events(held.decode()), error
    return events(held.decode()), None


def test_a_stream_can_be_made_to_break_in_the_middle() -> None:
    """reset-mid cuts the connection after half of the answer; stall-mid stops there and keeps it open."""
    with embedded("constant", Fleet(1, 1), fail_every=2, fail_kind="reset-mid") as url:
        whole, error = stream_of(url, [1, 2, 3], 8)
        assert error is None
        assert whole[-1] == "[DONE]"
        half, error = stream_of(url, [1, 2, 3], 8)
        assert error is not None
        assert len(half) == 4
        stream_of(url, [1, 2, 3], 1)
        one, error = stream_of(url, [1, 2, 3], 1)  # its one token is all, and its end does not come
        assert isinstance(error, ConnectionError | http.client.HTTPException)
        assert len(one) == 1
    with embedded("constant", Fleet(1, 1), fail_every=1, fail_kind="stall-mid") as url:
        half, error = stream_of(url, [1, 2, 3], 8, timeout=5.0)
        assert isinstance(error, TimeoutError)
        assert len(half) == 4


def test_a_server_can_start_slowly() -> None:
    """Until then completions are refused with 503 and how long to wait; then they are served."""
    with embedded("constant", Fleet(1, 1), slow_start_s=5.0) as url:
        status, said = call(f"{url}/v1/completions", {"model": "constant", "prompt": [1], "max_tokens": 1}, "POST")
        assert (status, said["error"]["message"]) == (503, "the server is still starting")
        until = time.monotonic() + 30
        while status == 503 and time.monotonic() < until:
            time.sleep(0.1)
            status, _ = call(f"{url}/v1/completions", {"model": "constant", "prompt": [1], "max_tokens": 1}, "POST")
        assert status == 200


@pytest.mark.parametrize("spoken", ["vllm", "sglang", "dynamo"])
def test_metrics_speak_the_names_of_other_engines(spoken: str) -> None:
    """What the endpoint shows as another engine is read by that engine's own table, by worker and role."""
    from loadgen.engines import Worker
    from loadgen.scrape import samples

    with embedded("demo", Fleet(1, 2), dialect=spoken) as url:
        stream_of(url, list(range(50)), 4)
        with urllib.request.urlopen(f"{url}/metrics", timeout=20) as answer:
            text = answer.read().decode()
    assert "steelyard_" not in text
    found = {(s.worker, s.role): s for s in samples(text, Worker(""), 0.0)}
    assert set(found) == {("0", "prefill"), ("1", "decode"), ("2", "decode")}
    assert found["0", "prefill"].prompt_tokens_total == 50
    assert found["0", "prefill"].waiting_tokens == (0.0 if spoken == "dynamo" else None)
    assert sum(found[str(w), "decode"].output_tokens_total or 0 for w in (1, 2)) == 4


def test_a_prompt_that_shares_a_head_says_how_much_was_cached(tmp_path: Path) -> None:
    """With a prefix cache the usage counts cached tokens in whole blocks, as OpenAI shapes it."""
    laws = replace(Profile.load("demo"), cache_tokens=4096)
    path = tmp_path / "cached.toml"
    path.write_text(laws.to_toml())
    with embedded(str(path), Fleet(1, 1)) as url:
        head = list(range(100))
        for prompt, cached in ((head, 0), ([*head, 7, 8, 9], 96), ([5, *head], 0)):
            usage = stream_of(url, prompt, 2)[0][-2]["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] == cached
            assert usage["prompt_tokens"] == len(prompt)


@pytest.mark.parametrize(
    ("fleet", "on_demand", "changes"),
    [
        (Fleet(0, 0, 2), False, {}),
        (Fleet(1, 1, 1), False, {"chunked": True, "max_batch_tokens": 150}),
        (Fleet(2, 1), True, {"flip_s": 0.05, "max_batch": 2}),
        (Fleet(1, 1), False, {"kv_tokens": 700, "kv_policy": "preempt", "knee_batch": 2, "knee_s": 0.004}),
        (Fleet(2, 2), False, {"transfer_link": "shared", "transfer_s_per_token": 1e-4, "worker_speed": (1.0, 2.0)}),
    ],
)
def test_the_server_keeps_the_models_schedule_with_every_mechanism(
    fleet: Fleet, on_demand: bool, changes: dict[str, Any], tmp_path: Path
) -> None:
    """Arrivals as the kernel saw them, simulated, give the server's own first and last tokens to the microsecond."""
    path = tmp_path / "p.toml"
    laws = replace(Profile.load("demo"), **changes)
    path.write_text(laws.to_toml())
    rng = np.random.default_rng(5)
    n = 25
    prompts, outputs = rng.integers(20, 400, n), rng.integers(2, 25, n)

    async def ask(url: str) -> None:
        async with aiohttp.ClientSession() as session:
            start = time.monotonic() + 0.2
            rows = zip(range(n), prompts.tolist(), outputs.tolist(), strict=True)
            await asyncio.gather(*(_ask(session, url, laws.name, start + i * 0.04, i, p, m) for i, p, m in rows))

    with embedded(str(path), fleet, on_demand=on_demand) as url:
        asyncio.run(ask(url))
        log = list(csv.DictReader(io.StringIO(call(f"{url}/log")[1])))
        switches = call(f"{url}/health")[1]["switches"]
    assert len(log) == n
    log.sort(key=lambda row: float(row["model_arrive_s"]))
    due = np.array([float(row["model_arrive_s"]) for row in log])
    order = [int(row["id"]) for row in log]
    schedule = Schedule("s", np.arange(n), due - due[0], prompts[order], outputs[order])
    rows = simulate(schedule, fleet, laws, on_demand=next_phase if on_demand else None).observations
    for ours, theirs in (("first_token_s", "model_first_s"), ("last_token_s", "model_last_s")):
        served = np.array([float(row[theirs]) for row in log]) - due[0]
        np.testing.assert_allclose(getattr(rows, ours), served, rtol=0, atol=1e-6)
    if on_demand:
        assert switches > 0
