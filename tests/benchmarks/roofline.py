"""The floor of Lance's work on any card: what is multiplied and what is read, counted on the runtime's own passes.

    python tests/benchmarks/roofline.py            # print ROOFLINE.md
    python tests/benchmarks/roofline.py --write    # and write it

The network of the real size runs on the meta device, where every linear layer and every attention says its shape and
nothing is computed. Measured numbers come from ``results.jsonl``, which ``bench.py --record`` appends to.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))

from alive import Alive
from bench import make_context
from counting import Counted, count

from lance_runtime.components import build_lance
from lance_runtime.config import EMBED_KEY, LanceConfig
from lance_runtime.context import Context, layout
from lance_runtime.decode import next_states
from lance_runtime.denoise import Branches, denoise, flow_sigmas, predict_velocity
from lance_runtime.engine import Engine
from lance_runtime.guidance import Guidance
from lance_runtime.kv_cache import KVCache
from lance_runtime.prefill import branch, prefill
from lance_runtime.quant_formats import FORMATS
from lance_runtime.quantize import Plan
from lance_runtime.types import Modality, PixelShape

FOLDER = Path(__file__).parent
GIGA, TERA = 1e9, 1e12
PROMPT_TOKENS = 128
META = torch.device("meta")
HEAD_KEY = "language_model.lm_head.weight"


@dataclass(frozen=True)
class Work:
    """One kind of picture or clip."""

    name: str
    pixels: PixelShape
    edit: bool = False

    @property
    def context(self) -> Context:
        size = SimpleNamespace(height=self.pixels.height, width=self.pixels.width, edit=self.edit, prompt_tokens=PROMPT_TOKENS)
        return make_context(size, LanceConfig(), self.pixels.latent())  # type: ignore[arg-type]


WORKS = (
    Work("t2i 768 x 768", PixelShape(1, 768, 768)),
    Work("image edit 768 x 768", PixelShape(1, 768, 768), edit=True),
    Work("t2v 480 x 848 x 49", PixelShape(49, 480, 848)),
    Work("t2v 480 x 848 x 121", PixelShape(121, 480, 848)),
)
# TFLOP/s of dense bfloat16 products and GB/s of memory: round numbers around which real cards lie, and no card's own.
CARDS = {"30 TFLOP/s, 300 GB/s": (30, 300), "100 TFLOP/s, 700 GB/s": (100, 700), "800 TFLOP/s, 4000 GB/s": (800, 4000)}


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention that writes its result and no scores."""
    return torch.empty_like(q)


@cache
def engine() -> Engine:
    return Engine(build_lance(LanceConfig()).to(torch.bfloat16), torch.bfloat16, META, fused)


@cache
def weight_bytes(kind: str) -> dict[str, int]:
    """Bytes of every weight by name: bfloat16, or as ``quantize`` writes them."""
    shapes = {name: tuple(parameter.shape) for name, parameter in engine().model.named_parameters()}
    sizes = {name: 2 * torch.Size(shape).numel() for name, shape in shapes.items()}
    if kind != "bfloat16":
        for name in Plan(kind).chosen(shapes):
            sizes[name] = encoded_bytes(kind, shapes[name])
    return sizes


@cache
def encoded_bytes(kind: str, shape: tuple[int, ...]) -> int:
    parts = FORMATS[kind].encode(torch.empty(shape, device=META))  # type: ignore[misc]
    return sum(part.nbytes for part in parts.values())


@dataclass(frozen=True)
class Pass:
    """One pass of the network: its operations, the weights that it reads, and the bytes of keys and values before it."""

    counted: Counted
    cached: int = 0

    @property
    def operations(self) -> int:
        return self.counted.linear + self.counted.attention

    def read(self, kind: str) -> int:
        names = {layer: name for name, layer in engine().model.named_modules()}
        sizes = weight_bytes(kind)
        return self.cached + sum(sizes[f"{names[layer]}.weight"] for layer in {layer for layer, _ in self.counted.linears})

    def seconds(self, kind: str, rate: float, bandwidth: float) -> float:
        """The floor on a card of a rate (TFLOP/s) and a bandwidth (GB/s).

        int8 weights are multiplied with int8 inputs, at twice the rate; all others in bfloat16.
        """
        products = self.counted.linear / (2 if kind == "int8" else 1) + self.counted.attention
        return max(products / (rate * TERA), self.read(kind) / (bandwidth * GIGA))


@cache
def step(work: Work) -> Pass:
    """A denoising step with guidance: two branches."""
    grid = work.pixels.latent()
    contexts = (work.context, work.context.without(Modality.PROMPT))
    branches = [branch(engine(), layout(context, grid)) for context in contexts]
    latents = torch.empty(2, engine().model.config.latent_channels, *grid, dtype=torch.bfloat16, device=META)
    times = torch.empty(2, grid.frames, device=META)
    counted = count(engine(), lambda host: predict_velocity(host, latents, times, branches))
    return Pass(counted, sum(one.cache.nbytes for one in branches))


@cache
def reading(work: Work) -> Pass:
    return Pass(count(engine(), lambda host: prefill(host, layout(work.context))))


@cache
def token(length: int) -> Pass:
    """One token of an answer behind a prefix of this many."""
    config, host = LanceConfig(), engine()
    store = KVCache(config, length + 1, torch.bfloat16, META)
    store.length = length

    def run(host: Engine) -> None:
        host.model.logits(next_states(host, store, 0, host.rope(torch.full((3, 1), length))))

    return Pass(count(host, run), store.nbytes)


def guided(steps: int = 30) -> int:
    """Steps of the default schedule at which guidance acts."""
    return sum(Guidance(scale=4.0).acts_at(sigma) for sigma in flow_sigmas(steps)[:-1])


@cache
def held(work: Work) -> int:
    """The most bytes beside the weights while the contexts are read and a guided step is taken."""
    host, grid = engine(), work.pixels.latent()
    bare = work.context.without(Modality.PROMPT)
    branches = Branches(host, lambda: layout(work.context, grid), lambda: layout(bare, grid))
    noise = torch.empty(1, host.model.config.latent_channels, *grid, device=META)
    with torch.no_grad(), Alive() as alive:
        next(denoise(host, noise, flow_sigmas(30), branches, Guidance(scale=4.0)))
    return alive.most


def seldom_read() -> int:
    """Bytes of the embedding table, whose rows are looked up in main memory, and of the head, which drawing does not read."""
    return sum(weight_bytes("bfloat16")[name] for name in (EMBED_KEY, HEAD_KEY))


def table(*rows: list[str]) -> Iterator[str]:
    yield "| " + " | ".join(rows[0]) + " |"
    yield "| --- |" + " ---: |" * (len(rows[0]) - 1)
    yield from ("| " + " | ".join(row) + " |" for row in rows[1:])


def short(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def counts() -> Iterator[str]:
    kinds = ("bfloat16", *FORMATS)
    head = ["a step with guidance", "target tokens", "prefix", "linear TFLOP", "attention TFLOP", "prefix GB"]
    rows = []
    for work in WORKS:
        one = step(work)
        prefix = sum(map(len, layout(work.context).prefix))
        tokens = work.pixels.latent().tokens
        numbers = (one.counted.linear / TERA, one.counted.attention / TERA, one.cached / GIGA)
        rows.append([work.name, f"{tokens:,}", f"{prefix:,}", *map(short, numbers)])
    yield from table(head, *rows)
    yield ""
    head = ["GB of weights that are read", *kinds]
    passes = {"a denoising step": step(WORKS[0]), "a token of an answer": token(0)}
    rows = [[name, *(short(one.read(kind) / GIGA - one.cached / GIGA) for kind in kinds)] for name, one in passes.items()]
    rows.append(["the whole file", *(short(sum(weight_bytes(kind).values()) / GIGA) for kind in kinds)])
    yield from table(head, *rows)


def memory() -> Iterator[str]:
    weights = {kind: sum(weight_bytes(kind).values()) - seldom_read() for kind in ("bfloat16", *FORMATS)}
    rows = [[work.name, *(short((held(work) + size) / GIGA) for size in (0, *weights.values()))] for work in WORKS]
    yield from table(["GB of VRAM", "without weights", *(f"in all, {kind}" for kind in weights)], *rows)


def floors() -> Iterator[str]:
    for card, (rate, bandwidth) in CARDS.items():
        yield f"**{card}**"
        yield ""
        head = ["least seconds", *(f"a step, {kind}" for kind in ("bfloat16", "int8")), "30 steps, bfloat16"]
        rows = []
        for work in WORKS:
            one, plain = step(work), reading(work).seconds("bfloat16", rate, bandwidth)
            seconds = one.seconds("bfloat16", rate, bandwidth)
            # A step without guidance is one branch: half the operations, the same weights.
            half = max(one.operations / 2 / (rate * TERA), one.read("bfloat16") / (bandwidth * GIGA))
            whole = plain + guided() * seconds + (30 - guided()) * half
            steps = (one.seconds(kind, rate, bandwidth) for kind in ("bfloat16", "int8"))
            rows.append([work.name, *map(short, steps), short(whole)])
        yield from table(head, *rows)
        yield ""
        behind = token(900)
        tokens = (short(1 / behind.seconds(kind, rate, bandwidth)) for kind in ("bfloat16", *FORMATS))
        yield from table(
            ["most tokens a second", "bfloat16", *FORMATS], ["an answer about one picture (a prefix of 900)", *tokens]
        )
        yield ""


# Of what ``bench.py --record`` writes: a heading, and its columns with what they show.
MEASURED: dict[str, tuple[str, dict[str, str]]] = {
    "denoising_step": (
        "A denoising step against `torch.mm` at the shapes of its linear layers, in turns",
        {
            "tokens": "tokens", "branches": "branches", "seconds": "seconds", "gflop_per_second": "GFLOP/s",
            "mm_gflop_per_second": "torch.mm", "share_of_mm": "share", "share_range": "range",
            "attention_seconds": "of it attention, s",
        },
    ),
    "decoding": (
        "An answer against copying memory, in turns",
        {
            "prefix": "prefix", "tokens_per_second": "tokens/s", "weights_gb": "GB a token",
            "copy_gb_per_second": "copy, GB/s", "share_of_copy": "share",
        },
    ),
    "loading": (
        "Loading against reading the same file once",
        {
            "file_gb": "GB", "cold_seconds": "cold, s", "cold_over_reading": "over reading",
            "warm_seconds": "warm, s", "warm_over_reading": "over reading", "peak_gb": "peak GB of the process",
        },
    ),
    "footprint": (
        "Every task in the real ComfyUI",
        {
            "task": "task", "format": "weights", "budget_gb": "budget, GB", "peak_gb": "peak GB", "steps": "steps",
            "seconds": "seconds", "first_seconds": "the first time", "failed": "failed",
        },
    ),
    "step_against_reference": (
        "A guided step against the reference's own, in turns, the same weights",
        {
            "tokens": "tokens", "ours_seconds": "ours, s", "reference_seconds": "reference, s", "ratio": "times as fast",
            "range": "range", "launches": "operators a step", "reference_launches": "the reference's",
            "difference": "velocities apart",
        },
    ),
}  # fmt: skip


def measured() -> Iterator[str]:
    path = FOLDER / "results.jsonl"
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []
    for bench, (title, columns) in MEASURED.items():
        found = [line for line in lines if line["bench"] == bench]
        if found:
            yield from (f"**{title}**", "")
            rows = [[where(line), *(cell(line.get(key)) for key in columns)] for line in found]
            yield from table(["", *columns.values()], *rows)
            yield ""
    if not any("cuda" in str(line.get("device")) for line in lines):
        yield "No GPU has been at hand: there is no measurement on one."


def where(line: dict[str, Any]) -> str:
    compiled = (", compiled" if line.get("compile") else "") + (", CUDA graphs" if line.get("cuda_graphs") else "")
    sizes = f", {line['dtype']}, {line['layers']} layers of width {line['hidden']}" if "layers" in line else ""
    return f"{line['date']}, {line['machine']}{sizes}{compiled}"


def cell(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(map(cell, value))
    if isinstance(value, str):
        return value
    return short(value) if isinstance(value, (int, float)) else "-"


def counted() -> list[list[str]]:
    """The sections that need no measurement."""
    return [
        ["## What there is to do", "", *counts(), "", COUNTS],
        ["## What it holds", "", *memory(), "", MEMORY],
        ["## The least time", "", FLOORS.format(guided=guided()), "", *floors()],
    ]


def text() -> str:
    sections = [
        ["# The floor, and how far we are above it", "", HEAD],
        *counted(),
        ["## Measured", "", *measured()],
    ]
    return "\n\n".join("\n".join(section).strip() for section in sections) + "\n"


HEAD = """Written by `python tests/benchmarks/roofline.py --write`. The first three sections are counted, not measured: the
network of the real size (6.19 billion weights) runs on the meta device, where every linear layer and every attention tells
its shape. The last holds what `bench.py --record` and `reference.py` measured. (Where an answer's share of a copy is above 1,
that machine reads memory faster than it copies it.)"""
COUNTS = """A step with guidance is two branches in one pass over the weights (one after the other for clips, whose activations
cost more than a second pass). It reads both experts: the generation expert multiplies the target's tokens, the understanding
expert the two vision tokens around them. Quantised files keep the first and the last layer, embeddings, head, norms and glue
in bfloat16."""
MEMORY = """The network alone, while it reads the contexts and takes a guided step: what tensors hold, where attention writes
no scores. The embedding table (0.62 GB) is not counted, since its rows are looked up in main memory, nor is the head (as
large), which is read for answers alone: ComfyUI's dynamic memory brings it for them, its plain one when all else has a place
(outside ComfyUI it is always there, unless weights are offloaded). The allocator's rounding comes on top, and for quantised
files one layer's weights in bfloat16 (45 MB). The vision tower (1.34 GB) and the VAE work before or after it, and can leave the
card for it. Nor need all weights lie there: ComfyUI passes those that do not fit through the card, as `offload="layer"` does
outside, so what a card cannot do without is the first column and some layers."""
FLOORS = """A pass cannot take less than its operations at the card's rate, nor less than its weights, keys and values at the
card's bandwidth. Pictures and clips are bound by operations, answers by bandwidth. int8 files multiply in int8, here at twice
the bfloat16 rate; fp8, nvfp4 and mxfp8 files are small in memory and multiply in bfloat16. (ComfyUI's layers write such a
weight out in bfloat16 before they multiply, which moves more bytes than a bfloat16 weight does: the table is for a kernel
that does both at once.) The cards are round numbers around
which real ones lie. A whole picture or clip is its prefill and 30 steps, of which {guided} are guided; ViT and VAE come on
top."""


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    made = text()
    if parser.parse_args().write:
        (FOLDER / "ROOFLINE.md").write_text(made, "utf-8")
    sys.stdout.write(made)


if __name__ == "__main__":
    main()
