"""safetensors written as a stream: the header first, from shapes alone, then one piece after another in its place."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

DTYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
}


class Spec(NamedTuple):
    """What a header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Piece(NamedTuple):
    """Tensors that are made together, when it is their turn; ``make`` gives what ``specs`` promise."""

    specs: dict[str, Spec]
    make: Callable[[], Mapping[str, Tensor]]


def check_new(path: Path) -> None:
    """``ValueError`` for a file that would be written over, or that is none of safetensors."""
    if path.suffix != ".safetensors":
        raise ValueError(f"{path.name} has the suffix {path.suffix!r}, where .safetensors belongs.\nName the file so.")
    if path.exists():
        raise ValueError(f"{path} is there already ({path.stat().st_size} bytes).\nName another file, or delete it first.")


def write_tensors(
    path: Path,
    pieces: Sequence[Piece],
    metadata: Mapping[str, str],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a file of which no more than one piece is in memory; progress is called with (bytes done, bytes in all).

    The file gets its name when it is complete: an interrupted run leaves nothing. ``ValueError`` where the disk has no room.
    """
    check_new(path)
    header, offsets = _header([spec for piece in pieces for spec in piece.specs.items()], metadata)
    total = sum(spec.nbytes for piece in pieces for spec in piece.specs.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(path.parent).free) < len(header) + total:
        raise ValueError(f"{path.name} takes {len(header) + total} bytes; {free} are free.\nFree some, or use another disk.")
    unfinished, done = path.with_name(f"{path.name}.{os.getpid()}.part"), 0  # no other run's, and nobody's download
    try:
        with unfinished.open("wb") as stream:
            stream.write(header)
            stream.truncate(len(header) + total)
            for piece in pieces:
                _write(stream, piece, offsets, len(header))
                done += sum(spec.nbytes for spec in piece.specs.values())
                if progress is not None:
                    progress(done, total)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _write(stream: BinaryIO, piece: Piece, offsets: Mapping[str, int], start: int) -> None:
    """A function of its own, so that its tensors are gone when the next are made."""
    for name, tensor in piece.make().items():
        _check(name, tensor, piece.specs[name])
        stream.seek(start + offsets[name])
        stream.write(_bytes(tensor))


def _header(specs: Sequence[tuple[str, Spec]], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The header's bytes, and where each tensor begins behind it: the widest types first, so that all are aligned."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets, end = {}, 0
    for name, spec in sorted(specs, key=lambda pair: (-pair[1].dtype.itemsize, pair[0])):
        offsets[name], end = end, end + spec.nbytes
        span = [offsets[name], end]
        entries[name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": span}
    text = json.dumps(entries, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets


def _check(name: str, tensor: Tensor, spec: Spec) -> None:
    found = Spec(tensor.dtype, tuple(tensor.shape))
    if found != spec:
        raise RuntimeError(f"{name} is {found} where {spec} was announced.\nThis is a fault of the program: please report it.")


def _bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes without a copy of them (numpy has no bfloat16 and no float8)."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
