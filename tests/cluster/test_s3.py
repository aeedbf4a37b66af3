"""`k8s/s3/`, the S3 server for trying out: built, applied, and asked for all that a run relies on."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.cluster.conftest import ROOT, Cluster, cluster_py, give_secret, say
from tests.cluster.kit import ended, until
from tests.s3servers import versitygw_program

BASE, IMAGE = "localhost/rlaifv-base:dev", "localhost/versitygw:test"
MANIFEST = (ROOT / "k8s/s3/s3.yaml").read_text()


def build_image(folder: Path) -> None:
    shutil.copy(versitygw_program(), folder / "versitygw")
    command = ["podman", "build", "-f", str(ROOT / "images/s3.Dockerfile"), "-t", IMAGE]
    command += ["--build-arg", f"BASE_IMAGE={BASE}", "--isolation=chroot", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_s3_server_for_trying_out_keeps_what_a_run_relies_on(
    cluster: Cluster, tmp_path: Path
) -> None:
    if shutil.which("podman") is None or not cluster.images["core"].startswith("localhost/"):
        pytest.skip("needs podman, with the base image that this machine built")
    say("k8s/s3/: an S3 server in the cluster")
    build_image(tmp_path)
    cluster_py("load", IMAGE)
    (job,) = yaml.safe_load_all((ROOT / "k8s/40-controller.yaml").read_text())
    job["metadata"]["name"] = "doctor"
    (container,) = job["spec"]["template"]["spec"]["containers"]
    container |= {"image": cluster.images["core"], "imagePullPolicy": "Never"}
    container["args"] = ["controller", "doctor", "--root", "s3://runs/try"]
    for name in ("10-identities.yaml", "30-run.yaml"):
        cluster.kubectl("apply", "-f", str(ROOT / "k8s" / name))
    server = MANIFEST.replace("image: versitygw:latest", f"image: {IMAGE}")
    assert server != MANIFEST
    try:
        cluster.kubectl("apply", "-f", "-", stdin=server)
        cluster.kubectl("-n", "rlaifv", "rollout", "status", "deployment/s3", "--timeout=300s")
        cluster.kubectl("create", "-f", "-", stdin=yaml.safe_dump(job))
        end = until(lambda: ended(cluster.get("job", "doctor")), 300, cluster)
        said = cluster.kubectl("-n", "rlaifv", "logs", "job/doctor")
        assert end == "Complete", said
        say(said)
    finally:
        cluster.kubectl("delete", "-f", "-", stdin=server)
        give_secret(cluster)
        cluster.clear()
