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
from lance_runtime.checkpoint import TensorFile
from lance_runtime.convert import convert
from lance_runtime.quantized import FORMATS

pytestmark = pytest.mark.comfy
SCRIPT = Path(__file__).with_name("comfy_quantized_runs.py")
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


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", DRAWN)
def test_graphs_draw_what_the_decoded_weights_draw(server, media, pipes, kind, name):
    found = saved_latents(server.run(quantised_graph(name, kind, media)))[0]
    expected = pipes[kind](**goldens.arguments(name)).latents
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
    assert answer == pipes[kind](**{**arguments, "max_new_tokens": 16}).text


@pytest.mark.parametrize("kind", FORMATS)
def test_a_lora_goes_on_top(trees, kind):
    found = report("patched", trees[kind], SCRIPT)
    assert found
