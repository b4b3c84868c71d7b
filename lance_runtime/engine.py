"""The network together with what it computes in: the first argument of prefill and of both loops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .model.attention import full_attention, sdpa
from .model.rope import Rope, rope_table
from .model.transformer import Attend, Lance, LayerHook, Streams
from .types import AttentionFunction


@dataclass(frozen=True, eq=False)
class Engine:
    """A network, the type and device of its hidden states, and the host's hooks.

    attention: the backend. layer_hook: see ``Lance.run_layers``. attention_hook: may change attention's output for the
    tokens of a target, (B, 2 + tokens, H * d), the two vision tokens first. cuda_graphs: steps of few tokens and the tokens of
    answers are launched as graphs (``recorded``).
    """

    model: Lance
    dtype: torch.dtype
    device: torch.device
    attention: AttentionFunction = sdpa
    layer_hook: LayerHook | None = None
    attention_hook: Callable[[Tensor], Tensor] | None = None
    cuda_graphs: bool = False

    def embed(self, ids: list[int]) -> Tensor:
        """Embeddings (1, L, D) of token ids."""
        return self.model.embed_text(torch.tensor([ids]), self.dtype, self.device)

    def rope(self, positions: Tensor) -> Rope:
        """The rotary table of positions (3, L)."""
        return rope_table(self.model.config, positions.to(self.device), self.dtype)

    def run(self, hidden: Streams, rope: Streams, attend: Attend) -> Streams:
        """One block of tokens through all layers."""
        return self.model.run_layers(hidden, rope, attend, self.layer_hook)

    def attend_fully(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Every query sees every key; shapes as in ``full_attention``."""
        return full_attention(q, k, v, self.attention)
