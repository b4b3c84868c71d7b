"""Files of pictures and clips, read and written with Pillow and PyAV."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FRAMES_PER_SECOND = 12
CLIP_SUFFIXES = (".mp4", ".mov", ".mkv")


def read_image(path: Path) -> Image.Image:
    """A picture, turned upright by its EXIF tag; ``ValueError`` for a file that is none."""
    try:
        picture = ImageOps.exif_transpose(Image.open(path))
        picture.load()
    except UnidentifiedImageError as error:
        raise ValueError(f"{path.name} ({path.stat().st_size} bytes) is no picture.\nUse PNG, JPEG or WebP.") from error
    except OSError as error:
        if not path.is_file():
            raise
        raise ValueError(f"{path.name} ({path.stat().st_size} bytes) is damaged: {error}.\nUse an intact copy.") from error
    return picture


def read_video(path: Path) -> tuple[np.ndarray, float]:
    """All frames, uint8 (T, H, W, 3), and the frame rate; ``ValueError`` for a file without a picture track."""
    import av

    try:
        with av.open(str(path)) as container:
            track = container.streams.video[0]
            rate = float(track.average_rate or FRAMES_PER_SECOND)
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(track)]
    except (av.FFmpegError, IndexError) as error:
        if not path.is_file():
            raise
        raise ValueError(f"{path.name} ({path.stat().st_size} bytes) is no video.\nUse MP4, MOV, WebM or GIF.") from error
    return np.stack(frames), rate


def check_suffix(path: Path, clip: bool) -> None:
    """``ValueError`` for a name whose suffix says nothing that a clip, or a picture, can be written as."""
    known = CLIP_SUFFIXES if clip else tuple(end for end, name in Image.registered_extensions().items() if name in Image.SAVE)
    if path.suffix.lower() not in known:
        kind, usual = ("clip", ", ".join(CLIP_SUFFIXES)) if clip else ("picture", ".png, .jpg or .webp")
        raise ValueError(f"{path.name} has the suffix {path.suffix!r}, which no {kind} has.\nUse {usual}.")


def write_image(path: Path, frame: np.ndarray) -> None:
    """uint8 (H, W, 3) as PNG, or whatever the suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(frame).save(path)


def write_video(path: Path, frames: np.ndarray, fps: int = FRAMES_PER_SECOND) -> None:
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
