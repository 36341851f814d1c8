"""Install and start live engines on loopback, measure them as a user would, and print the table.

    python -m tests.engines [--only WORDS] [--keep FOLDER] [--tries N] [--install-s SECONDS]

Each engine has an environment of its own in ``.venv-engines/``, installed from the package index the first time. Exit code 1 when
one could not be installed or started, when a request was lost, or when something is not as it should be.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.engines import dynamo, lab, sglang, vllm
from tests.engines.lab import HEAD, TRACE, Absent, Failed, Line, measure
from traces.errors import SteelyardError

RIGS: tuple[Any, ...] = (sglang, dynamo, vllm.Files, vllm.Nixl)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="engines whose name this regular expression finds")
    parser.add_argument("--keep", type=Path, help="keep logs and the database in this folder [default: removed]")
    parser.add_argument("--tries", type=int, default=1, help="measure again what failed, so often in all [default: 1]")
    parser.add_argument(
        "--install-s", type=float, default=lab.INSTALL_S, help="seconds that an environment may take [1800]"
    )
    options = parser.parse_args()
    lab.INSTALL_S = options.install_s
    chosen = [rig for rig in RIGS if re.search(options.only, rig.NAME)]
    if not chosen:
        parser.error(f"--only {options.only}: no engine is named so; there are {', '.join(rig.NAME for rig in RIGS)}")
    lines: list[Line] = []
    for rig in [rig for rig in chosen for _ in range(options.tries)]:
        if lines and lines[-1].name == rig.NAME and (lines[-1].absent or not lines[-1].wrong):
            continue
        line = Line(rig.NAME)
        if lines and lines[-1].name == rig.NAME:
            print(f"{rig.NAME}, once more after: {'; '.join(lines.pop().wrong)}", file=sys.stderr)
        lines.append(line)
        with tempfile.TemporaryDirectory(prefix="engines-") as temporary:
            folder = options.keep.resolve() / re.sub(r"\W+", "-", rig.NAME.lower()) if options.keep else Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            try:
                began = time.monotonic()
                python = rig.install()
                line.install_s = time.monotonic() - began
                began = time.monotonic()
                with rig.started(python, folder) as one:
                    measure(one, folder, line)
                line.run_s = time.monotonic() - began
            except (Failed, SteelyardError) as error:
                line.absent = isinstance(error, Absent)
                line.wrong.append(str(error))
                print(f"{rig.NAME}: {error}", file=sys.stderr)
    print(
        f"{time.strftime('%Y-%m-%d', time.gmtime())}; {os.cpu_count()} cores, Linux {platform.release()}, Python "
        f"{platform.python_version()}; steelyard {version('steelyard')}; the first requests of {TRACE}, "
        "prompts to 2,000 tokens, answers to 32.\n\n" + HEAD
    )
    for line in lines:
        print(line.row())
    return 1 if any(line.wrong for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
