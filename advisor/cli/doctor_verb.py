"""The verb doctor."""

from __future__ import annotations

from typing import Any

import click

from advisor.cli.common import db_option, emit_json, example, json_option, messages
from advisor.cli.reaching import asking, reached


@click.command(**example("steelyard doctor --endpoint http://127.0.0.1:8123"))
@click.option("--endpoint", metavar="URL", help="Also look at this endpoint; it is asked for two tokens.")
@asking
@json_option
@db_option
@click.pass_context
def doctor(context: click.Context, /, endpoint: str | None, as_json: bool, db: str, **options: Any) -> int:
    """Check Python, libraries, configuration, database, open files, cores, clock and endpoint, and say what to do.

    Exit code 1 when something would make work fail.
    """
    from advisor.doctor import examine

    console = messages(as_json)
    config = context.parent.params.get("config") if context.parent is not None else None
    (where,) = reached([endpoint], options) if endpoint is not None else (None,)
    asked = {name: options[name] for name in ("engine", "model", "chat")}
    checks = []
    for check in examine(db, where=where, config=config, **asked):
        checks.append(check)
        if not as_json:
            console.print(f"{check.word:8} {check.name}: {check.found}", markup=False)
            if check.advice:
                console.print(f"         -> {check.advice}", markup=False)
    problems = sum(check.word == "problem" for check in checks)
    warnings = sum(check.word == "warning" for check in checks)
    if as_json:
        emit_json({"ok": not problems, "problems": problems, "warnings": warnings, "checks": checks})
    else:
        console.print(f"{problems} problems, {warnings} warnings." if problems or warnings else "All is well.")
    return 1 if problems else 0
