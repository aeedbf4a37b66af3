"""A chosen adapter merged into its base: the next iteration's policy as a full tree."""

from jobs import _flags

if __name__ == "__main__":
    _flags.look_first(__file__)

import sys
from collections.abc import Iterator
from pathlib import Path

from jobs._entry import Job, main
from jobs._models import describe_model
from rlaifv.pipeline import choice_key, merged_key
from rlaifv.records import Choice, Merge


def merge(job: Job) -> Iterator[Merge]:
    """Writes one tree for an adapter, nothing for a full checkpoint.

    reads: choice, checkpoints, policy
    writes: merges
    """
    choice = job.run.read_json(choice_key(job.iteration), Choice)
    if job.config.train.lora is None or choice.tree is None:
        return
    from rlaifv.models.checkpoint import find_checkpoint  # torch: not for --help
    from rlaifv.training.merge import merge_adapter

    spec = job.policy()
    job.notes["policy"] = describe_model(spec)
    job.inputs[choice.tree] = job.run.tree_digest(choice.tree)
    base: Path = find_checkpoint(spec).folder
    key = merged_key(job.iteration, choice.step)
    with job.run.new_tree(key) as folder:
        difference = merge_adapter(base, job.run.tree_path(choice.tree), folder)
    yield Merge(step=choice.step, tree=key, max_logit_difference=difference)


if __name__ == "__main__":
    sys.exit(main(merge))
