"""The main job on a shipped trace and the embedded endpoint: ingest, three runs that tell fleets apart, advice, report.

Why these three runs: at low load TTFT shows the latency of one request but not what occupies a worker; only a run that
saturates prefill shows how many prompts share a step, and only one that saturates decode shows how a step slows down
under its batch. None of them runs the fleet that is recommended in the end.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advisor.advise import Answer, advise
from advisor.report import gather, render, write_report
from advisor.telling import Note
from loadgen.cluster.embedded import embedded
from loadgen.live import Live
from loadgen.replay import replay
from loadgen.swarm import Swarm
from traces import __version__
from traces.ingest import ingest
from traces.measures import Slo
from traces.records import Fleet, Run, Schedule
from traces.shape import head, scale_rate
from traces.shipped import shipped
from traces.store import Store

TRACE = "azure-2023-conv"
SLO = "ttft<0.5s tpot<50ms"
GPUS = 8
PROFILE = "demo"


@dataclass(frozen=True, slots=True)
class Probe:
    """One run of the demo. factor: the recorded gaps are divided by it. requests: the first that many of the trace."""

    what: str
    fleet: Fleet
    factor: float
    requests: int


PROBES = (
    Probe("low load", Fleet(4, 4), 2.0, 40),
    Probe("prefill saturated", Fleet(1, 7), 10.0, 180),
    Probe("decode saturated", Fleet(7, 1), 4.0, 48),
)

ASKED_FACTOR = 2.0
"""The rate that is asked about: the recorded gaps divided by this."""

ASKED_REQUESTS = 600
"""The part of the trace that the splits are compared on."""


@dataclass(frozen=True, eq=False)
class Demo:
    """What the demo did."""

    runs: list[Run]
    answer: Answer
    report: Path


def asked_schedule(store: Store) -> Schedule:
    """The traffic that the demo's question is about; what :func:`sweep_command` prints replays the same."""
    return scale_rate(head(store.schedule(TRACE), ASKED_REQUESTS), ASKED_FACTOR)


def sweep_command(db: str) -> str:
    """What measures every split on the requests that the demo asks about."""
    words = ["sweep", TRACE, "--profile", PROFILE, "--all", "--gpus", str(GPUS), "--requests", str(ASKED_REQUESTS)]
    return shlex.join(
        ["steelyard", *words, "--rate-factor", f"{ASKED_FACTOR:g}", "--slo", SLO, *(["--db", db] if db else [])]
    )


def demo(
    store: Store,
    out: Path,
    *,
    seed: int = 0,
    workers: int = 2,
    note: Note,
    watch: Callable[[str, Live], None] = lambda step, live: None,
    say: Callable[[str], Any],
    command: str = "steelyard demo",
) -> Demo:
    """Run the main job. note(step, done, of) drives progress bars, watch(step, live) is told what a replay finds;
    say(line) prints what was found."""
    note("ingest", 0, 1)
    report = ingest(store, [shipped(TRACE)], name=TRACE)
    note("ingest", 1, 1)
    say(f"trace {TRACE}: {report.rows_kept} requests, recorded rate {store.schedule(TRACE).rate_per_s:.2f}/s")
    group = time.strftime("demo-%Y%m%d-%H%M%S", time.gmtime())
    slo = Slo.parse(SLO)
    runs = []
    with embedded(PROFILE, PROBES[0].fleet) as endpoint, Swarm(workers=workers) as swarm:
        for probe in PROBES:
            schedule = scale_rate(head(store.schedule(TRACE), probe.requests), probe.factor)
            label = f"{probe.what} {probe.fleet}"
            say(
                f"run {label}: {probe.requests} requests at recorded gaps x {1 / probe.factor:.3g} ({schedule.rate_per_s:.2f}/s)"
            )
            for attempt in ("", " again"):
                run = replay(
                    store,
                    swarm,
                    schedule,
                    endpoint,
                    name=f"{group} {probe.what}{attempt}",
                    fleet=probe.fleet,
                    rate_factor=probe.factor,
                    slo=slo,
                    seed=seed,
                    group=group,
                    on_live=lambda live, label=label: watch(f"replay {label}", live),  # type: ignore[misc]
                    on_progress=lambda done, of, label=label: note(f"replay {label}", done, of),  # type: ignore[misc]
                )
                say(
                    f"  {run.counts.get('ok', 0)}/{run.scheduled} ok, send lag p50 {run.lag_p50_ms:.1f} "
                    f"p99 {run.lag_p99_ms:.1f} max {run.lag_max_ms:.1f} ms: {run.verdict}"
                )
                if run.verdict != "invalid":
                    break
                say(f"  rejected ({run.reason})" + ("" if attempt else ", measured once more"))
            runs.append(run)
    answer = advise(
        store,
        gpus=GPUS,
        slo=SLO,
        group=group,
        seed=seed,
        schedule=asked_schedule(store),
        note=note,
    )
    note("report", 0, 1)
    path = out / "report.html"
    told = answer.as_json() | {"version": __version__, "seed": seed}
    schedule = answer.recommendation.schedule
    page = gather(store, told, data=answer.data, schedule=schedule, commands=[command, sweep_command(store.told)])
    write_report(path, render(page))
    note("report", 1, 1)
    return Demo(runs, answer, path)
