"""llm-d: a gateway (Envoy) whose endpoint picker (EPP) chooses pods that run vLLM or SGLang.

Names from its source and documentation; nobody here has seen it run. Pods tell their own metrics under their engine's names,
their role is the label llm-d.ai/role: give the pods by ``--targets`` (``kubectl get pods -o json``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from loadgen.engines import vllm
from loadgen.engines.base import Engine, Glance, Metric
from traces.records import Sample

_PODS = "inference_pool_ready_pods"


def _renamed(name: str, to: str) -> tuple[Metric, ...]:
    """A histogram of the endpoint picker under its name, and the one it had before."""
    return tuple(
        Metric(f"inference_{kind}_{name}", to, role="router", histogram=True) for kind in ("objective", "model")
    )


class LlmD(Engine):
    """Answers are the engine's own; the gateway adds nothing about P and D."""

    name: ClassVar[str] = "llm-d"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("inference_pool_per_pod_queue_size", "waiting_requests", of="model_server_pod"),
        # Averages over pods of both roles: the pool's, not a role's.
        Metric("inference_extension_flow_control_queue_size", "waiting_requests", role="router"),
        Metric("inference_pool_average_running_requests", "running_requests", role="router", times=(_PODS,)),
        Metric("inference_pool_average_kv_cache_utilization", "kv_used_ratio", role="router"),
        *_renamed("request_duration_seconds", "e2e_s"),
        *_renamed("request_ttft_seconds", "ttft_s"),
        Metric(
            "inference_extension_flow_control_request_queue_duration_seconds", "queue_s", role="router", histogram=True
        ),
    )
    keep: ClassVar[tuple[str, ...]] = vllm.ENGINE.keep
    headers: ClassVar[tuple[str, ...]] = ("x-went-into-resp-headers",)

    def recognise(self, seen: Glance) -> str:
        """By its debug header, or Envoy in front of vLLM."""
        reply = seen.get("/v1/models")
        if reply is None:
            return ""
        if "x-went-into-resp-headers" in reply.headers:
            return "its gateway adds x-went-into-resp-headers"
        if "envoy" in reply.headers.get("server", "") and seen.owners & {"vllm", "sglang"}:
            return "Envoy stands before models owned by vllm or sglang"
        return "its metrics begin with inference_pool_" if "\ninference_pool_" in seen.text("/metrics") else ""

    def role(self, before: Sample | None, now: Sample) -> str:
        """As for vLLM, where no label says it."""
        return vllm.role_by_source(before, now)

    def facts(self, kept: Mapping[str, Any], headers: Mapping[str, str]) -> dict[str, Any]:
        """Of a decode pod's vLLM: what it says begins when it got the KV, but whether it got any it does not say."""
        found = super().facts(kept, headers)
        said = kept.get("metrics")
        for key in ("queue_time_ms", "time_to_first_token_ms", "mean_itl_ms") if isinstance(said, dict) else ():
            if isinstance(said.get(key), (int, float)):  # type: ignore[union-attr]
                found[key] = said[key]  # type: ignore[index]
        return found | {k: headers[k] for k in self.headers if k in headers}


ENGINE = LlmD()
