"""Rows that wait on disk while the database is away, one file a run, loaded when it is back.

A file holds one JSON object a line: ``{"observations": {column: [..]}}``, ``{"samples": [..]}``, and at the end
``{"run": {..}}``, what came of the run. A line that was cut by a crash is left out; nothing is stored twice, because
observations are keyed by (run, index) and lines are dropped from the file once they are in the database. A file is locked
while it is written or loaded, so any command may load what another process is still adding to.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from traces.errors import InputError, StoreError
from traces.records import Observations, Run, Sample
from traces.store import Store


def folder() -> Path:
    """Where the files are, whatever the working folder: ``$XDG_STATE_HOME/steelyard/spool``, under ~/.local/state without."""
    home = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(home) / "steelyard" / "spool"


_OUTCOME = (
    "started_unix_s",
    "complete",
    "verdict",
    "reason",
    "lag_p50_ms",
    "lag_p99_ms",
    "lag_max_ms",
    "counts",
    "costs",
)
"""What is known of a run only when it has ended; the rest is in the database already."""


class Spool:
    """The file of one run. Made when the first line is written."""

    def __init__(self, store: Store, run_id: int, where: Path | None = None) -> None:
        self.path = (where or folder()) / f"{_mark(store)}-run-{run_id}.jsonl"

    def add_observations(self, rows: Observations) -> None:
        """Keep rows."""
        columns: dict[str, Any] = {
            name: [None if v != v else v for v in getattr(rows, name).tolist()] for name in Observations.columns()
        }
        self._write({"observations": columns})

    def add_samples(self, readings: Sequence[Sample]) -> None:
        """Keep server readings."""
        self._write({"samples": [asdict(s) for s in readings]})

    def end_run(self, run: Run) -> None:
        """Keep what came of the run."""
        held = {name: getattr(run, name) for name in _OUTCOME}
        self._write({"run": {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in held.items()}})

    def _write(self, value: dict[str, Any]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            line = json.dumps(value, allow_nan=False) + "\n"
            while True:
                with self.path.open("a", encoding="utf-8") as file:
                    fcntl.flock(file, fcntl.LOCK_EX)
                    if os.fstat(file.fileno()).st_nlink:  # else it was loaded and removed while we waited
                        file.write(line)
                        return
        except OSError as error:
            raise StoreError(f"{self.path}: rows cannot be kept on disk either ({error.strerror}).") from None

    def load(self, store: Store) -> int:
        """Put what waits into the database; returns the rows. StoreError leaves what is not stored yet in the file."""
        try:
            with self.path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                return self._load(store, file.read().splitlines()) if os.fstat(file.fileno()).st_nlink else 0
        except FileNotFoundError:
            return 0

    def _load(self, store: Store, lines: list[bytes]) -> int:
        run_id = int(self.path.stem.rpartition("-")[2])
        stored = 0
        try:
            while lines:
                try:
                    held = json.loads(lines[0])
                except ValueError:
                    held = {}  # cut by a crash
                if "observations" in held:
                    rows = _observations(held["observations"])
                    store.add_observations(run_id, rows)
                    stored += len(rows)
                elif "samples" in held:
                    store.add_samples(run_id, [Sample(**s) for s in held["samples"]])
                elif "run" in held:
                    known: dict[str, Any] = {
                        k: math.nan if v is None else v for k, v in held["run"].items() if k in _OUTCOME
                    }
                    store.end_run(replace(store.run(run_id), **known))
                lines.pop(0)
        except (StoreError, InputError):
            with self.path.open("r+b") as again:  # in place: the lock is on this file
                again.write(b"".join(line + b"\n" for line in lines))
                again.truncate()
            raise
        self.path.unlink()
        return stored


def waiting(store: Store, where: Path | None = None) -> list[Spool]:
    """The files that wait for this database."""
    found = []
    for path in sorted((where or folder()).glob(f"{_mark(store)}-run-*.jsonl")):
        number = path.stem.rpartition("-")[2]
        if number.isdigit():
            found.append(Spool(store, int(number), where))
    return found


def _mark(store: Store) -> str:
    """Of the database: a SQLite file is the same from wherever it is named."""
    kind, slashes, file = store.url.partition(":///")
    url = f"{kind}{slashes}{Path(file).resolve()}" if kind == "sqlite" else store.url
    return hashlib.sha256(url.encode()).hexdigest()[:12]


def _observations(columns: dict[str, list[Any]]) -> Observations:
    rows = Observations.empty(len(columns["index"]))
    columns.setdefault("dispatch_s", columns["due_s"])  # written before that column was
    for f in fields(Observations):
        column = getattr(rows, f.name)
        if column.dtype == np.float64:
            column[:] = [math.nan if v is None else v for v in columns[f.name]]
        else:
            column[:] = columns[f.name]
    return rows
