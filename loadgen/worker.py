"""The entry point of a load worker's process: ``python -m loadgen.worker --master HOST:PORT``."""

from __future__ import annotations

import argparse
import json
import os
import sys

from loadgen.secret import SECRET
from traces.errors import SteelyardError


def main() -> int:
    """Parse and work; one line on stderr if there is no master."""
    parser = argparse.ArgumentParser(prog="python -m loadgen.worker", description=__doc__)
    parser.add_argument(
        "--master", required=True, metavar="HOST:PORT", help="address of the Locust master; -: as standard input says"
    )
    parser.add_argument("--parent", type=int, default=0, help="end when this process is no longer the parent")
    options = parser.parse_args()
    master = options.master
    if master == "-":  # see loadgen.crew
        said = sys.stdin.readline()
        if not said:
            return 0
        told = json.loads(said)
        master, os.environ[SECRET] = told["master"], told["secret"]
    try:
        from loadgen.swarm import work  # here: memory for it may be denied, which is one line as well

        return work(master, options.parent)
    except SteelyardError as error:
        print(f"steelyard: {error}", file=sys.stderr)
        return error.exit_code
    except MemoryError:
        print("steelyard: a load worker is out of memory.", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
