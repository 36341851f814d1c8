"""A stand-in of Kubernetes' API server for what steelyard asks of it: it checks the wire contract and keeps a history to watch.

Objects have resourceVersion and generation; controllers of its own follow a change of replicas with pods that start and drain and
with status. A question that a real server would refuse is refused here, and noted in ``wrong`` where a client should not ask it.
"""

from __future__ import annotations

import copy
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

MERGE = "application/merge-patch+json"
SCALED = ("deployments", "statefulsets", "leaderworkersets", "dynamographdeploymentscalingadapters")
LISTS = {"fieldSelector", "labelSelector", "resourceVersion", "timeoutSeconds", "allowWatchBookmarks", "watch"}


def merged(held: Any, patch: Any) -> Any:
    """RFC 7386: a list is replaced as a whole, null removes."""
    if not isinstance(patch, dict):
        return patch
    found = dict(held) if isinstance(held, dict) else {}
    for key, value in patch.items():
        if value is None:
            found.pop(key, None)
        else:
            found[key] = merged(found.get(key), value)
    return found


def matches(labels: dict[str, str], selector: str) -> bool:
    """Of a label selector: ``a=b`` and ``a in (b,c)``."""
    rest = selector
    while rest:
        key, _, after = rest.partition(" in (")
        if after and "=" not in key and "," not in key:
            options, _, rest = after.partition(")")
            if labels.get(key) not in options.split(","):
                return False
            rest = rest.removeprefix(",")
            continue
        one, _, rest = rest.partition(",")
        key, _, value = one.partition("=")
        if labels.get(key) != value:
            return False
    return True


class ApiServer:
    """objects: plural -> name -> object. start_s, drain_s: how long a pod takes. deny: (verb, plural) that RBAC refuses.

    status: of every answer, 0 for what is right. conflicts: patches that another change overtakes; below 0: all. stuck: new pods
    do not get ready. admission: why a webhook refuses every change. cut, hold_s: a watch ends after so many events or seconds.
    gone: how a version that is too old is told, by "http" or an "event".
    """

    def __init__(self, **groups: str) -> None:
        self.groups = {"deployments": "apps/v1", **groups}
        self.objects: dict[str, dict[str, dict[str, Any]]] = {"pods": {}}
        self.version = 100
        self.oldest = 0
        self.history: list[tuple[int, str, str, dict[str, Any]]] = []
        self.log: list[tuple[str, str]] = []
        self.watches: list[tuple[str, str]] = []
        self.wrong: list[str] = []
        self.deny: set[tuple[str, str]] = set()
        self.status = 0
        self.admission = ""
        self.conflicts = 0
        self.stuck = False
        self.start_s = self.drain_s = 0.05
        self.cut = 1_000_000
        self.hold_s = 60.0
        self.gone = "event"
        self.changed = threading.Condition()
        self.closing = False
        self.roles: list[tuple[str, str, Callable[[dict[str, Any]], int], Callable[..., Any], dict[str, str]]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *_: Any) -> None:
                pass

            def answer(self, status: int, held: Any) -> None:
                body = json.dumps(held).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def refuse(self, status: int) -> None:
                self.answer(status, failure(status))

            def where(self) -> tuple[str, str, str, dict[str, str]] | None:
                """(plural, name, subresource, query) of a path that is served."""
                url = urlsplit(self.path)
                query = {k: v[-1] for k, v in parse_qs(url.query).items()}
                for plural, group in {**outer.groups, "pods": ""}.items():
                    base = f"/apis/{group}/namespaces/llm/{plural}" if group else "/api/v1/namespaces/llm/pods"
                    if url.path == base or url.path.startswith(f"{base}/"):
                        name, _, sub = url.path[len(base) + 1 :].partition("/")
                        return plural, name, sub, query
                return None

            def do_GET(self) -> None:
                outer.log.append(("GET", self.path))
                found = self.where()
                if outer.status or found is None:
                    return self.refuse(outer.status or 404)
                plural, name, sub, query = found
                verb = "get" if name else "watch" if query.get("watch") else "list"
                if (verb, plural) in outer.deny:
                    return self.refuse(403)
                if name:
                    with outer.changed:
                        held = copy.deepcopy(outer.objects.get(plural, {}).get(name))
                    if held is None or (sub and (sub != "scale" or plural not in SCALED)):
                        return self.refuse(404)
                    return self.answer(200, outer.scale(plural, held) if sub else held)
                if set(query) - LISTS:
                    outer.wrong.append(f"{self.path}: a parameter that lists do not take")
                return self.stream(plural, query) if verb == "watch" else self.list(plural, query)

            def list(self, plural: str, query: dict[str, str]) -> None:
                with outer.changed:
                    items = [copy.deepcopy(o) for o in outer.objects.get(plural, {}).values() if chosen(o, query)]
                    version = str(outer.version)
                self.answer(200, {"kind": "List", "metadata": {"resourceVersion": version}, "items": items})

            def stream(self, plural: str, query: dict[str, str]) -> None:
                since = int(query.get("resourceVersion") or -1)
                if since < 0:
                    outer.wrong.append(f"{self.path}: a watch without the version of a list")
                outer.watches.append((plural, str(since)))
                if since < outer.oldest and outer.gone == "http":
                    return self.refuse(410)
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                until = time.monotonic() + min(float(query.get("timeoutSeconds") or 60), outer.hold_s)
                sent = 0
                try:
                    if since < outer.oldest:
                        self.event("ERROR", failure(410))
                    while since >= outer.oldest and sent < outer.cut and not outer.closing:
                        with outer.changed:
                            outer.newer(since, until)
                            news = [h for h in outer.history if h[0] > since and h[1] == plural]
                            since = outer.version
                        for _, _, kind, held in news:
                            if chosen(held, query) and sent < outer.cut:
                                self.event(kind, held)
                                sent += 1
                                since = int(held["metadata"]["resourceVersion"])
                        if time.monotonic() >= until:
                            break
                    self.wfile.write(b"0\r\n\r\n")
                except OSError:
                    self.close_connection = True
                return None

            def event(self, kind: str, held: Any) -> None:
                line = json.dumps({"type": kind, "object": held}).encode() + b"\n"
                self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
                self.wfile.flush()

            def do_PATCH(self) -> None:
                outer.log.append(("PATCH", self.path))
                sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                found = self.where()
                if outer.status or found is None:
                    return self.refuse(outer.status or 404)
                plural, name, sub, _ = found
                if ("patch", plural) in outer.deny:
                    return self.refuse(403)
                if outer.admission:
                    return self.answer(403, failure(403) | {"message": outer.admission})
                if self.headers["Content-Type"] != MERGE:
                    return self.refuse(415)
                with outer.changed:
                    held = outer.objects.get(plural, {}).get(name)
                    if held is None or (sub == "scale") != (plural in SCALED):
                        return self.refuse(404)
                    if outer.conflicts > 0:
                        outer.conflicts -= 1
                        outer.store(plural, held)  # somebody else was faster
                        held = outer.objects[plural][name]
                    if (
                        sent["metadata"] != {"resourceVersion": held["metadata"]["resourceVersion"]}
                        or outer.conflicts < 0
                    ):
                        return self.refuse(409)
                    if sub and (set(sent) != {"metadata", "spec"} or set(sent["spec"]) != {"replicas"}):
                        return self.refuse(422)
                    new = merged(held, {"spec": sent["spec"]})
                    if without_counts(new["spec"]) != without_counts(held["spec"]):
                        outer.wrong.append(f"{self.path}: changes more than replicas: {sent}")
                    new["metadata"]["generation"] += 1
                    outer.store(plural, new)
                    return self.answer(200, outer.scale(plural, new) if sub else new)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        threading.Thread(target=self.control, daemon=True).start()

    def newer(self, since: int, until: float) -> None:
        """Wait for a version after this one, or for the time."""
        self.changed.wait_for(lambda: self.closing or self.version > since, max(0.0, until - time.monotonic()))

    def close(self) -> None:
        with self.changed:
            self.closing = True
            self.changed.notify_all()
        self.server.shutdown()
        self.server.server_close()

    # --- what is kept

    def store(self, plural: str, held: dict[str, Any], kind: str = "MODIFIED") -> None:
        """A new version of an object, told to those who watch."""
        with self.changed:
            self.version += 1
            held = copy.deepcopy(held)
            held["metadata"]["resourceVersion"] = str(self.version)
            held["metadata"].setdefault("generation", 1)
            names = self.objects.setdefault(plural, {})
            if kind == "DELETED":
                names.pop(held["metadata"]["name"], None)
            else:
                names[held["metadata"]["name"]] = held
            self.history.append((self.version, plural, kind, held))
            self.changed.notify_all()

    def forget(self) -> None:
        """The history so far is compacted: whoever watches from before has to list again."""
        with self.changed:
            self.version += 1
            self.oldest, self.history = self.version, []

    def scale(self, plural: str, held: dict[str, Any]) -> dict[str, Any]:
        name = held["metadata"]["name"]
        meta = {"name": name, "resourceVersion": held["metadata"]["resourceVersion"]}
        spec = {k: v for k, v in held["spec"].items() if k == "replicas"}
        status = {"replicas": held.get("status", {}).get("replicas", 0), "selector": f"app={name}"}
        return {"kind": "Scale", "metadata": meta, "spec": spec, "status": status}

    # --- its controllers

    def holds(
        self,
        plural: str,
        held: dict[str, Any],
        *roles: tuple[Callable[[Any], int], Callable[[dict[str, Any], dict[str, int]], Any], dict[str, str]],
    ) -> None:
        """An object, and what its controllers do: (replicas wanted, put the status in, labels of the pods), a role each."""
        with self.changed:  # or its thread settles what is half there
            self.store(plural, held, "ADDED")
            for wanted, tell, labels in roles:
                self.roles.append((plural, held["metadata"]["name"], wanted, tell, labels))
                for _ in range(wanted(held)):
                    self.pod(labels, ready=True)
            self.settle()

    def workload(self, name: str, replicas: int, plural: str = "deployments") -> None:
        """A Deployment or another with one count."""

        def tell(held: dict[str, Any], counts: dict[str, int]) -> None:
            held["status"] = counts | {"observedGeneration": held["metadata"]["generation"]}
            if not counts["readyReplicas"]:
                del held["status"]["readyReplicas"]  # as Go leaves out a 0

        held = {"kind": "X", "metadata": {"name": name}, "spec": {"replicas": replicas, "template": {"x": 1}}}
        self.holds(plural, held, (lambda o: int(o["spec"]["replicas"]), tell, {"app": name}))

    def pod(self, labels: dict[str, str], *, ready: bool) -> None:
        self.store(
            "pods",
            {
                "metadata": {"name": f"pod-{self.version}", "labels": labels},
                "at": time.monotonic(),
                "spec": {"containers": [{"name": "engine", "ports": [{"name": "metrics", "containerPort": 8200}]}]},
                "status": {
                    "phase": "Running",
                    "podIP": f"10.0.0.{self.version}",
                    "conditions": [{"type": "Ready", "status": str(ready)}],
                },
            },
            "ADDED",
        )

    def control(self) -> None:
        while not self.closing:
            time.sleep(0.01)
            self.settle()

    def settle(self) -> None:
        """One round: pods start, drain and go; status follows."""
        with self.changed:
            now = time.monotonic()
            for plural, name, wanted, tell, labels in self.roles:
                pods = [p for p in self.objects["pods"].values() if p["metadata"]["labels"] == labels]
                alive = [p for p in pods if "deletionTimestamp" not in p["metadata"]]
                held = self.objects[plural][name]
                for pod in [p for p in pods if p not in alive and now - p["at"] >= self.drain_s]:
                    self.store("pods", pod, "DELETED")
                for pod in alive[wanted(held) :]:
                    meta = pod["metadata"] | {"deletionTimestamp": "2026-01-01T00:00:00Z"}
                    self.store("pods", pod | {"metadata": meta, "at": now})
                for _ in range(wanted(held) - len(alive)):
                    self.pod(labels, ready=False)
                for pod in alive[: wanted(held)]:
                    waits = pod["status"]["conditions"][0]["status"] == "False" and not self.stuck
                    if waits and now - pod["at"] >= self.start_s:
                        condition = {"type": "Ready", "status": "True"}
                        self.store("pods", pod | {"status": pod["status"] | {"conditions": [condition]}})
                pods = [
                    p for p in self.objects["pods"].values()
                    if p["metadata"]["labels"] == labels and "deletionTimestamp" not in p["metadata"]
                ]  # fmt: skip
                ready = sum(p["status"]["conditions"][0]["status"] == "True" for p in pods)
                new = copy.deepcopy(held)
                tell(new, {"replicas": len(pods), "readyReplicas": ready})
                if new != held:
                    self.store(plural, new)


def chosen(held: dict[str, Any], query: dict[str, str]) -> bool:
    meta = held["metadata"]
    field = query.get("fieldSelector", "").removeprefix("metadata.name=")
    return (not field or meta["name"] == field) and matches(meta.get("labels", {}), query.get("labelSelector", ""))


def without_counts(spec: Any) -> Any:
    if isinstance(spec, dict):
        return {k: without_counts(v) for k, v in spec.items() if k != "replicas"}
    return [without_counts(v) for v in spec] if isinstance(spec, list) else spec


def failure(status: int) -> dict[str, Any]:
    held = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": status}
    words = 'deployments.apps "secret" is forbidden: User "x" cannot patch resource "deployments"'  # as RBAC says it
    return held | {
        "reason": "Expired" if status == 410 else "X",
        "message": words if status == 403 else "secret detail",
    }
