"""Single nodes in ComfyUI's Python: what they make of odd pictures, frames that are given twice, and hooks."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_comfy_memory import report

pytestmark = pytest.mark.comfy
SCRIPT = Path(__file__).with_name("comfy_node_runs.py")


def test_sources_are_cut_and_sampled_before_anything_else():
    found = report("sources", script=SCRIPT)
    assert max(found["apart"].values()) < 1e-5
    assert found["sizes"] == {"5 x 40": [1, 2], "1 x 1": [1, 1]}
    assert found["converted"] == [69]  # of 480 frames
    assert found["same"]
    assert found["opened"] == 1


def test_a_second_start_keeps_the_frames_of_the_first():
    found = report("starts", script=SCRIPT)
    assert found["same"] == [True, True]
    assert found["given"] == [[0, 1, 0, 1, 1], [1, 0, 1, 0, 1], [0, 1, 0, 1, 1]]
    assert found["batch"] == [[2], [4, 5]]
    assert found["continued"] == [0, 0, 1]  # however many frames there are
    assert found["refused"] == [
        "1 of 1 latent frames are given: 0 are left to draw.",
        "'middle' would take latent frame 0 of 2, which another input gives.",
        "2 of 2 latent frames are given: 0 are left to draw.",
        "1 of 1 latent frames are given: 0 are left to draw.",
        "'first' would take latent frame 0 of 3, which another input gives.",
        "2 of 2 latent frames are given: 0 are left to draw.",
    ]
    assert found["new first"] == 0
    assert found["a mask of another kind"] == [[1, 1, 1, 0, 0, 0], 0]


def test_an_edit_begins_with_its_source():
    found = report("edits", script=SCRIPT)
    assert [found["batch"], found["alone"], found["covered"]] == [2, True, 0]
    assert found["source"] < 1e-6
    assert found["kept"] < 1e-4


def test_what_may_be_connected_too():
    found = report("odd", script=SCRIPT)
    assert found["boxes beside a context of words"] == [[], [1, 64, 96]]
    assert found["presets"] == {"picture": "image_768res", "frames": "video_480p", "video": "video_480p"}
    assert found["seen"] == [1, 1, 1]  # half as many frames a second, of a grid of 4 and one more
    assert found["said"] == "A question without a template has 0 tokens; it needs 1 or more."
    assert found["variant"] == "video"


def test_errors_say_what_a_core_node_has_done():
    averaged, outside = report("nowhere", script=SCRIPT)
    assert averaged.startswith("This conditioning was merged or scaled: ")
    assert averaged.endswith(" entries are others.")
    assert outside.startswith("An area of a conditioning holds 0 tokens of the latent [1, 8, 0]")


def test_hooks_of_a_clip_act_in_our_nodes():
    found = report("hooks", script=SCRIPT)
    assert found["on"] == [True] * 3
    assert found["acts"] > 1e-3
    assert found["as a LoRA"] < 1e-4
    assert found["after"] == 0


def test_a_prompt_that_ends_within_a_character_is_kept():
    found = report("cut", script=SCRIPT)
    assert found["whole"] == "A red hat \N{LARGE RED CIRCLE}"
    assert found["cut"].endswith("\ufffd")
    assert found["shown"] == "A red hat"


def test_a_subject_is_read_at_the_size_of_what_it_is_for():
    alone, picture, video, asked = report("subjects", script=SCRIPT)
    assert alone == picture == [768, 768]
    assert video == [640, 640]
    assert asked == [256, 256]
