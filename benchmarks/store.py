"""How the store grows: inserts beside the driver's own rate in the same run, and the time and memory of each question.

``python -m benchmarks.store [--rows 100000 1000000] [--db URL]``; the default is SQLite in a temporary folder. For each number of
rows two simulated runs of as many are stored (3:5 and 4:4 workers of the demo profile, noise on each stamp), ended, and asked
about by the command itself, in processes of their own whose peak memory is their own. A PostgreSQL or MariaDB named by --db must
be empty; its server's memory is not counted. ``--ask`` asks about what an earlier call stored there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa

from loadgen.cluster import Profile, simulate
from tests.test_advise import lognormal
from traces.records import Fleet, Observations, Run
from traces.store import Store, open_store
from traces.store import observations as table

BATCH = 20_000
RAW_ROWS = 200_000
CYCLE = 20_000
RATE_PER_S = 8.0
SLO = "ttft<2s tpot<60ms"


def cycle(fleet: Fleet, seed: int) -> Observations:
    """Rows of a simulated run of CYCLE requests, to be had again and again."""
    rows = simulate(lognormal(CYCLE, RATE_PER_S, 1), fleet, Profile.load("demo")).observations
    rng = np.random.default_rng(seed)
    rows.sent_s[:] = rows.due_s + rng.exponential(2e-4, len(rows))
    rows.first_token_s[:] += rng.exponential(5e-4, len(rows))
    rows.last_token_s[:] = np.maximum(rows.last_token_s, rows.first_token_s)
    rows.first_byte_s[:] = rows.first_token_s
    rows.dispatch_s[:] = rows.due_s
    rows.worker[:] = rows.index % 2
    rows.max_gap_s[:] = 0.05
    rows.http_status[:] = 200
    lost = rng.random(len(rows)) < 0.002
    rows.status[lost], rows.error[lost] = "failed", "timeout"
    return rows


def batches(n: int, of: Observations) -> Iterator[Observations]:
    """n rows: cycles one after the other."""
    span = float(of.due_s[-1]) + 1 / RATE_PER_S
    for start in range(0, n, BATCH):
        which = np.arange(start, min(start + BATCH, n))
        rows = of.take(which % len(of))
        later = which // len(of) * span
        moved = {c: getattr(rows, c) + later for c in rows.columns() if c in _STAMPS}
        yield replace(rows, index=which, **moved)


_STAMPS = ("due_s", "dispatch_s", "sent_s", "first_byte_s", "first_token_s", "last_token_s")


def a_run(n: int, fleet: Fleet) -> Run:
    return Run(
        f"bench {n} {fleet}", "bench", "d" * 64, n, "http://x", "reference", "m", fleet, 0.0, 2, slo=SLO, complete=True,
        verdict="valid", rate_per_s=RATE_PER_S, lag_p50_ms=0.1, lag_p99_ms=1.0, lag_max_ms=2.0,
    )  # fmt: skip


def raw_rate(store: Store, of: Observations) -> float:
    """Rows a second by the driver alone, plain tuples into a table of the same columns and key, one transaction a batch."""
    names = ["run_id", *Observations.columns()]
    quoted = ", ".join(store._engine.dialect.identifier_preparer.quote(n) for n in names)
    kind = store._engine.dialect.name
    raw = sa.MetaData()
    copy = sa.Table("raw_rows", raw, *(sa.Column(c.name, c.type, primary_key=c.primary_key) for c in table.columns),
                    sqlite_with_rowid=False)  # fmt: skip
    raw.create_all(store._engine)
    held = []
    for rows in batches(RAW_ROWS, of):
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


def keep(store: Store, n: int) -> None:
    """Two runs of n rows, and how fast they were stored."""
    for seed, fleet in enumerate((Fleet(3, 5), Fleet(4, 4))):
        of = cycle(fleet, seed)
        before = raw_rate(store, of)
        run = store.begin_run(a_run(n, fleet))
        spent, ok = 0.0, 0
        for rows in batches(n, of):
            ok += int(rows.ok.sum())
            start = time.perf_counter()
            store.add_observations(run.id, rows)
            spent += time.perf_counter() - start
        start = time.perf_counter()
        run = store.end_run(replace(run, counts={"ok": ok, "failed": n - ok, "failed.timeout": n - ok}))
        end_s = time.perf_counter() - start
        after = raw_rate(store, of)
        print(
            f"{n:>10,} rows: insert {n / spent:,.0f}/s, driver alone {before:,.0f} and {after:,.0f}/s, ratio "
            f"{n / spent / ((before + after) / 2):.2f}; end_run {end_s:.2f} s",
            flush=True,
        )


def asked(url: str, *words: str) -> tuple[float, float]:
    """(seconds, peak MiB) of a command."""
    command = [sys.executable, "-m", "steelyard", *words, "--db", url, "--json"]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, told = process.communicate()
    took = time.perf_counter() - start
    if process.returncode not in (0, 3, 5):  # no answer is an answer
        raise SystemExit(f"{' '.join(command)}\n{told.decode()}")
    json.loads(out or b"{}")
    return took, 0.0


def measured(url: str, words: Sequence[str]) -> tuple[float, float]:
    """The same in a process of its own: what its children need at most is known of all of them together."""
    command = [sys.executable, "-m", "benchmarks.store", "--db", url, "--one", *words]
    said = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return said["s"], said["mib"]


def ask(url: str) -> None:
    """Every question, of each pair of runs that an earlier call stored."""
    with open_store(url, create=False) as store:
        found: dict[int, list[int]] = {}
        for run in store.runs():
            found.setdefault(run.scheduled, []).append(run.id)
    folder = tempfile.mkdtemp()
    for n, ids in sorted(found.items()):
        one, two = map(str, ids[:2])
        report = os.path.join(folder, "report.html")
        question = ("--run", one, "--run", two, "--gpus", "8")
        for name, words in (
            ("runs", ("runs",)),
            ("runs show", ("runs", "show", one)),
            ("compare", ("compare", one, two)),
            ("compare, other SLO", ("compare", one, two, "--slo", "ttft<1s tpot<50ms")),
            ("advise, 8 GPUs", ("advise", *question)),
            ("advise, 32 GPUs", ("advise", *question[:-1], "32", "--rate", f"{4 * RATE_PER_S}")),
            ("report of it", ("report", "--recommendation", "latest", "--out", report)),
        ):
            took, peak = measured(url, words)
            print(f"{n:>10,} rows a run: {name:20} {took:6.2f} s {peak:5.0f} MiB", flush=True)
    shutil.rmtree(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--db")
    parser.add_argument("--ask", action="store_true")
    parser.add_argument("--one", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        took, _ = asked(options.db, *options.one)
        print(json.dumps({"s": took, "mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024}))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        url = options.db or f"sqlite:///{Path(folder) / 'bench.db'}"
        kind = url.split(":")[0]
        print(
            f"{time.strftime('%Y-%m-%d')}, {platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
            f"SQLite {sqlite3.sqlite_version}, {kind}"
        )
        if not options.ask:
            with open_store(url) as store:
                for n in options.rows:
                    keep(store, n)
        ask(url)
    return 0


if __name__ == "__main__":
    sys.exit(main())
