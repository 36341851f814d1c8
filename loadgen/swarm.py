"""The only room that knows Locust: a master in this process, workers in processes of their own.

Locust gives processes, messages, heartbeats and statistics. It is used as a library and unpatched (gevent's monkey
patching would put asyncio on gevent's hub, and must never happen in a user's process): the master's hub lives in a
thread of its own, and in each worker the asyncio client runs in a native thread beside the hub.

What travels: columns of a shard down, columns of finished rows up, at least twice a second. No prompt passes through
the master: a worker makes its own from a salt and the lengths.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import json
import logging
import math
import os
import queue
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

os.environ.setdefault("LOCUST_SKIP_MONKEY_PATCH", "1")

import gevent
import gevent.event
import gevent.pywsgi
import gevent.ssl
import locust.runners
from locust.env import Environment
from locust.event import Events

from loadgen import engines, secret
from loadgen.client import TIMEOUT_S, Engine, Gate, Row, Target, Turns
from loadgen.control import fleet_body
from loadgen.crew import Crew
from loadgen.engines import EXACT, FACTS, Dialect, Measure, Prompts
from loadgen.policy import Dispatch
from loadgen.ports import Door, loopback
from loadgen.stream import printable
from traces.errors import EndpointError, InputError, SteelyardError, StoreError
from traces.records import ERRORS, STATUSES, Feed, Floats, Ints, Observations, Schedule

logging.getLogger("locust").addHandler(logging.NullHandler())
logging.getLogger("locust").propagate = False

FLUSH_S = 0.25
"""How often a worker sends finished rows to the master; the last ones go at once."""

START_AHEAD_S = 0.5
"""The agreed start lies this far ahead of the message that agrees on it."""

READY_TIMEOUT_S = 60.0
ELSEWHERE_S = 600.0
"""Workers of other machines have so long to join: an image is pulled, and Kubernetes may put a restart off for five minutes."""

SLACK_S = 30.0
"""A run may take so much longer than its requests can."""

STOP_S = 5.0
"""Workers that were told to stop have so long, beside the drain, to say that they did."""

LAST_WORDS_S = 0.3
"""Messages of a worker that died come at most so far apart."""

HEARTBEATS = 5
"""That Locust waits for, one a second: it takes a worker for dead six to seven seconds after the last one, so five at least after
the worker stood still. One that woke within FROZEN_S goes on sending: until then its master must listen."""

MASTER_SILENCE_S = 60.0
"""A worker that hears nothing of its master for this long ends."""

BLOCK = 50_000
"""Requests a message when a shard is sent."""

MOST_FACTS = 4000
"""Characters of a request's facts."""

LOOK_S = 1.0
"""A worker that waits for its master looks for it so often, and gives a connection as long to greet."""

JOIN_S = 10.0
"""A worker leaves a master that has not proved by then that it knows the secret."""

MOST_GREETINGS = 1000
"""That are not answered yet; of more the oldest is forgotten, so strangers cannot fill the memory."""

LOOKAHEAD_S = 30.0
"""Of a feed, requests are with their workers at least this long before they are due."""

READ_S = 20.0
"""A piece of a feed that is to be sent and has not been read is given up after this long: before its requests are due."""

_NUMBERS = (
    ("position", np.dtype(np.int64)),
    ("dispatch", np.dtype(np.float64)),
    ("sent", np.dtype(np.float64)),
    ("first_byte", np.dtype(np.float64)),
    ("first_token", np.dtype(np.float64)),
    ("last_token", np.dtype(np.float64)),
    ("prompt_tokens", np.dtype(np.int64)),
    ("output_tokens", np.dtype(np.int64)),
    ("chunks", np.dtype(np.int64)),
    ("max_gap", np.dtype(np.float64)),
    ("http_status", np.dtype(np.int64)),
)


@dataclass(frozen=True, slots=True)
class Job:
    """What every worker needs to know of a run besides its shard. ``where`` holds credentials: never stored.

    dispatch: the client's own order instead of the due times; one worker keeps it, since it has to see answers end.
    prefixes: prompts begin with the schedule's blocks, so that what was shared in the trace is shared again.
    causal: a request with a parent waits for its answer and the think time; without, every turn has its recorded time.
    """

    where: Target
    dialect: Dialect
    model: str
    salt: int
    timeout_s: float = TIMEOUT_S
    dispatch: Dispatch | None = None
    prefixes: bool = False
    causal: bool = False
    others: tuple[Target, ...] = ()
    """Base URLs beside ``where``; requests go to each in turn."""
    measure: Measure = EXACT
    words: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run went. reason: "" when every worker finished its shard. zero: schedule zero on this machine's monotonic
    clock. costs: per worker, CPU seconds and longest stall of its loop, in seconds; of one elsewhere also by how much its clock
    and the master's drifted apart during the run. interrupted: by Ctrl-C. unread: requests of a feed that was stopped before they
    were read from it; they have no rows."""

    zero: float
    started_unix_s: float
    rows: int
    reason: str = ""
    interrupted: bool = False
    costs: dict[int, dict[str, float]] = field(default_factory=dict)
    unread: int = 0


# --- rows as bytes ---------------------------------------------------------------------------------------------------


def pack(rows: list[Row]) -> dict[str, Any]:
    """Rows as columns of bytes for a message."""
    message: dict[str, Any] = {
        name: np.array([getattr(r, name) for r in rows], dtype=kind).tobytes() for name, kind in _NUMBERS
    }
    message["status"] = bytes(STATUSES.index(r.status) for r in rows)
    message["error"] = bytes(ERRORS.index(r.error) + 1 if r.error else 0 for r in rows)
    message["detail"] = {str(i): r.detail for i, r in enumerate(rows) if r.detail}
    message["facts"] = {str(i): facts for i, r in enumerate(rows) if r.facts and (facts := _plain(r.facts))}
    return message


def _plain(facts: Mapping[str, Any]) -> str:
    """Facts as JSON; "" for what JSON cannot hold, or what is too long to be a fact."""
    try:
        text = json.dumps(facts, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return ""
    return text if len(text) <= MOST_FACTS else ""


def _facts(told: Mapping[str, str], n: int) -> dict[str, Any]:
    """Columns of observations from facts by position: those that have a name of ours, the rest as JSON."""
    held: dict[str, Any] = {
        name: np.full(n, np.nan) if name.endswith("_s") else np.full(n, "", dtype=object) for name in (*FACTS, "facts")
    } | {"cached_tokens": np.full(n, -1, dtype=np.int64)}
    for i, text in told.items():
        facts = json.loads(text)
        for name in FACTS:
            value = facts.pop(name, None)
            if name.endswith("_worker"):
                held[name][int(i)] = printable(str(value)) if value is not None else ""
            elif isinstance(value, (int, float)) and abs(value) < 2**31:  # what the columns hold, and no NaN
                held[name][int(i)] = value
        held["facts"][int(i)] = json.dumps(facts, separators=(",", ":")) if facts else ""
    return held


class Pieces:
    """What was sent to workers and is not all heard of: pieces of a schedule, by the positions that they hold.

    The next piece is read ahead, by a thread that nobody joins: a database that was stopped says nothing for minutes.
    """

    def __init__(self, source: Schedule | Feed) -> None:
        whole = isinstance(source, Schedule)
        self._source = iter([source]) if isinstance(source, Schedule) else source.pieces()
        self._name, self._scheduled = source.name, len(source)
        self._held: dict[int, Schedule] = {}
        self._left: dict[int, int] = {}
        self._starts: list[int] = []
        self.end = 0
        """So many requests were taken."""
        self._keep = whole
        self.more = True
        self._last_s = 0.0
        self._fetch()

    def _fetch(self) -> None:
        self._ahead: Future[Schedule | None] = Future()
        self._asked_s = math.inf
        threading.Thread(target=self._read, args=(self._ahead,), name="steelyard-feed", daemon=True).start()

    def _read(self, ahead: Future[Schedule | None]) -> None:
        try:
            ahead.set_result(next(self._source, None))
        except BaseException as error:
            ahead.set_exception(error)

    def _next(self) -> Schedule:
        """The next piece, once it is read."""
        piece = self._ahead.result()
        if piece is None:
            raise StoreError(
                f"{self._name!r}: only {self.end} of its {self._scheduled} requests could be read. Start anew."
            )
        return piece

    @property
    def next_due_s(self) -> float:
        """When the next piece begins, once it is read; 0.0 without one."""
        return float(due[0]) if self.more and len(due := self._next().due_s) else 0.0

    def due(self, until_s: float) -> bool:
        """Is there a next piece that begins before ``until_s``, which moves on with the time? Waits for nothing; StoreError
        when it has not been read READ_S after it was first wanted."""
        if not self.more:
            return False
        if self._ahead.done():
            return self.next_due_s < until_s
        if until_s > self._last_s:  # it begins where the one before ended
            self._asked_s = min(self._asked_s, until_s)
            if until_s - self._asked_s > READ_S:
                raise StoreError(
                    f"{self._name!r}: its requests from number {self.end} on were not read in {READ_S:g} s. "
                    "Check that the database answers, then start anew."
                )
        return False

    def take(self) -> tuple[int, Schedule]:
        """(position of its first request, the next piece), held from now on; waits until it is read."""
        piece, start = self._next(), self.end
        self._held[start], self._left[start] = piece, len(piece)
        self._starts.append(start)
        self.end += len(piece)
        self.more = self.end < self._scheduled
        if len(piece):
            self._last_s = float(piece.due_s[-1])
        if self.more:
            self._fetch()
        return start, piece

    def at(self, positions: Ints) -> tuple[Ints, Floats, Ints, Ints]:
        """index, due_s, prompt_tokens, output_tokens of positions; undefined for those of a piece that was let go."""
        where = np.searchsorted(self._starts, positions, side="right") - 1
        n = len(positions)
        found = np.empty(n, np.int64), np.empty(n), np.empty(n, np.int64), np.empty(n, np.int64)
        for k in np.unique(where).tolist():
            start = self._starts[k]
            piece, mine = self._held.get(start), where == k
            if piece is None:
                continue  # rows that were heard of before: nobody looks at them
            at = positions[mine] - start
            for column, values in zip(
                found, (piece.index, piece.due_s, piece.prompt_tokens, piece.output_tokens), strict=True
            ):
                column[mine] = values[at]
        return found

    def heard(self, positions: Ints) -> None:
        """These have their rows: a piece of which nothing is missing is let go."""
        if self._keep:
            return
        where = np.searchsorted(self._starts, positions, side="right") - 1
        for k, n in zip(*np.unique(where, return_counts=True), strict=True):
            start = self._starts[k]
            self._left[start] -= int(n)
            if not self._left[start]:
                del self._held[start]

    def ended(self, positions: Ints, status: str, worker: int, detail: str) -> Observations:
        """Rows for requests of which nothing more will be heard."""
        index, due, prompt, output = self.at(positions)
        rows = Observations.empty(len(positions))
        rows.index[:], rows.due_s[:], rows.dispatch_s[:] = index, due, due
        rows.requested_prompt_tokens[:], rows.requested_tokens[:] = prompt, output
        rows.status[:], rows.detail[:], rows.worker[:] = status, detail, worker
        return rows


def unpack(
    message: dict[str, Any], schedule: Schedule | Pieces, worker: int, zero: float, *, causal: bool = False
) -> Observations:
    """Columns of bytes as observations of the schedule; times from the worker's ``zero``.

    causal: a turn that waited for an answer was due when that and the think time were over.
    """
    columns: dict[str, Any] = {name: np.frombuffer(message[name], dtype=kind) for name, kind in _NUMBERS}
    at = columns["position"]
    n = len(at)
    if isinstance(schedule, Pieces):
        index, due, prompt, output = schedule.at(at)
    else:
        index, due = schedule.index[at], schedule.due_s[at]
        prompt, output = schedule.prompt_tokens[at], schedule.output_tokens[at]
    status = np.array([STATUSES[code] for code in message["status"]], dtype=object)
    error = np.array([ERRORS[code - 1] if code else "" for code in message["error"]], dtype=object)
    detail = np.full(n, "", dtype=object)
    for i, words in message["detail"].items():
        detail[int(i)] = words
    dispatch = np.where(np.isnan(columns["dispatch"]), due, columns["dispatch"] - zero)
    return Observations.of(
        index,
        worker=np.full(n, worker, dtype=np.int64),
        due_s=dispatch if causal else due,
        dispatch_s=dispatch,
        sent_s=columns["sent"] - zero,
        first_byte_s=columns["first_byte"] - zero,
        first_token_s=columns["first_token"] - zero,
        last_token_s=columns["last_token"] - zero,
        requested_prompt_tokens=prompt,
        requested_tokens=output,
        prompt_tokens=columns["prompt_tokens"].astype(np.int64),
        output_tokens=columns["output_tokens"].astype(np.int64),
        chunks=columns["chunks"].astype(np.int64),
        max_gap_s=columns["max_gap"].astype(np.float64),
        http_status=columns["http_status"].astype(np.int64),
        status=status,
        error=error,
        detail=detail,
        **_facts(message.get("facts", {}), n),
    )


def shares(schedule: Schedule, workers: int) -> list[Ints]:
    """The positions of each worker's share: in turn, but a session's requests all to the worker that had fewest, and what
    continues an answer, a subagent's session too, to the worker that gets that answer."""
    n = len(schedule)
    if (schedule.session is None and schedule.parent is None) or workers == 1:
        return [np.arange(n)[k::workers] for k in range(workers)]
    held = [0] * workers
    of: dict[int, int] = {}
    chosen: list[int] = []
    sessions, parents = ([-1] * n if c is None else c.tolist() for c in (schedule.session, schedule.parent))
    sizes = Counter(sessions)
    for session, parent in zip(sessions, parents, strict=True):
        worker = chosen[parent] if parent >= 0 else of.get(session)
        if worker is None:
            worker = held.index(min(held))
        if session < 0:
            held[worker] += 1
        elif session not in of:
            of[session] = worker
            held[worker] += sizes[session]
        chosen.append(worker)
    home = np.array(chosen)
    return [np.flatnonzero(home == k) for k in range(workers)]


def ended(schedule: Schedule, positions: Any, status: str, worker: int, detail: str) -> Observations:
    """Rows for requests of which nothing more will be heard."""
    rows = Observations.unsent(schedule.take(np.asarray(positions)))
    rows.status[:] = status
    rows.detail[:] = detail
    rows.worker[:] = worker
    return rows


# --- the master ------------------------------------------------------------------------------------------------------


def _boot() -> str:
    """What two processes share if, and only if, they read the same monotonic clock."""
    try:
        clocks = os.readlink("/proc/self/ns/time")
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + clocks
    except OSError:
        return socket.gethostname()


@dataclass
class _Worker:
    """What the master knows of one worker."""

    client_id: str
    index: int
    pid: int
    same_clock: bool
    process: subprocess.Popen[bytes] | None = None
    key: bytes = b""
    """Seals what it is told of the endpoint."""

    offset: float = 0.0
    round_trip: float = float("inf")
    gone: str = ""


class Swarm:
    """A Locust master and its workers; a context manager, used for any number of runs, one at a time.

    workers: how many processes to start on this machine (0: none). expect: how many workers must have joined before
    a run starts, if some come from other machines (``steelyard worker --master HOST:PORT``). bind: HOST or HOST:PORT
    for the master; the default is loopback and a free port. web: where Locust's web UI is, with a tab of our own. crew: the
    processes, where they were begun before; else they begin now. Inside it workers are still joining: :meth:`join` waits for
    them, and so does whoever asks for ``workers``, ``processes`` or a run.
    """

    def __init__(
        self,
        workers: int = 2,
        *,
        expect: int | None = None,
        bind: str = "127.0.0.1",
        web: Door | None = None,
        crew: Crew | None = None,
    ) -> None:
        if workers < 0 or (workers == 0 and not expect):
            raise InputError(f"a swarm needs at least one worker (got {workers}).")
        self._crew = crew or Crew(workers)
        self._begun = crew is not None
        self._local = workers
        self._expect = max(workers, expect or 0)
        host, _, port = bind.rpartition(":") if ":" in bind else (bind, "", "0")
        if not port.isdecimal() or not host:
            raise InputError(f"--bind takes HOST or HOST:PORT (got {bind!r}).")
        self._bind = host, int(port)
        known = secret.given()
        if known is None and not (loopback(host) and self._expect == self._local):
            raise InputError(
                f"--bind {host}: workers that this command does not start itself must prove who they are, since Locust's "
                "protocol asks nobody for a name and the endpoint's key goes to whoever joins. Set the same "
                f"{secret.SECRET} here and where they start (openssl rand -hex 32)."
            )
        self._secret = known or os.urandom(32).hex().encode()  # our own children are told it by their environment
        self._greeted: dict[str, tuple[dict[str, Any], bytes]] = {}
        self._web = web
        if web is not None:
            web.check("--web", "other machines could stop this run", "Set STEELYARD_WEB_TOKEN or --web-token-file")
            web.context()  # what is wrong with it is better said now
        self.watched: Callable[[], list[dict[str, str]]] = list
        """Gives the rows of the web UI's tab."""
        self._inbox: queue.SimpleQueue[tuple[str, str, Any, float]] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[tuple[str, Any, str] | None] = queue.SimpleQueue()
        self._workers: dict[str, _Worker] = {}
        self._thread: threading.Thread | None = None
        self._wake: Any = None
        self._boot = _boot()
        self.environment: Environment | None = None
        self._joined = False
        self._stop_asked = threading.Event()
        """In the web UI; set until a run drains for it, or does not begin."""
        self.port = 0
        self.on_listen: Callable[[str], None] = lambda address: None

    # --- life

    def __enter__(self) -> Self:
        started: Future[int] = Future()
        if not self._begun:
            self._crew.__enter__()
        try:
            self._thread = threading.Thread(target=self._master, args=(started,), name="locust-master", daemon=True)
            self._thread.start()
            self.port = started.result(30)
            self.on_listen(self.address)
            self._crew.join(f"{self._bind[0]}:{self.port}", self._secret.decode())
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def workers(self) -> int:
        """Workers that are alive."""
        self.join()
        return self._alive

    @property
    def address(self) -> str:
        """HOST:PORT that workers join; a master that listens at every address of its machine goes by the machine's name."""
        host = socket.gethostname() if self._bind[0] in ("0.0.0.0", "[::]", "::", "*") else self._bind[0]  # noqa: S104
        return f"{host}:{self.port}"

    @property
    def web(self) -> str:
        """The address of the web UI's own tab."""
        assert self._web is not None  # noqa: S101 - asked for
        return f"{self._web.url()}/?tab=steelyard"

    @property
    def processes(self) -> dict[int, int]:
        """Worker index -> process id, for the workers that are alive."""
        self.join()
        return {w.index: w.pid for w in self._workers.values() if not w.gone}

    def statistics(self) -> dict[str, Any]:
        """Locust's own figures of the run so far: requests, failures, median response time in ms."""
        assert self.environment is not None  # noqa: S101 - entered
        total = self.environment.stats.total
        return {
            "requests": total.num_requests,
            "failures": total.num_failures,
            "median_ms": total.median_response_time,
            "names": sorted(name for name, _ in self.environment.stats.entries),
        }

    def close(self) -> None:
        """Stop workers and master; every wait is bounded."""
        if self._thread is not None and self._thread.is_alive():
            self._send("steelyard.quit", {})
            self._outbox.put(None)
            self._ring()
        self._crew.close(3.0)
        if self._thread is not None:
            self._thread.join(5)
            self._thread = None

    @property
    def _alive(self) -> int:
        return sum(not w.gone for w in self._workers.values())

    def join(self) -> None:
        """Wait until the workers have said hello and their clocks are known. SteelyardError if they do not come; once they have,
        this does nothing. KeyboardInterrupt when the web UI's Stop was asked for, between two runs too."""
        self._heed()
        if self._joined:
            return
        patience_s = ELSEWHERE_S if self._expect > self._local else READY_TIMEOUT_S
        until = time.monotonic() + patience_s
        while self._alive < self._expect:
            for process in self._crew.processes.values():
                if process.poll() is not None and not any(w.pid == process.pid for w in self._workers.values()):
                    raise SteelyardError(
                        f"a load worker ended with code {process.returncode} before it joined. "
                        "Run python -m loadgen.worker --master 127.0.0.1:1 to see why."
                    )
            if time.monotonic() > until:
                raise SteelyardError(
                    f"{self._alive} of {self._expect} load workers joined {self.address} within {patience_s:g} s. "
                    f"Start them with: steelyard worker --master {self.address}"
                )
            self._next(0.2)
            self._heed()
        for worker in list(self._workers.values()):  # one more than was waited for may come while clocks are measured
            if not worker.same_clock:
                self._measure(worker)
        self._joined = True

    def _heed(self) -> None:
        """Where nothing is sent that could drain, the web UI's Stop is Ctrl-C."""
        if self._stop_asked.is_set():
            self._stop_asked.clear()
            raise KeyboardInterrupt

    def _measure(self, worker: _Worker) -> None:
        """The offset of a worker's clock, from the fastest of some round trips (half of it is the error at most)."""
        worker.round_trip = float("inf")
        for _ in range(20):
            self._send("steelyard.ping", {"at": time.monotonic()}, worker.client_id)
            until = time.monotonic() + 0.25
            while time.monotonic() < until:
                found = self._next(0.05)
                if found is not None and found[0] == "pong" and found[1] == worker.client_id:
                    break

    # --- the master's thread

    def _master(self, started: Future[int]) -> None:
        """Hub, master runner and message pump; lives until ``close``."""
        locust.runners.HEARTBEAT_LIVENESS = HEARTBEATS
        try:
            self.environment = _environment()
            runner = self.environment.create_master_runner(*self._bind)
            runner.master_bind_port = runner.server.port
            if self._web is not None:
                self._open_web(runner)
        except SteelyardError as error:  # the web UI's
            started.set_exception(error)
            return
        except (SystemExit, Exception) as error:
            started.set_exception(
                SteelyardError(f"the Locust master cannot listen on {self._bind[0]}:{self._bind[1]} ({error}).")
            )
            return

        def forward(kind: str) -> Callable[..., None]:
            def listener(environment: Any, msg: Any) -> None:
                self._inbox.put((kind, msg.node_id, msg.data, time.monotonic()))

            return listener

        def hello(environment: Any, msg: Any) -> None:
            self._challenge(msg.node_id, msg.data)  # at once: a worker does not wait for long, whoever has us may

        runner.register_message("steelyard.hello", hello)
        for kind in ("proof", "pong", "ready", "failed", "rows", "finished"):
            runner.register_message(f"steelyard.{kind}", forward(kind))
        hub = gevent.get_hub()
        self._wake = hub.loop.async_()
        bell = gevent.event.Event()
        self._wake.start(bell.set)
        started.set_result(int(runner.server.port))
        try:
            while True:
                bell.wait(1.0)
                bell.clear()
                for client in list(runner.clients.values()):
                    if client.state == "missing" and client.id in self._workers:
                        self._inbox.put(("missing", client.id, None, time.monotonic()))
                while not self._outbox.empty():
                    item = self._outbox.get()
                    if item is None:
                        return
                    kind, data, client_id = item
                    if kind == "statistics":
                        self.environment.stats.clear_all()
                    elif not client_id or client_id in runner.clients:
                        runner.send_message(kind, data, client_id or None)
        finally:
            self._wake.stop()
            if (ui := self.environment.web_ui) is not None:
                ui.stop()  # type: ignore[no-untyped-call]
            with contextlib.suppress(Exception):
                runner.greenlet.kill(block=True, timeout=2)
                runner.server.close(200)  # type: ignore[no-untyped-call]
            self._wake = None

    def _open_web(self, runner: Any) -> None:
        """Locust's web UI on our environment: its statistics, and a tab with what :attr:`watched` says. Stop is Ctrl-C."""
        from flask import jsonify, redirect, request

        door = self._web
        assert self.environment is not None  # noqa: S101 - made before
        assert door is not None  # noqa: S101 - asked for
        listening = door.bind()  # now: whoever is told the address may ask at once, before the hub comes to it
        listening.listen()
        listening.setblocking(False)
        door = self._web = replace(door, port=listening.getsockname()[1])
        with _no_arguments():
            ui = self.environment.create_web_ui(door.host, door.port, delayed_start=True)
        update = ui.update_template_args

        def quietly() -> None:
            with _no_arguments():
                update()  # type: ignore[no-untyped-call]

        ui.update_template_args = quietly  # type: ignore[method-assign]
        ui.template_args |= {
            "extended_tabs": [{"title": "steelyard", "key": "steelyard"}],
            "extended_tables": [
                {"key": "steelyard", "structure": [{"key": "name", "title": ""}, {"key": "value", "title": "now"}]}
            ],
        }

        def guard() -> Any:
            if strange := door.foreign(dict(request.headers)):
                return strange[1], strange[0]
            asked = request.args.get("token")
            if door.token is not None and asked is not None and door.knows(asked):
                moved = redirect("/" + request.path.lstrip("/"))  # not to //another.host
                value = door.cookie("web")
                moved.set_cookie("steelyard-web", value, httponly=True, samesite="Strict", secure=bool(door.cert))
                return moved
            given = door.bearer(request.headers.get("Authorization", ""))
            if not given and not door.stands(request.cookies.get("steelyard-web", ""), "web"):
                return "a token is needed: open this address with ?token=.. once", 401
            if request.path == "/stop":
                if not given and not door.own_page(dict(request.headers)):
                    return "not from another page: press Stop on this one, or ask with the token as bearer", 403
                self._stop_asked.set()
                return jsonify({"success": True, "message": "draining, then the run ends"})
            if request.method != "GET" or request.path.startswith("/stats/reset"):
                return jsonify({"success": False, "message": "start another run with steelyard replay"})
            return None

        def extend(response: Any) -> Any:
            if request.path == "/stats/requests" and response.status_code == 200:
                held = dict(response.get_json())
                held["extended_stats"] = [{"key": "steelyard", "data": self.watched()}]
                response.set_data(json.dumps(held))
            response.headers["Content-Security-Policy"] = (
                "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:"
            )
            return response

        app: Any = ui.app
        app.before_request(guard)
        app.after_request(extend)

        # As Locust does, but with a certificate's key that is not in a file of its own, and no old TLS.
        tls = door.context(gevent.ssl.SSLContext)
        how = {"ssl_context": tls} if tls is not None else {}
        # By its name gevent would ask a resolver, which may take half a minute where there is none.
        named = {"SERVER_NAME": door.host}
        ui.server = _Web(listening, app, log=None, error_log=None, environ=named, **how)
        ui.server.start()
        runner.update_state("running")
        # Of a test that runs Locust makes a new start when it gives a missing worker up. Here are no users to start: it would
        # raise, and that be the end of its watch over all other workers' heartbeats.
        runner.start = lambda *_, **__: None

    def _send(self, kind: str, data: Any, client_id: str = "") -> None:
        self._outbox.put((kind, data, client_id))
        self._ring()

    def _ring(self) -> None:
        wake = self._wake
        if wake is not None:
            wake.send()

    # --- the caller's thread

    def _next(self, timeout_s: float) -> tuple[str, str, Any] | None:
        """The next message; greetings, clocks and deaths are noted on the way."""
        try:
            kind, client_id, data, at = self._inbox.get(timeout=timeout_s)
        except queue.Empty:
            kind, client_id, data, at = "", "", None, 0.0
        if kind == "proof" and client_id not in self._workers:
            self._admit(client_id, data)
        worker = self._workers.get(client_id)
        if worker is not None:
            if kind == "pong":
                trip = at - data["at"]
                if trip < worker.round_trip:
                    worker.round_trip = trip
                    worker.offset = data["mine"] - (data["at"] + at) / 2
            elif kind == "missing" and not worker.gone:
                worker.gone = "sent no heartbeat"
        for known in self._workers.values():
            if not known.gone and known.process is not None and known.process.poll() is not None:
                code = known.process.returncode
                known.gone = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        return (kind, client_id, data) if kind else None

    def _challenge(self, client_id: str, data: Any) -> None:
        """Answer a greeting with our proof, in the hub; who it is we know when its own has come."""
        if client_id in self._workers or not _greeting(data):
            return
        nonce = os.urandom(secret.NONCE_BYTES)
        for oldest in list(self._greeted)[: max(0, len(self._greeted) - MOST_GREETINGS + 1)]:
            self._greeted.pop(oldest, None)
        self._greeted[client_id] = data, nonce
        said = secret.proof(self._secret, "master", data["nonce"], nonce)
        self._send("steelyard.challenge", {"nonce": nonce, "proof": said}, client_id)

    def _admit(self, client_id: str, data: Any) -> None:
        """Take a worker that proved that it knows the secret; strangers only where workers from elsewhere are expected."""
        hello, nonce = self._greeted.pop(client_id, ({}, b""))
        if not hello or not isinstance(data, dict):
            return
        ours = hello["pid"] in self._crew.processes
        proved = secret.known(self._secret, "worker", hello["nonce"], nonce, data.get("proof"))
        if not proved or not (ours or self._expect > self._local):
            return
        self._workers[client_id] = _Worker(
            client_id, len(self._workers), hello["pid"], hello["boot"] == self._boot, self._crew.processes.get(hello["pid"]),
            secret.session(self._secret, hello["nonce"], nonce),
        )  # fmt: skip

    def run(
        self,
        schedule: Schedule | Feed,
        job: Job,
        *,
        on_start: Callable[[float, float], None] = lambda zero, unix: None,
        on_rows: Callable[[Observations], None],
        drain_s: float = 5.0,
        start_ahead_s: float = START_AHEAD_S,
        deadline_s: float | None = None,
    ) -> Outcome:
        """Replay a schedule; ``on_rows`` gets every row exactly once, in this thread, as batches arrive. A feed is read and
        sent to the workers LOOKAHEAD_S before its requests are due.

        on_start(zero, unix): schedule zero on the monotonic clock and on the wall, once agreed. Ctrl-C stops sending,
        waits ``drain_s`` for answers in flight, and returns with ``interrupted``; a second one raises KeyboardInterrupt between
        two batches. deadline_s: longest time that the run may take after the last due time; default the request timeout plus
        30 s. What a callback raises ends the run, and the workers send no more of it: the next one is its own. Whatever ends it,
        rows of what was under way are handed on first, for STOP_S at most.
        """
        self.join()
        while self._next(0.0) is not None:
            pass  # what an interrupted run left behind
        crew = [w for w in self._workers.values() if not w.gone]
        if not crew:
            raise SteelyardError("no load worker is left. Start again.")
        for worker in crew:
            if not worker.same_clock:
                self._measure(worker)  # quartz drifts: 20 ppm are 72 ms an hour
        n = len(schedule)
        token = random.getrandbits(48)
        pieces = Pieces(schedule)
        mine: dict[str, list[Ints]] = {w.client_id: [] for w in crew}
        if job.dispatch is not None:
            rows = [i for batch, _ in job.dispatch.batches for i in batch]
            if sorted(rows) != list(range(n)):
                raise ValueError("the batches must hold every request once")
        waiting = {w.client_id for w in crew}
        missing = np.ones(n, dtype=np.bool_)
        costs: dict[int, dict[str, float]] = {}
        reasons: list[str] = []
        self._send("statistics", None)
        for worker in crew:
            self._send_job(worker, schedule, job, token)

        def senders() -> list[_Worker]:
            return [w for w in crew if not w.gone and w.client_id in waiting]  # who stopped sends no more

        def send(start: int, piece: Schedule) -> None:
            living = senders()
            for k, (worker, share) in enumerate(zip(living, shares(piece, len(living)), strict=True)):
                if job.dispatch is not None:
                    share = np.array(rows if k == 0 else [], dtype=np.int64)
                mine[worker.client_id].append(start + share)
                self._send_shard(worker, start, share, piece, job, token, last=not pieces.more)

        while pieces.more and pieces.next_due_s < LOOKAHEAD_S:
            send(*pieces.take())
        for worker in crew:
            self._send("steelyard.prepare", {"run": token, "more": pieces.more}, worker.client_id)
        ready: set[str] = set()
        until = time.monotonic() + READY_TIMEOUT_S
        while {w.client_id for w in crew if not w.gone} - ready:
            kind, client_id, data = self._next(0.1) or ("", "", None)
            self._heed()
            if client_id in self._workers and isinstance(data, dict) and data.get("run") == token:
                if kind == "failed":
                    where = f"load worker {self._workers[client_id].index} on {data['host']}"
                    raise SteelyardError(f"{where} cannot start: {data['why']}")
                if kind == "ready":
                    ready.add(client_id)
            if time.monotonic() > until:
                raise SteelyardError(f"{len(ready)} of {len(crew)} load workers were ready in {READY_TIMEOUT_S:g} s.")
        last_due = schedule.last_due_s
        longest = job.timeout_s + SLACK_S
        if job.causal and isinstance(schedule, Schedule) and schedule.parent is not None:
            # A session may take as long as its answers do: the deepest one, each turn at its limit.
            longest += job.timeout_s * _depth(schedule.parent)
        if job.dispatch is not None:
            last_due = max(last_due, job.dispatch.start_s)
            slots = job.dispatch.in_flight or n
            longest += job.timeout_s * sum(math.ceil(len(batch) / slots) for batch, _ in job.dispatch.batches)
        zero = time.monotonic() + start_ahead_s
        unix = time.time() + start_ahead_s
        until = zero + last_due + (deadline_s if deadline_s is not None else longest)
        interrupted = overdue = False

        def accept(found: tuple[str, str, Any]) -> None:
            self._accept(found, token, pieces, zero, job.causal, missing, waiting, costs, on_rows)

        def last_words() -> None:
            """Told to stop, the workers say what became of theirs. A third Ctrl-C does not wait for it."""
            end = time.monotonic() + STOP_S
            while senders() and len(stops) < 3 and time.monotonic() < end:
                found = self._next(0.1)
                with contextlib.suppress(Exception):  # a callback's, which ended the run before
                    if found is not None:
                        accept(found)

        with _noted() as stops, self._halting(token, waiting, last_words):
            for worker in crew:
                if not worker.gone:
                    at = zero if worker.same_clock else zero + worker.offset
                    self._send("steelyard.go", {"run": token, "zero": at}, worker.client_id)
            on_start(zero, unix)

            def hear(seconds: float) -> tuple[str, str, Any] | None:
                """The next message, if one comes in time. Between two of them a second Ctrl-C ends the run."""
                if self._stop_asked.is_set():
                    self._stop_asked.clear()
                    if not stops:
                        stops.append(0)
                if len(stops) > 1:
                    raise KeyboardInterrupt
                found = self._next(seconds)
                if found is not None:
                    accept(found)
                return found

            def stop(seconds: float) -> float:
                """Have the workers stop; returns until when they are awaited."""
                for client_id in waiting:
                    self._send("steelyard.stop", {"run": token, "drain_s": seconds}, client_id)
                return time.monotonic() + seconds + STOP_S

            while True:
                hear(0.1)
                near = time.monotonic() - zero + LOOKAHEAD_S
                while not (stops or overdue) and senders() and pieces.due(near):
                    send(*pieces.take())
                for worker in crew:
                    if worker.gone and worker.client_id in waiting:
                        waiting.discard(worker.client_id)
                        # Should it wake: its requests are lost, and must not go into whatever runs then.
                        self._send("steelyard.stop", {"run": token, "drain_s": 0.0}, worker.client_id)
                        # What it had sent before it died may still be in the inbox: rows come before the verdict. The living
                        # go on sending, so it is its own silence that counts.
                        quiet = time.monotonic() + LAST_WORDS_S
                        while (left_s := quiet - time.monotonic()) > 0:
                            late = hear(left_s)
                            if late is not None and late[1] == worker.client_id and late[0] != "missing":
                                quiet = time.monotonic() + LAST_WORDS_S
                        its = np.concatenate([np.empty(0, np.int64), *mine[worker.client_id]])
                        left = its[missing[its]]
                        why = f"worker {worker.index} {worker.gone}"
                        reasons.append(f"{why}, {len(left)} of its {len(its)} requests are lost")
                        if len(left):
                            missing[left] = False
                            on_rows(pieces.ended(left, "lost", worker.index, why))
                            pieces.heard(left)
                if not waiting:
                    break  # nobody is left to send what is still to be read
                if time.monotonic() > until:
                    if interrupted:
                        reasons.append("interrupted")
                    if interrupted or overdue:
                        break
                    overdue = True
                    reasons.append("the deadline passed")
                    until = stop(0.0)
                if stops and not interrupted:
                    interrupted = True
                    until = stop(drain_s)
            if interrupted and "interrupted" not in reasons:
                reasons.insert(0, "interrupted")
            # Stopped, or no worker left: what was never read of a feed is counted alone. Rows of millions to which nothing
            # happened would keep whoever pressed Ctrl-C waiting for minutes.
            unread = len(schedule) - pieces.end
            missing[pieces.end :] = False
            until = time.monotonic() + STOP_S  # a share that crossed with its worker's end comes back unsent
            while missing.any() and not (waiting or stops) and (left_s := until - time.monotonic()) > 0:
                hear(left_s)
            left = np.flatnonzero(missing)
            if len(left):
                on_rows(pieces.ended(left, "lost", -1, reasons[-1] if reasons else "no row came"))
                reasons.append(f"{len(left)} requests were not reported by their workers")
        for worker in crew:
            if not worker.same_clock and not worker.gone and worker.index in costs:
                before = worker.offset
                self._measure(worker)
                costs[worker.index]["clock_drift_s"] = worker.offset - before
        # In its last moment, too: the run may be whole, but whatever was to follow must not begin.
        interrupted = interrupted or bool(stops) or self._stop_asked.is_set()
        self._stop_asked.clear()
        return Outcome(zero, unix, n, "; ".join(reasons), interrupted, costs, unread)

    @contextlib.contextmanager
    def _halting(self, token: int, waiting: set[str], last_words: Callable[[], None]) -> Iterator[None]:
        """Whatever ends a run before its time, its workers send no more of it."""
        try:
            yield
        except BaseException:
            for client_id in waiting:
                self._send("steelyard.stop", {"run": token, "drain_s": 0.0}, client_id)
            last_words()
            raise

    def _send_job(self, worker: _Worker, schedule: Schedule | Feed, job: Job, token: int) -> None:
        held = schedule if isinstance(schedule, Schedule) else None
        longest = schedule.longest_prompt
        where = [asdict(one) | {"headers": dict(one.headers)} for one in (job.where, *job.others)]
        self._send(
            "steelyard.job",
            {
                "run": token,
                "where": secret.seal(worker.key, json.dumps(where).encode()),
                "dialect": asdict(job.dialect),
                "model": job.model,
                "salt": job.salt,
                "measure": [job.measure.offset, job.measure.per_unit],
                "words": list(job.words),
                "timeout_s": job.timeout_s,
                "block_tokens": held.block_tokens
                if job.prefixes and held is not None and held.blocks is not None
                else 0,
                "longest": longest,
                "causal": job.causal and held is not None and held.parent is not None,
                "gate": _gate(job.dispatch) if job.dispatch is not None else None,
            },
            worker.client_id,
        )

    def _send_shard(
        self, worker: _Worker, start: int, shard: Ints, schedule: Schedule, job: Job, token: int, *, last: bool
    ) -> None:
        """A worker's share (places in a piece that begins at position ``start``); last: of the whole schedule."""
        for first in range(0, max(1, len(shard)), BLOCK):
            part = shard[first : first + BLOCK]
            held = schedule.blocks[part] if job.prefixes and schedule.blocks is not None else ()
            parent, think = (schedule.parent, schedule.think_s) if job.causal else (None, None)
            self._send(
                "steelyard.shard",
                {
                    "run": token,
                    "last": last and first + BLOCK >= len(shard),
                    "position": (start + part).astype(np.int64).tobytes(),
                    "due": schedule.due_s[part].astype(np.float64).tobytes(),
                    "prompt": schedule.prompt_tokens[part].astype(np.int64).tobytes(),
                    "output": schedule.output_tokens[part].astype(np.int64).tobytes(),
                    "parent": b"" if parent is None else parent[part].astype(np.int64).tobytes(),
                    "think": b"" if think is None else think[part].astype(np.float64).tobytes(),
                    "counts": np.array([len(ids) for ids in held], dtype=np.int64).tobytes(),
                    "blocks": np.fromiter(itertools.chain.from_iterable(held), dtype=np.int64).tobytes(),
                },
                worker.client_id,
            )

    def _accept(
        self,
        found: tuple[str, str, Any],
        token: int,
        pieces: Pieces,
        zero: float,
        causal: bool,
        missing: Any,
        waiting: set[str],
        costs: dict[int, dict[str, float]],
        on_rows: Callable[[Observations], None],
    ) -> None:
        kind, client_id, data = found
        worker = self._workers.get(client_id)
        if worker is None or not isinstance(data, dict) or data.get("run") != token:
            return
        if kind == "rows":
            its_zero = zero if worker.same_clock else zero + worker.offset
            at = np.frombuffer(data["position"], dtype=np.int64)
            fresh = missing[at]
            if not fresh.any():
                return
            rows = unpack(data, pieces, worker.index, its_zero, causal=causal)
            missing[at] = False
            on_rows(rows if fresh.all() else rows.take(fresh))
            pieces.heard(at[fresh])
        elif kind == "finished":
            costs[worker.index] = data["cost"]
            waiting.discard(client_id)


def _depth(parent: Ints) -> int:
    """Turns of the longest chain of answers that wait for each other."""
    depth = [0] * len(parent)
    for k, before in enumerate(parent.tolist()):
        if before >= 0:
            depth[k] = depth[before] + 1
    return max(depth, default=0)


@contextlib.contextmanager
def _noted() -> Iterator[list[int]]:
    """A list that grows with the first Ctrl-C and the second, instead of an exception in the middle of a message: its rows would
    be counted and not stored. The second is raised by whoever looks at the list, or at the block's end; a third one at once.

    SIGTERM is the same: a pod that is taken away, or a batch system's end of time, drains and stores.
    """
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    if threading.current_thread() is not threading.main_thread() or None in before:
        yield came
        return

    def note(number: int, _frame: Any) -> None:
        came.append(number)
        if len(came) > 2:
            raise KeyboardInterrupt

    for number in numbers:
        signal.signal(number, note)
    try:
        yield came
        if len(came) > 1:
            raise KeyboardInterrupt
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@contextlib.contextmanager
def _no_arguments() -> Iterator[None]:
    """Locust's page reads the command line, for options that a locustfile added; ours is another program's."""
    held, sys.argv = sys.argv, sys.argv[:1]
    try:
        yield
    finally:
        sys.argv = held


def _gate(dispatch: Dispatch) -> dict[str, Any]:
    """The client's order as a message: requests a batch, and what to put in force before each."""
    fleets = [fleet for _, fleet in dispatch.batches]
    return {
        "sizes": [len(batch) for batch, _ in dispatch.batches],
        "fleets": [None if f is None else fleet_body(f).decode() for f in fleets],
        "start_s": dispatch.start_s,
        "in_flight": dispatch.in_flight,
    }


def _greeting(data: Any) -> bool:
    """Is that what a worker of ours says first? Anybody can send anything."""
    kinds = (("pid", int), ("boot", str), ("nonce", bytes))
    return isinstance(data, dict) and all(isinstance(data.get(name), kind) for name, kind in kinds)


def _target(held: dict[str, Any]) -> Target:
    """A Target from its message, in which a tuple has become a list."""
    return Target(**held | {"proxy": tuple(held["proxy"]) if held["proxy"] else None})


def _environment() -> Environment:
    """An environment of its own events: nothing of a Locust user's leaks in."""
    return Environment(events=Events(), reset_stats=False)  # type: ignore[no-untyped-call]


# --- the worker ------------------------------------------------------------------------------------------------------


class _Web(gevent.pywsgi.WSGIServer):  # type: ignore[misc]
    def wrap_socket_and_handle(self, client_socket: Any, address: Any) -> None:
        """Whoever does not speak TLS, or goes away while greeting, is no business of the terminal."""
        with contextlib.suppress(OSError):
            super().wrap_socket_and_handle(client_socket, address)


class _RequestError(Exception):
    """A failed request as Locust's statistics show it."""


def _await(master: str, host: str, port: int) -> None:
    """Until a master listens. It greets who connects; a mesh's sidecar takes connections for one that is not there yet."""
    while True:
        with contextlib.suppress(OSError):
            try:
                with socket.create_connection((host, port), LOOK_S) as one:
                    if one.recv(1) == b"\xff":  # the signature that begins ZMTP
                        return
            except (UnicodeError, OverflowError):
                raise InputError(f"--master takes HOST:PORT (got {master!r}).") from None
        time.sleep(LOOK_S)


def _end(number: int, _frame: Any) -> None:
    """What the default does, which process 1 of a container does not have."""
    os._exit(128 + number)


def work(master: str, parent: int = 0, *, wait: bool = False) -> int:
    """Be a load worker of ``master`` (HOST:PORT) until it says quit, goes silent or ``parent`` is gone.

    wait: for a master as long as it takes; without, Locust waits five minutes. Returns the exit code.
    """
    import resource

    host, _, port = master.rpartition(":")
    if not host or not port.isdecimal():
        raise InputError(f"--master takes HOST:PORT (got {master!r}).")
    with contextlib.suppress(ValueError, OSError):
        signal.signal(signal.SIGINT, signal.SIG_IGN if parent else _end)
        signal.signal(signal.SIGTERM, signal.SIG_DFL if parent else _end)
    known = secret.given()
    if known is None:
        raise InputError(
            f"a worker must know the secret of its master: set {secret.SECRET} to what the replay was started with."
        )
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if wait:
        _await(master, host.strip("[]"), int(port))
    sys.setswitchinterval(0.0005)  # the hub's statistics must not hold the client up for 5 ms
    # Locust measures its master's silence by the wall clock, which a time server may set forward by more than that.
    locust.runners.MASTER_HEARTBEAT_TIMEOUT = float("inf")  # type: ignore[assignment]
    environment = _environment()
    try:
        runner = environment.create_worker_runner(host, int(port))
    except ConnectionError:
        raise EndpointError(
            f"no Locust master answers at {master}. Start one: steelyard replay ... --bind HOST"
        ) from None
    worker = _WorkerSide(environment, runner, Engine(), known)
    for kind in ("challenge", "job", "shard", "prepare", "go", "stop", "ping", "quit"):
        runner.register_message(f"steelyard.{kind}", worker.trusting(kind))
    runner.send_message("steelyard.hello", {"pid": os.getpid(), "boot": _boot(), "nonce": worker.nonce})
    heard, since = None, time.monotonic()
    began = since
    while not worker.quitting:
        worker.flush()
        worker.bell.wait(FLUSH_S)
        worker.bell.clear()
        if runner.last_heartbeat_timestamp != heard:
            heard, since = runner.last_heartbeat_timestamp, time.monotonic()
        if time.monotonic() - since > MASTER_SILENCE_S:
            break
        if parent and os.getppid() != parent:
            break  # the master was killed
        if not runner.greenlet:
            break  # Locust gave its master up
        if worker.refused or (not worker.key and time.monotonic() - began > JOIN_S):
            print(
                f"steelyard: the master at {master} does not know our {secret.SECRET}: nothing was sent. Give both the same.",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)
    os._exit(0)


class _WorkerSide:
    """A worker's answers to the master's messages; all methods run in the hub."""

    def __init__(self, environment: Environment, runner: Any, engine: Engine, known: bytes) -> None:
        self._secret = known
        self.nonce = os.urandom(secret.NONCE_BYTES)
        self.key = b""
        """Of this greeting; empty until the master has proved that it knows the secret."""
        self.refused = False
        self.environment = environment
        self.runner = runner
        self.engine = engine
        self.quitting = False
        self.bell = gevent.event.Event()
        """Rings when there is something to say or do at once."""
        self._over = gevent.get_hub().loop.async_()
        self._over.start(self.bell.set)
        self.run_id = 0
        self._rows_of = 0
        """The run that went last, which the engine's rows are of: those too of a share that crossed with its end."""
        self.name = ""
        self._job: dict[str, Any] = {}
        self._blocks: list[dict[str, Any]] = []
        self._columns: tuple[list[int], list[float], list[int], list[int]] = ([], [], [], [])
        self._turns: Turns | None = None
        self._more = False
        self._running: Future[dict[str, float]] | None = None

    def trusting(self, kind: str) -> Callable[..., None]:
        """The answer to a kind of message; before the master has proved who it is only a challenge and quit are heard."""
        answer: Callable[..., None] = getattr(self, kind)

        def listener(environment: Any, msg: Any) -> None:
            if self.key or kind in ("challenge", "quit"):
                answer(environment, msg)

        return listener

    def challenge(self, environment: Any, msg: Any) -> None:
        data = msg.data if isinstance(msg.data, dict) else {}
        nonce = data.get("nonce")
        if self.key or not isinstance(nonce, bytes):
            return
        if not secret.known(self._secret, "master", self.nonce, nonce, data.get("proof")):
            self.refused = True
            return
        self.key = secret.session(self._secret, self.nonce, nonce)
        said = secret.proof(self._secret, "worker", self.nonce, nonce)
        self.runner.send_message("steelyard.proof", {"proof": said})

    def job(self, environment: Any, msg: Any) -> None:
        self._job, self._blocks, self.run_id = msg.data, [], msg.data["run"]
        self._running = None  # of a run that was broken off; nobody waits for its end

    def shard(self, environment: Any, msg: Any) -> None:
        if msg.data["run"] != self.run_id:
            return
        if self._rows_of != self.run_id:  # it has not gone yet
            self._blocks.append(msg.data)
            return
        kinds = {"position": np.int64, "due": np.float64, "prompt": np.int64, "output": np.int64}
        columns = [np.frombuffer(msg.data[name], dtype=kind).tolist() for name, kind in kinds.items()]
        self.engine.submit(self.engine.extend(*columns, msg.data["last"]))

    def prepare(self, environment: Any, msg: Any) -> None:
        if msg.data["run"] == self.run_id:
            self._more = msg.data["more"]
            gevent.spawn(self._prepare, self.run_id)

    def _prepare(self, run_id: int) -> None:
        """Say that this worker is ready, or why it cannot be: what is missing may be missing on this machine alone."""
        try:
            self._make_ready()
        except Exception as error:
            why = printable(str(error) if isinstance(error, SteelyardError) else repr(error))
            self.runner.send_message("steelyard.failed", {"run": run_id, "host": socket.gethostname(), "why": why})
        else:
            self.runner.send_message("steelyard.ready", {"run": run_id})

    def _make_ready(self) -> None:
        job, blocks = self._job, self._blocks
        self.environment.stats.clear_all()

        def column(name: str, kind: Any) -> list[Any]:
            parts = [np.frombuffer(b[name], dtype=kind) for b in blocks]
            return np.concatenate(parts).tolist() if parts else []

        self._columns = (
            column("position", np.int64),
            column("due", np.float64),
            column("prompt", np.int64),
            column("output", np.int64),
        )
        self._turns = Turns(column("parent", np.int64), column("think", np.float64)) if job["causal"] else None
        shared: dict[int, list[int]] = {}
        if job["block_tokens"]:
            ids, counts = column("blocks", np.int64), column("counts", np.int64)
            ends = list(itertools.accumulate(counts))
            shared = {at: ids[end - n : end] for at, n, end in zip(self._columns[0], counts, ends, strict=True)}
        self._blocks = []
        dialect = Dialect(**job["dialect"])
        self.name = dialect.path
        measure = Measure(*job["measure"])
        prompts = Prompts(dialect, job["model"], job["longest"], job["salt"], measure, job["words"])
        prompts.share(shared, job["block_tokens"])
        # As many as are due in the first second: opening them costs more than sending on them.
        connections = min(4000, bisect.bisect_right(sorted(self._columns[1]), 1.0))
        if job.get("gate") and job["gate"]["in_flight"]:
            connections = min(connections, job["gate"]["in_flight"])
        wait = self.engine.submit(
            self.engine.prepare(
                [_target(one) for one in json.loads(secret.unseal(self.key, job["where"]))],
                dialect.path,
                prompts,
                timeout_s=job["timeout_s"],
                first=self._columns[0][:connections],
                # An engine of another package that this machine lacks: its requests are made all the same, without facts.
                engine=engines.engines().get(dialect.name),
            )
        )
        while not wait.done():
            gevent.sleep(0.005)
        wait.result()

    def go(self, environment: Any, msg: Any) -> None:
        if msg.data["run"] == self.run_id:
            self._rows_of = self.run_id
            gate = Gate(**self._job["gate"]) if self._job.get("gate") and self._columns[0] else None
            self._running = self.engine.submit(
                self.engine.run(*self._columns, msg.data["zero"], gate, self._turns, self._more)
            )
            self._running.add_done_callback(lambda _: self._over.send())  # in the client's thread
            self._columns = ([], [], [], [])

    def stop(self, environment: Any, msg: Any) -> None:
        if msg.data["run"] == self.run_id:
            self.engine.submit(self.engine.stop(msg.data["drain_s"]))

    def ping(self, environment: Any, msg: Any) -> None:
        self.runner.send_message("steelyard.pong", {"at": msg.data["at"], "mine": time.monotonic()})

    def quit(self, environment: Any, msg: Any) -> None:
        self.quitting = True
        self.bell.set()

    def flush(self) -> None:
        """Send finished rows up and show them to Locust."""
        # Read before the rows: what finished before this line is in them.
        running = self._running
        over = running is not None and running.done()
        source = self.engine.rows
        rows = [source.popleft() for _ in range(len(source))]
        if rows:
            self.runner.send_message("steelyard.rows", pack(rows) | {"run": self._rows_of})
            fire = self.environment.events.request.fire
            for i, row in enumerate(rows):
                if row.status == "unsent":
                    continue
                fire(  # type: ignore[no-untyped-call]
                    request_type="POST",
                    name=self.name,
                    response_time=(row.ended - row.sent) * 1e3,
                    response_length=row.body_bytes,
                    exception=None if row.status == "ok" else _RequestError(row.error or row.status),
                    context={},
                )
                if i % 16 == 15:
                    gevent.sleep(0)  # let heartbeats and the client through
        # A master that broke a run off may have begun another meanwhile.
        if over and running is not None and running is self._running:
            self._running = None
            error = running.exception()
            cost = {} if error else running.result()
            self.runner._send_stats()  # Locust's own last report, before we say that it is over
            self.runner.send_message("steelyard.finished", {"run": self._rows_of, "cost": cost})
