"""Kubernetes: two workloads, one a role, scaled through their scale subresource with the official client (an extra).

Deployment, StatefulSet, LeaderWorkerSet and DynamoGraphDeploymentScalingAdapter all have that subresource; llm-d and KServe
make such workloads. A change is a merge patch that names the resourceVersion it was decided on: when somebody else changed the
workload meanwhile the API server answers 409, and it is read and tried again. In force: as many replicas ready as wanted, and
no more of them than that.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadgen.control import ROLES, Bounds, Connect, LostError, Standing, members
from traces.errors import EndpointError, InputError
from traces.records import Fleet

WORKLOADS = {
    "deployment": ("apps", "v1", "deployments"),
    "statefulset": ("apps", "v1", "statefulsets"),
    "leaderworkerset": ("leaderworkerset.x-k8s.io", "v1", "leaderworkersets"),
    "dynamographdeploymentscalingadapter": ("nvidia.com", "v1alpha1", "dynamographdeploymentscalingadapters"),
}
"""Kind, in lower case -> (API group, version, plural)."""

TRIES = 5
"""How often a change is tried again that another one overtook."""

MERGE = "application/merge-patch+json"


@dataclass(frozen=True, slots=True)
class Workload:
    """What is scaled."""

    kind: str
    name: str

    @classmethod
    def parse(cls, text: str) -> Workload:
        """``deployment/NAME``."""
        kind, slash, name = text.partition("/")
        if kind.lower() not in WORKLOADS or not slash or not name:
            raise InputError(f"a workload must be KIND/NAME with KIND one of {', '.join(WORKLOADS)} (got {text!r}).")
        return cls(kind.lower(), name)


class Kubernetes:
    """See :class:`loadgen.control.Control`. api: the client's CustomObjectsApi, which reaches every group."""

    kind = "kubernetes"

    def __init__(self, api: Any, namespace: str, prefill: Workload, decode: Workload) -> None:
        self._api, self.namespace = api, namespace
        self._of = {"prefill": prefill, "decode": decode}
        self.name = f"kubernetes {namespace}/{prefill.kind}/{prefill.name},{decode.kind}/{decode.name}"
        self.spec = f"kubernetes:{namespace}/{prefill.kind}/{prefill.name},{decode.kind}/{decode.name}"
        self.bounds = Bounds()

    def get(self) -> Standing:
        """See :class:`loadgen.control.Control`."""
        wanted, ready, changing = [], [], 0
        for role in ROLES:
            held = self._call("get", "read", role, self._api.get_namespaced_custom_object)
            status = held.get("status") or {}
            want = int((held.get("spec") or {}).get("replicas", 1))
            # An adapter of Dynamo has no count of ready replicas; what it has is what is there.
            has = int(status.get("readyReplicas") or 0)
            if "readyReplicas" not in status and self._of[role].kind.startswith("dynamo"):
                has = int(status.get("replicas", 0))
            wanted.append(want)
            ready.append(min(has, want))
            changing += abs(want - has) or abs(int(status.get("replicas", has)) - want)
        fleet = Fleet(*ready) if min(ready) else None
        return Standing(fleet, Fleet(*wanted) if min(wanted) else None, changing)

    def steps(self, fleet: Fleet) -> list[str]:
        """See :class:`loadgen.control.Control`."""
        found = []
        for role, count in zip(ROLES, (fleet.prefill, fleet.decode), strict=True):
            now = int(self._scale(role)["spec"].get("replicas", 0))
            if now != count:
                w = self._of[role]
                found.append(f"kubectl -n {self.namespace} scale {w.kind}/{w.name} --replicas={count} (now {now})")
        return found

    def ask(self, fleet: Fleet) -> None:
        """See :class:`loadgen.control.Control`. The role that grows first: no moment with fewer workers than needed."""
        counts = dict(zip(ROLES, (fleet.prefill, fleet.decode), strict=True))
        now = {role: int(self._scale(role)["spec"].get("replicas", 0)) for role in ROLES}
        for role in sorted(ROLES, key=lambda r: now[r] - counts[r]):
            if now[role] != counts[role]:
                self._set(role, counts[role])

    def _scale(self, role: str) -> dict[str, Any]:
        return self._call("get", "read the scale of", role, self._api.get_namespaced_custom_object_scale)

    def _set(self, role: str, count: int) -> None:
        for left in reversed(range(TRIES)):
            held = self._scale(role)
            body = {
                "metadata": {"resourceVersion": held["metadata"]["resourceVersion"]},
                "spec": {"replicas": count},
            }
            try:
                self._call(
                    "patch", "scale", role, self._api.patch_namespaced_custom_object_scale, body, _content_type=MERGE
                )
                return
            except _ConflictError as error:
                if not left:
                    raise LostError(
                        f"{self.name}: {TRIES} attempts to scale {self._of[role].name} were overtaken by other changes (409). "
                        "Does an autoscaler hold it?"
                    ) from error

    def _call(
        self, verb: str, what: str, role: str, call: Callable[..., Any], *body: Any, **more: Any
    ) -> dict[str, Any]:
        """One call of the client, its failures as one line each."""
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        w = self._of[role]
        group, version, plural = WORKLOADS[w.kind]
        where = f"{self.namespace}/{w.kind}/{w.name}"
        try:
            found: dict[str, Any] = call(
                group, version, self.namespace, plural, w.name, *body, _request_timeout=15, **more
            )
            return found
        except ApiException as error:
            if error.status == 409:
                raise _ConflictError(f"{where}: changed meanwhile (409).") from None
            said = {
                401: "the token is missing or expired. Log in again (kubectl auth whoami)",
                403: f"not allowed to {what} it. Its role needs the verb {verb} on {plural} and {plural}/scale of {group!r}",
                404: "there is no such workload, or its kind is not installed in the cluster",
            }.get(error.status, f"HTTP {error.status} {error.reason or ''}".strip())
            raise LostError(f"{where}: {said}.") from None
        except HTTPError as error:
            raise EndpointError(
                f"{where}: the API server does not answer ({type(error).__name__}). Check the context."
            ) from None


class _ConflictError(EndpointError):
    """Somebody else changed the object."""


def _api(context: str) -> Any:
    try:
        from kubernetes import client
        from kubernetes import config as untyped
    except ModuleNotFoundError:
        raise InputError("--control kubernetes needs the client. Run: pip install 'steelyard[kubernetes]'") from None
    config: Any = untyped  # half of the client has types
    file = os.environ.get("KUBECONFIG") or str(Path.home() / ".kube" / "config")
    settings = client.Configuration()  # of its own: the client's global one may be somebody else's
    try:
        if os.environ.get("KUBECONFIG") or Path(file).exists():
            config.load_kube_config(config_file=file, context=context or None, client_configuration=settings)
        else:
            config.load_incluster_config(client_configuration=settings)
    except (config.ConfigException, OSError, TypeError, ValueError) as error:
        raise InputError(
            f"--control kubernetes: no usable configuration ({str(error)[:160]}). Set KUBECONFIG."
        ) from None
    return client.CustomObjectsApi(client.ApiClient(settings))


def from_text(text: str, spec: str, connect: Connect) -> Kubernetes:
    """``kubernetes:NAMESPACE/KIND/NAME,KIND/NAME``, prefill first."""
    namespace, _, rest = text.partition("/")
    parts = rest.split(",")
    if not namespace or len(parts) != 2:
        raise InputError(
            "--control kubernetes:NAMESPACE/KIND/NAME,KIND/NAME names the prefill and the decode workload."
        )
    prefill, decode = (Workload.parse(part) for part in parts)
    return Kubernetes(_api(""), namespace, prefill, decode)


def from_table(table: dict[str, Any], path: str, connect: Connect) -> Kubernetes:
    """``namespace``, ``prefill``, ``decode``, ``context``."""
    held = members(table, path, namespace=(str, ...), prefill=(str, ...), decode=(str, ...), context=(str, ""))
    prefill, decode = Workload.parse(held["prefill"]), Workload.parse(held["decode"])
    made = Kubernetes(_api(held["context"]), held["namespace"], prefill, decode)
    made.spec = path
    return made
