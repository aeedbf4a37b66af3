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
        "--base", help="base image with python3 >= 3.11 (default: the Dockerfile's)"
    )
    parser.add_argument("--ca", help="extra CA bundle for the build only")
    parser.add_argument("--prefix", default="", help="registry and folder, such as ghcr.io/me/")
    parser.add_argument("--tag", default="latest")
    parser.add_argument(
        "--torch-backend", help="such as cpu or cu130; default: the package index's own"
    )
    flags = parser.parse_args()
    for name in flags.names:
        started = time.monotonic()
        done = subprocess.run(
            build_command(name, flags),
            cwd=ROOT,
            env=os.environ | {"DOCKER_BUILDKIT": "1"},
            check=False,
        )
        if done.returncode:
            return done.returncode
        sys.stdout.write(f"built rlaifv-{name}:{flags.tag} in {time.monotonic() - started:.0f} s\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
