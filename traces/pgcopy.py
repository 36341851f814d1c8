"""Rows as PostgreSQL's ``COPY .. (FORMAT BINARY)`` takes them: numbers a column at a time, without their text in between.

The layout is that of PostgreSQL's manual (COPY, binary format), all big-endian: a signature; for each row the number of its
fields as int16, for each field its bytes as int32 (-1: null) and the bytes; -1 as int16 at the end. Rows with the same nulls
have numbers of the same size, so all of them are made at once; texts follow, those that were seen before as they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

SIGNATURE = b"PGCOPY\n\xff\r\n\x00" + bytes(8)
END = b"\xff\xff"

INTS = {2: "smallint", 4: "integer", 8: "bigint"}
"""Bytes of an integer, and what the database calls it."""


def fits(values: npt.NDArray[np.int64], size: int) -> bool:
    """Can an integer of so many bytes hold them all?"""
    most = (1 << (8 * size - 1)) - 1
    return not len(values) or (int(values.max()) <= most and int(values.min()) >= -most - 1)


def rows(
    numbers: Sequence[tuple[npt.NDArray[Any], str, npt.NDArray[np.bool_]]], texts: Sequence[Sequence[str | None]]
) -> bytes:
    """Everything that COPY is told. numbers: (values, kind as numpy writes it, e.g. ``>i4``; which are null); texts come after
    them in a row. Values that do not fit are the caller's to refuse (:func:`fits`)."""
    n = len(numbers[0][0])
    fields = len(numbers) + len(texts)
    pattern = np.zeros(n, dtype=np.int64)
    for k, (_, _, null) in enumerate(numbers):
        pattern |= null.astype(np.int64) << k
    heads: list[bytes] = [b""] * n
    for found in np.unique(pattern).tolist():
        at = np.flatnonzero(pattern == found)
        layout: list[tuple[str, str]] = [("fields", ">i2")]
        for k, (_, kind, _) in enumerate(numbers):
            layout.append((f"size{k}", ">i4"))
            if not found >> k & 1:
                layout.append((f"value{k}", kind))
        held = np.empty(len(at), dtype=layout)
        held["fields"] = fields
        for k, (values, kind, _) in enumerate(numbers):
            if found >> k & 1:
                held[f"size{k}"] = -1
            else:
                held[f"size{k}"] = np.dtype(kind).itemsize
                held[f"value{k}"] = values[at]
        made, size = held.tobytes(), held.itemsize
        for place, start in zip(at.tolist(), range(0, len(made), size), strict=True):
            heads[place] = made[start : start + size]
    seen: dict[tuple[str | None, ...], bytes] = {}
    parts: list[bytes] = [b""] * (2 * n)
    parts[::2] = heads
    if texts:
        parts[1::2] = [
            seen[words] if words in seen else seen.setdefault(words, b"".join(map(_text, words)))
            for words in zip(*texts, strict=True)
        ]
    return b"".join([SIGNATURE, *parts, END])


def _text(word: str | None) -> bytes:
    if word is None:
        return b"\xff\xff\xff\xff"
    held = word.encode()
    return len(held).to_bytes(4, "big") + held
