"""`Store`: typed parts, JSON and trees over a back end."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NamedTuple, Protocol, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rlaifv.errors import ArtifactError
from rlaifv.records import Record, arrow_schema, parse_rows, to_table

log = logging.getLogger(__name__)
COMPLETE = "_COMPLETE"
"""Name of a tree's marker: JSON with every file's size and SHA-256, written last."""
PROVENANCE = b"rlaifv"
"""Footer key of a part's provenance."""
ROWS_PER_GROUP = 256
"""Rows per Parquet row group: some 30 MB of photographs."""
DIGEST_THREADS = 2
"""Files digested at once; each is a thread at some 1 GB/s."""

R = TypeVar("R", bound=Record)
M = TypeVar("M", bound=BaseModel)


class ObjectInfo(NamedTuple):
    """One object of a listing."""

    key: str
    size_bytes: int
    modified: float = 0.0
    """Seconds since 1970, UTC; by the store's clock."""


class Provenance(Record):
    """Where a part comes from; lies in its footer, so data and provenance are one object."""

    stage: str
    run: str
    iteration: int
    shard: str
    code_version: str
    image: str = ""
    """Container image with digest, when the launcher knows it."""
    config_sha256: str
    inputs: dict[str, str]
    """Digest of each input part's rows, or of a tree's or file's bytes, by key."""
    rows: int = 0
    quarantined: int = 0
    rows_sha256: str = ""
    """Digest of the rows alone: equal for equal rows, whenever they were written."""
    seconds: float = 0.0
    started_at: str = ""
    """UTC, ISO 8601."""
    seed: int
    threads: int = 0
    notes: dict[str, str] = Field(default_factory=dict)
    """What a stage records besides: batch sizes, models, prompts, engines."""


class PartInfo(Record):
    """A part as a manifest lists it."""

    key: str
    rows: int
    bytes: int
    sha256: str
    rows_sha256: str
    quarantined: int
    seconds: float


class Manifest(Record):
    """The controller's summary of a complete stage; readers do not need it."""

    stage: str
    parts: list[PartInfo]


class FileInfo(BaseModel):
    """One file of a tree."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: str
    bytes: Annotated[int, Field(ge=0)]
    sha256: str


class Backend(Protocol):
    """What a place to store things must offer; keys are relative, `/`-separated."""

    @property
    def uri(self) -> str: ...
    def staging(self, key: str) -> Any: ...
    def put_file_if_absent(self, key: str, source: Path) -> bool: ...
    def put(self, key: str, data: bytes) -> None: ...
    def put_tree_if_absent(self, key: str, folder: Path, files: "Iterable[FileInfo]") -> bool: ...
    def tree_path(self, key: str) -> Path: ...
    def open(self, key: str) -> BinaryIO: ...
    def size(self, key: str) -> int | None: ...
    def objects(self, prefix: str) -> Iterator[ObjectInfo]: ...
    def folders(self, prefix: str) -> list[str]: ...
    def delete(self, key: str) -> None: ...
    def sweep(self, prefix: str) -> None: ...


class Store:
    """Typed artifacts of one root. Every write is atomic; a read validates what it reads."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def __str__(self) -> str:
        return self.backend.uri

    # --- any object -----------------------------------------------------------------------

    def exists(self, key: str) -> bool:
        return self.backend.size(key) is not None

    def objects(self, prefix: str) -> Iterator[ObjectInfo]:
        """Objects below the folder `prefix`, sorted by key; one listing however many parts."""
        return self.backend.objects(prefix)

    def folders(self, prefix: str) -> list[str]:
        """Names directly below the folder `prefix`, sorted; what lies in them is not listed."""
        return self.backend.folders(prefix)

    def delete(self, key: str) -> None:
        self.backend.delete(key)

    def sweep(self) -> None:
        """Removes what killed writers left behind; only while nothing else writes to the run."""
        self.backend.sweep("")

    def read_bytes(self, key: str) -> bytes:
        """Raises ArtifactError when there is no such object."""
        with self.backend.open(key) as stream:
            return stream.read()

    def write_bytes(self, key: str, data: bytes) -> None:
        """Replaces atomically; for reports and other things that are not artifacts."""
        self.backend.put(key, data)

    def read_json(self, key: str, model: type[M]) -> M:
        """Raises ArtifactError naming key and field when it is missing or not a `model`."""
        try:
            return model.model_validate_json(self.read_bytes(key))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "(whole)"
            raise ArtifactError(f"{self}/{key}: field {field}: {first['msg']}") from error

    def write_json_once(self, key: str, value: BaseModel) -> bool:
        """True if this call created the object, False if there was one already."""
        with self.backend.staging(key) as folder:
            source = folder / "value.json"
            source.write_text(value.model_dump_json(indent=1) + "\n")
            return self.backend.put_file_if_absent(key, source)

    # --- parts ----------------------------------------------------------------------------

    def write_part(
        self, key: str, rows: Iterable[R], *, record: type[R], origin: Callable[[], Provenance]
    ) -> bool:
        """Streams rows into one Parquet object; False if it was there already (ours is dropped).

        `origin` is called when `rows` is exhausted; counts and the digest of the rows are filled
        in. When `rows` raises, nothing is left behind.
        """
        with self.backend.staging(key) as folder:
            source = folder / "part.parquet"
            _write_parquet(source, rows, record=record, origin=origin)
            return self.backend.put_file_if_absent(key, source)

    def read_part(self, key: str, record: type[R]) -> Iterator[R]:
        """Rows of a part, one row group in memory at a time.

        Raises ArtifactError when it is missing, cut, corrupt (page checksums are verified), has
        other columns, or holds a bad row.
        """
        with self.backend.open(key) as stream:
            file = self._open_parquet(key, stream)
            expected, actual = arrow_schema(record), file.schema_arrow
            for field in expected:
                if field.name not in actual.names:
                    raise ArtifactError(f"{self}/{key}: column {field.name!r} is missing")
                found = actual.field(field.name).type
                if found != field.type:
                    raise ArtifactError(
                        f"{self}/{key}: column {field.name!r} has type {found}, "
                        f"expected {field.type}"
                    )
            start = 0
            for group in range(file.num_row_groups):
                values = self._row_group(key, file, group, expected.names)
                yield from parse_rows(record, values, file=f"{self}/{key}", start=start)
                start += len(values)

    def read_columns(
        self,
        key: str,
        names: Sequence[str],
        *,
        groups: Sequence[int] | None = None,
        at_once: int = 1,
    ) -> Iterator[pa.Table]:
        """Some columns of a part, so many row groups at a time, their values not validated.

        For statistics over parts too large to become records; `groups` are the numbers of the
        only row groups wanted. Raises ArtifactError like `read_part`, but for bad rows.
        """
        with self.backend.open(key) as stream:
            file = self._open_parquet(key, stream)
            if missing := sorted(set(names) - set(file.schema_arrow.names)):
                raise ArtifactError(f"{self}/{key}: column {missing[0]!r} is missing")
            wanted = list(range(file.num_row_groups) if groups is None else groups)
            for start in range(0, len(wanted), at_once):
                some = wanted[start : start + at_once]
                try:
                    yield file.read_row_groups(some, columns=list(names))
                except (pa.ArrowException, OSError) as error:
                    raise ArtifactError(f"{self}/{key}: row groups {some}: {error}") from error

    def _row_group(
        self, key: str, file: pq.ParquetFile, group: int, names: list[str]
    ) -> list[dict[str, Any]]:
        try:
            return list(file.read_row_group(group, columns=names).to_pylist())
        except (pa.ArrowException, OSError) as error:
            log.info("%s/%s: row group %d: %s; reading it again", self, key, group, error)
        with self.backend.open(key) as stream:  # damaged on the way, or where it lies?
            try:
                again = self._open_parquet(key, stream)
                return list(again.read_row_group(group, columns=names).to_pylist())
            except (pa.ArrowException, OSError) as error:
                raise ArtifactError(f"{self}/{key}: row group {group}: {error}") from error

    def provenance(self, key: str) -> Provenance:
        """The provenance in a part's footer; raises ArtifactError when it has none."""
        with self.backend.open(key) as stream:
            metadata = self._open_parquet(key, stream).metadata.metadata or {}
        if PROVENANCE not in metadata:
            raise ArtifactError(
                f"{self}/{key}: no provenance in the footer; not written by a stage"
            )
        return Provenance.model_validate_json(metadata[PROVENANCE])

    def part_info(self, key: str) -> PartInfo:
        """Size, checksum and counts of a part, for a manifest."""
        origin = self.provenance(key)
        with self.backend.open(key) as stream:
            digest = stream_digest(stream)
        return PartInfo(
            key=key,
            rows=origin.rows,
            bytes=self.backend.size(key) or 0,
            sha256=digest,
            rows_sha256=origin.rows_sha256,
            quarantined=origin.quarantined,
            seconds=origin.seconds,
        )

    def _open_parquet(self, key: str, stream: BinaryIO) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(stream, page_checksum_verification=True)
        except (pa.ArrowException, OSError) as error:
            raise ArtifactError(f"{self}/{key}: not a complete Parquet file: {error}") from error

    # --- trees ----------------------------------------------------------------------------

    @contextmanager
    def new_tree(self, key: str) -> Iterator[Path]:
        """A folder to fill; becomes the tree `key` when the block ends without an error.

        If the tree exists by then, ours is dropped: first writer wins.
        """
        with self.backend.staging(key) as outer:
            folder = outer / "tree"
            folder.mkdir()
            yield folder
            (folder / COMPLETE).unlink(missing_ok=True)  # of a tree that files were copied from
            with ThreadPoolExecutor(DIGEST_THREADS) as pool:  # ahead of the upload
                self.backend.put_tree_if_absent(key, folder, _tree_files(folder, pool))

    def tree_exists(self, key: str) -> bool:
        return self.exists(f"{key}/{COMPLETE}")

    def tree_files(self, key: str) -> list[FileInfo]:
        """What the marker lists; raises ArtifactError when the tree is absent or unfinished."""
        if not self.tree_exists(key):
            raise ArtifactError(f"{self}/{key}: no complete tree (no {COMPLETE})")
        try:
            marker = json.loads(self.read_bytes(f"{key}/{COMPLETE}"))
            return [FileInfo.model_validate(item) for item in marker["files"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{self}/{key}/{COMPLETE}: not a valid marker: {error}") from error

    def tree_digest(self, key: str) -> str:
        """The identity of the tree's content, from its marker."""
        return files_digest(self.tree_files(key))

    def tree_path(self, key: str) -> Path:
        """A local folder with the tree's files; sizes are checked against the marker."""
        files = self.tree_files(key)
        folder = self.backend.tree_path(key)
        for info in files:
            path = folder / info.path
            if not path.is_file() or path.stat().st_size != info.bytes:
                raise ArtifactError(
                    f"{path}: missing or not {info.bytes} bytes, as {COMPLETE} says"
                )
        return folder


def stream_digest(stream: BinaryIO) -> str:
    """SHA-256 of what is left of a stream."""
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def files_digest(files: Iterable[FileInfo]) -> str:
    """SHA-256 over names, sizes and digests: the identity of a tree's content."""
    lines = sorted(f"{info.path}\0{info.bytes}\0{info.sha256}" for info in files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return stream_digest(stream)


def _tree_files(folder: Path, pool: Executor) -> Iterator[FileInfo]:
    """Every file below a folder, sorted by path, each as soon as its digest is known."""

    def info(path: Path) -> FileInfo:
        name = path.relative_to(folder).as_posix()
        return FileInfo(path=name, bytes=path.stat().st_size, sha256=file_digest(path))

    return pool.map(info, [path for path in sorted(folder.rglob("*")) if path.is_file()])


def write_marker(path: Path, files: Iterable[FileInfo], at: Mapping[str, str]) -> None:
    """A tree's marker; `at` says where a file lies that is not at its own path."""
    marker: dict[str, Any] = {"files": [info.model_dump() for info in files]}
    path.write_text(json.dumps(marker | ({"at": dict(at)} if at else {}), indent=1) + "\n")


def _write_parquet(
    path: Path, rows: Iterable[R], *, record: type[R], origin: Callable[[], Provenance]
) -> None:
    digest, count = hashlib.sha256(), 0
    with pq.ParquetWriter(
        path, arrow_schema(record), compression="zstd", write_page_checksum=True
    ) as writer:
        group: list[R] = []
        for row in rows:
            digest.update(row.model_dump_json().encode() + b"\n")
            count += 1
            group.append(row)
            if len(group) == ROWS_PER_GROUP:
                writer.write_table(to_table(record, group))
                group = []
        if group:
            writer.write_table(to_table(record, group))
        final = origin().model_copy(update={"rows": count, "rows_sha256": digest.hexdigest()})
        writer.add_key_value_metadata({PROVENANCE: final.model_dump_json().encode()})
