"""A run, however long, as a few hundred figures: what a page can hold and a reader can see.

Distributions become at most QUANTILES values, everything over time at most BINS bins. A run of a million requests makes
a digest no larger than a run of a thousand.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from advisor.features import RunData, decode_rows, quiet_rows
from loadgen.cluster import Profile
from traces.aggregate import Bins, quantile, quantiles, so_far
from traces.measures import Slo, Summary, summarise
from traces.records import FleetChange, Floats, Observations, Run, Sample, Schedule
from traces.store import Store

QUANTILES = np.unique(np.concatenate([np.linspace(0, 1, 161), [0.995, 0.997, 0.998, 0.999]]))
"""Cumulative shares at which a distribution is kept: even steps, and the tail that an SLO is about."""

BINS = 200
POINTS = 240
"""Requests of a run that are drawn one by one against a law; spread evenly over the predictions."""

METRICS = ("ttft", "tpot", "e2e")


@dataclass(frozen=True, eq=False)
class Over:
    """Figures in bins of time. at_s: [k] middles. width_s: of a bin, 0 of the only one where all came at one instant: then there
    are no rates. values: name -> [k], NaN where nothing was."""

    at_s: Floats
    width_s: float
    values: dict[str, Floats]


@dataclass(frozen=True, eq=False)
class Fitting:
    """Measured against predicted seconds of one law, POINTS of n rows. error: median of |measured / predicted - 1|."""

    predicted: Floats
    measured: Floats
    n: int
    error: float


@dataclass(frozen=True, eq=False)
class Digest:
    """One run; what goes on has counts and lag of the rows so far. cdf: metric -> [len(QUANTILES)] seconds. n: metric -> requests that have it: finished, for TPOT those of two
    tokens or more. within: metric -> share of them within its SLO limit. exact: from its rows, else from the counts that are kept
    of a long run.

    requests: arrivals, latencies and lag over time. readings: the servers' own, by role: ``prefill waiting_requests``,
    ``decode busy``, ``prefill workers``, .. tpot, ttft: the laws held against this run, where they can be.
    failures: (kind, how many, what was seen first).
    """

    run: Run
    summary: Summary
    cdf: dict[str, Floats]
    n: dict[str, int]
    within: dict[str, float]
    requests: Over
    readings: Over | None
    changes: Sequence[FleetChange]
    tpot: Fitting | None
    ttft: Fitting | None
    failures: Sequence[tuple[str, int, str]]
    exact: bool = True

    @property
    def name(self) -> str:
        """What the run is called in a legend."""
        fleet = self.run.fleet or "fleet unknown"
        rate = self.run.rate_per_s
        asked = "" if math.isnan(rate) else " at once" if math.isinf(rate) else f" at {rate:.3g}/s"
        return f"run {self.run.id}: {fleet}{asked}"


LAW_ROWS, LAW_WINDOWS = 40_000, 8
"""Of a long run, what is held against the laws: as many rows in as many windows."""

LAW_COLUMNS = (
    "index", "due_s", "sent_s", "first_token_s", "last_token_s", "requested_prompt_tokens", "requested_tokens", "prompt_tokens",
    "output_tokens", "status",
)  # fmt: skip
COLUMNS = (*LAW_COLUMNS, "dispatch_s", "error", "detail")
"""What a digest uses of a row: reading is most of the work."""


def read(store: Store, run: Run, slo: Slo, profile: Profile | None = None, data: RunData | None = None) -> Digest:
    """The digest of a stored run; data: its rows, where they are at hand already."""
    changes = store.fleet_changes(run.id)
    held = store.bins(run, slo)
    if held is None:
        data = data or RunData(run, store.observations(run.id, COLUMNS), store.samples(run.id))
        return digest(data, slo, changes, profile)
    if profile is not None and run.fleet is not None and not run.fleet.mixed:
        data = data or RunData.of(run, store.windows(run.id, LAW_ROWS, LAW_WINDOWS, LAW_COLUMNS))
    cdf, n, within = {}, {}, {}
    for metric in METRICS:
        counts = held.of(f"{metric}_s")
        if not counts.any():
            continue
        cdf[metric] = quantiles(counts, QUANTILES, held.quantile(f"{metric}_s", 1.0))
        n[metric] = int(counts.sum())
        limit = slo.limit(metric)
        if limit is not None:
            within[metric] = held.share(f"{metric}_s", limit)
    tpot, ttft = _laws(data, profile) if data is not None else (None, None)
    failures = sorted(((kind, n, seen) for kind, (n, _, seen) in held.failures.items()), key=lambda f: -f[1])
    return Digest(
        run=so_far(run, held),
        summary=held.summary(),
        cdf=cdf,
        n=n,
        within=within,
        requests=_counted(held),
        readings=_readings(store.samples(run.id)),
        changes=changes,
        tpot=tpot,
        ttft=ttft,
        failures=failures,
        exact=False,
    )


def _counted(held: Bins) -> Over:
    """As :func:`_requests`, from counts."""
    edges = held.edges_s
    width = np.diff(edges)  # of the last slot 0 where its only instant is its beginning
    width = np.where(width > 0, width, held.width_s if held.last_due_s > held.first_due_s else np.nan)
    n = {name: counts[: held.slots].astype(float) for name, counts in held.counts.items()}
    values = {
        "rate_per_s": n["requests"] / width,
        "failed_per_s": (n["requests"] - n["ok"]) / width,
        "prompt_tokens_per_s": n["prompt_tokens"] / width,
        "output_tokens_per_s": n["tokens"] / width,
    }
    for name in (*METRICS, "lag"):
        counts, most = held.over(f"{name}_s"), held.most(f"{name}_s")
        for word, q in (("p50", 0.5), ("p99", 0.99), ("max", 1.0)) if name == "lag" else (("p50", 0.5), ("p99", 0.99)):
            values[f"{name}_{word}_s"] = quantile(counts, q, most)
    return Over((edges[:-1] + edges[1:]) / 2, held.width_s if held.last_due_s > held.first_due_s else 0.0, values)


def digest(data: RunData, slo: Slo, changes: Sequence[FleetChange] = (), profile: Profile | None = None) -> Digest:
    """The digest of a run. slo: what goodput is counted within. profile: laws to hold against the run."""
    rows = data.run.counted(data.observations)
    ok = rows.take(np.flatnonzero(rows.ok))
    cdf, n, within = {}, {}, {}
    for metric in METRICS:
        values: Floats = getattr(ok, f"{metric}_s")
        values = values[np.isfinite(values)]
        if len(values):
            cdf[metric], n[metric] = np.quantile(values, QUANTILES), len(values)
        limit = slo.limit(metric)
        if limit is not None and len(values):
            within[metric] = float((values <= limit).mean())
    tpot, ttft = _laws(data, profile)
    return Digest(
        run=so_far(data.run, data.observations),
        summary=summarise(rows, slo),
        cdf=cdf,
        n=n,
        within=within,
        requests=_requests(data.observations),
        readings=_readings(data.samples),
        changes=list(changes),
        tpot=tpot,
        ttft=ttft,
        failures=_failures(data.observations),
    )


@dataclass(frozen=True, eq=False)
class Traffic:
    """What is asked, over time. over: rate_per_s, prompt_tokens, output_tokens (means a request), and, with laws, the workers
    that this traffic keeps busy: prefill_workers, decode_workers. batch: sequences a decode worker may hold in that.
    """

    over: Over
    batch: float


def traffic(schedule: Schedule, profile: Profile | None, slo: Slo) -> Traffic:
    """A schedule over time, and the workers it needs by the laws alone, without queueing.

    Prefill: rate x service time of a prompt. Decode: a worker that holds B sequences makes B tokens a step; B is the most
    that keeps the TPOT limit (and those of the batch and the KV cache) at the traffic's mean context, so tokens/s x step(B) / B workers are busy.
    """
    over = _binned(schedule.due_s, max(4, min(BINS, len(schedule) // 10)))
    place, n, width = over
    k = len(n)
    rate = n / (width or np.nan)
    prompts = np.bincount(place, weights=schedule.prompt_tokens, minlength=k)
    outputs = np.bincount(place, weights=schedule.output_tokens, minlength=k)
    some = np.where(n > 0, n, np.nan)
    values = {
        "rate_per_s": rate,
        "prompt_tokens": prompts / some,
        "output_tokens": outputs / some,
        "ratio": prompts / np.where(outputs > 0, outputs, np.nan),
    }
    batch = float("nan")
    if profile is not None and len(schedule) and width:
        mean = float(schedule.prompt_tokens.mean())
        each = profile.prompt_s(schedule.prompt_tokens.astype(float), profile.together(mean), mean)
        work = np.bincount(place, weights=each, minlength=k)
        m = schedule.output_tokens.astype(float)
        context = float((m * (schedule.prompt_tokens + m / 2)).sum() / m.sum())
        held = max(1, int(profile.kv_tokens / context)) if profile.kv_tokens else profile.max_batch
        sizes = np.arange(1, min(profile.max_batch, held, 1024) + 1, dtype=float)
        steps = profile.step_s(sizes, sizes * context)
        limit = slo.limit("tpot")
        most = int((steps <= limit).sum()) if limit else len(sizes)
        most = max(1, most)
        batch = sizes[most - 1]
        values["prefill_workers"] = work / width
        values["decode_workers"] = outputs / width * steps[most - 1] / batch
    start = float(schedule.due_s[0]) if len(schedule) else 0.0
    return Traffic(Over(_middles(k, start, width), width, values), batch)


def traffic_of(windows: Sequence[Schedule]) -> Traffic:
    """The same of a trace too long to be read, from windows of it: a bin for each."""
    at = np.array([(w.due_s[0] + w.due_s[-1]) / 2 for w in windows])
    prompts, outputs = (np.array([getattr(w, c).mean() for w in windows]) for c in ("prompt_tokens", "output_tokens"))
    rate = np.array([w.rate_per_s if w.span_s else np.nan for w in windows])
    values = {"rate_per_s": rate, "prompt_tokens": prompts, "output_tokens": outputs, "ratio": prompts / outputs}
    return Traffic(Over(at, float(np.mean([w.span_s for w in windows])), values), float("nan"))


# --- over time ------------------------------------------------------------------------------------------------------


def _binned(at_s: Floats, most: int) -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]], Floats, float]:
    """(bin of each instant, instants in each bin, width in seconds) of equal bins from the first to the last; of one instant a
    bin of no width."""
    if not len(at_s):
        return np.empty(0, np.int64), np.zeros(1), 1.0
    start, end = float(at_s.min()), float(at_s.max())
    if end - start < 1e-9:
        return np.zeros(len(at_s), np.int64), np.array([float(len(at_s))]), 0.0
    width = (end - start) / most
    place = np.minimum(((at_s - start) / width).astype(np.int64), most - 1)
    return place, np.bincount(place, minlength=most).astype(float), width


def _middles(bins: int, start: float, width: float) -> Floats:
    return np.asarray(start + (np.arange(bins) + 0.5) * width, dtype=np.float64)


def _quantiles(place: np.ndarray[tuple[int], np.dtype[np.int64]], values: Floats, bins: int, q: float) -> Floats:
    """[bins]: the q-quantile of the finite values in each bin (nearest rank), NaN where there is none."""
    keep = np.isfinite(values)
    place, values = place[keep], values[keep]
    order = np.lexsort((values, place))
    n = np.bincount(place, minlength=bins)
    first = np.concatenate([[0], np.cumsum(n)[:-1]])
    rank = first + np.ceil(q * n).astype(np.int64) - 1
    found = np.full(bins, np.nan)
    some = n > 0
    found[some] = values[order][np.maximum(rank, first)[some]]
    return found


def _requests(rows: Observations) -> Over:
    """Arrivals, latencies of finished requests and lag of all, by due time."""
    most = max(1, min(BINS, len(rows) // 5))
    place, n, width = _binned(rows.due_s, most)
    bins = len(n)
    good = rows.ok
    second = width or np.nan  # at one instant nothing has a rate
    values = {
        "rate_per_s": n / second,
        "failed_per_s": np.bincount(place[~good], minlength=bins) / second,
        "prompt_tokens_per_s": np.bincount(place, weights=rows.prompt_lengths, minlength=bins) / second,
        "output_tokens_per_s": np.bincount(place[good], weights=rows.tokens[good], minlength=bins) / second,
    }
    columns: list[tuple[str, Callable[[Observations], Floats]]] = [
        ("ttft", lambda r: r.ttft_s),
        ("tpot", lambda r: r.tpot_s),
        ("e2e", lambda r: r.e2e_s),
        ("lag", lambda r: r.lag_s),
    ]
    for name, column in columns:
        # An answer that broke off has first and last token too, and asked for more tokens than came.
        held = column(rows) if name == "lag" else np.where(good, column(rows), np.nan)
        for word, q in (("p50", 0.5), ("p99", 0.99), ("max", 1.0)) if name == "lag" else (("p50", 0.5), ("p99", 0.99)):
            values[f"{name}_{word}_s"] = _quantiles(place, held, bins, q)
    start = float(rows.due_s.min()) if len(rows) else 0.0
    return Over(_middles(bins, start, width), width, values)


GAUGES = ("waiting_requests", "running_requests", "kv_used_ratio")


def _readings(samples: Sequence[Sample]) -> Over | None:
    """Sums over the workers of a role (KV: their mean), in bins of time; None without readings."""
    if not samples:
        return None
    at = np.array([s.at_s for s in samples])
    instants = len(np.unique(at))
    workers: dict[str, list[Sample]] = {}
    for s in samples:
        workers.setdefault(s.worker, []).append(s)
    bins = max(1, min(BINS, instants, max(len(held) for held in workers.values())))
    start = float(at.min())
    width = max((float(at.max()) - start) / bins, 1e-9)
    sums: dict[str, Floats] = {}
    counts: dict[str, Floats] = {}
    busy: dict[str, Floats] = {}
    spent: dict[str, Floats] = {}

    def add(into: dict[str, Floats], name: str, values: Floats) -> None:
        into[name] = into.get(name, np.zeros(bins)) + np.nan_to_num(values)

    for held in workers.values():
        held = sorted(held, key=lambda s: s.at_s)
        times = np.array([s.at_s for s in held])
        place = np.minimum(((times - start) / width).astype(np.int64), bins - 1)
        roles = np.array([s.role for s in held], dtype=object)
        # The role that a worker had last in a bin is its role there; where it was not read, the one before.
        role_of = np.full(bins, "", dtype=object)
        role_of[place] = roles
        for k in range(1, bins):
            role_of[k] = role_of[k] or role_of[k - 1]
        # One that has been silent for twice as long as ever before has gone.
        gone_s = float(times[-1] + 2 * np.diff(times).max(initial=0.0))
        role_of[start + np.arange(bins) * width > gone_s] = ""
        for role in set(roles.tolist()):
            here = role_of == role
            add(counts, f"{role} workers", here.astype(float))
            for gauge in GAUGES:
                values = np.array([np.nan if (v := getattr(s, gauge)) is None else float(v) for s in held])
                mine = (roles == role) & np.isfinite(values)
                if mine.any():
                    n = np.bincount(place[mine], minlength=bins)
                    mean = np.bincount(place[mine], weights=values[mine], minlength=bins) / np.where(n > 0, n, np.nan)
                    add(sums, f"{role} {gauge}", np.where(here, _filled(mean), np.nan))
        read = [s for s in held if s.busy_s_total is not None]
        for before, now in itertools.pairwise(read):
            gained = float(now.busy_s_total or 0.0) - float(before.busy_s_total or 0.0)
            if gained < 0 or now.at_s <= before.at_s:
                continue  # the counter began anew
            k = min(int((now.at_s - start) / width), bins - 1)
            for into, value in ((busy, gained), (spent, now.at_s - before.at_s)):
                into.setdefault(now.role, np.zeros(bins))[k] += value
    merged: dict[str, Floats] = counts | sums
    for role, total in spent.items():
        merged[f"{role} busy"] = np.minimum(1.0, busy[role] / np.where(total > 0, total, np.nan))
    for role in ("prefill", "decode", "mixed"):
        name = f"{role} kv_used_ratio"
        if name in merged:
            merged[name] = merged[name] / np.where(counts[f"{role} workers"] > 0, counts[f"{role} workers"], np.nan)
    return Over(_middles(bins, start, width), width, merged)


def _filled(values: Floats) -> Floats:
    """NaN replaced by the value before it."""
    known = np.where(np.isfinite(values), np.arange(len(values)), -1)
    last = np.maximum.accumulate(known)
    return np.where(last >= 0, values[np.maximum(last, 0)], np.nan)


def _failures(rows: Observations) -> list[tuple[str, int, str]]:
    bad = np.flatnonzero(~rows.ok)
    kinds: dict[str, tuple[int, str]] = {}
    for status, error, detail in zip(rows.status[bad], rows.error[bad], rows.detail[bad], strict=True):
        n, first = kinds.get(kind := error or status, (0, detail))
        kinds[kind] = n + 1, first or detail
    return [(kind, n, first) for kind, (n, first) in sorted(kinds.items(), key=lambda item: -item[1][0])]


# --- laws against rows ----------------------------------------------------------------------------------------------


def _laws(data: RunData, profile: Profile | None) -> tuple[Fitting | None, Fitting | None]:
    """(TPOT by the decode law, TTFT of requests that met no queue) of a run whose fleet stood still."""
    fleet = data.run.fleet
    if profile is None or fleet is None or fleet.mixed or not data.observations.ok.any():
        return None, None
    rows = decode_rows(data)
    tpot = _fitting(profile.step_s(rows.x[:, 1], rows.x[:, 2]), rows.y)
    rows = quiet_rows(data)
    n = rows.x[:, 1]
    between = profile.overhead_s + profile.transfer_t0_s + profile.transfer_s_per_token * n
    return tpot, _fitting(profile.prompt_s(n) + between + profile.step_s(1.0, 0.0), rows.y)


def _fitting(predicted: Floats, measured: Floats) -> Fitting | None:
    if not len(measured):
        return None
    order = np.argsort(predicted)
    pick = order[np.unique(np.linspace(0, len(order) - 1, min(POINTS, len(order))).astype(np.int64))]
    error = float(np.median(np.abs(measured / np.maximum(predicted, 1e-12) - 1)))
    return Fitting(predicted[pick], measured[pick], len(measured), error)
