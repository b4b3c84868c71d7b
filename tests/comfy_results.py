"""What the tests in the real ComfyUI share: latents out of its files, its noise, media in its input folder."""

from __future__ import annotations

import json
from pathlib import Path

import goldens
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

TOLERANCE = 1e-3
STATISTICS = json.loads((goldens.PARITY / "wan22_statistics.json").read_text("utf-8"))


def saved_latents(result, node: str = "latent") -> Tensor:
    """Normalised latents (B, 48, t, h, w) of a Save Latent node: ComfyUI's files hold raw ones."""
    raw = load_file(result.path(node))["latent_tensor"]
    mean, std = (torch.tensor(STATISTICS[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    return (raw - mean) / std


def comfy_noise(seed: int, *shape: int) -> Tensor:
    """Noise as KSampler draws it."""
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))[0]


def difference(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).abs().max())


def upload_media(server, folder: Path) -> dict[str, str]:
    """Every picture and clip of the goldens among ComfyUI's inputs.

    Clips are animated PNGs for Load Image: its Load Video is off by up to 2/255 even from a lossless file.
    """
    names = {path.name: server.upload_image(path) for path in (goldens.PARITY / "media").glob("*.png")}
    for path in (goldens.PARITY / "media").glob("*.npz"):
        first, *rest = (Image.fromarray(frame) for frame in goldens.clip(path.name)[0])
        animated = folder / f"{path.stem}.png"
        first.save(animated, save_all=True, append_images=rest)
        names[path.name] = server.upload_image(animated)
    return names
