"""What a user does: `kubectl apply -f k8s/`, and the demo runs; also with the controller outside."""

import datetime
import itertools
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from rlaifv.config import RunConfig
from rlaifv.pipeline import CONFIG, manifest_key
from rlaifv.store import Manifest, Store, open_store
from tests.cluster.conftest import ROOT, Cluster, say
from tests.cluster.kit import (
    SMALL,
    choices,
    controller,
    ended,
    place_of,
    rows,
    said,
    start_controller,
    until,
)

PRODUCER = {
    "sample": "prepare",
    "claim": "sample",
    "verify": "claim",
    "pair": "verify",
    "reflogp": "pair",
    "train": "reflogp",
}
"""Stages that start when one other stage is complete."""


def controller_job(cluster: Cluster, *, seconds: float) -> dict[str, Any]:
    """The controller's Job once it has ended."""
    turns = itertools.count(1)

    def found() -> dict[str, Any]:
        job: dict[str, Any] = cluster.get("job", "rlaifv-controller")
        if next(turns) % 60 == 0:  # some 40 s
            say(controller_log(cluster, check=False).rstrip().rpartition("\n")[2])
        return job if ended(job) else {}

    job: dict[str, Any] = until(found, seconds, cluster)
    return job


def controller_log(cluster: Cluster, *, check: bool = True) -> str:
    return cluster.kubectl("-n", "rlaifv", "logs", "job/rlaifv-controller", check=check)


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
    cluster: Cluster, bucket: str, local: Store, tmp_path: Path
) -> None:
    trivial = mean(trivial_seconds(cluster, turn) for turn in range(3))
    folder = cluster.manifests(f"{bucket}/inside", SMALL)
    say("four iterations, controller in the cluster")
    cluster.kubectl("apply", "-f", str(folder))
    run = open_store(f"{bucket}/inside/demo")
    until(lambda: run.exists(CONFIG), 120, cluster)
    second = start_controller(cluster, tmp_path, f"{bucket}/inside", SMALL, iterations=4)
    assert second.wait(timeout=120) == 75, said(tmp_path)
    assert "another controller drives this run: process" in said(tmp_path)
    job = controller_job(cluster, seconds=1500)
    assert job["status"].get("succeeded") == 1, controller_log(cluster)
    again = cluster.kubectl("apply", "-f", str(folder))
    assert all(line.endswith("unchanged") for line in again.splitlines()), again
    other = cluster.kubectl("apply", "-f", str(cluster.manifests(f"{bucket}/other", SMALL)))
    changed = [line for line in other.splitlines() if not line.endswith("unchanged")]
    assert changed == ["configmap/rlaifv-run configured"]
    assert rows(run, 4) == rows(local, 4)
    assert choices(run, 4) == choices(local, 4)
    jobs = cluster.get("jobs", "-l", "app.kubernetes.io/component=stage")["items"]
    assert {one["metadata"]["annotations"]["rlaifv/attempt"] for one in jobs} == {"1"}
    config = run.read_json(CONFIG, RunConfig)
    assert len(jobs) == config.iterations * 13
    assert run.exists(manifest_key(3, "grades"))
    pods = cluster.get("pods", "-l", "app.kubernetes.io/component=stage")["items"]
    assert {image_of(pod) for pod in pods} == set(cluster.images.values())
    report_times(cluster, run, jobs, pods, trivial=trivial)
    cluster.clear()


def trivial_seconds(cluster: Cluster, turn: int) -> float:
    """From creation to `Complete` of a Job of our core image that does nothing."""
    (job,) = yaml.safe_load_all((ROOT / "k8s/40-controller.yaml").read_text())
    job["metadata"]["name"] = f"trivial-{turn}"
    pod = job["spec"]["template"]["spec"] | {"automountServiceAccountToken": False, "volumes": []}
    container = pod["containers"][0] | {"image": cluster.images["core"], "command": ["true"]}
    del container["args"], container["envFrom"], container["volumeMounts"]
    pod["containers"] = [container | {"imagePullPolicy": "Never"}]
    job["spec"]["template"]["spec"] = pod
    cluster.kubectl("apply", "-f", str(ROOT / "k8s/10-identities.yaml"))
    cluster.kubectl("create", "-f", "-", stdin=yaml.safe_dump(job))
    done = until(
        lambda: cluster.get("job", job["metadata"]["name"])["status"].get("completionTime"),
        300,
        cluster,
    )
    made = cluster.get("job", job["metadata"]["name"])["metadata"]["creationTimestamp"]
    return seconds_of(done) - seconds_of(made)


def image_of(pod: dict[str, Any]) -> str:
    return str(pod["spec"]["containers"][0]["image"])


def report_times(
    cluster: Cluster,
    run: Store,
    jobs: list[dict[str, Any]],
    pods: list[dict[str, Any]],
    *,
    trivial: float,
) -> None:
    """Prints the table of docs/kubernetes.md.

    Where a trivial Job takes 3 s, the controller must add less than 2 s to a stage; on a slower
    machine, as much more.
    """
    sys.stderr.write(controller_log(cluster)[-3000:])
    own: dict[str, list[float]] = {}
    for item in run.objects(""):
        if item.key.endswith("manifest.json"):
            manifest = run.read_json(item.key, Manifest)
            own.setdefault(manifest.stage, []).extend(part.seconds for part in manifest.parts)
    whole: dict[str, list[float]] = {}
    inside: dict[str, list[float]] = {}
    created: dict[tuple[str, str], float] = {}
    last_end: dict[tuple[str, str], float] = {}
    for job in jobs:
        begun = seconds_of(job["metadata"]["creationTimestamp"])
        created.setdefault(place_of(job), begun)
        whole.setdefault(place_of(job)[1], []).append(
            seconds_of(job["status"]["completionTime"]) - begun
        )
    for pod in pods:
        last = pod["status"]["containerStatuses"][0]["state"]["terminated"]
        finished = seconds_of(last["finishedAt"])
        last_end[place_of(pod)] = max(finished, last_end.get(place_of(pod), 0))
        inside.setdefault(place_of(pod)[1], []).append(finished - seconds_of(last["startedAt"]))
    say("stage: pods; mean seconds of the Job, of the container, of the stage itself")
    sys.stderr.write(f"| one that does nothing | 1 | {trivial:.1f} | | |\n")
    for stage, seconds in whole.items():
        means = [mean(seconds), mean(inside[stage]), mean(own[stage])]
        sys.stderr.write(f"| {stage} | {len(inside[stage])} | ")
        sys.stderr.write(" | ".join(f"{one:.1f}" for one in means) + " |\n")
    early = [
        last_end[job_place[0], "train"] - seconds_of(job["metadata"]["creationTimestamp"])
        for job in jobs
        if (job_place := place_of(job))[1] == "respond"
        and "-respond-0-" not in job["metadata"]["name"]
    ]
    earlier = [f"{one:.0f}" for one in early if one > 0]
    say(f"checkpoints answered before train ended, so many seconds earlier: {' '.join(earlier)}")
    gaps = [
        begun - last_end[iteration, PRODUCER[stage]]
        for (iteration, stage), begun in created.items()
        if stage in PRODUCER
    ]
    say(f"controller: a stage's Job is made {mean(gaps):.1f} s after its input's last pod ended")
    assert mean(gaps) < 2 * max(1.0, trivial / 3), gaps


def seconds_of(stamp: str) -> float:
    return datetime.datetime.fromisoformat(stamp).timestamp()


def test_a_controller_outside_does_the_same_also_after_a_cancel(
    cluster: Cluster, bucket: str, local: Store, tmp_path: Path
) -> None:
    say("one iteration, controller outside")
    root = f"{bucket}/outside"
    first = start_controller(cluster, tmp_path, root, SMALL)
    until(lambda: cluster.get("jobs", "-l", "rlaifv/stage=sample")["items"], 180, cluster)
    where = ("demo", "--root", root, "--cluster", "cluster.yaml")
    log = controller(tmp_path, "logs", *where, "--stage", "sample", "--shard", "1", "--follow")
    assert "sample" in log
    status = controller(tmp_path, "status", "demo", "--root", root, "--executor", "kubernetes")
    assert f"driven by process {first.pid} on" in status
    assert "Jobs ended" in controller(tmp_path, "cancel", *where)
    assert first.wait(timeout=120) == 1, said(tmp_path)
    assert "has taken over" in said(tmp_path)
    assert cluster.get("jobs", "-l", "app.kubernetes.io/component=stage")["items"] == []
    assert start_controller(cluster, tmp_path, root, SMALL).wait(timeout=900) == 0, said(tmp_path)
    run = open_store(f"{root}/demo")
    assert rows(run, 1) == rows(local, 1)
    assert choices(run, 1) == choices(local, 1)
    cluster.clear()
