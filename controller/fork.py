"""`python -m controller fork`: a run that keeps another's first stages and computes the rest.

Everything that lies before the fork is copied with its provenance (folders: hard links; a bucket
copies on its own side), so the new run is whole: stages, status and report read it like any other.
"""

import re
from typing import NamedTuple

from controller.loop import read_state
from controller.places import RunPlace, run_place, shown
from controller.plan import WRITERS, State
from rlaifv.config import BenchmarkSpec, RunConfig
from rlaifv.config_values import changed_fields
from rlaifv.errors import ConfigError
from rlaifv.pipeline import CHOICE, CONFIG, STAGES, Shard, part_key
from rlaifv.places import policy_tree
from rlaifv.recipes import Wishes, change_config
from rlaifv.records import Checkpoint, Record
from rlaifv.store import COMPLETE, Store
from rlaifv.store.copying import copy_objects, copy_tree

FORK = "fork.json"
ORDER = {name: number for number, name in enumerate(STAGES)}
READERS = {
    "seed": "prepare",
    "shards.instructions": "prepare",
    "shards.group_size": "prepare",
    "shards.reflogp": "reflogp",
    "shards.respond": "respond",
    "policy": "sample",
    **{name: name for name in ("prepare", "sample", "claim", "verify", "pair", "train", "choose")},
    "respond": "respond",
}
"""The first stage that reads a field, by the field or the section that it is in."""
OF_GRADE = {"mode", "vocabulary", "coco", "nltk_data", "judge"}
"""Fields of a benchmark that no question depends on: a new judge needs no new responses."""
OF_CHOOSE = {"use"}
OF_ALL_ITERATIONS = ("seed", "prepare.", "shards.", "train.epochs", "train.checkpoints_per_epoch")
"""Iterations are disjoint slices of one order, and look their parts up by these numbers."""
_KEY = re.compile(r"iteration-(\d+)/(?:(?:quarantine|held_out)/)?([^/]+)(?:/.*)?")


class Wish(NamedTuple):
    """What a user asks for."""

    new: str
    start: str
    """`STAGE` or `STAGE@ITERATION`."""
    sets: tuple[str, ...] = ()


class Start(NamedTuple):
    """The first thing to be computed anew."""

    stage: str
    iteration: int

    def keeps(self, iteration: int, stage: str) -> bool:
        """Whether a stage of an iteration lies before the fork."""
        return (iteration, ORDER[stage]) < (self.iteration, ORDER[self.stage])


class Fork(Record):
    """`fork.json`: where a run comes from."""

    origin: str
    stage: str
    iteration: int
    changes: list[str]
    """`section.key: old -> new`."""
    copied: dict[str, str]
    """Digest of each part's rows and of each tree, by key."""
    others: list[str]
    """Manifests and choices that were copied with them."""
    gone: list[str]
    """Checkpoint trees that the origin no longer has: the choice must not fall on them."""


def fork(origin: RunPlace, wish: Wish) -> tuple[Fork, RunPlace]:
    """Makes the run; one that was interrupted is finished when asked for again.

    Raises ConfigError for a stage, iteration, change or name that cannot be, naming it.
    """
    run = origin.store
    old = run.read_json(CONFIG, RunConfig)
    new = change_config(old, Wishes(sets=wish.sets, name=wish.new))
    start = _parse_start(wish.start, new)
    changes = _checked_changes(old, new, start)
    state = read_state(run, old, known={})
    _check_history(run, old, state, start)
    target = run_place(origin.uri.rpartition("/")[0], wish.new)
    if target.store.exists(CONFIG):
        raise ConfigError(f"{target.uri}: there is a run of that name; choose another")
    keys, trees = _kept_keys(state, start), _kept_trees(state, start)
    parts = [key for key in keys if key.endswith(".parquet")]
    digests = {key: run.provenance(key).rows_sha256 for key in parts}
    digests |= {tree: run.tree_digest(tree) for tree in trees}
    record = Fork(
        origin=origin.uri,
        stage=start.stage,
        iteration=start.iteration,
        changes=changes,
        copied=digests,
        others=[key for key in keys if key not in digests],
        gone=_gone(run, state, start),
    )
    record = _claim(target, record)
    copy_objects(run, target.store, [key for key in record.copied if key.endswith(".parquet")])
    for tree in record.copied:
        if not tree.endswith(".parquet"):
            copy_tree(run, target.store, tree)
    copy_objects(run, target.store, record.others)
    target.store.write_json_once(CONFIG, new)  # last: now it is a run
    return record, target


def fork_text(record: Fork, place: RunPlace) -> str:
    """What was made, and how to go on."""
    root, _, name = place.uri.rpartition("/")
    config = shown(place.uri, CONFIG)
    lines = [
        f"{place.uri}: a fork of {record.origin} from {record.stage}@{record.iteration}, "
        f"{len(record.copied)} parts and trees kept",
        *(f"  {change}" for change in record.changes),
        *(f"  {tree}: gone from the origin; a choice of it would stop" for tree in record.gone),
        "go on with:",
    ]
    if config.startswith("s3://"):
        lines.append(f"  python -m controller show config {place.uri} > {name}.json")
        config = f"{name}.json"
    where = shown(root, "").rstrip("/")
    return "\n".join([*lines, f"  python -m controller run --config {config} --root {where}"])


def _parse_start(text: str, config: RunConfig) -> Start:
    stage, at, number = text.partition("@")
    if stage not in STAGES:
        raise ConfigError(f"--from {text}: expected one of {', '.join(STAGES)}, and @ITERATION")
    if at and not (number.isascii() and number.isdecimal()):
        raise ConfigError(f"--from {text}: expected a number after @")
    iteration = int(number or 0)
    if iteration >= config.iterations:
        raise ConfigError(f"--from {text}: the run has iterations 0 to {config.iterations - 1}")
    return Start(stage, iteration)


def _checked_changes(old: RunConfig, new: RunConfig, start: Start) -> list[str]:
    """Every change that rows may depend on; ConfigError when a stage that is kept depends on one."""
    same = {"name": old.name, "iterations": old.iterations, "stages": old.stages}
    same["keep_compiled"] = old.keep_compiled
    changes = changed_fields(old, new.model_copy(update=same))
    refused = []
    for change in changes:
        key = change.partition(": ")[0]
        reader = _reader(key, old, new)
        if reader is None:
            refused.append(f"{change} (no stage reads it)")
        elif ORDER[reader] < ORDER[start.stage]:
            refused.append(f"{change} (stage {reader})")
        elif start.iteration and (key == "train.lora" or key.startswith(OF_ALL_ITERATIONS)):
            refused.append(f"{change} (all iterations must agree)")
    if refused:
        lines = "\n  ".join(refused)
        raise ConfigError(
            f"--from {start.stage}@{start.iteration}: what is kept depends on these:\n  {lines}\n"
            "Fork from an earlier stage, or start a run of its own."
        )
    return changes


def _reader(key: str, old: RunConfig, new: RunConfig) -> str | None:
    """The first stage whose rows depend on a field; None for a field of no stage."""
    if key == "respond.benchmarks":
        return _benchmark_reader(old.respond.benchmarks, new.respond.benchmarks)
    return READERS.get(key) or READERS.get(key.partition(".")[0])


def _benchmark_reader(old: tuple[BenchmarkSpec, ...], new: tuple[BenchmarkSpec, ...]) -> str:
    if [one.name for one in old] != [one.name for one in new]:
        return "respond"
    differing = {
        field
        for left, right in zip(old, new, strict=True)
        for field in BenchmarkSpec.model_fields
        if getattr(left, field) != getattr(right, field)
    }
    if differing - OF_GRADE - OF_CHOOSE:
        return "respond"
    return "grade" if differing - OF_CHOOSE else "choose"


def _check_history(run: Store, config: RunConfig, state: State, start: Start) -> None:
    """The iterations before the fork must be finished, and its policy must be there."""
    for iteration in range(start.iteration):
        if not state.finished(config, iteration):
            raise ConfigError(f"{run}: iteration {iteration} is not finished; nothing to fork from")
    tree = policy_tree(run, config, start.iteration)
    if tree is not None and not run.tree_exists(tree):
        raise ConfigError(f"{run}/{tree}: the policy of iteration {start.iteration} is gone")


def _kept_keys(state: State, start: Start) -> list[str]:
    """Parts, manifests, choices and quarantined rows before the fork."""
    trees = {tree for found in state.trees.values() for tree in found}
    kept = []
    for key in sorted(state.keys):
        match = _KEY.fullmatch(key)
        if match is None or any(folder in trees for folder in _folders(key)):
            continue
        name = match[2]
        stage = name if name in STAGES else "choose" if name == f"{CHOICE}.json" else ""
        if name in WRITERS:
            stage = WRITERS[name].name
        if stage and start.keeps(int(match[1]), stage):
            kept.append(key)
    return kept


def _folders(key: str) -> list[str]:
    parts = key.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


def _kept_trees(state: State, start: Start) -> list[str]:
    """Complete checkpoints before the fork; training states are never needed again."""
    return sorted(
        tree
        for folder, trees in state.trees.items()
        if folder.endswith("/checkpoints") and (match := _KEY.fullmatch(folder))
        for tree in trees
        if f"{tree}/{COMPLETE}" in state.keys
        and start.keeps(int(match[1]), "merge" if tree.endswith("-merged") else "train")
    )


def _gone(run: Store, state: State, start: Start) -> list[str]:
    """Checkpoints of the forked iteration whose trees were removed after the choice."""
    key = part_key(start.iteration, "checkpoints", Shard(0, 1))
    if not start.keeps(start.iteration, "train") or key not in state.keys:
        return []
    trees = [row.tree for row in run.read_part(key, Checkpoint)]
    gone = [tree for tree in trees if f"{tree}/{COMPLETE}" not in state.keys]
    if gone and start.stage == "respond":
        raise ConfigError(
            f"{run}/{gone[0]}: gone, so it cannot answer again (train.keep_unselected was off); "
            f"use --from train@{start.iteration}"
        )
    return gone


def _claim(target: RunPlace, record: Fork) -> Fork:
    """Writes `fork.json`, or finds that the same fork was begun; ConfigError for another's."""
    run = target.store
    if not run.exists(FORK) and next(iter(run.objects("")), None) is not None:
        raise ConfigError(f"{target.uri}: not empty, and not a fork; choose another name")
    if run.write_json_once(FORK, record):
        return record
    begun = run.read_json(FORK, Fork)
    same = ("origin", "stage", "iteration", "changes")
    if any(getattr(begun, field) != getattr(record, field) for field in same):
        raise ConfigError(
            f"{target.uri}: another fork was begun under this name (from {begun.origin}, "
            f"{begun.stage}@{begun.iteration}); choose another, or remove it"
        )
    return begun
