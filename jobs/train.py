"""DPO training: candidates for the next policy.

`torchrun --nproc-per-node 8 -m -- jobs.train ...`, or `python -m jobs.train ...` with torchrun's own
variables (PET_NPROC_PER_NODE, PET_NNODES, PET_RDZV_ENDPOINT, ...), which then starts torchrun.
"""

import logging
import sys
from collections.abc import Iterator

from jobs._entry import Job, join_gang, main
from jobs._models import describe_model, reference_notes
from rlaifv.errors import ArtifactError
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

    _check_reference(job)
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


def _check_reference(job: Job) -> None:
    """Raises ArtifactError for reference log-probabilities of another model, processor or pairs."""
    (pairs,) = job.parts("pairs")
    wanted = reference_notes(job.policy()) | {"pairs": job.origin("pairs").rows_sha256}
    for part, key in enumerate(job.parts("reflogps")):
        origin = job.origin("reflogps", part=part)
        found = {**origin.notes, "pairs": origin.inputs.get(pairs)}
        for name, value in wanted.items():
            if found.get(name) != value:
                raise ArtifactError(
                    f"{job.run}/{key}: made with another {name}: {found.get(name)}, "
                    f"{value} was expected; delete the reflogps of this iteration"
                )


if __name__ == "__main__":
    join_gang("jobs.train")
    sys.exit(main(train))
