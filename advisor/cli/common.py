"""What every verb shares: --json, --db, how a result is printed, how an error ends the program."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem
from rich.console import Console
from rich.text import Text

from traces.errors import CONTROLS

DEFAULT_DB = "sqlite:///steelyard.db"

F = TypeVar("F", bound=Callable[..., Any])


def json_option(f: F) -> F:
    """``--json``: one JSON object on stdout, nothing else there; and ``--quiet``."""
    f = click.option(
        "-q",
        "--quiet",
        is_flag=True,
        expose_value=False,
        callback=_hush,
        help="The result alone: no progress, no notes on the way.",
    )(f)
    return click.option(
        "--json", "as_json", is_flag=True, callback=_as_json, help="Print one JSON object on stdout, nothing else."
    )(f)


def _as_json(context: click.Context, option: click.Parameter, value: bool) -> bool:
    """Was it asked for, here or above? The program's end, which prints what went wrong, is told."""
    value = bool(typed_above(context, option, value))
    if isinstance(context.obj, dict):
        context.obj["json"] = value
    return value


def _hush(context: click.Context, _option: click.Parameter, quiet: bool) -> None:
    if quiet:
        context.meta["steelyard.quiet"] = True


def quiet() -> bool:
    """Was ``--quiet`` given?"""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get("steelyard.quiet"))


def typed_above(context: click.Context, option: click.Parameter, value: Any) -> Any:
    """What was typed before the verb, where the verb itself has no such word: it too beats environment and file."""
    above, name = context.parent, str(option.name)
    typed = click.core.ParameterSource.COMMANDLINE
    if above is None or above.get_parameter_source(name) is not typed or context.get_parameter_source(name) is typed:
        return value
    context.set_parameter_source(name, typed)  # for the verb below this one
    return above.params[name]


def typed(*names: str) -> bool:
    """Was one of these options typed? What is from elsewhere gives way to one that excludes it."""
    context = click.get_current_context(silent=True)
    source = click.core.ParameterSource.COMMANDLINE
    return context is not None and any(context.get_parameter_source(name) is source for name in names)


def db_option(f: F) -> F:
    """``--db URL``, from STEELYARD_DB, or a SQLite file in the working folder. Eager: names of traces and runs are in it."""
    return click.option(
        "--db",
        metavar="URL",
        is_eager=True,
        default=_default_db,
        help="Database URL: sqlite:///FILE or postgresql://... [env STEELYARD_DB; default sqlite:///steelyard.db]",
        callback=_recover,
    )(f)


def _default_db() -> str:
    """That of the group above (``runs --db URL show 1``), else STEELYARD_DB, else the file in the working folder."""
    context = click.get_current_context(silent=True)
    above = context.parent.params.get("db") if context is not None and context.parent is not None else None
    return str(above or os.environ.get("STEELYARD_DB") or DEFAULT_DB)


SECRET_FILE = click.Path(path_type=str)
"""The file of a secret, or keyring:SERVICE/USER."""


def token_of(named: str | None, option: str, variable: str) -> str | None:
    """The token that a port of ours asks for: from the file or keyring that is named, else from the environment."""
    from traces.credentials import read_secret

    return read_secret(named, option) if named else os.environ.get(variable) or None


def tls_options(f: F) -> F:
    """``--tls-cert`` and ``--tls-key``: the certificate that a port of ours shows."""
    f = click.option("--tls-key", default="", metavar="FILE", help="PEM key of --tls-cert, if it is not in that file.")(
        f
    )
    return click.option(
        "--tls-cert",
        default="",
        metavar="FILE",
        help="Speak TLS on the ports that this command opens, with this PEM certificate.",
    )(f)


def warn(text: str) -> None:
    """A line on stderr, if there is one."""
    if text:
        click.echo(f"steelyard: {text}", err=True)


if TYPE_CHECKING:
    _Named = click.ParamType[Any]  # no generic at run time before click 8.5
else:
    _Named = click.ParamType


class Number(click.FloatRange):
    """A finite number within bounds: NaN lies beyond none of them."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """As click does, and finite."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


class TraceName(_Named):
    """The name of a stored trace, completed by the shell from the database. Whether it is stored, the verb finds out."""

    name = "trace"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The stored traces."""
        return [
            CompletionItem(t.name, help=f"{t.summary.get('rows_kept', '?')} requests")
            for t in _look_up(ctx, lambda store: store.traces())
            if t.name.startswith(incomplete)
        ]


class RunId(_Named):
    """A run: its number, its name if it has that alone, or ``latest``."""

    name = "run"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number."""
        text = str(value)
        if text.isdecimal() and len(text) < 19:  # what a database can be asked for
            return int(text)
        if ctx is None:
            self.fail(f"a run is named by its number (got {text!r}).", param, ctx)
        from traces.store import open_store

        with open_store(_db_of(ctx), create=False) as store:
            known = store.runs()
        if text == "latest" and known:
            return known[-1].id
        named = [run.id for run in known if run.name == text]
        if len(named) == 1:
            return named[0]
        if named:
            self.fail(f"{text!r} is the name of runs {', '.join(map(str, named))}: give the number.", param, ctx)
        near = get_close_matches(text, {run.name for run in known}, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else "See: steelyard runs"
        self.fail(f"no run is named {text!r}. {hint}", param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The numbers of the stored runs, with what they are; the latest first."""
        return [
            CompletionItem(str(run.id), help=f"{run.name} {run.fleet or ''} {run.verdict}")
            for run in reversed(_look_up(ctx, lambda store: store.runs()))
            if str(run.id).startswith(incomplete)
        ]


MOST_GROUP = 200
"""Characters of a group's name that every database holds."""


class GroupName(_Named):
    """The name of a group of runs, completed from the database."""

    name = "group"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name; before anything is moved or sent it is clear that a database can hold it."""
        text = str(value)
        if len(text) > MOST_GROUP:
            self.fail(f"a group's name has at most {MOST_GROUP} characters (got {len(text)}). Shorten it.", param, ctx)
        return text

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The stored groups, the latest first."""
        groups = dict.fromkeys(run.group for run in reversed(_look_up(ctx, lambda store: store.runs())) if run.group)
        return [CompletionItem(name) for name in groups if name.startswith(incomplete)]


TRACE, RUN, GROUP = TraceName(), RunId(), GroupName()


def _db_of(context: click.Context) -> str:
    """The database that the command is about, its own --db or that of the group above."""
    above = context.parent.params.get("db") if context.parent is not None else None
    return str(context.params.get("db") or above or os.environ.get("STEELYARD_DB") or DEFAULT_DB)


def _look_up(context: click.Context, ask: Callable[[Any], list[Any]]) -> list[Any]:
    """What the database says; nothing where it cannot be asked: a shell's completion has nowhere to complain."""
    from traces.errors import SteelyardError
    from traces.store import open_store

    try:
        with open_store(_db_of(context), create=False) as store:
            return ask(store)
    except SteelyardError:
        return []


SEED = click.IntRange(0, 2**63 - 1)
"""What a column of a database holds."""

RECOVERED = "steelyard.recovered"
"""In a command's meta: database -> file -> rows that were stored before the verb began."""


HELD = "Others of the same run wait still: another process is storing or adding them."


def _recover(context: click.Context, option: click.Parameter, db: str) -> str:
    """The database, that of the group above if it was typed there. Store what waited on disk for it, and say so; ``runs recover``
    is asked to do it and says it itself."""
    from traces.errors import InputError, SteelyardError

    db = str(typed_above(context, option, db))
    if context.info_name in ("recover", "migrate"):
        return db
    try:
        from loadgen.state import folder

        if any(folder("spool").glob("*.jsonl")):
            from loadgen.spool import waiting
            from traces.store import open_store

            with open_store(db, create=False) as store:
                for spool in waiting(store):
                    try:
                        rows = spool.load(store)
                    except InputError:
                        continue  # of a run that is gone, says runs recover; the others' rows are stored
                    context.meta.setdefault(RECOVERED, {}).setdefault(db, {})[str(spool.path)] = rows
                    held = f" {HELD}" if spool.size() else ""
                    click.echo(f"steelyard: {rows} rows that waited in {spool.path} are stored now.{held}", err=True)
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
    if hasattr(value, "tolist"):  # an array or a scalar of numpy
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def or_dash(value: float | None, form: str) -> str:
    """The figure as text; a dash where nothing is known."""
    return "-" if value is None or math.isnan(value) else format(value, form)


def spread(ms: dict[str, float]) -> str:
    """The median and the tail of a latency."""
    return f"p50 {or_dash(ms['p50'], '.1f')}  p99 {or_dash(ms['p99'], '.1f')} ms"


def workers_of(fleet: Any) -> dict[str, int]:
    """The workers of a fleet as JSON says them: prefill, decode, and mixed where there are some."""
    mixed = {"mixed": fleet.mixed} if fleet.mixed else {}
    return {"prefill": fleet.prefill, "decode": fleet.decode} | mixed


def emit_json(value: Any) -> None:
    """Print one JSON object on stdout."""
    click.echo(json.dumps(plain(value), indent=2, allow_nan=False))


class Plain(Console):
    """A console to which text from outside is text: control codes in the name of a model or in an error do nothing."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Every string that is printed or stands in a table comes through here."""
        return super().render_str(text.translate(CONTROLS), **options)


def messages(as_json: bool = False) -> Console:
    """Where people read: stdout, or stderr when stdout belongs to JSON. Honours NO_COLOR. Lines wrap in a terminal alone: who
    pipes them looks for them whole."""
    stream = sys.stderr if as_json else sys.stdout
    return Plain(stderr=as_json, highlight=False, width=None if stream.isatty() else UNWRAPPED)


UNWRAPPED = 1 << 16
"""Columns of what is no terminal."""


@contextmanager
def progress(as_json: bool = False) -> Iterator[Any]:
    """What long work is doing, how long it will take and what it has found, on stderr (:mod:`advisor.cli.progress`)."""
    from advisor.cli.progress import shown

    with shown(quiet()) as bars:
        yield bars
