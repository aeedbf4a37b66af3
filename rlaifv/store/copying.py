"""Artifacts from one run to another without moving their bytes through this machine.

Folders share files by hard links (artifacts are never changed in place); a bucket copies on its
own side. What is there already is left alone: first writer wins.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from rlaifv.errors import ArtifactError, ConfigError
from rlaifv.store._local import LocalBackend
from rlaifv.store._store import COMPLETE, FileInfo, Store

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

    from rlaifv.store._s3 import S3Backend

WHOLE_BYTES = 256 << 20
"""A larger object is copied in pieces of this size: one request must end before it times out."""


def copy_objects(source: Store, target: Store, keys: list[str]) -> None:
    """Single objects. Raises ConfigError for two stores of different kinds."""
    left, right = source.backend, target.backend
    if isinstance(left, LocalBackend) and isinstance(right, LocalBackend):
        for key in keys:
            right.put_file_if_absent(key, left.path / key)
        return
    from rlaifv.store._s3 import S3Backend
    from rlaifv.store._s3_client import THREADS

    if not isinstance(left, S3Backend) or not isinstance(right, S3Backend):
        raise ConfigError(f"{source} and {target}: cannot be copied from one to the other")
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda key: _copy_in_bucket(left, right, key), keys))


def copy_tree(source: Store, target: Store, tree: str) -> None:
    """A complete tree, the marker last. Raises ArtifactError when it is not complete."""
    if not source.tree_exists(tree):
        raise ArtifactError(f"{source}/{tree}: no complete tree (no {COMPLETE})")
    left, right = source.backend, target.backend
    if isinstance(left, LocalBackend) and isinstance(right, LocalBackend):
        _link_tree(left.path / tree, right, tree, source.tree_files(tree))
        return
    marker = f"{tree}/{COMPLETE}"
    keys = [item.key for item in source.objects(tree) if item.key != marker]
    copy_objects(source, target, keys)
    copy_objects(source, target, [marker])


def _link_tree(folder: Path, target: LocalBackend, tree: str, files: list[FileInfo]) -> None:
    with target.staging(tree) as outer:
        staged = outer / "tree"
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path != folder / COMPLETE:
                link = staged / path.relative_to(folder)
                link.parent.mkdir(parents=True, exist_ok=True)
                os.link(path, link)
        target.put_tree_if_absent(tree, staged, files)


def _copy_in_bucket(source: "S3Backend", target: "S3Backend", key: str) -> None:
    from boto3.s3.transfer import TransferConfig

    if target.size(key) is not None:
        return
    origin, name = f"{source.prefix}{key}", f"{target.prefix}{key}"
    config = TransferConfig(multipart_threshold=WHOLE_BYTES, multipart_chunksize=WHOLE_BYTES)

    def copy(client: "S3Client") -> None:
        found = client.head_object(Bucket=source.bucket.name, Key=origin)
        client.copy(
            {"Bucket": source.bucket.name, "Key": origin},
            target.bucket.name,
            name,
            # A copy in pieces would lose the digest that reads are verified against.
            ExtraArgs={"Metadata": found.get("Metadata", {}), "MetadataDirective": "REPLACE"},
            Config=config,
        )

    target.bucket.call(f"{target.uri}/{key}", copy)
