"""The only `if` on the platform."""

from typing import NamedTuple

from controller.executors.base import Executor
from controller.executors.local import LocalExecutor, LocalSettings
from rlaifv.errors import ConfigError

KINDS = ("local", "docker", "kubernetes")


class ExecutorSettings(NamedTuple):
    """Which executor, and the settings of each kind."""

    kind: str
    local: LocalSettings


def open_executor(settings: ExecutorSettings) -> Executor:
    """The executor; raises ConfigError for one that this version lacks."""
    if settings.kind == "local":
        return LocalExecutor(settings.local)
    raise ConfigError(
        f"--executor {settings.kind}: comes with a later version; this one runs "
        "stages as local processes (--executor local)"
    )
