"""Whatever comes, goes away and changes its role, in any order: the fleet keeps its workers, and every request ends once."""

from __future__ import annotations

import math

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from loadgen.cluster.kernel import Cluster, Job
from loadgen.cluster.laws import Profile
from tests.test_cluster import profiles
from traces.records import Fleet

WORKERS = 4
FLEETS = [
    Fleet(p, d, WORKERS - p - d)
    for p in range(WORKERS + 1)
    for d in range(WORKERS + 1 - p)
    if (p and d) or p + d < WORKERS
]


class FleetMachine(RuleBasedStateMachine):
    """A cluster beside lists of what it was asked: requests that came, those that went away, the fleet wanted last."""

    @initialize(profile=profiles(), fleet=st.sampled_from(FLEETS))
    def begin(self, profile: Profile, fleet: Fleet) -> None:
        self.finished: list[Job] = []
        self.cluster = Cluster(profile, fleet, on_finish=self.finished.append)
        self.jobs: list[Job] = []
        self.gone: set[int] = set()
        self.wanted = fleet

    @rule(prompt=st.integers(1, 400), output=st.integers(1, 60), n=st.integers(1, 4))
    def submit(self, prompt: int, output: int, n: int) -> None:
        for _ in range(n):
            job = Job(len(self.jobs), prompt, output, self.cluster.now_s)
            self.jobs.append(job)
            self.cluster.submit(job)

    @rule(seconds=st.floats(0, 3))
    def wait(self, seconds: float) -> None:
        self.cluster.advance(self.cluster.now_s + seconds)

    @rule()
    def next_event(self) -> None:
        if self.cluster.next_s < math.inf:
            self.cluster.advance(self.cluster.next_s)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """A client goes away, perhaps one whose answer is whole already."""
        job = data.draw(st.sampled_from(self.jobs))
        if math.isnan(job.finish_s):
            self.gone.add(job.id)
        self.cluster.cancel(job)

    @rule(fleet=st.sampled_from(FLEETS))
    def ask(self, fleet: Fleet) -> None:
        """Also while the last change is still under way."""
        self.cluster.set_fleet(fleet)
        self.wanted = fleet

    @invariant()
    def holds(self) -> None:
        c = self.cluster
        assert len(c.workers) == WORKERS
        assert len({w.id for w in c.workers}) == WORKERS
        assert sum(c.fleet) <= WORKERS
        assert sum(c.fleet) >= WORKERS - c.changing  # only those that flip serve nobody
        assert c.target == self.wanted
        heading = [w.target for w in c.workers]
        if not c.changing:  # a worker that flips cannot be called back: it turns round when it has flipped
            assert Fleet(*(heading.count(role) for role in ("prefill", "decode", "mixed"))) == self.wanted
        ended = [job.id for job in self.finished]
        assert len(set(ended)) == len(ended)
        assert not self.gone & set(ended)
        for job in self.finished:
            times = (job.arrive_s, job.prefill_start_s, job.prefill_end_s, job.first_s, job.finish_s)
            assert list(times) == sorted(times)
            assert job.finish_s <= c.now_s
        for sample in c.samples(c.now_s):
            for value in (
                sample.waiting_requests,
                sample.running_requests,
                sample.waiting_tokens,
                sample.kv_used_tokens,
            ):
                assert value is None or value >= 0
        for switch in c.switches:
            assert switch.asked_s <= switch.drained_s <= switch.ready_s
            assert switch.before != switch.after

    def teardown(self) -> None:
        """Left alone it comes to rest: who stayed has an answer, nobody is held, the fleet is the one asked for last."""
        if not hasattr(self, "cluster"):
            return
        c = self.cluster
        for _ in range(100_000):
            if c.next_s == math.inf:
                break
            c.advance(c.next_s)
        assert c.next_s == math.inf
        assert {job.id for job in self.finished} == {job.id for job in self.jobs} - self.gone
        assert c.changing == 0
        assert Fleet(*c.fleet) == self.wanted
        assert all(w.size == 0 and w.kv_used == 0 and w.requests == 0 and w.tokens == 0 for w in c.workers)
        self.holds()


FleetMachine.TestCase.settings = settings(
    max_examples=40, stateful_step_count=25, suppress_health_check=list(HealthCheck)
)
TestFleet = FleetMachine.TestCase
