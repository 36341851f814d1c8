"""vllm-router with ``--vllm-discovery-address``: a worker has the role that its last registration says.

A registration is a ZMQ DEALER message, msgpack ``{"type": "P"|"D", "http_address", "zmq_address"}``, repeated: the router
drops a worker it has not heard for 5 s (vllm-router 0.1.17, seen running). So somebody has to go on beating for as long as the
fleet is to serve: :func:`beat`, a process of its own (``steelyard control keep``). A control only writes down the fleet that
it wants; the beating process reads that. When a sweep crashes, the workers therefore stay.

A worker registered in its other role takes it within a second and is asked in the old one for up to 5 s more; engines with
NIXL or a file connector have no role of their own, so nothing restarts.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadgen.client import unsaid
from loadgen.control import ROLES, Bounds, Connect, LostError, Standing, members
from loadgen.control.journal import Journal, folder, hold
from traces.errors import InputError
from traces.records import Fleet

BEAT_S = 1.0
ALIVE_S = 5 * BEAT_S
"""Who has not beaten for so long does so no more."""

LINGER_S = 5.5
"""The old role of a worker is forgotten within that: the router drops it 5 s after its last beat."""

JOIN_S = 1.0
"""The new role of a worker serves within that."""


@dataclass(frozen=True, slots=True)
class Worker:
    """An engine: http, HOST:PORT of its API; zmq, HOST:PORT that the connector uses (any, where it does not)."""

    http: str
    zmq: str


class VllmRouter:
    """See :class:`loadgen.control.Control`."""

    kind = "vllm-router"

    def __init__(self, discovery: str, workers: Sequence[Worker], path: str) -> None:
        if len(workers) < 2:
            raise InputError(f"{path}: at least two [[worker]] are needed, one a role.")
        self.discovery, self.workers = discovery, list(workers)
        self.name = f"vllm-router {discovery}"
        self.spec = path
        self.bounds = Bounds()

    @property
    def file(self) -> Path:
        """What the control and the beating process share."""
        return Journal(self.spec, self.name).path.with_suffix(".beat")

    def get(self) -> Standing:
        """See :class:`loadgen.control.Control`."""
        target, taken, since_s, moved = self._held()
        roles = assign(self.workers, taken)
        serving = {role: tuple(f"http://{w.http}" for w in self.workers if roles.get(w.http) == role) for role in ROLES}
        if taken != target or since_s < JOIN_S:
            return Standing(None, target, 1, serving)
        return Standing(taken, target, 1 if moved and since_s < LINGER_S else 0, serving)

    def steps(self, fleet: Fleet) -> list[str]:
        """See :class:`loadgen.control.Control`."""
        wanted = assign(self.workers, fleet)  # InputError when there are too few
        now = assign(self.workers, self._held()[0])
        return [
            f"register {unsaid(w.http)} as {wanted.get(w.http, 'nothing')} at {self.discovery} (now {now.get(w.http, 'nothing')})"
            for w in self.workers
            if wanted.get(w.http) != now.get(w.http)
        ]

    def ask(self, fleet: Fleet) -> None:
        """See :class:`loadgen.control.Control`."""
        assign(self.workers, fleet)
        self._held()
        with Journal(self.spec, self.name).writing():
            _write(self.file, {"target": str(fleet)})

    def _held(self) -> tuple[Fleet, Fleet, float, bool]:
        """(fleet wanted, fleet that is registered, for how many seconds, did a worker change). LostError when nobody beats."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            alive = self.file.with_suffix(".alive")
            said = json.loads(alive.read_text(encoding="utf-8"))
            wanted = json.loads(self.file.read_text(encoding="utf-8"))
            if time.time() - alive.stat().st_mtime < ALIVE_S:
                since_s = time.time() - float(said["since_unix_s"])
                return Fleet.parse(wanted["target"]), Fleet.parse(said["taken"]), since_s, bool(said["moved"])
        raise LostError(
            f"{self.name}: nobody registers its workers. Start: steelyard control keep --control {self.spec} --fleet P:D"
        )


def assign(workers: Sequence[Worker], fleet: Fleet) -> dict[str, str]:
    """http address -> role: the first P prefill, the last D decode, so that a shift by one moves one worker.

    InputError when there are too few workers.
    """
    if fleet.prefill + fleet.decode > len(workers) or fleet.mixed:
        raise InputError(
            f"the fleet {fleet} cannot be reached: there are {len(workers)} workers. Start more, or name them in the file."
        )
    first = {w.http: "prefill" for w in workers[: fleet.prefill]}
    return first | {w.http: "decode" for w in workers[len(workers) - fleet.decode :]}


def beat(
    control: VllmRouter, fleet: Fleet, stop: Callable[[], bool], say: Callable[[str], None] = lambda line: None
) -> None:
    """Register the workers again and again in the roles that are wanted, until stop().

    The router is told of a new fleet within a tenth of a second after it was asked for. Ctrl-C ends it: the router then
    drops the workers within 5 s. EndpointError when another process does so already: each would end the other's.
    """
    import msgpack
    import zmq

    assign(control.workers, fleet)
    # Two files, each with one writer: the control writes what is wanted, this process what it tells the router.
    alive = control.file.with_suffix(".alive")
    with Journal(control.spec, control.name).writing():
        folder().mkdir(parents=True, exist_ok=True)
        alone = hold(
            control.file.with_suffix(".keep"), "control keep", f"{control.name}: its workers are registered by"
        )
        _write(control.file, {"target": str(fleet)})
    context = zmq.Context()
    sockets = []
    try:
        for worker in control.workers:
            socket = context.socket(zmq.DEALER)
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.SNDHWM, 4)  # a router that is away must not get a burst of old roles when it is back
            socket.setsockopt(zmq.IDENTITY, worker.http.encode())
            socket.connect(f"tcp://{control.discovery}")
            sockets.append((worker, socket))
        roles: dict[str, str] = {}
        said: dict[str, Any] = {}
        last = -math.inf
        while not stop():
            with contextlib.suppress(OSError, ValueError, KeyError, InputError):
                target = json.loads(control.file.read_text(encoding="utf-8"))["target"]
                wanted = assign(control.workers, Fleet.parse(target))
                if target != said.get("taken"):
                    say(f"fleet {target}")
                    said = {"taken": target, "since_unix_s": time.time(), "moved": bool(roles) and wanted != roles}
                    roles, last = wanted, -math.inf
            if time.monotonic() - last >= BEAT_S:
                last = time.monotonic()
                for worker, socket in sockets:
                    if (role := roles.get(worker.http)) is not None:
                        message = {"type": role[0].upper(), "http_address": worker.http, "zmq_address": worker.zmq}
                        with contextlib.suppress(zmq.Again):
                            socket.send(msgpack.packb(message), zmq.NOBLOCK)
                with contextlib.suppress(OSError):  # a full disk hides the fleet from controls; the workers still serve
                    _write(alive, said)
            time.sleep(0.1)
    finally:
        for _, socket in sockets:
            socket.close()
        context.term()
        alive.unlink(missing_ok=True)
        control.file.unlink(missing_ok=True)
        alone.close()


def _write(path: Path, held: dict[str, Any]) -> None:
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(held), encoding="utf-8")
    part.replace(path)


def from_text(text: str, spec: str, connect: Connect) -> VllmRouter:
    """There is no short form: the workers have to be named."""
    raise InputError("vllm-router needs a TOML file that names discovery and the workers: see docs/control.md.")


def from_table(table: dict[str, Any], path: str, connect: Connect) -> VllmRouter:
    """``discovery``, ``[[worker]]`` with ``http`` and ``zmq``."""
    held = members(table, path, discovery=(str, ...), worker=(list, ...))
    workers = []
    for number, row in enumerate(held["worker"], 1):
        one = members(row, f"{path}: [[worker]] {number}", http=(str, ...), zmq=(str, ""))
        workers.append(
            Worker(one["http"].removeprefix("http://").rstrip("/"), one["zmq"] or one["http"].removeprefix("http://"))
        )
    return VllmRouter(held["discovery"].removeprefix("tcp://"), workers, path)
