"""Files of pictures and videos, read and written with Pillow and PyAV."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .preprocess import sample_frames, to_frames
from .types import LANCE_3B, VIDEO_FPS

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif")


def read_image(path: Path) -> Image.Image:
    """A picture, turned upright by its EXIF tag (the reference leaves it); ``ValueError`` for a file that is none."""
    try:
        picture = ImageOps.exif_transpose(Image.open(path))
        picture.load()
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path.name} is too large a picture: {error}.\nScale it down first; Lance sees 768 x 768.") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{path.name} ({path.stat().st_size} bytes) is no picture.\nUse PNG, JPEG or WebP.") from error
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's for PNG, and for tags of TIFF
        if not path.is_file():
            raise
        raise ValueError(f"{path.name} ({path.stat().st_size} bytes) is damaged: {error}.\nUse an intact copy.") from error
    return picture


def read_video(path: Path, most_seconds: float = LANCE_3B.seconds) -> np.ndarray:
    """The frames of a video that the model sees (``sample_frames``), upright, uint8 (T, H, W, 3), at 12 a second.

    The others are never in memory. ``ValueError`` for a file without a picture.
    """
    import av

    try:
        with av.open(str(path)) as container:
            rate = float(container.streams.video[0].average_rate or VIDEO_FPS)
        wanted = sample_frames(sum(1 for _ in _decoded(path)), rate, most_seconds)
        kept = {index: _upright(frame) for index, frame in enumerate(_decoded(path)) if index in wanted}
    except (av.FFmpegError, IndexError) as error:
        if not path.is_file():
            raise
        raise ValueError(f"{path.name} ({path.stat().st_size} bytes) is no video.\nUse MP4, MOV, WebM or GIF.") from error
    return to_frames(np.stack([kept[index] for index in wanted]))


def _decoded(path: Path) -> Iterator[Any]:
    import av

    with av.open(str(path)) as container:
        yield from container.decode(container.streams.video[0])


def _upright(frame: Any) -> np.ndarray:
    """A frame as it is meant to be seen: phones film sideways, and say so beside it."""
    clear = any(component.is_alpha for component in frame.format.components)
    return np.rot90(frame.to_ndarray(format="rgba" if clear else "rgb24"), round(frame.rotation / 90))


def check_suffix(path: Path, video: bool) -> None:
    """``ValueError`` for a name whose suffix says nothing that a video, or a picture, can be written as."""
    kind, known = ("video", VIDEO_SUFFIXES) if video else ("picture", PICTURE_SUFFIXES)
    if path.suffix.lower() not in known:
        said = f"{path.name} has the suffix {path.suffix!r}, which is none of the {len(known)} that a {kind} is written with."
        raise ValueError(f"{said}\nUse {', '.join(known)}.")


def write_image(path: Path, frame: np.ndarray) -> None:
    """uint8 (H, W, 3) as PNG, or whatever the suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(frame).save(path)


def write_video(path: Path, frames: np.ndarray, fps: int = VIDEO_FPS) -> None:
    """uint8 (T, H, W, 3) as H.264 MP4, at the 12 frames a second that Lance makes."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        track = container.add_stream("libx264", rate=Fraction(fps))
        track.height, track.width, track.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        track.options = {"crf": "16"}
        for frame in frames:
            container.mux(track.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(track.encode())
