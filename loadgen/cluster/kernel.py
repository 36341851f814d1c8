"""One model of a PD cluster, without a clock of its own: a state machine that is told what time it is.

The simulator calls it with virtual time, the reference endpoint with the wall clock; the rules stand here once.

A request goes: routed to a prefill worker's queue -> taken into a batch (one step, or several where prompts are cut)
-> its KV cache is transferred (overhead and transfer occupy no worker; the link may be shared) -> routed to a decode
worker -> admitted at a step boundary -> one token a step. An answer of m tokens takes m decode steps; its first token
comes at the end of the first. A mixed worker does both: the step that ends a prompt makes its first token, and the
KV cache stays where it is.

Decode advances in closed form. While a worker's batch does not change, n steps from step k0 with B sequences take

    lead + n (c0 + c1 B + knee max(0, B - Bk) + c2 (base + B k0)) + c2 B n (n - 1) / 2

where base + B k is the context at step k (base = sum over sequences of context at joining - step of joining), and lead
is what the first of them does besides (a prompt's chunk on a mixed worker, the recomputation of a preempted sequence).
So the cost of a run grows with requests, not with tokens: a join and a finish each are one event. Where the cost of context
bends (bend_tokens), its growth is that of the segment's middle, and a segment ends after a thirty-second of the bend.

Roles are fixed until :meth:`Cluster.set_fleet` asks otherwise, or taken on demand (``on_demand``: an idle worker takes
the next phase that waits anywhere, and pays the flip when that is not its role).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Final

from loadgen.cluster.cache import PrefixCache
from loadgen.cluster.laws import Profile
from traces.records import Fleet, Sample

_PREFILLED: Final = 0
_READY: Final = 1
_FLIPPED: Final = 2
_NEVER: Final = float("inf")
_WORKING = ("prefill", "decode", "mixed")
_STAGES = {"prefill": ("prefill", "mixed"), "decode": ("decode", "mixed")}

Hook = Callable[["Worker"], None]
NextPhase = Callable[[float | None, float | None], str | None]
"""(since when the oldest prompt waits, since when the oldest prefilled request waits) -> "prefill", "decode" or None."""


class Job:
    """One request inside the cluster. Times are model seconds, NaN until they come.

    blocks: ids of the prompt's leading blocks, for the prefix cache. cached_tokens: prompt tokens it spared.
    """

    __slots__ = (
        "arrive_s",
        "blocks",
        "cached_tokens",
        "decode_worker",
        "done",
        "finish_s",
        "finish_step",
        "first_s",
        "gone",
        "id",
        "join_step",
        "made",
        "output_tokens",
        "prefill_end_s",
        "prefill_start_s",
        "prefill_worker",
        "prompt_tokens",
        "ready_s",
        "reserved",
        "tag",
    )

    def __init__(
        self,
        id: int,
        prompt_tokens: int,
        output_tokens: int,
        arrive_s: float,
        tag: object = None,
        blocks: Sequence[int] = (),
    ) -> None:
        self.id = id
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.arrive_s = arrive_s
        self.prefill_start_s = self.prefill_end_s = self.ready_s = self.first_s = self.finish_s = math.nan
        self.prefill_worker = self.decode_worker = -1
        self.cached_tokens = 0
        self.done = 0  # prompt tokens in place
        self.made = 0  # answer tokens made before the present join (a preempted sequence joins again)
        self.reserved = 0
        self.join_step = 0
        self.finish_step = -1  # -1: not in a decode batch
        self.gone = False
        self.blocks = blocks
        self.tag = tag


def jobs_of(prompt_tokens: list[int], output_tokens: list[int], arrive_s: list[float]) -> list[Job]:
    """Jobs numbered from 0."""
    return [Job(i, prompt_tokens[i], output_tokens[i], arrive_s[i]) for i in range(len(arrive_s))]


def ready_of(jobs: list[Job]) -> list[float]:
    """When each job's KV cache was at its decode worker."""
    return [job.ready_s for job in jobs]


def first_of(jobs: list[Job]) -> list[float]:
    """When each job's first token came."""
    return [job.first_s for job in jobs]


def last_of(jobs: list[Job]) -> list[float]:
    """When each job's last token came."""
    return [job.finish_s for job in jobs]


@dataclass(frozen=True, slots=True)
class Switch:
    """One role change of one worker: asked, drained, back in service (model seconds)."""

    worker: int
    before: str
    after: str
    asked_s: float
    drained_s: float
    ready_s: float

    @property
    def cost_s(self) -> float:
        """Worker-seconds without service in a role that was wanted: flip; the drain still served."""
        return self.ready_s - self.drained_s


class Worker:
    """One worker, in whichever role it has. Its laws are the profile's, by its own speed and size."""

    __slots__ = (
        "a",
        "asked_s",
        "b",
        "base",
        "batch_tokens",
        "boundary_order",
        "boundary_s",
        "busy_s",
        "busy_since",
        "c",
        "c0",
        "c1",
        "c2",
        "cache",
        "cached_tokens",
        "finished",
        "finishing",
        "growth",
        "held",
        "id",
        "knee",
        "kv_tokens",
        "kv_used",
        "lead",
        "link_free_s",
        "max_batch",
        "next_n",
        "one",
        "output_tokens",
        "parked",
        "passes",
        "preempted",
        "preparing",
        "prompt_tokens",
        "pulls",
        "queue",
        "requests",
        "role",
        "running",
        "size",
        "speed",
        "step",
        "steps",
        "t0",
        "target",
        "tokens",
        "waiting",
    )

    def __init__(self, id: int, role: str, profile: Profile, block_tokens: int) -> None:
        self.id = id
        self.role = role
        self.target = role  # differs from role while draining or flipping
        self.asked_s = math.nan
        p = profile
        self.speed = speed = p.worker_speed[id] if id < len(p.worker_speed) else 1.0
        size = p.worker_size[id] if id < len(p.worker_size) else 1.0
        self.a, self.b, self.c = p.a_s / speed, p.b_s_per_token / speed, p.c_s_per_token2 / speed
        self.c0, self.c1, self.c2, self.knee = p.c0_s / speed, p.c1_s / speed, p.c2_s / speed, p.knee_s / speed
        self.max_batch = max(1, int(p.max_batch * size))
        self.kv_tokens = int(p.kv_tokens * size)
        held = int(p.cache_tokens * size) // block_tokens if block_tokens else 0
        self.cache = PrefixCache(held) if held else None
        # what it has in hand or on its way: the routers' loads
        self.requests = 0
        self.tokens = 0
        # prefill
        self.queue: deque[Job] = deque()
        self.preparing: list[Job] | None = None  # the prompts in the present step, first to last
        self.batch_tokens = 0  # their new tokens
        self.held: list[tuple[int, int, Job]] = []  # prefilled, kept back: heap of (pass it leaves after, job id, job)
        self.passes = 0  # prefill steps, and those without a prompt that were passed over
        self.link_free_s = 0.0
        # decode
        self.pulls: list[tuple[Worker, Job]] = []  # (where its KV cache is, job) that the next boundary sets on its way
        self.waiting: deque[Job] = deque()
        self.finishing: list[tuple[int, int, Job]] = []  # heap of (finish step, job id, job)
        self.running: list[Job] = []  # in order of joining, kept only where sequences can be preempted
        self.size = 0  # sequences in the batch
        self.kv_used = 0
        self.base = 0.0
        self.parked = 0  # tokens of sequences that wait or are on their way, where a step pays for them too
        self.t0 = self.lead = self.one = self.growth = 0.0
        self.step = 0
        self.next_n = 0
        self.boundary_s = _NEVER  # when the batch's next boundary is due
        self.boundary_order = 0  # of two at one instant the lower comes first
        # counters
        self.busy_s = dict.fromkeys(_WORKING, 0.0)
        self.busy_since = math.nan
        self.steps = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.output_tokens = 0
        self.finished = 0
        self.preempted = 0

    @property
    def open(self) -> bool:
        """Takes new work in its role."""
        return self.role == self.target

    def busy_until(self, now_s: float, role: str) -> float:
        """Seconds with work in hand in a role, up to now."""
        running = now_s - self.busy_since if self.role == role and self.busy_since == self.busy_since else 0.0
        return self.busy_s[role] + max(0.0, running)

    def span_s(self, n: int) -> float:
        """Seconds that n steps of the present batch take, from the start of its segment."""
        return self.lead + n * self.one + self.growth * (n * (n - 1) / 2)

    def steps_by(self, at: float) -> float:
        """How many steps of the segment fit until an instant, as a real number."""
        past = at - self.t0 - self.lead
        if past <= 0:
            return 0.0
        one, growth = self.one, self.growth
        if growth * past < 1e-9 * one:
            return past / one
        # growth/2 n^2 + (one - growth/2) n = past
        b = one - growth / 2
        return (-b + math.sqrt(b * b + 2 * growth * past)) / growth

    def boundary_after(self, at: float) -> int:
        """The step, counted in the segment, that ends at or after an instant; at least the first."""
        return max(1, math.ceil(self.steps_by(at) - 1e-9))


class Cluster:
    """Prefill, decode and mixed workers under one profile. Call :meth:`submit` in order of time, :meth:`advance` to catch up.

    on_segment(worker) is called after a decode worker's batch has changed, on_finish(job) when an answer is complete.
    on_demand: roles are no longer fixed; the function says which phase an idle worker takes next. block_tokens: what one
    of ``Job.blocks`` stands for.
    """

    def __init__(
        self,
        profile: Profile,
        fleet: Fleet,
        *,
        on_segment: Hook | None = None,
        on_finish: Callable[[Job], None] | None = None,
        on_demand: NextPhase | None = None,
        block_tokens: int = 0,
    ) -> None:
        self.profile = profile
        self.target = fleet
        self.block_tokens = block_tokens
        roles = ["prefill"] * fleet.prefill + ["decode"] * fleet.decode + ["mixed"] * fleet.mixed
        self.workers = [Worker(i, role, profile, block_tokens) for i, role in enumerate(roles)]
        self.switches: list[Switch] = []
        self.now_s = 0.0
        self._on_segment = on_segment
        self._on_finish = on_finish
        self._events: list[tuple[float, int, int, Worker, object]] = []
        self._order = 0
        # A decode worker has one boundary, which every join brings forward: it is kept at the worker, not among the events.
        self._next: Worker | None = None
        self._boundary_s, self._boundary_order = _NEVER, 0
        self._turn = {"prefill": 0, "decode": 0}
        self._preempts = profile.kv_policy == "preempt" and profile.kv_tokens > 0
        self._link_free_s = 0.0
        self._stranded: deque[Job] = deque()  # no worker of the role is open: a switch is under way
        self._stranded_ready: deque[Job] = deque()
        self._on_demand = on_demand
        self._taken: dict[int, Job] = {}  # on demand: what a flipping worker will begin with
        if on_demand:
            # Nobody routes: all workers look at the same two queues.
            queue: deque[Job] = deque()
            waiting: deque[Job] = deque()
            for w in self.workers:
                w.queue, w.waiting = queue, waiting
        # The profile's values that are looked at for every request.
        self._prefill_route, self._decode_route = profile.prefill_route, profile.decode_route
        self._step_tokens, self._step_requests = profile.max_batch_tokens, profile.max_batch_requests
        self._chunked = profile.chunked
        self._drained = profile.prefill_release == "drained"
        self._square_step = profile.prefill_square == "step"
        self._bend = float(profile.bend_tokens)
        self._link = profile.transfer_link
        self._transfer_s, self._between_s = profile.transfer_s_per_token, profile.overhead_s + profile.transfer_t0_s
        self._knee = profile.knee_batch
        self._pulled = profile.transfer_begins == "pulled" and not on_demand
        self._parks = profile.decode_context == "worker" and not on_demand
        self._ready_prefill: list[Worker] = []
        self._ready_decode: list[Worker] = []
        self._decoding: list[Worker] = []
        self._reopen()

    def _reopen(self) -> None:
        """Who takes new work in which stage: to be called after every change of a role or a target."""
        self._ready_prefill = [w for w in self.workers if w.role in _STAGES["prefill"] and w.open]
        self._decoding = [w for w in self.workers if w.role in _STAGES["decode"]]
        self._ready_decode = [w for w in self._decoding if w.open]

    # --- clock -----------------------------------------------------------------------------------------------------

    @property
    def next_s(self) -> float:
        """When the next event is due; infinity when nothing is."""
        at = self._events[0][0] if self._events else _NEVER
        return min(at, self._boundary_s)

    def advance(self, now_s: float) -> None:
        """Process every event up to and including ``now_s``."""
        self._process(now_s)
        if now_s > self.now_s:
            self.now_s = now_s

    def run(self, jobs: list[Job]) -> None:
        """Submit jobs, in the order of their arrival, each when it arrives, and process all that follows."""
        for job in jobs:
            at = job.arrive_s
            self._process(at)
            self.now_s = at
            self.submit(job)
        self._process(_NEVER)

    def _process(self, until_s: float) -> None:
        events = self._events
        while True:
            soonest = self._boundary_s
            if events:
                at, order, kind, worker, what = events[0]
                if at < soonest or (at == soonest and order < self._boundary_order):
                    if at > until_s:
                        return
                    heappop(events)
                    self.now_s = at
                    if kind == _READY:
                        self._ready(worker, what, at)  # type: ignore[arg-type]
                    elif kind == _PREFILLED:
                        self._prefilled(worker, at)
                    else:
                        self._flipped(worker, at)
                    continue
            due = self._next
            if due is None or soonest > until_s:
                return
            self.now_s = soonest
            due.boundary_s = _NEVER
            self._boundary(due, soonest)
            self._find_next()

    def _find_next(self) -> None:
        """Whose boundary comes next."""
        least, order = _NEVER, 0
        found: Worker | None = None
        for w in self._decoding:
            at = w.boundary_s
            if at < least or (at == least and found is not None and w.boundary_order < order):
                found, least, order = w, at, w.boundary_order
        self._next, self._boundary_s, self._boundary_order = found, least, order

    def _push(self, at: float, kind: int, worker: Worker, what: object) -> None:
        self._order += 1
        heappush(self._events, (at, self._order, kind, worker, what))

    # --- routing ---------------------------------------------------------------------------------------------------

    def _route(self, stage: str, job: Job) -> Worker | None:
        """The worker that gets a request for a stage, or None while none is open."""
        prefill = stage == "prefill"
        ready = self._ready_prefill if prefill else self._ready_decode
        if len(ready) < 2:
            return ready[0] if ready else None
        how = self._prefill_route if prefill else self._decode_route
        if how == "round_robin":
            self._turn[stage] += 1
            return ready[self._turn[stage] % len(ready)]
        tokens, prefix = how != "least_requests", how == "prefix"
        best = ready[0]
        least = math.inf
        for w in ready:
            load = float(w.tokens if tokens else w.requests)
            if prefix:
                load += job.prompt_tokens - self._hit(w, job)
            load /= w.speed
            if load < least:
                best, least = w, load
        return best

    def _hit(self, worker: Worker, job: Job) -> int:
        """Prompt tokens that the worker's cache would spare; at least one is always computed."""
        if worker.cache is None or not job.blocks:
            return 0
        return min(worker.cache.hit(job.blocks) * self.block_tokens, job.prompt_tokens - 1)

    # --- prefill ---------------------------------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """A request arrives at ``job.arrive_s``; events before that must have been processed."""
        if self._on_demand:
            self.workers[0].queue.append(job)
            self._dispatch(job.arrive_s)
        else:
            self._enqueue(job, job.arrive_s)

    def _enqueue(self, job: Job, at: float) -> None:
        worker = self._route("prefill", job)
        if worker is None:
            self._stranded.append(job)
            return
        worker.queue.append(job)
        worker.requests += 1
        worker.tokens += job.prompt_tokens
        if worker.role == "prefill":
            if worker.preparing is None:
                self._start_prefill(worker, at)
        elif worker.size == 0 and worker.preparing is None:
            self._admit(worker, at)
        elif worker.preparing is None:
            self._hurry(worker, at)

    def _take(self, worker: Worker, at: float) -> float:
        """Fill the worker's next prefill step from its queue; seconds of its prompts, without the fixed cost."""
        most, many, chunked = self._step_tokens, self._step_requests, self._chunked
        if worker.role == "mixed":
            most = max(1, most - worker.size)
        tokens, area = 0, 0
        batch: list[Job] = []
        queue = worker.queue
        many -= len(worker.held)
        while queue and len(batch) < many:
            job = queue[0]
            if job.gone:
                queue.popleft()
                if not self._on_demand or job.done:  # on demand a prompt is its worker's once it is begun
                    worker.requests -= 1
                    worker.tokens -= job.prompt_tokens
                worker.kv_used -= job.reserved  # what a mixed worker held for a prompt it had begun
                continue
            hit = self._hit(worker, job) if job.done == 0 and worker.cache is not None else 0
            new = job.prompt_tokens - job.done - hit
            if chunked:
                new = min(new, most - tokens)
                if new <= 0:
                    break
            elif batch and tokens + new > most:
                break
            if job.done == 0:
                if worker.role == "mixed":
                    if not self._fits(worker, job, len(batch), sum(j.prompt_tokens for j in batch)):
                        break
                    job.reserved = job.prompt_tokens + job.output_tokens
                    worker.kv_used += job.reserved
                job.done = job.cached_tokens = hit
                job.prefill_start_s = at
                job.prefill_worker = worker.id
                worker.cached_tokens += hit
            tokens += new
            job.done += new
            area += new * job.done
            batch.append(job)
            if job.done < job.prompt_tokens and not self._on_demand:
                break  # it stays at the head, for the next step
            queue.popleft()
            if self._on_demand and job.done == hit + new:
                worker.requests += 1
                worker.tokens += job.prompt_tokens
            if job.done < job.prompt_tokens:
                break
        worker.preparing = batch or None
        worker.batch_tokens = tokens
        return worker.b * tokens + worker.c * (tokens * tokens if self._square_step else area)

    def _start_prefill(self, worker: Worker, at: float) -> None:
        takes = self._take(worker, at)
        if worker.preparing is None:
            self._idle(worker, at)
            return
        if worker.busy_since != worker.busy_since:
            worker.busy_since = at
        self._push(at + worker.a + takes, _PREFILLED, worker, None)

    def _stepped(self, worker: Worker, at: float) -> list[Job]:
        """A prefill step has ended: count it; the prompts that are complete."""
        batch = worker.preparing or []
        worker.preparing = None
        worker.prompt_tokens += worker.batch_tokens
        worker.batch_tokens = 0
        whole = [job for job in batch if job.done >= job.prompt_tokens]
        for job in whole:
            job.prefill_end_s = at
            worker.tokens -= job.prompt_tokens
            if worker.cache is not None and job.blocks:
                worker.cache.keep(job.blocks)
        return whole

    def _prefilled(self, worker: Worker, at: float) -> None:
        worker.steps += 1
        cut = worker.preparing[-1] if worker.preparing else None
        worker.passes += 1
        for job in self._stepped(worker, at):
            worker.finished += 1
            if self._drained:
                worker.tokens += job.prompt_tokens  # it is still there
                heappush(worker.held, (worker.passes + job.output_tokens - 1, job.id, job))
            else:
                worker.requests -= 1
                self._release(worker, job, at)
        if worker.held:
            self._let_go(worker, at)
        if self._on_demand and cut is not None and cut.done < cut.prompt_tokens:
            worker.queue.appendleft(cut)  # nobody else may go on with it
            self._start_prefill(worker, at)
        elif worker.queue and not self._on_demand:
            self._start_prefill(worker, at)
        else:
            self._idle(worker, at)

    def _let_go(self, worker: Worker, at: float) -> None:
        """After a pass: who was kept back for as many as its answer has tokens leaves; the next to, where no place is free."""
        held = worker.held
        if len(held) >= self._step_requests:
            worker.passes = max(worker.passes, held[0][0])
        while held and held[0][0] <= worker.passes:
            self._free(worker, at)

    def _free(self, worker: Worker, at: float) -> None:
        """The next of the prompts that were kept back leaves."""
        _, _, job = heappop(worker.held)
        worker.requests -= 1
        worker.tokens -= job.prompt_tokens
        self._release(worker, job, at)

    def _release(self, worker: Worker, job: Job, at: float) -> None:
        """The prompt's KV cache leaves the prefill worker."""
        if job.gone:
            return
        if not self._pulled:
            self._send(worker, job, self._sent(worker, job, at))
            return
        target = self._aim(job)
        if target is None:
            return
        if target.boundary_s < _NEVER:
            target.pulls.append((worker, job))
            self._hurry(target, at)
        else:
            self._arrive(target, job, self._sent(worker, job, at))

    def _sent(self, worker: Worker, job: Job, at: float) -> float:
        """When a KV cache whose transfer begins now will have left its prefill worker and be at another."""
        occupies = self._transfer_s * job.prompt_tokens
        if self._link == "none":
            sent = at + occupies
        elif self._link == "sender":
            sent = worker.link_free_s = max(at, worker.link_free_s) + occupies
        else:
            sent = self._link_free_s = max(at, self._link_free_s) + occupies
        return sent + self._between_s

    def _send(self, sender: Worker, job: Job, at: float) -> None:
        """The KV cache goes to a decode worker, where it is at an instant."""
        if self._on_demand:
            job.reserved = job.prompt_tokens + job.output_tokens
            self._push(at, _READY, sender, job)
            return
        target = self._aim(job)
        if target is not None:
            self._arrive(target, job, at)

    def _aim(self, job: Job) -> Worker | None:
        """The decode worker of a prefilled request, which counts it from now on; None while no worker is open."""
        job.reserved = job.prompt_tokens + job.output_tokens
        target = self._route("decode", job)
        if target is None:
            self._stranded_ready.append(job)
            return None
        target.requests += 1
        target.tokens += job.reserved
        return target

    def _arrive(self, target: Worker, job: Job, at: float) -> None:
        """A KV cache is on its way to a worker, where it is at an instant."""
        if self._parks:
            self._park(target, job.prompt_tokens)
        self._push(at, _READY, target, job)

    def _park(self, worker: Worker, tokens: int) -> None:
        """A sequence's KV cache is there, or no longer, while it is not in the batch: the next step takes another time."""
        worker.parked += tokens
        if worker.size:
            self._hurry(worker, self.now_s)

    def _idle(self, worker: Worker, at: float) -> None:
        """The worker has nothing in hand: stop its busy clock; if it was asked to change role, it has drained."""
        if worker.busy_since == worker.busy_since:
            worker.busy_s[worker.role] += at - worker.busy_since
            worker.busy_since = math.nan
        while worker.held:
            self._free(worker, at)
        if not worker.open and worker.preparing is None and worker.size == 0:
            self._flip(worker, at)
        elif self._on_demand:
            self._dispatch(at)

    def _flip(self, worker: Worker, at: float) -> None:
        ready = at + self.profile.flip_s
        self.switches.append(Switch(worker.id, worker.role, worker.target, worker.asked_s, at, ready))
        worker.role = "flipping"
        self._push(ready, _FLIPPED, worker, None)

    # --- decode ----------------------------------------------------------------------------------------------------

    def _ready(self, worker: Worker, job: Job, at: float) -> None:
        job.ready_s = at
        if self._on_demand:
            if not job.gone:
                worker.waiting.append(job)
                self._dispatch(at)
            return
        if job.gone or not worker.open or worker.role not in ("decode", "mixed"):
            worker.requests -= 1
            worker.tokens -= job.reserved
            if self._parks:
                self._park(worker, -job.prompt_tokens)
            if not job.gone:
                self._send(worker, job, at)
            return
        worker.waiting.append(job)
        if worker.boundary_s == _NEVER:
            # A boundary now, after all else that happens at this instant: who comes together joins together.
            worker.t0, worker.lead = at, 0.0
            self._schedule(worker, 0)
        elif len(worker.waiting) == 1 and self._fits(worker, job):
            self._hurry(worker, at)

    def _hurry(self, worker: Worker, at: float) -> None:
        """Bring the worker's next boundary forward to the end of the step that is running now."""
        n = worker.boundary_after(at)
        if n < worker.next_n:
            self._schedule(worker, n)

    def _fits(self, worker: Worker, job: Job, more: int = 0, tokens: int = 0) -> bool:
        """Is there room for a sequence, beside the batch and ``more`` that join with it, with prompts of ``tokens``?"""
        size = worker.size + more
        if size >= worker.max_batch:
            return False
        kv = worker.kv_tokens
        if not kv or size == 0:
            return True
        if self._preempts:
            used = worker.base + worker.size * worker.step
            return used + tokens + job.prompt_tokens + job.made + size + 1 <= kv
        return worker.kv_used + job.prompt_tokens + job.output_tokens <= kv

    def _schedule(self, worker: Worker, n: int) -> None:
        worker.next_n = n
        self._order += 1
        # The same expression as for every token: a boundary must not come before its step's tokens by a rounding.
        worker.boundary_s = at = worker.t0 + worker.span_s(n)
        worker.boundary_order = self._order
        if at < self._boundary_s:
            self._next, self._boundary_s, self._boundary_order = worker, at, self._order
        elif worker is self._next:
            self._find_next()

    def _boundary(self, worker: Worker, at: float) -> None:
        n = worker.next_n
        worker.step = step = worker.step + n
        worker.steps += n
        worker.output_tokens += n * worker.size
        finishing = worker.finishing
        me = worker.id
        while finishing and finishing[0][0] <= step:
            due, _, job = heappop(finishing)
            if due != job.finish_step or job.decode_worker != me:
                continue  # left early, or was preempted; its place was given back then
            self._leave(worker, job)
            worker.tokens -= job.reserved
            worker.requests -= 1
            job.finish_s = at
            worker.finished += 1
            if self._on_finish and not job.gone:
                self._on_finish(job)
        if worker.preparing is not None:
            self._stepped(worker, at)
        self._admit(worker, at)

    def _join(self, worker: Worker, job: Job) -> None:
        """A sequence enters the batch; its first token comes with the next step."""
        step = worker.step
        job.decode_worker = worker.id
        job.join_step = step
        job.finish_step = step + job.output_tokens - job.made
        worker.base += job.prompt_tokens + job.made - step
        worker.size += 1
        worker.kv_used += job.reserved
        heappush(worker.finishing, (job.finish_step, job.id, job))
        if self._preempts:
            worker.running.append(job)

    def _leave(self, worker: Worker, job: Job) -> None:
        """A sequence leaves the batch: finished, or put back. Its entry in the heap is stale from now on."""
        job.finish_step = -1
        worker.size -= 1
        worker.base -= job.prompt_tokens + job.made - job.join_step
        worker.kv_used -= job.reserved

    def _admit(self, worker: Worker, at: float) -> None:
        """At a step boundary: who leaves for want of room, who joins, what else the next step does; then schedule it."""
        lead = 0.0
        first: list[Job] = []
        if worker.pulls:
            pulls, worker.pulls = worker.pulls, []
            for sender, job in pulls:
                self._arrive(worker, job, self._sent(sender, job, at))
        waiting = worker.waiting
        if not (self._preempts and self._preempt(worker)):
            again = 0.0
            while waiting:
                job = waiting[0]
                if not job.gone and not self._fits(worker, job):
                    break
                waiting.popleft()
                if self._parks and not job.made:
                    worker.parked -= job.prompt_tokens
                if job.gone:
                    if not self._on_demand:
                        worker.requests -= 1
                        worker.tokens -= job.reserved
                    continue
                if self._on_demand:
                    worker.requests += 1
                    worker.tokens += job.reserved
                self._join(worker, job)
                if job.made:
                    context = job.prompt_tokens + job.made
                    again += worker.b * context + worker.c * context * context
                if job.first_s != job.first_s:
                    first.append(job)
            if again:
                lead = worker.a + again
        chunk = False
        put_back = bool(waiting) and waiting[0].made > 0  # whoever was put back comes before every prompt
        if worker.role == "mixed" and worker.queue and not put_back:
            decoding, base = worker.size, worker.base
            takes = self._take(worker, at)
            if worker.preparing is not None:
                chunk = True
                fixed = max(worker.a, worker.c0) if decoding else worker.a
                whole = lead + fixed + takes
                if decoding:
                    whole += self._one(worker, decoding, base) - worker.c0
                for job in worker.preparing:
                    if job.done >= job.prompt_tokens:
                        worker.kv_used -= job.reserved  # held since the prompt was begun; joining holds it again
                        worker.tokens += job.reserved
                        self._join(worker, job)
                        first.append(job)
        size = worker.size
        worker.t0 = at
        if size == 0 and not chunk:
            worker.base = 0.0
            worker.next_n = 0
            worker.boundary_s = _NEVER
            if self._on_segment:
                self._on_segment(worker)
            self._idle(worker, at)
            return
        if worker.busy_since != worker.busy_since:
            worker.busy_since = at
        worker.one = one = self._one(worker, size, worker.base)
        worker.growth = worker.c2 * size
        bend = self._bend
        if chunk:
            worker.lead = whole - one
            n = 1
        else:
            worker.lead = lead
            n = worker.finishing[0][0] - worker.step
            if self._preempts and size > 1:
                n = min(n, max(1, int((worker.kv_tokens - worker.base) / size) - worker.step))
            if bend:
                n = min(n, max(1, int(bend / (32 * size))))
                middle = worker.base + worker.parked + size * (worker.step + n / 2)
                worker.growth *= max(0.0, 1.0 - middle / bend)
        if first:
            end = at + worker.span_s(1)
            for job in first:
                job.first_s = end
        self._schedule(worker, n)
        if self._on_segment:
            self._on_segment(worker)
        if self._on_demand and waiting:
            self._dispatch(at)

    def _one(self, worker: Worker, size: int, base: float) -> float:
        """Seconds of the next step with a batch."""
        held = base + size * worker.step + worker.parked
        bend = self._bend
        if bend:
            held = held - held * held / (2 * bend) if held < bend else bend / 2
        one = worker.c0 + worker.c1 * size + worker.c2 * held
        if self._knee and size > self._knee:
            one += worker.knee * (size - self._knee)
        return one

    def _preempt(self, worker: Worker) -> bool:
        """Put sequences back, latest first, until the next step's tokens have room. True if any was."""
        any_left = False
        while worker.size > 1 and worker.base + worker.size * (worker.step + 1) > worker.kv_tokens:
            job = worker.running.pop()
            if job.finish_step < 0 or job.decode_worker != worker.id:
                continue
            self._leave(worker, job)
            job.made += worker.step - job.join_step
            job.decode_worker = -1
            worker.preempted += 1
            worker.waiting.appendleft(job)
            any_left = True
            if self._on_demand:
                worker.requests -= 1
                worker.tokens -= job.reserved
        if len(worker.running) > 4 * worker.size + 64:
            worker.running = [j for j in worker.running if j.finish_step >= 0 and j.decode_worker == worker.id]
        return any_left

    def cancel(self, job: Job) -> None:
        """The client went away: the job leaves its queue at once, or its batch at the next step boundary."""
        if job.gone or job.finish_s == job.finish_s:
            return
        job.gone = True
        worker = self.workers[job.decode_worker] if job.decode_worker >= 0 else None
        if worker is not None and job.finish_step >= 0 and worker.size > 0:
            n = worker.boundary_after(self.now_s)
            if worker.step + n < job.finish_step:
                # Its place in the heap moves to the next boundary; what it had reserved it keeps until then.
                job.output_tokens = job.made + worker.step + n - job.join_step
                job.finish_step = worker.step + n
                heappush(worker.finishing, (job.finish_step, job.id, job))
                self._hurry(worker, self.now_s)

    # --- roles on demand -------------------------------------------------------------------------------------------

    def _dispatch(self, at: float) -> None:
        """Give waiting phases to workers: one idle in that role, a decode batch with room, else one idle in another role."""
        next_phase = self._on_demand
        assert next_phase is not None  # noqa: S101 - only called then
        queue, waiting = self.workers[0].queue, self.workers[0].waiting
        while True:
            for held in (queue, waiting):
                while held and held[0].gone:
                    held.popleft()
            since = [queue[0].arrive_s if queue else None, waiting[0].ready_s if waiting else None]
            phase = next_phase(*since)
            if phase is None or not (
                self._give(phase, at)
                or (None not in since and self._give("decode" if phase == "prefill" else "prefill", at))
            ):
                return

    def _give(self, phase: str, at: float) -> bool:
        """Let some worker take the head of a phase's queue. False if nobody can."""
        idle = [w for w in self.workers if w.size == 0 and w.preparing is None and w.role in ("prefill", "decode")]
        same = next((w for w in idle if w.role == phase), None)
        head = self.workers[0].queue if phase == "prefill" else self.workers[0].waiting
        if same is not None:
            if phase == "prefill":
                self._start_prefill(same, at)
            else:
                self._admit(same, at)
            return True
        if phase == "decode":
            roomy = [w for w in self.workers if w.role == "decode" and w.size and self._fits(w, head[0])]
            if roomy:
                # They take from the queue themselves, at the end of the step that runs now.
                self._hurry(min(roomy, key=lambda w: w.requests), at)
                return False
        if not idle:
            return False
        worker = idle[0]
        worker.target, worker.asked_s = phase, at
        self._taken[worker.id] = head.popleft()
        self._flip(worker, at)
        return True

    # --- roles -----------------------------------------------------------------------------------------------------

    @property
    def fleet(self) -> tuple[int, int, int]:
        """Workers that serve now as (prefill, decode, mixed); those that drain still do, those that flip do not."""
        roles = [w.role for w in self.workers]
        return roles.count("prefill"), roles.count("decode"), roles.count("mixed")

    @property
    def changing(self) -> int:
        """Workers that drain or flip."""
        return sum(not w.open for w in self.workers)

    def set_fleet(self, fleet: Fleet) -> None:
        """Ask for other roles of the same workers, at :attr:`now_s`. Least loaded workers go first; each drains, flips, serves.

        ValueError if the fleet does not use exactly the workers there are, or if roles are taken on demand.
        """
        if self._on_demand:
            raise ValueError("roles are taken on demand here; no fleet can be asked for")
        if fleet.workers != len(self.workers):
            raise ValueError(f"{fleet} does not use {len(self.workers)} workers")
        self.target = fleet
        wanted = {"prefill": fleet.prefill, "decode": fleet.decode, "mixed": fleet.mixed}
        heading = {role: sum(w.target == role for w in self.workers) for role in _WORKING}
        for after in _WORKING:
            # A worker that is still draining towards another role can simply stay.
            for worker in self.workers:
                away = worker.role == after and not worker.open
                if away and heading[after] < wanted[after] and heading[worker.target] > wanted[worker.target]:
                    heading[worker.target] -= 1
                    heading[after] += 1
                    worker.target = after
                    worker.asked_s = math.nan
            donors = sorted(
                (w for w in self.workers if w.open and w.role != after and heading[w.role] > wanted[w.role]),
                key=lambda w: (w.tokens, w.requests, -w.id),
            )
            for worker in donors:
                if heading[after] < wanted[after] and heading[worker.role] > wanted[worker.role]:
                    heading[worker.role] -= 1
                    heading[after] += 1
                    worker.target = after
                    worker.asked_s = self.now_s
        self._reopen()
        for worker in self.workers:
            if not worker.open and worker.role in _WORKING:
                self._evict(worker)
        self._unstrand()

    def _evict(self, worker: Worker) -> None:
        """Re-route what waits at a worker that is leaving its role; what it has in hand it finishes."""
        begun = [j for j in worker.queue if j.done]
        queued, waiting = [j for j in worker.queue if not j.done], [j for j in worker.waiting if not j.made]
        pulls, worker.pulls = worker.pulls, []
        for sender, job in pulls:
            worker.requests -= 1
            worker.tokens -= job.reserved
            self._release(sender, job, self.now_s)
        worker.queue = deque(begun)
        worker.waiting = deque(j for j in worker.waiting if j.made)
        for job in queued:
            worker.requests -= 1
            worker.tokens -= job.prompt_tokens
            self._enqueue(job, self.now_s)
        for job in waiting:
            worker.requests -= 1
            worker.tokens -= job.reserved
            if self._parks:
                worker.parked -= job.prompt_tokens
            self._send(worker, job, self.now_s)
        if worker.preparing is None and worker.size == 0 and not worker.queue and not worker.waiting:
            if worker.boundary_s < _NEVER:  # it was about to admit who has just been sent elsewhere
                worker.boundary_s = _NEVER
                self._find_next()
            self._idle(worker, self.now_s)

    def _flipped(self, worker: Worker, at: float) -> None:
        worker.role = worker.target
        self._reopen()
        if self._on_demand:
            job = self._taken.pop(worker.id)
            if worker.role == "prefill":
                worker.queue.appendleft(job)
                self._start_prefill(worker, at)
            else:
                worker.waiting.appendleft(job)
                self._admit(worker, at)
            self._dispatch(at)
            return
        heading = [w.target for w in self.workers]
        wanted = self.target
        if [heading.count(role) for role in _WORKING] != [wanted.prefill, wanted.decode, wanted.mixed]:
            self.set_fleet(wanted)  # asked for while this one flipped, which cannot be stopped: it turns round now
        self._unstrand()

    def _unstrand(self) -> None:
        if self._stranded and self._ready_prefill:
            held, self._stranded = self._stranded, deque()
            for job in held:
                self._enqueue(job, self.now_s)
        if self._stranded_ready and self._ready_decode:
            ready, self._stranded_ready = self._stranded_ready, deque()
            for job in ready:
                self._send(self.workers[0], job, self.now_s)

    # --- what a metrics page would show ----------------------------------------------------------------------------

    def samples(self, at: float) -> Iterable[Sample]:
        """One reading of every worker, at an instant up to which events have been processed."""
        shared = self._on_demand is not None
        for w in self.workers:
            role = w.role if w.role in _WORKING else w.target
            done = (
                min(w.next_n, int(w.steps_by(at) + 1e-9))
                if w.size or (w.preparing is not None and role == "mixed")
                else 0
            )
            prompts, answers = role != "decode", role != "prefill"
            mine = not shared or w is self.workers[0]
            # A prompt of which this step does a part runs, though it stands at the head of the queue; what is left of it waits.
            cut = w.preparing[-1] if w.preparing and w.preparing[-1].done < w.preparing[-1].prompt_tokens else None
            queued = [j for j in w.queue if not j.gone and j is not cut] if mine and (prompts or shared) else []
            waiting = [j for j in w.waiting if not j.gone] if mine and (answers or shared) else []
            # On a mixed worker a prompt in its last step is in the batch already.
            running = w.size + (cut is not None) if answers else len(w.preparing or ())
            tokens = sum(j.prompt_tokens - j.done for j in queued) + sum(j.prompt_tokens for j in waiting)
            if cut is not None and not cut.gone:
                tokens += cut.prompt_tokens - cut.done
            # What is in place, as engines tell it, also where whole answers are reserved: a rule is tuned on what it will meet.
            # The share is of what admission goes by: it is 1 on a worker that is full, as an engine's is.
            used = w.base + w.size * (w.step + done) if answers else 0
            held = used if self._preempts else w.kv_used
            yield Sample(
                at,
                str(w.id),
                role,
                waiting_requests=len(queued) + len(waiting),
                running_requests=running,
                waiting_tokens=tokens,
                kv_used_tokens=used,
                kv_used_ratio=held / w.kv_tokens if w.kv_tokens and answers else None,
                busy_s_total=w.busy_until(at, role),
                steps_total=w.steps + done,
                prompt_tokens_total=w.prompt_tokens,
                output_tokens_total=w.output_tokens + done * w.size,
                finished_total=w.finished,
                preemptions_total=w.preempted if self._preempts else None,
            )
