"""The first graph in the real ComfyUI: Lance as MODEL, CLIP and VAE among core nodes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from graphs import text_to_image
from safetensors.torch import load_file

from lance_runtime import Guidance
from lance_runtime.vae import _statistics

pytestmark = pytest.mark.comfy
TOLERANCE = 1e-3
PLAIN = {"interval": (0.0, 1.0), "renorm": "none", "uncond_positions": "dense"}


def saved_latents(result, node="latent"):
    """Normalised latents (48, t, h, w): ComfyUI's files hold raw ones."""
    raw = load_file(result.path(node))["latent_tensor"]
    mean, std = _statistics(raw.device)
    return ((raw - mean) / std)[0]


def comfy_noise(seed, *shape):
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))[0]


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_ksampler_draws_what_the_runtime_draws(comfy_server, image_pipe, cfg):
    result = comfy_server.run(text_to_image(cfg=cfg))
    out = image_pipe(
        "t2i",
        "a red hat",
        height=64,
        width=96,
        steps=25,
        noise=comfy_noise(7, 48, 1, 4, 6),
        guidance=Guidance(scale=cfg, **PLAIN),
    )
    assert (saved_latents(result) - out.latents).abs().max() < TOLERANCE
    picture = np.asarray(result.image("save"))
    assert picture.shape == (64, 96, 3)
    assert np.abs(picture.astype(int) - out.frames[0]).max() <= 2
