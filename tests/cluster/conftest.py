"""A real cluster, its images and an S3 server: `make test-cluster`, not `make test`.

`KUBECONFIG` names the cluster to use; without it, k8s/dev/cluster.py starts one on this machine
and ends it afterwards, also when this process is killed. `RLAIFV_TEST_CORE`, `_EVAL` and `_GPU`
name images that the cluster has already; without them `rlaifv-core:test` and so on are loaded (`k8s/dev/cluster.py
setup` builds them). `RLAIFV_TEST_HOST` is an address of this machine that pods can reach.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import boto3
import pytest
import yaml

from controller.executors.launchers import _die_with_parent
from rlaifv.store import Store, open_store
from tests.s3servers import versitygw_program

ROOT = Path(__file__).parents[2]
DEV = ROOT / "k8s/dev"
sys.path.insert(0, str(DEV))  # whose files need nothing but Python
try:
    import machine  # type: ignore[import-not-found]
    import programs  # type: ignore[import-not-found]
finally:
    sys.path.remove(str(DEV))
KEYS = {"ROOT_ACCESS_KEY": "rlaifv", "ROOT_SECRET_KEY": "planted-for-tests"}
PORT = 7070
KINDS = ("core", "eval", "gpu")
SETTINGS: dict[str, Any] = {"namespace": "rlaifv", "defaults": {"cpu": "400m", "memory": "2Gi"}}
WANTED = os.environ.get("RLAIFV_TEST_CLUSTER")
"""`1`: make test-cluster; `chaos`: make test-chaos."""
if not WANTED:
    collect_ignore_glob = ["test_*.py"]
elif WANTED != "chaos":
    collect_ignore = ["test_chaos.py"]


class Cluster(NamedTuple):
    """A cluster with our images, and a bucket that its pods and we can reach."""

    images: Mapping[str, str]
    """core, eval and gpu."""
    endpoint: str
    folder: Path

    def kubectl(self, *words: str, stdin: str | None = None, check: bool = True) -> str:
        """What kubectl says, errors included."""
        done = subprocess.run(
            [_kubectl(), *words], input=stdin, capture_output=True, text=True, check=False
        )
        if check and done.returncode:
            pytest.fail(f"kubectl {' '.join(words)}: {done.stderr}{done.stdout}")
        return done.stdout + done.stderr

    def get(self, *words: str) -> Any:
        return json.loads(self.kubectl("-n", "rlaifv", "get", *words, "-o", "json"))

    def settings(self, **changes: Any) -> dict[str, Any]:
        """Cluster settings with our images."""
        return {**SETTINGS, "images": {**self.images, "pull_policy": "Never"}, **changes}

    def manifests(self, root: str, config: dict[str, Any], *, name: str = "demo") -> Path:
        """A copy of k8s/*.yaml with what a user sets there."""
        folder = self.folder / f"k8s-{time.monotonic_ns()}"
        folder.mkdir()
        for path in sorted((ROOT / "k8s").glob("*.yaml")):
            documents = list(yaml.safe_load_all(path.read_text()))
            for one in documents:
                if one["kind"] == "ConfigMap":
                    one["data"] |= {
                        "ROOT": root,
                        "NAME": name,
                        "config.yaml": yaml.safe_dump(config),
                        "cluster.yaml": yaml.safe_dump(self.settings()),
                    }
                if one["kind"] == "Job":
                    container = one["spec"]["template"]["spec"]["containers"][0]
                    container |= {"image": self.images["core"], "imagePullPolicy": "Never"}
            (folder / path.name).write_text(yaml.safe_dump_all(documents))
        return folder

    def clear(self) -> None:
        """Removes every Job, and waits until their pods are gone."""
        self.kubectl("-n", "rlaifv", "delete", "jobs,pods,leases", "--all", "--wait=true")


def say(text: str) -> None:
    """Progress, for whoever looks at a log of many minutes."""
    sys.stderr.write(f"\n[{time.strftime('%H:%M:%S')}] {text}\n")


def _kubectl() -> str:
    return os.environ.get("RLAIFV_TEST_KUBECTL") or str(programs.kubectl())


def cluster_py(*words: str) -> None:
    say(f"cluster.py {' '.join(words)}")
    done = subprocess.run([sys.executable, str(DEV / "cluster.py"), *words], check=False)
    if done.returncode:
        pytest.fail(f"k8s/dev/cluster.py {' '.join(words)} ended with {done.returncode}")


class Calm(NamedTuple):
    """A run on this machine that is under way."""

    process: subprocess.Popen[bytes]
    root: Path


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calm]:
    """`local` while it is made: it needs cores, and at the same time loading images needs the disk."""
    from tests.cluster.kit import SMALL, start_local

    root = tmp_path_factory.mktemp("local")
    with start_local(root, SMALL) as process:
        yield Calm(process, root)
        process.kill()


@pytest.fixture(scope="session")
def images(request: pytest.FixtureRequest) -> Iterator[Mapping[str, str]]:
    """core, eval and gpu, in the cluster that KUBECONFIG then names."""
    if WANTED != "chaos":
        request.getfixturevalue("calm")
    own = not os.environ.get("KUBECONFIG")
    try:
        if own:
            cluster_py("up", "--owner", str(os.getpid()))
            os.environ["KUBECONFIG"] = str(machine.kubeconfig())
        found = {}
        for kind in KINDS:
            found[kind] = os.environ.get(f"RLAIFV_TEST_{kind.upper()}", "")
            if not found[kind]:
                found[kind] = machine.image(kind)
                cluster_py("load", found[kind])
        yield found
    finally:
        if own:
            os.environ.pop("KUBECONFIG", None)
            cluster_py("down")


@pytest.fixture(scope="session")
def cluster(
    images: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """The cluster with an empty namespace, its Secret, and versitygw beside it."""
    folder = tmp_path_factory.mktemp("cluster")
    host = os.environ.get("RLAIFV_TEST_HOST") or machine.host()
    (folder / "s3/runs").mkdir(parents=True)
    command = [str(versitygw_program()), "--port", f"{host}:{PORT}", "--keep-alive", "--quiet"]
    with (folder / "s3.log").open("wb") as log:
        server = subprocess.Popen(
            [*command, "posix", str(folder / "s3")],
            env=os.environ | KEYS,
            stdout=log,
            stderr=log,
            preexec_fn=_die_with_parent,
        )
    found = Cluster(images, f"http://{host}:{PORT}", folder)
    try:
        found.kubectl("delete", "namespace", "rlaifv", "--ignore-not-found", "--timeout=120s")
        found.kubectl("apply", "-f", str(ROOT / "k8s/00-namespace.yaml"))
        give_secret(found)
        yield found
    finally:
        server.kill()
        server.wait()


def give_secret(cluster: Cluster) -> None:
    secret = yaml.safe_load((ROOT / "k8s/examples/s3-secret.yaml").read_text().split("---")[0])
    secret["stringData"] |= credentials(cluster)
    cluster.kubectl("apply", "-f", "-", stdin=yaml.safe_dump(secret))


def credentials(cluster: Cluster) -> dict[str, str]:
    """Of the bucket, as environment variables."""
    return {
        "AWS_ACCESS_KEY_ID": KEYS["ROOT_ACCESS_KEY"],
        "AWS_SECRET_ACCESS_KEY": KEYS["ROOT_SECRET_KEY"],
        "AWS_ENDPOINT_URL": cluster.endpoint,
        "AWS_REGION": "us-east-1",
    }


@pytest.fixture
def bucket(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """`s3://runs`, and our own environment set so that we can read it."""
    for name, value in credentials(cluster).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RLAIFV_CACHE", str(tmp_path / "cache"))
    client = boto3.session.Session(region_name="us-east-1").client(
        "s3", endpoint_url=cluster.endpoint
    )
    assert "runs" in [one["Name"] for one in client.list_buckets()["Buckets"]]
    return "s3://runs"


@pytest.fixture(scope="session")
def local(calm: Calm) -> Store:
    """The same run as local processes, one thread each."""
    say("the same run as local processes")
    assert calm.process.wait(timeout=1500) == 0, (calm.root / "said").read_text()[-3000:]
    return open_store(str(calm.root / "demo"))
