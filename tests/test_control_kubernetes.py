"""Replicas are patched on the version that was read; in force is seen by watches that survive; a refusal is one clear line."""

from __future__ import annotations

import gc
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from advisor.cli import main
from loadgen.client import target
from loadgen.control import Connect, Endpoint, Keeper, LostError, Standing, control_of, has_grown, kubernetes, put
from loadgen.control.kubernetes import Watched
from tests.kubernetes_api import ApiServer
from traces.errors import EndpointError, InputError
from traces.records import Fleet

CONNECT = Connect(lambda url: Endpoint(target(url)), lambda url: Endpoint(target(url)))
SPEC = "kubernetes:llm/deployment/pre,deployment/dec"


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ApiServer]]:
    """An API server, and a kubeconfig that points to it."""
    made: list[ApiServer] = []

    def one(**groups: str) -> ApiServer:
        api = ApiServer(**groups)
        made.append(api)
        held = {
            "apiVersion": "v1", "kind": "Config", "current-context": "x",
            "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
            "clusters": [{"name": "x", "cluster": {"server": api.url}}],
            "users": [{"name": "x", "user": {"token": "PLANTED"}}],
        }  # fmt: skip
        (tmp_path / "kubeconfig").write_text(json.dumps(held))
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        return api

    yield one
    for api in made:
        api.close()
        assert api.wrong == []


@pytest.fixture
def api(serve: Callable[..., ApiServer]) -> ApiServer:
    """Two prefill and one decode pod, of Deployments."""
    made = serve()
    made.workload("pre", 2)
    made.workload("dec", 1)
    return made


@pytest.mark.parametrize("text", ["a: [", "a: &b *c", "- 1"])
def test_a_configuration_that_cannot_be_read_is_one_clear_line(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kubeconfig").write_text(text)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    with pytest.raises(InputError, match="no usable configuration") as caught:
        made().get()
    assert "\n" not in str(caught.value)


def made(spec: str = SPEC) -> Any:
    control = control_of(spec, CONNECT)
    assert control is not None
    return control


def counts(api: ApiServer, plural: str = "deployments") -> dict[str, int]:
    return {name: held["spec"]["replicas"] for name, held in api.objects[plural].items()}


def test_the_role_that_grows_is_patched_first_and_the_old_counts_come_back(api: ApiServer) -> None:
    control = made()
    assert control.steps(Fleet(1, 2)) == [
        "kubectl -n llm scale deployment/pre --replicas=1 (now 2)",
        "kubectl -n llm scale deployment/dec --replicas=2 (now 1)",
    ]
    assert counts(api) == {"pre": 2, "dec": 1}
    with Keeper(control, "sweep", timeout_s=10) as keeper:
        keeper.put(Fleet(1, 2))
        assert counts(api) == {"pre": 1, "dec": 2}
    assert counts(api) == {"pre": 2, "dec": 1}
    patches = [path for verb, path in api.log if verb == "PATCH"]
    assert [path.rsplit("/", 2)[1] for path in patches] == ["dec", "pre", "pre", "dec"]
    assert all(path.endswith("/scale") for path in patches)


def test_a_note_of_one_cluster_is_not_restored_in_another(
    serve: Callable[..., ApiServer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The kubeconfig's context has changed since: neither does the other cluster get the old fleet, nor is its own lost."""
    apis = {"staging": serve(), "prod": serve()}
    for count, api in enumerate(apis.values(), 2):
        api.workload("pre", count)
        api.workload("dec", count)

    def use(name: str) -> None:
        names = {"cluster": "x", "user": "x"}
        held = json.loads((tmp_path / "kubeconfig").read_text()) | {
            "current-context": name,
            "contexts": [{"name": at, "context": names | {"cluster": at}} for at in apis],
            "clusters": [{"name": at, "cluster": {"server": api.url}} for at, api in apis.items()],
        }
        (tmp_path / "kubeconfig").write_text(json.dumps(held))

    rest = ["--db", f"sqlite:///{tmp_path / 'a.db'}"]
    use("staging")
    assert main(["control", "set", "1:1", "--control", SPEC, *rest]) == 0
    assert "dec (staging): 2:2 -> 1:1" in capsys.readouterr().out
    use("prod")
    for verb in (["restore"], ["restore", "--dry-run"], ["set", "2:2", "--control", SPEC]):
        assert main(["control", *verb, *rest]) == (0 if "--dry-run" in verb else 1)
        told = capsys.readouterr()
        staging, prod = (f"context {name} ({api.url})" for name, api in apis.items())
        assert f"is of {staging}, and this is {prod}. Run: kubectl config use-context staging" in told.out + told.err
    with pytest.raises(InputError, match="use-context staging"), Keeper(made(), "sweep"):
        pass
    assert not [verb for verb, _ in apis["prod"].log if verb == "PATCH"]
    use("staging")
    assert main(["control", "restore", *rest]) == 0
    assert counts(apis["staging"]) == {"pre": 2, "dec": 2}
    use("prod")
    assert main(["control", "set", "2:2", "--control", SPEC, *rest]) == 0


def test_a_pod_that_terminates_does_not_serve_and_keeps_the_change_open(api: ApiServer) -> None:
    """A Deployment forgets a pod when it is told to go; its requests end later. The cost of the change holds both."""
    api.start_s, api.drain_s = 0.1, 2.0
    control = made()
    cost = put(control, Fleet(1, 2), 20)
    assert 0.1 <= cost.joined_s < cost.ready_s
    assert cost.ready_s >= 2.0
    standing = control.get()
    assert len(standing.workers["decode"]) == 2
    # Also of the pods that the change brought.
    pods = [name for names in standing.workers.values() for name in names]
    assert standing.pages == {name: f"http://10.0.0.{name[4:]}:8200/metrics" for name in pods}
    assert not [o for o in api.objects["pods"].values() if "deletionTimestamp" in o["metadata"]]


def asked(api: ApiServer, since: int, verb: str = "/pods") -> list[str]:
    return [path for _, path in api.log[since:] if verb in path and "watch" not in path]


def test_in_force_is_seen_by_watches_and_not_by_asking_again_and_again(api: ApiServer) -> None:
    api.start_s = 1.2
    control = made()
    control.get()
    since = len(api.log)
    put(control, Fleet(3, 2), 10)
    # Both roles' pods: once for the standing, once to see that they may be listed, once for the watch, once when it is in force.
    assert len(asked(api, since)) <= 12
    assert {plural for plural, _ in api.watches} == {"deployments", "pods"}


def soon(true: Callable[[], bool], limit_s: float = 10.0) -> None:
    until = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("gone", ["event", "http"])
def test_a_watch_that_breaks_goes_on(api: ApiServer, gone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closed by the server: from the last version. Too old (410): a new list, and a watch from there. No answer: it says so."""
    monkeypatch.setattr(kubernetes, "PAUSE_S", (0.01, 0.1))
    api.cut, api.hold_s, api.gone = 1, 0.1, gone
    watched = Watched(made()._core.list_namespaced_pod, "llm", label_selector="app=pre")
    watched.start()
    began = len(api.watches)

    def names() -> set[str]:
        return {str(o["metadata"]["name"]) for o in watched.objects}

    assert len(names()) == 2
    for count in (3, 4, 1):
        with api.changed:
            api.objects["deployments"]["pre"]["spec"]["replicas"] = count
        soon(lambda n=count: len(names()) == n)  # type: ignore[misc]
    assert watched.lists == 1
    asked = [int(since) for _, since in api.watches[began:]]
    assert len(set(asked)) > 3  # each from where the one before was
    assert asked == sorted(asked)
    api.forget()
    soon(lambda: watched.lists == 2)
    with api.changed:
        api.objects["deployments"]["pre"]["spec"]["replicas"] = 2
    soon(lambda: len(names()) == 2)
    assert watched.lists == 2
    assert not watched.troubled
    api.status = 500
    soon(lambda: watched.troubled)
    api.status = 0
    soon(lambda: not watched.troubled)
    watched.stop()


def test_a_change_is_seen_through_watches_that_break(api: ApiServer) -> None:
    api.start_s, api.hold_s = 0.4, 0.05
    forgetting = threading.Timer(0.2, api.forget)
    forgetting.start()
    assert put(made(), Fleet(3, 2), 20).ready_s >= 0.4
    forgetting.join()


def test_a_control_that_is_let_go_ends_its_watches(api: ApiServer) -> None:
    """A change that is given up on its way leaves no thread that asks a server, which may be gone, for ever."""
    api.start_s, api.hold_s = 60, 0.05
    others = set(threading.enumerate())

    def watches() -> list[threading.Thread]:
        return [t for t in threading.enumerate() if t.name == "steelyard-watch" and t not in others]

    control = made()
    control.ask(Fleet(3, 2))
    assert len(watches()) == 4
    del control
    gc.collect()
    soon(lambda: not watches())


def test_what_may_not_be_watched_is_asked_for(api: ApiServer) -> None:
    api.deny = {("list", "deployments"), ("list", "pods")}
    said: list[str] = []
    with Keeper(made(), "replay", put_back=False, say=said.append, timeout_s=10) as keeper:
        keeper.put(Fleet(1, 2))
    assert api.watches == []
    assert counts(api) == {"pre": 1, "dec": 2}
    assert said == [
        "kubernetes llm/deployment/pre,deployment/dec (x): its pods may not be listed, so a change counts as in force while old "
        "pods still drain. Its role needs the verbs list and watch on pods."
    ]


@pytest.mark.parametrize("kind", ["LLMInferenceService", "DynamoGraphDeploymentScalingAdapter"])
def test_what_only_pods_tell_is_refused_where_they_may_not_be_listed(
    serve: Callable[..., ApiServer], kind: str
) -> None:
    """Its status counts no ready replicas: it would never be in force, or be so before a pod is ready."""
    plural = f"{kind.lower()}s"
    api = serve(**{plural: "serving.kserve.io/v1alpha1" if kind.startswith("LLM") else "nvidia.com/v1beta1"})
    if kind.startswith("LLM"):
        held, roles = kserve()
        api.holds(plural, held, *roles)
        control = made(f"kubernetes:llm/{kind}/g")
    else:
        for name, n in (("pre", 2), ("dec", 1)):

            def tell(held: dict[str, Any], found: dict[str, int]) -> None:
                held["status"] = {"replicas": held["spec"]["replicas"]}  # as the spec says, at once

            held = {"kind": "X", "metadata": {"name": name}, "spec": {"replicas": n}}
            api.holds(plural, held, (lambda o: int(o["spec"]["replicas"]), tell, {"app": name}))
        control = made(f"kubernetes:llm/{kind}/pre,{kind}/dec")
    api.deny = {("list", "pods")}
    said = "its status counts no ready replicas and its pods may not be listed.* needs the verbs list and watch on pods"
    for act in (control.get, lambda: put(control, Fleet(1, 2), 10), lambda: Keeper(control, "set").put(Fleet(1, 2))):
        with pytest.raises(LostError, match=said):
            act()
    assert not [1 for verb, _ in api.log if verb == "PATCH"]


def test_a_change_that_another_overtook_is_tried_again(api: ApiServer) -> None:
    api.conflicts = 2
    put(made(), Fleet(2, 2), 10)
    assert counts(api)["dec"] == 2
    assert len([1 for verb, _ in api.log if verb == "PATCH"]) == 3


def test_a_workload_that_somebody_holds_is_given_up(api: ApiServer) -> None:
    api.conflicts = -1
    with pytest.raises(LostError, match="5 attempts to scale dec were overtaken"):
        put(made(), Fleet(2, 2), 10)


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "the token is missing or expired"),
        (403, "needs the verb get on deployments and deployments/scale of 'apps'"),
        (404, "no such workload"),
        (500, "HTTP 500"),
    ],
)
def test_a_refusal_is_one_clear_line_without_secrets(
    api: ApiServer, status: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubernetes, "AGAIN_S", (0.01,))
    api.status = status
    with pytest.raises(EndpointError, match=said) as caught:
        made().get()
    assert isinstance(caught.value, LostError) is (status < 500)  # that passes, and is awaited
    assert "PLANTED" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_api_server_that_cannot_answer_for_a_while_ends_nothing(api: ApiServer) -> None:
    """It is upgraded, or its leader changes, while the fleet changes and as the way back begins."""

    def away(for_s: float) -> None:
        api.status = 503
        threading.Timer(for_s, lambda: setattr(api, "status", 0)).start()

    control = made()
    with Keeper(control, "sweep", timeout_s=20) as keeper:
        api.start_s = 0.6
        threading.Timer(0.2, away, (0.5,)).start()
        keeper.put(Fleet(1, 2))
        away(0.3)
    assert not keeper.stranded
    assert counts(api) == {"pre": 2, "dec": 1}


def test_a_change_that_admission_refuses_says_why(api: ApiServer) -> None:
    """A webhook answers 403, too: who reads of a verb that lacks would look for RBAC that is right."""
    api.admission = "spec.services[X].replicas cannot be modified directly when scaling adapter is enabled\n"
    with pytest.raises(
        LostError, match=r"refused to scale it .HTTP 403.*cannot be modified directly when scaling"
    ) as caught:
        put(made(), Fleet(2, 2), 10)
    assert "verb" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_token_that_expires_while_a_change_is_on_its_way_is_told(
    api: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubernetes, "PAUSE_S", (0.01, 0.05))
    api.stuck, api.hold_s = True, 0.1
    threading.Timer(0.3, lambda: setattr(api, "status", 401)).start()
    with pytest.raises(LostError, match="the token is missing or expired"):
        put(made(), Fleet(2, 3), 10)


def test_who_may_read_but_not_scale_is_told_which_verb_lacks(api: ApiServer) -> None:
    api.deny = {("patch", "deployments")}
    with pytest.raises(LostError, match="needs the verb patch on deployments and deployments/scale"):
        put(made(), Fleet(2, 2), 10)
    assert counts(api) == {"pre": 2, "dec": 1}


def test_half_a_change_is_taken_back(serve: Callable[..., ApiServer]) -> None:
    """Where the other role may not be scaled, the one that grew is given back: else a policy grows it again each tick."""
    api = serve(statefulsets="apps/v1")
    api.workload("pre", 2)
    api.workload("dec", 2, "statefulsets")
    api.deny = {("patch", "statefulsets")}
    control = made("kubernetes:llm/deployment/pre,statefulset/dec")
    with pytest.raises(LostError, match=r"needs the verb patch on statefulsets and statefulsets/scale of 'apps'\.$"):
        put(control, Fleet(3, 1), 10)
    assert counts(api) == {"pre": 2}
    assert len([1 for verb, _ in api.log if verb == "PATCH"]) >= 3  # more where one is overtaken (409)
    soon(lambda: control.get().settled(Fleet(2, 2)))


def test_what_cannot_be_taken_back_is_named(serve: Callable[..., ApiServer], monkeypatch: pytest.MonkeyPatch) -> None:
    api = serve(statefulsets="apps/v1")
    api.workload("pre", 2)
    api.workload("dec", 2, "statefulsets")
    control = made("kubernetes:llm/deployment/pre,statefulset/dec")
    real = api.store

    def store(plural: str, held: dict[str, Any], kind: str = "MODIFIED") -> None:
        real(plural, held, kind)
        if plural == "deployments" and held["spec"]["replicas"] == 3:
            api.deny = {("patch", "statefulsets"), ("patch", "deployments")}

    monkeypatch.setattr(api, "store", store)
    with pytest.raises(LostError, match=r"statefulsets/scale of 'apps'\. prefill could not be set back to 2\.$"):
        control.ask(Fleet(3, 1))
    assert counts(api) == {"pre": 3}


def test_pods_that_do_not_get_ready_are_told(api: ApiServer) -> None:
    api.stuck = True
    with pytest.raises(EndpointError, match=r"2:3 was not in force within 2 s .it is 2:1, 2 workers on the way"):
        put(made(), Fleet(2, 3), 2.0)


@pytest.mark.parametrize(
    ("kind", "group", "plural"),
    [
        ("StatefulSet", "apps/v1", "statefulsets"),
        ("LeaderWorkerSet", "leaderworkerset.x-k8s.io/v1", "leaderworkersets"),
        ("DynamoGraphDeploymentScalingAdapter", "nvidia.com/v1alpha1", "dynamographdeploymentscalingadapters"),
        ("DynamoGraphDeploymentScalingAdapter", "nvidia.com/v1beta1", "dynamographdeploymentscalingadapters"),
    ],
)
def test_every_kind_with_a_scale_is_reached_at_its_own_path(
    serve: Callable[..., ApiServer], kind: str, group: str, plural: str
) -> None:
    api = serve(**{plural: group})
    api.workload("pre", 2, plural)
    api.workload("dec", 1, plural)
    control = made(f"kubernetes:llm/{kind}/pre,{kind}/dec")
    put(control, Fleet(1, 2), 10)
    assert counts(api, plural) == {"pre": 1, "dec": 2}
    assert control.get().settled(Fleet(1, 2))


def named(items: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(one for one in items if one["name"] == name)


def services(old: bool) -> tuple[dict[str, Any], list[Any]]:
    """A DynamoGraphDeployment as v1alpha1 (services) or v1beta1 (components), and what its controllers do."""
    parts = {"Frontend": ("frontend", 1), "VllmPrefill": ("prefill", 2), "VllmDecode": ("decode", 1)}
    if old:
        spec: Any = {"services": {n: {"subComponentType": t, "replicas": r, "x": 1} for n, (t, r) in parts.items()}}
    else:
        spec = {"components": [{"name": n, "type": t, "replicas": r, "x": 1} for n, (t, r) in parts.items()]}
    key = "services" if old else "components"

    def role(name: str) -> Any:
        def wanted(held: Any) -> int:
            return int((held["spec"][key][name] if old else named(held["spec"][key], name))["replicas"])

        def tell(held: Any, found: dict[str, int]) -> None:
            status = held.setdefault("status", {})
            status["observedGeneration"] = held["metadata"]["generation"]
            status.setdefault(key, {})[name] = found | {"updatedReplicas": found["replicas"]}

        labels = {"nvidia.com/dynamo-graph-deployment-name": "g", "nvidia.com/dynamo-component": name}
        return wanted, tell, labels

    return {"kind": "DynamoGraphDeployment", "metadata": {"name": "g"}, "spec": spec}, [*map(role, parts)]


def roles_of_a_set() -> tuple[dict[str, Any], list[Any]]:
    roles = [
        {"name": n, "spec": {"replicas": r, "leaderWorkerTemplate": {"size": 4}}}
        for n, r in (("prefill", 2), ("decode", 1))
    ]

    def role(name: str) -> Any:
        def tell(held: Any, found: dict[str, int]) -> None:
            told = held.setdefault("status", {}).setdefault("roleStatuses", [])
            mine = next((s for s in told if s["name"] == name), None)
            if mine is None:
                told.append(mine := {"name": name})
            mine.update(found)

        of = "disaggregatedset.x-k8s.io"
        labels = {f"{of}/name": "g", f"{of}/role": name, "leaderworkerset.sigs.k8s.io/worker-index": "0"}
        return lambda held: int(named(held["spec"]["roles"], name)["spec"]["replicas"]), tell, labels

    return {"kind": "DisaggregatedSet", "metadata": {"name": "g"}, "spec": {"roles": roles}}, [
        *map(role, ("prefill", "decode"))
    ]


def kserve() -> tuple[dict[str, Any], list[Any]]:
    """Its status does not count: its pods do. Its decode workers are the service's own replicas, one if it does not say."""

    def labels(end: str) -> dict[str, str]:
        component = f"llminferenceservice-workload{end}"
        return {"app.kubernetes.io/name": "g", "app.kubernetes.io/component": component}

    def tell(held: Any, found: dict[str, int]) -> None:
        held["status"] = {"conditions": [{"type": "Ready", "status": "True"}]}

    held = {"kind": "X", "metadata": {"name": "g"}, "spec": {"model": {"x": 1}, "prefill": {"replicas": 2, "x": 1}}}
    return held, [
        (lambda o: int(o["spec"]["prefill"]["replicas"]), tell, labels("-prefill")),
        (lambda o: int(o["spec"].get("replicas", 1)), tell, labels("")),
    ]


@pytest.mark.parametrize(
    ("kind", "group", "shown", "object_of"),
    [
        ("DynamoGraphDeployment", "nvidia.com/v1alpha1", "spec.services.VllmPrefill.replicas", lambda: services(True)),
        (
            "DynamoGraphDeployment",
            "nvidia.com/v1beta1",
            "spec.components.VllmPrefill.replicas",
            lambda: services(False),
        ),
        ("DisaggregatedSet", "disaggregatedset.x-k8s.io/v1", "spec.roles.prefill.spec.replicas", roles_of_a_set),
        ("LLMInferenceService", "serving.kserve.io/v1alpha1", "spec.prefill.replicas", kserve),
    ],
)
def test_one_object_may_hold_both_roles(
    serve: Callable[..., ApiServer],
    kind: str,
    group: str,
    shown: str,
    object_of: Callable[[], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its counts are patched and nothing else of it; pods that start and drain are waited for."""
    plural = f"{kind.lower()}s"
    api = serve(**{plural: group})
    held, roles = object_of()
    api.holds(plural, held, *roles)
    api.drain_s = math.inf
    control = made(f"kubernetes:llm/{kind}/g")
    assert control.get().settled(Fleet(2, 1))
    look = control.get

    def get() -> Standing:
        standing: Standing = look()
        if has_grown(standing.fleet, Fleet(1, 2)):
            api.drain_s = 0.15  # not before that was seen
        return standing

    monkeypatch.setattr(control, "get", get)
    steps = control.steps(Fleet(1, 2))
    assert steps[0] == f"kubectl -n llm patch {kind.lower()}/g: {shown} = 1 (now 2)"
    assert len(steps) == 2
    with Keeper(control, "sweep", timeout_s=10) as keeper:
        cost = keeper.put(Fleet(1, 2))
        assert cost.joined_s < cost.ready_s
        assert cost.ready_s >= 0.15
    assert control.get().settled(Fleet(2, 1))


def test_a_service_that_is_not_there_is_named_with_those_that_are(serve: Callable[..., ApiServer]) -> None:
    api = serve(dynamographdeployments="nvidia.com/v1beta1")
    held, roles = services(False)
    api.holds("dynamographdeployments", held, *roles)
    with pytest.raises(LostError, match=r"no service 'Prefill'. It has Frontend, VllmPrefill, VllmDecode"):
        made("kubernetes:llm/dynamographdeployment/g/Prefill,dynamographdeployment/g/VllmDecode").get()


@pytest.mark.parametrize(
    "spec",
    [
        "kubernetes:",
        "kubernetes:llm",
        "kubernetes:llm/pod/a,pod/b",
        "kubernetes:llm/deployment/a",
        "kubernetes:llm/deployment/a/b,deployment/c",
        "kubernetes:llm/deployment/a,deployment/a",
        "kubernetes:llm/dynamographdeployment/g/Prefill",
    ],
)
def test_a_workload_that_cannot_be_read_is_refused(spec: str) -> None:
    with pytest.raises(InputError, match="KIND/NAME"):
        made(spec)
