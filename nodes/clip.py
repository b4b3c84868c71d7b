"""Lance as ComfyUI's CLIP: the MODEL's own module behind a wrapper without parameters."""

from typing import Any

import comfy.sd
import torch

from ..lance_runtime.tokenizer import LanceTokenizer
from .recipe import CONDITIONING_KEY, Recipe

TOKENS = "lance"


class LanceClipTokenizer:
    """ComfyUI's tokenizer interface over ours; prompts have no weights, so brackets are letters like any other."""

    def __init__(self, tokenizer: LanceTokenizer) -> None:
        self.tokenizer = tokenizer

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **options: Any) -> dict:
        row = [(i, 1.0, n) if return_word_ids else (i, 1.0) for n, i in enumerate(self.tokenizer.encode(text))]
        return {TOKENS: [row], "text": text}

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        return self.tokenizer.decode(token_ids)

    def state_dict(self) -> dict:
        return {}


class LanceTextModel(torch.nn.Module):
    """Stands where ComfyUI expects a text encoder. A prompt stays a recipe: the sampler's model reads it.

    owner: the shared ``LanceModel``; kept out of the module tree, so that its weights are counted once.
    """

    def __init__(self, owner: torch.nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "owner", owner)
        self.dtypes = {torch.float32}

    def reset_clip_options(self) -> None:
        """There are none."""

    def set_clip_options(self, options: dict) -> None:
        """Layers and devices of other text encoders have no meaning here."""

    def memory_estimation_function(self, tokens: dict, device: torch.device | None = None) -> int:
        return 0

    def encode_token_weights(self, tokens: dict) -> tuple[torch.Tensor, None, dict]:
        ids = tuple(int(token[0]) for token in tokens[TOKENS][0])
        recipe = Recipe(tokens["text"], ids)
        return recipe.tagged(), None, {CONDITIONING_KEY: recipe}

    def load_sd(self, state: dict) -> tuple[list, list]:
        return [], []


def make_clip(patcher: Any, tokenizer: LanceTokenizer) -> comfy.sd.CLIP:
    """A CLIP over a clone of the MODEL's patcher: one copy of the weights, each side with LoRAs of its own."""
    clip = comfy.sd.CLIP(no_init=True)
    clip.patcher = patcher.clone()
    clip.patcher.is_clip = True
    clip.cond_stage_model = LanceTextModel(patcher.model)
    clip.tokenizer = LanceClipTokenizer(tokenizer)
    clip.layer_idx = None
    clip.tokenizer_options = {}
    clip.use_clip_schedule = False
    clip.apply_hooks_to_conds = None
    return clip
