"""Requests as every OpenAI-compatible engine takes them.

``max_tokens`` = ``min_tokens`` with ``ignore_eos`` forces the answer's length on vLLM, SGLang, Dynamo and TensorRT-LLM;
usage comes in the last chunk. Prompts are made of one prepared text with a fixed width a token, so that a prompt is a
slice: nothing is built or tokenised while the clock runs. Each starts at its own place behind a salt of its own, so
that no prefix cache helps by accident.
"""

from __future__ import annotations

import json

import numpy as np

from traces.errors import InputError

APIS = ("completions", "chat")
PROMPTS = ("ids", "text")
_POOL = 1 << 18
_SALT = 3
"""Tokens at the start of a prompt that only this request has."""


class OpenAI:
    """Completions or chat; prompts as token ids (exact everywhere they are taken) or as words of text.

    A word is one token to the reference endpoint; to a real tokenizer it may be one or two: read ``usage``.
    """

    def __init__(self, model: str, *, api: str = "completions", prompt: str = "ids", seed: int = 0) -> None:
        if api not in APIS:
            raise InputError(f"--api must be one of {', '.join(APIS)} (got {api!r}).")
        if prompt not in PROMPTS:
            raise InputError(f"--prompt must be one of {', '.join(PROMPTS)} (got {prompt!r}).")
        if api == "chat" and prompt == "ids":
            prompt = "text"
        self.path = "/v1/completions" if api == "completions" else "/v1/chat/completions"
        self._ids = prompt == "ids"
        self._seed = seed
        rng = np.random.default_rng(seed)
        if self._ids:
            # Ids of four digits, known to every vocabulary of 10,000 and more: ",1234" a token.
            self._text = b"".join(b",%d" % i for i in rng.integers(1000, 10_000, _POOL).tolist())
        else:
            letters = rng.integers(97, 123, (_POOL, 4), dtype=np.uint8)
            spaced = np.concatenate([np.full((_POOL, 1), 32, dtype=np.uint8), letters], axis=1)
            self._text = spaced.tobytes()
        common = {
            "model": model,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
            "temperature": 0,
        }
        head = json.dumps(common, separators=(",", ":"))[:-1]
        if api == "chat":
            self._open, self._close = head + ',"messages":[{"role":"user","content":"', '"}],'
        else:
            self._open, self._close = (
                head + ',"prompt":' + ("[" if self._ids else '"'),
                ("]" if self._ids else '"') + ",",
            )

    def prompt(self, index: int, tokens: int) -> bytes:
        """The prompt of the request with that index: ``tokens`` ids, or words."""
        mixed = (index * 0x9E3779B97F4A7C15 + self._seed * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & (2**64 - 1)
        mixed ^= mixed >> 31
        mixed = (mixed * 0xD6E8FEB86659FD93) & (2**64 - 1)
        salted = min(_SALT, tokens)
        salt = [(mixed >> (16 * i)) % 9000 + 1000 for i in range(salted)]
        if self._ids:
            start = b",".join(b"%d" % s for s in salt)
        else:
            start = b" ".join(bytes((97 + s % 26, 97 + s // 26 % 26, 97 + s // 676 % 26, 113)) for s in salt)
        rest = tokens - salted
        at = (mixed >> 20) % _POOL
        whole, part = divmod(rest, _POOL)
        end = at + part
        piece = self._text[5 * at : 5 * end]
        if end > _POOL:
            piece += self._text[: 5 * (end - _POOL)]
        return start + piece + self._text * whole

    def body(self, index: int, prompt_tokens: int, output_tokens: int) -> bytes:
        """The JSON body."""
        tail = f'{self._close}"max_tokens":{output_tokens},"min_tokens":{output_tokens}}}'
        return self._open.encode() + self.prompt(index, prompt_tokens) + tail.encode()
