"""What a trace looks like as a distribution: lengths and arrivals fitted, each with its goodness, and traces made alike."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

from traces.errors import InputError
from traces.records import Floats, Ints, Schedule
from traces.shape import LogNormal, synthesize

LENGTHS = ("empirical", "mixture", "lognormal")
GOOD_KS = 0.05
"""A fitted law is recommended instead of the recorded lengths when its KS distance is below this and its mean within 5 %."""


@dataclass(frozen=True, slots=True)
class Part:
    """One log-normal of a mixture: its share, and mu and sigma of the logarithm."""

    weight: float
    mu: float
    sigma: float


@dataclass(frozen=True, slots=True)
class Law:
    """A fitted law of lengths. ks: Kolmogorov-Smirnov distance to the data; mean_tokens: what the law implies, clipped to
    the data's range, beside the data's own ``real_mean_tokens``."""

    kind: str
    parts: tuple[Part, ...]
    low: int
    high: int
    ks: float
    mean_tokens: float
    real_mean_tokens: float

    def draw(self, n: int, rng: np.random.Generator) -> Ints:
        """n lengths."""
        which = rng.choice(len(self.parts), size=n, p=np.array([p.weight for p in self.parts]))
        mu = np.array([p.mu for p in self.parts])[which]
        sigma = np.array([p.sigma for p in self.parts])[which]
        drawn = np.rint(np.exp(np.minimum(rng.normal(mu, sigma), 40.0)))
        return np.clip(drawn, self.low, self.high).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Arrivals:
    """The arrival process. cv: coefficient of variation of gaps (1 for Poisson); dispersion: variance over mean of counts
    in windows of 1, 10 and 60 s (1 for Poisson, NaN where the trace is too short); rate_per_s by tenth of the span."""

    rate_per_s: float
    cv: float
    dispersion: dict[str, float]
    rate_by_tenth: tuple[float, ...]
    process: str


@dataclass(frozen=True)
class Fit:
    """prompt and output: {"lognormal": Law, "mixture": Law}. correlation: Spearman's, of prompt and output lengths.

    use: what synth --like takes by default, and why.
    """

    n: int
    prompt: dict[str, Law]
    output: dict[str, Law]
    correlation: float
    arrivals: Arrivals
    use: str
    why: str

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def fit(schedule: Schedule) -> Fit:
    """Fit lengths and arrivals. InputError for fewer than 20 requests."""
    n = _enough(schedule)
    prompt, output = _laws(schedule.prompt_tokens), _laws(schedule.output_tokens)
    varied = len(np.unique(schedule.prompt_tokens)) > 1 and len(np.unique(schedule.output_tokens)) > 1
    rho = float(stats.spearmanr(schedule.prompt_tokens, schedule.output_tokens).statistic) if varied else 0.0
    worst = max((prompt["mixture"], output["mixture"]), key=lambda law: law.ks)
    off = max(abs(law["mixture"].mean_tokens / law["mixture"].real_mean_tokens - 1) for law in (prompt, output))
    if worst.ks < GOOD_KS and off < 0.05 and abs(rho) < 0.1:
        use, why = "mixture", f"KS at most {worst.ks:.3f}, means within {off:.1%}, lengths independent ({rho:+.2f})"
    else:
        use = "empirical"
        why = f"no law is close enough (KS {worst.ks:.3f}, means off by {off:.1%}, correlation {rho:+.2f}): draw recorded pairs"
    return Fit(n, prompt, output, rho, _arrivals(schedule), use, why)


def _enough(schedule: Schedule) -> int:
    n = len(schedule)
    if n < 20:
        raise InputError(f"{schedule.name!r} has {n} requests; a fit needs at least 20.")
    return n


def alike(
    schedule: Schedule,
    n: int,
    *,
    name: str,
    lengths: str = "empirical",
    rate_per_s: float | None = None,
    arrivals: str | None = None,
    seed: int = 0,
) -> Schedule:
    """n requests like a trace's. empirical: recorded (prompt, output) pairs drawn with replacement; mixture, lognormal: the
    fitted laws, independent. rate and arrival process are the fitted ones unless given; a burst at a rate is Poisson."""
    _enough(schedule)
    found = _arrivals(schedule)
    rate = rate_per_s or found.rate_per_s
    process = arrivals or ("poisson" if found.process == "burst" and rate_per_s else found.process)
    if process != "burst" and not math.isfinite(rate):
        raise InputError(f"{schedule.name!r} has no rate: its requests are due at one instant. Give --rate.")
    plain = LogNormal(0.0, 0.0)
    made = synthesize(n, plain, plain, rate_per_s=rate, arrivals=process, cv=max(found.cv, 0.01), seed=seed, name=name)
    rng = np.random.default_rng([seed, 7])
    if lengths == "empirical":
        which = rng.integers(len(schedule), size=n)
        return replace(made, prompt_tokens=schedule.prompt_tokens[which], output_tokens=schedule.output_tokens[which])
    if lengths not in LENGTHS:
        raise InputError(f"--lengths must be one of {', '.join(LENGTHS)} (got {lengths!r}).")
    prompt, output = _laws(schedule.prompt_tokens)[lengths], _laws(schedule.output_tokens)[lengths]
    return replace(made, prompt_tokens=prompt.draw(n, rng), output_tokens=output.draw(n, rng))


def _laws(tokens: Ints) -> dict[str, Law]:
    logs = np.log(tokens.astype(float))
    one = (Part(1.0, float(logs.mean()), float(logs.std())),)
    return {"lognormal": _law("lognormal", one, tokens), "mixture": _law("mixture", _mixture(logs) or one, tokens)}


def _mixture(logs: Floats) -> tuple[Part, ...]:
    """Two or three log-normals by expectation maximisation, as many as BIC wants; () where the data do not vary."""
    from sklearn.mixture import GaussianMixture

    if len(np.unique(logs)) < 10:
        return ()
    sample = logs if len(logs) <= 20_000 else np.random.default_rng(0).choice(logs, 20_000, replace=False)
    column = sample.reshape(-1, 1)
    models = [GaussianMixture(k, random_state=0, n_init=2, reg_covar=1e-4).fit(column) for k in (2, 3)]
    best = min(models, key=lambda m: m.bic(column))
    return tuple(
        Part(float(w), float(m), float(math.sqrt(v)))
        for w, m, v in sorted(
            zip(best.weights_, best.means_[:, 0], best.covariances_[:, 0, 0], strict=True), key=lambda p: p[1]
        )
    )


def _law(kind: str, parts: tuple[Part, ...], tokens: Ints) -> Law:
    low, high = int(tokens.min()), int(tokens.max())
    values, counts = np.unique(tokens, return_counts=True)
    data = np.cumsum(counts) / len(tokens)

    def below(x: Floats) -> Floats:
        total = np.zeros(len(x))
        for p in parts:
            if p.sigma > 0:
                total += p.weight * stats.norm.cdf((np.log(x) - p.mu) / p.sigma)
            else:
                total += p.weight * (np.log(x) >= p.mu - 1e-12)
        return total

    law = below(values.astype(np.float64) + 0.5)
    law[-1] = 1.0  # what lies beyond is clipped to the longest
    ks = float(np.max(np.abs(law - data)))
    drawn = Law(kind, parts, low, high, ks, 0.0, 0.0).draw(200_000, np.random.default_rng(1))
    return Law(kind, parts, low, high, ks, float(drawn.mean()), float(tokens.mean()))


def _arrivals(schedule: Schedule) -> Arrivals:
    due, span = schedule.due_s, schedule.span_s
    gaps = np.diff(due)
    cv = float(gaps.std() / gaps.mean()) if len(gaps) and gaps.mean() > 0 else math.nan
    dispersion = {}
    for width in (1, 10, 60):
        bins = int(span // width)
        counts = np.histogram(due - due[0], bins=bins, range=(0, bins * width))[0] if bins >= 5 else np.empty(0)
        mean = float(counts.mean()) if len(counts) else 0.0
        dispersion[f"{width}s"] = float(counts.var(ddof=1) / mean) if mean > 0 else math.nan
    tenths: tuple[float, ...] = ()
    if span > 0:
        counts = np.histogram(due - due[0], bins=10, range=(0, span))[0]
        tenths = tuple((counts / (span / 10)).tolist())
    if not span > 0:
        process = "burst"
    elif cv < 0.05:
        process = "constant"
    else:
        process = "poisson" if abs(cv - 1) < 0.15 else "gamma"
    return Arrivals(schedule.rate_per_s, cv, dispersion, tenths, process)
