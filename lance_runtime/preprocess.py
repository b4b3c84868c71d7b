"""Pictures as the model wants them: frames, frame sampling, aspect-ratio buckets, VAE pixels and ViT patches."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from .config import VisionConfig
from .types import LANCE_3B, TEMPORAL_STRIDE, VIDEO_FPS, check_choice

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
ALPHA_MODES = ("RGBA", "RGBa", "LA", "La", "PA")

Size = tuple[int, int]


class Area(NamedTuple):
    """A part of a picture, in its pixels, which need not be whole."""

    top: float
    left: float
    height: float
    width: float


def to_frames(value: Any) -> np.ndarray:
    """Any picture or clip as uint8 (T, H, W, 3); a single picture has T = 1.

    Takes a PIL image of any mode, or a uint8 array or tensor (H, W), (H, W, C) or (T, H, W, C) with 1, 3 or 4 channels.
    Transparency is laid on white; grey, palette and 16-bit pictures become 8-bit RGB. An EXIF rotation is left to the
    caller, as in the reference (data/datasets_custom/validation_dataset.py). ``ValueError`` for anything else.
    """
    if isinstance(value, Image.Image):
        if 0 in value.size:
            raise ValueError(f"the picture is {value.width} x {value.height} pixels; the least is 1 x 1.\nCheck the file.")
        return np.array(_rgb(value))[None]
    if isinstance(value, Tensor):
        _check_dtype(value.dtype)
        value = value.cpu().numpy()
    if not isinstance(value, np.ndarray):
        raise ValueError(
            f"a picture of type {type(value).__name__} was given; a PIL image or a uint8 array is needed.\n"
            "Open files with PIL.Image.open, and stack the frames of a clip with numpy.stack."
        )
    return _array_frames(value)


def sample_frames(count: int, fps: float, most_seconds: float = LANCE_3B.seconds) -> list[int]:
    """Indices of the frames that the model sees of a clip of ``count`` frames at ``fps``.

    They are 4k + 1, at 12 fps; of a clip longer than ``most_seconds`` as many as of these, spread over all of it. Indices
    repeat where the clip is slower than 12 fps. Where the reference fails (a clip shorter than 1/24 s) the first
    frame is taken; below 0.5 fps we count as 1 fps, where it would divide by zero. ``ValueError`` for an empty clip and
    for a rate that is not a positive number. (Reference: data/video/sampler/frames.py.)
    """
    if count < 1:
        raise ValueError(f"the clip has {count} frames; the least is 1.\nCheck that the video was read.")
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"the frame rate is {fps}; it must be a positive number.\nGive the clip's own fps, such as 24.0.")
    seconds = min(count / max(1, round(fps)), most_seconds)
    wanted = round(seconds * VIDEO_FPS)
    # A multiple of 4 loses 3 frames and not, as one would think, gains 1: the reference's rule.
    kept = wanted - 3 if wanted % TEMPORAL_STRIDE == 0 else wanted // TEMPORAL_STRIDE * TEMPORAL_STRIDE + 1
    return np.linspace(0, count - 1, max(1, kept), dtype=int).tolist()


@cache
def _tables() -> dict[str, dict[str, list[list[int]]]]:
    return json.loads(Path(__file__).with_name("buckets.json").read_text("utf-8"))


def presets() -> tuple[str, ...]:
    """Names of the resolutions, such as ``image_768res`` (reference: the ``resolution`` of its data config)."""
    return tuple(_tables())


def vae_size(height: int, width: int, preset: str) -> Size:
    """Height and width in pixels that the VAE stream gives a picture of this size: the bucket of the nearest ratio."""
    return _nearest_bucket(height, width, preset, "vae")


def vit_size(height: int, width: int, preset: str, vision_config: VisionConfig) -> Size:
    """Height and width in pixels that the ViT stream gives a picture of this size: its bucket, cut to whole tokens."""
    cell = vision_config.patch_size * vision_config.spatial_merge_size
    rows, columns = _nearest_bucket(height, width, preset, "vit")
    return rows - rows % cell, columns - columns % cell


def vit_area(height: int, width: int, preset: str, vision_config: VisionConfig) -> Area:
    """The part of a picture of this size that the ViT sees: cut to its bucket's ratio, then to whole tokens."""
    bucket, seen = _nearest_bucket(height, width, preset, "vit"), vit_size(height, width, preset, vision_config)
    crop = _crop_to_ratio(height, width, bucket)
    starts, sizes = [], []
    for whole, cut, scaled, kept in zip((height, width), crop, bucket, seen, strict=True):
        starts.append((whole - cut) // 2 + (scaled - kept) // 2 * cut / scaled)
        sizes.append(kept * cut / scaled)
    return Area(*starts, *sizes)


def vae_pixels(frames: Any, preset: str) -> Tensor:
    """What the VAE encodes: float32 (3, T, H, W) in [-1, 1] at the bucket's size.

    ``frames`` is anything that ``to_frames`` takes. The picture is cut to the bucket's ratio first and resized after, in
    8 bits; small ones are enlarged. A strip thinner than the widest bucket loses its ends, down to a crop of one pixel,
    so that every picture gives some result. ``ValueError`` for an unknown preset.
    """
    frames = to_frames(frames)
    return fitted_pixels(frames, _nearest_bucket(frames.shape[1], frames.shape[2], preset, "vae"))


def fitted_pixels(frames: np.ndarray, size: Size) -> Tensor:
    """uint8 (T, H, W, 3) cut and resized to ``size`` (height, width): float32 (3, T, *size) in [-1, 1]."""
    pixels = torch.from_numpy(_fit(frames, size)).permute(3, 0, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return pixels.div_(255).sub_(0.5).div_(0.5)


def vit_patches(frames: Any, preset: str, vision_config: VisionConfig) -> tuple[Tensor, tuple[int, int, int]]:
    """What the ViT encodes: patches float32 (N, 3 * 2 * 14 * 14), and their grid (t, h, w) before merging, N = t * h * w.

    Rows run in the order of the 2 x 2 blocks that the ViT merges into one token. An odd number of frames repeats the
    last, so that a picture becomes two frames. ``frames``, the crop and the errors are those of ``vae_pixels``, with the
    ViT's own buckets (reference: data/data_utils.py, patchify_video_with_merge).
    """
    frames = to_frames(frames)
    height, width = frames.shape[1:3]
    resized = _fit(frames, _nearest_bucket(height, width, preset, "vit"))
    resized = centre(resized, vit_size(height, width, preset, vision_config))
    depth, side, merge = vision_config.temporal_patch_size, vision_config.patch_size, vision_config.spatial_merge_size
    missing = -len(resized) % depth
    clip = torch.from_numpy(np.concatenate([resized, *[resized[-1:]] * missing]))
    grid = (clip.shape[0] // depth, clip.shape[1] // side, clip.shape[2] // side)
    pixels = clip.to(torch.float32).div_(255).sub_(torch.tensor(CLIP_MEAN)).div_(torch.tensor(CLIP_STD))
    order = "(t d) (h mh p) (w mw q) c -> (t h w mh mw) (c d p q)"
    return rearrange(pixels, order, d=depth, mh=merge, mw=merge, p=side, q=side), grid


def _nearest_bucket(height: int, width: int, preset: str, stream: str) -> Size:
    check_choice("Resolution", preset, presets())
    rows, columns = min(_tables()[preset][stream], key=lambda size: abs(width / height - size[1] / size[0]))
    return rows, columns


def _fit(frames: np.ndarray, size: Size) -> np.ndarray:
    """Centre crop to the ratio of ``size``, then one Pillow bicubic resize; uint8 (T, H, W, 3) to (T, *size, 3).

    Scaling first and cropping after would filter over pixels that the crop removes: other latents (by 0.3 and more).
    """
    crop = _crop_to_ratio(frames.shape[1], frames.shape[2], size)
    return np.stack([_resize(frame, size) for frame in centre(frames, crop)])


def _crop_to_ratio(height: int, width: int, size: Size) -> Size:
    """The largest size within height and width that has the ratio of ``size``, or the nearest to it of the whole area.

    The reference crops by torchvision's RandomResizedCrop (data/video/transforms/bucket_resize.py), which first looks for
    the picture's own area in that ratio. Rounded to whole pixels that fits where the ratios are next to equal: 854 x 480 for
    16:9 stays whole. (A pixel to spare, which it would leave to chance on either side, is left at the end.)
    """
    ratio = size[1] / size[0]
    rows, columns = round(math.sqrt(height * width / ratio)), round(math.sqrt(height * width * ratio))
    if 0 < rows <= height and 0 < columns <= width:
        return rows, columns
    # Rounding can leave nothing of a strip one pixel wide.
    return (height, max(1, round(height * ratio))) if width / height > ratio else (max(1, round(width / ratio)), width)


def _resize(frame: np.ndarray, size: Size) -> np.ndarray:
    picture = Image.fromarray(np.ascontiguousarray(frame))
    return np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BICUBIC))


def centre(frames: np.ndarray, size: Size) -> np.ndarray:
    """The middle (T, *size, 3) of frames (T, H, W, 3); a side that is shorter than asked for stays whole."""
    top, left = (max(0, whole - cut) // 2 for whole, cut in zip(frames.shape[1:3], size, strict=True))
    return frames[:, top : top + size[0], left : left + size[1]]


def _rgb(image: Image.Image) -> Image.Image:
    """A PIL image of any mode in 8-bit RGB, transparent parts laid on white.

    The reference does so for RGBA and P alone, and shows what others hide.
    """
    if image.mode.startswith("I"):
        return _from_16_bit(image).convert("RGB")
    if image.mode == "LAB":
        return _from_lab(image)
    keyed = image.mode in ("1", "L", "P", "RGB") and "transparency" in image.info
    if image.mode not in ALPHA_MODES and not keyed:
        return image.convert("RGB")
    image = image.convert("LA") if image.mode == "La" else image
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return white


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Pillow would cut values off at 255; its mode I (older releases read 16-bit files so) is taken as 16-bit as well."""
    values = np.asarray(image).astype(np.int64).clip(0, 65535)
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


def _from_lab(image: Image.Image) -> Image.Image:
    """Pillow converts LAB through colour profiles only, which some builds of it lack."""
    from PIL import ImageCms

    source, target = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return cast("Image.Image", ImageCms.profileToProfile(image, source, target, outputMode="RGB"))


def _array_frames(array: np.ndarray) -> np.ndarray:
    _check_dtype(array.dtype)
    shape = array.shape
    frames = array[None, ..., None] if array.ndim == 2 else array[None] if array.ndim == 3 else array
    if frames.ndim != 4 or frames.shape[-1] not in (1, 3, 4) or 0 in shape:
        raise ValueError(
            f"an array of shape {_text(shape)} was given; (H, W), (H, W, C) or (T, H, W, C) with 1, 3 or 4 channels and "
            "no side of 0 is needed.\nPut the channels last, and name a grey clip's single channel: clip[..., None]."
        )
    if frames.shape[-1] == 4:
        return np.stack([np.asarray(_rgb(Image.fromarray(np.ascontiguousarray(frame)))) for frame in frames])
    return np.repeat(frames, 3, axis=-1) if frames.shape[-1] == 1 else frames


def _text(shape: Sequence[int]) -> str:
    return "(" + ", ".join(str(size) for size in shape) + ")"


def _check_dtype(dtype: np.dtype | torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    if name != "uint8":
        raise ValueError(
            f"a picture of dtype {name} was given; uint8 is needed.\n"
            "Scale to 0..255, round, and convert: (x * 255).round().clip(0, 255).astype(numpy.uint8)."
        )
