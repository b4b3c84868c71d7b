"""Offloading outside ComfyUI, which has its own machinery."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .components import Components
from .types import check_choice

OFFLOAD_KINDS = ("none", "model", "layer")
MODES_WITH_GRAPHS = ("reduce-overhead", "max-autotune")  # of torch.compile
# Weights that are copied before they are needed. One decoder layer's MLP of one expert has 135 MB in bfloat16.
PREFETCH_BYTES = 256 * 2**20
PINNING = ("cuda", "xpu")  # kinds of devices that read pinned memory by themselves
MODULES_IN_FLIGHT = 2  # modules whose computing may be unfinished when further weights are copied


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device had too little memory: every maker's says so in words alone."""
    return any(said in str(error).lower() for said in ("out of memory", "not enough memory"))


def check_offload(kind: str, compiled: bool = False) -> None:
    check_choice("offload", kind, OFFLOAD_KINDS)
    if compiled and kind == "layer":
        raise ValueError(
            "offload='layer' cannot be combined with compile: a layer cannot be compiled while its weights come and go.\n"
            "Use offload 'model' or 'none', or leave compile out."
        )


def check_recording(wanted: bool, device: torch.device, offload: str, mode: bool | str = False) -> None:
    """``ValueError`` where CUDA graphs cannot be: without CUDA, with weights that change their place, or with torch's own.

    mode: of torch.compile.
    """
    if wanted and device.type != "cuda":
        raise ValueError(f"cuda_graphs need a CUDA device, and this one is {device}.\nLeave them out, or name the device.")
    if wanted and offload != "none":
        raise ValueError(
            f"cuda_graphs cannot be combined with offload={offload!r}: they find the weights where they were.\n"
            "Use offload 'none', or leave cuda_graphs out."
        )
    if wanted and mode in MODES_WITH_GRAPHS:
        raise ValueError(
            f"cuda_graphs cannot be combined with compile={mode!r}, which makes its own.\nUse compile=True, or one of the two."
        )


def add_offloading(components: Components, kind: str) -> Callable[[], None]:
    """ "model": one of ViT, network and VAE at a time on the device. "layer": weights are streamed through it.

    Returns what is to be called when weights were changed, or others put in their place.
    """
    check_offload(kind)
    if kind == "none":
        return lambda: None
    if kind == "layer":
        streamer = WeightStreamer(components.device)
        for module in components.modules:
            streamer.attach(module)
        return streamer.prefetched.clear
    from accelerate.hooks import add_hook_to_module

    hook = _alone_hook(components)
    for module in components.modules:
        add_hook_to_module(module, hook)
    return hook.take_weights


def _own_weights(module: nn.Module) -> dict[str, Tensor]:
    """A module's own weights, without those of its parts."""
    return {name: own.detach() for name, own in module.named_parameters(recurse=False)}


def _are_same(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    """Whether they lie in the same memory."""
    return all(weight.data_ptr() == others[name].data_ptr() for name, weight in some.items())


def _set_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        setattr(module, name, nn.Parameter(weight, requires_grad=False))


def _on_cpu(module: nn.Module) -> dict[str, Tensor]:
    return {name: weight.cpu() for name, weight in _own_weights(module).items()}


class Copied(NamedTuple):
    """A module's weights on the device, and the event after which they are complete (None: they are)."""

    weights: dict[str, Tensor]
    event: Any


class WeightStreamer:
    """Weights stay on the CPU and pass through the device, module by module, each while it computes.

    While one module computes, the weights of those that followed it last time are copied, on a stream of their own where
    the device has streams. (accelerate copies when a weight is needed, and computes when it is there.) Embedding tables are
    not copied: their rows are looked up on the CPU.

    What one model has prefetched is let go when another begins. Modules go by their number, so that one that nobody wants
    any more is not kept by its own hooks.
    """

    def __init__(self, device: torch.device, prefetch_bytes: int = PREFETCH_BYTES) -> None:
        self.device, self.prefetch_bytes, self.stream = device, prefetch_bytes, _side_stream(device)
        self.pins = device.type in PINNING
        self.cpu_weights: list[dict[str, Tensor]] = []
        self.followers: dict[int, int] = {}
        self.prefetched: dict[int, Copied] = {}
        self.last: int | None = None
        self.in_flight: deque[Any] = deque()  # events behind the last modules

    def attach(self, model: nn.Module) -> None:
        """Stream the weights of all modules of a model from now on."""
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.register_forward_pre_hook(lambda _, inputs: tuple(ids.cpu() for ids in inputs))
                module.register_forward_hook(lambda _, __, rows: rows.to(self.device))
            elif weights := _own_weights(module):
                module.register_forward_pre_hook(partial(self._before_forward, len(self.cpu_weights)))
                module.register_forward_hook(partial(self._after_forward, len(self.cpu_weights)), always_call=True)
                self.cpu_weights.append(weights)

    def _before_forward(self, number: int, module: nn.Module, _: Any) -> None:
        if self.last is not None:
            self.followers[self.last] = number
        self.last = number
        copied = self.prefetched.pop(number, None)
        if not _are_same(home := _own_weights(module), self.cpu_weights[number]):
            self.cpu_weights[number], copied = home, None  # others were put in
        copied = copied or self._copied(number)
        if copied.event is not None:
            current = torch.accelerator.current_stream(self.device)
            current.wait_event(copied.event)
            for weight in copied.weights.values():
                weight.record_stream(current)  # else its memory could be given away while it is still read
        _set_weights(module, copied.weights)

    def _after_forward(self, number: int, module: nn.Module, *_: Any) -> None:
        _set_weights(module, self.cpu_weights[number])
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
            sent = {name: self._staged(weight).to(self.device, non_blocking=True) for name, weight in home.items()}
            return Copied(sent, self.stream.record_event())

    def _staged(self, weight: Tensor) -> Tensor:
        """In pinned memory, which a device reads by itself; torch takes it back, and lends it again, when that is done."""
        return weight.pin_memory() if self.pins and weight.nbytes <= self.prefetch_bytes else weight

    def _wait(self) -> None:
        """Until the device has computed all but the last modules: a host that runs ahead would fill it with weights."""
        if self.stream is not None:
            self.in_flight.append(torch.accelerator.current_stream(self.device).record_event())
            while len(self.in_flight) > MODULES_IN_FLIGHT:
                self.in_flight.popleft().synchronize()


def _side_stream(device: torch.device) -> Any:
    """A stream for copies; None where the device (or this torch) has none, and copies simply come first."""
    accelerator = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None
    ours = accelerator is not None and accelerator.type == device.type and device.type != "mps"
    return torch.Stream(device=device) if ours and hasattr(torch.Stream, "__enter__") else None


def send_home(homes: Mapping[nn.Module, Mapping[str, Tensor]]) -> None:
    """Each module's weights are those on the CPU again."""
    for module, weights in homes.items():
        _set_weights(module, weights)


def _alone_hook(components: Components) -> Any:
    """accelerate's hook of a part that, before it runs, sends all others away.

    accelerate's own chain sends away the one part before, but ours run in no fixed order: ViT, VAE, network, VAE. And it
    copies the weights back, which did not change: here the device's copy is let go.
    """
    from accelerate.hooks import CpuOffload

    class Alone(CpuOffload):
        def __init__(self) -> None:
            super().__init__(components.device)
            self.take_weights()

        def take_weights(self) -> None:
            """Those that the parts have now are theirs; what lies on the device is copied."""
            self.homes = {part: {module: _on_cpu(module) for module in part.modules()} for part in components.modules}
            self.resident: nn.Module | None = None

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
            if module is not self.resident:
                self.resident = None  # until all of it is there
                for other in components.modules:
                    if other is not module:
                        send_home(self.homes[other])
                module.to(self.execution_device)
                self.resident = module
            return args, kwargs

    return Alone()


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
