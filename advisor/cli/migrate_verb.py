"""The verb migrate."""

from __future__ import annotations

import click

from advisor.cli.common import db_option, emit_json, example, json_option, messages


@click.command(**example("steelyard migrate --db sqlite:///steelyard.db"))
@json_option
@db_option
def migrate(db: str, as_json: bool) -> None:
    """Bring a database to this version's revision; a SQLite file is copied first."""
    from traces.store import migrate as upgrade

    before, now, backup = upgrade(db)
    if as_json:
        emit_json({"before": before, "now": now, "backup": str(backup) if backup else None})
    elif before == now:
        messages().print(f"The database is at revision {now} already.")
    else:
        messages().print(
            f"From revision {before or 'none'} to {now}." + (f" Backup: {backup}" if backup else ""), markup=False
        )
