"""Weights that stay on the CPU and pass through a device while it computes: ``offload="layer"``."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .model.transformer import MLP

# Weights that are copied before they are needed. One decoder layer's MLP of one expert has 135 MB in bfloat16.
PREFETCH_BYTES = 256 * 2**20
PINNING = ("cuda", "xpu")  # kinds of devices that read pinned memory by themselves
PINNED_SHARE = 0.5  # of the free main memory: what is pinned cannot be swapped out
MODULES_IN_FLIGHT = 2  # modules whose computing may be unfinished when further weights are copied
UNITS = (MLP,)  # whose weights come together: the many tokens of a clip pass an MLP in parts, and each part needs all of them


class Copied(NamedTuple):
    """A module's weights on the device, and the event after which they are complete (None: they are)."""

    weights: dict[str, Tensor]
    event: Any


class WeightStreamer:
    """Streams the weights of modules through a device, each module's while it computes.

    While one module computes, the weights of those that followed it last time are copied, on a stream of their own where
    the device has streams. (accelerate copies when a weight is needed, and computes when it is there.) Embedding tables are
    not copied: their rows are looked up on the CPU.

    What one model has prefetched is let go when another begins. Modules go by their number, so that one that nobody wants
    any more is not kept by its own hooks.
    """

    def __init__(self, device: torch.device, prefetch_bytes: int = PREFETCH_BYTES) -> None:
        self.device, self.prefetch_bytes, self.stream = device, prefetch_bytes, _side_stream(device)
        self.cpu_weights: list[dict[str, Tensor]] = []
        self.followers: dict[int, int] = {}
        self.prefetched: dict[int, Copied] = {}
        self.last: int | None = None
        self.in_flight: deque[Any] = deque()  # events behind the last modules
        self.pins = device.type in PINNING
        self.pinned: dict[int, dict[str, Tensor]] = {}
        self.room = _free_memory() * PINNED_SHARE if self.pins else 0.0

    def attach(self, model: nn.Module) -> None:
        """Stream the weights of all modules of a model from now on."""
        for module in _units(model):
            if isinstance(module, nn.Embedding):
                module.register_forward_pre_hook(lambda _, inputs: tuple(ids.cpu() for ids in inputs))
                module.register_forward_hook(lambda _, __, rows: rows.to(self.device))
            elif weights := _weights_of(module):
                module.register_forward_pre_hook(partial(self._before_forward, len(self.cpu_weights)))
                module.register_forward_hook(partial(self._after_forward, len(self.cpu_weights)), always_call=True)
                self.cpu_weights.append(weights)

    def forget(self) -> None:
        """What was copied ahead, or into pinned memory: the weights have changed."""
        self.prefetched.clear()
        for number in list(self.pinned):
            self._unpin(number)

    def _before_forward(self, number: int, module: nn.Module, _: Any) -> None:
        if self.last is not None:
            self.followers[self.last] = number
        self.last = number
        copied = self.prefetched.pop(number, None)
        if not _are_same(home := _weights_of(module), self.cpu_weights[number]):  # others were put in
            self.cpu_weights[number], copied = home, None
            self._unpin(number)
        copied = copied or self._copied(number)
        if copied.event is not None:
            current = torch.accelerator.current_stream(self.device)
            current.wait_event(copied.event)
            for weight in copied.weights.values():
                weight.record_stream(current)  # else its memory could be given away while it is still read
        set_weights(module, copied.weights)

    def _after_forward(self, number: int, module: nn.Module, *_: Any) -> None:
        set_weights(module, self.cpu_weights[number])
        self._wait()
        known = dict(self.prefetched)
        self.prefetched.clear()
        self.prefetched.update((other, known.get(other) or self._copied(other)) for other in self._following(number))

    def _following(self, number: int) -> Iterator[int]:
        """The modules after this one, as far ahead as may be copied; always one."""
        size, begun = 0, number
        while (following := self.followers.get(number)) is not None and following != begun:
            size += sum(weight.nbytes for weight in self.cpu_weights[following].values())
            if size > self.prefetch_bytes and number != begun:
                return
            yield following
            number = following

    def _copied(self, number: int) -> Copied:
        home = self.cpu_weights[number]
        if self.stream is None:
            return Copied({name: weight.to(self.device) for name, weight in home.items()}, None)
        with self.stream:
            staged = {name: self._staged(number, name) for name in home}
            sent = {name: weight.to(self.device, non_blocking=True) for name, weight in staged.items()}
            return Copied(sent, self.stream.record_event())

    def _staged(self, number: int, name: str) -> Tensor:
        """In pinned memory, which a device reads by itself: kept there while there is room, else lent for this once."""
        weight, kept = self.cpu_weights[number][name], self.pinned.setdefault(number, {})
        if name in kept or not self.pins:
            return kept.get(name, weight)
        if (taken := _pinned_bytes(weight)) <= self.room:
            kept[name], self.room = weight.pin_memory(), self.room - taken
            return kept[name]
        return weight.pin_memory() if weight.nbytes <= self.prefetch_bytes else weight

    def _unpin(self, number: int) -> None:
        self.room += sum(_pinned_bytes(weight) for weight in self.pinned.pop(number, {}).values())

    def _wait(self) -> None:
        """Until the device has computed all but the last modules: a host that runs ahead would fill it with weights."""
        if self.stream is not None:
            self.in_flight.append(torch.accelerator.current_stream(self.device).record_event())
            while len(self.in_flight) > MODULES_IN_FLIGHT:
                self.in_flight.popleft().synchronize()


def set_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put tensors in the place of a module's weights, by their names within it."""
    for name, weight in weights.items():
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, nn.Parameter(weight, requires_grad=False))


def _units(module: nn.Module) -> Iterator[nn.Module]:
    """A module and all of its parts, but those of a unit."""
    yield module
    for part in () if isinstance(module, UNITS) else module.children():
        yield from _units(part)


def _weights_of(module: nn.Module) -> dict[str, Tensor]:
    """What a module computes with itself, without its parts; a unit's is all that it has."""
    return {name: own.detach() for name, own in module.named_parameters(recurse=isinstance(module, UNITS))}


def _are_same(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    """Whether they lie in the same memory."""
    return all(weight.data_ptr() == others[name].data_ptr() for name, weight in some.items())


def _pinned_bytes(weight: Tensor) -> int:
    """What torch takes for it: the next power of two."""
    return 1 << (weight.nbytes - 1).bit_length()


def _free_memory() -> int:
    import psutil

    return psutil.virtual_memory().available


def _side_stream(device: torch.device) -> Any:
    """A stream for copies; None where the device (or this torch) has none, and copies simply come first."""
    accelerator = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None
    ours = accelerator is not None and accelerator.type == device.type and device.type != "mps"
    return torch.Stream(device=device) if ours and hasattr(torch.Stream, "__enter__") else None
