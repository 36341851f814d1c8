"""Request logs that serving engines write themselves.

SGLang, ``--log-requests --log-requests-format json``: ``request.received`` carries the arrival, ``request.finished`` the
counts; they are joined by ``rid``. From documentation, no real file seen.
"""

from __future__ import annotations

from typing import Any

from traces.formats import BadRowError, Meta, OtherEvent, Row
from traces.formats.jsonl import Lines, at, number_us, stamp_us, whole


def _when(record: dict[str, Any]) -> tuple[int, bool]:
    value = record.get("timestamp", record.get("time"))
    if isinstance(value, (int, float)):
        return number_us(value, 1e6, "timestamp"), True
    return stamp_us(value, "timestamp")


def _sglang(record: dict[str, Any], state: dict[str, Any]) -> Row | OtherEvent:
    kind, rid = record.get("event"), str(record.get("rid"))[:200]
    waiting: dict[str, tuple[int, bool]] = state.setdefault("received", {})
    if kind == "request.received":
        waiting[rid] = _when(record)
        return OtherEvent("request.received")
    if kind != "request.finished":
        return OtherEvent(str(kind)[:40])
    if rid not in waiting:
        raise BadRowError("no_arrival", f"request {rid!r} finished but was not received in this file")
    arrival_us, zoned = waiting.pop(rid)
    prompt = whole(at(record, "out.meta_info.prompt_tokens"), "prompt_tokens")
    output = whole(at(record, "out.meta_info.completion_tokens"), "completion_tokens")
    ended_us = -1
    if "timestamp" in record or "time" in record:
        ended_us = _when(record)[0]
    return Row(arrival_us, prompt, output, zoned=zoned, id=rid, e2e_us=max(-1, ended_us - arrival_us))


SGLANG = Lines(
    "sglang",
    "SGLang JSON request log (--log-requests-format json)",
    Meta(clock="second"),
    ("event", "rid"),
    _sglang,
    unseen=True,
)
