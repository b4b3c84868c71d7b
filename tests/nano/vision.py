"""The vision tower's first lesson: what lies under each of its tokens. (Lance's own tower was trained before Lance, too.)

    python tests/nano/vision.py --work DIR --steps 1500

Reading it off a caption's words alone takes a small tower thousands of steps; the heads are thrown away afterwards, and
the tower stays as it is.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from lance_runtime.preprocess import vit_patches  # noqa: E402
from nano.learning import Learner  # noqa: E402
from nano.parts import IMAGE_PRESET, VISION, make_vision  # noqa: E402
from nano.world import BACKGROUNDS, COLOURS, SHAPES, SIDE, Scene, draw_clip, draw_scene, outline, render, render_clip  # noqa: E402

CELLS = 4  # merged tokens a side
BATCH = 32
LEAST_SHARE = 0.08  # of a cell that a thing must cover to be what lies there
CLIPS = 0.15  # share of clips, and of single frames of clips
HEADS = {"colour": len(COLOURS) + 1, "shape": len(SHAPES) + 1, "background": len(BACKGROUNDS), "row": CELLS, "column": CELLS}


def labels(scene: Scene) -> Tensor:
    """(16, 5): colour and shape under each token (0 where nothing lies), the background, the token's row and column."""
    mask = Image.new("L", (SIDE, SIDE))
    for index, thing in enumerate(scene.things, 1):
        ImageDraw.Draw(mask).polygon(outline(thing), fill=index)
    cells = np.asarray(mask).reshape(CELLS, SIDE // CELLS, CELLS, SIDE // CELLS).swapaxes(1, 2).reshape(CELLS * CELLS, -1)
    back, rows = tuple(BACKGROUNDS).index(scene.background), []
    for place, cell in enumerate(cells):
        counts = np.bincount(cell, minlength=len(scene.things) + 1)[1:]
        found = scene.things[int(counts.argmax())] if counts.max(initial=0) > LEAST_SHARE * cell.size else None
        seen = (0, 0) if found is None else (1 + tuple(COLOURS).index(found.colour), 1 + SHAPES.index(found.shape))
        rows.append((*seen, back, *divmod(place, CELLS)))
    return torch.tensor(rows)


def draw_one(rng: random.Random) -> tuple[np.ndarray, list[Scene]]:
    """A picture, a frame of a clip (turned, and of any size), or a clip, of which the tower sees every other frame."""
    kind = rng.random()
    if kind > CLIPS:
        scene = draw_scene(rng) if kind > 2 * CLIPS else rng.choice(draw_clip(rng).scenes)
        return render(scene)[None], [scene]
    clip = draw_clip(rng)
    return render_clip(clip), clip.scenes[:: VISION.temporal_patch_size]


def draw_batch(rng: random.Random) -> tuple[Tensor, Tensor, Tensor]:
    """Patches, their grids, and the labels of all tokens."""
    drawn = [draw_one(rng) for _ in range(BATCH)]
    patches = [vit_patches(frames, IMAGE_PRESET, VISION) for frames, _ in drawn]
    grids = torch.tensor([grid for _, grid in patches])
    wanted = torch.cat([labels(scene) for _, scenes in drawn for scene in scenes])
    return torch.cat([patch for patch, _ in patches]), grids, wanted


def train(work: Path, steps: int, rate: float, seed: int) -> None:
    torch.manual_seed(seed)
    rng, vision = random.Random(seed), make_vision()
    heads = nn.ModuleList(nn.Linear(VISION.out_hidden_size, size) for size in HEADS.values())
    learner = Learner(nn.ModuleList([vision, heads]), rate, steps)
    started, log, seen = time.perf_counter(), (work / "vision.jsonl").open("w", encoding="utf-8"), []
    for step in range(steps):
        patches, grids, wanted = draw_batch(rng)
        result = vision(patches, grid_thw=grids)
        tokens = result if isinstance(result, Tensor) else result.pooler_output
        losses = [F.cross_entropy(head(tokens), wanted[:, index]) for index, head in enumerate(heads)]
        # A small pull keeps the tokens as large as embeddings of words.
        (sum(losses) + 0.01 * (tokens.square().mean() - 1).square()).backward()  # type: ignore[union-attr]
        learner.update(step)
        seen.append([float(loss.detach()) for loss in losses])
        if step % 50 == 49:
            mean = dict(zip(HEADS, np.mean(seen, axis=0).round(4).tolist(), strict=True))
            log.write(json.dumps({"step": step + 1, "s": round(time.perf_counter() - started), **mean}) + "\n")
            log.flush()
            seen.clear()
    torch.save(vision.state_dict(), work / "vision.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train(arguments.work, arguments.steps, arguments.rate, arguments.seed)


if __name__ == "__main__":
    main()
