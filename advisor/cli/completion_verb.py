"""The verb completion."""

from __future__ import annotations

import os
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from advisor.cli.common import example

SHELLS = {
    "bash": "~/.bashrc",
    "zsh": "~/.zshrc",
    "fish": "~/.config/fish/completions/steelyard.fish",
}


@click.command(**example('eval "$(steelyard completion bash)"'))
@click.argument("shell", required=False, type=click.Choice(list(SHELLS)))
def completion(shell: str | None) -> None:
    """Print what makes a shell complete verbs, options, and the names of stored traces, runs and groups.

    Without a shell: that of $SHELL. To keep it, put the line of the example into ~/.bashrc or ~/.zshrc; for fish write
    the output to ~/.config/fish/completions/steelyard.fish.
    """
    from advisor.cli import steelyard
    from traces.errors import InputError

    own = Path(os.environ.get("SHELL", "")).name
    name = shell or own
    if name not in SHELLS:
        raise InputError(f"no completion for the shell {own or 'unknown'!r}. Name one: {', '.join(SHELLS)}.")
    kind = get_completion_class(name)
    if kind is None:
        raise InputError(f"this version of click completes no {name}.")
    click.echo(kind(steelyard, {}, "steelyard", "_STEELYARD_COMPLETE").source())
