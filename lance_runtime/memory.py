"""Offloading outside ComfyUI: accelerate moves the weights, we say when (ComfyUI has its own machinery)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .components import Components

OFFLOAD_KINDS = ("none", "model", "layer")


def check_offload(kind: str, compiled: bool = False) -> None:
    if kind not in OFFLOAD_KINDS:
        raise ValueError(f"offload {kind!r} is none of {', '.join(OFFLOAD_KINDS)}.\nUse one of them.")
    if compiled and kind == "layer":
        raise ValueError(
            "offload 'layer' and compile are 2 ways to run a layer, which cannot be compiled while its weights come and go.\n"
            "Use offload 'model' or 'none', or leave compile out."
        )


def add_offloading(components: Components, kind: str) -> None:
    """ "model": one of ViT, network and VAE at a time on the device. "layer": weights pass through it layer by layer."""
    check_offload(kind)
    if kind == "none":
        return
    from accelerate import cpu_offload
    from accelerate.hooks import add_hook_to_module

    for module in components.modules:
        if kind == "layer":
            cpu_offload(module, execution_device=components.device)
        else:
            add_hook_to_module(module, _alone_hook(components))


def _alone_hook(components: Components) -> Any:
    """accelerate's hook of a part that, before it runs, sends all others away.

    accelerate's own chain sends away the one part before, but ours run in no fixed order: ViT, VAE, network, VAE.
    """
    from accelerate.hooks import CpuOffload

    class Alone(CpuOffload):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
            for other in components.modules:
                if other is not module:
                    other.to("cpu")
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
    """bfloat16 on an accelerator; float32 on a CPU, where it is the faster and repeats the reference's numbers."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16
