"""The options that change a trace before it is asked, simulated or stored; what they change stands in the run."""

from __future__ import annotations

import re
from typing import Any

import click

from advisor.cli.common import Number

SHAPES = (
    "slice",
    "window",
    "time_scale",
    "thin",
    "copies",
    "spread",
    "prompt_scale",
    "output_scale",
    "max_prompt",
    "max_output",
)
"""Names of the options that change a trace; each needs it as a whole."""


def shape_options(f: Any) -> Any:
    """--slice, --window, --time-scale, --thin, --copies, --spread, --prompt-scale, --output-scale, --max-prompt, --max-output."""
    positive = Number(min=0, min_open=True)
    options = [
        click.option("--slice", metavar="FROM-TO", help="Only these requests, counted from 0: 1000-2000."),
        click.option(
            "--window", metavar="FROM-TO", help="Only this part of the trace: 600-1200 (seconds), 10m-20m, 1h-2h."
        ),
        click.option("--time-scale", type=positive, help="All times times this: 0.5 is twice as fast."),
        click.option("--thin", type=Number(0, 1, min_open=True), help="Keep this share of requests, at random."),
        click.option("--copies", type=click.IntRange(1, 1000), help="Lay the trace over itself this many times."),
        click.option(
            "--spread", type=positive, metavar="S", help="Spread requests of one instant over a clock's tick."
        ),
        click.option("--prompt-scale", type=positive, help="Prompt lengths times this."),
        click.option("--output-scale", type=positive, help="Answer lengths times this."),
        click.option("--max-prompt", type=click.IntRange(min=1), help="Cap prompts (counted)."),
        click.option("--max-output", type=click.IntRange(min=1), help="Cap answers (counted)."),
    ]
    for option in reversed(options):
        f = option(f)
    return f


def shaped(schedule: Any, options: dict[str, Any], seed: int = 0) -> Any:
    """The schedule as the options want it, in their order of help: slice, window, time, thin, copies, spread, lengths, caps."""
    from traces import shape

    if options.get("slice"):
        schedule = shape.piece(schedule, *parse_slice(options["slice"]))
    if options.get("window"):
        schedule = shape.window(schedule, *parse_window(options["window"]))
    if options.get("time_scale"):
        schedule = shape.scale_rate(schedule, 1 / options["time_scale"])
    if options.get("thin"):
        schedule = shape.thin(schedule, options["thin"], seed)
    if options.get("copies"):
        schedule = shape.superpose(schedule, options["copies"], seed)
    if options.get("spread"):
        schedule = shape.spread(schedule, options["spread"], seed)
    schedule = shape.scale_tokens(schedule, options.get("prompt_scale") or 1.0, options.get("output_scale") or 1.0)
    return shape.clip_tokens(schedule, options.get("max_prompt"), options.get("max_output"))


def parse_slice(text: str) -> tuple[int, int]:
    """``1000-2000`` as numbers of requests. UsageError when it is none."""
    match = re.fullmatch(r"\s*(\d{1,15})\s*-\s*(\d{1,15})\s*", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise click.UsageError(f"--slice takes FROM-TO, for example 1000-2000 (got {text!r}).")
    return int(match[1]), int(match[2])


def parse_window(text: str) -> tuple[float, float]:
    """``10m-20m`` in seconds. UsageError when it is none."""
    match = re.fullmatch(r"\s*([\d.]+)\s*([smh]?)\s*-\s*([\d.]+)\s*([smh]?)\s*", text)
    units = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}
    try:
        if match is None:
            raise ValueError
        start, end = float(match[1]) * units[match[2] or match[4]], float(match[3]) * units[match[4] or match[2]]
    except ValueError:
        start = end = 0.0
    if not start < end:
        raise click.UsageError(f"--window takes FROM-TO, for example 600-1200, 10m-20m or 1h-2h (got {text!r}).")
    return start, end
