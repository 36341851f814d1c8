"""Run the faults and print the table.

    python -m tests.faults [--scale 1.0] [--only WORDS] [--jobs 4] [--seed 0] [--minutes 25] [--keep FILE]

``--only`` is a regular expression. ``--keep`` adds the trials to those of earlier runs in that file. Exit code 1
when a row was lost or stored twice, a process hung, or the user was not told.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from tests.faults.lab import Outcome
from tests.faults.scenarios import SCENARIOS, Scenario


@dataclass
class Line:
    """One line of the table."""

    name: str
    tried: int = 0
    finished: int = 0
    lost: int = 0
    twice: int = 0
    hung: int = 0
    impossible: int = 0
    said: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def add(self, outcome: Outcome | None) -> None:
        if outcome is None:
            self.impossible += 1
            return
        self.tried += 1
        self.finished += outcome.finished
        self.lost += outcome.lost
        self.twice += outcome.twice
        self.hung += outcome.hung
        self.said[outcome.said] += 1
        if outcome.wrong or "TRACEBACK" in outcome.said:
            self.wrong.append(outcome.wrong or outcome.said)

    @property
    def bad(self) -> bool:
        return bool(self.lost or self.twice or self.hung or self.wrong)

    def row(self) -> str:
        said = self.said.most_common(1)[0][0] if self.said else "not tried: it cannot be made here"
        for place in ("/tmp", str(Path.cwd())):
            said = said.replace(place, "")
        wrong = f" **{len(self.wrong)} wrong: {self.wrong[0][:120]}**" if self.wrong else ""
        hung = f" **{self.hung} hung**" if self.hung else ""
        return (
            f"| {self.name} | {self.tried} | {self.finished} | {self.lost} | {self.twice} | {said[:230]}{hung}{wrong} |"
        )


def attempt(scenario: Scenario, seed: int, keep: Path) -> Outcome | None:
    folder = Path(tempfile.mkdtemp(prefix="fault-"))
    folder.chmod(0o755)
    try:
        outcome = scenario.run(folder, seed)
    except Exception as error:
        traceback.print_exc()
        outcome = Outcome(wrong=f"{type(error).__name__}: {error}", said="the trial itself failed")
    if outcome is not None and (
        outcome.lost or outcome.twice or outcome.hung or outcome.wrong or "TRACEBACK" in outcome.said
    ):
        kept = keep / f"{scenario.name.replace(' ', '-').replace('/', '-')}-{seed}"
        shutil.copytree(
            folder,
            kept,
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns("pg", "small"),
            ignore_dangling_symlinks=True,
        )
        print(f"BAD {scenario.name} seed {seed}: {outcome}; files in {kept}", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="times the number of trials of each fault")
    parser.add_argument("--only", default="", help="faults whose name this regular expression finds")
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no further trial after so long")
    parser.add_argument("--keep", type=Path, help="JSON of all trials so far; these are added")
    options = parser.parse_args()
    chosen = [s for s in SCENARIOS if re.search(options.only, s.name)]
    lines = {s.name: Line(s.name) for s in SCENARIOS}
    spent = 0.0
    if options.keep and options.keep.exists():
        held = json.loads(options.keep.read_text())
        spent = held["minutes"]
        for one in held["lines"]:
            lines[one["name"]] = Line(**one | {"said": Counter(one["said"])})
    keep = Path(tempfile.mkdtemp(prefix="faults-kept-"))
    began = time.monotonic()
    order = [(s, options.seed + k) for s in chosen for k in range(max(1, round(s.times * options.scale)))]
    order.sort(key=lambda pair: pair[1])  # every fault once before any twice

    def one(pair: tuple[Scenario, int]) -> None:
        if time.monotonic() - began < options.minutes * 60:
            lines[pair[0].name].add(attempt(*pair, keep))

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(one, order))
    total = sum(line.tried for line in lines.values())
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("steelyard", "locust", "SQLAlchemy", "psycopg", "uvloop")
    )
    minutes = spent + (time.monotonic() - began) / 60
    if options.keep:
        options.keep.write_text(json.dumps({"minutes": minutes, "lines": [vars(line) for line in lines.values()]}))
    head = [
        f"{time.strftime('%Y-%m-%d', time.gmtime())}; {os.cpu_count()} cores, Linux {platform.release()}, Python "
        f"{platform.python_version()}; {packages}; {total} trials in {minutes:.0f} min, {options.jobs} at once.",
        "",
        "| fault | tried | answers at stake | rows lost | rows twice | what the user saw (most often) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    text = "\n".join([*head, *(line.row() for line in lines.values() if line.tried or line.impossible)])
    print(text)
    return 1 if any(line.bad for line in lines.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
