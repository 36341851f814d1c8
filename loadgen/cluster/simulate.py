"""The cluster in virtual time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loadgen.cluster.kernel import Cluster, Job, Switch
from loadgen.cluster.laws import Profile
from traces.records import Fleet, Observations, Schedule


@dataclass(frozen=True, eq=False)
class SimResult:
    """A simulated run. observations: as a perfect client would have measured them (sent = due, tokens at their instants).

    utilisation: busy worker-seconds / worker-seconds by role, from first due to last token. switches: every role change.
    """

    observations: Observations
    utilisation: dict[str, float]
    switches: list[Switch]


def simulate(
    schedule: Schedule,
    fleet: Fleet,
    profile: Profile,
    *,
    gpus_per_worker: tuple[int, int] = (1, 1),
    changes: Sequence[tuple[float, Fleet]] = (),
) -> SimResult:
    """Run a schedule through a fleet. changes: (instant, fleet) pairs, ascending. Deterministic: nothing is drawn.

    gpus_per_worker changes nothing in the figures (laws are per worker); it is taken so that callers can pass what
    they have.
    """
    n = len(schedule)
    rows = Observations.unsent(schedule)
    due = schedule.due_s.tolist()
    prompts, outputs = schedule.prompt_tokens.tolist(), schedule.output_tokens.tolist()
    if profile.discipline == "infinite":
        arrive = schedule.due_s
        first = (
            arrive
            + (profile.a_s + profile.overhead_s + profile.transfer_t0_s)
            + (profile.b_s_per_token + profile.transfer_s_per_token) * schedule.prompt_tokens
            + profile.c_s_per_token2 * schedule.prompt_tokens.astype(float) ** 2
            + profile.c0_s
        )
        last = first + profile.c0_s * (schedule.output_tokens - 1)
        gap = np.where(schedule.output_tokens > 1, profile.c0_s, np.nan)
        return SimResult(_filled(rows, first, last, gap), {"prefill": math.nan, "decode": math.nan}, [])
    cluster = Cluster(profile, fleet)
    jobs = [Job(i, prompts[i], outputs[i], due[i]) for i in range(n)]
    advance, submit = cluster.advance, cluster.submit
    events = cluster._events
    pending = list(changes)
    for job in jobs:
        at = job.arrive_s
        while pending and pending[0][0] <= at:
            when, wanted = pending.pop(0)
            advance(when)
            cluster.set_fleet(wanted)
        if events and events[0][0] <= at:
            advance(at)
        else:
            cluster.now_s = at
        submit(job)
    for when, wanted in pending:
        advance(when)
        cluster.set_fleet(wanted)
    while cluster.next_s < math.inf:
        advance(cluster.next_s)
    first = np.array([j.first_s for j in jobs], dtype=float)
    last = np.array([j.finish_s for j in jobs], dtype=float)
    span = (float(last.max()) - due[0]) if n else 0.0
    end = float(last.max()) if n else 0.0
    utilisation = {}
    for role, count in (("prefill", fleet.prefill), ("decode", fleet.decode)):
        busy = sum(w.busy_until(end, role) for w in cluster.workers)
        utilisation[role] = busy / (span * count) if span > 0 else math.nan
    return SimResult(_filled(rows, first, last, np.full(n, np.nan)), utilisation, cluster.switches)


def _filled(rows: Observations, first: np.ndarray, last: np.ndarray, gap: np.ndarray) -> Observations:
    n = len(rows)
    return Observations(
        index=rows.index,
        worker=np.zeros(n, dtype=np.int64),
        due_s=rows.due_s,
        sent_s=rows.due_s,
        first_byte_s=first,
        first_token_s=first,
        last_token_s=last,
        requested_prompt_tokens=rows.requested_prompt_tokens,
        requested_tokens=rows.requested_tokens,
        prompt_tokens=rows.requested_prompt_tokens,
        output_tokens=rows.requested_tokens,
        chunks=rows.requested_tokens,
        max_gap_s=gap,
        http_status=np.full(n, 200, dtype=np.int64),
        status=np.full(n, "ok", dtype=object),
        error=rows.error,
        detail=rows.detail,
    )
