"""What was trained -> the files that ship, in the hub's own layout.

python tests/nano/export.py --work DIR [--to lance_runtime/nano]
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tokenizers import Tokenizer  # noqa: E402

from lance_runtime.checkpoint import ANY_VARIANT  # noqa: E402
from lance_runtime.config import LanceConfig  # noqa: E402
from lance_runtime.model.embeddings import latent_position_embedding  # noqa: E402
from lance_runtime.tokenizer import QWEN_ADDED_TOKENS  # noqa: E402
from lance_runtime.types import LatentShape  # noqa: E402
from lance_runtime.vae import original_name  # noqa: E402
from nano.parts import CONFIG, VISION, llm_config, write_json  # noqa: E402
from nano.vae import CHANNELS  # noqa: E402

STATISTICS = ROOT / "lance_runtime" / "wan22_statistics.json"
CERTAIN = -10.0  # the posterior's log variance: nobody samples it
NOTES = {"format": "pt", "license": "Apache-2.0", "title": "Lance Nano"}


def rounded(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(torch.bfloat16).contiguous() for name, value in state.items()}


def folded(state: dict[str, Tensor], mean: Tensor, std: Tensor) -> dict[str, Tensor]:
    """The VAE with Wan 2.2's published means and deviations for its latents: the first and last 1 x 1 convolution scale."""
    published = json.loads(STATISTICS.read_text("utf-8"))
    new_mean, new_std = (torch.tensor(published[name]) for name in ("latents_mean", "latents_std"))
    mean, std = mean.flatten(), std.flatten()
    state, factor = dict(state), new_std / std
    weight, bias = state["quant_conv.weight"].clone(), state["quant_conv.bias"].clone()
    bias[:CHANNELS] = bias[:CHANNELS] * factor + new_mean - mean * factor
    weight[:CHANNELS] *= factor.view(-1, 1, 1, 1, 1)
    weight[CHANNELS:], bias[CHANNELS:] = 0, CERTAIN
    back = state["post_quant_conv.weight"]
    offset = back[:, :, 0, 0, 0] @ (mean - new_mean / factor)
    state["post_quant_conv.weight"] = back / factor.view(1, -1, 1, 1, 1)
    state["post_quant_conv.bias"] = state["post_quant_conv.bias"] + offset
    return {**state, "quant_conv.weight": weight, "quant_conv.bias": bias}


def export_vae(work: Path, to: Path) -> None:
    stage = "decoder" if (work / "vae_decoder.pt").is_file() else "both"
    trained = torch.load(work / f"vae_{stage}.pt", weights_only=True)["vae"]
    state = folded(trained, *torch.load(work / "vae_statistics.pt", weights_only=True))
    save_file(rounded({original_name(name): value for name, value in state.items()}), to / "Wan2.2_VAE.safetensors", NOTES)


def export_lance(state: dict[str, Tensor], to: Path, tokenizer: Path) -> None:
    to.mkdir(parents=True, exist_ok=True)
    table = latent_position_embedding(LatentShape(1, 6, 6), CONFIG.hidden_size, torch.device("cpu"))
    tensors = {**rounded(state), "latent_pos_embed.pos_embed": table}
    save_file(tensors, to / "model.safetensors", {**NOTES, "lance_variant": ANY_VARIANT})
    write_json(to / "llm_config.json", {**llm_config(), "lance_trained_sizes": CONFIG.sizes._asdict()})
    shutil.copy(tokenizer, to / "tokenizer.json")
    _write_vocabulary(Tokenizer.from_file(str(tokenizer)), to)
    written = LanceConfig.from_json(json.loads((to / "llm_config.json").read_text("utf-8")))
    if written != CONFIG:
        raise ValueError(f"llm_config.json reads back as {written}, not {CONFIG}.\nComplete parts.llm_config.")


def _write_vocabulary(tokenizer: Tokenizer, to: Path) -> None:
    """vocab.json, merges.txt and tokenizer_config.json, which the reference reads instead of tokenizer.json."""
    tokenizer.model.save(str(to))
    added = {
        tokenizer.token_to_id(token): {
            "content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True
        }
        for token in QWEN_ADDED_TOKENS
    }  # fmt: skip
    settings: dict[str, Any] = {"tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": False, "model_max_length": 131072}
    write_json(to / "tokenizer_config.json", {**settings, "added_tokens_decoder": added})


def export_vision(state: dict[str, Tensor], to: Path) -> None:
    to.mkdir(parents=True, exist_ok=True)
    save_file(rounded(state), to / "vit.safetensors", NOTES)
    fields = {name: getattr(VISION, name) for name in VISION.__dataclass_fields__ if name != "bfloat16_frequencies"}
    others = {"model_type": "qwen2_5_vl", "hidden_act": "silu", "in_channels": 3, "torch_dtype": "float32"}
    write_json(to / "config.json", {**fields, **others})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--to", type=Path, default=ROOT / "lance_runtime" / "nano")
    arguments = parser.parse_args()
    arguments.to.mkdir(parents=True, exist_ok=True)
    lance, vision = (torch.load(arguments.work / name, weights_only=True) for name in ("lance.pt", "vision.pt"))
    export_lance(lance["averaged"], arguments.to / "Lance_3B", arguments.work / "tokenizer.json")
    export_vision(vision, arguments.to / "Qwen2.5-VL-ViT")
    export_vae(arguments.work, arguments.to)
    size = sum(path.stat().st_size for path in arguments.to.rglob("*") if path.is_file())
    print(f"{size / 1e6:.2f} MB in {arguments.to}")


if __name__ == "__main__":
    main()
