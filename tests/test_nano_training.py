"""Nano is trained on the runtime's own numbers: one dense pass with gradients equals prefill, cache and loops."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from nano.batches import Sequencer, stack
from nano.parts import CONFIG, VISION, make_lance, make_tokenizer, make_vision
from nano.tasks import TASKS, draw
from nano.train import sequence_states

from lance_runtime.checkpoint import TensorFile
from lance_runtime.context import Context, Segment, layout
from lance_runtime.denoise import predict_velocity
from lance_runtime.dequantize import plain_tensors, plain_vit_tensors
from lance_runtime.engine import Engine
from lance_runtime.files import NANO
from lance_runtime.model.vision import encode_vision
from lance_runtime.prefill import branch, prefill
from lance_runtime.tokenizer import LanceTokenizer
from lance_runtime.types import LatentShape, Modality

SMALL = 16  # examples of a task are drawn until this many lie in one layout, or one does


def fake_latents(frames: np.ndarray) -> torch.Tensor:
    """A stand-in for the VAE, which does not matter here: any numbers of the right shape."""
    generator = torch.Generator().manual_seed(int(frames.sum()))
    return torch.randn(48, (len(frames) - 1) // 4 + 1, 6, 6, generator=generator)


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    model, vision = make_lance().requires_grad_(False), make_vision().requires_grad_(False)
    torch.nn.init.normal_(model.llm2vae.weight, std=0.1)
    return model, vision, Sequencer(LanceTokenizer(make_tokenizer()), fake_latents)


def seen_by_the_runtime(vision, item) -> Context:
    """The same sequence with what the runtime's own vision tower makes of the patches."""
    patches, segments = list(zip(item.patches, item.grids, strict=True)), []
    for split in item.layout.splits:
        segment = split.segment
        if segment.modality == Modality.VIT:
            patch, grid = patches.pop(0)
            segment = Segment.vit(encode_vision(vision, patch, grid), segment.grid)
        segments.append(segment)
    return Context(tuple(s for s in segments if s.modality != Modality.TARGET), item.layout.vision)


def laid_out_again(vision, item) -> bool:
    made = layout(seen_by_the_runtime(vision, item), LatentShape(*item.target.shape[1:]))
    return torch.equal(made.positions, item.layout.positions)


@torch.no_grad()
@pytest.mark.parametrize("task", TASKS)
def test_the_dense_pass_equals_the_runtime(parts, task):
    model, vision, sequencer = parts
    rng = random.Random(f"{task} 2")
    items = [sequencer.item(draw(rng, task), rng) for _ in range(SMALL)]
    # One without a prompt may keep the prompt's place, which is no layout of a context: not that one.
    first = next(item for item in items if item.target is None or laid_out_again(vision, item))
    same = [item for item in items if item.signature == first.signature]
    batch, engine = stack(same), Engine(model, torch.float32, torch.device("cpu"))
    if first.target is None:
        states = sequence_states(model, vision, batch, None, None).und
        for row, item in enumerate(same):
            _, expected = prefill(engine, layout(seen_by_the_runtime(vision, item)))
            torch.testing.assert_close(states[row : row + 1, -expected.shape[1] :], expected, atol=2e-4, rtol=1e-3)
        return
    times = torch.rand(len(same), 1).expand(-1, batch.target.shape[2]).clone()
    times[:, 0] = 0 if batch.first_given else times[:, 0]
    latents, grid = torch.randn(batch.target.shape), LatentShape(*batch.target.shape[2:])
    gen = sequence_states(model, vision, batch, latents, times).gen[:, -grid.tokens :]
    for row, item in enumerate(same):
        made = layout(seen_by_the_runtime(vision, item), grid)
        expected = predict_velocity(engine, latents[row : row + 1], times[row : row + 1], [branch(engine, made)])
        torch.testing.assert_close(model.velocity(gen[row : row + 1], grid), expected, atol=2e-4, rtol=1e-3)


def test_every_first_weight_is_drawn():
    """The tower is built in memory that nobody filled: what is not drawn is whatever lay there, once in a while NaN."""
    torch.use_deterministic_algorithms(True)  # torch then fills new memory with NaN
    try:
        for network in (make_lance(), make_vision()):
            assert not [name for name, value in network.state_dict().items() if not value.isfinite().all()]
    finally:
        torch.use_deterministic_algorithms(False)


def test_sizes_fit_the_file():
    """What is trained is what ships."""
    model, vision = make_lance(), make_vision()
    shipped = plain_tensors(TensorFile(NANO / "Lance_3B" / "model.safetensors")).shapes
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == shipped
    seen = plain_vit_tensors(TensorFile(NANO / "Qwen2.5-VL-ViT" / "vit.safetensors")).shapes
    assert {name: tuple(p.shape) for name, p in vision.named_parameters()} == seen
    count = sum(p.numel() for net in (model, vision) for p in net.parameters())
    assert 3e6 < count < 5e6
    assert CONFIG.hidden_size == VISION.out_hidden_size
