"""Every golden of the reference, through the public pipeline, on the CPU in float32."""

from __future__ import annotations

from functools import cache

import goldens
import pytest
import torch

from lance_runtime.context import layout
from lance_runtime.denoise import predict_velocity
from lance_runtime.guidance import Guidance
from lance_runtime.types import LatentShape, Modality

VELOCITY, LATENTS, PIXELS = 1e-4, 1e-3, 2


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).abs().max())


@pytest.mark.parametrize("name", goldens.CASES)
def test_layout(name, load_pipeline):
    case, golden = goldens.CASES[name], goldens.tensors(name)
    found = load_pipeline(goldens.variant(name)).layout(**goldens.arguments(name))
    assert found.input_ids.tolist() == golden["input_ids"].tolist()
    assert found.modality.tolist() == golden["modality"].tolist()
    assert found.split_lens == case["split_lens"]
    assert found.attn_modes == case["attn_modes"]
    if "positions" in golden:
        assert found.positions.tolist() == golden["positions"].tolist()


@pytest.mark.parametrize("name", [name for name in goldens.DRAWN if "positions_uncond" in goldens.tensors(name)])
def test_positions_without_the_prompt(name, load_pipeline):
    pipe, golden = load_pipeline(goldens.variant(name)), goldens.tensors(name)
    context = context_of(pipe, name).without(Modality.PROMPT)
    found = layout(context, LatentShape(*golden["latent"].shape[1:]), closing=[0])
    assert found.positions.tolist() == golden["positions_uncond"].tolist()


@pytest.mark.parametrize("name", goldens.DRAWN)
def test_velocity_of_the_first_step(name, load_pipeline):
    pipe, golden, arguments = load_pipeline(goldens.variant(name)), goldens.tensors(name), goldens.arguments(name)
    request = pipe.request(**arguments)
    target = request.target()
    timesteps = torch.ones(1, target.frames)
    if arguments["task"] == "i2v":
        timesteps[:, 0] = 0
    with torch.no_grad():
        cond = pipe.branches(request, context_of(pipe, name), target).at(torch.ones(()), Guidance(scale=1.0))
        velocity = predict_velocity(pipe.components.engine, golden["noise"][None], timesteps, cond)[0]
    if "velocity_first" in golden:
        assert difference(velocity, golden["velocity_first"]) < VELOCITY
    else:  # the tokens behind the first latent frame only
        assert difference(velocity[:, 1:].flatten(1).T, golden["velocity_first_tail"]) < VELOCITY


@pytest.mark.parametrize("name", goldens.DRAWN)
def test_latents_and_pixels(name, load_pipeline):
    golden = goldens.tensors(name)
    out = load_pipeline(goldens.variant(name))(**goldens.arguments(name))
    assert difference(out.latents, golden["latent"]) < LATENTS
    assert difference(torch.from_numpy(out.frames[0]), golden["pixels_first_frame"]) <= PIXELS
    assert difference(torch.from_numpy(out.frames[-1]), golden["pixels_last_frame"]) <= PIXELS


@pytest.mark.parametrize("name", [name for name in goldens.DRAWN if goldens.CASES[name]["task"] != "i2v"])
def test_noise_is_drawn_as_the_reference_draws_it(name, load_pipeline):
    pipe = load_pipeline(goldens.variant(name))
    request = pipe.request(**goldens.arguments(name))
    found = pipe.noise(request, context_of(pipe, name), request.target())
    assert torch.equal(found[0], goldens.tensors(name)["noise"])


@pytest.mark.parametrize("name", goldens.ANSWERED)
def test_answer(name, load_pipeline):
    out = load_pipeline(goldens.variant(name))(**goldens.arguments(name))
    assert out.token_ids == goldens.tensors(name)["generated_ids"].tolist()
    assert out.text == goldens.CASES[name]["expected_text"]


@cache
def context_of(pipe, name):
    with torch.no_grad():
        return pipe.context(pipe.request(**goldens.arguments(name)))
