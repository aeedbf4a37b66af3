"""DPO training: candidates for the next policy.

`torchrun --nproc-per-node 8 -m -- jobs.train ...`, or `python -m jobs.train ...` with torchrun's own
variables (PET_NPROC_PER_NODE, PET_NNODES, PET_RDZV_ENDPOINT, ...), which then starts torchrun.
"""

from jobs import _flags

if __name__ == "__main__":
    _flags.look_first(__file__)

import logging
import sys
from collections.abc import Iterator

from jobs._entry import Job, join_gang, main
from jobs._models import describe_model
from jobs._reference import check_reference, num_scored, scored_pairs
from rlaifv.pipeline import checkpoint_key, checkpoint_steps
from rlaifv.records import Checkpoint, ReferenceLogps

log = logging.getLogger(__name__)


def train(job: Job) -> Iterator[Checkpoint]:
    """Commits a tree per checkpoint while it trains, and goes on where a killed run stopped.

    reads: pairs, reflogps, policy
    writes: checkpoints
    """
    steps = checkpoint_steps(job.config, num_scored(job))
    if not steps:
        log.warning(
            "no training: %d pairs, at least %d needed",
            num_scored(job),
            job.config.train.min_pairs,
        )
        return
    from jobs._training import run_training  # torch: not for --help, nor for a shard that is done

    check_reference(job)
    pairs = scored_pairs(job)
    reflogps = {row.pair_id: row for row in job.read_all("reflogps", ReferenceLogps)}
    job.notes["policy"] = describe_model(job.policy())
    for made in run_training(job, pairs=pairs, reflogps=reflogps, steps=steps):
        yield Checkpoint(
            step=made.step,
            epoch=made.epoch,
            tree=checkpoint_key(job.iteration, made.step),
            kind="full" if job.config.train.lora is None else "lora",
            train_loss=made.train_loss,
            num_pairs=len(pairs),
        )


if __name__ == "__main__":
    join_gang("jobs.train")
    sys.exit(main(train))
