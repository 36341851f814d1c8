"""WEKA agentic sessions: one JSON document a session, subagents nested, 64-token blocks whose ids are local to the session.

``{"id", "block_size", "hash_id_scope", "requests": [{"t", "type": n|s|subagent, "in", "out", "hash_ids"}]}``; t in seconds
from the session's start, inside a subagent from the subagent's start. There is no absolute time: several sessions given as
one trace all start at 0. Source: callanjfox/kv-cache-tester.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import IO, Any

from traces.formats import BadFileError, BadRowError, Event, Meta, Row
from traces.formats.jsonl import blocks, lapse_us, number_us, parse, whole

BLOCK = 64
MOST_BYTES = 64 << 20
MOST_DEPTH = 8


class Weka:
    """One session a file."""

    name = "weka"
    title = "WEKA agentic session (JSON, subagents, 64-token blocks)"
    meta = Meta(clock="second", block_size=BLOCK, hash_scope="session")
    longest = MOST_BYTES

    def sniff(self, head: str) -> str | None:
        """The document's first keys, which may be cut after 64 KiB."""
        text = head.lstrip("\ufeff").lstrip()
        if not text.startswith("{"):
            return "the file is not a JSON object"
        missing = [k for k in ("hash_id_scope", "block_size", "requests") if f'"{k}"' not in text]
        return f"no key {', '.join(missing)}" if missing else None

    def rows(self, lines: IO[str]) -> Iterator[tuple[int, Event | BadRowError]]:
        """Requests in the order of the document, subagents' where they were started; "lines" are ordinal numbers."""
        held: list[str] = []
        size = 0
        for line in lines:
            held.append(line)
            size += len(line)
            if size > MOST_BYTES:
                raise BadFileError(f"a session of more than {MOST_BYTES >> 20} MiB")
        try:
            session = parse("".join(held))
        except BadRowError as error:
            raise BadFileError(str(error)) from error
        if session.get("block_size") != BLOCK:
            raise BadFileError(f"block_size must be {BLOCK} (got {json.dumps(session.get('block_size'))[:40]})")
        if not isinstance(session.get("id"), str):
            raise BadFileError(f"a session must have an id (got {json.dumps(session.get('id'))[:40]})")
        name = session["id"][:180]
        yield from enumerate(self._requests(session.get("requests"), 0, name, 0, None), start=1)

    def _requests(
        self, requests: Any, start_us: int, name: str, depth: int, parent: str | None
    ) -> Iterator[Event | BadRowError]:
        """parent: of a subagent's first request, the one that started it."""
        if not isinstance(requests, list) or depth > MOST_DEPTH:
            yield BadRowError("bad_json", f"requests must be a list, nested at most {MOST_DEPTH} deep")
            return
        for k, record in enumerate(requests):
            try:
                if not isinstance(record, dict):
                    raise BadRowError("bad_json", f"a request must be an object (got {record!r:.40})")
                when = start_us + number_us(record.get("t"), 1e6, "t")
                if record.get("type") == "subagent":
                    agent = f"{name}/{record.get('agent_id')}"[:200]
                    yield from self._requests(record.get("requests"), when, agent, depth + 1, parent)
                    continue
                prompt, output = whole(record.get("in"), "in"), whole(record.get("out"), "out")
                ids = record.get("hash_ids")
                row = Row(when, prompt, output, name, None if ids is None else blocks(ids, prompt, BLOCK))
                row.id, row.parent = f"{name}#{k}", parent
                row.e2e_us, row.ttft_us = lapse_us(record.get("api_time"), 1e6), lapse_us(record.get("ttft"), 1e6)
                yield row
                parent = row.id
            except BadRowError as bad:
                yield bad


FORMAT = Weka()
