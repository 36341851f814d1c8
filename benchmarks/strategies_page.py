"""Write docs/strategies.md and its plots from what ``steelyard strategies --json`` printed.

    steelyard strategies --scale all --seeds 20 --regret --over http --json > origin.json
    steelyard strategies --preset shift --scale all --seeds 20 --json > shift.json
    steelyard strategies --trace conv --profile llama-8b-h100 --requests 500 --gpus 8 ... --json > trace.json
    python -m benchmarks.strategies_page origin.json shift.json trace.json

Every figure on the page comes from those files; the words around them are here. Plots by plotly, drawn by Chromium.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from playwright.sync_api import sync_playwright
from plotly.subplots import make_subplots

DOCS = Path(__file__).parent.parent / "docs"
COLOURS = {"": "#7f7f7f", "report": "#d55e00", "ours": "#0072b2", "oracle": "#009e73"}  # Okabe and Ito


def shown(value: dict[str, Any], scale: float = 1.0, digits: str = ".3g") -> str:
    """Mean and half width of the interval."""
    middle = format(value["value"] * scale, digits)
    if value["high"] is None or value["high"] == value["value"]:
        return middle
    return f"{middle} ± {(value['high'] - value['value']) * scale:.2g}"


def rows(held: dict[str, Any], mode: str, scales: list[str]) -> list[str]:
    """A table: an arm a row, P99 and mean of each scale."""
    head = "| strategy |" + "".join(f" {s}: P99 s | mean s | goodput/s | busy | switches/h |" for s in scales)
    lines = [head, "| --- |" + " --- |" * 5 * len(scales)]
    for arm, about in held["strategies"].items():
        line = f"| {arm}{' (report)' if about['whose'] == 'report' else ''} |"
        for s in scales:
            row = held["scales"][s][mode][arm]
            line += f" {shown(row['p99_s'])} | {shown(row['mean_s'])} | {shown(row['goodput_per_s'])} |"
            line += f" {row['utilisation']['value']:.0%} | {row['switches_per_h']['value']:.0f} |"
        lines.append(line)
    return lines


def bars(held: dict[str, Any], modes: list[str], path: Path, browser: Any) -> None:
    """P99 and mean by arm and scale, with intervals, one panel a mode and scale; logarithmic."""
    scales = list(held["scales"])
    titles = [f"{s}, {'as they arrive' if m == 'arrivals' else 'all due at 0'}" for m in modes for s in scales]
    figure = make_subplots(len(modes), len(scales), subplot_titles=titles, shared_yaxes=True, vertical_spacing=0.12)
    for r, mode in enumerate(modes, 1):
        for c, scale in enumerate(scales, 1):
            table = held["scales"][scale][mode]
            arms = list(table)[::-1]
            for measure, opacity in (("p99_s", 1.0), ("mean_s", 0.45)):
                found = [table[a][measure] for a in arms]
                figure.add_bar(
                    y=arms,
                    x=[v["value"] for v in found],
                    orientation="h",
                    opacity=opacity,
                    error_x={"type": "data", "array": [(v["high"] or v["value"]) - v["value"] for v in found]},
                    marker_color=[COLOURS[held["strategies"][a]["whose"]] for a in arms],
                    row=r,
                    col=c,
                    showlegend=False,
                )
    figure.update_xaxes(type="log", title="seconds: P99 (full), mean (pale)")
    figure.update_layout(
        width=380 * len(scales) + 120, height=430 * len(modes), template="plotly_white", barmode="group"
    )
    draw(figure, path, browser)


def curve(held: dict[str, Any], path: Path, browser: Any) -> None:
    """Regret against the size of the sample."""
    figure = go.Figure()
    for answer in held["scales"].values():
        found = answer.get("regret_by_sample", [])
        figure.add_scatter(
            x=[f["sample"] for f in found],
            y=[f["regret"]["value"] * 100 for f in found],
            error_y={"type": "data", "array": [(f["regret"]["high"] - f["regret"]["value"]) * 100 for f in found]},
            name=f"{answer['requests']} requests, {answer['gpus']} GPUs",
        )
    figure.update_xaxes(type="log", title="requests of history the split was chosen on")
    figure.update_yaxes(title="P99 above the best split for what came, %")
    figure.update_layout(width=760, height=380, template="plotly_white")
    draw(figure, path, browser)


def draw(figure: go.Figure, path: Path, browser: Any) -> None:
    """The figure as a PNG."""
    with tempfile.TemporaryDirectory() as folder:
        page_file = Path(folder) / "p.html"
        page_file.write_text(figure.to_html(include_plotlyjs=True, config={"displayModeBar": False}))
        page = browser.new_page(viewport={"width": int(figure.layout.width), "height": int(figure.layout.height)})
        page.goto(page_file.as_uri())
        page.wait_for_selector(".main-svg")
        page.screenshot(path=str(path))
        page.close()


def against(held: dict[str, Any]) -> list[str]:
    """Ours against the report's rule, by kind."""
    lines = ["| workload | rule | P99 | mean |", "| --- | --- | --- | --- |"]
    for scale, answer in held["scales"].items():
        for mode, kinds in answer["ours_against_report"].items():
            for kind, change in kinds.items():
                lines.append(
                    f"| {scale}, {'as they arrive' if mode == 'arrivals' else 'all due at 0'} | {kind} | "
                    f"{shown(change['p99_s'], 100, '+.0f')} % | {shown(change['mean_s'], 100, '+.0f')} % |"
                )
    return lines


def http(held: dict[str, Any]) -> list[str]:
    """Served and measured through Locust, beside the simulator."""
    lines = [
        "| scale | strategy | P99 s over HTTP | against simulation | mean s | against simulation |",
        "| --- |" * 1 + " --- |" * 5,
    ]
    for scale, answer in held["scales"].items():
        for arm, row in answer.get("http", {}).get("arms", {}).items():
            off = row["against_simulation"]
            lines.append(
                f"| {scale} | {arm} | {shown(row['p99_s'])} | {shown(off['p99_s'], 100, '+.2f')} % | "
                f"{shown(row['mean_s'])} | {shown(off['mean_s'], 100, '+.2f')} % |"
            )
    return lines


def said(held: dict[str, Any]) -> list[str]:
    """The report's own P99 beside ours."""
    lines = [
        "| strategy | the report: small / medium / large, P99 s | what that figure is | here, P99 s |",
        "| --- | --- | --- | --- |",
    ]
    scales = held["scales"]
    for arm, note in scales["small"]["report"].items():
        figures = " / ".join(f"{scales[s]['report'][arm]['p99_s']:g}" for s in scales)
        ours = " / ".join(f"{scales[s]['arrivals'][arm]['p99_s']['value']:.3g}" for s in scales)
        burst = " / ".join(f"{scales[s]['burst'][arm]['p99_s']['value']:.3g}" for s in scales)
        lines.append(f"| {arm.removesuffix('-report')} | {figures} | {note['what']} | {ours}; all at 0: {burst} |")
    return lines


def main() -> None:
    """Write the page."""
    origin, shift, trace = (json.loads(Path(p).read_text()) for p in sys.argv[1:4])
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu"])
        bars(origin, ["arrivals", "burst"], DOCS / "strategies-origin.png", browser)
        bars(shift, ["arrivals"], DOCS / "strategies-shift.png", browser)
        curve(origin, DOCS / "strategies-regret.png", browser)
        browser.close()
    template = (Path(__file__).parent / "data" / "strategies.md.in").read_text()
    rejected = [line for a in origin["scales"].values() for line in a.get("http", {}).get("rejected", [])]
    speed = next(a["http"]["speed"] for a in origin["scales"].values() if "http" in a)
    seeds = next(a["http"]["seeds"] for a in origin["scales"].values() if "http" in a)
    (trace_scale,) = trace["scales"]
    filled = {
        "SEEDS": str(origin["seeds"]),
        "SAID": "\n".join(said(origin)),
        "ARRIVALS": "\n".join(rows(origin, "arrivals", list(origin["scales"]))),
        "BURST": "\n".join(rows(origin, "burst", list(origin["scales"]))),
        "AGAINST": "\n".join(against(origin)),
        "SHIFT": "\n".join(rows(shift, "arrivals", list(shift["scales"]))),
        "SHIFT_AGAINST": "\n".join(against(shift)),
        "TRACE": "\n".join(rows(trace, "arrivals", [trace_scale])),
        "TRACE_WHAT": f"{trace['source']}, {trace['scales'][trace_scale]['requests']} requests on "
        f"{trace['scales'][trace_scale]['gpus']} workers of `{trace['profile']}`, {trace['seeds']} windows, goodput under "
        f"`{trace['slo']}`",
        "HTTP": "\n".join(http(origin)),
        "HTTP_HOW": f"{seeds} draws at speed {speed:g}",
        "REJECTED": f"{len(rejected)} runs were rejected and repeated." if rejected else "No run was rejected.",
        "SLO": origin["slo"],
    }
    for key, text in filled.items():
        template = template.replace("{{" + key + "}}", text)
    (DOCS / "strategies.md").write_text(template)


if __name__ == "__main__":
    main()
