"""Single nodes with pictures, frames and hooks, inside one process of ComfyUI's Python; see ``comfy_memory_runs.py``."""

# ruff: noqa: I001  (this must come before all else of ComfyUI: it tells ComfyUI of the CPU)
from __future__ import annotations

import importlib
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.append(str(Path(__file__).parent))

import comfy_memory_runs as runs
import comfy.hooks
import comfy.lora
import comfy.lora_convert
import comfy.samplers
import torch


def room(name: str) -> Any:
    return importlib.import_module(f"{runs.PACK}.nodes.{name}")


def sources(nodes: Any) -> dict:
    """Pictures of odd sizes "as is" against ComfyUI's own encoding of what is cut, and how much of a long clip is converted."""
    graph, apart, sizes = runs.Graph(nodes), {}, {}
    for height, width in ((100, 100), (97, 127), (64, 96)):
        picture = torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(1)).mul(255).round().div(255)
        found = nodes.LanceNativeVAEEncode.execute(graph.vae, picture, "as is", 24.0).result[0]["samples"]
        top, left = height % 16 // 2, width % 16 // 2
        cut = picture[:, top : top + height // 16 * 16, left : left + width // 16 * 16]
        apart[f"{height} x {width}"] = float((found - graph.vae.encode(cut).reshape(found.shape)).abs().max())
    for size in ((5, 40), (1, 1)):
        found = nodes.LanceNativeVAEEncode.execute(graph.vae, torch.rand(1, *size, 3), "as is", 24.0).result[0]["samples"]
        sizes["{} x {}".format(*size)] = list(found.shape[-2:])
    pictures, counted = room("pictures"), []
    real = pictures.bytes_of
    pictures.bytes_of = lambda images: (counted.append(len(images)), real(images))[1]
    clip = torch.linspace(0, 1, 480)[:, None, None, None].expand(-1, 8, 8, 3)
    seen = pictures.frames_of(clip, 24.0)
    pictures.bytes_of = real
    indices = pictures.sample_frames(480, 24.0)
    opened: list[None] = []
    parts = SimpleNamespace(images=graph.picture.repeat(5, 1, 1, 1), frame_rate=Fraction(12))
    video = SimpleNamespace(get_components=lambda: (opened.append(None), parts)[1])
    nodes.LanceNativeAsk.execute(graph.clip, "what", "video_192p", 2, 0.0, 1.0, 1, video=video)
    return {
        "apart": apart,
        "sizes": sizes,
        "converted": counted,
        "same": bool((seen == real(clip)[indices]).all()),
        "opened": len(opened),
    }


def starts(nodes: Any) -> dict:
    """Frames given by one node after another."""
    graph = runs.Graph(nodes)
    empty = nodes.LanceNativeEmptyLatent.execute("custom", 96, 64, 17, 0.0, 2).result[0]
    empty["batch_index"] = [4, 5]

    def start(latent: dict, middle_at: float = 0.5, **given: Any) -> dict:
        return nodes.LanceNativeVideoStart.execute(graph.vae, latent, middle_at, 9, **given).result[0]

    other = 1 - graph.picture
    once = start(empty, first=graph.picture, middle=other)
    twice = start(start(empty, first=graph.picture), middle=other)
    third = start(start(empty, 0.25, middle=graph.picture), 0.75, middle=other)
    again = start(once, first=other)
    refused = []
    for frames, given in (
        (1, {"first": other}),
        (5, {"first": other, "middle": other}),
        (5, {"first": other, "last": other}),
        (1, {"continue_from": torch.cat([other] * 9)}),
        (9, {"continue_from": torch.cat([other] * 9), "first": other}),
    ):
        short = nodes.LanceNativeEmptyLatent.execute("custom", 96, 64, frames, 0.0, 1).result[0]
        try:
            start(short, **given)
        except ValueError as error:
            refused.append(str(error).split("\n")[0])
    try:
        start(start(nodes.LanceNativeEmptyLatent.execute("custom", 96, 64, 5, 0.0, 1).result[0], first=other), last=other)
    except ValueError as error:
        refused.append(str(error).split("\n")[0])
    nine = nodes.LanceNativeEmptyLatent.execute("custom", 96, 64, 9, 0.0, 1).result[0]
    continued = start(nine, continue_from=torch.cat([other] * 20))["noise_mask"][0, 0, :, 0, 0].tolist()
    half = {**empty, "noise_mask": torch.cat([torch.ones(1, 64, 48), torch.zeros(1, 64, 48)], dim=2)}
    masked = start(half, last=other)["noise_mask"]
    return {
        "refused": refused,
        "continued": continued,
        "same": [torch.equal(once[name], twice[name]) for name in ("samples", "noise_mask")],
        "given": [one["noise_mask"][0, 0, :, 0, 0].tolist() for one in (once, third, again)],
        "batch": [list(once["samples"].shape[:1]), once["batch_index"]],
        "new first": float((again["samples"] - start(empty, first=other, middle=other)["samples"]).abs().max()),
        "a mask of another kind": [masked[0, 0, 0, 0].tolist(), float(masked[0, 0, -1].max())],
    }


def edits(nodes: Any) -> dict:
    """The latent of Lance Edit: the source, which noise covers but where a mask keeps it."""
    graph = runs.Graph(nodes)
    execute = nodes.LanceNativeEdit.execute
    context, latent = execute(graph.clip, graph.vae, "image_256res", 2, images={"image_0": graph.picture}).result
    source = nodes.LanceNativeVAEEncode.execute(graph.vae, graph.picture, "image_256res", 24.0).result[0]["samples"]
    empty = {**latent, "samples": torch.zeros_like(latent["samples"])}
    mask = torch.ones(1, 1, *latent["samples"].shape[2:])
    mask[..., : mask.shape[-1] // 2] = 0
    kept = graph.draw(context, {**latent, "noise_mask": mask})[:, :, :, :, : mask.shape[-1] // 2]
    samples = latent["samples"].clone()
    latent["samples"][0] += 1  # as a node of others may
    alone = torch.equal(latent["samples"][1], samples[1])
    latent["samples"] = samples
    return {
        "alone": alone,
        "batch": len(latent["samples"]),
        "source": float((latent["samples"] - source).abs().max()),
        "covered": float((graph.draw(context, latent) - graph.draw(context, empty)).abs().max()),
        "kept": float((kept - source[..., : mask.shape[-1] // 2]).abs().max()),
    }


def odd(nodes: Any) -> dict:
    """Questions and sources at the edge of what may be connected."""
    graph, report, pictures = runs.Graph(nodes), {}, room("pictures")
    words = nodes.LanceNativeContext.execute(graph.clip, "x2t_image", "look", "A red hat.", "").result[0]
    settings = {"resolution": "auto", "max_length": 2, "temperature": 0.0, "top_p": 1.0, "seed": 1}
    asked = nodes.LanceNativeAsk.execute(
        graph.clip, "what", images={"image_0": graph.picture}, context=words, **settings
    ).result
    report["boxes beside a context of words"] = [asked[1], list(asked[2].shape)]
    short = graph.picture.repeat(6, 1, 1, 1)
    video = SimpleNamespace(get_components=lambda: SimpleNamespace(images=short, frame_rate=Fraction(24)))
    sources = {"picture": short[:1], "frames": short, "video": video}
    report["presets"] = {name: pictures.preset_of("auto", source) for name, source in sources.items()}
    report["seen"] = [len(pictures.frames_of(source)) for source in sources.values()]
    try:
        graph.clip.generate(graph.clip.tokenize("", skip_template=True))
    except ValueError as error:
        report["said"] = str(error).split("\n")[0]
    loaded = nodes.LanceNativeLoader.execute("Lance_3B/model.safetensors", "auto", "Wan2.2_VAE.pth", "video", "float32")
    report["variant"] = loaded.result[0].clone(force_deepcopy=True).model.variant
    return report


def nowhere(nodes: Any) -> list[str]:
    """What is said of an area that lies outside, and of prompts that were averaged."""
    graph, said = runs.Graph(nodes), []
    positive = graph.clip.encode_from_tokens_scheduled(graph.clip.tokenize("a red hat"))
    other = graph.clip.encode_from_tokens_scheduled(graph.clip.tokenize("a new hat"))
    averaged = [[(positive[0][0] + other[0][0]) / 2, positive[0][1]]]
    outside = [[positive[0][0], {**positive[0][1], "area": (1, 8, 8, 0, 0, 12), "strength": 1.0}]]
    for cond in (averaged, outside):
        guider = comfy.samplers.CFGGuider(graph.model)
        guider.set_conds(cond, cond)
        zeros = torch.zeros(1, 48, 1, 8, 12)
        euler, sigmas = comfy.samplers.sampler_object("euler"), torch.linspace(1, 0, 3)
        try:
            guider.sample(zeros + 1, zeros, euler, sigmas, disable_pbar=True, seed=1)
        except ValueError as error:
            said.append(str(error).split("\n")[0])
    return said


def hooks(nodes: Any) -> dict:
    """LoRAs as hooks of CLIP, which Set CLIP Hooks puts on the conditioning: CLIP Text Encode, and our nodes."""
    graph = runs.Graph(nodes)
    stem, generator = "diffusion_model.language_model.model.layers.0.mlp_moe_gen.up_proj", torch.Generator().manual_seed(1)
    width, inner = graph.model.model.diffusion_model.language_model.model.layers[0].mlp_moe_gen.up_proj.weight.shape[::-1]
    lora = {
        f"{stem}.lora_down.weight": torch.randn(4, width, generator=generator) / 8,
        f"{stem}.lora_up.weight": torch.randn(inner, 4, generator=generator) / 8,
    }
    weights = comfy.lora_convert.convert_lora(lora)
    plain = graph.draw()
    graph.clip = graph.clip.clone()
    graph.clip.apply_hooks_to_conds = comfy.hooks.create_hook_lora(lora=weights, strength_model=1.0, strength_clip=0.0)
    made = nodes.LanceNativeConditioning.execute(graph.clip, "a red hat", "", "cached").result
    text = graph.clip.encode_from_tokens_scheduled(graph.clip.tokenize("a red hat"))
    hooked = graph.draw()
    patched = graph.model.clone()
    graph.clip.apply_hooks_to_conds = None
    key = {stem: f"{stem}.weight"}
    patched.add_patches(comfy.lora.load_lora(weights, key), 1.0)
    return {
        "on": [one[0][1].get("hooks") is text[0][1]["hooks"] for one in made],
        "acts": float((hooked - plain).abs().max()),
        "as a LoRA": float((hooked - graph.draw(model=patched)).abs().max()),
        "after": float((graph.draw() - plain).abs().max()),
    }


def cut(nodes: Any) -> dict:
    """A long prompt that ends within a character."""
    graph, understand = runs.Graph(nodes), room("understand")
    tokenizer = understand.lance_of(graph.clip).tokenizer
    ids = tokenizer.encode("A red hat \N{LARGE RED CIRCLE}")
    understand.answer_of = lambda *_: iter(ids[:-1])
    better = nodes.LanceNativeEnhancePrompt.execute(graph.clip, "hat", "image", 9, 0.0, 1.0, 1).result[0]
    return {"whole": tokenizer.decode(ids), "cut": tokenizer.decode(ids[:-1]), "shown": better}


def subjects(nodes: Any) -> list:
    """Sizes of a subject's latents: on its own, for a picture, for a video, and as asked for."""
    graph, found = runs.Graph(nodes), []
    picture, video = (nodes.LanceNativeEmptyLatent.execute("custom", 96, 64, count, 0.0, 1).result[0] for count in (1, 5))
    for resolution, latent in (("auto", None), ("auto", picture), ("auto", video), ("image_256res", video)):
        square = torch.rand(1, 64, 64, 3)
        context = nodes.LanceNativeSubject.execute(graph.clip, graph.vae, resolution, {"image_0": square}, latent).result[0]
        found.append([16 * side for side in context.segments[-1].grid[1:]])
    return found


if __name__ == "__main__":
    runs.main(globals())
