"""Wan 2.2's causal video VAE (48 channels, 16x spatial, 4x temporal): diffusers' class under the original names."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .checkpoint import check_names
from .tiling import decode_tiled, encode_tiled
from .types import TEMPORAL_STRIDE, LatentShape, PixelShape

CHANNELS = 48
CHANNELS_LAST_CUDNN = range(90800, 91500)  # releases for which weights are laid out anew: see _laid_out

# diffusers' names -> Wan's, applied in this order to every key. diffusers' own conversion knows Wan 2.1 only, and lets
# 36 of the 196 keys of Wan 2.2 collide without a word.
RENAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^quant_conv\.", "conv1."),
        (r"^post_quant_conv\.", "conv2."),
        (r"\.conv_in\.", ".conv1."),
        (r"\.norm_out\.", ".head.0."),
        (r"\.conv_out\.", ".head.2."),
        (r"\.norm1\.", ".residual.0."),
        (r"resnets\.(\d+)\.conv1\.", r"resnets.\1.residual.2."),
        (r"\.norm2\.", ".residual.3."),
        (r"\.conv2\.", ".residual.6."),
        (r"\.conv_shortcut\.", ".shortcut."),
        (r"\.mid_block\.resnets\.0\.", ".middle.0."),
        (r"\.mid_block\.attentions\.0\.", ".middle.1."),
        (r"\.mid_block\.resnets\.1\.", ".middle.2."),
        (r"\.down_blocks\.(\d+)\.resnets\.", r".downsamples.\1.downsamples."),
        (r"\.down_blocks\.(\d+)\.downsampler\.", r".downsamples.\1.downsamples.2."),
        (r"\.up_blocks\.(\d+)\.resnets\.", r".upsamples.\1.upsamples."),
        (r"\.up_blocks\.(\d+)\.upsampler\.", r".upsamples.\1.upsamples.3."),
    )
)


class WanVAE:
    """Encodes to and decodes from the normalised latents that Lance sees, with the posterior's mean (no noise).

    ``module`` is diffusers' ``AutoencoderKLWan``, for offloading hooks. ``device`` is where inputs are sent: a module whose
    weights a hook moves in and out cannot say it itself. ``tiled``: large pictures go through in overlapping tiles, in much
    less memory; the result differs a little, since each tile sees itself only.
    """

    def __init__(self, module: Any) -> None:
        weight = next(module.parameters())
        self.module, self.dtype, self.device, self.tiled = module, weight.dtype, weight.device, False

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> WanVAE:
        """From the tensors of ``Wan2.2_VAE.pth`` or ``wan2.2_vae.safetensors``, under their original names.

        The weights are assigned, not copied, where ``dtype`` and ``device`` (default: as they are) do not ask for it.
        ``ValueError`` for Wan 2.1's VAE, for missing or unknown keys, and for shapes that do not fit.
        """
        _refuse_wan21(tensors)
        encoder, decoder = tensors.get("encoder.conv1.weight"), tensors.get("decoder.conv1.weight")
        with torch.device("meta"):  # as wide as the weights are
            module = build_vae(160 if encoder is None else encoder.shape[0], 256 if decoder is None else decoder.shape[0] // 4)
        names = {original_name(key): key for key in module.state_dict()}
        check_names(_shapes({name: module.state_dict()[key] for name, key in names.items()}), _shapes(tensors))
        state = {key: _laid_out(tensors[name].to(device=device, dtype=dtype)) for name, key in names.items()}
        module.load_state_dict(state, strict=True, assign=True)
        module.enable_slicing()  # one sample after the other: a clip's activations and caches take gigabytes
        return cls(module.train(False).requires_grad_(False))

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (3, T, H, W) in [-1, 1] -> normalised latents float32 (48, t, h, w); a batch (B, 3, ...) gives a batch.

        T is 4k + 1, and height and width are multiples of 16: ``ValueError`` otherwise.
        """
        shape = _check_pixels(pixels)
        batch = pixels if pixels.ndim == 5 else pixels[None]
        batch = batch.to(self.device, self.dtype)
        latents = encode_tiled(self._encode, batch) if self.tiled else self._encode(batch)
        mean, std = _statistics(latents.device)
        latents = (latents - mean) / std
        return latents.reshape(*pixels.shape[:-4], CHANNELS, *shape)

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (48, t, h, w) -> uint8 (T, H, W, 3) = round((x + 1) * 127.5), T = 4 (t - 1) + 1.

        A batch (B, 48, ...) gives a batch. The pixels stay on the device that computed them.
        """
        shape = _check_latents(latents)
        mean, std = _statistics(self.device)
        batch = latents if latents.ndim == 5 else latents[None]
        batch = (batch.to(self.device, torch.float32) * std + mean).to(self.dtype)
        pixels = decode_tiled(self._decode, batch) if self.tiled else self._decode(batch)
        pixels = pixels.float().add_(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
        return pixels.movedim(-4, -1).reshape(*latents.shape[:-4], *shape, 3)

    # The feature caches of a clip take gigabytes: an interrupted call must not keep them.

    def _encode(self, pixels: Tensor) -> Tensor:
        try:
            return self.module.encode(pixels).latent_dist.mode().float()
        finally:
            self.module.clear_cache()

    def _decode(self, latents: Tensor) -> Tensor:
        try:
            return self.module.decode(latents).sample
        finally:
            self.module.clear_cache()


def _laid_out(weight: Tensor) -> Tensor:
    """A weight in the order in which this cuDNN multiplies it.

    With these releases torch takes bfloat16 convolutions over clips to cuDNN only where the channels come last; the other
    way writes every window out, in several times the memory (pytorch, Convolution.cpp, ``use_cudnn``).
    """
    if weight.ndim == 5 and (torch.backends.cudnn.version() or 0) in CHANNELS_LAST_CUDNN:
        return weight.contiguous(memory_format=torch.channels_last_3d)
    return weight


def original_name(key: str) -> str:
    """Wan's own name of a parameter of diffusers' ``AutoencoderKLWan`` (reference: modeling/vae/wan/vae2_2.py)."""
    for pattern, replacement in RENAMES:
        key = pattern.sub(replacement, key)
    return key


def _refuse_wan21(tensors: Mapping[str, Tensor]) -> None:
    weight = tensors.get("conv2.weight")
    if weight is not None and weight.shape[0] != CHANNELS:
        name = "Wan 2.1's VAE" if weight.shape[0] == 16 else "another VAE"
        raise ValueError(
            f"this is {name}: it has {weight.shape[0]} latent channels, Lance's has {CHANNELS}.\n"
            "Use Wan2.2_VAE.pth of bytedance-research/Lance, or ComfyUI's wan2.2_vae.safetensors of 48 channels."
        )


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def build_vae(base_dim: int = 160, decoder_base_dim: int = 256) -> Any:
    """diffusers' ``AutoencoderKLWan`` as Wan 2.2 has it, with first weights; Wan's own widths by default."""
    # Here and not above: the runtime is also used where ComfyUI's VAE serves, without diffusers.
    from diffusers import AutoencoderKLWan

    vae: Any = AutoencoderKLWan(
        base_dim=base_dim,
        decoder_base_dim=decoder_base_dim,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=2,
        temperal_downsample=[False, True, True],
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_spatial=16,
    )
    causal, quick = _convolutions()
    for module in vae.modules():
        if type(module) is causal:
            module.__class__ = quick
    return vae


@cache
def _convolutions() -> tuple[type, type]:
    """diffusers' causal convolution, and one that does not multiply the zeros before a first frame.

    Of a picture, and of a clip's first frame, these are two of its three taps in time.
    """
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    class QuickCausalConv3d(WanCausalConv3d):
        def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
            left, _, top, _, before, _ = self._padding
            steps: Any = self.stride
            if cache_x is not None or x.shape[2] > 1 or before == 0 or steps[0] > 1:
                return super().forward(x, cache_x)
            return F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, steps[1:], (int(top), int(left)))[:, :, None]

    return WanCausalConv3d, QuickCausalConv3d


def _check_pixels(pixels: Tensor) -> LatentShape:
    if pixels.ndim not in (4, 5) or pixels.shape[-4] != 3:
        raise ValueError(
            f"pixels of shape {list(pixels.shape)} were given; [3, T, H, W] or [B, 3, T, H, W] is needed.\n"
            "Make them with preprocess.vae_pixels."
        )
    shape = PixelShape(*pixels.shape[-3:])
    latent = shape.latent()
    if latent.pixels() != shape:
        raise ValueError(
            f"{shape.frames} frames do not fill whole latent frames of {TEMPORAL_STRIDE}; the VAE would drop the rest.\n"
            f"Cut the clip to {latent.pixels().frames} frames (4k+1)."
        )
    return latent


def _check_latents(latents: Tensor) -> PixelShape:
    if latents.ndim not in (4, 5) or latents.shape[-4] != CHANNELS or 0 in latents.shape:
        raise ValueError(
            f"latents of shape {list(latents.shape)} were given; [{CHANNELS}, t, h, w] or [B, {CHANNELS}, t, h, w] is needed.\n"
            "Pass the latents as the model returned them."
        )
    return LatentShape(*latents.shape[-3:]).pixels()


@cache
def _table() -> dict[str, list[float]]:
    return json.loads(Path(__file__).with_name("wan22_statistics.json").read_text("utf-8"))


def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Means and deviations of the channels, float32 (48, 1, 1, 1)."""
    mean, std = (torch.tensor(_table()[name], device=device).view(-1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    return mean, std
