"""Does the served endpoint do what the simulator says? One model, two clocks, all profiles, loads from 0.3 to 1.2.

    python -m benchmarks.agreement [--profile NAME] [--seconds 20]

Each cell replays log-normal traffic through Locust and SQL against the served endpoint, and simulates the same schedule.
Shown: (measured - simulated) / simulated for the median and the p99 of TTFT, TPOT and E2E, TTFT and E2E also in ms, since
what is left is the wire and the timer. A cell in which the endpoint wrote its tokens more than 5 ms late at p99 is
rejected and measured again once. Profiles too fast for two cores run at a speed below 1, on fewer workers.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from dataclasses import replace

import numpy as np

from advisor.strategies import scaled
from loadgen.cluster import Profile, simulate
from loadgen.cluster.embedded import embedded
from loadgen.replay import replay
from loadgen.swarm import Swarm
from traces.measures import quantile
from traces.records import Fleet
from traces.shape import LogNormal, synthesize
from traces.store import open_store

CELLS = {
    # profile: (fleet, speed)
    "demo": (Fleet(2, 6), 1.0),
    "origin": (Fleet(3, 5), 4.0),
    "llama-8b-h100": (Fleet(1, 2), 0.5),
    "llama-70b-h100": (Fleet(1, 3), 1.0),
    "llama2-70b-a100": (Fleet(1, 3), 1.0),
    "llama2-70b-h100": (Fleet(1, 3), 1.0),
}
LOADS = (0.3, 0.6, 0.9, 1.2)
PROMPT, OUTPUT = LogNormal(6.0, 1.0, 10, 4096), LogNormal(4.0, 0.6, 10, 400)
MOST_TOKENS_PER_S = 8000.0
"""Output tokens a second of wall clock that the endpoint, Locust and the worker share two cores for."""


def capacity(profile: Profile, fleet: Fleet) -> float:
    """Requests a second when 2,000 are all there at once."""
    burst = synthesize(2000, PROMPT, OUTPUT, rate_per_s=1, arrivals="burst", seed=9)
    return len(burst) / float(simulate(burst, fleet, profile).observations.last_token_s.max())


def cell(store: object, swarm: Swarm, profile: Profile, fleet: Fleet, speed: float, load: float, seconds: float) -> str:
    """One line of the table."""
    rate = load * capacity(profile, fleet)
    speed = min(speed, MOST_TOKENS_PER_S / (rate * 66))
    n = max(40, int(rate * speed * seconds))
    schedule = synthesize(n, PROMPT, OUTPUT, rate_per_s=rate, seed=int(load * 10))
    asked = replace(schedule, due_s=schedule.due_s / speed)
    for attempt in range(2):
        with embedded(profile.name, fleet, speed=speed) as url:
            run = replay(store, swarm, asked, url, name=f"{profile.name} {load}", timeout_s=300.0)  # type: ignore[arg-type]
        if run.verdict != "invalid":
            break
        print(f"  rejected: {run.reason}" + ("" if attempt else "; again"))
    else:
        return f"{profile.name:16} {fleet!s:5} {load:4.1f}  rejected twice"
    measured = scaled(store.observations(run.id), speed)  # type: ignore[attr-defined]
    model = simulate(schedule, fleet, profile)
    line = f"{profile.name:16} {fleet!s:5} {load:4.1f} {speed:5.2f} {n:5d} "
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        for q in (0.5, 0.99):
            a, b = quantile(getattr(measured, name), q), quantile(getattr(model.observations, name), q)
            line += f" {a / b - 1:+7.2%}"
            if name != "tpot_s":
                line += f" ({(a - b) * 1e3:+6.1f})"
    off = np.abs(measured.ttft_s - model.observations.ttft_s)
    return line + f"  row by row |TTFT| p50 {np.median(off) * 1e3:.1f} p99 {np.quantile(off, 0.99) * 1e3:.1f} ms"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", choices=list(CELLS))
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    print(
        f"{platform.platform()}, Python {platform.python_version()}, {os.cpu_count()} cores; times in model seconds, ms in ()"
    )
    print(
        f"{'profile':16} {'P:D':5} load speed     n  TTFT p50 (ms)      p99 (ms)       TPOT p50 p99     E2E p50 (ms)    p99 (ms)"
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        open_store(f"sqlite:///{folder}/a.db") as store,
        Swarm(workers=1) as swarm,
    ):
        for name, (fleet, speed) in CELLS.items():
            if options.profile in (None, name):
                for load in LOADS:
                    print(cell(store, swarm, Profile.load(name), fleet, speed, load, options.seconds), flush=True)


if __name__ == "__main__":
    main()
