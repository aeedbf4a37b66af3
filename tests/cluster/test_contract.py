"""The stand-in's contract, held against the real API server; and the Role, by what it forbids."""

from tests.cluster.conftest import ROOT, Cluster
from tests.k8s_contract import check_server


def test_a_real_server_answers_as_we_expect(cluster: Cluster) -> None:
    from controller.k8s_client import Api, connect_cluster

    check_server(Api(connect_cluster))


def test_the_controller_may_do_what_it_needs_and_no_more(cluster: Cluster) -> None:
    cluster.kubectl("apply", "-f", str(ROOT / "k8s/10-identities.yaml"))
    me = ("--as", "system:serviceaccount:rlaifv:rlaifv-controller", "-n", "rlaifv")

    def may(verb: str, *what: str) -> bool:
        said = cluster.kubectl("auth", "can-i", verb, *what, *me, check=False)
        return said.split()[-1] == "yes"

    assert all(may(verb, "jobs") for verb in ("create", "get", "list", "patch", "delete"))
    assert may("get", "pods", "--subresource=log")
    assert not may("get", "secrets")
    assert not may("create", "pods")
    assert not may("list", "nodes")
    assert not may("delete", "leases")
