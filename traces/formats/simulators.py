"""Traces in the formats of two simulators: Vidur's processed traces and SplitwiseSim's.

Vidur: ``arrived_at,num_prefill_tokens,num_decode_tokens`` (more columns may follow), seconds from 0.
SplitwiseSim: ``request_id,request_type,application_id,arrival_timestamp,batch_size,prompt_size,token_size``, seconds.
Sources: microsoft/vidur, Mutinifni/splitwise-sim.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import IO

from traces.formats import BadFileError, BadRowError, Meta, Row, count, seconds_us


class Columns:
    """A CSV whose three columns of interest have fixed names and whose times are seconds."""

    meta = Meta(clock="second (fractional)")

    def __init__(self, name: str, title: str, at: str, prompt: str, output: str) -> None:
        self.name = name
        self.title = title
        self.needed = (at, prompt, output)

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
        except (StopIteration, ValueError) as error:
            raise BadFileError(f"the header must name {', '.join(self.needed)}") from error
        for fields in reader:
            line = reader.line_num
            try:
                if len(fields) != len(header):
                    raise BadRowError("wrong_field_count", f"{len(header)} fields expected (got {len(fields)})")
                n, m = count(fields[prompt], self.needed[1]), count(fields[output], self.needed[2])
                yield line, Row(seconds_us(fields[at]), n, m)
            except BadRowError as bad:
                yield line, bad


VIDUR = Columns("vidur", "Vidur processed trace CSV", "arrived_at", "num_prefill_tokens", "num_decode_tokens")
SPLITWISE = Columns("splitwise-sim", "SplitwiseSim trace CSV", "arrival_timestamp", "prompt_size", "token_size")
