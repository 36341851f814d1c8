"""Metrics pages -> :class:`traces.records.Sample`, and a thread that reads every server's page during a run.

A page is read by the names of all engines at once: one engine passes another's through, and a name says whose it is. What a
line means is told by :class:`loadgen.engines.Metric`.
"""

from __future__ import annotations

import _thread
import contextlib
import math
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

from loadgen.client import target, unsaid
from loadgen.control import Endpoint
from loadgen.engines import Engine, Metric, Worker, engines
from loadgen.engines.base import address, without_rank
from traces.errors import EndpointError, SteelyardError
from traces.records import ROLES, Histogram, Sample

PERIOD_S = 0.5
PAGE_S = 5.0
"""How long a page may take."""

MOST_BYTES = 8 * 1024 * 1024
"""Of a page."""

MOST_LINE = 4096
"""Characters of a line that is read: the library's time for one grows with the square of its length."""

PARALLEL = 16
"""Pages read at once."""

FIND_S = 5.0
"""How often it is asked which workers there are."""

GIVE_UP = 5
"""A page that failed so often in a row is asked for every FIND_S only: its worker may start yet."""

FAILING = 3
"""A page that came, and then failed so often in a row, has stopped."""

SILENT_S = 5.0
"""A worker of which nothing was read for so long (and at least three periods) has stopped telling."""

ROLE_LABELS = ("role", "worker_type", "engine_type", "dynamo_component")
WORDS = dict(zip(ROLES, ROLES, strict=True)) | {"backend": "decode", "unified": "mixed"}
"""An engine's word for a role -> ours."""

WORKER_LABELS = ("worker", "worker_id", "engine", "tp_rank")
"""What tells workers apart on a page whose own worker nobody has named."""

COPIES = frozenset({"tp_rank", "pp_rank", "moe_ep_rank"})
"""Labels of processes that show the same thing: of those one counts. Other label sets are added up."""

_LINE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{.*\})?\s+\S+(?:\s+-?\d+)?\s*")
_OF_LABEL = re.compile(r"(.+)\[(.+)\]")

Lines = dict[str, list[tuple[dict[str, str], float]]]


@dataclass(frozen=True, slots=True)
class Counted:
    """A histogram as a page shows it: since the server started. buckets: upper bound -> observations up to it."""

    source: str
    count: float
    total: float
    buckets: Mapping[float, float]


@dataclass(slots=True)
class Reading:
    """What one page says. Keys are (worker, role), the role "" where the page does not tell it; a worker that the page's
    server speaks of, and is not, stands in others. fields: of the server itself, name of ours -> the engine's. id: by which the
    server knows itself.
    """

    samples: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)
    others: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)
    histograms: dict[tuple[str, str], dict[str, Counted]] = field(default_factory=dict)
    fields: dict[str, str] = field(default_factory=dict)
    id: str = ""


@cache
def _table(first: str) -> tuple[Metric, ...]:
    """The metrics of all engines, those of one before the others'; each once."""
    ordered = sorted(engines().values(), key=lambda e: e.name != first)
    return tuple(
        {(m.name, m.to, m.part, m.histogram): m for e in reversed(ordered) for m in reversed(e.metrics)}.values()
    )[::-1]


@cache
def _wanted() -> frozenset[str]:
    """Every name that some engine's table speaks of."""
    names: set[str] = set()
    for metric in _table(""):
        names |= {metric.name + end for end in (("_sum", "_count", "_bucket") if metric.histogram else ("",))}
        for other in filter(None, (*metric.times, metric.per)):
            label = _OF_LABEL.fullmatch(other)
            names.add(label[1] if label else other)
    return frozenset(names)


def lines(text: str) -> Lines:
    """Name -> (labels, value) of each line whose name an engine knows. ValueError, and nothing else, when the text is no
    exposition."""
    from prometheus_client.parser import text_string_to_metric_families

    wanted, kept = _wanted(), []
    for line in text.splitlines():
        if not line or line[0] == "#":
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            if line.strip():
                raise ValueError(f"not a line of Prometheus text: {line[:60]!r}")
            continue
        if match[1] in wanted:
            if len(line) > MOST_LINE:
                raise ValueError(f"a line of {len(line)} characters: {line[:60]!r}")
            kept.append(line)
    found: Lines = {}
    try:
        for family in text_string_to_metric_families("\n".join(kept) + "\n"):
            for one in family.samples:
                if one.value == one.value:
                    found.setdefault(one.name, []).append((one.labels, float(one.value)))
    except (KeyError, IndexError, OverflowError) as error:  # a label without a name; a whole number that no float holds
        raise ValueError(f"not Prometheus text ({error})") from None
    return found


def read(text: str, page: Worker, engine: str = "") -> Reading:
    """What a page says. page: whose it is; without a name, labels tell its workers apart. engine: whose names come first.

    ValueError when the text is no exposition.
    """
    found = lines(text)
    reading = Reading()
    taken: dict[tuple[bool, str, str, str], dict[str, str]] = {}  # (another's, worker, role, field) -> part -> name
    for metric in _table(engine):
        if metric.histogram:
            _histogram(reading, found, metric, page)
            continue
        factor = _factor(found, metric)
        if factor is None:
            continue
        groups: dict[tuple[str, str], dict[tuple[tuple[str, str], ...], float]] = {}
        for labels, value in _matching(found, metric, metric.name):
            if math.isfinite(value):
                if metric.own and metric.own[0] in labels:
                    reading.id = metric.own[1](labels[metric.own[0]])
                apart = tuple(sorted((k, v) for k, v in labels.items() if k not in COPIES))
                held = groups.setdefault(_whose(labels, metric, page), {})
                held[apart] = max(held.get(apart, -math.inf), value)
        for (worker, role), values in groups.items():
            names = taken.setdefault((bool(metric.of), worker, role, metric.to), {})
            if metric.part in names:
                continue  # by another name, that comes before
            total = sum(values.values()) * factor
            if not math.isfinite(total):
                continue  # of a factor that is no number
            names[metric.part] = metric.name
            if metric.to.endswith("_ratio") or metric.to == "transfer_s":
                total /= len(values)  # a share, not an amount
            into = (reading.others if metric.of else reading.samples).setdefault((worker, role), {})
            into[metric.to] = into.get(metric.to, 0.0) + total
            if not metric.of:
                reading.fields[metric.to] = " + ".join(names.values())
    return reading


def _matching(found: Lines, metric: Metric, name: str) -> list[tuple[dict[str, str], float]]:
    """Lines of a name that the metric counts."""
    return [
        (labels, value)
        for labels, value in found.get(name, ())
        if all(labels.get(label, "") in values for label, values in metric.where.items())
    ]


def _whose(labels: Mapping[str, str], metric: Metric, page: Worker) -> tuple[str, str]:
    """(worker, role) of which a line speaks; the role "" where nothing tells it."""
    said = WORDS.get(next((labels[k] for k in ROLE_LABELS if k in labels), ""), "")
    if metric.of:
        return address(labels.get(metric.of, "")) or page.name or "server", said or metric.role
    if page.name:
        return page.name, metric.role or page.role or said
    if metric.role == "router":
        return "router", "router"
    label = metric.own[0] if metric.own else next((k for k in WORKER_LABELS if labels.get(k)), "")
    name = labels.get(label, "")
    return (metric.own[1](name) if metric.own and name else name) or "server", metric.role or page.role or said


def _factor(found: Lines, metric: Metric) -> float | None:
    """What a value is multiplied with; None where the page lacks a part of it."""
    factor = metric.scale
    for name, up in (*((n, True) for n in metric.times), *([(metric.per, False)] if metric.per else [])):
        label = _OF_LABEL.fullmatch(name)
        held = found.get(label[1] if label else name)
        if not held:
            return None
        labels, value = held[0]
        if label:
            try:
                value = float(labels[label[2]])
            except (KeyError, ValueError):
                return None
        if not up and value == 0:
            return None
        factor = factor * value if up else factor / value
    return factor


def _histogram(reading: Reading, found: Lines, metric: Metric, page: Worker) -> None:
    """Add one histogram, summed over the label sets of a worker."""
    sums: dict[tuple[str, str], list[float]] = {}
    buckets: dict[tuple[str, str], dict[float, float]] = {}
    for end, at in (("_count", 0), ("_sum", 1)):
        for labels, value in _matching(found, metric, metric.name + end):
            sums.setdefault(_whose(labels, metric, page), [math.nan, math.nan])
            held = sums[_whose(labels, metric, page)]
            held[at] = value if held[at] != held[at] else held[at] + value
    for labels, value in _matching(found, metric, metric.name + "_bucket"):
        try:
            bound = float(labels["le"])
        except (KeyError, ValueError):
            continue
        if not math.isfinite(value) or bound != bound:
            continue
        bounds = buckets.setdefault(_whose(labels, metric, page), {})
        bounds[bound * metric.scale] = bounds.get(bound * metric.scale, 0.0) + value
    for whose, (count, total) in sums.items():
        if math.isfinite(count) and math.isfinite(total):
            held_by = reading.histograms.setdefault(whose, {})
            counted = Counted(metric.name, count, total * metric.scale, dict(sorted(buckets.get(whose, {}).items())))
            held_by.setdefault(metric.to, counted)


def samples(text: str, page: Worker, at_s: float, engine: str = "") -> list[Sample]:
    """The page as Samples, without comparison to others: of a role that nothing tells, "mixed"."""
    reading = read(text, page, engine)
    held: dict[tuple[str, str], dict[str, float]] = {}
    for part in (reading.samples, reading.others):
        for key, values in part.items():
            held[key] = values | held.get(key, {})
    return [Sample(at_s, worker, role or "mixed", **values) for (worker, role), values in sorted(held.items())]


@dataclass(slots=True)
class _Source:
    """A page that is read again and again."""

    worker: Worker
    endpoint: Endpoint
    path: str
    failures: int = 0
    failed_at: float = -math.inf
    readings: int = 0
    busy: Future[tuple[Reading, float]] | None = None
    asked_at: float = -math.inf
    last: tuple[Reading, float] | None = None
    told: bool = True
    counted: bool = False
    before: dict[tuple[str, str], dict[str, Counted]] = field(default_factory=dict)


def page_of(server: Endpoint, worker: Worker) -> tuple[Endpoint, str]:
    """(server, path) of a worker's metrics page. Credentials go to the endpoint itself and to nobody else."""
    try:
        url = urlsplit(worker.metrics)
    except ValueError:
        raise EndpointError(f"{unsaid(worker.metrics)}: no URL. Correct it where the workers are listed.") from None
    path = url.path + (f"?{url.query}" if url.query else "")
    own = server.where
    base = f"{url.scheme}://{url.netloc.rpartition('@')[2]}"
    same = base in (f"{own.scheme}://{own.netloc}", f"{own.scheme}://{own.host}")
    return (Endpoint(own) if same and not own.prefix else Endpoint(target(base))), path


class Scraper:
    """Reads every worker's page each ``period_s`` in threads of its own, off the request path; a context manager.

    workers: whose pages are read; the endpoint's own (where its engine has it) is read beside them, under the names in its labels
    if there are no others. find: asked every FIND_S which workers there are now. on_samples gets each round's readings, one a
    worker: what a router says of a worker fills in what its own page does not say. ``at_s`` counts from ``zero`` (monotonic
    clock). failures: pages that did not come; a server without metrics costs nothing but this count.
    """

    def __init__(
        self,
        server: Endpoint,
        zero: float,
        on_samples: Callable[[Sequence[Sample]], None],
        period_s: float = PERIOD_S,
        *,
        workers: Sequence[Worker] = (),
        engine: str = "",
        find: Callable[[], Sequence[Worker]] | None = None,
    ) -> None:
        self.failures = 0
        self.readings = 0
        self.names: dict[str, str] = {}
        """Every name of a worker that was heard -> the one that rows say."""
        self.last: dict[str, Sample] = {}
        """Worker -> its last reading."""
        self.first: dict[str, Sample] = {}
        """Worker -> its first one."""
        self._server, self._zero, self._engine, self._find = server, zero, engine, find
        self._on_samples, self._period_s = on_samples, period_s
        self._sources: dict[str, _Source] = {}
        self._workers: dict[str, Worker] = {}
        self._assigned: dict[str, str] = {}
        self._serving: dict[str, str] = {}
        self._pages: dict[str, str] = {}
        self._gone: set[str] = set()
        self._alike = False
        self._fields: dict[str, dict[str, str]] = {}
        self._counted: dict[tuple[str, str, str], Counted] = {}
        self._round_s = 0.0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._slots = threading.Semaphore(PARALLEL)
        self._left = False
        self._finding: Future[Sequence[Worker]] | None = None
        self._found_at = time.monotonic()
        self._thread = threading.Thread(target=self._main, name="steelyard-scraper", daemon=True)
        self._take(workers)

    def __enter__(self) -> Scraper:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join(self._period_s + 2 * PAGE_S + 5)
        self._left = True

    def assign(self, roles: Mapping[str, Sequence[str]], pages: Mapping[str, str] = MappingProxyType({})) -> None:
        """role -> names or URLs of workers, by the word of whoever sets the fleet. It comes before a list's or a targets file's,
        which tell of the beginning. pages: name -> URL, read where the list, too, named one of them so: elsewhere pods,
        say, may be out of reach. The same page at another address is of a pod that was made anew under its name."""
        named = {name: role for role, names in roles.items() for one in names for name in (one, address(one))}
        if named != self._assigned or pages != self._pages:
            with self._lock:
                self._assigned, self._serving = named, {one: role for role, names in roles.items() for one in names}
                self._pages = dict(pages)
                # A worker may have two pages, its engine's and its GPUs'.
                read = [s.worker for s in self._sources.values() if s.worker.name in self._workers]
                new = [Worker(name, named[name], metrics=page) for name, page in pages.items() if name in named]
                self._alike = self._alike or any(worker.name in named for worker in read)
                new = [worker for worker in new if self._alike and worker.name not in self.names]
                known = [replace(w, metrics=self._now_at(w)) for w in (*self._workers.values(), *read)]
                for worker in read:
                    if self._now_at(worker) != worker.metrics:
                        del self._sources[worker.metrics]
                self._take([*known, *new])

    def _now_at(self, worker: Worker) -> str:
        """Where a worker's page is now: another pod of its name shows the same one at its own address. A port that somebody
        forwards, or the page of its GPUs, is another page, and stays."""
        page = self._pages.get(worker.name, worker.metrics)
        old, new = ((u.netloc.rpartition(":")[2], u.path, u.query) for u in map(urlsplit, (worker.metrics, page)))
        return page if old == new else worker.metrics

    def _take(self, workers: Sequence[Worker]) -> None:
        """These are the workers now; pages of those that went away are read on, for what they say of their end."""
        for worker in workers:
            self.names |= dict.fromkeys(worker.names, worker.name)
        roles = {self.names[name]: role for name, role in self._assigned.items() if name in self.names}
        for one in workers:
            worker = replace(one, role=roles.get(one.name, one.role))
            self._workers[worker.name] = worker
            known = self._sources.get(worker.metrics)
            if known is not None:
                known.worker = worker
            elif worker.metrics:
                try:
                    self._sources[worker.metrics] = _Source(worker, *page_of(self._server, worker))
                except SteelyardError:
                    self.failures += 1
        here = {w.name for w in self._workers.values() if w.names & self._assigned.keys()}
        self._gone = (
            {w.name for w in self._workers.values() if w.role in ("prefill", "decode")} - here if here else set()
        )
        routed = any(w.role == "router" and w.metrics for w in self._workers.values())
        path = engines()[self._engine].page if self._engine in engines() else Engine.page
        page = f"{self._server.shown}{path}"
        if page not in self._sources and not routed:
            own = Worker("router", "router") if self._workers else Worker("")
            self._sources[page] = _Source(own, self._server, path)

    def read(self) -> list[Sample]:
        """One reading of every worker, now, whoever fetched it meanwhile. EndpointError when there is none.

        A worker that ought to tell and does not has a sample without values.
        """
        since = time.monotonic() - self._zero - self._period_s
        self._round(PAGE_S)
        with self._lock:
            fresh = [(s, *s.last) for s in self._sources.values() if s.last is not None and s.last[1] >= since]
            found = self._merged(fresh)
        if not found:
            raise EndpointError(f"{self._server.shown}: no metrics page of it or its workers answers.")
        now, told = time.monotonic() - self._zero, {s.worker for s in found}
        return found + [Sample(now, name, role) for name, role in self._expected().items() if name not in told]

    def _expected(self) -> dict[str, str]:
        """Worker -> prefill or decode: those that serve by the word of whoever sets the fleet, where a name of theirs is known
        here; otherwise all that are listed or ever told something."""
        with self._lock:
            ways = [(n, address(n), role) for n, role in self._serving.items()]
            if any(way in self.names or way in self.last for *both, _ in ways for way in both):
                return {self.names.get(n) or self.names.get(short) or short: role for n, short, role in ways}
            found = {name: s.role for name, s in self.last.items()} | {
                name: worker.role for name, worker in self._workers.items() if worker.role
            }
        return {name: role for name, role in found.items() if role in ("prefill", "decode")}

    def histograms(self) -> list[Histogram]:
        """What the servers' histograms counted between the first reading and the last."""
        with self._lock:
            return [
                Histogram(worker, role, name, c.source, c.count, c.total, tuple(c.buckets.items()))
                for (worker, role, name), c in sorted(self._counted.items())
            ]

    def sources(self) -> dict[str, dict[str, Any]]:
        """Where readings came from, for the run: worker -> role, weight, URLs, other names, fields."""
        with self._lock:
            found: dict[str, dict[str, Any]] = {}
            for name in sorted({*self._workers, *self.last}):
                worker = self._workers.get(name, Worker(name))
                last = self.last.get(name)
                told: dict[str, Any] = {
                    "role": last.role if last else worker.role,
                    "weight": worker.weight,
                    "url": unsaid(worker.url),
                    "metrics": unsaid(worker.metrics),
                    # A list without ids of its own has URLs in their place.
                    "id": unsaid(without_rank(worker.id)) if self.names.get(worker.id) == name else "",
                    "fields": self._fields.get(name, {}),
                    "last_s": last.at_s if last else None,
                }
                found[name] = {k: v for k, v in told.items() if v not in ("", {}, None)}
            return found

    def listed(self) -> dict[str, str]:
        """Worker -> the role that the list or the targets file gives it."""
        return {name: worker.role for name, worker in self._workers.items()}

    def silent(self) -> list[Sample]:
        """The last reading of each worker that stopped telling: for long, or because its page failed some times in a row."""
        late = self._round_s - max(SILENT_S, 3 * self._period_s)
        with self._lock:
            failing = {s.worker.name for s in self._sources.values() if s.readings and s.failures >= FAILING}
            found = [s for s in self.last.values() if s.at_s < late or s.worker in failing]
        return sorted(found, key=lambda s: s.at_s)

    def unheard(self) -> dict[str, str]:
        """Worker -> role, of those that ought to have told something and never did."""
        return {name: role for name, role in self._expected().items() if name not in self.last}

    def _main(self) -> None:
        when = time.monotonic()
        while not self._stop.is_set():
            try:
                self._round(self._period_s)
                self._tell()
                self.look()
            except (RuntimeError, MemoryError):  # the machine gives no thread: this round has no reading, the next may
                self.failures += 1
            when = max(when + self._period_s, time.monotonic())
            self._stop.wait(max(0.0, when - time.monotonic()))
        with contextlib.suppress(RuntimeError, MemoryError):
            with self._lock:
                left = [s.busy for s in self._sources.values() if s.busy is not None and self._awaited(s)]
            # Asked before the end, these tell of before. This wait and the round's end within __exit__'s.
            wait(left, timeout=PAGE_S - 1)
            with self._lock:
                self._came()
            self._tell()
            self._round(PAGE_S)  # the difference over the run ends here
            self._tell()

    def _tell(self) -> None:
        """Hand on what came since the last time, also what :meth:`read` fetched."""
        with self._lock:
            came = [(s, *s.last) for s in self._sources.values() if s.last is not None and not s.told]
            for source, *_ in came:
                source.told = True
            found = self._merged(came)
        if found:
            self._on_samples(found)

    def look(self) -> None:
        """Ask now and then which workers there are."""
        if self._find is None:
            return
        since_s = time.monotonic() - self._found_at
        if self._finding is None and since_s > FIND_S:
            self._finding, self._found_at = self._apart(self._find), time.monotonic()
        elif self._finding is not None and self._finding.done():
            error = self._finding.exception()
            if error is None:
                with self._lock:
                    self._take(self._finding.result())
            self._finding, self._found_at = None, time.monotonic()
        elif self._finding is not None and since_s > 12 * FIND_S:
            self._finding = None  # its thread was denied memory

    def _apart(self, work: Callable[[], Any]) -> Future[Any]:
        """Do something that may take its time in a thread that nobody waits for. Not one of threading's: their start waits for
        the thread to say that it runs, which one that is denied memory never does."""
        answer: Future[Any] = Future()

        def run() -> None:
            try:
                with self._slots:
                    if self._left:
                        raise EndpointError("nobody waits for it any more")
                    found = work()
            except BaseException as error:
                answer.set_exception(error)
            else:
                answer.set_result(found)

        _thread.start_new_thread(run, ())
        return answer

    def _page(self, source: _Source) -> tuple[Reading, float]:
        """One page, and when it came."""
        answer = source.endpoint.fetch("GET", source.path, timeout_s=PAGE_S, most_bytes=MOST_BYTES)
        at_s = time.monotonic() - self._zero
        if answer.status != 200:
            raise EndpointError(f"{source.endpoint.shown}{source.path}: HTTP {answer.status}")
        try:
            return read(answer.text, source.worker, self._engine), at_s
        except ValueError:
            raise EndpointError(f"{source.endpoint.shown}{source.path}: not Prometheus text") from None

    def _round(self, patience_s: float) -> None:
        """Ask every page that is not asked already, wait a while, take what came; a slow page comes in a later round.

        Nobody waits for a page that fails all the time, or whose worker serves no longer: that may be gone with its address.
        """
        with self._lock:
            self._came()
            asked = []
            for source in self._sources.values():
                gone, failing = source.worker.name in self._gone, source.failures >= GIVE_UP
                seldom = failing or (gone and source.failures > 0)
                late = not seldom or (time.monotonic() - source.failed_at >= FIND_S and not (gone and failing))
                if source.busy is None and late:
                    source.busy, source.asked_at = self._apart(partial(self._page, source)), time.monotonic()
                if source.busy is not None and self._awaited(source):
                    asked.append(source.busy)
        began_s = time.monotonic() - self._zero
        wait(asked, timeout=patience_s)
        with self._lock:
            self._came()
            self._round_s = began_s  # whoever answered is not late by what others took

    def _awaited(self, source: _Source) -> bool:
        """Does anybody wait for this page?"""
        return source.failures < GIVE_UP and source.worker.name not in self._gone

    def _came(self) -> None:
        """Note which pages came or failed, also those that nobody can be asking for any more."""
        patience_s = PAGE_S * (2 + len(self._sources) / PARALLEL)
        for source in self._sources.values():
            lost = time.monotonic() - source.asked_at > patience_s
            if source.busy is None or not (source.busy.done() or lost):
                continue
            done, source.busy = source.busy, None
            if not done.done() or done.exception() is not None:
                source.failures += 1
                source.failed_at = time.monotonic()
                self.failures += 1
                continue
            source.readings += 1
            source.failures = 0
            self.readings += 1
            source.last, source.told = done.result(), False

    def _merged(self, came: Sequence[tuple[_Source, Reading, float]]) -> list[Sample]:
        """One sample a worker and role."""
        for source, reading, _ in came:
            if reading.id and source.worker.name:
                self.names[reading.id] = source.worker.name
        found: dict[str, Sample] = {}
        roles: dict[str, str] = {}
        rest: list[Sample] = []
        for source, reading, at_s in came:
            for (worker, said), values in reading.samples.items():
                name = self.names.get(worker, worker)
                roles[name] = said or roles.get(name, "")
                sample = Sample(at_s, name, "mixed", **(values | _said(found.get(name))))
                # Of two pages (its engine's and its GPUs') one may say nothing: they tell the role together.
                found[name] = replace(sample, role=roles[name] or self._role(name, sample))
                self._fields[name] = reading.fields
            self._count(source, reading, found)
        for _, reading, at_s in came:
            for (worker, said), values in reading.others.items():
                name = self.names.get(worker, worker)
                known = found.get(name)
                has = known.role if known else self._role(name, None)
                role = said or has
                # A router goes on naming a worker in the role that it has given up. Of a worker that nobody lists and that
                # has no page of its own, there is no other word than this one.
                if role != has and (known is not None or (name in self._workers and has in ("prefill", "decode"))):
                    continue
                if known is None:
                    rest.append(Sample(at_s, name, role, **values))
                else:
                    found[name] = Sample(known.at_s, name, role, **(values | _said(known)))
        told = [*found.values(), *rest]
        self.last |= {s.worker: s for s in told}
        self.first = {s.worker: s for s in told} | self.first
        return sorted(told, key=lambda s: (s.role, s.worker))

    def _role(self, name: str, sample: Sample | None) -> str:
        """Of a worker whose page does not say it: as listed, as its readings betray it, as before."""
        worker = self._workers.get(name)
        if worker is not None and worker.role:
            return worker.role
        if worker is None and name in self._assigned:
            return self._assigned[name]
        before = self.last.get(name)
        if sample is not None:
            for engine in engines().values():
                role = engine.role(before, sample)
                if role:
                    return role
        return before.role if before is not None else "mixed"

    def _count(self, source: _Source, reading: Reading, found: Mapping[str, Sample]) -> None:
        """Add what a page's histograms counted since its reading before."""
        for key, held in reading.histograms.items():
            # All that its page said of this worker before, in whatever role; a page with a name is of one worker.
            known = [h for (of, _), h in source.before.items() if source.worker.name or of == key[0]]
            name = self.names.get(key[0], key[0])
            role = key[1] or (found[name].role if name in found else self._role(name, None))
            for field_name, now in held.items():
                before = source.before.get(key, {}).get(field_name)
                total = self._counted.setdefault((name, role, field_name), Counted(now.source, 0.0, 0.0, {}))
                if before is None and (not source.counted or any(field_name in h for h in known)):
                    more = Counted(now.source, 0.0, 0.0, dict.fromkeys(now.buckets, 0.0))
                elif before is None or now.count < before.count:
                    more = now  # the server shows it since its first observation, or began anew
                else:
                    more = Counted(
                        now.source,
                        now.count - before.count,
                        now.total - before.total,
                        {bound: n - before.buckets.get(bound, 0.0) for bound, n in now.buckets.items()},
                    )
                self._counted[name, role, field_name] = Counted(
                    now.source,
                    total.count + more.count,
                    total.total + more.total,
                    {bound: total.buckets.get(bound, 0.0) + n for bound, n in more.buckets.items()},
                )
        source.before, source.counted = reading.histograms, True


def _said(sample: Sample | None) -> dict[str, float]:
    """The values of a sample that are there."""
    if sample is None:
        return {}
    return {f: v for f in _VALUES if (v := getattr(sample, f)) is not None}


_VALUES = tuple(f.name for f in fields(Sample)[3:])
