"""Which strategy: stand still, move, or collect and order; and whether workers of both phases would do better.

Every alternative is simulated with the fitted laws on the same traffic and gets its regret against what knowing every
window's best split would serve. Moving is chosen only when it pays for its switches on traffic that its thresholds were not
chosen on; offline only when the user's deadline allows it, for its "time per request" is no latency.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from advisor.splits import excerpt
from advisor.telling import Note, silent
from advisor.thresholds import Found, find, pays
from advisor.windows import LASTS, Question, Study, balance, study
from loadgen import policy
from loadgen.cluster import simulate, simulate_batches
from traces.measures import goodput_per_s
from traces.records import Fleet, Schedule

EPS = 0.02
"""Goodput that moving must gain over standing still: less is not worth moving parts."""

OFFLINE_REQUESTS = 3000
"""Requests of which orders and splits are tried; the makespan of more is in proportion to the work."""

STRATEGIES = ("auto", "static", "online", "offline")


@dataclass(frozen=True, slots=True)
class Arm:
    """One strategy's figures. regret: share of what knowing every window's best split would serve; NaN where not comparable."""

    strategy: str
    fleet: str
    goodput_per_s: float
    regret: float
    switches_per_h: float
    note: str


@dataclass(frozen=True, eq=False)
class Offline:
    """All requests collected, then dispatched in an order. makespan_s: first dispatch to last token; e2e_max_s: from the recorded
    arrivals, when collection ends with the last of them. order: the best; blind: the best that knows no answer lengths, with
    its makespan. gpus: the fewest that keep the deadline."""

    fleet: Fleet
    order: str
    makespan_s: float
    e2e_max_s: float
    blind: str
    blind_makespan_s: float
    deadline_s: float
    gpus: int

    @property
    def holds(self) -> bool:
        """Does every answer come within the deadline of its arrival?"""
        return self.e2e_max_s <= self.deadline_s


@dataclass(frozen=True, eq=False)
class Choice:
    """The strategy, why, and what each would do."""

    strategy: str
    why: str
    arms: list[Arm]
    study: Study | None = None
    online: Found | None = None
    offline: Offline | None = None
    warnings: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Keys of ``advise --json``, beside those of the split."""
        return {
            "strategy": self.strategy,
            "why": self.why,
            "strategies": [
                {
                    "strategy": a.strategy,
                    "fleet": a.fleet,
                    "goodput_per_s": a.goodput_per_s,
                    "regret": a.regret,
                    "switches_per_h": a.switches_per_h,
                    "note": a.note,
                }
                for a in self.arms
            ],
            "windows": {
                "count": len(self.study.windows),
                "regret_static": self.study.regret,
                "mix_lasts_s": self.study.lasts_s,
                "move_s": self.study.move_s,
                "wanted": [{"from_s": at, "fleet": str(fleet)} for at, fleet in self.study.path],
            }
            if self.study
            else None,
            "thresholds": self.online.as_json() if self.online else None,
            "offline": {
                "prefill": self.offline.fleet.prefill,
                "decode": self.offline.fleet.decode,
                "order": self.offline.order,
                "makespan_s": self.offline.makespan_s,
                "e2e_max_s": self.offline.e2e_max_s,
                "order_without_lengths": self.offline.blind,
                "makespan_without_lengths_s": self.offline.blind_makespan_s,
                "deadline_s": self.offline.deadline_s,
                "holds": self.offline.holds,
                "gpus_needed": self.offline.gpus,
            }
            if self.offline
            else None,
        }


def choose(
    schedule: Schedule,
    question: Question,
    fixed: Fleet,
    *,
    gpus_per_worker: tuple[int, int] = (1, 1),
    asked: str = "auto",
    deadline_s: float | None = None,
    eps: float = EPS,
    seed: int = 0,
    note: Note = silent,
    parts: int = 1,
) -> Choice:
    """Static, online or offline for a schedule under fitted laws. fixed: the split that was recommended to stand still.

    asked: "auto", or the strategy the user wants, whose regret is then said all the same. gpus_per_worker: workers of
    different sizes cannot change roles. parts: of how many windows of a longer trace the schedule is made; of more than one
    only the regret can be told.
    """
    warnings: list[str] = []
    arms: list[Arm] = []
    alike = gpus_per_worker[0] == gpus_per_worker[1]
    found: Study | None = None
    online: Found | None = None
    note("windows", 0, 1)
    found = study(schedule, question, fixed=fixed)
    note(
        "windows",
        1,
        1,
        f"knowing the best split of every window ({len(found.windows)}) would serve {_more(found.regret)} more than {fixed}",
    )
    short = len(found.windows) < 3
    stand = _standing(schedule, fixed, question)
    arms.append(Arm("static", str(fixed), stand, found.regret, 0.0, f"over {len(found.windows)} windows"))
    if not alike:
        why_not = f"workers of {gpus_per_worker[0]} and {gpus_per_worker[1]} GPUs cannot change roles"
    elif len(question.splits) < 2:
        why_not = "there is one split only"
    elif short:
        why_not = f"{len(schedule)} requests over {schedule.span_s:.3g} s are too few windows to see a mix change"
    elif found.regret <= eps:
        why_not = f"knowing every window's best split would serve {_more(found.regret)} more at most"
    elif parts > 1:
        why_not = known_by_windows(schedule.name, parts)
    elif found.lasts_s < LASTS * found.move_s:
        why_not = (
            f"a mix lasts {found.lasts_s:.3g} s, less than {LASTS:g} times the {found.move_s:.3g} s of a drain and flip"
        )
    else:
        why_not = ""
    if asked == "online" and (not alike or len(question.splits) < 2):
        warnings.append(f"online cannot be had: {why_not}")
    elif asked == "online" or (asked == "auto" and not why_not):
        online = find(schedule, question, fixed=fixed, seed=seed, note=note)
        good, why_not = pays(online, eps)
        mine = online.compared["online"]
        arms.append(
            Arm(
                "online",
                f"from {online.start}",
                mine["goodput_per_s"],
                mine["regret"],
                mine["switches_per_h"],
                "on the later part of the traffic, thresholds from the earlier; "
                f"never moving there: {online.compared['never moving']['goodput_per_s']:.4g}/s",
            )
        )
        if good:
            why_not = ""
            moving = pays(online, eps)[1]
    offline = None
    if deadline_s is not None or asked == "offline":
        offline = _offline(schedule, question, deadline_s, gpus_per_worker, note)
    if offline is not None:
        arms.append(
            Arm(
                "offline",
                str(offline.fleet),
                len(schedule) / offline.makespan_s,
                math.nan,
                0.0,
                f"throughput, not goodput: {offline.order}, everything answered {offline.makespan_s:.4g} s after the first "
                f"dispatch, at most {offline.e2e_max_s:.4g} s after its arrival",
            )
        )
    colocated = _colocated(schedule, question, gpus_per_worker, fixed)
    arms.append(Arm("colocated", str(colocated[0]), colocated[1], math.nan, 0.0, "by the fitted laws; never measured"))
    if colocated[2] > 0 and colocated[1] > 1.01 * colocated[2]:
        warnings.append(
            f"colocated workers ({colocated[0]}) would serve {colocated[1] / colocated[2] - 1:.0%} more than {fixed} if a "
            "worker of both phases obeys the same laws: measure it before you disaggregate"
        )

    if asked in ("static", "online", "offline") and not (asked == "online" and online is None):
        strategy = asked
        why = "you asked for it"
        if asked == "static" and found.regret > eps:
            why += f"; knowing every window's best split would serve {_more(found.regret)} more"
        if asked == "online" and why_not:
            why += f"; {why_not}"
        if asked == "offline" and offline is not None and not (deadline_s and offline.holds):
            why += "; " + _late(offline, deadline_s)
    elif offline is not None and offline.holds:
        strategy = "offline"
        why = (
            f"every answer comes {offline.e2e_max_s:.4g} s after its arrival at most, the deadline is {deadline_s:g} s; "
            f"{offline.gpus} GPUs would do"
        )
    elif online is not None and not why_not:
        strategy, why = "online", moving
    else:
        strategy, why = "static", why_not
    if offline is not None and deadline_s is not None and not offline.holds:
        warnings.append(_late(offline, deadline_s))
    if asked == "auto" and deadline_s is None and parts == 1:
        warnings.append("offline was not considered: no --deadline says how long an answer may take")
    return Choice(strategy, why, arms, found if parts == 1 else None, online, offline, warnings)


def known_by_windows(name: str, parts: int) -> str:
    """Why windows of a long trace, one after the other, do not tell of moving or collecting."""
    return (
        f"{name!r} is known by {parts} windows: they do not say how long a mix lasts, nor how long collecting takes. Ask of a "
        "stretch: --requests N"
    )


def _more(regret: float) -> str:
    """What the best serves beyond the one that loses ``regret`` of it, as a share of the latter: losing half is 100 % more."""
    return f"{regret / (1 - regret):.1%}" if regret < 1 else "infinitely"


def _late(offline: Offline, deadline_s: float | None) -> str:
    if deadline_s is None:
        return "no --deadline says whether the requests can wait"
    return (
        f"offline would be late: {offline.e2e_max_s:.4g} s after the arrival at worst, the deadline is {deadline_s:g} s"
    )


def _standing(schedule: Schedule, fleet: Fleet, question: Question) -> float:
    return goodput_per_s(simulate(excerpt(schedule)[0], fleet, question.profile).observations, question.limits)


def _colocated(
    schedule: Schedule, question: Question, gpus_per_worker: tuple[int, int], fixed: Fleet
) -> tuple[Fleet, float, float]:
    """(mixed workers of the same GPUs, their goodput, the fixed split's on the same requests)."""
    mixed = Fleet(0, 0, max(1, fixed.gpus(gpus_per_worker) // max(gpus_per_worker)))
    return mixed, _standing(schedule, mixed, question), _standing(schedule, fixed, question)


def _offline(
    schedule: Schedule, question: Question, deadline_s: float | None, gpus_per_worker: tuple[int, int], note: Note
) -> Offline:
    """The best order and split for requests that are all known, by simulation of each pair."""
    part = schedule.take(np.sort(np.random.default_rng(0).permutation(len(schedule))[:OFFLINE_REQUESTS]))

    def tokens(one: Schedule) -> int:
        return int(one.prompt_tokens.sum() + one.output_tokens.sum())

    share = tokens(schedule) / tokens(part)
    known = {
        how: tuple(policy.order(how, part.prompt_tokens, part.output_tokens, question.profile)) for how in policy.ORDERS
    }

    def makespan(fleet: Fleet, how: str) -> float:
        done = simulate_batches(part, fleet, question.profile, [(known[how], None)], start_s=float(part.due_s[-1]))
        return float(np.nanmax(done.observations.last_token_s) - part.due_s[-1]) * share

    spans: dict[tuple[Fleet, str], float] = {}
    splits = _around(part, question)
    for k, fleet in enumerate(splits):
        note("offline", k, len(splits))
        for how in policy.ORDERS:
            spans[fleet, how] = makespan(fleet, how)
    fleet, how = min(spans, key=lambda pair: spans[pair])
    note("offline", len(splits), len(splits), f"{fleet}, {how}: all answered in {spans[fleet, how]:.4g} s")
    blind = min((p for p in spans if p[1] not in ("longest-decode", "two-stage")), key=lambda pair: spans[pair])
    waits = float(schedule.due_s[-1] - schedule.due_s[0])
    workers = fleet.workers

    def sized(of: int) -> Fleet:
        p = min(max(1, round(of * fleet.prefill / workers)), of - 1)
        return Fleet(p, of - p)

    needed = fleet
    if deadline_s is not None and waits + spans[fleet, how] <= deadline_s:
        low, high = 2, workers
        while low < high:
            middle = (low + high) // 2
            if waits + makespan(sized(middle), how) <= deadline_s:
                high = middle
            else:
                low = middle + 1
        needed = sized(high)
    return Offline(
        fleet,
        how,
        spans[fleet, how],
        waits + spans[fleet, how],
        blind[1],
        spans[blind],
        deadline_s if deadline_s is not None else math.nan,
        needed.gpus(gpus_per_worker),
    )


def _around(part: Schedule, question: Question) -> Sequence[Fleet]:
    """Splits near the balance of work; all of few."""
    splits = question.splits
    if len(splits) <= 8:
        return splits
    at = splits.index(balance(part, question))
    return splits[max(0, at - 3) : at + 4]
