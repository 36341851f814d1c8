"""Four ways to run a PD cluster on one workload, one physics, one definition of latency: baseline, online, offline, static.

Every strategy sees the same requests. What a strategy has to be told beforehand (a split, thresholds) is chosen on
history - other requests of the same source, earlier ones of a trace - and scored on requests it has not seen; what was
chosen on the scored requests themselves is called an oracle. Offline is allowed to know all requests: that is what
offline means. It therefore starts when the last has arrived, and its latencies count from the recorded arrivals.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import joblib
import numpy as np
from scipy import stats

from loadgen import policy
from loadgen.client import target
from loadgen.cluster import Profile, SimResult, simulate, simulate_batches
from loadgen.cluster.embedded import embedded
from loadgen.control import Endpoint
from loadgen.live import Live
from loadgen.replay import replay
from loadgen.swarm import Swarm
from traces.errors import InputError
from traces.measures import Slo, goodput_per_s, quantile, span_s
from traces.records import SPED, Fleet, Observations, Run, Schedule
from traces.shape import ORIGIN_OUTPUT, ORIGIN_PROMPT, ORIGIN_SPAN_S, LogNormal, synthesize
from traces.store import Store

T = TypeVar("T")

SCALES = {"small": (100, 8), "medium": (200, 16), "large": (500, 32)}
"""(requests, GPUs) of the report's three scales."""

DEFAULT_SLO = "ttft<5s tpot<50ms"
"""For goodput on the report's workload, whose longest prompt alone takes 8 s. Ours; the report names none."""

SHIFT_SPAN_S = 90.0
SHIFT_LONG = (LogNormal(7.0, 0.6, 10, 4096), LogNormal(6.0, 0.5, 10, 2048))
SHIFT_SHORT = (LogNormal(5.0, 0.6, 10, 4096), LogNormal(4.0, 0.5, 10, 2048))
"""Preset shift: (prompt, answer) lengths; first long prompts and short answers, then the reverse."""

RESAMPLES = 5
"""A candidate is judged on that many bootstrap resamples of the history: the P99 of one sample is one request's luck."""

RULE_RESAMPLES = 3
"""The same for online rules, which take longer to simulate."""

TICK_S = 1.0

REPORT: dict[str, dict[str, dict[str, float]]] = {
    "small": {
        "baseline": {"p99_s": 63.0, "utilisation": 0.48, "switches": 40},
        "online-report": {"p99_s": 16.0, "utilisation": 0.68, "switches": 15},
        "offline-report": {"p99_s": 1.8, "utilisation": 0.82, "switches": 10},
        "static-report": {"p99_s": 19.7, "utilisation": 0.75, "switches": 0},
    },
    "medium": {
        "baseline": {"p99_s": 76.0, "utilisation": 0.48, "switches": 80},
        "online-report": {"p99_s": 18.6, "utilisation": 0.68, "switches": 30},
        "offline-report": {"p99_s": 0.8, "utilisation": 0.82, "switches": 10},
        "static-report": {"p99_s": 19.2, "utilisation": 0.75, "switches": 0},
    },
    "large": {
        "baseline": {"p99_s": 87.0, "utilisation": 0.48, "switches": 200},
        "online-report": {"p99_s": 16.0, "utilisation": 0.68, "switches": 75},
        "offline-report": {"p99_s": 0.4, "utilisation": 0.82, "switches": 10},
        "static-report": {"p99_s": 17.8, "utilisation": 0.75, "switches": 0},
    },
}
"""The report's own table. Utilisations and switch counts are constants typed into its code (switches: a share of the
request count, no time in it); see REPORT_NOTES for what its latencies are."""

REPORT_NOTES = {
    "baseline": "all requests at 0, own service counted twice; slower rates (400/80 tok/s) than the others",
    "online-report": "arrivals over 60 s, another sample; the split never moves; decode wait ignores arrival times",
    "offline-report": "not a latency: 3 / throughput, a time per request; it falls with the number of requests",
    "static-report": "no split at all: colocated, no arrivals, decode left out of the throughput",
}


@dataclass(frozen=True, slots=True)
class Arm:
    """One row of the comparison. whose: "report", "ours", "oracle", or "" for a reference."""

    name: str
    whose: str
    about: str


ARMS = (
    Arm("baseline", "", "first in, first out; an idle GPU takes the next phase that waits and pays the role change"),
    Arm("online-report", "report", "1:1 at start, each second one GPU to the queue that is 1.5 times the other"),
    Arm("online", "ours", "split from history, then seconds of backlog, hysteresis, dwell, cool-down, check"),
    Arm("offline-report", "report", "ascending prompts in batches within 1.25x; roles change between batches"),
    Arm("offline", "ours", "best order and split for the requests known, no barriers, no role change"),
    Arm("static-report", "report", "P/G = 2h/(1+h), h = E[n/(n+m)] of history"),
    Arm("static", "ours", "the split that did best on history by simulation"),
    Arm("static-oracle", "oracle", "the split that does best on the scored requests themselves"),
    Arm("colocated", "", "every GPU does both phases, no disaggregation"),
)


# --- workloads ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """Where requests come from: a trace, or a preset. rate_per_s None: as recorded, or the preset's.

    origin: the report's log-normal lengths, arrivals over a minute. shift: over a minute and a half, long prompts
    with short answers for the first half, then the reverse; made to show when roles should move.
    """

    requests: int
    trace: Schedule | None = None
    preset: str = "origin"
    arrivals: str = "uniform"
    rate_per_s: float | None = None
    sample: int = 0

    @property
    def history(self) -> int:
        """Requests a choice may be based on."""
        return self.sample or self.requests

    def draw(self, seed: int, history: int | None = None) -> tuple[Schedule, Schedule]:
        """(history, what is scored). Of a trace: a window and what came right before it, by seed."""
        sample = history or self.history
        if self.trace is None:
            return self._made(sample, 1_000_003 + seed), self._made(self.requests, seed)
        room = len(self.trace) - sample - self.requests
        if room < 0:
            raise InputError(
                f"trace {self.trace.name!r} has {len(self.trace)} requests; {sample} of history and {self.requests} to "
                "score are asked for. Give smaller --requests or --sample."
            )
        start = int(np.random.default_rng(seed).integers(room + 1)) if room else 0
        cut = start + sample
        return self._window(start, cut), self._window(cut, cut + self.requests)

    def _made(self, n: int, seed: int) -> Schedule:
        span = ORIGIN_SPAN_S if self.preset == "origin" else SHIFT_SPAN_S
        rate = self.rate_per_s or self.requests / span
        made = synthesize(
            n, ORIGIN_PROMPT, ORIGIN_OUTPUT, rate_per_s=rate, arrivals=self.arrivals, seed=seed, name=self.preset
        )
        if self.preset == "origin":
            return made
        rng = np.random.default_rng([seed, 1])
        late = np.arange(n) >= n // 2
        return replace(
            made,
            prompt_tokens=np.where(late, SHIFT_SHORT[0].draw(n, rng), SHIFT_LONG[0].draw(n, rng)),
            output_tokens=np.where(late, SHIFT_LONG[1].draw(n, rng), SHIFT_SHORT[1].draw(n, rng)),
        )

    def _window(self, start: int, end: int) -> Schedule:
        assert self.trace is not None  # noqa: S101 - draw looked
        part = self.trace.take(np.arange(start, end))
        due = part.due_s - part.due_s[0]
        if self.arrivals == "burst":
            due = np.zeros(len(due))
        elif self.rate_per_s and due[-1] > 0:
            due = due * ((len(due) - 1) / due[-1] / self.rate_per_s)
        return replace(part, due_s=due)


def burst(schedule: Schedule) -> Schedule:
    """The same requests, all due at 0."""
    return replace(schedule, due_s=np.zeros(len(schedule)))


def resampled(schedule: Schedule, seed: int, k: int = RESAMPLES) -> list[Schedule]:
    """Resamples of the lengths (pairs stay together, drawn from a tenth of the schedule around) at the schedule's arrival
    times; the schedule itself first."""
    rng = np.random.default_rng(seed)
    found = [schedule]
    n = len(schedule)
    for _ in range(k - 1):
        # Near neighbours only: a drift in the mix must survive.
        near = max(10, n // 10)
        which = np.clip(np.arange(n) + rng.integers(-near, near + 1, size=n), 0, n - 1)
        found.append(
            replace(
                schedule,
                prompt_tokens=schedule.prompt_tokens[which],
                output_tokens=schedule.output_tokens[which],
                blocks=None,
                block_tokens=0,
            )
        )
    return found


# --- choosing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """What is asked of every strategy. by_goodput: choose by goodput first (the user gave an SLO), else by P99 latency."""

    workload: Workload
    gpus: int
    profile: Profile
    slo: Slo
    by_goodput: bool = False


def pick(candidates: Sequence[T], results: Callable[[T], Iterable[Observations]], question: Question) -> T:
    """The candidate with the best results: goodput within 2 % of the best if asked for, then P99 latency within 10 % of the
    least (it rests on a handful of requests), then the least mean.
    """
    scored = []
    for candidate in candidates:
        rows = list(results(candidate))
        good = float(np.mean([goodput_per_s(r, question.slo) for r in rows]))
        p99 = float(np.mean([quantile(r.e2e_s, 0.99) for r in rows]))
        scored.append((good, p99, float(np.mean([r.e2e_s.mean() for r in rows])), candidate))
    if question.by_goodput:
        most = max(s[0] for s in scored)
        scored = [s for s in scored if s[0] >= 0.98 * most]
    least = min(s[1] for s in scored)
    return min((s for s in scored if s[1] <= 1.1 * least), key=lambda s: s[2])[3]


@dataclass(frozen=True)
class Plan:
    """What a strategy does on one schedule. fleet None: roles on demand. rule: online. batches: offline."""

    fleet: Fleet | None
    rule: policy.OnlineRule | None = None
    batches: tuple[tuple[tuple[int, ...], Fleet | None], ...] = ()
    start_s: float = 0.0
    note: str = ""


def even(gpus: int) -> Fleet:
    """Half and half."""
    return Fleet(gpus // 2, gpus - gpus // 2)


def best_static(history: Sequence[Schedule], question: Question) -> Fleet:
    """The fixed split that does best on schedules, by simulation of every one."""
    return pick(
        Fleet.splits(question.gpus),
        lambda fleet: (simulate(s, fleet, question.profile).observations for s in history),
        question,
    )


def best_rule(history: Sequence[Schedule], fixed: Fleet, question: Question) -> tuple[Fleet, policy.BacklogRule | None]:
    """(split at start, thresholds) searched by replaying history with switches on.

    The rule is None where nothing that moves did better than the fixed split that never moves.
    """
    prompt = float(np.mean([s.prompt_tokens.mean() for s in history]))
    output = float(np.mean([s.output_tokens.mean() for s in history]))
    flip = question.profile.flip_s
    tried: list[tuple[Fleet, policy.BacklogRule | None]] = [(fixed, None)]
    tried += [
        (
            start,
            policy.BacklogRule(question.profile, prompt, output, question.slo, more_s=more, ratio=ratio, cool_s=cool),
        )
        for start in dict.fromkeys((fixed, even(question.gpus)))
        for more in (0.1, 0.5, 2.0)
        for ratio in (1.5, 3.0)
        for cool in (TICK_S, flip + 5 * TICK_S)
    ]
    return pick(
        tried, lambda pair: (run(s, Plan(*pair), question).observations for s in history[:RULE_RESAMPLES]), question
    )


def offline_plan(schedule: Schedule, question: Question, start_s: float) -> Plan:
    """Order and split that do best for requests that are all known, by simulation of each pair."""
    p = question.profile
    plans = []
    for how in policy.ORDERS:
        rows = tuple(policy.order(how, schedule.prompt_tokens, schedule.output_tokens, p))
        plans += [
            Plan(fleet, batches=((rows, None),), start_s=start_s, note=f"{how}, {fleet}")
            for fleet in Fleet.splits(question.gpus)
        ]
    return pick(plans, lambda plan: [run(schedule, plan, question).observations], question)


def report_offline_plan(schedule: Schedule, question: Question, start_s: float) -> Plan:
    """The report's batches, each at the split that balances its own work."""
    batches = []
    for rows in policy.groups(schedule.prompt_tokens):
        which = np.array(rows)
        fleet = policy.balanced(
            schedule.prompt_tokens[which], schedule.output_tokens[which], question.profile, question.gpus
        )
        batches.append((tuple(rows), fleet))
    return Plan(batches[0][1], batches=tuple(batches), start_s=start_s, note=f"{len(batches)} batches")


def plans(question: Question, history: Schedule, schedule: Schedule, seed: int) -> dict[str, Plan]:
    """What every arm does on a schedule, each from what it may know."""
    q = question
    past = resampled(history, seed)
    fixed = best_static(past, q)
    last = float(schedule.due_s[-1]) if len(schedule) else 0.0
    said = policy.report_split(history.prompt_tokens, history.output_tokens, q.gpus)
    start, rule = best_rule(past, fixed, q)
    oracle = best_static([schedule], q)
    return {
        "baseline": Plan(None),
        "online-report": Plan(even(q.gpus), policy.CountRule(), note=f"from {even(q.gpus)}"),
        "online": Plan(
            start,
            rule,
            note=f"from {start}, "
            + (f"{rule.more_s:g} s, {rule.ratio:g}x, {rule.cool_s:g} s" if rule else "never moves: none did better"),
        ),
        "offline-report": report_offline_plan(schedule, q, last),
        "offline": offline_plan(schedule, q, last),
        "static-report": Plan(said, note=str(said)),
        "static": Plan(fixed, note=str(fixed)),
        "static-oracle": Plan(oracle, note=str(oracle)),
        "colocated": Plan(Fleet(0, 0, q.gpus), note=f"{q.gpus} mixed"),
    }


def run(schedule: Schedule, plan: Plan, question: Question) -> SimResult:
    """A plan in virtual time."""
    p = question.profile
    if plan.batches:
        assert plan.fleet is not None  # noqa: S101 - offline plans name one
        return simulate_batches(schedule, plan.fleet, p, plan.batches, start_s=plan.start_s)
    if plan.fleet is None:
        return simulate(schedule, even(question.gpus), p, on_demand=policy.next_phase)
    if plan.rule is not None:
        return simulate(schedule, plan.fleet, p, controller=policy.Steering(plan.rule), tick_s=TICK_S)
    return simulate(schedule, plan.fleet, p)


# --- measuring ------------------------------------------------------------------------------------------------------

MEASURES = (
    "p99_s",
    "mean_s",
    "ttft_mean_s",
    "ttft_p99_s",
    "tpot_mean_s",
    "throughput_per_s",
    "goodput_per_s",
    "utilisation",
    "utilisation_prefill",
    "utilisation_decode",
    "switches",
    "switches_per_h",
)


def measure(rows: Observations, slo: Slo, switches: int, busy: dict[str, float]) -> dict[str, float]:
    """The measures of one run; latencies from due (the recorded arrival), in seconds. busy: shares by role and "all"."""
    span = span_s(rows)
    return {
        "p99_s": quantile(rows.e2e_s, 0.99),
        "mean_s": float(np.nanmean(rows.e2e_s)),
        "ttft_mean_s": float(np.nanmean(rows.ttft_s)),
        "ttft_p99_s": quantile(rows.ttft_s, 0.99),
        "tpot_mean_s": float(np.nanmean(rows.tpot_s)),
        "throughput_per_s": float(rows.ok.sum()) / span if span > 0 else math.nan,
        "goodput_per_s": goodput_per_s(rows, slo),
        "utilisation": busy.get("all", math.nan),
        "utilisation_prefill": busy.get("prefill", math.nan),
        "utilisation_decode": busy.get("decode", math.nan),
        "switches": float(switches),
        "switches_per_h": switches * 3600 / span if span > 0 else math.nan,
    }


def one_seed(question: Question, seed: int) -> dict[str, dict[str, dict[str, float]]]:
    """{"arrivals" and "burst": {arm: measures}} for one draw; burst only where the arrivals are not one already."""
    history, scored = question.workload.draw(seed)
    found = {}
    for mode, past, schedule in (("arrivals", history, scored), ("burst", burst(history), burst(scored))):
        if mode == "arrivals" and question.workload.arrivals == "burst":
            continue
        found[mode] = {
            name: _measured(run(schedule, plan, question), question)
            for name, plan in plans(question, past, schedule, seed).items()
        }
    return found


def _measured(result: SimResult, question: Question) -> dict[str, float]:
    busy = {"all": result.busy_share, **result.utilisation}
    return measure(result.observations, question.slo, len(result.switches), busy)


def interval(values: Sequence[float], level: float = 0.9) -> dict[str, float]:
    """Mean over seeds with Student's interval; {"value", "low", "high", "n"}."""
    finite = np.array([v for v in values if math.isfinite(v)], dtype=float)
    n = len(finite)
    if n == 0:
        return {"value": math.nan, "low": math.nan, "high": math.nan, "n": 0}
    mean = float(finite.mean())
    half = float(stats.t.ppf(0.5 + level / 2, n - 1) * finite.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    return {"value": mean, "low": mean - half, "high": mean + half, "n": n}


def table(seeds: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """{arm: {measure: interval, "change_p99", "change_mean": paired change against baseline, as a share}}."""
    rows: dict[str, dict[str, Any]] = {}
    for arm in seeds[0]:
        rows[arm] = {m: interval([s[arm][m] for s in seeds]) for m in MEASURES}
        for key, name in (("change_p99", "p99_s"), ("change_mean", "mean_s")):
            rows[arm][key] = interval([s[arm][name] / s["baseline"][name] - 1 for s in seeds])
    return rows


def better(
    seeds: Sequence[dict[str, dict[str, float]]], ours: str, theirs: str, name: str = "p99_s"
) -> dict[str, float]:
    """Ours against the report's rule of the same kind, paired by seed: change as a share of the report's figure."""
    return interval([s[ours][name] / s[theirs][name] - 1 for s in seeds])


def regret_by_sample(question: Question, seeds: Sequence[int], sizes: Sequence[int]) -> list[dict[str, Any]]:
    """How much worse a split chosen on ``size`` requests of history does, in P99, than the best split for what came."""
    found = []
    for size in sizes:
        regrets = []
        for seed in seeds:
            history, scored = question.workload.draw(seed, history=size)
            by_fleet = {
                f: quantile(simulate(scored, f, question.profile).observations.e2e_s, 0.99)
                for f in Fleet.splits(question.gpus)
            }
            chosen = best_static(resampled(history, seed), question)
            regrets.append(by_fleet[chosen] / min(by_fleet.values()) - 1)
        found.append({"sample": size, "regret": interval(regrets)})
    return found


def study(
    question: Question,
    seeds: int,
    *,
    sizes: Sequence[int] = (),
    processes: int | None = None,
    on_seed: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """All strategies over seeds 1..n: {"arrivals": table, "burst": table, "ours_against_report", "regret_by_sample"}."""
    numbers = list(range(1, seeds + 1))
    done = []
    processes = processes or min(joblib.cpu_count(), seeds)
    if processes > 1:
        with ProcessPoolExecutor(processes) as pool:
            for result in pool.map(one_seed, [question] * seeds, numbers):
                done.append(result)
                on_seed()
    else:
        for seed in numbers:
            done.append(one_seed(question, seed))
            on_seed()
    answer: dict[str, Any] = {}
    for mode in done[0]:
        per_seed = [d[mode] for d in done]
        answer[mode] = table(per_seed)
        answer.setdefault("ours_against_report", {})[mode] = {
            kind: {name: better(per_seed, kind, f"{kind}-report", name) for name in ("p99_s", "mean_s")}
            for kind in ("online", "offline", "static")
        }
    if sizes:
        answer["regret_by_sample"] = regret_by_sample(question, numbers, sizes)
    return answer


# --- over HTTP ------------------------------------------------------------------------------------------------------


def scaled(rows: Observations, factor: float) -> Observations:
    """Observations whose clock ran ``factor`` times faster than the model's: seconds become model seconds."""
    times = {name: getattr(rows, name) * factor for name in rows.columns() if name.endswith("_s")}
    return replace(rows, **times)


def over_http(
    store: Store,
    question: Question,
    seeds: int,
    *,
    speed: float,
    group: str,
    arms: Sequence[str] = (),
    note: Callable[[str], None] = lambda line: None,
    on_live: Callable[[Live], None] | None = None,
) -> dict[str, Any]:
    """The same plans on the same requests through Locust against the served endpoint, beside the simulator's figures.

    speed: model seconds per second; figures are in model seconds. Returns {arm: {measure: interval}}, for each arm also
    ``against_simulation``: the paired difference in P99 and mean latency as a share, which is the speed's and the
    machine's own error; rejected: runs that were not valid or in which a request failed (each is tried twice); runs: their ids.
    """
    arms = arms or [arm.name for arm in ARMS]
    p = question.profile
    measured: list[dict[str, dict[str, float]]] = []
    simulated: list[dict[str, dict[str, float]]] = []
    rejected: list[str] = []
    ids: list[int] = []
    with tempfile.TemporaryDirectory() as folder, Swarm(workers=1) as swarm:
        laws = Path(folder) / "profile.toml"
        laws.write_text(p.to_toml())
        for seed in range(1, seeds + 1):
            history, scored = question.workload.draw(seed)
            asked = replace(scored, due_s=scored.due_s / speed, changes=(*scored.changes, f"{SPED}{speed:g}"))
            here: dict[str, dict[str, float]] = {}
            there: dict[str, dict[str, float]] = {}
            for name, plan in plans(question, history, scored, seed).items():
                if name not in arms:
                    continue
                note(f"seed {seed}: {name}")
                result = run(scored, plan, question)
                timeout_s = 60.0 + 2 * float(result.observations.e2e_s.max()) / speed
                for _ in range(2):
                    run_, rows, health = _served(
                        store, swarm, question, plan, asked, laws, speed, f"{group} {name} {seed}", timeout_s, on_live
                    )
                    ids.append(run_.id)
                    failed = int((~rows.ok).sum())
                    if run_.verdict != "invalid" and run_.complete and not failed:
                        break
                    why = f"{failed} of {len(rows)} requests failed; {run_.reason}" if failed else run_.reason
                    rejected.append(f"{name}, seed {seed}: {why}")
                else:
                    continue
                span = span_s(rows)
                busy = {"all": sum(health["busy_s"].values()) / (span * question.gpus)}
                here[name] = measure(rows, question.slo, int(health["switches"]), busy)
                there[name] = _measured(result, question)
            measured.append(here)
            simulated.append(there)
    answer: dict[str, Any] = {"speed": speed, "seeds": seeds, "rejected": rejected, "runs": ids, "arms": {}}
    for name in arms:
        pairs = [(m[name], s[name]) for m, s in zip(measured, simulated, strict=True) if name in m]
        if pairs:
            answer["arms"][name] = {k: interval([m[k] for m, _ in pairs]) for k in MEASURES} | {
                "against_simulation": {k: interval([m[k] / s[k] - 1 for m, s in pairs]) for k in ("p99_s", "mean_s")}
            }
    return answer


def _served(
    store: Store,
    swarm: Swarm,
    question: Question,
    plan: Plan,
    asked: Schedule,
    laws: Path,
    speed: float,
    name: str,
    timeout_s: float,
    on_live: Callable[[Live], None] | None,
) -> tuple[Run, Observations, dict[str, Any]]:
    """One run of a plan against an endpoint of its own: (run, observations in model seconds, what the endpoint says)."""
    fleet = plan.fleet or even(question.gpus)
    with embedded(str(laws), fleet, speed=speed, on_demand=plan.fleet is None) as url:
        done = replay(
            store,
            swarm,
            asked,
            url,
            name=name,
            policy=name.split()[1],
            slo=question.slo.faster(speed),
            prefixes=bool(question.profile.cache_tokens) and asked.blocks is not None,
            steering=policy.Steering(plan.rule) if plan.rule is not None else None,
            tick_s=TICK_S,
            dispatch=policy.Dispatch(plan.batches, plan.start_s / speed) if plan.batches else None,
            timeout_s=timeout_s,
            on_live=on_live,
        )
        health = Endpoint(target(url)).fetch("GET", "/health").json()
    return done, scaled(store.observations(done.id), speed), health
