"""A test of real time is tried again when, and only when, the machine stood still while it ran."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.watch import Watch

CONFTEST = """
import pytest
from tests.conftest import (
    DISTURBED, Disturbed, pytest_collection_modifyitems, pytest_runtest_makereport, pytest_runtest_setup,
)
"""
TEST = """
import signal, time
import pytest
from tests.conftest import DISTURBED
@pytest.mark.timed
def test_disturbed(request):
    disturbed = request.config.stash[DISTURBED]
    watcher = disturbed.watch._process
    watcher.send_signal(signal.SIGSTOP)
    time.sleep(0.1)
    watcher.send_signal(signal.SIGCONT)
    until = time.monotonic() + 15
    while not disturbed() and time.monotonic() < until:
        time.sleep(0.01)
    assert False
@pytest.mark.timed
def test_undisturbed():
    assert False
"""


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Watch]:
    held = Watch(tmp_path)
    yield held
    held.close()


def test_a_stop_is_seen_and_is_over_when_it_is_over(watch: Watch) -> None:
    """A napping process that is stopped for 0.1 s has woken late, by about that; from then on it has not."""
    begun = time.monotonic()
    watch._process.send_signal(signal.SIGSTOP)
    time.sleep(0.1)
    watch._process.send_signal(signal.SIGCONT)
    while watch.worst_s(begun) < 0.05:
        assert time.monotonic() < begun + 30, "a stop of 0.1 s was not seen"
        time.sleep(0.01)
    assert watch.worst_s(time.monotonic() + 1) == 0


def test_it_is_tried_again_only_on_a_machine_that_stood_still(tmp_path: Path) -> None:
    """Three times in all when each was disturbed, once when none was; it stays failed either way."""
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_one.py").write_text(TEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = timed: x\naddopts = -p no:cacheprovider\n")
    for _ in range(8):  # a machine that stood still by itself is no answer to the second question
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-v", "-p", "no:xdist", str(tmp_path)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        ended = re.findall(r"::(test_\w+) (RERUN|FAILED|PASSED) ", done.stdout)
        told = [part.split("\n_____")[0] for part in done.stdout.split(" test_undisturbed ___")[1:]]
        if "stood still" not in told[-1] and ("test_undisturbed", "RERUN") not in ended:
            break
    assert done.returncode == 1
    disturbed = [("test_disturbed", "RERUN")] * 2 + [("test_disturbed", "FAILED")]
    assert ended[:3] == disturbed, done.stdout
    assert ("test_undisturbed", "PASSED") not in ended
    # In each of eight tries it was disturbed in earnest: then the machine has no answer today.
    assert ended[3:] == [("test_undisturbed", "FAILED")] or done.stdout.count("stood still") > 1, done.stdout
