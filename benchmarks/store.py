"""How the store grows: insert rate beside the driver's own in the same run, and the time and memory of each question.

``python -m benchmarks.store [--rows 100000 1000000] [--db URL]``; the default is SQLite in a temporary folder. Questions are
asked by a process of its own, whose peak memory is its own. A PostgreSQL or MariaDB named by --db must be empty.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa

from traces.records import Fleet, Observations, Run
from traces.store import Store, open_store
from traces.store import observations as table

BATCH = 20_000
RAW_ROWS = 200_000


def batches(n: int, seed: int = 0) -> Iterator[Observations]:
    """Rows of a run at 100 requests a second."""
    rng = np.random.default_rng(seed)
    for start in range(0, n, BATCH):
        size = min(BATCH, n - start)
        rows = Observations.empty(size)
        rows.index[:] = np.arange(start, start + size)
        rows.worker[:] = rows.index % 2
        rows.due_s[:] = rows.dispatch_s[:] = rows.index / 100
        rows.sent_s[:] = rows.due_s + rng.exponential(2e-4, size)
        rows.first_byte_s[:] = rows.first_token_s[:] = rows.sent_s + rng.lognormal(-1.5, 0.6, size)
        rows.output_tokens[:] = rows.requested_tokens[:] = rng.integers(1, 600, size)
        rows.last_token_s[:] = rows.first_token_s + (rows.output_tokens - 1) * rng.lognormal(-4, 0.2, size)
        rows.prompt_tokens[:] = rows.requested_prompt_tokens[:] = rng.integers(1, 4000, size)
        rows.chunks[:] = rows.output_tokens
        rows.max_gap_s[:] = 0.05
        rows.http_status[:] = 200
        rows.status[:] = np.where(rng.random(size) < 0.01, "failed", "ok")
        yield rows


def a_run(n: int) -> Run:
    return Run(
        f"bench {n}", "bench", "d" * 64, n, "http://x", "reference", "m", Fleet(3, 5), 0.0, 2,
        slo="ttft<0.5s tpot<50ms", rate_per_s=100.0, complete=True, verdict="valid",
    )  # fmt: skip


def raw_rate(store: Store) -> float:
    """Rows a second by the driver alone, plain tuples into a table of the same columns and key, one transaction a batch."""
    names = ["run_id", *Observations.columns()]
    quoted = ", ".join(store._engine.dialect.identifier_preparer.quote(n) for n in names)
    kind = store._engine.dialect.name
    raw = sa.MetaData()
    copy = sa.Table("raw_rows", raw, *(sa.Column(c.name, c.type, primary_key=c.primary_key) for c in table.columns),
                    sqlite_with_rowid=False)  # fmt: skip
    raw.create_all(store._engine)
    held = []
    for rows in batches(RAW_ROWS):
        columns = [[None if v != v else v for v in getattr(rows, name).tolist()] for name in names[1:]]
        held.append(list(zip([1] * len(rows), *columns, strict=True)))
    with store._engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        start = time.perf_counter()
        for rows_ in held:
            if kind == "postgresql":
                with driver.cursor() as cursor, cursor.copy(f"COPY raw_rows ({quoted}) FROM STDIN") as into:
                    for row in rows_:
                        into.write_row(row)
            else:
                mark = "?" if kind == "sqlite" else "%s"
                statement = f"INSERT INTO raw_rows ({quoted}) VALUES ({', '.join([mark] * len(names))})"
                driver.cursor().executemany(statement, rows_)
            driver.commit()
        took = time.perf_counter() - start
    copy.drop(store._engine)
    return RAW_ROWS / took


def ask(url: str, run_id: int) -> None:
    """The questions, timed; printed as JSON."""
    found: dict[str, float] = {}

    def timed(name: str, work: Any) -> None:
        start = time.perf_counter()
        work()
        found[name] = time.perf_counter() - start

    with open_store(url, create=False) as store:
        timed("runs_s", store.runs)
        timed("figures_first_s", lambda: store.figures(store.run(run_id)))
        timed("figures_s", lambda: store.figures(store.run(run_id)))
        timed("windows_s", lambda: store.windows(run_id))
    found["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(found))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--db")
    parser.add_argument("--ask", type=int)
    options = parser.parse_args()
    if options.ask is not None:
        ask(options.db, options.ask)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        url = options.db or f"sqlite:///{Path(folder) / 'bench.db'}"
        print(
            f"{platform.platform()}, Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}, {url.split(':')[0]}"
        )
        with open_store(url) as store:
            for n in options.rows:
                before = raw_rate(store)
                run = store.begin_run(a_run(n))
                spent = 0.0
                for rows in batches(n):
                    start = time.perf_counter()
                    store.add_observations(run.id, rows)
                    spent += time.perf_counter() - start
                start = time.perf_counter()
                run = store.end_run(replace(run, counts={"ok": n}))
                end_s = time.perf_counter() - start
                after = raw_rate(store)
                raw = (before + after) / 2
                command = [sys.executable, "-m", "benchmarks.store", "--db", url, "--ask", str(run.id)]
                said = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                print(
                    f"{n:>10,} rows: insert {n / spent:,.0f}/s, driver alone {before:,.0f} and {after:,.0f}/s, "
                    f"ratio {n / spent / raw:.2f}; end_run {end_s:.2f} s; "
                    + ", ".join(f"{k} {v:.3g}" for k, v in said.items())
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
