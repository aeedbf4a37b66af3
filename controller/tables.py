"""Plain text tables for the terminal."""

from collections.abc import Sequence
from typing import NamedTuple


class Column(NamedTuple):
    """One column of a table."""

    title: str
    right: bool = False
    """Numbers stand at the right."""


def render(columns: Sequence[Column], rows: Sequence[Sequence[str]], gap: int = 2) -> str:
    """Aligned columns under their titles, so many spaces apart, without trailing spaces."""
    cells = [[column.title for column in columns], *map(list, rows)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(columns))]
    lines = [_line(columns, widths, row, " " * gap) for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0].rstrip()), *lines[1:]])


def _line(columns: Sequence[Column], widths: Sequence[int], row: Sequence[str], gap: str) -> str:
    aligned = (
        text.rjust(width) if column.right else text.ljust(width)
        for column, width, text in zip(columns, widths, row, strict=True)
    )
    return gap.join(aligned).rstrip()
