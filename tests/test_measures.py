"""SLO, goodput, verdict: one definition each."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.test_records import one_answer
from traces.errors import InputError
from traces.measures import (
    Figures,
    Lag,
    Slo,
    Tally,
    counts,
    goodput_per_s,
    kept,
    lag_by_worker,
    lag_over_time,
    late_word,
    lateness,
    meets,
    met,
    quantiles,
    span_s,
    summarise,
    ttft_parts,
    verdict,
    worth_per_s,
)
from traces.records import Histogram, Observations, Schedule


def answers(n: int, *, ttft: float = 0.1, lag: float = 0.0, gap: float = 1.0) -> Observations:
    return Observations.concat(
        [
            one_answer(due=i * gap, sent=i * gap + lag, first=i * gap + ttft, last=i * gap + ttft + 0.4, tokens=11)
            for i in range(n)
        ]
    )


@given(st.lists(st.floats(1e-5, 1e5), min_size=1, max_size=60), st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_quick_quantiles_are_those_of_numpy(values: list[float], at: list[float]) -> None:
    """To the last bit: the same data and seed must give the same answer whichever is asked."""
    assert quantiles(np.array(values), at).tolist() == np.quantile(values, at).tolist()


@pytest.mark.parametrize(
    ("text", "limits", "constraints"),
    [
        ("ttft<0.5s tpot<50ms", {"ttft": 0.5, "tpot": 0.05}, []),
        ("ttft<0.5s, e2e < 10s", {"ttft": 0.5, "e2e": 10.0}, []),
        ("TTFT<=500ms", {"ttft": 0.5}, []),
        ("e2e<2m", {"e2e": 120.0}, []),
        ("ttft<1", {"ttft": 1.0}, []),
        ("e2e<1000000s", {"e2e": 1e6}, []),
        ("ttft<0.01us tpot_p99<2e6ms", {"ttft": 1e-8}, [("tpot", 99.0, 2000.0)]),
        ("ttft_p99<1s tpot<50ms", {"tpot": 0.05}, [("ttft", 99.0, 1.0)]),
        ("tpot_p99.9<80ms", {}, [("tpot", 99.9, 0.08)]),
        ("ttft_p99.99999<1s e2e_p0.00001<1s", {}, [("ttft", 99.99999, 1.0), ("e2e", 1e-5, 1.0)]),
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
    "text",
    [
        "",
        "fast",
        "ttft",
        "ttft>1s",
        "ttft<",
        "ttft<-1s",
        "ttft<0s",
        "itl<5ms",
        "ttft<1h",
        "ttft_pxx<1s",
        "ttft<1e999s",
        "ttft<1e",
        "ttft_p99.99999999999999999<1s",
    ],
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


def test_a_missed_constraint_counts_by_how_far_it_is_missed() -> None:
    """Limit over quantile of the worst constraint, at most 1; none asked is kept; of what never came nothing is."""
    rows = answers(201)
    rows.first_token_s[:] = rows.due_s + 0.01 * np.arange(201)  # p99 is 1.98 s
    rows.last_token_s[:] = rows.first_token_s + 1
    for text, share in (("ttft_p99<0.99s", 0.5), ("ttft_p99<2s", 1.0), ("ttft<1ms", 1.0)):
        assert kept(rows, Slo.parse(text)) == pytest.approx(share)
        assert worth_per_s(rows, Slo.parse(text)) == pytest.approx(share * goodput_per_s(rows, Slo.parse(text)))
    assert kept(rows, Slo.parse("ttft_p99<0.99s e2e_p50<0.5s")) == pytest.approx(0.25)
    assert kept(Observations.empty(3), Slo.parse("ttft_p99<1s")) == 0.0
    assert Slo.parse("ttft<1s ttft_p99<2s tpot_p50<50ms").as_limits == Slo((("ttft", 1.0), ("tpot", 0.05)))


def test_a_constraint_is_about_a_quantile_of_all_requests() -> None:
    """A quantile constraint holds for the run as a whole and fails when a request failed."""
    rows = answers(200)
    slo = Slo.parse("ttft_p99<0.2s")
    assert meets(summarise(rows, slo), rows, slo, 0.9)
    assert not meets(summarise(rows, Slo.parse("ttft_p99<0.05s")), rows, Slo.parse("ttft_p99<0.05s"), 0.9)
    rows.status[0] = "failed"
    assert not meets(summarise(rows, slo), rows, slo, 0.9)
    rows = answers(201)
    rows.first_token_s[:] = rows.due_s + 0.01 * np.arange(201)  # p98 is 1.96 s, p99 1.98 s
    for limit, holds in (("1.97s", False), ("1.981s", True)):
        slo = Slo.parse(f"ttft_p99<{limit}")
        assert meets(summarise(rows, slo), rows, slo, 0.9) is holds


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


# --- the arithmetic, by hand ----------------------------------------------------------------------------------------


def mixed() -> Observations:
    """Ten answers a second apart of which one failed and one was never sent; every figure differs from every other."""
    rows = Observations.empty(10)
    k = np.arange(10)
    rows.index[:], rows.due_s[:], rows.dispatch_s[:], rows.worker[:] = k, k, k, k % 2
    rows.sent_s[:] = k + 0.001 * (k + 1)
    rows.first_token_s[:] = k + 0.1 * (k + 1)
    rows.last_token_s[:] = rows.first_token_s + 0.5 + 0.05 * k
    rows.output_tokens[:] = 11 + k
    rows.status[:] = "ok"
    rows.status[3], rows.error[3] = "failed", "reset"
    rows.status[9] = "unsent"
    for column in (rows.sent_s, rows.first_token_s, rows.last_token_s):
        column[9] = np.nan
    return rows


def test_every_figure_of_a_summary_is_numpys() -> None:
    """Quantiles over ok requests, rates over the span, attainment over all requests."""
    rows, slo = mixed(), Slo.parse("ttft<0.55s")
    held = [0, 1, 2, 4, 5, 6, 7, 8]
    found = summarise(rows, slo)
    assert (found.n, found.ok) == (10, 8)
    assert found.span_s == pytest.approx(8 + 0.9 + 0.9)
    assert found.goodput_per_s == pytest.approx(4 / found.span_s)
    assert found.attainment == pytest.approx(0.4)
    assert found.throughput_per_s == pytest.approx(8 / found.span_s)
    assert found.output_tokens_per_s == pytest.approx(sum(11 + k for k in held) / found.span_s)
    for name in ("ttft_s", "tpot_s", "e2e_s", "ttft_sent_s", "e2e_sent_s"):
        values = getattr(rows, name)[held]
        for q in (50, 90, 99):
            figure = f"{name[:-2]}_p{q}_s"
            if hasattr(found, figure):
                assert getattr(found, figure) == pytest.approx(np.quantile(values, q / 100)), figure
    assert found.e2e_mean_s == pytest.approx(rows.e2e_s[held].mean())

    said = Figures.of(rows, slo)
    assert (said.n, said.ok, said.exact, said.span_s) == (10, 8, True, found.span_s)
    assert said.goodput_per_s == found.goodput_per_s
    assert said.throughput_per_s == found.throughput_per_s
    assert said.output_tokens_per_s == found.output_tokens_per_s
    assert said.attainment == found.attainment
    assert said.quantiles["ttft_s"] == pytest.approx(
        {w: np.quantile(rows.ttft_s[held], q) for w, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))}
    )
    assert said.quantiles["tpot_s"]["max"] == pytest.approx(rows.tpot_s[held].max())


def test_nothing_and_no_time_are_nan() -> None:
    """No rows, or rows without a span, have no rate; the last due time ends a run in which nothing came."""
    empty = Observations.empty()
    assert span_s(empty) == 0.0
    assert np.isnan(goodput_per_s(empty, Slo()))
    none = summarise(empty, Slo())
    assert all(np.isnan(v) for v in (none.goodput_per_s, none.attainment, none.throughput_per_s, none.e2e_mean_s))
    assert np.isnan(none.output_tokens_per_s)
    rows = Observations.empty(3)
    rows.due_s[:], rows.status[:] = [2.0, 3.0, 6.0], "failed"
    assert span_s(rows) == 4.0
    rows.status[:] = "failed"
    rows.status[2] = "unsent"  # a run that was stopped ended before what it never sent was due
    assert span_s(rows) == 1.0
    rows.status[:] = "unsent"
    assert span_s(rows) == 0.0
    late = one_answer(due=5.0, sent=5.0, first=5.0, last=5.0, tokens=1)
    assert np.isnan(goodput_per_s(late, Slo()))
    assert np.isnan(summarise(late, Slo()).throughput_per_s)


def test_a_limit_is_kept_by_a_request_just_at_it() -> None:
    """<= keeps a limit, for each metric, in goodput and in constraints."""
    rows = one_answer(due=0.0, sent=0.0, first=0.5, last=1.0, tokens=3)
    for text, good in (
        ("ttft<0.5s", True), ("ttft<0.49s", False), ("tpot<0.25s", True), ("tpot<0.24s", False), ("e2e<1s", True),
        ("e2e<0.9s", False), ("ttft<0.5s e2e<0.9s", False),
    ):  # fmt: skip
        slo = Slo.parse(text)
        assert met(rows, slo).tolist() == [good], text
        assert meets(summarise(rows, slo), rows, slo, 1.0) is good
    assert not met(one_answer(due=0, sent=0, first=0.5, last=1.0, tokens=2), Slo.parse("tpot<0.4s")).any()
    assert meets(summarise(rows, Slo()), rows, Slo.parse("ttft_p50<500ms"), 0.9)
    assert not meets(summarise(rows, Slo()), rows, Slo.parse("ttft_p50<500ms e2e_p99<900ms"), 0.9)
    four = Observations.concat([mixed().take(np.arange(4))])
    assert meets(summarise(four, Slo()), four, Slo(), 0.75)  # three of four
    assert not meets(summarise(four, Slo()), four, Slo(), 0.76)
    two = Observations.concat([rows, one_answer(due=1, sent=1, first=3.0, last=9.0, tokens=2)])
    assert meets(summarise(two, Slo()), two, Slo.parse("ttft_p50<1.25s"), 0.9)
    assert not meets(summarise(two, Slo()), two, Slo.parse("ttft_p60<1.25s"), 0.9)


def test_an_slo_is_written_in_milliseconds_below_a_tenth() -> None:
    """0.1 s is written in seconds, less in milliseconds; units of input are microseconds to minutes; 0 of a unit is none."""
    assert (
        str(Slo.parse("ttft<100ms tpot<99ms e2e<2m ttft_p99.9<1500us"))
        == "ttft<0.1s tpot<99ms e2e<120s ttft_p99.9<1.5ms"
    )
    assert Slo.parse("ttft<.5").limit("ttft") == 0.5
    assert Slo.parse("ttft<.5").limit("e2e") is None
    assert str(Slo()) == ""


def test_lateness_has_its_bounds() -> None:
    """At 5 and at 10 % of the limit a run is still what it was; figures are milliseconds; without a limit 0.5 s is assumed."""
    tenth = Slo.parse("ttft<1s")
    for lag, word in ((0.05, "valid"), (0.0501, "degraded"), (0.1, "degraded"), (0.1001, "invalid")):
        assert lateness(np.array([lag]), 0, tenth).word == word, lag
    found = lateness(np.array([0.001, 0.002, 0.004, np.nan]), 0)
    assert (found.lag_p50_ms, found.lag_max_ms) == (pytest.approx(2.0), pytest.approx(4.0))
    assert found.lag_p99_ms == pytest.approx(3.96)
    assert found.reason == "send lag p99 4.0 ms (no TTFT limit was given: 500 ms is assumed)"
    assert lateness(np.array([0.004]), 0, tenth).reason == "send lag p99 4.0 ms of 1000 ms TTFT limit"
    assert lateness(np.array([np.nan]), 0).reason == "nothing was sent"
    assert lateness(np.array([np.nan]), 0).word == "invalid"
    assert lateness(np.array([0.0]), 2).reason == "2 requests were never sent"
    assert lateness(np.array([0.026]), 0, Slo.parse("tpot<1s")).word == "degraded"


def test_ends_are_counted_by_status_and_kind() -> None:
    """Each status, and the kinds of failure apart; both in order."""
    rows = mixed()
    rows.status[5], rows.error[5] = "failed", "refused"
    rows.error[6] = "reset"  # of an ok request: no failure
    assert list(counts(rows).items()) == [
        ("failed", 2), ("ok", 7), ("unsent", 1), ("failed.refused", 1), ("failed.reset", 1),
    ]  # fmt: skip


def test_a_tally_in_parts_is_the_count_of_the_whole() -> None:
    """Rows in parts, in any order, count as together; silent are those that never came; warm-up excuses lag only."""
    n = 5000
    rows = Observations.empty(n)
    rows.index[:], rows.due_s[:], rows.dispatch_s[:] = np.arange(n) * 2, np.arange(n), np.arange(n)
    rows.sent_s[:] = rows.due_s + np.where(rows.due_s < 100, 0.4, 0.001)
    rows.status[:] = "ok"
    ones = np.ones(n, dtype=np.int64)
    asked = Schedule("s", rows.index, rows.due_s, ones, ones)
    tally, all_in = Tally(100.0), Tally(0.0)
    tally.add(Observations.empty())
    assert tally.silent(asked).tolist() == list(range(n))
    missing = [0, 511, 512, 513, 4000, n - 1]
    kept = np.setdiff1d(np.arange(n), missing)
    for part in (kept[:3], kept[2000:3000], kept[3000:], kept[3:2000]):
        tally.add(rows.take(part))
    all_in.add(rows)
    assert tally.rows == n - len(missing)
    assert tally.counts == {"ok": n - len(missing)}
    assert tally.silent(asked).tolist() == missing
    assert all_in.silent(asked).tolist() == []
    assert tally.verdict(None).word == "valid"
    assert tally.verdict(None).lag_max_ms == pytest.approx(1.0)
    assert all_in.verdict(None).word == "invalid"
    edge = Tally(99.0)
    edge.add(rows.take(np.array([98, 99, 100])))
    assert edge.verdict(None).lag_max_ms == pytest.approx(400.0)  # due just when the warm-up ends
    lost = Tally(1e9)
    lost.add(Observations.empty(1))
    assert "1 requests were never sent" in lost.verdict(None).reason
    assert Tally(0.0).verdict(None).reason == "nothing was sent"


def test_a_tally_holds_any_index() -> None:
    """The first index, one at the edge of what is held, and one far beyond."""
    for indices in ([0], [1023], [1024], [5, 1024, 70_000], [2047, 2048], [4096, 1, 9000]):
        tally = Tally(0.0)
        for index in indices:
            row = one_answer(due=0, sent=0, first=1, last=1, tokens=1)
            row.index[:] = index
            tally.add(row)
        every = np.arange(70_002)
        ones = np.ones(len(every), dtype=np.int64)
        asked = Schedule("s", every, every * 1.0, ones, ones)
        assert sorted(set(every.tolist()) - set(tally.silent(asked).tolist())) == sorted(indices)


def test_lag_of_some_rows_in_milliseconds() -> None:
    """How many were sent and how late they left; the worker numbered 0 is one, a single stretch holds all."""
    rows = mixed()
    lag = Lag.of(rows)
    assert lag.requests == 9
    assert (lag.p50_ms, lag.max_ms) == (pytest.approx(5.0), pytest.approx(9.0))
    assert lag.p99_ms == pytest.approx(8.92)
    assert [one.requests for one in lag_by_worker(rows).values()] == [5, 4]
    [(start, end, one)] = lag_over_time(rows, 1)
    assert (start, end, one.requests) == (0.0, 9.0, 9)
    assert len(lag_over_time(rows)) == 12


def test_parts_of_ttft_come_from_answers_or_else_from_servers() -> None:
    """An answer's own words first, then the histogram that is nearest, weighted by its count; what is left is the rest."""
    rows = mixed()
    ok = rows.ok
    mean = float(rows.ttft_sent_s[ok].mean())
    assert ttft_parts(rows, []) == []
    rows.queue_s[[0, 1, 3]] = [0.01, 0.03, 9.0]  # the one that failed does not count
    held = [
        Histogram("p0", "prefill", "prefill_s", "engine:prefill", 3, 0.3),
        Histogram("p1", "prefill", "prefill_s", "engine:prefill", 1, 0.5),
        Histogram("m0", "mixed", "prefill_s", "engine:prefill", 9, 9.0),
        Histogram("d0", "decode", "transfer_s", "engine:transfer", 4, 0.08),
        Histogram("d0", "decode", "queue_s", "engine:queue", 0, 0.0),
    ]
    parts = ttft_parts(rows, held)
    assert [(p.name, p.n, p.source) for p in parts[:3]] == [
        ("queue_s", 2, "answers"),
        ("prefill_s", 4, "engine:prefill of prefill"),
        ("transfer_s", 4, "engine:transfer of decode"),
    ]
    assert [p.mean_s for p in parts[:3]] == pytest.approx([0.02, 0.2, 0.02])
    assert (parts[3].name, parts[3].n, len(parts)) == ("rest", 8, 4)
    assert parts[3].mean_s == pytest.approx(mean - 0.24)
    assert parts[3].source == f"TTFT {mean * 1e3:.1f} ms less the parts"
    rows.first_token_s[:] = np.nan
    assert [p.name for p in ttft_parts(rows, held)] == ["queue_s", "prefill_s", "transfer_s"]


def test_a_run_of_half_a_second_has_rates() -> None:
    """Only a run without any span has none."""
    rows = one_answer(due=2.0, sent=2.0, first=2.25, last=2.5, tokens=3)
    found = summarise(rows, Slo())
    assert (found.goodput_per_s, found.throughput_per_s, found.output_tokens_per_s) == (2.0, 2.0, 6.0)
    assert goodput_per_s(rows, Slo()) == 2.0


@pytest.mark.parametrize(
    ("late_ms", "slo", "word"),
    [
        (5, None, "valid"),
        (5.1, None, "degraded"),  # above its own bound, far below the 25 ms of the generator's lag
        (50, None, "degraded"),
        (51, None, "invalid"),  # a tenth of the 500 ms that stand for a TTFT limit
        (51, Slo.parse("ttft<1s"), "degraded"),
        (1.1, Slo.parse("ttft<20ms"), "degraded"),  # 5 % of a limit below 100 ms is the stricter bound
        (2.1, Slo.parse("ttft<20ms"), "invalid"),
    ],
)
def test_a_late_endpoint_degrades_before_it_spoils(late_ms: float, slo: Slo | None, word: str) -> None:
    """From 5 ms at p99, or 5 % of the TTFT limit, it degrades a run; over 10 % of the limit the run is invalid."""
    assert late_word(late_ms / 1e3, slo, degrades_s=0.005) == word
