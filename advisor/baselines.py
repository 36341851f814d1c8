"""Rules that people use for P:D, each as it is written: what the advice is held against.

All but the last know the fitted laws, the mean lengths and the SLO; none of them knows a queue's tail.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from advisor.features import BLOCKS, RunData, time_block
from loadgen.cluster import Profile
from traces.measures import Slo, met
from traces.records import Fleet, Schedule


@dataclass(frozen=True, slots=True)
class Baseline:
    """A rule's split. regret: share of the best split's goodput that it loses, by the fitted laws; NaN until simulated."""

    name: str
    fleet: Fleet
    regret: float = math.nan


def baselines(
    data: Sequence[RunData], schedule: Schedule, fleets: Sequence[Fleet], laws: Profile, slo: Slo
) -> list[Baseline]:
    """What every rule would run."""
    n, m = schedule.prompt_tokens.astype(float), schedule.output_tokens.astype(float)
    mean_n, mean_m = float(n.mean()), float(m.mean())
    context = mean_n + mean_m / 2
    batch, step = _decode_at(laws, context, slo.limit("tpot"))
    per_decode = batch / (mean_m * step)  # requests a second and worker
    alone = laws.prompt_s(mean_n)
    full = laws.prompt_s(mean_n, laws.together(mean_n), mean_n)
    matched = max(fleets, key=lambda f: min(f.prefill / alone * 0.90, f.decode * per_decode * 0.92) / f.workers)
    h = float((n / (n + m)).mean())
    return [
        Baseline("1:1", _nearest(fleets, 0.5)),
        Baseline("1:3", _nearest(fleets, 0.25)),
        Baseline("work balance", _nearest(fleets, full / (full + 1 / per_decode))),
        Baseline("rate match", matched),
        Baseline("M/M/1 rule", _nearest(fleets, _mm1(laws, mean_n, mean_m, full, batch / step, slo.limit("ttft")))),
        Baseline("report's formula", _nearest(fleets, 2 * h / (1 + h))),
        Baseline("gradient boosting", _boosted(data, schedule, fleets, slo)),
    ]


def _nearest(fleets: Sequence[Fleet], share: float) -> Fleet:
    """The split whose share of prefill workers is nearest."""
    return min(fleets, key=lambda f: abs(f.prefill / f.workers - share))


def _decode_at(laws: Profile, context: float, limit_s: float | None) -> tuple[float, float]:
    """(largest batch whose step keeps the TPOT limit, that step): what a rule takes for a decode worker's capacity."""
    most = min(float(laws.max_batch), laws.kv_tokens / context if laws.kv_tokens else math.inf, 512.0)
    sizes = np.arange(1, max(2, int(most) + 1), dtype=float)
    steps = laws.step_s(sizes, sizes * context)
    at = max(0, int((steps <= limit_s).sum()) - 1) if limit_s is not None else len(sizes) - 1
    return float(sizes[at]), float(steps[at])


def _mm1(laws: Profile, n: float, m: float, full_s: float, decode_tokens: float, ttft_s: float | None) -> float:
    """arXiv 2603.04716: mu_p = mu_max - n / (TTFT - transfer); P / D = n mu_d / (m mu_p). Share of P."""
    transfer = laws.overhead_s + laws.transfer_t0_s + laws.transfer_s_per_token * n
    most = n / full_s
    left = (ttft_s or math.inf) - transfer
    effective = most - n / left if left > 0 and math.isfinite(left) else most
    ratio = n * decode_tokens / (m * max(effective, 0.05 * most))
    return ratio / (1 + ratio)


def _boosted(data: Sequence[RunData], schedule: Schedule, fleets: Sequence[Fleet], slo: Slo) -> Fleet:
    """Gradient boosting of goodput on (P, D, rate), trained on the time blocks of the runs; no mechanism."""
    from sklearn.ensemble import GradientBoostingRegressor  # what it brings along takes a third of a second to import

    x, y = [], []
    for run, rows in [(one, rows) for one in data for piece in one.pieces if len(rows := one.run.counted(piece))]:
        good = met(rows, slo)
        block = time_block(rows, rows.due_s)
        width = max(float(np.ptp(rows.due_s)), 1e-9) / BLOCKS
        for k in range(BLOCKS):
            mine = block == k
            x.append([run.prefill, run.decode, float(mine.sum()) / width])
            y.append(float(good[mine].sum()) / width)
    model = GradientBoostingRegressor(random_state=0, n_estimators=60).fit(np.array(x), np.array(y))
    rate = len(schedule) / max(schedule.span_s, 1e-9)
    found = model.predict(np.array([[f.prefill, f.decode, rate] for f in fleets], dtype=float))
    return fleets[int(np.argmax(found))]
