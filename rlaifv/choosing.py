"""From stored grades to the choice of an iteration; needs no model."""

from collections import defaultdict
from collections.abc import Iterator

from rlaifv.benchmarks import load_benchmark
from rlaifv.config import RunConfig
from rlaifv.errors import ArtifactError
from rlaifv.pipeline import Shard, num_shards, part_key
from rlaifv.records import Checkpoint, Choice, Grade
from rlaifv.selection import Evaluated, choose
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
    for step, tree in trees.items():
        metrics: dict[str, float | None] = {}
        for spec in config.respond.benchmarks:
            mine, start = grades[spec.name, step], grades[spec.name, 0]
            if {row.question_id for row in mine} != {row.question_id for row in start}:
                raise ArtifactError(
                    f"{run}: iteration {iteration}, {spec.name}: {len(mine)} grades of step {step} "
                    f"and {len(start)} of step 0 are not of the same questions"
                )
            own = load_benchmark(spec).metrics(mine)
            metrics |= {f"{spec.name}/{name}": value for name, value in own.items()}
        evaluated.append(Evaluated(step, tree, metrics))
    return choose(
        evaluated,
        select=[spec.name for spec in config.respond.benchmarks if spec.use == "select"],
        config=config.choose,
        num_pairs=run.provenance(part_key(iteration, "pairs", only)).rows,
        min_pairs=config.train.min_pairs,
    )


def _grades(run: Store, config: RunConfig, iteration: int) -> Iterator[Grade]:
    count = num_shards(config, "grade")
    for index in range(count):
        yield from run.read_part(part_key(iteration, "grades", Shard(index, count)), Grade)
