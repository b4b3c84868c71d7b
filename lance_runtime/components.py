"""Files -> modules: built on the meta device, each weight read once and assigned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .checkpoint import TensorFile, Tensors, check_names
from .config import EMBED_KEY, LanceConfig, VisionConfig
from .dequantize import plain_tensors, plain_vit_tensors
from .engine import Engine
from .files import Sources
from .model.transformer import Lance
from .model.vision import build_vision
from .tokenizer import LanceTokenizer
from .vae import WanVAE


@dataclass(frozen=True, eq=False)
class Components:
    """The parts of a model, on one device and in one dtype."""

    model: Lance
    vision: nn.Module | None
    vae: WanVAE
    tokenizer: LanceTokenizer
    vision_config: VisionConfig | None
    device: torch.device
    dtype: torch.dtype
    cuda_graphs: bool = False

    @property
    def engine(self) -> Engine:
        return Engine(self.model, self.dtype, self.device, cuda_graphs=self.cuda_graphs)

    @property
    def modules(self) -> list[nn.Module]:
        return [part for part in (self.vision, self.model, self.vae.module) if part is not None]


def build_lance(config: LanceConfig) -> Lance:
    """The network on the meta device: no memory, no initialisation."""
    with torch.device("meta"):
        model = Lance(config)
    return model.train(False).requires_grad_(False)


def load_components(
    sources: Sources, dtype: torch.dtype, device: torch.device, weights_on: torch.device, cuda_graphs: bool = False
) -> Components:
    """Build and load all parts. weights_on: where the weights are put first (the CPU where they are offloaded)."""
    model = build_lance(sources.config)
    assign(model, plain_tensors(sources.model), dtype, weights_on, in_main_memory=EMBED_KEY)  # its rows are looked up there
    vision = None
    if sources.vision is not None:
        vision = build_vision(sources.vision)
        assign(vision, plain_vit_tensors(sources.vit or sources.model), dtype, weights_on)
    vae = WanVAE.from_tensors(TensorFile(sources.vae), dtype=dtype, device=weights_on)
    vae.device = device  # where it computes; an offloading hook brings its weights there
    return Components(model, vision, vae, sources.tokenizer, sources.vision, device, dtype, cuda_graphs)


def assign(
    module: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device, in_main_memory: str = ""
) -> None:
    """Put tensors into a module on the meta device, one at a time, cast on the way; ``ValueError`` unless all fit.

    in_main_memory: the name of one that stays on the CPU. At most the module and one tensor are in memory. On the CPU,
    tensors that need no cast stay mapped to the file.
    """
    expected = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    found = tensors.shapes if isinstance(tensors, Tensors) else {name: tuple(t.shape) for name, t in tensors.items()}
    check_names(expected, found)
    for name in expected:
        owner, _, leaf = name.rpartition(".")
        tensor = tensors[name].to(device="cpu" if name == in_main_memory else device, dtype=dtype)
        module.get_submodule(owner).register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
