"""Recipes as ComfyUI's CONDITIONING."""

from typing import Any

import comfy.sd

from ..lance_runtime.context import Context
from .clip import lance_of
from .recipe import CONDITIONING_KEY, Recipe

Conditioning = list[list[Any]]


def conditionings(
    clip: comfy.sd.CLIP, context: Context | None, prompt: str, negative: str, positions: str
) -> tuple[Conditioning, Conditioning, Conditioning]:
    """Positive, negative, and the negative without visual conditions (for a second guidance), with the hooks of the CLIP.

    positions: "cached" or "dense"; it matters where there is no negative prompt (``unconditional_layout``).
    """

    def conditioning(recipe: Recipe) -> Conditioning:
        return [[recipe.tagged(), clip.add_hooks_to_dict({"pooled_output": None, CONDITIONING_KEY: recipe})]]

    lance = lance_of(clip)
    ids, negative_ids = (tuple(lance.tokenizer.encode(text)) for text in (prompt, negative))
    return (
        conditioning(Recipe(ids, context)),
        conditioning(Recipe(negative_ids, context, ids if positions == "cached" else None)),
        conditioning(Recipe(negative_ids, context, visuals=False)),
    )
