"""Loading against reading: a checkpoint of random weights, from a call to weights in place."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lance_runtime.checkpoint import TensorFile
from lance_runtime.components import assign, build_lance
from lance_runtime.config import LanceConfig
from lance_runtime.dequantize import plain_tensors
from lance_runtime.model.transformer import Lance

if TYPE_CHECKING:
    from bench import Bench

CHUNK = 16 * 2**20
GIGA = 1e9


def write_checkpoint(path: Path, model: Lance) -> None:
    """Random weights for a model on the meta device, bfloat16 as published, written one at a time."""
    header, end = {}, 0
    for name, parameter in model.named_parameters():
        start, end = end, end + 2 * parameter.numel()
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for parameter in model.parameters():
            values = torch.ones(parameter.shape, dtype=torch.bfloat16)
            values = values.uniform_(-0.03, 0.03) if parameter.ndim > 1 else values
            stream.write(values.view(torch.int16).numpy().data)
        stream.flush()
        os.fsync(stream.fileno())


def draw_weights(bench: Bench, config: LanceConfig) -> Lance:
    """A network of random weights, made where it computes."""
    model = build_lance(config).to(bench.dtype).to_empty(device=bench.device)
    for parameter in model.parameters():
        parameter.uniform_(-0.03, 0.03) if parameter.ndim > 1 else parameter.fill_(1.0)
    return model


def process_peak_bytes() -> int:
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget(path: Path) -> None:
    """Let the system drop the file from its page cache (Linux)."""
    with path.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(path: Path) -> None:
    buffer = bytearray(CHUNK)
    with path.open("rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass


def bench_loading(bench: Bench, config: LanceConfig) -> Lance:
    """Opening, building on the meta device and assigning with the cast, over reading the same file once.

    On the CPU weights that need no cast are only mapped, so one value of each page is read as well.
    """

    def load() -> None:
        nonlocal model
        model = build_lance(config)
        assign(model, plain_tensors(TensorFile(path)), bench.dtype, bench.device)
        for parameter in model.parameters():
            if parameter.device.type == "cpu":
                parameter.view(-1).view(torch.uint8)[::4096].sum()

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        model = build_lance(config)
        write_checkpoint(path, model)
        size, found = path.stat().st_size, {}
        for state in ("cold", "warm"):
            seconds = []
            for run in (lambda: read(path), load):
                if state == "cold" and hasattr(os, "posix_fadvise"):
                    model = build_lance(config)  # what is mapped cannot be dropped
                    forget(path)
                seconds.append(bench.timed(run))
            found |= {f"{state}_seconds": seconds[1], f"{state}_over_reading": seconds[1] / seconds[0]}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    bench.emit("loading", **found, file_gb=size / GIGA, parameters=parameters, peak_gb=bench.peak_bytes() / GIGA)
    return model
