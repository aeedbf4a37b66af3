"""Stages as containers of a local engine: the same images and arguments as on a cluster."""

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from controller.k8s_manifest import USER
from controller.k8s_settings import ClusterSettings
from rlaifv.errors import ConfigError

ENGINES = ("docker", "podman")
PASSED_ON = ("AWS_", "RLAIFV_S3_", "OPENAI_", "HF_", "JUDGE_")
"""Environment variables that reach the stages: credentials, never results."""


class Engine(NamedTuple):
    """A container engine, and what its `run` needs on this machine."""

    program: str
    flags: tuple[str, ...] = ()


def find_engine(flags: Sequence[str] = ()) -> Engine:
    """docker, else podman; raises ConfigError when neither is there."""
    for program in ENGINES:
        if shutil.which(program):
            return Engine(program, tuple(flags))
    raise ConfigError("--executor docker: neither docker nor podman is installed")


def container_command(
    engine: Engine,
    settings: ClusterSettings,
    argv: Sequence[str],
    environment: Mapping[str, str],
) -> list[str]:
    """The command line that runs one shard of a stage in its image.

    A `file://` run is mounted at its own path; the rest of the container is read-only, as it is
    on a cluster.
    """
    stage = settings.of(argv[0].removeprefix("jobs."))
    uri = argv[argv.index("--run") + 1]
    command = [engine.program, "run", "--rm", "--read-only", "--cap-drop", "ALL"]
    command += ["--security-opt", "no-new-privileges", "--network", "host", *engine.flags]
    if uri.startswith("file://"):
        folder = Path(unquote(urlsplit(uri).path))
        owner = folder.stat()
        command += ["--volume", f"{folder}:{folder}", "--user", f"{owner.st_uid}:{owner.st_gid}"]
    else:
        command += ["--user", f"{USER}:{USER}"]
    command += ["--tmpfs", "/tmp:rw,mode=1777,exec", "--shm-size", _size(stage.shared_memory)]
    for name in sorted(environment):
        if name.startswith(PASSED_ON):
            command += ["--env", name]  # the value stays out of the process list
    values = {
        "RLAIFV_IMAGE": stage.image or "",
        "OMP_NUM_THREADS": str(settings.threads),
        **(stage.env or {}),
    }
    for name, value in values.items():
        command += ["--env", f"{name}={value}"]
    if stage.gpus:
        command += ["--gpus", str(stage.gpus)]
    return [*command, stage.image or "", *argv]


def stop_container(engine: Engine, name: str) -> None:
    """Ends a container by name; nothing happens when it has ended."""
    subprocess.run([engine.program, "kill", name], capture_output=True, check=False)


def _size(quantity: str | None) -> str:
    return (quantity or "1Gi").replace("Ki", "k").replace("Mi", "m").replace("Gi", "g")
