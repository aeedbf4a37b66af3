"""The files of a stored tree by their keys, none of them outside the tree."""

import hashlib
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import NamedTuple

from pydantic import BaseModel, ValidationError

from rlaifv.errors import ArtifactError
from rlaifv.store import COMPLETE, FileInfo, Store

BLOCK = 1 << 20


class TreeFile(NamedTuple):
    """One file: what the marker says of it, and the object that holds it."""

    info: FileInfo
    key: str


class Marker(BaseModel):
    """`_COMPLETE` with the places of files whose own name was taken (S3 only)."""

    files: list[FileInfo]
    at: dict[str, str] = {}


def tree_files(run: Store, tree: str) -> list[TreeFile]:
    """Raises ArtifactError for a tree that is absent, unfinished, or names a file outside it."""
    key = f"{tree}/{COMPLETE}"
    if not run.tree_exists(tree):
        raise ArtifactError(f"{run}/{tree}: no complete tree (no {COMPLETE})")
    try:
        marker = Marker.model_validate_json(run.read_bytes(key))
    except ValidationError as error:
        raise ArtifactError(f"{run}/{key}: not a valid marker") from error
    for name in [*(info.path for info in marker.files), *marker.at.values()]:
        path = PurePosixPath(name)
        if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name:
            raise ArtifactError(f"{run}/{key}: unsafe path {name!r}")
    return [
        TreeFile(info, f"{tree}/{marker.at.get(info.path, info.path)}") for info in marker.files
    ]


def blocks(run: Store, key: str) -> Iterator[bytes]:
    """An object's bytes, some at a time."""
    with run.backend.open(key) as stream:
        while block := stream.read(BLOCK):
            yield block


def check_file(run: Store, file: TreeFile) -> str:
    """What is wrong with the bytes of a tree's file; empty when nothing is."""
    digest, size = hashlib.sha256(), 0
    try:
        for block in blocks(run, file.key):
            digest.update(block)
            size += len(block)
    except ArtifactError as error:
        return str(error)
    if size != file.info.bytes:
        return f"{size} bytes, {COMPLETE} says {file.info.bytes}"
    if digest.hexdigest() != file.info.sha256:
        return f"SHA-256 {digest.hexdigest()}, {COMPLETE} says {file.info.sha256}"
    return ""
