"""Curves and bars as SVG."""

import math
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


SMALL_WIDTH, SMALL_HEIGHT = 420, 200
SMALL_LEFT, SMALL_RIGHT, SMALL_TOP, SMALL_BOTTOM = 56, 10, 12, 34


class Candidate(NamedTuple):
    """A checkpoint on a curve over all candidates."""

    iteration: int
    step: int
    values: tuple[float | None, ...]
    """Of each series, as fractions."""
    chosen: bool


def candidate_curve(names: Sequence[str], candidates: Sequence[Candidate]) -> str:
    """Every candidate in order, a line per metric and iteration; the chosen ones have a ring."""
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="all candidate checkpoints, '
        'the chosen ones marked">'
    ]
    for percent in range(0, 101, 20):
        y = _y(percent / 100)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 10}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{percent} %</text>')
    numbers = sorted({one.iteration for one in candidates})
    slots = len(candidates) + len(numbers)
    width = (WIDTH - LEFT - 20) / max(1, slots)
    place = 0
    for number in numbers:
        group = [one for one in candidates if one.iteration == number]
        xs = [round(LEFT + width * (place + n + 1), 1) for n in range(len(group))]
        middle = (xs[0] + xs[-1]) / 2
        parts.append(
            f'<text x="{middle}" y="{HEIGHT - 12}" text-anchor="middle">iteration {number}</text>'
        )
        for series, name in enumerate(names):
            parts.append(_candidate_line(name, series, group, xs))
        place += len(group) + 1
    return "\n".join([*parts, "</svg>"])


def _candidate_line(name: str, series: int, group: Sequence[Candidate], xs: Sequence[float]) -> str:
    points = [
        (x, _y(value), value, one)
        for x, one in zip(xs, group, strict=True)
        if (value := one.values[series]) is not None
    ]
    path = " ".join(f"{x},{y}" for x, y, _, _ in points)
    marks = []
    for x, y, value, one in points:
        what = f"step {one.step}" if one.step else "start"
        note = f"{name}, iteration {one.iteration}, {what}: {100 * value:.1f} %"
        note += ", chosen" if one.chosen else ""
        ring = f'<circle class="ring" cx="{x}" cy="{y}" r="9"/>' if one.chosen else ""
        marks.append(f'{ring}<circle cx="{x}" cy="{y}" r="4"><title>{note}</title></circle>')
    return f'<g class="{name}"><polyline points="{path}"/>{"".join(marks)}</g>'


class Bar(NamedTuple):
    """One bar of a histogram."""

    label: str
    value: float
    kind: str = ""
    """CSS class: `yes`, `no` or nothing."""


def bars(title: str, values: Sequence[Bar], *, every: int = 1) -> str:
    """A small histogram; every so many bars have a label below, all have one on hover."""
    most = max((bar.value for bar in values), default=0) or 1
    inner, height = SMALL_WIDTH - SMALL_LEFT - SMALL_RIGHT, SMALL_HEIGHT - SMALL_TOP - SMALL_BOTTOM
    width = inner / max(1, len(values))
    parts = [_small_frame(title, [(0, "0"), (1, short_number(most))])]
    for place, bar in enumerate(values):
        tall = round(height * bar.value / most, 1)
        x = round(SMALL_LEFT + place * width, 1)
        y = round(SMALL_HEIGHT - SMALL_BOTTOM - tall, 1)
        parts.append(
            f'<rect class="bar {bar.kind}" x="{x + 1}" y="{y}" width="{max(1.0, round(width - 2, 1))}" '
            f'height="{tall}"><title>{bar.label}: {short_number(bar.value)}</title></rect>'
        )
        if place % every == 0:
            middle = round(x + width / 2, 1)
            parts.append(
                f'<text x="{middle}" y="{SMALL_HEIGHT - 14}" text-anchor="middle">{bar.label}</text>'
            )
    return "".join([*parts, "</svg>"])


def small_curve(title: str, lines: Sequence[tuple[str, Sequence[float], Sequence[float]]]) -> str:
    """Named lines with their own x values, scaled to what they hold."""
    xs = [x for _, steps, _ in lines for x in steps]
    ys = [y for _, _, values in lines for y in values if math.isfinite(y)]
    if not xs or not ys:
        return ""
    low, high = min(ys), max(ys)
    span, reach = (high - low) or 1.0, max(xs) or 1.0
    inner, height = SMALL_WIDTH - SMALL_LEFT - SMALL_RIGHT, SMALL_HEIGHT - SMALL_TOP - SMALL_BOTTOM
    parts = [_small_frame(title, [(0, short_number(low)), (1, short_number(high))])]
    for number, (name, steps, values) in enumerate(lines):
        points = " ".join(
            f"{round(SMALL_LEFT + inner * x / reach, 1)},"
            f"{round(SMALL_HEIGHT - SMALL_BOTTOM - height * (y - low) / span, 1)}"
            for x, y in zip(steps, values, strict=True)
            if math.isfinite(y)
        )
        parts.append(
            f'<g class="line line-{number % 6}"><polyline points="{points}"><title>{name}</title>'
            "</polyline></g>"
        )
    end = f'<text x="{SMALL_WIDTH - SMALL_RIGHT}" y="{SMALL_HEIGHT - 14}" text-anchor="end">'
    return "".join([*parts, f"{end}step {short_number(max(xs))}</text></svg>"])


def _small_frame(title: str, ticks: Sequence[tuple[float, str]]) -> str:
    """`title` is ours, never a model's."""
    parts = [
        f'<svg class="small-chart" viewBox="0 0 {SMALL_WIDTH} {SMALL_HEIGHT}" role="img" '
        f'aria-label="{title}">'
    ]
    height = SMALL_HEIGHT - SMALL_TOP - SMALL_BOTTOM
    for share, label in ticks:
        y = round(SMALL_HEIGHT - SMALL_BOTTOM - height * share, 1)
        parts.append(
            f'<line class="grid" x1="{SMALL_LEFT}" x2="{SMALL_WIDTH - SMALL_RIGHT}" y1="{y}" '
            f'y2="{y}"/><text x="{SMALL_LEFT - 6}" y="{y + 4}" text-anchor="end">{label}</text>'
        )
    return "".join(parts)


def short_number(value: float) -> str:
    """`0.012`, `3.4`, `812`, `12.3k`."""
    if abs(value) >= 10_000:
        return f"{value / 1000:.1f}k"
    if value == int(value):
        return str(int(value))
    return f"{value:.2g}" if abs(value) < 0.1 else f"{value:.3g}"
