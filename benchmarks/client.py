"""How late is the load client, and what does a token cost? One worker on one core against a ground truth on the other.

``truth_server.c`` is an endpoint in its own process whose token times are set, and which logs when each request
really arrived and when each token was really written. 400-token prompts, 50-token answers, one event a token, 20 ms
apart, Poisson arrivals. Lag is arrival *at the server* minus due; the TTFT error is the client's figure from sent minus
the server's own. Rows go through Locust into SQLite. Every run is followed by one of a reference on the same arrivals: the least
that a Python client can do. A run in which the truth server itself was late (its p99 over 2 ms), or in which other processes
used the client's core, says nothing about the client and is not counted.

    python -m benchmarks.client [--rates 400,800,1600] [--seconds 6] [--repeats 3] [--client steelyard|aiohttp]
                                [--reference bare|aiohttp|none]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import csv
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

PROMPT, OUTPUT, TTFT_MS, ITL_MS = 400, 50, 50.0, 20.0
LATE_MS = 2.0
OTHERS = 0.10
"""Share of the client's core that others may use in any half second of a run that counts."""
TRIES = 5


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def first_on_core_0() -> None:
    """For a child that is about to begin: core 0, before everybody else there where the system allows it (root)."""
    os.sched_setaffinity(0, {0})
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))


class Truth:
    """The ground-truth server on core 0; ``log(n)`` are the last n requests, by their number."""

    def __init__(self, folder: Path, itl_ms: float = ITL_MS) -> None:
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            sys.exit("benchmarks.client needs a C compiler (cc or gcc) for its ground-truth server.")
        binary = folder / "truth"
        source = Path(__file__).with_name("truth_server.c")
        subprocess.run([compiler, "-O2", "-o", binary, source], check=True)
        self.port = free_port()
        self.file = folder / "log.csv"
        self.process = subprocess.Popen(
            [binary, str(self.port), str(TTFT_MS), str(itl_ms), self.file],
            preexec_fn=first_on_core_0,
        )
        time.sleep(0.3)

    def log(self, n: int) -> dict[int, dict[str, float]]:
        time.sleep(1.5)  # it flushes once a second, when something happens
        with socket.create_connection(("127.0.0.1", self.port)) as poke:
            poke.sendall(b"GET / HTTP/1.1\r\n\r\n")
            poke.recv(100)
        time.sleep(0.2)
        with self.file.open() as file:
            rows = list(csv.DictReader(file))[-n:]
        return {int(r["id"].rpartition("-")[2]): {k: float(v) for k, v in r.items() if k != "id"} for r in rows}

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


class Quiet:
    """Watches, twice a second, what others take from core 1 while the worker runs there; ``others`` is the largest
    share of the core that was busy (steal included) and not the worker's."""

    def __init__(self, pid: int) -> None:
        self.others = 0.0
        self._pid = pid
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._main, daemon=True)

    def __enter__(self) -> Quiet:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()

    def _read(self) -> tuple[float, float, float]:
        tick = os.sysconf("SC_CLK_TCK")
        core = next(x for x in Path("/proc/stat").read_text().splitlines() if x.startswith("cpu1 ")).split()
        busy = sum(int(core[i]) for i in (1, 2, 3, 6, 7, 8)) / tick
        own = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
        return time.monotonic(), busy, (int(own[11]) + int(own[12])) / tick

    def _main(self) -> None:
        last = self._read()
        while not self._stop.wait(0.5):
            now = self._read()
            self.others = max(self.others, ((now[1] - last[1]) - (now[2] - last[2])) / (now[0] - last[0]))
            last = now


def steelyard(port: int, due: Any, folder: Path) -> dict[str, Any]:
    """One replay through Locust into SQLite: a worker on core 1, the master beside the truth server."""
    from loadgen.replay import replay
    from loadgen.swarm import Outcome, Swarm
    from traces.records import Schedule
    from traces.store import open_store

    n = len(due)
    schedule = Schedule("bench", np.arange(n), due, np.full(n, PROMPT), np.full(n, OUTPUT))
    outcomes: list[Outcome] = []
    os.sched_setaffinity(0, {1})
    with Swarm(workers=1) as swarm:
        os.sched_setaffinity(0, {0})
        for task in os.listdir("/proc/self/task"):  # threads that were started meanwhile
            os.sched_setaffinity(int(task), {0})
        with open_store(f"sqlite:///{folder}/bench-{time.monotonic_ns()}.db") as store:
            master = time.process_time()
            with Quiet(swarm.processes[0]) as quiet:
                run = replay(store, swarm, schedule, f"http://127.0.0.1:{port}", on_outcome=outcomes.append)
            master = time.process_time() - master
            rows = store.observations(run.id)
    return {
        "ok": run.counts.get("ok", 0),
        "unsent": run.counts.get("unsent", 0),
        "unix": outcomes[0].started_unix_s,
        "index": rows.index,
        "ttft": rows.ttft_sent_s,
        "cpu": outcomes[0].costs[0]["cpu_s"],
        "stall": outcomes[0].costs[0]["max_stall_s"],
        "master": master,
        "others": quiet.others,
    }


def aiohttp_lines(port: int, due: Any, folder: Path) -> dict[str, Any]:
    """The same load by aiohttp on uvloop, stamped as each line comes out of ``async for``: the usual way."""
    import json

    import aiohttp
    import uvloop

    os.sched_setaffinity(0, {1})
    ttft = np.full(len(due), np.nan)

    async def one(session: Any, zero: float, k: int) -> None:
        body = {"model": "truth", "prompt": [1234] * PROMPT, "max_tokens": OUTPUT, "stream": True}
        body["stream_options"] = {"include_usage": True}
        sent = time.monotonic()
        async with session.post(
            f"http://127.0.0.1:{port}/v1/completions", json=body, headers={"X-Request-Id": f"a-{k}"}
        ) as answer:
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    if ttft[k] != ttft[k]:
                        ttft[k] = time.monotonic() - sent
                    json.loads(line[6:])

    async def main() -> tuple[float, float]:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            zero, unix = time.monotonic() + 0.5, time.time() + 0.5
            before = time.process_time()
            tasks = []
            for k, d in enumerate(due):
                wait = zero + d - time.monotonic()
                if wait > 0:
                    await asyncio.sleep(wait)
                tasks.append(asyncio.create_task(one(session, zero, k)))
            await asyncio.gather(*tasks)
            return unix, time.process_time() - before

    with Quiet(os.getpid()) as quiet:
        unix, cpu = uvloop.run(main())
    return _found(ttft, unix, cpu, quiet)


def _found(ttft: Any, unix: float, cpu: float, quiet: Quiet) -> dict[str, Any]:
    """What a reference saw, under the names of :func:`steelyard`; ttft: from sent, NaN where none came."""
    return {
        "ok": int(np.isfinite(ttft).sum()), "unsent": 0, "unix": unix, "index": np.arange(len(ttft)),
        "ttft": ttft, "cpu": cpu, "stall": float("nan"), "master": 0.0, "others": quiet.others,
    }  # fmt: skip


class _Bare(asyncio.Protocol):
    """Keeps what arrives and when; sees an answer's end by its last bytes. Nothing else."""

    def __init__(self, done: Any) -> None:
        self.done, self.pieces, self.stamps, self.transport = done, [], [], None  # type: ignore[var-annotated]

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.stamps.append(time.monotonic())
        self.pieces.append(data)
        if data.endswith(b"\r\n0\r\n\r\n"):
            self.done(self)


def bare(port: int, due: Any, folder: Path) -> dict[str, Any]:
    """The least that a Python client can do, so what a token costs on this machine: it stamps pieces. No rows, no Locust."""
    import gc

    import uvloop

    os.sched_setaffinity(0, {1})
    n = len(due)
    ttft = np.full(n, np.nan)
    prompt = (
        b'{"model":"truth","prompt":[' + b",".join([b"1234"] * PROMPT) + b'],"max_tokens":%d,"stream":true}' % OUTPUT
    )
    request = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\nX-Request-Id: b-%%d\r\n\r\n" % len(
        prompt
    )

    async def main() -> tuple[float, float]:
        loop = asyncio.get_running_loop()
        free: list[Any] = []
        sent: dict[Any, tuple[int, float]] = {}
        left, ended = n, loop.create_future()

        def done(protocol: Any) -> None:
            nonlocal left
            number, at = sent.pop(protocol)
            ttft[number] = protocol.stamps[1] - at  # after the headers
            protocol.pieces, protocol.stamps = [], []
            free.append(protocol)
            left -= 1
            if not left:
                ended.set_result(None)

        for _ in range(int(n / due[-1])):
            _transport, protocol = await loop.create_connection(lambda: _Bare(done), "127.0.0.1", port)
            free.append(protocol)
        zero, unix = time.monotonic() + 0.5, time.time() + 0.5
        before = time.process_time()
        for number, d in enumerate(due):
            if (wait := zero + d - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            if not free:
                free.append((await loop.create_connection(lambda: _Bare(done), "127.0.0.1", port))[1])
            protocol = free.pop()
            sent[protocol] = number, time.monotonic()
            protocol.transport.write(request % number + prompt)
        await ended
        return unix, time.process_time() - before

    gc.collect()
    gc.disable()
    with Quiet(os.getpid()) as quiet:
        unix, cpu = uvloop.run(main())
    gc.enable()
    return _found(ttft, unix, cpu, quiet)


CLIENTS = {"steelyard": steelyard, "aiohttp": aiohttp_lines, "bare": bare}


def measure(truth: Truth, client: Any, rate: float, seconds: float, seed: int, folder: Path) -> dict[str, float] | None:
    """One run; None when the truth server was disturbed."""
    n = int(rate * seconds)
    due = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, n))
    due -= due[0]
    found = client(truth.port, due, folder)
    log = truth.log(n)
    if len(log) != n:
        print(f"  {rate:g}/s: the server saw {len(log)} of {n} requests", file=sys.stderr)
        return None
    get = {k: np.array([log[i][k] for i in range(n)]) for k in ("arrive_s", "first_s", "last_s")}
    own = (get["first_s"] - get["arrive_s"]) * 1e3 - TTFT_MS
    whole = (get["last_s"] - get["first_s"]) * 1e3 - ITL_MS * (OUTPUT - 1)
    late = max(float(np.quantile(own, 0.99)), float(np.quantile(whole, 0.99)))
    lag = (get["arrive_s"] - found["unix"] - due) * 1e3
    error = (found["ttft"] - (get["first_s"] - get["arrive_s"])[found["index"]]) * 1e3
    result = {
        "lag_p50": float(np.quantile(lag, 0.5)),
        "lag_p99": float(np.quantile(lag, 0.99)),
        "error_p50": float(np.nanquantile(np.abs(error), 0.5)),
        "error_p99": float(np.nanquantile(np.abs(error), 0.99)),
        "cpu": found["cpu"] / (n * OUTPUT) * 1000,
        "master": found["master"] / (n * OUTPUT) * 1000,
        "ok": found["ok"],
        "n": n,
        "stall_ms": found["stall"] * 1e3,
        "truth_p99": late,
        "others": found["others"],
    }
    line = "  ".join(f"{k} {v:.3g}" for k, v in result.items())
    if late > LATE_MS:
        print(f"  {rate:g}/s not counted, the truth server was late itself: {line}", file=sys.stderr)
        return None
    if found["others"] > OTHERS:
        print(f"  {rate:g}/s not counted, others used the client's core: {line}", file=sys.stderr)
        return None
    print(f"  {rate:g}/s: {line}", file=sys.stderr)
    return result


def tell(name: str, rate: float, runs: list[dict[str, float]]) -> float:
    """Print the medians of the runs that count; returns CPU seconds a 1000 tokens, of worker and master."""
    if not runs:
        print(f"{rate * OUTPUT:8,.0f} tok/s: no run of {name} counts, the machine is not quiet")
        return float("nan")

    def spread(key: str) -> str:
        values = [run[key] for run in runs]
        return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"

    print(
        f"{rate * OUTPUT:8,.0f} tok/s: {name} n {len(runs)}  lag ms p50 {spread('lag_p50')} p99 {spread('lag_p99')}  "
        f"TTFT error ms p50 {spread('error_p50')} p99 {spread('error_p99')}  "
        f"CPU-s per 1000 tokens {spread('cpu')} client, {spread('master')} master",
        flush=True,
    )
    return statistics.median(run["cpu"] + run["master"] for run in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", default="400,800,1600", help="requests per second")
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--client", choices=sorted(CLIENTS), default="steelyard")
    parser.add_argument("--reference", choices=[*sorted(CLIENTS), "none"], default="bare")
    options = parser.parse_args()
    cores = os.cpu_count() or 1
    if cores < 2:
        sys.exit("benchmarks.client needs two cores: one for the truth, one for the client.")
    processor = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")),
        platform.machine(),
    )
    print(f"{processor}, {cores} cores, Linux {platform.release()}, Python {platform.python_version()}")
    print(", ".join(f"{name} {version(name)}" for name in ("locust", "gevent", "uvloop", "httptools", "aiohttp")))
    print(
        f"client {options.client}, {PROMPT}-token prompts, {OUTPUT}-token answers, {options.seconds:g} s a run, "
        f"load average before {os.getloadavg()[0]:.2f}; medians (lowest-highest) of the runs that count"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        truth = Truth(folder)
        try:
            names = [options.client] + [options.reference] * (options.reference != "none")
            for rate in map(float, options.rates.split(",")):
                counted: dict[str, list[dict[str, float]]] = {name: [] for name in names}
                for k in range(options.repeats * TRIES):
                    for name in names:
                        if len(counted[name]) < options.repeats:
                            found = measure(truth, CLIENTS[name], rate, options.seconds, k, folder)
                            counted[name] += [found] if found is not None else []
                costs = {name: tell(name, rate, runs) for name, runs in counted.items()}
                if len(costs) == 2:
                    print(
                        f"{'':12s} cost, master included, is {costs[names[0]] / costs[names[1]]:.2f} of {names[1]}'s",
                        flush=True,
                    )
        finally:
            truth.stop()


if __name__ == "__main__":
    main()
