"""Keys and values of the tokens that have been read: one preallocated block a layer, written in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .config import LanceConfig


class KVCache:
    """Keys and values (B, key heads, capacity, head_dim) of every layer, of which the first ``length`` tokens are read.

    A run of tokens writes all layers with ``append`` and then counts itself in with ``commit``, so that an interrupted
    run leaves nothing behind. Tokens that must not be remembered (the target) are attended with ``attached``.
    """

    def __init__(self, config: LanceConfig, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (2, 1, config.num_key_value_heads, capacity, config.head_dim)
        self.layers = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.layers[0].shape[3]

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def reserve(self, tokens: int) -> None:
        """Make room for this many further tokens."""
        needed = self.length + tokens
        if needed > self.capacity:
            for index, layer in enumerate(self.layers):  # one by one, so that not all are there twice
                self.layers[index] = self._resized(layer, needed)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's keys and values (B, Hkv, L, d) behind the committed ones; return all up to here."""
        end = self.length + k.shape[2]
        if torch.is_grad_enabled():  # autograd keeps what it has seen: a new tensor instead of a write in place
            self.layers[layer] = torch.cat([self.layers[layer][:, :, :, : self.length], torch.stack([k, v])], dim=3)
            return self.layers[layer][0], self.layers[layer][1]
        store = self.layers[layer]
        store[0, :, :, self.length : end] = k
        store[1, :, :, self.length : end] = v
        return store[0, :, :, :end], store[1, :, :, :end]

    def commit(self, tokens: int) -> None:
        self.length += tokens

    def fill(self, layers: Sequence[Tensor]) -> None:
        """Begin with keys and values (2, B, Hkv, L, d) of every layer, which are copied."""
        length = layers[0].shape[3]
        self.reserve(length - self.length)
        for store, layer in zip(self.layers, layers, strict=True):
            store[:, :, :, :length] = layer
        self.length = length

    def attached(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The committed keys and values with (B', Hkv, L, d) behind them, the cache itself unchanged."""
        past = self.layers[layer][:, :, :, : self.length].expand(-1, k.shape[0], -1, -1, -1)
        return torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)

    def clone(self, capacity: int = 0, length: int | None = None) -> KVCache:
        """An independent copy of the committed tokens, with room for ``capacity`` tokens in all.

        length: copy the first ones only.
        """
        copy = object.__new__(KVCache)
        copy.length = self.length if length is None else length
        copy.layers = [copy._resized(layer, max(capacity, copy.length)) for layer in self.layers]
        return copy

    def _resized(self, layer: Tensor, capacity: int) -> Tensor:
        store = layer.new_empty(*layer.shape[:3], capacity, layer.shape[4])
        store[:, :, :, : self.length] = layer[:, :, :, : self.length]
        return store
