"""Kubernetes: what holds the prefill workers and what holds the decode workers, scaled with the official client (an extra).

Deployment, StatefulSet, LeaderWorkerSet and the adapters of Dynamo and of DisaggregatedSet have a scale subresource. A
DynamoGraphDeployment, a DisaggregatedSet and KServe's LLMInferenceService hold both roles in one object; its replica counts are
patched. llm-d's charts make Deployments or LeaderWorkerSets. A change is a merge patch that names the resourceVersion it was
decided on: when somebody else changed the object meanwhile the API server answers 409, and it is read and tried again.

In force: as many replicas ready as wanted, the controller has seen the change, and no pod is still terminating: one that drains
holds its requests. While a change is on its way this is seen by watches (:class:`Watched`); where the role may
not list and watch, the object is read again and again.
"""

from __future__ import annotations

import copy
import json
import os
import re
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from loadgen.client import unsaid
from loadgen.control import ROLES, Bounds, Connect, LostError, Standing, members
from loadgen.discover import pod_page
from loadgen.stream import printable
from traces.errors import EndpointError, InputError
from traces.records import Fleet


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of object. versions: of its API, the newest first. scaled: it has the scale subresource, else it holds several
    parts. counts: its status tells ready replicas. pod: a replica is a pod. leaders: what its selector lacks for one pod each."""

    group: str
    versions: tuple[str, ...]
    plural: str
    scaled: bool = True
    counts: bool = True
    pod: bool = False
    leaders: str = ""


LEADERS = "leaderworkerset.sigs.k8s.io/worker-index=0"

KINDS = {
    "deployment": Kind("apps", ("v1",), "deployments", pod=True),
    "statefulset": Kind("apps", ("v1",), "statefulsets", pod=True),
    "leaderworkerset": Kind("leaderworkerset.x-k8s.io", ("v1",), "leaderworkersets"),
    "dynamographdeploymentscalingadapter": Kind(
        "nvidia.com", ("v1beta1", "v1alpha1"), "dynamographdeploymentscalingadapters", counts=False
    ),
    "disaggregatedsetrolescaler": Kind(
        "disaggregatedset.x-k8s.io", ("v1",), "disaggregatedsetrolescalers", counts=False, leaders=LEADERS
    ),
    "dynamographdeployment": Kind("nvidia.com", ("v1beta1", "v1alpha1"), "dynamographdeployments", scaled=False),
    "disaggregatedset": Kind("disaggregatedset.x-k8s.io", ("v1",), "disaggregatedsets", scaled=False),
    "llminferenceservice": Kind(
        "serving.kserve.io", ("v1alpha2", "v1alpha1"), "llminferenceservices", scaled=False, counts=False, pod=True
    ),
}
"""Kind, in lower case -> what it is."""

TRIES = 5
"""How often a change is tried again that another one overtook."""

MERGE = "application/merge-patch+json"

ASK_S = 15.0
"""How long the API server may take to answer."""

WATCH_S = 60
"""How long a watch is open before it is asked for again; the server may end it sooner."""

PAUSE_S = (0.05, 5.0)
"""Between two watches: at least this, and up to that while they fail."""

BROKEN = 3
"""A watch that broke so often in a row is not gone on with: what it missed is listed."""

GONE = 410

AGAIN_S = (0.5, 1.0, 2.0, 4.0)
"""Pauses before an API server that cannot answer now (429, 5xx: it is upgraded, its leader changes) is asked again."""

EXPIRED = "the token is missing or expired. Log in again (kubectl auth whoami)"

_WORKLOAD = "app.kubernetes.io/component in (llminferenceservice-workload{0},llminferenceservice-workload-leader{0})"


@dataclass(frozen=True, slots=True)
class Workload:
    """What is scaled. part: of an object that holds several (a service, a role); the prefill or decode one where it is empty."""

    kind: str
    name: str
    part: str = ""

    @classmethod
    def parse(cls, text: str) -> Workload:
        """``deployment/NAME`` or ``dynamographdeployment/NAME/SERVICE``."""
        kind, slash, rest = text.partition("/")
        name, _, part = rest.partition("/")
        known = KINDS.get(kind.lower())
        if known is None or not slash or not name or (part and known.scaled) or "/" in part:
            raise InputError(f"a workload must be KIND/NAME with KIND one of {', '.join(KINDS)} (got {text!r}).")
        return cls(kind.lower(), name, part)

    @property
    def of(self) -> Kind:
        """Its kind."""
        return KINDS[self.kind]

    def __str__(self) -> str:
        return "/".join(filter(None, (self.kind, self.name, self.part)))


def replicas_at(workload: Workload, role: str, held: Mapping[str, Any]) -> tuple[str | int, ...]:
    """Where an object says how many replicas a role is to have. LostError where it has no such part."""
    if workload.of.scaled:
        return ("spec", "replicas")
    spec = held.get("spec") or {}
    if workload.kind == "llminferenceservice":
        part = workload.part or role
        if part == "prefill" and not isinstance(spec.get("prefill"), dict):
            raise LostError(f"{workload}: it has no spec.prefill, so it does not serve in two stages.")
        return ("spec", "prefill", "replicas") if part == "prefill" else ("spec", "replicas")
    if workload.kind == "disaggregatedset":
        names = [r.get("name") for r in spec.get("roles") or ()]
        if (workload.part or role) in names:
            return ("spec", "roles", names.index(workload.part or role), "spec", "replicas")
        raise LostError(f"{workload}: it has no role {workload.part or role!r}. It has {', '.join(map(str, names))}.")
    if isinstance(spec.get("services"), dict):  # v1alpha1
        services = {n: str(s.get("subComponentType") or "") for n, s in spec["services"].items()}
        path: tuple[str | int, ...] = ("spec", "services")
        keys: dict[str, str | int] = {n: n for n in services}
    else:
        listed = spec.get("components") or []
        services = {str(c.get("name")): str(c.get("type") or "") for c in listed}
        path, keys = ("spec", "components"), {str(c.get("name")): n for n, c in enumerate(listed)}
    part = workload.part or next((n for n, kind in services.items() if kind == role), "")
    if part not in keys:
        raise LostError(
            f"{workload}: it has no service {workload.part or f'of type {role}'!r}. It has {', '.join(services)}: name one, "
            f"{workload.kind}/{workload.name}/SERVICE."
        )
    return (*path, keys[part], "replicas")


def at(held: Any, path: Sequence[str | int]) -> Any:
    """The value there, None where there is none."""
    for key in path:
        try:
            held = held[key]
        except (KeyError, IndexError, TypeError):
            return None
    return held


def patched(held: Mapping[str, Any], path: Sequence[str | int], count: int) -> dict[str, Any]:
    """The merge patch that sets a count. A list is replaced as a whole, so what stands beside it goes with it."""
    first, *rest = path
    inner = held.get(first) if isinstance(first, str) else None
    if not rest:
        return {str(first): count}
    if isinstance(inner, list):
        whole: Any = copy.deepcopy(inner)
        spot = at(whole, rest[:-1])
        spot[rest[-1]] = count
        return {str(first): whole}
    return {str(first): patched(inner if isinstance(inner, dict) else {}, rest, count)}


def status_of(workload: Workload, path: Sequence[str | int], held: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of an object's status that tells of a role's replicas."""
    status = held.get("status") or {}
    if workload.of.scaled:
        found: Any = status
    elif workload.kind == "disaggregatedset":
        name = at(held, (*path[:3], "name"))
        found = next((s for s in status.get("roleStatuses") or () if s.get("name") == name), {})
    elif workload.kind == "dynamographdeployment":
        name = path[2] if path[1] == "services" else at(held, (*path[:3], "name"))
        found = (status.get("services") or status.get("components") or {}).get(name)
    else:
        found = {}
    return found if isinstance(found, Mapping) else {}


def selector_of(workload: Workload, path: Sequence[str | int], held: Mapping[str, Any]) -> str:
    """The label selector of a role's pods where no scale subresource tells it."""
    if workload.kind == "llminferenceservice":
        component = _WORKLOAD.format("-prefill" if "prefill" in path else "")
        return f"app.kubernetes.io/name={workload.name},{component}"
    name = path[2] if path[1] == "services" else at(held, (*path[:3], "name"))
    if workload.kind == "disaggregatedset":
        of = "disaggregatedset.x-k8s.io"
        return f"{of}/name={workload.name},{of}/role={name},{LEADERS}"
    return f"nvidia.com/dynamo-graph-deployment-name={workload.name},nvidia.com/dynamo-component={name}"


class Watched:
    """Objects as they are now: listed once, then watched from the version of that list, in a thread of its own.

    call: a list method of the client. A watch that the server ends, or that breaks, goes on from the last version that was seen;
    one whose version is too old by now (410 Gone) begins again with a list, and so does one that broke several times in a row.
    troubled: that list does not come either, so ask directly. lists: how often it was listed.
    """

    def __init__(self, call: Callable[..., Any], *where: str, **select: str) -> None:
        self._call, self._where, self._select = call, where, select
        self._version: str | None = None
        self._objects: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self.troubled = False
        self.lists = 0

    def start(self) -> None:
        """List now, in this thread, so that a refusal is the caller's; then watch."""
        self._list()
        threading.Thread(target=self._main, name="steelyard-watch", daemon=True).start()

    def stop(self) -> None:
        """The thread ends with the watch that is open."""
        self._stop.set()

    @property
    def objects(self) -> list[dict[str, Any]]:
        """Those that are there."""
        with self._lock:
            return list(self._objects.values())

    def told(self, held: dict[str, Any]) -> None:
        """An object as somebody else read it. It counts if the watch lags: its generation counts the changes of its spec."""
        with self._lock:
            if self._generation(held) > 0:
                self._objects[str(at(held, ("metadata", "name")))] = held

    def _heard(self, kind: str, held: dict[str, Any]) -> None:
        """An event. One from before what is known is passed over."""
        with self._lock:
            if kind == "DELETED":
                self._objects.pop(str(at(held, ("metadata", "name"))), None)
            elif self._generation(held) >= 0:
                self._objects[str(at(held, ("metadata", "name")))] = held

    def _generation(self, held: dict[str, Any]) -> int:
        """How many changes an object is ahead of what is known of it."""
        known = self._objects.get(str(at(held, ("metadata", "name"))))
        return int((at(held, ("metadata", "generation")) or 0) - (at(known, ("metadata", "generation")) or 0))

    def _list(self) -> None:
        reply = self._call(*self._where, **self._select, _preload_content=False, _request_timeout=ASK_S)
        held = json.loads(reply.data)
        with self._lock:
            self._objects = {str(one["metadata"]["name"]): one for one in held.get("items") or ()}
        self._version = held["metadata"]["resourceVersion"]
        self.troubled = False
        self.lists += 1

    def _main(self) -> None:
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        pause, broken = PAUSE_S[0], 0
        while not self._stop.wait(pause):
            pause, began = min(2 * pause, PAUSE_S[1]), time.monotonic()
            try:
                if self._version is None:
                    self._list()
                if self._watch() or time.monotonic() - began > 1:
                    pause, broken = PAUSE_S[0], 0
            except (ApiException, HTTPError, OSError, ValueError, KeyError) as error:
                self.troubled = self._version is None
                broken += 1
                if isinstance(error, ApiException) or broken >= BROKEN:
                    self._version = None
                if getattr(error, "status", 0) == GONE:
                    pause = PAUSE_S[0]

    def _watch(self) -> bool:
        """One watch until it ends; was anything heard?"""
        from kubernetes import watch as untyped

        watch: Any = untyped
        heard = False
        more = {"allow_watch_bookmarks": True, "_request_timeout": (ASK_S, WATCH_S + ASK_S)}
        for event in watch.Watch().stream(
            self._call, *self._where, **self._select, resource_version=self._version, timeout_seconds=WATCH_S, **more
        ):
            heard, held = True, event["raw_object"]
            self._version = held["metadata"]["resourceVersion"]
            if event["type"] != "BOOKMARK":
                self._heard(event["type"], held)
            if self._stop.is_set():
                break
        return heard


def _stop(*watched: Mapping[Any, Watched]) -> None:
    for held in watched:
        for one in held.values():
            one.stop()


class Kubernetes:
    """See :class:`loadgen.control.Control`. api: the client's CustomObjectsApi, which reaches every group; pods: its CoreV1Api;
    context: of the kubeconfig, "" for the pod's own account. cluster: the one that is changed, in words.

    note: what the role may not see, and what that means; "".
    """

    kind = "kubernetes"

    def __init__(self, api: Any, pods: Any, context: str, namespace: str, prefill: Workload, decode: Workload) -> None:
        self._api, self._core, self.namespace = api, pods, namespace
        self._of = {"prefill": prefill, "decode": decode}
        self._versions: dict[str, str] = {}
        self._selectors: dict[str, str] = {}
        self._objects: dict[tuple[str, str], Watched] = {}
        self._pods: dict[str, Watched] = {}
        weakref.finalize(self, _stop, self._objects, self._pods)  # a change that was given up leaves its watches
        self._blind = False
        self.note = ""
        self.spec = f"kubernetes:{namespace}/{prefill}" + (f",{decode}" if decode != prefill else "")
        self.name = self.spec.replace(":", " ", 1) + (f" ({context})" if context else "")
        server = unsaid(str(api.api_client.configuration.host))
        self.cluster = f"context {context} ({server})" if context else f"a pod's own cluster ({server})"
        self.bounds = Bounds()

    # --- what is

    def get(self) -> Standing:
        """See :class:`loadgen.control.Control`."""
        found = self._standing()
        if not found.changing and (self._objects or self._pods):
            # One watch may be ahead of another: what they say together is read once more before it counts.
            self._unwatch()
            found = self._standing()
            if found.changing:
                self._watch()
        return found

    def _standing(self) -> Standing:
        wanted, ready, changing = [], [], 0
        serving: dict[str, tuple[str, ...]] = {}
        pages: dict[str, str] = {}
        for role in ROLES:
            workload, held = self._of[role], self._object(role)
            path = replicas_at(workload, role, held)
            status = status_of(workload, path, held)
            want = _count(held, path)
            pods = self._pods_of(role, path, held)
            live = None if pods is None else [p for p in pods if not at(p, ("metadata", "deletionTimestamp"))]
            up = None if live is None else sorted(str(p["metadata"]["name"]) for p in live if _is_ready(p))
            told = status.get("availableReplicas", status.get("readyReplicas", 0 if workload.of.counts else None))
            if told is None and self._blind:
                raise LostError(
                    f"{self.namespace}/{workload}: its status counts no ready replicas and its pods may not be listed, so which "
                    "fleet is in force cannot be seen. Its role needs the verbs list and watch on pods."
                )
            if told is None:  # its status does not count ready ones: what is there, as far as its pods are ready
                there = status.get("replicas")
                has = min(len(pods or ()) if there is None else int(there), len(up) if up is not None else 1_000_000)
            else:
                has = min(int(told), len(up)) if up is not None and workload.of.pod else int(told)
            leaving = int(status.get("terminatingReplicas") or 0)
            if pods is not None and live is not None:
                leaving = len(pods) - len(live)
            generation, observed = at(held, ("metadata", "generation")), at(held, ("status", "observedGeneration"))
            wanted.append(want)
            ready.append(min(has, want))
            changing += abs(want - has) or (abs(int(status.get("replicas") or has) - want) if workload.of.counts else 0)
            changing += leaving + (generation is not None and observed is not None and int(observed) < int(generation))
            if up is not None:
                serving[role] = tuple(up)
                named = ((str(p["metadata"]["name"]), pod_page(p)) for p in live or ())
                pages |= {name: page for name, page in named if name in up and page}
        fleet = Fleet(*ready) if min(ready) else None
        return Standing(fleet, Fleet(*wanted) if min(wanted) else None, changing, serving, pages=pages)

    def _object(self, role: str) -> dict[str, Any]:
        """What is scaled, as it is now: by its watch while there is one, otherwise read."""
        workload = self._of[role]
        known = self._objects.get((workload.kind, workload.name))
        if known is None or known.troubled:
            return self._call("get", "read", role, self._api.get_namespaced_custom_object)
        if not known.objects:
            raise LostError(f"{self.namespace}/{workload}: it was deleted while its fleet changed.")
        return known.objects[0]

    def _pods_of(self, role: str, path: Sequence[str | int], held: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        """A role's pods; None where they are not known, or may not be listed."""
        workload = self._of[role]
        if role not in self._selectors:
            self._selectors[role] = (
                ",".join(filter(None, (str(at(self._scale(role), ("status", "selector")) or ""), workload.of.leaders)))
                if workload.of.scaled
                else selector_of(workload, path, held)
            )
        selector = self._selectors[role]
        if not selector or self._blind:
            return None
        known = self._pods.get(role)
        if known is not None and not known.troubled:
            return known.objects
        found = self._allowed(
            lambda: self._core.list_namespaced_pod(
                self.namespace, label_selector=selector, _preload_content=False, _request_timeout=ASK_S
            )
        )
        return None if found is None else list(json.loads(found.data).get("items") or ())

    def _allowed(self, call: Callable[[], Any]) -> Any:
        """The answer about pods; None, from now on, where the role may not have it."""
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        try:
            return _patient(call)
        except ApiException as error:
            if error.status == 403:
                self._blind = True
                self.note = (
                    f"{self.name}: its pods may not be listed, so a change counts as in force while old pods still drain. "
                    "Its role needs the verbs list and watch on pods."
                )
                return None
            said = EXPIRED if error.status == 401 else f"HTTP {error.status}"
            kind = EndpointError if _passes(error) else LostError
            raise kind(f"{self.namespace}: its pods cannot be listed: {said}.") from None
        except HTTPError as error:
            raise EndpointError(f"{self.namespace}: the API server does not answer ({type(error).__name__}).") from None

    # --- watches

    def _watch(self) -> None:
        """Watch what is scaled and its pods, as far as the role may; what may not be watched is read again and again."""
        for role in ROLES:
            workload = self._of[role]
            key = workload.kind, workload.name
            if key not in self._objects:
                version = self._versions.get(workload.kind, workload.of.versions[0])
                made = Watched(
                    self._api.list_namespaced_custom_object, workload.of.group, version, self.namespace, workload.of.plural,
                    field_selector=f"metadata.name={workload.name}",
                )  # fmt: skip
                if self._begun(made):
                    self._objects[key] = made
            selector = self._selectors.get(role)
            if selector and role not in self._pods and not self._blind:
                made = Watched(self._core.list_namespaced_pod, self.namespace, label_selector=selector)
                if self._begun(made):
                    self._pods[role] = made

    @staticmethod
    def _begun(watched: Watched) -> bool:
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        try:
            watched.start()
        except (ApiException, HTTPError, KeyError, ValueError):
            return False
        return True

    def _unwatch(self) -> None:
        _stop(self._objects, self._pods)
        self._objects.clear()
        self._pods.clear()

    # --- what to do

    def steps(self, fleet: Fleet) -> list[str]:
        """See :class:`loadgen.control.Control`."""
        found = []
        for role, count in zip(ROLES, (fleet.prefill, fleet.decode), strict=True):
            workload, held = self._of[role], self._read(role)
            path = replicas_at(workload, role, held)
            now = _count(held, path)
            if now != count and workload.of.scaled:
                found.append(f"kubectl -n {self.namespace} scale {workload} --replicas={count} (now {now})")
            elif now != count:
                shown = ".".join(str(at(held, (*path[:3], "name"))) if type(key) is int else str(key) for key in path)
                found.append(
                    f"kubectl -n {self.namespace} patch {workload.kind}/{workload.name}: {shown} = {count} (now {now})"
                )
        return found

    def ask(self, fleet: Fleet) -> None:
        """See :class:`loadgen.control.Control`. The role that grows first: no moment with fewer workers than needed.

        Half a change is taken back: who asks again and again would get one worker more each time.
        """
        counts = dict(zip(ROLES, (fleet.prefill, fleet.decode), strict=True))
        now = {}
        for role in ROLES:
            held = self._read(role)
            path = replicas_at(self._of[role], role, held)
            now[role] = _count(held, path)
            self._pods_of(role, path, held)  # finds the selector, and whether pods may be listed
        self._watch()
        moved: list[str] = []
        for role in sorted(ROLES, key=lambda r: now[r] - counts[r]):
            if now[role] == counts[role]:
                continue
            try:
                self._set(role, counts[role])
            except EndpointError as error:
                left = [one for one in moved if not self._taken_back(one, now[one])]
                if left:
                    raise LostError(f"{error} {left[0]} could not be set back to {now[left[0]]}.") from None
                raise
            moved.append(role)

    def _taken_back(self, role: str, count: int) -> bool:
        try:
            self._set(role, count)
        except EndpointError:
            return False
        return True

    def _read(self, role: str) -> dict[str, Any]:
        """What holds the count to set: the scale, or the object itself."""
        if self._of[role].of.scaled:
            return self._scale(role)
        return self._call("get", "read", role, self._api.get_namespaced_custom_object)

    def _scale(self, role: str) -> dict[str, Any]:
        return self._call("get", "read the scale of", role, self._api.get_namespaced_custom_object_scale)

    def _set(self, role: str, count: int) -> None:
        workload = self._of[role]
        patch = (
            self._api.patch_namespaced_custom_object_scale
            if workload.of.scaled
            else self._api.patch_namespaced_custom_object
        )
        for left in reversed(range(TRIES)):
            held = self._read(role)
            body = patched(held, replicas_at(workload, role, held), count)
            body["metadata"] = {"resourceVersion": held["metadata"]["resourceVersion"]}
            try:
                self._call("patch", "scale", role, patch, body, _content_type=MERGE)
                break
            except _ConflictError as error:
                if not left:
                    raise LostError(
                        f"{self.name}: {TRIES} attempts to scale {workload.name} were overtaken by other changes (409). "
                        "Does an autoscaler hold it?"
                    ) from error
        watched = self._objects.get((workload.kind, workload.name))
        if watched is not None:  # the watch may lag: what was asked for is known at once
            try:
                watched.told(self._call("get", "read", role, self._api.get_namespaced_custom_object))
            except EndpointError:  # the change is made all the same
                self._unwatch()

    def _call(
        self, verb: str, what: str, role: str, call: Callable[..., Any], *body: Any, **more: Any
    ) -> dict[str, Any]:
        """One call of the client, its failures as one line each. A version that is not served gives way to an older."""
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        w = self._of[role]
        where = f"{self.namespace}/{w}"
        known = self._versions.get(w.kind)
        versions = [known] if known else list(w.of.versions)
        for version in versions:
            try:
                asks = partial(call, w.of.group, version, self.namespace, w.of.plural, w.name, *body, **more)
                found: dict[str, Any] = _patient(partial(asks, _request_timeout=ASK_S))
                self._versions[w.kind] = version
                return found
            except ApiException as error:
                if error.status == 404 and version != versions[-1]:
                    continue
                if error.status == 409:
                    raise _ConflictError(f"{where}: changed meanwhile (409).") from None
                scale = f" and {w.of.plural}/scale" if w.of.scaled else ""
                why = _message(error)
                http = f"HTTP {error.status} {error.reason or ''}".strip()
                # RBAC says "cannot patch resource"; other refusals are admission's.
                if error.status == 403 and (not why or re.search(r"cannot \w+ resource", why)):
                    said = f"not allowed to {what} it. Its role needs the verb {verb} on {w.of.plural}{scale} of {w.of.group!r}"
                elif error.status in (401, 404):
                    gone = "there is no such workload, or its kind is not installed in the cluster"
                    said = EXPIRED if error.status == 401 else gone
                elif _passes(error):
                    raise EndpointError(f"{where}: {http}, asked {len(AGAIN_S) + 1} times.") from None
                else:
                    said = f"refused to {what} it ({http}): {why or 'no reason is given'}"
                raise LostError(f"{where}: {said.rstrip('.')}.") from None
            except HTTPError as error:
                raise EndpointError(
                    f"{where}: the API server does not answer ({type(error).__name__}). Check the context."
                ) from None
        raise LostError(f"{where}: its kind has no version.")


def _passes(error: Any) -> bool:
    """Is this an answer for now only?"""
    return bool(error.status == 429 or (error.status or 0) >= 500)


def _patient(call: Callable[[], Any]) -> Any:
    """The answer, after some pauses where the server cannot give it now."""
    from kubernetes.client.exceptions import ApiException

    for pause in AGAIN_S:
        try:
            return call()
        except ApiException as error:
            if not _passes(error):
                raise
        time.sleep(pause)
    return call()


def _message(error: Any) -> str:
    """Why the API server, or a webhook of the cluster, refused something."""
    try:
        said = json.loads(error.body)["message"]
    except (TypeError, ValueError, KeyError):
        return ""
    return printable(str(said)[:200])


def _count(held: Mapping[str, Any], path: Sequence[str | int]) -> int:
    """Replicas wanted. An object that does not say wants one; a Scale leaves out a 0."""
    count = at(held, path)
    return int(count) if count is not None else 0 if held.get("kind") == "Scale" else 1


def _is_ready(pod: Mapping[str, Any]) -> bool:
    conditions = at(pod, ("status", "conditions")) or ()
    return any(c.get("type") == "Ready" and c.get("status") == "True" for c in conditions)


class _ConflictError(EndpointError):
    """Somebody else changed the object."""


def _api(context: str) -> tuple[Any, Any, str]:
    """(the client's API for any group's objects, the one for pods, the context that is used)."""
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
            context = context or str(config.list_kube_config_contexts(config_file=file)[1]["name"])
        else:
            config.load_incluster_config(client_configuration=settings)
            context = ""
    except Exception as error:  # its own, of the files, and of the parser of YAML that it uses
        words = " ".join(str(error).split())[:160]
        raise InputError(f"--control kubernetes: no usable configuration ({words}). Set KUBECONFIG.") from None
    made = client.ApiClient(settings)
    return client.CustomObjectsApi(made), client.CoreV1Api(made), context


def _both(words: Sequence[str], where: str) -> tuple[Workload, Workload]:
    """The prefill and the decode workload; one that holds both roles may be named once."""
    found = [Workload.parse(word) for word in words]
    if len(found) == 1 and not found[0].of.scaled and not found[0].part:
        return found[0], found[0]
    if len(found) != 2 or found[0] == found[1]:
        raise InputError(f"{where} names the prefill and the decode workload, KIND/NAME,KIND/NAME, prefill first.")
    return found[0], found[1]


def from_text(text: str, spec: str, connect: Connect) -> Kubernetes:
    """``kubernetes:NAMESPACE/KIND/NAME,KIND/NAME``, prefill first; or one KIND/NAME that holds both."""
    namespace, _, rest = text.partition("/")
    where = "--control kubernetes:NAMESPACE/KIND/NAME,KIND/NAME"
    if not namespace or not rest:
        raise InputError(f"{where} names the prefill and the decode workload.")
    workloads = _both(rest.split(","), where)
    return Kubernetes(*_api(""), namespace, *workloads)


def from_table(table: dict[str, Any], path: str, connect: Connect) -> Kubernetes:
    """``namespace``, ``prefill``, ``decode`` (or ``both``), ``context``."""
    held = members(
        table, path, namespace=(str, ...), prefill=(str, ""), decode=(str, ""), both=(str, ""), context=(str, "")
    )
    words = [held["both"]] if held["both"] else [held["prefill"], held["decode"]]
    workloads = _both(words, path)
    made = Kubernetes(*_api(held["context"]), held["namespace"], *workloads)
    made.spec = path
    return made
