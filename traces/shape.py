"""Pure functions from schedule to schedule, and schedules from nothing. What they change stands in ``changes``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from traces.errors import InputError
from traces.records import Floats, Ints, Schedule

ARRIVALS = ("poisson", "uniform", "constant", "gamma", "burst")


MOST_TOKENS = 2**31 - 1
"""Of a request, prompt and answer each: what a database's column holds."""


def head(schedule: Schedule, n: int) -> Schedule:
    """The first n requests."""
    if n >= len(schedule):
        return schedule
    return _changed(schedule.take(np.arange(n)), f"first {n} of {len(schedule)} requests")


def piece(schedule: Schedule, start: int, end: int) -> Schedule:
    """Requests start to end (exclusive), counted from 0 in order of due time, and from the first one's time."""
    taken = schedule.take(np.arange(start, min(end, len(schedule))))
    if not len(taken):
        raise InputError(f"no request is between {start} and {end} (the trace has {len(schedule)}).")
    taken = replace(taken, due_s=taken.due_s - taken.due_s[0])
    return _changed(taken, f"requests {start} to {start + len(taken)} of {len(schedule)}")


def window(schedule: Schedule, start_s: float, end_s: float) -> Schedule:
    """Requests due in [start, end), counted from the window's start."""
    inside = (schedule.due_s >= start_s) & (schedule.due_s < end_s)
    if not inside.any():
        raise InputError(
            f"no request is due between {start_s:g} and {end_s:g} s (the trace spans {schedule.span_s:.6g} s)."
        )
    piece = schedule.take(inside)
    return _changed(replace(piece, due_s=piece.due_s - start_s), f"window {start_s:g} to {end_s:g} s")


def joined(parts: Sequence[Schedule], name: str, of: int, rate_per_s: float | None) -> Schedule:
    """Windows of a longer schedule one after the other, a window's mean gap between them, at the mean rate of the whole.

    of: requests of the whole. rate_per_s: None leaves the windows' own. They keep their gaps, or busy hours would be as busy as
    the mean of the windows makes them: what is missing of the time is idle between them; where they take too much, the longest
    gaps are cut, in which least happens.
    """
    gaps = np.concatenate([np.append(np.diff(one.due_s), one.span_s / max(1, len(one) - 1)) for one in parts])[:-1]
    if rate_per_s is not None and 0 < rate_per_s < math.inf and len(parts) > 1:
        missing = len(gaps) / rate_per_s - float(gaps.sum())
        if missing > 0:
            gaps[np.cumsum([len(one) for one in parts])[:-1] - 1] += missing / (len(parts) - 1)
        else:
            gaps = _cut(gaps, -missing)
    prompt, output = (np.concatenate([getattr(one, c) for one in parts]) for c in ("prompt_tokens", "output_tokens"))
    change = f"{len(parts)} windows of {len(parts[0])} requests of {of}"
    made = Schedule(name, np.arange(len(prompt)), np.cumsum(np.append(0.0, gaps)), prompt, output)
    return replace(made if rate_per_s is None else to_rate(made, rate_per_s), changes=(change,))


def _cut(gaps: Floats, by_s: float) -> Floats:
    """The longest gaps cut to one length, so that all are shorter by ``by_s`` together."""
    longest = np.sort(gaps)[::-1]
    # Cutting the k longest to the length of the next one takes their sum less k of that.
    takes = np.cumsum(longest) - np.arange(1, len(longest) + 1) * np.append(longest[1:], 0.0)
    k = min(int(np.searchsorted(takes, by_s)) + 1, len(longest))
    return np.minimum(gaps, max(0.0, (float(longest[:k].sum()) - by_s) / k))


def middle(of: int, width: int, part: int, parts: int) -> int:
    """Where a window of ``width`` requests begins that stands in the middle of the part-th of equal parts of ``of`` requests."""
    return max(0, min(of - width, (2 * part + 1) * of // (2 * parts) - width // 2))


def scale_rate(schedule: Schedule, factor: float) -> Schedule:
    """Every due time (and think time) divided by the factor: twice the factor is twice the rate, and nothing else changes."""
    if not (factor > 0 and math.isfinite(factor)):
        raise InputError(f"a rate factor must be above 0 (got {factor:g}).")
    if factor == 1:
        return schedule
    think = None if schedule.think_s is None else schedule.think_s / factor
    return _changed(replace(schedule, due_s=schedule.due_s / factor, think_s=think), f"rate x{factor:.6g}")


def ramp(schedule: Schedule, ramp_s: float) -> Schedule:
    """The rate rises linearly from nothing to its own over the first ``ramp_s``; every request stays, later ones are moved back.

    Time u of the trace becomes t with u = t^2 / (2 R) below R = ramp_s, so t = sqrt(2 R u) for u < R / 2, and u + R / 2 after.
    """
    if not (ramp_s > 0 and math.isfinite(ramp_s)):
        raise InputError(f"a ramp must be above 0 s (got {ramp_s:g}).")
    u = schedule.due_s
    due = np.where(u < ramp_s / 2, np.sqrt(2 * ramp_s * np.maximum(u, 0)), u + ramp_s / 2)
    return _changed(replace(schedule, due_s=due), f"ramp over {ramp_s:g} s")


def to_rate(schedule: Schedule, rate_per_s: float) -> Schedule:
    """Scaled to a mean rate."""
    if not (rate_per_s > 0 and math.isfinite(rate_per_s)):
        raise InputError(f"a rate must be above 0 (got {rate_per_s:g}).")
    now = schedule.rate_per_s
    if not math.isfinite(now):
        raise InputError(
            f"{schedule.name!r} has no rate to scale: its {len(schedule)} requests are due at one instant."
        )
    return scale_rate(schedule, rate_per_s / now)


def clip_tokens(schedule: Schedule, max_prompt: int | None = None, max_output: int | None = None) -> Schedule:
    """Lengths capped; how many were is said."""
    prompt, output, words = schedule.prompt_tokens, schedule.output_tokens, []
    for what, column, most in (("prompt", prompt, max_prompt), ("output", output, max_output)):
        if most is None:
            continue
        if most < 1:
            raise InputError(f"a cap on {what} tokens must be at least 1 (got {most}).")
        over = int((column > most).sum())
        if over:
            words.append(f"{over} {what}s capped at {most} tokens")
    if not words:
        return schedule
    capped = replace(
        schedule,
        prompt_tokens=np.minimum(prompt, max_prompt or prompt.max()),
        output_tokens=np.minimum(output, max_output or output.max()),
    )
    return _changed(capped, ", ".join(words))


def thin(schedule: Schedule, share: float, seed: int = 0) -> Schedule:
    """A random share of the requests, each kept or not on its own: bursts stay bursts, at a lower rate."""
    if not 0 < share <= 1:
        raise InputError(f"a share to keep must be above 0 and at most 1 (got {share:g}).")
    if share == 1:
        return schedule
    kept = np.random.default_rng(seed).random(len(schedule)) < share
    if not kept.any():
        raise InputError(f"of {len(schedule)} requests none is left at a share of {share:g}. Give a larger one.")
    return _changed(
        schedule.take(kept),
        f"thinned to {int(kept.sum())} of {len(schedule)} requests by {float(share)!r} (seed {seed})",
    )


def superpose(schedule: Schedule, copies: int, seed: int = 0) -> Schedule:
    """Several copies laid over each other, each turned round its span by a random shift: more users, the same mix.

    Rows are numbered anew; prefix blocks of different copies stay apart (each copy's are its own).
    """
    if copies < 1:
        raise InputError(f"a trace is laid over itself at least once (got {copies}).")
    if copies == 1:
        return schedule
    span, n = schedule.span_s, len(schedule)
    first = float(schedule.due_s[0]) if n else 0.0
    whole = span * n / (n - 1) if n > 1 else span
    shifts = [0.0, *np.random.default_rng(seed).uniform(0, whole, copies - 1).tolist()] if whole > 0 else [0.0] * copies
    due = np.concatenate([(schedule.due_s - first + s) % whole if whole > 0 else schedule.due_s for s in shifts])
    order = np.argsort(due, kind="stable")
    source = np.tile(np.arange(n), copies)[order]
    blocks = None
    if schedule.blocks is not None:
        copy_of = np.repeat(np.arange(copies), n)[order].tolist()
        most = 1 + max((max(ids) for ids in schedule.blocks if ids), default=0)
        blocks = np.empty(len(source), dtype=object)
        for k, (row, copy) in enumerate(zip(source.tolist(), copy_of, strict=True)):
            blocks[k] = tuple(i + copy * most for i in schedule.blocks[row])
    held: dict[str, Any] = {}
    if schedule.session is not None:
        copy = np.repeat(np.arange(copies), n)[order]
        most = int(schedule.session.max(initial=-1)) + 1
        session = schedule.session[source]
        held["session"] = np.where(session >= 0, session + copy * most, -1)
    if schedule.parent is not None and schedule.think_s is not None:
        # Of a session that is cut by the end of the span, the later part goes on as a session of its own.
        place = np.empty(len(order), dtype=np.int64)
        place[order] = np.arange(len(order))
        before = schedule.parent[source]
        parent = np.where(before >= 0, place[np.maximum(before, 0) + np.repeat(np.arange(copies), n)[order] * n], -1)
        held["parent"] = np.where(parent < np.arange(len(order)), parent, -1)
        held["think_s"] = schedule.think_s[source]
    made = replace(
        schedule,
        index=np.arange(len(source), dtype=np.int64),
        due_s=due[order],
        prompt_tokens=schedule.prompt_tokens[source],
        output_tokens=schedule.output_tokens[source],
        blocks=blocks,
        **held,
    )
    return _changed(made, f"{copies} copies laid over each other (seed {seed})")


def scale_tokens(schedule: Schedule, prompt: float = 1.0, output: float = 1.0) -> Schedule:
    """Lengths times a factor, rounded, at least 1. Prefix blocks no longer fit their prompts and are left out."""
    words, columns = [], {}
    for what, factor in (("prompt", prompt), ("output", output)):
        if not (factor > 0 and math.isfinite(factor)):
            raise InputError(f"a length factor must be above 0 (got {factor:g}).")
        if factor != 1:
            tokens = np.maximum(1, np.rint(getattr(schedule, f"{what}_tokens") * factor))
            if len(tokens) and tokens.max() > MOST_TOKENS:
                raise InputError(
                    f"{what}s x{factor:g} reach {tokens.max():.3g} tokens, more than {MOST_TOKENS}. Give a lower --{what}-scale."
                )
            columns[f"{what}_tokens"] = tokens.astype(np.int64)
            words.append(f"{what}s x{factor:.6g}")
    if not words:
        return schedule
    gone: dict[str, Any] = {"blocks": None, "block_tokens": 0} if prompt != 1 else {}
    return _changed(replace(schedule, **columns, **gone), ", ".join(words))


def spread(schedule: Schedule, tick_s: float, seed: int = 0) -> Schedule:
    """Requests that share an instant of a coarse clock are spread evenly at random over its tick; order within it is kept.

    A trace with a 3 s clock does not say when within 3 s a request came: replayed as it stands it is a burst each 3 s.
    """
    if not (tick_s > 0 and math.isfinite(tick_s)):
        raise InputError(f"a tick must be above 0 s (got {tick_s:g}).")
    rng = np.random.default_rng(seed)
    ticks = np.floor(schedule.due_s / tick_s + 1e-9).astype(np.int64)
    due = schedule.due_s.copy()
    starts = np.flatnonzero(np.r_[True, np.diff(ticks) != 0])
    for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(due)], strict=True):
        if end - start > 1 and due[start] == due[end - 1]:
            due[start:end] = ticks[start] * tick_s + np.sort(rng.uniform(0, tick_s, end - start))
    moved = int((due != schedule.due_s).sum())
    if not moved:
        return schedule
    due = np.maximum.accumulate(np.floor(due * 1e6) / 1e6)
    return _changed(
        replace(schedule, due_s=due), f"{moved} requests spread within a tick of {tick_s:g} s (seed {seed})"
    )


def _changed(schedule: Schedule, how: str) -> Schedule:
    return replace(schedule, changes=(*schedule.changes, how))


# --- synthesis ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LogNormal:
    """exp(Normal(mu, sigma)), rounded, clipped to [low, high]. The median is exp(mu), the mean exp(mu + sigma^2 / 2).

    ``median``, ``mean`` and ``mu`` are three different words: a text that says "mean 400" for mu = 6 means the median.
    """

    mu: float
    sigma: float
    low: int = 1
    high: int = MOST_TOKENS

    @classmethod
    def parse(cls, text: str) -> Self:
        """``lognormal:median=403,sigma=1,min=10,max=4096``; exactly one of median, mean and mu (all before clipping)."""
        kind, _, rest = text.partition(":")
        if kind.strip() != "lognormal":
            raise InputError(f"lengths must be lognormal:median=..,sigma=.. (got {text!r}).")
        values: dict[str, float] = {}
        for term in filter(None, (t.strip() for t in rest.split(","))):
            key, _, number = term.partition("=")
            try:
                values[key.strip()] = float(number)
            except ValueError:
                raise InputError(f"{term!r} in {text!r} must be key=number.") from None
        unknown = set(values) - {"median", "mean", "mu", "sigma", "min", "max"}
        if unknown:
            raise InputError(
                f"unknown key {sorted(unknown)[0]!r} in {text!r}. Known: median, mean, mu, sigma, min, max."
            )
        centre = [k for k in ("median", "mean", "mu") if k in values]
        if len(centre) != 1 or "sigma" not in values:
            raise InputError(f"give sigma and exactly one of median, mean and mu (got {text!r}).")
        sigma, value = values["sigma"], values[centre[0]]
        if sigma < 0 or not math.isfinite(sigma) or not math.isfinite(value) or (centre[0] != "mu" and value <= 0):
            raise InputError(f"{centre[0]} must be above 0 and sigma >= 0 (got {text!r}).")
        low, high = values.get("min", 1.0), values.get("max", float(MOST_TOKENS))
        if not (1 <= low <= high <= MOST_TOKENS and low.is_integer() and high.is_integer()):
            raise InputError(f"1 <= min <= max <= {MOST_TOKENS} is needed, whole numbers (got {text!r}).")
        mu = value if centre[0] == "mu" else math.log(value) - (sigma * sigma / 2 if centre[0] == "mean" else 0.0)
        return cls(mu, sigma, int(low), int(high))

    def draw(self, n: int, rng: np.random.Generator) -> Ints:
        """n lengths."""
        drawn = np.rint(np.exp(np.minimum(rng.normal(self.mu, self.sigma, n), 40.0)))
        return np.clip(drawn, self.low, self.high).astype(np.int64)


ORIGIN_PROMPT = LogNormal(6.0, 1.0, 10, 4096)
ORIGIN_OUTPUT = LogNormal(5.0, 0.8, 10, 2048)
ORIGIN_SPAN_S = 60.0
"""The workload of the report that steelyard comes from: arrivals uniform over a minute."""


def synthesize(
    n: int,
    prompt: LogNormal,
    output: LogNormal,
    *,
    rate_per_s: float,
    arrivals: str = "poisson",
    cv: float = 2.0,
    seed: int = 0,
    name: str = "synthetic",
) -> Schedule:
    """n requests with independent lengths. Arrivals start at 0 and have the mean rate given.

    poisson: exponential gaps. gamma: gaps with coefficient of variation ``cv``. uniform: n instants drawn evenly over
    n / rate seconds, sorted. constant: equal gaps. burst: all at 0. Lengths and arrivals have streams of their own, so
    another arrival process leaves the lengths as they are.
    """
    if n < 1:
        raise InputError(f"a trace needs at least one request (got {n}).")
    if arrivals not in ARRIVALS:
        raise InputError(f"--arrivals must be one of {', '.join(ARRIVALS)} (got {arrivals!r}).")
    if arrivals != "burst" and not (rate_per_s > 0 and math.isfinite(rate_per_s)):
        raise InputError(f"--rate must be above 0 (got {rate_per_s:g}).")
    if arrivals == "gamma" and not (cv > 0 and math.isfinite(cv)):
        raise InputError(f"--cv must be above 0 (got {cv:g}).")
    lengths, times = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(2))
    due: Floats
    if arrivals == "burst":
        due = np.zeros(n)
    elif arrivals == "uniform":
        due = np.sort(times.uniform(0.0, n / rate_per_s, n))
    else:
        if arrivals == "constant":
            gaps = np.full(n, 1.0 / rate_per_s)
        elif arrivals == "poisson":
            gaps = times.exponential(1.0 / rate_per_s, n)
        else:
            shape = 1.0 / (cv * cv)
            gaps = times.gamma(shape, 1.0 / (rate_per_s * shape), n)
        due = np.cumsum(gaps) - gaps[0]
    due = np.floor(due * 1e6) / 1e6  # stored in microseconds: what is drawn is what is replayed
    return Schedule(name, np.arange(n, dtype=np.int64), due, prompt.draw(n, lengths), output.draw(n, lengths))
