"""Clusters with a known truth, drawn by seed: what the advisor is tried on and is never told.

A third of them break what its laws assume. Those run in a kernel of their own, made here from the kernel's source by
overriding one rule: prompts padded to the longest of a batch, shortest prompt first, steps of random length, routing
by chance; or they use what the fitted profile has no word for: two GPU types, a prefix cache.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from advisor.features import RunData
from loadgen.cluster import Profile, simulate
from traces.errors import InputError
from traces.ingest import ingest
from traces.measures import Slo, Summary, quantile, summarise, verdict
from traces.records import Fleet, Observations, Run, Sample, Schedule
from traces.shape import LogNormal, synthesize, to_rate
from traces.shipped import shipped
from traces.store import open_store

HERE = Path(__file__).parent.parent
MOONCAKE = HERE / "tests" / "data" / "traces"
BROKEN = (
    "padded batches",
    "shortest first",
    "chunked",
    "noisy steps",
    "two GPU types",
    "prefix cache",
    "random routes",
)
"""Assumptions that a misspecified scenario breaks."""
RECORDED = ("azure-2023-conv", "azure-2023-code", "mooncake-synthetic", "mooncake-conversation")
"""Real traffic."""


@dataclass(frozen=True, eq=False)
class World:
    """One scenario. broken: "" for a well-specified one. source(n, rate, seed): the traffic, other requests by seed.

    noise_s: mean of what the client adds to each time stamp. readings: the servers' counters can be read.
    load: the rate as a share of what the best split can serve at all.
    """

    seed: int
    broken: str
    profile: Profile
    gpus: int
    slo: Slo
    source: Callable[[int, float, int], Schedule]
    asked: Schedule
    noise_s: float
    readings: bool
    load: float
    traffic: str

    def truth(self, schedule: Schedule, fleet: Fleet) -> Observations:
        """What the fleet does, without noise."""
        return _ask(schedule, fleet, self.profile, self.broken, self.seed)[0]

    def measured(self, schedule: Schedule, fleet: Fleet, number: int) -> RunData:
        """A run as a client would have recorded it, with the servers' readings where there are any."""
        rows, samples = _ask(schedule, fleet, self.profile, self.broken, self.seed, self.readings)
        rng = np.random.default_rng([self.seed, number])
        late = rng.exponential(self.noise_s / 4, len(rows))
        sent = rows.due_s + late
        first = np.maximum(rows.first_token_s, sent) + rng.exponential(self.noise_s, len(rows))
        last = np.maximum(rows.last_token_s + rng.exponential(self.noise_s, len(rows)), first)
        rows = replace(
            rows, dispatch_s=rows.due_s, sent_s=sent, first_byte_s=first, first_token_s=first, last_token_s=last
        )
        found = verdict(rows, self.slo)
        run = Run(
            name=f"probe {number}",
            trace=schedule.name,
            schedule_digest=schedule.digest(),
            scheduled=len(schedule),
            endpoint="http://127.0.0.1:1",
            engine="reference",
            model="m",
            fleet=fleet,
            started_unix_s=float(number),
            workers=1,
            rate_per_s=schedule.rate_per_s,
            slo=str(self.slo),
            ended=True,
            complete=True,
            verdict="valid",
            reason=found.reason,
        )
        return RunData(replace(run, id=number), rows, samples)


@functools.cache
def recorded(name: str) -> Schedule:
    """A shipped trace, or a slice of the tests' (Mooncake, Apache-2.0: prompts above 16,384 tokens left out)."""
    files = {
        "mooncake-synthetic": MOONCAKE / "synthetic_trace.first.jsonl",
        "mooncake-conversation": MOONCAKE / "conversation_trace.first.jsonl",
    }
    with open_store("sqlite:///:memory:") as store:
        ingest(store, [files.get(name) or shipped(name)], name=name)
        schedule = store.schedule(name)
    return schedule.take(schedule.prompt_tokens <= 16384)


def lognormal(prompt: LogNormal, output: LogNormal, arrivals: str, cv: float) -> Callable[[int, float, int], Schedule]:
    """Traffic of independent lengths."""

    def source(n: int, rate: float, seed: int) -> Schedule:
        return synthesize(n, prompt, output, rate_per_s=rate, arrivals=arrivals, cv=cv, seed=seed)

    return source


def windows(name: str) -> Callable[[int, float, int], Schedule]:
    """Traffic of a recorded trace: a window by seed, turned round its end where the trace is short, at a rate."""

    def source(n: int, rate: float, seed: int) -> Schedule:
        whole = recorded(name)
        start = int(np.random.default_rng(seed).integers(len(whole)))
        rows = (start + np.arange(n)) % len(whole)
        gaps = np.diff(whole.due_s, append=whole.due_s[-1] + whole.span_s / len(whole))
        due = np.concatenate([[0.0], np.cumsum(gaps[rows])[:-1]])
        made = Schedule(name, np.arange(n), due, whole.prompt_tokens[rows], whole.output_tokens[rows])
        return to_rate(made, rate)

    return source


def draw(seed: int, broken: str | None = None, gpus: int | None = None) -> World:
    """The scenario of a seed. Every third breaks an assumption, in turn; ``broken`` and ``gpus`` choose instead.

    A draw in which even the best split serves less than a tenth of the requests within the SLO is drawn again.
    """
    if broken is None:
        broken = BROKEN[seed // 3 % len(BROKEN)] if seed % 3 == 2 else ""
    for attempt in range(50):
        world = _draw(seed, attempt, broken, gpus)
        best = max(summary.attainment for summary in sweep(world).values())
        if best >= 0.1:
            return world
    raise InputError(f"seed {seed} makes no scenario")


@functools.lru_cache(maxsize=2)
def sweep(world: World) -> dict[Fleet, Summary]:
    """The truth: every split, on the traffic asked about, with the true laws."""
    return {fleet: summarise(world.truth(world.asked, fleet), world.slo) for fleet in Fleet.splits(world.gpus)}


def _draw(seed: int, attempt: int, broken: str, gpus: int | None) -> World:
    rng = np.random.default_rng([seed, attempt, 20260])

    def between(low: float, high: float) -> float:
        return float(rng.uniform(low, high))

    def over(low: float, high: float) -> float:
        return float(math.exp(rng.uniform(math.log(low), math.log(high))))

    n_gpus = gpus or round(over(4, 32.49))
    kind = str(rng.choice(["lognormal", "lognormal", *RECORDED]))
    if kind == "lognormal":
        prompt = LogNormal(math.log(over(150, 3000)), between(0.3, 1.1), 8, 16384)
        output = LogNormal(math.log(over(40, 400)), between(0.3, 0.9), 2, 2048)
        arrivals = str(rng.choice(["poisson", "poisson", "gamma"]))
        source = lognormal(prompt, output, arrivals, between(1.3, 2.5))
    else:
        source = windows(kind)
    n = int(max(600, 50 * n_gpus))
    sample = source(n, 1.0, seed * 7 + attempt)
    lengths, answers = sample.prompt_tokens.astype(float), sample.output_tokens.astype(float)
    mean_n, mean_m = float(lengths.mean()), float(answers.mean())
    context = float((answers * (lengths + answers / 2)).sum() / answers.sum())
    # decode: a step, how it grows, its limits
    c0 = over(0.006, 0.04)
    c1 = c0 * over(0.004, 0.06)
    c2 = c1 * over(0.05, 1.0) / context
    knee, knee_s = (int(over(6, 48)), c1 * between(0.5, 3)) if rng.random() < 0.3 else (0, 0.0)
    max_batch = int(rng.choice([12, 24, 48, 96, 256, 512]))
    kv = int((context + mean_m) * over(6, 60)) if rng.random() < 0.4 else 0
    kv = max(kv, int(lengths.max() + answers.max()) + 64) if kv else 0
    policy = str(rng.choice(["reserve", "preempt"]))
    # prefill, scaled below so that the stages balance at a split that is drawn
    a, b = over(0.3, 3.0) * 0.02, 1.0
    curve = (
        between(0, 0.6) * b / max(float((lengths * lengths).sum() / lengths.sum()), 1.0) if rng.random() < 0.6 else 0.0
    )
    tokens = int(rng.choice([1, 2048, 4096, 8192, 16384]))
    requests = int(rng.choice([4, 16, 64]))
    tpot = c0 * between(1.25, 2.5)
    carried = max(1.0, min((tpot - c0) / (c1 + c2 * context), max_batch, kv / context if kv else math.inf))
    decode_s = mean_m * (c0 + carried * (c1 + c2 * context)) / carried
    share = between(0.12, 0.65)
    prefill_s = decode_s * share / (1 - share)
    size = mean_n * b + curve * float((lengths * lengths).mean())
    fixed = between(0.03, 0.5)
    together = min(max(tokens / mean_n, 1.0), requests, 8.0)
    a = prefill_s * fixed * together**0.5
    b, curve = b * prefill_s * (1 - fixed) / size, curve * prefill_s * (1 - fixed) / size
    overhead, t0 = over(0.003, 0.05), over(0.0005, 0.01)
    transfer = b * over(0.005, 0.2)
    link = str(rng.choice(["none", "sender", "shared"]))
    if link == "shared":
        transfer = min(transfer, 0.4 * (decode_s + prefill_s) / n_gpus / mean_n)
    profile = Profile(
        name=f"world-{seed}",
        a_s=a,
        b_s_per_token=b,
        c_s_per_token2=curve,
        max_batch_tokens=tokens,
        max_batch_requests=requests,
        overhead_s=overhead,
        transfer_t0_s=t0,
        transfer_s_per_token=transfer,
        transfer_link=link,
        c0_s=c0,
        c1_s=c1,
        c2_s=c2,
        knee_batch=knee,
        knee_s=knee_s,
        max_batch=max_batch,
        kv_tokens=kv,
        kv_policy=policy,
        prefill_route=str(rng.choice(["least_tokens", "least_requests", "round_robin"])),
        decode_route=str(rng.choice(["least_tokens", "least_requests", "round_robin"])),
    )
    if broken == "chunked":
        profile = replace(profile, chunked=True, max_batch_tokens=int(rng.choice([512, 1024, 2048])))
    elif broken == "two GPU types":
        speeds = tuple(
            float(s) for s in rng.permutation([1.0] * (n_gpus - n_gpus // 2) + [between(0.5, 0.8)] * (n_gpus // 2))
        )
        profile = replace(profile, worker_speed=speeds)
    elif broken == "prefix cache":
        profile = replace(profile, prefill_route="prefix", cache_tokens=int(mean_n * over(30, 400)))
        source = _with_heads(source, 128)
    asked_n = n
    quick = a + b * float(np.quantile(lengths, 0.9)) + curve * float(np.quantile(lengths, 0.9)) ** 2
    ttft = (quick + overhead + t0 + transfer * float(np.quantile(lengths, 0.9)) + c0) * over(1.3, 6)
    slo = Slo((("ttft", ttft), ("tpot", tpot)))
    burst = replace(source(asked_n, 1.0, seed * 7 + 1), due_s=np.zeros(asked_n))
    fleets = Fleet.splits(n_gpus)
    able = max(
        asked_n / float(_ask(burst, f, profile, broken, seed)[0].last_token_s.max())
        for f in fleets[:: max(1, len(fleets) // 8)]
    )
    load = between(0.3, 1.2)
    asked = source(asked_n, able * load, seed * 7 + 2)
    return World(
        seed=seed,
        broken=broken,
        profile=profile,
        gpus=n_gpus,
        slo=slo,
        source=source,
        asked=asked,
        noise_s=over(2e-4, 3e-3),
        readings=bool(rng.random() < 0.33),
        load=load,
        traffic=kind,
    )


def _with_heads(source: Callable[[int, float, int], Schedule], tokens: int) -> Callable[[int, float, int], Schedule]:
    """Two thirds of the prompts begin like one of forty others, for half of their length."""

    def headed(n: int, rate: float, seed: int) -> Schedule:
        made = source(n, rate, seed)
        rng = np.random.default_rng([seed, 3])
        blocks = np.empty(n, dtype=object)
        for i, length in enumerate(made.prompt_tokens.tolist()):
            whole = length // tokens
            shared = whole // 2 if rng.random() < 0.67 else 0
            talk = int(rng.integers(40))
            blocks[i] = tuple(talk * 10_000 + k if k < shared else 10**7 + i * 1000 + k for k in range(whole))
        return replace(made, blocks=blocks, block_tokens=tokens)

    return headed


# --- what the kernel has no rule for ---------------------------------------------------------------------------------


@functools.cache
def _open_kernel() -> ModuleType:
    """The kernel as plain Python whether or not a compiled one lies beside it: compiled classes take no subclasses."""
    spec = importlib.util.spec_from_file_location("benchmarks._open_kernel", HERE / "loadgen" / "cluster" / "kernel.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@functools.cache
def _other(rule: str) -> Any:
    """A cluster with one rule of its own."""
    kernel = _open_kernel()

    class Other(kernel.Cluster):  # type: ignore[name-defined, misc]
        rng: np.random.Generator

        def _take(self, worker: Any, at: float) -> float:
            if rule == "shortest first" and len(worker.queue) > 1:
                held = sorted(worker.queue, key=lambda job: job.prompt_tokens)
                worker.queue.clear()
                worker.queue.extend(held)
            takes = float(super()._take(worker, at))
            if rule == "padded batches" and worker.preparing:
                longest = max(job.prompt_tokens for job in worker.preparing)
                count = len(worker.preparing)
                return float(worker.b * longest * count + worker.c * longest * longest * count)
            if rule == "noisy steps":
                stall = 4.0 if self.rng.random() < 0.02 else 1.0
                return takes * float(self.rng.lognormal(-0.02, 0.2)) * stall
            return takes

        def _one(self, worker: Any, size: int, base: float) -> float:
            one = float(super()._one(worker, size, base))
            return one * float(self.rng.lognormal(-0.02, 0.2)) if rule == "noisy steps" else one

        def _route(self, stage: str, job: Any) -> Any:
            ready = self._ready_prefill if stage == "prefill" else self._ready_decode
            if rule == "random routes" and len(ready) > 1:
                return ready[int(self.rng.integers(len(ready)))]
            return super()._route(stage, job)

    return Other


def _ask(
    schedule: Schedule, fleet: Fleet, profile: Profile, broken: str, seed: int, readings: bool = False
) -> tuple[Observations, list[Sample]]:
    """(what came of it, one reading a worker and about 100 instants)."""
    samples: list[Sample] = []
    tick = max(schedule.span_s / 100, 1e-3)
    if broken not in ("padded batches", "shortest first", "noisy steps", "random routes"):
        if not readings:
            return simulate(schedule, fleet, profile).observations, samples

        def look(now: float, held: Any, fleet: Fleet, changing: int) -> None:
            samples.extend(held)

        return simulate(schedule, fleet, profile, controller=look, tick_s=tick).observations, samples
    kernel = _open_kernel()
    cluster = _other(broken)(profile, fleet)
    cluster.rng = np.random.default_rng([seed, fleet.prefill, len(schedule)])
    jobs = [
        kernel.Job(i, n, m, t)
        for i, (n, m, t) in enumerate(
            zip(schedule.prompt_tokens.tolist(), schedule.output_tokens.tolist(), schedule.due_s.tolist(), strict=True)
        )
    ]
    due = float(schedule.due_s[0]) + tick
    for job in jobs:
        while readings and due <= job.arrive_s:
            cluster.advance(due)
            samples.extend(cluster.samples(due))
            due += tick
        cluster.advance(job.arrive_s)
        cluster.submit(job)
    while cluster.next_s < math.inf:
        cluster.advance(cluster.next_s)
    rows = Observations.unsent(schedule)
    first = np.array([j.first_s for j in jobs])
    return replace(
        rows,
        worker=np.zeros(len(rows), dtype=np.int64),
        sent_s=rows.due_s,
        first_byte_s=first,
        first_token_s=first,
        last_token_s=np.array([j.finish_s for j in jobs]),
        prompt_tokens=rows.requested_prompt_tokens,
        output_tokens=rows.requested_tokens,
        chunks=rows.requested_tokens,
        status=np.full(len(rows), "ok", dtype=object),
        http_status=np.full(len(rows), 200, dtype=np.int64),
    ), samples


def p99(rows: Observations) -> float:
    """P99 end to end."""
    return quantile(rows.e2e_s, 0.99)
