"""Traces that come with the package, so that the first run needs no download."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from traces.errors import InputError

NAMES = ("azure-2023-conv", "azure-2023-code")


def shipped(name: str) -> Path:
    """The file of a shipped trace. InputError lists the names when there is none."""
    if name not in NAMES:
        raise InputError(f"no shipped trace is named {name!r}. Shipped: {', '.join(NAMES)}.")
    return Path(str(resources.files("traces") / "data" / f"{name}.csv"))
