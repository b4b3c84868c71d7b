"""Keys and values of the tokens that have been read: one preallocated block a layer, written in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .config import LanceConfig

ANSWER_ROOM = 1024  # tokens that a cache grows by for an answer: few are as long as they may be


class KVCache:
    """Keys and values (B, key heads, capacity, head_dim) of every layer, of which the first ``length`` tokens are read.

    A run of tokens writes all layers with ``append`` and then counts itself in with ``commit``, so that an interrupted
    run leaves nothing behind. Tokens that must not be remembered (the target) are attended with ``attached``. A ``fork``
    reads its first tokens where its parent has them.
    """

    def __init__(self, config: LanceConfig, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (2, 1, config.num_key_value_heads, capacity, config.head_dim)
        # Zeros: a mask keeps out what is not written yet, but not if it is NaN.
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.shared: list[tuple[Tensor, ...]] = [() for _ in self.layers]  # the parents' parts, oldest first
        self.length = self.begin = 0  # tokens in all, and those that lie in ``shared``

    @property
    def capacity(self) -> int:
        return self.begin + self.layers[0].shape[3]

    @property
    def nbytes(self) -> int:
        """Of its own tokens; shared ones are counted where they are."""
        return sum(layer.nbytes for layer in self.layers)

    def reserve(self, tokens: int) -> None:
        """Make room for this many further tokens."""
        needed = self.length + tokens
        if needed > self.capacity:
            for index, layer in enumerate(self.layers):  # one by one, so that not all are there twice
                store = layer.new_zeros(*layer.shape[:3], needed - self.begin, layer.shape[4])
                store[:, :, :, : self.length - self.begin] = self._own(index)
                self.layers[index] = store

    def append(self, layer: int, k: Tensor, v: Tensor, at: int | None = None) -> tuple[Tensor, Tensor]:
        """Write one layer's keys and values (B, Hkv, L, d) behind the committed ones; return all up to here.

        at: behind so many tokens, for a layer that gradient checkpointing runs again when more have been committed.
        """
        start = (self.length if at is None else at) - self.begin
        end = start + k.shape[2]
        if torch.is_grad_enabled():  # autograd keeps what it has seen: a new tensor instead of a write in place
            self.layers[layer] = torch.cat([self.layers[layer][:, :, :, :start], torch.stack([k, v])], dim=3)
        else:
            self.layers[layer][0, :, :, start:end] = k
            self.layers[layer][1, :, :, start:end] = v
        found = self.layers[layer][:, :, :, :end]
        if self.begin:
            found = torch.cat([*self.shared[layer], found], dim=3)
        return found[0], found[1]

    def write(self, layer: int, k: Tensor, v: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """``append`` of one token (no fork has it) whose place (1) a tensor tells; returns all that there is room for."""
        keys, values = self.layers[layer]
        keys.index_copy_(2, at, k)
        values.index_copy_(2, at, v)
        return keys, values

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
        past = [part.expand(-1, k.shape[0], -1, -1, -1) for part in (*self.shared[layer], self._own(layer))]
        return torch.cat([*(part[0] for part in past), k], dim=2), torch.cat([*(part[1] for part in past), v], dim=2)

    def fork(self, length: int, capacity: int = 0) -> KVCache:
        """A cache that goes on behind the first ``length`` tokens of this one, which both share.

        capacity: room for so many tokens in all. What is committed here is never written again, so neither sees the other.
        """
        fork = object.__new__(KVCache)
        fork.length = fork.begin = length
        fork.shared = [tuple(self._first(index, length)) for index in range(len(self.layers))]
        own = max(capacity - length, 0)
        fork.layers = [layer.new_zeros(*layer.shape[:3], own, layer.shape[4]) for layer in self.layers]
        return fork

    def committed(self, layer: int) -> Tensor:
        """One layer's committed keys and values (2, B, Hkv, L, d)."""
        return torch.cat([*self.shared[layer], self._own(layer)], dim=3) if self.begin else self._own(layer)

    def _own(self, layer: int) -> Tensor:
        """What this cache itself has committed of one layer."""
        return self.layers[layer][:, :, :, : self.length - self.begin]

    def _first(self, layer: int, length: int) -> Iterator[Tensor]:
        for part in (*self.shared[layer], self._own(layer)):
            if length > 0:
                yield part[:, :, :, :length]
            length -= part.shape[3]
