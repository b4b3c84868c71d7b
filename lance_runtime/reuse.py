"""What several questions about the same pictures have in common is read once and kept, within a number of bytes."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from .context import Layout, Segment
from .engine import Engine
from .kv_cache import KVCache
from .prefill import prefill

Kept = TypeVar("Kept")
# The keys and values of the longest clip that Lance reads: 6 s at 480p are 16 300 tokens of 36.9 KB (36 layers, 2 x 2 key
# heads of 128, bfloat16), 600 MB. A picture takes 21 MB.
PREFIX_BYTES = 640 * 2**20
# The same clip's ViT tokens (16 240 of 8 KB in float32), or those of 28 pictures.
TOKEN_BYTES = 136 * 2**20
# Who asks about more pictures than this in turn asks each once.
THINGS = 8


class Recent(Generic[Kept]):
    """The things used last, by key; what exceeds ``limit`` bytes in all, or ``things``, goes, the oldest first."""

    def __init__(self, limit: int, things: int = THINGS) -> None:
        self.limit, self.things, self.nbytes = limit, things, 0
        self._things: OrderedDict[Hashable, tuple[Kept, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._things)

    def get(self, key: Hashable) -> Kept | None:
        if key not in self._things:
            return None
        self._things.move_to_end(key)
        return self._things[key][0]

    def put(self, key: Hashable, thing: Kept, nbytes: int) -> None:
        """Keep a thing, unless it is larger than all that may be kept."""
        self.nbytes -= self._things.pop(key, (None, 0))[1]
        if nbytes > self.limit:
            return
        self._things[key], self.nbytes = (thing, nbytes), self.nbytes + nbytes
        while self.nbytes > self.limit or len(self) > self.things:
            _, (_, size) = self._things.popitem(last=False)
            self.nbytes -= size

    def clear(self) -> None:
        self._things.clear()
        self.nbytes = 0


class SeenPictures:
    """ViT tokens of pictures that were read, on the CPU: the same object for the same pixels."""

    def __init__(self, limit: int = TOKEN_BYTES) -> None:
        self.recent: Recent[Segment] = Recent(limit)

    def tokens(self, frames: np.ndarray, preset: str, encode: Callable[[np.ndarray, str], Any]) -> Segment:
        """The tokens of frames uint8 (T, H, W, 3), which ``encode`` makes where they are new."""
        key = hashlib.sha256(np.ascontiguousarray(frames).data).digest(), frames.shape, preset
        found = self.recent.get(key)
        if found is None:
            new = encode(frames, preset)
            values = new.values.cpu()
            found = replace(new, values=values)
            self.recent.put(key, found, values.nbytes)
        return found


class KeptPrefix(NamedTuple):
    """Keys and values of the first splits of a question, on the CPU; the segments are those that they were made of."""

    segments: tuple[Segment, ...]
    layers: list[Tensor]


class Prefixes:
    """Reads questions, and keeps what each read up to its last visual.

    A question works on a copy: what it writes behind the prefix, or an interrupt, does not reach what is kept. That lies
    on the CPU, where it takes nothing from the device between two questions; copying 21 MB is nothing beside reading them.
    """

    def __init__(self, limit: int = PREFIX_BYTES) -> None:
        self.recent: Recent[KeptPrefix] = Recent(limit)

    def read(self, weights: Hashable, engine: Engine, sequence: Layout) -> tuple[KVCache, Any]:
        """As ``prefill``. weights: whatever tells apart the weights that may be in place."""
        done = 1 + max((i for i, split in enumerate(sequence.prefix) if split.segment.is_visual), default=-1)
        if done == 0 or torch.is_grad_enabled():
            return prefill(engine, sequence)
        segments = tuple(split.segment for split in sequence.prefix[:done])
        key = (weights, engine.dtype, engine.device, *(segment.identity for segment in segments))
        cache = KVCache(engine.model.config, sum(map(len, sequence.prefix)), engine.dtype, engine.device)
        kept = self.recent.get(key)
        if kept is None:
            prefill(engine, replace(sequence, splits=sequence.splits[:done]), cache)
            layers = [layer[:, :, :, : cache.length].to("cpu", copy=True) for layer in cache.layers]
            self.recent.put(key, KeptPrefix(segments, layers), sum(layer.nbytes for layer in layers))
        else:
            cache.fill(kept.layers)
        return prefill(engine, sequence, cache, done)


def reading(prefixes: Prefixes, weights: Hashable) -> Callable[[Engine, Layout], tuple[KVCache, Any]]:
    """``Prefixes.read`` in the form of ``prefill``."""
    return lambda engine, sequence: prefixes.read(weights, engine, sequence)
