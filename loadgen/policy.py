"""Who does what, and when roles change: pure functions, the same in the simulator and against a live endpoint."""

from __future__ import annotations


def next_phase(prefill_since_s: float | None, decode_since_s: float | None) -> str | None:
    """Baseline: first in, first out. Which phase an idle worker takes: the one whose head has waited longest.

    Arguments: since when the head of each queue waits, None for an empty queue.
    """
    if prefill_since_s is None or decode_since_s is None:
        return "prefill" if prefill_since_s is not None else "decode" if decode_since_s is not None else None
    return "prefill" if prefill_since_s <= decode_since_s else "decode"
