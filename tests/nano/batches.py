"""Examples -> batches: sequences that the runtime lays out, put together where their layouts are equal."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lance_runtime.context import (
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
from lance_runtime.preprocess import vit_patches
from lance_runtime.prompts import caption_sentences, system_sentence
from lance_runtime.tokenizer import LanceTokenizer
from lance_runtime.types import VISUAL_CONDITIONS, LatentShape, Modality

from .parts import IMAGE_PRESET, VISION
from .tasks import Example, draw, frames
from .world import Clip, Scene

NO_PROMPT, NO_VISUALS = 0.1, 0.03  # shares of examples that teach the other guidance branches
THINGS_COUNT = 4.0  # times what background counts
Encode = Callable[[np.ndarray], Tensor]  # uint8 (T, H, W, 3) -> normalised latents (48, t, h, w); unused by answers


@dataclass(frozen=True)
class Item:
    """One sequence to learn from. patches: of its ViT segments, in order, with their grids (t, h, w). target: latents
    (48, t, h, w) to draw, of which the first frame is given or not, with the ``weight`` (t, h, w) of each place; or
    ``answer`` tokens to write at the end."""

    layout: Layout
    patches: tuple[Tensor, ...]
    grids: tuple[tuple[int, int, int], ...]
    target: Tensor | None = None
    weight: Tensor | None = None
    first_given: bool = False
    answer: int = 0

    @property
    def signature(self) -> tuple:
        """Items that agree in it can be one batch."""
        splits = tuple((s.segment.mode, len(s), tuple(s.segment.grid)) for s in self.layout.splits)
        positions = self.layout.positions
        return splits, self.grids, self.first_given, self.answer, tuple(positions[0].tolist()), int(positions.sum())


class Sequencer:
    """Lays examples out as the runtime does when it draws and answers."""

    def __init__(self, tokenizer: LanceTokenizer, encode: Encode | None) -> None:
        self.tokenizer, self.encode = tokenizer, encode

    def item(self, example: Example, rng: random.Random) -> Item:
        patches, grids, segments = [], [], []
        role = source_modality(example.task)
        for source in example.sources if example.task != "i2v" else ():
            pixels = frames(source)
            patch, grid = vit_patches(pixels, IMAGE_PRESET, VISION)
            patches.append(patch)
            grids.append(grid)
            merged = LatentShape(grid[0], grid[1] // 2, grid[2] // 2)
            segments.append(Segment.vit(torch.empty(merged.tokens, 0), merged))
            if role is not None:
                segments.append(Segment.latents(self.encode(pixels), role))
        context = open_context(self.tokenizer, self._system(example, rng), segments)
        if isinstance(example.wanted, str):
            return self._answering(context, example, tuple(patches), tuple(grids))
        target = self.encode(frames(example.wanted))
        sequence = self._drawing(context, example, LatentShape(*target.shape[1:]), rng)
        if len([s for s in sequence.splits if s.segment.modality == Modality.VIT]) == 0:
            patches, grids = [], []
        weight = weights(example.wanted, target.shape[1:])
        return Item(sequence, tuple(patches), tuple(grids), target, weight, example.task == "i2v")

    def _system(self, example: Example, rng: random.Random) -> str:
        if example.answers and not example.prompt:
            return rng.choice(caption_sentences(example.task))
        return system_sentence(example.task, example.prompt)

    def _answering(self, context: Context, example: Example, patches: tuple, grids: tuple) -> Item:
        context = question_context(self.tokenizer, context, example.prompt)
        answer = [*self.tokenizer.encode(str(example.wanted)), *closing_ids(self.tokenizer)]
        last = Segment.text([*context.segments[-1].ids, *answer])
        sequence = layout(Context((*context.segments[:-1], last), context.vision))
        return Item(sequence, patches, grids, answer=len(answer))

    def _drawing(self, context: Context, example: Example, grid: LatentShape, rng: random.Random) -> Layout:
        prompt, chance = self.tokenizer.encode(example.prompt), rng.random()
        context = generation_context(self.tokenizer, context, prompt)
        if chance < NO_VISUALS:
            return layout(context.without(Modality.PROMPT, *VISUAL_CONDITIONS), grid)
        if chance < NO_VISUALS + NO_PROMPT:
            return unconditional_layout(context, grid, rng.choice(("cached", "dense")))
        return layout(context, grid)


def weights(wanted: Scene | Clip, shape: Sequence[int]) -> Tensor:
    """How much each place of the latents (t, h, w) counts: more where things are, since most of a picture is background."""
    pixels, bare = frames(wanted), frames(Scene((), wanted.background))
    things = torch.from_numpy((pixels != bare).any(-1)).float()[:, None]
    cells = F.adaptive_max_pool2d(things, (shape[1], shape[2]))[:, 0]
    later = cells[1:].unflatten(0, (shape[0] - 1, -1)).amax(1) if shape[0] > 1 else cells[1:]
    return 1 + (THINGS_COUNT - 1) * torch.cat([cells[:1], later])


@dataclass(frozen=True)
class Batch:
    """Items of one layout, stacked. ids: of every split (B, L) where it is text. clean: latents of splits."""

    layout: Layout
    ids: dict[int, Tensor]
    clean: dict[int, Tensor]
    patches: Tensor | None
    grids: Tensor | None
    target: Tensor | None
    weight: Tensor | None
    first_given: bool
    answer: int

    @property
    def size(self) -> int:
        return next(iter(self.ids.values())).shape[0]


def stack(items: list[Item]) -> Batch:
    first = items[0]
    ids, clean = {}, {}
    for index, split in enumerate(first.layout.splits):
        segments = [item.layout.splits[index].segment for item in items]
        if not split.segment.is_visual:
            ids[index] = torch.tensor([segment.ids for segment in segments])
        elif split.segment.modality in (Modality.EDIT_SOURCE, Modality.SUBJECT):
            clean[index] = torch.stack([segment.values for segment in segments if segment.values is not None])
    patches = torch.cat([patch for item in items for patch in item.patches]) if first.patches else None
    grids = torch.tensor([grid for item in items for grid in item.grids]) if first.patches else None
    target, weight = (_stacked([getattr(item, name) for item in items]) for name in ("target", "weight"))
    return Batch(first.layout, ids, clean, patches, grids, target, weight, first.first_given, first.answer)


def _stacked(tensors: list[Tensor | None]) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(present) if present else None


class Pool:
    """Batches of one task without end: drawn in portions, sorted by layout, each used ``uses`` times."""

    def __init__(
        self, sequencer: Sequencer, task: str, size: int, rng: random.Random, portion: int = 600, uses: int = 2
    ) -> None:
        self.sequencer, self.task, self.size, self.rng, self.portion, self.uses = sequencer, task, size, rng, portion, uses
        self.waiting: dict[tuple, list[Item]] = defaultdict(list)
        self.ready: list[Batch] = []

    def batches(self) -> Iterator[Batch]:
        while True:
            if not self.ready:
                self._refill()
            yield self.ready.pop()

    def _refill(self) -> None:
        made: list[Batch] = []
        while not made:
            for _ in range(self.portion):
                item = self.sequencer.item(draw(self.rng, self.task), self.rng)
                group = self.waiting[item.signature]
                group.append(item)
                if len(group) == self.size:
                    made.append(stack(group))
                    group.clear()
        for _ in range(self.uses):
            self.rng.shuffle(made)
            self.ready += made
