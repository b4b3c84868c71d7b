"""A Lance file -> a patcher around ``LanceModel``, in the types that ComfyUI's own rules choose."""

from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.utils
import torch
from torch import Tensor

from ..lance_runtime.checkpoint import (
    MODEL_RULES,
    TensorFile,
    apply_rules,
    check_names,
    guess_variant,
    model_tensors,
)
from ..lance_runtime.components import build_lance
from ..lance_runtime.dequantize import plain_tensors
from ..lance_runtime.files import HEADER_FILES, header_of, read_config
from ..lance_runtime.tokenizer import LanceTokenizer
from .model import LanceModelConfig

WEIGHT_TYPES = {
    "default": None,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


def load_model(
    path: str, tokenizer: LanceTokenizer, weight_type: str = "default", disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    """A Lance file as a patcher that ComfyUI manages; ``ValueError`` says what any other file is."""
    file = TensorFile(Path(path))
    found = plain_tensors(file).shapes  # before anything else: it names what is no Lance
    shape = read_config(file)
    check_names({name: tuple(value.shape) for name, value in build_lance(shape).named_parameters()}, found)
    config = LanceModelConfig(shape, tokenizer, guess_variant(file))
    state = _state(file)
    load_device = comfy.model_management.get_torch_device()
    _set_dtypes(config, state, load_device, WEIGHT_TYPES[weight_type])
    model = config.get_model(state)
    patcher_class = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = patcher_class(model, load_device=load_device, offload_device=comfy.model_management.unet_offload_device())
    model.header = {key: text for key, text in header_of(file).items() if key in HEADER_FILES}
    model.load_model_weights(state, "", assign=patcher.is_dynamic())
    callbacks = comfy.patcher_extension.CallbacksMP
    patcher.add_callback_with_key(callbacks.ON_CLEANUP, "lance", lambda patcher: patcher.model.free_prefixes())
    patcher.add_callback_with_key(callbacks.ON_DETACH, "lance", _forget_questions)
    patcher.cached_patcher_init = (load_model, (path, tokenizer, weight_type))
    return patcher


def _forget_questions(patcher: comfy.model_patcher.ModelPatcher, unpatch_all: bool) -> None:
    """When the model is unloaded. ComfyUI also detaches it at each load, to put a clone in its place: nothing changes."""
    if unpatch_all:
        patcher.model.prefixes_read.recent.clear()


def _state(file: TensorFile) -> dict[str, Tensor]:
    """A file's tensors under canonical names, quantised layers marked in the way that ComfyUI's layers read today."""
    state, metadata = comfy.utils.load_torch_file(str(file.path), return_metadata=True)
    state = {name: state[stored] for name, stored in model_tensors(file).names.items()}
    state, _ = comfy.utils.convert_old_quants(state, "", metadata=metadata)
    # The header may name layers with the prefix that their tensors had.
    return {apply_rules(name, MODEL_RULES): tensor for name, tensor in state.items()}


def _set_dtypes(config: LanceModelConfig, state: dict, device: torch.device, wanted: torch.dtype | None) -> None:
    """Weight and computing types by ComfyUI's own rules."""
    supported = config.supported_inference_dtypes
    quantised = comfy.utils.detect_layer_quantization(state, "")
    if quantised:
        config.quant_config = quantised
        wanted = None if wanted is not None and wanted.itemsize == 1 else wanted  # the other layers are small on purpose
    weight_dtype = None if quantised else comfy.utils.weight_dtype(state)
    size = comfy.utils.calculate_parameters(state)
    dtype = wanted or comfy.model_management.unet_dtype(
        model_params=size, supported_dtypes=list(supported), weight_dtype=weight_dtype
    )
    cast = comfy.model_management.unet_manual_cast(None if quantised else dtype, device, list(supported))
    config.set_inference_dtype(dtype, cast)
