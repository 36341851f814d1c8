"""Mooncake JSONL: ``{"timestamp": ms, "input_length": n, "output_length": m, "hash_ids": [..]}``, 512-token blocks.

Times are integer milliseconds from the trace's own zero. A request has ceil(n / 512) block ids (on all 16,024 rows of
the public files); floor is accepted, for writers that leave the partial block out. ``session_id``, as aiperf writes it,
is kept. Source: kvcache-ai/Mooncake.
"""

from __future__ import annotations

from typing import Any

from traces.formats import Meta, Row
from traces.formats.jsonl import Lines, blocks, number_us, whole

BLOCK = 512


def _row(record: dict[str, Any], state: dict[str, Any]) -> Row:
    when = number_us(record.get("timestamp"), 1e3, "timestamp")
    prompt = whole(record.get("input_length"), "input_length")
    output = whole(record.get("output_length"), "output_length")
    packed = None
    if record.get("hash_ids") is not None:
        packed = blocks(record["hash_ids"], prompt, BLOCK)
    session = record.get("session_id")
    return Row(when, prompt, output, session_key=None if session is None else str(session)[:200], hash_ids=packed)


def _tell(record: dict[str, Any]) -> str | None:
    return "has chat_id, as Bailian's rows have" if "chat_id" in record else None


FORMAT = Lines(
    "mooncake",
    "Mooncake JSONL (FAST'25 and arXiv traces, aiperf's mooncake_trace)",
    Meta(clock="millisecond", block_size=BLOCK, hash_scope="file"),
    ("timestamp", "input_length", "output_length"),
    _row,
    tell=_tell,
)
