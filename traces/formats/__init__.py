"""One file a format: how to recognise it, how to read it row by row.

A format is an object with the attributes of :class:`TraceFormat`. Those of other packages are found through the entry
point group ``steelyard.formats``; ours are found without an installation, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import entry_points
from typing import IO, Protocol

from traces.records import Ints

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(slots=True)
class Row:
    """One request as recorded. arrival_us: microseconds on the source's own clock, any origin. output_tokens None: unknown.

    zoned: False when the source's time carries no zone, None when it has no calendar. status: 0 ok, 1 failed, 2 cancelled.
    block_tokens: what one block id stands for, where the rows say it and not the format. id: the request's own, by which a
    second row of the same request is known; it is skipped, or joined with the first (:class:`TraceFormat`). parent: the id of
    the request whose answer this one continues, where the rows say it; else it is the one before in the session. think_us: from
    the end of that answer to this arrival. ttft_us, e2e_us: what the source measured. -1: not known, as with turn. odd: what is
    strange about a row that is kept all the same.
    """

    arrival_us: int
    prompt_tokens: int
    output_tokens: int | None
    session_key: str | None = None
    hash_ids: Sequence[int | str] | None = None
    zoned: bool | None = None
    status: int = 0
    block_tokens: int | None = None
    id: str | None = None
    parent: str | None = None
    turn: int = -1
    think_us: int = -1
    ttft_us: int = -1
    e2e_us: int = -1
    odd: str | None = None


@dataclass(frozen=True, slots=True)
class OtherEvent:
    """A record that is no request to a language model (a tool call, an embedding, a gateway's cache hit): counted."""

    what: str


Event = Row | OtherEvent


@dataclass(frozen=True, eq=False, slots=True)
class Batch:
    """Many good rows at once, of a format that has only times and counts: a faster way for large files.

    Line numbers run on from first_line. zoned as in :class:`Row`, the same for all.
    """

    first_line: int
    arrival_us: Ints
    prompt_tokens: Ints
    output_tokens: Ints
    zoned: bool | None


class BadRowError(Exception):
    """A row that is skipped and counted. reason: one of the names in docs/traces.md; detail says what was seen."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class BadFileError(Exception):
    """A file that is refused whole."""


@dataclass(frozen=True, slots=True)
class Meta:
    """What a format knows of a source before its rows. clock: name of the time unit.

    hash_scope: how far a block id means the same: "session" (one file), "file" (all files of a trace), "deployment".
    """

    clock: str
    block_size: int | None = None
    hash_scope: str | None = None


class TraceFormat(Protocol):
    """A recorded-trace format."""

    name: str
    title: str
    meta: Meta

    def sniff(self, head: str) -> str | None:
        """None if the first 64 KiB (decoded) are of this format, else what is missing, in words."""

    def rows(self, lines: IO[str]) -> Iterator[tuple[int, Row | OtherEvent | BadRowError]]:
        """Every record with its line number (1-based): a request, another event, or why it is neither.

        BadFileError refuses the whole file. A format may have ``batches(lines)`` beside it, which gives the same and may give a
        :class:`Batch` instead of its rows. Formats that nobody here has seen a real file of say so: ``unseen = True``; those
        whose lines may be whole documents say how many characters these may have: ``longest = 64 << 20``;
        those in which each part of a request leaves a row: ``joins = True``.
        """


def formats() -> dict[str, TraceFormat]:
    """Every known format by name."""
    from traces.formats import azure, bailian, burstgpt, dynamo, engines, gateways, mooncake, simulators, spans, weka

    ours: tuple[TraceFormat, ...] = (
        azure.FORMAT,
        burstgpt.FORMAT,
        mooncake.FORMAT,
        bailian.FORMAT,
        dynamo.FORMAT,
        weka.FORMAT,
        simulators.VIDUR,
        simulators.SPLITWISE,
        spans.FORMAT,
        gateways.LITELLM,
        gateways.ENVOY,
        engines.SGLANG,
    )
    known = {f.name: f for f in ours}
    for point in entry_points(group="steelyard.formats"):
        if point.name not in known:
            known[point.name] = point.load()
    return known


def count(text: str, what: str, least: int = 0) -> int:
    """An integer field: ``12`` or ``12.0``. BadRowError names what it is not."""
    try:
        value = int(text)
    except ValueError:
        try:
            number = float(text)
        except ValueError:
            raise BadRowError(f"{what}_not_a_number", f"{what} must be an integer (got {text[:40]!r})") from None
        if "e" in text.lower() or not number.is_integer():
            raise BadRowError(f"{what}_not_an_integer", f"{what} must be an integer (got {text[:40]!r})") from None
        value = int(number)
    return bounded(value, what, least)


def epoch_us(moment: datetime) -> tuple[int, bool]:
    """(microseconds since 1970, exactly; whether the moment has a zone). Without one it is taken as UTC."""
    zoned = moment.tzinfo is not None
    gap = (moment if zoned else moment.replace(tzinfo=UTC)) - _EPOCH
    return (gap.days * 86_400 + gap.seconds) * 1_000_000 + gap.microseconds, zoned


def bounded(value: int, what: str, least: int = 0) -> int:
    """A count within its bounds; 2^31-1 is the most that is stored."""
    if value < least:
        raise BadRowError(
            f"{what}_negative" if least == 0 else f"{what}_too_small", f"{what} must be >= {least} (got {value})"
        )
    if value > 2**31 - 1:
        raise BadRowError(f"{what}_too_large", f"{what} must be below 2^31 (got {value})")
    return value
