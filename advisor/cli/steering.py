"""Which rule moves workers, and by which thresholds: the options that ``replay`` and ``control run`` share."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from advisor.cli.common import Number, typed, warn

LAWS = click.option(
    "--laws", metavar="PROFILE", help="Laws of the servers: a shipped profile or a file of advise --profile-out."
)
THRESHOLDS = click.option(
    "--thresholds",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="online: thresholds as JSON, of advise --json or its thresholds{} alone; instead of --laws and what follows.",
)
RECOMMENDATION = click.option(
    "--recommendation", type=int, metavar="ID", help="online: the thresholds of a stored answer of advise."
)
BACKLOG = (
    click.option(
        "--more", type=Number(), default=1.0, show_default=True, help="online: seconds of backlog that move a worker."
    ),
    click.option(
        "--ratio", type=Number(), default=2.0, show_default=True, help="online: and times the other queue's backlog."
    ),
    click.option("--cool", type=Number(), default=10.0, show_default=True, help="online: seconds before a move back."),
)


def steering(f: Any) -> Any:
    """``--laws``, ``--thresholds``, ``--recommendation``, ``--more``, ``--ratio``, ``--cool``."""
    for option in reversed((LAWS, THRESHOLDS, RECOMMENDATION, *BACKLOG)):
        f = option(f)
    return f


def thresholds(store: Any, options: dict[str, Any]) -> dict[str, Any] | None:
    """The thresholds{} that --thresholds or --recommendation name, with where they came from."""
    from traces.errors import InputError

    path, number = options["thresholds"], options["recommendation"]
    if typed("thresholds", "recommendation"):
        path, number = path if typed("thresholds") else None, number if typed("recommendation") else None
    elif options["policy"] != "online":
        return None
    if path is None and number is None:
        return None
    if path is not None and number is not None:
        raise click.UsageError("give --thresholds or --recommendation, not both.")
    if options["policy"] != "online":
        raise click.UsageError("--thresholds and --recommendation belong to --policy online.")
    if path is None:
        where = f"recommendation {number}"
        held = store.recommendation(number)
    else:
        where = str(path)
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{where}: is no readable JSON ({error}).") from None
    found = held.get("thresholds", held) if isinstance(held, dict) else None
    if not isinstance(found, dict) or not found.get("rule"):
        raise InputError(
            f"{where} holds no thresholds: its answer is to stand still. Ask for some: steelyard advise --strategy online"
        )
    return found | {"where": where, "schedule_digest": held.get("schedule_digest")}


def seconds_between(tick_s: float, known: dict[str, Any] | None) -> float:
    """Seconds between decisions: ``--tick`` where it was typed, else what the thresholds were found at, else its default."""
    from traces.errors import InputError

    said = (known or {}).get("tick_s")
    if typed("tick", "tick_s") or said is None:
        return tick_s
    try:
        found = float(said)
    except (ArithmeticError, TypeError, ValueError):
        found = 0.0
    if not 0 < found < math.inf:
        raise InputError(
            f"{(known or {}).get('where')}: tick_s of the thresholds must be seconds above 0 (got {said!r:.80})."
        )
    return found


def rule_of(
    options: dict[str, Any],
    known: dict[str, Any] | None,
    slo: Any,
    mean_prompt: float | None,
    mean_output: float | None,
    schedule: Any = None,
) -> Any:
    """The rule of --policy online or online-report. known: of :func:`thresholds`. mean_prompt, mean_output: tokens (--laws).

    schedule: what is replayed; None for live traffic. Only that of the answer has the clock that a forecast was learned by; any
    other gets the rule without the forecast.
    """
    from loadgen import policy
    from loadgen.cluster import Profile
    from traces.errors import InputError
    from traces.measures import Slo

    backlog = [name for name in ("laws", "more", "ratio", "cool", "mean_prompt", "mean_output") if typed(name)]
    if backlog and (known is not None or options["policy"] == "online-report"):
        given = ", ".join(f"--{name.replace('_', '-')}" for name in backlog)
        rule = "the 1.5x counts of --policy online-report" if known is None else f"the thresholds of {known['where']}"
        raise click.UsageError(f"{given} would not count: {rule} are a whole rule. Leave it out.")
    if known is not None:
        found = policy.rule_of(known, str(known["where"]))
        if not isinstance(found, policy.DemandRule) or found.forecast is None or not found.forecast.period_s:
            return found
        if schedule and schedule.digest() == known.get("schedule_digest"):
            return found
        warn(
            f'{known["where"]}: the rule moves without its forecast (scored as "online, reactive"), whose clock, a period of '
            f"{found.forecast.period_s:.4g} s, counts from the first second of the traffic it was learned from: "
            + ("this replay asks otherwise." if schedule else "live traffic has another beginning.")
        )
        return replace(found, forecast=None)
    if options["policy"] == "online-report":
        return policy.CountRule()
    if not options["laws"]:
        raise InputError(
            "--policy online needs thresholds: give --recommendation ID or --thresholds FILE (steelyard advise), "
            "or --laws (steelyard advise --profile-out FILE)."
        )
    if not mean_prompt or not mean_output:
        raise InputError("--policy online by --laws needs --mean-prompt and --mean-output, in tokens.")
    return policy.BacklogRule(
        Profile.load(options["laws"]),
        mean_prompt,
        mean_output,
        slo or Slo(),
        options["more"],
        options["ratio"],
        cool_s=options["cool"],
    )
