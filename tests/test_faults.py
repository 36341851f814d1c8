"""What was measured survives what happens to processes: one of the faults of ``make test-faults``, tried once."""

from __future__ import annotations

from pathlib import Path

from tests.faults.scenarios import SCENARIOS, lock_database_kill_master


def test_nothing_that_was_whole_is_lost(tmp_path: Path) -> None:
    """Real processes, a real database: a master that is killed while others hold the database. What was answered three seconds
    before (one, where it has its cores to itself) is there, nothing is there twice, nobody waits for ever."""
    outcome = lock_database_kill_master(tmp_path, 0, spare_s=2.0)
    assert outcome is not None
    assert outcome.finished > 0
    assert (outcome.lost, outcome.twice, outcome.hung, outcome.wrong) == (0, 0, False, "")
    assert "TRACEBACK" not in outcome.said


def test_processes_are_killed_and_stopped_two_hundred_times() -> None:
    """The whole harness tries what the project promises often enough to mean something."""
    assert sum(s.times for s in SCENARIOS if s.name.startswith(("kill", "SIGSTOP"))) >= 200
