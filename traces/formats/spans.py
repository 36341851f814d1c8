"""OpenTelemetry spans as JSON: vLLM's ``llm_request`` and GenAI clients' spans. Message texts are never read.

Two shapes: OTLP/JSON (``{"resourceSpans": [{"scopeSpans": [{"spans": [..]}]}]}``, one document or one a line, as a collector's
file exporter writes it; times in nanoseconds as text, attributes as key-value lists), and flat exports
(``{"spans": [{"name", "start_time", "attributes": {..}}]}``). Token counts: ``gen_ai.usage.prompt_tokens`` and
``completion_tokens`` (vLLM, older clients) or ``input_tokens`` and ``output_tokens``. A request of a PD pair leaves a
prefill span, of one answer token, and a decode span: those of one request id are joined. Spans without token counts are other
events, and so are an agent's: they sum those of the requests below.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import IO, Any, TypeGuard

from traces.formats import BadFileError, BadRowError, Event, Meta, OtherEvent, Row
from traces.formats.jsonl import lapse_us, number_us, parse, stamp_us, whole

MOST_BYTES = 64 << 20
_PROMPT = ("gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens")
_OUTPUT = ("gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens")
_NONE = ("create_agent", "embeddings", "execute_tool", "invoke_agent", "invoke_workflow")
"""Values of gen_ai.operation.name that are no request to a language model, whatever they count."""

NESTED = "stand above or below another span with token counts: one request may be counted twice"

_IDS = (("traceId", "trace_id"), ("spanId", "span_id"), ("parentSpanId", "parent_span_id"))
"""Keys of a span's ids in OTLP and in flat exports, where ids may come again in another trace."""

_SESSION = ("gen_ai.conversation.id", "session.id", "exgentic.session.id")


class Spans:
    """OTLP/JSON and flat span files."""

    name = "otlp"
    title = "OpenTelemetry spans as JSON (vLLM llm_request, OTel GenAI)"
    meta = Meta(clock="nanosecond")
    longest = MOST_BYTES
    joins = True

    def sniff(self, head: str) -> str | None:
        """Spans stand somewhere near the start."""
        text = head.lstrip("\ufeff").lstrip()
        if not text.startswith("{"):
            return "the file is not a JSON object"
        return None if '"resourceSpans"' in text or '"spans"' in text else "no key resourceSpans or spans"

    def rows(self, lines: IO[str]) -> Iterator[tuple[int, Event | BadRowError]]:
        """A span a row; the number is that of the line, or of the span where the file is one document."""
        held, lined = "", False
        known: set[int] = set()
        for count, line in enumerate(lines, start=1):
            if held and len(held) + len(line) > MOST_BYTES:
                raise BadFileError(f"a JSON document of more than {MOST_BYTES >> 20} MiB")
            if not held and not line.strip():
                continue
            if not held and (lined or line.rstrip().endswith("}")):
                # One document a line, unless it is the only line of one; after one, a line that is none is bad by itself.
                try:
                    document = parse(line)
                except BadRowError as bad:
                    if lined or not line.lstrip().startswith("{"):
                        yield count, bad
                        continue
                else:
                    lined = True
                    for span in _spans(document):
                        yield count, _event(span, known)
                    continue
            held += line
        if held.strip():
            try:
                document = parse(held)
            except BadRowError as error:
                raise BadFileError(str(error)) from error
            for number, span in enumerate(_spans(document), start=1):
                yield number, _event(span, known)


def _spans(document: dict[str, Any]) -> Iterator[Any]:
    yield from _held(document, "spans")
    for resource in _held(document, "resourceSpans"):
        for scope in _held(resource, "scopeSpans"):
            yield from _held(scope, "spans")


def _held(record: Any, key: str) -> list[Any]:
    """The list under a key; none where there is something else."""
    value = record.get(key) if isinstance(record, dict) else None
    return value if isinstance(value, list) else []


def _event(span: Any, known: set[int]) -> Event | BadRowError:
    try:
        return _read(span, known)
    except BadRowError as bad:
        return bad


def _read(span: Any, known: set[int]) -> Event:
    """known: spans with token counts, and those that such a span is directly below, as hashes: a file may hold millions."""
    if not isinstance(span, dict):
        raise BadRowError("bad_json", f"a span must be an object (got {span!r:.40})")
    held = span.get("attributes")
    attributes = (
        {str(a.get("key")): _value(a.get("value")) for a in held if isinstance(a, dict)}
        if isinstance(held, list)
        else held
    )
    if not isinstance(attributes, dict):
        attributes = {}
    prompt = next((attributes[k] for k in _PROMPT if attributes.get(k) is not None), None)
    output = next((attributes[k] for k in _OUTPUT if attributes.get(k) is not None), None)
    if prompt is None or output is None:
        return OtherEvent("span without token counts")
    operation = attributes.get("gen_ai.operation.name")
    if operation in _NONE:
        return OtherEvent(f"{operation} span")
    if "startTimeUnixNano" in span:
        nano = span["startTimeUnixNano"]
        nano = int(nano) if _digits(nano) else nano
        when, zoned = number_us(nano, 1e-3, "startTimeUnixNano"), True
        end = span.get("endTimeUnixNano")
        end = int(end) if _digits(end) else end
        ended_us = lapse_us(end, 1e-3)
    else:
        when, zoned = stamp_us(span.get("start_time"), "start_time")
        try:
            ended_us = stamp_us(span.get("end_time"), "end_time")[0]
        except BadRowError:
            ended_us = -1
    session = next((attributes[k] for k in _SESSION if attributes.get(k) is not None), None)
    request = attributes.get("gen_ai.request.id", attributes.get("gen_ai.response.id"))
    status = span.get("status")
    failed = isinstance(status, dict) and str(status.get("code")) in ("2", "STATUS_CODE_ERROR")
    trace, own, above = (str(span.get(one) or span.get(other) or "")[:64] for one, other in _IDS)
    nested = hash((trace, "below", own)) in known or hash((trace, above)) in known
    if own:
        known.add(hash((trace, own)))
    if above:
        known.add(hash((trace, "below", above)))
    return Row(
        when,
        whole(prompt, "input_tokens"),
        whole(output, "output_tokens"),
        session_key=None if session is None else str(session)[:200],
        zoned=zoned,
        status=1 if failed else 0,
        id=None if request is None else str(request)[:200],
        ttft_us=lapse_us(attributes.get("gen_ai.latency.time_to_first_token"), 1e6),
        e2e_us=max(-1, ended_us - when),
        odd=NESTED if nested else None,
    )


def _digits(value: Any) -> TypeGuard[str]:
    """Is it a whole number of 64 bits as text?"""
    return isinstance(value, str) and re.fullmatch("-?[0-9]{1,20}", value) is not None


def _value(held: Any) -> Any:
    """An OTLP attribute's value: one of stringValue, intValue (as text), doubleValue, boolValue."""
    if not isinstance(held, dict):
        return held
    for kind, value in held.items():
        if kind == "intValue" and _digits(value):
            return int(value)
        if kind in ("stringValue", "intValue", "doubleValue", "boolValue"):
            return value
    return json.dumps(held)[:200]


FORMAT = Spans()
