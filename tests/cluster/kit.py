"""What the tests on a cluster share: the run that they make, and controllers outside of it."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from controller.executors.launchers import _die_with_parent
from rlaifv.pipeline import choice_key
from rlaifv.recipes import RECIPES
from rlaifv.records import Choice
from rlaifv.store import Manifest, Store
from tests.cluster.conftest import ROOT, Cluster

DEMO = RECIPES["demo"]()
SMALL: dict[str, Any] = {
    "prepare": {"instructions_per_iteration": 96},
    "shards": {"instructions": 2, "reflogp": 1},
    "respond": {"benchmarks": [DEMO.respond.benchmarks[0].model_dump(mode="json")]},
}
"""The demo with fewer scenes an iteration, answered only on what the choice is made on: what is
compared is that rows and choices are the same, not how good they are."""


def rows(run: Store, iterations: int) -> dict[str, str]:
    """Digest of the rows of every part of a run."""
    keys = [item.key for item in run.objects("") if item.key.endswith("manifest.json")]
    assert keys
    return {
        part.key: part.rows_sha256
        for key in keys
        if int(key.split("/")[0].removeprefix("iteration-")) < iterations
        for part in run.read_json(key, Manifest).parts
    }


def choices(run: Store, iterations: int) -> list[Choice]:
    return [run.read_json(choice_key(iteration), Choice) for iteration in range(iterations)]


def start_controller(
    cluster: Cluster,
    folder: Path,
    root: str,
    config: dict[str, Any],
    *,
    iterations: int = 1,
    settings: dict[str, Any] | None = None,
) -> subprocess.Popen[bytes]:
    """A controller outside the cluster; what it says goes to a file."""
    (folder / "cluster.yaml").write_text(yaml.safe_dump(settings or cluster.settings()))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "controller", "run", "--iterations", str(iterations)]
    command += ["--executor", "kubernetes", "--cluster", "cluster.yaml"]
    command += ["--config", "config.yaml", "--root", root]
    with (folder / "said").open("ab") as log:
        return subprocess.Popen(
            command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=log, stderr=log
        )


def start_local(folder: Path, config: dict[str, Any]) -> subprocess.Popen[bytes]:
    """Four iterations as processes of this machine; what they say goes to a file."""
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "controller", "run", "--iterations", "4"]
    command += ["--root", str(folder), "--config", "config.yaml"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (folder / "said").open("wb") as log:
        return subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
            preexec_fn=_die_with_parent,
        )


def said(folder: Path) -> str:
    return (folder / "said").read_text()[-5000:]


def controller(folder: Path, *words: str) -> str:
    """What a command of the command line says; `status` tells the run's state by its code."""
    command = [sys.executable, "-m", "controller", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode in ((0, 1, 3, 4) if words[0] == "status" else (0,)), done.stderr[-3000:]
    return done.stdout


def until(true: Callable[[], Any], seconds: float, cluster: Cluster) -> Any:
    """What `true` says once it is; fails with the state of the cluster after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := true():
            return found
        time.sleep(0.5)
    pytest.fail(cluster.kubectl("-n", "rlaifv", "get", "pods,jobs,events"))


def place_of(thing: dict[str, Any]) -> tuple[str, str]:
    labels = thing["metadata"]["labels"]
    return labels["rlaifv/iteration"], labels["rlaifv/stage"]


def ended(job: dict[str, Any]) -> str:
    """`Complete`, `Failed`, or nothing yet."""
    found = [one["type"] for one in job["status"].get("conditions", []) if one["status"] == "True"]
    return next((one for one in ("Complete", "Failed") if one in found), "")
