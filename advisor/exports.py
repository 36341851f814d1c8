"""An answer as what other tools read: replicas, planner settings, autoscaler objects, alert rules.

Each file says what every document in it was checked with, or that it was not: ``schemas/`` holds the schemas that can be had.
Names of services, metrics and labels are defaults of the engines' own manifests: look them over before you apply anything.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import tempfile
import tomllib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import fastjsonschema

from loadgen.cluster import Profile
from loadgen.policy import BacklogRule, DemandRule, rule_of
from traces import __version__
from traces.errors import InputError

Documents = list[dict[str, Any]]

SCHEMAS = Path(__file__).parent / "schemas"


def export(answer: Mapping[str, Any], kind: str) -> str:
    """The text of a file. answer: as ``advise --json``, or a stored row. kind: one of :data:`KINDS`."""
    if kind not in KINDS:
        raise InputError(f"export must be one of {', '.join(KINDS)} (got {kind!r}).")
    documents, notes = KINDS[kind](answer)
    text = "---\n".join(_yaml(one) for one in documents)
    checked = [validated(one) for one in documents]
    if kind == "prometheus-rules" and (said := _promtool(text)):
        checked.append(said)
    roles = _roles(answer)
    head = [
        f"Written by steelyard {__version__} from recommendation {answer.get('recommendation', answer.get('id', '?'))}: "
        f"{answer['strategy']}, {roles['prefill']} prefill : {roles['decode']} decode, {answer['slo']}.",
        *dict.fromkeys(checked),
        *notes,
    ]
    return "".join(f"# {line}\n" for line in head) + text


def validated(document: Mapping[str, Any]) -> str:
    """What a document was checked against, or that it was not, in a line; InputError where its schema refuses it."""
    kind = str(document.get("kind") or ("rules" if "groups" in document else "PlannerConfig"))
    if not (SCHEMAS / f"{kind}.json").is_file():
        return f"{kind}: unvalidated, no schema of it was found in a package index."
    title, check = _schema(kind)
    try:
        check(document)
    except fastjsonschema.JsonSchemaValueException as error:
        raise InputError(f"this answer cannot be written as {kind}: {title} refuses it: {error.message}.") from None
    return f"{kind}: validated against the schema of {title}."


@cache
def _schema(kind: str) -> tuple[str, Callable[[Mapping[str, Any]], Any]]:
    """(its title, what checks a document by it): made once, which takes far longer than a check."""
    schema = json.loads((SCHEMAS / f"{kind}.json").read_bytes())
    return schema["title"], fastjsonschema.compile(schema)


def _roles(answer: Mapping[str, Any]) -> dict[str, int]:
    """Workers of each role under the strategy that was chosen: moving starts from its own split, offline has its own."""
    chosen = answer
    if answer["strategy"] == "online":
        chosen = (answer.get("thresholds") or {}).get("start") or answer
    elif answer["strategy"] == "offline":
        chosen = answer.get("offline") or answer
    return {"prefill": int(chosen["prefill"]), "decode": int(chosen["decode"])}


def _thresholds(answer: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    found = answer.get("thresholds") or {}
    # Thresholds that were found and do not pay stand in an answer that is to stand still, too.
    if answer["strategy"] != "online":
        raise InputError(
            f"--export {kind} needs thresholds, and this answer is to stand still. Ask for some: advise --strategy online"
        )
    if not found.get("rule"):
        why = found.get("why") or "there are none"
        raise InputError(f"--export {kind} needs thresholds: {why}. Export the split: advise --strategy static")
    checked: Mapping[str, Any] = found
    return checked


def _bounds(answer: Mapping[str, Any], limits: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(fewest, most) workers of each role: the floor, and what the other's floor leaves."""
    roles, floor = _roles(answer), limits["floor"]
    total = sum(roles.values())
    return {
        "prefill": (int(floor["prefill"]), total - int(floor["decode"])),
        "decode": (int(floor["decode"]), total - int(floor["prefill"])),
    }


def kubernetes(answer: Mapping[str, Any]) -> tuple[Documents, list[str]]:
    """Static: a Kustomization that sets replicas. Online: a HorizontalPodAutoscaler (autoscaling/v2) a role."""
    roles = _roles(answer)
    if answer["strategy"] != "online":
        return [
            {
                "apiVersion": "kustomize.config.k8s.io/v1beta1",
                "kind": "Kustomization",
                "replicas": [{"name": role, "count": n} for role, n in roles.items()],
            }
        ], ["Deployments are taken to be named prefill and decode."]
    limits = _thresholds(answer, "kubernetes")
    bounds = _bounds(answer, limits)
    metrics = {
        "prefill": (
            ("steelyard_waiting_prompt_tokens", limits["prefill"]["up_waiting_tokens"]),
            ("steelyard_prompt_tokens_per_second", _prompt_tokens_per_s(limits)),
        ),
        "decode": (("steelyard_requests_running_or_waiting", limits["decode"]["up_running_requests"]),),
    }
    found = [
        {
            "apiVersion": "autoscaling/v2",
            "kind": "HorizontalPodAutoscaler",
            "metadata": {"name": f"steelyard-{role}"},
            "spec": {
                "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": role},
                "minReplicas": bounds[role][0],
                "maxReplicas": bounds[role][1],
                "metrics": [
                    {
                        "type": "Pods",
                        "pods": {
                            "metric": {"name": name},
                            "target": {"type": "AverageValue", "averageValue": str(max(1, round(value)))},
                        },
                    }
                    for name, value in measures
                ],
                "behavior": _behavior(limits),
            },
        }
        for role, measures in metrics.items()
    ]
    return found, [
        "Two autoscalers scale two pools on their own: they do not keep the sum of GPUs, as steelyard's rule does. Give the "
        "namespace a quota.",
        STEERS,
        "Pod metrics need an adapter (prometheus-adapter), with these queries a pod: steelyard_waiting_prompt_tokens "
        f"vllm:num_requests_waiting * {limits['mean_prompt']:.6g} (the mean prompt, where an engine counts requests only), "
        "steelyard_prompt_tokens_per_second rate(vllm:prompt_tokens_total[1m]), steelyard_requests_running_or_waiting "
        "vllm:num_requests_running + vllm:num_requests_waiting.",
    ]


STEERS = (
    "An autoscaler steers to the upper thresholds, each an average a worker: the lower ones, and the check of what a move "
    "leaves, are not in it. Prefill has a second one, of prompt tokens a second, which holds its workers while nothing waits."
)


def _prompt_tokens_per_s(limits: Mapping[str, Any]) -> float:
    """Prompt tokens a second a prefill worker at which a rule of demand asks for one more: never more than one can process."""
    rule = rule_of(limits, "thresholds")
    if isinstance(rule, BacklogRule):  # it looks at queues alone: how full a worker may be is the other rule's
        rule = DemandRule(rule.laws, rule.mean_prompt, rule.mean_output, rule.slo)
    return min(1.0, rule.up * rule.target) / rule.token_s


LONGEST_S = 3600
"""Kubernetes takes no stabilization window that is longer."""


def _behavior(limits: Mapping[str, Any]) -> dict[str, Any]:
    """How long a HorizontalPodAutoscaler waits: the dwell before it adds, the cool-down before it takes away."""
    up, down = (min(LONGEST_S, _whole_s(limits[name])) for name in ("dwell_s", "cool_s"))
    return {"scaleUp": {"stabilizationWindowSeconds": up}, "scaleDown": {"stabilizationWindowSeconds": down}}


def dynamo(answer: Mapping[str, Any]) -> tuple[Documents, list[str]]:
    """Replicas of a DynamoGraphDeployment, and for online its planner's settings. Version, names and types are those of the
    templates and of the planner in ai-dynamo 1.6.1."""
    found: Documents = [
        {
            "apiVersion": "nvidia.com/v1beta1",
            "kind": "DynamoGraphDeployment",
            "metadata": {"name": "steelyard"},
            "spec": {"components": [{"name": role, "type": role, "replicas": n} for role, n in _roles(answer).items()]},
        }
    ]
    notes = [
        "Set these replicas in your deployment's components (images, models, resources are yours); a merge patch would replace "
        "the whole list. In v1alpha1 they stand under spec.services."
    ]
    if answer["strategy"] == "online":
        limits = _thresholds(answer, "dynamo")
        planner, said = _planner(answer, limits)
        found.append(planner)
        notes += said
    return found, notes


def _planner(answer: Mapping[str, Any], limits: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Settings of Dynamo's planner (``PlannerConfig`` of ai-dynamo 1.6.1): queued tokens and KV use as thresholds, GPUs kept.

    Its decode thresholds are per cent of the KV cache: sequences times their mean context, of what the fitted laws hold.
    """
    gpus = int(answer.get("gpus") or sum(_roles(answer).values()))
    settings: dict[str, Any] = {
        "mode": "disagg",
        "max_gpu_budget": gpus,
        "min_gpu_budget": gpus,
        "prefill_min_endpoint": int(limits["floor"]["prefill"]),
        "decode_min_endpoint": int(limits["floor"]["decode"]),
        "load_adjustment_interval_seconds": max(5, _whole_s(limits["dwell_s"])),
    }
    notes = [
        "The second document is the planner's configuration, in the names of ai-dynamo 1.6.1's PlannerConfig; equal budgets make "
        "it move workers between the roles instead of adding some. It knows no cool-down and no check of what a move leaves."
    ]
    kv = Profile.from_table(tomllib.loads(str(limits["laws"])), "thresholds").kv_tokens
    if not kv:
        settings["optimization_target"] = "throughput"
        notes.append(
            "How many tokens the KV cache holds is not known, and its decode thresholds are shares of that: its own "
            "(throughput) are left in force."
        )
        return settings, notes
    context = limits["mean_prompt"] + limits["mean_output"] / 2
    up, down = (
        min(100.0, 100 * limits["decode"][f"{word}_running_requests"] * context / kv) for word in ("up", "down")
    )
    queued = max(1, round(limits["prefill"]["up_waiting_tokens"]))
    settings |= {
        "optimization_target": "load",
        "prefill_scale_up_queue_tokens": queued,
        "prefill_scale_down_queue_tokens": min(queued - 1, round(limits["prefill"]["down_waiting_tokens"])),
        "decode_scale_up_kv_rate": round(up, 2),
        "decode_scale_down_kv_rate": round(min(down, 0.99 * up), 2),
    }
    return settings, notes


def llm_d(answer: Mapping[str, Any]) -> tuple[Documents, list[str]]:
    """Replicas of a KServe LLMInferenceService: decode in spec, prefill in spec.prefill."""
    roles = _roles(answer)
    notes = ["A patch: merge it into your service."]
    if answer["strategy"] == "online":
        notes.append(
            "The split that moving starts from. It holds no thresholds: export keda or prometheus-rules for these."
        )
    return [
        {
            "apiVersion": "serving.kserve.io/v1alpha1",
            "kind": "LLMInferenceService",
            "metadata": {"name": "steelyard"},
            "spec": {"replicas": roles["decode"], "prefill": {"replicas": roles["prefill"]}},
        }
    ], notes


def keda(answer: Mapping[str, Any]) -> tuple[Documents, list[str]]:
    """A ScaledObject a role, on Prometheus queries."""
    limits = _thresholds(answer, "keda")
    bounds = _bounds(answer, limits)
    queries = _queries(limits)
    rate = ("prefill", 'sum(rate(vllm:prompt_tokens_total{role="prefill"}[1m]))', _prompt_tokens_per_s(limits))
    return [
        {
            "apiVersion": "keda.sh/v1alpha1",
            "kind": "ScaledObject",
            "metadata": {"name": f"steelyard-{role}"},
            "spec": {
                "scaleTargetRef": {"name": role},
                "minReplicaCount": bounds[role][0],
                "maxReplicaCount": bounds[role][1],
                "pollingInterval": max(1, _whole_s(limits["tick_s"])),
                # Its cooldownPeriod is about scaling to zero alone.
                "advanced": {"horizontalPodAutoscalerConfig": {"behavior": _behavior(limits)}},
                "triggers": [
                    {
                        "type": "prometheus",
                        "metadata": {
                            "serverAddress": "http://prometheus:9090",
                            "query": query,
                            "threshold": f"{threshold:.6g}",
                        },
                    }
                    for of, query, threshold in (*queries, rate)
                    if of == role
                ],
            },
        }
        for role in ("prefill", "decode")
    ], [
        "Two objects scale two pools on their own: they do not keep the sum of GPUs, as steelyard's rule does.",
        STEERS,
    ]


def _queries(limits: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """(role, PromQL of a sum over its workers, threshold a worker), in vLLM's names."""
    mean = f"{limits['mean_prompt']:.6g}"
    return [
        (
            "prefill",
            f'sum(vllm:num_requests_waiting{{role="prefill"}}) * {mean}',
            limits["prefill"]["up_waiting_tokens"],
        ),
        (
            "decode",
            'sum(vllm:num_requests_running{role="decode"} + vllm:num_requests_waiting{role="decode"})',
            limits["decode"]["up_running_requests"],
        ),
    ]


def prometheus_rules(answer: Mapping[str, Any]) -> tuple[Documents, list[str]]:
    """Alerts when a role should get or may give a worker."""
    limits = _thresholds(answer, "prometheus-rules")
    rules = []
    for role, query, up in _queries(limits):
        unit = "waiting_tokens" if role == "prefill" else "running_requests"
        down = limits[role][f"down_{unit}"]
        per = f'({query}) / count(vllm:num_requests_running{{role="{role}"}})'
        other = "decode" if role == "prefill" else "prefill"
        for word, test, wait, text in (
            ("Short", f"{per} > {up:.6g}", limits["dwell_s"], f"{role} is short of workers: move one from {other}"),
            ("Idle", f"{per} < {down:.6g}", limits["cool_s"], f"{role} can give a worker, if {other} is short"),
        ):
            rules.append(
                {
                    "alert": f"Steelyard{role.capitalize()}{word}",
                    "expr": test,
                    "for": f"{_whole_s(wait)}s",
                    "labels": {"severity": "info" if word == "Idle" else "warning", "role": role},
                    "annotations": {"summary": text},
                }
            )
    interval = f"{max(1, _whole_s(limits['tick_s']))}s"
    return [{"groups": [{"name": "steelyard", "interval": interval, "rules": rules}]}], [
        "Metric names are vLLM's; the label role must come from your scrape configuration."
    ]


KINDS: dict[str, Callable[[Mapping[str, Any]], tuple[Documents, list[str]]]] = {
    "kubernetes": kubernetes,
    "dynamo": dynamo,
    "llm-d": llm_d,
    "keda": keda,
    "prometheus-rules": prometheus_rules,
}


def _whole_s(value: float) -> int:
    return math.ceil(value)


def _promtool(text: str) -> str:
    """What promtool says of rules, where it is installed: "" where it is not, InputError where it refuses them."""
    tool = shutil.which("promtool")
    if tool is None:
        return ""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rules.yml"
        path.write_text(text)
        done = subprocess.run(
            [tool, "check", "rules", str(path)], capture_output=True, text=True, timeout=30, check=False
        )
    if done.returncode != 0:
        raise InputError(f"promtool refuses these rules: {done.stderr.strip()[:200]}")
    return "rules: checked with promtool check rules."


def _yaml(value: Any, indent: int = 0) -> str:
    """A document of mappings, lists and scalars as block YAML; text is quoted as JSON quotes it, which YAML reads."""
    pad = "  " * indent
    lines = []
    for key, held in value.items():
        if isinstance(held, Mapping):
            lines.append(f"{pad}{key}:\n{_yaml(held, indent + 1)}")
        elif isinstance(held, list):
            lines.append(f"{pad}{key}:\n")
            for one in held:
                inner = _yaml(one, indent + 2)
                lines.append(f"{pad}  - {inner[len(pad) + 4 :]}")
        else:
            lines.append(f"{pad}{key}: {json.dumps(held)}\n")
    return "".join(lines)
