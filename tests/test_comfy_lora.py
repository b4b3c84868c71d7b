"""LoRAs on Lance in the real ComfyUI: every naming, either expert, either side of the shared weights."""

from __future__ import annotations

import json

import pytest
import torch
from comfy_fixtures import require_comfyui
from comfy_results import TOLERANCE, comfy_noise, difference, saved_latents
from comfy_server import ComfyServer
from goldens import CHECKPOINT
from graphs import node
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
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
    "sharded": lambda path: (path.replace("model.layers.1.", "model.layers.1._fsdp_wrapped_module."), A_B),
    "lycoris": lambda path: ("lycoris_" + path.replace(".", "_"), DOWN_UP),
    "onetrainer": lambda path: ("lora_transformer_" + path.replace(".", "_"), DOWN_UP),
    "kohya_text": lambda path: ("lora_te1_" + path.removeprefix("language_model.").replace(".", "_"), DOWN_UP),
    "kohya_without_stem": lambda path: ("lora_unet_" + path.removeprefix("language_model.model.").replace(".", "_"), DOWN_UP),
    "saved_of_clip": lambda path: ("text_encoders.diffusion_model." + path, DOWN_UP),
}
PROJECTIONS = ["q_proj", "v_proj_moe_gen", "down_proj", "mlp_moe_gen.up_proj"]
# What PEFT itself makes: its settings, and what of PEFT's has to be used.
ATTENTION = ["q_proj", "v_proj_moe_gen"]
BY_PEFT = {
    "alpha": LoraConfig(r=4, lora_alpha=16, target_modules=PROJECTIONS),
    "patterns": LoraConfig(
        r=4,
        lora_alpha=3,
        use_rslora=True,
        target_modules=PROJECTIONS,
        rank_pattern={"down_proj": 2},
        alpha_pattern={r"layers\.1\.self_attn\.q_proj": 12},
    ),
    "dora": LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=PROJECTIONS),
    "dora_embedding": LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=["embed_tokens", "q_proj"]),
    "bias": LoraConfig(r=4, lora_alpha=8, lora_bias=True, target_modules=["q_proj", "k_proj_moe_gen"]),
    "all_biases": LoraConfig(r=4, lora_alpha=8, bias="all", target_modules=["q_proj", "k_proj_moe_gen"]),
    "embedding": LoraConfig(r=4, lora_alpha=8, target_modules=["embed_tokens", "q_proj"]),
    "saved_modules": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], modules_to_save=["norm_moe_gen", "llm2vae"]),
    "loha": LoHaConfig(r=4, alpha=2, target_modules=ATTENTION),
    "lokr": LoKrConfig(r=4, alpha=2, target_modules=ATTENTION),
    "lokr_whole": LoKrConfig(r=64, alpha=32, target_modules=ATTENTION),
}


# How files call the two matrices of a module.
WORDS = {
    "peft": (".lora_A.weight", ".lora_B.weight"),
    "kohya": (".lora_down.weight", ".lora_up.weight"),
    "old_diffusers": (".lora.down.weight", ".lora.up.weight"),
    "bare": (".lora_A", ".lora_B"),
}
# diffusers' settings in a header, and what the report says of them; None: refused.
SETTINGS = {
    "nothing": ("null", ""),
    "empty": ("{}", ""),
    "text": (
        '{"transformer.lora_alpha": "16", "text_encoder.lora_alpha": 99}',
        "Alpha is 16, says the header of settings_text.safetensors.",
    ),
    "no_json": ("alpha: 16", None),
    "no_number": ('{"lora_alpha": {}}', None),
    "list": ("[1]", None),
    "ia3": ('{"peft_type": "IA3"}', "says that this is IA3; of PEFT's kinds ComfyUI can apply 3: LORA, LOHA, LOKR."),
    "no_pattern": ('{"lora_alpha": 8, "alpha_pattern": {"*q_proj": 2}}', None),
    "pissa": ('{"lora_alpha": 8, "init_lora_weights": "pissa"}', "says that training began with pissa"),
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


def runtime_latents(pipe):
    guidance = Guidance(CFG, (0.0, 1.0), "none", uncond_positions="dense")
    return pipe(
        "t2i", PROMPT, height=64, width=96, steps=STEPS, noise=comfy_noise(SEED, 48, 1, 4, 6), guidance=guidance
    ).latents


@pytest.fixture(scope="module")
def by_peft(tmp_path_factory):
    """Folders of adapters that PEFT saved, and the runtime's latents after PEFT's own merging: whole, and half the way."""
    home, latents = tmp_path_factory.mktemp("peft"), {}
    for name, config in BY_PEFT.items():
        pipe = LancePipeline.from_pretrained(CHECKPOINT, "image", device="cpu", dtype=torch.float32)
        model = pipe.components.model
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        adapted = get_peft_model(model, config)
        generator = torch.Generator().manual_seed(5)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
        adapted.save_pretrained(home / name)
        adapted.merge_and_unload()
        whole = runtime_latents(pipe)
        model.load_state_dict({key: (tensor + before[key]) / 2 for key, tensor in model.state_dict().items()})
        latents[name] = {1.0: whole, 0.5: runtime_latents(pipe)}
    return home, latents


@pytest.fixture(scope="module")
def server(comfy_models, by_peft, tmp_path_factory):
    require_comfyui()
    folder = tmp_path_factory.mktemp("loras")
    # diffusers writes the settings into the header instead.
    settings = json.dumps({"transformer.r": 4, "transformer.lora_alpha": 16})
    matrices_by_peft = load_file(by_peft[0] / "alpha" / "adapter_model.safetensors")
    for name, words in WORDS.items():
        renamed = {
            key.replace(".lora_A.weight", words[0]).replace(".lora_B.weight", words[1]): matrices_by_peft[key]
            for key in matrices_by_peft
        }
        save_file(renamed, folder / f"header_{name}.safetensors", {"lora_adapter_metadata": settings})
    for name, (text, _) in SETTINGS.items():
        save_file(tensors("und", "bare"), folder / f"settings_{name}.safetensors", {"lora_adapter_metadata": text})
    # Another trainer's file, beside the configuration of one that PEFT saved; its matrices count as they are.
    others = {name.replace("base_model.model.", "diffusion_model."): tensor for name, tensor in matrices_by_peft.items()}
    save_file(others, by_peft[0] / "alpha" / "others.safetensors")
    files = {f"{expert}_{naming}": tensors(expert, naming) for expert in EXPERTS for naming in OURS}
    files["of_7b"] = {PEFT + f"model.layers.1.self_attn.q_proj.lora_{x}.weight": torch.ones(2, 3584) for x in "AB"}
    files["of_7b"][PEFT + "model.layers.1.self_attn.q_proj.lora_B.weight"] = torch.ones(3584, 2)
    files["flat"] = {PEFT + f"model.layers.1.self_attn.q_proj.lora_{x}.weight": torch.ones(256) for x in "AB"}
    files["adalora"] = files["und_peft"] | {PEFT + f"{LAYER}self_attn.q_proj.lora_E": torch.ones(RANK, 1)}
    files["half"] = {name: tensor for name, tensor in files["und_peft"].items() if "v_proj.lora_B" not in name}
    for kind in ("hada", "lokr"):
        factors = {f"{kind}_w{x}": torch.ones(64, 64) for x in ("1_a", "1_b", "2_a", "2_b")}
        files[f"{kind}_of_7b"] = {f"lycoris_{LAYER.replace('.', '_')}self_attn_q_proj.{x}": y for x, y in factors.items()}
    files["halves"] = {
        **{f"diffusion_model.{name}": tensor for name, tensor in tensors("gen", "bare").items()},
        **{f"text_encoders.diffusion_model.{name}": tensor for name, tensor in tensors("und", "bare").items()},
    }
    strange = {"text_model.encoder.layers.0.lora_A.weight": torch.ones(2, 2)}
    # Z-Image's, which begins as a path of Lance's does.
    image = {"diffusion_model.layers.1.attention.to_q.lora_A.weight": torch.ones(2, 2)}
    files |= {"some_strange": files["und_peft"] | strange, "all_strange": strange, "z_image": image}
    (folder / "cut_off.safetensors").write_bytes(b"x" * 5)
    for name, content in files.items():
        save_file(content, folder / f"{name}.safetensors")
    placed = {f"loras/{path.name}": path for path in (*folder.iterdir(), *by_peft[0].iterdir())}
    with ComfyServer({**comfy_models, **placed}) as server:
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
        found[expert] = runtime_latents(pipe)
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
    (report,) = result.outputs["report"]["text"]
    assert report.startswith("6 of 6 tensors placed.")
    assert "Without a place" not in report
    assert ("No adapter_config.json" in report) == (OURS[naming]("x")[0].startswith(PEFT))


@pytest.mark.parametrize("strength", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("name", BY_PEFT)
def test_what_peft_saved_acts_as_in_peft(server, plain, by_peft, name, strength):
    home, merged = by_peft
    with safe_open(home / name / "adapter_model.safetensors", "pt") as file:
        count = len(list(file.keys()))
    loader = lora_node("LanceNativeLoraLoader", f"{name}/adapter_model", strength, strength)
    latents, answer, result = drawn_and_said(server, loader)
    if strength:
        assert difference(latents, merged[name][strength]) < TOLERANCE
        assert difference(latents, plain[0]) > ACTS
    else:
        assert torch.equal(latents, plain[0])
        assert answer == plain[1]
    alpha = getattr(BY_PEFT[name], "lora_alpha", None) or BY_PEFT[name].alpha
    expected = f"{count} of {count} tensors placed. Alpha is {alpha}, says adapter_config.json."
    assert result.outputs["report"]["text"] == [expected]


def test_a_configuration_is_of_what_peft_saved_alone(server, by_peft):
    latents, _, result = drawn_and_said(server, lora_node("LanceNativeLoraLoader", "alpha/others", 4.0, 4.0))
    assert difference(latents, by_peft[1]["alpha"][1.0]) < TOLERANCE  # alpha / rank is 4 there
    assert result.outputs["report"]["text"] == ["30 of 30 tensors placed."]


def test_each_half_of_a_file_goes_to_its_side(server, plain, merged):
    latents, answer, result = drawn_and_said(server, lora_node("LanceNativeLoraLoader", "halves"))
    assert difference(latents, merged["gen"]) < TOLERANCE
    assert answer == drawn_and_said(server, lora_node("LanceNativeLoraLoader", "und_bare", 0.0, 1.0))[1] != plain[1]
    assert result.outputs["report"]["text"] == ["12 of 12 tensors placed."]


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_cannot_be_read_are_named(server, name):
    graph = {**base(), "lora": lora_node("LanceNativeLoraLoader", f"settings_{name}")}
    graph["lora"]["inputs"].update(model=["load", 0], clip=["load", 1])
    graph["report"] = node("PreviewAny", source=["lora", 2])
    result = server.run(graph, check=False)
    text, said = SETTINGS[name]
    if result.error is None:
        assert result.outputs["report"]["text"] == [f"6 of 6 tensors placed. {said}".strip()]
    else:
        said = said or f"({len(text)} characters) does not say how strong"
        assert result.error["exception_message"].startswith(f"the header of settings_{name}.safetensors {said}")
        assert name in ("no_json", "no_number", "no_pattern", "list", "ia3", "pissa")


@pytest.mark.parametrize("name", WORDS)
def test_alpha_in_the_header(server, by_peft, name):
    latents, _, result = drawn_and_said(server, lora_node("LanceNativeLoraLoader", f"header_{name}"))
    assert difference(latents, by_peft[1]["alpha"][1.0]) < TOLERANCE
    said = f"30 of 30 tensors placed. Alpha is 16, says the header of header_{name}.safetensors."
    assert result.outputs["report"]["text"] == [said]


def test_half_a_pair_is_left_out(server, plain):
    latents, _, result = drawn_and_said(server, lora_node("LanceNativeLoraLoader", "half"))
    assert difference(latents, plain[0]) > ACTS
    (report,) = result.outputs["report"]["text"]
    assert report.startswith("4 of 5 tensors placed.")
    assert report.endswith(f"Without a place: {PEFT}{LAYER}self_attn.v_proj.lora_A.weight")


def test_our_loader_says_what_it_could_not_place(server, merged):
    latents, _, result = drawn_and_said(server, lora_node("LanceNativeLoraLoader", "some_strange"))
    assert difference(latents, merged["und"]) < TOLERANCE
    (report,) = result.outputs["report"]["text"]
    assert report.startswith("6 of 7 tensors placed.")
    assert report.endswith("Without a place: text_model.encoder.layers.0.lora_A.weight")
    assert report in server.log()


@pytest.mark.parametrize("name", ["all_strange", "z_image", "flat", "of_7b", "hada_of_7b", "lokr_of_7b"])
def test_a_lora_of_another_model_is_refused(server, plain, name):
    graph = {**base(), "lora": lora_node("LanceNativeLoraLoader", name)}
    graph["lora"]["inputs"].update(model=["load", 0], clip=["load", 1])
    graph["report"] = node("PreviewAny", source=["lora", 2])
    error = server.run(graph, check=False).error
    count = {"flat": 2, "of_7b": 2, "hada_of_7b": 4, "lokr_of_7b": 4}.get(name, 1)
    assert error["exception_message"].startswith(f"None of the {count} tensors of {name}.safetensors fits Lance")
    assert torch.equal(drawn_and_said(server)[0], plain[0])


def test_what_acts_in_peft_alone_is_refused_without_its_settings(server):
    graph = {**base(), "lora": lora_node("LanceNativeLoraLoader", "adalora")}
    graph["lora"]["inputs"].update(model=["load", 0], clip=["load", 1])
    graph["report"] = node("PreviewAny", source=["lora", 2])
    message = server.run(graph, check=False).error["exception_message"]
    assert message.startswith("The file says that this is ADALORA; of PEFT's kinds ComfyUI can apply 3")


def test_a_file_that_was_cut_off_is_named(server):
    graph = {**base(), "lora": lora_node("LanceNativeLoraLoader", "cut_off")}
    graph["lora"]["inputs"].update(model=["load", 0], clip=["load", 1])
    graph["report"] = node("PreviewAny", source=["lora", 2])
    message = server.run(graph, check=False).error["exception_message"]
    assert message.startswith("cut_off.safetensors (5 bytes) cannot be read: ")


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
