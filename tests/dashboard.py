"""The Grafana dashboard's questions, asked of a real Prometheus that reads a real replay and the endpoint it loads.

    python -m tests.dashboard        # needs Debian's prometheus and promtool; a minute

``make test`` checks the names (test_exposition.py). This checks that Prometheus takes both pages, that it understands every
expression, and that every panel of the replay and of the reference endpoint draws something.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

from loadgen.cluster.embedded import embedded
from loadgen.exposition import exposed
from loadgen.replay import replay
from loadgen.swarm import Swarm
from traces.measures import Slo
from traces.records import Fleet, Schedule
from traces.store import open_store

BOARD = Path(__file__).parent.parent / "docs" / "grafana" / "steelyard.json"
SECONDS, RATE = 30, 20


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def lint(url: str) -> str:
    """What promtool says of a page: nothing, if it is well made."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        done = subprocess.run(["promtool", "check", "metrics"], input=answer.read(), capture_output=True, check=False)
    return (done.stdout + done.stderr).decode().strip()


def main() -> int:
    """1 where something is refused or a panel of ours stays empty."""
    if not (shutil.which("prometheus") and shutil.which("promtool")):
        print("install Debian's package prometheus first: apt-get install prometheus", file=sys.stderr)
        return 2
    board = json.loads(BOARD.read_text())
    port, problems = free_port(), 0
    n = SECONDS * RATE
    schedule = Schedule("steady", np.arange(n), np.arange(n) / RATE, np.full(n, 300), np.full(n, 20))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (
            embedded("llama-8b-h100", Fleet(2, 2)) as endpoint,
            exposed() as (metrics, watch),
            Swarm(workers=1) as swarm,
            open_store(f"sqlite:///{folder}/t.db") as store,
        ):
            hosts = [re.sub("https?://|/.*", "", url) for url in (metrics, endpoint)]
            (folder / "prometheus.yml").write_text(
                "global: {scrape_interval: 1s}\nscrape_configs:\n"
                + "".join(
                    f"- job_name: {job}\n  static_configs: [{{targets: ['{host}']}}]\n"
                    for job, host in zip(("steelyard", "servers"), hosts, strict=True)
                )
            )
            command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
            with (folder / "log").open("wb") as log:
                server = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stderr=log)
            try:
                replay(store, swarm, schedule, endpoint, slo=Slo.parse("ttft<0.5s"), on_live=watch)
                pages = {"replay": lint(metrics), "endpoint": lint(endpoint + "/metrics")}
                time.sleep(2)
                problems += ask(board, f"http://127.0.0.1:{port}", pages)
            finally:
                server.terminate()
                server.wait(20)
    return int(problems > 0)


def ask(board: dict[str, Any], prometheus: str, pages: dict[str, str]) -> int:
    """How much is wrong, each thing said."""
    problems = 0
    for page, said in pages.items():
        print(f"promtool of the {page}'s page: {said or 'nothing to complain of'}")
        problems += bool(said)
    for one in get(f"{prometheus}/api/v1/targets")["data"]["activeTargets"]:
        print(f"target {one['labels']['job']}: {one['health']} {one['lastError']}")
        problems += one["health"] != "up"
    end = time.time()
    for panel in board["panels"]:
        drawn = 0
        for target in panel.get("targets", ()):
            expression = target["expr"].replace("$__rate_interval", "4s").replace("$run", ".*")
            query = urllib.parse.urlencode({"query": expression, "start": end - SECONDS, "end": end, "step": 1})
            try:
                found = get(f"{prometheus}/api/v1/query_range?{query}")["data"]["result"]
            except urllib.error.HTTPError as error:
                print(f"{panel['title']}: {expression}: {error.read().decode()}")
                problems += 1
                continue
            values = [float(v) for series in found for _, v in series["values"] if v != "NaN"]
            drawn += len(found)
            span = f"{min(values):.4g} to {max(values):.4g}" if values else "no value"
            if found:
                print(f"{panel['title']}: {target['legendFormat']}: {len(found)} series, {span}")
        silent = panel["type"] == "row" or panel["title"] in (
            "Requests that were not ok",  # all were
            "TTFT p99, as the server counts",  # the reference endpoint leaves that to the client
        )
        if not drawn and not silent:
            print(f"{panel['title']}: draws nothing")
            problems += 1
    print(f"{problems} problems")
    return problems


if __name__ == "__main__":
    sys.exit(main())
