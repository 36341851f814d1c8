"""One model of a PD cluster, without a clock of its own: a state machine that is told what time it is.

The simulator calls it with virtual time, the reference endpoint with the wall clock; the rules stand here once.

A request goes: routed to a prefill worker's queue -> taken into a batch (one step) -> its KV cache is transferred
(overhead and transfer occupy no worker) -> routed to a decode worker -> admitted at a step boundary -> one token a step.
An answer of m tokens takes m decode steps; its first token comes at the end of the first.

Decode advances in closed form. While a worker's batch does not change, n steps from step k0 with B sequences take

    n (c0 + c1 B + c2 (base + B k0)) + c2 B n (n - 1) / 2

where base + B k is the context at step k (base = sum over sequences of prompt - step at which it joined). So the cost
of a run grows with requests, not with tokens: a join and a finish each are one event and one heap operation.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from loadgen.cluster.laws import Profile
from traces.records import Fleet

_PREFILLED, _READY, _BOUNDARY, _FLIPPED = range(4)

Hook = Callable[["Worker"], None]


class Job:
    """One request inside the cluster. Times are model seconds, NaN until they come."""

    __slots__ = (
        "arrive_s",
        "decode_worker",
        "finish_s",
        "finish_step",
        "first_s",
        "gone",
        "id",
        "join_step",
        "output_tokens",
        "prefill_end_s",
        "prefill_start_s",
        "prefill_worker",
        "prompt_tokens",
        "ready_s",
        "tag",
    )

    def __init__(self, id: int, prompt_tokens: int, output_tokens: int, arrive_s: float, tag: object = None) -> None:
        self.id = id
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.arrive_s = arrive_s
        self.prefill_start_s = self.prefill_end_s = self.ready_s = self.first_s = self.finish_s = math.nan
        self.prefill_worker = self.decode_worker = -1
        self.join_step = self.finish_step = 0
        self.gone = False
        self.tag = tag


@dataclass(frozen=True, slots=True)
class Switch:
    """One role change of one worker: asked, drained, back in service (model seconds)."""

    worker: int
    before: str
    after: str
    asked_s: float
    drained_s: float
    ready_s: float


class Worker:
    """One worker, in whichever role it has."""

    __slots__ = (
        "asked_s",
        "base",
        "batch",
        "batch_tokens",
        "busy_s",
        "busy_since",
        "finished",
        "finishing",
        "id",
        "incoming",
        "kv_used",
        "next_n",
        "output_tokens",
        "preparing",
        "prompt_tokens",
        "queue",
        "queued_tokens",
        "role",
        "size",
        "step",
        "steps",
        "t0",
        "target",
        "version",
        "waiting",
    )

    def __init__(self, id: int, role: str) -> None:
        self.id = id
        self.role = role
        self.target = role  # differs from role while draining or flipping
        self.asked_s = math.nan
        self.queue: deque[Job] = deque()
        self.queued_tokens = 0
        self.preparing: list[Job] | None = None  # the prefill batch in service
        self.batch_tokens = 0
        self.waiting: deque[Job] = deque()
        self.incoming = 0  # jobs whose KV cache is on its way here
        self.finishing: list[tuple[int, int, Job]] = []  # heap of (finish step, job id, job)
        self.size = 0  # sequences in the batch
        self.kv_used = 0
        self.base = 0.0
        self.t0 = 0.0
        self.step = 0
        self.next_n = 0
        self.version = 0
        self.busy_s = {"prefill": 0.0, "decode": 0.0}
        self.busy_since = math.nan
        self.steps = 0
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.finished = 0

    @property
    def open(self) -> bool:
        """Takes new work in its role."""
        return self.role == self.target

    def busy_until(self, now_s: float, role: str) -> float:
        """Seconds with work in hand in a role, up to now."""
        running = now_s - self.busy_since if self.role == role and self.busy_since == self.busy_since else 0.0
        return self.busy_s[role] + max(0.0, running)


class Cluster:
    """P prefill and D decode workers under one profile. Call :meth:`submit` in order of time, :meth:`advance` to catch up.

    on_segment(worker) is called after a decode worker's batch has changed, on_finish(job) when an answer is complete.
    """

    def __init__(
        self,
        profile: Profile,
        fleet: Fleet,
        *,
        on_segment: Hook | None = None,
        on_finish: Callable[[Job], None] | None = None,
    ) -> None:
        self.profile = profile
        self.target = fleet
        self.workers = [Worker(i, "prefill" if i < fleet.prefill else "decode") for i in range(fleet.workers)]
        self.switches: list[Switch] = []
        self.now_s = 0.0
        self._on_segment = on_segment
        self._on_finish = on_finish
        self._events: list[tuple[float, int, int, Worker, object]] = []
        self._order = 0
        self._turn = {"prefill": 0, "decode": 0}
        self._stranded: deque[Job] = deque()  # no worker of the role is open: a switch is under way
        self._stranded_ready: deque[Job] = deque()

    # --- clock -----------------------------------------------------------------------------------------------------

    @property
    def next_s(self) -> float:
        """When the next event is due; infinity when nothing is."""
        return self._events[0][0] if self._events else math.inf

    def advance(self, now_s: float) -> None:
        """Process every event up to and including ``now_s``."""
        events = self._events
        while events and events[0][0] <= now_s:
            at, _, kind, worker, what = heapq.heappop(events)
            self.now_s = at
            if kind == _BOUNDARY:
                if what == worker.version:
                    self._boundary(worker, at)
            elif kind == _READY:
                worker.incoming -= 1
                self._ready(worker, what, at)  # type: ignore[arg-type]
            elif kind == _PREFILLED:
                self._prefilled(worker, at)
            else:
                self._flipped(worker, at)
        self.now_s = max(self.now_s, now_s)

    def _push(self, at: float, kind: int, worker: Worker, what: object) -> None:
        self._order += 1
        heapq.heappush(self._events, (at, self._order, kind, worker, what))

    # --- prefill ---------------------------------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """A request arrives at ``job.arrive_s``; events before that must have been processed."""
        worker = self._route("prefill")
        if worker is None:
            self._stranded.append(job)
            return
        worker.queue.append(job)
        worker.queued_tokens += job.prompt_tokens
        if worker.preparing is None:
            self._start_prefill(worker, job.arrive_s)

    def _route(self, role: str) -> Worker | None:
        """The worker of a role that gets the next request, or None while none is open."""
        how = self.profile.prefill_route if role == "prefill" else self.profile.decode_route
        best: Worker | None = None
        if how == "round_robin":
            ready = [w for w in self.workers if w.role == role and w.target == role]
            if not ready:
                return None
            self._turn[role] += 1
            return ready[self._turn[role] % len(ready)]
        least = math.inf
        for w in self.workers:
            if w.role != role or w.target != role:
                continue
            if role == "prefill":
                load: float = (
                    w.queued_tokens + w.batch_tokens
                    if how == "least_tokens"
                    else len(w.queue) + (len(w.preparing) if w.preparing else 0)
                )
            else:
                load = w.kv_used if how == "least_tokens" else w.size + len(w.waiting) + w.incoming
            if load < least:
                best, least = w, load
        return best

    def _start_prefill(self, worker: Worker, at: float) -> None:
        p = self.profile
        tokens, squares = 0, 0
        batch: list[Job] = []
        queue = worker.queue
        while queue and len(batch) < p.max_batch_requests:
            job = queue[0]
            if batch and tokens + job.prompt_tokens > p.max_batch_tokens:
                break
            queue.popleft()
            worker.queued_tokens -= job.prompt_tokens
            if job.gone:
                continue
            tokens += job.prompt_tokens
            squares += job.prompt_tokens * job.prompt_tokens
            job.prefill_start_s = at
            job.prefill_worker = worker.id
            batch.append(job)
        if not batch:
            self._idle(worker, at)
            return
        worker.preparing = batch
        worker.batch_tokens = tokens
        if worker.busy_since != worker.busy_since:
            worker.busy_since = at
        self._push(at + p.a_s + p.b_s_per_token * tokens + p.c_s_per_token2 * squares, _PREFILLED, worker, None)

    def _prefilled(self, worker: Worker, at: float) -> None:
        p = self.profile
        batch = worker.preparing or []
        worker.preparing = None
        worker.steps += 1
        worker.prompt_tokens += worker.batch_tokens
        worker.batch_tokens = 0
        worker.finished += len(batch)
        for job in batch:
            job.prefill_end_s = at
            if job.gone:
                continue
            self._send(job, at, p.overhead_s + p.transfer_t0_s + p.transfer_s_per_token * job.prompt_tokens)
        if worker.queue and worker.open:
            self._start_prefill(worker, at)
        else:
            self._idle(worker, at)

    def _send(self, job: Job, at: float, takes_s: float) -> None:
        target = self._route("decode")
        if target is None:
            self._stranded_ready.append(job)
            return
        target.incoming += 1
        self._push(at + takes_s, _READY, target, job)

    def _idle(self, worker: Worker, at: float) -> None:
        """The worker has nothing in hand: stop its busy clock; if it was asked to change role, it has drained."""
        if worker.busy_since == worker.busy_since:
            worker.busy_s[worker.role] += at - worker.busy_since
            worker.busy_since = math.nan
        if not worker.open and worker.preparing is None and worker.size == 0 and worker.version >= 0:
            self._push(at + self.profile.flip_s, _FLIPPED, worker, None)
            self.switches.append(
                Switch(worker.id, worker.role, worker.target, worker.asked_s, at, at + self.profile.flip_s)
            )
            worker.role = "flipping"

    # --- decode ----------------------------------------------------------------------------------------------------

    def _ready(self, worker: Worker, job: Job, at: float) -> None:
        if job.gone:
            return
        job.ready_s = at
        if worker.role != "decode" or worker.target != "decode":
            self._send(job, at, 0.0)
            return
        job.decode_worker = worker.id
        worker.waiting.append(job)
        if worker.size == 0:
            worker.t0 = at
            self._admit(worker, at)
        elif len(worker.waiting) == 1 and self._fits(worker, job):
            self._hurry(worker, at)

    def _hurry(self, worker: Worker, at: float) -> None:
        """Bring the worker's next boundary forward to the end of the step that is running now."""
        n = self._steps_until(worker, at)
        if n < worker.next_n:
            self._schedule(worker, n)

    def _fits(self, worker: Worker, job: Job) -> bool:
        p = self.profile
        if worker.size >= p.max_batch:
            return False
        return (
            not p.kv_tokens or worker.size == 0 or worker.kv_used + job.prompt_tokens + job.output_tokens <= p.kv_tokens
        )

    def span_s(self, worker: Worker, n: int) -> float:
        """Seconds that n steps of the worker's present batch take, from the start of its segment."""
        p = self.profile
        one = p.c0_s + p.c1_s * worker.size + p.c2_s * (worker.base + worker.size * worker.step)
        return n * one + p.c2_s * worker.size * (n * (n - 1) / 2)

    def _steps_until(self, worker: Worker, at: float) -> int:
        """The first step boundary of the segment at or after an instant, at least 1."""
        p = self.profile
        one = p.c0_s + p.c1_s * worker.size + p.c2_s * (worker.base + worker.size * worker.step)
        growth = p.c2_s * worker.size
        past = at - worker.t0
        if growth * past < 1e-9 * one:
            n = past / one
        else:
            # growth/2 n^2 + (one - growth/2) n = past
            b = one - growth / 2
            n = (-b + math.sqrt(b * b + 2 * growth * past)) / growth
        return max(1, math.ceil(n - 1e-9))

    def _schedule(self, worker: Worker, n: int) -> None:
        worker.next_n = n
        worker.version += 1
        self._push(worker.t0 + self.span_s(worker, n), _BOUNDARY, worker, worker.version)

    def _boundary(self, worker: Worker, at: float) -> None:
        n = worker.next_n
        worker.step += n
        worker.steps += n
        worker.output_tokens += n * worker.size
        worker.t0 = at
        finishing = worker.finishing
        step = worker.step
        while finishing and finishing[0][0] <= step:
            due, _, job = heapq.heappop(finishing)
            if due != job.finish_step:
                continue  # left early; its place was given back then
            worker.size -= 1
            worker.base -= job.prompt_tokens - job.join_step
            worker.kv_used -= job.prompt_tokens + job.output_tokens
            job.finish_s = at
            worker.finished += 1
            if self._on_finish and not job.gone:
                self._on_finish(job)
        self._admit(worker, at)

    def _admit(self, worker: Worker, at: float) -> None:
        waiting = worker.waiting
        first: list[Job] = []
        step = worker.step
        while waiting:
            job = waiting[0]
            if job.gone:
                waiting.popleft()
                continue
            if not self._fits(worker, job):
                break
            waiting.popleft()
            job.join_step = step
            job.finish_step = step + job.output_tokens
            worker.base += job.prompt_tokens - step
            worker.size += 1
            worker.kv_used += job.prompt_tokens + job.output_tokens
            heapq.heappush(worker.finishing, (job.finish_step, job.id, job))
            first.append(job)
        if worker.size == 0:
            worker.base = 0.0
            worker.next_n = 0
            worker.version += 1
            if self._on_segment:
                self._on_segment(worker)
            self._idle(worker, at)
            return
        if worker.busy_since != worker.busy_since:
            worker.busy_since = at
        if first:
            one = at + self.span_s(worker, 1)
            for job in first:
                job.first_s = one
        self._schedule(worker, worker.finishing[0][0] - step)
        if self._on_segment:
            self._on_segment(worker)

    def cancel(self, job: Job) -> None:
        """The client went away: the job leaves its queue at once, or its batch at the next step boundary."""
        if job.gone or job.finish_s == job.finish_s:
            return
        job.gone = True
        worker = self.workers[job.decode_worker] if job.decode_worker >= 0 else None
        if worker is not None and job.finish_step > 0 and worker.size > 0:
            n = self._steps_until(worker, self.now_s)
            if worker.step + n < job.finish_step:
                # Its place in the heap moves to the next boundary; the answer keeps what it had reserved until then.
                worker.kv_used -= job.output_tokens - (worker.step + n - job.join_step)
                job.output_tokens = worker.step + n - job.join_step
                job.finish_step = worker.step + n
                heapq.heappush(worker.finishing, (job.finish_step, job.id, job))
                self._hurry(worker, self.now_s)

    # --- roles -----------------------------------------------------------------------------------------------------

    @property
    def fleet(self) -> tuple[int, int]:
        """Workers that serve now as (prefill, decode); those that drain still do, those that flip do not."""
        roles = [w.role for w in self.workers]
        return roles.count("prefill"), roles.count("decode")

    @property
    def changing(self) -> int:
        """Workers that drain or flip."""
        return sum(not w.open for w in self.workers)

    def set_fleet(self, fleet: Fleet) -> None:
        """Ask for another P:D of the same workers, at :attr:`now_s`. Least loaded workers go first; each drains, flips, serves.

        ValueError if the fleet does not use exactly the workers there are.
        """
        if fleet.workers != len(self.workers):
            raise ValueError(f"{fleet} does not use {len(self.workers)} workers")
        self.target = fleet
        for before, after, wanted in (("decode", "prefill", fleet.prefill), ("prefill", "decode", fleet.decode)):
            heading = [w for w in self.workers if w.target == after]
            # A worker that is still draining towards the other role can simply stay.
            staying = [w for w in self.workers if w.role == after and w.target == before]
            while len(heading) < wanted and staying:
                worker = staying.pop()
                worker.target = after
                worker.asked_s = math.nan
                heading.append(worker)
                if after == "prefill" and worker.queue and worker.preparing is None:
                    self._start_prefill(worker, self.now_s)
            donors = sorted(
                (w for w in self.workers if w.role == before and w.target == before),
                key=lambda w: (w.queued_tokens + w.batch_tokens, w.size + len(w.waiting), -w.id),
            )
            for worker in donors[: wanted - len(heading)]:
                worker.target = after
                worker.asked_s = self.now_s
        for worker in self.workers:
            if not worker.open and worker.role in ("prefill", "decode"):
                self._evict(worker)
        self._unstrand()

    def _evict(self, worker: Worker) -> None:
        """Re-route what waits at a worker that is leaving its role; what it has in hand it finishes."""
        queued, worker.queue, worker.queued_tokens = list(worker.queue), deque(), 0
        waiting, worker.waiting = list(worker.waiting), deque()
        for job in queued:
            arrive, job.arrive_s = job.arrive_s, self.now_s
            self.submit(job)
            job.arrive_s = arrive
        for job in waiting:
            self._send(job, self.now_s, 0.0)
        if worker.preparing is None and worker.size == 0:
            self._idle(worker, self.now_s)

    def _flipped(self, worker: Worker, at: float) -> None:
        worker.role = worker.target
        self._unstrand()

    def _unstrand(self) -> None:
        if self._stranded and self._route("prefill"):
            held, self._stranded = self._stranded, deque()
            for job in held:
                arrive, job.arrive_s = job.arrive_s, self.now_s
                self.submit(job)
                job.arrive_s = arrive
        if self._stranded_ready and self._route("decode"):
            ready, self._stranded_ready = self._stranded_ready, deque()
            for job in ready:
                self._send(job, self.now_s, 0.0)
