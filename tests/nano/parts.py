"""What Nano is made of before it has learned anything: sizes, vocabulary, first weights."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn

from lance_runtime.config import LanceConfig, VisionConfig
from lance_runtime.model.transformer import Lance
from lance_runtime.model.vision import PatchProjection, build_vision
from lance_runtime.prompts import TASKS as ALL_TASKS
from lance_runtime.prompts import caption_sentences, system_sentence
from lance_runtime.tokenizer import QWEN_ADDED_TOKENS
from lance_runtime.types import TrainedSizes

from .tasks import TASKS, draw
from .world import FRAMES, SIDE

VOCABULARY = 1024
CONFIG = LanceConfig(
    hidden_size=160,
    intermediate_size=384,
    num_hidden_layers=6,
    num_attention_heads=5,
    num_key_value_heads=1,
    head_dim=32,
    vocab_size=VOCABULARY,
    mrope_section=(4, 6, 6),
    rope_theta=20.0,
    bfloat16_frequencies=False,
    sizes=TrainedSizes("image_96res", "video_96p", (SIDE, SIDE), (SIDE, SIDE), FRAMES, FRAMES, FRAMES / 12),
)
VISION = VisionConfig(
    depth=3,
    hidden_size=96,
    intermediate_size=192,
    num_heads=4,
    out_hidden_size=160,
    fullatt_block_indexes=(1, 2),
    bfloat16_frequencies=False,
)
IMAGE_PRESET = CONFIG.sizes.image_preset

# How Qwen2.5 cuts text into words (Qwen2.5's tokenizer.json).
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def texts(seed: int = 0, number: int = 400) -> Iterator[str]:
    """Everything that Nano reads and writes: the system sentences, and words of every task."""
    for task in ALL_TASKS:
        yield from [system_sentence(task)] * 20
    for task in ("x2t_image", "x2t_video"):
        yield from [sentence for sentence in caption_sentences(task) for _ in range(20)]
        yield from [system_sentence(task, "?")] * 20
    yield from ["system\n", "user\n", "assistant\n"] * 20
    rng = random.Random(seed)
    for task in TASKS:
        for _ in range(number):
            example = draw(rng, task)
            yield example.prompt
            if isinstance(example.wanted, str):
                yield example.wanted


def make_tokenizer() -> Tokenizer:
    """Qwen2.5's kind of tokenizer, byte-level BPE, with a vocabulary of this world."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(QWEN_ADDED_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in QWEN_ADDED_TOKENS])
    return tokenizer


def make_lance() -> Lance:
    """The network with first weights: the two experts are drawn apart, and nothing is drawn yet (velocity 0)."""
    model = Lance(CONFIG)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            last = name.endswith(("o_proj", "down_proj", "o_proj_moe_gen")) or "_moe_gen.down_proj" in name
            scale = (2 * CONFIG.num_hidden_layers) ** -0.5 if last else 1.0
            nn.init.normal_(module.weight, std=scale * module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            # As large as what the layers add: a smaller word drowns in the residual stream, and is learned ten times slower.
            nn.init.normal_(module.weight, std=1.0)
    nn.init.zeros_(model.llm2vae.weight)
    nn.init.normal_(model.language_model.lm_head.weight, std=0.02)
    return model


def make_vision() -> Any:
    vision = build_vision(VISION, device="cpu").train(True).requires_grad_(True)
    for name, module in vision.named_modules():
        if isinstance(module, nn.Linear):
            scale = (2 * VISION.depth) ** -0.5 if name.endswith(("attn.proj", "down_proj")) else 1.0
            nn.init.normal_(module.weight, std=scale * module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, PatchProjection):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    for name, parameter in vision.named_parameters():
        if "norm" in name or "ln_q" in name:
            nn.init.ones_(parameter)
    return vision


def llm_config() -> dict[str, Any]:
    """Nano's ``llm_config.json``."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": CONFIG.hidden_size,
        "intermediate_size": CONFIG.intermediate_size,
        "num_hidden_layers": CONFIG.num_hidden_layers,
        "num_attention_heads": CONFIG.num_attention_heads,
        "num_key_value_heads": CONFIG.num_key_value_heads,
        "rms_norm_eps": CONFIG.rms_norm_eps,
        "rope_theta": CONFIG.rope_theta,
        "rope_scaling": {"type": "mrope", "mrope_section": list(CONFIG.mrope_section)},
        "tie_word_embeddings": False,
        "torch_dtype": "float32",  # that it was trained in
        "vocab_size": CONFIG.vocab_size,
    }


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", "utf-8")
