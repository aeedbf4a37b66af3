"""One controller per run, the client's patience, and the Role: against the stand-in."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from controller.fence import Fence, TakenOver
from controller.k8s_client import Answer, Api, ApiError, connect_cluster
from controller.k8s_lease import Lease, LeaseSettings
from controller.plan import ShardId
from rlaifv.errors import ConfigError, TransientError
from rlaifv.store import open_store
from tests.k8s_contract import check_server
from tests.k8sfake import FakeCluster, Fault, Outcome
from tests.test_kubernetes_executor import SETTINGS, World, only

ROOT = Path(__file__).parents[1]
LEASE = "/apis/coordination.k8s.io/v1/namespaces/rlaifv/leases/rlaifv-demo"

# --- one controller per run ------------------------------------------------------------------


def lease(cluster: FakeCluster, holder: str) -> Lease:
    api = Api(lambda: cluster.transport, sleep=lambda seconds: None)
    return Lease(api, LEASE, holder=holder, settings=LeaseSettings(0.5, 0.05))


def test_a_second_controller_says_who_holds_the_run(tmp_path: Path) -> None:
    cluster = World(tmp_path).cluster
    words = "another controller drives this run: one"
    with lease(cluster, "one").held(), pytest.raises(TransientError, match=words):
        lease(cluster, "two").held().__enter__()
    with lease(cluster, "two").held():
        pass


def test_a_dead_holder_is_succeeded_and_finds_out(tmp_path: Path) -> None:
    cluster = World(tmp_path).cluster
    dead = lease(cluster, "dead")
    dead._acquire()
    heir = lease(cluster, "heir")
    with heir.held():
        heir.check()
        dead._keep()
        with pytest.raises(TransientError, match="now: heir"):
            dead.check()


def test_a_controller_that_wakes_late_cannot_commit(tmp_path: Path) -> None:
    run = open_store(str(tmp_path))
    paused = Fence(run, "paused")
    paused.check()
    Fence(run, "successor").check()
    with pytest.raises(TakenOver, match="successor has taken over"):
        paused.check()


# --- the client ------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_what_may_pass_is_asked_again_also_a_post(tmp_path: Path, status: int) -> None:
    world = World(tmp_path)
    waits: list[float] = []
    world.cluster.faults[0] = Fault(status, "later", {"Retry-After": "7"})
    api = Api(lambda: world.cluster.transport, sleep=waits.append)
    path = "/api/v1/namespaces/rlaifv/services"
    api.create(path, {"metadata": {"name": "a"}})
    assert len(world.cluster.calls) == 2
    assert 7 <= waits[0] <= 8


def test_a_token_is_read_again_once(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.cluster.faults |= {0: Fault(401), 1: Fault(401)}
    connections = []

    def connect() -> Callable[..., Answer]:
        connections.append(1)
        return world.cluster.transport

    api = Api(connect, sleep=lambda seconds: None)
    with pytest.raises(ConfigError, match="does not accept the credentials"):
        api.get("/api/v1/namespaces/rlaifv/pods")
    assert len(connections) == 2


def test_a_missing_right_names_the_role(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.cluster.faults[0] = Fault(403, "pods is forbidden")
    api = Api(lambda: world.cluster.transport, sleep=lambda seconds: None)
    with pytest.raises(ConfigError, match="see the Role in k8s/"):
        api.items("/api/v1/namespaces/rlaifv/pods")


def test_a_listing_has_every_page(tmp_path: Path) -> None:
    cluster = World(tmp_path).cluster
    api = Api(lambda: cluster.transport, sleep=lambda seconds: None)
    path = "/api/v1/namespaces/rlaifv/services"
    for number in range(1100):
        api.create(path, {"metadata": {"name": f"s{number}"}})
    assert len(api.items(path)) == 1100
    with pytest.raises(ApiError, match="already exists"):
        api.create(path, {"metadata": {"name": "s7"}})
    start = len(cluster.calls)
    cluster.faults[start + 1] = Fault(410, "the provided continue parameter is too old")
    assert len(api.items(path)) == 1100
    assert len(cluster.calls) == start + 2 + 3  # from the first page again


def test_kubeconfig_is_read_when_a_connection_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not when the library was imported, which may be long before."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": "https://127.0.0.1:1"}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
        "contexts": [{"name": "only-here", "context": {"cluster": "c", "user": "u"}}],
    }
    (tmp_path / "config").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    connect_cluster("only-here")
    with pytest.raises(ConfigError, match="no way to a Kubernetes cluster"):
        connect_cluster("nowhere")


def test_the_stand_in_keeps_the_contract(tmp_path: Path) -> None:
    cluster = World(tmp_path).cluster
    check_server(Api(lambda: cluster.transport, sleep=lambda seconds: None))


def test_the_role_allows_what_a_run_calls_and_nothing_else(tmp_path: Path) -> None:
    """Every verb of k8s/10-identities.yaml is used by a run with failures, `logs` and `cancel`."""
    world = World(tmp_path, only("sample", Outcome(137), index=1))
    with lease(world.cluster, "one").held():
        world.drive()
        time.sleep(0.1)
    world.controller(SETTINGS).logs(ShardId(0, "sample", 0))
    world.controller().cancel()
    used = {verb_of(method, path) for method, path in world.cluster.calls}
    (role,) = [
        one
        for one in yaml.safe_load_all((ROOT / "k8s/10-identities.yaml").read_text())
        if one["kind"] == "Role"
    ]
    allowed = {
        (verb, resource)
        for rule in role["rules"]
        for verb in rule["verbs"]
        for resource in rule["resources"]
    }
    assert used <= allowed
    rare = {("create", "services"), ("get", "jobs"), ("list", "events")}  # gangs, 409, quotas
    assert allowed - used <= rare


def verb_of(method: str, path: str) -> tuple[str, str]:
    words = path.split("/namespaces/")[1].split("/")[1:]
    kind = words[0] + (f"/{words[2]}" if len(words) > 2 else "")
    verbs = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
    return verbs.get(method) or ("get" if len(words) > 1 else "list"), kind
