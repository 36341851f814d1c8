"""Is the advisor good on this database, and what spoils it; and the probes that it runs itself."""

from __future__ import annotations

import json
import urllib.request
from dataclasses import replace
from functools import partial
from pathlib import Path

import joblib
import numpy as np
import pytest

from advisor.audit import (
    _decisions,
    _fold,
    _measured,
    _predicted,
    _stretches,
    audit,
    closed_loop,
    confounders,
    cusum,
)
from advisor.auto import _next, _piece
from advisor.cli import main
from advisor.cli.advise_verbs import seconds
from advisor.features import RunData
from advisor.model import _seen
from advisor.parallel import each
from loadgen.cluster import Profile, simulate
from loadgen.cluster.embedded import embedded
from tests.test_advise import SLO, busy_rate, lognormal, measured, three_runs
from traces.measures import Slo, summarise
from traces.records import Fleet, Sample, Schedule
from traces.store import open_store

DEMO = Profile.load("demo")


def five_runs() -> list[RunData]:
    rate = busy_rate(DEMO)
    found = [*three_runs(DEMO, rate), measured(DEMO, lognormal(250, rate * 0.5, 8), Fleet(2, 6), 4)]
    found.append(measured(DEMO, lognormal(250, rate * 0.5, 8), Fleet(3, 5), 5))
    return [replace(one, run=replace(one.run, schedule_digest=f"{k if k < 3 else 3}")) for k, one in enumerate(found)]


@pytest.fixture(scope="module")
def runs() -> list[RunData]:
    return five_runs()


def begun(one: RunData, n: int = 150) -> RunData:
    """The beginning of a run: fits cost by the request."""
    return replace(one, observations=one.observations.take(np.arange(min(n, len(one.observations)))))


def test_runs_left_out_are_predicted_and_the_bars_decide(runs: list[RunData]) -> None:
    """On a cluster that obeys the laws, runs left out are predicted: the step to a few percent, the choice without regret."""
    found = audit([begun(one) for one in (*runs[:2], *runs[3:])], SLO)
    assert found.schemes["run"]["folds"] == 4
    assert found.schemes["run"]["errors"]["tpot_p50_s"] < 0.05
    assert set(found.schemes) == {"run", "ratio", "rate"}
    for line in found.failed:
        assert line.startswith("leave-one-")
    (decision,) = found.decisions
    assert decision["regret"] <= 0.03
    assert json.dumps(found.as_json())


def test_a_choice_is_judged_by_the_constraints_that_it_keeps(runs: list[RunData]) -> None:
    """Two fleets serve all that is asked, the one with the shorter tail misses TTFT p99: it is neither chosen nor the best."""
    asked, slo = lognormal(250, busy_rate(DEMO) * 0.6, 8), Slo.parse("ttft_p99<0.5s")
    two = [measured(DEMO, asked, fleet, k) for k, fleet in ((4, Fleet(1, 7)), (5, Fleet(3, 5)))]
    data = [*runs[:3], *(replace(one, run=replace(one.run, schedule_digest="3")) for one in two)]
    (decision,) = _decisions(data, slo)
    assert (decision["chosen"], decision["best"], decision["regret"]) == ("3:5", "3:5", 0.0)


def test_an_advisor_that_fails_says_so(runs: list[RunData]) -> None:
    """A run whose servers were twice as slow is missed by laws of the other, and the line says which bar."""
    rows = runs[3].observations
    slow = replace(rows, last_token_s=rows.first_token_s + 2.5 * (rows.last_token_s - rows.first_token_s))
    found = audit([runs[0], RunData(runs[3].run, slow)], SLO)
    assert any("tpot_p50_s is off by" in line for line in found.failed)


def test_a_long_run_is_judged_by_its_later_windows_too() -> None:
    """A run whose servers became slow after its first window: the first says nothing, all of them say by how much."""
    whole = measured(DEMO, lognormal(3000, 4.0, 8), Fleet(3, 5), 1)
    rows = whole.observations
    late = rows.due_s > rows.due_s[1000]
    stretched = rows.first_token_s + np.where(late, 2.0, 1.0) * (rows.last_token_s - rows.first_token_s)
    rows = replace(rows, last_token_s=stretched)
    windows = [rows.take(np.arange(at, at + 600)) for at in (0, 1200, 2400)]
    slow = RunData.of(whole.run, windows)
    assert [begin > one.due_s.min() for one, begin in _stretches(slow)] == [False, True, True]
    fast = RunData.of(whole.run, [whole.observations.take(np.arange(at, at + 600)) for at in (0, 1200, 2400)])
    for one, ratios in ((slow, (1.0, 2.0, 2.0)), (fast, (1.0, 1.0, 1.0))):
        for ours, theirs, ratio in zip(_predicted(one, Fleet(3, 5), DEMO), _measured(one), ratios, strict=True):
            a, b = (summarise(rows, SLO) for rows in (ours, theirs))
            assert b.tpot_p50_s / a.tpot_p50_s == pytest.approx(ratio, rel=0.03)
    full = measured(DEMO, lognormal(3000, 40.0, 8), Fleet(1, 1), 2)  # its queue only grows
    held = RunData.of(full.run, [full.observations.take(np.arange(at, at + 600)) for at in (0, 1200, 2400)])
    assert len(_stretches(held)) == 1


def test_a_warm_up_that_outlasts_the_first_window_leaves_the_others(runs: list[RunData]) -> None:
    """What is left of that window is no stretch and tells no rate; a run without a stretch decides nothing."""
    two = []
    for k, fleet in ((4, Fleet(7, 1)), (5, Fleet(3, 5))):  # of the first the other windows begin with long queues
        whole = measured(DEMO, lognormal(2400, busy_rate(DEMO) * 0.6, 8), fleet, k)
        windows = [whole.observations.take(np.arange(at, at + 600)) for at in (0, 900, 1800)]
        run = replace(whole.run, schedule_digest="3", warmup_s=float(windows[0].due_s[-1]))
        two.append(RunData.of(run, windows))
    assert [len(rows) > 200 for rows in _measured(two[1])] == [True, True]
    assert _seen([two[1]], DEMO).prefill < 1
    assert _stretches(two[0]) == []
    for after_s in (0.0, 0.001):
        gone = [replace(one, run=replace(one.run, warmup_s=one.run.warmup_s + after_s)) for one in two]
        assert _decisions([*runs[:3], *gone], SLO) == []
        other = replace(gone[1], run=replace(gone[1].run, fleet=Fleet(4, 4)))
        assert len(_decisions([*runs[:3], *gone, other], SLO)[0]["runs"]) == 2


def test_the_audit_is_the_same_on_another_backend(runs: list[RunData]) -> None:
    """Folds that joblib carries to other processes give the same figures in the same order."""
    short = [begun(one, 80) for one in runs[:3]]
    folds = [(f"run {one.run.id}", [k]) for k, one in enumerate(short[:2])]
    with joblib.parallel_config(backend="loky", n_jobs=2):
        there = each(partial(_fold, short, SLO), folds)
    assert there == [_fold(short, SLO, fold) for fold in folds]
    assert [bool(fold.errors) for fold in there] == [True, True]


def test_what_spoils_the_data_is_named(runs: list[RunData]) -> None:
    """Mixed engines, a late generator, prefix hits, a cell that changed: each in one line, and nothing where nothing is."""
    assert confounders(runs) == []
    mixed = [*runs[:2], replace(runs[2], run=replace(runs[2].run, engine="sglang"))]
    assert any("mixed engines" in line for line in confounders(mixed))
    said = [replace(one, run=replace(one.run, engine_version=f"0.{31 + k}")) for k, one in enumerate(runs[:2])]
    assert any("mixed engine versions: 0.31, 0.32" in line for line in confounders([*said, runs[2]]))
    for urls, words in (
        (
            ("http://a:8000", "https://b:8000 https://c:8000"),
            "mixed hosts: a, b and c; where these are different machines",
        ),
        (("http://127.0.0.1:8001", "http://localhost:8002"), ""),
        (("http://a:8000", "http://a:8001"), ""),
        (("http://a:8000", "H100"), ""),
        (("http://a:8000", "http://[b"), ""),
    ):
        two = [replace(one, run=replace(one.run, endpoint=url)) for one, url in zip(runs[:2], urls, strict=True)]
        (told,) = confounders(two) or [""]
        assert told.startswith(words), urls
        assert bool(told) == bool(words), urls
    late = replace(runs[0], run=replace(runs[0].run, lag_p99_ms=400.0))
    assert any("late at p99" in line for line in confounders([late]))
    half = float(runs[0].observations.prompt_lengths.sum()) / 2
    readings = [Sample(t, "0", "prefill", prompt_tokens_total=v) for t, v in ((0.0, 5.0), (9.0, 5.0 + half))]
    assert any("prefix hits" in line for line in confounders([replace(runs[0], samples=readings)]))
    rows = runs[1].observations
    later = replace(
        runs[1],
        observations=replace(rows, last_token_s=rows.first_token_s + 1.3 * (rows.last_token_s - rows.first_token_s)),
    )
    assert any("drift: 1:7" in line for line in confounders([runs[1], later]))
    until = float(np.quantile(rows.due_s, 0.6))  # slower in its warm-up only
    early = rows.first_token_s + np.where(rows.due_s < until, 1.3, 1.0) * (rows.last_token_s - rows.first_token_s)
    cold = replace(runs[1], observations=replace(rows, last_token_s=early))
    assert any("drift: 1:7" in line for line in confounders([runs[1], cold]))
    warm = [replace(one, run=replace(one.run, warmup_s=until)) for one in (runs[1], cold)]
    assert not any("drift: 1:7" in line for line in confounders(warm))


def test_a_step_in_known_residuals_is_a_drift(runs: list[RunData]) -> None:
    """Residuals that the fit of all runs has already are taken as they are, in time order, not in that of the list."""
    times = (3, 0, 5, 1, 4, 2)
    six = [
        replace(runs[0], run=replace(runs[0].run, id=10 + k, started_unix_s=float(k), schedule_digest=str(k)))
        for k in times
    ]
    still = {10 + k: 0.01 * (k % 2) for k in times}
    assert confounders(six, still) == []
    assert confounders(six, {run: r + 0.3 * (run >= 13) for run, r in still.items()}) == [
        "drift: from run 13 on the runs differ from those before (CUSUM of TPOT residuals)"
    ]


def test_a_closed_loop_is_told_from_an_open_one() -> None:
    """Eight clients that wait for their answers are a closed loop; Poisson arrivals are none, at any load."""
    n, users = 300, 8
    free, sent = np.zeros(users), np.zeros(n)
    rng = np.random.default_rng(1)
    took = rng.uniform(0.5, 1.5, n)
    for k in range(n):
        who = int(np.argmin(free))
        sent[k] = free[who] + 0.001
        free[who] = sent[k] + took[k]
    schedule = Schedule("loop", np.arange(n), np.sort(sent), np.full(n, 100), np.full(n, 10))
    rows = simulate(schedule, Fleet(4, 4), DEMO).observations
    assert closed_loop(replace(rows, first_token_s=sent + took / 2, last_token_s=sent + took))
    for rate in (1.0, 10.0, 40.0):
        open_ = simulate(lognormal(300, rate, 3), Fleet(4, 4), DEMO).observations
        assert not closed_loop(open_)


def test_a_shift_of_the_residuals_is_found_where_it_begins_and_noise_is_not() -> None:
    """CUSUM: eight runs and then a step of six standard deviations; noise alone stays below the limit."""
    rng = np.random.default_rng(2)
    noise = rng.normal(0, 0.01, 16)
    assert cusum(noise.tolist()) is None
    assert cusum((noise + np.where(np.arange(16) >= 8, 0.06, 0.0)).tolist()) in (7, 8, 9)
    assert cusum([0.0, 1.0]) is None


@pytest.mark.parametrize(("text", "value"), [("90s", 90.0), ("10m", 600.0), ("1.5h", 5400.0), ("45", 45.0)])
def test_a_budget_is_read_with_its_unit(text: str, value: float) -> None:
    """Seconds, minutes, hours."""
    assert seconds(text) == value


# --- auto -----------------------------------------------------------------------------------------------------------


def stored(folder: Path) -> str:
    from traces.ingest import ingest
    from traces.shipped import shipped

    url = f"sqlite:///{folder}/a.db"
    with open_store(url) as store:
        ingest(store, [shipped("azure-2023-conv")])
    return url


def fleet_of(endpoint: str) -> dict[str, int]:
    with urllib.request.urlopen(endpoint + "/fleet", timeout=5) as answer:
        held: dict[str, int] = json.load(answer)
    return held


@pytest.mark.paced
def test_auto_measures_until_its_budget_and_puts_the_split_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three kinds of probe, an answer from their rows alone, every run stored in one group, the old split in force at the end."""
    url = stored(tmp_path)
    rng = np.random.default_rng(4)
    rows = [
        f"2023-11-16 18:{k // 600:02d}:{k % 600 * 0.1:09.6f},{n},{m}"
        for k, (n, m) in enumerate(zip(rng.integers(200, 2500, 300), rng.integers(8, 60, 300), strict=True))
    ]
    (tmp_path / "short.csv").write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n")
    assert main(["ingest", str(tmp_path / "short.csv"), "--name", "short", "--db", url]) == 0
    capsys.readouterr()
    with embedded("demo", Fleet(3, 5)) as endpoint:
        code = main(
            ["advise", "--auto", "--budget", "40s", "--endpoint", endpoint, "--trace", "short", "--rate", "16",
             "--requests", "300", "--attainment", "0.2", "--strategy", "static", "--audit",
             "--gpu-hour-usd", "2", "--target-rate", "20",
             "--json", "--db", url]
        )  # fmt: skip
        answer = json.loads(capsys.readouterr().out)
        assert code in (0, 5), answer
        held = fleet_of(endpoint)
        assert (held["prefill"], held["decode"]) == (3, 5)
    with open_store(url) as store:
        runs = store.runs()
    assert len(runs) >= 3
    assert len({r.group for r in runs}) == 1
    assert len({str(r.fleet) for r in runs}) >= 3
    if code == 0:
        assert answer["probing"]["runs"] == [r.id for r in runs]
        assert set(answer["audit"]["schemes"]) == {"run", "ratio", "rate"}
        needed = answer["needed"]
        assert needed["prefill"] + needed["decode"] == needed["gpus"] <= needed["high"]
        assert answer["sure"] or not answer["probing"]["sure"]
        assert answer["cost"]["usd_per_m_output_tokens"]["low"] <= answer["cost"]["usd_per_m_output_tokens"]["value"]
        with open_store(url) as store:
            kept = store.recommendation(answer["recommendation"])
        assert answer["probing"]["sure"] != any(w.startswith("--auto ended before") for w in kept["warnings"])
        assert kept["data_hash"] == answer["data_hash"]
        assert kept["laws"] == answer["laws"]


def test_the_first_probes_use_the_gpus_that_there_are() -> None:
    """Of 17 GPUs with two a worker eight workers: low load on the even split, then either end of the splits."""
    asked, run = lognormal(50, 2.0, 1), measured(DEMO, lognormal(20, 1.0, 1), Fleet(4, 4), 1).run
    made = [_next(None, [run] * k, asked, 17, (2, 2)) for k in range(3)]
    assert [str(fleet) for fleet, _, _ in made] == ["4:4", "1:7", "7:1"]


def test_a_probe_of_one_instant_of_a_coarse_clock_is_spread() -> None:
    """A piece whose requests share an instant cannot be scaled to a rate: it is drawn anew at that rate."""
    minutes = lognormal(200, 2.0, 1)
    minutes = replace(minutes, due_s=np.arange(200) // 50 * 60.0)
    for seed in range(4):
        asked = _piece(minutes, 3.0, 5.0, seed)
        assert len(asked) == 24
        assert 1.5 < asked.rate_per_s < 6
    assert len(np.unique(_piece(minutes, 3.0, 5.0, 3, spread=True).due_s)) == 24


def test_auto_needs_an_endpoint_and_a_trace(tmp_path: Path) -> None:
    """Usage is said before anything is measured."""
    url = stored(tmp_path)
    assert main(["advise", "--auto", "--db", url]) == 2
    assert main(["advise", "--auto", "--endpoint", "http://127.0.0.1:9", "--db", url]) == 2
    assert main(["advise", "--endpoint", "http://127.0.0.1:9", "--db", url]) == 2
    assert (
        main(["advise", "--auto", "--endpoint", "http://127.0.0.1:9", "--trace", "azure-2023-conv", "--db", url]) == 1
    )
    assert (
        main(["advise", "--auto", "--endpoint", "http://127.0.0.1:9", "--trace", "x", "--budget", "soon", "--db", url])
        == 2
    )
