"""From the database to an answer: pick the runs, the trace and the rate, recommend, and keep the answer as a row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from advisor import cost as costs
from advisor.audit import audit as audit_of
from advisor.audit import confounders
from advisor.choose import Choice, choose, known_by_windows
from advisor.features import RunData
from advisor.moves import flip_law
from advisor.recommend import Recommendation, recommend, stored_as, unlike
from advisor.splits import POINT_REQUESTS, TRACE_WINDOWS
from advisor.telling import Note, silent
from advisor.windows import Question
from loadgen.cluster import Profile
from traces import __version__
from traces.errors import InputError, NoFleetError, NotEnoughDataError, StoreError
from traces.measures import Slo
from traces.records import CLOSED_LOOP, Fleet, Observations, Run, Schedule
from traces.shape import head, joined, to_rate
from traces.store import Store, redact

DEFAULT_SLO = "ttft<0.5s tpot<50ms"
"""Used when neither the user nor the runs name one; shown as a default."""


@dataclass(frozen=True, eq=False)
class Answer:
    """A recommendation, its row's id, and the runs it rests on. id None: it could not be stored, as a warning says; choice: which
    strategy, where one was asked for; extra: keys of the JSON that other questions added (cost)."""

    id: int | None
    recommendation: Recommendation
    data: list[RunData]
    choice: Choice | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The keys of ``advise --json``; what is stored is the same without ``recommendation``, the row's id."""
        return _merged(self.recommendation, self.choice, self.extra) | {"recommendation": self.id}


def _merged(answer: Recommendation, choice: Choice | None, extra: dict[str, Any]) -> dict[str, Any]:
    said = answer.as_json() | (choice.as_json() if choice else {}) | extra
    said["warnings"] = answer.warnings + (choice.warnings if choice else [])
    return said


ROWS, WINDOW_ROWS = 300_000, 5_000
"""Rows of all runs together that are read, if they have more; rows of a window at least."""

LONG_TRACE = 500_000
"""Requests of a trace that is not read whole."""


NO_TIME_S = 1e12
"""Thirty thousand years: with more no law can be fitted."""


def load(store: Store, runs: Sequence[Run]) -> list[RunData]:
    """Runs with their rows, long ones with those of windows spread over them."""
    most = max(20_000, ROWS // max(1, len(runs)))
    found = []
    for run in runs:
        rows = store.windows(run.id, most, min(20, most // WINDOW_ROWS)) or [store.observations(run.id)]
        for name in ("due_s", "sent_s", "first_token_s", "last_token_s"):
            if any((np.abs(getattr(part, name)) > NO_TIME_S).any() for part in rows):
                why = f"run {run.id} holds what no steelyard of this version wrote ({name} beyond {NO_TIME_S:g} s)"
                raise StoreError(f"{why}. Name the runs to learn from, without it: --run ID.")
        found.append(RunData.of(run, rows, store.samples(run.id)))
    return found


def choose_runs(
    store: Store, *, ids: Sequence[int] = (), group: str | None = None, endpoint: str | None = None
) -> list[Run]:
    """The runs to learn from: those named, those of a group, all of one endpoint, or what all of these have in common.

    By default the endpoint is that of the latest run: the same engine serving the same model, whatever its port.
    NotEnoughDataError when there are none.
    """
    runs = [run for run in store.runs(group=group, ids=list(ids) or None) if run.ended]
    missing = sorted(set(ids) - {run.id for run in runs})
    if missing:
        raise InputError(f"no ended run has id {missing[0]}. See: steelyard runs")
    if not runs:
        where = f" in group {group!r}" if group else ""
        raise NotEnoughDataError(
            f"the database holds no ended run{where}. Measure one first: "
            "steelyard replay TRACE --endpoint URL --fleet 4:4, or see steelyard demo."
        )
    if endpoint:
        chosen = [run for run in runs if run.endpoint == endpoint or run.model == endpoint]
        if not chosen:
            known = ", ".join(sorted({run.model or run.endpoint for run in runs}))
            raise InputError(f"no run was made against {redact(endpoint)!r}. Known: {known}.")
        return chosen
    if ids or group:
        return runs
    return [run for run in runs if (run.engine, run.model) == (runs[-1].engine, runs[-1].model)]


def _asked(
    store: Store, trace: str | None, latest: Run, requests: int | None, held: RunData | None = None
) -> tuple[Schedule, list[int]]:
    """(the trace named, else the latest run's, else what the latest run's rows asked; requests of each window it is made of, if
    of any).

    The first ``requests`` of it, if that many are wanted. A long one is represented by windows, one after the other.
    held: the latest run as it was read before.
    """
    known = {t.name: int(t.summary.get("rows_kept", 0)) for t in store.traces()}
    if trace is None and latest.trace not in known:
        windows = store.windows(latest.id, POINT_REQUESTS, TRACE_WINDOWS) if latest.scheduled > LONG_TRACE else []
        if len(windows) > 1 and not requests:
            parts = [rows.asked(latest.trace) for rows in windows]
            return joined(parts, latest.trace, latest.scheduled, latest.rate_per_s), [len(one) for one in parts]
        if held is not None and not held.windows:
            return held.observations.asked(latest.trace), []
        rows = next(iter(store.windows(latest.id, LONG_TRACE, 2)), Observations.empty())
        return rows.asked(latest.trace), []
    name = trace or latest.trace
    if known.get(name, 0) > LONG_TRACE and not requests:
        return store.excerpt(name, POINT_REQUESTS, TRACE_WINDOWS)
    return store.schedule(name, most=requests if known.get(name, 0) > LONG_TRACE else None), []


def _only_means(store: Store, means: Sequence[Run]) -> str:
    """Why means of closed loops give no answer about a rate, what they can be asked, and what to measure."""
    held = store.aggregates([run.id for run in means])
    most = max((one.concurrency for one in held.values()), default=1.0)
    return (
        f"{len(means)} runs are means of closed loops, at most {most:g} requests in flight: they do not tell how requests queue "
        f"that come at a rate. Ask what they know with --concurrency {most:g}, or measure next: steelyard replay TRACE "
        f"--endpoint URL --fleet {means[-1].fleet}"
    )


APART = 0.25
"""A mean TPOT that differs by this share from what the laws say is named."""


def beside_means(store: Store, means: Sequence[Run], laws: Profile) -> list[str]:
    """Means of closed loops stay out of the laws; but the decode step they saw, at the batch of Little's law, is compared."""
    if not means:
        return []
    held = store.aggregates([run.id for run in means])
    off = []
    for run in means:
        one = held.get(run.id)
        if one is None or run.fleet is None:
            continue
        in_decode = one.concurrency * (one.output_tokens - 1) * one.tpot_s / one.e2e_s / run.fleet.decode
        batch = max(1.0, min(in_decode, laws.max_batch))
        told = laws.step_s(batch, batch * (one.prompt_tokens + one.output_tokens / 2))
        if abs(math.log(told / one.tpot_s)) > math.log(1 + APART):
            off.append(
                f"run {run.id} ({run.fleet}, {one.concurrency:g} in flight): {one.tpot_s * 1e3:.3g} against {told * 1e3:.3g} ms"
            )
    said = f"{len(means)} means of closed loops are not in the laws: ask them with --concurrency"
    if off:
        said += f". Of {len(off)} the TPOT differs from what the laws say at that batch: {'; '.join(off[:3])}"
    return [said]


def advise(
    store: Store,
    *,
    gpus: int | None = None,
    slo: str | None = None,
    trace: str | None = None,
    rate_per_s: float | None = None,
    requests: int | None = None,
    run_ids: Sequence[int] = (),
    group: str | None = None,
    endpoint: str | None = None,
    gpus_per_worker: tuple[int, int] | None = None,
    attainment: float = 0.9,
    current: Fleet | None = None,
    seed: int = 0,
    schedule: Schedule | None = None,
    note: Note = silent,
    strategy: str | None = None,
    deadline_s: float | None = None,
    gpu_hour_usd: float | None = None,
    target_rate_per_s: float | None = None,
    audit: bool = False,
    warnings: Sequence[str] = (),
) -> Answer:
    """Recommend a split from stored runs and store the answer.

    Defaults: the GPUs of the latest run's fleet, its SLO, its trace at the recorded rate. strategy: one of
    :data:`advisor.choose.STRATEGIES`, whether it should ever move; None does not ask. deadline_s: how long after its arrival
    an answer may come, if requests can wait. gpu_hour_usd, target_rate_per_s: see :mod:`advisor.cost`.
    audit: leave runs out and say how far off the advisor is (:mod:`advisor.audit`); what spoils the data is said in any case.
    warnings: what else is missing, to be kept with the answer.
    """
    chosen = choose_runs(store, ids=run_ids, group=group, endpoint=endpoint)
    means = [run for run in chosen if run.policy == CLOSED_LOOP]
    runs = [run for run in chosen if run.policy != CLOSED_LOOP]
    if not runs:
        raise NotEnoughDataError(_only_means(store, means))
    latest = runs[-1]
    data = load(store, runs)
    fit = [one.run for one in data if not one.unfit]
    per_worker = gpus_per_worker or (fit or [latest])[-1].gpus_per_worker
    stored = stored_as(data, per_worker)
    if gpus is None:
        if latest.fleet is None:
            raise InputError(
                "the fleet of the latest run is not known, so neither is its number of GPUs: give --gpus N."
            )
        # Of the size that is asked where no run says one, as its workers are taken to be.
        said = any(run.gpus_per_worker != (1, 1) for run in (*fit, latest))
        gpus = latest.fleet.gpus(latest.gpus_per_worker if said else per_worker)
    if gpus < 2:
        raise InputError(f"--gpus must be at least 2, one for each role (got {gpus}).")
    wanted = Slo.parse(slo or latest.slo or DEFAULT_SLO)
    parts: list[int] = []
    if schedule is None:
        schedule, parts = _asked(store, trace, latest, requests, data[-1])
        if requests:
            schedule = head(schedule, requests)
        if rate_per_s:
            schedule = to_rate(schedule, rate_per_s)
    if len(parts) > 1 and (strategy in ("online", "offline") or deadline_s is not None):
        raise InputError(f"{known_by_windows(schedule.name, len(parts))}.")
    answer = recommend(
        data,
        schedule,
        gpus=gpus,
        slo=wanted,
        gpus_per_worker=per_worker,
        attainment=attainment,
        current=current,
        seed=seed,
        note=note,
        parts=parts,
    )
    alike = [one for one in data if not unlike(one.run, stored)]
    flip = flip_law(
        [(one, changes) for one in alike if (changes := store.fleet_changes(one.run.id))], answer.fit.profile
    )
    if flip is not None:
        profile = replace(answer.fit.profile, flip_s=flip.coefficients["flip_s"])
        answer = replace(answer, fit=replace(answer.fit, profile=profile, laws=[*answer.fit.laws, flip]))
    elif strategy in ("auto", "online"):
        answer.warnings.append(
            "no stored run changed roles, so a change is taken to cost its drain and no more: measure one with "
            "steelyard replay --control --change"
        )
    if not (slo or latest.slo):
        answer.warnings.append(f"SLO {DEFAULT_SLO!r} is a default: give your own with --slo")
    answer.warnings.extend(warnings)
    answer.warnings.extend(beside_means(store, means, answer.fit.profile))
    used = [one for one in data if one.run.id in set(answer.runs)]
    tpot = [one.get("tpot_p50_s", 0.0) for one in answer.fit.residuals]
    residuals = dict(zip(answer.runs, tpot, strict=True))
    answer.warnings.extend(confounders(used, residuals))
    extra: dict[str, Any] = {
        "asked": {
            "strategy": strategy or "static",
            "deadline_s": deadline_s,
            "gpu_hour_usd": gpu_hour_usd,
            "target_rate_per_s": target_rate_per_s,
        }
    }
    if audit:
        checked = audit_of(used, wanted, note, residuals)
        extra["audit"] = checked.as_json()
        answer.warnings.extend(f"this advisor fails on your runs: {line}" for line in checked.failed)
    choice = None
    if strategy is not None:
        workers = answer.best.fleet.workers
        splits = tuple(c.fleet for c in answer.candidates if c.fleet.workers == workers)
        choice = choose(
            answer.schedule,
            Question(answer.fit.profile, wanted, splits),
            answer.best.fleet,
            gpus_per_worker=per_worker,
            asked=strategy,
            deadline_s=deadline_s,
            seed=seed,
            note=note,
            parts=max(1, len(parts)),
        )
    if gpu_hour_usd is not None:
        extra["cost"] = costs.as_json(costs.cost(answer, gpu_hour_usd, per_worker))
    if target_rate_per_s is not None:
        try:
            needed = costs.needed(
                answer,
                target_rate_per_s,
                attainment=attainment,
                gpus_per_worker=per_worker,
                gpu_hour_usd=gpu_hour_usd,
            )
        except NoFleetError as error:  # of that rate; what was asked about the other one is known
            answer.warnings.append(str(error))
        else:
            extra["needed"] = costs.as_json(needed)
    number = None
    try:
        number = store.add_recommendation(
            "static",  # the kind of answer: a split (the study of strategies is another kind); its strategy is in it
            _merged(answer, choice, extra) | {"version": __version__},
            answer.runs,
            answer.data_hash,
            seed,
        )
    except StoreError as error:  # what took minutes, or measurements, is said all the same
        answer.warnings.append(f"this answer is not stored: {error}")
    return Answer(number, answer, used, choice, extra)
