"""Multimodal rotary embedding: each rotary frequency turns with one of the three axes t, h, w."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import LanceConfig, VisionConfig


class Rope(NamedTuple):
    """Cosines and sines (B or 1, L, 1, head_dim / 2) of every token's rotary angles."""

    cos: Tensor
    sin: Tensor

    def rotate(self, x: Tensor) -> Tensor:
        """Turn the pairs (x_i, x_{i + d/2}) of heads (B, L, H, d) by the angles; three kernels, and one tensor."""
        pairs = x.unflatten(-1, (2, -1))
        turned = pairs * self.cos[..., None, :]
        turned[..., 0, :].addcmul_(pairs[..., 1, :], self.sin, value=-1)
        turned[..., 1, :].addcmul_(pairs[..., 0, :], self.sin)
        return turned.flatten(-2)

    def at(self, index: int) -> Rope:
        """The table of one token."""
        return Rope(*(part[:, index : index + 1] for part in self))

    @classmethod
    def stack(cls, tables: Sequence[Rope], repeats: int) -> Rope:
        """One table for a batch in which each table's rows come ``repeats`` times in a row."""
        if len(tables) == 1:
            return tables[0]
        return cls(*(torch.cat(parts).repeat_interleave(repeats, dim=0) for parts in zip(*tables, strict=True)))


def rope_table(config: LanceConfig, positions: Tensor, dtype: torch.dtype) -> Rope:
    """The table of positions (3, L) or (B, 3, L), computed in float32 and then cast.

    The sections of ``mrope_section`` give the first frequencies to time, the next to rows, the last to columns
    (Qwen2.5-VL, section 2; transformers' ``apply_multimodal_rotary_pos_emb``).

    The frequencies themselves are rounded to bfloat16 where the weights have learned them so (``frequencies_are_rounded``):
    the reference's buffers take the type of its weights, in training (train/fsdp_utils.py, ``buffer_dtype``) and when it
    draws (inference_lance.py). Where MaPE puts tokens a thousand positions apart that turns fast frequencies by a radian or
    two.
    """
    positions = positions if positions.ndim == 3 else positions[None]
    frequencies = rotary_frequencies(config.rope_theta, config.head_dim)
    if frequencies_are_rounded(config, dtype, positions.device):
        frequencies = frequencies.to(torch.bfloat16).float()
    sections = torch.tensor(config.mrope_section, device=positions.device)
    axes = torch.arange(3, device=positions.device)
    axis = axes.repeat_interleave(sections, output_size=config.head_dim // 2)  # or the device would be waited for
    angles = positions.float()[:, axis].transpose(1, 2) * frequencies.to(positions.device)  # (B, L, head_dim / 2)
    return Rope(angles.cos()[:, :, None].to(dtype), angles.sin()[:, :, None].to(dtype))


def rotary_frequencies(theta: float, width: int) -> Tensor:
    """Float32 (width / 2), to the bit as transformers has them: far positions magnify the last one.

    They are on the CPU, where they can be rounded to bfloat16: not every card knows it.
    """
    return 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width)


def frequencies_are_rounded(config: LanceConfig | VisionConfig, dtype: torch.dtype, device: torch.device) -> bool:
    """For weights trained in bfloat16, whatever they are computed in; but float32 on a CPU repeats the reference in float32.

    Cards without bfloat16 compute in float32 too, but nobody compares their pictures with a float32 run.
    """
    return config.bfloat16_frequencies and (dtype == torch.bfloat16 or device.type != "cpu")
