"""The replay as a Locust User: take this file, read it, change it, and run it with Locust's own command.

    LOCUST_SKIP_MONKEY_PATCH=1 locust -f locustfile.py --headless -u 1 \
        --trace azure-2023-conv --host http://127.0.0.1:8000 --fleet 3:5

``-u`` is the number of processes that send: 1, or as many as there are ``locust --worker`` (start the master with
``--expect-workers`` as many and ``--master-bind-host 127.0.0.1``, each worker with the same ``--host`` and ``--db``). Each sends
every n-th request of the trace at its own time, through the same client as ``steelyard replay``; rows go to the database
(``--db``), requests to Locust's statistics and, without ``--headless``, to its web UI (``--web-host 127.0.0.1``). Locust's
monkey patching must be off: the client needs a thread of its own.
"""

from __future__ import annotations

import logging
import os
import random
import time
from dataclasses import replace
from typing import Any

import gevent
import gevent.monkey
import locust.runners
import numpy as np
from locust import User, events, task
from locust.exception import StopUser
from locust.runners import MasterRunner, WorkerRunner

from loadgen import engines
from loadgen.client import Engine, Row, target
from loadgen.control import Endpoint
from loadgen.engines import Prompts
from loadgen.ports import Door, everywhere, loopback
from loadgen.replay import read_api_key
from loadgen.swarm import HEARTBEATS, pack, unpack
from traces.errors import InputError, SteelyardError
from traces.measures import Slo, Tally
from traces.records import Fleet, Observations, Run, Schedule
from traces.shape import head, to_rate
from traces.store import Store, open_store

if gevent.monkey.is_module_patched("threading"):
    raise SystemExit("Set LOCUST_SKIP_MONKEY_PATCH=1 before locust: the client needs a thread of its own.")

# Locust's master waits for its workers with time.sleep, which must let gevent go on; nothing else is patched.
gevent.monkey.patch_time()

locust.runners.HEARTBEAT_LIVENESS = HEARTBEATS

START_AHEAD_S = 3.0
"""Time for every process to load its share before schedule zero."""

LAST_ROWS_S = 10.0
"""How long a master that stops waits for the last rows of its workers."""

STOPPED = "stopped before its end"
"""Why a share is over that Locust stopped: nothing failed."""


@events.init_command_line_parser.add_listener
def options(parser: Any) -> None:
    """What to replay. The endpoint is Locust's own --host; its token comes from STEELYARD_API_KEY."""
    parser.add_argument("--trace", default="", help="Name of a stored trace", include_in_web_ui=False)
    # No default that a message of Locust's would carry: see named.
    parser.add_argument("--db", default="", help="[STEELYARD_DB, or sqlite:///steelyard.db]", include_in_web_ui=False)
    parser.add_argument("--fleet", default="", help="Prefill and decode workers, 3:5", include_in_web_ui=False)
    parser.add_argument("--engine", default="openai", help="A dialect of steelyard", include_in_web_ui=False)
    parser.add_argument("--model", default="", include_in_web_ui=False)
    parser.add_argument(
        "--rate", type=float, default=0.0, help="Requests per second [the trace's]", include_in_web_ui=False
    )
    parser.add_argument("--requests", type=int, default=0, help="Only the first N", include_in_web_ui=False)
    parser.add_argument("--slo", default="", help="ttft<0.5s tpot<50ms", include_in_web_ui=False)


def asked(held: Any, store: Store) -> Schedule:
    """The schedule that the options name: the same in every process."""
    schedule = store.schedule(held.trace)
    schedule = head(schedule, held.requests) if held.requests else schedule
    return to_rate(schedule, held.rate) if held.rate else schedule


class Replay(User):
    """One process's share of the trace. Subclass it to change what is asked or to look at rows as they end."""

    wait_time = staticmethod(lambda: 0)

    def on_start(self) -> None:
        """Wait until the one that started the test has said which run this is, or that there is none."""
        while not SHARED.keys() & {"run", "error"}:
            gevent.sleep(0.02)

    @task
    def replay(self) -> None:
        """Send every request of the share at its time; ends when each has ended, something fails or Locust stops: never twice."""
        # When a worker leaves, Locust starts its users anew at the others, which have a share of their own.
        if "run" not in SHARED or SHARED["run"] in _SENT:
            raise StopUser
        _SENT.add(SHARED["run"])
        why = STOPPED  # by an exception that is no Exception
        try:
            self.send(dict(SHARED))
            why = ""
        except Exception as error:  # Locust would run the task again at once: the whole share in one burst
            why = said(error)
        finally:
            finished(self.environment, why)
        raise StopUser

    def send(self, shared: dict[str, Any]) -> None:
        """The share of the run that is told, and its rows into the database."""
        held = self.environment.parsed_options
        mine, shares = int(shared["mine"]), int(shared["shares"])
        where = target(NAMED["host"], api_key=read_api_key(None))
        if shared["endpoint"] != where.shown:
            raise InputError(
                f"--host of the master is {shared['endpoint']}, of this worker {where.shown}: give both the same"
            )
        with open_store(NAMED["db"], create=False) as store:
            schedule = asked(held, store)
            positions = np.arange(len(schedule))[mine::shares]
            dialect = engines.dialect(held.engine)
            prompts = Prompts(dialect, shared["model"], int(schedule.prompt_tokens.max()), int(shared["salt"]))
            engine = Engine()
            told = engines.engine(held.engine)
            _wait(
                engine.submit(
                    engine.prepare(
                        [where], dialect.path, prompts, timeout_s=600.0, first=positions[:32].tolist(), engine=told
                    )
                )
            )
            zero = time.monotonic() + float(shared["zero_unix"]) - time.time()
            due, prompt, output = (
                column[positions].tolist()
                for column in (schedule.due_s, schedule.prompt_tokens, schedule.output_tokens)
            )
            running = engine.submit(engine.run(positions.tolist(), due, prompt, output, zero))

            kept: list[Row] = []  # what the database did not take goes with the next

            def rows() -> list[Row]:
                found = [engine.rows.popleft() for _ in range(len(engine.rows))]
                kept.extend(found)
                if kept:
                    store.add_observations(int(shared["run"]), unpack(pack(kept), schedule, mine, zero))
                    kept.clear()
                return found

            try:
                while True:
                    over = running.done()
                    if ended := rows():
                        self.ended(ended)
                    if over:
                        break
                    gevent.sleep(0.25)
                running.result()
            except BaseException:
                engine.submit(engine.stop(0.0)).result()  # not _wait: Locust may stop the user a second time meanwhile
                rows()
                raise

    def ended(self, rows: list[Row]) -> None:
        """Requests that have ended, to Locust's statistics."""
        for row in rows:
            self.environment.events.request.fire(
                request_type="POST",
                name=engines.dialect(self.environment.parsed_options.engine).path,
                response_time=(row.ended - row.sent) * 1e3,
                response_length=row.body_bytes,
                exception=None if row.status == "ok" else RuntimeError(row.error or row.status),
                context={},
            )


def _wait(future: Any) -> Any:
    while not future.done():
        gevent.sleep(0.01)
    return future.result()


# --- one run, begun and ended by the process that started the test -----------------------------------------------------

NAMED: dict[str, str] = {}
"""host and db of this process's own command line or environment. Credentials go there and nowhere else: Locust's web UI and its
messages, which ask nobody who he is, can say another host or database."""

SHARED: dict[str, Any] = {}
"""What every process knows of the run: its number, zero on the wall clock, endpoint, model, salt, how many share it, which share
is its."""

_SENT: set[int] = set()
"""Runs whose share this process has sent, or is sending: it does so once, whatever Locust starts."""

_AWAITED: dict[str, int] = {}
"""In the master: workers whose shares are not over, and which."""

_STOPPING: set[int] = set()
"""In the master: runs that it stops itself."""

_DONE: list[str] = []
"""Of each share that is over "", or why it failed."""


@events.init.add_listener
def listen(environment: Any, **_: Any) -> None:
    """Workers hear of the run from the master, the master hears who has finished."""
    try:
        named(environment)
        guarded(environment)
    except SteelyardError as error:
        raise SystemExit(f"steelyard: {error}") from None
    environment.events.quitting.add_listener(stop)  # added after the runner's own, called before it
    if isinstance(environment.runner, WorkerRunner):
        environment.runner.register_message("steelyard.run", lambda environment, msg: hear(msg.data))
        environment.runner.register_message("steelyard.stop", lambda environment, msg: environment.runner.stop())
    elif isinstance(environment.runner, MasterRunner):
        environment.runner.register_message("steelyard.done", done)


def named(environment: Any) -> None:
    """Keep where this process was told to go, and leave nothing secret of it where Locust's messages take it from."""
    held = environment.parsed_options
    NAMED["db"] = held.db or os.environ.get("STEELYARD_DB") or "sqlite:///steelyard.db"
    NAMED["host"] = environment.host or ""
    held.db = ""
    if NAMED["host"]:
        environment.host = held.host = target(NAMED["host"]).shown
    elif isinstance(environment.runner, WorkerRunner):
        raise InputError(
            "a worker needs --host URL and --db URL as its master has them: it believes no message about them."
        )


def guarded(environment: Any) -> None:
    """Keep Locust's ports to this machine: its web UI starts runs, and its master tells them, for whoever asks."""
    held, runner = environment.parsed_options, environment.runner
    if environment.web_ui is not None:
        door = Door(held.web_host, held.web_port)
        if not loopback(door.host):
            raise InputError(
                f"--web-host {door.host or '*'}: whoever reaches Locust's web UI can start and stop runs. Give "
                "--web-host 127.0.0.1 (from elsewhere: ssh -L 8089:127.0.0.1:8089), or --headless."
            )

        def guard() -> Any:
            from flask import request

            return (strange[1], strange[0]) if (strange := door.foreign(dict(request.headers))) else None

        environment.web_ui.app.before_request(guard)
    if isinstance(runner, MasterRunner) and not loopback(runner.master_bind_host):
        why = "whoever reaches Locust's master can take shares of a run and disturb it"
        if everywhere(runner.master_bind_host):
            raise InputError(
                f"--master-bind-host {runner.master_bind_host}: {why}. Give --master-bind-host 127.0.0.1 (workers "
                "elsewhere: a tunnel), or the address of a network on which you trust everybody."
            )
        logging.warning("steelyard: --master-bind-host %s: %s.", runner.master_bind_host, why)


def hear(run: dict[str, Any]) -> None:
    """Which run this is, or the error for which there is none."""
    SHARED.clear()
    SHARED.update(run)


def done(environment: Any, msg: Any) -> None:
    """A worker's share is over."""
    if msg.data["run"] == SHARED.get("run") and (share := _AWAITED.pop(msg.node_id, None)) is not None:
        error, state = msg.data["error"], environment.runner.state
        if error == STOPPED and SHARED["run"] not in _STOPPING and state not in ("stopping", "stopped"):
            error = f"worker {share} {STOPPED}"  # by somebody else
        finished(environment, error)


def watch(environment: Any) -> None:
    """Whoever leaves with a share that is not over ends it: nobody else sends it."""
    while _AWAITED:
        for worker, share in list(_AWAITED.items()):
            known = environment.runner.clients.get(worker)
            if (known is None or known.state == "missing") and _AWAITED.pop(worker, None) is not None:
                finished(environment, f"worker {share} went away")
        gevent.sleep(0.5)


def said(error: Exception) -> str:
    """Its line, logged; of a mistake in code with where it was made."""
    logging.error("steelyard: %s", error, exc_info=None if isinstance(error, SteelyardError) else error)
    return str(error) or type(error).__name__


@events.test_start.add_listener
def begin(environment: Any, **_: Any) -> None:
    """Store a run that starts and tell everybody, also that it cannot: Locust goes on when a listener raises."""
    if isinstance(environment.runner, WorkerRunner):
        return
    _DONE.clear()
    _AWAITED.clear()
    runner = environment.runner
    # Not by Locust's index, which is given once: of a worker that was replaced it leaves a gap.
    there = [c.id for c in runner.clients.values() if c.state != "missing"] if isinstance(runner, MasterRunner) else []
    try:
        hear(begun(environment, max(1, len(there))))
    except Exception as error:
        hear({"error": said(error)})
        leave(environment, failed=True)
    for k, worker in enumerate(there):
        runner.send_message("steelyard.run", SHARED | {"mine": k}, worker)
    if there and "run" in SHARED:
        _AWAITED.update(zip(there, range(len(there)), strict=True))
        gevent.spawn(watch, environment)


def begun(environment: Any, shares: int) -> dict[str, Any]:
    """What every process has to know of a run that is stored now."""
    held = environment.parsed_options
    if not held.trace or not environment.host:
        raise InputError("give --trace NAME and --host URL")
    if held.db or not NAMED["host"] or environment.host != target(NAMED["host"]).shown:
        raise InputError("a run goes to --host and --db of the command line alone: start Locust anew for others")
    engines.dialect(held.engine), engines.engine(held.engine)
    where = target(NAMED["host"], api_key=read_api_key(None))
    model, _owner = Endpoint(where).choose_model(held.model or None)
    with open_store(NAMED["db"], create=False) as store:
        schedule = asked(held, store)
        run = store.begin_run(
            Run(
                name=f"locust {held.trace}",
                trace=held.trace,
                schedule_digest=schedule.digest(),
                scheduled=len(schedule),
                endpoint=where.shown,
                engine=held.engine,
                model=model,
                fleet=Fleet.parse(held.fleet) if held.fleet else None,
                started_unix_s=time.time() + START_AHEAD_S,
                workers=shares,
                rate_per_s=schedule.rate_per_s,
                changes=schedule.changes,
                slo=str(Slo.parse(held.slo)) if held.slo else "",
            )
        )
    salt = random.SystemRandom().getrandbits(60)
    return {
        "run": run.id,
        "zero_unix": run.started_unix_s,
        "endpoint": where.shown,
        "model": model,
        "salt": salt,
        "shares": shares,
        "mine": 0,
    }


def finished(environment: Any, error: str) -> None:
    """One share is done, or failed; when all are, the run is judged and Locust ends."""
    if isinstance(environment.runner, WorkerRunner):
        if error not in ("", STOPPED):
            environment.process_exit_code = 1
        environment.runner._send_stats()  # Locust's own last report, before: its master waits half a second for it when it quits
        environment.runner.send_message("steelyard.done", {"run": SHARED["run"], "error": error})
        return
    _DONE.append(error)
    if len(_DONE) >= int(SHARED["shares"]):
        try:
            end(environment)
        except Exception as unkept:
            _DONE.append(said(unkept))
        leave(environment, failed=any(why not in ("", STOPPED) for why in _DONE))


def leave(environment: Any, *, failed: bool) -> None:
    """Locust ends, not with 0 if something failed; its web UI stays for another run."""
    if environment.web_ui is None:
        environment.process_exit_code = 1 if failed else environment.process_exit_code
        gevent.spawn_later(0.5, environment.runner.quit)
    elif failed:
        gevent.spawn_later(0.5, environment.runner.stop)


def stop(environment: Any, **_: Any) -> None:
    """Locust leaves: before anybody says so, the last rows are stored."""
    if isinstance(environment.runner, MasterRunner):
        stopped(environment)
    else:
        environment.runner.stop()


@events.test_stop.add_listener
def stopped(environment: Any, **_: Any) -> None:
    """The run ends with the test, by whatever Locust was stopped. A master's own quit would not wait for its workers."""
    try:
        if _AWAITED:
            _STOPPING.add(int(SHARED["run"]))
            environment.runner.send_message("steelyard.stop")
        with gevent.Timeout(LAST_ROWS_S + (environment.stop_timeout or 0.0), False):
            while _AWAITED:
                gevent.sleep(0.02)
        _DONE.extend(f"worker {share} did not say in time that it has stopped" for share in _AWAITED.values())
    finally:  # also after a second Ctrl-C
        end(environment)


def end(environment: Any) -> None:
    """Judge the run from its rows; what was never sent is unsent."""
    if isinstance(environment.runner, WorkerRunner) or "run" not in SHARED:
        return
    held, number = environment.parsed_options, int(SHARED.pop("run"))
    _AWAITED.clear()
    if len(_DONE) < int(SHARED["shares"]):
        _DONE.append(STOPPED)
    with open_store(NAMED["db"], create=False) as store:
        schedule, run = asked(held, store), store.run(number)
        tally = Tally(run.warmup_s)
        for rows in store.pieces(number, ("index", "due_s", "dispatch_s", "sent_s", "status", "error")):
            tally.add(rows)
        silent = tally.silent(schedule)
        if len(silent):
            unsent = Observations.unsent(schedule.take(silent))
            store.add_observations(number, unsent)
            tally.add(unsent)
        judged = tally.verdict(Slo.parse(run.slo) if run.slo else None)
        run = store.end_run(
            replace(
                run,
                complete=not len(silent) and not any(_DONE),
                verdict=judged.word,
                reason="; ".join(dict.fromkeys(filter(None, (*_DONE, judged.reason)))),
                lag_p50_ms=judged.lag_p50_ms,
                lag_p99_ms=judged.lag_p99_ms,
                lag_max_ms=judged.lag_max_ms,
                counts=dict(sorted(tally.counts.items())),
            )
        )
    print(f"steelyard: run {run.id} {run.counts}, {run.verdict}: {run.reason}")
