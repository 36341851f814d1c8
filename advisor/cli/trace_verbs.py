"""The verbs ingest, synth and traces."""

from __future__ import annotations

import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import click

from advisor.cli.common import (
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
)
from advisor.cli.shaping import shape_options

REPORT_KEYS = (
    "name",
    "format",
    "rows_read",
    "rows_kept",
    "skipped",
    "other_events",
    "sum_prompt_tokens",
    "sum_output_tokens",
    "span_s",
    "distinct_arrivals",
    "prefix_hit_tokens",
    "inversions",
    "equal_times",
    "failed_rows",
    "clock",
    "smallest_gap_s",
    "replayable",
    "longest_prompt_tokens",
    "notes",
    "already",
)


def _json(report: Any) -> dict[str, Any]:
    held = {key: getattr(report, key) for key in REPORT_KEYS}
    held["skipped"] = {
        reason: {"count": s.count, "first_lines": s.first_lines, "example": s.example}
        for reason, s in report.skipped.items()
    }
    return held


def _say(report: Any) -> None:
    console = messages()
    head = "already stored, nothing to do: " if report.already else ""
    console.print(
        f"{head}{report.name} ({report.format}): {report.rows_read} rows read, {report.rows_kept} kept; "
        f"{report.sum_prompt_tokens} prompt and {report.sum_output_tokens} output tokens over {report.span_s:.6g} s",
        markup=False,
    )
    gap = "" if report.smallest_gap_s is None else f", smallest gap {report.smallest_gap_s:.6g} s"
    console.print(f"  clock: {report.clock}{gap}; {report.distinct_arrivals} distinct times", markup=False)
    for reason, skipped in report.skipped.items():
        lines = ", ".join(map(str, skipped.first_lines))
        console.print(f"  skipped {skipped.count}: {reason} (lines {lines}); {skipped.example}", markup=False)
    if report.inversions or report.equal_times:
        console.print(f"  {report.inversions} out of order, {report.equal_times} at the time of the row before")
    if report.failed_rows:
        console.print(f"  {report.failed_rows} failed or without answer tokens: kept as failed, not replayed")
    if report.prefix_hit_tokens is not None:
        console.print(f"  {report.prefix_hit_tokens} prompt tokens are shared prefixes (unlimited cache, from cold)")
    for note in report.notes:
        console.print(f"  note: {note}", markup=False)


LEAST_FREE = 256 << 20
"""Bytes of disk that standard input leaves free: it may have no end."""


def _spool(stream: IO[bytes], held: Path, check: Callable[[Path], object], least_free: int = LEAST_FREE) -> None:
    """Standard input into a file. ``check`` sees its beginning and may refuse it before the rest is waited for."""
    from traces.errors import InputError
    from traces.ingest import HEAD

    with held.open("wb") as out:
        piece = stream.read(HEAD)
        out.write(piece)
        out.flush()
        check(held)
        while piece := stream.read(1 << 20):
            if shutil.disk_usage(held.parent).free - len(piece) < least_free:
                raise InputError(
                    f"standard input: the disk of {held.parent} is nearly full after {out.tell()} bytes. Set TMPDIR to a larger "
                    "one, or give a file that ends."
                )
            out.write(piece)


@contextmanager
def _files(
    sources: tuple[str, ...], check: Callable[[Path], object], since: datetime | None, until: datetime | None
) -> Iterator[tuple[Path, ...]]:
    """The files, also shipped ones by name; standard input and a table as temporary ones, since a trace is read twice."""
    from traces.shipped import NAMES, shipped
    from traces.store import spend_logs

    if sources != ("-",) and not any(map(_is_url, sources)):
        yield tuple(shipped(s) if s in NAMES and not Path(s).exists() else Path(s) for s in sources)
        return
    with tempfile.TemporaryDirectory() as folder:
        if sources == ("-",):
            held = Path(folder) / "stdin"
            _spool(sys.stdin.buffer, held, check)
        else:
            held = Path(folder) / "LiteLLM_SpendLogs.csv"
            with held.open("w", encoding="utf-8", newline="") as text:
                spend_logs(sources[0], text, since, until)
        yield (held,)


def _is_url(source: str) -> bool:
    return "://" in source


def _moment(text: str | None, option: str, tz: str | None) -> datetime | None:
    """A date or time as it was typed, in the zone that rows without one are of."""
    from traces.ingest import zone_of

    zone = zone_of(tz) or UTC
    try:
        moment = datetime.fromisoformat(text) if text is not None else None
        return (moment if moment.tzinfo else moment.replace(tzinfo=zone)).astimezone(zone) if moment else None
    except (ValueError, OverflowError):
        raise click.UsageError(
            f"{option} takes a date or time, for example 2026-11-24 or 2026-11-24T09:00 (got {text!r})."
        ) from None


@click.command(**example("steelyard ingest azure-2023-conv --name conv"))
@click.argument("files", nargs=-1, required=True)
@click.option("--name", help="Name of the trace [default: the file's].")
@click.option("--format", "format_", help="One of steelyard traces formats [default: recognised from the file].")
@click.option(
    "--map",
    "columns",
    metavar="ARRIVAL=..,..",
    help="Any CSV, JSONL or Parquet: arrival=COL,input=COL,output=COL[,session=COL].",
)
@click.option(
    "--time-unit",
    type=click.Choice(["s", "ms", "us", "ns", "iso"]),
    default="s",
    show_default=True,
    help="Of the arrival column of --map.",
)
@click.option("--tz", metavar="ZONE", help="Zone of times that carry none, like Europe/Berlin [default: UTC].")
@click.option("--since", metavar="TIME", help="Of LiteLLM's database: rows that began from this date or time on.")
@click.option("--until", metavar="TIME", help="The same: rows that began before.")
@click.option("--block-size", type=int, help="Tokens of a prefix block of a Mooncake file [default: 512].")
@click.option("--max-bad", default="5%", show_default=True, help="Refuse the file when more rows than this are bad.")
@click.option(
    "--zero-output",
    type=click.Choice(["keep-failed", "skip", "min1"]),
    default="keep-failed",
    show_default=True,
    help="Rows without answer tokens.",
)
@json_option
@db_option
def ingest(
    files: tuple[str, ...],
    name: str | None,
    format_: str | None,
    max_bad: str,
    zero_output: str,
    columns: str | None,
    time_unit: str,
    tz: str | None,
    since: str | None,
    until: str | None,
    block_size: int | None,
    as_json: bool,
    db: str,
) -> None:
    """Read a recorded trace into the database: validated, counted, all of it or none.

    A shipped trace is known by its name. Several files are shards of one trace,
    gzip and zstd are read as they are; - reads standard input (with --name), the URL of
    LiteLLM's database its spend log. The same file again changes nothing.
    """
    from traces.errors import InputError
    from traces.ingest import clean_rate, recognise
    from traces.ingest import ingest as load
    from traces.store import open_store

    share = clean_rate(max_bad)

    def check(path: Path) -> None:
        recognise(path, format_, columns, time_unit)

    if "-" in files and (len(files) > 1 or not name):
        raise InputError("standard input is a trace of its own and needs a name: steelyard ingest - --name NAME")
    if any(map(_is_url, files)) and (len(files) > 1 or format_ not in (None, "litellm") or columns):
        raise InputError("the URL of a database is LiteLLM's, and a trace of its own: steelyard ingest URL --name NAME")
    if typed("since", "until") and not any(map(_is_url, files)):
        raise click.UsageError(
            "--since and --until are of LiteLLM's database; of a stored trace: replay --window 9h-10h."
        )
    span = _moment(since, "--since", tz), _moment(until, "--until", tz)
    with open_store(db) as store, progress(as_json) as bars, _files(files, check, *span) as paths:
        size = sum(f.stat().st_size for f in paths if f.is_file())
        task = bars.add_task("read", total=size, unit="bytes")
        report = load(
            store,
            list(paths),
            name=name,
            format=format_,
            max_bad=share,
            zero_output=zero_output,
            columns=columns,
            time_unit=time_unit,
            tz=tz,
            block_size=block_size,
            progress=lambda n: bars.update(task, completed=n),
        )
        bars.update(task, completed=size)
    if as_json:
        emit_json(_json(report))
    else:
        _say(report)


NOT_OF = {
    "servegen": (
        ("rate", "requests", "arrivals", "cv", "lengths", "output"),
        "its clients say it; --rate-factor and --window",
    ),
    "usage": (
        ("rate", "requests", "arrivals", "cv", "lengths", "output", "rate_factor"),
        "its buckets say it; --time-scale and --output-scale",
    ),
    "like": (("cv", "output", "rate_factor"), "the trace says it; --rate, --arrivals and --output-scale"),
    "preset": (("output", "lengths", "rate_factor"), "it says lengths; --rate and --output-scale"),
    "prompt": (("lengths", "rate_factor"), "lengths are drawn; --rate"),
}
"""What a trace is made from -> options that it has no use for, and what there is instead."""


def _used(source: str, arrivals: str | None) -> None:
    """UsageError for an option that was typed and would not count."""
    names, instead = NOT_OF[source]
    for name in filter(typed, names):
        raise click.UsageError(f"--{name.replace('_', '-')} would not count beside --{source}: {instead} would.")
    if typed("cv") and arrivals != "gamma":
        raise click.UsageError("--cv would not count: it is of --arrivals gamma.")


@click.command(
    **example(
        "steelyard synth --name chat --requests 500 --rate 8 --arrivals poisson \\\n"
        "    --prompt lognormal:median=403,sigma=1,min=10,max=4096 --output lognormal:median=148,sigma=0.8,min=10,max=2048"
    )
)
@click.option("--name", required=True, help="Name of the trace.")
@click.option("--preset", type=click.Choice(["origin"]), help="The workload of the origin report, by name.")
@click.option("--like", metavar="TRACE", help="Lengths and arrivals like a stored trace's.")
@click.option(
    "--lengths",
    type=click.Choice(["empirical", "mixture", "lognormal"]),
    help="With --like: recorded pairs or fitted laws [default: what traces fit says].",
)
@click.option(
    "--servegen", type=click.Path(path_type=Path), help="From a folder of ServeGen clients, --window of its days."
)
@click.option("--usage", type=click.Path(path_type=Path), help="From an OpenAI usage answer (JSON buckets).")
@click.option("--rate-factor", type=Number(min=0, min_open=True), default=1.0, help="With --servegen: all clients.")
@click.option("--prompt", help="lognormal:median=..,sigma=..[,min=..,max=..]; or mean=.., or mu=..")
@click.option("--output", help="The same for answers.")
@click.option("--requests", type=click.IntRange(min=1), default=500, show_default=True)
@click.option("--rate", type=Number(min=0, min_open=True), help="Mean arrivals per second.")
@click.option(
    "--arrivals",
    type=click.Choice(["poisson", "uniform", "constant", "gamma", "burst"]),
    help="Arrival process [default: poisson].",
)
@click.option("--cv", type=Number(), default=2.0, show_default=True, help="Coefficient of variation of gamma gaps.")
@click.option("--seed", type=SEED, default=0, show_default=True)
@shape_options
@json_option
@db_option
def synth(
    name: str,
    preset: str | None,
    like: str | None,
    lengths: str | None,
    servegen: Path | None,
    usage: Path | None,
    rate_factor: float,
    prompt: str | None,
    output: str | None,
    requests: int,
    rate: float | None,
    arrivals: str | None,
    cv: float,
    seed: int,
    as_json: bool,
    db: str,
    **shapes: Any,
) -> None:
    """Make a synthetic trace and store it, seeded: log-normal lengths, or like a stored trace."""
    from advisor.cli.shaping import parse_window, shaped
    from traces import profiles, shape
    from traces.errors import InputError
    from traces.fit import alike, fit
    from traces.ingest import store_schedule
    from traces.store import open_store

    sources = {"servegen": servegen, "usage": usage, "like": like, "preset": preset, "prompt": prompt}
    given = [source for source, value in sources.items() if value is not None]
    if len(given) > 1:
        raise InputError("give one of --preset, --like, --servegen, --usage and --prompt with --output.")
    if given:
        _used(given[0], arrivals)
    options: dict[str, Any]
    if servegen is not None or usage is not None:
        if servegen is not None:
            start, end = parse_window(shapes.pop("window") or "0-3600")
            clients = profiles.servegen(servegen)
            made = profiles.from_servegen(
                clients, start_s=start, end_s=end, name=name, seed=seed, rate_factor=rate_factor
            )
            options = {"servegen": servegen.name, "clients": len(clients), "window_s": f"{start:g}-{end:g}"}
            options |= {"rate_factor": rate_factor}
        else:
            assert usage is not None  # noqa: S101 - one of the two was given
            made = profiles.from_usage(usage, name=name, seed=seed)
            options = {"usage": usage.name}
        with open_store(db) as store:
            report = store_schedule(store, shaped(made, shapes, seed), options=options | {"seed": seed} | shapes)
        emit_json(_json(report)) if as_json else _say(report)
        return
    if like is not None:
        with open_store(db, create=False) as store:
            recorded = store.schedule(like)
            lengths = lengths or fit(recorded).use
            made = alike(recorded, requests, name=name, lengths=lengths, rate_per_s=rate, arrivals=arrivals, seed=seed)
            options = {"like": like, "lengths": lengths, "requests": requests, "rate_per_s": rate, "arrivals": arrivals}
            report = store_schedule(store, shaped(made, shapes, seed), options=options | {"seed": seed} | shapes)
        emit_json(_json(report)) if as_json else _say(report)
        return
    if preset == "origin":
        laws = shape.ORIGIN_PROMPT, shape.ORIGIN_OUTPUT
        arrivals, rate = arrivals or "uniform", rate or requests / shape.ORIGIN_SPAN_S
    elif prompt and output:
        laws = shape.LogNormal.parse(prompt), shape.LogNormal.parse(output)
    else:
        raise InputError("give --prompt and --output (lognormal:median=..,sigma=..), --like TRACE, or --preset origin.")
    if rate is None and arrivals != "burst":
        raise InputError("give --rate, the mean arrivals per second (or --arrivals burst).")
    schedule = shape.synthesize(
        requests, *laws, rate_per_s=rate or 1.0, arrivals=arrivals or "poisson", cv=cv, seed=seed, name=name
    )
    options = {
        "preset": preset,
        "prompt": str(laws[0]),
        "output": str(laws[1]),
        "requests": requests,
        "rate_per_s": rate,
        "arrivals": arrivals or "poisson",
        "cv": cv,
        "seed": seed,
    }
    with open_store(db) as store:
        report = store_schedule(store, shaped(schedule, shapes, seed), options=options | shapes)
    if as_json:
        emit_json(_json(report))
    else:
        _say(report)


@click.group(invoke_without_command=True, **example("steelyard traces show azure-2023-conv"))
@json_option
@db_option
@click.pass_context
def traces(context: click.Context, as_json: bool, db: str) -> None:
    """List the stored traces; show or delete one."""
    from rich.markup import escape
    from rich.table import Table

    from traces.store import open_store

    if context.invoked_subcommand is not None:
        return
    with open_store(db, create=False) as store:
        stored = store.traces()
    if as_json:
        emit_json(
            {"traces": [{"name": t.name, "format": t.format, **t.summary, "created_at": t.created_at} for t in stored]}
        )
        return
    if not stored:
        messages().print("No trace is stored. Add one: steelyard ingest FILE")
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("name", "format", "requests", "span s", "prompt tokens", "output tokens"):
        table.add_column(heading, justify="left" if heading in ("name", "format") else "right")
    for t in stored:
        s = t.summary
        table.add_row(
            escape(t.name),
            t.format,
            str(s["rows_kept"]),
            f"{s['span_s']:.6g}",
            str(s["sum_prompt_tokens"]),
            str(s["sum_output_tokens"]),
        )
    messages().print(table)


WINDOWS = 40


def _windows(schedule: Any) -> dict[str, Any]:
    """Rate, mean lengths and token ratio in WINDOWS equal windows of the span; None where a window is empty."""
    import numpy as np

    span = schedule.span_s
    found: dict[str, Any] = {"seconds": span / WINDOWS if span > 0 else 0.0}
    if not span > 0:
        return found
    which = np.minimum((schedule.due_s - schedule.due_s[0]) / span * WINDOWS, WINDOWS - 1).astype(int)
    n = np.bincount(which, minlength=WINDOWS)
    prompt = np.bincount(which, weights=schedule.prompt_tokens, minlength=WINDOWS)
    output = np.bincount(which, weights=schedule.output_tokens, minlength=WINDOWS)
    found["rate_per_s"] = (n / (span / WINDOWS)).tolist()
    for key, top, under in (
        ("prompt_tokens", prompt, n),
        ("output_tokens", output, n),
        ("prompt_per_output", prompt, output),
    ):
        found[key] = [float(a / b) if b else None for a, b in zip(top, under, strict=True)]
    return found


def _marks(values: list[float | None]) -> str:
    """A line of bars, lowest to highest value; a blank where there is none."""
    known = [v for v in values if v is not None]
    low, high = min(known), max(known)
    steps = "▁▂▃▄▅▆▇█"
    return "".join(
        " " if v is None else steps[int((v - low) / (high - low) * 7.999) if high > low else 3] for v in values
    )


@traces.command(**example("steelyard traces show azure-2023-conv --json"))
@click.argument("name", type=TRACE)
@json_option
@db_option
def show(name: str, as_json: bool, db: str) -> None:
    """What is known of a trace: counts, rate, lengths, the prefill:decode token ratio by quarter."""
    import numpy as np

    from traces.ingest import IngestReport
    from traces.store import open_store

    with open_store(db, create=False) as store:
        report = IngestReport.of(store.trace(name))
        schedule = store.schedule(name)
    figures: dict[str, Any] = {"rate_per_s": schedule.rate_per_s, "replayable": len(schedule)}
    for what, column in (("prompt", schedule.prompt_tokens), ("output", schedule.output_tokens)):
        if len(column):
            p50, p90, p99 = np.quantile(column, [0.5, 0.9, 0.99])
            figures[f"{what}_tokens"] = {
                "mean": float(column.mean()),
                "p50": float(p50),
                "p90": float(p90),
                "p99": float(p99),
                "max": int(column.max()),
            }
    figures["prompt_per_output_token_by_quarter"] = [
        float(schedule.prompt_tokens[part].sum() / schedule.output_tokens[part].sum())
        for part in np.array_split(np.arange(len(schedule)), 4)
        if len(part)
    ]
    windows = _windows(schedule)
    figures["windows"] = windows
    if as_json:
        emit_json(_json(report) | figures)
        return
    _say(report)
    console = messages()
    console.print(f"  recorded rate {schedule.rate_per_s:.4g}/s, {len(schedule)} requests can be replayed")
    for what in ("prompt", "output"):
        f = figures.get(f"{what}_tokens")
        if f:
            console.print(
                f"  {what} tokens: mean {f['mean']:.0f}, p50 {f['p50']:.0f}, p90 {f['p90']:.0f}, p99 {f['p99']:.0f}"
            )
    ratios = ", ".join(f"{r:.2g}" for r in figures["prompt_per_output_token_by_quarter"])
    console.print(f"  prompt tokens per output token, by quarter: {ratios}")
    if windows["seconds"]:
        each = f"each mark {windows['seconds']:.4g} s"
        for key, what in (
            ("rate_per_s", f"requests/s ({each})"),
            ("prompt_tokens", "mean prompt tokens"),
            ("output_tokens", "mean output tokens"),
            ("prompt_per_output", "prompt per output token"),
        ):
            values = [v for v in windows[key] if v is not None]
            console.print(f"  {_marks(windows[key])}  {what}: {min(values):.3g} to {max(values):.3g}", markup=False)
        ratio = [v for v in windows["prompt_per_output"] if v]
        console.print(
            f"  drift: the mix of prompt to output tokens varies {max(ratio) / min(ratio):.2g}-fold over the trace"
        )


@traces.command("fit", **example("steelyard traces fit azure-2023-conv"))
@click.argument("name", type=TRACE)
@json_option
@db_option
def fit_(name: str, as_json: bool, db: str) -> None:
    """Fit lengths and arrivals, say how good each fit is, and which to use for a trace made alike."""
    from traces.fit import fit
    from traces.store import open_store

    with open_store(db, create=False) as store:
        found = fit(store.schedule(name))
    if as_json:
        emit_json({"name": name} | found.as_json())
        return
    console = messages()
    console.print(f"{name}: {found.n} requests", markup=False)
    for what, laws in (("prompt", found.prompt), ("output", found.output)):
        for law in laws.values():
            parts = " + ".join(
                f"{p.weight:.2f} lognormal(mu {p.mu:.3f}, sigma {p.sigma:.3f}, median {math.exp(p.mu):.0f})"
                for p in law.parts
            )
            console.print(
                f"  {what} {law.kind}: {parts}; KS {law.ks:.3f}, mean {law.mean_tokens:.0f} (recorded {law.real_mean_tokens:.0f})"
            )
    a = found.arrivals
    spans = ", ".join(f"{k} {v:.2g}" for k, v in a.dispersion.items())
    console.print(
        f"  arrivals: {a.rate_per_s:.4g}/s, {a.process}, CV {a.cv:.3g}; variance over mean of counts: {spans}"
    )
    console.print(f"  rate by tenth of the span: {', '.join(f'{r:.3g}' for r in a.rate_by_tenth)}")
    console.print(f"  use {found.use}: {found.why}")


@traces.command("formats", **example("steelyard traces formats"))
@json_option
def formats_(as_json: bool) -> None:
    """The formats that ingest knows, and those of which nobody here has seen a real file."""
    from traces.formats import formats

    known = {name: {"title": f.title, "seen": not getattr(f, "unseen", False)} for name, f in formats().items()}
    if as_json:
        emit_json({"formats": known})
        return
    for name, about in known.items():
        note = "" if about["seen"] else " (from documentation, no real file seen)"
        messages().print(f"{name}: {about['title']}{note}", markup=False)


@traces.command(**example("steelyard traces export azure-2023-conv --format mooncake --out conv.jsonl"))
@click.argument("name", type=TRACE)
@click.option(
    "--format", "format_", type=click.Choice(["mooncake", "azure", "csv"]), default="mooncake", show_default=True,
    help="mooncake is what aiperf, guidellm, vLLM bench, SGLang bench and Dynamo replay.",
)  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), required=True, help="File to write.")
@json_option
@db_option
def export(name: str, format_: str, out: Path, as_json: bool, db: str) -> None:
    """Write a stored trace as a file that other tools replay."""
    from traces.export import export as write
    from traces.store import open_store

    with open_store(db, create=False) as store:
        done = write(store, name, format_, out)
    if as_json:
        emit_json(done)
        return
    messages().print(f"{done['rows']} requests written to {out} ({format_}).", markup=False)
    for note in done["notes"]:
        messages().print(f"  note: {note}", markup=False)


@traces.command(**example("steelyard traces delete azure-2023-conv"))
@click.argument("name", type=TRACE)
@json_option
@db_option
def delete(name: str, as_json: bool, db: str) -> None:
    """Remove a trace; runs made from it stay."""
    from traces.store import open_store

    with open_store(db, create=False) as store:
        store.delete_trace(name)
    if as_json:
        emit_json({"deleted": name})
    else:
        messages().print(f"Deleted {name}.", markup=False)
