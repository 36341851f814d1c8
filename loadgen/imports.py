"""What other clients measured, as observations of a run: aiperf, guidellm, ``vllm bench serve``, any CSV or JSONL.

Each reader gives one :class:`Measured` a run. A file that cannot be read whole is refused with its line; nothing is guessed:
a client that does not write when its requests were due, or when they were sent, leaves the run without a send lag, and its
verdict says so.
Texts of prompts and answers are passed over.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import shlex
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from loadgen.stream import printable
from traces import __version__
from traces.errors import InputError
from traces.formats import BadRowError
from traces.formats.generic import UNITS
from traces.formats.jsonl import at, parse
from traces.measures import Slo, counts, verdict
from traces.records import CLOSED_LOOP, STATUSES, Aggregate, Fleet, Observations, Run
from traces.store import Store

AGGREGATES = ("concurrency", "prompt_tokens", "output_tokens", "ttft_s", "tpot_s")
"""Names of a CSV or JSONL of means at a fixed concurrency, all of them needed."""

OF_AGGREGATES = ("prefill", "decode", "prefill_gpus", "decode_gpus", "engine", "engine_version", "model", "endpoint")
"""What else such a row may say; without it the options of ``runs import`` hold. endpoint: where it ran, e.g. a GPU's name."""

COLUMNS = ("due_s", "sent_s", "first_token_s", "last_token_s", "prompt_tokens", "output_tokens", "status")
"""Names of a CSV or JSONL of rows; ``--map due_s=COLUMN,...`` renames. ``status`` and one of due_s and sent_s may be missing."""

REQUESTED = ("requested_prompt_tokens", "requested_tokens")
"""What was asked for, as ``runs export`` writes it: the lengths of a row whose server counted none."""

MEASURED = ("first_token_s", "last_token_s", "output_tokens")
"""Columns that tell the rows of two runs of one schedule apart."""

MOST_BYTES = 1 << 30
"""Largest result that is read; a document is parsed as a whole."""

_OK = ("ok", "success", "successful", "succeeded", "completed", "true", "1")
_FAILED = ("failed", "failure", "error", "errored", "timeout", "false", "0")
"""Words of a status, beside an HTTP status and our own :data:`STATUSES`."""

NO_DUE = "the client does not say when requests were due: its own lateness is not known"
NO_SENT = "the client does not say when requests were sent: its own lateness is not known"
UNSTREAMED = "no first token"
"""Detail of a request that did not fail, and of which no time of a token is known."""

SLACK_S = 0.001
"""By how much times of one request may contradict each other: clients round, some to the millisecond."""


@dataclass(frozen=True, slots=True)
class One:
    """One request; times in seconds on the client's own clock, NaN where they never came."""

    due: float
    sent: float
    first_token: float
    last_token: float
    prompt_tokens: int
    output_tokens: int
    status: str = "ok"
    detail: str = ""
    chunks: int = 0
    max_gap_s: float = math.nan
    requested: tuple[int, int] = (-1, -1)
    """Prompt and output tokens that were asked for, -1 where the client does not say."""

    def checked(self, what: str) -> One:
        """Itself, failed where it is ok without a first and a last token. BadRowError for a row that was due at no time, and for
        an ok one of unknown length (it would count as one token, and within any TPOT) or with times out of order."""
        if not math.isfinite(self.due):
            raise BadRowError("bad_row", f"{what}: says neither when it was due nor when it was sent")
        if self.status != "ok":
            return self
        if not (math.isfinite(self.first_token) and math.isfinite(self.last_token)):
            return replace(self, status="failed", detail=UNSTREAMED)
        begun = self.due if math.isnan(self.sent) else max(self.due, self.sent)
        for name, later, earlier, words in (
            (COLUMNS[2], self.first_token, begun, "the request was due or sent"),
            (COLUMNS[3], self.last_token, self.first_token, COLUMNS[2]),
        ):
            if later < earlier - SLACK_S:
                raise BadRowError(
                    "bad_row",
                    f"{what}: {name} ({later:.10g}) is before {words} ({earlier:.10g}): times are instants on one clock, in one "
                    "unit, no durations",
                )
        for name, *held in zip(COLUMNS[4:6], (self.prompt_tokens, self.output_tokens), self.requested, strict=True):
            if max(held) < 1:
                raise BadRowError("bad_row", f"{what}: an ok request needs {name} of 1 or more")
        return self


@dataclass(slots=True)
class Measured:
    """One run of another client. due_known, sent_known: whether it wrote when requests were due, and when they were sent. unix:
    whether its clock is the wall's."""

    client: str
    rows: list[One] = field(default_factory=list)
    model: str = ""
    endpoint: str = ""
    due_known: bool = True
    sent_known: bool = True
    unix: bool = False


def read(path: Path, names: Mapping[str, str] | None = None, unit: str = "s") -> list[Measured]:
    """The runs of a file, recognised by its content, or by the user's names. InputError says what it is not."""
    text = _text(path)
    try:
        found = _read(text, names, unit)
    except BadRowError as bad:
        raise InputError(f"{path}: {bad}. Nothing was stored.") from None
    for one in found:
        if not one.rows:
            raise InputError(f"{path}: holds a run without a request. Nothing was stored.")
        if UNSTREAMED in {row.detail for row in one.rows} and not any(row.status == "ok" for row in one.rows):
            raise InputError(
                f"{path}: no request has a first token: measure answers that are streamed (aiperf: --streaming). "
                "Nothing was stored."
            )
    return found


def _text(path: Path) -> str:
    try:
        if not path.is_file():
            raise InputError(
                f"{path}: is no file. Give a result of aiperf, guidellm or vllm bench serve, a CSV or JSONL."
            )
        if path.stat().st_size > MOST_BYTES:
            raise InputError(
                f"{path}: is larger than {MOST_BYTES >> 30} GiB. Split it, or import rows as CSV with --map."
            )
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        words = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(f"{path}: cannot be read ({words}).") from None


def _read(text: str, names: Mapping[str, str] | None, unit: str) -> list[Measured]:
    if not text.strip():
        raise BadRowError("empty", "the file is empty")
    if not text.lstrip().startswith("{"):
        return [_table(text, names or {}, unit)]
    first = text.lstrip().split("\n", 1)[0]
    try:
        head = parse(first)
    except BadRowError:
        head = parse(text)  # a document over several lines
    if names is None:
        if isinstance(head.get("metadata"), dict) and "metrics" in head:
            return [_aiperf(text)]
        if isinstance(head.get("benchmarks"), list):
            document = parse(text)
            return [_guidellm(b, at(document, "config.spec.backend")) for b in document["benchmarks"]]
        if "ttfts" in head and "input_lens" in head:
            return [_vllm(result, f"line {n}: " if n > 1 else "") for n, result in _documents(text)]
        if "input_lens" not in head and "request_throughput" in head:
            raise BadRowError(
                "no_rows", "a vllm bench result without requests: run it with --save-result --save-detailed"
            )
    return [_lines(text, names or {}, unit)]


def _documents(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """One document over any number of lines, or one a line."""
    try:
        yield 1, parse(text)
    except BadRowError:
        yield from _records(text)


# --- the clients -----------------------------------------------------------------------------------------------------


def _aiperf(text: str) -> Measured:
    """``profile_export.jsonl`` of aiperf (seen: 0.13): a request a line, wall clock in ns, metrics with their units. The credit
    is when its timer let a request go, which may be late: when it was wanted is not written."""
    found = Measured("aiperf", unix=True, due_known=False)
    for number, record in _records(text):
        meta, metrics = record.get("metadata"), record.get("metrics") or {}
        if not isinstance(meta, dict) or not isinstance(metrics, dict):
            raise BadRowError("bad_row", f"line {number}: has no metadata and metrics")
        if meta.get("benchmark_phase", "profiling") != "profiling":
            continue  # warm-up

        def value(name: str, metrics: dict[str, Any] = metrics) -> Any:
            return at(metrics, f"{name}.value")

        sent = _number(meta.get("request_start_ns"), 1e9, number, "request_start_ns")
        due = _number(meta.get("credit_issued_ns"), 1e9, number, "credit_issued_ns")
        gaps = value("inter_chunk_latency")
        gaps = [g for g in gaps if isinstance(g, (int, float))] if isinstance(gaps, list) else []
        first = sent + _number(value("time_to_first_token"), 1e3, number, "time_to_first_token")
        last = sent + _number(value("request_latency"), 1e3, number, "request_latency")
        status = "ok" if record.get("error") is None else "failed"
        if meta.get("was_cancelled"):
            status = "cancelled"
        found.rows.append(
            One(
                due if math.isfinite(due) else sent,
                sent,
                first,
                last,
                _count(value("usage_prompt_tokens"), value("input_sequence_length")),
                _count(value("usage_completion_tokens"), value("output_sequence_length")),
                status,
                printable(str(record.get("error") or ""))[:200],
                len(gaps) + 1 if math.isfinite(first) else 0,
                max(gaps, default=math.nan) / 1e3,
            ).checked(f"line {number}")
        )
    return found


def _guidellm(benchmark: Any, backend: Any) -> Measured:
    """One of a guidellm report's benchmarks (seen: 0.8): requests by how they ended, wall clock in s."""
    held = benchmark.get("requests") if isinstance(benchmark, dict) else None
    if not isinstance(held, dict):
        raise BadRowError("bad_row", "a benchmark of the report holds no requests: it was saved without them")
    found = Measured("guidellm", unix=True)
    if isinstance(backend, dict):
        found.model, found.endpoint = str(backend.get("model") or ""), str(backend.get("target") or "")
    for kind, status in (("successful", "ok"), ("errored", "failed"), ("incomplete", "cancelled")):
        for number, record in enumerate(held.get(kind) or (), start=1):
            timings = at(record, "info.timings")
            if not isinstance(timings, dict):
                raise BadRowError("bad_row", f"{kind} request {number}: has no info.timings")

            def stamp(*names: str, timings: dict[str, Any] = timings) -> float:
                return next((float(timings[n]) for n in names if isinstance(timings.get(n), (int, float))), math.nan)

            found.due_known &= isinstance(timings.get("targeted_start"), (int, float))
            tokens = record.get("output_tokens")
            chunks = timings.get("token_iterations")
            found.rows.append(
                One(
                    stamp("targeted_start", "scheduled_at", "request_start"),
                    stamp("request_start"),
                    stamp("first_token_iteration", "first_output_token_iteration"),
                    stamp("last_token_iteration"),
                    _count(record.get("prompt_tokens")),
                    _count(tokens),
                    status,
                    printable(str(at(record, "info.error") or ""))[:200],
                    chunks if isinstance(chunks, int) else 0,
                ).checked(f"{kind} request {number}")
            )
    return found


def _vllm(result: dict[str, Any], where: str) -> Measured:
    """``vllm bench serve --save-result --save-detailed``: columns, one clock that starts anywhere. From its source (0.33)."""
    columns = {
        name: result.get(name) for name in ("start_times", "ttfts", "itls", "input_lens", "output_lens", "errors")
    }
    if not isinstance(columns["start_times"], list):
        raise BadRowError(
            "no_times",
            f"{where}has no start_times, so the load is not known: measure with a newer vllm bench serve (or, where SGLang's "
            "bench_serving wrote this, with aiperf or guidellm)",
        )
    lengths = {len(c) for c in columns.values() if isinstance(c, list)}
    if len(lengths) != 1 or not all(isinstance(c, list) for c in columns.values()):
        raise BadRowError("bad_row", f"{where}its columns {', '.join(columns)} must be equally long lists")
    found = Measured("vllm bench", model=str(result.get("model_id") or ""), due_known=False)
    for number, row in enumerate(zip(*columns.values(), strict=True), start=1):
        start, ttft, itl, n, m, error = row
        if not all(isinstance(v, (int, float)) for v in (start, ttft, n, m)) or not isinstance(itl, list):
            raise BadRowError("bad_row", f"{where}a request's times and counts must be numbers (got {str(row)[:80]})")
        ok = not error and ttft > 0
        first = start + ttft if ok else math.nan
        found.rows.append(
            One(
                start,
                start,
                first,
                first + sum(itl) if ok else math.nan,
                int(n),
                int(m),
                "failed" if error else "ok",
                printable(str(error or ""))[:200],
                len(itl) + 1 if ok else 0,
                max(itl, default=math.nan) if ok else math.nan,
            ).checked(f"{where}request {number}")
        )
    return found


# --- rows ------------------------------------------------------------------------------------------------------------


def parse_names(text: str, columns: Sequence[str] = COLUMNS) -> dict[str, str]:
    """``due_s=start,first_token_s=ttft_at`` as a dict of ours -> theirs. InputError names what is unknown."""
    found: dict[str, str] = {}
    for term in filter(None, (t.strip() for t in text.split(","))):
        ours, _, theirs = term.partition("=")
        if ours.strip() not in columns or not theirs.strip():
            raise InputError(f"--map takes {', '.join(f'{c}=..' for c in columns)} (got {term!r}).")
        found[ours.strip()] = theirs.strip()
    return found


def _table(text: str, names: Mapping[str, str], unit: str) -> Measured:
    with _csv(text) as reader:
        header = reader.fieldnames or ()
        return _rows(lambda: ((reader.line_num, record) for record in reader), header, names, unit)


@contextmanager
def _csv(text: str) -> Iterator[csv.DictReader[str]]:
    """Its rows. Fields may be as long as the file: prompts and answers stand in some, and are passed over."""
    limit = csv.field_size_limit(MOST_BYTES)
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""))
        reader.fieldnames = [c.strip() for c in reader.fieldnames or ()]
        yield reader
    finally:
        csv.field_size_limit(limit)


def _lines(text: str, names: Mapping[str, str], unit: str) -> Measured:
    wanted, header = {names.get(c, c) for c in COLUMNS}, set[str]()
    for _, record in _records(text):  # a failed request leaves out what it has not
        header |= {c for c in wanted - header if at(record, c) is not None}
        if header == wanted:
            break
    return _rows(lambda: _records(text), header, names, unit)


def _rows(
    records: Callable[[], Iterator[tuple[int, Any]]], header: Collection[str], names: Mapping[str, str], unit: str
) -> Measured:
    known = {ours: names.get(ours, ours) for ours in COLUMNS}
    present = {ours for ours, theirs in known.items() if theirs in header}
    missing = [known[c] for c in COLUMNS[2:6] if c not in present]
    if not {"due_s", "sent_s"} & present:
        missing.insert(0, f"{known['due_s']} or {known['sent_s']}")
    if missing:
        raise BadRowError("no_column", f"no column {', '.join(missing)}: rename with --map, e.g. --map due_s=COLUMN")
    found = Measured("rows", due_known="due_s" in present, sent_known="sent_s" in present)
    per_s = 1e6 / UNITS[unit]
    for number, record in records():

        def time_of(name: str, record: Any = record, number: int = number) -> float:
            value = at(record, known[name]) if name in present else None
            return math.nan if value is None else _number(value, per_s, number, known[name])

        due, sent = time_of("due_s"), time_of("sent_s")
        first, last = time_of("first_token_s"), time_of("last_token_s")
        status = _plain(at(record, known["status"])) if "status" in present else None
        word = (
            ("ok" if math.isfinite(last) else "failed") if status is None else _status(status, number, known["status"])
        )
        if word == "ok" and not (math.isfinite(first) and math.isfinite(last)):
            raise BadRowError("bad_row", f"line {number}: an ok request without first and last token")
        prompt, output = (_count(_plain(at(record, known[c]))) for c in COLUMNS[4:6])
        requested = tuple(_count(_plain(at(record, c))) for c in REQUESTED)
        due = due if math.isfinite(due) else sent
        if not math.isfinite(due):
            raise BadRowError("bad_row", f"line {number}: neither {known['due_s']} nor {known['sent_s']}")
        sent = sent if math.isfinite(sent) or word == "unsent" else due
        one = One(due, sent, first, last, prompt, output, word, requested=(requested[0], requested[1]))
        found.rows.append(one.checked(f"line {number}"))
    return found


def _status(value: Any, number: int, what: str) -> str:
    """One of our words for a client's, or for an HTTP status."""
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    word = str(value).strip().lower()
    if word in _OK or word in _FAILED:
        return "ok" if word in _OK else "failed"
    if isinstance(value, (int, float)) and 100 <= value < 600:
        return "ok" if value // 100 == 2 else "failed"
    if word not in STATUSES:
        said = ", ".join(dict.fromkeys((*_OK, *_FAILED, *STATUSES)))
        raise BadRowError(
            "bad_row", f"line {number}: {what} must be an HTTP status or one of {said} (got {str(value)[:40]!r})"
        )
    return word


def _records(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines ends a line within JSON's texts too
        if line.strip():
            try:
                yield number, parse(line)
            except BadRowError as bad:
                raise BadRowError("bad_json", f"line {number}: {bad}") from None


def _number(value: Any, per_s: float, number: int, what: str) -> float:
    """Seconds; NaN for nothing."""
    value = _plain(value)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise BadRowError("bad_row", f"line {number}: {what} must be a number (got {str(value)[:40]!r})")
    return value / per_s


def _plain(value: Any) -> Any:
    """A number written as text."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text in ("", "nan", "NaN", "null", "None"):
        return None
    try:
        return int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            return text


def _count(*values: Any) -> int:
    """The first that is a count; -1 for none."""
    for value in values:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 2**31:
            return int(value)
    return -1


# --- means at a fixed concurrency -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mean:
    """One row of means, with what it says of the system; None and "" where it does not."""

    held: Aggregate
    fleet: Fleet | None
    gpus_per_worker: tuple[int | None, int | None]
    words: dict[str, str]


def read_aggregates(path: Path, names: Mapping[str, str] | None = None, unit: str = "s") -> list[Mean]:
    """The rows of a CSV or JSONL of :data:`AGGREGATES`. unit: of TTFT and TPOT. InputError says which line is wrong."""
    text = _text(path)
    try:
        if not text.strip():
            raise BadRowError("empty", "the file is empty")
        with _csv(text) as reader:
            rows = ((reader.line_num, record) for record in reader)
            records: Iterator[tuple[int, Any]] = _records(text) if text.lstrip().startswith("{") else rows
            found = [_mean(record, number, names or {}, 1e6 / UNITS[unit]) for number, record in records]
        if not found:
            raise BadRowError("empty", "the file holds no row")
    except BadRowError as bad:
        raise InputError(f"{path}: {bad}. Nothing was stored.") from None
    return found


def _mean(record: Any, number: int, names: Mapping[str, str], per_s: float) -> Mean:
    def held(ours: str, least: float = 0.0, per: float = 1.0) -> float:
        theirs = names.get(ours, ours)
        value = _number(at(record, theirs), per, number, theirs)
        if not value > least and not (value == least > 0):
            said = f"at least {least:g}" if least else "above 0"
            got = at(record, theirs)
            if got is None:
                raise BadRowError(
                    "no_column", f"line {number}: no {theirs}: rename with --map, e.g. --map {ours}=COLUMN"
                )
            raise BadRowError("bad_row", f"line {number}: {theirs} must be {said} (got {str(got)[:40]!r})")
        return value

    def whole(ours: str) -> int | None:
        theirs = names.get(ours, ours)
        value = _number(at(record, theirs), 1.0, number, theirs)
        if math.isnan(value):
            return None
        if value < 1 or value != int(value):
            raise BadRowError("bad_row", f"line {number}: {theirs} must be an integer >= 1 (got {value:g})")
        return int(value)

    times = {"ttft_s": per_s, "tpot_s": per_s}
    numbers = [held(name, 1.0 if name.endswith("tokens") else 0.0, times.get(name, 1.0)) for name in AGGREGATES]
    prefill, decode = whole("prefill"), whole("decode")
    if (prefill is None) != (decode is None):
        raise BadRowError("bad_row", f"line {number}: prefill without decode workers, or the other way round")
    words = {
        name: printable(str(value)).strip()[:200]
        for name in OF_AGGREGATES[4:]
        if (value := at(record, names.get(name, name))) not in (None, "")
    }
    fleet = Fleet(prefill, decode) if prefill is not None and decode is not None else None
    return Mean(Aggregate(*numbers), fleet, (whole("prefill_gpus"), whole("decode_gpus")), words)


def store_aggregates(
    store: Store,
    means: Sequence[Mean],
    *,
    name: str,
    fleet: Fleet | None = None,
    endpoint: str = "",
    engine: str = "openai",
    engine_version: str = "",
    model: str = "",
    group: str = "",
    slo: Slo | None = None,
    gpus_per_worker: tuple[int, int] = (1, 1),
) -> list[Run]:
    """Store each row as a run of its own, all or none; the same rows again change nothing. Options hold where a row is silent."""
    if any(one.fleet is None for one in means) and fleet is None:
        raise InputError(
            "a row does not say its prefill and decode workers: name the columns with --map, or give --fleet."
        )
    if fleet is not None and fleet.mixed:
        raise InputError(
            f"--fleet {fleet} has mixed workers, and means are asked which split of prefill and decode serves most. Give P:D; of "
            "mixed workers import the requests."
        )
    made: list[tuple[Run, Aggregate]] = []
    whole = hashlib.sha256()
    for one in means:
        run = Run(
            name=name,
            trace=name,
            schedule_digest="",
            scheduled=0,
            endpoint=one.words.get("endpoint", endpoint),
            engine=one.words.get("engine", engine)[:40],
            model=one.words.get("model", model),
            fleet=one.fleet or fleet,
            started_unix_s=time.time(),
            workers=0,
            gpus_per_worker=(
                one.gpus_per_worker[0] or gpus_per_worker[0],
                one.gpus_per_worker[1] or gpus_per_worker[1],
            ),
            changes=("imported from means at a fixed concurrency",),
            policy=CLOSED_LOOP,
            slo=str(slo) if slo else "",
            version=__version__,
            engine_version=one.words.get("engine_version", engine_version)[:80],
            complete=True,
            verdict="degraded",
            reason=f"means of a closed loop, {one.held.concurrency:g} requests in flight: it says nothing about a rate",
        )
        said = (
            asdict(one.held),
            str(run.fleet),
            run.gpus_per_worker,
            run.engine,
            run.engine_version,
            run.model,
            run.endpoint,
        )
        digest = hashlib.sha256(repr(said).encode())
        whole.update(digest.digest())
        made.append((replace(run, schedule_digest=digest.hexdigest()), one.held))
    group = group or f"import {whole.hexdigest()[:16]}"
    return store.add_aggregates([(replace(run, group=group), held) for run, held in made])


# --- into the database -----------------------------------------------------------------------------------------------


def observations(measured: Measured) -> tuple[Observations, float]:
    """(rows in order of due, the client's clock at schedule zero). Where nobody says what was asked, it is what was counted, at
    least 1 token."""
    held = sorted(measured.rows, key=lambda r: r.due)
    zero = held[0].due
    rows = Observations.empty(len(held))
    rows.index[:] = np.arange(len(held))
    rows.worker[:] = 0
    for name in ("due", "sent", "first_token", "last_token"):
        getattr(rows, f"{name}_s")[:] = np.array([getattr(r, name) for r in held]) - zero
    rows.dispatch_s[:] = rows.due_s
    rows.first_byte_s[:] = rows.first_token_s
    for name in ("prompt_tokens", "output_tokens", "chunks", "max_gap_s"):
        getattr(rows, name)[:] = [getattr(r, name) for r in held]
    requested = np.array([r.requested for r in held])
    for name, told, counted in zip(REQUESTED, requested.T, (rows.prompt_tokens, rows.output_tokens), strict=True):
        getattr(rows, name)[:] = np.where(told >= 1, told, np.maximum(counted, 1))
    rows.status[:] = [r.status for r in held]
    rows.error[:] = ["other" if r.status == "failed" else "" for r in held]
    rows.detail[:] = [r.detail for r in held]
    rows.http_status[:] = np.where(rows.ok, 200, 0)
    return rows, zero


def store_run(
    store: Store,
    measured: Measured,
    *,
    name: str,
    fleet: Fleet,
    endpoint: str = "",
    engine: str = "openai",
    engine_version: str = "",
    model: str = "",
    group: str = "",
    slo: Slo | None = None,
    gpus_per_worker: tuple[int, int] = (1, 1),
) -> tuple[Run, bool]:
    """Store one run of another client; (the run, whether it was there already with the same rows and name).

    InputError when it was, as measured on another fleet.
    """
    rows, zero = observations(measured)
    schedule = rows.asked(name)
    digest = hashlib.sha256()
    for column in (schedule.due_s, rows.first_token_s, rows.last_token_s, rows.prompt_tokens, rows.output_tokens):
        digest.update(np.ascontiguousarray(column).tobytes())
    group = group or f"import {digest.hexdigest()[:16]}"
    for known in store.runs(group=group):
        if known.name != name or known.schedule_digest != schedule.digest() or not known.ended:
            continue
        there = store.observations(known.id)  # another fleet may have been asked the same, at the same times
        if not all(np.array_equal(getattr(there, c), getattr(rows, c), equal_nan=c.endswith("_s")) for c in MEASURED):
            continue
        if known.fleet != fleet:
            raise InputError(
                f"{name!r}: the same rows are run {known.id} already, as measured on {known.fleet} (got --fleet {fleet}). Where "
                f"that was wrong: steelyard runs prune --group {shlex.quote(group)}, then import again."
            )
        return known, True
    judged = verdict(rows, slo)
    unknown = NO_DUE if not measured.due_known else NO_SENT if not measured.sent_known else ""
    word, why = ("degraded", unknown) if unknown else (judged.word, judged.reason)
    lag_ms = (math.nan,) * 3 if unknown else (judged.lag_p50_ms, judged.lag_p99_ms, judged.lag_max_ms)
    run = Run(
        name=name,
        trace=name,
        schedule_digest=schedule.digest(),
        scheduled=len(rows),
        endpoint=endpoint or measured.endpoint or measured.client,
        engine=engine,
        model=model or measured.model,
        fleet=fleet,
        started_unix_s=zero if measured.unix else time.time(),
        workers=0,
        gpus_per_worker=gpus_per_worker,
        rate_per_s=schedule.rate_per_s,
        changes=(f"imported from {measured.client}",),
        slo=str(slo) if slo else "",
        group=group,
        version=__version__,
        engine_version=engine_version[:80],
    )
    # A key of its own, so that two at once store one run, and what was broken off is gone on with.
    said = [group, name, run.schedule_digest, digest.hexdigest(), str(fleet), gpus_per_worker]
    said += [run.endpoint, engine, run.model, run.engine_version, run.slo]
    run = store.begin_run(run, hashlib.sha256(json.dumps(said).encode()).hexdigest()[:32])
    store.add_observations(run.id, rows)
    ended = replace(
        run,
        complete=True,
        verdict=word,
        reason=f"measured by {measured.client}; {why}",
        lag_p50_ms=lag_ms[0],
        lag_p99_ms=lag_ms[1],
        lag_max_ms=lag_ms[2],
        counts=counts(rows),
    )
    return store.end_run(ended), False
