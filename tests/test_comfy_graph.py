"""The first graph in the real ComfyUI: Lance as MODEL, CLIP and VAE among core nodes."""

from __future__ import annotations

import numpy as np
import pytest
from comfy_results import TOLERANCE, comfy_noise, difference, saved_latents
from graphs import text_to_image

from lance_runtime import Guidance

pytestmark = pytest.mark.comfy
PLAIN = {"interval": (0.0, 1.0), "renorm": "none", "uncond_positions": "dense"}


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_ksampler_draws_what_the_runtime_draws(comfy_server, image_pipe, cfg):
    result = comfy_server.run(text_to_image(cfg=cfg))
    noise, guidance = comfy_noise(7, 48, 1, 4, 6), Guidance(scale=cfg, **PLAIN)
    out = image_pipe("t2i", "a red hat", height=64, width=96, steps=25, noise=noise, guidance=guidance)
    assert difference(saved_latents(result)[0], out.latents) < TOLERANCE
    picture = np.asarray(result.image("save"))
    assert picture.shape == (64, 96, 3)
    assert np.abs(picture.astype(int) - out.frames[0]).max() <= 2
