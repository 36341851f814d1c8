"""A recorded trace into the database: recognised, validated, counted, all of it or none.

Invariant, checked on every load: ``rows_read == rows_kept + sum(skipped) + other_events``. The same bytes again are a
no-op that says so; the same name with other bytes is refused.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TextIO
from zoneinfo import ZoneInfo

import numpy as np

from traces.errors import InputError
from traces.formats import BadFileError, BadRowError, OtherEvent, Row, TraceFormat, formats
from traces.formats.blocks import pack, unpack
from traces.formats.generic import generic
from traces.records import Schedule
from traces.store import Store, TraceInfo

HEAD = 65_536
"""Bytes that a format is recognised by."""

MAX_BAD = 0.05
LINE_LIMIT = 4 << 20
"""Longest line that is read, in characters; a longer one is skipped and counted, never held."""

ZERO_OUTPUT = ("keep-failed", "skip", "min1")
_OK, _FAILED = 0, 1


@dataclass(slots=True)
class Skipped:
    """Rows left out for one reason."""

    count: int = 0
    first_lines: list[int] = field(default_factory=list)
    example: str = ""


@dataclass(frozen=True, slots=True)
class IngestReport:
    """What a load did. Keys as ``ingest --json`` prints them. span_s, distinct_arrivals, sums: of the rows kept.

    inversions: rows that came before their predecessor's time; equal_times: rows at the same time as it.
    prefix_hit_tokens: prompt tokens that an unlimited prefix cache would have held, None without block ids.
    """

    name: str
    format: str
    rows_read: int
    rows_kept: int
    skipped: dict[str, Skipped]
    other_events: int
    sum_prompt_tokens: int
    sum_output_tokens: int
    span_s: float
    distinct_arrivals: int
    prefix_hit_tokens: int | None
    inversions: int
    equal_times: int
    failed_rows: int
    clock: str
    notes: list[str]
    already: bool = False

    @classmethod
    def of(cls, info: TraceInfo, *, already: bool = False) -> IngestReport:
        """The report that was stored with a trace."""
        values = dict(info.summary)
        values["skipped"] = {reason: Skipped(**s) for reason, s in values["skipped"].items()}
        return cls(**values | {"name": info.name, "format": info.format, "already": already})


def ingest(
    store: Store,
    paths: Sequence[Path],
    *,
    name: str | None = None,
    format: str | None = None,
    max_bad: float = MAX_BAD,
    zero_output: str = "keep-failed",
    columns: str | None = None,
    time_unit: str = "s",
    tz: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> IngestReport:
    """Load files as one trace. InputError refuses a file whole and leaves nothing behind.

    name: default is the first file's stem. zero_output: rows without answer tokens are kept as failed, skipped, or given
    one token. columns, time_unit: the user's map of any CSV or JSONL (:mod:`traces.formats.generic`). tz: zone of times
    that carry none, default UTC. progress(bytes read so far).
    """
    if not paths:
        raise InputError("no file was given. Write: steelyard ingest FILE")
    if zero_output not in ZERO_OUTPUT:
        raise InputError(f"--zero-output must be one of {', '.join(ZERO_OUTPUT)} (got {zero_output!r}).")
    files = [_identity(path) for path in paths]
    digest = hashlib.sha256("".join(f["sha256"] for f in files).encode() if len(files) > 1 else b"").hexdigest()
    sha256 = digest if len(files) > 1 else files[0]["sha256"]
    wanted = name or Path(files[0]["name"]).name.split(".")[0]
    zone = _zone(tz)
    reader = _recognise(paths[0], format, columns, time_unit)
    options: dict[str, Any] = {"zero_output": zero_output, "max_bad": max_bad}
    if columns is not None:
        options |= {"map": columns, "time_unit": time_unit}
    if tz is not None:
        options["tz"] = tz
    for info in store.traces():
        if info.name != wanted:
            continue
        asked = {k: v for k, v in options.items() if k != "max_bad"}
        before = {k: v for k, v in info.options.items() if k != "max_bad"}
        same = info.sha256 == sha256 and info.format == reader.name and before == asked
        if same:
            return IngestReport.of(info, already=True)
        raise InputError(
            f"a trace named {wanted!r} is already stored with other content or options. Give another --name, "
            f"or remove it: steelyard traces delete {wanted}"
        )
    loaded = _Loaded(reader, zero_output, zone)
    for path in paths:
        loaded.read(path, progress)
    loaded.check(paths, max_bad)

    def summary() -> tuple[dict[str, Any], str | None, int | None, str | None]:
        report = asdict(loaded.report(wanted))
        for gone in ("name", "format", "already"):
            report.pop(gone)
        return report, loaded.origin, loaded.block_tokens, reader.meta.hash_scope if loaded.hashes else None

    info = store.add_trace(
        name=wanted,
        format=reader.name,
        sha256=sha256,
        files=files,
        options=options,
        batches=loaded.batches(),
        summary=summary,
    )
    return IngestReport.of(info)


class _Loaded:
    """The rows of a source in columns (34 bytes a row), then sorted by arrival."""

    def __init__(self, reader: TraceFormat, zero_output: str, zone: ZoneInfo | None) -> None:
        self.reader = reader
        self.zone = zone
        self.zero_output = zero_output
        self.arrival, self.line = array("q"), array("q")
        self.prompt, self.output, self.status = array("q"), array("q"), array("b")
        self.session: dict[int, str] = {}
        self.hashes: dict[int, bytes] = {}
        self.dense: dict[Any, int] = {}
        self.block_tokens = reader.meta.block_size
        self.files = 0
        self.seen: set[str] = set()
        self.others = 0
        self.other_kinds: set[str] = set()
        self.skipped: dict[str, Skipped] = {}
        self.read_rows = 0
        self.zoned: set[bool | None] = set()
        self.order: np.ndarray[Any, np.dtype[np.int64]] = np.empty(0, dtype=np.int64)

    def skip(self, reason: str, line: int, detail: str) -> None:
        held = self.skipped.setdefault(reason, Skipped())
        held.count += 1
        if len(held.first_lines) < 5:
            held.first_lines.append(line)
        held.example = held.example or detail

    def read(self, path: Path, progress: Callable[[int], None] | None) -> None:
        self.files += 1
        try:
            with _open(path) as lines:
                for line, row in self.reader.rows(_Bounded(lines, progress)):  # type: ignore[arg-type]
                    self.read_rows += 1
                    if isinstance(row, BadRowError):
                        self.skip(row.reason, line, str(row))
                    elif isinstance(row, OtherEvent):
                        self.others += 1
                        if len(self.other_kinds) < 5:
                            self.other_kinds.add(row.what)
                    else:
                        self.keep(line, row)
        except BadFileError as error:
            raise InputError(f"{path}: {error}.") from error
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{path}: cannot be read to its end ({error}). Nothing was stored.") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: is not UTF-8 text (byte {error.start}). Nothing was stored.") from error

    def keep(self, line: int, row: Row) -> None:
        if row.prompt_tokens == 0:
            self.skip("failed_zero_input", line, "a request without prompt tokens")
            return
        if row.id is not None:
            if row.id in self.seen:
                self.skip("duplicate_request_id", line, f"request {row.id[:40]!r} was there before")
                return
            self.seen.add(row.id)
        output, status = row.output_tokens, row.status
        if output == 0:
            if self.zero_output == "skip":
                self.skip("failed_zero_output", line, "a request without answer tokens")
                return
            output, status = (1, status) if self.zero_output == "min1" else (0, _FAILED)
        at = len(self.arrival)
        if self.zone is not None and row.zoned is False:
            naive = datetime(1970, 1, 1) + timedelta(microseconds=row.arrival_us)
            local = naive.replace(tzinfo=self.zone) - datetime(1970, 1, 1, tzinfo=UTC)
            self.arrival.append(local // timedelta(microseconds=1))
        else:
            self.arrival.append(row.arrival_us)
        self.line.append(line)
        self.prompt.append(row.prompt_tokens)
        self.output.append(-1 if output is None else output)
        self.status.append(status)
        self.zoned.add(row.zoned)
        if row.session_key is not None:
            self.session[at] = row.session_key
        if row.hash_ids is not None:
            if row.block_tokens is not None and row.block_tokens != self.block_tokens:
                if self.block_tokens is not None:
                    raise BadFileError(
                        f"line {line}: blocks of {row.block_tokens} tokens after blocks of {self.block_tokens}"
                    )
                self.block_tokens = row.block_tokens
            known = self.dense
            if self.reader.meta.hash_scope == "session":
                ids = [known.setdefault((self.files, i), len(known)) for i in row.hash_ids]
            else:
                ids = [known.setdefault(i, len(known)) for i in row.hash_ids]
            self.hashes[at] = pack(ids)

    def check(self, paths: Sequence[Path], max_bad: float) -> None:
        where = str(paths[0])
        if not self.read_rows:
            raise InputError(f"{where}: holds no rows, only a header. Nothing was stored.")
        harmless = ("failed_zero_input", "failed_zero_output", "duplicate_request_id")
        wrong = {reason: s for reason, s in self.skipped.items() if reason not in harmless}
        counted = sum(s.count for s in wrong.values())
        if counted > max_bad * self.read_rows:
            reason, worst = max(wrong.items(), key=lambda item: item[1].count)
            raise InputError(
                f"{where}:{worst.first_lines[0]}: {worst.example} ({reason}); {counted} of {self.read_rows} rows are bad, "
                f"more than {max_bad:.0%}. Mend the file or pass --max-bad. Nothing was stored."
            )
        if not len(self.arrival):
            why = [f"{s.count} {reason}" for reason, s in self.skipped.items()]
            if self.others:
                why.append(f"{self.others} other events: {', '.join(sorted(self.other_kinds))}")
            raise InputError(f"{where}: no row can be kept ({', '.join(why)}). Nothing was stored.")
        arrival = np.frombuffer(self.arrival, dtype=np.int64)
        self.order = np.lexsort((np.frombuffer(self.line, dtype=np.int64), arrival))

    @property
    def origin(self) -> str | None:
        if self.zoned <= {None}:
            return None
        first = int(np.frombuffer(self.arrival, dtype=np.int64)[self.order[0]])
        return datetime.fromtimestamp(first / 1e6, UTC).isoformat()

    def batches(self) -> Iterator[dict[str, list[Any]]]:
        columns: dict[str, np.ndarray[Any, Any]] = {
            "source_line": np.frombuffer(self.line, dtype=np.int64),
            "arrival_us": np.frombuffer(self.arrival, dtype=np.int64),
            "prompt_tokens": np.frombuffer(self.prompt, dtype=np.int64),
            "output_tokens": np.frombuffer(self.output, dtype=np.int64),
            "status": np.frombuffer(self.status, dtype=np.int8),
        }
        origin = int(columns["arrival_us"][self.order[0]])
        for start in range(0, len(self.order), HEAD):
            picked = self.order[start : start + HEAD]
            batch: dict[str, list[Any]] = {name: column[picked].tolist() for name, column in columns.items()}
            batch["seq"] = list(range(start, start + len(picked)))
            batch["arrival_us"] = [t - origin for t in batch["arrival_us"]]
            batch["output_tokens"] = [None if v < 0 else v for v in batch["output_tokens"]]
            rows = picked.tolist()
            batch["session_key"] = [self.session.get(i) for i in rows]
            batch["hash_ids"] = [self.hashes.get(i) for i in rows]
            yield batch

    def report(self, name: str) -> IngestReport:
        arrival = np.frombuffer(self.arrival, dtype=np.int64)
        gaps = np.diff(arrival)
        kept = len(arrival)
        output = np.frombuffer(self.output, dtype=np.int64)
        notes = []
        if False in self.zoned:
            notes.append(f"times carry no zone: taken as {self.zone.key if self.zone else 'UTC'}")
        if {True, False} <= self.zoned:
            notes.append("some times carry a zone and some do not")
        distinct = len(np.unique(arrival))
        ordered = np.diff(arrival[self.order])
        if kept > 2 and distinct > 2 and len(np.unique(ordered)) == 1:
            notes.append("looks synthetic: every gap is the same")
        if distinct < kept:
            notes.append(f"{kept - distinct} of {kept} rows share another row's time: the source's clock is coarse")
        skipped = sum(s.count for s in self.skipped.values())
        if self.read_rows != kept + skipped + self.others:
            raise AssertionError(f"{self.read_rows} rows read, {kept} kept, {skipped} skipped, {self.others} others")
        return IngestReport(
            name=name,
            format=self.reader.name,
            rows_read=self.read_rows,
            rows_kept=kept,
            skipped=self.skipped,
            other_events=self.others,
            sum_prompt_tokens=int(np.frombuffer(self.prompt, dtype=np.int64).sum()),
            sum_output_tokens=int(output[output > 0].sum()),
            span_s=float(arrival.max() - arrival.min()) / 1e6,
            distinct_arrivals=distinct,
            prefix_hit_tokens=self.prefix_hits() if self.hashes else None,
            inversions=int((gaps < 0).sum()),
            equal_times=int((gaps == 0).sum()),
            failed_rows=int((np.frombuffer(self.status, dtype=np.int8) != _OK).sum()),
            clock=self.reader.meta.clock,
            notes=notes,
        )

    def prefix_hits(self) -> int:
        """Prompt tokens in leading blocks that an earlier request already had, with an unlimited cache from cold."""
        block = self.block_tokens or 1
        seen: set[int] = set()
        total = 0
        for at in self.order.tolist():
            ids = unpack(self.hashes[at]) if at in self.hashes else []
            leading = 0
            for i in ids:
                if i not in seen:
                    break
                leading += 1
            total += min(leading * block, self.prompt[at])
            seen.update(ids)
        return total


class _Bounded:
    """Lines of a text file, none longer than LINE_LIMIT; a longer one arrives cut, and so fails as a row."""

    def __init__(self, text: TextIO, progress: Callable[[int], None] | None) -> None:
        self._text = text
        self._progress = progress
        self._seen = 0

    def __iter__(self) -> Iterator[str]:
        n = 0
        while True:
            line = self._text.readline(LINE_LIMIT)
            if not line:
                break
            if len(line) == LINE_LIMIT and not line.endswith("\n"):
                while rest := self._text.readline(LINE_LIMIT):
                    if rest.endswith("\n"):
                        break
                line = line[:100] + "\n"
            yield line.replace("\x00", "\ufffd")
            self._seen += len(line)
            n += 1
            if self._progress and n % 4096 == 0:
                self._progress(self._seen)
        if self._progress:
            self._progress(self._seen)


def _identity(path: Path) -> dict[str, Any]:
    """Name, size and sha256 of a regular file."""
    try:
        if path.is_dir():
            raise InputError(f"{path}: is a folder. Give a file.")
        if not path.exists():
            raise InputError(f"{path}: no such file. Check the path, or see the shipped traces: steelyard demo")
        if not path.is_file():
            raise InputError(f"{path}: is not a regular file. Give a file that ends.")
        digest = hashlib.sha256()
        with path.open("rb") as f:
            while block := f.read(1 << 20):
                digest.update(block)
        return {"name": path.name, "sha256": digest.hexdigest(), "bytes": path.stat().st_size}
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from error


def _open(path: Path) -> TextIO:
    with path.open("rb") as f:
        magic = f.read(4)
    if magic[:2] == b"\x1f\x8b":
        return io.TextIOWrapper(gzip.open(path, "rb"), encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _zone(tz: str | None) -> ZoneInfo | None:
    try:
        return None if tz is None else ZoneInfo(tz)
    except (ValueError, KeyError, OSError):
        raise InputError(f"--tz must be a time zone like Europe/Berlin or UTC (got {tz!r}).") from None


def _recognise(path: Path, wanted: str | None, columns: str | None = None, time_unit: str = "s") -> TraceFormat:
    """The one format that the file is of, or the one that the user's map describes."""
    known = formats()
    if wanted is not None and wanted not in known:
        raise InputError(f"--format must be one of {', '.join(known)} (got {wanted!r}).")
    try:
        with path.open("rb") as f:
            raw = f.read(HEAD)
        if raw[:2] == b"\x1f\x8b":
            with gzip.open(path, "rb") as g:
                raw = g.read(HEAD)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error}).") from error
    refusal = _refusal(raw)
    if refusal:
        raise InputError(f"{path}: {refusal}. Known formats: {', '.join(known)}.")
    head = raw.decode("utf-8-sig", errors="replace")
    if columns is not None:
        if wanted is not None:
            raise InputError("--format and --map exclude each other: a map describes any CSV or JSONL.")
        mapped = generic(columns, time_unit, head)
        missing = mapped.sniff(head)
        if missing is not None:
            raise InputError(f"{path}: {missing}. Check the names in --map.")
        return mapped
    if wanted is not None:
        return known[wanted]
    verdicts = {name: reader.sniff(head) for name, reader in known.items()}
    winners = [name for name, missing in verdicts.items() if missing is None]
    if len(winners) != 1:
        why = (
            f"could be {' or '.join(winners)}: say which with --format"
            if winners
            else "is of no known format (" + "; ".join(f"{n}: {missing}" for n, missing in verdicts.items()) + ")"
        )
        raise InputError(f"{path}: {why}.")
    return known[winners[0]]


def _refusal(raw: bytes) -> str | None:
    start = raw.lstrip()[:64].lower()
    if not raw.strip():
        return "the file is empty"
    if raw.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself: fetch it with git lfs pull"
    if start.startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "is a web page, not a trace: was a download link saved instead of the file?"
    if raw.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return "is a Python pickle, which is never opened: export it as CSV or JSONL"
    if raw.startswith(b"\x28\xb5\x2f\xfd"):
        return "is compressed with zstd: write zstd -dc FILE | steelyard ingest - --name NAME"
    if raw.startswith(b"PK\x03\x04"):
        return "is a zip archive: unpack it first"
    if raw.startswith(b"PAR1"):
        return "is a Parquet file, which this version does not read"
    if raw.count(b"\x00") > len(raw) // 1000:
        return "is binary, not a text log"
    return None


def clean_rate(text: str) -> float:
    """``5%`` or ``0.05``, within 0..1."""
    try:
        value = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise InputError(f"--max-bad must be a share like 5% or 0.05 (got {text!r}).")
    return value


def store_schedule(store: Store, schedule: Schedule, *, options: dict[str, Any]) -> IngestReport:
    """Store a synthetic schedule as a trace. The same options again are a no-op; the name with others is refused."""
    digest = schedule.digest()
    for info in store.traces():
        if info.name == schedule.name:
            if info.sha256 == digest:
                return IngestReport.of(info, already=True)
            raise InputError(
                f"a trace named {schedule.name!r} is already stored with other content. Give another --name, "
                f"or remove it: steelyard traces delete {schedule.name}"
            )
    n = len(schedule)
    arrival = np.rint(schedule.due_s * 1e6).astype(np.int64)
    columns = {
        "seq": list(range(n)),
        "source_line": list(range(1, n + 1)),
        "arrival_us": arrival.tolist(),
        "prompt_tokens": schedule.prompt_tokens.tolist(),
        "output_tokens": schedule.output_tokens.tolist(),
        "status": [_OK] * n,
        "session_key": [None] * n,
        "hash_ids": [None] * n,
    }
    report = IngestReport(
        name=schedule.name,
        format="synthetic",
        rows_read=n,
        rows_kept=n,
        skipped={},
        other_events=0,
        sum_prompt_tokens=int(schedule.prompt_tokens.sum()),
        sum_output_tokens=int(schedule.output_tokens.sum()),
        span_s=schedule.span_s,
        distinct_arrivals=len(np.unique(arrival)),
        prefix_hit_tokens=None,
        inversions=0,
        equal_times=int((np.diff(arrival) == 0).sum()),
        failed_rows=0,
        clock="microsecond",
        notes=["synthetic: " + ", ".join(f"{k} {v}" for k, v in options.items() if v is not None)],
    )
    summary = {k: v for k, v in asdict(report).items() if k not in ("name", "format", "already")}
    info = store.add_trace(
        name=schedule.name,
        format="synthetic",
        sha256=digest,
        files=[],
        options=options,
        batches=[columns],
        summary=lambda: (summary, None, None, None),
    )
    return IngestReport.of(info)
