"""Context -> keys and values: every split before the target is run once, in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from .context import Layout, Mode, Split, VisionTokens
from .kv_cache import KVCache
from .model.attention import causal_attention, full_attention, sdpa
from .model.embeddings import latent_position_embedding
from .model.rope import Rope, rope_table
from .model.transformer import Lance, Streams
from .types import AttentionFunction, LatentShape


@dataclass(frozen=True, eq=False)
class Branch:
    """All that a denoising step needs of one guidance branch; computed once per run.

    cache: the prefix. rope: tables of the target's two vision tokens and of its latents. boundary: embeddings
    (1, 2, D) of the two vision tokens. places: position embeddings (tokens, D) of the latents.
    """

    cache: KVCache
    rope: Streams
    boundary: Tensor
    places: Tensor


def prefill(
    model: Lance,
    layout: Layout,
    *,
    dtype: torch.dtype,
    device: torch.device,
    cache: KVCache | None = None,
    done: int = 0,
    attention: AttentionFunction = sdpa,
) -> tuple[KVCache, Tensor | None]:
    """Run the splits before the target; returns the cache and the last text's final states (1, L, D).

    cache, done: go on with a cache that already holds the first ``done`` splits (it is extended in place).
    """
    splits = layout.prefix[done:]
    tokens = sum(len(split) for split in splits)
    if cache is None:
        cache = KVCache(model.config, tokens, dtype, device)
    cache.reserve(tokens)
    hidden = None
    for causal, run in groupby(splits, key=lambda split: split.segment.mode == Mode.CAUSAL):
        # Neighbouring texts are one causal run: the same numbers in fewer passes over the weights.
        for block in [list(run)] if causal else [[split] for split in run]:
            hidden = _run_block(model, block, layout.vision, cache, dtype, device, attention).und
    return cache, hidden


def branch(
    model: Lance,
    layout: Layout,
    *,
    dtype: torch.dtype,
    device: torch.device,
    attention: AttentionFunction = sdpa,
    places: Tensor | None = None,
) -> Branch:
    """Prefill a layout and prepare its target. places: another branch's position embeddings, to share them."""
    cache, _ = prefill(model, layout, dtype=dtype, device=device, attention=attention)
    target = layout.target
    if places is None:
        places = target_places(model, target.segment.grid, dtype, device)
    boundary = _boundary(model, layout.vision, dtype, device)
    return Branch(cache, _visual_rope(model, target.positions, dtype, device), boundary, places)


def target_places(model: Lance, grid: LatentShape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Position embeddings (tokens, D) of a latent grid."""
    return latent_position_embedding(grid, model.config.hidden_size, device).to(dtype)


def _run_block(
    model: Lance,
    block: Sequence[Split],
    vision: VisionTokens,
    cache: KVCache,
    dtype: torch.dtype,
    device: torch.device,
    attention: AttentionFunction,
) -> Streams:
    mode = block[0].segment.mode
    hidden, rope = _embed(model, block, vision, dtype, device)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = cache.append(layer, k, v)
        return causal_attention(q, keys, values) if mode == Mode.CAUSAL else full_attention(q, keys, values, attention)

    result = model.run_layers(hidden, rope, attend)
    cache.commit(sum(len(split) for split in block))
    return result


def _embed(
    model: Lance, block: Sequence[Split], vision: VisionTokens, dtype: torch.dtype, device: torch.device
) -> tuple[Streams, Streams]:
    """Embeddings of one block, and their rope tables."""
    segment, positions = block[0].segment, torch.cat([split.positions for split in block], dim=1)
    if segment.mode == Mode.CAUSAL:
        ids = torch.tensor([[i for split in block for i in split.segment.ids]], device=device)
        return Streams(und=model.embed_text(ids, dtype)), Streams(und=rope_table(model.config, positions.to(device), dtype))
    boundary, values = _boundary(model, vision, dtype, device), segment.values.to(device, dtype)[None]
    if segment.mode == Mode.FULL:
        und = torch.cat([boundary[:, :1], values, boundary[:, 1:]], dim=1)
        return Streams(und=und), Streams(und=rope_table(model.config, positions.to(device), dtype))
    clean = torch.zeros(1, segment.grid.frames, device=device)
    gen = model.embed_latents(values, clean, target_places(model, segment.grid, dtype, device))
    return Streams(boundary, gen), _visual_rope(model, positions, dtype, device)


def _boundary(model: Lance, vision: VisionTokens, dtype: torch.dtype, device: torch.device) -> Tensor:
    return model.embed_text(torch.tensor([[vision.start, vision.end]], device=device), dtype)


def _visual_rope(model: Lance, positions: Tensor, dtype: torch.dtype, device: torch.device) -> Streams:
    """Tables of a latent visual: its first and last position for the vision tokens, the rest for the latents."""
    table = rope_table(model.config, positions.to(device), dtype)
    ends = Rope(*(part[:, :, [0, -1]] for part in table))
    return Streams(ends, Rope(*(part[:, :, 1:-1] for part in table)))
