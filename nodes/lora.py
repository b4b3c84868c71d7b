"""Load LoRA (Lance): a LoRA of any trainer on MODEL and CLIP, and a report of what of it acts."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_patcher
import comfy.sd
import comfy.utils
import folder_paths
from torch import Tensor

from .lora_files import BY_PEFT, ROOT, Part, Strength, read_strength, sides, translate
from .schema import CATEGORY, io

LOGGER = logging.getLogger("lance")
NVFP4 = "TensorCoreNVFP4Layout"  # ComfyUI's name of it


class Recorded(dict[str, Tensor]):
    """Tensors that remember which of them were asked for: ComfyUI does not say what it used."""

    def __init__(self, parts: dict[str, Part]) -> None:
        super().__init__({name: part.tensor for name, part in parts.items()})
        self.parts = parts
        self.used: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.used.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.used.add(name)
        return super().get(name, default)

    def origins(self) -> set[str]:
        """The names in the file of what was asked for."""
        return {part.origin for name, part in self.parts.items() if name in self.used}


class LanceNativeLoraLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        strength = {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01}
        return io.Schema(
            node_id="LanceNativeLoraLoader",
            display_name="Load LoRA (Lance)",
            category=CATEGORY,
            description="Loads a LoRA in any naming (ComfyUI, PEFT, bare paths) and says what it could not place.",
            search_aliases=["lora", "peft", "adapter"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL of Load Lance, or of a LoRA loader before this one."),
                io.Clip.Input("clip", tooltip="The CLIP of Load Lance, or of a LoRA loader before this one."),
                io.Combo.Input(
                    "lora_name", options=folder_paths.get_filename_list("loras"), tooltip="A LoRA for Lance (models/loras)."
                ),
                io.Float.Input("strength_model", **strength, tooltip="How much it changes pictures."),
                io.Float.Input("strength_clip", **strength, tooltip="How much it changes answers."),
            ],
            outputs=[
                io.Model.Output(tooltip="The MODEL with the LoRA."),
                io.Clip.Output(tooltip="The CLIP with the LoRA."),
                io.String.Output(
                    display_name="report", tooltip="How many of the file's tensors found a place, and which did not."
                ),
            ],
        )

    @classmethod
    def execute(cls, model: Any, clip: Any, lora_name: str, strength_model: float, strength_clip: float) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise("loras", lora_name)
        lora, metadata = _read(path)
        strength = read_strength(Path(path), metadata, any(name.startswith(BY_PEFT) for name in lora))
        shapes = {name: tuple(value.shape) for name, value in model.model.diffusion_model.named_parameters()}
        found = [Recorded(translate(side, shapes, strength, _weights(model))) for side in sides(lora)]
        same = len(found) == 1 and strength_model == strength_clip and model.patches_uuid == clip.patcher.patches_uuid
        loaded = [comfy.sd.load_lora_for_models(model, clip, side, strength_model, strength_clip) for side in found]
        (model, _), (_, clip) = loaded[0], loaded[-1]
        placed = set().union(*(side.origins() for side in found))
        if not placed:
            first = next((f"{name} {tuple(tensor.shape)}" for name, tensor in lora.items()), "none")
            raise ValueError(
                f"None of the {len(lora)} tensors of {lora_name} fits Lance (the first is {first}).\n"
                "Use a LoRA that was trained on Lance."
            )
        if same:  # one set of weights: else ComfyUI moves all of them whenever the other side runs
            clip.patcher.patches_uuid = model.patches_uuid
        report = [f"{len(placed)} of {len(lora)} tensors placed.", *_about_alpha(lora, strength)]
        if any(getattr(layer, "layout_type", None) == NVFP4 for layer in model.model.diffusion_model.modules()):
            report.append(
                "ComfyUI rounds nvfp4 weights again with a LoRA in them, which is rough. "
                "Load LoRA (Bypass) (For debugging) does not, where the LoRA has ComfyUI's names."
            )
        if lost := [name for name in lora if name not in placed]:
            report.append(f"Without a place: {', '.join(lost[:5])}{', ...' if len(lost) > 5 else ''}")
            LOGGER.warning("[Lance] %s: %s", lora_name, " ".join(report))
        return io.NodeOutput(model, clip, " ".join(report))


def _read(path: str) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    try:
        return comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
    except Exception as error:
        reason = str(error).split("\n", maxsplit=1)[0]
        raise ValueError(
            f"{Path(path).name} ({Path(path).stat().st_size} bytes) cannot be read: {reason}\nDownload or copy it again."
        ) from error


def _about_alpha(lora: dict[str, Tensor], strength: Strength | None) -> list[str]:
    """Where the strength of PEFT's matrices is from, which are in a file of their own without it."""
    if any(name.endswith(".alpha") for name in lora):
        return []
    if strength is not None:
        return [f"Alpha is {strength.alpha:g}, says {strength.source}."]
    saved_by_peft = any(name.startswith(BY_PEFT) for name in lora)
    return ["No adapter_config.json lies beside it: alpha counts as the rank."] if saved_by_peft else []


def _weights(model: Any) -> Callable[[str], Tensor]:
    """The network's tensors as they are without any LoRA, whole, in float32."""

    def weight(name: str) -> Tensor:
        stored, _, decode = comfy.model_patcher.get_key_weight(model.model, ROOT + name)
        stored = model.backup[ROOT + name].weight if ROOT + name in model.backup else stored  # a LoRA is in it
        return (stored if decode is None else decode(stored)).float()

    return weight
