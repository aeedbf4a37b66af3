"""Stages as containers of a local engine: the same images and arguments as on a cluster."""

import os
import queue
import shutil
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from controller.executors.launchers import NO_CHANGES, Ended
from controller.k8s_manifest import USER
from controller.k8s_settings import ClusterSettings
from rlaifv.errors import ConfigError

ENGINES = ("docker", "podman")
SCRATCH = "/tmp:rw,mode=1777,exec"  # noqa: S108 - inside the container
PASSED_ON = ("AWS_", "RLAIFV_S3_", "OPENAI_", "HF_", "JUDGE_")
"""Environment variables that reach the stages: credentials, never results."""
PATHS = ("_BUNDLE", "_FILE", "HF_HOME")
"""Endings of those that name a file of this machine, which the container does not have."""


class Engine(NamedTuple):
    """A container engine, and what its `run` needs on this machine."""

    program: str
    flags: tuple[str, ...] = ()


def find_engine(flags: Sequence[str] = ()) -> Engine:
    """docker, else podman, whichever answers; raises ConfigError when neither does."""
    for program in ENGINES:
        if shutil.which(program) and _answers(program):
            return Engine(program, tuple(flags))
    raise ConfigError("--executor docker: neither docker nor podman is here and answers")


def _answers(program: str) -> bool:
    done = subprocess.run([program, "info"], capture_output=True, check=False)
    return done.returncode == 0


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
    command += ["--tmpfs", SCRATCH, "--shm-size", _size(stage.shared_memory)]
    for name in sorted(environment):
        if name.startswith(PASSED_ON) and not name.endswith(PATHS):
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


def _size(quantity: str | None) -> str:
    return (quantity or "1Gi").replace("Ki", "k").replace("Mi", "m").replace("Gi", "g")


class Containers:
    """A launcher that starts a container per shard; the rest is the local executor's."""

    def __init__(
        self, engine: Engine, settings: ClusterSettings, ended: "queue.Queue[Ended]"
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._ended = ended
        self._prefix = f"rlaifv-{os.getpid()}"
        self._running: dict[int, subprocess.Popen[bytes]] = {}

    def start(
        self, ticket: int, argv: Sequence[str], log: Path, env: Mapping[str, str] = NO_CHANGES
    ) -> None:
        command = container_command(self._engine, self._settings, argv, os.environ)
        command[2:2] = [word for name in env for word in ("--env", f"{name}={env[name]}")]
        command[2:2] = ["--name", f"{self._prefix}-{ticket}"]
        with log.open("ab") as stream:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._running[ticket] = process
        threading.Thread(target=self._watch, args=(ticket, process), daemon=True).start()

    def kill(self, ticket: int, number: int) -> None:
        command = [self._engine.program, "kill", "--signal", str(number)]
        subprocess.run([*command, f"{self._prefix}-{ticket}"], capture_output=True, check=False)

    def close(self) -> None:
        """Ends the containers that still run."""
        for ticket, process in self._running.items():
            if process.poll() is None:
                self.kill(ticket, signal.SIGKILL)
                process.wait()

    def _watch(self, ticket: int, process: subprocess.Popen[bytes]) -> None:
        self._ended.put(Ended(ticket, process.wait()))
