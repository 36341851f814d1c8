"""The store keeps what it is given, on SQLite, PostgreSQL and MariaDB: one suite for the contract on top of traces/store.py."""

from __future__ import annotations

import ast
import json
import math
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from alembic.script import ScriptDirectory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import traces.store
from tests import keep_revision
from tests.test_features import run_of
from traces.errors import InputError, StoreError
from traces.measures import Slo
from traces.records import ERRORS, STATUSES, Decision, Fleet, FleetChange, Histogram, Observations, Run, Sample
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


def test_observations_come_back_as_they_went_in(made_any_url: str) -> None:
    """Rows with NaN, absent counts and odd text come back to the last bit, in order of due time."""
    rows = some_rows(500)
    with open_store(made_any_url) as store:
        run = store.begin_run(a_run())
        store.add_observations(run.id, rows.take(np.arange(250, 500)))
        store.add_observations(run.id, rows.take(np.arange(250)))
        same(store.observations(run.id), Observations.concat([rows]))


def test_writing_a_batch_again_changes_nothing(made_any_url: str) -> None:
    """A batch that is sent twice is stored once, also when the second copy differs."""
    rows = some_rows(40)
    with open_store(made_any_url) as store:
        run = store.begin_run(a_run())
        store.add_observations(run.id, rows)
        store.add_observations(run.id, rows)
        store.add_observations(run.id, replace(rows, chunks=rows.chunks + 1))
        same(store.observations(run.id), Observations.concat([rows]))


def test_what_one_database_refuses_none_takes(made_any_url: str) -> None:
    """SQLite holds any length and number: a run or trace that PostgreSQL and MariaDB refuse is refused where it comes in."""
    with open_store(made_any_url) as store:
        for one, words in (
            (replace(a_run(), engine="e" * 41), "engine 'e+'.. is too long: at most 40 characters .got 41"),
            (replace(a_run(), group="é" * 201), "group 'é+'.. is too long: at most 200 characters"),
            (replace(a_run(), seed=2**63), "seed 9223372036854775808 is too large"),
            (replace(a_run(), gpus_per_worker=(1, 2**31)), "decode_gpus 2147483648 is too large"),
        ):
            with pytest.raises(InputError, match=words):
                store.begin_run(one)
        assert store.begin_run(replace(a_run(), group="é" * 200)).id
        trace: dict[str, Any] = {"format": "f", "sha256": "0", "files": [], "options": {}}
        trace |= {"summary": lambda: ({}, None, None, None), "batches": []}
        with pytest.raises(InputError, match=r"name 'n+'.. is too long"):
            store.add_trace(name="n" * 201, **trace)
        row: dict[str, list[Any]] = {
            n: [1] for n in ("seq", "source_line", "arrival_us", "prompt_tokens", "output_tokens")
        }
        trace["batches"] = [row | {"status": [0], "session_key": ["a\x00b"]}]
        assert store.add_trace(name="n" * 200, **trace).name == "n" * 200


def test_a_run_is_begun_ended_and_found_again(made_any_url: str) -> None:
    """A run comes back equal, before and after its end; runs are found by group and by id."""
    with open_store(made_any_url) as store:
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


def test_samples_and_fleet_changes_come_back(made_any_url: str) -> None:
    """Readings keep what was absent as absent, zero as zero; a change that never came in force keeps NaN."""
    samples = [
        Sample(0.5, "http://h:1", "prefill", waiting_requests=0.0, busy_s_total=1.25),
        Sample(1.0, "http://h:2", "decode", kv_used_ratio=0.5),
    ]
    change = FleetChange(1.0, math.nan, Fleet(4, 4), Fleet(3, 5), "prefill idle")
    with open_store(made_any_url) as store:
        run = store.begin_run(a_run())
        # What is no number is absent too: MariaDB takes none.
        store.add_samples(run.id, [replace(samples[0], steps_total=math.nan, transfer_s=math.inf), samples[1]])
        store.add_samples(run.id, [])
        store.add_fleet_change(run.id, change)
        assert store.samples(run.id) == samples
        (back,) = store.fleet_changes(run.id)
        assert (back.before, back.after, back.reason) == (change.before, change.after, change.reason)
        assert math.isnan(back.ready_s)


def test_whatever_is_written_twice_is_stored_once(made_any_url: str) -> None:
    """A reading, a decision and a change of P:D sent again, as after a broken connection, change nothing."""
    readings = [Sample(at, worker, "decode", running_requests=at) for at in (0.5, 1.0) for worker in ("a", "b")]
    change = FleetChange(1.0, 2.0, Fleet(4, 4), Fleet(3, 5), "why")
    decision = Decision(1.0, 2.0, "hold", Fleet(4, 4), None, "why", 3)
    with open_store(made_any_url) as store:
        run = store.begin_run(a_run())
        for _ in range(2):
            store.add_samples(run.id, readings)
            store.add_fleet_change(run.id, change)
            for whose, steered in ((run.id, "a"), (None, "a"), (None, "b")):
                store.add_decision(whose, decision, steered, 1000.0)
            for steered in ("a", "b"):
                store.add_fleet_change(None, change, steered, 1000.0)
        assert store.decisions(run.id) == [decision]
        assert store.decisions(None) == [decision] * 2
        assert store.fleet_changes(None) == [change] * 2
        store.add_samples(run.id, [replace(readings[0], running_requests=99.0), Sample(0.5, "c", "decode")])
        assert len(store.samples(run.id)) == 5
        assert readings[0] in store.samples(run.id)
        assert store.fleet_changes(run.id) == [change]


def test_what_has_no_key_is_stored_once_by_two_at_once(made_url: str, tmp_path: Path) -> None:
    """A decision that its replay and whoever loads its spool store, and a histogram in a dump that two load: both looked
    whether it is there before the other had stored it."""
    decision = Decision(1.0, 2.0, "hold", Fleet(4, 4), None, "why", 3)
    counted = Histogram("w", "decode", "ttft", "s", 2.0, 1.5, ((0.5, 1.0), (math.inf, 2.0)))
    with open_store(made_url) as one, open_store(made_url) as two, ThreadPoolExecutor(4) as pool:
        dumped, run = one.begin_run(a_run()), one.begin_run(a_run())
        one.add_histograms(dumped.id, [counted])
        (piece,) = one.dump("histograms", dumped.id)
        piece["run_id"] = [run.id]
        at_it, until = set[int](), time.monotonic() + 20
        for store in (one, two):
            sa.event.listen(store._engine, "before_cursor_execute", lambda *_: at_it.add(threading.get_ident()))
        with closing(sqlite3.connect(tmp_path / "made.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            asked = [pool.submit(store.add_decision, run.id, decision, "c", 1000.0) for store in (one, two)]
            asked += [pool.submit(store.restore, "histograms", piece, {}) for store in (one, two)]
            while len(at_it) < 4 and time.monotonic() < until:
                time.sleep(0.01)
            time.sleep(0.1)  # from the first statement to the lock
            other.execute("ROLLBACK")
        assert len(at_it) == 4
        for done in asked:
            done.result()
        assert one.decisions(run.id) == [decision]
        assert one.histograms(run.id) == [counted]


def test_what_no_database_takes_is_left_out_of_texts(made_any_url: str) -> None:
    """A model, worker or error text with NUL or half a surrogate, or a very long one, is stored all the same."""
    odd = "a\x00b\ud800c" + "x" * 5000
    with open_store(made_any_url) as store:
        run = store.begin_run(replace(a_run(), model=odd, changes=(odd,), counts={odd: 1}))
        assert store.run(run.id).model == "ab?c" + "x" * 5000
        store.add_samples(run.id, [Sample(0.0, odd, "decode")])
        assert store.samples(run.id)[0].worker == ("ab?c" + "x" * 5000)[:200]
        store.add_fleet_change(run.id, FleetChange(0.0, 1.0, Fleet(1, 1), Fleet(1, 2), odd))
        store.end_run(replace(run, reason=odd))
        store.add_recommendation("static", {odd: [odd]}, [run.id], "h", 1)


def test_names_differ_by_case_and_by_blanks_on_every_backend(made_any_url: str) -> None:
    """Groups are told apart exactly: MariaDB's own rules would take some of these for one."""
    with open_store(made_any_url) as store:
        ids = {group: store.begin_run(replace(a_run(), group=group)).id for group in ("g", "G", "g ", "ĝ")}
        assert {group: [r.id for r in store.runs(group=group)] for group in ids} == {g: [i] for g, i in ids.items()}


def test_a_recommendation_keeps_the_runs_it_rests_on(made_any_url: str) -> None:
    """An answer comes back with its runs; NaN in it is null."""
    with open_store(made_any_url) as store:
        ids = [store.begin_run(a_run()).id for _ in range(2)]
        gone = store.begin_run(a_run()).id
        store.delete_run(gone)  # while the answer was computed
        number = store.add_recommendation("static", {"prefill": 3, "p99": math.nan}, [*ids, gone], "h" * 64, 7)
        back = store.recommendation()
        assert (back["id"], back["prefill"], back["p99"]) == (number, 3, None)
        assert sorted(back["run_ids"]) == ids


def test_deleting_a_run_takes_its_rows_along(made_any_url: str) -> None:
    """A deleted run leaves no rows behind."""
    with open_store(made_any_url) as store:
        run = store.begin_run(a_run())
        store.add_observations(run.id, some_rows(5))
        store.add_samples(run.id, [Sample(0.0, "w", "decode")])
        store.delete_run(run.id)
        assert store.runs() == []
        assert len(store.observations(run.id)) == 0


def test_nothing_of_a_deleted_run_goes_to_the_one_that_got_its_number(made_any_url: str) -> None:
    """SQLite gives a number again: neither rows nor the end of a run that was deleted are stored with the next. On all, what is
    said is that it was deleted."""
    with open_store(made_any_url) as mine, open_store(made_any_url) as other:
        run = mine.begin_run(a_run())
        other.delete_run(run.id)
        theirs = other.begin_run(replace(a_run(), name="theirs"))
        assert theirs.id == run.id or not made_any_url.startswith("sqlite")
        change = FleetChange(0.0, 1.0, Fleet(1, 1), Fleet(1, 2), "")
        for write in (
            lambda: mine.add_observations(run.id, some_rows(5)),
            lambda: mine.add_samples(run.id, [Sample(0.0, "w", "decode")]),
            lambda: mine.add_fleet_change(run.id, change),
            lambda: mine.cost_fleet_changes(run.id, [change], "", 0.0),
            lambda: mine.add_histograms(run.id, [Histogram("w", "decode", "h", "s", 1.0, 2.0, ((1.0, 1.0),))]),
            lambda: mine.add_decision(run.id, Decision(0, 0, "hold", Fleet(1, 1), None, "", 1), "c", 0.0),
            lambda: mine.end_run(run),
        ):
            with pytest.raises(InputError, match=rf"run {run.id} of .* was deleted"):
                write()
        assert same_run(other.run(theirs.id), theirs)
        for one in {run.id, theirs.id}:
            assert len(other.observations(one)) == len(other.samples(one)) == len(other.fleet_changes(one)) == 0
            assert other.histograms(one) == other.decisions(one) == []


def test_a_reader_sees_whole_batches_while_a_writer_writes(made_any_url: str) -> None:
    """Beside a writer that stores batches of 100, a reader always sees a multiple of 100 rows."""
    rows = some_rows(2000)
    with open_store(made_any_url) as store:
        run = store.begin_run(a_run())
        done = threading.Event()

        def write() -> None:
            try:
                for start in range(0, 2000, 100):
                    store.add_observations(run.id, rows.take(np.arange(start, start + 100)))
            finally:
                done.set()

        writer = threading.Thread(target=write)
        writer.start()
        seen = []
        while not done.is_set():
            seen.append(len(store.observations(run.id)))
        writer.join()
        assert all(n % 100 == 0 for n in seen)
        assert len(store.observations(run.id)) == 2000


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


def test_the_schema_made_by_alembic_is_the_tables_of_the_store(any_url: str) -> None:
    """What ``alembic check`` compares is equal on every backend."""
    with open_store(any_url) as store:
        assert store.compare_schema() == []


def test_opening_twice_keeps_what_is_there(any_url: str) -> None:
    """A second opening finds the first one's rows."""
    with open_store(any_url) as store:
        run = store.begin_run(a_run())
    with open_store(any_url, create=False) as store:
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


KEPT = sorted(p.name.removesuffix(".sql") for p in (DATA / "databases").glob("*.sql"))


def load_kept(url: str, text: str) -> None:
    """A database as a dump describes it."""
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
            connection.executescript(text)
        return
    kind = "mariadb+pymysql" if url.startswith("mariadb") else "postgresql+psycopg"
    engine = sa.create_engine(sa.make_url(url).set(drivername=kind))
    with engine.begin() as connection:
        if kind.startswith("mariadb"):
            connection.exec_driver_sql("SET FOREIGN_KEY_CHECKS=0")  # the dump names tables before they are there
        for statement in [text] if kind.startswith("postgresql") else text.removesuffix(";\n").split(";\n"):
            connection.exec_driver_sql(statement)
    engine.dispose()


def everything(url: str) -> dict[str, list[dict[str, Any]]]:
    """Table -> its rows, by primary key."""
    kinds = {"mariadb": "mariadb+pymysql", "postgresql": "postgresql+psycopg"}
    parsed = sa.make_url(url)
    engine = sa.create_engine(parsed.set(drivername=kinds.get(parsed.drivername, parsed.drivername)))
    held = sa.MetaData()
    with engine.connect() as connection:
        held.reflect(connection)
        found = {
            t.name: [dict(row._mapping) for row in connection.execute(t.select().order_by(*t.primary_key.columns))]
            for t in held.sorted_tables
            if t.name != "alembic_version"
        }
    engine.dispose()
    return found


@pytest.mark.parametrize("kept", KEPT)
def test_a_database_of_every_revision_is_upgraded_with_all_it_holds(
    kept: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """A kept database is refused with the command to run; migrate backs a file up, loses no value, and all of it is read."""
    revision, kind = kept.split(".")
    url: str = request.getfixturevalue(f"{kind.replace('postgresql', 'postgres')}_url")
    load_kept(url, (DATA / "databases" / f"{kept}.sql").read_text(encoding="utf-8"))
    before = everything(url)
    head = head_revision()
    if revision != head:
        with pytest.raises(
            StoreError, match=rf"revision {revision}, this version needs {head}.*steelyard migrate --db"
        ):
            open_store(url)
    was, now, backup = migrate(url)
    assert (was, now) == (revision, head)
    assert (backup is not None) == (kind == "sqlite" and revision != head)
    if backup is not None:
        assert everything(f"sqlite:///{backup}") == before
    assert migrate(url)[2] is None
    after = everything(url)
    for table, rows in before.items():
        assert [{name: row[name] for name in old} for row, old in zip(after[table], rows, strict=True)] == rows, table
    with open_store(url, create=False) as store:
        assert store.compare_schema() == []
        for run in store.runs():
            assert run.ended
            assert len(store.observations(run.id)) >= 1
            store.samples(run.id)
        assert store.fleet_changes(store.runs()[0].id)
        for trace in store.traces():
            assert len(store.schedule(trace.name, blocks=True, sessions=True)) >= 1
        if before["recommendations"]:
            assert store.recommendation()["run_ids"]


def test_every_revision_is_kept_and_none_is_edited() -> None:
    """Each revision has its kept databases, and its file is what it was when they were made."""
    kept = json.loads((DATA / "databases" / "frozen.json").read_text())
    told = "python -m tests.keep_revision"
    for revision, digest in keep_revision.frozen().items():
        on = ("sqlite", "postgresql", *(["mariadb"] if revision >= keep_revision.FIRST_ON_MARIADB else []))
        assert {f"{revision}.{kind}" for kind in on} <= set(KEPT), (
            f"revision {revision} is new: make its databases: {told}"
        )
        assert kept.get(revision) == digest, (
            f"revision {revision} is not what it was; if it was never released: {told} --again {revision}"
        )


def test_an_edited_revision_is_not_frozen_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What keeps a new revision notes its checksum, and leaves those of the ones that were kept before."""
    kept = shutil.copytree(DATA / "databases", tmp_path / "databases")
    noted = json.loads((kept / "frozen.json").read_text())
    (kept / "frozen.json").write_text(
        json.dumps({k: v for k, v in noted.items() if k != "0008"} | {"0003": "edited since"})
    )
    monkeypatch.setattr(keep_revision, "HERE", kept)
    assert keep_revision.main([]) == 0
    assert json.loads((kept / "frozen.json").read_text()) == noted | {"0003": "edited since"}


def test_revisions_are_known_by_their_files(sqlite_url: str) -> None:
    """Files are numbered as Alembic orders their revisions, so that whoever opens a database at the last one loads no Alembic."""
    assert traces.store._revisions() == keep_revision.revisions()
    assert head_revision() == ScriptDirectory.from_config(keep_revision.config()).get_current_head()
    open_store(sqlite_url).close()
    code = f"import sys; from traces.store import open_store; open_store({sqlite_url!r}); sys.exit('alembic' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_migrations_import_nothing_of_ours() -> None:
    """A revision describes the schema of its day: it needs Alembic and SQLAlchemy alone."""
    for path in (Path(__file__).parent.parent / "migrations").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert all(n.split(".")[0] in ("alembic", "sqlalchemy") for n in names), (path.name, names)


def test_two_that_migrate_at_once_are_both_right(any_url: str) -> None:
    """Of several processes that bring one empty database up, or open it meanwhile, each ends well and the schema is made once."""

    def come(k: int) -> str:
        time.sleep(0.03 * k)
        if k % 2 == 0:
            return migrate(any_url)[1]
        open_store(any_url).close()
        return head_revision()

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(come, range(8))) == {head_revision()}
    with open_store(any_url) as store:
        assert store.compare_schema() == []


@pytest.mark.parametrize("kept", ["0003.sqlite", "0003.postgresql", "0005.mariadb"])
def test_two_that_migrate_an_old_database_at_once_are_both_right(kept: str, request: pytest.FixtureRequest) -> None:
    """The second waits for the first and finds the work done; the one copy of a SQLite file is of the old revision."""
    url: str = request.getfixturevalue(f"{kept.split('.')[1].replace('postgresql', 'postgres')}_url")
    load_kept(url, (DATA / "databases" / f"{kept}.sql").read_text(encoding="utf-8"))
    rows = {name: len(held) for name, held in everything(url).items()}
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: migrate(url), range(4)))
    assert {now for _, now, _ in found} == {head_revision()}
    copies = [backup for _, _, backup in found if backup]
    assert len(copies) == url.startswith("sqlite")
    for copy in copies:
        with closing(sqlite3.connect(copy)) as connection:
            assert connection.execute("select version_num from alembic_version").fetchone() == ("0003",)
    after = {name: len(held) for name, held in everything(url).items()}
    assert rows.items() <= after.items()


def test_a_postgresql_table_that_somebody_reads_is_given_up(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By migrate, in time: whoever comes later would wait behind it. Nothing is changed."""
    load_kept(postgres_url, (DATA / "databases" / "0003.postgresql.sql").read_text(encoding="utf-8"))
    engine = sa.create_engine(sa.make_url(postgres_url).set(drivername="postgresql+psycopg"))
    monkeypatch.setattr(traces.store, "HELD_S", 0.2)
    with engine.connect() as reader:
        for table in ("runs", "observations", "fleet_changes"):
            reader.execute(sa.text(f"SELECT 1 FROM {table} LIMIT 1"))
        with pytest.raises(
            StoreError, match=r"somebody reads or writes this database.*Nothing was changed.*migrate again"
        ):
            migrate(postgres_url)
    engine.dispose()
    assert migrate(postgres_url)[:2] == ("0003", head_revision())


def test_an_old_sqlite_file_that_another_writes_is_waited_for(sqlite_url: str) -> None:
    """Its journal becomes another one on the way, and SQLite itself would not wait for a writer there."""
    load_kept(sqlite_url, (DATA / "databases" / "0003.sqlite.sql").read_text(encoding="utf-8"))
    with closing(sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")
        other.execute("DELETE FROM alembic_version")
        ends = threading.Timer(0.5, other.rollback)
        ends.start()
        assert migrate(sqlite_url)[:2] == ("0003", head_revision())
        ends.join()


@pytest.mark.parametrize("revision", keep_revision.revisions())
def test_a_downgrade_is_refused_in_words(revision: str) -> None:
    """Every revision's way back says what to do instead."""
    script = ScriptDirectory.from_config(keep_revision.config()).get_revision(revision)
    assert script is not None
    with pytest.raises(NotImplementedError, match="restore the backup"):
        script.module.downgrade()


def test_a_revision_that_fails_leaves_the_one_before(
    db_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Halfway through a revision nothing of it is there: the database is what it was."""
    kind = "sqlite" if db_url.startswith("sqlite") else "postgresql"
    load_kept(db_url, (DATA / "databases" / f"0003.{kind}.sql").read_text(encoding="utf-8"))
    before = everything(db_url)
    broken = tmp_path / "migrations"
    shutil.copytree(Path(__file__).parent.parent / "migrations", broken)
    (broken / "versions" / "9000_broken.py").write_text(
        f'import sqlalchemy as sa\nfrom alembic import op\nrevision, down_revision = "9000", "{head_revision()}"\n'
        'def upgrade():\n    op.add_column("runs", sa.Column("extra", sa.Integer))\n    raise RuntimeError("power cut")\n'
    )
    monkeypatch.setattr("traces.store._migrations", lambda: broken)
    with pytest.raises(RuntimeError, match="power cut"):
        migrate(db_url)
    assert everything(db_url) == before


def test_migrate_makes_an_empty_database_current(any_url: str) -> None:
    """``migrate`` on an empty database makes the schema."""
    assert migrate(any_url)[:2] == (None, head_revision())
    open_store(any_url, create=False).close()


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
        ("postgresql://someone:hun@ter/hunter2@127.0.0.1:1/x", ""),
        ("postgresql://someone@127.0.0.1:1/x?password=hunter2", "Check that the database is there"),
        ("mariadb://someone:hunter2@127.0.0.1:1/x", "Check that the database is there"),
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


@pytest.mark.parametrize(
    ("server", "asleep", "said"),
    [
        ("postgres", "SELECT pg_sleep(20)", r"has not answered for 3 s"),
        ("mariadb", "SELECT SLEEP(20)", r"Lost connection .*timed out"),
    ],
)
def test_a_server_that_says_nothing_is_given_up(
    server: str, asleep: str, said: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every wait has a bound: a server that was stopped in the middle of a question is an error, and the next question goes
    to a new connection; one that has all rows to change or move is waited for."""
    with open_store(request.getfixturevalue(f"made_{server}_url")) as store:
        store._engine.dispose()
        with monkeypatch.context() as patch:
            patch.setattr(traces.store, "ANSWER_S", 3.0)
            before = time.monotonic()
            with store._begin() as connection, traces.store._at_work(connection):
                connection.execute(sa.text(asleep.replace("20", "3.5")))
            with pytest.raises(StoreError, match=said), store._begin() as connection:
                connection.execute(sa.text(asleep))
            assert time.monotonic() - before < 18
        assert store.runs() == []


def test_a_mariadb_that_does_not_greet_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped server's system takes connections; that nobody speaks there ends the command."""
    pytest.importorskip("pymysql")
    monkeypatch.setitem(traces.store._TIMED, "pymysql", dict.fromkeys(traces.store._TIMED["pymysql"], 0.5))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"mariadb://root@127.0.0.1:{silent.getsockname()[1]}/x"
        with pytest.raises(StoreError, match=r"timed out.*Check that the database is there"):
            open_store(url)
