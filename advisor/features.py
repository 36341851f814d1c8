"""Observations to design matrices: what each stage was doing while a request was in it.

Everything here works from what a client can see (when tokens came, how long prompts and answers were) plus the fleet
that ran. Server readings, where an engine gives them, add rows that the client cannot know: how many forward passes a
prefill worker made and how long it was busy.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from traces.measures import counts
from traces.records import FEWEST, Floats, Ints, Observations, Run, Sample

Mask = np.ndarray[tuple[int], np.dtype[np.bool_]]

BLOCKS = 8
"""Time blocks a run is cut into where what it did changes over it: enough to tell, long enough to hold whole queues."""


STAYED = 0.995
"""Quantile of the time that requests stay; who stays longer is one in a window's first hundreds."""


@dataclass(frozen=True, eq=False)
class RunData:
    """One stored run with its rows; of a long one, with those of windows spread over it.

    windows: each holds every request between its first and its last, the first one from the run's beginning on, the last one to
    its end; () where the rows are all there are. observations: the rows of all windows.
    """

    run: Run
    observations: Observations
    samples: Sequence[Sample] = ()
    windows: Sequence[Observations] = ()

    @classmethod
    def of(cls, run: Run, windows: Sequence[Observations], samples: Sequence[Sample] = ()) -> RunData:
        """From what :meth:`traces.store.Store.windows` read."""
        return cls(run, Observations.concat(windows), samples, windows if len(windows) > 1 else ())

    @cached_property
    def counted(self) -> Observations:
        """The rows after the warm-up. What is told of them needs the others, too: they were in the same queues and batches."""
        return self.run.counted(self.observations)

    @cached_property
    def unfit(self) -> str:
        """Why no law may rest on it, of whatever workers; "" if one may."""
        why, finished = replace(self.run, counts=counts(self.counted)).unfit, int(self.counted.ok.sum())
        if not why and finished < FEWEST:
            warm = " after its warm-up" if self.run.warmup_s > 0 else ""
            return f"{finished} finished requests{warm}, fewer than {FEWEST}"
        return why

    @property
    def pieces(self) -> Sequence[Observations]:
        """Rows without a gap between them: the windows, or all."""
        return self.windows or (self.observations,)

    @property
    def finished(self) -> int:
        """Requests of the run that ended ok, also those that are in no window."""
        return self.run.counts.get("ok", 0) if self.windows else int(self.observations.ok.sum())

    @cached_property
    def _known(self) -> tuple[Floats, Floats]:
        """[k], [k]: begin and end of the spans in which everybody who was there is among the rows.

        Who came before a window and was still there is missing, until about as long has passed as its slowest requests stay; and
        who came after it, from its last due time on.
        """
        spans = []
        for k, rows in enumerate(self.windows):
            stay = np.fmax(rows.last_token_s, rows.sent_s) - rows.sent_s
            stay = stay[np.isfinite(stay)]
            longest = float(np.quantile(stay, STAYED)) if len(stay) else 0.0
            begin = float(rows.due_s.min()) + longest if k else -np.inf
            end = float(rows.due_s.max()) if k + 1 < len(self.windows) else np.inf
            if begin < end:
                spans.append((begin, end))
        held = np.array(spans, dtype=np.float64).reshape(-1, 2)
        return held[:, 0], held[:, 1]

    def known(self, begin_s: Floats, end_s: Floats) -> Mask:
        """Bool[n]: is everybody who was there in [begin, end] among the rows?"""
        if not self.windows:
            return np.ones(len(begin_s), dtype=np.bool_)
        begins, ends = self._known
        k = np.searchsorted(begins, begin_s, side="right") - 1
        return np.asarray((k >= 0) & (end_s <= np.append(ends, -np.inf)[k]), dtype=np.bool_)

    @property
    def prefill(self) -> int:
        """Prefill workers that ran."""
        assert self.run.fleet is not None  # noqa: S101 - callers keep runs of unknown fleet out
        return self.run.fleet.prefill

    @property
    def decode(self) -> int:
        """Decode workers that ran."""
        assert self.run.fleet is not None  # noqa: S101 - as above
        return self.run.fleet.decode


@dataclass(frozen=True, eq=False)
class Rows:
    """A regression's rows. x: [n, k] features. y: [n] seconds, > 0."""

    x: Floats
    y: Floats

    @classmethod
    def concat(cls, parts: Sequence[Rows]) -> Rows:
        """All rows of all parts."""
        return cls(
            np.concatenate([p.x for p in parts]),
            np.concatenate([p.y for p in parts]),
        )

    def __len__(self) -> int:
        return len(self.y)


def served(rows: Observations) -> Observations:
    """The rows that servers had work with, in order of sending: all that were sent, less those that were turned away.

    Whose connection was refused, or who got an HTTP error instead of a first token, was in no queue and no batch.
    """
    away = np.isnan(rows.first_token_s) & ((rows.error == "refused") | (rows.error == "status"))
    rows = rows.take(np.flatnonzero(np.isfinite(rows.sent_s) & ~away))
    return rows.take(np.argsort(rows.sent_s, kind="stable"))


def time_block(observations: Observations, at_s: Floats) -> Ints:
    """The block (0..BLOCKS-1) of the run's arrival span that each instant falls in; later ones are in the last."""
    start, end = float(observations.due_s.min()), float(observations.due_s.max())
    width = max(end - start, 1e-9) / BLOCKS
    return np.clip(((at_s - start) / width).astype(np.int64), 0, BLOCKS - 1)


@dataclass(frozen=True, eq=False)
class DecodeLoad:
    """What one decode worker carried over time, between k+1 instants at which a sequence joined or left.

    at_s: [k+1]. batch: [k] sequences per busy worker. base, slope: [k]; context tokens per worker are base + slope t.
    """

    at_s: Floats
    batch: Floats
    base: Floats
    slope: Floats

    def mean_between(self, start_s: Floats, end_s: Floats) -> tuple[Floats, Floats]:
        """Time averages of (batch, context) over each [start, end], exact."""
        at = self.at_s
        pieces = (
            np.diff(at) * self.batch,
            self.base * np.diff(at) + self.slope * np.diff(at * at) / 2,
        )
        length = np.maximum(end_s - start_s, 1e-9)

        def total(t: Floats, piece: Floats, rate: Floats, growth: Floats) -> Floats:
            t = np.clip(t, at[0], at[-1])
            k = np.clip(np.searchsorted(at, t, side="right") - 1, 0, len(piece) - 1)
            before = np.concatenate([[0.0], np.cumsum(piece)])[k]
            here: Floats = before + rate[k] * (t - at[k]) + growth[k] * (t * t - at[k] ** 2) / 2
            return here

        means = []
        for piece, rate, growth in (
            (pieces[0], self.batch, np.zeros_like(self.batch)),
            (pieces[1], self.base, self.slope),
        ):
            means.append((total(end_s, piece, rate, growth) - total(start_s, piece, rate, growth)) / length)
        return means[0], means[1]


def decode_load(observations: Observations, decode_workers: int) -> DecodeLoad:
    """Batch and context per decode worker, from token times alone.

    A sequence is in the batch from one step before its first token to its last. With A(t) sequences active on D
    workers that a router keeps level, a busy worker holds max(1, A/D) of them: the one that is being looked at is
    there in any case.
    """
    rows = observations.take(np.flatnonzero(observations.ok & (observations.tokens > 1)))
    first, last = rows.first_token_s, rows.last_token_s
    step = (last - first) / (rows.tokens - 1)
    join = first - step
    # Context of a sequence grows linearly: n at the join, one token a step. n - join/step + t/step.
    slope = 1.0 / np.maximum(step, 1e-9)
    base = rows.prompt_lengths - join * slope
    at = np.concatenate([join, last])
    order = np.argsort(at, kind="stable")
    sign = np.concatenate([np.ones(len(rows)), -np.ones(len(rows))])[order]
    at = at[order]
    active = np.cumsum(sign)
    bases = np.cumsum(sign * np.concatenate([base, base])[order])
    slopes = np.cumsum(sign * np.concatenate([slope, slope])[order])
    share = np.where(active > 0, np.maximum(1.0, active / decode_workers) / np.maximum(active, 1.0), 0.0)
    return DecodeLoad(at, (share * active)[:-1], (share * bases)[:-1], (share * slopes)[:-1])


LEAST_TOKENS = 4
"""The TPOT of a shorter answer is the length of one or two steps, not a mean."""


def answers(data: RunData) -> Observations:
    """Answers after the warm-up whose TPOT tells of a decode step, and whose company is known."""
    rows = data.counted.take(np.flatnonzero(data.counted.ok & (data.counted.tokens >= LEAST_TOKENS)))
    return rows.take(np.flatnonzero((rows.tpot_s > 0) & data.known(rows.first_token_s, rows.last_token_s)))


def decode_rows(data: RunData) -> Rows:
    """Rows for the decode step: y = TPOT (s) of :func:`answers`, x = [1, mean batch, mean context tokens] of the worker."""
    rows = answers(data)
    if not len(rows):
        return Rows(np.empty((0, 3)), np.empty(0))
    load = decode_load(data.observations, data.decode)
    batch, context = load.mean_between(rows.first_token_s, rows.last_token_s)
    x = np.column_stack([np.ones(len(rows)), np.maximum(batch, 1.0), context])
    return Rows(x, rows.tpot_s)


def quiet_rows(data: RunData) -> Rows:
    """Rows for TTFT without a queue: y = TTFT from sent (s), x = [1, n, n^2], of requests that met no other prefill.

    A request is quiet when fewer requests than there are prefill workers were waiting for their first token while it
    was. In a run that is never quiet there are no rows, nor are there any of its warm-up.
    """
    rows = data.observations.take(np.flatnonzero(data.observations.ok))
    if not len(rows):
        return Rows(np.empty((0, 3)), np.empty(0))
    sent, first = np.sort(rows.sent_s), np.sort(rows.first_token_s)
    # Others that overlap [sent, first token): sent before it ended, not answered before it started.
    overlap = np.searchsorted(sent, rows.first_token_s) - np.searchsorted(first, rows.sent_s, side="right") - 1
    keep = (overlap < data.prefill) & (rows.ttft_sent_s > 0) & data.known(rows.sent_s, rows.first_token_s)
    keep &= rows.due_s >= data.run.warmup_s
    n = rows.prompt_lengths[keep].astype(float)
    x = np.column_stack([np.ones(len(n)), n, n * n])
    return Rows(x, rows.ttft_sent_s[keep])


def prefill_reading_rows(data: RunData) -> Rows:
    """Rows for the prefill step from server readings: y = busy seconds of the prefill role in a time block of the run,
    its warm-up left out.

    x = [steps, prompt tokens, sum of squared prompt lengths]; a missing counter gives no rows. Squared lengths are
    not a server reading: the block's tokens times the run's mean of n^2 over n, which requests in flight at the edges
    of a block cannot bias.
    """
    workers: dict[str, list[Sample]] = {}
    for sample in data.samples:
        if sample.role == "prefill" and None not in (
            sample.busy_s_total,
            sample.steps_total,
            sample.prompt_tokens_total,
        ):
            workers.setdefault(sample.worker, []).append(sample)
    none = Rows(np.empty((0, 3)), np.empty(0))
    if not workers:
        return none
    n = data.observations.prompt_lengths.astype(float)
    per_token = float((n * n).sum() / n.sum())
    start, end = float(data.counted.due_s.min()), float(np.nanmax(data.observations.last_token_s))
    edges = np.linspace(start, end, BLOCKS + 1)
    total = np.zeros((3, BLOCKS))
    for readings in workers.values():
        # A reading amid a step has that step in some counters only: edges are readings of an idle worker, if it often was.
        idle = [s for s in readings if s.running_requests == 0 and not s.waiting_requests]
        found, exact = _increments(readings, edges), _increments(idle, edges)
        total += exact if 2 * (exact[1] > 0).sum() > (found[1] > 0).sum() else found
    y, steps, tokens = total
    keep = (y > 1e-3) & (steps >= 1)
    x = np.column_stack([steps, tokens, tokens * per_token])[keep]
    return Rows(x, y[keep])


def _increments(readings: Sequence[Sample], edges: Floats) -> Floats:
    """[3, blocks]: busy seconds, steps, prompt tokens of a worker between the readings nearest to two edges."""
    if not readings:
        return np.zeros((3, len(edges) - 1))
    readings = sorted(readings, key=lambda s: s.at_s)
    at = np.array([s.at_s for s in readings])
    nearest = np.abs(at[None, :] - edges[:, None]).argmin(axis=1)
    names = ("busy_s_total", "steps_total", "prompt_tokens_total")
    return np.stack([np.diff(np.array([getattr(s, name) for s in readings], dtype=float)[nearest]) for name in names])


def admission_cap(data: RunData) -> int:
    """Most sequences that a decode worker admitted, from server readings; 0 where no reading shows a limit.

    A reading may catch a request between its transfer and the next step: that is no queue. Only sequences that wait
    from one reading of a worker to its next stand before a full batch.
    """
    workers: dict[str, list[Sample]] = {}
    for sample in data.samples:
        if sample.role == "decode" and sample.waiting_requests is not None and sample.running_requests is not None:
            workers.setdefault(sample.worker, []).append(sample)
    most = 0.0
    for held in workers.values():
        held = sorted(held, key=lambda s: s.at_s)
        for before, now in itertools.pairwise(held):
            if before.waiting_requests and now.waiting_requests:
                most = max(most, before.running_requests or 0.0, now.running_requests or 0.0)
    return int(most)


def reading_max(data: RunData, role: str, name: str) -> float:
    """The largest value of a gauge that any worker of a role showed; 0 where no reading has it."""
    return max((float(getattr(s, name) or 0.0) for s in data.samples if s.role == role), default=0.0)


LEAST_PAGES = 8
"""Readings of all decode workers from which it is told what a share of the KV cache is of."""


def kv_capacity(data: RunData) -> float:
    """Tokens of KV cache of a decode worker, from readings that show both tokens and share used; 0 without any.

    Engines show a share of the tokens that they show. The reference endpoint's, where it reserves whole answers, is of what it
    reserves: then the sequences that were there at the reading, prompts and whole answers, stand for the tokens. Which of the two
    it is shows in the capacities that readings give: of the right one they are alike.
    """
    pages: dict[float, list[tuple[float, float]]] = {}
    for s in data.samples:
        if s.role == "decode" and s.kv_used_tokens is not None and s.kv_used_ratio is not None:
            pages.setdefault(s.at_s, []).append((s.kv_used_tokens, s.kv_used_ratio))
    shown = np.array([tokens / share for page in pages.values() for tokens, share in page if tokens and share > 0.05])
    if not len(shown):
        return 0.0
    sums = {at: sum(share for _, share in page) for at, page in pages.items() if len(page) == data.decode}
    whole = {at: share for at, share in sums.items() if share > 0.05 * data.decode}
    at, share = np.array([*whole]), np.array([*whole.values()])
    rows = data.observations.take(np.flatnonzero(data.observations.ok & (data.observations.tokens > 1)))
    join = rows.first_token_s - (rows.last_token_s - rows.first_token_s) / (rows.tokens - 1)
    length = rows.prompt_lengths + rows.tokens

    def until(ends: Floats) -> Floats:
        order = np.argsort(ends)
        sums: Floats = np.concatenate([[0.0], np.cumsum(length[order])])[np.searchsorted(ends[order], at, side="right")]
        return sums

    known = data.known(at, at) if len(at) else np.zeros(0, dtype=np.bool_)
    reserved = ((until(join) - until(rows.last_token_s)) / share)[known]

    def unlike(found: Floats) -> float:
        middle = np.median(found)
        return float(np.median(np.abs(found - middle)) / middle) if middle > 0 else np.inf

    right = reserved if len(reserved) >= LEAST_PAGES and unlike(reserved) < unlike(shown) else shown
    return float(np.median(right))


def preempted(data: RunData) -> bool:
    """Did any reading show sequences being put back?"""
    return any((s.preemptions_total or 0) > 0 for s in data.samples)


def load_quantiles(data: RunData, q: float) -> tuple[float, float]:
    """(sequences, tokens of context) per decode worker that were exceeded for 1 - q of the time after the warm-up."""
    load = decode_load(data.observations, data.decode)
    gaps = np.diff(load.at_s) * data.known(load.at_s[:-1], load.at_s[1:]) * (load.at_s[:-1] >= data.run.warmup_s)
    if not gaps.sum() > 0:
        return 0.0, 0.0
    found = []
    for values in (load.batch, load.base + load.slope * (load.at_s[:-1] + load.at_s[1:]) / 2):
        order = np.argsort(values)
        share = np.cumsum(gaps[order]) / gaps.sum()
        found.append(float(values[order][min(int(np.searchsorted(share, q)), len(order) - 1)]))
    return found[0], found[1]
