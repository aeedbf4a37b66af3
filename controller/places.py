"""Where a run lies, and which run a user means."""

from pathlib import Path
from typing import NamedTuple

from rlaifv.errors import ConfigError
from rlaifv.pipeline import CONFIG
from rlaifv.places import local_path
from rlaifv.store import LocalBackend, Store, open_store

DEFAULT_ROOT = "runs"
MODELS, BENCHMARKS = "models", "benchmarks"
"""Folders below a root where `import` puts things."""


class RunPlace(NamedTuple):
    """A run's store, its URI, and its folder on this machine."""

    store: Store
    uri: str
    folder: Path
    """Logs and lock; for a run that is kept elsewhere, `runs/<name>` here."""


def run_place(root: str, name: str) -> RunPlace:
    """The run `name` below `root`; it need not exist."""
    store = open_store(f"{root.rstrip('/')}/{name}")
    backend = store.backend
    folder = backend.path if isinstance(backend, LocalBackend) else Path(DEFAULT_ROOT) / name
    return RunPlace(store, backend.uri, folder.absolute())


def existing_run(root: str, name: str | None) -> RunPlace:
    """The run that a user means: a name below `root`, a URI or path, or the only run there.

    Raises ConfigError when there is none, or when several could be meant.
    """
    if name is None:
        name = _only_run(root)
    elif "/" in name:
        root, _, name = name.rstrip("/").rpartition("/")
    place = run_place(root, name)
    if not place.store.exists(CONFIG):
        raise ConfigError(f"{place.uri}: no run here (no {CONFIG})")
    return place


def shown(uri: str, key: str) -> str:
    """Where an object of a run is, as one would type it."""
    full = f"{uri}/{key}"
    return str(local_path(full)) if full.startswith("file:") else full


def typed(uri: str) -> str:
    """A run as one would type it here."""
    return shown_here(shown(uri, "").rstrip("/"))


def shown_here(path: str) -> str:
    """A path below the working directory relative to it; still with a `/`, so that it is a path."""
    here = f"{Path.cwd()}/"
    inner = path.removeprefix(here)
    return inner if inner == path or "/" in inner else f"./{inner}"


def run_names(root: Store) -> list[str]:
    """The runs directly below a root, sorted."""
    return [name for name in root.folders("") if root.exists(f"{name}/{CONFIG}")]


def _only_run(root: str) -> str:
    names = run_names(open_store(root))
    if len(names) == 1:
        return names[0]
    if not names:
        raise ConfigError(f"{root}: no run here; start one with `python -m controller run`")
    raise ConfigError(f"{root}: which run? There are: {', '.join(names)}")
