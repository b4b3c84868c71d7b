"""The segment language: every task is a list of segments, every guidance branch the same list with some left out."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from .positions import apply_mape, text_positions, visual_positions
from .prompts import ASSISTANT_OPENING, SYSTEM_OPENING, UNDERSTANDING_TASKS, USER_OPENING
from .tokenizer import IM_END, VIDEO_PAD, VISION_END, VISION_START, LanceTokenizer
from .types import LatentShape, Modality

NO_GRID = LatentShape(0, 0, 0)


class Mode(str, Enum):
    """How the tokens of a split see each other; all of them see everything before their split."""

    CAUSAL = "causal"
    FULL = "full"
    FULL_NOISE = "full_noise"
    NOISE = "noise"


class VisionTokens(NamedTuple):
    """Ids of the tokens around and inside a visual."""

    start: int
    pad: int
    end: int


@dataclass(frozen=True, eq=False)
class Segment:
    """One piece of a sequence: text (``ids``), or a visual with its token ``grid`` and its ``values``.

    values: ViT embeddings (grid.tokens, hidden) or normalised clean latents (C, T, H, W); None for text and target.
    """

    mode: Mode
    modality: Modality
    ids: tuple[int, ...] = ()
    grid: LatentShape = NO_GRID
    values: Tensor | None = None

    @property
    def is_visual(self) -> bool:
        return self.grid.tokens > 0

    @property
    def identity(self) -> Hashable:
        """The same for the same words, or for the very same values (as long as these are alive)."""
        return self.mode, self.modality, self.ids, self.grid, id(self.values)

    @classmethod
    def text(cls, ids: Sequence[int], modality: Modality = Modality.TEMPLATE) -> Segment:
        return cls(Mode.CAUSAL, modality, ids=tuple(ids))

    @classmethod
    def vit(cls, embeddings: Tensor, grid: LatentShape) -> Segment:
        """ViT tokens (grid.tokens, hidden) of one image or clip; ``grid`` counts merged patches."""
        if embeddings.shape[0] != grid.tokens:
            raise ValueError(
                f"{embeddings.shape[0]} ViT embeddings do not fill a grid of {grid.tokens} tokens {tuple(grid)}.\n"
                "Pass the merged grid: frames, and rows and columns divided by the merge size of 2."
            )
        return cls(Mode.FULL, Modality.VIT, grid=grid, values=embeddings)

    @classmethod
    def latents(cls, latents: Tensor, modality: Modality) -> Segment:
        """Clean, normalised latents (C, T, H, W) as an edit source or a subject reference."""
        if latents.ndim != 4:
            raise ValueError(f"Latents of a segment have 4 axes (C, T, H, W), not {latents.ndim}.\nPass one sample at a time.")
        return cls(Mode.FULL_NOISE, modality, grid=LatentShape(*latents.shape[1:]), values=latents)

    @classmethod
    def target(cls, grid: LatentShape) -> Segment:
        return cls(Mode.NOISE, Modality.TARGET, grid=grid)

    def __len__(self) -> int:
        return self.grid.tokens + 2 if self.is_visual else len(self.ids)

    def token_ids(self, vision: VisionTokens) -> list[int]:
        """The ids as laid out in the sequence, placeholders of a visual included."""
        if not self.is_visual:
            return list(self.ids)
        return [vision.start, *[vision.pad] * self.grid.tokens, vision.end]


@dataclass(frozen=True, eq=False)
class Context:
    """What the model has seen before it draws or answers: an immutable list of segments."""

    segments: tuple[Segment, ...]
    vision: VisionTokens

    def with_text(self, ids: Sequence[int], modality: Modality = Modality.TEMPLATE) -> Context:
        return self.extended([Segment.text(ids, modality)])

    def with_visual(self, visual: Segment) -> Context:
        return self.extended([visual])

    def extended(self, segments: Iterable[Segment]) -> Context:
        return replace(self, segments=(*self.segments, *segments))

    def without(self, *modalities: Modality) -> Context:
        """The same list with every segment of these modalities left out (a guidance branch)."""
        return replace(self, segments=tuple(s for s in self.segments if s.modality not in modalities))

    def with_prompt(self, ids: Sequence[int]) -> Context:
        """The same list with another prompt in the place of the prompt (a negative prompt), before its last template."""
        bare = self.without(Modality.PROMPT).segments
        prompt = (Segment.text(ids, Modality.PROMPT),) if ids else ()
        return replace(self, segments=(*bare[:-1], *prompt, *bare[-1:]))

    @property
    def visuals(self) -> tuple[Segment, ...]:
        return tuple(segment for segment in self.segments if segment.is_visual)


@dataclass(frozen=True, eq=False)
class Split:
    """A segment at its place in the sequence, with its rotary positions (3, L)."""

    segment: Segment
    positions: Tensor

    def __len__(self) -> int:
        return len(self.segment)


@dataclass(frozen=True, eq=False)
class Layout:
    """The whole sequence, split by split; the views below are what the reference packs."""

    splits: tuple[Split, ...]
    vision: VisionTokens

    @property
    def prefix(self) -> tuple[Split, ...]:
        """The splits before the target (all of them where there is none)."""
        modes = self.attn_modes
        return self.splits[: modes.index(Mode.NOISE)] if Mode.NOISE in modes else self.splits

    @property
    def target(self) -> Split:
        """The split that is denoised."""
        return self.splits[self.attn_modes.index(Mode.NOISE)]

    @property
    def input_ids(self) -> Tensor:
        return torch.tensor([i for split in self.splits for i in split.segment.token_ids(self.vision)])

    @property
    def positions(self) -> Tensor:
        return torch.cat([split.positions for split in self.splits], dim=1)

    @property
    def modality(self) -> Tensor:
        return _modality(split.segment for split in self.splits)

    @property
    def split_lens(self) -> list[int]:
        return [len(split) for split in self.splits]

    @property
    def attn_modes(self) -> list[str]:
        return [split.segment.mode.value for split in self.splits]


def layout(context: Context, target: LatentShape | None = None, closing: Sequence[int] = ()) -> Layout:
    """Lay a context out, with a target to denoise behind it (and MaPE), or without one to answer (and plain rope).

    closing: ids of text behind the target (no token sees it).
    """
    segments = list(context.segments)
    if target is not None:
        segments.append(Segment.target(target))
    if closing:
        segments.append(Segment.text(closing))
    positions = _rope_index(segments)
    if target is not None:
        positions = apply_mape(positions, _modality(segments))
    parts = positions.split([len(segment) for segment in segments], dim=1)
    return Layout(tuple(map(Split, segments, parts)), context.vision)


def unconditional_layout(context: Context, target: LatentShape, uncond_positions: str, closing: Sequence[int] = ()) -> Layout:
    """The layout without the prompt.

    "dense" gives every token the positions of the shortened sequence. "cached" (the reference's default path) leaves
    the prefix where the prompt had put it and shortens the target's positions only: the reference's cache is filled
    from the conditional sequence.
    """
    short = layout(context.without(Modality.PROMPT), target, closing)
    if uncond_positions == "dense":
        return short
    kept = tuple(s for s in layout(context, target).prefix if s.segment.modality != Modality.PROMPT)
    return replace(short, splits=kept + short.splits[len(kept) :])


def open_context(tokenizer: LanceTokenizer, system: str, visuals: Iterable[Segment] = ()) -> Context:
    """System sentence and visual conditions, open for more of both, for a prompt or for a question."""
    opening, user = tokenizer.encode_template(SYSTEM_OPENING), tokenizer.encode_template(USER_OPENING)
    vision = VisionTokens(*(tokenizer.special(token) for token in (VISION_START, VIDEO_PAD, VISION_END)))
    return Context((Segment.text(opening + tokenizer.encode(system) + user),), vision).extended(visuals)


def generation_context(tokenizer: LanceTokenizer, context: Context, prompt_ids: Sequence[int]) -> Context:
    """An open context with a prompt and the opening of the assistant: what precedes a target."""
    if prompt_ids:
        context = context.with_text(prompt_ids, Modality.PROMPT)
    return context.with_text(tokenizer.encode_template(ASSISTANT_OPENING))


def question_context(tokenizer: LanceTokenizer, context: Context, question: str) -> Context:
    """An open context with a question; it is one causal split with the template behind it."""
    return context.with_text(tokenizer.encode(question) + tokenizer.encode_template(ASSISTANT_OPENING))


def source_modality(task: str) -> Modality | None:
    """What the latents of a task's sources are; None for tasks that only look at theirs."""
    if task in UNDERSTANDING_TASKS:
        return None
    return Modality.SUBJECT if task.startswith("subject") else Modality.EDIT_SOURCE


def closing_ids(tokenizer: LanceTokenizer) -> list[int]:
    """The end of the assistant's turn."""
    return [tokenizer.special(IM_END)]


def _modality(segments: Iterable[Segment]) -> Tensor:
    return torch.tensor([segment.modality for segment in segments for _ in range(len(segment))])


def _rope_index(segments: Sequence[Segment]) -> Tensor:
    """Qwen2.5-VL's rope index (3, L): each segment starts one behind the largest position so far."""
    parts, start = [], 0
    for segment in segments:
        part = visual_positions(start, segment.grid) if segment.is_visual else text_positions(start, len(segment))
        parts.append(part)
        start = int(part.max()) + 1
    return torch.cat(parts, dim=1)
