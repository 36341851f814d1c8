"""NVIDIA Dynamo: the frontend, and workers that pass their engine's metrics through.

Names as seen on ai-dynamo 1.6.1 and 1.4.2 with mock engines. Workers' ids are 64-bit numbers: decimal at the frontend,
hexadecimal on a worker's own page, and text here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from loadgen.engines.base import Engine, Glance, Metric, Worker, member


def decimal(hexadecimal: str) -> str:
    """A worker's id as the frontend writes it."""
    try:
        return str(int(hexadecimal, 16))
    except ValueError:
        return hexadecimal


_OWN = ("worker_id", decimal)
_OTHERS = ("router", "encode", "processor")
"""Components with an endpoint that generates and no engine of their own; encoders are "encode" or "encoder"."""

_REGISTERED = re.compile(r"^dynamo_component_router_worker_registered\{(.*)\}\s+1(?:\.0*)?\s*$", re.MULTILINE)
_LABEL = re.compile(r'(?<!\w)(\w+)="([^"]*)"')
_GENERATE = {"dynamo_endpoint": ("generate",)}
_F = "dynamo_frontend_"
_C = "dynamo_component_"


class Dynamo(Engine):
    """Facts: which workers served a request and how long its prefill waited and took, from ``nvext``."""

    name: ClassVar[str] = "dynamo"
    members: ClassVar[Mapping[str, Any]] = {"nvext": {"extra_fields": ["worker_id", "timing"]}}
    metrics: ClassVar[tuple[Metric, ...]] = (
        # What the frontend's router has sent to each prefill worker and has no answer for: tokens in hand.
        Metric(
            f"{_F}worker_active_prefill_tokens", "waiting_tokens", where={"worker_type": ("prefill",)}, of="worker_id"
        ),
        Metric(
            f"{_F}worker_active_decode_blocks",
            "kv_used_tokens",
            where={"worker_type": ("decode",)},
            of="worker_id",
            times=(f"{_F}model_kv_cache_block_size",),
        ),
        Metric(
            f"{_F}worker_active_decode_blocks",
            "kv_used_ratio",
            where={"worker_type": ("decode",)},
            of="worker_id",
            per=f"{_F}model_total_kv_blocks",
        ),
        Metric(f"{_F}queued_requests", "waiting_requests", role="router"),
        Metric(f"{_F}inflight_requests", "inflight_requests", role="router"),
        Metric(f"{_F}input_sequence_tokens_sum", "prompt_tokens_total", role="router"),
        Metric(f"{_F}output_tokens_total", "output_tokens_total", role="router"),
        Metric(f"{_F}requests_total", "finished_total", role="router"),
        Metric(f"{_F}time_to_first_token_seconds", "ttft_s", role="router", histogram=True),
        Metric(f"{_F}inter_token_latency_seconds", "itl_s", role="router", histogram=True),
        Metric(f"{_F}request_duration_seconds", "e2e_s", role="router", histogram=True),
        # Not measured: what the router expects from bandwidth and length.
        Metric(
            f"{_C}router_kv_transfer_estimated_latency_seconds", "transfer_estimate_s", role="router", histogram=True
        ),
        # A worker's own page. In flight are those that wait and those that run; the engine's own names tell them apart.
        Metric(f"{_C}inflight_requests", "inflight_requests", where=_GENERATE, own=_OWN),
        Metric(f"{_C}request_duration_seconds_count", "finished_total", where=_GENERATE, own=_OWN),
        Metric(f"{_C}gpu_cache_usage_percent", "kv_used_ratio", own=_OWN),
        Metric(f"{_C}kvstats_gpu_cache_usage_percent", "kv_used_ratio", own=_OWN),  # the older name
        Metric(f"{_C}request_duration_seconds", "e2e_s", where=_GENERATE, own=_OWN, histogram=True),
    )
    keep: ClassVar[tuple[str, ...]] = ("usage", "nvext")

    def recognise(self, seen: Glance) -> str:
        """By the instances in its health."""
        if isinstance(member(seen.json("/health"), "instances"), list):
            return "GET /health lists instances"
        return "its metrics begin with dynamo_frontend_" if "\ndynamo_frontend_" in seen.text("/metrics") else ""

    def workers(self, seen: Glance) -> list[Worker]:
        """The instances that generate, by ``GET /health``. It does not tell where their metrics are.

        Routers and processors generate, too, and are no workers: the frontend's page says whom its router has registered.
        """
        parts: dict[str, str] = {}
        for one in seen.listed("/health", "instances"):
            number, component = member(one, "instance_id"), member(one, "component")
            if member(one, "endpoint") == "generate" and isinstance(number, int) and isinstance(component, str):
                parts[str(number)] = component
        if not parts:
            return []
        told: dict[str, str] = {}
        for labels in _REGISTERED.findall(seen.text("/metrics")):
            held = dict(_LABEL.findall(labels))
            if held.get("worker_type") in ("prefill", "decode"):
                told[held.get("router_worker_id", "")] = held["worker_type"]
        known = {"prefill", "backend", "decode", *(part for number, part in parts.items() if told.get(number))}
        found = {
            number: told.get(number) or ("prefill" if part == "prefill" else "decode")
            for number, part in parts.items()
            if part in known or not (told or part.startswith(_OTHERS))
        }
        if "prefill" not in found.values():  # without prefill workers nobody decodes only
            found = dict.fromkeys(found, "mixed")
        return [
            Worker(number, role, id=number)
            for number, role in sorted(found.items(), key=lambda f: (f[1] != "prefill", f))
        ]

    def facts(self, kept: Mapping[str, Any], headers: Mapping[str, str]) -> dict[str, Any]:
        """Its ``ttft_ms`` ends with the prefill, so it is kept under Dynamo's name; what follows is not measured there."""
        found = super().facts(kept, headers)
        said = kept.get("nvext")
        ids, timing = member(said, "worker_id"), member(said, "timing")
        for name, key in (("prefill_worker", "prefill_worker_id"), ("decode_worker", "decode_worker_id")):
            if type(member(ids, key)) is int:
                found[name] = str(ids[key])
        for key in ("prefill_dp_rank", "decode_dp_rank"):
            if member(ids, key):
                found[key] = ids[key]
        for name, key in (("queue_s", "prefill_wait_time_ms"), ("prefill_s", "prefill_time_ms")):
            if isinstance(member(timing, key), (int, float)):
                found[name] = timing[key] / 1e3
        for key in ("total_time_ms", "kv_hit_rate", "router_queue_depth", "kv_transfer_estimated_latency_ms"):
            if isinstance(member(timing, key), (int, float)):
                found[key] = timing[key]
        return found


ENGINE = Dynamo()
