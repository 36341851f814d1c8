"""BurstGPT CSV, six columns (1, 2) or eight (3: ``Session ID`` and ``Elapsed time`` inserted): columns found by name.

Times are seconds from a midnight, as integers or float text (``19440110.0``), of any origin. A failed request has no
response tokens. Source: HPMLL/BurstGPT.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import IO

from traces.formats import BadFileError, BadRowError, Meta, Row, count, seconds_us

_NEEDED = ("Timestamp", "Request tokens", "Response tokens")


class BurstGPT:
    """The BurstGPT shapes."""

    name = "burstgpt"
    title = "BurstGPT CSV (six and eight columns)"
    meta = Meta(clock="second")

    def sniff(self, head: str) -> str | None:
        """The header row names the three columns."""
        header = [c.strip() for c in head.lstrip("\ufeff").split("\n", 1)[0].strip().split(",")]
        missing = [c for c in _NEEDED if c not in header]
        return f"no column {', '.join(missing)} in the header" if missing else None

    def rows(self, lines: IO[str]) -> Iterator[tuple[int, Row | BadRowError]]:
        """Rows in the file's order."""
        reader = csv.reader(lines)
        try:
            header = [c.strip() for c in next(reader)]
            at, prompt, output = (header.index(c) for c in _NEEDED)
        except (StopIteration, ValueError) as error:
            raise BadFileError(f"the header must name {', '.join(_NEEDED)}") from error
        session = header.index("Session ID") if "Session ID" in header else -1
        for fields in reader:
            line = reader.line_num
            try:
                if len(fields) != len(header):
                    raise BadRowError("wrong_field_count", f"{len(header)} fields expected (got {len(fields)})")
                yield (
                    line,
                    Row(
                        seconds_us(fields[at]),
                        count(fields[prompt], "Request_tokens"),
                        count(fields[output], "Response_tokens"),
                        session_key=(fields[session] or None) if session >= 0 else None,
                    ),
                )
            except BadRowError as bad:
                yield line, bad


FORMAT = BurstGPT()
