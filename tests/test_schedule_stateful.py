"""Whatever is done to a schedule, in any order: its requests are those it had, in order, and what was done is said."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loadgen.swarm import shares
from traces import shape
from traces.errors import InputError
from traces.records import Schedule

N = 60
FACTORS = st.sampled_from([0.25, 0.5, 1.0, 3.0])


def start() -> Schedule:
    """Sixty requests on a coarse clock, some in sessions of turns, with prefix blocks."""
    rng = np.random.default_rng(3)
    session = np.where(np.arange(N) % 3, np.arange(N) % 7, -1)
    last: dict[int, int] = {}
    parent = np.full(N, -1)
    for k, s in enumerate(session.tolist()):
        parent[k] = last.get(s, -1) if s >= 0 else -1
        last[s] = k
    prompt = rng.integers(1, 3000, N)
    blocks = np.empty(N, dtype=object)
    blocks[:] = [tuple(range(k, k + -(-int(n) // 512))) for k, n in enumerate(prompt)]
    due = np.floor(np.cumsum(rng.exponential(0.5, N)))
    return Schedule("t", np.arange(N), due - due[0], prompt, rng.integers(1, 800, N), blocks=blocks, block_tokens=512,
                    session=session, parent=parent, think_s=np.where(parent >= 0, 0.5, np.nan))  # fmt: skip


class ScheduleMachine(RuleBasedStateMachine):
    """A schedule beside a list of what each of its requests should be: (prompt, output, session)."""

    def __init__(self) -> None:
        super().__init__()
        self.schedule = start()
        s = self.schedule
        assert s.session is not None
        self.rows = dict(
            zip(s.index.tolist(), zip(s.prompt_tokens.tolist(), s.output_tokens.tolist(), strict=True), strict=True)
        )

    def become(self, made: Schedule, *, least: int = 0) -> None:
        """The next schedule; it says what was done exactly when something was, and its digest is another's then."""
        before = self.schedule
        assert len(made) >= least
        if made is before:
            return
        assert made.changes[: len(before.changes)] == before.changes
        assert len(made.changes) == len(before.changes) + 1
        if made.due_s.tolist() != before.due_s.tolist() or made.prompt_tokens.tolist() != before.prompt_tokens.tolist():
            assert made.digest() != before.digest()
        self.schedule = made

    def kept(self, made: Schedule) -> None:
        """Some requests of the one before, as they were."""
        self.become(made)
        self.rows = {i: self.rows[i] for i in self.schedule.index.tolist()}

    @rule(n=st.integers(1, N))
    def head(self, n: int) -> None:
        wanted = self.schedule.index.tolist()[:n]
        self.kept(shape.head(self.schedule, n))
        assert self.schedule.index.tolist() == wanted

    @rule(a=st.integers(0, 20), n=st.integers(1, 50))
    def piece(self, a: int, n: int) -> None:
        wanted = self.schedule.index.tolist()[a : a + n]
        if not wanted:
            return
        self.kept(shape.piece(self.schedule, a, a + n))
        assert self.schedule.index.tolist() == wanted
        assert self.schedule.due_s[0] == 0

    @rule(low=st.floats(0, 20), width=st.floats(1, 40))
    def window(self, low: float, width: float) -> None:
        inside = [
            i
            for i, due in zip(self.schedule.index.tolist(), self.schedule.due_s.tolist(), strict=True)
            if low <= due < low + width
        ]
        try:
            made = shape.window(self.schedule, low, low + width)
        except InputError:
            assert not inside
            return
        self.kept(made)
        assert self.schedule.index.tolist() == inside

    @rule(share=st.sampled_from([0.5, 0.9, 1.0]), seed=st.integers(0, 9))
    def thin(self, share: float, seed: int) -> None:
        try:
            self.kept(shape.thin(self.schedule, share, seed))
        except InputError:
            assert len(self.schedule) < 20

    @rule(factor=FACTORS)
    def scale_rate(self, factor: float) -> None:
        before = self.schedule.due_s
        self.kept(shape.scale_rate(self.schedule, factor))
        np.testing.assert_allclose(self.schedule.due_s, before / factor)

    @rule(rate=st.floats(0.1, 50))
    def to_rate(self, rate: float) -> None:
        try:
            self.kept(shape.to_rate(self.schedule, rate))
        except InputError:
            assert self.schedule.span_s == 0
            return
        assert abs(self.schedule.rate_per_s / rate - 1) < 1e-9

    @rule(seconds=st.floats(0.5, 30))
    def ramp(self, seconds: float) -> None:
        before = self.schedule.due_s
        self.kept(shape.ramp(self.schedule, seconds))
        assert (self.schedule.due_s >= before - 1e-9).all()

    @rule(tick=st.sampled_from([0.5, 1.0, 3.0]), seed=st.integers(0, 9))
    def spread(self, tick: float, seed: int) -> None:
        self.kept(shape.spread(self.schedule, tick, seed))

    @rule(prompt=st.integers(1, 4000), output=st.integers(1, 900))
    def clip(self, prompt: int, output: int) -> None:
        self.become(shape.clip_tokens(self.schedule, prompt, output))
        self.rows = {i: (min(p, prompt), min(o, output)) for i, (p, o) in self.rows.items()}

    @rule(prompt=FACTORS, output=FACTORS)
    def scale_tokens(self, prompt: float, output: float) -> None:
        self.become(shape.scale_tokens(self.schedule, prompt, output))
        self.rows = {i: (max(1, round(p * prompt)), max(1, round(o * output))) for i, (p, o) in self.rows.items()}

    @precondition(lambda self: len(self.schedule) <= N)
    @rule(copies=st.integers(1, 3), seed=st.integers(0, 9))
    def superpose(self, copies: int, seed: int) -> None:
        """Rows are numbered anew: the mix stays, each of them so many times."""
        before = sorted(self.rows.values()) if copies > 1 else None
        self.become(shape.superpose(self.schedule, copies, seed), least=copies * len(self.rows))
        if before is not None:
            s = self.schedule
            found = list(zip(s.prompt_tokens.tolist(), s.output_tokens.tolist(), strict=True))
            assert sorted(found) == sorted(before * copies)
            self.rows = dict(zip(s.index.tolist(), found, strict=True))

    @invariant()
    def holds(self) -> None:
        s = self.schedule
        assert len(s) >= 1
        assert len(set(s.index.tolist())) == len(s)
        assert (np.diff(s.due_s) >= 0).all()
        assert np.isfinite(s.due_s).all()
        found = dict(
            zip(s.index.tolist(), zip(s.prompt_tokens.tolist(), s.output_tokens.tolist(), strict=True), strict=True)
        )
        assert found == self.rows
        assert s.session is not None
        assert s.parent is not None
        linked = np.flatnonzero(s.parent >= 0)
        assert (s.parent[linked] < linked).all()  # an answer comes before what continues it
        assert (s.session[linked] == s.session[s.parent[linked]]).all()
        if s.blocks is not None:
            assert len(s.blocks) == len(s)
        for workers in (1, 3):  # every request has one worker, a session one
            parts = shares(s, workers)
            assert sorted(np.concatenate(parts).tolist()) == list(range(len(s)))
            owners: dict[int, int] = {}
            for k, part in enumerate(parts):
                for session in s.session[part].tolist():
                    assert session < 0 or owners.setdefault(session, k) == k
        assert replace(s).digest() == s.digest()


ScheduleMachine.TestCase.settings = settings(
    max_examples=40, stateful_step_count=12, suppress_health_check=list(HealthCheck)
)
TestSchedule = ScheduleMachine.TestCase
