"""Translate the kernel to machine code with mypyc, from the source that everybody else runs.

    python -m benchmarks.compile_kernel [--where-possible]

Puts ``kernel.<abi>.so`` beside ``loadgen/cluster/kernel.py`` (Python prefers it). ``--where-possible`` does nothing where it is
newer than its source, and goes on without it where there is no compiler.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

HERE = Path(__file__).parent.parent
CLUSTER = Path("loadgen") / "cluster"
TYPES = """
[mypy]
follow_imports = skip
[mypy-loadgen.cluster.*,traces.records]
follow_imports = silent
[mypy-numpy.*]
follow_imports_for_stubs = True
"""
"""What mypyc reads of what the kernel imports: our records and laws. All else, followed too, takes four times as long and makes
the same C."""


def compile_kernel(folder: Path) -> list[Path]:
    """The compiled module in ``folder``. CalledProcessError with mypyc's words when it cannot be built."""
    with tempfile.TemporaryDirectory() as work:
        # A copy without this project's pyproject.toml, which old setuptools cannot read.
        for package in ("loadgen", "traces"):
            ignored = shutil.ignore_patterns("*.so", "__pycache__", "data")
            shutil.copytree(HERE / package, Path(work) / package, ignore=ignored)
        (Path(work) / "mypy.ini").write_text(TYPES, encoding="utf-8")
        mypyc = Path(sys.executable).parent / "mypyc"
        subprocess.run(
            [sys.executable, str(mypyc), str(CLUSTER / "kernel.py")],
            cwd=work,
            check=True,
            capture_output=True,
            text=True,
        )
        # the module, and beside it the code it loads
        return [put(built, folder) for built in sorted((Path(work) / CLUSTER).glob("kernel*.so"))]


def put(built: Path, folder: Path) -> Path:
    """A copy in ``folder``, as a new file: one that is written over breaks the processes that have loaded it."""
    beside = Path(shutil.copy(built, folder / f"{built.name}.new"))
    return beside.replace(folder / built.name)


def fresh() -> bool:
    """Whether this Python's compiled kernel stands beside its source and is newer."""
    built = HERE / CLUSTER / f"kernel{sysconfig.get_config_var('EXT_SUFFIX')}"
    return built.exists() and built.stat().st_mtime >= (HERE / CLUSTER / "kernel.py").stat().st_mtime


def can_compile() -> bool:
    """Whether there is a C compiler, and Python's headers for it."""
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return headers.exists() and bool(shutil.which("cc") or shutil.which("gcc"))


if __name__ == "__main__":
    if sys.argv[1:] == ["--where-possible"] and (fresh() or not can_compile()):
        print("the kernel is compiled" if fresh() else "no C compiler, or no Python headers: the kernel stays Python")
        sys.exit()
    try:
        print(*compile_kernel(HERE / CLUSTER), sep="\n")
    except subprocess.CalledProcessError as error:
        print(error.stdout[-2000:], error.stderr[-2000:], sep="\n", file=sys.stderr)
        sys.exit("the kernel was not compiled: is there a C compiler, are Python's headers installed?")
