"""What a change of roles costs beyond its drain: stored changes, beside what the laws say of the drain.

A worker that leaves a role serves what it holds, then flips. The drain follows from the decode law and from who was there, so
every run that changed its fleet is simulated with its first change and a flip that takes no time; what the first
move took longer is the flip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from advisor.features import RunData
from advisor.model import Law, asked
from loadgen.cluster import Profile, simulate
from traces.records import MOST_FAILED, SHARED, FleetChange

REQUESTS = 20_000
"""Requests of a run that are simulated before its changes at most."""


def flip_law(moved: Sequence[tuple[RunData, Sequence[FleetChange]]], laws: Profile) -> Law | None:
    """The flip, in seconds (median over the runs' first changes); None where no change was in force.

    moved: runs with the changes that they made. error: median relative error of a whole move, asked until in force.
    """
    bare = replace(laws, flip_s=0.0)
    found: list[tuple[int, float, float]] = []  # run, the move, its drain by the laws
    for one, changes in moved:
        # As for the other laws: no run that its own verdict spoils, none whose clock ran at another speed, whose prompts
        # need not have been computed whole, or of which many requests failed.
        if one.run.verdict not in ("valid", "degraded") or one.run.sped or SHARED in one.run.changes:
            continue
        if (one.counted.status == "failed").sum() > MOST_FAILED * len(one.counted):
            continue
        schedule = asked(one.observations)
        if not changes or one.windows or len(schedule) > REQUESTS:
            continue
        # Who is there at a later change depends on how long the first one took: a flip a tenth of a second off may move a
        # drain by seconds.
        first = changes[0]
        if first.before.mixed or first.after.mixed or not math.isfinite(took(first)):
            continue
        if first.before.workers != first.after.workers:
            continue  # a worker that starts, or leaves, is no flip
        made = simulate(schedule, first.before, bare, changes=[(first.asked_s, first.after)])
        drains = [s.drained_s - s.asked_s for s in made.switches]
        if drains:
            found.append((one.run.id, took(first), max(drains)))
    if not found:
        return None
    flip = float(np.median([max(move - drain, 0.0) for _, move, drain in found]))
    error = float(np.median([abs((drain + flip) / max(move, 1e-9) - 1) for _, move, drain in found]))
    where = ", ".join(str(run) for run, _, _ in found)
    return Law(
        "role change", {"flip_s": flip}, len(found), error, f"first changes of runs {where}, less the drain by the laws"
    )


def took(change: FleetChange) -> float:
    """Seconds from asking until the role that grows had its workers, or, where nobody saw that, until all was in force."""
    end = change.joined_s if math.isfinite(change.joined_s) else change.ready_s
    return end - change.asked_s
