"""The cluster model: right by theory, and nothing gets lost in it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadgen.cluster import Cluster, Job, Profile, shipped_profiles, simulate
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


@pytest.mark.parametrize("rho", [0.5, 0.8])
def test_one_prefill_worker_with_equal_prompts_is_m_d_1(rho: float) -> None:
    """Mean wait of M/D/1: rho s / (2 (1 - rho)), within 5 % over 200,000 requests."""
    service = 0.1
    due = poisson(200_000, rho / service, 1)
    result = simulate(schedule_of(due, [100] * len(due), [1] * len(due)), Fleet(1, 1), FAST_DECODE)
    wait = float(result.observations.ttft_s.mean()) - service
    assert wait == pytest.approx(rho * service / (2 * (1 - rho)), rel=0.05)


def test_one_prefill_worker_with_exponential_prompts_is_m_m_1() -> None:
    """Mean sojourn of M/M/1: s / (1 - rho); its 99th percentile is 4.6 times that."""
    rng = np.random.default_rng(2)
    service, rho, n = 1.0, 0.7, 200_000
    prompts = np.maximum(1, np.rint(rng.exponential(service * 1000, n)))
    result = simulate(schedule_of(poisson(n, rho / service, 3), prompts, [1] * n), Fleet(1, 1), FAST_DECODE)
    sojourn = result.observations.ttft_s
    assert float(sojourn.mean()) == pytest.approx(service / (1 - rho), rel=0.05)
    assert float(np.quantile(sojourn, 0.99)) == pytest.approx(math.log(100) * service / (1 - rho), rel=0.08)


def test_one_prefill_worker_with_mixed_prompts_is_m_g_1() -> None:
    """Mean wait by Pollaczek and Khinchine: rate E[s^2] / (2 (1 - rho)), for two lengths far apart."""
    rng = np.random.default_rng(4)
    n = 200_000
    prompts = np.where(rng.random(n) < 0.9, 50, 1000)
    s = prompts / 1000
    rate = 0.7 / s.mean()
    result = simulate(schedule_of(poisson(n, rate, 5), prompts, [1] * n), Fleet(1, 1), FAST_DECODE)
    wait = float((result.observations.ttft_s - s).mean())
    assert wait == pytest.approx(rate * float((s * s).mean()) / (2 * (1 - 0.7)), rel=0.07)


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
        now += profile.c0_s + profile.c1_s * len(active) + profile.c2_s * context
        for sequence in active:
            sequence[1] += 1
            row = int(sequence[0])
            if sequence[1] == 1:
                first[row] = now
            last[row] = now
        active = [s for s in active if s[1] < s[3]]
    return first, last


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 3), st.integers(1, 300), st.integers(1, 60)), min_size=1, max_size=25),
    st.integers(1, 6),
    st.sampled_from([0.0, 1e-6, 1e-5]),
)
def test_the_closed_form_is_the_token_by_token_model(
    requests: list[tuple[float, int, int]], cap: int, c2: float
) -> None:
    """Decode in closed form gives every first and last token as a model that steps token by token does."""
    requests = sorted(requests)
    profile = Profile(name="t", c0_s=0.01, c1_s=0.002, c2_s=c2, max_batch=cap)
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
        prefill_route=draw(st.sampled_from(["least_tokens", "least_requests", "round_robin"])),
        decode_route=draw(st.sampled_from(["least_tokens", "least_requests", "round_robin"])),
    )


@settings(max_examples=120, deadline=None)
@given(
    profiles(),
    st.lists(st.tuples(st.floats(0, 10), st.integers(1, 900), st.integers(1, 80)), min_size=1, max_size=40),
    st.lists(st.tuples(st.floats(0, 12), st.integers(1, 4)), max_size=4),
)
def test_nothing_is_lost_whatever_the_fleet_does(
    profile: Profile, requests: list[tuple[float, int, int]], moves: list[tuple[float, int]]
) -> None:
    """Under random laws and role changes every request ends once, in order, and every token is counted."""
    requests = sorted(requests)
    schedule = schedule_of(np.array([r[0] for r in requests]), [r[1] for r in requests], [r[2] for r in requests])
    changes = [(at, Fleet(p, 5 - p)) for at, p in sorted(moves)]
    result = simulate(schedule, Fleet(2, 3), profile, changes=changes)
    rows = result.observations
    assert np.isfinite(rows.last_token_s).all()
    assert (rows.first_token_s > rows.due_s).all()
    assert (rows.last_token_s >= rows.first_token_s).all()
    assert rows.output_tokens.tolist() == schedule.output_tokens.tolist()
    for switch in result.switches:
        assert switch.asked_s <= switch.drained_s + 1e-9
        assert switch.ready_s == pytest.approx(switch.drained_s + profile.flip_s)
    # a step never takes less than the law's floor, and a fleet is never busier than it is large
    many = rows.tokens > 1
    assert (rows.tpot_s[many] >= profile.c0_s - 1e-9).all()
    if not changes:
        for busy in result.utilisation.values():
            assert -1e-9 <= busy <= 1 + 1e-9


@settings(max_examples=40, deadline=None)
@given(profiles(), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**31))
def test_littles_law_holds_in_decode(profile: Profile, prefill: int, decode: int, seed: int) -> None:
    """Sequence-seconds counted from requests equal those integrated over time; tokens made equal tokens asked for."""
    rng = np.random.default_rng(seed)
    cluster = Cluster(profile, Fleet(prefill, decode))
    jobs = [Job(i, int(rng.integers(1, 400)), int(rng.integers(1, 40)), float(i) * 0.05) for i in range(30)]
    for job in jobs:
        cluster.advance(job.arrive_s)
        cluster.submit(job)
    while cluster.next_s < math.inf:
        cluster.advance(cluster.next_s)
    assert sum(w.output_tokens for w in cluster.workers) == sum(j.output_tokens for j in jobs)
    assert sum(w.prompt_tokens for w in cluster.workers) == sum(j.prompt_tokens for j in jobs)
    assert all(w.size == 0 and w.kv_used == 0 and w.queued_tokens == 0 and not w.waiting for w in cluster.workers)
    assert sum(w.finished for w in cluster.workers if w.role == "prefill") == len(jobs)


@settings(max_examples=60, deadline=None)
@given(profiles(), st.lists(st.tuples(st.integers(0, 14), st.floats(0, 5)), max_size=10))
def test_a_client_that_goes_away_frees_its_place(profile: Profile, departures: list[tuple[int, float]]) -> None:
    """Cancelled requests leave no reservation behind, and the others all finish."""
    cluster = Cluster(profile, Fleet(2, 2))
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
    assert all(w.size == 0 and w.kv_used == 0 for w in cluster.workers)
    assert all(math.isfinite(j.finish_s) for j in jobs if j.id not in gone)


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
        ("name = 'x'\nc0_s = 1.0\nspeed = 3\n", "unknown key 'speed'"),
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
