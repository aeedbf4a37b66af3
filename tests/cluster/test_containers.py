"""Stages as containers of this machine's engine, with the images that the cluster has."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rlaifv.store import Store, open_store
from tests.cluster.conftest import ROOT, Cluster, say
from tests.cluster.kit import SMALL, controller, rows

ENGINE = ["--runtime", "runc", "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096"]
"""What podman needs inside a machine that is a container itself."""
DOCS = ROOT / "docs/kubernetes.md"
"""Its `docker run` is executed as it stands there."""
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
    root = tmp_path / "runs"
    words = ("run", "--iterations", "1", "--root", str(root), "--config", "config.yaml")
    controller(tmp_path, *words, "--executor", "docker", "--cluster", "cluster.yaml")
    run = open_store(str(root / "demo"))
    made, expected = rows(run, 1), rows(local, 1)
    assert {key.split("/")[1] for key in made} == {"instructions", "answers", "claims"}
    assert made == {key: expected[key] for key in made}

    key = "iteration-0/answers/00000-of-00002.parquet"
    before = run.provenance(key)
    (root / "demo" / key).unlink()
    (example,) = re.findall(r"^docker run .*?(?=\n```)", DOCS.read_text(), re.DOTALL | re.MULTILINE)
    by_hand = example.replace("docker run", " ".join(["podman", "run", *ENGINE]))
    by_hand = by_hand.replace("rlaifv-gpu:latest", cluster.images["gpu"])
    done = subprocess.run(["sh", "-c", by_hand], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    sys.stderr.write(f"{example}\n{done.stderr[-300:]}")
    after = run.provenance(key)
    assert after.rows_sha256 == before.rows_sha256
    assert after.started_at > before.started_at
