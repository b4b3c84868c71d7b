"""What a run multiplies, and the same products alone: the yardsticks of a step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lance_runtime.engine import Engine
from lance_runtime.model.attention import without_cudnn_attention


@dataclass
class Counted:
    """What one run multiplied: linear layers with their rows, and the shapes that attention got."""

    linears: list[tuple[nn.Linear, int]]
    attentions: list[tuple[torch.Size, torch.Size]]

    @property
    def linear(self) -> int:
        return sum(2 * rows * layer.in_features * layer.out_features for layer, rows in self.linears)

    @property
    def attention(self) -> int:
        """Two products, q with the keys and the weights with the values, of 2 operations a term."""
        return sum(4 * q.numel() * k[-2] for q, k in self.attentions)


def count(engine: Engine, run: Callable[[Engine], object]) -> Counted:
    """Run once and count: each linear layer by a hook, attention by a wrapper around the backend."""
    counted = Counted([], [])

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        counted.attentions.append((q.shape, k.shape))
        return engine.attention(q, k, v)

    def hook(layer: nn.Linear, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        counted.linears.append((layer, inputs[0].numel() // layer.in_features))

    handles = [layer.register_forward_hook(hook) for layer in engine.model.modules() if isinstance(layer, nn.Linear)]
    with torch.compiler.set_stance("force_eager"):  # a hook that counts is another function at each call
        run(replace(engine, attention=attention, cuda_graphs=False))
    for handle in handles:
        handle.remove()
    return counted


def yardstick(engine: Engine, counted: Counted) -> Callable[[], None]:
    """``torch.mm`` at the shapes of the linear layers, on their own weights."""
    sizes = {(rows, layer.in_features) for layer, rows in counted.linears}
    inputs = {size: torch.randn(size, dtype=engine.dtype, device=engine.device) for size in sizes}
    products = [(inputs[rows, layer.in_features], layer.weight.t()) for layer, rows in counted.linears]

    def run() -> None:
        for left, right in products:
            torch.mm(left, right)

    return run


def attending(engine: Engine, counted: Counted, few: bool) -> Callable[[], None]:
    """The backend of attention at the shapes of a step; without cuDNN's for few tokens, as in the loop."""
    made = {
        shape: torch.randn(shape, dtype=engine.dtype, device=engine.device) for pair in counted.attentions for shape in pair
    }

    def run() -> None:
        with without_cudnn_attention() if few else nullcontext():
            for q, k in counted.attentions:
                engine.attention(made[q], made[k], made[k])

    return run
