"""Reads one streamed answer: bytes stamped when they arrived go in, what was measured comes out.

Nothing is parsed while tokens arrive. Pieces are kept with their stamps and read when the answer has ended, or when
more than ``FOLD_BYTES`` have gathered, so that an endless stream costs no more memory than a short one.

An event counts at the stamp of the piece that completed it: the piece that holds its blank line.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from operator import sub
from typing import Any

import orjson

FOLD_BYTES = 16 * 1024
"""Bytes kept unread at most (plus one unfinished event)."""

MAX_EVENT_BYTES = 8 * 1024 * 1024
"""An event larger than this is called malformed; 1 MB events are read."""

DETAIL_CHARS = 200

SECRET_CHARS = 6
"""A shorter secret is not looked for in texts: it may be part of any word, and the gap would tell it."""

_BLANK = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")
_LINE = re.compile(rb"\r\n|\n|\r")
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-_])")
_SECRETS = re.compile(r"(?i)(bearer\s+)[^\s\"',;]+|\b(sk-)[A-Za-z0-9_-]{6,}|(://)[^/\s@]+@")


def masked(text: str, secrets: Sequence[str]) -> str:
    """The text with *** for each of these secrets, and for what its end holds of one that was cut."""
    for secret in secrets:
        text = text.replace(secret, "***")
        begin = secret[:SECRET_CHARS]
        at = text.find(begin, max(0, len(text) - len(secret)))
        while at >= 0 and not secret.startswith(text[at:]):
            at = text.find(begin, at + 1)
        if at >= 0:
            text = text[:at] + "***"
    return text


def printable(text: str, secrets: Sequence[str] = ()) -> str:
    """At most 200 printable characters on one line; terminal escapes, these secrets and anything like a credential removed."""
    text = _ESCAPES.sub("", text[:4000])
    text = masked(text, secrets)
    text = _SECRETS.sub(lambda m: "".join(g for g in m.groups() if g) + "***", text)
    text = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(text.split())[:DETAIL_CHARS]


_NOTHING = object()
"""An event that says nothing."""

_GAVE_UP = ("abort", "error", "cancelled", "timeout")
"""Finish reasons of an engine that gave an answer up: a role that is moved, a shutdown, KV that never came."""

_ALIKE = 8
"""Pieces from which on it pays to look for events that differ in their text alone."""

_SEARCHED = 4
"""Pieces among which the first of such events is looked for: the first may tell a role alone."""

_TEXT_KEYS = (b'"text":', b'"content":', b'"reasoning_content":', b'"reasoning":')
_NOT_PLAIN = b'"\\' + bytes(range(32))


class Answer:
    """What a streamed answer has told so far. Times are on the clock of the stamps, NaN where nothing came.

    first_token, last_token: stamps of the first and last event with non-empty content or reasoning. chunks: such
    events. max_gap: largest time between two of them. prompt_tokens, output_tokens: from ``usage``, -1 without.
    said_end: the stream said that it had ended (``[DONE]``, a finish reason, or usage after content). aborted: the finish
    reason of an engine that gave the answer up, an error once the stream has ended (its usage comes after it).
    error: "", "malformed" or "stream_error"; detail: what was seen. kept: the members named in ``keep``, as last seen in the
    first event with content, one that finishes, or one without content. secrets: what detail must not hold.
    """

    __slots__ = (
        "_like",
        "_rest",
        "_rest_at",
        "_size",
        "aborted",
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
        "secrets",
        "stamps",
    )

    def __init__(self, keep: tuple[str, ...] = (), secrets: tuple[str, ...] = ()) -> None:
        self.keep = keep
        self.secrets = secrets
        self.kept: dict[str, Any] = {}
        self.first_token = math.nan
        self.last_token = math.nan
        self.chunks = 0
        self.max_gap = 0.0
        self.prompt_tokens = -1
        self.output_tokens = -1
        self.said_end = False
        self.aborted = ""
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
        if self.aborted and not self.error:
            self._fail("stream_error", f"finish_reason {self.aborted}")
        if self.chunks:
            # Beside content, zero is what a gateway writes that does not count: it is no count.
            self.prompt_tokens = self.prompt_tokens or -1
            self.output_tokens = self.output_tokens or -1

    def fold(self) -> None:
        """Read every finished event, keep the rest."""
        parts, stamps = self.parts, self.stamps
        if self.error:  # what comes after an error changes nothing
            parts.clear()
            stamps.clear()
            self._rest = b""
        if not parts:
            return
        last = stamps[-1]
        if self._rest:
            parts.insert(0, self._rest)
            stamps.insert(0, self._rest_at)
        while len(parts) > _ALIKE and (n := self._alike()):
            del parts[:n], stamps[:n]
        data = b"".join(parts)
        end = self._events(data) if data and not self.error else len(data)
        rest = data[end:]
        if len(rest) > MAX_EVENT_BYTES:
            self._fail("malformed", f"an event of more than {MAX_EVENT_BYTES} bytes")
            rest = b""
        self._rest, self._rest_at = rest, last
        parts.clear()
        stamps.clear()
        # A large rest counts as read for the limit, or every further piece of a large event would be joined anew.
        self._size = 0 if len(rest) < FOLD_BYTES else -len(rest)

    def _events(self, data: bytes) -> int:
        """Read every finished event; returns where the last one ends."""
        payloads: list[bytes] = []
        ends: list[int] = []
        end = 0
        if b"\r" not in data:
            blocks = data.split(b"\n\n")
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
            for match in _BLANK.finditer(data):
                if (payload := _data(data[end : match.start()])) is not None:
                    payloads.append(payload)
                    ends.append(match.end())
                end = match.end()
        if payloads:
            self._read(payloads, self._ends(ends))
        return end

    def _alike(self) -> int:
        """Read leading pieces that are an event each, the same but for one string, the text; returns how many were read.

        Engines write such runs, and parsing each event as JSON would be most of what this reader costs. It is exact: the
        first event is parsed and known to hold text and neither usage, error nor end; the others are the same bytes around
        another string, which is checked to be one and not empty. Whatever is different is left to :meth:`_events`.
        """
        parts, stamps = self.parts, self.stamps
        begin, like = 0, self._like
        if like is None or not parts[0].startswith(like[0]):
            like = _template(parts[0])
            while like is None and begin + 1 < _SEARCHED and parts[begin].endswith(b"\n\n"):
                begin += 1
                like = _template(parts[begin])
            self._like = like
            if like is None:
                return 0
        head, tail = like
        before, after = len(head), -len(tail)
        texts = []
        for part in parts[begin:] if begin else parts:
            if not (part.startswith(head) and part.endswith(tail)):
                break
            texts.append(part[before:after])
        n, end = len(texts), begin + len(texts)
        if n < _ALIKE or not all(texts) or not _are_strings(texts):
            return 0
        if begin:
            self._events(b"".join(parts[:begin]))
            if self.error:
                return begin
        if self.chunks:
            self.max_gap = max(self.max_gap, stamps[begin] - self.last_token)
        else:
            self.first_token = stamps[begin]
        self.max_gap = max(self.max_gap, max(map(sub, stamps[begin + 1 : end], stamps[begin:end])))
        self.last_token = stamps[end - 1]
        self.chunks += n
        return end

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
                    if reason := choices[0].get("finish_reason"):
                        self._finished(reason)
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
            if reason := choice.get("finish_reason"):
                self._finished(reason)
            if _content(choice):
                if self.chunks:
                    self.max_gap = max(self.max_gap, at - self.last_token)
                else:
                    self.first_token = at
                self.last_token = at
                self.chunks += 1
                return

    def _finished(self, reason: Any) -> None:
        self.said_end = True
        if reason in _GAVE_UP:
            self.aborted = reason

    def _note(self, event: dict[str, Any]) -> None:
        """Keep what facts are made of. Called a few times an answer, not once a token."""
        for name in self.keep:
            value = event.get(name)
            if value is not None:
                self.kept[name] = value

    def _fail(self, kind: str, detail: str) -> None:
        self.error = kind
        self.detail = printable(detail, self.secrets)


def _template(piece: bytes) -> tuple[bytes, bytes] | None:
    """What stands before and after the text of an event, with its line ends, if the piece is one event with plain text."""
    if not piece.startswith(b"data: {") or piece.find(b"\n") != len(piece) - 2 or b"\r" in piece:
        return None
    try:
        event = orjson.loads(piece[6:])
    except ValueError:
        return None
    choices = event.get("choices")
    if event.get("usage") or event.get("error") or type(choices) is not list or len(choices) != 1:
        return None
    if type(choices[0]) is not dict or choices[0].get("finish_reason") or not _content(choices[0]):
        return None
    for key in _TEXT_KEYS:
        if piece.count(key) != 1:
            continue
        opening = piece.index(key) + len(key)
        opening += piece[opening : opening + 1] == b" "
        closing = piece.find(b'"', opening + 1)
        if piece[opening : opening + 1] == b'"' and closing > opening + 1 and b"\\" not in piece[opening:closing]:
            return piece[: opening + 1], piece[closing:]
    return None


def _are_strings(texts: list[bytes]) -> bool:
    """Is each the inside of a JSON string? None is empty."""
    joined = b"\x7f".join(texts)
    try:
        if len(joined.translate(None, _NOT_PLAIN)) == len(joined):
            joined.decode()
            return True
        return all(orjson.loads(b'"' + text + b'"') for text in texts)
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
    # Of more than a column of the database holds, all rows that came with this one would be refused.
    return value if type(value) is int and 0 <= value < 2**31 else otherwise


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
