"""Which fleet: simulate every split on the trace with the fitted laws, decide by what is sure, say what is not.

The decision (lexicographic): the goodput within 1 % of the best, by its lower bound and by its value; then the smallest P99 E2E;
then the fewest GPUs; then nearest to the fleet that runs. Without the second step a tie at low load would pick an
absurd edge split.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from advisor.features import RunData
from advisor.model import METRICS, Fit, fit_laws, predicted_load
from loadgen.cluster import simulate
from traces.errors import InputError, NoFleetError, NotEnoughDataError
from traces.measures import Slo, Summary, meets, summarise
from traces.records import Fleet, Schedule

DRAWS = 30
"""Bootstrap draws behind an interval."""

DRAW_REQUESTS = 2000
"""Requests of the trace that a draw simulates; the point estimate always simulates all of them."""

NEAR = 0.01
"""Fleets whose goodput differs by less than this share are as good as each other."""

CALIBRATED_RUNS = 10
"""Fewer runs than this cannot show whether a 90 % interval covers 90 %."""

Note = Callable[[str, int, int], None]


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
    prefill_load, decode_batch: predicted utilisation of prefill and sequences per decode worker. extrapolated: why the
    figures lie outside what the runs have shown, or "".
    """

    fleet: Fleet
    figures: dict[str, Interval]
    attainment: float
    utilisation: dict[str, float]
    wins: float
    feasible: bool
    prefill_load: float
    decode_batch: float
    extrapolated: str = ""


@dataclass(frozen=True, eq=False)
class Recommendation:
    """The answer, what it rests on, and what it does not know. refused: why it must not be relied on yet, or ""."""

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
            text += f", {gain:.0%} more than {name}" if math.isfinite(gain) else f"; {name} serves none"
        label = "90 % interval" if self.calibrated else "90 % band, not yet calibrated"
        return text + f" ({label}: {goodput.low:.3g} to {goodput.high:.3g})."

    @property
    def compared_with(self) -> Candidate | None:
        """The fleet the user would otherwise run: the current one, else the even split; None if that is the answer."""
        other = self.current or Fleet(self.gpus // 2, self.gpus - self.gpus // 2)
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
            "runner_up": one(self.runner_up) if self.runner_up else None,
            "candidates": [one(c) for c in self.candidates],
            "thresholds": None,
            "next_probe": self.next_probe,
            "runs": self.runs,
            "observations": self.n,
            "warnings": self.warnings,
            "slo": str(self.slo),
            "gpus": self.gpus,
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
    note: Note | None = None,
) -> Recommendation:
    """Fit the runs, simulate every split of ``gpus`` on the schedule, decide. current: the fleet in production, if any.

    Raises NotEnoughDataError with the next measurement when the rows cannot answer, NoFleetError when no split meets
    the SLO, InputError when there is no split.
    """
    answer = assess(
        data,
        schedule,
        gpus=gpus,
        slo=slo,
        gpus_per_worker=gpus_per_worker,
        attainment=attainment,
        current=current,
        seed=seed,
        draws=draws,
        note=note,
    )
    if answer.refused:
        raise NotEnoughDataError(f"{answer.refused}. Measure next: {answer.next_probe['command']}")
    if not any(c.feasible for c in answer.candidates):
        wanted = str(slo) if slo.constraints else f"{attainment:.0%} of requests within {slo}"
        best = answer.best
        raise NoFleetError(
            f"no split of {gpus} GPUs meets {wanted} at {schedule.rate_per_s:.3g} req/s: the best, {best.fleet}, "
            f"reaches {best.attainment:.0%}. Lower --rate, loosen --slo or --attainment, or give more --gpus."
        )
    return answer


def assess(
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
    note: Note | None = None,
) -> Recommendation:
    """:func:`recommend` without its refusals: what it would say, with the reason why it must not in ``refused``.

    NotEnoughDataError is left for rows that no law can be fitted to.
    """
    used = next((g for g in range(gpus, 1, -1) if Fleet.splits(g, gpus_per_worker)), 0)
    fleets = Fleet.splits(used, gpus_per_worker)
    if not fleets:
        raise InputError(
            f"{gpus} GPUs at {gpus_per_worker} GPUs a worker make no fleet with both roles. Give more GPUs."
        )
    if not len(schedule):
        raise InputError(f"trace {schedule.name!r} has no request that can be replayed.")
    tell = note or (lambda what, done, of: None)
    warnings: list[str] = []
    if used < gpus:
        each = f"{gpus_per_worker[0]} and {gpus_per_worker[1]} GPUs a worker"
        warnings.append(f"no fleet of {each} uses {gpus} GPUs: fleets of {used} were compared")
    usable = _usable(data, schedule, warnings)
    tell("fit", 0, 1)
    try:
        fit = fit_laws(usable)
    except NotEnoughDataError as error:
        even = Fleet(max(1, gpus // 2), max(1, gpus - gpus // 2))
        raise NotEnoughDataError(
            f"{error} Measure next: steelyard replay {schedule.name} --endpoint URL --fleet {even} "
            f"--rate {schedule.rate_per_s * 0.2:.3g}"
        ) from None
    warnings += fit.warnings
    tell("fit", 1, 1)

    points: dict[Fleet, tuple[Summary, dict[str, float], bool]] = {}
    for done, fleet in enumerate(fleets):
        tell("splits", done, len(fleets))
        result = simulate(schedule, fleet, fit.profile)
        summary = summarise(result.observations, slo)
        points[fleet] = summary, result.utilisation, meets(summary, result.observations, slo, attainment)
    tell("splits", len(fleets), len(fleets))

    rng = np.random.default_rng(seed)
    window = _window(schedule, DRAW_REQUESTS)
    drawn: dict[Fleet, list[Summary]] = {fleet: [] for fleet in fleets}
    for i in range(draws):
        tell("bootstrap", i, draws)
        profile = fit.redraw(rng)
        for fleet in fleets:
            result = simulate(window, fleet, profile)
            drawn[fleet].append(summarise(result.observations, slo))
    tell("bootstrap", draws, draws)

    goodputs = np.array([[s.goodput_per_s for s in drawn[fleet]] for fleet in fleets])
    best_of_draw = np.argmax(goodputs, axis=0) if draws else np.zeros(0, dtype=int)
    candidates = []
    for i, fleet in enumerate(fleets):
        summary, utilisation, feasible = points[fleet]
        load = predicted_load(fit, schedule, fleet)
        candidates.append(
            Candidate(
                fleet=fleet,
                figures=_figures(summary, drawn[fleet], fit.spread, schedule),
                attainment=summary.attainment,
                utilisation=utilisation,
                wins=float((best_of_draw == i).mean()) if draws else float("nan"),
                feasible=feasible,
                prefill_load=load.prefill,
                decode_batch=load.batch,
                extrapolated=fit.outside(load),
            )
        )
    ranked = rank(candidates, current, gpus_per_worker)
    best = ranked[0]
    runner_up = ranked[1] if len(ranked) > 1 else None
    probe = next_probe(fit, schedule, best, runner_up, gpus)
    refused = _unseen(fit, candidates, best)
    if best.extrapolated:
        warnings.append(f"{best.fleet}: {best.extrapolated}")
    if draws and best.wins < 0.8 and runner_up and runner_up.wins > 0:
        warnings.append(
            f"{best.fleet} has the most goodput in {best.wins:.0%} of the draws, {runner_up.fleet} in "
            f"{runner_up.wins:.0%}: measure next what next_probe names."
        )
    calibrated = len(usable) >= CALIBRATED_RUNS
    if not calibrated:
        warnings.append(
            f"intervals rest on {len(usable)} runs: bootstrap over time blocks, coverage not yet calibrated "
            f"(that takes {CALIBRATED_RUNS} runs)"
        )
    return Recommendation(
        strategy="static",
        best=best,
        runner_up=runner_up,
        candidates=candidates,
        slo=slo,
        schedule=schedule,
        gpus=gpus,
        fit=fit,
        runs=[d.run.id for d in usable],
        n=sum(int(d.observations.ok.sum()) for d in usable),
        current=current,
        calibrated=calibrated,
        next_probe=probe,
        warnings=warnings,
        data_hash=data_hash(usable),
        refused=refused,
    )


def rank(candidates: Sequence[Candidate], current: Fleet | None, gpus_per_worker: tuple[int, int]) -> list[Candidate]:
    """Candidates from best to worst by the rule at the top of this file, applied again to what is left each time."""
    left = list(candidates)
    ranked = []
    while left:
        top = max(c.figures["goodput_per_s"].low for c in left)
        near = [c for c in left if c.figures["goodput_per_s"].low >= top * (1 - NEAR)]
        most = max(c.figures["goodput_per_s"].value for c in near)
        near = [c for c in near if c.figures["goodput_per_s"].value >= most * (1 - NEAR)]

        def key(c: Candidate) -> tuple[float, int, int]:
            away = abs(c.fleet.prefill - current.prefill) if current else 0
            p99 = c.figures["e2e_p99_s"].value
            return (p99 if math.isfinite(p99) else math.inf, c.fleet.gpus(gpus_per_worker), away)

        chosen = min(near, key=key)
        ranked.append(chosen)
        left.remove(chosen)
    return ranked


def data_hash(data: Sequence[RunData]) -> str:
    """sha256 over the rows an answer rests on: the same rows give the same hash, and the same answer."""
    h = hashlib.sha256()
    for one in data:
        h.update(f"{one.run.id}:{one.run.fleet}".encode())
        for name in ("index", "sent_s", "first_token_s", "last_token_s", "prompt_tokens", "output_tokens"):
            h.update(np.ascontiguousarray(getattr(one.observations, name)).tobytes())
    return h.hexdigest()


def _usable(data: Sequence[RunData], schedule: Schedule, warnings: list[str]) -> list[RunData]:
    """The runs an answer may rest on: valid ones, degraded ones with a warning; never invalid or of unknown fleet."""
    usable = []
    for one in data:
        run = one.run
        if run.verdict not in ("valid", "degraded"):
            warnings.append(f"run {run.id} left out: its verdict is {run.verdict or 'missing'} ({run.reason})")
        elif run.fleet is None:
            warnings.append(f"run {run.id} left out: its fleet is not known (replay with --fleet P:D)")
        elif run.fleet.mixed:
            warnings.append(f"run {run.id} left out: {run.fleet.mixed} of its workers were mixed, not of one stage")
        elif run.policy.startswith(("baseline", "online", "offline")):
            warnings.append(f"run {run.id} left out: policy {run.policy} moved roles or held requests back")
        elif any(change.startswith("clock x") for change in run.changes):
            warnings.append(f"run {run.id} left out: it ran at another speed than life")
        elif one.observations.ok.sum() < 20:
            warnings.append(f"run {run.id} left out: {int(one.observations.ok.sum())} finished requests, fewer than 20")
        else:
            if run.verdict == "degraded":
                warnings.append(f"run {run.id} is degraded: {run.reason}")
            if not run.complete:
                warnings.append(f"run {run.id} is incomplete: {run.reason}")
            usable.append(one)
    if not usable:
        why = f" ({warnings[0]})" if warnings else ""
        raise NotEnoughDataError(
            f"no stored run can be used{why}. Measure one first: "
            f"steelyard replay {schedule.name} --endpoint URL --fleet 4:4 --rate {schedule.rate_per_s * 0.25:.3g}"
        )
    return usable


def _window(schedule: Schedule, most: int) -> Schedule:
    """A contiguous piece of at most ``most`` requests whose rate is nearest to the whole's; all, if it is short."""
    if len(schedule) <= most:
        return schedule
    starts = np.arange(0, len(schedule) - most + 1, max(1, most // 4))
    spans = schedule.due_s[starts + most - 1] - schedule.due_s[starts]
    start = int(starts[np.argmin(np.abs(spans - schedule.span_s * most / len(schedule)))])
    piece = schedule.take(np.arange(start, start + most))
    return replace(piece, due_s=piece.due_s - piece.due_s[0])


def _figures(
    point: Summary, draws: Sequence[Summary], spread: dict[str, float], schedule: Schedule
) -> dict[str, Interval]:
    """Point values with 90 % intervals: the draws' own width and the laws' misfit on the runs, added in quadrature.

    Both are log ratios. The draws' width is taken around the draws' median, so that a window shorter than the trace
    widens nothing by being another window.
    """
    offered = len(schedule) / max(schedule.span_s, 1e-9)
    figures = {}
    for name in METRICS:
        value = float(getattr(point, name))
        drawn = np.array([getattr(d, name) for d in draws], dtype=float)
        drawn = drawn[np.isfinite(drawn) & (drawn > 0)]
        if not math.isfinite(value) or value <= 0 or len(drawn) < 3:
            figures[name] = Interval(
                value, 0.0 if name.endswith("per_s") else float("nan"), value if value == 0 else float("nan")
            )
            if name.endswith("per_s") and not math.isfinite(figures[name].high):
                figures[name] = Interval(value, 0.0, offered)
            continue
        low, middle, high = np.quantile(np.log(drawn), [0.05, 0.5, 0.95])
        misfit = 1.645 * spread.get(name, 0.0)
        low = value * math.exp(-math.hypot(middle - low, misfit))
        high = value * math.exp(math.hypot(high - middle, misfit))
        if name.endswith("per_s"):
            high = max(value, min(high, offered))
        figures[name] = Interval(value, low, high)
    return figures


def next_probe(fit: Fit, schedule: Schedule, best: Candidate, runner_up: Candidate | None, gpus: int) -> dict[str, Any]:
    """The most valuable next run: saturate the stage seen least; when both were, run the answer itself at its rate."""
    rate = schedule.rate_per_s
    seen = fit.seen
    if seen.quiet_rows < 20:
        fleet, probe_rate = Fleet(gpus // 2, gpus - gpus // 2), rate * 0.2
        why = "no run was quiet enough to show TTFT without a queue"
    elif seen.prefill < 0.7:
        fleet, probe_rate = (
            Fleet(1, gpus - 1),
            rate / max(predicted_load(fit, schedule, Fleet(1, gpus - 1)).prefill, 0.1) * 1.1,
        )
        why = f"prefill was never more than {seen.prefill:.0%} busy"
    elif seen.batch < 0.7 * best.decode_batch or not seen.decode_loaded:
        fleet, probe_rate = Fleet(gpus - 1, 1), rate / (gpus - 1) * 1.5
        why = f"decode batches above {seen.batch:.0f} sequences a worker were never seen"
    else:
        fleet, probe_rate = best.fleet, rate
        why = "it confirms the answer where it will be used"
        if runner_up and runner_up.wins > best.wins:
            fleet, why = runner_up.fleet, "it is the closest rival"
    command = (
        f"steelyard replay {schedule.name} --endpoint URL --fleet {fleet} --rate {probe_rate:.3g} "
        f"--requests {len(schedule)}"
    )
    return {"prefill": fleet.prefill, "decode": fleet.decode, "rate_per_s": probe_rate, "why": why, "command": command}


def _unseen(fit: Fit, candidates: Sequence[Candidate], best: Candidate) -> str:
    """Which stage was never loaded although the answer depends on how it behaves when it is; "" if none."""
    seen = fit.seen
    reasons = []
    if seen.quiet_rows < 20:
        reasons.append("no run at low load")
    if seen.prefill < 0.7 and any(c.prefill_load > 0.7 for c in candidates):
        reasons.append(f"prefill was never loaded (at most {seen.prefill:.0%} busy)")
    if not seen.decode_loaded and best.decode_batch > 1.5 * seen.batch:
        reasons.append(
            f"decode was never loaded (at most {seen.batch:.1f} sequences a worker, the answer needs {best.decode_batch:.1f})"
        )
    return "; ".join(reasons)
