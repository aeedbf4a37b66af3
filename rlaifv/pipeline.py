"""The contents page: the stages, what each reads and writes, and every name on disk.

<root>/<run>/config.json
<root>/<run>/iteration-0/<artifact>/00003-of-00008.parquet
<root>/<run>/iteration-0/<artifact>/manifest.json       the stage is complete
<root>/<run>/iteration-0/checkpoints/step-000400/...    a tree; `_COMPLETE` is written last
<root>/<run>/iteration-0/choice.json                    -> policy of iteration 1
<root>/<run>/compiled/sample-<code, torch, GPU>-0.bin   what torch compiled; may be deleted at any time
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from rlaifv.config import HeldOutConfig, RunConfig
from rlaifv.records import (
    Answer,
    Checkpoint,
    Claim,
    Grade,
    Instruction,
    Merge,
    PreferencePair,
    Record,
    ReferenceLogps,
    Response,
    Verdict,
)

CONFIG = "config.json"
COMPILED = "compiled"
"""Folder of a run: what torch compiled on a GPU, for the next process of the same stage."""
POLICY = "policy"
"""Pseudo-artifact: `config.policy`, or the tree chosen by the iteration before."""
HELD_OUT = "held_out"
"""Name of the benchmark that consists of what `prepare` set aside, and its folder."""

ARTIFACTS: dict[str, type[Record]] = {
    "instructions": Instruction,
    "answers": Answer,
    "claims": Claim,
    "verdicts": Verdict,
    "pairs": PreferencePair,
    "reflogps": ReferenceLogps,
    "checkpoints": Checkpoint,
    "responses": Response,
    "grades": Grade,
    "merges": Merge,
}


class Stage(NamedTuple):
    """One job module `jobs.<name>`, and the artifacts it reads and writes."""

    name: str
    reads: tuple[str, ...]
    writes: str
    runs_on: Literal["cpu", "gpu", "gpus", "controller"]
    """What it needs: a CPU, a GPU (or an endpoint), all GPUs of a gang, or the controller."""


CHOICE = "choice"
"""Pseudo-artifact: `choice.json`."""

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("prepare", (), "instructions", "cpu"),
        Stage("sample", ("instructions", POLICY), "answers", "gpu"),
        Stage("claim", ("instructions", "answers"), "claims", "gpu"),
        Stage("verify", ("instructions", "claims"), "verdicts", "gpu"),
        Stage("pair", ("instructions", "answers", "claims", "verdicts"), "pairs", "cpu"),
        Stage("reflogp", ("pairs", POLICY), "reflogps", "gpu"),
        Stage("train", ("pairs", "reflogps", POLICY), "checkpoints", "gpus"),
        Stage("respond", ("checkpoints", POLICY), "responses", "gpu"),
        Stage("grade", ("responses",), "grades", "cpu"),
        Stage("choose", ("grades", "checkpoints", "pairs"), CHOICE, "controller"),
        Stage("merge", (CHOICE, "checkpoints", POLICY), "merges", "gpu"),
    )
}


@dataclass(frozen=True, order=True)
class Shard:
    """Shard `index` of `count`; written `I/N` on the command line."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def holds_out(config: RunConfig) -> HeldOutConfig | None:
    """What `prepare` sets aside for choosing; None where a benchmark selects, or nothing does."""
    selects = any(spec.use == "select" for spec in config.respond.benchmarks)
    stages = {"prepare", "choose"} <= set(config.stages)
    wanted = config.choose.rule == "held_out" and stages and not selects
    return config.choose.held_out if wanted else None


def labels_grades(config: RunConfig) -> bool:
    """Whether `grade` asks the labeller, as `verify` does."""
    held_out = holds_out(config)
    return held_out is not None and held_out.coco is None


def stage_of(config: RunConfig, name: str) -> Stage:
    """The stage as this run needs it: a GPU where a model runs here, none for rules and servers."""
    stage = STAGES[name]
    if stage.runs_on != "gpu" and not (name == "grade" and labels_grades(config)):
        return stage
    labeller = config.verify.labeller
    models = {"claim": config.claim.model, "verify": labeller, "grade": labeller}
    spec = models.get(name, config.policy)
    elsewhere = spec.endpoint is not None or spec.family == "rules"
    return stage._replace(runs_on="cpu" if elsewhere else "gpu")


def num_checkpoints(config: RunConfig) -> int:
    """Candidates that training may write; fewer when an epoch has fewer steps than that.

    None without `train` among the run's stages: then only the starting policy is evaluated.
    """
    if "train" not in config.stages:
        return 0
    return config.train.epochs * config.train.checkpoints_per_epoch


def checkpoint_steps(config: RunConfig, num_pairs: int) -> list[int]:
    """Optimiser steps after which training writes a checkpoint, ascending, without repeats.

    An epoch has ceil(pairs / batch) steps; its checkpoints are spread evenly (the release saves
    every quarter of an epoch). Empty with fewer pairs than `train.min_pairs`.
    """
    if num_pairs < config.train.min_pairs:
        return []
    per_epoch = math.ceil(num_pairs / config.train.global_batch_size)
    ordinals = range(1, num_checkpoints(config) + 1)
    steps = (round(n * per_epoch / config.train.checkpoints_per_epoch) for n in ordinals)
    return sorted({max(1, step) for step in steps})


def num_shards(config: RunConfig, stage: str) -> int:
    """How many shards a stage has. `respond` and `grade`: (checkpoint ordinal x slice)."""
    shards = config.shards
    if stage in ("prepare", "sample", "claim", "verify"):
        return shards.instructions
    if stage == "reflogp":
        return shards.reflogp
    if stage in ("respond", "grade"):
        return (1 + num_checkpoints(config)) * shards.respond
    return 1


class RespondShard(NamedTuple):
    """What a shard of `respond` (and of `grade`) covers."""

    ordinal: int
    """0: the policy that the iteration starts from; n: the n-th checkpoint."""
    questions: Shard


def respond_shard(config: RunConfig, shard: Shard) -> RespondShard:
    """Shards of one checkpoint are adjacent, so that early checkpoints can be answered early."""
    ordinal, index = divmod(shard.index, config.shards.respond)
    return RespondShard(ordinal, Shard(index, config.shards.respond))


def iteration_key(iteration: int) -> str:
    return f"iteration-{iteration}"


def part_key(iteration: int, artifact: str, shard: Shard) -> str:
    """Key of one part, relative to the run."""
    name = f"{shard.index:05d}-of-{shard.count:05d}.parquet"
    return f"{iteration_key(iteration)}/{artifact}/{name}"


def quarantine_key(iteration: int, stage: str, shard: Shard) -> str:
    """Key of the rows that a shard set aside; written before its part, and only if there are any."""
    return part_key(iteration, f"quarantine/{stage}", shard)


def held_out_key(iteration: int) -> str:
    """Key of the questions that `prepare` set aside; written before its first part."""
    return part_key(iteration, f"{HELD_OUT}/prepare", Shard(0, 1))


def manifest_key(iteration: int, artifact: str) -> str:
    return f"{iteration_key(iteration)}/{artifact}/manifest.json"


def choice_key(iteration: int) -> str:
    return f"{iteration_key(iteration)}/choice.json"


def checkpoint_key(iteration: int, step: int) -> str:
    return f"{iteration_key(iteration)}/checkpoints/step-{step:06d}"


def merged_key(iteration: int, step: int) -> str:
    """Key of the full tree made of a chosen adapter: policy and reference of the next iteration."""
    return f"{iteration_key(iteration)}/checkpoints/step-{step:06d}-merged"


def train_state_key(iteration: int, step: int) -> str:
    """Key of the resumable training state after `step`; never a candidate."""
    return f"{iteration_key(iteration)}/train_state/step-{step:06d}"


def compiled_key(stage: str, environment: str) -> str:
    """Key of what a stage compiled for a GPU: no artifact, not part of an iteration."""
    return f"{COMPILED}/{stage}-{environment}.bin"


def done_key(iteration: int, stage: str, shard: Shard) -> str:
    """The object whose existence means that this shard of the stage is done."""
    if stage == "choose":
        return choice_key(iteration)
    return part_key(iteration, STAGES[stage].writes, shard)


def group_of_shard(groups: int, shard: Shard) -> range:
    """The groups dealt to a shard: every `count`-th, from `index`.

    Batches never cross a group of `group_size` consecutive items, so no bit of a result depends
    on the number of shards.
    """
    return range(shard.index, groups, shard.count)
