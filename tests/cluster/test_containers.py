"""Stages as containers of this machine's engine, with the images that the cluster has."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from controller.executors.docker import SCRATCH
from rlaifv.store import Store, open_store
from tests.cluster.conftest import Cluster, say
from tests.cluster.kit import SMALL, controller, rows

ENGINE = ["--runtime", "runc", "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096"]
"""What podman needs inside a machine that is a container itself."""
STAGES = ["prepare", "sample", "claim"]


def test_containers_make_the_rows_of_local_processes(
    cluster: Cluster, local: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("podman") is None or not cluster.images["gpu"].startswith("localhost/"):
        pytest.skip("needs podman, with the images that this machine built")
    say("stages as containers: --executor docker, then `podman run` by hand")
    monkeypatch.setenv("RLAIFV_ENGINE_FLAGS", " ".join(ENGINE))
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(cluster.settings()))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**SMALL, "stages": STAGES}))
    words = ("run", "--iterations", "1", "--root", str(tmp_path), "--config", "config.yaml")
    controller(tmp_path, *words, "--executor", "docker", "--cluster", "cluster.yaml")
    run = open_store(str(tmp_path / "demo"))
    made, expected = rows(run, 1), rows(local, 1)
    assert {key.split("/")[1] for key in made} == {"instructions", "answers", "claims"}
    assert made == {key: expected[key] for key in made}

    part = min((tmp_path / "demo/iteration-0/claims").glob("*.parquet"))
    before = run.provenance(part.relative_to(tmp_path / "demo").as_posix())
    part.unlink()
    uri = (tmp_path / "demo").as_uri()
    by_hand = [
        "podman", "run", "--rm", *ENGINE, "--read-only", "--tmpfs", SCRATCH,
        "--user", f"{os.getuid()}:{os.getgid()}", "-v", f"{tmp_path}:{tmp_path}",
        "-e", "OMP_NUM_THREADS=1", cluster.images["gpu"],
        "jobs.claim", "--run", uri, "--iteration", "0", "--shard", "0/2",
    ]  # fmt: skip
    done = subprocess.run(by_hand, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    sys.stderr.write(done.stderr[-300:])
    after = run.provenance(part.relative_to(tmp_path / "demo").as_posix())
    assert after.rows_sha256 == before.rows_sha256
    assert after.started_at > before.started_at
