"""The source's next instructions, and what is held out for choosing."""

from jobs import _flags

if __name__ == "__main__":
    _flags.look_first(__file__)

import sys
from collections.abc import Iterator

from jobs._entry import GROUP_SIZES, Job, main
from jobs._groups import in_groups, progress
from jobs._holding_out import hold_out, usable
from rlaifv.pipeline import group_of_shard
from rlaifv.records import Instruction
from rlaifv.sources import iteration_rows, open_source


def prepare(job: Job) -> Iterator[Instruction]:
    """Takes the iteration's slice of the source and checks every image.

    reads:
    writes: instructions
    """
    config, source = job.config, open_source(job.config.prepare)
    aside = hold_out(job, source)
    part = iteration_rows(
        len(source),
        config.prepare,
        seed=config.seed,
        iteration=job.iteration,
        held_out=aside.source_rows,
    )
    job.notes |= {"source": source.name, "source_rows": str(len(source))}
    job.notes["reused"] = str(part.reused)
    groups = list(in_groups(part.rows, config.shards.group_size))
    mine = [groups[number] for number in group_of_shard(len(groups), job.shard)]
    sizes: list[int] = []
    job.total = sum(map(len, mine))
    for group in progress(job, mine):
        sizes.append(0)
        for row in usable(job, source, group, aside):
            sizes[-1] += 1
            yield row
    job.notes[GROUP_SIZES] = " ".join(map(str, sizes))


if __name__ == "__main__":
    sys.exit(main(prepare))
