"""Ingest: what is kept is exact, what is not is counted, and a refused file leaves nothing."""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
import sqlite3
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import traces.store
from traces.errors import InputError, StoreError
from traces.formats.blocks import pack, unpack
from traces.ingest import LINE_LIMIT, ingest, store_schedule
from traces.shipped import NAMES, shipped
from traces.store import Store, open_store

DATA = Path(__file__).parent / "data" / "traces"
FACTS: dict[str, dict[str, Any]] = json.loads((DATA / "facts.json").read_text())
HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
GOOD = "2023-11-16 18:15:46.6805900,374,44\n"

DIGEST = "587c1402b0a90bb372097476cb7a01b82e18d3c04452d26024ecd8a38bafc92f"
"""Of the Mooncake slice as a schedule: the same on every backend and in every release."""

FILES = [
    (shipped("azure-2023-conv"), "azure-2023/AzureLLMInferenceTrace_conv.first.csv"),
    (shipped("azure-2023-code"), "azure-2023/AzureLLMInferenceTrace_code.first.csv"),
    *(
        (DATA / name.split("/")[1], name)
        for name in FACTS
        if name.startswith(("azure-2024/", "mooncake/", "burstgpt/", "vidur/", "splitwise-sim/", "weka-agentic/"))
    ),
]


@pytest.mark.parametrize(("path", "fact"), FILES, ids=[f[1] for f in FILES])
def test_every_real_file_gives_exactly_its_published_facts(path: Path, fact: str, made_url: str) -> None:
    """Rows, sums, maxima, medians, span, distinct times, inversions and prefix reuse equal the facts."""
    truth = FACTS[fact]
    with open_store(made_url) as store:
        report = ingest(store, [path], name="t")
        schedule = store.schedule("t")
    kept = truth["rows"] - truth["zero_in"]
    assert (report.rows_read, report.rows_kept) == (truth["rows"], kept)
    assert report.sum_prompt_tokens == truth["sum_in"]
    assert report.sum_output_tokens == truth["sum_out"]
    assert round(report.span_s * 1e6) == truth["span_us"]
    assert report.inversions == truth["adjacent_inversions"]
    if kept == truth["rows"]:  # rows of failed requests have times too, and are counted in the facts
        assert report.distinct_arrivals == truth["distinct_times"]
        assert report.equal_times == truth["adjacent_equal"]
    assert int(schedule.prompt_tokens.max()) == truth["max_in"]
    if kept == truth["rows"]:
        assert int(np.sort(schedule.prompt_tokens)[len(schedule) // 2]) == truth["median_in"]
    if "block_size" in truth:  # WEKA sessions: their facts count no reuse, but there is much
        assert report.prefix_hit_tokens is not None
        assert report.prefix_hit_tokens > 0.5 * report.sum_prompt_tokens
    else:
        assert report.prefix_hit_tokens == truth.get("prefix_hit_tokens_cold_unbounded")


def test_shipped_traces_exist_with_licence_and_attribution() -> None:
    """Each shipped trace has its licence and attribution beside it."""
    for name in NAMES:
        folder = shipped(name).parent
        assert (folder / "LICENSES" / "CC-BY-4.0.txt").is_file()
        assert shipped(name).name in (folder / "ATTRIBUTION.md").read_text()


def test_a_trace_is_the_same_on_both_databases(made_db_url: str) -> None:
    """The schedule that comes back is the same whatever the backend."""
    with open_store(made_db_url) as store:
        ingest(store, [DATA / "synthetic_trace.first.jsonl"], name="t")
        assert store.schedule("t").digest() == DIGEST
        assert len(store.schedule("t")) == FACTS["mooncake/synthetic_trace.first.jsonl"]["rows"]
        assert store.trace("t").block_size == 512


def test_the_same_file_again_is_a_no_op_and_another_is_refused(made_url: str, tmp_path: Path) -> None:
    """Loading twice stores once; the name with other content is refused with the way out."""
    path = tmp_path / "a.csv"
    path.write_text(HEADER + GOOD)
    with open_store(made_url) as store:
        assert not ingest(store, [path]).already
        assert ingest(store, [path]).already
        path.write_text(HEADER + GOOD + GOOD)
        with pytest.raises(InputError, match=r"other content.*traces delete a"):
            ingest(store, [path])
        assert len(store.schedule("a")) == 1


def test_the_same_file_by_two_at_once_is_stored_once(made_url: str, tmp_path: Path) -> None:
    """Who comes second, be it in the midst of reading, answers as one that begins later."""
    path = tmp_path / "a.csv"
    path.write_text(HEADER + GOOD)
    with open_store(made_url) as store, open_store(made_url) as other:
        first: list[bool] = []
        found = ingest(store, [path], progress=lambda _: first or first.append(ingest(other, [path]).already))
        assert (first, found.already) == ([False], True)
        with pytest.raises(InputError, match=r"other content or options.*traces delete b"):
            ingest(
                store, [path], name="b", progress=lambda _: ingest(other, [path], name="b", tz="Asia/Tokyo") and None
            )
        asked, trace = store.schedule("a"), Store.add_trace

        class Late(Store):
            """Another one stores the same, ahead of it."""

            def add_trace(self, **held: Any) -> Any:
                trace(other, **held)
                return super().add_trace(**held)

        store.__class__ = Late
        assert store_schedule(store, replace(asked, name="c"), options={}).already


def test_rows_out_of_order_are_sorted_and_counted(made_url: str, tmp_path: Path) -> None:
    """Late rows are put in order, the disorder is counted, and time starts at the first arrival."""
    path = tmp_path / "a.csv"
    path.write_text(
        HEADER + "2024-05-10 00:00:02+00:00,2,1\n2024-05-10 00:00:00.5+00:00,1,1\n2024-05-10 00:00:02+00:00,3,1\n"
    )
    with open_store(made_url) as store:
        report = ingest(store, [path])
        schedule = store.schedule("a")
    assert report.inversions == 1
    assert schedule.due_s.tolist() == [0.0, 1.5, 1.5]
    assert schedule.prompt_tokens.tolist() == [1, 2, 3]


def test_shards_and_gzip_are_one_trace(made_url: str, tmp_path: Path) -> None:
    """Several files, compressed or not, are one source."""
    (tmp_path / "a.csv").write_text(HEADER + GOOD)
    with gzip.open(tmp_path / "b.csv.gz", "wt") as f:
        f.write(HEADER + GOOD.replace("46.68", "47.68"))
    with open_store(made_url) as store:
        report = ingest(store, [tmp_path / "a.csv", tmp_path / "b.csv.gz"], name="both")
    assert report.rows_kept == 2
    assert report.span_s == pytest.approx(1.0)


BAD_ROWS = [
    # (row, reason)
    ("2023-11-16 18:15,1,2,3\n", "wrong_field_count"),
    ("yesterday,374,44\n", "bad_time"),
    (",374,44\n", "bad_time"),
    ("2023-11-16 18:15:46,abc,44\n", "ContextTokens_not_a_number"),
    ("2023-11-16 18:15:46,12.5,44\n", "ContextTokens_not_an_integer"),
    ("2023-11-16 18:15:46,1e3,44\n", "ContextTokens_not_an_integer"),
    ("2023-11-16 18:15:46,nan,44\n", "ContextTokens_not_an_integer"),
    ("2023-11-16 18:15:46,inf,44\n", "ContextTokens_not_an_integer"),
    ("2023-11-16 18:15:46,-3,44\n", "ContextTokens_negative"),
    ("2023-11-16 18:15:46,2147483648,44\n", "ContextTokens_too_large"),
    ('2023-11-16 18:15:46,"1,234",44\n', "ContextTokens_not_a_number"),
    ("2023-11-16 18:15:46,374,True\n", "GeneratedTokens_not_a_number"),
    ("\n", "empty_line"),
    ("2023-11-16 18:15:46,0,44\n", "failed_zero_input"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS, ids=[f"{r}-{i}" for i, (_, r) in enumerate(BAD_ROWS)])
def test_a_bad_row_is_skipped_under_its_own_name(row: str, reason: str, made_url: str, tmp_path: Path) -> None:
    """One bad row of a hundred is skipped, named, and its line number kept; read = kept + skipped."""
    path = tmp_path / "a.csv"
    path.write_text(HEADER + GOOD * 50 + row + GOOD * 50)
    with open_store(made_url) as store:
        report = ingest(store, [path])
    assert report.rows_kept == 100
    assert {r: s.count for r, s in report.skipped.items()} == {reason: 1}
    assert report.skipped[reason].first_lines == [52]
    assert report.rows_read == report.rows_kept + sum(s.count for s in report.skipped.values()) + report.other_events


def test_whole_numbers_may_be_written_with_a_point(made_url: str, tmp_path: Path) -> None:
    """``12.0`` is 12."""
    path = tmp_path / "a.csv"
    path.write_text(HEADER + "2023-11-16 18:15:46,12.0,44\n")
    with open_store(made_url) as store:
        ingest(store, [path])
        assert store.schedule("a").prompt_tokens.tolist() == [12]


@pytest.mark.parametrize(("how", "kept", "replayed"), [("keep-failed", 2, 1), ("skip", 1, 1), ("min1", 2, 2)])
def test_zero_output_is_kept_as_failed_unless_told_otherwise(
    how: str, kept: int, replayed: int, made_url: str, tmp_path: Path
) -> None:
    """A row without answer tokens is a failure of the source: kept but not replayed, skipped, or given one token."""
    path = tmp_path / "a.csv"
    path.write_text(HEADER + GOOD + "2023-11-16 18:15:47,5,0\n")
    with open_store(made_url) as store:
        assert ingest(store, [path], zero_output=how).rows_kept == kept
        assert len(store.schedule("a")) == replayed


REFUSED = [
    # (content, words of the one line)
    (b"", "empty"),
    (b"   \n\n", "empty"),
    (HEADER.encode(), "only a header"),
    (b"<!DOCTYPE html><html>not found</html>", "web page"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
    (b"\x80\x04\x95\x10\x00pickled", "never opened"),
    (b"PK\x03\x04zipped", "zip archive"),
    (b"PAR1parquet", "Parquet"),
    (bytes(range(256)) * 40, "binary"),
    (b"\x1f\x8b\x08\x00broken gzip", "cannot be read"),
    (b"a,b,c\n1,2,3\n", "no known format"),
    (b"TIMESTAMP,ContextTokens\n2023-11-16,4\n", "GeneratedTokens"),
    ((HEADER + "x,y,z\n" * 10).encode(), "--max-bad"),
    ((HEADER + GOOD * 9 + "x,y,z\n").encode(), "more than 5%"),
    ((HEADER + "2023-11-16 18:15:46,0,4\n").encode(), "no row can be kept"),
    ((HEADER + GOOD).encode("utf-16"), ""),
    (b'{"timestamp": 1}\n', "output_length"),
]


@pytest.mark.parametrize(("content", "words"), REFUSED, ids=[w or "utf-16" for _, w in REFUSED])
def test_a_file_that_cannot_be_used_is_refused_whole(content: bytes, words: str, made_url: str, tmp_path: Path) -> None:
    """One line with the file's name; nothing is left in the database."""
    path = tmp_path / "bad.csv"
    path.write_bytes(content)
    with open_store(made_url) as store:
        with pytest.raises(InputError) as caught:
            ingest(store, [path])
        assert words in str(caught.value)
        assert "bad.csv" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert store.traces() == []


@pytest.mark.parametrize(
    ("header", "row"),
    [
        (HEADER, GOOD),
        ("Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n", "5,GPT-4,10,20,30,API log\n"),
        ("arrived_at,num_prefill_tokens,num_decode_tokens\n", "0.5,10,20\n"),
    ],
    ids=["azure", "burstgpt", "vidur"],
)
def test_a_field_too_large_to_read_is_a_skipped_row(header: str, row: str, made_url: str, tmp_path: Path) -> None:
    """In every CSV format a field beyond the reader's limit costs its row, not the load."""
    path, limit = tmp_path / "a.csv", csv.field_size_limit()
    path.write_text(header + row * 50 + "x" * (LINE_LIMIT + 1) + row + row * 50)
    with open_store(made_url) as store:
        report = ingest(store, [path])
    assert report.rows_kept == 100
    assert report.skipped["unreadable_line"].count == 1
    assert csv.field_size_limit() == limit


def test_what_is_no_file_is_refused(made_url: str, tmp_path: Path) -> None:
    """A folder, a missing file and a pipe are refused without waiting."""
    import os

    os.mkfifo(tmp_path / "pipe")
    with open_store(made_url) as store:
        for path, words in (
            (tmp_path, "folder"),
            (tmp_path / "no.csv", "no such file"),
            (tmp_path / "pipe", "regular"),
        ):
            with pytest.raises(InputError, match=words):
                ingest(store, [path])


def test_a_mooncake_row_with_the_wrong_block_count_is_skipped(made_url: str, tmp_path: Path) -> None:
    """Block ids must be ceil or floor of prompt / 512; ids beyond 2^63 are kept apart exactly."""
    rows = [
        {"timestamp": 0, "input_length": 1024, "output_length": 5, "hash_ids": [2**64 - 1, 2**64 - 2]},
        {"timestamp": 3, "input_length": 1024, "output_length": 5, "hash_ids": [2**64 - 1, 2**64 - 3]},
        {"timestamp": 5, "input_length": 1024, "output_length": 5, "hash_ids": [1]},
    ]
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows * 8))
    with open_store(made_url) as store:
        report = ingest(store, [path], max_bad=0.5)
    assert report.skipped["block_count_mismatch"].count == 8
    assert report.rows_kept == 16
    # cold: of the first pair one block is shared; every later request finds both of its own
    assert report.prefix_hit_tokens == 512 + 14 * 1024


@given(st.lists(st.integers(0, 2**40), max_size=300))
def test_packed_block_ids_come_back(ids: list[int]) -> None:
    """Packing loses nothing."""
    assert unpack(pack(ids)) == ids


@pytest.fixture
def empty(made_url: str) -> Iterator[Store]:
    with open_store(made_url) as store:
        yield store


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(st.binary(max_size=400), st.text(max_size=300).map(str.encode)),
    st.sampled_from(["", HEADER, HEADER + GOOD]),
)
def test_no_bytes_crash_the_reader(empty: Store, tmp_path: Path, tail: bytes, head: str) -> None:
    """Whatever follows a header, a file is loaded with every row accounted for, or refused in one line."""
    path = tmp_path / "fuzz.csv"
    path.write_bytes(head.encode() + tail)
    said = ""
    try:
        report = ingest(empty, [path], max_bad=1.0)
    except InputError as refused:
        said = str(refused)
    assert "\n" not in said
    if said:
        assert not empty.traces()
    else:
        assert report.rows_read == report.rows_kept + sum(s.count for s in report.skipped.values())
        empty.delete_trace("fuzz")


FIELDS = st.one_of(
    st.sampled_from(
        [
            "2023-11-16 18:15:46.6805900",
            "2023-11-16 18:15:46",
            "2024-05-10 00:00:00.009930+00:00",
            "2024-05-10T00:00:00.123Z",
            "2024-05-10 02:00:00+02:00",
            "2024-05-10",
            "NaT",
            "1",
            "374",
            "12.0",
            "12.5",
            "0",
            "-3",
            "1e3",
            "9999999999999999999",
            "",
            '"374"',
        ]
    ),
    st.text(max_size=4),
)


@settings(max_examples=300)
@given(st.lists(st.lists(FIELDS, min_size=2, max_size=4).map(",".join), min_size=1, max_size=12), st.booleans())
def test_columns_at_once_are_the_rows_one_by_one(rows: list[str], crlf: bool) -> None:
    """The fast way of a CSV, a block at a time, gives what the row by row way gives: rows, reasons and line numbers."""
    import io

    from traces.formats import BadRowError, Batch, azure
    from traces.ingest import _Bounded

    end = "\r\n" if crlf else "\n"
    text = HEADER.replace("\n", end) + end.join(r.replace("\n", " ").replace("\r", " ") for r in rows) + end

    def seen(read: Any) -> list[Any]:
        found: list[Any] = []
        for item in read(_Bounded(io.StringIO(text, newline=""), None)):
            if isinstance(item, Batch):
                columns = (item.arrival_us, item.prompt_tokens, item.output_tokens)
                values = zip(*(c.tolist() for c in columns), strict=True)
                found += [(item.first_line + k, *v, item.zoned) for k, v in enumerate(values)]
            elif isinstance(item[1], BadRowError):
                found.append((item[0], item[1].reason))
            else:
                row = item[1]
                found.append((item[0], row.arrival_us, row.prompt_tokens, row.output_tokens, row.zoned))
        return found

    assert seen(azure.FORMAT.batches) == seen(azure.FORMAT.rows)


def test_a_block_of_plain_rows_is_read_at_once() -> None:
    """The shipped traces go the fast way: otherwise the property above would compare a thing with itself."""
    import io

    from traces.formats import Batch, azure
    from traces.ingest import _Bounded

    for name in NAMES:
        with shipped(name).open(newline="") as file:
            items = list(azure.FORMAT.batches(_Bounded(io.StringIO(file.read(), newline=""), None)))
        assert all(isinstance(item, Batch) for item in items)


def test_a_line_without_end_is_not_held(made_url: str, tmp_path: Path) -> None:
    """Twenty megabytes in one line are one bad row, and the rows around it are kept."""
    path = tmp_path / "long.csv"
    with path.open("w") as file:
        file.write(HEADER + GOOD * 30)
        for _ in range(20):
            file.write("9" * (1 << 20))
        file.write("\n" + GOOD * 30)
    with open_store(made_url) as store:
        report = ingest(store, [path])
    assert (report.rows_read, report.rows_kept) == (61, 60)
    assert next(iter(report.skipped.values())).first_lines == [32]


def test_a_file_that_changes_while_it_is_read_is_refused(made_url: str, tmp_path: Path) -> None:
    """What is stored is what its sum says: a file that grows under the reader is no trace yet."""
    path = tmp_path / "live.csv"
    path.write_text(HEADER + GOOD * 20_000)
    grown = False

    def grow(_: int) -> None:
        nonlocal grown
        if not grown:
            grown = True
            with path.open("a") as file:
                file.write(GOOD)

    with open_store(made_url) as store:
        with pytest.raises(InputError, match="changed while it was read"):
            ingest(store, [path], progress=grow)
        assert store.traces() == []
        assert ingest(store, [path]).rows_kept == 20_001


def test_a_feed_holds_what_the_schedule_holds(made_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Piece by piece the same rows at the same times, failed requests left out; a rate scales them."""
    monkeypatch.setattr(traces.store, "FEED_ROWS", 700)
    path = tmp_path / "t.csv"
    lines = shipped("azure-2023-code").read_text().splitlines()[:3000]
    lines[50] = lines[50].rpartition(",")[0] + ",0"
    path.write_text("\n".join(lines) + "\n")
    with open_store(made_url) as store:
        ingest(store, [path])
        whole, feed = store.schedule("t"), store.feed("t")
        parts = list(feed.pieces())
        fast = store.feed("t", rate_per_s=50.0)
        first = next(fast.pieces())
        known = store.trace("t").summary
        assert (known.pop("replayable"), known.pop("longest_prompt_tokens")) == (2998, whole.longest_prompt)
        with store._begin() as connection:  # as it was stored before these were kept
            connection.execute(traces.store.trace_sources.update().values(summary=known))
        again = store.feed("t")
    assert (len(again), again.span_s, again.longest_prompt) == (len(feed), feed.span_s, feed.longest_prompt)
    assert len(parts) == 5
    assert len(feed) == len(whole) == 2998
    for name in ("index", "due_s", "prompt_tokens", "output_tokens"):
        assert np.array_equal(np.concatenate([getattr(p, name) for p in parts]), getattr(whole, name))
    assert (feed.span_s, feed.longest_prompt) == (pytest.approx(whole.span_s), whole.longest_prompt)
    assert fast.rate_per_s == pytest.approx(50.0)
    assert fast.digest() != feed.digest()
    assert fast.changes == (f"rate x{50.0 / whole.rate_per_s:.6g}",)
    np.testing.assert_allclose(first.due_s, whole.due_s[:700] * whole.rate_per_s / 50.0, rtol=1e-9)


def test_a_schedule_takes_what_its_numbers_take(made_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace without sessions is read in pieces: five numbers a request, and not all of its rows at once."""
    n = 40_000
    monkeypatch.setattr(traces.store, "FEED_ROWS", 1000)
    path = tmp_path / "t.csv"
    path.write_text("at,in,out\n" + "".join(f"{1000 + k},{1000 + k % 7},{300 + k % 5}\n" for k in range(n)))
    with open_store(made_url) as store:
        ingest(store, [path], columns="arrival=at,input=in,output=out")
        store.schedule("t", sessions=True, most=10)
        tracemalloc.start()
        try:
            found = store.schedule("t", sessions=True)
            most = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert (len(found), found.due_s[-1], found.prompt_tokens[-1]) == (n, n - 1, 1000 + (n - 1) % 7)
    assert most < 100 * n


def test_a_feed_waits_for_its_database(made_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that is away for a moment between two pieces costs none of them; one that stays away is said, and a trace that was
    replaced by another: on SQLite it may have the same number."""
    monkeypatch.setattr(traces.store, "FEED_ROWS", 1000)
    file = made_url.removeprefix("sqlite:///")

    def rename(before: str, after: str) -> None:
        with contextlib.closing(sqlite3.connect(file, timeout=10)) as connection:
            connection.execute(f"alter table {before} rename to {after}")
            connection.commit()

    with open_store(made_url) as store:
        ingest(store, [shipped("azure-2023-code")], name="t")
        pieces = store.feed("t").pieces()
        next(pieces)
        rename("traces", "away")
        back = threading.Timer(1.0, rename, ("away", "traces"))
        back.start()
        assert sum(map(len, pieces)) == 4100
        back.join()
        pieces = store.feed("t").pieces()
        next(pieces)
        store.delete_trace("t")
        ingest(store, [DATA / "conversation_trace.first.jsonl"], name="t")
        with pytest.raises(StoreError, match="the trace 't' was removed or replaced while it was read"):
            next(pieces)
        monkeypatch.setattr(traces.store, "FEED_PATIENCE_S", 0.3)
        pieces = store.feed("t").pieces()
        next(pieces)
        rename("traces", "away")
        with pytest.raises(StoreError, match="Check that the database is there"):
            next(pieces)


@pytest.mark.parametrize("name", ["conversation_trace.first.jsonl", "AzureLLMInferenceTrace_code_1week.head5.csv"])
def test_the_clock_is_told(name: str, made_url: str) -> None:
    """Mooncake's conversations come in lumps every 3 s on a clock of milliseconds; the gap is that of the sorted times."""
    with open_store(made_url) as store:
        report = ingest(store, [DATA / name], name="t")
        due = store.schedule("t").due_s
    gaps = np.diff(np.unique(np.rint(due * 1e6)))
    assert report.smallest_gap_s == pytest.approx(float(gaps.min()) / 1e6)
    if name.startswith("conversation"):
        assert report.clock == "millisecond"
        assert report.smallest_gap_s == pytest.approx(3.0, abs=0.002)


def test_a_killed_load_leaves_nothing(sqlite_url: str, tmp_path: Path) -> None:
    """kill -9 in the middle of the rows, three times: no trace, no row, and the same load goes through afterwards."""
    path, file = tmp_path / "big.csv", Path(sqlite_url.removeprefix("sqlite:///"))
    path.write_text(HEADER + GOOD * 400_000)
    command = [sys.executable, "-m", "advisor", "ingest", str(path), "--name", "big", "--db", sqlite_url]
    for size in (1 << 19, 3 << 18, 1 << 20):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wal = Path(f"{file}-wal")
        while process.poll() is None and not (wal.exists() and wal.stat().st_size > size):
            time.sleep(0.002)
        assert process.poll() is None, "it ended before it was killed"
        process.kill()
        process.wait()
        with contextlib.closing(sqlite3.connect(file)) as connection:
            assert connection.execute("SELECT count(*) FROM trace_sources").fetchone() == (0,)
            assert connection.execute("SELECT count(*) FROM traces").fetchone() == (0,)
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    with open_store(sqlite_url) as store:
        assert store.trace("big").summary["rows_kept"] == 400_000
