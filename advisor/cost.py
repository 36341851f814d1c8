"""What a fleet costs a million tokens, and how many GPUs a rate needs, both from the fitted laws."""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass
from typing import Any

from advisor.recommend import Interval, Recommendation
from advisor.screen import Traffic, strain
from advisor.splits import excerpt
from advisor.study import splits_of
from loadgen import policy
from loadgen.cluster import simulate
from traces.errors import NoFleetError
from traces.measures import meets, met, summarise
from traces.records import Fleet, Schedule
from traces.shape import to_rate

MOST_GPUS = 4096


@dataclass(frozen=True)
class Cost:
    """US dollars a million tokens at the rate asked about; 90 % intervals of the rate served. gpus: of the recommended fleet.

    usd_per_m_output_tokens, usd_per_m_tokens: of all answers (output; prompt and output). usd_per_m_good_output_tokens: of
    answers within the SLO alone, as if the others were worth nothing.
    """

    gpus: int
    gpu_hour_usd: float
    usd_per_m_output_tokens: Interval
    usd_per_m_tokens: Interval
    usd_per_m_good_output_tokens: Interval


@dataclass(frozen=True)
class Needed:
    """The smallest fleet that keeps the SLO at a rate. high: with the goodput at the low end of its interval; None where that
    is 0."""

    target_rate_per_s: float
    gpus: int
    high: int | None
    prefill: int
    decode: int
    usd_per_hour: float | None


def cost(answer: Recommendation, gpu_hour_usd: float, gpus_per_worker: tuple[int, int] = (1, 1)) -> Cost:
    """Of the recommended split. Which answers are within the SLO, and so how long these are, is simulated."""
    gpus = answer.best.fleet.gpus(gpus_per_worker)
    prompt, output = float(answer.schedule.prompt_tokens.mean()), float(answer.schedule.output_tokens.mean())
    rows = simulate(excerpt(answer.schedule)[0], answer.best.fleet, answer.fit.profile).observations
    within = rows.tokens[met(rows, answer.slo)]

    def usd(served: Interval, tokens: float) -> Interval:
        def at(rate: float) -> float:
            return gpus * gpu_hour_usd / 3600 / (rate * tokens) * 1e6 if rate > 0 else math.inf

        return Interval(at(served.value), at(served.high), at(served.low))

    all_, good = answer.best.figures["throughput_per_s"], answer.best.figures["goodput_per_s"]
    return Cost(
        gpus,
        gpu_hour_usd,
        usd(all_, output),
        usd(all_, prompt + output),
        usd(good, float(within.mean()) if len(within) else output),
    )


def needed(
    answer: Recommendation,
    rate_per_s: float,
    *,
    attainment: float,
    gpus_per_worker: tuple[int, int] = (1, 1),
    gpu_hour_usd: float | None = None,
) -> Needed:
    """The fewest GPUs whose best split keeps the SLO at a rate, by doubling and halving; NoFleetError where none does."""
    whole = to_rate(answer.schedule, rate_per_s)
    schedule, traffic, limits = excerpt(whole)[0], Traffic(whole), answer.slo.as_limits

    def split(gpus: int) -> Fleet | None:  # not every number of GPUs makes a fleet
        near = _near(whole, gpus, answer, gpus_per_worker)
        # At a high rate the requests come within a moment, and what they show is how a burst fares, not what lasts.
        lasting = (f for f in near if strain(traffic, f, answer.fit.profile, limits) <= 1)
        return next((f for f in lasting if _keeps(schedule, f, answer, attainment)), None)

    high = max(2, answer.best.fleet.gpus(gpus_per_worker))
    while split(high) is None:
        if high >= MOST_GPUS:
            raise NoFleetError(
                f"no fleet of up to {MOST_GPUS} GPUs keeps {answer.slo} at {rate_per_s:g} req/s: they are too few, or a lone "
                "request is too slow for it. Ask for a lower rate, or loosen --slo or --attainment."
            )
        high = min(2 * high, MOST_GPUS)
    low = 1  # does not do
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if split(middle) is not None else (middle, high)
    fleet = split(high)
    assert fleet is not None  # noqa: S101 - high always does
    figure = answer.best.figures["goodput_per_s"]
    widened = None
    if figure.low > 0:
        least = math.ceil(high * figure.value / figure.low)
        widened = next(g for g in itertools.count(least) if Fleet.splits(g, gpus_per_worker))
    return Needed(
        rate_per_s,
        high,
        widened,
        fleet.prefill,
        fleet.decode,
        high * gpu_hour_usd if gpu_hour_usd is not None else None,
    )


def _near(schedule: Schedule, gpus: int, answer: Recommendation, per_worker: tuple[int, int]) -> list[Fleet]:
    """Splits of so many GPUs, nearest to the recommended ratio and to the balance of work first."""
    splits = splits_of(gpus, per_worker)
    if not splits:
        return []
    best = answer.best.fleet
    even = policy.balanced(schedule.prompt_tokens, schedule.output_tokens, answer.fit.profile, max(2, best.workers))
    shares = [f.prefill / f.workers for f in (best, even)]
    return sorted(splits, key=lambda f: min(abs(f.prefill / f.workers - s) for s in shares))[:12]


def _keeps(schedule: Schedule, fleet: Fleet, answer: Recommendation, attainment: float) -> bool:
    rows = simulate(schedule, fleet, answer.fit.profile).observations
    return meets(summarise(rows, answer.slo), rows, answer.slo, attainment)


def as_json(found: Cost | Needed | None) -> dict[str, Any] | None:
    """For ``advise --json``."""
    return asdict(found) if found is not None else None
