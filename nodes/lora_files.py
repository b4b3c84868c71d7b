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
BY_PEFT = "base_model."  # how names begin in what PEFT itself saves
KINDS = ("LORA", "LOHA", "LOKR")
OTHER_BASES = ("pissa", "olora", "corda", "loftq")  # beginnings of training that change the model, too
OF_CLIP = re.compile(r"text_encoders\.|lora_te\d*_")  # in files with a half for MODEL and another for CLIP
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
    (re.compile(r"(modules_to_save\.[^.]+\.|base_layer\.)?(weight|bias)"), r"saved.\2"),
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
    "saved.weight": "weight",
    "diff_b": "bias",
    "lora_B.bias": "bias",
    "b_norm": "bias",
    "saved.bias": "bias",
}
# What only says how matrices act.
SETTINGS = ("alpha", "dora_scale", "lora_mid.weight", "reshape_weight")


class Part(NamedTuple):
    """A tensor, and its name in the file."""

    origin: str
    tensor: Tensor


class Strength(NamedTuple):
    """What PEFT keeps beside its matrices: they count alpha / rank times, or alpha / sqrt(rank)."""

    alpha: float
    rank: float
    patterns: Mapping[re.Pattern[str], float]
    by_root: bool
    source: str

    def scale(self, path: str, rank: float) -> float:
        """The factor of a module's matrices (PEFT, ``LoraLayer.update_layer``)."""
        alpha = next((alpha for key, alpha in self.patterns.items() if key.match(path)), self.alpha)
        return alpha / (math.sqrt(rank) if self.by_root else rank)


def read_strength(path: Path, metadata: Mapping[str, str] | None, by_peft: bool) -> Strength | None:
    """From the file's header (diffusers), or ``adapter_config.json`` beside what PEFT saved; None where neither has it.

    ``ValueError`` for what cannot be read, and for PEFT's other ways to train, whose files act in PEFT alone.
    """
    beside, source = path.with_name("adapter_config.json"), f"the header of {path.name}"
    text = (metadata or {}).get("lora_adapter_metadata")
    if text is None and by_peft and beside.is_file():
        text, source = beside.read_text("utf-8"), beside.name
    try:
        # diffusers writes the part of its pipeline before each name; the first is the network.
        stated = reversed((json.loads(text or "{}") or {}).items())
        config = {name.rsplit(".", maxsplit=1)[-1]: value for name, value in stated}
        alpha = config.get("lora_alpha", config.get("alpha"))  # the latter of PEFT's LoHa and LoKr
        patterns = {re.compile(rf"(.*\.)?({key})$"): float(value) for key, value in (config.get("alpha_pattern") or {}).items()}
        found = Strength(
            float(0 if alpha is None else alpha), float(config.get("r", 1)), patterns, bool(config.get("use_rslora")), source
        )
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise ValueError(
            f"{source} ({len(text or '')} characters) does not say how strong the LoRA is: {error}.\n"
            "Copy it again from where the LoRA was trained, or take it away: alpha then counts as the rank."
        ) from error
    _check_kind(config.get("peft_type", KINDS[0]), str(config.get("init_lora_weights")), source)
    return None if alpha is None else found


def _check_kind(kind: str, beginning: str, source: str) -> None:
    if kind not in KINDS:
        raise ValueError(
            f"{source} says that this is {kind}; of PEFT's kinds ComfyUI can apply {len(KINDS)}: {', '.join(KINDS)}.\n"
            "Train one of these, or merge it into the checkpoint where it was trained."
        )
    if beginning.startswith(OTHER_BASES):
        raise ValueError(
            f"{source} says that training began with {beginning}, which changes the model too.\n"
            "Save it with PEFT's path_initial_model_for_weight_conversion: that makes it a LoRA of the model as it was."
        )


def sides(lora: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The tensors for MODEL and those for CLIP, or all for both where a file has but one kind."""
    of_clip = {name: tensor for name, tensor in lora.items() if OF_CLIP.match(name)}
    of_model = {name: tensor for name, tensor in lora.items() if name not in of_clip}
    return [of_model, of_clip] if of_model and of_clip else [lora]


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
    if any(what.startswith("lora_E") for parts in modules.values() for what in parts):
        _check_kind("ADALORA", "", "The file")
    result = {}
    for path, parts in modules.items():
        fitting = _in_our_words(_fitting(parts, path, shapes), path, strength, weight)
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
        EMBEDDING.get(what, what): Part(name, tensor.T.contiguous() if what in EMBEDDING and tensor.ndim == 2 else tensor)
        for what, (name, tensor) in parts.items()
    }
    shape = shapes[f"{path}.weight"]
    pair = next((pair for pair in PAIRS if all(what in parts for what in pair)), ())
    fits = bool(pair) and _fits(*(parts[what].tensor for what in pair), shape)
    unfit = {what for what in chain(*PAIRS) if not (fits and what in pair)}
    unfit |= {what for what, of in WHOLE.items() if what in parts and parts[what].tensor.shape != shapes.get(f"{path}.{of}")}
    if fits:  # PEFT may keep the weight itself beside its change, and ComfyUI would take that alone
        unfit.add("saved.weight")
    for kind, combined in LYCORIS.items():
        if combined(_factor(parts, f"{kind}_w1"), _factor(parts, f"{kind}_w2")) != (shape[0], math.prod(shape[1:])):
            unfit |= {what for what in parts if what.startswith(kind)}
    kept = {what: part for what, part in parts.items() if what not in unfit}
    return kept if any(what not in SETTINGS for what in kept) else {}


def _fits(first: Tensor, second: Tensor, shape: tuple[int, ...]) -> bool:
    (inner, columns), (rows, outer) = _matrix(first), _matrix(second)
    return 0 < inner == outer and (rows, columns) == (shape[0], math.prod(shape[1:]))


def _factor(parts: dict[str, Part], name: str) -> tuple[int, int]:
    """The shape of a factor, which may be a product of two; (0, 0) where it is not there."""
    names = (name, name) if name in parts else (f"{name}_a", f"{name}_b")
    (rows, _), (_, columns) = (_matrix(parts[what].tensor) if what in parts else (0, 0) for what in names)
    return rows, columns


def _matrix(tensor: Tensor) -> tuple[int, int]:
    """Rows and columns; none of a matrix that was saved flat, in part (FSDP, ZeRO)."""
    return (len(tensor), tensor[0].numel()) if tensor.ndim > 1 and len(tensor) else (0, 0)


# LyCORIS' factors of a change: multiplied element by element (LoHa), or each with each (LoKr).
LYCORIS = {
    "hada": lambda first, second: first if first == second else None,
    "lokr": lambda first, second: (first[0] * second[0], first[1] * second[1]),
}


def _in_our_words(
    parts: dict[str, Part], path: str, strength: Strength | None, weight: Callable[[str], Tensor]
) -> dict[str, Part]:
    """What PEFT means by its parts, in ComfyUI's."""
    parts = _with_alpha(dict(parts), path, strength)
    for saved, change in (("weight", "diff"), ("bias", "diff_b")):
        if f"saved.{saved}" in parts:  # a change has a strength, and comes on top of other LoRAs
            name, tensor = parts.pop(f"saved.{saved}")
            parts[change] = Part(name, tensor.float() - weight(f"{path}.{saved}").to(tensor.device))
    if "lora_A.weight" not in parts:
        return parts
    first, second = (parts[what].tensor.float() for what in PAIRS[0])
    scale = parts["alpha"].tensor.item() / len(first) if "alpha" in parts else 1.0
    if "lora_B.bias" in parts:
        name, bias = parts.pop("lora_B.bias")
        parts["diff_b"] = Part(name, bias * scale)
    if "lora_magnitude_vector" in parts:
        name, magnitude = parts.pop("lora_magnitude_vector")
        parts["dora_scale"] = Part(name, _dora_scale(magnitude.float(), scale * second @ first, weight(f"{path}.weight")))
    return parts


def _with_alpha(parts: dict[str, Part], path: str, strength: Strength | None) -> dict[str, Part]:
    """With an alpha, from which ComfyUI makes PEFT's factor."""
    if strength is None or "alpha" in parts:
        return parts
    with_rank = (*(first for first, _ in PAIRS), "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
    ranked = next((what for what in with_rank if what in parts), None)
    if ranked is not None:
        name, tensor = parts[ranked]
        scale = strength.scale(path, strength.rank if ranked.startswith("lokr") else len(tensor))
        parts["alpha"] = Part(name, torch.tensor(scale * len(tensor)))
    elif "lokr_w1" in parts:  # ComfyUI scales what has a rank alone
        name, tensor = parts["lokr_w1"]
        parts["lokr_w1"] = Part(name, tensor * strength.scale(path, strength.rank))
    return parts


def _dora_scale(magnitude: Tensor, change: Tensor, before: Tensor) -> Tensor:
    """PEFT's magnitudes as ComfyUI reads them."""
    if len(magnitude.flatten()) != len(before):  # of an embedding's columns: both divide by the changed ones
        return magnitude.view(1, -1)
    # Of rows PEFT divides by the changed ones' norms, ComfyUI by those of the rows as they were.
    before = before.to(change.device)
    return (magnitude.flatten() * before.norm(dim=1) / (before + change).norm(dim=1))[:, None]
