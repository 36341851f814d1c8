"""Rows that wait on disk while the database is away, one file a run, loaded when it is back.

A file holds one JSON object a line: ``{"observations": {column: [..]}}``, ``{"samples": [..]}``, ``{"change": {..}}``,
``{"decision": {..}}``, and at the end ``{"run": {..}}``, what came of the run. A line that was cut by a crash is left out;
nothing is stored twice, because what is measured has a key, and lines are dropped from the file once they are in the
database. A file is locked while it is written or loaded, so any command may load what another process is still adding to.
Nobody waits for a lock: who loads may be waiting for a database that never answers, so who adds then takes another file
(``-run-7-KEY.1.jsonl``). What came of the run is stored when no rows are left in any of them: a run that has ended is whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from loadgen import state
from traces.errors import InputError, StoreError
from traces.records import Decision, Fleet, FleetChange, Histogram, Observations, Run, Sample

if TYPE_CHECKING:
    from traces.store import Store  # whoever asks whether rows wait need not load a database's library


def folder() -> Path:
    """Where the files are."""
    return state.folder("spool")


KEY = 8
"""Characters of a run's key that stand in the name of its file."""

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
    "sources",
)
"""What is known of a run only when it has ended; the rest is in the database already."""


@dataclass(frozen=True, slots=True)
class Steered:
    """A decision of the online controller, and what :meth:`traces.store.Store.add_decision` wants to know of it."""

    decision: Decision
    control: str
    zero_unix_s: float


Batch = Observations | Sequence[Sample] | FleetChange | Steered
"""What is stored while a run goes on."""


class Spool:
    """The file of one run, or several. Made when the first line is written. key: the run's, as far as a name holds it."""

    def __init__(self, store: Store, run_id: int, where: Path | None = None, key: str | None = None) -> None:
        # A number is given again once its run was deleted, or the database made anew: its rows are not the next one's.
        self._key = store.begun.get(run_id, "")[:KEY] if key is None else key
        self.path = (where or folder()) / f"{_mark(store)}-run-{run_id}{self._key and '-'}{self._key}.jsonl"
        self._run_id = run_id
        self.loaded = 0
        """Lines that were stored so far: whoever waits sees that it goes on."""

    def keep(self, batch: Batch) -> None:
        """Keep rows, readings, a role change or a decision."""
        if isinstance(batch, Observations):
            self.add_observations(batch)
        elif isinstance(batch, Steered):
            d = batch.decision
            held: dict[str, Any] = asdict(d)
            for name in ("before", "after"):
                fleet = getattr(d, name)
                held[name] = None if fleet is None else str(fleet)
            self._write({"decision": held, "control": batch.control, "zero_unix_s": batch.zero_unix_s})
        elif isinstance(batch, FleetChange):
            times = _finite({name: getattr(batch, name) for name in ("asked_s", "ready_s", "joined_s")})
            self._write(
                {"change": times | {"before": str(batch.before), "after": str(batch.after), "reason": batch.reason}}
            )
        else:
            self.add_samples(batch)

    def add_observations(self, rows: Observations) -> None:
        """Keep rows."""
        columns: dict[str, Any] = {
            name: [None if v != v else v for v in getattr(rows, name).tolist()] for name in Observations.columns()
        }
        self._write({"observations": columns})

    def add_histograms(self, found: Sequence[Histogram]) -> None:
        """Keep what the servers' histograms counted."""
        held = [asdict(h) | {"buckets": [[None if math.isinf(b) else b, n] for b, n in h.buckets]} for h in found]
        self._write({"histograms": held})

    def add_samples(self, readings: Sequence[Sample]) -> None:
        """Keep server readings."""
        self._write({"samples": [_finite(asdict(s)) for s in readings]})

    def end_run(self, run: Run, steered: str = "") -> None:
        """Keep what came of the run, and what its changes of P:D were made by."""
        held = {name: getattr(run, name) for name in _OUTCOME}
        self._write({"run": _finite(held), "control": steered})

    @contextlib.contextmanager
    def ending(self, run: Run, steered: str) -> Iterator[None]:
        """Keep on disk, while the block lasts, how a run ends whose rows are stored: whoever is killed in it leaves that to the
        next command; of an error the caller takes care. A disk that takes nothing keeps no run from ending."""
        with contextlib.ExitStack() as locked:
            held = False
            with contextlib.suppress(StoreError, OSError):
                self.end_run(run, steered)
                fcntl.flock(locked.enter_context(self.path.open("rb")), fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            try:
                yield
            except (KeyboardInterrupt, SystemExit):
                held = False
                raise
            finally:
                if held:
                    self.path.unlink(missing_ok=True)

    def _file(self, k: int) -> Path:
        return self.path if k == 0 else self.path.with_suffix(f".{k}.jsonl")

    def _write(self, value: dict[str, Any]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            line = json.dumps(value, allow_nan=False).encode() + b"\n"
            for k in itertools.count():
                # Without a buffer: closed on a full disk, that would write on in the room that was just made.
                with self._file(k).open("ab", buffering=0) as file:
                    try:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        continue  # somebody loads this one
                    if os.fstat(file.fileno()).st_nlink:  # else it was loaded and removed meanwhile
                        begun = os.fstat(file.fileno()).st_size
                        try:
                            left = memoryview(line)
                            while left:
                                left = left[file.write(left) :]
                        except OSError:
                            with contextlib.suppress(OSError):
                                os.ftruncate(file.fileno(), begun)  # no half line on a full disk
                            raise
                        return
        except OSError as error:
            raise StoreError(f"{self.path}: rows cannot be kept on disk either ({error.strerror}).") from None

    def load(self, store: Store) -> int:
        """Put what waits into the database; returns the rows. StoreError leaves what is not stored yet in the file.
        InputError: the database has no such run any more.

        What another process loads at this moment is left to it: size() then says that something waits still.
        """
        stored, ends = 0, dict[Path, bytes]()
        with contextlib.ExitStack() as locked:
            # Twice: who held a file at first, and could not end the run for those that we held, may have left it to us.
            for path in self._files() * 2:
                if path in ends:
                    continue
                try:
                    file = locked.enter_context(path.open("rb"))
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except (FileNotFoundError, BlockingIOError):
                    continue
                if os.fstat(file.fileno()).st_nlink:
                    if not (key := store.key(self._run_id)) or not key.startswith(self._key):
                        raise InputError(
                            f"{path}: its rows are of a run that is not in {store.url} any more: it was deleted, or the database "
                            "is another one. Remove the file if that was meant."
                        )
                    rows, end = self._load(store, path, file)
                    stored += rows
                    if end:
                        ends[path] = end
            if ends and self._files() == sorted(ends):  # else rows wait: nobody may take the run for a whole one
                said = json.loads(list(ends.values())[-1])
                known: dict[str, Any] = {
                    k: math.nan if v is None else v for k, v in said["run"].items() if k in _OUTCOME
                }
                run = replace(store.run(self._run_id), **known)
                cost(store, run, said.get("control", ""))
                store.end_run(run)
                for path in ends:
                    path.unlink()
        return stored

    def size(self) -> int:
        """Bytes that wait."""
        found = 0
        for path in self._files():
            with contextlib.suppress(FileNotFoundError):  # loaded meanwhile
                found += path.stat().st_size
        return found

    def forget(self, size: int) -> None:
        """Drop what was stored after all, where these bytes are all that waits."""
        with contextlib.ExitStack() as locked:
            files = {}
            for path in self._files():
                try:
                    file = files[path] = locked.enter_context(path.open("rb"))
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    return  # somebody loads it
            if sum(os.fstat(file.fileno()).st_size for file in files.values()) == size:
                for path in files:
                    path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        start = f"{self.path.stem}."  # no glob: asked four times a second, also where memory for a pattern is denied
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            names = [one for one in os.listdir(self.path.parent) if one.startswith(start) and one.endswith("jsonl")]
            return sorted(self.path.parent / one for one in names)
        return []

    def _load(self, store: Store, path: Path, file: BinaryIO) -> tuple[int, bytes]:
        """Store what a file holds and drop it; returns the rows, and the line that says what came of the run, which stays."""
        run_id, stored, done, end = self._run_id, 0, 0, b""
        try:
            for line in file:
                try:
                    held = json.loads(line)
                except ValueError:
                    held = {}  # cut by a crash
                if "observations" in held:
                    rows = _observations(held["observations"])
                    store.add_observations(run_id, rows)
                    stored += len(rows)
                elif "samples" in held:
                    store.add_samples(run_id, [Sample(**s) for s in held["samples"]])
                elif "histograms" in held:
                    store.add_histograms(run_id, [_histogram(h) for h in held["histograms"]])
                elif "change" in held:
                    add(store, run_id, _change(held["change"]))
                elif "decision" in held:
                    add(store, run_id, Steered(_decision(held["decision"]), held["control"], held["zero_unix_s"]))
                elif "run" in held:
                    end = line
                done += len(line)
                self.loaded += 1
        finally:
            if done > len(end):  # a database that is away is asked twice a second, and the file may be large by then
                with path.open("r+b") as again:  # in place: the lock is on this file
                    again.write(end)
                    file.seek(done)
                    shutil.copyfileobj(file, again)
                    again.truncate()
        if not end:
            path.unlink()
        return stored, end


def waiting(store: Store, where: Path | None = None) -> list[Spool]:
    """The files that wait for this database."""
    start = f"{_mark(store)}-run-"
    names = {path.name.removeprefix(start).split(".")[0] for path in (where or folder()).glob(f"{start}*.jsonl")}
    found = sorted((int(number), key) for number, _, key in (n.partition("-") for n in names) if number.isdecimal())
    return [Spool(store, number, where, key) for number, key in found]


def add(store: Store, run_id: int, batch: Batch) -> None:
    """Store rows, readings, a role change or a decision."""
    if isinstance(batch, Observations):
        store.add_observations(run_id, batch)
    elif isinstance(batch, FleetChange):
        store.add_fleet_change(run_id, batch)
    elif isinstance(batch, Steered):
        store.add_decision(run_id, batch.decision, batch.control, batch.zero_unix_s)
    else:
        store.add_samples(run_id, batch)


def cost(store: Store, run: Run, steered: str) -> None:
    """Store the changes of P:D of a run that ends anew, with what they cost by its rows. steered: what made them."""
    if changes := store.fleet_changes(run.id):
        from loadgen.control.online import measured  # here: every command asks whether rows wait

        rows = store.pieces(run.id, ("sent_s", "first_token_s", "last_token_s", "status"))
        store.cost_fleet_changes(run.id, measured(changes, rows, store.samples(run.id)), steered, run.started_unix_s)


def _finite(held: dict[str, Any]) -> dict[str, Any]:
    """What JSON takes: no NaN, nothing infinite."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in held.items()}


def _histogram(held: dict[str, Any]) -> Histogram:
    buckets = tuple((math.inf if bound is None else bound, n) for bound, n in held["buckets"])
    return Histogram(**held | {"buckets": buckets})


def _change(held: dict[str, Any]) -> FleetChange:
    ready, joined = (math.nan if held.get(name) is None else held[name] for name in ("ready_s", "joined_s"))
    before, after = Fleet.parse(held["before"]), Fleet.parse(held["after"])
    return FleetChange(held["asked_s"], ready, before, after, held["reason"], joined)


def _decision(held: dict[str, Any]) -> Decision:
    fleets = {name: None if held[name] is None else Fleet.parse(held[name]) for name in ("before", "after")}
    return Decision(**held | fleets)


def _mark(store: Store) -> str:
    """Of the database: a SQLite file is the same from wherever it is named, a server whatever file its password is in."""
    kind, slashes, file = store.url.partition(":///")
    url = f"{kind}{slashes}{Path(file).resolve()}" if kind == "sqlite" else store.place
    return hashlib.sha256(url.encode()).hexdigest()[:12]


def _observations(columns: dict[str, list[Any]]) -> Observations:
    rows = Observations.empty(len(columns["index"]))
    columns.setdefault("dispatch_s", columns["due_s"])  # written before that column was
    for f in fields(Observations):
        if f.name not in columns:
            continue  # written before there was such a column
        column = getattr(rows, f.name)
        if column.dtype == np.float64:
            column[:] = [math.nan if v is None else v for v in columns[f.name]]
        else:
            column[:] = columns[f.name]
    return rows
