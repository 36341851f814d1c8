"""Known truth: what went through Locust into SQL against the reference endpoint's own log of the same requests.

Profile ``constant`` answers after 50 ms and then every 10 ms, whatever the load. Latencies are from sent. On a quiet
machine the medians agree within 1 ms and the 99th percentiles within 5 ms; exit code 1 when they do not.

    python -m benchmarks.known_truth [--rate 20] [--requests 400]
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import platform
import sys
import tempfile
import urllib.request

import numpy as np

from loadgen.cluster.embedded import embedded
from loadgen.replay import replay
from loadgen.swarm import Swarm
from traces.records import Fleet, Schedule
from traces.store import open_store


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=20.0)
    parser.add_argument("--requests", type=int, default=400)
    options = parser.parse_args()
    n = options.requests
    due = np.cumsum(np.random.default_rng(0).exponential(1 / options.rate, n))
    schedule = Schedule("truth", np.arange(n), due - due[0], np.full(n, 100), np.full(n, 20))
    with (
        tempfile.TemporaryDirectory() as folder,
        embedded("constant", Fleet(1, 1)) as url,
        Swarm(workers=2) as swarm,
        open_store(f"sqlite:///{folder}/truth.db") as store,
    ):
        run = replay(store, swarm, schedule, url)
        rows = store.observations(run.id)
        with urllib.request.urlopen(url + "/log", timeout=30) as answer:
            log = list(csv.DictReader(io.StringIO(answer.read().decode())))[-n:]
    theirs = {int(r["id"].rpartition("-")[2]): {k: float(v) for k, v in r.items() if k != "id"} for r in log}
    if not run.complete or run.counts != {"ok": n} or len(theirs) != n:
        print(f"the run is not whole: {run.counts}, {len(theirs)} in the log")
        return 1

    def server(end: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return np.array([theirs[i][end] - theirs[i]["arrive_s"] for i in rows.index])

    good = True
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.2f}"
    )
    print(f"{n} requests at {options.rate:g}/s; send lag p50 {run.lag_p50_ms:.2f} p99 {run.lag_p99_ms:.2f} ms")
    for what, ours, truth in (
        ("TTFT", rows.ttft_sent_s, server("first_s")),
        ("E2E", rows.e2e_sent_s, server("last_s")),
        ("decode", rows.last_token_s - rows.first_token_s, server("last_s") - server("first_s")),
    ):
        same = (ours - truth) * 1e3
        p50, p99 = (np.quantile(ours, q) * 1e3 - np.quantile(truth, q) * 1e3 for q in (0.5, 0.99))
        good = good and abs(p50) < 1 and abs(p99) < 5
        print(
            f"{what:7} ours p50 {np.quantile(ours, 0.5) * 1e3:.2f} p99 {np.quantile(ours, 0.99) * 1e3:.2f} ms; "
            f"off by {p50:+.3f} at p50, {p99:+.3f} at p99; request by request "
            f"p50 {np.quantile(same, 0.5):+.3f} p99 {np.quantile(same, 0.99):+.3f} max {same.max():+.3f} ms"
        )
    print("agrees" if good else "does not agree (1 ms at the median, 5 ms at p99)")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
