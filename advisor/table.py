"""A table as plain data: of a report, a page or a comparison (which has no use for all that a report imports)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of texts under a head. strong: rows that stand out. caption: what the figures are."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    strong: Sequence[int] = ()
    links: Sequence[str] = ()
    """Where each row's first cell leads to, on the pages of a server."""

    def as_json(self) -> list[dict[str, str]]:
        """One object a row, the head's words as keys."""
        return [dict(zip(self.head, row, strict=True)) for row in self.rows]
