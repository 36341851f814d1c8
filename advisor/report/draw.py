"""Plots as SVG, drawn here and not in the reader's browser: nothing to load, nothing to run, sharp in print.

Measured against plotly's bundle on the same three runs: 4.96 MB and 2.0 to 2.7 s until the plots stood, against
figures of benchmarks/report_page.py for these. Colours are classes of the page's style sheet, so that one drawing serves
light, dark and print. Each series differs by colour, dash and shape: none is told by colour alone.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from advisor.report.parts import Mark, Plot
from traces.records import Floats

LOOKS = 7
"""Colours; dashes and shapes change at other periods, so that the first 42 series all differ."""

DASHES = ("", "7 4", "2 3", "8 3 2 3", "12 4", "1 4")


@dataclass(frozen=True, slots=True)
class Size:
    """A drawing surface in SVG units; text is 13 of them, so a phone gets a narrower drawing instead of a smaller one."""

    name: str
    width: float
    height: float


WIDE, NARROW = Size("wide", 760, 320), Size("narrow", 360, 270)
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 14.0, 26.0, 42.0


class Axis:
    """Values to places on one axis; linear or logarithmic."""

    def __init__(self, low: float, high: float, start: float, end: float, *, log: bool = False) -> None:
        if log:
            low, high = max(low, 1e-12), max(high, 1e-12)
        if not high > low:
            low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
        self.low, self.high, self.start, self.end, self.log = low, high, start, end, log

    def __call__(self, value: float) -> float:
        """The place of a value; what lies beyond an end is at the end."""
        if self.log:
            share = math.log(max(value, 1e-12) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)

    def ticks(self, most: int) -> list[float]:
        """Round values inside the range, at most about ``most``."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1, 2, 5), (1, 3), (1,)):
                found = [s * 10.0**d for d in decades for s in steps if self.low <= s * 10.0**d <= self.high]
                if len(found) <= most:
                    break
            if len(found) < 3:  # less than a decade: even steps read better
                return Axis(self.low, self.high, self.start, self.end).ticks(most)
            return found[:: max(1, math.ceil(len(found) / most))]
        raw = (self.high - self.low) / max(most, 1)
        size = 10.0 ** math.floor(math.log10(raw))
        step = next(size * k for k in (1, 2, 2.5, 5, 10) if size * k >= raw)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [k * step for k in range(first, last + 1)]


def short(value: float) -> str:
    """A figure in few characters: 0.05, 12.5, 3k, 1.2M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.0e}"


def svg(plot: Plot, size: Size, label: str) -> str:
    """The plot as one svg element. label: its name for those who do not see it."""
    x, y = _axes(plot, size)
    parts = [
        f'<svg class="{size.name}" viewBox="0 0 {size.width:g} {size.height:g}" role="img" aria-label="{_e(label)}" '
        f'data-x="{x.low:.6g} {x.high:.6g} {x.start:g} {x.end:g} {int(x.log)}" data-y="{y.end:g} {y.start:g}">',
        *_frame(plot, x, y, size),
        *(_mark(m, x, y, plot, k) for k, m in enumerate(plot.marks)),
        *_rules(plot, x, y),
        '<line class="cursor" visibility="hidden"/>',
        "</svg>",
    ]
    return "".join(parts)


def swatch(mark: Mark) -> str:
    """What the legend shows beside a series' name."""
    look = f'class="s{mark.look % LOOKS}"'
    if mark.how == "bars":
        shape = f'<rect {look} x="4" y="2" width="18" height="10"/>'
    elif mark.how == "points":
        shape = _shape(mark.look, 13, 7)
        shape = f"<g {look}>{shape}</g>"
    else:
        shape = f'<path {look} d="M0 7H26" fill="none"{_dash(mark.look)}/>'
    return f'<svg class="swatch" viewBox="0 0 26 14" aria-hidden="true">{shape}</svg>'


# --- axes -----------------------------------------------------------------------------------------------------------


def _range(values: Sequence[Floats], *, log: bool) -> tuple[float, float]:
    held = np.concatenate([np.asarray(v, dtype=float) for v in values]) if values else np.empty(0)
    held = held[np.isfinite(held) & ((held > 0) if log else True)]
    return (float(held.min()), float(held.max())) if len(held) else (1.0, 10.0) if log else (0.0, 1.0)


def _axes(plot: Plot, size: Size) -> tuple[Axis, Axis]:
    left, right = _LEFT, size.width - _RIGHT
    bottom, top = size.height - _BOTTOM, _TOP
    rules = {a: np.array([r.at for r in plot.rules if r.axis == a]) for a in ("x", "y")}
    if plot.categories:
        x = Axis(-0.5, len(plot.categories) - 0.5, left, right)
    else:
        low, high = _range([*(m.x for m in plot.marks), rules["x"]], log=plot.log_x)
        if any(r.axis == "x" for r in plot.rules):  # a limit beyond all values is not to lie on the frame
            low, high = (low, high * 1.1) if plot.log_x else (low, high + (high - low) * 0.03)
        x = Axis(low, high, left, right, log=plot.log_x)
    values = [v for m in plot.marks for v in (m.y, m.low, m.high) if v is not None]
    low, high = _range([*values, rules["y"]], log=plot.log_y)
    if plot.log_y:
        # A whisker that goes down to nothing must not stretch the axis over ten decades.
        middle, _ = _range([m.y for m in plot.marks], log=True)
        low, high = max(low, middle / 20) / 1.15, high * 1.15
    else:
        low, high = min(0.0, low), (high + (high - min(0.0, low)) * 0.06) or 1.0
    if plot.top is not None:
        high = plot.top
    if plot.diagonal:
        both = min(x.low, low), max(x.high, high)
        return Axis(*both, left, right, log=plot.log_x), Axis(*both, bottom, top, log=plot.log_y)
    return x, Axis(low, high, bottom, top, log=plot.log_y)


def _frame(plot: Plot, x: Axis, y: Axis, size: Size) -> list[str]:
    parts = []
    for v in y.ticks(6):
        at = y(v)
        parts.append(f'<line class="grid" x1="{x.start:g}" x2="{x.end:g}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{x.start - 6:g}" y="{at + 4:.1f}" text-anchor="end">{short(v)}</text>')
    most = int((x.end - x.start) // 58)
    if plot.categories:
        every = max(1, math.ceil(len(plot.categories) / max(1, int((x.end - x.start) // 40))))
        ticks = [(float(k), name) for k, name in enumerate(plot.categories) if k % every == 0]
    else:
        ticks = [(v, short(v)) for v in x.ticks(most)]
    for v, text in ticks:
        at = x(v)
        if not plot.categories:
            parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{y.end:g}" y2="{y.start:g}"/>')
        parts.append(f'<text x="{at:.1f}" y="{y.start + 17:g}" text-anchor="middle">{_e(text)}</text>')
    parts.append(f'<line class="axis" x1="{x.start:g}" x2="{x.end:g}" y1="{y.start:g}" y2="{y.start:g}"/>')
    parts.append(f'<text x="{x.end:g}" y="{size.height - 8:g}" text-anchor="end" class="name">{_e(plot.x)}</text>')
    parts.append(f'<text x="4" y="14" class="name">{_e(plot.y)}</text>')
    if plot.diagonal:
        low, high = max(x.low, y.low), min(x.high, y.high)
        ends = f'x1="{x(low):.1f}" y1="{y(low):.1f}" x2="{x(high):.1f}" y2="{y(high):.1f}"'
        parts.append(f'<line class="rule" {ends}/>')
    return parts


def _rules(plot: Plot, x: Axis, y: Axis) -> list[str]:
    parts = []
    for k, r in enumerate(plot.rules):
        look = f"rule s{r.look % LOOKS}" if r.look >= 0 else "rule"
        if r.axis == "x":
            at = x(r.at)
            parts.append(f'<line class="{look}" x1="{at:.1f}" x2="{at:.1f}" y1="{y.end:g}" y2="{y.start:g}"/>')
            side, off = ("end", -5) if at > (x.start + x.end) / 2 else ("start", 5)
            down = y.end + 12 + 15 * (k % 4)
            parts.append(f'<text x="{at + off:.1f}" y="{down:g}" text-anchor="{side}" class="halo">{_e(r.text)}</text>')
        else:
            at = y(r.at)
            parts.append(f'<line class="{look}" x1="{x.start:g}" x2="{x.end:g}" y1="{at:.1f}" y2="{at:.1f}"/>')
            down = at + 14 if at < y.end + 16 else at - 5
            parts.append(f'<text x="{x.end - 3:g}" y="{down:.1f}" text-anchor="end" class="halo">{_e(r.text)}</text>')
    return parts


# --- marks ----------------------------------------------------------------------------------------------------------


def _mark(m: Mark, x: Axis, y: Axis, plot: Plot, number: int) -> str:
    draw = {"line": _line, "steps": _line, "points": _points, "bars": _bars}[m.how]
    strong = " strong" if m.strong else ""
    return f'<g class="s{m.look % LOOKS}{strong}" data-s="{number}">{draw(m, x, y, plot)}</g>'


def _line(m: Mark, x: Axis, y: Axis, plot: Plot) -> str:
    path, band = [], ""
    pen = False
    before = math.nan
    for vx, vy in zip(m.x.tolist(), m.y.tolist(), strict=True):
        if not (math.isfinite(vx) and math.isfinite(vy)) or (plot.log_y and vy <= 0) or (plot.log_x and vx <= 0):
            pen = False
            continue
        if pen and m.how == "steps":
            path.append(f"L{x(vx):.1f} {before:.1f}")
        before = y(vy)
        path.append(f"{'L' if pen else 'M'}{x(vx):.1f} {before:.1f}")
        pen = True
    if m.low is not None and m.high is not None:
        keep = np.isfinite(m.low) & np.isfinite(m.high)
        there = [f"{x(a):.1f} {y(b):.1f}" for a, b in zip(m.x[keep], m.high[keep], strict=True)]
        back = [f"{x(a):.1f} {y(b):.1f}" for a, b in zip(m.x[keep][::-1], m.low[keep][::-1], strict=True)]
        if there:
            band = f'<path class="band" d="M{"L".join(there + back)}Z"/>'
    return f'{band}<path fill="none" d="{"".join(path)}"{_dash(m.look)}/>'


def _points(m: Mark, x: Axis, y: Axis, plot: Plot) -> str:
    parts = []
    for k, (vx, vy) in enumerate(zip(m.x.tolist(), m.y.tolist(), strict=True)):
        if math.isfinite(vx) and math.isfinite(vy) and (vy > 0 or not plot.log_y) and (vx > 0 or not plot.log_x):
            parts.append(_whisker(m, k, x(vx), y) + _shape(m.look, x(vx), y(vy), 2.4 if len(m.x) > 60 else 4.5))
    return "".join(parts)


def _bars(m: Mark, x: Axis, y: Axis, plot: Plot) -> str:
    parts = []
    half = (x(1.0) - x(0.0)) * 0.32 if plot.categories else 4.0
    floor = y(max(y.low, 0.0))
    for k, (vx, vy) in enumerate(zip(m.x.tolist(), m.y.tolist(), strict=True)):
        if math.isfinite(vy):
            at, top = x(vx), y(vy)
            parts.append(f'<rect x="{at - half:.1f}" y="{top:.1f}" width="{2 * half:.1f}" height="{floor - top:.1f}"/>')
            parts.append(_whisker(m, k, at, y))
    return "".join(parts)


def _whisker(m: Mark, k: int, at: float, y: Axis) -> str:
    if m.low is None or m.high is None or not (math.isfinite(m.low[k]) and math.isfinite(m.high[k])):
        return ""
    low, high = y(float(m.low[k])), y(float(m.high[k]))
    ends = f"M{at - 5:.1f} {low:.1f}h10M{at - 5:.1f} {high:.1f}h10"
    return f'<path class="whisker" d="M{at:.1f} {low:.1f}V{high:.1f}{ends}"/>'


def _shape(look: int, x: float, y: float, r: float = 4.5) -> str:
    kind = look % 4
    if kind == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:g}"/>'
    if kind == 1:
        return f'<rect x="{x - r:.1f}" y="{y - r:.1f}" width="{2 * r:g}" height="{2 * r:g}"/>'
    if kind == 2:
        return f'<path d="M{x:.1f} {y - 1.2 * r:.1f}l{1.2 * r:.1f} {2.2 * r:.1f}h{-2.4 * r:.1f}z"/>'
    return f'<path d="M{x:.1f} {y - 1.3 * r:.1f}l{1.3 * r:.1f} {1.3 * r:.1f}l{-1.3 * r:.1f} {1.3 * r:.1f}l{-1.3 * r:.1f} {-1.3 * r:.1f}z"/>'


def _dash(look: int) -> str:
    dash = DASHES[look % len(DASHES)]
    return f' stroke-dasharray="{dash}"' if dash else ""


def _e(text: str) -> str:
    return html.escape(text, quote=True)
