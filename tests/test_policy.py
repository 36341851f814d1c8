"""Policies: the report's rules are what the report says, ours do not oscillate, and orders hold every request once."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen import policy
from loadgen.cluster import Profile, simulate
from loadgen.policy import BacklogRule, CountRule, Queues, State, Steering
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
