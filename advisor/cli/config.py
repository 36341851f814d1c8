"""Options from the environment and from a TOML file: what stands on the command line wins, then ``STEELYARD_*``, then the file.

An option ``--rate`` of the verb ``replay`` is ``STEELYARD_REPLAY_RATE``, or ``STEELYARD_RATE`` for every verb that has it; in
the file it is ``rate`` under ``[replay]``, or at the top for every verb that has it. The names are those of the options, so
there is nothing else to learn. Secrets have no place in the file: :data:`SECRET` options and URLs with a password are refused.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click

from traces.errors import InputError

FILE = "steelyard.toml"
"""Read from the working folder when neither --config nor STEELYARD_CONFIG names another."""

SECRET = frozenset({"header"})
"""Options that may carry a secret: neither from the file nor from the environment."""

REACHING = frozenset({
    "db", "endpoint", "proxy", "control", "insecure", "ca-file", "cert", "key", "api-key-file", "master", "targets",
    "bind", "host", "web", "metrics-port", "token-file", "web-token-file",
})  # fmt: skip
"""Options that decide whom steelyard talks to, with which credentials, what it runs, and who reaches it."""

MOST_CHARACTERS = 1 << 20
"""Of the file that are read."""

_NO_SECRET = re.compile(r"(?<=://)[^/?#@:\s]+@|(?<=[?&])ssl_?key=[^&\s]*")
"""Of a URL: a user without a password, and the name of a key's file."""


def flag(option: click.Option) -> str:
    """The option's name as a user writes it, without dashes in front: ``gpus-per-worker``."""
    return max(option.opts, key=len).lstrip("-")


def variables(path: tuple[str, ...], option: click.Option) -> list[str]:
    """The environment variables that an option is read from, the more particular one first."""
    name = flag(option).upper().replace("-", "_")
    return ["_".join(["STEELYARD", *(p.upper() for p in path), name]), f"STEELYARD_{name}"]


def settable(command: click.Command, parent: click.Command | None = None) -> Iterator[click.Option]:
    """The options that may come from elsewhere than the command line; a verb below a group takes --db from the group."""
    for option in command.params:
        if not isinstance(option, click.Option) or flag(option) in SECRET:
            continue
        if not option.is_eager or (flag(option) == "db" and parent is None):
            yield option


def tree(name: str, command: click.Command) -> Iterator[tuple[tuple[str, ...], click.Command, click.Command | None]]:
    """(path, command, its parent) of a verb and of the verbs below it."""
    yield (name,), command, None
    if isinstance(command, click.Group):
        for below, held in command.commands.items():
            yield (name, below), held, command


def read(path: str | None) -> tuple[Path | None, dict[str, Any]]:
    """(file, what it says); the file named, that of STEELYARD_CONFIG, or :data:`FILE` if it is there."""
    named = path or os.environ.get("STEELYARD_CONFIG")
    file = Path(named or FILE)
    if not named and not file.is_file():
        return None, {}
    try:
        with file.open(encoding="utf-8") as held:
            return file, tomllib.loads(held.read(MOST_CHARACTERS))
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}). Give another --config.") from None
    except (ValueError, RecursionError) as error:  # not all that tomllib raises is a TOMLDecodeError
        raise InputError(f"{file}: is not TOML ({str(error)[:200]}).") from None


def checked(file: Path, said: Mapping[str, Any], verbs: Mapping[str, click.Command]) -> dict[str, Any]:
    """click's default_map from what the file says; InputError names the line's key, what is known, and the nearest name."""
    found: dict[str, Any] = {name: {} for name in verbs}
    common = {k: v for k, v in said.items() if not isinstance(v, dict)}
    used: set[str] = set()
    known: set[str] = set()
    for name, command in verbs.items():
        table = said.get(name, {})
        if not isinstance(table, dict):
            raise InputError(f"{file}: {name} is a verb: write its options under [{name}].")
        for path, held, parent in tree(name, command):
            options = {flag(o): o for o in settable(held, parent)}
            known |= set(options)
            own = table if len(path) == 1 else table.get(path[1], {})
            below = set(command.commands) if isinstance(command, click.Group) and len(path) == 1 else set()
            target = found[name] if len(path) == 1 else found[name].setdefault(path[1], {})
            for where, values in (("", common), (f"[{'.'.join(path)}] ", own)):
                for key, value in values.items():
                    option = options.get(key.replace("_", "-"))
                    if option is not None and option.name:
                        used.add(key)
                        target[option.name] = _value(f"{file}: {where}{key}", option, value)
                    elif where and key not in below:
                        _unknown(file, where, key, set(options))
    for key, value in said.items():
        if isinstance(value, dict) and key not in verbs:
            near = get_close_matches(key, verbs, n=1)
            raise InputError(
                f"{file}: no verb is called {key[:80]!r}." + (f" Did you mean [{near[0]}]?" if near else "")
            )
        if not isinstance(value, dict) and key not in used:
            _unknown(file, "", key, known)
    return found


def reaching(
    path: tuple[str, ...],
    command: click.Command,
    parent: click.Command | None,
    file: Mapping[str, Any],
    words: list[str],
) -> list[str]:
    """Those of :data:`REACHING` that a verb takes from the file: neither typed (words) nor in the environment."""
    found = []
    for option in settable(command, parent):
        typed = any(w.partition("=")[0] in (*option.opts, *option.secondary_opts) for w in words)
        named = any(os.environ.get(v) for v in variables(path, option))
        if (
            flag(option) in REACHING
            and file.get(str(option.name)) not in (None, "", [], False)
            and not typed
            and not named
        ):
            found.append(flag(option))
    return found


def _unknown(file: Path, where: str, key: str, known: set[str]) -> None:
    key = key[:80]
    name = key.replace("_", "-")
    if name in SECRET or name in ("api-key", "token", "password"):
        raise InputError(
            f"{file}: {where}{key} may hold a secret, which has no place in a file that is shared. "
            "Set STEELYARD_API_KEY or name a file: api-key-file."
        )
    near = get_close_matches(name, known, n=1)
    raise InputError(
        f"{file}: {where}{key} is no option" + (f" of {where.strip()}." if where else " of any verb.")
        + (f" Did you mean {near[0]}?" if near else "")
    )  # fmt: skip


def _secret(value: Any) -> bool:
    """Is there a URL in it of which a message leaves something out that may be a password?"""
    if isinstance(value, dict | list):
        return any(map(_secret, value.values() if isinstance(value, dict) else value))
    if not isinstance(value, str) or "://" not in value:
        return False
    from traces.store import redact

    plain = _NO_SECRET.sub("", value)
    return redact(plain) != plain


def _value(where: str, option: click.Option, value: Any) -> Any:
    """The value if the option can take it."""
    values = list(value) if isinstance(value, list) else [value]
    if _secret(value):
        raise InputError(
            f"{where} holds a password, which has no place in a file that is shared. "
            "Use ~/.pgpass, PGPASSWORD or STEELYARD_DB."
        )
    several = isinstance(value, list) and not option.multiple
    if several or any(isinstance(one, dict | list) for one in values):
        raise InputError(f"{where} must be one value (got a {'list' if isinstance(value, list) else 'table'}).")
    if option.is_flag and not isinstance(value, bool) and isinstance(option.type, click.types.BoolParamType):
        raise InputError(f"{where} must be true or false (got {value!r}).")
    # As it would be typed: click cuts a 7.9 of TOML's where a whole number belongs, and stumbles over its dates.
    try:
        values = [one if option.is_flag or isinstance(one, str) else str(one) for one in values]
    except ValueError:  # a whole number of thousands of digits
        raise InputError(f"{where} holds a number that is too long.") from None
    for one in values:
        try:
            option.type.convert(one, option, None)
        except click.UsageError as error:
            raise InputError(f"{where}: {error.message}") from None
        except ValueError as error:  # a path with a NUL
            raise InputError(f"{where}: {one!r} is no {option.type.name} ({error}).") from None
    return values if option.multiple else values[0]
