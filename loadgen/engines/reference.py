"""The reference endpoint of this project (``steelyard serve``)."""

from __future__ import annotations

from typing import ClassVar

from loadgen.engines.base import Engine, Glance, Metric, member


class Reference(Engine):
    """All workers on one page, each line with worker and role."""

    name: ClassVar[str] = "reference"
    metrics: ClassVar[tuple[Metric, ...]] = tuple(
        Metric(f"steelyard_{name}", to, of="worker")
        for name, to in (
            ("waiting_requests", "waiting_requests"),
            ("running_requests", "running_requests"),
            ("waiting_tokens", "waiting_tokens"),
            ("kv_used_tokens", "kv_used_tokens"),
            ("kv_used_ratio", "kv_used_ratio"),
            ("busy_seconds_total", "busy_s_total"),
            ("steps_total", "steps_total"),
            ("prompt_tokens_total", "prompt_tokens_total"),
            ("output_tokens_total", "output_tokens_total"),
            ("finished_requests_total", "finished_total"),
            ("preemptions_total", "preemptions_total"),
        )
    )

    def recognise(self, seen: Glance) -> str:
        """By the owner of its model."""
        return "its models are owned by steelyard" if "steelyard" in seen.owners else ""

    def version(self, seen: Glance) -> str:
        """The profile stands for it: there is no other release to tell apart."""
        profile = member(seen.json("/health"), "profile")
        return f"profile {profile}" if isinstance(profile, str) else ""


ENGINE = Reference()
