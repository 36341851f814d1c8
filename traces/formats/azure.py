"""Azure LLM inference traces, 2023, 2024 and 2025-multimodal: ``TIMESTAMP[,NumImages],ContextTokens,GeneratedTokens``.

Times are calendar times with up to seven fraction digits or none, naive (2023) or zoned; columns are found by name.
Source: Azure/AzurePublicDataset.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import IO

from traces.formats import BadFileError, BadRowError, Meta, Row, count

_NEEDED = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Azure:
    """The Azure CSV shapes."""

    name = "azure"
    title = "Azure LLM inference trace CSV (2023, 2024, 2025 multimodal)"
    meta = Meta(clock="calendar time")

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
        width = len(header)
        naive: bool | None = None
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
                arrival, zoned = _time_us(fields[at])
                if naive is None:
                    naive = not zoned
                yield (
                    line,
                    Row(
                        arrival,
                        count(fields[prompt], "ContextTokens"),
                        count(fields[output], "GeneratedTokens"),
                        zoned=zoned,
                    ),
                )
            except BadRowError as bad:
                yield line, bad


def _time_us(text: str) -> tuple[int, bool]:
    """Microseconds since 1970 and whether the text had a zone. A naive time is UTC; a seventh digit is cut."""
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise BadRowError(
            "bad_time", f"TIMESTAMP must be like 2023-11-16 18:15:46.680590 (got {text[:40]!r})"
        ) from None
    zoned = moment.tzinfo is not None
    if not zoned:
        moment = moment.replace(tzinfo=UTC)
    gap = moment - _EPOCH
    return (gap.days * 86_400 + gap.seconds) * 1_000_000 + gap.microseconds, zoned


FORMAT = Azure()
