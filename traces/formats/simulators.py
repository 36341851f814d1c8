"""Traces in the formats of two simulators: Vidur's processed traces and SplitwiseSim's; seconds in both.

Sources: microsoft/vidur, Mutinifni/splitwise-sim.
"""

from traces.formats.columns import Columns, seconds_us

VIDUR = Columns(
    "vidur",
    "Vidur processed trace CSV",
    "second (fractional)",
    at="arrived_at",
    prompt="num_prefill_tokens",
    output="num_decode_tokens",
    when=seconds_us,
    total="num_total_tokens",
)
SPLITWISE = Columns(
    "splitwise-sim",
    "SplitwiseSim trace CSV",
    "second (fractional)",
    at="arrival_timestamp",
    prompt="prompt_size",
    output="token_size",
    when=seconds_us,
)
