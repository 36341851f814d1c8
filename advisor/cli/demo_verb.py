"""The verb demo."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from advisor.cli.common import SEED, emit_json, example, json_option, messages, progress, quiet, typed_above


@click.command(**example("steelyard demo --out steelyard-demo"))
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default="steelyard-demo",
    show_default=True,
    help="Folder for the database and the report.",
)
@click.option("--db", metavar="URL", callback=typed_above, help="Database URL [default: steelyard.db in --out].")
@click.option("--workers", type=click.IntRange(1, 64), default=2, show_default=True, help="Load workers.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the bootstrap and of the prompts.")
@json_option
def demo(out: Path, db: str | None, workers: int, seed: int, as_json: bool) -> None:
    """The main job in two minutes: a real trace, the embedded endpoint, three runs, a recommended P:D, a report."""
    from advisor.cli.advise_verbs import show
    from advisor.cli.progress import Steps
    from advisor.demo import demo as run_demo
    from traces.errors import InputError
    from traces.store import open_store, told

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be made ({error.strerror}). Give another --out.") from error
    console = messages(as_json)
    url = db or f"sqlite:///{out / 'steelyard.db'}"
    words = ["steelyard", "demo", "--out", str(out), "--workers", str(workers)]
    with open_store(url) as store, progress(as_json) as bars:
        steps = Steps(bars)
        done = run_demo(
            store,
            out,
            seed=seed,
            workers=workers,
            note=steps,
            watch=steps.watch,
            say=lambda line: None if quiet() else bars.say(line) if bars.watched else console.print(line, markup=False),
            command=shlex.join([*words, "--seed", str(seed), *(["--db", db] if db and told(db) else [])]),
        )
    worst = max(done.runs, key=lambda run: run.lag_p99_ms)
    if as_json:
        emit_json(
            {
                "runs": [run.id for run in done.runs],
                "recommendation": done.answer.recommendation.as_json() | {"recommendation": done.answer.id},
                "lag_ms": {"p50": worst.lag_p50_ms, "p99": worst.lag_p99_ms, "max": worst.lag_max_ms},
                "report": str(done.report),
            }
        )
        return
    show(done.answer.recommendation)
    console.print(
        f"Load generator's own lag, worst of the runs: p50 {worst.lag_p50_ms:.1f} ms, p99 {worst.lag_p99_ms:.1f} ms, "
        f"max {worst.lag_max_ms:.1f} ms ({worst.verdict})\nReport: {done.report}",
        markup=False,
    )
