"""The VAE is ComfyUI's own; a file of another width gets the same class, as wide as its weights."""

from pathlib import Path
from typing import Any

import comfy.ldm.wan.vae2_2
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.utils
import torch

from ..lance_runtime.checkpoint import HUB, WAN_22, TensorFile, identify

WIDTHS = (160, 256)
SHAPE = {"z_dim": 48, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "temperal_downsample": [False, True, True]}


def load_vae(path: str) -> comfy.sd.VAE:
    """A Wan 2.2 VAE of any width; ``ValueError`` says what any other file is."""
    file = TensorFile(Path(path))
    what = identify(file)
    if what != WAN_22:
        raise ValueError(
            f"{file.path.name} is {what}; Lance needs one of 48 channels.\nUse wan2.2_vae.safetensors, or the .pth of {HUB}."
        )
    widths = file.shapes["encoder.conv1.weight"][0], file.shapes["decoder.conv1.weight"][0] // 4
    state, metadata = comfy.utils.load_torch_file(path, return_metadata=True)
    if widths == WIDTHS:
        return comfy.sd.VAE(sd=state, metadata=metadata)
    return _vae_of_width(state, widths)


def _vae_of_width(state: dict, widths: tuple[int, int]) -> comfy.sd.VAE:
    """ComfyUI's loader knows the published widths only: let it make its object on the meta device, then change the net."""
    with torch.device("meta"):
        published = _network(WIDTHS)
        vae = comfy.sd.VAE(sd=published.state_dict())
    vae.first_stage_model = _network(widths).train(False).to(vae.vae_dtype)
    comfy.model_management.archive_model_dtypes(vae.first_stage_model)
    offload = comfy.model_management.vae_offload_device()
    vae.patcher = comfy.model_patcher.CoreModelPatcher(vae.first_stage_model, load_device=vae.device, offload_device=offload)
    vae.first_stage_model.load_state_dict(state, strict=True, assign=vae.patcher.is_dynamic())
    vae.size = None
    vae.model_size()
    return vae


def _network(widths: tuple[int, int]) -> Any:
    return comfy.ldm.wan.vae2_2.WanVAE(dim=widths[0], dec_dim=widths[1], **SHAPE)
