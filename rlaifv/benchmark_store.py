"""Throughput of the store beside plain boto3 (TransferManager) on the same bucket.

    python -m rlaifv.benchmark_store --root s3://bucket/somewhere

Writes below `<root>/.benchmark-<random>` and removes it afterwards. Both ways move the same bytes
with the same number of threads, in turns; the fastest of `--rounds` counts. Plain boto3 is as it
comes, or with `--plain-checksums when_required` without the CRC that it computes by default. The
store computes or verifies the SHA-256 of everything, and never overwrites.
"""

from rlaifv import flags

if __name__ == "__main__":
    flags.look_first("benchmark_store")

import os
import resource
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import boto3
from boto3.s3.transfer import TransferConfig, create_transfer_manager
from botocore.config import Config

from rlaifv.errors import ConfigError, RlaifvError
from rlaifv.store import Store
from rlaifv.store._cache import FOLDER
from rlaifv.store._s3 import S3Backend
from rlaifv.store._s3_client import THREADS
from rlaifv.store._s3_transfer import BLOCK

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

PART_BYTES = 20_000


class Job(NamedTuple):
    """What is measured: files on the disk, and where in the bucket they go."""

    store: Store
    folder: Path
    """Holds `tree/` and `parts/`; downloads go beside them."""
    key: str
    client: "S3Client"
    """Plain boto3's."""

    @property
    def backend(self) -> S3Backend:
        assert isinstance(self.store.backend, S3Backend)  # noqa: S101 - main made it
        return self.store.backend

    def files(self, kind: str) -> list[Path]:
        return sorted((self.folder / kind).iterdir())

    def name(self, way: str, file: Path) -> str:
        return f"{self.backend.prefix}{self.key}/{way}/{file.parent.name}/{file.name}"


Way = Callable[[Job, int], None]


class Line(NamedTuple):
    """One row of the result."""

    what: str
    ours_seconds: float
    plain_seconds: float
    megabytes: float

    def __str__(self) -> str:
        ours, plain = (self.megabytes / s for s in (self.ours_seconds, self.plain_seconds))
        ratio = self.plain_seconds / self.ours_seconds
        return f"{self.what:<22} {ours:8.1f} MB/s  plain boto3 {plain:8.1f} MB/s  {ratio:5.2f}x"


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line per measurement and the memory that it took; returns the exit code."""
    given = flags.benchmark_store().parse_args(argv)
    try:
        if not given.root.startswith("s3://"):
            raise ConfigError(f"--root {given.root}: expected s3://bucket/prefix")
        store = Store(S3Backend(given.root))
        with tempfile.TemporaryDirectory() as folder:
            key = f".benchmark-{uuid.uuid4().hex[:8]}"
            job = Job(store, Path(folder), key, _plain_client(given.plain_checksums))
            _make_files(job.folder, tree_mb=given.tree_mb, parts=given.parts)
            try:
                _measure_all(job, given.rounds)
            finally:
                store.delete(job.key)
    except RlaifvError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _plain_client(checksums: Literal["when_supported", "when_required"] | None) -> "S3Client":
    config = Config(
        max_pool_connections=4 * THREADS,
        request_checksum_calculation=checksums,
        response_checksum_validation=checksums,
    )
    return boto3.session.Session().client("s3", config=config)


def _make_files(folder: Path, *, tree_mb: int, parts: int) -> None:
    """A tree of four files, as sharded safetensors are, and small parts."""
    for kind in ("tree", "parts"):
        (folder / kind).mkdir()
    for shard in range(4):
        with (folder / f"tree/model-{shard}.safetensors").open("wb") as stream:
            for _ in range(tree_mb // 4):
                stream.write(os.urandom(1 << 20))
    for number in range(parts):
        (folder / f"parts/{number:05d}.parquet").write_bytes(os.urandom(PART_BYTES))


def _measure_all(job: Job, rounds: int) -> None:
    before = _peak_mb()
    tree_mb = sum(file.stat().st_size for file in job.files("tree")) / 1e6
    parts_mb = sum(file.stat().st_size for file in job.files("parts")) / 1e6
    for what, ours, plain, megabytes in (
        ("tree up", _our_tree_up, partial(_plain_up, kind="tree"), tree_mb),
        ("tree down", _our_tree_down, partial(_plain_down, kind="tree"), tree_mb),
        ("parts up", _our_parts_up, partial(_plain_up, kind="parts"), parts_mb),
        ("parts down", _our_parts_down, partial(_plain_down, kind="parts"), parts_mb),
    ):
        times: dict[Way, list[float]] = {ours: [], plain: []}
        for number in range(rounds):
            # In turns: what one leaves to be written back slows the next one down.
            for way in (ours, plain) if number % 2 else (plain, ours):
                times[way].append(_seconds(way, job, number))
        print(Line(what, min(times[ours]), min(times[plain]), megabytes), flush=True)
    print(f"memory: {before:.0f} MB before, {_peak_mb():.0f} MB at most (both ways together)")
    print(f"{THREADS} threads, blocks of {BLOCK >> 20} MiB, files of {tree_mb / 4:.0f} MB")


def _seconds(action: Way, job: Job, number: int) -> float:
    started = time.perf_counter()
    action(job, number)
    return time.perf_counter() - started


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _our_tree_up(job: Job, number: int) -> None:
    with job.store.new_tree(f"{job.key}/ours/{number}") as folder:
        for file in job.files("tree"):
            (folder / file.name).hardlink_to(file)


def _our_tree_down(job: Job, number: int) -> None:
    os.environ[FOLDER] = str(job.folder / f"cache-{number}")  # an empty one: nothing is cached
    job.store.tree_path(f"{job.key}/ours/{number}")
    shutil.rmtree(job.folder / f"cache-{number}")


def _our_parts_up(job: Job, number: int) -> None:
    with ThreadPoolExecutor(THREADS) as pool:
        list(
            pool.map(
                lambda file: job.backend.put_file_if_absent(
                    f"{job.key}/ours/parts-{number}/{file.name}", file
                ),
                job.files("parts"),
            )
        )


def _our_parts_down(job: Job, number: int) -> None:
    target = job.folder / "ours"
    target.mkdir()

    def fetch(file: Path) -> None:
        data = job.store.read_bytes(f"{job.key}/ours/parts-{number}/{file.name}")
        (target / file.name).write_bytes(data)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(fetch, job.files("parts")))
    shutil.rmtree(target)


def _plain_up(job: Job, number: int, *, kind: str) -> None:
    bucket = job.backend.bucket.name
    with create_transfer_manager(job.client, TransferConfig(max_concurrency=THREADS)) as manager:
        for future in [
            manager.upload(str(file), bucket, job.name(f"plain/{number}", file))
            for file in job.files(kind)
        ]:
            future.result()


def _plain_down(job: Job, number: int, *, kind: str) -> None:
    bucket, target = job.backend.bucket.name, job.folder / "plain"
    target.mkdir()
    with create_transfer_manager(job.client, TransferConfig(max_concurrency=THREADS)) as manager:
        for future in [
            manager.download(bucket, job.name(f"plain/{number}", file), str(target / file.name))
            for file in job.files(kind)
        ]:
            future.result()
    shutil.rmtree(target)


if __name__ == "__main__":
    sys.exit(main())
