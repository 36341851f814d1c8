"""loadgen.arrivals: what came is stamped when it came, however late it is read."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable

import pytest
import uvloop

from loadgen.arrivals import LOOK, READ_BYTES, Arrivals
from loadgen.client import Client, Row, Target, _Connection
from loadgen.engines import Prompts, dialect

pytestmark = pytest.mark.skipif(not Arrivals.possible, reason="needs Linux's epoll")

TOKEN = b'data: {"choices":[{"text":"a","finish_reason":null}]}\n\n'
END = b'data: {"choices":[{"text":"b","finish_reason":"length"}]}\n\ndata: [DONE]\n\n'
HEAD = b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"


class Written:
    """A server on a thread of its own. Its answer is pieces (seconds before it, bytes); wrote: before and after writing each."""

    def __init__(self, *pieces: tuple[float, bytes], together: int = 1) -> None:
        self.wrote: list[tuple[float, float]] = []
        self._pieces = pieces
        self._all = threading.Barrier(together)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                one, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(one,), daemon=True).start()

    def _answer(self, one: socket.socket) -> None:
        with one:
            one.recv(1 << 16)
            self._all.wait(20)
            for wait, piece in self._pieces:
                time.sleep(wait)
                before = time.monotonic()
                one.sendall(piece)
                self.wrote.append((before, time.monotonic()))

    def close(self) -> None:
        self._listener.close()


def ask(server: Written, n: int = 1, meanwhile: Callable[[], None] = lambda: None) -> list[Row]:
    """``n`` requests at once, on uvloop as in a worker; ``meanwhile`` keeps the loop from everything else, 20 ms in."""
    rows: list[Row] = []

    async def main() -> None:
        kind = dialect("openai")
        client = Client(
            Target("http", "127.0.0.1", server.port), kind.path, Prompts(kind, "m", 100, 1), rows.append, timeout_s=20
        )
        asyncio.get_running_loop().call_later(0.02, meanwhile)
        await client.run(range(n), [0.0] * n, [5] * n, [2] * n, time.monotonic())
        await client.close()

    uvloop.run(main())
    server.close()
    return rows


def test_a_client_that_stood_still_has_measured_right() -> None:
    server = Written((0.1, HEAD + TOKEN), (0.4, END))
    (row,) = ask(server, meanwhile=lambda: time.sleep(0.3))
    (before, after), (last_before, last_after) = server.wrote
    assert row.status == "ok"
    assert before - 1e-3 <= row.first_token <= after + 0.05  # the loop got to it 200 ms later
    assert before - 1e-3 <= row.first_byte <= after + 0.05
    assert last_before - 1e-3 <= row.last_token <= last_after + 0.05


def test_a_wall_clock_that_was_set_spoils_no_stamp(monkeypatch: pytest.MonkeyPatch) -> None:
    true = time.time
    server = Written((0.05, HEAD + TOKEN), (0.05, END))
    monkeypatch.setattr("loadgen.arrivals.time.time", lambda: true() - 3600)
    (row,) = ask(server)
    assert row.status == "ok"
    assert server.wrote[0][0] - 1e-3 <= row.first_token <= row.last_token <= row.ended


def test_bytes_that_come_with_the_end_are_all_read() -> None:
    answer = HEAD + TOKEN * (20 * READ_BYTES // len(TOKEN)) + END
    (row,) = ask(Written((0.0, answer)))
    assert (row.status, row.chunks, row.body_bytes) == ("ok", answer.count(b'"text"'), len(answer) - len(HEAD))


def test_more_connections_than_a_look_takes_are_all_read() -> None:
    n = LOOK + 44
    rows = ask(Written((0.0, HEAD + TOKEN + END), together=n), n)
    assert [(row.status, row.chunks) for row in rows] == [("ok", 2)] * n


def test_an_answer_that_breaks_its_reader_breaks_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _Connection.take

    def take(self: _Connection, data: bytes, at: float) -> None:
        if self.flight is not None and self.flight.position == 1:
            raise RuntimeError("a bug")
        whole(self, data, at)

    monkeypatch.setattr(_Connection, "take", take)
    rows = sorted(ask(Written((0.0, HEAD + TOKEN), (0.01, END), together=3), 3))
    assert [(row.status, row.detail) for row in rows] == [
        ("ok", ""),
        ("failed", "the answer cannot be read: RuntimeError"),
        ("ok", ""),
    ]
