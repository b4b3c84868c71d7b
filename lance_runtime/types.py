"""Shapes, labels and the tensor layouts that every room of the runtime shares.

Layouts, by name:

* hidden states ``(B, L, D)``; attention heads ``(B, H, L, head_dim)``; rotary positions ``(3, L)`` in t, h, w order.
* latents ``(C, T, H, W)`` for one sample, ``(B, C, T, H, W)`` for a batch; their tokens run t, h, w, row by row.
* pictures ``uint8 (T, H, W, 3)`` at the border of the runtime, ``float (3, T, H, W)`` in [-1, 1] at the VAE.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from enum import IntEnum
from typing import NamedTuple

from torch import Tensor

SPATIAL_STRIDE = 16
TEMPORAL_STRIDE = 4
VIDEO_FPS = 12  # of every video that Lance sees or draws

# Unmasked attention over equal numbers of heads: q (B, H, Lq, d), k and v (B, H, Lk, d) -> (B, H, Lq, d).
AttentionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


class Modality(IntEnum):
    """What a token is, vision tokens included with their block (reference: data/dataset_base_train.py)."""

    TEMPLATE = -1
    PROMPT = 0
    TARGET = 1
    EDIT_SOURCE = 2
    SUBJECT = 3
    VIT = 4


VISUAL_CONDITIONS = (Modality.EDIT_SOURCE, Modality.SUBJECT, Modality.VIT)


class LatentShape(NamedTuple):
    """A grid of latent frames, rows and columns; one cell is one token."""

    frames: int
    height: int
    width: int

    @property
    def tokens(self) -> int:
        return self.frames * self.height * self.width

    def pixels(self) -> PixelShape:
        """The clip that decodes from this grid: the first latent frame is one frame, each later one four."""
        frames = (self.frames - 1) * TEMPORAL_STRIDE + 1
        return PixelShape(frames, self.height * SPATIAL_STRIDE, self.width * SPATIAL_STRIDE)


class PixelShape(NamedTuple):
    """Frames, height and width of a clip in pixels; an image is a clip of one frame."""

    frames: int
    height: int
    width: int

    def latent(self) -> LatentShape:
        """The grid that this clip encodes to; ``ValueError`` where a side is not a multiple of 16."""
        for name, size in (("height", self.height), ("width", self.width)):
            if size < SPATIAL_STRIDE or size % SPATIAL_STRIDE:
                near = max(SPATIAL_STRIDE, round(size / SPATIAL_STRIDE) * SPATIAL_STRIDE)
                raise ValueError(f"{name} {size} is not a positive multiple of {SPATIAL_STRIDE}.\nUse {near}.")
        if self.frames < 1:
            raise ValueError(f"{self.frames} frames cannot be generated; the least is 1.\nUse 1, 5, 9, ... frames (4k+1).")
        frames = (self.frames - 1) // TEMPORAL_STRIDE + 1
        return LatentShape(frames, self.height // SPATIAL_STRIDE, self.width // SPATIAL_STRIDE)


class TrainedSizes(NamedTuple):
    """What a model was trained on, and so what is drawn when nobody asks for a size. The defaults are Lance 3B's.

    image_preset, video_preset: the largest resolutions of ``preprocess.presets`` for sources. image, video: height and
    width in pixels. frames: of a clip by default; most_frames: the longest trained. seconds: the longest source that is
    sampled at all 12 frames a second; longer ones give as many frames, spread over all of it.
    """

    image_preset: str = "image_768res"
    video_preset: str = "video_480p"
    image: tuple[int, int] = (768, 768)
    video: tuple[int, int] = (480, 848)
    frames: int = 49
    most_frames: int = 121
    seconds: float = 6.0

    def preset(self, video: bool) -> str:
        return self.video_preset if video else self.image_preset


LANCE_3B = TrainedSizes()


def check_choice(name: str, value: object, known: Collection[str]) -> None:
    """``ValueError`` for a value that is none of the known ones."""
    if value not in known:
        raise ValueError(f"{name} {value!r} is none of the {len(known)} known ones.\nUse one of: {', '.join(known)}.")
