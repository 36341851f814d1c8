"""The report: one file, true to its JSON, safe to open, drawn in a real browser, readable by ear and on a phone."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

from advisor import demo
from advisor.advise import load
from advisor.cli import main, steelyard
from advisor.cli.replay_verbs import schedule_of
from advisor.features import RunData
from advisor.recommend import recommend
from advisor.report import assemble, text_of, write_report
from advisor.report import pdf as print_pdf
from advisor.report.digest import BINS, POINTS, QUANTILES, _counted, _readings, digest, traffic, traffic_of
from advisor.report.draw import NARROW, WIDE, Axis, svg
from advisor.report.markdown import escape
from advisor.report.page import asset, policy
from advisor.report.parts import Mark, Plot, Report, Rule
from advisor.report.pdf import BROWSERS, browser
from advisor.report.reproduce import advise_command, online_command, replay_command
from advisor.report.sections import (
    _alike,
    _rests,
    _studied,
    distributions,
    lag,
    over_time,
    run_facts,
    runs_table,
    seconds,
    traffic_sections,
)
from advisor.study import check_rate, quiet
from loadgen.cluster import Profile, simulate
from tests.test_advise import SLO, busy_rate, lognormal, three_runs
from tests.test_features import run_of
from traces.aggregate import Bins
from traces.errors import InputError
from traces.ingest import ingest
from traces.measures import Slo, summarise
from traces.records import Fleet, FleetChange, Observations, Sample, Schedule
from traces.shape import head, to_rate
from traces.shipped import shipped
from traces.store import Store, open_store

HOSTILE = "</script><script>window.pwned=1</script><img src=x onerror=window.pwned=1>"


def readings(prefill: int, decode: int, until: int = 40) -> list[Sample]:
    """One a second and worker; half-way a prefill worker becomes a decode worker."""
    found = []
    for t in range(until):
        for w in range(prefill + decode):
            role = "prefill" if w < prefill - (t >= until // 2) else "decode"
            waiting = float(t % 7) * (role == "prefill")
            found.append(Sample(float(t), f"w{w}", role, waiting, running_requests=2.0, busy_s_total=0.25 * t))
    return found


def stored(store: Store, data: list[RunData], trace: str) -> list[int]:
    """The runs, with readings and a role change whose reason is hostile, as rows of a database."""
    ids = []
    for one in data:
        run = replace(one.run, trace=trace, slo=str(SLO), lag_p50_ms=0.5, lag_p99_ms=2.0, lag_max_ms=3.0)
        run = replace(run, counts={"ok": len(one.observations)}, ended=False, id=0)
        begun = store.begin_run(run)
        store.add_observations(begun.id, one.observations)
        store.add_samples(begun.id, readings(one.prefill, one.decode))
        store.end_run(replace(run, id=begun.id))
        ids.append(begun.id)
    store.add_fleet_change(ids[-1], FleetChange(20.0, 21.5, Fleet(7, 1), Fleet(6, 2), HOSTILE))
    return ids


def add_trace(store: Store, schedule: Schedule, name: str) -> None:
    """A schedule as a stored trace."""
    n = len(schedule)
    batch = {
        "seq": list(range(n)),
        "source_line": list(range(1, n + 1)),
        "arrival_us": np.rint(schedule.due_s * 1e6).astype(int).tolist(),
        "prompt_tokens": schedule.prompt_tokens.tolist(),
        "output_tokens": schedule.output_tokens.tolist(),
        "status": [0] * n,
    }
    summary = lambda: ({"rows_kept": n}, None, None, None)  # noqa: E731
    store.add_trace(name=name, format="csv", sha256="0" * 64, files=[], options={}, batches=[batch], summary=summary)


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database with three runs of a hostile trace, the trace itself, and one answer about it."""
    url = f"sqlite:///{tmp_path_factory.mktemp('db') / 'steelyard.db'}"
    profile = Profile.load("demo")
    rate = busy_rate(profile)
    with open_store(url) as store:
        add_trace(store, lognormal(200, rate, 5), HOSTILE)
        ids = stored(store, three_runs(profile, rate), HOSTILE)
        answer = recommend(
            load(store, store.runs(ids=ids)), store.schedule(HOSTILE), gpus=8, slo=SLO, draws=4, attainment=0.3
        )
        store.add_recommendation("static", answer.as_json() | {"version": "0.1.0"}, ids, answer.data_hash, 0)
    return url


@pytest.fixture(scope="module")
def folder(db: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stored answer's report in every text format."""
    out = tmp_path_factory.mktemp("report")
    for form in ("html", "md", "json"):
        where = str(out / f"report.{form}")
        code = main(["report", "--recommendation", "latest", "--format", form, "--out", where, "--db", db])
        assert code == 0
    return out


@pytest.fixture(scope="module")
def page(folder: Path) -> Path:
    return folder / "report.html"


# --- what stands in it ----------------------------------------------------------------------------------------------


def test_the_page_is_one_small_file(page: Path) -> None:
    """The page needs nothing beside it, is below 6 MB, and the figures of ten runs would be too."""
    text = page.read_text(encoding="utf-8")
    assert len(text.encode()) < 1_000_000
    assert not re.search(r"<(?:script|link|img|iframe|object|embed)[^>]+(?:src|href)=(?![\"']?data:)", text)
    assert "Content-Security-Policy" in text


def test_the_first_sentence_is_the_jsons(page: Path, db: str) -> None:
    """What the page says first is what was advised and stored, and the JSON stands in the page."""
    text = page.read_text(encoding="utf-8")
    held = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])  # type: ignore[index]
    with open_store(db) as store:
        answer = store.recommendation(kind="static")
    assert held["sentence"] == answer["sentence"]
    assert (held["prefill"], held["decode"]) == (answer["prefill"], answer["decode"])
    assert answer["sentence"].split(";")[0] in text


def test_every_question_of_the_first_screen_and_every_section_is_answered(folder: Path) -> None:
    """The four cards and all kinds of evidence stand in the report, each with words; every plot has data."""
    held = json.loads((folder / "report.json").read_text())
    assert [c["title"] for c in held["cards"]] == [
        "How sure",
        "What it rests on",
        "What to do next",
        "What was not measured",
    ]
    assert all(c["lines"] for c in held["cards"])
    wanted = (
        "goodput p99 ttft tpot e2e queues busy roles rate lengths capacity law-tpot residual-tpot law-ttft residual-ttft laws "
        "held lag strategies whatif reproduce"
    )
    assert [key for key in held["sections"] if key != "rules"] == wanted.split()
    for key, section in held["sections"].items():
        assert section["text"], key
        for mark in section.get("plot", {}).get("marks", ()):
            assert any(v is not None for v in mark["y"]), (key, mark["name"])
    assert [c["reason"] for c in held["sections"]["roles"]["table"]] == [HOSTILE]
    assert held["sections"]["strategies"]["code"][0]["text"].startswith("steelyard strategies --trace")


def test_markdown_says_the_same_and_nothing_in_it_is_markup(folder: Path) -> None:
    """The Markdown begins with the sentence; hostile names are text there too."""
    text = (folder / "report.md").read_text(encoding="utf-8")
    held = json.loads((folder / "report.json").read_text())
    assert text.startswith(f"# {escape(held['sentence'])}\n")
    assert "## How to get this again" in text
    outside_code = re.sub(r"^```+\n.*?\n```+$", "", text, flags=re.S | re.M)
    assert "<script" not in outside_code.replace("\\<", "")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a|b", "a\\|b"),  # would end a cell
        ("# x\n# y", "\\# x \\# y"),  # would be headings
        ("[a](http://b)", "\\[a\\]\\(http://b\\)"),  # would be a link
        ("<b>", "\\<b\\>"),
    ],
)
def test_markdown_is_escaped(text: str, shown: str) -> None:
    """Nothing from outside makes structure."""
    assert escape(text) == shown


def test_runs_that_cannot_answer_are_reported_with_the_reason(db: str, tmp_path: Path, capsys: Any) -> None:
    """One run at low load: exit 5, and a report that says why, shows the run and names what to measure next."""
    out = tmp_path / "one.json"
    code = main(["report", "--run", "1", "--gpus", "8", "--format", "json", "--out", str(out), "--db", db])
    assert code == 5
    held = json.loads(out.read_text())
    assert held["sentence"].startswith("No split can be recommended: ")
    assert "Measure next: steelyard replay" in held["sentence"]
    assert {"ttft", "queues", "lag", "reproduce"} <= set(held["sections"])
    assert "goodput" not in held["sections"]
    assert "Written: " in capsys.readouterr().out


def test_a_stored_answer_is_named_or_the_known_ones_are(db: str, capsys: Any) -> None:
    """A number that is not there is one line with those that are; options that ask anew do not mix with a stored answer."""
    assert main(["report", "--recommendation", "77", "--db", db]) == 1
    assert "Known: 1." in capsys.readouterr().err
    assert main(["report", "--recommendation", "1", "--gpus", "4", "--db", db]) == 2


def test_an_answer_is_found_behind_a_hundred_newer_ones(tmp_path: Path, capsys: Any) -> None:
    """By its number, and as the latest of its kind; one of another kind has no report, and is said to be there."""
    url, out = f"sqlite:///{tmp_path / 'runs.db'}", tmp_path / "report.json"
    split = {"prefill": 2, "decode": 6}
    answer = {"sentence": "Run 2:6.", "gpus": 8, **split, "candidates": [split]}
    with open_store(url) as store:
        for kind in ("static", *["strategies"] * 100):
            store.add_recommendation(kind, answer | {"source": "another trace"}, [], "", 0)
    for number, code in (("1", 0), ("latest", 0), ("2", 1), ("102", 1), ("9" * 30, 1)):
        words = ["report", "--recommendation", number, "--format", "json", "--out", str(out), "--db", url]
        assert main(words) == code, number
    err = capsys.readouterr().err
    assert "recommendation 2 answers another question (strategies)" in err
    assert err.count("Known: 1. Make one") == 2


def test_an_answer_of_an_older_version_still_makes_a_report(db: str) -> None:
    """What an older answer does not hold is left out; nothing breaks."""
    profile = Profile.load("demo")
    data = three_runs(profile, busy_rate(profile))
    old = {"goodput_per_s": {"value": 5.0, "low": None, "high": None}}
    answer = {
        "sentence": "Run 2:6.",
        "prefill": 2,
        "decode": 6,
        "gpus": 8,
        "candidates": [{"prefill": 2, "decode": 6} | old],
    }
    report = assemble(answer, [digest(one, Slo()) for one in data])
    assert "Run 2:6." in text_of(report, "html")
    assert text_of(report, "md")
    assert json.loads(text_of(report, "json"))["recommendation"]["decode"] == 6


def test_what_an_answer_weighed_stands_in_its_report() -> None:
    """Strategies, usual rules, regret, break-even and cost of an answer are shown where it has them."""
    figure = {"value": 5.0, "low": 4.0, "high": 6.0}
    arm = {
        "strategy": "online",
        "fleet": "2:6",
        "goodput_per_s": 5.5,
        "regret": 0.02,
        "switches_per_h": 12.0,
        "note": HOSTILE,
    }
    answer = {
        "sentence": "Run 2:6.", "prefill": 2, "decode": 6, "gpus": 8, "strategy": "online", "why": "the mix turns",
        "trace": "mine",
        "candidates": [
            {"prefill": 2, "decode": 6, "goodput_per_s": figure, "constraints_kept": {"value": 1.0}},
            {"prefill": 3, "decode": 5, "goodput_per_s": {**figure, "value": 5.5}, "constraints_kept": {"value": 0.5}},
        ],
        "runner_up": {"prefill": 3, "decode": 5, "goodput_per_s": figure},
        "regret": {"value": 0.004, "low": 0.0, "high": 0.02}, "sure": True,
        "baselines": [{"name": "half and half", "prefill": 4, "decode": 4, "regret": 0.3}],
        "break_even": {"prompt_factor": 1.8, "rate_factor": None},
        "strategies": [
            arm, arm | {"strategy": "static", "goodput_per_s": None},
            arm | {"strategy": "offline", "goodput_per_s": 99.0},
        ],
        "windows": {"mix_lasts_s": 300.0, "move_s": 4.0},
        "thresholds": {"rule": "backlog", "more_s": 0.5, "laws": "x" * 500},
        "cost": {"usd_per_hour": 16.0, "usd_per_million": figure},
        "slo": str(SLO), "profile": Profile.load("demo").to_toml(),
    }  # fmt: skip
    report = assemble(answer, [], schedule=lognormal(150, 4, 1), traces={})
    held = json.loads(text_of(report, "json"))
    sure = " ".join(held["cards"][0]["lines"])
    assert "loses 0.4 % of the best goodput on average, 2.0 % at worst in 20. That is little enough" in sure
    assert "more_s 0.5): steelyard replay TRACE --endpoint" in " ".join(
        held["cards"][2]["lines"]
    )  # its own is not stored
    assert [row["lost"] for row in held["sections"]["rules"]["table"]] == ["30.0 %", "0.0 %"]  # 3:5 misses a constraint
    assert "The mix turns." in held["sections"]["chosen"]["text"]
    assert held["sections"]["chosen"]["table"][2]["goodput, req/s"] == "99 (throughput)"
    (chosen,) = (one for one in report.sections if one.key == "chosen")
    assert chosen.plot is not None
    assert not any(99.0 in mark.y for mark in chosen.plot.marks)  # no bar of a throughput beside those of goodput
    assert "overtakes at prompts 1.8 times as long" in held["sections"]["whatif"]["text"]
    assert held["sections"]["cost"]["table"][1]["value"] == "5 [4, 6]"
    assert HOSTILE not in text_of(report, "html")


def test_a_report_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    """A place that cannot be written is one line, and no half page."""
    blocked = tmp_path / "file"
    blocked.write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        write_report(blocked / "report.html", "page")
    assert list(tmp_path.iterdir()) == [blocked]


def test_the_command_of_a_run_asks_the_same_again() -> None:
    """Fleet, requests, rate, SLO and seed stand in it; what no option says stands behind a #."""
    run = replace(
        run_of(Fleet(3, 5)),
        trace="my trace",
        changes=("first 40 of 100 requests", "rate x0.333333", "ramp over 5 s", "prefixes shared", "clock x2"),
        warmup_s=7.5,
        rate_factor=1 / 3,
        slo="ttft<0.5s",
        seed=7,
    )
    assert replay_command(run) == (
        "steelyard replay 'my trace' --endpoint URL --fleet 3:5 --requests 40 --ramp 5 "
        "--prefixes --rate-factor 0.3333333333333333 --warmup 2.5 --slo 'ttft<0.5s' --workers 1 --seed 7  # clock x2"
    )


def parsed(line: str) -> dict[str, Any]:
    """The options of a printed command, as the tool itself reads them from a shell's words."""
    words = shlex.split(line, comments=True)[1:]
    with click.Context(steelyard, info_name="steelyard") as above:
        command = steelyard.get_command(above, words.pop(0))
        while isinstance(command, click.Group):
            command = command.commands[words.pop(0)]
        assert command is not None
        return command.make_context(command.name, words, parent=above).params


@pytest.mark.parametrize(
    "given",
    [
        "--time-scale 0.5 --rate 7",
        "--requests 80 --rate-factor 3 --warmup 2",
        "--rate 3 --ramp 5 --warmup 1.5",
        "--sessions causal --time-scale 0.3",
        "--slice 10-140 --time-scale 0.3 --thin 0.7 --copies 2 --prompt-scale 0.5 --max-output 60 --requests 70 --seed 3",
    ],
)
def test_the_command_of_a_run_makes_its_schedule_again(given: str, tmp_path: Path) -> None:
    """Not the words alone: what is read from them is the same requests at the same times with the same warm-up."""
    with open_store(f"sqlite:///{tmp_path / 'runs.db'}") as store:
        add_trace(store, lognormal(150, 4, 1), "my trace")
        options = parsed(f"steelyard replay 'my trace' --endpoint URL {given}")
        schedule, factor = schedule_of(store, "my trace", options)
        changes = (*schedule.changes, *(["sessions causal"] if options["sessions"] == "causal" else []))
        warmup_s = options["ramp"] + options["warmup"]
        run = replace(run_of(Fleet(3, 5)), trace="my trace", changes=changes, rate_factor=factor)
        line = replay_command(replace(run, seed=options["seed"], warmup_s=warmup_s), store.url)
        again = parsed(line)
        made, factor_again = schedule_of(store, again["trace"], again)
    assert "#" not in line
    assert made.digest() == schedule.digest()
    assert made.changes == schedule.changes
    assert (factor_again, again["ramp"] + again["warmup"]) == (factor, pytest.approx(warmup_s))
    assert (again["sessions"], again["seed"], again["db"]) == (options["sessions"], options["seed"], store.url)


def test_the_command_of_an_imported_run_imports_it() -> None:
    """No trace of its name is stored, so there is nothing to replay."""
    run = replace(run_of(Fleet(3, 5)), name="my file", trace="my file", changes=("imported from aiperf",), workers=0)
    held = parsed(replay_command(run))
    assert (held["fleet"], held["name"]) == ("3:5", "my file")
    answer = {"gpus": 8, "trace": "my file", "runs": [1]}
    assert parsed(advise_command(answer, {}))["trace"] is None
    assert parsed(advise_command(answer, {"my file": {}}))["trace"] == "my file"
    assert parsed(online_command(answer | {"recommendation": 7}, {}))["trace"] == "TRACE"


def test_the_commands_of_the_demo_ask_its_question(tmp_path: Path) -> None:
    """The sweep, and the advice about a part of the trace at a rate, are about the requests that the demo asked about."""
    with open_store(f"sqlite:///{tmp_path / 'a b.db'}") as store:
        ingest(store, [shipped(demo.TRACE)], name=demo.TRACE)
        wanted = demo.asked_schedule(store)
        held = parsed(demo.sweep_command(store.url))
        assert held["db"] == store.url
        assert schedule_of(store, held["trace"], held)[0].digest() == wanted.digest()
        recorded = head(store.schedule(demo.TRACE), demo.ASKED_REQUESTS)
        for schedule in (wanted, to_rate(recorded, 12)):
            answer = {"trace": demo.TRACE, "schedule_changes": schedule.changes, "rate_per_s": schedule.rate_per_s}
            held = parsed(advise_command(answer))
            again = to_rate(head(store.schedule(held["trace"]), held["requests"]), held["rate"])
            assert again.digest() == schedule.digest()
            held = parsed(
                online_command(answer | {"recommendation": 7}, [demo.TRACE], store.url)
            )  # else a forecast would be left out
            assert schedule_of(store, held["trace"], held)[0].digest() == schedule.digest()
            assert (held["policy"], held["recommendation"], held["db"]) == ("online", 7, store.url)


def test_no_printed_command_names_a_database_without_its_user(
    postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A URL from which a user was taken out opens nothing: STEELYARD_DB, which holds it whole, is left to be heeded."""
    out = tmp_path / "report.json"
    for url, named in ((postgres_url, False), (f"sqlite:///{tmp_path / 'runs.db'}", True)):
        monkeypatch.setenv("STEELYARD_DB", url)
        with open_store(url) as store:
            stored(store, three_runs(Profile.load("demo"), 4.0)[:1], "t")
        for typed in ([], ["--db", url], [f"--db={url}"]):
            words = ["report", "--run", "1", "--gpus", "2", "--format", "json", "--out", str(out), *typed]
            monkeypatch.setattr("sys.argv", ["steelyard", *words])
            assert main(words) in (0, 5)
            code = json.loads(out.read_text())["sections"]["reproduce"]["code"]
            lines = [line for one in code for line in one["text"].split("\n")]
            assert len(lines) > 1
            assert [parsed(line)["db"] for line in lines] == [url] * len(lines)
            assert all((f"--db {url}" in line) == ("--db" in line) == named for line in lines)
    assert "--db" not in demo.sweep_command("")


def test_the_command_of_an_answer_says_what_was_asked() -> None:
    """The GPUs of a worker, the share that must keep the SLO and the fleet in production decide, so they stand in it too."""
    rate = busy_rate(profile := Profile.load("demo"))
    data, asked = three_runs(profile, rate), lognormal(200, rate, 9)
    made = recommend(data, asked, gpus=8, slo=SLO, attainment=0.5, current=Fleet(4, 4), draws=4)
    held = parsed(advise_command(json.loads(json.dumps(made.as_json())), db="sqlite:///other.db"))
    assert held["gpus_per_worker"] == "1,1"
    assert held["attainment"] == 0.5
    assert held["current"] == "4:4"
    assert held["db"] == "sqlite:///other.db"
    assert held["strategy"] == "static"  # which no strategies were asked about
    asked = {"strategy": "online", "deadline_s": 90.5, "gpu_hour_usd": None, "target_rate_per_s": 12.0}
    held = parsed(advise_command(made.as_json() | {"asked": asked}))
    assert {name: held[name] for name in asked} == asked


def test_a_name_with_spaces_is_one_word_of_every_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What an answer, a refusal, a report and an import print can be given to a shell as it stands."""
    name = "a b;c"
    rate = busy_rate(profile := Profile.load("demo"))
    asked = replace(lognormal(200, rate, 9), name=name)
    made = recommend(three_runs(profile, rate), asked, gpus=8, slo=SLO, draws=4)
    assert parsed(made.next_probe["command"])["trace"] == name
    assert parsed(quiet(asked, 8)["command"])["trace"] == name
    burst = replace(asked, due_s=np.floor(asked.due_s / 10) * 10)
    synth, replayed = quiet(burst, 8)["command"].split(" && ")
    assert parsed(synth)["like"] == name
    assert parsed(synth)["name"] == parsed(replayed)["trace"] == f"{name}-spread"
    with pytest.raises(InputError) as at_once:
        check_rate(replace(asked, due_s=np.zeros(len(asked))))
    spread = parsed(str(at_once.value).split("Spread them: ")[1].replace("--rate R", "--rate 3"))
    assert (spread["like"], spread["name"]) == (name, f"{name}-spread")
    (compare,) = _studied(None, {"trace": name}).code
    assert parsed(compare[1])["trace"] == name
    means = tmp_path / "means.csv"
    row = "1,7,8,100,20,2,0.5,0.02,1.5"
    means.write_text(
        f"prefill,decode,concurrency,prompt_tokens,output_tokens,throughput_per_s,ttft_s,tpot_s,e2e_s\n{row}\n"
    )
    url = f"sqlite:///{tmp_path / 'runs.db'}"
    assert main(["runs", "import", str(means), "--aggregate", "--group", "it's; x", "--db", url]) == 0
    line = capsys.readouterr().out.split("Ask: ")[1]
    assert parsed(line)["group"] == "it's; x"


def test_the_command_of_an_answer_is_one_that_the_tool_takes() -> None:
    """Traffic, SLO, runs and seed stand in it, quoted for a shell."""
    answer = {"gpus": 8, "slo": str(SLO), "trace": "a b", "rate_per_s": 8.08, "runs": [1, 2], "seed": 3}
    answer |= {"schedule_changes": ["first 600 of 19366 requests", "rate x2"]}
    assert advise_command(answer) == (
        "steelyard advise --gpus 8 --slo 'ttft<0.5s tpot<50ms' --trace 'a b' --requests 600 --rate 8.08 --run 1 --run 2 --seed 3"
    )


# --- digests and drawings -------------------------------------------------------------------------------------------


def test_a_worker_that_went_away_is_drawn_no_longer() -> None:
    """Neither its place in the role nor its last queue; one that was not read for a while is still there."""
    held = [
        s
        for s in readings(1, 2, 60)
        if not (s.worker == "w2" and s.at_s > 20) and not (s.worker == "w1" and 30 < s.at_s < 39)
    ]
    held = [replace(s, role="prefill" if s.worker == "w0" else "decode", waiting_requests=3.0) for s in held]
    held += [Sample(59.0 + k, "w1", "decode", 3.0, running_requests=2.0) for k in (1, 2)]
    over = _readings(held)
    assert over is not None
    workers, queue = over.values["decode workers"], over.values["decode waiting_requests"]
    assert workers[5:18].tolist() == [2.0] * 13
    assert workers[24:].tolist() == [1.0] * (len(workers) - 24)
    assert queue[24:].tolist() == [3.0] * (len(workers) - 24)


def test_a_digest_does_not_grow_with_the_run() -> None:
    """A hundred times the requests: no more quantiles, bins or points, and the same quantiles to a percent."""
    rng = np.random.default_rng(1)

    def rows(n: int) -> Observations:
        held = Observations.empty(n)
        held.index[:] = np.arange(n)
        held.due_s[:] = held.sent_s[:] = held.dispatch_s[:] = np.arange(n) * 0.01
        held.first_token_s[:] = held.due_s + rng.lognormal(-2, 0.3, n)
        held.last_token_s[:] = held.first_token_s + 0.03 * 9
        for column, value in ((held.prompt_tokens, 500), (held.output_tokens, 10), (held.status, "ok")):
            column[:] = value
        return held

    small, large = (
        digest(RunData(run_of(Fleet(2, 2)), rows(n)), SLO, (), Profile.load("demo")) for n in (3000, 300_000)
    )
    assert len(large.cdf["ttft"]) == len(small.cdf["ttft"]) == len(QUANTILES)
    assert len(large.requests.at_s) <= BINS
    assert large.tpot is not None
    assert len(large.tpot.measured) <= POINTS
    middle = slice(20, -20)
    assert np.allclose(large.cdf["ttft"][middle], small.cdf["ttft"][middle], rtol=0.05)
    assert large.requests.values["rate_per_s"].mean() == pytest.approx(100, rel=0.01)


def answers(n: int) -> Observations:
    """A request every 0.1 s, each answered by ten tokens: the first after 0.1 s, the others 20 ms apart."""
    rows = Observations.empty(n)
    rows.index[:] = np.arange(n)
    rows.due_s[:] = rows.sent_s[:] = rows.dispatch_s[:] = np.arange(n) * 0.1
    rows.first_token_s[:] = rows.due_s + 0.1
    rows.last_token_s[:] = rows.first_token_s + 9 * 0.02
    rows.requested_tokens[:] = rows.output_tokens[:] = 10
    rows.requested_prompt_tokens[:] = rows.prompt_tokens[:] = 100
    rows.status[:] = "ok"
    return rows


def test_a_distributions_quantiles_are_the_runs_own() -> None:
    """Not what lies between two steps of the drawn curve; and n counts the answers that have a figure."""
    rows = answers(100)
    rows.first_token_s[-1] = rows.due_s[-1] + 1.0
    rows.output_tokens[:90] = 1
    one = digest(RunData(run_of(Fleet(2, 2)), rows), SLO)
    ttft, tpot, _ = distributions([one], SLO)
    assert ttft.table is not None
    assert tpot.table is not None
    p99 = seconds(one.summary.ttft_p99_s)
    assert p99 == "109 ms"
    assert ttft.table.rows[0][1:5] == ["100", "100 ms", "100 ms", p99]
    assert f"p99 {p99}" in ttft.text
    assert tpot.table.rows[0][1] == "10"


def test_latency_over_time_is_that_of_answers_that_finished() -> None:
    """A stream that breaks off asked for more tokens than came: its TPOT would be next to nothing. From rows as from counts."""
    rows = answers(100)
    broken = np.arange(100) % 2 == 0
    rows.status[broken], rows.error[broken] = "failed", "reset"
    rows.output_tokens[broken], rows.requested_tokens[broken] = -1, 500
    rows.first_token_s[broken] = rows.due_s[broken] + 5.0
    rows.last_token_s[broken] = rows.first_token_s[broken] + 0.06
    counts = Bins("")
    counts.add(rows)
    for over in (digest(RunData(run_of(Fleet(2, 2)), rows), SLO).requests, _counted(counts)):
        for name, value in (("tpot", 0.02), ("ttft", 0.1)):
            for word in ("p50", "p99"):
                found = over.values[f"{name}_{word}_s"]
                assert np.isfinite(found).any()
                np.testing.assert_allclose(found[np.isfinite(found)], value, rtol=0.01)


def test_requests_that_are_due_at_once_have_no_rate() -> None:
    """They are not drawn as so many in a nanosecond, nor as one point: the text says it, in a run's page and a trace's."""
    rows = answers(600)
    rows.due_s[:] = 0.0
    run = replace(run_of(Fleet(4, 4)), id=7, rate_per_s=float("inf"))
    one = digest(RunData(run, rows), SLO)
    assert one.name == "run 7: 4:4 at once"
    counts = Bins("")
    counts.add(rows)
    counted = replace(one, requests=_counted(counts))
    for held in (one, counted):
        assert all(np.nanmax(v, initial=0.0) <= len(rows) for v in held.requests.values.values())
        (arrivals,) = over_time(held)
        assert arrivals.text == (
            "All requests were due at once: there is no rate, and nothing to draw over due times. All finished."
        )
        told = lag([held], SLO)
        assert arrivals.plot is told.plot is None
        assert told.table is not None
        assert told.table.rows[0][3] == "at once"
    profile = Profile.load("demo")
    batch = replace(lognormal(50, 5.0, 1), due_s=np.zeros(50))
    said = traffic_sections(traffic(batch, profile, SLO), {})
    assert [section.key for section in said] == ["rate", "lengths"]
    assert "come at one instant" in said[0].text
    assert said[0].plot is said[1].plot is None
    assert traffic_sections(traffic_of([batch, batch]), {})[0].plot is None


def test_the_last_slot_of_counts_may_be_an_instant() -> None:
    """A request due just where a slot of time begins is one in that slot, not one in a nanosecond."""
    rows = answers(129)
    rows.due_s[:] = np.arange(129) * 1.0
    counts = Bins("")
    counts.add(rows)
    assert counts.edges_s[-1] == counts.edges_s[-2]
    assert np.nanmax(_counted(counts).values["rate_per_s"]) <= 1 / counts.width_s


def test_what_is_not_known_is_a_dash_and_who_was_in_time_is_told_by_the_lag() -> None:
    """Degraded because the server named no usage is in time; a client that did not say when requests were due, nobody knows."""
    rows = answers(10)
    silent = replace(run_of(Fleet(2, 2)), verdict="degraded", lag_p50_ms=0.1, lag_p99_ms=0.5, lag_max_ms=1.0)
    late = replace(silent, lag_p99_ms=40.0, slo="ttft<0.5s tpot<50ms")
    held = [digest(RunData(run, rows), SLO) for run in (silent, late, run_of(Fleet(2, 2)))]
    held[2] = replace(held[2], summary=summarise(Observations.empty(), SLO))
    lines = _rests({}, held)
    assert "The generator was in time in 1 of 2 (send lag p99 at most 40 ms)." in lines
    assert "How late the client sent is not known of 1 of 3." in lines
    assert "nan" not in " ".join(runs_table(held).rows[2])
    assert "nan" not in " ".join(cell for row in run_facts(held[2]).table.rows[:6] for cell in row)  # type: ignore[union-attr]


def test_readings_over_time_count_workers_by_role_and_their_work() -> None:
    """Seven prefill workers, one of which changes its role half-way: 7 then 6; busy a quarter of the time."""
    one = digest(RunData(run_of(Fleet(7, 1)), three_runs(Profile.load("demo"), 5)[2].observations, readings(7, 1)), SLO)
    assert one.readings is not None
    workers = one.readings.values["prefill workers"]
    assert (workers[0], workers[-1]) == (7, 6)
    assert one.readings.values["decode workers"][-1] == 2
    assert np.nanmean(one.readings.values["decode busy"]) == pytest.approx(0.25)
    assert np.nanmax(one.readings.values["prefill waiting_requests"]) == 6 * 7


def test_demand_is_what_a_cluster_at_that_rate_is_busy_with() -> None:
    """Prefill demand of a schedule is the simulator's busy prefill workers within 5 %."""
    profile = Profile.load("demo")
    schedule = lognormal(2000, busy_rate(profile) * 0.5, 3)
    demand = traffic(schedule, profile, SLO).over.values
    result = simulate(schedule, Fleet(4, 4), profile)
    span = float(np.nanmax(result.observations.last_token_s))
    busy = result.utilisation["prefill"] * 4 * span / schedule.span_s
    assert float(np.mean(demand["prefill_workers"])) == pytest.approx(busy, rel=0.25)
    assert (demand["decode_workers"] > 0).all()
    small = traffic(schedule, replace(profile, kv_tokens=6000), SLO)  # a cache of few contexts holds a smaller batch
    m = schedule.output_tokens
    assert small.batch == int(6000 / ((m * (schedule.prompt_tokens + m / 2)).sum() / m.sum()))
    assert (small.over.values["decode_workers"] >= demand["decode_workers"]).all()


@pytest.mark.parametrize("log", [False, True])
def test_an_axis_keeps_values_inside_and_ticks_are_round(log: bool) -> None:
    """Places run from start to end in order; ticks lie inside and are few."""
    axis = Axis(0.02, 730.0, 50, 700, log=log)
    places = [axis(v) for v in (0.001, 0.02, 1, 30, 730, 9999)]
    assert places == sorted(places)
    assert (places[0], places[-1]) == (50, 700)
    ticks = axis.ticks(6)
    assert 3 <= len(ticks) <= 9
    assert all(0.02 <= t <= 730 or t == 0 for t in ticks)


def test_a_drawing_escapes_names_and_leaves_out_what_is_not_there() -> None:
    """Names are text; NaN breaks a line; nothing is drawn at places that are no numbers."""
    mark = Mark(HOSTILE, np.array([1.0, 2, 3, 4]), np.array([1.0, np.nan, 3, 4]))
    empty = Mark("nothing", np.array([1.0]), np.array([np.nan]), "bars")
    plot = Plot(HOSTILE, HOSTILE, [mark, empty], [Rule("x", 2.0, HOSTILE)], log_y=True)
    for size in (WIDE, NARROW):
        drawn = svg(plot, size, HOSTILE)
        assert "<script" not in drawn
        assert "nan" not in drawn
        assert drawn.count("M") >= 2


def _luminance(colour: str) -> float:
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_have_contrast(scheme: str) -> None:
    """Text at 4.5:1 or more, every series at 3:1 or more (WCAG 2.2 AA), on the page and on cards."""
    css = asset("page.css")
    blocks = re.findall(r":root\{[^}]*\}", css)
    block = blocks[scheme == "dark"]
    held = dict(re.findall(r"--(\w+):(#[0-9a-f]{3,6})", block))
    held = {k: "#" + "".join(c * 2 for c in v[1:]) if len(v) == 4 else v for k, v in held.items()}
    for ground in ("bg", "card"):
        for name, least in [
            ("ink", 4.5),
            ("dim", 4.5),
            ("accent", 4.5),
            ("warn", 4.5),
            *((f"s{k}", 3) for k in range(7)),
        ]:
            a, b = sorted((_luminance(held[name]), _luminance(held[ground])), reverse=True)
            assert (a + 0.05) / (b + 0.05) >= least, (scheme, name, ground)


# --- in a browser ---------------------------------------------------------------------------------------------------


def test_runs_left_out_for_one_reason_are_one_line() -> None:
    """The first's words with all the numbers; another reason, and what is said of no run, stay lines of their own, in order."""
    late = "run {} left out: its verdict is invalid (lag p99 {} ms)"
    unknown = "run 5 left out: its fleet is not known"
    assert _alike([late.format(1, 61.2), "laws are old", late.format(4, 55), unknown, late.format(6, 70)]) == [
        "runs 1, 4, 6 left out, all for the like of run 1: its verdict is invalid (lag p99 61.2 ms)",
        "laws are old",
        unknown,
    ]


def chromium() -> str:
    found = browser()
    if found is None:
        if os.environ.get("STEELYARD_REQUIRE_BROWSER"):
            pytest.fail("Chromium is required here and was not found")
        pytest.skip("no Chromium on this machine")
    return found


@pytest.fixture
def opened() -> Iterator[Any]:
    """A browser of this test's own: while playwright is started, no other test of this process could run an event loop."""
    path = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=path,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"],
        )
        yield started
        started.close()


def test_a_browser_draws_every_plot_and_asks_nobody(opened: Any, page: Path) -> None:
    """No console error, no outside request, every plot drawn, hostile names inert, wide and narrow, light and dark."""
    errors: list[str] = []
    asked: list[str] = []
    for scheme in ("light", "dark"):
        context = opened.new_context(viewport={"width": 1200, "height": 900}, color_scheme=scheme)
        tab = context.new_page()
        tab.on("console", lambda m: errors.append(m.text) if m.type in ("error", "warning") else None)
        tab.on("pageerror", lambda e: errors.append(str(e)))
        tab.on("request", lambda r: asked.append(r.url))
        tab.goto(page.as_uri())
        plots = tab.locator(".plot")
        assert plots.count() >= 15
        for k in range(plots.count()):
            box = plots.nth(k).locator("svg.wide").bounding_box()
            assert box["width"] > 500
            assert box["height"] > 200
            assert plots.nth(k).locator("svg.wide g[data-s] :is(path, circle, rect)").count() > 0
        assert errors == []
        assert [u for u in asked if not u.startswith(("file:", "data:", "blob:"))] == []
        assert tab.evaluate("window.pwned") is None
        assert tab.locator("h1").inner_text().startswith("Run ")
        tab.set_viewport_size({"width": 380, "height": 800})
        assert tab.evaluate("document.documentElement.scrollWidth") <= 380
        assert not tab.locator("svg.wide").first.is_visible()
        assert tab.locator("svg.narrow").first.bounding_box()["width"] > 300
        context.close()


def test_keyboard_and_screen_reader_find_everything(opened: Any, page: Path) -> None:
    """Arrow keys read values, Enter hides a series, every figure and table has a name, headings do not skip a level."""
    tab = opened.new_page()
    tab.goto(page.as_uri())
    plot = tab.locator('.plot[data-plot="ttft"]')
    plot.focus()
    tab.keyboard.press("End")
    tab.keyboard.press("ArrowLeft")
    said = plot.locator("output").inner_text()
    assert said.startswith("TTFT, ms ")
    assert said.count("run ") == 3
    button = tab.locator('figure:has([data-plot="ttft"]) .legend button').first
    button.focus()
    tab.keyboard.press("Enter")
    assert button.get_attribute("aria-pressed") == "false"
    assert not plot.locator('svg.wide g[data-s="0"]').is_visible()
    plot.focus()
    tab.keyboard.press("ArrowLeft")
    assert plot.locator("output").inner_text().count("run ") == 2
    tab.locator('.plot[data-plot="goodput"]').hover()
    assert re.match(r"\d:\d: ", tab.locator('.plot[data-plot="goodput"] output').inner_text())
    unnamed = tab.evaluate(
        """[...document.querySelectorAll('svg[role=img], [role=region], [role=group], nav')]
           .filter(x => !x.getAttribute('aria-label')).length"""
    )
    assert unnamed == 0
    levels = tab.evaluate("[...document.querySelectorAll('h1,h2,h3')].map(h => +h.tagName[1])")
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    ids = tab.evaluate("[...document.querySelectorAll('[id]')].map(x => x.id)")
    assert len(ids) == len(set(ids))
    tab.close()


def test_the_policy_of_the_page_lets_nothing_foreign_run(opened: Any, page: Path, tmp_path: Path) -> None:
    """A script, style, handler or picture smuggled into the page does not run or load: the policy names ours by hash."""
    evil = tmp_path / "evil.html"
    added = (
        "<script>window.pwned=1</script><img src='data:,x' onerror='window.pwned=2'>"
        "<img src='http://127.0.0.1:9/x'><style>h1{color:rgb(1,2,3)}</style></main>"
    )
    evil.write_text(page.read_text(encoding="utf-8").replace("</main>", added), encoding="utf-8")
    tab = opened.new_page()
    failed: list[str] = []
    tab.on("requestfailed", lambda r: failed.append(r.failure))
    tab.goto(evil.as_uri())
    assert tab.evaluate("window.pwned") is None
    assert tab.evaluate("getComputedStyle(document.querySelector('h1')).color") != "rgb(1, 2, 3)"
    assert all("csp" in f.lower() or "BLOCKED" in f for f in failed)
    assert "unsafe" not in policy()
    tab.close()


def test_it_prints_as_pdf(page: Path) -> None:
    """Chromium prints the page; the PDF has several pages and no tables cut off at the side."""
    chromium()
    printed = print_pdf(page.read_text(encoding="utf-8"))
    assert printed.startswith(b"%PDF-")
    assert printed.count(b"/Type /Page\n") + printed.count(b"/Type /Page ") >= 4


def test_without_a_browser_the_line_says_what_to_do(db: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """No Chromium on the path: exit 1, one line that names it and the way around, and no file."""
    monkeypatch.setenv("PATH", str(tmp_path))
    out = tmp_path / "x.pdf"
    assert main(["report", "--recommendation", "1", "--format", "pdf", "--out", str(out), "--db", db]) == 1
    said = capsys.readouterr().err
    assert BROWSERS[0] in said
    assert "open the HTML report and print it" in said
    assert list(tmp_path.iterdir()) == []


def test_a_report_is_data_first() -> None:
    """A report without any run is still a page that says so."""
    empty = Report("none", "Nothing was measured.", [], [])
    assert "Nothing was measured." in text_of(empty, "html")
