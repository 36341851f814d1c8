"""Service-time laws of a cluster, read from a profile (TOML)."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, Self

from traces.errors import InputError

_ROUTES = ("least_tokens", "least_requests", "round_robin")
_DISCIPLINES = ("queue", "infinite")


@dataclass(frozen=True, slots=True)
class Profile:
    """How long each stage of a worker takes. Seconds, tokens, requests; per worker.

    prefill step over a batch of prompts n_i: ``a_s + b_s_per_token sum(n_i) + c_s_per_token2 sum(n_i^2)``; a batch takes
    queued prompts in order while their tokens fit max_batch_tokens and their number max_batch_requests (the first
    always fits). overhead_s: latency of a request that occupies no worker. transfer: ``transfer_t0_s +
    transfer_s_per_token n``. decode step with B sequences: ``c0_s + c1_s B + c2_s (context tokens)``; at most max_batch
    sequences and, if kv_tokens > 0, at most that many reserved tokens (prompt + answer). flip_s: a role change after
    the drain. discipline "infinite": every request is its own server, nothing queues.
    """

    name: str
    a_s: float = 0.0
    b_s_per_token: float = 0.0
    c_s_per_token2: float = 0.0
    max_batch_tokens: int = 8192
    max_batch_requests: int = 64
    overhead_s: float = 0.0
    transfer_t0_s: float = 0.0
    transfer_s_per_token: float = 0.0
    c0_s: float = 0.0
    c1_s: float = 0.0
    c2_s: float = 0.0
    max_batch: int = 1_000_000
    kv_tokens: int = 0
    flip_s: float = 0.0
    prefill_route: str = "least_tokens"
    decode_route: str = "least_requests"
    discipline: str = "queue"
    description: str = ""

    @classmethod
    def load(cls, source: str | Path) -> Self:
        """A shipped profile by name (``demo``), or a TOML file by path. InputError names the field that is wrong."""
        text, where = _read(source)
        try:
            table = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise InputError(f"{where}: not a TOML file ({error}).") from error
        return cls.from_table(table, where)

    @classmethod
    def from_table(cls, table: dict[str, Any], where: str) -> Self:
        """Check every value once, here at the edge."""
        known = {f.name: f for f in fields(cls)}
        values: dict[str, Any] = {}
        for key, value in table.items():
            if key not in known:
                raise InputError(f"{where}: unknown key {key!r}. Known: {', '.join(known)}.")
            kind = known[key].type
            if kind == "str":
                good = isinstance(value, str)
            elif kind == "int":
                good = (
                    isinstance(value, int) and not isinstance(value, bool) and value >= (0 if key == "kv_tokens" else 1)
                )
            else:
                good = (
                    isinstance(value, (int, float))
                    and not isinstance(value, bool)
                    and math.isfinite(value)
                    and value >= 0
                )
                value = float(value) if good else value
            if not good:
                raise InputError(f"{where}: {key} must be a {kind} >= 0 (got {value!r}).")
            values[key] = value
        if "name" not in values:
            raise InputError(f"{where}: name is missing.")
        profile = cls(**values)
        for key, allowed in (("prefill_route", _ROUTES), ("decode_route", _ROUTES), ("discipline", _DISCIPLINES)):
            if getattr(profile, key) not in allowed:
                raise InputError(f"{where}: {key} must be one of {', '.join(allowed)} (got {getattr(profile, key)!r}).")
        if profile.c0_s + profile.c1_s <= 0:
            raise InputError(f"{where}: a decode step must take time: give c0_s or c1_s above 0.")
        return profile

    def to_toml(self) -> str:
        """The profile as a file that :meth:`load` reads back to an equal profile."""
        lines = []
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, str):
                escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
                lines.append(f'{f.name} = "{escaped}"')
            else:
                # Fitted values may be numpy's numbers, whose repr is no TOML.
                lines.append(f"{f.name} = {float(value) if f.type == 'float' else int(value)!r}")
        return "\n".join(lines) + "\n"


def shipped_profiles() -> list[str]:
    """Names of the profiles that come with the package."""
    folder = resources.files("loadgen.cluster") / "profiles"
    return sorted(p.name.removesuffix(".toml") for p in folder.iterdir() if p.name.endswith(".toml"))


def _read(source: str | Path) -> tuple[str, str]:
    if isinstance(source, str) and source in shipped_profiles():
        return (resources.files("loadgen.cluster") / "profiles" / f"{source}.toml").read_text(), f"profile {source}"
    path = Path(source)
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"profile {str(source)!r} is neither a shipped one ({', '.join(shipped_profiles())}) nor a readable file."
        ) from error
