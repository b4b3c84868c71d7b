"""What is said about the world: captions, edits, motions, questions and answers, in English and in Chinese."""

from __future__ import annotations

import random
from dataclasses import replace

from .world import BACKGROUNDS, BIG, COLOURS, PAIRS, PLACES, PLAIN, SHAPES, SMALL, Clip, Scene, Thing

CHINESE_SHARE = 0.2
ON = {"middle": "in the middle", "left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
TO = {"middle": "to the middle", "left": "to the left", "right": "to the right", "top": "to the top", "bottom": "to the bottom"}
DOES = {
    "left": "moves to the left", "right": "moves to the right", "up": "moves up", "down": "moves down",
    "grows": "grows", "shrinks": "shrinks", "turns": "turns",
}  # fmt: skip
NUMBERS = ("zero", "one", "two", "three")
ZH = {
    "red": "红色",
    "orange": "橙色",
    "yellow": "黄色",
    "green": "绿色",
    "blue": "蓝色",
    "purple": "紫色",
    "circle": "圆形",
    "square": "正方形",
    "triangle": "三角形",
    "star": "星形",
    "white": "白色",
    "gray": "灰色",
    "black": "黑色",
    "pink": "粉色",
    "striped": "条纹",
    "middle": "中间",
    "left": "左边",
    "right": "右边",
    "top": "上边",
    "bottom": "下边",
    "big": "大",
    "small": "小",
}
ZH_DOES = {
    "left": "向左移动",
    "right": "向右移动",
    "up": "向上移动",
    "down": "向下移动",
    "grows": "变大",
    "shrinks": "变小",
    "turns": "旋转",
}
ZH_NUMBERS = "零一二三"


def place_of(thing: Thing) -> str:
    """The name of the place that a thing is nearest to."""
    return min(PLACES, key=lambda place: abs(thing.x - PLACES[place][0]) + abs(thing.y - PLACES[place][1]))


def size_of(thing: Thing) -> str:
    return "small" if thing.size < (SMALL + BIG) / 2 else "big"


def on(background: str) -> str:
    return f"on a {background} background"


def named(thing: Thing) -> str:
    return f"{'an' if thing.colour == 'orange' else 'a'} {thing.colour} {thing.shape}"


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """A scene in words; ``rng`` leaves out the size at times, and the middle, and turns to Chinese."""
    if rng is not None and rng.random() < CHINESE_SHARE:
        return chinese_caption(scene)
    things, background = scene.things, on(scene.background)
    if len(things) == 1:
        thing = things[0]
        size = f"{size_of(thing)} " if rng is None or rng.random() < 0.7 else ""
        # Elsewhere must be said: with five places to choose from, Nano smeared its thing over two of them.
        unsaid = rng is not None and place_of(thing) == "middle" and rng.random() < 0.7
        place = "" if unsaid else f"{ON[place_of(thing)]} "
        article = "a" if size else named(thing).split()[0]
        return f"{article} {size}{thing.colour} {thing.shape} {place}{background}"
    if len(things) == 2:
        relation = "to the left of" if side_by_side(scene) else "above"
        return f"{named(things[0])} {relation} {named(things[1])} {background}"
    if len({(thing.shape, thing.colour) for thing in things}) == 1:
        return f"three {things[0].colour} {things[0].shape}s {background}"
    return f"{named(things[0])}, {named(things[1])} and {named(things[2])} {background}"


def side_by_side(scene: Scene) -> bool:
    first, second = scene.things[:2]
    return abs(first.x - second.x) > abs(first.y - second.y)


def chinese_caption(scene: Scene) -> str:
    things, background = scene.things, f"{ZH[scene.background]}背景"
    words = [f"{ZH[thing.colour]}{ZH[thing.shape]}" for thing in things]
    if len(things) == 1:
        return f"{background}上，{ZH[place_of(things[0])]}有一个{ZH[size_of(things[0])]}的{words[0]}"
    if len(things) == 2:
        return f"{background}上，{words[0]}在{words[1]}的{'左边' if side_by_side(scene) else '上边'}"
    if len(set(words)) == 1:
        return f"{background}上有三个{words[0]}"
    return f"{background}上有{words[0]}、{words[1]}和{words[2]}"


def clip_caption(clip: Clip, rng: random.Random | None = None) -> str:
    if rng is not None and rng.random() < CHINESE_SHARE:
        return f"{ZH[clip.background]}背景上，{ZH[clip.thing.colour]}{ZH[clip.thing.shape]}{ZH_DOES[clip.motion]}"
    return f"{named(clip.thing)} {DOES[clip.motion]} {on(clip.background)}"


def motion_prompt(clip: Clip, rng: random.Random | None = None) -> str:
    """What happens after a given first frame."""
    if rng is not None and rng.random() < CHINESE_SHARE:
        return f"{ZH[clip.thing.shape]}{ZH_DOES[clip.motion]}"
    return f"the {clip.thing.shape} {DOES[clip.motion]}"


Edited = tuple[str, Scene] | None


def edit(scene: Scene, kind: str, rng: random.Random) -> Edited:
    """An instruction of one of ``EDITS`` and the scene that it asks for; None where the scene is not fit for it."""
    thing, chinese = rng.choice(scene.things), rng.random() < CHINESE_SHARE
    unclear = kind != "background" and sum(other.shape == thing.shape for other in scene.things) > 1
    return None if unclear else EDITS[kind](scene, thing, chinese, rng)


def _background(scene: Scene, thing: Thing, chinese: bool, rng: random.Random) -> Edited:
    new = rng.choice([name for name in BACKGROUNDS if name != scene.background])
    return f"把背景变成{ZH[new]}" if chinese else f"make the background {new}", replace(scene, background=new)


def _colour(scene: Scene, thing: Thing, chinese: bool, rng: random.Random) -> Edited:
    colour = rng.choice([name for name in COLOURS if name != thing.colour])
    changed = tuple(replace(other, colour=colour) if other is thing else other for other in scene.things)
    text = f"把{ZH[thing.shape]}变成{ZH[colour]}" if chinese else f"make {_called(scene, thing, rng)} {colour}"
    return text, replace(scene, things=changed)


def _remove(scene: Scene, thing: Thing, chinese: bool, rng: random.Random) -> Edited:
    if len(scene.things) == 1:
        return None
    rest = tuple(other for other in scene.things if other is not thing)
    return f"去掉{ZH[thing.shape]}" if chinese else f"remove the {thing.shape}", replace(scene, things=rest)


def _move(scene: Scene, thing: Thing, chinese: bool, rng: random.Random) -> Edited:
    if len(scene.things) > 1:
        return None
    place = rng.choice([name for name in PLACES if name != place_of(thing)])
    text = f"把{ZH[thing.shape]}移到{ZH[place]}" if chinese else f"move {_called(scene, thing, rng)} {TO[place]}"
    return text, replace(scene, things=(thing.at(PLACES[place]),))


def _add(scene: Scene, thing: Thing, chinese: bool, rng: random.Random) -> Edited:
    if len(scene.things) > 1 or size_of(thing) == "big" or place_of(thing) == "middle":
        return None
    place, spot = _opposite(place_of(thing))
    new = Thing(rng.choice(SHAPES), rng.choice(tuple(COLOURS)), PLAIN).at(spot)
    where = f" {ON[place]}" if rng.random() < 0.7 else ""  # there is one free place only
    text = f"在{ZH[place]}加一个{ZH[new.colour]}{ZH[new.shape]}" if chinese else f"add {named(new)}{where}"
    return text, replace(scene, things=(thing, new))


EDITS = {"colour": _colour, "remove": _remove, "move": _move, "add": _add, "background": _background}


def _called(scene: Scene, thing: Thing, rng: random.Random) -> str:
    """What an instruction calls a thing: by its shape, or "it" where there is no other."""
    return "it" if len(scene.things) == 1 and rng.random() < 0.3 else f"the {thing.shape}"


def _opposite(place: str) -> tuple[str, tuple[float, float]]:
    other = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}[place]
    spots = dict(zip(("left", "right", "top", "bottom"), (*PAIRS[0], *PAIRS[1]), strict=True))
    return other, spots[other]


def subject_prompt(target: Scene, rng: random.Random) -> str:
    """What is asked of the things on the pictures: where to stand, on which background."""
    chinese = rng.random() < CHINESE_SHARE
    if len(target.things) == 1:
        thing = target.things[0]
        if chinese:
            return f"{ZH[target.background]}背景上，这个形状在{ZH[place_of(thing)]}，{ZH[size_of(thing)]}的"
        return f"this shape, {size_of(thing)}, {ON[place_of(thing)]} {on(target.background)}"
    relation = (
        ("左边" if side_by_side(target) else "上边") if chinese else "to the left of" if side_by_side(target) else "above"
    )
    if chinese:
        return f"{ZH[target.background]}背景上，第一个形状在第二个形状的{relation}"
    return f"the first shape {relation} the second shape {on(target.background)}"


Asked = tuple[str, str] | None


def question(scene: Scene, kind: str, rng: random.Random) -> Asked:
    """A question of one of ``QUESTIONS`` and its answer; None where the scene has no clear answer."""
    return QUESTIONS[kind](scene, rng.choice(scene.things), rng.random() < CHINESE_SHARE)


def _ask_background(scene: Scene, thing: Thing, chinese: bool) -> Asked:
    return ("背景是什么样的？", ZH[scene.background]) if chinese else ("What is the background like?", scene.background)


def _ask_count(scene: Scene, thing: Thing, chinese: bool) -> Asked:
    if thing.x < scene.things[0].x + 1:  # the first of them: ask for all
        number = len(scene.things)
        return ("有几个形状？", ZH_NUMBERS[number]) if chinese else ("How many shapes are there?", NUMBERS[number])
    number = sum(other.shape == thing.shape for other in scene.things)
    return (
        (f"有几个{ZH[thing.shape]}？", ZH_NUMBERS[number])
        if chinese
        else (f"How many {thing.shape}s are there?", NUMBERS[number])
    )


def _ask_colour(scene: Scene, thing: Thing, chinese: bool) -> Asked:
    if sum(other.shape == thing.shape for other in scene.things) > 1:
        return None
    return (
        (f"{ZH[thing.shape]}是什么颜色？", ZH[thing.colour]) if chinese else (f"What color is the {thing.shape}?", thing.colour)
    )


def _ask_shape(scene: Scene, thing: Thing, chinese: bool) -> Asked:
    if sum(other.colour == thing.colour for other in scene.things) > 1:
        return None
    return (
        (f"什么形状是{ZH[thing.colour]}的？", ZH[thing.shape]) if chinese else (f"Which shape is {thing.colour}?", thing.shape)
    )


def _ask_side(scene: Scene, thing: Thing, chinese: bool) -> Asked:
    if len(scene.things) == 2 and scene.things[0].shape != scene.things[1].shape and side_by_side(scene):
        side = "left" if thing is scene.things[0] else "right"
    elif len(scene.things) == 1 and place_of(thing) in ("left", "right"):
        side = place_of(thing)
    else:
        return None
    if chinese:
        return f"{ZH[thing.shape]}在左边还是右边？", ZH[side]
    return f"Is the {thing.shape} on the left or on the right?", side


QUESTIONS = {
    "colour": _ask_colour,
    "shape": _ask_shape,
    "count": _ask_count,
    "side": _ask_side,
    "background": _ask_background,
}


def clip_question(clip: Clip, rng: random.Random) -> tuple[str, str]:
    """What happens in a clip."""
    if rng.random() < CHINESE_SHARE:
        return f"{ZH[clip.thing.shape]}在做什么？", ZH_DOES[clip.motion]
    return f"What does the {clip.thing.shape} do?", f"It {DOES[clip.motion]}."
