"""Whatever is written, written again, ended, deleted and reopened, in any order: the store holds what a dictionary would."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from tests.test_store import a_run, some_rows
from traces.records import Run, Sample
from traces.store import open_store

ROWS = some_rows(60)
ROWS.index[:] = np.arange(60)


@cache
def migrated() -> bytes:
    """A SQLite file as the migrations leave it: to make one takes longer than an example."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.db"
        open_store(f"sqlite:///{path}").close()
        return path.read_bytes()


class StoreMachine(RuleBasedStateMachine):
    """A SQLite file beside a dictionary: run -> indexes of its rows, and times of its readings."""

    runs: Bundle[Run] = Bundle("runs")

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        path = Path(self.folder.name) / "s.db"
        self.url = f"sqlite:///{path}"
        path.write_bytes(migrated())
        self.store = open_store(self.url)
        self.rows: dict[int, set[int]] = {}
        self.readings: dict[int, set[float]] = {}
        self.ended: dict[int, bool] = {}

    @rule(target=runs)
    def begin(self) -> Run:
        run = self.store.begin_run(replace(a_run(), scheduled=60))
        self.rows[run.id], self.readings[run.id], self.ended[run.id] = set(), set(), False
        return run

    @rule(run=runs, start=st.integers(0, 59), n=st.integers(0, 20))
    def write(self, run: Run, start: int, n: int) -> None:
        """A batch that may overlap what is there."""
        some = np.arange(start, min(60, start + n))
        self.store.add_observations(run.id, ROWS.take(some))
        self.rows[run.id] |= set(some.tolist())

    @rule(run=runs, times=st.lists(st.sampled_from([0.5, 1.0, 1.5]), max_size=4))
    def read(self, run: Run, times: list[float]) -> None:
        self.store.add_samples(run.id, [Sample(at, "w", "decode") for at in times])
        self.readings[run.id] |= set(times)

    @rule(run=runs)
    def end(self, run: Run) -> None:
        self.store.end_run(run)
        self.ended[run.id] = True

    @rule(run=runs)
    def ask(self, run: Run) -> None:
        """Kept figures are never those of fewer rows."""
        assert self.store.figures(self.store.run(run.id)).n == len(self.rows[run.id])

    @rule(run=consumes(runs))
    def delete(self, run: Run) -> None:
        self.store.delete_run(run.id)
        for held in (self.rows, self.readings, self.ended):
            del held[run.id]

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = open_store(self.url, create=False)

    @invariant()
    def holds_what_it_was_given(self) -> None:
        assert {run.id: run.ended for run in self.store.runs()} == self.ended
        for run_id, indexes in self.rows.items():
            assert set(self.store.observations(run_id).index.tolist()) == indexes
            assert {s.at_s for s in self.store.samples(run_id)} == self.readings[run_id]

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()


StoreMachine.TestCase.settings = settings(
    max_examples=12, stateful_step_count=15, suppress_health_check=list(HealthCheck)
)
TestStore = StoreMachine.TestCase
