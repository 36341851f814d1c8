"""What to measure next: the run that is expected to spare the most goodput, by what it would tell.

The draws of the laws are a small world of possibilities. For each of them as if it were the truth, a run that is considered would
give certain statistics; draws whose own statistics are far from those would then be ruled out, and a split chosen with
what is left. What that choice loses, on average over the draws, against what today's choice loses is the value of the run.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from advisor.calibrate import CORRELATED, STATISTIC_SD, Replay
from advisor.model import load_of
from loadgen.cluster import Profile
from traces.errors import InputError
from traces.measures import Slo
from traces.records import Fleet, Floats, Schedule
from traces.shape import to_rate

BURSTY = 4.0
"""Gaps between requests whose standard deviation is more times their mean make bursts (recorded traces: 1 to 2.5, or above 6)."""

QUIET = 150
"""Requests of a run at low load."""

REQUESTS = 300
"""Requests of a run that is proposed, at least."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A run that could be made. gain: expected goodput that it spares, requests a second. aim: what it loads."""

    fleet: Fleet
    rate_per_s: float
    requests: int
    aim: str
    gain: float = 0.0


def bunched(schedule: Schedule) -> bool:
    """Do requests come so close together that no rate is low enough for one to be alone: several at an instant, or in bursts?"""
    if len(schedule) < 2:
        return False
    gaps = np.diff(schedule.due_s)
    return bool((gaps <= 0).mean() > 0.3 or gaps.std() > BURSTY * gaps.mean())


def check_rate(schedule: Schedule) -> None:
    """InputError where all requests come at one instant: a split is chosen for traffic that arrives."""
    if not math.isfinite(schedule.rate_per_s):
        name = schedule.name
        raise InputError(
            f"trace {name!r} has no rate, its requests ({len(schedule)} in a row) are due at one instant: a split is chosen "
            f"for traffic that arrives. Spread them: steelyard synth --like {shlex.quote(name)} --name "
            f"{shlex.quote(f'{name}-spread')} --lengths empirical --arrivals poisson --rate R"
        )


def splits_of(gpus: int, per_worker: tuple[int, int] = (1, 1)) -> list[Fleet]:
    """All fleets of ``gpus`` GPUs, or of the most below that make one; [] where none does."""
    return next((found for g in range(gpus, 1, -1) if (found := Fleet.splits(g, per_worker))), [])


def sized(per_worker: tuple[int, int]) -> str:
    """The option of a run whose workers have more than one GPU; "" for one each."""
    return "" if per_worker == (1, 1) else " --gpus-per-worker {},{}".format(*per_worker)


def reason(probe: Mapping[str, Any]) -> str:
    """Why a run comes next, and what it is expected to spare; of one that is not needed, that it is not."""
    text = str(probe["why"])
    if probe["gain_per_s"] > 0:
        text += f"; it is expected to spare {probe['gain_per_s']:.2g} req/s"
    return text + ("; enough is known without it" if probe["stop"] else "")


def quiet(schedule: Schedule, gpus: int, share: float = 0.2, per_worker: tuple[int, int] = (1, 1)) -> dict[str, Any]:
    """The first run of all: low load on the even split. Bunches are spread (arrivals: "poisson"), or all would queue."""
    fleet = min(splits_of(gpus, per_worker) or [Fleet(1, 1)], key=lambda f: abs(f.prefill - f.decode))
    rate = schedule.rate_per_s * share
    name, command, arrivals = schedule.name, "", "as recorded"
    if bunched(schedule):
        arrivals, name = "poisson", f"{schedule.name}-spread"
        command = (
            f"steelyard synth --like {shlex.quote(schedule.name)} --name {shlex.quote(name)} --lengths empirical "
            f"--arrivals poisson --requests {QUIET} --rate {rate:.3g} && "
        )
    command += (
        f"steelyard replay {shlex.quote(name)} --endpoint URL --fleet {fleet} --rate {rate:.3g} --requests {QUIET}"
    )
    command += sized(per_worker)
    return {
        "prefill": fleet.prefill,
        "decode": fleet.decode,
        "rate_per_s": rate,
        "requests": QUIET,
        "arrivals": arrivals,
        "command": command,
    }


def proposals(
    schedule: Schedule,
    laws: Profile,
    gpus: int,
    likely: Sequence[Fleet],
    per_worker: tuple[int, int],
    draws: Sequence[Profile] = (),
) -> list[Probe]:
    """Runs worth thinking about: either stage saturated, and the likely fleets at the rate asked about.

    The stage that is saturated has two workers where there are enough: one would not show how its queue is routed to.
    """
    fleets = Fleet.splits(gpus, per_worker)
    rate = schedule.rate_per_s
    found = []
    second = 1 if len(fleets) >= 7 else 0
    ends = {"prefill": fleets[second], "decode": fleets[-1 - second]}
    # Saturated even if batches hold more than they are thought to: the load that most draws exceed.
    loads = [load_of(p, schedule, ends["prefill"]).prefill for p in draws] or [
        load_of(laws, schedule, ends["prefill"]).prefill
    ]
    load = float(np.quantile(loads, 0.2))
    # Beyond one instant of a coarse clock, or they would have no rate.
    least = 1 + int(np.unique(schedule.due_s, return_counts=True)[1].max())
    n = min(len(schedule), max(REQUESTS, least))
    found.append(Probe(ends["prefill"], rate * 1.3 / max(load, 1e-3), n, "prefill"))
    found.append(Probe(ends["decode"], decode_saturating(schedule, laws, ends["decode"]), n, "decode"))
    for fleet in likely:
        found.append(Probe(fleet, rate, min(len(schedule), max(n, 40 * fleet.workers)), "answer"))
    return found


def decode_saturating(schedule: Schedule, laws: Profile, fleet: Fleet) -> float:
    """A rate at which decode workers cannot keep up, or hold 64 sequences at least."""
    m = float(schedule.output_tokens.mean())
    n, out = schedule.prompt_tokens.astype(float), schedule.output_tokens.astype(float)
    context = float((out * (n + out / 2)).sum() / out.sum())
    batch = min(64.0, float(laws.max_batch))
    if laws.kv_tokens:
        batch = min(batch, max(1.0, laws.kv_tokens / context))
    step = laws.step_s(batch, batch * context)
    capacity = fleet.decode * batch / step / m
    prefill = 0.8 * schedule.rate_per_s / max(load_of(laws, schedule, fleet).prefill, 1e-9)
    return min(1.3 * capacity, prefill)


def values(
    probes: Sequence[Probe], schedule: Schedule, draws: Sequence[Profile], goodput: Floats, slo: Slo
) -> list[Probe]:
    """The probes with their gains. goodput: [draws, fleets], as simulated at the question's rate."""
    k = len(draws)
    now = int(np.argmax(goodput.mean(axis=0)))
    best = goodput.max(axis=1)
    regret = float((best - goodput[:, now]).mean())
    found = []
    for probe in probes:
        asked = to_rate(schedule.take(np.arange(probe.requests)), probe.rate_per_s)
        replay = Replay(
            asked, probe.fleet, Slo(slo.limits), np.ones(len(asked), dtype=bool), _thirds(asked), np.empty(0)
        )
        seen = np.stack([replay.expected(p) for p in draws])
        scaled = np.nan_to_num(seen / (1.5 * STATISTIC_SD))
        apart = ((scaled[:, None, :] - scaled[None, :, :]) ** 2).sum(axis=2) / CORRELATED
        weight = np.exp(-apart / 2)
        weight /= weight.sum(axis=1, keepdims=True)
        chosen = np.argmax(weight @ goodput, axis=1)
        left = float((best - goodput[np.arange(k), chosen]).mean())
        found.append(replace(probe, gain=max(0.0, regret - left) if math.isfinite(left) else 0.0))
    return found


def _thirds(schedule: Schedule) -> tuple[np.ndarray, ...]:
    n = schedule.prompt_tokens
    low, high = np.quantile(n, [1 / 3, 2 / 3])
    return n <= low, (n > low) & (n <= high), n > high
