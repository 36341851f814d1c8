"""The same requests on several fleets at several rates, in random order; and the highest rate that a fleet sustains."""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from loadgen.client import Target
from loadgen.control import Control, Endpoint, Keeper
from loadgen.control.reference import Reference
from loadgen.discover import discover
from loadgen.replay import replay
from loadgen.swarm import Swarm
from traces.errors import EndpointError, InputError
from traces.measures import LAG_LIMIT_S, Slo, meets, summarise
from traces.records import CAUSAL, SHARED, Feed, Fleet, Run, Schedule
from traces.store import Store

SPOILED = 2

Note = Callable[[str, int], None]
"""Called with what is measured now and the requests asked so far."""


@dataclass(frozen=True, slots=True)
class Drift:
    """The same cell measured at different times of a sweep. ttft, tpot: medians in seconds, in the order of the runs."""

    runs: tuple[int, ...]
    ttft_p50_s: tuple[float, ...]
    tpot_p50_s: tuple[float, ...]

    @property
    def largest(self) -> float:
        """The largest relative difference between two of them; 0.05 is 5 %."""
        spans = [max(v) / min(v) - 1 for v in (self.ttft_p50_s, self.tpot_p50_s) if len(v) > 1 and min(v) > 0]
        return max(spans, default=0.0)


def plan(
    fleets: Sequence[Fleet], rates: int, *, seed: int = 0, repeats: int = 1, anchor: bool = False
) -> list[tuple[Fleet, int]]:
    """Cells (fleet, number of the rate) in the order in which they are measured.

    Each repeat is a shuffle of all cells (by ``seed``), so that drift spreads over them. anchor: the middle cell is measured
    at the beginning, after each repeat and so at the end too.
    """
    rng = random.Random(seed)  # noqa: S311 - an order, not a secret
    cells = [(fleet, k) for fleet in fleets for k in range(rates)]
    middle = (fleets[len(fleets) // 2], rates // 2) if cells else None
    order = [middle] if anchor and middle else []
    for _ in range(repeats):
        order += rng.sample(cells, len(cells))
        if anchor and middle:
            order.append(middle)
    return order


def sweep(
    store: Store,
    swarm: Swarm,
    schedule: Schedule | Feed | Sequence[Schedule | Feed],
    where: Target | Sequence[Target],
    fleets: Sequence[Fleet],
    *,
    seed: int = 0,
    repeats: int = 1,
    anchor: bool = False,
    group: str = "",
    factors: Sequence[float] = (),
    control: Control | None = None,
    note: Note = lambda line, done: None,
    say: Callable[[str], None] = lambda line: None,
    **how: Any,
) -> tuple[str, list[Run], Drift | None]:
    """Replay each schedule (one a rate) on each fleet; returns (group, runs in order, drift of the anchor).

    A sweep that was broken off goes on: of a group that is there, complete and trusted runs of the same cell are taken as
    they are, the rest is measured; InputError where they are of another system or SLO. control: how the fleet is set
    [``/fleet``]. The fleet that was in force is put back at the end, whatever the end is; after a crash by ``steelyard control
    restore``. say gets a line when that does not succeed, and how many cells were measured before.
    factors: by what the recorded gaps of each schedule were divided, for its runs' ``rate_factor``.
    ``how`` goes to :func:`loadgen.replay.replay`.
    """
    schedules = [schedule] if isinstance(schedule, (Schedule, Feed)) else list(schedule)
    if not fleets or not schedules:
        raise InputError("a sweep needs at least one fleet and one rate.")
    group = group or time.strftime("sweep-%Y%m%d-%H%M%S", time.gmtime())
    order = plan(fleets, len(schedules), seed=seed, repeats=repeats, anchor=anchor)
    manner = {word for word, on in ((SHARED, how.get("prefixes")), (CAUSAL, how.get("sessions") == "causal")) if on}
    digests = [asked.digest() for asked in schedules]
    wanted = Counter((fleet, digests[k]) for fleet, k in order)
    held: dict[tuple[Fleet | None, str], list[Run]] = {cell: [] for cell in wanted}
    for run in store.runs(group=group):
        if run.complete and run.verdict != "invalid" and run.manner == manner:
            held.get((run.fleet, run.schedule_digest), []).append(run)
    if before := [run for cell in held.values() for run in cell]:
        version = _alike(before, where, how)
        taken = sum(min(len(held[cell]), n) for cell, n in wanted.items())
        unsaid = [f"run {run.id}" for run in before if not run.engine_version][:5]
        unsaid += [] if version else ["the server now"]
        doubt = f" (engine's version not known: {', '.join(unsaid)})" if unsaid else ""
        say(f"group {group}: {taken} of {len(order)} cells were measured before{doubt}")
    runs: list[Run] = []
    done = 0
    with keeping(control, where, "sweep", say) as keeper:
        for fleet, k in order:
            asked = schedules[k]
            what = f"{fleet}" + (f" at {asked.rate_per_s:.3g}/s" if len(schedules) > 1 else "")
            known = held[fleet, digests[k]]
            if known:
                runs.append(known.pop(0))
            else:
                note(f"fleet {what}", done)
                progress = lambda n, _, done=done, what=what: note(f"fleet {what}", done + n)  # noqa: E731
                named: dict[str, Any] = {
                    "name": f"{group} {what}",
                    "group": group,
                    "seed": seed,
                    "rate_factor": factors[k] if factors else 1.0,
                    "on_progress": progress,
                }
                runs.append(replay(store, swarm, asked, where, fleet=fleet, control=keeper, **named | how))
            done += len(asked)
    return group, runs, _drift(store, runs, order) if anchor else None


def _alike(before: Sequence[Run], where: Target | Sequence[Target], how: Mapping[str, Any]) -> str:
    """The version that the server says; InputError unless runs were measured on the system that is there now, and in the way that
    is asked for now."""
    servers = [where] if isinstance(where, Target) else where
    server, slo = Endpoint(servers[0]), how.get("slo")
    found = discover(server, engine=how.get("engine", "auto"), targets=how.get("targets"))
    now = {
        "endpoint": " ".join(one.shown for one in servers),
        "engine": found.engine.name,
        "model": server.choose_model(how.get("model"))[0],
        "engine_version": found.version[:80],
        "slo": str(slo) if slo else "",
        "warmup_s": float(how.get("warmup_s", 0.0)),
        "gpus_per_worker": tuple(how.get("gpus_per_worker", (1, 1))),
    }
    if found.engine.name == "reference":
        del now["endpoint"]  # an embedded one has another port each time; its version says its profile
    for run in before:
        for name, value in now.items():
            its = getattr(run, name)
            if name == "engine_version" and not (its and value):
                continue  # a server may not say it, and older versions of ours did not ask
            if its != value:
                raise InputError(
                    f"group {run.group!r}: run {run.id} asked the same of {run.fleet} with another {name} "
                    f"({its!r}, now {value!r}). Give another --group, or what it was measured with."
                )
    return found.version


def _drift(store: Store, runs: Sequence[Run], order: Sequence[tuple[Fleet, int]]) -> Drift:
    anchors = [run for run, cell in zip(runs, order, strict=True) if cell == order[0]]
    said = [store.figures(run).quantiles for run in anchors]
    return Drift(
        tuple(run.id for run in anchors),
        tuple(q["ttft_s"]["p50"] for q in said),
        tuple(q["tpot_s"]["p50"] for q in said),
    )


@contextmanager
def keeping(
    control: Control | None,
    where: Target | Sequence[Target],
    verb: str,
    say: Callable[[str], None],
    *,
    needed: bool = True,
) -> Iterator[Control | None]:
    """The control that keeps the fleet which was in force, and puts it back afterwards; None where nothing sets it."""
    server = Endpoint(where if isinstance(where, Target) else where[0])
    if control is None and server.fleet() is not None:
        control = Reference(server)
    if control is None and needed:
        raise EndpointError(
            f"{server.shown}: its fleet cannot be set (no /fleet). Say how with --control, or set it yourself and run "
            "steelyard replay for each fleet."
        )
    if control is None or isinstance(control, Keeper):
        yield control
        return
    with Keeper(control, verb, put_back=True, say=say) as keeper:
        yield keeper


@dataclass(frozen=True, slots=True)
class Saturation:
    """What a fleet sustains. held: the highest rate at which it met the SLO's constraints or, without any, the share of requests
    within the SLO was at least the attainment, NaN if none was; failed: the lowest rate above it at which it did not, NaN if none
    was tried; reason: why not."""

    fleet: Fleet | None
    held_per_s: float
    failed_per_s: float
    goodput_per_s: float
    runs: tuple[int, ...]
    reason: str = ""


def _met(store: Store, run: Run, slo: Slo, attainment: float) -> bool:
    """Did a run meet the SLO? :func:`traces.measures.meets`, of a long one by its counts."""
    figures = store.figures(run)
    if not slo.constraints:
        return figures.attainment >= attainment
    if (counted := store.bins(run)) is not None:
        quantiles = (counted.quantile(f"{metric}_s", q / 100) <= limit for metric, q, limit in slo.constraints)
        return figures.ok == figures.n and all(quantiles)
    rows = run.counted(store.observations(run.id))
    return meets(summarise(rows, slo), rows, slo, attainment)


def saturate(
    store: Store,
    swarm: Swarm,
    at_rate: Callable[[float], Schedule],
    where: Target | Sequence[Target],
    fleet: Fleet | None,
    *,
    slo: Slo,
    start_per_s: float,
    recorded_per_s: float = math.nan,
    attainment: float = 0.9,
    tolerance: float = 0.05,
    most: int = 16,
    group: str = "",
    control: Control | None = None,
    note: Note = lambda line, done: None,
    say: Callable[[str], None] = lambda line: None,
    **how: Any,
) -> Saturation:
    """The highest rate that a fleet sustains within an SLO: doubled until it fails (or halved until it holds), then bisected.

    at_rate: the schedule at a rate; recorded_per_s: the rate before it was scaled, for the runs' ``rate_factor``. Stops when the
    bracket is within ``tolerance``, after ``most`` runs, or where all requests after the warm-up would be sent within the time
    that the SLO lets one wait: no queue could fail it. A run that the
    generator spoiled is repeated, at most SPOILED times in a row; then an EndpointError ends the search: what lies above is
    not the server's limit.
    """
    held, failed, best, reason = math.nan, math.nan, math.nan, ""
    waits = [v for m, v in slo.limits if m != "tpot"] + [v for m, _, v in slo.constraints if m != "tpot"]
    least_s, warmup_s = max(waits, default=LAG_LIMIT_S), float(how.get("warmup_s", 0.0))
    scaled = not math.isnan(recorded_per_s)
    runs: list[int] = []
    rate, done, spoiled = start_per_s, 0, 0
    with keeping(control, where, "sweep", say, needed=False) as keeper:
        while len(runs) < most:
            asked = at_rate(rate)
            what = f"{fleet or 'as it is'} at {rate:.3g}/s"
            note(f"fleet {what}", done)
            named: dict[str, Any] = {"name": f"{group} {what}", "group": group, "slo": slo}
            named["rate_factor"] = rate / recorded_per_s if scaled else 1.0
            run = replay(store, swarm, asked, where, fleet=fleet, control=keeper, **named | how)
            done += len(asked)
            runs.append(run.id)
            if run.verdict == "invalid" or not run.complete:
                spoiled += 1
                if spoiled <= SPOILED:
                    continue  # the same rate again
                raise EndpointError(
                    f"run {run.id} at {rate:.4g}/s cannot be trusted ({run.reason}): the search ends here. "
                    f"Sustained so far: {held:.4g}/s."
                )
            spoiled = 0
            if _met(store, run, slo, attainment):
                held, best = rate, store.figures(run).goodput_per_s
            else:
                failed = rate
            if math.isnan(failed):
                rate *= 2
                span_s = max(0.0, at_rate(rate).last_due_s - warmup_s)
                if span_s < least_s:
                    after = " after the warm-up" if warmup_s else ""
                    reason = (
                        f"{len(asked)} requests at {rate:.4g}/s are sent within {span_s:.2g} s{after}, before a queue shows: "
                        f"give at least --requests {math.ceil((10 * least_s + warmup_s) * rate)}"
                    )
                    break
            elif math.isnan(held):
                rate /= 2
            elif failed / held <= 1 + tolerance:
                break
            else:
                rate = math.sqrt(held * failed)
    return Saturation(fleet, held, failed, best, tuple(runs), reason)
