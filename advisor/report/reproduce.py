"""How to get the same again: commands, versions, seeds and data."""

from __future__ import annotations

import math
import platform
import re
import shlex
from collections.abc import Container, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from advisor.report.parts import Section, Table
from traces import __version__
from traces.records import CAUSAL, CLOSED_LOOP, SHARED, Fleet, Run

LIBRARIES = ("numpy", "scipy", "scikit-learn", "sqlalchemy", "locust", "aiohttp")


def reproduce(
    answer: Mapping[str, Any],
    runs: Sequence[Run],
    commands: Sequence[str],
    traces: Mapping[str, Mapping[str, Any]] | None,
    db: str = "",
) -> Section:
    """The section. commands: how the report was made. traces: name -> what is known of the stored trace; None:
    not known. db: the database's URL, "" where it cannot be told."""
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
    for name, held in (traces or {}).items():
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
        code.append(("The answer", advise_command(answer, traces, db)))
    if runs:
        code.append(("The runs", "\n".join(replay_command(run, db) for run in runs[:40])))
    return Section(
        "reproduce",
        "How to get this again",
        "Versions, seeds and data, then the commands. Same rows, same seed: same answer.",
        table=Table(["what", "value"], rows),
        code=code,
    )


def advise_command(answer: Mapping[str, Any], traces: Container[str] | None = None, db: str = "") -> str:
    """A command line that asks the same of the same runs, as far as the answer says it. traces: those that are stored, where
    that is known; without its trace the rows of the latest run are asked about, as they were."""
    words = ["steelyard", "advise"]
    for name in ("gpus", "slo", "trace"):
        if answer.get(name) and (name != "trace" or traces is None or answer[name] in traces):
            words += [f"--{name}", str(answer[name])]
    words += _part(answer)
    if answer.get("gpus_per_worker"):
        words += ["--gpus-per-worker", "{},{}".format(*answer["gpus_per_worker"])]
    if answer.get("attainment") is not None:
        words += ["--attainment", str(answer["attainment"])]
    if answer.get("current"):
        words += ["--current", str(Fleet(**answer["current"]))]
    for run in answer.get("runs") or ():
        words += ["--run", str(run)]
    if "seed" in answer:
        words += ["--seed", str(answer["seed"])]
    if answer.get("concurrency"):
        words += ["--concurrency", f"{answer['concurrency']:.12g}"]
    else:
        # An answer of an older version does not say what was asked, but what came of it.
        asked = answer.get("asked") or {"strategy": answer.get("strategy")}
        for name, option in ASKED.items():
            if value := asked.get(name):
                words += [option, value if isinstance(value, str) else f"{value:.12g}"]
    return on(shlex.join(words), db)


def _part(answer: Mapping[str, Any]) -> list[str]:
    """The options that make an answer's traffic of its trace: the same for advise and replay."""
    words = []
    for change in answer.get("schedule_changes") or ():
        if match := re.fullmatch(r"first (\d+) of \d+ requests", change):
            words += ["--requests", match[1]]
    if any(change.startswith("rate x") for change in answer.get("schedule_changes") or ()):
        typed = f"{answer['rate_per_s']:.12g}"  # what came of a rate that was typed is off in the last digit
        words += ["--rate", typed if len(typed) < 10 else repr(answer["rate_per_s"])]
    return words


def online_command(answer: Mapping[str, Any], traces: Container[str] | None = None, db: str = "") -> str:
    """A command line that replays an answer's own traffic by its thresholds: on any other a forecast's clock is out of phase.
    traces: those that are stored, where that is known."""
    name = answer.get("trace")
    stored = name and (traces is None or name in traces)
    words = ["steelyard", "replay", str(name) if stored else "TRACE", "--endpoint", "URL", *_part(answer)]
    words += ["--policy", "online", "--recommendation", str(answer.get("recommendation") or answer.get("id") or "ID")]
    return on(shlex.join(words), db)


def on(command: str, db: str) -> str:
    """A command that is printed, and those that && joins to it, on that database; "" stays so."""
    named = f" --db {shlex.quote(db)}" if db else ""
    return command.replace(" && steelyard ", f"{named} && steelyard ") + named if command else ""


ASKED = {
    "strategy": "--strategy",
    "deadline_s": "--deadline",
    "gpu_hour_usd": "--gpu-hour-usd",
    "target_rate_per_s": "--target-rate",
}
"""What an answer says that it was asked besides -> the option that asks it."""


OPTIONS = {
    r"first (\d+) of \d+ requests": "--requests {}",
    r"requests (\d+) to (\d+) of \d+": "--slice {}-{}",
    r"window ([\d.]+) to ([\d.]+) s": "--window {}-{}",
    r"thinned to \d+ of \d+ requests by (\S+) \(seed .+\)": "--thin {}",
    r"(\d+) copies laid over each other \(seed .+\)": "--copies {}",
    r"\d+ requests spread within a tick of (\S+) s \(seed .+\)": "--spread {}",
    r"(prompt|output)s x(\S+)": "--{}-scale {}",
    r"\d+ (prompt|output)s capped at (\d+) tokens": "--max-{} {}",
    r"ramp over (\S+) s": "--ramp {}",
    CAUSAL: "--sessions causal",
    SHARED: "--prefixes",
}
"""What a schedule says of how it was changed (traces.shape) -> the option that changes it so."""


def replay_command(run: Run, db: str = "") -> str:
    """A command line that asks the same as a run, as far as its row says; what no option of it says stands behind a #."""
    if any(change.startswith("imported from") for change in run.changes):
        return _import_command(run, db)
    words = ["steelyard", "replay", run.trace, "--endpoint", "URL"]
    if run.fleet:
        words += ["--fleet", str(run.fleet)]
    rest = []
    rates = [change.removeprefix("rate x") for change in run.changes if change.startswith("rate x")]
    if rates and rates[-1] == f"{run.rate_factor:.6g}":
        rates[-1:] = []
        factor = ["--rate-factor", repr(run.rate_factor)]
    else:
        factor = []
    if rates:  # before the rate times were scaled
        words += ["--time-scale", f"{math.prod(1 / float(rate) for rate in rates):.6g}"]
    ramp_s = 0.0
    for change in (part for one in run.changes for part in one.split(", ")):
        if change.startswith("rate x"):
            continue
        for pattern, option in OPTIONS.items():
            if match := re.fullmatch(pattern, change):
                words += option.format(*match.groups()).split()
                ramp_s = float(match[1]) if option.startswith("--ramp") else ramp_s
                break
        else:
            rest.append(change)
    words += factor
    if run.warmup_s - ramp_s > 1e-9:
        words += ["--warmup", f"{run.warmup_s - ramp_s:.12g}"]
    words += _judged(run)
    words += ["--workers", str(max(run.workers, 1)), "--seed", str(run.seed), *(["--db", db] if db else [])]
    if run.policy != "static":
        rest.append(f"policy {run.policy}")
    return shlex.join(words) + (f"  # {'; '.join(rest)}".replace("\n", " ") if rest else "")


def _import_command(run: Run, db: str) -> str:
    """Of a run that another client measured: its file is read again."""
    words = ["steelyard", "runs", "import", "FILE", "--name", run.name]
    if run.fleet:
        words += ["--fleet", str(run.fleet)]
    if run.policy == CLOSED_LOOP:
        words += ["--aggregate"]
    words += _judged(run)
    rest = f"  # {'; '.join(run.changes)}".replace("\n", " ")
    return shlex.join(words + (["--db", db] if db else [])) + rest


def _judged(run: Run) -> list[str]:
    words = ["--slo", run.slo] if run.slo else []
    if run.gpus_per_worker != (1, 1):
        words += ["--gpus-per-worker", f"{run.gpus_per_worker[0]},{run.gpus_per_worker[1]}"]
    return words
