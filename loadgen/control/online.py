"""The online controller: a policy on live readings, applied through a control, every decision with its reason kept."""

from __future__ import annotations

import contextlib
import math
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from loadgen.control import STEP_S, Control, FailedError, LostError, Standing, has_grown, look_of
from traces.errors import EndpointError, InputError, StoreError
from traces.records import Decision, Fleet, FleetChange, Observations, Sample

LOOK = 0.05
"""A change that is not in force yet is looked for after that share of its age, and not sooner than as many seconds, or than the
control wants."""


class Steering(Protocol):
    """A rule with its state, asked each tick (:class:`loadgen.policy.Steering`). why: of the last answer, also of None."""

    why: str

    def __call__(self, now_s: float, samples: Sequence[Sample], fleet: Fleet, changing: int) -> Fleet | None:
        """Another fleet, or None."""
        ...


class Planned:
    """Not a rule: fleets at set times, to see what a change costs. changes: (at_s, fleet)."""

    def __init__(self, changes: Sequence[tuple[float, Fleet]]) -> None:
        self._left = sorted(changes, key=lambda change: change[0])
        self.why = ""

    def __call__(self, now_s: float, samples: Sequence[Sample], fleet: Fleet, changing: int) -> Fleet | None:
        """The fleet whose time has come, once the change before it is in force."""
        if not self._left or now_s < self._left[0][0]:
            self.why = "the time of the next change has not come" if self._left else "no change is left"
            return None
        if changing:
            self.why = "the change before is not in force yet"
            return None
        at_s, wanted = self._left.pop(0)
        self.why = f"asked for at {at_s:g} s"
        return wanted


class Decisions:
    """Decisions as they are made, repeats counted: :meth:`add` hands on each when another follows, ``flush`` the last."""

    def __init__(self, on_decision: Callable[[Decision], None]) -> None:
        self._on_decision = on_decision
        self._last: Decision | None = None

    def add(self, decision: Decision) -> bool:
        """Count it with the one before if it says the same (numbers aside); is it another?"""
        last = self._last
        if last is not None and decision.action not in ("move", "refused") and _same(last) == _same(decision):
            self._last = replace(last, until_s=decision.at_s, repeats=last.repeats + 1)
            return False
        self.flush()
        self._last = decision
        return True

    def flush(self) -> None:
        """Hand on the last."""
        if self._last is not None:
            self._on_decision(self._last)
            self._last = None


def _same(decision: Decision) -> tuple[Any, ...]:
    return decision.action, decision.before, decision.after, re.sub(r"\d+(\.\d+)?", "#", decision.reason)


class Controller:
    """Runs a policy against a live endpoint in a thread of its own, off the request path; a context manager.

    read() gives one reading of all workers. zero: where seconds count from, on the monotonic clock. speed: model seconds per
    second (of the reference endpoint): the rule is asked every tick_s model seconds and sees model time. on_change gets every
    change when it is in force, or with ``ready_s`` NaN at the end, when it failed or another
    overtook it. on_decision gets every decision, those that repeat
    counted together; on_said a line when the decision is another one; on_standing what the control says at every tick.
    Between ticks a change on its way is looked for (:data:`LOOK`): what it took is known finer than the ticks are apart.
    Nothing is moved while the last reading is older than stale_s seconds, nor when ``most_per_hour`` moves were made
    within the last hour, of however many workers. missed: ticks without a reading.
    """

    def __init__(
        self,
        control: Control,
        read: Callable[[], Sequence[Sample]],
        steering: Steering,
        zero: float,
        on_change: Callable[[FleetChange], None],
        *,
        on_decision: Callable[[Decision], None] = lambda decision: None,
        on_said: Callable[[Decision], None] = lambda decision: None,
        on_standing: Callable[[Standing], None] = lambda standing: None,
        tick_s: float = 1.0,
        speed: float = 1.0,
        stale_s: float = 10.0,
        most_per_hour: float = math.inf,
    ) -> None:
        self.missed = 0
        self.moves = 0
        self._control, self._read, self._steering, self._zero = control, read, steering, zero
        self._on_change, self._tick_s, self._speed = on_change, tick_s / speed, speed
        self._decisions, self._on_said, self._on_standing = Decisions(on_decision), on_said, on_standing
        self._stale_s, self._most_per_hour = stale_s, most_per_hour
        self._moved: deque[float] = deque()
        self._fresh_s = 0.0  # the controller's own beginning: a server that never answers goes stale too
        self._fleet: Fleet | None = None
        self._pending: list[FleetChange] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._main, name="steelyard-controller", daemon=True)

    def __enter__(self) -> Controller:
        self._fresh_s = self._now()
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        with contextlib.suppress(RuntimeError):  # Ctrl-C came before it was started
            self._thread.join(STEP_S + 30)  # it may be asking for a fleet, behind a step of the change before
        with contextlib.suppress(EndpointError):  # a change that settles in the last tick is still seen
            self._arrived()
        self._hand_on(math.nan)
        self._decisions.flush()

    def _now(self) -> float:
        return time.monotonic() - self._zero

    def _main(self) -> None:
        when = self._zero + self._tick_s
        while not self._stop.wait(max(0.0, min(when - time.monotonic(), self._look_s(), threading.TIMEOUT_MAX))):
            tick = time.monotonic() >= when
            try:
                if tick:
                    self._tick()
                else:
                    self._arrived()
            except (EndpointError, InputError) as error:
                if not tick and not isinstance(
                    error, FailedError
                ):  # said at the tick, if it lasts; that it failed is said once
                    continue
                self.missed += tick
                age = self._now() - self._fresh_s
                if isinstance(error, LostError):
                    self._decide("refused", None, str(error))
                elif age > self._stale_s:
                    self._decide("stale", None, f"no reading for {age:.0f} s, nothing is moved ({error})")
            except Exception as error:  # a fault of the rule or of an engine's answer must not end this thread unseen
                self._decide("hold", None, f"this tick failed ({type(error).__name__}: {error}), nothing is moved")
            if tick:
                when = max(when + self._tick_s, time.monotonic())

    def _look_s(self) -> float:
        """Seconds until a change on its way is looked for again."""
        if not self._pending:
            return math.inf
        return max(look_of(self._control), LOOK * max(1.0, self._now() - self._pending[-1].asked_s))

    def _arrived(self) -> tuple[Fleet | None, int]:
        """(fleet asked for, workers on their way) as the endpoint says; changes that are in force now are handed on."""
        try:
            standing = self._control.get()
        except FailedError:  # said once: the next answer has nothing on its way, as if the change were done
            self._hand_on(math.nan)
            raise
        self._on_standing(standing)
        at = self._now()
        self._pending = [
            replace(c, joined_s=at) if math.isnan(c.joined_s) and has_grown(standing.fleet, c.after) else c
            for c in self._pending
        ]
        if not standing.changing and self._pending and standing.fleet == self._pending[-1].after:
            self._hand_on(at)
        return standing.aimed, standing.changing

    def _hand_on(self, ready_s: float) -> None:
        """All that is pending, the last in force since ready_s: one that was overtaken never was, whatever it asked for."""
        for change in self._pending[:-1]:
            self._on_change(replace(change, joined_s=math.nan))
        for change in self._pending[-1:]:
            self._on_change(replace(change, ready_s=ready_s))
        self._pending.clear()

    def _tick(self) -> None:
        asked, changing = self._arrived()
        self._fleet = asked or self._fleet
        samples = self._read()
        now = self._now()
        if not samples:
            age = now - self._fresh_s
            if age > self._stale_s:
                self._decide("stale", None, f"no reading for {age:.0f} s, nothing is moved")
            self.missed += 1
            return
        self._fresh_s = now
        if asked is None:
            self._decide("hold", None, "a role is without a worker, or the fleet in force is not known")
            return
        target = self._steering(now * self._speed, samples, asked, changing)
        why = self._steering.why
        if target is None:
            self._decide("hold", None, why or "nothing asks for a move")
            return
        while self._moved and now - self._moved[0] > 3600:
            self._moved.popleft()
        if len(self._moved) + 1 > self._most_per_hour:
            self._decide("cap", target, f"{self._most_per_hour:g} moves an hour are made, this one is not: {why}")
            return
        if self._stop.is_set():  # since the reading: who has us may be putting the old fleet back
            return
        try:
            self._control.ask(target)
        except (EndpointError, InputError) as error:
            if isinstance(error, EndpointError):  # made in part, perhaps, and taken back: that is no less of a move
                self._moved.append(now)
            self._decide("refused", target, f"{error} Wanted because: {why}")
            return
        self._moved.append(now)
        self.moves += 1
        self._decide("move", target, why)
        self._pending.append(FleetChange(now, math.nan, asked, target, why))

    def _decide(self, action: str, after: Fleet | None, reason: str) -> None:
        now = self._now()
        decision = Decision(now, now, action, self._fleet, after, reason, 1)
        if self._decisions.add(decision):
            self._on_said(decision)


class Ledger:
    """Stores what a controller does in a thread of its own: a database that is away, or says nothing, holds no decision up.

    What cannot be stored is tried again each second, and say gets one line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._given, self._stored = say, 0, 0
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._main, name="steelyard-ledger", daemon=True)
        self._thread.start()

    def put(self, write: Callable[[], None]) -> None:
        """Hand over what stores a row; never blocks."""
        self._given += 1
        self._queue.put(write)

    def close(self, patience_s: float) -> int:
        """Wait until all is stored, ``patience_s`` at most; returns how many are not."""
        self._queue.put(None)
        self._thread.join(patience_s)
        return self._given - self._stored

    def _main(self) -> None:
        while (write := self._queue.get()) is not None:
            said = False
            while not self._done(write, said):
                said = True
                time.sleep(1.0)
            self._stored += 1

    def _done(self, write: Callable[[], None], said: bool) -> bool:
        try:
            write()
        except StoreError as error:
            if not said:
                self._say(f"{error} The controller goes on; its decisions are stored when it is back.")
            return False
        return True


def measured(
    changes: Sequence[FleetChange], pieces: Iterable[Observations], readings: Sequence[Sample]
) -> list[FleetChange]:
    """The changes with what they cost, from a run's rows, in any pieces, and readings.

    First served is as fine as the readings are apart: the first in which a worker that had not the role when the change was
    asked for has it and has done work in it.
    """
    flights, failed = [0] * len(changes), [0] * len(changes)
    longest = [-math.inf] * len(changes)  # wait of those that had ended before
    waits: list[list[float]] = [[] for _ in changes]
    for rows in pieces:
        end = np.fmax(rows.last_token_s, rows.sent_s)
        sent, ok = ~np.isnan(rows.sent_s), rows.ok
        wait = rows.first_token_s - rows.sent_s
        for k, change in enumerate(changes):
            ready = change.ready_s if change.ready_s == change.ready_s else math.inf
            under_way = sent & (rows.sent_s <= ready) & ((end >= change.asked_s) | ~ok)
            # A request that failed has no end; it counts if it was sent at most a minute before.
            under_way &= ok | (rows.sent_s >= change.asked_s - 60)
            longest[k] = max(longest[k], float(wait[ok & (end < change.asked_s)].max(initial=-math.inf)))
            waits[k] += wait[under_way & ok].tolist()
            flights[k] += int(under_way.sum())
            failed[k] += int((under_way & ~ok).sum())
    return [
        replace(
            change,
            first_served_s=_first_served(change, readings),
            in_flight=flights[k],
            failed=failed[k],
            slowed=sum(w > longest[k] for w in waits[k]) if longest[k] > -math.inf else -1,
        )
        for k, change in enumerate(changes)
    ]


def _first_served(change: FleetChange, readings: Sequence[Sample]) -> float:
    grown = {r for r in ("prefill", "decode") if getattr(change.after, r) > getattr(change.before, r)}
    last: dict[str, Sample] = {}
    had: dict[str, set[str]] = {"prefill": set(), "decode": set()}
    for s in sorted(readings, key=lambda s: s.at_s):
        if s.at_s <= change.asked_s:
            for workers in had.values():
                workers.discard(s.worker)
            if s.role in had:
                had[s.role].add(s.worker)
        elif s.role in grown and s.worker not in had[s.role]:
            known = last.get(s.worker)
            done = [
                (getattr(s, name) or 0.0) - ((getattr(known, name) or 0.0) if known is not None else 0.0)
                for name in ("steps_total", "prompt_tokens_total", "output_tokens_total", "finished_total")
            ]
            if (s.running_requests or 0) > 0 or max(done) > 0:
                return s.at_s
        last[s.worker] = s
    return math.nan
