"""The denoising loop: a schedule, a velocity, and a generator of steps whose caller owns everything else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .context import Context, Layout
from .engine import Engine
from .guidance import Guidance
from .model.attention import without_cudnn_attention
from .model.rope import Rope
from .model.transformer import Streams
from .prefill import Branch, branch
from .recorded import Recorded
from .types import LatentShape, Modality

# Above this many target tokens, branches run one after another: their activations cost more than a pass over the weights.
BATCHED_TOKENS = 8192


class Step(NamedTuple):
    """One Euler step done: its index from 0, the sigma arrived at, and the latents (B, C, T, H, W) there."""

    index: int  # type: ignore[assignment]  # a field may hide tuple.index: nobody searches a step
    sigma: float
    latents: Tensor


class Given(NamedTuple):
    """Clean frames inside the target: their indices and normalised latents (B or 1, C, len(frames), H, W)."""

    frames: list[int]
    latents: Tensor


def flow_sigmas(steps: int, shift: float = 3.5) -> Tensor:
    """The reference's schedule, float32 (steps + 1), from 1 to 0: linear times, shifted towards the noise."""
    if steps < 1:
        raise ValueError(f"{steps} steps cannot be taken; the least is 1.\nThe default is 30.")
    if not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"Shift {shift} is not a positive number.\nThe default is 3.5; 1 leaves the schedule linear.")
    tau = torch.linspace(1, 0, steps + 1)
    return (shift * tau / (1 + (shift - 1) * tau)).clamp(max=1.0)  # rounding goes beyond 1 at a shift of 2.14


def check_sigmas(sigmas: Sequence[float]) -> Tensor:
    """An own schedule as float32; ``ValueError`` unless it falls from at most 1 to at least 0."""
    values = torch.as_tensor(sigmas, dtype=torch.float32)
    if values.ndim != 1 or len(values) < 2 or not bool((values[1:] < values[:-1]).all()) or values[0] > 1 or values[-1] < 0:
        raise ValueError(
            f"{values.numel()} sigmas {values.flatten()[:4].tolist()}... do not fall strictly within [1, 0].\n"
            "Pass steps + 1 falling numbers, for example 1.0, 0.9, 0.7, 0.0."
        )
    return values


def draw_noise(context: Context | None, target: LatentShape, seed: int, channels: int = 48) -> Tensor:
    """Noise (C, T, H, W) as the reference draws it on a CPU, in float32, one row a latent token of the sequence.

    (On a card it draws with that card's generator, from which the same seed gives other numbers.)
    Clean latents of the context come first in the draw and their rows are not used, so that the noise of an edit
    depends on the size of its sources.
    """
    visuals = () if context is None else context.visuals
    before = sum(visual.grid.tokens for visual in visuals if visual.modality != Modality.VIT)
    generator = torch.Generator().manual_seed(int(seed))
    rows = torch.randn(before + target.tokens, channels, generator=generator)[before:]
    return rows.T.reshape(channels, *target)


def check_noise(noise: Any, shape: tuple[int, ...], batch: int) -> Tensor:
    """Noise of a caller as float32 (B, C, T, H, W); one sample serves a batch of one."""
    values = torch.as_tensor(noise, dtype=torch.float32)
    values = values[None] if values.ndim == 4 else values
    if values.shape != (batch, *shape):
        raise ValueError(
            f"Noise of shape {list(values.shape)} was given where {[batch, *shape]} belongs (batch, channels, t, h, w).\n"
            "Make it for the latent grid: 1/16 of height and width, (frames - 1) // 4 + 1 frames."
        )
    broken = int((~values.isfinite()).sum())
    if broken:
        raise ValueError(f"{broken} of {values.numel()} noise values are NaN or infinite.\nPass finite noise, or a seed.")
    return values


def predict_velocity(engine: Engine, latents: Tensor, timesteps: Tensor, branches: Sequence[Branch]) -> Tensor:
    """Velocities (n * B, C, T, H, W) of n branches in one pass over the weights, attending branch by branch.

    latents (n * B, C, T, H, W) and timesteps (n * B, T) hold the branches' samples one branch after another.
    """
    batch = latents.shape[0] // len(branches)
    gen = engine.model.embed_latents(latents, timesteps, branches[0].position_embeddings)
    und = torch.cat([branch.boundary.expand(batch, -1, -1) for branch in branches])
    rope = Streams(*(Rope.stack([b.rope[i] for b in branches], batch) for i in range(2)))

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(branches, q.split(batch), k.split(batch), v.split(batch), strict=True)
        out = [engine.attend_fully(q_, *branch.cache.attached(layer, k_, v_)) for branch, q_, k_, v_ in parts]
        joined = out[0] if len(out) == 1 else torch.cat(out)
        return joined if engine.attention_hook is None else engine.attention_hook(joined)

    hidden = engine.run(Streams(und, gen), rope, attend)
    return engine.model.velocity(hidden.gen, LatentShape(*latents.shape[2:]))


class Velocities:
    """Velocities of the branches of one run: together while their tokens are few, else one after another.

    Together they are a CUDA graph where the engine asks for it, one for each set of branches.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.recorded: dict[tuple[Branch, ...], Recorded] = {}

    def __call__(self, latents: Tensor, timesteps: Tensor, branches: Sequence[Branch]) -> list[Tensor]:
        """Latents (B, C, T, H, W) and timesteps (B, T) -> one float32 velocity (B, C, T, H, W) a branch."""
        batch, count = latents.shape[0], len(branches)
        x = latents.to(self.engine.dtype)
        tokens = batch * count * x[0, 0].numel()
        if tokens > BATCHED_TOKENS:
            return [predict_velocity(self.engine, x, timesteps, [branch]).float() for branch in branches]
        with without_cudnn_attention():  # prompts of any length are new shapes
            found = self._together(x.repeat(count, 1, 1, 1, 1), timesteps.repeat(count, 1), branches)
        return list(found.float().split(batch))

    def _together(self, latents: Tensor, timesteps: Tensor, branches: Sequence[Branch]) -> Tensor:
        run: Callable[..., Tensor] = partial(predict_velocity, self.engine, branches=branches)
        if self.engine.cuda_graphs:
            run = self.recorded.setdefault(tuple(branches), Recorded(run))
        return run(latents, timesteps)


class Branches:
    """The guidance branches, each prefilled when it is first needed.

    layouts: with the prompt, without it, and without it and the visual conditions.
    """

    def __init__(self, engine: Engine, *layouts: Callable[[], Layout]) -> None:
        self.engine, self.layouts = engine, layouts
        self.made: list[Branch] = []

    def at(self, sigma: Tensor, guidance: Guidance) -> list[Branch]:
        count = 1 if not guidance.acts_at(sigma) else 3 if guidance.needs_visual else 2
        for sequence in self.layouts[len(self.made) : count]:
            self.made.append(branch(self.engine, sequence(), self.made))
        return self.made[:count]


def denoise(
    engine: Engine,
    noise: Tensor,
    sigmas: Tensor,
    branches: Branches,
    guidance: Guidance,
    given: Given | None = None,
) -> Iterator[Step]:
    """Integrate from noise (B, C, T, H, W) down the sigmas with Euler steps.

    Latents stay in float32; the reference rounds them to bfloat16 after every step (modeling/lance/lance.py).

    given: frames that are clean from the start: they enter with timestep 0 and are never updated.
    """
    latents, moving = noise.float(), torch.ones(noise.shape[2], device=noise.device)
    if given is not None:
        latents = latents.clone()
        latents[:, :, given.frames] = given.latents.to(latents)
        moving[given.frames] = 0
    free = None if given is None else moving.nonzero().flatten()
    velocities = Velocities(engine)
    for index, (sigma, following) in enumerate(pairwise(sigmas)):
        timesteps = (float(sigma) * moving).expand(noise.shape[0], -1)
        velocity = guidance.combine(velocities(latents, timesteps, branches.at(sigma, guidance)), free)
        latents = latents - velocity * (moving.view(1, 1, -1, 1, 1) * float(sigma - following))
        yield Step(index, float(following), latents)
