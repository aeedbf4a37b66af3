"""A seekable stream over an object: ranged GETs with read-ahead, so that no part is read whole."""

import hashlib
import io
import re
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from botocore.exceptions import ClientError

from rlaifv.errors import ArtifactError
from rlaifv.store._s3_client import Bucket
from rlaifv.store._s3_errors import error_code

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

TAIL = 64 << 10
"""Bytes of the first request, from the end: size, metadata and a Parquet footer in one go."""
READ_AHEAD = 8 << 20
"""Least bytes of a later request; an object up to this size comes whole, its digest is checked."""
DIGEST = "sha256"
"""Metadata key of an object's own digest, written with it."""
DAMAGED_ATTEMPTS = 3


class _Piece(NamedTuple):
    """What a GET brought."""

    start: int
    data: bytes
    size: int
    """Of the whole object."""
    etag: str
    digest: str
    """SHA-256 as written by us; empty for an object of other origin."""


class S3Stream(io.RawIOBase):
    """Memory: one window of `READ_AHEAD`, or as much as a single `read` asks for."""

    def __init__(self, bucket: Bucket, name: str, *, what: str) -> None:
        """Raises ArtifactError when there is no object `name`; `what` is its URI."""
        super().__init__()
        self._bucket, self._name, self._what = bucket, name, what
        self._window = self._checked(f"bytes=-{TAIL}")
        self._size, self._etag = self._window.size, self._window.etag
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        """As files do: fewer bytes than asked for only at the end."""
        left = max(0, self._size - self._position)
        wanted = left if size is None or size < 0 else min(size, left)
        if not wanted:
            return b""
        start = self._position - self._window.start
        if start < 0 or start + wanted > len(self._window.data):
            self._move_window(wanted)
            start = self._position - self._window.start
        self._position += wanted
        return self._window.data[start : start + wanted]

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _move_window(self, wanted: int) -> None:
        if self._size <= READ_AHEAD:
            first, last = 0, self._size - 1
        else:
            first = self._position
            last = min(self._size, first + max(wanted, READ_AHEAD)) - 1
        piece = self._checked(f"bytes={first}-{last}")
        if piece.etag != self._etag:
            raise ArtifactError(f"{self._what}: was replaced while it was being read")
        self._window = piece

    def _checked(self, span: str) -> _Piece:
        """A piece; one that is the whole object must have the digest it was written with."""
        for _ in range(DAMAGED_ATTEMPTS):
            piece = get(self._bucket, self._name, span=span, what=self._what)
            whole = len(piece.data) == piece.size
            if not (whole and piece.digest):
                return piece
            if hashlib.sha256(piece.data).hexdigest() == piece.digest:
                return piece
        raise ArtifactError(f"{self._what}: its SHA-256 is not the one it was written with")


def get(bucket: Bucket, name: str, *, span: str, what: str) -> _Piece:
    """The bytes of one Range header's value; the whole object where the server ignores ranges."""

    def fetch(client: "S3Client") -> _Piece:
        try:
            answer = client.get_object(Bucket=bucket.name, Key=name, Range=span)
        except ClientError as error:
            if error_code(error) not in ("InvalidRange", "416"):
                raise
            answer = client.get_object(Bucket=bucket.name, Key=name)  # an empty object
        data = bucket.read(answer["Body"], answer["ContentLength"])
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.get("ContentRange", ""))
        start, size = (int(found[1]), int(found[2])) if found else (0, len(data))
        digest = answer.get("Metadata", {}).get(DIGEST, "")
        return _Piece(start, data, size, answer["ETag"], digest)

    return bucket.call(what, fetch)


class Span(NamedTuple):
    """A piece of an object."""

    start: int
    bytes: int


def get_into(bucket: Bucket, name: str, target: BinaryIO, span: Span, *, what: str) -> None:
    """Writes a span of an object to the same place of a file, `PIECE` bytes in memory at a time.

    Raises ArtifactError when the object ends before.
    """

    def fetch(client: "S3Client") -> None:
        last = span.start + span.bytes - 1
        try:
            answer = client.get_object(
                Bucket=bucket.name, Key=name, Range=f"bytes={span.start}-{last}"
            )
        except ClientError as error:
            if error_code(error) not in ("InvalidRange", "416"):
                raise
            raise ArtifactError(f"{what}: {name} ends before byte {last}") from error
        if answer["ContentLength"] != span.bytes:
            raise ArtifactError(f"{what}: {name} ends before byte {last}, or ranges are ignored")
        target.seek(span.start)
        bucket.pour(answer["Body"], span.bytes, target.write)

    bucket.call(what, fetch)
