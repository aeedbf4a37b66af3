"""What is rendered, as golden files, and what the cluster's JSON means."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from controller.k8s_commands import render
from controller.k8s_manifest import Attempt, job_manifest, job_name
from controller.k8s_settings import ClusterSettings, read_settings
from controller.k8s_states import indices, look
from controller.plan import JobSpec, Planner, ShardState, every_job
from jobs._indexed import command
from rlaifv.errors import ConfigError
from rlaifv.pipeline import STAGES
from rlaifv.recipes import RECIPES
from tests.fake_world import tiny_config

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
GANG = ClusterSettings.model_validate(
    {"stages": {"train": {"nodes": 2, "gpus": 8}}, "queue": "research"}
)
Json = dict[str, Any]


def spec(stage: str, shards: tuple[int, ...], count: int, *, name: str = "tiny") -> JobSpec:
    argv = (f"jobs.{stage}", "--run", "s3://b/tiny", "--iteration", "0", "--shard", "{shard}")
    return JobSpec(f"{name}-0-{stage}", 0, STAGES[stage], argv, shards, count)


@pytest.mark.parametrize(
    ("name", "settings"), [("run", ClusterSettings()), ("gang", GANG)], ids=["run", "gang"]
)
def test_a_run_renders_as_it_did(name: str, settings: ClusterSettings) -> None:
    """After a wanted change: RLAIFV_GOLDEN=write pytest tests/test_kubernetes_manifests.py."""
    text = render(tiny_config(iterations=1), "s3://bucket/runs/tiny", settings)
    path = GOLDEN / f"{name}.yaml"
    if os.environ.get("RLAIFV_GOLDEN") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


def test_rendering_does_not_depend_on_the_hash_seed() -> None:
    outputs = set()
    for seed in ("1", "2"):
        words = [sys.executable, "-m", "controller", "render", "--root", "s3://b/r"]
        environment = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, check=True)
        outputs.add(done.stdout)
    assert len(outputs) == 1


def pods_of(folder: Path) -> list[Json]:
    """Every pod template below a folder of manifests."""
    found = []
    for path in sorted(folder.glob("*.yaml")):
        for one in yaml.safe_load_all(path.read_text()):
            if one and "template" in one.get("spec", {}):
                found.append(one["spec"]["template"]["spec"])
            if one and one["kind"] == "Job":
                assert "ttlSecondsAfterFinished" not in one["spec"], path
    return found


@pytest.mark.parametrize("folder", ["k8s", "k8s/s3", "tests/golden"])
def test_every_pod_keeps_to_the_restricted_profile_and_more(folder: str) -> None:
    pods = pods_of(ROOT / folder)
    assert pods
    for pod in pods:
        assert set(pod) <= {
            "restartPolicy", "serviceAccountName", "automountServiceAccountToken",
            "enableServiceLinks", "terminationGracePeriodSeconds", "activeDeadlineSeconds",
            "securityContext", "containers", "volumes", "subdomain",
        }  # fmt: skip
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["limits"]["memory"]
        for volume in pod["volumes"]:
            assert set(volume) - {"name"} <= {"emptyDir", "configMap"}


def test_applying_a_folder_needs_no_kustomization_and_holds_no_secret() -> None:
    kinds = [
        one["kind"]
        for path in sorted((ROOT / "k8s").glob("*.yaml"))
        for one in yaml.safe_load_all(path.read_text())
    ]
    assert kinds[0] == "Namespace"
    assert kinds[-1] == "Job"
    assert not {"Secret", "Kustomization"} & set(kinds)


def test_names_fit_whatever_the_run_is_called() -> None:
    long = spec("prepare", (0,), 1, name="a" * 40)
    name = job_name(long, 10)
    assert len(name) <= 52
    assert "-0-prepare-a10-" in name
    assert name != job_name(long._replace(shards=(1,)), 10)


@pytest.mark.parametrize(
    ("shards", "expected"),
    [
        ((0, 1, 2), ["jobs.sample", "$(JOB_COMPLETION_INDEX)/3"]),
        ((2,), ["jobs.sample", "2/3"]),
        ((0, 2), ["jobs._indexed", "{shard}"]),
    ],
)
def test_each_pod_knows_its_shard(shards: tuple[int, ...], expected: list[str]) -> None:
    job = job_manifest(spec("sample", shards, 3), ClusterSettings())
    words = job["spec"]["template"]["spec"]["containers"][0]["args"]
    assert [words[0], words[-1]] == expected
    assert job["spec"]["completions"] == len(shards)
    if words[0] == "jobs._indexed":
        found = [command(words[1:], index)[-1] for index in range(len(shards))]
        assert found == [f"{shard}/3" for shard in shards]


def test_more_memory_is_another_job_with_the_limit_doubled() -> None:
    first = job_manifest(spec("sample", (0,), 1), ClusterSettings())
    second = job_manifest(spec("sample", (0,), 1), ClusterSettings(), Attempt(2, 2))
    memory = [
        job["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"]
        for job in (first, second)
    ]
    assert memory == ["4Gi", "8Gi"]
    assert first["metadata"]["name"] != second["metadata"]["name"]


def test_stage_settings_are_laid_over_the_defaults() -> None:
    settings = ClusterSettings.model_validate(
        {
            "defaults": {"memory": "8Gi", "env": {"A": "1", "B": "1"}, "gpus": 1},
            "stages": {"pair": {"gpus": 0, "env": {"B": "2"}}},
        }
    )
    pair, sample = settings.of("pair"), settings.of("sample")
    assert (pair.memory, pair.gpus, pair.env) == ("8Gi", 0, {"A": "1", "B": "2"})
    assert (pair.image, sample.image) == ("rlaifv-core:latest", "rlaifv-gpu:latest")
    assert sample.gpus == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stages: {sampel: {cpu: '1'}}", r"stages\.sampel: expected prepare"),
        ("stages: {sample: {cpus: '1'}}", r"stages\.sample\.cpus"),
        ("stages: {sample: {nodes: 2}}", "only train has several nodes"),
        ("defaults: {memory: lots}", r"defaults\.memory"),
        ("- a", "not valid"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "cluster.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_settings(tmp_path / "cluster.yaml")


def test_the_examples_are_valid() -> None:
    settings = read_settings(ROOT / "k8s/examples/gpu-settings.yaml")
    assert settings.of("verify").gpus == 2
    (run,) = yaml.safe_load_all((ROOT / "k8s/30-run.yaml").read_text())
    ClusterSettings.model_validate(yaml.safe_load(run["data"]["cluster.yaml"]))


def test_ten_thousand_shards_are_rendered_in_a_second() -> None:
    config = RECIPES["llava15_7b"]()
    shards = config.shards.model_copy(update={"instructions": 10_000})
    planner = Planner(config.model_copy(update={"shards": shards}), "s3://b/r", "stage")
    jobs = [job_manifest(one, ClusterSettings()) for one in every_job(planner)]
    assert max(job["spec"]["completions"] for job in jobs) == 10_000


def test_lists_of_indices_are_read() -> None:
    assert indices("") == frozenset()
    assert indices("0,2-4,9") == {0, 2, 3, 4, 9}


def job_json(shards: tuple[int, ...], **status: Any) -> Json:
    job = job_manifest(spec("sample", shards, 9), ClusterSettings())
    return job | {"metadata": job["metadata"] | {"uid": "u"}, "status": status}


def pod_json(index: int, **status: Any) -> Json:
    notes = {"batch.kubernetes.io/job-completion-index": str(index)}
    return {"metadata": {"name": f"p{index}", "annotations": notes}, "spec": {}, "status": status}


def test_each_shard_has_its_own_state() -> None:
    unschedulable = {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": "0/1 nodes are available: 1 Insufficient cpu.",
    }
    running: list[Json] = [{"state": {"running": {}}}]
    pods = [
        pod_json(1, phase="Running", containerStatuses=running),
        pod_json(2, phase="Pending", conditions=[unschedulable]),
    ]
    sights = look(job_json((4, 5, 6), completedIndexes="0"), pods)
    assert {shard: one.state.phase for shard, one in sights.items()} == {
        4: "ended",
        5: "running",
        6: "waiting",
    }
    assert sights[6].state.reason.startswith("unschedulable: 0/1 nodes are available")


def test_a_pod_that_has_just_succeeded_waits_for_nothing() -> None:
    (sight,) = look(job_json((4,)), [pod_json(0, phase="Succeeded")]).values()
    assert sight.state == ShardState("running", 1)


def test_a_job_whose_pods_are_gone_still_says_why() -> None:
    failed = {
        "type": "Failed",
        "status": "True",
        "reason": "PodFailurePolicy",
        "message": "Container stage for pod rlaifv/x failed with exit code 78 matching FailJob",
    }
    (sight,) = look(job_json((0,), conditions=[failed]), []).values()
    assert (sight.state.phase, sight.state.exit_code) == ("ended", 78)
    late = failed | {"reason": "DeadlineExceeded", "message": "Job was active longer"}
    (sight,) = look(job_json((0,), conditions=[late]), []).values()
    assert sight.state.final
    assert json.dumps(sight.state.reason)
