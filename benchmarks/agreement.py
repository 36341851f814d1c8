"""Does the served endpoint do what the simulator says? One model, two clocks, all profiles, loads from 0.3 to 1.2.

    python -m benchmarks.agreement [--profile NAME] [--seconds 20]

Each cell replays log-normal traffic through Locust and SQL against the served endpoint, and simulates the same requests
twice: as they reached the server's kernel (its /log), and at the trace's due times. Shown: (measured - simulated) /
simulated for the median and the p99 of TTFT, TPOT and E2E. Against the first, what is left is the wire, the client and
the timer (TTFT and E2E also in ms). Against the second comes what a millisecond's delay of an arrival changes: near
saturation a request then joins another worker, and p99 of a few hundred requests moves.
A cell in which the endpoint wrote its tokens more than 5 ms late at p99 is rejected and measured again once. Profiles
too fast for two cores run at a speed below 1, on fewer workers.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import platform
import tempfile
import urllib.request
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
            with urllib.request.urlopen(f"{url}/log", timeout=30) as answer:
                log = list(csv.DictReader(io.StringIO(answer.read().decode())))
        if run.verdict == "valid" and run.counts == {"ok": n}:
            break
        print(f"  rejected: {run.reason}" + ("" if attempt else "; again"))
    else:
        return f"{profile.name:16} {fleet!s:5} {load:4.1f}  rejected twice"
    measured = scaled(store.observations(run.id), speed)  # type: ignore[attr-defined]
    heard = {int(row["id"].rpartition("-")[2]): float(row["model_arrive_s"]) for row in log[-n:]}
    arrive = np.array([heard[i] for i in range(n)]) * speed
    order = np.argsort(arrive, kind="stable")
    # The two clocks have different zeros: the quickest request is taken to have arrived when it was sent.
    zero = float(np.min(arrive - measured.sent_s))
    seen = replace(
        schedule,
        index=schedule.index[order],
        due_s=np.maximum(0.0, arrive[order] - zero),
        prompt_tokens=schedule.prompt_tokens[order],
        output_tokens=schedule.output_tokens[order],
    )
    as_heard = simulate(seen, fleet, profile).observations
    as_heard = replace(as_heard.take(np.argsort(order)), due_s=schedule.due_s)
    as_due = simulate(schedule, fleet, profile).observations
    line = f"{profile.name:16} {fleet!s:5} {load:4.1f} {speed:5.2f} {n:5d} "
    for model in (as_heard, as_due):
        for name in ("ttft_s", "tpot_s", "e2e_s"):
            for q in (0.5, 0.99):
                a, b = quantile(getattr(measured, name), q), quantile(getattr(model, name), q)
                line += f" {a / b - 1:+7.2%}"
                if name != "tpot_s" and model is as_heard:
                    line += f" ({(a - b) * 1e3:+5.1f})"
        line += " |"
    return line


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", choices=list(CELLS))
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    print(
        f"{platform.platform()}, Python {platform.python_version()}, {os.cpu_count()} cores; times in model seconds, ms in ()"
    )
    print(f"{'':34} against arrivals as heard{'':63} | against due times")
    print(
        f"{'profile':16} {'P:D':5} load speed     n  TTFT p50 (ms)    p99 (ms)      TPOT p50     p99  E2E p50 (ms)"
        "    p99 (ms)      |  TTFT p50     p99 TPOT p50     p99  E2E p50     p99"
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
