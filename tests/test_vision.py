"""The vision tower against the reference's embeddings and against transformers' own attention."""

import json
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

sys.path.append(str(Path(__file__).resolve().parents[1]))

from alive import Alive
from goldens import CASES, PARITY, sources

from lance_runtime.config import VisionConfig
from lance_runtime.model import vision as vision_room
from lance_runtime.model.vision import RotaryAngles, build_vision, encode_vision
from lance_runtime.preprocess import sample_frames, vit_patches

VISUAL_CASES = [name for name, case in CASES.items() if case["task"] not in ("t2i", "t2v", "i2v")]
CONFIG = VisionConfig.from_json(json.loads((PARITY / "checkpoint/Qwen2.5-VL-ViT/config.json").read_text("utf-8")))


@cache
def weights(variant):
    """The ViT that the reference uses: the video checkpoint brings its own."""
    if variant == "Lance_3B_Video":
        tensors = load_file(PARITY / "checkpoint" / variant / "model.safetensors")
        return {k.removeprefix("vit_model."): v for k, v in tensors.items() if k.startswith("vit_model.")}
    return load_file(PARITY / "checkpoint/Qwen2.5-VL-ViT/vit.safetensors")


def load(variant="Lance_3B", dtype=torch.float32, **options):
    vision = build_vision(CONFIG, dtype=dtype, **options)
    vision.load_state_dict({k: v.to(dtype) for k, v in weights(variant).items()}, strict=True, assign=True)
    return vision


def patches_of(grid, seed=0):
    return torch.randn(grid[0] * grid[1] * grid[2], 1176, generator=torch.Generator().manual_seed(seed))


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))])
        return out


@pytest.mark.parametrize("name", VISUAL_CASES)
def test_embeddings_are_the_references(name):
    case = CASES[name]
    golden = load_file(PARITY / "cases" / f"{name}.safetensors")
    vision = load(case["checkpoint"])
    for index, frames in enumerate(sources(case)):
        embeds = encode_vision(vision, *vit_patches(frames, case["settings"]["resolution"], CONFIG))
        torch.testing.assert_close(embeds, golden[f"vit_embeds_{index}"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("grid", [(1, 2, 2), (1, 10, 24), (3, 18, 14), (2, 8, 8)])
def test_batched_windows_equal_transformers_own_attention(grid):
    vision, patches = load(), patches_of(grid)
    own = modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel(vision.config)
    own.load_state_dict({k: v.float() for k, v in weights("Lance_3B").items()}, strict=True)
    assert type(own.blocks[0].attn).__name__ != type(vision.blocks[0].attn).__name__
    with torch.no_grad():
        result = own(patches, grid_thw=torch.tensor([grid]))
    expected = result if isinstance(result, torch.Tensor) else result.pooler_output
    torch.testing.assert_close(encode_vision(vision, patches, grid), expected, atol=1e-5, rtol=0)


def test_no_tensor_grows_with_the_square_of_the_clip(monkeypatch):
    vision, grid = load(), (40, 14, 14)
    patches = patches_of(grid)
    calls, plain = [], torch.nn.functional.scaled_dot_product_attention

    def record(q, k, v, attn_mask=None, **options):
        calls.append((q.shape[0], q.shape[2], attn_mask))
        return plain(q, k, v, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    with Largest() as largest:
        encode_vision(vision, patches, grid)
    assert all(mask is None for _, _, mask in calls)
    # 7 x 7 tokens of 4 patches in windows of 4 x 4: one whole, two cut on one side, one on both; and the full frames.
    assert {(batch, length) for batch, length, _ in calls} == {(40, 64), (80, 48), (40, 36), (40, 196)}
    assert largest.elements <= len(patches) * 1176 < len(patches) ** 2


@pytest.mark.parametrize("tokens", [1, 100, 500])
def test_groups_of_tokens_change_nothing(monkeypatch, tokens):
    patches, grid = patches_of((3, 18, 14)), (3, 18, 14)
    whole = encode_vision(load(), patches, grid)
    monkeypatch.setattr(vision_room, "TOKENS_AT_ONCE", tokens)
    torch.testing.assert_close(encode_vision(load(), patches, grid), whole, atol=1e-5, rtol=0)


def test_a_clip_of_six_seconds_takes_less_than_two_gigabytes(monkeypatch):
    """Two blocks of the real width in bfloat16, one with windows and one with whole frames, on an eighth of the clip.

    What the blocks hold for all tokens grows with the clip; what they hold for a group of tokens does not.
    """
    config = VisionConfig(depth=2, fullatt_block_indexes=(1,))
    vision = build_vision(config, dtype=torch.bfloat16, device="cpu")
    for parameter in vision.parameters():
        parameter.data.fill_(0.01)
    frames = len(sample_frames(144, 24.0))
    whole = vit_patches(np.zeros((frames, 480, 848, 3), np.uint8)[:2], "video_480p", config)[1]
    grid, share = (4, *whole[1:]), 4 / ((frames + 1) // 2)
    assert (frames, whole[1:]) == (69, (32, 58))
    patches = torch.zeros(grid[0] * grid[1] * grid[2], 1176, dtype=torch.bfloat16)
    monkeypatch.setattr(vision_room, "TOKENS_AT_ONCE", int(vision_room.TOKENS_AT_ONCE * share))
    with torch.no_grad(), Alive() as alive:
        encode_vision(vision, patches, grid)
    assert 0.5e9 < (alive.most + patches.nbytes) / share < 2e9


def test_a_given_attention_function_is_used():
    seen = []

    def attention(q, k, v):
        seen.append(q.shape)
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v

    grid = (2, 10, 6)
    result = encode_vision(load(attention=attention), patches_of(grid), grid)
    torch.testing.assert_close(result, encode_vision(load(), patches_of(grid), grid), atol=1e-5, rtol=0)
    assert all(shape[1:] == (CONFIG.num_heads, shape[2], 16) for shape in seen)


def test_all_blocks_share_what_is_read_from_the_borders(monkeypatch):
    """Each reading has a device wait for the host; and nothing stays behind."""
    read, vision, real = [], load(), vision_room.pairwise
    monkeypatch.setattr(vision_room, "pairwise", lambda borders: read.append(borders) or real(borders))
    for _ in range(2):
        encode_vision(vision, patches_of((2, 10, 6)), (2, 10, 6))
        assert not vision.blocks[0].attn.segments
    assert len(vision.blocks) > 2
    assert len(read) == 2 * 2  # windows, and frames


def test_frames_of_a_clip_do_not_see_each_other():
    vision, patches = load(), patches_of((2, 8, 8))
    both = encode_vision(vision, patches, (2, 8, 8))
    torch.testing.assert_close(both[16:], encode_vision(vision, patches[64:], (1, 8, 8)), atol=1e-5, rtol=0)


def qwens_angles(positions, dtype):
    """The reference's: a buffer in the type that the module was cast to, and positions in the buffer's."""
    buffer = (1 / 10000 ** (torch.arange(0, 40, 2) / 40)).to(dtype)
    return torch.stack([torch.outer(axis.to(dtype), buffer) for axis in positions], dim=1).flatten(1)


@pytest.mark.parametrize(
    ("dtype", "device", "rounds"),
    [
        (torch.float32, "cpu", False),
        (torch.bfloat16, "cpu", True),
        (torch.float32, "cuda", True),
        (torch.bfloat16, "cuda", True),
    ],
)
@pytest.mark.parametrize("trained", [True, False])
def test_angles_of_patches_are_those_that_the_weights_have_learned(dtype, device, rounds, trained):
    rotary = RotaryAngles(VisionConfig(bfloat16_frequencies=trained))  # heads of the real width, 80
    positions = torch.stack([torch.arange(72), torch.arange(72).flip(0)])
    expected = qwens_angles(positions, torch.bfloat16 if trained and rounds else torch.float32)
    expected = expected if dtype == torch.bfloat16 else expected.float()
    rotary.set_type(dtype, torch.device(device))
    assert torch.equal(rotary(positions.T), expected)
    assert torch.equal(rotary(torch.tensor(72)), expected[:, :20])
    both = torch.cat((expected, expected), dim=-1)
    for found, told in zip(rotary(torch.zeros(1), positions.T), (both.cos(), both.sin()), strict=True):
        assert found.dtype == told.dtype
        assert torch.equal(found, told)


@pytest.mark.parametrize(("patches", "least", "most"), [(48, 0.12, 0.14), (72, 0.23, 0.26)])
def test_rounded_angles_are_another_embedding(patches, least, most):
    positions = torch.arange(patches)[None]
    apart = (qwens_angles(positions, torch.bfloat16).float() - qwens_angles(positions, torch.float32)).abs().max()
    assert least < apart < most


@pytest.mark.parametrize(
    ("written", "rounded"),
    [({}, True), ({"torch_dtype": "bfloat16"}, True), ({"torch_dtype": "float32"}, False), ({"dtype": "float32"}, False)],
)
def test_the_configuration_says_what_weights_were_trained_in(written, rounded):
    assert VisionConfig.from_json(written).bfloat16_frequencies == rounded


def test_a_pass_asks_for_angles_in_the_type_that_it_computes_in(monkeypatch):
    seen, real = [], RotaryAngles._angles
    monkeypatch.setattr(RotaryAngles, "_angles", lambda rotary, positions: seen.append(real(rotary, positions)) or seen[-1])
    grid = (1, 4, 6)
    for dtype in (torch.bfloat16, torch.float32):
        found = encode_vision(load(dtype=dtype), patches_of(grid).to(dtype), grid)
        assert found.dtype == seen[-1].dtype == dtype


def test_the_real_tower_is_built_without_memory():
    vision = build_vision(VisionConfig(), dtype=torch.bfloat16)
    assert len(vision.state_dict()) == 390
    assert sum(p.numel() for p in vision.parameters()) == 668_684_288
    assert all(p.is_meta and p.dtype == torch.bfloat16 and not p.requires_grad for p in vision.parameters())
    assert not vision.training


def test_building_on_a_device_allocates():
    vision = build_vision(CONFIG, device="cpu")
    assert not any(tensor.is_meta for tensor in (*vision.parameters(), *vision.buffers()))
    assert vision.load_state_dict(weights("Lance_3B")).missing_keys == []


@pytest.mark.parametrize("grid", [(1, 4, 4), (1, 3, 8), (2, 4, 2)])
def test_patches_that_do_not_fill_the_grid_are_refused(grid):
    with pytest.raises(ValueError, match="24 patches .* {} x {} x {} .*\n".format(*grid)):
        encode_vision(load(), patches_of((1, 4, 6)), grid)
