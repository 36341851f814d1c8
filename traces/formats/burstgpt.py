"""BurstGPT CSV, six columns (1, 2) or eight (3: ``Session ID`` and ``Elapsed time`` inserted).

Times are seconds from a midnight, as integers or float text (``19440110.0``), of any origin. A failed request has no
response tokens. Source: HPMLL/BurstGPT.
"""

from traces.formats.columns import Columns, seconds_us

FORMAT = Columns(
    "burstgpt",
    "BurstGPT CSV (six and eight columns)",
    "second",
    at="Timestamp",
    prompt="Request tokens",
    output="Response tokens",
    when=seconds_us,
    session="Session ID",
    elapsed="Elapsed time",
    total="Total tokens",
)
