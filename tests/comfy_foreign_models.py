"""Writes small files of other models into a models folder. Run by ComfyUI's Python, in ComfyUI's folder.

Real classes of ComfyUI at small sizes, so that its own loaders take the files; the weights are random.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path.cwd()))

import torch
from comfy.cli_args import args

args.cpu = True

import comfy.ldm.wan.model  # noqa: E402
import comfy.ldm.wan.vae  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.taesd.taesd  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

WAN_21_VAE = {"z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "temperal_downsample": [False, True, True]}


def wan_model() -> torch.nn.Module:
    """Wan 2.1's network, two layers of 128."""
    sizes = {"dim": 128, "ffn_dim": 128, "num_heads": 1, "num_layers": 2, "text_dim": 4096}
    return comfy.ldm.wan.model.WanModel(model_type="t2v", operations=comfy.ops.disable_weight_init, **sizes)


def initialised(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A state dict whose weights are small and random: ComfyUI's layers start out as memory that was never written."""
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(value.shape, generator=generator) * 0.02 for name, value in module.state_dict().items()}


def write(folder: Path) -> None:
    autoencoder = comfy.taesd.taesd.TAESD()
    files = {
        "vae/wan21.safetensors": comfy.ldm.wan.vae.WanVAE(dim=8, **WAN_21_VAE),
        "vae_approx/taesd_encoder.safetensors": autoencoder.taesd_encoder,
        "vae_approx/taesd_decoder.safetensors": autoencoder.taesd_decoder,
        "diffusion_models/wan21.safetensors": wan_model(),
    }
    for name, module in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(initialised(module), folder / name)
    # ComfyUI takes this one tensor for a whole CLIP-L.
    clip = {"text_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(3072, 768)}
    save_file(clip, folder / "text_encoders/clip_l.safetensors")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
