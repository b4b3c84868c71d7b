"""Rotary positions of a sequence: Qwen2.5-VL's rope index, then Lance's modality-aware shifts (MaPE)."""

from __future__ import annotations

import torch
from torch import Tensor

from .types import LatentShape, Modality

TOKENS_PER_SECOND = 2
# First temporal position of each shifted modality (paper section on MaPE; reference: data/common.py, shift_position_ids).
MAPE_FIRST_POSITION = {Modality.VIT: 1000, Modality.SUBJECT: 2000}


def text_positions(start: int, length: int) -> Tensor:
    """Positions (3, length) of text: t = h = w, counting up from ``start``."""
    return torch.arange(start, start + length).expand(3, -1)


def visual_positions(start: int, grid: LatentShape) -> Tensor:
    """Positions (3, tokens + 2) of a visual whose ``<|vision_start|>`` stands at ``start``.

    The axes count from ``start + 1``, two a frame in time; ``<|vision_end|>`` follows the largest of them.
    """
    t, h, w = (torch.arange(size) for size in grid)
    inner = torch.stack(torch.meshgrid(t * TOKENS_PER_SECOND, h, w, indexing="ij")).flatten(1)
    inner = inner + start + 1
    end = int(inner.max()) + 1
    return torch.cat([text_positions(start, 1), inner, text_positions(end, 1)], dim=1)


def apply_mape(positions: Tensor, modality: Tensor) -> Tensor:
    """Shift the visual conditions in time and lay the target over its edit source.

    positions (3, L) and modality (L) of the whole sequence -> new positions (3, L). ViT tokens start at 1000 in time
    and subject references at 2000; edit sources stay, and where they are as many as the target's tokens, the target
    takes their positions on all three axes.
    """
    positions = positions.clone()
    for label, first in MAPE_FIRST_POSITION.items():
        block = modality == label
        if block.any():
            positions[0, block] += first - positions[0, block][0]
    source, target = modality == Modality.EDIT_SOURCE, modality == Modality.TARGET
    if source.any() and source.sum() == target.sum():
        positions[:, target] = positions[:, source]
    return positions
