"""Many kernels launched as one: a function of tensors as a CUDA graph.

A step of a small picture and a token of an answer are a thousand kernels and more that take a card less time than a host
takes to launch them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor

CAPTURING = Lock()  # one at a time in a process


class Recorded:
    """A function of tensors whose shapes and kernels are the same in every call.

    The first call runs it as it is, so that libraries are set up and kernels loaded outside a recording. The second records
    it, and from then on it is replayed. What it reads beside its inputs, and writes, must stay where it is.
    """

    def __init__(self, run: Callable[..., Tensor]) -> None:
        self.run, self.begun = run, False
        self.inputs: list[Tensor] = []
        self.graph: Any = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        if not self.begun:
            self.begun = True
            return self.run(*inputs)
        if self.graph is None:
            self.inputs = [given.clone() for given in inputs]
            self.graph, self.output = capture(self.run, self.inputs)
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.output.clone()  # its memory is written again by the next call


def capture(run: Callable[..., Tensor], inputs: Sequence[Tensor]) -> tuple[Any, Tensor]:
    """A graph of the kernels that a function launches, none of which has run yet, and where its result will be."""
    graph, device = torch.cuda.CUDAGraph(), inputs[0].device
    # Other threads of the host may go on with a card in the meantime.
    recording = torch.cuda.graph(graph, stream=capture_stream(device), capture_error_mode="thread_local")
    with CAPTURING, torch.cuda.device(device), recording:
        output = run(*inputs)
    return graph, output


@cache
def capture_stream(device: torch.device) -> Any:
    """A device's stream for recordings: torch's own is of the device that was recorded on first."""
    return torch.cuda.Stream(device)
