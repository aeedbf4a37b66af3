"""From stored grades to the choice of an iteration; needs no model."""

from collections import defaultdict
from collections.abc import Iterator

from rlaifv.benchmarks.labelled import REJECTED_CLAIMS
from rlaifv.benchmarks.of_run import run_benchmarks, selecting
from rlaifv.config import Criterion, RunConfig
from rlaifv.errors import ArtifactError
from rlaifv.pipeline import HELD_OUT, Shard, holds_out, labels_grades, num_shards, part_key
from rlaifv.records import Checkpoint, Choice, Grade
from rlaifv.selection import PAPER_BASIS, RESPONSE_HALLUCINATION, Evaluated, Grounds, choose
from rlaifv.store import Store


def choose_checkpoint(run: Store, config: RunConfig, iteration: int) -> Choice:
    """The choice that the stored grades lead to; writes nothing.

    Raises ArtifactError when a part is missing or the steps were not asked the same questions.
    """
    only = Shard(0, 1)
    checkpoints = list(run.read_part(part_key(iteration, "checkpoints", only), Checkpoint))
    grades: dict[tuple[str, int], list[Grade]] = defaultdict(list)
    for row in _grades(run, config, iteration):
        grades[row.benchmark, row.step].append(row)
    trees: dict[int, str | None] = {0: None} | {row.step: row.tree for row in checkpoints}
    evaluated = []
    benchmarks = run_benchmarks(run, config, iteration)
    for step, tree in trees.items():
        metrics: dict[str, float | None] = {}
        for name, benchmark in benchmarks.items():
            mine, start = grades[name, step], grades[name, 0]
            if {row.question_id for row in mine} != {row.question_id for row in start}:
                raise ArtifactError(
                    f"{run}: iteration {iteration}, {name}: {len(mine)} grades of step {step} "
                    f"and {len(start)} of step 0 are not of the same questions"
                )
            own = benchmark.metrics(mine)
            metrics |= {f"{name}/{metric}": value for metric, value in own.items()}
        evaluated.append(Evaluated(step, tree, metrics))
    return choose(
        evaluated,
        Grounds(
            select=selecting(config),
            criteria=_criteria(config),
            basis=_basis(config, len({row.question_id for row in grades[HELD_OUT, 0]})),
        ),
        config=config.choose,
        num_pairs=run.provenance(part_key(iteration, "pairs", only)).rows,
        min_pairs=config.train.min_pairs,
    )


def _criteria(config: RunConfig) -> tuple[Criterion, ...]:
    """As configured, else the one that fits what selects."""
    usual = REJECTED_CLAIMS if labels_grades(config) else RESPONSE_HALLUCINATION
    return config.choose.criteria or (Criterion(metric=usual),)


def _basis(config: RunConfig, num_questions: int) -> str:
    """What the comparison rests on, for the reason."""
    held_out = holds_out(config)
    if held_out is None:
        return PAPER_BASIS if config.choose.rule == "paper" else ""
    if held_out.coco is not None:
        return (
            f"compared by CHAIR on {num_questions} COCO images that are in no instruction and no "
            "benchmark"
        )
    return (
        f"compared by the labeller's own verdicts on {num_questions} held-out instructions, for "
        "no COCO annotations are given (choose.held_out.coco)"
    )


def _grades(run: Store, config: RunConfig, iteration: int) -> Iterator[Grade]:
    count = num_shards(config, "grade")
    for index in range(count):
        yield from run.read_part(part_key(iteration, "grades", Shard(index, count)), Grade)
