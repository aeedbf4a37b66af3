"""One run through everything that can go wrong: `make test-chaos`; the rows are the calm run's."""

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from controller.k8s_client import Api, connect_cluster
from rlaifv.store import open_store
from tests.cluster.conftest import ROOT, Cluster, say
from tests.cluster.kit import (
    SMALL,
    choices,
    controller,
    place_of,
    rows,
    said,
    start_controller,
    until,
)

STAGES = {
    "prepare", "sample", "claim", "verify", "pair", "reflogp", "train", "respond", "grade",
}  # fmt: skip
ITERATIONS = 2
"""A stage of a second may be missed once."""


class Runs:
    """A controller outside, its settings, and every Job that was ever seen."""

    def __init__(self, cluster: Cluster, folder: Path, root: str) -> None:
        self.cluster, self.folder, self.root = cluster, folder, root
        self.api = Api(connect_cluster)
        self.uids: dict[str, set[str]] = {}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, **stages: dict[str, Any]) -> subprocess.Popen[bytes]:
        settings = self.cluster.settings(stages=stages, start_timeout_s=60, poll_s=0.5)
        self.process = start_controller(
            self.cluster, self.folder, self.root, SMALL, iterations=ITERATIONS, settings=settings
        )
        return self.process

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stops(self, code: int, *words: str) -> None:
        """The controller ends with `code`; it and `status` say why."""
        assert self.process is not None
        assert self.process.wait(timeout=400) == code, said(self.folder)
        told = controller(self.folder, "status", "demo", "--root", self.root)
        for each in words:
            assert each in said(self.folder)
        assert words[-1] in told
        say(f"exit {code}, and status says: {words[-1]}")

    def until(self, true: Callable[[], Any], seconds: float = 300) -> Any:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if found := true():
                return found
            time.sleep(0.1)
        pytest.fail(said(self.folder) + self.cluster.kubectl("-n", "rlaifv", "get", "pods,events"))

    def jobs(self) -> list[dict[str, Any]]:
        """The run's Jobs; remembers their uids."""
        found = self.api.items("/apis/batch/v1/namespaces/rlaifv/jobs", labelSelector="rlaifv/run")
        for job in found:
            self.uids.setdefault(job["metadata"]["name"], set()).add(job["metadata"]["uid"])
        return found

    def running(self) -> dict[str, str]:
        """Name of a running pod by stage."""
        self.jobs()
        pods = self.api.items("/api/v1/namespaces/rlaifv/pods", labelSelector="rlaifv/run")
        return {
            place_of(pod)[1]: pod["metadata"]["name"]
            for pod in pods
            if "running" in (pod["status"].get("containerStatuses") or [{}])[0].get("state", {})
        }

    def running_pod(self, stage: str) -> str:
        return str(self.until(lambda: self.running().get(stage)))


@pytest.fixture
def runs(cluster: Cluster, bucket: str, tmp_path: Path) -> Iterator[Runs]:
    for name in ("10-identities.yaml", "20-network.yaml"):
        cluster.kubectl("apply", "-f", str(ROOT / "k8s" / name))
    found = Runs(cluster, tmp_path, f"{bucket}/chaos")
    yield found
    if found.process and found.process.poll() is None:
        found.kill()
    cluster.clear()


def test_chaos(cluster: Cluster, runs: Runs, tmp_path: Path) -> None:
    refusals(cluster, runs)
    struck = kills(cluster, runs)
    assert set(struck) == STAGES, struck
    evicted = evict(cluster, runs, tmp_path)
    pause(runs)
    assert runs.process is not None
    assert runs.process.wait(timeout=900) == 0, said(tmp_path)

    say("the same run, undisturbed, as local processes")
    words = ("run", "--iterations", str(ITERATIONS), "--root", str(tmp_path))
    controller(tmp_path, *words, "--config", "config.yaml")
    calm, run = open_store(str(tmp_path / "demo")), open_store(f"{runs.root}/demo")
    assert rows(run, ITERATIONS) == rows(calm, ITERATIONS)
    assert choices(run, ITERATIONS) == choices(calm, ITERATIONS)
    jobs = runs.jobs()
    assert all(len(uids) == 1 for uids in runs.uids.values()), runs.uids
    ends = [{c["type"] for c in job["status"]["conditions"]} for job in jobs]
    assert all(end & {"Complete", "Failed"} for end in ends)
    failed = sum("Failed" in end for end in ends)
    (of_evicted,) = [job for job in jobs if job["metadata"]["name"] == evicted]
    assert of_evicted["status"]["succeeded"] == of_evicted["spec"]["completions"], of_evicted
    say(
        f"{len(runs.uids)} Jobs, each created once; {failed} of them failed; rows are the calm run's"
    )


def refusals(cluster: Cluster, runs: Runs) -> None:
    """What the cluster refuses or ends: an image, a quota, memory, a deadline."""
    say("an image that cannot be pulled")
    runs.start(prepare={"image": "localhost/no-such-image:1"})
    runs.stops(1, "never started: image cannot be pulled: ErrImageNeverPull")

    say("no quota for pods, then too little memory")
    quota: dict[str, Any] = {"apiVersion": "v1", "kind": "ResourceQuota"}
    quota |= {"metadata": {"name": "none", "namespace": "rlaifv"}, "spec": {"hard": {"pods": "0"}}}
    cluster.kubectl("apply", "-f", "-", stdin=yaml.safe_dump(quota))
    runs.start(sample={"memory": "80Mi"})
    where = ("demo", "--root", runs.root, "--executor", "kubernetes", "--cluster", "cluster.yaml")
    runs.until(lambda: "exceeded quota: none" in said(runs.folder))
    assert "exceeded quota: none" in controller(runs.folder, "status", *where)
    cluster.kubectl("-n", "rlaifv", "delete", "resourcequota", "none")
    runs.stops(
        1,
        "out of memory at 80Mi; trying with twice that",
        "out of memory at 160Mi; twice the setting",
    )

    say("a deadline that is too small")
    runs.start(sample={"deadline_s": 3})
    runs.stops(124, "deadline exceeded: not done 3 s after it started")
    deleted = controller(runs.folder, "retry", *where[:3], *where[5:])
    assert "deleted Job" in deleted
    say(f"retry: {deleted.splitlines()[0]}")


def kills(cluster: Cluster, runs: Runs) -> dict[str, str]:
    """SIGKILL once to a pod of each stage, and to the controller while that stage runs."""
    struck: dict[str, str] = {}
    tried: set[str] = set()
    runs.start()
    while set(struck) != STAGES:
        assert runs.process is not None
        assert runs.process.poll() is None, said(runs.folder)
        for stage, pod in runs.running().items():
            if stage in struck or pod in tried:
                continue
            tried.add(pod)
            # The shell does not kill itself: it sleeps until its container is gone.
            words = ("-n", "rlaifv", "exec", pod, "--", "sh", "-c", "kill -9 -1; sleep 60")
            cluster.kubectl(*words, check=False)
            if exit_code(cluster, pod) != 137:  # it was faster
                continue
            struck[stage] = pod
            runs.kill()
            runs.start()
            say(f"killed {pod}, and the controller; {len(struck)} of {len(STAGES)} stages")
        time.sleep(0.1)
    return struck


def exit_code(cluster: Cluster, pod: str) -> int:
    """Of a pod that is about to end."""

    def ended() -> dict[str, Any]:
        (container,) = cluster.get("pod", pod)["status"]["containerStatuses"]
        return dict(container["state"].get("terminated", {}))

    return int(until(ended, 120, cluster)["exitCode"])


def evict(cluster: Cluster, runs: Runs, folder: Path) -> str:
    """An API-initiated eviction; the name of the Job that its pod is of."""
    body = folder / "eviction.json"

    def evicted() -> str:
        for victim in runs.running().values():
            eviction = {"apiVersion": "policy/v1", "kind": "Eviction"}
            body.write_text(json.dumps(eviction | {"metadata": {"name": victim}}))
            path = f"/api/v1/namespaces/rlaifv/pods/{victim}/eviction"
            told = cluster.kubectl("create", "--raw", path, "-f", str(body), check=False)
            if '"Success"' in told:
                say(f"evicted {victim}")
                return victim.rpartition("-")[0].rpartition("-")[0]  # <job>-<index>-<random>
        return ""

    return str(runs.until(evicted))


def pause(runs: Runs) -> None:
    """A controller is stopped, another takes the run, the first wakes up and ends."""
    paused = runs.process
    assert paused is not None
    paused.send_signal(signal.SIGSTOP)
    words, log = "run demo at", runs.folder / "said"
    before = log.read_text().count(words)
    runs.start()
    runs.until(lambda: log.read_text().count(words) > before)
    time.sleep(1)
    paused.send_signal(signal.SIGCONT)
    assert paused.wait(timeout=120) in (1, 75), said(runs.folder)
    say("a paused controller woke up late, and ended: " + said(runs.folder).splitlines()[-1])
