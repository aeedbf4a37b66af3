"""Whether a place keeps what a run relies on; proven by doing it, never by asking for a name.

Several popular S3 servers answer 200 to every `If-None-Match: *`. On those two writers of one
part both believe that they won, so a run must not start there as if nothing were amiss.
"""

import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from rlaifv.errors import ConfigError, RlaifvError
from rlaifv.store._local import LocalBackend
from rlaifv.store._store import Backend, Store

PROBES = ".doctor"
"""Folder below the root for what the probes write; removed afterwards."""
RACERS = 8
ROUNDS = 3
LITTLE_GB = 10.0


class Finding(NamedTuple):
    """One line of the doctor."""

    check: str
    outcome: Literal["ok", "note", "fail"]
    """`fail`: a run would lose or mix data, or could not go on; `note`: worth knowing."""
    text: str


B = TypeVar("B", bound=Backend)
Check = Callable[[B, str], Finding]


def probe(store: Store) -> list[Finding]:
    """Every check, in order; one finding when the store cannot be reached or written at all."""
    folder = f"{PROBES}/{uuid.uuid4().hex}"
    backend = store.backend
    try:
        if store.backend.uri.startswith("s3://"):
            from rlaifv.store._s3_probe import CHECKS, strict

            backend = strict(store.backend)
            findings = [*_run(backend, _BASIC, folder), *_run(strict(backend), CHECKS, folder)]
        else:
            findings = list(_run(backend, _BASIC, folder))
        findings += _run(backend, {"delete": _delete}, folder)
    except RlaifvError as error:
        findings = [Finding("reach", "fail", str(error))]
    return [*findings, *_space(store.backend)]


def check_before_run(store: Store) -> str:
    """The short form: a warning for the user, or nothing.

    Raises ConfigError when put-if-absent is ignored and the user has not chosen the single-writer
    mode, and what reaching the store raises.
    """
    folder = f"{PROBES}/{uuid.uuid4().hex}"
    backend, single_writer = store.backend, False
    if store.backend.uri.startswith("s3://"):
        from rlaifv.store._s3_probe import is_single_writer, strict

        backend, single_writer = strict(store.backend), is_single_writer(store.backend)
    checks = {"put-if-absent": _put_if_absent, "race": _race, "delete": _delete}
    bad = [finding for finding in _run(backend, checks, folder) if finding.outcome == "fail"]
    if not bad:
        return ""
    problem = f"{store}: {bad[0].check}: {bad[0].text}"
    if bad[0].check == "delete":
        return problem
    if single_writer:
        return (
            f"{problem}. Single-writer mode (RLAIFV_S3_SINGLE_WRITER=1): nothing else may write to "
            "this run, no second controller and no job started by hand"
        )
    raise ConfigError(
        f"{problem}. Two writers could both believe that they were first. Use another store, or "
        "set RLAIFV_S3_SINGLE_WRITER=1 and make sure that nothing else writes to the run"
    )


def _run(backend: B, checks: Mapping[str, Check[B]], folder: str) -> Iterator[Finding]:
    for name, check in checks.items():
        try:
            yield check(backend, folder)
        except RlaifvError as error:
            if name == "put-if-absent":
                raise  # not reached, or not written: the other checks would say the same
            yield Finding(name, "fail", str(error))


def write_probe(backend: Backend, key: str, data: bytes) -> bool:
    with backend.staging(key) as staged:
        source = Path(staged) / "probe"
        source.write_bytes(data)
        return backend.put_file_if_absent(key, source)


def read_probe(backend: Backend, key: str) -> bytes:
    with backend.open(key) as stream:
        return stream.read()


def _put_if_absent(backend: Backend, folder: str) -> Finding:
    first = write_probe(backend, f"{folder}/once", b"first")
    second = write_probe(backend, f"{folder}/once", b"second")
    if first and not second and read_probe(backend, f"{folder}/once") == b"first":
        return Finding("put-if-absent", "ok", "the second of two writers was refused")
    return Finding(
        "put-if-absent", "fail", "ignored: the second of two writers replaced the first's object"
    )


def _race(backend: Backend, folder: str) -> Finding:
    with ThreadPoolExecutor(RACERS) as pool:
        for number in range(ROUNDS):
            key = f"{folder}/race-{number}"
            entries = [f"writer {racer}".encode() for racer in range(RACERS)]
            won = list(pool.map(lambda data, key=key: write_probe(backend, key, data), entries))
            if won.count(True) != 1 or read_probe(backend, key) != entries[won.index(True)]:
                text = f"{won.count(True)} of {RACERS} simultaneous writers believe they won"
                return Finding("race", "fail", text)
    return Finding("race", "ok", f"one winner among {RACERS} writers, {ROUNDS} rounds")


def _read(backend: Backend, folder: str) -> Finding:
    data = os.urandom(200_000)
    write_probe(backend, f"{folder}/data", data)
    with backend.open(f"{folder}/data") as stream:
        stream.seek(100_000)
        middle = stream.read(10)
        stream.seek(0)
        same = stream.read() == data and middle == data[100_000:100_010]
    text = "bytes and ranges come back as written" if same else "other bytes come back"
    return Finding("read", "ok" if same else "fail", text)


def _list(backend: Backend, folder: str) -> Finding:
    keys = [f"{folder}/list/{number:03d}" for number in range(12)]
    for key in keys:
        write_probe(backend, key, key.encode())
        if key not in [item.key for item in backend.objects(f"{folder}/list")]:
            return Finding("list", "fail", "an object is missing from a listing made after it")
    backend.delete(keys[0])
    if [item.key for item in backend.objects(f"{folder}/list")] != keys[1:]:
        return Finding("list", "fail", "a listing shows a deleted object, or is not sorted")
    return Finding("list", "ok", "listings show every object written before, sorted")


def _delete(backend: Backend, folder: str) -> Finding:
    backend.delete(folder)
    if isinstance(backend, LocalBackend):
        with suppress(OSError):  # another doctor is at work
            (backend.path / PROBES).rmdir()
    left = [item.key for item in backend.objects(folder)]
    if left:
        return Finding("delete", "fail", f"{len(left)} objects are still there: {left[0]}")
    return Finding("delete", "ok", "what the checks wrote is removed")


_BASIC: dict[str, Check[Backend]] = {
    "put-if-absent": _put_if_absent,
    "race": _race,
    "read": _read,
    "list": _list,
}


def _space(backend: Backend) -> Iterator[Finding]:
    places = {"temporary files (TMPDIR)": Path(tempfile.gettempdir())}
    if isinstance(backend, LocalBackend):
        places["the root"] = backend.path
    else:
        from rlaifv.store._cache import Cache

        places["the cache (RLAIFV_CACHE)"] = Cache.from_environment().folder
    for name, path in places.items():
        existing = next(folder for folder in (path, *path.parents) if folder.exists())
        free = shutil.disk_usage(existing).free / 1e9
        text = f"{free:.1f} GB free for {name}, {path}"
        yield Finding("space", "ok" if free > LITTLE_GB else "note", text)
