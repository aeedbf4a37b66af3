"""When memory does not suffice: the same call again with smaller batches."""

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar

log = logging.getLogger(__name__)

M = TypeVar("M")
QUEUES = ("queue_answer", "queue_yes_no", "queue_sequence_logps")


def back_off(model: M) -> M:
    """The model, whose calls halve `batch_size` for good when the device is out of memory.

    Batches start with their longest rows, so a batch that is too large shows at once. A model that
    starts with more rows than a call has so finds the largest batch by halves. A single row that
    does not fit raises torch.OutOfMemoryError as before.
    """
    for name in QUEUES:
        if hasattr(model, name):
            setattr(model, name, _retrying(model, getattr(model, name)))
    if hasattr(model, "reply"):
        queue = _retrying(model, functools.partial(functools.partial, model.reply))
        setattr(model, "reply", lambda *rows, **options: queue(*rows, **options)())  # noqa: B010
    return model


def _retrying(model: Any, queue: Callable[..., Callable[[], Any]]) -> Callable[..., Any]:
    """Memory may be short when work is queued, and when its results are asked for."""
    import torch  # here, so that `--help` of programs in this package is instant

    @functools.wraps(queue)
    def queued(*rows: Any, **options: Any) -> Callable[[], Any]:
        def start() -> tuple[int, Callable[[], Any]]:
            while True:
                size = model.batch_size
                try:
                    return size, queue(*rows, **options)
                except torch.OutOfMemoryError:
                    if size == 1:
                        raise
                _shrink(model, size, rows)

        size, wait = start()

        def results() -> Any:
            nonlocal size, wait
            while True:
                try:
                    return wait()
                except torch.OutOfMemoryError:
                    if size == 1:
                        raise
                _shrink(model, size, rows)
                size, wait = start()

        return results

    return queued


def _shrink(model: Any, size: int, arguments: tuple[Any, ...]) -> None:
    """After `size` was too much for a call; another call may have halved it meanwhile."""
    import torch

    most = max(2, len(arguments[0])) if arguments else 2  # no batch has more rows than its call
    model.batch_size = min(model.batch_size, max(1, min(size, most) // 2))
    log.warning("out of memory: batch_size is %d from now on", model.batch_size)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
