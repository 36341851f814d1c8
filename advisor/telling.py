"""How long work tells what it is doing and what it has found so far, whoever listens (:mod:`advisor.cli.progress`)."""

from __future__ import annotations

from typing import Protocol


class Note(Protocol):
    """Called as work goes on. step: its name; done: parts of ``of`` that are done; found: what it knows by now, a short
    sentence, or "" for nothing new."""

    def __call__(self, step: str, done: int, of: int, found: str = "", /) -> None:
        """Told."""


def silent(step: str, done: int, of: int, found: str = "", /) -> None:
    """Nobody listens."""
