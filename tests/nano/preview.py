"""Nano's latents -> colours, for the previews that hosts show while a sampler runs: one line for each channel.

python tests/nano/preview.py [--to lance_runtime/nano/Lance_3B]

Nano's VAE is its own, so that the factors that fit Wan 2.2's latents show other colours.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from lance_runtime.checkpoint import TensorFile  # noqa: E402
from lance_runtime.files import NANO, VAE_NAMES, VARIANT_FOLDERS  # noqa: E402
from lance_runtime.vae import WanVAE  # noqa: E402
from nano.parts import write_json  # noqa: E402
from nano.world import draw_scene, render  # noqa: E402

SCENES = 400  # three minutes
DIGITS = 4


def cells(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Latents (cells, channels) of random scenes, and the mean colour (cells, 3) of the pixels of each, in -1 to 1."""
    rng = random.Random(seed)
    vae = WanVAE.from_tensors(TensorFile(NANO / VAE_NAMES[1]), dtype=torch.float32, device=torch.device("cpu"))
    pictures = np.stack([render(draw_scene(rng)) for _ in range(count)])
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        latents = torch.cat([vae.encode(one[None, :, None])[:, :, 0] for one in pixels])
    colours = torch.nn.functional.avg_pool2d(pixels, pixels.shape[-1] // latents.shape[-1])
    return latents.movedim(1, -1).flatten(0, 2), colours.movedim(1, -1).flatten(0, 2)


def fitted(latents: Tensor, colours: Tensor) -> dict[str, list]:
    """Least squares: "factors" (channels, 3) and "bias" (3)."""
    ones = torch.ones(len(latents), 1)
    *factors, bias = torch.linalg.lstsq(torch.cat([latents, ones], dim=1), colours).solution.tolist()
    return {"factors": [[round(x, DIGITS) for x in row] for row in factors], "bias": [round(x, DIGITS) for x in bias]}


def explained(found: dict[str, list], latents: Tensor, colours: Tensor) -> float:
    """The share of the colours' variance that the factors give."""
    shown = latents @ torch.tensor(found["factors"]) + torch.tensor(found["bias"])
    return float(1 - (shown - colours).square().sum() / (colours - colours.mean(0)).square().sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=NANO / VARIANT_FOLDERS["image"])
    to = parser.parse_args().to
    found = fitted(*cells(1, SCENES))
    write_json(to / "latent_rgb.json", found)
    print(f"{100 * explained(found, *cells(2, SCENES)):.1f} % of the colours of other scenes")


if __name__ == "__main__":
    main()
