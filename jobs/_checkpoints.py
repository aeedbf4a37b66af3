"""The model behind an ordinal of `respond`."""

import logging
from typing import TYPE_CHECKING, NamedTuple

from jobs._entry import Job
from jobs._models import describe_model
from jobs._reference import num_scored
from rlaifv.errors import ArtifactError
from rlaifv.pipeline import checkpoint_key, checkpoint_steps

if TYPE_CHECKING:
    from rlaifv.models.base import VisionLanguageModel

log = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """A checkpoint, ready to answer."""

    step: int
    model: "VisionLanguageModel"


def load_ordinal(job: Job, ordinal: int) -> Loaded | None:
    """The iteration's policy (0) or its n-th checkpoint; None when training writes fewer.

    Needs the pairs (their number tells the steps) and the tree, not the end of training. Raises
    ArtifactError when the tree is not there yet.
    """
    spec = job.policy()
    if ordinal == 0:
        from rlaifv.models import load_model  # torch: not for a checkpoint that is not there

        job.notes["model"] = describe_model(spec)
        return Loaded(0, load_model(spec))
    steps = checkpoint_steps(job.config, num_scored(job))
    if ordinal > len(steps):
        log.info("no checkpoint %d: training writes %d", ordinal, len(steps))
        return None
    step = steps[ordinal - 1]
    key = checkpoint_key(job.iteration, step)
    if not job.run.tree_exists(key):
        raise ArtifactError(f"{job.run}/{key}: no complete tree; has training got there?")
    job.inputs[key] = job.run.tree_digest(key)
    folder = job.run.tree_path(key)
    from rlaifv.models import load_model, load_trainable  # torch, as above

    if job.config.train.lora is None:
        spec = spec.model_copy(update={"path": str(folder), "revision": None})
        job.notes["model"] = describe_model(spec)
        return Loaded(step, load_model(spec))
    from rlaifv.training.adapters import load_adapter

    job.notes["model"] = f"{describe_model(spec)} adapter {job.inputs[key][:16]}"
    model = load_trainable(spec)
    load_adapter(model.module, folder)
    return Loaded(step, model)
