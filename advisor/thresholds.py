"""Online thresholds: searched on an earlier part of the traffic with moves paid for, scored on a later one.

Rules are replayed through the fitted simulator: a move drains, then flips. They are chosen over several draws of the
earlier part (arrival times redrawn, lengths from near neighbours), never by their best draw alone. What a rule is worth
is what it does on the later part, beside never moving, the report's rule, Dynamo's easy mode and an oracle.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from advisor.parallel import each
from advisor.telling import Note, silent
from advisor.windows import LASTS, BreakEven, Oracle, Question, Study, best_fixed, break_even, oracle, study
from loadgen import policy
from loadgen.cluster import simulate
from traces.measures import goodput_per_s
from traces.records import Fleet, Floats, Sample, Schedule

SEEDS = 3
"""Draws of the earlier part on which rules are chosen."""

PASSES = 2
"""How often the search goes over all numbers of a rule."""

WORTH = 0.005
"""More goodput than this share is worth another switch."""

EARLIER = 0.6
"""Share of the traffic (in requests) that rules are chosen on."""

MOST_REQUESTS = 20_000
"""Requests of the earlier part that are replayed, its latest: they are replayed some hundred times."""

MOST_LATER = 60_000
"""Requests of the later part that are replayed, its first."""


NOTHING = "nothing that moves, and holds still under constant load, did better than the fixed split on the earlier part"


@dataclass(frozen=True, slots=True)
class Score:
    """What a rule did, over draws: goodput in requests a second (mean, and the worst difference to never moving as a share),
    role switches an hour."""

    goodput_per_s: float
    against_static: float
    switches_per_h: float


@dataclass(frozen=True, eq=False)
class Found:
    """Thresholds with what speaks for them.

    rule: None where nothing that moves did better than standing still on the earlier part. pareto: (goodput, switches an
    hour, rule) from fewest switches to most goodput, on the earlier part. compared: name -> {goodput_per_s, switches_per_h,
    regret against the paid oracle}, on the later part. predictive: whether the rule looks ahead by a fitted forecast.
    constant: mixes of the earlier part on which the rule, were they to last, makes no move but one to begin with.
    """

    start: Fleet
    rule: policy.DemandRule | policy.BacklogRule | None
    predictive: bool
    pareto: list[tuple[Score, policy.DemandRule | policy.BacklogRule]]
    compared: dict[str, dict[str, float]]
    oracle: Oracle
    earlier: Study
    later: Study
    break_even: BreakEven | None
    tick_s: float
    tried: int
    seeds: int
    forecast_note: str
    constant: int

    @property
    def gain(self) -> float:
        """Goodput of the rule on the later part over never moving, as a share."""
        mine, static = (self.compared[name]["goodput_per_s"] for name in ("online", "never moving"))
        return mine / static - 1 if static > 0 else math.inf if mine > 0 else 0.0

    def as_json(self) -> dict[str, Any]:
        """The ``thresholds{}`` of an answer; ``steelyard replay --policy online --thresholds FILE`` runs it as it is."""
        if self.rule is None:
            return {"rule": None, "why": NOTHING}
        return policy.table_of(self.rule) | {
            "start": {"prefill": self.start.prefill, "decode": self.start.decode},
            "tick_s": self.tick_s,
            "post_move_check": True,
            "constant_loads": self.constant,
            "predictive": self.predictive,
            "forecast_note": self.forecast_note,
            **backlog_thresholds(self.rule, self.start),
            "pareto": [
                {
                    "goodput_per_s": score.goodput_per_s,
                    "switches_per_h": score.switches_per_h,
                    "against_static": score.against_static,
                    **{k: v for k, v in policy.table_of(rule).items() if k not in ("laws", "slo", "forecast")},
                }
                for score, rule in self.pareto
            ],
            "compared": self.compared,
            "break_even_s": self.break_even.lasts_s if self.break_even else None,
            "move_s": self.later.move_s,
            "mix_lasts_s": self.later.lasts_s,
            "tried": self.tried,
            "seeds": self.seeds,
        }


def backlog_thresholds(rule: policy.DemandRule | policy.BacklogRule, fleet: Fleet) -> dict[str, Any]:
    """What a rule's numbers mean in seconds of backlog and in a server's own units, at the fleet it starts from.

    prefill: ``up_backlog_s``, seconds of work before each prefill worker at which one more is asked for when nothing arrives
    (arrivals lower it in proportion); ``down_backlog_s``, below which it may give one away, the others then having its backlog
    (0 where there is one worker); ``waiting_tokens`` a worker: the same. decode: sequences a worker, running and waiting, at
    which the step or the batch reaches its limit, and those below which it may give one.
    """
    if isinstance(rule, policy.BacklogRule):
        demand = policy.DemandRule(rule.laws, rule.mean_prompt, rule.mean_output, rule.slo, tpot_share=rule.tpot_share)
        up, down = rule.more_s, min(rule.less_s, rule.more_s / rule.ratio)
        share = 1.0
    else:
        demand, share = rule, max(0.0, 1 - rule.gain / rule.up)
        up = rule.up * rule.target * rule.clear_s
        down = up * share
    down *= (fleet.prefill - 1) / fleet.prefill  # so far what the move may leave before each of those that stay
    level = demand.up if isinstance(rule, policy.DemandRule) else 1.0
    batch = _batch_at(demand, level)
    return {
        "prefill": {
            "up_backlog_s": up,
            "down_backlog_s": down,
            "up_waiting_tokens": up / demand.token_s,
            "down_waiting_tokens": down / demand.token_s,
        },
        "decode": {
            "up_running_requests": batch,
            "down_running_requests": _batch_at(demand, level * share) * (fleet.decode - 1) / fleet.decode,
            "up_step_s": demand.step_limit_s * level,
        },
    }


def _batch_at(rule: policy.DemandRule, level: float) -> float:
    """Sequences a decode worker runs when its load is ``level``, contexts of mean length."""
    context = int(rule.mean_prompt + rule.mean_output / 2)
    one = Fleet(1, 1)

    def load(batch: float) -> float:
        queues = policy.Queues(decode_running=1_000_000, decode_context_tokens=1_000_000 * context)
        return rule.loads(0.0, batch, queues, one)[1]

    # Beyond a full batch others wait, and load counts them: a level above 1 is reached there.
    low, high = 1.0, max(1.0, level) * min(rule.laws.max_batch, 100_000)
    if load(high) <= level:
        return high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if load(middle) < level else (low, middle)
    return low


# --- the search -----------------------------------------------------------------------------------------------------


def halves(schedule: Schedule, most: int = MOST_REQUESTS) -> tuple[Schedule, Schedule]:
    """(earlier, later); times stay those of the schedule."""
    cut = round(EARLIER * len(schedule))
    early = np.arange(max(0, cut - most), cut)
    return schedule.take(early), schedule.take(np.arange(cut, min(len(schedule), cut + MOST_LATER)))


def redrawn(schedule: Schedule, seed: int) -> Schedule:
    """The same traffic drawn again: lengths (pairs stay together) from near neighbours, times anew among twenty requests."""
    rng = np.random.default_rng([seed, 7])
    n = len(schedule)
    near = max(5, n // 200)
    which = np.clip(np.arange(n) + rng.integers(-near, near + 1, size=n), 0, n - 1)
    due = schedule.due_s.copy()
    for start in range(0, n, 20):
        end = min(start + 20, n)
        due[start:end] = np.sort(rng.uniform(due[start], schedule.due_s[min(end, n - 1)], end - start))
    return replace(
        schedule,
        due_s=np.maximum.accumulate(due),
        prompt_tokens=schedule.prompt_tokens[which],
        output_tokens=schedule.output_tokens[which],
        blocks=None,
        block_tokens=0,
        session=None,
        parent=None,
        think_s=None,
    )


def defaults(question: Question, history: Schedule, move_s: float) -> policy.DemandRule:
    """Where the search begins. Times are in units of what they are about: the TTFT limit, what a move takes, the tick."""
    prompt, output = float(history.prompt_tokens.mean()), float(history.output_tokens.mean())
    return policy.DemandRule(
        question.profile,
        prompt,
        output,
        question.limits,
        clear_s=5 * _ttft(question),
        ahead_s=2 * question.tick_s,
        memory_s=5 * question.tick_s,
        target=0.8,
        cool_s=move_s + question.tick_s,
    )


def _ttft(question: Question) -> float:
    return question.limits.limit("ttft") or question.limits.limit("e2e") or 1.0


def steps(question: Question, move_s: float) -> dict[str, tuple[float, ...]]:
    """What each number of a rule of demand may be, in the order in which they are searched."""
    tick = question.tick_s
    return {
        "up": (0.8, 1.0, 1.2),
        "clear_s": (_ttft(question), 5 * _ttft(question)),
        "memory_s": (2 * tick, 5 * tick, 10 * tick),
        "ahead_s": tuple(sorted({tick, 2 * tick, max(tick, move_s / 2)})),
        "tpot_share": (0.8, 0.9, 1.0),
        "target": (0.8, 0.95),
        "cool_s": (move_s + tick, 3 * (move_s + tick)),
        "dwell_s": (0.0, 2 * tick),
    }


def _with(rule: policy.DemandRule, name: str, value: float) -> policy.DemandRule:
    changed: dict[str, Any] = {name: value}
    return replace(rule, **changed)


def by_backlog(question: Question, history: Schedule, move_s: float) -> list[policy.DemandRule | policy.BacklogRule]:
    """Rules that look at queues alone, tried beside."""
    prompt, output = float(history.prompt_tokens.mean()), float(history.output_tokens.mean())
    return [
        policy.BacklogRule(
            question.profile,
            prompt,
            output,
            question.limits,
            more_s=more * _ttft(question),
            ratio=1.5,
            cool_s=move_s + question.tick_s,
            tpot_share=0.9,
        )
        for more in (0.25, 1.0)
    ]


def replayed(
    schedule: Schedule, start: Fleet, rule: policy.OnlineRule | None, question: Question, tick_s: float | None = None
) -> tuple[float, float]:
    """(goodput a second, role switches) of a rule; of never moving without one."""
    steering = policy.Steering(rule) if rule is not None else None
    done = simulate(schedule, start, question.profile, controller=steering, tick_s=tick_s or question.tick_s)
    return goodput_per_s(done.observations, question.limits), float(len(done.switches))


# --- constant load --------------------------------------------------------------------------------------------------

CONSTANT_S = 900.0
CONSTANT_MOVES = 40.0
"""Constant traffic lasts that long, or that many drains and flips if that is longer."""

CONSTANT_REQUESTS = (500, 40_000)
CONSTANT_DRAWS = 3

CALMER_GAINS = (0.2, 0.35, 0.5)
"""Hysteresis that is tried where a rule moves to and fro under constant load."""

Constant = Sequence[tuple[Schedule, Fleet]]


def constant(history: Schedule, found: Study, question: Question, seed: int = 0) -> list[tuple[Schedule, Fleet]]:
    """Traffic whose mix does not change, with the split that suits it: some draws for each split that windows of a study want.

    Requests of those windows in an order of chance, arriving at their mean rate (Poisson). Nothing in it is worth a move from
    the split that serves most of the first draw; the windows' own suits what changes around them.
    """
    made: list[tuple[Schedule, Fleet]] = []
    for k, fleet in enumerate(sorted({w.best for w in found.windows})):
        mine = [w for w in found.windows if w.best == fleet]
        which = np.concatenate([np.flatnonzero((history.due_s >= w.start_s) & (history.due_s < w.end_s)) for w in mine])
        rate = len(which) / max(sum(w.end_s - w.start_s for w in mine), 1e-9)
        if len(which) < 50:
            continue
        n = int(np.clip(rate * max(CONSTANT_S, CONSTANT_MOVES * found.move_s), *CONSTANT_REQUESTS))
        for draw in range(CONSTANT_DRAWS):
            rng = np.random.default_rng([seed, k, draw, 11])
            drawn = rng.choice(which, n)
            due = np.cumsum(rng.exponential(1 / rate, n))
            lengths = history.prompt_tokens[drawn], history.output_tokens[drawn]
            load = Schedule(f"{history.name}, constant", np.arange(n), due, *lengths)
            made.append((load, made[-1][1] if draw else best_fixed(load, question)))
    return made


def _on_constant(rule: policy.OnlineRule, loads: Constant, question: Question) -> Iterator[tuple[float, int]]:
    """(goodput a second, moves) of a rule on each constant traffic, simulated when it is asked for."""
    for schedule, fleet in loads:
        steering = policy.Steering(rule)
        done = simulate(schedule, fleet, question.profile, controller=steering, tick_s=question.tick_s)
        yield goodput_per_s(done.observations, question.limits), len(steering.moves)


def needless(rule: policy.OnlineRule, loads: Constant, question: Question) -> bool:
    """Does a constant traffic move a rule more than once? The first move may correct where it began."""
    return any(moves > 1 for _, moves in _on_constant(rule, loads, question))


def lost_by(rule: policy.OnlineRule, other: policy.OnlineRule, loads: Constant, question: Question) -> float | None:
    """Largest share of the goodput of ``other`` on a constant traffic that ``rule`` does not serve there; None where one moves
    ``rule`` more than once."""
    served = list(itertools.takewhile(lambda one: one[1] <= 1, _on_constant(rule, loads, question)))
    if len(served) < len(loads):
        return None
    most = (good for good, _ in _on_constant(other, loads, question))
    return max((1 - good / best for (good, _), best in zip(served, most, strict=True) if best > 0), default=0.0)


def _on_draws(
    rule: policy.OnlineRule | None, draws: Sequence[Schedule], start: Fleet, question: Question
) -> list[tuple[float, float]]:
    return [replayed(draw, start, rule, question) for draw in draws]


def search(
    history: Schedule,
    start: Fleet,
    question: Question,
    move_s: float,
    seed: int = 0,
    seeds: int = SEEDS,
    loads: Constant = (),
) -> tuple[policy.DemandRule | policy.BacklogRule | None, list[tuple[Score, policy.DemandRule | policy.BacklogRule]]]:
    """(rule or None for never moving, everything tried): one number after another, each on all draws of the history.

    A number is changed only where that serves clearly more: a search over few shifts of the mix finds their noise too. Of what
    serves more than standing still, the best that holds still on constant loads is taken; rules with more hysteresis are tried
    where the best does not.
    """
    draws = [history, *(redrawn(history, seed * 1000 + k) for k in range(1, seeds))]
    still = _on_draws(None, draws, start, question)
    hours = max(history.span_s, 1e-9) / 3600
    tried: dict[policy.DemandRule | policy.BacklogRule, Score] = {}

    def look(rules: Sequence[policy.DemandRule | policy.BacklogRule]) -> None:
        new = [r for r in dict.fromkeys(rules) if r not in tried]
        results = each(partial(_on_draws, draws=draws, start=start, question=question), new)
        for rule, held in zip(new, results, strict=True):
            tried[rule] = Score(
                float(np.mean([g for g, _ in held])),
                min(g / s[0] - 1 if s[0] > 0 else 0.0 for (g, _), s in zip(held, still, strict=True)),
                float(np.mean([n for _, n in held])) / hours,
            )

    at = defaults(question, history, move_s)
    look([at, *by_backlog(question, history, move_s)])
    for _ in range(PASSES):
        before = at
        for name, values in steps(question, move_s).items():
            others = [_with(at, name, value) for value in values]
            look(others)
            best = max(others, key=lambda r: tried[r].goodput_per_s)
            if tried[best].goodput_per_s > (1 + WORTH / 2) * tried[at].goodput_per_s:
                at = best
        if at == before:
            break
    stand = float(np.mean([g for g, _ in still]))

    def safe() -> list[policy.DemandRule | policy.BacklogRule]:
        """What serves more than standing still: those as good as the best first, of them the fewest switches."""
        held = {r: s for r, s in tried.items() if s.goodput_per_s >= (1 + WORTH) * stand and s.against_static > -WORTH}
        most = max((s.goodput_per_s for s in held.values()), default=0.0)

        def place(rule: policy.DemandRule | policy.BacklogRule) -> tuple[bool, float, float]:
            score = held[rule]
            near = score.goodput_per_s >= (1 - WORTH) * most
            return (not near, score.switches_per_h if near else 0.0, -score.goodput_per_s)

        return sorted(held, key=place)

    chosen = next(iter(safe()), None)
    if chosen is not None and needless(chosen, loads, question):
        restless, base = chosen, chosen if isinstance(chosen, policy.DemandRule) else at
        dwells = dict.fromkeys((base.dwell_s, 2 * question.tick_s, max(2 * question.tick_s, move_s / 2)))
        look([replace(base, gain=gain, dwell_s=dwell) for gain in CALMER_GAINS for dwell in dwells])
        chosen = next((r for r in safe() if r != restless and not needless(r, loads, question)), None)
    return chosen, [(score, rule) for rule, score in tried.items()]


def pareto(
    scored: Sequence[tuple[Score, policy.DemandRule | policy.BacklogRule]],
) -> list[tuple[Score, policy.DemandRule | policy.BacklogRule]]:
    """Those that nobody beats in both goodput and switches, fewest switches first."""
    kept: list[tuple[Score, policy.DemandRule | policy.BacklogRule]] = []
    for one in sorted(scored, key=lambda s: (s[0].switches_per_h, -s[0].goodput_per_s)):
        if not kept or one[0].goodput_per_s > kept[-1][0].goodput_per_s:
            kept.append(one)
    return kept


# --- looking ahead --------------------------------------------------------------------------------------------------


def period_s(history: Schedule, least_s: float) -> float:
    """The period after which the traffic's mix repeats, by autocorrelation of prompt tokens a bin; 0 where there is none.

    Three whole periods at least must be in the history.
    """
    bins = 600
    if len(history) < 2 * bins:
        return 0.0
    width = history.span_s / bins
    at = np.minimum(((history.due_s - history.due_s[0]) / width).astype(np.int64), bins - 1)
    series = np.bincount(at, weights=history.prompt_tokens.astype(float), minlength=bins)
    series = series - series.mean()
    power = float((series * series).sum())
    if power <= 0:
        return 0.0
    lags = np.arange(1, bins // 3 + 1)
    same = np.array([float((series[:-k] * series[k:]).sum()) / power * bins / (bins - k) for k in lags])
    after = np.flatnonzero(same < 0)  # the first peak beyond the first dip is a period, not the width of a burst
    if not len(after):
        return 0.0
    peak = int(after[0] + np.argmax(same[after[0] :]))
    found = float(lags[peak] * width)
    return found if same[peak] > 0.3 and found > least_s else 0.0


class _Watch:
    """A rule that is asked and also writes down what it saw."""

    def __init__(self, rule: policy.OnlineRule | None, memory_s: float, mean_prompt: float) -> None:
        self.steering = policy.Steering(rule) if rule is not None else None
        self.seen: list[policy.Demand] = []
        self._memory_s, self._mean_prompt = memory_s, mean_prompt

    def __call__(self, now_s: float, samples: Sequence[Sample], fleet: Fleet, changing: int) -> Fleet | None:
        queues = policy.Queues.of(samples)
        active = float(queues.decode_running + queues.decode_waiting)
        arrived = queues.prompt_tokens_total + policy.waiting_tokens(queues, self._mean_prompt)
        last = self.seen[-1] if self.seen else None
        self.seen.append(
            last.next(now_s, arrived, active, self._memory_s) if last else policy.Demand(now_s, arrived, active)
        )
        return self.steering(now_s, samples, fleet, changing) if self.steering else None


def fit_forecast(
    history: Schedule, start: Fleet, rule: policy.DemandRule, question: Question, ahead_s: float, clock_s: float
) -> policy.Forecast | None:
    """Ridge regressions of what comes ``ahead_s`` later on what a rule sees, learned by replaying the history with it.

    Targets: prompt tokens a second that arrive in the second half of the time ahead and as long again; sequences in decode
    then. clock_s: period of the clock features.
    """
    from sklearn.linear_model import RidgeCV  # what it brings along takes a third of a second to import

    watch = _Watch(rule, rule.memory_s, rule.mean_prompt)
    simulate(history, start, question.profile, controller=watch, tick_s=question.tick_s)
    end = float(history.due_s[-1]) - 2 * ahead_s
    seen = [d for d in watch.seen[1:] if d.at_s <= end and not math.isnan(d.rate)]
    if len(seen) < 100:
        return None
    at = np.array([d.at_s for d in seen])
    total = np.concatenate([[0.0], np.cumsum(history.prompt_tokens.astype(float))])

    def until(when: Floats) -> Floats:
        return total[np.searchsorted(history.due_s, when, side="right")]

    from_s, to_s = at + 0.5 * ahead_s, at + 1.5 * ahead_s
    rate = (until(to_s) - until(from_s)) / np.maximum(to_s - from_s, 1e-9)
    times = np.array([d.at_s for d in watch.seen])
    active = np.interp(at + ahead_s, times, np.array([d.active for d in watch.seen]))
    x = np.array([policy.forecast_features(d, clock_s) for d in seen])
    scale = np.maximum(x.std(axis=0), 1e-9)
    scale[0] = 1.0

    def fitted(y: Floats) -> tuple[float, ...]:
        model = RidgeCV(alphas=np.geomspace(1e-3, 1e3, 7), fit_intercept=False).fit(x / scale, y)
        return tuple(float(c) for c in model.coef_ / scale)

    return policy.Forecast(fitted(rate), fitted(active), clock_s)


def predictive(
    history: Schedule, start: Fleet, rule: policy.DemandRule, question: Question, move_s: float
) -> tuple[policy.DemandRule | None, str]:
    """(the rule with a forecast, what speaks for or against it): fitted on the first 60 % of the history, held against the same
    rule without on the rest, and used only where it serves more there; then fitted on all of it."""
    learn, hold = halves(history, len(history))
    ahead = move_s + question.tick_s
    reactive = replayed(hold, start, rule, question)
    best: tuple[float, float, float] | None = None
    clocks = list(dict.fromkeys((0.0, period_s(learn, 4 * move_s))))
    for clock in clocks:
        forecast = fit_forecast(learn, start, rule, question, ahead, clock)
        if forecast is not None:
            good, switches = replayed(hold, start, replace(rule, forecast=forecast), question)
            best = max(best or (-1.0, 0.0, 0.0), (good, -switches, clock))
    if best is None:
        return None, "too little history to fit a forecast"
    words = f"on held-out windows {best[0]:.4g}/s with a forecast, {reactive[0]:.4g}/s without"
    if best[0] <= (1 + WORTH) * reactive[0]:
        return None, f"reactive: {words}"
    forecast = fit_forecast(history, start, rule, question, ahead, best[2])
    period = f", period {best[2]:.3g} s" if best[2] else ""
    return (replace(rule, forecast=forecast), f"predictive: {words}{period}") if forecast else (None, words)


# --- the whole ------------------------------------------------------------------------------------------------------


def find(
    schedule: Schedule,
    question: Question,
    *,
    fixed: Fleet | None = None,
    seed: int = 0,
    seeds: int = SEEDS,
    note: Note = silent,
) -> Found:
    """Choose thresholds on the earlier part of a schedule and score them on the later. fixed: the split that stands still, by
    default the earlier part's best."""
    earlier, later = halves(schedule)
    note("thresholds", 0, 4)
    before = study(earlier, question, fixed=fixed)
    note("thresholds", 1, 4)
    start = before.fixed
    loads = constant(earlier, before, question, seed)
    rule, tried = search(earlier, start, question, before.move_s, seed, seeds, loads)
    note("thresholds", 2, 4, f"{len(tried)} rules tried on the earlier half of the traffic, from {start}")
    ahead, words = None, "nothing moves, so nothing is forecast"
    if isinstance(rule, policy.DemandRule):
        ahead, words = predictive(earlier, start, rule, question, before.move_s)
        if ahead is not None:
            lost = lost_by(ahead, rule, loads, question)
            if lost is None:
                ahead, words = None, f"reactive: with a forecast it moves under constant load; {words}"
            elif lost > WORTH:
                ahead, words = (
                    None,
                    f"reactive: a forecast costs {lost:.0%} of the goodput under constant load; {words}",
                )
    elif rule is not None:
        words = "the rule of backlog takes no forecast"
    note("thresholds", 3, 4)
    after = study(later, question, fixed=start)
    known = oracle(later, question, after)
    context = float((earlier.prompt_tokens + earlier.output_tokens).max())
    arms: dict[str, tuple[policy.OnlineRule | None, float]] = {
        "online": (ahead or rule, question.tick_s),
        "online, reactive": (rule, question.tick_s),
        "never moving": (None, question.tick_s),
        "report's 1.5x": (policy.CountRule(), question.tick_s),
        "Dynamo easy, throughput": (policy.EasyRule(question.profile, context), 5.0),
        "Dynamo easy, latency": (policy.EasyRule(question.profile, context, 0.1, 0.0, 0.4, 0.1), 5.0),
    }
    hours = max(later.span_s, 1e-9) / 3600
    compared = {}
    for name, (one, tick) in arms.items():
        good, switches = replayed(later, start, one, question, tick)
        compared[name] = {
            "goodput_per_s": good,
            "switches_per_h": switches / hours,
            "regret": 1 - good / known.paid_per_s if known.paid_per_s > 0 else 0.0,
        }
    mine, still = (compared[name]["goodput_per_s"] for name in ("online", "never moving"))
    note(
        "thresholds",
        4,
        4,
        f"{len(tried)} rules tried; on the later half the best serves {mine:.4g} req/s, never moving {still:.4g}",
    )
    return Found(
        start,
        ahead or rule,
        ahead is not None,
        pareto(tried),
        compared,
        known,
        before,
        after,
        break_even(later, question, after),
        question.tick_s,
        len(tried),
        seeds,
        words,
        len(loads),
    )


def pays(found: Found, eps: float) -> tuple[bool, str]:
    """(should it move?, why): it must gain more than eps on the later part, and the mix last long enough for a move."""
    if found.rule is None:
        return False, NOTHING
    last = found.earlier.lasts_s
    if last < LASTS * found.earlier.move_s:
        return (
            False,
            f"a mix lasts {last:.3g} s, less than {LASTS:g} times the {found.earlier.move_s:.3g} s of a drain and flip",
        )
    if found.gain <= eps:
        return False, f"on the later part moving gains {found.gain:.1%}, not more than {eps:.0%}"
    return (
        True,
        f"on the later part moving serves {found.gain:.1%} more within the SLO than {found.start} that never moves",
    )
