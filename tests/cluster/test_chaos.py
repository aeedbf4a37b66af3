"""One run through everything that can go wrong: `make test-chaos`; the rows are the calm run's."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlaifv.store import open_store
from tests.cluster.conftest import ROOT, Cluster
from tests.cluster.test_demo import SMALL, choices, rows, run_controller

KILL = (
    "import os, signal\n"
    "for name in filter(str.isdigit, os.listdir('/proc')):\n"
    "    if int(open(f'/proc/{name}/stat').read().rsplit(')', 1)[1].split()[1]) == 1:\n"
    "        os.kill(int(name), signal.SIGKILL)\n"
)
"""Run inside a pod: kills what tini started."""
if os.environ.get("RLAIFV_TEST_CLUSTER") != "chaos":
    pytest.skip("make test-chaos", allow_module_level=True)


class Runs:
    """A controller outside, its settings, and what it says."""

    def __init__(self, cluster: Cluster, folder: Path, root: str) -> None:
        self.cluster, self.folder, self.root = cluster, folder, root
        (folder / "small.yaml").write_text(yaml.safe_dump(SMALL))
        (folder / "said").touch()
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, **stages: dict[str, Any]) -> None:
        settings = self.cluster.settings(stages=stages, start_timeout_s=20, poll_s=0.5)
        (self.folder / "cluster.yaml").write_text(yaml.safe_dump(settings))
        command = [sys.executable, "-m", "controller", "run", "--iterations", "1"]
        command += ["--executor", "kubernetes", "--cluster", "cluster.yaml"]
        command += ["--config", "small.yaml", "--root", self.root]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        with (self.folder / "said").open("ab") as said:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=said, stderr=said
            )

    def said(self) -> str:
        return (self.folder / "said").read_text()

    def end(self, seconds: float = 600) -> int:
        assert self.process is not None
        return self.process.wait(timeout=seconds)

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def until(self, true: Callable[[], Any], seconds: float = 180) -> Any:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if found := true():
                return found
            time.sleep(0.3)
        pytest.fail(self.said() + self.cluster.kubectl("-n", "rlaifv", "get", "pods,jobs,events"))

    def running(self, stage: str) -> str:
        """Name of a pod of a stage once it runs."""
        return str(self.until(lambda: self._running(stage)))

    def _running(self, stage: str) -> str:
        for pod in self.cluster.get("pods", "-l", f"rlaifv/stage={stage}")["items"]:
            states = pod["status"].get("containerStatuses") or [{}]
            if "running" in states[0].get("state", {}):
                return str(pod["metadata"]["name"])
        return ""

    def strike(self, stage: str) -> None:
        """SIGKILL to the stage's process in one pod."""
        name = self.running(stage)
        words = ("-n", "rlaifv", "exec", name, "--", "python", "-c", KILL)
        sys.stderr.write(self.cluster.kubectl(*words, check=False))


@pytest.fixture
def runs(cluster: Cluster, bucket: str, tmp_path: Path) -> Iterator[Runs]:
    for name in ("10-identities.yaml", "20-network.yaml"):
        cluster.kubectl("apply", "-f", str(ROOT / "k8s" / name))
    found = Runs(cluster, tmp_path, f"{bucket}/chaos")
    yield found
    if found.process and found.process.poll() is None:
        found.kill()
    sys.stderr.write(found.said())
    cluster.clear()


def test_chaos(cluster: Cluster, runs: Runs, tmp_path: Path) -> None:
    runs.start(prepare={"image": "localhost/no-such-image:1"})
    assert runs.end() == 1
    assert "never started: image cannot be pulled: ErrImageNeverPull" in runs.said()

    quota: dict[str, Any] = {"apiVersion": "v1", "kind": "ResourceQuota"}
    quota |= {"metadata": {"name": "none", "namespace": "rlaifv"}, "spec": {"hard": {"pods": "0"}}}
    cluster.kubectl("apply", "-f", "-", stdin=yaml.safe_dump(quota))
    runs.start(sample={"memory": "80Mi"})
    runs.until(lambda: "exceeded quota: none" in runs.said())
    cluster.kubectl("-n", "rlaifv", "delete", "resourcequota", "none")
    assert runs.end() == 1
    assert "out of memory at 80Mi; trying with twice that" in runs.said()
    assert "out of memory at 160Mi; twice the setting" in runs.said()

    runs.start(sample={"deadline_s": 3})
    assert runs.end() == 124
    assert "deadline exceeded: not done 3 s after it started" in runs.said()

    for stage in ("sample", "verify", "reflogp", "train"):
        runs.start()
        runs.strike(stage)
        runs.running(stage)
        runs.kill()  # the controller, too
    runs.start()
    victim = runs.running("respond")
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction"}
    path = f"/api/v1/namespaces/rlaifv/pods/{victim}/eviction"
    body = tmp_path / "eviction.yaml"
    body.write_text(yaml.safe_dump({**eviction, "metadata": {"name": victim}}))
    cluster.kubectl("create", "--raw", path, "-f", str(body))
    assert runs.end() == 0, runs.said()[-3000:]

    run_controller(
        tmp_path, "--root", str(tmp_path), "--config", str(tmp_path / "small.yaml"), iterations=1
    )
    calm, run = open_store(str(tmp_path / "demo")), open_store(f"{runs.root}/demo")
    assert rows(run, 1) == rows(calm, 1)
    assert choices(run, 1) == choices(calm, 1)
    jobs = cluster.get("jobs")["items"]
    names = [job["metadata"]["name"] for job in jobs]
    assert len(names) == len(set(names)) == len({job["metadata"]["uid"] for job in jobs})
    assert all(
        {c["type"] for c in job["status"]["conditions"]} & {"Complete", "Failed"} for job in jobs
    )
