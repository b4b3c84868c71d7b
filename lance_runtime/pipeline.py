"""Lance in a bare Python: files in, pictures or words out. Composition only, no mathematics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .checkpoint import ANY_VARIANT, guess_variant
from .components import Components, load_components
from .context import (
    Context,
    Layout,
    Segment,
    closing_ids,
    generation_context,
    layout,
    open_context,
    question_context,
    source_modality,
    unconditional_layout,
)
from .decode import answer
from .denoise import Branches, Given, Step, check_noise, check_sigmas, denoise, draw_noise, flow_sigmas
from .files import find_sources
from .memory import add_offloading, bring, check_offload, check_recording, checked_device, default_dtype
from .prompts import system_sentence
from .request import LOGGER, Request, check_names
from .reuse import PrefixCache, VisionTokenCache
from .types import VISUAL_CONDITIONS, LatentShape, Modality
from .visuals import encode_given, source_segments, vit_segment

# What the reference lays out as the answer that is to be generated; it is never prefilled.
PLACEHOLDER_ANSWER = "x"
Progress = Callable[[int, int], None]


class Token(NamedTuple):
    """One more token of an answer, and the text so far."""

    id: int
    text: str


@dataclass(eq=False)
class Output:
    """What a call made: latents (48, t, h, w), normalised, with frames uint8 (T, H, W, 3); or text and its ids.

    With ``batch`` above 1, latents and frames have the batch as first axis.
    """

    latents: Tensor | None = None
    text: str | None = None
    token_ids: list[int] | None = None
    decode_latents: Callable[[Tensor], Tensor] | None = None

    @cached_property
    def frames(self) -> np.ndarray:
        """Decoded when first asked for; ``ValueError`` for an answer, which has none."""
        if self.latents is None or self.decode_latents is None:
            raise ValueError("x2t tasks return text, not frames.\nRead out.text; use another task to make pictures.")
        return self.decode_latents(self.latents).cpu().numpy()

    def apart(self) -> list[Output]:
        """Each result of a batch; they are decoded one by one, when asked for."""
        samples = [] if self.latents is None else list(self.latents)
        return [Output(latents=latents, decode_latents=self.decode_latents) for latents in samples]


class LancePipeline:
    """All nine tasks over one set of weights."""

    def __init__(self, components: Components, variant: str | None = None) -> None:
        self.components, self.variant = components, variant
        self._vision_tokens, self._questions = VisionTokenCache(), PrefixCache()
        self._take_weights: Callable[[], None] = lambda: None

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        variant: str = "image",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        vit: str = "auto",
        offload: str = "none",
        tiled_vae: bool = False,
        compile: bool | str = False,  # noqa: A002  # the field's word for it
        cuda_graphs: bool = False,
    ) -> LancePipeline:
        """Load a tree as on the hub, ComfyUI's models folder, or a single file with the other parts beside it.

        variant: "image" (t2i, image_edit, subject_image, x2t_image) or "video" (the other tasks). device, dtype: by
        default the accelerator in bfloat16, or the CPU in float32. vit: the vision tower, "checkpoint" (the file's own),
        "standalone" (the separate one), "auto" (its own where it has one, as the reference) or "none" (words alone can
        be read). offload: "none", "model" (one part at a time on the device) or "layer". tiled_vae: pictures pass the VAE
        in tiles, in less memory. compile: run the layers through ``torch.compile``, in one of its modes
        ("reduce-overhead") or its default one; the first call of each size takes minutes longer. cuda_graphs: launch a
        step of a picture, and a token of an answer about pictures, as one CUDA graph, in some more memory; for a card that
        waits for its host. Raises ``FileNotFoundError`` and ``ValueError`` that name the file.
        """
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype is {dtype!r}, where a type of torch belongs.\nPass torch.bfloat16 or torch.float32.")
        check_offload(offload, bool(compile))
        target = checked_device(device)
        check_recording(cuda_graphs, target, offload, compile)
        weights_on = target if offload == "none" else torch.device("cpu")
        sources = find_sources(Path(folder), variant, vit)
        components = load_components(sources, dtype or default_dtype(target), target, weights_on, cuda_graphs)
        components.vae.tiled = tiled_vae
        take_weights = add_offloading(components, offload)
        if compile:
            components.model.compile_layers(**({"mode": compile} if isinstance(compile, str) else {}))
        pipe = cls(components, None if guess_variant(sources.model) == ANY_VARIANT else variant)
        pipe._take_weights = take_weights
        return pipe

    def forget(self) -> None:
        """What was kept of pictures, questions and offloaded weights; call it where weights were changed or replaced."""
        self._vision_tokens.entries.clear()
        self._questions.entries.clear()
        self._take_weights()

    def __call__(self, task: str, prompt: str = "", *, progress: Progress | None = None, **arguments: Any) -> Output:
        """Run a task to its end.

        images: PIL images or uint8 HWC. video: uint8 (T, H, W, 3) at ``fps`` (24). instruction: own system sentence.
        height, width, num_frames: size of the target where no source decides it (default: what the model was trained on).
        resolution: preset of the sources, of ``preprocess.presets``.
        steps, shift, or sigmas: the schedule. guidance: see ``Guidance``. negative_prompt: in place of no prompt.
        given_frames: {latent frame: image or 4 frames}, counted from the end where negative. context: a ready-made one.
        seed: of the noise, or of a sampled answer. noise: (48, t, h, w) instead of it. batch: samples at once, with the seeds
        ``seed``, ``seed + 1``, ...
        question, max_new_tokens, temperature, top_p: for the tasks that answer. progress: called with (done, total).
        Wrong calls raise ``ValueError``: first line what is wrong with both numbers, second line what to do.
        """
        request = self.request(task, prompt, **arguments)
        total = request.max_new_tokens if request.understands else len(self.sigmas(request)) - 1
        ids: list[int] = []
        last: Any = None
        for done, last in enumerate(self._run(request), 1):
            ids += [last.id] if isinstance(last, Token) else []
            if progress is not None:
                progress(done, total)
        if request.understands:
            return Output(text=last.text if last else "", token_ids=ids)
        return Output(latents=last.latents, decode_latents=self.decode)

    def stream(self, task: str, prompt: str = "", **arguments: Any) -> Iterator[Step | Token]:
        """The same arguments but ``progress``; yields a ``Step`` or a ``Token`` as soon as it is made."""
        return self._run(self.request(task, prompt, **arguments))

    def request(self, task: str, prompt: str = "", **arguments: Any) -> Request:
        """The arguments of a call, checked and completed; what the methods below take."""
        check_names(arguments)
        request = Request(task, prompt, sizes=self.components.model.config.sizes, **arguments).checked()
        fitting = "video" if request.makes_video else "image"
        if self.variant not in (None, fitting):
            LOGGER.warning("[Lance] %s is what the %s checkpoint was trained for, not the %s one.", task, fitting, self.variant)
        return request

    @torch.no_grad()
    def layout(self, task: str, prompt: str = "", **arguments: Any) -> Layout:
        """The sequence of a call as the reference lays it out, without running the network."""
        request = self.request(task, prompt, **arguments)
        tokenizer = self.components.tokenizer
        context = self.context(request)
        if not request.understands:
            return layout(context, request.target(), closing_ids(tokenizer))
        *before, last = context.segments
        answer = [*last.ids, *tokenizer.encode(PLACEHOLDER_ANSWER), *closing_ids(tokenizer)]  # of a visual: no ids
        return layout(Context((*before, *([last] if last.is_visual else []), Segment.text(answer)), context.vision))

    @torch.no_grad()
    def _run(self, request: Request) -> Iterator[Step | Token]:
        yield from self._answer(request) if request.understands else self._generate(request)

    def _generate(self, request: Request) -> Iterator[Step]:
        parts, target = self.components, request.target()
        sigmas, given = self.sigmas(request), self.given(request, target)
        context = self.context(request)
        noise = self.noise(request, context, target)
        branches = self.branches(request, context, target)
        steps = denoise(parts.engine, noise, sigmas, branches, request.guidance, given)
        for _ in range(len(sigmas) - 1):
            bring(parts.model)  # for every step: the caller may have decoded a preview in between
            step = next(steps)
            yield step if request.batch > 1 else step._replace(latents=step.latents[0])

    def _answer(self, request: Request) -> Iterator[Token]:
        parts, context = self.components, self.context(request)
        ids: list[int] = []
        read = partial(self._questions.prefill, None, parts.engine)
        tokens = answer(parts.engine, layout(context), parts.tokenizer, request.max_new_tokens, request.sampling, read)
        while True:
            bring(parts.model)  # for every token: the caller may have decoded a picture in between
            token = next(tokens, None)
            if token is None:
                return
            ids.append(token)
            yield Token(token, parts.tokenizer.decode(ids))

    def context(self, request: Request) -> Context:
        """What the model has seen before it draws or answers; reads the sources with ViT and VAE."""
        if request.context is not None:
            return request.context
        tokenizer, visuals = self.components.tokenizer, list(self._visuals(request))
        own = request.instruction
        system = system_sentence(request.task, asked=bool(request.question)) if own is None else own
        context = open_context(tokenizer, system, visuals)
        if request.understands:
            return question_context(tokenizer, context, request.question)
        return generation_context(tokenizer, context, tokenizer.encode(request.prompt))

    def _visuals(self, request: Request) -> Iterator[Segment]:
        """Segments of every source, in order; i2v's image is a given frame and no segment."""
        if request.task == "i2v":
            return
        role = source_modality(request.task)
        for frames in [request.video] if request.video is not None else request.images:
            if role is None:
                yield self._vision_tokens.tokens(frames, request.preset, partial(vit_segment, self.components))
            else:
                yield from source_segments(self.components, frames, request.preset, role)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents of a step or an output (48, t, h, w) -> pixels uint8 (T, H, W, 3), on the device; or a batch of them."""
        return self.components.vae.decode(latents)

    def given(self, request: Request, target: LatentShape) -> Given | None:
        """Clean latents of the given frames; i2v's image is the first."""
        pictures = dict(request.given_frames or {})
        if request.task == "i2v" and request.images:
            pictures.setdefault(0, request.images[0])
        if not pictures:
            return None
        return encode_given(pictures, target, self.components.vae.encode)

    def branches(self, request: Request, context: Context, target: LatentShape) -> Branches:
        """The guidance branches over a context: the prompt, the negative one or none, and nothing at all."""
        bare = context.without(Modality.PROMPT, *VISUAL_CONDITIONS)
        return Branches(
            self.components.engine,
            lambda: layout(context, target),
            lambda: self._without_prompt(request, context, target),
            lambda: layout(bare, target),
        )

    def _without_prompt(self, request: Request, context: Context, target: LatentShape) -> Layout:
        if request.negative_prompt:
            return layout(context.with_prompt(self.components.tokenizer.encode(request.negative_prompt)), target)
        return unconditional_layout(context, target, request.guidance.uncond_positions)

    def sigmas(self, request: Request) -> Tensor:
        """The schedule, float32 (steps + 1), falling."""
        return flow_sigmas(request.steps, request.shift) if request.sigmas is None else check_sigmas(request.sigmas)

    def noise(self, request: Request, context: Context, target: LatentShape) -> Tensor:
        """Where drawing begins, float32 (B, C, T, H, W): the caller's, or one draw for each seed."""
        channels = self.components.model.config.latent_channels
        if request.noise is not None:
            noise = check_noise(request.noise, (channels, *target), request.batch)
        else:
            draws = [draw_noise(context, target, request.seed + i, channels) for i in range(request.batch)]
            noise = torch.stack(draws)
        return noise.to(self.components.device)
