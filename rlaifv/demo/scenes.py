"""Drawn scenes whose ground truth is known exactly.

A scene is a 4 x 4 grid of cells of 16 x 16 pixels; each object lies inside one cell, which is one
patch of the vision tower, so that a model of half a million parameters learns to see it in minutes.
"""

import functools
import io
import random
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

GRID = 4
"""Cells along each side of a scene."""

CELL_PX = 16
"""Side of a cell, and of a vision patch."""

IMAGE_PX = GRID * CELL_PX
"""Side of a scene."""

ICON_PX = 14
"""Side of a drawn object; the two spare pixels of its cell are room to move."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 52, 44),
    "blue": (48, 88, 208),
    "green": (44, 150, 70),
    "yellow": (240, 204, 40),
    "white": (250, 250, 250),
    "purple": (140, 60, 170),
}

BACKGROUNDS = ((205, 205, 205), (186, 198, 210), (214, 204, 186), (172, 184, 172))
"""Muted, so that no object disappears in front of them."""

INK = (30, 30, 30)

PARTNERS = {
    "plate": "fork",
    "table": "chair",
    "tree": "bird",
    "boat": "fish",
    "bed": "lamp",
    "house": "car",
}
"""Owner -> the kind that the policy has learned to expect beside it."""

SYNONYMS: dict[str, tuple[str, ...]] = {
    "plate": ("dish",),
    "fork": (),
    "table": ("desk",),
    "chair": ("seat",),
    "tree": (),
    "bird": (),
    "boat": ("ship",),
    "fish": (),
    "bed": (),
    "lamp": ("light",),
    "house": ("building",),
    "car": ("vehicle",),
    "clock": ("watch",),
    "ball": (),
    "key": (),
    "kite": (),
    "book": (),
    "cup": ("mug",),
}
"""Every kind of object with its other names."""

KINDS = tuple(SYNONYMS)
LONERS = tuple(k for k in KINDS if k not in PARTNERS and k not in PARTNERS.values())


class _Stroke(NamedTuple):
    shape: str
    xy: tuple[int, ...]
    fill: str = "body"


_E, _R, _P, _L = "ellipse", "rectangle", "polygon", "line"
_ICONS: dict[str, tuple[_Stroke, ...]] = {
    "plate": (_Stroke(_E, (0, 2, 13, 12)), _Stroke(_E, (3, 5, 10, 9), "shade")),
    "fork": (
        _Stroke(_R, (6, 5, 7, 13)),
        _Stroke(_R, (3, 4, 10, 6)),
        _Stroke(_R, (3, 0, 4, 5)),
        _Stroke(_R, (6, 0, 7, 5)),
        _Stroke(_R, (9, 0, 10, 5)),
    ),
    "table": (
        _Stroke(_R, (0, 3, 13, 5)),
        _Stroke(_R, (1, 6, 2, 13), "shade"),
        _Stroke(_R, (11, 6, 12, 13), "shade"),
    ),
    "chair": (
        _Stroke(_R, (3, 0, 4, 13)),
        _Stroke(_R, (4, 7, 10, 8)),
        _Stroke(_R, (9, 8, 10, 13)),
    ),
    "tree": (_Stroke(_R, (6, 9, 7, 13), "ink"), _Stroke(_P, (7, 0, 13, 9, 0, 9))),
    "bird": (
        _Stroke(_P, (0, 3, 4, 5, 1, 9), "shade"),
        _Stroke(_E, (2, 4, 9, 10)),
        _Stroke(_E, (7, 1, 11, 5)),
        _Stroke(_P, (11, 2, 13, 3, 11, 4), "ink"),
        _Stroke(_L, (5, 10, 5, 13), "ink"),
    ),
    "boat": (
        _Stroke(_L, (6, 0, 6, 8), "ink"),
        _Stroke(_P, (7, 0, 12, 6, 7, 6), "shade"),
        _Stroke(_P, (0, 8, 13, 8, 10, 12, 3, 12)),
    ),
    "fish": (
        _Stroke(_P, (8, 7, 13, 3, 13, 11)),
        _Stroke(_E, (0, 4, 9, 10)),
        _Stroke(_R, (2, 6, 3, 7), "ink"),
    ),
    "bed": (
        _Stroke(_R, (0, 2, 1, 12), "ink"),
        _Stroke(_R, (12, 6, 13, 12), "ink"),
        _Stroke(_R, (2, 4, 5, 6), "shade"),
        _Stroke(_R, (2, 7, 11, 9)),
    ),
    "lamp": (
        _Stroke(_P, (4, 0, 9, 0, 12, 6, 1, 6)),
        _Stroke(_R, (6, 7, 7, 11), "ink"),
        _Stroke(_R, (3, 12, 10, 13), "ink"),
    ),
    "house": (
        _Stroke(_R, (2, 6, 11, 13)),
        _Stroke(_P, (6, 0, 7, 0, 13, 6, 0, 6), "shade"),
        _Stroke(_R, (6, 9, 8, 13), "ink"),
    ),
    "car": (
        _Stroke(_P, (3, 6, 5, 2, 9, 2, 11, 6), "shade"),
        _Stroke(_R, (0, 6, 13, 9)),
        _Stroke(_E, (1, 8, 4, 11), "ink"),
        _Stroke(_E, (9, 8, 12, 11), "ink"),
    ),
    "clock": (
        _Stroke(_E, (0, 0, 13, 13), "ink"),
        _Stroke(_E, (1, 1, 12, 12)),
        _Stroke(_L, (6, 6, 6, 2), "ink"),
        _Stroke(_L, (6, 6, 10, 6), "ink"),
    ),
    "ball": (_Stroke(_E, (2, 2, 11, 11)), _Stroke(_E, (4, 4, 6, 6), "shade")),
    "key": (
        _Stroke(_R, (4, 6, 13, 7)),
        _Stroke(_E, (0, 4, 5, 9)),
        _Stroke(_R, (2, 6, 3, 7), "ink"),
        _Stroke(_R, (9, 7, 10, 10)),
        _Stroke(_R, (12, 7, 13, 10)),
    ),
    "kite": (_Stroke(_L, (6, 10, 11, 13), "ink"), _Stroke(_P, (6, 0, 11, 5, 6, 11, 1, 5))),
    "book": (
        _Stroke(_R, (1, 2, 12, 11)),
        _Stroke(_L, (6, 2, 6, 11), "ink"),
        _Stroke(_L, (8, 5, 11, 5), "shade"),
        _Stroke(_L, (8, 8, 11, 8), "shade"),
    ),
    "cup": (
        _Stroke(_E, (7, 4, 13, 10), "shade"),
        _Stroke(_R, (2, 3, 9, 12)),
    ),
}


Content = tuple[tuple[str, str, int], ...]


class Thing(NamedTuple):
    """One object of a scene."""

    kind: str
    colour: str
    cell: int
    """0 to 15, in reading order."""
    shift_px: tuple[int, int]
    """Of the drawing inside its cell: right, down; 0 to 2 each."""


class Scene(NamedTuple):
    """The whole truth about one image."""

    background: int
    """Index in BACKGROUNDS."""
    things: tuple[Thing, ...]
    """In reading order; every kind at most once."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of what is in the picture, in reading order."""
        return tuple(thing.kind for thing in self.things)

    @property
    def content(self) -> Content:
        """What is where in which colour: scenes that share it count as the same."""
        return tuple((thing.kind, thing.colour, thing.cell) for thing in self.things)


def make_scene(seed: int, split: str, index: int) -> Scene:
    """The scene of that name: the same for ever, whatever was made before it.

    One or two owners (rarely none); each has its partner in the picture in two cases of five, so
    that a policy that always names the partner is often wrong. Other objects make it three to five.
    """
    rng = random.Random(f"{seed}/{split}/{index}")
    owners = rng.sample(list(PARTNERS), rng.choices((0, 1, 2), (10, 50, 40))[0])
    kinds = [*owners, *(PARTNERS[owner] for owner in owners if rng.random() < 0.4)]
    taken = {*kinds, *(PARTNERS[owner] for owner in owners)}
    # A partner without its owner is common too: seeing it must not need the owner.
    free = [k for k in KINDS if k not in taken and k not in PARTNERS]
    kinds += rng.sample(free, max(0, rng.randint(3, 5) - len(kinds)))
    cells = sorted(rng.sample(range(GRID * GRID), len(kinds)))
    rng.shuffle(kinds)
    things = (
        Thing(kind, rng.choice(list(COLOURS)), cell, (rng.randint(0, 2), rng.randint(0, 2)))
        for kind, cell in zip(kinds, cells, strict=True)
    )
    return Scene(rng.randrange(len(BACKGROUNDS)), tuple(things))


@functools.cache
def _icon(kind: str, colour: str) -> Image.Image:
    body = COLOURS[colour]
    shade = (body[0] * 6 // 10, body[1] * 6 // 10, body[2] * 6 // 10)
    paint = {"body": (*body, 255), "shade": (*shade, 255), "ink": (*INK, 255)}
    image = Image.new("RGBA", (ICON_PX, ICON_PX))
    draw = ImageDraw.Draw(image)
    for stroke in _ICONS[kind]:
        if stroke.shape == _E:
            draw.ellipse(stroke.xy, fill=paint[stroke.fill])
        elif stroke.shape == _R:
            draw.rectangle(stroke.xy, fill=paint[stroke.fill])
        elif stroke.shape == _P:
            draw.polygon(stroke.xy, fill=paint[stroke.fill])
        else:
            draw.line(stroke.xy, fill=paint[stroke.fill])
    return image


def draw_scene(scene: Scene) -> Image.Image:
    """The picture of a scene: RGB, IMAGE_PX x IMAGE_PX."""
    image = Image.new("RGB", (IMAGE_PX, IMAGE_PX), BACKGROUNDS[scene.background])
    for thing in scene.things:
        row, column = divmod(thing.cell, GRID)
        icon = _icon(thing.kind, thing.colour)
        corner = (column * CELL_PX + thing.shift_px[0], row * CELL_PX + thing.shift_px[1])
        image.paste(icon, corner, icon)
    return image


def scene_pixels(scene: Scene) -> npt.NDArray[np.uint8]:
    """The picture as uint8 of shape [IMAGE_PX, IMAGE_PX, 3]."""
    return np.asarray(draw_scene(scene))


def scene_png(scene: Scene) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    draw_scene(scene).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
