"""The load client: sends requests at absolute due times and stamps bytes when they arrive.

One asyncio loop (uvloop), one :class:`asyncio.Protocol` a connection, httptools for HTTP framing. No request waits
for another's answer: the sender looks only at the clock. Bytes are stamped in ``data_received`` and read when the
answer has ended (:mod:`loadgen.stream`); a Python wake-up for every token is what makes other clients late.

*Sent* is the moment the client turned to the network for a request: when it wrote to a kept connection, or, where
none was free, when it began to connect.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ctypes
import errno
import gc
import heapq
import html
import json
import math
import os
import re
import socket
import ssl
import struct
import time
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, urlsplit

import httptools

from loadgen import engines
from loadgen.engines import Prompts
from loadgen.stream import FOLD_BYTES, SECRET_CHARS, Answer, masked, printable
from traces.errors import InputError

TIMEOUT_S = 600.0
"""Default time a request may take from sent to its end."""

IDLE_S = 4.0
"""A kept connection that lay idle this long is not used again: many servers close theirs after five seconds, and a
request written into a closing connection would look like a failure of the server."""

FROZEN_S = 4.0
"""A loop that stood still for longer sends no more: its master hears no heartbeat, and takes its requests for lost. A second less
than any master waits (loadgen.swarm.HEARTBEATS), so that nobody sends who is no longer listened to."""

FLEET_S = 5.0
"""A fleet that a batch asks for is put in force within this time, or the batch begins with the one that is."""

BURST = 32
"""Requests sent in a row before arrived bytes get their turn."""

SLICE_BYTES = 1 << 20
"""Of a packed answer that are unpacked at once."""

FREE_BYTES, MOST_RATIO = 8 << 20, 200
"""A packed answer that unpacks to more than these bytes, and to more than so many times its own, is a bomb: streams of tokens
unpack to ten or thirty times."""

_OURS = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL}
"""Errors of connecting that are this machine's: out of file handles, memory or ports."""

MAX_HEADER_BYTES = 256 * 1024
"""In a row that bring nothing of a body: headers, interim answers, trailers. The parser keeps a header until it is whole."""

_NO_SECRETS = {
    "accept",
    "accept-encoding",
    "accept-language",
    "connection",
    "content-type",
    "host",
    "user-agent",
    "x-request-id",
}
"""Headers whose values anybody may read."""

_SECRET_NAME = re.compile("auth|bearer|cookie|credential|jwt|key|pass|pwd|secret|session|sign|token")
"""What the name of a header that holds a secret says."""

_SECRET_VALUE = re.compile(r"(?=.*[0-9])(?=.*[A-Za-z]).{16}")
"""What that of another header looks like, where its name does not say that it is a model's. Other words (a stage, a pool) stand
in any text: without them a message says nothing."""

_SCHEMES = {"apikey", "basic", "bearer", "key", "negotiate", "token"}

FOLD_PIECES = 96
"""Pieces of an answer kept unread at most."""


def _sizes_of_pieces(longest: int) -> list[bytes]:
    """What a piece of so many bytes begins with if it is one whole chunk of HTTP's chunked coding, the usual way to write it."""
    never = bytes(longest + 1)
    found = [never] * (longest + 1)
    for n in range(1, longest):
        size = b"%x\r\n" % n
        whole = len(size) + n + 2
        if whole <= longest:
            found[whole] = size
    return found


_MOST_CHUNK = 2048
_SIZES = _sizes_of_pieces(_MOST_CHUNK)


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go. headers hold credentials: a Target is never stored, printed or logged.

    cert_file, key_file: PEM files by which the client shows itself (mutual TLS). proxy: (host, port) of an HTTP proxy;
    proxy_auth: its Proxy-Authorization, or "".
    """

    scheme: str
    host: str
    port: int
    prefix: str = ""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    ca_file: str = ""
    insecure: bool = False
    cert_file: str = ""
    key_file: str = ""
    proxy: tuple[str, int] | None = None
    proxy_auth: str = field(default="", repr=False)

    @property
    def netloc(self) -> str:
        """HOST:PORT as a request names it."""
        return f"{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    @property
    def shown(self) -> str:
        """The URL without anything secret."""
        return f"{self.scheme}://{self.netloc}{self.prefix}"

    def secrets(self) -> tuple[str, ...]:
        """What a server is told and may quote, the longest first: values of headers by whose name or looks they are secret, of
        Basic ones user and password too; each as it is and as JSON, HTML and URLs write it."""
        found: set[str] = set()
        for given, value in (*self.headers.items(), ("Proxy-Authorization", self.proxy_auth)):
            name = given.lower()
            if name in _NO_SECRETS:
                continue
            scheme, _, rest = value.strip().partition(" ")
            token = rest.strip() if scheme.lower() in _SCHEMES else value.strip()
            named = _SECRET_NAME.search(name) or token != value.strip()
            if not (named or ("model" not in name and _SECRET_VALUE.match(token))):
                continue
            found.add(token)
            if name == "cookie":
                found |= {one.partition("=")[2].strip() for one in token.split(";")}
            if scheme.lower() == "basic":
                with contextlib.suppress(ValueError):
                    pair = base64.b64decode(token).decode("utf-8", "replace")
                    found |= {pair, *pair.split(":", 1)}
        for one in tuple(found):
            quoted = json.dumps(one)[1:-1]
            found |= {quoted, quoted.replace("/", "\\/"), html.escape(one), quote(one, safe="")}
        return tuple(sorted((one for one in found if len(one) >= SECRET_CHARS), key=lambda one: (-len(one), one)))

    def tls(self) -> ssl.SSLContext | None:
        """The TLS context, or None for plain HTTP."""
        if self.scheme != "https":
            return None
        context = ssl.create_default_context(cafile=self.ca_file or None)
        if self.insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if self.cert_file:
            context.load_cert_chain(self.cert_file, self.key_file or None, password=_no_password)
        return context

    def headers_with(self, own: Mapping[str, str]) -> dict[str, str]:
        """The given headers, and of our own those that were not given: none may come twice."""
        given = {name.lower() for name in self.headers}
        return {name: value for name, value in own.items() if name.lower() not in given} | dict(self.headers)

    def head(self, path: str, key: str) -> bytes:
        """Request line and headers, up to the request's number: ``X-Request-Id: key-`` joins rows to a server's log."""
        proxied = self.proxy is not None and self.scheme == "http"
        own = {
            "Host": self.netloc,
            **({"Proxy-Authorization": self.proxy_auth} if proxied and self.proxy_auth else {}),
            "Content-Type": "application/json",
            "Accept": "text/event-stream",
            "Accept-Encoding": "identity",
        }
        lines = [
            f"POST {f'http://{self.netloc}' if proxied else ''}{self.prefix}{path} HTTP/1.1",
            *(f"{name}: {value}" for name, value in self.headers_with(own).items() if name.lower() != "x-request-id"),
            f"X-Request-Id: {key}-",
        ]
        return "\r\n".join(lines).encode("latin-1")


def _no_password() -> str:
    raise InputError("the key of --cert is encrypted. Give one that is not: openssl pkey -in KEY -out PLAIN")


def _basic(user: str, password: str | None) -> str:
    return "Basic " + base64.b64encode(f"{unquote(user)}:{unquote(password or '')}".encode()).decode()


def unsaid(url: str) -> str:
    """What is or should be a URL, for messages and rows: without what may be a user, password or token, also where the scheme is
    missing. Of one with a blank nobody could say where its password ends: *** stands for all of it."""
    from traces.store import redact

    whole = re.sub(r"(?s)(?<=:)//\S*\s.*", "//***", url.strip())
    return printable(re.sub(r"(?s)^.*:.*@", "", redact(whole)))


def named_url(url: str, what: str) -> str:
    """A worker's URL as a file names it. InputError begins with what."""
    try:
        target(url)
    except InputError:
        raise InputError(f"{what} must be an http or https URL (got {unsaid(url)!r}).") from None
    if re.search(r"\s", url):
        raise InputError(f"{what} must be a URL without blanks. Write %20 for one.")
    return url


def target(
    url: str,
    *,
    api_key: str | None = None,
    headers: Mapping[str, str] | None = None,
    ca_file: str = "",
    insecure: bool = False,
    cert_file: str = "",
    key_file: str = "",
    proxy: str = "",
) -> Target:
    """Read a base URL such as http://127.0.0.1:8000 or https://host/prefix. InputError says what is wrong.

    A user and password in the URL (also in that of the proxy) become a Basic header, unless there is a key, or a header that
    says who asks: the most explicit one counts, and is sent alone. A trailing /v1 is understood. The TLS
    files are read once, so that a wrong one is an InputError here.
    """
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        host = (parts.hostname or "").encode("idna").decode()  # as the name server is asked, where it would raise
    except ValueError:
        raise InputError("endpoint URL cannot be read. Give a base URL such as http://127.0.0.1:8000.") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(
            f"endpoint must be an http or https URL (got {unsaid(url)!r}). Give a base URL such as http://127.0.0.1:8000."
        )
    wanted = dict(headers or {})
    if "authorization" not in {name.lower() for name in wanted}:
        if api_key:
            wanted["Authorization"] = f"Bearer {api_key}"
        elif parts.username is not None:
            wanted["Authorization"] = _basic(parts.username, parts.password)
    for name, value in wanted.items():
        if not (name + value).isascii() or any(c in name + value for c in "\r\n"):
            raise InputError(f"header {printable(name)!r} holds a character that HTTP does not allow.")
    prefix = quote(parts.path.rstrip("/").removesuffix("/v1"), safe="/%!$&'()*+,;=:@~")
    through, proxy_auth = None, ""
    if proxy:
        try:
            by = urlsplit(proxy)
            through = (by.hostname or "", by.port or 3128)
            through[0].encode("idna")
        except ValueError:
            by = urlsplit("")
        if by.scheme != "http" or not by.hostname:
            raise InputError("--proxy must be an http URL such as http://127.0.0.1:3128.")
        proxy_auth = _basic(by.username, by.password) if by.username is not None else ""
    if (cert_file or ca_file) and parts.scheme != "https":
        raise InputError("--ca-file and --cert belong to an https endpoint.")
    if key_file and not cert_file:
        raise InputError("--key belongs to --cert FILE.")
    made = Target(
        parts.scheme,
        host,
        port,
        prefix,
        wanted,
        str(Path(ca_file).resolve()) if ca_file else "",
        insecure=insecure,
        cert_file=str(Path(cert_file).resolve()) if cert_file else "",
        key_file=str(Path(key_file).resolve()) if key_file else "",
        proxy=through,
        proxy_auth=proxy_auth,
    )
    _tls(made)
    return made


def _tls(where: Target) -> ssl.SSLContext | None:
    """Its TLS context; InputError with its files, when they cannot be used by who reads them."""
    try:
        return where.tls()
    except OSError as error:
        words = getattr(error, "reason", None) or error.strerror or error
        files = ", ".join(filter(None, (where.ca_file, where.cert_file, where.key_file)))
        raise InputError(f"--ca-file, --cert or --key: {files} cannot be used ({words}). Give PEM files.") from None


class Row(NamedTuple):
    """What came of one request; ``position`` is its place in the schedule. Times are the clock's, NaN if never."""

    position: int
    sent: float
    first_byte: float
    first_token: float
    last_token: float
    ended: float
    prompt_tokens: int
    output_tokens: int
    chunks: int
    max_gap: float
    http_status: int
    status: str
    error: str
    detail: str
    body_bytes: int
    dispatch: float = math.nan
    """When a gate or the answer before it let it go; NaN in an open loop, where due is the time to send."""
    facts: Mapping[str, Any] | None = None
    """What the server said of how it served the request (:meth:`loadgen.engines.Engine.facts`)."""


class _Flight:
    """A request that is under way."""

    __slots__ = (
        "answer",
        "body",
        "body_bytes",
        "connection",
        "dispatch",
        "first_byte",
        "headers",
        "http_status",
        "position",
        "sent",
        "task",
    )

    def __init__(
        self,
        position: int,
        sent: float,
        body: bytes | None,
        keep: tuple[str, ...] = (),
        secrets: tuple[str, ...] = (),
    ) -> None:
        self.position = position
        self.sent = sent
        self.body = body
        self.first_byte = math.nan
        self.dispatch = math.nan
        self.http_status = 0
        self.answer = Answer(keep, secrets)
        self.headers: dict[str, str] = {}
        self.body_bytes = 0
        self.connection: _Connection | None = None
        self.task: asyncio.Task[None] | None = None


class _Route:
    """One of the base URLs: what a request to it begins with, what of that nobody may read, its kept connections, its address."""

    __slots__ = ("address", "head", "idle", "secrets", "tls", "where")

    def __init__(self, where: Target, path: str, key: str) -> None:
        self.where = where
        self.head = where.head(path, key)
        self.secrets = where.secrets()
        self.tls = _tls(where)
        self.address: tuple[str, int] | None = None
        self.idle: list[_Connection] = []


class _Connection(asyncio.Protocol):
    """One connection, used by one request after another."""

    __slots__ = (
        "at",
        "between",
        "client",
        "clock",
        "complete",
        "content_type",
        "encoding",
        "flight",
        "framed",
        "header_bytes",
        "inflate",
        "keep",
        "on_body",
        "packed",
        "parser",
        "parts",
        "route",
        "stamps",
        "transport",
    )

    def __init__(self, client: Client, route: _Route) -> None:
        self.client = client
        self.route = route
        self.transport: asyncio.Transport | None = None
        self.parser: Any = None
        self.flight: _Flight | None = None
        self.clock = client.clock
        self.at = client.clock()
        self.parts: list[bytes] = []
        self.stamps: list[float] = []
        self.reset()

    def reset(self) -> None:
        """Forget the last answer."""
        self.content_type = b""
        self.encoding = b""
        self.framed = False
        self.inflate: Any = None
        self.packed = 0
        self.complete = False
        self.keep = False
        self.between = False

    # --- asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")  # noqa: S101 - for the type checker
        self.transport = transport  # type: ignore[assignment]
        self.client._open.add(self)

    def data_received(self, data: bytes) -> None:
        at = self.clock()
        # Nearly every piece is one whole chunk, one event. Between two chunks such a piece leaves the parser where it is.
        if self.between and (n := len(data)) <= _MOST_CHUNK:
            size = _SIZES[n]
            if data.startswith(size) and data.endswith(b"\r\n"):
                stamps = self.stamps
                self.parts.append(data[len(size) : -2])
                stamps.append(at)
                if len(stamps) > FOLD_PIECES and self.flight is not None:
                    self.digest(self.flight)
                return
        self.at = at
        flight = self.flight
        if flight is None:  # a server that speaks unasked, or goes on after the end
            self.close()
            return
        if flight.first_byte != flight.first_byte:  # still NaN
            flight.first_byte = at
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError as error:
            if self.flight is flight and not self.complete:
                self.client._end(flight, "failed", "malformed", f"HTTP: {error or type(error).__name__}")
            self.close()
            return
        except httptools.HttpParserUpgrade:
            self.client._end(flight, "failed", "malformed", "HTTP: the server switched protocols")
            self.close()
            return
        if not data.endswith(b"\r\n"):
            self.between = False
        stamps = self.stamps
        k = len(self.parts) - len(stamps)
        if k:
            stamps.extend([at] * k)
            self.header_bytes = 0
            if len(stamps) > FOLD_PIECES or len(data) > FOLD_BYTES:
                self.digest(flight)
        else:
            self.header_bytes += len(data)
        if self.complete:
            self.client._answered(flight, self, whole=True)
            if self.keep:
                self.client._release(self)
            else:
                self.close()
        elif self.header_bytes > MAX_HEADER_BYTES:
            self.client._end(flight, "failed", "malformed", f"HTTP: headers of more than {MAX_HEADER_BYTES} bytes")
            self.close()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.client._open.discard(self)
        flight, self.flight = self.flight, None
        if flight is not None:
            self.client._lost(flight, self, exc)
        self.transport = None
        self.parser = None

    # --- httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"content-type":
            self.content_type = value
        elif name == b"content-encoding":
            self.encoding = value.strip().lower()
        elif name in (b"content-length", b"transfer-encoding"):
            self.framed = True
        elif name in self.client.fact_headers and self.flight is not None:
            self.flight.headers[name.decode("latin-1")] = printable(value.decode("latin-1"), self.route.secrets)

    def on_headers_complete(self) -> None:
        flight = self.flight
        if flight is None:
            return
        flight.http_status = self.parser.get_status_code()
        if self.encoding in (b"gzip", b"x-gzip", b"deflate"):
            self.inflate, self.packed = zlib.decompressobj(47 if self.encoding != b"deflate" else 15), 0
        elif self.encoding not in (b"", b"identity") and not flight.answer.error:
            flight.answer.error = "malformed"
            words = f"Content-Encoding {self.encoding.decode('latin-1')} was not asked for"
            flight.answer.detail = printable(words, self.route.secrets)

    def on_chunk_header(self) -> None:
        self.between = False

    def on_chunk_complete(self) -> None:
        self.between = True

    def on_message_complete(self) -> None:
        if self.flight is not None and self.flight.http_status >= 200:
            self.complete = True
            self.keep = self.parser.should_keep_alive()  # afterwards the parser has forgotten
        else:
            self.reset()  # 100 Continue and its like

    def digest(self, flight: _Flight) -> None:
        """Read what has gathered: undo the encoding, see whether it is a stream at all, hand it on."""
        answer = flight.answer
        parts = answer.parts
        if not parts:
            return
        if len(parts) > len(answer.stamps):  # the parser raised before they were stamped
            answer.stamps.extend([self.at] * (len(parts) - len(answer.stamps)))
        if self.inflate is None:
            self._take(flight)
            return
        packed = list(zip(parts, answer.stamps, strict=False))
        parts.clear()
        answer.stamps.clear()
        for piece, at in packed:
            while piece and not answer.error:
                try:
                    plain = self.inflate.decompress(piece, SLICE_BYTES)
                except zlib.error as error:
                    answer.error, answer.detail = "malformed", printable(f"Content-Encoding: {error}")
                    break
                self.packed += len(piece) - len(self.inflate.unconsumed_tail)
                piece = self.inflate.unconsumed_tail
                parts.append(plain)
                answer.stamps.append(at)
                self._take(flight)
                if flight.body_bytes > max(FREE_BYTES, MOST_RATIO * self.packed) and not answer.error:
                    answer.error, answer.detail = "malformed", f"unpacks to more than {MOST_RATIO} times its size"

    def _take(self, flight: _Flight) -> None:
        """See at the first bytes whether it is a stream at all, hand what there is on."""
        answer = flight.answer
        parts = answer.parts
        if not flight.body_bytes:
            self._look(answer, b"".join(parts)[:2000], flight.http_status)
        flight.body_bytes += sum(map(len, parts))
        if flight.http_status // 100 == 2:
            answer.fold()
        else:
            parts.clear()
            answer.stamps.clear()

    def _look(self, answer: Answer, start: bytes, status: int) -> None:
        """Is this an event stream? Decided at its first bytes, so that a page is not read as a stream."""
        if answer.error:
            return
        if status // 100 != 2:
            answer.detail = printable(start.decode("utf-8", "replace"), self.route.secrets)
            return
        told = self.content_type.lower()
        if told.startswith(b"text/event-stream"):
            return
        if start.lstrip(b"\xef\xbb\xbf \r\n\t").startswith((b"data:", b"event:", b":", b"id:", b"retry:")):
            return
        kind = (self.content_type or b"no content type").decode("latin-1").split(";")[0]
        answer.error = "stream_error" if b'"error"' in start and b"json" in told else "malformed"
        words = f"not an event stream but {kind}: {start.decode('utf-8', 'replace')}"
        answer.detail = printable(words, self.route.secrets)

    # --- use

    def start(self, flight: _Flight, head: bytes, body: bytes) -> None:
        """Write a request."""
        self.reset()
        self.header_bytes = 0
        # The parser puts body pieces straight into the answer's list: no Python runs for a token but data_received.
        self.parts, self.stamps = flight.answer.parts, flight.answer.stamps
        self.on_body = self.parts.append
        self.parser = httptools.HttpResponseParser(self)
        self.flight = flight
        flight.connection = self
        assert self.transport is not None  # noqa: S101 - only live connections are handed out
        self.transport.write(b"%s%d\r\nContent-Length: %d\r\n\r\n%s" % (head, flight.position, len(body), body))

    def close(self) -> None:
        """Give the connection up."""
        if self.transport is not None:
            self.transport.abort()


class Alarm:
    """Calls back at an absolute time of CLOCK_MONOTONIC, to the microsecond.

    uvloop's own timers count whole milliseconds: alone they put a median of 1 ms on every send. A timerfd does not.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
        self._loop = loop
        self._callback = callback
        self._handle: asyncio.TimerHandle | None = None
        self._fd = -1
        self._set: Any = None
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None, use_errno=True)
            self._set = libc.timerfd_settime
            self._fd = libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd >= 0:
            loop.add_reader(self._fd, self._rang)

    def at(self, when: float) -> None:
        """Ring at ``when`` (seconds of the monotonic clock); a new time replaces the old."""
        if self._fd >= 0:
            nanoseconds = max(1, int(when * 1e9))
            spec = struct.pack("qqqq", 0, 0, nanoseconds // 1_000_000_000, nanoseconds % 1_000_000_000)
            self._set(self._fd, 1, spec, None)
            return
        if self._handle is not None:
            self._handle.cancel()
        self._handle = self._loop.call_later(max(0.0, when - time.monotonic()), self._callback)

    def _rang(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._fd, 8)
        self._callback()

    def close(self) -> None:
        """Ring no more."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
        if self._handle is not None:
            self._handle.cancel()


@dataclass(frozen=True)
class Gate:
    """The client's own order: requests leave in the order given, batch after batch, not at their due times.

    sizes: requests a batch. fleets: body for ``PUT /fleet`` at a batch's beginning, or None. start_s: when the first may
    begin. in_flight: most requests at once (0: a whole batch).
    """

    sizes: Sequence[int]
    fleets: Sequence[str | None]
    start_s: float = 0.0
    in_flight: int = 0


@dataclass(frozen=True)
class Turns:
    """Requests that wait for an answer: ``--sessions causal``.

    parent: for each request of the shard the position of the one whose answer it waits for, -1 for none. think_s: seconds
    after that answer's end; NaN: at the recorded distance from the parent's sending, but not before its answer has ended.
    """

    parent: Sequence[int]
    think_s: Sequence[float]


class Client:
    """Sends one shard of a schedule. Lives in one event loop; ``done`` is called there with each finished row."""

    def __init__(
        self,
        where: Target | Sequence[Target],
        path: str,
        prompts: Prompts,
        done: Callable[[Row], None],
        *,
        timeout_s: float = TIMEOUT_S,
        idle_s: float = IDLE_S,
        clock: Callable[[], float] = time.monotonic,
        engine: engines.Engine | None = None,
    ) -> None:
        self.clock = clock
        self._engine = engine
        self._keep = engine.keep if engine is not None else ()
        self.fact_headers = (
            frozenset(h.encode("latin-1") for h in engine.headers) if engine is not None else frozenset()
        )
        self.max_stall_s = 0.0
        self._beat = clock()
        self._woke = -math.inf
        """When the loop last went on after it had stood still too long."""
        self._beats: asyncio.Task[None] | None = None
        targets = [where] if isinstance(where, Target) else list(where)
        self._routes = [_Route(one, path, prompts.key) for one in targets]
        self._prompts = prompts
        self._done = done
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._open: set[_Connection] = set()
        self._flights: dict[int, _Flight] = {}
        self._positions: Sequence[int] = ()
        self._due: Sequence[float] = ()
        self._sizes: tuple[Sequence[int], Sequence[int]] = ((), ())
        self._next = 0
        self._zero = 0.0
        self._ended: asyncio.Future[None] | None = None
        self._closing = False
        self._gate: Gate | None = None
        self._more = False
        self._turns: Turns | None = None
        self._children: dict[int, list[int]] = {}
        self._released_turns: list[tuple[float, int]] = []  # heap of (when, row) whose answers have come
        self._batch, self._batch_end, self._released = -1, 0, 0.0
        self._asking: asyncio.Task[None] | None = None
        self._idle_s = idle_s
        self._spare: asyncio.Task[None] | None = None

    async def warm(self, first: Sequence[int]) -> None:
        """Open a connection for each of these requests, so that they do not pay for it. A refusal is left to them. From now on
        it is known whether the loop stands still: the start may come while it does."""
        self._beats = self._loop.create_task(self._wait())

        async def one(route: _Route) -> None:  # kept as soon as it stands: the others may take too long
            route.idle.append(await self._connect(route))

        wanted = [one(self._routes[position % len(self._routes)]) for position in first]
        await asyncio.gather(*wanted, return_exceptions=True)

    async def run(
        self,
        positions: Sequence[int],
        due: Sequence[float],
        prompt_tokens: Sequence[int],
        output_tokens: Sequence[int],
        zero: float,
        gate: Gate | None = None,
        turns: Turns | None = None,
        more: bool = False,
    ) -> None:
        """Send every request at ``zero + due`` and return when each has ended. Requests must be in order of due.

        gate: they leave in the order given, batch after batch, instead. turns: those with a parent wait for its answer.
        more: further requests come by :meth:`extend`.
        """
        if self._beats is not None:
            self._beats.cancel()
        self._alive()
        self._more = more
        self._turns, self._children, self._released_turns = turns, {}, []
        if turns is not None:
            self._due_of = dict(zip(positions, due, strict=True))
            for i, parent in enumerate(turns.parent):
                if parent >= 0:
                    self._children.setdefault(parent, []).append(i)
        self._gate, self._batch, self._batch_end, self._released = gate, -1, 0, zero
        self._positions, self._due, self._sizes = positions, due, (prompt_tokens, output_tokens)
        self._zero, self._next = zero, 0
        self._ended = self._loop.create_future()
        self._alarm = Alarm(self._loop, self._tick)
        watch = self._loop.create_task(self._watch())
        if self._woke > zero:
            self.stop(f"the load worker stood still until {self._woke - zero:.1f} s after the start")
        try:
            self._tick()
            self._check()
            await self._ended
        finally:
            watch.cancel()
            self._alarm.close()

    def extend(
        self,
        positions: Sequence[int],
        due: Sequence[float],
        prompt_tokens: Sequence[int],
        output_tokens: Sequence[int],
        last: bool,
    ) -> None:
        """Requests due after those that are there; last: none come after them. What was sent is forgotten."""
        if not self._more:
            for p in positions:
                self._never(p, "stopped")
            return
        at = self._next
        self._positions, self._due = [*self._positions[at:], *positions], [*self._due[at:], *due]
        self._sizes = [*self._sizes[0][at:], *prompt_tokens], [*self._sizes[1][at:], *output_tokens]
        self._next, self._more = 0, not last
        self._tick()
        self._check()

    def stop(self, why: str = "stopped") -> None:
        """Send no more; what was not sent becomes ``unsent``. What is in flight goes on."""
        first, self._next = self._next, len(self._due)
        self._more = False
        never = [i for i in range(first, len(self._due)) if self._is_root(i)]
        never += [i for held in self._children.values() for i in held]
        never += [i for _, i in self._released_turns]
        self._children, self._released_turns = {}, []
        for i in never:
            self._never(self._positions[i], why)
        self._check()

    def _never(self, position: int, why: str) -> None:
        nan = math.nan
        self._done(Row(position, nan, nan, nan, nan, nan, -1, -1, 0, 0.0, 0, "unsent", "", why, 0))

    def cancel(self) -> None:
        """Give up what is in flight: ``cancelled``, with what was measured so far."""
        for flight in list(self._flights.values()):
            self._end(flight, "cancelled", "", "stopped while in flight")
            self._drop(flight)

    async def close(self) -> None:
        """Send no more, give up what is in flight, close every connection."""
        self.stop()
        self.cancel()
        self._closing = True
        if self._beats is not None:
            self._beats.cancel()
        for route in self._routes:
            route.idle.clear()
        for connection in list(self._open):
            connection.close()
        await asyncio.sleep(0)

    @property
    def in_flight(self) -> int:
        """Requests sent and not ended."""
        return len(self._flights)

    # --- sending

    def _alive(self) -> float:
        """The clock; whoever comes first after the loop stood still too long sees to it that no more is sent."""
        now = self.clock()
        before, self._beat = self._beat, now
        if now - before > FROZEN_S:
            self._woke = now
            self.stop(f"the load worker stood still for {now - before:.1f} s")
        return now

    def _tick(self) -> None:
        self._alive()
        if self._gate is not None:
            self._gated(self._gate)
            return
        if self._turns is not None:
            self._turned()
            return
        due, n = self._due, len(self._due)
        for _ in range(BURST):
            if self._next >= n:
                return
            when = self._zero + due[self._next]
            if when > self.clock():
                self._alarm.at(when)
                return
            i = self._next
            self._next += 1
            self._send(i)
        self._loop.call_soon(self._tick)

    def _is_root(self, i: int) -> bool:
        """Nothing has to be answered before this request."""
        return self._turns is None or self._turns.parent[i] < 0

    def _turned(self) -> None:
        """Send what is due by the clock or by an answer, the earlier first."""
        due, n, heap = self._due, len(self._due), self._released_turns
        for _ in range(BURST):
            while self._next < n and not self._is_root(self._next):
                self._next += 1
            by_clock = self._zero + due[self._next] if self._next < n else math.inf
            by_answer = heap[0][0] if heap else math.inf
            when = min(by_clock, by_answer)
            if when > self.clock():
                if when < math.inf:
                    self._alarm.at(when)
                else:
                    self._check()
                return
            if by_answer <= by_clock:
                self._send(heapq.heappop(heap)[1], by_answer)
            else:
                self._next += 1
                self._send(self._next - 1)
        self._loop.call_soon(self._tick)

    def _answer_came(self, turns: Turns, flight: _Flight) -> None:
        """An answer has ended, well or not: the turns that waited for it have their time now."""
        now = self.clock()
        for i in self._children.pop(flight.position, ()):
            think = turns.think_s[i]
            gap = self._due[i] - self._due_of[flight.position]
            when = now + think if think == think else max(now, flight.sent + gap)
            heapq.heappush(self._released_turns, (when, i))
        self._loop.call_soon(self._tick)

    def _gated(self, gate: Gate) -> None:
        """Send what the batch and the limit of requests in flight allow; called at the start and when a request ends."""
        now = self.clock()
        if self._batch < 0 and now < self._zero + gate.start_s:
            self._alarm.at(self._zero + gate.start_s)
            return
        while self._next < len(self._due):
            if self._next >= self._batch_end:
                if self._flights or self._asking is not None:
                    return  # the batch before is not over, or the fleet of the next is being asked for
                self._batch += 1
                self._batch_end += gate.sizes[self._batch]
                body = gate.fleets[self._batch]
                if body is not None:
                    self._asking = self._loop.create_task(self._ask(body.encode()))
                    return
                self._released = self.clock()
            if self._asking is not None or (gate.in_flight and len(self._flights) >= gate.in_flight):
                return
            i = self._next
            self._next += 1
            self._send(i)

    async def _ask(self, body: bytes) -> None:
        """Put a fleet in force before a batch. A server that does not answer leaves the roles as they are."""
        where = self._routes[0].where
        own = {"Host": where.netloc, "Connection": "close", "Content-Type": "application/json"}
        lines = [f"PUT {where.prefix}/fleet HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in where.headers_with(own).items()]
        lines += [f"Content-Length: {len(body)}", "", ""]
        name = where.host if where.scheme == "https" else None
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(FLEET_S):
                reader, writer = await asyncio.open_connection(
                    where.host, where.port, ssl=where.tls(), server_hostname=name
                )
                with contextlib.closing(writer):
                    writer.write("\r\n".join(lines).encode("latin-1") + body)
                    await reader.read(65536)
        self._asking = None
        self._released = self.clock()
        self._tick()

    def _send(self, i: int, dispatch: float = math.nan) -> None:
        if self._gate is not None:
            dispatch = self._released
        position = self._positions[i]
        body = self._prompts.body(position, self._sizes[0][i], self._sizes[1][i])
        routes = self._routes
        route = routes[0] if len(routes) == 1 else routes[position % len(routes)]
        idle = route.idle
        while idle:
            connection = idle.pop()
            if self.clock() - connection.at > self._idle_s:  # nobody came to close it: this loop stood still
                connection.close()
            elif connection.transport is not None and not connection.transport.is_closing():
                flight = _Flight(position, self.clock(), None, self._keep, route.secrets)
                flight.dispatch = dispatch
                self._flights[position] = flight
                connection.start(flight, route.head, body)
                return
        flight = _Flight(position, self.clock(), body, self._keep, route.secrets)
        flight.dispatch = dispatch
        self._flights[position] = flight
        flight.task = self._loop.create_task(self._send_fresh(flight, route))

    async def _send_fresh(self, flight: _Flight, route: _Route) -> None:
        try:
            connection = await self._connect(route)
        except OSError as error:
            if error.errno in _OURS:
                # This machine could not send it: no failure of the server, and a run that must not be trusted.
                flight.sent = math.nan
                self._end(flight, "unsent", "", f"this worker could not connect: {error.strerror}")
                return
            kind, detail = _connect_error(error)
            self._end(flight, "failed", kind, detail)
            return
        flight.task = None
        if flight.position not in self._flights or self._flights[flight.position] is not flight:
            self._release(connection)  # given up meanwhile
            return
        body, flight.body = flight.body, None
        assert body is not None  # noqa: S101 - kept until sent
        connection.start(flight, route.head, body)

    async def _connect(self, route: _Route) -> _Connection:
        if route.address is None:
            # Resolved once: a name server must not be part of a latency.
            host, port = route.where.proxy or (route.where.host, route.where.port)
            found = await self._loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            route.address = (str(found[0][4][0]), int(found[0][4][1]))
            if len(found) > 1:  # several addresses: take the first that answers
                for one in found:
                    with contextlib.suppress(OSError):
                        return await self._open_to(route, str(one[4][0]), int(one[4][1]))
        return await self._open_to(route, *route.address)

    async def _open_to(self, route: _Route, host: str, port: int) -> _Connection:
        name = route.where.host if route.tls else None
        if route.tls and route.where.proxy:
            tunnel = await self._tunnel(route.where, host, port)
            _, connection = await self._loop.create_connection(
                lambda: _Connection(self, route), sock=tunnel, ssl=route.tls, server_hostname=name
            )
        else:
            _, connection = await self._loop.create_connection(
                lambda: _Connection(self, route), host, port, ssl=route.tls, server_hostname=name
            )
        route.address = (host, port)
        return connection

    async def _tunnel(self, where: Target, host: str, port: int) -> socket.socket:
        """A socket through the proxy to the server, on which TLS can begin."""
        made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        made.setblocking(False)
        try:
            await self._loop.sock_connect(made, (host, port))
            auth = f"Proxy-Authorization: {where.proxy_auth}\r\n" if where.proxy_auth else ""
            ask = f"CONNECT {where.netloc} HTTP/1.1\r\nHost: {where.netloc}\r\n{auth}\r\n"
            await self._loop.sock_sendall(made, ask.encode("latin-1"))
            said = b""
            while b"\r\n\r\n" not in said:
                piece = await asyncio.wait_for(self._loop.sock_recv(made, 1), 30.0)  # no byte of TLS may be taken
                if not piece or len(said) > MAX_HEADER_BYTES:
                    raise ConnectionResetError("the proxy closed the connection")
                said += piece
            if said.partition(b" ")[2][:1] != b"2":
                line = printable(said.split(bytes([13]))[0].decode("latin-1"), where.secrets())
                raise OSError(f"the proxy says {line}")
        except BaseException:
            made.close()
            raise
        return made

    def _release(self, connection: _Connection) -> None:
        connection.flight = None
        connection.parser = None
        connection.between = False
        connection.at = self.clock()
        if connection.transport is None or connection.transport.is_closing():
            return
        if self._closing:
            connection.close()
        else:
            connection.route.idle.append(connection)

    # --- ending

    def _answered(self, flight: _Flight, connection: _Connection, *, whole: bool, why: str = "") -> None:
        """The answer has ended; ``whole``: its framing says that nothing is missing."""
        connection.flight = None
        connection.digest(flight)
        answer = flight.answer
        if flight.http_status // 100 != 2:
            words = f"HTTP {flight.http_status}" + (f": {answer.detail}" if answer.detail else "")
            self._end(flight, "failed", "status", words)
            return
        answer.finish(whole=whole)
        if answer.error:
            self._end(flight, "failed", answer.error, answer.detail)
        elif not answer.said_end:
            self._end(flight, "failed", "short" if whole or not why else "reset", why or "the stream ended early")
        elif not answer.chunks:
            self._end(flight, "failed", "short", "the stream ended without any content")
        else:
            self._end(flight, "ok", "", "")

    def _lost(self, flight: _Flight, connection: _Connection, exc: Exception | None) -> None:
        """The connection went away under a request."""
        if self._flights.get(flight.position) is not flight:
            return
        if math.isnan(flight.first_byte):
            self._end(flight, "failed", "reset", printable(str(exc or "the connection was closed without an answer")))
            return
        if flight.http_status == 0:
            self._end(flight, "failed", "reset", "the connection was closed inside the headers")
        elif exc is None and not connection.framed:
            self._answered(flight, connection, whole=True)  # HTTP/1.0: the end of the connection is the end
        else:
            why = str(exc) if exc is not None else "the connection was closed inside the body"
            kind_if_open = "short" if exc is None else "reset"
            connection.digest(flight)
            flight.answer.finish(whole=False)
            answer = flight.answer
            if flight.http_status // 100 != 2 or answer.error or answer.said_end:
                self._answered(flight, connection, whole=False)
            else:
                self._end(flight, "failed", kind_if_open, printable(why))

    def _end(self, flight: _Flight, status: str, error: str, detail: str) -> None:
        if self._flights.get(flight.position) is not flight:
            return
        del self._flights[flight.position]
        answer = flight.answer
        if status != "ok":
            if flight.connection is not None:
                flight.connection.digest(flight)
            answer.finish(whole=False)  # keep what was measured
        self._done(
            Row(
                flight.position,
                flight.sent,
                flight.first_byte,
                answer.first_token,
                answer.last_token,
                self.clock(),
                answer.prompt_tokens,
                answer.output_tokens,
                answer.chunks,
                answer.max_gap if answer.chunks > 1 else math.nan,
                flight.http_status,
                status,
                error,
                printable(detail) if detail else "",
                flight.body_bytes,
                flight.dispatch,
                self._facts(flight),
            )
        )
        if self._turns is not None and not self._closing:
            self._answer_came(self._turns, flight)
        self._check()
        if self._gate is not None and not self._closing:
            if self._gate.in_flight:
                self._released = self.clock()
            self._loop.call_soon(self._tick)

    def _facts(self, flight: _Flight) -> Mapping[str, Any] | None:
        """What the server said of this request; an engine that fails at it costs the facts and nothing else."""
        if self._engine is None or not (flight.answer.kept or flight.headers):
            return None
        try:
            facts, secrets = self._engine.facts(flight.answer.kept, flight.headers), flight.answer.secrets
            return {name: _without(one, secrets) for name, one in facts.items()} or None  # the names are the engine's
        except Exception:
            return None

    def _drop(self, flight: _Flight) -> None:
        if flight.task is not None:
            flight.task.cancel()
        if flight.connection is not None:
            flight.connection.flight = None
            flight.connection.close()

    def _check(self) -> None:
        waiting = self._flights or self._children or self._released_turns or self._more
        if self._ended is not None and not self._ended.done() and self._next >= len(self._due) and not waiting:
            self._ended.set_result(None)

    async def _wait(self) -> None:
        """Notes until the start whether the loop stood still."""
        while True:
            await asyncio.sleep(0.25)
            self._alive()

    async def _watch(self) -> None:
        """Times requests out, oldest first, and notes how long the loop stood still."""
        step = 0.05
        while True:
            before = self.clock()
            await asyncio.sleep(step)
            now = self._alive()
            self.max_stall_s = max(self.max_stall_s, now - before - step)
            while self._flights:
                oldest = next(iter(self._flights.values()))
                if now - oldest.sent < self._timeout_s:
                    break
                self._end(oldest, "failed", "timeout", f"no end within {self._timeout_s:g} s")
                self._drop(oldest)
            self._refresh(now)

    def _refresh(self, now: float) -> None:
        """Close kept connections that lay idle, oldest first; where none is left, open a spare one ahead of need."""
        for route in self._routes:
            idle = route.idle
            stale = 0
            while stale < len(idle) and now - idle[stale].at > self._idle_s:
                stale += 1
            if stale:
                for connection in idle[:stale]:
                    connection.close()
                del idle[:stale]
                if not idle and self._next < len(self._due) and self._spare is None:
                    self._spare = self._loop.create_task(self._open_spare(route))

    async def _open_spare(self, route: _Route) -> None:
        with contextlib.suppress(OSError):
            self._release(await self._connect(route))
        self._spare = None


def _without(value: Any, secrets: tuple[str, ...]) -> Any:
    """What was read from JSON, with no secret in its texts."""
    if isinstance(value, str):
        return masked(value, secrets)
    if isinstance(value, dict):
        return {_without(name, secrets): _without(one, secrets) for name, one in value.items()}
    return [_without(one, secrets) for one in value] if isinstance(value, (list, tuple)) else value


def _connect_error(error: OSError) -> tuple[str, str]:
    if isinstance(error, ConnectionRefusedError):
        return "refused", "connection refused"
    if isinstance(error, ConnectionResetError):
        return "reset", "connection reset while connecting"
    if isinstance(error, TimeoutError):
        return "timeout", "no connection in time"
    if isinstance(error, socket.gaierror):
        return "refused", f"the host name cannot be resolved: {error.strerror}"
    if isinstance(error, ssl.SSLError):
        return "other", f"TLS: {tls_words(error)}"
    return "other", str(error)


def tls_words(error: ssl.SSLError) -> str:
    """What is wrong with a certificate ("certificate has expired") rather than that it is not good."""
    return str(getattr(error, "verify_message", "") or error.reason or error)


class Engine:
    """A native thread with its own uvloop, in which clients run; commands come from other threads.

    The garbage collector is frozen and off while a client runs: its pauses of 30 to 80 ms would be lateness.
    """

    def __init__(self) -> None:
        import threading

        self.rows: deque[Row] = deque()
        self.loop: asyncio.AbstractEventLoop
        self._client: Client | None = None
        started = threading.Event()
        self._thread = threading.Thread(target=self._main, args=(started,), name="steelyard-client", daemon=True)
        self._thread.start()
        started.wait(10)

    def _main(self, started: Any) -> None:
        import uvloop

        self.loop = uvloop.new_event_loop()
        asyncio.set_event_loop(self.loop)
        self.loop.call_soon(started.set)
        self.loop.run_forever()

    def submit(self, work: Any) -> Any:
        """Run a coroutine in the thread; returns its concurrent future."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    async def prepare(
        self,
        where: Sequence[Target],
        path: str,
        prompts: Prompts,
        *,
        timeout_s: float,
        first: Sequence[int],
        engine: engines.Engine | None = None,
    ) -> None:
        """Make the client of the next run and open connections for its first requests."""
        await self.close()
        self.rows = deque()  # whatever the client before has still to say is of another run
        self._client = Client(where, path, prompts, self.rows.append, timeout_s=timeout_s, engine=engine)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._client.warm(first), 5.0)

    async def run(
        self,
        positions: Sequence[int],
        due: Sequence[float],
        prompt_tokens: Sequence[int],
        output_tokens: Sequence[int],
        zero: float,
        gate: Gate | None = None,
        turns: Turns | None = None,
        more: bool = False,
    ) -> dict[str, float]:
        """Send a shard; returns what it cost: CPU seconds of this process, the longest stall of the loop."""
        client = self._client
        assert client is not None  # noqa: S101 - prepare comes first
        gc.collect()
        gc.freeze()
        gc.disable()
        before = time.process_time()
        try:
            await client.run(positions, due, prompt_tokens, output_tokens, zero, gate, turns, more)
        finally:
            gc.enable()
            gc.unfreeze()
        return {"cpu_s": time.process_time() - before, "max_stall_s": client.max_stall_s}

    async def extend(self, *columns: Any) -> None:
        """See :meth:`Client.extend`."""
        if self._client is not None:
            self._client.extend(*columns)

    async def stop(self, drain_s: float) -> None:
        """Send no more, wait ``drain_s`` for answers, cancel the rest."""
        client = self._client
        if client is None:
            return
        client.stop()
        until = self.loop.time() + drain_s
        while client.in_flight and self.loop.time() < until:
            await asyncio.sleep(0.02)
        client.cancel()

    async def close(self) -> None:
        """Close the client's connections."""
        if self._client is not None:
            await self._client.close()
            self._client = None
