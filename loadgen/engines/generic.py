"""Any OpenAI-shaped server, and the engines whose request needs nothing more.

Metric names as seen on vLLM 0.32 and SGLang; they carry no worker name, so a reading counts as the worker "server".
"""

from __future__ import annotations

from loadgen.engines import Dialect

OPENAI = Dialect("openai", metrics={})

VLLM = Dialect(
    "vllm",
    metrics={
        "vllm:num_requests_waiting": "waiting_requests",
        "vllm:num_requests_running": "running_requests",
        "vllm:kv_cache_usage_perc": "kv_used_ratio",
        "vllm:gpu_cache_usage_perc": "kv_used_ratio",  # the older spelling
        "vllm:prompt_tokens_total": "prompt_tokens_total",
        "vllm:generation_tokens_total": "output_tokens_total",
        "vllm:request_success_total": "finished_total",
        "vllm:num_preemptions_total": "preemptions_total",
    },
    worker_label="engine",
)

SGLANG = Dialect(
    "sglang",
    token_ids=False,  # its router answers 422 to token ids on /v1/completions
    metrics={
        "sglang:num_queue_reqs": "waiting_requests",
        "sglang:num_running_reqs": "running_requests",
        "sglang:num_used_tokens": "kv_used_tokens",
        "sglang:token_usage": "kv_used_ratio",
        "sglang:prompt_tokens_total": "prompt_tokens_total",
        "sglang:generation_tokens_total": "output_tokens_total",
        "sglang:num_retracted_requests_total": "preemptions_total",
    },
    role_label="engine_type",
    worker_label="tp_rank",
)

DIALECTS = (OPENAI, VLLM, SGLANG)
