"""How many streams can be open at once, what does one hold, and what do two workers cost beside one?

    python -m benchmarks.streams [--open 10000] [--repeats 3]
    python -m benchmarks.streams --minutes 60

First: one worker on core 1 opens ``--open`` streams against the ground-truth server of :mod:`benchmarks.client` (a token each
200 ms); memory is the worker's peak resident set less what it held before the run, over the streams that were open at
once by the server's log. The schedule and the finished rows are in it. Then: the same 800 requests/s from one worker and
from two, both on core 1, in turn; CPU seconds of all workers per 1000 tokens, and the ratio of the medians. (How much
faster two workers are on two cores follows from that ratio; it is derived, not measured.) With ``--minutes``: one replay of
that length at 50 requests/s instead, and the memory of worker and master at its tenths.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.client import OUTPUT, PROMPT, Truth
from loadgen.replay import replay
from loadgen.swarm import Outcome, Swarm
from traces.records import Schedule
from traces.store import open_store

ITL_MS = 200.0


def resident(pid: int, what: str = "VmRSS") -> float:
    """Mebibytes of a process, now (VmRSS) or at most so far (VmHWM)."""
    return int(Path(f"/proc/{pid}/status").read_text().partition(f"{what}:")[2].split()[0]) / 1024


def run(port: int, due: Any, output: int, workers: int, folder: Path) -> dict[str, Any]:
    """One replay with the workers on core 1."""
    n = len(due)
    schedule = Schedule("bench", np.arange(n), due, np.full(n, PROMPT), np.full(n, output))
    outcomes: list[Outcome] = []
    os.sched_setaffinity(0, {1})
    with Swarm(workers=workers) as swarm:
        for task in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(task), {0})
        pids = list(swarm.processes.values())
        peak: list[float] = []
        own: list[float] = []
        before = sum(map(resident, pids))
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(0.25):
                peak.append(sum(map(resident, pids)))
                own.append(resident(os.getpid()))

        thread = threading.Thread(target=watch)
        thread.start()
        with open_store(f"sqlite:///{folder}/s-{time.monotonic_ns()}.db") as store:
            done = replay(store, swarm, schedule, f"http://127.0.0.1:{port}", on_outcome=outcomes.append)
            rows = store.observations(done.id)
        stop.set()
        thread.join()
    ends = rows.last_token_s[rows.ok]
    edges = np.concatenate([np.c_[rows.sent_s[rows.ok], np.ones(len(ends))], np.c_[ends, -np.ones(len(ends))]])
    at_once = int(np.cumsum(edges[np.argsort(edges[:, 0], kind="stable"), 1]).max())
    cpu = sum(c["cpu_s"] for c in outcomes[0].costs.values())
    return {
        "run": done,
        "at_once": at_once,
        "worker": peak,
        "master": own,
        "grown": max(peak) - before,
        "before": before,
        "cpu": cpu / (n * output) * 1000,
    }


def long(port: int, minutes: float, folder: Path) -> None:
    """One replay at 50 requests/s, and what worker and master held at its tenths."""
    due = np.cumsum(np.random.default_rng(0).exponential(1 / 50, int(minutes * 3000)))
    found = run(port, due - due[0], 16, 1, folder)
    done = found["run"]
    print(f"{len(due):,} requests in {due[-1] / 60:.0f} min at 50/s: {done.counts}, {done.verdict}, lag p99", end=" ")
    print(f"{done.lag_p99_ms:.2f} ms")
    for name in ("worker", "master"):
        held = np.array(found[name])
        tenths = " ".join(f"{np.median(part):.0f}" for part in np.array_split(held, 10))
        print(f"{name}: MiB, the median of each tenth of the run: {tenths}; at most {held.max():.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--open", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--minutes", type=float, help="one long replay instead")
    options = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print(
        f"{platform.platform()}, Python {platform.python_version()}, {os.cpu_count()} cores, {hard} open files allowed"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.minutes:
            truth = Truth(folder)
            try:
                long(truth.port, options.minutes, folder)
            finally:
                truth.stop()
            return
        truth = Truth(folder, ITL_MS)
        try:
            n = options.open
            rate, answer = n / 10, 75  # 15 s an answer: all that were sent within 10 s are open then
            found = run(truth.port, np.arange(n) / rate, answer, 1, folder)
            print(
                f"{found['at_once']:,} streams open at once: {found['grown']:.0f} MiB more than before ({found['before']:.0f}), "
                f"{found['grown'] * 1024 / found['at_once']:.1f} KiB a stream; {found['run'].counts}, lag p99 "
                f"{found['run'].lag_p99_ms:.2f} ms",
                flush=True,
            )
        finally:
            truth.stop()
        truth = Truth(folder)
        costs: dict[int, list[float]] = {1: [], 2: []}
        try:
            for k in range(options.repeats):
                due = np.cumsum(np.random.default_rng(k).exponential(1 / 800, 4800))
                for workers in (1, 2) if k % 2 == 0 else (2, 1):
                    costs[workers].append(run(truth.port, due - due[0], OUTPUT, workers, folder)["cpu"])
        finally:
            truth.stop()
        for workers, values in costs.items():
            spread = f"{statistics.median(values):.4f} ({min(values):.4f}-{max(values):.4f})"
            print(f"{workers} worker(s): {spread} CPU-s per 1000 tokens")
        ratio = statistics.median(costs[2]) / statistics.median(costs[1])
        print(f"ratio of the medians {ratio:.3f}, n {options.repeats} each")


if __name__ == "__main__":
    main()
