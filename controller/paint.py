"""Colours of a terminal, and text that cannot control one."""

import os
import unicodedata
from typing import Literal, TextIO

Colour = Literal["bold", "dim", "red", "green", "yellow", "cyan"]
_CODES: dict[Colour, str] = {
    "bold": "1",
    "dim": "2",
    "red": "31",
    "green": "32",
    "yellow": "33",
    "cyan": "36",
}


_STEERING = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Unicode categories: control, format, surrogate, private, unassigned, separators of lines."""


class Paint:
    """Colours words, or leaves them as they are."""

    def __init__(self, *, on: bool) -> None:
        self._on = on

    def __call__(self, text: str, *colours: Colour) -> str:
        codes = ";".join(_CODES[colour] for colour in colours)
        return f"\x1b[{codes}m{text}\x1b[0m" if self._on and codes and text else text


PLAIN = Paint(on=False)


def paint_for(stream: TextIO) -> Paint:
    """On a terminal only, and not where NO_COLOR (no-color.org) or a dumb terminal forbids it."""
    wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return Paint(on=wanted and stream.isatty())


def safe(text: str) -> str:
    """Without control characters: what a model or a file said must not steer a terminal."""
    return "".join(
        "\ufffd" if one != "\n" and unicodedata.category(one) in _STEERING else one for one in text
    )


def duration(seconds: float) -> str:
    """`8.3 s`, `4 min 10 s`, `2 h 05 min`, `3 d 4 h`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def rate(per_second: float) -> str:
    """Rows per second, minute or hour, whichever reads best."""
    for unit, factor in (("s", 1), ("min", 60), ("h", 3600)):
        if per_second * factor >= 1 or unit == "h":
            return f"{per_second * factor:.1f}/{unit}"
    raise AssertionError("the last unit always fits")
