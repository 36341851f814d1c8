"""The same schedule on several fleets, in random order."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from loadgen.client import Target
from loadgen.control import Endpoint
from loadgen.replay import replay
from loadgen.swarm import Swarm
from traces.errors import EndpointError, InputError
from traces.records import Fleet, Run, Schedule
from traces.store import Store


def sweep(
    store: Store,
    swarm: Swarm,
    schedule: Schedule,
    where: Target | Sequence[Target],
    fleets: Sequence[Fleet],
    *,
    seed: int = 0,
    repeats: int = 1,
    group: str = "",
    note: Callable[[str, int], None] = lambda line, done: None,
    **how: Any,
) -> tuple[str, list[Run]]:
    """Replay on each fleet ``repeats`` times; returns (group name, runs in the order they ran).

    Each repeat is a shuffle of all fleets (by ``seed``), so that drift spreads over them. The fleet that was in force
    is put back at the end, whatever the end is. ``how`` goes to :func:`loadgen.replay.replay`.
    """
    server = Endpoint(where if isinstance(where, Target) else where[0])
    before = server.fleet()
    if before is None:
        raise EndpointError(
            f"{server.shown}: its fleet cannot be set (no /fleet). Set it yourself and run steelyard replay for each fleet."
        )
    if not fleets:
        raise InputError("a sweep needs at least one fleet.")
    group = group or time.strftime("sweep-%Y%m%d-%H%M%S", time.gmtime())
    rng = random.Random(seed)  # noqa: S311 - an order, not a secret
    order = [fleet for _ in range(repeats) for fleet in rng.sample(list(fleets), len(fleets))]
    runs: list[Run] = []
    try:
        for k, fleet in enumerate(order):
            first = k * len(schedule)
            note(f"fleet {fleet}", first)
            run = replay(
                store,
                swarm,
                schedule,
                where,
                name=f"{group} {fleet}",
                fleet=fleet,
                group=group,
                seed=seed,
                on_progress=lambda done, _, first=first, fleet=fleet: note(f"fleet {fleet}", first + done),  # type: ignore[misc]
                **how,
            )
            runs.append(run)
    finally:
        with contextlib.suppress(EndpointError):  # a server that went away keeps no fleet
            server.set_fleet(before)
    return group, runs
