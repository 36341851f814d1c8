"""Who does what, and when roles change: pure functions, the same in the simulator and against a live endpoint.

baseline: :func:`next_phase`. online: :class:`CountRule` (the report's), :class:`EasyRule` (Dynamo's), :class:`BacklogRule`
and :class:`DemandRule` (ours), each by :func:`rule_of` from the ``thresholds{}`` of an answer. offline:
:func:`groups` (the report's) and :func:`order`. static: :func:`report_split` (the report's formula), :func:`balanced`.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Any, Protocol

import numpy as np

from loadgen.cluster.laws import Profile
from traces.errors import InputError
from traces.measures import Slo
from traces.records import Fleet, Floats, Ints, Sample

# --- baseline -------------------------------------------------------------------------------------------------------


def next_phase(prefill_since_s: float | None, decode_since_s: float | None) -> str | None:
    """Baseline: first in, first out. Which phase an idle worker takes: the one whose head has waited longest.

    Arguments: since when the head of each queue waits, None for an empty queue.
    """
    if prefill_since_s is None or decode_since_s is None:
        return "prefill" if prefill_since_s is not None else "decode" if decode_since_s is not None else None
    return "prefill" if prefill_since_s <= decode_since_s else "decode"


# --- online ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Queues:
    """What a policy sees of the servers at one instant: sums over the workers of a role; prompt tokens processed, of all.

    decode_counted: somebody says how many requests decode has, not its KV cache alone. decode_kv_share: of one worker's KV cache,
    summed over the workers; 0 where one of them does not tell it.
    """

    prefill_waiting: int = 0
    prefill_waiting_tokens: int = 0
    decode_waiting: int = 0
    decode_running: int = 0
    decode_context_tokens: int = 0
    prompt_tokens_total: int = 0
    decode_counted: bool = field(default=True, kw_only=True)
    decode_kv_share: float = field(default=0.0, kw_only=True)

    @classmethod
    def of(cls, samples: Sequence[Sample], processed: float | None = None) -> Queues:
        """Sums of one reading of every worker; what a server does not report counts as 0.

        Where it tells only how many it has in hand (Dynamo), those that do not run wait; of a decode worker that does not tell
        how many run (a router's word alone), all do. processed: what stands for the prompt tokens that the workers have
        counted, where the caller knows better.
        """
        prompts = waiting = waiting_tokens = waiting_answers = running = held = share = 0.0
        decode = counts = False
        for s in samples:
            prompts += s.prompt_tokens_total or 0
            wait, runs = s.waiting_requests, s.running_requests
            if wait is None and runs is None and s.role == "decode":
                wait, runs = 0.0, s.inflight_requests
            elif wait is None:
                wait = max(0.0, (s.inflight_requests or 0) - (runs or 0))
            if s.role == "prefill":
                waiting += wait
                waiting_tokens += s.waiting_tokens or 0
            elif s.role == "decode":
                waiting_answers += wait
                running += runs or 0
                held += s.kv_used_tokens or 0
                if s.kv_used_ratio is not None:
                    share += s.kv_used_ratio
                elif runs is not None or s.kv_used_tokens is not None:  # one of which nothing came holds nothing
                    share = math.nan
                decode = True
                counts = counts or s.running_requests is not None or s.inflight_requests is not None
        return cls(
            int(waiting),
            int(waiting_tokens),
            int(waiting_answers),
            int(running),
            int(held),
            int(prompts if processed is None else processed),
            decode_counted=counts or not decode,
            decode_kv_share=0.0 if math.isnan(share) else share,
        )

    def counted(self, mean_context: float) -> Queues:
        """The same, with as many sequences as the KV cache holds mean contexts where nobody counts them (Dynamo's frontend)."""
        if self.decode_counted:
            return self
        return replace(self, decode_running=round(self.decode_context_tokens / max(mean_context, 1.0)))


@dataclass(frozen=True, slots=True)
class State:
    """What a rule remembers from tick to tick. wish: "prefill" or "decode", where a worker is wanted, since when; moved:
    where the last one was sent, when; seen: what a rule of demand knows of the traffic so far."""

    wish: str = ""
    since_s: float = math.nan
    moved: str = ""
    moved_s: float = -math.inf
    seen: Demand | None = None


class OnlineRule(Protocol):
    """decide: one tick. fleet is the one asked for; changing counts workers that still drain or flip."""

    def decide(
        self, state: State, queues: Queues, fleet: Fleet, changing: int, now_s: float
    ) -> tuple[State, Fleet | None, str]:
        """(state, another fleet or None, why, also why not)."""
        ...


def _towards(fleet: Fleet, role: str, floor: tuple[int, int] = (1, 1)) -> Fleet | None:
    """One worker moved; None where that would leave the donors fewer than their floor (prefill, decode)."""
    step = 1 if role == "prefill" else -1
    if (role == "decode" and fleet.prefill + step < floor[0]) or (role == "prefill" and fleet.decode - step < floor[1]):
        return None
    return Fleet(fleet.prefill + step, fleet.decode - step, fleet.mixed)


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
        if target is None:
            return state, None, "the other role has no worker to spare" if role else "the queues are within the ratio"
        return state, target, f"{p} prompts and {d} answers wait"


@dataclass(frozen=True, slots=True)
class BacklogRule:
    """Our online rule: queues in seconds of work, hysteresis, dwell, cool-down, and a check of what the move would leave.

    Seconds of backlog: prefill (b + c E[n]) tokens / P; decode E[m] tau(B) / (B D) for each answer that waits or for
    which D workers have no place, with B the batch a worker runs. A worker moves to the stage whose backlog exceeds
    ``more_s`` and ``ratio`` times the other's for ``dwell_s``, if the donors are left with at most ``less_s`` and with less
    backlog than the receivers have, and, where the SLO limits TPOT, if the decode step after the move keeps it. A decode
    step over ``tpot_share`` of that limit counts as a backlog of its own. No role goes below its ``floor`` (prefill, decode).
    Workers already on their way count as arrived; for ``cool_s`` after a move nothing moves the other way, nor while a worker
    drains or flips (2 -> 1 -> 2 costs two flips and gains nothing).
    """

    laws: Profile
    mean_prompt: float
    mean_output: float
    slo: Slo = field(default_factory=Slo)
    more_s: float = 1.0
    ratio: float = 2.0
    dwell_s: float = 0.0
    cool_s: float = 5.0
    less_s: float = math.inf
    tpot_share: float = 1.0
    floor: tuple[int, int] = (1, 1)

    def prefill_s(self, queues: Queues, workers: int) -> float:
        """Seconds that ``workers`` need for the prompts that wait."""
        p = self.laws
        tokens = waiting_tokens(queues, self.mean_prompt)
        steps = max(tokens / p.max_batch_tokens, queues.prefill_waiting / p.max_batch_requests)
        steps = min(steps, max(1, queues.prefill_waiting))  # what is left of a prompt that is cut takes a step too
        square = tokens / max(steps, 1.0) if p.prefill_square == "step" else self.mean_prompt
        return (tokens * (p.b_s_per_token + p.c_s_per_token2 * square) + steps * p.a_s) / workers

    def step_s(self, batch: float) -> float:
        """Seconds of a decode step with a batch of mean contexts."""
        return self.laws.step_s(batch, batch * (self.mean_prompt + self.mean_output / 2))

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
        return limit is not None and self.step_s(batch) > limit * self.tpot_share

    def _move(self, queues: Queues, fleet: Fleet, wish: str) -> Fleet | None:
        """As many workers as leave the donors with less backlog than the receivers would have without them; None for none."""
        found: Fleet | None = None
        here = fleet
        while (there := _towards(here, wish, self.floor)) is not None:
            if wish == "prefill":
                has, leaves = self.prefill_s(queues, here.prefill), self.decode_s(queues, there.decode)
                fine = has > self.more_s and leaves * self.ratio < has and not self._slow(queues, there.decode)
            else:
                has, leaves = self.decode_s(queues, here.decode), self.prefill_s(queues, there.prefill)
                fine = (has > self.more_s and leaves * self.ratio < has) or (
                    self._slow(queues, here.decode) and leaves < self.more_s
                )
            if not fine or leaves > self.less_s:
                break
            found = here = there
        return found

    def decide(
        self, state: State, queues: Queues, fleet: Fleet, changing: int, now_s: float
    ) -> tuple[State, Fleet | None, str]:
        """See :class:`OnlineRule`."""
        queues = queues.counted(self.mean_prompt + self.mean_output / 2)
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
            why = "the backlogs are within the limits"
            if wish:
                why = f"{wish} could use a worker, " + (
                    "but one moved the other way a moment ago"
                    if back
                    else "but its donor would be left with more backlog"
                )
            return State("", math.nan, state.moved, state.moved_s, state.seen), None, why
        if state.wish != wish:
            state = replace(state, wish=wish, since_s=now_s)
        if now_s - state.since_s < self.dwell_s:
            return state, None, f"{wish} wants a worker, not long enough yet"
        why = f"{p:.2f} s of prompts and {d:.2f} s of answers wait" + (", decode steps over the limit" if slow else "")
        return State(moved=wish, moved_s=now_s), target, why


@dataclass(frozen=True, slots=True)
class Demand:
    """What has been seen of the traffic at an instant. arrived: prompt tokens so far, done or waiting. active: sequences in
    decode, running or waiting. rate, slow_rate: prompt tokens a second, smoothed over a short and a long memory; growth:
    sequences a second by which ``active`` changes, smoothed; slow_active: ``active`` over the long memory. since_s: when the
    first reading was; what is shorter ago than a memory is averaged evenly, so that the first reading weighs no more than
    another.
    """

    at_s: float
    arrived: float
    active: float
    rate: float = math.nan
    slow_rate: float = math.nan
    growth: float = 0.0
    slow_active: float = math.nan
    since_s: float = math.nan

    def next(self, at_s: float, arrived: float, active: float, memory_s: float) -> Demand:
        """With another reading."""
        dt = at_s - self.at_s
        if dt <= 0:
            return self
        # A counter that fell is a worker that went away, with what it had counted.
        rate, growth = max(0.0, arrived - self.arrived) / dt, (active - self.active) / dt
        since_s = self.at_s if math.isnan(self.since_s) else self.since_s
        if math.isnan(self.rate):
            return Demand(at_s, arrived, active, rate, rate, 0.0, active, since_s)

        def share(memory_s: float) -> float:
            return math.expm1(-dt / memory_s) / math.expm1((since_s - at_s) / memory_s)

        short, long = share(memory_s), share(LONG_MEMORY * memory_s)
        return Demand(
            at_s,
            arrived,
            active,
            self.rate + short * (rate - self.rate),
            self.slow_rate + long * (rate - self.slow_rate),
            self.growth - math.expm1(-dt / memory_s) * (growth - self.growth),
            self.slow_active + long * (active - self.slow_active),
            since_s,
        )


HARMONICS = 3
"""Sines and cosines of the clock in a :class:`Forecast` with a period."""

LONG_MEMORY = 8.0
"""The long memory of a :class:`Demand` is that many times the short one."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """A linear regression, by its numbers: what comes ``ahead_s`` later from what is seen now and when it is.

    rate, active: coefficients of :func:`forecast_features` for prompt tokens a second, and for sequences in decode. period_s: of
    the clock features, seconds from schedule zero; 0 has none.
    """

    rate: tuple[float, ...]
    active: tuple[float, ...]
    period_s: float = 0.0

    def of(self, seen: Demand) -> tuple[float, float]:
        """(prompt tokens a second, sequences in decode), not below 0."""
        x = forecast_features(seen, self.period_s)
        return (
            max(0.0, sum(a * b for a, b in zip(self.rate, x, strict=True))),
            max(0.0, sum(a * b for a, b in zip(self.active, x, strict=True))),
        )


def forecast_features(seen: Demand, period_s: float) -> list[float]:
    """What a :class:`Forecast` looks at: 1, both rates, sequences, their growth and slow mean, sines and cosines of the clock."""
    x = [1.0, seen.rate, seen.slow_rate, seen.active, seen.growth, seen.slow_active]
    if period_s:
        for k in range(1, HARMONICS + 1):
            turn = 2 * math.pi * k * seen.at_s / period_s
            x += [math.sin(turn), math.cos(turn)]
    return x


@dataclass(frozen=True, slots=True)
class DemandRule:
    """Our online rule by load: how busy each role will be when a worker that is asked now is there, for every split.

    Load of P prefill workers: (seconds of prefill work that arrive a second + backlog in seconds / ``clear_s``) / (P
    ``target``): a backlog is to be gone within ``clear_s``. Load of D decode workers: the largest of decode step /
    (``tpot_share`` of the TPOT limit), batch / most sequences, and the share of the KV cache (where the workers do not tell it,
    context / KV capacity), with the sequences expected
    ``ahead_s`` from now (those there and their growth, or by ``forecast``). Where a load reaches ``up``, and another split has
    a largest load that is ``gain`` lower (the check of what the move would leave), for ``dwell_s``, that split is asked for
    at once, however many workers it takes. No role goes below its ``floor``; for ``cool_s`` after a move, and while a worker
    drains or flips, nothing moves the other way. memory_s: over how long arrivals are averaged; before that nothing moves.
    """

    laws: Profile
    mean_prompt: float
    mean_output: float
    slo: Slo = field(default_factory=Slo)
    up: float = 1.0
    gain: float = 0.1
    target: float = 0.85
    clear_s: float = 2.0
    ahead_s: float = 2.0
    memory_s: float = 5.0
    tpot_share: float = 0.9
    dwell_s: float = 0.0
    cool_s: float = 5.0
    floor: tuple[int, int] = (1, 1)
    forecast: Forecast | None = None

    @property
    def token_s(self) -> float:
        """Seconds of a prefill worker a prompt token of mean length takes, in a full step."""
        mean = max(self.mean_prompt, 1.0)
        return self.laws.prompt_s(mean, self.laws.together(mean), mean) / mean

    @property
    def step_limit_s(self) -> float:
        """How long a decode step may take: of the TPOT limit, else of the E2E limit, else twice a lone step."""
        limit, whole = self.slo.limit("tpot"), self.slo.limit("e2e")
        if limit is None:
            alone = self.laws.step_s(1.0, self.mean_prompt + self.mean_output / 2)
            limit = max(alone, whole / self.mean_output) if whole is not None else 2 * alone
        return limit * self.tpot_share

    def loads(self, rate: float, active: float, queues: Queues, fleet: Fleet) -> tuple[float, float]:
        """(prefill, decode); 1 is a role that is just big enough. rate: prompt tokens a second."""
        return self._loads(rate, active, queues, fleet, self.token_s, self.step_limit_s)

    def _loads(
        self, rate: float, active: float, queues: Queues, fleet: Fleet, token_s: float, step_limit_s: float
    ) -> tuple[float, float]:
        """The same, for who asks about many fleets: token_s and step_limit_s are the rule's own."""
        p = self.laws
        backlog = waiting_tokens(queues, self.mean_prompt) * token_s
        prefill = (rate * token_s + backlog / self.clear_s) / (fleet.prefill * self.target)
        running, told = queues.decode_running, queues.decode_context_tokens
        context = told / running if told and running else self.mean_prompt + self.mean_output / 2
        batch = max(1.0, active / fleet.decode)
        held = min(batch, float(p.max_batch))
        kv = 0.0
        if p.kv_tokens:  # of each sequence, in caches: what a server reserves for it counts, too
            kv = queues.decode_kv_share / running if queues.decode_kv_share and running else context / p.kv_tokens
        decode = max(
            p.step_s(held, held * context) / step_limit_s,
            active / (fleet.decode * p.max_batch),
            active * kv / fleet.decode,
        )
        return prefill, decode

    def decide(
        self, state: State, queues: Queues, fleet: Fleet, changing: int, now_s: float
    ) -> tuple[State, Fleet | None, str]:
        """See :class:`OnlineRule`."""
        queues = queues.counted(self.mean_prompt + self.mean_output / 2)
        active = float(queues.decode_running + queues.decode_waiting)
        arrived = queues.prompt_tokens_total + waiting_tokens(queues, self.mean_prompt)
        seen = state.seen.next(now_s, arrived, active, self.memory_s) if state.seen else Demand(now_s, arrived, active)
        state = State(state.wish, state.since_s, state.moved, state.moved_s, seen)
        if not now_s - seen.since_s >= self.memory_s:
            return state, None, ""
        rate, later = self.forecast.of(seen) if self.forecast else (seen.rate, active + seen.growth * self.ahead_s)
        later = max(later, active)  # what is there now does not wait for a forecast

        token_s, step_limit_s = self.token_s, self.step_limit_s

        def worst(one: Fleet) -> float:
            return max(self._loads(rate, later, queues, one, token_s, step_limit_s))

        here, calm = worst(fleet), State("", math.nan, state.moved, state.moved_s, seen)
        if here < self.up:
            return calm, None, ""
        workers = fleet.prefill + fleet.decode
        splits = [Fleet(k, workers - k, fleet.mixed) for k in range(self.floor[0], workers - self.floor[1] + 1)]
        best = min(splits, key=lambda one: (worst(one), abs(one.prefill - fleet.prefill)), default=fleet)
        wish = "prefill" if best.prefill > fleet.prefill else "decode"
        back = state.moved and wish != state.moved and (changing or now_s < state.moved_s + self.cool_s)
        if best == fleet or worst(best) > here - self.gain or back:
            return calm, None, ""
        if state.wish != wish:
            state = replace(state, wish=wish, since_s=now_s)
        if now_s - state.since_s < self.dwell_s:
            return state, None, ""
        prefill, decode = self.loads(rate, later, queues, fleet)
        why = f"load of prefill {prefill:.2f} and decode {decode:.2f}, {worst(best):.2f} at most with {best}"
        return State(moved=wish, moved_s=now_s, seen=seen), best, why


def waiting_tokens(queues: Queues, mean_prompt: float) -> float:
    """Prompt tokens that wait; a server that counts requests only gets prompts of mean length."""
    return queues.prefill_waiting_tokens or queues.prefill_waiting * mean_prompt


@dataclass(frozen=True, slots=True)
class EasyRule:
    """NVIDIA Dynamo's planner in easy mode (ai-dynamo 1.6.1), read for a fixed number of workers.

    Prefill wants a worker at ``prefill_up`` x context of queued tokens a worker and can spare one below ``prefill_down``;
    decode at a KV use of ``decode_up`` and below ``decode_down``. Its two pools scale on their own; where the workers are
    given, one moves when a role wants it and the other can spare it without then wanting it back. context: tokens of the
    longest request. Thresholds: throughput mode; latency mode is 0.1, 0, 0.4, 0.1. Where the KV cache has no limit, the
    share of the batch stands for its use.
    """

    laws: Profile
    context: float
    prefill_up: float = 1.0
    prefill_down: float = 0.1
    decode_up: float = 1.0
    decode_down: float = 0.6

    def decide(
        self, state: State, queues: Queues, fleet: Fleet, changing: int, now_s: float
    ) -> tuple[State, Fleet | None, str]:
        """See :class:`OnlineRule`."""

        def queued(workers: int) -> float:
            return queues.prefill_waiting_tokens / (workers * self.context)

        def used(workers: int) -> float:
            if self.laws.kv_tokens:
                waits = queues.decode_waiting * self.context / 2 / self.laws.kv_tokens
                held = queues.decode_kv_share or queues.decode_context_tokens / self.laws.kv_tokens
                return (held + waits) / workers
            return (queues.decode_running + queues.decode_waiting) / (workers * self.laws.max_batch)

        p, d = queued(fleet.prefill), used(fleet.decode)
        target = None
        if p >= self.prefill_up and d < self.decode_down and fleet.decode > 1:
            target = _towards(fleet, "prefill") if used(fleet.decode - 1) < self.decode_up else None
        elif d > self.decode_up and p <= self.prefill_down and fleet.prefill > 1:
            target = _towards(fleet, "decode") if queued(fleet.prefill - 1) < self.prefill_up else None
        if changing:
            target = None
        return state, target, f"{p:.2f} contexts queued, {d:.0%} of the KV cache used" if target else ""


class Steering:
    """A rule with its state: what :func:`loadgen.cluster.simulate` and a live run ask each tick. moves: what it did, why;
    why: of its last answer, also where it moved nothing. The rule is shown the prompt tokens processed since the first tick, and
    is not asked where :func:`untold` says why not."""

    def __init__(self, rule: OnlineRule) -> None:
        self.rule = rule
        self.state = State()
        self.moves: list[tuple[float, Fleet, Fleet, str]] = []
        self.why = ""
        self._processed = 0.0
        self._counted: dict[str, tuple[float, float, str, float]] = {}
        self._routed, self._credit, self._alone = 0.0, 0.0, False

    def __call__(self, now_s: float, samples: Sequence[Sample], fleet: Fleet, changing: int) -> Fleet | None:
        """The fleet to ask for, or None."""
        self.why = untold(self.rule, samples, fleet)
        if self.why:
            return None
        queues = Queues.of(samples, self._processed_by(samples))
        self.state, target, self.why = self.rule.decide(self.state, queues, fleet, changing, now_s)
        if target is not None:
            self.moves.append((now_s, fleet, target, self.why))
        return target

    def _processed_by(self, samples: Sequence[Sample]) -> int:
        """Growth of each worker's own counter, less what it received: a decode engine counts every prompt again, and one that
        does not tell what it received (SGLang) counts for nothing. The router's counts where no worker had one in this tick and
        the one before; what it counted is taken, once, off the growth of the workers that tell again.

        A sum of counters would jump by a lifetime where a worker misses a page, or is found with what it did before.
        """
        now: dict[str, tuple[float, float, str]] = {}
        alone = not any(_counts(s) and s.role != "router" for s in samples)
        routers = {s.worker for s in samples if s.role == "router"}
        for s in samples:
            if s.prompt_tokens_total is not None:
                prompt, received = s.prompt_tokens_total, s.received_tokens_total or 0.0
                if s.worker in now:
                    prompt, received = now[s.worker][0] + prompt, now[s.worker][1] + received
                now[s.worker] = prompt, received, "" if _counts(s) else s.role
        routed = 0.0
        for worker, (prompt, received, again) in now.items():
            before, got, anew, already = self._counted.get(worker, (prompt, received, again, self._routed))
            if again and anew:  # in the same role since the tick before
                continue
            if prompt < before:  # the server began anew
                before, got = 0.0, 0.0
            grown = max(0.0, prompt - before - (received - got))
            if worker not in routers:
                known = min(grown, self._routed - already, self._credit)
                self._processed += grown - known
                self._credit -= known
            elif alone and self._alone:
                routed += grown
        self._processed += routed
        self._routed, self._credit, self._alone = self._routed + routed, self._credit + routed, alone
        self._counted |= {worker: (*held, self._routed) for worker, held in now.items()}
        return int(self._processed)


def untold(rule: OnlineRule, samples: Sequence[Sample], fleet: Fleet) -> str:
    """Why a rule cannot judge a reading, "" where it can: what nobody counts would look idle to it, and lose its workers.

    A worker of which nothing came has a sample without values (:meth:`loadgen.scrape.Scraper.read`). It is missed where those
    that tell are fewer than the fleet has: one that has left tells nothing either.
    """
    for role, workers in (("prefill", fleet.prefill), ("decode", fleet.decode)):
        told, waits, dark = 0, False, []
        for s in samples:
            if s.role == role:
                runs, in_hand = s.running_requests is not None, s.inflight_requests is not None
                wait = s.waiting_requests is not None or (in_hand and (runs or role == "prefill"))
                waits = waits or wait
                if wait or runs or in_hand or s.waiting_tokens is not None or s.kv_used_tokens is not None:
                    told += 1
                else:
                    dark.append(s.worker)
        if workers and not told:
            return f"no {role} worker tells what it holds, nothing is moved"
        if dark and told < workers:
            names = ", ".join(dark[:3]) + (", .." if len(dark) > 3 else "")
            return f"{len(dark)} of {told + len(dark)} {role} workers tell nothing ({names}), nothing is moved"
        if workers and not waits and isinstance(rule, CountRule):
            return f"nobody tells how many requests wait for {role}, nothing is moved"
    if isinstance(rule, DemandRule) and not any(_counts(s) for s in samples):
        return "nobody counts prompt tokens, nothing is moved"
    return ""


def _counts(s: Sample) -> bool:
    """Does its counter tell prompts that arrived, and not those of another worker once more?"""
    return s.prompt_tokens_total is not None and (s.role != "decode" or s.received_tokens_total is not None)


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


def predicted(prompt: Ints, past_prompt: Ints, past_output: Ints) -> Ints:
    """Answer lengths to expect of prompts: the mean answer of those past requests whose prompts were nearest in length.

    As many neighbours as the square root of the history, so that more history is both finer and steadier. What an order by
    answer length can be deployed with; how well it foretells is in the data (often hardly: see its rank correlation).
    """
    at = np.argsort(past_prompt, kind="stable")
    lengths, sums = past_prompt[at], np.concatenate([[0], np.cumsum(past_output[at])])
    k = max(1, math.isqrt(len(at)))
    left = np.searchsorted(lengths, prompt) + np.searchsorted(lengths, prompt, side="right")
    first = np.clip(left // 2 - k // 2, 0, len(at) - k)
    mean: Ints = np.maximum(1, np.rint((sums[first + k] - sums[first]) / k)).astype(np.int64)
    return mean


def rank_correlation(one: Ints, other: Ints) -> float:
    """Spearman's, ties at their mean rank; 0 where one of them does not vary."""

    def ranks(values: Ints) -> Floats:
        _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
        ends = np.cumsum(counts)
        mean: Floats = (ends - (counts - 1) / 2)[which]
        return mean

    a, b = ranks(one), ranks(other)
    spread = float(a.std() * b.std())
    return float(((a - a.mean()) * (b - b.mean())).mean() / spread) if spread else 0.0


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
    mean = float(np.mean(prompt))
    step = laws.step_s(float(batch), batch * (mean + float(np.mean(output)) / 2))
    first = float(np.sum(laws.prompt_s(prompt.astype(float), laws.together(mean), mean)))
    second = float(np.sum(output)) * step / batch
    return _split(round(first / (first + second) * gpus), gpus)


# --- a rule as a table ----------------------------------------------------------------------------------------------

RULES: dict[str, type[DemandRule] | type[BacklogRule]] = {"demand": DemandRule, "backlog": BacklogRule}
"""Rules that an answer's ``thresholds{}`` can name."""


def table_of(rule: DemandRule | BacklogRule) -> dict[str, Any]:
    """The numbers of a rule: all that :func:`rule_of` needs, as JSON can hold it."""
    values = asdict(rule)
    values["laws"], values["slo"] = rule.laws.to_toml(), str(rule.slo)
    values["floor"] = {"prefill": rule.floor[0], "decode": rule.floor[1]}
    if math.isinf(values.get("less_s", 0.0)):
        values["less_s"] = None
    return {"rule": "demand" if isinstance(rule, DemandRule) else "backlog"} | values


def rule_of(table: Mapping[str, Any], where: str) -> DemandRule | BacklogRule:
    """A rule from the table of an answer or a file. InputError names the key that is wrong; other keys are passed over."""
    kind = RULES.get(str(table.get("rule")))
    if kind is None:
        raise InputError(f"{where}: rule must be one of {', '.join(RULES)} (got {table.get('rule')!r}).")
    values: dict[str, Any] = {}
    for f in fields(kind):
        value = table.get(f.name)
        if value is None:
            if f.default is MISSING and f.default_factory is MISSING:
                raise InputError(f"{where}: {f.name} is missing from the thresholds.")
            continue
        try:
            if f.name == "laws":
                values[f.name] = Profile.from_table(tomllib.loads(str(value)), where)
            elif f.name == "slo":
                values[f.name] = Slo.parse(value) if value else Slo()
            elif f.name == "floor":
                floor = Fleet.of(value)
                values[f.name] = floor.prefill, floor.decode
            elif f.name == "forecast":
                rate, active = (tuple(float(x) for x in value[key]) for key in ("rate", "active"))
                period = float(value.get("period_s", 0.0))
                length = len(forecast_features(Demand(0.0, 0.0, 0.0), period))
                if (
                    len(rate) != length
                    or len(active) != length
                    or not all(map(math.isfinite, (*rate, *active, period)))
                ):
                    raise ValueError
                values[f.name] = Forecast(rate, active, period)
            else:
                values[f.name] = float(value)
                if not math.isfinite(values[f.name]):
                    raise ValueError
        except (ArithmeticError, TypeError, ValueError, KeyError, tomllib.TOMLDecodeError):
            raise InputError(f"{where}: {f.name} of the thresholds cannot be read (got {value!r:.80}).") from None
        except InputError as error:
            raise InputError(f"{where}: {f.name} of the thresholds: {error}") from None
    return kind(**values)
