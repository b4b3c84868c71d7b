"""A device that is neither CPU nor CUDA: every operator runs there, on tensors that refuse to mix with the CPU's.

    python tests/fake_device.py VARIANT [OFFLOAD | recorded]    # the tasks of a variant there and on the CPU, as JSON

With "recorded" it records as a card does, and lets no recording reach the host.

torch's own place for that (PrivateUse1 with a backend in Python) lacks a few ways of making tensors; ``complete`` adds them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "toaster"
# Operators that may see both sides: those that move, and those that torch lets take indices from the CPU.
HOST_READS = {
    *("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::masked_select"),
    *("aten::unique_dim", "aten::_unique", "aten::_unique2"),
}
TENSOR = torch.tensor
CURRENT_STREAM = torch.accelerator.current_stream
BOTH_SIDES = {"aten::_to_copy", "aten::copy_", "aten::_copy_from", "aten::index", "aten::index_put_"}


class Recording:
    """What a function does on the device, done again at each replay."""

    running = False
    made = 0

    def __init__(self, run: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> None:
        self.run, self.inputs = run, inputs
        Recording.running, Recording.made = True, Recording.made + 1
        self.output = run(*inputs)
        Recording.running = False

    def replay(self) -> None:
        self.output.copy_(self.run(*self.inputs))

    @classmethod
    def check(cls, what: str, reaches_host: bool) -> None:
        if cls.running and reaches_host:
            raise RuntimeError(f"{what} reaches the host, whose part no replay does.")


class Elsewhere(torch.Tensor):
    """A tensor that says it lies on the device; ``held`` is the one that does the work."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Elsewhere:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        made.held = held
        return made

    def tolist(self) -> list:
        Recording.check("tolist", True)
        return self.held.tolist()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind is not cls for kind in types):  # ComfyUI's quantised weights, which know their own way
            return NotImplemented
        return run(operator, *args, **(kwargs or {}))


def reads_on_host(operator: Any, args: tuple, kwargs: dict) -> bool:
    """Whether the size of what an operator makes is in the values of a tensor, or it reads one itself."""
    name = operator._schema.name
    if name == "aten::repeat_interleave":
        return kwargs.get("output_size") is None
    chooses = name in ("aten::index", "aten::index_put_") and any(x is not None and x.dtype == torch.bool for x in args[1])
    return chooses or name in HOST_READS


def run(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """Any operator, on what the tensors hold."""
    if operator is torch.ops.aten.record_stream.default:  # memory that two streams use; here there is one
        return None
    if operator is torch.ops.aten._has_compatible_shallow_copy_type.default:  # ``held`` would not follow
        return False
    name, tensors = operator._schema.name, [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    here = any(isinstance(tensor, Elsewhere) for tensor in tensors)
    strangers = [tuple(x.shape) for x in tensors if not isinstance(x, Elsewhere) and x.ndim]
    Recording.check(name, reads_on_host(operator, args, kwargs) or any(not isinstance(x, Elsewhere) for x in tensors))
    if here and strangers and name not in BOTH_SIDES:
        raise RuntimeError(f"{name} on the device {NAME} got tensors of the CPU, of shapes {strangers}.")
    if kwargs.get("device") is not None:
        here, kwargs["device"] = torch.device(kwargs["device"]).type == NAME, torch.device("cpu")
    if name == "aten::copy_":
        here = isinstance(args[0], Elsewhere)
    held_args, held = tree_map(lambda x: x.held if isinstance(x, Elsewhere) else x, (args, kwargs))
    out = operator(*held_args, **held)
    if name.endswith("_"):  # in place
        return args[0]
    return tree_map(lambda x: Elsewhere(x) if here and isinstance(x, torch.Tensor) else x, out)


class Line(torch.Stream):
    """The device's stream; its backend cannot wait for events, but everything there is done at once."""

    def record_event(self, event: Any = None) -> SimpleNamespace:
        return SimpleNamespace(synchronize=lambda: None)


class Dice(torch.Generator):
    """The device's random numbers, which are the CPU's."""

    def __new__(cls, device: Any = None) -> Dice:
        return super().__new__(cls)


def current_line(device: Any = None) -> Line:
    stream = CURRENT_STREAM(device)
    return Line(stream_id=stream.stream_id, device_index=stream.device_index, device_type=stream.device_type)


def complete() -> None:
    """What torch asserts about, made on the CPU and moved: new tensors from numbers, and indices that are lists."""
    torch.accelerator.current_stream = current_line
    torch.Generator = Dice

    def moved(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
            Recording.check("a tensor of the host's numbers", make is TENSOR)
            recording, Recording.running = Recording.running, False
            found = make(*args, **kwargs)
            found = found if device is None else found.to(device)
            Recording.running = recording
            return found

        return made

    def placed(access: Callable[..., Any]) -> Callable[..., Any]:
        def accessed(tensor: torch.Tensor, key: Any, *value: Any) -> Any:
            if not isinstance(tensor, Elsewhere):
                return access(tensor, key, *value)
            keys = tuple(
                torch.tensor(k, device=tensor.device) if isinstance(k, list) else k
                for k in (key if isinstance(key, tuple) else (key,))
            )
            return access(tensor, keys, *(torch.as_tensor(v, dtype=tensor.dtype).to(tensor.device) for v in value))

        return accessed

    for name in ("tensor", "arange", "linspace"):
        setattr(torch, name, moved(getattr(torch, name)))
    for name in ("__getitem__", "__setitem__"):
        setattr(torch.Tensor, name, placed(getattr(torch.Tensor, name)))


def install() -> torch.library.Library:
    """Register the device; what is returned must be kept alive."""
    _setup_privateuseone_for_python_backend(NAME)
    library = torch.library.Library("_", "IMPL")
    library.fallback(run, "PrivateUse1")
    complete()
    return library


def main() -> None:
    here = Path(__file__).parent
    sys.path[:0] = [str(here), str(here.parent)]
    kept = install()
    import goldens
    import tasks

    from lance_runtime import LancePipeline, decode, recorded

    variant, offload = (*sys.argv[1:], "none")[:2]
    record = offload == "recorded"
    pipes = {
        device: LancePipeline.from_pretrained(goldens.CHECKPOINT, variant, device, torch.float32, offload=kind)
        for device, kind in (("cpu", "none"), (NAME, "none" if record else offload))
    }
    if record:
        recorded.capture = lambda run, inputs: ((made := Recording(run, inputs)), made.output)
        pipes[NAME].components = replace(pipes[NAME].components, cuda_graphs=True)
        decode.LEAST_RECORDED = 4
    for pipe in pipes.values():  # else only the CPU's would be exact
        parts = pipe.components
        for rounded in (parts.model, parts.vision.rotary_pos_emb):
            rounded.config = replace(rounded.config, bfloat16_frequencies=False)
    table = pipes[NAME].components.model.language_model.model.embed_tokens.weight
    found: dict[str, Any] = {"table": table.device.type}
    for task in (*tasks.GENERATION_TASKS, *tasks.UNDERSTANDING_TASKS):
        if (task in tasks.VIDEO_TASKS) == (variant == "video"):
            expected, other = (pipes[device](**tasks.arguments(task)) for device in ("cpu", NAME))
            if expected.text is not None:
                found[task] = {"ids": [expected.token_ids, other.token_ids]}
            else:
                frames = [one.frames.astype(int) for one in (expected, other)]
                apart = float((expected.latents - other.latents.cpu()).abs().max())
                found[task] = {
                    "device": other.latents.device.type, "apart": apart, "pixels": int(abs(frames[0] - frames[1]).max())
                }  # fmt: skip
    found["recordings"] = Recording.made
    del kept
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
