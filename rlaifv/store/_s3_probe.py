"""What the doctor asks an S3 server past the store's own ways."""

import base64
import datetime
import hashlib
import os
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING

from botocore.exceptions import ClientError

from rlaifv.store._doctor import Finding, read_probe, write_probe
from rlaifv.store._s3 import S3Backend
from rlaifv.store._s3_transfer import BLOCK, head
from rlaifv.store._store import Backend

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

DATA = b"the doctor's own checksum probe"
SKEW_SECONDS = 300.0
"""AWS refuses requests at 900 s."""
ATTEMPTS = 4
"""So that an endpoint that is down is reported within some seconds."""


def strict(backend: Backend) -> S3Backend:
    """The same place with conditional requests only, whatever mode the user has chosen."""
    if not isinstance(backend, S3Backend):
        raise TypeError(f"{backend.uri}: not on S3")
    settings = backend.bucket.settings
    attempts = min(ATTEMPTS, settings.attempts)
    return S3Backend(backend.uri, settings._replace(single_writer=False, attempts=attempts))


def is_single_writer(backend: Backend) -> bool:
    return isinstance(backend, S3Backend) and backend.bucket.settings.single_writer


def _multipart(backend: S3Backend, folder: str) -> Finding:
    data, key = os.urandom(BLOCK + 1), f"{folder}/large"  # two blocks
    if not write_probe(backend, key, data) or read_probe(backend, key) != data:
        return Finding("multipart", "fail", "a multipart upload does not come back as written")
    with backend.staging(key) as staged:
        source = Path(staged) / "large"
        source.write_bytes(data[::-1])
        again = backend.put_file_if_absent(key, source, look_first=False)
    if again or read_probe(backend, key) != data:
        return Finding("multipart", "fail", "put-if-absent is ignored when an upload is completed")
    if list(backend.uploads(folder)):
        return Finding("multipart", "fail", "an aborted upload is still there")
    return Finding("multipart", "ok", "the second of two uploads was refused, and is gone")


def _checksums(backend: S3Backend, folder: str) -> Finding:
    """Are SHA-256 checksums checked and returned, is metadata kept?"""
    key = f"{folder}/checksum"
    name, what = f"{backend.prefix}{key}", f"{backend.uri}/{key}"
    wrong = base64.b64encode(hashlib.sha256(b"other bytes").digest()).decode()

    def refused(client: "S3Client") -> bool:
        try:
            client.put_object(
                Bucket=backend.bucket.name, Key=f"{name}-wrong", Body=DATA, ChecksumSHA256=wrong
            )
        except ClientError:
            return True
        return False

    def returned(client: "S3Client") -> bool:
        bucket = backend.bucket.name
        client.put_object(Bucket=bucket, Key=name, Body=DATA, ChecksumAlgorithm="SHA256")
        answer = client.head_object(Bucket=bucket, Key=name, ChecksumMode="ENABLED")
        return "ChecksumSHA256" in answer

    backend.put(f"{key}-own", DATA)
    own = head(backend.bucket, f"{name}-own", what=what)
    if own is None or own.sha256 != hashlib.sha256(DATA).hexdigest():
        return Finding(
            "checksums", "note", "the server drops metadata: our SHA-256 is verified for trees only"
        )
    checked = backend.bucket.call(what, refused)
    kept = backend.bucket.call(what, returned)
    if checked and kept:
        return Finding("checksums", "ok", "our SHA-256 is kept; S3's own are checked and returned")
    return Finding(
        "checksums",
        "note",
        f"our SHA-256 is kept; S3's own are {'' if checked else 'not '}checked and "
        f"{'' if kept else 'not '}returned",
    )


def _clock(backend: S3Backend, folder: str) -> Finding:
    name = f"{backend.prefix}{folder}/once"
    answer = backend.bucket.call(
        f"{backend.uri}/{folder}/once",
        lambda client: client.head_object(Bucket=backend.bucket.name, Key=name),
    )
    there = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
    apart = abs((datetime.datetime.now(datetime.UTC) - there).total_seconds())
    text = f"{apart:.0f} s between this clock and the server's"
    return Finding("clock", "ok" if apart < SKEW_SECONDS else "fail", text)


CHECKS: dict[str, Callable[[S3Backend, str], Finding]] = {
    "multipart": _multipart,
    "checksums": _checksums,
    "clock": _clock,
}
