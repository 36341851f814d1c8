"""Azure LLM inference traces, 2023, 2024 and 2025-multimodal: ``TIMESTAMP[,NumImages],ContextTokens,GeneratedTokens``.

Times are calendar times with up to seven fraction digits or none, naive (2023) or zoned; columns are found by name.
Source: Azure/AzurePublicDataset.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from datetime import datetime
from typing import NoReturn

import numpy as np

from traces.formats import BadRowError, epoch_us
from traces.formats.columns import Columns
from traces.records import Ints


def _time_us(text: str) -> tuple[int, bool]:
    """Microseconds since 1970 and whether the text had a zone. A naive time is UTC; a seventh digit is cut."""
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise BadRowError(
            "bad_time", f"TIMESTAMP must be like 2023-11-16 18:15:46.680590 (got {text[:40]!r})"
        ) from None
    return epoch_us(moment)


class _Calendar(Columns):
    """Columns whose times numpy reads a block at a time, where they are all written alike."""

    def moments(self, texts: Sequence[str]) -> tuple[Ints, bool | None]:
        """See :class:`Columns`."""
        zoned = False
        for tail in ("+00:00", "Z"):
            if texts[0].endswith(tail):
                joined = "|".join(texts) + "|"
                if joined.count(tail + "|") != len(texts):
                    return super().moments(texts)
                texts = joined.replace(tail + "|", "|")[:-1].split("|")
                zoned = True
        whole = "".join(texts)
        lengths = set(map(len, texts))
        if "+" in whole or "Z" in whole or whole.count("-") != 2 * len(texts) or min(lengths) < 19:
            return super().moments(texts) if not zoned else self._odd()
        if max(lengths) > 26:
            texts = [text[:26] for text in texts]  # a seventh digit is cut, as above
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # numpy would apply a zone that hides among the rest, and only warn
            try:
                moments = np.array(texts, dtype="datetime64[us]")
            except UserWarning:
                self._odd()
        if bool(np.isnat(moments).any()):
            self._odd()
        return moments.astype(np.int64), zoned

    def _odd(self) -> NoReturn:
        raise ValueError("not a plain time")


FORMAT = _Calendar(
    "azure",
    "Azure LLM inference trace CSV (2023, 2024, 2025 multimodal)",
    "calendar time",
    at="TIMESTAMP",
    prompt="ContextTokens",
    output="GeneratedTokens",
    when=_time_us,
)
