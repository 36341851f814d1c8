"""The dash: the database as read-only local pages, live, safe in a browser, for nobody without the token elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import math
import os
import queue
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from shlex import quote as quoted
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from aiohttp import web
from sqlalchemy import make_url

from advisor.advise import load
from advisor.cli import main
from advisor.dash import Dash, Page, make_app, serve
from advisor.recommend import recommend
from loadgen.cluster import Profile
from loadgen.ports import Door
from tests.test_advise import SLO, busy_rate, lognormal, three_runs
from tests.test_features import run_of
from tests.test_replay import rename
from tests.test_report import HOSTILE, add_trace, opened, stored
from traces.aggregate import APPROXIMATE
from traces.errors import InputError
from traces.records import Fleet, Run
from traces.store import Store, open_store

__all__ = ["opened"]


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three runs of a hostile trace, an answer, and a run that goes on with half of its rows. A test that writes takes a copy."""
    url = f"sqlite:///{tmp_path_factory.mktemp('dash') / 'steelyard.db'}"
    profile = Profile.load("demo")
    rate = busy_rate(profile)
    with open_store(url) as store:
        add_trace(store, lognormal(200, rate, 5), HOSTILE)
        data = three_runs(profile, rate)
        ids = stored(store, data, HOSTILE)
        answer = recommend(
            load(store, store.runs(ids=ids)), store.schedule(HOSTILE), gpus=8, slo=SLO, draws=4, attainment=0.3
        )
        store.add_recommendation("static", answer.as_json() | {"version": "0.1.0"}, ids, answer.data_hash, 0)
        going = store.begin_run(replace(run_of(Fleet(4, 4), 80), name=HOSTILE, ended=False, verdict="", complete=False))
        store.add_observations(going.id, data[0].observations.take(slice(0, 40)))
    return url


@contextmanager
def served(db: str) -> Iterator[str]:
    """The verb, in a process of its own."""
    command = [sys.executable, "-m", "advisor", "dash", "--port", "0", "--db", db]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    try:
        line = child.stdout.readline()
        assert line.startswith("listening on "), line
        yield line.split()[-1]
        child.send_signal(signal.SIGTERM)
        assert child.wait(20) == 0
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


@contextmanager
def shown(db: str, door: Door) -> Iterator[str]:
    """The verb's application behind a door, served by a thread: to begin a process costs two seconds more."""
    ready: queue.Queue[tuple[str, asyncio.AbstractEventLoop, asyncio.Event]] = queue.Queue()

    async def serve(store: Store) -> None:
        runner, over = web.AppRunner(make_app(Dash(store), door=door), shutdown_timeout=1.0), asyncio.Event()
        await runner.setup()
        sock = door.bind()
        await web.SockSite(runner, sock).start()
        ready.put((door.url(sock.getsockname()[1]), asyncio.get_running_loop(), over))
        await over.wait()
        await runner.cleanup()

    with open_store(db, create=False) as store:
        thread = threading.Thread(target=lambda: asyncio.run(serve(store)), daemon=True)
        thread.start()
        url, loop, over = ready.get(timeout=60)
        try:
            yield url
        finally:
            loop.call_soon_threadsafe(over.set)
            thread.join(60)
    assert not thread.is_alive()


def test_a_signal_ends_it_while_a_page_is_made(made_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database that says nothing, or a count of ten million rows, keeps it from nothing: nobody waits for the page."""
    over, made = threading.Event(), list[bool]()

    def slow(*_: int) -> Page:
        os.kill(os.getpid(), signal.SIGTERM)
        made.append(over.wait(30))
        return Page("", [])

    def ready(url: str) -> None:
        threading.Thread(target=asked, args=(url,), daemon=True).start()

    def asked(url: str) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            ask(url, "/")

    monkeypatch.setattr(Dash, "overview", lambda self, *pages: slow(*pages))
    with open_store(made_url) as store:
        asyncio.run(serve(store, door=Door("127.0.0.1", 0), ready=ready))
        assert not made
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # a second one would end what is left
        over.set()


def test_it_ends_also_where_a_page_counts_in_threads_of_its_own(db: str) -> None:
    """Python waits for those of an executor before it ends, however long a database says nothing."""
    code = """
import os, sys, time
import advisor.dash, advisor.compare
def silent(*_):
    os.write(1, b"asked\\n")  # one piece: two threads come here
    time.sleep(600)
advisor.compare.read = silent
from advisor.cli import main
main(["dash", "--port", "0", "--db", sys.argv[1]])
"""
    child = subprocess.Popen([sys.executable, "-c", code, db], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    try:
        where = child.stdout.readline().split()[-1]

        def asked() -> None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                ask(where, "/compare?runs=1,2")

        threading.Thread(target=asked, daemon=True).start()
        assert child.stdout.readline() == "asked\n"
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == 0
    finally:
        child.kill()
        child.communicate()


@pytest.fixture(scope="module")
def url(db: str) -> Iterator[str]:
    with served(db) as where:
        yield where


def ask(url: str, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
    where = urlsplit(url)
    connection = http.client.HTTPConnection(str(where.hostname), where.port, timeout=60)
    connection.request(method, path, headers={k.replace("_", "-"): v for k, v in headers.items()})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, {k.lower(): v for k, v in answer.getheaders()}, text


def test_pages_as_data_say_what_the_database_holds(url: str, db: str) -> None:
    """Every page is JSON too: the overview's ids, a run's sections, the answer's own sentence, a comparison's reason."""
    held = json.loads(ask(url, "/?format=json")[2])
    shown = {"runs": [4, 3, 2, 1], "answers": [1]}
    assert held == {
        "runs": [1, 2, 3, 4], "shown": shown, "going": [4], "traces": [HOSTILE], "recommendations": [1]
    }  # fmt: skip
    run = json.loads(ask(url, "/runs/3?format=json")[2])
    assert {"facts", "arrivals", "latency", "ttft", "tpot", "e2e", "queues", "roles", "lag"} <= set(run["sections"])
    told = json.loads(ask(url, "/recommendations/1?format=json")[2])
    with open_store(db) as store:
        assert told["sentence"] == store.recommendation(1)["sentence"]
    code = [one["text"] for part in told["sections"].values() for one in part.get("code", ())]
    lines = [line for text in code for line in text.split("\n") if line.startswith("steelyard ")]
    lines += told["cards"][2]["command"].split(" && ")
    assert {line.split()[1] for line in lines} >= {"report", "advise", "replay", "strategies"}
    assert all(f" --db {quoted(db)}" in line for line in lines), lines
    assert "rate" in json.loads(ask(url, f"/traces/{quote(HOSTILE, safe='')}?format=json")[2])["sections"]


def test_many_runs_and_answers_are_turned_over(db: str) -> None:
    """Newest first, each once, pages linked both ways; turning one list leaves the other where it was."""
    with open_store(db) as store:
        dash = Dash(store, listed=3)
        pages = [dash.overview(), dash.overview(runs_page=2)]
        with pytest.raises(InputError, match="no page 3"):
            dash.overview(runs_page=3)
    assert [page.data["shown"]["runs"] for page in pages] == [[4, 3, 2], [1]]
    first, second = ("".join(page.body) for page in pages)
    (going,) = re.findall(
        r"<tr>(?:(?!</tr>).)*/runs/4.*?</tr>", first, re.S
    )  # nothing of it is counted yet, so nothing is said to be 0
    assert re.findall(r">([^<>\n]+)</td>", going)[-4:-1] == ["–/80", "–", "running or broken off"]
    assert "1 to 3 of 4, newest first." in first
    assert 'href="/?runs=2#runs">Older runs' in first
    assert "Newer runs" not in first
    assert 'href="/#runs">Newer runs' in second
    assert "Older runs" not in second
    assert "answers" not in re.findall(r'aria-label="Pages of (\w+)"', first + second)


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("/runs/99", 404, "no run has id 99"),
        ("/recommendations/99", 404, "no recommendation"),
        ("/traces/none", 404, "no trace is named"),
        ("/compare?runs=1", 404, "two runs or more"),
        ("/?runs=7", 404, "runs have no page 7"),
        ("/?answers=-1", 404, "a number from 1"),
        ("/../etc/passwd", 404, "Not Found"),
        ("/runs/1%0aX", 404, "Not Found"),
    ],
)
def test_what_is_not_there_is_one_line(url: str, path: str, status: int, said: str) -> None:
    """No traceback, the reason in the page, the same headers."""
    found, headers, text = ask(url, path)
    assert found == status
    assert said in text
    assert "Traceback" not in text
    assert "default-src 'none'" in headers["content-security-policy"]


def test_it_is_read_only_and_answers_to_its_own_name(url: str) -> None:
    """Nothing but GET and HEAD; a name that was bound to this address from elsewhere is refused."""
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert ask(url, "/", method)[0] == 405
    assert ask(url, "/", "HEAD")[0] == 200
    assert ask(url, "/", Host="evil.example:80")[0] == 421
    assert ask(url, "/", Sec_Fetch_Site="cross-site")[0] == 403
    assert ask(url, "/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate")[0] == 200  # a link that is followed
    headers = ask(url, "/")[1]
    assert headers["x-content-type-options"] == "nosniff"
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert "access-control-allow-origin" not in headers


def test_elsewhere_it_needs_a_token(db: str, capsys: Any) -> None:
    """Without a token it does not listen beyond loopback; with one every page asks for it, once a browser."""
    assert main(["dash", "--host", "0.0.0.0", "--port", "0", "--db", db]) == 1
    assert "needs a token" in capsys.readouterr().err
    with shown(db, Door(token="s3cret")) as url:
        assert ask(url, "/")[0] == 401
        assert ask(url, "/?token=wrong")[0] == 401
        assert ask(url, "/runs/1", Authorization="Bearer s3cret")[0] == 200
        status, headers, _ = ask(url, "/?token=s3cret")
        assert (status, headers["location"]) == (303, "/")
        cookie = headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "s3cret" not in cookie
        assert ask(url, "/", Cookie=cookie.split(";")[0])[0] == 200
        assert ask(url, "/", Cookie="steelyard=other")[0] == 401
        assert ask(url, "/", Cookie="steelyard=\xff")[0] == 401
        assert ask(url, "/", Authorization="Bearer \xff")[0] == 401
        assert ask(url, "/?token=%ff")[0] == 401


@pytest.fixture
def growing(db: str, sqlite_url: str) -> str:
    """A copy of the database, for a test that adds to it."""
    source, copy = (str(make_url(url).database) for url in (db, sqlite_url))
    with closing(sqlite3.connect(source)) as held, closing(sqlite3.connect(copy)) as own:
        held.backup(own)
    return sqlite_url


def test_a_run_with_the_number_of_one_that_was_deleted_is_another(growing: str) -> None:
    """SQLite gives the highest number again: what was computed for the run before is not shown for this one."""
    with open_store(growing) as store:
        store.delete_run(4)
        dash = Dash(store)
        assert ": 200 of 200 requests finished" in dash.run(3).body[1]
        store.delete_run(3)
        made = store.begin_run(replace(run_of(Fleet(4, 4), 70), trace=HOSTILE, started_unix_s=2e9))
        assert made.id == 3
        assert ": 0 of 70 requests finished" in dash.run(3).body[1]


def test_pages_say_what_the_command_line_says(
    growing: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A warm-up's answers finished as well; what goes on has a lag; what is not known is a dash; a degraded run is compared with
    a note, a long one with how far its figures may be off. What the command line says of a run has what moved its fleet."""
    with open_store(growing) as store:
        rows, like = store.observations(1), store.run(1)
        for more in ({"warmup_s": float(rows.due_s[40])}, {"verdict": "degraded", "reason": "no usage"}):
            run = replace(like, id=0, **more)
            begun = store.begin_run(replace(run, ended=False))
            store.add_observations(begun.id, rows)
            store.end_run(replace(run, id=begun.id))
        store.begin_run(replace(like, ended=False, lag_p50_ms=math.nan, lag_p99_ms=math.nan, lag_max_ms=math.nan))
        dash = Dash(store)
        assert ": 80 of 80 requests finished" in dash.run(5).body[1]
        (late,) = dash.run(4).data["sections"]["lag"]["table"]
        assert re.fullmatch(r"[\d.]+ / [\d.]+ / [\d.]+", late["lag p50 / p99 / max, ms"])
        for number in (4, 5, 7):
            assert not re.search(r"\bnan\b", "".join(dash.run(number).body))
        (told,) = dash.compare([1, 6]).data["sections"].values()
        assert told["text"].endswith(" Note: run 6 is degraded: no usage.")
        monkeypatch.setattr("traces.store.EXACT_ROWS", 50)
        (told,) = dash.compare([1, 6]).data["sections"].values()
        assert told["text"].endswith(APPROXIMATE)
    assert main(["runs", "show", "7", "--db", growing]) == 0
    assert "nan" not in capsys.readouterr().out
    assert main(["runs", "show", "3", "--json", "--db", growing]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [change["reason"] for change in shown["fleet_changes"]] == [HOSTILE]
    assert shown["decisions"] == []


def test_a_browser_shows_the_pages_and_a_run_that_grows(opened: Any, growing: str) -> None:
    """Drill-down by links and keyboard, plots drawn, nothing hostile runs, no outside request; new rows appear by themselves."""
    with shown(growing, Door()) as url:
        browse(opened, url, growing)


def browse(opened: Any, url: str, db: str) -> None:
    tab = opened.new_page(viewport={"width": 1100, "height": 800})
    errors: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    tab.on("pageerror", lambda e: errors.append(str(e)))
    tab.on("request", lambda r: asked.append(r.url))
    tab.goto(url)
    assert tab.locator("h1").inner_text().startswith("Run ")
    tab.locator("a", has_text="run 3").first.focus()
    tab.keyboard.press("Enter")
    tab.wait_for_url("**/runs/3")
    assert tab.locator(".plot svg.wide").count() >= 6
    tab.goto(f"{url}/recommendations/1")
    assert tab.locator(".plot svg.wide").count() >= 15
    tab.goto(f"{url}/traces/{quote(HOSTILE, safe='')}")
    assert tab.locator(".plot svg.wide").count() == 2
    tab.goto(f"{url}/runs/4")
    with tab.expect_response(lambda answer: answer.status == 503, timeout=120_000):  # the database is away for a moment
        rename(Path(str(make_url(db).database)), "runs", "hidden")
    rename(Path(str(make_url(db).database)), "hidden", "runs")
    assert "40 of 80 requests" in tab.locator("h1").inner_text()
    with open_store(db) as store:
        rest = store.observations(1).take(slice(40, 80))
        store.add_observations(4, rest)
        run = store.run(4)
        ended = Run(**{f: getattr(run, f) for f in run.__slots__} | {"verdict": "valid", "complete": True})
        store.end_run(ended)
    tab.locator("h1", has_text="80 of 80").wait_for(timeout=120_000)
    tab.set_viewport_size({"width": 380, "height": 800})
    assert tab.evaluate("document.documentElement.scrollWidth") <= 380
    assert [error for error in errors if "status of 503" not in error] == []
    assert all(a.startswith((url, "data:")) for a in asked)
    assert tab.evaluate("window.pwned") is None
    tab.close()
