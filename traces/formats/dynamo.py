"""NVIDIA Dynamo request traces, schema ``dynamo.request.trace.v1``: JSONL (gzipped shards), ordered by end, u64 block hashes.

A line is an event, sometimes wrapped as ``{"event": {..}}``. ``request_end`` is a request; tool events are not. Arrival is
``request.request_received_ms``; block size and hashes stand in ``request.replay``. A cancelled request has the tokens it
got. Seen: what ai-dynamo 1.6.1's frontend writes.
"""

from __future__ import annotations

from typing import Any

from traces.formats import Meta, OtherEvent, Row
from traces.formats.jsonl import Lines, at, blocks, lapse_us, number_us, whole


def _row(record: dict[str, Any], state: dict[str, Any]) -> Row | OtherEvent:
    event = record["event"] if isinstance(record.get("event"), dict) else record
    kind = event.get("event_type")
    if kind != "request_end":
        return OtherEvent(str(kind)[:40])
    when = number_us(at(event, "request.request_received_ms"), 1e3, "request_received_ms")
    replayed = at(event, "request.replay")
    prompt = at(event, "request.input_tokens")
    prompt = whole(prompt if prompt is not None else at(replayed, "input_length"), "input_tokens")
    output = whole(at(event, "request.output_tokens"), "output_tokens")
    packed, block = None, None
    if isinstance(replayed, dict) and replayed.get("input_sequence_hashes"):
        block = max(1, whole(replayed.get("trace_block_size"), "trace_block_size"))
        packed = blocks(replayed["input_sequence_hashes"], prompt, block, "input_sequence_hashes")
    session = at(event, "agent_context.session_id")
    finish = str(at(event, "request.finish_reason_metadata.finish_reason") or "")
    name = at(event, "request.request_id")
    return Row(
        when,
        prompt,
        output,
        session_key=None if session is None else str(session)[:200],
        hash_ids=packed,
        zoned=True,
        status=2 if "cancel" in finish.lower() else 0,
        block_tokens=block,
        id=None if name is None else str(name)[:200],
        ttft_us=lapse_us(at(event, "request.ttft_ms"), 1e3),
        e2e_us=lapse_us(at(event, "request.total_time_ms"), 1e3),
    )


def _tell(record: dict[str, Any]) -> str | None:
    event = record["event"] if isinstance(record.get("event"), dict) else record
    return None if "event_type" in event else "no key event_type in the first line"


FORMAT = Lines(
    "dynamo",
    "NVIDIA Dynamo request trace v1 (JSONL, gzipped shards)",
    Meta(clock="millisecond", hash_scope="deployment"),
    (),
    _row,
    tell=_tell,
)
