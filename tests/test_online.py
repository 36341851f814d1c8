"""Should the split ever move, and by which thresholds: windows, oracle, search, rules as tables, and what runs live."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from advisor.choose import _more, choose
from advisor.cli import main
from advisor.strategies import DEFAULT_SLO, Workload
from advisor.thresholds import (
    CONSTANT_DRAWS,
    Found,
    Score,
    backlog_thresholds,
    constant,
    defaults,
    find,
    lost_by,
    needless,
    pareto,
    pays,
    period_s,
    redrawn,
    replayed,
)
from advisor.windows import Question, _climb, break_even, drain_and_flip_s, good_by_split, oracle, study
from loadgen import policy
from loadgen.cluster import Profile, simulate
from loadgen.cluster.embedded import embedded
from traces.errors import InputError
from traces.ingest import ingest
from traces.measures import Slo
from traces.records import Fleet, Schedule
from traces.shape import LogNormal
from traces.store import open_store

DEMO = Profile.load("demo")
SLO = Slo.parse("ttft<1s tpot<50ms")
EIGHT = Question(DEMO, SLO, tuple(Fleet.splits(8)))
LONG = (LogNormal(7.6, 0.6, 10, 8192), LogNormal(4.4, 0.6, 4, 2048), 12.5)
SHORT = (LogNormal(5.4, 0.7, 10, 8192), LogNormal(6.0, 0.5, 4, 2048), 5.8)


def traffic(stretches: list[tuple[float, str]], seed: int = 1, times: float = 1.0) -> Schedule:
    """Stretches of (seconds, "long" prompts or "short") at steady rates, times a factor."""
    rng = np.random.default_rng(seed)
    due, prompt, output, at = [], [], [], 0.0
    for seconds, kind in stretches:
        lengths, answers, rate = LONG if kind == "long" else SHORT
        n = rng.poisson(times * rate * seconds)
        due.append(np.sort(rng.uniform(at, at + seconds, n)))
        prompt.append(lengths.draw(n, rng))
        output.append(answers.draw(n, rng))
        at += seconds
    when = np.concatenate(due)
    return Schedule("shift", np.arange(len(when)), when, np.concatenate(prompt), np.concatenate(output))


SHIFT = traffic([(150, kind) for _ in range(4) for kind in ("long", "short")])
STEADY = traffic([(200, "long")])


# --- windows --------------------------------------------------------------------------------------------------------


def test_windows_of_one_mix_want_one_split_and_of_two_mixes_two() -> None:
    """A steady mix leaves nothing to gain by moving; a mix that turns does, and each window wants what its mix wants."""
    steady = study(STEADY, EIGHT)
    assert steady.regret < 0.01
    assert len(steady.path) == 1
    shift = study(SHIFT, EIGHT, borders=np.arange(0, 1201, 150.0))
    assert shift.regret > 0.05
    long, short = ({w.best.prefill for w in shift.windows[k::2]} for k in (0, 1))
    assert min(long) > max(short)
    assert shift.lasts_s == pytest.approx(150, rel=0.01)


def test_of_many_splits_each_window_finds_its_best_however_far_the_fixed_one_is() -> None:
    """The regret is that of every split simulated, also where the fixed split and its neighbours serve nothing."""
    large = replace(EIGHT, splits=tuple(Fleet.splits(24)))
    turns = traffic([(60, kind) for _ in range(2) for kind in ("long", "short")], times=3)
    spans: list[tuple[float, float]] = []
    every: list[dict[Fleet, float]] = []
    for fixed in (Fleet(23, 1), Fleet(20, 4), Fleet(1, 23)):
        found = study(turns, large, fixed=fixed, borders=np.arange(0, 241, 60.0))
        windows = [(w.start_s, w.end_s) for w in found.windows]
        if not every:
            spans, every = windows, [good_by_split(turns, *span, large, large.splits) for span in windows]
        assert windows == spans
        lost = 1 - sum(w[fixed] for w in every) / sum(max(w.values()) for w in every)
        assert found.regret == pytest.approx(lost), fixed
        last = found.windows[-1]
        climbed = _climb(turns, last.start_s, last.end_s, large, [fixed])
        assert max(climbed.values()) > 0.9 * max(every[-1].values()), fixed


def test_a_split_that_only_the_path_gives_a_window_is_simulated_there() -> None:
    """Few requests before very many: moving early costs least, to a split that no climb of the quiet window has met."""
    slow = replace(EIGHT, profile=replace(DEMO, flip_s=10.0), splits=tuple(Fleet.splits(24)))
    busy = traffic([(60, "short"), (60, "long"), (60, "short")], times=6)
    quiet = busy.take((busy.due_s > 60) | (np.arange(len(busy)) % 20 == 0))
    found = study(quiet, slow, fixed=Fleet(2, 22), borders=np.arange(0, 181, 60.0))
    first = found.windows[0]
    assert first.best.prefill > 8
    assert first.good[first.best] > 0.9 * first.requests
    even = break_even(quiet, slow, found)
    assert even is not None
    assert even.gain_per_s > 0


def test_an_oracle_that_pays_serves_no_more_than_one_that_does_not_and_no_less_than_standing_still() -> None:
    """static <= paid oracle <= free oracle."""
    found = study(SHIFT, EIGHT)
    known = oracle(SHIFT, EIGHT, found)
    still = simulate(SHIFT, found.fixed, DEMO).observations
    from traces.measures import goodput_per_s

    assert goodput_per_s(still, SLO) <= known.paid_per_s <= known.free_per_s
    assert known.switches > 0


def test_a_move_costs_the_flip_at_least() -> None:
    """Drain and flip take the profile's flip and whatever is in flight; a break-even lies above 0 where a move gains."""
    slow = replace(EIGHT, profile=replace(DEMO, flip_s=9.0))
    assert drain_and_flip_s(SHIFT, slow, Fleet(3, 5)) >= 9.0
    found = study(SHIFT, EIGHT)
    even = break_even(SHIFT, EIGHT, found)
    assert even is not None
    assert even.gain_per_s > 0
    assert 0 <= even.lasts_s < 150
    assert break_even(STEADY, EIGHT, study(STEADY, EIGHT)) is None


# --- thresholds -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found() -> Found:
    return find(SHIFT, EIGHT, seed=3, seeds=2)


def test_thresholds_chosen_on_the_earlier_part_pay_on_the_later(found: Found) -> None:
    """Where the mix turns every 150 s, moving beats standing still, the report's rule and comes near the oracle that pays."""
    good, why = pays(found, 0.02)
    assert good, why
    mine = found.compared["online"]
    assert mine["goodput_per_s"] > 1.02 * found.compared["never moving"]["goodput_per_s"]
    assert mine["goodput_per_s"] > found.compared["report's 1.5x"]["goodput_per_s"]
    assert mine["regret"] < 0.1
    assert mine["switches_per_h"] < found.compared["report's 1.5x"]["switches_per_h"]
    assert found.earlier.windows[-1].end_s <= found.later.windows[0].start_s


def test_the_table_of_thresholds_is_the_rule(found: Found) -> None:
    """What --json prints runs as it is: the same decisions in the simulator, bit for bit."""
    table = json.loads(json.dumps(found.as_json()))
    rule = policy.rule_of(table, "here")
    assert rule == found.rule
    ours, theirs = policy.Steering(found.rule), policy.Steering(rule)
    for steering in (ours, theirs):
        simulate(SHIFT, found.start, DEMO, controller=steering)
    assert ours.moves == theirs.moves
    assert ours.moves
    assert table["prefill"]["up_backlog_s"] > table["prefill"]["down_backlog_s"] > 0
    assert table["decode"]["up_running_requests"] > table["decode"]["down_running_requests"] > 0
    fronts = [(p["switches_per_h"], p["goodput_per_s"]) for p in table["pareto"]]
    assert fronts == sorted(fronts)


@pytest.mark.parametrize("backlog", [False, True])
def test_prefill_gives_a_worker_below_the_threshold_that_is_told(backlog: bool) -> None:
    """With decode in want, a move is made just below it and none just above: the others have to take on what is left."""
    laws = Profile(name="t", b_s_per_token=1e-4, c0_s=0.01, max_batch=10)
    rule = policy.BacklogRule(laws, 1000, 100) if backlog else policy.DemandRule(laws, 1000, 100)
    for workers in range(1, 5):
        fleet = Fleet(workers, 4)
        told = backlog_thresholds(rule, fleet)["prefill"]["down_waiting_tokens"] * workers
        assert (told == 0) == (workers == 1)
        for share in (0.95, 1.05):
            waiting = round(told * share)
            seen = policy.Queues(round(waiting / 1000), waiting, 41 if backlog else 0, 40)
            state = rule.decide(policy.State(), seen, fleet, 0, 0.0)[0]
            target = rule.decide(state, seen, fleet, 0, 60.0)[1]
            assert target == (Fleet(workers - 1, 5) if share < 1 < workers else None)


def test_the_same_seed_gives_the_same_thresholds() -> None:
    """Same traffic and seed, same answer to the last digit."""
    short = SHIFT.take(np.arange(1500))
    assert find(short, EIGHT, seed=3, seeds=1).as_json() == find(short, EIGHT, seed=3, seeds=1).as_json()


def test_nothing_oscillates_under_constant_load(found: Found) -> None:
    """Thresholds that move on traffic that turns leave traffic that does not turn alone, once they have found its split."""
    steering = policy.Steering(found.rule)
    simulate(STEADY, study(STEADY, EIGHT).fixed, DEMO, controller=steering)
    assert len(steering.moves) <= 1


def test_constant_loads_begin_at_the_split_that_serves_most_there() -> None:
    """A window on the way from one mix to another may want a split that neither half of it would; a constant load does not."""
    part = SHIFT.take(np.arange(3000))
    loads = constant(part, study(part, EIGHT), EIGHT)
    assert len(loads) >= 2 * CONSTANT_DRAWS
    for load, fleet in loads[::CONSTANT_DRAWS]:
        served = {f: replayed(load, f, None, EIGHT)[0] for f in EIGHT.splits}
        assert served[fleet] == max(served.values())
    assert len({fleet for _, fleet in loads}) >= 2


def test_a_forecast_that_moves_once_and_for_the_worse_is_seen() -> None:
    """A forecast of what never comes may move one time only, and be no oscillation; it is the goodput that tells."""
    rule = replace(defaults(EIGHT, STEADY, 6.0), cool_s=1000.0)
    wrong = replace(rule, forecast=policy.Forecast((0.0,) * 6, (500.0, 0.0, 0.0, 0.0, 0.0, 0.0)))
    loads = [(STEADY, study(STEADY, EIGHT).fixed)]
    assert needless(wrong, loads, EIGHT) == 0
    lost = lost_by(wrong, rule, loads, EIGHT)
    assert lost is not None
    assert lost > 0.2
    assert lost_by(rule, rule, loads, EIGHT) == 0
    hasty = replace(rule, gain=0.0, dwell_s=0.0, cool_s=0.0)
    assert needless(hasty, loads, EIGHT)
    assert lost_by(hasty, rule, loads, EIGHT) is None


def test_a_pareto_set_holds_nothing_that_another_beats() -> None:
    """Fewest switches first, and every further switch buys goodput."""
    rule = policy.DemandRule(DEMO, 100, 100)
    points = [(10.0, 5.0), (9.0, 6.0), (12.0, 9.0), (11.0, 20.0), (8.0, 1.0)]
    front = pareto([(Score(g, 0.0, n), rule) for g, n in points])
    assert [(s.goodput_per_s, s.switches_per_h) for s, _ in front] == [(8.0, 1.0), (10.0, 5.0), (12.0, 9.0)]


def test_the_period_of_a_mix_is_found_and_of_none_is_not() -> None:
    """Eight stretches of 150 s repeat every 300 s; a steady mix repeats never."""
    assert period_s(SHIFT, 20.0) == pytest.approx(300, rel=0.05)
    assert period_s(STEADY, 20.0) == 0.0


def test_another_draw_keeps_rate_and_drift() -> None:
    """Redrawn traffic has as many requests, in order, with the same mix in each stretch."""
    drawn = redrawn(SHIFT, 5)
    assert len(drawn) == len(SHIFT)
    assert (np.diff(drawn.due_s) >= 0).all()
    for a, b in ((5, 145), (155, 295)):
        before, after = (s.prompt_tokens[(s.due_s >= a) & (s.due_s < b)].mean() for s in (SHIFT, drawn))
        assert after == pytest.approx(before, rel=0.15)


def test_a_prompt_rate_is_seen_whether_it_waits_or_is_served() -> None:
    """Demand counts prompt tokens done or waiting, so that a saturated stage does not hide what arrives."""
    seen = policy.Demand(0.0, 0.0, 0.0)
    for k in range(1, 30):
        seen = seen.next(float(k), 1000.0 * k, 10.0, 5.0)
    assert seen.rate == pytest.approx(1000)
    assert seen.slow_rate == pytest.approx(1000)
    assert seen.next(30.0, 0.0, 10.0, 5.0).rate < 1000  # a worker went away with its count: no negative rate
    assert seen.next(30.0, 0.0, 10.0, 5.0).rate >= 0


FEATURES = len(policy.forecast_features(policy.Demand(0.0, 0.0, 0.0), 0.0))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rule": "magic"}, "rule must be one of"),
        ({"laws": "name = 3"}, "name must be"),
        ({"laws": None}, "laws is missing"),
        ({"up": "high"}, "up of the thresholds cannot be read"),
        ({"floor": {"prefill": 0, "decode": 1}}, "at least one worker"),
        ({"floor": {"prefill": math.inf, "decode": 1}}, "floor of the thresholds: fleet must be like"),
        ({"floor": {"prefill": 1, "decode": 1.5}}, r"\(got .*1\.5"),
        ({"floor": {"prefill": 0, "decode": "0+8"}}, "floor of the thresholds: fleet must be like"),
        ({"up": 10**400}, "up of the thresholds cannot be read"),
        ({"forecast": {"rate": [1], "active": [1]}}, "forecast of the thresholds"),
        (
            {"forecast": {"rate": [math.nan] * FEATURES, "active": [1] * FEATURES}},
            "forecast of the thresholds cannot be read",
        ),
    ],
)
def test_thresholds_that_are_none_are_refused_by_name(change: dict[str, object], words: str) -> None:
    """A wrong table is one line that names the key."""
    table = policy.table_of(policy.DemandRule(DEMO, 100, 100)) | change
    with pytest.raises(InputError, match=words):
        policy.rule_of(table, "file.json")


def test_dynamos_easy_mode_wants_a_worker_by_tokens_and_by_kv() -> None:
    """A queue of a context a worker asks for prefill if decode is idle; a full KV cache for decode if no prompt waits."""
    rule = policy.EasyRule(replace(DEMO, kv_tokens=10_000), 1000.0)
    held = policy.Queues(prefill_waiting=3, prefill_waiting_tokens=3000)
    assert rule.decide(policy.State(), held, Fleet(2, 2), 0, 0.0)[1] == Fleet(3, 1)
    full = policy.Queues(decode_running=30, decode_context_tokens=20_001)
    assert rule.decide(policy.State(), full, Fleet(2, 2), 0, 0.0)[1] == Fleet(1, 3)
    assert rule.decide(policy.State(), full, Fleet(2, 2), 1, 0.0)[1] is None


# --- which strategy -------------------------------------------------------------------------------------------------


def test_a_steady_mix_stands_still_and_says_why() -> None:
    """Nothing to gain: static, with the regret that says so."""
    choice = choose(STEADY, EIGHT, study(STEADY, EIGHT).fixed)
    assert choice.strategy == "static"
    assert "at most" in choice.why
    assert choice.online is None


def test_a_mix_that_turns_moves(found: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regret of standing still, windows long enough, thresholds that pay: online."""
    monkeypatch.setattr("advisor.choose.find", lambda *_, **__: found)  # the search itself, done once for this file
    choice = choose(SHIFT, EIGHT, found.start, seed=3)
    assert choice.strategy == "online", choice.why
    assert choice.as_json()["thresholds"]["rule"] in policy.RULES
    assert {a.strategy for a in choice.arms} == {"static", "online", "colocated"}


def test_windows_of_a_longer_trace_do_not_say_how_long_a_mix_lasts() -> None:
    """Stretches of days, one after the other, turn every 150 s; the traffic need not: stand still, and ask of a stretch."""
    choice = choose(SHIFT, EIGHT, study(SHIFT, EIGHT).fixed, parts=8)
    assert choice.strategy == "static"
    assert "8 windows" in choice.why
    assert "--requests" in choice.why
    assert choice.arms[0].regret > 0.02
    assert choice.as_json()["windows"] is None
    assert not any("--deadline" in line for line in choice.warnings)  # which is refused of windows


def test_who_loses_half_is_served_twice_as_much_by_the_best() -> None:
    """Regret is a share of the best, "more" one of what is: 2 % of the one are 2 % of the other, half is all again."""
    assert [_more(regret) for regret in (0.0, 0.02, 0.5, 0.75, 1.0)] == [
        "0.0%", "2.0%", "100.0%", "300.0%", "infinitely",
    ]  # fmt: skip


def test_workers_of_different_sizes_do_not_change_roles() -> None:
    """GPUs per worker differ: online cannot be had, and is said to be so."""
    choice = choose(SHIFT, EIGHT, Fleet(3, 5), gpus_per_worker=(1, 2), asked="online")
    assert choice.strategy == "static"
    assert any("cannot change roles" in w for w in choice.warnings)


@pytest.mark.parametrize(("deadline", "strategy"), [(100_000.0, "offline"), (10.0, "static")])
def test_offline_only_when_the_deadline_allows(deadline: float, strategy: str) -> None:
    """A day's deadline: offline, on fewer GPUs (two workers of two); ten seconds: not, and it says how late it would be."""
    part = STEADY.take(np.arange(300))
    choice = choose(part, EIGHT, Fleet(4, 4), gpus_per_worker=(2, 2), deadline_s=deadline)
    assert choice.strategy == strategy, choice.why
    assert choice.offline is not None
    if strategy == "offline":
        assert choice.offline.gpus == 4
        assert choice.offline.makespan_s <= choice.offline.blind_makespan_s
    else:
        assert any("offline would be late" in w for w in choice.warnings)


def test_colocated_is_named_when_it_would_win() -> None:
    """Where one request fills a worker and nothing interferes, workers of both phases serve more."""
    part = Workload(100).draw(1)[1]
    origin = Question(Profile.load("origin"), Slo.parse(DEFAULT_SLO), tuple(Fleet.splits(8)))
    choice = choose(part, origin, Fleet(3, 5))
    assert any("colocated" in w for w in choice.warnings)
    assert choice.arms[-1].strategy == "colocated"
    assert math.isfinite(choice.arms[-1].goodput_per_s)


# --- live -----------------------------------------------------------------------------------------------------------


def test_the_thresholds_run_as_they_are_in_a_replay(
    found: Found,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A file of thresholds and a stored answer each steer a live endpoint, at their own tick or the one that is typed;
    the fleet that they start from is put in force."""
    url = f"sqlite:///{tmp_path}/a.db"
    busy = tmp_path / "busy.csv"
    rows = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    rows += [f"2023-11-16 18:15:{k * 0.1:09.6f},4000,4" for k in range(60)]
    busy.write_text("\n".join(rows) + "\n")
    table = found.as_json() | {"tick_s": 0.2}
    file = tmp_path / "t.json"
    file.write_text(json.dumps({"thresholds": table | {"tick_s": 3600.0}}))
    with open_store(url) as store:
        ingest(store, [busy], name="busy")
        number = store.add_recommendation("online", {"thresholds": table}, [], "", 0)
        empty = store.add_recommendation("static", {"thresholds": None}, [], "", 0)
    common = ["replay", "busy", "--db", url, "--workers", "1", "--policy", "online", "--json"]
    with embedded("demo", Fleet(1, 7)) as endpoint:
        for option in (["--thresholds", str(file), "--tick", "0.2"], ["--recommendation", str(number)]):
            code = main([*common, "--endpoint", endpoint, *option])
            answer = json.loads(capsys.readouterr().out)
            assert code in (0, 4), answer
            assert answer["fleet"] == {"prefill": found.start.prefill, "decode": found.start.decode}
            assert answer["fleet_changes"], "twelve times the prompts a split can take move it"
            assert "load of prefill" in answer["fleet_changes"][0]["reason"]
        given = ["--recommendation", str(number), "--laws", "demo", "--cool", "3"]
        assert main([*common, "--endpoint", endpoint, *given]) == 2
        assert f"--laws, --cool would not count: the thresholds of recommendation {number}" in capsys.readouterr().err
        assert main([*common, "--endpoint", endpoint, "--recommendation", str(empty)]) == 1
        assert "stand still" in capsys.readouterr().err
        assert main([*common, "--endpoint", endpoint, "--thresholds", str(busy)]) == 1
