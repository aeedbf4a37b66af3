"""Builds the container images with docker, podman or buildah, whichever is there: `make images`."""

import argparse
import os
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
DEBIAN = "localhost/rlaifv-base:dev"


class Image(NamedTuple):
    """One image: what is installed, and what must import in it."""

    extras: str
    imports: str
    stages: str


IMAGES = {
    "core": Image("", "controller.__main__,jobs.pair,jobs.choose", "the controller, pair, choose"),
    "eval": Image(
        "eval",
        "jobs.prepare,jobs.claim,jobs.grade,spacy,nltk,openai,pycocotools.coco",
        "prepare, claim, grade",
    ),
    "gpu": Image(
        "eval,gpu",
        "jobs.sample,jobs.verify,jobs.reflogp,jobs.train,jobs.respond,jobs.merge,deepspeed,peft,transformers",
        "sample, verify, reflogp, train, respond, merge",
    ),
}


def build_command(name: str, flags: argparse.Namespace) -> list[str]:
    """The command line that builds one image."""
    image = IMAGES[name]
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    words = ["git", "rev-parse", "--short=12", "HEAD"]
    revision = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    arguments = {
        "EXTRAS": image.extras,
        "IMPORTS": image.imports,
        "VERSION": version,
        "REVISION": revision or "unknown",
        **({"BASE_IMAGE": flags.base} if flags.base else {}),
        **({"TORCH_BACKEND": flags.torch_backend} if flags.torch_backend else {}),
    }
    tool = next((each for each in ("docker", "podman", "buildah") if works(each)), None)
    if tool is None:
        raise SystemExit("images: docker, podman or buildah is needed, and none of them answers")
    command = [
        tool,
        "build",
        "-f",
        "images/Dockerfile",
        "-t",
        f"{flags.prefix}rlaifv-{name}:{flags.tag}",
    ]
    for key, value in arguments.items():
        command += ["--build-arg", f"{key}={value}"]
    if tool != "docker":  # rootless or nested engines have no namespaces of their own to give
        command += ["--isolation=chroot", "--network=host", "--format=docker"]
    if flags.ca:
        command += ["--secret", f"id=ca,src={flags.ca}"]
    return [*command, "."]


def works(tool: str) -> bool:
    """True when the tool is there and its engine answers."""
    if not shutil.which(tool):
        return False
    probe = [tool, "info"] if tool != "buildah" else [tool, "version"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(IMAGES), help=f"of {', '.join(IMAGES)}")
    parser.add_argument(
        "--base",
        help="base image with python3 >= 3.11 (default: the Dockerfile's); `debian`: one that "
        "images/base.sh makes of this machine's package sources, where no registry can be reached",
    )
    parser.add_argument(
        "--ca",
        default=os.environ.get("SSL_CERT_FILE"),
        help="extra CA bundle for the build only (default: $SSL_CERT_FILE)",
    )
    parser.add_argument("--prefix", default="", help="registry and folder, such as ghcr.io/me/")
    parser.add_argument("--tag", default="latest")
    parser.add_argument(
        "--torch-backend", help="such as cpu or cu130; default: the package index's own"
    )
    parser.add_argument(
        "--attempts", type=int, default=1, help="of each build: a mirror may fail for a moment"
    )
    flags = parser.parse_args()
    if flags.base == "debian":
        flags.base = DEBIAN
        probe = ["podman", "image", "exists", DEBIAN]
        if subprocess.run(probe, check=False).returncode and (
            code := run(["images/base.sh", DEBIAN], flags.attempts)
        ):
            return code
    for name in flags.names:
        started = time.monotonic()
        if code := run(build_command(name, flags), flags.attempts):
            return code
        sys.stdout.write(f"built rlaifv-{name}:{flags.tag} in {time.monotonic() - started:.0f} s\n")
    return 0


def run(command: list[str], attempts: int) -> int:
    """Runs a command until it succeeds, at most so often; returns its last exit code."""
    environment = os.environ | {"DOCKER_BUILDKIT": "1"}
    code = 1
    for attempt in range(attempts):
        time.sleep(10 * attempt)
        code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        if code == 0:
            break
    return code


if __name__ == "__main__":
    sys.exit(main())
