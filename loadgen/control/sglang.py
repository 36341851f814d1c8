"""SGLang's router in PD mode: workers are registered and taken out by its worker API; engines may flip in place.

``POST /workers``, ``DELETE /workers/ID`` and ``GET /workers`` of the router (sglang-router 0.3.2, seen running). An engine
started with ``--enable-pd-role-switch`` changes its role by ``POST /pd_role_switch``; others keep the role they were started
with, so that a change only registers and deregisters them. A worker taken out finishes what it holds: its own metrics say when.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import quote

from loadgen.client import named_url, unsaid
from loadgen.control import ROLES, Bounds, Connect, Endpoint, LostError, Standing, Steps, members, refused
from loadgen.control.endpoint import RefusedError
from loadgen.control.journal import Journal
from loadgen.engines.base import without_rank
from traces.errors import EndpointError, InputError
from traces.records import Fleet

DRAIN_S = 300.0
"""How long a worker may take to finish what it holds."""

START_S = 60.0
"""How long the router may take to list a worker as healthy."""

BUSY = (
    "num_running_reqs",
    "num_queue_reqs",
    "num_prefill_bootstrap_queue_reqs",
    "num_prefill_prealloc_queue_reqs",
    "num_prefill_inflight_queue_reqs",
    "num_decode_prealloc_queue_reqs",
    "num_decode_transfer_queue_reqs",
)
"""Gauges that are all 0 on a worker that holds nothing."""


@dataclass(frozen=True, slots=True)
class Worker:
    """An engine of the pool. role: "prefill", "decode", or "any" for one that flips in place."""

    url: str
    role: str
    bootstrap_port: int | None = None

    @property
    def shown(self) -> str:
        """Its URL without anything secret."""
        return unsaid(self.url)


class SGLang:
    """See :class:`loadgen.control.Control`. pool: engines that may serve; empty: those the router has, with their roles."""

    kind = "sglang"

    def __init__(
        self, router: Endpoint, engine: Callable[[str], Endpoint], pool: Sequence[Worker] = (), drain_s: float = DRAIN_S
    ) -> None:
        self._router, self._engine, self._pool, self._drain_s = router, engine, list(pool), drain_s
        self._named = bool(pool)
        self.patience_s = drain_s + START_S
        self._target: Fleet | None = None
        self._steps = Steps()
        self.name = f"sglang-router {router.shown}"
        self.spec = f"sglang:{router.shown}"
        self.bounds = Bounds()

    # --- what is

    def get(self) -> Standing:
        """See :class:`loadgen.control.Control`."""
        left = self._steps.check()
        listed = self._listed()
        self._remember(listed)
        serving = {
            role: tuple(w["url"] for w in listed if w.get("worker_type") == role and w.get("is_healthy"))
            for role in ROLES
        }
        fleet = _fleet([len(serving[role]) for role in ROLES])
        # A worker that is ill is still one of the fleet that was asked for: the rule and the way back count it.
        target = self._target if left else _fleet([sum(w.get("worker_type") == r for w in listed) for r in ROLES])
        return Standing(fleet, target, left, serving)

    def _listed(self) -> list[dict[str, Any]]:
        """The engines that the router lists, with the ids of their data-parallel ranks: they come and go together."""
        reply = self._router.fetch("GET", "/workers")
        if reply.status // 100 != 2:
            raise refused(reply, f"{self._router.shown}/workers", "list its workers")
        held = reply.json()
        workers = held.get("workers") if isinstance(held, dict) else None
        if not isinstance(workers, list) or not all(
            isinstance(w, dict) and "url" in w and isinstance(w.get("worker_type"), str | None) for w in workers
        ):
            raise EndpointError(
                f"{self._router.shown}/workers: no list of workers came back. Is this sglang-router in PD mode?"
            )
        found: dict[tuple[str, Any], dict[str, Any]] = {}
        for w in workers:
            url = without_rank(str(w["url"]))
            one = found.setdefault((url, w.get("worker_type")), w | {"url": url, "ids": []})
            one["ids"].append(str(w.get("id") or w["url"]))
            one["is_healthy"] = bool(one.get("is_healthy") and w.get("is_healthy"))
        return list(found.values())

    def _remember(self, listed: Sequence[dict[str, Any]]) -> None:
        """Without a pool in a file, the pool is every worker that was ever seen, in the role it has: here, or by the command
        that noted the way back and may have taken it out."""
        known = {w.url for w in self._pool}
        kept = None if self._named else Journal(self.spec, self.name).kept()
        more = [w for w in kept if isinstance(w, dict) and "url" in w] if isinstance(kept, list) else []
        for w in [*listed, *more]:
            if w["url"] not in known and w.get("worker_type") in ROLES:
                known.add(w["url"])
                self._pool.append(Worker(str(w["url"]), str(w["worker_type"]), w.get("bootstrap_port")))

    # --- what to do

    def steps(self, fleet: Fleet) -> list[str]:
        """See :class:`loadgen.control.Control`."""
        return [said for said, _ in self._plan(fleet)]

    def ask(self, fleet: Fleet) -> None:
        """See :class:`loadgen.control.Control`."""
        plan = self._plan(fleet)
        if not self._named:  # what is taken out is listed no longer, and restore may be another process
            pool = [{"url": w.url, "worker_type": w.role, "bootstrap_port": w.bootstrap_port} for w in self._pool]
            Journal(self.spec, self.name).keep([w for w in pool if "@" not in str(w["url"])])  # no password on disk
        self._target = fleet
        self._steps.start([step for _, step in plan])

    def _plan(self, fleet: Fleet) -> list[tuple[str, Callable[[], None]]]:
        """(in words, the step) in order: new workers before old ones leave, so that no role is ever empty. One that cannot
        be added holds up no other that is new."""
        listed = self._listed()
        self._remember(listed)
        now = {str(w["url"]): str(w.get("worker_type")) for w in listed}
        wanted = self._choose(fleet, now, {str(w["url"]) for w in listed if not w.get("is_healthy")})
        add, flip, remove = [], [], []
        for worker in self._pool:
            has, gets = now.get(worker.url), wanted.get(worker.url)
            if has == gets:
                continue
            if has is None and gets is not None:
                add.append(self._add(worker, gets, switch=worker.role == "any"))
            elif has is not None and gets is None:
                remove.append(self._remove(worker, has))
            elif has is not None and gets is not None:
                flip += [self._remove(worker, has), self._add(worker, gets, switch=True)]
        return _all(add) + flip + remove

    def _choose(self, fleet: Fleet, now: dict[str, str], ill: Set[str]) -> dict[str, str]:
        """url -> role: those that have the role stay, then those that are free, those that flip, and those that are ill."""
        fixed = {role: [w.url for w in self._pool if w.role == role] for role in ROLES}
        free = [w.url for w in self._pool if w.role == "any"]
        need = {
            role: max(0, count - len(fixed[role]))
            for role, count in zip(ROLES, (fleet.prefill, fleet.decode), strict=True)
        }
        if sum(need.values()) > len(free) or fleet.mixed:
            raise InputError(
                f"{self.name}: the fleet {fleet} cannot be reached: there are {len(fixed['prefill'])} prefill and "
                f"{len(fixed['decode'])} decode workers and {len(free)} that change roles. Start more, or name them in the file."
            )
        wanted: dict[str, str] = {}
        for role, count in zip(ROLES, (fleet.prefill, fleet.decode), strict=True):
            urls = sorted(fixed[role], key=lambda u: (u in ill, now.get(u) != role))
            wanted |= dict.fromkeys(urls[:count], role)
        for role in ROLES:  # both, before one takes what the other would keep
            stay = [u for u in free if now.get(u) == role and u not in ill][: need[role]]
            wanted |= dict.fromkeys(stay, role)
            need[role] -= len(stay)
        for role in ROLES:
            left = [u for u in free if u not in wanted]
            left.sort(key=lambda u: (u in ill, now.get(u) != role, u in now))
            wanted |= dict.fromkeys(left[: need[role]], role)
        return wanted

    # --- the steps

    def _add(self, worker: Worker, role: str, *, switch: bool) -> tuple[str, Callable[[], None]]:
        body: dict[str, Any] = {"url": worker.url, "worker_type": role}
        if role == "prefill" and worker.bootstrap_port is not None:
            body["bootstrap_port"] = worker.bootstrap_port

        def step() -> None:
            if switch:
                self._switch(worker, role)
            reply = self._router.fetch("POST", "/workers", json.dumps(body).encode())
            if reply.status // 100 != 2:
                raise refused(reply, self._router.shown, f"add {worker.shown} as {role}")
            until = time.monotonic() + START_S
            while not any(
                w["url"] == worker.url and w.get("worker_type") == role and w.get("is_healthy") for w in self._listed()
            ):
                if time.monotonic() > until or self._steps.stopped:
                    raise LostError(
                        f"{worker.shown}: not healthy as {role} at the router within {START_S:g} s. Look at its log."
                    )
                time.sleep(0.05)

        flip = f"POST {worker.shown}/pd_role_switch to {role}, then " if switch else ""
        return f"{flip}POST {self._router.shown}/workers: add {worker.shown} as {role}", step

    def _switch(self, worker: Worker, role: str) -> None:
        engine = self._engine(worker.url)
        reply = engine.fetch("POST", "/pd_role_switch", json.dumps({"new_role": role}).encode(), self._drain_s)
        if reply.status == 404:
            raise LostError(
                f"{worker.shown}: it has no /pd_role_switch. Start the engine with --enable-pd-role-switch."
            )
        held = reply.json()
        if reply.status // 100 != 2 or (isinstance(held, dict) and held.get("success") is False):
            raise refused(reply, worker.shown, f"become a {role} worker")

    def _remove(self, worker: Worker, role: str) -> tuple[str, Callable[[], None]]:
        def step() -> None:
            known = [w for w in self._listed() if w["url"] == worker.url]
            ill = not all(w["is_healthy"] for w in known)
            for one in [one for w in known for one in w["ids"]]:
                reply = self._router.fetch("DELETE", f"/workers/{quote(one, safe='')}")  # its URL, if it has no id
                if reply.status // 100 != 2 and reply.status != 404:
                    raise refused(reply, self._router.shown, f"take {worker.shown} out")
            until = time.monotonic() + self._drain_s
            while True:
                gone = not any(w["url"] == worker.url for w in self._listed())
                held = self._held(worker) if gone else 1.0
                if gone and (held == 0 or (ill and math.isnan(held))):
                    return  # one that is ill and answers nothing serves nobody
                if self._steps.stopped:
                    return  # the change is given up: the way back does not wait for this drain
                if time.monotonic() > until:
                    what = f"it still holds {held:g} requests" if held >= 0 else "its /metrics do not answer"
                    what = what if gone else "the router still lists it"
                    raise LostError(
                        f"{worker.shown}: it does not drain: {what} {self._drain_s:g} s after it was "
                        "taken out of the router. Look at its log, or set drain_s higher."
                    )
                time.sleep(0.1)

        return f"DELETE {self._router.shown}/workers: take out {worker.shown} ({role}), wait until it is idle", step

    def _held(self, worker: Worker) -> float:
        """Requests that a worker still holds by its own metrics; 0 where it has none or is gone, NaN where they fail."""
        try:
            reply = self._engine(worker.url).fetch("GET", "/metrics", timeout_s=5.0)
        except RefusedError:
            return 0.0
        except EndpointError:
            return math.nan
        if reply.status != 200:
            return 0.0 if reply.status in (404, 405, 501) else math.nan
        held: dict[str, float] = {}
        for line in reply.text.splitlines():
            name = line.partition("{")[0].removeprefix("sglang:")
            if name in BUSY:
                try:
                    held[name] = max(held.get(name, 0.0), float(line.rsplit(" ", 1)[-1]))  # every rank shows the same
                except ValueError:
                    continue
        return sum(held.values())


def _all(steps: Sequence[tuple[str, Callable[[], None]]]) -> list[tuple[str, Callable[[], None]]]:
    """The same, each tried whatever became of those before it; the last raises what went wrong first."""
    lost: list[EndpointError] = []

    def tried(step: Callable[[], None], last: bool) -> None:
        try:
            step()
        except EndpointError as error:
            lost.append(error)
        if last and lost:
            raise lost[0]

    return [(said, partial(tried, step, k + 1 == len(steps))) for k, (said, step) in enumerate(steps)]


def _fleet(counts: Sequence[int]) -> Fleet | None:
    """None where a role has no worker."""
    return Fleet(*counts) if min(counts) else None


def from_text(text: str, spec: str, connect: Connect) -> SGLang:
    """``sglang:ROUTER_URL``."""
    if not text:
        raise InputError("--control sglang:ROUTER_URL needs the router's URL.")
    return SGLang(connect.endpoint(text), connect.bare)  # workers that only the router names get no credentials


def from_table(table: dict[str, Any], path: str, connect: Connect) -> SGLang:
    """``router``, ``drain_s``, ``[[worker]]`` with ``url``, ``role``, ``bootstrap_port``."""
    held = members(table, path, router=(str, ...), worker=(list, []), drain_s=(float, DRAIN_S))
    pool = []
    for number, row in enumerate(held["worker"], 1):
        where = f"{path}: [[worker]] {number}"
        one = members(row, where, url=(str, ...), role=(str, ...), bootstrap_port=(int, None))
        if one["role"] not in (*ROLES, "any"):
            raise InputError(f"{where}: role must be prefill, decode or any (got {one['role']!r}).")
        pool.append(Worker(named_url(one["url"], f"{where}: url").rstrip("/"), one["role"], one["bootstrap_port"]))
    router = connect.endpoint(held["router"])

    def engine(url: str) -> Endpoint:
        found = connect.endpoint(url)
        # What was given for a router by https goes to no engine in the clear.
        return connect.bare(url) if (router.where.scheme, found.where.scheme) == ("https", "http") else found

    made = SGLang(router, engine, pool, float(held["drain_s"]))
    made.spec = path
    return made
