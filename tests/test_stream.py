"""loadgen.stream: whatever a server sends, and however it is cut, is read right or named."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.stream import FOLD_BYTES, MAX_EVENT_BYTES, Answer, printable


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def text(words: str, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": words, "finish_reason": finish}]}


def delta(finish: str | None = None, **held: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": held, "finish_reason": finish}]}


def usage(prompt: int, output: int) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}


USAGE = {"choices": [], "usage": usage(7, 3)}
DONE = b"data: [DONE]\n\n"
PLAIN = event(text("a")) + event(text("b")) + event(text("c", "length")) + event(USAGE) + DONE


def read(pieces: list[bytes], *, whole: bool = True) -> Answer:
    """The answer, with piece k stamped k seconds."""
    answer = Answer()
    for at, piece in enumerate(pieces):
        answer.push(float(at), piece)
    answer.finish(whole=whole)
    return answer


def facts(answer: Answer) -> tuple[Any, ...]:
    return answer.chunks, answer.prompt_tokens, answer.output_tokens, answer.said_end, answer.error, answer.detail


def test_a_token_counts_when_its_event_is_complete() -> None:
    """An event counts at the stamp of the piece that holds its end, and the gap between tokens is measured there."""
    first, second = event(text("a")), event(text("b", "length"))
    answer = read([first[:9], first[9:], second[:-1], b"", b"", second[-1:] + DONE])
    assert (answer.first_token, answer.last_token, answer.max_gap, answer.chunks) == (1.0, 5.0, 4.0, 2)


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        # the plain case: three tokens, usage last
        (PLAIN, (3, 7, 3, True, "", "")),
        # CRLF, and CR alone, end lines too
        (PLAIN.replace(b"\n", b"\r\n"), (3, 7, 3, True, "", "")),
        (PLAIN.replace(b"\n", b"\r"), (3, 7, 3, True, "", "")),
        # comments, keep-alives, ids and retries are no events
        (b": hello\n\n" + PLAIN.replace(b"data: [", b": ping\n\nid: 3\nretry: 10\ndata: ["), (3, 7, 3, True, "", "")),
        # data without the space; a byte order mark
        (b"\xef\xbb\xbf" + PLAIN.replace(b"data: ", b"data:"), (3, 7, 3, True, "", "")),
        # one event over several data lines
        (b'data: {"choices":\ndata: [{"text": "a", "finish_reason": "stop"}]}\n\n', (1, -1, -1, True, "", "")),
        # no [DONE], but a finish reason
        (PLAIN.removesuffix(DONE), (3, 7, 3, True, "", "")),
        # no finish reason and no [DONE], but usage after content
        (event(text("a")) + event(USAGE), (1, 7, 3, True, "", "")),
        # neither: it never said that it had ended
        (event(text("a")) + event(text("b")), (2, -1, -1, False, "", "")),
        # usage in every chunk: the last one counts
        (
            event(text("a") | {"usage": usage(7, 1)}) + event(text("b", "stop") | {"usage": usage(7, 2)}) + DONE,
            (2, 7, 2, True, "", ""),
        ),
        # usage null until the end
        (event(text("a") | {"usage": None}) + event(text("", "stop") | USAGE | {"choices": []}), (1, 7, 3, True, "", "")),
        # a role alone and empty deltas are no tokens; reasoning is
        (
            event(delta(role="assistant", content=""))
            + event(delta())
            + event(delta(reasoning_content="hm"))
            + event(delta(reasoning="hm", content=None))
            + event(delta(content="a"))
            + event(delta("stop", content=""))
            + DONE,
            (3, -1, -1, True, "", ""),
        ),
        # an error inside a 200 stream, as an object and as text; what came before stays counted
        (event(text("a")) + event({"error": {"message": "out of memory"}}), (1, -1, -1, False, "stream_error", "out of memory")),
        (event({"error": "gone"}), (0, -1, -1, False, "stream_error", "gone")),
        # an engine that gave the answer up says so in the finish reason alone; usage comes after it
        (
            event(text("a")) + event(text("b", "abort")) + event(USAGE) + DONE,
            (2, 7, 3, True, "stream_error", "finish_reason abort"),
        ),
        (event(delta(content="a")) + event(delta("error")) + DONE, (1, -1, -1, True, "stream_error", "finish_reason error")),
        # a finish reason that is no word
        (event(text("a") | {"choices": [{"text": "a", "finish_reason": {"type": "abort"}}]}), (1, -1, -1, True, "", "")),
        # "error": null is no error
        (event(text("a", "stop") | {"error": None}), (1, -1, -1, True, "", "")),
        # not JSON; JSON but no object; two values in one event
        (event(text("a")) + b"data: {oops\n\n", (1, -1, -1, False, "malformed", "not a JSON object: {oops")),
        (b"data: 3\n\n", (0, -1, -1, False, "malformed", "not a JSON object: 3")),
        (b"data: {},{}\n\n", (0, -1, -1, False, "malformed", "not a JSON object: {},{}")),
        # nested beyond reason
        (b"data: " + b"[" * 200_000 + b"\n\n", (0, -1, -1, False, "malformed", "not a JSON object: " + "[" * 181)),
        # usage that lies about its type is no usage
        (event(text("a", "stop") | {"usage": {"prompt_tokens": "7", "completion_tokens": -1}}), (1, -1, -1, True, "", "")),
        # zero tokens beside content is what a gateway writes that does not count
        (event(text("a")) + event(text("b", "stop")) + event(USAGE | {"usage": usage(0, 0)}) + DONE, (2, -1, -1, True, "", "")),
        # zero tokens and no content
        (event(text("", "stop")) + event(USAGE | {"usage": usage(7, 0)}) + DONE, (0, 7, 0, True, "", "")),
        # more than a column of the database holds
        (event(text("a", "stop") | {"usage": usage(2**31 - 1, 2**31)}), (1, 2**31 - 1, -1, True, "", "")),
        # [DONE] with blanks, and without its blank line
        (event(text("a")) + b"data: [DONE] \n\n", (1, -1, -1, True, "", "")),
        (event(text("a")) + b"data: [DONE]", (1, -1, -1, True, "", "")),
        # nothing at all
        (b"", (0, -1, -1, False, "", "")),
    ],
)  # fmt: skip
def test_streams_as_servers_send_them(stream: bytes, expected: tuple[Any, ...]) -> None:
    """Every form of the stream that is seen in the field is read as what it means."""
    assert facts(read([stream])) == expected
    assert facts(read([stream[i : i + 1] for i in range(len(stream))] if len(stream) < 5000 else [stream])) == expected


PIECES = st.lists(
    st.one_of(
        st.text(max_size=20).map(text),
        st.text(max_size=20).map(lambda s: delta(content=s)),
        st.text(max_size=5).map(lambda s: delta(reasoning_content=s, role="assistant")),
        st.tuples(st.integers(0, 9), st.integers(0, 9)).map(lambda p: text("x") | {"usage": usage(*p)}),
        st.just({"object": "ping"}),
        st.integers(1, 4000).map(lambda n: text("é" * n)),
    ),
    max_size=30,
)


@given(
    PIECES,
    st.sampled_from([b"\n", b"\r\n"]),
    st.sampled_from(
        [DONE, b"", event(text("", "length")) + event(USAGE) + DONE, event({"error": "x"}), b"data: {\n\n"]
    ),
    st.booleans(),
    st.data(),
)
def test_where_a_stream_is_cut_changes_nothing(
    values: list[dict[str, Any]], newline: bytes, ending: bytes, comments: bool, data: st.DataObject
) -> None:
    """Random cuts, inside UTF-8, numbers and line ends, give what the uncut stream gives."""
    stream = b"".join((b": c\n\n" if comments else b"") + event(v) for v in values) + ending
    stream = stream.replace(b"\n", newline)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=40)))
    bounds = [0, *cuts, len(stream)]
    pieces = [stream[a:b] for a, b in itertools.pairwise(bounds)]
    uncut, cut = read([stream]), read(pieces)
    assert facts(cut) == facts(uncut)
    assert math.isnan(cut.first_token) == math.isnan(uncut.first_token)
    if cut.chunks:
        assert 0 <= cut.first_token <= cut.last_token <= len(pieces)
        assert cut.max_gap <= cut.last_token - cut.first_token


TOKENS = st.one_of(
    st.sampled_from(
        [" the", "a", '"', "\\", "\n", "é", "", " ", 'x","finish_reason":"stop"}]}', '"}\n\ndata: {', "\ud83d\ude00"]
    ),
    st.text(max_size=6),
)
KINDS = [text, lambda t: delta(content=t), lambda t: delta(reasoning_content=t), lambda t: delta(content=t, text="")]
INTRUDERS = st.sampled_from(
    [b": ping\n\n", event({"error": "gone"}), event({"object": "ping"}), event(text("x", "stop")), event(USAGE), b"data: {\n\n",
     event(text("y") | {"usage": usage(1, 1)}), event(delta(role="assistant")), b'data: {"choices":[{"text":"a" }]}\n\n',
     b'data: {"text":"z","choices":[{"index": 0, "text": "w", "finish_reason": null}]}\n\n', b"\xff\n\n"]
)  # fmt: skip


@given(
    st.lists(st.one_of(TOKENS, TOKENS, TOKENS, INTRUDERS), max_size=60),
    st.sampled_from(KINDS),
    st.booleans(),
    st.sampled_from([PLAIN[-40:], DONE, b"", event(USAGE) + DONE]),
    st.data(),
)  # fmt: skip
def test_events_read_in_one_go_are_the_events_read_one_by_one(
    items: list[str | bytes], kind: Any, ascii_only: bool, ending: bytes, data: st.DataObject
) -> None:
    """A run of events that differ in their text alone is read at once, and gives what reading each gives: counts, stamps,
    gaps, errors; whatever stands between the events, and wherever they are cut."""

    def written(token: str) -> bytes:
        return b"data: " + json.dumps(kind(token), ensure_ascii=ascii_only).encode("utf-8", "surrogatepass") + b"\n\n"

    stream = [*(item if isinstance(item, bytes) else written(item) for item in items), ending]
    if data.draw(st.booleans()):
        joined = b"".join(stream)
        cuts = sorted(data.draw(st.lists(st.integers(0, len(joined)), max_size=60)))
        stream = [joined[a:b] for a, b in itertools.pairwise([0, *cuts, len(joined)])]
    slow = Answer()
    for at, piece in enumerate(stream):
        slow.push(float(at), piece)
        slow.fold()  # at most one event and a rest at a time: no run
    slow.finish(whole=True)
    fast = read(stream)
    if slow.error:  # whether a stream that went wrong said that it had ended makes no difference
        fast.said_end = slow.said_end
    assert facts(fast) == facts(slow)
    if slow.chunks:
        assert (fast.first_token, fast.last_token, fast.max_gap) == (slow.first_token, slow.last_token, slow.max_gap)


def test_a_run_of_alike_events_is_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast way is taken for what engines write, or it would be no use: the slow one sees the first and last events only."""
    stream = [event(text(f" tok{k}")) for k in range(50)] + [event(text('"', "length")), event(USAGE), DONE]
    seen: list[bytes] = []
    slow = Answer._read
    monkeypatch.setattr(
        Answer, "_read", lambda self, payloads, stamps: (seen.extend(payloads), slow(self, payloads, stamps))
    )
    answer = read(stream)
    assert facts(answer) == (51, 7, 3, True, "", "")
    assert answer.last_token == 50.0
    assert len(seen) == 3


@given(st.lists(st.binary(max_size=200), max_size=20), st.booleans())
def test_no_bytes_make_the_reader_raise(pieces: list[bytes], whole: bool) -> None:
    """Whatever arrives, the reader names it and goes on."""
    answer = read(pieces, whole=whole)
    assert answer.error in ("", "malformed", "stream_error")
    assert answer.chunks == 0 or answer.last_token >= answer.first_token


def test_an_event_of_a_megabyte_is_read() -> None:
    """Large events are events."""
    stream = event(text("x" * 1_000_000, "stop")) + DONE
    answer = read([stream[i : i + 60_000] for i in range(0, len(stream), 60_000)])
    assert facts(answer) == (1, -1, -1, True, "", "")


def test_an_event_without_end_is_malformed_and_an_endless_stream_takes_no_memory() -> None:
    """The reader keeps a bounded number of bytes, whatever a server sends."""
    answer = Answer()
    answer.push(0.0, b"data: {")
    for k in range(2 * MAX_EVENT_BYTES // 65536 + 2):
        answer.push(float(k), b"x" * 65536)
    assert answer.error == "malformed"
    endless = Answer()
    one = event(text("token"))
    for k in range(200_000):
        endless.push(float(k), one)
        assert endless._size <= FOLD_BYTES
    endless.finish(whole=False)
    assert (endless.chunks, endless.last_token, endless.max_gap) == (200_000, 199_999.0, 1.0)


def test_a_stream_broken_off_keeps_what_was_measured() -> None:
    """Half an event at the end of a broken connection is not an error of its own."""
    answer = read([event(text("a")), event(text("b"))[:20]], whole=False)
    assert facts(answer) == (1, -1, -1, False, "", "")


@pytest.mark.parametrize(
    ("given_text", "shown"),
    [
        ("\x1b[31mred\x1b[0m \x1b]0;title\x07plain", "red plain"),
        ("two\nlines\tand\x00nul", "two lines and nul"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer ***"),
        ("key sk-abcdefgh1234 leaked", "key sk-*** leaked"),
        ("http://me:secret@host/x", "http:// ***host/x".replace(" ", "")),
        ("x" * 500, "x" * 200),
    ],
)
def test_details_are_fit_to_print(given_text: str, shown: str) -> None:
    """What a server says is shown without terminal escapes, control characters or credentials, 200 characters long."""
    assert printable(given_text) == shown


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("invalid key 7f3ab2c9d0!", "invalid key ***!"),
        ("x" * 195 + "7f3ab2c9d0", "x" * 195 + "***"),  # where the text is cut
        ("invalid key 7f3ab2c9", "invalid key ***"),  # where it was cut before
        ("7f3ab27f3ab2c", "7f3ab2***"),  # the beginning is there twice
        ("invalid key 7f3ab", "invalid key 7f3ab"),
    ],
)
def test_a_secret_that_is_known_is_not_shown(said: str, shown: str) -> None:
    """Whole, or as much of its beginning as is left where the text ends, from six characters on."""
    assert printable(said, ("7f3ab2c9d0",)) == shown
