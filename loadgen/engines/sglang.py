"""SGLang, alone or behind sglang-router (the model gateway, ``smg``).

The router and its worker list as seen on sglang-router 0.3.2; the engine's names from its source and documentation, old and
new. A worker's metrics need ``--enable-metrics``. The router answers 422 to token ids on /v1/completions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from loadgen.engines.base import Engine, Glance, Metric, Worker, member
from loadgen.engines.vllm import routed_workers, router_page

_MS = 1e-3

TABLE = (
    # A request waits in one of three queues: the scheduler's, for the hand-shake (prefill), for a place (decode).
    Metric("sglang:num_queue_reqs", "waiting_requests"),
    Metric("sglang:num_prefill_bootstrap_queue_reqs", "waiting_requests", part="bootstrap"),
    Metric("sglang:num_prefill_prealloc_queue_reqs", "waiting_requests", part="bootstrap"),  # the older name
    Metric("sglang:num_decode_prealloc_queue_reqs", "waiting_requests", part="prealloc"),
    Metric("sglang:num_running_reqs", "running_requests"),
    Metric("sglang:num_prefill_inflight_queue_reqs", "transferring_requests", part="sending"),
    Metric("sglang:num_decode_transfer_queue_reqs", "transferring_requests", part="receiving"),
    Metric("sglang:num_used_tokens", "kv_used_tokens"),
    Metric("sglang:kv_used_tokens", "kv_used_tokens"),
    Metric("sglang:token_usage", "kv_used_ratio"),
    Metric("sglang:cache_hit_rate", "cache_hit_ratio"),
    Metric("sglang:prompt_tokens_total", "prompt_tokens_total"),
    Metric("sglang:cached_tokens_total", "cached_tokens_total"),
    Metric("sglang:generation_tokens_total", "output_tokens_total"),
    Metric("sglang:num_requests_total", "finished_total"),
    Metric("sglang:num_retracted_requests_total", "preemptions_total"),
    Metric("sglang:num_transfer_failed_reqs_total", "failed_transfers_total"),
    Metric("sglang:kv_transfer_latency_ms_sum", "transfer_s_total", scale=_MS),
    Metric("sglang:kv_transfer_latency_ms_count", "transfers_total"),
    Metric("sglang:kv_transfer_total_mb_sum", "transfer_bytes_total", scale=1e6),
    Metric("sglang:kv_transfer_latency_ms", "transfer_s", scale=_MS),  # a gauge in older releases
    Metric("sglang:time_to_first_token_seconds", "ttft_s", histogram=True),
    Metric("sglang:inter_token_latency_seconds", "itl_s", histogram=True),
    Metric("sglang:e2e_request_latency_seconds", "e2e_s", histogram=True),
    # A decode engine's scheduler has a request in its queue once the KV is there; the transfer comes before.
    Metric("sglang:queue_time_seconds", "queue_s", where={"engine_type": ("", "prefill", "unified")}, histogram=True),
    Metric("sglang:queue_time_seconds", "decode_queue_s", where={"engine_type": ("decode",)}, histogram=True),
    Metric("sglang:kv_transfer_latency_ms", "transfer_s", scale=_MS, histogram=True),
    # Not the decode engine's own stage of that time: both are asked at once, so it waits for the prefill there, too.
    Metric(
        "sglang:per_stage_req_latency_seconds",
        "transfer_s",
        where={"stage": ("prefill_transfer_kv_cache",)},
        histogram=True,
    ),
    Metric("sglang:kv_transfer_total_mb", "transfer_bytes", scale=1e6, histogram=True),
    Metric("sglang:per_stage_req_latency_seconds", "prefill_s", where={"stage": ("prefill_forward",)}, histogram=True),
    # The router. Its pool sizes are wrong after a removal, so workers are counted by GET /workers.
    Metric("smg_worker_requests_active", "inflight_requests", of="worker"),
    Metric("smg_router_request_duration_seconds", "e2e_s", role="router", histogram=True),
    Metric("smg_router_ttft_seconds", "ttft_s", role="router", histogram=True),
)
"""Also what Dynamo and llm-d pass through."""


class Sglang(Engine):
    """Facts: ``meta_info`` where an answer has it; the router names no worker."""

    name: ClassVar[str] = "sglang"
    token_ids: ClassVar[bool] = False
    metrics: ClassVar[tuple[Metric, ...]] = TABLE
    keep: ClassVar[tuple[str, ...]] = ("usage", "meta_info")

    def recognise(self, seen: Glance) -> str:
        """By the owner of its models, the list of sglang-router, or its metrics."""
        if "sglang" in seen.owners:
            return "its models are owned by sglang"
        for one in seen.listed("/workers", "workers"):
            about = member(one, "metadata")
            known = isinstance(about, dict) and "disaggregation_mode" in about
            if known or member(one, "connection_mode") == "HTTP":
                return "GET /workers lists workers as sglang-router does"
        text = seen.text("/metrics")
        return "its metrics begin with sglang: or smg_" if "\nsglang:" in text or "\nsmg_" in text else ""

    def version(self, seen: Glance) -> str:
        """As its server info says, whose path has changed."""
        for path in ("/server_info", "/get_server_info"):
            said = member(seen.json(path), "version")
            if isinstance(said, str):
                return said
        return ""

    def workers(self, seen: Glance) -> list[Worker]:
        """As ``GET /workers`` of the router lists them; before them the router, if its metrics are on its default port."""
        listed = routed_workers(seen)
        return (router_page(seen, "smg_", listed)[0] if listed else []) + listed

    def facts(self, kept: Mapping[str, Any], headers: Mapping[str, str]) -> dict[str, Any]:
        """Seconds of ``meta_info`` under its own names; its queue is the scheduler's of the worker that answered."""
        found = super().facts(kept, headers)
        said = kept.get("meta_info")
        if isinstance(said, dict):
            if type(said.get("cached_tokens")) is int:
                found["cached_tokens"] = said["cached_tokens"]
            for key in ("queue_time", "e2e_latency", "decode_throughput"):
                if isinstance(said.get(key), (int, float)):
                    found[key] = said[key]
        return found


ENGINE = Sglang()
