"""What can go wrong, in words a user can act on.

::

    SteelyardError             exit 1   the work could not be done
    ├── InputError             exit 1   a file, a name, a value given by the user
    ├── EndpointError          exit 1   the server under test refused, lied or went away
    ├── StoreError             exit 1   the database is missing, of another revision, locked or gone
    ├── NoFleetError           exit 3   nothing meets the SLO
    └── NotEnoughDataError     exit 5   the rows cannot answer; names the next measurement

A message says what, where, got and next step, on one line, and never holds a secret.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

CONTROLS = {code: 0xFFFD for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n\r"}
"""For ``str.translate``: a terminal obeys these, so text from outside must not hold them where people read."""


MOST_CHARACTERS = 1500
"""Of a message."""


class SteelyardError(Exception):
    """The work could not be done. ``str(error)`` is the one line the user reads."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str) -> None:
        said = " ".join(message.split()).translate(CONTROLS)
        if len(said) > MOST_CHARACTERS:  # what was got may be a whole file; the end says what to do
            said = f"{said[: MOST_CHARACTERS - 503]} … {said[-500:]}"
        super().__init__(said)


class InputError(SteelyardError):
    """A file, a name or a value given by the user cannot be used."""


class EndpointError(SteelyardError):
    """The endpoint under test cannot be used."""


class StoreError(SteelyardError):
    """The database cannot be used."""


class NoFleetError(SteelyardError):
    """No fleet meets the SLO."""

    exit_code = 3


class NotEnoughDataError(SteelyardError):
    """The stored rows cannot answer the question; the message names the next measurement.

    next_probe: the same as ``advise --json`` has it, where a replay is what is missing.
    """

    exit_code = 5

    def __init__(self, message: str, next_probe: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.next_probe = next_probe


@contextmanager
def understood(what: str, do: str) -> Iterator[None]:
    """Others may have written what is read here: where that fails, StoreError says so on one line. do: the next step."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {str(error)[:200]}"
        raise StoreError(f"{what} holds what no steelyard of this version wrote ({why}). {do}") from error
