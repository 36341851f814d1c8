"""Policies: the report's rules are what the report says, ours do not oscillate, and orders hold every request once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen import policy
from loadgen.cluster import Profile, simulate
from loadgen.policy import BacklogRule, CountRule, Queues, State, Steering
from traces.errors import InputError
from traces.measures import Slo
from traces.records import Fleet, Sample, Schedule

ORIGIN = Profile.load("origin")


def queues(pw: int = 0, pt: int = 0, dw: int = 0, dr: int = 0) -> Queues:
    return Queues(pw, pt, dw, dr, 0)


@pytest.mark.parametrize(
    ("prefill", "decode", "wanted"),
    [
        (None, None, None),
        (1.0, None, "prefill"),
        (None, 1.0, "decode"),
        (1.0, 2.0, "prefill"),
        (2.0, 1.0, "decode"),
        (1.0, 1.0, "prefill"),  # of two that wait equally long the earlier stage
    ],
)
def test_first_in_is_first_served(prefill: float | None, decode: float | None, wanted: str | None) -> None:
    """An idle GPU takes the phase whose head has waited longest."""
    assert policy.next_phase(prefill, decode) == wanted


@pytest.mark.parametrize(
    ("p", "d", "fleet", "wanted"),
    [
        (4, 2, Fleet(2, 2), Fleet(3, 1)),  # 4 > 1.5 x 2
        (3, 2, Fleet(2, 2), None),  # 3 is not more than 1.5 x 2
        (0, 1, Fleet(2, 2), Fleet(1, 3)),
        (0, 0, Fleet(2, 2), None),
        (9, 0, Fleet(3, 1), None),  # at least one worker a role
        (0, 9, Fleet(1, 3), None),
    ],
)
def test_the_reports_rule_compares_counts(p: int, d: int, fleet: Fleet, wanted: Fleet | None) -> None:
    """1.5 times the other queue moves one GPU, whatever the requests are worth in seconds."""
    assert CountRule().decide(State(), queues(pw=p, dw=d), fleet, 0, 0.0)[1] == wanted


def test_our_rule_counts_seconds_and_not_requests() -> None:
    """Ten short answers that wait weigh less than two long prompts."""
    rule = BacklogRule(ORIGIN, 400, 200, more_s=1.0, ratio=1.5)
    waiting = queues(pw=2, pt=8000, dw=1, dr=2)
    assert CountRule().decide(State(), queues(pw=2, pt=8000, dw=4, dr=2), Fleet(2, 2), 0, 0.0)[1] == Fleet(1, 3)
    _, target, why = rule.decide(State(), waiting, Fleet(2, 2), 0, 0.0)
    assert target == Fleet(3, 1)
    assert "8.00 s of prompts and 1.00 s of answers wait" in why


def test_our_rule_does_not_take_what_the_donors_need() -> None:
    """A move that would leave the other stage worse off than this one is now is not made."""
    rule = BacklogRule(ORIGIN, 400, 200, more_s=0.5, ratio=1.5)
    # 2 s of prompts wait a worker; both decode workers are busy, one would push a running answer out for 2 s
    assert rule.decide(State(), queues(pw=2, pt=2000, dr=2), Fleet(2, 2), 0, 0.0)[1] is None
    assert rule.decide(State(), queues(pw=2, pt=2000, dr=1), Fleet(2, 2), 0, 0.0)[1] == Fleet(3, 1)


def test_our_rule_does_not_turn_back_at_once() -> None:
    """After a move nothing goes the other way while a worker changes or the cool-down lasts; the same way it may go on."""
    rule = BacklogRule(ORIGIN, 400, 200, more_s=0.5, ratio=1.5, cool_s=10.0)
    state, target, _ = rule.decide(State(), queues(pw=3, pt=9000), Fleet(1, 4), 0, 100.0)
    assert target is not None
    back = queues(dw=9, dr=target.decode)
    assert rule.decide(state, back, target, 0, 105.0)[1] is None
    assert rule.decide(state, back, target, 1, 120.0)[1] is None
    assert rule.decide(state, back, target, 0, 120.0)[1] is not None


def test_our_rule_waits_for_its_dwell() -> None:
    """A wish must hold for the dwell time before anything moves."""
    rule = BacklogRule(ORIGIN, 400, 200, more_s=0.5, dwell_s=2.0)
    state, target, _ = rule.decide(State(), queues(pw=3, pt=9000), Fleet(2, 2), 0, 0.0)
    assert (state.wish, target) == ("prefill", None)
    state, target, _ = rule.decide(state, queues(), Fleet(2, 2), 0, 1.0)
    assert state.wish == ""
    state, _, _ = rule.decide(state, queues(pw=3, pt=9000), Fleet(2, 2), 0, 2.0)
    assert rule.decide(state, queues(pw=3, pt=9000), Fleet(2, 2), 0, 4.0)[1] is not None


def test_a_slow_decode_step_is_a_reason_of_its_own() -> None:
    """With a TPOT limit workers go to decode when its step is too long, and never leave it so."""
    laws = Profile(name="t", b_s_per_token=1e-4, c0_s=0.01, c1_s=0.002)
    rule = BacklogRule(laws, 100, 100, Slo.parse("tpot<50ms"), more_s=0.5)
    _, target, why = rule.decide(State(), queues(dr=60), Fleet(3, 2), 0, 0.0)
    assert target == Fleet(2, 3)
    assert "over the limit" in why
    assert rule.decide(State(), queues(pw=9, pt=90_000, dr=36), Fleet(2, 2), 0, 0.0)[1] is None


@given(
    st.integers(1, 8),
    st.integers(1, 8),
    st.integers(0, 200),
    st.integers(0, 200),
    st.integers(0, 200),
    st.sampled_from([0.1, 1.0]),
)
def test_a_rule_never_leaves_a_role_empty_nor_makes_workers(
    p: int, d: int, pw: int, dw: int, dr: int, more: float
) -> None:
    """Whatever waits, the fleet asked for has the same workers and at least one a role."""
    for rule in (CountRule(), BacklogRule(ORIGIN, 400, 200, more_s=more)):
        _, target, why = rule.decide(State(), queues(pw, pw * 400, dw, dr), Fleet(p, d), 0, 0.0)
        if target is not None:
            assert target.workers == p + d
            assert min(target.prefill, target.decode) >= 1
            assert why


def test_a_steady_load_moves_nothing_back_and_forth() -> None:
    """Under a constant load that the split carries, the report's rule moves workers all the time and ours does not."""
    n = 300
    schedule = Schedule("s", np.arange(n), np.arange(n) * 0.5, np.full(n, 400), np.full(n, 200))
    moves = {}
    for name, rule in (("report", CountRule()), ("ours", BacklogRule(ORIGIN, 400, 200, more_s=0.5, cool_s=10.0))):
        steering = Steering(rule)
        simulate(schedule, Fleet(3, 5), ORIGIN, controller=steering)
        moves[name] = len(steering.moves)
    assert moves["ours"] == 0
    assert moves["report"] >= moves["ours"]


@pytest.mark.parametrize("kv_tokens", [0, 50_000])
def test_a_simulated_rule_sees_the_context_that_is_in_place(kv_tokens: int) -> None:
    """Ten answers of 1,000 tokens to prompts of 200, evenly through: 700 each, as engines tell it, also where 1,200 are reserved.

    As many are admitted as before: where 1,200 each have room, ten; where not, nine; then the KV cache is full, as an engine's is
    that admits no more, though a half is in place.
    """
    laws = Profile(name="t", c0_s=0.01, kv_tokens=kv_tokens)
    schedule = Schedule("s", np.arange(10), np.arange(10.0), np.full(10, 200), np.full(10, 1000))
    seen: list[Sample] = []

    def watch(now_s: float, samples: Sequence[Sample], fleet: Fleet, changing: int) -> None:
        seen.extend(s for s in samples if s.role == "decode")

    simulate(schedule, Fleet(1, 1), laws, controller=watch, tick_s=9.5)
    sample = seen[0]
    assert sample.running_requests == 10
    assert (sample.kv_used_tokens or 0) / 10 == pytest.approx(700, abs=10)
    assert sample.kv_used_ratio == (pytest.approx(12_000 / kv_tokens) if kv_tokens else None)
    seen.clear()
    full = replace(laws, kv_tokens=11_999)
    simulate(schedule, Fleet(1, 1), full, controller=watch, tick_s=9.5)
    assert (seen[0].running_requests, seen[0].waiting_requests) == (9, 1)
    queues = Queues.of(seen[:1])
    assert queues.decode_context_tokens < 0.6 * full.kv_tokens
    rule = policy.DemandRule(full, 200, 1000, Slo.parse("tpot<10s"))
    assert rule.loads(0.0, 10.0, queues, Fleet(1, 1))[1] == pytest.approx(1.0, abs=1e-3)
    assert rule.loads(0.0, 10.0, queues, Fleet(1, 2))[1] == pytest.approx(0.5, abs=1e-3)
    assert policy.EasyRule(full, 1200).decide(State(), replace(queues, decode_waiting=2), Fleet(2, 1), 0, 0.0)[
        1
    ] == Fleet(1, 2)
    untold = Queues.of([replace(seen[0], kv_used_ratio=None)])  # of an engine that tells no share
    assert rule.loads(0.0, 9.0, untold, Fleet(1, 1))[1] == pytest.approx(queues.decode_context_tokens / 11_999)


def test_queues_are_sums_by_role() -> None:
    """Readings of workers become one view; what a server does not report counts as nothing."""
    seen = Queues.of(
        [
            Sample(0.0, "0", "prefill", waiting_requests=2, waiting_tokens=500, running_requests=1),
            Sample(0.0, "1", "prefill", waiting_requests=1, waiting_tokens=None),
            Sample(0.0, "2", "decode", waiting_requests=3, running_requests=7, kv_used_tokens=900),
        ]
    )
    assert seen == Queues(3, 500, 3, 7, 900)
    in_hand = [
        Sample(0.0, "0", "prefill", inflight_requests=13),
        Sample(0.0, "1", "decode", inflight_requests=39, running_requests=33),
        Sample(0.0, "2", "decode", inflight_requests=5, waiting_requests=1, running_requests=4),
    ]
    assert Queues.of(in_hand) == Queues(13, 0, 7, 37)  # those in hand that do not run wait
    alone = [Sample(0.0, "d", "decode", inflight_requests=50)]  # a router's word: nobody says how many run
    assert Queues.of(alone) == Queues(0, 0, 0, 50)


# --- offline --------------------------------------------------------------------------------------------------------

LENGTHS = st.lists(st.tuples(st.integers(1, 4096), st.integers(1, 2048)), min_size=1, max_size=60)


@given(LENGTHS)
def test_orders_and_groups_hold_every_request_once(lengths: list[tuple[int, int]]) -> None:
    """Each order is a permutation; groups are ascending and no longer than a quarter above their first."""
    prompt, output = (np.array(column) for column in zip(*lengths, strict=True))
    for how in policy.ORDERS:
        assert sorted(policy.order(how, prompt, output, ORIGIN)) == list(range(len(prompt)))
    batches = policy.groups(prompt)
    assert sorted(i for b in batches for i in b) == list(range(len(prompt)))
    for batch in batches:
        assert prompt[batch].tolist() == sorted(prompt[batch].tolist())
        assert prompt[batch[-1]] <= 1.25 * prompt[batch[0]]
    with pytest.raises(ValueError, match="known"):
        policy.order("by magic", prompt, output, ORIGIN)


@given(LENGTHS.filter(lambda held: len(held) <= 6))
def test_johnsons_rule_is_the_best_order_for_two_machines(lengths: list[tuple[int, int]]) -> None:
    """On one prefill and one decode worker no permutation ends earlier than the two-stage order."""
    from itertools import permutations

    prompt, output = (np.array(column) for column in zip(*lengths, strict=True))
    first, second = prompt * ORIGIN.b_s_per_token, output * ORIGIN.c0_s

    def makespan(rows: list[int] | tuple[int, ...]) -> float:
        one = two = 0.0
        for i in rows:
            one += first[i]
            two = max(one, two) + second[i]
        return two

    best = min(makespan(rows) for rows in permutations(range(len(prompt))))
    assert makespan(policy.order("two-stage", prompt, output, ORIGIN)) == pytest.approx(best)


def test_johnsons_rule_counts_what_a_request_alone_costs() -> None:
    """A prefill step's fixed and quadratic parts, and both parts of a decode step: each decides an order of its own."""
    laws = replace(ORIGIN, a_s=0.5, b_s_per_token=1e-3, c_s_per_token2=1e-6, c0_s=0.01, c1_s=0.01)
    prompt = np.array([100, 1000, 100, 1000])
    # prefill 0.61, 2.5, 0.61, 2.5 s; decode 0.6, 2.4, 0.62, 2.52 s: the last two are decode's
    assert policy.order("two-stage", prompt, np.array([30, 120, 31, 126]), laws) == [2, 3, 1, 0]
    assert policy.order("two-stage", prompt, np.array([31, 125, 31, 125]), laws) == [
        0,
        2,
        1,
        3,
    ]  # 2.5 is no shorter than 2.5


def test_history_foretells_answers_where_it_can() -> None:
    """Answers that follow from prompts are foretold, and the order is the oracle's; others are foretold as their mean."""
    rng = np.random.default_rng(0)
    past, prompt = rng.integers(1, 1000, 2000), rng.permutation(np.arange(10, 990, 10))
    foretold = policy.predicted(prompt, past, 3 * past)
    assert np.abs(foretold - 3 * prompt).max() < 100
    oracle = policy.order("longest-decode", prompt, 3 * prompt, ORIGIN)
    found = policy.order("longest-decode", prompt, foretold, ORIGIN)
    assert policy.rank_correlation(prompt[found], prompt[oracle]) > 0.99
    blind = policy.predicted(prompt, past, rng.integers(1, 201, 2000))
    assert abs(float(blind.mean()) - 100) < 10
    assert policy.predicted(np.array([5]), np.array([7]), np.array([9])).tolist() == [9]


def test_rank_correlation_is_spearmans() -> None:
    """As scipy counts it, ties too; nothing varies, nothing correlates."""
    from scipy.stats import spearmanr

    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 9, 50), rng.integers(0, 9, 50)
    assert policy.rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert policy.rank_correlation(np.array([1, 2]), np.array([5, 5])) == 0.0


# --- static ---------------------------------------------------------------------------------------------------------


def test_the_reports_formula_forgets_what_a_decode_token_costs() -> None:
    """h = 0.68 gives P/G = 0.81 of the GPUs, where the work is balanced at 0.4."""
    prompt, output = np.array([680]), np.array([320])
    assert policy.report_split(prompt, output, 8) == Fleet(6, 2)
    assert policy.balanced(prompt, output, ORIGIN, 8) == Fleet(2, 6)  # 1.36 s against 3.2 s of work
    assert policy.report_split(np.array([4096]), np.array([1]), 8) == Fleet(7, 1)
    assert math.isclose(2 * 0.68 / 1.68, 0.81, abs_tol=0.01)


# --- the arithmetic, by hand ----------------------------------------------------------------------------------------

LAWS = Profile(
    name="t", a_s=0.01, b_s_per_token=1e-3, c_s_per_token2=1e-6, max_batch_tokens=1000, max_batch_requests=4,
    c0_s=0.01, c1_s=0.001, c2_s=1e-6, max_batch=8,
)  # fmt: skip
"""A prompt of 200 takes 0.24 s and its share of a step; a decode step of B contexts of 250 takes 0.01 s + B 0.00125 s."""


def test_backlogs_are_seconds_of_work() -> None:
    """Tokens and steps of the prompts that wait over the workers; answers without a place at the batch that runs."""
    rule = BacklogRule(LAWS, 200, 100)
    assert rule.prefill_s(queues(pw=6, pt=1200), 2) == pytest.approx(
        (1200 * 1.2e-3 + 1.5 * 0.01) / 2
    )  # steps by number
    assert rule.prefill_s(queues(pw=6), 2) == rule.prefill_s(queues(pw=6, pt=1200), 2)  # counts alone: mean prompts
    assert rule.prefill_s(queues(pw=5, pt=4000), 1) == pytest.approx(4000 * 1.2e-3 + 4 * 0.01)  # by tokens
    assert rule.prefill_s(queues(pw=2, pt=5000), 1) == pytest.approx(5000 * 1.2e-3 + 2 * 0.01)  # a prompt is one step
    assert rule.prefill_s(queues(pt=400), 1) == pytest.approx(400 * 1.2e-3 + 0.4 * 0.01)  # of one that runs
    assert rule.step_s(4) == pytest.approx(0.015)
    assert rule.decode_s(queues(dw=3, dr=20), 2) == pytest.approx(7 * 100 * 0.02 / (8 * 2))
    assert rule.decode_s(queues(dw=1), 4) == pytest.approx(100 * 0.01125 / 4)
    assert rule.decode_s(queues(dr=16), 2) == 0.0
    assert rule.decode_s(queues(dw=3, dr=6), 2) == pytest.approx(3 * 100 * 0.01375 / (3 * 2))  # at the batch that runs
    step = BacklogRule(replace(LAWS, prefill_square="step"), 200, 100)  # squares of a step's tokens, not of a prompt's
    assert step.prefill_s(queues(pw=6, pt=1200), 2) == pytest.approx((1200 * (1e-3 + 1e-6 * 800) + 1.5 * 0.01) / 2)
    assert step.prefill_s(queues(pw=1, pt=200), 1) == pytest.approx(200 * (1e-3 + 1e-6 * 200) + 0.25 * 0.01)
    knee = BacklogRule(Profile(name="k", c0_s=0.01, c1_s=0.001, knee_batch=4, knee_s=0.002), 200, 100)
    assert knee.step_s(6) == pytest.approx(0.01 + 0.006 + 0.004)
    assert knee.step_s(3) == pytest.approx(0.013)


def test_limits_of_the_backlog_rule_are_limits() -> None:
    """At a limit nothing moves, beyond it something does; donors are asked what they would be left with."""
    unit = Profile(name="u", b_s_per_token=1e-3, c0_s=0.01, max_batch=1)  # 1000 tokens or an answer of 100: 1 s
    rule = BacklogRule(unit, 200, 100, more_s=2.0, ratio=2.0)

    def target(fleet: Fleet, rule: BacklogRule = rule, **held: int) -> Fleet | None:
        return rule.decide(State(), queues(**held), fleet, 0, 0.0)[1]

    assert target(Fleet(1, 2), pw=1, pt=2000) is None
    assert target(Fleet(1, 2), pw=1, pt=2001) == Fleet(2, 1)
    assert target(Fleet(2, 1), dw=2, dr=1) is None
    assert target(Fleet(2, 1), dw=3, dr=1) == Fleet(1, 2)
    assert target(Fleet(1, 2), pw=1, pt=4000, dw=4) is None  # 4 s is not more than twice 2 s
    assert target(Fleet(2, 1), pw=1, pt=2000, dw=3, dr=1) is None  # 3 s is not more than twice the 2 s it would leave
    why = rule.decide(State(), queues(pw=1, pt=3800, dw=3, dr=1), Fleet(2, 1), 0, 0.0)[2]
    assert why == "the backlogs are within the limits"  # nor more than twice the 1.9 s that there are
    assert target(Fleet(1, 3), pw=1, pt=9000) == Fleet(3, 1)  # as many as are of use
    assert target(Fleet(1, 3), BacklogRule(unit, 200, 100, floor=(1, 2)), pw=1, pt=9000) == Fleet(2, 2)
    assert target(Fleet(3, 1), BacklogRule(unit, 200, 100, floor=(2, 1)), dw=9, dr=1) == Fleet(2, 2)
    # the one decode worker left would owe 2 s
    assert target(Fleet(1, 2), BacklogRule(unit, 200, 100, less_s=2.0), pw=1, pt=9000, dw=2) == Fleet(2, 1)
    assert target(Fleet(1, 2), BacklogRule(unit, 200, 100, less_s=1.9), pw=1, pt=9000, dw=2) is None


def test_the_backlog_rule_says_why_not() -> None:
    """Within the limits, turned a moment ago, donors that need their workers, not long enough."""
    rule = BacklogRule(Profile(name="u", b_s_per_token=1e-3, c0_s=0.01, max_batch=1), 200, 100, dwell_s=3.0, cool_s=5.0)
    moved = State(moved="decode", moved_s=10.0)
    busy = queues(pw=1, pt=9000)
    assert rule.decide(State(), queues(), Fleet(2, 2), 0, 0.0)[1:] == (None, "the backlogs are within the limits")
    assert "moved the other way" in rule.decide(moved, busy, Fleet(2, 2), 0, 14.9)[2]
    assert "moved the other way" in rule.decide(moved, busy, Fleet(2, 2), 1, 90.0)[2]
    assert "its donor" in rule.decide(moved, busy, Fleet(3, 1), 0, 15.0)[2]
    state, target, why = rule.decide(moved, busy, Fleet(2, 2), 0, 15.0)
    assert (state.wish, state.since_s, state.moved, target) == ("prefill", 15.0, "decode", None)
    assert "not long enough" in why
    assert rule.decide(state, busy, Fleet(2, 2), 0, 17.9)[1] is None
    state, target, _ = rule.decide(state, busy, Fleet(2, 2), 0, 18.0)
    assert (state, target) == (State(moved="prefill", moved_s=18.0), Fleet(3, 1))


def test_a_step_at_its_limit_is_not_slow() -> None:
    """The TPOT limit times the share is kept by a step of just that length."""
    laws = Profile(name="s", b_s_per_token=1e-3, c1_s=0.25, max_batch=100)  # a step takes a quarter second a sequence
    rule = BacklogRule(laws, 100, 100, Slo.parse("tpot<2s"), tpot_share=0.5)
    assert not rule._slow(queues(dr=8), 2)
    assert rule._slow(queues(dr=8, dw=1), 2)
    assert rule._slow(queues(dr=9), 2)
    assert not BacklogRule(laws, 100, 100)._slow(queues(dr=90), 2)
    assert (
        rule.decide(State(), queues(dr=9, pw=1, pt=2000), Fleet(2, 2), 0, 0.0)[1] is None
    )  # prompts wait a second too


def test_demand_is_smoothed_over_two_memories() -> None:
    """The first reading sets both rates; later ones come in by how long ago the last was; a counter that fell counts 0."""
    first = policy.Demand(0.0, 100.0, 4.0)
    assert first.next(0.0, 900.0, 9.0, 2.0) is first
    second = first.next(2.0, 300.0, 6.0, 2.0)
    assert second == policy.Demand(2.0, 300.0, 6.0, 100.0, 100.0, 0.0, 6.0, 0.0)
    third = second.next(3.0, 700.0, 10.0, 2.0)
    short, long = (math.expm1(-1 / memory) / math.expm1(-3 / memory) for memory in (2, 16))
    assert (third.at_s, third.arrived, third.active, third.since_s) == (3.0, 700.0, 10.0, 0.0)
    assert third.rate == pytest.approx(100 + short * 300)
    assert third.slow_rate == pytest.approx(100 + long * 300)
    assert third.growth == pytest.approx((1 - math.exp(-0.5)) * 4)
    assert third.slow_active == pytest.approx(6 + long * 4)
    fell = third.next(4.0, 0.0, 10.0, 2.0).rate
    assert fell == pytest.approx(third.rate * (1 - math.expm1(-0.5) / math.expm1(-2)))
    assert third.next(5.0, 700.0, 14.0, 2.0).growth == pytest.approx(
        third.growth + (1 - math.exp(-1)) * (2 - third.growth)
    )
    assert third.next(4.0, 700.0, 8.0, 2.0).growth == pytest.approx(
        third.growth + (1 - math.exp(-0.5)) * (-2 - third.growth)
    )


@given(st.lists(st.tuples(st.floats(0.1, 20), st.floats(0, 5000)), min_size=1, max_size=20))
def test_a_first_reading_weighs_no_more_than_another(readings: list[tuple[float, float]]) -> None:
    """A rate is the mean of what was seen, each instant by how long ago it is, from the beginning on."""
    seen, at_s, weights = policy.Demand(0.0, 0.0, 0.0), 0.0, []
    for dt, rate in readings:
        at_s += dt
        seen = seen.next(at_s, seen.arrived + rate * dt, 0.0, 5.0)
        weights = [w * math.exp(-dt / 5) for w in weights] + [-math.expm1(-dt / 5)]
    rates = [rate for _, rate in readings]
    assert seen.rate == pytest.approx(np.average(rates, weights=weights), rel=1e-6, abs=1e-6)


def test_a_forecast_is_its_coefficients() -> None:
    """A sum over 1, rates, sequences and the clock; nothing below 0."""
    seen = policy.Demand(25.0, 0.0, 7.0, 2.0, 3.0, 5.0, 11.0)
    assert policy.forecast_features(seen, 0.0) == [1.0, 2.0, 3.0, 7.0, 5.0, 11.0]
    clock = policy.forecast_features(seen, 100.0)[6:]
    assert clock == pytest.approx([1, 0, 0, -1, -1, 0], abs=1e-9)
    told = policy.Forecast((1.0, 10.0, 0.0, 0.0, 0.0, 0.5), (-9.0, 0.0, 0.0, 1.0, 0.0, 0.0))
    assert told.of(seen) == (26.5, 0.0)
    assert policy.Forecast((-1.0,) * 6, (0.5,) + (0.0,) * 5).of(seen) == (0.0, 0.5)


def test_loads_of_demand_are_shares_of_what_a_role_can_do() -> None:
    """Prefill: arrivals and the backlog to clear; decode: the step, the places and the KV cache, whichever is tightest."""
    rule = policy.DemandRule(LAWS, 200, 100, Slo.parse("tpot<50ms"))
    assert rule.token_s == pytest.approx(1e-3 + 2e-4 + 0.01 / 800)
    assert policy.DemandRule(LAWS, 400, 100).token_s == pytest.approx(1e-3 + 4e-4 + 0.01 / 1000)
    assert policy.DemandRule(LAWS, 2000, 100).token_s == pytest.approx(1e-3 + 2e-3 + 0.01 / 2000)
    assert rule.step_limit_s == pytest.approx(0.045)
    assert policy.DemandRule(LAWS, 200, 100, Slo.parse("e2e<20s")).step_limit_s == pytest.approx(0.18)
    assert policy.DemandRule(LAWS, 200, 100, Slo.parse("e2e<1s")).step_limit_s == pytest.approx(0.01125 * 0.9)
    assert policy.DemandRule(LAWS, 200, 100).step_limit_s == pytest.approx(0.0225 * 0.9)

    seen = Queues(2, 400, 2, 10, 3000)
    prefill, decode = rule.loads(1000, 12, seen, Fleet(2, 3))
    assert prefill == pytest.approx((1000 + 400 / 2) * rule.token_s / (2 * 0.85))
    assert decode == pytest.approx(12 / 24)
    tight = policy.DemandRule(LAWS, 200, 100, Slo.parse("tpot<10ms"))
    assert tight.loads(0, 12, seen, Fleet(2, 3))[1] == pytest.approx(0.0152 / 0.009)
    assert tight.loads(0, 30, seen, Fleet(2, 3))[1] == pytest.approx((0.01 + 8 * 0.0013) / 0.009)
    untold = replace(seen, decode_context_tokens=0)  # a server that does not say: contexts of mean length
    assert tight.loads(0, 12, untold, Fleet(2, 3))[1] == pytest.approx((0.01 + 4 * 0.00125) / 0.009)
    assert tight.loads(0, 1, queues(), Fleet(2, 3))[1] == pytest.approx(0.01125 / 0.009)
    small = policy.DemandRule(replace(LAWS, kv_tokens=1000), 200, 100, Slo.parse("tpot<50ms"))
    assert small.loads(0, 12, seen, Fleet(2, 3))[1] == pytest.approx(12 * 300 / 3000)
    assert policy.waiting_tokens(queues(pw=3), 200) == 600
    assert policy.waiting_tokens(queues(pw=3, pt=50), 200) == 50


def test_the_demand_rule_moves_to_the_split_that_demand_wants() -> None:
    """2000 prompt tokens a second want three of four workers; not before a memory has passed, not back within the cool-down,
    not for a small gain."""
    rule = policy.DemandRule(LAWS, 200, 100, memory_s=1.0)
    start, target, why = rule.decide(State(), queues(), Fleet(1, 3), 0, 0.0)
    assert (target, why) == (None, "")
    asked = Queues(prompt_tokens_total=2000)
    state, target, why = rule.decide(start, asked, Fleet(1, 3), 0, 1.0)
    assert target == Fleet(3, 1)
    assert why == "load of prefill 2.85 and decode 0.56, 0.95 at most with 3:1"
    assert (state.moved, state.moved_s, state.wish) == ("prefill", 1.0, "")
    watching, target, _ = replace(rule, memory_s=1.5).decide(start, asked, Fleet(1, 3), 0, 1.0)
    assert target is None
    asked_on = Queues(prompt_tokens_total=3000)
    assert replace(rule, memory_s=1.5).decide(watching, asked_on, Fleet(1, 3), 0, 1.5)[1] == Fleet(3, 1)
    assert rule.decide(start, asked, Fleet(3, 1), 0, 1.0)[1] is None  # below what a role can do nothing moves
    assert replace(rule, up=0.95).decide(start, asked, Fleet(3, 1), 0, 1.0)[1] is None  # it is the best
    assert replace(rule, gain=1.95).decide(start, asked, Fleet(1, 3), 0, 1.0)[1] is None
    assert replace(rule, gain=1.85).decide(start, asked, Fleet(1, 3), 0, 1.0)[1] == Fleet(3, 1)
    assert replace(rule, floor=(1, 2)).decide(start, asked, Fleet(1, 3), 0, 1.0)[1] == Fleet(2, 2)

    full = Queues(decode_running=30, decode_waiting=2, prompt_tokens_total=2000)
    assert rule.decide(state, full, Fleet(3, 1), 0, 5.9)[1] is None
    assert rule.decide(state, full, Fleet(3, 1), 1, 60.0)[1] is None
    back, target, _ = rule.decide(state, full, Fleet(3, 1), 0, 60.0)
    assert target == Fleet(1, 3)
    assert back.moved == "decode"

    slow = replace(rule, dwell_s=2.0)
    state, target, _ = slow.decide(start, asked, Fleet(1, 3), 0, 1.0)
    assert (state.wish, state.since_s, target) == ("prefill", 1.0, None)
    more = Queues(prompt_tokens_total=6000)
    assert slow.decide(state, more, Fleet(1, 3), 0, 2.9)[1] is None
    assert slow.decide(state, more, Fleet(1, 3), 0, 3.0)[1] == Fleet(3, 1)
    assert slow.decide(state, Queues(prompt_tokens_total=2000), Fleet(1, 3), 0, 90.0)[0].wish == ""


def test_the_demand_rule_looks_ahead() -> None:
    """Sequences that grow are met before they are there, those that are there are never forecast away."""
    rule = policy.DemandRule(LAWS, 200, 100, memory_s=1e-3, ahead_s=4.0)
    held = Queues(2, 300, 2, 5, 900, prompt_tokens_total=1000)
    first = rule.decide(State(), held, Fleet(2, 1), 0, 3.0)[0].seen
    assert first == policy.Demand(3.0, 1300.0, 7.0)  # processed and waiting, running and waiting
    state = State(seen=policy.Demand(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0))
    assert rule.decide(state, queues(dr=7), Fleet(2, 1), 0, 1.0)[1] == Fleet(1, 2)  # 35 by then
    assert replace(rule, ahead_s=0.0).decide(state, queues(dr=1), Fleet(2, 1), 0, 1.0)[1] is None
    none = policy.Forecast((0.0,) * 6, (0.0,) * 6)
    assert replace(rule, forecast=none).decide(state, queues(dr=30), Fleet(2, 1), 0, 1.0)[1] == Fleet(1, 2)
    many = policy.Forecast((0.0,) * 6, (40.0,) + (0.0,) * 5)
    assert replace(rule, forecast=many).decide(state, queues(), Fleet(2, 1), 0, 1.0)[1] == Fleet(1, 2)


def test_dynamos_easy_mode_has_its_thresholds() -> None:
    """At a context queued a worker, over a KV cache's worth in use; the donor must have it to spare, now and then."""
    rule = policy.EasyRule(replace(LAWS, kv_tokens=1000), 100.0)

    def target(rule: policy.EasyRule, fleet: Fleet, changing: int = 0, **held: int) -> Fleet | None:
        return rule.decide(State(), Queues(**held), fleet, changing, 0.0)[1]

    prompts = {"prefill_waiting": 1, "prefill_waiting_tokens": 200}
    assert target(rule, Fleet(2, 2), **prompts) == Fleet(3, 1)
    assert target(rule, Fleet(2, 2), 1, **prompts) is None
    assert target(rule, Fleet(2, 2), prefill_waiting_tokens=199) is None
    assert target(rule, Fleet(2, 1), **prompts) is None
    assert target(rule, Fleet(2, 2), decode_context_tokens=1199, **prompts) is None  # one alone would want it back
    assert target(rule, Fleet(2, 2), decode_context_tokens=999, **prompts) == Fleet(3, 1)
    assert target(rule, Fleet(2, 9), decode_context_tokens=5400, **prompts) is None  # 60 % is not to spare
    assert target(rule, Fleet(2, 2), decode_context_tokens=2001) == Fleet(1, 3)
    assert target(rule, Fleet(2, 2), decode_context_tokens=2000) is None
    assert target(rule, Fleet(2, 2), decode_context_tokens=1951, decode_waiting=1) == Fleet(1, 3)
    assert (
        target(rule, Fleet(2, 2), decode_context_tokens=1950, decode_waiting=1) is None
    )  # a waiting one is half a context
    assert target(rule, Fleet(1, 3), decode_context_tokens=9000) is None
    assert target(rule, Fleet(2, 2), decode_context_tokens=2001, prefill_waiting_tokens=20) == Fleet(1, 3)
    assert target(rule, Fleet(2, 2), decode_context_tokens=2001, prefill_waiting_tokens=21) is None
    assert (
        target(replace(rule, prefill_down=9.0), Fleet(2, 2), decode_context_tokens=2001, prefill_waiting_tokens=100)
        is None
    )
    endless = policy.EasyRule(LAWS, 100.0)
    assert target(endless, Fleet(2, 2), decode_running=15, decode_waiting=2) == Fleet(1, 3)
    assert target(endless, Fleet(2, 2), decode_running=15, decode_waiting=1) is None
    state = State(wish="kept")
    assert rule.decide(state, Queues(decode_context_tokens=3000), Fleet(2, 2), 0, 0.0) == (
        state,
        Fleet(1, 3),
        "0.00 contexts queued, 150% of the KV cache used",
    )


def test_the_reports_rule_says_why() -> None:
    """What waits where it moves; what keeps it where it does not."""
    state = State(wish="kept")
    assert CountRule().decide(state, queues(pw=4, dw=2), Fleet(1, 2), 0, 0.0) == (
        state,
        Fleet(2, 1),
        "4 prompts and 2 answers wait",
    )
    assert CountRule().decide(state, queues(pw=4), Fleet(1, 1), 0, 0.0)[2] == "the other role has no worker to spare"
    assert CountRule().decide(state, queues(pw=2, dw=2), Fleet(1, 2), 0, 0.0)[2] == "the queues are within the ratio"


def test_steering_keeps_what_it_did() -> None:
    """A rule's answer is asked of the readings, and every move is kept with its reason."""
    steering = Steering(CountRule())
    calm = [Sample(1.0, "1", "prefill", waiting_requests=0), Sample(1.0, "0", "decode", waiting_requests=0)]
    busy = [calm[0], Sample(1.0, "0", "decode", waiting_requests=3)]
    assert steering(1.0, busy, Fleet(2, 1), 0) == Fleet(1, 2)
    assert steering(2.0, calm, Fleet(1, 2), 0) is None
    assert steering.moves == [(1.0, Fleet(2, 1), Fleet(1, 2), "0 prompts and 3 answers wait")]
    assert steering.why == "the queues are within the ratio"


@dataclass
class Kept:
    """A rule that moves nothing and keeps what it is shown."""

    seen: list[int] = field(default_factory=list)

    def decide(
        self, state: State, queues: Queues, fleet: Fleet, changing: int, now_s: float
    ) -> tuple[State, Fleet | None, str]:
        """See OnlineRule."""
        self.seen.append(queues.prompt_tokens_total)
        return state, None, ""


def test_steering_counts_the_prompt_tokens_that_are_processed_while_it_looks() -> None:
    """A missed page, a worker with history, a restart and KV that another worker sent are no prompts that arrive."""
    kept = Kept()
    steering = Steering(kept)

    def page(name: str, prompt: float | None, received: float | None = None, role: str = "prefill") -> Sample:
        told = {"prompt_tokens_total": prompt, "received_tokens_total": received}
        return Sample(0.0, name, role, waiting_requests=0, **told)  # type: ignore[arg-type]

    for samples in (
        [page("a", 70e6), page("b", 5e6)],
        [page("a", 70e6 + 100), page("b", 5e6 + 10)],
        [page("b", 5e6 + 20)],  # a's page is missed
        [page("a", 70e6 + 300), page("b", 5e6 + 30)],
        [page("a", 70e6 + 300), page("b", 5e6 + 30), page("c", 1e9)],  # c is found, with what it did before
        [page("a", 40), page("b", 5e6 + 30), page("c", 1e9 + 2)],  # a began anew
        [page("a", 50, 0.0), page("b", 5e6 + 30), page("c", 1e9 + 2, role="decode")],
    ):
        steering(0.0, [*samples, page("0", None, role="decode")], Fleet(2, 1), 0)
    assert kept.seen == [0, 110, 120, 330, 330, 372, 382]

    kept.seen.clear()
    steering = Steering(kept)
    for done in (
        0.0,
        1000.0,
        2000.0,
    ):  # the decode engine counts each prompt again, and as received but for a last token
        samples = [page("p", done, 0.0), page("d", 9e6 + done, 8e6 + done - done / 1000, "decode")]
        steering(0.0, samples, Fleet(1, 1), 0)
    assert kept.seen == [0, 1001, 2002]

    for others, expected in (  # of a router and of a decode worker
        (
            [(0, 0), (1000, 1000), (2000, 2000)],
            [0, 1000, 2000],
        ),  # SGLang's counts each prompt again and does not say so
        ([(0, 0), (9000, 1000), (9000, 9000)], [0, 1000, 2000]),  # the frontend's is not added to the workers' own
    ):
        kept.seen.clear()
        steering = Steering(kept)
        for done, (routed, again) in zip((0, 1000, 2000), others, strict=True):
            samples = [page("p", done), page("d", again, None, "decode"), page("r", routed, None, "router")]
            steering(0.0, samples, Fleet(1, 1), 0)
        assert kept.seen == expected
    kept.seen.clear()
    steering = Steering(kept)
    for routed in (5000, 6000):  # Dynamo's frontend, where no worker counts
        samples = [page("p", None), page("d", None, None, "decode"), page("r", routed, None, "router")]
        steering(0.0, samples, Fleet(1, 1), 0)
    assert kept.seen == [0, 1000]
    kept.seen.clear()
    steering = Steering(kept)
    for own, routed in (  # the one worker that counts misses its page now and then: once, and three times in a row
        (0, 0), (None, 1000), (600_000, 600_000), (None, 601_000), (602_000, 602_000),
        (None, 603_000), (None, 604_000), (None, 605_000), (606_000, 606_000), (607_000, 607_000),
    ):  # fmt: skip
        samples = [page("p", own), page("d", None, None, "decode"), page("r", routed, None, "router")]
        steering(0.0, samples, Fleet(1, 1), 0)
    assert kept.seen == [0, 0, 600_000, 600_000, 602_000, 602_000, 603_000, 604_000, 606_000, 607_000]
    kept.seen.clear()
    steering = Steering(kept)
    for one, other, routed in (  # two miss theirs, and come back together, or one after the other
        (0, 0, 0), (None, None, 100), (None, None, 200), (None, None, 300), (200, 200, 400),
        (None, None, 500), (None, None, 600), (350, None, 700), (400, None, 800), (450, 450, 900),
    ):  # fmt: skip
        pages = [page("p", one), page("q", other), page("d", None, None, "decode")]
        steering(0.0, [*pages, page("r", routed, None, "router")], Fleet(2, 1), 0)
    assert kept.seen == [0, 0, 100, 200, 400, 400, 500, 550, 600, 900]


def test_a_rule_moves_nothing_on_what_nobody_counts() -> None:
    """It would look idle and lose its workers: a worker without a reading, a role without one, queues and prompts that nobody
    counts. One that has left is not missed."""
    demand = policy.DemandRule(LAWS, 200, 100)
    busy = {"waiting_requests": 9.0, "running_requests": 9.0}
    prefill, decode = Sample(0.0, "p", "prefill", **busy), Sample(0.0, "d", "decode", **busy)
    calm = Sample(0.0, "p", "prefill", waiting_requests=0)
    counted = replace(decode, prompt_tokens_total=5)
    for rule, samples, fleet, why in (
        (CountRule(), [calm, decode], Fleet(3, 1), "0 prompts and 9 answers wait"),
        (CountRule(), [calm, decode, Sample(0.0, "q", "prefill")], Fleet(2, 1), "1 of 2 prefill workers tell nothing (q)"),
        (CountRule(), [decode, Sample(0.0, "q", "prefill")], Fleet(2, 1), "no prefill worker tells what it holds"),
        (CountRule(), [decode, Sample(0.0, "q", "prefill", gpu_busy_ratio=0.9)], Fleet(2, 1), "no prefill worker tells"),
        (CountRule(), [prefill], Fleet(1, 2), "no decode worker tells what it holds"),
        (CountRule(), [prefill, Sample(0.0, "e", "decode")], Fleet(1, 2), "no decode worker tells what it holds"),
        (CountRule(), [prefill, decode, Sample(0.0, "e", "decode")], Fleet(1, 1), "the queues are within the ratio"),
        (CountRule(), [prefill, Sample(0.0, "d", "decode", kv_used_tokens=9)], Fleet(1, 2), "requests wait for decode"),
        (CountRule(), [prefill, Sample(0.0, "d", "decode", inflight_requests=9)], Fleet(1, 2), "wait for decode"),
        (CountRule(), [decode, Sample(0.0, "p", "prefill", waiting_tokens=9)], Fleet(2, 1), "wait for prefill"),
        (demand, [prefill, decode], Fleet(2, 1), "nobody counts prompt tokens, nothing is moved"),
        (demand, [prefill, counted], Fleet(2, 1), "nobody counts prompt tokens"),  # each prompt once more
        (demand, [prefill, replace(counted, received_tokens_total=5)], Fleet(2, 1), ""),
        (demand, [replace(prefill, prompt_tokens_total=5), decode], Fleet(2, 1), ""),
    ):  # fmt: skip
        steering = Steering(rule)
        target = steering(0.0, samples, fleet, 0)
        assert why in steering.why
        assert bool(why) or not steering.why
        assert target == (Fleet(2, 2) if fleet == Fleet(3, 1) else None)


def test_readings_are_summed_with_what_was_processed() -> None:
    """Prompt tokens count whatever the role; more running than in hand is nobody waiting."""
    seen = Queues.of(
        [
            Sample(0.0, "0", "prefill", prompt_tokens_total=100, waiting_requests=0),
            Sample(
                0.0, "1", "decode", prompt_tokens_total=11, inflight_requests=3, running_requests=5, kv_used_tokens=7
            ),
            Sample(0.0, "2", "decode", kv_used_tokens=8),
            Sample(0.0, "3", "router", waiting_requests=9),
        ]
    )
    assert seen == Queues(0, 0, 0, 5, 15, 111)


@pytest.mark.parametrize(
    "rule",
    [
        policy.DemandRule(LAWS, 200, 100, Slo.parse("tpot<50ms"), memory_s=1.0),
        BacklogRule(LAWS, 200, 100, Slo.parse("tpot<20ms")),
    ],
)
def test_sequences_that_nobody_counts_are_told_by_their_kv(rule: policy.OnlineRule) -> None:
    """Dynamo's frontend alone tells a decode worker's KV and no requests: 60 mean contexts are 60 sequences, not an idle role."""

    def moved(**told: float) -> list[tuple[float, Fleet]]:
        steering = Steering(rule)
        for at in range(4):
            samples = [
                Sample(at, "router", "router", prompt_tokens_total=0),
                Sample(at, "p", "prefill", waiting_tokens=0),
                Sample(at, "d", "decode", kv_used_tokens=60 * 250, **told),
            ]
            steering(at, samples, Fleet(3, 1), 0)
        return [(at, fleet) for at, _, fleet, _ in steering.moves]

    assert moved() == moved(running_requests=60, waiting_requests=0) != []
    assert moved(running_requests=0, waiting_requests=0) == []  # KV that is parked is no sequence
    assert moved(inflight_requests=0) == []


def test_orders_are_by_length() -> None:
    """Shortest and longest first, equals as they came; Johnson's two groups by the stages' times."""
    prompt, output = np.array([300, 100, 300, 200]), np.array([5, 9, 9, 7])
    assert policy.order("arrival", prompt, output, LAWS) == [0, 1, 2, 3]
    assert policy.order("shortest-prompt", prompt, output, LAWS) == [1, 3, 0, 2]
    assert policy.order("longest-prompt", prompt, output, LAWS) == [0, 2, 3, 1]
    assert policy.order("longest-decode", prompt, output, LAWS) == [1, 2, 3, 0]
    # prefill 0.4, 0.12, 0.4 s with its squares; decode 0.011 s a token
    assert policy.order("two-stage", np.array([300, 100, 300]), np.array([35, 9, 37]), LAWS) == [2, 0, 1]
    assert policy.groups(np.array([126, 100, 125, 157, 158])) == [[1, 2], [0, 3], [4]]


def test_foretold_answers_are_means_of_neighbours() -> None:
    """As many as the root of the history, those around, none beyond the ends."""
    past, answers = np.array([4, 1, 3, 2]), np.array([40, 10, 30, 20])
    assert policy.predicted(np.array([3, 100, 0]), past, answers).tolist() == [25, 35, 15]
    assert policy.predicted(np.array([3]), past, np.zeros(4, dtype=int)).tolist() == [1]


def test_static_splits_by_hand() -> None:
    """The report's formula rounds down, ours to the nearest, and each role keeps a worker."""
    assert policy.report_split(np.array([100]), np.array([300]), 97) == Fleet(38, 59)  # 0.4 of 97
    assert policy.report_split(np.array([1]), np.array([4096]), 8) == Fleet(1, 7)
    prompt, output = np.full(10, 200), np.full(10, 100)
    assert policy.balanced(prompt, output, LAWS, 1000) == Fleet(492, 508)  # 2.425 s against 2.5 s
    assert policy.balanced(prompt, output, replace(LAWS, max_batch=10**6), 1000) == Fleet(
        round(2.425 / (2.425 + 1000 * (0.01 + 64 * 0.00125) / 64) * 1000), 1000 - 633
    )
    # Cut prompts take 20 steps: 2.6 s. Whole ones that are longer than a step should be take 10, one each: 2.5 s.
    small = replace(LAWS, max_batch_tokens=100)
    assert policy.balanced(prompt, output, replace(small, chunked=True), 1000) == Fleet(510, 490)
    assert policy.balanced(prompt, output, small, 1000) == Fleet(500, 500)


def test_a_rule_is_read_back_from_its_table() -> None:
    """Every number of both rules comes back; what is left out has its default; what is wrong is named."""
    backlog = BacklogRule(LAWS, 200, 100, Slo.parse("tpot<50ms"), 1.5, 3.0, 0.5, 6.0, floor=(2, 3))
    table = policy.table_of(backlog)
    assert table["less_s"] is None
    assert table["rule"] == "backlog"
    assert policy.rule_of(table, "t") == backlog
    assert policy.rule_of(policy.table_of(replace(backlog, less_s=4.0)), "t") == replace(backlog, less_s=4.0)
    for period, n in ((0.0, 6), (60.0, 12)):
        told = policy.Forecast(tuple(range(n)), tuple(range(n)), period)  # type: ignore[arg-type]
        demand = policy.DemandRule(LAWS, 200, 100, up=1.25, forecast=told)
        table = policy.table_of(demand)
        assert table["rule"] == "demand"
        assert policy.rule_of(table, "t") == demand
        for key in ("rate", "active"):
            short = table | {"forecast": table["forecast"] | {key: [1.0] * (n - 1)}}
            with pytest.raises(InputError, match="forecast"):
                policy.rule_of(short, "t")
    for change, words in (
        ({"rule": "x"}, "must be one of"),
        ({"mean_prompt": None}, "mean_prompt is missing"),
        ({"up": "fast"}, "up of the thresholds"),
        ({"up": math.inf}, "up of the thresholds"),
        ({"floor": {"prefill": 0, "decode": 1}}, "at least one worker"),
        ({"floor": {"prefill": 1}}, "floor of the thresholds"),
        ({"laws": "= ="}, "laws of the thresholds"),
    ):
        with pytest.raises(InputError, match=words):
            policy.rule_of(table | change, "t")
    assert policy.rule_of(table | {"slo": "", "else": 1}, "t") == demand
