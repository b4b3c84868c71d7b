"""What a latent token is made of besides its values: its time and its place."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..types import LatentShape

MAX_PERIOD = 10000.0
TABLE_SIDE = 64  # rows and columns of a frame in the reference's table (max_latent_size)


def _frequencies(count: int, device: torch.device) -> Tensor:
    return torch.exp(-math.log(MAX_PERIOD) * torch.arange(count, dtype=torch.float32, device=device) / count)


class TimestepEmbedder(nn.Module):
    """DiT's time embedding: 128 cosines, 128 sines, two layers (reference: modeling/lance/modeling_utils.py).

    The flow time goes in as it is, in [0, 1], not scaled by 1000.
    """

    width = 256

    def __init__(self, hidden_size: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        first = operations.Linear(self.width, hidden_size, bias=True, **factory)
        self.mlp = nn.Sequential(first, nn.SiLU(), operations.Linear(hidden_size, hidden_size, bias=True, **factory))

    def forward(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """timesteps (...) -> embeddings (..., D) in ``dtype``."""
        angles = timesteps.float()[..., None] * _frequencies(self.width // 2, timesteps.device)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype))


def latent_position_embedding(grid: LatentShape, hidden_size: int, device: torch.device) -> Tensor:
    """The fixed sin-cos table (tokens, D) of a latent grid, in float32.

    The hidden size is cut in three (time, rows, columns), each part sines then cosines of the integer index. Computed
    for any grid; the tables that checkpoints carry are of different sizes and are left alone, as the reference does.

    The reference numbers the cells of a frame in rows of 64 (data/data_utils.py). So, beyond 1024 pixels of width, column
    64 + k of a row has the embedding of column k of the next one: Lance was trained so on its widest pictures (21:9).
    """
    frames, rows, columns = (torch.arange(size, device=device) for size in grid)
    cells = ((frames[:, None, None] * TABLE_SIDE + rows[:, None]) * TABLE_SIDE + columns).flatten()
    part = hidden_size // 3 // 2 * 2
    tables = []
    for index, width in (
        (cells // TABLE_SIDE**2, part),
        (cells // TABLE_SIDE % TABLE_SIDE, part),
        (cells % TABLE_SIDE, hidden_size - 2 * part),
    ):
        angles = index[:, None] * _frequencies(width // 2, device)
        tables += [angles.sin(), angles.cos()]
    return torch.cat(tables, dim=-1)
