"""Logs of gateways before the engines. Message texts that stand in them are never read.

LiteLLM: ``LiteLLM_SpendLogs`` as CSV (``\\copy .. to .. csv header``) or from its database. Embeddings and answers from the
gateway's own cache never reached an engine: other events. Envoy AI Gateway: JSON access log, from documentation, no real
file seen.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import IO, Any

from traces.formats import BadFileError, BadRowError, Event, Meta, OtherEvent, Row, count
from traces.formats.jsonl import Lines, at, lapse_us, stamp_us, whole

_LLM_CALLS = ("completion", "text_completion", "responses", "anthropic_messages")


class LiteLlm:
    """LiteLLM's spend log."""

    name = "litellm"
    title = "LiteLLM SpendLogs (CSV)"
    meta = Meta(clock="millisecond")
    needed = ("request_id", "call_type", "prompt_tokens", "completion_tokens", "startTime")

    def sniff(self, head: str) -> str | None:
        """The header names the table's columns."""
        header = [c.strip().strip('"') for c in head.lstrip("\ufeff").split("\n", 1)[0].strip().split(",")]
        missing = [c for c in self.needed if c not in header]
        return f"no column {', '.join(missing)} in the header" if missing else None

    def rows(self, lines: IO[str]) -> Iterator[tuple[int, Event | BadRowError]]:
        """Rows in the file's order."""
        reader = csv.DictReader(lines)
        try:
            missing = [c for c in self.needed if c not in (reader.fieldnames or ())]
        except csv.Error as error:
            raise BadFileError(str(error)) from error
        if missing:
            raise BadFileError(
                f"is no CSV of LiteLLM_SpendLogs: its header must name {', '.join(missing)}. "
                "Write one: \\copy \"LiteLLM_SpendLogs\" TO 'FILE.csv' CSV HEADER"
            )
        while True:
            try:
                record = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield reader.line_num, BadRowError("unreadable_line", str(error))
                continue
            try:
                yield reader.line_num, self._row(record)
            except BadRowError as bad:
                yield reader.line_num, bad

    def _row(self, record: dict[str, Any]) -> Event:
        if None in record or None in record.values():
            raise BadRowError("wrong_field_count", "the row has not as many fields as the header")
        call = record["call_type"].lower()
        if call not in _LLM_CALLS and call.removeprefix("a") not in _LLM_CALLS:  # "acompletion" is an awaited one
            return OtherEvent(call[:40])
        if record.get("cache_hit", "").lower() == "true":
            return OtherEvent("gateway cache hit")
        when, zoned = stamp_us(record["startTime"], "startTime")
        prompt, output = (
            count(record["prompt_tokens"], "prompt_tokens"),
            count(record["completion_tokens"], "completion_tokens"),
        )
        failed = record.get("status", "").lower() in ("failure", "failed", "error")
        session = record.get("session_id") or None
        return Row(
            when,
            prompt,
            output,
            session,
            zoned=zoned,
            status=1 if failed else 0,
            id=record["request_id"][:200],
            ttft_us=_later_us(record.get("completionStartTime"), when),
            e2e_us=_later_us(record.get("endTime"), when),
        )


def _later_us(stamp: str | None, start_us: int) -> int:
    """Microseconds from the start to a stamp; -1 where there is none."""
    try:
        return max(-1, stamp_us(stamp, "")[0] - start_us)
    except BadRowError:
        return -1


def _envoy(record: dict[str, Any], state: dict[str, Any]) -> Row:
    when, zoned = stamp_us(record.get("start_time"), "start_time")
    found: list[int] = []
    for name in ("gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens"):
        value = at(record, name)
        if value in (None, "-", ""):
            raise BadRowError("tokens_unknown", f"{name} is not known (got {value!r})")
        found.append(whole(value, name.rpartition(".")[2]))
    code = at(record, "response_code")
    session = at(record, "session.id")
    return Row(
        when,
        found[0],
        found[1],
        session_key=None if session in (None, "-", "") else str(session)[:200],
        zoned=zoned,
        status=0 if str(code) in ("200", "None") else 1,
        e2e_us=lapse_us(_number(at(record, "duration")), 1e3),
    )


def _number(value: Any) -> Any:
    """Access logs write numbers as text, where the operator's template quotes them."""
    return int(value) if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 19 else value


LITELLM = LiteLlm()
ENVOY = Lines(
    "envoy",
    "Envoy AI Gateway JSON access log",
    Meta(clock="millisecond"),
    ("start_time", "gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens"),
    _envoy,
    unseen=True,
)
