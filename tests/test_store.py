"""The store keeps what it is given, on SQLite and on a real PostgreSQL."""

from __future__ import annotations

import math
import sqlite3
import threading
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tests.test_features import run_of
from traces.errors import InputError, StoreError
from traces.measures import Slo
from traces.records import ERRORS, STATUSES, Fleet, FleetChange, Observations, Run, Sample
from traces.store import head_revision, migrate, open_store

DATA = Path(__file__).parent / "data"


def some_rows(n: int, seed: int = 0) -> Observations:
    """Rows with every kind of value: times, NaN, absent counts, every status."""
    rng = np.random.default_rng(seed)
    rows = Observations.empty(n)
    rows.index[:] = rng.permutation(10 * n)[:n]
    rows.due_s[:] = np.sort(rng.uniform(0, 100, n))
    for name in ("sent_s", "first_byte_s", "first_token_s", "last_token_s", "max_gap_s"):
        values = rng.uniform(0, 200, n)
        values[rng.random(n) < 0.3] = np.nan
        getattr(rows, name)[:] = values
    for name in ("worker", "requested_prompt_tokens", "requested_tokens", "prompt_tokens", "output_tokens"):
        getattr(rows, name)[:] = rng.integers(-1, 500, n)
    rows.chunks[:] = rng.integers(0, 500, n)
    rows.http_status[:] = rng.choice([0, 200, 500], n)
    rows.status[:] = rng.choice(STATUSES, n)
    rows.error[:] = rng.choice(["", *ERRORS], n)
    rows.detail[:] = rng.choice(["", "HTTP 500: nö 'quoted'; DROP TABLE runs;--"], n)
    return rows


def same(a: Observations, b: Observations) -> None:
    for name in Observations.columns():
        left, right = getattr(a, name), getattr(b, name)
        if left.dtype == np.float64:
            np.testing.assert_array_equal(left, right, err_msg=name)
        else:
            assert left.tolist() == right.tolist(), name


def a_run() -> Run:
    return replace(
        run_of(Fleet(3, 5), 50),
        changes=("rate x2",),
        slo="ttft<0.5s",
        seed=2**40,
        rate_per_s=2.5,
        ended=False,
        verdict="",
    )


def test_observations_come_back_as_they_went_in(db_url: str) -> None:
    """Rows with NaN, absent counts and odd text come back to the last bit, in order of due time."""
    rows = some_rows(500)
    with open_store(db_url) as store:
        run = store.begin_run(a_run())
        store.add_observations(run.id, rows.take(np.arange(250, 500)))
        store.add_observations(run.id, rows.take(np.arange(250)))
        same(store.observations(run.id), Observations.concat([rows]))


def test_writing_a_batch_again_changes_nothing(db_url: str) -> None:
    """A batch that is sent twice is stored once, also when the second copy differs."""
    rows = some_rows(40)
    with open_store(db_url) as store:
        run = store.begin_run(a_run())
        store.add_observations(run.id, rows)
        store.add_observations(run.id, rows)
        store.add_observations(run.id, replace(rows, chunks=rows.chunks + 1))
        same(store.observations(run.id), Observations.concat([rows]))


def test_a_run_is_begun_ended_and_found_again(db_url: str) -> None:
    """A run comes back equal, before and after its end; runs are found by group and by id."""
    with open_store(db_url) as store:
        begun = store.begin_run(replace(a_run(), group="g"))
        assert same_run(store.run(begun.id), begun)
        ended = store.end_run(
            replace(
                begun,
                complete=True,
                verdict="valid",
                reason="fine",
                lag_p99_ms=1.5,
                counts={"ok": 50, "failed.reset": 1},
            )
        )
        assert ended.ended
        assert same_run(store.run(begun.id), ended)
        other = store.begin_run(replace(a_run(), fleet=None))
        assert [r.id for r in store.runs()] == [begun.id, other.id]
        assert [r.id for r in store.runs(group="g")] == [begun.id]
        assert store.run(other.id).fleet is None
        with pytest.raises(InputError, match="no run has id 99"):
            store.run(99)


def same_run(a: Run, b: Run) -> bool:
    """Equal, with NaN equal to itself."""
    for f in fields(Run):
        left, right = getattr(a, f.name), getattr(b, f.name)
        if left != right and not (isinstance(left, float) and math.isnan(left) and math.isnan(right)):
            return False
    return True


def test_samples_and_fleet_changes_come_back(db_url: str) -> None:
    """Readings keep what was absent as absent, zero as zero; a change that never came in force keeps NaN."""
    samples = [
        Sample(0.5, "http://h:1", "prefill", waiting_requests=0.0, busy_s_total=1.25),
        Sample(1.0, "http://h:2", "decode", kv_used_ratio=0.5),
    ]
    change = FleetChange(1.0, math.nan, Fleet(4, 4), Fleet(3, 5), "prefill idle")
    with open_store(db_url) as store:
        run = store.begin_run(a_run())
        store.add_samples(run.id, samples)
        store.add_samples(run.id, [])
        store.add_fleet_change(run.id, change)
        assert store.samples(run.id) == samples
        (back,) = store.fleet_changes(run.id)
        assert (back.before, back.after, back.reason) == (change.before, change.after, change.reason)
        assert math.isnan(back.ready_s)


def test_a_recommendation_keeps_the_runs_it_rests_on(db_url: str) -> None:
    """An answer comes back with its runs; NaN in it is null."""
    with open_store(db_url) as store:
        ids = [store.begin_run(a_run()).id for _ in range(2)]
        number = store.add_recommendation("static", {"prefill": 3, "p99": math.nan}, ids, "h" * 64, 7)
        back = store.recommendation()
        assert (back["id"], back["prefill"], back["p99"]) == (number, 3, None)
        assert sorted(back["run_ids"]) == ids


def test_deleting_a_run_takes_its_rows_along(db_url: str) -> None:
    """A deleted run leaves no rows behind."""
    with open_store(db_url) as store:
        run = store.begin_run(a_run())
        store.add_observations(run.id, some_rows(5))
        store.add_samples(run.id, [Sample(0.0, "w", "decode")])
        store.delete_run(run.id)
        assert store.runs() == []
        assert len(store.observations(run.id)) == 0


def test_a_reader_sees_whole_batches_while_a_writer_writes(db_url: str) -> None:
    """Beside a writer that stores batches of 100, a reader always sees a multiple of 100 rows."""
    rows = some_rows(2000)
    with open_store(db_url) as store:
        run = store.begin_run(a_run())
        done = threading.Event()

        def write() -> None:
            for start in range(0, 2000, 100):
                store.add_observations(run.id, rows.take(np.arange(start, start + 100)))
            done.set()

        writer = threading.Thread(target=write)
        writer.start()
        seen = []
        while not done.is_set():
            seen.append(len(store.observations(run.id)))
        writer.join()
        assert all(n % 100 == 0 for n in seen)
        assert len(store.observations(run.id)) == 2000


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=arrays(np.float64, 5, elements=st.floats(allow_nan=True, allow_infinity=False, width=64)),
    texts=st.lists(st.text(max_size=200), min_size=5, max_size=5),
)
def test_any_time_and_any_text_survive_sqlite(tmp_path: Path, values: np.ndarray, texts: list[str]) -> None:
    """Any finite time survives exactly, and any text survives without its NULs."""
    rows = Observations.empty(5)
    rows.index[:] = np.arange(5)
    rows.due_s[:] = np.arange(5)
    rows.sent_s[:] = values
    rows.detail[:] = [t.encode("utf-8", "replace").decode() for t in texts]
    with open_store(f"sqlite:///{tmp_path / 'h.db'}") as store:
        run = store.begin_run(a_run())
        store.add_observations(run.id, rows)
        back = store.observations(run.id)
    np.testing.assert_array_equal(back.sent_s, rows.sent_s)
    assert back.detail.tolist() == [t.replace("\x00", "") for t in rows.detail.tolist()]


# --- revisions ------------------------------------------------------------------------------------------------------


def test_the_schema_made_by_alembic_is_the_tables_of_the_store(db_url: str) -> None:
    """What ``alembic check`` compares is equal on both backends."""
    with open_store(db_url) as store:
        assert store.compare_schema() == []


def test_opening_twice_keeps_what_is_there(db_url: str) -> None:
    """A second opening finds the first one's rows."""
    with open_store(db_url) as store:
        run = store.begin_run(a_run())
    with open_store(db_url, create=False) as store:
        assert store.run(run.id).trace == "t"


def set_revision(url: str, revision: str) -> None:
    with sqlite3.connect(url.removeprefix("sqlite:///")) as connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", [revision])


def test_a_newer_database_is_refused_in_words(sqlite_url: str) -> None:
    """A database that a newer steelyard wrote is refused with what to do, by open and by migrate."""
    open_store(sqlite_url).close()
    set_revision(sqlite_url, "9999")
    with pytest.raises(StoreError, match=r"revision 9999.*newer steelyard"):
        open_store(sqlite_url)
    with pytest.raises(StoreError, match="does not downgrade"):
        migrate(sqlite_url)


def test_a_database_of_the_first_revision_is_upgraded_with_all_it_holds(sqlite_url: str) -> None:
    """A database of an older revision is refused with the command to run; migrate backs it up and loses nothing."""
    path = sqlite_url.removeprefix("sqlite:///")
    with sqlite3.connect(path) as new:
        new.executescript((DATA / "databases" / "0001.sql").read_text())
    with pytest.raises(StoreError, match=rf"revision 0001, this version needs {head_revision()}.*steelyard migrate"):
        open_store(sqlite_url)
    before, now, backup = migrate(sqlite_url)
    assert (before, now) == ("0001", head_revision())
    assert backup is not None
    with sqlite3.connect(backup) as old:
        assert old.execute("SELECT version_num FROM alembic_version").fetchone() == ("0001",)
    assert migrate(sqlite_url)[2] is None
    with open_store(sqlite_url, create=False) as store:
        (run,) = store.runs()
        assert (run.fleet, run.verdict, run.counts) == (Fleet(3, 5), "valid", {"ok": 12})
        assert len(store.observations(run.id)) == 12
        assert store.fleet_changes(run.id)[0].after == Fleet(2, 6)
        assert store.compare_schema() == []


def test_migrate_makes_an_empty_database_current(db_url: str) -> None:
    """``migrate`` on an empty database makes the schema."""
    assert migrate(db_url)[:2] == (None, head_revision())
    open_store(db_url, create=False).close()


# --- what cannot be opened ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nonsense", "not a database URL"),
        ("sqlite:///{tmp}/no/such/folder/x.db", "does not exist"),
        ("sqlite:///{tmp}", "is a folder"),
        ("sqlite:///{tmp}/garbage.db", "not a database file"),
        ("oracle9://h/x", "unknown kind of database"),
        ("postgresql://someone:hunter2@127.0.0.1:1/x", "Check that the database is there"),
    ],
)
def test_a_database_that_cannot_be_opened_is_one_line_without_secrets(tmp_path: Path, url: str, words: str) -> None:
    """Each kind of bad URL is one line that says what to do, without the password."""
    (tmp_path / "garbage.db").write_bytes(b"this is not a database at all, however long it may be" * 100)
    with pytest.raises(StoreError) as caught:
        open_store(url.format(tmp=tmp_path))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_missing_database_is_not_made_by_looking(sqlite_url: str) -> None:
    """Reading from a database that is not there makes no file."""
    with pytest.raises(StoreError, match="no such database"):
        open_store(sqlite_url, create=False)
    assert not Path(sqlite_url.removeprefix("sqlite:///")).exists()


def test_credentials_of_an_endpoint_never_reach_a_row(sqlite_url: str) -> None:
    """User and password in an endpoint's URL are not stored."""
    with open_store(sqlite_url) as store:
        run = store.begin_run(replace(a_run(), endpoint="http://me:s3cret@10.0.0.1:8000"))
        assert store.run(run.id).endpoint == "http://10.0.0.1:8000"
    assert b"s3cret" not in Path(sqlite_url.removeprefix("sqlite:///")).read_bytes()


def test_slo_text_of_a_run_reads_back() -> None:
    """The SLO that a run stores is one that the parser reads."""
    assert Slo.parse(a_run().slo) == Slo.parse("ttft<0.5s")
