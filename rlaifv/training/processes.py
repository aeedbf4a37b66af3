"""The processes that train one model together, as torchrun (or nothing) started them."""

import os
from collections.abc import Iterable

import torch
from torch import Tensor, distributed

from rlaifv.training.schedule import Rank


class Processes:
    """This process among its peers; joins them, and takes the GPU of its own, when first made."""

    def __init__(self) -> None:
        cuda = torch.cuda.is_available()
        self._backend = "nccl" if cuda else "gloo"
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized():
            distributed.init_process_group(self._backend)
        group = distributed.is_initialized()
        self.rank = Rank(
            distributed.get_rank() if group else 0, distributed.get_world_size() if group else 1
        )

    @property
    def is_main(self) -> bool:
        """Whether this process writes checkpoints, states and curves."""
        return self.rank.number == 0

    def prepare_for_deepspeed(self) -> None:
        """Sees to what DeepSpeed expects: a process group, if only of this process, and torchrun's
        LOCAL_RANK, which it looks up again and again."""
        os.environ.setdefault("LOCAL_RANK", "0")
        if not distributed.is_initialized():
            store = distributed.HashStore()  # type: ignore[attr-defined]
            distributed.init_process_group(self._backend, store=store, rank=0, world_size=1)

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Replaces each tensor by the sum of the peers' tensors of the same place."""
        if self.rank.num_processes > 1:
            for tensor in tensors:
                distributed.all_reduce(tensor)

    def as_main_says(self, answer: bool) -> bool:
        """The main process's answer, on every process."""
        device = "cuda" if self._backend == "nccl" else "cpu"
        said = torch.tensor(float(answer and self.is_main), device=device)
        self.add_up([said])
        return bool(said)

    def gather(self, values_PM: Tensor) -> Tensor:
        """Every process's rows, rank by rank; equally many from each."""
        if self.rank.num_processes == 1:
            return values_PM
        parts = [torch.empty_like(values_PM) for _ in range(self.rank.num_processes)]
        distributed.all_gather(parts, values_PM.contiguous())
        return torch.cat(parts)
