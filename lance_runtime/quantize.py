"""Quantised files written: which layers, in which format, and what it costs each weight."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import QUANT_TENSOR, TensorFile, Tensors, is_quantised, model_names, pack_json
from .files import header_of
from .quant_formats import FORMATS, Format
from .saving import Piece, Spec, check_new, write_tensors
from .types import check_choice

SCOPES = ("gen", "und", "both")
TINY = torch.finfo(torch.float32).tiny  # of a weight that is zero, the error is none
# A decoder layer's linear weights, and the layer's number.
LINEAR = re.compile(r"language_model\.model\.layers\.(\d+)\.(self_attn|mlp(_moe_gen)?)\.\w+_proj(_moe_gen)?\.weight")


@dataclass(frozen=True)
class Plan:
    """What to quantise: a format of the command line, an expert or both, and the layers that stay as they are.

    keep_layers: numbers of decoder layers, counted from the end where negative. Whatever is no linear layer of the decoder
    (embeddings, head, norms, glue, vision tower) always stays.
    """

    format: str
    scope: str = "both"
    keep_layers: tuple[int, ...] = (0, -1)

    def __post_init__(self) -> None:
        check_choice("Format", self.format, FORMATS)
        check_choice("Scope", self.scope, SCOPES)

    @property
    def kind(self) -> Format:
        return FORMATS[self.format]

    def chosen(self, shapes: dict[str, tuple[int, ...]]) -> list[str]:
        """Names of the weights to quantise, of a checkpoint's canonical names and shapes."""
        found = [(name, match) for name in shapes if (match := LINEAR.fullmatch(name))]
        count = 1 + max((int(match[1]) for _, match in found), default=-1)
        outside = [layer for layer in self.keep_layers if not -count <= layer < count]
        if outside:
            raise ValueError(f"Layer {outside[0]} is none of the {count} layers of this model.\nUse 0 to {count - 1}, or -1.")
        kept = {layer % count for layer in self.keep_layers}
        experts = {"gen": (True,), "und": (False,), "both": (True, False)}[self.scope]
        return [
            name
            for name, match in found
            if int(match[1]) not in kept and ("_moe_gen" in name) in experts and self.kind.fits(shapes[name])
        ]


@dataclass
class Written:
    """A quantised file: the relative error of each quantised weight by name, and bytes of the weights before and after."""

    path: Path
    errors: dict[str, float] = field(default_factory=dict)
    before: int = 0
    after: int = 0


def quantize(file: TensorFile, path: Path, plan: Plan, progress: Callable[[int, int], None] | None = None) -> Written:
    """Write a quantised copy of a Lance checkpoint for ComfyUI, with its configuration and tokenizer in the header.

    One weight is in memory at a time. ``ValueError`` for a file that is quantised already, or one that is there already.
    """
    check_new(path)
    if is_quantised(file):
        raise ValueError(f"{file.path.name} is quantised already.\nStart from the full checkpoint.")
    stored, written = model_names(file), Written(path)
    chosen = set(plan.chosen({name: file.shapes[source] for name, source in stored.items()}))
    if not chosen:
        raise ValueError(f"0 of {len(stored)} weights are left to quantise.\nKeep fewer layers than {list(plan.keep_layers)}.")
    others = {name: name for name in file if name not in set(stored.values())}  # the vision tower, the position table
    pieces = [
        _quantised(file, name, source, plan.kind, written.errors) if name in chosen else copied(file, name, source)
        for name, source in (stored | others).items()
    ]
    written.before = sum(Spec(torch.bfloat16, shape).nbytes for shape in file.shapes.values())
    written.after = sum(spec.nbytes for piece in pieces for spec in piece.specs.values())
    write_tensors(path, pieces, header_of(file), progress)
    return written


def copied(tensors: Tensors, name: str, source: str) -> Piece:
    """A tensor of a file as it is, in bfloat16."""
    return Piece({name: Spec(torch.bfloat16, tensors.shapes[source])}, lambda: {name: tensors[source].to(torch.bfloat16)})


def _quantised(file: TensorFile, name: str, source: str, kind: Format, errors: dict[str, float]) -> Piece:
    layer, note = name.removesuffix(".weight"), pack_json({"format": kind.name, **kind.settings})

    def named(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {f"{layer}.{part}": tensor for part, tensor in parts.items()} | {layer + QUANT_TENSOR: note}

    def encode(weight: Tensor) -> dict[str, Tensor]:
        if kind.encode is None:
            raise ValueError(f"{kind.name} is a format that is read, not written.\nUse one of {', '.join(FORMATS)}.")
        return kind.encode(weight)

    def make() -> dict[str, Tensor]:
        weight = file[source].float()
        parts = encode(weight)
        errors[name] = float((kind.decode(parts) - weight).norm() / weight.norm().clamp(min=TINY))
        return named(parts)

    # The maths runs without numbers, too: it says what it will make.
    blank = named(encode(torch.empty(file.shapes[source], device="meta")))
    return Piece({key: Spec(tensor.dtype, tuple(tensor.shape)) for key, tensor in blank.items()}, make)
