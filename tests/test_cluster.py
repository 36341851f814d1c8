"""The cluster model: right by theory, and nothing gets lost in it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from loadgen.cluster import Cluster, Job, Profile, shipped_profiles, simulate, simulate_batches, stage_times
from loadgen.cluster.cache import PrefixCache
from loadgen.policy import BacklogRule, CountRule, Steering, next_phase
from traces.errors import InputError
from traces.records import Fleet, Floats, Schedule


def schedule_of(due: Floats, prompts: list[int] | Floats, outputs: list[int] | Floats) -> Schedule:
    n = len(due)
    return Schedule(
        "s",
        np.arange(n),
        np.asarray(due, float),
        np.asarray(prompts, dtype=np.int64),
        np.asarray(outputs, dtype=np.int64),
    )


def poisson(n: int, rate: float, seed: int) -> Floats:
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, n))


FAST_DECODE = Profile(name="t", b_s_per_token=1e-3, max_batch_tokens=1, max_batch_requests=1, c0_s=1e-9)
"""One prompt at a time at 1 ms a token, decode at no cost: TTFT is the sojourn in a single-server queue."""


# --- queueing results -----------------------------------------------------------------------------------------------


def holds(values: Floats, expected: float, of: Callable[[Floats], float] = lambda v: float(v.mean())) -> None:
    """A theory's figure lies in the 99 % interval of batch means (20 batches in order of time), and the interval is narrow.

    of: the statistic, the mean or a quantile. Batches, since neighbours in a queue wait together.
    """
    figures = np.array([of(batch) for batch in np.array_split(values, 20)])
    half = float(stats.t.ppf(0.995, 19) * figures.std(ddof=1) / math.sqrt(20))
    assert half < 0.12 * expected, f"too few requests to tell: +-{half:.3g} of {expected:.3g}"
    assert abs(float(figures.mean()) - expected) < half, (
        f"{figures.mean():.4g} +-{half:.3g}, theory says {expected:.4g}"
    )


def p99(values: Floats) -> float:
    return float(np.quantile(values, 0.99))


@pytest.mark.parametrize("rho", [0.5, 0.8])
def test_one_prefill_worker_with_equal_prompts_is_m_d_1(rho: float) -> None:
    """Mean wait of M/D/1: rho s / (2 (1 - rho)); nobody waits with probability 1 - rho; few wait long (its exact tail)."""
    service = 0.1
    due = poisson(200_000, rho / service, 1)
    result = simulate(schedule_of(due, [100] * len(due), [1] * len(due)), Fleet(1, 1), FAST_DECODE)
    wait = result.observations.ttft_s - service
    holds(wait, rho * service / (2 * (1 - rho)))
    holds((wait < 1e-6).astype(float), 1 - rho)

    def at_most(services: int) -> float:
        # Erlang: P(wait <= k services) = (1 - rho) sum_j e^(rho (k - j)) (-rho (k - j))^j / j!
        terms = (
            (-rho * (services - j)) ** j / math.factorial(j) * math.exp(rho * (services - j))
            for j in range(services + 1)
        )
        return (1 - rho) * sum(terms)

    holds((wait <= 3 * service + 1e-6).astype(float), at_most(3))


def test_one_prefill_worker_with_exponential_prompts_is_m_m_1() -> None:
    """Mean sojourn of M/M/1: s / (1 - rho); its 99th percentile is 4.6 times that."""
    rng = np.random.default_rng(2)
    service, rho, n = 1.0, 0.7, 200_000
    prompts = np.maximum(1, np.rint(rng.exponential(service * 1000, n)))
    result = simulate(schedule_of(poisson(n, rho / service, 3), prompts, [1] * n), Fleet(1, 1), FAST_DECODE)
    sojourn = result.observations.ttft_s
    holds(sojourn, service / (1 - rho))
    holds(sojourn, math.log(100) * service / (1 - rho), p99)


def test_one_prefill_worker_with_mixed_prompts_is_m_g_1() -> None:
    """Mean wait by Pollaczek and Khinchine: rate E[s^2] / (2 (1 - rho)), for two lengths far apart."""
    rng = np.random.default_rng(4)
    n = 200_000
    prompts = np.where(rng.random(n) < 0.9, 50, 1000)
    s = prompts / 1000
    rate = 0.7 / s.mean()
    result = simulate(schedule_of(poisson(n, rate, 5), prompts, [1] * n), Fleet(1, 1), FAST_DECODE)
    holds(result.observations.ttft_s - s, rate * float((s * s).mean()) / (2 * (1 - 0.7)))


def test_many_decode_sequences_share_a_worker() -> None:
    """With a step that costs per sequence only, decode is a shared processor: mean time by M/G/1-PS, s / (1 - rho).

    The step's grain (one token) is the difference: answers are 200 tokens long, so it stays below 3 %.
    """
    profile = Profile(name="t", c0_s=1e-9, c1_s=1e-3)
    rng = np.random.default_rng(6)
    n, rho = 20_000, 0.6
    outputs = np.maximum(50, np.rint(rng.exponential(200, n)))
    service = float(outputs.mean()) * 1e-3
    result = simulate(schedule_of(poisson(n, rho / service, 7), [1] * n, outputs), Fleet(1, 1), profile)
    assert float(result.observations.e2e_s.mean()) == pytest.approx(service / (1 - rho), rel=0.06)


def test_a_lone_request_takes_what_the_laws_say() -> None:
    """TTFT and the last token of one request are the sums of its stages, to the nanosecond."""
    p = Profile.load("demo")
    n, m = 700, 60
    rows = simulate(schedule_of(np.zeros(1), [n], [m]), Fleet(1, 1), p).observations
    prefill = p.a_s + p.b_s_per_token * n + p.c_s_per_token2 * n * n
    ready = prefill + p.overhead_s + p.transfer_t0_s + p.transfer_s_per_token * n
    steps = [p.c0_s + p.c1_s + p.c2_s * (n + k) for k in range(m)]
    assert rows.first_token_s[0] == pytest.approx(ready + steps[0], abs=1e-9)
    assert rows.last_token_s[0] == pytest.approx(ready + sum(steps), abs=1e-9)


def test_workers_at_one_queue_are_m_m_c() -> None:
    """Mean, probability and tail of the wait in M/M/c by Erlang's C: roles on demand at no cost are c servers, one queue."""
    rng = np.random.default_rng(12)
    c, service, rho, n = 4, 1.0, 0.8, 200_000
    prompts = np.maximum(1, np.rint(rng.exponential(service * 1000, n)))
    due = poisson(n, c * rho / service, 13)
    cluster = Cluster(FAST_DECODE, Fleet(2, 2), on_demand=next_phase)
    jobs = [Job(i, int(k), 1, t) for i, (k, t) in enumerate(zip(prompts.tolist(), due.tolist(), strict=True))]
    for job in jobs:
        cluster.advance(job.arrive_s)
        cluster.submit(job)
    while cluster.next_s < math.inf:
        cluster.advance(cluster.next_s)
    wait = np.array([j.prefill_start_s - j.arrive_s for j in jobs])
    load = c * rho
    terms = [load**k / math.factorial(k) for k in range(c)]
    last = load**c / math.factorial(c) / (1 - rho)
    waits = last / (sum(terms) + last)
    spare = (c - load) / service  # the rate at which a queue is worked off
    holds(wait, waits / spare)
    holds((wait > 1e-6).astype(float), waits)
    holds(wait, math.log(waits / 0.01) / spare, p99)


def test_prefill_then_decode_is_a_tandem_queue() -> None:
    """Burke: what leaves an M/M/1 queue is Poisson, so decode (one at a time) is M/M/1 too; the sojourns are independent."""
    rng = np.random.default_rng(14)
    n, rate = 200_000, 0.5
    prompts = np.maximum(1, np.rint(rng.exponential(1.0 * 1000, n)))
    outputs = np.maximum(1, np.rint(rng.exponential(1.4 * 1000, n)))
    profile = replace(FAST_DECODE, c0_s=1e-3, max_batch=1)
    rows = simulate(schedule_of(poisson(n, rate, 15), prompts, outputs), Fleet(1, 1), profile).observations
    one, two = 1.0 / 1.0 - rate, 1.0 / 1.4 - rate
    holds(rows.e2e_s, 1 / one + 1 / two)

    def beyond(t: float) -> float:
        return (one * math.exp(-two * t) - two * math.exp(-one * t)) / (one - two)

    holds(rows.e2e_s, float(optimize.brentq(lambda t: beyond(t) - 0.01, 1, 100)), p99)


# --- against a slow model that steps token by token ------------------------------------------------------------------


def stepped(schedule: Schedule, profile: Profile) -> tuple[list[float], list[float]]:
    """One decode worker, one token at a time, ready when due: the closed form's reference."""
    waiting = list(schedule)
    active: list[list[float]] = []  # [row, made, prompt, wanted]
    first, last = [math.nan] * len(schedule), [math.nan] * len(schedule)
    now = 0.0
    while waiting or active:
        while waiting and waiting[0].due_s <= now + 1e-12 and len(active) < profile.max_batch:
            request = waiting.pop(0)
            active.append([request.index, 0, request.prompt_tokens, request.output_tokens])
        if not active:
            now = waiting[0].due_s
            continue
        context = sum(prompt + made for _, made, prompt, _ in active)
        held = min(context, profile.bend_tokens or math.inf)
        now += profile.c0_s + profile.c1_s * len(active)
        now += profile.c2_s * (held - held * held / (2 * profile.bend_tokens) if profile.bend_tokens else held)
        for sequence in active:
            sequence[1] += 1
            row = int(sequence[0])
            if sequence[1] == 1:
                first[row] = now
            last[row] = now
        active = [s for s in active if s[1] < s[3]]
    return first, last


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.floats(0, 3), st.integers(1, 300), st.integers(1, 60)), min_size=1, max_size=25),
    st.integers(1, 6),
    st.sampled_from([0.0, 1e-6, 1e-5]),
    st.sampled_from([0, 60]),
)
def test_the_closed_form_is_the_token_by_token_model(
    requests: list[tuple[float, int, int]], cap: int, c2: float, bend: int
) -> None:
    """Decode in closed form gives every first and last token as a model that steps token by token does."""
    requests = sorted(requests)
    profile = Profile(name="t", c0_s=0.01, c1_s=0.002, c2_s=c2, bend_tokens=bend, max_batch=cap)
    # Apart by a millisecond and a bit: of two at the same instant the first starts a step, the second waits for its end.
    schedule = schedule_of(
        np.array([r[0] + i * 1.0137e-3 for i, r in enumerate(requests)]),
        [r[1] for r in requests],
        [r[2] for r in requests],
    )
    rows = simulate(schedule, Fleet(1, 1), profile).observations
    first, last = stepped(schedule, profile)
    np.testing.assert_allclose(rows.first_token_s, first, rtol=0, atol=1e-6)
    np.testing.assert_allclose(rows.last_token_s, last, rtol=0, atol=1e-6)


# --- conservation ---------------------------------------------------------------------------------------------------


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    return Profile(
        name="t",
        a_s=draw(st.floats(0, 0.05)),
        b_s_per_token=draw(st.floats(0, 1e-3)),
        c_s_per_token2=draw(st.floats(0, 1e-7)),
        prefill_square=draw(st.sampled_from(["prompt", "step"])),
        prefill_release=draw(st.sampled_from(["step", "drained"])),
        bend_tokens=draw(st.sampled_from([0, 700])),
        max_batch_tokens=draw(st.integers(1, 5000)),
        max_batch_requests=draw(st.integers(1, 16)),
        overhead_s=draw(st.floats(0, 0.1)),
        transfer_t0_s=draw(st.floats(0, 0.1)),
        transfer_s_per_token=draw(st.floats(0, 1e-4)),
        c0_s=draw(st.floats(0.001, 0.05)),
        c1_s=draw(st.floats(0, 0.01)),
        c2_s=draw(st.floats(0, 1e-6)),
        max_batch=draw(st.integers(1, 32)),
        kv_tokens=draw(st.sampled_from([0, 1000, 5000])),
        flip_s=draw(st.floats(0, 2)),
        prefill_route=draw(st.sampled_from(["least_tokens", "least_requests", "round_robin", "prefix"])),
        decode_route=draw(st.sampled_from(["least_tokens", "least_requests", "round_robin"])),
        chunked=draw(st.booleans()),
        cache_tokens=draw(st.sampled_from([0, 64, 1000])),
        transfer_link=draw(st.sampled_from(["none", "sender", "shared"])),
        knee_batch=draw(st.sampled_from([0, 2])),
        knee_s=draw(st.sampled_from([0.0, 0.005])),
        decode_context=draw(st.sampled_from(["batch", "worker"])),
        transfer_begins=draw(st.sampled_from(["sent", "pulled"])),
        kv_policy=draw(st.sampled_from(["reserve", "preempt"])),
        worker_speed=draw(st.sampled_from([(), (1.0, 2.0), (0.5, 1.0, 1.0, 3.0)])),
        worker_size=draw(st.sampled_from([(), (0.5,)])),
    )


FLEETS = st.sampled_from([Fleet(2, 3), Fleet(1, 1), Fleet(0, 0, 3), Fleet(1, 2, 2), Fleet(4, 1)])


def with_blocks(schedule: Schedule, seed: int = 0) -> Schedule:
    """The schedule with prompts that share heads: ten conversations of 16-token blocks."""
    rng = np.random.default_rng(seed)
    blocks = np.empty(len(schedule), dtype=object)
    for i, n in enumerate(schedule.prompt_tokens.tolist()):
        talk = int(rng.integers(10))
        blocks[i] = tuple(talk * 1000 + k for k in range(-(-n // 16)))
    return replace(schedule, blocks=blocks, block_tokens=16)


@settings(max_examples=200)
@given(
    profiles(),
    FLEETS,
    st.lists(st.tuples(st.floats(0, 10), st.integers(1, 900), st.integers(1, 80)), min_size=1, max_size=40),
    st.lists(st.tuples(st.floats(0, 12), st.integers(1, 4), st.integers(0, 2)), max_size=4),
    st.sampled_from(["routed", "on demand", "batches", "counts", "backlog"]),
    st.booleans(),
)
def test_nothing_is_lost_whatever_the_fleet_does(
    profile: Profile,
    fleet: Fleet,
    requests: list[tuple[float, int, int]],
    moves: list[tuple[float, int, int]],
    how: str,
    shared: bool,
) -> None:
    """Under random laws, fleets, policies and role changes every request ends once, in order, every token counted."""
    requests = sorted(requests)
    schedule = schedule_of(np.array([r[0] for r in requests]), [r[1] for r in requests], [r[2] for r in requests])
    if shared:
        schedule = with_blocks(schedule)
    n = fleet.workers
    changes = [
        (at, Fleet(min(p, n - 1), n - min(p, n - 1) - m, m)) for at, p, m in sorted(moves) if n - min(p, n - 1) > m
    ]
    if how == "on demand":
        changes = []
        fleet = Fleet(max(1, fleet.prefill), n - max(1, fleet.prefill))
        result = simulate(schedule, fleet, profile, on_demand=next_phase)
    elif how == "batches":
        rows = list(range(len(schedule)))
        batches = [(rows[:7], None), (rows[7:], changes[0][1] if changes else None)]
        result = simulate_batches(schedule, fleet, profile, batches, start_s=10.0, in_flight=3)
    elif how in ("counts", "backlog") and fleet.prefill and fleet.decode:
        rule = CountRule() if how == "counts" else BacklogRule(profile, 400, 40, more_s=0.05, ratio=1.1, cool_s=0.5)
        result = simulate(schedule, fleet, profile, controller=Steering(rule), tick_s=0.5)
    else:
        result = simulate(schedule, fleet, profile, changes=changes)
    rows_ = result.observations
    assert np.isfinite(rows_.last_token_s).all()
    assert (rows_.first_token_s >= rows_.sent_s).all()  # equal where a prompt costs nothing on a mixed worker
    assert (rows_.last_token_s >= rows_.first_token_s).all()
    assert rows_.output_tokens.tolist() == schedule.output_tokens.tolist()
    for switch in result.switches:
        assert switch.asked_s <= switch.drained_s + 1e-9
        assert switch.ready_s == pytest.approx(switch.drained_s + profile.flip_s)
    # a step never takes less than the law's floor on the fastest worker, and nobody is busier than always
    many = rows_.tokens > 1
    floor = profile.c0_s / max((1.0, *profile.worker_speed))
    assert (rows_.tpot_s[many] >= floor - 1e-9).all()
    for busy in (result.busy_share, *result.utilisation.values()):
        assert math.isnan(busy) or -1e-9 <= busy <= 1 + 1e-6


@settings(max_examples=80)
@given(profiles(), FLEETS, st.integers(0, 2**31), st.booleans(), st.booleans())
def test_littles_law_and_conservation(profile: Profile, fleet: Fleet, seed: int, on_demand: bool, shared: bool) -> None:
    """Tokens made equal tokens asked for, nothing stays reserved, and sequence-seconds agree with what is counted.

    Little: requests in the system, read at many instants, average to arrival rate times time in the system.
    """
    rng = np.random.default_rng(seed)
    if on_demand and not fleet.prefill:
        fleet = Fleet(1, 2)
    schedule = schedule_of(np.arange(30) * 0.05, rng.integers(1, 400, 30).tolist(), rng.integers(1, 40, 30).tolist())
    blocks = with_blocks(schedule, seed).blocks if shared else None
    cluster = Cluster(profile, fleet, on_demand=next_phase if on_demand else None, block_tokens=16 if shared else 0)
    jobs = [
        Job(r.index, r.prompt_tokens, r.output_tokens, r.due_s, None, () if blocks is None else blocks[r.index])
        for r in schedule
    ]
    area, last, inside = 0.0, 0.0, 0
    for job in jobs:
        while cluster.next_s <= job.arrive_s:
            at = cluster.next_s
            area, last = area + inside * (at - last), at
            cluster.advance(at)
            inside = sum(j.finish_s != j.finish_s for j in jobs[: job.id])
        area, last = area + inside * (job.arrive_s - last), job.arrive_s
        cluster.advance(job.arrive_s)
        cluster.submit(job)
        inside = sum(j.finish_s != j.finish_s for j in jobs[: job.id + 1])
    while cluster.next_s < math.inf:
        at = cluster.next_s
        area, last = area + inside * (at - last), at
        cluster.advance(at)
        inside = sum(j.finish_s != j.finish_s for j in jobs)
    assert area == pytest.approx(sum(j.finish_s - j.arrive_s for j in jobs), rel=1e-9)
    if not on_demand:  # run in one go it is the same run
        _, first, finish = stage_times(with_blocks(schedule, seed) if shared else schedule, fleet, profile)
        assert (first.tolist(), finish.tolist()) == ([j.first_s for j in jobs], [j.finish_s for j in jobs])
    workers = cluster.workers
    assert sum(w.output_tokens for w in workers) == pytest.approx(
        sum(j.output_tokens for j in jobs), abs=len(jobs) if fleet.mixed else 0
    )
    assert sum(w.prompt_tokens + w.cached_tokens for w in workers) == sum(j.prompt_tokens for j in jobs)
    assert all(w.size == 0 and w.kv_used == w.parked == 0 and not w.waiting and not w.queue for w in workers)
    assert all(w.requests == 0 and w.tokens == 0 for w in workers)
    for sample in cluster.samples(cluster.now_s):
        assert sample.waiting_requests == sample.running_requests == 0


@settings(max_examples=60)
@given(
    profiles(),
    st.sampled_from([Fleet(2, 2), Fleet(0, 0, 2), Fleet(1, 1, 1)]),
    st.booleans(),
    st.lists(st.tuples(st.integers(0, 14), st.floats(0, 5)), max_size=10),
)
@example(Profile(name="t", a_s=0.05, c0_s=0.01, chunked=True, max_batch_tokens=30), Fleet(1, 1), True, [(0, 0.01)]).via(
    "a prompt that is cut, whose client leaves in its first step"
)
def test_a_client_that_goes_away_frees_its_place(
    profile: Profile, fleet: Fleet, on_demand: bool, departures: list[tuple[int, float]]
) -> None:
    """Cancelled requests leave no reservation behind, and the others all finish."""
    on_demand = on_demand and not fleet.mixed
    cluster = Cluster(profile, fleet, on_demand=next_phase if on_demand else None)
    jobs = [Job(i, 50 + i, 30, i * 0.1) for i in range(15)]
    happenings = sorted(
        [(j.arrive_s, 0, j) for j in jobs] + [(at, 1, jobs[i]) for i, at in departures], key=lambda h: h[:2]
    )
    gone = set()
    for at, kind, job in happenings:
        cluster.advance(at)
        if kind == 0:
            cluster.submit(job)
        elif job.arrive_s <= at:
            cluster.cancel(job)
            gone.add(job.id)
    while cluster.next_s < math.inf:
        cluster.advance(cluster.next_s)
    assert all(w.size == 0 and w.kv_used == 0 and w.requests == 0 and w.tokens == 0 for w in cluster.workers)
    assert all(math.isfinite(j.finish_s) for j in jobs if j.id not in gone)


@pytest.mark.parametrize(("fleet", "on_demand"), [(Fleet(1, 1), False), (Fleet(0, 0, 1), False), (Fleet(1, 1), True)])
def test_a_lone_request_is_counted_once(fleet: Fleet, on_demand: bool) -> None:
    """A prompt that is cut runs and does not wait as well, its answer is one sequence; what is left of it waits as tokens."""
    p = replace(Profile.load("demo"), chunked=True, max_batch_tokens=100)
    cluster = Cluster(p, fleet, on_demand=next_phase if on_demand else None)
    cluster.submit(Job(0, 350, 3, 0.0))
    seen: list[tuple[float, float]] = []
    tokens: list[float] = []
    while cluster.next_s < math.inf:
        samples = list(cluster.samples(cluster.now_s))
        seen.append((sum(s.waiting_requests or 0 for s in samples), sum(s.running_requests or 0 for s in samples)))
        tokens.append(sum(s.waiting_tokens or 0 for s in samples if s.role != "decode"))
        cluster.advance(cluster.next_s)
    assert tokens == [250, 150, 50] + [0] * (len(tokens) - 3)
    assert set(seen[:4]) == {(0, 1)}
    assert max(w + r for w, r in seen) == 1


def test_the_same_schedule_gives_the_same_run() -> None:
    """The model draws nothing: two runs are equal to the last bit."""
    rng = np.random.default_rng(8)
    schedule = schedule_of(poisson(500, 8, 9), rng.integers(10, 3000, 500), rng.integers(1, 300, 500))
    one, two = (simulate(schedule, Fleet(2, 6), Profile.load("demo")).observations for _ in range(2))
    assert one.last_token_s.tobytes() == two.last_token_s.tobytes()


def test_a_role_change_costs_its_drain_and_its_flip() -> None:
    """While a worker drains and flips, one fewer serves; the record says from when to when."""
    profile = replace(Profile.load("demo"), flip_s=2.0)
    schedule = schedule_of(np.arange(40) * 0.1, [400] * 40, [50] * 40)
    result = simulate(schedule, Fleet(2, 2), profile, changes=[(1.0, Fleet(1, 3))])
    (switch,) = result.switches
    assert (switch.before, switch.after) == ("prefill", "decode")
    assert switch.asked_s == 1.0
    assert switch.ready_s == pytest.approx(switch.drained_s + 2.0)


# --- the mechanisms, one by one --------------------------------------------------------------------------------------


PAIR = Fleet(1, 1)


def lone(profile: Profile, prompt: int, output: int, fleet: Fleet = PAIR) -> tuple[float, float]:
    """(first token, last token) of one request on an empty fleet."""
    rows = simulate(schedule_of(np.zeros(1), [prompt], [output]), fleet, profile).observations
    return float(rows.first_token_s[0]), float(rows.last_token_s[0])


def test_a_cut_prompt_pays_the_fixed_cost_once_a_chunk() -> None:
    """1,000 tokens in chunks of 300: four steps; the area is sum of new tokens times context in place."""
    p = Profile(
        name="t", a_s=0.01, b_s_per_token=1e-4, c_s_per_token2=1e-8, max_batch_tokens=300, chunked=True, c0_s=0.02
    )
    area = 300 * 300 + 300 * 600 + 300 * 900 + 100 * 1000
    first, _ = lone(p, 1000, 1)
    assert first == pytest.approx(4 * 0.01 + 1000 * 1e-4 + area * 1e-8 + 0.02)
    whole, _ = lone(replace(p, chunked=False), 1000, 1)
    assert whole == pytest.approx(0.01 + 0.1 + 1e6 * 1e-8 + 0.02)


def test_a_step_may_pay_for_its_tokens_as_for_one_prompt() -> None:
    """With the square of the step four prompts of 2,000 take what one of 8,000 does; with that of prompts, less."""
    p = Profile(name="t", a_s=0.01, b_s_per_token=1e-5, c_s_per_token2=1e-9, prefill_square="step", c0_s=0.001)

    def second(profile: Profile, lengths: list[int]) -> float:
        rows = simulate(schedule_of(np.zeros(len(lengths)), lengths, [1] * len(lengths)), Fleet(1, 1), profile)
        return float(rows.observations.first_token_s[1])

    # A first prompt keeps the worker while the four gather.
    assert second(p, [1, 2000, 2000, 2000, 2000]) == pytest.approx(second(p, [1, 8000]), abs=1e-12)
    alone = replace(p, prefill_square="prompt")
    assert second(alone, [1, 8000]) == second(p, [1, 8000])
    assert second(alone, [1, 2000, 2000, 2000, 2000]) == pytest.approx(
        second(p, [1, 8000]) - 1e-9 * 12 * 2000**2, abs=1e-12
    )


@pytest.mark.parametrize("square", ["prompt", "step"])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_full_prefill_step_takes_what_the_laws_say(square: str, chunked: bool) -> None:
    """Of a saturated worker the seconds for each prompt are those of a full step, cut prompts or not."""
    p = Profile(
        name="t", a_s=0.01, b_s_per_token=1e-5, c_s_per_token2=5e-9, prefill_square=square, chunked=chunked,
        max_batch_tokens=4000, c0_s=0.001,
    )  # fmt: skip
    for length in (500, 1000, 4000):
        rows = simulate(schedule_of(np.zeros(400), [length] * 400, [1] * 400), Fleet(1, 1), p).observations
        each = p.prompt_s(float(length), p.together(length), float(length))
        assert float(rows.first_token_s.max()) / 400 == pytest.approx(each, rel=0.02)


def test_prompts_may_be_kept_until_their_worker_is_idle() -> None:
    """Released when drained, the prompts of a busy period leave together at its end, and the next period's at its own."""
    p = Profile(name="t", a_s=0.1, prefill_release="drained", c0_s=0.001)
    rows = simulate(schedule_of(np.array([0.0, 0.05, 0.15, 9.0]), [5] * 4, [4] * 4), Fleet(1, 1), p).observations
    np.testing.assert_allclose(rows.first_token_s, [0.301, 0.301, 0.301, 9.101], atol=1e-9)


def test_a_kept_prompt_leaves_after_as_many_steps_as_its_answer_has_tokens() -> None:
    """Of prompts that come at once, one a step, the one with an answer of m tokens leaves m - 1 steps after its own."""
    p = Profile(name="t", a_s=0.1, max_batch_tokens=5, prefill_release="drained", c0_s=0.001)
    rows = simulate(schedule_of(np.zeros(6), [5] * 6, [1, 3, 2, 9, 1, 9]), Fleet(1, 9), p).observations
    np.testing.assert_allclose(rows.first_token_s, [0.101, 0.401, 0.401, 0.601, 0.501, 0.601], atol=1e-9)


def test_kept_prompts_take_places_and_the_next_to_leave_makes_room() -> None:
    """Three places, one prompt a step: the fourth is begun when the first, whose answer is nearest its end, has left."""
    p = Profile(
        name="t", a_s=0.1, max_batch_tokens=5, max_batch_requests=3, prefill_release="drained", c0_s=0.001
    )  # fmt: skip
    rows = simulate(schedule_of(np.zeros(6), [5] * 6, [50, 60, 70, 80, 90, 99]), Fleet(1, 9), p).observations
    np.testing.assert_allclose(rows.first_token_s, [0.301, 0.401, 0.501, 0.601, 0.601, 0.601], atol=1e-9)


def test_who_comes_together_joins_together() -> None:
    """Prompts of one step arrive at an idle decode worker at one instant: its first step has them all."""
    p = Profile(name="t", a_s=0.1, c0_s=0.01, c1_s=0.001)
    rows = simulate(schedule_of(np.array([0.0, 0.05, 0.06, 0.07]), [5] * 4, [1, 2, 2, 2]), Fleet(1, 1), p).observations
    np.testing.assert_allclose(rows.first_token_s, [0.111, 0.213, 0.213, 0.213], atol=1e-9)


def test_a_transfer_may_begin_at_the_end_of_the_decode_workers_step() -> None:
    """Pulled, the second prompt's cache waits for the end of a step, is on its way for half a step, and joins at the next."""
    p = Profile(name="t", a_s=0.01, overhead_s=0.05, c0_s=0.1, transfer_begins="pulled")
    schedule = schedule_of(np.array([0.0, 0.18, 0.92]), [5] * 3, [8, 2, 1])
    rows = simulate(schedule, Fleet(1, 1), p).observations  # steps end at 0.06 + 0.1 k, the eighth at 0.86
    np.testing.assert_allclose(rows.first_token_s, [0.16, 0.46, 1.08], atol=1e-9)
    sent = simulate(schedule, Fleet(1, 1), replace(p, transfer_begins="sent")).observations
    np.testing.assert_allclose(sent.first_token_s, [0.16, 0.36, 1.08], atol=1e-9)


def test_a_step_may_pay_for_what_is_on_its_way_to_its_worker_or_waits_there() -> None:
    """Nine steps of 0.1 s and 1 ms a token: a prompt of 100 on its way for 0.25 s, and waiting until the batch has room."""
    p = Profile(name="t", transfer_s_per_token=2.5e-3, c0_s=0.1, c2_s=1e-3, max_batch=1, decode_context="worker")
    schedule = schedule_of(np.array([0.0, 0.3]), [2, 100], [9, 2])
    rows = simulate(schedule, Fleet(1, 1), p).observations
    steps = 0.1 + 1e-3 * (
        2 + np.arange(9)
    )  # of the first, from 0.005 s on; the third ends after 0.3 s, so the fourth pays
    paid = steps + 0.1 * (np.arange(9) >= 3)
    ends = 0.005 + np.cumsum(paid)
    assert rows.last_token_s[0] == pytest.approx(ends[-1])
    assert rows.first_token_s[1] == pytest.approx(ends[-1] + 0.2)
    alone = simulate(schedule, Fleet(1, 1), replace(p, decode_context="batch")).observations
    assert alone.last_token_s[0] == pytest.approx(0.005 + steps.sum())


def test_context_costs_less_and_less_where_its_cost_bends() -> None:
    """A long answer beyond and below the bend takes the sum of its steps, to 0.5 %."""
    for bend in (300, 2000, 50_000):
        p = Profile(name="t", c0_s=0.001, c1_s=1e-4, c2_s=1e-5, bend_tokens=bend)
        rows = simulate(schedule_of(np.zeros(1), [100], [1500]), Fleet(1, 1), p).observations
        steps = sum(p.step_s(1.0, 100.0 + k) for k in range(1500))
        assert float(rows.last_token_s[0]) == pytest.approx(steps, rel=5e-3)
    assert p.step_s(1.0, 2e6) == p.step_s(1.0, 50_000.0) == 0.001 + 1e-4 + 1e-5 * 25_000


def test_a_held_prefix_is_not_computed_again() -> None:
    """The second of two prompts with a common head pays for its tail; attention still sees the whole context."""
    p = Profile(name="t", b_s_per_token=1e-3, c_s_per_token2=1e-7, c0_s=0.02, cache_tokens=10_000)
    schedule = schedule_of(np.array([0.0, 100.0]), [100, 120], [1, 1])
    blocks = np.empty(2, dtype=object)
    blocks[:] = [(1, 2, 3, 4, 5, 6), (1, 2, 3, 4, 9, 10, 11)]
    schedule = replace(schedule, blocks=blocks, block_tokens=16)
    result = simulate(schedule, Fleet(1, 1), p)
    new = 120 - 4 * 16
    assert result.cached_tokens == 64
    assert result.observations.ttft_s[1] == pytest.approx(new * 1e-3 + new * 120 * 1e-7 + 0.02)
    assert simulate(schedule, Fleet(1, 1), replace(p, cache_tokens=0)).cached_tokens == 0


def test_the_cache_keeps_what_was_used_last() -> None:
    """Of blocks that do not fit, the least recently used go, a prompt's tail before its head."""
    cache = PrefixCache(4)
    cache.keep((1, 2, 3))
    cache.keep((10, 11))
    assert (cache.hit((1, 2, 3)), cache.hit((10, 11)), len(cache)) == (2, 2, 4)
    cache.keep((1, 2))
    cache.keep((20, 21))
    assert (cache.hit((1, 2)), cache.hit((10,)), cache.hit((20, 21))) == (2, 0, 2)
    cache.keep(tuple(range(100, 110)))
    assert (cache.hit(tuple(range(100, 110))), len(cache)) == (4, 4)


def test_prefix_aware_routing_sends_a_conversation_where_its_head_is() -> None:
    """With round robin two workers compute the same head twice; by prefix it is computed once."""
    p = Profile(name="t", b_s_per_token=1e-3, c0_s=0.001, cache_tokens=10_000, prefill_route="round_robin")
    schedule = schedule_of(np.arange(8) * 10.0, [160] * 8, [1] * 8)
    blocks = np.empty(8, dtype=object)
    blocks[:] = [tuple(range(9)) for _ in range(8)]
    schedule = replace(schedule, blocks=blocks, block_tokens=16)
    spread = simulate(schedule, Fleet(2, 1), p).cached_tokens
    together = simulate(schedule, Fleet(2, 1), replace(p, prefill_route="prefix")).cached_tokens
    assert (spread, together) == (6 * 144, 7 * 144)


def test_transfers_wait_for_each_other_on_a_shared_link() -> None:
    """Two prompts that are ready at once: on one link the second's KV cache leaves when the first's has."""
    p = Profile(name="t", b_s_per_token=1e-3, c0_s=0.001, transfer_s_per_token=1e-3, transfer_t0_s=0.005)
    schedule = schedule_of(np.zeros(2), [100, 100], [1, 1])
    done = {
        link: simulate(schedule, fleet, replace(p, transfer_link=link)).observations.first_token_s.tolist()
        for link, fleet in (("none", Fleet(2, 2)), ("sender", Fleet(2, 2)), ("shared", Fleet(2, 2)))
    }
    assert done["none"] == pytest.approx([0.206, 0.206])
    assert done["sender"] == pytest.approx([0.206, 0.206])
    assert done["shared"] == pytest.approx([0.206, 0.306])
    quick = replace(p, b_s_per_token=1e-4)  # the second prompt is ready long before the first has left
    for link, second in (("none", 0.126), ("sender", 0.216)):
        result = simulate(schedule, Fleet(1, 2), replace(quick, transfer_link=link))
        assert result.observations.first_token_s.tolist() == pytest.approx([0.116, second])


def test_beyond_the_knee_a_sequence_costs_more() -> None:
    """Four sequences with a knee at two: two of them pay the surcharge."""
    p = Profile(name="t", c0_s=0.01, c1_s=0.001, knee_batch=2, knee_s=0.004)
    rows = simulate(schedule_of(np.zeros(4), [1] * 4, [10] * 4), Fleet(1, 1), p).observations
    four, three = 0.01 + 0.004 + 2 * 0.004, 0.01 + 0.003 + 0.004
    # the first began a step earlier and leaves a step earlier
    assert rows.tpot_s[1:] == pytest.approx([(8 * four + three) / 9] * 3)


def test_a_full_cache_puts_the_latest_back_and_computes_it_again() -> None:
    """Two sequences of 60 + 40 tokens in 150 of KV: the later one leaves when the next step would not fit.

    It comes back when the first has finished, after a prefill step over all it had.
    """
    p = Profile(
        name="t", a_s=0.5, b_s_per_token=1e-9, c0_s=0.01, kv_tokens=150, kv_policy="preempt", max_batch_requests=1
    )
    schedule = schedule_of(np.array([0.0, 0.0]), [60, 60], [40, 40])
    result = simulate(schedule, Fleet(2, 1), replace(p, a_s=0.5))
    rows = result.observations
    assert result.preempted == 1
    start = 0.5 + 60e-9
    # the first joins alone, the second one step later: the batch fits until 60 + k + 60 + (k - 1) + 2 > 150
    assert rows.last_token_s[0] == pytest.approx(start + 40 * 0.01, abs=1e-6)
    assert rows.last_token_s[1] > rows.last_token_s[0] + 0.5
    reserved = simulate(schedule, Fleet(2, 1), replace(p, kv_policy="reserve"))
    assert reserved.preempted == 0
    assert reserved.observations.first_token_s[1] == pytest.approx(start + 40 * 0.01 + 0.01, abs=1e-6)


@pytest.mark.parametrize("chunked", [False, True])
def test_prompts_of_one_step_share_the_room_of_a_mixed_worker(chunked: bool) -> None:
    """Two prompts of 600 wait for the end of a step, 1,000 tokens have room: the second waits, and nobody is put back."""
    p = Profile(name="t", a_s=0.01, c0_s=0.01, kv_tokens=1000, kv_policy="preempt", chunked=chunked)
    cluster = Cluster(p, Fleet(0, 0, 1))
    for k, n in enumerate((10, 600, 600)):
        cluster.advance(k * 1e-3)
        cluster.submit(Job(k, n, 20, k * 1e-3))
    used = []
    while cluster.next_s < math.inf:
        cluster.advance(cluster.next_s)
        (sample,) = cluster.samples(cluster.now_s)
        used.append(sample.kv_used_tokens or 0)
    (worker,) = cluster.workers
    assert worker.preempted == 0
    assert 600 < max(used) <= 1000


def test_no_prompt_overtakes_who_was_put_back() -> None:
    """The second of two answers is put back for want of room: prompts that would fit beside the first wait until it is back."""
    p = Profile(name="t", a_s=0.01, c0_s=0.01, kv_tokens=1000, kv_policy="preempt")
    due = np.concatenate([np.zeros(2), 1.1 + np.arange(4) * 0.05])
    result = simulate(schedule_of(due, [400, 400] + [60] * 4, [200, 200] + [30] * 4), Fleet(0, 0, 1), p)
    rows = result.observations
    assert result.preempted == 1
    assert rows.first_token_s[2:].min() > rows.last_token_s[0]


def test_a_mixed_worker_shares_its_steps() -> None:
    """A prompt that arrives during an answer delays it by its own step; its first token comes with that step."""
    p = Profile(name="t", a_s=0.03, b_s_per_token=1e-3, c0_s=0.02, c1_s=0.001, transfer_t0_s=9.0)
    first, last = lone(p, 100, 11, Fleet(0, 0, 1))
    assert first == pytest.approx(0.13)
    assert last == pytest.approx(0.13 + 10 * 0.021)
    rows = simulate(schedule_of(np.array([0.0, 0.14]), [100, 50], [11, 3]), Fleet(0, 0, 1), p).observations
    begins = 0.13 + 0.021  # the step under way at 0.14 ends
    shared = 0.03 + 50e-3 + 0.001  # one fixed cost (the larger), the prompt, one sequence
    assert rows.first_token_s[1] == pytest.approx(begins + shared)
    assert rows.last_token_s[1] == pytest.approx(begins + shared + 2 * 0.022)
    assert rows.last_token_s[0] == pytest.approx(begins + shared + 2 * 0.022 + 6 * 0.021)


def test_faster_workers_get_more() -> None:
    """A worker of twice the speed takes half as long, and the router knows it."""
    p = Profile(name="t", b_s_per_token=1e-3, c0_s=1e-6, max_batch_requests=1, worker_speed=(2.0, 1.0))
    rows = simulate(schedule_of(np.zeros(3), [100] * 3, [1] * 3), Fleet(2, 1), p).observations
    assert sorted(rows.first_token_s.tolist()) == pytest.approx([0.05, 0.1, 0.1], abs=1e-4)


def test_on_demand_a_worker_pays_for_each_change() -> None:
    """One prompt at a time on two workers that both start as prefill and decode: who decodes next pays the flip."""
    p = Profile(name="t", b_s_per_token=1e-3, c0_s=0.01, max_batch=1, flip_s=5.0, max_batch_requests=1)
    # both prompts start at once on the prefill worker and, after a flip, on the other
    result = simulate(schedule_of(np.zeros(2), [1000, 1000], [10, 10]), Fleet(1, 1), p, on_demand=next_phase)
    assert [(s.worker, s.before, s.after) for s in result.switches][:1] == [(1, "decode", "prefill")]
    assert all(s.cost_s == pytest.approx(5.0) for s in result.switches)
    first = result.observations.first_token_s
    assert first[0] == pytest.approx(1.0 + 5.0 + 0.01)
    with pytest.raises(ValueError, match="on demand"):
        Cluster(p, Fleet(1, 1), on_demand=next_phase).set_fleet(Fleet(1, 1))


def test_a_fleet_of_another_size_cannot_be_asked_for() -> None:
    """Workers change roles; they do not appear."""
    with pytest.raises(ValueError, match="workers"):
        Cluster(Profile.load("demo"), Fleet(4, 4)).set_fleet(Fleet(4, 5))


# --- profiles -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", shipped_profiles())
def test_a_profile_is_read_back_from_its_own_toml(name: str, tmp_path: Path) -> None:
    """Writing a profile and reading it gives the same profile."""
    profile = Profile.load(name)
    path = tmp_path / "p.toml"
    path.write_text(profile.to_toml())
    assert Profile.load(path) == profile


def test_a_fitted_profile_with_numpy_numbers_is_written_as_plain_ones(tmp_path: Path) -> None:
    """Coefficients that come from a regression are numpy's; the file holds plain numbers."""
    profile = Profile(name='odd "name"\n', c0_s=np.float64(0.01), b_s_per_token=np.float64(1e-5), max_batch=np.int64(7))  # type: ignore[arg-type]
    path = tmp_path / "p.toml"
    path.write_text(profile.to_toml())
    assert "np." not in path.read_text()
    assert Profile.load(path) == profile


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name = 'x'\nc0_s = -1\n", "c0_s must be"),
        ("name = 'x'\nc0_s = 'fast'\n", "c0_s must be"),
        ("name = 'x'\nc0_s = nan\n", "c0_s must be"),
        ("name = 'x'\n", "must take time"),
        ("c0_s = 1.0\n", "name is missing"),
        ("name = 'x'\nc0_s = 1.0\nchunked = 1\n", "chunked must be true or false"),
        ("name = 'x'\nc0_s = 1.0\nworker_speed = [1, 0]\n", "worker_speed must be a list of numbers above 0"),
        ("name = 'x'\nc0_s = 1.0\nmax_batch = 0\n", "max_batch must be a whole number above 0"),
        ("name = 'x'\nc0_s = 1.0\nspeed = 3\n", "unknown key 'speed'"),
        ("name = 'x'\nc0_s = 1.0\ndecode_join = 'budget'\n", "unknown key 'decode_join'"),
        ("name = 'x'\nc0_s = 1.0\nprefill_route = 'magic'\n", "prefill_route must be one of"),
        ("name = \n", "not a TOML file"),
    ],
)
def test_a_profile_that_makes_no_sense_is_one_line(text: str, words: str, tmp_path: Path) -> None:
    """A wrong profile names the key and the file."""
    path = tmp_path / "p.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=words) as caught:
        Profile.load(path)
    assert "p.toml" in str(caught.value)
    with pytest.raises(InputError, match="neither a shipped one"):
        Profile.load("nope")


def test_a_profile_of_an_earlier_version_says_what_is_the_case_now_anyway(tmp_path: Path) -> None:
    """Laws in a stored policy may have the key of a rule that is gone, with the value that means without it."""
    path = tmp_path / "p.toml"
    path.write_text(Profile.load("demo").to_toml() + 'decode_join = "free"\n')
    assert Profile.load(path) == Profile.load("demo")


def test_the_demo_profile_stays_below_its_ceiling() -> None:
    """At every split of eight workers the demo profile makes at most 4,000 tokens a second."""
    profile = Profile.load("demo")
    n = 2000
    for fleet in Fleet.splits(8):
        result = simulate(schedule_of(np.zeros(n), [20] * n, [200] * n), fleet, profile)
        rows = result.observations
        assert rows.tokens.sum() / rows.last_token_s.max() <= 4000


def test_the_demo_question_is_one_where_the_split_matters() -> None:
    """On the demo's traffic best and worst differ by at least 30 %, 4:4 loses at least 5 %, the winner is no edge.

    And the second shipped trace has another winner.
    """
    from advisor.demo import ASKED_FACTOR, ASKED_REQUESTS, SLO
    from traces.ingest import ingest
    from traces.measures import Slo, summarise
    from traces.shape import head, scale_rate
    from traces.shipped import shipped
    from traces.store import open_store

    profile, slo = Profile.load("demo"), Slo.parse(SLO)
    winners = []
    for name, factor in (("azure-2023-conv", ASKED_FACTOR), ("azure-2023-code", 1.0)):
        with open_store("sqlite:///:memory:") as store:
            ingest(store, [shipped(name)])
            schedule = scale_rate(head(store.schedule(name), ASKED_REQUESTS), factor)
        good = {f: summarise(simulate(schedule, f, profile).observations, slo).goodput_per_s for f in Fleet.splits(8)}
        best = max(good, key=lambda f: good[f])
        winners.append(best)
        assert min(good.values()) <= 0.7 * good[best]
        assert good[Fleet(4, 4)] <= 0.95 * good[best]
        assert best not in (Fleet(4, 4), Fleet(1, 7), Fleet(7, 1))
    assert winners[0] != winners[1]
