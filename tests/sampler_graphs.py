"""Text to image as graphs that differ in one thing: what samples, with what, on which MODEL."""

from __future__ import annotations

from itertools import count
from typing import Any

import torch
from comfy_results import saved_latents
from graphs import Graph, loader, node
from torch import Tensor

SEED, STEPS, CFG, SHIFT = 7, 5, 4.0, 3.5
PROMPT, NEGATIVE = "a red hat", "the dog in the park makes the car red"
_numbers = count(1)


def base(prompt: str = PROMPT, negative: str = "", width: int = 96, height: int = 64, batch: int = 1) -> Graph:
    """All that stands before a sampler: "load", "positive", "negative" and "empty"."""
    return {
        "load": loader(),
        "positive": node("CLIPTextEncode", clip=["load", 1], text=prompt),
        "negative": node("CLIPTextEncode", clip=["load", 1], text=negative),
        "empty": node("EmptyLatentImage", width=width, height=height, batch_size=batch),
    }


def ends(model: str = "load") -> dict[str, Any]:
    """A sampler's links to MODEL and conditionings."""
    return {"model": [model, 0], "positive": ["positive", 0], "negative": ["negative", 0]}


def ksampler(model: str = "load", latent: str = "empty", **settings: Any) -> dict[str, Any]:
    chosen = {"seed": SEED, "steps": STEPS, "cfg": CFG, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    return node("KSampler", **ends(model), latent_image=[latent, 0], **{**chosen, **settings})


def with_patch(patch: dict[str, Any] | None = None, start: Graph | None = None, **settings: Any) -> Graph:
    """KSampler behind the loader, or behind one node that takes its MODEL. Each graph samples anew, whatever was cached."""
    graph = {**(start or base()), "fresh": fresh()}
    if patch is not None:
        graph["patch"] = {**patch, "inputs": {"model": ["load", 0], **patch["inputs"]}}
    return {**graph, "sample": ksampler("patch" if patch else "load", "fresh", **settings)}


def fresh(latent: str = "empty") -> dict[str, Any]:
    """The latent as it is, through a node that no earlier graph had: ComfyUI's cache does not know what comes behind."""
    return node("LatentMultiply", samples=[latent, 0], multiplier=next(_numbers) / 100)


def latents(server: Any, graph: Graph, *names: str) -> Tensor:
    """Run a graph; normalised latents (B, 48, t, h, w) of its "sample", or of several nodes one behind another in axis 0."""
    names = names or ("sample",)
    saves = {f"latent_{name}": node("SaveLatent", samples=[name, 0], filename_prefix="latent") for name in names}
    result = server.run({**graph, **saves})
    return torch.cat([saved_latents(result, name) for name in saves])
