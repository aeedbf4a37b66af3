"""Files to and from a bucket: put-if-absent, multipart, and many files at once in bounded memory."""

import base64
import hashlib
import os
import uuid
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from botocore.exceptions import ClientError

from rlaifv.errors import ArtifactError, TransientError
from rlaifv.store._s3_client import PIECE, THREADS, Bucket
from rlaifv.store._s3_errors import error_code
from rlaifv.store._s3_stream import DAMAGED_ATTEMPTS, DIGEST, Span, get_into

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

BLOCK = 16 << 20
"""Bytes of an upload part (in memory while it is sent) and of a download request (on the disk at
once); a larger file goes up as multipart."""
AHEAD = 8 * THREADS
"""Blocks of a download, on the disk, that may wait for their turn to be digested."""
MAX_BLOCKS = 10_000
"""Parts that S3 allows; for a file above 156 GiB the blocks grow."""
WRITER = "writer"
"""Metadata key: which attempt wrote an object, so that a 412 to our own request is recognised."""
EXISTS = ("PreconditionFailed", "412")


class Source(NamedTuple):
    """A local file to upload."""

    path: Path
    bytes: int
    sha256: str


class Wanted(NamedTuple):
    """An object to download."""

    name: str
    path: Path
    bytes: int
    sha256: str


class Head(NamedTuple):
    """What an object says of itself."""

    bytes: int
    sha256: str
    """As written by us; empty for an object of other origin."""
    writer: str
    etag: str


def head(bucket: Bucket, name: str, *, what: str) -> Head | None:
    """None when there is no such object."""

    def ask(client: "S3Client") -> Head | None:
        try:
            answer = client.head_object(Bucket=bucket.name, Key=name)
        except ClientError as error:
            if error_code(error) in ("404", "NoSuchKey"):
                return None
            # An answer to HEAD has no body, hence no reason; the same GET tells it.
            client.get_object(Bucket=bucket.name, Key=name, Range="bytes=0-0")["Body"].close()
            raise
        metadata = answer.get("Metadata", {})
        return Head(
            bytes=answer["ContentLength"],
            sha256=metadata.get(DIGEST, ""),
            writer=metadata.get(WRITER, ""),
            etag=answer["ETag"],
        )

    return bucket.call(what, ask)


def put_if_absent(
    bucket: Bucket, name: str, source: Source, *, what: str, pool: Executor | None = None
) -> bool:
    """True if this call created the object, also when only the answer to it was lost.

    A large file goes up in blocks on `pool` (or on threads of its own).
    """
    if bucket.settings.single_writer and head(bucket, name, what=what) is not None:
        return False
    writer = uuid.uuid4().hex
    if source.bytes <= BLOCK:
        created = _put(bucket, name, source, what=what, writer=writer)
    elif pool is not None:
        created = _Multipart(bucket, name, source, what=what).run(pool, writer)
    else:
        with ThreadPoolExecutor(THREADS) as threads:
            created = _Multipart(bucket, name, source, what=what).run(threads, writer)
    return created or _is_ours(bucket, name, writer, what=what)


def _put(bucket: Bucket, name: str, source: Source, *, what: str, writer: str) -> bool:
    data = source.path.read_bytes()
    metadata = {DIGEST: source.sha256, WRITER: writer}

    def send(client: "S3Client") -> bool:
        try:
            client.put_object(
                Bucket=bucket.name,
                Key=name,
                Body=data,
                IfNoneMatch="*",
                Metadata=metadata,
                **cast(Any, whole_checksum(bucket, source.sha256)),
            )
        except ClientError as error:
            if error_code(error) in EXISTS:
                return False
            raise
        return True

    return bucket.call(what, send)


def _is_ours(bucket: Bucket, name: str, writer: str, *, what: str) -> bool:
    """Whether an object that is there already is the one that this attempt wrote."""
    found = head(bucket, name, what=what)
    if found is None:
        raise TransientError(f"{what}: the server says that it exists, and that it does not")
    return found.writer == writer


def whole_checksum(bucket: Bucket, sha256: str) -> dict[str, str]:
    """S3's additional checksum of a whole body, in a header; a server without them ignores it."""
    if bucket.settings.request_checksums == "when_required":
        return {}
    return {"ChecksumSHA256": base64.b64encode(bytes.fromhex(sha256)).decode()}


class _Multipart:
    """One multipart upload: invisible until it is completed, by one conditional request."""

    def __init__(self, bucket: Bucket, name: str, source: Source, *, what: str) -> None:
        self._bucket, self._name, self._source, self._what = bucket, name, source, what
        self._block = max(BLOCK, -(-source.bytes // MAX_BLOCKS))

    def run(self, pool: Executor, writer: str) -> bool:
        """False when the object exists by the end; nothing is left behind then."""
        bucket, name = self._bucket, self._name
        upload, checked = self._begin({DIGEST: self._source.sha256, WRITER: writer})
        futures = [
            pool.submit(self._send, upload, number, checked=checked)
            for number in range(1, -(-self._source.bytes // self._block) + 1)
        ]
        try:
            parts = [future.result() for future in futures]
            created = self._complete(upload, parts)
        except BaseException:  # whatever ends it, no upload is left open
            for future in futures:
                future.cancel()
            abort(bucket, name, upload, what=self._what)
            raise
        if not created:
            abort(bucket, name, upload, what=self._what)
        return created

    def _begin(self, metadata: dict[str, str]) -> tuple[str, bool]:
        """The upload's id, and whether the server will check a CRC-32 of every part."""
        options: dict[str, Any] = {}
        if self._bucket.settings.request_checksums == "when_supported":
            options = {"ChecksumAlgorithm": "CRC32"}
        answer = self._bucket.call(
            self._what,
            lambda client: client.create_multipart_upload(
                Bucket=self._bucket.name, Key=self._name, Metadata=metadata, **options
            ),
        )
        return answer["UploadId"], answer.get("ChecksumAlgorithm") == "CRC32"

    def _send(self, upload: str, number: int, *, checked: bool) -> "CompletedPartTypeDef":
        with self._source.path.open("rb") as stream:
            stream.seek((number - 1) * self._block)
            data = stream.read(self._block)
        checksum: CompletedPartTypeDef = {}
        if checked:
            crc = zlib.crc32(data).to_bytes(4, "big")
            checksum = {"ChecksumCRC32": base64.b64encode(crc).decode()}
        answer = self._bucket.call(
            self._what,
            lambda client: client.upload_part(
                Bucket=self._bucket.name,
                Key=self._name,
                UploadId=upload,
                PartNumber=number,
                Body=data,
                **cast(Any, checksum),
            ),
        )
        return {"ETag": answer["ETag"], "PartNumber": number, **checksum}

    def _complete(self, upload: str, parts: Sequence["CompletedPartTypeDef"]) -> bool:
        def send(client: "S3Client") -> bool:
            try:
                client.complete_multipart_upload(
                    Bucket=self._bucket.name,
                    Key=self._name,
                    UploadId=upload,
                    MultipartUpload={"Parts": parts},
                    IfNoneMatch="*",
                )
            except ClientError as error:
                # NoSuchUpload: the answer to our first request was lost; the caller looks whose
                # object it is.
                if error_code(error) in (*EXISTS, "NoSuchUpload"):
                    return False
                raise
            return True

        return self._bucket.call(self._what, send)


def abort(bucket: Bucket, name: str, upload: str, *, what: str) -> None:
    """Frees the parts of an unfinished upload; nothing happens when there is none."""

    def send(client: "S3Client") -> None:
        try:
            client.abort_multipart_upload(Bucket=bucket.name, Key=name, UploadId=upload)
        except ClientError as error:
            if error_code(error) not in ("NoSuchUpload", "404"):
                raise

    bucket.call(what, send)


def download(bucket: Bucket, files: Iterable[Wanted], *, what: str) -> None:
    """Downloads and verifies files; one that arrives damaged is fetched again.

    Raises ArtifactError for a file whose SHA-256 is not the wanted one, however often it is asked
    for. Memory: `AHEAD` + 1 blocks.
    """
    left = list(files)
    for _ in range(DAMAGED_ATTEMPTS):
        left = _download_once(bucket, left, what=what)
        if not left:
            return
    raise ArtifactError(f"{what}: SHA-256 of {left[0].path.name} is not the one in the marker")


def _download_once(bucket: Bucket, files: Sequence[Wanted], *, what: str) -> list[Wanted]:
    """The files that arrived damaged.

    Blocks come in parallel; each file is digested in order from what the system still caches.
    """
    damaged = []
    for file in files:
        file.path.parent.mkdir(parents=True, exist_ok=True)
        with file.path.open("wb") as stream:
            if file.bytes:
                os.posix_fallocate(stream.fileno(), 0, file.bytes)  # a full disk shows now
    with ThreadPoolExecutor(THREADS) as pool:
        arrived = _in_order(pool, bucket, files, what=what)
        for file in files:
            digest, buffer = hashlib.sha256(), memoryview(bytearray(PIECE))
            with file.path.open("rb", buffering=0) as stream:
                for _ in range(0, file.bytes, BLOCK):
                    left = next(arrived)
                    while left and (count := stream.readinto(buffer[: min(left, PIECE)])):
                        digest.update(buffer[:count])
                        left -= count
            if digest.hexdigest() != file.sha256:
                damaged.append(file)
    return damaged


def _in_order(
    pool: Executor, bucket: Bucket, files: Sequence[Wanted], *, what: str
) -> Iterator[int]:
    """The size of every block of every file, once it is written; a bounded number is ahead."""

    def fetch(file: Wanted, start: int) -> int:
        size = min(BLOCK, file.bytes - start)
        with file.path.open("r+b", buffering=0) as target:
            get_into(bucket, file.name, target, Span(start, size), what=what)
        return size

    ahead: deque[Future[int]] = deque()
    try:
        for file in files:
            for start in range(0, file.bytes, BLOCK):
                ahead.append(pool.submit(fetch, file, start))
                if len(ahead) > AHEAD:
                    yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        for future in ahead:
            future.cancel()
