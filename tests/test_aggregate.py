"""What is said of a long run comes from counts and is what its rows say: rates exactly, quantiles within a bin of 1 %."""

from __future__ import annotations

import json
import math
import os
import shutil
import sqlite3
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import traces.store
import traces.transfer
from advisor import compare, model, report
from advisor.cli import main
from advisor.features import RunData, decode_rows, load_quantiles, quiet_rows
from advisor.report import digest as digests
from advisor.report.digest import QUANTILES, Digest, read
from advisor.report.sections import DRAWN, distributions, over_time, seconds
from advisor.report.sections import lag as lateness
from advisor.splits import _between, _parts
from loadgen.cluster import Profile, simulate
from tests.test_advise import lognormal
from tests.test_features import run_of
from tests.test_store import a_run, same, same_run, some_rows
from traces import aggregate
from traces.aggregate import APPROXIMATE
from traces.errors import InputError
from traces.measures import Figures, Slo, lag_by_worker, parts_of, summarise, ttft_parts
from traces.records import Decision, Fleet, FleetChange, Histogram, Observations, Sample, Schedule
from traces.shape import head
from traces.store import Store, open_store
from traces.transfer import export_runs, import_runs


def answered(n: int, seed: int) -> Observations:
    """Rows of a run as they may be: answers over six decades of time, failures, one-token answers, no usage."""
    rng = np.random.default_rng(seed)
    rows = some_rows(n, seed)
    rows.index[:] = np.arange(n)
    rows.sent_s[:] = rows.due_s + rng.exponential(0.001, n)
    rows.first_token_s[:] = rows.sent_s + 10 ** rng.uniform(-4, 2, n)
    rows.last_token_s[:] = rows.first_token_s + 10 ** rng.uniform(-4, 2, n)
    rows.output_tokens[:] = rng.integers(-1, 4, n)
    rows.requested_tokens[:] = rng.integers(1, 4, n)
    lost = rng.random(n) < 0.2
    rows.status[:] = np.where(lost, "failed", "ok")
    rows.last_token_s[lost] = np.nan
    rows.status[lost & (rows.due_s > np.quantile(rows.due_s, 0.9))] = "unsent"  # stopped before their time
    return rows


def of_rows(rows: Observations, slo: str, warmup_s: float = 0.0, pieces: int = 7) -> aggregate.Bins:
    """The counts of rows that came in some order, in pieces."""
    found = aggregate.Bins(slo, warmup_s)
    order = np.random.default_rng(0).permutation(len(rows))
    for part in np.array_split(order, pieces):
        found.add(rows.take(part))
    return found


def near(values: Any, exact: Any, within: float = 0.0101) -> None:
    """Within a bin, and missing where the other is."""
    np.testing.assert_allclose(np.asarray(values, float), np.asarray(exact, float), rtol=within, atol=1e-9)


@given(st.floats(0.001, 1e6), st.floats(0.0, 1.5), st.integers(0, 1000))
@settings(max_examples=12)
def test_slots_widen_with_the_run_and_lose_nobody(longest_s: float, warm: float, seed: int) -> None:
    """However long the run grows, each request is in the slot between whose edges it was due, in the warm-up or after."""
    rng = np.random.default_rng(seed)
    rows = Observations.empty(40)
    rows.index[:] = np.arange(40)
    rows.due_s[:] = np.sort(rng.uniform(0, longest_s, 40))
    rows.status[:] = "failed"
    found = aggregate.Bins("", warm * longest_s)
    for part in np.array_split(np.arange(40), 5):  # it grows
        found.add(rows.take(part))
    edges, counts = found.edges_s, found.counts["requests"]
    assert (edges[0], edges[-1]) == pytest.approx((rows.due_s[0], rows.due_s[-1]), abs=1e-9)
    assert counts[: found.slots].sum() == counts.sum() == 40
    inner = found.warmup_s + (found.base + np.arange(1, found.slots)) * found.width_s
    assert (
        counts[: found.slots].tolist()
        == np.bincount(np.searchsorted(inner, rows.due_s, side="right"), minlength=found.slots).tolist()
    )
    assert edges[1:-1].tolist() == inner.tolist()
    assert found.slots <= aggregate.SLOTS
    assert counts[: found.slots][found.counted].sum() == (rows.due_s >= found.warmup_s).sum()


def test_figures_of_next_to_nothing() -> None:
    """Rates over half a second are twice its counts, over an instant there are none; a row of no worker is no worker's lag;
    a limit below every latency has nobody within, one beyond all of them everybody."""
    rows = Observations.empty(4)
    rows.index[:] = np.arange(4)
    rows.due_s[:] = rows.sent_s[:] = [0.0, 0.1, 0.2, 0.3]
    rows.first_token_s[:] = rows.last_token_s[:] = rows.sent_s + 0.2
    rows.worker[:] = [0, 0, 1, -1]
    rows.status[:] = "ok"
    rows.output_tokens[:] = 3
    found = of_rows(rows, "", pieces=1)
    said = found.figures()
    assert (said.span_s, said.throughput_per_s) == pytest.approx((0.5, 8.0))
    assert {one: int(lags.sum()) for one, lags in found.by_worker.items()} == {0: 2, 1: 1}
    assert found.share("ttft_s", 0.1) == 0.0
    assert found.share("ttft_s", 1.0) == 1.0
    edge = aggregate.EDGES[int(aggregate.bins(np.array([0.2]))[0])]
    assert found.share("ttft_s", edge * math.exp(aggregate.WIDTH / 4)) == pytest.approx(0.25)
    instant = Observations.empty(1)
    instant.due_s[:] = 1.0
    instant.status[:] = "failed"
    assert math.isnan(of_rows(instant, "", pieces=1).figures().throughput_per_s)


@pytest.mark.parametrize("warmup_s", [0.0, 30.0])
def test_counts_say_what_the_rows_say(made_any_url: str, warmup_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """On every backend the way by counts (kept while rows come, or counted from the rows) and the short way by numpy say the same
    of a run, with and without a warm-up, within its own SLO and another one."""
    rows = answered(1200, 1)
    slo = "ttft<1s tpot<0.5s e2e<20s"
    with open_store(made_any_url) as store:
        run = store.begin_run(replace(a_run(), slo=slo, warmup_s=warmup_s, scheduled=1200))
        store.add_observations(run.id, rows)
        exact = store.figures(run)
        assert exact.exact
        assert store.bins(run) is None
        monkeypatch.setattr(traces.store, "EXACT_ROWS", 100)
        live = store.begin_run(replace(a_run(), slo=slo, warmup_s=warmup_s, scheduled=1200))
        for part in (slice(0, 700), slice(600, 1200), slice(0, 50)):  # some come twice
            store.add_observations(live.id, rows.take(part))
        monkeypatch.setattr(store, "_pieces", None)  # nobody reads the rows again
        live = store.end_run(live)
        counted = {"live": store.figures(live)}
        monkeypatch.undo()
        monkeypatch.setattr(traces.store, "EXACT_ROWS", 100)
        counted["from rows"] = store.figures(run)
        assert repr(counted["live"]) == repr(counted["from rows"])
        binned = counted["live"]
        assert not binned.exact
        for name in ("n", "ok", "goodput_per_s", "throughput_per_s", "output_tokens_per_s", "attainment", "span_s"):
            assert getattr(binned, name) == pytest.approx(getattr(exact, name), rel=1e-12), name
        counted_rows = run.counted(rows)
        ok = counted_rows.take(counted_rows.ok)
        for name, quantiles in binned.quantiles.items():
            values = getattr(ok, name)
            values = np.sort(values[np.isfinite(values)])
            for word, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
                true = values[int(q * (len(values) - 1))]
                assert quantiles[word] == pytest.approx(true, rel=0.0051), (name, word)
            assert quantiles["max"] == pytest.approx(values[-1], rel=1e-12)
        other = Slo.parse("ttft<0.1s tpot<0.2s e2e<3s")
        monkeypatch.setattr(traces.store, "FEED_ROWS", 7)  # many pieces, within one slot of time and across
        monkeypatch.setattr(
            traces.store, "SHARE_ROWS", 70
        )  # by several at once, where the database is a file or a server
        wanted = of_rows(rows, str(other), warmup_s)
        for again in (False, True):
            if again:
                monkeypatch.setattr(store, "_good", None)  # what was asked of an ended run is kept with it
            held = store.bins(live, other)
            assert held is not None
            assert held.counts["good"].tolist() == wanted.counts["good"].tolist()
            good = Figures.of(counted_rows, other).goodput_per_s
            assert held.figures().goodput_per_s == pytest.approx(good, rel=1e-12)
        monkeypatch.undo()
        monkeypatch.setattr(traces.store, "EXACT_ROWS", 100)
        for k in range(2 * aggregate.OTHERS):
            store.bins(live, Slo((("ttft", k + 1.0),)))
        kept = store.bins(live)
        assert kept is not None
        assert list(kept.others) == [f"ttft<{k + 1.0}" for k in range(aggregate.OTHERS, 2 * aggregate.OTHERS)]
        store.add_observations(run.id, answered(1201, 1).take(slice(1200, 1201)))
        more = store.bins(run, other)
        assert more is not None
        assert more.rows == 1201  # and is thrown away by a row that comes later


def test_rows_of_somebody_else_are_counted_at_the_end(made_any_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose rows came by two processes is counted from the database when it ends; a row that comes later counts as well."""
    rows = answered(500, 5)
    monkeypatch.setattr(traces.store, "EXACT_ROWS", 100)
    with open_store(made_any_url) as store, open_store(made_any_url) as other:
        run = store.begin_run(replace(a_run(), slo="ttft<1s", scheduled=500))
        store.add_observations(run.id, rows.take(slice(0, 200)))
        other.add_observations(run.id, rows.take(slice(200, 450)))
        run = store.end_run(run)
        assert store.figures(run).n == 450
        other.add_observations(run.id, rows.take(slice(450, 500)))
        assert store.figures(run).n == 500
        held = store.bins(run)
        assert held is not None
        assert held.rows == 500


@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 1000), span=st.floats(0.01, 1e5), warmup=st.floats(0.0, 0.9), pieces=st.integers(1, 9))
def test_counts_do_not_depend_on_the_order_of_rows(seed: int, span: float, warmup: float, pieces: int) -> None:
    """Whatever the pieces, the counts are the same, come back from the database as they went in, and hold every request."""
    rows = answered(60, seed)
    rows.due_s[:] = np.random.default_rng(seed).uniform(0, span, 60)
    found = of_rows(rows, "ttft<1s", warmup * span, pieces)
    whole = of_rows(rows, "ttft<1s", warmup * span, 1)
    assert np.array_equal(found.latency, whole.latency)
    again = aggregate.Bins.unpack(json.loads(json.dumps(found.pack()[0])), found.pack()[1])
    assert again is not None
    for one in (whole, again):
        assert repr(one.figures()) == repr(found.figures())
        assert one.edges_s.tolist() == found.edges_s.tolist()
        assert {k: v.tolist() for k, v in one.counts.items()} == {k: v.tolist() for k, v in found.counts.items()}
    assert found.slots <= aggregate.SLOTS
    assert found.counts["requests"].sum() == found.rows == 60
    counted = int((rows.due_s >= warmup * span).sum())
    assert found.total("requests") == counted
    assert aggregate.Bins.unpack(found.pack()[0], b"not at all") is None


@pytest.mark.parametrize(("most", "size"), [(1, 1), (255, 1), (256, 2), (65_536, 4)])
def test_counts_are_kept_in_as_few_bytes_as_hold_them(most: int, size: int) -> None:
    """One byte each up to 255 in a bin, and the four that an earlier version kept of every count are read as well."""
    found = of_rows(answered(60, 1), "ttft<1s", 0.0)
    found.latency[0, 0, 40] = most
    held, body = found.pack()
    assert held["size"] == size
    older = np.ascontiguousarray(found.latency[:, : found.slots, slice(*held["bins"])], dtype="<u4").tobytes()
    for plain, packed in ((held, body), ({k: v for k, v in held.items() if k != "size"}, zlib.compress(older))):
        again = aggregate.Bins.unpack(plain, packed)
        assert again is not None
        assert np.array_equal(again.latency, found.latency)
    for wrong in (0, 3, -1, size * 2, "many", None):
        assert aggregate.Bins.unpack(held | {"size": wrong}, body) is None
    for wrong in (0.0, -1.0, math.nan, math.inf):
        assert aggregate.Bins.unpack(held | {"width_s": wrong}, body) is None


def test_bins_end_at_a_tenth_of_a_microsecond_and_at_28_hours() -> None:
    """Each value lies between the edges of its bin; what is at or below nothing in the first, what is beyond all in the last."""
    last = aggregate.BINS - 1
    assert aggregate.bins(np.array([-5.0, 0.0, 1e-9, 1e-7, 1e5, 1e9])).tolist() == [0, 0, 0, 0, last, last]
    assert aggregate.bins(np.array([1e5 / math.exp(1.5 * aggregate.WIDTH)]))[0] < last
    values = 10 ** np.random.default_rng(1).uniform(-6.9, 4.9, 1000)
    place = aggregate.bins(values)
    assert len(aggregate.EDGES) == aggregate.BINS + 1
    assert ((aggregate.EDGES[place] <= values * (1 + 1e-9)) & (values <= aggregate.EDGES[place + 1] * (1 + 1e-9))).all()
    rows = answered(60, 1)
    rows.status[:], rows.due_s[:] = "ok", np.arange(60)
    rows.first_token_s[:], rows.last_token_s[:] = (
        rows.due_s - 1.0,
        rows.due_s + 2e5,
    )  # a clock that was set back, and days
    found = of_rows(rows, "")
    assert [found.quantile(name, 0.5) for name in ("ttft_s", "e2e_s")] == [-1.0, pytest.approx(1e5, rel=0.011)]
    assert found.quantile("e2e_s", 1.0) == pytest.approx(2e5)
    assert [found.share("e2e_s", 1e9), found.share("e2e_s", 1.0)] == [1.0, 0.0]
    held, body = found.pack()
    assert held["bins"] == [0, aggregate.BINS]
    for plain in (held, {k: v for k, v in held.items() if k != "bins"}):  # older ones hold all bins
        again = aggregate.Bins.unpack(plain, body)
        assert again is not None
        assert np.array_equal(again.latency, found.latency)
    for wrong in ([-1, aggregate.BINS], [5, 4], [0, aggregate.BINS + 1]):
        assert aggregate.Bins.unpack(held | {"bins": wrong}, body) is None
    for slots in (0, aggregate.SLOTS + 1):
        assert aggregate.Bins.unpack(held | {"slots": slots}, body) is None


def test_every_latency_is_counted_once() -> None:
    """In the slot in which its request was due; of a run of no request, or of as many slots as there may be, nothing is lost."""
    rows = answered(300, 2)
    rows.due_s[:] = np.arange(300) / 10
    found = of_rows(rows, "")
    due = np.floor(rows.due_s / found.width_s).astype(int) - found.base
    for m, name in enumerate(aggregate.MEASURES):
        values = getattr(rows, name)
        seen = np.isfinite(values) & (rows.ok | (name == "lag_s"))
        wanted = np.bincount(due[seen], minlength=aggregate.SLOTS)
        assert found.latency[m].sum(axis=1).tolist() == wanted.tolist(), name
    none = aggregate.Bins("ttft<1s")
    again = aggregate.Bins.unpack(*none.pack())
    assert again is not None
    assert repr(again.figures()) == repr(none.figures())
    assert again.figures().n == 0
    full = Observations.empty(aggregate.SLOTS)
    full.index[:] = np.arange(aggregate.SLOTS)
    full.due_s[:] = np.arange(aggregate.SLOTS) * aggregate.FINEST_S
    full.status[:] = "unsent"
    most = of_rows(full, "")
    assert (most.slots, most.width_s) == (aggregate.SLOTS, aggregate.FINEST_S)
    again = aggregate.Bins.unpack(*most.pack())
    assert again is not None
    assert again.counts["requests"].tolist() == [1] * aggregate.SLOTS
    good = most.within("ttft<9s", {-1: 3, 0: 1, aggregate.SLOTS - 1: 2, aggregate.SLOTS: 5}).counts["good"]
    assert [good[0], good[-1], good.sum()] == [1, 2, 3]


def test_rows_that_come_again_are_counted_once() -> None:
    """Whatever their numbers, however far apart, and in whatever order."""
    rows = answered(3000, 3)
    found = aggregate.Bins("")
    for part in (
        slice(0, 1),
        slice(1023, 1025),
        slice(0, 1024),
        slice(2999, 3000),
        slice(0, 3000),
        slice(5, 9),
        slice(0, 0),
    ):
        found.add_once(rows.take(part))
    assert found.rows == 3000
    assert found.counts["requests"].sum() == 3000


def test_the_first_that_was_seen_of_a_failure_is_told() -> None:
    """By when it was due, in whatever order rows come, and not one of which nothing was seen; kinds beyond the last are one."""
    rows = Observations.empty(6)
    rows.index[:] = np.arange(6)
    rows.due_s[:] = [0.0, 1.0, 2.0, 3.0, 3.0, 4.0]
    rows.status[:] = ["failed"] * 5 + ["lost"]
    rows.error[:5] = "timeout"
    rows.detail[:] = ["", "", "second", "third", "at once", ""]
    for order in ([0, 1, 2, 3, 4, 5], [3, 4, 2, 1, 0, 5], [5, 0, 4, 3, 2, 1]):
        found = aggregate.Bins("")
        for k in order:
            found.add(rows.take([k]))
        assert found.failures == {"timeout": [5, 2.0, "second"], "lost": [1, math.inf, ""]}
    found = aggregate.Bins("")
    found.add(rows.take([3, 4]))
    assert found.failures == {"timeout": [2, 3.0, "third"]}  # of two at once the one that came first
    many = Observations.empty(aggregate.KINDS + 3)
    many.index[:] = np.arange(len(many))
    many.due_s[:], many.status[:] = 0.0, "failed"
    many.error[:] = [f"kind {k}" for k in range(aggregate.KINDS + 2)] + ["kind 0"]
    found = of_rows(many, "", pieces=1)
    assert len(found.failures) == aggregate.KINDS + 1
    assert found.failures["other"][0] == 2
    assert found.total("requests") == sum(n for n, *_ in found.failures.values()) == len(many)


@pytest.mark.parametrize("warmup_s", [0.0, 7.0])
def test_lag_over_time_is_that_of_the_requests_due_then(warmup_s: float) -> None:
    """Stretches follow one another from the first to the last that was due, warm-up too, and each says what its requests say."""
    rows = answered(1000, 4)
    rows.due_s[:] = np.arange(1000) / 50
    rows.dispatch_s[:] = rows.due_s + np.where(rows.due_s < 10, 0.001, 0.4) * (1 + rows.index / 1000)
    rows.status[:] = "ok"
    found = of_rows(rows, "", warmup_s)
    told = found.lag_over_time()
    assert len(told) == 12
    assert (told[0][0], told[-1][1]) == pytest.approx((0.0, rows.due_s[-1]))
    assert [end for _, end, _ in told[:-1]] == [start for start, _, _ in told[1:]]
    for start, end, lag in told:
        inside = (rows.due_s >= start) & ((rows.due_s < end) | (end == told[-1][1]))
        held = np.sort(rows.lag_s[inside]) * 1e3
        assert lag.requests == len(held)
        assert lag.max_ms == pytest.approx(held[-1])
        near([lag.p50_ms, lag.p99_ms], [held[int(q * (len(held) - 1))] for q in (0.5, 0.99)])


def test_reports_and_comparisons_of_counts_are_those_of_the_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A simulated run digested, compared and shown from its counts: rates exactly, quantiles within a bin, the same verdicts."""
    slo = Slo.parse("ttft<0.5s tpot<50ms")
    profile = Profile.load("demo")
    url = f"sqlite:///{tmp_path}/a.db"
    with open_store(url) as store:
        runs = []
        for fleet in (Fleet(4, 4), Fleet(2, 6)):
            rows = simulate(lognormal(4000, 8, 1), fleet, profile).observations
            rows.worker[:] = rows.index % 2
            rows.status[:40] = "failed"
            rows.detail[39] = "seen"
            run = replace(run_of(fleet, len(rows)), id=0, trace="t", schedule_digest="d", slo=str(slo))
            runs.append(store.begin_run(replace(run, counts={"ok": 3960, "failed": 40})))
            store.add_observations(runs[-1].id, rows)
        exact = [read(store, run, slo, profile) for run in runs]
        pair = [compare.read(store, run, slo) for run in runs]
        rows, parts = store.observations(runs[0].id), ttft_parts(store.observations(runs[0].id), [])
        monkeypatch.setattr(traces.store, "EXACT_ROWS", 1000)
        for run, one in zip(runs, exact, strict=True):
            found = read(store, run, slo, profile)
            assert not found.exact
            assert one.exact
            for name in ("n", "ok", "goodput_per_s", "attainment", "span_s", "e2e_mean_s"):
                assert getattr(found.summary, name) == pytest.approx(getattr(one.summary, name)), name
            near([found.summary.ttft_p90_s, found.summary.tpot_p99_s], [one.summary.ttft_p90_s, one.summary.tpot_p99_s])
            for metric in ("ttft", "tpot", "e2e"):
                inner = (QUANTILES > 0.05) & (QUANTILES < 0.999)
                near(found.cdf[metric][inner], one.cdf[metric][inner], 0.02)  # few values a quantile
                assert found.within.get(metric) == pytest.approx(one.within.get(metric), abs=0.002)
            assert [f[:2] for f in found.failures] == [f[:2] for f in one.failures]
            assert found.failures[0][2] == "seen"
            assert found.tpot is not None
            assert one.tpot is not None
            assert found.tpot.error == pytest.approx(one.tpot.error)  # all rows fit in
            width = np.diff(np.append(found.requests.at_s, one.requests.at_s[-1]))
            assert len(width) > 100
            for way in (found, one):
                told = [*distributions([way], slo), over_time(way)[1], lateness([way], slo)]
                assert [APPROXIMATE in section.text for section in told] == [not way.exact] * 5
                for section in told[:3]:
                    assert section.table is not None
                    row = section.table.rows[0]
                    assert row[1:2] + row[4:5] == ["3,960", seconds(getattr(way.summary, f"{section.key}_p99_s"))]
            rate = found.requests.values["rate_per_s"]
            assert np.nanmean(rate) == pytest.approx(8, rel=0.1)
        both = [compare.compare(*pair), compare.compare(*(compare.read(store, run, slo) for run in runs))]
        for a, b in zip(both[0].differences, both[1].differences, strict=True):
            assert b.change == pytest.approx(a.change, rel=0.03, abs=0.01), a.metric
            assert b.verdict == a.verdict, a.metric
        held = store.bins(runs[0])
        assert held is not None
        for worker, lag in lag_by_worker(rows).items():
            assert held.lag_by_worker()[worker].requests == lag.requests
        assert sum(lag.requests for _, _, lag in held.lag_over_time()) == len(rows)
        assert parts_of(held.mean, []) == parts
        assert repr(held.summary().n) == repr(summarise(rows, slo).n)
    assert main(["runs", "show", "1", "--json", "--db", url]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["quantiles"] != "exact"
    assert len(shown["lag_over_time"]) == 12
    assert main(["compare", "1", "2", "--slo", "ttft<0.3s", "--json", "--db", url]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["quantiles"] != "exact"


def test_a_long_run_that_goes_on_says_what_came_of_its_requests(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From counts as from rows: every status and kind of failure with the warm-up in it, the worst lag without."""
    rows, url, shown = some_rows(300, 3), f"sqlite:///{tmp_path}/a.db", []
    rows.error[:] = np.where(rows.status != "failed", "", np.where(rows.error == "", "other", rows.error))
    rows.dispatch_s[:] = rows.due_s + np.where(rows.due_s < 30, -500.0, 0.01)
    rows.worker[:] = rows.index % 2
    with open_store(url) as store:
        run = store.begin_run(replace(a_run(), warmup_s=30.0, scheduled=400))
        store.add_observations(run.id, rows)
    for exact_rows in (10_000, 100):
        monkeypatch.setattr(traces.store, "EXACT_ROWS", exact_rows)
        assert main(["runs", "show", "1", "--json", "--db", url]) == 0
        shown.append(json.loads(capsys.readouterr().out))
    assert [one["quantiles"] == "exact" for one in shown] == [True, False]
    for name in ("ok", "failed", "unsent", "cancelled", "lost"):
        assert shown[1][name] == shown[0][name], name
    assert shown[1]["lag_ms"]["max"] == pytest.approx(shown[0]["lag_ms"]["max"])
    for one in shown:  # the workers' lag is counted from the same time on
        worst = max(worker["max_ms"] for worker in one["lag_by_worker"].values())
        assert worst == pytest.approx(one["lag_ms"]["max"])
    held = []
    with open_store(url) as store:
        for exact_rows in (10_000, 100):
            monkeypatch.setattr(traces.store, "EXACT_ROWS", exact_rows)
            held.append(read(store, run, Slo()).run)
    assert [one.counts["ok"] for one in held] == [shown[0]["ok"]] * 2
    assert [one.lag_max_ms for one in held] == pytest.approx([shown[0]["lag_ms"]["max"]] * 2)
    near(
        [held[1].lag_p50_ms, held[1].lag_p99_ms], [held[0].lag_p50_ms, held[0].lag_p99_ms], 0.03
    )  # of few, between two
    assert held[1].lag_p99_ms < held[1].lag_max_ms


def test_the_last_rows_of_a_run_whose_master_was_killed_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts that were kept while it went on lack them; of one that goes on they may lag, as to count takes long."""
    monkeypatch.setattr(traces.store, "EXACT_ROWS", 100)
    rows, url = answered(107, 1), f"sqlite:///{tmp_path}/a.db"
    with open_store(url) as store:
        runs = [store.begin_run(replace(a_run(), scheduled=400, started_unix_s=began)) for began in (time.time(), 1e9)]
        for run in runs:
            for part in (slice(0, 104), slice(104, 107)):
                store.add_observations(run.id, rows.take(part))
        assert [store.figures(run).n for run in runs] == [104, 104]
    with open_store(url) as other:
        assert [other.figures(run).n for run in runs] == [104, 107]
        monkeypatch.setattr(other, "_pieces", None)  # once
        assert other.figures(runs[1]).n == 107


def test_another_slo_of_a_run_that_outgrows_its_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked while rows come that are due beyond the last slot that is kept, or before the first: those are not counted yet."""
    monkeypatch.setattr(traces.store, "EXACT_ROWS", 100)
    rows, slo = answered(1000, 1), Slo.parse("ttft<500s")
    rows.due_s[:] = np.append(np.linspace(5, 98 + 5, 980), np.repeat([-3.0, 120.0], 10))
    rows.first_token_s[:] = rows.due_s + 1
    with open_store(f"sqlite:///{tmp_path}/a.db") as store:
        run = store.begin_run(replace(a_run(), slo="ttft<1s", scheduled=5000))
        store.add_observations(run.id, rows.take(slice(0, 980)))
        before = store.bins(run)
        assert before is not None
        assert before.slots > 190
        store.add_observations(run.id, rows.take(slice(980, 1000)))
        found = store.bins(run, slo)
    assert found is not None
    assert found.rows == before.rows
    assert int(found.counts["good"].sum()) == found.total("good") == before.total("ok")


def test_windows_know_whom_they_miss() -> None:
    """Batches, and who met no other prefill, are told alike from windows and from the whole run, away from the windows' edges."""
    whole = simulate(lognormal(6000, 8, 2), Fleet(4, 4), Profile.load("demo")).observations
    run = replace(run_of(Fleet(4, 4), len(whole)), counts={"ok": len(whole)})
    windows = [whole.take(slice(s, s + 1000)) for s in (0, 2500, 5000)]
    some, every = RunData.of(run, windows), RunData(run, whole)
    assert some.finished == len(whole)
    found, wanted = decode_rows(some), decode_rows(every)
    assert len(found) > 1500
    x = dict(zip(wanted.y.tolist(), wanted.x, strict=True))  # no two TPOTs are the same
    alike = [np.allclose(row, x[y], rtol=1e-4) for row, y in zip(found.x, found.y.tolist(), strict=True)]
    assert np.mean(alike) > 0.98
    quiet = [len(quiet_rows(one)) for one in (some, every)]
    assert quiet[0] / quiet[1] == pytest.approx(len(found) / len(wanted), rel=0.1)
    near(load_quantiles(some, 0.9)[0], load_quantiles(every, 0.9)[0], 0.15)  # of half of the time


def test_figures_are_kept_with_an_ended_run_and_forgotten_when_a_row_comes(made_any_url: str) -> None:
    """Asked again, an ended run's figures are read, not computed; a row that comes later counts."""
    rows = answered(200, 2)
    with open_store(made_any_url) as store:
        run = store.begin_run(replace(a_run(), slo="ttft<1s", scheduled=200))
        store.add_observations(run.id, rows.take(np.arange(100)))
        assert store.figures(run).n == 100
        run = store.end_run(run)
        first = store.figures(run)
        assert repr(store.figures(run)) == repr(first)
        store.add_observations(run.id, rows.take(np.arange(100, 200)))
        assert store.figures(run).n == 200
        assert repr(store.figures(run)) == repr(Figures.of(rows, Slo.parse("ttft<1s")))


@pytest.mark.parametrize("exact_rows", [100, 10_000])
@pytest.mark.parametrize("committed", [True, False])
def test_figures_are_not_kept_of_rows_that_are_no_longer_all(
    made_any_url: str, exact_rows: int, committed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader has read a run's rows, and some come before it keeps what it found: whoever asks next counts them."""
    monkeypatch.setattr(traces.store, "EXACT_ROWS", exact_rows)
    rows = answered(300, 4)
    with open_store(made_any_url) as store, open_store(made_any_url) as other:
        run = store.begin_run(replace(a_run(), slo="ttft<1s", scheduled=300))
        store.add_observations(run.id, rows.take(slice(0, 200)))
        run = store.end_run(run)
        other.add_observations(run.id, rows.take(slice(200, 250)))
        late = [rows.take(slice(250, 300))]
        found: list[int] = []
        if committed:

            def come(connection: Any, cursor: Any, statement: str, *more: Any) -> None:
                if late and "FROM observations" in statement and "count(" not in statement:
                    other.add_observations(run.id, late.pop())

            sa.event.listen(store._engine, "after_cursor_execute", come)
            found.append(store.figures(run).n)
        else:
            reader = threading.Thread(target=lambda: found.append(store.figures(run).n))
            has_read = threading.Event()

            def note(connection: Any, cursor: Any, statement: str, *more: Any) -> None:
                if "FROM observations" in statement and "count(" not in statement:
                    has_read.set()

            sa.event.listen(store._engine, "after_cursor_execute", note)

            def ask(connection: Any) -> None:
                if not late:
                    return
                late.clear()
                reader.start()
                assert has_read.wait(30)
                reader.join(0.5)  # it waits for this batch, which will be there or not

            sa.event.listen(other._engine, "commit", ask)
            other.add_observations(run.id, late[0])
            reader.join(30)
        assert found == [250]
        assert store.figures(run).n == 300


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(values=st.lists(st.floats(1e-6, 1e5), min_size=1, max_size=200), q=st.floats(0, 1))
def test_a_quantile_from_bins_is_within_half_a_per_cent_of_a_value(values: list[float], q: float) -> None:
    """Whatever the values, the binned quantile is next to the value that stands at its place."""
    counts = np.bincount(aggregate.bins(np.array(values)), minlength=aggregate.BINS)
    found = float(aggregate.quantile(counts[None], q, np.array([max(values)]))[0])
    near_by = sorted(values)[math.floor(q * (len(values) - 1))]
    assert found == pytest.approx(near_by, rel=0.0051)
    assert aggregate.quantiles(counts, np.array([q]), max(values))[0] == found


def test_the_advisor_reads_windows_of_long_runs_and_traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traffic and misses from windows are those of all rows: rate and mix, the laws' errors, within the interval that is said.

    Failed rows of a trace, which no replay sends, count neither in its rate nor in its windows."""
    profile, slo = Profile.load("demo"), Slo.parse("ttft<1s tpot<50ms")
    module: Any = sys.modules["advisor.advise"]
    asked, fleet = lognormal(6000, 2, 3), Fleet(2, 2)
    with open_store(f"sqlite:///{tmp_path}/a.db") as store:
        batch = {"seq": asked.index, "source_line": asked.index, "arrival_us": (asked.due_s * 1e6).astype(int)}
        batch |= {"prompt_tokens": asked.prompt_tokens, "output_tokens": asked.output_tokens, "status": 0 * asked.index}
        store.add_trace(
            name="t", format="x", sha256="s", files=[], options={},
            batches=[{k: v.tolist() for k, v in batch.items()}],
            summary=lambda: ({"rows_kept": 6000}, None, None, None),
        )  # fmt: skip
        failing = {k: v.tolist() for k, v in batch.items()} | {
            "status": [int(k % 5 == 2 and k >= 750) for k in range(6000)]
        }
        failing["arrival_us"] = [at + 500_000_000 * (k // 750) for k, at in enumerate(failing["arrival_us"])]
        store.add_trace(
            name="f", format="x", sha256="f", files=[], options={},
            batches=[failing],
            summary=lambda: ({"rows_kept": 6000}, None, None, None),
        )  # fmt: skip
        rows = simulate(asked, fleet, profile).observations
        run = store.begin_run(
            replace(run_of(fleet, 6000), trace="t", slo=str(slo), rate_per_s=asked.rate_per_s, counts={"ok": 6000})
        )
        store.add_observations(run.id, rows)
        (whole,) = module.load(store, [run])
        assert not whole.windows
        for name, value in (("LONG_TRACE", 1000), ("POINT_REQUESTS", 2000)):
            monkeypatch.setattr(module, name, value)
        monkeypatch.setattr(report, "POINT_REQUESTS", 2000)
        read = traces.store.Store.windows
        monkeypatch.setattr(traces.store.Store, "windows", lambda self, id, most, parts: read(self, id, 3000, 3))
        (some,) = module.load(store, [run])
        assert len(some.windows) == 3
        assert some.finished == whole.finished
        slower = replace(profile, c0_s=profile.c0_s * 1.2)
        for metric in ("tpot_p50_s", "e2e_p50_s"):
            misses = [m[metric] for m in model._misses(some, slower)]
            assert len(misses) == 3
            assert np.median(misses) == pytest.approx(model._misses(whole, slower)[0][metric], abs=0.02)
        for trace in ("t", None):
            schedule, parts = module._asked(store, trace, run if trace else replace(run, trace="gone"), None)
            assert (len(schedule), parts) == ((2000, 8 * [250]) if trace else (3000, 3 * [1000]))
            assert schedule.rate_per_s == pytest.approx(asked.rate_per_s, rel=1e-3)
            assert schedule.prompt_tokens.mean() == pytest.approx(asked.prompt_tokens.mean(), rel=0.1)
        for asks in ({"strategy": "online"}, {"strategy": "offline"}, {"deadline_s": 60.0}):
            with pytest.raises(InputError, match=r"known by 8 windows.*--requests"):
                module.advise(store, trace="t", **asks)
        schedule, parts = module._asked(store, "t", run, None)
        again = {"trace": "t", "schedule_changes": schedule.changes, "rate_per_s": 7.0, "requests": 2000}
        rebuilt = report.rebuilt(store, again)
        assert rebuilt is not None
        assert rebuilt.rate_per_s == pytest.approx(7.0)
        assert np.array_equal(rebuilt.prompt_tokens, schedule.prompt_tokens)
        fewer, read_of = module._asked(store, "f", run, None)
        assert (len(fewer), read_of) == (1650, [250, *7 * [200]])
        # The windows are those that were read, each as busy as it is: no idle time between two of them is in a third.
        rates = [fewer.take(which).rate_per_s for which in _parts(read_of)]
        assert rates == pytest.approx([one.rate_per_s for one in store.trace_windows("f", 2000, 8)])
        assert fewer.rate_per_s == pytest.approx(store.schedule("f").rate_per_s, rel=1e-3)
        again = {"trace": "f", "schedule_changes": fewer.changes, "rate_per_s": 7.0, "requests": 1650}
        assert report.rebuilt(store, again) is not None
        first, none = module._asked(store, "t", run, 500)
        assert (first.digest(), none) == (head(asked_again(asked), 500).digest(), [])
    found = simulate(schedule, fleet, profile).observations
    half = _between(found, slo, parts)
    ours, theirs = summarise(found, slo), summarise(rows, slo)
    for metric in ("tpot_p50_s", "e2e_p50_s", "throughput_per_s"):
        assert abs(math.log(getattr(ours, metric) / getattr(theirs, metric))) < 2 * half[metric] + 0.03, metric
    assert _between(found, slo, [len(found)]) == {}


def asked_again(schedule: Schedule) -> Schedule:
    """As the database gives a trace back: to the microsecond, from its first request on."""
    due = (schedule.due_s * 1e6).astype(int) / 1e6
    return replace(schedule, due_s=due - due[0])


def test_windows_of_a_long_run_hold_every_neighbour(made_any_url: str) -> None:
    """Windows are spread over the run, hold each index between their first and last, and no more than was asked."""
    rows = answered(5000, 3)
    with open_store(made_any_url) as store:
        run = store.begin_run(a_run())
        assert store.windows(run.id) == []
        store.add_observations(run.id, rows)
        found = store.windows(run.id, most=500, parts=10)
        assert [len(w) for w in found] == [50] * 10
        for k, window in enumerate(found):
            index = np.sort(window.index)
            assert (np.diff(index) == 1).all()
            assert 500 * k <= index[0] < 500 * (k + 1)
            same(window, Observations.concat([rows.take(index)]))
        (whole,) = store.windows(run.id, most=6000)
        same(whole, Observations.concat([rows]))


def test_a_report_of_many_runs_reads_no_more_of_each_than_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by a report of a hundred runs of 100,000, which took 71 s: of each it read 40,000 whole rows for laws that it drew of
    twelve. What is read shows what all columns show, of windows and of a run that is read whole."""
    profile, fleet, slo = Profile.load("demo"), Fleet(2, 2), Slo.parse("ttft<1s tpot<50ms")
    rows = simulate(lognormal(3000, 2, 3), fleet, profile).observations
    rows.status[::50], rows.error[::50], rows.detail[::50] = "failed", "reset", "gone"
    slower = replace(profile, c0_s=profile.c0_s * 1.2)
    monkeypatch.setattr(digests, "LAW_ROWS", 1500)
    monkeypatch.setattr(digests, "LAW_WINDOWS", 3)
    read_of: list[int] = []
    windows = traces.store.Store.windows

    def noted(self: Any, id: int, *more: Any) -> Any:
        read_of.append(id)
        return windows(self, id, *more)

    with open_store(f"sqlite:///{tmp_path}/a.db") as store:
        for _ in range(DRAWN + 3):
            run = store.begin_run(replace(run_of(fleet, 3000), slo=str(slo), warmup_s=5.0))
            store.add_observations(run.id, rows)
            run = store.end_run(replace(run, counts={"ok": 2940, "failed": 60}))
        whole = RunData(run, store.observations(run.id), store.samples(run.id))
        short = read(store, run, slo, slower)
        same_digest(short, digests.digest(whole, slo, (), slower))
        monkeypatch.setattr(traces.store, "EXACT_ROWS", 100)
        every = RunData.of(run, windows(store, run.id, 1500, 3))
        long = read(store, run, slo, slower)
        same_digest(long, read(store, run, slo, slower, every))
        mixed = store.begin_run(replace(run_of(Fleet(0, 0, 4), 3000), slo=str(slo), warmup_s=5.0))
        store.add_observations(mixed.id, rows)
        store.end_run(replace(mixed, counts={"ok": 2940, "failed": 60}))  # no law is held against it
        monkeypatch.setattr(traces.store.Store, "windows", noted)
        answer, ids = {"sentence": "s", "slo": str(slo), "profile": slower.to_toml()}, [r.id for r in store.runs()]
        shown = ids[3:-1]
        page = report.gather(store, answer, run_ids=ids)
        assert read_of == [*reversed(shown)]
        asked = report.gather(store, answer, data=[replace(every, run=store.run(id)) for id in ids])
        assert len(read_of) == DRAWN
    for made in (page, asked):
        (law,) = (s for s in made.sections if s.key == "law-tpot")
        assert law.plot is not None
        assert [mark.name.split(":")[0] for mark in law.plot.marks] == [f"run {id}" for id in shown]
        assert law.text.endswith(f" {DRAWN} of {DRAWN + 4} runs are drawn.")
    for fit in ("tpot", "ttft"):
        assert getattr(long, fit).error == pytest.approx(getattr(short, fit).error, abs=0.03), fit


def same_digest(one: Digest, other: Digest) -> None:
    """Field by field, arrays as wholes."""
    for name in ("tpot", "ttft"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a.n, a.error) == (b.n, b.error)
        assert np.array_equal(a.predicted, b.predicted)
        assert np.array_equal(a.measured, b.measured)
    for name, values in one.requests.values.items():
        assert np.array_equal(values, other.requests.values[name], equal_nan=True), name
    assert repr(one.summary) == repr(other.summary)
    assert (one.failures, one.within, one.n, one.exact) == (other.failures, other.within, other.n, other.exact)


def test_pruned_runs_are_gone_and_their_space_given_back(
    made_any_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``runs prune`` deletes what all its conditions name, not when it is only asked, and no run that may be going on; ``runs
    vacuum`` runs on every backend, and says what it does there. What somebody else deletes meanwhile is gone as well."""
    with open_store(made_any_url) as store:
        kept = store.end_run(replace(store.begin_run(replace(a_run(), started_unix_s=0.0)), complete=True))
        gone = store.begin_run(replace(a_run(), started_unix_s=0.0, complete=False))
        store.add_observations(gone.id, some_rows(50))
        young = store.begin_run(replace(a_run(), started_unix_s=1e12, complete=False))
        long = store.begin_run(replace(a_run(), started_unix_s=time.time() - 2 * 86400.0, complete=False))
        last = some_rows(1)
        last.last_token_s[:] = 2 * 86400.0 - 1
        store.add_observations(long.id, last)  # begun two days ago, and it goes on
        dead = store.begin_run(replace(a_run(), started_unix_s=time.time() - 2 * 86400.0, complete=False))
        rest = Observations.of(np.array([0]), due_s=np.array([3 * 86400.0]))  # of its trace, whose time has not come
        store.add_observations(dead.id, rest)
    words = ["runs", "prune", "--older-than", "1", "--incomplete", "--json", "--db", made_any_url]
    assert main([*words, "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out) == {"runs": [gone.id, dead.id], "deleted": False}
    with monkeypatch.context() as patch, open_store(made_any_url) as other:
        delete = Store.delete_run
        patch.setattr(Store, "delete_run", lambda store, id: (delete(other, id), delete(store, id)))
        assert main(words) == 0
    assert main(["runs", "prune", "--db", made_any_url]) == 2
    capsys.readouterr()
    assert main(["runs", "prune", "--incomplete", "--json", "--db", made_any_url]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == {"runs": [], "deleted": True}
    assert f"runs {young.id}, {long.id} have not ended" in said.err
    with open_store(made_any_url) as dash:
        assert dash.runs()
        assert main(["runs", "vacuum", "--db", made_any_url]) == 0
        if made_any_url.startswith("sqlite"):  # its log would be as large as itself while others have it open
            assert Path(made_any_url.removeprefix("sqlite:///") + "-wal").stat().st_size == 0
            monkeypatch.setattr(traces.store, "LOCKED_S", 0.1)
            with closing(sqlite3.connect(made_any_url.removeprefix("sqlite:///"))) as reader:
                reader.execute("BEGIN")
                assert reader.execute("SELECT id FROM runs").fetchone()
                assert main(["runs", "vacuum", "--db", made_any_url]) == 1
            said = capsys.readouterr()
            assert "holds no more space" in said.out  # of the first
            assert "is not given back yet, since another command reads" in said.err
    # PostgreSQL keeps the space for later rows: a file shrinks only where nothing is left behind the deleted ones.
    assert ("later runs use the space" in capsys.readouterr().out) == made_any_url.startswith("postgresql")
    with open_store(made_any_url) as store:
        assert [r.id for r in store.runs()] == [kept.id, young.id, long.id]
        assert len(store.observations(gone.id)) == 0
    if made_any_url.startswith("mariadb"):  # whose OPTIMIZE succeeds, and says in a row that it did not
        engine = sa.create_engine(sa.make_url(made_any_url).set(drivername="mariadb+pymysql"))
        with engine.begin() as connection:
            connection.exec_driver_sql("DROP TABLE decisions")
        engine.dispose()
        assert main(["runs", "vacuum", "--db", made_any_url]) == 1
        assert "the space of decisions was not given back" in capsys.readouterr().err


def test_runs_go_from_one_database_to_another_without_loss(made_any_url: str, migrated: Path, tmp_path: Path) -> None:
    """By Parquet a run goes into any database, and out of it, with every column of every row, once however often that is done."""
    rows = answered(300, 4)
    here, back = (f"sqlite:///{shutil.copy(migrated, tmp_path / name)}" for name in ("here.db", "back.db"))
    with open_store(here) as store, open_store(made_any_url) as other, open_store(back) as again:
        other.begin_run(a_run())  # ids differ
        run = store.begin_run(replace(a_run(), scheduled=300, counts={"ok": 300}))
        store.add_observations(run.id, rows)
        store.add_samples(run.id, [Sample(0.5, "w", "decode", running_requests=0.1)])
        change = FleetChange(1.0, math.nan, Fleet(4, 4), Fleet(3, 5), "why")
        store.add_fleet_change(run.id, change)
        export_runs(store, [run.id], tmp_path / "early")
        import_runs(other, tmp_path / "early")  # what the change costs comes with a dump of the ended run
        run = store.end_run(replace(run, complete=True))
        store.cost_fleet_changes(run.id, [replace(change, in_flight=3, failed=0)], "c", 5.0)
        written = export_runs(store, [run.id], tmp_path / "out")
        assert written["observations"] == 300
        assert not list(tmp_path.glob(".out*"))
        shutil.copytree(tmp_path / "out", tmp_path / "odd")
        pyarrow.parquet.write_table(pyarrow.table({"name": ["x"]}), tmp_path / "odd" / "runs.parquet")
        with pytest.raises(InputError, match="is not what steelyard runs dump writes"):
            import_runs(other, tmp_path / "odd")
        shutil.copytree(tmp_path / "out", tmp_path / "cut")
        (tmp_path / "cut" / "samples.parquet").write_bytes(b"PAR1 not at all")
        with pytest.raises(InputError, match="cannot be read"):
            import_runs(other, tmp_path / "cut")
        with pytest.raises(InputError, match="cannot be read"):
            import_runs(again, tmp_path / "cut")
        (half,) = again.runs()
        assert (half.ended, half.complete) == (False, False)  # nor one that a sweep takes for measured
        assert [r.ended for r in other.runs()] == [False, False]  # half a run is none that has ended
        for _ in range(2):
            ids = import_runs(other, tmp_path / "out")
        (new,) = ids.values()
        assert new != run.id
        assert same_run(other.run(new), replace(run, id=new))
        same(other.observations(new), store.observations(run.id))
        assert other.samples(new) == store.samples(run.id)
        assert repr(other.fleet_changes(new)) == repr(store.fleet_changes(run.id))
        assert len(other.runs()) == 2
        # An import that was broken off, asked about before it was done again: what was said of half a run is not kept.
        with other._engine.begin() as connection:
            held = traces.store.observations
            connection.execute(held.delete().where(held.c.index >= 200))
        assert other.figures(other.run(new)).n == 200
        import_runs(other, tmp_path / "out")
        assert repr(other.figures(other.run(new))) == repr(store.figures(run))
        export_runs(other, [new], tmp_path / "back")
        (last,) = import_runs(again, tmp_path / "back").values()
        assert same_run(again.run(last), replace(run, id=last))
        same(again.observations(last), store.observations(run.id))
        assert again.samples(last) == store.samples(run.id)
        assert repr(again.fleet_changes(last)) == repr(store.fleet_changes(run.id))
        (tmp_path / "out" / "samples.parquet").write_bytes(b"PAR1 not at all")
        with pytest.raises(InputError, match="cannot be read"):
            import_runs(other, tmp_path / "out")


def test_a_run_that_is_deleted_meanwhile_is_not_said_to_be_there(
    made_url: str, migrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A dump or export of it leaves no file; a load of it says so, and gives nothing to the run that got its number."""
    copy = f"sqlite:///{shutil.copy(migrated, tmp_path / 'copy.db')}"
    with open_store(made_url) as store, open_store(copy) as there, open_store(copy) as other:
        run, second = (store.end_run(replace(store.begin_run(a_run()), complete=True)) for _ in range(2))
        for one in (run, second):
            store.add_observations(one.id, some_rows(3))
        export_runs(store, [run.id], tmp_path / "good")

        def instead() -> None:
            (last,) = other.runs()
            other.delete_run(last.id)
            other.begin_run(replace(a_run(), name="another"))

        for name in ("restore_runs", "restore"):
            with monkeypatch.context() as patch:
                load = getattr(there, name)
                patch.setattr(there, name, lambda *given, load=load: (load(*given), instead())[0])
                with pytest.raises(InputError, match=r"run 1 of .* was deleted while its rows came"):
                    import_runs(there, tmp_path / "good")
            (left,) = other.runs()
            assert (left.id, left.name, left.ended, len(other.observations(1))) == (1, "another", False, 0)
            other.delete_run(1)
        dump, pieces = Store.dump, Store.pieces

        def dumped(_: Store, table: str, run_id: int) -> Any:
            yield from dump(store, table, run_id)
            if (table, run_id) == ("runs", 1):
                store.delete_run(1)

        def read(_: Store, run_id: int) -> Any:
            yield from pieces(store, run_id)
            store.delete_run(run_id)

        monkeypatch.setattr(Store, "dump", dumped)
        monkeypatch.setattr(Store, "pieces", read)
        for words in (["dump", "1", "2"], ["export", "2"]):
            assert main(["runs", *words, "--out", str(tmp_path / "out"), "--db", made_url]) == 1
            said = capsys.readouterr().err
            assert f"run {words[1]} was deleted while it was" in said
            assert not list(tmp_path.glob("*out*"))


def test_two_dumps_to_one_name_leave_each_other_alone(
    made_url: str, migrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first that is through has the name, with its own runs and all their rows; the other is refused. What one left that was
    killed a day ago is gone."""
    copy, out = f"sqlite:///{shutil.copy(migrated, tmp_path / 'copy.db')}", tmp_path / "out"
    with open_store(made_url) as store, open_store(made_url) as other, open_store(copy) as there:
        first, second = (store.begin_run(replace(a_run(), name=name)) for name in ("first", "second"))
        store.add_observations(first.id, some_rows(5))
        for name in ("deadbeef", "0badcafe"):
            (tmp_path / f".out.{name}").mkdir()
            (tmp_path / f".out.{name}" / "runs.parquet").write_bytes(b"half")
        for path in (killed := tmp_path / ".out.deadbeef", killed / "runs.parquet"):
            os.utime(path, (time.time() - 2 * 86400.0,) * 2)
        begun, through = threading.Event(), threading.Event()
        dump, pool, asked = Store.dump, ThreadPoolExecutor(1), []

        def slow(table: str, run_id: int) -> Any:
            yield from dump(other, table, run_id)
            if table == "runs":
                begun.set()
                assert through.wait(60)

        def meanwhile(table: str, run_id: int) -> Any:
            yield from dump(store, table, run_id)
            if table == "runs":
                asked.append(pool.submit(export_runs, other, [second.id], out))
                assert begun.wait(60)

        monkeypatch.setattr(other, "dump", slow)
        monkeypatch.setattr(store, "dump", meanwhile)
        with pool:
            try:
                export_runs(store, [first.id], out)
            finally:
                through.set()
            with pytest.raises(InputError, match="cannot be written"):
                asked[0].result()
        (new,) = import_runs(there, out).values()
        assert (there.run(new).name, len(there.observations(new))) == ("first", 5)
        assert [path.name for path in tmp_path.glob(".out*")] == [".out.0badcafe"]  # it may be another host's


def test_a_comparison_reads_all_that_it_uses(made_url: str) -> None:
    """The columns that it leaves out change nothing of what it says."""
    slo = Slo.parse("ttft<0.5s tpot<50ms e2e<10s")
    with open_store(made_url) as store:
        run = store.begin_run(replace(a_run(), scheduled=300, warmup_s=5.0))
        store.add_observations(run.id, answered(300, 4))
        one, whole = compare.read(store, run, slo), compare.binned(run, store.observations(run.id), slo)
    assert repr(one.figures) == repr(whole.figures)
    np.testing.assert_array_equal(one.series, whole.series)
    for part in ("counts", "latency"):
        for name, held in getattr(whole, part).items():
            np.testing.assert_array_equal(getattr(one, part)[name], held, err_msg=name)


def test_a_long_run_that_is_loaded_is_counted(
    made_url: str, migrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first question about it finds its counts, as after the replay."""
    monkeypatch.setattr(traces.store, "EXACT_ROWS", 100)
    copy = f"sqlite:///{shutil.copy(migrated, tmp_path / 'copy.db')}"
    with open_store(made_url) as store, open_store(copy) as other:
        run = store.begin_run(replace(a_run(), scheduled=300, counts={"ok": 300}))
        store.add_observations(run.id, answered(300, 4))
        said = store.figures(store.end_run(run))
        export_runs(store, [run.id], tmp_path / "out")
        (new,) = import_runs(other, tmp_path / "out").values()
        monkeypatch.setattr(Store, "_pieces", None)  # no row is read
        found = other.bins(other.run(new))
        assert found is not None
        assert (found.rows, repr(found.figures())) == (300, repr(said))


def test_rows_without_a_key_come_over_whole(
    made_any_url: str, migrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decisions and histograms of runs that lie across two pieces of the file: all, in order, once, also those that lack."""
    monkeypatch.setattr(traces.transfer, "PIECE_ROWS", 3)
    here = f"sqlite:///{shutil.copy(migrated, tmp_path / 'here.db')}"
    with open_store(here) as store, open_store(made_any_url) as other:
        ids = [store.end_run(store.begin_run(a_run())).id for _ in range(2)]
        for i in ids:
            for k in range(4):
                store.add_decision(i, Decision(k, k, "hold", Fleet(1, 1), None, f"{i} {k}", 1), "c", 1000.0)
            held = [Histogram("w", "decode", f"h{k}", "s", 1.0, 2.0, ((math.inf, 1.0),)) for k in range(4)]
            store.add_histograms(i, held)
        export_runs(store, ids, tmp_path / "out")
        for _ in range(2):
            there = import_runs(other, tmp_path / "out")
            for i in ids:
                assert other.decisions(there[i]) == store.decisions(i)
                assert other.histograms(there[i]) == store.histograms(i)
            with other._engine.begin() as connection:  # the next one has to go on in the middle
                number = traces.store.decisions.c.id
                known = connection.execute(sa.select(number).order_by(number)).scalars().all()
                connection.execute(traces.store.decisions.delete().where(number.in_([known[k] for k in (3, 6, 7)])))
