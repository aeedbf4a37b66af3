"""The development cluster's own code, as far as it needs no cluster."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "k8s/dev/cluster.py"
FAKE = """#!/bin/sh
echo "$(basename "$0") $*" >> "$CALLS"
"""


def run(folder: Path, *words: str, program: str = "kind") -> tuple[int, list[str]]:
    """Runs cluster.py where `docker` and `program` only write down how they are called."""
    for name in ("docker", program):
        path = folder / name
        path.write_text(FAKE)
        path.chmod(0o755)
    calls = folder / "calls"
    calls.write_text("")
    environment = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "CALLS": str(calls),
        "RLAIFV_DEV_CACHE": str(folder / "cache"),
    }
    done = subprocess.run([sys.executable, str(SCRIPT), *words], env=environment)
    return done.returncode, [x for x in calls.read_text().splitlines() if x != "docker info"]


def test_kind_makes_the_cluster_where_it_is(tmp_path: Path) -> None:
    code, calls = run(tmp_path, "up")
    assert code == 0
    config = tmp_path / "cache/kind.kubeconfig"
    create = f"kind create cluster --name rlaifv-dev --kubeconfig {config}"
    assert calls == ["kind get clusters", create]
    assert run(tmp_path, "load", "a:1")[1] == ["kind load docker-image --name rlaifv-dev a:1"]
    assert run(tmp_path, "down")[1] == ["kind delete cluster --name rlaifv-dev"]


def test_what_a_machine_lacks_is_said_in_one_line(tmp_path: Path) -> None:
    environment = {"PATH": str(tmp_path)}  # no Go
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "able"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    reason = "Go >= 1.24 is needed" if os.geteuid() == 0 else "root is needed"
    assert done.stderr.startswith(f"cluster: {reason}")
    assert done.stderr.count("\n") == 1
    assert run(tmp_path, "able") == (0, [])
    environment["KUBECONFIG"] = "/anything"
    assert subprocess.run([sys.executable, str(SCRIPT), "able"], env=environment).returncode == 0
