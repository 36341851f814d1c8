"""To the microsecond: when to send, and when what came had come.

uvloop's timers count whole milliseconds, and a loop learns of bytes when it gets to them. The kernel knows both better.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import select
import socket
import struct
import time
from collections.abc import Callable
from typing import Any, Protocol

REST_S = 1e-3
"""Between two looks at what has arrived; to the loop's own timers, whole milliseconds."""

LOOK = 256
"""Connections read in a row before requests that are due get their turn."""

READ_BYTES = 1 << 14
"""Of a connection that are read at a time."""

SO_TIMESTAMPNS = 35
"""Linux: stamp what arrives, in nanoseconds of the wall clock (asm-generic/socket.h; Python has no name for it)."""

_STAMP = struct.Struct("@ll")
_SPACE = socket.CMSG_SPACE(_STAMP.size)
_SLACK_S = 1e-3
_EPOLL = hasattr(select, "epoll")
_WATCHED = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET if _EPOLL else 0


class Reader(Protocol):
    """A connection whose bytes are read for it. watched: its file handle while they are, else -1; reset_by: what hindered it."""

    transport: asyncio.Transport | None
    watched: int
    reset_by: OSError | None

    def take(self, data: bytes, at: float) -> None:
        """Bytes that arrived at ``at``."""

    def close(self) -> None:
        """Give the connection up."""


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


class Arrivals:
    """Reads what reaches plain connections, each piece stamped by the kernel when it came, not by us when we got to it.

    So a busy client costs no accuracy, and bytes may wait a little: between two looks it rests for ``REST_S``, and many are read
    at once. Pieces that reach one connection between two looks are one, stamped when the last of them came. Stamps are of the
    wall clock; one that cannot be, because somebody set that clock meanwhile, is replaced by the time of reading. What TLS
    brings is read by the loop: its bytes are no bytes of the answer.
    """

    possible = _EPOLL
    """Linux."""

    def __init__(self, loop: asyncio.AbstractEventLoop, clock: Callable[[], float]) -> None:
        self._loop = loop
        self._clock = clock
        self._epoll = select.epoll()
        self._of: dict[int, tuple[Callable[..., Any], Callable[[bytes, float], None], Reader]] = {}
        self._rest: asyncio.TimerHandle | None = None
        self._last = clock()
        loop.add_reader(self._epoll.fileno(), self._ready)

    def watch(self, connection: Reader, sock: socket.socket) -> None:
        """Read this connection's bytes from now on, in the loop's stead. ``sock``: what its transport was made of."""
        transport = connection.transport
        if transport is None or transport.is_closing():
            return
        transport.pause_reading()
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        connection.watched = fd = sock.fileno()
        self._of[fd] = sock.recvmsg, connection.take, connection
        self._epoll.register(fd, _WATCHED)

    def forget(self, connection: Reader) -> None:
        """The connection is about to be closed."""
        self._of.pop(connection.watched, None)
        with contextlib.suppress(OSError, ValueError):
            self._epoll.unregister(connection.watched)
        connection.watched = -1

    def _ready(self) -> None:
        self._loop.remove_reader(self._epoll.fileno())
        self._rested()

    def _rested(self) -> None:
        if self._look():
            self._rest = self._loop.call_later(REST_S, self._rested)
        else:
            self._loop.add_reader(self._epoll.fileno(), self._ready)

    def _look(self) -> int:
        """Read what is there, a piece a connection; how many connections had something."""
        clock, unpack, of = self._clock, _STAMP.unpack, self._of
        began = clock()
        found = self._epoll.poll(0, LOOK)
        earliest, latest, shift = self._last - _SLACK_S, clock(), clock() - time.time()
        if len(found) < LOOK:
            self._last = began
        for fd, what in found:
            read, take, connection = of[fd]
            try:
                data, said, _, _ = read(READ_BYTES, _SPACE)
            except (BlockingIOError, InterruptedError):
                continue
            except OSError as error:
                connection.reset_by = error
                connection.close()
                continue
            if not data:
                connection.close()
                continue
            try:
                seconds, nanoseconds = unpack(said[0][2])
                at = seconds + nanoseconds * 1e-9 + shift
                if at < earliest or (at > latest and at > clock()):
                    at = clock()
            except (IndexError, struct.error):  # this system does not stamp
                at = clock()
            try:
                take(data, at)
            except Exception as error:  # what is wrong with one answer must not end the reading of all
                connection.reset_by = OSError(f"the answer cannot be read: {type(error).__name__}")
                connection.close()
            if what != select.EPOLLIN or len(data) == READ_BYTES:
                self._epoll.modify(fd, _WATCHED)  # there may be more: tell it again
        return len(found)

    def close(self) -> None:
        """Read no more."""
        self._loop.remove_reader(self._epoll.fileno())
        if self._rest is not None:
            self._rest.cancel()
        self._epoll.close()
