"""DPO training: candidates for the next policy."""

import logging
import sys
from collections.abc import Iterator

from jobs._entry import Job, main
from jobs._models import describe_model
from rlaifv.pipeline import checkpoint_key, checkpoint_steps
from rlaifv.records import Checkpoint, PreferencePair, ReferenceLogps

log = logging.getLogger(__name__)


def train(job: Job) -> Iterator[Checkpoint]:
    """Commits a tree per checkpoint while it trains, and goes on where a killed run stopped.

    reads: pairs, reflogps, policy
    writes: checkpoints
    """
    pairs = list(job.read("pairs", PreferencePair))
    steps = checkpoint_steps(job.config, len(pairs))
    if not steps:
        log.warning(
            "no training: %d pairs, at least %d needed", len(pairs), job.config.train.min_pairs
        )
        return
    from jobs._training import run_training  # torch: not for --help, nor for a shard that is done

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
    sys.exit(main(train))
