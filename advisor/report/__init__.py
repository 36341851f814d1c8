"""The report: the answer first, then what it rests on, as one HTML file, Markdown, JSON or PDF.

``parts`` says what a report consists of, ``digest`` makes a run small enough to be drawn, ``sections`` writes the sentences and
the plots' data, ``draw`` and ``page`` put them on a page, ``whatif`` asks the fitted laws about other worlds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from advisor.features import RunData
from advisor.report.digest import Digest, read, traffic
from advisor.report.markdown import markdown
from advisor.report.page import render
from advisor.report.parts import Report
from advisor.report.pdf import pdf
from advisor.report.reproduce import reproduce
from advisor.report.sections import DRAWN, build
from advisor.report.whatif import Case, what_if
from advisor.splits import POINT_REQUESTS
from loadgen.cluster import Profile
from traces.errors import InputError
from traces.measures import Slo
from traces.records import Fleet, Schedule
from traces.shape import head, piece, to_rate, window
from traces.store import Store
from traces.whole import whole

FORMATS = ("html", "md", "json", "pdf")

__all__ = ["FORMATS", "Report", "assemble", "gather", "pdf", "render", "text_of", "write_report"]


def assemble(
    answer: Mapping[str, Any],
    runs: Sequence[Digest],
    *,
    schedule: Schedule | None = None,
    strategies: Mapping[str, Any] | None = None,
    commands: Sequence[str] = (),
    traces: Mapping[str, Mapping[str, Any]] | None = None,
    per_worker: tuple[int, int] = (1, 1),
    db: str = "",
) -> Report:
    """The report of an answer (the JSON of ``advise``) and its runs. schedule: the traffic that was asked about.

    strategies: a study's JSON. commands: how this report was made. traces: name -> summary of the stored trace.
    per_worker: GPUs of a worker of each role, for an older answer that does not say them. db: the database's URL.
    """
    slo = Slo.parse(answer["slo"]) if answer.get("slo") else Slo()
    profile = laws_of(answer)
    cases: list[Case] = []
    if schedule is not None and profile is not None and answer.get("candidates"):
        chosen = Fleet(answer["prefill"], answer["decode"])
        p, d = answer.get("gpus_per_worker") or per_worker
        # No fleet may use all the GPUs that there are.
        cases = what_if(schedule, profile, slo, chosen, chosen.gpus((p, d)), (p, d))
    return build(
        answer,
        runs,
        traffic=traffic(schedule, profile, slo) if schedule is not None and len(schedule) > 1 else None,
        cases=cases,
        strategies=strategies,
        reproduce=reproduce(answer, [d.run for d in runs], commands, traces, db),
        traces=traces,
        db=db,
    )


def gather(
    store: Store,
    answer: Mapping[str, Any],
    *,
    data: Sequence[RunData] | None = None,
    run_ids: Sequence[int] = (),
    schedule: Schedule | None = None,
    commands: Sequence[str] = (),
) -> Report:
    """The report of an answer, with what the database knows about it. data: the runs' rows, where they are at hand already;
    without, one run at a time is read, digested and let go.
    """
    slo = Slo.parse(answer["slo"]) if answer.get("slo") else Slo()
    ids = list(run_ids) or list(answer.get("run_ids") or answer.get("runs") or ())
    laws = laws_of(answer)
    held: list[Digest] = []
    fitted = 0  # reading for the laws is most of the work, and no more are drawn
    asked: Sequence[int | RunData] = ids if data is None else data
    for one in reversed(asked):
        run, rows = (store.run(one), None) if isinstance(one, int) else (one.run, one)
        held.append(found := read(store, run, slo, laws if fitted < DRAWN else None, rows))
        fitted += found.tpot is not None or found.ttft is not None
    held.reverse()
    names = sorted({d.run.trace for d in held} | ({answer["trace"]} if answer.get("trace") else set()))
    stored = {t.name: {"format": t.format, "sha256": t.sha256, **t.summary} for t in store.traces() if t.name in names}
    return assemble(
        answer,
        held,
        schedule=rebuilt(store, answer) if schedule is None else schedule,
        strategies=_study(store, answer),
        commands=commands,
        traces=stored,
        per_worker=held[-1].run.gpus_per_worker if held else (1, 1),
        db=store.told,
    )


def laws_of(answer: Mapping[str, Any]) -> Profile | None:
    """The fitted laws that an answer holds; None where it holds none that this version can read."""
    import tomllib

    try:
        return Profile.from_table(tomllib.loads(answer["profile"]), "the answer's profile")
    except (AttributeError, KeyError, TypeError, tomllib.TOMLDecodeError, InputError):
        return None


def rebuilt(store: Store, answer: Mapping[str, Any]) -> Schedule | None:
    """The traffic that a stored answer is about, made again from its trace; None where that is not possible."""
    try:
        changes = answer.get("schedule_changes") or ()
        first = re.fullmatch(r"first (\d+) of \d+ requests", changes[0]) if changes else None
        windows = re.fullmatch(r"(\d+) windows of \d+ requests of \d+", changes[0]) if changes else None
        if windows:  # how many requests of a window did not fail does not tell how wide it was
            (schedule, _), changes = store.excerpt(answer["trace"], POINT_REQUESTS, int(windows[1])), changes[1:]
        else:
            schedule = store.schedule(answer["trace"], most=int(first[1]) if first else None)
        for change in changes:
            if match := re.fullmatch(r"first (\d+) of \d+ requests", change):
                schedule = head(schedule, int(match[1]))
            elif match := re.fullmatch(r"requests (\d+) to (\d+) of \d+", change):
                schedule = piece(schedule, int(match[1]), int(match[2]))
            elif match := re.fullmatch(r"window ([\d.e+]+) to ([\d.e+]+) s", change):
                schedule = window(schedule, float(match[1]), float(match[2]))
            elif not change.startswith("rate x"):
                return None
        schedule = to_rate(schedule, float(answer["rate_per_s"]))
        return schedule if len(schedule) == answer["requests"] else None
    except (InputError, KeyError, TypeError, ValueError):
        return None


def _study(store: Store, answer: Mapping[str, Any]) -> dict[str, Any] | None:
    """The latest comparison of strategies on the answer's trace."""
    for row in store.recommendations(kind="strategies"):
        if row["answer"].get("source") == answer.get("trace"):
            return dict(row["answer"])
    return None


def text_of(report: Report, form: str) -> str:
    """The report in one of the text FORMATS."""
    if form == "json":
        return json.dumps(_finite(report.as_json()), indent=2, allow_nan=False) + "\n"
    return markdown(report) if form == "md" else render(report)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, float) and value - value != 0:
        return None
    return value


def write_report(path: Path, page: str | bytes) -> None:
    """Write the page whole or not at all. InputError when the place cannot be written."""
    with whole(path, "wb", folders=True) as file:
        file.write(page.encode() if isinstance(page, str) else page)
