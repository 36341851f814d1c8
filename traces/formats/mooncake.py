"""Mooncake JSONL: ``{"timestamp": ms, "input_length": n, "output_length": m, "hash_ids": [..]}``, 512-token blocks.

Times are integer milliseconds from the trace's own zero. A request has ceil(n / 512) block ids (on all 16,024 rows of
the public files); floor is accepted, for writers that leave the partial block out. Source: kvcache-ai/Mooncake.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import IO, Any

from traces.formats import BadRowError, Meta, Row, bounded
from traces.formats.blocks import pack

BLOCK = 512


class Mooncake:
    """The Mooncake request log."""

    name = "mooncake"
    title = "Mooncake JSONL (FAST'25 and arXiv traces, aiperf's mooncake_trace)"
    meta = Meta(clock="millisecond", block_size=BLOCK, hash_scope="file")

    def sniff(self, head: str) -> str | None:
        """The first line is an object with the three keys."""
        first = head.lstrip("\ufeff").split("\n", 1)[0].strip()
        try:
            record = json.loads(first)
        except (ValueError, RecursionError):
            return "the first line is not a JSON object"
        if not isinstance(record, dict):
            return "the first line is not a JSON object"
        missing = [k for k in ("timestamp", "input_length", "output_length") if k not in record]
        return f"no key {', '.join(missing)} in the first line" if missing else None

    def rows(self, lines: IO[str]) -> Iterator[tuple[int, Row | BadRowError]]:
        """Rows in the file's order. Block ids become dense numbers, exactly, however large they were."""
        dense: dict[int, int] = {}
        for number, line in enumerate(lines, start=1):
            text = line.strip().lstrip("\ufeff")
            if not text:
                yield number, BadRowError("empty_line", "the line is empty")
                continue
            try:
                yield number, self._row(text, dense)
            except BadRowError as bad:
                yield number, bad

    def _row(self, text: str, dense: dict[int, int]) -> Row:
        try:
            record = json.loads(text, parse_constant=_refuse)
        except (ValueError, RecursionError):
            raise BadRowError("bad_json", f"the line is not one JSON object (got {text[:40]!r})") from None
        if not isinstance(record, dict):
            raise BadRowError("bad_json", f"the line is not one JSON object (got {text[:40]!r})")
        at = record.get("timestamp")
        if isinstance(at, bool) or not isinstance(at, (int, float)) or not math.isfinite(at) or at < 0 or at > 2**52:
            raise BadRowError("bad_time", f"timestamp must be milliseconds >= 0 (got {at!r})")
        prompt = _whole(record.get("input_length"), "input_length")
        output = _whole(record.get("output_length"), "output_length")
        ids = record.get("hash_ids")
        packed = None
        if ids is not None:
            if not isinstance(ids, list) or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
                raise BadRowError("bad_hash_ids", "hash_ids must be a list of integers >= 0")
            if len(ids) not in (math.ceil(prompt / BLOCK), prompt // BLOCK):
                raise BadRowError(
                    "block_count_mismatch", f"{prompt} tokens are {math.ceil(prompt / BLOCK)} blocks (got {len(ids)})"
                )
            packed = pack([dense.setdefault(i, len(dense)) for i in ids])
        return Row(round(at * 1000), prompt, output, hash_ids=packed)


def _refuse(word: str) -> Any:
    raise ValueError(word)


def _whole(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise BadRowError(f"{what}_not_a_number", f"{what} must be an integer (got {value!r:.40})")
    if value != int(value):
        raise BadRowError(f"{what}_not_an_integer", f"{what} must be an integer (got {value!r:.40})")
    return bounded(int(value), what)


FORMAT = Mooncake()
