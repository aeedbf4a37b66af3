"""Artifacts by key under one root URI: absent or complete, first writer wins.

A *part* is a Parquet file of one record type with its provenance in the footer; a *tree* is a
folder of files with `_COMPLETE` written last; the rest is JSON. Credentials, atomicity,
validation, checksums and caches are hidden here.
"""

from rlaifv.store._local import LocalBackend, explain_os_error
from rlaifv.store._store import (
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
    "Backend",
    "FileInfo",
    "LocalBackend",
    "Manifest",
    "ObjectInfo",
    "PartInfo",
    "Provenance",
    "Store",
    "explain_os_error",
    "file_digest",
    "open_store",
]


def open_store(uri: str) -> Store:
    """The store at `uri`: a path, `file:///path` or `s3://bucket/prefix`.

    Raises ConfigError for any other scheme.
    """
    from rlaifv.store._open import open_backend  # keeps boto3 out of local runs

    return Store(open_backend(uri))
