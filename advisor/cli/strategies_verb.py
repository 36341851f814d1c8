"""The verb strategies: four ways to run a PD cluster, measured on the same requests."""

from __future__ import annotations

import hashlib
import json
import time
from typing import Any

import click

from advisor.cli.common import (
    TRACE,
    Number,
    db_option,
    emit_json,
    example,
    json_option,
    messages,
    plain,
    progress,
    warn,
)


@click.command(**example("steelyard strategies --preset origin --scale small --seeds 4"))
@click.option("--trace", type=TRACE, help="A stored trace: windows of it are scored, what came before each is history.")
@click.option(
    "--preset",
    type=click.Choice(["origin", "shift"]),
    default="origin",
    show_default=True,
    help="Without --trace: the report's log-normal workload, or one whose mix turns half-way.",
)
@click.option(
    "--scale",
    type=click.Choice(["small", "medium", "large", "all"]),
    default="small",
    show_default=True,
    help="100 requests on 8 GPUs, 200 on 16, 500 on 32.",
)
@click.option("--requests", type=click.IntRange(min=2), help="Requests to score, instead of --scale (with --gpus).")
@click.option("--gpus", type=click.IntRange(min=2), help="GPUs, instead of --scale (with --requests).")
@click.option("--rate", type=Number(min=0, min_open=True), help="Requests per second [default: the source's].")
@click.option(
    "--arrivals",
    type=click.Choice(["uniform", "poisson", "constant", "burst"]),
    default="uniform",
    show_default=True,
    help="Of a preset; burst puts all at 0 (of a trace too).",
)
@click.option(
    "--sample", metavar="N|PCT", help="History to choose from, in requests or as a share of them [default: 100%]."
)
@click.option(
    "--profile", help="Laws: a shipped profile or a TOML file [default: origin for a preset, demo for a trace]."
)
@click.option(
    "--slo", help='Limits for goodput; given, choices go by goodput first [default: "ttft<5s tpot<50ms", by P99].'
)
@click.option(
    "--seeds", type=click.IntRange(min=1, max=1000), default=20, show_default=True, help="Draws in the simulator."
)
@click.option("--regret", is_flag=True, help="Also: how much worse a split chosen on little history does.")
@click.option(
    "--over",
    type=click.Choice(["sim", "http"]),
    default="sim",
    show_default=True,
    help="http: also through Locust against the served endpoint.",
)
@click.option(
    "--http-seeds", type=click.IntRange(min=1, max=100), default=3, show_default=True, help="Draws over HTTP."
)
@click.option(
    "--speed", type=Number(min=0, min_open=True), default=10.0, show_default=True,
    help="Model seconds per second over HTTP.",
)  # fmt: skip
@json_option
@db_option
def strategies(
    trace: str | None,
    preset: str,
    scale: str,
    requests: int | None,
    gpus: int | None,
    rate: float | None,
    arrivals: str,
    sample: str | None,
    profile: str | None,
    slo: str | None,
    seeds: int,
    regret: bool,
    over: str,
    http_seeds: int,
    speed: float,
    as_json: bool,
    db: str,
) -> None:
    """Run baseline, online, offline and static on the same requests and physics, and say what each one does.

    What a strategy must be told beforehand is chosen on history and scored on requests it has not seen. Beside each rule
    of the report that this tool comes from stands a better one of ours; docs/strategies.md tells the story.
    """
    from advisor import strategies as study
    from loadgen.cluster import Profile
    from traces.errors import InputError, StoreError
    from traces.measures import Slo
    from traces.store import open_store

    if (requests is None) != (gpus is None):
        raise InputError("--requests and --gpus belong together: give both, or --scale.")
    laws = Profile.load(profile or ("demo" if trace else "origin"))
    if laws.discipline != "queue":
        raise InputError(f"profile {laws.name} has no queues: its strategies cannot differ. Give another --profile.")
    wanted = Slo.parse(slo or study.DEFAULT_SLO)
    sizes = study.SCALES if scale == "all" else {scale: study.SCALES[scale]}
    if requests and gpus:
        sizes = {f"{requests}/{gpus}": (requests, gpus)}
    console = messages(as_json)
    found: dict[str, Any] = {}
    with open_store(db) as store, progress(as_json) as bars:
        schedule = store.schedule(trace, blocks=True) if trace else None
        for name, (n, g) in sizes.items():
            work = study.Workload(n, schedule, preset, arrivals, rate, _sample(sample, n))
            question = study.Question(work, g, laws, wanted, by_goodput=slo is not None)
            task = bars.add_task(f"{name}: simulate", total=seeds)
            answer = study.study(
                question,
                seeds,
                sizes=[k for k in (10, 20, 50, 100, 200, 500) if not trace or k + n <= len(schedule or ())]
                if regret
                else (),
                on_seed=lambda task=task: bars.advance(task),  # type: ignore[misc]
            )
            if over == "http":
                task = bars.add_task(f"{name}: over HTTP", total=http_seeds * len(study.ARMS))
                now = {"cell": ""}

                def note(line: str, task: Any = task, now: dict[str, str] = now) -> None:
                    now["cell"] = line
                    bars.update(task, advance=1, note=line)

                def on_live(live: Any, task: Any = task, now: dict[str, str] = now) -> None:
                    bars.update(task, note=lambda: f"{now['cell']}: {live.line()}")

                answer["http"] = study.over_http(
                    store,
                    question,
                    http_seeds,
                    speed=speed,
                    group=time.strftime(f"strategies-{name}-%Y%m%d-%H%M%S", time.gmtime()),
                    note=note,
                    on_live=on_live,
                )
            if not trace and preset == "origin" and name in study.REPORT:
                answer["report"] = {k: v | {"what": study.REPORT_NOTES[k]} for k, v in study.REPORT[name].items()}
            found[name] = {"requests": n, "gpus": g} | answer
        whole: dict[str, Any] = {
            "source": trace or preset,
            "arrivals": "as recorded" if trace and arrivals != "burst" else arrivals,
            "profile": laws.name,
            "slo": str(wanted),
            "chosen_by": "goodput, then p99" if slo else "p99, then mean",
            "seeds": seeds,
            "strategies": {arm.name: {"whose": arm.whose, "about": arm.about} for arm in study.ARMS},
            "scales": found,
        }
        kept = plain(whole)
        digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
        runs = [i for answer in found.values() for i in answer.get("http", {}).get("runs", [])]
        whole["recommendation"] = None
        try:
            whole["recommendation"] = store.add_recommendation("strategies", kept, runs, digest, seeds)
        except StoreError as error:  # what took hours is said all the same
            warn(f"this answer is not stored: {error}")
    if as_json:
        emit_json(whole)
        return
    console.print(
        f"{whole['source']}, profile {laws.name}, goodput under {wanted}, {seeds} draws, 90 % intervals of the mean; "
        "latency from the recorded arrival",
        markup=False,
    )
    for name, answer in found.items():
        _show(console, name, answer)


def _sample(text: str | None, requests: int) -> int:
    from traces.errors import InputError

    if text is None:
        return 0
    share = text.endswith("%")
    try:
        value = float(text.removesuffix("%"))
        count = round(value / 100 * requests) if share else int(text)
    except (ValueError, OverflowError):
        count = 0
    if count < 2:
        raise InputError(
            f"--sample takes a number of requests or a share, at least 2 requests (got {text!r}): 50 or 25%."
        )
    return count


def _span(value: dict[str, float], digits: str = ".3g", scale: float = 1.0) -> str:
    middle = format(value["value"] * scale, digits)
    half = (value["high"] - value["value"]) * scale
    # Equal figures differ by rounding alone; that is no interval worth showing.
    return middle if half != half or half <= 1e-9 * abs(value["value"] * scale) else f"{middle} ±{half:.2g}"


def _roles(row: dict[str, Any]) -> str:
    shares = [row[f"utilisation_{role}"]["value"] for role in ("prefill", "decode")]
    return "/".join("-" if share != share else f"{share:.0%}" for share in shares)


def _show(console: Any, name: str, answer: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    modes = {
        "arrivals": "requests as they arrive (offline starts when the last has)",
        "burst": "all requests due at 0",
    }
    for mode, title in modes.items():
        if mode not in answer:
            continue
        asked = f"{name}: {answer['requests']} requests, {answer['gpus']} GPUs, {title}"
        table = Table(box=None, pad_edge=False, title=escape(asked))
        table.title_justify = "left"
        titles = "|P99 s|mean s|P99 to baseline|TTFT s|TPOT ms|req/s|goodput/s|busy, P/D|switches|/h"
        for column in titles.split("|"):
            table.add_column(column, justify="left" if not column else "right")
        for arm, row in answer[mode].items():
            table.add_row(
                arm,
                _span(row["p99_s"]),
                _span(row["mean_s"]),
                _span(row["change_p99"], "+.0f", 100) + " %",
                _span(row["ttft_mean_s"]),
                _span(row["tpot_mean_s"], scale=1e3),
                _span(row["throughput_per_s"]),
                _span(row["goodput_per_s"]),
                f"{row['utilisation']['value']:.0%}, " + _roles(row),
                _span(row["switches"], ".0f"),
                _span(row["switches_per_h"], ".0f"),
            )
        console.print(table)
        for kind, change in answer["ours_against_report"][mode].items():
            console.print(
                f"  {kind}: ours against the report's rule: P99 {_span(change['p99_s'], '+.0f', 100)} %, "
                f"mean {_span(change['mean_s'], '+.0f', 100)} %"
            )
    if "report" in answer:
        console.print("  The report's own table (not comparable, see docs/strategies.md):")
        for arm, said in answer["report"].items():
            console.print(f"    {arm.removesuffix('-report')}: P99 {said['p99_s']:g} s; {said['what']}")
    for row in answer.get("regret_by_sample", ()):
        console.print(
            f"  split chosen on {row['sample']} requests: P99 {_span(row['regret'], '+.0f', 100)} % above the best"
        )
    if "http" in answer:
        http = answer["http"]
        console.print(
            f"  over HTTP at speed {http['speed']:g}, {http['seeds']} draws, against the simulator on the same:"
        )
        for arm, row in http["arms"].items():
            off = row["against_simulation"]
            console.print(
                f"    {arm:16} P99 {_span(row['p99_s'])} s ({_span(off['p99_s'], '+.1f', 100)} %), "
                f"mean {_span(row['mean_s'])} s ({_span(off['mean_s'], '+.1f', 100)} %)"
            )
        for line in http["rejected"]:
            console.print(f"    rejected: {line}", markup=False)
