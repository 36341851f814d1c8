"""A recorded trace into the database: recognised, validated, counted, all of it or none.

Invariant, checked on every load: ``rows_read == rows_kept + sum(skipped) + other_events``. The same bytes again are a
no-op that says so; the same name with other bytes is refused.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import itertools
import math
import shlex
import sys
import tempfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self, TextIO, cast
from zoneinfo import ZoneInfo

import numpy as np

from traces.errors import InputError, SteelyardError, understood
from traces.formats import BadFileError, BadRowError, Batch, OtherEvent, Row, TraceFormat, formats
from traces.formats.blocks import pack, unpack
from traces.formats.generic import generic, parse_map
from traces.formats.mooncake import mooncake
from traces.records import Schedule
from traces.shipped import NAMES
from traces.store import Store, TraceInfo
from traces.unpack import Bounded, Unpacked, names

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

HEAD = 65_536
"""Bytes that a format is recognised by."""

PIECE = 16_384
"""Rows held at once."""

MAX_BAD = 0.05
LINE_LIMIT = 4 << 20
"""Longest line that is read, in characters, of a format without ``longest``; a longer one is skipped and counted, never held."""

GZIP, ZSTD, PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
YEAR_10000_US = 253_402_300_800 * 10**6
"""Microseconds since 1970 that no calendar here has."""

ZERO_OUTPUT = ("keep-failed", "skip", "min1")
_OK, _FAILED = 0, 1


@dataclass(slots=True)
class Skipped:
    """Rows left out for one reason. example: what one of them was, of a load just done; it is not stored."""

    count: int = 0
    first_lines: list[int] = field(default_factory=list)
    example: str = ""


@dataclass(frozen=True, slots=True)
class IngestReport:
    """What a load did. Keys as ``ingest --json`` prints them. span_s, distinct_arrivals, sums: of the rows kept.

    inversions: rows that came before their predecessor's time; equal_times: rows at the same time as it. clock: unit of the
    source's times; smallest_gap_s: between two arrivals that are not at one instant, None where all are.
    prefix_hit_tokens: prompt tokens that an unlimited prefix cache would have held, None without block ids. replayable: rows that
    did not fail and whose answer is known, which a replay asks; longest_prompt_tokens: of them. None of traces that were stored
    before these were kept.
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
    smallest_gap_s: float | None = None
    replayable: int | None = None
    longest_prompt_tokens: int | None = None

    @classmethod
    def of(cls, info: TraceInfo, *, already: bool = False) -> IngestReport:
        """The report that was stored with a trace."""
        with understood(f"what was counted of the trace {info.name!r}", "Ingest it under another --name."):
            values = dict(info.summary)
            values["skipped"] = {reason: Skipped(**s) for reason, s in values["skipped"].items()}
            made = cls(**values | {"name": info.name, "format": info.format, "already": already})
            kinds = {"int": (int,), "float": (int, float), "str": (str,), "list[str]": (list,), "None": (type(None),)}
            for f in fields(cls):
                kind = [k for name in str(f.type).split(" | ") for k in kinds.get(name, (object,))]
                if not isinstance(getattr(made, f.name), tuple(kind)):
                    raise TypeError(f"its {f.name} is {getattr(made, f.name)!r}")
        return made


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
    block_size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> IngestReport:
    """Load files as one trace. InputError refuses a file whole and leaves nothing behind.

    name: default is the first file's stem. zero_output: rows without answer tokens are kept as failed, skipped, or given
    one token. columns, time_unit: the user's map of any CSV, JSONL or Parquet (:mod:`traces.formats.generic`). tz: zone of
    times that carry none, default UTC. block_size: tokens of a Mooncake file's blocks, if not 512. progress(bytes read).
    """
    if not paths:
        raise InputError("no file was given. Write: steelyard ingest FILE")
    if zero_output not in ZERO_OUTPUT:
        raise InputError(f"--zero-output must be one of {', '.join(ZERO_OUTPUT)} (got {zero_output!r}).")
    files = [_identity(path) for path in paths]
    digest = hashlib.sha256("".join(f["sha256"] for f in files).encode() if len(files) > 1 else b"").hexdigest()
    sha256 = digest if len(files) > 1 else files[0]["sha256"]
    wanted = name or Path(files[0]["name"]).name.split(".")[0]
    zone = zone_of(tz)
    reader = recognise(paths[0], format, columns, time_unit)
    if block_size is not None:
        if reader.name != "mooncake" or block_size < 1:
            raise InputError(
                f"--block-size is of Mooncake files and at least 1: the others say theirs (got {block_size} for {reader.name})."
            )
        reader = mooncake(block_size)
    options: dict[str, Any] = {"zero_output": zero_output, "max_bad": max_bad}
    if columns is not None:
        options |= {"map": columns, "time_unit": time_unit}
    if tz is not None:
        options["tz"] = tz
    if block_size is not None:
        options["block_size"] = block_size
    asked = {k: v for k, v in options.items() if k != "max_bad"}

    def there() -> IngestReport | None:
        for info in store.traces():
            if info.name != wanted:
                continue
            before = {k: v for k, v in info.options.items() if k != "max_bad"}
            if info.sha256 == sha256 and info.format == reader.name and before == asked:
                return IngestReport.of(info, already=True)
            raise InputError(
                f"a trace named {wanted!r} is already stored with other content or options. Give another --name, "
                f"or remove it: steelyard traces delete {shlex.quote(wanted)}"
            )
        return None

    if known := there():
        return known
    with _Loaded(reader, zero_output, zone) as loaded:
        try:
            return _load(store, loaded, paths, wanted, sha256, files, options, max_bad, progress)
        except SteelyardError:
            if known := there():  # somebody else stored it meanwhile
                return known
            raise


def _load(
    store: Store,
    loaded: _Loaded,
    paths: Sequence[Path],
    wanted: str,
    sha256: str,
    files: Sequence[dict[str, Any]],
    options: dict[str, Any],
    max_bad: float,
    progress: Callable[[int], None] | None,
) -> IngestReport:
    for path, known in zip(paths, files, strict=True):
        loaded.read(path, progress)
        if _identity(path)["sha256"] != known["sha256"]:
            raise InputError(
                f"{path}: changed while it was read. Load it when nobody writes to it. Nothing was stored."
            )
    loaded.check(paths, max_bad)
    reader = loaded.reader

    def summary() -> tuple[dict[str, Any], str | None, int | None, str | None]:
        report = asdict(loaded.report(wanted))
        for gone in ("name", "format", "already"):
            report.pop(gone)
        for skipped in report["skipped"].values():
            skipped["example"] = ""  # it quotes the file, and so perhaps a prompt: said once, never stored
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
    return replace(IngestReport.of(info), skipped=loaded.skipped)


_RECORD = np.dtype(
    [
        ("arrival_us", np.int64),
        ("line", np.int32),
        ("prompt", np.int32),
        ("output", np.int32),
        ("status", np.int8),
        ("turn", np.int32),
        ("think", np.int64),
        ("ttft", np.int64),
        ("e2e", np.int64),
    ]
)
_TIMED = {"turn": "turn", "think": "think_us", "ttft": "source_ttft_us", "e2e": "source_e2e_us"}


class _Loaded:
    """The rows of a source, 49 bytes each in a temporary file; a context manager.

    A source in order of time is never held in memory; of one that is not, the arrivals are, to sort them.
    """

    def __init__(self, reader: TraceFormat, zero_output: str, zone: ZoneInfo | None) -> None:
        self.reader = reader
        self.zone = zone
        self.zero_output = zero_output
        self.session: dict[int, str] = {}
        self.hashes: dict[int, bytes] = {}
        self.dense: defaultdict[Any, int] = defaultdict(itertools.count().__next__)  # numbers by first appearance
        self.block_tokens = reader.meta.block_size
        self.files = 0
        self.seen: dict[str, int] = {}  # request id -> the row's position
        self.parents: dict[int, str] = {}
        self.timed: set[str] = set()  # fields of _TIMED that any row has
        self.others = 0
        self.other_kinds: set[str] = set()
        self.skipped: dict[str, Skipped] = {}
        self._path = Path()
        self._first_in: dict[str, Path] = {}  # reason -> the file of the first row skipped for it
        self.twice = 0  # times that the user's zone has twice
        self.read_rows = 0
        self.zones: Counter[bool | None] = Counter()
        self.odd: Counter[str] = Counter()
        self.kept = self.inversions = self.equal = self.failed = self.sum_prompt = self.sum_output = 0
        self.first_us = self.last_us = self._at_us = self._at_line = 0
        self.hits = 0  # of the prefix cache, while rows come in order
        self.gap_us: int | None = None  # between all rows so far; -1 once two gaps differ
        self.least_us: int | None = None
        self.replayable = self.longest = 0
        self.in_order = True
        self._held: list[tuple[int, ...]] = []
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        self._order: np.ndarray[Any, np.dtype[np.int64]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def skip(self, reason: str, line: int, detail: str, count: int = 1) -> None:
        held = self.skipped.setdefault(reason, Skipped())
        self._first_in.setdefault(reason, self._path)
        held.count += count
        if len(held.first_lines) < 5:
            held.first_lines.append(line)
        held.example = held.example or (detail if self.files == 1 else f"{detail} ({self._path.name})")

    def read(self, path: Path, progress: Callable[[int], None] | None) -> None:
        self.files += 1
        self._path = path
        longest = getattr(self.reader, "longest", LINE_LIMIT)
        limit = csv.field_size_limit(longest)  # logs hold prompts: one of half a megabyte is no bad row
        read: Callable[[Any], Iterator[Any]] = getattr(self.reader, "batches", self.reader.rows)
        try:
            with _open(path, getattr(self.reader, "columns", ())) as lines:
                for item in read(_Bounded(lines, progress, longest)):
                    if isinstance(item, Batch):
                        self.keep_batch(item)
                        continue
                    line, row = item
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
        except (OSError, EOFError, zlib.error, zstd.ZstdError) as error:
            raise InputError(f"{path}: cannot be read to its end ({error}). Nothing was stored.") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: is not UTF-8 text (byte {error.start}). Nothing was stored.") from error
        finally:
            csv.field_size_limit(limit)

    def keep(self, line: int, row: Row) -> None:
        """One row; what it has beside counts (session, blocks, id) is looked at here."""
        if row.prompt_tokens == 0:
            self.skip("failed_zero_input", line, "a request without prompt tokens")
            return
        twin = None if row.id is None else self.seen.get(row.id)
        if row.id is not None and twin is not None and not getattr(self.reader, "joins", False):
            self.skip("duplicate_request_id", line, f"request {row.id[:40]!r} was there before")
            return
        output, status = row.output_tokens, row.status
        if output == 0:
            if self.zero_output == "skip":
                self.skip("failed_zero_output", line, "a request without answer tokens")
                return
            output, status = (1, status) if self.zero_output == "min1" else (0, _FAILED)
        at = self.kept + len(self._held)
        arrival = row.arrival_us if self.zone is None else self._local(row.arrival_us, row.zoned)
        written = -1 if output is None else output
        record = (arrival, line, row.prompt_tokens, written, status, row.turn, row.think_us, row.ttft_us, row.e2e_us)
        if row.id is not None and twin is not None:
            self.skip("duplicate_request_id", line, f"request {row.id[:40]!r} was there before: both are one row")
            self._join(twin, record)
            if row.session_key is not None:
                self.session.setdefault(twin, row.session_key)
            return
        self._held.append(record)
        if row.id is not None:
            self.seen[row.id] = at
        if row.parent is not None:
            self.parents[at] = row.parent
        self.zones[row.zoned] += 1
        if row.odd is not None:
            self.odd[row.odd] += 1
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
            before = len(known)
            if self.reader.meta.hash_scope == "session":
                ids = [known[self.files, i] for i in row.hash_ids]
            else:
                ids = list(map(known.__getitem__, row.hash_ids))
            self.hashes[at] = pack(ids)
            leading = 0
            for i in ids:
                if i >= before:  # not seen before this row
                    break
                leading += 1
            self.hits += min(leading * (self.block_tokens or 1), row.prompt_tokens)
        if len(self._held) >= PIECE:
            self._flush()

    def _join(self, at: int, found: tuple[int, ...]) -> None:
        """Another row of the request at a position: it lasts from the first arrival to the last end, with the larger counts.
        How it ended, and when its first token came, the row says that ended last: of a prefill and a decode the decode's."""
        place = at * _RECORD.itemsize
        before = self._held[at - self.kept] if at >= self.kept else self._record(place)
        last = max(found, before, key=lambda row: row[0] + max(row[8], 0))
        arrival = min(before[0], found[0])
        late = last[0] - arrival
        _, _, prompt, output, _, turn, think, _, _ = map(max, before, found)
        ttft, e2e = (-1 if lasted < 0 else late + lasted for lasted in last[7:])
        joined = (arrival, before[1], prompt, output, last[4], turn, think, ttft, e2e)
        if at >= self.kept:
            self._held[at - self.kept] = joined
            return
        self._file.seek(place)
        self._file.write(np.array([joined], dtype=_RECORD).tobytes())
        self._file.seek(0, io.SEEK_END)

    def _record(self, place: int) -> tuple[int, ...]:
        self._file.seek(place)
        return cast(tuple[int, ...], np.frombuffer(self._file.read(_RECORD.itemsize), dtype=_RECORD)[0].item())

    def keep_batch(self, batch: Batch) -> None:
        """Many rows of counts and times alone."""
        self._flush()
        n = len(batch.arrival_us)
        self.read_rows += n
        self.zones[batch.zoned] += n
        rows = np.full(n, -1, dtype=_RECORD)
        rows["arrival_us"] = batch.arrival_us
        rows["line"] = np.arange(batch.first_line, batch.first_line + n)
        rows["prompt"], rows["output"] = batch.prompt_tokens, batch.output_tokens
        rows["status"] = _OK
        if self.zone is not None and batch.zoned is False:
            rows["arrival_us"] = [self._local(t, False) for t in batch.arrival_us.tolist()]
        none = rows["prompt"] == 0
        if none.any():
            for line in rows["line"][none].tolist():
                self.skip("failed_zero_input", line, "a request without prompt tokens")
            rows = rows[~none]
        silent = rows["output"] == 0
        if silent.any():
            if self.zero_output == "skip":
                for line in rows["line"][silent].tolist():
                    self.skip("failed_zero_output", line, "a request without answer tokens")
                rows = rows[~silent]
            elif self.zero_output == "min1":
                rows["output"][silent] = 1
            else:
                rows["status"][silent] = _FAILED
        self._put(rows)

    def _local(self, arrival_us: int, zoned: bool | None) -> int:
        """A time without a zone, in the zone that the user named."""
        if self.zone is None or zoned is not False:
            return arrival_us
        local = (datetime(1970, 1, 1) + timedelta(microseconds=arrival_us)).replace(tzinfo=self.zone)
        first, second = (
            (time - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
            for time in (local, local.replace(fold=1))
        )
        self.twice += second > first
        return first

    def _flush(self) -> None:
        if self._held:
            self._put(np.array(self._held, dtype=_RECORD))
            self._held.clear()

    def _put(self, rows: np.ndarray[Any, Any]) -> None:
        """Write rows behind the others."""
        self.kept += len(rows)
        self._file.write(rows.tobytes())

    def _count(self, rows: np.ndarray[Any, Any]) -> None:
        """What the report says of rows, in the order in which they were read; lines begin at 1."""
        arrival, line = rows["arrival_us"], rows["line"].astype(np.int64)
        if not self._at_line:
            self.first_us = self.last_us = self._at_us = int(arrival[0])
            gaps, steps = np.diff(arrival), np.diff(line)
        else:
            gaps = np.diff(arrival, prepend=np.int64(self._at_us))
            steps = np.diff(line, prepend=np.int64(self._at_line))
        back, same = gaps < 0, gaps == 0
        self.inversions += int(back.sum())
        self.equal += int(same.sum())
        self.in_order = self.in_order and not back.any() and not bool((same & (steps < 0)).any())
        for gap in (int(gaps.min()), int(gaps.max())) if len(gaps) else ():
            self.gap_us = gap if self.gap_us in (None, gap) else -1
        ahead = gaps[gaps > 0]
        if len(ahead):
            self.least_us = min(int(ahead.min()), self.least_us or int(ahead.min()))
        self.first_us, self.last_us = min(self.first_us, int(arrival.min())), max(self.last_us, int(arrival.max()))
        self._at_us, self._at_line = int(arrival[-1]), int(line[-1])
        self.failed += int((rows["status"] != _OK).sum())
        self.sum_prompt += int(rows["prompt"].sum(dtype=np.int64))
        self.sum_output += int(rows["output"][rows["output"] > 0].sum(dtype=np.int64))
        asked = rows["prompt"][(rows["status"] == _OK) & (rows["output"] >= 1)]
        if len(asked):
            self.replayable += len(asked)
            self.longest = max(self.longest, int(asked.max()))
        for name in _TIMED:
            if name not in self.timed and (rows[name] >= 0).any():
                self.timed.add(name)

    def check(self, paths: Sequence[Path], max_bad: float) -> None:
        """Refuse what is too bad; then put the rest in order."""
        self._flush()
        where = str(paths[0])
        if not self.read_rows:
            raise InputError(f"{where}: holds no rows, only a header. Nothing was stored.")
        harmless = ("failed_zero_input", "failed_zero_output", "duplicate_request_id")
        wrong = {reason: s for reason, s in self.skipped.items() if reason not in harmless}
        counted = sum(s.count for s in wrong.values())
        if counted > max_bad * self.read_rows:
            reason, worst = max(wrong.items(), key=lambda item: item[1].count)
            raise InputError(
                f"{self._first_in[reason]}:{worst.first_lines[0]}: {worst.example} ({reason}); {counted} of "
                f"{self.read_rows} rows are bad, more than {max_bad:.0%}. Mend the file or pass --max-bad. Nothing was stored."
            )
        if not self.kept:
            why = [f"{s.count} {reason}" for reason, s in self.skipped.items()]
            if self.others:
                why.append(f"{self.others} other events: {', '.join(sorted(self.other_kinds))}")
            raise InputError(f"{where}: no row can be kept ({', '.join(why)}). Nothing was stored.")
        for rows, _ in self._pieces():  # not before: a row may still have been joined with a later one
            self._count(rows)
        if not self.zones.keys() <= {None} and self.first_us >= YEAR_10000_US:
            raise InputError(f"{where}: its first time is after the year 9999: is its unit right? Nothing was stored.")
        self._file.flush()
        if not self.in_order:
            rows = self._rows()
            self._order = np.lexsort((rows["line"], rows["arrival_us"]))

    def _rows(self) -> np.ndarray[Any, Any]:
        return np.memmap(self._file, dtype=_RECORD, mode="r", shape=(self.kept,))

    @property
    def origin(self) -> str | None:
        if self.zones.keys() <= {None}:
            return None
        return datetime.fromtimestamp(self.first_us / 1e6, UTC).isoformat()

    def _pieces(self) -> Iterator[tuple[np.ndarray[Any, Any], Sequence[int]]]:
        """(rows, their positions as read) in order of time, PIECE at a time."""
        if self._order is None:
            self._file.seek(0)
            for start in range(0, self.kept, PIECE):
                found = np.frombuffer(self._file.read(PIECE * _RECORD.itemsize), dtype=_RECORD)
                yield found, range(start, start + len(found))
            return
        rows = self._rows()
        for start in range(0, self.kept, PIECE):
            picked = self._order[start : start + PIECE]
            yield rows[picked], picked.tolist()

    def batches(self) -> Iterator[dict[str, list[Any]]]:
        """Columns for the database; those without a value are left out."""
        start = 0
        links = _Links(self) if self.session or self.parents else None
        for rows, places in self._pieces():
            n = len(rows)
            output = rows["output"].tolist()
            held: dict[str, list[Any]] = {
                "seq": list(range(start, start + n)),
                "source_line": rows["line"].tolist(),
                "arrival_us": (rows["arrival_us"] - self.first_us).tolist(),
                "prompt_tokens": rows["prompt"].tolist(),
                "output_tokens": [None if v < 0 else v for v in output] if min(output) < 0 else output,
                "status": rows["status"].tolist(),
            }
            for name in self.timed:
                held[_TIMED[name]] = [None if v < 0 else v for v in rows[name].tolist()]
            if self.session:
                held["session_key"] = [self.session.get(i) for i in places]
            if self.hashes:
                held["hash_ids"] = [self.hashes.get(i) for i in places]
            if links is not None:
                held |= links.of(rows, places, start)
            yield held
            start += n

    def report(self, name: str) -> IngestReport:
        """What the load did."""
        kept, notes = self.kept, []
        if False in self.zones:
            notes.append(f"times carry no zone: taken as {self.zone.key if self.zone else 'UTC'}")
        if {True, False} <= self.zones.keys():
            notes.append(f"{self.zones[True]} times carry a zone and {self.zones[False]} do not")
        if self.twice:
            notes.append(
                f"{self.twice} times are of the hour that {self.zone} has twice, in autumn: all taken as of the first, so that "
                "an hour may hold the requests of two. Times with their offset, or in UTC, say which"
            )
        notes += [f"{count} rows {what}" for what, count in self.odd.items()]
        distinct, gap, least = kept - self.equal, self.gap_us, self.least_us
        if self._order is not None:
            gaps = np.diff(self._rows()["arrival_us"][self._order])
            distinct = 1 + int((gaps != 0).sum())
            least = int(gaps[gaps != 0].min()) if distinct > 1 else None
            gap = int(gaps[0]) if len(gaps) and int(gaps.min()) == int(gaps.max()) else -1
        if kept > 2 and distinct > 2 and gap is not None and gap >= 0:
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
            sum_prompt_tokens=self.sum_prompt,
            sum_output_tokens=self.sum_output,
            span_s=(self.last_us - self.first_us) / 1e6,
            distinct_arrivals=distinct,
            prefix_hit_tokens=self.prefix_hits() if self.hashes else None,
            inversions=self.inversions,
            equal_times=self.equal,
            failed_rows=self.failed,
            clock=self.reader.meta.clock,
            notes=notes,
            smallest_gap_s=None if least is None else least / 1e6,
            replayable=self.replayable,
            longest_prompt_tokens=self.longest,
        )

    def prefix_hits(self) -> int:
        """Prompt tokens in leading blocks that an earlier request already had, with an unlimited cache from cold."""
        if self._order is None:
            return self.hits
        block = self.block_tokens or 1
        seen: set[int] = set()
        total = 0
        for rows, places in self._pieces():
            for prompt, at in zip(rows["prompt"].tolist(), places, strict=True):
                ids = unpack(self.hashes[at]) if at in self.hashes else []
                leading = 0
                for i in ids:
                    if i not in seen:
                        break
                    leading += 1
                total += min(leading * block, prompt)
                seen.update(ids)
        return total


class _Links:
    """Which request each one continues: the one that its row names, or the one before in its session.

    A request that arrived while the one before was still being answered continues nothing. Rows come in order of time.
    """

    def __init__(self, loaded: _Loaded) -> None:
        self._loaded = loaded
        self._last: dict[str, int] = {}  # session -> seq of its latest row
        self._turns: dict[str, int] = {}
        self._end_us: dict[int, int] = {}  # seq -> when its answer ended, where the source says it
        self._rank: np.ndarray[Any, Any] | None = None
        if loaded._order is not None and loaded.parents:
            self._rank = np.empty(loaded.kept, dtype=np.int64)
            self._rank[loaded._order] = np.arange(loaded.kept)

    def of(self, rows: np.ndarray[Any, Any], places: Sequence[int], start: int) -> dict[str, list[int | None]]:
        """The columns turn, parent_seq and think_us of a piece."""
        turns: list[int | None] = []
        parents: list[int | None] = []
        thinks: list[int | None] = []
        columns = (rows["arrival_us"].tolist(), rows["e2e"].tolist(), rows["turn"].tolist(), rows["think"].tolist())
        loaded = self._loaded
        for seq, (place, arrival, e2e, turn, think) in enumerate(zip(places, *columns, strict=True), start):
            session = loaded.session.get(place)
            named = loaded.parents.get(place)
            parent: int | None = None
            if named is not None:
                at = loaded.seen.get(named)
                if at is not None:
                    parent = at if self._rank is None else int(self._rank[at])
                    parent = parent if parent < seq else None
            elif session is not None:
                parent = self._last.get(session)
                if parent is not None and self._end_us.get(parent, arrival) > arrival:
                    parent = None
            if session is not None:
                self._last[session] = seq
                self._turns[session] = self._turns.get(session, 0) + 1
                turn = turn if turn >= 0 else self._turns[session]
                if e2e >= 0:
                    self._end_us[seq] = arrival + e2e
            if think < 0 and parent is not None and parent in self._end_us:
                think = max(0, arrival - self._end_us[parent])
            turns.append(turn if turn >= 0 else None)
            parents.append(parent)
            thinks.append(think if think >= 0 and parent is not None else None)
        return {"turn": turns, "parent_seq": parents, "think_us": thinks}


class _Bounded:
    """Lines of a text file, none of ``longest`` characters or more; a longer one arrives cut, and so fails as a row."""

    def __init__(self, text: TextIO, progress: Callable[[int], None] | None, longest: int = LINE_LIMIT) -> None:
        self._text = text
        self._progress = progress
        self._longest = longest
        self._seen = 0

    def blocks(self) -> Iterator[list[str]]:
        """The same lines a quarter of a megabyte at a time, without their line ends."""
        rest = ""
        while piece := self._text.read(1 << 18):
            self._seen += len(piece)
            if self._progress:
                self._progress(self._seen)
            whole = rest + piece
            if "\x00" in piece:
                whole = whole.replace("\x00", "\ufffd")
            lines = whole.split("\n")
            rest = lines.pop()
            if len(rest) >= self._longest:
                lines.append(rest[:100])
                rest = ""
                while piece := self._text.read(1 << 18):  # the rest of a line that is too long is thrown away
                    self._seen += len(piece)
                    _, found, rest = piece.partition("\n")
                    if found:
                        break
            if lines:
                yield lines
        if rest:
            last = rest.split("\n")
            yield last if last[-1] else last[:-1]

    def __iter__(self) -> Iterator[str]:
        n = 0
        while True:
            line = self._text.readline(self._longest)
            if not line:
                break
            if len(line) == self._longest and not line.endswith("\n"):
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
            raise InputError(f"{path}: no such file. Check the path. Shipped traces, by name: {', '.join(NAMES)}.")
        if not path.is_file():
            raise InputError(f"{path}: is not a regular file. Give a file that ends.")
        digest = hashlib.sha256()
        with path.open("rb") as f:
            while block := f.read(1 << 20):
                digest.update(block)
        return {"name": path.name, "sha256": digest.hexdigest(), "bytes": path.stat().st_size}
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from error


def _open(path: Path, columns: Sequence[str] = ()) -> TextIO:
    """The text of a file: as it is, decompressed, or a Parquet's columns as JSONL."""
    with path.open("rb") as f:
        magic = f.read(4)
    return io.TextIOWrapper(_bytes(path, magic, columns), encoding="utf-8-sig", newline="")


def _bytes(path: Path, magic: bytes, columns: Sequence[str] = ()) -> io.BufferedReader:
    if magic == PARQUET:
        raw: Any = Unpacked(path, "rows", columns)
    elif magic[:2] == GZIP:
        raw = gzip.open(path, "rb")  # noqa: SIM115 - closed with what reads it
    elif magic == ZSTD:
        raw = zstd.open(path, "rb", options={zstd.DecompressionParameter.window_log_max: 27})
    else:
        return path.open("rb")
    return io.BufferedReader(Bounded(raw, path.stat().st_size), 1 << 18)


def zone_of(tz: str | None) -> ZoneInfo | None:
    """The zone of that name; None where none is named."""
    try:
        return None if tz is None else ZoneInfo(tz)
    except (ValueError, KeyError, OSError):
        raise InputError(f"--tz must be a time zone like Europe/Berlin or UTC (got {tz!r}).") from None


def recognise(path: Path, wanted: str | None, columns: str | None = None, time_unit: str = "s") -> TraceFormat:
    """The one format that the file is of by its first HEAD bytes, or the one that the user's map describes. InputError: none."""
    known = formats()
    if wanted is not None and wanted not in known:
        raise InputError(f"--format must be one of {', '.join(known)} (got {wanted!r}).")
    try:
        with path.open("rb") as f:
            raw = f.read(HEAD)
        if raw[:4] == PARQUET:
            if columns is None:
                raise InputError(f"{path}: is Parquet: name its columns with --map ({', '.join(names(path))}).")
            with _bytes(path, PARQUET, tuple(parse_map(columns).values())) as g:
                raw = g.readline(LINE_LIMIT)  # a struct may hold a prompt beside its length
        elif raw[:2] == GZIP or raw[:4] == ZSTD:
            with _bytes(path, raw[:4]) as g:
                raw = g.read(HEAD)
    except (OSError, EOFError, zlib.error, zstd.ZstdError, BadFileError) as error:
        raise InputError(f"{path}: cannot be read ({error}).") from error
    refusal = _refusal(raw)
    if refusal:
        raise InputError(f"{path}: {refusal}. Known formats: {', '.join(known)}.")
    head = raw.decode("utf-8-sig", errors="replace")
    if columns is not None:
        if wanted is not None:
            raise InputError("--format and --map exclude each other: a map describes any CSV, JSONL or Parquet.")
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
    if raw.startswith(b"PK\x03\x04"):
        return "is a zip archive: unpack it first"
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
                f"or remove it: steelyard traces delete {shlex.quote(schedule.name)}"
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
        replayable=n,
        longest_prompt_tokens=schedule.longest_prompt,
        notes=["synthetic: " + ", ".join(f"{k} {v}" for k, v in options.items() if v is not None)],
    )
    summary = {k: v for k, v in asdict(report).items() if k not in ("name", "format", "already")}
    try:
        info = store.add_trace(
            name=schedule.name,
            format="synthetic",
            sha256=digest,
            files=[],
            options=options,
            batches=[columns],
            summary=lambda: (summary, None, None, None),
        )
    except SteelyardError:
        if any(info.name == schedule.name for info in store.traces()):  # somebody else stored it meanwhile
            return store_schedule(store, schedule, options=options)
        raise
    return IngestReport.of(info)
