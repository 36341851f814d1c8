"""A command of the user's own, given as a list of arguments: no shell ever sees it.

``{prefill}``, ``{decode}`` and ``{workers}`` are replaced inside each argument. The command is done when it exits with 0;
a second one (``get``) prints what is in force, as ``P:D`` or as JSON with ``prefill`` and ``decode``. Without it the fleet
counts as in force when the command has exited, and what was in force before has to be said (``now``); that is believed as the
way back, not as a reason to run nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Sequence
from typing import IO, Any

from loadgen.client import unsaid
from loadgen.control import Bounds, Connect, LostError, Standing, Steps, members
from loadgen.stream import printable
from traces.errors import EndpointError, InputError
from traces.records import Fleet, whole_number

COMMAND_S = 600.0
"""How long a command may take, unless the file says otherwise."""

GET_S = 30.0

LOOK_S = 0.5
"""A look is a process, on the machine that sends: no more than two a second beside the ticks."""

TERM_S = 5.0
"""What a command may take to clean up when it is ended (helm marks its release), before it is killed."""


class Command:
    """See :class:`loadgen.control.Control`. change, get: lists of arguments. now: the fleet in force at the beginning."""

    kind = "command"

    def __init__(
        self, change: Sequence[str], read: Sequence[str] = (), now: Fleet | None = None, timeout_s: float = COMMAND_S
    ) -> None:
        if not any("{prefill}" in part for part in change) or not any("{decode}" in part for part in change):
            raise InputError("a control command needs {prefill} and {decode} among its arguments.")
        self._change, self._read, self._now, self._timeout_s = list(change), list(read), now, timeout_s
        self._target: Fleet | None = None
        self._running = _Running()
        self._steps = Steps(self._running.end)
        # Also when this process ends: nobody would know of it any more.
        weakref.finalize(self, self._running.end, for_good=True)
        self.patience_s = timeout_s + GET_S
        self.look_s = LOOK_S if read else 0.0
        self.name = f"command {change[0]}"
        self.spec = "command:" + json.dumps(self._change)
        self.bounds = Bounds()

    def get(self) -> Standing:
        """See :class:`loadgen.control.Control`."""
        left = self._steps.check()
        if not self._read:
            return Standing(None if left else self._now, self._target, left, sure=self._target is not None)
        said = self._run(self._read, GET_S)
        held: Any = None
        try:
            held = json.loads(said)
        except (ValueError, RecursionError):
            held = None
        try:
            fleet = Fleet.of(held) if isinstance(held, dict) else Fleet.parse(said)
            left += whole_number(held.get("changing", 0)) if isinstance(held, dict) else 0
        except (InputError, TypeError, ValueError):
            raise EndpointError(
                f'{self._read[0]}: it must print P:D or {{"prefill": P, "decode": D}}, "changing" a number of workers, if '
                f"at all (it printed {printable(said[:80])!r})."
            ) from None
        return Standing(fleet, self._target if left else None, left)

    def steps(self, fleet: Fleet) -> list[str]:
        """See :class:`loadgen.control.Control`."""
        from traces.store import redact

        if self.get().settled(fleet):
            return []
        shown = map(redact, self._filled(fleet))
        return ["run " + " ".join(json.dumps(part) if " " in part or not part else part for part in shown)]

    def ask(self, fleet: Fleet) -> None:
        """See :class:`loadgen.control.Control`. No two commands change the fleet at once."""
        self._steps.stop()
        if self._running.alive():
            raise LostError(
                f"control command {self._change[0]!r}: one from before still runs and may not be ended (another user's, as with "
                "sudo), so that no other was started."
            )
        self._target = fleet

        def change() -> None:
            try:
                self._run(self._filled(fleet), self._timeout_s, self._running)
            except Exception:
                if self._target is fleet:  # nothing is on its way there
                    self._target = None
                raise
            self._now = fleet

        self._steps.start([change])

    def _filled(self, fleet: Fleet) -> list[str]:
        values = {"{prefill}": str(fleet.prefill), "{decode}": str(fleet.decode), "{workers}": str(fleet.workers)}
        filled = []
        for part in self._change:
            for mark, value in values.items():
                part = part.replace(mark, value)
            filled.append(part)
        return filled

    def _run(self, arguments: list[str], timeout_s: float, running: _Running | None = None) -> str:
        """What a command says. running: gets its process."""
        # Files, not pipes: whatever the command leaves running holds a pipe open, and nobody would see that it has ended.
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            code = self._ended(arguments, timeout_s, out, err, running or _Running())
            out.seek(0)
            err.seek(max(0, err.seek(0, os.SEEK_END) - 65536))
            said, wrong = out.read(65536), err.read(65536)
        if code:
            lines = wrong.decode("utf-8", "replace").strip().splitlines()
            last = printable(lines[-1][:200]) if lines else "it said nothing"
            raise LostError(f"control command {arguments[0]!r}: exit code {code} ({last}).")
        return said.decode("utf-8", "replace").strip()

    @staticmethod
    def _ended(arguments: list[str], timeout_s: float, out: IO[bytes], err: IO[bytes], running: _Running) -> int:
        fate = "was killed"
        try:
            process = running.start(arguments, out, err)
            try:
                return process.wait(timeout_s)
            except BaseException:
                if not _end([process]):
                    fate = "may not be ended (another user's, as with sudo): it may go on changing the fleet"
                raise
        except FileNotFoundError:
            raise LostError(f"control command {arguments[0]!r}: there is no such program.") from None
        except PermissionError:
            raise LostError(f"control command {arguments[0]!r}: it may not be run (is it executable?).") from None
        except subprocess.TimeoutExpired:
            raise LostError(
                f"control command {arguments[0]!r}: did not end within {timeout_s:g} s and {fate}."
            ) from None
        except OSError as error:
            raise LostError(f"control command {arguments[0]!r}: cannot be run ({error.strerror}).") from None


class _Running:
    """Commands under way: whoever ends them knows each, also one that another thread is just starting."""

    def __init__(self) -> None:
        self._gate = threading.Lock()
        self._held: list[subprocess.Popen[bytes]] = []
        self._over = False

    def start(self, arguments: list[str], out: IO[bytes], err: IO[bytes]) -> subprocess.Popen[bytes]:
        """A process in a session of its own: Ctrl-C is ours, the way back must not be cut in the middle."""
        with self._gate:
            if self._over:
                raise LostError(f"control command {arguments[0]!r}: not started, for this process ends.")
            process = subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
            )
            self._held = [one for one in self._held if one.poll() is None] + [process]
            return process

    def alive(self) -> bool:
        """Does one run?"""
        return any(process.poll() is None for process in self._held)

    def end(self, *, for_good: bool = False) -> None:
        """End them; for_good: and start no other."""
        known = self._gate.acquire(timeout=TERM_S)  # less than for ever: a program may take long to be found
        self._over |= for_good
        if known:
            self._gate.release()
        _end(self._held)


def _end(running: Sequence[subprocess.Popen[bytes]]) -> bool:
    """End commands with what they started, which would go on changing the fleet. False: one may not be ended."""
    allowed = True
    for process in list(running):
        if process.poll() is not None:
            continue
        try:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(TERM_S)
            os.killpg(process.pid, signal.SIGKILL)
        except PermissionError:
            allowed = False
        except OSError:
            pass  # gone
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1.0)
    return allowed


def _arguments(held: Any, what: str) -> list[str]:
    if not isinstance(held, list) or not held or not all(isinstance(part, str) for part in held) or not held[0]:
        raise InputError(
            f'{what} must be a list of arguments such as ["./scale.sh", "{{prefill}}", "{{decode}}"] (got {unsaid(repr(held))}).'
        )
    return held


def from_text(text: str, spec: str, connect: Connect) -> Command:
    """``command:["prog", "{prefill}", "{decode}"]``, a JSON list; without ``get`` the fleet in force is not known."""
    try:
        held = json.loads(text)
    except ValueError:
        held = text
    made = Command(_arguments(held, "--control command:"))
    return made


def from_table(table: dict[str, Any], path: str, connect: Connect) -> Command:
    """``set``, ``get``, ``now``, ``timeout_s``."""
    held = members(table, path, set=(list, ...), get=(list, []), now=(str, ""), timeout_s=(float, COMMAND_S))
    made = Command(
        _arguments(held["set"], f"{path}: set"),
        _arguments(held["get"], f"{path}: get") if held["get"] else (),
        Fleet.parse(held["now"]) if held["now"] else None,
        float(held["timeout_s"]),
    )
    made.spec = path
    return made
