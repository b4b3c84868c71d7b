"""Nano's VAE: diffusers' Wan 2.2 at small width, made fast enough to be trained on a CPU, and its training.

python tests/nano/vae.py --work DIR --steps 8000             # encoder and decoder
python tests/nano/vae.py --work DIR --steps 9000 --decoder   # the decoder alone, on the frozen encoder
torchrun --nproc-per-node 2 tests/nano/vae.py ...            # two processes, twice the examples a step
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders import autoencoder_kl_wan as wan
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from lance_runtime.vae import build_vae  # noqa: E402
from nano.learning import join_processes, schedule, share_gradients  # noqa: E402
from nano.world import Scene, draw_clip, draw_scene, render, render_clip  # noqa: E402

WIDTHS = (8, 12)  # encoder and decoder: 3.5 MB in bfloat16
CHANNELS = 48
BATCH, CLIPS = 8, 1  # of pictures, and of clips
CLIP_SHARE = {"both": 0.25, "decoder": 0.8}  # pictures are learned first, and stay easy
LATENT_NOISE = 0.05  # what the decoder must forgive, in units of a latent's deviation
SAVE_EVERY = 500
APART = 10**9  # between the seeds of processes


def build(widths: tuple[int, int] = WIDTHS) -> Any:
    """The untrained VAE. Past frames start without a say: pictures alone are then learned by the last kernel slices."""
    vae = build_vae(*widths)
    for module in vae.modules():
        if isinstance(module, wan.WanCausalConv3d) and module.kernel_size == (3, 3, 3):
            module.weight.data[:, :, :2] = 0
    return vae


def quicken() -> None:
    """Replace diffusers' 3-D convolution and norm by equal ones that a CPU does eight times faster, in this process."""
    slow = wan.WanCausalConv3d.forward

    def convolve(self: Any, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        if self.kernel_size[1:] != (3, 3) or self.stride != (1, 1, 1):
            return slow(self, x, cache_x)
        if cache_x is None and x.shape[2] == 1:  # the past is zero
            return F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, padding=1)[:, :, None]
        x = x if cache_x is None else torch.cat([cache_x, x], dim=2)
        frames = x.shape[2] if cache_x is None else x.shape[2] - cache_x.shape[2]
        x = F.pad(x, (0, 0, 0, 0, frames + 2 - x.shape[2], 0))
        stacked = torch.cat([x[:, :, i : i + frames] for i in range(3)], dim=1).transpose(1, 2)  # (B, T, 3 C, H, W)
        weight = self.weight.transpose(1, 2).flatten(1, 2)
        return F.conv2d(stacked.flatten(0, 1), weight, self.bias, padding=1).unflatten(0, (-1, frames)).transpose(1, 2)

    def norm(self: Any, x: Tensor) -> Tensor:
        return x * (x.square().mean(1, keepdim=True) + 1e-12).rsqrt() * self.gamma + self.bias

    wan.WanCausalConv3d.forward, wan.WanRMS_norm.forward = convolve, norm


def encode(vae: Any, pixels: Tensor) -> Tensor:
    """Pixels (B, 3, T, H, W) in [-1, 1] -> raw latents (B, 48, t, h, w), the posterior's means."""
    x, parts = wan.patchify(pixels, 2), []
    if x.shape[2] == 1:
        return vae.quant_conv(vae.encoder(x))[:, :CHANNELS]
    vae.clear_cache()
    for start in range(-3, x.shape[2], 4):
        chunk = x[:, :, max(start, 0) : start + 4]
        parts.append(vae.encoder(chunk, feat_cache=vae._enc_feat_map, feat_idx=[0]))
    return vae.quant_conv(torch.cat(parts, dim=2))[:, :CHANNELS]


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Raw latents -> pixels, not clamped."""
    x, parts = vae.post_quant_conv(latents), []
    if x.shape[2] == 1:
        return wan.unpatchify(vae.decoder(x, first_chunk=True), 2)
    vae.clear_cache()
    for index in range(x.shape[2]):
        chunk = x[:, :, index : index + 1]
        parts.append(vae.decoder(chunk, feat_cache=vae._feat_map, feat_idx=[0], first_chunk=index == 0))
    return wan.unpatchify(torch.cat(parts, dim=2), 2)


def to_pixels(frames: np.ndarray) -> Tensor:
    """uint8 (..., T, H, W, 3) -> float (..., 3, T, H, W) in [-1, 1]."""
    return torch.tensor(frames).float().div_(127.5).sub_(1).movedim(-1, -4).contiguous()


def draw_batch(rng: random.Random, clips: bool) -> tuple[Tensor, Tensor]:
    """Pictures or clips (B, 3, T, H, W), and where their things are (B, 1, T, H, W)."""
    if clips:
        drawn = [draw_clip(rng) for _ in range(CLIPS)]
        frames, backs = np.stack([render_clip(clip) for clip in drawn]), [clip.background for clip in drawn]
    else:
        scenes = [draw_scene(rng) for _ in range(BATCH)]
        frames, backs = np.stack([render(scene)[None] for scene in scenes]), [scene.background for scene in scenes]
    empty = np.stack([render(Scene((), back))[None] for back in backs])
    things = torch.from_numpy((np.abs(frames.astype(int) - empty).max(-1) > 8).astype(np.float32))[:, None]
    return to_pixels(frames), things


def loss_of(drawn: Tensor, pixels: Tensor, things: Tensor) -> Tensor:
    """Mean error, things five-fold and edges ten-fold, and the error of the differences between neighbours."""
    wide, high = (drawn.diff(dim=axis) - pixels.diff(dim=axis) for axis in (-1, -2))
    steep = F.pad(things.diff(dim=-1).abs(), (1, 0)) + F.pad(things.diff(dim=-2).abs(), (0, 0, 1, 0))
    edges = F.max_pool3d(steep, (1, 5, 5), stride=1, padding=(0, 2, 2)).clamp(max=1)
    weighted = ((drawn - pixels).abs() * (1 + 4 * things + 5 * edges)).mean()
    return weighted + 2 * (wide.abs().mean() + high.abs().mean())


def pull(latents: Tensor) -> Tensor:
    """Keeps each channel near mean 0 and deviation 1, or below: what the KL term is for."""
    mean, var = latents.mean(dim=(0, 2, 3, 4)), latents.var(dim=(0, 2, 3, 4))
    return mean.square().mean() + (var - 1).clamp(min=0).square().mean() + (0.25 - var).clamp(min=0).square().mean()


class Trainer:
    """Seeded, resumable training; every state lies in ``work``."""

    def __init__(self, work: Path, decoder_only: bool, rate: float, total: int, seed: int, rank: int = 0) -> None:
        torch.manual_seed(seed)
        self.rank, self.work, self.decoder_only, self.rate, self.total = rank, work, decoder_only, rate, total
        self.vae, self.rng, self.step, self.spent = build(), random.Random(seed + APART * rank), 0, 0.0
        torch.manual_seed(seed + APART * rank)
        self.stage = "decoder" if decoder_only else "both"
        if decoder_only:
            self.vae.load_state_dict(torch.load(work / "vae_both.pt", weights_only=True)["vae"])
            self.vae.encoder.requires_grad_(False)
            self.vae.quant_conv.requires_grad_(False)
        self.trained = [p for p in self.vae.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=rate, betas=(0.9, 0.98), weight_decay=1e-4)
        self._resume()

    def _resume(self) -> None:
        path = self.work / f"vae_{self.stage}.pt"
        if path.is_file():
            state = torch.load(path, weights_only=True)
            self.vae.load_state_dict(state["vae"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.spent = state["step"], state["spent"]
            self.rng.seed(self.step + APART * self.rank)

    def save(self) -> None:
        if self.rank:
            return
        state = {"vae": self.vae.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step, "spent": self.spent}
        torch.save(state, self.work / f"vae_{self.stage}.new")
        (self.work / f"vae_{self.stage}.new").replace(self.work / f"vae_{self.stage}.pt")

    def run(self) -> None:
        log = (self.work / f"vae_{self.stage}{self.rank or ''}.jsonl").open("a", encoding="utf-8")
        begun, losses, errors = time.perf_counter() - self.spent, [], []
        while self.step < self.total:
            early = self.stage == "both" and self.step < 0.2 * self.total
            clips = not early and self.rng.random() < CLIP_SHARE[self.stage]
            loss, error = self.one(clips)
            losses.append(loss)
            errors.append(error)
            self.step += 1
            if self.step % 100 == 0:
                psnr = -10 * math.log10(sum(errors) / len(errors) / 4)
                line = {"step": self.step, "loss": sum(losses) / len(losses), "psnr": psnr, "s": time.perf_counter() - begun}
                log.write(json.dumps(line) + "\n")
                log.flush()
                losses, errors = [], []
            if self.step % SAVE_EVERY == 0 or self.step == self.total:
                self.spent = time.perf_counter() - begun
                self.save()

    def one(self, clips: bool) -> tuple[float, float]:
        pixels, things = draw_batch(self.rng, clips)
        with torch.set_grad_enabled(not self.decoder_only):
            latents = encode(self.vae, pixels)
        noisy = latents + LATENT_NOISE * torch.randn_like(latents) * latents.detach().std()
        drawn = decode(self.vae, noisy)
        loss = loss_of(drawn, pixels, things)
        total = loss if self.decoder_only else loss + 0.01 * pull(latents)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * schedule(self.step, self.total)
        self.optimizer.zero_grad()
        total.backward()
        share_gradients(self.trained)
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        return float(loss.detach()), float((drawn.detach().clamp(-1, 1) - pixels).square().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--decoder", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quicken()
    arguments.work.mkdir(parents=True, exist_ok=True)
    rank = join_processes()
    Trainer(arguments.work, arguments.decoder, arguments.rate, arguments.steps, arguments.seed, rank).run()


if __name__ == "__main__":
    main()
