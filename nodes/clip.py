"""Lance as ComfyUI's CLIP: the MODEL's own module behind a wrapper without parameters."""

import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..lance_runtime.context import Context, Segment, layout, open_context, question_context
from ..lance_runtime.decode import Sampling, answer
from ..lance_runtime.engine import Engine
from ..lance_runtime.prompts import system_sentence
from ..lance_runtime.tokenizer import LanceTokenizer
from ..lance_runtime.types import TrainedSizes
from .attention import comfy_attention
from .pictures import AUTO, seen
from .progress import with_prefill_progress
from .recipe import CONDITIONING_KEY, Recipe
from .vit import VisionTower

TOKENS = "lance"
GENERATE_TEXT_FPS = 24.0
WIDE_ROWS = 4  # what a layer holds for a token while it reads, in rows of intermediate_size; 3.2 were counted


class LanceClipTokenizer:
    """ComfyUI's tokenizer interface over ours; prompts have no weights, so brackets are letters like any other.

    Pictures are read here, and not while the language model is in memory: the vision tower would push it out.
    """

    def __init__(self, tokenizer: LanceTokenizer, tower: VisionTower, sizes: TrainedSizes) -> None:
        self.tokenizer, self.tower, self.sizes = tokenizer, tower, sizes

    def tokenize_with_weights(
        self, text: str, return_word_ids: bool = False, image: Tensor | None = None, video: Tensor | None = None, **options: Any
    ) -> dict:
        """Ids of the text, and the whole question for ``generate`` (image: a batch of images; video: 24 fps)."""
        if options.get("images"):  # as Text Encode Qwen Image Edit has them
            raise ValueError(
                f"A prompt of Lance holds no pictures, and got {len(options['images'])}.\n"
                "Use Lance Edit or Lance Subject, and connect its context to Lance Conditioning."
            )
        if options.get("audio") is not None:
            raise ValueError("Lance hears nothing, and got a sound.\nDisconnect it.")
        bare = options.get("skip_template", False)
        ids = self.tokenizer.encode_template(text) if bare else self.tokenizer.encode(text)
        row = [(i, 1.0, n) if return_word_ids else (i, 1.0) for n, i in enumerate(ids)]
        return {
            TOKENS: [row],
            "text": text,
            "bare": bare,
            "visuals": list(self._read(image, video)),
            "video": video is not None,
        }

    def _read(self, image: Tensor | None, video: Tensor | None) -> Iterator[Segment]:
        sources = [] if image is None else [one[None] for one in image]
        for source in [*sources, *([] if video is None else [video])]:
            yield self.tower.encode(*seen(source, AUTO, self.sizes, GENERATE_TEXT_FPS))

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        return self.tokenizer.decode(token_ids)

    def state_dict(self) -> dict:
        return {}


class LanceTextModel(torch.nn.Module):
    """Stands where ComfyUI expects a text encoder. A prompt stays a recipe: the sampler's model reads it.

    owner: the shared ``LanceModel``; kept out of the module tree, so that its weights are counted once.
    """

    def __init__(self, owner: torch.nn.Module, tower: VisionTower) -> None:
        super().__init__()
        object.__setattr__(self, "owner", owner)
        self.tower = tower
        self.dtypes = {torch.float32}
        self.device = comfy.model_management.get_torch_device()

    @property
    def tokenizer(self) -> LanceTokenizer:
        return self.owner.tokenizer

    @property
    def sizes(self) -> TrainedSizes:
        return self.owner.sizes

    @property
    def diffusion_model(self) -> torch.nn.Module:
        return self.owner.diffusion_model

    def state_dict(self, *args: Any, **more: Any) -> dict[str, Tensor]:
        """The shared weights: where Load LoRA (Bypass) looks for the layers of a CLIP, and then for their modules."""
        return self.owner.state_dict(*args, **more)

    def reset_clip_options(self) -> None:
        self.device = comfy.model_management.get_torch_device()

    def set_clip_options(self, options: dict) -> None:
        """Layers of other text encoders have no meaning here."""
        self.device = options.get("execution_device", self.device)

    def memory_estimation_function(self, tokens: dict, device: torch.device | None = None) -> int:
        """Bytes that reading a question takes beside the weights: keys and values, and an MLP's wide rows.

        tokens: what the tokenizer made of a question, or a ready ``"context"``. A prompt is not read here: 0.
        """
        context = tokens.get("context") or (self._question(tokens) if tokens.get("visuals") else None)
        config, dtype = self.owner.diffusion_model.config, self.owner.get_dtype_inference()
        if context is None:
            return 0
        a_token = config.kv_values_per_token + WIDE_ROWS * config.intermediate_size
        head = self.owner.diffusion_model.language_model.lm_head.weight
        passing = head.numel() * dtype.itemsize if head.device != self.device else 0  # through the device, token by token
        return sum(layout(context).split_lens) * a_token * dtype.itemsize + passing

    def encode_token_weights(self, tokens: dict) -> tuple[Tensor, None, dict]:
        recipe = Recipe(tuple(int(token[0]) for token in tokens[TOKENS][0]))
        return recipe.tagged(), None, {CONDITIONING_KEY: recipe}

    def load_sd(self, state: dict) -> tuple[list, list]:
        return [], []

    def generate(
        self,
        tokens: dict,
        do_sample: bool = True,
        max_length: int = 256,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        presence_penalty: float = 0.0,
    ) -> list[int]:
        """ComfyUI's Generate Text: an answer about the pictures, or a continuation of the text."""
        # A top_p of 0 is one token to choose from.
        drawn, share = (temperature, top_p) if do_sample and top_p > 0 else (0.0, 1.0)
        sampling = Sampling(drawn, share, seed or 0, top_k, min_p, repetition_penalty, presence_penalty)
        return list(self.answer(self._question(tokens), max_length, sampling, self._loaded()))

    @torch.no_grad()
    def answer(
        self, context: Context, max_length: int, sampling: Sampling, patcher: ModelPatcher | None = None
    ) -> Iterator[int]:
        """Ids of an answer, with ComfyUI's progress and interruption; the weights must be loaded (``CLIP.load_model``).

        patcher: the one that is loaded, where another device has been chosen for this CLIP: it may hold a copy.
        """
        model, device = (self.owner, self.device) if patcher is None else (patcher.model, patcher.load_device)
        engine = Engine(model.diffusion_model, model.get_dtype_inference(), device, comfy_attention())
        sequence = layout(context)
        cache, weights = model.question_cache, (model.weights_in_place(), *_beside(patcher))
        shown = with_prefill_progress(engine, sequence, cache.splits_kept(weights, engine, sequence))
        ids = answer(engine, sequence, self.tokenizer, max_length, sampling, partial(cache.prefill, weights, shown))
        bar = comfy.utils.ProgressBar(max_length)
        for token in ids:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update(1)
            yield token

    def _loaded(self) -> ModelPatcher | None:
        """The patcher that was loaded last on the device that was chosen for this CLIP; ComfyUI does not say which."""
        loaded = comfy.model_management.loaded_models()
        found = (one for one in loaded if isinstance(one.model, type(self.owner)) and one.load_device == self.device)
        return next(found, None)

    def _question(self, tokens: dict) -> Context:
        """The context of a question, or of bare text that brings its own template."""
        context = open_context(self.tokenizer, "")
        if tokens["bare"]:
            ids = [token[0] for token in tokens[TOKENS][0]]
            if not ids:
                raise ValueError("A question without a template has 0 tokens; it needs 1 or more.\nWrite a prompt.")
            return Context((*tokens["visuals"], Segment.text(ids)), context.vision)
        system = system_sentence("x2t_video" if tokens["video"] else "x2t_image", asked=bool(tokens["text"]))
        return question_context(self.tokenizer, open_context(self.tokenizer, system, tokens["visuals"]), tokens["text"])


def _beside(patcher: ModelPatcher | None) -> list[Any]:
    """What a patcher runs beside the weights, LoRAs that are not patched into them for one; not kept alive by it."""
    return [] if patcher is None else [weakref.ref(one) for those in patcher.injections.values() for one in those]


class LanceCLIP(comfy.sd.CLIP):
    """ComfyUI's CLIP, but a prompt becomes a recipe without the weights: they need not be loaded for it.

    (MODEL has them too. With other LoRAs than CLIP's, ComfyUI would take these out of all of them, and put them in again.)
    """

    def clone(self, disable_dynamic: bool = False) -> "LanceCLIP":
        clone = LanceCLIP(no_init=True)
        vars(clone).update(vars(super().clone(disable_dynamic=disable_dynamic)))
        text = clone.cond_stage_model
        if clone.patcher.model is not text.owner:  # another device was chosen, and has a copy of the weights
            clone.cond_stage_model = LanceTextModel(clone.patcher.model, text.tower)
            clone.cond_stage_model.device = text.device
        return clone

    def encode_from_tokens(self, tokens: dict, return_pooled: bool | str = False, return_dict: bool = False) -> Any:
        cond, pooled, extra = self.cond_stage_model.encode_token_weights(tokens)
        if return_dict:
            found = {"cond": cond, "pooled_output": pooled, **extra}
            self.add_hooks_to_dict(found)
            return found
        return (cond, pooled) if return_pooled else cond


def make_clip(patcher: Any, tower: VisionTower) -> comfy.sd.CLIP:
    """A CLIP over a clone of the MODEL's patcher: one copy of the weights, each side with LoRAs of its own."""
    clip = LanceCLIP(no_init=True)
    clip.patcher = patcher.clone()
    clip.patcher.is_clip = True
    clip.cond_stage_model = LanceTextModel(patcher.model, tower)
    clip.tokenizer = LanceClipTokenizer(patcher.model.tokenizer, tower, patcher.model.sizes)
    clip.layer_idx = None
    clip.tokenizer_options = {}
    clip.use_clip_schedule = False
    clip.apply_hooks_to_conds = None
    return clip


def lance_of(clip: comfy.sd.CLIP) -> LanceTextModel:
    """The text model of a CLIP; ``ValueError`` for one that is not Lance's."""
    model = clip.cond_stage_model
    if not isinstance(model, LanceTextModel):
        raise ValueError(f"This CLIP is a {type(model).__name__}, not Lance's.\nConnect the CLIP of Load Lance.")
    return model


def answer_of(clip: comfy.sd.CLIP, context: Context, max_length: int, sampling: Sampling) -> Iterator[int]:
    """Loads a CLIP, and gives the ids of its answer, computed on its own device from its own copy of the weights."""
    patcher = clip.load_model({"context": context})
    with comfy.model_management.cuda_device_context(patcher.load_device):
        yield from lance_of(clip).answer(context, max_length, sampling, patcher)
