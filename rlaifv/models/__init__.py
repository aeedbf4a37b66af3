"""Models for stages: `load_model`, `load_text_model`, `load_trainable`.

The only place that knows the kinds of engines; the families of our own are told apart in
`loading`. A new family is a `VisionSide` (or another `VisionLanguageModel`) and a line there.
Engines are imported when they are asked for: remote code and endpoints do without the others, and
without a recent transformers.
"""

from typing import TYPE_CHECKING

from rlaifv.models.memory import back_off

MOST_ROWS = 4096

if TYPE_CHECKING:
    from rlaifv.config import ModelSpec
    from rlaifv.models.base import TextModel, VisionLanguageModel
    from rlaifv.models.branches import TrainableModel
    from rlaifv.models.one_by_one import OneByOne


def load_model(spec: "ModelSpec") -> "VisionLanguageModel":
    """The policy or labeller that `spec` names, on the GPU if there is one.

    Raises ConfigError for a path, family or format that cannot be used, and ArtifactError for a
    checkpoint with missing, broken or surplus weights; messages name the file.
    """
    if spec.endpoint:
        from rlaifv.models.endpoint import EndpointModel

        return EndpointModel(spec)
    return back_off(load_local(_sized(spec)))


def load_local(spec: "ModelSpec") -> "TrainableModel | OneByOne":
    """The same, never an endpoint: trainable unless its code lies beside its weights."""
    if spec.family == "minicpmv" and not spec.endpoint:
        from rlaifv.models.remote import load_remote

        return load_remote(spec)
    return load_trainable(spec, spread=True)


def load_trainable(spec: "ModelSpec", *, spread: bool = False) -> "TrainableModel":
    """The same, for training; raises ConfigError where gradients are out of reach.

    `spread`: over all visible GPUs if one is too small. Not for processes with a GPU each.
    """
    from rlaifv.models import loading

    return loading.load_trainable(spec, spread=spread)


def load_text_model(spec: "ModelSpec") -> "TextModel":
    """A chat model without images; errors as for `load_model`."""
    if spec.endpoint:
        from rlaifv.models.endpoint import EndpointModel

        return EndpointModel(spec)
    from rlaifv.models import loading

    return back_off(loading.load_text_model(_sized(spec)))


def load_scorer(spec: "ModelSpec") -> "TrainableModel":
    """A policy that scores given answers; as `load_trainable`, with batches that fit."""
    return back_off(load_trainable(_sized(spec), spread=True))


def _sized(spec: "ModelSpec") -> "ModelSpec":
    """With a batch size to begin with: for 0, more rows than any call has."""
    return spec if spec.batch_size else spec.model_copy(update={"batch_size": MOST_ROWS})
