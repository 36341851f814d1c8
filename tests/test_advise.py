"""From rows to a ratio: the advisor against clusters whose truth is known.

Truth is an exhaustive simulation with the true laws; what the advisor sees are rows of three runs, as a client has
them. (The same over HTTP is tests/test_demo.py and ``steelyard sweep --all``.)
"""

from __future__ import annotations

import csv
import json
import math
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import advisor.cost
import traces.store
from advisor import calibrate
from advisor.advise import advise, choose_runs
from advisor.auto import _sure
from advisor.calibrate import STATISTIC_SD, Replay
from advisor.cli import main
from advisor.cli.advise_verbs import show
from advisor.cost import cost, needed
from advisor.demo import ASKED_FACTOR, ASKED_REQUESTS, PROBES, TRACE
from advisor.features import RunData, served
from advisor.model import _seen, fit_laws, load_of, relative_nnls
from advisor.moves import flip_law
from advisor.recommend import (
    Candidate,
    Interval,
    _regret,
    _slice,
    _stands,
    _usable,
    data_hash,
    enough,
    rank,
    recommend,
    refusal,
    stored_as,
    stressed,
)
from advisor.report import assemble, text_of
from advisor.splits import LIKELY, Simulated, _likely, excerpt
from loadgen.cluster import Profile, simulate
from tests.test_features import run_of
from traces.errors import InputError, NoFleetError, NotEnoughDataError
from traces.ingest import ingest
from traces.measures import Slo, goodput_per_s, meets, summarise
from traces.records import Fleet, FleetChange, Observations, Sample, Schedule
from traces.shape import head, scale_rate, to_rate
from traces.shipped import shipped
from traces.store import open_store

SLO = Slo.parse("ttft<0.5s tpot<50ms")
STAMPS = ("due_s", "sent_s", "first_token_s", "last_token_s")


def lognormal(n: int, rate: float, seed: int, prompt: float = 800.0, output: float = 150.0) -> Schedule:
    rng = np.random.default_rng(seed)
    return Schedule(
        f"lognormal-{seed}",
        np.arange(n),
        np.cumsum(rng.exponential(1 / rate, n)),
        np.clip(rng.lognormal(math.log(prompt), 0.8, n), 10, 4096).astype(np.int64),
        np.clip(rng.lognormal(math.log(output), 0.7, n), 4, 1000).astype(np.int64),
    )


def measured(profile: Profile, schedule: Schedule, fleet: Fleet, number: int) -> RunData:
    """A run as a client would have recorded it: no server readings, half a millisecond of noise on every stamp."""
    rows = simulate(schedule, fleet, profile).observations
    rng = np.random.default_rng(number)
    jitter = rng.exponential(5e-4, len(rows))
    rows = replace(rows, first_token_s=rows.first_token_s + jitter, last_token_s=rows.last_token_s + jitter)
    run = replace(run_of(fleet, len(rows)), id=number, trace=schedule.name, rate_per_s=schedule.rate_per_s)
    return RunData(run, rows)


def three_runs(profile: Profile, rate: float, seed: int = 0) -> list[RunData]:
    """Low load, prefill-saturating, decode-saturating; none of them the fleet that will be asked about."""
    return [
        measured(profile, lognormal(80, rate * 0.15, seed + 1), Fleet(4, 4), 1),
        measured(profile, lognormal(300, rate, seed + 2), Fleet(1, 7), 2),
        measured(profile, lognormal(200, rate * 0.4, seed + 3), Fleet(7, 1), 3),
    ]


def truth(profile: Profile, schedule: Schedule) -> dict[Fleet, float]:
    return {f: summarise(simulate(schedule, f, profile).observations, SLO).goodput_per_s for f in Fleet.splits(8)}


def test_another_question_of_the_same_runs_waits_for_no_second_search() -> None:
    """Their laws are remembered, with all that they came from: another seed or another token's time is another search."""
    profile = Profile.load("demo")
    runs = three_runs(profile, busy_rate(profile))[:1]
    first = fit_laws(runs, residuals=False).calibration
    assert fit_laws(runs, residuals=False, slo=SLO).calibration.best is first.best
    assert fit_laws(runs, residuals=False, seed=1).calibration.best is not first.best
    rows = runs[0].observations
    slower = replace(runs[0], observations=replace(rows, last_token_s=rows.last_token_s + 1e-3))
    assert fit_laws([slower], residuals=False).calibration.best is not first.best


def test_the_draws_judge_all_the_requests_though_they_simulate_a_window(tmp_path: Path) -> None:
    """The window of this trace suits 3:5, the whole 2:6, which is what counts: in the draws too, and so for being sure."""
    demo = Profile.load("demo")
    with open_store(f"sqlite:///{tmp_path}/t.db") as store:
        ingest(store, [shipped(TRACE)], name=TRACE)
        conv = store.schedule(TRACE)

    def part(n: int, rate: float) -> Schedule:
        return to_rate(head(conv, n), rate)

    data = [
        measured(demo, part(n, rate), fleet, number)
        for number, (n, rate, fleet) in enumerate(
            ((30, 3.0, Fleet(4, 4)), (120, 30.0, Fleet(1, 7)), (36, 7.0, Fleet(7, 1))), 1
        )
    ]
    answer = recommend(data, part(3000, 8.0), gpus=8, slo=SLO)
    by = {c.fleet: c for c in answer.candidates}
    assert by[Fleet(2, 6)].figures["goodput_per_s"].low > by[Fleet(3, 5)].figures["goodput_per_s"].high
    assert by[Fleet(2, 6)].wins > 0.9
    true = truth(demo, part(3000, 8.0))
    assert answer.best.fleet == max(true, key=true.__getitem__)


def test_a_long_trace_is_judged_by_its_busy_hours_too() -> None:
    """A third slow, a third at the mean rate, a third that no split keeps up with: a piece at the mean rate showed 95 %."""
    demo = Profile.load("demo")
    rate, n = busy_rate(demo), 22_000
    asked = lognormal(3 * n, rate, 9)
    gaps = np.diff(asked.due_s, prepend=0.0) * np.repeat([5 / 3, 1.0, 1 / 3], n)
    asked = replace(asked, due_s=np.cumsum(gaps))
    answer = recommend(three_runs(demo, 1.2 * rate), asked, gpus=8, slo=SLO, draws=4, attainment=0.0, refuse=False)
    true = summarise(simulate(asked, answer.best.fleet, demo).observations, SLO)
    assert true.attainment < 0.75
    assert answer.next_probe["why"] == "it confirms the answer where it will be used"
    assert answer.next_probe["rate_per_s"] == pytest.approx(asked.rate_per_s)  # not that of the windows of the draws
    assert answer.best.attainment == pytest.approx(true.attainment, abs=0.1)
    goodput = answer.best.figures["goodput_per_s"]
    assert goodput.low < true.goodput_per_s < goodput.high
    assert any(line.startswith("of the traffic 8 windows of 2500 requests were simulated") for line in answer.warnings)
    assert answer.as_json()["requests"] == 3 * n


def test_a_long_trace_is_simulated_at_its_busy_rate_and_sure_of_no_more_than_the_runs_had() -> None:
    """A day between two nights that take as long: it was simulated twice as fast as it is, to make up for windows of the nights.

    No run had prefill as busy as the day has it, nor does the mean rate, at which draws and loads were asked: it was sure.
    """
    demo, day, night = Profile.load("demo"), 56_000, 2_000
    rate, slo = busy_rate(demo), Slo.parse("ttft<2s tpot<80ms")
    asked = lognormal(day + 2 * night, 1.35 * rate, 9)
    gaps = np.diff(asked.due_s, prepend=0.0) * np.repeat([14, 1, 14], [night, day, night])
    asked = replace(asked, due_s=np.cumsum(gaps))
    some, _ = excerpt(asked)
    assert some.rate_per_s == pytest.approx(asked.rate_per_s) == pytest.approx(1.35 / 1.87 * rate, rel=0.03)
    assert np.median(np.diff(some.due_s)) == pytest.approx(float(np.median(gaps[night:-night])), rel=0.03)
    quiet, _, decode = three_runs(demo, rate)
    runs = [quiet, measured(demo, lognormal(300, 0.7 * rate, 2), Fleet(1, 7), 2), decode]
    answer = recommend(runs, asked, gpus=8, slo=slo, draws=4, attainment=0.0, refuse=False)
    true = summarise(simulate(asked, answer.best.fleet, demo).observations, slo)
    assert answer.best.attainment == pytest.approx(true.attainment, abs=0.01)
    assert answer.best.figures["goodput_per_s"].value == pytest.approx(true.goodput_per_s, rel=0.01)
    assert answer.fit.seen.prefill < 0.7 < max(c.prefill_load for c in answer.candidates)
    assert not answer.sure
    assert answer.next_probe["why"].startswith("prefill was never more than 6")


def test_the_sentence_says_more_less_or_as_much() -> None:
    rate = busy_rate(demo := Profile.load("demo"))
    data, asked = three_runs(demo, rate), lognormal(400, 6.0, 9)
    answer = recommend(data, asked, gpus=8, slo=SLO, refuse=False)
    other = answer.compared_with
    assert other is not None
    said = {}
    for share in (2.0, 1.001, 0.5):
        goodput = replace(other.figures["goodput_per_s"], value=other.figures["goodput_per_s"].value * share)
        best = replace(answer.best, figures=answer.best.figures | {"goodput_per_s": goodput})
        said[share] = replace(answer, best=best).sentence
    assert f"100% more than {other.fleet}" in said[2.0]
    assert f", as much as {other.fleet}" in said[1.001]
    assert f"50% less than {other.fleet}" in said[0.5]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", ["demo", "prefill heavy", "wide batches"])
def test_the_split_it_picks_is_within_two_percent_of_the_best(kind: str, seed: int) -> None:
    """From client rows of three runs the advisor picks a split within 2 % goodput of an exhaustive search."""
    profile = Profile.load("demo")
    if kind == "prefill heavy":
        profile = replace(profile, b_s_per_token=profile.b_s_per_token * 2)
    elif kind == "wide batches":
        profile = replace(profile, a_s=profile.a_s * 2, max_batch_tokens=16384)
    rate = busy_rate(profile)
    data = three_runs(profile, rate, seed * 10)
    schedule = lognormal(400, rate, 100 + seed)
    try:
        answer = recommend(data, schedule, gpus=8, slo=SLO, draws=8, attainment=0.5)
    except NoFleetError:
        pytest.fail("there is a fleet that serves half of the requests")
    goodput = truth(profile, schedule)
    assert goodput[answer.best.fleet] >= 0.98 * max(goodput.values()), (answer.best.fleet, goodput)


def test_a_split_that_misses_a_constraint_is_not_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    """All splits but one serve the same; 1:7 has the least P99 E2E and misses TTFT p99: what is recommended truly keeps it."""
    demo, slo = Profile.load("demo"), Slo.parse("ttft_p99<0.5s tpot_p99<50ms")
    rate = busy_rate(demo)
    asked = lognormal(400, 0.6 * rate, 9)
    answer = recommend(three_runs(demo, rate), asked, gpus=8, slo=slo, draws=6)
    by = {c.fleet: c for c in answer.candidates}
    assert not by[Fleet(1, 7)].feasible
    assert by[Fleet(1, 7)].kept.high < 1
    assert by[Fleet(1, 7)].wins == 0
    assert meets(summarise(rows := simulate(asked, answer.best.fleet, demo).observations, slo), rows, slo, 0.9)
    assert answer.as_json()["candidates"][0]["constraints_kept"]["value"] == by[Fleet(1, 7)].kept.value
    # --auto ends with what the answer says of itself, however many draws it wins.
    assert not _sure(replace(answer, refused="", best=replace(answer.best, wins=1.0), runner_up=None, sure=False))
    assert _sure(replace(answer, sure=True))
    impossible = Slo.parse("ttft_p99<1ms")
    assert replace(answer, current=Fleet(1, 7)).sentence.count("; today's 1:7 misses that") == 1
    rival = answer.runner_up
    assert rival is not None
    assert answer.as_json()["runner_up"]["gap"] == pytest.approx(1 - rival.worth_per_s / answer.best.worth_per_s)
    show(replace(answer, break_even={"prompt_factor": 1.5, "rate_factor": None}))
    assert f"Runner-up {rival.fleet} serves {abs(answer.gap):.1%} " in (text := capsys.readouterr().out)
    assert "; it is ahead with prompts 1.5 times as long." in text
    show(replace(answer, runner_up=by[Fleet(1, 7)], break_even={}))
    assert "Runner-up 1:7 misses the SLO; no prompts or rate" in capsys.readouterr().out
    probe = answer.next_probe | {"gain_per_s": 0.25, "why": "who knows", "stop": False}
    with pytest.raises(
        NotEnoughDataError, match=r"^too little\. .* \(who knows; it is expected to spare 0.25 req/s\)$"
    ) as told:
        _stands(replace(answer, refused="too little", next_probe=probe), 0.9)
    assert told.value.next_probe == probe
    with pytest.raises(NoFleetError, match=r"meets ttft_p99<1ms .*, reaches ttft_p99 0\.\d+ s\."):
        recommend(three_runs(demo, rate), asked, gpus=8, slo=impossible, draws=2)


def busy_rate(profile: Profile) -> float:
    """A rate at which the splits differ: 0.8 of what the best split can serve at all."""
    burst = lognormal(400, 1e6, 7)
    best = max(summarise(simulate(burst, f, profile).observations, Slo()).throughput_per_s for f in Fleet.splits(8))
    return 0.7 * best


def test_where_enough_is_known_nothing_is_said_to_be_measured_next() -> None:
    """Splits as good as each other share the draws between them: that is chance, and no reason for another run."""
    demo = Profile.load("demo")
    rate, loose = busy_rate(demo), Slo.parse("ttft<2s tpot<80ms")
    answer = recommend(three_runs(demo, rate), lognormal(150, 0.5 * rate, 9), gpus=8, slo=loose, draws=6)
    assert answer.sure
    assert answer.best.wins < 0.8
    assert not any("measure next" in line for line in answer.warnings)
    # The same requests with prompts six times as long, a sixth as often: no run had any of such a length.
    asked = lognormal(150, 0.5 * rate / 6, 9)
    longer = replace(asked, prompt_tokens=6 * asked.prompt_tokens)
    beyond = recommend(three_runs(demo, rate), longer, gpus=8, slo=Slo.parse("ttft<60s"), draws=6, refuse=False)
    assert not beyond.sure
    assert all("extrapolated: prompts of" in c.extrapolated for c in beyond.candidates)
    assert any(line.startswith(f"{beyond.best.fleet}: extrapolated: prompts of") for line in beyond.warnings)
    answers = replace(asked, output_tokens=20 * asked.output_tokens)
    assert answer.fit.longer(answers).startswith("extrapolated: prompts with their answers of")
    assert answer.fit.longer(asked) == ""
    # What is measured next ends that: of the whole trace its long part, which is not at its beginning, one run beside many.
    later = replace(asked, prompt_tokens=np.where(asked.index < 100, 1, 6) * asked.prompt_tokens)
    assert not answer.fit.longer(head(later, 100))
    probe = answer.next_probe | {"requests": 50, "command": "replay x --requests 50", "why": "w"}
    _slice(probe, answer.fit, later)
    assert probe["command"] == "replay x --slice 100-150"
    assert probe["why"].startswith("w; the first 50 requests are shorter")
    # The last ones too, of no multiple of 80; and not those of the longest answers, where it is prompts that no run had.
    wordy = replace(later, output_tokens=np.where(asked.index < 80, 40, 1) * asked.output_tokens)
    heard = replace(answer.fit, seen=replace(answer.fit.seen, context_tokens=1e5))
    probe |= {"requests": 80, "command": "replay x --requests 80"}
    _slice(probe, heard, wordy)
    assert probe["command"] == "replay x --slice 70-150"
    measured_next = measured(demo, head(longer, 100), Fleet(4, 4), 4)
    many = [one for one in three_runs(demo, rate) for _ in range(20)]
    fit = replace(answer.fit, seen=_seen([*many, measured_next], demo))
    assert fit.longer(longer) == ""


def test_every_figure_lies_in_its_interval_and_every_split_is_there() -> None:
    """All seven splits are evaluated and each figure lies within its own interval."""
    profile = Profile.load("demo")
    rate = busy_rate(profile)
    answer = recommend(three_runs(profile, rate), lognormal(300, rate, 5), gpus=8, slo=SLO, draws=6, attainment=0.3)
    assert [c.fleet for c in answer.candidates] == Fleet.splits(8)
    for candidate in answer.candidates:
        for figure in candidate.figures.values():
            if math.isfinite(figure.low) and math.isfinite(figure.high):
                assert figure.low <= figure.value <= figure.high
    assert answer.calibrated is False
    assert any("not yet calibrated" in w for w in answer.warnings)


def test_the_same_rows_and_seed_give_the_same_answer() -> None:
    """The same rows and seed give the same answer to the last digit, and the same hash; what is told on the way ends with it."""
    profile = Profile.load("demo")
    rate = busy_rate(profile)
    told: list[tuple[str, int, int, str]] = []
    asked = []
    for _ in range(2):
        calibrate.forget()
        answer = recommend(
            three_runs(profile, rate)[::2],
            lognormal(200, rate, 5),
            gpus=8,
            slo=SLO,
            draws=4,
            attainment=0.3,
            refuse=False,
            note=lambda *said: told.append((*said, "")[:4]),
        )
        asked.append(answer)
    assert asked[0].as_json() == asked[1].as_json()
    assert asked[0].data_hash == asked[1].data_hash
    ended = {step: found for step, done, of, found in told if done == of}
    laws = asked[0].fit.profile
    assert f"a decode step {laws.c0_s * 1e3:.3g} ms + {laws.c1_s * 1e3:.3g} ms a sequence" in ended["fit"]
    first = max(asked[0].candidates, key=lambda c: c.figures["goodput_per_s"].value)
    assert ended["splits"].startswith(
        f"{first.fleet} serves most, {first.figures['goodput_per_s'].value:.3g} req/s within"
    )
    assert f"in {max(c.wins for c in asked[0].candidates) * 4:.0f} of 4 draws" in ended["bootstrap"]
    so_far = [found for step, done, of, found in told if step == "splits" and 0 < done < of]
    assert len(so_far) == 2 * 6
    assert all("serves most so far" in found for found in so_far)


def test_no_usable_run_is_exit_five_with_the_command() -> None:
    """Without a usable run the advisor names the first measurement."""
    profile = Profile.load("demo")
    bad = measured(profile, lognormal(60, 2, 1), Fleet(4, 4), 1)
    bad = replace(bad, run=replace(bad.run, verdict="invalid", reason="send lag p99 80 ms"))
    for data in ([], [bad]):
        with pytest.raises(NotEnoughDataError, match=r"steelyard replay .*--fleet 4:4") as caught:
            recommend(data, lognormal(50, 2, 1), gpus=8, slo=SLO)
        assert caught.value.exit_code == 5
    with pytest.raises(NotEnoughDataError, match=r"--fleet 1:1 .*--gpus-per-worker 4,4"):
        recommend([], lognormal(50, 2, 1), gpus=9, gpus_per_worker=(4, 4), slo=SLO)


ODD: dict[str, dict[str, Any]] = {
    "2 of its workers were mixed": {"fleet": Fleet(2, 4, 2)},
    "policy online moved roles": {"policy": "online"},
    "policy planned moved roles": {"policy": "planned"},
    "held requests back": {"policy": "offline-groups"},
    "another speed than life": {"changes": ("rate x2", "clock x10")},
    "prompts shared prefixes": {"changes": ("rate x2", "prefixes shared")},
}


def test_runs_that_are_no_steady_split_are_left_out_and_said() -> None:
    """What the laws of two stages cannot explain is not fitted: mixed workers, moving roles, a clock that is not life's."""
    rate = busy_rate(demo := Profile.load("demo"))
    data = three_runs(demo, rate)
    odd = [replace(data[0], run=replace(data[0].run, id=90 + k, **ODD[words])) for k, words in enumerate(ODD)]
    answer = recommend([*data, *odd], lognormal(150, 8, 7), gpus=8, slo=SLO, draws=4)
    assert answer.as_json()["runs"] == [1, 2, 3]
    for k, words in enumerate(ODD):
        assert any(line.startswith(f"run {90 + k} left out") and words in line for line in answer.warnings), words


def test_requests_that_were_turned_away_are_no_load() -> None:
    """One in five got a 503 at once: the laws are those of the others to the last digit. It is said, or the run left out."""
    data = three_runs(demo := Profile.load("demo"), busy_rate(demo))

    def with_failed(one: RunData, share: float, **how: Any) -> RunData:
        rows = one.observations
        again = rows.take(np.arange(5, 5 + round(share * len(rows))))
        never = np.full(len(again), np.nan)
        columns = {"status": "failed", "error": "status", "http_status": 503} | how
        held = {k: np.full(len(again), v, dtype=getattr(again, k).dtype) for k, v in columns.items()}
        gone = replace(again, index=again.index + 10_000, first_token_s=never, last_token_s=never, **held)
        return replace(one, observations=Observations.concat([rows, gone]))

    alone, beside = (fit_laws(d, residuals=False) for d in (data, [with_failed(one, 0.25) for one in data]))
    assert beside.profile == alone.profile
    assert beside.seen == alone.seen
    assert len(served(with_failed(data[0], 0.1, error="reset").observations)) == 88  # those may have been computed
    rows = data[2].observations  # a long run, all turned away in its last window
    every = with_failed(data[2], 0.5).observations
    refused = every.take(every.error == "status")
    assert _seen([RunData.of(data[2].run, [rows, refused])], demo).prefill == _seen([data[2]], demo).prefill
    warnings: list[str] = []
    usable = _usable([with_failed(data[0], 0.05), with_failed(data[1], 0.25), data[2]], {}, warnings, (1, 1))
    assert [one.run.id for one in usable] == [1, 3]
    assert warnings[0].startswith("4.8% of the requests of run 1 failed (4 status)")
    assert warnings[1].startswith("run 2 left out: 20% of its requests failed (75 status), more than 10%")
    assert len(warnings) == 2


def test_one_quiet_run_is_not_enough_for_a_busy_question() -> None:
    """Low load alone cannot say how stages behave when loaded: exit 5 and the run that would show it. Nor can prompts that the
    server counts as empty."""
    profile = Profile.load("demo")
    rate = busy_rate(profile)
    (quiet, *_) = three_runs(profile, rate)
    with pytest.raises(NotEnoughDataError, match=r"never loaded.*steelyard replay"):
        recommend([quiet], lognormal(200, rate, 5), gpus=8, slo=SLO, draws=2)
    uncounted = replace(quiet.observations, prompt_tokens=np.zeros_like(quiet.observations.prompt_tokens))
    with pytest.raises(NotEnoughDataError, match="counted 0 tokens in every prompt"):
        fit_laws([replace(quiet, observations=uncounted)])


def test_only_saturated_runs_are_not_enough_either() -> None:
    """Without a run at low load there is no TTFT without a queue: exit 5."""
    profile = Profile.load("demo")
    rate = busy_rate(profile)
    burst = lognormal(200, 1e5, 3)
    with pytest.raises(NotEnoughDataError, match=r"low load.*steelyard replay lognormal-5 --endpoint"):
        recommend([measured(profile, burst, Fleet(1, 7), 1)], lognormal(200, rate, 5), gpus=8, slo=SLO, draws=2)


def with_readings(profile: Profile, schedule: Schedule, fleet: Fleet, number: int) -> RunData:
    """A run as :func:`measured`, with a reading of every worker's counters each half second."""
    samples: list[Sample] = []

    def look(now: float, held: list[Sample], fleet: Fleet, changing: int) -> None:
        samples.extend(held)

    simulate(schedule, fleet, profile, controller=look, tick_s=0.5)
    return replace(measured(profile, schedule, fleet, number), samples=samples)


def test_a_role_that_no_run_loaded_is_not_guessed_from_readings(tmp_path: Path) -> None:
    """The demo without its prefill-saturated run (left out as invalid): a split within 5 % of the best, or exit 5.

    It once took squared prompt lengths for what occupies a worker, saw prefill 1 % busy and advised 1:7, a loss of 31 %.
    """
    profile = Profile.load("demo")
    with open_store(f"sqlite:///{tmp_path}/a.db") as store:
        ingest(store, [shipped(TRACE)], name=TRACE)
        trace = store.schedule(TRACE)
    data = [
        with_readings(profile, scale_rate(head(trace, p.requests), p.factor), p.fleet, i)
        for i, p in enumerate(PROBES, 1)
        if p.what != "prefill saturated"
    ]
    schedule = scale_rate(head(trace, ASKED_REQUESTS), ASKED_FACTOR)
    answer = recommend(data, schedule, gpus=8, slo=SLO, draws=12, refuse=False)
    goodput = truth(profile, schedule)
    assert answer.refused or goodput[answer.best.fleet] >= 0.95 * max(goodput.values()), (answer.best.fleet, goodput)
    edge = next(c for c in answer.candidates if c.fleet == Fleet(1, 7))
    assert edge.prefill_load == pytest.approx(load_of(profile, schedule, edge.fleet).prefill, rel=0.15)


def test_a_role_that_no_run_loaded_is_refused_where_the_answer_depends_on_it() -> None:
    """Client rows of a quiet run and one that saturates decode: what occupies prefill is open, and decides 2:6 or 3:5."""
    profile = replace(Profile.load("demo"), a_s=0.028, overhead_s=0.0, max_batch_requests=1)
    rate = 2 * busy_rate(profile)
    quiet, _, decode = three_runs(profile, rate)
    schedule = lognormal(400, rate, 100)
    with pytest.raises(
        NotEnoughDataError, match=r"prefill was never loaded \(at most \d+% busy\).*--fleet 2:6"
    ) as caught:
        recommend([quiet, decode], schedule, gpus=8, slo=SLO, draws=30)
    assert caught.value.exit_code == 5
    answer = recommend(three_runs(profile, rate), schedule, gpus=8, slo=SLO, draws=8, attainment=0.1)
    goodput = truth(profile, schedule)
    assert goodput[answer.best.fleet] >= 0.95 * max(goodput.values())


def test_a_decode_stage_that_no_run_loaded_is_never_called_sure() -> None:
    """A quiet run and one that saturates prefill: a knee beyond their batches decides, so a run that loads decode comes next.

    Long contexts slowed steps down in these runs as a batch does, and it was sure of 3:5, which loses 66 %.
    """
    bent = replace(Profile.load("demo"), c2_s=1e-6, knee_batch=3, knee_s=0.004, max_batch=200)
    slo, rate = Slo.parse("ttft<3s tpot<40ms"), 16.0

    def traffic(n: int, rate: float, seed: int) -> Schedule:
        return lognormal(n, rate, seed, prompt=2000, output=40)

    schedule = traffic(500, rate, 5)
    goodput = {f: goodput_per_s(simulate(schedule, f, bent).observations, slo) for f in Fleet.splits(8)}
    data = [
        measured(bent, traffic(150, rate * 0.2, 1), Fleet(4, 4), 1),
        measured(bent, traffic(300, rate * 0.5, 2), Fleet(1, 7), 2),
    ]
    answer = recommend(data, schedule, gpus=8, slo=slo, draws=20, refuse=False)
    assert not answer.sure
    assert answer.refused or goodput[answer.best.fleet] >= 0.95 * max(goodput.values())
    probe = answer.next_probe
    assert probe["prefill"] > probe["decode"]
    assert "decode worker was never seen to give more than 39" in probe["why"]
    more = traffic(probe["requests"], probe["rate_per_s"], 9)
    data.append(measured(bent, more, Fleet(probe["prefill"], probe["decode"]), 3))
    answer = recommend(data, schedule, gpus=8, slo=slo, draws=20, refuse=False)
    assert answer.sure
    assert goodput[answer.best.fleet] >= 0.95 * max(goodput.values())


@pytest.mark.parametrize(
    ("mean", "high", "unseen", "excess", "runs", "words"),
    [
        (0.01, 0.02, "", 1.0, 3, ""),
        (0.01, 0.04, "", 1.0, 3, ""),  # some is open, all is explained: an answer, and a next run
        (0.06, 0.20, "", 1.0, 3, "changes with what the runs leave open"),
        (0.01, 0.02, "prefill was never loaded", 1.0, 3, ""),  # it does not matter here
        (0.01, 0.04, "prefill was never loaded", 1.0, 3, "never loaded"),
        (0.01, 0.02, "prefill was never loaded", 1.0, 1, "never loaded"),
        (0.01, 0.02, "", 2.6, 3, ""),
        (0.01, 0.02, "", 4.1, 3, ""),  # a mechanism is missing, and every law drawn says the same
        (0.01, 0.04, "", 4.1, 3, "miss them by 2.0 times what chance does), and 3:5 would lose 4%"),
        (0.00, 0.00, "", 10.1, 3, "cannot be relied on"),
    ],
)
def test_what_is_known_to_be_missing_lowers_what_may_be_lost(
    mean: float, high: float, unseen: str, excess: float, runs: int, words: str
) -> None:
    """An answer that loses little in all draws stands; where a stage or a mechanism is missing, 3 % at worst is too much."""
    said = refusal(Fleet(3, 5), Interval(mean, 0.0, high), unseen, excess, runs)
    assert words in said
    assert bool(said) == bool(words)
    # Enough is known only where little is lost, nothing is missing, and chance explains the misfit.
    assert enough(Interval(mean, 0.0, high), unseen, excess, runs) == (high <= 0.03 and not unseen and excess <= 2.5)


def test_an_slo_that_nothing_meets_is_exit_three() -> None:
    """When no split meets the SLO the advisor says so and how near the best came."""
    profile = Profile.load("demo")
    rate = busy_rate(profile)
    with pytest.raises(NoFleetError, match="no split of 8 GPUs") as caught:
        recommend(three_runs(profile, rate), lognormal(200, rate, 5), gpus=8, slo=Slo.parse("ttft<1ms"), draws=2)
    assert caught.value.exit_code == 3


def test_gpus_that_no_fleet_can_use_up_are_left_and_said() -> None:
    """Eleven GPUs with two a worker are used up to ten, with a warning; so is what a rate needs, and the next run."""
    profile = Profile.load("demo")
    rate, two = busy_rate(profile), (2, 2)
    schedule = lognormal(150, rate * 0.3, 5)
    runs = three_runs(profile, rate)
    answer = recommend(
        [*(replace(one, run=replace(one.run, gpus_per_worker=two)) for one in runs), runs[2]],
        schedule,
        gpus=11,
        gpus_per_worker=two,
        slo=SLO,
        draws=2,
        attainment=0.1,
        current=Fleet(1, 2),
    )
    assert [str(c.fleet) for c in answer.candidates] == ["1:4", "2:3", "3:2", "4:1"]
    assert any("fleets of 10 were compared" in w for w in answer.warnings)
    assert any(
        w.startswith("run 3 left out: it is stored with 1,1 GPUs a worker, 2,2 are asked") for w in answer.warnings
    )
    assert "today's 1:2 is no split of 10 GPUs, so it was not compared" in answer.warnings
    # Runs that do not say it serve as before beside one that does, as long as no law may rest on that one.
    said = replace(run_of(Fleet(2, 3), 40), id=4, gpus_per_worker=two, verdict="invalid", reason="it was late")
    beside = [*runs, RunData(said, runs[0].observations.take(np.arange(40)))]
    assert stored_as(beside, two) == (1, 1)
    assert [one.run.id for one in _usable(beside, {}, [], stored_as(beside, two))] == [1, 2, 3]
    with pytest.raises(NotEnoughDataError, match=r"can be used \(run 1 left out: it is stored with 2,2 GPUs"):
        recommend(
            [replace(runs[0], run=replace(runs[0].run, gpus_per_worker=two))],
            schedule,
            gpus=8,
            slo=SLO,
            current=Fleet(1, 2),
        )
    probe = answer.next_probe
    assert Fleet(probe["prefill"], probe["decode"]).gpus(two) <= 11
    assert probe["command"].endswith(" --gpus-per-worker 2,2")
    # Other worlds are asked of these GPUs and widths, whatever the runs had.
    said = json.loads(text_of(assemble(json.loads(json.dumps(answer.as_json())), [], schedule=schedule), "json"))
    worlds = {row["what if"]: row for row in said["sections"]["whatif"]["table"]}
    assert (worlds["as asked"]["GPUs"], worlds["2 x the rate"]["GPUs"], worlds["20 GPUs"]["GPUs"]) == ("10", "10", "20")
    assert Fleet.parse(worlds["answers half as long"]["best split"].split()[0]).gpus(two) == 10
    assert worlds["as asked"][f"lost by staying with {answer.best.fleet}"].endswith(" %")
    # Halving goes over numbers that make no fleet: 5 of 10.
    found = needed(answer, 0.05, attainment=0.1, gpus_per_worker=two)
    assert (found.gpus, found.prefill, found.decode) == (4, 1, 1)
    assert found.high is None  # the interval of the goodput begins at 0
    figures = answer.best.figures
    narrow = replace(figures["goodput_per_s"], low=0.8 * figures["goodput_per_s"].value)
    firm = replace(answer, best=replace(answer.best, figures=figures | {"goodput_per_s": narrow}))
    assert needed(firm, 0.05, attainment=0.1, gpus_per_worker=two).high == 6  # five would do, and make no fleet


def test_ten_times_the_rate_takes_ten_times_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few requests at a high rate are a burst, which the queues of few workers hold: what lasts counts as well.

    The most GPUs that are tried are that many, though they are no power of two.
    """
    profile = Profile.load("demo")
    rate = busy_rate(profile)
    answer = recommend(three_runs(profile, rate), lognormal(150, rate, 9), gpus=8, slo=SLO, draws=2, attainment=0.5)
    few, many = (needed(answer, factor * rate, attainment=0.8).gpus for factor in (2, 200))
    assert 60 * few < many < 110 * few
    monkeypatch.setattr(advisor.cost, "MOST_GPUS", many)
    assert needed(answer, 200 * rate, attainment=0.8).gpus == many
    monkeypatch.setattr(advisor.cost, "MOST_GPUS", many - 1)
    with pytest.raises(NoFleetError, match=f"no fleet of up to {many - 1} GPUs"):
        needed(answer, 200 * rate, attainment=0.8)


def test_the_size_is_that_of_the_whole_trace_and_not_of_its_beginning() -> None:
    """Prompts that are four times as long in the second half: the fleet that is named keeps the SLO through both."""
    profile = Profile.load("demo")
    data = three_runs(profile, busy_rate(profile))
    answer = recommend(data, lognormal(100, 6.0, 9), gpus=8, slo=SLO, draws=2, refuse=False)
    longer = replace(lognormal(10_000, 6.0, 9), prompt_tokens=np.repeat([200, 800], 5000))
    found = needed(replace(answer, schedule=longer), 60.0, attainment=0.9)
    fleet = Fleet(found.prefill, found.decode)
    rows = simulate(to_rate(longer, 60.0), fleet, answer.fit.profile).observations
    assert summarise(rows, SLO).attainment >= 0.9


def test_what_is_good_is_paid_by_the_tokens_of_good_answers() -> None:
    """Half of the answers are too long for a limit of E2E: what is within it has the others' tokens no more."""
    profile = Profile.load("demo")
    rate = busy_rate(profile)
    answer = recommend(three_runs(profile, rate), lognormal(100, rate, 9), gpus=8, slo=SLO, draws=2, refuse=False)
    mixed = replace(lognormal(100, 1.0, 9), output_tokens=np.tile([50, 1000], 50))
    good = answer.best.figures["goodput_per_s"].value
    found = cost(replace(answer, schedule=mixed, slo=Slo.parse("e2e<4s")), 2.0)
    assert found.usd_per_m_good_output_tokens.value == pytest.approx(8 * 2.0 / 3600 / (good * 50) * 1e6)
    served = answer.best.figures["throughput_per_s"].value
    assert found.usd_per_m_output_tokens.value == pytest.approx(8 * 2.0 / 3600 / (served * 525) * 1e6)


def test_one_gpu_makes_no_fleet() -> None:
    """One GPU cannot hold both roles."""
    with pytest.raises(InputError, match="no fleet"):
        recommend([], lognormal(10, 1, 0), gpus=1, slo=SLO)


@pytest.mark.parametrize("n", [1, 10])
def test_requests_at_one_instant_are_no_traffic(n: int) -> None:
    """A batch and a lone request come at no rate: one line that says so, with the command that spreads them."""
    asked = lognormal(n, 1, 0)
    with pytest.raises(
        InputError, match=rf"its requests \({n} in a row\) are due at one instant.*synth --like lognormal-0"
    ):
        recommend([], replace(asked, due_s=np.zeros(n)), gpus=8, slo=SLO)


@pytest.mark.parametrize("a_minute", [400, 3000])
def test_a_clock_of_minutes_is_no_lack_of_a_rate(a_minute: int) -> None:
    """400 requests an instant: the next run holds more than one instant, so that it has a rate. 3,000: to be spread first."""
    minutes = replace(lognormal(8 * 400, 6.0, 9), due_s=np.arange(8 * 400) // a_minute * 60.0)
    rate = busy_rate(demo := Profile.load("demo"))
    data = three_runs(demo, rate)
    if a_minute == 400:
        probe = recommend(data, minutes, gpus=8, slo=SLO, draws=4, refuse=False).next_probe
        assert math.isfinite(to_rate(head(minutes, probe["requests"]), probe["rate_per_s"]).rate_per_s)
    else:
        with pytest.raises(InputError, match=r"in a row\) are due at one instant.*Spread them"):
            recommend(data, minutes, gpus=8, slo=SLO, draws=4, refuse=False)


def test_fitted_laws_reproduce_the_decode_step() -> None:
    """The decode law predicts the true step time within 5 % over the range of the runs."""
    profile = Profile.load("demo")
    fit = fit_laws(three_runs(profile, busy_rate(profile)))
    for batch in (1, 4, int(fit.seen.batch)):
        context = batch * 1000
        true = profile.c0_s + profile.c1_s * batch + profile.c2_s * context
        ours = fit.profile.c0_s + fit.profile.c1_s * batch + fit.profile.c2_s * context
        assert ours == pytest.approx(true, rel=0.05)


def test_what_a_run_was_before_its_warm_up_ended_is_in_no_law() -> None:
    """Half a minute served by laws five times as slow changes the fit by nothing where the runs call it their warm-up."""
    true = Profile.load("demo")
    slow = replace(true, **{name: 5 * getattr(true, name) for name in ("a_s", "b_s_per_token", "c0_s", "c1_s")})
    data = []
    for one in three_runs(true, busy_rate(true)):
        cold = measured(slow, lognormal(60, 4.0, one.run.id), Fleet(4, 4), one.run.id).observations
        cold = cold.take(cold.last_token_s < 30)
        later = replace(one.observations, **{n: getattr(one.observations, n) + 30 for n in STAMPS})
        data.append(RunData(replace(one.run, warmup_s=30.0), Observations.concat([cold, later])))
    fit = fit_laws(data)
    assert fit.profile.step_s(6.0, 6000.0) == pytest.approx(true.step_s(6.0, 6000.0), rel=0.05)
    prompt = np.array([800.0])
    assert fit.profile.prompt_s(prompt)[0] == pytest.approx(true.prompt_s(prompt)[0], rel=0.15)
    assert max(abs(r["goodput_per_s"]) for r in fit.residuals) < 0.05
    few = RunData(replace(data[0].run, warmup_s=float(data[0].observations.due_s[-19])), data[0].observations)
    with pytest.raises(NotEnoughDataError, match="19 finished requests"):
        recommend([few], lognormal(50, 5, 1), gpus=8, slo=SLO)
    answer = recommend(data, lognormal(100, 5, 1), gpus=8, slo=SLO, draws=2, refuse=False)
    assert answer.n == sum(int((one.observations.ok & (one.observations.due_s >= 30)).sum()) for one in data)
    whole = [replace(one, run=replace(one.run, warmup_s=0.0)) for one in data]
    assert data_hash(whole) != data_hash(data) == answer.data_hash


def test_a_run_is_replayed_with_the_queues_that_its_warm_up_left() -> None:
    """True laws explain what a run shows after its warm-up: an overloaded one, and windows of which the first is all warm-up."""
    demo = Profile.load("demo")

    def off(one: RunData) -> float:
        """Mean square of the misfit, in standard deviations."""
        replay = Replay.of(one, 300)
        assert replay.rows.sum() > 50
        assert (replay.seen.due_s[replay.rows] >= one.run.warmup_s).all()
        return float(np.nanmean(((replay.expected(demo) - replay.observed) / STATISTIC_SD) ** 2))

    late = measured(demo, lognormal(400, 4.0, 3), Fleet(7, 1), 3)
    assert late.observations.ttft_s[300:].min() > 10
    assert off(replace(late, run=replace(late.run, warmup_s=60.0))) < 1
    long = measured(demo, lognormal(1600, 4.0, 4, output=400), Fleet(3, 5), 4)
    windows = [long.observations.take(np.arange(at, at + 400)) for at in (0, 450, 1200)]
    assert off(RunData.of(replace(long.run, warmup_s=float(windows[1].due_s[0])), windows)) < 1


def test_goodput_of_the_runs_is_missed_by_the_slo_that_is_asked() -> None:
    """Runs that were made without an SLO: what the laws miss is their goodput within the question's, not their throughput."""
    data = three_runs(Profile.load("demo"), busy_rate(Profile.load("demo")))
    fit = recommend(data, lognormal(100, 5, 1), gpus=8, slo=SLO, draws=2, refuse=False).fit
    for one, missed in zip(data, fit.residuals, strict=True):
        assert not one.run.slo
        fleet = one.run.fleet
        assert fleet is not None
        ours = simulate(one.observations.asked("x"), fleet, fit.profile).observations
        ratio = goodput_per_s(ours, SLO) / goodput_per_s(one.observations, SLO)
        assert missed["goodput_per_s"] == pytest.approx(math.log(ratio), abs=1e-9)
    assert fit.spread["goodput_per_s"] > 1.5 * fit.spread["throughput_per_s"]


def test_relative_nnls_finds_known_coefficients_through_foreign_rows() -> None:
    """Known coefficients are found to 2 % although one row in twenty is three times too slow."""
    rng = np.random.default_rng(3)
    n = rng.uniform(10, 4000, 400)
    y = 0.02 + 1e-4 * n + 2e-8 * n * n
    y = y * np.exp(rng.normal(0, 0.01, 400))
    y[::20] *= 3
    x = np.column_stack([np.ones(400), n, n * n])
    found, error = relative_nnls(x, y, np.ones(400))
    assert error < 0.02
    for at in (50, 500, 3000):
        assert found @ [1, at, at * at] == pytest.approx(0.02 + 1e-4 * at + 2e-8 * at * at, rel=0.02)


def candidate(
    fleet: str,
    goodput: tuple[float, float],
    p99: float,
    stressed: float = math.nan,
    kept: tuple[float, float] = (1, 1),
    *,
    meets: bool = True,
) -> Candidate:
    """goodput, kept: (value, low)."""
    figures = {
        "goodput_per_s": Interval(goodput[0], goodput[1], goodput[0] * 1.1),
        "e2e_p99_s": Interval(p99, p99, p99),
    }
    return Candidate(
        Fleet.parse(fleet), figures, 0.9, {}, 0.5, meets, 0.5, 4.0, stressed=stressed, kept=Interval(*kept, 1.0)
    )


@pytest.mark.parametrize(
    ("candidates", "order"),
    [
        # the lower bound decides, not the point
        ([candidate("4:4", (10, 6), 1), candidate("3:5", (9.5, 9), 1)], "3:5 4:4"),
        # within 1 % of the best lower bound the smaller P99 wins, so that ties do not pick an edge
        (
            [candidate("1:7", (10, 10), 9), candidate("3:5", (9.95, 9.95), 2), candidate("4:4", (9, 9), 1)],
            "3:5 1:7 4:4",
        ),
        # a P99 that is not known loses a tie
        ([candidate("1:7", (10, 10), math.nan), candidate("3:5", (10, 10), 5)], "3:5 1:7"),
        # P99s that the laws do not tell apart: the split that slower roles hurt less
        ([candidate("2:6", (10, 10), 5, 8), candidate("3:5", (10, 10), 5.2, 9)], "3:5 2:6"),
        # of P99s that they do tell apart the smaller one
        ([candidate("2:6", (10, 10), 5, 8), candidate("3:5", (10, 10), 5.3, 9)], "2:6 3:5"),
        # a constraint that is missed by a hair, against half the goodput
        ([candidate("1:7", (10, 10), 1, kept=(0.999, 0.99)), candidate("3:5", (5, 4), 9)], "3:5 1:7"),
        # of those that meet it the one that surely does; of those that miss it the nearest
        ([candidate("1:7", (10, 10), 1, kept=(1, 0.8)), candidate("3:5", (10, 10), 9)], "3:5 1:7"),
        ([candidate("1:7", (10, 10), 1, kept=(0.5, 0.4)), candidate("3:5", (9, 9), 9, kept=(0.8, 0.7))], "3:5 1:7"),
        # of those that keep the constraints one that enough requests are within the limits of, if only just; constraints first
        ([candidate("1:7", (10, 10), 1, meets=False), candidate("3:5", (9.5, 9), 9)], "3:5 1:7"),
        (
            [
                candidate("1:7", (10, 10), 1, kept=(0.9, 0.9)),
                candidate("3:5", (9, 9), 9, meets=False),
                candidate("4:4", (9.95, 9.95), 1, meets=False),
            ],
            "4:4 3:5 1:7",
        ),
    ],
)
def test_the_decision_is_lexicographic(candidates: list[Candidate], order: str) -> None:
    """Constraints, attainment, lower bound of goodput, P99, fewest GPUs, nearest to what runs."""
    assert " ".join(str(c.fleet) for c in rank(candidates, None, (1, 1))) == order


def test_the_one_split_that_meets_the_slo_is_simulated_under_every_draw() -> None:
    """Of eleven splits as good as each other, eight of which the draws tell apart, it has the longest tail."""
    demo, asked, loose = Profile.load("demo"), lognormal(150, 2.0, 5), Slo.parse("e2e<60s")
    points = {f: Simulated.of(simulate(asked, f, demo), loose, 0.9) for f in Fleet.splits(12)}
    good = [f for f in points if points[f].worth_per_s >= 0.9 * max(p.worth_per_s for p in points.values())]
    late = max(good, key=lambda f: points[f].summary.e2e_p99_s)
    found = _likely(asked, {f: replace(p, meets=f == late) for f, p in points.items()}, [demo], loose)
    assert len(found) == LIKELY < len(good)
    assert late in found


def test_a_split_that_the_attainment_rules_out_is_no_rival() -> None:
    """Long answers: 2:6 serves more, later: of the fewest within the TTFT. The one that reaches the bar is no loss beside it."""
    demo, slo = Profile.load("demo"), Slo.parse("ttft<0.3s")
    asked, data = lognormal(300, 2 * busy_rate(demo), 5, output=800), three_runs(demo, busy_rate(demo))
    free, barred = (
        recommend(data, asked, gpus=8, slo=slo, draws=6, attainment=bar, refuse=False) for bar in (0.0, 0.29)
    )
    assert (str(free.best.fleet), str(barred.best.fleet)) == ("2:6", "3:5")
    assert free.best.worth_per_s > 1.05 * barred.best.worth_per_s
    assert barred.regret.value < 0.02
    assert barred.best.wins > 0.5
    assert sum(c.wins for c in barred.candidates) == pytest.approx(1)
    assert not barred.refused.startswith("the best split changes")
    points = {f: Simulated.of(simulate(asked, f, demo), slo, 0.29) for f in Fleet.splits(8)}
    slow = {f: replace(p, meets=str(f) == "6:2") for f, p in points.items()}
    assert Fleet(6, 2) in _likely(asked, slow, [demo], slo)


def test_equal_fleets_are_told_apart_by_what_runs_today() -> None:
    """Of two equal candidates the one nearer to the running fleet wins; one that slower roles hurt is not equal."""
    equal = [candidate("2:6", (10, 10), 1, 9), candidate("5:3", (10, 10), 1, 8.92)]
    assert rank(equal, Fleet(6, 2), (1, 1))[0].fleet == Fleet(5, 3)
    assert rank([equal[0], replace(equal[1], stressed=8.0)], Fleet(6, 2), (1, 1))[0].fleet == Fleet(2, 6)


def test_slower_roles_hurt_the_split_that_stands_near_a_cliff() -> None:
    """At full load the balanced split keeps more of its goodput than one with a worker too few on either side."""
    demo = Profile.load("demo")
    asked = lognormal(400, busy_rate(demo), 3)
    held = [stressed(asked, f, demo, SLO) for f in (Fleet(1, 7), Fleet(2, 6), Fleet(7, 1))]
    assert max(held) == held[1]


def test_of_equal_fleets_fewest_gpus_then_nearest() -> None:
    """Fewer GPUs go before nearness; 1 % off the best, in bound or value, is as good, more is not; each rank is a new choice."""
    equal = [candidate("2:3", (10, 10), 1), candidate("4:1", (10, 10), 1)]  # 8 and 6 GPUs
    assert [c.fleet for c in rank(equal, Fleet(2, 3), (1, 2))] == [Fleet(4, 1), Fleet(2, 3)]
    assert rank(equal, Fleet(2, 3), (1, 1))[0].fleet == Fleet(2, 3)
    for bound, value, first in ((9.9, 10.0, "3:5"), (9.89, 10.0, "4:4"), (10.0, 9.9, "3:5"), (10.0, 9.89, "4:4")):
        two = [candidate("4:4", (10.0, 10.0), 2), candidate("3:5", (value, bound), 1)]
        assert str(rank(two, None, (1, 1))[0].fleet) == first, (bound, value)
    assert rank([], None, (1, 1)) == []
    three = [candidate("1:7", (5, 5), 1), candidate("2:6", (10, 10), 9), candidate("3:5", (9, 9), 5)]
    assert [str(c.fleet) for c in rank(three, None, (1, 1))] == ["2:6", "3:5", "1:7"]


def test_regret_is_what_the_choice_loses_in_each_draw() -> None:
    """A share of each draw's best, mean and 95 % quantile; draws in which nobody serves lose nothing; no draws, nothing known."""
    found = _regret(np.array([[10.0, 8.0], [5.0, 10.0], [0.0, 0.0], [4.0, 4.0]]), 0)
    assert found.value == pytest.approx(0.5 / 4)
    assert found.low == 0.0
    assert found.high == pytest.approx(np.quantile([0.0, 0.5, 0.0, 0.0], 0.95))
    assert _regret(np.array([[10.0, 8.0]]), 1).value == pytest.approx(0.2)
    assert _regret(np.array([[0.5, 0.25]]), 1).value == pytest.approx(0.5)  # little goodput is goodput
    none = _regret(np.zeros((0, 3)), 0)
    assert math.isnan(none.value)
    assert math.isnan(none.high)
    assert none.low == 0.0


def test_rows_that_another_client_measured_are_advised_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three CSVs of times and counts, imported with their fleets, and no trace: the answer is within 2 % of the best split."""
    profile, url = Profile.load("demo"), f"sqlite:///{tmp_path}/a.db"
    rate = busy_rate(profile)
    for data in three_runs(profile, rate):
        rows, path = data.observations, tmp_path / f"{data.run.id}.csv"
        names = ("due_s", "first_token_s", "last_token_s", "prompt_tokens", "output_tokens")
        columns = (rows.due_s, rows.first_token_s, rows.last_token_s, rows.prompt_lengths, rows.tokens)
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([names, *zip(*(c.tolist() for c in columns), strict=True)])
        fleet = str(data.run.fleet)
        assert main(["runs", "import", str(path), "--fleet", fleet, "--slo", str(SLO), "--db", url]) == 0
    with open_store(url) as store:
        schedule = to_rate(store.observations(3).asked("x"), rate)
    capsys.readouterr()
    asked = ["--gpus", "8", "--rate", str(rate), "--attainment", "0.4", "--strategy", "static"]
    export = ["--export", "keda", "--export-out", str(tmp_path / "keda.yaml")]  # standing still needs no autoscaler
    assert main(["advise", *asked, *export, "--db", url, "--json"]) == 1
    said = capsys.readouterr()
    assert "this answer is to stand still" in said.err
    assert not (tmp_path / "keda.yaml").exists()
    answer = json.loads(said.out)  # it is given all the same, in one object
    assert answer["exit_code"] == 1
    assert answer["asked"]["strategy"] == "static"
    assert answer["error"] in said.err
    assert main(["runs", "--db", url, "--json"]) == 0
    (kept,) = json.loads(capsys.readouterr().out)["recommendations"]
    assert (kept["recommendation"], kept["runs"]) == (answer["recommendation"], [1, 2, 3])
    assert (kept["data_hash"], kept["sentence"]) == (answer["data_hash"], answer["sentence"])
    assert main(["runs", "--db", url]) == 0
    assert f"runs 1, 2, 3  data {kept['data_hash'][:12]}: {kept['sentence']}" in capsys.readouterr().out
    other = f"sqlite:///{tmp_path}/b.db"
    with open_store(other) as store:  # no run that can be used: the refusal has its next run as a key, too
        run = store.begin_run(replace(data.run, verdict="invalid", reason="late"))
        store.add_observations(run.id, data.observations)
        store.end_run(run)
    capsys.readouterr()
    assert main(["advise", "--gpus", "8", "--db", other, "--json"]) == 5
    held = json.loads(capsys.readouterr().out)
    assert held["next_probe"]["command"] in held["error"]
    assert (held["exit_code"], held["next_probe"]["prefill"]) == (5, 4)
    assert main(["advise", "--gpus-per-worker", "2,4", "--db", other, "--json"]) == 5  # of as many workers as it had
    probe = json.loads(capsys.readouterr().out)["next_probe"]
    assert Fleet(probe["prefill"], probe["decode"]).gpus((2, 4)) <= data.run.fleet.gpus((2, 4))
    goodput = truth(profile, schedule)
    chosen = Fleet(answer["prefill"], answer["decode"])
    assert goodput[chosen] >= 0.98 * max(goodput.values())


# --- what a change of roles costs -------------------------------------------------------------------------------------


def moved(profile: Profile, number: int) -> tuple[RunData, list[FleetChange]]:
    """A run that went from 4:4 to 2:6 and back, with what its control saw of it, readings a tenth of a second apart."""
    schedule = lognormal(300, busy_rate(profile) * 0.6, number)
    half, late = float(schedule.due_s[100]), float(schedule.due_s[200])
    there, back = Fleet(4, 4), Fleet(2, 6)
    made = simulate(schedule, there, profile, changes=[(half, back), (late, there)])
    run = replace(run_of(there, len(schedule)), id=number, trace=schedule.name, policy="planned")
    changes = []
    for at, before, after in ((half, there, back), (late, back, there)):
        ready = max(s.ready_s for s in made.switches if s.asked_s == at)
        seen = math.ceil(ready * 10) / 10
        changes.append(FleetChange(at, seen, before, after, "planned", joined_s=seen))
    return RunData(run, made.observations), changes


@pytest.mark.parametrize("flip_s", [0.0, 0.5, 4.0])
def test_the_flip_is_what_a_move_takes_beyond_its_drain(flip_s: float) -> None:
    """Found to a poll of the control; a change that never was in force tells nothing, nor does no change, nor does a run that
    the other laws may not rest on either.
    """
    true = replace(Profile.load("demo"), flip_s=flip_s)
    one, changes = moved(true, 31)
    law = flip_law([(one, changes)], Profile.load("demo"))
    assert law is not None
    assert law.coefficients["flip_s"] == pytest.approx(flip_s, abs=0.1)
    assert law.n == 1
    spoilt = [{"verdict": "invalid"}, {"verdict": ""}, {"changes": ("clock x10",)}, {"changes": ("prefixes shared",)}]
    others = [RunData(replace(one.run, id=40 + k, **how), one.observations) for k, how in enumerate(spoilt)]
    failed = np.where(np.arange(len(one.observations)) % 5 == 0, "failed", one.observations.status).astype(object)
    others.append(RunData(one.run, replace(one.observations, status=failed)))
    quick = [replace(c, joined_s=c.asked_s) for c in changes]
    assert flip_law([(one, changes), *((other, quick) for other in others)], Profile.load("demo")) == law
    assert flip_law([(others[0], quick)], true) is None
    never = [replace(c, ready_s=math.nan, joined_s=math.nan) for c in changes]
    assert flip_law([(one, never)], true) is None
    grown = [replace(changes[0], after=Fleet(5, 4))]
    assert flip_law([(one, grown)], true) is None
    assert flip_law([(one, [])], true) is None


def test_a_group_and_an_endpoint_together_are_what_both_have(tmp_path: Path) -> None:
    """--endpoint-name beside --group or --run narrows them; it was ignored."""
    with open_store(f"sqlite:///{tmp_path}/a.db") as store:
        for group, model in (("g", "a"), ("g", "b"), ("h", "a")):
            store.end_run(store.begin_run(replace(run_of(Fleet(1, 1)), id=0, group=group, model=model)))

        def chosen(**how: Any) -> list[int]:
            return [run.id for run in choose_runs(store, **how)]

        assert chosen(group="g") == [1, 2]
        assert chosen(group="g", endpoint="a") == [1]
        assert chosen(ids=[1, 3], endpoint="a") == [1, 3]
        assert chosen(ids=[2, 3], endpoint="a") == [3]
        assert chosen() == [1, 3]
        with pytest.raises(InputError, match="no run was made against 'b'"):
            chosen(group="h", endpoint="b")


def test_a_run_that_changed_roles_gives_the_profile_its_flip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the database: the run stays out of the other laws, its changes are in the answer's laws and profile.

    A target rate that no fleet keeps costs nothing of the answer.
    """
    monkeypatch.setattr(advisor.cost, "MOST_GPUS", 8)
    monkeypatch.setattr(traces.store, "LOCKED_S", 0.1)
    true = replace(Profile.load("demo"), flip_s=3.0)
    schedule = lognormal(150, busy_rate(true) * 0.8, 8)
    with open_store(f"sqlite:///{tmp_path}/a.db") as store:
        for one, changes in [*((d, []) for d in three_runs(true, busy_rate(true))), moved(true, 4)]:
            run = store.begin_run(one.run)
            store.add_observations(run.id, one.observations)
            for change in changes:
                store.add_fleet_change(run.id, change)
            store.end_run(run)
        asked = {"gpus": 8, "slo": str(SLO), "attainment": 0.5, "target_rate_per_s": 1e5}
        answer = advise(store, schedule=schedule, warnings=["the budget was spent"], **asked)
        kept = store.recommendation(answer.id)
        assert "needed" not in kept
        assert kept["warnings"] == answer.recommendation.warnings
        assert "the budget was spent" in kept["warnings"]
        # Nobody said of how many GPUs the workers are: they are as is asked, and so are the 16 GPUs that the latest run had.
        wide = advise(store, slo=str(SLO), attainment=0.5, schedule=schedule, gpus_per_worker=(2, 2)).recommendation
        assert any("taken to be of 2,2 GPUs a worker" in line for line in wide.warnings)
        assert (wide.gpus, wide.runs) == (16, [1, 2, 3])
        assert [str(c.fleet) for c in wide.candidates] == [str(c.fleet) for c in answer.recommendation.candidates]
        assert wide.fit.laws[-1].stage == "role change"
        assert (
            "--gpus-per-worker" not in wide.next_probe["command"]
        )  # it would be stored as another size than the others
        # One that was said is another stage than the others, which tell nothing of it: not even what a change costs.
        for one in three_runs(true, busy_rate(true)):
            run = store.begin_run(replace(one.run, gpus_per_worker=(2, 2)))
            store.add_observations(run.id, one.observations)
            store.end_run(run)
        wide = advise(store, slo=str(SLO), attainment=0.5, schedule=schedule, gpus_per_worker=(2, 2)).recommendation
        assert (wide.gpus, wide.runs) == (16, [5, 6, 7])
        assert wide.fit.laws[-1].stage != "role change"
        assert any(line.startswith("run 4 left out") for line in wide.warnings)
        # One that nothing rests on does not say the size either.
        bad = replace(run_of(Fleet(1, 1), 40), id=0, gpus_per_worker=(4, 4), verdict="invalid", reason="late")
        store.end_run(store.begin_run(bad))
        with closing(sqlite3.connect(tmp_path / "a.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")  # what cannot be stored is answered all the same
            unkept = advise(store, gpus=16, slo=str(SLO), attainment=0.5, schedule=schedule)
        wide = unkept.recommendation
        assert (wide.gpus_per_worker, wide.runs) == ((2, 2), [5, 6, 7])
        assert (unkept.as_json()["recommendation"], "locked" in wide.warnings[-1]) == (None, True)
    assert any("no fleet of up to 8 GPUs keeps" in w for w in answer.recommendation.warnings)
    assert answer.recommendation.fit.profile.flip_s == pytest.approx(3.0, abs=0.2)
    assert answer.recommendation.fit.laws[-1].stage == "role change"
    assert any(w.startswith("run 4 left out: policy planned") for w in answer.recommendation.warnings)
