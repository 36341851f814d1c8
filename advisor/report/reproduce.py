"""How to get the same again: commands, versions, seeds and data."""

from __future__ import annotations

import platform
import re
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from advisor.report.parts import Section, Table
from traces import __version__
from traces.records import CAUSAL, SHARED, Run

LIBRARIES = ("numpy", "scipy", "scikit-learn", "sqlalchemy", "locust", "aiohttp")


def reproduce(
    answer: Mapping[str, Any],
    runs: Sequence[Run],
    commands: Sequence[str],
    traces: Mapping[str, Mapping[str, Any]],
) -> Section:
    """The section. commands: how the report was made. traces: name -> what is known of the stored trace."""
    rows = [["steelyard", f"{answer.get('version') or __version__} (this page: {__version__})"]]
    rows += [["Python", platform.python_version()]]
    for name in LIBRARIES:
        try:
            rows.append([name, version(name)])
        except PackageNotFoundError:
            continue
    if answer.get("candidates"):
        rows.append(["seed of the bootstrap", str(answer.get("seed", "as in the command"))])
        rows.append(["rows it rests on, sha256", str(answer.get("data_hash", ""))])
        rows.append(["traffic asked about, sha256", str(answer.get("schedule_digest", ""))])
    for name, held in traces.items():
        kept = held.get("rows_kept")
        rows.append(
            [
                f"trace {name}",
                f"{held.get('format')}, {kept:,} requests, sha256 {held.get('sha256')}"
                if isinstance(kept, int)
                else str(held.get("sha256")),
            ]
        )
    for run in runs[:40]:
        changes = f"; {'; '.join(run.changes)}" if run.changes else ""
        rows.append(
            [
                f"run {run.id}",
                f"steelyard {run.version or '?'}, seed {run.seed}, {run.engine} serving {run.model or '?'} at {run.endpoint}, "
                f"{run.workers} load workers, schedule sha256 {run.schedule_digest[:16]}{changes}",
            ]
        )
    code = [("This report", "\n".join(commands))] if commands else []
    if answer.get("candidates"):
        code.append(("The answer", advise_command(answer)))
    if runs:
        code.append(("The runs", "\n".join(replay_command(run) for run in runs[:40])))
    return Section(
        "reproduce",
        "How to get this again",
        "Versions, seeds and data, then the commands. Same rows, same seed: same answer.",
        table=Table(["what", "value"], rows),
        code=code,
    )


def advise_command(answer: Mapping[str, Any]) -> str:
    """A command line that asks the same of the same runs, as far as the answer says it."""
    words = ["steelyard", "advise"]
    for name in ("gpus", "slo", "trace"):
        if answer.get(name):
            words += [f"--{name}", str(answer[name])]
    for change in answer.get("schedule_changes") or ():
        if match := re.fullmatch(r"first (\d+) of \d+ requests", change):
            words += ["--requests", match[1]]
        elif change.startswith("rate x"):
            words += ["--rate", f"{answer['rate_per_s']:.12g}"]
    for run in answer.get("runs") or ():
        words += ["--run", str(run)]
    if "seed" in answer:
        words += ["--seed", str(answer["seed"])]
    return shlex.join(words)


def replay_command(run: Run) -> str:
    """A command line that asks the same as a run, as far as its row says; what no option of it says stands behind a #."""
    words = ["steelyard", "replay", run.trace, "--endpoint", "URL"]
    if run.fleet:
        words += ["--fleet", str(run.fleet)]
    rest = []
    for change in run.changes:
        if match := re.fullmatch(r"first (\d+) of \d+ requests", change):
            words += ["--requests", match[1]]
        elif match := re.fullmatch(r"requests (\d+) to (\d+) of \d+", change):
            words += ["--slice", f"{match[1]}-{match[2]}"]
        elif match := re.fullmatch(r"window ([\d.]+) to ([\d.]+) s", change):
            words += ["--window", f"{match[1]}-{match[2]}"]
        elif match := re.fullmatch(r"rate x(\S+)", change):
            words += ["--rate-factor", repr(run.rate_factor) if f"{run.rate_factor:.6g}" == match[1] else match[1]]
        elif change == CAUSAL:
            words += ["--sessions", "causal"]
        elif change == SHARED:
            words += ["--prefixes"]
        else:
            rest.append(change)
    if run.slo:
        words += ["--slo", run.slo]
    if run.gpus_per_worker != (1, 1):
        words += ["--gpus-per-worker", f"{run.gpus_per_worker[0]},{run.gpus_per_worker[1]}"]
    words += ["--workers", str(max(run.workers, 1)), "--seed", str(run.seed)]
    if run.policy != "static":
        rest.append(f"policy {run.policy}")
    return shlex.join(words) + (f"  # {'; '.join(rest)}".replace("\n", " ") if rest else "")
