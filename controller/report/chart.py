"""The loop's curve as SVG."""

from collections.abc import Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 860, 330
LEFT, RIGHT, TOP, BOTTOM = 48, 150, 18, 36
LABEL_GAP = 17
"""Smallest vertical distance of two labels."""


class Series(NamedTuple):
    """One line; its name is also its CSS class."""

    name: str
    label: str
    values: Sequence[float | None]
    """Fractions; None leaves a gap."""


def curve(series: Sequence[Series], ticks: Sequence[str]) -> str:
    """Lines over the iterations, percent upwards, each labelled at its right end."""
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'aria-label="hallucination and recall over the iterations">'
    ]
    for percent in range(0, 101, 20):
        y = _y(percent / 100)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{percent} %</text>')
    for place, tick in enumerate(ticks):
        x = _x(place, len(ticks))
        parts.append(f'<text x="{x}" y="{HEIGHT - 12}" text-anchor="middle">{tick}</text>')
    for line, label_y in zip(series, _label_heights(series), strict=True):
        parts.append(_line(line, num_ticks=len(ticks), label_y=label_y))
    return "\n".join([*parts, "</svg>"])


def _x(place: int, count: int) -> float:
    inner = WIDTH - LEFT - RIGHT - 60
    return round(LEFT + 30 + inner * (place / (count - 1) if count > 1 else 0.5), 1)


def _y(fraction: float) -> float:
    return round(TOP + (HEIGHT - TOP - BOTTOM) * (1 - fraction), 1)


def _line(line: Series, *, num_ticks: int, label_y: float) -> str:
    points = [
        (_x(place, num_ticks), _y(value), value)
        for place, value in enumerate(line.values)
        if value is not None
    ]
    if not points:
        return ""
    path = " ".join(f"{x},{y}" for x, y, _ in points)
    dots = "".join(
        f'<circle cx="{x}" cy="{y}" r="5"><title>{line.label}: {100 * value:.1f} %</title></circle>'
        for x, y, value in points
    )
    label = f'<text class="label" x="{WIDTH - RIGHT + 4}" y="{label_y}">'
    value = f"{100 * points[-1][2]:.1f} %"
    return (
        f'<g class="{line.name}"><polyline points="{path}"/>{dots}'
        f"{label}{line.label} {value}</text></g>"
    )


def _label_heights(series: Sequence[Series]) -> list[float]:
    """Where the labels stand: at their line's end, pushed apart where they would touch."""
    wanted = []
    for line in series:
        known = [value for value in line.values if value is not None]
        wanted.append(_y(known[-1]) + 4 if known else 0.0)
    heights = list(wanted)
    lowest = float("-inf")
    for place in sorted(range(len(series)), key=lambda one: wanted[one]):
        heights[place] = lowest = max(wanted[place], lowest + LABEL_GAP)
    return heights
