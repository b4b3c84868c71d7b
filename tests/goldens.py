"""The reference's goldens: cases, their inputs as arguments of the pipeline, and their tensors."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from lance_runtime import Guidance
from lance_runtime.preprocess import sample_frames, to_frames
from lance_runtime.prompts import UNDERSTANDING_TASKS

PARITY = Path(__file__).parent / "data" / "parity"
CHECKPOINT = PARITY / "checkpoint"
CASES: dict[str, dict] = json.loads((PARITY / "cases.json").read_text("utf-8"))
DRAWN = [name for name, case in CASES.items() if case["task"] not in UNDERSTANDING_TASKS]
ANSWERED = [name for name in CASES if name not in DRAWN]
VARIANTS = {"Lance_3B": "image", "Lance_3B_Video": "video"}


@cache
def tensors(name: str) -> dict[str, Tensor]:
    return load_file(PARITY / "cases" / f"{name}.safetensors")


def variant(name: str) -> str:
    return VARIANTS[CASES[name]["checkpoint"]]


def image(name: str) -> Image.Image:
    return Image.open(PARITY / "media" / name)


def clip(name: str) -> tuple[np.ndarray, float]:
    stored = np.load(PARITY / "media" / name)
    return stored["frames"], float(stored["fps"])


def arguments(name: str) -> dict[str, Any]:
    """A case as keyword arguments of ``LancePipeline.__call__``."""
    case, settings = CASES[name], dict(CASES[name]["settings"])
    found: dict[str, Any] = {"task": case["task"], "images": [image(file) for file in case.get("images", [])]}
    found.update({key: case[key] for key in ("prompt", "instruction", "question") if key in case})
    if "video" in case:
        found["video"], found["fps"] = clip(case["video"])
    if "cfg" in settings:
        found["guidance"] = Guidance(
            scale=settings.pop("cfg"),
            interval=tuple(settings.pop("cfg_interval")),
            renorm=settings.pop("cfg_renorm"),
            renorm_min=settings.pop("cfg_renorm_min"),
            uncond_positions=settings.pop("uncond_positions"),
        )
    return found | settings


def tensors_of(case: dict) -> dict[str, Tensor]:
    return tensors(next(name for name, known in CASES.items() if known is case))


def sources(case: dict) -> list[np.ndarray]:
    """The inputs of a case as frames, in order."""
    visuals = [to_frames(image(name)) for name in case.get("images", [])]
    if "video" in case:
        frames, fps = clip(case["video"])
        frames = to_frames(frames)
        visuals.append(frames[sample_frames(len(frames), fps)])
    return visuals
