"""The demo on S3 servers: the rows of every artifact equal those of a run on the local disk."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlaifv.store import Store, open_store
from tests.s3servers import BUCKET, SECRET_KEY, Server, running, use

ITERATIONS = 4
ROOT = Path(__file__).parents[1]


def run_demo(root: str, folder: Path) -> str:
    """Every stage in a process of its own; returns what the command wrote."""
    command = [sys.executable, "-m", "controller", "run", "--root", root]
    done = subprocess.run(
        [*command, "--iterations", str(ITERATIONS)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def digests(run: Store) -> dict[str, str]:
    """What the rows of every part are, and what every tree holds."""
    found = {}
    for item in run.objects(""):
        if item.key.endswith(".parquet"):
            found[item.key] = run.provenance(item.key).rows_sha256
        elif item.key.endswith("/_COMPLETE"):
            tree = item.key.removesuffix("/_COMPLETE")
            found[tree] = run.tree_digest(tree)
    return found


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("local")
    run_demo(str(folder / "runs"), folder)
    return digests(open_store(str(folder / "runs/demo")))


@pytest.fixture(params=["versitygw", "ministack"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    with running(request.param, tmp_path / "server") as server:
        yield server


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_demo_on_s3_has_the_rows_of_the_local_run(
    server: Server, local: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use(server.endpoint, monkeypatch, tmp_path)
    said = run_demo(f"s3://{BUCKET}/runs", tmp_path)
    run = open_store(f"s3://{BUCKET}/runs/demo")
    assert digests(run) == local
    assert SECRET_KEY not in said
    for item in run.objects(""):
        assert SECRET_KEY.encode() not in run.read_bytes(item.key)
    for log in tmp_path.glob("runs/**/*.log"):
        assert SECRET_KEY not in log.read_text()
