"""Any OpenAI-shaped server, and what is read of any machine: its GPUs, from NVIDIA's DCGM exporter."""

from __future__ import annotations

from typing import ClassVar

from loadgen.engines.base import Engine, Metric


class OpenAi(Engine):
    """A server of which nothing is known but its API."""

    metrics: ClassVar[tuple[Metric, ...]] = (
        # The profiling counter works where a GPU is shared (MIG), the other does not; it is often switched off.
        Metric("DCGM_FI_PROF_GR_ENGINE_ACTIVE", "gpu_busy_ratio"),
        Metric("DCGM_FI_DEV_GPU_UTIL", "gpu_busy_ratio", scale=0.01),
    )


ENGINE = OpenAi()
