"""How fast is the cluster model? Simulated requests a second, and all splits of a fleet on one trace.

    python -m benchmarks.simulator

Reference, timed in the same run: pushing and popping the same number of events on a heap, which any event-driven
simulation must do at least twice a request. Quote the ratio; absolute rates are this machine's.
"""

from __future__ import annotations

import heapq
import platform
import statistics
import time
from dataclasses import replace

import numpy as np

from loadgen.cluster import Profile, simulate
from traces.records import Fleet, Schedule
from traces.shape import ORIGIN_OUTPUT, ORIGIN_PROMPT, synthesize

ROUNDS = 5
REQUESTS = 50_000


def reference(n: int) -> float:
    """Seconds for two heap operations a request on a heap of a hundred."""
    due = np.random.default_rng(0).exponential(1.0, 2 * n).cumsum().tolist()
    start = time.perf_counter()
    heap = [(t, i) for i, t in enumerate(due[:100])]
    for i, t in enumerate(due[100:]):
        heapq.heappush(heap, (t, i))
        heapq.heappop(heap)
    return time.perf_counter() - start


def loaded(schedule: Schedule, profile: Profile, fleet: Fleet, share: float) -> Schedule:
    """The schedule at a share of what the fleet can serve at all."""
    burst = replace(schedule, due_s=np.zeros(len(schedule)))
    capacity = len(burst) / float(simulate(burst, fleet, profile).observations.last_token_s.max())
    return replace(schedule, due_s=schedule.due_s * (schedule.rate_per_s / (share * capacity)))


def main() -> None:
    """Print the table."""
    print(f"{platform.platform()}, Python {platform.python_version()}, numpy {np.__version__}")
    trace = synthesize(REQUESTS, ORIGIN_PROMPT, ORIGIN_OUTPUT, rate_per_s=10, seed=1)
    print(f"{'what':44} {'median':>12} {'min':>12} {'max':>12}   ratio to reference")
    base = statistics.median(reference(REQUESTS) for _ in range(ROUNDS))
    print(f"{'reference: two heap operations, requests/s':44} {REQUESTS / base:12,.0f}")
    for name, fleet, share in (("demo", Fleet(2, 6), 0.8), ("demo", Fleet(2, 6), 0.3), ("origin", Fleet(3, 5), 0.8)):
        profile = Profile.load(name)
        schedule = loaded(trace, profile, fleet, share)
        rates = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            simulate(schedule, fleet, profile)
            rates.append(REQUESTS / (time.perf_counter() - start))
        median = statistics.median(rates)
        label = f"{name} {fleet} at {share} of capacity, requests/s"
        print(f"{label:44} {median:12,.0f} {min(rates):12,.0f} {max(rates):12,.0f}   {median * base / REQUESTS:.3f}")
    profile = Profile.load("demo")
    schedule = loaded(trace, profile, Fleet(8, 24), 0.8)
    start = time.perf_counter()
    for fleet in Fleet.splits(32):
        simulate(schedule, fleet, profile)
    took = time.perf_counter() - start
    print(f"{'31 splits of 32 GPUs, seconds':44} {took:12.1f}   one process, {REQUESTS} requests each")


if __name__ == "__main__":
    main()
