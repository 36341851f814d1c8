"""TensorRT-LLM: ``trtllm-serve disaggregated`` before context and generation servers.

Names from its source and documentation; nobody here has seen it run. A worker's metrics need ``return_perf_metrics`` and
``enable_iter_perf_stats``, and stand at /prometheus/metrics, as the orchestrator's do; its /metrics is JSON and emptied by
reading, so it is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from loadgen.engines.base import Engine, Glance, Metric, Worker, address, member

TABLE = (
    Metric("trtllm_num_requests_waiting", "waiting_requests"),
    Metric("trtllm_num_requests_running", "running_requests"),
    Metric("trtllm_kv_cache_utilization", "kv_used_ratio"),
    Metric("trtllm_num_paused_requests", "paused_requests"),
    Metric("trtllm_request_success_total", "finished_total"),
    Metric("trtllm_time_to_first_token_seconds", "ttft_s", histogram=True),
    Metric("trtllm_time_per_output_token_seconds", "itl_s", histogram=True),
    Metric("trtllm_e2e_request_latency_seconds", "e2e_s", histogram=True),
    Metric("trtllm_request_queue_time_seconds", "queue_s", histogram=True),
    Metric("trtllm_request_prefill_time_seconds", "prefill_s", histogram=True),
    Metric("trtllm_request_decode_time_seconds", "decode_s", histogram=True),
    Metric("trtllm_kv_transfer_latency_seconds", "transfer_s", histogram=True),
    Metric("trtllm_kv_transfer_latency_seconds_sum", "transfer_s_total"),
    Metric("trtllm_kv_transfer_latency_seconds_count", "transfers_total"),
    # The orchestrator: context servers are ctx_, generation servers gen_, all of a kind together.
    Metric("ctx_first_token_latency_seconds", "ttft_s", role="prefill", histogram=True),
    Metric("ctx_complete_latency_seconds", "e2e_s", role="prefill", histogram=True),
    Metric("gen_first_token_latency_seconds", "ttft_s", role="decode", histogram=True),
    Metric("gen_complete_latency_seconds", "e2e_s", role="decode", histogram=True),
    Metric("gen_per_token_latency_seconds", "itl_s", role="decode", histogram=True),
    Metric("queue_latency_seconds", "queue_s", role="router", histogram=True),
)
"""Also what Dynamo passes through."""

_ROLES = {"context": "prefill", "ctx": "prefill", "generation": "decode", "gen": "decode"}


class TrtLlm(Engine):
    """Per request it tells nothing to the client; /perf_metrics does, but has no request id and is emptied by reading."""

    name: ClassVar[str] = "trtllm"
    metrics: ClassVar[tuple[Metric, ...]] = TABLE
    page: ClassVar[str] = "/prometheus/metrics"

    def recognise(self, seen: Glance) -> str:
        """By the owner of its models, or the list of its cluster."""
        if "tensorrt_llm" in seen.owners:
            return "its models are owned by tensorrt_llm"
        return "GET /cluster_info answers" if isinstance(seen.json("/cluster_info"), dict) else ""

    def version(self, seen: Glance) -> str:
        """As ``GET /version`` says."""
        said = member(seen.json("/version"), "version")
        return said if isinstance(said, str) else ""

    def workers(self, seen: Glance) -> list[Worker]:
        """Those that registered themselves, by ``GET /cluster_info``; none with a list of URLs in the YAML."""
        current = member(seen.json("/cluster_info"), "current_workers")
        found = []
        for kind, listed in current.items() if isinstance(current, dict) else ():
            role = next((r for word, r in _ROLES.items() if word in str(kind).lower()), "")
            for one in listed if isinstance(listed, list) else ():
                host, port = member(one, "host"), member(one, "port")
                if isinstance(host, str) and isinstance(port, int):
                    url = f"http://{host}:{port}"
                    found.append(
                        Worker(address(url), role, url, f"{url}{self.page}", id=str(member(one, "worker_id") or ""))
                    )
        return found

    def facts(self, kept: Mapping[str, Any], headers: Mapping[str, str]) -> dict[str, Any]:
        """Cached tokens, where the usage has them."""
        return super().facts(kept, headers)


ENGINE = TrtLlm()
