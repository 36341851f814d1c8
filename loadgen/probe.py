"""What an endpoint is and tells, found out with a few small requests: what is known, what is missing, what that costs."""

from __future__ import annotations

import asyncio
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from loadgen.client import Client, Row
from loadgen.control import Endpoint
from loadgen.discover import Discovery, Targets, discover
from loadgen.engines import FACTS, STAGES, Dialect, Prompts, Worker
from loadgen.scrape import MOST_BYTES, PAGE_S, PARALLEL, page_of, read
from traces.errors import EndpointError, SteelyardError

REQUESTS = 3
PROMPT_TOKENS = 64
OUTPUT_TOKENS = 16
APART_S = 0.4
TIMEOUT_S = 60.0

CLOCK_S = 1.0
"""Servers' clocks that differ by more are said to."""


@dataclass(frozen=True, slots=True)
class Lack:
    """Something that is missing. costs: what the advice loses by it. do: how to get it."""

    what: str
    costs: str
    do: str


@dataclass(frozen=True, slots=True)
class Page:
    """What the metrics page of a server tells. problem: why it tells nothing, or ""."""

    worker: Worker
    fields: tuple[str, ...] = ()
    histograms: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Probe:
    """What was found. rows: of the requests that were made. clock: seconds that the server's clock is ahead, and how exactly that
    is known; None where it does not say. settable: its fleet can be asked for and changed by ``/fleet``."""

    endpoint: str
    model: str
    models: tuple[str, ...]
    found: Discovery
    dialect: Dialect
    rows: tuple[Row, ...]
    pages: tuple[Page, ...]
    clock: tuple[float, float] | None
    settable: bool
    lacks: tuple[Lack, ...]
    known: tuple[str, ...]


def probe(
    server: Endpoint,
    *,
    engine: str = "auto",
    model: str | None = None,
    chat: bool = False,
    targets: Targets | None = None,
) -> Probe:
    """Look at an endpoint and ask it REQUESTS small requests, one after another.

    EndpointError, one line, where it cannot be used at all: no answer, another model, no stream, credentials.
    """
    chosen, _ = server.choose_model(model)
    found = discover(server, engine=engine, targets=targets)
    if found.lacks:
        raise EndpointError(
            f"{server.shown}: no {found.lacks} worker is behind it, {found.shown}. Start one, or register it with the router."
        )
    dialect = found.engine.dialect(chat=chat)
    refused = ""
    try:
        server.try_one(dialect, chosen)
    except EndpointError as error:
        refused = str(error)
        if not dialect.token_ids or "token ids" not in refused:
            raise
        dialect = found.engine.dialect(chat=chat, text=True)
        server.try_one(dialect, chosen)
    fleet = server.fleet()
    rows = tuple(asyncio.run(_ask(server, found, dialect, chosen)))
    read = tuple(pages(server, found))
    offset = clock(server)
    names = tuple(str(m.get("id")) for m in server.models(named=True) or () if m.get("id"))
    known, lacks = _judge(found, dialect, rows, read, offset, fleet is not None, refused)
    if fleet is not None:
        known.insert(1, f"fleet {fleet}, which can be changed by PUT /fleet")
    return Probe(
        server.shown, chosen, names, found, dialect, rows, read, offset, fleet is not None, tuple(lacks), tuple(known)
    )


async def _ask(server: Endpoint, found: Discovery, dialect: Dialect, model: str) -> list[Row]:
    """The load client itself asks, so that what is seen here is what a replay sees."""
    rows: list[Row] = []
    prompts = Prompts(dialect, model, PROMPT_TOKENS, time.time_ns())
    client = Client(server.where, dialect.path, prompts, rows.append, timeout_s=TIMEOUT_S, engine=found.engine)
    try:
        await client.run(
            range(REQUESTS),
            [k * APART_S for k in range(REQUESTS)],
            [PROMPT_TOKENS] * REQUESTS,
            [OUTPUT_TOKENS] * REQUESTS,
            time.monotonic(),
        )
    finally:
        await client.close()
    return sorted(rows)


def pages(server: Endpoint, found: Discovery) -> list[Page]:
    """Every worker's page, read once; the endpoint's own beside them."""
    wanted = [w for w in found.workers if w.metrics]
    if not any(w.role == "router" for w in wanted):
        named = Worker("router", "router") if found.workers else Worker("")
        wanted.insert(0, Worker(named.name, named.role, metrics=f"{server.shown}{found.engine.page}"))
    with ThreadPoolExecutor(PARALLEL) as pool:
        return list(pool.map(lambda worker: _page(server, found, worker), wanted))


def _page(server: Endpoint, found: Discovery, worker: Worker) -> Page:
    own = worker.metrics == f"{server.shown}{found.engine.page}"
    try:
        endpoint, path = (server, found.engine.page) if own else page_of(server, worker)
        answer = endpoint.fetch("GET", path, timeout_s=PAGE_S, most_bytes=MOST_BYTES)
        if answer.status != 200:
            return Page(worker, problem=f"HTTP {answer.status}")
        reading = read(answer.text, worker, found.engine.name)
    except SteelyardError as error:
        return Page(worker, problem=str(error))
    except ValueError:
        return Page(worker, problem="not Prometheus text")
    told = {name for part in (reading.samples, reading.others) for values in part.values() for name in values}
    counted = {name for held in reading.histograms.values() for name in held}
    problem = "" if told or counted else "nothing in it has a name that an engine of ours uses"
    return Page(worker, tuple(sorted(told)), tuple(sorted(counted)), problem)


def clock(server: Endpoint, asks: int = 5) -> tuple[float, float] | None:
    """(seconds that the server's clock is ahead of ours, half the width of what is possible), from its Date headers.

    A Date is cut to the second, so each answer bounds the difference to about a second; several, at different places in the
    second, to less.
    """
    low, high = -math.inf, math.inf
    for _ in range(asks):
        before = time.time()
        try:
            told = server.fetch("GET", "/v1/models").headers.get("date")
            at = parsedate_to_datetime(told).timestamp() if told else math.nan
        except (EndpointError, ValueError, TypeError, OverflowError):
            return None
        after = time.time()
        if at != at:
            return None
        low, high = max(low, at - after), min(high, at + 1.0 - before)
        time.sleep(0.21)
    return ((low + high) / 2, max(0.0, (high - low) / 2))


def _judge(
    found: Discovery,
    dialect: Dialect,
    rows: tuple[Row, ...],
    pages: tuple[Page, ...],
    offset: tuple[float, float] | None,
    settable: bool,
    refused: str,
) -> tuple[list[str], list[Lack]]:
    """(what is known, what is missing), in the order of weight."""
    known = [f"{found.engine.name}{f' {found.version}' if found.version else ''}: {found.why}"]
    lacks: list[Lack] = []
    ok = [r for r in rows if r.status == "ok"]
    failed = [r for r in rows if r.status != "ok"]
    if failed:
        lacks.append(
            Lack(
                f"{len(failed)} of {len(rows)} requests failed ({failed[0].error}: {failed[0].detail})",
                "a run would count them as failures of the server",
                "look at the server's log",
            )
        )
    whole = [r for r in ok if r.chunks > 1 and r.last_token - r.first_token < 5e-4]
    if ok and len(whole) == len(ok):
        lacks.append(
            Lack(
                "all tokens of an answer arrive at once, though as a stream",
                "TTFT is the whole latency and TPOT is 0: neither stage can be seen",
                "look for a proxy that buffers (nginx: proxy_buffering off)",
            )
        )
    elif ok:
        chunks = sum(r.chunks for r in ok) / (len(ok) * OUTPUT_TOKENS)
        known.append(f"it streams: {chunks:.2f} events a token, first token after {_ms(ok)} ms (n = {len(ok)})")
    with_usage = [r for r in ok if r.output_tokens >= 0]
    if len(with_usage) < len(ok) or not ok:
        lacks.append(
            Lack(
                "no usage at the end of a stream",
                "tokens are those asked for: TPOT and the laws of decode are guesses, runs are degraded",
                "serve with stream_options.include_usage",
            )
        )
    else:
        known.append(
            f"usage: {with_usage[0].prompt_tokens} prompt and {with_usage[0].output_tokens} answer tokens counted"
        )
        if any(r.output_tokens != OUTPUT_TOKENS for r in with_usage):
            told = sorted({r.output_tokens for r in with_usage})
            lacks.append(
                Lack(
                    f"answers have not the length asked for ({', '.join(map(str, told))} tokens, {OUTPUT_TOKENS} asked)",
                    "the decode load of a replay is not the trace's",
                    "allow ignore_eos and min_tokens, or take --engine of your server",
                )
            )
        else:
            known.append(f"answers have exactly the length asked for ({OUTPUT_TOKENS} tokens)")
    if refused:
        lacks.append(
            Lack(
                "prompts of token ids are refused",
                "prompts are text, calibrated before a run: right to a token on average, not each",
                "replay with --prompts text, or --tokenizer DIR for exact ones",
            )
        )
    elif dialect.token_ids:
        known.append("prompts may be token ids: exact lengths")
    else:
        known.append("prompts are text, calibrated before a run; --tokenizer DIR makes them exact")
    facts = {name for r in ok for name in r.facts or ()}
    stages = [name for name in STAGES if name in facts]
    pair = {"prefill_worker", "decode_worker"} <= facts
    if facts:
        known.append(
            "a request's answer tells " + ", ".join([n for n in FACTS if n in facts] + sorted(facts - set(FACTS)))
        )
    if not stages:
        lacks.append(
            Lack(
                "no times of the stages of a request",
                "TTFT is split by averages of the servers' histograms at best; the law of prefill rests on quiet requests alone",
                "vLLM: --enable-per-request-metrics; Dynamo says it unasked",
            )
        )
    if not pair and found.fleet is not None and found.fleet.workers > 2:
        lacks.append(
            Lack(
                "no word on which worker served a request",
                "one slow worker looks like a slow role",
                "Dynamo and vllm-router tell it",
            )
        )
    lacks += _of_workers(found, pages, settable, known)
    if offset is None:
        lacks.append(
            Lack(
                "no Date header",
                "rows cannot be joined to the server's log by time",
                "latencies need no clock of the server's",
            )
        )
    elif abs(offset[0]) - offset[1] > CLOCK_S:
        lacks.append(
            Lack(
                f"its clock is {offset[0]:+.1f} s from ours (to {offset[1]:.1f} s)",
                "rows cannot be joined to the server's log by time; latencies are right, they use our clock alone",
                "set both by a time server",
            )
        )
    else:
        known.append(f"its clock is {offset[0]:+.2f} s from ours (to {offset[1]:.2f} s)")
    return known, lacks


def _of_workers(found: Discovery, pages: tuple[Page, ...], settable: bool, known: list[str]) -> list[Lack]:
    """What is missing about workers, roles and their metrics."""
    lacks = [Lack(note, "the P:D that a run is stored under may be wrong", "repair the list") for note in found.notes]
    told = {name for p in pages for name in p.fields}
    unlisted = settable and not found.workers
    if found.workers:
        known.append(f"workers: {found.shown}")
    elif not settable:
        lacks.append(
            Lack(
                "which workers there are",
                "the P:D of a run is what you say, and readings are not split by role: the advice cannot say which stage queues",
                "give --fleet P:D, and --targets FILE with each worker's role and metrics",
            )
        )
    if any(not w.role for w in found.workers):
        names = ", ".join(w.name for w in found.workers if not w.role)
        lacks.append(
            Lack(
                f"the role of {names}",
                "its readings count for neither stage",
                "send some requests first, or give --targets FILE",
            )
        )
    bad = [p for p in pages if p.problem and p.worker.role != "router" and p.worker.name]
    for page in bad:
        lacks.append(
            Lack(
                f"the metrics of {page.worker.role or 'the'} worker {page.worker.name} ({page.problem})",
                "its queue, KV use and histograms are not known",
                "open its metrics port, or correct it in --targets FILE",
            )
        )
    dark = [w for w in found.workers if w.role != "router" and not w.metrics]
    if dark:
        lacks.append(
            Lack(
                f"where the metrics of {', '.join(w.name for w in dark)} are",
                "of those workers only what the router says of them is known",
                "give --targets FILE with their metrics pages",
            )
        )
    if not told and not bad and not dark:
        lacks.append(
            Lack(
                "metrics",
                "the advice rests on client latencies alone: queues, utilisation and KV use are not known, intervals are wide",
                "serve /metrics, or give --targets FILE",
            )
        )
    elif told:
        known.append("metrics tell " + ", ".join(sorted(told)))
        for either, costs in (
            (
                ("waiting_requests", "inflight_requests"),
                "online rules see no queue, and the bottleneck is told from TTFT alone",
            ),
            (("kv_used_ratio", "kv_used_tokens"), "it is not seen when decode workers run out of KV"),
        ):
            if not told & set(either):
                lacks.append(Lack(f"{either[0]} in any metrics", costs, "look at the engine's flags for metrics"))
        if "inflight_requests" in told and not told & {"waiting_requests", "running_requests"}:
            lacks.append(
                Lack(
                    "how many of the requests in hand wait",
                    "--policy online-report moves nothing, and backlog sees answers wait only above the largest batch",
                    "look at the engine's flags for metrics (SGLang: --enable-metrics)",
                )
            )
        if not any("prompt_tokens_total" in p.fields and _arrivals(p) for p in pages):
            lacks.append(
                Lack(
                    "a counter of prompt tokens",
                    "a rule by demand, as advise gives it, moves nothing",
                    "look at the engine's flags for metrics, or give --targets FILE with the workers' pages",
                )
            )
    if not settable and not unlisted:
        lacks.append(
            Lack(
                "a way to change its fleet that was tried here",
                "each P:D has to be deployed by you",
                "see steelyard control",
            )
        )
    return lacks


def _arrivals(page: Page) -> bool:
    """Are prompts that its server counts new ones? A decode worker counts each again, and may say what it received."""
    return page.worker.role != "decode" or "received_tokens_total" in page.fields


def _ms(rows: list[Row]) -> str:
    values = sorted((r.first_token - r.sent) * 1e3 for r in rows)
    return f"{values[len(values) // 2]:.1f}"
