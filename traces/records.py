"""The records everything else speaks in: Fleet, Schedule, Observations, Sample, Run.

Scalars are frozen dataclasses; what comes in hundreds of thousands (schedules, observations) is one frozen
dataclass of equal-length numpy columns, because a Python object a request would cost more than the request.

Times are seconds as float64. ``due_s`` and everything an observation holds count from *schedule zero*, the agreed
monotonic instant at which the replay's clock read 0; wall-clock instants are kept only in :class:`Run`.
A time that never came (a failed request has no last token) is NaN, never 0.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from traces.errors import InputError

if TYPE_CHECKING:
    import pandas
    import pyarrow

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Texts = npt.NDArray[np.object_]

STATUSES = ("ok", "failed", "unsent", "cancelled", "lost")
"""How a scheduled request can end. ``lost``: in flight on a load worker that died."""

ERRORS = ("refused", "reset", "timeout", "status", "malformed", "short", "stream_error", "other")
"""Kinds of ``failed``. ``status``: an HTTP status other than 2xx. ``short``: the stream ended before it said it had
ended. ``stream_error``: an error object inside a 200 stream."""

ROLES = ("prefill", "decode", "mixed", "router")

STAGES = ("queue_s", "prefill_s", "transfer_s", "first_step_s")
"""TTFT = queue + prefill + transfer + first step, seconds. queue_s: from arrival to the start of the prefill. prefill_s: its
forward passes. transfer_s: from there to the start of the first decode step: moving the KV and waiting for a place.
first_step_s: that step."""


# --- the fleet ------------------------------------------------------------------------------------------------------


def whole_number(value: Any) -> int:
    """A count that JSON, TOML or a program gave: 3, 3.0 or "3". ValueError, TypeError: it is none; nothing is cut."""
    if isinstance(value, str) and not re.fullmatch(r"[0-9]{1,9}", value):
        raise ValueError(value)
    number = int(value) if isinstance(value, str) else value
    if isinstance(number, bool) or not 0 <= number < 2**31 or number != int(number):
        raise ValueError(value)
    return int(number)


@dataclass(frozen=True, slots=True, order=True)
class Fleet:
    """P prefill and D decode workers, written ``3:5``; with M mixed (colocated) workers ``3:5+2``, or ``0:0+8``."""

    prefill: int
    decode: int
    mixed: int = 0

    def __post_init__(self) -> None:
        if min(self.prefill, self.decode, self.mixed) < 0 or not (
            self.mixed or (self.prefill >= 1 and self.decode >= 1)
        ):
            raise InputError(
                f"fleet {self}: each role needs at least one worker. Give prefill:decode, for example 3:5 "
                "(with mixed workers 3:5+2, mixed only 0:0+8)."
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``3:5`` or ``3:5+2``. InputError says what was expected."""
        match = re.fullmatch(r"\s*(\d{1,6})\s*:\s*(\d{1,6})\s*(?:\+\s*(\d{1,6})\s*)?", text)
        if not match:
            raise InputError(f"fleet must be prefill:decode, for example 3:5 (got {text!r}).")
        return cls(int(match[1]), int(match[2]), int(match[3] or 0))

    @classmethod
    def of(cls, table: Any) -> Self:
        """Of ``{"prefill": 3, "decode": 5}``, as JSON and TOML hold it. InputError says what was expected."""
        try:
            return cls(whole_number(table["prefill"]), whole_number(table["decode"]))
        except (KeyError, TypeError, ValueError):
            raise InputError(f'fleet must be like {{"prefill": 3, "decode": 5}} (got {table!r:.80}).') from None

    @classmethod
    def splits(cls, gpus: int, gpus_per_worker: tuple[int, int] = (1, 1)) -> list[Self]:
        """All fleets that use exactly ``gpus`` GPUs, fewest prefill workers first."""
        per_prefill, per_decode = gpus_per_worker
        found = []
        for prefill in range(1, gpus // per_prefill + 1):
            rest = gpus - prefill * per_prefill
            if rest >= per_decode and rest % per_decode == 0:
                found.append(cls(prefill, rest // per_decode))
        return found

    @property
    def workers(self) -> int:
        """Workers of every role."""
        return self.prefill + self.decode + self.mixed

    def gpus(self, gpus_per_worker: tuple[int, int] = (1, 1)) -> int:
        """GPUs used, given GPUs per (prefill, decode) worker; a mixed worker counts as a decode worker."""
        return self.prefill * gpus_per_worker[0] + (self.decode + self.mixed) * gpus_per_worker[1]

    def __str__(self) -> str:
        return f"{self.prefill}:{self.decode}" + (f"+{self.mixed}" if self.mixed else "")


# --- what is asked --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Request:
    """One row of a schedule, for code that wants one at a time."""

    index: int
    due_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, eq=False)
class Schedule:
    """Requests with due times, in order of due time.

    name: the trace it came from. index: int64[n], the row's number in that trace, unique. due_s: float64[n], seconds
    from schedule zero, ascending, >= 0. prompt_tokens, output_tokens: int64[n], >= 1.
    changes: how it differs from the recorded trace, in words, oldest first ("rate x0.5"); never silent.
    blocks: object[n] of tuples, the ids of each prompt's leading blocks, where the trace has them; block_tokens: what one
    block holds (0 without blocks). session: int64[n], numbers of conversations, -1 for none. parent: int64[n], the position
    in this schedule of the request whose answer the row continues, -1 for none, always an earlier one. think_s: float64[n],
    seconds from the end of that answer to this arrival as recorded, NaN where the trace does not say. None of these is part
    of the digest.
    """

    name: str
    index: Ints
    due_s: Floats
    prompt_tokens: Ints
    output_tokens: Ints
    changes: tuple[str, ...] = ()
    blocks: Texts | None = None
    block_tokens: int = 0
    session: Ints | None = None
    parent: Ints | None = None
    think_s: Floats | None = None

    def __post_init__(self) -> None:
        n = len(self.due_s)
        if not (len(self.index) == len(self.prompt_tokens) == len(self.output_tokens) == n):
            raise ValueError("a schedule's columns must be equally long")
        if n and (self.due_s[0] < 0 or bool(np.any(np.diff(self.due_s) < 0)) or not np.isfinite(self.due_s[-1])):
            raise ValueError("due times must be finite, >= 0 and ascending")
        if n and (int(self.prompt_tokens.min()) < 1 or int(self.output_tokens.min()) < 1):
            raise ValueError("a request asks for at least one prompt token and one output token")
        if self.parent is not None and bool(np.any(self.parent >= np.arange(n))):
            raise ValueError("a request continues an earlier one")

    def __len__(self) -> int:
        return len(self.due_s)

    def __iter__(self) -> Iterator[Request]:
        columns = zip(
            self.index.tolist(),
            self.due_s.tolist(),
            self.prompt_tokens.tolist(),
            self.output_tokens.tolist(),
            strict=True,
        )
        for row in columns:
            yield Request(*row)

    @property
    def span_s(self) -> float:
        """Seconds from the first due time to the last."""
        return float(self.due_s[-1] - self.due_s[0]) if len(self) else 0.0

    @property
    def rate_per_s(self) -> float:
        """Mean arrivals per second: gaps / span. Infinite for a burst, NaN for fewer than two requests."""
        if len(self) < 2:
            return float("nan")
        return (len(self) - 1) / self.span_s if self.span_s > 0 else float("inf")

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt, at least 1."""
        return int(self.prompt_tokens.max()) if len(self) else 1

    @property
    def last_due_s(self) -> float:
        """When the last request is due; 0 without any."""
        return float(self.due_s[-1]) if len(self) else 0.0

    def digest(self) -> str:
        """sha256 over the columns: two runs are comparable only if they asked the same."""
        h = hashlib.sha256()
        for column in (self.index, self.due_s, self.prompt_tokens, self.output_tokens):
            h.update(np.ascontiguousarray(column).tobytes())
        return h.hexdigest()

    def take(self, which: npt.NDArray[Any]) -> Schedule:
        """The rows picked by a boolean mask or by ascending positions; who continued a row that is gone continues its parent,
        after a think time that is not known."""
        parent, think = None, None if self.think_s is None else self.think_s[which]
        if self.parent is not None:
            kept = np.zeros(len(self), dtype=bool)
            kept[which] = True
            place = np.cumsum(kept) - 1
            held = self.parent.tolist()
            for k, before in enumerate(held):  # parents come first, so theirs are right already
                if before >= 0 and not kept[before]:
                    held[k] = held[before]
            before = np.array(held, dtype=np.int64)[which]
            parent = np.where(before >= 0, place[np.maximum(before, 0)], -1)
            if think is not None:  # it was counted from the answer that is gone
                think = np.where(before == self.parent[which], think, np.nan)
        return Schedule(
            self.name,
            self.index[which],
            self.due_s[which],
            self.prompt_tokens[which],
            self.output_tokens[which],
            self.changes,
            None if self.blocks is None else self.blocks[which],
            self.block_tokens,
            None if self.session is None else self.session[which],
            parent,
            think,
        )


@dataclass(frozen=True, eq=False)
class Feed:
    """A schedule too long to hold: its pieces are read when their time comes.

    pieces() gives them anew, in order of due time, each a Schedule that begins where the one before ended; together they hold
    ``scheduled`` requests over ``span_s``. longest_prompt: in tokens. source: what it was made from, in words or a hash.
    Prefix blocks, sessions, and every shape that needs all requests at once are not for feeds.
    """

    name: str
    scheduled: int
    span_s: float
    longest_prompt: int
    source: str
    pieces: Callable[[], Iterator[Schedule]]
    changes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.scheduled

    @property
    def rate_per_s(self) -> float:
        """Mean arrivals per second, as :attr:`Schedule.rate_per_s`."""
        if self.scheduled < 2:
            return float("nan")
        return (self.scheduled - 1) / self.span_s if self.span_s > 0 else float("inf")

    @property
    def last_due_s(self) -> float:
        """When the last request is due; the first is at 0."""
        return self.span_s

    def digest(self) -> str:
        """sha256 over what the requests are made from: the same for the same source and changes."""
        words = "\0".join(["feed", self.name, self.source, str(self.scheduled), *self.changes])
        return hashlib.sha256(words.encode()).hexdigest()


# --- what happened --------------------------------------------------------------------------------------------------


MAY_LACK = ("worker", "prompt_tokens", "output_tokens", "cached_tokens")
"""Columns of observations in which -1 says that nothing is known."""


@dataclass(frozen=True, eq=False)
class Observations:
    """One row per scheduled request, measured; columns of length n. Latencies are derived, never stored.

    index: the schedule's. worker: int64, the load worker that sent it (-1: nobody). due_s, dispatch_s, sent_s,
    first_byte_s, first_token_s, last_token_s: seconds from schedule zero, NaN where it did not come; dispatch is when
    the generator meant to send (due, unless the client's own order held it back); first token is the first chunk with
    non-empty content or reasoning. requested_prompt_tokens, requested_tokens: what the schedule asked for.
    prompt_tokens, output_tokens: what the server's ``usage`` said, -1 where it said nothing. chunks: stream events
    with content. max_gap_s: largest time between two of them. http_status: 0 without an answer.
    status: one of STATUSES. error: one of ERRORS, or "". detail: what was seen, at most 200 printable characters.

    What the server said of how it served the request, durations in seconds (NaN, -1 or "" where it said nothing):
    prefill_worker, decode_worker: who served it. queue_s, prefill_s, transfer_s, first_step_s: the parts of TTFT, see
    :data:`STAGES`. cached_tokens: prompt tokens found in a prefix cache. facts: all else, as JSON under
    the engine's own names.
    """

    index: Ints
    worker: Ints
    due_s: Floats
    dispatch_s: Floats
    sent_s: Floats
    first_byte_s: Floats
    first_token_s: Floats
    last_token_s: Floats
    requested_prompt_tokens: Ints
    requested_tokens: Ints
    prompt_tokens: Ints
    output_tokens: Ints
    chunks: Ints
    max_gap_s: Floats
    http_status: Ints
    status: Texts
    error: Texts
    detail: Texts
    prefill_worker: Texts
    decode_worker: Texts
    queue_s: Floats
    prefill_s: Floats
    transfer_s: Floats
    first_step_s: Floats
    cached_tokens: Ints
    facts: Texts

    def __post_init__(self) -> None:
        if len({len(getattr(self, f.name)) for f in fields(self)}) > 1:
            raise ValueError("observation columns must be equally long")

    def __len__(self) -> int:
        return len(self.index)

    @classmethod
    def columns(cls) -> tuple[str, ...]:
        """Column names, in the order of storage and of ``runs export``."""
        return tuple(f.name for f in fields(cls))

    @classmethod
    def empty(cls, n: int = 0) -> Observations:
        """n rows in which nothing happened: no times (NaN), no counts (-1), status ``unsent``."""
        return cls(**{f.name: cls._nothing(f, n) for f in fields(cls)})

    @staticmethod
    def _nothing(column: Field[Any], n: int) -> npt.NDArray[Any]:
        """A column of n rows in which nothing happened."""
        name = column.name
        if name.endswith("_s"):
            return np.full(n, np.nan)
        if column.type == "Texts":
            return np.full(n, "unsent" if name == "status" else "", dtype=object)
        return np.full(n, 0 if name in ("chunks", "http_status") else -1, dtype=np.int64)

    @classmethod
    def of(cls, index: Ints, **columns: Any) -> Observations:
        """Rows of these columns; in the others nothing happened."""
        held = {"index": index} | columns
        return cls(**held, **{f.name: cls._nothing(f, len(index)) for f in fields(cls) if f.name not in held})

    @classmethod
    def unsent(cls, schedule: Schedule) -> Observations:
        """Every request of the schedule, none sent."""
        return cls.of(
            schedule.index,
            due_s=schedule.due_s,
            dispatch_s=schedule.due_s,
            requested_prompt_tokens=schedule.prompt_tokens,
            requested_tokens=schedule.output_tokens,
        )

    @classmethod
    def concat(cls, parts: Iterable[Observations]) -> Observations:
        """All rows of all parts, ordered by due time, then index."""
        held = list(parts)
        if not held:
            return cls.empty()
        joined = cls(**{name: np.concatenate([getattr(p, name) for p in held]) for name in cls.columns()})
        return joined.take(np.lexsort((joined.index, joined.due_s)))

    def take(self, which: npt.NDArray[Any]) -> Observations:
        """The rows picked by a mask or by positions."""
        return Observations(**{name: getattr(self, name)[which] for name in self.columns()})

    def to_arrow(self) -> pyarrow.Table:
        """All columns and the derived latencies as an Arrow table (:mod:`traces.frames`)."""
        from traces.frames import to_arrow

        return to_arrow(self)

    def to_pandas(self) -> pandas.DataFrame:
        """All columns and the derived latencies as a pandas frame (:mod:`traces.frames`)."""
        from traces.frames import to_pandas

        return to_pandas(self)

    def renamed(self, names: Mapping[str, str]) -> Observations:
        """The same with the servers' workers under other names; a name that is not there stays."""
        told = {c: getattr(self, c) for c in ("prefill_worker", "decode_worker")}
        changed = {
            c: np.array([names.get(v, v) for v in column.tolist()], dtype=object)
            for c, column in told.items()
            if any(names.get(v, v) != v for v in set(column.tolist()))
        }
        return replace(self, **changed) if changed else self

    def asked(self, name: str) -> Schedule:
        """What the rows asked for, with the lengths that the server counted, as a schedule."""
        rows = self.take(np.argsort(self.due_s, kind="stable"))
        prompt, output = np.maximum(rows.prompt_lengths, 1), np.maximum(rows.tokens, 1)
        return Schedule(name, np.arange(len(rows)), rows.due_s - rows.due_s[:1], prompt, output)

    @property
    def ok(self) -> npt.NDArray[np.bool_]:
        """True where the whole answer came."""
        return np.asarray(self.status == "ok", dtype=np.bool_)

    @property
    def tokens(self) -> Ints:
        """Output tokens counted by the server, or the number asked for where it sent no usage."""
        return np.where(self.output_tokens >= 0, self.output_tokens, self.requested_tokens)

    @property
    def prompt_lengths(self) -> Ints:
        """Prompt tokens counted by the server, or the number asked for where it sent no usage."""
        return np.where(self.prompt_tokens >= 0, self.prompt_tokens, self.requested_prompt_tokens)

    @property
    def lag_s(self) -> Floats:
        """``sent - dispatch``: how late the generator was, absolute, from schedule zero. Dispatch is due in an open loop."""
        return self.sent_s - np.where(np.isnan(self.dispatch_s), self.due_s, self.dispatch_s)

    @property
    def ttft_s(self) -> Floats:
        """``first_token - due``. Counted from due, not from sent: a late generator must not hide a slow server."""
        return self.first_token_s - self.due_s

    @property
    def ttft_sent_s(self) -> Floats:
        """``first_token - sent``: the same from the moment the request left."""
        return self.first_token_s - self.sent_s

    @property
    def tpot_s(self) -> Floats:
        """Mean seconds per output token after the first, ``(last - first) / (output_tokens - 1)``.

        NaN for one-token answers: there is no gap to average, and 0 would flatter the server.
        """
        gaps = np.where(self.tokens > 1, self.tokens - 1, 1)
        return np.where(self.tokens > 1, (self.last_token_s - self.first_token_s) / gaps, np.nan)

    @property
    def e2e_s(self) -> Floats:
        """``last_token - due``."""
        return self.last_token_s - self.due_s

    @property
    def e2e_sent_s(self) -> Floats:
        """``last_token - sent``."""
        return self.last_token_s - self.sent_s


@dataclass(frozen=True, slots=True)
class Sample:
    """One reading of one server worker, ``at_s`` seconds from schedule zero. Absent is None, never 0.

    worker: its name on the endpoint. role: one of ROLES. Gauges: ``*_requests``, ``waiting_tokens``, ``kv_used_tokens``,
    ``*_ratio`` (0..1), ``transfer_s`` (the last transfer's or a recent mean); ``inflight_requests`` are waiting and running
    where the server does not tell them apart, ``transferring_requests`` those whose KV is on its way, ``gpu_busy_ratio`` the
    mean over the worker's GPUs. Counters since the server started: ``*_total``; ``busy_s_total`` are seconds with work in
    hand, ``steps_total`` forward passes, ``prompt_tokens_total`` and ``output_tokens_total`` tokens processed,
    ``finished_total`` requests that left this worker, ``lookup_tokens_total`` prompt tokens looked up in the prefix cache and
    ``cached_tokens_total`` those found there, ``received_tokens_total`` those whose KV another worker sent.
    """

    at_s: float
    worker: str
    role: str
    waiting_requests: float | None = None
    running_requests: float | None = None
    waiting_tokens: float | None = None
    kv_used_tokens: float | None = None
    kv_used_ratio: float | None = None
    busy_s_total: float | None = None
    steps_total: float | None = None
    prompt_tokens_total: float | None = None
    output_tokens_total: float | None = None
    finished_total: float | None = None
    preemptions_total: float | None = None
    transfer_s_total: float | None = None
    inflight_requests: float | None = None
    paused_requests: float | None = None
    transferring_requests: float | None = None
    transfer_s: float | None = None
    transfers_total: float | None = None
    transfer_bytes_total: float | None = None
    failed_transfers_total: float | None = None
    received_tokens_total: float | None = None
    lookup_tokens_total: float | None = None
    cached_tokens_total: float | None = None
    cache_hit_ratio: float | None = None
    gpu_busy_ratio: float | None = None


@dataclass(frozen=True, slots=True)
class Histogram:
    """What a server's own histogram counted between a run's first reading and its last, by worker and role.

    name: what was measured, with its unit (``ttft_s``, ``itl_s``, ``queue_s``, ``decode_queue_s``, ``prefill_s``,
    ``decode_s``, ``e2e_s``, ``transfer_s``, ``transfer_bytes``, ``handover_s``, ``transfer_estimate_s``). source: the
    metric's own name. count: of observations; total: their sum. buckets: (upper bound, observations up to it),
    ascending, empty for a summary.
    """

    worker: str
    role: str
    name: str
    source: str
    count: float
    total: float
    buckets: tuple[tuple[float, float], ...] = ()

    @property
    def mean(self) -> float:
        """total / count; NaN without observations."""
        return self.total / self.count if self.count > 0 else float("nan")

    def quantile(self, q: float) -> float:
        """The q-quantile (0..1), linear within its bucket as Prometheus does it; NaN where nothing is known."""
        if not self.buckets or self.buckets[-1][1] <= 0:
            return float("nan")
        wanted = q * self.buckets[-1][1]
        below, before = 0.0, 0.0
        for bound, n in self.buckets:
            if n >= wanted:
                if bound == float("inf"):
                    return below  # beyond the last finite bound nothing more is known
                return below + (bound - below) * ((wanted - before) / (n - before) if n > before else 1.0)
            below, before = bound, n
        return below


@dataclass(frozen=True, slots=True)
class FleetChange:
    """A change of P:D during a run: asked, in force, why. Seconds from schedule zero; ``ready_s`` NaN if never.

    What it cost, NaN or -1 where it was not measured: joined_s, when the role that grows had its workers (ready comes when
    those that leave have drained too); first_served_s, when a worker was first seen to have done work in
    the role that it got; in_flight, requests that were under way between asked and ready; failed, those of them that
    failed; slowed, those of them that took longer to their first token than any that had ended before asked.
    """

    asked_s: float
    ready_s: float
    before: Fleet
    after: Fleet
    reason: str
    joined_s: float = math.nan
    first_served_s: float = math.nan
    in_flight: int = -1
    failed: int = -1
    slowed: int = -1


ACTIONS = ("move", "hold", "cap", "stale", "refused", "set", "restore")
"""What a controller can decide. ``cap``: too many moves this hour. ``stale``: the readings are too old."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What a controller decided, and why; the same decision again counts as a repeat. Seconds from schedule zero, or from
    the controller's own beginning. before: the fleet asked for then, None if unknown; after: the one wanted, None for none.
    """

    at_s: float
    until_s: float
    action: str
    before: Fleet | None
    after: Fleet | None
    reason: str
    repeats: int = 1


CLOSED_LOOP = "closed-loop"
"""Policy of a run that is an :class:`Aggregate`: a fixed number of requests in flight, no arrivals, no rows."""


@dataclass(frozen=True, slots=True)
class Aggregate:
    """Means of a run in which ``concurrency`` requests were always in flight: a request is sent when one ends.

    prompt_tokens, output_tokens: mean lengths, at least 1. ttft_s, tpot_s: means, > 0. Nothing here says how requests queue that
    arrive at a rate of their own.
    """

    concurrency: float
    prompt_tokens: float
    output_tokens: float
    ttft_s: float
    tpot_s: float

    @property
    def e2e_s(self) -> float:
        """Mean seconds of a request: TTFT + (output_tokens - 1) TPOT."""
        return self.ttft_s + (self.output_tokens - 1) * self.tpot_s

    @property
    def throughput_per_s(self) -> float:
        """Requests a second by Little's law: concurrency / E2E."""
        return self.concurrency / self.e2e_s


SPED = "clock x"
"""How the word in :attr:`Run.changes` begins that says how many times faster than life the server's clock ran."""

SHARED, CAUSAL = "prefixes shared", "sessions causal"
"""Words in :attr:`Run.changes` of a run that asked the same schedule in another manner: no part of its digest."""


FEWEST = 20
"""Finished requests of a run that laws are fitted to, at least."""

MOST_FAILED = 0.10
"""Share of a run's requests that may have failed for a law to rest on it."""


@dataclass(frozen=True, slots=True)
class Run:
    """One replay of one schedule against one fleet; what is known before, and, when it has ended, what came of it.

    id: 0 until stored. started_unix_s: wall clock at schedule zero. endpoint: URL without credentials.
    schedule_digest: :meth:`Schedule.digest`; changes: :attr:`Schedule.changes`. rate_factor: recorded gaps were divided
    by it. fleet None: not known. lag in milliseconds. verdict: "" while running, then valid, degraded or invalid.
    group: runs of one sweep or demo share it.
    """

    name: str
    trace: str
    schedule_digest: str
    scheduled: int
    endpoint: str
    engine: str
    model: str
    fleet: Fleet | None
    started_unix_s: float
    workers: int
    gpus_per_worker: tuple[int, int] = (1, 1)
    rate_factor: float = 1.0
    rate_per_s: float = float("nan")
    changes: tuple[str, ...] = ()
    policy: str = "static"
    seed: int = 0
    slo: str = ""
    group: str = ""
    profile: str = ""
    version: str = ""
    id: int = 0
    ended: bool = False
    complete: bool = False
    verdict: str = ""
    reason: str = ""
    lag_p50_ms: float = float("nan")
    lag_p99_ms: float = float("nan")
    lag_max_ms: float = float("nan")
    counts: dict[str, int] = field(default_factory=dict)
    """How many requests ended in each status, and ``failed.<kind>`` for the kinds of failure."""
    warmup_s: float = 0.0
    """Requests due before are sent, stored and counted, but stand in no figure of latency, goodput or lag."""

    costs: dict[str, dict[str, float]] = field(default_factory=dict)
    """Load worker -> cpu_s, CPU seconds of its process during the run, and max_stall_s, the longest its loop stood still;
    of a worker elsewhere clock_drift_s, by how much its clock and the master's drifted apart."""

    engine_version: str = ""
    """Of the engine that was measured, as its server or the user said it; "" where nobody did."""

    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Server worker -> its role, weight, URLs, id, and fields: what was read -> the engine's own name for it."""

    @property
    def sped(self) -> bool:
        """Did its server's clock run at another speed than life?"""
        return any(change.startswith(SPED) for change in self.changes)

    @property
    def unfit(self) -> str:
        """Why the laws of a steady split may not be fitted to its rows, as far as it says so itself; "" if they may. Of a run
        with a warm-up its counts must be those of the rows after it."""
        if self.verdict not in ("valid", "degraded"):
            return f"its verdict is {self.verdict or 'missing'} ({self.reason})"
        if self.fleet is None:
            return "its fleet is not known (replay with --fleet P:D)"
        if self.fleet.mixed:
            return f"{self.fleet.mixed} of its workers were mixed, not of one stage"
        if self.policy == CLOSED_LOOP:
            return "it is means of a closed loop, which say nothing about a rate"
        if self.policy.startswith(("baseline", "online", "offline", "planned")):
            return f"policy {self.policy} moved roles or held requests back"
        if self.sped:
            return "it ran at another speed than life"
        if SHARED in self.changes:
            return "its prompts shared prefixes, so the servers may not have computed them whole"
        failed = self.counts.get("failed", 0) / max(1, sum(n for word, n in self.counts.items() if "." not in word))
        if failed > MOST_FAILED:
            kinds = sorted((-n, word[7:]) for word, n in self.counts.items() if word.startswith("failed."))
            said = f" ({', '.join(f'{-n} {kind}' for n, kind in kinds)})" if kinds else ""
            return f"{failed:.0%} of its requests failed{said}, more than {MOST_FAILED:.0%}: see steelyard runs show {self.id}"
        return ""

    @property
    def manner(self) -> frozenset[str]:
        """In what manner the schedule was asked, of SHARED and CAUSAL: runs of another are not comparable."""
        return frozenset(self.changes) & {SHARED, CAUSAL}

    def counted(self, rows: Observations) -> Observations:
        """The rows that figures are made of: those after the warm-up."""
        return rows.take(rows.due_s >= self.warmup_s) if self.warmup_s > 0 else rows
