"""What to do next: one pure function from what is stored and what runs to a list of actions.

The store's listing is the whole progress state, so resuming is planning again: a shard whose part
exists is never redone, and a controller that died left nothing else behind.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

from rlaifv.config import RunConfig
from rlaifv.pipeline import (
    CHOICE,
    POLICY,
    STAGES,
    Shard,
    Stage,
    checkpoint_key,
    done_key,
    holds_out,
    iteration_key,
    manifest_key,
    merged_key,
    num_shards,
    respond_shard,
    stage_of,
)
from rlaifv.records import Choice
from rlaifv.store import COMPLETE

MAX_FAILURES = 3
"""Attempts at a shard that ends with 1 (a bug) or leaves no part; the next one rarely helps."""
MAX_INTERRUPTIONS = 10
"""Attempts at a shard that is killed or reports something passing (75)."""
CONFIG_EXIT, DATA_EXIT, TRANSIENT_EXIT = 78, 65, 75
WRITERS = {stage.writes: stage for stage in STAGES.values()}
_TREE = re.compile(r"(iteration-\d+/(?:checkpoints|train_state)/step-\d+(?:-merged)?)/")

Unit = Literal["shard", "stage"]
"""What an executor is handed: single shards as they become ready, or (an Indexed Job) a stage;
`respond` and `grade` then one checkpoint at a time."""


class ShardId(NamedTuple):
    """One shard of one stage of one iteration."""

    iteration: int
    stage: str
    number: int

    def __str__(self) -> str:
        return f"iteration {self.iteration} {self.stage} shard {self.number}"


class ShardState(NamedTuple):
    """What an executor knows of a shard that was submitted to it."""

    phase: Literal["waiting", "running", "ended"]
    attempts: int = 0
    exit_code: int | None = None
    """Of the last attempt; minus the signal's number when a signal ended it. None: none ended."""
    reason: str = ""
    """The last attempt's last words; while it waits, what it waits for."""
    final: bool = False
    """The executor knows that another attempt would end the same way."""


class JobSpec(NamedTuple):
    """Shards of one stage to be run; where and with what is the executor's business."""

    name: str
    """Deterministic: the same shards of the same run always get the same name."""
    iteration: int
    stage: Stage
    argv: tuple[str, ...]
    """`{shard}` stands for `index/count`."""
    shards: tuple[int, ...]
    """The missing ones; a shard that is done exits 0 at once, so more may be run."""
    num_shards: int

    def argv_of(self, index: int) -> tuple[str, ...]:
        """The command line of one shard."""
        shard = str(Shard(index, self.num_shards))
        return tuple(part.replace("{shard}", shard) for part in self.argv)


class Submit(NamedTuple):
    """Hand a job to the executor."""

    spec: JobSpec


class WriteManifest(NamedTuple):
    """All parts of a stage are there: write their summary."""

    iteration: int
    stage: str


class Choose(NamedTuple):
    """Choose the iteration's checkpoint and commit `choice.json`."""

    iteration: int


class Delete(NamedTuple):
    """Remove trees that nothing needs any more."""

    trees: tuple[str, ...]


class Stop(NamedTuple):
    """End the run: exit code 0 when everything is done."""

    reason: str
    exit_code: int
    shard: ShardId | None = None
    """The one that ended the run, if one did."""


Action = Submit | WriteManifest | Choose | Delete | Stop


class State(NamedTuple):
    """What is stored of a run."""

    keys: frozenset[str]
    choices: Mapping[int, Choice]
    trees: Mapping[str, tuple[str, ...]]
    """Tree keys by iteration key and kind, such as `iteration-0/checkpoints`, ascending."""
    folders: frozenset[str]
    """Where there is an object at all; spares looking for the parts of stages yet to come."""

    def done(self, config: RunConfig, iteration: int, stage: str) -> frozenset[int]:
        """Indices of the shards whose part exists."""
        count = num_shards(config, stage)
        keys = self.keys
        if done_key(iteration, stage, Shard(0, count)).rpartition("/")[0] not in self.folders:
            return frozenset()
        return frozenset(
            index
            for index in range(count)
            if done_key(iteration, stage, Shard(index, count)) in keys
        )

    def complete_trees(self, iteration: int) -> int:
        """Checkpoints of an iteration that can be loaded; training writes them in order."""
        trees = self.trees.get(f"{iteration_key(iteration)}/checkpoints", ())
        return sum(
            not tree.endswith("-merged") and f"{tree}/{COMPLETE}" in self.keys for tree in trees
        )

    def needs_merge(self, config: RunConfig, iteration: int) -> bool:
        """Whether the choice is an adapter that has to become a full tree."""
        choice = self.choices.get(iteration)
        wanted = config.train.lora is not None and "merge" in config.stages
        return wanted and choice is not None and choice.tree is not None

    def finished(self, config: RunConfig, iteration: int) -> bool:
        """Whether the next iteration can start, or (without `choose`) all stages are complete."""
        if "choose" not in config.stages:
            return all(
                len(self.done(config, iteration, stage)) == num_shards(config, stage)
                for stage in config.stages
                if stage != "merge"  # of nothing, without a choice
            )
        if iteration not in self.choices:
            return False
        merged = done_key(iteration, "merge", Shard(0, 1)) in self.keys
        return merged or not self.needs_merge(config, iteration)


def observe(keys: Iterable[str], choices: Mapping[int, Choice]) -> State:
    """The state that a listing of the run shows."""
    listed = frozenset(keys)
    trees: dict[str, set[str]] = {}
    for key in listed:
        if match := _TREE.match(key):
            tree = match[1]
            trees.setdefault(tree.rpartition("/")[0], set()).add(tree)
    folders = frozenset(key.rpartition("/")[0] for key in listed)
    ordered = {kind: tuple(sorted(found)) for kind, found in trees.items()}
    return State(listed, choices, ordered, folders)


class Planner(NamedTuple):
    """What stays the same from one plan to the next."""

    config: RunConfig
    run_uri: str
    unit: Unit = "shard"


def plan(planner: Planner, state: State, shards: Mapping[ShardId, ShardState]) -> list[Action]:
    """The next actions, most urgent first; empty when there is only waiting to do.

    A shard is submitted when its inputs are there and it is neither done nor in `shards` as
    waiting or running. One that ended without leaving its part is submitted again, up to a bound;
    a wrong configuration (78) or bad data (65) stops the run at once.
    """
    actions: list[Action] = []
    for iteration in range(planner.config.iterations):
        actions += _manifests(planner.config, state, iteration)
        if not state.finished(planner.config, iteration):
            return actions + _steps(planner, state, shards, iteration=iteration)
        actions += _leftovers(planner.config, state, iteration)
    if not actions:
        return [Stop(f"all {planner.config.iterations} iterations are done", 0)]
    return actions


def planned_stages(config: RunConfig) -> list[Stage]:
    """The stages that a run has, in the pipeline's order; `merge` only where there are adapters."""
    return [
        stage_of(config, stage.name)
        for stage in STAGES.values()
        if stage.name in config.stages and (stage.name != "merge" or config.train.lora is not None)
    ]


def _manifests(config: RunConfig, state: State, iteration: int) -> Iterator[WriteManifest]:
    for stage in STAGES.values():
        if stage.writes == CHOICE or manifest_key(iteration, stage.writes) in state.keys:
            continue
        if len(state.done(config, iteration, stage.name)) == num_shards(config, stage.name):
            yield WriteManifest(iteration, stage.name)


def _leftovers(config: RunConfig, state: State, iteration: int) -> Iterator[Delete]:
    """Training state, and (unless they are to be kept) the trees that were not chosen."""
    folder, choice = iteration_key(iteration), state.choices.get(iteration)
    doomed = list(state.trees.get(f"{folder}/train_state", ()))
    if choice is not None and not config.train.keep_unselected:
        kept = {checkpoint_key(iteration, choice.step), merged_key(iteration, choice.step)}
        trees = state.trees.get(f"{folder}/checkpoints", ())
        doomed += [tree for tree in trees if tree not in kept]
    if doomed:
        yield Delete(tuple(doomed))


def _steps(
    planner: Planner, state: State, shards: Mapping[ShardId, ShardState], *, iteration: int
) -> list[Action]:
    """Actions of the one iteration that is under way."""
    config = planner.config
    done = {name: state.done(config, iteration, name) for name in STAGES}
    actions: list[Action] = []
    for stage in planned_stages(config):
        if stage.name == "merge" and not state.needs_merge(config, iteration):
            continue
        if stop := _lacks(config, stage, done):
            return [stop]
        ready = _ready(config, state, iteration=iteration, stage=stage, done=done)
        if ready is None:
            continue
        if stage.runs_on == "controller":
            if not done[stage.name] and ready(0):
                actions.append(Choose(iteration))
            continue
        for batch in _batches(planner, stage):
            missing = tuple(index for index in batch if index not in done[stage.name])
            idle = [i for i in missing if _is_idle(shards.get(ShardId(iteration, stage.name, i)))]
            if not idle or not all(map(ready, missing)):
                continue
            for index in idle:
                identity = ShardId(iteration, stage.name, index)
                if stop := _gives_up(identity, shards.get(identity)):
                    return [stop]
            job = _job(planner, stage, iteration=iteration, batch=batch)
            actions.append(Submit(job._replace(shards=tuple(idle))))
    return actions


def every_job(planner: Planner) -> Iterator[JobSpec]:
    """The jobs of a whole run as they are submitted when nothing fails, in order."""
    for iteration in range(planner.config.iterations):
        for stage in planned_stages(planner.config):
            if stage.runs_on != "controller":
                for batch in _batches(planner, stage):
                    yield _job(planner, stage, iteration=iteration, batch=batch)


def _lacks(config: RunConfig, stage: Stage, done: Mapping[str, frozenset[int]]) -> Stop | None:
    """The end of a run that has a stage but nothing that makes what it reads."""
    if stage.name == "respond":  # the policy can answer without any checkpoint
        return None
    for artifact in stage.reads:
        producer = None if artifact == POLICY else WRITERS[artifact].name
        if producer is None or producer in config.stages:
            continue
        if len(done[producer]) < num_shards(config, producer):
            return Stop(
                f"{stage.name} reads {artifact}, which are not here, and `stages` is without "
                f"{producer!r}: add it, or import them",
                CONFIG_EXIT,
            )
    return None


def _is_idle(shard: ShardState | None) -> bool:
    return shard is None or shard.phase == "ended"


def _gives_up(identity: ShardId, shard: ShardState | None) -> Stop | None:
    """Why the run must end because of this shard, if so."""
    if shard is None or shard.exit_code is None:
        return None
    code = shard.exit_code
    if code in (CONFIG_EXIT, DATA_EXIT):
        return Stop(f"{identity}: {shard.reason}", code, identity)
    if shard.final:
        return Stop(f"{identity}: {shard.reason}", code, identity)
    passing = code < 0 or code > 128 or code == TRANSIENT_EXIT
    if shard.attempts < (MAX_INTERRUPTIONS if passing else MAX_FAILURES):
        return None
    ended = f"signal {-code}" if code < 0 else f"exit code {code}"
    words = shard.reason if code else "it ended with 0, but its part is not there"
    told = f"{identity}: failed {shard.attempts} times, last with {ended}: {words}"
    return Stop(told, code, identity)


def _ready(
    config: RunConfig,
    state: State,
    *,
    iteration: int,
    stage: Stage,
    done: Mapping[str, frozenset[int]],
) -> Callable[[int], bool] | None:
    """Whether the inputs of a shard are there; None: of no shard.

    Stages with as many shards as their producer read the part of the same number, as soon as it
    exists; others need every part.
    """
    if stage.name == "respond":
        if holds_out(config) and 0 not in done["prepare"]:  # its first shard stores the questions
            return None
        trained, trees = bool(done["train"]), state.complete_trees(iteration)
        count = num_shards(config, "respond")

        def answerable(index: int) -> bool:
            return trained or respond_shard(config, Shard(index, count)).ordinal <= trees

        return answerable
    matching: list[frozenset[int]] = []
    for artifact in stage.reads:
        if artifact == POLICY:  # there by now: the iteration before is finished
            continue
        producer = WRITERS[artifact].name
        if num_shards(config, producer) == num_shards(config, stage.name):
            matching.append(done[producer])
        elif len(done[producer]) < num_shards(config, producer):
            return None
    if not all(matching):
        return None
    return lambda index: all(index in parts for parts in matching)


def _batches(planner: Planner, stage: Stage) -> Iterator[range]:
    count, size = num_shards(planner.config, stage.name), 1
    if planner.unit == "stage":
        by_checkpoint = stage.name in ("respond", "grade")
        size = planner.config.shards.respond if by_checkpoint else count
    for start in range(0, count, size):
        yield range(start, start + size)


def _job(planner: Planner, stage: Stage, *, iteration: int, batch: range) -> JobSpec:
    count = num_shards(planner.config, stage.name)
    name = f"{planner.config.name}-{iteration}-{stage.name}"
    if len(batch) < count:
        name += f"-{batch.start}"
    where = ("--run", planner.run_uri, "--iteration", str(iteration), "--shard", "{shard}")
    return JobSpec(name, iteration, stage, (f"jobs.{stage.name}", *where), tuple(batch), count)
