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
