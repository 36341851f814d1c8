"""The verbs replay, worker and sweep."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import click

from advisor.cli.common import (
    GROUP,
    SECRET_FILE,
    SEED,
    TRACE,
    Number,
    db_option,
    emit_json,
    example,
    json_option,
    messages,
    or_dash,
    progress,
    quiet,
    spread,
    tls_options,
    token_of,
    typed,
    warn,
    workers_of,
)
from advisor.cli.control_verb import chosen, control_options, keeper_of, printed
from advisor.cli.reaching import reached, reaching
from advisor.cli.shaping import shape_options, shaped
from advisor.cli.steering import rule_of, seconds_between, steering, thresholds


def asked(f: Any) -> Any:
    """The options that say what is asked of which endpoint: shared by replay and sweep."""
    options = [
        click.option("--rate", type=Number(min=0, min_open=True), help="Mean requests per second."),
        click.option("--rate-factor", type=Number(min=0, min_open=True), help="Divide the recorded gaps by this."),
        click.option("--requests", type=click.IntRange(min=1), help="Only the first N requests of the trace."),
        click.option(
            "--ramp",
            type=Number(min=0),
            default=0.0,
            help="Seconds over which the rate rises; they are warm-up.",
        ),
        click.option(
            "--warmup",
            type=Number(min=0),
            default=0.0,
            help="Seconds (after the ramp) whose requests are sent and stored but stand in no figure.",
        ),
        click.option(
            "--workers", type=click.IntRange(0, 256), default=2, show_default=True, help="Local load workers."
        ),
        click.option(
            "--expect-workers",
            type=click.IntRange(min=1),
            help="Wait, ten minutes at most, for this many workers, others' included.",
        ),
        click.option(
            "--web",
            is_flag=False,
            flag_value="127.0.0.1:8089",
            metavar="HOST:PORT",
            help="Locust's web UI with live figures [without a value: 127.0.0.1:8089].",
        ),
        click.option(
            "--metrics-port",
            metavar="[HOST:]PORT",
            help="Serve live figures for Prometheus at http://127.0.0.1:PORT/metrics (0 takes a free port).",
        ),
        click.option(
            "--web-token-file",
            type=SECRET_FILE,
            metavar="FILE",
            help="Token that --web and --metrics-port ask for [or STEELYARD_WEB_TOKEN]; on other addresses than loopback they "
            "need one.",
        ),
        tls_options,
        click.option("--bind", default="127.0.0.1", show_default=True, help="HOST or HOST:PORT of the Locust master."),
        click.option("--slo", help='Limits per request, e.g. "ttft<0.5s tpot<50ms".'),
        click.option(
            "--prompts",
            type=click.Choice(["ids", "text"]),
            default="ids",
            show_default=True,
            help="Token ids (exact lengths) or words.",
        ),
        click.option(
            "--sessions",
            type=click.Choice(["recorded", "causal"]),
            default="recorded",
            show_default=True,
            help="Turns of a conversation at their recorded times, or each after the answer before it and the think time.",
        ),
        click.option(
            "--tokenizer",
            type=click.Path(path_type=Path),
            metavar="DIR",
            help="Folder with the model's tokenizer.json: prompts as text, exact to a token.",
        ),
        click.option("--prefixes", is_flag=True, help="Prompts share what the trace's block ids say they shared."),
        click.option(
            "--timeout",
            "timeout_s",
            type=Number(min=0, min_open=True),
            default=600.0,
            show_default=True,
            help="Seconds a request may take.",
        ),
        click.option("--gpus-per-worker", metavar="P,D", default="1,1", show_default=True, help="GPUs a worker uses."),
        click.option("--seed", type=SEED, default=0, show_default=True, help="Seed, stored with the run."),
    ]
    for option in reversed(options):
        f = option(f)
    return shape_options(reaching(f))


def pair(text: str) -> tuple[int, int]:
    """``1,2`` as GPUs per (prefill, decode) worker."""
    prefill, _, decode = text.partition(",")
    numbers = [int(n) if re.fullmatch("[0-9]{1,4}", n.strip()) else 0 for n in (prefill, decode)]
    if min(numbers) < 1:
        raise click.UsageError(
            f"--gpus-per-worker takes PREFILL,DECODE, both from 1 to 9999, for example 1,2 (got {text!r})."
        )
    return numbers[0], numbers[1]


def schedule_of(store: Any, trace: str, options: dict[str, Any]) -> tuple[Any, float]:
    """(schedule as asked, rate factor) from a stored trace; a shipped trace that is not there yet is said to be one."""
    from traces.errors import InputError
    from traces.shape import head, ramp, scale_rate, to_rate
    from traces.shipped import NAMES

    _one_rate(options)
    factor = float(options["rate_factor"] or 1.0)
    try:
        if _long(store.trace(trace), options):
            feed = store.feed(trace, rate_factor=factor, rate_per_s=options["rate"])
            return feed, feed.rate_per_s / store.feed(trace).rate_per_s if options["rate"] else factor
        recorded = store.schedule(trace, blocks=options["prefixes"], sessions=True)
    except InputError as error:
        if trace in NAMES:
            raise InputError(
                f"trace {trace!r} ships with steelyard but is not in this database. Run: steelyard ingest {trace}"
            ) from None
        raise error
    recorded = shaped(recorded, options, options["seed"])
    schedule = head(recorded, options["requests"]) if options["requests"] else recorded
    if options["rate"]:
        factor = options["rate"] / schedule.rate_per_s
        schedule = to_rate(schedule, options["rate"])
    else:
        schedule = scale_rate(schedule, factor)
    return ramp(schedule, options["ramp"]) if options["ramp"] else schedule, factor


def _one_rate(options: dict[str, Any]) -> None:
    for name in ("rate", "rate_factor"):
        if typed("rate", "rate_factor") and not typed(name):
            options[name] = None
    if options["rate"] and options["rate_factor"]:
        raise click.UsageError("give --rate or --rate-factor, not both.")


FEED_FROM = 500_000
"""Requests of a trace that is read while it is replayed, if nothing is asked that needs it as a whole."""


def _long(info: Any, options: dict[str, Any]) -> bool:
    """Is the trace long, and does no option need all its requests at once?"""
    from advisor.cli.shaping import SHAPES

    whole = any(options.get(name) for name in (*SHAPES, "requests", "ramp", "order", "prefixes", "saturate"))
    held = options.get("sessions") == "causal" or options.get("policy", "static") != "static"
    return int(info.summary.get("rows_kept", 0)) > FEED_FROM and not whole and not held


def how(endpoints: Sequence[str], options: dict[str, Any], slo: Any) -> tuple[Any, dict[str, Any]]:
    """(targets, keyword arguments of :func:`loadgen.replay.replay`) from the options."""
    from loadgen.discover import read_targets
    from loadgen.engines import single_token_words

    where = reached(endpoints, options)
    return where, {
        "engine": options["engine"],
        "model": options["model"],
        "targets": read_targets(options["targets"]) if options["targets"] else None,
        "chat": options["chat"],
        "text": options["prompts"] == "text" or options["tokenizer"] is not None,
        "prefixes": options["prefixes"],
        "words": single_token_words(options["tokenizer"]) if options["tokenizer"] else None,
        "sessions": options["sessions"],
        "warmup_s": options["ramp"] + options["warmup"],
        "timeout_s": options["timeout_s"],
        "gpus_per_worker": pair(options["gpus_per_worker"]),
        "seed": options["seed"],
        "slo": slo,
    }


def result(store: Any, run: Any) -> dict[str, Any]:
    """The JSON of one run, with the keys of the house."""
    from advisor.cli.run_verbs import figures

    return {"run": run.id} | figures(run, store.figures(run))


@click.command(
    **example("steelyard replay azure-2023-conv --endpoint http://127.0.0.1:8080 --fleet 3:5 --requests 100")
)
@click.argument("trace", type=TRACE)
@click.option(
    "--endpoint",
    "endpoints",
    required=True,
    multiple=True,
    metavar="URL",
    help="Base URL of the OpenAI-shaped endpoint; several (repeat it) get the requests in turn.",
)
@click.option("--fleet", metavar="P:D", help="Put this fleet in force first, or say which it is.")
@click.option("--name", default="", help="Name of the run [default: the trace's].")
@click.option("--group", type=GROUP, default="", help="Group that the run belongs to.")
@click.option(
    "--policy",
    type=click.Choice(["static", "online", "online-report"]),
    default="static",
    show_default=True,
    help="online: move workers during the run, by the thresholds of an answer (--recommendation, --thresholds) or by backlog "
    "in seconds (--laws); online-report: by 1.5x counts.",
)
@steering
@click.option(
    "--tick",
    type=Number(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="online: seconds between decisions; thresholds bring their own.",
)
@click.option(
    "--order",
    type=click.Choice(
        ["arrival", "shortest-prompt", "longest-prompt", "longest-decode", "predicted-decode", "two-stage", "groups"]
    ),
    help="Offline: all requests due at 0, dispatched in this order (groups: batches within 1.25x, one after another). "
    "longest-decode and two-stage know the recorded answer lengths, as no deployment does; predicted-decode orders by what "
    "--history foretells.",
)
@click.option("--history", metavar="TRACE", help="predicted-decode: stored trace whose lengths foretell the answers'.")
@click.option("--in-flight", type=click.IntRange(min=1), help="Offline: at most this many at once [default: all].")
@click.option(
    "--change",
    "changes",
    multiple=True,
    metavar="SECONDS=P:D",
    help="Change the fleet during the run, to see what that costs (repeatable).",
)
@click.option(
    "--max-switches-per-hour",
    type=Number(min=0),
    help="online: more moves are not made, of however many workers [default: no limit].",
)
@click.option(
    "--stale-after",
    "stale_s",
    type=Number(min=0, min_open=True),
    default=10.0,
    show_default=True,
    help="online: seconds without a reading after which nothing is moved.",
)
@control_options
@asked
@json_option
@db_option
def replay(
    trace: str,
    endpoints: tuple[str, ...],
    fleet: str | None,
    name: str,
    group: str,
    control_spec: str | None,
    dry_run: bool,
    db: str,
    as_json: bool,
    **options: Any,
) -> int:
    """Replay a trace against an endpoint through Locust and store every request.

    Requests leave at their recorded times, whatever the answers do; with --order they leave as the client's own queue
    lets them. A fleet that was put in force stays at the end; after Ctrl-C or an error the old one comes back.
    Exit code 4 when the run is incomplete or the generator was too late to be trusted.
    """
    crew = begun(0 if dry_run else options["workers"])
    _give_way(options)

    from loadgen.replay import Interrupted
    from loadgen.replay import replay as run_replay
    from traces.measures import Slo
    from traces.records import Fleet
    from traces.store import open_store

    slo = Slo.parse(options["slo"]) if options["slo"] else None
    wanted = Fleet.parse(fleet) if fleet else None
    where, arguments = how(endpoints, options, slo)
    interrupted = False
    with open_store(db, create=False) as store:
        schedule, factor = schedule_of(store, trace, options)
        past = store.schedule(options["history"]) if options["history"] else None
        known = thresholds(store, options)
        schedule, strategy = _strategy(schedule, options, slo, known, past)
        wanted = wanted or _start(known)
        keeping = _keeping(control_spec, where[0], "replay", options, as_json, put_back=False)
        # Refused now, with nothing sent, where a fleet of the run can never be in force.
        steps = keeping.steps(wanted) if wanted and keeping else []
        later = [(at, fleet, keeping.steps(fleet) if keeping else []) for at, fleet in _changes(options["changes"])]
        if dry_run:
            steps.append(f"send {len(schedule)} requests of {trace} to {where[0].shown}")
            steps += [
                f"at {at:g} s: {'; '.join(todo) or 'nothing, as it is now'} ({fleet})" for at, fleet, todo in later
            ]
            return printed(steps, f"replay {trace}", as_json)
        with (
            swarm_of(options, as_json, crew) as swarm,
            watched(options, as_json) as show_to,
            progress(as_json) as bars,
        ):
            task = bars.add_task(f"replay {trace}", total=len(schedule))

            def on_live(live: Any) -> None:
                bars.update(task, note=live.line, left=live.left_s)
                show_to(live)

            try:
                with keeping or nullcontext() as keeper:
                    run = run_replay(
                        store,
                        swarm,
                        schedule,
                        where,
                        name=name,
                        fleet=wanted,
                        group=group,
                        rate_factor=factor,
                        on_progress=lambda done, _: bars.update(task, completed=done),
                        on_live=on_live,
                        control=keeper,
                        **arguments,
                        **strategy,
                    )
            except Interrupted as stop:
                run, interrupted = stop.run, True
        found = result(store, run) | history(store, run.id)
    if as_json:
        emit_json(found)
    else:
        show(found, run)
    if interrupted:
        return 130
    return 0 if run.complete and run.verdict != "invalid" else 4


def _give_way(options: dict[str, Any]) -> None:
    """Take out what nobody typed and what was typed excludes: of --policy, --order and --change there can be one."""
    if typed("order", "changes") or (typed("policy") and options["policy"] != "static"):
        none = {"policy": "static", "order": None, "changes": ()}
        options |= {name: value for name, value in none.items() if not typed(name)}
    if options["order"] != "predicted-decode" and not typed("history"):
        options["history"] = None


def _start(known: dict[str, Any] | None) -> Any:
    """The fleet that thresholds start from, where they name one."""
    from traces.errors import InputError
    from traces.records import Fleet

    start = known.get("start") if known else None
    if not known or not isinstance(start, dict):
        return None
    try:
        return Fleet.of(start)
    except InputError as error:
        raise InputError(f"{known['where']}: start of the thresholds: {error}") from None


def _strategy(
    schedule: Any, options: dict[str, Any], slo: Any, known: dict[str, Any] | None = None, past: Any = None
) -> tuple[Any, dict[str, Any]]:
    """(schedule, keyword arguments of replay) for --policy and --order. known: thresholds of an answer. past: the
    requests of --history, or None."""
    from dataclasses import replace

    import numpy as np

    from loadgen import policy
    from loadgen.cluster import Profile
    from traces.errors import InputError

    kind, order = options["policy"], options["order"]
    limits = {"tick_s": options["tick"], "stale_s": options["stale_s"]}
    if options["max_switches_per_hour"] is not None:
        limits["most_per_hour"] = options["max_switches_per_hour"]
    if options["changes"]:
        if kind != "static" or order is not None:
            raise click.UsageError("--change says itself when the fleet changes: not with --policy or --order.")
        from loadgen.control.online import Planned

        return schedule, {"steering": Planned(_changes(options["changes"])), "policy": "planned"} | limits
    laws = Profile.load(options["laws"]) if options["laws"] else None
    if order is None:
        if options["in_flight"] and typed("in_flight"):
            raise click.UsageError("--in-flight belongs to --order: an open loop waits for nobody.")
        if kind == "static":
            return schedule, {}
        prompt, output = (float(np.mean(tokens)) for tokens in (schedule.prompt_tokens, schedule.output_tokens))
        rule = rule_of(options, known, slo, prompt, output, schedule)
        tick_s = seconds_between(options["tick"], known)
        return schedule, {"steering": policy.Steering(rule), "policy": kind} | limits | {"tick_s": tick_s}
    if kind != "static":
        raise click.UsageError("give --order or --policy, not both: offline work does not watch queues.")
    if order == "two-stage" and laws is None:
        raise InputError("--order two-stage compares the stages' times: give --laws.")
    if (order == "predicted-decode") != (past is not None):
        raise click.UsageError("--order predicted-decode and --history TRACE belong together.")
    said = ["all due at 0"]
    lengths = schedule.output_tokens
    if order == "groups":
        batches = policy.groups(schedule.prompt_tokens)
    else:
        how, timed = order, laws or Profile(name="none", c0_s=1.0)
        if past is not None:
            how = "longest-decode"
            lengths = policy.predicted(schedule.prompt_tokens, past.prompt_tokens, past.output_tokens)
            said.append(
                f"order by answer lengths that {past.name} foretells (rank correlation with the recorded ones "
                f"{policy.rank_correlation(lengths, schedule.output_tokens):+.2f})"
            )
        elif order in ("longest-decode", "two-stage"):
            said.append(f"order {order} by the recorded answer lengths: an oracle, no deployment knows them")
        batches = [policy.order(how, schedule.prompt_tokens, lengths, timed)]
    changed = replace(schedule, due_s=np.zeros(len(schedule)), changes=(*schedule.changes, *said))
    dispatch = policy.Dispatch(tuple((tuple(b), None) for b in batches), 0.0, options["in_flight"] or 0)
    return changed, {"dispatch": dispatch, "policy": f"offline-{order}"}


def _changes(texts: Sequence[str]) -> list[tuple[float, Any]]:
    """``5=2:1`` as (5.0 seconds, fleet)."""
    from traces.records import Fleet

    found = []
    for text in texts:
        at, equals, fleet = text.partition("=")
        try:
            seconds = float(at)
        except ValueError:
            seconds = -1.0
        if not equals or not 0 <= seconds < 1e9:
            raise click.UsageError(f"--change takes SECONDS=P:D, for example 30=2:1 (got {text!r}).")
        found.append((seconds, Fleet.parse(fleet)))
    return found


def _keeping(spec: str | None, where: Any, verb: str, options: dict[str, Any], as_json: bool, *, put_back: bool) -> Any:
    """The keeper of the fleet that ``--control``, or the endpoint's own ``/fleet``, sets; None where nothing does."""
    from loadgen.control import Endpoint
    from loadgen.control.reference import Reference

    server = Endpoint(where)
    made = chosen(spec, None, options) if spec else Reference(server) if server.fleet() is not None else None
    return keeper_of(made, verb, options, as_json, put_back=put_back) if made is not None else None


def begun(workers: int) -> Any:
    """The load workers' processes, until the verb ends. Asked for first: they load Locust while the verb loads what it needs."""
    from loadgen.crew import Crew

    return click.get_current_context().with_resource(Crew(workers))


@contextmanager
def swarm_of(options: dict[str, Any], as_json: bool, crew: Any) -> Iterator[Any]:
    """The swarm that the options ask for; says where workers join when others are expected."""
    from loadgen.swarm import Swarm

    expect = options["expect_workers"]
    web = door_of(options, "web") if options["web"] else None
    swarm = Swarm(options["workers"], expect=expect, bind=options["bind"], web=web, crew=crew)

    def listening(address: str) -> None:
        if web is not None:
            warn(web.warning)
            messages(as_json).print(f"Watch at {swarm.web}", markup=False)
        if expect and expect > options["workers"]:
            joining = f"Waiting for {expect - options['workers']} more workers: steelyard worker --master {address}"
            messages(as_json).print(joining, markup=False)

    swarm.on_listen = listening
    with swarm:
        yield swarm


def door_of(options: dict[str, Any], name: str) -> Any:
    """How --web or --metrics-port is reached: HOST:PORT, or PORT on loopback."""
    from loadgen.ports import Door

    host, _, port = options[name].rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise click.UsageError(f"--{name.replace('_', '-')} takes PORT or HOST:PORT (got {options[name]!r}).")
    token = token_of(options["web_token_file"], "--web-token-file", "STEELYARD_WEB_TOKEN")
    return Door(host.strip("[]") or "127.0.0.1", int(port), token, options["tls_cert"], options["tls_key"])


@contextmanager
def watched(options: dict[str, Any], as_json: bool) -> Iterator[Any]:
    """What gets the live figures besides the progress bar: the Prometheus endpoint that --metrics-port asks for."""
    if options["metrics_port"] is None:
        yield lambda live: None
        return
    from loadgen.exposition import exposed

    door = door_of(options, "metrics_port")
    with exposed(door) as (url, watch):
        warn(door.warning)
        messages(as_json).print(f"Metrics at {url}", markup=False)
        yield watch


def history(store: Any, run_id: int) -> dict[str, Any]:
    """What moved a run's fleet, and what a controller decided meanwhile."""
    changes = [
        {
            "asked_s": c.asked_s,
            "ready_s": c.ready_s,
            "before": str(c.before),
            "after": str(c.after),
            "reason": c.reason,
            "joined_s": c.joined_s,
            "first_served_s": c.first_served_s,
            "in_flight": None if c.in_flight < 0 else c.in_flight,
            "failed": None if c.failed < 0 else c.failed,
            "slowed": None if c.slowed < 0 else c.slowed,
        }
        for c in store.fleet_changes(run_id)
    ]
    decisions = [
        {"at_s": d.at_s, "until_s": d.until_s, "action": d.action, "reason": d.reason, "repeats": d.repeats}
        | {"before": str(d.before) if d.before else None, "after": str(d.after) if d.after else None}
        for d in store.decisions(run_id)
    ]
    return {"fleet_changes": changes, "decisions": decisions}


def show(found: dict[str, Any], run: Any) -> None:
    """Print one run for people."""
    console = messages()
    failed = ", ".join(f"{n} {kind}" for kind, n in found["failed"].items()) or "none"
    rest = "".join(f"; {word}: {found[word]}" for word in ("cancelled", "lost") if found[word])
    verdict = run.verdict + ("" if run.complete else ", INCOMPLETE") if run.ended else "running or broken off"
    lag = [or_dash(found["lag_ms"][word], ".1f") for word in ("p50", "p99", "max")]
    lines = [
        f"run {run.id}: {run.trace} on {run.endpoint}" + (f", fleet {run.fleet}" if run.fleet else ""),
        f"  {found['ok']} of {found['scheduled']} ok; failed: {failed}; unsent: {found['unsent']}{rest}",
        f"  TTFT {spread(found['ttft_ms'])}   TPOT {spread(found['tpot_ms'])}   E2E {spread(found['e2e_ms'])}   (from due)",
        f"  goodput {or_dash(found['goodput_per_s'], '.2f')}/s"
        + (f" within {run.slo}" if run.slo else " (no SLO given: every answer counts)"),
        f"  generator: send lag p50 {lag[0]}  p99 {lag[1]}  max {lag[2]} ms -> {verdict}",
        *([f"  {run.reason}"] if run.reason else []),
    ]
    for change in found.get("fleet_changes", ()):
        ready = (
            f"in force at {change['ready_s']:.1f} s"
            if change["ready_s"] == change["ready_s"]
            else "not in force at the end"
        )
        lines.append(
            f"  {change['before']} -> {change['after']} at {change['asked_s']:.1f} s, {ready}: {change['reason']}"
        )
        if change["in_flight"] is not None:
            served = change["first_served_s"]
            served = f"first served at {served:.1f} s" if served == served else "not seen to serve"
            slowed = "" if change["slowed"] is None else f", {change['slowed']} slowed"
            lines.append(f"    {served}; of {change['in_flight']} requests under way {change['failed']} failed{slowed}")
    for line in lines:
        console.print(line, markup=False)


@click.command(**example("steelyard worker --master 10.0.0.5:5557"))
@click.option("--master", required=True, metavar="HOST:PORT", help="Address that the replay printed.")
@click.option("--wait", is_flag=True, help="Wait for the master as long as it takes, as under a Deployment.")
def worker(master: str, wait: bool) -> int:
    """Join a replay's master from this or another machine, and send a share of its requests.

    Both must be given the same STEELYARD_SWARM_SECRET; the endpoint's credentials travel sealed by it.
    """
    from loadgen.swarm import work

    patience = "as long as it takes" if wait else "five minutes at most"
    messages(False).print(f"Joining the master at {master}, or waiting for it, {patience}.", markup=False)
    return work(master, wait=wait)


@click.command(**example("steelyard sweep azure-2023-conv --profile demo --fleets 2:6,4:4 --requests 60 --rate 3"))
@click.argument("trace", type=TRACE)
@click.option(
    "--endpoint", metavar="URL", help="Endpoint whose fleet can be set [default: an embedded one, see --profile]."
)
@click.option("--profile", default="demo", show_default=True, help="Profile of the embedded endpoint.")
@click.option("--fleets", metavar="P:D,P:D,...", help="Fleets to measure.")
@click.option("--all", "every", is_flag=True, help="Every split of --gpus.")
@click.option("--gpus", type=click.IntRange(min=2), default=8, show_default=True, help="GPUs to split.")
@click.option(
    "--repeats", type=click.IntRange(min=1), default=1, show_default=True, help="Times each fleet is measured."
)
@click.option("--rates", metavar="R,R,...", help="Requests per second to measure each fleet at, instead of --rate.")
@click.option(
    "--anchor/--no-anchor",
    default=None,
    help="Measure the middle cell at the beginning and the end of each repeat, to see drift [default: from 4 cells on].",
)
@click.option("--saturate", is_flag=True, help="Search the highest rate that each fleet sustains within --slo.")
@click.option(
    "--attainment",
    type=Number(0, 1, min_open=True),
    default=0.9,
    show_default=True,
    help="--saturate: share of requests that must meet the SLO.",
)
@click.option(
    "--tolerance",
    type=Number(0, 1, min_open=True),
    default=0.05,
    show_default=True,
    help="--saturate: how near the rates that held and failed must be.",
)
@click.option(
    "--group",
    type=GROUP,
    default="",
    help="Group name; of one that is there, what is missing is measured [default: sweep-DATE-TIME].",
)
@control_options
@asked
@json_option
@db_option
def sweep(
    trace: str,
    endpoint: str | None,
    profile: str,
    fleets: str | None,
    every: bool,
    gpus: int,
    repeats: int,
    rates: str | None,
    anchor: bool | None,
    saturate: bool,
    attainment: float,
    tolerance: float,
    group: str,
    control_spec: str | None,
    dry_run: bool,
    db: str,
    as_json: bool,
    **options: Any,
) -> int:
    """Replay a trace on several fleets, at one rate or several, in random order, and put them side by side.

    The order is shuffled by --seed, so that a drift of the server does not look like an effect of the fleet. A sweep that was
    broken off goes on with the same command and --group. The fleet that was in force before is put back at the end, after
    Ctrl-C too.
    """
    crew = begun(options["workers"])

    from advisor.cli.run_verbs import table
    from loadgen.sweep import plan
    from loadgen.sweep import saturate as search
    from loadgen.sweep import sweep as measure
    from traces.errors import InputError
    from traces.measures import Slo
    from traces.records import Fleet
    from traces.shape import ramp, to_rate
    from traces.store import open_store

    if typed("every", "fleets"):
        every, fleets = every and typed("every"), fleets if typed("fleets") else None
    if typed("rates"):
        options |= {name: options[name] if typed(name) else None for name in ("rate", "rate_factor")}
        saturate = saturate and typed("saturate")
    elif typed("rate", "rate_factor", "saturate"):
        rates = None
    if bool(fleets) == every:
        raise click.UsageError("give --fleets 2:6,3:5 or --all.")
    if rates and (options["rate"] or options["rate_factor"] or saturate):
        raise click.UsageError("--rates stands for itself: not with --rate, --rate-factor or --saturate.")
    _one_rate(options)
    per = pair(options["gpus_per_worker"])
    wanted = [Fleet.parse(text) for text in fleets.split(",")] if fleets else Fleet.splits(gpus, per)
    if not wanted:
        raise InputError(
            f"{gpus} GPUs at {per[0]} and {per[1]} GPUs a worker make no fleet with both roles. Give other --gpus."
        )
    slo = Slo.parse(options["slo"] or "ttft<0.5s tpot<50ms")
    with open_store(db, create=False) as store:
        schedules, factors = [], []
        # A search scales what was recorded to each rate, and ramps after that.
        as_recorded = {"saturate": True, "rate_factor": None, "ramp": 0.0} if saturate else {}
        for rate in _rates(rates) if rates else [None if saturate else options["rate"]]:
            schedule, factor = schedule_of(store, trace, options | {"rate": rate} | as_recorded)
            schedules.append(schedule)
            factors.append(factor)
        recorded = schedules[0]

        def at_rate(rate: float) -> Any:
            scaled = to_rate(recorded, rate)
            return ramp(scaled, options["ramp"]) if options["ramp"] else scaled

        start_per_s = options["rate"] or recorded.rate_per_s * (options["rate_factor"] or 1.0)
        if saturate:
            schedules = [at_rate(start_per_s)]
        cells = len(wanted) * len(schedules)
        anchored = cells >= 4 if anchor is None else anchor
        n = len(schedules[0])
        runs_planned = cells * repeats + (repeats + 1 if anchored else 0)
        group = group or time.strftime("saturate" if saturate else "sweep") + time.strftime(
            "-%Y%m%d-%H%M%S", time.gmtime()
        )
        if not saturate and not quiet():
            messages(as_json).print(
                f"group {group}: if this is broken off, go on with --group {shlex.quote(group)}", markup=False
            )
        with progress(as_json) as bars:
            task = bars.add_task("sweep", total=None if saturate else runs_planned * n)
            cell = ""

            def note(line: str, done: int) -> None:
                nonlocal cell
                cell = line
                bars.update(task, completed=done)

            with (
                swarm_of(options, as_json, crew) as swarm,
                watched(options, as_json) as show_to,
                endpoint_of(endpoint, profile, wanted[0]) as url,
                ExitStack() as stack,
            ):
                where, arguments = how([url], options, slo)
                keeping = _keeping(control_spec, where[0], "sweep", options, as_json, put_back=True)
                if dry_run:
                    order = plan(wanted, len(schedules), seed=options["seed"], repeats=repeats, anchor=anchored)
                    steps = [f"{fleet} at {schedules[k].rate_per_s:.3g}/s" for fleet, k in order]
                    for fleet in wanted:
                        steps += keeping.steps(fleet) if keeping is not None else []
                    return printed(steps, f"sweep {trace}: cells in their order, then what each fleet takes", as_json)
                if keeping is not None:
                    arguments["control"] = stack.enter_context(keeping)

                def on_live(live: Any) -> None:
                    bars.update(task, note=lambda: f"{cell}: {live.line()}")
                    show_to(live)

                arguments["on_live"] = on_live
                if saturate:
                    found = [
                        search(
                            store,
                            swarm,
                            at_rate,
                            where,
                            fleet,
                            start_per_s=start_per_s,
                            recorded_per_s=recorded.rate_per_s,
                            attainment=attainment,
                            tolerance=tolerance,
                            group=group,
                            note=note,
                            **arguments,
                        )
                        for fleet in wanted
                    ]
                else:
                    seed = arguments.pop("seed")
                    group, runs, drift = measure(
                        store,
                        swarm,
                        schedules,
                        where,
                        wanted,
                        seed=seed,
                        repeats=repeats,
                        anchor=anchored,
                        group=group,
                        factors=factors,
                        note=note,
                        say=lambda line: None if quiet() else messages(as_json).print(line, markup=False),
                        **arguments,
                    )
        put_back = keeping is None or not keeping.stranded  # why not is said already
        if saturate:
            code = _saturated(found, group, slo, attainment, as_json, put_back)
            return code if put_back else 1
        rows = [result(store, run) for run in runs]
    if as_json:
        anchor_said = None if drift is None else {"runs": drift.runs, "largest": drift.largest} | {
            "ttft_p50_ms": [v * 1e3 for v in drift.ttft_p50_s], "tpot_p50_ms": [v * 1e3 for v in drift.tpot_p50_s],
        }  # fmt: skip
        emit_json({"group": group, "runs": rows, "anchor": anchor_said, "put_back": put_back})
    else:
        shown = ", ".join(f"{s.rate_per_s:.3g}" for s in schedules)
        table(rows, f"group {group}: {trace}, {n} requests at {shown}/s, goodput within {slo}")
        if drift is not None:
            medians = ", ".join(f"{t * 1e3:.1f}" for t in drift.ttft_p50_s)
            messages().print(
                f"anchor {order_name(runs, drift)}: TTFT p50 {medians} ms; largest difference {drift.largest:.0%}",
                markup=False,
            )
    if not put_back:
        return 1
    return 0 if all(run.complete and run.verdict != "invalid" for run in runs) else 4


def order_name(runs: Any, drift: Any) -> str:
    """The anchor's fleet, and the runs in which it was measured."""
    fleet = next(run.fleet for run in runs if run.id == drift.runs[0])
    return f"{fleet} (runs {', '.join(map(str, drift.runs))})"


def _rates(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < rate < 1e9 for rate in found):
        raise click.UsageError(f"--rates takes requests per second, for example 4,8,12 (got {text!r}).")
    return found


def _saturated(found: Sequence[Any], group: str, slo: Any, attainment: float, as_json: bool, put_back: bool) -> int:
    """Print what each fleet sustains; 3 if none holds the SLO at any rate."""
    if as_json:
        emit_json({"group": group, "slo": str(slo), "attainment": attainment, "fleets": [
            {
                "fleet": workers_of(f.fleet), "held_per_s": f.held_per_s,
                "failed_per_s": f.failed_per_s, "goodput_per_s": f.goodput_per_s, "runs": f.runs,
                "reason": f.reason,
            }
            for f in found
        ], "put_back": put_back})  # fmt: skip
    else:
        within = f"within {slo}" if slo.constraints else f"with {attainment:.0%} within {slo}"
        for f in found:
            bound = "" if f.failed_per_s == f.failed_per_s else "at least "
            held = (
                f"sustains {bound}{f.held_per_s:.4g}/s"
                if f.held_per_s == f.held_per_s
                else "sustains no rate that was tried"
            )
            above = f", not {f.failed_per_s:.4g}/s" if f.failed_per_s == f.failed_per_s else ""
            goodput = f"; goodput {f.goodput_per_s:.4g}/s" if f.goodput_per_s == f.goodput_per_s else ""
            messages().print(
                f"{f.fleet}: {held}{above} {within}{goodput} ({len(f.runs)} runs, group {group})"
                + (f". {f.reason}" if f.reason else ""),
                markup=False,
            )
    return 0 if any(f.held_per_s == f.held_per_s for f in found) else 3


@contextmanager
def endpoint_of(url: str | None, profile: str, fleet: Any) -> Iterator[str]:
    """The URL given, or an embedded reference endpoint."""
    if url is not None:
        yield url
        return
    from loadgen.cluster.embedded import embedded

    with embedded(profile, fleet) as own:
        yield own
