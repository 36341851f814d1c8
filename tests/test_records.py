"""Fleets, schedules and observations: what they promise about themselves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from traces.errors import InputError
from traces.records import Fleet, Observations, Schedule


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
