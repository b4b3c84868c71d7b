"""Graphs in ComfyUI's API format, built of small pieces."""

from __future__ import annotations

from typing import Any

Graph = dict[str, dict[str, Any]]


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def text_to_image(
    prompt: str = "a red hat",
    negative: str = "",
    width: int = 96,
    height: int = 64,
    steps: int = 25,
    cfg: float = 4.0,
    seed: int = 7,
    model: str = "Lance_3B/model.safetensors",
) -> Graph:
    """Load Lance -> CLIP Text Encode, twice -> KSampler -> VAE Decode -> Save Image, and the latents in a file."""
    return {
        "load": loader(model),
        "positive": node("CLIPTextEncode", clip=["load", 1], text=prompt),
        "negative": node("CLIPTextEncode", clip=["load", 1], text=negative),
        "empty": node("EmptyLatentImage", width=width, height=height, batch_size=1),
        "sample": node(
            "KSampler",
            model=["load", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["empty", 0],
            seed=seed,
            steps=steps,
            cfg=cfg,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        ),
        "latent": node("SaveLatent", samples=["sample", 0], filename_prefix="latent"),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["load", 2]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="image"),
    }


def loader(model: str = "Lance_3B/model.safetensors", weight_type: str = "float32") -> dict[str, Any]:
    return node(
        "LanceNativeLoader",
        model_name=model,
        vit_name="auto",
        vae_name="Wan2.2_VAE.pth",
        variant="auto",
        weight_type=weight_type,
    )
