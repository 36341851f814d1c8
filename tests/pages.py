"""A real HTTP server with pages that a test sets and changes, in a thread of its own."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

Page = str | bytes | dict[str, Any] | list[Any] | tuple[Any, ...] | Callable[["Ask"], Any]
"""Text, JSON, pieces that are streamed, (status, page), (seconds, page), (status, page, headers), or a function of the
question that gives one."""


class Ask:
    """What was asked."""

    def __init__(self, method: str, path: str, headers: dict[str, str], body: bytes) -> None:
        self.method, self.path, self.headers, self.body = method, path, headers, body

    def json(self) -> Any:
        return json.loads(self.body)


class Pages(dict[str, Page]):
    """Path -> page; a path that is not there is 404. A context manager; asked: every question that came."""

    def __init__(self, **pages: Page) -> None:
        super().__init__(pages)
        self.asked: list[Ask] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def answer(self) -> None:
                n = int(self.headers.get("Content-Length") or 0)
                ask = Ask(self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, self.rfile.read(n))
                outer.asked.append(ask)
                page: Any = outer.get(self.path.partition("?")[0])
                status, more = 200, {}
                while callable(page) or isinstance(page, tuple):
                    if callable(page):
                        page = page(ask)
                    elif isinstance(page[0], float):
                        time.sleep(page[0])
                        page = page[1]
                    else:
                        status, more = page[0], page[2] if len(page) > 2 else {}
                        page = page[1]
                if page is None:
                    status, page = 404, "not found"
                if isinstance(page, Iterator):
                    self.send_response(status)
                    self.send_header("Content-Type", "text/event-stream")
                    self.send_header("Transfer-Encoding", "chunked")
                    for name, value in more.items():
                        self.send_header(name, value)
                    self.end_headers()
                    with contextlib.suppress(OSError):
                        for piece in page:
                            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                            self.wfile.flush()
                        self.wfile.write(b"0\r\n\r\n")
                    return
                kind = "text/plain"
                if isinstance(page, (dict, list)):
                    kind, page = "application/json", json.dumps(page)
                body = page.encode() if isinstance(page, str) else page
                self.send_response(status)
                headers = {"Content-Type": kind, "Content-Length": str(len(body))} | more
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = do_PUT = do_DELETE = answer

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)


def event(value: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


def stream(
    ask: Ask, *, usage: bool = True, tokens: int | None = None, id: str = "cmpl-1", gap_s: float = 0.002, **last: Any
) -> Iterator[bytes]:
    """A streamed completion as vLLM shapes it; last: members of its last event."""
    asked = ask.json()
    n = asked["max_tokens"] if tokens is None else tokens
    for k in range(n):
        finish = "length" if k == n - 1 else None
        time.sleep(gap_s)
        yield event({"id": id, "choices": [{"index": 0, "text": " a", "finish_reason": finish}]})
    prompt = asked.get("prompt") or asked["messages"][0]["content"]
    counted = len(prompt if isinstance(prompt, list) else prompt.split())
    if usage:
        yield event({"id": id, "choices": [], "usage": {"prompt_tokens": counted, "completion_tokens": n}} | last)
    yield event(b"[DONE]")


def endpoint(owner: str = "someone", answer: Callable[[Ask], Any] = stream, **more: Page) -> Pages:
    """An OpenAI-shaped server with one model, m."""
    pages = Pages()
    pages["/v1/models"] = {"object": "list", "data": [{"id": "m", "owned_by": owner}]}
    pages["/v1/completions"] = answer
    pages.update({f"/{path.replace('__', '/')}": page for path, page in more.items()})
    return pages
