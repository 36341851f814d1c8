"""Who does what, and when roles change: pure functions, the same in the simulator and against a live endpoint.

baseline: :func:`next_phase`. online: :class:`CountRule` (the report's) and :class:`BacklogRule` (ours). offline:
:func:`groups` (the report's) and :func:`order`. static: :func:`report_split` (the report's formula), :func:`balanced`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from loadgen.cluster.laws import Profile
from traces.measures import Slo
from traces.records import Fleet, Ints, Sample

# --- baseline -------------------------------------------------------------------------------------------------------


def next_phase(prefill_since_s: float | None, decode_since_s: float | None) -> str | None:
    """Baseline: first in, first out. Which phase an idle worker takes: the one whose head has waited longest.

    Arguments: since when the head of each queue waits, None for an empty queue.
    """
    if prefill_since_s is None or decode_since_s is None:
        return "prefill" if prefill_since_s is not None else "decode" if decode_since_s is not None else None
    return "prefill" if prefill_since_s <= decode_since_s else "decode"


def _step_s(laws: Profile, batch: float, context: float) -> float:
    """Seconds of a decode step with a batch of sequences of one context each."""
    knee = laws.knee_s * max(0.0, batch - laws.knee_batch) if laws.knee_batch else 0.0
    return laws.c0_s + batch * (laws.c1_s + laws.c2_s * context) + knee


# --- online ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Queues:
    """What a policy sees of the servers at one instant: sums over the workers of a role."""

    prefill_waiting: int = 0
    prefill_waiting_tokens: int = 0
    decode_waiting: int = 0
    decode_running: int = 0
    decode_context_tokens: int = 0

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Queues:
        """Sums of one reading of every worker; what a server does not report counts as 0."""
        total = dict.fromkeys(("pw", "pt", "dw", "dr", "dc"), 0.0)
        for s in samples:
            if s.role == "prefill":
                total["pw"] += s.waiting_requests or 0
                total["pt"] += s.waiting_tokens or 0
            elif s.role == "decode":
                total["dw"] += s.waiting_requests or 0
                total["dr"] += s.running_requests or 0
                total["dc"] += s.kv_used_tokens or 0
        return cls(*(int(v) for v in total.values()))


@dataclass(frozen=True, slots=True)
class State:
    """What a rule remembers from tick to tick. wish: "prefill" or "decode", where a worker is wanted, since when; moved:
    where the last one was sent, when."""

    wish: str = ""
    since_s: float = math.nan
    moved: str = ""
    moved_s: float = -math.inf


class OnlineRule(Protocol):
    """decide: one tick. fleet is the one asked for; changing counts workers that still drain or flip."""

    def decide(
        self, state: State, queues: Queues, fleet: Fleet, changing: int, now_s: float
    ) -> tuple[State, Fleet | None, str]:
        """(state, another fleet or None, why)."""
        ...


def _towards(fleet: Fleet, role: str) -> Fleet | None:
    """One worker moved; None where that would leave a role without any."""
    step = 1 if role == "prefill" else -1
    if fleet.prefill + step < 1 or fleet.decode - step < 1:
        return None
    return replace(fleet, prefill=fleet.prefill + step, decode=fleet.decode - step)


@dataclass(frozen=True, slots=True)
class CountRule:
    """The report's online rule: if one queue holds more than ``ratio`` times the requests of the other, move one GPU there.

    Counts of waiting requests, one move a tick, no memory, at least one worker a role.
    """

    ratio: float = 1.5

    def decide(
        self, state: State, queues: Queues, fleet: Fleet, changing: int, now_s: float
    ) -> tuple[State, Fleet | None, str]:
        """See :class:`OnlineRule`."""
        p, d = queues.prefill_waiting, queues.decode_waiting
        role = "prefill" if p > self.ratio * d else "decode" if d > self.ratio * p else ""
        target = _towards(fleet, role) if role else None
        return state, target, f"{p} prompts and {d} answers wait" if target else ""


@dataclass(frozen=True, slots=True)
class BacklogRule:
    """Our online rule: queues in seconds of work, hysteresis, dwell, cool-down, and a check of what the move would leave.

    Seconds of backlog: prefill (b + c E[n]) tokens / P; decode E[m] tau(B) / (B D) for each answer that waits or for
    which D workers have no place, with B the batch a worker runs. A worker moves to the stage whose backlog exceeds
    ``more_s`` and ``ratio`` times the other's for ``dwell_s``, if the donors are left with less backlog than the
    receivers have, and, where the SLO limits TPOT, if the decode step after the move keeps it. A decode step over that
    limit counts as a backlog of its own. Workers already on their way count as arrived; for ``cool_s`` after a move
    nothing moves the other way, nor while a worker drains or flips (2 -> 1 -> 2 costs two flips and gains nothing).
    """

    laws: Profile
    mean_prompt: float
    mean_output: float
    slo: Slo = field(default_factory=Slo)
    more_s: float = 1.0
    ratio: float = 2.0
    dwell_s: float = 0.0
    cool_s: float = 5.0

    def prefill_s(self, queues: Queues, workers: int) -> float:
        """Seconds that ``workers`` need for the prompts that wait."""
        p = self.laws
        tokens = queues.prefill_waiting_tokens
        steps = max(tokens / p.max_batch_tokens, queues.prefill_waiting / p.max_batch_requests)
        steps = min(steps, queues.prefill_waiting)
        return (tokens * (p.b_s_per_token + p.c_s_per_token2 * self.mean_prompt) + steps * p.a_s) / workers

    def step_s(self, batch: float) -> float:
        """Seconds of a decode step with a batch of mean contexts."""
        return _step_s(self.laws, batch, self.mean_prompt + self.mean_output / 2)

    def decode_s(self, queues: Queues, workers: int) -> float:
        """Seconds until ``workers`` have worked off the answers that wait or that they have no place for."""
        cap = self.laws.max_batch
        over = queues.decode_waiting + max(0, queues.decode_running - workers * cap)
        batch = min(max(1.0, queues.decode_running / workers), cap)
        return over * self.mean_output * self.step_s(batch) / (batch * workers)

    def _slow(self, queues: Queues, workers: int) -> bool:
        """Would the decode step of this many workers break the TPOT limit?"""
        limit = self.slo.limit("tpot")
        batch = min((queues.decode_running + queues.decode_waiting) / workers, self.laws.max_batch)
        return limit is not None and self.step_s(batch) > limit

    def _move(self, queues: Queues, fleet: Fleet, wish: str) -> Fleet | None:
        """As many workers as leave the donors with less backlog than the receivers would have without them; None for none."""
        found: Fleet | None = None
        here = fleet
        while (there := _towards(here, wish)) is not None:
            if wish == "prefill":
                has, leaves = self.prefill_s(queues, here.prefill), self.decode_s(queues, there.decode)
                fine = has > self.more_s and leaves * self.ratio < has and not self._slow(queues, there.decode)
            else:
                has, leaves = self.decode_s(queues, here.decode), self.prefill_s(queues, there.prefill)
                fine = (has > self.more_s and leaves * self.ratio < has) or (
                    self._slow(queues, here.decode) and leaves < self.more_s
                )
            if not fine:
                break
            found = here = there
        return found

    def decide(
        self, state: State, queues: Queues, fleet: Fleet, changing: int, now_s: float
    ) -> tuple[State, Fleet | None, str]:
        """See :class:`OnlineRule`."""
        p, d = self.prefill_s(queues, fleet.prefill), self.decode_s(queues, fleet.decode)
        slow = self._slow(queues, fleet.decode)
        wish = ""
        if p > self.more_s and p > self.ratio * d and not slow:
            wish = "prefill"
        elif (d > self.more_s and d > self.ratio * p) or (slow and p < self.more_s):
            wish = "decode"
        back = state.moved and wish != state.moved and (changing or now_s < state.moved_s + self.cool_s)
        target = self._move(queues, fleet, wish) if wish and not back else None
        if target is None:
            return replace(state, wish="", since_s=math.nan), None, ""
        if state.wish != wish:
            state = replace(state, wish=wish, since_s=now_s)
        if now_s - state.since_s < self.dwell_s:
            return state, None, ""
        why = f"{p:.2f} s of prompts and {d:.2f} s of answers wait" + (", decode steps over the limit" if slow else "")
        return State(moved=wish, moved_s=now_s), target, why


class Steering:
    """A rule with its state: what :func:`loadgen.cluster.simulate` and a live run ask each tick. moves: what it did, why."""

    def __init__(self, rule: OnlineRule) -> None:
        self.rule = rule
        self.state = State()
        self.moves: list[tuple[float, Fleet, Fleet, str]] = []

    def __call__(self, now_s: float, samples: Sequence[Sample], fleet: Fleet, changing: int) -> Fleet | None:
        """The fleet to ask for, or None."""
        self.state, target, why = self.rule.decide(self.state, Queues.of(samples), fleet, changing, now_s)
        if target is not None:
            self.moves.append((now_s, fleet, target, why))
        return target


# --- offline --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Dispatch:
    """A client's own order: batch after batch, each begun when the one before has ended.

    batches: (positions in order of dispatch, fleet to ask for at its beginning or None). start_s: when the first may
    begin, seconds from schedule zero. in_flight: at most that many requests at once (0: a whole batch).
    """

    batches: tuple[tuple[tuple[int, ...], Fleet | None], ...]
    start_s: float = 0.0
    in_flight: int = 0


ORDERS = ("arrival", "shortest-prompt", "longest-prompt", "longest-decode", "two-stage")


def order(how: str, prompt: Ints, output: Ints, laws: Profile) -> list[int]:
    """Positions in the order of dispatch.

    longest-decode: by answer length, which is an oracle where it is the recorded one. two-stage: Johnson's rule, optimal
    for two machines in a row: first those whose prefill is the shorter stage, shortest prefill first; then the rest,
    longest decode first. Stage times are those of a request alone.
    """
    if how == "arrival":
        return list(range(len(prompt)))
    if how in ("shortest-prompt", "longest-prompt"):
        return [int(i) for i in np.argsort(prompt if how == "shortest-prompt" else -prompt, kind="stable")]
    if how == "longest-decode":
        return [int(i) for i in np.argsort(-output, kind="stable")]
    if how != "two-stage":
        raise ValueError(f"unknown order {how!r}; known: {', '.join(ORDERS)}")
    first = laws.a_s + laws.b_s_per_token * prompt + laws.c_s_per_token2 * prompt.astype(float) ** 2
    second = output * (laws.c0_s + laws.c1_s)
    key = np.where(first < second, first, -second)
    return [int(i) for i in np.lexsort((key, first >= second))]


def groups(prompt: Ints, spread: float = 1.25) -> list[list[int]]:
    """The report's offline batches: ascending prompt length, a batch's longest at most ``spread`` times its first."""
    batches: list[list[int]] = []
    for i in np.argsort(prompt, kind="stable").tolist():
        if batches and prompt[i] <= spread * prompt[batches[-1][0]]:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


# --- static ---------------------------------------------------------------------------------------------------------


def _split(prefill: int, gpus: int) -> Fleet:
    prefill = min(max(1, prefill), gpus - 1)
    return Fleet(prefill, gpus - prefill)


def report_split(prompt: Ints, output: Ints, gpus: int) -> Fleet:
    """The report's formula: P = G 2h/(1+h), rounded down, with h = E[n/(n+m)].

    It forgets that a decode token costs more time than a prompt token.
    """
    h = float(np.mean(prompt / (prompt + output)))
    return _split(int(2 * h / (1 + h) * gpus), gpus)


def balanced(prompt: Ints, output: Ints, laws: Profile, gpus: int) -> Fleet:
    """Workers in proportion to the work of each stage; decode at the batch its workers can hold, at least one."""
    batch = min(laws.max_batch, 64)
    step = _step_s(laws, batch, float(np.mean(prompt)) + float(np.mean(output)) / 2)
    first = float(np.sum(laws.b_s_per_token * prompt + laws.c_s_per_token2 * prompt.astype(float) ** 2))
    first += laws.a_s * max(len(prompt) / laws.max_batch_requests, float(np.sum(prompt)) / laws.max_batch_tokens)
    second = float(np.sum(output)) * step / batch
    return _split(round(first / (first + second) * gpus), gpus)
