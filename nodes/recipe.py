"""What a CONDITIONING carries for Lance: a recipe of the context, no keys or values."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..lance_runtime.context import Context, generation_context
from ..lance_runtime.prompts import system_sentence
from ..lance_runtime.tokenizer import LanceTokenizer
from ..lance_runtime.types import LatentShape

CONDITIONING_KEY = "lance"


@dataclass(frozen=True, eq=False)
class Recipe:
    """A prompt as tagged ids (CLIP Text Encode), whose system sentence waits for the target: an image's or a video's.

    text: the prompt itself, tokenised again as a piece of the whole sequence.
    """

    text: str
    ids: tuple[int, ...]

    @property
    def length(self) -> int:
        return len(self.ids)

    def tagged(self) -> Tensor:
        """The conditioning's tensor (1, 1 + ids, 1): no embeddings, but enough to notice a merge or a zeroing."""
        return torch.tensor([1.0, *(i + 1.0 for i in self.ids)])[None, :, None]

    @classmethod
    def of(cls, recipe: "Recipe | None", tagged: Tensor | None) -> "Recipe":
        """A conditioning's recipe, after ComfyUI's nodes have had it.

        A tensor of zeros (ConditioningZeroOut) is no prompt. A tensor that does not belong to the recipe means that
        two conditionings were merged by their tensors, which would silently drop one of them.
        """
        if recipe is None:
            raise ValueError(
                "This conditioning was not made for Lance: it holds 0 Lance contexts, 1 is needed.\n"
                "Use CLIP Text Encode or a Lance node with the CLIP of Load Lance."
            )
        if tagged is None or torch.count_nonzero(tagged) == 0:
            return cls("", ())
        if tagged.shape[1] != recipe.length + 1 or not torch.equal(tagged.float().cpu(), recipe.tagged()):
            raise ValueError(
                f"This conditioning was merged with another one: {tagged.shape[1] - 1} tokens where {recipe.length} belong.\n"
                "Lance cannot concatenate or average prompts; write one prompt, or use Conditioning (Combine)."
            )
        return recipe

    def context(self, tokenizer: LanceTokenizer, target: LatentShape) -> Context:
        """The whole context for a target of this size."""
        task = "t2i" if target.frames == 1 else "t2v"
        return generation_context(tokenizer, system_sentence(task), (), self.text)
