"""Independent pieces of work, one after another or wherever joblib's active backend carries them; or shared among cores here.

``each``: by default in this process. ``joblib.parallel_config(backend="dask")``, or any other backend that is registered, sends
the same calls elsewhere. ``shared``: within ``cores(n)`` the process is forked for a moment, and every core does its share of
work too small to be sent anywhere. Results come back in order, so an answer does not depend on where it was computed.
"""

from __future__ import annotations

import multiprocessing
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from multiprocessing.connection import Connection
from typing import TypeVar

import joblib

A = TypeVar("A")
R = TypeVar("R")

PATIENCE_S, PATIENCE_TIMES = 30.0, 10.0
"""Forks may take so much longer than the share done here: one made while another thread held a lock may wait for ever."""

_CORES: ContextVar[int] = ContextVar("cores", default=1)


def each(work: Callable[[A], R], items: Iterable[A]) -> list[R]:
    """``[work(item) for item in items]``; work must be a function of a module, or a partial of one."""
    return list(joblib.Parallel()(joblib.delayed(work)(item) for item in items))


@contextmanager
def cores(n: int) -> Iterator[None]:
    """Let :func:`shared` share its work among so many cores, where the system forks (Linux)."""
    token = _CORES.set(n if sys.platform == "linux" else 1)
    try:
        yield
    finally:
        _CORES.reset(token)


def shares() -> int:
    """Among how many :func:`shared` divides its work here."""
    return _CORES.get()


def at_once() -> int:
    """Items to hand to :func:`shared` between two words about progress: a fork costs some milliseconds."""
    return 2 * shares() if shares() > 1 else 1


def shared(work: Callable[[A], R], items: Iterable[A]) -> list[R]:
    """``[work(item) for item in items]``, shared among the cores; work must not change what others look at.

    A fork sees what this process sees, so nothing is sent but the results. Where a fork cannot be made, dies or stands still, its
    share is done here.
    """
    held = list(items)
    n = min(_CORES.get(), len(held))
    if n < 2:
        return [work(item) for item in held]
    context = multiprocessing.get_context("fork")
    others = []
    for k in range(1, n):
        here, there = context.Pipe(duplex=False)
        child = context.Process(target=_share, args=(there, work, held[k::n]), daemon=True)
        with warnings.catch_warnings():
            # Other threads draw progress; a fork of them computes and ends, it takes none of their locks.
            warnings.simplefilter("ignore", DeprecationWarning)
            try:
                child.start()
            except OSError:
                there.close()
                break
        there.close()
        others.append((k, here, child))
    found: dict[int, R] = {}
    began = time.monotonic()
    try:
        for k in {*range(n)} - {k for k, _, _ in others}:
            found.update(zip(range(k, len(held), n), [work(item) for item in held[k::n]], strict=True))
        until = time.monotonic() + PATIENCE_S + PATIENCE_TIMES * (time.monotonic() - began)
        for k, here, _ in others:
            done: list[R] | None = None
            with suppress(EOFError, OSError):
                if here.poll(max(0.0, until - time.monotonic())):
                    done = here.recv()
            if done is None:
                done = [work(item) for item in held[k::n]]
            found.update(zip(range(k, len(held), n), done, strict=True))
    finally:
        for _, here, child in others:
            here.close()
            if child.is_alive():
                child.join(0.2)
                child.kill()
            child.join()
    return [found[i] for i in range(len(held))]


def _share(there: Connection, work: Callable[[A], R], items: list[A]) -> None:
    """In a fork: do the work and send it back. What fails here fails again, and is said, in the process that forked."""
    _CORES.set(1)
    threading.excepthook = lambda _: None
    with suppress(BaseException):
        there.send([work(item) for item in items])
    there.close()
