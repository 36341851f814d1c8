"""Azure LLM inference traces, 2023, 2024 and 2025-multimodal: ``TIMESTAMP[,NumImages],ContextTokens,GeneratedTokens``.

Times are calendar times with up to seven fraction digits or none, naive (2023) or zoned; columns are found by name.
Source: Azure/AzurePublicDataset.
"""

from __future__ import annotations

from datetime import UTC, datetime

from traces.formats import BadRowError
from traces.formats.columns import Columns

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def _time_us(text: str) -> tuple[int, bool]:
    """Microseconds since 1970 and whether the text had a zone. A naive time is UTC; a seventh digit is cut."""
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise BadRowError(
            "bad_time", f"TIMESTAMP must be like 2023-11-16 18:15:46.680590 (got {text[:40]!r})"
        ) from None
    zoned = moment.tzinfo is not None
    if not zoned:
        moment = moment.replace(tzinfo=UTC)
    gap = moment - _EPOCH
    return (gap.days * 86_400 + gap.seconds) * 1_000_000 + gap.microseconds, zoned


FORMAT = Columns(
    "azure",
    "Azure LLM inference trace CSV (2023, 2024, 2025 multimodal)",
    "calendar time",
    at="TIMESTAMP",
    prompt="ContextTokens",
    output="GeneratedTokens",
    when=_time_us,
)
