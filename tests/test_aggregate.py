"""Figures by sums in SQL are those of the rows: counts and rates exactly, quantiles within a bin of one per cent."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import traces.store
from advisor.cli import main
from tests.test_store import a_run, same, same_run, some_rows
from traces import aggregate
from traces.errors import InputError
from traces.measures import Figures, Slo
from traces.records import Fleet, FleetChange, Observations, Sample
from traces.store import open_store
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
    return rows


@pytest.mark.parametrize("warmup_s", [0.0, 30.0])
def test_sums_in_sql_are_those_of_the_rows(any_url: str, warmup_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """On every backend the long way in SQL and the short way in numpy say the same of a run, with and without a warm-up."""
    rows = answered(3000, 1)
    slo = "ttft<1s tpot<0.5s e2e<20s"
    with open_store(any_url) as store:
        run = store.begin_run(replace(a_run(), slo=slo, warmup_s=warmup_s, scheduled=3000))
        store.add_observations(run.id, rows)
        exact = store.figures(run)
        assert exact.exact
        monkeypatch.setattr(traces.store, "EXACT_ROWS", 100)
        binned = store.figures(run)
        assert not binned.exact
        for name in ("n", "ok", "goodput_per_s", "throughput_per_s", "output_tokens_per_s", "attainment", "span_s"):
            assert getattr(binned, name) == pytest.approx(getattr(exact, name), rel=1e-12), name
        counted = run.counted(rows)
        ok = counted.take(counted.ok)
        for name, quantiles in binned.quantiles.items():
            values = getattr(ok, name)
            values = np.sort(values[np.isfinite(values)])
            for word, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
                true = values[int(q * (len(values) - 1))]
                assert quantiles[word] == pytest.approx(true, rel=0.0051), (name, word)
            assert quantiles["max"] == pytest.approx(values[-1], rel=1e-12)


def test_figures_are_kept_with_an_ended_run_and_forgotten_when_a_row_comes(any_url: str) -> None:
    """Asked again, an ended run's figures are read, not computed; a row that comes later counts."""
    rows = answered(200, 2)
    with open_store(any_url) as store:
        run = store.begin_run(replace(a_run(), slo="ttft<1s", scheduled=200))
        store.add_observations(run.id, rows.take(np.arange(100)))
        assert store.figures(run).n == 100
        run = store.end_run(run)
        first = store.figures(run)
        assert repr(store.figures(run)) == repr(first)
        store.add_observations(run.id, rows.take(np.arange(100, 200)))
        assert store.figures(run).n == 200
        assert repr(store.figures(run)) == repr(Figures.of(rows, Slo.parse("ttft<1s")))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(values=st.lists(st.floats(1e-6, 1e5), min_size=1, max_size=200), q=st.floats(0, 1))
def test_a_quantile_from_bins_is_within_half_a_per_cent_of_a_value(values: list[float], q: float) -> None:
    """Whatever the values, the binned quantile is next to the value that stands at its place."""
    held: dict[int, int] = {}
    for v in values:
        k = math.floor(math.log(v) / aggregate.WIDTH)
        held[k] = held.get(k, 0) + 1
    found = aggregate.quantile([[k, n] for k, n in sorted(held.items())], q, max(values))
    near = sorted(values)[math.floor(q * (len(values) - 1))]
    assert found == pytest.approx(near, rel=0.0051)


def test_windows_of_a_long_run_hold_every_neighbour(any_url: str) -> None:
    """Windows are spread over the run, hold each index between their first and last, and no more than was asked."""
    rows = answered(5000, 3)
    with open_store(any_url) as store:
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


def test_pruned_runs_are_gone_and_their_space_given_back(any_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """``runs prune`` deletes what all its conditions name, not when it is only asked; ``runs vacuum`` runs on every backend."""
    with open_store(any_url) as store:
        kept = store.end_run(replace(store.begin_run(replace(a_run(), started_unix_s=0.0)), complete=True))
        gone = store.begin_run(replace(a_run(), started_unix_s=0.0, complete=False))
        store.add_observations(gone.id, some_rows(50))
        young = store.begin_run(replace(a_run(), started_unix_s=1e12, complete=False))
    words = ["runs", "prune", "--older-than", "1", "--incomplete", "--json", "--db", any_url]
    assert main([*words, "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out) == {"runs": [gone.id], "deleted": False}
    assert main(words) == 0
    assert main(["runs", "prune", "--db", any_url]) == 2
    assert main(["runs", "vacuum", "--db", any_url]) == 0
    with open_store(any_url) as store:
        assert [r.id for r in store.runs()] == [kept.id, young.id]
        assert len(store.observations(gone.id)) == 0


def test_runs_go_from_one_database_to_another_without_loss(any_url: str, tmp_path: Path) -> None:
    """By Parquet a run comes out of any database with every column of every row, once however often it is imported."""
    rows = answered(300, 4)
    with open_store(any_url) as store, open_store(f"sqlite:///{tmp_path / 'other.db'}") as other:
        other.begin_run(a_run())  # ids differ
        run = store.begin_run(replace(a_run(), scheduled=300, counts={"ok": 300}))
        store.add_observations(run.id, rows)
        store.add_samples(run.id, [Sample(0.5, "w", "decode", running_requests=0.1)])
        store.add_fleet_change(run.id, FleetChange(1.0, math.nan, Fleet(4, 4), Fleet(3, 5), "why"))
        run = store.end_run(run)
        written = export_runs(store, [run.id], tmp_path / "out")
        assert written["observations"] == 300
        for _ in range(2):
            ids = import_runs(other, tmp_path / "out")
        (new,) = ids.values()
        assert new != run.id
        assert same_run(other.run(new), replace(run, id=new))
        same(other.observations(new), store.observations(run.id))
        assert other.samples(new) == store.samples(run.id)
        assert repr(other.fleet_changes(new)) == repr(store.fleet_changes(run.id))
        assert len(other.runs()) == 2
    (tmp_path / "out" / "samples.parquet").write_bytes(b"PAR1 not at all")
    with open_store(any_url) as store, pytest.raises(InputError, match="cannot be read"):
        import_runs(store, tmp_path / "out")
