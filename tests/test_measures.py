"""SLO, goodput, verdict: one definition each."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.test_records import one_answer
from traces.errors import InputError
from traces.measures import (
    Slo,
    goodput_per_s,
    lag_by_worker,
    lag_over_time,
    meets,
    met,
    span_s,
    summarise,
    verdict,
)
from traces.records import Observations


def answers(n: int, *, ttft: float = 0.1, lag: float = 0.0, gap: float = 1.0) -> Observations:
    return Observations.concat(
        [
            one_answer(due=i * gap, sent=i * gap + lag, first=i * gap + ttft, last=i * gap + ttft + 0.4, tokens=11)
            for i in range(n)
        ]
    )


@pytest.mark.parametrize(
    ("text", "limits", "constraints"),
    [
        ("ttft<0.5s tpot<50ms", {"ttft": 0.5, "tpot": 0.05}, []),
        ("ttft<0.5s, e2e < 10s", {"ttft": 0.5, "e2e": 10.0}, []),
        ("TTFT<=500ms", {"ttft": 0.5}, []),
        ("e2e<2m", {"e2e": 120.0}, []),
        ("ttft<1", {"ttft": 1.0}, []),
        ("ttft_p99<1s tpot<50ms", {"tpot": 0.05}, [("ttft", 99.0, 1.0)]),
        ("tpot_p99.9<80ms", {}, [("tpot", 99.9, 0.08)]),
    ],
)
def test_an_slo_is_read_as_written(
    text: str, limits: dict[str, float], constraints: list[tuple[str, float, float]]
) -> None:
    """Limits and constraints are read with their units."""
    slo = Slo.parse(text)
    assert {m: pytest.approx(v) for m, v in slo.limits} == limits
    assert [(m, q, pytest.approx(v)) for m, q, v in slo.constraints] == constraints
    assert Slo.parse(str(slo)) == slo


@pytest.mark.parametrize(
    "text", ["", "fast", "ttft", "ttft>1s", "ttft<", "ttft<-1s", "ttft<0s", "itl<5ms", "ttft<1h", "ttft_pxx<1s"]
)
def test_an_slo_that_cannot_be_parsed_is_refused_in_one_line(text: str) -> None:
    """An SLO that cannot be parsed gets one line with an example."""
    with pytest.raises(InputError) as caught:
        Slo.parse(text)
    assert "\n" not in str(caught.value)


def test_goodput_counts_requests_within_all_limits_over_the_span() -> None:
    """Goodput is requests within every limit, over first due to last token."""
    rows = Observations.concat([answers(9), one_answer(due=9.0, sent=9.0, first=10.0, last=10.5, tokens=11)])
    assert span_s(rows) == pytest.approx(10.5)
    assert goodput_per_s(rows, Slo.parse("ttft<0.5s")) == pytest.approx(9 / 10.5)
    assert goodput_per_s(rows, Slo()) == pytest.approx(10 / 10.5)


def test_a_failed_request_is_never_good() -> None:
    """A failed request meets no SLO, not even an empty one."""
    rows = answers(3)
    rows.status[1] = "failed"
    assert met(rows, Slo()).tolist() == [True, False, True]


def test_a_one_token_answer_has_no_tpot_to_miss() -> None:
    """A one-token answer is judged by the other limits only."""
    rows = one_answer(due=0, sent=0, first=0.1, last=0.1, tokens=1)
    assert met(rows, Slo.parse("tpot<1ms ttft<1s")).all()


@given(st.floats(0.01, 10), st.floats(0.01, 10))
def test_a_looser_limit_never_lowers_goodput(a: float, b: float) -> None:
    """A looser limit never lowers goodput."""
    rows = Observations.concat(
        [one_answer(due=i, sent=i, first=i + 0.1 * i, last=i + 10, tokens=11) for i in range(20)]
    )
    low, high = sorted((a, b))
    assert goodput_per_s(rows, Slo.parse(f"ttft<{low:f}s")) <= goodput_per_s(rows, Slo.parse(f"ttft<{high:f}s"))


@pytest.mark.parametrize(
    ("lag_ms", "word"),
    [(0, "valid"), (24, "valid"), (26, "degraded"), (49, "degraded"), (51, "invalid"), (5000, "invalid")],
)
def test_the_verdict_is_the_send_lag_against_the_ttft_limit(lag_ms: float, word: str) -> None:
    """Without an SLO, 25 ms of p99 lag degrade and 50 ms invalidate; with one, 5 and 10 % of its TTFT limit."""
    rows = answers(50, lag=lag_ms / 1e3)
    assert verdict(rows).word == word
    assert verdict(rows, Slo.parse("ttft<0.5s")).word == word
    assert verdict(rows, Slo.parse("ttft<500s")).word == "valid"


def test_an_unsent_request_invalidates_a_run() -> None:
    """One unsent request invalidates the run, however small the lag."""
    rows = Observations.concat([answers(99), Observations.empty(1)])
    assert verdict(rows).word == "invalid"
    assert "never sent" in verdict(rows).reason


def test_a_constraint_is_about_a_quantile_of_all_requests() -> None:
    """A quantile constraint holds for the run as a whole and fails when a request failed."""
    rows = answers(200)
    slo = Slo.parse("ttft_p99<0.2s")
    assert meets(summarise(rows, slo), rows, slo, 0.9)
    assert not meets(summarise(rows, Slo.parse("ttft_p99<0.05s")), rows, Slo.parse("ttft_p99<0.05s"), 0.9)
    rows.status[0] = "failed"
    assert not meets(summarise(rows, slo), rows, slo, 0.9)


def test_the_summary_of_nothing_is_nan_not_an_error() -> None:
    """A run in which nothing finished has NaN latencies."""
    summary = summarise(Observations.empty(3), Slo())
    assert summary.ok == 0
    assert np.isnan(summary.ttft_p99_s)


def test_lag_is_told_by_worker_and_over_time() -> None:
    """Worker 1 is 20 ms late in the second half, worker 0 never; each stretch has its own requests."""
    n = 400
    rows = Observations.empty(n)
    rows.index[:], rows.due_s[:] = np.arange(n), np.arange(n) * 0.1
    rows.dispatch_s[:] = rows.due_s
    rows.worker[:] = np.arange(n) % 2
    late = (rows.worker == 1) & (rows.due_s >= 20)
    rows.sent_s[:] = rows.due_s + np.where(late, 0.020, 0.001)
    rows.sent_s[7] = np.nan
    rows.worker[7] = -1
    by = lag_by_worker(rows)
    assert sorted(by) == [0, 1]
    assert (by[0].requests, by[1].requests) == (200, 199)
    assert by[0].max_ms == pytest.approx(1.0)
    assert by[1].p99_ms == pytest.approx(20.0)
    stretches = lag_over_time(rows, 4)
    assert [lag.requests for _, _, lag in stretches] == [99, 100, 100, 100]
    assert [round(lag.p99_ms) for _, _, lag in stretches] == [1, 1, 20, 20]
    assert stretches[0][0] == 0.0
    assert stretches[-1][1] == pytest.approx(39.9)
    assert lag_over_time(Observations.empty()) == []
