"""What a user does: `kubectl apply -f k8s/`, and the demo runs; also with the controller outside."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlaifv.config import RunConfig
from rlaifv.pipeline import CONFIG, choice_key, manifest_key
from rlaifv.recipes import RECIPES
from rlaifv.records import Choice
from rlaifv.store import Manifest, Store, open_store
from tests.cluster.conftest import ROOT, Cluster

DEMO = RECIPES["demo"]()
SMALL: dict[str, Any] = {
    "prepare": {"instructions_per_iteration": 96},
    "shards": {"instructions": 2, "reflogp": 1},
    "respond": {"benchmarks": [DEMO.respond.benchmarks[-1].model_dump(mode="json")]},
}
"""The demo with fewer scenes, and nothing to select on, so that the last checkpoint is the next
policy: what is compared is that the rows are the same, not how good they are."""


def controller_job(cluster: Cluster, *, seconds: float) -> dict[str, Any]:
    """The controller's Job once it has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        job: dict[str, Any] = cluster.get("job", "rlaifv-controller")
        ended = [c["type"] for c in job["status"].get("conditions", []) if c["status"] == "True"]
        if "Complete" in ended or "Failed" in ended:
            return job
        time.sleep(1)
    pytest.fail(cluster.kubectl("-n", "rlaifv", "get", "pods,jobs,events"))


def controller_log(cluster: Cluster) -> str:
    return cluster.kubectl("-n", "rlaifv", "logs", "job/rlaifv-controller")


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


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The same run as local processes, one thread each."""
    root = tmp_path_factory.mktemp("local")
    (root / "small.yaml").write_text(yaml.safe_dump(SMALL))
    run_controller(root, "--root", str(root), "--config", str(root / "small.yaml"))
    return open_store(str(root / "demo"))


def run_controller(folder: Path, *words: str, iterations: int = 4) -> None:
    command = [sys.executable, "-m", "controller", "run", "--iterations", str(iterations), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_without_a_bucket_the_controller_names_the_key(cluster: Cluster) -> None:
    cluster.kubectl("apply", "-f", str(cluster.manifests("", {})))
    controller_job(cluster, seconds=120)
    (pod,) = cluster.get("pods", "-l", "app.kubernetes.io/component=controller")["items"]
    ended = pod["status"]["containerStatuses"][0]["state"]["terminated"]
    assert ended["exitCode"] == 78
    assert "key ROOT of ConfigMap rlaifv-run" in controller_log(cluster)
    cluster.clear()


def test_the_api_server_accepts_all_that_we_render(cluster: Cluster, tmp_path: Path) -> None:
    settings = cluster.settings(
        queue="research",
        stages={
            "train": {"nodes": 2, "gpus": 8, "priority_class": "system-node-critical"},
            "sample": {"tolerations": [{"operator": "Exists"}], "node_selector": {"a": "b"}},
        },
    )
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "controller", "render", "--root", "s3://runs/a"]
    command += ["--recipe", "llava15_7b_lora", "--cluster", str(tmp_path / "cluster.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    everything = tmp_path / "run.yaml"
    everything.write_text(done.stdout.replace("priorityClassName: system-node-critical", ""))
    strict = ("--dry-run=server", "--validate=strict", "--warnings-as-errors")
    said = cluster.kubectl("create", *strict, "-f", str(everything))
    assert said.count("created (server dry run)") == done.stdout.count("\nkind: ")
    assert "Warning" not in said


def test_four_iterations_in_the_cluster_equal_the_local_run(
    cluster: Cluster, bucket: str, local: Store
) -> None:
    folder = cluster.manifests(f"{bucket}/inside", SMALL)
    cluster.kubectl("apply", "-f", str(folder))
    job = controller_job(cluster, seconds=1500)
    assert job["status"].get("succeeded") == 1, controller_log(cluster)
    again = cluster.kubectl("apply", "-f", str(folder))
    assert all(line.endswith("unchanged") for line in again.splitlines()), again
    run = open_store(f"{bucket}/inside/demo")
    assert rows(run, 4) == rows(local, 4)
    assert choices(run, 4) == choices(local, 4)
    assert all(choice.tree for choice in choices(run, 4))
    jobs = cluster.get("jobs", "-l", "app.kubernetes.io/component=stage")["items"]
    assert {one["metadata"]["annotations"]["rlaifv/attempt"] for one in jobs} == {"1"}
    config = run.read_json(CONFIG, RunConfig)
    assert len(jobs) == config.iterations * 13
    assert run.exists(manifest_key(3, "grades"))
    report_times(cluster, jobs)
    cluster.clear()


def report_times(cluster: Cluster, jobs: list[dict[str, Any]]) -> None:
    """For docs/kubernetes.md: what the controller said, and how long Jobs took."""
    sys.stderr.write(controller_log(cluster))
    for job in jobs:
        status = job["status"]
        sys.stderr.write(
            f"{job['metadata']['name']} {status['startTime']} {status['completionTime']}\n"
        )


def test_a_controller_outside_does_the_same(
    cluster: Cluster, bucket: str, local: Store, tmp_path: Path
) -> None:
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(cluster.settings()))
    words = ("--executor", "kubernetes", "--cluster", "cluster.yaml")
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL))
    config = ("--config", "small.yaml")
    run_controller(tmp_path, "--root", f"{bucket}/outside", *words, *config, iterations=1)
    run = open_store(f"{bucket}/outside/demo")
    assert rows(run, 1) == rows(local, 1)
    assert choices(run, 1) == choices(local, 1)
    cluster.clear()
