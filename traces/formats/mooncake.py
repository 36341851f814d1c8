"""Mooncake JSONL: ``{"timestamp": ms, "input_length": n, "output_length": m, "hash_ids": [..]}``, 512-token blocks.

Times are integer milliseconds from the trace's own zero. A request has ceil(n / 512) block ids (on all 16,024 rows of
the public files); floor is accepted, for writers that leave the partial block out, and another block size if the user
says so. ``session_id`` and ``delay`` (think time, ms), as aiperf writes them, are kept. Source: kvcache-ai/Mooncake.
"""

from __future__ import annotations

from typing import Any

from traces.formats import Meta, Row
from traces.formats.jsonl import Lines, blocks, lapse_us, number_us, whole

BLOCK = 512


def mooncake(block: int = BLOCK) -> Lines:
    """The format with blocks of a size."""

    def row(record: dict[str, Any], state: dict[str, Any]) -> Row:
        when = number_us(record.get("timestamp"), 1e3, "timestamp")
        prompt = whole(record.get("input_length"), "input_length")
        output = whole(record.get("output_length"), "output_length")
        ids = record.get("hash_ids")
        session = record.get("session_id")
        found = Row(
            when,
            prompt,
            output,
            None if session is None else str(session)[:200],
            None if ids is None else blocks(ids, prompt, block),
        )
        if "delay" in record:
            found.think_us = lapse_us(record["delay"], 1e3)
        return found

    return Lines(
        "mooncake",
        "Mooncake JSONL (FAST'25 and arXiv traces, aiperf's mooncake_trace)",
        Meta(clock="millisecond", block_size=block, hash_scope="file"),
        ("timestamp", "input_length", "output_length"),
        row,
        tell=_tell,
    )


def _tell(record: dict[str, Any]) -> str | None:
    return "has chat_id, as Bailian's rows have" if "chat_id" in record else None


FORMAT = mooncake()
