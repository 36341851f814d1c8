"""Do 90 % intervals hold 90 % where ten runs or more say how far off the laws are? Worlds of twelve runs (benchmarks/worlds.py).

    python -m benchmarks.calibrated [--worlds 8] [--first 1]

Each run is of a random split, 300 requests at 0.3 to 1.1 times the rate asked about. Truth is an exhaustive simulation with the
true laws, of every split, also those that no run measured. A line a metric: splits whose truth the interval holds, its width (log
of high over low; median and largest), and the factor on the draws' reach that the runs asked for.
"""

from __future__ import annotations

import argparse
import math
import platform
import sys
from collections import defaultdict

import numpy as np

from advisor.recommend import conformal
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
    held: defaultdict[str, list[tuple[bool, float, float]]] = defaultdict(list)
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
        for one in answer.candidates:
            busiest = max(one.utilisation["prefill"], one.utilisation["decode"])
            for metric in METRICS:
                true, said = getattr(truth[one.fleet], metric), one.figures[metric]
                factor = conformal(answer.fit.scores.get(metric, []), busiest)
                if factor is not None and math.isfinite(true) and true > 0 and math.isfinite(said.low):
                    width = math.log(said.high / max(said.low, 1e-30))
                    held[metric].append((said.low <= true <= said.high, width, factor[0]))
        print(f"world {seed}: {len(answer.candidates)} splits", flush=True)
    for metric, found in held.items():
        hits, widths, factors = zip(*found, strict=True)
        wide = f"width {np.median(widths):.3f}, at most {max(widths):.1f}"
        asked = f"factor {np.median(factors):.2f}, at most {max(factors):.1f}"
        print(f"{metric:15} covers {np.mean(hits):5.1%} of {len(hits)}; {wide}; {asked}")
    print(f"{refused} worlds refused")
    return 0


if __name__ == "__main__":
    sys.exit(main())
