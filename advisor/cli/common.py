"""What every verb shares: --json, --db, how a result is printed, how an error ends the program."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from typing import Any, TypeVar

import click
import numpy as np
from rich.console import Console

DEFAULT_DB = "sqlite:///steelyard.db"

F = TypeVar("F", bound=Callable[..., Any])


def json_option(f: F) -> F:
    """``--json``: one JSON object on stdout, nothing else there."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, nothing else.")(f)


def db_option(f: F) -> F:
    """``--db URL``, from STEELYARD_DB, or a SQLite file in the working folder."""
    return click.option(
        "--db",
        metavar="URL",
        default=lambda: os.environ.get("STEELYARD_DB") or DEFAULT_DB,
        help="Database URL: sqlite:///FILE or postgresql://... [env STEELYARD_DB; default sqlite:///steelyard.db]",
        callback=_recover,
    )(f)


def _recover(context: click.Context, _option: click.Parameter, db: str) -> str:
    """Store what waited on disk for this database, and say so; ``runs recover`` is asked to do it and says it itself."""
    from traces.errors import SteelyardError

    if context.info_name in ("recover", "migrate"):
        return db
    try:
        from loadgen.spool import folder, waiting

        if any(folder().glob("*.jsonl")):
            from traces.store import open_store

            with open_store(db, create=False) as store:
                for spool in waiting(store):
                    rows = spool.load(store)
                    click.echo(f"steelyard: {rows} rows that waited in {spool.path} are stored now.", err=True)
    except (SteelyardError, OSError):
        pass  # it is still away; the verb says what is wrong, the rows wait
    return db


def example(text: str) -> dict[str, Any]:
    """The part of a verb's help that shows a command line that runs."""
    return {"epilog": "\b\nExample:\n  " + text.strip().replace("\n", "\n  ")}


def plain(value: Any) -> Any:
    """The value as JSON can hold it: dataclasses and numpy unwrapped, NaN and infinity as null."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def emit_json(value: Any) -> None:
    """Print one JSON object on stdout."""
    click.echo(json.dumps(plain(value), indent=2, allow_nan=False))


def messages(as_json: bool = False) -> Console:
    """Where people read: stdout, or stderr when stdout belongs to JSON. Honours NO_COLOR and non-terminals."""
    stream = sys.stderr if as_json else sys.stdout
    return Console(stderr=as_json, highlight=False, width=None if stream.isatty() else 160)


@contextmanager
def progress(as_json: bool = False) -> Iterator[Any]:
    """Rich progress bars on stderr; plain silence where stderr is no terminal. Yields the Progress."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, highlight=False)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not console.is_terminal,
        transient=False,
    ) as bars:
        yield bars
