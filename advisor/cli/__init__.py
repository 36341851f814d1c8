"""The command ``steelyard``: flat verbs, each parses, calls one function and prints.

A verb is loaded when it is used, so that ``steelyard --help`` does not import Locust or scikit-learn.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import click

from traces import __version__
from traces.errors import SteelyardError

VERBS: dict[str, tuple[str, str]] = {
    # verb: (module under advisor.cli, one line of help)
    "demo": ("demo_verb", "The main job on a shipped trace and the embedded endpoint, in two minutes."),
    "ingest": ("trace_verbs", "Read a recorded trace into the database."),
    "synth": ("trace_verbs", "Make a synthetic trace (log-normal lengths, chosen arrivals)."),
    "traces": ("trace_verbs", "List stored traces, show one, export or delete it."),
    "serve": ("cluster_verbs", "Run the reference PD endpoint on loopback."),
    "strategies": ("strategies_verb", "Compare baseline, online, offline and static on the same requests."),
    "simulate": ("cluster_verbs", "Run a trace through the cluster model in virtual time."),
    "replay": ("replay_verbs", "Replay a trace against an endpoint through Locust and store every request."),
    "worker": ("replay_verbs", "A load worker that joins a replay's master from another machine."),
    "sweep": ("replay_verbs", "Replay a trace on several fleets."),
    "runs": ("run_verbs", "List stored runs, show or export one."),
    "compare": ("run_verbs", "Put two or more runs side by side."),
    "advise": ("advise_verbs", "Recommend a P:D ratio from stored runs."),
    "report": ("advise_verbs", "Write a self-contained HTML report."),
    "migrate": ("migrate_verb", "Bring a database to this version's revision."),
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
        module = importlib.import_module(f"advisor.cli.{VERBS[cmd_name][0]}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of verbs without importing any."""
        with formatter.section("Verbs"):
            formatter.write_dl([(verb, text) for verb, (_, text) in VERBS.items()])


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="steelyard")
def steelyard() -> None:
    """Learn from your own traffic how many GPUs should prefill and how many decode."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns, and as a script exits with, the exit code.

    0 done, 1 the work could not be done, 2 usage, 3 nothing meets the SLO, 4 invalid or incomplete run,
    5 not enough data to recommend, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = steelyard.main(args=arguments, standalone_mode=False)
    except SteelyardError as error:
        if "--json" in arguments:
            from advisor.cli.common import emit_json

            emit_json({"error": str(error), "exit_code": error.exit_code})
        click.echo(f"steelyard: {error}", err=True)
        code = error.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("steelyard: interrupted", err=True)
        code = 130
    code = code if isinstance(code, int) else 0
    if argv is None:
        sys.exit(code)
    return code
