"""Nano's training on the runtime's own modules: flow matching on what it draws, next tokens of what it answers.

    python tests/nano/train.py --work DIR --steps 19200 --minutes 85    # again to go on
    torchrun --nproc-per-node 2 tests/nano/train.py ...                 # two processes, twice the examples a step

DIR holds the VAE's training (``vae.py``); everything is seeded and can be resumed.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from full_pass import visible  # noqa: E402

from lance_runtime.model.embeddings import latent_position_embedding  # noqa: E402
from lance_runtime.model.rope import Rope, rope_table  # noqa: E402
from lance_runtime.model.transformer import Lance, Streams  # noqa: E402
from lance_runtime.prompts import VIDEO_TASKS  # noqa: E402
from lance_runtime.tokenizer import LanceTokenizer  # noqa: E402
from lance_runtime.types import LatentShape, Modality  # noqa: E402
from nano import vae as vae_training  # noqa: E402
from nano.batches import Batch, Pool, Sequencer  # noqa: E402
from nano.learning import Learner, join_processes, share_gradients  # noqa: E402
from nano.parts import CONFIG, make_lance, make_tokenizer, make_vision  # noqa: E402
from nano.world import draw_clip, draw_scene, render, render_clip  # noqa: E402

# How often a task is drawn, and how many examples of it at once: about 0.4 s of one core each, so that two processes
# that draw tasks of their own wait little for each other.
SHARES = {
    "t2i": 0.24, "image_edit": 0.16, "x2t_image": 0.3, "t2v": 0.1, "i2v": 0.05, "subject_image": 0.04,
    "video_edit": 0.05, "subject_video": 0.04, "x2t_video": 0.02,
}  # fmt: skip
BATCH = {
    "t2i": 32, "image_edit": 16, "x2t_image": 36, "t2v": 12, "i2v": 12, "subject_image": 20,
    "video_edit": 5, "subject_video": 9, "x2t_video": 14,
}  # fmt: skip
SHIFT = 2.5  # of the noise levels; drawing takes 3.5, but shapes are decided at less noise
ANSWER_WEIGHT = 0.5
AVERAGED = 0.998
SAVE_EVERY = 200
PARTS = ("lance", "averaged", "learner")  # of what is saved


class FrozenVAE:
    """The trained encoder, and the latents' means and deviations (measured once, kept beside it)."""

    def __init__(self, work: Path) -> None:
        vae_training.quicken()
        self.vae = vae_training.build().train(False).requires_grad_(False)
        self.vae.load_state_dict(torch.load(work / "vae_both.pt", weights_only=True)["vae"])
        path = work / "vae_statistics.pt"
        if not path.is_file():
            torch.save(self._measured(), path)
        self.mean, self.std = torch.load(path, weights_only=True)

    def _measured(self, pictures: int = 600, clips: int = 100) -> tuple[Tensor, Tensor]:
        rng = random.Random(1)
        drawn = [render(draw_scene(rng))[None] for _ in range(pictures)] + [render_clip(draw_clip(rng)) for _ in range(clips)]
        values = torch.cat([self._raw(frames).flatten(1) for frames in drawn], dim=1)
        return values.mean(1).view(-1, 1, 1, 1), values.std(1).view(-1, 1, 1, 1)

    @torch.no_grad()
    def _raw(self, frames: np.ndarray) -> Tensor:
        return vae_training.encode(self.vae, vae_training.to_pixels(frames)[None])[0]

    def encode(self, frames: np.ndarray) -> Tensor:
        """uint8 (T, H, W, 3) -> normalised latents (48, t, h, w)."""
        return (self._raw(frames) - self.mean) / self.std


def noise_levels(batch: int, generator: torch.Generator) -> Tensor:
    u = torch.rand(batch, generator=generator)
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def sequence_states(model: Lance, vision: Any, batch: Batch, latents: Tensor | None, times: Tensor | None) -> Streams:
    """States behind the shared opening, in one pass with an explicit mask; latents (B, C, T, H, W) at flow times (B, T).

    The opening (the system sentence) is the same text for all of a batch: it is read once, not once a sample.
    """
    embed, size, splits = model.language_model.model.embed_tokens, batch.size, batch.layout.splits
    seen = None if batch.patches is None else _vit(vision, batch.patches, batch.grids).unflatten(0, (size, -1))
    und, gen, und_rows, gen_rows, start, read = [], [], [], [], 0, 0
    boundary = embed(torch.tensor([[batch.layout.vision.start, batch.layout.vision.end]])).expand(size, -1, -1)
    shared = len(splits[0]) if bool((batch.ids[0] == batch.ids[0][:1]).all()) else 0
    for index, split in enumerate(splits):
        segment, end = split.segment, start + len(split)
        if index in batch.ids:
            if end > shared:
                und.append(embed(batch.ids[index]))
                und_rows += range(start, end)
        elif segment.modality == Modality.VIT and seen is not None:
            und += [boundary[:, :1], seen[:, read : read + segment.grid.tokens], boundary[:, 1:]]
            und_rows += range(start, end)
            read += segment.grid.tokens
        else:
            values = latents if segment.modality == Modality.TARGET else batch.clean[index]
            clean = torch.zeros(size, segment.grid.frames)
            places = latent_position_embedding(segment.grid, CONFIG.hidden_size, torch.device("cpu"))
            und.append(boundary)
            und_rows += [start, end - 1]
            gen.append(model.embed_latents(values, times if segment.modality == Modality.TARGET else clean, places))
            gen_rows += range(start + 1, end - 1)
        start = end
    hidden = Streams(torch.cat(und, 1), torch.cat(gen, 1) if gen else None)
    opening = _opening(model, batch, embed(batch.ids[0][:1]), shared) if shared else None
    return _through(model, batch, hidden, torch.tensor(und_rows), torch.tensor(gen_rows), opening)


Keys = list[tuple[Tensor, Tensor]]  # of each layer, (1, heads, L, d), and values


def _opening(model: Lance, batch: Batch, embedded: Tensor, length: int) -> Keys:
    """Keys and values of the text that all samples begin with."""
    kept: Keys = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kept.append((k, v))
        k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    rope = rope_table(CONFIG, batch.layout.positions[:, :length], torch.float32)
    model.run_layers(Streams(embedded), Streams(rope), attend)
    return kept


def _through(model: Lance, batch: Batch, hidden: Streams, und_rows: Tensor, gen_rows: Tensor, opening: Keys | None) -> Streams:
    order, count = torch.cat([und_rows, gen_rows]).long(), len(und_rows)
    first = len(batch.layout.splits[0]) if opening else 0
    sees = torch.cat([torch.arange(first), order])
    mask = visible(batch.layout.split_lens, batch.layout.attn_modes)[order][:, sees]
    rope = rope_table(CONFIG, batch.layout.positions[:, order], torch.float32)
    parts = [Rope(*(part[:, rows] for part in rope)) for rows in (slice(0, count), slice(count, None))]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if opening:
            before = (part.expand(len(q), -1, -1, -1) for part in opening[layer])
            k, v = (torch.cat(pair, dim=2) for pair in zip(before, (k, v), strict=True))
        k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)

    return model.run_layers(hidden, Streams(parts[0], parts[1] if len(gen_rows) else None), attend)


@torch.no_grad()
def _vit(vision: Any, patches: Tensor, grids: Tensor | None) -> Tensor:
    """The tower has learned before, and stays as it is: what drawing asks of it would take its shapes away."""
    result = vision(patches, grid_thw=grids)
    return result if isinstance(result, Tensor) else result.pooler_output


def loss_of(model: Lance, vision: Any, batch: Batch, generator: torch.Generator) -> Tensor:
    """Velocity's mean squared error on the frames that are drawn, or the cross entropy of the answer."""
    if batch.target is None:
        states = sequence_states(model, vision, batch, None, None).und
        logits = model.logits(states[:, -batch.answer - 1 : -1])
        last = max(batch.ids)
        return F.cross_entropy(logits.flatten(0, 1), batch.ids[last][:, -batch.answer :].flatten())
    noise = torch.randn(batch.target.shape, generator=generator)
    times = noise_levels(batch.size, generator)[:, None].repeat(1, batch.target.shape[2])
    if batch.first_given:
        times[:, 0] = 0
    at = times[:, None, :, None, None]
    latents = (1 - at) * batch.target + at * noise
    states = sequence_states(model, vision, batch, latents, times)
    grid = LatentShape(*batch.target.shape[2:])
    velocity = model.velocity(states.gen[:, -grid.tokens :], grid)
    error, weight = (velocity - (noise - batch.target)).square().mean(1), batch.weight
    drawn = slice(1 if batch.first_given else 0, None)
    return (error * weight)[:, drawn].sum() / weight[:, drawn].sum()


class Trainer:
    """Seeded, resumable training. Processes draw tasks of their own, keep the same weights and share their gradients."""

    def __init__(self, work: Path, steps: int, rate: float, seed: int) -> None:
        torch.manual_seed(seed)
        self.work, self.steps, self.step, self.spent = work, steps, 0, 0.0
        self.rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else None
        self.lance, self.vision = make_lance(), make_vision().requires_grad_(False)
        self.vision.load_state_dict(torch.load(work / "vision.pt", weights_only=True))
        self.averaged = copy.deepcopy(self.lance).requires_grad_(False)
        self.learner = Learner(self.lance, rate, steps)
        self.rng, self.generator = random.Random(), torch.Generator()
        self._resume()
        if not (work / "tokenizer.json").is_file():  # every stage reads with the same words
            make_tokenizer().save(str(work / "tokenizer.json"))
        start = f"{seed} {self.step} {self.rank}"
        self.rng.seed(start)
        self.generator.manual_seed(self.rng.getrandbits(60))
        sequencer = Sequencer(LanceTokenizer.from_folder(work), FrozenVAE(work).encode)
        self.pools = {task: self._pool(sequencer, task, f"{start} {task}") for task in SHARES}

    def _pool(self, sequencer: Sequencer, task: str, seed: str) -> Iterator[Batch]:
        size, portion, uses = BATCH[task], *((8, 5) if task in VIDEO_TASKS else (20, 3))
        return Pool(sequencer, task, size, random.Random(seed), portion * size, uses).batches()

    def _resume(self) -> None:
        path = self.work / "lance.pt"
        if path.is_file():
            state = torch.load(path, weights_only=True)
            for name in PARTS:
                getattr(self, name).load_state_dict(state[name])
            self.step, self.spent = state["step"], state["spent"]

    def save(self) -> None:
        if self.rank:
            return
        state = {name: getattr(self, name).state_dict() for name in PARTS}
        torch.save({**state, "step": self.step, "spent": self.spent}, self.work / "lance.new")
        (self.work / "lance.new").replace(self.work / "lance.pt")

    def run(self, minutes: float) -> None:
        log, losses = (self.work / f"lance{self.rank or ''}.jsonl").open("a", encoding="utf-8"), defaultdict(list)
        started = time.perf_counter()
        begun = started - self.spent
        while self.step < self.steps and not self._all(time.perf_counter() - started > 60 * minutes):
            task = self.rng.choices(tuple(SHARES), tuple(SHARES.values()))[0]
            losses[task].append(self.one(next(self.pools[task]), task))
            self.step += 1
            if self.step % 100 == 0:
                mean = {name: round(sum(values) / len(values), 4) for name, values in sorted(losses.items())}
                log.write(json.dumps({"step": self.step, "s": round(time.perf_counter() - begun), **mean}) + "\n")
                log.flush()
                losses.clear()
            if self.step % SAVE_EVERY == 0:
                self.spent = time.perf_counter() - begun
                self.save()
        self.spent = time.perf_counter() - begun
        self.save()

    def one(self, batch: Batch, task: str) -> float:
        loss = loss_of(self.lance, self.vision, batch, self.generator)
        (loss * (ANSWER_WEIGHT if batch.answer else 1.0)).backward()
        share_gradients(self.learner.parameters)
        self.learner.update(self.step)
        kept = min(AVERAGED, self.step / (self.step + 10))
        with torch.no_grad():
            for average, value in zip(self.averaged.parameters(), self.lance.parameters(), strict=True):
                average.lerp_(value, 1 - kept)
        return float(loss.detach())

    def _all(self, late: bool) -> bool:
        """Whether time is up for any process: all stop at the same step."""
        if self.rank is None:
            return late
        found = torch.tensor([float(late)])
        torch.distributed.all_reduce(found)
        return bool(found > 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True, help="of the whole schedule")
    parser.add_argument("--minutes", type=float, default=85, help="at most, this time")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    join_processes()
    Trainer(arguments.work, arguments.steps, arguments.rate, arguments.seed).run(arguments.minutes)


if __name__ == "__main__":
    main()
