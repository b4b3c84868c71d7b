"""ComfyUI's pictures and latents <-> the runtime's."""

from typing import Any

import comfy.latent_formats
import comfy.model_management
import numpy as np
import torch
from torch import Tensor

from ..lance_runtime.context import Segment
from ..lance_runtime.preprocess import centre, fitted_pixels, presets, sample_frames, to_frames, vae_pixels
from ..lance_runtime.types import LANCE_3B, SPATIAL_STRIDE, TEMPORAL_STRIDE, LatentShape, TrainedSizes
from .schema import io

AUTO = "auto"
AS_IS = "as is"
# Nano's are not offered: "auto" takes them where the model is Nano.
RESOLUTIONS = [AUTO, *(preset for preset in presets() if preset not in ("image_96res", "video_96p"))]
FORMAT = comfy.latent_formats.Wan22()
FPS = 24.0
SAMPLED = "Seen at 12 frames a second; of more than 6 s, 69 frames spread over all of it."


def is_video(source: Any) -> bool:
    """VIDEO is an object with components; IMAGE is a tensor."""
    return hasattr(source, "get_components")


def frames_of(source: Any, fps: float = FPS, sizes: TrainedSizes = LANCE_3B) -> np.ndarray:
    """IMAGE (T, H, W, C) in 0..1, or VIDEO -> uint8 (T, H, W, 3); clips are sampled as the model was trained.

    A single image is one frame; several images are a clip at ``fps``. Transparency is laid on white.
    """
    if is_video(source):
        parts = source.get_components()
        images, fps = parts.images, float(parts.frame_rate)
    else:
        images = source
    seen = images[sample_frames(len(images), fps, sizes.seconds)] if len(images) > 1 else images
    return bytes_of(seen)  # these alone: a minute of video takes gigabytes more in every type that it passes


def bytes_of(images: Tensor) -> np.ndarray:
    """IMAGE (T, H, W, C) in 0..1 -> uint8 (T, H, W, 3)."""
    return to_frames(images.float().cpu().clamp(0, 1).mul(255).round().to(torch.uint8))


def preset_of(resolution: str, source: Any, sizes: TrainedSizes = LANCE_3B) -> str:
    """The resolution asked for; "auto" is the largest trained one for an image or a clip (of which one frame may be seen)."""
    return resolution if resolution != AUTO else sizes.preset(video=is_video(source) or len(source) > 1)


def seen(source: Any, resolution: str, sizes: TrainedSizes, fps: float = FPS) -> tuple[np.ndarray, str]:
    """The frames that are seen of an IMAGE or VIDEO, and the preset that they are seen at."""
    return frames_of(source, fps, sizes), preset_of(resolution, source, sizes)


def sizes_of(vae: Any) -> TrainedSizes:
    """What the model that a VAE was loaded with was trained on (``mark_sizes``)."""
    return getattr(vae, "lance_sizes", LANCE_3B)


def stills(images: dict | None) -> list[Tensor]:
    """The pictures that are connected to growing inputs (1, H, W, C), of a batch the first."""
    return [image[:1] for image in (images or {}).values() if image is not None]


def mark_sizes(vae: Any, sizes: TrainedSizes) -> Any:
    """Nodes that see no model but a VAE must still know Nano's sizes."""
    vae.lance_sizes = sizes
    return vae


def encode(vae: Any, pixels: Tensor) -> dict[str, Tensor]:
    """Pixels (3, T, H, W) in [-1, 1] -> a LATENT of one sample (1, 48, t, h, w), by ComfyUI's VAE."""
    raw = vae.encode(pixels.movedim(0, -1).add(1).div(2))
    if raw.ndim != 5 or raw.shape[1] != FORMAT.latent_channels:
        raise ValueError(
            f"This VAE makes latents of {raw.shape[1]} channels; Lance needs {FORMAT.latent_channels}.\n"
            "Use the VAE of Load Lance, or wan2.2_vae.safetensors."
        )
    return {"samples": raw.float().to(comfy.model_management.intermediate_device())}


def encode_source(vae: Any, frames: np.ndarray, preset: str) -> dict[str, Tensor]:
    """A source as a LATENT, cut and scaled to its bucket, or "as is" (cut to multiples of 16)."""
    if preset == AS_IS:
        height, width = (max(1, size // SPATIAL_STRIDE) * SPATIAL_STRIDE for size in frames.shape[1:3])
        return encode(vae, fitted_pixels(centre(frames, (height, width)), (height, width)))
    return encode(vae, vae_pixels(frames, preset))


def normalised(latent: dict[str, Any]) -> Tensor:
    """A LATENT's first sample as normalised latents (48, t, h, w); ``ValueError`` for those of another model."""
    samples = latent["samples"]
    check_channels(samples)
    samples = samples[:, :, None] if samples.ndim == 4 else samples
    return FORMAT.process_in(samples.float().cpu())[0]


def grid_of(latent: dict[str, Any]) -> LatentShape:
    """The size of a LATENT; ``ValueError`` for one of another model."""
    samples = latent["samples"]
    check_channels(samples)
    return LatentShape(*samples.shape[2:]) if samples.ndim == 5 else LatentShape(1, *samples.shape[2:])


def check_axes(samples: Tensor) -> None:
    if samples.ndim not in (4, 5):
        raise ValueError(
            f"These latents have {samples.ndim} axes (sound?); Lance's have 5 (batch, channels, frames, rows, columns).\n"
            "Begin with Empty Lance Latent, or encode a picture or video with the VAE of Load Lance."
        )


def check_channels(samples: Tensor) -> None:
    check_axes(samples)
    if samples.shape[1] != FORMAT.latent_channels:
        raise ValueError(
            f"These latents have {samples.shape[1]} channels; Lance's have {FORMAT.latent_channels}.\n"
            "Encode the picture with the VAE of Load Lance, or begin with Empty Lance Latent."
        )


def empty_latent(grid: LatentShape, batch: int = 1) -> dict[str, Any]:
    """A LATENT to start from, in ComfyUI's terms of how it relates to pixels."""
    return {
        "samples": torch.zeros(batch, FORMAT.latent_channels, *grid, device=comfy.model_management.intermediate_device()),
        "downscale_ratio_spacial": SPATIAL_STRIDE,
        "downscale_ratio_temporal": TEMPORAL_STRIDE,
    }


def source_latent(segment: Segment, batch: int = 1) -> dict[str, Any]:
    """A segment of latents as a LATENT to start from; noise covers it, but where a mask or ``denoise`` keeps it."""
    start = empty_latent(segment.grid, batch)
    samples = FORMAT.process_out(segment.values[None].float()).repeat(batch, 1, 1, 1, 1)
    return {**start, "samples": samples.to(start["samples"])}


def source_input(name: str, tooltip: str, optional: bool = False) -> io.MultiType.Input:
    return io.MultiType.Input(name, [io.Image, io.Video], optional=optional, tooltip=tooltip)


def resolution_input(*more: str) -> io.Combo.Input:
    return io.Combo.Input(
        "resolution",
        options=[*RESOLUTIONS, *more],
        default=AUTO,
        tooltip="Size class that the source is cut and scaled to: the bucket with the nearest aspect ratio, as in "
        "training. 'auto' takes image_768res for an image and video_480p for a video (and what fits, for Lance Nano).",
    )


def fps_input() -> io.Float.Input:
    return io.Float.Input(
        "fps",
        default=FPS,
        min=1.0,
        max=240.0,
        step=0.01,
        tooltip="Frames per second of several IMAGEs in a row; a VIDEO brings its own. " + SAMPLED,
        advanced=True,
    )
