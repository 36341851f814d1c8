"""Independent pieces of work, one after another or wherever joblib's active backend carries them.

By default in this process. ``joblib.parallel_config(backend="dask")``, or any other backend that is registered, sends the
same calls elsewhere; results come back in order, so an answer does not depend on where it was computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import joblib

A = TypeVar("A")
R = TypeVar("R")


def each(work: Callable[[A], R], items: Iterable[A]) -> list[R]:
    """``[work(item) for item in items]``; work must be a function of a module, or a partial of one."""
    return list(joblib.Parallel()(joblib.delayed(work)(item) for item in items))
