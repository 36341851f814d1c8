"""Which fleet: simulate every split on the trace with the fitted laws, decide by what is sure, say what is not.

The decision (lexicographic): the constraints on quantiles, where there are any, are met, else the attainment is reached; the
goodput within 1 % of the best, by its lower bound and by its value; then the P99 E2E within 5 % of the smallest, and of those
the goodput within 1 % of the best with either role a twentieth slower; then the fewest GPUs; then nearest to the fleet that
runs. Without the third step a tie at low load would pick an absurd edge split; without the fourth one, of a plateau of splits,
that which a small error of the laws has fall off it. A fleet that misses a constraint is compared by
:func:`traces.measures.worth_per_s`, in draws as well.
"""

from __future__ import annotations

import hashlib
import math
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from advisor.baselines import Baseline, baselines
from advisor.features import RunData
from advisor.model import (
    CALIBRATED_RUNS,
    FLOORS,
    LEAST,
    LOADED,
    METRICS,
    Fit,
    fit_laws,
    load_of,
    predicted_load,
    reach,
)
from advisor.splits import Simulated, Splits, excerpt, piece, simulated
from advisor.study import check_rate, proposals, quiet, reason, sized, splits_of, values
from advisor.telling import Note, silent
from loadgen.cluster import Profile, simulate
from traces.errors import InputError, NoFleetError, NotEnoughDataError
from traces.measures import Slo, worth_per_s
from traces.records import Fleet, Floats, Run, Schedule
from traces.shape import scale_rate, scale_tokens, to_rate

DRAWS = 30
"""Bootstrap draws behind an interval."""

NEAR = 0.01
"""Fleets whose goodput differs by less than this share are as good as each other."""

TOLD = 0.05
"""P99s E2E that differ by less than this share are not told apart by the laws."""

STRESS = 1.05
"""How much longer the steps of either role are made in turn, to see how near to a cliff a split stands."""

STUDY_DRAWS = 20
BREAK_EVEN_REQUESTS = 600

STOP = 0.03
"""Enough is known when the answer loses less than this share of goodput in 95 % of the draws."""

EXPLAINED = 2.5
"""Laws that miss the runs by more than this (squared, as a multiple of what chance explains) are never called sure."""

MISFIT = 4.0
"""Those that miss them by more than this give no answer where more than STOP may be lost."""

MISSED = 10.0
"""Laws that miss by more than this (three standard deviations on average) give no answer."""

REFUSE = 0.05
"""No answer that loses more than this share on average over what the runs leave open."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and its 90 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Candidate:
    """One fleet, predicted. figures: one Interval for each of METRICS. attainment: share of requests within the SLO.

    wins: share of the draws in which it has the most goodput. feasible: it meets the SLO at the point estimate.
    prefill_load, decode_batch, decode_tokens_per_s: predicted utilisation of prefill, sequences per decode worker, output tokens
    a second that each gives; of a trace that windows stand for where these are busiest. extrapolated: why the figures lie
    outside what the runs have shown, or "". stressed: worth with either role slower by STRESS (NaN: no).
    kept: how nearly the SLO's constraints are, 1 where they are met or there is none.
    """

    fleet: Fleet
    figures: dict[str, Interval]
    attainment: float
    utilisation: dict[str, float]
    wins: float
    feasible: bool
    prefill_load: float
    decode_batch: float
    decode_tokens_per_s: float = 0.0
    extrapolated: str = ""
    stressed: float = math.nan
    kept: Interval = Interval(1.0, 1.0, 1.0)

    @property
    def worth_per_s(self) -> float:
        """Goodput, less by as much as a constraint is missed."""
        return self.figures["goodput_per_s"].value * self.kept.value

    @property
    def worth_low_per_s(self) -> float:
        """The same by the lower bounds."""
        return self.figures["goodput_per_s"].low * self.kept.low


@dataclass(frozen=True, eq=False)
class Recommendation:
    """The answer, what it rests on, and what it does not know. refused: why it must not be relied on yet, or "".

    regret: share of goodput that the answer loses against the best split, over the draws (mean, 95 % quantile). sure: no
    further run is worth it. break_even: see :func:`break_even`. simulated: fleets that the screen left.
    """

    strategy: str
    best: Candidate
    runner_up: Candidate | None
    candidates: list[Candidate]
    slo: Slo
    schedule: Schedule
    gpus: int
    fit: Fit
    runs: list[int]
    n: int
    current: Fleet | None
    calibrated: bool
    next_probe: dict[str, Any]
    warnings: list[str] = field(default_factory=list)
    data_hash: str = ""
    refused: str = ""
    regret: Interval = field(default_factory=lambda: Interval(float("nan"), 0.0, float("nan")))
    sure: bool = False
    baselines: list[Baseline] = field(default_factory=list)
    break_even: dict[str, float | None] = field(default_factory=dict)
    simulated: list[Fleet] = field(default_factory=list)
    gpus_per_worker: tuple[int, int] = (1, 1)
    attainment: float = 0.9

    @property
    def sentence(self) -> str:
        """The answer in one sentence."""
        goodput = self.best.figures["goodput_per_s"]
        text = (
            f"Run {self.best.fleet.prefill} prefill : {self.best.fleet.decode} decode; at "
            f"{self.schedule.rate_per_s:.3g} req/s it serves {goodput.value:.3g} req/s within {self.slo}"
        )
        even = self.compared_with
        if even is not None:
            other = even.figures["goodput_per_s"].value
            gain = goodput.value / other - 1 if other > 0 else math.inf
            name = f"today's {even.fleet}" if self.current else f"{even.fleet}"
            if self.slo.constraints and not even.feasible:
                text += f"; {name} misses that"
            elif not math.isfinite(gain):
                text += f"; {name} serves none"
            else:
                text += (
                    f", as much as {name}"
                    if abs(gain) < 0.005
                    else f", {abs(gain):.0%} {'more' if gain > 0 else 'less'} than {name}"
                )
        label = "90 % interval" if self.calibrated else "90 % band, not yet calibrated"
        return text + f" ({label}: {goodput.low:.3g} to {goodput.high:.3g})."

    @property
    def gap(self) -> float:
        """Share of the answer's worth that its runner-up loses; below 0 where that is worth more. NaN without one."""
        mine = self.best.worth_per_s
        return 1 - self.runner_up.worth_per_s / mine if self.runner_up and mine > 0 else math.nan

    @property
    def compared_with(self) -> Candidate | None:
        """The fleet the user would otherwise run: the current one, else the even split; None if that is the answer."""
        even = min((c.fleet for c in self.candidates), key=lambda f: abs(f.prefill - f.decode))
        other = self.current or even
        return next((c for c in self.candidates if c.fleet == other != self.best.fleet), None)

    def as_json(self) -> dict[str, Any]:
        """The keys of ``advise --json``."""

        def one(candidate: Candidate) -> dict[str, Any]:
            return {
                "prefill": candidate.fleet.prefill,
                "decode": candidate.fleet.decode,
                **{name: asdict(figure) for name, figure in candidate.figures.items()},
                "attainment": candidate.attainment,
                "utilisation": candidate.utilisation,
                "wins": candidate.wins,
                "meets_slo": candidate.feasible,
                "constraints_kept": asdict(candidate.kept),
                "prefill_load": candidate.prefill_load,
                "decode_batch": candidate.decode_batch,
                "extrapolated": candidate.extrapolated,
            }

        best = one(self.best)
        return {
            "sentence": self.sentence,
            "strategy": self.strategy,
            "prefill": best["prefill"],
            "decode": best["decode"],
            "goodput_per_s": best["goodput_per_s"],
            "ttft_p99_s": best["ttft_p99_s"],
            "tpot_p99_s": best["tpot_p99_s"],
            "e2e_p99_s": best["e2e_p99_s"],
            "runner_up": one(self.runner_up) | {"gap": self.gap} if self.runner_up else None,
            "candidates": [one(c) for c in self.candidates],
            "thresholds": None,
            "next_probe": self.next_probe,
            "runs": self.runs,
            "observations": self.n,
            "regret": asdict(self.regret),
            "sure": self.sure,
            "baselines": [
                {"name": b.name, "prefill": b.fleet.prefill, "decode": b.fleet.decode, "regret": b.regret}
                for b in self.baselines
            ],
            "break_even": self.break_even,
            "warnings": self.warnings,
            "slo": str(self.slo),
            "gpus": self.gpus,
            "gpus_per_worker": list(self.gpus_per_worker),
            "attainment": self.attainment,
            "current": asdict(self.current) if self.current else None,
            "trace": self.schedule.name,
            "rate_per_s": self.schedule.rate_per_s,
            "requests": len(self.schedule),
            "schedule_digest": self.schedule.digest(),
            "schedule_changes": list(self.schedule.changes),
            "calibrated": self.calibrated,
            "profile": self.fit.profile.to_toml(),
            "laws": [asdict(law) for law in self.fit.laws],
            "residuals": self.fit.residuals,
            "data_hash": self.data_hash,
        }


def recommend(
    data: Sequence[RunData],
    schedule: Schedule,
    *,
    gpus: int,
    slo: Slo,
    gpus_per_worker: tuple[int, int] = (1, 1),
    attainment: float = 0.9,
    current: Fleet | None = None,
    seed: int = 0,
    draws: int = DRAWS,
    note: Note = silent,
    parts: Sequence[int] = (),
    refuse: bool = True,
) -> Recommendation:
    """Fit the runs, simulate every split of ``gpus`` on the schedule, decide. current: the fleet in production, if any.

    parts: requests of each window of a longer one that the schedule is made of; how much they differ widens the intervals. One
    without windows and of more than :data:`advisor.splits.POINT_REQUESTS` is simulated by windows of its own.

    Raises NotEnoughDataError with the next measurement when the rows cannot answer, NoFleetError when no split meets
    the SLO, InputError when there is no split. refuse=False: of these only where no law can be fitted or there is no split; what
    the answer would be is returned, with the reason why it must not be given in ``refused``.
    """
    fleets = splits_of(gpus, gpus_per_worker)
    if not fleets:
        raise InputError(
            f"{gpus} GPUs at {gpus_per_worker} GPUs a worker make no fleet with both roles. Give more GPUs."
        )
    if not len(schedule):
        raise InputError(f"trace {schedule.name!r} has no request that can be replayed.")
    check_rate(schedule)
    warnings: list[str] = []
    used = fleets[0].gpus(gpus_per_worker)
    if used < gpus:
        each = f"{gpus_per_worker[0]} and {gpus_per_worker[1]} GPUs a worker"
        warnings.append(f"no fleet of {each} uses {gpus} GPUs: fleets of {used} were compared")
    if current is not None and current not in fleets:
        warnings.append(f"today's {current} is no split of {used} GPUs, so it was not compared")
    first = quiet(schedule, used, per_worker=gpus_per_worker)
    stored = stored_as(data, gpus_per_worker)
    # What is measured next is stored as the runs are, or it would set them apart from itself.
    unsaid = sized(gpus_per_worker) if stored != gpus_per_worker else ""
    first["command"] = first["command"].removesuffix(unsaid)
    if unsaid:
        warnings.append(
            "the runs are taken to be of {},{} GPUs a worker: all that can be used are stored with 1,1, which is also what is "
            "stored where nobody said it".format(*gpus_per_worker)
        )
    usable = _usable(data, first, warnings, stored)
    note("fit", 0, 1)
    try:
        fit = fit_laws(usable, slo=slo)
    except NotEnoughDataError as error:
        raise NotEnoughDataError(f"{error} Measure next: {first['command']}", first) from None
    warnings += fit.warnings
    note("fit", 1, 1, _laws_found(fit))

    some, parts = (schedule, parts) if len(parts) > 1 else excerpt(schedule)
    if len(parts) > 1:
        warnings.append(
            f"of the traffic {len(parts)} windows of {len(some) // len(parts)} requests were simulated, spread over all of it; "
            "how much they differ is in the intervals"
        )
    splits = simulated(fit, some, fleets, slo, attainment=attainment, seed=seed, draws=draws, parts=parts, note=note)
    points, likely, laws, window = splits.points, splits.likely, splits.laws, splits.window
    rivals = _rivals(splits, slo)
    goodputs = splits.goodputs()[:, [likely.index(fleet) for fleet in rivals]]
    best_of_draw = np.argmax(goodputs, axis=1) if draws else np.zeros(0, dtype=int)
    candidates, longer = [], fit.longer(schedule)
    for fleet in fleets:
        held = points[fleet]
        load = predicted_load(fit, splits.busy, fleet)
        wins = float((best_of_draw == rivals.index(fleet)).mean()) if draws and fleet in rivals else 0.0
        candidates.append(
            Candidate(
                fleet=fleet,
                figures=_figures(splits, fleet, fit),
                attainment=held.summary.attainment,
                utilisation=held.utilisation,
                wins=wins if draws else float("nan"),
                feasible=held.meets,
                prefill_load=load.prefill,
                decode_batch=load.batch,
                decode_tokens_per_s=splits.decode_tokens_per_s(fleet),
                extrapolated="; ".join(filter(None, (fit.outside(load), longer))),
                stressed=stressed(window, fleet, fit.profile, slo) if fleet in likely else math.nan,
                kept=_kept(held, splits.anchors[fleet], splits.drawn[fleet]),
            )
        )
    ranked = rank([c for c in candidates if c.fleet in likely], current, gpus_per_worker)
    best = ranked[0]
    runner_up = ranked[1] if len(ranked) > 1 else None
    regret = _regret(goodputs, rivals.index(best.fleet))
    unseen = _unseen(fit, candidates, best, laws, splits.busy)
    excess = fit.calibration.excess
    sure = enough(regret, unseen, excess, len(usable)) and not longer
    if excess > EXPLAINED:
        warnings.append(
            f"the laws do not explain the runs: they miss them by {math.sqrt(excess):.1f} times what chance does, so a mechanism "
            "is missing, and the bands are wider for it. Measure the answer and its runner-up before you rely on it"
        )
    probe = next_probe(
        fit,
        to_rate(window, schedule.rate_per_s),  # the window may be busier, and a run is named at the rate asked about
        best,
        runner_up,
        used,
        laws[:STUDY_DRAWS],
        goodputs[:STUDY_DRAWS],
        slo,
        sure,
        gpus_per_worker,
        fit.seen.decode_loaded(max(splits.asked_tokens_per_s, _busiest(candidates, best).decode_tokens_per_s)),
    )
    probe |= {"trace": schedule.name, "command": probe["command"].removesuffix(unsaid)}
    if longer:
        _slice(probe, fit, schedule)
    refused = refusal(best.fleet, regret, unseen, excess, len(usable))
    if best.extrapolated:
        warnings.append(f"{best.fleet}: {best.extrapolated}")
    if best.kept.low < 1 <= best.kept.value:
        warnings.append(
            f"{best.fleet} may miss {slo}: in one draw of twenty a quantile is {1 / max(best.kept.low, 1e-3):.3g} times its limit"
        )
    if draws and not sure and best.wins < 0.8 and runner_up and runner_up.wins > 0:
        warnings.append(
            f"{best.fleet} has the most goodput in {best.wins:.0%} of the draws, {runner_up.fleet} in "
            f"{runner_up.wins:.0%}: measure next what next_probe names."
        )
    calibrated = len(usable) >= CALIBRATED_RUNS
    if not calibrated:
        warnings.append(
            f"intervals rest on {len(usable)} runs: laws drawn from what the runs allow, coverage not yet calibrated "
            f"(that takes {CALIBRATED_RUNS} runs)"
        )
    rules = [
        replace(one, regret=1 - points[one.fleet].worth_per_s / splits.top if splits.top > 0 else math.nan)
        for one in baselines(usable, schedule, fleets, fit.profile, slo.as_limits)
    ]
    answer = Recommendation(
        strategy="static",
        best=best,
        runner_up=runner_up,
        candidates=candidates,
        slo=slo,
        schedule=schedule,
        gpus=gpus,
        fit=fit,
        runs=[d.run.id for d in usable],
        n=sum(d.finished if d.windows else int(d.counted.ok.sum()) for d in usable),
        current=current,
        calibrated=calibrated,
        next_probe=probe,
        warnings=warnings,
        data_hash=data_hash(usable),
        refused=refused,
        regret=regret,
        sure=sure,
        baselines=rules,
        break_even=break_even(window, best.fleet, runner_up.fleet, fit.profile, slo) if runner_up else {},
        simulated=likely,
        gpus_per_worker=gpus_per_worker,
        attainment=attainment,
    )
    return _stands(answer, attainment) if refuse else answer


def _stands(answer: Recommendation, attainment: float) -> Recommendation:
    """The answer, if it may be given."""
    if answer.refused:
        probe = answer.next_probe
        raise NotEnoughDataError(f"{answer.refused}. Measure next: {probe['command']} ({reason(probe)})", probe)
    if not any(c.feasible for c in answer.candidates):
        wanted = str(answer.slo) if answer.slo.constraints else f"{attainment:.0%} of requests within {answer.slo}"
        best = answer.best
        quantiles = [f"{metric}_p{q:g}" for metric, q, _ in answer.slo.constraints if q in (50, 90, 99)]
        told = [f"{name} {best.figures[f'{name}_s'].value:.3g} s" for name in quantiles] or [f"{best.attainment:.0%}"]
        raise NoFleetError(
            f"no split of {answer.gpus} GPUs meets {wanted} at {answer.schedule.rate_per_s:.3g} req/s: the best, {best.fleet}, "
            f"reaches {', '.join(told)}. Lower --rate, loosen --slo or --attainment, or give more --gpus."
        )
    return answer


def _laws_found(fit: Fit) -> str:
    """The laws in a line, and how far they are off."""
    p = fit.profile
    off = fit.spread.get("goodput_per_s", 0.0)
    return (
        f"a prefill step takes {p.a_s * 1e3:.3g} ms + {p.b_s_per_token * 1e6:.3g} us a token, a decode step "
        f"{p.c0_s * 1e3:.3g} ms + {p.c1_s * 1e3:.3g} ms a sequence; goodput of the runs is missed by {math.expm1(off):.1%}"
    )


def enough(regret: Interval, unseen: str, excess: float, runs: int) -> bool:
    """Is no further run worth it? Two runs at least, all stages loaded that matter, and laws that explain them."""
    return not unseen and runs > 1 and regret.high <= STOP and excess <= EXPLAINED


def refusal(fleet: Fleet, regret: Interval, unseen: str, excess: float, runs: int) -> str:
    """Why the answer must not be relied on yet, or "".

    unseen: which stage no run loaded. excess: the laws' misfit, :attr:`advisor.calibrate.Calibration.excess`. Where something is
    known to be missing, a stage that no run loaded or a mechanism, what draws leave open counts by its 95 % quantile.
    """
    if unseen and (regret.high > STOP or runs < 2):
        return unseen
    if regret.value > REFUSE:
        return (
            f"the best split changes with what the runs leave open: {fleet} would lose {regret.value:.0%} of the "
            f"goodput on average, {regret.high:.0%} at worst in 20"
        )
    missed = f"the laws do not explain the runs (they miss them by {math.sqrt(excess):.1f} times what chance does)"
    if excess > MISSED:
        return f"{missed}, so what they say of {fleet} cannot be relied on"
    if excess > MISFIT and regret.high > STOP:
        return f"{missed}, and {fleet} would lose {regret.high:.0%} of the goodput at worst in 20"
    return ""


def _rivals(splits: Splits, slo: Slo) -> list[Fleet]:
    """Those of the likely splits that the draws choose among: not one that serves more than all that reach the attainment."""
    likely, points = splits.likely, splits.points
    if slo.constraints:
        return likely  # a miss of theirs lowers its worth
    most = max((points[f].worth_per_s for f in likely if points[f].meets), default=math.inf)
    return [f for f in likely if not points[f].worth_per_s > most]


def _regret(goodputs: Floats, chosen: int) -> Interval:
    """What the choice loses in the draws, as a share of each draw's best: mean, and the 95 % quantile as high."""
    if not goodputs.size:
        return Interval(float("nan"), 0.0, float("nan"))
    best = goodputs.max(axis=1)
    lost = np.where(best > 0, 1 - goodputs[:, chosen] / np.maximum(best, 1e-12), 0.0)
    return Interval(float(lost.mean()), 0.0, float(np.quantile(lost, 0.95)))


def break_even(schedule: Schedule, best: Fleet, other: Fleet, laws: Profile, slo: Slo) -> dict[str, float | None]:
    """The smallest change of the mix, and of the rate, with which the other fleet has more goodput.

    prompt_factor: all prompts that many times as long (answers as they are), so a change of the prompt:output mix.
    rate_factor: the same requests at that many times the rate. None where a factor of 4 either way does not suffice.
    """
    window = piece(schedule, BREAK_EVEN_REQUESTS)

    def mix(factor: float) -> Schedule:
        return scale_tokens(window, prompt=factor)

    def rate(factor: float) -> Schedule:
        return scale_rate(window, factor)

    def ahead(shaped: Schedule) -> bool:
        mine, theirs = (worth_per_s(simulate(shaped, f, laws).observations, slo) for f in (best, other))
        return theirs > 1.002 * mine

    found: dict[str, float | None] = {}
    for name, shape in (("prompt_factor", mix), ("rate_factor", rate)):
        found[name] = None
        for step in (1.1, 1.25, 1.5, 2.0, 3.0, 4.0):
            hits = [f for f in (step, 1 / step) if ahead(shape(f))]
            if hits:
                inner, outer = 1.0, hits[0]
                for _ in range(4):
                    middle = math.sqrt(inner * outer)
                    inner, outer = (inner, middle) if ahead(shape(middle)) else (middle, outer)
                found[name] = outer
                break
    return found


def rank(candidates: Sequence[Candidate], current: Fleet | None, gpus_per_worker: tuple[int, int]) -> list[Candidate]:
    """Candidates from best to worst by the rule at the top of this file, applied again to what is left each time."""
    left = list(candidates)
    ranked = []
    while left:
        near = [c for c in left if c.kept.value >= 1] or left
        near = [c for c in near if c.feasible] or near
        top = max(c.worth_low_per_s for c in near)
        near = [c for c in near if c.worth_low_per_s >= top * (1 - NEAR)]
        most = max(c.worth_per_s for c in near)
        near = [c for c in near if c.worth_per_s >= most * (1 - NEAR)]

        least = min(_p99_of(c) for c in near)
        near = [c for c in near if _p99_of(c) <= least * (1 + TOLD)]
        firm = max(_firm(c) for c in near)
        near = [c for c in near if _firm(c) >= firm * (1 - NEAR)]

        def key(c: Candidate) -> tuple[int, int, float, float]:
            away = abs(c.fleet.prefill - current.prefill) if current else 0
            return (c.fleet.gpus(gpus_per_worker), away, -_firm(c), _p99_of(c))

        chosen = min(near, key=key)
        ranked.append(chosen)
        left.remove(chosen)
    return ranked


def _p99_of(c: Candidate) -> float:
    value = c.figures["e2e_p99_s"].value
    return value if math.isfinite(value) else math.inf


def _firm(c: Candidate) -> float:
    return c.stressed if math.isfinite(c.stressed) else c.worth_per_s


def stressed(schedule: Schedule, fleet: Fleet, laws: Profile, slo: Slo) -> float:
    """What is left of its worth with the laws' prefill slower by STRESS and with their decode slower, mean of the two."""
    found = []
    for names in (("a_s", "b_s_per_token", "c_s_per_token2"), ("c0_s", "c1_s", "c2_s", "knee_s")):
        slower = replace(laws, **{name: getattr(laws, name) * STRESS for name in names})
        found.append(worth_per_s(simulate(schedule, fleet, slower).observations, slo))
    return float(np.mean(found))


def _kept(point: Simulated, anchor: Simulated, draws: Sequence[Simulated]) -> Interval:
    """How nearly the constraints are kept, over the draws. anchor: the point's laws on the requests of the draws."""
    if not draws:
        return Interval(point.kept, point.kept, point.kept)
    factor = point.kept / anchor.kept if anchor.kept > 0 else 1.0
    low, high = np.quantile([min(1.0, factor * one.kept) for one in draws], [0.05, 0.95])
    return Interval(point.kept, min(point.kept, float(low)), max(point.kept, float(high)))


def data_hash(data: Sequence[RunData]) -> str:
    """sha256 over the rows an answer rests on: the same rows give the same hash, and the same answer."""
    h = hashlib.sha256()
    for one in data:
        warm = f":{one.run.warmup_s:g}" if one.run.warmup_s > 0 else ""
        h.update(f"{one.run.id}:{one.run.fleet}{warm}".encode())
        for name in ("index", "sent_s", "first_token_s", "last_token_s", "prompt_tokens", "output_tokens"):
            h.update(np.ascontiguousarray(getattr(one.observations, name)).tobytes())
    return h.hexdigest()


FAILED = 0.01
"""Share of failed requests from which on a run is named."""


def stored_as(data: Sequence[RunData], per_worker: tuple[int, int]) -> tuple[int, int]:
    """GPUs a worker with which runs of such workers are stored: as asked; 1,1 where all that laws may rest on are, the default,
    which need not have been said."""
    return (1, 1) if {one.run.gpus_per_worker for one in data if not one.unfit} == {(1, 1)} else per_worker


def unlike(run: Run, per_worker: tuple[int, int]) -> str:
    """Why a run tells nothing of workers of ``per_worker`` GPUs, since its own are another stage; "" if they are not."""
    if run.gpus_per_worker == per_worker:
        return ""
    had, wanted = ("{},{}".format(*pair) for pair in (run.gpus_per_worker, per_worker))
    return (
        f"it is stored with {had} GPUs a worker, {wanted} are asked about, whose laws are others "
        f"(--gpus-per-worker {had} asks about this run's)"
    )


def _usable(
    data: Sequence[RunData], first: dict[str, Any], warnings: list[str], per_worker: tuple[int, int]
) -> list[RunData]:
    """The runs an answer may rest on: valid ones, degraded ones with a warning; never invalid, of unknown fleet, or such as
    :func:`unlike` tells.

    first: the run to begin with, where there is none.
    """
    usable, left = [], []
    for one in data:
        run, (failed, kinds) = one.run, _failed(one)
        if why := one.unfit or unlike(run, per_worker):
            left.append(f"run {run.id} left out: {why}")
            warnings.append(left[-1])
        else:
            if failed >= FAILED:
                warnings.append(
                    f"{failed:.1%} of the requests of run {run.id} failed ({kinds}): the laws know no failures, so a split may "
                    "serve as much less than is said here"
                )
            if run.verdict == "degraded":
                warnings.append(f"run {run.id} is degraded: {run.reason}")
            if not run.complete:
                warnings.append(f"run {run.id} is incomplete: {run.reason}")
            usable.append(one)
    if not usable:
        why = f" ({left[0]})" if left else ""
        raise NotEnoughDataError(f"no stored run can be used{why}. Measure one first: {first['command']}", first)
    return usable


def _failed(one: RunData) -> tuple[float, str]:
    """(share of a run's requests that failed, how many of which kind): "40 status, 2 reset"."""
    kinds = Counter(str(kind) for kind in one.counted.error[one.counted.status == "failed"])
    return kinds.total() / max(1, len(one.counted)), ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())


def _figures(splits: Splits, fleet: Fleet, fit: Fit) -> dict[str, Interval]:
    """Point values with 90 % intervals, as log ratios around the point.

    With enough runs the width is how far the draws reach below and above the laws on the same window, times the conformal
    quantile of how far off the runs are in such reaches (see there). With fewer the draws' width is taken around their median, so
    that a window shorter than the trace widens nothing, and the laws' misfit on the runs is added in quadrature. A draw that
    serves nothing has no logarithm: where it is one in twenty, what is served may be nothing.
    """
    point, anchor, draws = splits.points[fleet], splits.anchors[fleet].summary, splits.drawn[fleet]
    offered, sampled = splits.offered_per_s, splits.sampled[fleet]
    busiest = max(point.utilisation["prefill"], point.utilisation["decode"])
    figures = {}
    for name in METRICS:
        value, beside = float(getattr(point.summary, name)), float(getattr(anchor, name))
        drawn = np.array([getattr(one.summary, name) for one in draws], dtype=float)
        drawn = drawn[np.isfinite(drawn)]
        idle = (drawn <= 0).sum() >= 0.05 * len(drawn)
        drawn = drawn[drawn > 0]
        rate = name.endswith("per_s")
        if not math.isfinite(value) or value <= 0 or len(drawn) < 3:
            high = value if value == 0 else float("nan")
            figures[name] = Interval(value, 0.0, offered) if rate else Interval(value, float("nan"), high)
            continue
        found = conformal(fit.scores.get(name, []), busiest)
        if found is None:
            low, middle, high = np.quantile(np.log(drawn), [0.05, 0.5, 0.95])
            misfit = 1.645 * fit.spread.get(name, 0.0)
            down, up = (
                math.hypot(w, misfit, FLOORS[name], sampled.get(name, 0.0)) for w in (middle - low, high - middle)
            )
        else:
            reaches = reach(beside if beside > 0 else value, drawn)
            factor, beyond = max(found[0], 1.0), found[1]
            down, up = (math.hypot(factor * max(w, LEAST[name]), beyond, sampled.get(name, 0.0)) for w in reaches)
        low, high = value * math.exp(-down), value * math.exp(min(up, 50.0))
        if rate:
            low = 0.0 if idle else low
            high = max(value, min(high, offered))
        figures[name] = Interval(value, low, high)
    for role, value in point.utilisation.items():
        shares = np.array([one.utilisation[role] for one in draws if math.isfinite(one.utilisation[role])])
        if len(shares) < 3 or not math.isfinite(value):
            figures[f"utilisation_{role}"] = Interval(value, 0.0, 1.0)
            continue
        low, middle, high = np.quantile(shares, [0.05, 0.5, 0.95])
        figures[f"utilisation_{role}"] = Interval(
            value, max(0.0, value - (middle - low) - 0.02), min(1.0, max(value, value + high - middle + 0.02))
        )
    return figures


REGIMES = (0.7, 0.95)
"""Bounds between regimes of the busier stage: quiet, busy, saturated. A run says little of another regime's error."""


MOST_REACHES = 3.0
"""A factor beyond it tells of runs at which all draws agree, not of splits that nobody ran."""


def conformal(
    scores: Sequence[tuple[float, float, float]], busiest: float, level: float = 0.9
) -> tuple[float, float] | None:
    """(factor on expected half-widths, what is added in quadrature) that together cover ``level`` of the runs, of the same regime
    where nine were. None without scores.

    Split conformal: of n scores, how far off a run is in half-widths, the ceil((n + 1) level)-th smallest. Where that is more
    than MOST_REACHES it is what goes beyond so many half-widths: many runs make draws agree there to less than what the laws
    leave out, and as a factor that made bands of 30 orders of magnitude where draws differ.
    """
    if len(scores) < CALIBRATED_RUNS - 1:
        return None
    regime = sum(busiest > bound for bound in REGIMES)
    same = [one for one in scores if sum(one[0] > bound for bound in REGIMES) == regime]
    held = same if len(same) >= CALIBRATED_RUNS - 1 else scores
    rank = min(len(held), math.ceil((len(held) + 1) * level)) - 1
    factor = sorted(off / width for _, off, width in held)[rank]
    if factor <= MOST_REACHES:
        return factor, 0.0
    return MOST_REACHES, sorted(math.sqrt(max(0.0, off * off - (MOST_REACHES * width) ** 2)) for _, off, width in held)[
        rank
    ]


def next_probe(
    fit: Fit,
    schedule: Schedule,
    best: Candidate,
    runner_up: Candidate | None,
    gpus: int,
    laws: Sequence[Profile],
    goodputs: Floats,
    slo: Slo,
    sure: bool,
    per_worker: tuple[int, int] = (1, 1),
    decode_loaded: bool = True,
) -> dict[str, Any]:
    """The most valuable next run: the stage that no run loaded, else what it is expected to spare.

    decode_loaded: as far as any split asks that may be the best.
    """
    seen = fit.seen
    if seen.quiet_rows < 20:
        why = "no run was quiet enough to show TTFT without a queue"
        return quiet(schedule, gpus, per_worker=per_worker) | {"why": why, "gain_per_s": 0.0, "stop": sure}
    likely = [best.fleet] + ([runner_up.fleet] if runner_up else [])
    ideas = proposals(schedule, fit.profile, gpus, likely, per_worker, laws)
    found = values(ideas, schedule, laws, goodputs, slo)
    by_aim = {p.aim: p for p in reversed(found)}
    chosen = max(found, key=lambda p: p.gain)
    if not sure and seen.prefill < LOADED:
        chosen = by_aim["prefill"]
    elif not sure and not decode_loaded:
        chosen = by_aim["decode"]
    elif chosen.gain <= 0 or fit.calibration.excess > MISFIT:
        # Where the laws are wrong, what a run of the rivals shows is right.
        chosen = by_aim["answer"]
    why = {
        "prefill": f"prefill was never more than {min(seen.prefill, 1.0):.0%} busy"
        if seen.prefill < LOADED
        else "how prefill behaves beyond its capacity decides",
        "decode": f"a decode worker was never seen to give more than {seen.tokens_per_s:.3g} tokens a second",
        "answer": "it confirms the answer where it will be used"
        if chosen.fleet == best.fleet
        else "it is the closest rival",
    }[chosen.aim]
    command = (
        f"steelyard replay {shlex.quote(schedule.name)} --endpoint URL --fleet {chosen.fleet} --rate {chosen.rate_per_s:.3g} "
        f"--requests {chosen.requests}{sized(per_worker)}"
    )
    return {
        "prefill": chosen.fleet.prefill,
        "decode": chosen.fleet.decode,
        "rate_per_s": chosen.rate_per_s,
        "requests": chosen.requests,
        "arrivals": "as recorded",
        "why": why,
        "gain_per_s": chosen.gain,
        "stop": sure,
        "command": command,
    }


def _slice(probe: dict[str, Any], fit: Fit, schedule: Schedule) -> None:
    """Name the stretch of a trace that has the longest requests, where the beginning, which a replay takes, has none of them."""
    n = min(probe["requests"], len(schedule))
    as_stored = all(change.startswith(("rate x", "first ")) for change in schedule.changes)
    if probe["arrivals"] != "as recorded" or not as_stored or fit.longer(schedule.take(np.arange(n))):
        return
    starts = [*range(0, len(schedule) - n + 1, n), len(schedule) - n]  # the last one is of no multiple

    def stretch(start: int) -> Schedule:
        return schedule.take(np.arange(start, start + n))

    start = max(starts, key=lambda at: max(asked / max(most, 1.0) for _, asked, most in fit.lengths(stretch(at))))
    if not fit.longer(stretch(start)):
        return
    probe["command"] = probe["command"].replace(f"--requests {n}", f"--slice {start}-{start + n}")
    probe["why"] += f"; the first {n} requests are shorter than those that are asked about, so take others"


def _unseen(
    fit: Fit, candidates: Sequence[Candidate], best: Candidate, laws: Sequence[Profile], asked: Schedule
) -> str:
    """Which stage was never loaded although the answer depends on how it behaves when it is; "" if none.

    Under the fitted laws or any draw of them: a role that was never loaded is one whose capacity the fit has guessed. Decode
    counts as loaded as far as a worker was seen to give the tokens a second that the answer, or what may win instead, asks of it.
    """
    seen = fit.seen
    reasons = []
    if seen.quiet_rows < 20:
        reasons.append("no run at low load")
    near = _near(candidates, best)
    if seen.prefill < LOADED and (
        any(c.prefill_load > LOADED for c in candidates)
        or any(load_of(p, asked, c.fleet).prefill > LOADED for p in laws for c in near)
    ):
        reasons.append(f"prefill was never loaded (at most {seen.prefill:.0%} busy)")
    busiest = _busiest(candidates, best)
    if not seen.decode_loaded(busiest.decode_tokens_per_s):
        reasons.append(
            f"decode was never loaded (a worker gave at most {seen.tokens_per_s:.3g} tokens a second, {busiest.fleet} asks for "
            f"{busiest.decode_tokens_per_s:.3g})"
        )
    return "; ".join(reasons)


def _near(candidates: Sequence[Candidate], best: Candidate) -> list[Candidate]:
    """The answer, and what may win instead: in a draw, or under the fitted laws, where draws doubt a stage that no run loaded."""
    more = best.worth_per_s * (1 + NEAR)
    return [c for c in candidates if c is best or c.wins > 0 or c.worth_per_s > more]


def _busiest(candidates: Sequence[Candidate], best: Candidate) -> Candidate:
    """Which of those asks most of a decode worker."""
    return max(_near(candidates, best), key=lambda c: c.decode_tokens_per_s)
