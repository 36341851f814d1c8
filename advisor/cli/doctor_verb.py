"""The verb doctor."""

from __future__ import annotations

import click

from advisor.cli.common import SECRET_FILE, db_option, emit_json, example, json_option, messages


@click.command(**example("steelyard doctor --endpoint http://127.0.0.1:8123"))
@click.option("--endpoint", metavar="URL", help="Also look at this endpoint; it is asked for two tokens.")
@click.option("--model", help="Model to ask for [default: the server's first].")
@click.option(
    "--api-key-file",
    type=SECRET_FILE,
    metavar="FILE",
    help="File with the bearer token, or keyring:SERVICE/USER [default: env STEELYARD_API_KEY].",
)
@json_option
@db_option
@click.pass_context
def doctor(
    context: click.Context, endpoint: str | None, model: str | None, api_key_file: str | None, as_json: bool, db: str
) -> int:
    """Check Python, libraries, configuration, database, open files, cores, clock and endpoint, and say what to do.

    Exit code 1 when something would make work fail.
    """
    from advisor.doctor import examine
    from loadgen.replay import read_api_key

    console = messages(as_json)
    config = context.parent.params.get("config") if context.parent is not None else None
    checks = []
    for check in examine(db, url=endpoint, api_key=read_api_key(api_key_file), model=model, config=config):
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
