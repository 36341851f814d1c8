"""How the store grows: inserts beside the driver's own rate in the same run, and the time and memory of each question.

``python -m benchmarks.store [--rows 100000 1000000] [--runs 2] [--db URL]``; the default is SQLite in a temporary folder. For
each number of rows two simulated runs of as many are stored (3:5 and 4:4 workers of the demo profile, noise on each stamp; with
--runs more of them, by turns), ended, and asked about by the command itself, in processes of their own whose peak memory is
their own. A PostgreSQL or MariaDB named by --db must be empty; its server's memory and processor are not counted. ``--ask`` asks
about what an earlier call stored there. A call that was broken off goes on with the run that is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
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


FLEETS = (Fleet(3, 5), Fleet(4, 4))


def a_run(n: int, k: int) -> Run:
    fleet = FLEETS[k % 2]
    return Run(
        f"bench {n} {fleet} {k}", "bench", "d" * 64, n, "http://x", "reference", "m", fleet, 0.0, 2, slo=SLO, complete=True,
        verdict="valid", rate_per_s=RATE_PER_S, lag_p50_ms=0.1, lag_p99_ms=1.0, lag_max_ms=2.0, group=f"bench {n}",
    )  # fmt: skip


def now() -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Seconds of clock, and of processor in this process, where SQLite works as well."""
    return np.array([time.perf_counter(), time.process_time()])


def raw_rates(store: Store, of: Observations) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Rows a second (clock, processor) by the driver alone, plain tuples into a table of the same columns and key, one
    transaction a batch."""
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
        start = now()
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
        took = now() - start
    copy.drop(store._engine)
    return RAW_ROWS / took


def keep(store: Store, n: int, runs: int) -> None:
    """Runs of n rows, and how fast the first two were stored; one that is there is left alone."""
    there = {run.name for run in store.runs() if run.ended}
    for k in range(runs):
        begun = a_run(n, k)
        if begun.name in there:
            continue
        of = cycle(FLEETS[k % 2], k)
        before = raw_rates(store, of) if k < 2 else np.zeros(2)
        run = store.begin_run(begun)
        spent, ok = np.zeros(2), 0
        for rows in batches(n, of):
            ok += int(rows.ok.sum())
            start = now()
            store.add_observations(run.id, rows)
            spent += now() - start
        start = now()
        run = store.end_run(replace(run, counts={"ok": ok, "failed": n - ok, "failed.timeout": n - ok}))
        end_s = (now() - start)[0]
        if k >= 2:
            continue
        after, rate = raw_rates(store, of), n / spent
        ratio = rate / ((before + after) / 2)
        print(
            f"{n:>10,} rows: insert {rate[0]:,.0f}/s, driver alone {before[0]:,.0f} and {after[0]:,.0f}/s, ratio "
            f"{ratio[0]:.2f}, by processor time {ratio[1]:.2f}; end_run {end_s:.2f} s",
            flush=True,
        )


ONE = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
done = subprocess.run(sys.argv[1:], capture_output=True, text=True)
took, used = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
if done.returncode not in (0, 3, 5):  # no answer is an answer
    sys.exit(done.stderr)
json.loads(done.stdout or "{}")
print(json.dumps({"s": took, "cpu_s": used.ru_utime + used.ru_stime, "mib": used.ru_maxrss / 1024}))
"""
"""A small process asks: the memory of who starts another counts as that one's until it runs a program of its own."""


def measured(url: str, words: Sequence[str]) -> dict[str, float]:
    """s, cpu_s and mib (the peak) of a command."""
    command = [sys.executable, "-m", "steelyard", *words, "--db", url, "--json"]
    done = subprocess.run([sys.executable, "-c", ONE, *command], stdout=subprocess.PIPE, check=True, text=True)
    said: dict[str, float] = json.loads(done.stdout)
    return said


def ask(url: str, only: str) -> None:
    """Every question whose name matches, of each pair of runs that an earlier call stored."""
    with open_store(url, create=False) as store:
        found: dict[int, list[int]] = {}
        for run in store.runs():
            found.setdefault(run.scheduled, []).append(run.id)
    folder = tempfile.mkdtemp()
    for n, ids in sorted(found.items()):
        one, two = map(str, ids[:2])
        report = os.path.join(folder, "report.html")
        slo = ("--slo", f"ttft<{1 + time.time() % 1}s tpot<50ms")  # one that no call asked about before
        other = ("compare", one, two, *slo)
        question = ("--run", one, "--run", two, "--gpus", "8")
        reported = ("report", "--recommendation", "latest", "--out", report)
        questions = [
            ("runs", ("runs",)),
            ("runs show", ("runs", "show", one)),
            ("compare", ("compare", one, two)),
            ("compare, other SLO", other),
            ("the same again", other),
            ("advise, 8 GPUs", ("advise", *question)),
            ("advise, 32 GPUs", ("advise", *question[:-1], "32", "--rate", f"{4 * RATE_PER_S}")),
            ("report of it", reported),
        ]
        if len(ids) > 2:
            every = tuple(map(str, ids))
            questions += [
                (f"compare of {len(ids)}", ("compare", *every)),
                (f"other SLO, {len(ids)}", ("compare", *every, *slo)),
                (f"advise by {len(ids)}", ("advise", "--gpus", "8", *(w for k in every for w in ("--run", k)))),
                (f"report of {len(ids)}", reported),
            ]
        for name, words in questions:
            if re.search(only, name):
                used = measured(url, words)
                told = f"{used['s']:6.2f} s, {used['cpu_s']:6.2f} s of processor, {used['mib']:5.0f} MiB"
                print(f"{n:>10,} rows a run: {name:20} {told}", flush=True)
    shutil.rmtree(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--runs", type=int, default=2, help="of each number of rows")
    parser.add_argument("--db")
    parser.add_argument("--ask", action="store_true")
    parser.add_argument("--only", default="", help="questions whose name matches this")
    options = parser.parse_args()
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
                    keep(store, n, options.runs)
        ask(url, options.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
