"""Measures by itself until it is sure: the probes that the advisor asks for, on an endpoint whose split can be set."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from advisor.advise import load
from advisor.recommend import Recommendation, recommend
from advisor.study import check_rate, quiet, splits_of
from advisor.telling import Note, silent
from loadgen.client import Target
from loadgen.control import Control, Endpoint
from loadgen.live import Live
from loadgen.replay import replay
from loadgen.swarm import Swarm
from loadgen.sweep import keeping
from traces.errors import EndpointError, NotEnoughDataError
from traces.fit import alike
from traces.measures import Slo
from traces.records import Fleet, Run, Schedule
from traces.shape import to_rate
from traces.store import Store

PROBE_S = 45.0
"""How long the requests of a probe are spread over at most."""

LEAST_S = 5.0
"""No probe is begun with less of the budget left."""

PATIENCE_S = 30.0
"""How long answers may come after the budget."""

LEAST = 24
"""Requests of a probe."""


@dataclass(frozen=True, slots=True)
class Probing:
    """What was measured and why it ended. sure: the answer can be relied on. spent_s: of the budget. put_back: the split that was
    in force is so again."""

    group: str
    runs: list[int]
    sure: bool
    reason: str
    spent_s: float
    put_back: bool = True


def probe(
    store: Store,
    swarm: Swarm,
    where: Target,
    schedule: Schedule,
    *,
    gpus: int,
    slo: Slo,
    budget_s: float,
    gpus_per_worker: tuple[int, int] = (1, 1),
    attainment: float = 0.9,
    group: str = "",
    seed: int = 0,
    note: Callable[[str], None] = lambda line: None,
    watch: Callable[[str, Live], None] = lambda step, live: None,
    progress: Note = silent,
) -> Probing:
    """Replay what :func:`advisor.recommend.next_probe` names, until the answer is sure or ``budget_s`` is spent.

    Every probe is a stored run of ``group``. The split that was in force is put back at the end, after Ctrl-C too, which leaves
    what was measured and raises. EndpointError where the endpoint has no split to set. note(line): what is asked next and what
    is known so far; watch(step, live), progress(step, done, of): a replay as it goes.
    """
    began = time.monotonic()
    check_rate(schedule)
    if Endpoint(where).fleet() is None:
        raise EndpointError(
            f"{where.shown}: its split cannot be set by steelyard (no /fleet), so --auto cannot probe. Run the probes that "
            "advise names by hand."
        )
    group = group or time.strftime("auto-%Y%m%d-%H%M%S", time.gmtime())
    runs: list[Run] = []
    done: list[tuple[Fleet, float]] = []

    def rounds(keeper: Control | None) -> Probing:
        while True:
            left = budget_s - (time.monotonic() - began)
            answer = _assessed(store, runs, schedule, gpus, slo, gpus_per_worker, attainment, seed)
            if answer is not None:
                note(_known(answer))
            if _sure(answer):
                return Probing(group, [r.id for r in runs], True, "the answer is sure", budget_s - left)
            if left < LEAST_S:
                return Probing(group, [r.id for r in runs], False, "the budget is spent", budget_s - left)
            fleet, rate, spread = _next(answer, runs, schedule, gpus, gpus_per_worker)
            if done[-2:] == [(fleet, rate)] * 2:
                return Probing(
                    group, [r.id for r in runs], False, "the same probe twice told nothing new", budget_s - left
                )
            done.append((fleet, rate))
            step = f"probe {len(runs) + 1}, {fleet}"
            note(f"probe {len(runs) + 1}: {fleet} at {rate:.3g}/s, {left:.0f} s of the budget left")
            asked = _piece(schedule, rate, min(PROBE_S, left / 3), seed + len(runs), spread)
            runs.append(
                replay(
                    store,
                    swarm,
                    asked,
                    where,
                    name=f"{group} {fleet} at {rate:.3g}/s",
                    fleet=fleet,
                    control=keeper,
                    group=group,
                    slo=slo,
                    seed=seed,
                    gpus_per_worker=gpus_per_worker,
                    timeout_s=min(600.0, left + PATIENCE_S),
                    on_live=partial(watch, step),
                    on_progress=partial(progress, step),
                )
            )

    with keeping(None, where, "auto", note) as keeper:
        found = rounds(keeper)
    return replace(found, put_back=not getattr(keeper, "stranded", False))


def _piece(schedule: Schedule, rate: float, seconds: float, seed: int, spread: bool = False) -> Schedule:
    """As many requests as fill the time at a rate, a stretch of the trace by seed; spread: drawn anew, as are those of one
    instant, which have no rate to scale."""
    n = min(len(schedule), max(min(LEAST, len(schedule)), int(rate * seconds)))
    start = int(np.random.default_rng(seed).integers(len(schedule) - n + 1))
    part = schedule.take(np.arange(start, start + n))
    if spread or not part.span_s:
        return alike(part, n, name=part.name, rate_per_s=rate, arrivals="poisson", seed=seed)
    return to_rate(replace(part, due_s=part.due_s - part.due_s[0]), rate)


def _assessed(
    store: Store,
    runs: Sequence[Run],
    schedule: Schedule,
    gpus: int,
    slo: Slo,
    gpus_per_worker: tuple[int, int],
    attainment: float,
    seed: int,
) -> Recommendation | None:
    if len(runs) < 3:
        return None  # low load, prefill and decode saturated: less can never do
    arguments: dict[str, Any] = {"gpus_per_worker": gpus_per_worker, "attainment": attainment, "seed": seed}
    try:
        return recommend(load(store, runs), schedule, gpus=gpus, slo=slo, **arguments, refuse=False)
    except NotEnoughDataError:
        return None


def _known(answer: Recommendation) -> str:
    """What the runs say so far."""
    best = answer.best
    text = f"so far {best.fleet}, {best.figures['goodput_per_s'].value:.3g} req/s, most in {best.wins:.0%} of draws"
    return f"{text}; not sure: {answer.refused}" if answer.refused else text


def _sure(answer: Recommendation | None) -> bool:
    """Is there an answer that calls itself sure? What ends the probing is what stands in it."""
    return answer is not None and answer.sure


def _next(
    answer: Recommendation | None, runs: Sequence[Run], schedule: Schedule, gpus: int, per_worker: tuple[int, int]
) -> tuple[Fleet, float, bool]:
    """The advisor's own next probe; before it can name one, those that every fit needs. True: bunches are spread."""
    rate, splits = schedule.rate_per_s, splits_of(gpus, per_worker)
    first = [(splits[0], rate), (splits[-1], 0.5 * rate)]
    if answer is None and 0 < len(runs) <= len(first):
        return *first[len(runs) - 1], False
    probe = answer.next_probe if answer is not None else quiet(schedule, gpus, 0.1 if runs else 0.2, per_worker)
    return Fleet(probe["prefill"], probe["decode"]), float(probe["rate_per_s"]), probe["arrivals"] == "poisson"
