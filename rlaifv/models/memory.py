"""When memory does not suffice: the same call again with smaller batches."""

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from rlaifv.models.base import VisionLanguageModel

log = logging.getLogger(__name__)

M = TypeVar("M", bound=VisionLanguageModel)


def back_off(model: M) -> M:
    """The model, whose calls halve `batch_size` for good when the device is out of memory.

    Batches start with their longest rows, so a batch that is too large shows at once. A single
    row that does not fit raises torch.OutOfMemoryError as before.
    """
    for name in ("answer", "yes_no", "sequence_logps"):
        setattr(model, name, _retrying(model, getattr(model, name)))
    return model


def _retrying(model: VisionLanguageModel, call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def again(*rows: Any, **options: Any) -> Any:
        while True:
            try:
                return call(*rows, **options)
            except torch.OutOfMemoryError:
                if model.batch_size == 1:
                    raise
            model.batch_size //= 2
            log.warning("out of memory: batch_size is %d from now on", model.batch_size)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    return again
