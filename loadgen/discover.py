"""What stands behind an endpoint: which engine, which workers, their roles and metrics pages.

Workers come from the targets file first, then from what the router or frontend lists, then from its metrics. Roles the same
way; where nobody says one, a worker's own metrics may betray it.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loadgen import engines
from loadgen.client import named_url, target, unsaid
from loadgen.control import Endpoint
from loadgen.engines import Engine, Glance, Worker
from loadgen.engines.base import address, believed, member
from loadgen.scrape import MOST_BYTES, PAGE_S, PARALLEL, page_of, read
from traces.errors import InputError, SteelyardError
from traces.records import ROLES, Fleet, Sample

POD_ROLES = (
    "llm-d.ai/role",
    "nvidia.com/dynamo-sub-component-type",
    "disaggregatedset.x-k8s.io/role",
    "app.kubernetes.io/component",
    "component",
    "role",
)
"""Labels of a pod that name its role, the most telling first."""

POD_WORDS = {"prefill": "prefill", "decode": "decode", "both": "mixed", "prefill-decode": "mixed", "router": "router"}

PORT_NAMES = ("metrics", "http-metrics", "system", "engine", "vllm", "sglang", "http")

_WORKER_KEYS = {"name", "role", "url", "metrics", "weight", "id", "pid"}
_KEYS = {"engine", "version", "model", "request", "endpoint", "router", "router_metrics", "worker", "workers"}


@dataclass(frozen=True, slots=True)
class Targets:
    """A targets file. engine: as it names it, or ""."""

    file: str
    workers: tuple[Worker, ...]
    engine: str = ""

    @property
    def lists(self) -> bool:
        """Does it name the workers, or only where the router's metrics are?"""
        return any(w.role != "router" for w in self.workers)


@dataclass(frozen=True, slots=True)
class Discovery:
    """What was found. why: by what the engine is known. by: who told of the workers. notes: what does not agree. listed: the
    server itself lists the workers, so it can be asked again (:func:`again`)."""

    engine: Engine
    why: str
    version: str
    workers: tuple[Worker, ...]
    by: str
    notes: tuple[str, ...] = ()
    listed: bool = False

    def count(self, role: str) -> int:
        """Workers of a role that are not known to be ill; one with two pages (its engine's and its GPUs') counts once."""
        return sum({w.name: w.weight for w in self.workers if w.role == role and w.healthy is not False}.values())

    @property
    def fleet(self) -> Fleet | None:
        """The fleet that the workers are; None where a role is not known or lacks its workers."""
        prefill, decode, mixed = (self.count(role) for role in ("prefill", "decode", "mixed"))
        if any(not w.role and w.healthy is not False for w in self.workers):
            return None
        return Fleet(prefill, decode, mixed) if mixed or (prefill and decode) else None

    @property
    def lacks(self) -> str:
        """The role that has no worker although the other has some; ""."""
        if self.count("mixed") or any(not w.role for w in self.workers):
            return ""
        prefill, decode = self.count("prefill"), self.count("decode")
        return "" if bool(prefill) == bool(decode) else "decode" if prefill else "prefill"

    @property
    def shown(self) -> str:
        """``2 prefill, 1 decode``, and who says so."""
        told = [f"{self.count(r)} {r}" for r in ROLES[:3] if self.count(r) or r != "mixed"]
        unknown = sum(not w.role for w in self.workers)
        return ", ".join(told + ([f"{unknown} of unknown role"] if unknown else [])) + f" ({self.by})"


# --- the targets file -----------------------------------------------------------------------------------------------


MOST_CHARACTERS = 64 << 20
"""Of a targets file that are read."""


def read_targets(path: Path) -> Targets:
    """Workers from TOML, JSON, or what ``kubectl get pods -o json`` printed. InputError says what is wrong where."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MOST_CHARACTERS)
    except (OSError, UnicodeDecodeError) as error:
        words = error.strerror if isinstance(error, OSError) else "not text"
        raise InputError(f"--targets {path}: cannot be read ({words}).") from None
    try:
        held = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (ValueError, RecursionError) as error:
        kind = "TOML" if path.suffix == ".toml" else "JSON (or name it .toml)"
        raise InputError(f"--targets {path}: is no {kind} ({str(error)[:80]}).") from None
    if not isinstance(held, dict):
        raise InputError(f"--targets {path}: must hold a table of workers, as docs/engines.md shows.")
    if isinstance(held.get("items"), list):
        return Targets(str(path), _pods(held["items"], path))
    unknown = sorted(set(held) - _KEYS)
    if unknown:
        raise InputError(f"--targets {path}: {unknown[0]!r} is not known. Known: {', '.join(sorted(_KEYS))}.")
    router = held.get("router_metrics")
    listed = held.get("workers", held.get("worker", [] if router else None))
    if not isinstance(listed, list) or not (listed or router):
        raise InputError(f"--targets {path}: lists no worker. Write [[worker]] with role and metrics.")
    workers = [_worker(one, f"--targets {path}: worker {n}") for n, one in enumerate(listed, start=1)]
    if router:
        workers.insert(0, _worker({"name": "router", "role": "router", "metrics": router}, f"--targets {path}"))
    names = [w.name for w in workers]
    twice = next((n for n in names if names.count(n) > 1 and not _same(workers, n)), "")
    if twice:
        raise InputError(
            f"--targets {path}: two workers are named {twice!r}, with different roles or pages that differ behind the ? alone. "
            "Name them apart."
        )
    engine = held.get("engine", "")
    return Targets(str(path), tuple(workers), engine if isinstance(engine, str) else "")


def _same(workers: Sequence[Worker], name: str) -> bool:
    """Several pages of one worker (its engine's and its GPUs') have one role. Pages that differ behind the ? alone are
    of one worker only where a name says so."""
    pages = [w for w in workers if w.name == name]
    unnamed = {w.metrics.partition("?")[2] for w in pages if not w.url and address(w.metrics) == name}
    return len({w.role for w in pages}) == 1 and len(unnamed) < 2


def _worker(held: Any, where: str) -> Worker:
    if not isinstance(held, dict):
        raise InputError(f"{where} must be a table with role and metrics.")
    unknown = sorted(set(held) - _WORKER_KEYS)
    if unknown:
        raise InputError(f"{where}: {unknown[0]!r} is not known. Known: {', '.join(sorted(_WORKER_KEYS))}.")
    texts = {key: held.get(key, "") for key in ("name", "role", "url", "metrics", "id")}
    for key, value in texts.items():
        if not isinstance(value, str):
            raise InputError(f"{where}: {key} must be text (got {unsaid(repr(value))}).")
    if texts["role"] not in ("", *ROLES):
        raise InputError(f"{where}: role must be one of {', '.join(ROLES)} (got {texts['role']!r}).")
    weight = held.get("weight", 1)
    if type(weight) is not int or weight < 1:
        raise InputError(f"{where}: weight must be a whole number of workers, 1 or more (got {weight!r}).")
    for key in ("url", "metrics"):
        if texts[key]:
            named_url(texts[key], f"{where}: {key}")
    if texts["url"] and not texts["metrics"]:
        texts["metrics"] = texts["url"].rstrip("/") + "/metrics"
    name = texts["name"] or address(texts["url"]) or texts["id"] or address(texts["metrics"])
    if not name:
        raise InputError(f"{where}: needs metrics (a URL), url or name.")
    return Worker(name, texts["role"], texts["url"], texts["metrics"], weight, texts["id"])


def pod_page(pod: Any) -> str:
    """URL of a Kubernetes pod's metrics, by annotation or port; "" where it has no address or no port."""

    def listed(held: Any, name: str) -> list[Any]:
        found = member(held, name)
        return found if isinstance(found, list) else []

    notes, address = member(member(pod, "metadata"), "annotations"), member(member(pod, "status"), "podIP")
    ports = [
        (str(p.get("name", "")), p["containerPort"])
        for container in listed(member(pod, "spec"), "containers")
        for p in listed(container, "ports")
        if isinstance(member(p, "containerPort"), int)
    ]
    by_name = dict(ports)
    port = member(notes, "prometheus.io/port") or next((by_name[n] for n in PORT_NAMES if n in by_name), None)
    port = port or (ports[0][1] if ports else None)
    host = f"[{address}]" if ":" in str(address) else address
    return f"http://{host}:{port}{member(notes, 'prometheus.io/path') or '/metrics'}" if port and host else ""


def _pods(items: Sequence[Any], path: Path) -> tuple[Worker, ...]:
    """Workers from a list of Kubernetes pods: role by label, page by annotation or port. A group's leader stands for it."""
    found = []
    for pod in items:
        meta, status = member(pod, "metadata"), member(pod, "status")
        labels = member(meta, "labels")
        role = next((POD_WORDS[word] for k in POD_ROLES if (word := str(member(labels, k))) in POD_WORDS), "")
        leader = member(labels, "leaderworkerset.sigs.k8s.io/worker-index") in (None, "0")
        if not role or not member(status, "podIP") or not leader or member(status, "phase") != "Running":
            continue
        found.append(Worker(str(member(meta, "name")), role, metrics=pod_page(pod)))
    if not found:
        raise InputError(
            f"--targets {path}: no running pod has a role. Its label must be one of {', '.join(POD_ROLES)}, "
            "its value prefill or decode."
        )
    return tuple(found)


# --- the endpoint ---------------------------------------------------------------------------------------------------


def glance(server: Endpoint) -> Glance:
    """Questions to a server and to others on its host."""

    def elsewhere(url: str) -> Endpoint:
        return Endpoint(target(url))  # without the endpoint's credentials

    return Glance(server, elsewhere=elsewhere)


def discover(server: Endpoint, *, engine: str = "auto", targets: Targets | None = None) -> Discovery:
    """Ask a server, and the pages of its workers where a role is missing, who works behind it. Harmless GETs only."""
    seen = glance(server)
    if engine == "auto" and targets is not None and targets.engine:
        engine = targets.engine
    known, why = engines.recognise(seen) if engine == "auto" else (engines.engine(engine), "as it was named")
    if targets is not None:
        targets = replace(targets, workers=tuple(_at_page(w, known.page) for w in targets.workers))
    notes: list[str] = []
    listed = targets is None or not targets.lists
    if targets is None or listed:
        workers = _listed(server, known, seen)
        by = f"{server.shown} lists them" if workers else "nobody lists workers"
        if targets is not None:
            workers = [*targets.workers, *(w for w in workers if w.role != "router")]
    else:
        workers, by = _agreed(targets, believed(known.workers(seen), server.shown), notes), targets.file
        workers = _with_roles(server, known, workers, ask_all=False)
    for worker in workers:
        if worker.healthy is False:
            notes.append(f"worker {worker.name} ({worker.role or 'unknown role'}) is not healthy, says the router")
    return Discovery(known, why, known.version(seen), tuple(workers), by, tuple(notes), listed and bool(workers))


def _at_page(worker: Worker, page: str) -> Worker:
    """A worker of a file that gives its url alone, with the page of its engine."""
    base = worker.url.rstrip("/")
    return replace(worker, metrics=base + page) if base and worker.metrics == f"{base}{Engine.page}" else worker


def again(server: Endpoint, found: Discovery) -> Discovery:
    """The same with the workers that are listed now, and the router's page as it was known."""
    now = _listed(server, found.engine, glance(server))
    router = [w for w in found.workers if w.role == "router"]
    return replace(found, workers=tuple([*router, *(w for w in now if w.role != "router")] if router else now))


def with_told(found: Discovery, roles: Mapping[str, Sequence[str]]) -> Discovery:
    """The same with the workers that whoever sets the fleet names by URL, where nobody lists any (vllm-router's discovery).

    Workers without an id come from counters, which forget nobody who left: those that are named stand in their place.
    """
    named = {url: role for role, names in roles.items() for url in names if "://" in url}
    router = tuple(w for w in found.workers if w.role == "router")
    listed = any(w.id or not found.listed for w in found.workers if w.role != "router")
    if not named or listed:
        return found
    workers = [Worker(address(url), role, url, url.rstrip("/") + "/metrics") for url, role in named.items()]
    return replace(found, workers=(*router, *workers), by="--control names them", listed=False)


def _listed(server: Endpoint, known: Engine, seen: Glance) -> list[Worker]:
    """Workers by the endpoint's own word. Those that only its metrics name may have left long ago: who does not answer is out."""
    workers = believed(known.workers(seen), server.shown)
    stale = bool(workers) and seen.json("/workers") is not None and not member(seen.json("/workers"), "workers")
    return _with_roles(server, known, workers, ask_all=stale)


def _agreed(targets: Targets, listed: Sequence[Worker], notes: list[str]) -> list[Worker]:
    """The workers of the file, with what the server lists of them; what does not agree is noted."""
    found = []
    heard: set[str] = set()
    for worker in targets.workers:
        same = next((w for w in listed if w.names & worker.names and w.role != "router"), None)
        if same is None:
            found.append(worker)
            continue
        heard.add(same.name)
        if worker.role and same.role and worker.role != same.role:
            notes.append(
                f"worker {worker.name} is {worker.role} in {targets.file}, but the server lists it as {same.role}"
            )
        found.append(
            replace(
                worker,
                role=worker.role or same.role,
                url=worker.url or same.url,
                metrics=worker.metrics or same.metrics,
                id=worker.id or same.id,
                healthy=same.healthy,
                details=same.details,
            )
        )
    for worker in listed:  # those that only an id names may be in the file without it
        if worker.role != "router" and worker.url and worker.name not in heard:
            notes.append(
                f"the server lists {worker.name} ({worker.role or 'unknown role'}), which {targets.file} lacks"
            )
    return found


def _with_roles(server: Endpoint, known: Engine, workers: Sequence[Worker], *, ask_all: bool) -> list[Worker]:
    """Workers whose role nobody said, with the one that their page says or betrays; those that do not answer are ill.

    ask_all: the pages of the others are asked, too, and those that do not answer are left out.
    """
    open_ones = [w for w in workers if w.metrics and w.role != "router" and (ask_all or not w.role)]
    if not open_ones:
        return list(workers)
    with ThreadPoolExecutor(PARALLEL) as pool:
        answers = list(pool.map(lambda w: _role(server, known, w), open_ones))
    told: dict[str, str | None] = {}
    for worker, answer in zip(open_ones, answers, strict=True):  # of two pages of a worker the first that tells
        before = told.get(worker.name)
        told[worker.name] = before or (answer if answer is not None else before)
    found = []
    for worker in workers:
        role = told.get(worker.name, "")
        if role is None:
            if not ask_all:
                found.append(replace(worker, healthy=False))
        else:
            found.append(replace(worker, role=worker.role or role))
    return found


def _role(server: Endpoint, known: Engine, worker: Worker) -> str | None:
    """By label or by what was counted; "" if neither says it, None if the page does not come."""
    try:
        endpoint, path = page_of(server, worker)
        answer = endpoint.fetch("GET", path, timeout_s=PAGE_S, most_bytes=MOST_BYTES)
        reading = read(answer.text, worker, known.name)
    except (SteelyardError, ValueError):
        return None
    if answer.status != 200:
        return None
    for (_, role), values in reading.samples.items():
        betrayed = role or known.role(None, Sample(0.0, worker.name, "mixed", **values))
        if betrayed:
            return betrayed
    return ""
