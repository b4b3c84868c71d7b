"""Lance Context Inspector: a picture of the sequence, and the same in words."""

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..lance_runtime.config import LanceConfig
from ..lance_runtime.context import Context, Layout, Mode, Split, generation_context, layout
from ..lance_runtime.types import Modality
from .clip import LanceTextModel, lance_of
from .pictures import grid_of
from .schema import CATEGORY, LanceContext, io, ui

WIDTH, MARGIN, STRIP, ROW, GAP, SIDE = 960, 24, 72, 30, 12, 196
EXPERT_BAR = 16  # the lower part of the strip: whose tokens these are
EXPERTS = {True: (70, 120, 200), False: (215, 95, 70)}  # understanding, generation
COLOURS = {
    Modality.TEMPLATE: (148, 148, 160),
    Modality.PROMPT: (90, 150, 230),
    Modality.TARGET: (235, 140, 60),
    Modality.EDIT_SOURCE: (110, 180, 90),
    Modality.SUBJECT: (190, 110, 190),
    Modality.VIT: (230, 200, 80),
}
NAMES = {
    Modality.TEMPLATE: "text",
    Modality.PROMPT: "prompt",
    Modality.TARGET: "target",
    Modality.EDIT_SOURCE: "edit source",
    Modality.SUBJECT: "subject",
    Modality.VIT: "ViT",
}


class LanceNativeContextInspector(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LanceNativeContextInspector",
            display_name="Lance Context Inspector",
            category=CATEGORY,
            description="Shows what Lance sees: the segments of the sequence, which expert reads them, where they stand, and "
            "what they cost.",
            search_aliases=["debug", "tokens", "sequence", "attention", "memory"],
            inputs=[
                io.Clip.Input("clip", tooltip="The CLIP of Load Lance."),
                LanceContext.Input("context", tooltip="The context to look at."),
                io.String.Input("prompt", multiline=True, default="", tooltip="The prompt to show after it; may be empty."),
                io.Latent.Input("latent", optional=True, tooltip="The latent to begin with: shows the target too."),
            ],
            outputs=[
                io.Image.Output(display_name="picture", tooltip="The sequence as a picture."),
                io.String.Output(display_name="text", tooltip="The same in words: a line for each segment, then totals."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, clip: Any, context: Context, prompt: str, latent: dict | None = None) -> io.NodeOutput:
        lance = lance_of(clip)
        target = None if latent is None else grid_of(latent)
        sequence = layout(generation_context(lance.tokenizer, context, lance.tokenizer.encode(prompt)), target)
        text = describe(sequence, lance)
        picture = torch.from_numpy(np.array(draw(sequence, text))).float().div(255)[None]
        shown = ui.PreviewImage(picture, cls=cls).as_dict()
        return io.NodeOutput(picture, text, ui={**shown, "text": [text]})


def describe(sequence: Layout, lance: LanceTextModel) -> str:
    """The sequence in words: one line a segment, then totals."""
    lines, start = [], 0
    for split in sequence.splits:
        segment = split.segment
        expert = "understanding" if _understands(split) else "generation"
        low, high = split.positions.min(dim=1).values.tolist(), split.positions.max(dim=1).values.tolist()
        place = ", ".join(f"{axis} {a}-{b}" for axis, a, b in zip("thw", low, high, strict=True))
        grid = f" {tuple(segment.grid)}" if segment.is_visual else ""
        lines.append(
            f"{start}: {NAMES[segment.modality]}{grid}, {len(split)} tokens, {expert} expert, {segment.mode.value}, {place}"
        )
        start += len(split)
    prefix = sum(len(split) for split in sequence.prefix)
    total = f"{start} tokens, {prefix} before the target; cache {cache_megabytes(lance, prefix):.1f} MB"
    if prefix < start:
        cost = step_cost(lance.owner.diffusion_model.config, start - prefix, start) / 1e12
        total += f"\na step: {cost:.3g} TFLOP, twice that while guidance is on"
    return "\n".join([*lines, total])


def step_cost(config: LanceConfig, drawn: int, seen: int) -> float:
    """Floating-point operations of one pass over ``drawn`` target tokens that attend to ``seen`` tokens.

    Two a weight and token, and four a pair of tokens and channel of the queries.
    """
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    weights = config.hidden_size * (2 * queries + 2 * keys + 3 * config.intermediate_size)
    return config.num_hidden_layers * (2.0 * weights * drawn + 4.0 * queries * drawn * seen)


def _understands(split: Split) -> bool:
    """Whose tokens these are; the two vision tokens around latents are the understanding expert's all the same."""
    return split.segment.mode in (Mode.CAUSAL, Mode.FULL)


def cache_megabytes(lance: LanceTextModel, tokens: int) -> float:
    """Keys and values of a prefix in the type that the model computes in."""
    config, size = lance.owner.diffusion_model.config, lance.owner.get_dtype_inference().itemsize
    return config.kv_values_per_token * size * tokens / 1e6


def draw(sequence: Layout, text: str) -> Image.Image:
    """A strip of coloured segments over the lines of the description, and who sees whom as a matrix."""
    lines, font = text.split("\n"), ImageFont.load_default(13)
    below = MARGIN + STRIP + GAP + ROW * len(lines)
    image = Image.new("RGB", (WIDTH, below + SIDE + MARGIN), (32, 33, 38))
    pen = ImageDraw.Draw(image)
    edges = _edges(sequence, WIDTH - 2 * MARGIN)
    for split, (start, end) in zip(sequence.splits, edges, strict=True):
        left, right = MARGIN + start, MARGIN + max(end - 1, start + 1)
        pen.rectangle((left, MARGIN, right, MARGIN + STRIP - EXPERT_BAR), fill=COLOURS[split.segment.modality])
        pen.rectangle((left, MARGIN + STRIP - EXPERT_BAR, right, MARGIN + STRIP), fill=EXPERTS[_understands(split)])
        name = NAMES[split.segment.modality]
        if pen.textlength(name, font) < right - left - 8:
            pen.text((left + 4, MARGIN + 4), name, fill=(20, 20, 24), font=font)
    for index, line in enumerate(lines):
        top = MARGIN + STRIP + GAP + ROW * index
        if index < len(sequence.splits):
            pen.rectangle((MARGIN, top + 2, MARGIN + 12, top + 14), fill=COLOURS[sequence.splits[index].segment.modality])
        pen.text((MARGIN + 22, top), line, fill=(226, 226, 232), font=font)
    _draw_matrix(pen, sequence, (MARGIN, below), SIDE)
    aside = MARGIN + SIDE + 22
    pen.text((aside, below), "Who sees whom: each row sees the columns that are filled.", (226, 226, 232), font)
    for index, (understands, name) in enumerate(((True, "understanding expert"), (False, "generation expert"))):
        top = below + ROW * (index + 1)
        pen.rectangle((aside, top + 2, aside + 12, top + 14), fill=EXPERTS[understands])
        pen.text((aside + 20, top), name, (226, 226, 232), font)
    return image


def _edges(sequence: Layout, width: int) -> list[tuple[int, int]]:
    """Left and right of every segment; square roots of the lengths, so that a prompt is seen beside a picture."""
    sizes = [len(split) ** 0.5 for split in sequence.splits]
    ends = np.cumsum(sizes) / sum(sizes) * width
    return [(round(end - size / sum(sizes) * width), round(end)) for end, size in zip(ends, sizes, strict=True)]


def _draw_matrix(pen: ImageDraw.ImageDraw, sequence: Layout, corner: tuple[int, int], side: int) -> None:
    """Rows see columns: everything before, and within a causal segment only what came first."""
    edges = _edges(sequence, side)
    pen.rectangle((*corner, corner[0] + side, corner[1] + side), outline=(90, 90, 100))
    for row, (split, (top, bottom)) in enumerate(zip(sequence.splits, edges, strict=True)):
        colour = COLOURS[split.segment.modality]
        for left, right in edges[:row]:
            pen.rectangle((corner[0] + left, corner[1] + top, corner[0] + right, corner[1] + bottom), fill=colour)
        left, right = edges[row]
        corners = [(left, top), (left, bottom), (right, bottom)]
        if split.segment.mode != Mode.CAUSAL:
            corners.append((right, top))
        pen.polygon([(corner[0] + x, corner[1] + y) for x, y in corners], fill=colour)
