"""Plain text tables for the terminal."""

from collections.abc import Sequence
from typing import NamedTuple


class Column(NamedTuple):
    """One column of a table."""

    title: str
    right: bool = False
    """Numbers stand at the right."""


def render(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns under their titles, without trailing spaces."""
    cells = [[column.title for column in columns], *map(list, rows)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(columns))]
    lines = [_line(columns, widths, row) for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0].rstrip()), *lines[1:]])


def _line(columns: Sequence[Column], widths: Sequence[int], row: Sequence[str]) -> str:
    aligned = (
        text.rjust(width) if column.right else text.ljust(width)
        for column, width, text in zip(columns, widths, row, strict=True)
    )
    return "  ".join(aligned).rstrip()
