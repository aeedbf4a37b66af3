"""Which pairs a step sees, and its learning rate: pure functions of seed and step.

Nothing here depends on the number of processes, so neither do the batches; and a resumed run needs
to know its step only.
"""

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from rlaifv.config import TrainConfig


class Plan(NamedTuple):
    """The whole run's shape. Steps count from 0; step n is the one that makes checkpoint n + 1."""

    pair_ids: tuple[str, ...]
    """Sorted, so that the order in which pairs arrive does not matter."""
    batch_size: int
    """Pairs per optimiser step over all processes."""
    epochs: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """The last batch of an epoch is smaller when the pairs do not divide; none is dropped."""
        return math.ceil(len(self.pair_ids) / self.batch_size)

    @property
    def num_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    def batches(self, start: int = 0) -> Iterator[tuple[str, ...]]:
        """The pair ids of every optimiser step from `start`: slices of each epoch's permutation."""
        first, position = divmod(start, self.steps_per_epoch)
        for epoch in range(first, self.epochs):
            order = list(self.pair_ids)
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
            for index in range(position, self.steps_per_epoch):
                yield tuple(order[index * self.batch_size : (index + 1) * self.batch_size])
            position = 0

    def epoch_at(self, step: int) -> float:
        """Epochs behind you after `step` steps."""
        return step / self.steps_per_epoch


class MicroBatch(NamedTuple):
    """Pairs of one forward pass of one process."""

    pair_ids: tuple[str, ...]
    counted: int
    """The first `counted` enter loss and metrics; the rest only keep processes in step."""


class Rank(NamedTuple):
    """Process `number` (from 0) of `num_processes`."""

    number: int
    num_processes: int


def make_plan(pair_ids: Iterable[str], config: TrainConfig, *, seed: int) -> Plan:
    return Plan(tuple(sorted(pair_ids)), config.global_batch_size, config.epochs, seed)


def micro_batches(batch: Sequence[str], rank: Rank, *, size: int) -> list[MicroBatch]:
    """This process's forward passes: the batch in slices of `size`, dealt to the processes in turn.

    The slices, and with them the random numbers of dropout, are the same for any number of
    processes; more processes than slices are therefore of no use. All processes get equally many passes, since each must enter
    every collective operation; one that gets a slice too few repeats a pair that is not counted.
    """
    slices = [tuple(batch[start : start + size]) for start in range(0, len(batch), size)]
    passes = [MicroBatch(ids, len(ids)) for ids in slices[rank.number :: rank.num_processes]]
    missing = math.ceil(len(slices) / rank.num_processes) - len(passes)
    return [*passes, *([MicroBatch(tuple(batch[:1]), 0)] * missing)]


def learning_rate(step: int, num_steps: int, config: TrainConfig) -> float:
    """Linear warm-up from 0, then half a cosine to 0.

    The values of transformers' `get_cosine_schedule_with_warmup`, which the release trains with:
    the very first step of a warm-up has rate 0.
    """
    warmup = math.ceil(num_steps * config.warmup_ratio)
    if step < warmup:
        return config.learning_rate * step / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
