"""Trees and files of a bucket on the local disk, shared by the processes of a machine.

RLAIFV_CACHE      the folder; default ~/.cache/rlaifv
RLAIFV_CACHE_GB   its bound in units of 10**9 bytes; default 200
"""

import fcntl
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from rlaifv.errors import ConfigError

FOLDER = "RLAIFV_CACHE"
BOUND = "RLAIFV_CACHE_GB"
DEFAULT_GB = 200.0

_held: dict[Path, int] = {}
"""Descriptors of the lock files of the entries that this process uses, open until it ends: never evicted."""
_held_lock = threading.Lock()


class Cache:
    """Entries are folders named by the digest of what they hold, so none is ever stale."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder.expanduser().absolute()
        self._max_bytes = max_bytes

    @staticmethod
    def from_environment() -> "Cache":
        """Raises ConfigError for a bound that is not a number."""
        text = os.environ.get(BOUND) or str(DEFAULT_GB)
        try:
            max_bytes = int(float(text) * 1e9)
        except ValueError as error:
            raise ConfigError(f"{BOUND}={text}: expected a number of GB") from error
        return Cache(Path(os.environ.get(FOLDER) or "~/.cache/rlaifv"), max_bytes)

    def entry(self, digest: str, num_bytes: int, *, fill: Callable[[Path], None]) -> Path:
        """The folder of `digest`; `fill` is called on an empty one unless it is there already.

        Another process that wants the same entry waits for the first. The least recently used
        entries make room, but none that a living process holds. Raises ConfigError when
        `num_bytes` do not fit.
        """
        folder = self.folder / digest
        with _held_lock:
            if folder in _held:
                return folder
            lock = self._lock(digest)
            try:
                fcntl.flock(lock, fcntl.LOCK_SH)
                while not folder.is_dir():  # another process may evict it between two locks
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    if not folder.is_dir():
                        self._fill(folder, num_bytes, fill)
                    fcntl.flock(lock, fcntl.LOCK_SH)
            except BaseException:  # whatever ends it, the lock is not kept
                os.close(lock)
                raise
            os.utime(lock)
            _held[folder] = lock
        return folder

    def _fill(self, folder: Path, num_bytes: int, fill: Callable[[Path], None]) -> None:
        self._make_room(num_bytes)
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            fill(partial)
        except BaseException:  # whatever ends it, no half folder is left
            shutil.rmtree(partial, ignore_errors=True)
            raise
        partial.rename(folder)

    def _lock(self, digest: str) -> int:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return os.open(self.folder / f"{digest}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise ConfigError(
                f"{self.folder}: not writable ({error.strerror}); set {FOLDER}"
            ) from error

    def _make_room(self, num_bytes: int) -> None:
        locks = sorted(self.folder.glob("*.lock"), key=lambda path: path.stat().st_mtime)
        used = {path: _size(path.with_suffix("")) for path in locks}
        for path in locks:
            if sum(used.values()) + num_bytes <= self._max_bytes:
                return
            if used[path] and _evict(path):
                used[path] = 0
        if sum(used.values()) + num_bytes > self._max_bytes:
            raise ConfigError(
                f"{self.folder}: {num_bytes / 1e9:.1f} GB more do not fit into "
                f"{self._max_bytes / 1e9:.1f} GB ({sum(used.values()) / 1e9:.1f} GB in use); "
                f"raise {BOUND}, or point {FOLDER} at a larger disk"
            )


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _evict(path: Path) -> bool:
    """Removes the entry of a lock file, unless a living process uses it."""
    with path.open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        folder, doomed = path.with_suffix(""), path.with_suffix(".partial")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)  # gone at once, also when we are killed below
        shutil.rmtree(doomed)
    return True
