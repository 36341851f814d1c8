"""Observations, schedules, readings and runs as columns: numpy always, Arrow and pandas where they are installed.

What did not come is missing, as in the database: a time that is NaN and a count of -1 are null in Arrow and NA in pandas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from traces.errors import InputError
from traces.records import MAY_LACK, Observations, Sample, Schedule

if TYPE_CHECKING:
    import pandas
    import pyarrow

Rows = Observations | Schedule | Sequence[Any]
"""Observations, a schedule, or records such as ``store.samples(id)`` and ``store.runs()``."""

DERIVED = ("lag_s", "ttft_s", "ttft_sent_s", "tpot_s", "e2e_s", "e2e_sent_s")
"""Columns of observations that are computed, with the formulas of :mod:`traces.records`."""


def to_numpy(rows: Rows) -> dict[str, npt.NDArray[Any]]:
    """Column name -> array, all equally long. Of observations also :data:`DERIVED`; of records the plain fields."""
    if isinstance(rows, Observations):
        return {name: getattr(rows, name) for name in (*Observations.columns(), *DERIVED)}
    if isinstance(rows, Schedule):
        found = {name: getattr(rows, name) for name in ("index", "due_s", "prompt_tokens", "output_tokens")}
        more = {name: getattr(rows, name) for name in ("session", "parent", "think_s")}
        return found | {name: column for name, column in more.items() if column is not None}
    records = list(rows)
    kind = type(records[0]) if records else Sample
    if not is_dataclass(kind):
        raise InputError(f"records must be observations, a schedule, samples or runs (got {kind.__name__}).")
    return {f.name: _column([getattr(r, f.name) for r in records]) for f in fields(kind)}


def _column(values: list[Any]) -> npt.NDArray[Any]:
    """Numbers as float64 with NaN for None, everything else as objects; what is no plain value as text."""
    known = [v for v in values if v is not None]
    if known and all(isinstance(v, (bool, np.bool_)) for v in known) and len(known) == len(values):
        return np.array(values, dtype=np.bool_)
    if (
        known
        and all(isinstance(v, (int, np.integer)) and not isinstance(v, bool) for v in known)
        and len(known) == len(values)
    ):
        return np.array(values, dtype=np.int64)
    if known and all(isinstance(v, (int, float, np.number)) and not isinstance(v, bool) for v in known):
        return np.array([np.nan if v is None else float(v) for v in values])
    column = np.empty(len(values), dtype=object)
    column[:] = [v if v is None or isinstance(v, str) else str(v) for v in values]
    return column


def _counts(name: str, rows: Rows) -> bool:
    """Is -1 in this column "the server said nothing"?"""
    return isinstance(rows, Observations) and name in MAY_LACK


def _library(name: str, extra: str) -> ModuleType:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError:
        raise InputError(f"{name} is not installed. Install it: pip install 'steelyard[{extra}]'") from None


def to_arrow(rows: Rows) -> pyarrow.Table:
    """An Arrow table. InputError says what to install where pyarrow is missing."""
    arrow = _library("pyarrow", "parquet")
    columns = {}
    for name, values in to_numpy(rows).items():
        mask = None
        if values.dtype.kind == "f":
            mask = np.isnan(values)
        elif _counts(name, rows):
            mask = values < 0
        kind = arrow.string() if values.dtype.kind == "O" else None
        columns[name] = arrow.array(values, type=kind, mask=mask)
    table: pyarrow.Table = arrow.table(columns)
    return table


def to_pandas(rows: Rows) -> pandas.DataFrame:
    """A pandas frame. InputError says what to install where pandas is missing."""
    pandas_ = _library("pandas", "pandas")
    columns = {}
    for name, values in to_numpy(rows).items():
        if _counts(name, rows):
            columns[name] = pandas_.array(values, dtype="Int64")
            columns[name][values < 0] = pandas_.NA
        else:
            columns[name] = values
    frame: pandas.DataFrame = pandas_.DataFrame(columns)
    return frame
