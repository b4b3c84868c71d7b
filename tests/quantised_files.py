"""Quantised copies of the tiny checkpoint: written by the runtime, and conversions as the community makes them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from goldens import CHECKPOINT
from safetensors.torch import load_file, save_file
from torch import Tensor

from lance_runtime.checkpoint import TensorFile
from lance_runtime.quant_formats import FORMATS
from lance_runtime.quantize import Plan, quantize

MODEL = CHECKPOINT / "Lance_3B" / "model.safetensors"
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def quantised_tree(folder: Path, kind: str, **plan: object) -> Path:
    """A tree as on the hub whose image checkpoint is quantised: all of its linear layers, unless the plan says otherwise."""
    target = Path(shutil.copytree(CHECKPOINT, folder / kind))
    model = target / "Lance_3B" / "model.safetensors"
    model.unlink()
    quantize(TensorFile(MODEL), model, Plan(kind, **{"keep_layers": (), **plan}))
    return target


def quantised_trees(folder: Path) -> dict[str, Path]:
    return {kind: quantised_tree(folder, kind) for kind in FORMATS}


def is_linear(name: str) -> bool:
    return ".layers." in name and name.endswith(".weight") and "norm" not in name


def community_awq(path: Path, group: int = 64) -> dict[str, Tensor]:
    """AWQ-INT4 of the tiny checkpoint as the community's tool packs it; returns what it stands for, in float64.

    Every RMS norm before a quantised layer is rescaled, as it is there.
    """
    stored, meant = {}, {}
    for name, tensor in load_file(MODEL).items():
        if not is_linear(name):
            rescaled = tensor * 1.5 if "layernorm" in name else tensor
            stored[name], meant[name] = rescaled, rescaled.double()
            continue
        size = group if tensor.shape[1] % group == 0 else tensor.shape[1]
        groups = tensor.double().unflatten(1, (-1, size))
        low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
        scales = ((high - low) / 15).bfloat16()
        zeros = (-low / scales).round().clamp(0, 15)
        codes = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, 15)
        meant[name] = ((codes - zeros[..., None]) * scales.double()[..., None]).flatten(1)
        flat = codes.flatten(1).to(torch.uint8)
        layer = name.removesuffix(".weight")
        stored[f"{layer}.qweight"] = flat[:, 0::2] + 16 * flat[:, 1::2]
        stored[f"{layer}.scales"], stored[f"{layer}.zeros"] = scales, zeros.to(torch.uint8)
    save_file(stored, path)
    path.with_name("awq_meta.json").write_text(json.dumps({"n_bit": 4, "group_size": group}), "utf-8")
    return meant


def community_nvfp4(path: Path, scales: tuple[str, ...] = ("fp8", "bf16")) -> dict[str, Tensor]:
    """NVFP4 as the community's tool packs it: no scale over all, and block scales in two precisions of unequal worth."""
    stored, meant, values = {}, {}, torch.tensor(E2M1, dtype=torch.float64)
    for name, tensor in load_file(MODEL).items():
        if not is_linear(name):
            stored[name], meant[name] = tensor, tensor.double()
            continue
        blocks = tensor.double().unflatten(1, (-1, 16))
        exact = blocks.abs().amax(2) / 6
        kept = {"fp8": exact.float().to(torch.float8_e4m3fn), "bf16": exact.bfloat16()}
        codes = ((blocks / exact[..., None]).abs()[..., None] - values).abs().argmin(-1)
        signs = (blocks < 0).long()
        used = kept["bf16" if "bf16" in scales else "fp8"].double()
        meant[name] = (values[codes] * (1 - 2 * signs) * used[..., None]).flatten(1)
        flat = (codes + 8 * signs).flatten(1).to(torch.uint8)
        layer = name.removesuffix(".weight")
        stored[f"{layer}.qweight"] = flat[:, 0::2] + 16 * flat[:, 1::2]
        for kind in scales:
            stored[f"{layer}.scales_{kind}"] = kept[kind].view(torch.uint8) if kind == "fp8" else kept[kind]
    save_file(stored, path)
    return meant


def rounded_once(values: Tensor) -> Tensor:
    """float64 -> the bits of the nearest bfloat16, ties to even, with no float32 in between; int16."""
    bits = values.double().view(torch.int64)
    sign, exponent = (bits >> 63) & 1, (bits >> 52) & 0x7FF
    mantissa = bits & ((1 << 52) - 1)
    # 45 of 52 bits go; a carry runs into the exponent, as it must. Tiny numbers (below 2**-126) do not occur here.
    kept, rest, half = mantissa >> 45, mantissa & ((1 << 45) - 1), 1 << 44
    kept += (rest > half) | ((rest == half) & (kept % 2 == 1))
    magnitude = torch.where(exponent > 0, ((exponent - 1023 + 127) << 7) + kept, 0)
    return torch.where(sign == 1, magnitude - 32768, magnitude).to(torch.int16)
