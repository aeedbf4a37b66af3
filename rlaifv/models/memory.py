"""When memory does not suffice: the same call again with smaller batches."""

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar

log = logging.getLogger(__name__)

M = TypeVar("M")
CALLS = ("answer", "yes_no", "sequence_logps", "reply")


def back_off(model: M) -> M:
    """The model, whose calls halve `batch_size` for good when the device is out of memory.

    Batches start with their longest rows, so a batch that is too large shows at once. A model that
    starts with more rows than a call has so finds the largest batch by halves. A single row that
    does not fit raises torch.OutOfMemoryError as before.
    """
    for name in CALLS:
        if hasattr(model, name):
            setattr(model, name, _retrying(model, getattr(model, name)))
    return model


def _retrying(model: Any, call: Callable[..., Any]) -> Callable[..., Any]:
    import torch  # here, so that `--help` of programs in this package is instant

    @functools.wraps(call)
    def again(*rows: Any, **options: Any) -> Any:
        while True:
            try:
                return call(*rows, **options)
            except torch.OutOfMemoryError:
                if model.batch_size == 1:
                    raise
            model.batch_size = max(1, min(model.batch_size, _most(rows)) // 2)
            log.warning("out of memory: batch_size is %d from now on", model.batch_size)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    return again


def _most(arguments: tuple[Any, ...]) -> int:
    """Rows of a call: no batch is larger."""
    return max(2, len(arguments[0])) if arguments else 2
