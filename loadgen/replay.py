"""One replay: a schedule asked of an endpoint, every request and every server reading stored, a verdict at the end."""

from __future__ import annotations

import contextlib
import math
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

from loadgen.client import TIMEOUT_S, Target, target
from loadgen.control import Control, Endpoint, Keeper, Standing, put, terminable
from loadgen.control.online import Controller, Steering
from loadgen.control.reference import Reference
from loadgen.discover import Discovery, Targets, again, discover, with_told
from loadgen.engines import EXACT
from loadgen.live import Live
from loadgen.policy import Dispatch
from loadgen.scrape import PERIOD_S, Scraper
from loadgen.served import Served, judged
from loadgen.spool import Batch, Spool, Steered, add, cost
from loadgen.swarm import Job, Outcome, Swarm, ended
from traces import __version__
from traces.credentials import read_secret
from traces.errors import EndpointError, InputError, StoreError
from traces.measures import Slo, Tally, late_word
from traces.records import (
    CAUSAL,
    SHARED,
    Decision,
    Feed,
    Fleet,
    FleetChange,
    Histogram,
    Observations,
    Run,
    Sample,
    Schedule,
)
from traces.store import Store, option

API_KEY = "STEELYARD_API_KEY"
"""Environment variable that holds the endpoint's bearer token."""


SESSIONS = ("recorded", "causal")

LATE_MS = 5.0
"""How late the reference endpoint may write tokens at p99 before a run against it is degraded. Over 10 % of the TTFT limit,
as for the generator's own lag, the run is invalid."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C ended a run, which is stored and marked; ``run`` is it."""

    def __init__(self, run: Run) -> None:
        super().__init__("interrupted")
        self.run = run


def read_api_key(named: str | Path | None) -> str | None:
    """The bearer token from the file or keyring that is named, else from STEELYARD_API_KEY, else from what STEELYARD_API_KEY_FILE
    names; never from the command line, where others see it."""
    if named is not None:
        return read_secret(named, "--api-key-file")
    named = os.environ.get(f"{API_KEY}_FILE")
    return os.environ.get(API_KEY) or (read_secret(named, f"{API_KEY}_FILE") if named else None)


@terminable()  # also before the load begins, and while what came of it is stored: the run has an end
def replay(
    store: Store,
    swarm: Swarm,
    schedule: Schedule | Feed,
    endpoint: str | Target | Sequence[Target],
    *,
    name: str = "",
    fleet: Fleet | None = None,
    engine: str = "auto",
    model: str | None = None,
    chat: bool = False,
    text: bool = False,
    slo: Slo | None = None,
    rate_factor: float = 1.0,
    seed: int = 0,
    group: str = "",
    policy: str = "static",
    profile: str = "",
    gpus_per_worker: tuple[int, int] = (1, 1),
    timeout_s: float = TIMEOUT_S,
    drain_s: float = 5.0,
    patience_s: float = 10.0,
    scrape_s: float = PERIOD_S,
    control: Control | None = None,
    steering: Steering | None = None,
    tick_s: float = 1.0,
    stale_s: float = 10.0,
    most_per_hour: float = math.inf,
    dispatch: Dispatch | None = None,
    prefixes: bool = False,
    sessions: str = "recorded",
    warmup_s: float = 0.0,
    words: Sequence[str] | None = None,
    targets: Targets | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    on_live: Callable[[Live], None] | None = None,
    on_outcome: Callable[[Outcome], None] | None = None,
) -> Run:
    """Ask ``schedule`` of ``endpoint``, store what happened, return the run with verdict, completeness and counts.

    endpoint: base URL, or a Target (headers, TLS); a plain URL takes the token from STEELYARD_API_KEY. Several Targets get
    the requests in turn; the first is asked for models, metrics and fleets. control: how its fleet is set (a
    :class:`loadgen.control.Keeper` keeps the way back); None: ``/fleet``, if the endpoint has it. fleet: put in
    force first if that can be, otherwise noted as what the user says it is; None: as it is.
    engine: a name of :mod:`loadgen.engines`, or auto. on_progress(rows, scheduled) is called as rows arrive;
    on_live(live) is called before the start with what is found on the way (:mod:`loadgen.live`);
    on_outcome(outcome) at the end, with schedule zero and what each worker cost.
    steering: an online rule, asked every tick_s of the endpoint's time during the run; every decision and each role change
    is stored with its reason, and what the change cost. It moves nothing on readings older than stale_s, nor more than
    most_per_hour times an hour. dispatch: the client's own order, batch after batch, instead of the due times (one worker
    keeps it).
    prefixes: prompts begin with the schedule's blocks (it needs some), so that the trace's sharing is replayed.
    sessions: "recorded", every turn at its recorded time whatever the answers do; "causal", a turn waits for the answer
    before it and the think time (the schedule needs parents), and is due then. warmup_s: requests due before stand in no
    figure. targets: the servers to read and their roles, before what the endpoint lists. words: what text prompts are made
    of (:func:`loadgen.engines.single_token_words`). Unless the engine is the reference, a few requests before the run find
    out how many tokens it counts for a prompt, and prompts are made so.
    A database that goes away costs nothing: rows wait on disk; patience_s: how long its return is awaited at the end.
    EndpointError before anything is stored when the endpoint cannot be used. Ctrl-C (SIGTERM is the same) drains, stores,
    marks the run incomplete, unless every answer was in by then, and raises :class:`Interrupted`.
    """
    if isinstance(schedule, Feed) and (prefixes or sessions == "causal" or dispatch is not None):
        raise InputError(
            "a feed has no prefixes, sessions or order of its own: load the trace as a whole (Store.schedule)."
        )
    whole = schedule if isinstance(schedule, Schedule) else None
    if prefixes and whole is not None and whole.blocks is None:
        raise InputError(f"the trace {schedule.name!r} holds no prefix blocks: replay it without --prefixes.")
    if sessions not in SESSIONS:
        raise InputError(f"--sessions must be {' or '.join(SESSIONS)} (got {sessions!r}).")
    if sessions == "causal":
        if whole is None or whole.parent is None or not (whole.parent >= 0).any():
            raise InputError(f"no request of {schedule.name!r} continues another: replay it with --sessions recorded.")
        if dispatch is not None:
            raise InputError("--sessions causal sends turns when their answers have come: it excludes --order.")
        schedule = replace(schedule, changes=(*schedule.changes, CAUSAL))
    if prefixes:
        schedule = replace(schedule, changes=(*schedule.changes, SHARED))
    if len(schedule) and warmup_s > schedule.last_due_s:
        raise InputError(f"--warmup {warmup_s:g} s leaves no request: the last is due at {schedule.last_due_s:.6g} s.")
    if not len(schedule):
        raise InputError(f"the schedule of {schedule.name!r} holds no request. Nothing to replay.")
    if isinstance(endpoint, str):
        endpoint = target(endpoint, api_key=read_api_key(None))
    where, *others = [endpoint] if isinstance(endpoint, Target) else endpoint
    server = Endpoint(where)
    model, _owner = server.choose_model(model)
    if control is None and server.fleet() is not None:
        control = Reference(server)
    standing = control.get() if control is not None else Standing()
    in_force = standing.fleet
    found = discover(server, engine=engine, targets=targets)
    engine = found.engine.name
    dialect = found.engine.dialect(chat=chat, text=text)
    if control is None:
        fleet = agreed(server, found, fleet)
    for one in (server, *map(Endpoint, others)):
        one.try_one(dialect, model)
    digest = schedule.digest()  # of what is asked: how its prompts are made is no other schedule
    measure = EXACT
    if dialect.name != "reference":
        measure = server.measure(dialect, model, schedule.longest_prompt, words or ())
        if measure != EXACT:
            said = f"prompts calibrated: {measure.per_unit:.4g} tokens a unit and {measure.offset:.4g} more"
            schedule = replace(schedule, changes=(*schedule.changes, said))
    swarm.join()  # they came up meanwhile; without them nothing is changed
    if control is not None:
        if fleet is not None:
            (control.put(fleet) if isinstance(control, Keeper) else put(control, fleet))
            standing = control.get()
            if found.listed:
                found = again(server, found)  # others may serve now
        else:
            fleet = in_force
    found = with_told(found, standing.workers)
    speed, steps = 1.0, -1
    if engine == "reference":
        known = _health(server)
        profile = profile or str(known.get("profile") or "")
        speed = float(known.get("speed") or 1.0)
        steps = int(known.get("late", {}).get("steps", -1))
    if dispatch and any(f for _, f in dispatch.batches) and (control is None or control.kind != "reference"):
        raise EndpointError(f"{where.shown}: its roles cannot be changed between batches (no /fleet).")
    if steering is not None and (control is None or fleet is None):
        raise EndpointError(
            f"{where.shown}: its roles cannot be changed during a run (no /fleet). Give --control, or use --policy static."
        )
    began = Run(
        name=name or schedule.name,
        trace=schedule.name,
        schedule_digest=digest,
        scheduled=len(schedule),
        endpoint=" ".join(one.shown for one in (where, *others)),
        engine=dialect.name,
        model=model,
        fleet=fleet,
        started_unix_s=time.time(),
        workers=swarm.workers,
        gpus_per_worker=gpus_per_worker,
        rate_factor=rate_factor,
        rate_per_s=schedule.rate_per_s,
        changes=schedule.changes,
        policy=policy,
        seed=seed,
        warmup_s=warmup_s,
        slo=str(slo) if slo else "",
        group=group,
        profile=profile,
        version=__version__,
        engine_version=found.version[:80],
    )
    # Nothing is cached by accident: the salt differs from run to run. The seed decides what is asked, not its filler.
    salt = random.SystemRandom().getrandbits(60)
    job = Job(
        where,
        dialect,
        model,
        salt,
        timeout_s,
        dispatch,
        prefixes,
        causal=sessions == "causal",
        others=tuple(others),
        measure=measure,
        words=tuple(words or ()),
    )
    run = store.begin_run(began)
    steered = control.name if control is not None else ""
    writer = Writer(store, run.id, steered)
    tally, served = Tally(warmup_s), Served()
    scrapers: list[Scraper] = []

    live = Live(run, schedule, slo)
    swarm.watched = live.table

    def on_samples(readings: Sequence[Sample]) -> None:
        live.samples(readings)
        writer.put(readings)

    def on_rows(rows: Observations) -> None:
        if scrapers:
            rows = rows.renamed(scrapers[0].names)
        tally.add(rows)
        served.add(rows)
        live.rows(rows)
        writer.put(rows)
        if on_progress is not None:
            on_progress(tally.rows, run.scheduled)

    outcome: Outcome | None = None
    reason = ""
    refused: list[Decision] = []

    def on_decision(decision: Decision, unix: float) -> None:
        if decision.action == "refused":
            refused.append(decision)
        writer.put(Steered(decision, steered, unix))

    def come(reason: str, after: Discovery | None = None, late: Sequence[tuple[str, str]] = ()) -> Run:
        """What came of the run, judged by what is in hand. after, late: what servers that were asked at its end said."""
        scraper = scrapers[0] if scrapers else None
        moved = steering is not None or bool(dispatch and any(f for _, f in dispatch.batches))
        reasons = [*served.reasons(found, after, scraper, moved=moved), *late]
        if refused:  # a rule may want what is out of bounds; who planned a change measured something else without it
            word = "degraded" if policy == "planned" else "valid"
            reasons.append((word, f"{len(refused)} changes of the fleet were refused, the first: {refused[0].reason}"))
        done = judged(_ended(run, tally, slo, outcome, reason), reasons)
        return done if scraper is None else replace(done, sources=scraper.sources())

    def counted() -> Sequence[Histogram]:
        return scrapers[0].histograms() if scrapers else ()

    with writer.told(lambda: (come(reason or "interrupted"), counted())):
        with contextlib.ExitStack() as stack:
            stack.enter_context(writer)

            def on_start(zero: float, unix: float) -> None:
                nonlocal run
                run = replace(run, started_unix_s=unix)
                live.begin(zero)
                find = (lambda: again(server, found).workers) if found.listed else None
                scraper = Scraper(
                    server, zero, on_samples, scrape_s, workers=found.workers, engine=dialect.name, find=find
                )
                scraper.assign(standing.workers, standing.pages)
                scrapers.append(stack.enter_context(scraper))
                if steering is not None and control is not None:
                    stack.enter_context(
                        Controller(
                            control,
                            scraper.read,
                            steering,
                            zero,
                            writer.put,
                            on_decision=lambda decision: on_decision(decision, unix),
                            on_standing=lambda standing: scraper.assign(standing.workers, standing.pages),
                            tick_s=tick_s,
                            speed=speed,
                            stale_s=stale_s,
                            most_per_hour=most_per_hour,
                        )
                    )

            try:
                if on_live is not None:
                    on_live(live)
                outcome = swarm.run(schedule, job, on_start=on_start, on_rows=on_rows, drain_s=drain_s)
                reason = outcome.reason
                tally.unread(outcome.unread)
            except BaseException as error:
                # Whatever it was, the run's rows so far are worth keeping, and the run says why it is not whole.
                on_progress = None  # it may be what fails, each time
                reason = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
                # A feed is not read again, perhaps it is what cannot be read: what is not heard of it is counted alone.
                if whole is not None:
                    silent, due = tally.silent(whole), live.due()  # what was due may have been sent, or not
                    for word, which in (("lost", silent[silent < due]), ("unsent", silent[silent >= due])):
                        if len(which):
                            on_rows(ended(whole, which, word, -1, "the run was broken off"))
                tally.unread(run.scheduled - tally.rows)
                stack.close()
                writer.settle(come(reason), patience_s, counted())
                raise
        if on_outcome is not None:
            on_outcome(outcome)
        late = _late(server, steps, slo) if steps >= 0 else []
        after = None
        with contextlib.suppress(EndpointError):  # a list that is believed no longer costs no run
            after = again(server, found) if found.listed else None
        run = writer.settle(come(reason, after, late), patience_s, counted())
    if writer.error is not None:
        raise writer.error
    if outcome.interrupted:
        raise Interrupted(run)
    return run


def _ended(run: Run, tally: Tally, slo: Slo | None, outcome: Outcome | None, reason: str) -> Run:
    """The run with what came of it."""
    judged = tally.verdict(slo)
    why = "; ".join(filter(None, (reason, judged.reason)))
    return replace(
        run,
        complete=outcome is not None and not reason and tally.rows == run.scheduled,
        verdict=judged.word,
        reason=why,
        lag_p50_ms=judged.lag_p50_ms,
        lag_p99_ms=judged.lag_p99_ms,
        lag_max_ms=judged.lag_max_ms,
        counts=dict(sorted(tally.counts.items())),
        costs={str(worker): dict(cost) for worker, cost in sorted(outcome.costs.items())}
        if outcome is not None
        else {},
    )


def agreed(server: Endpoint, found: Discovery, fleet: Fleet | None) -> Fleet | None:
    """The fleet that an endpoint is which cannot change it: as its workers say, or, where they do not, as the user does.

    EndpointError where a role has no worker, or the user says something else.
    """
    if found.lacks:
        raise EndpointError(
            f"{server.shown}: no {found.lacks} worker is behind it, {found.shown}. Start one, or register it with the router."
        )
    if fleet is not None and found.fleet is not None and fleet != found.fleet:
        raise EndpointError(
            f"{server.shown}: --fleet {fleet} disagrees with its workers, {found.shown}. Give --fleet {found.fleet}, or change "
            "the deployment first: steelyard control."
        )
    return fleet or found.fleet


def _late(server: Endpoint, steps: int, slo: Slo | None) -> list[tuple[str, str]]:
    """(verdict, why) for the reference endpoint's own lateness: late tokens are not what its laws say."""
    try:
        late = _health(server, f"?after={steps}").get("late", {})
    except EndpointError:
        return []  # it went away, as the rows say
    p99 = float(late.get("p99_ms", 0.0))
    word = late_word(p99 / 1e3, slo, degrades_s=LATE_MS / 1e3)
    if word == "valid":
        return []
    why = (
        f"the reference endpoint wrote its tokens {p99:.1f} ms late at p99 (at most {LATE_MS:g}): too many for this machine, "
        "serve with --speed below 1 or fewer workers"
    )
    return [(word, why)]


def _health(server: Endpoint, query: str = "") -> Mapping[str, Any]:
    """What the reference endpoint says of itself."""
    held: Any = server.fetch("GET", f"/health{query}").json()
    return held if isinstance(held, Mapping) else {}


GRACE_S = 0.25
"""A database that has not taken a batch after this long is one that went away: the batch goes to disk as well."""


class Writer:
    """Stores rows, readings, role changes and decisions while the run goes on; a context manager.

    Two threads. One gathers what came within about a quarter of a second; the other talks to the database, one transaction a
    batch, and may wait there: on a lock, or on a server that was stopped and says nothing. What is not stored after GRACE_S
    waits in a :class:`loadgen.spool.Spool` on disk, so that a master that is killed then loses nothing either; it may be
    stored as well, since rows have keys. What waits is loaded as soon as the database answers; ``settle`` says what is to be done
    if it is still away at the end. Batches that neither database nor disk takes stay in memory and are tried again.
    """

    def __init__(self, store: Store, run_id: int, steered: str = "", *, every_s: float = 0.25) -> None:
        self.spool = Spool(store, run_id)
        self._steered = steered
        self.error: Exception | None = None
        self._store, self._run_id, self._every_s = store, run_id, every_s
        self._queue: queue.SimpleQueue[Batch] = queue.SimpleQueue()
        self._unkept: list[Batch] = []
        self._copied: tuple[Future[Any] | None, int] = None, 0
        """What the database was asked to store, and the bytes of the spool that are a copy of it and all that waits there."""
        self._ending: tuple[Run, Sequence[Histogram]] | None = None
        """What is being stored of the run's end, once no row is in memory alone."""
        self._settled = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._main, name="steelyard-writer", daemon=True)
        self._work: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._asked: Future[Any] | None = None

    def put(self, batch: Batch) -> None:
        """Hand over rows, readings, a change or a decision; never blocks."""
        self._queue.put(batch)

    def __enter__(self) -> Writer:
        # A daemon that nobody joins: a database that never answers must not keep the process from ending.
        threading.Thread(target=self._talk, name="steelyard-database", daemon=True).start()
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()

    @contextlib.contextmanager
    def told(self, end: Callable[[], tuple[Run, Sequence[Histogram]]]) -> Iterator[None]:
        """A second Ctrl-C in the block waits for no database any more; how the run ended is on disk for the next command: what
        was being stored, which the database may yet take as well, or before that what end says."""
        try:
            yield
        except KeyboardInterrupt:
            if not self._settled:
                with contextlib.suppress(StoreError):
                    self._leave(*(self._ending or end()))
            raise

    def _leave(self, run: Run, counted: Sequence[Histogram]) -> None:
        """What came of the run to the disk, for the next command."""
        if counted:
            self.spool.add_histograms(counted)
        self.spool.end_run(run, self._steered)

    def settle(self, run: Run, patience_s: float, counted: Sequence[Histogram] = ()) -> Run:
        """Store what came of the run, what the servers' histograms counted, what waits, and what the changes of P:D cost.
        StoreError says where the rows are, after ``patience_s`` in which nothing was stored."""
        until = time.monotonic() + patience_s

        def work() -> bool:
            self.spool.load(self._store)
            if self.spool.size():  # nobody may take the run for a whole one
                raise StoreError(f"another process is storing rows of run {run.id}.")
            self._store.add_histograms(run.id, counted)
            return bool(self._store.fleet_changes(run.id))

        while True:
            try:
                self._gather()  # if the thread that does it died
                if self._unkept:
                    self._keep()
                    if self._unkept:
                        raise self.error or StoreError("rows could not be kept.")
                self._ending = run, counted
                changed = self._ask(work, max(GRACE_S, until - time.monotonic()), max(GRACE_S, patience_s))
                # Nobody may take the run for ended without their cost, nor dump it so; of a long one that takes a minute.
                with self.spool.ending(run, self._steered) if changed else contextlib.nullcontext():
                    cost(self._store, run, self._steered)
                    found: Run = self._ask(lambda: self._store.end_run(run, count=False), max(GRACE_S, patience_s))
                self._work.put(None)
                self._settled = True
                if isinstance(self.error, StoreError):
                    self.error = None  # it passed
                break
            except StoreError as error:
                if time.monotonic() < until:
                    time.sleep(0.5)
                    continue
                self._work.put(None)
                left = sum(len(b) for b in self._unkept if isinstance(b, Observations))
                if left:
                    raise StoreError(f"{left} rows of run {run.id} are lost: {error}") from None
                self._leave(run, counted)
                raise StoreError(
                    f"{error} Nothing is lost: the rows of run {run.id} wait in {self.spool.path}. "
                    f"When the database is back, run: steelyard runs recover{option(self._store.told or 'URL')}"
                ) from None
        self._store.count(found)  # of a long run a matter of minutes: by then it is stored, whoever waits for this
        return found

    def _talk(self) -> None:
        """The thread that waits for the database."""
        while (item := self._work.get()) is not None:
            work, done = item
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)

    def _ask(self, work: Callable[[], Any], seconds: float, again_s: float = 0.0) -> Any:
        """Do something with the database. StoreError if it is not done in time, or if what was asked before is not done yet.
        again_s: what it gets after each line that was loaded from disk meanwhile."""
        until, seen = time.monotonic() + seconds, self.spool.loaded

        def answered(asked: Future[Any]) -> None:
            nonlocal until, seen
            while not wait([asked], max(0.0, until - time.monotonic())).done:
                if not again_s or self.spool.loaded == seen:
                    raise StoreError(f"{self._store.url}: the database does not answer.")
                until, seen = time.monotonic() + again_s, self.spool.loaded

        if self._asked is not None:
            answered(self._asked)
        self._asked = Future()
        self._work.put((work, self._asked))
        answered(self._asked)
        return self._asked.result()

    def _main(self) -> None:
        while True:
            try:
                self._stop.wait(self._every_s)
                self._gather()
                self._keep()
            except (MemoryError, OSError, RuntimeError) as error:
                # This thread must live; what is in hand is tried again.
                self.error = StoreError(f"{str(error) or 'out of memory'}: rows wait in memory.")
                time.sleep(self._every_s)
            if self._stop.is_set() and self._queue.empty():
                return

    def _gather(self) -> None:
        """What came into hand."""
        while not self._queue.empty():
            self._unkept.append(self._queue.get())
        rows = [batch for batch in self._unkept if isinstance(batch, Observations)]
        moves = [batch for batch in self._unkept if isinstance(batch, (FleetChange, Steered))]
        readings = [one for batch in self._unkept if isinstance(batch, Sequence) for one in batch]
        with contextlib.suppress(MemoryError):
            # Else as they came: this thread must live, or nothing that comes later is kept.
            self._unkept = [*moves, *([Observations.concat(rows)] if rows else ()), *([readings] if readings else ())]

    def _keep(self) -> None:
        """What is in hand into the database, or onto the disk; what neither takes stays in hand."""
        batches, kept, asked = self._unkept, self.spool.keep, self._asked
        given_up, size = self._copied
        if given_up is not None and given_up.done():
            if given_up.exception() is None:  # slow, not away: it is there
                self.spool.forget(size)
            self._copied = None, 0
        if not batches:
            return

        def work() -> None:
            self.spool.load(self._store)
            for batch in batches:
                add(self._store, self._run_id, batch)

        try:
            self._ask(work, GRACE_S if self._asked is None or self._asked.done() else 0.0)
        except Exception as error:
            if not isinstance(error, StoreError):
                self.error = error  # a mistake of ours: said at the end, when the rows are safe
            waited = self.spool.size()
            self._unkept = []
            for batch in batches:
                try:
                    kept(batch)
                except StoreError as full:  # no room on the disk either
                    self.error = full
                    self._unkept.append(batch)
                except MemoryError:
                    self.error = StoreError("out of memory: rows can be neither stored nor kept on disk.")
                    self._unkept.append(batch)
                except Exception as error:  # nothing takes it, ever: without it the others are kept
                    self.error = error
            # Rows that another batch put there are not what is being stored.
            fresh = self._asked is not asked and not waited
            self._copied = (self._asked, self.spool.size()) if fresh else (None, 0)
            if self._unkept:
                return
        if isinstance(self.error, StoreError):
            self.error = None
        self._unkept = []
