"""The verb control: get, set, run, keep, restore."""

from __future__ import annotations

import contextlib
import math
import time
from typing import Any

import click

from advisor.cli.common import Number, db_option, emit_json, example, json_option, messages, warn, workers_of
from advisor.cli.reaching import connect_of, credentials, watching
from advisor.cli.steering import rule_of, seconds_between, steering, thresholds

HOW = "How the fleet is set: reference:URL, sglang:ROUTER_URL, kubernetes:NS/KIND/NAME,KIND/NAME, "
HOW += 'command:["PROGRAM", "{prefill}", "{decode}"], manual:, none, or a TOML file'


PATIENCE_S = 10.0
"""How long the end of ``control run`` waits for a database that is away."""


def control_options(f: Any) -> Any:
    """``--control``, ``--bounds``, ``--settle``, ``--dry-run``: what changes a fleet takes them."""
    options = [
        click.option(
            "--control", "control_spec", metavar="KIND:..|FILE", help=f"{HOW} [default: the endpoint's /fleet]."
        ),
        click.option(
            "--bounds",
            metavar="P-P:D-D[/N]",
            help="Fleets allowed: least-most prefill : least-most decode / workers in all.",
        ),
        click.option(
            "--settle",
            "settle_s",
            type=Number(min=0, min_open=True),
            default=180.0,
            show_default=True,
            help="Seconds that a change of fleet may take; a command or a drain of SGLang: at least its own limit.",
        ),
        click.option("--dry-run", is_flag=True, help="Print what would be done, and do nothing."),
    ]
    for option in reversed(options):
        f = option(f)
    return f


def chosen(spec: str | None, url: str | None, options: dict[str, Any]) -> Any:
    """The control that ``--control`` names, or the endpoint's own ``/fleet``; None where there is neither."""
    from loadgen.control import control_of
    from loadgen.control.reference import Reference

    connect = connect_of(options)
    if spec:
        return control_of(spec, connect)
    if url is None:
        raise click.UsageError("give the endpoint's URL, or --control.")
    endpoint = connect.endpoint(url)
    return Reference(endpoint) if endpoint.fleet() is not None else None


def needed(spec: str | None, url: str | None, options: dict[str, Any], what: str = "set") -> Any:
    """As :func:`chosen`; EndpointError where there is neither. what: shall be done to the fleet."""
    from loadgen.client import unsaid
    from traces.errors import EndpointError

    made = chosen(spec, url, options)
    if made is None:
        raise EndpointError(
            f"{unsaid(url or spec or '')}: its fleet cannot be {what} (no /fleet). Say how with --control."
        )
    return made


def keeper_of(control: Any, verb: str, options: dict[str, Any], as_json: bool, **more: Any) -> Any:
    """The :class:`loadgen.control.Keeper` of a control, as the options want it; it speaks on stderr."""
    from loadgen.control import Bounds, Keeper

    return Keeper(
        control,
        verb,
        bounds=Bounds.parse(options["bounds"]) if options.get("bounds") else None,
        timeout_s=options["settle_s"],
        say=lambda line: click.echo(f"steelyard: {line}", err=True),
        **more,
    )


def printed(steps: list[str], what: str, as_json: bool, **more: Any) -> int:
    """Say what a dry run would do."""
    if as_json:
        emit_json({"dry_run": True, "steps": steps} | more)
    else:
        messages().print(f"dry run: {what}", markup=False)
        for step in steps or ["nothing: it is so already"]:
            messages().print(f"  {step}", markup=False)
    return 0


@click.group(**example("steelyard control get http://127.0.0.1:8080 --json"))
@json_option
@db_option
def control(as_json: bool, db: str) -> None:  # for the verbs below, which ask the group
    """See and set the P:D ratio of a live endpoint, let a policy steer it, put the old ratio back."""


@control.command(**example("steelyard control get http://127.0.0.1:8080"))
@click.argument("url", required=False)
@click.option("--control", "control_spec", metavar="KIND:..|FILE", help=f"{HOW}.")
@credentials
@json_option
def get(url: str | None, control_spec: str | None, as_json: bool, **options: Any) -> int:
    """Print the fleet that is in force."""
    from loadgen.client import unsaid

    made = needed(control_spec, url, options, "read")
    standing = made.get()
    workers = {role: [unsaid(name) for name in names] for role, names in standing.workers.items()}
    found = {
        "control": made.name,
        "fleet": _fleet(standing.fleet),
        "target": _fleet(standing.target),
        "changing": standing.changing,
        "workers": workers,
    }
    if as_json:
        emit_json(found)
        return 0
    line = f"{made.name}: {standing.fleet or 'no fleet in force'}"
    if standing.changing:
        line += f", {standing.changing} on the way to {standing.target or 'another'}"
    elif standing.fleet and standing.target not in (None, standing.fleet):
        line += f" of {standing.target}"
    messages().print(line, markup=False)
    for role, names in workers.items():
        messages().print(f"  {role}: {', '.join(names) or 'none'}", markup=False)
    return 0


def _fleet(fleet: Any) -> Any:
    return None if fleet is None else workers_of(fleet)


@control.command(name="set", **example("steelyard control set 3:5 http://127.0.0.1:8080 --dry-run"))
@click.argument("fleet")
@click.argument("url", required=False)
@control_options
@click.option(
    "--warm",
    type=click.IntRange(0, 1000),
    default=0,
    show_default=True,
    help="Small requests to URL afterwards: when was the first answered, and were any refused?",
)
@click.option("--model", help="--warm: model to ask for [default: the server's first].")
@credentials
@json_option
@db_option
def set_(
    fleet: str,
    url: str | None,
    control_spec: str | None,
    warm: int,
    model: str | None,
    dry_run: bool,
    as_json: bool,
    db: str,
    **options: Any,
) -> int:
    """Put a fleet in force, wait until it is, and store what that cost. ``control restore`` goes back."""
    from traces.errors import StoreError
    from traces.records import Fleet, FleetChange
    from traces.store import open_store

    wanted = Fleet.parse(fleet)
    if warm and url is None:
        raise click.UsageError("--warm needs the URL that takes requests.")
    made = needed(control_spec, url, options)
    keeper = keeper_of(made, "set", options, as_json, put_back=False, keep_note=True)
    if dry_run:
        return printed(keeper.steps(wanted), f"{made.name} to {wanted}", as_json, fleet=_fleet(wanted))
    with keeper:
        began, at = time.time(), time.monotonic()
        cost = keeper.put(wanted)
        served, failed = math.nan, -1
        if warm and url is not None:
            served, failed = _warm(connect_of(options).endpoint(url), model, warm, at)
    unstored = ""
    if cost.before not in (None, wanted):  # of one that is not known nobody could say what moved
        change = FleetChange(
            0.0, cost.ready_s, cost.before, wanted, "steelyard control set", cost.joined_s, served, warm or -1, failed
        )
        try:
            with open_store(db) as store:
                store.add_fleet_change(None, change, made.name, began)
        except StoreError as error:  # the fleet is in force all the same, and what that took is worth saying
            unstored = f"the fleet is {wanted} now, but what that took is not stored: {error}"
    found = {
        "control": made.name,
        "before": _fleet(cost.before),
        "fleet": _fleet(wanted),
        "joined_s": cost.joined_s,
        "ready_s": cost.ready_s,
        "first_served_s": served,
        "asked": warm,
        "failed": max(0, failed),
    }
    warn(unstored)
    if as_json:
        emit_json(found)
        return 1 if unstored else 0
    line = f"{made.name}: {cost.before or 'unknown'} -> {wanted}, in force after {cost.ready_s:.2f} s"
    if cost.joined_s < cost.ready_s:
        line += f" (new workers after {cost.joined_s:.2f} s, then the drain)"
    if warm:
        line += (
            f"; first answer after {served:.2f} s, {failed} of {warm} failed"
            if served == served
            else "; nothing answered"
        )
    messages().print(line, markup=False)
    return 1 if unstored else 0


def _warm(server: Any, model: str | None, requests: int, asked: float) -> tuple[float, int]:
    """(seconds from asking for the fleet to the first answer, requests that failed)."""
    from loadgen import engines
    from traces.errors import EndpointError

    model, owner = server.choose_model(model)
    name = {"steelyard": "reference", "vllm": "vllm", "sglang": "sglang"}.get(owner, "openai")
    served, failed = math.nan, 0
    for _ in range(requests):
        try:
            server.try_one(engines.dialect(name, text=name != "reference"), model, tries=1)
        except EndpointError:
            failed += 1
            continue
        if math.isnan(served):
            served = time.monotonic() - asked
    return served, failed


@control.command(**example("steelyard control restore"))
@click.option(
    "--control", "control_spec", metavar="KIND:..|FILE", help="Only this one [default: all that were changed]."
)
@click.option("--forget", is_flag=True, help="Drop the notes and change nothing: the fleets are as they should be.")
@click.option(
    "--settle",
    "settle_s",
    type=Number(min=0, min_open=True),
    default=180.0,
    show_default=True,
    help="Seconds that it may take; a command or a drain of SGLang: at least its own limit.",
)
@click.option("--dry-run", is_flag=True, help="Print what would be done, and do nothing.")
@credentials
@json_option
@db_option
def restore(
    control_spec: str | None, forget: bool, settle_s: float, dry_run: bool, as_json: bool, db: str, **options: Any
) -> int:
    """Put the fleets back that a crash, an interrupted command or ``control set`` left changed."""
    from loadgen.control import control_of, put, terminable
    from loadgen.control.journal import Journal
    from traces.errors import EndpointError, SteelyardError
    from traces.records import FleetChange
    from traces.store import open_store

    connect = connect_of(options)
    found: list[dict[str, Any]] = []
    wanted = None
    if control_spec:
        only = control_of(control_spec, connect)
        wanted = only.spec if only is not None else ""
    for journal in Journal.all():
        if wanted is not None and journal.spec != wanted:
            continue
        row: dict[str, Any] = {"control": journal.name, "fleet": None, "changed_by": "", "done": False, "said": ""}
        found.append(row)
        try:
            journal.lock("control restore")
            try:
                back = journal.undo()
                if back is None:
                    continue
                fleet, by = back
                row |= {"fleet": _fleet(fleet), "changed_by": by}
                if forget:
                    row["done"] = True
                    if not dry_run:
                        journal.forget()
                    continue
                made = control_of(journal.spec, connect)
                if made is None:
                    continue
                Journal.of(made).entries()  # InputError under another context than the note's
                steps = made.steps(fleet)
                row["said"] = "; ".join(steps) or "nothing to do, it is so already"
                if dry_run:
                    continue
                began = time.time()
                with terminable():
                    cost = put(made, fleet, settle_s)
                journal.done(by)
                row |= {"done": True, "said": f"in force after {cost.ready_s:.2f} s", "ready_s": cost.ready_s}
                if cost.before not in (None, fleet):
                    change = FleetChange(
                        0.0, cost.ready_s, cost.before, fleet, "steelyard control restore", cost.joined_s
                    )
                    with open_store(db) as store:
                        store.add_fleet_change(None, change, made.name, began)
            finally:
                journal.unlock()
        except SteelyardError as error:
            row["said"] = str(error)
    for path in Journal.unreadable():
        if wanted is not None and path != Journal(wanted, "").path:
            continue
        said = "the note cannot be read; put the fleet back by hand and remove the file"
        found.append({"control": str(path), "fleet": None, "changed_by": "", "done": False, "said": said})
    failed = [row for row in found if not row["done"] and not dry_run]
    refused = (
        EndpointError(f"{failed[0]['control']}: not restored ({failed[0]['said']}). The note stays.")
        if failed
        else None
    )
    if as_json:
        why = {"error": str(refused), "exit_code": refused.exit_code} if refused else {}
        emit_json({"restored": found, "dry_run": dry_run} | why)
    elif not found:
        messages().print("nothing to restore: no old fleet is noted here.", markup=False)
    else:
        for row in found:
            fleet = row["fleet"]
            done = (
                f"back to {fleet['prefill']}:{fleet['decode']} (changed by {row['changed_by']})"
                if fleet
                else "not restored"
            )
            messages().print(f"{row['control']}: {done}: {row['said'] or 'forgotten'}", markup=False)
    if refused:
        warn(str(refused))
    return refused.exit_code if refused else 0


@control.command(**example("steelyard control run http://127.0.0.1:8080 --policy online-report --for 10"))
@click.argument("url")
@control_options
@click.option(
    "--policy",
    type=click.Choice(["online", "online-report"]),
    default="online",
    show_default=True,
    help="online: by the thresholds of an answer (--recommendation, --thresholds) or by backlog in seconds (--laws); "
    "online-report: by 1.5x counts.",
)
@steering
@click.option("--mean-prompt", type=Number(min=1), help="online by --laws: tokens of a mean prompt.")
@click.option("--mean-output", type=Number(min=1), help="online by --laws: tokens of a mean answer.")
@click.option("--slo", help='Limits per request, e.g. "ttft<0.5s tpot<50ms".')
@click.option(
    "--tick",
    "tick_s",
    type=Number(min=0.05),
    default=1.0,
    show_default=True,
    help="Seconds between decisions; thresholds bring their own.",
)
@click.option(
    "--max-switches-per-hour",
    type=Number(min=0),
    default=30.0,
    show_default=True,
    help="More moves than this are not made; one may take several workers.",
)
@click.option(
    "--stale-after",
    "stale_s",
    type=Number(min=0, min_open=True),
    default=10.0,
    show_default=True,
    help="Seconds without a reading after which nothing is moved.",
)
@click.option("--for", "for_s", type=Number(min=0, min_open=True), help="End after so many seconds [default: Ctrl-C].")
@click.option("--leave", is_flag=True, help="Leave the last fleet in force at the end, instead of the one before.")
@watching
@json_option
@db_option
def run(
    url: str,
    control_spec: str | None,
    dry_run: bool,
    for_s: float | None,
    leave: bool,
    as_json: bool,
    db: str,
    **options: Any,
) -> int:
    """Let a policy steer the fleet on live readings until Ctrl-C; every decision and its reason is a row.

    With --dry-run it decides and says so, changes nothing and stores nothing.
    """
    from loadgen import policy
    from loadgen.control import terminable
    from loadgen.control.online import Controller, Ledger
    from traces.measures import Slo
    from traces.records import Decision, FleetChange
    from traces.store import open_store

    made = needed(control_spec, url, options)
    slo = Slo.parse(options["slo"]) if options["slo"] else None
    keeper: Any = keeper_of(made, "run", options, as_json, put_back=not leave)
    if dry_run:
        keeper = _Dry(keeper)
    zero, unix = time.monotonic(), time.time()
    console = messages(as_json)
    decisions: list[Decision] = []
    changes: list[FleetChange] = []

    def say(decision: Decision) -> None:
        moved = f"{decision.before} -> {decision.after}" if decision.after else str(decision.before or "?")
        console.print(f"{decision.at_s:8.1f} s  {decision.action:7} {moved}: {decision.reason}", markup=False)

    with open_store(db) as store:
        known = thresholds(store, options)
        rule = rule_of(options, known, slo, options["mean_prompt"], options["mean_output"])
        read, on_standing = _readings(url, made, options, zero)

        ledger = Ledger(warn)

        def on_decision(decision: Decision) -> None:
            decisions.append(decision)
            if not dry_run:  # who reads the rows could not tell that nothing moved
                ledger.put(lambda: store.add_decision(None, decision, made.name, unix))

        def on_change(change: FleetChange) -> None:
            changes.append(change)
            if not dry_run:
                ledger.put(lambda: store.add_fleet_change(None, change, made.name, unix))

        controller = Controller(
            keeper,
            read,
            policy.Steering(rule),
            zero,
            on_change,
            on_decision=on_decision,
            on_said=say,
            on_standing=on_standing,
            tick_s=seconds_between(options["tick_s"], known),
            stale_s=options["stale_s"],
            most_per_hour=options["max_switches_per_hour"],
        )
        with keeper, contextlib.ExitStack() as ending:
            ending.push(controller)
            try:
                with terminable():
                    controller.__enter__()  # in here: whoever reads its first line may press Ctrl-C at once
                    until = math.inf if for_s is None else time.monotonic() + for_s
                    # In pieces: a signal that comes in the moment one begins does not end it.
                    while (left := until - time.monotonic()) > 0:
                        time.sleep(min(left, 0.5))
            except KeyboardInterrupt:
                console.print("stopping", markup=False)
        if unstored := ledger.close(PATIENCE_S):
            warn(
                f"{unstored} decisions and changes of fleet are not stored: {store.url} took none within {PATIENCE_S:g} s."
            )
    if as_json:
        emit_json(
            {
                "control": made.name,
                "moves": controller.moves,
                "missed": controller.missed,
                "decisions": [
                    {
                        "at_s": d.at_s,
                        "until_s": d.until_s,
                        "action": d.action,
                        "before": str(d.before) if d.before else None,
                        "after": str(d.after) if d.after else None,
                        "reason": d.reason,
                        "repeats": d.repeats,
                    }
                    for d in decisions
                ],
            }
        )
    else:
        console.print(
            f"{controller.moves} moves, {sum(d.repeats for d in decisions)} decisions, "
            f"{controller.missed} ticks without a reading",
            markup=False,
        )
    return 1 if unstored or keeper.stranded else 0


class _Dry:
    """A keeper that only says what it would do."""

    def __init__(self, keeper: Any) -> None:
        self._keeper = keeper
        self.kind, self.name, self.spec = keeper.kind, keeper.name, keeper.spec
        self.stranded = False

    def __enter__(self) -> _Dry:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def get(self) -> Any:
        return self._keeper.get()

    def steps(self, fleet: Any) -> list[str]:
        steps: list[str] = self._keeper.steps(fleet)
        return steps

    def ask(self, fleet: Any) -> None:
        for step in self._keeper.steps(fleet):
            click.echo(f"dry run: {step}", err=True)


def _readings(url: str, made: Any, options: dict[str, Any], zero: float) -> tuple[Any, Any]:
    """(read: one reading of every worker, on_standing: what the control says of their roles).

    Workers are those of --targets, otherwise those that the endpoint lists or --control names; a list is asked for now and then.
    """
    from loadgen.control import Standing
    from loadgen.discover import again, discover, read_targets, with_told
    from loadgen.scrape import Scraper

    server = connect_of(options).endpoint(url)
    targets = read_targets(options["targets"]) if options["targets"] else None
    standing: Standing = made.get()
    found = with_told(discover(server, engine=options["engine"], targets=targets), standing.workers)
    scraper = Scraper(
        server,
        zero,
        lambda samples: None,
        workers=found.workers,
        engine=found.engine.name,
        find=(lambda: again(server, found).workers) if found.listed else None,
    )
    scraper.assign(standing.workers, standing.pages)

    def read() -> Any:
        scraper.look()
        return scraper.read()

    return read, lambda now: scraper.assign(now.workers, now.pages)


@control.command(**example("steelyard control keep --control vllm.toml --fleet 1:1"))
@click.option("--control", "control_spec", required=True, metavar="FILE", help='TOML file with kind = "vllm-router".')
@click.option("--fleet", required=True, metavar="P:D", help="Fleet at the beginning.")
def keep(control_spec: str, fleet: str) -> int:
    """Register the workers of a vllm-router, and go on doing so, until Ctrl-C: without it the router drops them.

    ``control set``, ``replay`` with a fleet, sweeps and ``control run`` tell this process which roles to register.
    """
    from loadgen.client import unsaid
    from loadgen.control import control_of, terminable
    from loadgen.control.vllm_router import VllmRouter, beat
    from traces.errors import InputError
    from traces.records import Fleet

    made = control_of(control_spec, connect_of({}))
    if not isinstance(made, VllmRouter):
        raise InputError(f'control keep is for kind = "vllm-router" (got {unsaid(control_spec)}).')
    with terminable():  # also as process 1 of a container, which SIGTERM would not end
        beat(made, Fleet.parse(fleet), lambda: False, lambda line: click.echo(f"{made.name}: {line}", err=True))
    return 0
