"""Fleets, schedules and observations: what they promise about themselves."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from traces.errors import InputError
from traces.records import STATUSES, Fleet, Histogram, Observations, Schedule


def schedule_of(due: list[float], prompt: int = 10, output: int = 5) -> Schedule:
    n = len(due)
    return Schedule("t", np.arange(n), np.array(due, dtype=float), np.full(n, prompt), np.full(n, output))


@given(st.integers(1, 999), st.integers(1, 999))
def test_a_fleet_is_read_back_from_how_it_is_written(prefill: int, decode: int) -> None:
    """A fleet is read back from how it is written."""
    fleet = Fleet(prefill, decode)
    assert Fleet.parse(str(fleet)) == fleet


@pytest.mark.parametrize("text", ["", "3", "3:", ":5", "3:5:1", "a:b", "-1:9", "0:8", "8:0", "3,5", "1e3:2"])
def test_an_impossible_fleet_is_refused_in_one_line(text: str) -> None:
    """An impossible fleet is refused in one line that shows an example."""
    with pytest.raises(InputError) as caught:
        Fleet.parse(text)
    assert "3:5" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_fleet_is_read_from_a_table_of_whole_numbers() -> None:
    """2.9 was 2, and true was 1."""
    for prefill in (3, 3.0, "3"):
        assert Fleet.of({"prefill": prefill, "decode": 5, "changing": 1}) == Fleet(3, 5)
    for decode in (
        2.9,
        True,
        None,
        [1],
        math.inf,
        math.nan,
        10**400,
        -1,
        0,
        "",
        "3:5",
        "5+2",
        "0+8",
        "2.0",
        "9" * 5000,
    ):
        with pytest.raises(InputError, match=r"fleet must be like|at least one worker"):
            Fleet.of({"prefill": 0 if decode == "0+8" else 3, "decode": decode})
    for table in ({}, {"prefill": 3}, [3, 5], None, "3:5"):
        with pytest.raises(InputError, match=r"fleet must be like .* \(got "):
            Fleet.of(table)


@given(st.integers(2, 64), st.integers(1, 4), st.integers(1, 4))
def test_splits_use_exactly_the_gpus_given_and_none_is_missing(gpus: int, per_p: int, per_d: int) -> None:
    """Splits use exactly the GPUs given, once each, and none is missing."""
    found = Fleet.splits(gpus, (per_p, per_d))
    assert all(f.gpus((per_p, per_d)) == gpus for f in found)
    wanted = {(p, d) for p in range(1, gpus) for d in range(1, gpus) if p * per_p + d * per_d == gpus}
    assert {(f.prefill, f.decode) for f in found} == wanted
    assert len(found) == len(wanted)


def test_eight_gpus_have_seven_splits() -> None:
    """Eight GPUs, one a worker, have seven splits."""
    assert len(Fleet.splits(8)) == 7


@given(st.lists(st.integers(0, 10**12), min_size=2, max_size=50))
def test_rate_times_span_is_the_number_of_gaps(due_us: list[int]) -> None:
    """Rate times span is the number of gaps, for any arrivals a trace can hold (microseconds, eleven days)."""
    schedule = schedule_of([t / 1e6 for t in sorted(due_us)])
    if schedule.span_s > 0:
        assert schedule.rate_per_s * schedule.span_s == pytest.approx(len(schedule) - 1)
    else:
        assert schedule.rate_per_s == float("inf")


def test_a_digest_tells_schedules_apart_and_nothing_else() -> None:
    """A digest changes with any due time or length and with nothing else."""
    one = schedule_of([0.0, 1.0])
    assert one.digest() == schedule_of([0.0, 1.0]).digest()
    assert one.digest() != schedule_of([0.0, 1.5]).digest()
    assert one.digest() != schedule_of([0.0, 1.0], prompt=11).digest()
    assert one.digest() != schedule_of([0.0, 1.0], output=6).digest()


@pytest.mark.parametrize("due", [[1.0, 0.0], [-1.0, 0.0], [0.0, float("inf")]])
def test_a_schedule_out_of_order_cannot_be_made(due: list[float]) -> None:
    """A schedule that is out of order, early or endless cannot be made."""
    with pytest.raises(ValueError, match="due times"):
        schedule_of(due)


def test_a_schedule_of_empty_requests_cannot_be_made() -> None:
    """A request for no tokens cannot be scheduled."""
    with pytest.raises(ValueError, match="at least one"):
        schedule_of([0.0], output=0)


def test_latencies_count_from_due_and_from_sent_side_by_side() -> None:
    """Latencies count from due; the twin from sent is smaller by the lag."""
    rows = one_answer(due=1.0, sent=1.25, first=2.0, last=4.0, tokens=5)
    assert rows.lag_s[0] == pytest.approx(0.25)
    assert rows.ttft_s[0] == pytest.approx(1.0)
    assert rows.ttft_sent_s[0] == pytest.approx(0.75)
    assert rows.tpot_s[0] == pytest.approx(0.5)
    assert rows.e2e_s[0] == pytest.approx(3.0)


def test_tpot_of_a_one_token_answer_is_nan_not_zero() -> None:
    """TPOT of a one-token answer is NaN: there is no gap to average."""
    assert np.isnan(one_answer(due=0, sent=0, first=1, last=1, tokens=1).tpot_s[0])


def test_tokens_come_from_usage_and_else_from_what_was_asked() -> None:
    """Token counts come from the server's usage, and only without one from the request."""
    assert one_answer(due=0, sent=0, first=1, last=2, tokens=7).tokens[0] == 7
    assert one_answer(due=0, sent=0, first=1, last=2, tokens=-1, asked=9).tokens[0] == 9


@given(
    st.floats(0, 1e4),
    st.floats(0, 10),
    st.floats(1e-4, 100),
    st.lists(st.floats(1e-5, 1), min_size=1, max_size=50),
)
def test_first_token_and_gaps_add_up_to_the_whole(due: float, lag: float, wait: float, gaps: list[float]) -> None:
    """TTFT plus TPOT times the gaps is E2E, whatever the times are."""
    first = due + lag + wait
    rows = one_answer(due=due, sent=due + lag, first=first, last=first + sum(gaps), tokens=len(gaps) + 1)
    whole = rows.ttft_s[0] + rows.tpot_s[0] * len(gaps)
    assert whole == pytest.approx(rows.e2e_s[0], rel=1e-9, abs=1e-9)


def test_concat_orders_rows_by_due_time() -> None:
    """Rows of several workers are put in order of due time."""
    parts = [one_answer(due=d, sent=d, first=d + 1, last=d + 2, tokens=2) for d in (3.0, 1.0, 2.0)]
    assert Observations.concat(parts).due_s.tolist() == [1.0, 2.0, 3.0]


def chain() -> Schedule:
    """Six requests: 0 <- 1 <- 3 <- 5, and 2, 4 of nobody."""
    blocks = np.empty(6, dtype=object)
    blocks[:] = [(k,) for k in range(6)]
    return Schedule(
        "c", np.arange(6) * 10, np.arange(6) * 1.0, np.arange(6) + 1, np.arange(6) + 2, ("x",), blocks, 16,
        np.array([7, 7, -1, 7, 9, 7]), np.array([-1, 0, -1, 1, -1, 3]), np.arange(6) / 2,
    )  # fmt: skip


def test_who_continued_a_row_that_is_gone_continues_its_parent() -> None:
    """By mask or by positions, the chain closes over what was left out; every column goes along."""
    held = chain()
    for which in (np.array([0, 2, 5]), np.array([True, False, True, False, False, True])):
        some = held.take(which)
        assert some.parent is not None
        assert some.parent.tolist() == [-1, -1, 0]
        assert some.index.tolist() == [0, 20, 50]
        assert (some.prompt_tokens.tolist(), some.output_tokens.tolist()) == ([1, 3, 6], [2, 4, 7])
        assert some.blocks is not None
        assert (some.blocks.tolist(), some.block_tokens, some.changes) == ([(0,), (2,), (5,)], 16, ("x",))
        assert some.session is not None
        assert some.think_s is not None
        assert some.session.tolist() == [7, -1, 7]
        assert np.array_equal(some.think_s, [0.0, 1.0, np.nan], equal_nan=True)  # counted from an answer that is gone
    later = held.take(np.arange(1, 6)).parent
    assert later is not None
    assert later.tolist() == [-1, -1, 0, -1, 2]
    assert held.parent is not None
    all_ = held.take(np.arange(6)).parent
    assert all_ is not None
    assert all_.tolist() == held.parent.tolist()
    bare = schedule_of([0.0, 1.0]).take(np.array([1]))
    assert (bare.parent, bare.blocks, bare.session, bare.think_s) == (None, None, None, None)


def test_a_schedule_knows_its_extent() -> None:
    """Span, rate, last due time and longest prompt; none of them without requests; rows one at a time."""
    held = chain()
    assert (held.span_s, held.rate_per_s, held.last_due_s, held.longest_prompt) == (5.0, 1.0, 5.0, 6)
    later = schedule_of([2.0, 6.0])
    assert (later.span_s, later.rate_per_s, later.last_due_s) == (4.0, 0.25, 6.0)
    none = schedule_of([])
    assert (none.span_s, none.last_due_s, none.longest_prompt, len(none)) == (0.0, 0.0, 1, 0)
    assert np.isnan(none.rate_per_s)
    assert np.isnan(schedule_of([3.0]).rate_per_s)
    assert [(r.index, r.due_s, r.prompt_tokens, r.output_tokens) for r in held][1] == (10, 1.0, 2, 3)
    assert len(list(held)) == 6
    assert held.digest() != Schedule("c", held.index + 1, held.due_s, held.prompt_tokens, held.output_tokens).digest()
    assert held.digest() == Schedule("d", held.index, held.due_s, held.prompt_tokens, held.output_tokens).digest()
    with pytest.raises(ValueError, match="earlier one"):
        Schedule("c", held.index, held.due_s, held.prompt_tokens, held.output_tokens, parent=np.arange(6))
    for column in ("index", "prompt_tokens", "output_tokens"):
        with pytest.raises(ValueError, match="equally long"):
            replace(schedule_of([0.0, 1.0]), **{column: np.array([1])})
    with pytest.raises(ValueError, match="at least one"):
        schedule_of([0.0], prompt=0)
    assert len(schedule_of([0.0], prompt=1, output=1)) == 1
    assert len(schedule_of([1.0, 1.0])) == 2


def test_a_row_of_which_nothing_is_known_says_so() -> None:
    """No times, no counts, unsent; of what came nothing else is made up; what was asked is there."""
    rows = Observations.empty(2)
    assert all(np.isnan(getattr(rows, name)).all() for name in Observations.columns() if name.endswith("_s"))
    assert rows.status.tolist() == ["unsent"] * 2
    assert rows.error.tolist() == rows.facts.tolist() == rows.prefill_worker.tolist() == [""] * 2
    assert rows.chunks.tolist() == rows.http_status.tolist() == [0, 0]
    for name in ("index", "worker", "prompt_tokens", "output_tokens", "requested_tokens", "cached_tokens"):
        assert getattr(rows, name).tolist() == [-1, -1], name
    assert len(Observations.empty()) == len(Observations.concat([])) == 0
    asked = Observations.unsent(chain())
    assert asked.index.tolist() == [0, 10, 20, 30, 40, 50]
    assert asked.due_s.tolist() == asked.dispatch_s.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert (asked.requested_prompt_tokens.tolist(), asked.requested_tokens.tolist()) == (
        [1, 2, 3, 4, 5, 6],
        [2, 3, 4, 5, 6, 7],
    )
    with pytest.raises(ValueError, match="equally long"):
        replace(rows, index=np.arange(3))


def test_rows_at_one_instant_are_in_order_of_their_index() -> None:
    """Due time first, then index."""
    parts = []
    for index, due in ((5, 1.0), (2, 1.0), (9, 0.0)):
        row = one_answer(due=due, sent=due, first=due, last=due, tokens=1)
        row.index[:] = index
        parts.append(row)
    assert Observations.concat(parts).index.tolist() == [9, 2, 5]


def test_what_rows_asked_for_is_a_schedule() -> None:
    """In order of due time from the first; counted lengths before requested ones, at least 1."""
    rows = Observations.concat(
        [
            one_answer(due=d, sent=d, first=d, last=d, tokens=t, asked=a)
            for d, t, a in ((5.0, 7, 1), (3.0, -1, 9), (4.0, 0, 2))
        ]
    )
    rows.prompt_tokens[:] = [-1, 0, 30]
    rows.requested_prompt_tokens[:] = [11, 12, 13]
    assert rows.prompt_lengths.tolist() == [11, 0, 30]
    assert rows.tokens.tolist() == [9, 0, 7]
    shuffled = rows.take(np.array([2, 0, 1]))
    held = shuffled.asked("again")
    assert (held.name, held.index.tolist(), held.due_s.tolist()) == ("again", [0, 1, 2], [0.0, 1.0, 2.0])
    assert (held.prompt_tokens.tolist(), held.output_tokens.tolist()) == ([11, 1, 30], [9, 1, 7])


def test_workers_get_other_names_where_they_are_known() -> None:
    """In either column; a name that is not there stays, and rows without any of them are the same rows."""
    rows = Observations.empty(2)
    rows.prefill_worker[:], rows.decode_worker[:] = ["a", "b"], ["c", ""]
    found = rows.renamed({"a": "p0", "c": "d0"})
    assert (found.prefill_worker.tolist(), found.decode_worker.tolist()) == (["p0", "b"], ["d0", ""])
    assert rows.prefill_worker.tolist() == ["a", "b"]
    assert rows.renamed({"z": "y"}) is rows


def test_ok_is_a_whole_answer_and_nothing_else() -> None:
    """Of the statuses that there are, one."""
    rows = Observations.empty(len(STATUSES))
    rows.status[:] = STATUSES
    assert rows.ok.tolist() == [status == "ok" for status in STATUSES]


def test_lag_counts_from_dispatch_where_the_client_held_a_request_back() -> None:
    """From dispatch, from due where there is none; E2E from sent beside it; a two-token answer has one gap."""
    rows = Observations.concat(
        [one_answer(due=d, sent=d + 3.0, first=d + 4.0, last=d + 6.0, tokens=t) for d, t in ((0.0, 2), (1.0, 1))]
    )
    rows.dispatch_s[:] = [2.5, np.nan]
    assert rows.lag_s.tolist() == [0.5, 3.0]
    assert rows.e2e_sent_s.tolist() == [3.0, 3.0]
    assert rows.tpot_s[0] == 2.0
    assert np.isnan(rows.tpot_s[1])


def test_a_histograms_quantile_is_linear_within_its_bucket() -> None:
    """As Prometheus does it; beyond the last finite bound nothing is known; nothing counted is NaN."""

    def of(*buckets: tuple[float, float], count: float = 10.0, total: float = 5.0) -> Histogram:
        return Histogram("w", "prefill", "ttft_s", "m", count, total, buckets)

    held = of((1.0, 2.0), (2.0, 2.0), (4.0, 8.0), (float("inf"), 10.0))
    assert [held.quantile(q) for q in (0.0, 0.1, 0.2, 0.5, 0.8, 0.9, 1.0)] == pytest.approx(
        [0.0, 0.5, 1.0, 3.0, 4.0, 4.0, 4.0]
    )
    assert of((1.0, 0.0), (3.0, 4.0)).quantile(0.0) == 1.0
    assert of((1.0, 0.0), (3.0, 4.0)).quantile(0.5) == 2.0
    assert of((0.5, 4.0)).quantile(1.0) == 0.5
    assert np.isnan(of((1.0, 0.0)).quantile(0.5))
    assert np.isnan(of().quantile(0.5))
    assert held.mean == 0.5
    assert of(count=1.0).mean == 5.0
    assert of((1.0, 0.5)).quantile(1.0) == 1.0
    assert np.isnan(of(count=0.0).mean)


def one_answer(*, due: float, sent: float, first: float, last: float, tokens: int, asked: int = 1) -> Observations:
    rows = Observations.empty(1)
    rows.due_s[:] = due
    rows.sent_s[:] = sent
    rows.first_byte_s[:] = first
    rows.first_token_s[:] = first
    rows.last_token_s[:] = last
    rows.output_tokens[:] = tokens
    rows.requested_tokens[:] = asked
    rows.status[:] = "ok"
    return rows
