"""The command that a stored answer names, if it is one of steelyard's: who writes to a shared database is not trusted, and people
paste what they are told to run."""

from __future__ import annotations

import shlex
from itertools import pairwise
from typing import Any

_VERBS = (["replay"], ["synth"], ["runs", "import"])

_OPTIONS = frozenset({
    "--like", "--name", "--lengths", "--arrivals", "--requests", "--rate", "--endpoint", "--fleet", "--slice",
    "--gpus-per-worker", "--aggregate,",
})  # fmt: skip
"""Of the commands that answers name. None of them runs a program, or names whom credentials go to."""


def believed(command: Any) -> str:
    """The command if it is made of these verbs and options and a shell would read nothing else in it; "" otherwise."""
    if not isinstance(command, str) or not command.isprintable():
        return ""
    try:
        parts = [shlex.split(part) for part in command.split(" && ")]
    except ValueError:
        return ""
    if " && ".join(map(shlex.join, parts)) != command:
        return ""  # something stands there unquoted
    for words in parts:
        verb = next((v for v in _VERBS if words[1 : 1 + len(v)] == v), None)
        if words[:1] != ["steelyard"] or verb is None:
            return ""
        options = {word for word in words if word.startswith("-")}
        asked = [after for word, after in pairwise(words) if word == "--endpoint"]
        if not options <= _OPTIONS or any(url != "URL" for url in asked):
            return ""
    return command
