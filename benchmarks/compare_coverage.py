"""How often is `steelyard compare` wrong? Pairs of runs of one queue, and how often it finds a slower one.

    python -m benchmarks.compare_coverage [--pairs 400]

Both runs of a pair ask the same schedule of a single server with a queue (Poisson arrivals, exponential service drawn anew), so
whatever differs is chance: a 90 % interval should leave out "no difference" in 10 % of pairs. Then the same with service that
takes 15 % longer in the second run: how often is that found? The give-or-take of a share is its standard error.
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from dataclasses import replace

import numpy as np

from advisor.compare import binned, compare
from tests.test_compare import queue
from tests.test_features import run_of
from traces import __version__
from traces.measures import Slo
from traces.records import Fleet

SLO = Slo.parse("ttft<0.5s tpot<50ms")
METRICS = (
    "goodput_per_s",
    "throughput_per_s",
    "output_tokens_per_s",
    "ttft_p50_s",
    "ttft_p90_s",
    "ttft_p99_s",
    "e2e_p90_s",
    "e2e_p99_s",
    "attainment",
)
CASES = ((0.5, 3000), (0.7, 3000), (0.7, 10_000), (0.9, 3000), (0.9, 10_000))
"""(load, requests at 10/s)."""


def shares(load: float, n: int, slower: float, pairs: int) -> tuple[dict[str, float], float]:
    """(metric -> share of pairs with a verdict, share of pairs that were too short for one)."""
    run = replace(run_of(Fleet(2, 2)), id=1, trace="t", schedule_digest="d", slo=str(SLO))
    told, short = dict.fromkeys(METRICS, 0), 0
    for k in range(pairs):
        # Draws that the tests do not use.
        seed, traffic = 1_999_003 + 2 * k, 10_000 + k
        a = binned(run, queue(seed, 1.0, n, load, traffic), SLO)
        b = binned(replace(run, id=2), queue(seed + 1, slower, n, load, traffic), SLO)
        found = {d.metric: d for d in compare(a, b).differences}
        short += bool(found["ttft_p50_s"].why)
        for metric in METRICS:
            told[metric] += found[metric].verdict != "cannot tell"
    return {metric: count / pairs for metric, count in told.items()}, short / pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=400)
    parser.add_argument("--only", default="", help="a load and a number of requests, e.g. 0.9,3000")
    options = parser.parse_args()
    pairs = options.pairs
    print(f"steelyard {__version__}, {platform.platform()}, Python {platform.python_version()}, numpy {np.__version__}")
    give = 100 * math.sqrt(0.1 * 0.9 / pairs)
    print(f"n {pairs} pairs a row; a share of 10 % is known to {give:.1f} points\n")
    print(
        f"| load | requests | second run | {' | '.join(m.removesuffix('_s') for m in METRICS)} | too short | s a pair |"
    )
    print(f"|{' --- |' * (5 + len(METRICS))}")
    for load, n in CASES:
        if options.only not in ("", f"{load:g},{n}"):
            continue
        for slower in (1.0, 1.15) if load < 0.87 else (1.0,):
            began = time.perf_counter()
            found, short = shares(load, n, slower, pairs)
            took = (time.perf_counter() - began) / pairs
            cells = " | ".join(f"{found[m]:.1%}" for m in METRICS)
            word = "the same" if slower == 1.0 else f"{slower - 1:.0%} slower"
            print(f"| {load:.0%} | {n:,} | {word} | {cells} | {short:.1%} | {took:.3f} |", flush=True)


if __name__ == "__main__":
    main()
