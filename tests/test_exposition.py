"""Who watches a replay sees what will be stored: Prometheus at /metrics, the progress bar on a terminal, lines in a log."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from advisor.cli import main
from loadgen import engines
from loadgen.cluster.embedded import embedded
from loadgen.exposition import Watched, exposed
from loadgen.live import EDGES_S, Histogram, Live
from loadgen.ports import Door
from loadgen.replay import replay
from loadgen.swarm import Swarm
from tests.test_tool import a_run
from traces.errors import InputError
from traces.measures import Slo, met
from traces.records import Fleet, Observations, Schedule
from traces.store import open_store

ROOT = Path(__file__).parent.parent


def schedule(n: int, rate: float) -> Schedule:
    return Schedule("steady", np.arange(n), np.arange(n) / rate, np.full(n, 40), np.full(n, 10))


def scrape(url: str) -> dict[str, list[Any]]:
    """Sample name -> samples."""
    with urllib.request.urlopen(url, timeout=5) as answer:
        text = answer.read().decode()
    found: dict[str, list[Any]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample)
    return found


def value(samples: dict[str, list[Any]], name: str, **labels: str) -> float:
    return sum(s.value for s in samples[name] if labels.items() <= s.labels.items())


def test_what_prometheus_reads_during_a_replay_becomes_what_is_stored(tmp_path: Path) -> None:
    """Scraped all along a real replay: counters only rise, in flight is there while it is, the end equals the rows."""
    asked, slo = schedule(120, 40.0), Slo.parse("ttft<0.5s tpot<50ms")
    seen: list[dict[str, list[Any]]] = []
    over = threading.Event()
    with (
        open_store(f"sqlite:///{tmp_path}/t.db") as store,
        embedded("constant", Fleet(3, 2)) as url,
        Swarm(workers=1) as swarm,
        exposed() as (metrics, watch),
    ):
        assert scrape(metrics) == {}

        def look() -> None:
            while not over.wait(0.2):
                seen.append(scrape(metrics))

        looker = threading.Thread(target=look)
        looker.start()
        run = replay(store, swarm, asked, url, slo=slo, on_live=watch)
        over.set()
        looker.join()
        end = scrape(metrics)
        rows = store.observations(run.id)
    assert value(end, "steelyard_requests_scheduled", run=str(run.id)) == 120
    assert value(end, "steelyard_requests_total", status="ok") == run.counts["ok"] == 120
    assert value(end, "steelyard_requests_due_total") == 120
    assert value(end, "steelyard_requests_good_total") == int(met(rows, slo).sum())
    assert value(end, "steelyard_output_tokens_total") == int(rows.tokens.sum())
    for name, values in (("ttft", rows.ttft_s), ("tpot", rows.tpot_s), ("e2e", rows.e2e_s), ("lag", rows.lag_s)):
        assert value(end, f"steelyard_{name}_seconds_count") == 120
        assert value(end, f"steelyard_{name}_seconds_sum") == pytest.approx(float(values.sum()), rel=1e-6)
        assert value(end, f"steelyard_{name}_seconds_bucket", le="0.1") == int((values <= 0.1).sum())
    assert value(end, "steelyard_server_workers", role="prefill") == 3
    (about,) = end["steelyard_run_info"]
    assert (about.labels["trace"], about.labels["endpoint"]) == ("steady", url)
    due = [value(s, "steelyard_requests_due_total") for s in seen if s]
    assert due == sorted(due)
    assert any(0 < d < 120 for d in due)
    assert any(value(s, "steelyard_requests_in_flight") > 0 for s in seen if s)
    with pytest.raises(urllib.error.URLError):
        scrape(metrics)  # gone with the block


def test_a_port_that_is_taken_is_said() -> None:
    """One line, not a traceback."""
    with exposed() as (url, _):
        port = int(url.split(":")[2].split("/")[0])
        with pytest.raises(InputError, match=r"--metrics-port \d+: cannot be used"), exposed(Door(port=port)):
            pass


def test_histograms_count_like_numpy() -> None:
    """Cumulative buckets are the numbers of values at or below each bound; NaN counts nowhere."""
    values = np.array([0.0005, 0.001, 0.0011, 0.3, 700.0, np.nan, -0.1])
    histogram = Histogram()
    histogram.add(values[:3])
    histogram.add(values[3:])
    for bound, count in histogram.buckets():
        assert count == int((values <= float(bound)).sum()), bound
    assert histogram.buckets()[-1] == ("+Inf", 6.0)
    assert histogram.counts.sum() == 6
    assert sorted(EDGES_S) == list(EDGES_S)


def test_the_dashboard_draws_only_what_is_there() -> None:
    """Every steelyard metric of the Grafana file is exposed, and every one exposed is drawn; those of servers are names by which
    an engine is read; panels have words."""
    board = json.loads((ROOT / "docs" / "grafana" / "steelyard.json").read_text())
    drawn = {e["expr"] for p in board["panels"] for e in p.get("targets", ())}
    ours = {expr for expr in drawn if "$run" in expr}
    named = {name for expr in ours for name in re.findall(r"steelyard_[a-z0-9_]+", expr)}
    read = {m.name for one in engines.engines().values() for m in one.metrics}
    asked = {name for e in drawn - ours for name in re.findall(r"[(](?:rate[(])?([a-z_]+[:_][a-z0-9_:]+)[{)[]", e)}
    assert len(asked) >= 20
    assert {name.removesuffix("_bucket") for name in asked} <= read
    watched = Watched()
    watched.live = Live(a_run(id=1), schedule(2, 1.0), None)
    families = {f.name: f.type for f in watched.collect()}
    assert all("warm-up" in f.documentation for f in watched.collect() if f.type == "histogram")
    suffix = {"counter": "_total", "gauge": "", "info": "_info", "histogram": "_bucket"}
    exposed_names = {name + suffix[kind] for name, kind in families.items()}
    assert named <= exposed_names
    assert exposed_names - named == {
        "steelyard_run_info",
        "steelyard_requests_scheduled",  # the list of runs above the panels
        "steelyard_schedule_left_seconds",
    }
    for panel in board["panels"]:
        assert panel["type"] == "row" or panel["description"]


def test_what_failed_long_ago_is_still_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred failed 30 s ago, fifty were answered since: the total stands in the line and the table, beside what is of the
    last ten seconds; what is due and waits for its turn is not called in flight."""
    clock = [100.0]
    monkeypatch.setattr("loadgen.live.time", SimpleNamespace(monotonic=lambda: clock[0]))
    live = Live(a_run(id=1), schedule(2000, 10.0), None)
    live.begin(clock[0])
    rows = Observations.empty(150)
    rows.status[:100], rows.status[100:] = "failed", "ok"
    live.rows(rows.take(slice(0, 100)))
    clock[0] += 30.05
    live.rows(rows.take(slice(100, 150)))
    told = {row["name"]: row["value"] for row in live.table()}
    assert told["Requests ended"] == "150 of 2000, 151 due and pending"
    assert told["Requests not ok"] == "100"
    assert told["Goodput within no limit, last 10 s"] == "5.00/s"
    assert told["Send lag of the generator, last 10 s"] == "none yet"
    assert live.line() == "5.0/s, 151 pending, 100 not ok"


# --- the same in a terminal and in a log ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def replay_command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """A replay of four seconds, as the words of a command line."""
    folder = tmp_path_factory.mktemp("terminal")
    csv = folder / "steady.csv"
    csv.write_text("arrival,input,output\n" + "".join(f"{i / 20:.3f},40,10\n" for i in range(80)), encoding="utf-8")
    db = f"sqlite:///{folder}/t.db"
    columns = "arrival=arrival,input=input,output=output"
    assert main(["ingest", str(csv), "--map", columns, "--name", "steady", "--db", db, "-q"]) == 0
    with embedded("constant", Fleet(3, 2)) as url:
        yield ["replay", "steady", "--endpoint", url, "--workers", "1", "--db", db]


def in_terminal(command: list[str], **environment: str) -> tuple[int, str]:
    """(exit code, what a terminal of 100 columns got)."""
    master, slave = pty.openpty()
    held = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"} | environment
    child = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=held, close_fds=True)
    os.close(slave)
    got = bytearray()
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            piece = os.read(master, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        got += piece
    os.close(master)
    return child.wait(10), got.decode()


def test_a_terminal_sees_bars_with_what_was_found(replay_command: list[str]) -> None:
    """Amount, time left, TTFT, lag while it goes on, then the result; the cursor is given back; NO_COLOR is honoured."""
    code, text = in_terminal([sys.executable, "-m", "steelyard", *replay_command], NO_COLOR="1")
    assert code in (0, 4), text
    bare = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    assert re.search(r"replay steady .*\d+ of 80 +0:0\d, 0:0\d left", bare)
    assert re.search(r"\d/s, \d+ pending, TTFT p50 \d+ p99 \d+ ms, .*not ok, lag p99 [\d.]+ ms", bare)
    assert "80 of 80 ok" in bare
    assert not re.search(r"\x1b\[[0-9;]*3[0-9](;|m)", text)
    assert text.count("\x1b[?25h") >= text.count("\x1b[?25l") > 0


def test_a_log_gets_lines_and_json_stays_alone(
    replay_command: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Piped: no control character, lines on stderr; with --json one object on stdout; with --quiet nothing else at all."""
    monkeypatch.setattr("advisor.cli.progress.Lines.__init__.__defaults__", (0.5,))
    capfd.readouterr()
    assert main([*replay_command, "--json"]) in (0, 4)
    out, err = capfd.readouterr()
    assert json.loads(out)["ok"] == 80
    assert "\x1b" not in err
    lines = [line for line in err.splitlines() if line.startswith("steelyard: replay steady: ")]
    assert len(lines) >= 3
    assert re.search(r": \d+ of 80, 0:0\d, about 0:0\d left; [\d.]+/s, \d+ pending, TTFT", err)
    assert main([*replay_command, "--json", "--quiet", "--requests", "10"]) in (0, 4)
    out, err = capfd.readouterr()
    assert err == ""
    assert json.loads(out)["ok"] == 10
