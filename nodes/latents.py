"""Nodes that make the latent to begin with: empty, or with frames that are given."""

import math
from typing import Any

import comfy.utils
import numpy as np
import torch
from torch import Tensor

from ..lance_runtime.denoise import Given
from ..lance_runtime.types import LANCE_3B, TEMPORAL_STRIDE, VIDEO_FPS, PixelShape, TrainedSizes
from ..lance_runtime.visuals import encode_given
from .model import check_model
from .pictures import FORMAT, bytes_of, empty_latent, encode, frames_of, grid_of, is_video, normalised, source_input
from .progress import node_of, say
from .schema import CATEGORY, io

CUSTOM = "custom"
LARGER = 1.02  # buckets of one size class differ by this much in area
# Published sizes, width x height; ``_sizes`` adds the portrait ones. Nothing narrower than 9:16 was trained.
LANDSCAPE = {
    "image": {"21:9": (1168, 496), "16:9": (1024, 576), "3:2": (944, 624), "4:3": (880, 672), "1:1": (768, 768)},
    "480p": {"21:9": (976, 416), "16:9": (848, 480), "3:2": (784, 528), "4:3": (736, 560), "1:1": (640, 640)},
    "360p": {"21:9": (672, 288), "16:9": (640, 352), "3:2": (528, 352), "4:3": (560, 416), "1:1": (480, 480)},
}


def _sizes() -> dict[str, tuple[int, int]]:
    sizes = {}
    for kind, ratios in LANDSCAPE.items():
        for ratio, (width, height) in ratios.items():
            sizes[f"{kind} {ratio}"] = (width, height)
            if width != height and ratio != "21:9":
                sizes[f"{kind} {':'.join(reversed(ratio.split(':')))}"] = (height, width)
    return sizes


SIZES = _sizes()


def frames_for(frames: int, seconds: float) -> int:
    """Frames of a clip, rounded down to 4k + 1; seconds, where not 0, count at 12 a second."""
    wanted = round(seconds * VIDEO_FPS) + 1 if seconds > 0 else frames
    return (wanted - 1) // TEMPORAL_STRIDE * TEMPORAL_STRIDE + 1


class LanceNativeEmptyLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LanceNativeEmptyLatent",
            display_name="Empty Lance Latent",
            category=CATEGORY,
            description="An empty latent at a size that Lance was trained on; one frame is a picture.",
            search_aliases=["empty latent", "size", "aspect ratio", "resolution"],
            inputs=[
                io.Combo.Input(
                    "size",
                    options=[*SIZES, CUSTOM],
                    default="image 1:1",
                    tooltip="Trained sizes by aspect ratio; 'custom' takes width and height.",
                ),
                io.Int.Input(
                    "width", default=768, min=16, max=4096, step=16, tooltip="Pixels, a multiple of 16; for 'custom'."
                ),
                io.Int.Input(
                    "height", default=768, min=16, max=4096, step=16, tooltip="Pixels, a multiple of 16; for 'custom'."
                ),
                io.Int.Input(
                    "frames", default=1, min=1, max=1201, step=4, tooltip="4k+1 at 12 a second; trained up to 121 (10 s)."
                ),
                io.Float.Input(
                    "seconds",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.25,
                    tooltip="Overrides frames when above 0.",
                    advanced=True,
                ),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Results to draw at once."),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The MODEL of Load Lance: a model that was trained on other sizes (Lance Nano) gets its own.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
            outputs=[
                io.Latent.Output(tooltip="The empty latent: for a sampler, or for Lance Video Start."),
                io.Int.Output(display_name="width", tooltip="Width in pixels."),
                io.Int.Output(display_name="height", tooltip="Height in pixels."),
                io.Int.Output(display_name="frames", tooltip="Number of frames."),
            ],
        )

    @classmethod
    def execute(
        cls, size: str, width: int, height: int, frames: int, seconds: float, batch_size: int, model: Any = None
    ) -> io.NodeOutput:
        sizes = LANCE_3B if model is None else check_model(model).sizes
        width, height = SIZES.get(size, (width, height))
        asked, fitting = frames, frames_for(frames, seconds)
        frames = fitting
        if sizes != LANCE_3B and size != CUSTOM:
            height, width = sizes.image if frames == 1 else sizes.video
            frames = min(frames, sizes.most_frames)
        shape = PixelShape(frames, height, width)
        note = described(shape, sizes, batch_size)
        if frames != fitting:
            note += f"\n{fitting} frames were asked for; this model makes {frames} at most."
        elif seconds == 0 and frames != asked:
            note += f"\n{asked} frames were asked for; videos have 4k+1."
        say(node_of(cls), note)
        return io.NodeOutput(empty_latent(shape.latent(), batch_size), width, height, shape.frames, ui={"text": [note]})


def described(shape: PixelShape, sizes: TrainedSizes, batch: int = 1) -> str:
    """Size, length and tokens in words, and whether that is beyond what was trained."""
    picture, latent = shape.frames == 1, shape.latent()
    length = (
        "1 picture" if picture else f"{shape.frames} frames, {(shape.frames - 1) / VIDEO_FPS:.3g} s at {VIDEO_FPS} a second"
    )
    note = f"{shape.width} x {shape.height}, {length}, {latent.tokens} tokens" + (f", {batch} times" if batch > 1 else "")
    most = sizes.image if picture else sizes.video
    beyond = [f"{most[1]} x {most[0]} pixels"] if shape.width * shape.height > LARGER * math.prod(most) else []
    beyond += [f"{sizes.most_frames} frames"] if shape.frames > sizes.most_frames else []
    warning = f"This model was not trained beyond {' and '.join(beyond)}: things may repeat."
    return f"{note}\n{warning}" if beyond else note


class LanceNativeVideoStart(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LanceNativeVideoStart",
            display_name="Lance Video Start",
            category=CATEGORY,
            description="A video of which some frames are given: the first, the last, any other, or a video to go on with.",
            search_aliases=["image to video", "first frame", "last frame", "continue video", "i2v", "flf2v"],
            inputs=[
                io.Vae.Input("vae", tooltip="The VAE of Load Lance."),
                io.Latent.Input("latent", tooltip="The size and length of the video (Empty Lance Latent)."),
                io.Image.Input("first", optional=True, tooltip="The picture that the video begins with."),
                io.Image.Input("last", optional=True, tooltip="The picture that it ends with; of a batch the first."),
                io.Image.Input("middle", optional=True, tooltip="A picture on the way, at 'middle_at'."),
                source_input(
                    "continue_from", optional=True, tooltip="A video whose end is the beginning; or its frames, at 12 a second."
                ),
                io.Float.Input(
                    "middle_at",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="0 is the beginning, 1 the end.",
                    advanced=True,
                ),
                io.Int.Input(
                    "overlap",
                    default=9,
                    min=1,
                    max=121,
                    step=4,
                    tooltip="Frames kept of 'continue_from', 4k+1; at most all of the new video but four.",
                    advanced=True,
                ),
            ],
            outputs=[io.Latent.Output(tooltip="The latent to begin with; its noise mask keeps the given frames.")],
        )

    @classmethod
    def execute(
        cls,
        vae: Any,
        latent: dict,
        middle_at: float,
        overlap: int,
        first: Tensor | None = None,
        last: Tensor | None = None,
        middle: Tensor | None = None,
        continue_from: Any = None,
    ) -> io.NodeOutput:
        grid = grid_of(latent)
        most = max(1, TEMPORAL_STRIDE * (grid.frames - 2) + 1)  # something must be left to draw
        pictures = _continued(continue_from, min(overlap, most)) if continue_from is not None else {}
        for name, index, picture in (
            ("first", 0, first),
            ("middle", round(middle_at * (grid.frames - 1)), middle),
            ("last", grid.frames - 1, last),
        ):
            if picture is not None and index in pictures:
                raise ValueError(
                    f"{name!r} would take latent frame {index} of {grid.frames}, which another input gives.\n"
                    "Make the video longer, lower 'overlap', move 'middle_at', or connect one of the two."
                )
            if picture is not None:
                pictures[index] = frames_of(picture[:1])
        if not pictures:
            raise ValueError(
                "Lance Video Start has 0 given frames; it needs 1 or more.\nConnect a picture, or leave the node out."
            )
        given = encode_given(pictures, grid, lambda pixels: normalised(encode(vae, pixels)))
        start = _with_given(latent, given)
        if not start["noise_mask"].any():
            raise ValueError(
                f"{grid.frames} of {grid.frames} latent frames are given: 0 are left to draw.\n"
                f"Make the video longer in Empty Lance Latent: {TEMPORAL_STRIDE * grid.frames + 1} frames or more."
            )
        return io.NodeOutput(start)


def _continued(source: Any, overlap: int) -> dict[int, Any]:
    """The end of a video as latent frames: the first is one picture, each later one four."""
    frames = _last_frames(source, overlap)
    pictures = {0: frames[:1]}
    for index in range(1, (len(frames) - 1) // TEMPORAL_STRIDE + 1):
        start = 1 + (index - 1) * TEMPORAL_STRIDE
        pictures[index] = frames[start : start + TEMPORAL_STRIDE]
    return pictures


def _last_frames(source: Any, most: int) -> np.ndarray:
    """The last frames of a VIDEO, taken 12 times a second, or of IMAGEs that are so already: uint8 (4k + 1, H, W, 3)."""
    step, images = 1.0, source
    if is_video(source):
        parts = source.get_components()
        step, images = float(parts.frame_rate) / VIDEO_FPS, parts.images
    kept = frames_for(min(most, int((len(images) - 1) / step) + 1), seconds=0.0)
    indices = [len(images) - 1 - round(step * back) for back in reversed(range(kept))]
    return bytes_of(images[indices])


def _with_given(latent: dict[str, Any], given: Given) -> dict[str, Any]:
    """A LATENT whose noise mask (1 is drawn, 0 is given) leaves the given frames alone, and others given before."""
    grid, batch = grid_of(latent), latent["samples"].shape[0]
    start, samples = empty_latent(grid, batch), latent["samples"].float().cpu().reshape(batch, -1, *grid)
    # ComfyUI takes zeros for no picture, in its own terms or in the model's.
    values = FORMAT.process_in(samples) if samples.count_nonzero() else torch.zeros_like(samples)
    values[:, :, given.frames] = given.latents.to(values)
    mask = torch.ones(1, 1, *grid)
    if "noise_mask" in latent:
        before = latent["noise_mask"].float().cpu()
        mask = comfy.utils.reshape_mask(before, (len(before) if before.ndim == 5 else 1, 1, *grid)).clone()
    mask[:, :, given.frames] = 0
    device = start["samples"].device
    return {**latent, **start, "samples": FORMAT.process_out(values).to(device), "noise_mask": mask.to(device)}
