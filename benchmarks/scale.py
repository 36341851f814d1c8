"""How long ``steelyard advise`` takes at 32 GPUs from 100,000 stored requests, and from ten million.

    python -m benchmarks.scale [--rows 100000 10000000] [--n 5] [--folder build/scale]

Four simulated runs of a quarter of the rows each (a quiet one, one that fills prefill, one that fills decode, one near the
answer), profile llama2-70b-h100, half a millisecond of noise on each stamp; requests beyond 25,000 a run are those again, later.
They are kept in --folder, so a second call asks at once. Each answer is the command itself, in a process of its own, as often as
--n says: wall and CPU seconds (median, least to most), peak memory. Strategy static is the split alone; auto (the default of the
command) also studies windows and strategies.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import sklearn

from loadgen.cluster import Profile, simulate
from traces.measures import counts
from traces.records import Fleet, Observations, Run, Schedule
from traces.shape import LogNormal
from traces.store import open_store

PROFILE, SLO, GPUS = "llama2-70b-h100", "ttft<1s tpot<60ms", 32
BARS = {100_000: 10.0, 10_000_000: 60.0}
"""Seconds of an answer that issue and house ask for, on two cores."""

CYCLE, BATCH = 25_000, 25_000
_STAMPS = ("due_s", "dispatch_s", "sent_s", "first_byte_s", "first_token_s", "last_token_s")


def cells(laws: Profile) -> list[tuple[Fleet, float]]:
    """(fleet, requests a second) of the four runs, as shares of the highest rate that 12:20 sustains."""
    top = 1.0
    for rate in np.geomspace(1, 400, 30):
        rows = simulate(asked(1500, rate, 9), Fleet(12, 20), laws).observations
        if float(np.quantile(rows.ttft_s, 0.9)) > 1.0:
            break
        top = float(rate)
    return [
        (Fleet(16, 16), 0.1 * top),
        (Fleet(6, 26), 0.9 * top),
        (Fleet(24, 8), 0.8 * top),
        (Fleet(12, 20), 0.85 * top),
    ]


def asked(n: int, rate: float, seed: int) -> Schedule:
    rng = np.random.default_rng(seed)
    lengths = LogNormal(7.0, 0.8, 10, 8192).draw(n, rng), LogNormal(5.0, 0.7, 4, 2048).draw(n, rng)
    return Schedule("scale", np.arange(n), np.cumsum(rng.exponential(1 / rate, n)), *lengths)


def pieces(n: int, fleet: Fleet, rate: float, laws: Profile, seed: int) -> Iterator[Observations]:
    of = simulate(asked(min(n, CYCLE), rate, seed), fleet, laws).observations
    jitter = np.random.default_rng(seed).exponential(5e-4, len(of))
    of = replace(of, first_token_s=of.first_token_s + jitter, last_token_s=of.last_token_s + jitter)
    span = float(of.last_token_s.max()) + 1 / rate
    for start in range(0, n, BATCH):
        which = np.arange(start, min(start + BATCH, n))
        rows, later = of.take(which % len(of)), which // len(of) * span
        yield replace(rows, index=which, **{c: getattr(rows, c) + later for c in _STAMPS})


def keep(url: str, rows: int) -> None:
    """Store four runs, if they are not there."""
    laws = Profile.load(PROFILE)
    with open_store(url) as store:
        if len([run for run in store.runs() if run.ended]) == 4:
            return
        for seed, (fleet, rate) in enumerate(cells(laws)):
            n = rows // 4
            run = store.begin_run(
                Run(f"{fleet} at {rate:.3g}/s", "scale", f"{seed}" * 64, n, "http://x", "openai", "m", fleet, float(seed), 2,
                    slo=SLO, rate_per_s=rate, complete=True, verdict="valid", lag_p50_ms=0.1, lag_p99_ms=1.0, lag_max_ms=2.0)
            )  # fmt: skip
            done: dict[str, int] = {}
            for piece in pieces(n, fleet, rate, laws, seed):
                store.add_observations(run.id, piece)
                for word, number in counts(piece).items():
                    done[word] = done.get(word, 0) + number
            store.end_run(replace(run, counts=done))


def ask(url: str, strategy: str) -> tuple[float, float, float, dict[str, object]]:
    """(wall s, CPU s, peak MiB, the answer) of one command."""
    command = [
        sys.executable,
        "-m",
        "steelyard",
        "advise",
        "--gpus",
        str(GPUS),
        "--strategy",
        strategy,
        "--db",
        url,
        "--json",
    ]
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        assert child.stdout is not None
        out = child.stdout.read()
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - began
    answer = json.loads(out)
    if child.returncode not in (0,):
        raise SystemExit(f"advise ended with {child.returncode}: {answer}")
    return wall, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=list(BARS))
    parser.add_argument("--n", type=int, default=5)
    parser.add_argument("--strategy", nargs="+", default=["static", "auto"])
    parser.add_argument("--folder", type=Path, default=Path("build/scale"))
    parser.add_argument("--only-keep", action="store_true", help="make the databases and ask nothing")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    print(
        f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}, numpy {np.__version__}, "
        f"scikit-learn {sklearn.__version__}; SQLite; {GPUS} GPUs, four runs"
    )
    for rows in given.rows:
        url = f"sqlite:///{given.folder}/{rows}.db"
        keep(url, rows)
        for strategy in () if given.only_keep else given.strategy:
            held = [ask(url, strategy) for _ in range(given.n)]
            said = held[0][3]
            bar = f"; bar {BARS[rows]:g} s" if rows in BARS else ""
            parts = [
                f"{word} {statistics.median(v):.1f} s ({min(v):.1f} to {max(v):.1f})"
                for word, v in (("wall", [h[0] for h in held]), ("CPU", [h[1] for h in held]))
            ]
            print(
                f"{rows:>10,} rows, {strategy:6}: {', '.join(parts)}, peak {max(h[2] for h in held):.0f} MiB, n = {given.n}"
                f"{bar}; answer {said['prefill']}:{said['decode']}",
                flush=True,
            )


if __name__ == "__main__":
    main()
