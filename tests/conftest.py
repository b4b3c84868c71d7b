"""Fixtures: the tiny checkpoint, its pipelines, and the reference's goldens."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Appended: the pack's nodes/ must never stand before ComfyUI's own nodes.py.
sys.path.append(str(ROOT))

from goldens import CHECKPOINT  # noqa: E402

from lance_runtime import LancePipeline  # noqa: E402

pytest_plugins = ["comfy_fixtures"]


@cache
def _load(variant: str) -> LancePipeline:
    import torch

    return LancePipeline.from_pretrained(CHECKPOINT, variant, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="session")
def load_pipeline() -> Callable[[str], LancePipeline]:
    """The tiny checkpoint's pipeline of a variant, float32 on the CPU."""
    return _load


@pytest.fixture(scope="session")
def image_pipe() -> LancePipeline:
    return _load("image")


@pytest.fixture(scope="session")
def video_pipe() -> LancePipeline:
    return _load("video")


@pytest.fixture(scope="session")
def comfy_models() -> dict[str, Path]:
    """The tiny checkpoint in ComfyUI's own model folders."""
    models = {
        f"diffusion_models/{folder}/{path.name}": path
        for folder in ("Lance_3B", "Lance_3B_Video")
        for path in (CHECKPOINT / folder).iterdir()
    }
    models["text_encoders/Qwen2.5-VL-ViT/vit.safetensors"] = CHECKPOINT / "Qwen2.5-VL-ViT" / "vit.safetensors"
    models["text_encoders/Qwen2.5-VL-ViT/config.json"] = CHECKPOINT / "Qwen2.5-VL-ViT" / "config.json"
    models["vae/Wan2.2_VAE.pth"] = CHECKPOINT / "Wan2.2_VAE.pth"
    return models
