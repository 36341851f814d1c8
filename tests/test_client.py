"""loadgen.client: on time, over real sockets, every failure by its name."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import itertools
import json
import math
import multiprocessing
import socket
import ssl
import subprocess
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import loadgen.client
from loadgen import engines
from loadgen.client import Client, Gate, Row, Target, _Connection, target
from loadgen.engines import Measure, Prompts, dialect
from traces.errors import InputError

EVENTS = [
    b'data: {"choices":[{"text":"a","finish_reason":null}]}\n\n',
    b'data: {"choices":[{"text":"b","finish_reason":"length"}]}\n\n',
    b'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":2}}\n\n',
    b"data: [DONE]\n\n",
]
BODY = b"".join(EVENTS)
SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"

Answerer = Callable[[asyncio.StreamReader, asyncio.StreamWriter, bytes], Awaitable[None]]


def chunked(*parts: bytes, end: bool = True) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in parts) + (b"0\r\n\r\n" if end else b"")


def typed(kind: bytes, body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s" % (kind, len(body), body)


def replies(*raw: bytes, then: str = "keep") -> Answerer:
    """A server's answer, byte for byte, piece by piece; then it keeps, closes, resets or stalls the connection."""

    async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _request: bytes) -> None:
        for piece in raw:
            writer.write(piece)
            await writer.drain()
            if len(raw) > 1:
                await asyncio.sleep(0.002)
        if then == "close":
            writer.close()
        elif then == "reset":
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            writer.transport.abort()
        elif then == "stall":
            await asyncio.sleep(30)

    return answer


async def ask(
    answer: Answerer,
    n: int = 1,
    *,
    due: list[float] | None = None,
    timeout_s: float = 15.0,
    idle_s: float = 4.0,
    tls: tuple[ssl.SSLContext | None, Target] | None = None,
    engine: Any = None,
    act: Callable[[Client], Awaitable[None]] | None = None,
) -> tuple[list[Row], list[bytes], int]:
    """(rows, requests as they arrived, connections) of ``n`` requests to a server that answers as told."""
    seen: list[bytes] = []
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                body = await reader.readexactly(length)
                seen.append(head + body)
                await answer(reader, writer, head + body)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls[0] if tls else None)
    port = server.sockets[0].getsockname()[1]
    where = tls[1] if tls else Target("http", "127.0.0.1", 0)
    where = replace(where, port=port)
    rows: list[Row] = []
    kind = dialect("openai")
    prompts = Prompts(kind, "m", 100, 1)
    client = Client(where, kind.path, prompts, rows.append, timeout_s=timeout_s, idle_s=idle_s, engine=engine)
    times = due if due is not None else [0.0] * n
    count = len(times)
    run = asyncio.ensure_future(client.run(range(count), times, [5] * count, [2] * count, time.monotonic() + 0.01))
    if act is not None:
        await act(client)
    await asyncio.wait_for(run, 20)
    await client.close()
    server.close()
    await asyncio.sleep(0)
    return sorted(rows), seen, connections


def one(answer: Answerer, **options: Any) -> Row:
    rows, _, _ = asyncio.run(ask(answer, **options))
    assert len(rows) == 1
    return rows[0]


GOOD = [
    # chunked, one chunk an event; all in one chunk; a chunk boundary inside an event
    replies(SSE + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(*EVENTS)),
    replies(SSE + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(BODY)),
    replies(
        SSE + b"Transfer-Encoding: chunked\r\n\r\n", chunked(BODY[:33], BODY[33:70], end=False), chunked(BODY[70:])
    ),
    # Content-Length
    replies(SSE + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY),
    # HTTP/1.1 and HTTP/1.0 ended by closing, with and without [DONE]
    replies(SSE + b"Connection: close\r\n\r\n" + BODY, then="close"),
    replies(b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + b"".join(EVENTS[:3]), then="close"),
    # split byte by byte, headers and all
    replies(*(bytes([b]) for b in SSE + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(*EVENTS))),
    # 100 Continue first
    replies(b"HTTP/1.1 100 Continue\r\n\r\n" + SSE + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(*EVENTS)),
    # gzip, though we ask for identity
    replies(
        SSE + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(gzip.compress(BODY, mtime=0)),
        gzip.compress(BODY, mtime=0),
    ),
    # no content type, but a stream
    replies(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY),
    # said that it had ended, then lost its last chunk
    replies(SSE + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(*EVENTS, end=False), then="close"),
]


class Wire(asyncio.Transport):
    """The far end of a connection that a test holds: what is written goes nowhere, what arrives the test says."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Requests are not answered here."""

    def is_closing(self) -> bool:
        return False

    def abort(self) -> None:
        """Nothing to close."""


class PieceByPiece(_Connection):
    """Every piece goes through the parser."""

    def data_received(self, data: bytes) -> None:
        self.between = False
        super().data_received(data)


async def fed(kind: type[_Connection], pieces: list[bytes]) -> list[Row]:
    """What a connection makes of an answer that arrives in these pieces, a second apart."""
    rows: list[Row] = []
    now = itertools.count(100.0)
    prompts = Prompts(dialect("openai"), "m", 100, 1)
    client = Client(Target("http", "127.0.0.1", 1), "/v1/completions", prompts, rows.append, clock=lambda: 0.0)
    connection = kind(client, client._routes[0])
    connection.transport = Wire()
    client._routes[0].idle.append(connection)
    client._positions, client._sizes = [0], ([5], [2])
    client._more = True
    client._send(0)
    connection.clock = lambda: next(now)
    for piece in pieces:
        connection.data_received(piece)
        if rows:
            break
    connection.connection_lost(None)
    return rows


FRAMES = st.sampled_from(
    [b"%x\r\n%s\r\n", b"%X\r\n%s\r\n", b"0%x\r\n%s\r\n", b"%x;a=b\r\n%s\r\n", b"%x\n%s\n", b"%x\r\n%s\n\n"]
)
SPOILED = st.sampled_from(
    [b"3\r\nabcd\r\n", b"5\r\nabc\r\n", b"\r\n", b"x\r\n", b"0\r\nA: b\r\n\r\n", b"1\r\n\r\r\n", b"7"]
)
EVENT_BYTES = st.one_of(
    st.sampled_from(EVENTS), st.integers(1, 2500).map(lambda n: b'data: {"choices":[{"text":"%s"}]}\n\n' % (b"a" * n))
)


@settings(max_examples=150)
@given(
    st.lists(st.one_of(*[st.tuples(FRAMES, EVENT_BYTES)] * 6, SPOILED), max_size=12),
    st.lists(st.floats(0, 1, exclude_max=True), max_size=12),
)
@example([(b"%x\r\n%s\r\n", EVENTS[0]), b"1", b"5\r\nhello\r\n", b" and what comes\r\n"], [])
def test_a_piece_that_is_one_chunk_is_read_as_the_parser_reads_it(
    items: list[bytes | tuple[bytes, bytes]], cuts: list[float]
) -> None:
    """Whole chunks pass the parser by; the row is the same to the last stamp, whatever the framing and wherever it is cut."""
    body = [i if isinstance(i, bytes) else i[0] % (len(i[1]), i[1]) for i in items]
    pieces = [SSE + b"Transfer-Encoding: chunked\r\n\r\n", *body, chunked(EVENTS[-1])]
    if cuts:
        joined = b"".join(pieces)
        at = sorted(int(cut * len(joined)) for cut in cuts)
        pieces = [joined[a:b] for a, b in itertools.pairwise([0, *at, len(joined)]) if a < b]
    quick, slow = asyncio.run(fed(_Connection, pieces)), asyncio.run(fed(PieceByPiece, pieces))
    assert len(quick) == len(slow) == 1
    assert str(quick) == str(slow)  # NaN is not NaN


@pytest.mark.parametrize("answer", GOOD, ids=range(len(GOOD)))
def test_every_framing_gives_the_same_row(answer: Answerer) -> None:
    """Chunks, lengths, closing, gzip and interim answers are transport, not content."""
    row = one(answer)
    assert (row.status, row.error, row.detail, row.http_status) == ("ok", "", "", 200)
    assert (row.chunks, row.prompt_tokens, row.output_tokens) == (2, 5, 2)
    assert row.sent < row.first_byte <= row.first_token <= row.last_token <= row.ended


CHUNKED = SSE + b"Transfer-Encoding: chunked\r\n\r\n"
HTML = b"<!doctype html><html>gateway</html>"
ERROR = b'{"error":{"message":"no such model"}}'
BAD = [
    # what the server does -> kind, HTTP status, words in the detail
    (replies(b"HTTP/1.1 500 Oops\r\nContent-Length: 4\r\n\r\nboom"), "status", 500, "HTTP 500: boom"),
    (replies(b"HTTP/1.1 429 Slow\r\nContent-Length: 0\r\n\r\n"), "status", 429, "HTTP 429"),
    (replies(b"HTTP/1.1 307 Go\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n"), "status", 307, "HTTP 307"),
    (replies(typed(b"text/html", HTML)), "malformed", 200, "text/html"),
    (replies(typed(b"application/json", ERROR)), "stream_error", 200, "no such model"),
    (replies(typed(b"application/json", b"{}")), "malformed", 200, "application/json"),
    (replies(SSE + b"Content-Length: 0\r\n\r\n"), "short", 200, "ended early"),
    (replies(SSE + b"Content-Length: 14\r\n\r\ndata: [DONE]\n\n"), "short", 200, "without any content"),
    (replies(SSE + b"Content-Length: %d\r\n\r\n" % len(EVENTS[0]) + EVENTS[0]), "short", 200, "ended early"),
    (replies(CHUNKED + chunked(EVENTS[0], end=False), then="close"), "short", 200, "inside the body"),
    (replies(CHUNKED, chunked(EVENTS[0], end=False), then="reset"), "reset", 200, ""),
    (replies(then="close"), "reset", 0, "without an answer"),
    (replies(b"HTTP/1.1 200", then="close"), "reset", 0, "inside the headers"),
    (replies(b"SSH-2.0-OpenSSH\r\n"), "malformed", 0, "HTTP"),
    (replies(SSE + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"), "malformed", 200, "HTTP"),
    (replies(SSE + b"Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\nabcd"), "malformed", 200, "Content-Encoding"),
    (replies(SSE + b"Content-Encoding: zstd\r\nContent-Length: 4\r\n\r\nabcd"), "malformed", 200, "zstd"),
    (replies(CHUNKED + chunked(b'data: {"error":"\\u001b[2Jfull"}\n\n')), "stream_error", 200, "full"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "kind", "http", "words"), BAD, ids=[f"{k}-{i}" for i, (_, k, _, _) in enumerate(BAD)]
)
def test_every_failure_has_a_name(answer: Answerer, kind: str, http: int, words: str) -> None:
    """What goes wrong is counted under one of the kinds of records.ERRORS, with what was seen."""
    row = one(answer)
    assert (row.status, row.error, row.http_status) == ("failed", kind, http)
    assert words in row.detail
    assert len(row.detail) <= 200
    assert row.detail.isprintable()


def test_nobody_listening_is_refused() -> None:
    """A port without a server is 'refused'."""

    async def run() -> list[Row]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]  # held meanwhile: nobody else comes to listen there
            rows: list[Row] = []
            kind = dialect("openai")
            client = Client(Target("http", "127.0.0.1", port), kind.path, Prompts(kind, "m", 9, 1), rows.append)
            await client.warm(range(2))
            await asyncio.wait_for(client.run([0, 1], [0.0, 0.01], [5, 5], [1, 1], time.monotonic()), 10)
            return rows

    rows = asyncio.run(run())
    assert [(r.status, r.error) for r in rows] == [("failed", "refused")] * 2


def test_what_was_warmed_is_kept_when_time_is_up() -> None:
    """Two of three connections are made, the third waits in a queue that is full: the two are there for the requests."""

    async def run() -> int:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(1)  # Linux holds one more than it is told, then lets callers wait
            kind = dialect("openai")
            where = Target("http", "127.0.0.1", listener.getsockname()[1])
            client = Client(where, kind.path, Prompts(kind, "m", 9, 1), lambda row: None)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.warm(range(3)), 2.0)
            kept = len(client._routes[0].idle)
            await client.close()
            return kept

    assert asyncio.run(run()) == 2


def test_a_fleet_that_nobody_takes_holds_no_batch_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its server lets callers wait: the batch begins all the same, with the roles that are."""
    monkeypatch.setattr(loadgen.client, "FLEET_S", 0.3)
    rows: list[Row] = []

    async def run() -> float:
        with socket.socket() as listener, contextlib.ExitStack() as held:
            listener.bind(("127.0.0.1", 0))
            listener.listen(0)
            for _ in range(2):  # the queue is full
                other = held.enter_context(socket.socket())
                other.setblocking(False)
                other.connect_ex(listener.getsockname())
            kind = dialect("openai")
            where = Target("http", "127.0.0.1", listener.getsockname()[1])
            client = Client(where, kind.path, Prompts(kind, "m", 9, 1), rows.append, timeout_s=0.2)
            zero = time.monotonic()
            await asyncio.wait_for(client.run([0], [0.0], [5], [1], zero, Gate([1], ['{"prefill": 1}'])), 10)
            await client.close()
            return zero

    zero = asyncio.run(run())
    assert [(row.status, row.error) for row in rows] == [("failed", "timeout")]
    assert 0.3 <= rows[0].dispatch - zero < 5


def test_a_loop_that_stood_still_too_long_sends_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """By then its master took it for dead: what is overdue is unsent. After a shorter pause it is sent, late; so it is when the
    loop stood still over the start, and when it did before, nobody minds."""
    monkeypatch.setattr(loadgen.client, "FROZEN_S", 3.0)

    async def pause(seconds: float) -> None:
        await asyncio.sleep(0.15)
        time.sleep(seconds)

    due = [0.0, 0.3, 0.35, 4.6]
    for seconds, ended in ((0.3, ["ok"] * 4), (4.0, ["ok", "unsent", "unsent", "unsent"])):
        rows, seen, _ = asyncio.run(ask(GOOD[0], due=due, act=lambda _, seconds=seconds: pause(seconds)))
        assert [row.status for row in sorted(rows)] == ended
        assert len(seen) == ended.count("ok")
    assert all("stood still" in row.detail for row in rows if row.status == "unsent")

    async def start(later_s: float, over: bool) -> list[Row]:
        """Of a client that is ready and then stands still; later_s: until it is told to start; over: zero is past."""
        rows: list[Row] = []
        kind = dialect("openai")
        client = Client(Target("http", "127.0.0.1", 1), kind.path, Prompts(kind, "m", 9, 1), rows.append)
        await client.warm(())
        await asyncio.sleep(0)
        before = time.monotonic()
        time.sleep(3.2)
        await asyncio.sleep(later_s)
        zero = before + 0.5 if over else time.monotonic()
        await asyncio.wait_for(client.run([0], [0.0], [5], [1], zero), 10)
        await client.close()
        return rows

    for later_s, over in ((0.0, True), (0.3, True), (0.3, False)):
        (row,) = asyncio.run(start(later_s, over))
        assert row.status == ("unsent" if over else "failed")  # nobody listens there
        assert ("stood still until" in row.detail) == over


def without_handles() -> list[tuple[str, str, str, float]]:
    """(status, error, detail, sent) of two requests of a client whose process has no file handle left."""
    import resource

    async def run() -> list[Row]:
        rows: list[Row] = []
        kind = dialect("openai")
        listener = socket.create_server(("127.0.0.1", 0))
        where = Target("http", "127.0.0.1", listener.getsockname()[1])
        client = Client(where, kind.path, Prompts(kind, "m", 9, 1), rows.append)
        await client.warm(())
        work = asyncio.ensure_future(client.run([0, 1], [0.1, 0.1], [5, 5], [1, 1], time.monotonic()))
        await asyncio.sleep(0.05)
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        held = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, before[1]))
        try:
            while True:
                held.append(socket.socket())
        except OSError:
            pass
        try:
            await asyncio.wait_for(work, 10)
        finally:
            for one in [*held, listener]:
                one.close()
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        await client.close()
        return rows

    return [(r.status, r.error, r.detail, r.sent) for r in asyncio.run(run())]


def test_a_worker_without_file_handles_has_not_sent_the_request() -> None:
    """It is the generator's fault: ``unsent``, which spoils the run, and no failure of the server. In a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as own:
        rows = own.submit(without_handles).result(60)
    assert [(status, error) for status, error, _, _ in rows] == [("unsent", "")] * 2
    assert "Too many open files" in rows[0][2]
    assert math.isnan(rows[0][3])


def test_a_request_that_takes_too_long_times_out_and_keeps_what_it_measured() -> None:
    """A stall is a timeout; the tokens that came stay in the row."""
    answer = replies(SSE + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(EVENTS[0], end=False), then="stall")
    row = one(answer, timeout_s=2.0)
    assert (row.status, row.error, row.chunks) == ("failed", "timeout", 1)
    assert math.isfinite(row.first_token)


def test_no_request_waits_for_an_answer() -> None:
    """With a server that never answers, every request leaves at its due time all the same."""
    due = [k * 0.01 for k in range(50)]
    rows, seen, connections = asyncio.run(ask(replies(then="stall"), due=due, timeout_s=4.0))
    assert len(seen) == connections == 50
    assert {r.error for r in rows} == {"timeout"}
    first = rows[0].sent
    assert max(abs((r.sent - first) - d) for r, d in zip(rows, due, strict=True)) < 2.0


def test_requests_never_leave_early() -> None:
    """Sent is at or after due, for every request."""
    due = [k * 0.003 for k in range(100)]
    before = time.monotonic()
    rows, _, _ = asyncio.run(ask(GOOD[0], due=due))
    assert all(r.sent >= before + d for r, d in zip(rows, due, strict=True))
    assert [r.status for r in rows] == ["ok"] * 100


def test_connections_are_reused() -> None:
    """One request after another takes one connection."""
    rows, seen, connections = asyncio.run(ask(GOOD[0], due=[k * 2.0 for k in range(3)]))
    assert [r.status for r in rows] == ["ok"] * 3
    assert len(seen) == 3
    assert connections == 1


def test_a_reset_is_counted_on_a_kept_connection_too() -> None:
    """A server that resets a request is not asked again behind the user's back: the failure is a row."""
    count = 0

    async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
        nonlocal count
        count += 1
        if count == 2:
            writer.transport.abort()
            return
        await GOOD[0](_reader, writer, request)

    rows, seen, connections = asyncio.run(ask(answer, due=[0.0, 0.2, 0.4]))
    assert [(r.status, r.error) for r in rows] == [("ok", ""), ("failed", "reset"), ("ok", "")]
    assert len(seen) == 3
    assert connections == 2


def test_a_connection_that_lay_idle_is_not_used_again() -> None:
    """Servers close idle connections; ours are closed before, and a spare one is opened ahead of need."""
    rows, _, connections = asyncio.run(ask(GOOD[0], due=[0.0, 0.05, 1.0], idle_s=0.3))
    assert [r.status for r in rows] == ["ok"] * 3
    assert connections >= 2


def test_a_connection_that_lay_idle_while_the_loop_stood_still_is_not_used_again() -> None:
    """Nobody came to close it; a request is due at once."""

    async def pause(_: Client) -> None:
        await asyncio.sleep(1.0)  # the first request has its answer
        time.sleep(2.0)

    rows, _, connections = asyncio.run(ask(GOOD[0], due=[0.0, 2.0], idle_s=1.5, act=pause))
    assert [r.status for r in rows] == ["ok"] * 2
    assert connections >= 2


def test_stopping_leaves_no_request_without_a_row() -> None:
    """Stop and cancel: what was not sent is unsent, what was under way is cancelled with what it measured."""

    async def act(client: Client) -> None:
        await asyncio.sleep(1.5)  # a busy machine has been seen to take a quarter of a second for the first chunk
        client.stop()
        client.cancel()

    answer = replies(SSE + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(EVENTS[0], end=False), then="stall")
    rows, _, _ = asyncio.run(ask(answer, due=[0.0, 0.05, 30.0, 40.0], act=act))
    assert [r.status for r in rows] == ["cancelled", "cancelled", "unsent", "unsent"]
    assert [r.chunks for r in rows] == [1, 1, 0, 0]


def self_signed(folder: Path) -> tuple[Path, Path]:
    """(certificate, key) of localhost."""
    certificate, key = folder / "cert.pem", folder / "key.pem"
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"],
        capture_output=True, check=False,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("no openssl command here")
    return certificate, key


def test_a_client_shows_its_certificate(tmp_path: Path) -> None:
    """Mutual TLS: with --cert the server answers, without it the request fails by name; a wrong file is said at once."""
    certificate, key = self_signed(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    context.load_verify_locations(certificate)
    context.verify_mode = ssl.CERT_REQUIRED
    known = target("https://localhost", ca_file=str(certificate), cert_file=str(certificate), key_file=str(key))
    assert one(GOOD[0], tls=(context, known)).status == "ok"
    unknown = one(GOOD[0], tls=(context, target("https://localhost", ca_file=str(certificate))))
    assert unknown.status == "failed"
    for how, words in (
        ({"cert_file": str(tmp_path / "no.pem")}, "No such file"),
        ({"cert_file": str(certificate), "key_file": str(certificate)}, "PEM"),
        ({"key_file": str(key)}, "--key belongs to --cert"),
    ):
        with pytest.raises(InputError, match=words):
            target("https://localhost", **how)
    with pytest.raises(InputError, match="https endpoint"):
        target("http://localhost", cert_file=str(certificate))


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("password", ["open%20sesame", "wrong", "", "garbled"])
def test_a_proxy_is_gone_through(scheme: str, password: str, tmp_path: Path) -> None:
    """Plain requests in absolute form, TLS by CONNECT, credentials to the proxy alone; its refusal is a named failure."""
    asked: list[bytes] = []
    expected = b"Proxy-Authorization: Basic " + base64.b64encode(b"me:open sesame")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        asked.append(head)
        if expected not in head:
            said = (
                b"NO" if password == "garbled" else b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0"
            )
            writer.write(said + b"\r\n\r\n")
            writer.close()
            return
        port = int(head.split(b"\r\n")[0].split(b"localhost:")[1].split(b" ")[0].split(b"/")[0])
        onward_reader, onward = await asyncio.open_connection("127.0.0.1", port)
        if head.startswith(b"CONNECT"):
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            onward.write(head)

        async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError):
                while piece := await source.read(65536):
                    sink.write(piece)
            sink.close()

        await asyncio.gather(copy(reader, onward), copy(onward_reader, writer))

    async def run() -> Row:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        by = f"http://{f'me:{password}@' if password else ''}127.0.0.1:{server.sockets[0].getsockname()[1]}"
        context = None
        if scheme == "https":
            certificate, key = self_signed(tmp_path)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate, key)
            where = target("https://localhost", ca_file=str(certificate), proxy=by)
        else:
            where = target("http://localhost", proxy=by)
        rows, seen, _ = await ask(GOOD[0], tls=(context, where))  # type: ignore[arg-type]
        server.close()
        assert all(b"POST " in request for request in seen)
        if scheme == "https":
            assert all(b"Proxy-Authorization" not in request for request in seen)
        return rows[0]

    row = asyncio.run(run())
    assert asked[0].startswith(b"CONNECT localhost:" if scheme == "https" else b"POST http://localhost:")
    if password.startswith("open"):
        assert (row.status, row.error) == ("ok", "")
    else:
        assert row.status == "failed"
        assert row.error != "timeout"
        assert password == "garbled" or "407" in row.detail


def test_requests_go_to_several_urls_in_turn() -> None:
    """Two servers, each gets every other request, on kept connections of its own."""
    seen: list[list[bytes]] = [[], []]

    async def run() -> list[Row]:
        async def serve(k: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(asyncio.IncompleteReadError):
                while True:
                    head = await reader.readuntil(b"\r\n\r\n")
                    await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
                    seen[k].append(head)
                    await GOOD[0](reader, writer, head)
            writer.close()

        servers = [await asyncio.start_server(partial(serve, k), "127.0.0.1", 0) for k in range(2)]
        where = [target(f"http://127.0.0.1:{s.sockets[0].getsockname()[1]}") for s in servers]
        kind, rows = dialect("openai"), []
        client = Client(where, kind.path, Prompts(kind, "m", 100, 1), rows.append)
        n = 20
        await client.warm([0, 2, 4, 6])  # a worker's share of a schedule may be all of one URL
        assert [len(route.idle) for route in client._routes] == [4, 0]
        await client.run(range(n), [k * 0.01 for k in range(n)], [5] * n, [2] * n, time.monotonic())
        await client.close()
        for server in servers:
            server.close()
        return rows

    rows = asyncio.run(run())
    assert {row.status for row in rows} == {"ok"}
    for k, heads in enumerate(seen):
        numbers = [int(head.split(b"X-Request-Id: ")[1].split(b"\r\n")[0].rpartition(b"-")[2]) for head in heads]
        assert sorted(numbers) == list(range(k, 20, 2))


def test_tls_works_and_an_unknown_certificate_is_a_named_failure(tmp_path: Path) -> None:
    """HTTPS with a CA file is HTTPS; without it the failure says TLS."""
    certificate, key = self_signed(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    trusted = Target("https", "localhost", 0, ca_file=str(certificate))
    assert one(GOOD[0], tls=(context, trusted)).status == "ok"
    row = one(GOOD[0], tls=(context, Target("https", "localhost", 0)))
    assert (row.status, row.error) == ("failed", "other")
    assert row.detail == "TLS: self-signed certificate"  # the reason, not that there is one
    assert one(GOOD[0], tls=(context, Target("https", "localhost", 0, insecure=True))).status == "ok"


def test_the_request_is_what_it_should_be() -> None:
    """Exact prompt length, forced answer length, usage asked for, an id to join with, no two prompts alike."""
    rows, seen, _ = asyncio.run(ask(GOOD[0], 3))
    assert len(rows) == 3
    prompts = set()
    ids = set()
    for raw in seen:
        head, _, body = raw.partition(b"\r\n\r\n")
        sent = json.loads(body)
        assert len(sent["prompt"]) == 5
        prompts.add(tuple(sent.pop("prompt")[:4]))
        assert sent == {
            "model": "m", "max_tokens": 2, "min_tokens": 2, "ignore_eos": True, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        ids.add(head.lower().split(b"x-request-id: ")[1].split(b"\r\n")[0])
    assert len(prompts) == len(ids) == 3


def test_a_given_header_replaces_our_own() -> None:
    """Whatever its case: one Host, one Accept; a gateway that routes by Host would refuse two (RFC 9112)."""
    given = {"host": "model.example", "ACCEPT": "*/*", "X-Tenant": "t", "authorization": "Mine x"}
    also = given | {"x-request-id": "mine"}  # ours joins rows to the server's log
    head = target("http://me:pw@127.0.0.1:8000", api_key="other", headers=also).head("/v1/completions", "k").decode()
    lines = [line.split(": ") for line in head.split("\r\n")[1:]]
    names = [name.lower() for name, _ in lines]
    assert len(set(names)) == len(names)
    assert given.items() <= dict(lines).items()
    assert "content-type" in names


@pytest.mark.parametrize("how", ["page", "json", "event", "cut", "header", "type"])
def test_what_a_server_quotes_of_our_credentials_is_in_no_row(how: str) -> None:
    """Values of headers, as they are or as JSON has them, a part of one where the detail ends, user and password."""
    given = {"X-Token": 'tok"en/7f3ab2', "Cookie": "a=1; session=c00kie77", "Accept": "text/event-stream"}
    given |= {
        "X-Tenant": "f81d4fae-7dec-11d0-a765-00a0c91e6bf6",
        "X-Model": "Qwen/Qwen3-32B-Instruct",
        "X-Stage": "prefill",
    }
    where = target("http://someone:pass%2Fword@127.0.0.1", headers=given)
    quoted = ("Basic c29tZW9uZTpwYXNzL3dvcmQ=", "someone:pass/word", *given.values())

    async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
        assert all(f": {one}\r\n".encode() in request for one in quoted if "someone" not in one)
        page = "; ".join(quoted)
        told = json.dumps({"error": {"message": page}}).encode()
        cut = b"-" * 175 + quoted[0].split()[1].encode()
        answers = {
            "page": typed(b"text/plain", page.encode()).replace(b"200 OK", b"401 No"),
            "json": typed(b"application/json", told),
            "event": CHUNKED + chunked(b"data: %s\n\n" % told),
            "cut": CHUNKED + chunked(b"data: %s\n\n" % cut),
            "header": SSE
            + b"X-Went-Into-Resp-Headers: %s\r\n" % page.encode()
            + b"Content-Length: %d\r\n\r\n%s" % (len(BODY), BODY),
            "type": typed(b"x/" + quoted[0].split()[1].encode(), b"?"),
        }
        writer.write(answers[how])

    rows, _, _ = asyncio.run(ask(answer, tls=(None, where), engine=engines.engine("llm-d")))
    said = f"{rows[0].detail} {rows[0].facts}"
    assert rows[0].status == ("ok" if how == "header" else "failed")
    assert "***" in said
    for secret in ("c29tZW", "pass/word", "someone", "7f3ab2", "c00kie77", "f81d4f"):
        assert secret.lower() not in said.lower()
    for word in ("text/event-stream", "Qwen/Qwen3-32B-Instruct", "prefill"):
        assert word in said or how in ("cut", "type")  # no secret


@pytest.mark.parametrize("name", ["X-Stage", "X-Key"])
def test_no_header_hides_what_a_fact_is_called(name: str) -> None:
    """A word that is part of the names of facts, as a value that is none and as one that is a secret."""
    told = b'data: {"choices":[],"nvext":{"worker_id":{"prefill_worker_id":7},"timing":{"prefill_time_ms":5}}}\n\n'
    where = target("http://127.0.0.1", headers={name: "prefill"})
    answer = replies(CHUNKED + chunked(*EVENTS[:2], told, *EVENTS[2:]))
    facts = one(answer, tls=(None, where), engine=engines.engine("dynamo")).facts
    assert facts == {"prefill_worker": "7", "prefill_s": 0.005}


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("n", [1, 2, 4, 5, 6, 1000])
def test_a_prompt_has_as_many_tokens_as_asked(n: int, text: bool, chat: bool) -> None:
    """Ids or words are counted to the one, and every body is JSON."""
    kind = dialect("openai", chat=chat, text=text)
    prompts = Prompts(kind, 'a "model"', 1000, 3)
    for position in (0, 1, 9_999_999):
        body = json.loads(prompts.body(position, n, 7))
        prompt = body["messages"][0]["content"] if chat else body["prompt"]
        assert len(prompt if isinstance(prompt, list) else prompt.split()) == n
        assert body["model"] == 'a "model"'
        assert isinstance(prompt, str) == (chat or text)


@pytest.mark.parametrize("measure", [None, Measure(11.0, 1.37), Measure(3.0, 0.8)])
@pytest.mark.parametrize("block_tokens", [16, 512])
def test_prompts_share_as_many_tokens_as_their_blocks_hold(measure: Measure | None, block_tokens: int) -> None:
    """Whatever a word counts at the server, and however many blocks there are."""
    prompts = Prompts(dialect("openai", text=True), "m", 3000, 3, measure)
    n = 2048 // block_tokens
    prompts.share({0: range(n), 1: [*range(n // 4), -1]}, block_tokens)
    one, other = (json.loads(prompts.body(k, 2048 + 200, 7))["prompt"].split() for k in (0, 1))
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=True)))
    # A word may be the same by chance.
    assert same * (measure.per_unit if measure else 1.0) == pytest.approx(512, abs=3)
    alone = prompts.body(2, 2048 + 200, 7)
    assert len(json.loads(alone)["prompt"].split()) == len(one)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000"),
        ("https://host/prefix/v1/", "https://host:443/prefix"),
        ("http://user:secret@host:1", "http://host:1"),
        ("http://[::1]:9", "http://[::1]:9"),
        ("http://host/é b/a%20b/v1", "http://host:80/%C3%A9%20b/a%20b"),
        ("http://日本.example", "http://xn--wgv71a.example:80"),
    ],
)
def test_an_endpoint_is_shown_without_secrets(url: str, shown: str) -> None:
    """What is stored of an endpoint is scheme, host, port and path."""
    where = target(url, api_key="sk-planted")
    assert where.shown == shown
    assert where.shown.removeprefix(f"{where.scheme}://{where.netloc}").encode() in where.head("", "k")
    assert "secret" not in repr(where)
    assert "sk-planted" not in repr(where)


@pytest.mark.parametrize("url", ["", "host:80", "ftp://host", "http://", "http://host:port", "http://h:99999"])
def test_a_url_that_cannot_be_used_is_an_input_error(url: str) -> None:
    """Each says what a base URL looks like."""
    with pytest.raises(InputError, match="base URL"):
        target(url)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("me:s3/cr@t@host:80", "'host:80'"),
        ("http//me:s3cr@t@host", "'host'"),
        ("ftp://me:s3cr@t@host", "'ftp://host'"),
        ("host?api_key=s3cr", "'host?api_key=***'"),
    ],
)
def test_a_url_that_cannot_be_used_is_shown_without_its_password(url: str, said: str) -> None:
    with pytest.raises(InputError, match=r"\(got (.*)\)") as caught:
        target(url)
    assert f"(got {said})" in str(caught.value)
    assert "s3" not in str(caught.value)


def test_a_header_cannot_smuggle_a_line() -> None:
    """A line break in a token would be a second header."""
    with pytest.raises(InputError, match="does not allow"):
        target("http://h", api_key="a\r\nX: y")
