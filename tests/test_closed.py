"""Means at a fixed concurrency say which split serves most with so many in flight, and nothing about a rate."""

from __future__ import annotations

import json
import math
import re
import shlex
import sqlite3
from contextlib import closing
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import traces.store
from advisor.advise import beside_means
from advisor.cli import main
from advisor.closed import Candidate, Point, _close, left_out
from advisor.dash import Dash
from loadgen.cluster import Profile, simulate_batches
from loadgen.imports import Mean, read_aggregates, store_aggregates
from traces.records import CLOSED_LOOP, Aggregate, Fleet, Schedule
from traces.shape import LogNormal
from traces.store import open_store

DATA = Path(__file__).parent / "data" / "results" / "closed_loop.csv"
MAP = "concurrency=in_flight,prefill=P,decode=D,prompt_tokens=mean_isl,output_tokens=mean_osl,ttft_s=ttft_ms,tpot_s=tpot_ms"
IMPORT = [
    "runs",
    "import",
    str(DATA),
    "--aggregate",
    "--map",
    MAP,
    "--time-unit",
    "ms",
    "--engine",
    "vllm",
    "--model",
    "m",
]


@cache
def closed_loop(fleet: Fleet, in_flight: int, laws: Profile, n: int = 800) -> tuple[Aggregate, float]:
    """(means of a closed loop without its first fifth, requests a second that ended) as the simulator measures them."""
    rng = np.random.default_rng(1)
    lengths = LogNormal(6.5, 0.5, 10, 4096).draw(n, rng), LogNormal(4.8, 0.5, 8, 1024).draw(n, rng)
    schedule = Schedule("closed", np.arange(n), np.zeros(n), *lengths)
    every = simulate_batches(schedule, fleet, laws, [(range(n), None)], in_flight=in_flight).observations
    rows = every.take(np.arange(n // 5, n))
    gaps = rows.output_tokens - 1
    tpot = float((rows.last_token_s - rows.first_token_s).sum() / gaps.sum())
    mean = Aggregate(
        in_flight,
        float(rows.prompt_tokens.mean()),
        float(rows.output_tokens.mean()),
        float(rows.ttft_sent_s.mean()),
        tpot,
    )
    begin, end = rows.sent_s.min(), rows.sent_s.max()  # the loop is full until the last is sent
    served = int(((every.last_token_s > begin) & (every.last_token_s <= end)).sum())
    return mean, served / float(end - begin)


def run(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any], str]:
    """(exit code, JSON, what stood on stderr)."""
    code = main([*argv, "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out.strip() else {}, err


def test_little_counts_what_a_closed_loop_serves() -> None:
    """Concurrency / E2E is the throughput of the loop, where prefill holds, where decode does, and where neither."""
    for fleet in (Fleet(1, 7), Fleet(2, 6), Fleet(6, 2)):
        mean, served = closed_loop(fleet, 64, Profile.load("demo"))
        assert mean.throughput_per_s == pytest.approx(served, rel=0.06)
        assert mean.e2e_s == pytest.approx(mean.ttft_s + (mean.output_tokens - 1) * mean.tpot_s)


def test_means_are_stored_asked_and_measured_again(made_db_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """From a CSV with other names through the database to a split: the one that serves most of those measured, and for a split
    that was not measured an interval that holds what it does."""
    db = ["--db", made_db_url]
    code, first, _ = run([*IMPORT, *db], capsys)
    assert code == 0
    assert len(first["runs"]) == 20
    assert not any(held["already"] for held in first["runs"])
    assert first["runs"][0]["throughput_per_s"] == pytest.approx(16 / (0.14808 + 138.2 * 0.01864))
    _, again, _ = run([*IMPORT, *db], capsys)
    assert [held["run"] for held in again["runs"]] == [held["run"] for held in first["runs"]]
    assert all(held["already"] for held in again["runs"])
    shown = run(["runs", "show", "7", *db], capsys)[1]
    assert shown["aggregate"]["concurrency"] == 64
    assert shown["fleet"] == {"prefill": 2, "decode": 6}

    code, said, _ = run(["advise", "--concurrency", "64", "--slo", "ttft<0.5s tpot<50ms", *db], capsys)
    assert code == 0
    assert (said["prefill"], said["decode"]) == (2, 6)
    assert said["goodput_per_s"] is None  # means do not tell which requests met their limits
    assert said["ttft_s"]["value"] == pytest.approx(0.15192)
    assert any("nothing about queueing at an open-loop rate" in line for line in said["warnings"])
    by = {(c["prefill"], c["decode"]): c for c in said["candidates"]}
    assert len(by) == 7
    assert not by[1, 7]["meets_slo"]
    truth, _ = closed_loop(Fleet(5, 3), 64, Profile.load("demo"))
    unseen = by[5, 3]
    assert not unseen["measured"]
    for name in ("throughput_per_s", "ttft_s", "tpot_s"):
        assert unseen[name]["low"] <= getattr(truth, name) <= unseen[name]["high"]
    with open_store(made_db_url) as store:
        kept = store.recommendations()[0]
        assert (kept["id"], kept["kind"]) == (said["recommendation"], "closed loop")
        assert len(kept["run_ids"]) == 20


def test_means_and_what_they_answer_are_shown_as_such(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command that is printed about them is taken, and no page holds a figure that is none."""
    url = f"sqlite:///{tmp_path}/c.db"
    db = ["--db", url]
    run([*IMPORT, *db], capsys)
    command = run(db, capsys)[1]["next"]["command"]
    assert command == f"steelyard advise --concurrency 128 --db {url}"
    code, said, _ = run(shlex.split(command)[1:], capsys)
    assert code == 0
    found = run(db, capsys)[1]
    assert found["recommendation"]["sentence"] == said["sentence"]
    assert found["next"]["command"] == f"steelyard ingest FILE --db {url}"
    assert found["next"]["why"] == "means of closed loops say nothing about a rate, and no trace is stored"
    assert main(["runs", *db]) == 0
    assert f"read one: steelyard dash --db {url}\n" in capsys.readouterr().out
    code, _, err = run(["report", "--recommendation", str(said["recommendation"]), *db], capsys)
    assert (code, "(closed loop)" in err, "steelyard dash" in err) == (1, True, True)
    with open_store(url) as store:
        dash = Dash(store)
        pages = [dash.recommendation(said["recommendation"]), dash.run(7), dash.overview()]
    answer, mean, overview = ("".join(page.body) for page in pages)
    assert not re.search(r"\bnan\b", answer + mean + overview)
    assert f"{said['candidates'][0]['throughput_per_s']['value']:.3g}" in answer
    assert "means with 64 requests in flight" in mean
    assert ">closed-loop</td>" in overview
    (line,) = (one["text"] for one in pages[0].data["sections"]["reproduce"]["code"])
    code, again, _ = run(shlex.split(line)[1:], capsys)
    assert (code, again | {"recommendation": 0}) == (0, said | {"recommendation": 0})
    monkeypatch.setattr(traces.store, "LOCKED_S", 0.1)
    with closing(sqlite3.connect(tmp_path / "c.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        code, unkept, _ = run(shlex.split(line)[1:], capsys)
    assert (code, unkept["recommendation"], unkept["candidates"]) == (0, None, said["candidates"])
    assert re.search("this answer is not stored: .* locked", unkept["warnings"][-1])


def test_a_rate_is_no_question_for_means(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 5 with both ways on; options about traffic are refused; too far from what was measured is, too."""
    db = ["--db", f"sqlite:///{tmp_path}/c.db"]
    run([*IMPORT, *db], capsys)
    code, _, err = run(["advise", "--rate", "5", *db], capsys)
    assert code == 5
    assert "--concurrency 128" in err
    assert "steelyard replay TRACE" in err
    for argv, word in (
        (["--concurrency", "64", "--rate", "5"], "--rate"),
        (["--concurrency", "64", "--strategy", "online"], "--strategy"),
    ):
        code, _, err = run(["advise", *argv, *db], capsys)
        assert (code, word in err) == (2, True)
    code, _, err = run(["advise", "--concurrency", "1000", *db], capsys)
    assert code == 5
    assert "at 1000 requests in flight" in err
    code, _, err = run(["advise", "--concurrency", "64", "--gpus", "16", "--gpus-per-worker", "2,2", *db], capsys)
    assert code == 5
    assert "measured with 1,1 GPUs a worker, which does not tell what workers of 2,2 do. Measure next: " in err
    code, _, err = run(["advise", "--concurrency", "64", "--slo", "ttft<1ms", *db], capsys)
    assert code == 3
    code, _, err = run(["advise", "--concurrency", "64", "--run", "1", "--run", "5", *db], capsys)
    assert code == 5
    assert "2 splits (1:7, 2:6), 3 are needed" in err


def test_lengths_that_were_not_measured_are_said_and_far_ones_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Means of 732 and 139 tokens tell nothing of what length does: half as long again is noted, over twice is exit 5."""
    db = ["--db", f"sqlite:///{tmp_path}/c.db"]
    run([*IMPORT, *db], capsys)
    lengths = {"same": (735, 140), "long": (1100, 139), "short": (732, 100), "far": (1600, 139), "brief": (732, 50)}
    for name, (prompt, output) in lengths.items():
        rows = [{"timestamp": k, "input_length": prompt, "output_length": output} for k in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert main(["ingest", str(tmp_path / f"{name}.jsonl"), "--name", name, *db]) == 0
        capsys.readouterr()
        code, said, err = run(["advise", "--concurrency", "64", "--trace", name, *db], capsys)
        if name in ("far", "brief"):
            assert code == 5
            word = "prompts of 1600 tokens" if name == "far" else "answers of 50 tokens"
            assert f"{word} are too far" in err
            assert "Measure next: steelyard runs import FILE --aggregate, with a row of" in err
        else:
            assert code == 0
            noted = [line for line in said["warnings"] if "lengths" in line]
            assert bool(noted) == (name != "same"), name
            assert not (noted and said["sure"])


def test_of_splits_measured_once_each_the_better_by_a_hair_is_not_sure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody knows how 2:6 and 3:5 would repeat: the rival is named, unless they differ by more than the laws miss."""
    db, path = ["--db", f"sqlite:///{tmp_path}/c.db"], tmp_path / "means.csv"
    header, *rows = DATA.read_text().splitlines()
    kept = [row for row in rows if row.split(",")[1] in "236"]
    path.write_text("\n".join([header, *kept]).replace("140.45,30.129", "140.45,27.9") + "\n")
    run(["runs", "import", str(path), *IMPORT[3:], *db], capsys)
    code, said, _ = run(["advise", "--concurrency", "64", "--slo", "tpot<50ms", *db], capsys)
    rival = said["runner_up"]
    assert (code, said["prefill"], rival["prefill"], rival["measured"]) == (0, 2, 3, True)
    assert not said["sure"]
    assert any(line.startswith("3:5 may serve as much: measure both") for line in said["warnings"])
    once = {"low": math.nan, "high": math.nan}
    best, near, far = (
        Candidate(Fleet(1, 1), {"throughput_per_s": {"value": value} | once}, True, True, "") for value in (10, 9, 7)
    )
    assert [_close(best, other, 0.112) for other in (near, far)] == [True, False]


ROW = {
    "concurrency": 8,
    "prefill": 1,
    "decode": 1,
    "prompt_tokens": 100,
    "output_tokens": 10,
    "ttft_s": 0.1,
    "tpot_s": 0.01,
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"concurrency": 0}, "concurrency must be above 0"),
        ({"tpot_s": "fast"}, "tpot_s must be a number"),
        ({"ttft_s": None}, "no ttft_s: rename with --map"),
        ({"output_tokens": 0.5}, "output_tokens must be at least 1"),
        ({"prefill": 1.5}, "prefill must be an integer"),
        ({"decode": None}, "prefill without decode"),
        ({"prefill": None, "decode": None}, "give --fleet"),
        ({"prefill": None, "decode": None}, "--fleet 1:1+2 has mixed workers"),
    ],
)
def test_a_bad_row_stores_nothing(
    change: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line that says what is wrong; the good row before it is not stored either."""
    path, db = tmp_path / "x.jsonl", f"sqlite:///{tmp_path}/c.db"
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in (ROW, {k: v for k, v in (ROW | change).items() if v is not None}))
    )
    fleet = ["--fleet", "1:1+2"] if "mixed" in said else []
    code, _, err = run(["runs", "import", str(path), "--aggregate", *fleet, "--db", db], capsys)
    assert code == 1
    assert said in err
    assert len(err.strip().splitlines()) == 1
    with open_store(db) as store:
        assert store.runs() == []


def test_left_out_splits_are_told_from_the_others() -> None:
    """TPOT within a tenth in the median, throughput too; TTFT, which jumps where prefill is full, is said to be far off."""
    names = dict(term.split("=") for term in MAP.split(","))
    means = read_aggregates(DATA, names, "ms")
    points = [Point(one.fleet, (1, 1), ("vllm", "m", ""), one.held) for one in means if one.fleet]
    found = left_out(points)
    for name, bar in (("tpot_s", 0.1), ("throughput_per_s", 0.1)):
        off = [abs(getattr(f, name) / getattr(p.held, name) - 1) for f, p in zip(found, points, strict=True)]
        assert np.median(off) < bar


def test_beside_ordinary_runs_means_are_compared_not_fitted(tmp_path: Path) -> None:
    """The laws that made them agree with the decode step they saw; laws of a slower GPU are named as different."""
    laws = Profile.load("demo")
    with open_store(f"sqlite:///{tmp_path}/c.db") as store:
        means = [Mean(closed_loop(f, 32, laws)[0], f, (None, None), {}) for f in (Fleet(2, 6), Fleet(4, 4))]
        runs = store_aggregates(store, means, name="m")
        assert {run.policy for run in runs} == {CLOSED_LOOP}
        (same,) = beside_means(store, runs, laws)
        (other,) = beside_means(store, runs, replace(laws, c0_s=3 * laws.c0_s))
    assert "2 means of closed loops are not in the laws" in same
    assert "differs" not in same
    assert "Of 2 the TPOT differs" in other
    assert beside_means(store, [], laws) == []
