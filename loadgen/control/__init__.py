"""Reads and sets the P:D of a live endpoint: one interface, one file a kind, and what a change costs.

:class:`Control` is what a kind offers: say what is (``get``), ask for another fleet (``ask``), say what that would do
(``steps``). :func:`put` asks, waits until the fleet is in force and measures how long that took. :class:`Keeper` is what
everything else uses: bounds, dry run, and a note on disk before the first change, so that the old fleet comes back after
Ctrl-C and after a crash. :func:`control_of` makes one from ``KIND:...`` or a TOML file.
"""

from __future__ import annotations

import contextlib
import math
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from loadgen.client import unsaid
from loadgen.control.endpoint import Endpoint as Endpoint
from loadgen.control.endpoint import fleet_body as fleet_body
from loadgen.control.journal import Journal
from traces.errors import EndpointError, InputError
from traces.records import Fleet

FLEET_S = 180.0
"""How long a change of P:D may take to be in force, unless told otherwise."""

STEP_S = 60.0
"""How long a change that is given up may take to end the step that runs; then it is ended, where it can be, and the next one does
not wait for it."""

BACK_S = 60.0
"""How long the way back is awaited after Ctrl-C or an error, or what the control needs; the note on disk stays when it takes
longer. At a good end it is awaited like any other change."""

ROLES = ("prefill", "decode")

ANY = (1, 2_000_000)


@dataclass(frozen=True, slots=True)
class Standing:
    """What an endpoint says of its fleet. fleet: serving now, None while a role is without a worker or where nothing says;
    target: asked for last, where known; changing: workers that start, drain or flip. workers: role -> names, where known;
    pages: name -> URL of its metrics, where known. sure: seen or put in force, not only what a file says was in force once."""

    fleet: Fleet | None = None
    target: Fleet | None = None
    changing: int = 0
    workers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sure: bool = True
    pages: Mapping[str, str] = field(default_factory=dict)

    @property
    def aimed(self) -> Fleet | None:
        """The fleet that is or will be in force."""
        return self.target or self.fleet

    def settled(self, fleet: Fleet) -> bool:
        """Is this fleet in force for sure, with nothing on its way?"""
        return self.sure and self.fleet == fleet and not self.changing and self.target in (None, fleet)


class Control(Protocol):
    """How one kind of endpoint is asked for a fleet. name: what it changes, without credentials; spec: what
    :func:`control_of` makes it from again, for the note on disk. A kind whose steps run in this process says as patience_s how
    long they may take: a change is waited for at least so long; one whose get costs more than a question says as look_s how
    many seconds to leave between two while requests are sent."""

    kind: str
    name: str
    spec: str

    def get(self) -> Standing:
        """What is in force now. EndpointError when it cannot be asked, or when the last change failed on its way."""
        ...

    def steps(self, fleet: Fleet) -> list[str]:
        """What asking for this fleet would do, a line a step; nothing if it is in force. Changes nothing.

        InputError when this endpoint can never reach it.
        """
        ...

    def ask(self, fleet: Fleet) -> None:
        """Ask for a fleet and return; InputError or EndpointError when it is refused at once."""
        ...


@dataclass(frozen=True, slots=True)
class Bounds:
    """Fleets that may be asked for: (least, most) prefill, decode and workers in all."""

    prefill: tuple[int, int] = ANY
    decode: tuple[int, int] = ANY
    workers: tuple[int, int] = ANY

    @classmethod
    def parse(cls, text: str) -> Bounds:
        """``1-6:1-6`` or ``1-6:1-6/8`` (at most 8 workers in all)."""
        match = re.fullmatch(r"\s*(\d{1,6})-(\d{1,6}):(\d{1,6})-(\d{1,6})(?:/(\d{1,6}))?\s*", text)
        if match:
            a, b, c, d = (int(n) for n in match.groups()[:4])
            if a <= b and c <= d:
                return cls((a, b), (c, d), (1, int(match[5])) if match[5] else ANY)
        raise InputError(
            f"bounds must be PREFILL:DECODE such as 1-6:1-6, or 1-6:1-6/8 for 8 workers at most (got {text!r})."
        )

    @classmethod
    def read(cls, held: Any, where: str) -> Bounds:
        """The table ``[bounds]`` of a TOML file: two whole numbers a key."""
        if not isinstance(held, dict) or set(held) - {"prefill", "decode", "workers"}:
            raise InputError(f"{where}: [bounds] takes prefill, decode and workers, each as [least, most].")
        found = {}
        for key, pair in held.items():
            if not (
                isinstance(pair, list) and len(pair) == 2 and all(type(n) is int for n in pair) and pair[0] <= pair[1]
            ):
                raise InputError(f"{where}: [bounds] {key} must be [least, most], two whole numbers (got {pair!r}).")
            found[key] = (pair[0], pair[1])
        return cls(**found)

    def check(self, fleet: Fleet) -> None:
        """InputError when the fleet lies outside."""
        for what, count, (least, most) in (
            ("prefill workers", fleet.prefill, self.prefill),
            ("decode workers", fleet.decode, self.decode),
            ("workers in all", fleet.workers, self.workers),
        ):
            if not least <= count <= most:
                raise InputError(
                    f"fleet {fleet} is out of bounds: {what} must be {least} to {most}. Nothing was changed."
                )


@dataclass(frozen=True, slots=True)
class Cost:
    """What a change took, in seconds from asking. joined: every role that grows has its workers; ready: what shrinks has
    drained too, nothing is on its way. before None: not known."""

    before: Fleet | None
    after: Fleet
    joined_s: float
    ready_s: float


def has_grown(now: Fleet | None, wanted: Fleet) -> bool:
    """Has every role at least its workers?"""
    return (
        now is not None and now.prefill >= wanted.prefill and now.decode >= wanted.decode and now.mixed >= wanted.mixed
    )


def put(
    control: Control,
    fleet: Fleet,
    timeout_s: float = FLEET_S,
    before: Standing | None = None,
    enough: Callable[[Standing], bool] = lambda standing: False,
) -> Cost:
    """Put a fleet in force and wait until it is. EndpointError when it is not within ``timeout_s``, or what the control needs.

    An answer that does not come while the change is on its way is awaited, not an end. enough: says of less than the fleet
    that nothing more is waited for.
    """
    standing = before or control.get()
    was = standing.fleet
    if standing.settled(fleet):
        return Cost(was, fleet, 0.0, 0.0)
    timeout_s = max(timeout_s, patience_of(control))
    asked = time.monotonic()
    control.ask(fleet)
    until = time.monotonic() + timeout_s  # a step of the change before, which has to end first, takes nothing of it
    joined = math.nan
    trouble, pause = "", 0.02
    while True:
        try:
            standing, trouble = control.get(), ""
        except LostError:
            raise
        except EndpointError as error:
            trouble = str(error)
        took = time.monotonic() - asked
        if not trouble:
            now = standing.fleet
            if math.isnan(joined) and has_grown(now, fleet):
                joined = took
            if standing.settled(fleet) or enough(standing):
                return Cost(was, fleet, took if math.isnan(joined) else joined, took)
        if time.monotonic() > until:
            break
        time.sleep(pause)
        pause = min(pause * 1.3, 0.25)
    shown = trouble or (
        f"it is {standing.fleet or 'unknown'}"
        + (
            f", {standing.changing} {'worker' if standing.changing == 1 else 'workers'} on the way"
            if standing.changing
            else ""
        )
    )
    raise EndpointError(
        f"{control.name}: the fleet {fleet} was not in force within {timeout_s:g} s ({shown}). "
        "Look at the server: a worker may not drain or not start. --settle SECONDS waits longer."
    )


def patience_of(control: Control) -> float:
    """Seconds that a control's own steps may take; 0 where none run in this process."""
    return float(getattr(control, "patience_s", 0.0))


def look_of(control: Control) -> float:
    """Seconds that a control wants between two looks at it while requests are sent; 0 where a look costs next to nothing."""
    return float(getattr(control, "look_s", 0.0))


class LostError(EndpointError):
    """Waiting does not help: refused, not authorised, or a step of the change failed."""


class FailedError(LostError):
    """A step of the change failed: what was asked for will not be in force."""


class Steps:
    """For kinds whose change is a list of steps: runs them in a thread, one after another; the first that fails ends it.

    check() says how many are not done yet, and raises what went wrong, once. end: ends the step that runs, if it can.
    """

    def __init__(self, end: Callable[[], object] = lambda: None) -> None:
        self._end, self._left = end, 0
        self._error: FailedError | None = None
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    @property
    def stopped(self) -> bool:
        """Has :meth:`stop` been called? A step that waits looks here."""
        return self._stop.is_set()

    def start(self, steps: Sequence[Callable[[], None]]) -> None:
        """Run them in order. What still runs of an earlier change is stopped after its step."""
        self.stop()
        self._left, self._error = len(steps), None
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._main, args=(list(steps), self._stop), name="steelyard-control", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """End after the step that runs now, which is ended if it takes too long."""
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(STEP_S)
            if self._thread.is_alive():
                self._end()
                self._thread.join(0.2)
        self._left = 0

    def check(self) -> int:
        """Steps that are not done. FailedError, once, says what went wrong with one.

        To be asked before the fleet is looked at: a step that fails in between would look like one that is done.
        """
        left = self._left  # first: what went wrong is there before this is 0
        error, self._error = self._error, None
        if error is not None:
            raise error
        return left

    def _main(self, steps: list[Callable[[], None]], stop: threading.Event) -> None:
        for step in steps:
            if stop.is_set():
                return
            try:
                step()
            except Exception as error:
                if stop.is_set():
                    return  # of a change that was given up: what it says is not the next one's
                said = str(error) if isinstance(error, EndpointError) else f"{type(error).__name__}: {error}"
                self._error = FailedError(said)
                self._left = 0
                return
            if stop.is_set():
                return  # the steps that are left are the next change's
            self._left = max(0, self._left - 1)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM is Ctrl-C: who stops a service, or takes a pod away, wants the fleet back as well."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


class Keeper:
    """A control that keeps the way back: a context manager, and itself a Control.

    Before the first change the fleet in force is noted on disk (:mod:`loadgen.control.journal`). At the end put_back says
    whether it comes back always (a sweep) or only when an error or Ctrl-C ended the work (a replay, which was asked for
    that fleet); SIGTERM is Ctrl-C. keep_note: the note stays, so that ``steelyard control restore`` goes back (``control set``).
    say: gets a line when something needs to be known. A crash leaves the note; the next Keeper of the same endpoint goes
    back to what stood before the crash, or, where it leaves its own fleet, keeps the note for ``restore``.
    stranded: the old fleet could not be put back.
    """

    def __init__(
        self,
        control: Control,
        verb: str,
        *,
        bounds: Bounds | None = None,
        put_back: bool = True,
        keep_note: bool = False,
        timeout_s: float = FLEET_S,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.control = control
        self.kind, self.name, self.spec = control.kind, control.name, control.spec
        self.bounds = bounds or getattr(control, "bounds", None) or Bounds()
        self.look_s = look_of(control)
        self._verb, self._put_back, self._keep_note = verb, put_back, keep_note
        self.timeout_s, self._say = timeout_s, say
        self.journal = Journal.of(control)
        self.before: Fleet | None = None
        self.stranded = False
        self._found: Standing | None = None
        self._over = self._owed = self._unknown = False
        self._moving = threading.Lock()
        self._said: set[str] = set()
        self._signals = contextlib.ExitStack()

    def __enter__(self) -> Keeper:
        self.journal.lock(self._verb)
        try:
            left = self.journal.left(self._verb)
        except InputError:
            self.journal.unlock()
            raise
        if left is not None and not self._keep_note:
            self.before, self._owed = left, True
            self._say(
                f"{self.name}: an earlier command ended without putting {left} back"
                + (
                    "; that is done at the end of this one."
                    if self._put_back
                    else ". Afterwards: steelyard control restore"
                )
            )
        self._over = False
        self._signals.enter_context(terminable())
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        back = self._put_back or (kind is not None and not self._keep_note)
        try:
            self._over = True
            with self._moving:  # what another thread is asking for lands before the way back, and nothing after it
                pass
            if self.before is None:
                return
            if back:
                self._back(self.timeout_s if kind is None else min(self.timeout_s, BACK_S))
                return
            if kind is None:
                self._finish()
            if not self._keep_note and not self._owed:  # what a crash left is not ours to drop
                self.journal.done(self._verb)
        except KeyboardInterrupt:
            if back and self.before is not None:
                self.stranded = True
                self._say(
                    f"interrupted: the fleet {self.before} may not be back. To put it back, run: steelyard control restore"
                )
            raise
        finally:
            self._signals.close()
            self.journal.unlock()

    def _finish(self) -> None:
        """Wait for the steps of a change that is to stay: they would end with this process."""
        until = time.monotonic() + patience_of(self.control)
        with contextlib.suppress(EndpointError):
            while time.monotonic() < until and self.control.get().changing:
                time.sleep(0.05)

    def _back(self, timeout_s: float) -> None:
        """Put the old fleet back and drop the note. Says so instead of raising when that does not succeed: the note stays."""
        if self.before is None:
            return
        try:
            if not self._as_found():
                put(self.control, self.before, timeout_s, enough=self._as_found)
        except (EndpointError, InputError) as error:
            if not self._as_found():
                self.stranded = True
                self._say(
                    f"the fleet {self.before} could not be put back ({error}). Once the endpoint answers, run: "
                    "steelyard control restore"
                )
                return
        if self._found is not None and self._as_found():
            self._say(f"{self.name}: {self._found.fleet} of {self.before} serves again, as before the first change")
        self.journal.done(self._verb)
        self.before = None

    def _as_found(self, now: Standing | None = None) -> bool:
        """Does a fleet that was not all there at the beginning (a worker was ill) stand as it did then? Nobody owes more.
        now: what was just seen."""
        found = self._found
        if found is None or found.changing or found.fleet in (None, self.before) or found.aimed != self.before:
            return False
        try:
            now = now or self.control.get()
        except EndpointError:
            return False
        return not now.changing and (now.fleet, now.aimed) == (found.fleet, found.aimed)

    def get(self) -> Standing:
        """See :class:`Control`."""
        return self.control.get()

    def steps(self, fleet: Fleet) -> list[str]:
        """See :class:`Control`; checks the bounds first."""
        self.bounds.check(fleet)
        return self.control.steps(fleet)

    def ask(self, fleet: Fleet) -> None:
        """Note, then ask. InputError when the command is ending: the old fleet may be back already."""
        with self._moving:
            if self._over:
                raise InputError(f"{self.name}: not asked for {fleet}, for the command is ending.")
            self._note(fleet, None)
            self.control.ask(fleet)

    def put(self, fleet: Fleet) -> Cost:
        """Note, ask, wait. InputError when it is out of bounds or out of reach, with nothing changed."""
        self.bounds.check(fleet)
        standing = self.control.get()
        if standing.settled(fleet):
            return Cost(standing.fleet, fleet, 0.0, 0.0)
        self.control.steps(fleet)  # a fleet that can never be reached is refused before anything moves
        self._note(fleet, standing)
        cost = put(self.control, fleet, self.timeout_s, standing)
        note = getattr(self.control, "note", "")
        if note and note not in self._said:
            self._said.add(note)
            self._say(note)
        return cost

    def _note(self, fleet: Fleet, standing: Standing | None) -> None:
        self.bounds.check(fleet)
        if self.before is None and not self._unknown:
            self._found = standing = standing or self.control.get()
            self.before = standing.aimed
            if self.before is not None:
                self.journal.begin(self._verb, self.before, fleet)
            elif self._put_back:
                raise InputError(
                    f"{self.name}: which fleet is in force is not known, so it could not be put back. "
                    "Give the control a get command or the fleet in force (now)."
                )
            else:  # nor is what this change puts in force the fleet to go back to after the next one
                self._unknown = True
                self._say(
                    f"{self.name}: which fleet was in force is not known, so nothing can put it back. A control that is a file "
                    "can say it: get, or now."
                )


# --- which one


KINDS: dict[str, tuple[str, str]] = {
    "reference": ("loadgen.control.reference", "reference:URL"),
    "sglang": ("loadgen.control.sglang", "sglang:ROUTER_URL"),
    "vllm-router": ("loadgen.control.vllm_router", 'FILE.toml with kind = "vllm-router"'),
    "kubernetes": ("loadgen.control.kubernetes", "kubernetes:NAMESPACE/KIND/NAME,KIND/NAME"),
    "command": ("loadgen.control.command", 'command:["scale.sh", "{prefill}", "{decode}"]'),
    "manual": ("loadgen.control.manual", "manual:"),
    "none": ("", "none"),
}
"""Kind -> (its module, how it is written). A module offers ``from_text(text, where)`` and ``from_table(table, where)``."""


@dataclass(frozen=True, slots=True)
class Connect:
    """How a control reaches its endpoint: endpoint(url) makes an Endpoint with the credentials that were given, bare(url) one
    without. ask_operator(question) waits for a line; None: nobody can be asked."""

    endpoint: Callable[[str], Endpoint]
    bare: Callable[[str], Endpoint]
    ask_operator: Callable[[str], str] | None = None


def control_of(spec: str, connect: Connect) -> Control | None:
    """The control that ``KIND:...`` or a TOML file describes; None for ``none``. InputError says what is wrong."""
    import importlib
    import tomllib

    kind, colon, rest = spec.partition(":")
    if kind in KINDS and (colon or kind in ("none", "manual")):
        if kind == "none":
            return None
        made: Control = importlib.import_module(KINDS[kind][0]).from_text(rest, spec, connect)
        return made
    path = Path(spec)
    if not path.is_file():
        forms = "; ".join(form for _, form in KINDS.values())
        raise InputError(
            f"--control {unsaid(spec)!r} is neither a kind nor a file. Give a TOML file or one of: {forms}."
        )
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # not all that tomllib raises is a TOMLDecodeError
        raise InputError(f"--control {path}: cannot be read as TOML ({error}).") from None
    kind = str(table.pop("kind", ""))
    if kind not in KINDS or kind == "none":
        raise InputError(
            f"--control {path}: kind must be one of {', '.join(k for k in KINDS if k != 'none')} (got {kind!r})."
        )
    bounds = Bounds.read(table.pop("bounds", {}), str(path))
    made = importlib.import_module(KINDS[kind][0]).from_table(table, str(path.resolve()), connect)
    with contextlib.suppress(AttributeError):
        made.bounds = bounds  # type: ignore[attr-defined]
    return made


def members(table: Mapping[str, Any], where: str, **wanted: tuple[type, Any]) -> dict[str, Any]:
    """Values of a TOML table by name: name -> (type, default; ... where it must be given). InputError names what is wrong."""
    unknown = set(table) - set(wanted)
    if unknown:
        raise InputError(f"{where}: {', '.join(sorted(unknown))} not known here. Known: {', '.join(wanted)}.")
    found = {}
    for name, (kind, default) in wanted.items():
        value = table.get(name, default)
        if value is ...:
            raise InputError(f"{where}: {name} is missing.")
        if name in table and not (isinstance(value, kind) or (kind is float and type(value) is int)):
            raise InputError(f"{where}: {name} must be a {kind.__name__} (got {unsaid(repr(value))}).")
        if name in table and kind is float and not -math.inf < value < math.inf:
            raise InputError(f"{where}: {name} must be a finite number (got {value}).")
        found[name] = value
    return found


def refused(reply: Any, where: str, what: str) -> LostError:
    """The error for an HTTP answer that is no success, in one line."""
    if reply.status in (401, 403):
        return LostError(
            f"{where}: HTTP {reply.status} when asked to {what}: the token is missing, expired or not allowed. "
            "Set STEELYARD_API_KEY or pass --api-key-file FILE."
        )
    return LostError(f"{where}: refused to {what} (HTTP {reply.status}: {reply.words or 'no text'}).")
