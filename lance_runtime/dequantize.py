"""Whole weights out of quantised files: the same mapping of names to tensors as of any other checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from .checkpoint import (
    OLD_QUANT_TENSOR,
    QUANT_HEADER,
    QUANT_TENSOR,
    TensorFile,
    Tensors,
    canonical_name,
    canonical_names,
    model_names,
    unpack_json,
    vit_name,
    vit_names,
)
from .quant_formats import AWQ, COMMUNITY_NVFP4, NATIVE, Format

# Tensors that belong to a quantised weight, by what follows the layer's name.
PARTS = ("weight", "weight_scale", "weight_scale_2", "scale_weight", "qweight", "scales", "zeros", "scales_fp8", "scales_bf16")
# Scales of a layer's input, which only quantised multiplications read.
INPUT_PARTS = ("input_scale", "scale_input")
OLD_NAMES = {"scale_weight": "weight_scale"}


class QuantizedWeight(NamedTuple):
    """One quantised weight: its format, what else the file says of it, and its parts' names in the file."""

    format: Format
    settings: dict
    parts: dict[str, str]


class DequantizedTensors(Tensors):
    """Tensors of a file by canonical name, a quantised weight decoded to float32 when it is asked for.

    names: canonical to stored. ``shapes`` are those of whole weights, and need no reading.
    """

    def __init__(self, file: TensorFile, names: Mapping[str, str], layers: Mapping[str, QuantizedWeight]) -> None:
        hidden = {name for layer in layers for name in _belonging(layer)}
        self.file, self.layers = file, {f"{layer}.weight": found for layer, found in layers.items()}
        self.names = {name: stored for name, stored in names.items() if name not in hidden and name != OLD_QUANT_TENSOR}
        self.shapes = {name: file.shapes[stored] for name, stored in self.names.items()}
        for name, layer in self.layers.items():
            stored = layer.parts.get("weight", layer.parts.get("qweight", ""))
            self.shapes[name] = layer.format.shape(file.shapes[stored])

    def __getitem__(self, name: str) -> Tensor:
        layer = self.layers.get(name)
        if layer is None:
            return self.file[self.names[name]]
        if layer.settings.get("convrot") or layer.settings.get("params", {}).get("convrot"):
            raise ValueError(
                f"{name} of {self.file.path.name} is int8 with a rotation (convrot), which this runtime cannot undo.\n"
                "Use it in ComfyUI, or quantise the full checkpoint: python -m lance_runtime quantize --format int8."
            )
        return layer.format.decode({part: self.file[stored] for part, stored in layer.parts.items()})


def plain_tensors(file: TensorFile) -> DequantizedTensors:
    """The decoder's and the glue's whole weights of a Lance checkpoint, quantised or not.

    ``ValueError`` names what any other file is, and formats that are not known.
    """
    names = model_names(file)
    return DequantizedTensors(file, names, quantised_layers(file, names))


def all_tensors(file: TensorFile) -> DequantizedTensors:
    """Every tensor of a file, whole, under its canonical name; community conversions are read as well."""
    names = canonical_names(file)
    return DequantizedTensors(file, names, quantised_layers(file, names))


def plain_vit_tensors(file: TensorFile) -> DequantizedTensors:
    """The vision tower's whole weights, of a file as ``checkpoint.vit_names`` takes it."""
    names = vit_names(file)
    return DequantizedTensors(file, names, quantised_layers(file, names, vit_name))


def quantised_layers(
    file: TensorFile, names: Mapping[str, str], canonical: Callable[[str], str] = canonical_name
) -> dict[str, QuantizedWeight]:
    """The quantised layers by canonical name, of those that have weights. names: canonical to stored."""
    found = {}
    for layer, said in _settings(file, names, canonical).items():
        known = ((part, names.get(f"{layer}.{part}")) for part in PARTS)
        parts = {OLD_NAMES.get(part, part): stored for part, stored in known if stored is not None}
        if {"weight", "qweight"} & set(parts):
            found[layer] = QuantizedWeight(_format(said["format"], layer, file), said, parts)
    return found


def _settings(file: TensorFile, names: Mapping[str, str], canonical: Callable[[str], str]) -> dict[str, dict]:
    """What a file says of its quantised layers, in each of the ways in which files say it."""
    said = json.loads(file.metadata[QUANT_HEADER])["layers"] if QUANT_HEADER in file.metadata else {}
    found = {canonical(layer): dict(value) for layer, value in said.items()}
    for name, stored in names.items():
        layer, _, part = name.rpartition(".")
        if part == QUANT_TENSOR[1:]:
            found[layer] = unpack_json(file[stored])
        elif part == "scale_weight":
            found[layer] = {"format": "float8_e4m3fn"}
        elif part == "qweight":
            found[layer] = {"format": (AWQ if f"{layer}.scales" in names else COMMUNITY_NVFP4).name}
    return found


def _format(name: str, layer: str, file: TensorFile) -> Format:
    known = {**NATIVE, AWQ.name: AWQ, COMMUNITY_NVFP4.name: COMMUNITY_NVFP4}
    if name not in known:
        raise ValueError(
            f"{layer} of {file.path.name} is quantised as {name!r}, which is none of {', '.join(NATIVE)}.\n"
            "Use a file in one of these formats, or the full checkpoint."
        )
    return known[name]


def _belonging(layer: str) -> list[str]:
    """Names of all that a file may hold of a quantised weight, but not its bias."""
    return [f"{layer}.{part}" for part in (*PARTS, *INPUT_PARTS, QUANT_TENSOR[1:])]
