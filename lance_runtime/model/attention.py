"""Shared attention of the two experts: each projects its own tokens, all tokens see each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import LanceConfig
from ..types import AttentionFunction
from .rope import Rope

MAX_UNFUSED_SCORES = 2**28  # written out at once where attention is not fused: 1 GiB in float32


class _CuDNNAttention:
    """torch's one switch for all threads (of several cards, say): off while any of them wants it so."""

    def __init__(self) -> None:
        self.lock, self.users, self.before = Lock(), 0, True

    def turn_off(self) -> None:
        with self.lock:
            if self.users == 0:
                self.before = torch.backends.cuda.cudnn_sdp_enabled()
                torch.backends.cuda.enable_cudnn_sdp(False)
            self.users += 1

    def turn_back(self) -> None:
        with self.lock:
            self.users -= 1
            if self.users == 0:
                torch.backends.cuda.enable_cudnn_sdp(self.before)


_CUDNN = _CuDNNAttention()


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Leave cuDNN's attention out, where shapes change from call to call.

    torch prefers it on the newest cards, plans it anew for every exact shape, and keeps every plan. A host's own backend
    chooses for itself.
    """
    _CUDNN.turn_off()
    try:
        yield
    finally:
        _CUDNN.turn_back()


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The default attention function: torch's own, without a mask."""
    if surely_fused(q.device, q.dtype):
        return F.scaled_dot_product_attention(q, k, v)
    rows = max(1, MAX_UNFUSED_SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))
    parts = [F.scaled_dot_product_attention(part, k, v) for part in q.split(rows, dim=2)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def surely_fused(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch never writes all scores out; elsewhere that depends on card and release, and a clip's are 7e9."""
    if device.type != "cuda" or torch.version.hip is not None:
        return device.type == "cpu"
    # Cards before Ampere have no fused attention in bfloat16.
    return dtype != torch.bfloat16 or torch.cuda.get_device_capability(device)[0] >= 8


def full_attention(q: Tensor, k: Tensor, v: Tensor, attention: AttentionFunction = sdpa) -> Tensor:
    """Every query sees every key; q (B, H, L, d), k and v (B, Hkv, S, d) -> (B, L, H * d).

    Without a mask the order of queries is free, so the query heads that share a key head are laid out as further
    queries: no copy of the keys for grouped heads, and any attention backend serves.
    """
    batch, heads, length, width = q.shape
    groups = k.shape[1]
    out = attention(q.reshape(batch, groups, -1, width), k, v)
    return out.unflatten(2, (heads // groups, length)).permute(0, 3, 1, 2, 4).flatten(2)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Query i of L sees the keys before the last L and the first i + 1 of those; shapes as in full_attention."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    q = q.contiguous()  # torch 2.8 on Macs takes few queries for it, whatever their strides (pytorch issue 163597)
    length, seen = q.shape[2], k.shape[2]
    if length == seen:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        mask = torch.ones(length, seen, dtype=torch.bool, device=q.device).tril(seen - length)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Projections of both experts; the names are the checkpoint's (the generation expert's end in ``_moe_gen``)."""

    def __init__(self, config: LanceConfig, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        hidden, queries = config.hidden_size, config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        for expert in ("", "_moe_gen"):
            self.add_module(f"q_proj{expert}", operations.Linear(hidden, queries, bias=True, **factory))
            self.add_module(f"k_proj{expert}", operations.Linear(hidden, keys, bias=True, **factory))
            self.add_module(f"v_proj{expert}", operations.Linear(hidden, keys, bias=True, **factory))
            self.add_module(f"o_proj{expert}", operations.Linear(queries, hidden, bias=False, **factory))
            self.add_module(f"q_norm{expert}", operations.RMSNorm(config.head_dim, eps=config.rms_norm_eps, **factory))
            self.add_module(f"k_norm{expert}", operations.RMSNorm(config.head_dim, eps=config.rms_norm_eps, **factory))

    def project(self, hidden: Tensor, rope: Rope, expert: str) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries, rotated keys and values (B, heads, L, head_dim) of one expert's tokens (B, L, D)."""
        q, k, v = (self._heads(getattr(self, f"{name}_proj{expert}")(hidden)) for name in "qkv")
        q = rope.rotate(getattr(self, f"q_norm{expert}")(q))
        k = rope.rotate(getattr(self, f"k_norm{expert}")(k))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, L, heads * head_dim) -> (B, L, heads, head_dim), in which rows of a head lie side by side to be normed."""
        return x.unflatten(-1, (-1, self.head_dim))
