"""One full forward pass, in the open: the whole sequence at once, an explicit mask, no cache, no code of the model's.

It says in the plainest way what the network computes; the runtime's prefill and loops must equal it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-6


def visible(split_lens: list[int], attn_modes: list[str]) -> Tensor:
    """Mask (L, L), true where a row's token sees a column's."""
    total, start = sum(split_lens), 0
    mask = torch.ones(total, total, dtype=torch.bool).tril()
    for length, mode in zip(split_lens, attn_modes, strict=True):
        end = start + length
        if mode != "causal":
            mask[start:end, start:end] = True
        if mode == "noise":
            mask[end:, start:end] = False
        start = end
    return mask


def place(grid: tuple[int, int, int], hidden: int) -> Tensor:
    """Position embedding (tokens, D) of a latent grid, token by token from the formula."""
    third = hidden // 3 // 2 * 2
    widths = (third, third, hidden - 2 * third)
    rows = []
    for t, h, w in torch.cartesian_prod(*(torch.arange(size) for size in grid)).tolist():
        number = t * 64 * 64 + h * 64 + w  # in the reference's table
        index, row = (number // (64 * 64), number % (64 * 64) // 64, number % 64), []
        for position, width in zip(index, widths, strict=True):
            angles = [position * 10000 ** (-i / (width // 2)) for i in range(width // 2)]
            row += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        rows.append(row)
    return torch.tensor(rows)


def time(weights: dict[str, Tensor], timestep: Tensor) -> Tensor:
    """Embedding (D) of one flow time."""
    angles = timestep * 10000 ** (-torch.arange(128) / 128)
    hidden = linear(weights, "time_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()]))
    return linear(weights, "time_embedder.mlp.2", F.silu(hidden))


def linear(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def norm(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * weights[f"{name}.weight"]


def embedded(model, sequence, latents, timesteps) -> tuple[Tensor, Tensor]:
    """Hidden states (L, D) of a layout, and which tokens are the generation expert's."""
    weights, rows, generated = model.state_dict(), [], []
    for split in sequence.splits:
        segment = split.segment
        ids = torch.tensor(segment.token_ids(sequence.vision))
        row = weights["language_model.model.embed_tokens.weight"][ids]
        drawn = segment.is_visual and segment.mode != "full"
        if drawn:
            values = latents if segment.mode == "noise" else segment.values
            times = timesteps if segment.mode == "noise" else torch.zeros(segment.grid.frames)
            tokens = linear(weights, "vae2llm", values.flatten(1).T) + place(segment.grid, row.shape[1])
            tokens = tokens + torch.stack([time(weights, t) for t in times]).repeat_interleave(len(tokens) // len(times), dim=0)
            row = torch.cat([row[:1], tokens, row[-1:]])
        elif segment.is_visual:
            row = torch.cat([row[:1], segment.values, row[-1:]])
        rows.append(row)
        generated += [False, *[True] * segment.grid.tokens, False] if drawn else [False] * len(row)
    return torch.cat(rows), torch.tensor(generated)


def turned(config, positions: Tensor, x: Tensor) -> Tensor:
    """Rotary embedding of heads (L, H, d): each pair of halves turns with the axis that its section names."""
    axis = [axis for axis, count in enumerate(config.mrope_section) for _ in range(count)]
    half = config.head_dim // 2
    frequencies = config.rope_theta ** (-torch.arange(half) / half)
    angles = (positions[axis].T * frequencies)[:, None]
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1)


def states(model, sequence, latents=None, timesteps=None, attn_modes=None) -> tuple[Tensor, Tensor]:
    """Final states (L, D) before the last norm, and which tokens are the generation expert's."""
    weights, config = model.state_dict(), model.config
    x, generated = embedded(model, sequence, latents, timesteps)
    mask, positions = visible(sequence.split_lens, attn_modes or sequence.attn_modes), sequence.positions

    def experts(compute, x):
        """Each token through its own expert."""
        parts = compute("", x[~generated]), compute("_moe_gen", x[generated])
        out = x.new_empty(len(x), *parts[0].shape[1:])
        out[~generated], out[generated] = parts
        return out

    def normed(name, x):
        return experts(lambda expert, x: norm(weights, f"{name}{expert}", x), x)

    def projected(name, x):
        return experts(lambda expert, x: linear(weights, f"{name}{expert}", x), x)

    def heads(name, x):
        return projected(name, x).unflatten(-1, (-1, config.head_dim))

    def gated(name, x):
        def one(expert, x):
            gate, up = linear(weights, f"{name}{expert}.gate_proj", x), linear(weights, f"{name}{expert}.up_proj", x)
            return linear(weights, f"{name}{expert}.down_proj", F.silu(gate) * up)

        return experts(one, x)

    def attended(name, x):
        q = turned(config, positions, normed(f"{name}.q_norm", heads(f"{name}.q_proj", x)))
        k = turned(config, positions, normed(f"{name}.k_norm", heads(f"{name}.k_proj", x)))
        group = config.num_attention_heads // config.num_key_value_heads
        k, v = (part.repeat_interleave(group, dim=1) for part in (k, heads(f"{name}.v_proj", x)))
        scores = torch.einsum("qhd,khd->hqk", q, k) / config.head_dim**0.5
        mixed = torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)
        return projected(f"{name}.o_proj", mixed.flatten(1))

    for index in range(config.num_hidden_layers):
        layer = f"language_model.model.layers.{index}"
        x = x + attended(f"{layer}.self_attn", normed(f"{layer}.input_layernorm", x))
        x = x + gated(f"{layer}.mlp", normed(f"{layer}.post_attention_layernorm", x))
    return x, generated


def velocity(model, sequence, latents: Tensor, timesteps: Tensor, attn_modes: list[str] | None = None) -> Tensor:
    """Velocity (C, T, H, W) of the target of a layout; other modes than its own for a wrong one."""
    x, generated = states(model, sequence, latents, timesteps, attn_modes)
    target, weights = sequence.target.segment.grid, model.state_dict()
    tokens = x[generated][-target.tokens :]
    out = linear(weights, "llm2vae", norm(weights, "language_model.model.norm_moe_gen", tokens))
    return out.T.unflatten(1, tuple(target))


def logits(model, sequence) -> Tensor:
    """Logits (V) of the token behind a layout."""
    weights = model.state_dict()
    last = states(model, sequence)[0][-1]
    return linear(weights, "language_model.lm_head", norm(weights, "language_model.model.norm", last))
