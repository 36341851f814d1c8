"""Keep the schemas that exports are checked against, in advisor/schemas: ``python -m tests.keep_schemas``.

Run it where the packages that hold them are installed, an environment of its own::

    pip install kubernetes-validate==1.37.0 cloudcoil-models-keda==2.16.1.0 cloudcoil-models-prometheus-operator==0.80.1.0
    pip install --no-deps ai-dynamo==1.6.1

Each file is one kind of document with what it refers to, and its source and licence on top. Prose, defaults and status are left
out. Names that a schema does not know are errors in it, as in Kubernetes' strict validation: a typing error must not pass.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent.parent / "advisor" / "schemas"
PROSE = {"description", "title", "default", "examples", "format", "$id", "$schema"}


def bare(value: Any, *, names: bool = False) -> Any:
    """Without prose; ``names``: these keys are names of fields, not words of the schema."""
    if isinstance(value, dict):
        return {
            key: bare(held, names=key in ("properties", "$defs"))
            for key, held in value.items()
            if names or not (key in PROSE or key.startswith("x-"))
        }
    return [bare(one) for one in value] if isinstance(value, list) else value


def referred(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, held in value.items():
            if key == "$ref" and isinstance(held, str):
                yield held.rsplit("/", 1)[1]
            else:
                yield from referred(held)
    elif isinstance(value, list):
        for one in value:
            yield from referred(one)


def closed(value: Any) -> Any:
    """References point into the file; objects with named fields take no others."""
    if isinstance(value, dict):
        done = {key: closed(held) for key, held in value.items()}
        if isinstance(done.get("$ref"), str):
            done["$ref"] = "#/$defs/" + done["$ref"].rsplit("/", 1)[1]
        if isinstance(done.get("pattern"), str) and done["pattern"].startswith("^(?i)"):
            done["pattern"] = "(?i)^" + done["pattern"].removeprefix("^(?i)")  # Go takes flags anywhere, Python first
        if isinstance(done.get("properties"), dict):
            done.setdefault("additionalProperties", False)
        return done
    return [closed(one) for one in value] if isinstance(value, list) else value


def keep(name: str, of: str, package: str, schema: dict[str, Any], known: dict[str, Any]) -> None:
    found = bare(schema)
    found.get("properties", {}).pop("status", None)
    held: dict[str, Any] = {}
    wanted = set(referred(found))
    while wanted:
        one = wanted.pop()
        held[one] = bare(known[one])
        wanted |= set(referred(held[one])) - set(held)
    found.pop("$defs", None)
    metadata = importlib.metadata.metadata(package)
    top = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": of,
        "$comment": f"Apache-2.0, from {package} {metadata['Version']} on PyPI by tests/keep_schemas.py: prose left out.",
    }
    HERE.joinpath(f"{name}.json").write_text(
        json.dumps(top | closed(found) | {"$defs": closed(dict(sorted(held.items())))}, indent=1) + "\n"
    )


def pydantic(model: Any) -> dict[str, Any]:
    found: dict[str, Any] = model.model_json_schema(by_alias=True)
    return found


def main() -> int:
    HERE.mkdir(exist_ok=True)
    spec = importlib.util.find_spec("kubernetes_validate")
    assert spec is not None, "kubernetes-validate is not installed"
    assert spec.origin is not None
    (folder,) = Path(spec.origin).parent.glob("kubernetes-json-schema/v1.37.0-local-strict")
    known = json.loads((folder / "_definitions.json").read_text())["$defs"]
    scaler = json.loads((folder / "horizontalpodautoscaler-autoscaling-v2.json").read_text())
    keep("HorizontalPodAutoscaler", "Kubernetes 1.37 autoscaling/v2", "kubernetes-validate", scaler, known)

    schema = pydantic(importlib.import_module("cloudcoil.models.keda.v1alpha1").ScaledObject)
    keep("ScaledObject", "KEDA 2.16.1", "cloudcoil.models.keda", schema, schema["$defs"])

    # A file of rules is what stands under spec of the operator's object.
    schema = pydantic(importlib.import_module("cloudcoil.models.prometheus_operator.v1").PrometheusRule)
    rules = schema["$defs"]["PrometheusRuleSpec"]
    keep("rules", "Prometheus Operator 0.80.1", "cloudcoil.models.prometheus_operator", rules, schema["$defs"])

    # dynamo.planner imports a compiled runtime; its configuration needs none, so it is imported past the package's own __init__.
    dynamo = importlib.util.find_spec("dynamo")
    assert dynamo is not None, "ai-dynamo is not installed"
    assert dynamo.submodule_search_locations is not None
    for package in ("dynamo.planner", "dynamo.planner.plugins", "dynamo.planner.plugins.registry"):
        module = types.ModuleType(package)
        module.__path__ = [str(Path(next(iter(dynamo.submodule_search_locations)), *package.split(".")[1:]))]
        sys.modules[package] = module
    schema = pydantic(importlib.import_module("dynamo.planner.config.planner_config").PlannerConfig)
    keep("PlannerConfig", "NVIDIA Dynamo 1.6.1", "ai-dynamo", schema, schema["$defs"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
