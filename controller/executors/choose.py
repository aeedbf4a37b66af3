"""The only `if` on the platform."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

from controller.executors.base import Executor
from controller.executors.local import LocalExecutor, LocalSettings
from controller.lock import hold
from controller.loop import Guard, unguarded
from controller.places import RunPlace
from rlaifv.config import RunConfig
from rlaifv.errors import ConfigError

KINDS = ("local", "docker", "kubernetes")


class ExecutorSettings(NamedTuple):
    """Which executor, and the settings of each kind."""

    kind: str
    local: LocalSettings
    cluster: Path | None = None
    """Settings file of docker and kubernetes."""


class Platform(NamedTuple):
    """Where stages run, and how a run is held there against a second controller."""

    executor: Executor
    hold: Callable[[], AbstractContextManager[Guard]]
    """Raises TransientError when another controller has it."""


def open_platform(settings: ExecutorSettings, place: RunPlace, config: RunConfig) -> Platform:
    """The platform; raises ConfigError for one that cannot work here."""
    if settings.kind == "kubernetes":
        return _kubernetes(settings.cluster, place, config)
    local = settings.local
    if settings.kind == "docker":
        return Platform(
            _docker(local, settings.cluster, config), lambda: _hold_folder(local.folder)
        )
    return Platform(LocalExecutor(local), lambda: _hold_folder(local.folder))


@contextmanager
def _hold_folder(folder: Path) -> Iterator[Guard]:
    with hold(folder):
        yield unguarded


def _docker(local: LocalSettings, cluster: Path | None, config: RunConfig) -> Executor:
    from controller.executors.docker import Containers, find_engine
    from controller.k8s_settings import read_settings

    settings = read_settings(cluster).for_run(config)
    engine = find_engine(os.environ.get("RLAIFV_ENGINE_FLAGS", "").split())
    # The engine deals out GPUs: `gpus` of the stage's settings.
    return LocalExecutor(local, launch=lambda ended: Containers(engine, settings, ended), gpus=())


def _kubernetes(cluster: Path | None, place: RunPlace, config: RunConfig) -> Platform:
    from controller.executors.kubernetes import KubernetesExecutor
    from controller.fence import Fence
    from controller.k8s_client import Api, connect_cluster  # takes a second to import
    from controller.k8s_lease import Lease
    from controller.k8s_manifest import run_id
    from controller.k8s_settings import read_settings

    settings = read_settings(cluster).for_run(config)
    if not place.uri.startswith("s3://") and not settings.mounts:
        raise ConfigError(
            "--root: stages in pods need a store that all of them reach, such as "
            "s3://bucket/prefix (in k8s/: key ROOT of ConfigMap rlaifv-run)"
        )
    api = Api(connect_cluster)
    leases = f"/apis/coordination.k8s.io/v1/namespaces/{settings.namespace}/leases"
    me = f"process {os.getpid()} on {socket.gethostname()}"
    lease = Lease(api, f"{leases}/rlaifv-{run_id(place.uri)}", holder=me)

    @contextmanager
    def held() -> Iterator[Guard]:
        with lease.held():
            fence = Fence(place.store, me)

            def guard() -> None:
                lease.check()
                fence.check()

            yield guard

    return Platform(KubernetesExecutor(api, settings, place.uri), held)
