"""What killed writers left behind, for `gc`: nothing of it is ever read."""

import re
import time
from collections.abc import Iterator
from typing import Literal, NamedTuple

from rlaifv.store._store import COMPLETE, Store

TREE = re.compile(r"(.*?(?:^|/)(?:checkpoints|train_state)/step-\d+(?:-merged)?)/")
"""Keys of a run's trees begin like this."""


class Debris(NamedTuple):
    """One thing that may be removed once it is old enough that no writer can be at work on it."""

    kind: Literal["upload", "tree"]
    """A multipart upload that was never completed, or a tree without its marker."""
    key: str
    modified: float
    """Seconds since 1970: when it was begun, or its newest file was written."""
    num_bytes: int
    """0 for an upload: the server does not tell."""
    upload_id: str = ""


def debris(store: Store, prefix: str, *, older_than_seconds: float) -> list[Debris]:
    """Abandoned uploads and unfinished trees below `prefix` that nobody touched for that long."""
    latest = time.time() - older_than_seconds
    found = [*_uploads(store, prefix), *_unfinished_trees(store, prefix)]
    return [item for item in found if item.modified <= latest]


def remove_debris(store: Store, item: Debris) -> None:
    """Removes one; a tree that was completed in the meantime stays."""
    if item.kind == "tree":
        if not store.tree_exists(item.key):
            store.delete(item.key)
        return
    from rlaifv.store._s3 import S3Backend  # boto3 stays out of local runs

    if isinstance(store.backend, S3Backend):
        store.backend.abort(item.key, item.upload_id)


def _uploads(store: Store, prefix: str) -> Iterator[Debris]:
    if not store.backend.uri.startswith("s3://"):
        return
    from rlaifv.store._s3 import S3Backend

    if isinstance(store.backend, S3Backend):
        for upload in store.backend.uploads(prefix):
            started = upload.started.timestamp()
            yield Debris("upload", upload.key, started, 0, upload.upload_id)


def _unfinished_trees(store: Store, prefix: str) -> Iterator[Debris]:
    trees: dict[str, Debris] = {}
    complete: set[str] = set()
    for item in store.objects(prefix):
        match = TREE.match(item.key)
        if not match:
            continue
        tree = match[1]
        if item.key == f"{tree}/{COMPLETE}":
            complete.add(tree)
        so_far = trees.get(tree, Debris("tree", tree, 0.0, 0))
        trees[tree] = so_far._replace(
            modified=max(so_far.modified, item.modified),
            num_bytes=so_far.num_bytes + item.size_bytes,
        )
    yield from (found for tree, found in sorted(trees.items()) if tree not in complete)
