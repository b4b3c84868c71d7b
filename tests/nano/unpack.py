"""What ships -> a folder to go on training in, for whoever has none: ``python tests/nano/unpack.py --work DIR``."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from lance_runtime.files import NANO  # noqa: E402
from lance_runtime.vae import original_name  # noqa: E402
from nano.export import STATISTICS  # noqa: E402
from nano.learning import Learner  # noqa: E402
from nano.parts import make_lance  # noqa: E402
from nano.vae import build  # noqa: E402


def unpack(shipped: Path, work: Path) -> None:
    """The VAE with its published statistics, and the network with fresh moments (its weights were rounded once)."""
    vae, stored = build(), load_file(shipped / "Wan2.2_VAE.safetensors")
    state = {name: stored[original_name(name)].float() for name in vae.state_dict()}
    torch.save({"vae": state}, work / "vae_both.pt")
    published = json.loads(STATISTICS.read_text("utf-8"))
    shape = (-1, 1, 1, 1)
    values = tuple(torch.tensor(published[name]).view(shape) for name in ("latents_mean", "latents_std"))
    torch.save(values, work / "vae_statistics.pt")
    lance, vision = (
        {name: value.float() for name, value in load_file(shipped / path).items() if not name.startswith("latent_pos")}
        for path in ("Lance_3B/model.safetensors", "Qwen2.5-VL-ViT/vit.safetensors")
    )
    torch.save(vision, work / "vision.pt")
    learner = Learner(make_lance(), rate=0, steps=1).state_dict()
    torch.save({"lance": lance, "averaged": lance, "learner": learner, "step": 0, "spent": 0.0}, work / "lance.pt")
    shutil.copy(shipped / "Lance_3B" / "tokenizer.json", work / "tokenizer.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    work = parser.parse_args().work
    work.mkdir(parents=True, exist_ok=True)
    unpack(NANO, work)


if __name__ == "__main__":
    main()
