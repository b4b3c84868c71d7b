"""ComfyUI's nodes that change a MODEL, keep it or train it: each acts on Lance, and leaves nothing behind."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from comfy_results import TOLERANCE, comfy_noise, difference
from goldens import CHECKPOINT
from graphs import empty, loader, node
from sampler_graphs import CFG, NEGATIVE, PROMPT, SEED, STEPS, base, ksampler, latents, with_patch

from lance_runtime import Guidance, LancePipeline
from lance_runtime.checkpoint import TensorFile, guess_variant, has_own_vit
from lance_runtime.dequantize import plain_vit_tensors

pytestmark = pytest.mark.comfy
ACTS, EXACT = 1e-3, 1e-5
SKIP = {"scale": 3.0, "start_percent": 0.0, "end_percent": 1.0, "rescaling_scale": 0.0}
GUIDED = {
    "APG": node("APG", eta=0.5, norm_threshold=1.0, momentum=0.0),
    "CFGZeroStar": node("CFGZeroStar"),
    "NAGuidance": node("NAGuidance", nag_scale=5.0, nag_alpha=0.5, nag_tau=2.5),
    "SkipLayerGuidanceDiT": node("SkipLayerGuidanceDiT", double_layers="1", single_layers="", **SKIP),
}


def cache(class_type, threshold):
    return node(class_type, reuse_threshold=threshold, start_percent=0.1, end_percent=0.95, verbose=False)


@pytest.fixture(scope="module")
def saved(comfy_server):
    """The folder where ComfyUI's nodes save models, which it also loads from, with the files that stand beside Lance's."""
    folder = comfy_server.base / "output" / "diffusion_models"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("llm_config.json", "tokenizer.json"):
        shutil.copy(CHECKPOINT / "Lance_3B" / name, folder)
    return folder


@pytest.mark.parametrize("name", GUIDED)
@pytest.mark.parametrize("negative", ["", NEGATIVE], ids=["no_negative", "negative"])
def test_guidance_of_other_kinds(comfy_server, name, negative):
    plain, patched, again = (
        latents(comfy_server, with_patch(patch, base(negative=negative))) for patch in (None, GUIDED[name], None)
    )
    assert patched.isfinite().all()
    assert difference(patched, plain) > ACTS
    assert torch.equal(again, plain)


def test_nag_steers_without_cfg(comfy_server):
    nag = GUIDED["NAGuidance"]
    plain, one, other = (
        latents(comfy_server, with_patch(patch, base(negative=text), cfg=1.0))
        for patch, text in ((None, NEGATIVE), (nag, NEGATIVE), (nag, "a car on a snowy road"))
    )
    assert difference(one, plain) > ACTS
    assert difference(one, other) > ACTS


@pytest.mark.parametrize("class_type", ["EasyCache", "LazyCache"])
def test_caches_skip_steps(comfy_server, class_type):
    plain, cached, again = (
        latents(comfy_server, with_patch(patch, steps=20)) for patch in (None, cache(class_type, 0.3), None)
    )
    skipped = re.findall(class_type + r" - skipped (\d+)/20 steps", comfy_server.log())
    assert int(skipped[-1]) > 2
    assert cached.isfinite().all()
    assert difference(cached, plain) > ACTS
    # The steps that are left out must not carry the picture away.
    assert float((cached - plain).norm() / plain.norm()) < 0.2
    assert torch.equal(again, plain)


def windows(length=2, overlap=1):
    inputs = {"context_length": length, "context_overlap": overlap, "context_schedule": "standard_static", "context_stride": 1}
    fusing = {"closed_loop": False, "fuse_method": "pyramid", "dim": 2, "freenoise": False, "split_conds_to_windows": False}
    kept = {"cond_retain_index_list": "", "latent_retain_index_list": "", "causal_window_fix": True}
    return node("ContextWindowsManual", **inputs, **fusing, **kept)


@pytest.mark.parametrize("given", [False, True])
def test_context_windows_of_a_video(comfy_server, tmp_path, given):
    start = {**base(), "empty": empty(96, 64, 17)}
    if given:
        start["pixels"] = node("EmptyImage", width=96, height=64, batch_size=1, color=0x2060A0)
        settings = {"middle_at": 0.5, "overlap": 9, "latent": ["size", 0], "first": ["pixels", 0]}
        start["size"], start["empty"] = start["empty"], node("LanceNativeVideoStart", vae=["load", 2], **settings)

    def draw(patch):
        graph = with_patch(patch, start)
        # A latent that is not empty must not be multiplied: the seed keeps the graphs apart.
        graph["fresh"] = start["empty"] if given else graph["fresh"]
        return latents(comfy_server, graph)

    plain, patched = draw(None), draw(windows())
    assert comfy_server.log().count("Context window 4/4: frames 3-4 of 5") >= STEPS
    assert patched.isfinite().all()
    assert difference(patched, plain) > ACTS
    if given:
        assert difference(patched[:, :, 0], plain[:, :, 0]) < EXACT
    else:
        assert torch.equal(draw(None), plain)


def test_torch_compile(comfy_server):
    plain, compiled, again = (
        latents(comfy_server, with_patch(patch, steps=2))
        for patch in (None, node("TorchCompileModel", backend="inductor"), None)
    )
    assert difference(compiled, plain) < TOLERANCE
    assert torch.equal(again, plain)


def of_runtime(*shares):
    """The runtime's latents with weights that are a sum of shares of (checkpoint, share)."""
    pipes = [(LancePipeline.from_pretrained(CHECKPOINT, v, device="cpu", dtype=torch.float32), share) for v, share in shares]
    pipe = pipes[0][0]
    for name, weight in pipe.components.model.named_parameters():
        weight.data = sum(other.components.model.get_parameter(name).data * share for other, share in pipes)
    guidance = Guidance(CFG, (0.0, 1.0), "none", uncond_positions="dense")
    noise = comfy_noise(SEED, 48, 1, 4, 6)
    return pipe("t2i", PROMPT, height=64, width=96, steps=STEPS, noise=noise, guidance=guidance).latents


def merge(ratio):
    return {
        "other": loader("Lance_3B_Video"),
        "patch": node("ModelMergeSimple", model1=["load", 0], model2=["other", 0], ratio=ratio),
    }


def test_merge_of_two_checkpoints(comfy_server):
    plain, merged, whole, again = (
        latents(
            comfy_server, {**with_patch(), **({} if ratio is None else {**merge(ratio), "sample": ksampler("patch", "fresh")})}
        )
        for ratio in (None, 0.75, 1.0, None)
    )
    assert difference(merged[0], of_runtime(("image", 0.75), ("video", 0.25))) < TOLERANCE
    assert difference(merged, plain) > ACTS
    assert difference(whole, plain) < EXACT
    assert torch.equal(again, plain)


@pytest.mark.parametrize("class_type", ["ModelSave", "CheckpointSave"])
def test_a_saved_model_loads_again(comfy_server, saved, class_type):
    links = {"model": ["patch", 0]} | ({"clip": ["load", 1], "vae": ["load", 2]} if class_type == "CheckpointSave" else {})
    save = node(class_type, filename_prefix=f"diffusion_models/{class_type}", **links)
    graph = {**base(), **merge(0.5), "save": save, "sample": ksampler("patch")}
    before = latents(comfy_server, graph)
    graph = {**base(), "sample": ksampler()}
    graph["load"]["inputs"]["model_name"] = f"{class_type}_00001_.safetensors"
    assert difference(latents(comfy_server, graph), before) < EXACT


@pytest.mark.parametrize("class_type", ["ModelSave", "CheckpointSave"])
def test_a_saved_video_model_keeps_its_vision_tower(comfy_server, saved, class_type):
    graph = base()
    graph["load"]["inputs"]["model_name"] = "Lance_3B_Video/model.safetensors"
    links = {"model": ["load", 0]} | ({"clip": ["load", 1], "vae": ["load", 2]} if class_type == "CheckpointSave" else {})
    graph["save"] = node(class_type, filename_prefix=f"diffusion_models/{class_type}_video", **links)
    comfy_server.run(graph)
    (path,) = comfy_server.base.rglob(f"{class_type}_video*.safetensors")
    files = (path, CHECKPOINT / "Lance_3B_Video" / "model.safetensors")
    found, expected = (plain_vit_tensors(TensorFile(file)) for file in files)
    assert has_own_vit(found.file)
    assert guess_variant(found.file) == "video"
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def training(latents, **numbers):
    """Train LoRA in float32, on a latent and "positive"."""
    fixed = {"grad_accumulation_steps": 1, "existing_lora": "[None]", "bucket_mode": False, "bypass_mode": False}
    types = {"training_dtype": "fp32", "lora_dtype": "fp32", "quantized_backward": False, "algorithm": "LoRA"}
    how = {"optimizer": "AdamW", "loss_function": "MSE", "offloading": False, "learning_rate": 0.02, "seed": 1}
    links = {"model": ["load", 0], "latents": latents, "positive": ["positive", 0]}
    few = {"batch_size": 1, "steps": 2, "rank": 2, "checkpoint_depth": 1, "gradient_checkpointing": False}
    return node("TrainLoraNode", **links, **fixed, **types, **how, **{**few, **numbers})


def losses(server, graph):
    result = server.run({**graph, "losses": node("PreviewAny", source=["train", 1])})
    return json.loads(result.outputs["losses"]["text"][0])["loss"]


@pytest.mark.parametrize("depth", [1, 4])
def test_training_with_gradient_checkpointing(comfy_server, depth):
    """Depth 4 runs each decoder layer a second time, when the cache of the context has gone on."""
    train = training(["first", 0], checkpoint_depth=depth, gradient_checkpointing=True)
    found = losses(comfy_server, {**base(), "first": ksampler(seed=1), "train": train})
    assert len(found) == 2
    assert all(loss > 0 for loss in found)


def test_training_on_an_edit(comfy_server):
    """What the nodes have read of pictures are tensors of inference mode."""
    seen = {"clip": ["load", 1], "vae": ["load", 2], "images.image_0": ["picture", 0]}
    said = {"clip": ["load", 1], "context": ["edit", 0], "prompt": "a red hat", "negative_prompt": ""}
    graph = {
        **base(),
        "picture": node("EmptyImage", width=96, height=64, batch_size=1, color=0xFF8800),
        "edit": node("LanceNativeEdit", **seen, resolution="image_256res", batch_size=1),
        "positive": node("LanceNativeConditioning", **said, uncond_positions="cached"),
    }
    found = losses(comfy_server, {**graph, "train": training(["edit", 1])})
    assert len(found) == 2
    assert all(loss > 0 for loss in found)


def test_a_saved_clip_is_the_whole_model(comfy_server):
    graph = {**base(), "sample": ksampler(seed=71)}
    save = node("CLIPSave", clip=["load", 1], filename_prefix="diffusion_models/CLIPSave")
    before = latents(comfy_server, {**graph, "save": save})
    graph["load"]["inputs"]["model_name"] = "CLIPSave_00001_.safetensors"
    assert difference(latents(comfy_server, graph), before) < EXACT


def test_training_a_lora(comfy_server, saved):
    start = {**base(batch=4), "first": ksampler(seed=1)}
    train = training(["first", 0], batch_size=4, steps=200, rank=8)
    keep = node("SaveLoRA", lora=["train", 0], prefix="loras/trained", steps=["train", 2])
    plain = latents(comfy_server, with_patch())
    found = losses(comfy_server, {**start, "train": train, "keep": keep})
    # Each step draws a noise level of its own, and losses differ with it: only many together tell.
    assert sum(found[-80:]) < 0.95 * sum(found[:80])
    assert torch.equal(latents(comfy_server, with_patch()), plain)
    lora = node("LoraLoaderModelOnly", lora_name="trained_200_steps_00001_.safetensors", strength_model=1.0)
    assert difference(latents(comfy_server, with_patch(lora)), plain) > ACTS
