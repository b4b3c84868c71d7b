"""The world that Nano learns: one to three plain shapes on a background, as values, and as pixels.

Everything is drawn by code. A scene is a value; pictures, words (``words.py``) and scores (``score.py``) follow from it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

SIDE = 96
FRAMES = 9
SHAPES = ("circle", "square", "triangle", "star")
COLOURS = {
    "red": (222, 45, 45),
    "orange": (250, 140, 20),
    "yellow": (250, 220, 50),
    "green": (45, 165, 80),
    "blue": (45, 90, 225),
    "purple": (145, 60, 185),
}
# A striped background has two tones, in bands of STRIPE pixels; a plain one has one.
BACKGROUNDS = {
    "white": ((250, 250, 250),) * 2,
    "gray": ((150, 150, 155),) * 2,
    "black": ((25, 25, 30),) * 2,
    "pink": ((250, 195, 215),) * 2,
    "striped": ((250, 250, 250), (185, 205, 215)),
}
STRIPE = 12
PLACES = {"middle": (48, 48), "left": (30, 48), "right": (66, 48), "top": (48, 30), "bottom": (48, 66)}
PAIRS = (((26, 48), (70, 48)), ((48, 25), (48, 71)))  # where two things stand: left and right, or top and bottom
CORNERS = ((26, 28), (70, 28), (48, 70))  # and three
SMALL, PLAIN, BIG = 14, 16, 21
SUPERSAMPLING = 4

Point = tuple[float, float]


@dataclass(frozen=True)
class Thing:
    """One shape: ``size`` is the radius of its circle in pixels, x and y its centre, ``angle`` in degrees."""

    shape: str
    colour: str
    size: float = PLAIN
    x: float = 48
    y: float = 48
    angle: float = 0

    def at(self, place: Point) -> Thing:
        return replace(self, x=place[0], y=place[1])


@dataclass(frozen=True)
class Scene:
    """Things on a background, drawn in this order."""

    things: tuple[Thing, ...]
    background: str

    @property
    def held_out(self) -> bool:
        """Whether training never sees this scene: some thing's colour, shape and background are a held-out triple."""
        return any(is_held_out(thing.colour, thing.shape, self.background) for thing in self.things)


def is_held_out(colour: str, shape: str, background: str) -> bool:
    """20 of the 120 triples; every colour, shape, background and pair of them is still seen in training."""
    indices = (tuple(COLOURS).index(colour), SHAPES.index(shape), tuple(BACKGROUNDS).index(background))
    return (indices[0] + 2 * indices[1] + indices[2]) % 6 == 0


def outline(thing: Thing) -> list[Point]:
    """Corners of a shape, in pixels; equal sizes look equally large."""
    if thing.shape == "circle":
        return _ring(thing, 64, (1.0,), 0)
    if thing.shape == "square":
        return _ring(thing, 4, (1.25,), 45)
    if thing.shape == "triangle":
        return _ring(replace(thing, y=thing.y + thing.size * 0.2), 3, (1.35,), -90)
    return _ring(thing, 10, (1.3, 0.54), -90)


def _ring(thing: Thing, corners: int, radii: tuple[float, ...], start: float) -> list[Point]:
    """Corners around a centre, at radii that take turns."""
    points = []
    for index in range(corners):
        angle, radius = math.radians(start + thing.angle + 360 * index / corners), thing.size * radii[index % len(radii)]
        points.append((thing.x + radius * math.cos(angle), thing.y + radius * math.sin(angle)))
    return points


@lru_cache(maxsize=16)
def _empty(background: str) -> Image.Image:
    large, (first, second) = SIDE * SUPERSAMPLING, BACKGROUNDS[background]
    picture = Image.new("RGB", (large, large), first)
    draw = ImageDraw.Draw(picture)
    for top in range(STRIPE, SIDE, 2 * STRIPE):
        draw.rectangle((0, top * SUPERSAMPLING, large, (top + STRIPE) * SUPERSAMPLING - 1), fill=second)
    return picture


def render(scene: Scene) -> np.ndarray:
    """A scene as uint8 (SIDE, SIDE, 3), edges smoothed."""
    picture = _empty(scene.background).copy()
    draw = ImageDraw.Draw(picture)
    for thing in scene.things:
        draw.polygon([(x * SUPERSAMPLING, y * SUPERSAMPLING) for x, y in outline(thing)], fill=COLOURS[thing.colour])
    return np.asarray(picture.reduce(SUPERSAMPLING))


MOTIONS: dict[str, Callable[[Thing, float], Thing]] = {
    "left": lambda thing, t: replace(thing, x=thing.x + 21 - 42 * t),
    "right": lambda thing, t: replace(thing, x=thing.x - 21 + 42 * t),
    "up": lambda thing, t: replace(thing, y=thing.y + 21 - 42 * t),
    "down": lambda thing, t: replace(thing, y=thing.y - 21 + 42 * t),
    "grows": lambda thing, t: replace(thing, size=10 + 13 * t),
    "shrinks": lambda thing, t: replace(thing, size=23 - 13 * t),
    "turns": lambda thing, t: replace(thing, size=22, angle=60 * t),
}


@dataclass(frozen=True)
class Clip:
    """One thing in the middle that does one of ``MOTIONS``."""

    thing: Thing
    background: str
    motion: str

    @property
    def scenes(self) -> list[Scene]:
        """The scene of every frame."""
        moved = (MOTIONS[self.motion](self.thing, index / (FRAMES - 1)) for index in range(FRAMES))
        return [Scene((thing,), self.background) for thing in moved]

    @property
    def held_out(self) -> bool:
        return self.scenes[0].held_out


def render_clip(clip: Clip) -> np.ndarray:
    """uint8 (FRAMES, SIDE, SIDE, 3)."""
    return np.stack([render(scene) for scene in clip.scenes])


def draw_scene(rng: random.Random, count: int | None = None, held_out: bool = False) -> Scene:
    """A random scene of ``count`` things (one to three, mostly one), held out from training or not."""
    while True:
        scene = _any_scene(rng, count or rng.choice((1, 1, 1, 2, 2, 3)))
        if scene.held_out == held_out:
            return scene


def draw_clip(rng: random.Random, held_out: bool = False) -> Clip:
    """A random clip; a circle does not turn, since nobody would see it."""
    while True:
        thing, motion = _any_thing(rng), rng.choice(tuple(MOTIONS))
        clip = Clip(jittered(rng, thing.at(PLACES["middle"]), 2), rng.choice(tuple(BACKGROUNDS)), motion)
        if clip.held_out == held_out and (motion, thing.shape) != ("turns", "circle"):
            return clip


def jittered(rng: random.Random, thing: Thing, most: float = 3) -> Thing:
    """The same thing a little beside its place, a little larger or smaller."""
    moved = (thing.x + rng.uniform(-most, most), thing.y + rng.uniform(-most, most))
    return replace(thing.at(moved), size=thing.size * rng.uniform(0.95, 1.05))


def _any_thing(rng: random.Random) -> Thing:
    return Thing(rng.choice(SHAPES), rng.choice(tuple(COLOURS)))


def _any_scene(rng: random.Random, count: int) -> Scene:
    background = rng.choice(tuple(BACKGROUNDS))
    if count == 1:
        thing = replace(_any_thing(rng), size=rng.choice((SMALL, BIG)))
        return Scene((jittered(rng, thing.at(PLACES[rng.choice(tuple(PLACES))])),), background)
    if count == 2:
        things = [_any_thing(rng).at(place) for place in rng.choice(PAIRS)]
    else:
        same = _any_thing(rng) if rng.random() < 0.5 else None
        things = [replace(same or _any_thing(rng), size=PLAIN - 1).at(corner) for corner in CORNERS]
    return Scene(tuple(jittered(rng, thing, 2) for thing in things), background)
