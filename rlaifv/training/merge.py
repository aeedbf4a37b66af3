"""From a chosen adapter to a full model: the next iteration's policy and reference."""

import io
import logging
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig

from rlaifv.config import ModelSpec
from rlaifv.errors import ArtifactError
from rlaifv.models import load_trainable
from rlaifv.models.base import Branches
from rlaifv.models.branches import TrainableModel
from rlaifv.training.adapters import load_adapter
from rlaifv.training.parts import save_full

log = logging.getLogger(__name__)

TOLERANCE_NATS = 1e-3
"""Largest difference of a token's log-probability, float32. Merging changes the order of sums
only, so the difference is rounding noise; an adapter that was not applied gives far more."""


def merge_adapter(base: Path, adapter: Path, out: Path) -> float:
    """Fills the empty folder `out` with base + adapter as a full Hugging Face tree.

    Returns the largest difference that the check found, in nats.

    Merged in float32, checked there (token log-probabilities of one image and answer must equal
    those of base and adapter side by side), and written in the precision of `base`. Raises
    ArtifactError when the adapter does not fit the base or the check fails.
    """
    precision = AutoConfig.from_pretrained(base).dtype or torch.float32
    engine = load_trainable(ModelSpec(path=str(base), dtype="float32"))
    adapted = load_adapter(engine.module, adapter)
    before_T = _sample_logps(engine)
    merged = adapted.merge_and_unload(safe_merge=True)
    difference = (_sample_logps(engine) - before_T).abs().max().item()
    if not difference <= TOLERANCE_NATS:
        raise ArtifactError(
            f"{adapter}: merged into {base}, a token's log-probability differs by {difference} "
            f"nats from the adapter's; at most {TOLERANCE_NATS} was expected"
        )
    log.info("adapter merged largest_difference_nats=%.2e", difference)
    save_full(merged.to(precision), out, like=base)
    return difference


@torch.no_grad()
def _sample_logps(engine: TrainableModel) -> Tensor:
    encoded = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(encoded, "PNG")
    row = Branches(encoded.getvalue(), "What is in the picture?", ("A picture of a gradient.",))
    return engine.branch_logps(engine.encode_branches([row]))[0][0]
