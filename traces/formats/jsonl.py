"""JSON logs of one record a line: what is the same in all of them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import IO, Any

import orjson

from traces.formats import BadRowError, Event, Meta, bounded, epoch_us

_DIGITS = re.compile("-?[0-9]+")
BLOCK_SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048)


class Lines:
    """A JSONL format: a line is one JSON object, and ``read`` makes a row of it.

    read(record, state) -> Row or OtherEvent; it raises BadRowError. state: a dict of its own for every file, for what must be
    remembered from line to line. needed: keys (with dots for nesting) of the first record by which the format is known.
    tell: further look at the first record, None or what is missing. columns: those of a Parquet file that it reads.
    """

    def __init__(
        self,
        name: str,
        title: str,
        meta: Meta,
        needed: tuple[str, ...],
        read: Callable[[dict[str, Any], dict[str, Any]], Event],
        *,
        tell: Callable[[dict[str, Any]], str | None] = lambda record: None,
        unseen: bool = False,
        columns: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self.title = title
        self.meta = meta
        self.needed = needed
        self.read = read
        self.tell = tell
        self.unseen = unseen
        self.columns = columns

    def sniff(self, head: str) -> str | None:
        """The first line is an object with the keys."""
        first = head.lstrip("\ufeff").split("\n", 1)[0].strip()
        try:
            record = parse(first)
        except BadRowError:
            return "the first line is not a JSON object"
        missing = [key for key in self.needed if at(record, key) is None]
        return f"no key {', '.join(missing)} in the first line" if missing else self.tell(record)

    def rows(self, lines: IO[str]) -> Iterator[tuple[int, Event | BadRowError]]:
        """Rows in the file's order."""
        state: dict[str, Any] = {}
        for number, line in enumerate(lines, start=1):
            text = line.strip().lstrip("\ufeff")
            try:
                if not text:
                    raise BadRowError("empty_line", "the line is empty")
                yield number, self.read(parse(text), state)
            except BadRowError as bad:
                yield number, bad


def parse(text: str) -> dict[str, Any]:
    """One JSON object, integers up to 2^64 exactly. BadRowError for anything else, NaN and infinity included."""
    try:
        record = orjson.loads(text)
    except orjson.JSONDecodeError:
        raise BadRowError("bad_json", f"the line is not one JSON object (got {text[:40]!r})") from None
    if not isinstance(record, dict):
        raise BadRowError("bad_json", f"the line is not one JSON object (got {text[:40]!r})")
    return record


def at(record: Any, path: str) -> Any:
    """``record["a"]["b"]`` for "a.b"; None where it is not. A key that holds dots itself wins."""
    if isinstance(record, dict) and path in record:
        return record[path]
    for key in path.split("."):
        if not isinstance(record, dict) or key not in record:
            return None
        record = record[key]
    return record


def whole(value: Any, what: str) -> int:
    """A count: 12, 12.0 or "12". BadRowError names what it is not."""
    if type(value) is int and 0 <= value < 2**31:
        return value
    if isinstance(value, str) and _DIGITS.fullmatch(value.strip()) and len(value) < 20:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise BadRowError(f"{what}_not_a_number", f"{what} must be an integer (got {value!r:.40})")
    if value != int(value):
        raise BadRowError(f"{what}_not_an_integer", f"{what} must be an integer (got {value!r:.40})")
    return bounded(int(value), what)


def number_us(value: Any, per_unit_us: float, what: str) -> int:
    """A time as a number of some unit. BadRowError when it is none, negative, or beyond 2^62 microseconds."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise BadRowError("bad_time", f"{what} must be a number >= 0 (got {value!r:.40})")
    us = value * per_unit_us if per_unit_us >= 1 or isinstance(value, float) else value // round(1 / per_unit_us)
    if not 0 <= us < 2**62:
        raise BadRowError("bad_time", f"{what} must be a number >= 0 (got {value!r:.40})")
    return round(us)


def lapse_us(value: Any, per_unit_us: float) -> int:
    """What the source measured, in microseconds; -1 where it is no time: a request is not refused for that."""
    try:
        return number_us(value, per_unit_us, "")
    except BadRowError:
        return -1


def stamp_us(value: Any, what: str) -> tuple[int, bool]:
    """(microseconds since 1970, whether it had a zone) of an ISO 8601 time. Without a zone it is taken as UTC."""
    if not isinstance(value, str):
        raise BadRowError("bad_time", f"{what} must be a date and time (got {value!r:.40})")
    try:
        moment = datetime.fromisoformat(value.strip())
    except ValueError:
        raise BadRowError("bad_time", f"{what} must be a date and time (got {value[:40]!r})") from None
    return epoch_us(moment)


def blocks(ids: Any, prompt: int, block: int, what: str = "hash_ids") -> list[int | str]:
    """Block ids, if they are some and as many as the prompt has blocks, with or without a partial last one."""
    if not isinstance(ids, list) or not set(map(type, ids)) <= {int}:
        raise BadRowError("bad_hash_ids", f"{what} must be a list of integers")
    if ids and min(ids) < 0:
        raise BadRowError("bad_hash_ids", f"{what} must be >= 0")
    if not _fits(len(ids), prompt, block):
        fitting = [size for size in BLOCK_SIZES if _fits(len(ids), prompt, size)]
        hint = f"; --block-size {' or '.join(map(str, fitting))} would fit" if fitting else ""
        found = math.ceil(prompt / block)
        raise BadRowError(
            "block_count_mismatch", f"{prompt} tokens are {found} blocks of {block} (got {len(ids)}{hint})"
        )
    return ids


def _fits(count: int, prompt: int, block: int) -> bool:
    return prompt // block <= count <= -(-prompt // block)
