"""Do 90 % intervals hold 90 % where ten runs or more say how far off the laws are? Worlds of twelve runs (benchmarks/worlds.py).

    python -m benchmarks.calibrated [--worlds 8] [--first 1]

Each run is of a random split, 300 requests at 0.3 to 1.1 times the rate asked about. Truth is an exhaustive simulation with the
true laws, of every split, also those that no run measured. A line a metric: splits whose truth the interval holds; its width (log
of high over low; median and largest of those that do not begin at 0, and how many do); how far off a run is in the draws'
reaches, as a median over all runs and at most.
"""

from __future__ import annotations

import argparse
import math
import platform
import sys
from collections import defaultdict

import numpy as np

from benchmarks.advisor import would_say
from benchmarks.worlds import draw, sweep
from traces import __version__
from traces.errors import NotEnoughDataError

RUNS, REQUESTS = 12, 300
METRICS = ("goodput_per_s", "ttft_p99_s", "tpot_p50_s", "e2e_p99_s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, default=8)
    parser.add_argument("--first", type=int, default=1, help="seed of the first world")
    options = parser.parse_args()
    print(f"steelyard {__version__}, {platform.platform()}, Python {platform.python_version()}, numpy {np.__version__}")
    held: defaultdict[str, list[tuple[bool, float]]] = defaultdict(list)
    off: defaultdict[str, list[float]] = defaultdict(list)
    refused = 0
    for seed in range(options.first, options.first + options.worlds):
        world, rng = draw(seed), np.random.default_rng(seed)
        truth = sweep(world)
        fleets, data = list(truth), []
        for k in range(RUNS):
            fleet = fleets[rng.integers(len(fleets))]
            rate = world.asked.rate_per_s * rng.uniform(0.3, 1.1)
            data.append(world.measured(world.source(REQUESTS, rate, seed * 7 + 3 + k), fleet, k))
        try:
            answer = would_say(data, world.asked, gpus=world.gpus, slo=world.slo, draws=20, seed=seed)
        except NotEnoughDataError:
            refused += 1
            continue
        for metric in METRICS:
            scores = answer.fit.scores.get(metric, [])
            off[metric] += [away / width for _, away, width in scores]
            for one in answer.candidates if scores else ():
                true, said = getattr(truth[one.fleet], metric), one.figures[metric]
                if math.isfinite(true) and true > 0 and math.isfinite(said.low):
                    width = math.log(said.high / said.low) if said.low > 0 else math.inf
                    held[metric].append((said.low <= true <= said.high, width))
        print(f"world {seed}: {len(answer.candidates)} splits", flush=True)
    for metric, found in held.items():
        widths = [width for _, width in found if math.isfinite(width)]
        wide = f"width {np.median(widths):.3f}, at most {max(widths):.1f}, {len(found) - len(widths)} from 0"
        asked = f"runs are off by {np.median(off[metric]):.2f} reaches, at most {max(off[metric]):.1f}"
        print(f"{metric:15} covers {np.mean([hit for hit, _ in found]):5.1%} of {len(found)}; {wide}; {asked}")
    print(f"{refused} worlds refused")
    return 0


if __name__ == "__main__":
    sys.exit(main())
