"""vLLM, alone or behind vllm-router.

Names as seen on vLLM 0.32.0 and vllm-router 0.1.17; older spellings from their releases' documentation. Its metrics have no
label for the role. Per-request timings need ``--enable-per-request-metrics``; in a pair they come from the decode engine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from loadgen.engines.base import Engine, Glance, Metric, Worker, address, believed, member, without_rank
from traces.records import Sample

_PAIR = "___prefill_addr_", "___decode_addr_"
"""vllm-router puts both workers into the id of the answer, each behind its mark, then _ and hexadecimal digits."""

_TRANSFERRED = ("external_kv_transfer",)

ROUTER_PORT = 29000
"""Where vllm-router and sglang-router show their metrics if nobody says otherwise."""

_NAMED = re.compile(r'^vllm_router_pd_(prefill|decode)_requests_total\{(?:.*,)?worker="([^"]+)"', re.MULTILINE)

TABLE = (
    Metric("vllm:num_requests_waiting", "waiting_requests"),
    Metric("vllm:num_requests_running", "running_requests"),
    Metric("vllm:num_requests_kv_fetch_by_stage", "transferring_requests"),
    Metric("vllm:kv_cache_usage_perc", "kv_used_ratio"),
    Metric("vllm:gpu_cache_usage_perc", "kv_used_ratio"),  # before 0.9
    Metric(
        "vllm:kv_cache_usage_perc",
        "kv_used_tokens",
        times=("vllm:cache_config_info[num_gpu_blocks]", "vllm:cache_config_info[block_size]"),
    ),
    Metric("vllm:prompt_tokens_total", "prompt_tokens_total"),
    Metric("vllm:prompt_tokens_by_source_total", "prompt_tokens_total"),
    Metric("vllm:generation_tokens_total", "output_tokens_total"),
    Metric("vllm:request_success_total", "finished_total"),
    Metric("vllm:num_preemptions_total", "preemptions_total"),
    Metric("vllm:iteration_tokens_total_count", "steps_total"),
    Metric("vllm:prefix_cache_queries_total", "lookup_tokens_total"),
    Metric("vllm:gpu_prefix_cache_queries_total", "lookup_tokens_total"),
    Metric("vllm:prefix_cache_hits_total", "cached_tokens_total"),
    Metric("vllm:gpu_prefix_cache_hits_total", "cached_tokens_total"),
    Metric("vllm:prompt_tokens_by_source_total", "received_tokens_total", where={"source": _TRANSFERRED}),
    Metric("vllm:nixl_xfer_time_seconds_sum", "transfer_s_total"),
    Metric("vllm:nixl_xfer_time_seconds_count", "transfers_total"),
    Metric("vllm:nixl_bytes_transferred_sum", "transfer_bytes_total"),
    Metric("vllm:nixl_num_failed_transfers_total", "failed_transfers_total"),
    Metric("vllm:time_to_first_token_seconds", "ttft_s", histogram=True),
    Metric("vllm:inter_token_latency_seconds", "itl_s", histogram=True),
    Metric("vllm:time_per_output_token_seconds", "itl_s", histogram=True),  # before 0.11
    Metric("vllm:request_queue_time_seconds", "queue_s", histogram=True),
    Metric("vllm:request_prefill_time_seconds", "prefill_s", histogram=True),
    Metric("vllm:request_decode_time_seconds", "decode_s", histogram=True),
    Metric("vllm:e2e_request_latency_seconds", "e2e_s", histogram=True),
    Metric("vllm:nixl_xfer_time_seconds", "transfer_s", histogram=True),
    Metric("vllm:nixl_bytes_transferred", "transfer_bytes", histogram=True),
    # vllm-router: queue lengths as it counts them, by worker and role. Active prefill tokens are those it has sent and has no
    # answer for, so they are the tokens in hand, waiting and running.
    Metric("vllm_router_pd_prefill_occupancy", "inflight_requests", of="worker", role="prefill"),
    Metric("vllm_router_pd_active_prefill_tokens", "waiting_tokens", of="worker", role="prefill"),
    Metric("vllm_router_pd_pending_decode_requests", "waiting_requests", of="worker", role="decode"),
    Metric("vllm_router_pd_active_decode_requests", "running_requests", of="worker", role="decode"),
    Metric("vllm_router_pd_decode_pending_seconds", "handover_s", role="router", histogram=True),
    Metric("vllm_router_pd_request_duration_seconds", "e2e_s", role="router", histogram=True),
)
"""Also what Dynamo and llm-d pass through."""


def role_by_source(before: Sample | None, now: Sample) -> str:
    """Prefill, decode or mixed, by where the KV of the prompts came from since the reading before, or ever; "" for not sure.

    A decode worker's came from another worker; a prefill worker makes one token a request, because its router asks for one. One
    that makes one token of prompts that came from elsewhere may be either: a prefill worker with a KV store, or a decode worker
    of answers of one token.
    """

    def moved(name: str) -> float:
        value, past = getattr(now, name), getattr(before, name) if before is not None else None
        return 0.0 if value is None else value if past is None or past > value else value - past

    if now.received_tokens_total is None:
        return ""
    prompt = moved("prompt_tokens_total")
    if prompt <= 0:
        return ""
    finished, made = moved("finished_total"), moved("output_tokens_total")
    one = finished > 0 and made <= 1.5 * finished
    if moved("received_tokens_total") > prompt / 2:
        return "" if one else "decode"
    return "prefill" if one else "mixed" if finished else ""


def routed_workers(seen: Glance) -> list[Worker]:
    """The workers that ``GET /workers`` of vllm-router or sglang-router lists. One whose data-parallel ranks are listed apart is
    one worker with one page, ill where a rank is."""
    found: dict[tuple[str, str], Worker] = {}
    for one in seen.listed("/workers", "workers"):
        url = member(one, "url")
        if not isinstance(url, str) or not url:
            continue
        kind = str(one.get("worker_type") or "")
        port = one.get("bootstrap_port")
        engine = without_rank(url)
        worker = Worker(
            address(url),
            {"prefill": "prefill", "decode": "decode", "regular": "mixed"}.get(kind, ""),
            engine,
            engine.rstrip("/") + "/metrics",
            id=str(one.get("id") or url),
            healthy=one["is_healthy"] if isinstance(one.get("is_healthy"), bool) else None,
            details={"bootstrap_port": port} if isinstance(port, int) else {},
        )
        if found.setdefault((worker.name, worker.role), worker).healthy is not False:
            found[worker.name, worker.role] = worker
    return believed(sorted(found.values(), key=lambda w: (w.role != "prefill", w.name)), seen.shown)


def router_page(seen: Glance, prefix: str, workers: list[Worker]) -> tuple[list[Worker], str]:
    """(the router as a worker, or none; its page), where its default port shows its names and, if there are any, its workers'."""
    url, text = seen.page(ROUTER_PORT)
    if f"\n{prefix}" not in f"\n{text}" or (workers and not any(w.url in text for w in workers)):
        return [], ""
    return [Worker("router", "router", metrics=url)], text


def _pair(id: str) -> tuple[str, str] | None:
    """(prefill worker, decode worker) of an answer; None where its id names none. In time that grows with the id alone."""
    before, _, decode = id.rpartition(_PAIR[1])
    prefill = before.rpartition(_PAIR[0])[2] if _PAIR[0] in before else ""
    decode, _, number = decode.rpartition("_")
    return (prefill, decode) if prefill and decode and re.fullmatch("[0-9a-f]+", number) else None


class Vllm(Engine):
    """Facts: P and D addresses from the id of the answer, timings from ``metrics`` beside the usage."""

    name: ClassVar[str] = "vllm"
    metrics: ClassVar[tuple[Metric, ...]] = TABLE
    keep: ClassVar[tuple[str, ...]] = ("id", "usage", "metrics")

    def recognise(self, seen: Glance) -> str:
        """By the owner of its models, its metrics, or the list of vllm-router."""
        if "vllm" in seen.owners:
            return "its models are owned by vllm"
        if any(member(one, "connection_mode") in ("Http", "Grpc") for one in seen.listed("/workers", "workers")):
            return "GET /workers lists workers as vllm-router does"
        return "its metrics begin with vllm:" if "\nvllm:" in seen.text("/metrics") else ""

    def version(self, seen: Glance) -> str:
        """As ``GET /version`` says."""
        said = member(seen.json("/version"), "version")
        return said if isinstance(said, str) else ""

    def workers(self, seen: Glance) -> list[Worker]:
        """As ``GET /workers`` of vllm-router lists them. In its discovery mode that is empty, and its metrics name them.

        There those that have left are still named, and one that has changed its role is named in both: its role is left open.
        """
        listed = routed_workers(seen)
        router, text = router_page(seen, "vllm_router_", listed)
        if not listed:
            roles: dict[str, set[str]] = {}
            for role, url in _NAMED.findall(text):
                roles.setdefault(without_rank(url), set()).add(role)
            listed = [
                Worker(address(url), held.copy().pop() if len(held) == 1 else "", url, url.rstrip("/") + "/metrics")
                for url, held in sorted(roles.items())
            ]
        return router + listed

    def role(self, before: Sample | None, now: Sample) -> str:
        """By where the KV of its prompts came from."""
        return role_by_source(before, now)

    def facts(self, kept: Mapping[str, Any], headers: Mapping[str, str]) -> dict[str, Any]:
        """A lone engine's first token ends its prefill; a decode engine's, which got the KV, its first step."""
        found = super().facts(kept, headers)
        pair = _pair(str(kept.get("id") or ""))
        if pair:
            found |= {"prefill_worker": pair[0], "decode_worker": pair[1]}
        said = kept.get("metrics")
        if isinstance(said, dict):
            names = ("transfer_s", "first_step_s") if pair else ("queue_s", "prefill_s")
            for name, key in zip(names, ("queue_time_ms", "time_to_first_token_ms"), strict=True):
                if isinstance(said.get(key), (int, float)):
                    found[name] = said[key] / 1e3
            for key in ("generation_time_ms", "mean_itl_ms"):
                if isinstance(said.get(key), (int, float)):
                    found[key] = said[key]
        return found


ENGINE = Vllm()
