"""Recipes as ComfyUI's CONDITIONING."""

from typing import Any

from ..lance_runtime.context import Context
from .clip import LanceTextModel
from .recipe import CONDITIONING_KEY, Recipe

Conditioning = list[list[Any]]


def conditioning(recipe: Recipe) -> Conditioning:
    return [[recipe.tagged(), {"pooled_output": None, CONDITIONING_KEY: recipe}]]


def conditionings(
    lance: LanceTextModel, context: Context | None, prompt: str, negative: str, positions: str
) -> tuple[Conditioning, Conditioning, Conditioning]:
    """Positive, negative, and the negative without visual conditions (for a second guidance).

    positions: "cached" or "dense"; it matters where there is no negative prompt (``unconditional_layout``).
    """
    ids, negative_ids = (tuple(lance.tokenizer.encode(text)) for text in (prompt, negative))
    return (
        conditioning(Recipe(ids, context)),
        conditioning(Recipe(negative_ids, context, ids if positions == "cached" else None)),
        conditioning(Recipe(negative_ids, context, visuals=False)),
    )
