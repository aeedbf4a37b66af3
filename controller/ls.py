"""`python -m controller ls`: which runs there are, and which artifacts a run has."""

from collections import defaultdict
from collections.abc import Iterator

from controller.loop import read_state
from controller.places import BENCHMARKS, MODELS, run_names
from controller.plan import WRITERS, State
from controller.tables import Column, render
from rlaifv.config import RunConfig
from rlaifv.errors import ConfigError
from rlaifv.pipeline import (
    ARTIFACTS,
    CHOICE,
    CONFIG,
    choice_key,
    iteration_key,
    manifest_key,
    num_shards,
)
from rlaifv.records import Record
from rlaifv.store import COMPLETE, LocalBackend, Manifest, ObjectInfo, Store, open_store


class Root(Record):
    """What lies below a root."""

    root: str
    runs: list[str]
    imported: list[str]
    """Models and benchmarks, by key."""


class Artifact(Record):
    """One line of `ls RUN`."""

    iteration: int
    artifact: str
    """`choice`, a row artifact, or `tree` for a checkpoint."""
    key: str
    parts: int
    """Parts there; files of a tree."""
    of: int | None
    """Parts when complete; None for a tree."""
    rows: int | None
    """Known once the stage is complete."""
    bytes: int
    complete: bool


class Listing(Record):
    """What `ls RUN --json` prints."""

    run: str
    artifacts: list[Artifact]


def list_root(root: str) -> Root:
    """Runs and imported trees below a root; the runs' own objects are not listed.

    Raises ConfigError when the root is no folder.
    """
    store = open_store(root)
    if isinstance(store.backend, LocalBackend) and not store.backend.path.is_dir():
        raise ConfigError(f"{store}: no such folder")
    keys = [item.key for folder in (MODELS, BENCHMARKS) for item in store.objects(folder)]
    imported = [key.removesuffix(f"/{COMPLETE}") for key in keys if key.endswith(f"/{COMPLETE}")]
    return Root(root=str(store), runs=run_names(store), imported=imported)


def root_text(root: Root) -> str:
    """A name per line."""
    return "\n".join([*root.runs, *root.imported]) or f"{root.root}: no run here"


def list_run(run: Store) -> Listing:
    """Every artifact and tree of a run; one small object is read per finished stage."""
    config = run.read_json(CONFIG, RunConfig)
    state = read_state(run, config, known={})
    items: dict[str, list[ObjectInfo]] = defaultdict(list)
    trees = {tree for found in state.trees.values() for tree in found}
    for item in run.objects(""):
        items[_folder(item.key, trees)].append(item)
    artifacts = [
        artifact
        for iteration in range(config.iterations)
        for artifact in _artifacts(run, config, state, iteration=iteration, items=items)
    ]
    return Listing(run=str(run), artifacts=artifacts)


def _folder(key: str, trees: set[str]) -> str:
    """The tree that an object belongs to, else its folder."""
    folder = key
    while folder:
        folder = folder.rpartition("/")[0]
        if folder in trees:
            return folder
    return key.rpartition("/")[0]


def _artifacts(
    run: Store,
    config: RunConfig,
    state: State,
    *,
    iteration: int,
    items: dict[str, list[ObjectInfo]],
) -> Iterator[Artifact]:
    folder = iteration_key(iteration)
    for name in ARTIFACTS:
        key = f"{folder}/{name}"
        parts = [item for item in items.get(key, []) if item.key.endswith(".parquet")]
        manifest = manifest_key(iteration, name)
        complete = manifest in state.keys
        if not parts and not complete:
            continue
        rows = sum(part.rows for part in run.read_json(manifest, Manifest).parts) if complete else 0
        yield Artifact(
            iteration=iteration,
            artifact=name,
            key=key,
            parts=len(parts),
            of=num_shards(config, WRITERS[name].name),
            rows=rows if complete else None,
            bytes=sum(item.size_bytes for item in parts),
            complete=complete,
        )
    for kind in ("checkpoints", "train_state"):
        for tree in state.trees.get(f"{folder}/{kind}", ()):
            files = [item for item in items[tree] if not item.key.endswith(f"/{COMPLETE}")]
            yield _plain(
                iteration, "tree", tree, files, complete=f"{tree}/{COMPLETE}" in state.keys
            )
    key = choice_key(iteration)
    found = [item for item in items.get(folder, []) if item.key == key]
    if found:
        yield _plain(iteration, CHOICE, key, found, complete=True)


def _plain(
    iteration: int, artifact: str, key: str, files: list[ObjectInfo], *, complete: bool
) -> Artifact:
    return Artifact(
        iteration=iteration,
        artifact=artifact,
        key=key,
        parts=len(files),
        of=None,
        rows=None,
        bytes=sum(item.size_bytes for item in files),
        complete=complete,
    )


def run_text(listing: Listing) -> str:
    """One line per artifact."""
    columns = (
        Column("key"),
        Column("parts", right=True),
        Column("rows", right=True),
        Column("bytes", right=True),
        Column("state"),
    )
    rows = [
        (
            one.key,
            str(one.parts) if one.of is None else f"{one.parts}/{one.of}",
            "-" if one.rows is None else str(one.rows),
            str(one.bytes),
            "complete" if one.complete else "unfinished",
        )
        for one in listing.artifacts
    ]
    return f"{listing.run}\n{render(columns, rows)}" if rows else f"{listing.run}: nothing yet"
