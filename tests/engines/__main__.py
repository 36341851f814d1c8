"""Install and start live engines on loopback, measure them as a user would, and print the table.

    python -m tests.engines [--only WORDS] [--keep FOLDER]

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

from tests.engines import dynamo, sglang
from tests.engines.lab import HEAD, RATE, REQUESTS, TRACE, Failed, Line, measure
from traces.errors import SteelyardError

RIGS = (sglang, dynamo)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="engines whose name this regular expression finds")
    parser.add_argument("--keep", type=Path, help="keep logs and the database in this folder [default: removed]")
    options = parser.parse_args()
    chosen = [rig for rig in RIGS if re.search(options.only, rig.NAME)]
    if not chosen:
        parser.error(f"--only {options.only}: no engine is named so; there are {', '.join(rig.NAME for rig in RIGS)}")
    lines = []
    for rig in chosen:
        line = Line(rig.NAME)
        lines.append(line)
        with tempfile.TemporaryDirectory(prefix="engines-") as temporary:
            folder = options.keep.resolve() / rig.__name__.rpartition(".")[2] if options.keep else Path(temporary)
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
                line.wrong.append(str(error))
                print(f"{rig.NAME}: {error}", file=sys.stderr)
    print(
        f"{time.strftime('%Y-%m-%d', time.gmtime())}; {os.cpu_count()} cores, Linux {platform.release()}, Python "
        f"{platform.python_version()}; steelyard {version('steelyard')}; the first {REQUESTS} requests of {TRACE} at {RATE:g}/s, "
        "prompts to 2,000 tokens, answers to 32.\n\n" + HEAD
    )
    for line in lines:
        print(line.row())
    return 1 if any(line.wrong for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
