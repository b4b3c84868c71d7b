"""Load Lance: files of ComfyUI's own model folders -> MODEL, CLIP, VAE."""

import logging
from pathlib import Path

import comfy.sd

from ..lance_runtime.checkpoint import TensorFile, guess_variant
from ..lance_runtime.files import COMFYUI_TOKENIZER, read_tokenizer
from .clip import make_clip
from .model_files import NANO_CHOICE, model_files, model_path
from .model_loading import WEIGHT_TYPES, load_model
from .pictures import mark_sizes
from .schema import CATEGORY, io
from .vae import load_vae
from .vit import AUTO as AUTO_VIT
from .vit import VisionTower

LOGGER = logging.getLogger("lance")
VARIANTS = ["auto", "image", "video"]
# Qwen2.5's, for checkpoints without one, wherever they lie.
BUNDLED = Path(comfy.sd.__file__).parents[1] / COMFYUI_TOKENIZER


class LanceNativeLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        vits = [AUTO_VIT, *model_files("text_encoders")]
        return io.Schema(
            node_id="LanceNativeLoader",
            display_name="Load Lance",
            category=CATEGORY,
            description="Loads Lance as an ordinary MODEL, CLIP and VAE. MODEL and CLIP share one copy of the weights.",
            search_aliases=["lance", "bytedance", "load lance", "nano", "multimodal", "checkpoint"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=model_files("diffusion_models"),
                    tooltip="The Lance checkpoint (models/diffusion_models): Lance_3B for images, Lance_3B_Video for videos. "
                    "Lance Nano is a tiny one that knows plain shapes and colours: it needs no other file.",
                ),
                io.Combo.Input(
                    "vit_name",
                    options=vits,
                    default=AUTO_VIT,
                    tooltip="The vision tower (models/text_encoders), for edits, references and questions. 'auto' takes the "
                    "checkpoint's own if it has one (the video checkpoint does), as the reference does.",
                ),
                io.Combo.Input(
                    "vae_name",
                    options=model_files("vae"),
                    tooltip="The Wan 2.2 VAE of 48 channels (models/vae).",
                ),
                io.Combo.Input(
                    "variant",
                    options=VARIANTS,
                    default="auto",
                    tooltip="What the checkpoint was trained for. 'auto' reads it from the file; it only steers warnings.",
                    advanced=True,
                ),
                io.Combo.Input(
                    "weight_type",
                    options=list(WEIGHT_TYPES),
                    default="default",
                    tooltip="How the weights are kept in memory. 'default' leaves it to ComfyUI: bfloat16 where the card can. "
                    "fp8 halves that.",
                    advanced=True,
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="Draws and edits: for KSampler and every other sampler."),
                io.Clip.Output(tooltip="Reads prompts and answers questions; the same weights as MODEL."),
                io.Vae.Output(tooltip="The Wan 2.2 VAE."),
            ],
        )

    @classmethod
    def validate_inputs(cls, model_name: str | None, vit_name: str | None, vae_name: str | None) -> bool | str:
        """As ComfyUI checks combos; but Nano brings its own vision tower and VAE, whatever a workflow names.

        A linked name comes as None, and is looked up when the node runs.
        """
        if model_name == NANO_CHOICE:
            return True
        named = {"diffusion_models": model_name, "text_encoders": vit_name, "vae": vae_name}
        for widget, (folder, name) in zip(("model_name", "vit_name", "vae_name"), named.items(), strict=True):
            if name not in (None, AUTO_VIT) and name not in (known := model_files(folder)):
                what = f"{widget} {name!r} is none"  # ComfyUI says this of every widget that is checked here
                return f"{what} of the {len(known)} files in models/{folder}: put it there, or choose another."
        return True

    @classmethod
    def execute(cls, model_name: str, vit_name: str, vae_name: str, variant: str, weight_type: str) -> io.NodeOutput:
        if model_name == NANO_CHOICE:
            vit_name, vae_name = AUTO_VIT, NANO_CHOICE
        path = model_path("diffusion_models", model_name)
        vae_path = model_path("vae", vae_name)
        file = TensorFile(path)
        tokenizer = read_tokenizer(file, BUNDLED)
        patcher = load_model(path, tokenizer, weight_type, _variant(file, variant))
        tower = VisionTower(path, vit_name, patcher.model.get_dtype_inference())
        vae = mark_sizes(load_vae(vae_path), patcher.model.sizes)
        return io.NodeOutput(patcher, make_clip(patcher, tower), vae)


def _variant(file: TensorFile, asked: str) -> str | None:
    if asked != "auto":
        return asked
    found = guess_variant(file)
    if found is None:
        LOGGER.warning(
            "[Lance] %s does not say whether it is the image or the video checkpoint; set 'variant'.", file.path.name
        )
    return found
