"""A report as Markdown: the sentences and the tables, for a wiki or a pull request. Plots are told in words."""

from __future__ import annotations

import re

from advisor.report.parts import Report, Table


def markdown(report: Report) -> str:
    """The whole text. What came from outside is escaped: it makes no heading, link, picture or markup."""
    lines = [f"# {escape(report.sentence)}", ""]
    for title, said, command in report.cards:
        lines += [f"**{escape(title)}**", "", *(f"- {escape(line)}" for line in said), ""]
        lines += _code(command) if command else []
    for section in report.sections:
        lines += [f"## {escape(section.title)}", "", escape(section.text), ""]
        if section.table is not None:
            lines += [*_table(section.table), ""]
        for what, text in section.code:
            lines += [f"{escape(what)}:", "", *_code(text)]
    return "\n".join(lines).rstrip() + "\n"


def escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    text = re.sub(r"\s+", " ", text)
    return re.sub(r"([\\`*_{}\[\]()<>#!|~])", r"\\\1", text)


def _table(t: Table) -> list[str]:
    head = [escape(h) for h in t.head]
    rows = [[escape(c) for c in row] for row in t.rows]
    lines = [f"{escape(t.caption)}", ""] if t.caption else []
    lines += [f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def _code(text: str) -> list[str]:
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [fence, text, fence, ""]
