"""The checkpoint that the next iteration starts from; the controller does the same by itself."""

from jobs import _flags

if __name__ == "__main__":
    _flags.look_first(__file__)

import sys
from collections.abc import Iterator

from jobs._entry import Job, main
from rlaifv.choosing import choose_checkpoint
from rlaifv.records import Choice


def choose(job: Job) -> Iterator[Choice]:
    """Applies the selection rule to stored grades.

    reads: grades, checkpoints, pairs
    writes: choice
    """
    yield choose_checkpoint(job.run, job.config, job.iteration)


if __name__ == "__main__":
    sys.exit(main(choose))
