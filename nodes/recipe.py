"""What a CONDITIONING carries for Lance: a recipe of a sequence, no keys or values."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..lance_runtime.context import (
    Context,
    Layout,
    Mode,
    Segment,
    VisionTokens,
    generation_context,
    layout,
    open_context,
    unconditional_layout,
)
from ..lance_runtime.prompts import system_sentence
from ..lance_runtime.tokenizer import LanceTokenizer
from ..lance_runtime.types import VISUAL_CONDITIONS, LatentShape, Modality

CONDITIONING_KEY = "lance"


@dataclass(frozen=True, eq=False)
class Recipe:
    """A prompt, and the context before it.

    ids: the prompt's tokens. context: None waits for the target, whose size tells the system sentence (an image's or a
    video's). conditional: those of the prompt that this one is the absence of, for the reference's "cached" positions.
    visuals: whether the context's visual conditions are kept.
    """

    ids: tuple[int, ...]
    context: Context | None = None
    conditional: tuple[int, ...] | None = None
    visuals: bool = True

    @property
    def length(self) -> int:
        """Tokens that ComfyUI's memory estimate should count."""
        context = () if self.context is None else self.context.segments
        return len(self.ids) + sum(len(segment) for segment in context)

    def tagged(self) -> Tensor:
        """The conditioning's tensor (1, 1 + ids, 1): no embeddings, but enough to notice a merge or a zeroing."""
        return torch.tensor([1.0, *(i + 1.0 for i in self.ids)])[None, :, None]

    @classmethod
    def of(cls, recipe: "Recipe | None", tagged: Tensor | None) -> "Recipe":
        """A conditioning's recipe, after ComfyUI's nodes have had it.

        A tensor of zeros (ConditioningZeroOut) is no prompt. A tensor that does not belong to the recipe means that
        two conditionings were merged by their tensors, or one was scaled: half of it would silently be dropped. A tensor
        alone (all that ComfyUI keeps of scheduled CLIP hooks) is a prompt without pictures.
        """
        recipe = recipe or cls._of_tensor(tagged)
        if recipe is None:
            raise ValueError(
                "This conditioning was not made for Lance.\nUse CLIP Text Encode or a Lance node with the CLIP of Load Lance."
            )
        if tagged is None or torch.count_nonzero(tagged) == 0:
            return replace(recipe, ids=())
        found, own = tagged.float().cpu(), recipe.tagged()
        if not torch.equal(found, own):
            entries, wanted = found.shape[1], own.shape[1]
            changed = f"{entries} entries where {wanted} belong"
            if found.shape == own.shape:
                changed = f"{int((found != own).sum())} of its {wanted} entries are others"
            raise ValueError(
                f"This conditioning was merged or scaled: {changed}.\n"
                "Lance cannot concatenate, average or multiply prompts; write one prompt, or use Conditioning (Combine)."
            )
        return recipe

    @classmethod
    def _of_tensor(cls, tagged: Tensor | None) -> "Recipe | None":
        if tagged is None or tagged.shape[0] != 1 or tagged.shape[2:] != (1,):
            return None
        first, *ids = (int(value) - 1 for value in tagged.flatten())
        return cls(tuple(ids)) if first == 0 and min(ids, default=0) >= 0 else None

    def layout(self, tokenizer: LanceTokenizer, target: LatentShape) -> Layout:
        """The whole sequence for a target of this size."""
        context = self.context
        if context is None:
            context = open_context(tokenizer, system_sentence("t2i" if target.frames == 1 else "t2v"))
        if not self.visuals:
            context = context.without(*VISUAL_CONDITIONS)
        if self.conditional and not self.ids:
            return unconditional_layout(generation_context(tokenizer, context, self.conditional), target, "cached")
        return layout(generation_context(tokenizer, context, self.ids), target)


# ComfyUI loads a training data set with weights_only, which knows torch's own types alone.
torch.serialization.add_safe_globals([Recipe, Context, Segment, VisionTokens, LatentShape, Mode, Modality])
