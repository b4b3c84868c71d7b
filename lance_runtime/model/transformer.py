"""Lance: a Qwen2 decoder with two experts a layer over one shared sequence ("mixture of transformers").

A run of tokens is two tensors, the understanding expert's and the generation expert's, never one packed sequence with
index lists: attention does not care for their order, and their positions are already in the rotary embedding.
(Reference: modeling/lance/qwen2_navit.py and lance.py.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import LanceConfig
from ..types import LatentShape
from . import layers
from .attention import SelfAttention
from .embeddings import TimestepEmbedder
from .rope import Rope

UND, GEN = "", "_moe_gen"
KINDS_OF_CALLS = 64  # for which one function may be compiled
ROWS_AT_ONCE = 8192  # that pass an MLP: a clip's 49 000 would take 2 GB of wide ones

# The MLP's share of what a layer holds for a token of a short run; counted (tests/test_memory.py).
WIDE_SHARE = 0.45

# Attention over what one run of tokens may see: layer index, q (B, H, L, d), k, v (B, Hkv, L, d) -> (B, L, H * d).
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]

# A host's place between layers: index, the layer as a function of its hidden states, hidden states -> hidden states.
LayerHook = Callable[[int, Callable[["Streams"], "Streams"], "Streams"], "Streams"]


class Streams(NamedTuple):
    """The two experts' parts of one run of tokens: hidden states (B, L, D), or their rope tables; None where empty."""

    und: Any = None
    gen: Any = None

    @property
    def experts(self) -> list[tuple[str, Any]]:
        return [(name, part) for name, part in ((UND, self.und), (GEN, self.gen)) if part is not None]


class MLP(nn.Module):
    """Qwen2's gated MLP."""

    def __init__(self, config: LanceConfig, operations: Any, **factory: Any) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = operations.Linear(hidden, inner, bias=False, **factory)
        self.up_proj = operations.Linear(hidden, inner, bias=False, **factory)
        self.down_proj = operations.Linear(inner, hidden, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D); the wide rows between exist for some tokens at a time, and are written over in place."""
        if torch.is_grad_enabled():
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) <= ROWS_AT_ONCE:
            return self._gated(x)
        result = torch.empty_like(rows)
        for part, into in zip(rows.split(ROWS_AT_ONCE), result.split(ROWS_AT_ONCE), strict=True):
            into.copy_(self._gated(part))
        return result.view(x.shape)

    def _gated(self, x: Tensor) -> Tensor:
        gate = F.silu(self.gate_proj(x), inplace=True)
        return self.down_proj(gate.mul_(self.up_proj(x)))


def _plain_rows(x: Tensor) -> Tensor:
    """The same (B, L, D) with plain strides: a CPU's bfloat16 product with parts of longer rows took up to 70 times as long."""
    return x.reshape(-1, x.shape[-1]).unflatten(0, x.shape[:2])


def held_share(tokens: int) -> float:
    """What a layer holds for a token of a run of this length, relative to one of a short run."""
    return 1 - WIDE_SHARE * (1 - min(1.0, ROWS_AT_ONCE / tokens))


class DecoderLayer(nn.Module):
    """One layer: norms and MLP of each expert around the attention that they share."""

    def __init__(self, config: LanceConfig, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config, operations, **factory)
        for expert in (UND, GEN):
            self.add_module(f"mlp{expert}", MLP(config, operations, **factory))
            for norm in ("input_layernorm", "post_attention_layernorm"):
                layer_norm = operations.RMSNorm(config.hidden_size, eps=config.rms_norm_eps, **factory)
                self.add_module(f"{norm}{expert}", layer_norm)
        # Or compiled ones. Plain functions: bound methods would make a reference cycle.
        self.before, self.after = DecoderLayer.before_attention, DecoderLayer.after_attention

    def forward(self, hidden: Streams, rope: Streams, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Streams:
        """Hidden states (B, L, D) of both experts and their rope tables -> the states after the layer.

        attend: queries (B, H, L, d), keys and values (B, Hkv, L, d) of all tokens, the understanding expert's first, ->
        (B, L, H * d).
        """
        projected, lengths = [], []
        for (expert, x), (_, table) in zip(hidden.experts, rope.experts, strict=True):
            projected.append(self.before(self, x, table, expert))
            lengths.append(x.shape[1])
        q, k, v = projected[0] if len(projected) == 1 else (torch.cat(parts, dim=2) for parts in zip(*projected, strict=True))
        del projected  # what is not read again must not wait for the MLP, whose rows are the widest
        attended = [_plain_rows(part) for part in attend(q, k, v).split(lengths, dim=1)]
        del q, k, v
        done = {expert: self.after(self, x, a, expert) for (expert, x), a in zip(hidden.experts, attended, strict=True)}
        return Streams(done.get(UND), done.get(GEN))

    def before_attention(self, hidden: Tensor, rope: Rope, expert: str) -> tuple[Tensor, Tensor, Tensor]:
        """One expert's tokens (B, L, D) -> their queries, keys and values (B, heads, L, head_dim)."""
        return self.self_attn.project(getattr(self, f"input_layernorm{expert}")(hidden), rope, expert)

    def after_attention(self, hidden: Tensor, attended: Tensor, expert: str) -> Tensor:
        """One expert's tokens (B, L, D), and what attention gave them (B, L, H * d) -> (B, L, D)."""
        hidden = hidden + getattr(self.self_attn, f"o_proj{expert}")(attended)
        return hidden + getattr(self, f"mlp{expert}")(getattr(self, f"post_attention_layernorm{expert}")(hidden))


class Decoder(nn.Module):
    """Embedding table, layers, and a final norm for each expert."""

    def __init__(self, config: LanceConfig, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.embed_tokens = operations.Embedding(config.vocab_size, config.hidden_size, **factory)
        self.layers = nn.ModuleList(DecoderLayer(config, operations, **factory) for _ in range(config.num_hidden_layers))
        self.norm = operations.RMSNorm(config.hidden_size, eps=config.rms_norm_eps, **factory)
        self.norm_moe_gen = operations.RMSNorm(config.hidden_size, eps=config.rms_norm_eps, **factory)


class LanguageModel(nn.Module):
    """The decoder and its head, untied (whatever ``tie_word_embeddings`` says, the checkpoints carry both)."""

    def __init__(self, config: LanceConfig, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.model = Decoder(config, operations, **factory)
        self.lm_head = operations.Linear(config.hidden_size, config.vocab_size, bias=False, **factory)

    def logits(self, hidden: Tensor) -> Tensor:
        """Final states (..., D) -> logits (..., vocabulary)."""
        return self.lm_head(self.model.norm(hidden))


class Lance(nn.Module):
    """The whole network; its module tree is the checkpoint's.

    operations: namespace of ``Linear``, ``Embedding`` and ``RMSNorm`` with torch.nn's signatures (default: ``layers``).
    """

    def __init__(
        self,
        config: LanceConfig,
        operations: Any = layers,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        factory = {"dtype": dtype, "device": device}
        self.config, self.compiled = config, False
        self.language_model = LanguageModel(config, operations, **factory)
        self.head = LanguageModel.logits  # or a compiled one
        self.time_embedder = TimestepEmbedder(config.hidden_size, operations, **factory)
        self.vae2llm = operations.Linear(config.latent_channels, config.hidden_size, bias=True, **factory)
        self.llm2vae = operations.Linear(config.hidden_size, config.latent_channels, bias=True, **factory)

    def embed_text(self, ids: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        """ids (B, L) -> (B, L, D) on the device. The table may lie in main memory: only these rows are moved."""
        table = self.language_model.model.embed_tokens
        return table(ids.to(table.weight.device)).to(device, dtype)

    def embed_latents(self, latents: Tensor, timesteps: Tensor, position_embeddings: Tensor) -> Tensor:
        """latents (B, C, T, H, W), flow times (B, T) and position embeddings (tokens, D) -> (B, tokens, D)."""
        values = self.vae2llm(latents.flatten(2).transpose(1, 2))
        times = self.time_embedder(timesteps, latents.dtype)  # (B, T, D)
        by_frame = values.unflatten(1, (latents.shape[2], -1)) + times[:, :, None]
        return by_frame.flatten(1, 2) + position_embeddings

    def run_layers(self, hidden: Streams, rope: Streams, attend: Attend, layer_hook: LayerHook | None = None) -> Streams:
        """Run one block of tokens through all layers; the result is not yet normed.

        layer_hook: called as ``layer_hook(index, layer, hidden)`` in the place of ``layer(hidden)``, so that a host can
        watch, replace or skip layers.
        """
        if self.compiled:
            torch.compiler.cudagraph_mark_step_begin()  # what a layer leaves is read by the next: one step for CUDA graphs
        for index, layer in enumerate(self.language_model.model.layers):
            run = partial(layer, rope=rope, attend=partial(attend, index))
            hidden = run(hidden) if layer_hook is None else layer_hook(index, run, hidden)
        return hidden

    def compile_layers(self, **options: Any) -> None:
        """Run the head, and a layer's two sides of attention, through ``torch.compile``; ``options`` are its own.

        Attention stays outside: its keys grow from call to call, and it is one fused operation already. All layers share
        two functions, so that each is compiled once a shape and expert, not once a layer.
        """
        # A compiled function of a whole graph fails at its ninth kind of call. Ours are two experts, one token or many,
        # one sample or many, guided or not.
        limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
        setattr(torch._dynamo.config, limit, max(KINDS_OF_CALLS, getattr(torch._dynamo.config, limit)))
        if torch.__version__ < "2.5":  # which would else compile every layer anew
            torch._dynamo.config.inline_inbuilt_nn_modules = True
        self.compiled = True
        compiled = partial(torch.compile, fullgraph=True, **options)
        before, after = compiled(DecoderLayer.before_attention), compiled(DecoderLayer.after_attention)
        for layer in self.modules():
            if isinstance(layer, DecoderLayer):
                layer.before, layer.after = before, after
        self.head = compiled(LanguageModel.logits)

    def velocity(self, hidden: Tensor, grid: LatentShape) -> Tensor:
        """Generation expert's final states (B, tokens, D) -> velocity (B, C, T, H, W), from data to noise."""
        velocity = self.llm2vae(self.language_model.model.norm_moe_gen(hidden))
        return velocity.transpose(1, 2).unflatten(2, tuple(grid))

    def logits(self, hidden: Tensor) -> Tensor:
        """Understanding expert's final states (..., D) -> logits (..., vocabulary)."""
        return self.head(self.language_model, hidden)
