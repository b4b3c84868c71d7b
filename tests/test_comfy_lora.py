"""LoRAs on Lance in the real ComfyUI: every naming, either expert, either side of the shared weights."""

from __future__ import annotations

import pytest
import torch
from comfy_fixtures import require_comfyui
from comfy_results import TOLERANCE, comfy_noise, difference, saved_latents
from comfy_server import ComfyServer
from goldens import CHECKPOINT
from graphs import node
from safetensors.torch import save_file
from sampler_graphs import CFG, PROMPT, SEED, STEPS, base, fresh, ksampler

from lance_runtime import Guidance, LancePipeline

pytestmark = pytest.mark.comfy
LAYER, RANK, ACTS = "language_model.model.layers.1.", 4, 1e-3
EXPERTS = {
    "und": [LAYER + "self_attn.q_proj", LAYER + "self_attn.v_proj", LAYER + "mlp.down_proj"],
    "gen": [LAYER + "self_attn.q_proj_moe_gen", LAYER + "mlp_moe_gen.down_proj", "time_embedder.mlp.2"],
}
A_B, DOWN_UP, PEFT = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight"), "base_model.model."
# What a trainer may call the two matrices of a module: its path -> what stands before them, and their names.
CORE = {
    "diffusion_model": lambda path: ("diffusion_model." + path, A_B),
    "diffusion_model_kohya": lambda path: ("diffusion_model." + path, DOWN_UP),
    "lora_unet": lambda path: ("lora_unet_" + path.replace(".", "_"), DOWN_UP),
}
OURS = {
    **CORE,
    "peft": lambda path: (PEFT + path, A_B),
    "peft_adapter": lambda path: (PEFT + path, ("lora_A.default.weight", "lora_B.default.weight")),
    "peft_language_model": lambda path: (PEFT + path.removeprefix("language_model."), A_B),
    "bare": lambda path: (path, A_B),
    "without_stem": lambda path: (path.removeprefix("language_model.model."), A_B),
    "transformer": lambda path: ("transformer." + path, DOWN_UP),
    "wrapped": lambda path: ("model." + path, A_B),
    "compiled": lambda path: (PEFT + "_orig_mod." + path, A_B),
}


def matrices(expert):
    """Random (down, up) by module path; wide enough to change words, not only pictures."""
    generator = torch.Generator().manual_seed(3)
    sizes = {"down_proj": (192, 128), "v_proj": (128, 64)}
    found = {}
    for path in EXPERTS[expert]:
        inner, outer = sizes.get(path.rsplit(".", 1)[1], (128, 128))
        found[path] = torch.randn(RANK, inner, generator=generator) * 0.2, torch.randn(outer, RANK, generator=generator) * 0.2
    return found


def tensors(expert, naming):
    found = {}
    for path, pair in matrices(expert).items():
        stem, names = OURS[naming](path)
        found.update({f"{stem}.{name}": matrix.contiguous() for name, matrix in zip(names, pair, strict=True)})
    return found


@pytest.fixture(scope="module")
def server(comfy_models, tmp_path_factory):
    require_comfyui()
    folder = tmp_path_factory.mktemp("loras")
    files = {f"{expert}_{naming}": tensors(expert, naming) for expert in EXPERTS for naming in OURS}
    strange = {"text_model.encoder.layers.0.lora_A.weight": torch.ones(2, 2)}
    # Z-Image's, which begins as a path of Lance's does.
    image = {"diffusion_model.layers.1.attention.to_q.lora_A.weight": torch.ones(2, 2)}
    files |= {"some_strange": files["und_peft"] | strange, "all_strange": strange, "z_image": image}
    for name, content in files.items():
        save_file(content, folder / f"{name}.safetensors")
    with ComfyServer({**comfy_models, **{f"loras/{path.name}": path for path in folder.iterdir()}}) as server:
        yield server


def drawn_and_said(server, lora=None):
    """Latents and an answer: with a LoRA node, and of the plain MODEL and CLIP where it has no such output."""
    graph, links = base(), {"model": ["load", 0], "clip": ["load", 1]}
    if lora is not None:
        takes = [name for name in links if name == "model" or lora["class_type"] != "LoraLoaderModelOnly"]
        graph["lora"] = {**lora, "inputs": {**{name: links[name] for name in takes}, **lora["inputs"]}}
        links.update({name: ["lora", index] for index, name in enumerate(takes)})
    graph["fresh"] = fresh()
    graph["sample"] = ksampler(links["model"][0], "fresh")
    graph["latent"] = node("SaveLatent", samples=["sample", 0], filename_prefix="latent")
    sampling = {"max_length": 16, "temperature": 0.0, "top_p": 1.0, "seed": int(graph["fresh"]["inputs"]["multiplier"] * 100)}
    graph["ask"] = node("LanceNativeAsk", clip=links["clip"], question="the dog", resolution="auto", **sampling)
    graph["show"] = node("PreviewAny", source=["ask", 0])
    if lora is not None and lora["class_type"] == "LanceNativeLoraLoader":
        graph["report"] = node("PreviewAny", source=["lora", 2])
    result = server.run(graph)
    return saved_latents(result)[0], result.outputs["ask"]["text"][0], result


def lora_node(class_type, name, model=1.0, clip=1.0):
    strengths = {"strength_model": model} | ({} if class_type == "LoraLoaderModelOnly" else {"strength_clip": clip})
    return node(class_type, lora_name=f"{name}.safetensors", **strengths)


@pytest.fixture(scope="module")
def plain(server):
    return drawn_and_said(server)


@pytest.fixture(scope="module")
def merged():
    """The runtime's latents with the matrices added to the weights themselves."""
    found = {}
    for expert in EXPERTS:
        pipe = LancePipeline.from_pretrained(CHECKPOINT, "image", device="cpu", dtype=torch.float32)
        for path, (down, up) in matrices(expert).items():
            weight = pipe.components.model.get_submodule(path).weight
            weight.data += up @ down
        guidance = Guidance(CFG, (0.0, 1.0), "none", uncond_positions="dense")
        noise = comfy_noise(SEED, 48, 1, 4, 6)
        out = pipe("t2i", PROMPT, height=64, width=96, steps=STEPS, noise=noise, guidance=guidance)
        found[expert] = out.latents
    return found


@pytest.mark.parametrize("expert", EXPERTS)
@pytest.mark.parametrize("naming", CORE)
@pytest.mark.parametrize("class_type", ["LoraLoader", "LoraLoaderModelOnly"])
def test_loaders_of_comfyui(server, plain, merged, class_type, naming, expert):
    latents, answer, _ = drawn_and_said(server, lora_node(class_type, f"{expert}_{naming}", clip=0.0))
    assert difference(latents, merged[expert]) < TOLERANCE
    assert difference(latents, plain[0]) > ACTS
    assert answer == plain[1]


@pytest.mark.parametrize("expert", EXPERTS)
@pytest.mark.parametrize("naming", OURS)
def test_our_loader_places_every_name(server, merged, naming, expert):
    latents, _, result = drawn_and_said(server, lora_node("LanceNativeLoraLoader", f"{expert}_{naming}"))
    assert difference(latents, merged[expert]) < TOLERANCE
    assert result.outputs["report"]["text"] == ["6 of 6 tensors placed."]


def test_our_loader_says_what_it_could_not_place(server, merged):
    latents, _, result = drawn_and_said(server, lora_node("LanceNativeLoraLoader", "some_strange"))
    assert difference(latents, merged["und"]) < TOLERANCE
    (report,) = result.outputs["report"]["text"]
    assert report == "6 of 7 tensors placed. Without a place: text_model.encoder.layers.0.lora_A.weight"
    assert report in server.log()


@pytest.mark.parametrize("name", ["all_strange", "z_image"])
def test_a_lora_of_another_model_is_refused(server, plain, name):
    graph = {**base(), "lora": lora_node("LanceNativeLoraLoader", name)}
    graph["lora"]["inputs"].update(model=["load", 0], clip=["load", 1])
    graph["report"] = node("PreviewAny", source=["lora", 2])
    error = server.run(graph, check=False).error
    assert error["exception_message"].startswith(f"None of the 1 tensors of {name}.safetensors belongs to Lance")
    assert torch.equal(drawn_and_said(server)[0], plain[0])


@pytest.mark.parametrize("class_type", ["LoraLoader", "LanceNativeLoraLoader"])
@pytest.mark.parametrize("expert", EXPERTS)
def test_each_side_keeps_to_itself(server, plain, merged, class_type, expert):
    name = f"{expert}_diffusion_model"
    latents, answer, _ = drawn_and_said(server, lora_node(class_type, name, model=1.0, clip=0.0))
    assert difference(latents, merged[expert]) < TOLERANCE
    assert answer == plain[1]

    latents, answer, _ = drawn_and_said(server, lora_node(class_type, name, model=0.0, clip=1.0))
    assert torch.equal(latents, plain[0])
    # Words pass through the understanding expert alone: the other one has nothing to say.
    assert (answer != plain[1]) == (expert == "und")

    latents, answer, _ = drawn_and_said(server)
    assert torch.equal(latents, plain[0])
    assert answer == plain[1]
