"""Runs as Parquet files, from one database to another without loss: one folder, one file a table, one column a column.

A folder holds ``runs.parquet``, ``observations.parquet`` and what else a run has; JSON columns are text. Runs are told apart by
their key: one that is there already gets the rows that it lacks, and keeps those that it has. Until all its rows are
there a run counts as one that has not ended and is incomplete.
"""

from __future__ import annotations

import glob
import io
import json
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from traces.errors import InputError
from traces.store import OF_A_RUN, Store
from traces.unpack import Bounded, Unpacked, UnpackError

PIECE_ROWS, PIECE_BYTES = 20_000, 16 << 20
"""Rows of a file that are stored at once, and their text at most."""

KILLED_S = 86400.0
"""A dump that wrote nothing for this long was killed."""


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise InputError("Parquet needs pyarrow. Run: pip install 'steelyard[parquet]'") from None
    return pyarrow, pyarrow.parquet


def export_runs(store: Store, ids: Sequence[int], out: Path) -> dict[str, int]:
    """Write runs with all their rows into a new folder; table -> rows. The folder is whole or not there."""
    pa, pq = _arrow()
    kinds = {"integer": pa.int64(), "real": pa.float64(), "boolean": pa.bool_(), "text": pa.string()}
    if out.exists():
        raise InputError(f"{out}: is there already. Give another --out.")
    # Another dump may be under way to the same name, on another host too; one that was killed left its folder.
    beside = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    for other in out.parent.glob(f".{glob.escape(out.name)}.{'[0-9a-f]' * 8}"):
        with suppress(OSError):  # perhaps it is through now
            if time.time() - max(path.stat().st_mtime for path in (other, *other.iterdir())) > KILLED_S:
                shutil.rmtree(other, ignore_errors=True)
    written: dict[str, int] = {}
    keys: dict[int, str] = {}
    try:
        beside.mkdir(parents=True)
        for table in ("runs", *OF_A_RUN):
            columns = store.columns(table)
            schema = pa.schema([(name, kinds[kind]) for name, kind in columns.items()])
            written[table] = 0
            with pq.ParquetWriter(beside / f"{table}.parquet", schema, compression="zstd") as file:
                for run_id in ids:
                    for piece in store.dump(table, run_id):
                        file.write_table(pa.table(piece, schema=schema))
                        written[table] += len(next(iter(piece.values())))
                        if table == "runs":
                            keys.update(zip(piece["id"], piece["key"], strict=True))
        if gone := [run_id for run_id in ids if store.key(run_id) != keys.get(run_id)]:
            raise InputError(f"run {gone[0]} was deleted while it was dumped: nothing is written. Dump the others.")
        beside.rename(out)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}). Give another --out.") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return written


def import_runs(store: Store, folder: Path) -> dict[int, int]:
    """Store the runs of a folder; id there -> id here. InputError when a file is not what export_runs writes."""
    ids: dict[int, int] = {}
    begun: list[dict[str, list[Any]]] = []
    try:
        for table in ("runs", *OF_A_RUN):
            wanted = set(store.columns(table))
            if table not in ("runs", "observations") and not (folder / f"{table}.parquet").exists():
                continue  # an older steelyard had no such table
            passed: Counter[int] = Counter()
            with closing(_pieces(folder / f"{table}.parquet")) as pieces:
                for piece in pieces:
                    if unknown := set(piece) - wanted:
                        raise InputError(
                            f"{folder}/{table}.parquet: has columns of a newer steelyard: {sorted(unknown)}."
                        )
                    if not next(iter(piece.values()), ()):
                        continue  # a table without a row
                    if table == "runs":
                        ids.update(zip(piece["id"], store.restore_runs(piece), strict=True))
                        begun.append(piece)
                    else:
                        piece["run_id"] = [ids[i] for i in piece["run_id"]]
                        store.restore(table, piece, passed)
                        passed.update(piece["run_id"])
        for piece in begun:
            store.end_restored(piece)
            for run in store.runs(ids=[ids[i] for i in piece["id"]]):
                if run.ended:
                    store.count(run)
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({str(error).splitlines()[0][:200]}).") from None
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise InputError(
            f"{folder}: is not what steelyard runs dump writes ({type(error).__name__}: {error})."
        ) from None
    return ids


def _pieces(path: Path) -> Generator[dict[str, list[Any]]]:
    """The columns of a file's rows, piece by piece; the first piece has the columns alone. UnpackError names the file."""
    piece: dict[str, list[Any]] = {}
    held = 0
    with io.BufferedReader(Bounded(Unpacked(path, "columns"), path.stat().st_size), 1 << 18) as lines:
        try:
            yield json.loads(lines.readline(PIECE_BYTES))
            while line := lines.readline(PIECE_BYTES + 1):
                if len(line) > PIECE_BYTES:
                    raise UnpackError(f"has a row of more than {PIECE_BYTES >> 20} MB")
                for name, values in json.loads(line).items():
                    piece.setdefault(name, []).extend(values)
                held += len(line)
                if len(next(iter(piece.values()), ())) >= PIECE_ROWS or held > PIECE_BYTES:
                    yield piece
                    piece, held = {}, 0
        except UnpackError as error:
            raise UnpackError(f"{path.name} {error}") from None
    if piece:
        yield piece
