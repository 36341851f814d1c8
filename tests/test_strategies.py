"""Four strategies on the same requests, in virtual time and over HTTP, chosen on history and scored on the rest."""

from __future__ import annotations

import json
import math
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import traces.store
from advisor import strategies as study
from advisor.cli import main
from loadgen.cluster import Profile
from traces.errors import InputError
from traces.ingest import ingest
from traces.measures import Slo
from traces.records import Fleet, Schedule
from traces.shipped import shipped
from traces.store import open_store

ORIGIN = Profile.load("origin")
SLO = Slo.parse(study.DEFAULT_SLO)


def small(gpus: int = 8, **changes: object) -> study.Question:
    return study.Question(study.Workload(**({"requests": 60} | changes)), gpus, ORIGIN, SLO)  # type: ignore[arg-type]


def test_history_is_never_what_is_scored() -> None:
    """A preset's history is another draw; a trace's is what came right before the window."""
    history, scored = small().workload.draw(3)
    assert history.prompt_tokens.tolist() != scored.prompt_tokens.tolist()
    with open_store("sqlite:///:memory:") as store:
        ingest(store, [shipped("azure-2023-conv")])
        trace = store.schedule("azure-2023-conv")
    work = study.Workload(100, trace, rate_per_s=2.0, sample=50)
    for seed in range(5):
        history, scored = work.draw(seed)
        assert history.index[-1] + 1 == scored.index[0]
        assert (len(history), len(scored)) == (50, 100)
        assert scored.rate_per_s == pytest.approx(2.0)
        assert scored.due_s[0] == 0
    with pytest.raises(InputError, match="Give smaller"):
        study.Workload(len(trace), trace).draw(1)


def test_every_strategy_answers_the_same_requests() -> None:
    """All arms serve every request once; latency counts from the recorded arrival, also where work starts later."""
    question = small()
    history, scored = question.workload.draw(1)
    made = study.plans(question, history, scored, 1)
    assert list(made) == [arm.name for arm in study.ARMS]
    for name, plan in made.items():
        rows = study.run(scored, plan, question).observations
        assert np.isfinite(rows.last_token_s).all()
        np.testing.assert_array_equal(rows.due_s, scored.due_s)
        alone = scored.prompt_tokens * ORIGIN.b_s_per_token + scored.output_tokens * ORIGIN.c0_s
        # a mixed worker's prefill step makes the first token: one decode step less
        spared = ORIGIN.c0_s if name == "colocated" else 0.0
        assert (rows.e2e_s >= alone - spared - 1e-9).all(), name
        if name.startswith("offline"):
            assert (rows.first_token_s > scored.due_s[-1]).all()
    assert made["static-oracle"].fleet is not None
    assert made["baseline"].fleet is None


def test_the_oracle_is_at_least_as_good_as_what_was_chosen_before() -> None:
    """In-sample the best split cannot lose by more than the choice's own tolerance."""
    question = small()
    for seed in (1, 2, 3):
        history, scored = question.workload.draw(seed)
        made = study.plans(question, history, scored, seed)
        p99 = {
            name: float(np.quantile(study.run(scored, made[name], question).observations.e2e_s, 0.99))
            for name in ("static", "static-oracle", "static-report")
        }
        assert p99["static-oracle"] <= 1.1 * min(p99.values()) + 1e-9


def test_our_rules_beat_the_reports_on_its_own_workload() -> None:
    """Same requests, same physics, one definition: ours are better in P99 and mean, by more than the interval."""
    answer = study.study(small(requests=100), 6, processes=1)
    for mode in ("arrivals", "burst"):
        for kind in ("online", "offline", "static"):
            for measure in ("p99_s", "mean_s"):
                assert answer["ours_against_report"][mode][kind][measure]["high"] < 0, (mode, kind, measure)
    for row in answer["arrivals"].values():
        assert 0 < row["utilisation"]["value"] <= 1
        assert row["goodput_per_s"]["value"] <= row["throughput_per_s"]["value"] + 1e-9
    assert answer["arrivals"]["static"]["switches"]["value"] == 0
    assert answer["arrivals"]["baseline"]["switches"]["value"] > 0


def test_the_same_seeds_give_the_same_table() -> None:
    """Nothing is drawn but by seed, also over processes."""
    one = study.study(small(), 2, processes=1)
    two = study.study(small(), 2, processes=2)
    assert json.dumps(one, sort_keys=True) == json.dumps(two, sort_keys=True)


def test_an_interval_says_how_many_draws_it_rests_on() -> None:
    """Student's interval of the mean; one draw has none, no draw has nothing."""
    found = study.interval([1.0, 2.0, 3.0])
    assert found["value"] == 2.0
    assert found["high"] - 2.0 == pytest.approx(2.92 * 1.0 / math.sqrt(3), rel=1e-3)
    assert math.isnan(study.interval([1.0])["high"])
    assert study.interval([math.nan])["n"] == 0


def test_a_mix_that_turns_is_worth_moving_for() -> None:
    """Where the mix turns half-way, our online rule has a better mean latency than the best fixed split from history."""
    question = small(requests=150, preset="shift")
    found = []
    for seed in range(1, 7):
        history, scored = question.workload.draw(seed)
        made = study.plans(question, history, scored, seed)
        found.append(
            {name: study._measured(study.run(scored, made[name], question), question) for name in ("online", "static")}
        )
    change = study.better(found, "online", "static", "mean_s")
    assert change["value"] < -0.03


@pytest.mark.timed
def test_over_http_the_strategies_are_what_the_simulator_says(sqlite_url: str) -> None:
    """Roles on demand, a controller, batches from the client: through Locust and SQL, at eight times speed."""
    question = small(4, requests=24, rate_per_s=3.0)
    with open_store(sqlite_url) as store:
        found = study.over_http(
            store, question, 1, speed=8.0, group="t", arms=("baseline", "online-report", "offline-report", "colocated")
        )
        assert set(found["arms"]) == {"baseline", "online-report", "offline-report", "colocated"}
        for name, row in found["arms"].items():
            # the controller's ticks fall at other instants over HTTP than in the simulator
            close = 0.35 if name == "online-report" else 0.02
            assert row["against_simulation"]["mean_s"]["value"] == pytest.approx(0, abs=close), name
        runs = {run.policy: run for run in store.runs()}
        assert runs["offline-report"].verdict == "valid"
        offline = store.observations(runs["offline-report"].id)
        assert (offline.dispatch_s >= offline.due_s[-1] - 1e-6).all()
        assert len(np.unique(offline.dispatch_s.round(3))) > 3  # batch after batch
        changes = store.fleet_changes(runs["online-report"].id)
        assert changes
        assert all("wait" in change.reason for change in changes)
        assert all(change.after.workers == 4 for change in changes)
        assert any(math.isfinite(change.ready_s) for change in changes)


def test_over_http_limits_are_of_the_endpoints_clock_and_a_failed_request_rejects_the_run(sqlite_url: str) -> None:
    """Limits are stored in the endpoint's seconds, prompts share what the trace shares, an answer refused costs the run."""
    n = 16
    blocks = np.empty(n, dtype=object)
    blocks[:] = [(1, 2, 3, 4) for _ in range(n)]
    outputs = np.full(n, 5)
    outputs[-1] = 1_000_001  # more than the endpoint grants
    trace = Schedule("t", np.arange(n), np.arange(n) * 2.0, np.full(n, 64), outputs, blocks=blocks, block_tokens=16)
    work = study.Workload(8, trace, sample=8)
    question = study.Question(work, 4, replace(ORIGIN, cache_tokens=10_000), Slo.parse("ttft<5s tpot_p99<50ms"))
    with open_store(sqlite_url) as store:
        found = study.over_http(store, question, 1, speed=20.0, group="t", arms=("static",))
        run = store.run(found["runs"][0])
        rows = store.observations(run.id)
    assert Slo.parse(run.slo) == Slo.parse("ttft<250ms tpot_p99<2.5ms")
    assert rows.cached_tokens[rows.ok].max() == 63  # all but the last token, which is always computed
    assert found["arms"] == {}
    assert len(found["rejected"]) == 2
    assert "1 of 8 requests failed" in found["rejected"][0]


def test_the_verb_prints_and_stores_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Human words by default, one JSON object with --json, stored as a recommendation of its own kind; where that cannot be,
    it is printed all the same."""
    db = f"sqlite:///{tmp_path}/s.db"
    open_store(db).close()
    with monkeypatch.context() as patch, closing(sqlite3.connect(tmp_path / "s.db", isolation_level=None)) as other:
        patch.setattr(traces.store, "LOCKED_S", 0.1)
        other.execute("BEGIN IMMEDIATE")
        assert main(["strategies", "--seeds", "2", "--requests", "40", "--gpus", "4", "--db", db]) == 0
    words, err = capsys.readouterr()
    assert "this answer is not stored" in err
    assert "all requests due at 0" in words
    header = next(line for line in words.splitlines() if "P99 s" in line)
    assert header.count("switches") == 1
    assert "e-1" not in words  # rounding is not shown as an interval
    assert "static: ours against the report's rule" in words
    assert main(["strategies", "--seeds", "2", "--scale", "small", "--regret", "--json", "--db", db]) == 0
    held = json.loads(capsys.readouterr().out)
    table = held["scales"]["small"]
    assert table["report"]["offline-report"]["p99_s"] == 1.8
    assert set(table["arrivals"]["online"]) == {*study.MEASURES, "change_p99", "change_mean"}
    assert [row["sample"] for row in table["regret_by_sample"]] == [10, 20, 50, 100, 200, 500]
    with open_store(db) as store:
        assert store.recommendation(kind="strategies")["id"] == held["recommendation"]
        with pytest.raises(InputError, match="no recommendation"):
            store.recommendation(kind="advise")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--requests", "5"], "belong together"),
        (["--profile", "constant"], "has no queues"),
        (["--sample", "many"], "--sample takes"),
        (["--sample", "inf%"], "--sample takes"),
        (["--trace", "nowhere"], "nowhere"),
        (["--slo", "fast"], "SLO term"),
    ],
)
def test_a_question_that_makes_no_sense_is_one_line(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong option is one line on stderr and exit code 1."""
    assert main(["strategies", *arguments, "--db", f"sqlite:///{tmp_path}/s.db"]) == 1
    said = capsys.readouterr().err
    assert words in said
    assert said.startswith("steelyard: ")
    assert said.count("\n") == 1


def test_a_fleet_names_its_mixed_workers() -> None:
    """Colocated workers are written after a plus."""
    assert str(Fleet.parse("0:0+8")) == "0:0+8"
    assert Fleet.parse("1:2+3").workers == 6
