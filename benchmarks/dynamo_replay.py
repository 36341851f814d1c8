"""How good is the advice when the truth comes from code we did not write? NVIDIA Dynamo's offline replay decides.

    make bench-dynamo         (python -m benchmarks.dynamo_replay [--scenarios N] [--out FILE] [--python DYNAMO_PYTHON])

Truth is ``python -m dynamo.replay`` of ai-dynamo 1.4.2 (mock engines of vLLM's scheduling, its router, its timing model) on every
split of 4 to 8 workers. Its per-request report is imported like any other client's rows (loadgen/imports.py), the advisor
names the next run, and after three it answers. KV is roomy (150 to 600 mean requests a worker).
Results are lines of JSON in --out, one a scenario, so that a run that was cut goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import scipy
import sklearn

from advisor.advise import load
from advisor.features import RunData
from advisor.recommend import Recommendation
from advisor.study import quiet
from benchmarks.advisor import (
    EASY,
    HELD,
    PROBES,
    intervals,
    p99_regret,
    percent,
    predicted,
    relative,
    traffic,
    would_say,
)
from benchmarks.worlds import RECORDED, lognormal, windows
from loadgen.cluster import kernel
from loadgen.imports import observations, read, store_run
from traces.errors import InputError, NotEnoughDataError
from traces.measures import Slo, Summary, summarise
from traces.records import Fleet, Observations, Schedule
from traces.shape import LogNormal
from traces.store import Store, open_store

DYNAMO = "ai-dynamo==1.4.2"
HOME = Path("build/dynamo")
BLOCK = 64
"""Tokens of a KV block."""
TRACE_BLOCK = 512
"""Tokens of a hash id of the traces that Dynamo reads."""
BURST = 240
"""Requests that come at once to find how much a split can serve at all."""

NAMES = {
    "due_s": "arrival_time_ms",
    "sent_s": "arrival_time_ms",
    "first_token_s": "first_token_ms",
    "last_token_s": "last_token_ms",
    "prompt_tokens": "input_length",
    "output_tokens": "output_length",
    "status": "terminal_status",
}
"""What ``runs import --map`` calls the columns of a report of Dynamo's, in ms."""

_LOOP = """
import contextlib, io, json, sys
from dynamo.replay.main import main
for line in sys.stdin:
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            main(json.loads(line))
        said = ""
    except (Exception, SystemExit) as error:
        said = repr(error)
    print(json.dumps(said), flush=True)
"""
"""``python -m dynamo.replay`` again and again, without its second of imports: a line of arguments, a line of error or "" back."""


class Dynamo:
    """Dynamo's offline replay as a function, in a process of its own."""

    def __init__(self, python: Path) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.process = subprocess.Popen(
            [str(python), "-c", _LOOP],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "DYN_LOG": "error"},
        )

    def report(self, schedule: Schedule, fleet: Fleet, engine: Engine) -> Path:
        """The per-request report (JSONL) of the fleet on the schedule. No two prompts share a block."""
        trace, report = Path(self._folder.name) / "trace.jsonl", Path(self._folder.name) / "report.jsonl"
        used = 0
        with trace.open("w") as file:
            for due, n, m in zip(schedule.due_s, schedule.prompt_tokens, schedule.output_tokens, strict=True):
                blocks = -(-int(n) // TRACE_BLOCK)
                ids = list(range(used, used + blocks))
                used += blocks
                row = {"timestamp": round(due * 1e3), "input_length": int(n), "output_length": int(m), "hash_ids": ids}
                file.write(json.dumps(row) + "\n")
        arguments = [str(trace), "--report-jsonl", str(report), "--report-json", str(report) + ".whole"]
        arguments += ["--num-prefill-workers", str(fleet.prefill), "--num-decode-workers", str(fleet.decode)]
        arguments += ["--router-mode", engine.router]
        for role in ("prefill", "decode"):
            arguments += [f"--{role}-engine-args", json.dumps({**engine.arguments, "worker_type": role})]
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(arguments) + "\n")
        self.process.stdin.flush()
        said = json.loads(self.process.stdout.readline() or '"it ended"')
        if said:
            raise InputError(f"dynamo.replay failed: {said}")
        return report

    def rows(self, schedule: Schedule, fleet: Fleet, engine: Engine) -> Observations:
        """The same as observations, due at schedule zero."""
        (measured,) = read(self.report(schedule, fleet, engine), NAMES, "ms")
        return observations(measured)[0]

    def __enter__(self) -> Dynamo:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        self._folder.cleanup()


@dataclass(frozen=True)
class Engine:
    """Arguments of Dynamo's mock engines, and its router's mode."""

    router: str
    arguments: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Scenario:
    """What the advisor is asked, and what it is never told (engine, load). true: every split on the traffic asked about."""

    seed: int
    gpus: int
    traffic: str
    source: Any
    engine: Engine
    slo: Slo
    asked: Schedule
    load: float
    true: dict[Fleet, Summary] = field(default_factory=dict)


def draw(dynamo: Dynamo, seed: int) -> Scenario:
    """The scenario of a seed; drawn again while even the best split serves less than a tenth within the SLO."""
    for attempt in range(50):
        scenario = _draw(dynamo, seed, attempt)
        if max(s.attainment for s in scenario.true.values()) >= 0.1:
            return scenario
    raise InputError(f"seed {seed} makes no scenario")


def _draw(dynamo: Dynamo, seed: int, attempt: int) -> Scenario:
    rng = np.random.default_rng([seed, attempt, 142])

    def between(low: float, high: float) -> float:
        return float(rng.uniform(low, high))

    def over(low: float, high: float) -> float:
        return float(math.exp(rng.uniform(math.log(low), math.log(high))))

    gpus = int(rng.integers(4, 9))
    traffic = str(rng.choice(["lognormal", "lognormal", *RECORDED]))
    if traffic == "lognormal":
        prompt = LogNormal(math.log(over(300, 4000)), between(0.3, 1.0), 8, 16384)
        output = LogNormal(math.log(over(40, 400)), between(0.3, 0.9), 2, 2048)
        source = lognormal(prompt, output, str(rng.choice(["poisson", "gamma"])), between(1.3, 2.0))
    else:
        source = windows(traffic)
    n = max(600, 100 * gpus)
    asked = source(n, 1.0, seed * 7 + 2)
    context = float((asked.prompt_tokens + asked.output_tokens).mean())
    longest = int((asked.prompt_tokens + asked.output_tokens).max())
    arguments: dict[str, Any] = {
        "num_gpu_blocks": int(max(context * between(150, 600), 4 * longest) / BLOCK),
        "block_size": BLOCK,
        "enable_prefix_caching": False,
        "max_num_seqs": int(rng.choice([64, 128, 256])),
        "max_num_batched_tokens": int(rng.choice([2048, 4096, 8192, 16384])),
        "speedup_ratio": over(0.3, 2.0),
        "decode_speedup_ratio": over(0.3, 3.0),
    }
    if rng.random() < 0.5:
        arguments |= {"kv_bytes_per_token": 131072, "kv_transfer_bandwidth": over(4, 60)}  # GB/s
    engine = Engine(str(rng.choice(["round_robin", "kv_router"])), arguments)
    fleets = Fleet.splits(gpus)
    burst = replace(source(BURST, 1.0, seed * 7 + 1), due_s=np.zeros(BURST))
    able = max(BURST / float(np.nanmax(dynamo.rows(burst, f, engine).last_token_s)) for f in fleets)
    quiet = dynamo.rows(source(150, able * 0.1, seed * 7), Fleet(gpus // 2, gpus - gpus // 2), engine)
    ttft = float(np.nanquantile(quiet.ttft_s, 0.9)) * over(1.3, 6)
    tpot = float(np.nanquantile(quiet.tpot_s, 0.9)) * between(1.25, 2.5)
    load = between(0.3, 1.2)
    asked = source(n, able * load, seed * 7 + 2)
    slo = Slo((("ttft", ttft), ("tpot", tpot)))
    true = {fleet: summarise(dynamo.rows(asked, fleet, engine), slo) for fleet in fleets}
    return Scenario(seed, gpus, traffic, source, engine, slo, asked, load, true)


def probe(dynamo: Dynamo, store: Store, scenario: Scenario, command: dict[str, Any], number: int) -> RunData:
    """The run the advisor asked for, on other requests of the same traffic, imported into the store and read back."""
    fleet = Fleet(int(command["prefill"]), int(command["decode"]))
    schedule = traffic(scenario.source, command, scenario.seed * 7 + 3 + number)
    (measured,) = read(dynamo.report(schedule, fleet, scenario.engine), NAMES, "ms")
    run, _ = store_run(store, measured, name=f"probe {number}", fleet=fleet, engine="dynamo", slo=scenario.slo)
    return load(store, [run])[0]


def solve(dynamo: Dynamo, seed: int) -> dict[str, Any]:
    """One scenario: three runs of the advisor's choice, its answer, and what an exhaustive sweep says of it."""
    begun = time.perf_counter()
    scenario = draw(dynamo, seed)
    goodput = {f: s.goodput_per_s for f, s in scenario.true.items()}
    best = max(goodput.values())
    rate = scenario.asked.rate_per_s
    command = quiet(scenario.asked, scenario.gpus)
    data: list[RunData] = []
    made: list[str] = []
    answer: Recommendation | None = None
    took, why = math.nan, ""
    with open_store("sqlite:///:memory:") as store:
        while len(data) < PROBES:
            made.append(f"{command['prefill']}:{command['decode']}@{command['rate_per_s'] / rate:.2f}")
            data.append(probe(dynamo, store, scenario, command, len(data) + 1))
            start = time.perf_counter()
            try:
                answer = would_say(data, scenario.asked, gpus=scenario.gpus, slo=scenario.slo, draws=30, seed=seed)
            except NotEnoughDataError as error:
                why = str(error)
                command = {**command, "rate_per_s": command["rate_per_s"] / 3}
                continue
            took = time.perf_counter() - start
            command = answer.next_probe
    row: dict[str, Any] = {
        "seed": seed,
        "gpus": scenario.gpus,
        "traffic": scenario.traffic,
        "router": scenario.engine.router,
        "engine": scenario.engine.arguments,
        "slo": str(scenario.slo),
        "load": scenario.load,
        "median_loss": float(np.median([1 - g / best for g in goodput.values()])),
        "asked": made,
        "goodput": {str(f): g for f, g in goodput.items()},
        "best": str(max(goodput, key=lambda f: goodput[f])),
        "whole_s": time.perf_counter() - begun,
    }
    if answer is None:
        return row | {"refused": f"no law could be fitted: {why}", "regret": math.nan}
    chosen = answer.best.fleet
    measured = {d.run.fleet for d in data}
    unmeasured = [c for c in answer.candidates if c.fleet not in measured]
    return row | {
        "chosen": str(chosen),
        "refused": answer.refused,
        "sure": answer.sure,
        "expected_regret": answer.regret.value,
        "regret": 1 - goodput[chosen] / best,
        "p99_regret": p99_regret(scenario.true, chosen),
        "seconds": took,
        "baselines": {b.name: 1 - goodput[b.fleet] / best for b in answer.baselines},
        "errors": {
            name: [relative(c.figures[key].value, getattr(scenario.true[c.fleet], key)) for c in unmeasured]
            for name, key in HELD.items()
        },
        **intervals(answer, scenario.true),
        "excess": answer.fit.calibration.excess,
        "laws": answer.fit.profile.to_toml(),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Everything that was found, in words and figures."""
    hard = [r for r in rows if r["median_loss"] > EASY]
    said = [r for r in rows if not r["refused"]]
    held_back = [r for r in rows if r["refused"]]
    sure = [r for r in said if r["sure"]]
    lines = [
        f"{len(rows)} scenarios, {len(rows) - len(hard)} of them easy (median split loses <= {EASY:.0%})",
        f"  goodput regret, all answered  {percent(r['regret'] for r in said)}   bar: mean 2 %, max 8 %",
        f"  goodput regret, hard answered {percent(r['regret'] for r in said if r in hard)}",
        f"  of those it was sure of       {percent(r['regret'] for r in sure)}",
        f"  had it not refused            {percent(r['regret'] for r in held_back)}",
        f"  P99 regret, all answered      {percent(r['p99_regret'] for r in said)}",
        f"  refused                       {len(held_back)} of {len(rows)}, "
        f"{sum('regret' in r and math.isnan(r['regret']) for r in rows)} of them without any law",
    ]
    for name in sorted({name for r in hard for name in r.get("baselines", {})}):
        lines.append(
            f"  regret of {name:20}{percent(r['baselines'][name] for r in said if r in hard)}  (hard, answered)"
        )
    lines += predicted(rows, "error at unmeasured splits")
    took = [r["seconds"] for r in said]
    if took:
        lines.append(f"  seconds to recommend          median {np.median(took):.2f}  max {max(took):.2f}")
    return "\n".join(lines)


def one(python: Path, seed: int) -> dict[str, Any]:
    """A scenario by seed."""
    with Dynamo(python) as dynamo:
        return solve(dynamo, seed)


def environment(python: Path | None) -> Path:
    """Python of an environment with Dynamo: the one given, else build/dynamo, made from the registry where it is missing."""
    if python is None:
        python = HOME / "bin" / "python"
        if not python.exists():
            venv.create(HOME, with_pip=True)
        subprocess.run(
            [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", DYNAMO], check=True
        )
    return python


def version(python: Path) -> str:
    """Dynamo's version there; exits where it has none."""
    code = "from importlib.metadata import version; import dynamo.replay; print(version('ai-dynamo'))"
    found = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    if found.returncode:
        sys.exit(f"{python} has no dynamo.replay: {found.stderr.strip().splitlines()[-1]}. Install {DYNAMO} there.")
    return found.stdout.strip()


def main() -> None:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--scenarios", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path("out/bench-dynamo.jsonl"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--python", type=Path, help=f"Python with {DYNAMO}; without it {HOME} is made")
    options = parser.parse_args()
    python = environment(options.python)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    known = {row["seed"] for row in done}
    kind = "compiled" if str(kernel.__file__).endswith(".so") else "Python"
    print(
        f"{platform.platform()}, {joblib.cpu_count()} cores, Python {platform.python_version()}, numpy {np.__version__}, "
        f"scipy {scipy.__version__}, scikit-learn {sklearn.__version__}, kernel: {kind}, ai-dynamo {version(python)}",
        flush=True,
    )
    todo = [seed for seed in range(options.scenarios) if seed not in known]
    work = joblib.Parallel(n_jobs=options.processes, return_as="generator_unordered")
    with options.out.open("a") as file:
        for row in work(joblib.delayed(one)(python, seed) for seed in todo):
            done.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
    print(table([row for row in done if row["seed"] < options.scenarios]))


if __name__ == "__main__":
    main()
