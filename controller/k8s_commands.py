"""The commands of the command line that are about a cluster: render, logs, cancel, retry, status."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from controller.executors.kubernetes import KubernetesExecutor
from controller.fence import Fence
from controller.k8s_client import Api, ApiError, connect_cluster
from controller.k8s_manifest import manifests, run_id, selector
from controller.k8s_settings import ClusterSettings, read_settings
from controller.k8s_states import job_info
from controller.places import RunPlace
from controller.plan import Planner, ShardId, every_job
from controller.tables import Column
from controller.tables import render as render_table
from rlaifv.config import RunConfig

Json = dict[str, Any]
SETTLE_S = 2.0
FOLLOW_S = 2.0


class Cluster(NamedTuple):
    """A run on a cluster."""

    api: Api
    settings: ClusterSettings
    place: RunPlace


def open_cluster(place: RunPlace, settings_file: Path | None) -> Cluster:
    """Raises ConfigError without credentials for a cluster."""
    return Cluster(Api(connect_cluster), read_settings(settings_file), place)


def render(config: RunConfig, run_uri: str, settings: ClusterSettings) -> str:
    """Every Job of a run as YAML, in the order in which they are submitted; needs no cluster."""
    planner = Planner(config, run_uri, "stage")
    settings = settings.for_run(config)
    documents = [one for spec in every_job(planner) for one in manifests(spec, settings)]
    return yaml.safe_dump_all(documents, sort_keys=False, width=120)


def follow(
    cluster: Cluster, shard: ShardId, *, sleep: Callable[[float], None] = time.sleep
) -> Iterator[str]:
    """New lines of a shard's log until it has ended; goes over to the next pod after a retry."""
    executor = _executor(cluster)
    seen: list[str] = []
    while True:
        state = executor.states().get(shard)
        text = executor.logs(shard).rpartition("\n")[0]
        lines = text.splitlines()
        start = 0
        if seen and seen[-1] in lines:
            start = len(lines) - lines[::-1].index(seen[-1])
        yield from lines[start:]
        seen = lines or seen
        if state is None or state.phase == "ended":
            return
        sleep(FOLLOW_S)


def logs(cluster: Cluster, shard: ShardId) -> str:
    """The end of a shard's log."""
    return _executor(cluster).logs(shard)


def cancel(cluster: Cluster, holder: str, *, sleep: Callable[[float], None] = time.sleep) -> int:
    """Ends the run's controller and its Jobs; returns how many there were. Parts stay.

    The controller sees that its number was passed and ends by itself; a Job that it created at
    the same moment is found by the second look.
    """
    Fence(cluster.place.store, f"cancel by {holder}")
    ended = _count(cluster)
    for _ in range(2):
        _executor(cluster).cancel()
        sleep(SETTLE_S)
    return ended


def retry(cluster: Cluster) -> list[str]:
    """Deletes the run's failed Jobs, so that a controller at work submits them again."""
    path = _jobs(cluster)
    failed = [
        info
        for job in cluster.api.items(path, labelSelector=selector(cluster.place.uri))
        if (info := job_info(job)).failed
    ]
    for info in failed:
        cluster.api.delete(f"{path}/{info.name}", uid=info.uid)
    return [info.name for info in failed]


def status_lines(cluster: Cluster) -> Iterator[str]:
    """Who drives the run, and every shard that runs, waits or failed, with its reason."""
    yield f"cluster: {holder(cluster)}"
    rows = [
        (str(shard), state.phase, str(state.attempts), state.reason)
        for shard, state in sorted(_executor(cluster).states().items())
        if state.phase != "ended" or state.exit_code
    ]
    if rows:
        columns = (Column("shard"), Column("phase"), Column("attempts", right=True), Column("why"))
        yield render_table(columns, rows)


def holder(cluster: Cluster) -> str:
    """Who drives the run, by its Lease."""
    name = f"rlaifv-{run_id(cluster.place.uri)}"
    space = cluster.settings.namespace
    path = f"/apis/coordination.k8s.io/v1/namespaces/{space}/leases/{name}"
    try:
        spec = cluster.api.get(path)["spec"]
    except ApiError as error:
        if error.status != 404:
            raise
        return "no controller has driven this run here"
    if not spec.get("holderIdentity"):
        return "no controller drives this run"
    return f"driven by {spec['holderIdentity']}, last seen {spec.get('renewTime')}"


def _count(cluster: Cluster) -> int:
    found = cluster.api.items(_jobs(cluster), labelSelector=selector(cluster.place.uri))
    return sum(not (job_info(job).complete or job_info(job).failed) for job in found)


def _executor(cluster: Cluster) -> KubernetesExecutor:
    executor = KubernetesExecutor(cluster.api, cluster.settings, cluster.place.uri)
    executor.observe_only()
    return executor


def _jobs(cluster: Cluster) -> str:
    return f"/apis/batch/v1/namespaces/{cluster.settings.namespace}/jobs"
