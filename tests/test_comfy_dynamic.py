"""ComfyUI's dynamic VRAM, the way of most NVIDIA cards, on a made-up card: it draws and answers as plain management does."""

from __future__ import annotations

from pathlib import Path

import goldens
import pytest
from comfy_fixtures import require_comfyui
from quantised_files import quantised_tree
from test_comfy_memory import report

pytestmark = pytest.mark.comfy
SCRIPT = Path(__file__).with_name("comfy_dynamic_runs.py")
CARDS = ("all", "half", "none")
LAYERS = "language_model.model.layers."


def run(what: str, tree: Path = goldens.CHECKPOINT) -> dict:
    return report(what, tree, SCRIPT)


def check_management(found: dict) -> None:
    assert found["before"] == "SharedPatcher"
    assert found["patchers"] == ["DynamicPatcher", "DynamicPatcher", "ModelPatcherDynamic"]
    assert 0 == found["none, resident"] < found["half, resident"] < found["all, resident"]
    assert [found[f"{card}, pins"] for card in CARDS] == [0, 0, 0]
    assert found["unloaded"] == [0, 0]
    assert found["kept"] == 0


def test_pictures_answers_and_loras_are_the_same_on_any_card():
    """To the last bit: each LoRA is computed with by the same operations, wherever the weights were."""
    found = run("compare")
    check_management(found)
    assert min(found["acts"].values()) > 0.01
    for card in CARDS:
        assert set(found[card].values()) == {0.0}, card


def test_quantised_weights_are_the_same_on_any_card(tmp_path):
    """But for LoRAs on quantised layers: ComfyUI rounds the sums again by lot, by another one than in plain management."""
    require_comfyui()
    found = run("compare", quantised_tree(tmp_path, "fp8"))
    check_management(found)
    for card in CARDS:
        same = [value for what, value in found[card].items() if "layers" not in what]
        assert same == [0.0] * 11, card
        assert found[card]["picture, layers"] < 0.1 < found["acts"]["picture, layers"]


def test_the_weights_that_all_runs_read_stay_on_a_card_for_half():
    found = run("residents")
    placed = found["placed"]
    assert [name.rpartition("language_model.")[2] for name in placed[-2:]] == ["lm_head", "model.embed_tokens"]
    assert set(placed) - set(found["asked for"]) == {placed[-1]}  # of the table rows are read, in main memory
    experts = [[name for name in placed if LAYERS in name and ("_moe_gen" in name) == gen] for gen in (False, True)]
    assert [name for name in placed if LAYERS in name] == experts[0] + experts[1]
    assert len(experts[0]) == len(experts[1]) > 5
    assert set(experts[0]) <= set(found["answer"])
    assert set(experts[0]) <= set(found["picture"])
    assert not set(placed[-2:]) & set(found["picture"])
    assert 0 < len(set(experts[1]) & set(found["picture"])) < len(experts[1])


@pytest.mark.parametrize("what", ["detours", "detours_on_windows"])
def test_loras_by_hooks_and_beside_and_a_clip_on_the_cpu(what):
    found = run(what)
    assert found["the CPU's"] == ["ModelPatcher", "cpu"]
    assert found["saved"][0] == found["saved"][1] > 0
    assert found["the hook acts"] > 0.1
    assert found["beside acts"] > 0.1
    assert found["said beside acts"]
    assert found["beside"] < 0.01  # ComfyUI rounds it to the type of the file's weights
    for same in ("hook", "no hook", "said beside", "on the CPU", "drawn after it", "said again"):
        assert found[same] == 0, same


def test_8_bit_weights_are_those_of_the_layers_where_layers_have_no_memory_before_they_are_loaded():
    expected = {"matrices": ["torch.float8_e4m3fn"], "others": ["torch.bfloat16"]}
    assert run("types_on_windows") == {"dynamic": expected, "plain": expected}
