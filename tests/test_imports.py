"""What other clients measured becomes a run: times, counts and ends as they wrote them."""

from __future__ import annotations

import csv
import json
import math
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from advisor.cli import main
from advisor.report.digest import read as digest
from advisor.report.sections import lag
from loadgen.imports import observations, read
from traces.errors import InputError
from traces.measures import Slo
from traces.records import Observations
from traces.store import open_store

DATA = Path(__file__).parent / "data" / "results"

VLLM: dict[str, Any] = {
    "model_id": "m",
    "request_throughput": 1.0,
    "start_times": [105.0, 100.0, 102.0],
    "ttfts": [0.2, 0.1, 0.0],
    "itls": [[0.01, 0.03], [0.02, 0.02, 0.02], []],
    "input_lens": [30, 10, 20],
    "output_lens": [3, 4, 0],
    "generated_texts": ["secret", "secret", ""],
    "errors": ["", "", "Internal Server Error"],
}
"""Keys and units of vLLM 0.33's ``benchmarks/serve.py``; no real result was at hand."""

GUIDE = {"request_start": 1.0, "first_token_iteration": 1.5, "last_token_iteration": 2.0}
AIPERF = {
    "metadata": {"request_start_ns": 1_000_000_000},
    "metrics": {"time_to_first_token": {"value": 5.0}, "request_latency": {"value": 9.0}},
}


def test_aiperf_rows_are_what_its_own_figures_say() -> None:
    """TTFT, latency and lengths of every request equal the metrics that aiperf derived itself."""
    (one,) = read(DATA / "aiperf.jsonl")
    rows, zero = observations(one)
    records = [json.loads(line) for line in (DATA / "aiperf.jsonl").read_text().splitlines()]
    records.sort(key=lambda r: r["metadata"]["credit_issued_ns"])
    assert one.client == "aiperf"
    assert zero == records[0]["metadata"]["credit_issued_ns"] / 1e9
    assert len(rows) == 20
    for k, record in enumerate(records):
        metrics = {name: held["value"] for name, held in record["metrics"].items()}
        assert rows.ttft_sent_s[k] * 1e3 == pytest.approx(metrics["time_to_first_token"], abs=1e-3)
        assert rows.e2e_sent_s[k] * 1e3 == pytest.approx(metrics["request_latency"], abs=1e-3)
        assert rows.tpot_s[k] * 1e3 == pytest.approx(metrics["inter_token_latency"], abs=1e-3)
        assert rows.prompt_tokens[k] == metrics["usage_prompt_tokens"]
        assert rows.output_tokens[k] == metrics["usage_completion_tokens"]
    assert 0 < float(rows.lag_s.max()) < 0.1
    assert not one.due_known  # the credit is when aiperf's timer let a request go: how late that was, it does not say


def test_guidellm_rows_are_what_its_own_figures_say() -> None:
    """The same of guidellm; due is its targeted start."""
    (one,) = read(DATA / "guidellm.json")
    rows, _ = observations(one)
    report = json.loads((DATA / "guidellm.json").read_text())
    records = report["benchmarks"][0]["requests"]["successful"]
    records.sort(key=lambda r: r["info"]["timings"]["targeted_start"])
    assert (one.model, one.endpoint, one.due_known) == ("demo", "http://127.0.0.1:8431", True)
    for k, record in enumerate(records):
        assert rows.ttft_sent_s[k] * 1e3 == pytest.approx(record["time_to_first_token_ms"], abs=1e-2)
        assert rows.tpot_s[k] * 1e3 == pytest.approx(record["inter_token_latency_ms"], abs=1e-2)
        assert (rows.prompt_tokens[k], rows.output_tokens[k]) == (record["prompt_tokens"], record["output_tokens"])


def test_vllm_columns_become_rows(tmp_path: Path) -> None:
    """Start times on one clock, TTFT, gaps; a failed request has an end but no tokens; texts are passed over."""
    path = tmp_path / "v.json"
    path.write_text(json.dumps(VLLM, indent=1))
    (one,) = read(path)
    rows, _ = observations(one)
    assert not one.due_known
    assert rows.sent_s.tolist() == [0.0, 2.0, 5.0]
    assert rows.status.tolist() == ["ok", "failed", "ok"]
    assert rows.detail.tolist()[1] == "Internal Server Error"
    np.testing.assert_allclose(rows.ttft_s[[0, 2]], [0.1, 0.2])
    np.testing.assert_allclose(rows.last_token_s[[0, 2]], [0.16, 5.24])
    np.testing.assert_allclose(rows.max_gap_s[[0, 2]], [0.02, 0.03])
    assert rows.output_tokens.tolist() == [4, 0, 3]
    assert math.isnan(rows.first_token_s[1])
    path.write_text(json.dumps(VLLM) + "\n" + json.dumps(VLLM | {"model_id": "n"}))  # --append-result
    assert [(run.model, len(run.rows)) for run in read(path)] == [("m", 3), ("n", 3)]


@pytest.fixture
def exported(tmp_path: Path) -> tuple[str, Path, Observations]:
    """(database, CSV, rows) of an imported run that was exported again."""
    url = f"sqlite:///{tmp_path}/a.db"
    assert main(["runs", "import", str(DATA / "aiperf.jsonl"), "--fleet", "2:2", "--db", url]) == 0
    out = tmp_path / "run.csv"
    assert main(["runs", "export", "1", "--out", str(out), "--db", url]) == 0
    with open_store(url) as store:
        return url, out, store.observations(1)


def test_what_is_exported_can_be_imported(exported: tuple[str, Path, Observations]) -> None:
    """``runs export`` writes what ``runs import`` reads, times and ends the same; a row without usage keeps what it asked for."""
    _, out, rows = exported
    with out.open(newline="") as file:
        assert {row["cached_tokens"] for row in csv.DictReader(file)} == {""}  # what did not come is empty, not -1
    back, _ = observations(read(out)[0])
    for name in ("due_s", "sent_s", "first_token_s", "last_token_s", "prompt_tokens", "output_tokens", "status"):
        assert getattr(back, name).tolist() == getattr(rows, name).tolist(), name
    with out.open(newline="") as file:
        records = list(csv.DictReader(file))
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(r | {"prompt_tokens": "", "output_tokens": ""} for r in records)
    bare, _ = observations(read(out)[0])
    assert set(bare.output_tokens.tolist()) == {-1}
    assert bare.tokens.tolist() == rows.requested_tokens.tolist()
    assert bare.prompt_lengths.tolist() == rows.requested_prompt_tokens.tolist()


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_any_rows_by_a_map(kind: str, exported: tuple[str, Path, Observations], tmp_path: Path) -> None:
    """Other names and milliseconds, as CSV and as nested JSONL, are the same run."""
    _, out, rows = exported
    with out.open(newline="") as file:
        records: list[dict[str, Any]] = [
            {
                "at": {"start": float(r["sent_s"]) * 1e3, "first": float(r["first_token_s"]) * 1e3},
                "end": float(r["last_token_s"]) * 1e3,
                "n_in": int(r["prompt_tokens"]),
                "n_out": int(r["output_tokens"]),
                "said": "one\u2028line\x85of JSON",
            }
            for r in csv.DictReader(file)
        ]
    path = tmp_path / f"rows.{kind}"
    records[0]["said"] = "x" * 200_000  # more than the csv module takes for a field unless it is told
    limit = csv.field_size_limit()
    if kind == "jsonl":
        failed = {"at": {"start": records[0]["at"]["start"] - 1, "first": None}, "end": None, "n_in": None}
        records.insert(0, failed)  # the columns are not told by the first record
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
        names = {"sent_s": "at.start", "first_token_s": "at.first"}
    else:
        path.write_text("s,f,end,n_in,n_out,said\n" + "".join(
            f"{r['at']['start']},{r['at']['first']},{r['end']},{r['n_in']},{r['n_out']},{r['said']}\n" for r in records
        ))  # fmt: skip
        names = {"sent_s": "s", "first_token_s": "f"}
    names |= {"last_token_s": "end", "prompt_tokens": "n_in", "output_tokens": "n_out"}
    (one,) = read(path, names, "ms")
    back, _ = observations(one)
    assert not one.due_known
    assert csv.field_size_limit() == limit
    if kind == "jsonl":
        assert back.status.tolist() == ["failed"] + ["ok"] * len(rows)
        back = back.take(back.ok)
    np.testing.assert_allclose(back.ttft_sent_s, rows.ttft_sent_s, atol=1e-9)
    assert back.output_tokens.tolist() == rows.output_tokens.tolist()


def test_a_report_of_dynamos_simulator_by_a_map(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """TTFT, TPOT and end to end of every request equal what dynamo.replay derived itself; the run is valid."""
    file, url = DATA / "dynamo_replay.jsonl", f"sqlite:///{tmp_path}/a.db"
    names = (
        "due_s=arrival_time_ms,sent_s=arrival_time_ms,first_token_s=first_token_ms,last_token_s=last_token_ms,"
        "prompt_tokens=input_length,output_tokens=output_length,status=terminal_status"
    )
    command = [
        "runs",
        "import",
        str(file),
        "--fleet",
        "1:2",
        "--map",
        names,
        "--time-unit",
        "ms",
        "--db",
        url,
        "--json",
    ]
    assert main(command) == 0
    (found,) = json.loads(capsys.readouterr().out)["runs"]
    assert found["verdict"] == "valid"
    assert (
        main([*command[:-1], "--map", names.replace("sent_s=arrival_time_ms,", ""), "--group", "other", "--json"]) == 0
    )
    (late,) = json.loads(capsys.readouterr().out)["runs"]  # a client of whom it is not known when it sent
    assert (late["verdict"], late["lag_ms"]["p99"]) == ("degraded", None)
    assert "does not say when requests were sent" in late["reason"]
    shown = []
    for more in ([], ["--json"]):
        assert main(["runs", "show", str(late["run"]), "--db", url, *more]) == 0
        shown.append(capsys.readouterr().out)
    assert re.findall(r"send lag .*", shown[0]) == [
        *(f"send lag p50 -  p99 -  max - ms{end}" for end in (" -> degraded", "")),
        f"send lag p99 over time, 12 equal stretches: {', '.join('-' * 12)} ms",
    ]
    told = json.loads(shown[1])
    every = [held["p99_ms"] for held in (*told["lag_by_worker"].values(), *told["lag_over_time"])]
    assert every == [None] * 13
    with open_store(url) as store:
        both = [digest(store, run, Slo()) for run in store.runs()]
    drawn = [[mark.name for mark in plot.marks] if (plot := lag([one], Slo()).plot) else [] for one in both]
    assert drawn == [[both[0].name], []]
    records = [json.loads(line) for line in file.read_text().splitlines()]
    records.sort(key=lambda r: r["arrival_time_ms"])
    with open_store(url) as store:
        rows = store.observations(found["run"])
    assert rows.ok.all()
    for ours, theirs in (("ttft_s", "ttft_ms"), ("tpot_s", "itl_ms"), ("e2e_s", "e2e_latency_ms")):
        np.testing.assert_allclose(getattr(rows, ours) * 1e3, [r[theirs] for r in records], atol=2e-3)
    assert rows.output_tokens.tolist() == [r["requested_output_length"] for r in records]


def test_the_verb_stores_says_and_repeats_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One run a benchmark with the fleet that was named; again is a no-op; without due times the run is degraded."""
    url = f"sqlite:///{tmp_path}/a.db"
    vllm = tmp_path / "v.json"
    vllm.write_text(json.dumps(VLLM))
    command = ["runs", "import", str(DATA / "guidellm.json"), str(vllm), "--fleet", "3:5", "--db", url, "--json"]
    for already in (False, True):
        assert main([*command, "--slo", "ttft<0.5s tpot<50ms"]) == 0
        found = json.loads(capsys.readouterr().out)["runs"]
        assert [(r["run"], r["client"], r["already"], r["verdict"]) for r in found] == [
            (1, "guidellm", already, "valid"),
            (2, "vllm bench", already, "degraded"),
        ]
    assert found[0]["fleet"] == {"prefill": 3, "decode": 5}
    assert "its own lateness is not known" in found[1]["reason"]
    with open_store(url) as store:
        assert len(store.runs()) == 2
        assert "secret" not in json.dumps([str(store.observations(i).detail.tolist()) for i in (1, 2)])


def test_two_fleets_that_were_asked_the_same_are_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one group, under one name, at the same times: the second's rows are stored. The same rows are of one fleet alone."""
    head = "due_s,sent_s,first_token_s,last_token_s,prompt_tokens,output_tokens\n"
    paths = [tmp_path / f"{k}" / "rows.csv" for k in range(2)]
    for k, path in enumerate(paths):
        path.parent.mkdir()
        path.write_text(head + "".join(f"{t},{t},{t + 0.1 + k},{t + 0.2 + k},10,5\n" for t in range(3)))
    command = ["runs", "import", "--group", "g", "--db", f"sqlite:///{tmp_path}/a.db", "--json", "--fleet"]
    for _ in range(2):
        for k, (path, fleet) in enumerate(zip(paths, ("3:5", "4:4"), strict=True)):
            assert main([*command, fleet, str(path)]) == 0
            (run,) = json.loads(capsys.readouterr().out)["runs"]
            assert (run["run"], run["fleet"]["prefill"]) == (k + 1, 3 + k)
            assert run["ttft_ms"]["p50"] == pytest.approx(100 + 1000 * k)
    assert main([*command, "5:3", str(paths[0])]) == 1
    assert "the same rows are run 1 already, as measured on 3:5 (got --fleet 5:3)" in capsys.readouterr().err
    # Nor does a database that took them for another fleet's give that for the one that is loaded into it.
    there, out = f"sqlite:///{tmp_path}/b.db", str(tmp_path / "out")
    assert main([*command[:4], "--db", there, "--fleet", "5:3", str(paths[0])]) == 0
    assert main(["runs", "dump", "1", "--out", out, "--db", f"sqlite:///{tmp_path}/a.db"]) == 0
    assert main(["runs", "load", out, "--db", there]) == 0
    with open_store(there) as store:
        assert [str(run.fleet) for run in store.runs()] == ["5:3", "3:5"]


def test_an_import_that_was_broken_off_is_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of one file there is one run, as of two imports at once: the second finds what the first began."""
    path, file = tmp_path / "rows.csv", tmp_path / "a.db"
    head = "due_s,sent_s,first_token_s,last_token_s,prompt_tokens,output_tokens\n"
    path.write_text(head + "".join(f"{t},{t},{t + 0.1},{t + 0.2},10,5\n" for t in range(3)))
    command = ["runs", "import", str(path), "--fleet", "3:5", "--db", f"sqlite:///{file}"]
    open_store(f"sqlite:///{file}").close()
    with closing(sqlite3.connect(file)) as other:
        other.execute("CREATE TRIGGER stop BEFORE UPDATE ON runs BEGIN SELECT RAISE(ABORT, 'no end'); END")
        other.commit()
        assert main(command) == 1
        assert "no end" in capsys.readouterr().err
        other.execute("DROP TRIGGER stop")
        other.commit()
    assert main(command) == 0
    assert "3 of 3 ok, stored as run 1" in capsys.readouterr().out
    assert main(command) == 0
    assert "already stored as run 1" in capsys.readouterr().out
    with open_store(f"sqlite:///{file}") as store:
        assert [(run.id, run.ended) for run in store.runs()] == [(1, True)]
        assert len(store.observations(1)) == 3


ROWS = "sent_s,first_token_s,last_token_s,prompt_tokens,output_tokens,status\n"


def test_every_word_for_an_end_is_known(tmp_path: Path) -> None:
    """Also as pandas writes a column with a gap; one that is not known is not taken for a failure."""
    path = tmp_path / "r.csv"
    words = {
        "200.0": "ok",
        "succeeded": "ok",
        "": "ok",
        "500": "failed",
        "Error": "failed",
        "0.0": "failed",
        "unsent": "unsent",
    }
    path.write_text(ROWS + "".join(f"1,2,3,4,5,{word}\n" for word in words))
    assert [row.status for row in read(path)[0].rows] == list(words.values())


def test_a_request_without_a_token_failed_where_others_have_some(tmp_path: Path) -> None:
    """Of aiperf and guidellm alike."""
    path = tmp_path / "r.json"
    first = (DATA / "aiperf.jsonl").read_text().splitlines()[0]
    path.write_text(first + "\n" + json.dumps(AIPERF | {"metrics": {"request_latency": {"value": 9.0}}}))
    silent = {"info": {"timings": GUIDE | {"first_token_iteration": None}}, "prompt_tokens": 5, "output_tokens": 2}
    requests = {"successful": [silent, silent | {"info": {"timings": GUIDE}}]}
    guide = tmp_path / "g.json"
    guide.write_text(json.dumps({"benchmarks": [{"requests": requests}]}))
    (other,) = read(guide)
    assert not other.due_known  # no targeted_start
    for one in (read(path)[0], other):
        assert sorted((row.status, row.detail) for row in one.rows) == [("failed", "no first token"), ("ok", "")]


@pytest.mark.parametrize(
    ("text", "how", "words"),
    [
        # durations for instants, two units, an end before its beginning
        (
            ROWS + "1795481904,0.2,0.9,4,5,ok\n",
            [],
            "line 2: first_token_s (0.2) is before the request was due or sent (1795481904): times are",
        ),
        (ROWS + "1,2,3,4,5,ok\n1,2,1.5,4,5,ok\n", [], "line 3: last_token_s (1.5) is before first_token_s (2)"),
        (
            ROWS.replace("sent_s", "due_s") + "3,2,4,4,5,ok\n",
            [],
            "line 2: first_token_s (2) is before the request was due",
        ),
        (ROWS + "1,2,3,4,5,stop\n", [], "line 2: status must be an HTTP status or one of ok, success"),
        (json.dumps(AIPERF | {"metrics": {}}), [], "no request has a first token: measure answers that are streamed"),
        (
            json.dumps({"benchmarks": [{"requests": {"successful": [{"info": {"timings": {"request_start": 1.0}}}]}}]}),
            [],
            "no request has a first token",
        ),
        (json.dumps(AIPERF | {"metadata": {}}), [], "line 1: says neither when it was due nor when it was sent"),
        (
            json.dumps({"benchmarks": [{"requests": {"incomplete": [{"info": {"timings": {}}}]}}]}),
            [],
            "incomplete request 1: says neither when it was due",
        ),
        (json.dumps(VLLM) + "\n" + json.dumps(VLLM | {"ttfts": [1.0]}), [], "line 2: its columns"),
        ("", [], "the file is empty"),
        ("due_s,sent_s\n1,2\n", [], "no column first_token_s, last_token_s, prompt_tokens, output_tokens"),
        ("first_token_s,last_token_s,prompt_tokens,output_tokens\n1,2,3,4\n", [], "no column due_s or sent_s"),
        (
            "due_s,first_token_s,last_token_s,prompt_tokens,output_tokens\n1,2,3,4,5\nx,2,3,4,5\n",
            [],
            "line 3: due_s must be a number (got 'x')",
        ),
        *(
            (
                f"due_s,first_token_s,last_token_s,prompt_tokens,output_tokens\n1,2,3,4,5\n1,2,3,{counts}\n",
                [],
                f"line 3: an ok request needs {name} of 1 or more",
            )
            for counts, name in (
                ("4,", "output_tokens"),
                ("4,-5", "output_tokens"),
                ("4,0", "output_tokens"),
                ("word,5", "prompt_tokens"),
            )
        ),
        (
            json.dumps(VLLM | {"input_lens": [0, 10, 20]}),
            [],
            "request 1: an ok request needs prompt_tokens of 1 or more",
        ),
        (
            json.dumps(
                {"benchmarks": [{"requests": {"successful": [{"info": {"timings": GUIDE}, "prompt_tokens": 5}]}}]}
            ),
            [],
            "request 1: an ok request needs output_tokens",
        ),
        (json.dumps(AIPERF), [], "line 1: an ok request needs prompt_tokens"),
        ("due_s,first_token_s,last_token_s,prompt_tokens,output_tokens\n", [], "holds a run without a request"),
        ('{"a": 1}\n', [], "no column"),
        ('{"a": \n', [], "not one JSON object"),
        (json.dumps(VLLM | {"start_times": None}), [], "no start_times"),
        (json.dumps(VLLM | {"ttfts": [1.0]}), [], "equally long"),
        (json.dumps({"benchmarks": [{"requests": None}]}), [], "holds no requests"),
        (json.dumps({"request_throughput": 1.0}), [], "--save-detailed"),
        ("due_s\n", ["--map", "begin=x"], "--map takes due_s=.."),
    ],
)
def test_a_result_that_cannot_be_used_is_one_line(
    text: str, how: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused with its line; nothing is stored, not of a good file beside it either."""
    path, url = tmp_path / "r.txt", f"sqlite:///{tmp_path}/a.db"
    path.write_text(text)
    assert main(["runs", "import", str(DATA / "aiperf.jsonl"), str(path), "--fleet", "2:2", "--db", url, *how]) == 1
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert not (tmp_path / "a.db").exists()


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    """A folder and a name that is not there."""
    for path in (tmp_path, tmp_path / "no.json"):
        with pytest.raises(InputError, match="is no file"):
            read(path)
