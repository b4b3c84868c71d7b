"""Nano's world: what is drawn is read back whole, and what is held out stays out."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from nano.evaluate import TURNS, interval, motion_of, rest_error, right_edit, right_motion, right_things
from nano.score import BLOB, same_scene, same_things, seen
from nano.tasks import KINDS, TASKS, Example, draw, examples, frames
from nano.world import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, Clip, Scene, Thing, draw_clip, draw_scene, is_held_out, render


@pytest.mark.parametrize("held_out", [False, True])
def test_every_true_render_is_read_back(held_out):
    rng = random.Random(11)
    for _ in range(200):
        scene = draw_scene(rng, held_out=held_out)
        assert same_scene(seen(render(scene)), scene, near=2), scene


def test_every_clip_is_read_back():
    rng = random.Random(12)
    for motion, shape in product(MOTIONS, SHAPES):
        if (motion, shape) == ("turns", "circle"):
            continue
        clip = replace(draw_clip(rng), motion=motion, thing=Thing(shape, "red"))
        made = frames(clip)
        assert right_motion(made, Example("t2v", "", clip)), clip
        for scene, frame in zip(clip.scenes, made, strict=True):
            assert same_scene(seen(frame, TURNS if motion == "turns" else (0,)), scene, near=2), scene


def test_a_clip_played_backwards_is_another_motion():
    for motion, other in (("left", "right"), ("up", "down"), ("grows", "shrinks")):
        clip = Clip(Thing("square", "red"), "gray", motion)
        assert not right_motion(frames(clip)[::-1], Example("t2v", "", clip))
        first, last = (scene.things[0] for scene in (clip.scenes[-1], clip.scenes[0]))
        assert motion_of(first, last) == other


def test_held_out_combinations_never_occur_in_training():
    rng = random.Random(13)
    for task in TASKS:
        for _ in range(60):
            assert not draw(rng, task).held_out
        for example in examples(1, task, 5):
            assert example.held_out


def test_every_pair_is_seen_in_training():
    triples = [t for t in product(COLOURS, SHAPES, BACKGROUNDS) if not is_held_out(*t)]
    assert len(triples) == 100
    for first, second in ((0, 1), (0, 2), (1, 2)):
        pairs = {(triple[first], triple[second]) for triple in triples}
        assert len(pairs) == len({t[first] for t in triples}) * len({t[second] for t in triples})


def test_the_scorer_sees_what_is_wrong():
    scene = Scene((Thing("circle", "red", 16, 26, 48), Thing("star", "blue", 16, 70, 48)), "white")
    wrong = (
        replace(scene, things=scene.things[:1]),
        replace(scene, things=(replace(scene.things[0], colour="purple"), scene.things[1])),
        replace(scene, things=(replace(scene.things[0], shape="square"), scene.things[1])),
    )
    assert same_things(seen(render(scene)), scene)
    assert not any(same_things(seen(render(other)), scene) for other in wrong)
    assert not same_scene(seen(render(replace(scene, background="pink"))), scene)
    assert not same_scene(seen(render(replace(scene, things=tuple(t.at((t.x, 26)) for t in scene.things)))), scene)


def test_noise_and_blots_are_no_shapes():
    picture = render(Scene((), "white")).copy()
    picture[20:80, 20:36] = COLOURS["red"]
    picture[64:80, 20:80] = COLOURS["red"]
    assert [thing.shape for thing in seen(picture).things] == [BLOB]
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3)).astype(np.uint8)
    assert not any(thing.shape != BLOB for thing in seen(noise).things)


def test_an_edit_that_changes_the_rest_is_wrong():
    example = next(examples(3, "image_edit", 1, kind="colour"))
    right = render(example.wanted)
    assert right_edit(right[None], example)
    assert right_things(right[None], example)
    shaded = (right * 0.9).astype(np.uint8)
    assert rest_error(shaded, example) > rest_error(right, example) == 0
    assert not right_edit(render(example.sources[0])[None], example)


@pytest.mark.parametrize(("task", "kind"), [(task, kind) for task, kinds in KINDS.items() for kind in dict.fromkeys(kinds)])
def test_every_kind_is_drawn(task, kind):
    assert draw(random.Random(1), task, kind=kind).kind == kind


def test_intervals_hold_the_share():
    assert interval(100, 200) == pytest.approx((0.4314, 0.5686), abs=1e-3)  # Wilson's, from tables
    assert interval(200, 200)[1] == 1.0
