"""Quantised files of any kind -> one bfloat16 file, each weight by its format's formula, rounded once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .checkpoint import TensorFile, check_names, identify, is_beside
from .components import build_lance
from .config import LanceConfig
from .dequantize import DequantizedTensors, all_tensors
from .files import header_of
from .quantize import copied
from .saving import check_new, write_tensors

NAMES = ("awq_state_dict.safetensors", "nvfp4_state_dict.safetensors", "model.safetensors")


def find_quantised(path: Path) -> TensorFile:
    """A quantised file, or the one in a folder; ``FileNotFoundError`` where there is none."""
    if path.is_file():
        return TensorFile(path)
    found = [path / name for name in NAMES if (path / name).is_file()]
    if not found:
        raise FileNotFoundError(f"{path} holds 0 of {', '.join(NAMES)}.\nName the file that is to be converted.")
    return TensorFile(found[0])


def convert(
    file: TensorFile, path: Path, progress: Callable[[int, int], None] | None = None, folder: Path | None = None
) -> int:
    """Write a bfloat16 copy with configuration and tokenizer in its header; returns how many weights were decoded.

    Reads the community's AWQ-INT4 and NVFP4 (whose norms belong to their weights, and are kept) and ComfyUI's formats. One
    weight is in memory at a time. folder: where llm_config.json and the tokenizer are, if not beside the file.
    ``ValueError`` for a file that is no quantised Lance.
    """
    check_new(path)
    tensors = all_tensors(file)
    if not tensors.layers:
        raise ValueError(f"{file.path.name} is {identify(file)} with 0 quantised weights.\nUse it as it is.")
    _check_is_whole(tensors)
    write_tensors(path, [copied(tensors, name, name) for name in tensors], header_of(file, folder), progress)
    return len(tensors.layers)


def _check_is_whole(tensors: DequantizedTensors) -> None:
    """Strict, as for every checkpoint; ``ValueError`` for what is quantised and is not Lance."""
    shapes = {name: shape for name, shape in tensors.shapes.items() if not is_beside(name)}
    expected = build_lance(LanceConfig.from_shapes(shapes)).named_parameters()
    check_names({name: tuple(value.shape) for name, value in expected}, shapes)
