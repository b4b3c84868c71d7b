"""Sizes of the model, read from ``llm_config.json`` or inferred from the shapes of a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .types import LANCE_3B, TrainedSizes

EMBED_KEY = "language_model.model.embed_tokens.weight"
LAYER_KEY = "language_model.model.layers.{}.self_attn.{}.weight"


@dataclass(frozen=True)
class LanceConfig:
    """Sizes of the two-expert decoder. The defaults are Lance 3B's (``Lance_3B/llm_config.json``)."""

    hidden_size: int = 2048
    intermediate_size: int = 11008
    num_hidden_layers: int = 36
    num_attention_heads: int = 16
    num_key_value_heads: int = 2
    head_dim: int = 128
    vocab_size: int = 151936
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    mrope_section: tuple[int, int, int] = (16, 24, 24)
    latent_channels: int = 48
    sizes: TrainedSizes = LANCE_3B
    bfloat16_frequencies: bool = True  # see ``rope_table``

    def __post_init__(self) -> None:
        if 2 * sum(self.mrope_section) != self.head_dim:
            raise ValueError(
                f"mrope_section {list(self.mrope_section)} covers {2 * sum(self.mrope_section)} of {self.head_dim} "
                "head dimensions.\nThe sections must add up to half the head dimension: check llm_config.json."
            )

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that a token leaves in the cache: keys and values, of all layers."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> LanceConfig:
        """From the parsed ``llm_config.json``; sizes that it leaves out follow Qwen2's rules."""
        heads, hidden = values["num_attention_heads"], values["hidden_size"]
        rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
        head_dim = values.get("head_dim") or hidden // heads
        return cls(
            hidden_size=hidden,
            intermediate_size=values["intermediate_size"],
            num_hidden_layers=values["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=values["num_key_value_heads"],
            head_dim=head_dim,
            vocab_size=values["vocab_size"],
            rms_norm_eps=values.get("rms_norm_eps", 1e-6),
            rope_theta=values.get("rope_theta") or rope.get("rope_theta", 1e6),
            mrope_section=tuple(rope.get("mrope_section") or _default_sections(head_dim)),
            sizes=_trained_sizes(values.get("lance_trained_sizes") or {}),
            bfloat16_frequencies=_is_of_bfloat16(values),
        )

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> LanceConfig:
        """From tensor shapes alone, for a file that carries no config (rope base and sections are Qwen2.5-VL's).

        ``ValueError`` where a tensor that tells is missing.
        """
        try:
            return cls._from_shapes(shapes)
        except KeyError as error:
            raise ValueError(
                f"The file has no {error.args[0]} among {len(shapes)} tensors: it is not the whole of Lance.\n"
                "Use a file of the whole checkpoint, with embeddings, norms and head."
            ) from error

    @classmethod
    def _from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> LanceConfig:
        vocab_size, hidden = shapes[EMBED_KEY]
        head_dim = shapes[LAYER_KEY.format(0, "q_norm")][0]
        return cls(
            hidden_size=hidden,
            intermediate_size=shapes["language_model.model.layers.0.mlp.gate_proj.weight"][0],
            num_hidden_layers=1
            + max(int(key.split(".")[3]) for key in shapes if key.startswith("language_model.model.layers.")),
            num_attention_heads=shapes[LAYER_KEY.format(0, "q_proj")][0] // head_dim,
            num_key_value_heads=shapes[LAYER_KEY.format(0, "k_proj")][0] // head_dim,
            head_dim=head_dim,
            vocab_size=vocab_size,
            mrope_section=_default_sections(head_dim),
            latent_channels=shapes["llm2vae.weight"][0],
        )


def _is_of_bfloat16(values: Mapping[str, Any]) -> bool:
    """Whether the weights were trained in bfloat16, as Lance was; transformers 5 writes ``dtype``."""
    return values.get("torch_dtype", values.get("dtype", "bfloat16")) == "bfloat16"


def _trained_sizes(values: Mapping[str, Any]) -> TrainedSizes:
    """Our own entry of ``llm_config.json``, for a model that was trained on other sizes than Lance 3B (Nano)."""
    known: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return TrainedSizes(**known)


def _default_sections(head_dim: int) -> tuple[int, int, int]:
    """Qwen2.5-VL's 16, 24, 24 of 64, scaled to the head dimension."""
    time = head_dim // 8
    height = (head_dim // 2 - time) // 2
    return time, height, head_dim // 2 - time - height


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of Qwen2.5-VL's vision tower. The defaults are the 3B model's (``Qwen2.5-VL-ViT/config.json``)."""

    depth: int = 32
    hidden_size: int = 1280
    intermediate_size: int = 3420
    num_heads: int = 16
    out_hidden_size: int = 2048
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    window_size: int = 112
    tokens_per_second: int = 2
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    bfloat16_frequencies: bool = True  # see ``vision.RotaryAngles``

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> VisionConfig:
        """From the parsed ``config.json``; fields of training and of attention kernels are ignored."""
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        known["fullatt_block_indexes"] = tuple(known.get("fullatt_block_indexes", cls().fullatt_block_indexes))
        known["bfloat16_frequencies"] = _is_of_bfloat16(values)
        return cls(**known)
