"""A hostile server costs the questions before and during a run bounded memory and time, and ends as one line."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import resource
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from loadgen.client import target
from loadgen.control import Endpoint
from loadgen.control.sglang import SGLang
from loadgen.discover import discover
from loadgen.engines import engines
from loadgen.probe import pages
from loadgen.scrape import Scraper
from tests.pages import endpoint
from tests.test_client import EVENTS, SSE, chunked, one
from traces.errors import EndpointError


def highest() -> int:
    """KiB of memory that this process has held at once."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextmanager
def within(mib: int) -> Iterator[None]:
    """The process grows by less. What another test made it hold is forgotten first, where the kernel can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = highest()
    yield
    assert highest() - before < mib * 1024


OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n"


@contextmanager
def speaking(what: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server on loopback that reads a request and then says what it is told to."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                one, _ = listening.accept()
            except OSError:
                return
            with contextlib.suppress(OSError), one:
                one.recv(65536)
                what(one)

    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    listening.close()


def repeat(head: bytes, piece: bytes, most: int = 1 << 30) -> Callable[[socket.socket], None]:
    """head, then piece after piece, up to a gigabyte."""

    def say(one: socket.socket) -> None:
        one.sendall(head)
        for _ in range(most // len(piece)):
            one.sendall(piece)

    return say


def drip(one: socket.socket) -> None:
    """A byte now and then, for ever."""
    one.sendall(OK + b"\r\n")
    while True:
        one.sendall(b"x")
        time.sleep(0.05)


def slowly(head: bytes, piece: bytes) -> Callable[[socket.socket], None]:
    """head, then a piece now and then, for half a minute at most."""

    def say(one: socket.socket) -> None:
        one.sendall(head)
        for _ in range(300):
            one.sendall(piece)
            time.sleep(0.1)

    return say


@pytest.mark.parametrize(
    "what",
    [
        repeat(OK + b"\r\n", b"vllm:x 1\n" * 8192),  # a metrics page of a gigabyte
        repeat(OK + b"\r\n", b"x" * 65536),  # one line without end
        repeat(OK + b"X: ", b"x" * 65536),  # one header without end
        repeat(OK, b"X-N: y\r\n" * 8192),  # headers without end
        repeat(b"", b"x" * 65536),  # not HTTP, without end
        drip,
        slowly(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),  # never an answer
        slowly(OK + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n", b"X: y\r\n"),  # trailers after the last piece
        slowly(OK, b"x"),  # a header, byte by byte
    ],
    ids=["metrics", "line", "header", "headers", "garbage", "drip", "continue", "trailers", "bytes"],
)
def test_an_endless_answer_ends_as_one_line(what: Callable[[socket.socket], None]) -> None:
    """Whatever a server goes on saying, asking it is over within its time, within 100 MiB, and says so on one line."""
    began = time.monotonic()
    with speaking(what) as url, within(100), pytest.raises(EndpointError) as caught:
        Endpoint(target(url)).fetch("GET", "/metrics", timeout_s=1.0)
    assert time.monotonic() - began < 15
    assert "\n" not in str(caught.value)


HEADERS = SSE.partition(b"\r\n")[0] + b"\r\n"
LAST = SSE + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(*EVENTS, end=False) + b"0\r\n"


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (b"HTTP/1.1 200 ", b"x" * 65536),
        (HEADERS + b"X: ", b"x" * 65536),
        (HEADERS, b"x" * 65536),  # the name of a header
        (HEADERS, b"X-N: y\r\n" * 8192),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 2048),
        (LAST, b"X-N: y\r\n" * 8192),
        (LAST + b"X: ", b"x" * 65536),
        (SSE + b"Transfer-Encoding: chunked\r\n\r\n5;", b"x" * 65536),
    ],
    ids=["reason", "header", "name", "headers", "continue", "trailers", "trailer", "extension"],
)
def test_headers_without_end_end_as_one_failed_request(head: bytes, piece: bytes) -> None:
    """Whatever a server says that is no body, under load it is heard for 256 KiB in a row and not for the request's time."""
    sent = 0

    async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _request: bytes) -> None:
        nonlocal sent
        writer.write(head)
        while sent < 1 << 30:
            writer.write(piece)
            await writer.drain()
            sent += len(piece)

    row = one(answer, timeout_s=15.0)
    assert (row.status, row.error) == ("failed", "malformed")
    assert "headers of more than" in row.detail
    assert sent < 64 << 20  # more than buffers of the kernel hold


@cache
def packed(plain: bytes) -> tuple[bytes, bytes]:
    """(head of a gzip stream, a piece of it that unpacks to 16 MiB of ``plain`` and may be repeated for ever)."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    piece = squeeze.compress(plain * ((16 << 20) // len(plain))) + squeeze.flush(zlib.Z_FULL_FLUSH)
    return b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\xff", piece


@pytest.mark.parametrize("status", ["200 OK", "500 Oops"])
@pytest.mark.parametrize(
    "plain", [b"\0", b"data: x", b'data: {"choices": [{"text": "a"}]}\n\n'], ids=["zeros", "line", "events"]
)
def test_a_bomb_in_a_gzip_answer_is_one_failed_request(plain: bytes, status: str) -> None:
    """A thousand times its size when unpacked, without end: the request fails within its time, in bounded memory."""
    head, piece = packed(plain)

    async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _request: bytes) -> None:
        said = f"HTTP/1.1 {status}\r\nContent-Type: text/event-stream\r\nContent-Encoding: gzip\r\n\r\n"
        writer.write(said.encode() + head)
        for _ in range(100_000):
            writer.write(piece)
            await writer.drain()

    began = time.monotonic()
    with within(150):
        row = one(answer, timeout_s=1.0)
    assert (row.status, "\n" in row.detail, len(row.detail) <= 200) == ("failed", False, True)
    assert time.monotonic() - began < 30


def test_a_packed_answer_is_read_to_its_end() -> None:
    """Ten MiB of events, packed: what does not fit into one piece follows, every event counts."""
    events = [b'data: {"choices": [{"text": "a"}], "x": "%d%s"}\n\n' % (k, b"y" * 400) for k in range(25_000)]
    body = gzip.compress(b"".join(events) + b"data: [DONE]\n\n", 9)
    assert len(body) > 60_000

    async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _request: bytes) -> None:
        said = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Encoding: gzip\r\n"
        writer.write(f"{said}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()

    row = one(answer)
    assert (row.status, row.chunks) == ("ok", 25_000)


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(4, id="count"),
        pytest.param("x", id="text"),
        pytest.param([{"metadata": 5}], id="metadata"),
        pytest.param([{"connection_mode": []}], id="mode"),
        pytest.param([{"url": "http://127.0.0.1:1", "worker_type": []}], id="role"),
        pytest.param([{"url": "http://[::1", "worker_type": role} for role in ("prefill", "decode")], id="url"),
    ],
)
def test_what_an_endpoint_lists_has_any_shape(said: Any) -> None:
    """Whatever stands where workers would be listed: who asks finds a worker or none, and reads what pages there are."""
    problems: set[str] = set()
    with endpoint(workers={"workers": said}) as served:
        server = Endpoint(target(served.url))
        for name in ("auto", *engines()):
            found = discover(server, engine=name)
            problems |= {page.problem for page in pages(server, found) if page.worker.url.startswith("http://[")}
            Scraper(server, 0.0, lambda _: None, workers=found.workers, engine=found.engine.name)
            served["/health"] = {"instances": said}  # from then on it would be Dynamo for all who ask
        with contextlib.suppress(EndpointError):
            SGLang(server, lambda url: Endpoint(target(url))).get()
    unread = "http://[::1/metrics: no URL. Correct it where the workers are listed."
    assert problems == ({unread} if "[::1" in str(said) else set())


def test_an_endpoint_that_lists_ten_thousand_workers_is_one_line() -> None:
    """None of them is asked anything."""
    listed = [{"url": f"http://127.0.0.1:1/{k}", "connection_mode": "Http"} for k in range(10_000)]
    with endpoint(workers={"workers": listed}) as served:
        with pytest.raises(EndpointError, match=r"it lists 10000 workers, .* --engine openai") as caught:
            discover(Endpoint(target(served.url)))
        assert discover(Endpoint(target(served.url)), engine="openai").workers == ()
    assert "\n" not in str(caught.value)


def test_a_redirect_takes_no_credentials_along() -> None:
    """Sent elsewhere, the client does not go: the other host never hears of it."""
    came: list[socket.socket] = []
    with speaking(came.append) as other:
        head = f"HTTP/1.1 302 Found\r\nLocation: {other}/v1/models\r\nContent-Length: 0\r\n\r\n".encode()
        with speaking(lambda one: one.sendall(head)) as url:
            reply = Endpoint(target(url, api_key="sk-planted")).fetch("GET", "/v1/models")
    assert reply.status == 302
    assert came == []
