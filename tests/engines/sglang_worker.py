"""A stand-in of an SGLang engine in PD mode, for the real router: its worker API, its bootstrap protocol, its metrics' names.

    python sglang_worker.py prefill|decode PORT [BOOTSTRAP_PORT]

The router sends one request to a prefill and to a decode worker at once. The prefill worker computes one prompt after the other
at TOKENS_PER_S, holds its KV under the request's room until the decode worker has fetched it, and then answers with one JSON
object, never a stream. The decode worker waits for that room at the prefill worker's bootstrap port, receives for TRANSFER_S,
and streams one token every ITL_S. A token is a word of the prompt. No GPU, no model: what is tested is the router and us.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from typing import Any

import aiohttp
from aiohttp import web

MODEL = "stand-in"
TOKENS_PER_S = 20_000.0
TRANSFER_S = 0.004
ITL_S = 0.01
HELD_S = 30.0
"""How long KV is kept for a decode worker that does not come, and waited for by one that did."""

TRANSFER_MS = (1.0, 5.0, 10.0, 30.0, 100.0, 500.0)


class Worker:
    """One engine. Gauges are counted where the requests are, so that they are 0 exactly when it holds nothing."""

    def __init__(self, role: str) -> None:
        self.role = role
        self.gauges = dict.fromkeys(
            ("num_running_reqs", "num_queue_reqs", "num_used_tokens")
            + (("num_prefill_inflight_queue_reqs",) if role == "prefill" else ())
            + (("num_decode_prealloc_queue_reqs", "num_decode_transfer_queue_reqs") if role == "decode" else ()),
            0,
        )
        self.counters = dict.fromkeys(("prompt_tokens_total", "generation_tokens_total", "num_requests_total"), 0)
        self.transfers: list[float] = []
        self.computing = asyncio.Lock()
        self.rooms: dict[int, tuple[asyncio.Event, asyncio.Event]] = {}
        self.session: aiohttp.ClientSession | None = None

    @contextlib.contextmanager
    def held(self, **gauges: int) -> Any:
        for name, value in gauges.items():
            self.gauges[name] += value
        try:
            yield
        finally:
            for name, value in gauges.items():
                self.gauges[name] -= value

    def room(self, number: int) -> tuple[asyncio.Event, asyncio.Event]:
        """(its KV is there, its KV was fetched); whoever comes first makes it."""
        return self.rooms.setdefault(number, (asyncio.Event(), asyncio.Event()))

    # --- requests

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        text = body["prompt"] if "prompt" in body else " ".join(str(m["content"]) for m in body["messages"])
        if not isinstance(text, str):
            return web.json_response({"error": "the prompt must be text"}, status=400)
        if "bootstrap_room" not in body:
            return web.json_response({"error": f"a {self.role} worker needs bootstrap_room"}, status=400)
        tokens = len(text.split())
        wanted = int(body.get("max_tokens") or body.get("max_completion_tokens") or 16)
        if self.role == "prefill":
            return await self.prefill(body, tokens)
        return await self.decode(request, body, tokens, wanted)

    async def prefill(self, body: dict[str, Any], tokens: int) -> web.Response:
        there, fetched = self.room(body["bootstrap_room"])
        with self.held(num_queue_reqs=1):
            await self.computing.acquire()
        try:
            with self.held(num_running_reqs=1, num_used_tokens=tokens):
                await asyncio.sleep(tokens / TOKENS_PER_S)
        finally:
            self.computing.release()
        self.counters["prompt_tokens_total"] += tokens
        there.set()
        with self.held(num_prefill_inflight_queue_reqs=1, num_used_tokens=tokens):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(fetched.wait(), HELD_S)
            self.rooms.pop(body["bootstrap_room"], None)
        self.counters["num_requests_total"] += 1
        usage = {"prompt_tokens": tokens, "completion_tokens": 1, "total_tokens": tokens + 1}
        choice = {"index": 0, "text": "t ", "finish_reason": "length"}
        return web.json_response({"id": "p", "object": "text_completion", "choices": [choice], "usage": usage})

    async def fetch_kv(self, request: web.Request) -> web.Response:
        """The bootstrap port of a prefill worker: answers when the room's KV is there."""
        there, fetched = self.room(int(request.match_info["room"]))
        try:
            await asyncio.wait_for(there.wait(), HELD_S)
        except TimeoutError:
            return web.json_response({"error": "nobody prefilled this room"}, status=404)
        fetched.set()
        return web.json_response({"room": int(request.match_info["room"])})

    async def decode(self, request: web.Request, body: dict[str, Any], tokens: int, wanted: int) -> web.StreamResponse:
        assert self.session is not None
        host, port, room = (body[f"bootstrap_{part}"] for part in ("host", "port", "room"))
        with self.held(num_decode_prealloc_queue_reqs=1):
            async with self.session.get(f"http://{host}:{port}/room/{room}") as kv:
                if kv.status != 200:
                    return web.json_response({"error": "KV did not come"}, status=500)
        with self.held(num_decode_transfer_queue_reqs=1, num_used_tokens=tokens):
            began = time.monotonic()
            await asyncio.sleep(TRANSFER_S)
            self.transfers.append((time.monotonic() - began) * 1e3)
        with self.held(num_running_reqs=1, num_used_tokens=tokens + wanted):
            answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await answer.prepare(request)
            for k in range(wanted):
                await asyncio.sleep(ITL_S)
                self.counters["generation_tokens_total"] += 1
                choice = {"index": 0, "text": "t ", "finish_reason": "length" if k == wanted - 1 else None}
                await self.say(answer, choices=[choice])
            usage = {"prompt_tokens": tokens, "completion_tokens": wanted, "total_tokens": tokens + wanted}
            await self.say(answer, choices=[], usage=usage)
            await answer.write(b"data: [DONE]\n\n")
        self.counters["num_requests_total"] += 1
        return answer

    async def say(self, answer: web.StreamResponse, **members: Any) -> None:
        held = {"id": "d", "object": "text_completion", "model": MODEL} | members
        await answer.write(b"data: " + json.dumps(held).encode() + b"\n\n")

    # --- what it tells of itself

    async def info(self, _: web.Request) -> web.Response:
        return web.json_response(
            {
                "version": "0.0-stand-in",
                "disaggregation_mode": self.role,
                "served_model_name": MODEL,
                "model_path": MODEL,
                "tp_size": 1,
                "dp_size": 1,
            }
        )

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "sglang"}]})

    async def metrics(self, _: web.Request) -> web.Response:
        labels = f'model_name="{MODEL}",engine_type="{self.role}",tp_rank="0",pp_rank="0"'
        lines = []
        for kind, values in (("gauge", self.gauges), ("counter", self.counters)):
            for name, value in values.items():
                lines += [f"# TYPE sglang:{name} {kind}", f"sglang:{name}{{{labels}}} {value}"]
        if self.role == "decode":
            name = "sglang:kv_transfer_latency_ms"
            lines.append(f"# TYPE {name} histogram")
            for bound in (*TRANSFER_MS, float("inf")):
                shown = "+Inf" if bound == float("inf") else f"{bound:g}"
                lines.append(f'{name}_bucket{{{labels},le="{shown}"}} {sum(ms <= bound for ms in self.transfers)}')
            lines += [
                f"{name}_sum{{{labels}}} {sum(self.transfers):.6f}",
                f"{name}_count{{{labels}}} {len(self.transfers)}",
            ]
        return web.Response(text="\n".join(lines) + "\n")


async def healthy(_: web.Request) -> web.Response:
    return web.Response(text="ok")


async def main(role: str, port: int, bootstrap_port: int) -> None:
    worker = Worker(role)
    app = web.Application(client_max_size=1 << 24)
    for path in ("/v1/completions", "/v1/chat/completions"):
        app.router.add_post(path, worker.complete)
    for path in ("/health", "/health_generate"):
        app.router.add_get(path, healthy)
    for path in ("/server_info", "/get_server_info", "/model_info", "/get_model_info"):
        app.router.add_get(path, worker.info)
    app.router.add_get("/v1/models", worker.models)
    app.router.add_get("/metrics", worker.metrics)
    serving = [(app, port)]
    if role == "prefill":
        bootstrap = web.Application()
        bootstrap.router.add_get("/room/{room}", worker.fetch_kv)
        serving.append((bootstrap, bootstrap_port))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as worker.session:
        for one, at in serving:
            runner = web.AppRunner(one, access_log=None)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", at).start()
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0))
