"""The command ``steelyard``: flat verbs, each parses, calls one function and prints.

A verb is loaded when it is used, so that ``steelyard --help`` does not import Locust or scikit-learn.
"""

from __future__ import annotations

import errno
import importlib
import os
import resource
import sys
from collections.abc import Sequence

import click

from advisor.cli.common import db_option, emit_json, json_option, warn
from traces import __version__
from traces.errors import SteelyardError

VERBS: dict[str, tuple[str, str]] = {
    # verb: (module under advisor.cli, one line of help)
    "demo": ("demo_verb", "The main job on a shipped trace and the embedded endpoint, in two minutes."),
    "ingest": ("trace_verbs", "Read a recorded trace into the database."),
    "synth": ("trace_verbs", "Make a synthetic trace (log-normal lengths, chosen arrivals)."),
    "traces": ("trace_verbs", "List stored traces, show one, export or delete it."),
    "serve": ("cluster_verbs", "Run the reference PD endpoint on loopback."),
    "probe": ("probe_verb", "Find out what an endpoint is and tells, and what the advice lacks."),
    "strategies": ("strategies_verb", "Compare baseline, online, offline and static on the same requests."),
    "control": ("control_verb", "See, set, steer and restore the P:D ratio of a live endpoint."),
    "simulate": ("cluster_verbs", "Run a trace through the cluster model in virtual time."),
    "replay": ("replay_verbs", "Replay a trace against an endpoint through Locust and store every request."),
    "worker": ("replay_verbs", "A load worker that joins a replay's master from another machine."),
    "sweep": ("replay_verbs", "Replay a trace on several fleets."),
    "runs": ("run_verbs", "List stored runs, show or export one."),
    "compare": ("run_verbs", "Put two or more runs side by side."),
    "advise": ("advise_verbs", "Recommend a P:D ratio from stored runs."),
    "report": ("advise_verbs", "Write a self-contained HTML report."),
    "doctor": ("doctor_verb", "Check this machine, the database and the endpoint, and say what to do."),
    "dash": ("dash_verb", "Show the database as a local web page, live while a run is going."),
    "migrate": ("migrate_verb", "Bring a database to this version's revision."),
    "completion": ("completion_verb", "Print the line that makes the shell complete verbs, options, traces and runs."),
}


class Verbs(click.Group):
    """Loads a verb's module when the verb is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs, in the order of the work."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the verb; unknown verbs get a suggestion."""
        if cmd_name not in VERBS:
            import difflib

            close = difflib.get_close_matches(cmd_name, VERBS, n=1)
            ctx.fail(f"no verb {cmd_name!r}." + (f" Did you mean {close[0]!r}?" if close else " See steelyard --help."))
        command = load(cmd_name)
        self._settle(cmd_name, command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Before the verb opens anything: what it takes from a file that nobody named."""
        name, command, rest = super().resolve_command(ctx, args)
        if name and command and not ctx.resilient_parsing and _UNNAMED in ctx.meta:
            from advisor.cli import config

            typed_db = ["--db"] if ctx.get_parameter_source("db") is click.core.ParameterSource.COMMANDLINE else []
            file = (ctx.default_map or {}).get(name, {})
            keys: list[str] = []
            for path, held, parent in config.tree(name, command):
                if len(path) == 1 or path[1] in rest:
                    table = file if len(path) == 1 else file.get(path[1], {})
                    keys += config.reaching(path, held, parent, table, [*typed_db, *rest])
            _say(ctx, keys, rest)
        return name, command, rest

    def _settle(self, name: str, command: click.Command) -> None:
        """Let the verb's options come from the environment."""
        from advisor.cli import config

        for path, held, parent in config.tree(name, command):
            for option in config.settable(held, parent):
                option.envvar = option.envvar or config.variables(path, option)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of verbs without importing any."""
        with formatter.section("Verbs"):
            formatter.write_dl([(verb, text) for verb, (_, text) in VERBS.items()])


def load(verb: str) -> click.Command:
    """The command of a verb; its module is imported now."""
    module = importlib.import_module(f"advisor.cli.{VERBS[verb][0]}")
    command: click.Command = getattr(module, verb)
    return command


_UNNAMED = "steelyard.file"
"""In a command's meta: the file of options that is read because it lies in the working folder."""


def _say(context: click.Context, keys: Sequence[str], words: Sequence[str] = ()) -> None:
    """That the folder's file decides these, on stderr, unless --quiet was typed: what the file itself says hushes nothing."""
    typed = context.get_parameter_source("quiet") is click.core.ParameterSource.COMMANDLINE
    if keys and _UNNAMED in context.meta and not (typed or {"-q", "--quiet"} & set(words)):
        warn(f"{context.meta[_UNNAMED]} of this folder sets {', '.join(dict.fromkeys(keys))}")


def _configure(context: click.Context, _option: click.Parameter, path: str | None) -> str | None:
    """Let the options of the verbs, and the database without one, come from the file; a TAB has nowhere to complain of it."""
    from advisor.cli import config

    try:
        file, said = config.read(path)
        if file is not None:
            if not path and not os.environ.get("STEELYARD_CONFIG"):
                context.meta[_UNNAMED] = file
            context.default_map = config.checked(file, said, {verb: load(verb) for verb in VERBS})
            if "db" in said and not os.environ.get("STEELYARD_DB"):
                context.default_map["db"] = said["db"]
    except SteelyardError:
        if not context.resilient_parsing:
            raise
    return path


@click.group(cls=Verbs, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="steelyard")
@click.option(
    "--config",
    metavar="FILE",
    is_eager=True,  # before --db
    callback=_configure,
    help="TOML file of options [env STEELYARD_CONFIG; default steelyard.toml, if the working folder has one].",
)
@json_option
@db_option
@click.pass_context
def steelyard(context: click.Context, config: str | None, as_json: bool, db: str) -> None:
    """Learn from your own traffic how many GPUs should prefill and how many decode.

    Without a verb: what is stored, and the next sensible command.
    """
    if context.invoked_subcommand is not None:
        return
    from advisor.cli.status import show, status

    _say(context, ["db"] if context.get_parameter_source("db") is click.core.ParameterSource.DEFAULT_MAP else [])
    found = status(db, named=context.get_parameter_source("db") is click.core.ParameterSource.COMMANDLINE)
    if as_json:
        emit_json(found)
    else:
        show(found)


def _denied(error: BaseException) -> bool:
    """Was it memory that the system did not give?

    Not every library says so: under a limit of the address space numpy may give NULL without an exception (SystemError), the
    loader of a shared object "failed to map segment" (ImportError).
    """
    if isinstance(error, MemoryError) or "start new thread" in str(error):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    return isinstance(error, (SystemError, ImportError)) and any(most != resource.RLIM_INFINITY for most in limits)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns, and as a script exits with, the exit code.

    0 done, 1 the work could not be done, 2 usage, 3 nothing meets the SLO, 4 invalid or incomplete run,
    5 not enough data to recommend, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    said: dict[str, bool] = {}
    try:
        code = steelyard.main(args=arguments, prog_name="steelyard", standalone_mode=False, obj=said)
    except SteelyardError as error:
        if "--json" in arguments or said.get("json"):
            probe = getattr(error, "next_probe", None)
            emit_json({"error": str(error), "exit_code": error.exit_code} | ({"next_probe": probe} if probe else {}))
        click.echo(f"steelyard: {error}", err=True)
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):  # Abort is a RuntimeError: before those
        click.echo("steelyard: interrupted", err=True)
        code = 130
    except (MemoryError, RuntimeError, SystemError, OSError, ImportError) as error:
        if not _denied(error):
            raise
        what = " ".join(str(error).split()) or "an allocation failed"
        click.echo(
            f"steelyard: out of memory ({what}). Ask for less at once; what was measured before is stored.", err=True
        )
        code = 1
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    code = code if isinstance(code, int) else 0
    if argv is None:
        sys.exit(code)
    return code
