"""The store's back end on a local (or mounted) directory."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from rlaifv.errors import ArtifactError, ConfigError, TransientError
from rlaifv.store._store import COMPLETE, FileInfo, ObjectInfo, write_marker

TEMPORARY = ".tmp-"


class LocalBackend:
    """Keys are paths below `root`; atomic by writing beside the target, then linking or renaming."""

    def __init__(self, root: Path) -> None:
        self.path = root.expanduser().absolute()
        self.uri = self.path.as_uri()

    def _at(self, key: str) -> Path:
        return self.path / key

    @contextmanager
    def staging(self, key: str) -> Iterator[Path]:
        """A temporary folder on the file system of `key`; removed afterwards."""
        parent = self._at(key).parent
        with _explained(f"{parent}"):
            parent.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=parent))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def put_file_if_absent(self, key: str, source: Path) -> bool:
        """Makes `source` (in a `staging` folder) the object, unless there is one already."""
        target = self._at(key)
        with _explained(str(target)):
            target.parent.mkdir(parents=True, exist_ok=True)
            _sync(source)
            try:
                os.link(source, target)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno in (errno.EPERM, errno.ENOTSUP, errno.EXDEV):
                    raise ConfigError(
                        f"{target}: this file system has no hard links, which first-writer-wins "
                        "needs; use a local disk, NFS or s3://"
                    ) from error
                raise
            _sync(target.parent)
        return True

    def put(self, key: str, data: bytes) -> None:
        """Writes or replaces an object atomically."""
        with self.staging(key) as folder, _explained(str(self._at(key))):
            source = folder / "data"
            source.write_bytes(data)
            _sync(source)
            source.replace(self._at(key))
            _sync(self._at(key).parent)

    def put_tree_if_absent(self, key: str, folder: Path, files: Iterable[FileInfo]) -> bool:
        """Makes a staged folder of `files` the tree `key`, unless there is one already."""
        target = self._at(key)
        with _explained(str(target)):
            write_marker(folder / COMPLETE, files, at={})
            target.parent.mkdir(parents=True, exist_ok=True)
            for path in sorted(folder.rglob("*")):
                _sync(path)
            _sync(folder)
            try:
                folder.rename(target)  # fails when the target exists and is not empty
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST) and (target / COMPLETE).exists():
                    return False
                raise
            _sync(target.parent)
        return True

    def tree_path(self, key: str) -> Path:
        """Where the files of a complete tree lie."""
        return self._at(key)

    def open(self, key: str) -> BinaryIO:
        """A seekable stream; raises ArtifactError when there is no such object."""
        try:
            return self._at(key).open("rb")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise ArtifactError(f"{self._at(key)}: no such artifact") from error

    def size(self, key: str) -> int | None:
        """Bytes of an object; None when there is none."""
        try:
            return self._at(key).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def objects(self, prefix: str) -> Iterator[ObjectInfo]:
        """Objects whose key starts with `prefix` (a folder), sorted; unfinished ones excluded."""
        for folder, folders, files in os.walk(self._at(prefix)):
            folders[:] = sorted(name for name in folders if not name.startswith(TEMPORARY))
            for name in sorted(files):
                path = Path(folder) / name
                with suppress(FileNotFoundError):
                    found = path.stat()
                    key = path.relative_to(self.path).as_posix()
                    yield ObjectInfo(key, found.st_size, found.st_mtime)

    def folders(self, prefix: str) -> list[str]:
        """Names of the folders directly below `prefix`, sorted."""
        with suppress(FileNotFoundError):
            inside = sorted(path for path in self._at(prefix).iterdir() if path.is_dir())
            return [path.name for path in inside if not path.name.startswith(TEMPORARY)]
        return []

    def delete(self, key: str) -> None:
        """Removes an object or a tree; nothing happens when there is none."""
        target = self._at(key)
        if target.is_dir():
            doomed = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=target.parent))
            with suppress(FileNotFoundError):
                target.rename(doomed / "tree")  # gone at once, also when we are killed below
            shutil.rmtree(doomed, ignore_errors=True)
        else:
            target.unlink(missing_ok=True)

    def sweep(self, prefix: str) -> None:
        """Removes what killed writers left behind; only safe while nothing else writes."""
        for folder, folders, _ in os.walk(self._at(prefix)):
            for name in [name for name in folders if name.startswith(TEMPORARY)]:
                folders.remove(name)
                shutil.rmtree(Path(folder) / name, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turns a full disk and missing rights into errors that say what to do."""
    try:
        yield
    except OSError as error:
        explained = explain_os_error(error, what)
        if explained is error:
            raise
        raise explained from error


def explain_os_error(error: OSError, what: str) -> Exception:
    """The operator's error for a failed write to `what`; the same error when there is none."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return TransientError(f"{what}: no space left; free some and run again, nothing is lost")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ConfigError(f"{what}: not writable ({error.strerror})")
    return error
