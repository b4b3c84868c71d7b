"""Quantised checkpoints in the real ComfyUI: its own layers hold them, graphs draw with them, LoRAs go on top."""

from __future__ import annotations

from pathlib import Path

import goldens
import pytest
import torch
from comfy_fixtures import require_comfyui
from comfy_results import TOLERANCE, difference, saved_latents, upload_media
from comfy_server import ComfyServer
from graphs import golden_graph, node, pictures
from quantised_files import quantised_trees
from test_comfy_memory import report

from lance_runtime import LancePipeline
from lance_runtime.checkpoint import POSITION_TABLE, TensorFile
from lance_runtime.convert import convert
from lance_runtime.dequantize import plain_tensors
from lance_runtime.quant_formats import FORMATS

pytestmark = pytest.mark.comfy
SCRIPT = Path(__file__).with_name("comfy_quantized_runs.py")
MODEL = Path("Lance_3B", "model.safetensors")
DRAWN = ("t2i_basic", "image_edit_wide")
ANSWERED = next(name for name in goldens.ANSWERED if goldens.CASES[name]["task"] == "x2t_image")


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    require_comfyui()
    folder = tmp_path_factory.mktemp("quantised")
    found = quantised_trees(folder)
    for tree in found.values():
        convert(TensorFile(tree / "Lance_3B" / "model.safetensors"), tree / "Decoded" / "model.safetensors")
    return found


@pytest.fixture(scope="module")
def server(comfy_models, trees):
    files = {
        f"diffusion_models/{kind}/model.safetensors": tree / "Lance_3B" / "model.safetensors" for kind, tree in trees.items()
    }
    with ComfyServer({**comfy_models, **files}) as server:
        yield server


@pytest.fixture(scope="module")
def media(server, tmp_path_factory):
    return upload_media(server, tmp_path_factory.mktemp("media"))


@pytest.fixture(scope="module")
def pipes(trees):
    """The runtime over the same files: it computes with the decoded weights."""
    return {kind: LancePipeline.from_pretrained(tree, device="cpu", dtype=torch.float32) for kind, tree in trees.items()}


def quantised_graph(name, kind, media):
    graph = golden_graph(name, media)
    graph["load"]["inputs"]["model_name"] = f"{kind}/model.safetensors"
    return graph


@pytest.mark.parametrize("kind", FORMATS)
def test_comfyui_decodes_every_weight_to_the_same_bits(trees, kind):
    found = report("weights", trees[kind], SCRIPT)
    assert found["quantised"] == found["expected"] == 42
    assert found["same names"]
    assert (found["torch.float32"], found["torch.bfloat16"], found["others"]) == (0, 0, 0)
    assert found["linear"] < 1e-6


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", DRAWN)
def test_graphs_draw_what_the_decoded_weights_draw(server, media, pipes, kind, name):
    found = saved_latents(server.run(quantised_graph(name, kind, media)))[0]
    expected = pipes[kind](**goldens.arguments(name)).latents
    if kind == "int8":  # inputs are rounded as well, and the noise of that adds up over steps: measured 0.021
        assert 1e-3 < (found - expected).norm() / expected.norm() < 0.05
    else:
        assert difference(found, expected) < TOLERANCE
    assert difference(expected, goldens.tensors(name)["latent"]) > TOLERANCE  # quantised it is


@pytest.mark.parametrize("kind", FORMATS)
def test_questions_get_the_decoded_weights_answer(server, media, pipes, kind):
    case = goldens.CASES[ANSWERED]
    arguments = goldens.arguments(ANSWERED)
    images = {f"images.image_{i}": [f"image{i}", 0] for i in range(len(case["images"]))}
    graph = pictures(case, media)
    graph["load"] = quantised_graph(DRAWN[0], kind, media)["load"]
    sampling = {"max_length": 16, "temperature": 0.0, "top_p": 1.0, "seed": 1}
    question = {"question": case.get("question", ""), "resolution": case["settings"]["resolution"]}
    graph["ask"] = node("LanceNativeAsk", clip=["load", 1], **question, **images, **sampling)
    graph["show"] = node("PreviewAny", source=["ask", 0])
    (answer,) = server.run(graph).outputs["show"]["text"]
    expected = pipes[kind](**{**arguments, "max_new_tokens": 16}).text
    same = 16 if kind == "int8" else None  # its rounded inputs change a late word of this answer
    assert answer[:same] == expected[:same]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_saved_model_is_the_same_file(server, trees, kind):
    loader = quantised_graph(DRAWN[0], kind, {})["load"]
    graph = {"load": loader, "save": node("ModelSave", model=["load", 0], filename_prefix=f"saved_{kind}")}
    server.run(graph)
    (path,) = (server.base / "output").glob(f"saved_{kind}*.safetensors")
    found, expected = plain_tensors(TensorFile(path)), plain_tensors(TensorFile(trees[kind] / MODEL))
    assert set(found) == set(expected) - {POSITION_TABLE}
    assert found.layers.keys() == expected.layers.keys()
    assert all(layer.settings == expected.layers[name].settings for name, layer in found.layers.items())
    assert all(torch.equal(found[name].float(), expected[name].float()) for name in found)


# Relative differences of latents. With memory ComfyUI adds the LoRA and quantises anew, which is the format's own error;
# without, it adds the LoRA to decoded weights in passing, which is exact. int8 rounds inputs as well.
PATCHED = {"fp8": 0.03, "int8": 0.04, "nvfp4": 0.12, "mxfp8": 0.03}


def test_8_bit_weights_are_those_of_the_layers_and_float16_is_never_taken(trees):
    found = report("types", trees["fp8"], SCRIPT)
    assert found["matrices"] == ["torch.float8_e4m3fn"]
    assert found["others"] == ["torch.bfloat16"]
    assert found["operations"] == "manual_cast.Linear"
    assert found["float16 wished"] == "torch.bfloat16"
    assert found["float16 set"] == "torch.float32"


def test_fp8_layers_of_others_are_multiplied_in_full_precision(trees):
    found = report("foreign", trees["fp8"], SCRIPT)
    assert found["count"] > 10
    assert found["others"] == [True]
    assert not found["scaled"]  # its file knows how large what comes in may be


def test_attention_beside_the_card_is_not_the_cards(trees):
    found = report("beside", trees["fp8"], SCRIPT)
    assert [calls for _, calls in found.values()] == [1, 1]
    assert max(error for error, _ in found.values()) < 1e-5


def test_8_bit_attention_is_for_steps_alone(trees):
    found = report("precise", trees["fp8"], SCRIPT)
    assert found["calls"] == 1
    assert found["error"] < 1e-5


EXACT = {"fp8": 1e-5, "int8": 0.04, "nvfp4": 1e-5, "mxfp8": 1e-5}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_lora_goes_on_top_with_memory_and_without(trees, kind):
    found = report("patched", trees[kind], SCRIPT)
    assert found["the LoRA acts"] > 0.3
    assert found["patched"] < PATCHED[kind]
    assert found["low patched"] < EXACT[kind]
    assert max(found["bare"], found["low bare"]) < EXACT[kind]
    assert found["still quantised"] == 42
    assert found["removed"] == 0
    # int8 rounds inputs too: on these random weights a near tie of two words can go either way.
    assert found["same answer"] or kind == "int8"
    assert found["low answer"]
    assert found["low"]
    assert found["bytes loaded"] < found["bytes"] / 2
    assert found["kept"] == 0


# ComfyUI rounds each patched weight up or down at random, so that with 4 bits the noise is larger than what this LoRA does.
PATCHED_EVERYWHERE = {"int8": 0.05, "nvfp4": 0.3}


@pytest.mark.parametrize("kind", ["int8", "nvfp4"])
def test_a_lora_on_every_weight_is_exact_beside_them(trees, kind):
    found = report("everywhere", trees[kind], SCRIPT)
    assert found["acts"] > 0.09
    assert found["patched"] < PATCHED_EVERYWHERE[kind]
    assert found["beside"] < EXACT[kind]
    assert found["DoRA"] < (2e-4 if kind == "int8" else 1e-5)  # what it is compared with was rounded to bfloat16
    assert found["plain"] == f"{found['count']} of {found['count']} tensors placed."
    assert ("Load LoRA (Bypass)" in found["said"]) == (kind == "nvfp4")
