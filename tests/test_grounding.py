"""Boxes of an answer, in pixels of the picture that was asked about and not of what the vision tower was given of it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lance_runtime.config import VisionConfig
from lance_runtime.grounding import find_boxes
from lance_runtime.preprocess import CLIP_MEAN, CLIP_STD, Area, vit_area, vit_patches, vit_size

VISION = VisionConfig()
PRESET = "image_768res"


def boxes(answer, seen=(100, 200), area=None, picture=(100, 200)):
    return find_boxes(answer, seen, area or Area(0, 0, *picture), picture)


def test_the_forms_in_which_qwen_names_boxes():
    first, second = boxes(
        '```json\n[{"bbox_2d": [10, 20, 30, 60], "label": "a red car"},\n {"bbox_2d": [100, 0, 200, 100], "label": "dog"}]\n```'
    )
    assert first == {"x": 10, "y": 20, "width": 20, "height": 40, "label": "a red car"}
    assert second == {"x": 100, "y": 0, "width": 100, "height": 100, "label": "dog"}
    assert boxes("<|box_start|>(10,20),(30,60)<|box_end|>") == [{**first, "label": ""}]
    assert boxes("It is at [10.4, 19.6, 30, 60].") == [{**first, "label": ""}]
    assert boxes("[30, 60, 10, 20]") == [{**first, "label": ""}]  # corners the other way round


@pytest.mark.parametrize(
    ("written", "label"),
    [('"a \\"big\\" dog"', 'a "big" dog'), (r'"\u72d7"', "\u72d7"), (r'"50\% off"', r"50\% off"), ('""', "")],
)
def test_a_label_stands_before_or_behind_its_box(written, label):
    behind, before = (f'"bbox_2d": [10, 20, 30, 60], "label": {written}', f'"label": {written}, "bbox_2d": [1, 2, 3, 6]')
    for one, other in ((behind, before), (before, behind), (behind, behind), (before, before)):
        assert [box["label"] for box in boxes(f'[{{{one}}}, {{"label": "no"}}, {{{other}}}]')] == [label, label]


@pytest.mark.parametrize("answer", ["", "no box", "[1, 2, 3]", "[1, 2, 3, 4, 5]", "[10, 20, 10, 60]", "[300, 0, 400, 50]"])
def test_what_is_no_box(answer):
    assert boxes(answer) == []


def test_boxes_are_cut_to_the_picture():
    expected = [{"x": 0, "y": 50, "width": 200, "height": 50, "label": ""}]
    assert boxes("[-20, 50, 500, 500]") == boxes(f"[-20, 50, 500, {'9' * 400}]") == expected  # numbers may run away


@pytest.mark.parametrize("size", [(1000, 1500), (1000, 2000), (1080, 1920), (768, 768), (1500, 1000), (300, 900)])
def test_a_box_is_where_the_tower_saw_it(size):
    """A white rectangle is painted, found again in the tower's own patches, and named by its pixels there."""
    height, width = size
    painted = {"x": width // 3, "y": height // 4, "width": width // 5, "height": height // 3}
    picture = np.zeros((height, width, 3), np.uint8)
    picture[painted["y"] : painted["y"] + painted["height"], painted["x"] : painted["x"] + painted["width"]] = 255
    patches, (frames, rows, columns) = vit_patches(picture, PRESET, VISION)
    channel = patches.unflatten(1, (3, 2, 14, 14))[:, 0, 0] * CLIP_STD[0] + CLIP_MEAN[0]
    blocks = channel.view(rows // 2, columns // 2, 2, 2, 14, 14)
    given_picture = blocks.permute(0, 2, 4, 1, 3, 5).reshape(rows * 14, columns * 14).numpy() > 0.5
    assert frames == 1
    assert given_picture.shape == vit_size(height, width, PRESET, VISION)
    down, across = np.flatnonzero(given_picture.any(axis=1)), np.flatnonzero(given_picture.any(axis=0))
    answer = f'{{"bbox_2d": [{across[0]}, {down[0]}, {across[-1] + 1}, {down[-1] + 1}], "label": "it"}}'
    (found,) = boxes(answer, given_picture.shape, vit_area(height, width, PRESET, VISION), size)
    scale = max(height / given_picture.shape[0], width / given_picture.shape[1])
    for name, value in painted.items():
        assert abs(found[name] - value) <= max(1, scale), name


@given(st.integers(1, 4000), st.integers(1, 4000))
@settings(max_examples=50)
def test_what_is_seen_lies_in_the_middle_of_the_picture(height, width):
    area = vit_area(height, width, PRESET, VISION)
    assert area.top >= 0
    assert area.left >= 0
    assert area.top + area.height <= height + 1e-6
    assert area.left + area.width <= width + 1e-6
    scale = area.height / vit_size(height, width, PRESET, VISION)[0]
    assert abs(area.top - (height - area.top - area.height)) <= 1 + scale + 1e-6
