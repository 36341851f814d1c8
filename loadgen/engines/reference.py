"""The reference endpoint of this project (``steelyard serve``)."""

from __future__ import annotations

from loadgen.engines import Dialect

DIALECT = Dialect(
    "reference",
    metrics={
        "steelyard_waiting_requests": "waiting_requests",
        "steelyard_running_requests": "running_requests",
        "steelyard_waiting_tokens": "waiting_tokens",
        "steelyard_kv_used_tokens": "kv_used_tokens",
        "steelyard_busy_seconds_total": "busy_s_total",
        "steelyard_steps_total": "steps_total",
        "steelyard_prompt_tokens_total": "prompt_tokens_total",
        "steelyard_output_tokens_total": "output_tokens_total",
        "steelyard_finished_requests_total": "finished_total",
    },
)
