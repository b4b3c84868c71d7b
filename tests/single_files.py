"""The tiny checkpoint as single files with everything in their headers, under the names that the workflows use."""

from __future__ import annotations

from pathlib import Path

import torch
from goldens import CHECKPOINT, PARITY, clip
from safetensors.torch import load_file, save_file

from lance_runtime.media import write_video

METADATA = {
    "llm_config_json": "llm_config.json",
    "tokenizer_json": "tokenizer.json",
    "tokenizer_config_json": "tokenizer_config.json",
    "vocab_json": "vocab.json",
    "merges_txt": "merges.txt",
}


def write_model(folder: Path, checkpoint: str) -> Path:
    """``<checkpoint>.safetensors`` with configuration and tokenizer in its metadata."""
    source, target = CHECKPOINT / checkpoint, folder / f"{checkpoint}.safetensors"
    metadata = {key: (source / name).read_text("utf-8") for key, name in METADATA.items()}
    save_file(load_file(source / "model.safetensors"), target, metadata=metadata)
    return target


def write_vit(folder: Path) -> Path:
    source, target = CHECKPOINT / "Qwen2.5-VL-ViT", folder / "qwen2.5_vl_vit.safetensors"
    save_file(load_file(source / "vit.safetensors"), target, metadata={"config": (source / "config.json").read_text("utf-8")})
    return target


def write_vae(folder: Path) -> Path:
    state = torch.load(CHECKPOINT / "Wan2.2_VAE.pth", weights_only=True)
    target = folder / "wan2.2_vae.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, target)
    return target


def template_models(folder: Path) -> dict[str, Path]:
    """What ComfyUI finds under models/ with these files."""
    models = {f"diffusion_models/{name}.safetensors": write_model(folder, name) for name in ("Lance_3B", "Lance_3B_Video")}
    models["text_encoders/qwen2.5_vl_vit.safetensors"] = write_vit(folder)
    models["vae/wan2.2_vae.safetensors"] = write_vae(folder)
    return models


def example_media(folder: Path) -> list[Path]:
    """The picture and the clip that the workflows name."""
    picture = folder / "example.png"
    picture.write_bytes((PARITY / "media" / "wide.png").read_bytes())
    frames, fps = clip("clip8.npz")
    write_video(folder / "example.mp4", frames, round(fps))
    return [picture, folder / "example.mp4"]
