"""CSV formats that differ only in the names of their columns and in how they write time."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, repeat
from typing import IO, Any

import numpy as np

from traces.formats import BadFileError, BadRowError, Batch, Meta, Row, count
from traces.records import Ints

ODD_TOTAL = "whose total is not prompt + output: the parts are trusted"


class Columns:
    """A CSV with a header; columns are found by name, others are passed over.

    when(text) -> (microseconds, whether the text had a zone, or None where the time has no calendar); it raises
    BadRowError. session, elapsed, total: columns of the session's key, of the seconds that the answer took and of the sum of
    both counts; a file without them is still of this format.
    """

    def __init__(
        self,
        name: str,
        title: str,
        clock: str,
        *,
        at: str,
        prompt: str,
        output: str,
        when: Callable[[str], tuple[int, bool | None]],
        session: str = "",
        elapsed: str = "",
        total: str = "",
    ) -> None:
        self.name = name
        self.title = title
        self.meta = Meta(clock=clock)
        self.needed = (at, prompt, output)
        self.session = session
        self.elapsed = elapsed
        self.total = total
        self.when = when

    def sniff(self, head: str) -> str | None:
        """The header row names the three columns."""
        header = [c.strip() for c in head.lstrip("\ufeff").split("\n", 1)[0].strip().split(",")]
        missing = [c for c in self.needed if c not in header]
        return f"no column {', '.join(missing)} in the header" if missing else None

    def rows(self, lines: IO[str]) -> Iterator[tuple[int, Row | BadRowError]]:
        """Rows in the file's order."""
        text = iter(lines)
        head = next(text, "")
        header = self._header([head])
        yield from self._each(csv.reader(text), header, 1)

    def batches(self, lines: Any) -> Iterator[Batch | tuple[int, Row | BadRowError]]:
        """The same a block at a time: what is plain is read in columns, a block with anything odd row by row.

        lines.blocks() gives lists of lines without their ends.
        """
        header: list[str] = []
        blocks = lines.blocks()
        line = 1
        for block in blocks:
            if not header:
                header = self._header(block[:1])
                block = block[1:]
            fast = None if self.session in header else self._fast(block, header, line + 1)
            if fast is not None:
                yield fast
            elif any('"' in text for text in block):
                # A quoted field may go on in the next block: from here row by row.
                rest = (text + "\n" for part in chain([block], blocks) for text in part)
                yield from self._each(csv.reader(rest), header, line)
                return
            else:
                yield from self._each(csv.reader(block), header, line)
            line += len(block)
        if not header:
            raise BadFileError(f"the header must name {', '.join(self.needed)}")

    def _header(self, first: list[str]) -> list[str]:
        try:
            header = [c.strip() for c in next(csv.reader(first))]
            for column in self.needed:
                header.index(column)
        except (StopIteration, ValueError, csv.Error) as error:
            raise BadFileError(f"the header must name {', '.join(self.needed)}") from error
        return header

    def _fast(self, block: list[str], header: list[str], first_line: int) -> Batch | None:
        """The block in columns, None if anything in it is not plain."""
        width = len(header)
        whole = ",".join(block)
        if '"' in whole or not block or set(map(str.count, block, repeat(","))) != {width - 1}:
            return None
        fields = whole.split(",")
        try:
            at, prompt, output = (fields[header.index(c) :: width] for c in self.needed)
            arrival, zoned = self.moments(at)
            n, m = (np.fromiter(map(int, column), np.int64, len(column)) for column in (prompt, output))
            if self.total in header and list(map(str, (n + m).tolist())) != fields[header.index(self.total) :: width]:
                return None
        except (ValueError, OverflowError, BadRowError):
            return None
        if min(n.min(), m.min()) < 0 or max(n.max(), m.max()) > 2**31 - 1:
            return None
        return Batch(first_line, arrival, n, m, zoned)

    def moments(self, texts: Sequence[str]) -> tuple[Ints, bool | None]:
        """A column of times. ValueError or BadRowError if they are not all plain and alike."""
        found = [self.when(text) for text in texts]
        if len({zoned for _, zoned in found}) > 1:
            raise ValueError("zoned and naive times")
        return np.array([us for us, _ in found], dtype=np.int64), found[0][1]

    def _each(self, reader: Any, header: list[str], offset: int) -> Iterator[tuple[int, Row | BadRowError]]:
        at, prompt, output = (header.index(c) for c in self.needed)
        session = header.index(self.session) if self.session in header else -1
        total = header.index(self.total) if self.total in header else -1
        lasted = header.index(self.elapsed) if self.elapsed in header else -1
        of_prompt, of_output = (c.replace(" ", "_") for c in self.needed[1:])
        width = len(header)
        while True:
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield offset + reader.line_num, BadRowError("unreadable_line", str(error))
                continue
            line = offset + reader.line_num
            if not fields:
                yield line, BadRowError("empty_line", "the line is empty")
                continue
            try:
                if len(fields) != width:
                    raise BadRowError("wrong_field_count", f"{width} fields expected (got {len(fields)})")
                arrival_us, zoned = self.when(fields[at])
                n, m = count(fields[prompt], of_prompt), count(fields[output], of_output)
                key = (fields[session] or None) if session >= 0 else None
                row = Row(arrival_us, n, m, session_key=key, zoned=zoned)
                if lasted >= 0:
                    row.e2e_us = _lapse_us(fields[lasted])
                if total >= 0 and fields[total].strip() not in (str(n + m), f"{n + m}.0"):
                    row.odd = ODD_TOTAL
                yield line, row
            except BadRowError as bad:
                yield line, bad


def _lapse_us(text: str) -> int:
    try:
        return seconds_us(text)[0]
    except BadRowError:
        return -1


def seconds_us(text: str) -> tuple[int, None]:
    """Seconds, whole or with a fraction. BadRowError for what is no time: NaN, negative, 2^40 s and beyond."""
    try:
        value = float(text)
    except ValueError:
        raise BadRowError("bad_time", f"the time must be seconds (got {text[:40]!r})") from None
    if not 0 <= value < 2**40:
        raise BadRowError("bad_time", f"the time must be seconds >= 0 (got {text[:40]!r})")
    return round(value * 1e6), None
