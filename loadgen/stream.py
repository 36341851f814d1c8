"""Reads one streamed answer: bytes stamped when they arrived go in, what was measured comes out.

Nothing is parsed while tokens arrive. Pieces are kept with their stamps and read when the answer has ended, or when
more than ``FOLD_BYTES`` have gathered, so that an endless stream costs no more memory than a short one.

An event counts at the stamp of the piece that completed it: the piece that holds its blank line.
"""

from __future__ import annotations

import json
import math
import re
from itertools import accumulate
from operator import sub
from typing import Any

import orjson

FOLD_BYTES = 16 * 1024
"""Bytes kept unread at most (plus one unfinished event)."""

MAX_EVENT_BYTES = 8 * 1024 * 1024
"""An event larger than this is called malformed; 1 MB events are read."""

DETAIL_CHARS = 200

_BLANK = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")
_LINE = re.compile(rb"\r\n|\n|\r")
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-_])")
_SECRETS = re.compile(r"(?i)(bearer\s+)[^\s\"',;]+|\b(sk-)[A-Za-z0-9_-]{6,}|(://)[^/\s@]+@")


def printable(text: str) -> str:
    """At most 200 printable characters on one line; terminal escapes and anything like a credential removed."""
    text = _ESCAPES.sub("", text[:4000])
    text = _SECRETS.sub(lambda m: "".join(g for g in m.groups() if g) + "***", text)
    text = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(text.split())[:DETAIL_CHARS]


_NOTHING = object()
"""An event that says nothing."""

_ALIKE = 8
"""Pieces from which on it pays to look for events that differ in their text alone."""

_TEXT_KEYS = (b'"text":', b'"content":', b'"reasoning_content":', b'"reasoning":')
_NOT_PLAIN = re.compile(rb'["\\\x00-\x1f]')


class Answer:
    """What a streamed answer has told so far. Times are on the clock of the stamps, NaN where nothing came.

    first_token, last_token: stamps of the first and last event with non-empty content or reasoning. chunks: such
    events. max_gap: largest time between two of them. prompt_tokens, output_tokens: from ``usage``, -1 without.
    said_end: the stream said that it had ended (``[DONE]``, a finish reason, or usage after content).
    error: "", "malformed" or "stream_error"; detail: what was seen. kept: the members named in ``keep``, as last seen in the
    first event with content, one that finishes, or one without content.
    """

    __slots__ = (
        "_like",
        "_rest",
        "_rest_at",
        "_size",
        "chunks",
        "detail",
        "error",
        "first_token",
        "keep",
        "kept",
        "last_token",
        "max_gap",
        "output_tokens",
        "parts",
        "prompt_tokens",
        "said_end",
        "stamps",
    )

    def __init__(self, keep: tuple[str, ...] = ()) -> None:
        self.keep = keep
        self.kept: dict[str, Any] = {}
        self.first_token = math.nan
        self.last_token = math.nan
        self.chunks = 0
        self.max_gap = 0.0
        self.prompt_tokens = -1
        self.output_tokens = -1
        self.said_end = False
        self.error = ""
        self.detail = ""
        self.parts: list[bytes] = []  # pieces not yet read, and
        self.stamps: list[float] = []  # when each arrived; the same two lists for the whole life of the answer
        self._rest = b""
        self._rest_at = math.nan
        self._size = 0
        self._like: tuple[bytes, bytes] | None = None

    def push(self, at: float, data: bytes) -> None:
        """A piece of the body that arrived at ``at``. Never raises: what is wrong ends up in ``error``."""
        self.parts.append(data)
        self.stamps.append(at)
        self._size += len(data)
        if self._size > FOLD_BYTES:
            self.fold()

    def finish(self, *, whole: bool) -> None:
        """The body has ended; ``whole`` says that its framing was complete. A last event needs no blank line then."""
        self.fold()
        rest, self._rest = self._rest, b""
        if rest and not self.error:
            payload = _data(rest)
            if payload is not None and (whole or _is_json(payload)):
                self._read([payload], [self._rest_at])

    def fold(self) -> None:
        """Read every finished event, keep the rest."""
        parts, stamps = self.parts, self.stamps
        if self.error:  # what comes after an error changes nothing
            parts.clear()
            stamps.clear()
            self._rest = b""
        if not parts:
            return
        if self._rest:
            parts.insert(0, self._rest)
            stamps.insert(0, self._rest_at)
        data = b"".join(parts)
        end = self._alike(data) if len(parts) > _ALIKE and b"\r" not in data else 0
        if not self.error:
            end = self._events(data, end)
        rest = data[end:]
        if len(rest) > MAX_EVENT_BYTES:
            self._fail("malformed", f"an event of more than {MAX_EVENT_BYTES} bytes")
            rest = b""
        self._rest, self._rest_at = rest, stamps[-1]
        parts.clear()
        stamps.clear()
        # A large rest counts as read for the limit, or every further piece of a large event would be joined anew.
        self._size = 0 if len(rest) < FOLD_BYTES else -len(rest)

    def _events(self, data: bytes, end: int) -> int:
        """Read every finished event from byte ``end`` on; returns where the last one ends."""
        payloads: list[bytes] = []
        ends: list[int] = []
        if b"\r" not in data:
            blocks = data[end:].split(b"\n\n")
            blocks.pop()
            for block in blocks:
                end += len(block) + 2
                if block.startswith(b"data: ") and b"\n" not in block:
                    payloads.append(block[6:])
                    ends.append(end)
                elif (payload := _data(block)) is not None:
                    payloads.append(payload)
                    ends.append(end)
        else:
            for match in _BLANK.finditer(data, end):
                if (payload := _data(data[end : match.start()])) is not None:
                    payloads.append(payload)
                    ends.append(match.end())
                end = match.end()
        if payloads:
            self._read(payloads, self._ends(ends))
        return end

    def _alike(self, data: bytes) -> int:
        """Read a run of events that are the same but for one string, the text; returns where the run ends (0: none).

        Engines write such runs, and parsing each event as JSON would be most of what this reader costs. It is exact: the
        first event is parsed and known to hold text and neither usage, error nor end; the others are the same bytes around
        another string, which is checked to be one and not empty. Whatever is different is left to :meth:`_events`.
        """
        like = self._like or _template(data)
        self._like = None
        if like is None:
            return 0
        head, tail = like
        begin = data.find(head)
        if begin < 0 or (begin and data[begin - 2 : begin] != b"\n\n"):
            return 0
        texts = data[begin + len(head) :].split(tail + head)
        last, found, _ = texts[-1].partition(tail)
        if found:
            texts[-1] = last
        else:
            texts.pop()  # not finished, or another kind of event
        if len(texts) < _ALIKE or not all(texts) or not _are_strings(texts):
            return 0
        if begin and self._events(data[:begin], 0) != begin:
            return begin
        if self.error:
            return begin
        self._like = like
        around = len(head) + len(tail)
        ends = list(accumulate((len(text) + around for text in texts), initial=begin))[1:]
        stamps = self.stamps
        if begin or list(accumulate(map(len, self.parts[: len(ends)]))) != ends:
            stamps = self._ends(ends)
        n = len(ends)
        if self.chunks:
            self.max_gap = max(self.max_gap, stamps[0] - self.last_token)
        else:
            self.first_token = stamps[0]
        self.max_gap = max(self.max_gap, max(map(sub, stamps[1:n], stamps)))
        self.last_token = stamps[n - 1]
        self.chunks += n
        return ends[-1]

    def _ends(self, ends: list[int]) -> list[float]:
        """The stamp of the piece that holds the last byte of each event."""
        parts, stamps = self.parts, self.stamps
        found: list[float] = []
        piece, reached = 0, len(parts[0])
        for end in ends:
            while reached < end:
                piece += 1
                reached += len(parts[piece])
            found.append(stamps[piece])
        return found

    def _read(self, payloads: list[bytes], stamps: list[float]) -> None:
        if payloads[-1] == b"[DONE]":
            self.said_end = True
            payloads.pop()
            if not payloads:
                return
        events: list[Any]
        try:
            # One call for all events: half the cost of a call for each.
            events = orjson.loads(b"[" + b",".join(payloads) + b"]")
            if len(events) != len(payloads):
                raise ValueError("an event holds more than one value")
        except (ValueError, RecursionError):
            events = [self._lone(payload) for payload in payloads]
        chunks, last, gap = self.chunks, self.last_token, self.max_gap
        for i, (event, at) in enumerate(zip(events, stamps, strict=False)):
            # The common event, in line: a dict with one choice that has content, no usage, no error.
            if type(event) is dict and not event.get("usage") and not event.get("error"):
                choices = event.get("choices")
                if type(choices) is list and len(choices) == 1 and type(choices[0]) is dict and _content(choices[0]):
                    if chunks == 0:
                        self.first_token = at
                        self._note(event)
                    elif at - last > gap:
                        gap = at - last
                    last = at
                    chunks += 1
                    if choices[0].get("finish_reason"):
                        self.said_end = True
                        self._note(event)
                    continue
            if event is _NOTHING:
                continue
            self.chunks, self.last_token, self.max_gap = chunks, last, gap
            if isinstance(event, dict):
                self._take(event, at)
            else:
                self._fail("malformed", "not a JSON object: " + payloads[i][:300].decode("utf-8", "replace"))
            if self.error:
                return
            chunks, last, gap = self.chunks, self.last_token, self.max_gap
        self.chunks, self.last_token, self.max_gap = chunks, last, gap

    def _lone(self, payload: bytes) -> Any:
        """One event, when not all can be read in one go."""
        payload = payload.strip()
        if payload == b"[DONE]":
            self.said_end = True
            return _NOTHING
        if not payload:
            return _NOTHING
        try:
            return json.loads(payload)
        except (ValueError, RecursionError):
            return None

    def _take(self, event: dict[str, Any], at: float) -> None:
        """One event of the stream."""
        self._note(event)
        if event.get("error"):
            error = event["error"]
            words = error.get("message") if isinstance(error, dict) else error
            self._fail("stream_error", str(words or error))
            return
        usage = event.get("usage")
        if isinstance(usage, dict):
            self.prompt_tokens = _count(usage.get("prompt_tokens"), self.prompt_tokens)
            self.output_tokens = _count(usage.get("completion_tokens"), self.output_tokens)
        choices = event.get("choices")
        if not isinstance(choices, list):
            return
        if not choices and isinstance(usage, dict) and self.chunks:
            self.said_end = True
        for choice in choices:
            if not isinstance(choice, dict):
                continue
            if choice.get("finish_reason"):
                self.said_end = True
            if _content(choice):
                if self.chunks:
                    self.max_gap = max(self.max_gap, at - self.last_token)
                else:
                    self.first_token = at
                self.last_token = at
                self.chunks += 1
                return

    def _note(self, event: dict[str, Any]) -> None:
        """Keep what facts are made of. Called a few times an answer, not once a token."""
        for name in self.keep:
            value = event.get(name)
            if value is not None:
                self.kept[name] = value

    def _fail(self, kind: str, detail: str) -> None:
        self.error = kind
        self.detail = printable(detail)


def _template(data: bytes) -> tuple[bytes, bytes] | None:
    """What stands before and after the text of an event, with its line ends, from the first one that has plain text."""
    at = 0
    for _ in range(4):
        end = data.find(b"\n\n", at)
        if end < 0:
            return None
        block, at = data[at:end], end + 2
        keys = [key for key in _TEXT_KEYS if block.count(key) == 1]
        if not keys or not block.startswith(b"data: {") or b"\n" in block:
            continue
        try:
            event = orjson.loads(block[6:])
        except ValueError:
            return None
        choices = event.get("choices")
        if event.get("usage") or event.get("error") or type(choices) is not list or len(choices) != 1:
            continue
        if type(choices[0]) is not dict or choices[0].get("finish_reason") or not _content(choices[0]):
            continue
        for key in keys:
            opening = block.index(key) + len(key)
            opening += block[opening : opening + 1] == b" "
            closing = block.find(b'"', opening + 1)
            if block[opening : opening + 1] == b'"' and closing > opening + 1 and b"\\" not in block[opening:closing]:
                return block[: opening + 1], block[closing:] + b"\n\n"
    return None


def _are_strings(texts: list[bytes]) -> bool:
    """Is each the inside of a JSON string, and not empty?"""
    joined = b"\x7f".join(texts)
    if _NOT_PLAIN.search(joined) is None:
        if joined.isascii():
            return True
        odd = texts
    else:
        odd = [text for text in texts if not text.isascii() or _NOT_PLAIN.search(text)]
    try:
        return all(orjson.loads(b'"' + text + b'"') for text in odd)
    except ValueError:
        return False


def _content(choice: dict[str, Any]) -> bool:
    if choice.get("text"):
        return True
    delta = choice.get("delta")
    return isinstance(delta, dict) and bool(
        delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning")
    )


def _count(value: Any, otherwise: int) -> int:
    return value if type(value) is int and 0 <= value < 2**53 else otherwise


def _is_json(payload: bytes) -> bool:
    if payload.strip() == b"[DONE]":
        return True
    try:
        json.loads(payload)
    except (ValueError, RecursionError):
        return False
    return True


def _data(block: bytes) -> bytes | None:
    """The joined data lines of one event; None if it has none (a comment, a keep-alive)."""
    lines = []
    for line in _LINE.split(block.removeprefix(b"\xef\xbb\xbf")):
        if line.startswith(b"data:"):
            lines.append(line[6:] if line.startswith(b"data: ") else line[5:])
        elif line == b"data":
            lines.append(b"")
    return b"\n".join(lines) if lines else None
