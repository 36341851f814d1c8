"""From the rows of a few runs to the laws of a cluster: regressions on physical features, calibrated by simulation.

What is regressed are mechanisms, never the optimum: the time of a decode step, of a prefill step, the latency that
occupies nobody. The result is a :class:`loadgen.cluster.Profile`, the same form that the reference endpoint serves, so
a fitted cluster can be simulated at any split and served back.

Features are scaled, coefficients non-negative, errors relative, rows that disagree are weighted down (Huber). The
regressions' coefficients are then the narrow part of a prior, and what no regression can identify (which part of a
TTFT line occupies a worker, how many prompts share a step, where a batch or the KV cache ends) its broad part; see
:mod:`advisor.calibrate`. Readings of the servers, where there are any, make the broad part narrow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy import stats

from advisor.calibrate import Calibration, Known, Replay, Space, calibrate, sent
from advisor.features import (
    Rows,
    RunData,
    admission_cap,
    decode_rows,
    kv_capacity,
    load_quantiles,
    preempted,
    prefill_reading_rows,
    quiet_rows,
    reading_max,
    served,
)
from advisor.parallel import shared
from loadgen.cluster import Profile, simulate
from traces.errors import NotEnoughDataError
from traces.measures import Slo, summarise
from traces.records import Fleet, Floats, Ints, Observations, Schedule

NO_CAP = 1_000_000
"""max_batch where no limit was seen."""

ROWS = 20_000
"""Rows of one run that a regression uses at most, evenly taken: its coefficients are known well enough from these."""

CALIBRATED_RUNS = 10
"""Fewer runs than this cannot show whether a 90 % interval covers 90 %."""

BENDS = (0.7, 1.0, 1.5, 2.5, 4.0)
"""Where the cost of context is tried to end its growth: shares of the most context that was seen."""

KNOTS = 8
"""Places over the batches that were seen, by equal factors, at which a knee is tried beside their quantiles."""

PLACED = 8_000
"""Rows that tell where a knee or a bend is; what it costs all rows tell."""

LOADED = 0.7
"""A role was loaded in a run that kept it busier than this: below it, requests hardly meet each other."""

KNOWN = 1.5
"""Decode is known up to this multiple of the output tokens a second that one of its workers was seen to give, and a length up to
this multiple of those that were measured. A slope cannot be told from runs that never asked as much of the stage, however well it
fits them."""

LONG, LONG_ROWS = 0.99, 100
"""Quantile of the lengths of a run, and of what is asked, that are held against each other; answers of a run that tell it."""

PREFILL_HIDDEN = ("a", "b", "tokens", "requests")
DECODE_HIDDEN = ("batch", "kv")
"""Parameters that only a run which loads the role can show."""

METRICS = (
    "goodput_per_s",
    "throughput_per_s",
    "ttft_p50_s",
    "ttft_p90_s",
    "ttft_p99_s",
    "tpot_p50_s",
    "tpot_p90_s",
    "tpot_p99_s",
    "e2e_p50_s",
    "e2e_p90_s",
    "e2e_p99_s",
)
"""Run-level figures that are predicted, and held against every run. Names of traces.measures.Summary."""

FLOORS = {
    "goodput_per_s": 0.02,
    "throughput_per_s": 0.02,
    "ttft_p50_s": 0.05,
    "ttft_p90_s": 0.08,
    "ttft_p99_s": 0.12,
    "tpot_p50_s": 0.02,
    "tpot_p90_s": 0.03,
    "tpot_p99_s": 0.05,
    "e2e_p50_s": 0.02,
    "e2e_p90_s": 0.03,
    "e2e_p99_s": 0.05,
}
"""A half-width of a 90 % interval, as a log ratio, that no figure goes below: the details of a queue are chaotic."""

LEAST = {
    "goodput_per_s": 0.004,
    "throughput_per_s": 0.003,
    "ttft_p50_s": 0.015,
    "ttft_p90_s": 0.02,
    "ttft_p99_s": 0.035,
    "tpot_p50_s": 0.006,
    "tpot_p90_s": 0.008,
    "tpot_p99_s": 0.015,
    "e2e_p50_s": 0.006,
    "e2e_p90_s": 0.008,
    "e2e_p99_s": 0.012,
}
"""The same where there are CALIBRATED_RUNS, which say themselves how far off the laws are: what the stamps' noise makes."""

SCORE_DRAWS = 12
"""Draws of the laws that every run is scored by."""

FEW = 20
"""Fewer draws than this do not show their 5 and 95 % quantiles."""


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

    batch: 95th percentile of sequences per decode worker in the run that had most. tokens_per_s: output tokens a second that a
    decode worker gave over the run in which it gave most. prompt_tokens, context_tokens: that 1 % of the answers
    exceed, of the prompt and of prompt and answer together, in the run of the longest (that has LONG_ROWS), or in all together.
    """

    quiet_rows: int
    prefill: float
    batch: float
    tokens_per_s: float
    prompt_tokens: float
    context_tokens: float

    def decode_loaded(self, tokens_per_s: float) -> bool:
        """Did a run ask of a decode worker what is asked of it now, or nearly?"""
        return tokens_per_s <= KNOWN * self.tokens_per_s


@dataclass(frozen=True, slots=True)
class Load:
    """What a fleet would carry: prefill utilisation (may exceed 1) and mean sequences per decode worker."""

    prefill: float
    batch: float


@dataclass(frozen=True, eq=False)
class Fit:
    """Fitted laws with what they rest on.

    residuals: per run, log(predicted / measured) of each run-level metric. spread: their root mean square by metric.
    scores: per metric, (highest utilisation of a stage, |log ratio|, half-width of the draws) of every run, when there are
    CALIBRATED_RUNS; empty below.
    """

    profile: Profile
    laws: list[Law]
    seen: Seen
    residuals: list[dict[str, float]]
    spread: dict[str, float]
    warnings: list[str]
    data: Sequence[RunData] = field(repr=False)
    calibration: Calibration = field(repr=False)
    scores: dict[str, list[tuple[float, float, float]]] = field(default_factory=dict, repr=False)

    def draws(self, rng: np.random.Generator, n: int, tokens_per_s: float = 0.0) -> list[Profile]:
        """n draws of laws that the runs allow: as wide as the prior in what only a loaded stage shows, if none was.

        tokens_per_s: output tokens a second that the question asks of a decode worker. Beyond what the runs have shown a step
        may lengthen faster than within it: a knee there.
        """
        hidden: tuple[str, ...] = () if self.seen.prefill >= LOADED else PREFILL_HIDDEN
        if self.seen.decode_loaded(tokens_per_s):
            return self.calibration.draws(rng, n, hidden)
        laws = self.calibration.draws(rng, n, hidden + DECODE_HIDDEN)
        space = self.calibration.space
        return [_bent(one, space.seen_batch, space.seen_kv, math.exp(rng.standard_normal())) for one in laws]

    def outside(self, load: Load) -> str:
        """Why a fleet's load lies outside what the runs have shown; "" if it does not."""
        if load.batch > 1.3 * self.seen.batch:
            return (
                f"extrapolated: {load.batch:.1f} sequences per decode worker, "
                f"the runs showed at most {self.seen.batch:.1f}"
            )
        if load.prefill > LOADED > self.seen.prefill:
            return f"extrapolated: prefill {load.prefill:.0%} busy, the runs showed at most {self.seen.prefill:.0%}"
        return ""

    def lengths(self, schedule: Schedule) -> list[tuple[str, float, float]]:
        """(what, tokens in the schedule, tokens at most in the runs): 99 % quantiles."""
        prompts, context = schedule.prompt_tokens, schedule.prompt_tokens + schedule.output_tokens
        return [
            ("prompts", float(np.quantile(prompts, LONG)), self.seen.prompt_tokens),
            ("prompts with their answers", float(np.quantile(context, LONG)), self.seen.context_tokens),
        ]

    def longer(self, schedule: Schedule) -> str:
        """Which lengths of a schedule lie beyond what the runs have shown, by more than KNOWN; "" if none do."""
        for what, asked, most in self.lengths(schedule):
            if asked > KNOWN * most:
                return f"extrapolated: {what} of {asked:,.0f} tokens, the runs had at most {most:,.0f} (99 % quantiles)"
        return ""


def _bent(laws: Profile, batch: float, context: float, times: float) -> Profile:
    """The laws with a knee at a batch that held so much context: beyond it a sequence more costs that many times more."""
    if laws.knee_batch:
        return laws
    slope = (laws.step_s(2 * batch, 2 * context) - laws.step_s(batch, context)) / batch
    return replace(laws, knee_batch=max(1, round(batch)), knee_s=times * float(slope))


def fit_laws(data: Sequence[RunData], *, seed: int = 0, residuals: bool = True, slo: Slo | None = None) -> Fit:
    """Fit all stages. NotEnoughDataError when a stage has no rows at all.

    residuals False: only the laws and what was seen, for who leaves runs out one after the other. slo: what goodput the laws are
    held to; None: each run's own.
    """
    decode, knee, bend, decode_law = _decode_step(data)
    quiet = Rows.concat([quiet_rows(one) for one in data])
    if len(quiet) < 8:
        raise NotEnoughDataError(
            f"only {len(quiet)} requests were answered without meeting another prefill: a run at low load is missing."
        )
    line, line_error = relative_nnls(quiet.x, quiet.y, np.ones(len(quiet)))
    space, source = _space(data, decode, knee, bend, line)
    found = calibrate(data, space, seed=seed)
    profile = _tidy(found.best.profile, space)
    seen = _seen(data, profile)
    warnings: list[str] = []
    found_residuals: list[dict[str, float]] = []
    held: list[dict[str, float]] = []  # of a long run one for each window
    misses = shared(lambda one: _misses(one, profile, slo), data) if residuals else []
    for one, ratios in zip(data, misses, strict=False):
        held += ratios
        told = [name for name in METRICS if any(name in r for r in ratios)]
        found_residuals.append({n: float(np.median([r[n] for r in ratios if n in r])) for n in told})
        worst = max(found_residuals[-1].items(), key=lambda item: abs(item[1]), default=("", 0.0))
        if abs(worst[1]) > math.log(1.25):
            warnings.append(
                f"the laws miss run {one.run.id} ({one.run.fleet}): {worst[0]} predicted "
                f"{math.exp(worst[1]):.2f} times what was measured"
            )
    spread = {}
    for name in METRICS:
        values = [r[name] for r in held if name in r]
        spread[name] = float(np.sqrt(np.mean(np.square(values)))) if values else 0.0
    laws = [
        replace(decode_law, coefficients={"c0_s": profile.c0_s, "c1_s": profile.c1_s, "c2_s": profile.c2_s}),
        Law(
            "prefill step",
            {"a_s": profile.a_s, "b_s_per_token": profile.b_s_per_token, "c_s_per_token2": profile.c_s_per_token2},
            len(quiet),
            found.misfit,
            source,
        ),
        Law(
            "prefill batch",
            {
                "max_batch_tokens": float(profile.max_batch_tokens),
                "max_batch_requests": float(profile.max_batch_requests),
            },
            sum(int(r.rows.sum()) for r in found.replays),
            found.misfit,
            "simulation against TTFT quantiles",
        ),
        Law(
            "decode batch",
            {"max_batch": float(profile.max_batch), "kv_tokens": float(profile.kv_tokens)},
            sum(int(r.rows.sum()) for r in found.replays),
            found.misfit,
            "readings, or simulation against TTFT quantiles (1000000 and 0: no limit seen)",
        ),
        Law(
            "latency that occupies nobody",
            {"overhead_s": profile.overhead_s, "transfer_s_per_token": profile.transfer_s_per_token},
            len(quiet),
            line_error,
            "requests that met no queue, less what the simulation explains",
        ),
    ]
    if knee:
        laws[0].coefficients.update(knee_batch=float(profile.knee_batch), knee_s=profile.knee_s)
    if profile.bend_tokens:
        laws[0].coefficients.update(bend_tokens=float(profile.bend_tokens))
    fit = Fit(profile, laws, seen, found_residuals, spread, warnings, data, found)
    return replace(fit, scores=_scores(fit, seed, slo)) if residuals and len(data) >= CALIBRATED_RUNS else fit


CHECKED = 4
"""Windows of a long run that its laws are held against."""


def _misses(one: RunData, profile: Profile, slo: Slo | None = None) -> list[dict[str, float]]:
    """log(predicted / measured) of each metric; of a long run in some of its windows, away from their edges."""
    slo = slo or _slo(one)
    fleet = Fleet(one.prefill, one.decode)
    if not one.windows:
        predicted = simulate(asked(one.observations), fleet, profile).observations
        return [
            log_ratios(
                summarise(one.run.counted(predicted), slo),
                summarise(one.run.counted(_from_sent(one.observations)), slo),
            )
        ]
    found = []
    for rows in one.windows[:: math.ceil(len(one.windows) / CHECKED)]:
        rows = served(rows)
        # The simulation begins empty: that the beginning of a window is left out serves it as well.
        inner = one.known(rows.sent_s, rows.last_token_s) & (rows.due_s >= one.run.warmup_s)
        if inner.sum() < LEAST_CHECKED:
            continue
        predicted = simulate(sent(rows), fleet, profile).observations.take(inner)
        found.append(log_ratios(summarise(predicted, slo), summarise(_from_sent(rows.take(inner)), slo)))
    return found


LEAST_CHECKED = 200


def _slo(one: RunData) -> Slo:
    return Slo.parse(one.run.slo) if one.run.slo else Slo()


def log_ratios(ours: object, theirs: object) -> dict[str, float]:
    """log(ours / theirs) of every metric that both have."""
    return {
        name: math.log(getattr(ours, name) / getattr(theirs, name))
        for name in METRICS
        if getattr(ours, name) > 0 and getattr(theirs, name) > 0
    }


def asked(observations: Observations) -> Schedule:
    """What the servers had work with, due when it was sent, with the lengths they saw."""
    return sent(served(observations))


def predicted_load(fit: Fit, schedule: Schedule, fleet: Fleet) -> Load:
    """Utilisation of prefill, and mean decode batch by Little's law, from the laws alone (no queueing)."""
    return load_of(fit.profile, schedule, fleet)


def load_of(profile: Profile, schedule: Schedule, fleet: Fleet) -> Load:
    """The same for given laws."""
    rate = schedule.rate_per_s if math.isfinite(schedule.rate_per_s) else float("inf")
    n, m = schedule.prompt_tokens.astype(float), schedule.output_tokens.astype(float)
    mean = float(n.mean())
    service = float(profile.prompt_s(n, profile.together(mean), mean).mean())
    context = float((m * (n + m / 2)).sum() / m.sum())
    most = float(profile.max_batch)
    if profile.kv_tokens:
        most = min(most, max(1.0, profile.kv_tokens / context))
    batch = 1.0
    for _ in range(200):
        step = profile.step_s(batch, batch * context)
        ahead = min(most, max(1e-9, rate * m.mean() * step / fleet.decode))
        if abs(ahead - batch) < 1e-6 * batch:
            break
        batch = ahead
    return Load(prefill=rate * service / fleet.prefill, batch=batch)


# --- the regressions, and the prior they make -----------------------------------------------------------------------


def _space(data: Sequence[RunData], decode: Floats, knee: int, bend: int, line: Floats) -> tuple[Space, str]:
    """The prior: narrow where a regression or a reading speaks, broad where only simulation can."""
    first = float(decode[0] + decode[1])
    prompts = np.concatenate([served(one.observations).prompt_lengths for one in data]).astype(float)
    if not prompts.any():
        raise NotEnoughDataError(
            "the server counted 0 tokens in every prompt, so what a prompt costs cannot be told. Measure through an endpoint "
            "whose usage counts them."
        )
    per_token = float((prompts * prompts).sum() / prompts.sum())
    slope = max(float(line[1]), 1e-8)
    # A curvature that was not seen may still be there: up to about a tenth of the slope at the mean of n^2 over n.
    floor = 0.02 * slope / per_token
    intercept = max(float(line[0]) - first, 0.1 * float(line[0]), 1e-4)
    prior = {
        "line0": Known(math.log(intercept), 0.3),
        "line1": Known(math.log(slope), 0.15),
        "line2": Known(math.log(max(float(line[2]), floor)), 0.5 if line[2] > floor else 1.0),
        "a": Known(0.0, 2.0),
        "b": Known(2.5, 1.0),
        "tokens": Known(math.log(4096), 1.5),
        "requests": Known(math.log(16), 1.0),
        "batch": Known(1.0, 1.5),
        "kv": Known(1.5, 1.5),
        "c0": Known(math.log(max(float(decode[0]), 1e-5)), 0.05),
        "c1": Known(math.log(max(float(decode[1]), 1e-3 * first)), 0.3),
        "c2": Known(math.log(max(float(decode[2]), 1e-3 * first / max(per_token, 1.0))), 0.5),
    }
    source = "client rows at low load, occupying share by simulation"
    readings = Rows.concat([prefill_reading_rows(one) for one in data])
    if len(readings) >= 6:
        busy, _ = relative_nnls(readings.x, readings.y, np.ones(len(readings)))
        # Squared lengths are the tokens times a constant there, so how the two share is arbitrary: only their sum speaks.
        busy_per_token = float(busy[1] + busy[2] * per_token)
        a, b = min(float(busy[0]) / intercept, 0.98), min(busy_per_token / (slope + float(line[2]) * per_token), 0.99)
        if busy[0] > 0.98 * intercept:
            prior["line0"] = Known(math.log(float(busy[0]) / 0.95), 0.2)
            a = 0.95
        prior["a"] = Known(_logit(max(a, 0.02)), 0.5)
        prior["b"] = Known(_logit(max(b, 0.02)), 0.5)
        source = "server readings of busy seconds and steps"
    batches, contexts = zip(*(load_quantiles(one, 0.98) for one in data), strict=True)
    seen_batch, seen_kv = max(1.0, *batches), max(1.0, *contexts)
    cap = max(admission_cap(one) for one in data)
    if cap and cap >= max(reading_max(one, "decode", "running_requests") for one in data):
        # Either limit may be the one that sequences stood before.
        seen_batch = 0.98 * cap
        prior["batch"] = Known(math.log(0.05), 1.5)
    kv = max(kv_capacity(one) for one in data)
    if kv:
        seen_kv = min(seen_kv, 0.9 * kv)
        prior["kv"] = Known(math.log(kv / seen_kv - 1), 0.05)
    if knee:
        prior["knee"] = Known(math.log(float(decode[3])), 0.3)
    if bend:
        prior["bend"] = Known(math.log(bend), 0.4)
    policy = "preempt" if any(preempted(one) for one in data) else "reserve"
    base = Profile(name="fitted", knee_batch=knee, kv_policy=policy)
    return Space(base, prior, seen_batch, seen_kv), source


def _logit(p: float) -> float:
    return math.log(p / (1 - p))


def _tidy(profile: Profile, space: Space) -> Profile:
    """A limit far beyond anything seen was not seen: leave it out of the law."""
    if profile.max_batch > 3 * space.seen_batch:
        profile = replace(profile, max_batch=NO_CAP)
    if profile.kv_tokens > 3 * space.seen_kv:
        profile = replace(profile, kv_tokens=0)
    if profile.bend_tokens > 30 * space.seen_kv:
        profile = replace(profile, bend_tokens=0)
    return profile


def _decode_step(data: Sequence[RunData]) -> tuple[Floats, int, int, Law]:
    """([c0, c1, c2, knee_s], knee_batch or 0, bend_tokens or 0, the law): TPOT against what its worker carried meanwhile.

    A knee is one more feature, max(0, batch - knot), at the knot that fits best; it stays if it explains a tenth of the
    error and more rows than a handful lie beyond it. A bend is the context's feature bent, at the place that fits best; it
    stays if it explains a tenth of the error that is left without a knee.
    """
    rows = Rows.concat([_thinned(decode_rows(one)) for one in data])
    if len(rows) < 8:
        raise NotEnoughDataError(
            f"only {len(rows)} answers of four tokens or more: the decode step cannot be fitted without longer answers."
        )
    batch, context = rows.x[:, 1], rows.x[:, 2]
    shares = [int(np.quantile(batch, share)) for share in (0.3, 0.5, 0.7, 0.85)]
    # A quiet and a saturated run leave a wide gap between two shares, and the knee may lie in it.
    between = np.geomspace(max(2, shares[0]), max(2, shares[-1]), KNOTS)
    knots = [
        at
        for at in sorted({*shares, *(round(at) for at in between)})
        if at >= 2 and (batch > at).sum() >= 30 and batch.max() >= 1.3 * at
    ]
    most = float(np.quantile(context, 0.98))
    ends = [max(1, round(most * share)) for share in BENDS]

    def fitted(place: tuple[str, int], every: int = max(1, len(rows) // PLACED)) -> tuple[Floats, float]:
        kind, at = place
        x = rows.x[::every]
        if kind == "knee":
            x = np.column_stack([x, np.maximum(x[:, 1] - at, 0.0)])
        elif kind == "bend":
            lone = Profile(name="context", c2_s=1.0, bend_tokens=at)
            x = np.column_stack([x[:, :2], lone.step_s(x[:, 1], x[:, 2])])
        return relative_nnls(x, rows.y[::every], np.ones(len(x)))

    tried = [("", 0), *(("knee", at) for at in knots), *(("bend", at) for at in ends)]
    (coefficients, found), *bent = shared(fitted, tried)
    best, knot, place = np.append(coefficients, 0.0), 0, 0
    for at, (fit, left) in zip(knots, bent, strict=False):
        if left < 0.9 * found and fit[3] > 0.1 * fit[1]:
            best, knot, found = fit, at, left
    plain = found
    for at, (fit, left) in zip(ends, bent[len(knots) :], strict=True):
        if left < 0.9 * plain and left < found and fit[2] > 0:
            best, knot, place, found = np.append(fit, 0.0), 0, at, left
    if len(rows) >= 2 * PLACED:
        coefficients, found = fitted(("knee", knot) if knot else ("bend", place) if place else ("", 0), 1)
        best = coefficients if knot else np.append(coefficients, 0.0)
    law = Law("decode step", {}, len(rows), found, "TPOT against batch and context per worker")
    return best, knot, place, law


def _thinned(rows: Rows) -> Rows:
    if len(rows) <= ROWS:
        return rows
    keep = np.linspace(0, len(rows) - 1, ROWS).astype(np.int64)
    return Rows(rows.x[keep], rows.y[keep])


def relative_nnls(x: Floats, y: Floats, weight: Floats) -> tuple[Floats, float]:
    """Non-negative least squares on relative error, Huber-weighted. x: [n, k], y: [n] > 0, weight: [n] >= 0.

    Returns ([k] coefficients >= 0, weighted median absolute relative error). Every row is divided by its y, so that a
    1 s step and a 10 ms step count alike; five rounds of reweighting keep a few foreign rows from mattering.
    """
    from sklearn import config_context  # what it brings along takes a third of a second to import
    from sklearn.linear_model import LinearRegression

    use = weight > 0
    x, y, weight = x[use], y[use], weight[use]
    scaled = x / y[:, None]
    size = np.sqrt((scaled * scaled).mean(axis=0))
    size[size == 0] = 1.0
    robust = np.ones(len(y))
    coefficients = np.zeros(x.shape[1])
    for _ in range(5):
        # Rows only count through the triangle of their QR: the same minimum from k + 1 rows as from thousands.
        root = np.sqrt(weight * robust)
        triangle = np.asarray(np.linalg.qr(np.column_stack([scaled / size * root[:, None], root]), mode="r"))
        model = LinearRegression(positive=True, fit_intercept=False)
        with config_context(assume_finite=True, skip_parameter_validation=True):  # most of the time of hundreds of fits
            model.fit(triangle[:, :-1], triangle[:, -1])
        coefficients = np.asarray(model.coef_, dtype=float) / size
        residual = np.abs(1 - scaled @ coefficients)
        scale = max(1.4826 * float(np.median(residual)), 1e-6)
        robust = np.minimum(1.0, 1.345 * scale / np.maximum(residual, 1e-12))
    return coefficients, float(np.median(np.abs(1 - scaled @ coefficients)))


def _scores(fit: Fit, seed: int, asked_slo: Slo | None) -> dict[str, list[tuple[float, float, float]]]:
    """Every run as the laws have it: how far off, and the half-width that draws of the laws have there.

    Runs that were left out instead (by refits, or by a Gauss-Newton step back) were tried: what they miss is what the one
    run had told, which the draws' width holds already, and counted twice it made bands five times as wide.
    """
    scores: dict[str, list[tuple[float, float, float]]] = {name: [] for name in METRICS}
    draws = fit.draws(np.random.default_rng(seed), SCORE_DRAWS)
    for i, one in enumerate(fit.data):
        replay: Replay = fit.calibration.replays[i]
        slo = asked_slo or _slo(one)
        result = replay.simulated(fit.profile)
        seen = _from_sent(replay.seen)
        told = (seen.due_s >= one.run.warmup_s) & one.known(seen.sent_s, seen.last_token_s)
        ours, theirs = (summarise(rows.take(told), slo) for rows in (result.observations, seen))
        drawn = [summarise(replay.simulated(p).observations.take(told), slo) for p in draws]
        busiest = max(result.utilisation["prefill"], result.utilisation["decode"])
        for name, ratio in log_ratios(ours, theirs).items():
            down, up = reach(getattr(ours, name), [getattr(d, name) for d in drawn])
            off = fit.calibration.optimism * abs(ratio)
            scores[name].append((busiest, off, max(down if ratio > 0 else up, LEAST[name])))
    return scores


def reach(point: float, drawn: Sequence[float]) -> tuple[float, float]:
    """How far below and above a point, as log ratios, 90 % of the draws reach; (0, 0) where there are too few.

    Of few draws the 5 and 95 % quantiles are nearly their extremes, which hold less: their spread by Student's t counts too.
    """
    held = np.array([v for v in drawn if v > 0 and math.isfinite(v)])
    if len(held) < 3:
        return 0.0, 0.0
    off = np.log(held / point)
    wide = float(stats.t.ppf(0.95, len(off) - 1)) * math.sqrt(1 + 1 / len(off)) * float(off.std(ddof=1))
    low, high = np.quantile(off, [0.05, 0.95])
    if len(off) < FEW:
        low, high = min(low, off.mean() - wide), max(high, off.mean() + wide)
    return max(0.0, -float(low)), max(0.0, float(high))


def _seen(data: Sequence[RunData], profile: Profile) -> Seen:
    """How far the runs went, measured on the rows. What the fit makes of them does not count: a limit may explain anything."""
    quiet, prefill, batch, tokens = 0, 0.0, 0.0, 0.0
    for one in data:
        quiet += len(quiet_rows(one))
        # The few rows that a warm-up leaves of a window tell no rate.
        least = LEAST_CHECKED if one.windows else 2
        for rows in (k for piece in one.pieces if len(k := one.run.counted(piece)) >= max(1, min(len(piece), least))):
            if not len(schedule := asked(rows)):
                continue  # all were turned away
            load = load_of(profile, schedule, Fleet(one.prefill, one.decode))
            prefill = max(prefill, load.prefill)
            given = summarise(_from_sent(rows), Slo()).output_tokens_per_s / one.decode
            tokens = max(tokens, given if math.isfinite(given) else 0.0)
        batch = max(batch, load_quantiles(one, 0.95)[0])
    answered = [one.counted.take(one.counted.ok) for one in data]
    return Seen(
        quiet,
        prefill,
        batch,
        tokens,
        prompt_tokens=_longest([a.prompt_lengths for a in answered]),
        context_tokens=_longest([a.prompt_lengths + a.tokens for a in answered]),
    )


def _longest(lengths: Sequence[Ints]) -> float:
    """The LONG quantile in the run where it is largest, or over all: a run of long ones tells of them beside many of others."""
    together = np.concatenate(lengths)
    each = [together, *(n for n in lengths if len(n) >= LONG_ROWS)]
    return max(float(np.quantile(n, LONG)) for n in each) if len(together) else math.inf


def _from_sent(observations: Observations) -> Observations:
    """The same rows judged from the moment they were sent: what the server, and so its laws, can be held to."""
    return replace(
        observations, due_s=np.where(np.isfinite(observations.sent_s), observations.sent_s, observations.due_s)
    )
