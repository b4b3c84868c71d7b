"""Lance as ComfyUI's MODEL: one root module with both experts, and a prefix that lives for one sampling run."""

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_patcher
import comfy.patcher_extension
import comfy.supported_models_base
import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor

from ..lance_runtime.checkpoint import ANY_VARIANT, HEADER_TENSOR, VARIANT_HEADER, VIT_PREFIX, pack_json
from ..lance_runtime.config import LanceConfig
from ..lance_runtime.denoise import BATCHED_TOKENS, predict_velocity
from ..lance_runtime.engine import Engine
from ..lance_runtime.model.attention import without_cudnn_attention
from ..lance_runtime.model.transformer import Lance, Streams, held_share
from ..lance_runtime.prefill import Branch, already_read, branch
from ..lance_runtime.reuse import PrefixCache
from ..lance_runtime.tokenizer import LanceTokenizer
from ..lance_runtime.types import LatentShape, TrainedSizes
from .attention import comfy_attention
from .pictures import check_axes, check_channels
from .progress import with_prefill_progress
from .recipe import CONDITIONING_KEY, Recipe

LOGGER = logging.getLogger("lance")
BOUNDARY_TOKENS = 2


class LanceDiffusion(Lance):
    """The network as ComfyUI calls it: latents, sigma and prefilled branches -> velocity."""

    def __init__(
        self,
        lance_config: LanceConfig,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        operations: Any = None,
        **unet_config: Any,
    ) -> None:
        super().__init__(lance_config, operations, dtype, device)
        self.dtype = dtype
        self.in_channels = self.out_channels = lance_config.latent_channels  # other nodes (RenormCFG) ask for them
        if dtype is not None and dtype.itemsize == 1:
            self._keep_the_rest(torch.bfloat16)

    def _keep_the_rest(self, dtype: torch.dtype) -> None:
        """Of 8-bit weights: biases, norms, tables, head and glue are small, and rounding them is what shows."""
        layers = set(self.language_model.model.layers.modules())
        for module in self.modules():
            for name in ("bias",) if module in layers and isinstance(module, torch.nn.Linear) else ("weight", "bias"):
                parameter = getattr(module, name, None)
                if parameter is not None:
                    setattr(module, name, torch.nn.Parameter(parameter.to(dtype), requires_grad=False))
                elif hasattr(module, f"{name}_comfy_model_dtype"):  # Windows: nothing is allocated before it is loaded
                    setattr(module, f"{name}_comfy_model_dtype", dtype)

    def embed_text(self, ids: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        table = self.language_model.model.embed_tokens
        patched = table.weight_function or getattr(table, "weight_lowvram_function", None) or "forward" in vars(table)
        if table.weight.is_cpu and not patched and not isinstance(table.weight, QuantizedTensor):
            # ComfyUI's embedding would bring the whole table (0.6 GB) to the device, and keep it there.
            return torch.nn.functional.embedding(ids, table.weight).to(device, dtype)
        return table(ids.to(device), out_dtype=dtype)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | None = None,
        control: Any = None,
        transformer_options: dict | None = None,
        **conds: Any,
    ) -> Tensor:
        """x (n * B, C, T, H, W), sigma (n * B) -> velocity like x; ``prefix`` in conds holds the n branches."""
        options = transformer_options or {}
        kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
        wrappers = comfy.patcher_extension.get_all_wrappers(kind, options)
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        # A copy: EasyCache writes its result into x, and where nothing was cast that is what ComfyUI still computes with.
        return executor.execute(x.clone() if wrappers else x, timesteps, context, options, **conds)

    def _forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Any,
        options: dict,
        prefix: Sequence[Any] = (),
        moving: Tensor | None = None,
        **unused: Any,
    ) -> Tensor:
        grid = LatentShape(*x.shape[2:])
        hooks = partial(run_layer, options, self), partial(patch_attention, options)
        engine = Engine(self, x.dtype, x.device, comfy_attention(options), *hooks)
        branches = [part.branch(engine, grid) if isinstance(part, Prefix) else part for part in prefix]
        times = timesteps[:, None].expand(-1, grid.frames)
        return predict_velocity(engine, x, times if moving is None else times * moving, branches)


def patch_attention(options: dict, attention: Tensor) -> Tensor:
    """What attention gave, through the patches of other nodes (normalized attention guidance, say)."""
    for patch in options.get("patches", {}).get("attn1_output_patch", ()):
        attention = patch(attention, {**options, "img_slice": [BOUNDARY_TOKENS, attention.shape[1]]})
    return attention


def run_layer(options: dict, model: Lance, index: int, layer: Callable[[Streams], Streams], hidden: Streams) -> Streams:
    """One layer, or what a patch of ComfyUI (skip-layer guidance, say) puts in its place."""
    options.update(block_index=index, block_type="double", total_blocks=model.config.num_hidden_layers)
    replacement = options.get("patches_replace", {}).get("dit", {}).get(("double_block", index))
    if replacement is None:
        return layer(hidden)

    def original(arguments: dict) -> dict:
        done = layer(Streams(arguments["txt"], arguments["img"]))
        return {"txt": done.und, "img": done.gen}

    arguments = {"img": hidden.gen, "txt": hidden.und, "transformer_options": options}
    out = replacement(arguments, {"original_block": original})
    return Streams(out.get("txt", hidden.und), out["img"])


class Prefix:
    """One conditioning of a sampling run: its recipe, and its branches once they are needed.

    It has neither ``dtype`` nor ``to``, so that ComfyUI hands it through as it is.
    """

    def __init__(self, recipe: Recipe, tokenizer: LanceTokenizer) -> None:
        self.recipe, self.tokenizer = recipe, tokenizer
        self._branches: dict[Any, Branch] = {}

    def branch(self, engine: Engine, grid: LatentShape, hooks: Any = (), beside: Iterable["Prefix"] = ()) -> Branch:
        """The branch for a latent grid (areas and context windows have grids of their own), made on first use.

        beside: the prefixes of the same run.
        """
        if torch.is_grad_enabled():
            return branch(engine, self.recipe.layout(self.tokenizer, grid))
        key = (hooks, grid, engine.dtype, engine.device)
        if key not in self._branches:
            if any(known != hooks for known, *_ in self._branches):
                self._branches.clear()  # other weights are in place
            sequence = self.recipe.layout(self.tokenizer, grid)
            others = [other._branches[key] for other in beside if key in other._branches]
            done, _ = already_read(sequence, others)
            self._branches[key] = branch(with_prefill_progress(engine, sequence, done), sequence, others)
        return self._branches[key]

    def clear(self) -> None:
        self._branches.clear()


class CONDPrefix(comfy.conds.CONDRegular):
    """Carries a ``Prefix``; conditionings of any length run in one batch, since attention is per branch."""

    def process_cond(self, batch_size: int, **kwargs: Any) -> "CONDPrefix":
        return CONDPrefix(self.cond)

    def can_concat(self, other: "CONDPrefix") -> bool:
        return isinstance(other, CONDPrefix)

    def concat(self, others: Sequence["CONDPrefix"]) -> list[Prefix]:
        return [self.cond, *(other.cond for other in others)]

    def size(self) -> list[int]:
        return [1, 1, self.cond.recipe.length]


class LanceModel(comfy.model_base.BaseModel):
    """ComfyUI's model around the network; knows how a CONDITIONING becomes a context."""

    def __init__(self, model_config: "LanceModelConfig", device: torch.device | None = None) -> None:
        flow = comfy.model_base.ModelType.FLOW
        super().__init__(model_config, flow, device=device, unet_model=LanceDiffusion)
        self.tokenizer: LanceTokenizer = model_config.tokenizer
        self.variant: str | None = model_config.variant
        self.prefixes: list[Prefix] = []
        self.question_cache = PrefixCache()
        # What a saved model takes along: configuration and tokenizer, and the checkpoint's own vision tower if it has one.
        self.header: dict[str, str] = {}
        self.own_tower: Mapping[str, Tensor] = {}
        self.memory_usage_factor_conds = ("prefix",)

    @property
    def sizes(self) -> TrainedSizes:
        return self.diffusion_model.config.sizes

    def state_dict_for_saving(self, *parts: Any, **more: Any) -> dict[str, Tensor]:
        # ComfyUI's save nodes keep tensors alone.
        header = {**self.header, **({} if self.variant is None else {VARIANT_HEADER: self.variant})}
        tower = {VIT_PREFIX + name: tensor for name, tensor in self.own_tower.items()}
        return {**super().state_dict_for_saving(*parts, **more), **tower, HEADER_TENSOR: pack_json(header)}

    def get_dtype_inference(self) -> torch.dtype:
        # ``--force-fp16`` and Select Model Device do not ask what a model supports.
        found = super().get_dtype_inference()
        return torch.float32 if found == torch.float16 else found

    def memory_required(self, input_shape: Sequence[int], cond_shapes: dict | None = None) -> float:
        # ComfyUI's formula is linear in the tokens; ours hold less each the more they are.
        tokens = input_shape[0] * math.prod(input_shape[2:])
        if tokens == 0:
            raise ValueError(
                f"An area of a conditioning holds 0 tokens of the latent {list(input_shape[2:])}: it lies outside.\n"
                "Conditioning (Set Area) counts Lance's pixels double: halve x, y, width and height."
            )
        return super().memory_required(input_shape, cond_shapes or {}) * held_share(tokens)

    def process_timestep(self, timestep: Tensor, **kwargs: Any) -> Tensor:
        # The network sees sigma, whatever multiplier ModelSamplingSD3 or AuraFlow has put here; Flux's has none.
        return timestep / getattr(self.model_sampling, "multiplier", 1.0)

    def extra_conds(self, **kwargs: Any) -> dict[str, comfy.conds.CONDRegular]:
        if kwargs.get("reference_latents"):
            raise ValueError(
                f"This conditioning holds {len(kwargs['reference_latents'])} reference latents; Lance reads 0 of them.\n"
                "Use Lance Edit or Lance Subject, and connect its context."
            )
        prefix = Prefix(Recipe.of(kwargs.get(CONDITIONING_KEY), kwargs.get("cross_attn")), self.tokenizer)
        if not self.prefixes and "noise" in kwargs:  # the first of a run
            check_axes(kwargs["noise"])
            self._check_variant(frames=kwargs["noise"].shape[2])
        self.prefixes.append(prefix)
        conds: dict[str, comfy.conds.CONDRegular] = {"prefix": CONDPrefix(prefix)}
        mask, latents = kwargs.get("denoise_mask"), kwargs.get("latent_image")
        if mask is not None and latents is not None and not bool(mask.amax(dim=(1, 3, 4)).all()):
            conds["given_mask"] = comfy.conds.CONDNoiseShape(mask[:, :1])
            conds["given_latents"] = comfy.conds.CONDNoiseShape(latents)
        return conds

    def _check_variant(self, frames: int) -> None:
        """The tensors of the two checkpoints match, their training does not."""
        fitting = "image" if frames == 1 else "video"
        if self.variant not in (None, ANY_VARIANT, fitting):
            LOGGER.warning("[Lance] This is the %s checkpoint; the %s checkpoint draws this better.", self.variant, fitting)

    def process_latent_in(self, latent: Tensor) -> Tensor:
        check_channels(latent)
        return super().process_latent_in(latent)

    def extra_conds_shapes(self, **kwargs: Any) -> dict[str, list[int]]:
        recipe = kwargs.get(CONDITIONING_KEY)
        return {} if recipe is None else {"prefix": [1, 1, recipe.length]}

    def _apply_model(
        self, x: Tensor, t: Tensor, *args: Any, given_mask: Tensor | None = None, given_latents: Any = None, **kwargs: Any
    ) -> Tensor:
        prefix = kwargs.get("prefix")
        if prefix is not None:
            kwargs["prefix"] = self._branches(prefix if isinstance(prefix, list) else [prefix], x)
        if given_mask is None:
            return self._network(x, t, *args, **kwargs)
        # A frame masked whole is given: it enters clean, at time 0. A mask over a part of one is plain inpainting.
        moving = given_mask.to(x).amax(dim=(1, 3, 4)) > 0  # (B, T)
        clean = torch.where(moving[:, None, :, None, None], x, given_latents.to(x))
        denoised = self._network(clean, t, *args, moving=moving, **kwargs)
        return denoised + (x - clean)  # so that x - denoised is sigma * velocity everywhere

    def _network(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # Out here, since a compiled network cannot change the flag.
        short = x.shape[0] * math.prod(x.shape[2:]) <= BATCHED_TOKENS
        with without_cudnn_attention() if short else nullcontext():
            return super()._apply_model(x, *args, **kwargs)

    def _branches(self, prefixes: list[Prefix], x: Tensor) -> list[Any]:
        """Prefilled outside the (perhaps compiled) network; with gradients the network does it, and nothing is kept."""
        if torch.is_grad_enabled():
            return prefixes
        engine = Engine(self.diffusion_model, self.get_dtype_inference(), x.device, comfy_attention())
        grid = LatentShape(*x.shape[2:])
        return [prefix.branch(engine, grid, self._hooks(), self.prefixes) for prefix in prefixes]

    def _hooks(self) -> tuple:
        """What tells the weights in place apart within a run: hooks and their strengths."""
        hooks = getattr(self.current_patcher, "current_hooks", None)
        return () if hooks is None else tuple((id(hook.hook_ref), float(hook.strength)) for hook in hooks.hooks)

    def weights_in_place(self) -> tuple:
        """What tells the weights apart that questions are read with: LoRAs, and hooks."""
        return self.current_weight_patches_uuid, self._hooks()

    def free_prefixes(self) -> None:
        """After a run, and after an interrupted one, whose conditionings ComfyUI keeps."""
        for prefix in self.prefixes:
            prefix.clear()
        self.prefixes.clear()


def check_model(model: comfy.model_patcher.ModelPatcher) -> "LanceModel":
    """The Lance model of a MODEL; ``ValueError`` for one that is not Lance's."""
    if not isinstance(model.model, LanceModel):
        raise ValueError(f"This MODEL is a {type(model.model).__name__}, not Lance's.\nConnect the MODEL of Load Lance.")
    return model.model


class LanceModelConfig(comfy.supported_models_base.BASE):
    """What ComfyUI wants to know of a model it has no own entry for."""

    unet_config = {"image_model": "lance"}  # noqa: RUF012
    unet_extra_config = {}  # noqa: RUF012
    sampling_settings = {"shift": 3.5, "multiplier": 1000}  # noqa: RUF012
    latent_format = comfy.latent_formats.Wan22
    # Counted, not measured: a step holds 71 KB a token in bfloat16 (tests/test_memory.py), which this takes for 82.
    memory_usage_factor = 4.0
    # float16 overflows in Qwen2.5's MLPs; cards without bfloat16 compute in float32.
    supported_inference_dtypes = [torch.bfloat16, torch.float32]  # noqa: RUF012
    vae_key_prefix = ["vae."]  # noqa: RUF012
    text_encoder_key_prefix = ["text_encoders."]  # noqa: RUF012

    def __init__(
        self, lance_config: LanceConfig, tokenizer: LanceTokenizer, variant: str | None, latent_rgb: str | None = None
    ) -> None:
        super().__init__({**self.unet_config, "lance_config": lance_config})
        self.tokenizer, self.variant = tokenizer, variant
        if latent_rgb is not None:  # previews of a model whose VAE is not Wan's
            colours = json.loads(latent_rgb)
            self.latent_format.latent_rgb_factors = colours["factors"]
            self.latent_format.latent_rgb_factors_bias = colours["bias"]

    def inpaint_model(self) -> bool:
        return False

    def get_model(self, state_dict: dict, prefix: str = "", device: torch.device | None = None) -> LanceModel:
        return LanceModel(self, device=device)

    def process_clip_state_dict_for_saving(self, state_dict: dict) -> dict:
        # CLIP is the same module as MODEL: nothing to save twice.
        return {}
