"""steelyard, aiperf and guidellm side by side: how late, how wrong and how dear is each client on the same load?

The ground-truth server of :mod:`benchmarks.client` has core 0 to itself and logs when each request arrived and when its first
token was written. The whole client, all of its processes, has core 1. Everybody replays the same trace at recorded times
(400-token prompts, 50-token answers, a token every 20 ms, Poisson arrivals in whole milliseconds), in turn, through the command
line that its documentation gives.

Lag is arrival at the server less due, both in order of time, from the least late request of the run: that favours
all alike (a constant lateness is not seen), because only steelyard says when its schedule began. The TTFT error is the client's
figure less the server's, request by request. CPU is that of the client's processes between the first arrival and the last token;
starting and reporting are not in it. A run in which the truth server was late itself, or in which others used the client's core,
is not counted. A client is behind where its lag exceeds half a second at p99 (aiperf's own bar) or requests are missing.

    python -m benchmarks.peers                    # installs the others into build/peers once, then measures what is missing
    python -m benchmarks.peers --minutes 5        # stops in time and goes on with the next call
    python -m benchmarks.peers --table            # what was measured so far, as Markdown

``make bench-peers`` does it all; about half a minute a run, for the others begin slowly.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.client import ITL_MS, LATE_MS, OTHERS, OUTPUT, PROMPT, TTFT_MS, Truth

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "peers"
PINNED = {"aiperf": "aiperf==0.13.0", "guidellm": "guidellm==0.8.1"}
TOKENIZER = "bench/tokenizer"
"""Trained on our own pages: prompts need one, and none can be downloaded everywhere."""

BEHIND_MS = 500.0
"""aiperf calls a replay degraded beyond this p99 of its lag."""

RATES = {
    "steelyard": (100, 400, 800, 1600, 2400),
    "aiperf": (50, 100, 200, 300, 400),
    "guidellm": (25, 50, 100),
}
"""Requests per second that each is asked for, fewer than RATES once it was behind twice at a lower one."""

MOST_S = 180.0
"""A client that takes longer than this for one run is stopped."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One run: the trace as a file, the server, and where the client may write."""

    trace: Path
    url: str
    out: Path
    n: int


def _steelyard(asked: Asked) -> list[list[str]]:
    base = [sys.executable, "-m", "steelyard"]
    db = f"sqlite:///{asked.out}/steelyard.db"
    return [
        [*base, "ingest", str(asked.trace), "--format", "mooncake", "--name", "bench", "--db", db, "--quiet"],
        [*base, "replay", "bench", "--endpoint", asked.url, "--workers", "1", "--db", db, "--quiet", "--json"],
        [*base, "runs", "export", "1", "--out", f"{asked.out}/rows.csv", "--db", db, "--quiet"],
    ]


def _steelyard_ttft(asked: Asked) -> dict[str, float]:
    with (asked.out / "rows.csv").open() as file:
        return {
            f"#{r['index']}": float(r["first_token_s"]) - float(r["sent_s"])
            for r in csv.DictReader(file)
            if r["status"] == "ok"
        }


def _aiperf(asked: Asked) -> list[list[str]]:
    return [
        [
            str(BUILD / "aiperf" / "bin" / "aiperf"), "profile", "--model", "truth", "--url", asked.url,
            "--endpoint-type", "completions", "--streaming", "--input-file", str(asked.trace),
            "--custom-dataset-type", "mooncake_trace", "--fixed-schedule", "--tokenizer", TOKENIZER,
            "--artifact-dir", str(asked.out / "aiperf"), "--ui", "none", "--workers-max", "1", "--no-gpu-telemetry",
            "--no-server-metrics", "--use-server-token-count",
        ]
    ]  # fmt: skip


def _aiperf_ttft(asked: Asked) -> dict[str, float]:
    found = {}
    for line in (asked.out / "aiperf" / "profile_export.jsonl").read_text().splitlines():
        held = json.loads(line)
        if "time_to_first_token" in held["metrics"]:
            found[held["metadata"]["x_request_id"]] = held["metrics"]["time_to_first_token"]["value"] / 1e3
    return found


def _guidellm(asked: Asked) -> list[list[str]]:
    return [
        [
            str(BUILD / "guidellm" / "bin" / "guidellm"), "run",
            "--backend", f"kind=openai_http,target={asked.url},model=truth,request_format=/v1/completions",
            "--profile", "kind=replay",
            "--data", f"kind=mooncake,time_scale=0.001,source.kind=json_file,source.path={asked.trace}",
            "--tokenizer", f"kind=hf_auto,model={TOKENIZER}",
            "--output", f"kind=json,path={asked.out / 'guidellm.json'}",
        ]
    ]  # fmt: skip


def _guidellm_ttft(asked: Asked) -> dict[str, float]:
    (benchmark,) = json.loads((asked.out / "guidellm.json").read_text())["benchmarks"]
    return {
        r["response_id"].removeprefix("cmpl-"): r["time_to_first_token_ms"] / 1e3
        for r in benchmark["requests"]["successful"]
    }


@dataclass(frozen=True, slots=True)
class Client:
    """commands: the last but one step of steelyard, the only one of the others, is the load. ttft: request -> seconds."""

    commands: Callable[[Asked], list[list[str]]]
    ttft: Callable[[Asked], dict[str, float]]
    load: int = 0


CLIENTS = {
    "steelyard": Client(_steelyard, _steelyard_ttft, 1),
    "aiperf": Client(_aiperf, _aiperf_ttft),
    "guidellm": Client(_guidellm, _guidellm_ttft),
}


def install(names: list[str]) -> dict[str, str]:
    """Name -> version, each in an environment of its own; and a tokenizer that needs no download."""
    BUILD.mkdir(parents=True, exist_ok=True)
    versions = {}
    for name in names:
        python = Path(sys.executable)
        if name in PINNED:
            python = BUILD / name / "bin" / "python"
            if not (BUILD / name / ".done").exists():
                subprocess.run([sys.executable, "-m", "venv", str(BUILD / name)], check=True)
                pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
                subprocess.run([*pip, PINNED[name]], check=True)
                (BUILD / name / ".done").touch()
        code = f"from importlib.metadata import version; print(version({name!r}))"
        versions[name] = subprocess.run(
            [str(python), "-c", code], check=True, capture_output=True, text=True
        ).stdout.strip()
    # Where the hub's client keeps what it has downloaded: the others ask it, and it is told to stay offline.
    kept = BUILD / "hub" / "hub" / f"models--{TOKENIZER.replace('/', '--')}"
    folder = kept / "snapshots" / ("0" * 40)
    if not (folder / "tokenizer.json").exists():
        from tokenizers import ByteLevelBPETokenizer

        made = ByteLevelBPETokenizer()
        text = [p.read_text(encoding="utf-8") for p in sorted((ROOT / "docs").rglob("*.md"))]
        made.train_from_iterator(text, vocab_size=4000, special_tokens=["<s>", "</s>"], show_progress=False)
        folder.mkdir(parents=True, exist_ok=True)
        (kept / "refs").mkdir(exist_ok=True)
        (kept / "refs" / "main").write_text("0" * 40)
        made.save(str(folder / "tokenizer.json"))
        about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(about))
        (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    return versions


class Watch:
    """Twice a second: CPU seconds of a process and those below it, and of core 1. Wall clock, as the server's log."""

    def __init__(self, root: int) -> None:
        self.rows: list[tuple[float, float, float]] = []
        self._root, self._stop = root, threading.Event()
        self._tick = os.sysconf("SC_CLK_TCK")
        self._used: dict[int, float] = {}
        self._thread = threading.Thread(target=self._main, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()

    def _own(self) -> float:
        held = {}
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                try:
                    fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                held[int(entry)] = int(fields[1]), (int(fields[11]) + int(fields[12])) / self._tick
        ours = {self._root}
        for pid in sorted(held):  # a child may leave its session, but not its parent; an orphan stays known
            if held[pid][0] in ours or pid in self._used:
                ours.add(pid)
        self._used |= {pid: held[pid][1] for pid in ours if pid in held}
        return sum(self._used.values())  # one that has ended keeps what it had used

    def _main(self) -> None:
        while not self._stop.wait(0.5):
            core = next(x for x in Path("/proc/stat").read_text().splitlines() if x.startswith("cpu1 ")).split()
            busy = sum(int(core[i]) for i in (1, 2, 3, 8)) / self._tick  # interrupts are for the client itself
            self.rows.append((time.time(), self._own(), busy))

    def between(self, start: float, end: float) -> tuple[float, float]:
        """(CPU seconds of the client, share of the core that others took)."""
        at, own, core = (np.array(column) for column in zip(*self.rows, strict=True))
        used = float(np.interp(end, at, own) - np.interp(start, at, own))
        busy = float(np.interp(end, at, core) - np.interp(start, at, core))
        return used, max(0.0, busy - used) / (end - start)


def run(client: Client, asked: Asked) -> tuple[Watch, float]:
    """The client's commands, all on core 1; (what the one that loads used, when it began)."""
    watched: Watch | None = None
    began = time.time()
    quiet = {k: v for k, v in os.environ.items() if not k.startswith("STEELYARD_")}
    quiet |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HOME": str(BUILD / "hub")}
    for k, command in enumerate(client.commands(asked)):
        with (asked.out / f"log-{k}").open("wb") as log:
            child = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=asked.out,
                env=quiet,
                start_new_session=True,
                preexec_fn=lambda: os.sched_setaffinity(0, {1}),
            )
            try:
                with Watch(child.pid) as watch:
                    code = child.wait(MOST_S)
            except subprocess.TimeoutExpired:
                code = -1
            finally:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
        if k == client.load:
            watched = watch
        if code not in (0, 4):  # 4: steelyard does not trust its own run
            tail = (asked.out / f"log-{k}").read_text(errors="replace").splitlines()[-12:]
            raise RuntimeError("\n    ".join([f"{command[0]} ended with {code}", *tail]))
    assert watched is not None
    return watched, began


def measure(truth: Truth, name: str, rate: float, seconds: float, seed: int, folder: Path) -> dict[str, Any]:
    """One run. why: what keeps it from counting, or ""."""
    client = CLIENTS[name]
    n = int(rate * seconds)
    due_ms = np.round(np.cumsum(np.random.default_rng(seed).exponential(1e3 / rate, n))).astype(int)
    due_ms -= due_ms[0]
    trace = folder / "trace.jsonl"
    with trace.open("w") as file:
        for k, at in enumerate(due_ms.tolist()):
            row = {"timestamp": at, "input_length": PROMPT, "output_length": OUTPUT, "hash_ids": [k]}
            file.write(json.dumps(row) + "\n")
    asked = Asked(trace, f"http://127.0.0.1:{truth.port}", folder, n)
    had = len(rows_of(truth))
    found: dict[str, Any] = {"client": name, "rate": rate, "seed": seed, "n": n, "why": ""}
    try:
        watch, _ = run(client, asked)
    except RuntimeError as error:
        return found | {"why": f"did not run: {error}"}
    log = [
        r for r in rows_of(truth)[had:] if int(r["tokens"]) == OUTPUT
    ]  # others are a client's questions before the load
    arrive, first, last = (np.array([float(r[k]) for r in log]) for k in ("arrive_s", "first_s", "last_s"))
    found["seen"] = len(log)
    if len(log) < 2:
        return found | {"why": "the server saw no request"}
    late = np.quantile((first - arrive) * 1e3 - TTFT_MS, 0.99)
    whole = np.quantile((last - first) * 1e3 - ITL_MS * (np.array([int(r["tokens"]) for r in log]) - 1), 0.99)
    lag = np.sort(arrive)[: len(due_ms)] * 1e3 - due_ms[: len(arrive)]
    lag -= lag.min()
    said = client.ttft(asked)
    own = {r["id"]: first[k] - arrive[k] for k, r in enumerate(log)}
    own |= {f"#{i.rpartition('-')[2]}": v for i, v in list(own.items())}
    error = np.array([(said[i] - own[i]) * 1e3 for i in said if i in own])
    cpu, others = watch.between(float(arrive.min()), float(last.max()))
    tokens = sum(int(r["tokens"]) for r in log)
    found |= {
        "lag_p50": float(np.quantile(lag, 0.5)), "lag_p99": float(np.quantile(lag, 0.99)),
        "matched": len(error), "tokens": tokens, "cpu": cpu / tokens * 1e3, "core": cpu / float(last.max() - arrive.min()),
        "others": others, "truth_p99": float(max(late, whole)),
        "prompt_bytes": float(np.median([int(r["prompt_bytes"]) for r in log])),
    }  # fmt: skip
    if len(error):
        found |= {
            "error_p50": float(np.quantile(np.abs(error), 0.5)),
            "error_p99": float(np.quantile(np.abs(error), 0.99)),
        }
    found["behind"] = bool(found["lag_p99"] > BEHIND_MS or len(log) < n)
    if max(late, whole) > LATE_MS:
        found["why"] = "the truth server was late itself"
    elif others > OTHERS:
        found["why"] = "others used the client's core"
    return found


def rows_of(truth: Truth) -> list[dict[str, str]]:
    """The server's log so far, after it has written it down."""
    time.sleep(1.2)
    with socket.create_connection(("127.0.0.1", truth.port)) as poke:
        poke.sendall(b"GET / HTTP/1.1\r\n\r\n")
        poke.recv(100)
    time.sleep(0.2)
    with truth.file.open() as file:
        return list(csv.DictReader(file))


def due_runs(held: list[dict[str, Any]], names: list[str], repeats: int) -> list[tuple[str, float, int]]:
    """What is still to be measured: every client at a rate before anybody at the next, none far beyond where it was behind."""
    wanted = []
    for repeat in range(repeats):
        for step in range(max(map(len, RATES.values()))):
            for name in names:
                if step >= len(RATES[name]):
                    continue
                rate = RATES[name][step]
                mine = [h for h in held if h["client"] == name]
                behind = [h["rate"] for h in mine if h.get("behind") and h["rate"] < rate]
                counted = sum(h["rate"] == rate and not h["why"] for h in mine)
                tried = sum(h["rate"] == rate for h in mine)
                if len(behind) < 2 and counted <= repeat and tried < repeat + 3:
                    wanted.append((name, float(rate), tried))
    return wanted


def figure(value: float) -> str:
    """Two digits or more, never an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def table(held: list[dict[str, Any]]) -> str:
    """Markdown: client, load, runs, lag, error, CPU; medians and the lowest and highest run."""
    head = "client | requests/s | tokens/s | runs | lag p50, ms | p99, ms | TTFT error p50, ms | p99, ms | CPU-s per 1000 tokens"
    lines = [f"| {head} |", f"|{' --- |' * (head.count('|') + 1)}"]
    for name in CLIENTS:
        for rate in sorted({h["rate"] for h in held if h["client"] == name}):
            mine = [h for h in held if h["client"] == name and h["rate"] == rate and not h["why"]]
            if not mine:
                continue

            def spread(key: str, mine: list[dict[str, Any]] = mine) -> str:
                values = [h[key] for h in mine if key in h]
                if not values:
                    return "-"
                text = figure(statistics.median(values))
                return text + (f" ({figure(min(values))}-{figure(max(values))})" if len(values) > 1 else "")

            behind = sum(h["behind"] for h in mine)
            note = f", {behind} behind" if behind else ""
            cells = [mine[0]["version"], f"{rate:g}", f"{rate * OUTPUT:,.0f}", f"{len(mine)}{note}"]
            cells += [spread(k) for k in ("lag_p50", "lag_p99", "error_p50", "error_p99", "cpu")]
            lines.append(f"| {name} {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", default=",".join(CLIENTS))
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no run that may end later")
    parser.add_argument("--results", type=Path, default=BUILD / "results.jsonl")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--install", action="store_true", help="install the others and stop")
    options = parser.parse_args()
    names = options.clients.split(",")
    held = [json.loads(line) for line in options.results.read_text().splitlines()] if options.results.exists() else []
    if options.table:
        print(table(held))
        return
    versions = install(names)
    if options.install:
        print(versions)
        return
    if (os.cpu_count() or 1) < 2:
        sys.exit("benchmarks.peers needs two cores: one for the truth, one for the client.")
    until = time.monotonic() + options.minutes * 60
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}; {versions}"
    )
    os.sched_setaffinity(0, {0})
    while time.monotonic() < until - 40 and (wanted := due_runs(held, names, options.repeats)):
        name, rate, seed = wanted[0]
        with tempfile.TemporaryDirectory() as folder:
            truth = Truth(Path(folder))
            try:
                (work := Path(folder) / "client").mkdir()
                found = measure(truth, name, rate, options.seconds, seed, work)
            finally:
                truth.stop()
        found |= {"version": versions[name], "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime())}
        held.append(found)
        with options.results.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(
            "  " + "  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items()),
            flush=True,
        )
    left = len(due_runs(held, names, options.repeats))
    print(table(held) + f"\n\n{left} runs are left.")


if __name__ == "__main__":
    main()
