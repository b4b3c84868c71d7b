"""Load Lance finds the hub's tree, what ``download`` put into ComfyUI's folders, and single files, wherever they lie."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from comfy_results import TOLERANCE, difference, saved_latents
from comfy_server import ComfyServer
from goldens import CHECKPOINT
from graphs import text_to_image
from hub_server import serve
from safetensors.torch import load_file, save_file
from single_files import write_model, write_vae, write_vit
from test_workflows import small
from workflow_nodes import NANO

from lance_runtime.download import Hub, download, make_plan

pytestmark = pytest.mark.comfy
ROOT = Path(__file__).parents[1]
FLAT = {"model_name": "Lance_3B.safetensors", "vit_name": "qwen2.5_vl_vit.safetensors", "vae_name": "wan2.2_vae.safetensors"}


def paths(**sections):
    """extra_model_paths.yaml: sections of a base path and ComfyUI's folders within it."""
    lines = []
    for name, (base, folders) in sections.items():
        lines += [f"{name}:", f"  base_path: {base}", *(f"  {key}: {folder}" for key, folder in folders.items())]
    return "\n".join(lines) + "\n"


def options(server):
    inputs = server.object_info("LanceNativeLoader")["input"]["required"]
    return {name: inputs[name][1]["options"] for name in FLAT}


def drawn(server, **names):
    graph = text_to_image(steps=2)
    graph["load"]["inputs"].update(names)
    result = server.run(graph)
    return saved_latents(result)[0], np.asarray(result.image("save"))


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory):
    models = tmp_path_factory.mktemp("downloaded") / "models"
    models.mkdir()
    with serve(CHECKPOINT) as hub:
        remote = Hub(hub.url)
        download(make_plan(models, "all", remote), remote, lambda _: None)
    return models


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """Files of one piece on another disk, under names of the user's own."""
    folder = tmp_path_factory.mktemp("other disk")
    model, vit, vae = write_model(folder, "Lance_3B"), write_vit(folder), write_vae(folder)
    for path, name in ((model, "diffusion/mine.safetensors"), (vit, "encoders/eyes.safetensors"), (vae, "vaes/48.safetensors")):
        (folder / name).parent.mkdir()
        path.rename(folder / name)
    return folder


def of_trainers(folder):
    """What training scripts write: pickles with the weights under a key, and wrapped names."""
    state = load_file(CHECKPOINT / "Lance_3B" / "model.safetensors")
    torch.save({"step": 7, "ema": {"module." + name: tensor for name, tensor in state.items()}}, folder / "trained.ckpt")
    save_file({"ema." + name: tensor for name, tensor in state.items()}, folder / "trained.safetensors")
    for name in ("llm_config.json", "tokenizer.json"):
        shutil.copy(CHECKPOINT / "Lance_3B" / name, folder / name)


@pytest.fixture(scope="module")
def server(downloaded, single, tmp_path_factory):
    from comfy_fixtures import require_comfyui

    require_comfyui()
    folder = tmp_path_factory.mktemp("settings")
    own = {"diffusion_models": "diffusion_models", "text_encoders": "text_encoders", "vae": "vae"}
    other = {"diffusion_models": "diffusion", "text_encoders": "encoders", "vae": "vaes"}
    # A folder that holds the hub's whole repository serves every key.
    (folder / "Lance").symlink_to(CHECKPOINT)
    tree = dict.fromkeys(own, ".")
    text = paths(downloaded=(downloaded, own), single=(single, other), tree=(folder, tree))
    of_trainers(single / "diffusion")
    (folder / "extra.yaml").write_text(text)
    with ComfyServer({}, ["--extra-model-paths-config", str(folder / "extra.yaml")]) as running:
        yield running


def test_combos_list_all_of_them(server):
    found = options(server)
    other = "Lance/Lance_3B_Video/model.safetensors"
    assert found["model_name"][:2] == ["Lance_3B.safetensors", "Lance_3B_Video.safetensors"]
    assert {"Lance_3B/model.safetensors", other, "mine.safetensors"} < set(found["model_name"])
    assert found["vit_name"][:2] == ["auto", "qwen2.5_vl_vit.safetensors"]
    assert {"Qwen2.5-VL-ViT/vit.safetensors", "eyes.safetensors"} < set(found["vit_name"])
    assert found["vae_name"][0] == "wan2.2_vae.safetensors"
    # A new node begins with the first: what looks like Lance, then Nano, then the others; of VAEs Nano's is the last.
    likely = ["lance" in name.lower() for name in found["model_name"]]
    assert likely == sorted(likely, reverse=True)
    assert NANO in found["model_name"]
    assert found["vae_name"][-1] == NANO
    assert found["vae_name"].index("Wan2.2_VAE.pth") < found["vae_name"].index("48.safetensors")
    assert {"Wan2.2_VAE.pth", "Lance/Wan2.2_VAE.pth", "48.safetensors"} < set(found["vae_name"])


def test_all_of_them_load_and_draw_the_same(server):
    expected, picture = drawn(server, **FLAT)
    for names in (
        {"model_name": "Lance_3B/model.safetensors", "vae_name": "Wan2.2_VAE.pth"},
        {"model_name": "Lance/Lance_3B/model.safetensors", "vae_name": "Lance/Wan2.2_VAE.pth"},
        {"model_name": "mine.safetensors", "vae_name": "48.safetensors"},
        {"model_name": "trained.ckpt", "vae_name": "48.safetensors"},
        {"model_name": "trained.safetensors", "vae_name": "48.safetensors"},
    ):
        latents, again = drawn(server, **names)
        assert difference(latents, expected) < TOLERANCE
        np.testing.assert_array_equal(again, picture)


@pytest.mark.parametrize("vit", ["qwen2.5_vl_vit.safetensors", "eyes.safetensors", "auto"])
def test_the_vision_tower_is_found_under_every_name(server, vit):
    graph = json.loads((ROOT / "tests" / "workflows" / "ask_about_an_image.api.json").read_text("utf-8"))
    graph = small(graph)
    graph["load"]["inputs"]["vit_name"] = vit
    graph["picture"]["inputs"]["image"] = server.upload_image(ROOT / "tests" / "data" / "parity" / "media" / "wide.png")
    assert server.run(graph).outputs["show"]["text"]


def test_a_file_of_the_flat_name_wins(tmp_path):
    """Nothing changes for those who already have one; and the name is listed once."""
    from comfy_fixtures import require_comfyui

    require_comfyui()
    models = {f"diffusion_models/Lance_3B/{path.name}": path for path in (CHECKPOINT / "Lance_3B").iterdir()}
    models["vae/Wan2.2_VAE.pth"] = CHECKPOINT / "Wan2.2_VAE.pth"
    models["diffusion_models/Lance_3B.safetensors"] = CHECKPOINT.parent / "cases.json"  # no checkpoint at all
    with ComfyServer(models) as running:
        assert options(running)["model_name"] == ["Lance_3B.safetensors", "Lance_3B/model.safetensors", NANO]
        graph = text_to_image(steps=1)
        graph["load"]["inputs"].update(model_name="Lance_3B.safetensors", vae_name="wan2.2_vae.safetensors")
        assert running.run(graph, check=False).error["exception_message"].startswith("Lance_3B.safetensors (")
