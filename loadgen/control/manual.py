"""The operator is asked: what is in force, and to put another fleet in force; steelyard waits for the answer."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, InvalidStateError
from typing import Any

from loadgen.control import Bounds, Connect, LostError, Standing, Steps, members
from traces.errors import InputError
from traces.records import Fleet


class Manual:
    """See :class:`loadgen.control.Control`. ask_operator(question) waits for a line; EOFError: nobody is there."""

    kind = "manual"

    def __init__(self, what: str, ask_operator: Callable[[str], str] | None, now: Fleet | None = None) -> None:
        self._ask_operator, self._now = ask_operator, now
        self._target: Fleet | None = None
        self._sure = False
        self._steps = Steps()
        self._question: Future[str] = Future()
        """The last one that was asked: what the operator enters answers it, whatever was asked before."""
        self._question.set_result("")  # none is open
        self.name = f"manual {what}".strip()
        self.spec = f"manual:{what}"
        self.bounds = Bounds()

    def get(self) -> Standing:
        """See :class:`loadgen.control.Control`. The first time, the operator is asked."""
        left = self._steps.check()
        while self._now is None:
            said = self._asked("Which fleet is in force now (prefill:decode)? ")
            try:
                self._now, self._sure = Fleet.parse(said), True
            except InputError as error:
                self._asked(f"{error} Press Enter and try again. ")
        return Standing(None if left else self._now, self._target, left, sure=self._sure)

    def steps(self, fleet: Fleet) -> list[str]:
        """See :class:`loadgen.control.Control`."""
        now = self.get()
        return [] if now.settled(fleet) else [f"ask the operator to change {now.aimed} to {fleet}, and wait"]

    def ask(self, fleet: Fleet) -> None:
        """See :class:`loadgen.control.Control`."""
        before, self._target, given_up = self._target, fleet, ""
        if self._question.cancel():  # nobody waits for its answer, nor knows how far the operator came
            given_up, self._sure = f"\nThe change to {before} is given up. ", False

        def change() -> None:
            now = None if given_up else self._now
            said = self._asked(
                f"{given_up}Please change the fleet from {now or 'what it is'} to {fleet}. "
                "Enter when it serves, no to give up: "
            )
            if said.strip().lower() in ("n", "no"):
                if self._target is fleet:  # nothing is on its way there
                    self._target = None
                raise LostError(f"the operator did not put the fleet {fleet} in force.")
            self._now, self._sure = fleet, True

        self._steps.start([change])

    def _asked(self, question: str) -> str:
        if self._ask_operator is None:
            raise LostError("--control manual asks the operator, and there is no terminal to ask at.")
        self._question.cancel()
        asked = self._question = Future[str]()
        # In a thread of its own: nothing ends one that reads, so that of a question that was given up reads the next answer.
        threading.Thread(
            target=self._read, args=(self._ask_operator, question), name="steelyard-operator", daemon=True
        ).start()
        try:
            # In pieces: a signal that comes in the moment one begins does not end it.
            while not asked.done():
                with contextlib.suppress(TimeoutError, CancelledError):
                    asked.exception(0.5)
            return asked.result()
        except CancelledError:
            raise LostError("--control manual: the question was given up.") from None
        except (EOFError, OSError):
            raise LostError("--control manual asks the operator, and nobody answered (end of input).") from None

    def _read(self, ask_operator: Callable[[str], str], question: str) -> None:
        with contextlib.suppress(InvalidStateError):  # nothing was asked when it was entered
            try:
                said = ask_operator(question)
            except Exception as error:
                self._question.set_exception(error)
            else:
                self._question.set_result(said)


def from_text(text: str, spec: str, connect: Connect) -> Manual:
    """``manual:`` or ``manual:NAME``."""
    return Manual(text, connect.ask_operator)


def from_table(table: dict[str, Any], path: str, connect: Connect) -> Manual:
    """``name``, ``now``."""
    held = members(table, path, name=(str, ""), now=(str, ""))
    made = Manual(held["name"], connect.ask_operator, Fleet.parse(held["now"]) if held["now"] else None)
    made.spec = path
    return made
