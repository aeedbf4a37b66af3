"""`python -m controller gc`: what a run no longer needs; a dry run unless told otherwise."""

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from controller.lock import hold
from controller.loop import read_state
from controller.places import RunPlace
from controller.plan import State
from controller.tables import Column, render
from rlaifv.config import RunConfig
from rlaifv.pipeline import COMPILED, CONFIG, checkpoint_key, iteration_key, merged_key
from rlaifv.records import Record
from rlaifv.store import COMPLETE, Debris, LocalBackend, Store, debris, remove_debris

TEMPORARIES = ".tmp-*"
Kind = Literal["checkpoint", "training state", "compiled", "upload", "tree", "temporary"]


class Waste(Record):
    """One thing that may go."""

    kind: Kind
    """`checkpoint`: not chosen; `compiled`: of a finished run; `upload`, `tree`: never completed."""
    key: str
    bytes: int
    """0 for an upload: the server does not tell."""


class Collection(Record):
    """What `gc --json` prints."""

    run: str
    deleted: bool
    items: list[Waste]


def collect(place: RunPlace, *, delete: bool, older_than_seconds: float) -> Collection:
    """Finds waste, and with `delete` removes it.

    Trees count once their iteration is finished; what a writer may still be at work on, once
    nobody has touched it for `older_than_seconds`. Raises TransientError when a controller on
    this machine drives the run and something is to be deleted.
    """
    with hold(place.folder) if delete else contextlib.nullcontext():
        run = place.store
        config = run.read_json(CONFIG, RunConfig)
        state = read_state(run, config, known={})
        items = []
        for waste in _unneeded(run, config, state):
            items.append(waste)
            if delete:
                run.delete(waste.key)
        for left in debris(run, "", older_than_seconds=older_than_seconds):
            items.append(_of_debris(left))
            if delete:
                remove_debris(run, left)
        for folder in _temporaries(run, older_than_seconds):
            items.append(_of_temporary(run, folder))
            if delete:
                shutil.rmtree(folder, ignore_errors=True)
    return Collection(run=str(run), deleted=delete, items=items)


def _unneeded(run: Store, config: RunConfig, state: State) -> Iterator[Waste]:
    """Trees of finished iterations but the chosen one, whatever `train.keep_unselected` says.

    Of a finished run also what was compiled.
    """
    for iteration, choice in sorted(state.choices.items()):
        if not state.finished(config, iteration):
            continue
        folder = iteration_key(iteration)
        kept = {checkpoint_key(iteration, choice.step), merged_key(iteration, choice.step)}
        trees = [
            *state.trees.get(f"{folder}/checkpoints", ()),
            *state.trees.get(f"{folder}/train_state", ()),
        ]
        for tree in trees:
            if tree in kept or f"{tree}/{COMPLETE}" not in state.keys:
                continue  # what was never completed is debris, and has to be old
            state_of = tree.startswith(f"{folder}/train_state/")
            kind: Kind = "training state" if state_of else "checkpoint"
            yield Waste(kind=kind, key=tree, bytes=_size(run, tree))
    if all(state.finished(config, iteration) for iteration in range(config.iterations)):
        for item in run.objects(COMPILED):
            yield Waste(kind="compiled", key=item.key, bytes=item.size_bytes)


def _size(run: Store, tree: str) -> int:
    return sum(item.size_bytes for item in run.objects(tree))


def _of_debris(left: Debris) -> Waste:
    return Waste(kind=left.kind, key=left.key, bytes=left.num_bytes)


def _temporaries(run: Store, older_than_seconds: float) -> Iterator[Path]:
    """Staging folders of killed writers, which no listing shows; only local runs have them."""
    if not isinstance(run.backend, LocalBackend):
        return
    latest = time.time() - older_than_seconds
    for folder in sorted(run.backend.path.rglob(TEMPORARIES)):
        inner = [folder, *folder.rglob("*")]
        if folder.is_dir() and max(path.lstat().st_mtime for path in inner) <= latest:
            yield folder


def _of_temporary(run: Store, folder: Path) -> Waste:
    assert isinstance(run.backend, LocalBackend)  # noqa: S101 - only local runs have them
    size = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
    return Waste(kind="temporary", key=folder.relative_to(run.backend.path).as_posix(), bytes=size)


def collection_text(found: Collection) -> str:
    """One line per item."""
    if not found.items:
        return f"{found.run}: nothing to remove"
    columns = (Column("kind"), Column("bytes", right=True), Column("key"))
    rows = [(item.kind, str(item.bytes), item.key) for item in found.items]
    total = sum(item.bytes for item in found.items)
    verdict = "removed" if found.deleted else "to remove; nothing was: add --delete"
    return f"{render(columns, rows)}\n{len(rows)} items, {total} bytes {verdict}"
