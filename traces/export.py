"""A stored trace as a file that other tools replay."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from traces.records import Schedule
from traces.store import Store
from traces.whole import whole

MOONCAKE_BLOCK = 512


def export(store: Store, name: str, format: str, out: Path) -> dict[str, Any]:
    """Write the trace's successful requests; returns {"name", "format", "out", "rows", "notes"}. The file is whole or not there.

    mooncake: JSONL, times in whole milliseconds, hash_ids where the trace has them. azure: the three columns, times from
    the recorded ones (from 2000-01-01 where there is no date). csv: arrival_s, prompt_tokens, output_tokens, exactly.
    """
    schedule = store.schedule(name, blocks=format == "mooncake", sessions=True)
    info = store.trace(name)
    notes: list[str] = []
    with whole(out) as file:
        if format == "mooncake":
            _mooncake(file, schedule, notes)
        elif format == "azure":
            _azure(file, schedule, info.origin_utc, store.first_asked_s(name), notes)
        else:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("arrival_s", "prompt_tokens", "output_tokens"))
            writer.writerows((f"{r.due_s:.6f}", r.prompt_tokens, r.output_tokens) for r in schedule)
    left = info.summary["rows_kept"] - len(schedule)
    if left:
        notes.append(f"{left} failed requests of the trace are left out")
    if schedule.parent is not None and (turns := int((schedule.parent >= 0).sum())):
        notes.append(f"conversations are left out: {turns} turns that waited for an answer are requests of their own")
    return {"name": name, "format": format, "out": str(out), "rows": len(schedule), "notes": notes}


def _mooncake(file: TextIO, schedule: Schedule, notes: list[str]) -> None:
    ms = np.rint(schedule.due_s * 1e3).astype(np.int64)
    if bool((np.abs(ms / 1e3 - schedule.due_s) > 1e-9).any()):
        notes.append("times are rounded to the millisecond, as the format wants")
    ids: Iterator[Any] | None = None
    if schedule.blocks is not None:
        if schedule.block_tokens != MOONCAKE_BLOCK:
            notes.append(f"blocks are of {schedule.block_tokens} tokens: tell the reader, most assume {MOONCAKE_BLOCK}")
        ids = iter(schedule.blocks)
    for at, request in zip(ms.tolist(), schedule, strict=True):
        record: dict[str, Any] = {
            "timestamp": at,
            "input_length": request.prompt_tokens,
            "output_length": request.output_tokens,
        }
        if ids is not None:
            record["hash_ids"] = list(next(ids))
        file.write(json.dumps(record) + "\n")


def _azure(file: TextIO, schedule: Schedule, origin: str | None, first_s: float, notes: list[str]) -> None:
    """origin: of the trace's first row; first_s: from there to the first that is written."""
    start = (datetime.fromisoformat(origin) if origin else datetime(2000, 1, 1, tzinfo=UTC)) + timedelta(
        seconds=first_s
    )
    if origin is None:
        notes.append("the trace has no date: times count from 2000-01-01 UTC")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("TIMESTAMP", "ContextTokens", "GeneratedTokens"))
    for request in schedule:
        whole, part = divmod(round(request.due_s * 1e6), 1_000_000)
        when = (start + timedelta(seconds=whole, microseconds=part)).astimezone(UTC).replace(tzinfo=None)
        writer.writerow(
            (when.isoformat(sep=" ", timespec="microseconds") + "0", request.prompt_tokens, request.output_tokens)
        )
