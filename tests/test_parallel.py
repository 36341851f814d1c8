"""Work shared among cores gives what one core gives, in order; a fork that fails leaves its share to the process itself."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from advisor import parallel
from advisor.parallel import cores, shared, shares


@pytest.mark.parametrize("n", [1, 2, 3])
def test_results_come_in_order_and_once(n: int) -> None:
    """Fewer items than cores, none, and more; within the block only."""
    with cores(n):
        assert shares() == (n if sys.platform == "linux" else 1)
        for held in ([], [5], list(range(7))):
            assert shared(lambda x: x * x, held) == [x * x for x in held]
    assert shares() == 1


@pytest.mark.skipif(sys.platform != "linux", reason="nothing is forked elsewhere")
def test_every_core_has_its_share() -> None:
    """Every second item is done elsewhere; nobody who was forked forks again."""
    with cores(2):
        who = shared(lambda _: (os.getpid(), shares()), range(6))
    assert len({pid for pid, _ in who}) == 2
    assert {n for pid, n in who if pid != os.getpid()} == {1}
    assert [pid == os.getpid() for pid, _ in who] == [True, False] * 3


@pytest.mark.skipif(sys.platform != "linux", reason="nothing is forked elsewhere")
@pytest.mark.parametrize("how", ["killed", "stuck"])
def test_a_fork_that_fails_costs_time_not_results(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed, or standing still for ever: its share is done here, once more."""
    me = os.getpid()
    monkeypatch.setattr(parallel, "PATIENCE_S", 0.2 if how == "stuck" else 60.0)

    def work(x: int) -> int:
        if os.getpid() != me:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        return x + 1

    with cores(3):
        assert shared(work, range(5)) == [1, 2, 3, 4, 5]


def test_a_mistake_is_raised_where_it_was_asked() -> None:
    """Also if it was in another core's share."""
    with cores(2), pytest.raises(ZeroDivisionError):
        shared(lambda x: 1 / x, [1, 0, 1])
