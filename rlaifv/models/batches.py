"""Dealing rows to forward passes."""

from collections.abc import Sequence


def batches(lengths: Sequence[int], *, size: int) -> list[list[int]]:
    """Indices of rows in groups of at most `size` and of like length.

    The longest come first, so that memory that does not suffice shows at once. Equal lengths keep
    their order.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [order[start : start + size] for start in range(0, len(order), size)]
