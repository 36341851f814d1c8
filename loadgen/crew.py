"""Load workers' processes, begun before anybody knows where their master listens: they load Locust while it does."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from traces.errors import InputError


class Crew:
    """Processes ``python -m loadgen.worker --master -``; a context manager, in which nothing heavy is imported.

    Each waits at its standard input for one line that says where the master is, and the secret; it ends where that is closed
    without a word, so nothing is left of a command that comes to nothing, or is killed. processes: by process id.
    """

    def __init__(self, workers: int) -> None:
        if workers < 0:
            raise InputError(f"a swarm needs at least one worker (got {workers}).")
        self.workers = workers
        self.processes: dict[int, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        here = str(Path(__file__).resolve().parent.parent)
        paths = [here, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        try:
            for _ in range(self.workers):
                process = subprocess.Popen(
                    # -P: a folder named traces where the user happens to be must not be taken for ours.
                    [sys.executable, "-P", "-m", "loadgen.worker", "--master", "-", "--parent", str(os.getpid())],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "LOCUST_SKIP_MONKEY_PATCH": "1"},
                    start_new_session=True,  # Ctrl-C is the master's to handle
                )
                self.processes[process.pid] = process
                if self.workers > _cores():
                    # Workers that share a core do not interrupt each other: one reads what it has before the next begins.
                    with contextlib.suppress(OSError, AttributeError):
                        os.sched_setscheduler(process.pid, os.SCHED_BATCH, os.sched_param(0))
        except BaseException:
            self.close(0.0)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(0.0)

    def join(self, address: str, secret: str) -> None:
        """Tell them where the master is, HOST:PORT, and the secret it asks for."""
        line = json.dumps({"master": address, "secret": secret}).encode() + b"\n"
        for process in self.processes.values():
            assert process.stdin is not None  # noqa: S101 - a pipe
            try:
                with process.stdin as pipe:
                    pipe.write(line)
            except OSError:
                pass  # it is gone: who waits for it to join finds that out

    def close(self, patience_s: float) -> None:
        """End them; those that were told to quit have ``patience_s`` together."""
        until = time.monotonic() + patience_s
        for process in self.processes.values():
            if process.stdin is not None:
                process.stdin.close()
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(5)
        self.processes.clear()


def _cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
