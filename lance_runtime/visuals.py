"""Pictures and clips -> segments of a context, and frames of a video that are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .components import Components
from .context import Segment
from .denoise import Given
from .memory import bring
from .model.vision import encode_vision
from .preprocess import fitted_pixels, to_frames, vae_pixels, vit_patches
from .types import SPATIAL_STRIDE, TEMPORAL_STRIDE, LatentShape, Modality

Encode = Callable[[Tensor], Tensor]


def source_segments(parts: Components, frames: np.ndarray, preset: str, role: Modality) -> Iterator[Segment]:
    """A source's ViT tokens, and its clean latents as edit source or subject.

    frames: uint8 (T, H, W, 3). Both streams are cut and scaled to the preset's buckets.
    """
    yield vit_segment(parts, frames, preset)
    yield Segment.latents(parts.vae.encode(vae_pixels(frames, preset)), role)


def vit_segment(parts: Components, frames: np.ndarray, preset: str) -> Segment:
    """The ViT tokens of one image or clip, uint8 (T, H, W, 3)."""
    if parts.vision is None or parts.vision_config is None:
        raise ValueError(
            f"{len(frames)} pictures are to be seen by a model without its vision tower (vit='none').\nLoad it with vit='auto'."
        )
    patches, (t, h, w) = vit_patches(frames, preset, parts.vision_config)
    merge = parts.vision_config.spatial_merge_size
    bring(parts.vision)
    embeddings = encode_vision(parts.vision, patches.to(parts.device, parts.dtype), (t, h, w))
    return Segment.vit(embeddings, LatentShape(t, h // merge, w // merge))


def encode_given(pictures: Mapping[int, Any], target: LatentShape, encode: Encode) -> Given:
    """Clean latents of given frames, {latent frame: image or 4 frames}, counted from the end where negative.

    Frames that follow each other are encoded as one clip, as the causal VAE would see them. A run that does not start
    at frame 0 is preceded by its own first picture, standing still, in the place of the frames that nobody knows yet.
    """
    frames = sorted((_index(index, target), index) for index in pictures)
    indices = [index for index, _ in frames]
    if len(set(indices)) != len(indices):
        raise ValueError(f"{len(indices)} given frames name only {len(set(indices))} latent frames.\nGive each frame once.")
    clips = {index: _clip(pictures[key], index, target) for index, key in frames}
    latents = []
    for _, run in groupby(enumerate(indices), key=lambda pair: pair[1] - pair[0]):
        members = [clips[index] for _, index in run]
        lead = [] if members[0].shape[1] == 1 else [members[0][:, :1]]
        latents.append(encode(torch.cat([*lead, *members], dim=1))[:, len(lead) :])
    return Given(indices, torch.cat(latents, dim=1)[None])


def _index(index: int, target: LatentShape) -> int:
    found = index + target.frames if index < 0 else index
    if not 0 <= found < target.frames:
        raise ValueError(
            f"Given frame {index} lies outside the {target.frames} latent frames of the target.\n"
            "Latent frame 0 is one pixel frame, each later one is four; -1 is the last."
        )
    return found


def _clip(picture: Any, index: int, target: LatentShape) -> Tensor:
    """Pixels (3, 1 or 4, H, W) of one given latent frame, at the target's size."""
    frames = to_frames(picture)
    length = 1 if index == 0 else TEMPORAL_STRIDE
    if len(frames) not in (1, length):
        raise ValueError(
            f"Given frame {index} has {len(frames)} pictures where 1 or {length} belong.\n"
            "Latent frame 0 is one pixel frame, each later one is four."
        )
    size = (target.height * SPATIAL_STRIDE, target.width * SPATIAL_STRIDE)
    return fitted_pixels(frames, size).expand(-1, length, -1, -1)
