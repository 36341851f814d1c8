"""From the rows of a few runs to the laws of a cluster: regressions on physical features, calibrated by simulation.

What is regressed are mechanisms, never the optimum: the time of a decode step, of a prefill step, the latency that
occupies nobody. The result is a :class:`loadgen.cluster.Profile`, the same form that the reference endpoint serves, so
a fitted cluster can be simulated at any split and served back.

Features are scaled, coefficients non-negative, errors relative, rows that disagree are weighted down (Huber). What a
regression cannot identify is *calibrated by simulation*: at low load a TTFT line does not say which part of its
intercept and slope occupies a worker, nor how many prompts share a step. Where the server counts its prefill steps
and busy seconds those tell it; in any case the batch limits, and without readings the occupying shares too, are set
to the values whose simulated TTFT quantiles match each run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy.optimize import minimize
from sklearn.linear_model import LinearRegression

from advisor.features import (
    BLOCKS,
    Rows,
    RunData,
    admission_cap,
    decode_load,
    decode_rows,
    prefill_reading_rows,
    quiet_rows,
    reading_max,
    time_block,
)
from loadgen.cluster import Profile, simulate
from traces.errors import NotEnoughDataError
from traces.measures import Slo, summarise
from traces.records import Fleet, Floats, Ints, Observations, Schedule

BUDGETS = (1, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
"""Token budgets of a prefill step that are tried; 1 means that a step takes one prompt."""

FIT_QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
"""TTFT quantiles that a calibrated law must reproduce, equally weighted."""

NO_CAP = 1_000_000
"""max_batch where no limit was seen."""

FIT_REQUESTS = 1500
"""Requests of a run that a calibration simulates at most: its quantiles are known well enough from these."""


METRICS = (
    "goodput_per_s",
    "throughput_per_s",
    "ttft_p50_s",
    "ttft_p99_s",
    "tpot_p50_s",
    "tpot_p99_s",
    "e2e_p50_s",
    "e2e_p99_s",
)
"""Run-level figures that are predicted, and held against every run. Names of traces.measures.Summary."""


@dataclass(frozen=True, slots=True)
class Law:
    """One fitted stage. coefficients: name -> value in SI units. n: rows. error: median absolute relative error.

    source: where its rows came from, in words.
    """

    stage: str
    coefficients: dict[str, float]
    n: int
    error: float
    source: str


@dataclass(frozen=True, slots=True)
class Seen:
    """How far the runs went. quiet_rows: requests that met no queue. prefill: highest utilisation of the prefill role.

    batch: 95th percentile of sequences per decode worker in the run that had most. decode_loaded: a step was seen to
    slow down under its batch, or sequences waited to be admitted.
    """

    quiet_rows: int
    prefill: float
    batch: float
    decode_loaded: bool


@dataclass(frozen=True, slots=True)
class Load:
    """What a fleet would carry: prefill utilisation (may exceed 1) and mean sequences per decode worker."""

    prefill: float
    batch: float


@dataclass(frozen=True, eq=False)
class Fit:
    """Fitted laws with what they rest on.

    residuals: per run, log(predicted / measured) of each run-level metric. spread: their root mean square by metric.
    """

    profile: Profile
    laws: list[Law]
    seen: Seen
    residuals: list[dict[str, float]]
    spread: dict[str, float]
    warnings: list[str]
    data: Sequence[RunData] = field(repr=False)

    def redraw(self, rng: np.random.Generator) -> Profile:
        """One bootstrap draw: time blocks resampled within every run, so that every regime stays in; laws refitted."""
        counts = np.stack([np.bincount(rng.integers(0, BLOCKS, BLOCKS), minlength=BLOCKS) for _ in self.data])
        return _fit_profile(self.data, counts, start=self.profile)[0]

    def outside(self, load: Load) -> str:
        """Why a fleet's load lies outside what the runs have shown; "" if it does not."""
        if load.batch > 1.3 * self.seen.batch:
            return (
                f"extrapolated: {load.batch:.1f} sequences per decode worker, "
                f"the runs showed at most {self.seen.batch:.1f}"
            )
        if load.prefill > 0.7 and self.seen.prefill < 0.7:
            return f"extrapolated: prefill {load.prefill:.0%} busy, the runs showed at most {self.seen.prefill:.0%}"
        return ""


def fit_laws(data: Sequence[RunData]) -> Fit:
    """Fit all stages. NotEnoughDataError when a stage has no rows at all."""
    counts = np.ones((len(data), BLOCKS), dtype=np.int64)
    profile, laws = _fit_profile(data, counts)
    seen = _seen(data, profile)
    warnings = []
    residuals = []
    for one in data:
        predicted = simulate(asked(one.observations), Fleet(one.prefill, one.decode), profile).observations
        slo = Slo.parse(one.run.slo) if one.run.slo else Slo()
        theirs, ours = summarise(_from_sent(one.observations), slo), summarise(predicted, slo)
        residuals.append(
            {
                name: math.log(getattr(ours, name) / getattr(theirs, name))
                for name in METRICS
                if getattr(ours, name) > 0 and getattr(theirs, name) > 0
            }
        )
        worst = max(residuals[-1].items(), key=lambda item: abs(item[1]), default=("", 0.0))
        if abs(worst[1]) > math.log(1.25):
            warnings.append(
                f"the laws miss run {one.run.id} ({one.run.fleet}): {worst[0]} predicted "
                f"{math.exp(worst[1]):.2f} times what was measured"
            )
    spread = {}
    for name in METRICS:
        values = [r[name] for r in residuals if name in r]
        spread[name] = float(np.sqrt(np.mean(np.square(values)))) if values else 0.0
    return Fit(profile, laws, seen, residuals, spread, warnings, data)


def asked(observations: Observations) -> Schedule:
    """What reached the server: every request that was sent, due when it was sent, with the lengths the server saw."""
    rows = observations.take(np.flatnonzero(np.isfinite(observations.sent_s)))
    order = np.argsort(rows.sent_s, kind="stable")
    rows = rows.take(order)
    return Schedule(
        "sent",
        rows.index,
        np.maximum(rows.sent_s, 0.0),
        np.maximum(rows.prompt_lengths, 1),
        np.maximum(rows.tokens, 1),
    )


def predicted_load(fit: Fit, schedule: Schedule, fleet: Fleet) -> Load:
    """Utilisation of prefill, and mean decode batch by Little's law, from the laws alone (no queueing)."""
    profile = fit.profile
    rate = schedule.rate_per_s if math.isfinite(schedule.rate_per_s) else float("inf")
    n, m = schedule.prompt_tokens.astype(float), schedule.output_tokens.astype(float)
    together = float(np.clip(profile.max_batch_tokens / n.mean(), 1, profile.max_batch_requests))
    service = profile.a_s / together + profile.b_s_per_token * n.mean() + profile.c_s_per_token2 * (n * n).mean()
    context = float((m * (n + m / 2)).sum() / m.sum())
    most = float(profile.max_batch)
    batch = 1.0
    for _ in range(200):
        step = profile.c0_s + profile.c1_s * batch + profile.c2_s * batch * context
        ahead = min(most, max(1e-9, rate * m.mean() * step / fleet.decode))
        if abs(ahead - batch) < 1e-6 * batch:
            break
        batch = ahead
    return Load(prefill=rate * service / fleet.prefill, batch=batch)


# --- one fit, of all rows or of a bootstrap draw -------------------------------------------------------------------


def _fit_profile(data: Sequence[RunData], counts: Ints, start: Profile | None = None) -> tuple[Profile, list[Law]]:
    """Fit every stage with each run's time blocks weighted by ``counts`` [runs, BLOCKS].

    start: laws of the full fit, near which a draw's calibration searches.
    """
    profile, decode_law = _fit_decode(start or Profile(name="fitted"), data, counts)
    quiet = Rows.concat([quiet_rows(one, i) for i, one in enumerate(data)])
    weight = counts[quiet.run, quiet.block].astype(float)
    if (weight > 0).sum() < 8:
        raise NotEnoughDataError(
            f"only {int((weight > 0).sum())} requests were answered without meeting another prefill: a run at low load is "
            "missing."
        )
    line, _ = relative_nnls(quiet.x, quiet.y, weight)
    readings = Rows.concat([prefill_reading_rows(one, i) for i, one in enumerate(data)])
    reading_weight = counts[readings.run, readings.block].astype(float)
    replays = [_Replay.of(one, counts[i]) for i, one in enumerate(data)]
    if start is not None:
        profile = replace(profile, max_batch=start.max_batch)
    capped = profile.max_batch < NO_CAP
    if (reading_weight > 0).sum() >= 6:
        busy, busy_error = relative_nnls(readings.x, readings.y, reading_weight)
        profile = replace(profile, a_s=busy[0], b_s_per_token=busy[1], c_s_per_token2=busy[2])
        if start is None:
            profile = replace(profile, overhead_s=0.0, transfer_t0_s=0.0, transfer_s_per_token=0.0)
            capped = capped and _cap_explains(profile, replays)
        profile = replace(profile, max_batch=profile.max_batch if capped else NO_CAP)
        profile = _calibrate_batch(profile, replays, wide=start is None)
        profile = _calibrate_latency(profile, replays)
        if start is None:
            # The latency that occupies nobody moves the quantiles that chose the batch limit: once more, from there.
            profile = _calibrate_batch(profile, replays, wide=True)
            profile = _calibrate_latency(profile, replays)
        source, n, error = "server readings of busy seconds and steps", len(readings), busy_error
    else:
        profile = _calibrate_shares(profile, line, replays, start)
        if start is None and not capped:
            plain = profile
            profile = _calibrate_cap(profile, data, replays)
            if profile.max_batch != plain.max_batch:
                profile = _calibrate_shares(profile, line, replays, start)
        profile = _calibrate_latency(profile, replays)
        source, n, error = (
            "client rows at low load, occupying share by simulation",
            len(quiet),
            _misfit(profile, replays),
        )
    laws = [
        decode_law,
        Law(
            "prefill step",
            {"a_s": profile.a_s, "b_s_per_token": profile.b_s_per_token, "c_s_per_token2": profile.c_s_per_token2},
            n,
            error,
            source,
        ),
        Law(
            "prefill batch",
            {
                "max_batch_tokens": float(profile.max_batch_tokens),
                "max_batch_requests": float(profile.max_batch_requests),
            },
            sum(len(r.observed) for r in replays),
            _misfit(profile, replays),
            "simulation against TTFT quantiles",
        ),
        Law(
            "decode batch",
            {"max_batch": float(profile.max_batch)},
            sum(len(r.observed) for r in replays),
            _misfit(profile, replays),
            "readings while sequences waited"
            if capped
            else "simulation against TTFT quantiles (1000000: no limit seen)",
        ),
        Law(
            "latency that occupies nobody",
            {"overhead_s": profile.overhead_s, "transfer_s_per_token": profile.transfer_s_per_token},
            len(quiet),
            _misfit(profile, replays[:1]),
            "requests that met no queue",
        ),
    ]
    return profile, laws


def relative_nnls(x: Floats, y: Floats, weight: Floats) -> tuple[Floats, float]:
    """Non-negative least squares on relative error, Huber-weighted. x: [n, k], y: [n] > 0, weight: [n] >= 0.

    Returns ([k] coefficients >= 0, weighted median absolute relative error). Every row is divided by its y, so that a
    1 s step and a 10 ms step count alike; five rounds of reweighting keep a few foreign rows from mattering.
    """
    use = weight > 0
    x, y, weight = x[use], y[use], weight[use]
    scaled = x / y[:, None]
    size = np.sqrt((scaled * scaled).mean(axis=0))
    size[size == 0] = 1.0
    robust = np.ones(len(y))
    coefficients = np.zeros(x.shape[1])
    for _ in range(5):
        model = LinearRegression(positive=True, fit_intercept=False)
        model.fit(scaled / size, np.ones(len(y)), sample_weight=weight * robust)
        coefficients = np.asarray(model.coef_, dtype=float) / size
        residual = np.abs(1 - scaled @ coefficients)
        scale = max(1.4826 * float(np.median(residual)), 1e-6)
        robust = np.minimum(1.0, 1.345 * scale / np.maximum(residual, 1e-12))
    return coefficients, float(np.median(np.abs(1 - scaled @ coefficients)))


def _fit_decode(profile: Profile, data: Sequence[RunData], counts: Ints) -> tuple[Profile, Law]:
    """Decode step c0 + c1 B + c2 context from TPOT and the load meanwhile; caps from readings, where there are any."""
    rows = Rows.concat([decode_rows(one, i) for i, one in enumerate(data)])
    weight = counts[rows.run, rows.block].astype(float)
    if (weight > 0).sum() < 8:
        raise NotEnoughDataError(
            f"only {int((weight > 0).sum())} answers of four tokens or more: the decode step cannot be fitted "
            "without longer answers."
        )
    coefficients, error = relative_nnls(rows.x, rows.y, weight)
    c0, c1, c2 = (float(c) for c in coefficients)
    batch = max(admission_cap(one) for one in data)
    if batch < max((reading_max(one, "decode", "running_requests") for one in data), default=0.0):
        batch = 0  # more than that were seen on a worker: it was no limit
    law = Law(
        "decode step",
        {"c0_s": c0, "c1_s": c1, "c2_s": c2},
        len(rows),
        error,
        "TPOT against batch and context per worker",
    )
    return replace(profile, c0_s=c0, c1_s=c1, c2_s=c2, max_batch=batch or NO_CAP), law


@dataclass(frozen=True, eq=False)
class _Replay:
    """A run to be simulated: what was asked, of which fleet, the TTFT it gave, and how often each row counts."""

    schedule: Schedule
    fleet: Fleet
    observed: Floats
    prompts: Floats
    quiet: np.ndarray[tuple[int], np.dtype[np.bool_]]
    repeats: Ints

    @classmethod
    def of(cls, one: RunData, counts: Ints) -> _Replay:
        rows = one.observations.take(np.flatnonzero(np.isfinite(one.observations.sent_s)))
        rows = rows.take(np.argsort(rows.sent_s, kind="stable")[:FIT_REQUESTS])
        repeats = np.where(rows.ok, counts[time_block(one.observations, rows.due_s)], 0)
        sent, first = np.sort(rows.sent_s), np.sort(rows.first_token_s[rows.ok])
        overlap = np.searchsorted(sent, rows.first_token_s) - np.searchsorted(first, rows.sent_s, side="right") - 1
        return cls(
            asked(rows),
            Fleet(one.prefill, one.decode),
            rows.ttft_sent_s,
            rows.prompt_lengths.astype(float),
            rows.ok & (overlap < one.prefill),
            repeats,
        )

    def simulated(self, profile: Profile) -> Floats:
        """Simulated TTFT of each request, in the order of ``observed``."""
        return simulate(self.schedule, self.fleet, profile).observations.ttft_s


def _misfit(profile: Profile, replays: Sequence[_Replay]) -> float:
    """Mean |log ratio| of simulated to observed TTFT quantiles, over runs."""
    errors = []
    for one in replays:
        if one.repeats.sum() < 8:
            continue
        ours = np.quantile(np.repeat(one.simulated(profile), one.repeats), FIT_QUANTILES)
        theirs = np.quantile(np.repeat(one.observed, one.repeats), FIT_QUANTILES)
        errors.append(np.abs(np.log(np.maximum(ours, 1e-6) / np.maximum(theirs, 1e-6))).mean())
    return float(np.mean(errors)) if errors else 0.0


def _calibrate_batch(profile: Profile, replays: Sequence[_Replay], *, wide: bool) -> Profile:
    """The step's token budget whose simulated TTFT quantiles are nearest to the runs'.

    A draw (not ``wide``) looks at the neighbours of where it starts only.
    """
    now = profile.max_batch_tokens
    near = sorted(range(len(BUDGETS)), key=lambda i: abs(math.log(BUDGETS[i] / max(now, 1))))
    budgets = BUDGETS if wide else tuple(BUDGETS[i] for i in near[:3])
    tried = [(_misfit(replace(profile, max_batch_tokens=b), replays), b) for b in budgets]
    return replace(profile, max_batch_tokens=min(tried)[1])


def _cap_explains(profile: Profile, replays: Sequence[_Replay]) -> bool:
    """Is TTFT nearer to what was observed with the limit that readings suggest than without one?"""
    free = _calibrate_latency(replace(profile, max_batch=NO_CAP), replays)
    return _misfit(replace(free, max_batch=profile.max_batch), replays) < _misfit(free, replays)


def _calibrate_cap(profile: Profile, data: Sequence[RunData], replays: Sequence[_Replay]) -> Profile:
    """Without readings: does a decode worker admit at most as many sequences as the runs ever showed on one?

    A plateau alone could be the load's; it is a limit if TTFT, which then holds the wait for admission, says so.
    """
    most = max(_batch_quantile(one, 0.95) for one in data)
    caps = sorted({max(1, round(most) + d) for d in (-1, 0, 1)})
    tried = [(_misfit(replace(profile, max_batch=cap), replays), cap) for cap in (NO_CAP, *caps)]
    best = min(tried)
    # A limit is one more parameter: it must explain clearly more than none does.
    return replace(profile, max_batch=best[1] if best[0] < 0.9 * tried[0][0] else NO_CAP)


def _calibrate_latency(profile: Profile, replays: Sequence[_Replay]) -> Profile:
    """Overhead and transfer per token: what quiet requests took beyond the simulation, as a line in prompt length.

    The simulation runs the same requests at the same instants, so the difference is taken request by request.
    """
    for _ in range(2):
        rest, prompts, weight = [], [], []
        for one in replays:
            use = one.quiet & (one.repeats > 0)
            rest.append((one.observed - one.simulated(profile))[use])
            prompts.append(one.prompts[use])
            weight.append(one.repeats[use])
        y, n, w = np.concatenate(rest), np.concatenate(prompts), np.concatenate(weight).astype(float)
        if len(y) < 8:
            return profile
        y = y + profile.overhead_s + profile.transfer_s_per_token * n
        keep = np.abs(y - np.median(y)) <= 5 * max(1.4826 * float(np.median(np.abs(y - np.median(y)))), 1e-4)
        x = np.column_stack([np.ones(len(n)), n / 1000.0])
        model = LinearRegression(positive=True, fit_intercept=False).fit(x[keep], y[keep], sample_weight=w[keep])
        profile = replace(
            profile, overhead_s=float(model.coef_[0]), transfer_s_per_token=float(model.coef_[1]) / 1000.0
        )
    return profile


def _calibrate_shares(profile: Profile, line: Floats, replays: Sequence[_Replay], start: Profile | None) -> Profile:
    """Without server readings: the shares of the TTFT line that occupy a worker, and the step's token budget.

    line: TTFT = line[0] + line[1] n + line[2] n^2 at low load. The three unknowns are searched (Nelder-Mead) for the
    least misfit of TTFT quantiles over all runs; only runs that saturate prefill can tell them apart.
    """
    first_step = profile.c0_s + profile.c1_s

    def at(z: Floats) -> Profile:
        a, b = 1 / (1 + math.exp(-z[0])), 1 / (1 + math.exp(-z[1]))
        intercept = max(float(line[0]) - first_step, 1e-6)
        return replace(
            profile,
            a_s=a * intercept,
            overhead_s=(1 - a) * intercept,
            b_s_per_token=b * float(line[1]),
            transfer_s_per_token=(1 - b) * float(line[1]),
            c_s_per_token2=float(line[2]),
            max_batch_tokens=int(np.clip(math.exp(z[2]), 1, 1e6)),
        )

    best: tuple[float, Floats] = (math.inf, np.zeros(3))
    budgets = (1.0, 4096.0, 16384.0) if start is None else (float(start.max_batch_tokens),)
    for budget in budgets:
        options: Any = {"maxfev": 60 if start is None else 25, "xatol": 0.05, "fatol": 1e-3}
        begin = np.array([0.0, 2.0, math.log(budget)])
        found = minimize(lambda z: _misfit(at(z), replays), begin, method="Nelder-Mead", options=options)
        if float(found.fun) < best[0]:
            best = float(found.fun), np.asarray(found.x, dtype=float)
    return at(best[1])


def _seen(data: Sequence[RunData], profile: Profile) -> Seen:
    """How far the runs went, measured on the rows (and readings, where there are any)."""
    quiet, prefill, batch, loaded = 0, 0.0, 0.0, profile.max_batch < NO_CAP
    floor = profile.c0_s + profile.c1_s
    for i, one in enumerate(data):
        quiet += len(quiet_rows(one, i))
        rows = asked(one.observations)
        n = rows.prompt_tokens.astype(float)
        together = float(np.clip(profile.max_batch_tokens / n.mean(), 1, profile.max_batch_requests))
        work = profile.a_s / together * len(n) + (profile.b_s_per_token * n + profile.c_s_per_token2 * n * n).sum()
        prefill = max(prefill, float(work) / max(rows.span_s, 1e-9) / one.prefill)
        batch = max(batch, _batch_quantile(one, 0.95))
        tpot = one.observations.tpot_s[one.observations.ok]
        tpot = tpot[np.isfinite(tpot)]
        slowed = len(tpot) > 0 and float(np.quantile(tpot, 0.9)) > 1.25 * floor
        loaded = loaded or slowed
    return Seen(quiet_rows=quiet, prefill=prefill, batch=batch, decode_loaded=loaded)


def _batch_quantile(one: RunData, q: float) -> float:
    """Sequences per decode worker that were exceeded for 1 - q of the time."""
    load = decode_load(one.observations, one.decode)
    gaps = np.diff(load.at_s)
    if not gaps.sum() > 0:
        return 0.0
    order = np.argsort(load.batch)
    share = np.cumsum(gaps[order]) / gaps.sum()
    return float(load.batch[order][min(int(np.searchsorted(share, q)), len(order) - 1)])


def _from_sent(observations: Observations) -> Observations:
    """The same rows judged from the moment they were sent: what the server, and so its laws, can be held to."""
    return replace(
        observations, due_s=np.where(np.isfinite(observations.sent_s), observations.sent_s, observations.due_s)
    )
