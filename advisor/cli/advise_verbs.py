"""The verbs advise and report."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from advisor.cli.common import (
    GROUP,
    RUN,
    SEED,
    TRACE,
    Number,
    db_option,
    emit_json,
    example,
    json_option,
    messages,
    progress,
    typed,
    warn,
)
from advisor.cli.replay_verbs import pair
from traces.errors import EndpointError, InputError, SteelyardError


def question(f: Any) -> Any:
    """The options that say what is asked: shared by advise and report."""
    options = [
        click.option("--gpus", type=click.IntRange(min=1), help="GPUs to split [default: those of the latest run]."),
        click.option("--slo", help='Limits per request, e.g. "ttft<0.5s tpot<50ms", or constraints, e.g. ttft_p99<1s.'),
        click.option("--trace", type=TRACE, help="Trace to be served [default: the latest run's]."),
        click.option("--rate", type=Number(min=0, min_open=True), help="Requests per second [default: the trace's]."),
        click.option("--requests", type=click.IntRange(min=1), help="Only the first N requests of the trace."),
        click.option("--run", "run_ids", type=RUN, multiple=True, help="Learn from this run (repeatable)."),
        click.option("--group", type=GROUP, help="Learn from the runs of this sweep or demo."),
        click.option("--endpoint-name", "endpoint", help="Learn from runs against this endpoint URL or model."),
        click.option(
            "--gpus-per-worker", metavar="P,D", help="GPUs a prefill and a decode worker use [default: the runs']."
        ),
        click.option(
            "--attainment",
            type=Number(0, 1),
            default=0.9,
            show_default=True,
            help="Share of requests that must meet the limits for a fleet to count.",
        ),
        click.option(
            "--current", metavar="P:D", help="The fleet in production: compared with, and preferred in a tie."
        ),
        click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the bootstrap."),
    ]
    for option in reversed(options):
        f = option(f)
    return f


def ask(db: str, as_json: bool, **options: Any) -> Any:
    """Open the database and advise, with a progress bar for each step."""
    from joblib import cpu_count

    from advisor.advise import advise as answer_for
    from advisor.cli.progress import Steps
    from advisor.parallel import cores
    from traces.records import Fleet
    from traces.store import open_store

    text = options["gpus_per_worker"]
    options["gpus_per_worker"] = pair(text) if text else None
    options["rate_per_s"] = options.pop("rate")
    options["current"] = Fleet.parse(options["current"]) if options["current"] else None
    with open_store(db, create=False) as store, progress(as_json) as bars, cores(cpu_count()):
        return answer_for(store, note=Steps(bars), **options)


@click.command(**example('steelyard advise --gpus 8 --slo "ttft<0.5s tpot<50ms" --trace azure-2023-conv --rate 12'))
@question
@click.option(
    "--strategy",
    type=click.Choice(["auto", "static", "online", "offline"]),
    default="auto",
    show_default=True,
    help="Whether the split should stand still, move by thresholds, or work be collected and ordered; auto chooses.",
)
@click.option(
    "--concurrency",
    type=Number(min=1),
    metavar="N",
    help="Ask means of closed loops (runs import --aggregate) instead: which split serves most with N requests in flight?",
)
@click.option(
    "--deadline",
    "deadline_s",
    type=Number(min=0, min_open=True),
    metavar="SECONDS",
    help="How long after its arrival an answer may come, if requests can wait: offline is considered.",
)
@click.option("--gpu-hour-usd", type=Number(min=0, min_open=True), help="Price of a GPU hour: cost a million tokens.")
@click.option(
    "--target-rate",
    "target_rate_per_s",
    type=Number(min=0, min_open=True),
    help="Requests per second: how many GPUs keep the SLO then?",
)
@click.option(
    "--export",
    "exported",
    type=click.Choice(["kubernetes", "dynamo", "llm-d", "keda", "prometheus-rules"]),
    help="Also write the answer for another tool, to --export-out.",
)
@click.option(
    "--export-out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File of --export [default: steelyard-KIND.yaml].",
)
@click.option(
    "--audit", is_flag=True, help="Leave runs, ratios and rates out, predict them, and say how far off that is."
)
@click.option(
    "--auto", is_flag=True, help="Measure first: run the probes on --endpoint until sure, or the --budget is spent."
)
@click.option("--endpoint", "url", metavar="URL", help="auto: an endpoint whose split steelyard can set.")
@click.option(
    "--budget", default="10m", show_default=True, metavar="TIME", help="auto: how long to measure, e.g. 90s, 10m."
)
@click.option("--profile-out", type=click.Path(dir_okay=False, path_type=Path), help="Write the fitted laws as TOML.")
@json_option
@db_option
def advise(
    db: str,
    as_json: bool,
    profile_out: Path | None,
    exported: str | None,
    export_out: Path | None,
    auto: bool,
    url: str | None,
    budget: str,
    concurrency: float | None,
    **options: Any,
) -> None:
    """Recommend a P:D ratio from stored runs: fitted laws, every split simulated on the trace, with intervals.

    And whether it should ever move: the thresholds of the answer run as they are with replay --policy online
    --recommendation ID.
    """
    open_loop = open_only()
    if concurrency is not None and open_loop and typed("concurrency"):
        raise click.UsageError(f"{open_loop} asks about traffic that comes at a rate: not with --concurrency.")
    if concurrency is not None and not open_loop:
        ask_closed(db, as_json, concurrency, options)
        return
    auto = auto and (typed("auto") or not typed("run_ids", "group", "endpoint"))
    if auto and not url:
        raise click.UsageError("--auto measures: give the --endpoint URL.")
    if typed("url") and not auto:
        raise click.UsageError("--endpoint belongs to --auto; to learn from the runs of one give --endpoint-name.")
    probing = measured(db, as_json, str(url), seconds(budget), options) if auto else None
    if probing is not None and not probing.sure:
        options["warnings"] = [f"--auto ended before the answer was sure: {probing.reason}"]
    answer = ask(db, as_json, **options)
    if probing is not None:
        answer.extra["probing"] = asdict(probing)
    refused: SteelyardError | None = None
    if probing is not None and not probing.put_back:
        from loadgen.client import unsaid

        refused = EndpointError(
            f"{unsaid(str(url))}: the split that was in force is not put back. Run: steelyard control restore"
        )
    if profile_out or exported:
        from advisor.exports import export
        from advisor.report import write_report

        path = export_out or Path(f"steelyard-{exported}.yaml")
        try:
            if profile_out:
                write_report(profile_out, answer.recommendation.fit.profile.to_toml())
            if exported:
                write_report(path, export(answer.as_json(), exported))
                answer.extra["export"] = str(path)
        except InputError as error:
            refused = error  # what was asked, and perhaps measured, is said all the same
    if as_json:
        emit_json(answer.as_json() | ({"error": str(refused), "exit_code": refused.exit_code} if refused else {}))
    else:
        show(answer.recommendation)
        show_choice(answer, db)
    if refused:
        warn(str(refused))
        raise click.exceptions.Exit(refused.exit_code)


def open_only() -> str:
    """An option that was typed and that a closed loop has no use for; "" if none was."""
    context = click.get_current_context()
    takes = ("gpus", "slo", "trace", "run_ids", "group", "endpoint", "gpus_per_worker", "seed")
    others = [name for name in context.params if typed(name) and name not in (*takes, "concurrency", "as_json", "db")]
    return next((p.opts[0] for p in context.command.params if p.name in others), "")


def ask_closed(db: str, as_json: bool, concurrency: float, options: dict[str, Any]) -> None:
    """The question of a closed loop: answer it from means, and print that."""
    from advisor.advise import choose_runs
    from advisor.closed import advise_closed
    from traces.measures import Slo
    from traces.store import open_store

    lengths = None
    with open_store(db, create=False) as store:
        runs = choose_runs(store, ids=options["run_ids"], group=options["group"], endpoint=options["endpoint"])
        if options["trace"]:
            asked = store.schedule(options["trace"])
            lengths = float(asked.prompt_tokens.mean()), float(asked.output_tokens.mean())
        answer = advise_closed(
            store,
            runs,
            concurrency,
            gpus=options["gpus"],
            slo=Slo.parse(options["slo"]) if options["slo"] else None,
            gpus_per_worker=pair(options["gpus_per_worker"]) if options["gpus_per_worker"] else None,
            lengths=lengths,
            trace=options["trace"] or "",
            seed=options["seed"],
        )
    if as_json:
        emit_json(answer.as_json() | {"recommendation": answer.id})
    else:
        show_closed(answer)


def show_closed(answer: Any) -> None:
    """Print an answer about a closed loop for people."""
    from rich.markup import escape
    from rich.table import Table

    from advisor.closed import as_table, evidence

    console = messages()
    console.print(f"[bold]{escape(answer.sentence)}[/bold]")
    table, shown = Table(box=None, pad_edge=False), as_table(answer.as_json())
    for name in shown.head:
        table.add_column(name, justify="left" if name in ("P:D", "note") else "right")
    for k, row in enumerate(shown.rows):
        table.add_row(*row, style="bold" if k in shown.strong else None)
    console.print(table)
    console.print(f"Evidence: {evidence(answer.as_json())}", markup=False)
    for warning in answer.warnings:
        console.print(f"note: {warning}", markup=False)
    console.print(f"Next: {answer.next_probe['command']}  ({answer.next_probe['why']})", markup=False)


def seconds(text: str) -> float:
    """``90s``, ``10m``, ``1h``, or seconds without a unit."""
    unit = {"s": 1.0, "m": 60.0, "h": 3600.0}.get(text[-1:], 0.0)
    number = text[:-1] if unit else text
    try:
        found = float(number) * (unit or 1.0)
    except ValueError:
        found = 0.0
    if not 0 < found < 1e7:
        raise click.UsageError(f"--budget takes a time like 90s, 10m or 1h (got {text!r}).")
    return found


def measured(db: str, as_json: bool, url: str, budget_s: float, options: dict[str, Any]) -> Any:
    """Run the probes that the advisor asks for; from then on the question is about their group, and its trace and rate."""

    from advisor.advise import DEFAULT_SLO
    from advisor.auto import probe
    from advisor.cli.progress import Steps
    from loadgen.client import target
    from loadgen.control import Endpoint
    from loadgen.replay import read_api_key
    from loadgen.swarm import Swarm
    from traces.errors import EndpointError
    from traces.measures import Slo
    from traces.shape import head, to_rate
    from traces.store import open_store

    if not options["trace"]:
        raise click.UsageError("--auto asks the endpoint for a --trace.")
    if typed("run_ids", "group", "endpoint"):
        raise click.UsageError("--auto learns from its own runs: not with --run, --group or --endpoint-name.")
    where = target(url, api_key=read_api_key(None))
    fleet = Endpoint(where).fleet()
    if fleet is None:
        raise EndpointError(f"{where.shown}: its split cannot be set by steelyard (no /fleet), so --auto cannot probe.")
    per = pair(options["gpus_per_worker"]) if options["gpus_per_worker"] else (1, 1)
    options["gpus"] = options["gpus"] or fleet.gpus(per)
    options["slo"] = options["slo"] or DEFAULT_SLO
    with open_store(db, create=False) as store:
        schedule = store.schedule(options["trace"])
        if options["requests"]:
            schedule = head(schedule, options["requests"])
        if options["rate"]:
            schedule = to_rate(schedule, options["rate"])
        options["rate"] = options["rate"] or schedule.rate_per_s
        with Swarm(workers=1) as swarm, progress(as_json) as bars:
            steps = Steps(bars)
            found = probe(
                store,
                swarm,
                where,
                schedule,
                gpus=options["gpus"],
                slo=Slo.parse(options["slo"]),
                budget_s=budget_s,
                gpus_per_worker=per,
                attainment=options["attainment"],
                seed=options["seed"],
                note=bars.say,
                watch=steps.watch,
                progress=steps,
            )
    options |= {"group": found.group, "run_ids": (), "endpoint": None}
    return found


WIDE = 122
"""Columns from which on a candidate's figures and intervals stand in one line."""


def show(recommendation: Any, as_json: bool = False) -> None:
    """Print a recommendation for people."""
    from rich.markup import escape
    from rich.table import Table

    from advisor.study import reason

    r = recommendation
    console = messages(as_json)
    console.print(f"[bold]{escape(r.sentence)}[/bold]")
    table = Table(box=None, pad_edge=False)
    gap = " " if console.width >= WIDE else "\n"
    for name in ("P:D", "goodput/s", "within SLO", "TTFT p99 s", "TPOT p99 ms", "E2E p99 s", "best in draws", ""):
        table.add_column(name, justify="left" if name in ("P:D", "") else "right")
    for c in r.candidates:
        word = "recommended" if c is r.best else "runner-up" if c is r.runner_up else ""
        table.add_row(
            str(c.fleet),
            interval(c, "goodput_per_s", gap=gap),
            ("met" if c.feasible else "missed") if r.slo.constraints else f"{c.attainment:.0%}",
            interval(c, "ttft_p99_s", gap=gap),
            interval(c, "tpot_p99_s", 1e3, gap),
            interval(c, "e2e_p99_s", gap=gap),
            f"{c.wins:.0%}",
            word,
            style="bold" if word == "recommended" else None,
        )
    console.print(table)
    if r.runner_up:
        console.print(rival(r), markup=False)
    kind = "90 % intervals" if r.calibrated else "90 % bands, not yet calibrated"
    console.print(
        f"Evidence: {len(r.runs)} runs ({', '.join(map(str, r.runs))}), n = {r.n} finished requests; [{kind}]",
        markup=False,
    )
    for warning in r.warnings:
        console.print(f"note: {warning}", markup=False)
    console.print(f"Next: {r.next_probe['command']}  ({reason(r.next_probe)})", markup=False)


def rival(recommendation: Any) -> str:
    """The runner-up, how far behind it is, and what would put it ahead."""
    r, gap = recommendation, recommendation.gap
    word = f"serves {abs(gap):.1%} {'less' if gap >= 0 else 'more'}" if gap == gap else "serves none either"
    if r.slo.constraints and not r.runner_up.feasible:
        word = "misses the SLO"
    words = {"prompt_factor": "with prompts {:.3g} times as long", "rate_factor": "at {:.3g} times the rate"}
    turns = [text.format(r.break_even[k]) for k, text in words.items() if r.break_even.get(k) is not None]
    ahead = (
        f"it is ahead {' or '.join(turns)}"
        if turns
        else "no prompts or rate up to four times or a quarter put it ahead"
    )
    return f"Runner-up {r.runner_up.fleet} {word}; {ahead}."


def show_choice(answer: Any, db: str) -> None:
    """Print which strategy, the thresholds and the cost for people."""
    from rich.table import Table

    from advisor.report.reproduce import online_command
    from traces.store import open_store

    console = messages()
    choice = answer.choice
    console.print(f"Strategy: {choice.strategy}. {choice.why}.", markup=False)
    table = Table(box=None, pad_edge=False)
    for name in ("strategy", "fleet", "per s", "regret", "switches/h", ""):
        table.add_column(name, justify="left" if name in ("strategy", "fleet", "") else "right")
    for arm in choice.arms:
        regret = f"{arm.regret:.1%}" if arm.regret == arm.regret else "-"
        table.add_row(
            arm.strategy, arm.fleet, f"{arm.goodput_per_s:.4g}", regret, f"{arm.switches_per_h:.3g}", arm.note
        )
    console.print(table, markup=False)
    said = choice.online.as_json() if choice.online else {}
    if said.get("rule"):
        up, decode = said["prefill"], said["decode"]
        console.print(
            f"Thresholds, from {choice.online.start}: prefill asks for a worker at {up['up_backlog_s']:.3g} s of backlog "
            f"({up['up_waiting_tokens']:.0f} waiting tokens a worker), gives below {up['down_backlog_s']:.3g} s; decode asks at "
            f"{decode['up_running_requests']:.0f} sequences a worker, gives below {decode['down_running_requests']:.0f}; dwell "
            f"{said['dwell_s']:g} s, cool-down {said['cool_s']:.3g} s, floor {said['floor']['prefill']}:"
            f"{said['floor']['decode']}. {said['forecast_note']}.",
            markup=False,
        )
        with open_store(db, create=False) as store:
            command = online_command(answer.as_json(), {t.name for t in store.traces()})
        console.print(f"Run them: {command}", markup=False, soft_wrap=True)
    if said.get("break_even_s") is not None:
        console.print(
            f"A change of mix pays for a move and back when it lasts {said['break_even_s']:.3g} s.", markup=False
        )
    if answer.extra.get("cost"):
        dollars = answer.extra["cost"]
        a, b = (dollars[f"usd_per_m_{k}output_tokens"] for k in ("", "good_"))
        console.print(
            f"Cost: ${a['value']:.4g} [{a['low']:.4g}, {a['high']:.4g}] a million output tokens, ${b['value']:.4g} "
            f"[{b['low']:.4g}, {b['high']:.4g}] within the SLO, on {dollars['gpus']} GPUs at "
            f"${dollars['gpu_hour_usd']:g} an hour.",
            markup=False,
        )
    if answer.extra.get("needed"):
        n = answer.extra["needed"]
        price = f", ${n['usd_per_hour']:.4g} an hour" if n["usd_per_hour"] is not None else ""
        high = n["high"] or "no number"
        console.print(
            f"For {n['target_rate_per_s']:g} req/s: {n['gpus']} GPUs as {n['prefill']}:{n['decode']}{price}; {high} at "
            "the low end of the goodput interval.",
            markup=False,
        )
    for scheme, held in (answer.extra.get("audit") or {"schemes": {}})["schemes"].items():
        errors = ", ".join(f"{name} {error:.1%}" for name, error in held["errors"].items())
        console.print(
            f"Audit, one {scheme} left out ({held['folds']} folds): {errors or held['problem']}", markup=False
        )
    for held in (answer.extra.get("audit") or {"decisions": []})["decisions"]:
        console.print(
            f"Audit: without its runs, {held['chosen']} would have been chosen for {held['trace']}; best was {held['best']}, "
            f"regret {held['regret']:.1%}",
            markup=False,
        )
    for warning in choice.warnings:
        console.print(f"note: {warning}", markup=False)


def interval(candidate: Any, name: str, unit: float = 1.0, gap: str = " ") -> str:
    """``12.3 [11.9, 12.6]``. gap: between value and interval."""
    import math

    figure = candidate.figures[name]
    if not math.isfinite(figure.value):
        return "-"
    text = f"{figure.value * unit:.3g}"
    if math.isfinite(figure.low) and math.isfinite(figure.high):
        text += f"{gap}\\[{figure.low * unit:.3g}, {figure.high * unit:.3g}]"
    return text


@click.command(**example("steelyard report --gpus 8 --out report.html"))
@question
@click.option(
    "--recommendation",
    "number",
    metavar="ID",
    help="Report a stored answer: its number, or 'latest'; with --run, of these runs [default: advise now].",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["html", "md", "json", "pdf"]),
    default="html",
    show_default=True,
    help="One HTML file, Markdown, JSON, or a PDF that Chromium prints.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File to write [default: report.FORMAT].",
)
@json_option
@db_option
def report(db: str, as_json: bool, out: Path | None, number: str | None, form: str, **options: Any) -> None:
    """Write the answer with its evidence: one self-contained page, or the same as Markdown, JSON or PDF.

    Without --recommendation the runs are asked now, as steelyard advise does. Where they cannot answer, the report says why and
    shows what they measured, and the exit code is that of steelyard advise.
    """
    import itertools
    import shlex
    import sys

    from advisor import report as made
    from traces.errors import NoFleetError, NotEnoughDataError, understood
    from traces.store import open_store, redact, told

    out = out or Path(f"report.{form}")
    words = [w for last, w in itertools.pairwise(sys.argv) if "--db" not in (last, w) and not w.startswith("--db=")]
    commands = [shlex.join(["steelyard", *map(redact, words), *(["--db", db] if told(db) else [])])]
    refusal: SteelyardError | None = None
    given = [p for p in options if p != "run_ids" and typed(p)]
    if given and not typed("number"):
        number = None
    with open_store(db, create=False) as store:
        if number is not None:
            if given:
                raise click.UsageError(f"--{given[0].replace('_', '-')} asks anew: leave out --recommendation.")
            answer = _stored(store, number)
            with understood(f"recommendation {answer['id']}", "Make another: steelyard advise"):
                page = made.gather(store, answer, run_ids=options["run_ids"], commands=commands)
                content = made.text_of(page, "html" if form == "pdf" else form)
        else:
            try:
                found = ask(db, as_json, **options)
            except (NotEnoughDataError, NoFleetError) as error:
                refusal = error
                page = _refused(store, error, options, commands)
                answer = page.answer
            else:
                from traces import __version__

                answer = found.as_json() | {"version": __version__, "seed": options["seed"]}
                schedule = found.recommendation.schedule
                page = made.gather(store, answer, data=found.data, schedule=schedule, commands=commands)
            content = made.text_of(page, "html" if form == "pdf" else form)
    made.write_report(out, made.pdf(content) if form == "pdf" else content)
    if refusal is not None:
        messages(as_json).print(f"Written: {out} (what was measured, and why that is no answer)", markup=False)
        raise refusal
    if as_json:
        emit_json({"report": str(out), "recommendation": answer})
    else:
        messages().print(f"{answer['sentence']}\nWritten: {out}", markup=False)


def _stored(store: Any, number: str) -> dict[str, Any]:
    """A stored answer about a split, by number or the latest. InputError when there is none."""
    known = store.recommendations(kind="static", limit=10)
    wanted = known[:1] if number == "latest" else []
    if number.isdecimal() and len(number) < 19:  # what a database can be asked for
        wanted = store.recommendations(id=int(number))
    if not wanted:
        ids = ", ".join(str(row["id"]) for row in known) or "none"
        raise InputError(f"no recommendation {number!r} is stored. Known: {ids}. Make one: steelyard advise")
    row = wanted[0]
    if row["kind"] != "static":
        raise InputError(
            f"recommendation {number} answers another question ({row['kind']}), of which there is no report. Read it: "
            "steelyard dash"
        )
    return dict(row["answer"]) | {name: row[name] for name in ("id", "created_at", "version", "seed", "run_ids")}


def _refused(store: Any, error: Exception, options: dict[str, Any], commands: list[str]) -> Any:
    """The report of runs that cannot answer: the sentence says why. The error again when there is not even a run."""
    from advisor.advise import choose_runs
    from advisor.report import gather
    from traces.errors import SteelyardError

    try:
        runs = choose_runs(store, ids=options["run_ids"], group=options["group"], endpoint=options["endpoint"])
    except SteelyardError:
        raise error from None
    slo = options["slo"] or runs[-1].slo
    asked = {
        "sentence": f"No split can be recommended: {error}",
        "slo": slo,
        "trace": options["trace"] or runs[-1].trace,
    }
    return gather(store, asked, run_ids=[run.id for run in runs], commands=commands)
