"""How many mock engines of each role run behind a Dynamo frontend: the command of the control kind ``command``.

    python dynamo_fleet.py FOLDER          prints P:D, as the frontend lists them
    python dynamo_fleet.py FOLDER P D      starts what lacks, waits until the frontend lists it, then stops what is too many

``FOLDER/fleet.json`` says how: health (URL), environment, and by role the command. A worker runs on when this ends; its process
id is in ``FOLDER/ROLE-N.pid``. One that is stopped gets SIGTERM, finishes what it holds, and is waited for.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROLES = ("prefill", "decode")
PATIENCE_S = 60.0


def listed(health: str) -> dict[str, int]:
    """Workers by role, as the frontend knows them."""
    with urllib.request.urlopen(health, timeout=5) as answer:
        held = json.loads(answer.read())
    generate = [i["component"] for i in held.get("instances", ()) if i.get("endpoint") == "generate"]
    return {"prefill": generate.count("prefill"), "decode": len(generate) - generate.count("prefill")}


def runs(file: Path) -> bool:
    """Whether the process of a file of ours lives; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{int(file.read_text())}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (OSError, ValueError):
        return False


def wait(true: Callable[[], bool], what: str, started: Sequence[Path] = ()) -> None:
    end = time.monotonic() + PATIENCE_S
    while not true():
        for file in started:
            if not runs(file):
                said = file.with_suffix(".log").read_text(errors="replace").strip().splitlines()
                sys.exit(f"{file.stem} has ended: {said[-1] if said else 'nothing said'}")
        if time.monotonic() > end:
            sys.exit(f"not within {PATIENCE_S:g} s: {what}")
        time.sleep(0.1)


def change(folder: Path, held: dict[str, Any], wanted: dict[str, int]) -> None:
    """New ones before old ones leave, so that no role is ever empty."""
    files = {role: [folder / f"{role}-{n}.pid" for n in range(1, 9)] for role in ROLES}
    alive = {role: [f for f in files[role] if runs(f)] for role in ROLES}
    started = []
    for role in ROLES:
        for file in [f for f in files[role] if f not in alive[role]][: max(0, wanted[role] - len(alive[role]))]:
            number = file.stem.rpartition("-")[2]
            environment = held["environment"] | {"DYN_SYSTEM_PORT": str(held["ports"][file.stem])}
            with file.with_suffix(".log").open("ab") as log:
                one = subprocess.Popen(
                    [word.replace("{n}", number) for word in held[role]],
                    cwd=folder, env=os.environ | environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    start_new_session=True,
                )  # fmt: skip
            file.write_text(str(one.pid))
            started.append(file)
    wait(lambda: all(listed(held["health"])[r] >= wanted[r] for r in ROLES), "the new workers are listed", started)
    leaving = [f for role in ROLES for f in alive[role][wanted[role] :]]
    for file in leaving:
        os.kill(int(file.read_text()), signal.SIGTERM)
    wait(lambda: not any(runs(f) for f in leaving), "the old workers have drained")
    for file in leaving:
        file.unlink()
    wait(
        lambda: all(listed(held["health"])[r] == wanted[r] for r in ROLES), "the frontend has forgotten the old workers"
    )


def main() -> None:
    folder = Path(sys.argv[1])
    held = json.loads((folder / "fleet.json").read_text())
    if len(sys.argv) > 2:
        change(folder, held, dict(zip(ROLES, map(int, sys.argv[2:4]), strict=True)))
    now = listed(held["health"])
    print(f"{now['prefill']}:{now['decode']}")


if __name__ == "__main__":
    main()
