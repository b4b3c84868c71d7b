"""The vision tower: a small model of its own in ComfyUI's memory management, loaded only to encode."""

from collections.abc import Iterator
from functools import cached_property
from itertools import chain
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import folder_paths
import numpy as np
import torch
from torch import nn

from ..lance_runtime.checkpoint import TensorFile, has_own_vit, identify
from ..lance_runtime.components import assign
from ..lance_runtime.config import VisionConfig
from ..lance_runtime.context import Segment
from ..lance_runtime.dequantize import plain_vit_tensors
from ..lance_runtime.files import NANO, VIT_FOLDER, VIT_NAME, read_config, read_vision_config, whole_files
from ..lance_runtime.model.vision import build_vision, encode_vision
from ..lance_runtime.preprocess import vit_patches
from ..lance_runtime.reuse import VisionTokenCache
from ..lance_runtime.types import LatentShape
from .attention import comfy_attention
from .model_files import model_path

AUTO = "auto"
FOLDER = "text_encoders"
OUTPUT = "merger.mlp.2.weight"  # as many rows as the model is wide


class WholePatcher(comfy.model_patcher.ModelPatcher):
    """A model that is on its device as a whole or not at all, however little memory there is.

    ComfyUI leaves parts behind only where its own layers fetch them as they run; the tower's layers are transformers'.
    """

    def load(
        self,
        device_to: torch.device | None = None,
        lowvram_model_memory: float = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
    ) -> None:
        super().load(device_to, force_patch_weights=force_patch_weights, full_load=True)

    def partially_unload(self, device_to: torch.device, memory_to_free: float = 0, force_patch_weights: bool = False) -> int:
        """Nothing is freed, whereupon ComfyUI unloads all."""
        return 0


class _Tower(nn.Module):
    """Holds transformers' module: ComfyUI wants to write ``device``, which transformers makes read-only."""

    def __init__(self, vision: nn.Module) -> None:
        super().__init__()
        self.vision = vision


class VisionTower:
    """Finds, loads and runs the ViT when the first picture is to be read.

    name: a file of models/text_encoders; "auto" is the checkpoint's own, that of its tree, or the first
    there that is as wide as the model; Nano's is built in.
    """

    def __init__(self, model_path: str, name: str, dtype: torch.dtype) -> None:
        self.model_path, self.name, self.dtype = model_path, name, dtype
        self._patcher: WholePatcher | None = None
        self.cache = VisionTokenCache()

    def encode(self, frames: np.ndarray, preset: str) -> Segment:
        """uint8 (T, H, W, 3) -> the ViT tokens of one image or clip, on the CPU; the same object for the same pixels."""
        return self.cache.tokens(frames, preset, self._encode)

    def _encode(self, frames: np.ndarray, preset: str) -> Segment:
        patcher = self._loaded()
        patches, (t, h, w) = vit_patches(frames, preset, self.config)
        # Peak beside the weights: a few copies of the widest rows (the MLP's), and the patches.
        needed = 6 * len(patches) * self.config.intermediate_size * self.dtype.itemsize
        comfy.model_management.load_models_gpu([patcher], memory_required=needed)
        with torch.no_grad():
            found = encode_vision(patcher.model.vision, patches.to(patcher.load_device, self.dtype), (t, h, w))
        merge = self.config.spatial_merge_size
        return Segment.vit(found, LatentShape(t, h // merge, w // merge))

    @cached_property
    def config(self) -> VisionConfig:
        return read_vision_config(*self._config_source(self._file()))

    def _loaded(self) -> WholePatcher:
        if self._patcher is None:
            file = self._file()
            vision = build_vision(self.config, attention=comfy_attention())
            device = comfy.model_management.text_encoder_offload_device()
            assign(vision, plain_vit_tensors(file), self.dtype, device)
            # Where MODEL is, for whose device the type was chosen. ComfyUI's text encoders are on the CPU of a Mac, say.
            self._patcher = WholePatcher(_Tower(vision), comfy.model_management.get_torch_device(), device)
        return self._patcher

    def _config_source(self, file: TensorFile) -> tuple[TensorFile | None, Path]:
        """The checkpoint's own tower has no configuration beside it: that of the separate one holds for both."""
        if not has_own_vit(file):
            return file, file.path.with_name("config.json")
        beside = file.path.parent.parent / VIT_FOLDER / "config.json"
        return None if beside.is_file() else next(_towers(), None), beside

    def _file(self) -> TensorFile:
        if self.name != AUTO:
            return TensorFile(model_path(FOLDER, self.name))
        model = TensorFile(self.model_path)
        if has_own_vit(model):
            return model
        width, beside = read_config(model).hidden_size, model.path.parent.parent / VIT_FOLDER / VIT_NAME
        known = chain([TensorFile(beside)] if beside.is_file() else [], _towers(), [TensorFile(NANO / VIT_FOLDER / VIT_NAME)])
        found = next((file for file in known if plain_vit_tensors(file).shapes.get(OUTPUT, (0,))[0] == width), None)
        if found is None:
            raise FileNotFoundError(
                f"Lance needs its vision tower to read pictures: 0 of {len(folder_paths.get_filename_list(FOLDER))} files in "
                f"models/{FOLDER} hold one that is {width} wide.\n"
                "Put Qwen2.5-VL-ViT/vit.safetensors of bytedance-research/Lance there."
            )
        return found


def _towers() -> Iterator[TensorFile]:
    """Every vision tower among ComfyUI's text encoders."""
    paths = (folder_paths.get_full_path(FOLDER, name) for name in folder_paths.get_filename_list(FOLDER))
    found = whole_files(Path(path) for path in paths if path is not None and path.endswith(".safetensors"))
    return (file for file in found if identify(file) == "a vision tower alone")
