"""How fast is the cluster model? Simulated requests a second, and all splits of a fleet on one trace.

    make compiled && python -m benchmarks.simulator      (says whether the kernel is compiled)

Reference, timed in the same run: pushing and popping the same number of events on a heap, which any event-driven
simulation must do at least twice a request. Quote the ratio; absolute rates are this machine's.
"""

from __future__ import annotations

import heapq
import platform
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import numpy as np

from loadgen.cluster import Profile, kernel, simulate
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


def everything() -> Profile:
    """Demo laws with a KV limit that bites, preemption, chunks, a prefix cache, a link that is shared, a knee."""
    return replace(
        Profile.load("demo"),
        chunked=True,
        max_batch_tokens=1024,
        cache_tokens=200_000,
        prefill_route="prefix",
        transfer_link="sender",
        kv_tokens=7_000,
        kv_policy="preempt",
        knee_batch=12,
        knee_s=0.0005,
        flip_s=1.0,
    )


def with_heads(schedule: Schedule) -> Schedule:
    """Prompts of 128-token blocks that share heads: two hundred conversations."""
    rng = np.random.default_rng(2)
    blocks = np.empty(len(schedule), dtype=object)
    talks = rng.integers(200, size=len(schedule)).tolist()
    for i, (n, talk) in enumerate(zip(schedule.prompt_tokens.tolist(), talks, strict=True)):
        blocks[i] = tuple(talk * 1000 + k for k in range(n // 128 + 1))
    return replace(schedule, blocks=blocks, block_tokens=128)


def p99_of(what: tuple[Schedule, Fleet, Profile]) -> float:
    """One split, in a process of a pool."""
    return float(np.quantile(simulate(*what).observations.e2e_s, 0.99))


def main() -> None:
    """Print the table."""
    kind = "compiled" if kernel.__file__.endswith(".so") else "Python"
    print(f"{platform.platform()}, Python {platform.python_version()}, numpy {np.__version__}, kernel: {kind}")
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
    busy = everything()
    fleet = Fleet(2, 5, 1)
    schedule = with_heads(loaded(trace, busy, fleet, 0.8))
    span = schedule.span_s
    changes = [(span * k / 50, fleet if k % 2 else Fleet(3, 4, 1)) for k in range(1, 50)]
    rates = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        result = simulate(schedule, fleet, busy, changes=changes)
        rates.append(REQUESTS / (time.perf_counter() - start))
    median = statistics.median(rates)
    label = "switches, KV limit, prefix cache on, requests/s"
    print(f"{label:44} {median:12,.0f} {min(rates):12,.0f} {max(rates):12,.0f}   {median * base / REQUESTS:.3f}")
    print(
        f"    ({len(result.switches)} switches, {result.preempted} preemptions, "
        f"{result.cached_tokens / schedule.prompt_tokens.sum():.0%} of prompt tokens cached)"
    )
    profile = Profile.load("demo")
    long = synthesize(2 * REQUESTS, ORIGIN_PROMPT, ORIGIN_OUTPUT, rate_per_s=10, seed=1)
    schedule = loaded(long, profile, Fleet(8, 24), 0.8)
    start = time.perf_counter()
    with ProcessPoolExecutor(2) as pool:
        list(pool.map(p99_of, [(schedule, f, profile) for f in Fleet.splits(32)]))
    took = time.perf_counter() - start
    print(f"{'31 splits of 32 GPUs, seconds':44} {took:12.1f}   two processes, {len(schedule)} requests each")


if __name__ == "__main__":
    main()
