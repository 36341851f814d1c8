"""Did this machine keep time? A process of its own naps again and again, and writes down each time it woke late.

    python -m tests.watch FILE

A test that measures real time fails where the machine stands still, on whatever it runs, and says nothing about the code then.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

NAP_S = 0.003
LATE_S = 0.010
"""A wake-up later than this is one that a replay's own processes may have had as well."""


class Watch:
    """The napping process, and what it saw. Times are of :func:`time.monotonic`, which all processes share."""

    def __init__(self, folder: Path) -> None:
        self._seen = folder / "late"
        self._process = subprocess.Popen([sys.executable, "-P", __file__, str(self._seen)])
        until = time.monotonic() + 60
        while not (self._seen.exists() and self._seen.stat().st_size) and time.monotonic() < until:
            time.sleep(0.01)  # until its first nap

    def worst_s(self, since_s: float) -> float:
        """The latest wake-up since an instant in seconds, 0 where none was later than LATE_S."""
        late = [tuple(map(float, line.split(","))) for line in self._seen.read_text().split()]
        return max((by for at, by in late if at >= since_s), default=0.0)

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait(10)


def nap(path: str) -> None:
    """Until the parent is gone: sleep, and write "instant,late" in seconds where the sleep took too long."""
    parent = os.getppid()
    with open(path, "a", buffering=1) as out:
        time.sleep(NAP_S)
        print("0,0", file=out)
        while os.getppid() == parent:
            until = time.monotonic() + NAP_S
            time.sleep(NAP_S)
            now = time.monotonic()
            if now - until > LATE_S:
                print(f"{now:.6f},{now - until:.6f}", file=out)


if __name__ == "__main__":
    nap(sys.argv[1])
