"""How good is the advice? Random clusters whose truth is known, three runs that the advisor chooses itself, then its answer.

    make bench-advisor        (python -m benchmarks.advisor [--scenarios N] [--out FILE] [--processes P])

Truth is an exhaustive simulation of every split with the true laws (benchmarks/worlds.py); the advisor sees rows as a
client has them, with noise, and in a third of the scenarios the servers' readings. Results are lines of JSON in --out,
one a scenario, so that a run that was cut goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import scipy
import sklearn

from advisor.features import RunData
from advisor.model import asked, fit_laws
from advisor.recommend import NEAR, Recommendation, recommend
from advisor.study import quiet
from benchmarks.worlds import World, draw, sweep
from loadgen.cluster import kernel, simulate
from traces.errors import NotEnoughDataError
from traces.measures import Summary, summarise
from traces.records import Fleet, Schedule

PROBES = 3
EASY = 0.05
"""A scenario is easy if the median split loses no more than this share of the best one's goodput."""

HELD = {"TPOT p50": "tpot_p50_s", "TTFT p99": "ttft_p99_s", "E2E p99": "e2e_p99_s", "throughput": "throughput_per_s"}
"""Errors at splits that no run measured."""


would_say = partial(recommend, attainment=0.0, refuse=False)
"""The advisor's answer, where it must not give it and where no split meets the SLO too."""


def probe(world: World, command: dict[str, Any], number: int) -> RunData:
    """The run that the advisor asked for, on other requests of the same traffic."""
    fleet = Fleet(int(command["prefill"]), int(command["decode"]))
    return world.measured(traffic(world.source, command, world.seed * 7 + 3 + number), fleet, number)


def traffic(source: Callable[[int, float, int], Schedule], command: dict[str, Any], seed: int) -> Schedule:
    """The requests of a run that the advisor asked for."""
    n, rate = int(command.get("requests", 300)), float(command["rate_per_s"])
    made = source(n, rate, seed)
    if command.get("arrivals") != "poisson":
        return made
    gaps = np.random.default_rng(seed).exponential(1 / rate, n)
    return replace(made, due_s=np.cumsum(gaps) - gaps[0])


def solve(world: World, draws: int = 30) -> dict[str, Any]:
    """One scenario: three probes of the advisor's choice, its answer, and what the truth says of it.

    Noted beside it: when the stop rule would have ended the probing, and what the answer would have lost then.
    """
    true = sweep(world)
    data: list[RunData] = []
    command = quiet(world.asked, world.gpus)
    answer: Recommendation | None = None
    goodput = {f: s.goodput_per_s for f, s in true.items()}
    best = max(goodput.values())
    stopped: dict[str, Any] = {}
    made = []
    while len(data) < PROBES:
        made.append(f"{command['prefill']}:{command['decode']}@{command['rate_per_s'] / world.asked.rate_per_s:.2f}")
        data.append(probe(world, command, len(data) + 1))
        start = time.perf_counter()
        try:
            few = draws if len(data) == PROBES else draws // 2
            answer = would_say(data, world.asked, gpus=world.gpus, slo=world.slo, draws=few, seed=world.seed)
        except NotEnoughDataError:
            command = {**command, "rate_per_s": command["rate_per_s"] / 3}
            continue
        took = time.perf_counter() - start
        if answer.sure and not stopped:
            stopped = {"stopped_after": len(data), "stopped_regret": 1 - goodput[answer.best.fleet] / best}
        command = answer.next_probe
    losses = sorted(1 - g / best for g in goodput.values())
    row: dict[str, Any] = {
        "seed": world.seed,
        "broken": world.broken,
        "readings": world.readings,
        "gpus": world.gpus,
        "traffic": world.traffic,
        "load": world.load,
        "median_loss": float(np.median(losses)),
        "probes": len(data),
        "asked": made,
        "best": str(max(goodput, key=lambda f: goodput[f])),
    }
    if answer is None:
        return row | {"refused": "no law could be fitted", "regret": None}
    chosen = answer.best.fleet
    row |= stopped | {
        "expected_regret": answer.regret.value,
        "upper_regret": answer.regret.high,
        "sure": answer.sure,
        "chosen": str(chosen),
        "refused": answer.refused,
        "regret": 1 - goodput[chosen] / best,
        "p99_regret": p99_regret(true, chosen),
        "seconds": took,
        "baselines": {b.name: 1 - goodput[b.fleet] / best for b in answer.baselines},
        "errors": {name: [] for name in HELD},
    }
    measured = {d.run.fleet for d in data}
    for candidate in answer.candidates:
        summary = true[candidate.fleet]
        if candidate.fleet not in measured:
            for name, key in HELD.items():
                row["errors"][name].append(relative(candidate.figures[key].value, getattr(summary, key)))
    row |= intervals(answer, true)
    row["excess"] = answer.fit.calibration.excess
    return row


def ten_runs(world: World, runs: int = 12, draws: int = 24) -> dict[str, Any]:
    """A database that has grown: runs at random splits and rates. Leave one ratio out, and intervals at new splits.

    errors: of every run, predicted by laws fitted to the runs of other splits. covered: intervals of the answer at splits
    that none of the runs had, against the truth.
    """
    rng = np.random.default_rng([world.seed, 9])
    fleets = Fleet.splits(world.gpus)
    data = [probe(world, quiet(world.asked, world.gpus), 1)]
    while len(data) < runs:
        fleet = fleets[int(rng.integers(len(fleets)))]
        rate = world.asked.rate_per_s * float(rng.uniform(0.2, 1.2))
        command = {"prefill": fleet.prefill, "decode": fleet.decode, "rate_per_s": rate, "requests": 250}
        data.append(probe(world, command, len(data) + 1))
    row: dict[str, Any] = {"seed": world.seed, "broken": world.broken, "gpus": world.gpus, "ten": True}
    errors: dict[str, list[float]] = {name: [] for name in HELD}
    for fleet in sorted({d.run.fleet for d in data if d.run.fleet}):
        others, mine = [d for d in data if d.run.fleet != fleet], [d for d in data if d.run.fleet == fleet]
        try:
            laws = fit_laws(others, seed=world.seed, residuals=False).profile
        except NotEnoughDataError:
            continue
        for one in mine:
            ours = summarise(simulate(asked(one.observations), fleet, laws).observations, world.slo)
            theirs = summarise(one.observations, world.slo)
            for name, key in HELD.items():
                errors[name].append(relative(getattr(ours, key), getattr(theirs, key)))
    answer = would_say(data, world.asked, gpus=world.gpus, slo=world.slo, draws=draws, seed=world.seed)
    true = sweep(world)
    best = max(s.goodput_per_s for s in true.values())
    row |= {"errors": errors, "regret": 1 - true[answer.best.fleet].goodput_per_s / best, "refused": answer.refused}
    measured = {d.run.fleet for d in data}
    return row | intervals(answer, {f: s for f, s in true.items() if f not in measured})


def intervals(answer: Recommendation, true: dict[Fleet, Summary]) -> dict[str, dict[str, list[Any]]]:
    """covered: metric -> does the interval of each split hold the truth? width: metric -> its width over its value."""
    held: dict[str, list[Any]] = {}
    wide: dict[str, list[Any]] = {}
    for candidate in answer.candidates:
        for key, figure in candidate.figures.items():
            value = getattr(true.get(candidate.fleet), key, None)
            if value is None or not (math.isfinite(value) and value > 0 and math.isfinite(figure.low)):
                continue
            held.setdefault(key, []).append(bool(figure.low * (1 - 1e-9) <= value <= figure.high * (1 + 1e-9)))
            wide.setdefault(key, []).append(float((figure.high - figure.low) / max(figure.value, 1e-12)))
    return {"covered": held, "width": wide}


def p99_regret(true: dict[Fleet, Summary], chosen: Fleet) -> float:
    """P99 end to end against the split that the decision rule takes when it knows the truth; at least 0."""
    best = max(s.goodput_per_s for s in true.values())
    least = min(s.e2e_p99_s for s in true.values() if s.goodput_per_s >= best * (1 - NEAR))
    return max(0.0, true[chosen].e2e_p99_s / least - 1)


def relative(ours: float, theirs: float) -> float:
    """Absolute relative error."""
    return abs(ours / theirs - 1) if theirs > 0 and math.isfinite(ours) else math.nan


# --- the table -------------------------------------------------------------------------------------------------------


def percent(values: Iterable[float]) -> str:
    """Mean and maximum."""
    held = [v for v in values if v is not None and math.isfinite(v)]
    return f"mean {np.mean(held):7.2%}  max {max(held):7.2%}  (n={len(held)})" if held else "none"


def predicted(rows: Sequence[dict[str, Any]], what: str) -> list[str]:
    """Lines: errors of what was predicted, and how often its interval held the truth."""
    lines = []
    for name in HELD:
        errors = [e for r in rows for e in r.get("errors", {}).get(name, []) if math.isfinite(e)]
        if errors:
            middle, high = np.quantile(errors, [0.5, 0.9])
            lines.append(f"  {what}, {name:11} median {middle:6.1%}  p90 {high:7.1%}  (n={len(errors)})")
    for key in sorted({k for r in rows for k in r.get("covered", {})}):
        hits = [h for r in rows for h in r.get("covered", {}).get(key, [])]
        wide = [w for r in rows for w in r.get("width", {}).get(key, [])]
        width = f"  median width {np.median(wide):6.1%}" if wide else ""
        lines.append(f"  90 % interval of {key:18} covers {np.mean(hits):6.1%}{width}  (n={len(hits)})")
    return lines


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Everything that was found, in words and figures."""
    lines = []
    for title, part in (
        ("well specified", [r for r in rows if not r["broken"]]),
        ("misspecified", [r for r in rows if r["broken"]]),
    ):
        if not part:
            continue
        hard = [r for r in part if r["median_loss"] > EASY]
        easy = [r for r in part if r["median_loss"] <= EASY]
        said = [r for r in hard if not r["refused"]]
        held_back = [r for r in hard if r["refused"]]
        lines += [
            f"{title}: {len(part)} scenarios, {len(easy)} of them easy (median split loses <= {EASY:.0%})",
            f"  goodput regret, answered      {percent(r['regret'] for r in said)}",
            f"  goodput regret, had it not refused {percent(r['regret'] for r in held_back)}",
            f"  goodput regret, easy ones     {percent(r['regret'] for r in easy)}",
            f"  P99 regret, answered          {percent(r['p99_regret'] for r in said)}",
            f"  P99 regret, easy ones         {percent(r.get('p99_regret', math.nan) for r in easy)}",
            f"  refused                       {sum(bool(r['refused']) for r in part)} of {len(part)} "
            f"({sum(bool(r['refused']) for r in part) / len(part):.1%})",
            f"  stop rule                     in {sum('stopped_after' in r for r in part)} of {len(part)} after "
            f"{np.mean([r['stopped_after'] for r in part if 'stopped_after' in r] or [math.nan]):.2f} runs, regret then "
            f"{percent(r['stopped_regret'] for r in part if 'stopped_regret' in r)}",
        ]
        names = sorted({name for r in hard for name in r.get("baselines", {})})
        for name in names:
            lines.append(f"  regret of {name:20}{percent(r['baselines'][name] for r in hard if 'baselines' in r)}")
        lines += predicted(part, "error at unmeasured splits")
        took = [r["seconds"] for r in part if "seconds" in r]
        if took:
            lines.append(f"  seconds to recommend          median {np.median(took):.2f}  max {max(took):.2f}")
    return "\n".join(lines)


def ten_table(rows: Sequence[dict[str, Any]]) -> str:
    """The part with twelve runs a scenario."""
    lines = []
    for title, part in (
        ("well specified", [r for r in rows if not r["broken"]]),
        ("misspecified", [r for r in rows if r["broken"]]),
    ):
        if not part:
            continue
        lines.append(f"{title}, twelve runs each: {len(part)} scenarios")
        lines.append(f"  goodput regret                {percent(r['regret'] for r in part)}")
        lines += predicted(part, "leave one ratio out")
    return "\n".join(lines)


def one(seed: int, ten: bool = False) -> dict[str, Any]:
    """A scenario by seed, timed."""
    start = time.perf_counter()
    row = ten_runs(draw(seed)) if ten else solve(draw(seed))
    return row | {"whole_s": time.perf_counter() - start}


def main() -> None:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--scenarios", type=int, default=210)
    parser.add_argument(
        "--ten", type=int, default=24, help="scenarios with twelve runs, for intervals and left-out ratios"
    )
    parser.add_argument("--out", type=Path, default=Path("out/bench-advisor.jsonl"))
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    known = {(row["seed"], "ten" in row) for row in done}
    kind = "compiled" if str(kernel.__file__).endswith(".so") else "Python"
    print(
        f"{platform.platform()}, {joblib.cpu_count()} cores, Python {platform.python_version()}, numpy {np.__version__}, "
        f"scipy {scipy.__version__}, scikit-learn {sklearn.__version__}, kernel: {kind}",
        flush=True,
    )
    wanted = [(seed, False) for seed in range(options.scenarios)]
    for seed in range(options.ten):  # among the others, so that a run that is cut has some of both
        wanted.insert(min(len(wanted), seed * 7 + 6), (seed, True))
    todo = [pair for pair in wanted if pair not in known]
    work = joblib.Parallel(n_jobs=options.processes, return_as="generator_unordered")
    with options.out.open("a") as file:
        for row in work(joblib.delayed(one)(*pair) for pair in todo):
            done.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
    print(table([row for row in done if "ten" not in row and row["seed"] < options.scenarios]))
    print(ten_table([row for row in done if "ten" in row and row["seed"] < options.ten]))


if __name__ == "__main__":
    main()
