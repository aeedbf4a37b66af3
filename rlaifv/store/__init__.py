"""Artifacts by key under one root URI: absent or complete, first writer wins.

A *part* is a Parquet file of one record type with its provenance in the footer; a *tree* is a
folder of files with `_COMPLETE` written last; the rest is JSON. Credentials, atomicity,
validation, checksums and caches are hidden here.
"""

from pathlib import Path

from rlaifv.store._debris import Debris, debris, remove_debris
from rlaifv.store._doctor import Finding, check_before_run, probe
from rlaifv.store._local import LocalBackend, explain_os_error
from rlaifv.store._store import (
    COMPLETE,
    Backend,
    FileInfo,
    Manifest,
    ObjectInfo,
    PartInfo,
    Provenance,
    Store,
    file_digest,
)

__all__ = [
    "COMPLETE",
    "Backend",
    "Debris",
    "FileInfo",
    "Finding",
    "LocalBackend",
    "Manifest",
    "ObjectInfo",
    "PartInfo",
    "Provenance",
    "Store",
    "check_before_run",
    "debris",
    "explain_os_error",
    "file_digest",
    "local_copy",
    "open_store",
    "probe",
    "remove_debris",
]


def open_store(uri: str) -> Store:
    """The store at `uri`: a path, `file:///path` or `s3://bucket/prefix`.

    Raises ConfigError for any other scheme.
    """
    from rlaifv.store._open import open_backend  # keeps boto3 out of local runs

    return Store(open_backend(uri))


def local_copy(uri: str) -> Path:
    """The tree or the single object at an `s3://` URI, in the cache on the local disk.

    Raises ArtifactError when there is neither; a folder without `_COMPLETE` is not a tree.
    """
    from rlaifv.store._s3 import S3Backend

    root, _, key = uri.rstrip("/").rpartition("/")
    backend = S3Backend(root)
    store = Store(backend)
    return store.tree_path(key) if store.tree_exists(key) else backend.file_path(key)
