"""The verbs serve and simulate: the cluster model at wall-clock speed, and in virtual time."""

from __future__ import annotations

from typing import Any

import click

from advisor.cli.common import (
    SECRET_FILE,
    TRACE,
    Number,
    db_option,
    emit_json,
    example,
    json_option,
    messages,
    tls_options,
    token_of,
    warn,
    workers_of,
)
from advisor.cli.replay_verbs import pair
from advisor.cli.shaping import shape_options, shaped


@click.command(**example("steelyard serve --profile demo --fleet 4:4 --port 8123"))
@click.option("--profile", default="demo", show_default=True, help="A shipped profile, or a TOML file.")
@click.option(
    "--fleet",
    default="4:4",
    show_default=True,
    metavar="P:D[+M]",
    help="Prefill and decode workers at start; 0:0+8 are eight mixed (colocated) ones.",
)
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to bind; others than loopback need a token."
)
@click.option("--port", type=click.IntRange(0, 65535), default=0, show_default=True, help="Port; 0 takes a free one.")
@click.option("--speed", type=Number(), default=1.0, show_default=True, help="Model seconds per second.")
@click.option(
    "--token-file", type=SECRET_FILE, metavar="FILE", help="Bearer token to ask for [or STEELYARD_SERVE_TOKEN]."
)
@tls_options
@click.option("--fail-every", type=click.IntRange(min=0), default=0, help="Let every Nth completion fail.")
@click.option(
    "--fail-kind",
    type=click.Choice(["status", "reset", "stall", "html", "reset-mid", "stall-mid"]),
    default="status",
    show_default=True,
    help="How; -mid after half of the answer.",
)
@click.option("--slow-start", type=Number(min=0), default=0.0, metavar="S", help="Answer 503 for the first S seconds.")
@click.option(
    "--roles",
    type=click.Choice(["fixed", "on-demand"]),
    default="fixed",
    show_default=True,
    help="on-demand: an idle worker takes the next phase that waits and pays the role change.",
)
@click.option(
    "--dialect",
    type=click.Choice(["steelyard", "vllm", "sglang", "dynamo"]),
    default="steelyard",
    show_default=True,
    help="Whose names /metrics speaks.",
)
@json_option
def serve(
    profile: str,
    fleet: str,
    host: str,
    port: int,
    speed: float,
    token_file: str | None,
    tls_cert: str,
    tls_key: str,
    fail_every: int,
    fail_kind: str,
    slow_start: float,
    roles: str,
    dialect: str,
    as_json: bool,
) -> None:
    """Run the reference PD endpoint: OpenAI-shaped, its answers as slow as the profile's laws say under the load.

    Prints one line when it listens, ends on Ctrl-C or SIGTERM. PUT /fleet {"prefill": 3, "decode": 5} moves workers.
    """
    from loadgen.cluster import Profile
    from loadgen.cluster.server import run
    from loadgen.ports import Door
    from traces.records import Fleet

    door = Door(host, port, token_of(token_file, "--token-file", "STEELYARD_SERVE_TOKEN"), tls_cert, tls_key)

    def ready(url: str) -> None:
        warn(door.warning)
        if as_json:
            emit_json({"url": url, "profile": profile, "fleet": fleet})
        else:
            click.echo(f"listening on {url}")

    run(
        Profile.load(profile),
        Fleet.parse(fleet),
        door=door,
        speed=speed,
        fail_every=fail_every,
        fail_kind=fail_kind,
        slow_start_s=slow_start,
        on_demand=roles == "on-demand",
        dialect=dialect,
        ready=ready,
    )


@click.command(**example("steelyard simulate azure-2023-conv --profile demo --gpus 8 --requests 600 --rate 9"))
@click.argument("trace", type=TRACE)
@click.option(
    "--profile", default="demo", show_default=True, help="A shipped profile, or a TOML file (advise --profile-out)."
)
@click.option("--fleet", metavar="P:D", help="One fleet [default: all splits of --gpus].")
@click.option("--gpus", type=click.IntRange(min=2), default=8, show_default=True, help="GPUs to split.")
@click.option("--gpus-per-worker", metavar="P,D", default="1,1", show_default=True, help="GPUs a worker uses.")
@click.option("--rate", type=Number(min=0, min_open=True), help="Requests per second [default: the trace's].")
@click.option("--requests", type=click.IntRange(min=1), help="Only the first N requests.")
@click.option("--slo", default="ttft<0.5s tpot<50ms", show_default=True, help="Limits per request.")
@shape_options
@json_option
@db_option
def simulate(
    trace: str,
    profile: str,
    fleet: str | None,
    gpus: int,
    gpus_per_worker: str,
    rate: float | None,
    requests: int | None,
    slo: str,
    as_json: bool,
    db: str,
    **shapes: Any,
) -> None:
    """Run a stored trace through the cluster model in virtual time, on one fleet or on every split."""
    from rich.table import Table

    from loadgen.cluster import Profile
    from loadgen.cluster import simulate as run
    from traces.errors import InputError
    from traces.measures import Slo, summarise
    from traces.records import Fleet
    from traces.shape import head, to_rate
    from traces.store import open_store

    laws, wanted = Profile.load(profile), Slo.parse(slo)
    with open_store(db, create=False) as store:
        schedule = store.schedule(trace, blocks=laws.cache_tokens > 0)
    schedule = shaped(schedule, shapes)
    if requests:
        schedule = head(schedule, requests)
    if rate:
        schedule = to_rate(schedule, rate)
    rows = []
    fleets = [Fleet.parse(fleet)] if fleet else Fleet.splits(gpus, pair(gpus_per_worker))
    if not fleets:
        raise InputError(f"no fleet uses exactly {gpus} GPUs with {gpus_per_worker} a worker. Give other --gpus.")
    for one in fleets:
        result = run(schedule, one, laws)
        rows.append((one, summarise(result.observations, wanted), result.utilisation))
    if as_json:
        emit_json(
            {
                "trace": trace,
                "profile": laws.name,
                "slo": str(wanted),
                "requests": len(schedule),
                "rate_per_s": schedule.rate_per_s,
                "fleets": [workers_of(one) | {"summary": summary, "utilisation": busy} for one, summary, busy in rows],
            }
        )
        return
    table = Table(box=None, pad_edge=False)
    letters = {"prefill": "P", "decode": "D", "mixed": "mixed"}
    roles = [role for role in letters if getattr(fleets[0], role)]  # the same of all: a split has no mixed workers
    shares = f"busy {'/'.join(letters[role] for role in roles)}"
    for name in ("P:D", "goodput/s", "within SLO", "TTFT p50/p99 ms", "TPOT p50/p99 ms", "E2E p99 s", shares):
        table.add_column(name, justify="left" if name == "P:D" else "right")
    for one, s, busy in rows:
        table.add_row(
            str(one),
            f"{s.goodput_per_s:.3g}",
            f"{s.attainment:.1%}",
            f"{s.ttft_p50_s * 1e3:.0f}/{s.ttft_p99_s * 1e3:.0f}",
            f"{s.tpot_p50_s * 1e3:.1f}/{s.tpot_p99_s * 1e3:.1f}",
            f"{s.e2e_p99_s:.2f}",
            "/".join(f"{busy[role]:.0%}" for role in roles),
        )
    console = messages()
    console.print(
        f"{trace}: {len(schedule)} requests at {schedule.rate_per_s:.3g}/s, profile {laws.name}, {wanted}", markup=False
    )
    console.print(table)
