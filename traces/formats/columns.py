"""CSV formats that differ only in the names of their columns and in how they write time."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from typing import IO

from traces.formats import BadFileError, BadRowError, Meta, Row, count


class Columns:
    """A CSV with a header; columns are found by name, others are passed over.

    when(text) -> (microseconds, whether the text had a zone, or None where the time has no calendar); it raises
    BadRowError. session: the column of the session's key, if there is one; a file without it is still of this format.
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
    ) -> None:
        self.name = name
        self.title = title
        self.meta = Meta(clock=clock)
        self.needed = (at, prompt, output)
        self.session = session
        self.when = when

    def sniff(self, head: str) -> str | None:
        """The header row names the three columns."""
        header = [c.strip() for c in head.lstrip("\ufeff").split("\n", 1)[0].strip().split(",")]
        missing = [c for c in self.needed if c not in header]
        return f"no column {', '.join(missing)} in the header" if missing else None

    def rows(self, lines: IO[str]) -> Iterator[tuple[int, Row | BadRowError]]:
        """Rows in the file's order."""
        reader = csv.reader(lines)
        try:
            header = [c.strip() for c in next(reader)]
            at, prompt, output = (header.index(c) for c in self.needed)
        except (StopIteration, ValueError, csv.Error) as error:
            raise BadFileError(f"the header must name {', '.join(self.needed)}") from error
        session = header.index(self.session) if self.session in header else -1
        of_prompt, of_output = (c.replace(" ", "_") for c in self.needed[1:])
        width = len(header)
        while True:
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield reader.line_num, BadRowError("unreadable_line", str(error))
                continue
            line = reader.line_num
            if not fields:
                yield line, BadRowError("empty_line", "the line is empty")
                continue
            try:
                if len(fields) != width:
                    raise BadRowError("wrong_field_count", f"{width} fields expected (got {len(fields)})")
                arrival_us, zoned = self.when(fields[at])
                n, m = count(fields[prompt], of_prompt), count(fields[output], of_output)
                key = (fields[session] or None) if session >= 0 else None
                yield line, Row(arrival_us, n, m, session_key=key, zoned=zoned)
            except BadRowError as bad:
                yield line, bad


def seconds_us(text: str) -> tuple[int, None]:
    """Seconds, whole or with a fraction. BadRowError for what is no time: NaN, negative, 2^40 s and beyond."""
    try:
        value = float(text)
    except ValueError:
        raise BadRowError("bad_time", f"the time must be seconds (got {text[:40]!r})") from None
    if not 0 <= value < 2**40:
        raise BadRowError("bad_time", f"the time must be seconds >= 0 (got {text[:40]!r})")
    return round(value * 1e6), None
