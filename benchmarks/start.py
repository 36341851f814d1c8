"""How soon does a long trace begin? From the command to the arrival of its first request, at the ground-truth server.

``steelyard replay`` of a synthetic trace of ``--requests``, two workers, against the server of :mod:`benchmarks.client`, which
logs when each request arrived; then it is stopped by Ctrl-C. Beside every start, in the same run: how long the interpreter
alone takes (``python -c pass``) and how long ``import locust`` takes, which master and workers cannot do without.

    python -m benchmarks.start [--requests 10000000] [--workers 2] [--repeats 5] [--db FILE]

``--db``: keep the trace in this SQLite file, and take it from there the next time (ten million take a minute to make).
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from benchmarks.client import Truth

BAR_S = 5.0
MOST_S = 60.0


def clocked(code: str) -> float:
    """Seconds that a new interpreter takes for ``code``."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.monotonic() - began


def first_of(truth: Truth, since: float) -> float | None:
    """When the first request of a run (``X-Request-Id: RUN-POSITION``) came after ``since``; both Unix seconds."""
    with truth.file.open() as file:
        came = [float(r["arrive_s"]) for r in csv.DictReader(file) if re.fullmatch(r"[0-9a-f]{16}-\d+", r["id"] or "")]
    return min((at for at in came if at >= since), default=None)


def started(truth: Truth, db: str, workers: int) -> float:
    """Seconds from the command to its first request at the server."""
    began = time.time()
    command = [sys.executable, "-m", "steelyard", "replay", "ten", "--db", db, "--workers", str(workers), "--quiet"]
    process = subprocess.Popen(
        [*command, "--endpoint", f"http://127.0.0.1:{truth.port}"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    first = None
    while first is None and process.poll() is None and time.time() < began + MOST_S:
        time.sleep(0.5)
        first = first_of(truth, began)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1].decode()
    if first is None:
        sys.exit(f"no request came within {MOST_S:g} s. The replay said: {said}")
    return first - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--db", type=Path)
    options = parser.parse_args()
    print(
        f"{platform.platform()}, Python {platform.python_version()}, {os.cpu_count()} cores, locust {version('locust')}"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        db = f"sqlite:///{(options.db or folder / 'start.db').resolve()}"
        made = [sys.executable, "-m", "steelyard", "synth", "--name", "ten", "--requests", str(options.requests)]
        lengths = [
            "--prompt",
            "lognormal:median=400,sigma=0.5,min=10,max=2000",
            "--output",
            "lognormal:median=20,sigma=0.5",
        ]
        if options.db is None or not options.db.exists():
            subprocess.run(
                [*made, "--rate", "200", *lengths, "--db", db, "--quiet"], check=True, stdout=subprocess.DEVNULL
            )
        truth = Truth(folder)
        figures: dict[str, list[float]] = {"interpreter": [], "import locust": [], "first request": []}
        print(f"load average before {os.getloadavg()[0]:.2f}")
        try:
            for _ in range(options.repeats):
                figures["interpreter"].append(clocked("pass"))
                figures["import locust"].append(clocked("import locust"))
                figures["first request"].append(started(truth, db, options.workers))
        finally:
            truth.stop()
    for what, values in figures.items():
        print(f"{what:14s} {statistics.median(values):.2f} s ({min(values):.2f}-{max(values):.2f}), n {len(values)}")
    ratio = statistics.median(figures["first request"]) / statistics.median(figures["import locust"])
    print(f"{options.requests:,} requests, {options.workers} workers: {ratio:.2f} times import locust; bar {BAR_S:g} s")


if __name__ == "__main__":
    main()
