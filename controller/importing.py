"""`python -m controller import`: models and benchmark files below the root, with digests.

Pods that cannot reach a hub read them there: any `path` of a configuration may be the URI.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from controller.doctor import HUB_ID
from controller.places import BENCHMARKS, MODELS
from rlaifv.errors import ConfigError, TransientError
from rlaifv.places import local_path
from rlaifv.store import COMPLETE, FileInfo, LocalBackend, Store, file_digest, open_store

MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
"""What a loader reads; never pickled weights, and no code."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(@[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")


def import_model(root: str, source: str, *, name: str | None = None) -> str:
    """Copies a model folder or hub id (`@revision`) to `<root>/models/`; says where and how.

    Raises ConfigError for what is no model, a name that is taken by other files, and a hub id
    that is not in the cache while the hub is off; TransientError when the hub fails.
    """
    folder = local_path(source)
    if folder.is_dir():
        name = name or folder.resolve().name
    else:
        identity, _, revision = source.partition("@")
        if source.startswith((".", "/", "~")) or not HUB_ID.fullmatch(identity):
            raise ConfigError(f"import model {source}: no such folder, and no hub id")
        folder = _from_hub(identity, revision or None)
        name = name or source
    files = [path for path in _files(folder) if any(path.match(one) for one in MODEL_FILES)]
    names = {path.relative_to(folder).as_posix() for path in files}
    if "config.json" not in names:
        raise ConfigError(f"{folder}: not a model: config.json is missing")
    if not any(one.endswith(".safetensors") for one in names):
        raise ConfigError(f"{folder}: no *.safetensors; pickled weights are not imported")
    uri = _commit(root, f"{MODELS}/{_checked(name)}", folder, files)
    return (
        f"{uri}\nname it with --set policy.path={uri} (or verify.labeller.path, claim.model.path)"
    )


def import_benchmark(root: str, source: str, *, name: str) -> str:
    """Copies a file or folder to `<root>/benchmarks/NAME`; says where.

    Raises ConfigError for what is not there, links to folders, and a name that is taken.
    """
    path = local_path(source)
    if path.is_file():
        uri = _commit(root, f"{BENCHMARKS}/{_checked(name)}", path.parent, [path])
        return f"{uri}/{path.name}\nname it as `path` of a benchmark (docs/benchmarks.md)"
    if not path.is_dir():
        raise ConfigError(f"import benchmark {source}: no such file or folder")
    uri = _commit(root, f"{BENCHMARKS}/{_checked(name)}", path, list(_files(path)))
    return f"{uri}\nname it, or a file in it, as `path` of a benchmark (docs/benchmarks.md)"


def _checked(name: str) -> str:
    parts = name.split("/")
    if len(parts) > 2 or not all(map(_NAME.fullmatch, parts)):
        raise ConfigError(
            f"name {name!r}: expected letters, digits, '.', '_', '-', and at most one '/'"
        )
    return name


def _from_hub(identity: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"import model {identity}: huggingface_hub is not installed; name a folder"
        ) from error
    try:
        found = snapshot_download(identity, revision=revision, allow_patterns=list(MODEL_FILES))
    except LocalEntryNotFoundError as error:
        raise ConfigError(
            f"import model {identity}: not in the hub's cache on this machine, and the hub cannot "
            "be reached (or HF_HUB_OFFLINE is set); download it elsewhere and name the folder"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        kind = ConfigError if 400 <= status < 500 and status != 429 else TransientError
        raise kind(f"import model {identity}: the hub answers {status}") from error
    return Path(found)


def _files(folder: Path) -> Iterator[Path]:
    """Every plain file, sorted; links to files are followed, anything else is refused."""
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(where) / name for name in [*folders, *sorted(names)]):
            if path.is_symlink() and path.is_dir():
                raise ConfigError(f"{path}: a link to a folder; put the folder itself there")
            if path.is_dir() or path.name.startswith(".") or path.name == COMPLETE:
                continue
            if not path.is_file():
                raise ConfigError(f"{path}: not a plain file")
            yield path


def _commit(root: str, key: str, folder: Path, files: list[Path]) -> str:
    """The tree's URI; the same files under the same name are no error."""
    if not files:
        raise ConfigError(f"{folder}: no files")
    store = open_store(root)
    uri = f"{store}/{key}"
    if store.tree_exists(key):
        _compare(store, key, folder=folder, files=files)
        return uri
    # A bucket's files are read where they lie; a folder needs bytes of its own.
    place: Callable[[Path, Path], object] = (
        shutil.copyfile if isinstance(store.backend, LocalBackend) else _link
    )
    with store.new_tree(key) as staged:
        for path in files:
            target = staged / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            place(path, target)
    return uri


def _link(source: Path, target: Path) -> None:
    target.symlink_to(source.resolve())


def _compare(store: Store, key: str, *, folder: Path, files: list[Path]) -> None:
    ours = {
        FileInfo(
            path=path.relative_to(folder).as_posix(),
            bytes=path.stat().st_size,
            sha256=file_digest(path),
        )
        for path in files
    }
    if differing := ours ^ set(store.tree_files(key)):
        names = sorted({info.path for info in differing})
        raise ConfigError(
            f"{store}/{key}: is there already, with other files (first: {names[0]!r}); "
            "give another name"
        )
