"""The tiny checkpoint as single files with everything in their headers, under the names that the workflows use."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from goldens import CHECKPOINT
from nano.tasks import frames
from nano.world import BIG, PLAIN, Clip, Scene, Thing, render
from PIL import Image
from safetensors.torch import load_file, save_file

from lance_runtime.media import write_video

FPS = 12
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
    """The picture and the clip that the workflows name, of Nano's world: other models see plain shapes."""
    scene = Scene((Thing("star", "red", BIG, 30, 48), Thing("circle", "blue", PLAIN, 70, 48)), "white")
    picture, video = folder / "example.png", folder / "example.mp4"
    Image.fromarray(_lying(render(scene), 8)).save(picture)
    moving = frames(Clip(Thing("circle", "red"), "gray", "right"))
    write_video(video, np.stack([_lying(frame, 4) for frame in moving]), FPS)
    return [picture, video]


def _lying(frame: np.ndarray, times: int) -> np.ndarray:
    """The middle of a square frame, 3:2 and larger."""
    edge = len(frame) // 6
    middle = Image.fromarray(frame[edge:-edge])
    return np.asarray(middle.resize((middle.width * times, middle.height * times), Image.Resampling.LANCZOS))
