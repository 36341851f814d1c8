"""One self-contained HTML page: the answer first, then what it rests on. The only room that knows plotly.

Everything that came from outside (names of traces, models, endpoints, error texts) goes through ``html.escape``; the
figures' JSON is made safe for a script element. A Content-Security-Policy forbids the page any request to anywhere.
Distributions are drawn as at most POINTS quantiles and time series as at most POINTS bins, so a run of a million
requests makes a page no larger than a run of a hundred.
"""

from __future__ import annotations

import html
import json
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.io import to_json
from plotly.offline import get_plotlyjs

from advisor.features import RunData
from advisor.recommend import Candidate, Recommendation
from traces.errors import InputError
from traces.measures import LAG_LIMIT_S, Slo, Summary, summarise
from traces.records import Floats, Sample

POINTS = 400

# Okabe and Ito's palette: told apart by colour-blind readers, and on paper by dash as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")

_CSS = """
:root{color-scheme:light dark;--ink:#1a1a1a;--dim:#555;--bg:#fff;--card:#f5f6f8;--line:#d5d8de;--good:#00664c;--warn:#8a4600}
@media(prefers-color-scheme:dark){:root{--ink:#ececec;--dim:#b3b3b3;--bg:#15171a;--card:#1f2226;--line:#3a3f46;--good:#58d0a8;--warn:#ffb668}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:60rem;margin:0 auto;padding:1.5rem 1rem 4rem}h1{font-size:1.1rem;color:var(--dim);font-weight:600;margin:0 0 .5rem}
.answer{font-size:1.6rem;line-height:1.3;font-weight:650;margin:0 0 1rem}h2{margin:2.5rem 0 .5rem;font-size:1.25rem}
.card{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.75rem 1rem;margin:.75rem 0}
.card h2{margin:0 0 .25rem;font-size:1rem}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto}th,td{padding:.3rem .6rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}tr.best td{font-weight:700;color:var(--good)}caption{text-align:left;color:var(--dim);padding:.3rem 0}
figure{margin:1rem 0}figcaption{color:var(--dim);font-size:.95rem}.plot{background:#fff;border:1px solid var(--line);border-radius:.5rem;min-height:22rem;overflow:hidden;max-width:100%}
code,pre{font:14px/1.45 ui-monospace,monospace}pre{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--card);padding:.75rem;border-radius:.5rem}
.warn{color:var(--warn)}a{color:inherit}a:focus,summary:focus{outline:3px solid #56B4E9}@media print{.plot{break-inside:avoid}body{font-size:11pt}}
"""


def write_report(path: Path, page: str) -> None:
    """Write the page whole or not at all. InputError when the place cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as f:
                f.write(page)
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(f"{path}: the report cannot be written ({error.strerror}). Give another --out.") from error


def render(
    recommendation: Recommendation, data: Sequence[RunData], *, commands: Sequence[str], version: str, seed: int
) -> str:
    """The page. data: the runs the answer rests on, or was compared with. commands: what reproduces it."""
    slo = recommendation.slo
    summaries = [(one, summarise(one.run.counted(one.observations), slo)) for one in data]
    plots = [
        (
            "goodput",
            "Goodput by split",
            _goodput_text(recommendation),
            _bars(recommendation, "goodput_per_s", "requests per second within the SLO", 1.0),
        ),
        (
            "p99",
            "P99 latency by split",
            "Predicted 99th percentiles, milliseconds, each with its interval; a missing bar means that nothing finished.",
            _p99(recommendation),
        ),
        *_distributions(data, slo),
        (
            "queues",
            "What the servers held",
            "Requests waiting and running by role, summed over workers, from the servers' own metrics.",
            _queues(data),
        ),
        (
            "laws",
            "Do the laws fit?",
            "Time per output token of every answer: measured against predicted by the decode law. On the line is right.",
            _laws(recommendation, data),
        ),
        (
            "lag",
            "The generator's own lag",
            "How late requests left, against their due times. A run counts only while this stays far below the TTFT limit.",
            _lag(data),
        ),
    ]
    plots = [p for p in plots if p[3] is not None]
    figures = {name: json.loads(to_json(figure)) for name, _, _, figure in plots}
    body = [
        "<main>",
        "<h1>Steelyard: which P:D ratio to run</h1>",
        f'<p class="answer" id="answer">{_e(recommendation.sentence)}</p>',
        _sure(recommendation),
        _next(recommendation),
        _unmeasured(recommendation, data),
        "<h2>All splits</h2>",
        _splits_table(recommendation),
        *(
            f'<figure><h2 id="h-{name}">{_e(title)}</h2><div class="plot" id="plot-{name}" role="img" '
            f'aria-labelledby="h-{name} c-{name}"></div><figcaption id="c-{name}">{_e(text)}</figcaption></figure>'
            for name, title, text, _ in plots
        ),
        "<h2>Runs</h2>",
        _runs_table(summaries),
        "<h2>Fitted laws</h2>",
        _laws_table(recommendation),
        f"<details><summary>As a profile that steelyard serve takes</summary><pre>"
        f"{_e(recommendation.fit.profile.to_toml())}</pre></details>",
        "<h2>How to get this again</h2>",
        f"<pre>{_e(chr(10).join(commands))}</pre>",
        f"<p>steelyard {_e(version)}, seed {seed}, data hash <code>{_e(recommendation.data_hash[:16])}</code>, "
        f"schedule <code>{_e(recommendation.schedule.digest()[:16])}</code>"
        f"{_e(_changes(recommendation))}.</p>",
        "</main>",
    ]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
            "script-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<link rel="icon" href="data:,">',
            f"<title>Steelyard: {_e(str(recommendation.best.fleet))}</title>",
            f"<style>{_CSS}</style></head><body>",
            *body,
            f'<script type="application/json" id="data">{_safe_json(recommendation.as_json())}</script>',
            f'<script type="application/json" id="figures">{_safe_json(figures)}</script>',
            f"<script>{get_plotlyjs()}</script>",
            "<script>const figures=JSON.parse(document.getElementById('figures').textContent);"
            "for(const [name,figure] of Object.entries(figures))"
            "Plotly.newPlot('plot-'+name,figure.data,figure.layout,{responsive:true,displaylogo:false});</script>",
            "</body></html>",
        ]
    )


# --- words ----------------------------------------------------------------------------------------------------------


def _e(text: str) -> str:
    return html.escape(text, quote=True)


def _safe_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in; NaN and infinity as null."""

    def plain(v: Any) -> Any:
        if isinstance(v, dict):
            return {str(k): plain(x) for k, x in v.items()}
        if isinstance(v, (list, tuple)):
            return [plain(x) for x in v]
        if isinstance(v, np.generic):
            return plain(v.item())
        return None if isinstance(v, float) and not math.isfinite(v) else v

    text = json.dumps(plain(value), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _sure(r: Recommendation) -> str:
    rival = ""
    if r.runner_up is not None:
        gap = r.runner_up.figures["goodput_per_s"].value / max(r.best.figures["goodput_per_s"].value, 1e-12) - 1
        rival = f" Runner-up: {r.runner_up.fleet} ({gap:+.1%} goodput)."
    kind = "90 % intervals" if r.calibrated else "bands from a bootstrap over time blocks, not yet calibrated"
    return (
        f'<section class="card"><h2>How sure, and on what</h2><p>{r.best.fleet} has the most goodput in {r.best.wins:.0%} of '
        f"the bootstrap draws.{rival} It rests on {len(r.runs)} runs with {r.n} finished requests; {kind}.</p></section>"
    )


def _next(r: Recommendation) -> str:
    return (
        f'<section class="card"><h2>What to do next</h2><p>Run this: {_e(r.next_probe["why"])}.</p>'
        f"<pre>{_e(r.next_probe['command'])}</pre></section>"
    )


def _unmeasured(r: Recommendation, data: Sequence[RunData]) -> str:
    gaps = list(r.warnings)
    measured = {str(one.run.fleet) for one in data}
    never = [str(c.fleet) for c in r.candidates if str(c.fleet) not in measured]
    if never:
        gaps.append(f"splits predicted but never run: {', '.join(never)}")
    gaps.append("the cost of changing the split while serving, and splits of fewer GPUs")
    items = "".join(f"<li>{_e(g)}</li>" for g in gaps)
    return f'<section class="card warn"><h2>What was not measured, and warnings</h2><ul>{items}</ul></section>'


def _changes(r: Recommendation) -> str:
    return f" ({'; '.join(r.schedule.changes)})" if r.schedule.changes else ""


def _goodput_text(r: Recommendation) -> str:
    return "; ".join(f"{c.fleet}: {_figure(c, 'goodput_per_s', 1, 3)}" for c in r.candidates) + " requests per second."


def _figure(c: Candidate, name: str, unit: float, digits: int) -> str:
    f = c.figures[name]
    if not math.isfinite(f.value):
        return "–"
    if not math.isfinite(f.low):
        return f"{f.value * unit:.{digits}g}"
    return f"{f.value * unit:.{digits}g} [{f.low * unit:.{digits}g}, {f.high * unit:.{digits}g}]"


def _splits_table(r: Recommendation) -> str:
    head = (
        "<tr><th>P:D</th><th>goodput, req/s</th><th>within SLO</th><th>TTFT p99, s</th><th>TPOT p99, ms</th>"
        "<th>E2E p99, s</th><th>prefill busy</th><th>decode busy</th><th>best in draws</th></tr>"
    )
    rows = "".join(
        f"<tr{' class=best' if c is r.best else ''}><td>{c.fleet}{' (recommended)' if c is r.best else ''}</td>"
        f"<td>{_figure(c, 'goodput_per_s', 1, 3)}</td><td>{c.attainment:.1%}</td><td>{_figure(c, 'ttft_p99_s', 1, 3)}</td>"
        f"<td>{_figure(c, 'tpot_p99_s', 1e3, 3)}</td><td>{_figure(c, 'e2e_p99_s', 1, 3)}</td>"
        f"<td>{c.utilisation.get('prefill', math.nan):.0%}</td><td>{c.utilisation.get('decode', math.nan):.0%}</td>"
        f"<td>{c.wins:.0%}</td></tr>"
        for c in r.candidates
    )
    return f"<div class=scroll><table><caption>Predicted on the trace; [90 % interval].</caption>{head}{rows}</table></div>"


def _runs_table(summaries: Sequence[tuple[RunData, Summary]]) -> str:
    head = (
        "<tr><th>run</th><th>P:D</th><th>trace</th><th>rate, req/s</th><th>n</th><th>ok</th><th>goodput</th><th>TTFT p50/p99, ms"
        "</th><th>TPOT p50/p99, ms</th><th>E2E p50/p99, s</th><th>lag p50/p99/max, ms</th><th>verdict</th></tr>"
    )
    rows = "".join(
        f"<tr><td>{one.run.id}</td><td>{one.run.fleet}</td><td>{_e(one.run.trace)}</td><td>{one.run.rate_per_s:.3g}</td>"
        f"<td>{s.n}</td><td>{s.ok}</td><td>{s.goodput_per_s:.3g}</td>"
        f"<td>{s.ttft_p50_s * 1e3:.0f} / {s.ttft_p99_s * 1e3:.0f}</td><td>{s.tpot_p50_s * 1e3:.1f} / {s.tpot_p99_s * 1e3:.1f}</td>"
        f"<td>{s.e2e_p50_s:.2f} / {s.e2e_p99_s:.2f}</td>"
        f"<td>{one.run.lag_p50_ms:.1f} / {one.run.lag_p99_ms:.1f} / {one.run.lag_max_ms:.1f}</td>"
        f"<td>{_e(one.run.verdict)}{'' if one.run.complete else ', incomplete'}</td></tr>"
        for one, s in summaries
    )
    return f"<div class=scroll><table><caption>Latencies from due times.</caption>{head}{rows}</table></div>"


def _laws_table(r: Recommendation) -> str:
    rows = "".join(
        f"<tr><td>{_e(law.stage)}</td><td>{_e(', '.join(f'{k} = {v:.4g}' for k, v in law.coefficients.items()))}</td>"
        f"<td>{law.n}</td><td>{law.error:.1%}</td><td>{_e(law.source)}</td></tr>"
        for law in r.fit.laws
    )
    head = "<tr><th>stage</th><th>coefficients (SI)</th><th>rows</th><th>median error</th><th>from</th></tr>"
    return f"<div class=scroll><table>{head}{rows}</table></div>"


# --- figures --------------------------------------------------------------------------------------------------------


def _layout(figure: go.Figure, x: str, y: str, **more: Any) -> go.Figure:
    figure.update_layout(
        template="plotly_white",
        margin={"l": 60, "r": 20, "t": 70, "b": 50},
        font={"size": 13},
        xaxis_title=x,
        yaxis_title=y,
        legend={"orientation": "h", "y": 1.04, "yanchor": "bottom"},
        **more,
    )
    return figure


def _errors(candidates: Sequence[Candidate], name: str, unit: float) -> dict[str, Any]:
    figures = [c.figures[name] for c in candidates]
    up = [max(0.0, (f.high - f.value) * unit) if math.isfinite(f.high) else 0.0 for f in figures]
    down = [max(0.0, (f.value - f.low) * unit) if math.isfinite(f.low) else 0.0 for f in figures]
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down}


def _bars(r: Recommendation, name: str, title: str, unit: float) -> go.Figure:
    colours = [COLOURS[2] if c is r.best else COLOURS[4] if c is r.runner_up else COLOURS[5] for c in r.candidates]
    figure = go.Figure(
        go.Bar(
            x=[f"{c.fleet} " for c in r.candidates],
            y=[c.figures[name].value * unit for c in r.candidates],
            error_y=_errors(r.candidates, name, unit),
            marker_color=colours,
        )
    )
    return _layout(figure, "prefill:decode", title)


def _p99(r: Recommendation) -> go.Figure:
    figure = go.Figure()
    for i, (name, label) in enumerate((("ttft_p99_s", "TTFT"), ("tpot_p99_s", "TPOT"), ("e2e_p99_s", "E2E"))):
        figure.add_scatter(
            x=[f"{c.fleet} " for c in r.candidates],
            y=[c.figures[name].value * 1e3 for c in r.candidates],
            error_y=_errors(r.candidates, name, 1e3),
            name=label,
            mode="lines+markers",
            line={"color": COLOURS[i], "dash": DASHES[i]},
        )
    return _layout(figure, "prefill:decode", "P99, ms (log)", yaxis_type="log")


def _distributions(data: Sequence[RunData], slo: Slo) -> list[tuple[str, str, str, go.Figure]]:
    found = []
    for metric, label in (("ttft", "TTFT"), ("tpot", "TPOT"), ("e2e", "E2E")):
        figure = go.Figure()
        for i, one in enumerate(data):
            values = getattr(one.observations, f"{metric}_s")[one.observations.ok]
            values = values[np.isfinite(values)]
            if not len(values):
                continue
            p = np.linspace(0, 1, min(POINTS, max(2, len(values))))
            figure.add_scatter(
                x=np.quantile(values, p) * 1e3,
                y=p * 100,
                name=f"run {one.run.id}: {one.run.fleet} at {one.run.rate_per_s:.3g}/s",
                mode="lines",
                line={"color": COLOURS[i % len(COLOURS)], "dash": DASHES[i % len(DASHES)]},
            )
        limit = slo.limit(metric)
        if limit:
            figure.add_vline(x=limit * 1e3, line_dash="dot")
            # On a log axis plotly wants a shape's place as a value and an annotation's as its logarithm.
            figure.add_annotation(
                x=math.log10(limit * 1e3), y=1, yref="paper", text=f"SLO {limit * 1e3:g} ms", showarrow=False
            )
        _layout(figure, f"{label}, ms (log)", "% of requests at or below", xaxis_type="log")
        found.append(
            (metric, f"{label} by run", f"Share of requests at or below each {label}, from due time, per run.", figure)
        )
    return found


def _binned(at_s: Floats, values: Floats) -> tuple[Floats, Floats]:
    """Means in at most POINTS equal bins of time."""
    if len(at_s) <= POINTS:
        return at_s, values
    edges = np.linspace(at_s.min(), at_s.max(), POINTS + 1)
    place = np.clip(np.digitize(at_s, edges) - 1, 0, POINTS - 1)
    n = np.bincount(place, minlength=POINTS)
    total = np.bincount(place, weights=values, minlength=POINTS)
    keep = n > 0
    return ((edges[:-1] + edges[1:]) / 2)[keep], total[keep] / n[keep]


def _by_instant(samples: Sequence[Sample], role: str, name: str) -> tuple[Floats, Floats]:
    totals: dict[float, float] = {}
    for s in samples:
        value = getattr(s, name)
        if s.role == role and value is not None:
            totals[s.at_s] = totals.get(s.at_s, 0.0) + float(value)
    at = np.array(sorted(totals))
    return at, np.array([totals[t] for t in at])


def _queues(data: Sequence[RunData]) -> go.Figure | None:
    figure = go.Figure()
    for i, one in enumerate(data):
        for j, (role, name, label) in enumerate(
            (("prefill", "waiting_requests", "prefill waiting"), ("decode", "running_requests", "decode running"))
        ):
            at, values = _by_instant(one.samples, role, name)
            if len(at):
                x, y = _binned(at, values)
                figure.add_scatter(
                    x=x,
                    y=y,
                    name=f"run {one.run.id} ({one.run.fleet}): {label}",
                    mode="lines",
                    line={"color": COLOURS[i % len(COLOURS)], "dash": DASHES[j]},
                )
    return _layout(figure, "seconds from schedule zero", "requests") if figure.data else None


def _laws(r: Recommendation, data: Sequence[RunData]) -> go.Figure | None:
    from advisor.features import decode_rows

    law = r.fit.profile
    figure = go.Figure()
    top = 0.0
    for i, one in enumerate(data):
        if one.run.fleet is None:
            continue
        rows = decode_rows(one, i)
        if not len(rows):
            continue
        predicted = rows.x @ np.array([law.c0_s, law.c1_s, law.c2_s])
        pick = np.linspace(0, len(rows) - 1, min(POINTS, len(rows))).astype(int)
        top = max(top, float(rows.y.max()), float(predicted.max()))
        figure.add_scatter(
            x=predicted[pick] * 1e3,
            y=rows.y[pick] * 1e3,
            mode="markers",
            name=f"run {one.run.id} ({one.run.fleet})",
            marker={"size": 5, "opacity": 0.6, "color": COLOURS[i % len(COLOURS)]},
        )
    if not figure.data:
        return None
    figure.add_scatter(
        x=[0, top * 1e3], y=[0, top * 1e3], mode="lines", name="equal", line={"color": "#555", "dash": "dot"}
    )
    return _layout(figure, "predicted TPOT, ms", "measured TPOT, ms")


def _lag(data: Sequence[RunData]) -> go.Figure:
    figure = go.Figure()
    for i, one in enumerate(data):
        rows = one.observations.take(np.flatnonzero(np.isfinite(one.observations.sent_s)))
        if len(rows):
            x, y = _binned(rows.due_s, rows.lag_s * 1e3)
            figure.add_scatter(
                x=x,
                y=y,
                mode="lines",
                name=f"run {one.run.id} ({one.run.fleet})",
                line={"color": COLOURS[i % len(COLOURS)], "dash": DASHES[i % len(DASHES)]},
            )
    figure.add_hline(y=0.05 * LAG_LIMIT_S * 1e3, line_dash="dot", annotation_text="degraded from here (default limit)")
    return _layout(figure, "due time, s", "send lag, ms")
