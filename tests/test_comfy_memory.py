"""What a run leaves in memory: nothing, whether it ended, was interrupted, or had too little memory to begin with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import goldens
import pytest
from comfy_server import ROOT, comfyui_python, find_comfyui

pytestmark = pytest.mark.comfy
SCRIPT = Path(__file__).with_name("comfy_memory_runs.py")


def report(what: str, tree: Path = goldens.CHECKPOINT, script: Path = SCRIPT) -> dict:
    """What a function of the script says, run by ComfyUI's Python in a process of its own."""
    comfyui = find_comfyui()
    command = [comfyui_python(comfyui), script, what, ROOT, tree]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=comfyui, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_interrupts_leave_nothing_behind():
    found = report("interrupts")
    assert found["after runs"] == 0
    assert found["prefixes"] == 0
    for where in ("in prefill", "while sampling", "in an answer", "kept guider"):
        assert found[where] == [True, 0], where
    assert found["drawn again"] == 0
    assert found["answered again"]


def test_two_lance_graphs_and_another_model_in_turn():
    found = report("others")
    assert found["change"] == 0
    assert found["differ"] > 1e-3
    assert [found["kept"], found["prefixes"], found["models"]] == [0, 0, 0]


def test_low_memory_draws_the_same():
    found = report("low_memory")
    assert found["low"]
    assert found["bytes loaded"] < found["bytes"] / 2
    assert max(found["without"], found["with a LoRA"]) < 1e-4
    assert found["the LoRA acts"] > 1e-3
    assert found["answer"]
    assert found["tower"] == [found["tower"][2], 0, found["tower"][2]]  # whole, whatever there is
    assert found["kept"] == 0


def test_weights_are_ranked_by_who_reads_them_when_memory_is_short():
    found = report("seldom")
    names = [f"diffusion_model.language_model.{name}" for name in ("lm_head", "model.embed_tokens")]
    assert found["outside"] == sorted(found["last of the dynamic"]) == names
    assert found["last of the plain"] == names[1]
    assert found["last under a LoRA"] != names[1]
    assert found["behind the head"] == ["Embedding", "RMSNorm"]
    assert found["outside, 0 streams"] == ["Embedding"]
    assert "Linear" not in found["outside, 2 streams"]  # answers read the head where it is
    assert all(found[what] for what in ("experts in turn", "by size", "plain experts in turn", "plain by size"))
    assert found["loaded"] == found["all but these"]
    assert found["passing"]
    assert found["whole tables"] == 0
    assert found["tables of a LoRA"] == 0  # all of it is read, so that it has a place
    assert [found["drawn"], found["answered"]] == [0, True]
    assert found["with a LoRA"] < 1e-4
    assert found["the LoRA acts"] > 1e-3


def test_a_run_does_not_grow_the_process():
    found = report("growth")
    assert found["a run"] < 1
    assert found["kept"] == 0


def test_further_questions_read_their_words_alone():
    """[times through the vision tower, longest pass through the language model in tokens]; a picture takes 50 and more."""
    found = report("questions")
    tower, picture = found["first"]
    assert tower == 1
    assert picture > 50
    assert found["first again"]
    for taken in (found["second"], found["third"], found["after drawing"][1:], found["without it"][1:]):
        assert taken[0] == 0
        assert taken[1] < picture / 2
    assert found["after drawing"][0]
    assert found["without it"][0]
    assert found["another picture"] == [True, 1, picture]
    assert found["with a LoRA"] == [True, 0, picture]
    assert 0 < found["kept bytes"] < 2**20
    assert found["unloaded"] == [0, 0]
    assert found["loaded again"] == [True, 0, picture]
    assert found["answers of a fresh model"] == [True, True]
    assert found["its LoRA's"]
    assert found["a copy's"]
    assert found["caches"] == 0
    prompt, one_picture, two_pictures = found["estimates"]
    assert prompt == 0  # nothing is read
    assert 0 < one_picture < two_pictures


def test_what_was_kept_of_questions_goes_with_the_model():
    assert report("questions_and_gone") == {"kept": 0, "models": 0}


def test_weights_follow_to_the_device_of_the_side_that_runs():
    found = report("devices")
    assert found["patcher"] == "SharedPatcher"
    assert found["places"] == [["cpu:0", True], ["cpu", True]] * 2
    assert found["a copy's"]  # Generate Text, with Select CLIP Device
    assert found["its own"]


def test_loras_beside_the_weights_act_on_their_side_and_go():
    assert report("beside") == {"acts": 4, "kept alive": 0, "said again": True, "a copy's acts": True, "MODEL's": 0.0}


def test_a_lora_on_both_sides_is_patched_in_once():
    """At unequal strengths ComfyUI has to take it out and put it in again for each side."""
    found = report("lora_on_both")
    assert found["equal"] == 1
    assert found["apart"] == 2 * 3


def test_a_prompt_needs_no_weights():
    found = report("prompts")
    assert [found["loads"], found["loads of an answer"]] == [0, 1]
    assert found["kind"] == "LanceCLIP"
    assert found["pooled"] is None
    assert found["from its tensor"][:2] == [True, True]
    assert found["from its tensor"][2] > 0
    assert found["of another model"].startswith("This conditioning was not made for Lance.\n")
    assert found["saved"] == [True] * 4
    assert found["noise of pictures"] == [[2, 16, 4, 6], True]


def test_the_bar_of_a_further_question_counts_what_is_read():
    (whole, read), (rest, read_again) = report("bars")["readings"]
    assert (whole, rest) == (read, read_again)
    assert 0 < rest < whole


def test_every_task_can_be_measured(tmp_path):
    """The script that fills the table of memory and time, at a small size; it writes the quantised files itself."""
    tree = shutil.copytree(goldens.CHECKPOINT, tmp_path / "tree")
    size = ("--size", "64", "96", "1", "--steps", "2", "--tasks", "image_edit", "x2t_image", "--formats", "fp8")
    command = [sys.executable, ROOT / "tests" / "benchmarks" / "footprint.py", "--tree", tree, "--cpu", *size]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["task"], line["format"]) for line in lines] == [("image_edit", "fp8"), ("x2t_image", "fp8")]
    assert not [line["failed"] for line in lines if "failed" in line]
    assert all(line["seconds"] > 0 and 0.1 < line["peak_gb"] < 10 for line in lines)
