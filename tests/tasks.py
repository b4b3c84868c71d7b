"""The nine tasks as the smallest calls that the tiny checkpoint can serve."""

from __future__ import annotations

from typing import Any

import goldens

from lance_runtime import Guidance
from lance_runtime.prompts import GENERATION_TASKS, UNDERSTANDING_TASKS, VIDEO_TASKS

IMAGE, VIDEO = "image_256res", "video_192p"
EVERYWHERE = Guidance(interval=(0.0, 1.0))


def variant(task: str) -> str:
    return "video" if task in VIDEO_TASKS else "image"


def clip() -> dict[str, Any]:
    """Five frames at 12 a second: two latent frames."""
    return {"video": goldens.clip("clip24.npz")[0][:6], "fps": 12.0}


def arguments(task: str) -> dict[str, Any]:
    """Keyword arguments of ``LancePipeline.__call__``."""
    own = {
        "t2i": {"height": 48, "width": 64},
        "t2v": {"height": 32, "width": 48, "num_frames": 9},
        "i2v": {"images": [goldens.image("wide.png")], "resolution": VIDEO, "num_frames": 5},
        "image_edit": {"images": [goldens.image("wide.png")], "resolution": IMAGE},
        "video_edit": {**clip(), "resolution": VIDEO},
        "subject_image": {
            "images": [goldens.image("square.png"), goldens.image("wide.png")],
            "resolution": IMAGE,
            "height": 32,
            "width": 64,
        },
        "subject_video": {
            "images": [goldens.image("tall.png")],
            "resolution": VIDEO,
            "height": 32,
            "width": 48,
            "num_frames": 5,
        },
        "x2t_image": {"images": [goldens.image("wide.png")], "resolution": IMAGE, "question": "What color is the car?"},
        "x2t_video": {**clip(), "resolution": VIDEO, "question": "Where does the car go?"},
    }[task]
    if task in UNDERSTANDING_TASKS:
        return {"task": task, "max_new_tokens": 5, **own}
    return {"task": task, "prompt": "the dog in the park", "steps": 2, "guidance": EVERYWHERE, **own}


__all__ = ["GENERATION_TASKS", "UNDERSTANDING_TASKS", "Guidance"]
