"""Counts what tensors hold, on any device; on meta without allocating it."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def storages(things: Any) -> dict[int, torch.UntypedStorage]:
    found = [leaf.untyped_storage() for leaf in tree_leaves(things) if isinstance(leaf, torch.Tensor)]
    return {storage._cdata: storage for storage in found}


class Alive(TorchDispatchMode):
    """The most bytes that tensors made inside held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = storages((args, kwargs))
        out = func(*args, **(kwargs or {}))
        for key, storage in storages(out).items():
            if key not in self.sizes and key not in before:
                self.sizes[key] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, key, None)
        self.most = max(self.most, sum(self.sizes.values()))
        return out
