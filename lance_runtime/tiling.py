"""Large pictures in overlapping tiles, for a VAE whose activations would not fit into memory.

diffusers has tiling of its own for Wan's VAE, but not in every version that we support: 0.35 cuts Wan 2.2's patchified
pixels at half their places and sends first frames through as later ones, and 0.42 encodes in tiles twice as large as
asked for. Here all tiles are of one size, none is a sliver at the border, and where they overlap they fade.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .types import SPATIAL_STRIDE

# In latents: tiles of 512 pixels that share 128. Wan's convolutions see about 100 pixels to each side.
TILE, OVERLAP = 32, 8


def spans(length: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """Borders of the fewest equal tiles that cover a length, neighbours sharing at least ``overlap``."""
    if length <= tile:
        return [(0, length)]
    count = math.ceil((length - overlap) / (tile - overlap))
    starts = [round(index * (length - tile) / (count - 1)) for index in range(count)]
    return [(start, start + tile) for start in starts]


def encode_tiled(encode: Callable[[Tensor], Tensor], pixels: Tensor, tile: int = TILE, overlap: int = OVERLAP) -> Tensor:
    """encode, by tiles: pixels (..., H, W) -> latents (..., H / 16, W / 16). tile, overlap: in latents."""
    return _tiled(encode, pixels, tile, overlap, 1 / SPATIAL_STRIDE)


def decode_tiled(decode: Callable[[Tensor], Tensor], latents: Tensor, tile: int = TILE, overlap: int = OVERLAP) -> Tensor:
    """decode, by tiles: latents (..., h, w) -> pixels (..., 16 h, 16 w). tile, overlap: in latents."""
    return _tiled(decode, latents, tile, overlap, SPATIAL_STRIDE)


def _tiled(function: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: int, scale: float) -> Tensor:
    """scale: how much larger the result is than x."""
    unit = round(max(1, 1 / scale))  # a latent in x
    height, width = (size // unit for size in x.shape[-2:])
    rows, columns = spans(height, tile, overlap), spans(width, tile, overlap)
    if len(rows) == len(columns) == 1:
        return function(x)
    out_unit = round(unit * scale)  # a latent in the result
    total = torch.zeros(height * out_unit, width * out_unit, device=x.device)
    result = torch.zeros((), device=x.device)
    for top, bottom in rows:
        for left, right in columns:
            made = function(x[..., top * unit : bottom * unit, left * unit : right * unit])
            made = made.float()  # bfloat16 has no room for sums
            weight = _fade(top, bottom, height, overlap, out_unit)[:, None] * _fade(left, right, width, overlap, out_unit)
            if not result.ndim:  # only now is it known how many channels and frames there are
                result = made.new_zeros(*made.shape[:-2], *total.shape)
            place = (..., slice(top * out_unit, bottom * out_unit), slice(left * out_unit, right * out_unit))
            result[place] += made * weight.to(made)
            total[place] += weight.to(total)
    return result.div_(total.to(result))


def _fade(start: int, end: int, length: int, overlap: int, unit: int) -> Tensor:
    """Weights of a tile along one axis: 1, falling towards borders that another tile goes on behind."""
    weights, ramp = torch.ones((end - start) * unit), (torch.arange(overlap * unit) + 0.5) / (overlap * unit)
    if start > 0:
        weights[: len(ramp)] = ramp
    if end < length:
        weights[-len(ramp) :] = torch.minimum(weights[-len(ramp) :], ramp.flip(0))
    return weights
