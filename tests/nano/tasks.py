"""The world as tasks: what goes in, and what must come out."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from .words import EDITS, QUESTIONS, caption, clip_caption, clip_question, edit, motion_prompt, question, subject_prompt
from .world import (
    BACKGROUNDS,
    BIG,
    COLOURS,
    PAIRS,
    PLACES,
    PLAIN,
    SHAPES,
    SMALL,
    Clip,
    Scene,
    Thing,
    draw_clip,
    draw_scene,
    render,
    render_clip,
)


@dataclass(frozen=True)
class Example:
    """One call of a task. ``wanted``: the scene, clip or answer that is right. ``kind``: of edit, question or motion."""

    task: str
    prompt: str
    wanted: Scene | Clip | str
    sources: tuple[Scene | Clip, ...] = ()
    kind: str = ""

    @property
    def answers(self) -> bool:
        return isinstance(self.wanted, str)

    @property
    def held_out(self) -> bool:
        """Whether training never sees what goes in, or never what comes out."""
        return any(part.held_out for part in (self.wanted, *self.sources) if not isinstance(part, str))


def frames(scene: Scene | Clip) -> np.ndarray:
    """uint8 (T, SIDE, SIDE, 3)."""
    return render_clip(scene) if isinstance(scene, Clip) else render(scene)[None]


def draw(rng: random.Random, task: str, held_out: bool = False, count: int | None = None, kind: str | None = None) -> Example:
    """A random example. count: of things, where the task leaves it open. kind: see ``Example``."""
    kind = kind or rng.choice(KINDS.get(task, ("",)))
    while True:
        example = DRAWN[task](rng, held_out, count, kind)
        if example is not None and example.held_out == held_out:
            return example


def examples(seed: int, task: str, number: int, **wanted: int | str | None) -> Iterator[Example]:
    """The held-out examples that a task is measured with."""
    rng = random.Random(f"{seed} {task} {sorted(wanted.items())}")
    return (draw(rng, task, held_out=True, **wanted) for _ in range(number))  # type: ignore[arg-type]


def _t2i(rng: random.Random, held_out: bool, count: int | None, kind: str) -> Example:
    scene = draw_scene(rng, count, held_out)
    return Example("t2i", caption(scene, rng), scene)


def _t2v(rng: random.Random, held_out: bool, count: int | None, kind: str) -> Example:
    clip = draw_clip(rng, held_out)
    return Example("t2v", clip_caption(clip, rng), clip, kind=clip.motion)


def _i2v(rng: random.Random, held_out: bool, count: int | None, kind: str) -> Example:
    clip = draw_clip(rng, held_out)
    return Example("i2v", motion_prompt(clip, rng), clip, (clip.scenes[0],), clip.motion)


def _image_edit(rng: random.Random, held_out: bool, count: int | None, kind: str) -> Example | None:
    counts = (1, 2) if held_out else (1, 2, 2)  # training dwells on what is hard: which of two things is meant
    source = draw_scene(rng, count or rng.choice(counts), rng.random() < 0.5 if held_out else False)
    done = edit(source, kind, rng)
    return None if done is None else Example("image_edit", done[0], done[1], (source,), kind)


def _video_edit(rng: random.Random, held_out: bool, count: int | None, kind: str) -> Example | None:
    source = draw_clip(rng, rng.random() < 0.5 if held_out else False)
    still = edit(Scene((source.thing,), source.background), rng.choice(("colour", "background")), rng)
    if still is None:
        return None
    clip = replace(source, thing=still[1].things[0], background=still[1].background)
    return Example("video_edit", still[0], clip, (source,), "background" if clip.thing == source.thing else "colour")


def _portrait(thing: Thing, background: str) -> Scene:
    return Scene((replace(thing, size=BIG - 2).at(PLACES["middle"]),), background)


def _subjects(rng: random.Random, number: int) -> tuple[list[Thing], tuple[Scene, ...]]:
    things = [Thing(rng.choice(SHAPES), rng.choice(tuple(COLOURS))) for _ in range(number)]
    return things, tuple(_portrait(thing, rng.choice(("white", "gray"))) for thing in things)


def _subject_image(rng: random.Random, held_out: bool, count: int | None, kind: str) -> Example:
    things, portraits = _subjects(rng, count or rng.choice((1, 1, 2)))
    background = rng.choice(tuple(BACKGROUNDS))
    if len(things) == 1:
        placed = [replace(things[0], size=rng.choice((SMALL, BIG))).at(PLACES[rng.choice(tuple(PLACES))])]
    else:
        placed = [replace(thing, size=PLAIN).at(spot) for thing, spot in zip(things, rng.choice(PAIRS), strict=True)]
    target = Scene(tuple(placed), background)
    return Example("subject_image", subject_prompt(target, rng), target, portraits, f"{len(things)}")


def _subject_video(rng: random.Random, held_out: bool, count: int | None, kind: str) -> Example:
    clip = draw_clip(rng, held_out)
    text = clip_caption(clip).split(" ", 3)[3]
    return Example(
        "subject_video", f"this shape {text}", clip, (_portrait(clip.thing, rng.choice(("white", "gray"))),), clip.motion
    )


def _x2t_image(rng: random.Random, held_out: bool, count: int | None, kind: str) -> Example | None:
    scene = draw_scene(rng, count, held_out)
    if kind == "caption":
        return Example("x2t_image", "", caption(scene), (scene,), kind)
    asked = question(scene, kind, rng)
    return None if asked is None else Example("x2t_image", asked[0], asked[1], (scene,), kind)


def _x2t_video(rng: random.Random, held_out: bool, count: int | None, kind: str) -> Example:
    clip = draw_clip(rng, held_out)
    text, answer = clip_question(clip, rng) if kind == "motion" else ("", clip_caption(clip))
    return Example("x2t_video", text, answer, (clip,), kind)


# Of edits and of questions, equally often but for the edit that has a gate, and captions, which are learned last.
KINDS = {
    "image_edit": (*EDITS, "colour"),
    "x2t_image": (*QUESTIONS, *["caption"] * 10),
    "x2t_video": ("motion", "motion", "caption"),
}
DRAWN = {
    "t2i": _t2i,
    "t2v": _t2v,
    "i2v": _i2v,
    "image_edit": _image_edit,
    "video_edit": _video_edit,
    "subject_image": _subject_image,
    "subject_video": _subject_video,
    "x2t_image": _x2t_image,
    "x2t_video": _x2t_video,
}
TASKS = tuple(DRAWN)
