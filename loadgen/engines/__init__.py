"""The engines that are known, one file each (:mod:`loadgen.engines.base` says what one can tell), and request bodies for them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from loadgen.engines.base import FACTS, Dialect, Engine, Glance, Metric, Server, Worker
from traces.errors import InputError
from traces.records import STAGES

__all__ = [
    "EXACT",
    "FACTS",
    "STAGES",
    "Dialect",
    "Engine",
    "Glance",
    "Measure",
    "Metric",
    "Prompts",
    "Server",
    "Worker",
    "trial_sizes",
]

_COMMON = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work number night point home water room mother area money "
    "story fact month lot right study book eye job word business issue side kind head house service friend father "
    "power hour game line end member law car city name team minute idea kid body back parent face others level office "
    "door health person art war history party result change morning reason research girl guy moment air teacher force"
)
WORDS = tuple(_COMMON.split())
"""Common words that nearly every tokenizer holds as one token with the space before it. A default, not a promise:
the server's ``usage`` says what a prompt really counted."""

BASE_IDS = 4096
"""Distinct starting points in the prebuilt text, so that neighbouring prompts differ beyond their salt."""


PLAUSIBLE = 0.25, 16.0
"""Tokens that a server may count for an id or word of ours."""


@dataclass(frozen=True, slots=True)
class Measure:
    """Tokens = offset + per_unit x (ids or words of the prompt), as the server's ``usage`` says."""

    offset: float = 0.0
    per_unit: float = 1.0

    @classmethod
    def fit(cls, units: Sequence[int], tokens: Sequence[int]) -> Measure:
        """The line through the first and the last; :data:`EXACT` where that is no count of tokens: prompts would be made of a
        thousand ids for each, or of one for all."""
        slope = (tokens[-1] - tokens[0]) / (units[-1] - units[0])
        if not PLAUSIBLE[0] <= slope <= PLAUSIBLE[1]:
            return cls()
        return cls(tokens[0] - slope * units[0], slope)


EXACT = Measure()
"""A token an id or word, and nothing more."""

LEAST_WORDS = 64


def trial_sizes(longest: int, words: Sequence[str] = ()) -> list[int]:
    """Units of the prompts that a server is asked to count: far apart, where that can be by whole rounds of the words."""
    n = len(words or WORDS)
    rounds = (min(1024, longest) - 4) // n
    if rounds >= 2:
        return [4 + n, 4 + rounds * n]
    return sorted({8, min(64, max(9, longest)), min(1024, max(10, longest))})


def single_token_words(folder: Path) -> tuple[str, ...]:
    """Plain words that a tokenizer holds as one token with the space before it, up to 2,000; a text of them counts exactly.

    InputError when the folder has no tokenizer.json that can be read, or too few such words.
    """
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError:
        raise InputError("--tokenizer needs the package tokenizers. Run: pip install 'steelyard[tokenizer]'") from None
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise InputError(f"--tokenizer {folder}: holds no tokenizer.json. Give the model's folder.")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"--tokenizer {file}: cannot be read ({str(error)[:80]}).") from None
    known = {tokenizer.decode([i]).strip() for i in range(tokenizer.get_vocab_size())}
    candidates = [*WORDS, *sorted(w for w in known if w.isascii() and w.isalpha() and len(w) > 1)]
    found = []
    for word in dict.fromkeys(candidates):
        once, twice = (
            len(tokenizer.encode(text, add_special_tokens=False).ids) for text in (f" {word}", f" {word} {word}")
        )
        if (once, twice) == (1, 2):
            found.append(word)
        if len(found) == 2000:
            break
    if len(found) < LEAST_WORDS:
        raise InputError(
            f"--tokenizer {file}: only {len(found)} of its words are one token, too few to make text of (at least {LEAST_WORDS})."
        )
    return tuple(found)


class Prompts:
    """Request bodies cut from text that was made once, before schedule zero: a request costs a few copies of bytes.

    Every prompt starts with a salt of its own (from run salt and request position), so that no prefix cache helps by
    accident. Nothing in a prompt comes from a user. measure: how many tokens the server counts for a prompt of so many ids
    or words (:class:`Measure`); words: those that text is made of.
    """

    def __init__(
        self,
        dialect: Dialect,
        model: str,
        longest: int,
        salt: int,
        measure: Measure | None = None,
        words: Sequence[str] = (),
    ) -> None:
        import json

        self._salt = salt & (2**64 - 1)
        self._shared: Mapping[int, Sequence[int]] = {}
        self._block_units = 0.0
        self.key = f"{self._salt:016x}"
        self._ids = dialect.token_ids and not dialect.chat
        self._measure = None if measure == EXACT else measure
        self._words = tuple(words) or WORDS
        rng = random.Random(self._salt)  # noqa: S311 - filler text, not a secret
        n = self._units(longest) + BASE_IDS
        if self._ids:
            # Four digits an id: below 10,000 lies in every real vocabulary, and a fixed width makes a slice exact.
            self._text = ",".join(map(str, rng.choices(range(1000, 10_000), k=n))).encode() + b","
            self._starts: list[int] = []
        else:
            drawn = _shuffles(self._words, n, rng)
            self._text = (" " + " ".join(drawn) + " ").encode()
            self._starts = [0]
            for word in drawn:
                self._starts.append(self._starts[-1] + len(word.encode()) + 1)
        named = json.dumps(model)
        opening, closing = ("[", "]") if self._ids else ('"', '"')
        if dialect.chat:
            self._head = f'{{"model":{named},"messages":[{{"role":"user","content":{opening}'.encode()
            tail = f"{closing}}}]"
        else:
            self._head = f'{{"model":{named},"prompt":{opening}'.encode()
            tail = closing
        more = "," + dialect.members.replace("%", "%%") if dialect.members else ""
        self._tail = (
            tail + ',"max_tokens":%d,"min_tokens":%d,"ignore_eos":true,"temperature":0,"stream":true,'
            '"stream_options":{"include_usage":true}' + more + "}"
        )

    def share(self, blocks: Mapping[int, Sequence[int]], block_tokens: int) -> None:
        """From now on a request's prompt begins with its blocks: the same id is the same text, within this run.

        blocks: request position -> ids of its leading blocks of block_tokens tokens each, the last may be cut short.
        """
        self._shared = blocks
        self._block_units = block_tokens if self._measure is None else block_tokens / self._measure.per_unit

    def body(self, position: int, prompt_tokens: int, output_tokens: int) -> bytes:
        """The body of request ``position``: exactly ``prompt_tokens`` ids or words, or as many as the measure says."""
        if self._measure is not None:
            prompt_tokens = self._units(prompt_tokens)
        tail = (self._tail % (output_tokens, output_tokens)).encode()
        shared = self._shared.get(position, ())
        pieces = []
        at = 0
        for k, block in enumerate(shared, 1):
            # From where it ends in the prompt: what is rounded must not add up over many blocks.
            end = min(round(k * self._block_units), prompt_tokens)
            if end > at:
                pieces.append(self._piece(-1 - block, end - at))
                at = end
        if at < prompt_tokens:
            pieces.append(self._piece(position, prompt_tokens - at))
        return b"".join((self._head, (b"," if self._ids else b" ").join(pieces), tail))

    def _units(self, tokens: int) -> int:
        """Ids or words that the server counts as so many tokens."""
        measure = self._measure
        return tokens if measure is None else max(1, round((tokens - measure.offset) / measure.per_unit))

    def _piece(self, number: int, tokens: int) -> bytes:
        """So many ids or words, which begin with a salt of their own: of the run and of the number (below 0: a block's)."""
        mixed = ((number + 1) * 0x9E3779B97F4A7C15 + self._salt) & (2**64 - 1)
        mixed ^= mixed >> 29
        start = mixed % BASE_IDS
        if self._ids:
            salt = b"%d,%d,%d,%d" % (
                1000 + mixed % 9000,
                1000 + (mixed >> 16) % 9000,
                1000 + (mixed >> 32) % 9000,
                1000 + number % 9000,
            )
            if tokens <= 4:
                return salt[: tokens * 5 - 1]
            return salt + b"," + self._text[start * 5 : (start + tokens - 4) * 5 - 1]
        # The first word, with no space before it, counts otherwise than inside a text: always the same, it is part of the offset.
        words = (0, mixed, mixed >> 16, mixed >> 32 ^ number)
        salt = " ".join(self._words[w % len(self._words)] for w in words).encode()
        if tokens <= 4:
            return b" ".join(salt.split()[:tokens])
        start -= start % len(self._words)  # a round begins
        return salt + self._text[self._starts[start] : self._starts[start + tokens - 4]]


def _shuffles(words: Sequence[str], n: int, rng: random.Random) -> list[str]:
    """So many words, each once before any comes again: what words count evens out over every stretch of a text."""
    drawn: list[str] = []
    order = list(words)
    while len(drawn) < n:
        rng.shuffle(order)
        drawn += order
    return drawn[:n]


@cache
def engines() -> dict[str, Engine]:
    """Every known engine by name, in the order in which a server is asked whether it is one. Other packages' come first."""
    from loadgen.engines import dynamo, llm_d, openai, reference, sglang, trtllm, vllm

    ours = (reference.ENGINE, dynamo.ENGINE, trtllm.ENGINE, sglang.ENGINE, llm_d.ENGINE, vllm.ENGINE, openai.ENGINE)
    names = {e.name for e in ours}
    theirs: list[Engine] = []
    for point in entry_points(group="steelyard.engines"):
        if point.name in names:
            continue
        held = point.load()
        if not isinstance(held, Engine):
            raise InputError(
                f"the entry point {point.name} of steelyard.engines is no Engine ({point.value}). "
                "Repair or remove the package that brings it."
            )
        theirs.append(held)
    return {e.name: e for e in (*theirs, *ours)}


def engine(name: str) -> Engine:
    """An engine by name. InputError lists the names."""
    known = engines()
    if name not in known:
        raise InputError(f"no engine is named {name!r}. Known: auto, {', '.join(known)}.")
    return known[name]


def dialect(name: str, *, chat: bool = False, text: bool = False) -> Dialect:
    """The dialect of an engine by name. InputError lists the names."""
    return engine(name).dialect(chat=chat, text=text)


def recognise(seen: Glance) -> tuple[Engine, str]:
    """(which engine a server is, by what it is known); the generic one where none is recognised."""
    for known in engines().values():
        why = known.recognise(seen)
        if why:
            return known, why
    return engine("openai"), "nothing that only one engine says"
