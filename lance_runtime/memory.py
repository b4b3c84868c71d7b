"""Offloading outside ComfyUI, which has its own machinery."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .components import Components
from .streaming import WeightStreamer, set_weights
from .types import check_choice

OFFLOAD_KINDS = ("none", "model", "layer")
MODES_WITH_GRAPHS = ("reduce-overhead", "max-autotune")  # of torch.compile


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device ran out of memory; only the message tells on every backend."""
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
        return streamer.forget
    from accelerate.hooks import add_hook_to_module

    hook = _alone_hook(components)
    for module in components.modules:
        add_hook_to_module(module, hook)
    return hook.take_weights


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
            parts = components.modules
            self.homes = {part: {name: own.detach().cpu() for name, own in part.named_parameters()} for part in parts}
            self.resident: nn.Module | None = None

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
            if module is not self.resident:
                self.resident = None  # until all of it is there
                for other in components.modules:
                    if other is not module:
                        set_weights(other, self.homes[other])
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
