"""The programs and images that the development cluster runs: built once, kept outside the repository."""

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import machine
from machine import CACHE, ClusterError, say

HERE = Path(__file__).resolve().parent
VERSION = "v1.34.4"


def build() -> Path:
    """The Kubernetes programs and CoreDNS, built once per go.sum; returns their folder."""
    digest = hashlib.sha256()
    for name in ("cluster/go.mod", "cluster/go.sum", "dns/go.mod", "dns/go.sum"):
        digest.update((HERE / name).read_bytes())
    folder = CACHE / f"bin-{digest.hexdigest()[:12]}"
    if (folder / "_COMPLETE").exists():
        return folder
    if not shutil.which("go"):
        raise ClusterError("Go >= 1.24 is needed to build the Kubernetes programs")
    say("building Kubernetes and CoreDNS from Go modules (some 7 minutes on 2 cores, once) ...")
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    prefix = "k8s.io/component-base/version"
    major, minor, _ = VERSION.removeprefix("v").split(".")
    flags = {"gitVersion": VERSION, "gitMajor": major, "gitMinor": minor, "gitCommit": "unknown"}
    linker = "-s -w " + " ".join(f"-X {prefix}.{key}={value}" for key, value in flags.items())
    for module in ("cluster", "dns"):
        command = ["go", "build", "-ldflags", linker, "-o", f"{folder}/", "tool"]
        environment = os.environ | {"CGO_ENABLED": "0", "GOFLAGS": "-mod=mod -buildvcs=false"}
        for attempt in range(1, machine.TRIES + 1):  # a module that does not come down at once
            done = subprocess.run(command, cwd=HERE / module, env=environment, check=False)
            if done.returncode == 0:
                break
            if attempt == machine.TRIES:
                raise ClusterError(f"go build in k8s/dev/{module} ended with {done.returncode}")
            time.sleep(10 * attempt)
        say(f"built k8s/dev/{module} after {time.monotonic() - started:.0f} s")
    (folder / "_COMPLETE").touch()
    say(f"built in {time.monotonic() - started:.0f} s: {folder}")
    return folder


def kubectl() -> str:
    """The program: ours, or the machine's own where kind makes the cluster."""
    found = shutil.which("kubectl")
    return found if found and machine.kind_answers() else str(build() / "kubectl")


def setup() -> None:
    """All that takes long and is kept: packages, programs and, at the same time, images."""
    words = ["core", "eval", "gpu", "--tag", "test", "--attempts", "3"]
    kind = machine.kind_answers()
    if not kind:
        machine.need_all()
        machine.install_packages()
        words += ["--base", "debian"]
    log = CACHE / "images.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    say(f"building images (some 6 minutes, then layers are kept), log: {log} ...")
    with log.open("wb") as stream:
        images = subprocess.Popen(
            [sys.executable, str(HERE.parents[1] / "images/build.py"), *words],
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    try:
        if not kind:
            build()
        while images.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                images.wait(60)
            say(f"images: {time.monotonic() - started:.0f} s")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(images.pid, signal.SIGKILL)
    if images.returncode:
        raise ClusterError("images: " + log.read_text(errors="replace")[-4000:])
    built = [line for line in log.read_text(errors="replace").splitlines() if "built " in line]
    say(f"images are there after {time.monotonic() - started:.0f} s: {'; '.join(built)}")
