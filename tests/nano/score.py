"""What is to be seen on a picture: the scene, read back from pixels alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from .world import BACKGROUNDS, COLOURS, SHAPES, SIDE, Scene, Thing, outline

LEAST_AREA = 80  # pixels; the smallest thing has 170
LEAST_OVERLAP = 0.80  # with the ideal shape: true renders reach 0.93
NEAR = 8.0  # pixels between where a thing is and where it belongs
BLOB = "blob"
BORDER = 3


def seen(picture: np.ndarray, angles: Sequence[float] = (0,)) -> Scene:
    """uint8 (SIDE, SIDE, 3) -> its scene, things from left to right; a thing without a shape is a ``BLOB``.

    angles: the turns in degrees that a shape may have.
    """
    pixels = picture.astype(np.float32)
    background = background_of(pixels)
    tones = [*COLOURS.values(), *BACKGROUNDS[background]]
    distances = np.linalg.norm(pixels[..., None, :] - np.array(tones, np.float32), axis=-1)
    labels = distances.argmin(-1)
    regions, count = ndimage.label(labels < len(COLOURS))
    masks = [regions == index for index in range(1, count + 1)]
    things = [read_thing(mask, pixels, angles) for mask in masks if mask.sum() >= LEAST_AREA]
    return Scene(tuple(sorted(things, key=lambda thing: (thing.x, thing.y))), background)


def background_of(pixels: np.ndarray) -> str:
    """The background whose empty picture the border, and the other pixels that are no thing, are nearest to."""
    inside = np.ones((SIDE, SIDE), bool)
    inside[BORDER:-BORDER, BORDER:-BORDER] = False
    errors = {name: np.abs(pixels - empty(name)).sum(-1)[inside] for name in BACKGROUNDS}
    return min(errors, key=lambda name: float(np.median(errors[name]) + errors[name].mean()))


@lru_cache(maxsize=16)
def empty(background: str) -> np.ndarray:
    from .world import render

    return render(Scene((), background)).astype(np.float32)


def read_thing(mask: np.ndarray, pixels: np.ndarray, angles: Sequence[float]) -> Thing:
    """Colour, centre, size and shape of one region."""
    core = ndimage.binary_erosion(mask, iterations=2)
    mean = np.median(pixels[core if core.sum() > 20 else mask], axis=0)
    colour = min(COLOURS, key=lambda name: float(np.linalg.norm(mean - COLOURS[name])))
    candidates = [_ideal(mask, Thing(shape, colour, angle=angle)) for shape in SHAPES for angle in angles]
    overlap, thing = max(candidates, key=lambda pair: pair[0])
    return thing if overlap >= LEAST_OVERLAP else replace(thing, shape=BLOB)


def _ideal(mask: np.ndarray, thing: Thing) -> tuple[float, Thing]:
    """A shape of the region's area around its centroid, and how well it covers the region (intersection over union)."""
    rows, columns = np.nonzero(mask)
    unit = outline(replace(thing, size=1.0, x=0, y=0))
    area, (x, y) = _area_and_centroid(unit)
    size = float(np.sqrt(mask.sum() / area))
    fitted = replace(thing, size=size, x=float(columns.mean()) + 0.5 - x * size, y=float(rows.mean()) + 0.5 - y * size)
    ideal = _drawn(fitted)
    return float((mask & ideal).sum() / (mask | ideal).sum()), fitted


def _drawn(thing: Thing) -> np.ndarray:
    picture = Image.new("L", (SIDE * 4, SIDE * 4))
    ImageDraw.Draw(picture).polygon([(x * 4, y * 4) for x, y in outline(thing)], fill=255)
    return np.asarray(picture.reduce(4)) > 127


def _area_and_centroid(points: Sequence[tuple[float, float]]) -> tuple[float, tuple[float, float]]:
    """Of a polygon (the shoelace formula)."""
    a, b = np.array(points), np.roll(np.array(points), -1, axis=0)
    cross = a[:, 0] * b[:, 1] - b[:, 0] * a[:, 1]
    centroid = ((a + b) * cross[:, None]).sum(0) / (3 * cross.sum())
    return abs(float(cross.sum())) / 2, (float(centroid[0]), float(centroid[1]))


def same_things(found: Scene, wanted: Scene, near: float | None = None) -> bool:
    """Whether both hold the same shapes in the same colours; ``near``: within so many pixels of the same places."""
    if len(found.things) != len(wanted.things):
        return False
    left = list(found.things)
    for thing in wanted.things:
        fitting = [other for other in left if (other.shape, other.colour) == (thing.shape, thing.colour)]
        if not fitting:
            return False
        nearest = min(fitting, key=lambda other: distance(other, thing))
        if near is not None and distance(nearest, thing) > near:
            return False
        left.remove(nearest)
    return True


def distance(first: Thing, second: Thing) -> float:
    return float(np.hypot(first.x - second.x, first.y - second.y))


def same_scene(found: Scene, wanted: Scene, near: float = NEAR) -> bool:
    """The same things at the same places on the same background."""
    return found.background == wanted.background and same_things(found, wanted, near)
