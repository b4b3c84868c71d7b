"""Context -> keys and values: every split before the target is run once, in order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from .config import LanceConfig
from .context import Layout, Mode, Segment, Split, VisionTokens
from .engine import Engine
from .kv_cache import KVCache
from .model.attention import causal_attention, without_cudnn_attention
from .model.embeddings import latent_position_embedding
from .model.rope import Rope
from .model.transformer import Streams
from .types import LatentShape


@dataclass(frozen=True, eq=False)
class Branch:
    """All that a denoising step needs of one guidance branch; computed once per run.

    layout: what it was made of. cache: the prefix. rope: tables of the target's two vision tokens and of its latents.
    boundary: embeddings (1, 2, D) of the two vision tokens. position_embeddings (tokens, D): of the latents.
    """

    layout: Layout
    cache: KVCache
    rope: Streams
    boundary: Tensor
    position_embeddings: Tensor


@without_cudnn_attention()
def prefill(engine: Engine, layout: Layout, cache: KVCache | None = None, done: int = 0) -> tuple[KVCache, Any]:
    """Run the splits before the target; returns the cache and the last block's final states (1, L, D).

    The states are the understanding expert's, None where nothing was left to run. cache, done: go on with a cache that
    already holds the first ``done`` splits (it is extended in place).
    """
    tokens = sum(len(split) for split in layout.prefix[done:])
    if cache is None:
        cache = KVCache(engine.model.config, tokens, engine.dtype, engine.device)
    cache.reserve(tokens)
    hidden = None
    for block in blocks(layout, done):
        hidden = _run_block(engine, block, layout.vision, cache).und
    return cache, hidden


def blocks(layout: Layout, done: int = 0) -> list[list[Split]]:
    """The runs of splits that prefill takes through the layers at once, behind the first ``done`` splits.

    Neighbouring texts are one causal run: the same numbers in fewer passes over the weights.
    """
    found: list[list[Split]] = []
    for causal, run in groupby(layout.prefix[done:], key=lambda split: split.segment.mode == Mode.CAUSAL):
        splits = list(run)
        found += [splits] if causal else [[split] for split in splits]
    return found


def branch(engine: Engine, layout: Layout, beside: Iterable[Branch] = ()) -> Branch:
    """Prefill a layout and prepare its target. beside: branches of the same engine, whose pictures need no second reading."""
    beside = tuple(beside)
    done, other = already_read(layout, beside)
    lengths = [len(split) for split in layout.prefix]
    begun = None if other is None else other.cache.fork(sum(lengths[:done]), sum(lengths))
    cache, _ = prefill(engine, layout, begun, done)
    target = layout.target
    boundary = engine.embed([layout.vision.start, layout.vision.end])
    grid = target.segment.grid
    same = (other.position_embeddings for other in beside if other.layout.target.segment.grid == grid)
    positions = next(same, None)
    positions = latent_positions(engine, grid) if positions is None else positions
    return Branch(layout, cache, _visual_rope(engine, target.positions), boundary, positions)


def already_read(layout: Layout, beside: Iterable[Branch]) -> tuple[int, Branch | None]:
    """How many of the first splits, up to a visual, another branch has read too; and which one (None: none has)."""
    shared = [(shared_splits(layout, other.layout), other) for other in beside]
    done, other = max(shared, key=lambda pair: pair[0], default=(0, None))
    return (done, other) if done else (0, None)


def shared_splits(layout: Layout, other: Layout) -> int:
    """How many splits two layouts begin with in common, at the same positions, of which the last is a visual."""
    shared = 0
    for count, (one, two) in enumerate(zip(layout.prefix, other.prefix, strict=False), 1):
        if one.segment.identity != two.segment.identity or not torch.equal(one.positions, two.positions):
            break
        shared = count if one.segment.is_visual else shared
    return shared


def latent_positions(engine: Engine, grid: LatentShape) -> Tensor:
    """Position embeddings (tokens, D) of a latent grid."""
    return latent_position_embedding(grid, engine.model.config.hidden_size, engine.device).to(engine.dtype)


def _run_block(engine: Engine, block: Sequence[Split], vision: VisionTokens, cache: KVCache) -> Streams:
    causal = block[0].segment.mode == Mode.CAUSAL
    hidden, rope = _embed(engine, block, vision)
    start = cache.length

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = cache.append(layer, k, v, start)
        return causal_attention(q, keys, values) if causal else engine.attend_fully(q, keys, values)

    result = engine.run(hidden, rope, attend)
    cache.commit(sum(len(split) for split in block))
    return result


def _embed(engine: Engine, block: Sequence[Split], vision: VisionTokens) -> tuple[Streams, Streams]:
    """Embeddings of one block, and their rope tables."""
    segment, positions = block[0].segment, torch.cat([split.positions for split in block], dim=1)
    if segment.mode == Mode.CAUSAL:
        und = engine.embed([i for split in block for i in split.segment.ids])
        return Streams(und=und), Streams(und=engine.rope(positions))
    boundary = engine.embed([vision.start, vision.end])
    values = _values(segment, engine.model.config).to(engine.device, engine.dtype)[None]
    if segment.mode == Mode.FULL:
        und = torch.cat([boundary[:, :1], values, boundary[:, 1:]], dim=1)
        return Streams(und=und), Streams(und=engine.rope(positions))
    clean = torch.zeros(1, segment.grid.frames, device=engine.device)
    gen = engine.model.embed_latents(values, clean, latent_positions(engine, segment.grid))
    return Streams(boundary, gen), _visual_rope(engine, positions)


def _values(segment: Segment, config: LanceConfig) -> Tensor:
    """Values of a visual; ``ValueError`` where it has none, or those of a model of other sizes."""
    if segment.values is None:
        raise ValueError(f"A visual of {len(segment)} tokens carries no values.\nBuild it with Segment.vit or Segment.latents.")
    full, shape = segment.mode == Mode.FULL, list(segment.values.shape)
    expected = [segment.grid.tokens, config.hidden_size] if full else [config.latent_channels, *segment.grid]
    if shape != expected:
        raise ValueError(
            f"A visual segment has values of shape {shape} where this model takes {expected}.\n"
            "Encode the picture with the vision tower and the VAE of the same model."
        )
    # What is learned is differentiated through them, and ComfyUI's nodes run in inference mode.
    return segment.values.clone() if torch.is_grad_enabled() and segment.values.is_inference() else segment.values


def _visual_rope(engine: Engine, positions: Tensor) -> Streams:
    """Tables of a latent visual: its first and last position for the vision tokens, the rest for the latents."""
    table = engine.rope(positions)
    ends = Rope(*(part[:, :: part.shape[1] - 1].contiguous() for part in table))
    return Streams(ends, Rope(*(part[:, 1:-1].contiguous() for part in table)))
