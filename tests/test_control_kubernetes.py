"""Replicas are patched through the scale subresource on the version that was read; every refusal is one clear line."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from loadgen.client import target
from loadgen.control import Connect, Endpoint, Keeper, LostError, control_of, put
from traces.errors import EndpointError, InputError
from traces.records import Fleet

CONNECT = Connect(lambda url: Endpoint(target(url)), lambda url: Endpoint(target(url)))


class ApiServer:
    """A stand-in of the API server: knows two workloads, checks what a real one checks, logs every request."""

    def __init__(self, group: str = "apis/apps/v1", plural: str = "deployments") -> None:
        self.base = f"/{group}/namespaces/llm/{plural}"
        self.replicas = {"pre": 2, "dec": 1}
        self.version = 100
        self.log: list[tuple[str, str]] = []
        self.conflicts = 0
        self.status = 0
        self.stuck = False
        outer = self

        class Handler(BaseHTTPRequestHandler):
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
                self.answer(status, {"kind": "Status", "status": "Failure", "code": status, "message": "secret detail"})

            def held(self) -> tuple[str, bool] | None:
                name, _, sub = self.path.removeprefix(outer.base + "/").partition("/")
                return (name, sub == "scale") if self.path.startswith(outer.base) and name in outer.replicas else None

            def body(self, name: str, scale: bool) -> dict[str, Any]:
                n = outer.replicas[name]
                return {
                    "kind": "Scale" if scale else "Deployment",
                    "metadata": {"name": name, "resourceVersion": str(outer.version)},
                    "spec": {"replicas": n},
                    "status": {"replicas": n} if scale else {"replicas": n, "readyReplicas": 1 if outer.stuck else n},
                }

            def do_GET(self) -> None:
                outer.log.append(("GET", self.path))
                found = self.held()
                if outer.status or found is None:
                    return self.refuse(outer.status or 404)
                return self.answer(200, self.body(*found))

            def do_PATCH(self) -> None:
                outer.log.append(("PATCH", self.path))
                sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                found = self.held()
                if outer.status or found is None or not found[1]:
                    return self.refuse(outer.status or 404)
                if self.headers["Content-Type"] != "application/merge-patch+json":
                    return self.refuse(415)
                if set(sent) != {"metadata", "spec"} or set(sent["spec"]) != {"replicas"}:
                    return self.refuse(422)
                if outer.conflicts > 0:
                    outer.conflicts -= 1
                    outer.version += 1  # somebody else was faster
                if sent["metadata"]["resourceVersion"] != str(outer.version) or outer.conflicts < 0:
                    return self.refuse(409)
                outer.version += 1
                outer.replicas[found[0]] = sent["spec"]["replicas"]
                return self.answer(200, self.body(*found))

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    made = ApiServer()
    configure(made.url, tmp_path, monkeypatch)
    yield made
    made.server.shutdown()
    made.server.server_close()


def configure(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = {
        "apiVersion": "v1", "kind": "Config", "current-context": "x",
        "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
        "clusters": [{"name": "x", "cluster": {"server": url}}],
        "users": [{"name": "x", "user": {"token": "PLANTED"}}],
    }  # fmt: skip
    (tmp_path / "kubeconfig").write_text(json.dumps(held))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


SPEC = "kubernetes:llm/deployment/pre,deployment/dec"


def made(spec: str = SPEC) -> Any:
    control = control_of(spec, CONNECT)
    assert control is not None
    return control


def test_the_role_that_grows_is_patched_first_and_the_old_counts_come_back(api: ApiServer) -> None:
    control = made()
    assert control.steps(Fleet(1, 2)) == [
        "kubectl -n llm scale deployment/pre --replicas=1 (now 2)",
        "kubectl -n llm scale deployment/dec --replicas=2 (now 1)",
    ]
    assert api.replicas == {"pre": 2, "dec": 1}
    with Keeper(control, "sweep") as keeper:
        keeper.put(Fleet(1, 2))
        assert api.replicas == {"pre": 1, "dec": 2}
    assert api.replicas == {"pre": 2, "dec": 1}
    patched = [path.rsplit("/", 2)[1] for verb, path in api.log if verb == "PATCH"]
    assert patched == ["dec", "pre", "pre", "dec"]
    assert all(path.endswith("/scale") for verb, path in api.log if verb == "PATCH")


def test_a_change_that_another_overtook_is_tried_again(api: ApiServer) -> None:
    api.conflicts = 2
    put(made(), Fleet(2, 2))
    assert api.replicas["dec"] == 2
    assert len([1 for verb, _ in api.log if verb == "PATCH"]) == 3


def test_a_workload_that_somebody_holds_is_given_up(api: ApiServer) -> None:
    api.conflicts = -1
    with pytest.raises(LostError, match="5 attempts to scale dec were overtaken"):
        put(made(), Fleet(2, 2))


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "the token is missing or expired"),
        (403, "needs the verb get on deployments and deployments/scale of 'apps'"),
        (404, "no such workload"),
        (500, "HTTP 500"),
    ],
)
def test_a_refusal_is_one_clear_line_without_secrets(api: ApiServer, status: int, said: str) -> None:
    api.status = status
    with pytest.raises(LostError, match=said) as caught:
        made().get()
    assert "PLANTED" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pods_that_do_not_get_ready_are_told(api: ApiServer) -> None:
    api.stuck = True
    with pytest.raises(EndpointError, match=r"2:3 was not in force within 0\.5 s"):
        put(made(), Fleet(2, 3), 0.5)


@pytest.mark.parametrize(
    ("kind", "group", "plural"),
    [
        ("StatefulSet", "apis/apps/v1", "statefulsets"),
        ("LeaderWorkerSet", "apis/leaderworkerset.x-k8s.io/v1", "leaderworkersets"),
        ("DynamoGraphDeploymentScalingAdapter", "apis/nvidia.com/v1alpha1", "dynamographdeploymentscalingadapters"),
    ],
)
def test_every_kind_is_reached_at_its_own_path(
    kind: str, group: str, plural: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = ApiServer(group, plural)
    configure(api.url, tmp_path, monkeypatch)
    put(made(f"kubernetes:llm/{kind}/pre,{kind}/dec"), Fleet(1, 2))
    assert api.replicas == {"pre": 1, "dec": 2}
    api.server.shutdown()
    api.server.server_close()


@pytest.mark.parametrize(
    "spec", ["kubernetes:", "kubernetes:llm", "kubernetes:llm/pod/a,pod/b", "kubernetes:llm/deployment/a"]
)
def test_a_workload_that_cannot_be_read_is_refused(spec: str) -> None:
    with pytest.raises(InputError, match="KIND/NAME"):
        made(spec)
