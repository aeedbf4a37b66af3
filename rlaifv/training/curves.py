"""Training curves: the numbers of each optimiser step, as TensorBoard scalars."""

from pathlib import Path
from typing import NamedTuple

from torch.utils.tensorboard import SummaryWriter


class StepMetrics(NamedTuple):
    """One optimiser step: means over its pairs; log-probabilities in nats."""

    step: int
    """Updates made so far, this one included."""
    loss: float
    rewards_chosen: float
    rewards_rejected: float
    rewards_margins: float
    rewards_accuracies: float
    logps_chosen: float
    logps_rejected: float
    drift_chosen: float
    """Policy minus reference log-probability of the chosen answers."""
    kl: float
    """KL(reference || policy) per token, estimated as if the reference wrote both answers."""
    length_drift: float
    """Expected answer length in tokens, policy minus reference, estimated on both answers."""
    learning_rate: float
    grad_norm: float
    """Before clipping."""


TAGS = {
    "loss": "loss",
    "rewards_chosen": "rewards/chosen",
    "rewards_rejected": "rewards/rejected",
    "rewards_margins": "rewards/margins",
    "rewards_accuracies": "rewards/accuracies",
    "logps_chosen": "logps/chosen",
    "logps_rejected": "logps/rejected",
    "drift_chosen": "drift/chosen",
    "kl": "kl/reference",
    "length_drift": "drift/length",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
}
"""Scalar names, TRL's where it has one."""


class Curves:
    """Event files in a folder, or nowhere."""

    def __init__(self, folder: Path | None, *, start: int) -> None:
        """Steps after `start` that a killed run has already written are hidden by the new ones."""
        self._writer = None if folder is None else SummaryWriter(str(folder), purge_step=start + 1)

    def add(self, metrics: StepMetrics) -> None:
        if self._writer is None:
            return
        for field, tag in TAGS.items():
            self._writer.add_scalar(tag, getattr(metrics, field), metrics.step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
