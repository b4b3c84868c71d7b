"""The VAE against the reference's latents and pixels, and the files that must not pass for it."""

import ast
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).resolve().parents[1]))

from goldens import CASES, PARITY, sources

from lance_runtime import vae as vae_room
from lance_runtime.preprocess import vae_pixels
from lance_runtime.vae import WanVAE, original_name

CONDITION_CASES = [name for name, case in CASES.items() if not case["task"].startswith(("t2", "x2t"))]
GENERATION_CASES = [name for name, case in CASES.items() if not case["task"].startswith("x2t")]


@cache
def weights():
    return torch.load(PARITY / "checkpoint/Wan2.2_VAE.pth", weights_only=True, map_location="cpu")


@cache
def vae():
    return WanVAE.from_tensors(weights())


def random_pixels(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def refusal(call, *args):
    """Both lines of the error: what is wrong, and what to do."""
    with pytest.raises(ValueError, match="\n") as caught:
        call(*args)
    first, second = str(caught.value).split("\n")
    assert all((first, second))
    return first


@pytest.mark.parametrize("name", CONDITION_CASES)
def test_latents_are_the_references(name):
    golden = load_file(PARITY / "cases" / f"{name}.safetensors")
    for index, frames in enumerate(sources(CASES[name])):
        latents = vae().encode(vae_pixels(frames, CASES[name]["settings"]["resolution"]))
        assert latents.dtype == torch.float32
        torch.testing.assert_close(latents, golden[f"cond_latent_{index}"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", GENERATION_CASES)
def test_pixels_are_the_references(name):
    golden = load_file(PARITY / "cases" / f"{name}.safetensors")
    frames = vae().decode(golden["latent"])
    assert frames.dtype == torch.uint8
    assert len(frames) == 4 * (golden["latent"].shape[1] - 1) + 1
    for mine, reference in ((frames[0], "pixels_first_frame"), (frames[-1], "pixels_last_frame")):
        assert (mine.int() - golden[reference].int()).abs().max() <= 1


def test_batches_are_their_samples():
    pixels = random_pixels(2, 3, 5, 32, 48)
    latents = vae().encode(pixels)
    assert latents.shape == (2, 48, 2, 2, 3)
    torch.testing.assert_close(latents, torch.stack([vae().encode(sample) for sample in pixels]), atol=1e-5, rtol=0)
    frames = vae().decode(latents)
    assert frames.shape == (2, 5, 32, 48, 3)
    assert (frames.int() - torch.stack([vae().decode(sample) for sample in latents]).int()).abs().max() <= 1


def test_samples_of_a_batch_go_through_one_by_one(monkeypatch):
    seen, module = [], vae().module
    monkeypatch.setattr(module.decoder.conv_in, "forward", lambda *args: seen.append(args[0].shape[0]) or real(*args))
    real = type(module.decoder.conv_in).forward.__get__(module.decoder.conv_in)
    vae().decode(torch.zeros(3, 48, 1, 2, 2))
    assert set(seen) == {1}


@pytest.mark.parametrize(("version", "last"), [(None, False), (90701, False), (90800, True), (91400, True), (91500, False)])
def test_with_some_releases_of_cudnn_the_channels_come_last(version, last, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    made = WanVAE.from_tensors(weights())
    weight = made.module.decoder.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last_3d) == last
    pixels, latents = random_pixels(3, 5, 32, 48), torch.randn(48, 2, 2, 3)
    torch.testing.assert_close(made.encode(pixels), vae().encode(pixels), atol=1e-4, rtol=0)
    assert (made.decode(latents).int() - vae().decode(latents).int()).abs().max() <= 1


def test_the_first_frame_does_not_see_the_next_ones():
    pixels = random_pixels(3, 5, 32, 32)
    torch.testing.assert_close(vae().encode(pixels)[:, :1], vae().encode(pixels[:, :1]), atol=1e-5, rtol=0)


def test_an_interrupted_call_leaves_nothing_behind():
    pixels, fresh = random_pixels(3, 5, 32, 32), WanVAE.from_tensors(weights())
    expected = fresh.encode(pixels)
    frames = fresh.decode(expected)

    def interrupt(*_):
        raise KeyboardInterrupt

    for part, call in ((fresh.module.encoder.norm_out, fresh.encode), (fresh.module.decoder.norm_out, fresh.decode)):
        hook = part.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            call(pixels if call == fresh.encode else expected)
        hook.remove()
        assert not any(torch.is_tensor(x) for x in (*fresh.module._feat_map, *fresh.module._enc_feat_map))
    assert torch.equal(fresh.encode(pixels), expected)
    assert torch.equal(fresh.decode(expected), frames)


def test_weights_are_assigned_and_not_copied():
    fresh = WanVAE.from_tensors(weights())
    assert fresh.module.quant_conv.weight.data_ptr() == weights()["conv1.weight"].data_ptr()
    assert not any(tensor.is_meta for tensor in (*fresh.module.parameters(), *fresh.module.buffers()))
    assert not any(p.requires_grad for p in fresh.module.parameters())
    assert not fresh.module.training


def test_every_name_has_its_own_original():
    names = [original_name(key) for key in vae().module.state_dict()]
    assert len(set(names)) == len(names) == 196
    assert set(names) == set(weights())


def test_bfloat16_runs_and_answers_in_float32():
    half = WanVAE.from_tensors(weights(), dtype=torch.bfloat16)
    pixels = random_pixels(3, 1, 32, 32)
    latents = half.encode(pixels)
    assert half.module.quant_conv.weight.dtype == torch.bfloat16
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, vae().encode(pixels), atol=0.1, rtol=0.1)
    assert (half.decode(latents).float() - vae().decode(latents).float()).abs().mean() < 2


def test_diffusers_is_imported_only_when_used():
    tree = ast.parse(Path(vae_room.__file__).read_text("utf-8"))
    names = [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    assert not [name for name in names if name.startswith("diffusers")]


def test_wan21_is_refused_by_name():
    other = {**weights(), "conv2.weight": torch.zeros(16, 16, 1, 1, 1)}
    first = refusal(WanVAE.from_tensors, other)
    assert "Wan 2.1" in first
    assert "16" in first
    assert "48" in first


def test_missing_and_unknown_keys_are_counted_and_named():
    tensors = {key: value for key, value in weights().items() if not key.startswith("decoder.middle.0.")}
    tensors["first_stage_model.extra"] = torch.zeros(1)
    first = refusal(WanVAE.from_tensors, tensors)
    assert "6 tensors are missing (decoder.middle.0.residual.0.gamma, " in first
    assert ", ...)" in first
    assert "1 unknown (first_stage_model.extra)" in first
    assert "196 tensors are missing" in refusal(WanVAE.from_tensors, {})


def test_other_shapes_are_named():
    tensors = {**weights(), "encoder.middle.1.proj.weight": torch.zeros(8, 8, 1, 1)}
    first = refusal(WanVAE.from_tensors, tensors)
    assert "encoder.middle.1.proj.weight is (8, 8, 1, 1) where (16, 16, 1, 1) belongs" in first


@pytest.mark.parametrize(
    ("shape", "named"),
    [
        ((3, 1, 30, 32), "height 30"),
        ((3, 1, 32, 8), "width 8"),
        ((3, 6, 32, 32), "6 frames"),
        ((3, 0, 32, 32), "0 frames"),
        ((1, 3, 32, 32), "[1, 3, 32, 32]"),
        ((3, 32, 32), "[3, 32, 32]"),
    ],
)
def test_pixels_that_do_not_fit_are_refused(shape, named):
    assert named in refusal(vae().encode, torch.zeros(shape))


@pytest.mark.parametrize("shape", [(16, 1, 4, 4), (48, 4, 4), (1, 1, 48, 1, 4, 4), (48, 0, 4, 4)])
def test_latents_that_do_not_fit_are_refused(shape):
    assert str(list(shape)) in refusal(vae().decode, torch.zeros(shape))


def test_a_picture_does_not_multiply_the_zeros_before_it():
    """The same numbers as diffusers' own convolution over two frames of zeros and the picture."""
    vae, latents = WanVAE.from_tensors(weights()), torch.randn(48, 1, 4, 6, generator=torch.Generator().manual_seed(3))
    pixels = torch.rand(3, 1, 64, 96, generator=torch.Generator().manual_seed(4)) * 2 - 1
    found = vae.decode(latents), vae.encode(pixels)
    causal, quick = vae_room._convolutions()
    quicks = [module for module in vae.module.modules() if type(module) is quick]
    assert quicks
    for module in quicks:
        module.__class__ = causal
    slow = vae.decode(latents), vae.encode(pixels)
    assert int((found[0].int() - slow[0].int()).abs().max()) <= 1
    torch.testing.assert_close(found[1], slow[1], atol=1e-5, rtol=1e-5)
