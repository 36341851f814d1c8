"""An answer as files of other tools: numbers of the thresholds arrive, YAML is read back, what was not checked says so."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from typing import Any

import pytest
import yaml

from advisor.exports import KINDS, export, validated
from advisor.thresholds import backlog_thresholds
from loadgen import policy
from loadgen.cluster import Profile
from traces.errors import InputError
from traces.measures import Slo
from traces.records import Fleet

RULE = policy.DemandRule(
    Profile.load("llama-70b-h100"), 900.0, 250.0, Slo.parse("ttft<1s tpot<50ms"), cool_s=7.5, dwell_s=2.0
)


def answer(strategy: str) -> dict[str, Any]:
    table = policy.table_of(RULE) | backlog_thresholds(RULE, Fleet(3, 5))
    moving = table | {"start": {"prefill": 3, "decode": 5}, "tick_s": 1.0}
    return {
        "offline": {"prefill": 4, "decode": 4} if strategy == "offline" else None,
        "strategy": strategy,
        "prefill": 2,
        "decode": 6,
        "slo": "ttft<1s tpot<50ms",
        "recommendation": 7,
        "thresholds": moving if strategy == "online" else None,
    }


def read(text: str) -> list[Any]:
    return list(yaml.safe_load_all(text))


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("keda", "prometheus-rules")])
def test_a_static_answer_sets_replicas(kind: str) -> None:
    """Two prefill and six decode replicas, wherever this kind of file keeps them."""
    (document,) = read(export(answer("static"), kind))
    if kind == "kubernetes":
        assert document["replicas"] == [{"name": "prefill", "count": 2}, {"name": "decode", "count": 6}]
    elif kind == "dynamo":
        assert document["apiVersion"] == "nvidia.com/v1beta1"
        held = document["spec"]["components"]
        assert [(c["name"], c["type"], c["replicas"]) for c in held] == [
            ("prefill", "prefill", 2),
            ("decode", "decode", 6),
        ]
    else:
        assert (document["spec"]["replicas"], document["spec"]["prefill"]["replicas"]) == (6, 2)


@pytest.mark.parametrize(("strategy", "split"), [("static", (2, 6)), ("offline", (4, 4)), ("online", (3, 5))])
def test_every_strategy_is_deployed_with_its_own_split(strategy: str, split: tuple[int, int]) -> None:
    """Offline has a split of its own, moving one that it starts from: these are written, and named on top."""
    text = export(answer(strategy), "llm-d")
    (document,) = read(text)
    assert (document["spec"]["prefill"]["replicas"], document["spec"]["replicas"]) == split
    head = text.splitlines()[0]
    assert "{}, {} prefill : {} decode".format(strategy, *split) in head
    assert ("It holds no thresholds" in text) is (strategy == "online")


@pytest.mark.parametrize("kind", ["keda", "prometheus-rules"])
def test_what_needs_thresholds_refuses_an_answer_without(kind: str) -> None:
    """Standing still needs no autoscaler: one line and the next step."""
    held = answer("online") | {"strategy": "static"}  # thresholds were found, and do not pay
    for still in (answer("static"), held):
        with pytest.raises(InputError, match="advise --strategy online"):
            export(still, kind)
    none = answer("online") | {
        "thresholds": {"rule": None, "why": "nothing that moves did better"}
    }  # they were asked for
    with pytest.raises(InputError, match=r"thresholds: nothing that moves did better. .*--strategy static$"):
        export(none, kind)


def test_an_online_answer_bounds_and_thresholds_two_autoscalers() -> None:
    """Floors bound the replicas, the thresholds are the averages, the cool-down stabilises."""
    for kind in ("kubernetes", "keda"):
        documents = read(export(answer("online"), kind))
        assert [d["kind"] for d in documents] == [documents[0]["kind"]] * 2
        for one in documents:
            spec = one["spec"]
            held = (
                spec["behavior"]
                if kind == "kubernetes"
                else spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
            )
            waits = [held[way]["stabilizationWindowSeconds"] for way in ("scaleUp", "scaleDown")]
            assert waits == [2, 8], kind
            # KEDA's cooldownPeriod waits before scaling to zero, which a floor rules out: the cool-down would do nothing there.
            assert "cooldownPeriod" not in spec
        slow = answer("online")
        slow["thresholds"] |= {"cool_s": 9000.0}  # Kubernetes takes an hour at most
        assert "3600" in export(slow, kind)
        assert "9000" not in export(slow, kind)
    prefill, decode = read(export(answer("online"), "kubernetes"))
    limits = backlog_thresholds(RULE, Fleet(3, 5))
    for one, value in (
        (prefill, limits["prefill"]["up_waiting_tokens"]),
        (decode, limits["decode"]["up_running_requests"]),
    ):
        spec = one["spec"]
        assert (spec["minReplicas"], spec["maxReplicas"]) == (1, 7)
        assert spec["metrics"][0]["pods"]["target"]["averageValue"] == str(round(value))


def test_an_autoscaler_keeps_the_workers_that_work_without_a_queue() -> None:
    """It asks for total / threshold replicas, the most of its metrics: in healthy traffic nothing waits, and the load counts.

    Decode counts those that wait, too: what runs never exceeds the place that there is.
    """
    seconds = 2.9 * RULE.up * RULE.target  # of prefill work that arrive a second: full workers
    for kind in ("kubernetes", "keda"):
        prefill, decode = read(export(answer("online"), kind))
        asked = []
        for name, threshold in measures(prefill):
            total = 0.0 if "waiting" in name else seconds / RULE.token_s
            asked.append(math.ceil(total / threshold))
        assert sorted(asked) == [0, 3], kind
        ((name, _),) = measures(decode)
        assert "waiting" in name, kind
    head = export(answer("online"), "kubernetes")
    assert "steers to the upper thresholds" in head
    backlog = answer("online")
    rule = policy.BacklogRule(RULE.laws, RULE.mean_prompt, RULE.mean_output, RULE.slo)
    backlog["thresholds"] |= policy.table_of(rule) | backlog_thresholds(rule, Fleet(3, 5))
    prefill, _ = read(export(backlog, "keda"))
    assert measures(prefill)[1][1] == pytest.approx(0.85 / RULE.token_s, rel=1e-5)


def measures(document: dict[str, Any]) -> list[tuple[str, float]]:
    """(metric or query, threshold a worker) of an autoscaler."""
    spec = document["spec"]
    if "triggers" in spec:
        return [(t["metadata"]["query"], float(t["metadata"]["threshold"])) for t in spec["triggers"]]
    pods = [m["pods"] for m in spec["metrics"]]
    return [(p["metric"]["name"], float(p["target"]["averageValue"])) for p in pods]


def test_the_most_sequences_are_those_at_which_the_rule_acts() -> None:
    """Where the batch limits decode, a rule that acts at a load of 1.2 acts at 1.2 batches, the last fifth of it waiting."""
    small = replace(RULE, laws=replace(RULE.laws, max_batch=4, kv_tokens=0), up=1.2)
    at = backlog_thresholds(small, Fleet(3, 5))["decode"]["up_running_requests"]
    assert at == pytest.approx(4.8)
    queues = policy.Queues(decode_running=4)
    assert small.loads(0.0, at, queues, Fleet(1, 1))[1] == pytest.approx(small.up)


def test_dynamos_planner_gets_its_own_names_and_keeps_the_gpus() -> None:
    """Queued tokens and per cent of the KV cache, up above down; without a known cache its own thresholds stay."""
    _, planner = read(export(answer("online") | {"gpus": 16}, "dynamo"))
    limits = backlog_thresholds(RULE, Fleet(3, 5))
    assert (planner["min_gpu_budget"], planner["max_gpu_budget"]) == (16, 16)
    assert (planner["prefill_min_endpoint"], planner["decode_min_endpoint"]) == (1, 1)
    kv = RULE.laws.kv_tokens
    if kv:
        assert planner["optimization_target"] == "load"
        rate = 100 * limits["decode"]["up_running_requests"] * (900 + 250 / 2) / kv
        assert planner["decode_scale_up_kv_rate"] == pytest.approx(min(100, rate), abs=0.01)
    roomy = answer("online")
    roomy["thresholds"] |= {"laws": replace(RULE.laws, kv_tokens=400_000).to_toml()}
    _, planner = read(export(roomy, "dynamo"))
    assert planner["prefill_scale_up_queue_tokens"] == round(limits["prefill"]["up_waiting_tokens"])
    assert planner["prefill_scale_up_queue_tokens"] > planner["prefill_scale_down_queue_tokens"] >= 0
    assert 100 >= planner["decode_scale_up_kv_rate"] > planner["decode_scale_down_kv_rate"] >= 0
    unknown = answer("online")
    unknown["thresholds"] |= {"laws": replace(RULE.laws, kv_tokens=0).to_toml()}
    _, planner = read(export(unknown, "dynamo"))
    assert planner["optimization_target"] == "throughput"
    assert not any("kv_rate" in key or "queue_tokens" in key for key in planner)


def test_rules_alert_above_and_below_the_thresholds() -> None:
    """Four alerts, their numbers the thresholds', each held as long as dwell or cool-down say."""
    (document,) = read(export(answer("online"), "prometheus-rules"))
    rules = document["groups"][0]["rules"]
    assert [r["alert"] for r in rules] == [
        "SteelyardPrefillShort", "SteelyardPrefillIdle", "SteelyardDecodeShort", "SteelyardDecodeIdle",
    ]  # fmt: skip
    limits = backlog_thresholds(RULE, Fleet(3, 5))
    assert rules[0]["expr"].endswith(f"> {limits['prefill']['up_waiting_tokens']:.6g}")
    assert rules[3]["expr"].endswith(f"< {limits['decode']['down_running_requests']:.6g}")
    assert [r["for"] for r in rules[:2]] == ["2s", "8s"]


CHECKED = {
    "kubernetes": ["# HorizontalPodAutoscaler: validated against the schema of Kubernetes 1.37 autoscaling/v2."],
    "dynamo": [
        "# DynamoGraphDeployment: unvalidated, no schema of it was found in a package index.",
        "# PlannerConfig: validated against the schema of NVIDIA Dynamo 1.6.1.",
    ],
    "llm-d": ["# LLMInferenceService: unvalidated, no schema of it was found in a package index."],
    "keda": ["# ScaledObject: validated against the schema of KEDA 2.16.1."],
    "prometheus-rules": ["# rules: validated against the schema of Prometheus Operator 0.80.1."],
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_file_says_what_it_was_checked_with(kind: str) -> None:
    """Comments on top: for each kind of document the schema that it was validated against, or unvalidated."""
    text = export(answer("online"), kind)
    head = [line for line in text.splitlines() if line.startswith("#")]
    assert "recommendation 7" in head[0]
    expected = list(CHECKED[kind])
    if kind == "prometheus-rules" and shutil.which("promtool"):
        expected.append("# rules: checked with promtool check rules.")
    assert head[1 : 1 + len(expected)] == expected
    assert not any("validated" in line for line in head[1 + len(expected) :])
    assert read(text)
    with pytest.raises(InputError, match="must be one of"):
        export(answer("online"), "helm")


def test_what_a_schema_refuses_is_not_written() -> None:
    """A field of another type, a name it does not know, one that is missing: refused with the field's name, for every schema."""
    for kind in ("kubernetes", "dynamo", "keda", "prometheus-rules"):
        document = read(export(answer("online"), kind))[-1]
        assert ": validated" in validated(document)
        for spoil in (_number_as_text, _unknown_name):
            with pytest.raises(InputError, match="refuses it: data"):
                validated(spoil(document))
    document = read(export(answer("online"), "keda"))[0]
    del document["spec"]["scaleTargetRef"]
    with pytest.raises(InputError, match="scaleTargetRef"):
        validated(document)


def _number_as_text(document: dict[str, Any]) -> dict[str, Any]:
    """The first number, or in rules the first text, of another type."""
    found, done = _spoilt(document)
    assert done
    return dict(found)


def _spoilt(value: Any) -> tuple[Any, bool]:
    if isinstance(value, dict):
        for key, held in value.items():
            changed, done = _spoilt(held)
            if done:
                return value | {key: changed}, True
            if key == "interval" or (isinstance(held, int) and not isinstance(held, bool)):
                return value | {key: [held]}, True
    if isinstance(value, list):
        for i, held in enumerate(value):
            changed, done = _spoilt(held)
            if done:
                return [*value[:i], changed, *value[i + 1 :]], True
    return value, False


def _unknown_name(document: dict[str, Any]) -> dict[str, Any]:
    """A name more where the settings are."""
    if "spec" in document:
        return document | {"spec": document["spec"] | {"minReplica": 1}}
    if "groups" in document:
        return {"groups": [document["groups"][0] | {"every": "1s"}]}
    return document | {"max_gpus": 8}
