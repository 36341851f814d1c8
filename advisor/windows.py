"""Traffic in windows: which split each window would want, what a fixed split loses by that, what a move costs.

Everything is simulated with the fitted laws. A window is begun with the requests before it in the system (they are not
counted), so that its optimum is that of its own traffic and not of a backlog that another window left.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from loadgen.cluster import Profile, simulate
from loadgen.policy import balanced
from traces.measures import Slo, goodput_per_s, met
from traces.records import Fleet, Floats, Schedule

NEAR = 0.01
"""A split within this share of a window's best is as good: hindsight on a few requests is no reason to move."""

LASTS = 5.0
"""A mix must last this many times the cost of a move (drain and flip) before a move can pay."""

LEAST = 60
"""Requests a window holds at least; fewer say little about a split."""

MOST = 48
"""Windows at most."""

SHOWN = 1500
"""Requests of a window that are simulated at most."""


@dataclass(frozen=True)
class Question:
    """What is asked of the fitted laws. splits: the fleets that may be compared, all with the same workers."""

    profile: Profile
    slo: Slo
    splits: tuple[Fleet, ...]
    tick_s: float = 1.0

    @property
    def limits(self) -> Slo:
        """What counts as good in a window, where no quantile can be asked."""
        return self.slo.as_limits


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of traffic. good: requests within the SLO by split; best: the split it wants."""

    start_s: float
    end_s: float
    requests: int
    good: dict[Fleet, int]
    best: Fleet

    @property
    def most(self) -> int:
        """Requests within the SLO with the best split."""
        return max(self.good.values())


@dataclass(frozen=True, eq=False)
class Study:
    """A schedule in windows. fixed: the split that serves most over all of them. move_s: seconds of a drain and a flip.

    regret: share of the requests that every window's own best split serves within the SLO and the fixed one does not. lasts_s:
    how long a mix lasts (median time for which the same split is wanted).
    """

    windows: list[Window]
    fixed: Fleet
    regret: float
    move_s: float
    lasts_s: float

    @property
    def path(self) -> list[tuple[float, Fleet]]:
        """(instant, split wanted from then on), the first at the beginning."""
        found: list[tuple[float, Fleet]] = []
        for w in self.windows:
            if not found or w.best != found[-1][1]:
                found.append((w.start_s, w.best))
        return found


def drain_and_flip_s(schedule: Schedule, question: Question, fleet: Fleet) -> float:
    """Seconds from asking until a moved worker serves, by moving one each way in the middle of the schedule."""
    found = [question.profile.flip_s]
    part = schedule.take(np.arange(min(len(schedule), 2000)))
    half = float(part.due_s[len(part) // 2]) if len(part) else 0.0
    for other in _neighbours(fleet, question.splits):
        result = simulate(part, fleet, question.profile, changes=[(half, other)])
        found += [s.ready_s - s.asked_s for s in result.switches]
    return float(max(found))


def _neighbours(fleet: Fleet, splits: Sequence[Fleet]) -> list[Fleet]:
    at = splits.index(fleet)
    return [splits[k] for k in (at - 1, at + 1) if 0 <= k < len(splits)]


def edges(schedule: Schedule, move_s: float, width_s: float | None = None) -> Floats:
    """Borders of equal windows, each long enough to be worth a move and to hold enough requests."""
    span = max(schedule.span_s, 1e-9)
    width = width_s or max(LASTS * move_s, LEAST * span / max(len(schedule), 1), span / MOST)
    k = max(1, round(span / width))
    return float(schedule.due_s[0]) + span * np.arange(k + 1) / k if len(schedule) else np.zeros(1)


def good_by_split(
    schedule: Schedule, start_s: float, end_s: float, question: Question, splits: Sequence[Fleet]
) -> dict[Fleet, int]:
    """Requests due in a window that each split serves within the SLO; a quarter of the window before runs first.

    Of a window with many requests the first ``SHOWN`` are simulated and stand for the rest.
    """
    from_, start, end = np.searchsorted(schedule.due_s, [start_s - (end_s - start_s) / 4, start_s, end_s]).tolist()
    n = end - start
    end = min(end, start + SHOWN)
    from_ = max(from_, start - SHOWN // 4)
    part = schedule.take(np.arange(from_, end))
    part = replace(part, due_s=part.due_s - part.due_s[:1])
    limits, scale = question.limits, n / (end - start)
    return {
        fleet: round(
            scale * float(met(simulate(part, fleet, question.profile).observations, limits)[start - from_ :].sum())
        )
        for fleet in splits
    }


def study(
    schedule: Schedule,
    question: Question,
    *,
    fixed: Fleet | None = None,
    width_s: float | None = None,
    borders: Floats | None = None,
) -> Study:
    """Cut a schedule into windows and find what each would want, against a fixed split [the best for the whole schedule].

    Of many splits those are looked at that climbs from the fixed one and from the window before's own best (in the first from
    the balance of work) meet: goodput over P is a hill but for noise.
    """
    at_first = fixed or best_fixed(schedule, question)
    move_s = drain_and_flip_s(schedule, question, at_first)
    cut = edges(schedule, move_s, width_s) if borders is None else borders
    cut = np.concatenate([cut[:-1], [np.nextafter(cut[-1], math.inf)]])
    windows: list[Window] = []
    for start, end in itertools.pairwise(cut.tolist()):
        part = schedule.take((schedule.due_s >= start) & (schedule.due_s < end))
        n = len(part)
        if n:
            before = windows[-1].good if windows else {}
            near = max(before, key=before.__getitem__) if before else balance(part, question)
            good = _climb(schedule, start, end, question, (at_first, near))
            windows.append(Window(start, end, n, good, at_first))
    windows = _path(windows, at_first, move_s)
    for k, w in enumerate(windows):  # the path may hold, through a window, a split that its climb did not meet
        if w.best not in w.good:
            known = w.good | good_by_split(schedule, w.start_s, w.end_s, question, [w.best])
            windows[k] = replace(w, good=known)
    most = sum(w.most for w in windows)
    regret = 1 - sum(w.good[at_first] for w in windows) / most if most else 0.0
    held = [sum(w.end_s - w.start_s for w in same) for _, same in itertools.groupby(windows, key=lambda w: w.best)]
    return Study(windows, at_first, regret, move_s, float(np.median(held)))


def _path(windows: Sequence[Window], fixed: Fleet, move_s: float) -> list[Window]:
    """Each window with the split it has on the path that serves most when a move costs what it costs (Viterbi).

    A move loses, for each worker that moves, that worker's share of the requests that come while it drains and flips, and
    NEAR of a window's requests at least. Of paths that serve the same, the one nearest to the fixed split.
    """
    known = sorted({f for w in windows for f in w.good})
    value = dict.fromkeys(known, 0.0)
    back: list[dict[Fleet, Fleet]] = []
    for w in windows:
        rate = w.requests / max(w.end_s - w.start_s, 1e-9)

        def cost(a: Fleet, b: Fleet, w: Window = w, rate: float = rate) -> float:
            return max(NEAR * w.requests, abs(a.prefill - b.prefill) / a.workers * move_s * rate) if a != b else 0.0

        came, now = {}, {}
        for to in known:
            came[to] = max(known, key=lambda f: (value[f] - cost(f, to), f == to))
            served = w.good.get(to, -w.requests) - 1e-6 * abs(to.prefill - fixed.prefill)
            now[to] = value[came[to]] - cost(came[to], to) + served
        back.append(came)
        value = now
    at = max(known, key=lambda f: value[f])
    found = []
    for w, came in zip(reversed(windows), reversed(back), strict=True):
        found.append(replace(w, best=at))
        at = came[at]
    return found[::-1]


def best_fixed(schedule: Schedule, question: Question) -> Fleet:
    """The fixed split with the most goodput over a schedule; a long one is screened on its first piece."""
    splits: Sequence[Fleet] = question.splits
    if len(schedule) * len(splits) > 200_000:
        best = splits.index(_most(schedule.take(np.arange(min(len(schedule), 3000))), question, splits))
        splits = splits[max(0, best - 3) : best + 4]
    return _most(schedule, question, splits)


def _most(schedule: Schedule, question: Question, splits: Sequence[Fleet]) -> Fleet:
    good = {f: goodput_per_s(simulate(schedule, f, question.profile).observations, question.limits) for f in splits}
    return max(good, key=lambda f: good[f])


def _climb(
    schedule: Schedule, start_s: float, end_s: float, question: Question, begin: Sequence[Fleet]
) -> dict[Fleet, int]:
    """Requests within the SLO by split, up the hill from each beginning, two splits beyond its top; where none serves
    anything, by every split."""
    splits = question.splits
    if len(splits) <= 8:
        return good_by_split(schedule, start_s, end_s, question, splits)
    found: dict[Fleet, int] = {}

    def look(at: int) -> int:
        if not 0 <= at < len(splits):
            return -1
        if splits[at] not in found:
            found.update(good_by_split(schedule, start_s, end_s, question, splits[at : at + 1]))
        return found[splits[at]]

    for one in begin:
        at = splits.index(one)
        while True:
            ring = [at + k for k in (-2, -1, 1, 2)]
            up = max(ring, key=look)
            if look(up) <= look(at):
                break
            at = up
    if not any(found.values()):
        found = good_by_split(schedule, start_s, end_s, question, splits)
    return found


def balance(part: Schedule, question: Question) -> Fleet:
    """The split nearest to the balance of work."""
    middle = balanced(part.prompt_tokens, part.output_tokens, question.profile, question.splits[0].workers)
    return min(question.splits, key=lambda f: abs(f.prefill - middle.prefill))


@dataclass(frozen=True, slots=True)
class Oracle:
    """What knowing every window's best split would serve. free: moves cost nothing. paid: the same moves, drained and flipped,
    asked at the best of a few leads; where standing still serves more, that. goodput in requests a second."""

    free_per_s: float
    paid_per_s: float
    switches: int


def oracle(schedule: Schedule, question: Question, found: Study) -> Oracle:
    """See :class:`Oracle`."""
    path = found.path
    fixed = simulate(schedule, found.fixed, question.profile)
    best = (goodput_per_s(fixed.observations, question.limits), 0)
    if len(path) > 1:
        for lead in (0.0, 0.5 * found.move_s, found.move_s, 2 * found.move_s):
            changes = [(at - lead, fleet) for at, fleet in path[1:]]
            moved = simulate(schedule, path[0][1], question.profile, changes=changes)
            best = max(best, (goodput_per_s(moved.observations, question.limits), len(moved.switches)))
    span = max(schedule.span_s, 1e-9)
    free = max(best[0], sum(w.most for w in found.windows) / span)
    return Oracle(free, best[0], best[1])


@dataclass(frozen=True, slots=True)
class BreakEven:
    """What a move must last to pay: gain, good requests a second more in place; lost, good requests that the move costs."""

    gain_per_s: float
    lost: float

    @property
    def lasts_s(self) -> float:
        """Seconds the new mix must last; infinite where the move gains nothing."""
        return self.lost / self.gain_per_s if self.gain_per_s > 0 else math.inf


def break_even(schedule: Schedule, question: Question, found: Study) -> BreakEven | None:
    """Over the windows that want another split than the fixed one: is moving there, and back, worth it? None where the mix
    does not change."""
    if len(found.path) < 2:
        return None
    gains, lost = [], []
    for w in found.windows:
        if w.best == found.fixed:
            continue
        width = w.end_s - w.start_s
        part = schedule.take((schedule.due_s >= w.start_s - width / 4) & (schedule.due_s < w.end_s))
        counted = part.due_s >= w.start_s
        moved = simulate(part, found.fixed, question.profile, changes=[(w.start_s, w.best)]).observations
        stayed = simulate(part, w.best, question.profile).observations
        gains.append((w.good[w.best] - w.good[found.fixed]) / width)
        lost.append(float(met(stayed, question.limits)[counted].sum() - met(moved, question.limits)[counted].sum()))
    if not gains:
        return None
    return BreakEven(float(np.mean(gains)), max(0.0, float(np.mean(lost))))
