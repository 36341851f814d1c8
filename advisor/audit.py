"""Is the advisor any good on this database? Leave runs out, predict them, say how far off; name what spoils the data.

Laws are fitted without some runs (one run, all of one ratio, all of one rate) and those runs are simulated and compared. What
was measured twice is looked at for drift, and the rows for what the laws do not know: mixed engines, prefix hits, a late
generator, clients that wait for answers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from advisor.features import STAYED, RunData
from advisor.model import METRICS, asked, fit_laws
from advisor.parallel import each
from advisor.telling import Note, silent
from loadgen.cluster import Profile, simulate
from loadgen.ports import loopback
from traces.errors import NotEnoughDataError
from traces.measures import Slo, quantile, summarise, worth_per_s
from traces.records import Fleet, Observations

BARS = {"tpot_p50_s": 0.05, "ttft_p99_s": 0.15, "e2e_p99_s": 0.10, "throughput_per_s": 0.04}
"""Median relative errors above which an advisor fails on a user's runs."""

DRIFT = 0.10
"""The same cell measured twice may differ by this share in its median TTFT or TPOT."""

LIMIT = 4.0
"""Standard deviations of the largest step of a CUSUM of residuals at which it is called a drift."""


@dataclass(frozen=True, slots=True)
class Fold:
    """One set of runs left out. errors: metric -> log(predicted / measured) of each; "" or why no law could be fitted."""

    left_out: str
    runs: tuple[int, ...]
    errors: tuple[dict[str, float], ...]
    problem: str = ""


@dataclass(frozen=True, eq=False)
class Audit:
    """schemes: "run", "ratio", "rate" -> median relative error by metric, with folds and those that could not be fitted.

    failed: what misses its bar, in words. decisions: for each schedule that several fleets served, the fleet that laws without
    that schedule's runs choose among them, and its regret in measured goodput (less where a constraint
    is missed). confounders: in words.
    """

    schemes: dict[str, dict[str, Any]]
    failed: list[str]
    decisions: list[dict[str, Any]]
    confounders: list[str]

    def as_json(self) -> dict[str, Any]:
        """For ``advise --json``."""
        return {**asdict(self), "bars": BARS}


def audit(
    data: Sequence[RunData], slo: Slo, note: Note = silent, residuals: Mapping[int, float] | None = None
) -> Audit:
    """Of usable runs (fleets known, one engine). residuals: as in :func:`confounders`."""
    groups: dict[str, dict[str, list[int]]] = {"run": {}, "ratio": {}, "rate": {}}
    for k, one in enumerate(data):
        groups["run"].setdefault(f"run {one.run.id}", []).append(k)
        groups["ratio"].setdefault(str(one.run.fleet), []).append(k)
        rate = asked(one.pieces[0]).rate_per_s
        near = f"{rate:.1g}" if math.isfinite(rate) else "burst"
        groups["rate"].setdefault(f"{near}/s", []).append(k)
    schemes: dict[str, dict[str, Any]] = {}
    failed: list[str] = []
    # Where each run has a ratio of its own, leaving out a run is leaving out a ratio: fitted once.
    sets = {tuple(left): name for folds in groups.values() if len(folds) > 1 for name, left in folds.items()}
    note("audit", 0, 1)
    known = dict(zip(sets, each(partial(_fold, data, slo), [(name, list(k)) for k, name in sets.items()]), strict=True))
    for name, folds in groups.items():
        if len(folds) < 2:
            schemes[name] = {"folds": len(folds), "unfitted": 0, "errors": {}, "problem": f"one {name} only"}
            failed.append(f"leave-one-{name}-out cannot be done: the runs have one {name} only")
            continue
        held = [replace(known[tuple(left)], left_out=word) for word, left in folds.items()]
        errors = {}
        for metric in METRICS:
            misses = [abs(math.expm1(e[metric])) for f in held for e in f.errors if metric in e]
            if misses:
                errors[metric] = float(np.median(misses))
        unfitted = [f.left_out for f in held if f.problem]
        schemes[name] = {"folds": len(folds), "unfitted": len(unfitted), "errors": errors, "problem": ""}
        failed += [
            f"leave-one-{name}-out: {metric} is off by {errors[metric]:.0%} (median), bar {bar:.0%}"
            for metric, bar in BARS.items()
            if errors.get(metric, 0.0) > bar
        ]
        if unfitted:
            failed.append(f"leave-one-{name}-out: without {', '.join(unfitted)} no law can be fitted")
    decisions = _decisions(data, slo)
    note("audit", 1, 1, f"{len(failed)} of its bars missed" if failed else "every bar kept")
    return Audit(schemes, failed, decisions, confounders(data, residuals))


def _stretches(one: RunData) -> list[tuple[Observations, float]]:
    """(rows, due time from which they are compared): the run after its warm-up, or of a long one each window that an empty
    cluster can begin.

    The first window began when the run did. A later one is compared from when those who were there before it have gone: its
    queue is older than the window. One of which that, or the warm-up, takes more than half is left out.
    """
    begin = one.run.warmup_s or -math.inf
    if not one.windows:
        return [(one.observations, begin)]
    found = []
    for k, rows in enumerate(one.windows):
        first, last = float(rows.due_s.min()), float(rows.due_s.max())
        if k:
            stay = np.fmax(rows.last_token_s, rows.sent_s) - rows.sent_s
            stay = stay[np.isfinite(stay)]
            begin = max(first + (float(np.quantile(stay, STAYED)) if len(stay) else 0.0), one.run.warmup_s)
        if begin <= (first + last) / 2:
            found.append((rows, begin))
    return found


def _measured(one: RunData) -> list[Observations]:
    """What each stretch of a run showed."""
    return [sent.take(sent.due_s >= begin) for rows, begin in _stretches(one) for sent in [_from_sent(rows)]]


def _predicted(one: RunData, fleet: Fleet, laws: Profile) -> list[Observations]:
    """What each would have shown on a fleet under these laws."""
    told = [(simulate(asked(rows), fleet, laws).observations, begin) for rows, begin in _stretches(one)]
    return [rows.take(rows.due_s >= begin) for rows, begin in told]


def _fold(data: Sequence[RunData], slo: Slo, fold: tuple[str, list[int]]) -> Fold:
    name, left = fold
    ids = tuple(data[k].run.id for k in left)
    try:
        fit = fit_laws([one for k, one in enumerate(data) if k not in left])
    except NotEnoughDataError as error:
        return Fold(name, ids, (), str(error))
    found = []
    for k in left:
        one = data[k]
        both = _predicted(one, Fleet(one.prefill, one.decode), fit.profile), _measured(one)
        ours, theirs = ([summarise(rows, slo) for rows in stretches] for stretches in both)
        errors = {}
        for m in METRICS:
            pairs = [(getattr(a, m), getattr(b, m)) for a, b in zip(ours, theirs, strict=True)]
            logs = [math.log(a / b) for a, b in pairs if a > 0 and b > 0]
            if logs:
                errors[m] = float(np.mean(logs))
        found.append(errors)
    return Fold(name, ids, tuple(found))


def _from_sent(rows: Observations) -> Observations:
    """Judged from the moment of sending: the laws are the server's, not the generator's."""
    return replace(rows, due_s=np.where(np.isfinite(rows.sent_s), rows.sent_s, rows.due_s))


def _worth(stretches: Sequence[Observations], slo: Slo) -> float:
    """Mean of the stretches', in requests a second."""
    return float(np.mean([worth_per_s(rows, slo) for rows in stretches]))


def _decisions(data: Sequence[RunData], slo: Slo) -> list[dict[str, Any]]:
    """For each schedule that at least two fleets served: what would have been chosen without its runs."""
    by: dict[str, list[RunData]] = {}
    for one in data:
        if any(len(rows) for rows in _measured(one)):
            by.setdefault(one.run.schedule_digest, []).append(one)
    found = []
    for digest, runs in by.items():
        if len({one.run.fleet for one in runs}) < 2:
            continue
        rest = [one for one in data if one.run.schedule_digest != digest]
        try:
            fit = fit_laws(rest)
        except (NotEnoughDataError, ValueError):
            continue
        measured: dict[Fleet, list[float]] = {}
        for one in runs:
            assert one.run.fleet is not None  # noqa: S101 - callers keep runs of unknown fleet out
            measured.setdefault(one.run.fleet, []).append(_worth(_measured(one), slo))
        predicted = {f: _worth(_predicted(runs[0], f, fit.profile), slo) for f in measured}
        chosen = max(predicted, key=lambda f: predicted[f])
        means = {f: float(np.mean(v)) for f, v in measured.items()}
        best = max(means, key=lambda f: means[f])
        regret = 1 - means[chosen] / means[best] if means[best] > 0 else 0.0
        found.append(
            {"trace": runs[0].run.trace, "runs": [r.run.id for r in runs], "chosen": str(chosen), "best": str(best)}
            | {"regret": regret}
        )
    return found


# --- what spoils the data -------------------------------------------------------------------------------------------


def confounders(data: Sequence[RunData], residuals: Mapping[int, float] | None = None) -> list[str]:
    """Drift, mixed systems and hosts, prefix hits, a late generator and closed loops, each in one line; [] where none is seen.

    residuals: of each run by id, log(predicted / measured) TPOT p50 by laws of all of them; without, these laws are fitted now.
    """
    found = []
    for word, values in (
        ("engines", {one.run.engine for one in data}),
        # The reference endpoint gives its profile for a version.
        ("engine versions", {one.run.engine_version for one in data if one.run.engine_version and not one.run.profile}),
        ("models", {one.run.model for one in data}),
        ("reference profiles", {one.run.profile for one in data if one.run.profile}),
    ):
        if len(values) > 1:
            found.append(f"mixed {word}: {', '.join(sorted(values))}; laws of one do not hold for the other")
    hosts = {where for one in data if (where := _hosts(one.run.endpoint))}
    if len(hosts) > 1:
        found.append(
            f"mixed hosts: {', '.join(sorted(hosts))}; where these are different machines, laws of one do not hold "
            "for the other: learn from one with --endpoint-name URL"
        )
    for one in data:
        found += _of_run(one)
    return found + _drift(data, residuals)


def _hosts(endpoint: str) -> str:
    """Whom the URLs of a run's endpoint name, ports aside, this machine by one name; "" where it is no URL."""
    try:
        named = {urlsplit(url).hostname or "" for url in endpoint.split()}
    except ValueError:  # who imports rows may call the place what they like
        return ""
    return " and ".join(sorted({"this machine" if loopback(host) else host for host in named if host}))


def _of_run(one: RunData) -> list[str]:
    rows, name = one.pieces[0], f"run {one.run.id}"
    ok = rows.take(np.flatnonzero(rows.ok))
    found = []
    ttft = quantile(ok.ttft_sent_s, 0.5)
    if math.isfinite(one.run.lag_p99_ms) and ttft > 0 and one.run.lag_p99_ms / 1e3 > 0.1 * ttft:
        found.append(f"{name}: the generator was {one.run.lag_p99_ms:.1f} ms late at p99, over 10 % of the TTFT p50")
    if closed_loop(rows):
        found.append(f"{name}: a closed loop (a request is sent when one ends): it says nothing about a rate")
    every = one.observations
    done = _prompt_tokens(one)
    asked_for = float(every.prompt_lengths[every.ok].mean()) * one.finished if every.ok.any() else 0.0
    if done is not None and asked_for and done < 0.9 * asked_for:
        found.append(
            f"{name}: the servers computed {done / asked_for:.0%} of the prompt tokens that were sent: prefix hits, or prompts "
            "that were shared by accident"
        )
    return found


def closed_loop(rows: Observations) -> bool:
    """Is a fixed number in flight nearly always when a request is sent?"""
    use = rows.take(np.flatnonzero(rows.ok & np.isfinite(rows.sent_s)))
    if len(use) < 40:
        return False
    sent = np.sort(use.sent_s)
    before = np.arange(len(sent)) - np.searchsorted(np.sort(use.last_token_s), sent, side="left")
    middle = before[len(before) // 5 :]  # the ramp is not the loop
    common = np.bincount(np.maximum(middle, 0)).argmax()
    return bool(common >= 1 and np.mean(np.abs(middle - common) <= max(1, common // 20)) > 0.9 and _answers_pace(use))


def _answers_pace(rows: Observations) -> bool:
    """Does nearly every request leave right after an answer ended?"""
    ends = np.sort(rows.last_token_s)
    sent = np.sort(rows.sent_s)[len(rows) // 5 :]
    at = np.searchsorted(ends, sent, side="right") - 1
    gaps = sent - ends[np.maximum(at, 0)]
    typical = float(np.median(np.diff(np.sort(rows.sent_s))))
    return bool(np.mean((at >= 0) & (gaps < max(0.005, 0.1 * typical))) > 0.8)


def _prompt_tokens(one: RunData) -> float | None:
    """Prompt tokens that the prefill workers computed during the run; None where no server counts them."""
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    for s in one.samples:
        if s.prompt_tokens_total is not None and s.role in ("prefill", "mixed"):
            first.setdefault(s.worker, s.prompt_tokens_total)
            last[s.worker] = s.prompt_tokens_total
    if not first:
        return None
    total = sum(last.values()) - sum(first.values())
    return total if total > 0 else None


def _drift(data: Sequence[RunData], residuals: Mapping[int, float] | None) -> list[str]:
    """The same cell measured at different times (anchors), and a CUSUM of the residuals of all runs in time order."""
    found = []
    ordered = sorted(data, key=lambda one: one.run.started_unix_s)
    cells: dict[tuple[Any, str], list[RunData]] = {}
    for one in ordered:
        cells.setdefault((one.run.fleet, one.run.schedule_digest), []).append(one)
    for (fleet, _), runs in cells.items():
        for metric in ("ttft_sent_s", "tpot_s"):
            values = [quantile(getattr(r.counted, metric)[r.counted.ok], 0.5) for r in runs]
            values = [v for v in values if v > 0]
            if len(values) > 1 and max(values) / min(values) - 1 > DRIFT:
                word = "TPOT" if metric == "tpot_s" else "TTFT"
                shown = ", ".join(f"{v * 1e3:.4g}" for v in values)
                found.append(
                    f"drift: {fleet} on the same requests had a median {word} of {shown} ms "
                    f"(runs {', '.join(str(r.run.id) for r in runs)})"
                )
    told = _residuals(ordered) if residuals is None else [residuals[one.run.id] for one in ordered]
    since = cusum(told)
    if since is not None:
        found.append(
            f"drift: from run {ordered[since].run.id} on the runs differ from those before (CUSUM of TPOT residuals)"
        )
    return found


def _residuals(ordered: Sequence[RunData]) -> list[float]:
    """log(predicted / measured) TPOT p50 of each run by laws of all of them."""
    if len(ordered) < 6:
        return []
    try:
        fit = fit_laws(ordered)
    except NotEnoughDataError:
        return []
    return [r.get("tpot_p50_s", 0.0) for r in fit.residuals]


def cusum(residuals: Sequence[float]) -> int | None:
    """Position from which residuals in time order have another mean (the largest step of a standardised CUSUM); None without."""
    n = len(residuals)
    if n < 6:
        return None
    values = np.asarray(residuals, dtype=float)
    # The spread between neighbours: a shift of the mean must not hide itself by widening it.
    spread = max(1.4826 * float(np.median(np.abs(np.diff(values)))) / math.sqrt(2), 0.005)
    at = np.arange(2, n - 1)
    total = np.cumsum(values)
    step = (total[-1] - total[at - 1]) / (n - at) - total[at - 1] / at
    z = np.abs(step) / (spread * np.sqrt(1 / at + 1 / (n - at)))
    return int(at[np.argmax(z)]) if float(z.max()) > LIMIT else None
