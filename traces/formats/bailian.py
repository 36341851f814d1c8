"""Qwen-Bailian usage traces: JSONL of chats, 16-token blocks, times in float *seconds* from the trace's zero.

``{"chat_id", "parent_chat_id" (-1: a root), "timestamp", "input_length", "output_length", "type", "turn", "hash_ids"}``.
From documentation (alibaba-edu/qwen-bailian-usagetraces-anon), no real file seen.
"""

from __future__ import annotations

from typing import Any

from traces.formats import Meta, Row
from traces.formats.jsonl import Lines, blocks, number_us, whole

BLOCK = 16


def _row(record: dict[str, Any], state: dict[str, Any]) -> Row:
    when = number_us(record.get("timestamp"), 1e6, "timestamp")
    prompt = whole(record.get("input_length"), "input_length")
    output = whole(record.get("output_length"), "output_length")
    ids = record.get("hash_ids")
    packed = blocks(ids, prompt, BLOCK) if ids is not None else None
    # A conversation is named after its root.
    roots: dict[str, str] = state.setdefault("roots", {})
    chat, before = str(record.get("chat_id"))[:200], record.get("parent_chat_id")
    parent = None if before in (-1, "-1", None) else str(before)[:200]
    root = chat if parent is None else roots.get(parent, parent)
    roots[chat] = root
    turn = record.get("turn")
    return Row(
        when,
        prompt,
        output,
        session_key=root,
        hash_ids=packed,
        id=chat,
        parent=parent,
        turn=-1 if turn is None else whole(turn, "turn"),
    )


FORMAT = Lines(
    "bailian",
    "Qwen-Bailian JSONL (float seconds, 16-token blocks)",
    Meta(clock="second", block_size=BLOCK, hash_scope="file"),
    ("chat_id", "timestamp", "input_length", "output_length"),
    _row,
    unseen=True,
)
