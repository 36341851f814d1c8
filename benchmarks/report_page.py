"""How large the report of a run is, how long it takes to make, and how long until a browser shows it.

    python -m benchmarks.report_page            # 1,000 and 1,000,000 requests

The reference in the same run is the same evidence drawn by plotly's bundle in the reader's browser, as the report did before.
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import plotly
import plotly.graph_objects as go

from advisor.features import RunData
from advisor.report import assemble, text_of
from advisor.report.digest import digest
from advisor.report.page import figures
from advisor.report.parts import Report
from advisor.report.pdf import browser
from loadgen.cluster import Profile, simulate
from tests.test_advise import SLO, lognormal
from tests.test_features import run_of
from traces import __version__
from traces.records import Fleet, Observations


def rows_of(requests: int) -> Observations:
    """A thousand simulated requests, again and again, one block after the other."""
    schedule = lognormal(1000, 20, 1)
    part = simulate(schedule, Fleet(4, 4), Profile.load("demo")).observations
    copies = requests // 1000
    columns = {name: np.tile(getattr(part, name), copies) for name in Observations.columns()}
    late = np.repeat(np.arange(copies) * (schedule.span_s + 1), 1000)
    columns |= {name: columns[name] + late for name in columns if name.endswith("_s") and name != "max_gap_s"}
    return Observations(**columns | {"index": np.arange(requests)})


def by_plotly(report: Report) -> str:
    """The same series, drawn by the bundle."""
    parts = []
    for n, held in enumerate(figures(report.sections).values()):
        figure = go.Figure([go.Scatter(x=m["x"], y=m["y"], name=m["name"], mode="lines") for m in held["marks"]])
        parts.append(figure.to_html(full_html=False, include_plotlyjs=n == 0))
    return f"<!doctype html><meta charset=utf-8>{''.join(parts)}"


def opened_ms(chromium: Any, path: Path, ready: str, times: int) -> list[float]:
    """Milliseconds from asking for the page until every plot stands."""
    found = []
    for _ in range(times):
        tab = chromium.new_page(viewport={"width": 1200, "height": 900})
        began = time.perf_counter()
        tab.goto(path.as_uri())
        tab.wait_for_function(ready)
        found.append((time.perf_counter() - began) * 1e3)
        tab.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", default="1000,1000000")
    parser.add_argument("--times", type=int, default=7)
    args = parser.parse_args()
    from playwright.sync_api import sync_playwright

    print(
        f"{platform.platform()}, {platform.processor() or platform.machine()}, Python {platform.python_version()}, ",
        end="",
    )
    print(f"steelyard {__version__}, plotly {plotly.__version__}, n = {args.times} openings each")
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        chromium = playwright.chromium.launch(executable_path=browser(), args=["--no-sandbox", "--disable-gpu"])
        for requests in map(int, args.requests.split(",")):
            data = RunData(replace(run_of(Fleet(4, 4), requests), slo=str(SLO)), rows_of(requests))
            began = time.perf_counter()
            digested = digest(data, SLO, (), Profile.load("demo"))
            report = assemble({"sentence": "A run.", "slo": str(SLO)}, [digested])
            pages = {"svg": text_of(report, "html")}
            made = time.perf_counter() - began
            pages["plotly"] = by_plotly(report)
            medians = {}
            for kind, page in pages.items():
                path = Path(folder) / f"{kind}.html"
                path.write_text(page, encoding="utf-8")
                plots = ".plot svg.wide" if kind == "svg" else ".main-svg"
                ready = f"document.querySelectorAll('{plots}').length >= {len(figures(report.sections))}"
                times = opened_ms(chromium, path, ready, args.times)
                medians[kind] = statistics.median(times)
                print(
                    f"{requests:>9,} requests, {kind:6}: {len(page.encode()) / 1e6:5.2f} MB, shown after median "
                    f"{medians[kind]:5.0f} ms ({min(times):.0f} to {max(times):.0f})"
                )
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(
                f"{'':>9} made in {made:.2f} s, peak {peak:.0f} MiB; plotly / svg {medians['plotly'] / medians['svg']:.1f}x"
            )
        chromium.close()


if __name__ == "__main__":
    main()
