"""What a regression cannot identify, found by simulation: laws whose simulated runs look like the measured ones.

At low load TTFT = L0 + a + b n + c n^2 fits well and does not say which part occupies a worker, nor how many prompts
share a step; TPOT at a small batch does not say where the batch ends. Those parameters have a broad prior here, the
regressions' coefficients a narrow one, and all are moved together until the simulation of every run shows the
quantiles that were measured.

1. An ensemble from the prior is simulated on the runs and moved by ensemble smoothing (ES-MDA, Emerick and Reynolds 2013):
   a regression, over the ensemble, of parameters on what they lead to. It needs no derivatives and no good start.
2. The best member is polished by Gauss-Newton steps with the prior as a ridge; how the cluster routes, whether it cuts
   prompts, whom it evicts, is tried one at a time.
3. Draws: what the curvature at the end and the ensemble say is possible, each weighed by its own misfit. What the runs
   cannot tell stays as wide as the prior: that is what makes an interval honest, and tells which run to make next.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from itertools import pairwise

import numpy as np

from advisor.features import RunData, answers, decode_rows, served
from advisor.parallel import shared
from loadgen.cluster import Profile, SimResult, simulate, stage_times
from traces.measures import Places, Slo, between, places
from traces.records import Fleet, Floats, Ints, Observations, Schedule

Mask = np.ndarray[tuple[int], np.dtype[np.bool_]]

TTFT_QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.97, 0.99)
_TTFT_SD = (0.04, 0.03, 0.03, 0.04, 0.05, 0.08, 0.10)
TPOT_QUANTILES = (0.1, 0.5, 0.9, 0.99)
_TPOT_SD = (0.02, 0.015, 0.02, 0.05)
E2E_QUANTILES = (0.5, 0.9, 0.99)
_E2E_SD = (0.03, 0.04, 0.06)
LOAD_QUANTILES = (0.0, 0.5, 0.85, 1.0)
"""Bounds of the parts of a run's answers, by the batch they were in, whose TPOT the decode step itself is held to."""
_STEP_SD = 0.05
STATISTIC_SD = np.array([*_TTFT_SD, *([0.06, 0.10] * 3), *_TPOT_SD, *_E2E_SD, 0.04, 0.25, *([_STEP_SD] * 3)])
"""How near, as a log ratio, a statistic of a run can be expected to be met: they are chaotic in a queue's details."""

MEMBERS = 40
ROUNDS = 3
POLISH = 3
CANDIDATES = 60
HIDDEN = 60
"""Laws that are tried where a role was never loaded, apart from CANDIDATES."""

REQUESTS = 3000
"""Requests of all runs together that one evaluation simulates, apart from their warm-ups."""

STRUCTURES: tuple[dict[str, object], ...] = (
    {"prefill_route": "least_requests"},
    {"prefill_route": "round_robin"},
    {"decode_route": "least_tokens"},
    {"decode_route": "round_robin"},
    {"transfer_link": "sender"},
    {"transfer_link": "shared"},
    {"chunked": True},
    {"prefill_square": "step"},
    {"prefill_release": "drained"},
    {"decode_context": "worker"},
    {"transfer_begins": "pulled"},
    {"kv_policy": "preempt"},
)
"""Rules that are tried beside the default ones (least tokens, least requests, no link, whole prompts, each prompt its own
square and on its way after its step, a decode step that pays for its batch's context, reserve)."""


@dataclass(frozen=True, eq=False)
class Replay:
    """A run to be simulated: what was asked of which fleet, and the statistics of what came.

    rows: positions, in the schedule, of the rows that count (finished, not of the warm-up). thirds: which of three
    equal parts by prompt length. seen: what came, a row for each of the schedule's requests.
    steps: [parts by batch, 2], mean batch and context that the run's own answers shared their worker with; NaN: none.
    spans: of each part [m, 2], when the answers' first and last tokens came.
    """

    schedule: Schedule
    fleet: Fleet
    slo: Slo
    rows: Mask
    thirds: tuple[Mask, ...]
    observed: Floats
    steps: Floats = field(default_factory=lambda: np.full((len(LOAD_QUANTILES) - 1, 2), np.nan))
    spans: Sequence[Floats] = ()
    seen: Observations = field(default_factory=Observations.empty)

    @classmethod
    def of(cls, one: RunData, most: int) -> Replay:
        """The first ``most`` requests of a run that were served, and all of its warm-up: queues begin empty where the run did.

        Those of the warm-up are in the queues that the others meet, and count no more. Of a longer run the last quarter only
        keeps the others company, too: what came after them is not simulated. Of windows the first one in which anybody counts,
        from where everybody who was there is known.
        """

        def counts(rows: Observations) -> Mask:
            return rows.ok & (rows.due_s >= one.run.warmup_s) & one.known(rows.sent_s, rows.last_token_s)

        rows = max(map(served, one.pieces), key=lambda rows: (bool(counts(rows).any()), len(rows) > 0))
        ok = counts(rows)
        early = int(ok.argmax())
        if len(rows) > early + most:
            rows = rows.take(np.arange(early + most))
            ok = ok[: len(rows)] & (np.arange(len(rows)) < early + 0.75 * most)
        n = rows.prompt_lengths
        low, high = np.quantile(n[ok], [1 / 3, 2 / 3]) if ok.any() else (0.0, 0.0)
        thirds = (n <= low, (n > low) & (n <= high), n > high)
        slo = Slo(Slo.parse(one.run.slo).limits) if one.run.slo else Slo()
        steps, tpot, spans = _by_batch(one)
        made = cls(sent(rows), Fleet(one.prefill, one.decode), slo, ok, thirds, np.empty(0), steps, spans, rows)
        seen = made.statistics(rows.sent_s, rows.first_token_s, rows.last_token_s)
        return replace(made, observed=np.concatenate([seen, np.log(tpot)]))

    def statistics(self, sent_s: Floats, first_s: Floats, last_s: Floats) -> Floats:
        """Log quantiles of TTFT, of TTFT by prompt length, TPOT, E2E; log span; logit of the share within the SLO. NaN: none.

        sent_s, first_s, last_s: when each request was sent, its first and its last token came.
        """
        ok, tokens = self.rows, self.schedule.output_tokens
        ttft, e2e = first_s - sent_s, last_s - sent_s
        tpot = (last_s - first_s) / np.maximum(tokens - 1, 1)
        every, *thirds, long = self._parts
        parts = [ttft[every], *(ttft[third] for third in thirds), tpot[long], e2e[every]]
        span = float(last_s[ok].max() - self.schedule.due_s[0]) if ok.any() else math.nan
        share = math.nan
        if self.slo.limits:
            good = ok.copy()
            for name, limit in self.slo.limits:
                value = {"ttft": ttft, "tpot": tpot, "e2e": e2e}[name]
                good &= (value <= limit) | ((tokens <= 1) if name == "tpot" else False)
            k, n = float(good.sum()), float(ok.sum())
            share = math.log((k + 1) / (n - k + 1))
        return np.concatenate([_quantiles(parts), [math.log(span) if span > 0 else math.nan, share]])

    @cached_property
    def _parts(self) -> tuple[Ints, ...]:
        """Positions of the rows that count: all of them, those of each third, those whose TPOT tells something."""
        ok = self.rows
        held = (ok, *(ok & third for third in self.thirds), ok & (self.schedule.output_tokens >= 4))
        return tuple(np.flatnonzero(rows) for rows in held)

    def expected(self, profile: Profile) -> Floats:
        """The statistics as these laws would have them; last, without simulation, log TPOT at the loads that the run showed."""
        ready, first, last = stage_times(self.schedule, self.fleet, profile)
        context = self.steps[:, 1]
        if profile.decode_context == "worker":
            context = context + self._waiting(profile, ready, first)
        step = profile.step_s(self.steps[:, 0], context)
        return np.concatenate([self.statistics(self.schedule.due_s, first, last), np.log(step)])

    def _waiting(self, profile: Profile, ready_s: Floats, first_s: Floats) -> Floats:
        """[parts]: tokens on their way to a decode worker or waiting there, on average while a part's answers came.

        No client sees them: they are those of the simulated requests.
        """
        n = self.schedule.prompt_tokens
        begin = ready_s - profile.overhead_s - profile.transfer_t0_s - profile.transfer_s_per_token * n
        at = np.concatenate([begin, first_s - profile.c0_s])
        order = np.argsort(at, kind="stable")
        at, held = at[order], np.cumsum(np.concatenate([n, -n])[order])
        area = np.concatenate([[0.0], np.cumsum(held[:-1] * np.diff(at))])
        found = np.zeros(len(self.steps))
        for k, span in enumerate(self.spans):
            span = span[span[:, 1] <= self.schedule.due_s[-1]]
            if len(span):
                mean = np.diff(np.interp(span, at, area), axis=1) / np.diff(span, axis=1)
                found[k] = float(mean.mean()) / self.fleet.decode
        return found

    def simulated(self, profile: Profile) -> SimResult:
        """The run as these laws would have it."""
        return simulate(self.schedule, self.fleet, profile)


def _by_batch(one: RunData) -> tuple[Floats, Floats, list[Floats]]:
    """([parts, 2] mean batch and context, [parts] median TPOT, [m, 2] spans) of a run's answers, in parts by batch; NaN: few.

    A simulation whose queue is wrong can be made to show the right TPOT by a wrong decode step, since its batches are wrong
    too. These are the batches that were there.
    """
    rows, came = decode_rows(one), answers(one)
    spans = np.column_stack([came.first_token_s, came.last_token_s])
    parts = len(LOAD_QUANTILES) - 1
    steps, tpot = np.full((parts, 2), np.nan), np.full(parts, np.nan)
    order = np.argsort(rows.x[:, 1], kind="stable")
    held = []
    at = np.round(np.array(LOAD_QUANTILES) * len(order)).astype(np.int64)
    for k, (low, high) in enumerate(pairwise(at)):
        which = order[low:high]
        held.append(spans[which])
        if len(which) >= FEWEST:
            steps[k] = rows.x[which, 1:].mean(axis=0)
            tpot[k] = np.median(rows.y[which])
    return steps, tpot, held


FEWEST = 5
"""Values of which quantiles are taken, at least."""


def sent(rows: Observations) -> Schedule:
    """What reached the server: rows in order of sending, due when they were sent, with the lengths the server saw."""
    return Schedule(
        "sent",
        rows.index,
        np.maximum(rows.sent_s, 0.0),
        np.maximum(rows.prompt_lengths, 1),
        np.maximum(rows.tokens, 1),
    )


def _quantiles(parts: Sequence[Floats]) -> Floats:
    """Logarithms of the quantiles of each part's finite values, one after the other; NaN of a part that has few."""
    ordered = [np.sort(part) for part in parts]
    for k, values in enumerate(ordered):
        if len(values) and not (math.isfinite(values[0]) and math.isfinite(values[-1])):
            ordered[k] = values[np.isfinite(values)]
    where = _where(tuple(len(values) for values in ordered))
    found = between(np.concatenate([*ordered, [math.nan]]), where)
    return np.asarray(np.log(np.maximum(found, 1e-5)), dtype=float)


_WANTED = (TTFT_QUANTILES, *([(0.5, 0.9)] * 3), TPOT_QUANTILES, E2E_QUANTILES)


@lru_cache(maxsize=512)
def _where(sizes: tuple[int, ...]) -> Places:
    """As :func:`traces.measures.places`, of the parts that :func:`_quantiles` puts together; of few values its last one."""
    found, begin = [], 0
    for size, at in zip(sizes, _WANTED, strict=True):
        below, above, share, late = places(size, at)
        few = size < FEWEST
        found.append([np.full(len(at), sum(sizes)) if few else begin + side for side in (below, above)] + [share, late])
        begin += size
    below, above, share, late = (np.concatenate(column) for column in zip(*found, strict=True))
    return below, above, share, late


@dataclass(frozen=True, slots=True)
class Known:
    """A parameter before simulation: where it is expected and how sure that is (standard deviation)."""

    mean: float
    sd: float


@dataclass(frozen=True, eq=False)
class Space:
    """Parameters as real numbers, all meaningful from -inf to inf, with their prior.

    names: line0, line1, line2 (log of the TTFT line's coefficients), a, b (logit of the shares of intercept and slope
    that occupy a worker), tokens, requests (log of the step's limits), batch, kv (log of (limit / most seen - 1)), c0, c1, c2
    (log), and knee (log of knee_s), bend (log of bend_tokens) where the regression found one. seen_batch, seen_kv: most
    that one worker was seen to carry. base: everything else.
    """

    base: Profile
    prior: Mapping[str, Known]
    seen_batch: float
    seen_kv: float
    names: tuple[str, ...] = field(init=False)
    mean: Floats = field(init=False)
    sd: Floats = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.prior))
        object.__setattr__(self, "mean", np.array([k.mean for k in self.prior.values()]))
        object.__setattr__(self, "sd", np.array([k.sd for k in self.prior.values()]))

    def profile(self, z: Floats, rules: Mapping[str, object] | None = None) -> Profile:
        """The laws at a point."""
        v = dict(zip(self.names, np.clip(z, self.mean - 4 * self.sd, self.mean + 4 * self.sd).tolist(), strict=True))
        intercept, slope = math.exp(v["line0"]), math.exp(v["line1"])
        a, b = _share(v["a"]), _share(v["b"])
        values: dict[str, object] = {
            "a_s": a * intercept,
            "overhead_s": (1 - a) * intercept,
            "b_s_per_token": b * slope,
            "transfer_s_per_token": (1 - b) * slope,
            "c_s_per_token2": math.exp(v["line2"]),
            "max_batch_tokens": max(1, round(math.exp(v["tokens"]))),
            "max_batch_requests": max(1, round(math.exp(v["requests"]))),
            "max_batch": max(1, round(self.seen_batch * (1 + math.exp(v["batch"])))),
            "kv_tokens": max(1, round(self.seen_kv * (1 + math.exp(v["kv"])))),
            "c0_s": math.exp(v["c0"]),
            "c1_s": math.exp(v["c1"]),
            "c2_s": math.exp(v["c2"]),
        }
        if "knee" in v:
            values["knee_s"] = math.exp(v["knee"])
        if "bend" in v:
            values["bend_tokens"] = max(1, round(math.exp(v["bend"])))
        return replace(self.base, **values, **(rules or {}))  # type: ignore[arg-type]


def _share(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@dataclass(frozen=True, eq=False)
class Point:
    """Laws that were simulated on the runs. chi: [runs], squared misfit in standard deviations. values: [runs, statistics].

    drawn: how much less likely than the best point it was drawn, as a squared distance; 0 for points that were searched.
    """

    z: Floats
    rules: Mapping[str, object]
    profile: Profile
    values: Floats
    chi: Floats
    prior: float
    drawn: float = 0.0

    @property
    def cost(self) -> float:
        """What is minimised."""
        return float(self.chi.sum()) + self.prior


@dataclass(frozen=True, eq=False)
class Calibration:
    """What came of it. points: every candidate, the best first. used: statistics that counted.

    misfit: median |log ratio| of the TTFT quantiles at the best point.
    """

    space: Space
    replays: Sequence[Replay]
    points: list[Point]
    used: int
    misfit: float

    @property
    def best(self) -> Point:
        """The laws."""
        return self.points[0]

    @property
    def excess(self) -> float:
        """How much worse than expected the best laws fit, as a variance factor; at least 1."""
        return max(1.0, float(self.best.chi.sum()) / max(self.used - len(self.space.names), self.used / 2, 1))

    @property
    def optimism(self) -> float:
        """How much farther from the laws other runs lie than those that they were fitted to: degrees of freedom, as a factor."""
        n, k = self.used / CORRELATED, len(self.space.names)
        return math.sqrt(n / max(n - k, n / 2))

    def draws(self, rng: np.random.Generator, n: int, hidden: Sequence[str] = ()) -> list[Profile]:
        """Laws that are possible: candidates drawn by their misfit, with the runs weighed at random (Bayesian bootstrap).

        The statistics of a run hang together (quantiles of one sample): four of them count as one.
        hidden: parameters that no run could show. The candidates lie about the best point and are weighed towards it, so
        they tell too little of these: each draw takes them from the prior, weighed by the runs' misfit alone.
        """
        found = self._drawn(rng, n, self.points, 1.0)
        if not hidden:
            return [p.profile for p in found]
        space, best = self.space, self.best
        at = [space.names.index(name) for name in hidden]
        search, open_ = _Search(space, self.replays), [best]
        for _ in range(HIDDEN):
            z = best.z.copy()
            z[at] = space.mean[at] + space.sd[at] * rng.standard_normal(len(at))
            open_.append(search.at(z, best.rules))
        laws = []
        for point, other in zip(found, self._drawn(rng, n, open_, 0.0), strict=True):
            z = point.z.copy()
            z[at] = other.z[at]
            laws.append(space.profile(z, point.rules))
        return laws

    def _drawn(self, rng: np.random.Generator, n: int, points: Sequence[Point], prior: float) -> list[Point]:
        """n of ``points`` by their misfit and ``prior`` times their distance from the prior's mean.

        A candidate was drawn where it is likely; to weigh it by its whole misfit as well would count the runs twice, and
        leave little but the best point. It counts for less only as far as it misses more than it was drawn for.
        """
        chi = np.stack([p.chi for p in points])
        far = prior * np.array([p.prior for p in points])
        drawn = np.array([p.drawn for p in points])
        found = []
        for _ in range(n):
            weight = rng.dirichlet(np.full(chi.shape[1], 4.0)) * chi.shape[1]
            cost = (chi @ weight) / (CORRELATED * self.excess) + far
            likely = np.exp(-np.maximum(0.0, cost - cost.min() - drawn) / 2)
            found.append(points[int(rng.choice(len(likely), p=likely / likely.sum()))])
        return found


CORRELATED = 4.0


class _Search:
    """Points of one space, simulated on the same runs."""

    def __init__(self, space: Space, replays: Sequence[Replay]) -> None:
        self.space, self.replays = space, replays
        self.observed = np.stack([r.observed for r in replays])

    def at(self, z: Floats, rules: Mapping[str, object]) -> Point:
        space = self.space
        z = np.clip(z, space.mean - 4 * space.sd, space.mean + 4 * space.sd)
        profile = space.profile(z, rules)
        values = np.stack([r.expected(profile) for r in self.replays])
        off = np.abs((values - self.observed) / STATISTIC_SD)
        # Huber: beyond three standard deviations a statistic counts linearly.
        loss = np.where(off <= 3, off * off, 6 * off - 9)
        prior = float((((z - space.mean) / space.sd) ** 2).sum())
        return Point(z, dict(rules), profile, values, np.nansum(loss, axis=1), prior)

    def smooth(self, rng: np.random.Generator, rules: Mapping[str, object], members: int, rounds: int) -> list[Point]:
        """Ensemble smoothing with multiple data assimilation."""
        space = self.space
        z = space.mean + space.sd * rng.standard_normal((members, len(space.names)))
        z[0] = space.mean
        good = np.isfinite(self.observed).ravel()
        target = self.observed.ravel()[good]
        noise = np.tile(STATISTIC_SD, len(self.replays))[good]
        everything: list[Point] = []
        for _ in range(rounds):
            points = shared(lambda row: self.at(row, rules), z)
            everything += points
            seen = np.stack([p.values.ravel()[good] for p in points])
            seen = np.where(np.isfinite(seen), seen, target)
            dz, dy = z - z.mean(axis=0), (seen - seen.mean(axis=0)) / noise
            # In the ensemble's own space (members x members) instead of statistics x statistics.
            k = members - 1
            gram = dy @ dy.T / k
            off = (target + math.sqrt(rounds) * noise * rng.standard_normal(seen.shape) - seen) / noise
            off = np.clip(off, -25, 25)
            solved = np.linalg.solve(gram + rounds * np.eye(members), dy)
            z = z + (off @ solved.T) @ dz / k
        everything += shared(lambda row: self.at(row, rules), z)
        return everything

    def slopes(self, point: Point) -> Floats:
        """[runs, statistics, k]: change of every statistic with every parameter, by a step of a fifth."""

        def column(i: int) -> Floats:
            sd = self.space.sd[i]
            step = min(0.2, 0.5 * float(sd))
            moved = point.z.copy()
            moved[i] += step if moved[i] < self.space.mean[i] + 3 * sd else -step
            other = self.at(moved, point.rules)
            return np.asarray((other.values - point.values) / (moved[i] - point.z[i]))

        return np.stack(shared(column, range(len(self.space.sd))), axis=-1)

    def polish(self, point: Point, steps: int) -> tuple[Point, Floats]:
        """(after Gauss-Newton steps, the curvature there or at the last point that had one)."""
        space = self.space
        h = np.diag(1 / space.sd**2)
        for turn in range(steps + 1):
            slopes = self.slopes(point)
            r = (self.observed - point.values) / STATISTIC_SD
            good = np.isfinite(r) & np.isfinite(slopes).all(axis=2)
            j = (slopes / STATISTIC_SD[None, :, None])[good]
            weight = np.minimum(1.0, 3.0 / np.maximum(np.abs(r[good]), 1e-9))
            h = j.T @ (weight[:, None] * j) + np.diag(1 / space.sd**2)
            if turn == steps:
                break
            g = j.T @ (weight * r[good]) + (space.mean - point.z) / space.sd**2
            step = np.clip(np.linalg.solve(h, g), -1.5 * space.sd, 1.5 * space.sd)
            tried = shared(partial(self.at, rules=point.rules), [point.z + share * step for share in (1.0, 0.4)])
            best = min(tried, key=lambda p: p.cost)
            if best.cost >= point.cost * 0.995:
                if best.cost < point.cost:
                    point = best
                break
            point = best
        return point, h

    def settle(self, point: Point) -> tuple[Point, Floats, dict[str, list[Point]]]:
        """Polish a point, try the other rules there, polish again with those that explain clearly more.

        Returns (point, curvature, what was tried by name of the rule).
        """
        point, h = self.polish(point, POLISH)
        tried: dict[str, list[Point]] = {}
        others = [rules for rules in STRUCTURES if next(iter(rules)) not in point.rules]
        each = shared(partial(self.at, point.z), [{**point.rules, **rules} for rules in others])
        for rules, one in zip(others, each, strict=True):
            tried.setdefault(next(iter(rules)), []).append(one)
        worth = CORRELATED * max(1.0, float(point.chi.sum()) / max(np.isfinite(self.observed).sum(), 1))
        chosen, start = dict(point.rules), point
        for name, held in sorted(tried.items(), key=lambda item: min(p.cost for p in item[1])):
            best = min(held, key=lambda p: p.cost)
            if best.cost > start.cost - worth:
                continue
            together = self.at(point.z, chosen | {name: best.rules[name]})
            if together.cost < point.cost - worth:
                chosen, point = dict(together.rules), together
        if point is not start:
            point, h = self.polish(point, POLISH)
        return point, h, tried


STARTS: tuple[dict[str, object], ...] = (
    {},
    {"prefill_square": "step"},
    {"prefill_route": "round_robin"},
    {"kv_policy": "preempt", "prefill_route": "least_requests"},
    {"chunked": True, "prefill_square": "step", "prefill_release": "drained", "decode_context": "worker"},
    {"decode_route": "round_robin"},
)
"""Rules of the ensembles that are tried in turn while the runs are not explained."""

FAR = 2.0
"""Beyond this share of it they are so far from explained that other rules get an ensemble of their own."""

SETTLED = 0.4
"""Runs are explained when the squared misfit is below this share of the number of statistics."""


def calibrate(data: Sequence[RunData], space: Space, *, seed: int = 0) -> Calibration:
    """Laws whose simulated runs look like ``data``, and others that do so nearly as well.

    The last runs' are remembered: who asks the same runs another question waits for no second search.
    """
    most = max(200, REQUESTS // len(data))
    replays = [Replay.of(one, most) for one in data]
    key = _digest(replays, space, seed)
    with _LOCK:
        found = _KNOWN.get(key)
    if found is None:
        found = _calibrate(replays, space, seed)
    with _LOCK:
        _KNOWN.pop(key, None)
        _KNOWN[key] = found  # the last one asked for is the last to go
        while len(_KNOWN) > REMEMBERED:
            del _KNOWN[next(iter(_KNOWN))]
    return replace(found, replays=replays, points=list(found.points))


REMEMBERED = 8
_KNOWN: dict[bytes, Calibration] = {}
_LOCK = threading.Lock()


def forget() -> None:
    """Let the next :func:`calibrate` search, whatever was asked before."""
    _KNOWN.clear()


def _digest(replays: Sequence[Replay], space: Space, seed: int) -> bytes:
    """Of all that a search begins with."""
    shapes = [[len(r.schedule), r.fleet, r.slo, [len(span) for span in r.spans]] for r in replays]
    h = hashlib.sha256(repr((seed, space.base, space.prior, space.seen_batch, space.seen_kv, shapes)).encode())
    for r in replays:
        asked = r.schedule.due_s, r.schedule.prompt_tokens, r.schedule.output_tokens
        for held in (*asked, r.rows, *r.thirds, r.observed, r.steps, *r.spans):
            h.update(held.tobytes())
    return h.digest()


def _calibrate(replays: Sequence[Replay], space: Space, seed: int) -> Calibration:
    search = _Search(space, replays)
    rng = np.random.default_rng(seed)
    used = int(np.isfinite(search.observed).sum())
    points: list[Point] = []
    found: tuple[Point, Floats, dict[str, list[Point]]] | None = None
    for turn, rules in enumerate((*STARTS, None)):
        if turn == 0 or rules is None:
            # At last one more ensemble, under the rules found.
            ensemble = search.smooth(rng, found[0].rules if found else {}, MEMBERS, ROUNDS)
            points += ensemble
            start = min(ensemble, key=lambda p: p.cost)
        else:
            # Other rules from the best point first, or from what no regression told: a Gauss-Newton step costs a tenth of
            # an ensemble. Under wrong rules the best point may lie where it must not (no limit, to feign a queue's end).
            assert found is not None  # noqa: S101 - the first start found one
            open_ = np.where(space.sd >= 1.0, space.mean, found[0].z)
            starts = [search.at(z, {**found[0].rules, **rules}) for z in (found[0].z, open_, space.mean)]
            if found[0].chi.sum() > FAR * used:
                starts += search.smooth(rng, {**found[0].rules, **rules}, MEMBERS, ROUNDS)
            start, _ = search.polish(min(starts, key=lambda p: p.cost), 2)
            points.append(start)
            if start.cost > found[0].cost:
                continue
        attempt = search.settle(start)
        if found is None or attempt[0].cost < found[0].cost:
            found = attempt
        # Good enough: no further start is needed.
        if found[0].chi.sum() < SETTLED * used:
            break
    assert found is not None  # noqa: S101 - there are starts
    point, h, tried = found
    excess = max(1.0, float(point.chi.sum()) / max(used - len(space.names), used / 2, 1))
    # Candidates: the curvature's ellipse, wider by what the fit does not explain; rules that cost little are mixed in.
    cover = np.linalg.inv(h / (CORRELATED * excess) + np.diag(1 / space.sd**2) * (1 - 1 / (CORRELATED * excess)))
    root = np.linalg.cholesky((cover + cover.T) / 2 + 1e-12 * np.eye(len(cover)))
    wanted: list[tuple[Floats, dict[str, object], float]] = []
    for _ in range(CANDIDATES):
        rules, drawn = dict(point.rules), 0.0
        for name, held in tried.items():
            if name in point.rules:
                continue
            # What the runs cannot tell (how one worker's queue is routed to) is as likely as the default.
            likely = [math.exp(-max(0.0, p.cost - point.cost) / (2 * CORRELATED * excess)) for p in held]
            which = int(rng.choice(len(held) + 1, p=np.array([1.0, *likely]) / (1 + sum(likely))))
            if which:
                rules[name] = held[which - 1].rules[name]
                drawn -= 2 * math.log(likely[which - 1])
        step = rng.standard_normal(len(space.names))
        wanted.append((point.z + root @ step, rules, drawn + float(step @ step)))
    candidates = shared(lambda one: replace(search.at(one[0], one[1]), drawn=one[2]), wanted)
    for held in tried.values():
        points += held
    near = candidates + sorted(points, key=lambda p: p.cost)[: 2 * CANDIDATES]
    k = len(TTFT_QUANTILES)
    misfit = float(np.nanmedian(np.abs(point.values[:, :k] - search.observed[:, :k])))
    return Calibration(space, replays, [point, *(p for p in near if p is not point)], used, misfit)
