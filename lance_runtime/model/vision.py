"""Qwen2.5-VL's vision tower as transformers has it, with an attention that never builds an L x L mask."""

from __future__ import annotations

from dataclasses import asdict
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..config import VisionConfig
from ..types import AttentionFunction
from .attention import sdpa, without_cudnn_attention
from .rope import frequencies_are_rounded, rotary_frequencies

ROPE_THETA = 10000.0
# Tokens that pass the attention's inner part and the MLP at once. More do not make a pass faster, and a clip's 65 000
# would take 2.9 GB of temporary values (6 s at 480p, bfloat16).
TOKENS_AT_ONCE = 16384


def build_vision(
    config: VisionConfig,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "meta",
    attention: AttentionFunction = sdpa,
) -> Any:
    """transformers' ``Qwen2_5_VisionTransformerPretrainedModel``, frozen and without weights.

    It is built on the meta device, so nothing is initialised; on any other ``device`` its memory is then allocated but
    not filled. Load with ``load_state_dict(tensors, strict=True, assign=True)`` (keys without a prefix, as in
    ``Qwen2.5-VL-ViT/vit.safetensors``). ``attention`` gets q, k and v (B, heads, L, head_dim) and no mask.
    """
    # Here and not above: transformers takes seconds to import, and text-only tasks do without it.
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    # The released config asks for flash_attention_2, which most machines lack.
    settings = Qwen2_5_VLVisionConfig(**_settings(config))
    with torch.device("meta"):
        vision: Any = Qwen2_5_VisionTransformerPretrainedModel(settings)
    vision.patch_embed.proj = PatchProjection(vision.patch_embed.proj)
    vision.rotary_pos_emb = RotaryAngles(config)
    segments = Segments()
    for block in vision.blocks:
        block.attn = SegmentAttention(block.attn.qkv, block.attn.proj, config.num_heads, segments, attention)
        block.mlp = GroupedMLP(block.mlp)
    vision = vision.to(dtype).train(False).requires_grad_(False)
    if torch.device(device).type != "meta":
        vision.to_empty(device=device)
    return vision


def _settings(config: VisionConfig) -> dict[str, Any]:
    """The fields of transformers' configuration, which are ours by the same names."""
    known = asdict(config) | {"attn_implementation": "sdpa", "fullatt_block_indexes": list(config.fullatt_block_indexes)}
    del known["bfloat16_frequencies"]
    return known


@without_cudnn_attention()  # borders and clips of all sizes
def encode_vision(vision: Any, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Patches (N, 1176) of one picture or clip -> merged tokens (N / 4, hidden), in the module's dtype.

    ``patches`` and ``grid`` (t, h, w, in patches) come from ``preprocess.vit_patches``, on the device where the module
    runs. ``ValueError`` where they do not fit each other.
    """
    merge, (frames, height, width) = vision.config.spatial_merge_size, grid
    if frames * height * width != len(patches) or height % merge or width % merge:
        raise ValueError(
            f"{len(patches)} patches do not fill a grid of {frames} x {height} x {width} in blocks of {merge} x {merge}.\n"
            "Pass patches and grid as preprocess.vit_patches returned them."
        )
    vision.rotary_pos_emb.set_type(patches.dtype, patches.device)
    result = vision(patches, grid_thw=torch.tensor([grid], device=patches.device))
    # transformers 4 returns the merged tokens themselves, 5 an object that also holds the unmerged.
    return result if isinstance(result, Tensor) else result.pooler_output


class RotaryAngles(nn.Module):
    """Stands in for ``rotary_pos_emb``, whose frequencies are a buffer that no file holds; these are made when asked for.

    Where weights have learned it so (``frequencies_are_rounded``), angles are rounded to bfloat16 as well: the reference's
    buffer takes the type of its weights, and the positions take the buffer's (modeling/vit/qwen2_5_vl_vit.py). At 48
    patches that turns a pair by up to an eighth of a radian, at 72 by a quarter.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config, self.rounded, self.dtype = config, False, torch.float32

    def set_type(self, dtype: torch.dtype, device: torch.device) -> None:
        """For a pass that computes in this type on this device."""
        self.rounded = frequencies_are_rounded(self.config, dtype, device)
        self.dtype = torch.bfloat16 if self.rounded and dtype == torch.bfloat16 else torch.float32

    def forward(self, *asked: Any) -> Any:
        """What each transformers asks for. (d is the head's dimension; a quarter of it each for rows and columns, twice.)

        Before 5.10: how many -> the angles (n, d / 4) of the first n positions. Then: positions (N, 2) -> angles (N, d / 2).
        From 5.17: hidden states and positions (N, 2) -> cosines and sines (N, d).
        """
        positions = asked[-1]
        if len(asked) == 2:
            angles = self._angles(positions)
            angles = torch.cat((angles, angles), dim=-1)
            return angles.cos(), angles.sin()
        return self._angles(positions if positions.ndim else torch.arange(int(positions), device=positions.device))

    def _angles(self, positions: Tensor) -> Tensor:
        frequencies = rotary_frequencies(ROPE_THETA, self.config.hidden_size // self.config.num_heads // 2)
        kind = torch.bfloat16 if self.rounded else torch.float32
        angles = positions.to("cpu", kind).unsqueeze(-1) * frequencies.to(kind)  # there, as the frequencies
        return angles.flatten(1).to(positions.device, self.dtype)


class Segments:
    """Segments by their borders, read once a pass: reading them in every block would wait for the device each time."""

    def __init__(self) -> None:
        self._found: Any = WeakTensorKeyDictionary()

    def __len__(self) -> int:
        return len(self._found)

    def of(self, borders: Tensor) -> list[tuple[int, Tensor]]:
        """borders (S + 1) -> the length and the tokens of segments of one length, some at a time."""
        if borders not in self._found:
            starts: dict[int, list[int]] = {}
            for start, end in pairwise(borders.tolist()):
                starts.setdefault(end - start, []).append(start)
            self._found[borders] = [
                (length, (group.unsqueeze(1) + torch.arange(length)).flatten().to(borders.device))
                for length, equal in starts.items()
                for group in torch.tensor(equal).split(max(1, TOKENS_AT_ONCE // length))
            ]
        return self._found[borders]


class SegmentAttention(nn.Module):
    """Stands in for the ``attn`` of a transformers vision block, with the same weights under the same names.

    Tokens attend within their segment (a window or a frame). transformers 4 masks a full L x L attention for that (33 GB
    for a 10 s clip), 5 runs the segments one by one; here all segments of one length are one batch.
    """

    def __init__(
        self, qkv: nn.Module, proj: nn.Module, num_heads: int, segments: Segments, attention: AttentionFunction = sdpa
    ) -> None:
        super().__init__()
        self.qkv, self.proj, self.num_heads, self.segments, self.attention = qkv, proj, num_heads, segments, attention

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **_: Any,
    ) -> Tensor:
        """(L, hidden) -> (L, hidden), by the borders ``cu_seqlens`` (S + 1) of S segments.

        ``position_embeddings`` are the cosines and sines (L, head_dim). What some transformers releases pass besides
        (``rotary_pos_emb``, ``max_seqlen``) is redundant and ignored.
        """
        if position_embeddings is None:
            raise ValueError("the vision block passed no position_embeddings.\nUse transformers 4.50.3 or later.")
        qkv = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1))
        return self.proj(_attend(qkv, position_embeddings, self.segments.of(cu_seqlens), self.attention).flatten(1))


class PatchProjection(nn.Module):
    """Stands in for the convolution over patches that do not overlap, with the same weight: one matrix product.

    torch's ``Conv3d`` does not see that: on a CPU core it took three times as long.
    """

    def __init__(self, convolution: nn.Conv3d) -> None:
        super().__init__()
        self.weight = convolution.weight

    def forward(self, patches: Tensor) -> Tensor:
        """(N, channels, frames, height, width) -> (N, hidden)."""
        return F.linear(patches.flatten(1), self.weight.flatten(1))


class GroupedMLP(nn.Module):
    """Stands in for the ``mlp`` of a vision block, with the same weights: its wide rows exist for some tokens at a time."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.act_fn

    def forward(self, hidden_states: Tensor) -> Tensor:
        groups = hidden_states.split(TOKENS_AT_ONCE)
        return torch.cat([self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) for x in groups])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (L, heads, head_dim) by cos and sin (L, head_dim), computed in float32."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cos.float().unsqueeze(1) + turned * sin.float().unsqueeze(1)).to(x.dtype)


def _attend(
    qkv: Tensor, rope: tuple[Tensor, Tensor], segments: list[tuple[int, Tensor]], attention: AttentionFunction
) -> Tensor:
    """Attention within segments; qkv (L, 3, heads, head_dim) and rope's cosines and sines -> (L, heads, head_dim)."""
    out = qkv.new_empty(qkv.shape[0], *qkv.shape[2:])
    for length, rows in segments:
        (q, k, v), (cos, sin) = qkv[rows].unbind(1), (table[rows] for table in rope)
        out[rows] = _attend_equal(_rotate(q, cos, sin), _rotate(k, cos, sin), v, length, attention)
    return out


def _attend_equal(q: Tensor, k: Tensor, v: Tensor, length: int, attention: AttentionFunction) -> Tensor:
    """Segments of one length, end to end: a batch of them (S, heads, length, head_dim) in one call."""
    q, k, v = (part.unflatten(0, (-1, length)).transpose(1, 2) for part in (q, k, v))
    return attention(q, k, v).transpose(1, 2).flatten(0, 1)
