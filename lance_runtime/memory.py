"""Offloading outside ComfyUI, which has its own machinery."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .components import Components

OFFLOAD_KINDS = ("none", "model", "layer")
# Weights that are copied before they are needed. One decoder layer's MLP of one expert has 135 MB in bfloat16.
AHEAD_BYTES = 256 * 2**20
LINKS_BEHIND = 2  # links whose computing may be unfinished when further weights are copied


def check_offload(kind: str, compiled: bool = False) -> None:
    if kind not in OFFLOAD_KINDS:
        raise ValueError(f"offload {kind!r} is none of {', '.join(OFFLOAD_KINDS)}.\nUse one of them.")
    if compiled and kind == "layer":
        raise ValueError(
            "offload 'layer' and compile are 2 ways to run a layer, which cannot be compiled while its weights come and go.\n"
            "Use offload 'model' or 'none', or leave compile out."
        )


def add_offloading(components: Components, kind: str) -> None:
    """ "model": one of ViT, network and VAE at a time on the device. "layer": weights pass through it one after the other."""
    check_offload(kind)
    if kind == "none":
        return
    if kind == "layer":
        for module in components.modules:
            Passing(module, components.device)
        return
    from accelerate.hooks import add_hook_to_module

    hook = _alone_hook(components)
    for module in components.modules:
        add_hook_to_module(module, hook)


Homes = dict[nn.Module, dict[str, Tensor]]  # the weights of every link (a module that has some of its own) on the CPU


def _homes(module: nn.Module) -> Homes:
    found = {link: dict(link.named_parameters(recurse=False)) for link in module.modules()}
    return {link: {name: own.detach() for name, own in weights.items()} for link, weights in found.items() if weights}


def _place(link: nn.Module, names: Iterable[str], weights: Iterable[Tensor]) -> None:
    for name, weight in zip(names, weights, strict=True):
        setattr(link, name, nn.Parameter(weight, requires_grad=False))


class Copied(NamedTuple):
    """A link's weights on the device, and the event after which they are complete (None: they are)."""

    weights: list[Tensor]
    event: Any


class Passing:
    """Weights stay on the CPU and pass through the device, link by link.

    While one link computes, those that followed it last time are copied, on a stream of their own where the device has
    streams. (accelerate copies when a weight is needed, and computes when it is there.) Tables of embeddings do not pass:
    a row is looked up where it lies.
    """

    def __init__(self, module: nn.Module, device: torch.device, ahead: int = AHEAD_BYTES) -> None:
        self.device, self.ahead, self.stream = device, ahead, _side_stream(device)
        tables = [link for link in module.modules() if isinstance(link, nn.Embedding)]
        self.homes = {link: weights for link, weights in _homes(module).items() if link not in tables}
        self.follower: dict[nn.Module, nn.Module] = {}
        self.coming: dict[nn.Module, Copied] = {}
        self.last: nn.Module | None = None
        self.computing: deque[Any] = deque()  # events behind the last links
        for table in tables:
            table.register_forward_pre_hook(lambda _, inputs: tuple(ids.cpu() for ids in inputs))
            table.register_forward_hook(lambda _, __, rows: rows.to(device))
        for link in self.homes:
            link.register_forward_pre_hook(self._arrive)
            link.register_forward_hook(self._leave, always_call=True)

    def _arrive(self, link: nn.Module, _: Any) -> None:
        if self.last is not None:
            self.follower[self.last] = link
        self.last = link
        copied = self.coming.pop(link, None) or self._copied(link)
        if copied.event is not None:
            current = torch.accelerator.current_stream(self.device)
            current.wait_event(copied.event)
            for weight in copied.weights:
                weight.record_stream(current)  # else its memory could be given away while it is still read
        _place(link, self.homes[link], copied.weights)

    def _leave(self, link: nn.Module, *_: Any) -> None:
        _place(link, self.homes[link], self.homes[link].values())
        self._wait()
        wanted = dict.fromkeys(self._following(link))
        self.coming = {other: self.coming[other] if other in self.coming else self._copied(other) for other in wanted}

    def _following(self, link: nn.Module) -> Iterator[nn.Module]:
        """The links after this one, as far ahead as may be copied; always one."""
        size, begun = 0, link
        while (following := self.follower.get(link)) is not None and following is not begun:
            size += sum(weight.nbytes for weight in self.homes[following].values())
            if size > self.ahead and link is not begun:
                return
            yield following
            link = following

    def _copied(self, link: nn.Module) -> Copied:
        weights = self.homes[link].values()
        if self.stream is None:
            return Copied([weight.to(self.device) for weight in weights], None)
        with self.stream:
            return Copied([weight.to(self.device, non_blocking=True) for weight in weights], self.stream.record_event())

    def _wait(self) -> None:
        """Until the device has computed all but the last links: a host that runs ahead would fill it with weights."""
        if self.stream is not None:
            self.computing.append(torch.accelerator.current_stream(self.device).record_event())
            while len(self.computing) > LINKS_BEHIND:
                self.computing.popleft().synchronize()


def _side_stream(device: torch.device) -> Any:
    """A stream for copies; None where the device (or this torch) has none, and copies simply come first."""
    accelerator = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None
    ours = accelerator is not None and accelerator.type == device.type and device.type != "mps"
    return torch.Stream(device=device) if ours and hasattr(torch.Stream, "__enter__") else None


def send_home(homes: Homes) -> None:
    """A module's weights are those on the CPU again."""
    for link, weights in homes.items():
        _place(link, weights, weights.values())


def _alone_hook(components: Components) -> Any:
    """accelerate's hook of a part that, before it runs, sends all others away.

    accelerate's own chain sends away the one part before, but ours run in no fixed order: ViT, VAE, network, VAE. And it
    copies the weights back, which did not change: here the device's copy is let go.
    """
    from accelerate.hooks import CpuOffload

    homes = {module: _homes(module) for module in components.modules}

    class Alone(CpuOffload):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
            for other in components.modules:
                if other is not module:
                    send_home(homes[other])
            module.to(self.execution_device)
            return args, kwargs

    return Alone(components.device)


def bring(module: nn.Module) -> None:
    """Onto the device, before methods other than ``forward`` are called (accelerate's hooks see ``forward`` alone)."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(module)


def checked_device(device: torch.device | str | None) -> torch.device:
    """The device that is asked for, or the default; ``ValueError`` where this machine or this torch has no such thing."""
    try:
        found = torch.device(device) if device is not None else default_device()
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled with CUDA
        reason = str(error).split("\n", maxsplit=1)[0].rstrip(".")
        raise ValueError(f"Device {str(device)!r} cannot be used: {reason}.\nUse cpu, or leave the device out.") from error
    return found


def default_device() -> torch.device:
    """The accelerator that torch found, or the CPU."""
    accelerator = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None
    if accelerator is not None and torch.accelerator.is_available():
        return torch.device(accelerator)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on an accelerator that computes in it; float32 elsewhere, so on a CPU, where it repeats the reference."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "mps":
        return torch.bfloat16 if torch.backends.mps.is_macos_or_newer(14, 0) else torch.float32
    return torch.float32 if device.type == "cpu" else torch.bfloat16
