"""Service-time laws of a cluster, read from a profile (TOML)."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np

from traces.errors import InputError
from traces.records import Floats

Lengths = TypeVar("Lengths", float, Floats)
"""One number, or a column of them."""

_CHOICES = {
    "prefill_square": ("prompt", "step"),
    "prefill_release": ("step", "drained"),
    "prefill_route": ("least_tokens", "least_requests", "round_robin", "prefix"),
    "decode_context": ("batch", "worker"),
    "decode_route": ("least_tokens", "least_requests", "round_robin"),
    "transfer_begins": ("sent", "pulled"),
    "transfer_link": ("none", "sender", "shared"),
    "kv_policy": ("reserve", "preempt"),
    "discipline": ("queue", "infinite"),
}
_RETIRED = (("decode_join", "free"),)
"""Keys of earlier versions with the value that says what is the case now without them."""

_MAY_BE_ZERO = ("kv_tokens", "knee_batch", "bend_tokens", "cache_tokens")


@dataclass(frozen=True, slots=True)
class Profile:
    """How long each stage of a worker takes. Seconds, tokens, requests; per worker.

    Prefill: a step over prompts of which n_i tokens are new and context_i are in place when it ends takes ``a_s +
    b_s_per_token sum(n_i) + c_s_per_token2 sum(n_i context_i)``; with prefill_square "step" the last sum is (sum n_i)^2: the
    step's tokens cost what one prompt of as many would. A step takes queued prompts in order while their new
    tokens fit max_batch_tokens and their number max_batch_requests (the first always fits); with ``chunked`` a prompt
    that does not fit is cut, and goes on in the next step. A prompt leaves after its step; with prefill_release "drained" it
    stays for as many steps as its answer has tokens, or until its worker's queue is empty, and counts towards
    max_batch_requests meanwhile (where no place is free, the next to leave does so at once). cache_tokens: prefix cache of
    a worker, whole blocks, least recently used first out; 0 is none.

    Between the stages: overhead_s is latency that occupies nobody; the KV cache of n tokens takes ``transfer_t0_s +
    transfer_s_per_token n``, the second part one transfer at a time on the link (transfer_link: none, one link a
    sender, one shared by all). It begins when the prompt leaves its prefill worker, or, with transfer_begins "pulled", when the
    decode worker's running step has ended.

    Decode: a step with B sequences takes ``c0_s + c1_s B + knee_s max(0, B - knee_batch) + c2_s (context tokens)``, with
    bend_tokens > 0 less and less for each token of context: x - x^2 / (2 bend_tokens) for x, half of bend_tokens beyond it.
    The context is that of the batch, with decode_context "worker" also of what is on its way to the worker or waits there.
    At most max_batch sequences and, if kv_tokens > 0, at most that many tokens of context. kv_policy "reserve": prompt
    and whole answer are reserved at admission; "preempt": only what is there, and when it overflows the latest sequence
    is put back and recomputed by a prefill step on the decode worker. A worker of role mixed does both in one step:
    the fixed cost once (the larger), the rest added.

    flip_s: a role change after the drain. worker_speed, worker_size: factors by worker number (1 beyond the list): steps
    take 1/speed as long; size multiplies max_batch, kv_tokens and cache_tokens. discipline "infinite": every request is
    its own server, nothing queues. source: where the coefficients come from, and their error.
    """

    name: str
    a_s: float = 0.0
    b_s_per_token: float = 0.0
    c_s_per_token2: float = 0.0
    prefill_square: str = "prompt"
    prefill_release: str = "step"
    max_batch_tokens: int = 8192
    max_batch_requests: int = 64
    chunked: bool = False
    cache_tokens: int = 0
    overhead_s: float = 0.0
    transfer_t0_s: float = 0.0
    transfer_s_per_token: float = 0.0
    transfer_begins: str = "sent"
    transfer_link: str = "none"
    c0_s: float = 0.0
    c1_s: float = 0.0
    c2_s: float = 0.0
    bend_tokens: int = 0
    knee_batch: int = 0
    knee_s: float = 0.0
    max_batch: int = 1_000_000
    kv_tokens: int = 0
    kv_policy: str = "reserve"
    decode_context: str = "batch"
    flip_s: float = 0.0
    prefill_route: str = "least_tokens"
    decode_route: str = "least_requests"
    worker_speed: tuple[float, ...] = ()
    worker_size: tuple[float, ...] = ()
    discipline: str = "queue"
    description: str = ""
    source: str = ""

    @classmethod
    def load(cls, source: str | Path) -> Self:
        """A shipped profile by name (``demo``), or a TOML file by path. InputError names the field that is wrong."""
        text, where = _read(source)
        try:
            table = tomllib.loads(text)
        except (ValueError, RecursionError) as error:  # not all that tomllib raises is a TOMLDecodeError
            raise InputError(f"{where}: not a TOML file ({str(error)[:200]}).") from None
        return cls.from_table(table, where)

    @classmethod
    def from_table(cls, table: dict[str, Any], where: str) -> Self:
        """Check every value once, here at the edge."""
        known = {f.name: f for f in fields(cls)}
        values: dict[str, Any] = {}
        for key, value in table.items():
            if (key, value) in _RETIRED:
                continue
            if key not in known:
                raise InputError(f"{where}: unknown key {key[:80]!r}. Known: {', '.join(known)}.")
            kind = str(known[key].type)
            good, value = _checked(kind, key, value)
            if not good:
                raise InputError(f"{where}: {key} must be {_WANTED[kind]} (got {repr(value)[:80]}).")
            values[key] = value
        if "name" not in values:
            raise InputError(f"{where}: name is missing.")
        profile = cls(**values)
        for key, allowed in _CHOICES.items():
            if getattr(profile, key) not in allowed:
                raise InputError(
                    f"{where}: {key} must be one of {', '.join(allowed)} (got {getattr(profile, key)[:80]!r})."
                )
        if profile.c0_s + profile.c1_s <= 0:
            raise InputError(f"{where}: a decode step must take time: give c0_s or c1_s above 0.")
        return profile

    def together(self, mean_prompt: float) -> float:
        """Prompts of a full prefill step; below 1 where prompts are cut."""
        least = 0.0 if self.chunked else 1.0
        return max(least, min(self.max_batch_tokens / max(mean_prompt, 1.0), float(self.max_batch_requests)))

    def prompt_s(self, prompt: Lengths, together: float = 1.0, mean_prompt: float = 0.0) -> Lengths:
        """Seconds of a prefill worker that a prompt takes in a step with ``together - 1`` others of the mean length."""
        square = prompt * prompt
        if self.prefill_square == "step":
            square = prompt * (prompt * min(1.0, together) + max(0.0, together - 1.0) * mean_prompt)
        return self.a_s / together + self.b_s_per_token * prompt + self.c_s_per_token2 * square

    def step_s(self, batch: Lengths, held: Lengths) -> Lengths:
        """Seconds of a decode step with so many sequences, and so many tokens of context in all."""
        if self.bend_tokens:
            held = np.minimum(held, self.bend_tokens)
            held = held - held * held / (2 * self.bend_tokens)
        knee = self.knee_s * np.maximum(0.0, batch - self.knee_batch) if self.knee_batch else 0.0
        return self.c0_s + self.c1_s * batch + self.c2_s * held + knee

    def to_toml(self) -> str:
        """The profile as a file that :meth:`load` reads back to an equal profile."""
        lines = []
        for f in fields(self):
            value = getattr(self, f.name)
            # Fitted values may be numpy's numbers, whose repr is no TOML.
            if isinstance(value, str):
                escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
                lines.append(f'{f.name} = "{escaped}"')
            elif f.type == "bool":
                lines.append(f"{f.name} = {'true' if value else 'false'}")
            elif isinstance(value, tuple):
                lines.append(f"{f.name} = [{', '.join(repr(float(v)) for v in value)}]")
            else:
                lines.append(f"{f.name} = {float(value) if f.type == 'float' else int(value)!r}")
        return "\n".join(lines) + "\n"


MOST = 1e15
"""Of any value in a profile; an integer beyond is none that a float holds."""

MOST_BYTES = 1 << 20
"""Of a profile's file."""

_WANTED = {
    "str": "a text",
    "bool": "true or false",
    "int": "a whole number above 0",
    "float": "a number >= 0",
    "tuple[float, ...]": "a list of numbers above 0",
}


def _checked(kind: str, key: str, value: Any) -> tuple[bool, Any]:
    """(is it what this key takes, the value as stored)."""

    def number(x: Any, least: float) -> bool:
        return isinstance(x, (int, float)) and not isinstance(x, bool) and least <= x <= MOST

    if kind == "str":
        return isinstance(value, str), value
    if kind == "bool":
        return isinstance(value, bool), value
    if kind == "int":
        return isinstance(value, int) and number(value, 0 if key in _MAY_BE_ZERO else 1), value
    if kind == "float":
        return (True, float(value)) if number(value, 0) else (False, value)
    good = isinstance(value, list) and all(number(x, 0) and x > 0 for x in value)
    return good, tuple(float(x) for x in value) if good else value


def shipped_profiles() -> list[str]:
    """Names of the profiles that come with the package."""
    folder = resources.files("loadgen.cluster") / "profiles"
    return sorted(p.name.removesuffix(".toml") for p in folder.iterdir() if p.name.endswith(".toml"))


def _read(source: str | Path) -> tuple[str, str]:
    if isinstance(source, str) and source in shipped_profiles():
        return (resources.files("loadgen.cluster") / "profiles" / f"{source}.toml").read_text(), f"profile {source}"
    path = Path(source)
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise InputError(f"{path}: larger than {MOST_BYTES >> 20} MiB, so it is no profile.")
        return text, str(path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"profile {str(source)!r} is neither a shipped one ({', '.join(shipped_profiles())}) nor a readable file."
        ) from error
