"""The verbs runs and compare."""

from __future__ import annotations

import csv
import math
import shlex
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from advisor.cli.common import (
    GROUP,
    HELD,
    RECOVERED,
    RUN,
    SEED,
    Number,
    db_option,
    emit_json,
    example,
    json_option,
    messages,
    or_dash,
    plain,
    spread,
    typed,
    warn,
    workers_of,
)


def figures(run: Any, held: Any) -> dict[str, Any]:
    """What is said of a run, in numbers, with the keys of the house. Latencies in ms, over ok requests, from due.

    held: ``store.figures(run)``.
    """

    def in_ms(name: str) -> dict[str, float]:
        return {word: value * 1e3 for word, value in held.quantiles[name].items()}

    return {
        "name": run.name,
        "trace": run.trace,
        "warmup_s": run.warmup_s,
        "scheduled": run.scheduled,
        "ok": run.counts.get("ok", 0),
        "failed": {k.removeprefix("failed."): n for k, n in run.counts.items() if k.startswith("failed.")},
        "unsent": run.counts.get("unsent", 0),
        "cancelled": run.counts.get("cancelled", 0),
        "lost": run.counts.get("lost", 0),
        "verdict": run.verdict,
        "complete": run.complete,
        "reason": run.reason,
        "lag_ms": {"p50": run.lag_p50_ms, "p99": run.lag_p99_ms, "max": run.lag_max_ms},
        "ttft_ms": in_ms("ttft_s"),
        "tpot_ms": in_ms("tpot_s"),
        "e2e_ms": in_ms("e2e_s"),
        "ttft_sent_ms": in_ms("ttft_sent_s"),
        "e2e_sent_ms": in_ms("e2e_sent_s"),
        "goodput_per_s": held.goodput_per_s,
        "throughput_per_s": held.throughput_per_s,
        "output_tokens_per_s": held.output_tokens_per_s,
        "attainment": held.attainment,
        "quantiles": "exact" if held.exact else "from bins 1 % wide",
        "slo": run.slo,
        "fleet": workers_of(run.fleet) if run.fleet else None,
        "rate_per_s": run.rate_per_s,
        "endpoint": run.endpoint,
        "engine": run.engine,
        "engine_version": run.engine_version,
        "model": run.model,
        "profile": run.profile,
        "group": run.group,
        "workers": run.workers,
    }


def table(rows: list[dict[str, Any]], title: str) -> None:
    """Runs side by side, one line a run, by fleet."""
    from rich.markup import escape
    from rich.table import Table

    from traces.records import Fleet

    made = Table(title=escape(title), title_justify="left", box=None, pad_edge=False)
    columns = (
        "run",
        "P:D",
        "ok",
        "goodput/s",
        "TTFT p50",
        "p99",
        "TPOT p50",
        "p99",
        "E2E p50",
        "p99 ms",
        "lag p99",
        "",
    )
    for column in columns:
        made.add_column(column, justify="left" if column in ("P:D", "") else "right")
    best = max((r["goodput_per_s"] or 0.0 for r in rows), default=0.0)
    for r in sorted(rows, key=lambda r: (r["fleet"]["prefill"] if r["fleet"] else 0, r["run"])):
        fleet = str(Fleet(**r["fleet"])) if r["fleet"] else "?"
        word = r["verdict"] if r["verdict"] != "valid" or r["complete"] else ""
        word = "incomplete" if not r["complete"] else word
        made.add_row(
            str(r["run"]),
            fleet,
            f"{r['ok']}/{r['scheduled']}",
            f"{r['goodput_per_s']:.2f}",
            *(f"{r[name][q]:.4g}" for name in ("ttft_ms", "tpot_ms", "e2e_ms") for q in ("p50", "p99")),
            f"{r['lag_ms']['p99']:.1f}",
            word,
            style="bold" if r["goodput_per_s"] == best and best > 0 else None,
        )
    console = messages()
    console.print(made, width=max(console.width, 120))


@click.group(invoke_without_command=True, **example("steelyard runs"))
@click.option("--group", type=GROUP, help="Only runs of this group.")
@json_option
@db_option
@click.pass_context
def runs(context: click.Context, group: str | None, db: str, as_json: bool) -> None:
    """List stored runs, and the latest answers that rest on them; show or export one."""
    if context.invoked_subcommand is not None:
        return
    from rich.markup import escape
    from rich.table import Table

    from traces.records import CLOSED_LOOP
    from traces.store import open_store, option

    with open_store(db, create=False) as store:
        found = store.runs(group=group)
        answers = _answers(store, {run.id for run in found})
    if as_json:
        emit_json({"runs": [_short(run) for run in found], "recommendations": answers})
        return
    made = Table(box=None, pad_edge=False)
    for column in ("run", "name", "trace", "P:D", "rate/s", "ok", "lag p99 ms", "verdict"):
        made.add_column(column, justify="right" if column in ("run", "rate/s", "ok", "lag p99 ms") else "left")
    for run in found:
        state = run.verdict if run.ended else "running or broken off"
        made.add_row(
            str(run.id),
            escape(run.name),
            escape(run.trace),
            str(run.fleet or "?"),
            run.policy if run.policy == CLOSED_LOOP else or_dash(run.rate_per_s, ".3g"),
            f"{run.counts.get('ok', 0) if run.ended else '-'}/{run.scheduled}",
            or_dash(run.lag_p99_ms, ".1f"),
            state if run.complete or not run.ended else f"{state}, incomplete",
        )
    console = messages()
    console.print(made, width=max(console.width, 120))
    if not found:
        console.print("No runs yet. Make one: steelyard replay --help")
    if answers:
        split = next((a["recommendation"] for a in answers if a["kind"] == "static"), None)
        how = [] if split is None else [f"steelyard report --recommendation {split}"]
        how += ["steelyard dash"] if any(a["kind"] != "static" for a in answers) else []
        named = option(db) if typed("db") else ""
        console.print(
            f"Answers that rest on them, the latest first; read one: {', or '.join(f'{one}{named}' for one in how)}",
            markup=False,
        )
    for one in answers:
        on = ", ".join(map(str, one["runs"]))
        console.print(
            f"  {one['recommendation']}  {one['created_at']}  runs {on}  data {one['data_hash'][:12]}: {one['sentence']}",
            markup=False,
        )


LATEST = 10
"""Answers that are listed with the runs."""


def _answers(store: Any, runs: set[int]) -> list[dict[str, Any]]:
    """The latest answers that rest on any of these runs: which they are, on what, and what they say."""
    found = [
        {
            "recommendation": row["id"],
            "created_at": row["created_at"],
            "kind": row["kind"],
            "runs": row["run_ids"],
            "data_hash": str(row["answer"].get("data_hash") or ""),
            "sentence": str(row["answer"].get("sentence") or f"{row['kind']} on {row['answer'].get('source', '?')}"),
        }
        for row in store.recommendations()
        if runs.intersection(row["run_ids"])
    ]
    return found[:LATEST]


def _short(run: Any) -> dict[str, Any]:
    held: dict[str, Any] = plain(run)
    held["run"] = held.pop("id")
    return held


@runs.command("show", **example("steelyard runs show 1"))
@click.argument("run_id", metavar="RUN", type=RUN)
@json_option
@db_option
def show_run(run_id: int, as_json: bool, db: str) -> None:
    """Everything known of one run: also how late the generator was, by worker and over time, and what moved its fleet."""
    from advisor.cli.replay_verbs import history, show
    from traces.aggregate import APPROXIMATE, so_far
    from traces.measures import lag_by_worker, lag_over_time, parts_of, ttft_parts
    from traces.store import open_store

    with open_store(db, create=False) as store:
        run = store.run(run_id)
        said = store.figures(run)
        mean = store.aggregates([run.id]).get(run.id)
        readings = store.readings(run.id)
        histograms = store.histograms(run.id)
        counts = store.bins(run)
        rows = store.observations(run.id) if counts is None else None
        past = history(store, run.id)
    if rows is not None:
        kept = run.counted(rows)
        parts, late, lags = ttft_parts(kept, histograms), lag_by_worker(kept), lag_over_time(rows)
        run = so_far(run, rows)
    elif counts is not None:
        parts, late, lags = parts_of(counts.mean, histograms), counts.lag_by_worker(), counts.lag_over_time()
        run = so_far(run, counts)
    found = {"run": run.id} | figures(run, said)
    if mean is not None:
        _show_mean(found, mean, as_json)
        return
    found |= past
    if run.ended and math.isnan(run.lag_p99_ms):  # rows of a client that does not say it hold a time in its stead
        unknown: dict[str, Any] = dict.fromkeys(("p50_ms", "p99_ms", "max_ms"), math.nan)
        late = {worker: replace(lag, **unknown) for worker, lag in late.items()}
        lags = [(a, b, replace(lag, **unknown)) for a, b, lag in lags]
    workers = {str(w): plain(lag) | run.costs.get(str(w), {}) for w, lag in late.items()}
    stretches = [{"from_s": a, "to_s": b} | plain(lag) for a, b, lag in lags]
    if as_json:
        held = {
            "samples": readings,
            "changes": list(run.changes),
            "digest": run.schedule_digest,
            "sources": run.sources,
            "ttft_parts": [{"part": p.name, "mean_ms": p.mean_s * 1e3, "n": p.n, "source": p.source} for p in parts],
            "histograms": [
                {
                    "worker": h.worker,
                    "role": h.role,
                    "name": h.name,
                    "source": h.source,
                    "count": h.count,
                    "mean": h.mean,
                }
                | {"p50": h.quantile(0.5), "p99": h.quantile(0.99)}
                for h in histograms
            ],
        }
        emit_json(found | held | {"lag_by_worker": workers, "lag_over_time": stretches})
        return
    show(found, run)
    console = messages()
    console.print(
        f"  from sent: TTFT {spread(found['ttft_sent_ms'])}   E2E {spread(found['e2e_sent_ms'])}",
        markup=False,
    )
    console.print(
        f"  model {run.model}, engine {run.engine}, {run.workers} workers, {readings} server readings; "
        f"schedule {run.schedule_digest[:12]}" + (f" ({'; '.join(run.changes)})" if run.changes else ""),
        markup=False,
    )
    if parts:
        console.print(
            "  TTFT, means: " + "  +  ".join(f"{p.name.removesuffix('_s')} {p.mean_s * 1e3:.1f}" for p in parts) + " ms"
        )
        for p in parts[:-1]:
            console.print(f"    {p.name.removesuffix('_s')}: {p.source}, n = {p.n}", markup=False)
    for worker, lag in workers.items():
        p50, p99, worst = (or_dash(lag[q], ".2f") for q in ("p50_ms", "p99_ms", "max_ms"))
        cost = ""
        if "cpu_s" in lag:
            cost = f"; loop stood still {lag['max_stall_s'] * 1e3:.1f} ms at most, {lag['cpu_s']:.2f} CPU-s"
        if "clock_drift_s" in lag:
            cost += f", its clock drifted {lag['clock_drift_s'] * 1e3:+.2f} ms"
        console.print(
            f"  worker {worker}: {lag['requests']} requests, send lag p50 {p50}  p99 {p99}  max {worst} ms{cost}",
            markup=False,
        )
    told = ", ".join(or_dash(s["p99_ms"], ".1f") for s in stretches)
    equal = "equal " if said.exact else ""  # of counts they end where a slot of time does
    warm = ", the warm-up too" if run.warmup_s else ""
    console.print(f"  send lag p99 over time, {len(stretches)} {equal}stretches{warm}: {told} ms", markup=False)
    if not said.exact:
        console.print(f"  {APPROXIMATE}", markup=False)


def _show_mean(found: dict[str, Any], mean: Any, as_json: bool) -> None:
    """A run that is means: it has no rows to say more of."""
    from advisor.closed import as_dict
    from traces.records import Fleet

    if as_json:
        emit_json(found | {"aggregate": as_dict(mean)})
        return
    fleet = Fleet(**found["fleet"]) if found["fleet"] else "?"
    messages().print(
        f"run {found['run']} {found['name']} ({fleet}): means with {mean.concurrency:g} requests in flight, "
        f"{mean.prompt_tokens:g} prompt and {mean.output_tokens:g} output tokens: TTFT {mean.ttft_s * 1e3:.4g} ms, TPOT "
        f"{mean.tpot_s * 1e3:.4g} ms, E2E {mean.e2e_s:.4g} s, {mean.throughput_per_s:.4g} req/s by Little's law\n"
        f"  model {found['model']}, engine {found['engine']} {found['engine_version']}, {found['endpoint']}; {found['reason']}",
        markup=False,
    )


@runs.command("export", **example("steelyard runs export 1 --out run-1.csv"))
@click.argument("run_id", metavar="RUN", type=RUN)
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="CSV file to write.")
@json_option
@db_option
def export_run(run_id: int, out: Path, as_json: bool, db: str) -> None:
    """Write one line a request, with the names of traces/records.py; what did not come is empty."""
    from traces.errors import InputError
    from traces.records import MAY_LACK, Observations
    from traces.store import open_store
    from traces.whole import whole

    names, n = Observations.columns(), 0
    with open_store(db, create=False) as store:
        run, key = store.run(run_id), store.key(run_id)
        with whole(out) as file:
            writer = csv.writer(file)
            writer.writerow(names)
            for rows in store.pieces(run.id):
                held = [getattr(rows, name).tolist() for name in names]
                for name, values in zip(names, held, strict=True):
                    if name in MAY_LACK:
                        values[:] = ["" if v < 0 else v for v in values]
                for row in zip(*held, strict=True):
                    writer.writerow(["" if v is None or v != v else _guarded(v) for v in row])
                n += len(rows)
            if store.key(run.id) != key:
                raise InputError(f"run {run.id} was deleted while it was written: {out} is not.")
    if as_json:
        emit_json({"run": run.id, "rows": n, "out": str(out)})
    else:
        messages().print(f"{n} rows of run {run.id} written to {out}", markup=False)


@runs.command("import", **example("steelyard runs import profile_export.jsonl --fleet 3:5 --slo 'ttft<0.5s tpot<50ms'"))
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--fleet", metavar="P:D", help="Prefill and decode workers that were measured.")
@click.option(
    "--aggregate", is_flag=True, help="The rows of a CSV or JSONL are means, each of a run at a fixed concurrency."
)
@click.option("--name", help="Name of the run [default: the file's].")
@click.option("--group", default="", help="Group that the runs belong to [default: one a file].")
@click.option(
    "--endpoint-name", default="", help="What was measured, as --endpoint-name of advise [default: the file's]."
)
@click.option("--engine", default="openai", show_default=True, help="Engine that was measured.")
@click.option("--engine-version", default="", help="Version of it: runs of different versions are told apart.")
@click.option("--model", default="", help="Model that was measured [default: the file's].")
@click.option("--slo", help='Limits per request, e.g. "ttft<0.5s tpot<50ms".')
@click.option("--gpus-per-worker", metavar="P,D", default="1,1", show_default=True, help="GPUs a worker uses.")
@click.option(
    "--map", "names", metavar="DUE_S=..,..", help="Columns of a CSV or JSONL: due_s=COL,first_token_s=COL, ..."
)
@click.option(
    "--time-unit", type=click.Choice(["s", "ms", "us", "ns"]), default="s", show_default=True, help="Of a CSV or JSONL."
)
@json_option
@db_option
def import_runs(
    files: tuple[Path, ...],
    fleet: str | None,
    aggregate: bool,
    name: str | None,
    group: str,
    endpoint_name: str,
    engine: str,
    engine_version: str,
    model: str,
    slo: str | None,
    gpus_per_worker: str,
    names: str | None,
    time_unit: str,
    as_json: bool,
    db: str,
) -> None:
    """Store what another client measured as runs: aiperf's profile_export.jsonl, guidellm's JSON, vllm bench serve's detailed
    JSON, or any CSV or JSONL of requests.

    A CSV or JSONL names due_s, sent_s, first_token_s, last_token_s, prompt_tokens, output_tokens, status (--map for other
    names). A run without due or sent times is degraded: its client's lateness is not known. The same file again changes nothing.

    --aggregate: a line a run, its means: concurrency, prompt_tokens, output_tokens, ttft_s, tpot_s, and where they differ
    prefill, decode, prefill_gpus, decode_gpus, engine, engine_version, model, endpoint (where it ran). advise --concurrency
    asks them; about a rate they say nothing.
    """
    from advisor.cli.replay_verbs import pair
    from loadgen import imports
    from traces.measures import Slo
    from traces.records import Fleet
    from traces.store import open_store

    limits, per = Slo.parse(slo) if slo else None, pair(gpus_per_worker)
    if aggregate:
        columns = imports.AGGREGATES + imports.OF_AGGREGATES
        said = imports.parse_names(names, columns) if names else None
        means = [(path, imports.read_aggregates(path, said, time_unit)) for path in files]
        _store_aggregates(
            means,
            as_json,
            db,
            name=name,
            fleet=Fleet.parse(fleet) if fleet else None,
            endpoint=endpoint_name,
            engine=engine,
            engine_version=engine_version,
            model=model,
            group=group,
            slo=limits,
            gpus_per_worker=per,
        )
        return
    if not fleet:
        raise click.UsageError("give the --fleet that was measured.")
    renamed = imports.parse_names(names) if names else None
    wanted = Fleet.parse(fleet)
    # All files are read before the first is stored: a bad one leaves nothing behind.
    measured = [(path, imports.read(path, renamed, time_unit)) for path in files]
    found = []
    with open_store(db) as store:
        for path, parts in measured:
            for k, one in enumerate(parts, start=1):
                title = (name or path.stem) + (f" {k}" if len(parts) > 1 else "")
                run, already = imports.store_run(
                    store,
                    one,
                    name=title,
                    fleet=wanted,
                    endpoint=endpoint_name,
                    engine=engine,
                    engine_version=engine_version,
                    model=model,
                    group=group,
                    slo=limits,
                    gpus_per_worker=per,
                )
                found.append(
                    {"client": one.client, "already": already} | {"run": run.id} | figures(run, store.figures(run))
                )
    if as_json:
        emit_json({"runs": found})
        return
    for held in found:
        state = "already stored as" if held["already"] else "stored as"
        messages().print(
            f"{held['name']} ({held['client']}): {held['ok']} of {held['scheduled']} ok, {state} run {held['run']}; "
            f"{held['verdict']}: {held['reason']}",
            markup=False,
        )


def _store_aggregates(
    means: list[tuple[Path, list[Any]]], as_json: bool, db: str, *, name: str | None, **options: Any
) -> None:
    """Store rows of means, all of a file or none, and say what became of them."""
    from advisor.closed import as_dict
    from loadgen import imports
    from traces.store import open_store

    found: list[dict[str, Any]] = []
    with open_store(db) as store:
        for path, rows in means:
            before = {run.id for run in store.runs()}
            for run, one in zip(
                imports.store_aggregates(store, rows, name=name or path.stem, **options), rows, strict=True
            ):
                held = {"client": "aggregate", "already": run.id in before, "run": run.id, "name": run.name}
                fleet = workers_of(run.fleet) if run.fleet else None
                told = {"verdict": run.verdict, "reason": run.reason, "group": run.group, "fleet": fleet}
                found.append(held | told | as_dict(one.held))
    if as_json:
        emit_json({"runs": found})
        return
    for group in dict.fromkeys(held["group"] for held in found):
        mine = [held for held in found if held["group"] == group]
        new = [held["run"] for held in mine if not held["already"]]
        flights = [held["concurrency"] for held in mine]
        splits = len({(held["fleet"]["prefill"], held["fleet"]["decode"]) for held in mine})
        state = f"stored as runs {min(new)} to {max(new)}" if new else "were there already"
        messages().print(
            f"{mine[0]['name']}: {len(mine)} means of {splits} splits, {min(flights):g} to {max(flights):g} requests in flight, "
            f"{state}; group {group}. Ask: steelyard advise --group {shlex.quote(group)} --concurrency {max(flights):g}",
            markup=False,
        )


@runs.command("dump", **example("steelyard runs dump 1 --out run-1"))
@click.argument("run_ids", metavar="ID..", type=RUN, nargs=-1, required=True)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to make.")
@json_option
@db_option
def dump_runs(run_ids: tuple[int, ...], out: Path, as_json: bool, db: str) -> None:
    """Write runs with every row and column as Parquet files, for ``runs load`` into another database."""
    from traces.store import open_store
    from traces.transfer import export_runs

    with open_store(db, create=False) as store:
        held = [store.run(i).id for i in dict.fromkeys(run_ids)]
        written = export_runs(store, held, out)
    if as_json:
        emit_json({"runs": held, "rows": written, "out": str(out)})
    else:
        messages().print(f"{len(held)} runs with {written['observations']} requests written to {out}", markup=False)


@runs.command("load", **example("steelyard runs load run-1 --db sqlite:///other.db"))
@click.argument("folder", type=click.Path(path_type=Path))
@json_option
@db_option
def load_runs(folder: Path, as_json: bool, db: str) -> None:
    """Store the runs that ``runs dump`` wrote; what is there already stays as it is."""
    from traces.store import open_store
    from traces.transfer import import_runs

    with open_store(db) as store:
        ids = import_runs(store, folder)
    if as_json:
        emit_json({"runs": list(ids.values())})
    else:
        messages().print(f"stored as {', '.join(f'run {i}' for i in ids.values())}", markup=False)


@runs.command("prune", **example("steelyard runs prune --older-than 90 --dry-run"))
@click.option("--older-than", type=Number(min=0), metavar="DAYS", help="Runs begun longer ago.")
@click.option("--group", help="Only runs of this group.")
@click.option("--incomplete", is_flag=True, help="Only runs that are incomplete or never ended.")
@click.option("--dry-run", is_flag=True, help="Say what would go; delete nothing.")
@json_option
@db_option
def prune(
    older_than: float | None,
    group: str | None,
    incomplete: bool,
    dry_run: bool,
    as_json: bool,
    db: str,
) -> None:
    """Delete runs with all their rows: the old ones, those of a group, the incomplete ones; all that is named must hold.

    A run that has not ended is left where the last row that was sent came, or it was begun, within a day, or within
    --older-than: it may be going on.
    """
    import time

    from traces.errors import InputError
    from traces.store import open_store

    if older_than is None and not group and not incomplete:
        raise click.UsageError("say which runs: --older-than DAYS, --group NAME or --incomplete.")
    now = time.time()
    before = now - (older_than or 0.0) * 86400
    with open_store(db, create=False) as store:
        named = [
            run
            for run in store.runs(group=group)
            if (older_than is None or run.started_unix_s < before) and (not incomplete or not run.complete)
        ]
        # Somebody else's replay, perhaps: without its run it could store nothing more.
        since = now - 86400 if older_than is None else before
        young = [run.id for run in named if not run.ended and min(store.heard_unix_s(run), now) > since]
        found = [run.id for run in named if run.id not in young]
        for run_id in [] if dry_run else found:
            with suppress(InputError):  # somebody else deleted it meanwhile
                store.delete_run(run_id)
    if young:
        one = f"{', '.join(map(str, young))} have not ended and were begun, or got a row,"
        within = "a day" if older_than is None else f"{older_than:g} days"
        warn(f"runs {one} within {within}: they may be going on, and are left. --older-than 0 takes them too.")
    if as_json:
        emit_json({"runs": found, "deleted": not dry_run})
        return
    said = "would be deleted" if dry_run else "are deleted; steelyard runs vacuum gives their space back"
    messages().print(f"{len(found)} runs {said}: {', '.join(map(str, found)) or 'none'}", markup=False)


@runs.command("vacuum", **example("steelyard runs vacuum"))
@json_option
@db_option
def vacuum(as_json: bool, db: str) -> None:
    """Give the space of deleted runs back to the disk; on PostgreSQL to later runs."""
    from traces.store import open_store

    with open_store(db, create=False) as store:
        store.vacuum()
        shown = store.url
    if as_json:
        emit_json({"vacuumed": shown})
    else:
        said = f"{shown} holds no more space than its rows need."
        if shown.startswith("postgres"):
            said = (
                f"{shown}: later runs use the space of deleted ones. To give it to the disk: VACUUM FULL in psql, for which each "
                "table is locked, and copied, meanwhile."
            )
        messages().print(said, markup=False)


@runs.command("recover", **example("steelyard runs recover"))
@json_option
@db_option
def recover(as_json: bool, db: str) -> int:
    """Store rows that wait on disk because the database was away when they were measured.

    Every other command on that database does so unasked, and says it.
    """
    from loadgen.spool import waiting
    from traces.errors import InputError
    from traces.store import open_store

    found: dict[str, int] = {}
    homeless = held = ""
    with open_store(db, create=False) as store:
        for spool in waiting(store):
            try:
                found[str(spool.path)] = spool.load(store)
                if spool.size():
                    held = f"{spool.path}: {HELD} Run this again when it is through."
            except InputError as error:  # the others are stored all the same
                homeless = homeless or str(error)
    # The group above has the same database as a rule, and was there first.
    found |= click.get_current_context().meta.get(RECOVERED, {}).get(db, {})
    if as_json:
        emit_json({"rows": sum(found.values()), "files": found})
    elif not found and not homeless:
        messages().print("Nothing waits for this database here.")
    for path, rows in () if as_json else found.items():
        messages().print(f"{rows} rows from {path} are in the database", markup=False)
    for said in (homeless, held):
        warn(said)
    return 1 if homeless or held else 0


def _guarded(value: Any) -> Any:
    """Text that a spreadsheet would run as a formula gets an apostrophe: details come from servers."""
    return "'" + value if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") else value


@click.command(**example("steelyard compare 1 2"))
@click.argument("ids", metavar="RUN..", type=RUN, nargs=-1)
@click.option("--group", type=GROUP, help="All runs of this sweep or demo.")
@click.option("--slo", help="Count goodput of all of them within this SLO [default: the runs' own].")
@click.option(
    "--force", is_flag=True, help="Compare what is not comparable: another trace, seed or schedule, an invalid run."
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the bootstrap.")
@json_option
@db_option
def compare(
    ids: tuple[int, ...], group: str | None, slo: str | None, force: bool, seed: int, db: str, as_json: bool
) -> None:
    """Put runs side by side, and say of each metric whether a run is better or worse than the first, or that one cannot tell.

    Intervals are a block bootstrap over time (docs/report.md). Refuses runs that did not ask the same, and runs whose
    generator was too late to be trusted; --force compares them all the same and says what is wrong.
    """
    from advisor import compare as study
    from traces.aggregate import APPROXIMATE
    from traces.errors import InputError
    from traces.measures import Slo
    from traces.store import open_store

    if ids and not typed("group"):
        group = None
    if bool(ids) == bool(group):
        raise click.UsageError("name the runs, or give --group NAME.")
    limits = Slo.parse(slo) if slo else None
    with open_store(db, create=False) as store:
        found = store.runs(group=group) if group else [store.run(i) for i in dict.fromkeys(ids)]
        if len(found) < 2:
            raise InputError(f"comparing needs two runs or more (got {len(found)}). See: steelyard runs")
        warnings = []
        for run in found:
            why = study.objection(run, found[0], slo_given=limits is not None)
            if why and (not force or not run.ended):
                more = "" if not run.ended else " Name other runs (see: steelyard runs), or --force it."
                raise InputError(f"run {run.id} {why}: it cannot be compared.{more}")
            if why:
                warnings.append(f"run {run.id} {why}")
            warnings.extend(study.doubts(run))
        counted = limits or (Slo.parse(found[0].slo) if found[0].slo else Slo())
        said, compared = study.against_first(store, found, counted, seed=seed)
    rows = [
        {"run": run.id} | figures(replace(run, slo=str(counted)), one) for run, one in zip(found, said, strict=True)
    ]
    if as_json:
        best = max(rows, key=lambda r: r["goodput_per_s"])
        emit_json(
            {
                "runs": rows,
                "best": best["run"],
                "base": found[0].id,
                "slo": str(counted),
                "comparisons": [plain(one) for one in compared],
                "warnings": warnings,
            }
        )
        return
    first = found[0]
    asked = f"{first.trace}, {first.scheduled} requests at {first.rate_per_s:.3g}/s"
    limit = str(counted)
    table(rows, asked + (f", goodput within {limit}" if limit else ""))
    for one in compared:
        _differences(one, {run.id: run for run in found})
    if not all(one.exact for one in said):
        messages().print(f"  {APPROXIMATE}", markup=False)
    for warning in warnings:
        messages().print(f"note: {warning}", markup=False)


def _differences(one: Any, runs: dict[int, Any]) -> None:
    """What a run does better and worse than the base."""
    from rich.table import Table

    from advisor.compare import as_table

    console = messages()
    a, b = runs[one.base], runs[one.run]
    made = Table(
        title=f"run {b.id} ({b.fleet or '?'}) against run {a.id} ({a.fleet or '?'}), 90 % intervals",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    shown = as_table(one)
    for column in shown.head:
        made.add_column(column, justify="left" if column in ("metric", "verdict") else "right")
    styles = {"better": "green", "worse": "red"}
    for row, d in zip(shown.rows, one.differences, strict=True):
        made.add_row(*row, style=styles.get(d.verdict))
    console.print(made, width=max(console.width, 120))
    how = "the same blocks of both" if one.paired else "blocks of each, as they asked different things"
    console.print(
        f"  from {one.blocks:.0f} independent stretches of {one.block_s:.3g} s, {how}; each interval by itself misses in one "
        "case of ten. Between repeats of a run there may be more.",
        markup=False,
    )
