"""A Lance file -> a patcher around ``LanceModel``, in the types that ComfyUI's own rules choose."""

from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.patcher_extension
import comfy.utils
import torch
from torch import Tensor

from ..lance_runtime.checkpoint import (
    QUANT_TENSOR,
    TensorFile,
    canonical_name,
    check_names,
    guess_variant,
    has_own_vit,
    model_names,
    pack_json,
    unpack_json,
)
from ..lance_runtime.components import build_lance
from ..lance_runtime.dequantize import plain_tensors, plain_vit_tensors
from ..lance_runtime.files import HEADER_FILES, LATENT_RGB, header_of, read_config
from ..lance_runtime.quant_formats import FULL_PRECISION
from ..lance_runtime.tokenizer import LanceTokenizer
from .model import LanceModelConfig

WEIGHT_TYPES = {
    "default": None,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
# memory_usage_factor where int8 products are first written as int32 and float32; derived, not measured.
INT8_IN_PARTS = 7.5
LEAST_MEMORY = 0.1  # bytes for weights: ComfyUI takes 0 for "all there is"


HEAD, TABLE = (f"diffusion_model.language_model.{name}" for name in ("lm_head", "model.embed_tokens"))


class Ranked:
    """Ranks weights by who reads them, where memory is short; ComfyUI ranks by size alone.

    The understanding expert's are first, which pictures, prompts and answers read: on a card for half the weights answers
    copy little more than the head, and drawing copies as many as before. The head, read for answers alone, comes after both
    experts. Last is the embedding table, of which only rows are read, in main memory (but all of it under a LoRA).
    """

    def _load_list(self, *args: Any, **more: Any) -> list[tuple]:
        return [self._ranked(*entry) for entry in super()._load_list(*args, **more)]  # type: ignore[misc]

    def _ranked(self, *entry: Any) -> tuple:
        """An entry of ComfyUI's list: (ranks, size in memory, name, module, parameters).

        The dynamic management takes the lowest first of (whether it is large, minus its size). The plain one takes the
        highest first, and reserves room by that rank and by the sizes of the next modules: the experts are told apart among
        equals only, and the head stands behind all products and before the norms, so that none of them waits for its size.
        """
        *ranks, memory, name, module, parameters = entry
        if len(ranks) == 2:
            ranks.insert(1, 2 if name in (HEAD, TABLE) else int("_moe_gen" in name))
        elif name == HEAD:
            ranks = [8 * module.in_features]  # a norm has at most 4 bytes for each
        elif name == TABLE and f"{TABLE}.weight" not in self.patches:  # type: ignore[attr-defined]
            ranks = [-1]
        else:
            ranks = [ranks[0] - ("_moe_gen" in name)]
        return (*ranks, memory, name, module, parameters)


class DynamicPatcher(Ranked, comfy.model_patcher.ModelPatcherDynamic):
    """The patcher of MODEL and CLIP where ComfyUI brings weights to the card as they are read."""


class SharedPatcher(Ranked, comfy.model_patcher.ModelPatcher):
    """The patcher of MODEL or of CLIP, which share one module: weights follow to the device of the side that runs."""

    def partially_load(self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False) -> int:
        if self.model.model_loaded_weight_memory > 0 and self.model.device != device_to:
            self.detach()  # ComfyUI would take what is loaded to be where it is wanted
            extra_memory = max(extra_memory, LEAST_MEMORY)
        return super().partially_load(device_to, extra_memory, force_patch_weights)


def load_model(
    path: str,
    tokenizer: LanceTokenizer,
    weight_type: str = "default",
    variant: str | None = None,
    disable_dynamic: bool = False,
) -> comfy.model_patcher.ModelPatcher:
    """A Lance file as a patcher that ComfyUI manages; ``ValueError`` says what any other file is.

    variant: which checkpoint it is, where the file does not say it.
    """
    file = TensorFile(Path(path))
    found = plain_tensors(file).shapes  # before anything else: it names what is no Lance
    shape = read_config(file)
    check_names({name: tuple(value.shape) for name, value in build_lance(shape).named_parameters()}, found)
    header = {key: text for key, text in header_of(file).items() if key in HEADER_FILES}
    config = LanceModelConfig(shape, tokenizer, variant or guess_variant(file), header.get(LATENT_RGB))
    state = _state(file)
    load_device = comfy.model_management.get_torch_device()
    _set_dtypes(config, state, load_device, WEIGHT_TYPES[weight_type])
    model = config.get_model(state)
    dynamic = not disable_dynamic and comfy.model_patcher.CoreModelPatcher is not comfy.model_patcher.ModelPatcher
    patcher_class = DynamicPatcher if dynamic else SharedPatcher
    patcher = patcher_class(model, load_device=load_device, offload_device=comfy.model_management.unet_offload_device())
    model.header = header
    model.own_tower = plain_vit_tensors(file) if has_own_vit(file) else {}
    if not comfy.model_management.is_device_cpu(patcher.offload_device):  # --highvram: no copy in main memory
        model.to(patcher.offload_device)
    model.load_model_weights(state, "", assign=patcher.is_dynamic())
    if not patcher.is_dynamic():
        _cast_late_layers(model)
    callbacks = comfy.patcher_extension.CallbacksMP
    patcher.add_callback_with_key(callbacks.ON_CLEANUP, "lance", lambda patcher: patcher.model.free_prefixes())
    patcher.add_callback_with_key(callbacks.ON_DETACH, "lance", _forget_questions)
    patcher.cached_patcher_init = (load_model, (path, tokenizer, weight_type, variant))
    return patcher


def _cast_late_layers(model: torch.nn.Module) -> None:
    """To the model's types: layers to which ComfyUI gives memory only as they are loaded take their file's types.

    It does so wherever it knows dynamic VRAM (0.26: on Windows), whose management casts them later; the plain one does not.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            dtype = getattr(module, f"{name}_comfy_model_dtype", parameter.dtype)
            if dtype != parameter.dtype:
                setattr(module, name, torch.nn.Parameter(parameter.to(dtype), requires_grad=False))


def _forget_questions(patcher: comfy.model_patcher.ModelPatcher, unpatch_all: bool) -> None:
    """When the model is unloaded. ComfyUI also detaches it at each load, to put a clone in its place: nothing changes."""
    if unpatch_all:
        patcher.model.question_cache.entries.clear()


def _state(file: TensorFile) -> dict[str, Tensor]:
    """A file's tensors under canonical names, quantised layers marked in the way that ComfyUI's layers read today."""
    state, metadata = (file, {}) if file.is_pickle else comfy.utils.load_torch_file(str(file.path), return_metadata=True)
    state = {name: state[stored] for name, stored in model_names(file).items()}
    state, _ = comfy.utils.convert_old_quants(state, "", metadata=metadata)
    # The header may name layers with the prefix that their tensors had.
    state = {canonical_name(name): tensor for name, tensor in state.items()}
    for name in [name for name in state if name.endswith(QUANT_TENSOR)]:
        how = unpack_json(state[name])
        # A file of others may not say it (see FULL_PRECISION), and a card that multiplies in fp8 would cut the inputs.
        if how["format"].startswith("float8") and name.replace(QUANT_TENSOR, ".input_scale") not in state:
            state[name] = pack_json({**FULL_PRECISION, **how})
    return state


def multiplies_in_parts() -> bool:
    """Whether int8 layers write whole numbers out first: ComfyUI's compiled product needs CUDA 13."""
    return torch.version.cuda is None or int(torch.version.cuda.split(".")[0]) < 13


def _set_dtypes(config: LanceModelConfig, state: dict, device: torch.device, wanted: torch.dtype | None) -> None:
    """Weight and computing types by ComfyUI's own rules."""
    supported = config.supported_inference_dtypes
    quantised = comfy.utils.detect_layer_quantization(state, "")
    if quantised:
        config.quant_config = quantised
        formats = {unpack_json(tensor)["format"] for name, tensor in state.items() if name.endswith(QUANT_TENSOR)}
        if multiplies_in_parts() and any(name.startswith("int8") for name in formats):
            config.memory_usage_factor = INT8_IN_PARTS
        wanted = None if wanted is not None and wanted.itemsize == 1 else wanted  # the other layers are small on purpose
    weight_dtype = None if quantised else comfy.utils.weight_dtype(state)
    size = comfy.utils.calculate_parameters(state)
    dtype = wanted or comfy.model_management.unet_dtype(
        model_params=size, supported_dtypes=list(supported), weight_dtype=weight_dtype
    )
    dtype = torch.bfloat16 if dtype == torch.float16 else dtype  # --fp16-unet does not ask what a model supports
    if not quantised and dtype.itemsize == 1:
        config.custom_operations = comfy.ops.manual_cast  # --fast would multiply in fp8, inputs cut at 448
    cast = comfy.model_management.unet_manual_cast(None if quantised else dtype, device, list(supported))
    config.set_inference_dtype(dtype, cast)
