"""What a report consists of, before it is HTML, Markdown or JSON: sentences, tables and plots as plain data.

A plot is data too (marks on two axes), so that the same section can be drawn, read out as a table, or saved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from advisor.table import Table as Table
from traces.records import Floats

How = Literal["line", "steps", "points", "bars"]


@dataclass(frozen=True, eq=False)
class Mark:
    """One series. x, y: [n]; on an axis of categories x counts them from 0. NaN breaks a line.

    low, high: [n], an interval of y: whiskers on points and bars, a band around a line. look: colour, dash and shape go by
    this number. strong: drawn to stand out (the answer among its rivals).
    """

    name: str
    x: Floats
    y: Floats
    how: How = "line"
    low: Floats | None = None
    high: Floats | None = None
    look: int = 0
    strong: bool = False


@dataclass(frozen=True, slots=True)
class Rule:
    """A straight line across the plot: a limit, a capacity, an event. axis: the one on which ``at`` is read."""

    axis: Literal["x", "y"]
    at: float
    text: str
    look: int = -1


@dataclass(frozen=True, eq=False)
class Plot:
    """Marks on two axes. categories: names of the places 0, 1, .. on the x axis."""

    x: str
    y: str
    marks: Sequence[Mark]
    rules: Sequence[Rule] = ()
    log_x: bool = False
    log_y: bool = False
    categories: Sequence[str] = ()
    diagonal: bool = False
    top: float | None = None
    """Highest value of the y axis, where it has a natural one (100 %)."""

    def as_json(self) -> dict[str, Any]:
        """The plot as data."""
        marks = [
            {"name": m.name, "x": rounded(m.x), "y": rounded(m.y)}
            | ({"low": rounded(m.low), "high": rounded(m.high)} if m.low is not None and m.high is not None else {})
            for m in self.marks
        ]
        rules = [{"axis": r.axis, "at": r.at, "text": r.text} for r in self.rules]
        return {"x": self.x, "y": self.y, "categories": list(self.categories), "marks": marks, "rules": rules}


def rounded(values: Floats, digits: int = 5) -> list[float | None]:
    """The values to a few significant digits, None where there is none: what a page holds need not be exact."""
    return [float(f"{v:.{digits}g}") if math.isfinite(v) else None for v in np.asarray(values, dtype=float).tolist()]


@dataclass(frozen=True, eq=False)
class Section:
    """One question and its answer: a heading, what is to be seen in words, then a plot, a table, or both.

    key: a short name, unique in the report. text: says in words what the plot shows, with its figures.
    code: lines to copy. missing: nothing was measured; ``text`` then says what would.
    """

    key: str
    title: str
    text: str
    plot: Plot | None = None
    table: Table | None = None
    code: Sequence[tuple[str, str]] = ()
    missing: bool = False

    def as_json(self) -> dict[str, Any]:
        """The section as data."""
        held: dict[str, Any] = {"title": self.title, "text": self.text}
        if self.plot:
            held["plot"] = self.plot.as_json()
        if self.table:
            held["table"] = self.table.as_json()
        if self.code:
            held["code"] = [{"what": what, "text": text} for what, text in self.code]
        return held


@dataclass(frozen=True, eq=False)
class Report:
    """A first screen (sentence, cards of short sentences) and the sections behind it.

    cards: (heading, lines, a command or ""). answer: the JSON that the sentence comes from.
    """

    title: str
    sentence: str
    cards: Sequence[tuple[str, Sequence[str], str]]
    sections: Sequence[Section]
    answer: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The whole report as data."""
        cards = [{"title": title, "lines": list(lines), "command": command} for title, lines, command in self.cards]
        sections = {s.key: s.as_json() for s in self.sections}
        return {"sentence": self.sentence, "cards": cards, "sections": sections, "recommendation": self.answer}
