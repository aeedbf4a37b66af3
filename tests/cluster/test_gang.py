"""Two pods that train together: they find each other, and start again together."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from controller.executors.kubernetes import KubernetesExecutor
from controller.k8s_client import Api, connect_cluster
from controller.k8s_settings import ClusterSettings
from controller.plan import JobSpec, ShardId, ShardState
from rlaifv.pipeline import STAGES
from tests.cluster.conftest import Cluster

RUN = "s3://runs/gang"
SHARD = ShardId(0, "train", 0)
SCRIPT = """
import os, time
import torch.distributed as dist
import torch
dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
for turn in range(600):
    value = torch.tensor([float(rank + 1)])
    dist.all_reduce(value)
    print(f"rank {rank} of {size}: sum {value.item():.0f}", flush=True)
    if "-a1-" not in os.environ["PET_MASTER_ADDR"]:
        break
    time.sleep(1)
"""


@pytest.fixture
def settings(cluster: Cluster) -> Iterator[ClusterSettings]:
    """A gang of two, and its script as a mounted file."""
    script: dict[str, Any] = {"apiVersion": "v1", "kind": "ConfigMap", "data": {"gang.py": SCRIPT}}
    script["metadata"] = {"name": "gang", "namespace": "rlaifv"}
    cluster.kubectl("apply", "-f", "-", stdin=yaml.safe_dump(script))
    account = {"apiVersion": "v1", "kind": "ServiceAccount"}
    account["metadata"] = {"name": "rlaifv-stage", "namespace": "rlaifv"}  # type: ignore[assignment]
    cluster.kubectl("apply", "-f", "-", stdin=yaml.safe_dump(account))
    yield ClusterSettings.model_validate(
        cluster.settings(
            stages={"train": {"nodes": 2, "env": {"PYTHONPATH": "/gang"}}},
            volumes=[{"name": "gang", "configMap": {"name": "gang"}}],
            mounts=[{"name": "gang", "mountPath": "/gang"}],
        )
    )
    cluster.clear()


def until(
    executor: KubernetesExecutor, true: Callable[[ShardState | None], bool], seconds: float = 240
) -> ShardState:
    deadline = time.monotonic() + seconds
    state = None
    while time.monotonic() < deadline:
        state = executor.states().get(SHARD)
        if true(state):
            assert state is not None
            return state
        time.sleep(1)
    pytest.fail(f"still {state}: {executor.logs(SHARD)}")


def test_a_gang_finds_itself_and_starts_again_together(
    cluster: Cluster, settings: ClusterSettings
) -> None:
    argv = ("gang", "--run", RUN, "--iteration", "0", "--shard", "{shard}")
    spec = JobSpec("gang-0-train", 0, STAGES["train"], argv, (0,), 1)
    executor = KubernetesExecutor(Api(connect_cluster), settings, RUN)
    executor.states()
    executor.submit(spec)
    until(executor, lambda state: "of 2: sum 3" in executor.logs(SHARD))
    pods = cluster.get("pods", "-l", "rlaifv/stage=train")["items"]
    assert len(pods) == 2
    victim = max(pod["metadata"]["name"] for pod in pods)
    cluster.kubectl("-n", "rlaifv", "delete", "pod", victim, "--grace-period=0", "--force")
    lost = until(executor, lambda state: state is not None and state.phase == "ended")
    assert lost.exit_code
    executor.submit(spec)  # as the planner does with a shard that ended without its part
    done = until(executor, lambda state: state is not None and state.exit_code == 0)
    assert done.phase == "ended"
    jobs = cluster.get("jobs", "-l", "rlaifv/stage=train")["items"]
    newest = max(job["metadata"]["name"] for job in jobs)
    assert "-a2-" in newest
    for pod in cluster.get("pods", "-l", f"batch.kubernetes.io/job-name={newest}")["items"]:
        log = cluster.kubectl("-n", "rlaifv", "logs", pod["metadata"]["name"])
        assert "of 2: sum 3" in log
    services = cluster.get("services")["items"]
    assert {one["metadata"]["ownerReferences"][0]["kind"] for one in services} == {"Job"}
