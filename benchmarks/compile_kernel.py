"""Translate the kernel to machine code with mypyc, from the source that everybody else runs.

    python -m benchmarks.compile_kernel [FOLDER]

Puts ``kernel.<abi>.so`` beside ``loadgen/cluster/kernel.py`` (Python prefers it), or into FOLDER.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent.parent
CLUSTER = Path("loadgen") / "cluster"


def compile_kernel(folder: Path) -> list[Path]:
    """The compiled module in ``folder``. CalledProcessError with mypyc's words when it cannot be built."""
    with tempfile.TemporaryDirectory() as work:
        # A copy without this project's pyproject.toml, which old setuptools cannot read.
        for package in ("loadgen", "traces"):
            ignored = shutil.ignore_patterns("*.so", "__pycache__", "data")
            shutil.copytree(HERE / package, Path(work) / package, ignore=ignored)
        mypyc = Path(sys.executable).parent / "mypyc"
        subprocess.run(
            [sys.executable, str(mypyc), str(CLUSTER / "kernel.py")],
            cwd=work,
            check=True,
            capture_output=True,
            text=True,
        )
        # the module, and beside it the code it loads
        return [Path(shutil.copy(built, folder)) for built in sorted((Path(work) / CLUSTER).glob("kernel*.so"))]


if __name__ == "__main__":
    try:
        print(*compile_kernel(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / CLUSTER), sep="\n")
    except subprocess.CalledProcessError as error:
        print(error.stdout[-2000:], error.stderr[-2000:], sep="\n", file=sys.stderr)
        sys.exit("the kernel was not compiled: is there a C compiler, are Python's headers installed?")
