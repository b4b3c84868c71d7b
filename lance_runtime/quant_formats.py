"""Quantised weights: the formats that ComfyUI reads natively, written and read, and two of the community, read.

A layer's tensors go by what follows its name: ``weight``, ``weight_scale``, ... Sources: the formats' public definitions
(OCP Microscaling 1.0 for E2M1 and E8M0, cuBLAS' documentation for the order of block scales), and ComfyUI's
QUANTIZATION.md for the names.

Scales are chosen so that a weight comes back the same everywhere. Powers of two (fp8, nvfp4, mxfp8) leave it exact in
bfloat16; int8's scales are bfloat16 numbers, so that it is rounded once. ComfyUI multiplies in the type that it computes
in, and with other scales it would round twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3_MAX, E2M1_MAX, INT8_MAX = 448.0, 6.0, 127
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E8M0_BIAS = 127
NVFP4_BLOCK, MXFP8_BLOCK = 16, 32
# Four-bit codes take several times the memory on their way: rows go in groups.
ROWS_AT_ONCE = 512
# cuBLAS reads block scales in tiles of 128 rows by 4 blocks, whose rows r, r + 32, r + 64 and r + 96 lie side by side.
TILE_ROWS, TILE_COLUMNS, TILE_LANES = 128, 4, 32

# Weights are small in memory and multiplied in the type that the model computes in. Without this, ComfyUI's kernels would
# quantise the inputs as well, fp8 with no scale at all: cut at 448, where Qwen2.5's activations reach thousands.
FULL_PRECISION: Mapping[str, Any] = MappingProxyType({"full_precision_matrix_mult": True})

Parts = Mapping[str, Tensor]


class Format(NamedTuple):
    """A way to store a weight (out, in).

    name: ComfyUI's. encode: float32 -> its parts. decode: its parts -> float32. shape: of the whole weight, from that of
    the stored one. multiple: what rows and columns must be multiples of. settings: what ComfyUI is told beside the name.
    inputs: what ComfyUI does to what is multiplied with the weight, None for nothing.
    """

    name: str
    encode: Callable[[Tensor], dict[str, Tensor]] | None
    decode: Callable[[Parts], Tensor]
    shape: Callable[[tuple[int, ...]], tuple[int, ...]] = lambda stored: stored
    multiple: int = 1
    settings: Mapping[str, Any] = FULL_PRECISION
    inputs: Callable[[Tensor], Tensor] | None = None

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == 2 and not any(size % self.multiple for size in shape)


def _power_of_two_above(x: Tensor) -> Tensor:
    """The least power of two from x up, elementwise; 1 for 0."""
    mantissa, exponent = torch.frexp(x)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    return torch.where(x > 0, torch.ldexp(torch.ones_like(x), exponent), torch.ones_like(x))


def _bfloat16_above(x: Tensor) -> Tensor:
    """The least bfloat16 from x up, elementwise (x > 0), as float32."""
    near = x.bfloat16()
    above = (near.view(torch.int16) + 1).view(torch.bfloat16)
    return torch.where(near.float() < x, above, near).float()


def encode_fp8(weight: Tensor) -> dict[str, Tensor]:
    scale = _power_of_two_above(weight.abs().amax() / E4M3_MAX)
    return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}


def decode_fp8(parts: Parts) -> Tensor:
    """float8 (out, in) times one scale (or none)."""
    values, scale = parts["weight"].float(), parts.get("weight_scale")
    return values if scale is None else values * scale.float()


def encode_int8(weight: Tensor) -> dict[str, Tensor]:
    """One scale a row: a row with large weights does not coarsen the others."""
    largest = weight.abs().amax(dim=1, keepdim=True)
    scale = _bfloat16_above((largest / INT8_MAX).clamp(min=torch.finfo(torch.bfloat16).tiny))
    return {"weight": (weight / scale).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), "weight_scale": scale}


def decode_int8(parts: Parts) -> Tensor:
    """int8 (out, in) times one scale, or one a row (out, 1)."""
    scale = parts["weight_scale"].float()
    return parts["weight"].float() * (scale[:, None] if scale.ndim == 1 and scale.numel() > 1 else scale)


def round_rows_to_int8(x: Tensor) -> Tensor:
    """Inputs (..., in) as ComfyUI multiplies them with int8 weights, whatever it is told: int8 with a scale a token."""
    scale = (x.float().abs().amax(dim=-1, keepdim=True) / INT8_MAX).clamp(min=1e-30)
    return ((x.float() / scale).round() * scale).to(x.dtype)


def encode_nvfp4(weight: Tensor) -> dict[str, Tensor]:
    """E2M1 in blocks of 16 inputs: two in a byte, the first one high; E4M3 block scales, and a scale over all."""
    whole = _power_of_two_above(weight.abs().amax() / (E4M3_MAX * E2M1_MAX))
    made = [_nvfp4_rows(rows, whole) for rows in weight.split(ROWS_AT_ONCE)]
    packed, scales = (torch.cat(parts) for parts in zip(*made, strict=True))
    tiled = tile_scales(scales).view(torch.float8_e4m3fn)
    return {"weight": packed, "weight_scale": tiled, "weight_scale_2": whole}


def _nvfp4_rows(rows: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """Packed codes and block scales, in bytes."""
    blocks = rows.unflatten(1, (-1, NVFP4_BLOCK))
    scales = (blocks.abs().amax(dim=2) / (E2M1_MAX * whole)).to(torch.float8_e4m3fn)
    divisor = (scales.float() * whole)[..., None]
    codes = _to_e2m1(torch.where(divisor > 0, blocks / divisor, 0.0)).flatten(1)
    return codes[:, 0::2] << 4 | codes[:, 1::2], scales.view(torch.uint8)


def decode_nvfp4(parts: Parts) -> Tensor:
    packed, whole = parts["weight"], parts["weight_scale_2"].float()
    stored = parts["weight_scale"].view(torch.uint8)
    scales = (
        untile_scales(stored, packed.shape[0], 2 * packed.shape[1] // NVFP4_BLOCK).view(torch.float8_e4m3fn).float() * whole
    )
    chunks = zip(packed.split(ROWS_AT_ONCE), scales.split(ROWS_AT_ONCE), strict=True)
    return torch.cat([_scaled_e2m1(torch.stack([rows >> 4, rows & 15], dim=-1), own) for rows, own in chunks])


def encode_mxfp8(weight: Tensor) -> dict[str, Tensor]:
    """E4M3 in blocks of 32 inputs, whose scales are powers of two (E8M0, kept as bytes: old torch has no such type)."""
    blocks = weight.unflatten(1, (-1, MXFP8_BLOCK))
    scales = _power_of_two_above(blocks.abs().amax(dim=2) / E4M3_MAX)
    exponents = (torch.frexp(scales).exponent - 1).clamp(-E8M0_BIAS + 1, E8M0_BIAS)
    scales = torch.ldexp(torch.ones_like(scales), exponents)
    values = (blocks / scales[..., None]).flatten(1).to(torch.float8_e4m3fn)
    return {"weight": values, "weight_scale": tile_scales((exponents + E8M0_BIAS).to(torch.uint8))}


def decode_mxfp8(parts: Parts) -> Tensor:
    values = parts["weight"].float().unflatten(1, (-1, MXFP8_BLOCK))
    stored = untile_scales(parts["weight_scale"].view(torch.uint8), *values.shape[:2])
    scales = torch.ldexp(torch.ones(stored.shape), stored.int() - E8M0_BIAS)
    # ComfyUI writes 0 for a block of zeros, and reads it as no scale at all.
    return (values * torch.where(stored > 0, scales, 0.0)[..., None]).flatten(1)


def decode_awq(parts: Parts) -> Tensor:
    """Community AWQ-INT4: (q - z) * s by groups of inputs; two q in a byte, the first one low."""
    scales, zeros = parts["scales"].float(), parts["zeros"].float()
    groups = _low_first(parts["qweight"]).float().unflatten(1, (scales.shape[1], -1))
    return ((groups - zeros[..., None]) * scales[..., None]).flatten(1)


def decode_community_nvfp4(parts: Parts) -> Tensor:
    """Community NVFP4: E2M1 (the first of two low) times a scale of 16 inputs, without one over all.

    The scale is ``scales_bf16``. Without a scale over all, small weights' scales fall below what E4M3 can say:
    ``scales_fp8`` is zero or far off for them, and is read only where it is alone.
    """
    scales = parts.get("scales_bf16")
    found = parts["scales_fp8"].view(torch.float8_e4m3fn).float() if scales is None else scales.float()
    chunks = zip(parts["qweight"].split(ROWS_AT_ONCE), found.split(ROWS_AT_ONCE), strict=True)
    return torch.cat([_scaled_e2m1(_low_first(rows), own) for rows, own in chunks])


def tile_scales(scales: Tensor) -> Tensor:
    """Block scales (rows, blocks), in bytes, in cuBLAS' order; padded with zeros to whole tiles."""
    rows, columns = scales.shape
    padded = F.pad(scales, (0, -columns % TILE_COLUMNS, 0, -rows % TILE_ROWS))
    tiles = padded.view(-1, TILE_ROWS // TILE_LANES, TILE_LANES, padded.shape[1] // TILE_COLUMNS, TILE_COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(padded.shape)


def untile_scales(stored: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of ``tile_scales``; stored is (padded rows, padded blocks), or flat."""
    height, width = rows + -rows % TILE_ROWS, columns + -columns % TILE_COLUMNS
    tiles = stored.reshape(-1, width // TILE_COLUMNS, TILE_LANES, TILE_ROWS // TILE_LANES, TILE_COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(height, width)[:rows, :columns].contiguous()


def _to_e2m1(x: Tensor) -> Tensor:
    """The nearest of E2M1's numbers as a code of 4 bits (the sign is the highest); a tie goes to the even code."""
    size = x.abs().clamp(max=E2M1_MAX)
    # Steps of 1/2 up to 2, of 1 up to 4, then of 2; codes count on from 4 and from 6.
    code = torch.where(size < 2, (2 * size).round(), torch.where(size < 4, size.round() + 2, (size / 2).round() + 4))
    return code.to(torch.uint8) + 8 * x.signbit().to(torch.uint8)


def _scaled_e2m1(codes: Tensor, scales: Tensor) -> Tensor:
    """Codes (rows, ...) in order, times scales (rows, blocks) -> float32 (rows, in)."""
    values = torch.tensor(E2M1_VALUES)
    table = torch.cat([values, -values]).to(codes.device)
    return (table[codes.flatten(1).int()].unflatten(1, (scales.shape[1], -1)) * scales[..., None]).flatten(1)


def _low_first(packed: Tensor) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)


def _twice_as_wide(stored: tuple[int, ...]) -> tuple[int, ...]:
    return (stored[0], 2 * stored[1])


# What ``quantize`` writes, by the names of the command line.
FORMATS = {
    "fp8": Format("float8_e4m3fn", encode_fp8, decode_fp8),
    "int8": Format("int8_tensorwise", encode_int8, decode_int8, settings={}, inputs=round_rows_to_int8),
    "nvfp4": Format("nvfp4", encode_nvfp4, decode_nvfp4, _twice_as_wide, NVFP4_BLOCK),
    "mxfp8": Format("mxfp8", encode_mxfp8, decode_mxfp8, multiple=MXFP8_BLOCK),
}
# What is read, by ComfyUI's names.
NATIVE = {kind.name: kind for kind in (*FORMATS.values(), Format("float8_e5m2", None, decode_fp8))}
AWQ = Format("AWQ-INT4", None, decode_awq, _twice_as_wide)
COMMUNITY_NVFP4 = Format("NVFP4 of the community", None, decode_community_nvfp4, _twice_as_wide)
