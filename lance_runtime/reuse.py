"""Keys, values and ViT tokens of pictures that may be asked about again, within a limit of bytes."""

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
from .kv_cache import ANSWER_ROOM, KVCache
from .prefill import prefill

Kept = TypeVar("Kept")
# The keys and values of the longest clip that Lance reads: 6 s at 480p are 16 300 tokens of 36.9 KB (36 layers, 2 x 2 key
# heads of 128, bfloat16), 600 MB. A picture takes 21 MB.
PREFIX_BYTES = 640 * 2**20
# The same clip's ViT tokens (16 240 of 8 KB in float32), or those of 28 pictures.
TOKEN_BYTES = 136 * 2**20
# Cycling through more pictures than this gains nothing: each is evicted before it is asked about again.
MAX_ENTRIES = 8


class LRUCache(Generic[Kept]):
    """Values by key, with their sizes: beyond ``max_bytes`` or ``max_entries`` the least recently used are evicted."""

    def __init__(self, max_bytes: int, max_entries: int = MAX_ENTRIES) -> None:
        self.max_bytes, self.max_entries, self.nbytes = max_bytes, max_entries, 0
        self._entries: OrderedDict[Hashable, tuple[Kept, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def get(self, key: Hashable) -> Kept | None:
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def put(self, key: Hashable, value: Kept, nbytes: int) -> None:
        """Keep a value, unless it alone is larger than ``max_bytes``."""
        self.nbytes -= self._entries.pop(key, (None, 0))[1]
        if nbytes > self.max_bytes:
            return
        self._entries[key], self.nbytes = (value, nbytes), self.nbytes + nbytes
        while self.nbytes > self.max_bytes or len(self) > self.max_entries:
            _, (_, size) = self._entries.popitem(last=False)
            self.nbytes -= size

    def clear(self) -> None:
        self._entries.clear()
        self.nbytes = 0


class VisionTokenCache:
    """ViT tokens of pictures that were read, on the CPU: the same object for the same pixels."""

    def __init__(self, max_bytes: int = TOKEN_BYTES) -> None:
        self.entries: LRUCache[Segment] = LRUCache(max_bytes)

    def tokens(self, frames: np.ndarray, preset: str, encode: Callable[[np.ndarray, str], Any]) -> Segment:
        """The tokens of frames uint8 (T, H, W, 3), which ``encode`` makes where they are new."""
        key = hashlib.sha256(np.ascontiguousarray(frames).data).digest(), frames.shape, preset
        found = self.entries.get(key)
        if found is None:
            new = encode(frames, preset)
            values = new.values.cpu()
            found = replace(new, values=values)
            self.entries.put(key, found, values.nbytes)
        return found


class KeptPrefix(NamedTuple):
    """Keys and values of the first splits of a question, on the CPU; the segments are those that they were made of."""

    segments: tuple[Segment, ...]
    layers: list[Tensor]


class PrefixCache:
    """Keys and values of questions up to their last visual.

    A question works on a copy: what it writes behind the prefix, or an interrupt, does not reach what is kept. That lies
    on the CPU, where it takes nothing from the device between two questions; copying 21 MB is nothing beside reading them.
    """

    def __init__(self, max_bytes: int = PREFIX_BYTES) -> None:
        self.entries: LRUCache[KeptPrefix] = LRUCache(max_bytes)

    def prefill(self, weights: Hashable, engine: Engine, layout: Layout) -> tuple[KVCache, Any]:
        """As ``prefill.prefill``. weights: whatever tells apart the weights that may be in place."""
        segments = _up_to_last_visual(layout)
        if not segments or torch.is_grad_enabled():
            return prefill(engine, layout)
        done, key = len(segments), _key(weights, engine, segments)
        capacity = sum(map(len, layout.prefix)) + ANSWER_ROOM  # growing would copy all of it
        cache = KVCache(engine.model.config, capacity, engine.dtype, engine.device)
        kept = self.entries.get(key)
        if kept is None:
            prefill(engine, replace(layout, splits=layout.splits[:done]), cache)
            held = [cache.committed(index) for index in range(len(cache.layers))]
            nbytes = sum(layer.nbytes for layer in held)
            if nbytes <= self.entries.max_bytes:  # else they would be copied for nothing
                self.entries.put(key, KeptPrefix(segments, [layer.to("cpu", copy=True) for layer in held]), nbytes)
        else:
            cache.fill(kept.layers)
        return prefill(engine, layout, cache, done)

    def splits_kept(self, weights: Hashable, engine: Engine, layout: Layout) -> int:
        """How many of the first splits ``prefill`` would not read again."""
        segments = _up_to_last_visual(layout)
        return len(segments) if _key(weights, engine, segments) in self.entries else 0


def _up_to_last_visual(layout: Layout) -> tuple[Segment, ...]:
    """What is kept of a question: never its last split, whose states the answer begins with."""
    segments = tuple(split.segment for split in layout.prefix[:-1])
    return segments[: 1 + max((i for i, segment in enumerate(segments) if segment.is_visual), default=-1)]


def _key(weights: Hashable, engine: Engine, segments: tuple[Segment, ...]) -> Hashable:
    return weights, engine.dtype, engine.device, *(segment.identity for segment in segments)
