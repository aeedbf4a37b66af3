"""The processes that train one model together: the only module that knows of Accelerate.

One process is what is tested so far. What several processes (and DeepSpeed) need is here already:
the share of a batch, the scale of the loss, and the gathering of what was counted.
"""

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rlaifv.training.schedule import Rank


class Processes:
    """This process among its peers, as torchrun or `accelerate launch` started them."""

    def __init__(self) -> None:
        self._accelerator = Accelerator(mixed_precision="no")

    @property
    def rank(self) -> Rank:
        return Rank(self._accelerator.process_index, self._accelerator.num_processes)

    @property
    def device(self) -> torch.device:
        device: torch.device = self._accelerator.device
        return device

    @property
    def is_main(self) -> bool:
        """Whether this process writes checkpoints and curves."""
        return bool(self._accelerator.is_main_process)

    def wrap(self, scorer: nn.Module) -> nn.Module:
        """The module to call for scores: a wrapper that averages gradients over processes.

        Gradients are averaged only for what passes through this wrapper's `forward`.
        """
        wrapped: nn.Module = self._accelerator.prepare_model(scorer)
        return wrapped

    def backward(self, loss: Tensor, *, batch_size: int) -> None:
        """Adds the gradient of `loss` / `batch_size`: of the mean over the whole global batch.

        `loss` is the sum over this process's pairs; the peers' gradients are averaged, not added,
        hence the factor.
        """
        self._accelerator.backward(loss * (self.rank.num_processes / batch_size))

    def gather(self, values_PM: Tensor) -> Tensor:
        """Every process's rows, rank by rank; equally many from each."""
        gathered: Tensor = self._accelerator.gather(values_PM)
        return gathered
