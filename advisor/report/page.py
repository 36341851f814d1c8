"""A report as one HTML file. Everything that came from outside (names of traces, models, endpoints, error texts) goes through
``html.escape``; the policy of the page lets nothing run but the one script below, and nothing be asked of anybody.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np

from advisor.report.draw import NARROW, WIDE, svg, swatch
from advisor.report.parts import Plot, Report, Section, Table, rounded

FOLDED = 14
"""Rows of a table above which it is folded away beside a plot."""

NOWRAP = 40
"""Characters of a cell above which it may be broken."""


def asset(name: str) -> str:
    """The style sheet or the script, as they stand beside this file."""
    return (resources.files("advisor.report") / name).read_text(encoding="utf-8")


def policy(*, live: bool = False) -> str:
    """The Content-Security-Policy: nothing may run or be fetched but our own style and script, known by their hashes.

    live: a page of the local server may also ask that server for its newest state.
    """

    def named(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    rest = "connect-src 'self'; form-action 'self'; frame-ancestors 'none'" if live else "form-action 'none'"
    return (
        f"default-src 'none'; style-src {named(asset('page.css'))}; script-src {named(asset('page.js'))}; img-src data:; "
        f"base-uri 'none'; {rest}"
    )


def render(report: Report) -> str:
    """The whole file."""
    return document(f"Steelyard: {report.title}", report_body(report), figures(report.sections), data=report.answer)


def report_body(report: Report) -> list[str]:
    """First screen, contents, evidence."""
    return [
        '<a class="skip" href="#evidence">To the evidence</a>',
        "<header><p>Steelyard: which P:D ratio to run</p>",
        f'<h1 id="answer">{e(report.sentence)}</h1></header>',
        f'<div class="cards">{"".join(_card(*card) for card in report.cards)}</div>',
        contents(report.sections),
        '<div id="evidence">',
        *(section(s) for s in report.sections),
        "</div>",
    ]


def document(
    title: str, body: Sequence[str], plots: Mapping[str, Any], *, data: Any = None, live: str = "", nav: str = ""
) -> str:
    """A page around its body. live: the address that gives the newest body of a page that changes."""
    meta = (
        f'<meta http-equiv="Content-Security-Policy" content="{e(policy())}">' if not (live or nav) else ""
    )  # the local server sends it as a header
    return "\n".join(
        [
            "<!doctype html>",
            f'<html lang="en"><head><meta charset="utf-8">{meta}',
            '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">',
            '<link rel="icon" href="data:,"><meta name="referrer" content="no-referrer">',
            f"<title>{e(title)}</title><style>{asset('page.css')}</style></head><body>",
            nav,
            f"<main{f' data-live={chr(34)}{e(live)}{chr(34)}' if live else ''}>",
            *body,
            f'<script type="application/json" id="figures">{safe_json(plots)}</script>',
            "</main>",
            f'<script type="application/json" id="data">{safe_json(data)}</script>' if data is not None else "",
            f"<script>{asset('page.js')}</script></body></html>",
        ]
    )


def e(text: object) -> str:
    """Text that cannot be markup."""
    return html.escape(str(text), quote=True)


def safe_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in; NaN and infinity as null."""

    def plain(v: Any) -> Any:
        if isinstance(v, Mapping):
            return {str(k): plain(x) for k, x in v.items()}
        if isinstance(v, (list, tuple)):
            return [plain(x) for x in v]
        if isinstance(v, np.generic):
            return plain(v.item())
        return None if isinstance(v, float) and not math.isfinite(v) else v

    text = json.dumps(plain(value), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# --- pieces ---------------------------------------------------------------------------------------------------------


def _card(title: str, lines: Sequence[str], command: str) -> str:
    said = f"<p>{e(lines[0])}</p>" if len(lines) == 1 else f"<ul>{''.join(f'<li>{e(x)}</li>' for x in lines)}</ul>"
    code = f"<pre><code>{_words(command)}</code></pre>" if command else ""
    return f'<section class="card"><h2>{e(title)}</h2>{said}{code}</section>'


def _words(command: str) -> str:
    """A command line whose options are not broken at their hyphens."""
    return re.sub(r"\S+", lambda word: f"<span>{e(word[0])}</span>", command)


def contents(sections: Sequence[Section]) -> str:
    """Links to the sections."""
    items = "".join(f'<li><a href="#{e(s.key)}">{e(s.title)}</a></li>' for s in sections)
    return f'<nav aria-label="Contents"><details><summary>Contents</summary><ul>{items}</ul></details></nav>'


def section(s: Section) -> str:
    """One section: heading, text, plot, table."""
    key = e(s.key)
    parts = [f'<section class="part{" missing" if s.missing else ""}" id="{key}" aria-labelledby="h-{key}">']
    parts.append(f'<h2 id="h-{key}">{e(s.title)}</h2><p id="t-{key}">{e(s.text)}</p>')
    if s.plot is not None:
        parts.append(_figure(s.key, s.title, s.plot))
    if s.table is not None:
        made = table(s.table)
        fold = s.plot is not None and len(s.table.rows) > FOLDED
        parts.append(
            f"<details><summary>As a table ({len(s.table.rows)} rows)</summary>{made}</details>" if fold else made
        )
    for what, text in s.code:
        block = f"<pre><code>{_words(text) if text.startswith('steelyard ') else e(text)}</code></pre>"
        if text.count("\n") > 8:
            parts.append(f"<details><summary>{e(what)}</summary>{block}</details>")
        else:
            parts.append(f'<p class="what">{e(what)}</p>{block}')
    return "".join([*parts, "</section>"])


def _figure(key: str, title: str, plot: Plot) -> str:
    k = e(key)
    legend = ""
    if len(plot.marks) > 1:
        items = (
            f'<li><button type="button" aria-pressed="true" data-s="{n}">{swatch(m)}{e(m.name)}</button></li>'
            for n, m in enumerate(plot.marks)
        )
        legend = f'<ul class="legend" aria-label="Series; press to hide or show">{"".join(items)}</ul>'
    readable = _readable(plot)
    reader = f' tabindex="0" role="group" aria-label="{e(title)}: arrow keys read values"' if readable else ""
    output = '<output aria-live="polite"></output>' if readable else ""
    drawn = "".join(svg(plot, size, f"{title}. The text above says what it shows.") for size in (WIDE, NARROW))
    rows = [
        [
            m.name,
            str(int(np.isfinite(m.y).sum())),
            *(f"{v:.4g}" for v in np.quantile(m.y[np.isfinite(m.y)], (0, 0.5, 1))),
        ]
        for m in plot.marks
        if np.isfinite(m.y).any()
    ]
    values = table(Table(["series", "points", "lowest", "median", "highest"], rows, f"{plot.y}, over {plot.x}"))
    return (
        f'<figure aria-describedby="t-{k}">{legend}<div class="plot" data-plot="{k}"{reader}>{drawn}{output}</div>'
        f"<details><summary>The plot in figures</summary>{values}</details></figure>"
    )


def _readable(plot: Plot) -> bool:
    """May values be read off one place on the x axis? Not in a cloud of points."""
    return bool(plot.categories) or any(m.how != "points" for m in plot.marks)


def figures(sections: Sequence[Section]) -> dict[str, Any]:
    """The points behind each plot, for reading them off."""
    return {
        s.key: {
            "x": s.plot.x,
            "names": list(s.plot.categories),
            "marks": [{"name": m.name, "x": rounded(m.x, 4), "y": rounded(m.y, 4)} for m in s.plot.marks],
        }
        for s in sections
        if s.plot is not None and _readable(s.plot)
    }


def table(t: Table) -> str:
    """A table that scrolls by itself on a narrow screen; columns of words stand left, of figures right."""
    words = [any(row[k][:1].isalpha() or len(row[k]) > NOWRAP for row in t.rows) for k in range(len(t.head))]

    def cell(k: int, text: str, tag: str, link: str = "") -> str:
        kind = "long" if len(text) > NOWRAP else "words" if words[k] else ""
        tag, scope = ("th", f' scope="{"col" if tag == "th" else "row"}"') if k == 0 or tag == "th" else (tag, "")
        shown = f'<a href="{e(link)}">{e(text)}</a>' if link else e(text)
        return f"<{tag}{scope}{f' class={kind}' if kind else ''}>{shown}</{tag}>"

    head = "".join(cell(k, h, "th") for k, h in enumerate(t.head))
    rows = "".join(
        f"<tr{' class=strong' if n in t.strong else ''}>{''.join(cell(k, c, 'td', t.links[n] if t.links and k == 0 else '') for k, c in enumerate(row))}</tr>"
        for n, row in enumerate(t.rows)
    )
    caption = f"<caption>{e(t.caption)}</caption>" if t.caption else ""
    body = f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{e(t.caption or "Table")}">{body}</div>'
