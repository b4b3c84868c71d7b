"""One call of the pipeline, checked and completed before anything is computed."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any

import numpy as np

from .context import Context
from .decode import Sampling, check_length
from .guidance import Guidance
from .preprocess import presets, sample_frames, to_frames, vae_size
from .prompts import UNDERSTANDING_TASKS, VIDEO_TASKS, check_task
from .types import LANCE_3B, LatentShape, PixelShape, TrainedSizes

LOGGER = logging.getLogger("lance")

# Least and largest number of images of each task.
PICTURES = {
    "t2i": (0, 0),
    "t2v": (0, 0),
    "i2v": (1, 1),
    "image_edit": (1, math.inf),
    "video_edit": (0, 0),
    "subject_image": (1, math.inf),
    "subject_video": (1, math.inf),
    "x2t_image": (1, math.inf),
    "x2t_video": (0, 0),
}
CLIP_TASKS = ("video_edit", "x2t_video")
SOURCE_SIZED_TASKS = ("i2v", "image_edit", "video_edit")
TEXTS = ("prompt", "question", "instruction", "negative_prompt")
WHOLE_NUMBERS = ("height", "width", "num_frames", "steps", "batch", "seed", "max_new_tokens")
NUMBERS = ("fps", "shift", "temperature", "top_p")
# What a call's arguments are called elsewhere (diffusers, transformers).
ELSEWHERE = {
    "num_inference_steps": "steps",
    "guidance_scale": "guidance=Guidance(scale=...)",
    "generator": "seed",
    "image": "images=[...]",
    "frames": "num_frames",
    "num_images_per_prompt": "batch",
}


def check_names(arguments: Iterable[str]) -> None:
    """``TypeError``, as Python's own, for an argument that no call takes."""
    known = Request.__dataclass_fields__.keys() - {"task", "prompt", "sizes"}
    for name in arguments:
        if name not in known:
            close = ELSEWHERE.get(name) or ", ".join(get_close_matches(name, known)) or ", ".join(sorted(known))
            raise TypeError(f"{name} is none of the {len(known)} arguments of a call.\nUse {close}.")


@dataclass(frozen=True, eq=False)
class Request:
    """Arguments of a call (``LancePipeline.__call__`` explains them); ``checked`` completes and validates them."""

    task: str
    prompt: str = ""
    images: Sequence[Any] = ()
    video: Any = None
    fps: float = 24.0
    instruction: str | None = None
    question: str = ""
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    resolution: str | None = None
    steps: int = 30
    shift: float = 3.5
    sigmas: Sequence[float] | None = None
    guidance: Guidance = field(default_factory=Guidance)
    negative_prompt: str | None = None
    given_frames: Mapping[int, Any] | None = None
    context: Context | None = None
    batch: int = 1
    seed: int = 42
    noise: Any = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    sizes: TrainedSizes = LANCE_3B

    @property
    def understands(self) -> bool:
        return self.task in UNDERSTANDING_TASKS

    @property
    def makes_video(self) -> bool:
        return self.task in VIDEO_TASKS

    @property
    def sampling(self) -> Sampling:
        """``ValueError`` for a temperature or a share of probability that cannot be."""
        return Sampling(self.temperature, self.top_p, self.seed)

    @property
    def preset(self) -> str:
        return self.resolution or self.sizes.preset(self.makes_video)

    def checked(self) -> Request:
        """The same call with pictures as arrays; ``ValueError`` where task and arguments do not fit."""
        check_task(self.task)
        self._check_types()
        request = replace(self, images=[to_frames(image) for image in self.images], video=self._clip())
        request._check_inputs()
        request._check_numbers()
        request._check_preset()
        return request

    def target(self) -> LatentShape:
        """The grid to generate; sizes that follow from a source may not be contradicted."""
        if self.task in SOURCE_SIZED_TASKS and self.context is None:
            shape = self._source_shape()
            for name in ("height", "width"):
                self._check_same(name, getattr(shape, name))
        else:
            height, width = self.sizes.video if self.makes_video else self.sizes.image
            height = height if self.height is None else self.height
            shape = PixelShape(self._frames(), height, width if self.width is None else self.width)
        return shape.latent()

    def _clip(self) -> np.ndarray | None:
        if self.video is None:
            return None
        frames = to_frames(self.video)
        return frames[sample_frames(len(frames), self.fps, self.sizes.seconds)]

    def _source_shape(self) -> PixelShape:
        source = self.video if self.task == "video_edit" else self.images[-1]
        height, width = vae_size(source.shape[1], source.shape[2], self.preset)
        if self.task == "video_edit":
            self._check_same("num_frames", len(source))
        return PixelShape(self._frames() if self.task == "i2v" else len(source), height, width)

    def _check_same(self, name: str, size: int) -> None:
        asked = getattr(self, name)
        if asked is not None and asked != size:
            raise ValueError(
                f"{name} {asked} was asked for, but {self.task} makes {size} of this source at {self.preset}.\n"
                f"Leave {name} out, or choose another resolution."
            )

    def _frames(self) -> int:
        """Frames to generate: 4k + 1, other counts rounded down."""
        asked = self.num_frames if self.num_frames is not None else (self.sizes.frames if self.makes_video else 1)
        if not self.makes_video and asked != 1:
            raise ValueError(f"{self.task} makes 1 frame, not {asked}.\nUse a video task, or leave num_frames out.")
        if asked < 1:
            raise ValueError(f"{asked} frames cannot be generated; the least is 1.\nUse 1, 5, 9, ... frames (4k+1).")
        frames = (asked - 1) // 4 * 4 + 1
        if frames != asked:
            LOGGER.warning("[Lance] %d frames do not fit the 4k+1 grid of the video VAE: %d are made.", asked, frames)
        if frames > (most := self.sizes.most_frames):
            LOGGER.warning("[Lance] %d frames asked for; nothing longer than %d was trained.", frames, most)
        return frames

    def _check_types(self) -> None:
        """What Python would take and misunderstand: a picture is a sequence of rows, 0.5 steps are a number."""
        fitting: tuple[tuple[str, type | tuple[type, ...], str, str], ...] = (
            *((name, str, "text", 'Use "" for no words') for name in TEXTS),
            *((name, Integral, "a whole number", "Round it to the one that you mean") for name in WHOLE_NUMBERS),
            *((name, Real, "a number", "Leave it out for the default") for name in NUMBERS),
            ("images", (list, tuple), "a list", "Pass images=[picture], also for a single one"),
            ("guidance", Guidance, "a Guidance", "Pass guidance=Guidance(scale=4.0)"),
            ("given_frames", Mapping, "a dictionary", "Pass given_frames={0: picture}"),
        )
        for name, kind, words, remedy in fitting:
            value = getattr(self, name)
            optional = type(self).__dataclass_fields__[name].default is None
            if not isinstance(value, kind) and not (optional and value is None):
                shown = repr(value) if isinstance(value, (str, float)) else f"of type {type(value).__name__}"
                raise ValueError(f"{name} is {shown}, where {words} belongs.\n{remedy}.")
        strange = [key for key in self.given_frames or {} if not isinstance(key, Integral)]
        if strange:
            raise ValueError(f"Given frame {strange[0]!r} is no whole number.\nPass given_frames={{0: picture}}.")

    def _check_context(self) -> None:
        """A ready-made context has its words and pictures in it; i2v's image is no part of it, but a given frame."""
        said = ["images"] * bool(len(self.images) and self.task != "i2v") + ["video"] * (self.video is not None)
        said += [name for name in ("prompt", "question", "instruction") if getattr(self, name)]
        if self.context is not None and said:
            raise ValueError(
                f"{self.task} takes 1 context, and got {len(said)} of what belongs into it: {', '.join(said)}.\n"
                "Add them to the context, or leave the context out."
            )

    def _check_inputs(self) -> None:
        self._check_context()
        least, most = PICTURES[self.task]
        if self.context is None and not least <= len(self.images) <= most:
            wanted = "no" if most == 0 else f"exactly {least}" if least == most else f"at least {least}"
            images = "image" if least == 1 else "images"
            raise ValueError(f"{self.task} takes {wanted} {images}, and got {len(self.images)}.\n{self._advice()}")
        takes_clip = self.task in CLIP_TASKS
        if self.context is None and takes_clip != (self.video is not None):
            raise ValueError(
                f"{self.task} takes {int(takes_clip)} video, and got {int(self.video is not None)}.\n{self._advice()}"
            )
        if self.understands and (self.prompt or self.negative_prompt):
            letters = len(self.prompt or self.negative_prompt or "")
            raise ValueError(f"{self.task} takes a question, and got a prompt of {letters} characters.\nPass question=.")
        if not self.understands and self.question:
            raise ValueError(
                f"{self.task} takes a prompt, and got a question of {len(self.question)} characters.\nPass prompt=."
            )
        if self.given_frames and (self.understands or not self.makes_video):
            raise ValueError(f"{self.task} cannot hold {len(self.given_frames)} given frames.\nUse t2v or i2v.")
        if self.task == "i2v" and self.images and 0 in (self.given_frames or {}):
            raise ValueError("i2v has 2 first frames: its image, and given frame 0.\nPass one of them.")
        sizes = [name for name in ("height", "width", "num_frames") if getattr(self, name) is not None]
        if self.understands and sizes:
            raise ValueError(f"{self.task} draws nothing, and got {len(sizes)} sizes: {', '.join(sizes)}.\nUse resolution.")
        if self.understands and self.context is not None and not self.context.segments:
            raise ValueError(f"{self.task} needs a context of 1 segment at least, and got 0.\nAdd a text or a visual to it.")
        stills = [image for image in self.images if len(image) != 1]
        if stills:
            raise ValueError(f"An image of {len(stills[0])} frames was given where 1 belongs.\nPass clips as video=.")

    def _advice(self) -> str:
        fitting = [
            task
            for task, (least, most) in PICTURES.items()
            if least <= len(self.images) <= most and (task in CLIP_TASKS) == (self.video is not None)
        ]
        return f"Tasks for these inputs: {', '.join(fitting) or 'none'}."

    def _check_numbers(self) -> None:
        if self.batch < 1:
            raise ValueError(f"A batch of {self.batch} holds nothing.\nUse 1 or more.")
        if not -(2**63) <= self.seed <= 2**64 - self.batch:
            raise ValueError(
                f"Seed {self.seed} does not fit into 64 bits with a batch of {self.batch}.\n"
                f"Use a number from 0 to {2**64 - self.batch}."
            )
        if self.understands and self.batch != 1:
            raise ValueError(f"{self.task} answers 1 question at a time, not {self.batch}.\nLeave batch out.")
        if self.understands and self.noise is not None:
            raise ValueError(f"{self.task} draws nothing, and got noise.\nLeave noise out.")
        if self.understands:
            check_length(self.max_new_tokens)
            _ = self.sampling

    def _check_preset(self) -> None:
        """A preset of the wrong kind gives sizes that the task was not trained on (image buckets for video, say)."""
        kind = "video" if self.makes_video else "image"
        known = [preset for preset in presets() if preset.startswith(kind)]
        if self.preset not in known:
            raise ValueError(
                f"Resolution {self.preset!r} is none of the {len(known)} that {self.task} can use.\n"
                f"Use one of: {', '.join(known)}."
            )
