"""What the database holds as pages of a local web server: runs, traces, answers, comparisons; live while a run is going.

Read only: it answers GET; what it counts of long runs is kept in the database (`summaries`), nothing else is written. It listens
on loopback; elsewhere it needs a token. The pages are those of the report (same sections, same policy of what may run), with
the newest state fetched again while somebody looks.

A run is read, digested and let go, one at a time; digests of ended runs are kept.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import signal
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import quote, urlencode

from aiohttp import web

from advisor import closed
from advisor import compare as study
from advisor.believed import believed
from advisor.report import gather
from advisor.report.digest import BINS, Digest, Traffic, read, traffic, traffic_of
from advisor.report.page import contents, document, e, figures, policy, safe_json, section, table
from advisor.report.page import report_body as body_of
from advisor.report.parts import Section, Table
from advisor.report.reproduce import advise_command, on
from advisor.report.sections import distributions, lag, over_time, run_facts, seconds, servers, traffic_sections
from loadgen.ports import HERE, Door
from traces.aggregate import APPROXIMATE
from traces.errors import EndpointError, InputError, SteelyardError, understood
from traces.measures import Slo
from traces.records import CLOSED_LOOP, Aggregate, Run
from traces.store import Store

KEPT = 32
"""Digests of ended runs that are kept."""

LONG_TRACE = 200_000
"""Requests of a trace that is drawn from as many, in BINS windows."""

LISTED = 200
"""Runs and answers on a page of the overview, which turns to older ones."""


@dataclass(frozen=True, eq=False)
class Page:
    """One page: title, body as HTML, the plots' points, the same as data. live: ask again, there may be more."""

    title: str
    body: Sequence[str]
    plots: Mapping[str, Any] = field(default_factory=dict)
    data: Any = None
    live: bool = False


class Dash:
    """Pages from a store. Its methods block; the server calls them in a thread, one at a time. listed: rows of a page."""

    def __init__(self, store: Store, listed: int = LISTED) -> None:
        self._store, self._listed = store, listed
        self._kept: OrderedDict[tuple[int, float], Digest] = OrderedDict()

    def overview(self, runs_page: int = 1, answers_page: int = 1) -> Page:
        """Where one stands: the last answer, runs and answers (newest first, by pages), traces."""
        runs = self._store.runs()[::-1]
        answers = self._store.recommendations(limit=self._listed, offset=(answers_page - 1) * self._listed)
        traces = self._store.traces()
        latest = answers if answers_page == 1 else self._store.recommendations(limit=self._listed)
        last = next((a for a in latest if a["answer"].get("sentence")), None)
        shown = runs[(runs_page - 1) * self._listed :][: self._listed]
        for name, page, found in (("runs", runs_page, len(shown)), ("answers", answers_page, len(answers))):
            if page > 1 and not found:
                raise InputError(f"{name} have no page {page}. The first is 1.")
        going = [r for r in runs if not r.ended]
        body = ["<header><p>Steelyard</p>"]
        if last:
            body.append(
                f'<h1><a href="/recommendations/{last["id"]}">{e(last["answer"]["sentence"])}</a></h1></header>'
            )
        else:
            body.append("<h1>No recommendation yet.</h1></header>")
            body.append("<p>Measure a run (steelyard replay), then: <code>steelyard advise</code></p>")
        if going:
            said = ", ".join(f'<a href="/runs/{r.id}">run {r.id} ({e(r.trace)})</a>' for r in going[:8])
            body.append(f"<p>Not ended, so going on or broken off: {said}</p>")
        body.append(
            '<form action="/compare" method="get"><label>Compare runs <input name="runs" placeholder="1 2" required '
            'pattern="[0-9][0-9, ]*" autocomplete="off"></label> <button>Compare</button></form>'
        )
        turns = {"runs": runs_page, "answers": answers_page}
        body += ['<h2 id="runs">Runs</h2>', table(_runs(shown))]
        body.append(_pages(turns, "runs", len(shown), len(runs), self._listed))
        body += ['<h2 id="answers">Answers</h2>', table(_answers(answers))]
        body.append(_pages(turns, "answers", len(answers), self._store.count_recommendations(), self._listed))
        rows = [[t.name, t.format, f"{t.summary.get('rows_kept', 0):,}", _minute(t.created_at)] for t in traces]
        links = [f"/traces/{quote(t.name, safe='')}" for t in traces]
        body += ["<h2>Traces</h2>", table(Table(["trace", "format", "requests", "stored"], rows, links=links))]
        data = {
            "runs": [r.id for r in reversed(runs)],
            "shown": {"runs": [r.id for r in shown], "answers": [a["id"] for a in answers]},
            "going": [r.id for r in going],
            "traces": [t.name for t in traces],
            "recommendations": [a["id"] for a in answers],
        }
        return Page("Overview", body, data=data, live=True)

    def run(self, number: int) -> Page:
        """One run: what was asked, how it ended, its latencies, servers and lag; what there is so far while it goes on."""
        run = self._store.run(number)
        if mean := self._store.aggregates([run.id] if run.policy == CLOSED_LOOP else []).get(run.id):
            return _means(run, mean)
        slo = Slo.parse(run.slo) if run.slo else Slo()
        one = self._digest(run, slo)
        counted = f"{one.run.counts.get('ok', one.summary.ok):,} of {run.scheduled:,} requests finished"
        state = run.verdict if run.ended else OPEN
        body = [
            f"<header><p>Run {run.id}: {e(run.name)}</p>",
            f"<h1>{e(str(run.fleet or 'fleet unknown'))} on {e(run.trace)}: {e(counted)}, {e(state)}</h1></header>",
        ]
        parts: list[Section] = [run_facts(one)]
        if one.summary.n:
            parts += [*over_time(one), *distributions([one], slo), *servers([one]), lag([one], slo)]
        return _sections(f"Run {run.id}", body, parts, live=not run.ended)

    def trace(self, name: str) -> Page:
        """One trace: what was read, and its traffic over time."""
        info = self._store.trace(name)
        n = int(info.summary.get("rows_kept", 0))
        said: Traffic | None
        if n > LONG_TRACE:
            said = traffic_of(self._store.trace_windows(name, LONG_TRACE, BINS))
        else:
            schedule = self._store.schedule(name)
            n, said = len(schedule), traffic(schedule, None, Slo()) if len(schedule) > 1 else None
        rows = [["format", info.format], ["stored", info.created_at], ["sha256", info.sha256]]
        rows += [[k.replace("_", " "), json.dumps(v)] for k, v in info.summary.items()]
        body = [f"<header><p>Trace</p><h1>{e(name)}: {n:,} requests</h1></header>"]
        parts = [Section("facts", "What was read", "As ingest counted it.", table=Table(["what", "value"], rows))]
        if said is not None:
            parts += traffic_sections(said, {})
        return _sections(name, body, parts)

    def recommendation(self, number: int) -> Page:
        """A stored answer with its evidence."""
        found = self._store.recommendations(id=number)
        if not found:
            raise InputError(f"no recommendation is stored with id {number}.")
        row = found[0]
        if row["answer"].get("question") == "closed loop":
            with understood(f"recommendation {number}", "Make another: steelyard advise"):
                return self._closed(row)
        if not row["answer"].get("candidates"):
            text = json.dumps(row["answer"], indent=2)
            body = [f"<header><p>{e(row['kind'])}</p><h1>Stored {e(row['created_at'])}</h1></header>"]
            return Page(f"Answer {number}", [*body, f"<pre><code>{e(text)}</code></pre>"], data=row["answer"])
        answer = dict(row["answer"]) | {k: row[k] for k in ("id", "created_at", "version", "seed", "run_ids")}
        command = on(f"steelyard report --recommendation {number}", self._store.told)
        with understood(f"recommendation {number}", "Make another: steelyard advise"):
            report = gather(self._store, answer, commands=[command])
            return Page(report.title, body_of(report), figures(report.sections), report.as_json())

    def _closed(self, row: Mapping[str, Any]) -> Page:
        """A stored answer about a closed loop, which holds means of every split and nothing about a rate."""
        answer = row["answer"] | {"seed": row["seed"]}
        body = [f"<header><p>Which split serves most</p><h1>{e(answer['sentence'])}</h1></header>"]
        notes = [[note] for note in answer["warnings"]]
        probe = answer["next_probe"]
        traces = [trace.name for trace in self._store.traces()]
        parts = [
            Section("splits", "Every split", f"{closed.evidence(answer)}.", table=closed.as_table(answer)),
            Section(
                "next",
                "What is not known",
                f"Measure next: {believed(probe['command']) or 'the stored command is none of ours'} ({probe['why']}).",
                table=Table(["note"], notes),
            ),
            Section(
                "reproduce",
                "How to get this again",
                "Same rows, same seed: same answer.",
                code=[("The answer", advise_command(answer, traces, self._store.told))],
            ),
        ]
        page = _sections(f"Answer {row['id']}", body, parts)
        return replace(page, data=page.data | {"recommendation": answer})

    def compare(self, numbers: Sequence[int]) -> Page:
        """Every run against the first, with what makes the comparison doubtful."""
        if len(numbers) < 2:
            raise InputError("comparing needs two runs or more, for example: 1 2")
        runs = [self._store.run(n) for n in numbers]
        slo = Slo.parse(runs[0].slo) if runs[0].slo else Slo()
        for run in runs:
            if why := study.objection(run, runs[0]):
                raise InputError(f"run {run.id} {why}: it cannot be compared.")
        parts = []
        said, found = study.against_first(self._store, runs, slo)
        for one, its, run in zip(found, said[1:], runs[1:], strict=True):
            text = (
                f"90 % intervals from {one.blocks:.0f} independent stretches of {one.block_s:.3g} s (block bootstrap over time). "
                "Each interval by itself misses in one case of ten; between repeats of a run there may be more."
            )
            text += "".join(f" Note: {doubt}." for r in (runs[0], run) for doubt in study.doubts(r))
            text += "" if said[0].exact and its.exact else f" {APPROXIMATE}"
            title = f"Run {run.id} ({run.fleet}) against run {runs[0].id} ({runs[0].fleet})"
            parts.append(Section(f"run-{run.id}", title, text, table=study.as_table(one)))
        ids = " ".join(str(n) for n in numbers)
        body = [f"<header><p>Comparison</p><h1>Runs {e(ids)}, goodput within {e(slo) or 'no limit'}</h1></header>"]
        return _sections(f"Runs {ids}", body, parts)

    def _digest(self, run: Run, slo: Slo) -> Digest:
        key = run.id, run.started_unix_s  # SQLite gives the number of a deleted run to a later one
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        made = read(self._store, run, slo)
        if run.ended:
            self._kept[key] = made
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return made


def _sections(title: str, body: Sequence[str], parts: Sequence[Section], live: bool = False) -> Page:
    data = {"title": title, "sections": {s.key: s.as_json() for s in parts}}
    return Page(title, [*body, contents(parts), *(section(s) for s in parts)], figures(parts), data, live)


def _means(run: Run, mean: Aggregate) -> Page:
    """A run that is means of a closed loop: it has no requests."""
    body = [
        f"<header><p>Run {run.id}: {e(run.name)}</p>",
        f"<h1>{e(str(run.fleet or 'fleet unknown'))}: means with {mean.concurrency:g} requests in flight</h1></header>",
    ]
    rows = [
        ["mean lengths", f"{mean.prompt_tokens:g} prompt and {mean.output_tokens:g} output tokens"],
        ["mean TTFT", seconds(mean.ttft_s)],
        ["mean TPOT", seconds(mean.tpot_s)],
        ["mean E2E", seconds(mean.e2e_s)],
        ["throughput", f"{mean.throughput_per_s:.4g} req/s by Little's law"],
        ["asked of", f"{run.engine} {run.engine_version} serving {run.model or '?'} at {run.endpoint or '?'}"],
        ["what it tells", run.reason],
    ]
    text = "No request of it is known, so there is nothing to draw."
    return _sections(f"Run {run.id}", body, [Section("facts", "The run", text, table=Table(["what", "value"], rows))])


OPEN = "running or broken off"
"""What is known of a run that has not ended: who was killed cannot say so."""


def _runs(runs: Sequence[Run]) -> Table:
    head = ["run", "name", "trace", "P:D", "req/s", "ok", "lag p99, ms", "verdict", "begun"]
    rows = []
    for r in runs:
        state = (r.verdict if r.complete else f"{r.verdict}, incomplete") if r.ended else OPEN
        begun = time.strftime("%Y-%m-%d %H:%M", time.gmtime(r.started_unix_s))
        counted = f"{r.counts.get('ok', 0):,}" if r.counts or r.ended else "–"
        ok = f"{counted}/{r.scheduled:,}"
        rows.append(
            [
                f"run {r.id}",
                r.name,
                r.trace,
                str(r.fleet or "?"),
                r.policy if r.policy == CLOSED_LOOP else f"{r.rate_per_s:.3g}" if math.isfinite(r.rate_per_s) else "–",
                ok,
                f"{r.lag_p99_ms:.1f}" if math.isfinite(r.lag_p99_ms) else "–",
                state,
                begun,
            ]
        )
    return Table(head, rows, "Newest first, times in UTC.", links=[f"/runs/{r.id}" for r in runs])


def _minute(stamp: str) -> str:
    """``2026-11-25T20:30:15+00:00`` as 2026-11-25 20:30; stamps are in UTC."""
    return stamp[:16].replace("T", " ")


def _answers(answers: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for a in answers:
        said = str(a["answer"].get("sentence") or f"{a['kind']} on {a['answer'].get('source', '?')}")
        rows.append(
            [f"answer {a['id']}", said, ", ".join(map(str, a["run_ids"][:12])) or "–", _minute(a["created_at"])]
        )
    links = [f"/recommendations/{a['id']}" for a in answers]
    return Table(["answer", "what it says", "runs", "stored"], rows, links=links)


def _pages(turns: Mapping[str, int], name: str, shown: int, stored: int, listed: int) -> str:
    """Which rows of how many stand above, and links to newer and older ones; nothing where one page holds them all."""
    if stored <= listed:
        return ""
    page = turns[name]
    first = (page - 1) * listed + 1

    def link(to: int, words: str) -> str:
        asked = urlencode({k: v for k, v in (dict(turns) | {name: to}).items() if v > 1})
        return f'<a href="/{"?" if asked else ""}{e(asked)}#{name}">{words}</a>'

    newer = [link(page - 1, f"Newer {name}")] if page > 1 else []
    older = [link(page + 1, f"Older {name}")] if first + shown - 1 < stored else []
    said = f"{first:,} to {first + shown - 1:,} of {stored:,}, newest first."
    return f'<nav class="pages" aria-label="Pages of {name}">{" ".join([said, *newer, *older])}</nav>'


# --- the server -----------------------------------------------------------------------------------------------------


def make_app(dash: Dash, *, door: Door = HERE) -> web.Application:
    """The aiohttp application. The door's token is asked for once (?token=..) or as bearer; a cookie stands for it afterwards."""
    gate = asyncio.Semaphore(1)
    asks = door.token is not None
    headers = {
        "Content-Security-Policy": policy(live=True),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cache-Control": "no-store",
    }

    def answered(page: Page, request: web.Request, status: int = 200) -> web.Response:
        more = headers | {"X-Live": "going" if page.live else "ended"}
        if request.query.get("format") == "json":
            text = safe_json(page.data).replace("\\u003c", "<").replace("\\u003e", ">").replace("\\u0026", "&")
            return web.Response(text=text, content_type="application/json", status=status, headers=more)
        if request.query.get("body") == "1":
            held = f'<script type="application/json" id="figures">{safe_json(page.plots)}</script>'
            text = "\n".join([*page.body, held])
            return web.Response(text=text, content_type="text/html", status=status, headers=more)
        live = f"{request.path}?{urlencode([*request.query.items(), ('body', '1')])}" if page.live else ""
        nav = '<nav class="bar" aria-label="Steelyard"><strong>steelyard</strong><a href="/">Overview</a></nav>'
        text = document(f"Steelyard: {page.title}", page.body, page.plots, live=live, nav=nav)
        return web.Response(text=text, content_type="text/html", status=status, headers=more)

    def refused(request: web.Request, status: int, said: str) -> web.Response:
        body = [f"<header><p>Steelyard</p><h1>{e(said)}</h1></header>"]
        # A database that is away may be back: a page that asks goes on showing what it has, and asks again.
        return answered(Page(str(status), body, data={"error": said}, live=status == 503), request, status)

    @web.middleware
    async def guard(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if request.method not in ("GET", "HEAD"):
            return web.Response(status=405, headers=headers | {"Allow": "GET, HEAD"})
        if strange := door.foreign(request.headers, links=True):
            return refused(request, *strange)
        asked = request.query.get("token")
        if asks and asked is not None:
            if not door.knows(asked):
                return refused(request, 401, "that is not the token")
            moved = web.Response(status=303, headers=headers | {"Location": "/" + request.path.lstrip("/")})
            value = door.cookie("dash")
            moved.set_cookie("steelyard", value, httponly=True, samesite="Strict", secure=door.scheme == "https")
            return moved
        if not (
            door.bearer(request.headers.get("Authorization", ""))
            or door.stands(request.cookies.get("steelyard", ""), "dash")
        ):
            return refused(request, 401, "a token is needed: open this address with ?token=.. once")
        try:
            return await handler(request)
        except InputError as error:
            return refused(request, 404, str(error))
        except SteelyardError as error:
            return refused(request, 503, str(error))
        except web.HTTPException as error:
            return refused(request, error.status, error.reason)

    async def made(request: web.Request, what: Callable[[], Page]) -> web.Response:
        async with gate:
            page = await _apart(what)
        return answered(page, request)

    async def overview(request: web.Request) -> web.StreamResponse:
        pages = [request.query.get(name, "1") for name in ("runs", "answers")]
        if bad := next((p for p in pages if not re.fullmatch(r"[1-9]\d{0,6}", p)), None):
            raise InputError(f"a page is a number from 1 (got {bad!r}).")
        return await made(request, lambda: dash.overview(*map(int, pages)))

    async def run(request: web.Request) -> web.StreamResponse:
        number = int(request.match_info["id"])
        return await made(request, lambda: dash.run(number))

    async def trace(request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        return await made(request, lambda: dash.trace(name))

    async def recommendation(request: web.Request) -> web.StreamResponse:
        number = int(request.match_info["id"])
        return await made(request, lambda: dash.recommendation(number))

    async def compared(request: web.Request) -> web.StreamResponse:
        numbers = [int(n) for n in re.findall(r"\d{1,9}", request.query.get("runs", ""))][:20]
        return await made(request, lambda: dash.compare(list(dict.fromkeys(numbers))))

    app = web.Application(middlewares=[guard], client_max_size=1024)
    app.router.add_get("/", overview)
    app.router.add_get(r"/runs/{id:\d{1,9}}", run)
    app.router.add_get("/traces/{name}", trace)
    app.router.add_get(r"/recommendations/{id:\d{1,9}}", recommendation)
    app.router.add_get("/compare", compared)
    return app


PAGE = "steelyard-page"
"""The thread in which a page is made."""


async def _apart(work: Callable[[], Page]) -> Page:
    """The page, made by a daemon that nobody joins: a database that never answers must not keep the process from ending."""
    made: Future[Page] = Future()
    made.set_running_or_notify_cancel()  # who waits may give up, the thread does not hear of it

    def run() -> None:
        try:
            made.set_result(work())
        except BaseException as error:
            made.set_exception(error)

    threading.Thread(target=run, name=PAGE, daemon=True).start()
    return await asyncio.wrap_future(made)


async def serve(store: Store, *, door: Door = HERE, ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT. ready(url) is called when pages are answered. EndpointError when it cannot listen."""
    door.check("--host", "other machines could read this database", "Set STEELYARD_DASH_TOKEN or --token-file")
    tls = door.context()
    runner = web.AppRunner(make_app(Dash(store), door=door), access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        sock = door.bind()
    except EndpointError:
        await runner.cleanup()
        raise
    await web.SockSite(runner, sock, ssl_context=tls).start()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    ready(door.url(sock.getsockname()[1]))
    await stopping.wait()
    for number in (signal.SIGTERM, signal.SIGINT):  # the second one ends it, whatever is still waited for
        asyncio.get_running_loop().remove_signal_handler(number)
    await runner.cleanup()
