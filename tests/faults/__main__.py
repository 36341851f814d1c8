"""Run the faults and print the table.

    python -m tests.faults [--scale 1.0] [--only WORDS] [--jobs 4] [--seed 0] [--minutes 60] [--keep FILE]

``--only`` is a regular expression. ``--keep`` writes each trial to that file, one JSON object a line; trials that stand there are
not tried again, and the table is that of the whole file: a run that was broken off goes on where it stopped. Exit code 1
when a row was lost or stored twice, a process hung, or the user was not told; 3 when there are trials left to try.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.faults.lab import ROOT, Outcome
from tests.faults.scenarios import SCENARIOS, Scenario

PAUSE_S = 5.0
"""A harness that did not run for so long was stopped by somebody: what it timed meanwhile says nothing, and is tried again."""


class Pauses:
    """Notices when this process itself was stopped. ``within(a, b)``: was it, between two monotonic times?"""

    def __init__(self) -> None:
        self._found: list[tuple[float, float]] = []
        self.total_s = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        before = time.monotonic()
        while True:
            time.sleep(0.5)
            now = time.monotonic()
            if now - before > PAUSE_S:
                self._found.append((before, now))
                self.total_s += now - before
            before = now

    def within(self, start: float, end: float) -> bool:
        time.sleep(0.6)  # let the watch see it
        return any(a < end and b > start for a, b in self._found)


def bad(outcome: Outcome) -> bool:
    return bool(outcome.lost or outcome.twice or outcome.hung or outcome.wrong or "TRACEBACK" in outcome.said)


def attempt(scenario: Scenario, seed: int, kept: Path) -> Outcome | None:
    folder = Path(tempfile.mkdtemp(prefix="fault-"))
    folder.chmod(0o755)
    try:
        outcome = scenario.run(folder, seed)
    except Exception as error:
        traceback.print_exc()
        outcome = Outcome(wrong=f"{type(error).__name__}: {error}", said="the trial itself failed")
    if outcome is not None and bad(outcome):
        to = kept / f"{scenario.name.replace(' ', '-').replace('/', '-')}-{seed}"
        small = shutil.ignore_patterns("pg", "small")
        shutil.copytree(folder, to, dirs_exist_ok=True, ignore=small, ignore_dangling_symlinks=True)
        print(f"BAD {scenario.name} seed {seed}: {outcome}; files in {to}", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    return outcome


def row(name: str, trials: Iterable[Mapping[str, Any]]) -> str:
    """One fault's line of the table."""
    outcomes = [Outcome(**t["outcome"]) for t in trials if t["outcome"] is not None]
    said = Counter(o.said for o in outcomes)
    first = said.most_common(1)[0][0] if said else "not tried: it cannot be made here"
    for place in (tempfile.gettempdir(), str(Path.cwd())):
        first = first.replace(place, "")
    hung = sum(o.hung for o in outcomes)
    wrong = [o.wrong or o.said for o in outcomes if o.wrong or "TRACEBACK" in o.said]
    note = (f" **{hung} hung**" if hung else "") + (f" **{len(wrong)} wrong: {wrong[0][:120]}**" if wrong else "")
    sums = (sum(getattr(o, what) for o in outcomes) for what in ("finished", "lost", "twice"))
    next_s = max((o.next_s for o in outcomes), default=0.0)
    cells = (name, len(outcomes), *sums, f"{next_s:.0f} s", first[:230] + note)
    return "| " + " | ".join(map(str, cells)) + " |"


def table(trials: list[dict[str, Any]]) -> str:
    """Everything that was tried, one line a fault, and where."""
    tried = [t for t in trials if t["outcome"] is not None]
    killed = sum(t["fault"].startswith(("kill", "SIGSTOP")) or "kill -9" in t["fault"] for t in tried)
    names = ("steelyard", "locust", "gevent", "SQLAlchemy", "psycopg", "uvloop", "aiohttp")
    loads = [t["load"] for t in tried] or [0.0]
    head = [
        f"{time.strftime('%Y-%m-%d', time.gmtime())}; {os.cpu_count()} cores at a load of {min(loads):.0f} to {max(loads):.0f}, "
        f"Linux {platform.release()}, Python {platform.python_version()}; "
        + ", ".join(f"{name} {version(name)}" for name in names)
        + f"; code of {', '.join(dict.fromkeys(t['code'] for t in tried))}.",
        f"{len(tried)} trials, {killed} of them with kill -9 or SIGSTOP, {sum(t['seconds'] for t in tried) / 60:.0f} minutes of "
        f"trials; {sum(bad(Outcome(**t['outcome'])) for t in tried)} bad.",
        "",
        "| fault | tried | answers at stake | rows lost | rows twice | next command, at most | what the user saw (most often) |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    found = {s.name: [t for t in trials if t["fault"] == s.name] for s in SCENARIOS}
    return "\n".join([*head, *(row(name, held) for name, held in found.items() if held)])


def code() -> str:
    """The commit of the tree, with a + when there is more than that in it; "?" outside of one."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "?"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="times the number of trials of each fault")
    parser.add_argument("--only", default="", help="faults whose name this regular expression finds")
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no further trial after so long")
    parser.add_argument("--keep", type=Path, help="file of trials, one JSON object a line; what stands there is done")
    options = parser.parse_args()
    # A shell's background job has Ctrl-C ignored, and so would have all that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    chosen = [s for s in SCENARIOS if re.search(options.only, s.name)]
    trials: list[dict[str, Any]] = []
    if options.keep and options.keep.exists():
        trials = [json.loads(line) for line in options.keep.read_text().splitlines()]
    done = {(t["fault"], t["seed"]) for t in trials}
    order = [(s, options.seed + k) for s in chosen for k in range(max(1, round(s.times * options.scale)))]
    order = [(s, seed) for s, seed in order if (s.name, seed) not in done]
    order.sort(key=lambda pair: pair[1])  # every fault once before any twice
    kept, pauses, commit = Path(tempfile.mkdtemp(prefix="faults-kept-")), Pauses(), code()
    began, writing, left = time.monotonic(), threading.Lock(), [0]

    def one(pair: tuple[Scenario, int]) -> None:
        scenario, seed = pair
        for _ in range(3):
            if time.monotonic() - began > options.minutes * 60:
                break
            start, load = time.monotonic(), os.getloadavg()[0]
            outcome = attempt(scenario, seed, kept)
            end = time.monotonic()
            if pauses.within(start, end):
                print(
                    f"AGAIN {scenario.name} seed {seed}: the harness itself was stopped meanwhile",
                    file=sys.stderr,
                    flush=True,
                )
                continue
            held = {
                "fault": scenario.name, "seed": seed, "outcome": asdict(outcome) if outcome else None,
                "seconds": round(end - start, 1), "load": round(load, 1), "code": commit,
            }  # fmt: skip
            with writing:
                trials.append(held)
                if options.keep:
                    with options.keep.open("a") as file:
                        file.write(json.dumps(held) + "\n")
            return
        left[0] += 1

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(one, order))
    print(table(trials))
    if left[0]:
        print(f"\n{left[0]} trials are left to try: run it again with --keep.")
    if any(bad(Outcome(**t["outcome"])) for t in trials if t["outcome"] is not None):
        return 1
    return 3 if left[0] else 0


if __name__ == "__main__":
    sys.exit(main())
