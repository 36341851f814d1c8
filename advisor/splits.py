"""Every split under the fitted laws, and those that may be the best under draws of the laws: what a decision looks at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from scipy import special

from advisor.model import METRICS, Fit
from advisor.parallel import at_once, shared
from advisor.screen import survivors
from advisor.study import check_rate
from advisor.telling import Note
from loadgen.cluster import Profile, SimResult, simulate
from traces.measures import Slo, Summary, kept, meets, summarise
from traces.records import Fleet, Floats, Ints, Observations, Schedule
from traces.shape import joined, middle

POINT_REQUESTS, TRACE_WINDOWS = 20_000, 8
"""Requests of the trace that the point estimate simulates at most; windows of a longer one that stand for it."""

DRAW_REQUESTS = 2000
"""Requests of the trace that a draw simulates."""

SCREENED_REQUESTS = 600
"""Requests that a draw simulates of fleets that theory and the point estimate rule out."""

SCREEN_DRAWS = 6
"""Draws that simulate those fleets as well."""

LIKELY = 8
"""Fleets that all draws simulate at most."""


@dataclass(frozen=True, slots=True)
class Simulated:
    """A fleet under some laws. meets: the SLO. kept: how nearly its constraints are (:func:`traces.measures.kept`)."""

    summary: Summary
    utilisation: dict[str, float]
    meets: bool
    kept: float

    @classmethod
    def of(cls, result: SimResult, slo: Slo, attainment: float) -> Self:
        """What came of a simulation."""
        rows = result.observations
        summary = summarise(rows, slo)
        return cls(summary, result.utilisation, meets(summary, rows, slo, attainment), kept(rows, slo))

    @property
    def worth_per_s(self) -> float:
        """Goodput, less by as much as a constraint is missed."""
        return self.summary.goodput_per_s * self.kept


@dataclass(frozen=True, eq=False)
class Splits:
    """What came of it, by fleet.

    points: under the fitted laws, on up to POINT_REQUESTS requests. sampled: half-widths, as windows stand for all of the traffic
    (:func:`_between`). laws: the draws. window: the requests that a draw simulates. busy: the window of most requests a second,
    all where there is one. likely: fleets that all draws simulated.
    anchors: the fitted laws on the requests of the draws. drawn: one for each draw, of other fleets for the first SCREEN_DRAWS.
    offered_per_s: requests a second that are asked, no split serves more. asked_tokens_per_s: output tokens a second that the
    splits which may be the best ask of a decode worker, at most. tokens_per_s: what all of a split's decode workers give, in
    the window where that is most.
    """

    points: dict[Fleet, Simulated]
    sampled: dict[Fleet, dict[str, float]]
    laws: list[Profile]
    window: Schedule
    busy: Schedule
    likely: list[Fleet]
    anchors: dict[Fleet, Simulated]
    drawn: dict[Fleet, list[Simulated]]
    offered_per_s: float
    asked_tokens_per_s: float
    tokens_per_s: dict[Fleet, float]

    @property
    def top(self) -> float:
        """Worth of the best split under the fitted laws."""
        return _top(self.points)

    def decode_tokens_per_s(self, fleet: Fleet) -> float:
        """Output tokens a second that each of its decode workers gives."""
        return self.tokens_per_s[fleet] / fleet.decode

    def goodputs(self) -> Floats:
        """[draws so far, likely] worth, as of all the requests: a draw's window may suit one split more than they do."""
        columns = []
        for fleet in self.likely:
            beside = self.anchors[fleet].worth_per_s
            factor = self.points[fleet].worth_per_s / beside if beside > 0 else 1.0
            columns.append([min(factor * one.worth_per_s, self.offered_per_s) for one in self.drawn[fleet]])
        return np.array(columns).T


def simulated(
    fit: Fit,
    schedule: Schedule,
    fleets: Sequence[Fleet],
    slo: Slo,
    *,
    attainment: float,
    seed: int,
    draws: int,
    parts: Sequence[int],
    note: Note,
) -> Splits:
    """Simulate every split, find those that may be the best, and simulate these under every draw. schedule: at most
    POINT_REQUESTS. parts: requests of each window that it is made of, not all need have as many."""
    most = min(DRAW_REQUESTS, max(800, 40 * fleets[0].workers))
    window, busy = piece(schedule, most), schedule
    if len(parts) > 1:
        # What decides where it is busiest must be in the draws as well, or they would be sure of what none of them has seen.
        by_rate = sorted((schedule.take(which) for which in _parts(parts)), key=_rate)
        busy = by_rate[-1]
        window = joined(
            [piece(by_rate[(len(by_rate) - 1) // 2], most), piece(busy, most)], schedule.name, len(schedule), None
        )
    check_rate(window)
    points: dict[Fleet, Simulated] = {}
    sampled: dict[Fleet, dict[str, float]] = {}
    tokens: dict[Fleet, float] = {}

    def point(fleet: Fleet) -> tuple[Simulated, dict[str, float], float]:
        result = simulate(schedule, fleet, fit.profile)
        found = Simulated.of(result, slo, attainment)
        given = _most_tokens(result.observations, parts) if len(parts) > 1 else found.summary.output_tokens_per_s
        return found, _between(result.observations, slo, parts), given

    for done in range(0, len(fleets), at_once()):
        note("splits", done, len(fleets), _splits_found(points, slo, "so far"))
        some = fleets[done : done + at_once()]
        for fleet, (found, between, given) in zip(some, shared(point, some), strict=True):
            points[fleet], sampled[fleet], tokens[fleet] = found, between, given
    note("splits", len(fleets), len(fleets), _splits_found(points, slo))

    asked = max(tokens[f] / f.decode for f in _contenders(points))
    laws = fit.draws(np.random.default_rng(seed), draws, asked)
    likely = _likely(window, points, [fit.profile, *laws[:SCREEN_DRAWS]], slo)
    short = piece(window, SCREENED_REQUESTS)
    windows = {fleet: window if fleet in likely else short for fleet in fleets}
    anchors = {
        fleet: points[fleet]
        if windows[fleet] is schedule
        else Simulated.of(simulate(windows[fleet], fleet, fit.profile), slo, attainment)
        for fleet in fleets
    }
    offered = len(schedule) / max(schedule.span_s, 1e-9)
    drawn: dict[Fleet, list[Simulated]] = {fleet: [] for fleet in fleets}
    made = Splits(points, sampled, laws, window, busy, likely, anchors, drawn, offered, asked, tokens)

    def draw(i: int) -> dict[Fleet, Simulated]:
        return {
            fleet: Simulated.of(simulate(windows[fleet], fleet, laws[i]), slo, attainment)
            for fleet in fleets
            if fleet in likely or i < SCREEN_DRAWS
        }

    for done in range(0, len(laws), at_once()):
        note("bootstrap", done, draws, _draws_found(made))
        for by_fleet in shared(draw, range(done, min(done + at_once(), len(laws)))):
            for fleet, one in by_fleet.items():
                made.drawn[fleet].append(one)
    note("bootstrap", draws, draws, _draws_found(made))
    return made


def _likely(window: Schedule, points: dict[Fleet, Simulated], laws: list[Profile], slo: Slo) -> list[Fleet]:
    """Fleets that may be the best: by theory under some of the laws, or by the simulation of the fitted ones."""
    fleets, top = list(points), _top(points)
    found = survivors(window, fleets, laws, slo)
    # Theory may be wrong where a simulation of the laws themselves is not.
    found = [f for f in fleets if f in found or points[f].worth_per_s >= 0.9 * top]
    if not any(points[f].meets for f in found):
        found = [f for f in fleets if f in found or points[f].meets]

    # Of fleets that are as good as each other the draws need not tell all apart: those of the least P99 stay, of those that
    # meet the SLO before the others.
    def place(fleet: Fleet) -> tuple[bool, float, float]:
        late = points[fleet].summary.e2e_p99_s
        return (
            not points[fleet].meets,
            -round(points[fleet].worth_per_s / max(top, 1e-12), 2),
            late if math.isfinite(late) else math.inf,
        )

    first = sorted(found, key=place)[:LIKELY]
    return [f for f in fleets if f in first]


def _top(points: dict[Fleet, Simulated]) -> float:
    return max(p.worth_per_s for p in points.values())


def _contenders(points: dict[Fleet, Simulated]) -> list[Fleet]:
    """Splits that are nearly the best under the fitted laws, and their neighbours, which other laws may prefer."""
    fleets, top = list(points), _top(points)
    good = {i for i, fleet in enumerate(fleets) if points[fleet].worth_per_s >= 0.9 * top}
    return [fleet for i, fleet in enumerate(fleets) if good & {i - 1, i, i + 1}]


def excerpt(schedule: Schedule) -> tuple[Schedule, list[int]]:
    """(what is simulated of a schedule, requests of each window that it is made of): all of a short one, as it is.

    A longer one is represented as a trace that is too long to be read: a piece at its mean rate would be without its busy hours.
    """
    if len(schedule) <= POINT_REQUESTS:
        return schedule, []
    width = POINT_REQUESTS // TRACE_WINDOWS
    starts = [middle(len(schedule), width, k, TRACE_WINDOWS) for k in range(TRACE_WINDOWS)]
    windows = [schedule.take(np.arange(start, start + width)) for start in starts]
    return joined(windows, schedule.name, len(schedule), schedule.rate_per_s), [width] * TRACE_WINDOWS


def piece(schedule: Schedule, most: int) -> Schedule:
    """A contiguous piece of at most ``most`` requests whose rate is nearest to the whole's; all, if it is short."""
    if len(schedule) <= most:
        return schedule
    starts = np.arange(0, len(schedule) - most + 1, max(1, most // 4))
    spans = schedule.due_s[starts + most - 1] - schedule.due_s[starts]
    start = int(starts[np.argmin(np.abs(spans - schedule.span_s * most / len(schedule)))])
    part = schedule.take(np.arange(start, start + most))
    return replace(part, due_s=part.due_s - part.due_s[0])


def _parts(parts: Sequence[int]) -> list[Ints]:
    """The rows of each window of a schedule, by how many requests they have. One of which few are left (of the others not one in
    two was answered) is none: two requests side by side would be its rate."""
    ends = np.cumsum(parts)
    return [np.arange(end - n, end) for n, end in zip(parts, ends, strict=True) if 2 * n >= max(parts)]


def _rate(schedule: Schedule) -> float:
    """Requests a second; 0 where they come at one instant."""
    return schedule.rate_per_s if math.isfinite(schedule.rate_per_s) else 0.0


def _most_tokens(rows: Observations, parts: Sequence[int]) -> float:
    """Output tokens a second in the window of most: of the middle nine tenths of its answers, since its span has a tail."""
    found = [0.0]
    for ended, tokens in ((rows.last_token_s[which], rows.tokens[which]) for which in _parts(parts)):
        begin, end = np.quantile(ended[np.isfinite(ended)], [0.05, 0.95]) if np.isfinite(ended).any() else (0.0, 0.0)
        found.append(0.9 * float(tokens[np.isfinite(ended)].sum()) / (end - begin) if end > begin else 0.0)
    return max(found)


def _between(rows: Observations, slo: Slo, parts: Sequence[int]) -> dict[str, float]:
    """Half-widths of 90 % intervals, as log ratios, since some windows stand for all of the traffic.

    Student's t of how much the windows differ. Of rates it is the shares that count: the rate is that of all of the traffic. A
    share may be 0 and has no logarithm then, so its deviation is told by the mean.
    """
    if len(parts) < 2:
        return {}
    each = [summarise(rows.take(which), slo) for which in _parts(parts)]
    if len(each) < 2:
        return {}
    wider = float(special.stdtrit(len(each) - 1, 0.95)) / math.sqrt(len(each))
    found = {}
    shares = {"goodput_per_s": [s.attainment for s in each], "throughput_per_s": [s.ok / max(1, s.n) for s in each]}
    for name in METRICS:
        values = np.array(shares.get(name) or [getattr(s, name) for s in each])
        values = values[np.isfinite(values)]
        differ = values / max(values.mean(), 1e-12) if name in shares else np.log(values[values > 0])
        found[name] = wider * float(differ.std(ddof=1)) if len(differ) > 1 else 0.0
    return found


def _splits_found(points: dict[Fleet, Simulated], slo: Slo, how: str = "") -> str:
    """The split with the most goodput, and the one behind it."""
    if not points:
        return ""
    first, *rest = sorted(points, key=lambda f: -points[f].worth_per_s)
    behind = f", then {rest[0]} with {points[rest[0]].summary.goodput_per_s:.3g}" if rest else ""
    most = f"serves most {how}".strip()
    return f"{first} {most}, {points[first].summary.goodput_per_s:.3g} req/s within {slo}{behind}"


def _draws_found(splits: Splits) -> str:
    """Which split won most of the draws so far."""
    goodputs = splits.goodputs()
    if not goodputs.size:
        return ""
    wins = np.bincount(goodputs.argmax(axis=1))
    return f"{splits.likely[int(wins.argmax())]} serves most in {wins.max()} of {len(goodputs)} draws of the laws"
