"""What means at a fixed concurrency can tell: which split serves most with so many requests in flight, by regression.

Rows are :class:`traces.records.Aggregate`, such as vendors publish: no arrivals, no quantiles, no single request. They cannot
say how requests queue that come at a rate of their own, and nothing here does. They can say how mean TPOT and TTFT move with
the split. Two ridge regressions on logarithms:

- TPOT on concurrency per worker and per GPU of either role, mean lengths, widths, and the system that was measured;
- TTFT on the same and on the prompt tokens a second that reach a prefill worker, which Little's law gives from
  concurrency, answer length and TPOT (of a row that is asked about, the predicted one).

Penalty and scale of each are those that make the relative error of splits left out among the rows smallest. Every split is then
left out in turn, and how far those predictions were off is the interval.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from advisor.table import Table
from traces import __version__
from traces.errors import InputError, NoFleetError, NotEnoughDataError, StoreError
from traces.measures import Slo
from traces.records import CLOSED_LOOP, Aggregate, Fleet, Floats, Run
from traces.store import Store

SPLITS = 3
"""Splits that must have been measured: what a fourth would do cannot be told from two points of a curve."""

SCALES = np.linspace(0.5, 1.1, 25)
PENALTIES = (0.1, 1.0, 10.0)

FAR = 2.0
"""A concurrency, a mean length or a number of workers of a role that many times beyond what was measured is not answered."""

LENGTHS = {"prompts": "prompt_tokens", "answers": "output_tokens"}


@dataclass(frozen=True, slots=True)
class Point:
    """One aggregate as the regressions see it. widths: GPUs of a prefill and of a decode worker. system: engine, its model and
    where it ran. held: what was measured; of a point that is asked about its TTFT and TPOT are not looked at."""

    fleet: Fleet
    widths: tuple[int, int]
    system: tuple[str, ...]
    held: Aggregate

    @classmethod
    def of(cls, run: Run, held: Aggregate) -> Point:
        """From what the store has."""
        assert run.fleet is not None  # noqa: S101 - an aggregate is not stored without
        return cls(run.fleet, run.gpus_per_worker, (run.engine, run.model, run.endpoint), held)

    @property
    def split(self) -> str:
        """What is left out together."""
        return str(self.fleet)


def _features(points: Sequence[Point], systems: Sequence[tuple[str, ...]]) -> Floats:
    """[n, k]: logarithms of the numbers, then which engine, model and place it was, each by itself."""
    flight = np.array([p.held.concurrency for p in points])
    p, d = (np.array([getattr(q.fleet, role) for q in points], dtype=float) for role in ("prefill", "decode"))
    wide_p, wide_d = (np.array([q.widths[k] for q in points], dtype=float) for k in (0, 1))
    n, m = (np.array([getattr(q.held, f"{word}_tokens") for q in points]) for word in ("prompt", "output"))
    numbers = [flight, flight / d, flight / p, flight / (d * wide_d), flight / (p * wide_p)]
    numbers += [n, m, wide_p, wide_d, p * wide_p, d * wide_d]
    words = [
        np.array([float(q.system[k] == value) for q in points])
        for k in range(len(systems[0]))
        for value in sorted({s[k] for s in systems})
    ]
    return np.asarray(np.hstack([np.log(np.array(numbers)).T, np.array(words).T]))


def _reach(points: Sequence[Point], tpot: Floats) -> Floats:
    """[n, 3]: logarithms of prompt tokens a second a prefill worker gets, of the same a GPU, of requests a second."""
    rate = np.array([p.held.concurrency / (p.held.output_tokens * s) for p, s in zip(points, tpot, strict=True)])
    tokens = rate * np.array([p.held.prompt_tokens / p.fleet.prefill for p in points])
    wide = np.array([p.widths[0] for p in points], dtype=float)
    return np.asarray(np.log(np.array([tokens, tokens / wide, rate / np.array([p.fleet.prefill for p in points])]).T))


@dataclass(frozen=True, eq=False)
class _Scaled:
    """A ridge on log y, times a scale."""

    model: Any
    scale: float

    def predict(self, x: Floats) -> Floats:
        return np.asarray(np.exp(self.model.predict(x)) * self.scale)


def _fitted(x: Floats, y: Floats, groups: Sequence[str]) -> _Scaled:
    from sklearn import config_context  # what it brings along takes a third of a second to import
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    logs, apart = np.log(y), np.empty((len(PENALTIES), len(y)))
    with config_context(assume_finite=True, skip_parameter_validation=True):  # these checks would take most of the time
        for train, held in GroupKFold(min(5, len(set(groups)))).split(x, groups=groups):
            scaler = StandardScaler().fit(x[train])
            known, asked = scaler.transform(x[train]), scaler.transform(x[held])
            for told, penalty in zip(apart, PENALTIES, strict=True):
                told[held] = np.exp(Ridge(penalty).fit(known, logs[train]).predict(asked))
        errors = np.abs(apart[:, None, :] * SCALES[:, None] / y - 1).mean(axis=2)
        best, scale = np.unravel_index(int(errors.argmin()), errors.shape)
        model = make_pipeline(StandardScaler(), Ridge(PENALTIES[int(best)])).fit(x, logs)
    return _Scaled(model, float(SCALES[scale]))


@dataclass(frozen=True, eq=False)
class Closed:
    """Fitted on points."""

    systems: tuple[tuple[str, ...], ...]
    tpot: _Scaled
    ttft: _Scaled

    @classmethod
    def fit(cls, points: Sequence[Point]) -> Closed:
        """Of at least two splits."""
        systems = tuple(sorted({p.system for p in points}))
        groups = [p.split for p in points]
        x = _features(points, systems)
        tpot, ttft = (np.array([getattr(p.held, name) for p in points]) for name in ("tpot_s", "ttft_s"))
        more = np.hstack([x, _reach(points, tpot)])
        return cls(systems, _fitted(x, tpot, groups), _fitted(more, ttft, groups))

    def predict(self, points: Sequence[Point]) -> list[Aggregate]:
        """What each would measure."""
        x = _features(points, self.systems)
        tpot = self.tpot.predict(x)
        ttft = self.ttft.predict(np.hstack([x, _reach(points, tpot)]))
        return [replace(p.held, ttft_s=float(a), tpot_s=float(b)) for p, a, b in zip(points, ttft, tpot, strict=True)]


def left_out(points: Sequence[Point]) -> list[Aggregate]:
    """Each point as the points of other splits predict it."""
    found: list[Aggregate] = [p.held for p in points]
    for split in {p.split for p in points}:
        held = [k for k, p in enumerate(points) if p.split == split]
        told = Closed.fit([p for p in points if p.split != split]).predict([points[k] for k in held])
        for k, one in zip(held, told, strict=True):
            found[k] = one
    return found


# --- an answer ------------------------------------------------------------------------------------------------------

METRICS = ("throughput_per_s", "ttft_s", "tpot_s", "e2e_s")


@dataclass(frozen=True, eq=False)
class Candidate:
    """One split, predicted: means, as {value, low, high}; low and high are NaN of one measurement.

    measured: with as many in flight and lengths as long, so its figures are what was measured. extrapolated: what of it lies
    outside of what was measured, or "".
    """

    fleet: Fleet
    figures: dict[str, dict[str, float]]
    meets: bool
    measured: bool
    extrapolated: str


@dataclass(frozen=True, eq=False)
class ClosedAnswer:
    """Which split serves most at a concurrency. errors: median relative error at splits left out. trace: whose mean lengths were
    asked about, "" for those of the last run."""

    best: Candidate
    runner_up: Candidate | None
    candidates: list[Candidate]
    asked: Aggregate
    slo: Slo
    gpus: int
    runs: list[int]
    errors: dict[str, float]
    splits: int
    next_probe: dict[str, Any]
    sure: bool
    warnings: list[str] = field(default_factory=list)
    gpus_per_worker: tuple[int, int] = (1, 1)
    trace: str = ""
    id: int | None = None

    @property
    def sentence(self) -> str:
        """The answer in one sentence."""
        f = self.best.figures
        served = f["throughput_per_s"]
        between = " (measured)" if self.best.measured else f" [{served['low']:.3g}, {served['high']:.3g}]"
        return (
            f"With {self.asked.concurrency:g} requests in flight run {self.best.fleet.prefill} prefill : "
            f"{self.best.fleet.decode} decode: {served['value']:.3g} req/s{between}, mean TTFT "
            f"{f['ttft_s']['value']:.3g} s, mean TPOT {f['tpot_s']['value'] * 1e3:.3g} ms. "
            "Nothing is known of an open-loop rate."
        )

    def as_json(self) -> dict[str, Any]:
        """The keys of ``advise --json``; goodput is null: means do not tell which request met its limits."""

        def one(c: Candidate) -> dict[str, Any]:
            return {
                "prefill": c.fleet.prefill,
                "decode": c.fleet.decode,
                **c.figures,
                "goodput_per_s": None,
                "meets_slo": c.meets,
                "measured": c.measured,
                "extrapolated": c.extrapolated,
            }

        best = one(self.best)
        return {
            "sentence": self.sentence,
            "question": "closed loop",
            "strategy": "static",
            **{k: best[k] for k in ("prefill", "decode", "goodput_per_s", *METRICS)},
            "concurrency": self.asked.concurrency,
            "prompt_tokens": self.asked.prompt_tokens,
            "output_tokens": self.asked.output_tokens,
            "runner_up": one(self.runner_up) if self.runner_up else None,
            "candidates": [one(c) for c in self.candidates],
            "thresholds": None,
            "next_probe": self.next_probe,
            "runs": self.runs,
            "splits": self.splits,
            "left_out_errors": self.errors,
            "sure": self.sure,
            "warnings": self.warnings,
            "slo": str(self.slo),
            "gpus": self.gpus,
            "gpus_per_worker": list(self.gpus_per_worker),
            "trace": self.trace or None,
        }


def as_table(answer: Mapping[str, Any]) -> Table:
    """The splits of an answer's JSON, as it stands in the database too."""
    head = ("P:D", "req/s", "mean TTFT s", "mean TPOT ms", "mean E2E s", "within SLO", "measured", "note")
    rows, strong = [], []
    for k, c in enumerate(answer["candidates"]):
        row = [f"{c['prefill']}:{c['decode']}"]
        for name, unit in (("throughput_per_s", 1.0), ("ttft_s", 1.0), ("tpot_s", 1e3), ("e2e_s", 1.0)):
            value, low, high = (c[name][part] for part in ("value", "low", "high"))
            known = low is not None and low == low  # of one measurement there is no interval
            row.append(f"{value * unit:.3g}" + (f" [{low * unit:.3g}, {high * unit:.3g}]" if known else ""))
        ranks = ((answer, "recommended"), (answer["runner_up"] or {}, "runner-up"))
        word = next((w for one, w in ranks if _fleet(one) == _fleet(c)), "")
        strong += [k] if word == "recommended" else []
        row += ["yes" if c["meets_slo"] else "no", "yes" if c["measured"] else "no", word or c["extrapolated"]]
        rows.append(row)
    return Table(head, rows, strong=strong)


def _fleet(one: Mapping[str, Any]) -> tuple[Any, Any]:
    return one.get("prefill"), one.get("decode")


def evidence(answer: Mapping[str, Any]) -> str:
    """What an answer rests on, and how far splits that were left out are missed."""
    errors = ", ".join(f"{name} {error:.1%}" for name, error in answer["left_out_errors"].items())
    return f"{len(answer['runs'])} means of {answer['splits']} splits; left-out splits are missed by (median): {errors}"


def advise_closed(
    store: Store,
    runs: Sequence[Run],
    concurrency: float,
    *,
    gpus: int | None = None,
    slo: Slo | None = None,
    gpus_per_worker: tuple[int, int] | None = None,
    lengths: tuple[float, float] | None = None,
    trace: str = "",
    seed: int = 0,
) -> ClosedAnswer:
    """The split of ``gpus`` that serves most with so many requests in flight, from stored aggregates; kept as a row.

    The system asked about is that of the last run; rows of others help to tell how splits matter. lengths: mean prompt and
    answer [those of the last run]; trace: where they come from.

    NotEnoughDataError names what is missing, NoFleetError when no split keeps the limits.
    """
    known = [run for run in runs if run.policy == CLOSED_LOOP]
    found = store.aggregates([run.id for run in known])
    points = [Point.of(run, found[run.id]) for run in known if run.id in found]
    if not points:
        raise NotEnoughDataError(
            "no stored run is a mean at a fixed concurrency. Import some: steelyard runs import FILE --aggregate; or leave out "
            "--concurrency to ask about a rate."
        )
    last = points[-1]
    prompt, output = lengths or (last.held.prompt_tokens, last.held.output_tokens)
    asked = Aggregate(concurrency, prompt, output, math.nan, math.nan)
    wanted = slo or (Slo.parse(known[-1].slo) if known[-1].slo else Slo())
    widths = gpus_per_worker or last.widths
    gpus = gpus or last.fleet.gpus(last.widths)
    splits = Fleet.splits(gpus, widths)
    if not splits:
        raise InputError(
            f"{gpus} GPUs at {widths[0]} and {widths[1]} GPUs a worker make no fleet with both roles that uses them all. Give "
            "another --gpus or --gpus-per-worker."
        )
    mine = [p for p in points if p.system == last.system]
    _enough(points, mine, asked, splits, widths)
    errors, spreads = _spreads(points)
    model = Closed.fit(points)
    told = model.predict([Point(f, widths, last.system, asked) for f in splits])
    candidates = [_candidate(f, widths, one, spreads, mine, wanted) for f, one in zip(splits, told, strict=True)]
    near = [c for c in candidates if _near(c.fleet, mine)]
    ranked = sorted((c for c in near if c.meets), key=lambda c: -c.figures["throughput_per_s"]["value"])
    if not ranked:
        least = min(near, key=lambda c: c.figures["tpot_s"]["value"] / (wanted.limit("tpot") or math.inf))
        raise NoFleetError(
            f"no split of {gpus} GPUs keeps {wanted} in the mean with {concurrency:g} requests in flight: {least.fleet} has a "
            f"TTFT of {least.figures['ttft_s']['value']:.3g} s and a TPOT of {least.figures['tpot_s']['value'] * 1e3:.3g} ms. "
            "Lower --concurrency, loosen --slo, or give more --gpus."
        )
    best, *rest = ranked
    apart = max(SAME, errors["throughput_per_s"])
    close = next((c for c in rest[:1] if _close(best, c, apart)), None)
    unseen = next((c for c in ranked[:2] if not c.measured), None) or best
    beyond = _beyond(mine, asked)
    answer = ClosedAnswer(
        best,
        rest[0] if rest else None,
        candidates,
        asked,
        wanted,
        gpus,
        [run.id for run in known if run.id in found],
        errors,
        len({p.split for p in points}),
        _probe(unseen.fleet, concurrency, "it is the answer" if unseen is best else "it is the closest rival"),
        not beyond and not close,
        _words(best, close, known, wanted, errors, near, candidates) + beyond,
        widths,
        trace,
    )
    digest = hashlib.sha256("".join(sorted(run.schedule_digest for run in known)).encode()).hexdigest()
    said = answer.as_json() | {"version": __version__}
    try:
        return replace(answer, id=store.add_recommendation("closed loop", said, answer.runs, digest, seed))
    except StoreError as error:
        answer.warnings.append(f"this answer is not stored: {error}")
        return answer


def _probe(fleet: Fleet, concurrency: float, why: str) -> dict[str, Any]:
    return {
        "prefill": fleet.prefill,
        "decode": fleet.decode,
        "concurrency": concurrency,
        "why": why,
        "command": f"steelyard runs import FILE --aggregate, with a row of {fleet} at {concurrency:g} requests in flight",
    }


def _enough(
    points: Sequence[Point], mine: Sequence[Point], asked: Aggregate, splits: Sequence[Fleet], widths: tuple[int, int]
) -> None:
    """NotEnoughDataError, with the measurement that is missing."""
    known = sorted({p.widths for p in mine})
    if widths not in known:
        had = " or ".join("{},{}".format(*pair) for pair in known)
        raise NotEnoughDataError(
            f"the aggregates were measured with {had} GPUs a worker, which does not tell what workers of "
            f"{widths[0]},{widths[1]} do. Measure next: {_probe(splits[len(splits) // 2], asked.concurrency, '')['command']}, "
            f"prefill_gpus {widths[0]} and decode_gpus {widths[1]}; or ask about those measured: "
            f"--gpus-per-worker {known[0][0]},{known[0][1]}"
        )
    seen = Counter(p.fleet for p in points)
    if len(seen) < SPLITS:
        other = [f for f in splits if f not in seen] or list(splits)
        most = max(other, key=lambda f: min(abs(math.log(f.prefill / f.decode * q.decode / q.prefill)) for q in seen))
        raise NotEnoughDataError(
            f"the aggregates know {len(seen)} splits ({', '.join(map(str, sorted(seen)))}), {SPLITS} are needed to tell what "
            f"another would do. Measure next: {_probe(most, asked.concurrency, '')['command']}"
        )
    low, high = (pick(p.held.concurrency for p in mine) for pick in (min, max))
    if not low / FAR <= asked.concurrency <= high * FAR:
        nearest = max(mine, key=lambda p: -abs(math.log(p.held.concurrency / asked.concurrency))).fleet
        raise NotEnoughDataError(
            f"the aggregates were measured with {low:g} to {high:g} requests in flight, {asked.concurrency:g} is too far from "
            f"that. Measure next: {_probe(nearest, asked.concurrency, '')['command']}"
        )
    for word, name in LENGTHS.items():
        length, low, high = _length(name, mine, asked)
        if not low / FAR <= length <= high * FAR:
            raise NotEnoughDataError(
                f"the aggregates were measured with {word} of {low:.4g} to {high:.4g} tokens on average, {word} of {length:.4g} "
                f"tokens are too far from that. Measure next: {_probe(mine[-1].fleet, asked.concurrency, '')['command']} and "
                "lengths as asked"
            )
    if not any(_near(f, mine) for f in splits):
        shown = sorted({str(p.fleet) for p in mine})
        raise NotEnoughDataError(
            f"no split of these GPUs is near to one that was measured ({', '.join(shown)}). Measure next: "
            f"{_probe(splits[len(splits) // 2], asked.concurrency, '')['command']}"
        )


def _length(name: str, mine: Sequence[Point], asked: Aggregate) -> tuple[float, float, float]:
    """A mean length as asked, the least and the most that was measured."""
    measured = [float(getattr(p.held, name)) for p in mine]
    return float(getattr(asked, name)), min(measured), max(measured)


def _beyond(mine: Sequence[Point], asked: Aggregate) -> list[str]:
    """What no row measured of the mean lengths."""
    found = []
    for word, name in LENGTHS.items():
        length, low, high = _length(name, mine, asked)
        if not low * (1 - SAME) <= length <= high * (1 + SAME):
            found.append(
                f"lengths outside of what was measured: {word} of {length:.4g} tokens on average, not {low:.4g} to {high:.4g}; "
                "how much longer or shorter ones take is guessed, and in no interval"
            )
    return found


def _near(fleet: Fleet, mine: Sequence[Point]) -> bool:
    """Are there measured splits with as many workers of each role, to a factor?"""
    for role in ("prefill", "decode"):
        counts = [getattr(p.fleet, role) for p in mine]
        if not min(counts) / FAR <= getattr(fleet, role) <= max(counts) * FAR:
            return False
    return True


def _spreads(points: Sequence[Point]) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """(median relative errors of splits left out; 5 % and 95 % quantiles of log(measured / predicted)), by metric."""
    told = left_out(points)
    off = {
        name: np.array([math.log(getattr(p.held, name) / getattr(t, name)) for p, t in zip(points, told, strict=True)])
        for name in METRICS
    }
    errors = {name: float(np.median(np.abs(np.expm1(-v)))) for name, v in off.items()}
    # Split conformal on either side: of n errors the ceil((n + 1) q)-th smallest, the outermost of few.
    n = len(points)
    rank = min(n - 1, math.ceil((n + 1) * 0.95) - 1)
    spreads = {
        name: (min(0.0, float(np.sort(v)[n - 1 - rank])), max(0.0, float(np.sort(v)[rank]))) for name, v in off.items()
    }
    return errors, spreads


def _candidate(
    fleet: Fleet,
    widths: tuple[int, int],
    told: Aggregate,
    spreads: dict[str, tuple[float, float]],
    mine: Sequence[Point],
    slo: Slo,
) -> Candidate:
    ours = [p.held for p in mine if p.fleet == fleet and p.widths == widths]
    same = [one for one in ours if _same(one, told)]
    figures = {}
    for name, (low, high) in spreads.items():
        value = float(getattr(told, name))
        figures[name] = {"value": value, "low": value * math.exp(low), "high": value * math.exp(high)}
        if same:  # what was measured is not predicted; of one measurement nobody knows how it would repeat
            each = [float(getattr(one, name)) for one in same]
            low, high = (min(each), max(each)) if len(each) > 1 else (math.nan, math.nan)
            figures[name] = {"value": float(np.mean(each)), "low": low, "high": high}
    meets = all(figures[f"{word}_s"]["value"] <= limit for word, limit in slo.limits)
    outside = "" if ours else "this split was not measured"
    return Candidate(fleet, figures, meets, bool(same), outside)


def _close(best: Candidate, rival: Candidate, apart: float) -> bool:
    """May the rival serve more, by the interval of one of them? Of two that were measured once each nobody knows how they would
    repeat: those that differ by less than ``apart``, as splits left out are missed, are not told from each other."""
    a, b = (c.figures["throughput_per_s"] for c in (best, rival))
    if math.isnan(a["low"]) and math.isnan(b["low"]):
        return b["value"] > a["value"] * (1 - apart)
    return b["value"] > a["low"] or b["high"] > a["value"]


SAME = 0.02
"""Mean lengths that differ by this share at most are the same lengths."""


def _same(one: Aggregate, asked: Aggregate) -> bool:
    """Was it measured with as many in flight, and lengths as long?"""
    lengths = ((one.prompt_tokens, asked.prompt_tokens), (one.output_tokens, asked.output_tokens))
    return one.concurrency == asked.concurrency and all(abs(a / b - 1) <= SAME for a, b in lengths)


def _words(
    best: Candidate,
    close: Candidate | None,
    runs: Sequence[Run],
    slo: Slo,
    errors: dict[str, float],
    near: Sequence[Candidate],
    every: Sequence[Candidate],
) -> list[str]:
    found = [
        "these are means of closed loops: they say nothing about queueing at an open-loop rate, and nothing about percentiles. "
        "For that measure: steelyard replay TRACE --endpoint URL --fleet " + str(best.fleet)
    ]
    if close:
        found.append(f"{close.fleet} may serve as much: measure both before you rely on the difference")
    if errors["ttft_s"] > 0.15 or errors["tpot_s"] > 0.05:
        found.append(
            f"splits left out are missed by {errors['tpot_s']:.0%} (TPOT), {errors['ttft_s']:.0%} (TTFT) and "
            f"{errors['throughput_per_s']:.0%} (throughput) in the median"
        )
    if len(near) < len(every):
        found.append(f"{len(every) - len(near)} of {len(every)} splits are too far from those measured to be judged")
    if slo.constraints:
        found.append(f"of {slo} the percentiles were not judged: means do not tell them")
    versions = sorted({run.engine_version for run in runs if run.engine_version})
    if len(versions) > 1:
        found.append(f"mixed engine versions: {', '.join(versions)}")
    return found


def as_dict(held: Aggregate) -> dict[str, float]:
    """An aggregate with what follows from it, for ``runs show --json``."""
    return asdict(held) | {"e2e_s": held.e2e_s, "throughput_per_s": held.throughput_per_s}
