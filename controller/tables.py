"""Plain text that fits the terminal: tables, sentences, commands."""

import shlex
import shutil
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

WIDTH = 80
"""Columns of what is no terminal."""


def room() -> int:
    """Columns of the terminal."""
    return shutil.get_terminal_size((WIDTH, 40)).columns


def folded(text: str, indent: str = "") -> str:
    """Lines that fit, broken at spaces only: a path stays whole. The first has no indent."""
    wrapper = textwrap.TextWrapper(
        room(), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    first, *others = text.split("\n")
    lines = wrapper.wrap(first) + [one for line in others for one in wrapper.wrap(indent + line)]
    return "\n".join(lines)


def folded_command(words: Sequence[str], indent: str = "  ") -> str:
    """A command to be typed as it stands, on as many lines as it takes."""
    flags: list[str] = []  # each with its values
    for word in map(shlex.quote, words):
        if flags and not word.startswith("-"):
            flags[-1] += f" {word}"
        else:
            flags.append(word)
    lines = [indent]
    for flag in flags:
        if lines[-1].strip() and len(lines[-1]) + len(flag) + 2 > room():
            lines[-1] += "\\"
            lines.append(2 * indent)
        lines[-1] += f"{flag} "
    return "\n".join(lines).rstrip()


class Column(NamedTuple):
    """One column of a table."""

    title: str
    right: bool = False
    """Numbers stand at the right."""


def render(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns under their titles, two spaces apart (one where that is too wide)."""
    cells = [[column.title for column in columns], *map(list, rows)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(columns))]
    gap = "  " if sum(widths) + 2 * (len(widths) - 1) <= room() else " "
    lines = [_line(columns, widths, row, gap) for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0].rstrip()), *lines[1:]])


def _line(columns: Sequence[Column], widths: Sequence[int], row: Sequence[str], gap: str) -> str:
    aligned = (
        text.rjust(width) if column.right else text.ljust(width)
        for column, width, text in zip(columns, widths, row, strict=True)
    )
    return gap.join(aligned).rstrip()
