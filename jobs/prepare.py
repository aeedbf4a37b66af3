"""The source's next instructions."""

from jobs import _flags

if __name__ == "__main__":
    _flags.look_first(__file__)

import sys
from collections.abc import Iterator

from jobs._entry import GROUP_SIZES, Job, in_groups, main
from rlaifv.pipeline import group_of_shard
from rlaifv.records import Instruction, Quarantined
from rlaifv.sources import iteration_rows, open_source, read_instructions


def prepare(job: Job) -> Iterator[Instruction]:
    """Takes the iteration's slice of the source and checks every image.

    reads:
    writes: instructions
    """
    config = job.config
    source = open_source(config.prepare)
    part = iteration_rows(len(source), config.prepare, seed=config.seed, iteration=job.iteration)
    job.notes |= {
        "source": source.name,
        "source_rows": str(len(source)),
        "reused": str(part.reused),
    }
    groups = list(in_groups(part.rows, config.shards.group_size))
    mine = [groups[number] for number in group_of_shard(len(groups), job.shard)]
    sizes: list[int] = []
    for group in job.progress(mine, total=sum(map(len, mine))):
        sizes.append(0)
        for row in read_instructions(source, group, config.prepare):
            if isinstance(row, Quarantined):
                job.quarantine(row)
                continue
            sizes[-1] += 1
            yield row
    job.notes[GROUP_SIZES] = " ".join(map(str, sizes))


if __name__ == "__main__":
    sys.exit(main(prepare))
