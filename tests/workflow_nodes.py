"""The nodes that the pack's workflows are made of, with the settings that a template opens with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from graphs import Graph, node

IMAGE_MODEL, VIDEO_MODEL, VAE = "Lance_3B.safetensors", "Lance_3B_Video.safetensors", "wan2.2_vae.safetensors"
VIT = "qwen2.5_vl_vit.safetensors"  # named where the image checkpoint looks at pictures, so that the page can offer it
NANO = "Lance Nano (built in)"


@dataclass(frozen=True)
class Workflow:
    """A template: its name for people, what to know about it, and its nodes by columns.

    sizes: [width, height] of node types that are not as large here as elsewhere.
    """

    name: str
    note: str
    columns: tuple[Graph, ...]
    sizes: Mapping[str, list[int]] = field(default_factory=dict)

    @property
    def slug(self) -> str:
        return self.name.lower().replace(" ", "_").replace(",", "")

    @property
    def graph(self) -> Graph:
        return {key: value for column in self.columns for key, value in column.items()}


def load(model: str = IMAGE_MODEL, vit: str = "auto") -> Graph:
    vae = NANO if model == NANO else VAE
    settings = {"vit_name": vit, "vae_name": vae, "variant": "auto", "weight_type": "default"}
    return {"load": node("LanceNativeLoader", model_name=model, **settings)}


def empty(size: str = "image 1:1", frames: int = 1, batch: int = 1) -> dict[str, Any]:
    """Sizes of the model that is loaded: Lance Nano's are small."""
    sizes = {"size": size, "width": 768, "height": 768, "frames": frames, "seconds": 0.0, "batch_size": batch}
    return node("LanceNativeEmptyLatent", **sizes, model=["load", 0])


def sampler(prompt: Any, latent: list, context: list | None = None, **settings: Any) -> dict[str, Any]:
    inputs = {
        "model": ["load", 0],
        "clip": ["load", 1],
        "latent": latent,
        "prompt": prompt,
        "negative_prompt": "",
        "seed": 42,
        "steps": 30,
        "cfg": 4.0,
        "shift": 3.5,
        "denoise": 1.0,
        "interval_start": 0.4,
        "interval_end": 1.0,
        "renorm": "global",
        "renorm_min": 0.0,
        "uncond_positions": "cached",
        **settings,
    }
    return node("LanceNativeSampler", **inputs, **({} if context is None else {"context": context}))


def decoded(name: str = "decode", samples: str = "sample") -> Graph:
    return {name: node("VAEDecode", samples=[samples, 0], vae=["load", 2])}


def save_image(images: str = "decode", prefix: str = "Lance") -> dict[str, Any]:
    return node("SaveImage", images=[images, 0], filename_prefix=prefix)


def compared(before: str, after: str) -> dict[str, Any]:
    """ComfyUI's slider between two pictures; the view is what the page sends for it."""
    return node("ImageCompare", image_a=[before, 0], image_b=[after, 0], compare_view={"__value__": ["", ""]})


def save_video(audio: list | None = None) -> Graph:
    """Lance's clips play at 12 frames a second."""
    sound = {} if audio is None else {"audio": audio}
    return {
        "video": node("CreateVideo", images=["decode", 0], fps=12.0, **sound),
        "save": node("SaveVideo", video=["video", 0], filename_prefix="video/Lance", format="auto", codec="auto"),
    }


def enhance(prompt: str, style: str = "image") -> dict[str, Any]:
    settings = {"max_length": 256, "temperature": 0.0, "top_p": 1.0, "seed": 42}
    return node("LanceNativeEnhancePrompt", clip=["load", 1], prompt=prompt, style=style, **settings)


def picture(key: str = "picture", file: str = "example.png") -> Graph:
    return {key: node("LoadImage", image=file)}


def clip() -> Graph:
    return {"clip": node("LoadVideo", file="example.mp4")}


def edit(**sources: list) -> dict[str, Any]:
    named = {name.replace("image_", "images.image_"): link for name, link in sources.items()}
    return node("LanceNativeEdit", clip=["load", 1], vae=["load", 2], resolution="auto", batch_size=1, **named)


def subject(**images: list) -> dict[str, Any]:
    named = {f"images.{name}": link for name, link in images.items()}
    return node("LanceNativeSubject", clip=["load", 1], vae=["load", 2], resolution="auto", latent=["empty", 0], **named)


def video_start(**given: Any) -> dict[str, Any]:
    return node("LanceNativeVideoStart", vae=["load", 2], latent=["empty", 0], middle_at=0.5, overlap=9, **given)


def ask(question: str, **sources: list) -> dict[str, Any]:
    named = {name.replace("image_", "images.image_"): link for name, link in sources.items()}
    settings = {"resolution": "auto", "max_length": 256, "temperature": 0.0, "top_p": 1.0, "seed": 42}
    return node("LanceNativeAsk", clip=["load", 1], question=question, **settings, **named)


def show(key: str = "ask") -> Graph:
    return {"show": node("PreviewAny", source=[key, 0])}
