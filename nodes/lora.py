"""LoRAs of every naming: ComfyUI's own, PEFT's, and bare module paths."""

import logging
from collections.abc import Iterable
from typing import Any

import comfy.sd
import comfy.utils
import folder_paths

from .schema import CATEGORY, io

LOGGER = logging.getLogger("lance")
ROOT = "diffusion_model."
# What trainers put before the path of a module.
PREFIXES = (
    "base_model.model.",
    "base_model.",
    "module.",
    "_orig_mod.",
    "pipe.dit.",
    "transformer.",
    "model.diffusion_model.",
    "diffusion_model.",
    "unet.",
    "model.",
)
# What a path may lack at its front.
STEMS = ("", "language_model.", "language_model.model.")


def rename(name: str, modules: set[str]) -> str | None:
    """A LoRA tensor's name as ComfyUI knows it, ``diffusion_model.<module>.<rest>``; None where no module fits.

    modules: dotted paths of the network. Names of the ``lora_unet_`` kind are ComfyUI's already.
    """
    if name.startswith("lora_unet_"):
        return name if name.removeprefix("lora_unet_").split(".")[0] in {path.replace(".", "_") for path in modules} else None
    bare = name.replace(".default.", ".")
    for prefix in PREFIXES:
        bare = bare.removeprefix(prefix)
    parts = bare.split(".")
    for stem in STEMS:
        for end in range(len(parts) - 1, 0, -1):
            path = stem + ".".join(parts[:end])
            if path in modules:
                return ROOT + path + "." + ".".join(parts[end:])
    return None


def placed(lora: dict[str, Any], modules: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """The tensors that have a place, under ComfyUI's names, and the names of those that have none."""
    known, found, lost = set(modules), {}, []
    for name, tensor in lora.items():
        new = rename(name, known)
        if new is None:
            lost.append(name)
        else:
            found[new] = tensor
    return found, lost


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
        lora = comfy.utils.load_torch_file(path, safe_load=True)
        # Layers with weights alone: a LoRA of another model begins with names of containers, too.
        layers = model.model.diffusion_model.named_modules()
        found, lost = placed(lora, (name for name, layer in layers if hasattr(layer, "weight")))
        if not found:
            raise ValueError(
                f"None of the {len(lora)} tensors of {lora_name} belongs to Lance (the first is {next(iter(lora), 'none')}).\n"
                "Use a LoRA that was trained on Lance."
            )
        report = f"{len(found)} of {len(lora)} tensors placed."
        if lost:
            report += f" Without a place: {', '.join(lost[:5])}{', ...' if len(lost) > 5 else ''}"
            LOGGER.warning("[Lance] %s: %s", lora_name, report)
        same = strength_model == strength_clip and model.patches_uuid == clip.patcher.patches_uuid
        model, clip = comfy.sd.load_lora_for_models(model, clip, found, strength_model, strength_clip)
        if same:  # one set of weights: else ComfyUI moves all of them whenever the other side runs
            clip.patcher.patches_uuid = model.patches_uuid
        return io.NodeOutput(model, clip, report)
