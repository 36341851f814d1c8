"""What queueing theory says of a fleet in microseconds, so that only fleets that could win are simulated often.

Prefill: P servers, Allen and Cunneen's wait W = (r^(sqrt(2 (P + 1)) - 1) / (P (1 - r))) s (Ca^2 + Cs^2) / 2 with r the
utilisation, s the mean service time, Ca and Cs the coefficients of variation of gaps and service; exponential tail.
Decode: batch B from Little's law, B = rate m step(B) / D, up to its limit. A stage that is asked more than it can do
builds a backlog over the whole trace: request t waits (1 - 1 / r) t.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import ndtr

from loadgen.cluster import Profile
from traces.measures import Slo
from traces.records import Fleet, Floats, Schedule

ROWS = 2000
KEEP = 0.6
"""Fleets within this share of the best one, by theory, in the laws or any draw of them, are simulated further."""


class Traffic:
    """What theory needs of a schedule."""

    def __init__(self, schedule: Schedule) -> None:
        keep = np.linspace(0, len(schedule) - 1, min(ROWS, len(schedule))).astype(np.int64)
        self.n = schedule.prompt_tokens[keep].astype(float)
        self.m = schedule.output_tokens[keep].astype(float)
        self.span_s = max(schedule.span_s, 1e-9)
        self.rate = len(schedule) / self.span_s
        gaps = np.diff(schedule.due_s)
        self.ca2 = float(np.clip(gaps.var() / max(gaps.mean(), 1e-12) ** 2, 0, 50)) if len(gaps) > 1 else 1.0
        self.context = float((self.m * (self.n + self.m / 2)).sum() / self.m.sum())


def goodput(traffic: Traffic, fleet: Fleet, profile: Profile, slo: Slo) -> float:
    """Requests a second within the limits, by theory."""
    p, t = profile, traffic
    mean = float(t.n.mean())
    most = p.together(mean)
    # A queue shares the fixed cost: as many prompts a step as keep the workers below nine tenths, if that many fit.
    alone = p.prompt_s(t.n)
    spare = 0.9 * fleet.prefill / t.rate - float(alone.mean()) + p.a_s
    together = min(max(p.a_s / spare, 1.0), most) if spare > 0 else most
    service = p.prompt_s(t.n, together, mean)
    s = float(service.mean())
    busy = t.rate * s / fleet.prefill
    cs2 = float(service.var()) / max(s * s, 1e-18)
    limit = _limit(t, p)
    batch, needed = _batch(t, fleet, p, limit)
    step = p.step_s(batch, batch * t.context)
    first = p.overhead_s + p.transfer_t0_s + p.transfer_s_per_token * t.n + alone + step
    rows = np.linspace(0, t.span_s, len(t.n))
    late = max(0.0, 1 - 1 / busy) * rows if busy > 1 else np.zeros(len(rows))
    late = late + (max(0.0, 1 - limit / needed) * rows if needed > limit else 0.0)
    slack = (slo.limit("ttft") or math.inf) - first - late
    good = (slack > 0).astype(float)
    if busy < 1 and math.isfinite(float(slack.max())):
        shape = busy ** (math.sqrt(2 * (fleet.prefill + 1)) - 1)
        wait = shape / (fleet.prefill * (1 - busy)) * s * (t.ca2 + cs2) / 2
        tail = wait / max(min(shape, 1.0), 1e-9)
        good = good * (1 - min(shape, 1.0) * np.exp(-np.maximum(slack, 0) / max(tail, 1e-9)))
    limit_s = slo.limit("tpot")
    if limit_s:
        good = good * float(ndtr(math.log(limit_s / step) / 0.15))
    end = slo.limit("e2e")
    if end:
        good = good * (first + late + step * t.m < end)
    slowest = max(1.0, busy, needed / limit)
    return float(t.rate * good.mean() / slowest)


def strain(traffic: Traffic, fleet: Fleet, profile: Profile, slo: Slo) -> float:
    """What a fleet is asked in the long run, however few requests are simulated; above 1 it does not do.

    The largest of prefill's utilisation with full steps, the sequences that decode would have to hold over those it can, and
    the decode step over the TPOT limit.
    """
    p, t = profile, traffic
    mean = float(t.n.mean())
    busy = t.rate * float(p.prompt_s(t.n, p.together(mean), mean).mean()) / fleet.prefill
    limit = _limit(t, p)
    batch, needed = _batch(t, fleet, p, limit)
    return max(busy, needed / limit, p.step_s(batch, batch * t.context) / (slo.limit("tpot") or math.inf))


def _limit(t: Traffic, p: Profile) -> float:
    """Sequences that a decode worker can hold."""
    return min(float(p.max_batch), max(1.0, p.kv_tokens / t.context) if p.kv_tokens else math.inf)


def _batch(t: Traffic, fleet: Fleet, p: Profile, limit: float) -> tuple[float, float]:
    """(sequences a worker holds, sequences it would have to hold at the limit's pace to keep up)."""
    asked = t.rate * float(t.m.mean()) / fleet.decode
    batch = 1.0
    for _ in range(100):
        ahead = min(limit, max(1.0, asked * p.step_s(batch, batch * t.context)))
        if abs(ahead - batch) < 1e-4 * batch:
            break
        batch = ahead
    return batch, asked * p.step_s(batch, batch * t.context)


def survivors(schedule: Schedule, fleets: list[Fleet], draws: list[Profile], slo: Slo, most: int = 12) -> list[Fleet]:
    """Fleets that may be the best: near the best by theory in any of the draws, with their neighbours; at most ``most``."""
    traffic = Traffic(schedule)
    found: Floats = np.array([[goodput(traffic, f, p, slo.as_limits) for f in fleets] for p in draws])
    top = np.maximum(found.max(axis=1, keepdims=True), 1e-12)
    share = found / top
    near = np.flatnonzero((share >= KEEP).any(axis=0))
    wide = {i + d for i in near.tolist() for d in (-1, 0, 1) if 0 <= i + d < len(fleets)}
    order = np.argsort(-(share.mean(axis=0) + 0.5 * share.max(axis=0)))
    kept = [i for i in order.tolist() if i in wide][:most]
    return [fleets[i] for i in sorted(kept)]
