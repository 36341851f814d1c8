"""The cluster at wall-clock speed: an OpenAI-shaped HTTP endpoint on the same kernel that the simulator runs.

Model time is monotonic time since start x ``speed``. The kernel decides every instant; one timer wakes the loop when
the next token or event is due and writes all that is due. The endpoint never decides late because it *is* late: a late
wake-up writes late, and that lateness is measured (GET /health), but the model's own times stay exact.

Tokens are words of text (split at white space) or the entries of a list of token ids.
"""

from __future__ import annotations

import asyncio
import csv
import io
import itertools
import json
import math
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from heapq import heappop, heappush
from typing import Any

import numpy as np
import uvloop
from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from loadgen import engines
from loadgen.cluster.kernel import Cluster, Job, Worker
from loadgen.cluster.laws import Profile
from loadgen.policy import next_phase
from loadgen.ports import HERE, Door
from traces.errors import EndpointError, InputError
from traces.records import Fleet, Sample

MOST_BODY = 64 << 20
MOST_BUFFERED = 1 << 20
"""Bytes that may wait for a client that does not read; beyond that its connection is cut."""

BLOCK_TOKENS = 16
"""Tokens of a block of the served prefix cache (vLLM's default)."""

LATE_STEPS = 1_000_000
"""Steps whose lateness is remembered."""

LOG_ROWS = 200_000
FAULTS = ("status", "reset", "stall", "html", "reset-mid", "stall-mid")
LOG_COLUMNS = (
    "id",
    "arrive_s",
    "first_s",
    "last_s",
    "model_arrive_s",
    "model_first_s",
    "model_last_s",
    "prompt_tokens",
    "output_tokens",
    "prefill_worker",
    "decode_worker",
)


METRICS: dict[str, tuple[Any, str]] = {
    "waiting_requests": (GaugeMetricFamily, "requests queued (prefill) or waiting to be admitted (decode)"),
    "running_requests": (GaugeMetricFamily, "requests in the current batch"),
    "waiting_tokens": (GaugeMetricFamily, "prompt tokens queued"),
    "kv_used_tokens": (GaugeMetricFamily, "tokens of KV cache in place"),
    "kv_used_ratio": (GaugeMetricFamily, "share of the KV cache that is in use, or reserved where whole answers are"),
    "busy_s_total": (CounterMetricFamily, "seconds with work in hand"),
    "steps_total": (CounterMetricFamily, "forward passes"),
    "prompt_tokens_total": (CounterMetricFamily, "prompt tokens processed"),
    "output_tokens_total": (CounterMetricFamily, "output tokens made"),
    "finished_total": (CounterMetricFamily, "requests that left this worker"),
    "preemptions_total": (CounterMetricFamily, "sequences put back for want of KV cache"),
}
"""Fields of a Sample -> how they are shown."""


def _names(engine: str) -> dict[str, str]:
    """Field of a Sample -> the engine's name of it, from the table by which it is read; of two spellings the first."""
    plain = [m for m in engines.engine(engine).metrics if not (m.histogram or m.part or m.times or m.per or m.where)]
    return {m.to: m.name for m in reversed(plain) if m.to in METRICS and not m.of}


SPOKEN: dict[str, dict[str, str]] = {
    "steelyard": {name: f"steelyard_{name}" for name in METRICS}
    | {"busy_s_total": "steelyard_busy_seconds_total", "finished_total": "steelyard_finished_requests_total"},
    "vllm": _names("vllm"),
    "sglang": _names("sglang"),
    # A Dynamo worker passes its engine's metrics through, here vLLM's.
    "dynamo": _names("vllm") | {"waiting_tokens": "dynamo_frontend_worker_active_prefill_tokens"},
}
"""--dialect -> field of a Sample -> its name on /metrics. What an engine does not count is not there."""


def labels_of(dialect: str, sample: Sample, model: str) -> dict[str, str]:
    """The labels of one worker's metrics. vLLM and SGLang say less: worker numbers and role are added to their own."""
    if dialect == "vllm":
        return {"engine": sample.worker, "model_name": model, "role": sample.role}
    if dialect == "sglang":
        return {"model_name": model, "engine_type": sample.role, "tp_rank": sample.worker}
    if dialect == "dynamo":
        return {"worker_id": sample.worker, "worker_type": sample.role, "dp_rank": "0", "model_name": model}
    return {"worker": sample.worker, "role": sample.role}


@dataclass(frozen=True, slots=True)
class Faults:
    """Failures to order: every Nth completion fails in one of FAULTS' ways; until slow_start_s all get 503."""

    every: int = 0
    kind: str = "status"
    slow_start_s: float = 0.0


NO_FAULTS = Faults()


class Stream:
    """One answer on its way out."""

    __slots__ = ("arrive_s", "done", "fault", "first_s", "frame", "id", "job", "last_s", "opening", "sent", "transport")

    def __init__(self, id: str, transport: asyncio.WriteTransport | None, opening: bytes, frame: bytes) -> None:
        self.id = id
        self.transport = transport  # None: the answer is sent in one piece
        self.opening = opening  # the first token's bytes, chunk framing included
        self.frame = frame  # every other token's
        self.arrive_s = time.monotonic()
        self.first_s = self.last_s = math.nan
        self.sent = 0
        self.fault: tuple[int, str] | None = None  # (after so many tokens, reset-mid or stall-mid)
        self.job: Job | None = None
        self.done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()


class Endpoint:
    """The kernel, a clock and the streams. All methods run in the event loop's thread."""

    def __init__(
        self,
        profile: Profile,
        fleet: Fleet,
        *,
        speed: float = 1.0,
        on_demand: bool = False,
        dialect: str = "steelyard",
    ) -> None:
        self.profile = profile
        self.speed = speed
        self.dialect = dialect
        self.cluster = Cluster(
            profile,
            fleet,
            on_segment=self._segment,
            on_finish=self._finish,
            on_demand=next_phase if on_demand else None,
            block_tokens=BLOCK_TOKENS if profile.cache_tokens else 0,
        )
        self.zero_s = time.monotonic()
        self.log: deque[tuple[Any, ...]] = deque(maxlen=LOG_ROWS)
        self.late_ms: deque[float] = deque(maxlen=LATE_STEPS)
        self.late_steps = 0
        self.requests = itertools.count(1)
        self._ids = itertools.count()
        self._order = itertools.count()
        self._steps: list[tuple[float, int, Worker | Job, int, int]] = []
        self._segment_of: dict[int, int] = {}
        self._active: dict[int, list[Job]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf

    def now_s(self) -> float:
        """Model seconds since start."""
        return (time.monotonic() - self.zero_s) * self.speed

    def submit(self, stream: Stream, prompt_tokens: int, output_tokens: int, blocks: Sequence[int] = ()) -> Job:
        """A request arrives now."""
        now = self.now_s()
        self.run_due(now)
        job = Job(next(self._ids), prompt_tokens, output_tokens, now, stream, blocks)
        stream.job = job
        p = self.profile
        if p.discipline == "infinite":
            n = prompt_tokens
            occupied = p.a_s + p.b_s_per_token * n + p.c_s_per_token2 * n * n
            job.first_s = now + occupied + p.overhead_s + p.transfer_t0_s + p.transfer_s_per_token * n + p.c0_s
            heappush(self._steps, (job.first_s, next(self._order), job, 1, 0))
        else:
            self.cluster.advance(now)
            self.cluster.submit(job)
        self._arm()
        return job

    def set_fleet(self, fleet: Fleet) -> None:
        """Ask for another P:D, from now."""
        now = self.now_s()
        self.run_due(now)
        self.cluster.advance(now)
        self.cluster.set_fleet(fleet)
        self._arm()

    def cancel(self, job: Job) -> None:
        """The client went away."""
        now = self.now_s()
        self.run_due(now)
        self.cluster.advance(now)  # or the step it leaves after would be counted from the last event
        self.cluster.cancel(job)
        self._arm()

    # --- the clock -------------------------------------------------------------------------------------------------

    def run_due(self, until_s: float | None = None) -> None:
        """Write every token and process every event that is due, in model order (a step's tokens before its boundary).

        until_s: an instant read before; who advances the cluster to it must write to the same one, or a boundary that
        falls between two readings of the clock takes the tokens of its step with it.
        """
        now = self.now_s() if until_s is None else until_s
        steps, cluster = self._steps, self.cluster
        while True:
            event = cluster.next_s
            if steps and steps[0][0] <= event:
                if steps[0][0] > now:
                    return
                at, _, who, n, segment = heappop(steps)
                if isinstance(who, Worker):
                    if self._segment_of.get(who.id) == segment:
                        self._step(who, n, at, segment)
                else:
                    self._lone(who, n, at)
            elif event <= now:
                cluster.advance(event)
            else:
                return

    def _arm(self) -> None:
        at = self.cluster.next_s
        if self._steps and self._steps[0][0] < at:
            at = self._steps[0][0]
        if at == self._timer_at and self._timer is not None:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._timer_at = at
        if at < math.inf:
            wait = (self.zero_s + at / self.speed) - time.monotonic()
            self._timer = asyncio.get_running_loop().call_later(max(0.0, wait), self._wake)

    def _wake(self) -> None:
        self._timer = None
        self.run_due()
        self._arm()

    def _segment(self, worker: Worker) -> None:
        """A decode worker's batch has changed: a new run of steps begins."""
        segment = self._segment_of.get(worker.id, 0) + 1
        self._segment_of[worker.id] = segment
        jobs = [
            job
            for due, _, job in worker.finishing
            if due == job.finish_step and due > worker.step and job.decode_worker == worker.id
        ]
        self._active[worker.id] = jobs
        if jobs:
            at = worker.t0 + worker.span_s(1)
            heappush(self._steps, (at, next(self._order), worker, 1, segment))

    def _step(self, worker: Worker, n: int, at: float, segment: int) -> None:
        for job in self._active[worker.id]:
            self._token(job, at)
        self._late(at)
        if n < worker.next_n:
            ahead = worker.t0 + worker.span_s(n + 1)
            heappush(self._steps, (ahead, next(self._order), worker, n + 1, segment))

    def _lone(self, job: Job, n: int, at: float) -> None:
        if job.gone:
            return
        self._token(job, at)
        self._late(at)
        if n < job.output_tokens:
            ahead = job.first_s + n * self.profile.c0_s
            heappush(self._steps, (ahead, next(self._order), job, n + 1, 0))
        else:
            job.finish_s = at
            self._finish(job)

    def _late(self, at: float) -> None:
        self.late_steps += 1
        self.late_ms.append((time.monotonic() - self.zero_s - at / self.speed) * 1e3)

    def _token(self, job: Job, at: float) -> None:
        stream = job.tag
        if not isinstance(stream, Stream) or job.gone:
            return
        if stream.fault is not None and stream.sent >= stream.fault[0]:
            self._reset(stream)
            return
        stream.sent += 1
        now = time.monotonic()
        if stream.sent == 1:
            stream.first_s = now
        stream.last_s = now
        transport = stream.transport
        if transport is None:
            return
        if transport.is_closing() or transport.get_write_buffer_size() > MOST_BUFFERED:
            transport.abort()
            if not stream.done.done():
                stream.done.set_result(False)
            return
        transport.write(stream.opening if stream.sent == 1 else stream.frame)

    def _reset(self, stream: Stream) -> None:
        """Cut the connection of an answer that is to break in the middle; one that is to stall stays as it is."""
        if stream.fault and stream.fault[1] == "reset-mid" and stream.transport is not None and not stream.done.done():
            stream.transport.abort()
            stream.done.set_result(False)

    def _finish(self, job: Job) -> None:
        stream = job.tag
        if not isinstance(stream, Stream):
            return
        zero, speed = self.zero_s, self.speed
        self.log.append(
            (
                stream.id,
                stream.arrive_s,
                stream.first_s,
                stream.last_s,
                zero + job.arrive_s / speed,
                zero + job.first_s / speed,
                zero + job.finish_s / speed,
                job.prompt_tokens,
                stream.sent,
                job.prefill_worker,
                job.decode_worker,
            )
        )
        if stream.fault is not None:
            self._reset(stream)  # an answer of one token has no other in whose place it could break
        elif not stream.done.done():
            stream.done.set_result(True)

    def busy_s(self) -> dict[str, float]:
        """Model seconds with work in hand, over all workers, by the role they had."""
        self.run_due()
        now = self.now_s()
        return {r: sum(w.busy_until(now, r) for w in self.cluster.workers) for r in ("prefill", "decode", "mixed")}

    def lateness(self, after: int = 0) -> dict[str, float]:
        """How late tokens were written, ms, over the steps after the ``after``th: p50, p99, max; steps: how many ever."""
        held = len(self.late_ms)
        late = np.fromiter(self.late_ms, dtype=float, count=held)[max(0, held - max(0, self.late_steps - after)) :]
        if not len(late):
            return {"p50_ms": 0.0, "p99_ms": 0.0, "max_ms": 0.0, "steps": self.late_steps}
        p50, p99 = np.quantile(late, [0.5, 0.99])
        return {"p50_ms": float(p50), "p99_ms": float(p99), "max_ms": float(late.max()), "steps": self.late_steps}

    # --- metrics ---------------------------------------------------------------------------------------------------

    def collect(self) -> Iterator[Metric]:
        """Prometheus metrics by worker and role."""
        self.run_due()
        now = self.now_s()
        families: dict[str, Any] = {}
        for sample in self.cluster.samples(now):
            labels = labels_of(self.dialect, sample, self.profile.name)
            for name, shown in SPOKEN[self.dialect].items():
                kind, text = METRICS[name]
                value = getattr(sample, name)
                if value is None:
                    continue
                if name not in families:
                    families[name] = kind(shown.removesuffix("_total"), text, labels=list(labels))
                families[name].add_metric(
                    list(labels.values()), value / self.speed if name == "busy_s_total" else value
                )
        yield from families.values()
        if self.dialect != "steelyard":
            return
        fleet = GaugeMetricFamily("steelyard_fleet_workers", "workers in service", labels=["role"])
        for role, n in zip(("prefill", "decode", "mixed"), self.cluster.fleet, strict=True):
            fleet.add_metric([role], n)
        yield fleet
        switches = CounterMetricFamily("steelyard_role_switches", "role changes begun")
        switches.add_metric([], len(self.cluster.switches))
        yield switches


# --- HTTP -----------------------------------------------------------------------------------------------------------


def refuse(message: str, status: int = 400, kind: str = "invalid_request_error") -> web.Response:
    """An error as OpenAI shapes it."""
    return web.json_response({"error": {"message": message, "type": kind, "code": status}}, status=status)


def chunk(payload: bytes) -> bytes:
    """One HTTP chunk."""
    return b"%x\r\n%s\r\n" % (len(payload), payload)


def event(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def make_app(endpoint: Endpoint, *, door: Door = HERE, faults: Faults = NO_FAULTS) -> web.Application:
    """The aiohttp application. The door's token is needed as bearer on every path but /health; another page's requests are
    refused on all."""

    @web.middleware
    async def guard(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if strange := door.foreign(request.headers):
            return refuse(strange[1], strange[0], "permission_error")
        if request.path != "/health" and not door.bearer(request.headers.get("Authorization", "")):
            return refuse("a bearer token is needed", 401, "authentication_error")
        return await handler(request)

    app = web.Application(client_max_size=MOST_BODY, middlewares=[guard])
    registry = CollectorRegistry(auto_describe=False)
    registry.register(endpoint)

    async def complete(request: web.Request) -> web.StreamResponse:
        return await _complete(endpoint, request, faults)

    async def models(_: web.Request) -> web.Response:
        return web.json_response(
            {"object": "list", "data": [{"id": endpoint.profile.name, "object": "model", "owned_by": "steelyard"}]}
        )

    async def health(request: web.Request) -> web.Response:
        after = request.query.get("after", "0")
        return web.json_response(
            {
                "status": "ok",
                "engine": "steelyard-reference",
                "profile": endpoint.profile.name,
                "speed": endpoint.speed,
                "switches": len(endpoint.cluster.switches),
                "busy_s": endpoint.busy_s(),
                "late": endpoint.lateness(int(after) if after.isdecimal() and len(after) < 16 else 0),
            }
        )

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"Content-Type": "text/plain; version=0.0.4"})

    async def get_fleet(_: web.Request) -> web.Response:
        return web.json_response(_fleet(endpoint))

    async def put_fleet(request: web.Request) -> web.Response:
        workers = len(endpoint.cluster.workers)
        try:
            body = await request.json()
            prefill, decode, mixed = body["prefill"], body["decode"], body.get("mixed", 0)
        except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError):
            return refuse('PUT /fleet takes {"prefill": 3, "decode": 5}')
        if any(isinstance(n, bool) or not isinstance(n, int) for n in (prefill, decode, mixed)):
            return refuse(f"prefill, decode and mixed must be integers (got {prefill!r}, {decode!r}, {mixed!r})")
        try:
            endpoint.set_fleet(Fleet(prefill, decode, mixed))
        except (InputError, ValueError) as error:
            half = max(1, workers // 2)
            return refuse(
                f"fleet {prefill}:{decode} is impossible ({str(error).rstrip('.')}): {workers} workers, at least one a "
                f"role, all in use. Try {half}:{workers - half}."
            )
        return web.json_response(_fleet(endpoint), status=202)

    async def log(_: web.Request) -> web.Response:
        out = io.StringIO()
        writer = csv.writer(out)
        writer.writerow(LOG_COLUMNS)
        writer.writerows(endpoint.log)
        return web.Response(text=out.getvalue(), content_type="text/csv")

    app.router.add_post("/v1/completions", complete)
    app.router.add_post("/v1/chat/completions", complete)
    app.router.add_get("/v1/models", models)
    app.router.add_get("/health", health)
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/fleet", get_fleet)
    app.router.add_put("/fleet", put_fleet)
    app.router.add_get("/log", log)
    return app


def _fleet(endpoint: Endpoint) -> dict[str, Any]:
    endpoint.run_due()
    cluster = endpoint.cluster
    now, target = dict(zip(("prefill", "decode", "mixed"), cluster.fleet, strict=True)), asdict(cluster.target)
    if not now["mixed"] and not target["mixed"]:
        del now["mixed"], target["mixed"]
    return now | {"target": target, "draining": cluster.changing}


def _asked(body: Any, chat: bool) -> tuple[int, int]:
    """Prompt tokens and answer tokens of a request body. InputError says what is wrong."""
    if not isinstance(body, dict):
        raise InputError("the body must be a JSON object")
    if chat:
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise InputError("messages must be a list that is not empty")
        prompt = 0
        for message in messages:
            prompt += len(_content(message).split())
    else:
        given = body.get("prompt")
        if isinstance(given, str):
            prompt = len(given.split())
        elif isinstance(given, list) and given and all(type(t) is int for t in given):
            prompt = len(given)
        else:
            raise InputError("prompt must be text or a list of token ids")
    if prompt < 1:
        raise InputError("the prompt is empty")
    most = body.get("max_tokens", body.get("max_completion_tokens", 16))
    if isinstance(most, bool) or not isinstance(most, int) or not 1 <= most <= 1_000_000:
        raise InputError(f"max_tokens must be an integer from 1 to 1000000 (got {most!r})")
    return prompt, most


def _content(message: Any) -> str:
    """The text of a chat message, also where it comes in parts."""
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        content = " ".join(part for part in parts if isinstance(part, str)) if parts else None
    if not isinstance(content, str):
        raise InputError("a message needs a role and text content")
    return content


def _blocks(body: Any, chat: bool) -> list[int]:
    """Ids of the prompt's whole blocks, each standing for itself and all before it."""
    if chat:
        tokens: list[Any] = [word for message in body["messages"] for word in _content(message).split()]
    else:
        tokens = body["prompt"].split() if isinstance(body["prompt"], str) else body["prompt"]
    ids: list[int] = []
    held = 0
    for first in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        held = hash((held, tuple(tokens[first : first + BLOCK_TOKENS])))
        ids.append(held)
    return ids


async def _complete(endpoint: Endpoint, request: web.Request, faults: Faults) -> web.StreamResponse:
    arrive_s = time.monotonic()
    number = next(endpoint.requests)
    chat = request.path == "/v1/chat/completions"
    try:
        body = await request.json()
    except (ValueError, UnicodeDecodeError, RecursionError):
        return refuse("the body is not JSON")
    try:
        prompt_tokens, output_tokens = _asked(body, chat)
    except InputError as error:
        return refuse(str(error))
    model = body.get("model", endpoint.profile.name)
    if model != endpoint.profile.name:
        return refuse(
            f"the model {str(model)[:80]!r} does not exist; served: {endpoint.profile.name!r}", 404, "not_found_error"
        )
    wait_s = faults.slow_start_s - (time.monotonic() - endpoint.zero_s)
    if wait_s > 0:
        answer = refuse("the server is still starting", 503, "server_error")
        answer.headers["Retry-After"] = str(math.ceil(wait_s))
        return answer
    fail_kind = faults.kind
    fails = bool(faults.every) and number % faults.every == 0
    if fails and not fail_kind.endswith("-mid"):
        if fail_kind == "reset":
            if request.transport is not None:
                request.transport.abort()
            return web.Response()
        if fail_kind == "stall":
            await asyncio.sleep(3600)
        if fail_kind == "html":
            return web.Response(text="<!doctype html><html><body>gateway</body></html>", content_type="text/html")
        return refuse("this request was told to fail", 500, "server_error")
    given = request.headers.get("x-request-id", "")
    name = given if given.isprintable() and 0 < len(given) <= 80 else f"r{number}"
    kind = "chat.completion" if chat else "text_completion"
    base = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{name}",
        "object": f"{kind}.chunk" if chat else kind,
        "created": int(time.time()),
        "model": endpoint.profile.name,
    }
    usage: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": prompt_tokens + output_tokens,
    }
    blocks = _blocks(body, chat) if endpoint.cluster.block_tokens else []
    if not body.get("stream"):
        stream = Stream(name, None, b"", b"")
        stream.arrive_s = arrive_s
        job = endpoint.submit(stream, prompt_tokens, output_tokens, blocks)
        try:
            await stream.done
        except asyncio.CancelledError:
            endpoint.cancel(job)
            raise
        text = " tok" * output_tokens
        choice = (
            {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "length"}
            if chat
            else {"index": 0, "text": text, "logprobs": None, "finish_reason": "length"}
        )
        return web.json_response(base | {"object": kind, "choices": [choice], "usage": usage})

    def token(role: bool) -> bytes:
        if chat:
            delta = {"role": "assistant", "content": " tok"} if role else {"content": " tok"}
            return event(base | {"choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}]})
        return event(base | {"choices": [{"index": 0, "text": " tok", "logprobs": None, "finish_reason": None}]})

    response = web.StreamResponse(
        headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
    )
    response.enable_chunked_encoding()
    await response.prepare(request)
    frame = chunk(token(False))
    stream = Stream(name, request.transport, chunk(token(True)) if chat else frame, frame)
    stream.arrive_s = arrive_s
    if fails:
        stream.fault = (max(1, output_tokens // 2), fail_kind)
    job = endpoint.submit(stream, prompt_tokens, output_tokens, blocks)
    try:
        whole = await stream.done
    except asyncio.CancelledError:
        endpoint.cancel(job)
        raise
    if not whole:
        endpoint.cancel(job)
        return response
    if endpoint.cluster.block_tokens:
        usage["prompt_tokens_details"] = {"cached_tokens": job.cached_tokens}
    empty: dict[str, Any] = {"delta": {}} if chat else {"text": ""}
    closing = event(base | {"choices": [{"index": 0, **empty, "logprobs": None, "finish_reason": "length"}]})
    options = body.get("stream_options")
    if isinstance(options, dict) and options.get("include_usage"):
        closing += event(base | {"choices": [], "usage": usage})
    await response.write(closing + b"data: [DONE]\n\n")
    await response.write_eof()
    return response


async def serve(
    profile: Profile,
    fleet: Fleet,
    *,
    door: Door = HERE,
    speed: float = 1.0,
    on_demand: bool = False,
    fail_every: int = 0,
    fail_kind: str = "status",
    slow_start_s: float = 0.0,
    dialect: str = "steelyard",
    ready: Callable[[str], None],
) -> None:
    """Serve until SIGTERM or SIGINT. ready(url) is called when requests are answered. EndpointError when it cannot bind."""
    if not speed > 0:
        raise InputError(f"--speed must be above 0 (got {speed:g}).")
    door.check("--host", "other machines could use this endpoint", "Set STEELYARD_SERVE_TOKEN or --token-file")
    tls = door.context()
    if dialect not in SPOKEN:
        raise InputError(f"--dialect must be one of {', '.join(SPOKEN)} (got {dialect!r}).")
    if on_demand and fleet.mixed:
        raise InputError(f"--roles on-demand takes no mixed workers (got {fleet}). Give a fleet P:D, such as 1:1.")
    endpoint = Endpoint(profile, fleet, speed=speed, on_demand=on_demand, dialect=dialect)
    app = make_app(endpoint, door=door, faults=Faults(fail_every, fail_kind, slow_start_s))
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
    await runner.setup()
    try:
        sock = door.bind()
    except EndpointError:
        await runner.cleanup()
        raise
    await web.SockSite(runner, sock, backlog=4096, ssl_context=tls).start()
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    ready(door.url(sock.getsockname()[1]))
    parent = os.getppid()
    watch = os.environ.get("STEELYARD_WITH_PARENT") == "1"
    while not stopping.is_set():
        try:
            await asyncio.wait_for(stopping.wait(), 1.0)
        except TimeoutError:
            # Started by a demo or a test that was killed: nobody is left to stop this endpoint.
            if watch and os.getppid() != parent:
                break
    await runner.cleanup()


def run(profile: Profile, fleet: Fleet, **options: Any) -> None:
    """:func:`serve` on uvloop, printing one line when it listens."""

    def ready(url: str) -> None:
        print(f"listening on {url}", flush=True)

    options.setdefault("ready", ready)
    uvloop.run(serve(profile, fleet, **options))


if __name__ == "__main__":
    chosen = json.loads(sys.argv[1])
    place = {name: chosen.pop(name) for name in ("host", "port", "cert", "key") if name in chosen}
    # The token of a child comes by its environment: everybody sees a command line.
    way = Door(**place, token=os.environ.get("STEELYARD_EMBEDDED_TOKEN"))
    run(Profile.load(chosen.pop("profile")), Fleet.parse(chosen.pop("fleet")), door=way, **chosen)
