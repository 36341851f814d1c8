"""The report: one file, true to its JSON, safe to open, drawn in a real browser."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from advisor.features import RunData
from advisor.recommend import Recommendation, recommend
from advisor.report import render, write_report
from loadgen.cluster import Profile
from tests.test_advise import SLO, busy_rate, lognormal, three_runs
from traces.errors import InputError
from traces.records import Sample

HOSTILE = "</script><script>window.pwned=1</script><img src=x onerror=window.pwned=1>"


@pytest.fixture(scope="module")
def answer() -> tuple[Recommendation, list[RunData]]:
    profile = Profile.load("demo")
    rate = busy_rate(profile)
    data = three_runs(profile, rate)
    data = [
        replace(
            one,
            run=replace(one.run, trace=HOSTILE, lag_p50_ms=0.5, lag_p99_ms=2.0, lag_max_ms=3.0),
            samples=[
                Sample(
                    at_s=t / 2,
                    worker=str(w),
                    role=role,
                    waiting_requests=float(t % 7) * (role == "prefill"),
                    running_requests=2.0,
                )
                for t in range(40)
                for w, role in enumerate(["prefill", "decode"])
            ],
        )
        for one in data
    ]
    schedule = replace(lognormal(200, rate, 5), name=HOSTILE)
    return recommend(data, schedule, gpus=8, slo=SLO, draws=4, attainment=0.3), data


@pytest.fixture(scope="module")
def page(answer: tuple[Recommendation, list[RunData]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    recommendation, data = answer
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, render(recommendation, data, commands=["steelyard advise"], version="0.1.0", seed=0))
    return path


def test_the_page_is_one_file_below_six_megabytes(page: Path) -> None:
    """The page needs nothing beside it, and is below 6 MB."""
    text = page.read_text(encoding="utf-8")
    assert len(text.encode()) < 6_000_000
    assert not re.search(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=(?![\"']?data:)", text.split("<script>")[0])
    assert "Content-Security-Policy" in text


def test_the_first_sentence_is_the_jsons(page: Path, answer: tuple[Recommendation, list[RunData]]) -> None:
    """What the page says first is what advise --json says, and the JSON stands in the page."""
    text = page.read_text(encoding="utf-8")
    held = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])  # type: ignore[index]
    assert held["sentence"] == answer[0].sentence
    assert held["prefill"] == answer[0].best.fleet.prefill


def test_a_report_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    """A place that cannot be written is one line, and no half page."""
    blocked = tmp_path / "file"
    blocked.write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        write_report(blocked / "report.html", "page")
    assert list(tmp_path.iterdir()) == [blocked]


@pytest.fixture(scope="module")
def browser() -> Any:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        if os.environ.get("STEELYARD_REQUIRE_BROWSER"):
            pytest.fail("Chromium is required here and was not found")
        pytest.skip("no Chromium on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(
            executable_path=chromium,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"],
        )
        yield opened
        opened.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_draws_every_plot_and_asks_nobody(browser: Any, page: Path, scheme: str) -> None:
    """In a browser: no console error, no outside request, every plot drawn, hostile names inert, wide and narrow."""
    context = browser.new_context(viewport={"width": 1200, "height": 900}, color_scheme=scheme)
    tab = context.new_page()
    errors: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    tab.on("pageerror", lambda e: errors.append(str(e)))
    tab.on("request", lambda r: asked.append(r.url))
    tab.goto(page.as_uri())
    tab.wait_for_function(
        "document.querySelectorAll('.plot .main-svg').length >= document.querySelectorAll('.plot').length"
    )
    assert tab.locator(".plot").count() >= 7
    assert errors == []
    assert [u for u in asked if not u.startswith(("file:", "data:", "blob:"))] == []
    assert tab.evaluate("window.pwned") is None
    assert tab.locator("#answer").inner_text().startswith("Run ")
    tab.set_viewport_size({"width": 380, "height": 800})
    tab.wait_for_function("document.documentElement.scrollWidth <= 400")
    context.close()
