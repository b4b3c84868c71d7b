"""The layers that the network is made of outside ComfyUI: torch's own, two of them with a quicker way on a CPU.

A token of an answer is one row, whose products are bound by the memory that the weights are read from. torch's own reach half
to two thirds of its rate, for want of threads in float32 and of arithmetic in bfloat16.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

Embedding = nn.Embedding
MANY_ROWS = 64  # of fewer, torch's own is as fast
NORMED_AT_ONCE = 2**20  # numbers, 4 MiB in float32: for more than 32 MB glibc asks the system for new pages every time
PARTS = 16  # slices that a weight is cut into, one for each thread


class Linear(nn.Linear):
    """``nn.Linear``; one row on a CPU goes another way to the same numbers."""

    def forward(self, x: Tensor) -> Tensor:
        one_row = x.numel() == self.in_features and x.is_cpu
        if not one_row or not (self.weight.dtype == torch.float32 or torch.compiler.is_compiling()):
            return super().forward(x)
        product = row_product(x.flatten(), self.weight)
        return (product if self.bias is None else product + self.bias).view(*x.shape[:-1], -1)


class RMSNorm(nn.RMSNorm):
    """``nn.RMSNorm``; many rows on a CPU, for which torch has no kernel of it, take fewer passes to the same numbers."""

    def forward(self, x: Tensor) -> Tensor:
        many = x.is_cpu and x.numel() >= MANY_ROWS * x.shape[-1] and x.dtype in (torch.float32, torch.bfloat16)
        if not many or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(x)
        if x.dtype == torch.float32:
            return self._scaled(x)
        rows = x.reshape(-1, x.shape[-1])
        result, count = torch.empty_like(rows), max(1, NORMED_AT_ONCE // x.shape[-1])
        for part, into in zip(rows.split(count), result.split(count), strict=True):
            into.copy_(self._scaled(part))
        return result.view(x.shape)

    def _scaled(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D) in float32."""
        lengths = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = lengths.square_().div_(x.shape[-1]).add_(self.eps).rsqrt_()
        return (x * scale).mul_(self.weight)


def row_product(row: Tensor, weight: Tensor) -> Tensor:
    """row (in), weight (out, in) -> (out), at the rate at which a CPU reads the weight."""
    if torch.compiler.is_compiling():  # one loop over the weight; not compiled, this would write a copy of it first
        return (weight.float() * row.float()).sum(-1).to(row.dtype)
    # MKL gives a product of one row to one thread, but shares out a batch.
    parts = math.gcd(len(weight), PARTS)
    return torch.bmm(row.expand(parts, 1, -1), weight.view(parts, -1, len(row)).transpose(1, 2)).flatten()
