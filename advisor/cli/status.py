"""``steelyard`` without a verb: what is stored, what it says, what to do next."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from typing import Any

from advisor.believed import believed
from advisor.cli.common import messages


def status(db: str, *, named: bool = False) -> dict[str, Any]:
    """{database, problem, traces, runs, unfinished, waiting, recommendation, next {command, why}}; never raises for a database
    that cannot be used: that is what is said then. named: the database was asked for, so that the next command names it."""
    from loadgen.spool import folder
    from traces.errors import StoreError
    from traces.records import CLOSED_LOOP
    from traces.store import open_store, option, redact

    found: dict[str, Any] = {
        "database": redact(db),
        "problem": None,
        "traces": [],
        "runs": {"count": 0, "latest": None, "unfinished": []},
        "recommendation": None,
        "waiting_files": len(list(folder().glob("*.jsonl"))),
    }
    named_db = option(db) if named else ""
    try:
        with open_store(db, create=False) as store:
            traces, runs = store.traces(), store.runs()
            ended = [run for run in runs if run.ended]
            latest = [run for run in ended if (run.engine, run.model) == (ended[-1].engine, ended[-1].model)]
            trusted = next((run for run in reversed(latest) if not _unfit(store, run)), None)
            means = [] if trusted else [run for run in latest if run.policy == CLOSED_LOOP]
            why = _why(store, ended, trusted, means)
            recommended = _latest(store, "closed loop" if means else "static")
            asked = _concurrency(store, means) if means else ""
    except StoreError as error:
        found["problem"] = str(error)
        found["next"] = _without(str(error), named_db)
        return found
    found["traces"] = [{"name": t.name, "requests": t.summary.get("rows_kept")} for t in traces]
    if ended:
        run = ended[-1]
        found["runs"]["latest"] = {
            "run": run.id,
            "name": run.name,
            "trace": run.trace,
            "fleet": str(run.fleet) if run.fleet else None,
            "ok": run.counts.get("ok", 0),
            "scheduled": run.scheduled,
            "verdict": run.verdict,
            "complete": run.complete,
        }
    found["runs"]["count"] = len(runs)
    found["runs"]["unfinished"] = [run.id for run in runs if not run.ended]
    if recommended:
        found["recommendation"] = {
            "id": recommended["id"],
            "created_at": recommended["created_at"],
            "sentence": recommended.get("sentence"),
            "runs": recommended["run_ids"],
        }
    found["next"] = _next(traces, ended, trusted or (means[-1] if means else None), recommended, asked, why, named_db)
    return found


def _why(store: Any, ended: Any, trusted: Any, means: Any) -> str:
    """Why no answer about a rate can be asked for."""
    if means:
        return "means of closed loops say nothing about a rate"
    if not ended:
        return "nothing was measured yet"
    return "" if trusted else f"no run can be trusted so far (run {ended[-1].id}: {_unfit(store, ended[-1])})"


def _unfit(store: Any, run: Any) -> str:
    """Why no answer can rest on a run alone; "" if one can."""
    from traces.records import FEWEST

    if run.warmup_s > 0 and run.ended:
        figures = store.figures(run)
        failed = min(run.counts.get("failed", 0), figures.n - figures.ok)  # the others were not sent, or lost
        run = replace(run, counts={"ok": figures.ok, "failed": failed, "others": figures.n - figures.ok - failed})
    ok = run.counts.get("ok", 0)
    few = f"{ok} finished requests, fewer than {FEWEST}" if ok < FEWEST else ""
    return run.unfit or few or ("" if run.complete else "it is incomplete")


def _latest(store: Any, kind: str) -> dict[str, Any] | None:
    from traces.errors import InputError

    try:
        held: dict[str, Any] = store.recommendation(kind=kind)
    except InputError:
        return None
    return held


def _concurrency(store: Any, means: Any) -> str:
    """The option that asks means of closed loops, with the most requests in flight that the latest system was measured with."""
    system = (means[-1].engine, means[-1].model, means[-1].endpoint)
    held = store.aggregates([run.id for run in means if (run.engine, run.model, run.endpoint) == system])
    return f" --concurrency {max((one.concurrency for one in held.values()), default=1.0):g}"


def _without(problem: str, option: str) -> dict[str, str]:
    """What to do when the database cannot be used."""
    if "steelyard migrate" in problem:
        return {"command": f"steelyard migrate{option}", "why": "the database is older than this version"}
    if "no such database" in problem or "is empty" in problem:
        return {"command": "steelyard demo", "why": "nothing is stored yet; the demo shows the main job in two minutes"}
    return {"command": f"steelyard doctor{option}", "why": "the database cannot be used"}


def _next(
    traces: Any, ended: Any, trusted: Any, recommended: dict[str, Any] | None, asked: str, why: str, option: str
) -> dict[str, str]:
    """The next sensible command. trusted: the newest run that an answer can rest on, None without. asked: the option that asks
    it, where it is means of a closed loop. why: what of that is missing, "" for nothing."""
    known: list[int] = []
    if recommended is not None:  # those too that it left out for a reason that their rows tell
        left = re.findall(r"\brun (\d{1,18}) left out", str(recommended.get("warnings")))
        known = [*recommended["run_ids"], *map(int, left)]
    if trusted and trusted.id > max(known, default=0):
        new = "no recommendation yet" if recommended is None else f"run {trusted.id} is newer than the recommendation"
        return {"command": f"steelyard advise{asked}{option}", "why": new}
    if not traces and (asked or not ended):
        said = f"{why}, and no trace is stored" if asked else "no trace is stored"
        return {"command": f"steelyard ingest FILE{option}", "why": said}
    if asked or not trusted:
        name = shlex.quote(traces[-1].name if traces else ended[-1].trace)
        return {"command": f"steelyard replay {name} --endpoint URL --fleet P:D{option}", "why": why}
    probe = (recommended or {}).get("next_probe")
    command = believed(probe.get("command")) if isinstance(probe, dict) else ""
    if isinstance(probe, dict) and command:
        command = command.replace(" && steelyard ", f"{option} && steelyard ")
        return {"command": f"{command}{option}", "why": str(probe.get("why", ""))}
    return {"command": f"steelyard report --out report.html{option}", "why": "to show the answer and its evidence"}


def show(found: dict[str, Any]) -> None:
    """Print it for people."""
    console = messages()

    def say(line: str) -> None:
        console.print(line.translate(dict.fromkeys(b"\r\n", " ")), markup=False)  # names come from the database

    if found["problem"]:
        say(f"Database: {found['problem']}")
    else:
        say(f"Database: {found['database']}")
        names = [f"{t['name']} ({t['requests']} requests)" for t in found["traces"]]
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        say(f"Traces:   {', '.join(names[:5]) or 'none'}{more}")
        runs = found["runs"]
        latest = runs["latest"]
        text = f"{runs['count']}" if runs["count"] else "none"
        if latest:
            fleet = f" on {latest['fleet']}" if latest["fleet"] else ""
            state = latest["verdict"] + ("" if latest["complete"] else ", incomplete")
            text += f"; the latest, {latest['run']}: {latest['trace']}{fleet}, {latest['ok']}/{latest['scheduled']} ok, {state}"
        if runs["unfinished"]:
            text += f"; running or broken off: {', '.join(map(str, runs['unfinished'][-5:]))}"
        say(f"Runs:     {text}")
        answer = found["recommendation"]
        say(f"Advice:   {answer['sentence'] if answer else 'none yet'}")
    if found["waiting_files"]:
        say(
            f"Waiting:  {found['waiting_files']} file(s) of rows on disk; the next command on their database stores them"
        )
    say(f"Next:     {found['next']['command']}")
    say(f"          ({found['next']['why']})")
    say("All verbs: steelyard --help")
