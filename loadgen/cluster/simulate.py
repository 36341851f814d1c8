"""The cluster in virtual time."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from loadgen.cluster.kernel import Cluster, Job, NextPhase, Switch, first_of, jobs_of, last_of, ready_of
from loadgen.cluster.laws import Profile
from traces.records import Fleet, Floats, Observations, Sample, Schedule

Controller = Callable[[float, Sequence[Sample], Fleet, int], Fleet | None]
"""(now_s, one reading a worker, the fleet asked for, workers that drain or flip) -> another fleet, or None."""


@dataclass(frozen=True, eq=False)
class SimResult:
    """A simulated run. observations: as a perfect client would have measured them (sent = due, tokens at their instants).

    utilisation: busy worker-seconds / worker-seconds by role, from first due to last token; a role's worker-seconds are
    those of the workers that had it, so it stays a share when roles change. busy_share: busy worker-seconds of all
    roles / all worker-seconds. switches: every role change. cached_tokens, preempted: counts over all workers.
    """

    observations: Observations
    utilisation: dict[str, float]
    switches: list[Switch]
    busy_share: float = math.nan
    cached_tokens: int = 0
    preempted: int = 0


def simulate(
    schedule: Schedule,
    fleet: Fleet,
    profile: Profile,
    *,
    changes: Sequence[tuple[float, Fleet]] = (),
    controller: Controller | None = None,
    tick_s: float = 1.0,
    on_demand: NextPhase | None = None,
) -> SimResult:
    """Run a schedule through a fleet, open loop. Deterministic: nothing is drawn.

    changes: (instant, fleet) pairs, ascending. controller: asked every tick_s from the first due time until the last
    answer; the fleet it returns is asked for. on_demand: workers take phases as they come (see :class:`Cluster`).
    """
    if profile.discipline == "infinite":
        return _infinite(schedule, profile)
    with _no_collection():
        return _simulated(
            schedule,
            Cluster(profile, fleet, on_demand=on_demand, block_tokens=schedule.block_tokens),
            changes,
            controller,
            tick_s,
        )


def _simulated(
    schedule: Schedule,
    cluster: Cluster,
    changes: Sequence[tuple[float, Fleet]] = (),
    controller: Controller | None = None,
    tick_s: float = 1.0,
) -> SimResult:
    jobs = _jobs(schedule)
    if controller is None and not changes:
        cluster.run(jobs)
    else:
        _steered(cluster, jobs, changes, controller, tick_s)
        while cluster.next_s < math.inf:
            cluster.advance(cluster.next_s)
    return _result(schedule, jobs, cluster)


def stage_times(schedule: Schedule, fleet: Fleet, profile: Profile) -> tuple[Floats, Floats, Floats]:
    """(KV cache at the decode worker, first token, last token) of every request, as :func:`simulate` has them.

    For who asks thousands of times.
    """
    if profile.discipline == "infinite":
        rows = _infinite(schedule, profile).observations
        return rows.first_token_s - profile.c0_s, rows.first_token_s, rows.last_token_s
    with _no_collection():
        return _timed(schedule, Cluster(profile, fleet, block_tokens=schedule.block_tokens))


def _timed(schedule: Schedule, cluster: Cluster) -> tuple[Floats, Floats, Floats]:
    jobs = _jobs(schedule)
    cluster.run(jobs)
    return np.array(ready_of(jobs), dtype=float), *_ends(jobs)


def _ends(jobs: list[Job]) -> tuple[Floats, Floats]:
    return np.array(first_of(jobs), dtype=float), np.array(last_of(jobs), dtype=float)


def simulate_batches(
    schedule: Schedule,
    fleet: Fleet,
    profile: Profile,
    batches: Iterable[tuple[Sequence[int], Fleet | None]],
    *,
    start_s: float = 0.0,
    in_flight: int = 0,
) -> SimResult:
    """Run a schedule batch after batch: a batch's requests (positions) are dispatched, in order, when the one before has ended.

    A batch may bring a fleet, which is asked for at its beginning. in_flight: at most that many requests at once (0: all
    of the batch). Latencies count from the schedule's due times; ``sent_s`` is the dispatch.
    """
    jobs = _jobs(schedule)
    order = [(list(rows), wanted) for rows, wanted in batches]
    if sorted(i for rows, _ in order for i in rows) != list(range(len(schedule))):
        raise ValueError("the batches must hold every request once")
    free: list[Job] = []
    cluster = Cluster(profile, fleet, on_finish=free.append, block_tokens=schedule.block_tokens)
    cluster.advance(start_s)
    with _no_collection():
        for rows, wanted in order:
            if wanted is not None and wanted != cluster.target:
                cluster.set_fleet(wanted)
            todo = [jobs[i] for i in reversed(rows)]
            going = 0
            while todo or going:
                while todo and (not in_flight or going < in_flight):
                    job = todo.pop()
                    job.arrive_s = cluster.now_s
                    cluster.submit(job)
                    going += 1
                cluster.advance(cluster.next_s)
                going -= len(free)
                free.clear()
        while cluster.next_s < math.inf:
            cluster.advance(cluster.next_s)
    sent = np.array([j.arrive_s for j in jobs], dtype=float)
    return _result(schedule, jobs, cluster, sent)


def _jobs(schedule: Schedule) -> list[Job]:
    jobs = jobs_of(schedule.prompt_tokens.tolist(), schedule.output_tokens.tolist(), schedule.due_s.tolist())
    if schedule.blocks is not None:
        for job, held in zip(jobs, schedule.blocks, strict=True):
            job.blocks = held
    return jobs


@contextmanager
def _no_collection() -> Iterator[None]:
    """Jobs and events form no cycles; looking for some costs a fifth of the time. They should be gone when this ends."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _steered(
    cluster: Cluster,
    jobs: list[Job],
    changes: Sequence[tuple[float, Fleet]],
    controller: Controller | None,
    tick_s: float,
) -> None:
    """Submit all jobs, and ask for other fleets when they are due."""
    pending = list(changes)
    tick = jobs[0].arrive_s + tick_s if jobs and controller else math.inf

    def until(at: float) -> None:
        nonlocal tick
        while (when := min(pending[0][0] if pending else math.inf, tick)) <= at:
            cluster.advance(when)
            if when == tick:
                tick += tick_s
                assert controller is not None  # noqa: S101 - there are no ticks without one
                wanted = controller(when, list(cluster.samples(when)), cluster.target, cluster.changing)
                if wanted is not None and wanted != cluster.target:
                    cluster.set_fleet(wanted)
            else:
                cluster.set_fleet(pending.pop(0)[1])

    advance, submit = cluster.advance, cluster.submit
    soonest = min(pending[0][0] if pending else math.inf, tick)
    for job in jobs:
        at = job.arrive_s
        if soonest <= at:
            until(at)
            soonest = min(pending[0][0] if pending else math.inf, tick)
        advance(at)
        submit(job)
    while cluster.next_s < math.inf:
        until(cluster.next_s)
        cluster.advance(cluster.next_s)
    for when, wanted in pending:
        cluster.advance(when)
        cluster.set_fleet(wanted)


def _infinite(schedule: Schedule, profile: Profile) -> SimResult:
    """Every request its own server."""
    first = (
        schedule.due_s
        + (profile.a_s + profile.overhead_s + profile.transfer_t0_s)
        + (profile.b_s_per_token + profile.transfer_s_per_token) * schedule.prompt_tokens
        + profile.c_s_per_token2 * schedule.prompt_tokens.astype(float) ** 2
        + profile.c0_s
    )
    last = first + profile.c0_s * (schedule.output_tokens - 1)
    gap = np.where(schedule.output_tokens > 1, profile.c0_s, np.nan)
    rows = _filled(schedule, schedule.due_s, first, last, gap)
    return SimResult(rows, {"prefill": math.nan, "decode": math.nan}, [])


def _result(schedule: Schedule, jobs: list[Job], cluster: Cluster, sent: np.ndarray | None = None) -> SimResult:
    n = len(jobs)
    first, last = _ends(jobs)
    start = float(schedule.due_s[0]) if n else 0.0
    end = float(last.max()) if n else 0.0
    held = _held_s(cluster, start, end)
    busy = {role: sum(w.busy_until(end, role) for w in cluster.workers) for role in held}
    whole = (end - start) * len(cluster.workers)
    return SimResult(
        _filled(schedule, schedule.due_s if sent is None else sent, first, last, np.full(n, np.nan)),
        {role: busy[role] / s if s > 0 else math.nan for role, s in held.items()},
        cluster.switches,
        sum(busy.values()) / whole if whole > 0 else math.nan,
        sum(w.cached_tokens for w in cluster.workers),
        sum(w.preempted for w in cluster.workers),
    )


def _held_s(cluster: Cluster, start: float, end: float) -> dict[str, float]:
    """Worker-seconds in each role between two instants; flips belong to no role."""
    held = {"prefill": 0.0, "decode": 0.0} | ({"mixed": 0.0} if cluster.target.mixed else {})
    since = dict.fromkeys(range(len(cluster.workers)), start)
    for switch in cluster.switches:
        served = min(switch.drained_s, end) - since[switch.worker]
        held[switch.before] = held.get(switch.before, 0.0) + max(0.0, served)
        since[switch.worker] = max(start, switch.ready_s)
    for w in cluster.workers:
        role = w.role if w.role != "flipping" else w.target
        held[role] = held.get(role, 0.0) + max(0.0, end - since[w.id])
    return held


def _filled(schedule: Schedule, sent: np.ndarray, first: np.ndarray, last: np.ndarray, gap: np.ndarray) -> Observations:
    n = len(schedule)
    return Observations.of(
        schedule.index,
        worker=np.zeros(n, dtype=np.int64),
        due_s=schedule.due_s,
        dispatch_s=sent,
        sent_s=sent,
        first_byte_s=first,
        first_token_s=first,
        last_token_s=last,
        requested_prompt_tokens=schedule.prompt_tokens,
        requested_tokens=schedule.output_tokens,
        prompt_tokens=schedule.prompt_tokens,
        output_tokens=schedule.output_tokens,
        chunks=schedule.output_tokens,
        max_gap_s=gap,
        http_status=np.full(n, 200, dtype=np.int64),
        status=np.full(n, "ok", dtype=object),
    )
