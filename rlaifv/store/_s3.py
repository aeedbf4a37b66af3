"""The store's back end on an S3 bucket."""

import datetime
import hashlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, cast

from pydantic import BaseModel, ValidationError

from rlaifv.errors import ArtifactError, ConfigError
from rlaifv.store._cache import Cache
from rlaifv.store._s3_client import THREADS, Bucket, Settings
from rlaifv.store._s3_stream import DIGEST, S3Stream
from rlaifv.store._s3_transfer import (
    BLOCK,
    Source,
    Wanted,
    abort,
    download,
    head,
    put_if_absent,
    whole_checksum,
)
from rlaifv.store._store import (
    COMPLETE,
    FileInfo,
    ObjectInfo,
    file_digest,
    files_digest,
    write_marker,
)

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import (
        ListMultipartUploadsOutputTypeDef,
        ListObjectsV2OutputTypeDef,
    )

LARGE = 2
"""Large files uploaded at once, so that one's last blocks do not leave threads idle."""
PAGE = 1000
"""Keys per LIST call, S3's most."""


class Upload(NamedTuple):
    """A multipart upload that was begun and neither completed nor aborted."""

    key: str
    upload_id: str
    started: datetime.datetime


class _Marker(BaseModel):
    """`_COMPLETE` as this back end reads it."""

    files: list[FileInfo]
    at: dict[str, str] = {}
    """Where a file lies whose own name was taken by other bytes: path below the tree, by path."""


class S3Backend:
    """Keys are objects below `s3://bucket/prefix`; put-if-absent is one conditional request."""

    def __init__(self, uri: str, settings: Settings | None = None) -> None:
        """Nothing is asked of the server yet. Raises ConfigError for a URI without a bucket."""
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        if not bucket or "@" in bucket or ":" in bucket:
            raise ConfigError("s3://: expected s3://bucket/prefix, and credentials elsewhere")
        self.bucket = Bucket(bucket, settings or Settings.from_environment())
        self.prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self.uri = f"s3://{bucket}/{self.prefix}".rstrip("/")

    def _name(self, key: str) -> str:
        return f"{self.prefix}{key}"

    def _folder(self, prefix: str) -> str:
        return self._name(f"{prefix.strip('/')}/" if prefix.strip("/") else "")

    def _what(self, key: str) -> str:
        return f"{self.uri}/{key}"

    @contextmanager
    def staging(self, key: str) -> Iterator[Path]:
        """A temporary folder on the local disk (`TMPDIR`); removed afterwards."""
        folder = Path(tempfile.mkdtemp(prefix="rlaifv-"))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    # --- objects --------------------------------------------------------------------------

    def put_file_if_absent(self, key: str, source: Path, *, look_first: bool = True) -> bool:
        """Makes `source` the object, unless there is one already.

        `look_first` spares the upload of a large file; the conditional request is what decides.
        """
        size = source.stat().st_size
        if look_first and size > BLOCK and self.size(key) is not None:
            return False
        file = Source(source, size, file_digest(source))
        return put_if_absent(self.bucket, self._name(key), file, what=self._what(key))

    def put(self, key: str, data: bytes) -> None:
        """Writes or replaces an object atomically."""
        digest = hashlib.sha256(data).hexdigest()
        self.bucket.call(
            self._what(key),
            lambda client: client.put_object(
                Bucket=self.bucket.name,
                Key=self._name(key),
                Body=data,
                Metadata={DIGEST: digest},
                **cast(Any, whole_checksum(self.bucket, digest)),
            ),
        )

    def open(self, key: str) -> BinaryIO:
        """A seekable stream of ranged requests; ArtifactError when there is no such object."""
        return cast(BinaryIO, S3Stream(self.bucket, self._name(key), what=self._what(key)))

    def size(self, key: str) -> int | None:
        """Bytes of an object; None when there is none."""
        found = head(self.bucket, self._name(key), what=self._what(key))
        return found.bytes if found else None

    def objects(self, prefix: str) -> Iterator[ObjectInfo]:
        """Objects below the folder `prefix`, sorted; one LIST call per 1,000.

        Files of trees that have no marker yet are among them.
        """
        for page in self._pages(self._folder(prefix)):
            for item in page.get("Contents", []):
                key = item["Key"].removeprefix(self.prefix)
                yield ObjectInfo(key, item["Size"], item["LastModified"].timestamp())

    def folders(self, prefix: str) -> list[str]:
        """Names of the folders directly below `prefix`, sorted; what lies in them costs nothing."""
        folder = self._folder(prefix)
        found = [
            item["Prefix"].removeprefix(folder).rstrip("/")
            for page in self._pages(folder, Delimiter="/")
            for item in page.get("CommonPrefixes", [])
        ]
        return sorted(found)

    def _pages(self, folder: str, **options: Any) -> "Iterator[ListObjectsV2OutputTypeDef]":
        """One LIST call per `PAGE` keys."""
        where: dict[str, Any] = {"Bucket": self.bucket.name, "Prefix": folder, "MaxKeys": PAGE}
        while True:
            page = self.bucket.call(
                f"s3://{self.bucket.name}/{folder}",
                lambda client: client.list_objects_v2(**where, **options),
            )
            yield page
            if not page["IsTruncated"]:
                return
            where["ContinuationToken"] = page["NextContinuationToken"]

    def delete(self, key: str) -> None:
        """Removes an object or a tree; nothing happens when there is none."""
        self._delete_object(f"{key}/{COMPLETE}")  # first, so that the tree is gone at once
        with ThreadPoolExecutor(THREADS) as pool:
            doomed = [key, *(item.key for item in self.objects(key))]
            list(pool.map(self._delete_object, doomed))

    def _delete_object(self, key: str) -> None:
        name = self._name(key)
        self.bucket.call(
            self._what(key),
            lambda client: client.delete_object(Bucket=self.bucket.name, Key=name),
        )

    def sweep(self, prefix: str) -> None:
        """Nothing: writers on other machines may be at work. `uploads` and `abort` are for gc."""

    # --- multipart uploads that nobody finished -------------------------------------------

    def uploads(self, prefix: str) -> Iterator[Upload]:
        """Unfinished multipart uploads below the folder `prefix`: debris, or still going on."""
        folder = self._folder(prefix)
        key_marker = id_marker = ""
        while True:
            page = self._uploads_page(folder, key_marker, id_marker)
            for item in page.get("Uploads", []):
                key = item["Key"].removeprefix(self.prefix)
                yield Upload(key, item["UploadId"], item["Initiated"])
            if not page.get("IsTruncated"):
                return
            key_marker = page.get("NextKeyMarker", "")
            id_marker = page.get("NextUploadIdMarker", "")

    def _uploads_page(
        self, folder: str, key_marker: str, id_marker: str
    ) -> "ListMultipartUploadsOutputTypeDef":
        return self.bucket.call(
            f"s3://{self.bucket.name}/{folder}",
            lambda client: client.list_multipart_uploads(
                Bucket=self.bucket.name,
                Prefix=folder,
                KeyMarker=key_marker,
                UploadIdMarker=id_marker,
            ),
        )

    def abort(self, key: str, upload_id: str) -> None:
        """Frees what an unfinished upload holds."""
        abort(self.bucket, self._name(key), upload_id, what=self._what(key))

    # --- trees ----------------------------------------------------------------------------

    def put_tree_if_absent(self, key: str, folder: Path, files: Iterable[FileInfo]) -> bool:
        """Uploads a staged folder, the marker last; False if another tree was complete first.

        No object is ever overwritten, so that two writers cannot mix their files: a file whose
        name is taken by the same bytes is done already (this is how a retry resumes), by other
        bytes (a writer that was killed, or is still at work) goes to `<digest>/<path>` below the
        tree, and the marker says so.
        """
        if self.size(f"{key}/{COMPLETE}") is not None:
            return False
        infos: list[FileInfo] = []
        places: dict[str, Future[str]] = {}
        with ThreadPoolExecutor(THREADS) as pool, ThreadPoolExecutor(LARGE) as few:
            for info in files:
                infos.append(info)
                if info.bytes <= BLOCK:
                    places[info.path] = pool.submit(self._place, key, folder, info)
                else:  # its blocks take the pool's threads
                    places[info.path] = few.submit(self._place, key, folder, info, pool)
            found = {path: place.result() for path, place in places.items()}
        at = {path: place for path, place in found.items() if place != path}
        write_marker(folder / COMPLETE, infos, at)
        won = self.put_file_if_absent(f"{key}/{COMPLETE}", folder / COMPLETE)
        if won:
            for path in at:  # not ours, and no longer anybody's
                self._delete_object(f"{key}/{path}")
        return won

    def _place(self, key: str, folder: Path, info: FileInfo, pool: Executor | None = None) -> str:
        """Where below the tree the file is, after making sure that it is there."""
        source = Source(folder / info.path, info.bytes, info.sha256)
        for place in (info.path, f"{info.sha256[:16]}/{info.path}"):
            name, what = self._name(f"{key}/{place}"), self._what(f"{key}/{place}")
            found = head(self.bucket, name, what=what)
            if found is None and put_if_absent(self.bucket, name, source, what=what, pool=pool):
                return place
            found = found or head(self.bucket, name, what=what)
            if found and (found.bytes, found.sha256) == (info.bytes, info.sha256):
                return place
        raise ArtifactError(f"{what}: is there already, with other bytes; remove it")

    def file_path(self, key: str) -> Path:
        """A single object on the local disk; raises ArtifactError when there is none."""
        found = head(self.bucket, self._name(key), what=self._what(key))
        if found is None:
            raise ArtifactError(
                f"{self._what(key)}: no such object, and no complete tree (no {COMPLETE}) either"
            )
        file_name = Path(key).name
        content = found.sha256 or f"{self.uri}/{key} {found.etag}"
        identity = hashlib.sha256(f"{content} {file_name}".encode()).hexdigest()

        def fill(folder: Path) -> None:
            with self.open(key) as stream, (folder / file_name).open("wb") as target:
                shutil.copyfileobj(stream, target, BLOCK)
            if found.sha256 and file_digest(folder / file_name) != found.sha256:
                raise ArtifactError(f"{self._what(key)}: SHA-256 is not the one it came with")

        return Cache.from_environment().entry(identity, found.bytes, fill=fill) / file_name

    def tree_path(self, key: str) -> Path:
        """The tree on the local disk, every file's SHA-256 verified when it was downloaded."""
        with self.open(f"{key}/{COMPLETE}") as stream:
            text = stream.read()
        try:
            marker = _Marker.model_validate_json(text)
        except ValidationError as error:
            raise ArtifactError(f"{self._what(key)}/{COMPLETE}: not a valid marker") from error
        for info in marker.files:
            if Path(info.path).is_absolute() or ".." in Path(info.path).parts:
                raise ArtifactError(f"{self._what(key)}/{COMPLETE}: unsafe path {info.path!r}")

        def fill(folder: Path) -> None:
            files = [
                Wanted(
                    name=self._name(f"{key}/{marker.at.get(info.path, info.path)}"),
                    path=folder / info.path,
                    bytes=info.bytes,
                    sha256=info.sha256,
                )
                for info in marker.files
            ]
            download(self.bucket, files, what=self._what(key))

        size = sum(info.bytes for info in marker.files)
        return Cache.from_environment().entry(files_digest(marker.files), size, fill=fill)
