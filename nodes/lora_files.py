"""LoRA files of every trainer -> the names, the meaning and the shapes that ComfyUI's adapters read."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..lance_runtime.checkpoint import WRAPPER

ROOT = "diffusion_model."
# What trainers and savers put before the path of a module, one after another.
PREFIX = re.compile(
    r"^(base_model\.|model\.diffusion_model\.|diffusion_model\.|text_encoders\.|pipe\.dit\.|transformer\.|unet\.|model\."
    r"|lora_(unet|transformer|te\d*)_|lycoris_)+"
)
# What a path may lack at its front.
STEMS = ("", "language_model.", "language_model.model.")
# PEFT's names within a module -> ComfyUI's. An adapter may have any name, or none.
PEFT_NAMES = (
    (re.compile(r"lora_(A|B)\.([^.]+\.)?weight"), r"lora_\1.weight"),
    (re.compile(r"lora_embedding_(A|B)(\.[^.]+)?"), r"lora_embedding_\1"),
    (re.compile(r"lora_B\.([^.]+\.)?bias"), "lora_B.bias"),
    (re.compile(r"lora_magnitude_vector(\..+)?"), "lora_magnitude_vector"),
    (re.compile(r"(modules_to_save\.[^.]+\.|base_layer\.)?weight"), "set_weight"),
    (re.compile(r"(modules_to_save\.[^.]+\.|base_layer\.)?bias"), "bias.set_weight"),
)
# A module's two matrices: what multiplies first, and what multiplies its result. The first row is PEFT's.
PAIRS = (
    ("lora_A.weight", "lora_B.weight"),
    ("lora_down.weight", "lora_up.weight"),
    ("lora.down.weight", "lora.up.weight"),
    ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    ("lora_A", "lora_B"),
)
# Rows of an embedding are looked up, not multiplied with: PEFT's pair is the other way round there, transposed.
EMBEDDING = {"lora_embedding_B": "lora_A.weight", "lora_embedding_A": "lora_B.weight"}
# Changes of a whole tensor -> which one of the module's.
WHOLE = {
    "diff": "weight",
    "set_weight": "weight",
    "w_norm": "weight",
    "diff_b": "bias",
    "lora_B.bias": "bias",
    "b_norm": "bias",
    "bias.set_weight": "bias",
}
# What only says how matrices act.
SETTINGS = ("alpha", "dora_scale", "lora_mid.weight", "reshape_weight")


class Part(NamedTuple):
    """A tensor, and its name in the file."""

    origin: str
    tensor: Tensor


class Strength(NamedTuple):
    """What PEFT keeps beside its matrices, in ``adapter_config.json``: they count alpha / rank times, or alpha / sqrt(rank)."""

    alpha: float
    patterns: Mapping[str, float]
    by_root: bool
    source: str

    def scale(self, path: str, rank: int) -> float:
        """The factor of a module's matrices (PEFT, ``LoraLayer.update_layer``)."""
        alpha = next((alpha for key, alpha in self.patterns.items() if re.match(rf"(.*\.)?({key})$", path)), self.alpha)
        return alpha / (math.sqrt(rank) if self.by_root else rank)


def read_strength(path: Path, metadata: Mapping[str, str] | None) -> Strength | None:
    """From ``adapter_config.json`` beside the file (PEFT), or from its header (diffusers); None where neither has it."""
    beside = path.with_name("adapter_config.json")
    source = beside.name if beside.is_file() else f"the header of {path.name}"
    text = beside.read_text("utf-8") if beside.is_file() else (metadata or {}).get("lora_adapter_metadata", "{}")
    try:
        # diffusers writes the part of its pipeline before each name.
        config = {name.rsplit(".", maxsplit=1)[-1]: value for name, value in json.loads(text).items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{source} ({len(text)} characters) is no JSON object: {error}.\n"
            "Copy it again from where the LoRA was trained, or take it away: alpha then counts as the rank."
        ) from error
    if config.get("lora_alpha") is None:
        return None
    return Strength(config["lora_alpha"], config.get("alpha_pattern") or {}, bool(config.get("use_rslora")), source)


def translate(
    lora: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    strength: Strength | None,
    weight: Callable[[str], Tensor],
) -> dict[str, Part]:
    """What fits the network, under ComfyUI's names and with ComfyUI's meaning; what does not is left out.

    shapes: the network's tensors by name. weight: one of them, whole, in float32 (DoRA needs it).
    """
    known = _forms(name.removesuffix(".weight") for name in shapes if name.endswith(".weight"))
    modules: dict[str, dict[str, Part]] = defaultdict(dict)
    for name, tensor in lora.items():
        if found := locate(name, known):
            path, what = found
            modules[path][what] = Part(name, tensor)
    result = {}
    for path, parts in modules.items():
        fitting = _from_peft(_fitting(parts, path, shapes), path, strength, weight)
        result.update({f"{ROOT}{path}.{what}": part for what, part in fitting.items()})
    return result


def locate(name: str, known: Mapping[str, str]) -> tuple[str, str] | None:
    """The module's path, and what of it in ComfyUI's words; None where no module fits.

    known: every way to write a path -> the path.
    """
    parts = PREFIX.sub("", WRAPPER.sub("", name)).split(".")
    for end in range(len(parts) - 1, 0, -1):
        if path := known.get(".".join(parts[:end])):
            what = ".".join(parts[end:])
            return path, next((pattern.sub(new, what) for pattern, new in PEFT_NAMES if pattern.fullmatch(what)), what)
    return None


def _forms(paths: Iterable[str]) -> dict[str, str]:
    """Paths without their front, and with underscores."""
    short = {path.removeprefix(stem): path for path in paths for stem in STEMS if path.startswith(stem)}
    return {form: path for name, path in short.items() for form in (name, name.replace(".", "_"))}


def _fitting(parts: dict[str, Part], path: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Part]:
    """A module's parts without those of another shape than the network's, and without those that are no use alone."""
    parts = {
        EMBEDDING.get(what, what): Part(name, tensor.T.contiguous() if what in EMBEDDING else tensor)
        for what, (name, tensor) in parts.items()
    }
    pair = next((pair for pair in PAIRS if all(what in parts for what in pair)), ())
    fits = bool(pair) and _fits(*(parts[what].tensor for what in pair), shapes[f"{path}.weight"])
    unfit = {what for what in chain(*PAIRS) if not (fits and what in pair)}
    unfit |= {what for what, of in WHOLE.items() if what in parts and parts[what].tensor.shape != shapes.get(f"{path}.{of}")}
    if fits:  # PEFT may keep the weight itself beside its change, and ComfyUI would take that alone
        unfit.add("set_weight")
    kept = {what: part for what, part in parts.items() if what not in unfit}
    return kept if any(what not in SETTINGS for what in kept) else {}


def _fits(first: Tensor, second: Tensor, shape: tuple[int, ...]) -> bool:
    inner, outer = first.flatten(1).shape, second.flatten(1).shape
    return 0 < inner[0] == outer[1] and (outer[0], inner[1]) == (shape[0], math.prod(shape[1:]))


def _from_peft(
    parts: dict[str, Part], path: str, strength: Strength | None, weight: Callable[[str], Tensor]
) -> dict[str, Part]:
    """Strength, bias and magnitude of PEFT's pair in ComfyUI's words."""
    if "lora_A.weight" not in parts:
        return parts
    parts = dict(parts)
    (_, first), (origin, second) = (parts[what] for what in PAIRS[0])
    rank = first.shape[0]
    if "alpha" not in parts and strength is not None:
        parts["alpha"] = Part(origin, torch.tensor(strength.scale(path, rank) * rank))
    scale = parts["alpha"].tensor.item() / rank if "alpha" in parts else 1.0
    if "lora_B.bias" in parts:
        name, bias = parts.pop("lora_B.bias")
        parts["diff_b"] = Part(name, bias * scale)
    if "lora_magnitude_vector" in parts:
        # PEFT divides by the norms of the changed rows, ComfyUI by those of the rows as they were.
        name, magnitude = parts.pop("lora_magnitude_vector")
        before = weight(f"{path}.weight")
        after = before + scale * (second.float() @ first.float())
        factors = magnitude.float().flatten() * before.norm(dim=1) / after.norm(dim=1)
        parts["dora_scale"] = Part(name, factors[:, None])
    return parts
