"""The compiled kernel is the kernel: the same source, the same run to the last bit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import loadgen.cluster.kernel
from benchmarks.compile_kernel import CLUSTER, can_compile, compile_kernel, fresh

SCRIPT = """
import hashlib
from dataclasses import replace
from loadgen.cluster import Profile, simulate
from loadgen.cluster.kernel import Cluster
from loadgen.policy import next_phase
from traces.records import Fleet
from traces.shape import ORIGIN_OUTPUT, ORIGIN_PROMPT, synthesize
import loadgen.cluster.kernel as kernel
digest = hashlib.sha256()
schedule = synthesize(600, ORIGIN_PROMPT, ORIGIN_OUTPUT, rate_per_s=9, seed=4)
demo = Profile.load("demo")
for laws, fleet, how in (
    (demo, Fleet(2, 6), {}),
    (replace(demo, chunked=True, max_batch_tokens=512, kv_tokens=9000, kv_policy="preempt"), Fleet(1, 3, 3), {}),
    (replace(demo, transfer_link="shared", knee_batch=4, knee_s=0.001), Fleet(3, 4), {"changes": [(9.0, Fleet(5, 2))]}),
    (Profile.load("origin"), Fleet(4, 4), {"on_demand": next_phase}),
):
    digest.update(simulate(schedule, fleet, laws, **how).observations.last_token_s.tobytes())
print(kernel.__file__.rsplit(".", 1)[1], digest.hexdigest())
"""


def digest_of(root: Path) -> list[str]:
    """(extension of the kernel in use, digest of the runs) with the packages under a folder."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT],
        env=os.environ | {"PYTHONPATH": str(root)},
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.split()


def test_the_compiled_kernel_runs_to_the_same_bit(tmp_path: Path) -> None:
    """mypyc's module and the Python source give equal bytes on every mechanism. ``make test`` has compiled it; else it is now."""
    if not fresh() and not can_compile():
        if os.environ.get("STEELYARD_REQUIRE_COMPILER"):
            pytest.fail("no C compiler, or no Python headers")
        pytest.skip("no C compiler, or no Python headers")
    here = Path(loadgen.__file__).parent.parent
    ignored = shutil.ignore_patterns("*.so", "data", "*.pyc.*")  # the last are gone when their module is written
    for package in ("loadgen", "traces"):
        shutil.copytree(here / package, tmp_path / package, ignore=ignored)
    source = digest_of(tmp_path)
    if fresh():
        for built in (here / CLUSTER).glob("kernel*.so"):
            shutil.copy(built, tmp_path / CLUSTER)
    else:
        compile_kernel(tmp_path / CLUSTER)
    assert source[0] == "py"
    assert digest_of(tmp_path) == ["so", source[1]]


def test_no_stale_machine_code_is_in_use() -> None:
    """A compiled kernel older than its source would test yesterday's rules: run make compiled."""
    used = Path(loadgen.cluster.kernel.__file__)
    assert used.stat().st_mtime >= used.with_name("kernel.py").stat().st_mtime, "run make compiled"
