"""Training curves from TensorBoard's event files, without TensorBoard.

A file is a row of records: length (uint64), its CRC, that many bytes of a protocol buffer `Event`,
their CRC. Of an event we need the step (field 2) and the scalars of its summary (field 5).
"""

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from rlaifv.pipeline import iteration_key
from rlaifv.store import Store

SHOWN = {
    "loss": "loss",
    "rewards/accuracies": "share of pairs ranked right",
    "rewards/margins": "reward margin",
    "grad_norm": "gradient norm",
}
"""Tags in the page, with their titles."""
MOST_POINTS = 160
"""Of a curve in the page; more are averaged."""
MOST_BYTES = 64 << 20
"""Of the event files of an iteration; a step is some 600 bytes."""
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class Scalar(NamedTuple):
    """One number of one optimiser step."""

    step: int
    tag: str
    value: float


class Curve(NamedTuple):
    """A scalar over the steps, at most `MOST_POINTS` of them."""

    tag: str
    steps: tuple[float, ...]
    values: tuple[float, ...]


def read_curves(run: Store, iteration: int) -> tuple[Curve, ...]:
    """The shown scalars of an iteration; of a step that was repeated the last one counts."""
    found: dict[str, dict[int, float]] = {tag: {} for tag in SHOWN}
    left = MOST_BYTES
    files = sorted(run.objects(f"{iteration_key(iteration)}/tensorboard"), key=lambda one: one.key)
    for item in files:
        left -= item.size_bytes
        if ".tfevents." not in item.key or left < 0:
            continue
        for scalar in scalars(run.read_bytes(item.key)):
            if scalar.tag in found:
                found[scalar.tag][scalar.step] = scalar.value
    return tuple(_thinned(tag, points) for tag, points in found.items() if points)


def scalars(data: bytes) -> Iterator[Scalar]:
    """Every scalar of an event file; a file that was cut ends early."""
    place = 0
    while place + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, place)
        body = data[place + 12 : place + 12 + length]
        if len(body) < length:
            return
        place += 12 + length + 4
        yield from _event(body)


def _event(body: bytes) -> Iterator[Scalar]:
    step, summaries = 0, []
    for number, value in _fields(body):
        if number == 2 and isinstance(value, int):
            step = value
        elif number == 5 and isinstance(value, bytes):
            summaries.append(value)
    for summary in summaries:
        for number, value in _fields(summary):
            if number == 1 and isinstance(value, bytes):
                inner = dict(_fields(value))
                tag, scalar = inner.get(1), inner.get(2)
                if isinstance(tag, bytes) and isinstance(scalar, float):
                    yield Scalar(step, tag.decode(errors="replace"), scalar)


def _fields(body: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """Numbers and values of a protocol buffer; ends at the first that makes no sense."""
    place = 0
    try:
        while place < len(body):
            key, place = _varint(body, place)
            kind = key & 7
            if kind == _VARINT:
                value, place = _varint(body, place)
                yield key >> 3, value
            elif kind == _FIXED64:
                yield key >> 3, struct.unpack_from("<d", body, place)[0]
                place += 8
            elif kind == _FIXED32:
                yield key >> 3, struct.unpack_from("<f", body, place)[0]
                place += 4
            elif kind == _BYTES:
                length, place = _varint(body, place)
                yield key >> 3, body[place : place + length]
                place += length
            else:
                return
    except (struct.error, IndexError):
        return


def _varint(body: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = body[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, place
        shift += 7


def _thinned(tag: str, points: dict[int, float]) -> Curve:
    """Means over equally long stretches of steps."""
    steps = sorted(points)
    size = -(-len(steps) // MOST_POINTS)
    groups: Iterable[list[int]] = (steps[n : n + size] for n in range(0, len(steps), size))
    means = [(_mean(group), _mean([points[step] for step in group])) for group in groups]
    return Curve(tag, tuple(step for step, _ in means), tuple(value for _, value in means))


def _mean(values: list[int] | list[float]) -> float:
    return sum(values) / len(values)
