"""What would change the answer: the same laws asked about other rates, other mixes, other numbers of GPUs.

Simulations at the point estimate, without intervals: they say where to look, not how sure one may be there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from loadgen.cluster import Profile, simulate
from traces.measures import Slo, Summary, kept, summarise
from traces.records import Fleet, Schedule
from traces.shape import to_rate

REQUESTS = 600
"""Of the trace that a case simulates, from its middle; every case sees the same ones."""

SIMULATED = 400_000
"""Requests that all cases may simulate together: a few seconds."""

RATES = (0.5, 0.75, 0.9, 1.1, 1.25, 1.5, 2.0)
LENGTHS = (0.5, 2.0)
NEAR = 0.01


@dataclass(frozen=True, slots=True)
class Case:
    """One other world. kind: "rate", "mix" or "gpus". best: the split to run there. goodput_per_s: of best.

    loss: share of that goodput that one loses by staying with the answer; NaN where the answer has another number of GPUs.
    """

    kind: str
    what: str
    rate_per_s: float
    gpus: int
    best: Fleet
    goodput_per_s: float
    attainment: float
    loss: float


def what_if(
    schedule: Schedule, profile: Profile, slo: Slo, chosen: Fleet, gpus: int, per_worker: tuple[int, int] = (1, 1)
) -> list[Case]:
    """The answer at other rates, with prompts or answers of other lengths, and on one node more or less."""
    if len(schedule) < 2 or not np.isfinite(schedule.rate_per_s):
        return []
    counts = sorted({g for g in (gpus // 2, gpus - 2, gpus - 1, gpus + 1, gpus + 2, 2 * gpus) if g >= 2} - {gpus})
    fleets = {g: Fleet.splits(g, per_worker) for g in (gpus, *counts)}
    cases = 1 + len(RATES) + 2 * len(LENGTHS)
    simulations = cases * len(fleets[gpus]) + sum(len(fleets[g]) for g in counts)
    piece = _middle(schedule, max(100, min(REQUESTS, SIMULATED // max(simulations, 1))))
    rate = schedule.rate_per_s
    piece = to_rate(piece, rate)

    def ask(kind: str, what: str, asked: Schedule, g: int = gpus) -> Case | None:
        rows = {f: simulate(asked, f, profile).observations for f in fleets[g]}
        if not rows:
            return None
        found = {f: (summarise(held, slo), kept(held, slo)) for f, held in rows.items()}
        best = _best(found)
        top, served = _worth(found[best]), found[best][0]
        loss = float("nan")
        if g == gpus and chosen in found and top > 0:
            loss = max(0.0, 1 - _worth(found[chosen]) / top)
        return Case(kind, what, asked.rate_per_s, g, best, served.goodput_per_s, served.attainment, loss)

    asked = [ask("rate", "as asked", piece)]
    asked += [ask("rate", f"{factor:g} x the rate", to_rate(piece, rate * factor)) for factor in RATES]
    for name, word in (("prompt_tokens", "prompts"), ("output_tokens", "answers")):
        for factor in LENGTHS:
            lengths = np.maximum(1, np.rint(getattr(piece, name) * factor)).astype(np.int64)
            how = "half as long" if factor < 1 else f"{factor:g} x as long"
            changed = (
                replace(piece, prompt_tokens=lengths) if word == "prompts" else replace(piece, output_tokens=lengths)
            )
            asked.append(ask("mix", f"{word} {how}", changed))
    asked += [ask("gpus", f"{g} GPUs", piece, g) for g in counts]
    return [case for case in asked if case is not None]


def _worth(of: tuple[Summary, float]) -> float:
    return of[0].goodput_per_s * of[1]


def _best(found: dict[Fleet, tuple[Summary, float]]) -> Fleet:
    """The least P99 E2E among those within NEAR of the most goodput, as the recommendation decides. found: what came, and how
    nearly the constraints were kept."""
    held = {f: one for f, one in found.items() if one[1] >= 1} or found
    top = max(map(_worth, held.values()))
    late = {f: one[0].e2e_p99_s for f, one in held.items() if _worth(one) >= top * (1 - NEAR)}
    return min(late, key=lambda f: late[f] if np.isfinite(late[f]) else np.inf)


def _middle(schedule: Schedule, most: int) -> Schedule:
    if len(schedule) <= most:
        return schedule
    start = (len(schedule) - most) // 2
    piece = schedule.take(np.arange(start, start + most))
    return replace(piece, due_s=piece.due_s - piece.due_s[0])


def turning_points(cases: Sequence[Case], chosen: Fleet) -> list[str]:
    """In words: the nearest rates at which another split is better by more than NEAR."""
    rates = sorted((c for c in cases if c.kind == "rate"), key=lambda c: c.rate_per_s)
    here = next((k for k, c in enumerate(rates) if c.what == "as asked"), 0)
    found = []
    for side, word in ((rates[here::-1], "down to"), (rates[here:], "up to")):
        held = [c for c in side if c.best == chosen or not c.loss > NEAR]
        turned = next((c for c in side if c.best != chosen and c.loss > NEAR), None)
        if turned is not None:
            found.append(f"at {turned.rate_per_s:.3g} req/s {turned.best} is better (staying costs {turned.loss:.0%})")
        elif held:
            found.append(f"{chosen} stays the answer {word} {held[-1].rate_per_s:.3g} req/s")
    return found
