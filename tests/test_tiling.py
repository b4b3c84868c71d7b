"""The VAE in tiles: the same picture, without seams, in less memory."""

from functools import cache
from itertools import pairwise

import goldens
import pytest
import tasks
import torch
import torch.nn.functional as F
from test_vision import Alive

from lance_runtime import LancePipeline, tiling
from lance_runtime.__main__ import build_parser
from lance_runtime.preprocess import fitted_pixels, to_frames
from lance_runtime.tiling import decode_tiled, encode_tiled, spans
from lance_runtime.vae import WanVAE


@cache
def vae(tiled=False):
    weights = torch.load(goldens.CHECKPOINT / "Wan2.2_VAE.pth", weights_only=True)
    found = WanVAE.from_tensors(weights)
    found.tiled = tiled
    return found


@cache
def picture():
    return fitted_pixels(to_frames(goldens.image("wide.png")), (512, 768))


@pytest.mark.parametrize("length", [1, 31, 32, 33, 48, 53, 56, 57, 121, 400])
@pytest.mark.parametrize(("tile", "overlap"), [(32, 8), (16, 4)])
def test_tiles_are_equal_and_cover_all(length, tile, overlap):
    found = spans(length, tile, overlap)
    assert found[0][0] == 0
    assert found[-1][1] == length
    assert {end - start for start, end in found} == {min(tile, length)}
    assert all(second[0] <= first[1] - overlap for first, second in pairwise(found))
    assert len(found) == 1 or tile + (len(found) - 2) * (tile - overlap) < length  # one fewer would not do


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (20, 90), (64, 100)])
def test_what_is_local_comes_back_as_it_is(size):
    latents = torch.randn(1, 3, 2, *size, generator=torch.Generator().manual_seed(0))

    def enlarge(x):
        return x.repeat_interleave(16, -1).repeat_interleave(16, -2)

    def shrink(x):
        return F.avg_pool2d(x.flatten(0, 2), 16).unflatten(0, x.shape[:3])

    torch.testing.assert_close(decode_tiled(enlarge, latents), enlarge(latents), atol=1e-6, rtol=0)
    pixels = torch.randn(1, 3, 1, 16 * size[0], 16 * size[1], generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(encode_tiled(shrink, pixels), shrink(pixels), atol=1e-6, rtol=0)


def test_a_picture_of_one_tile_is_the_same_to_the_bit():
    pixels = picture()[..., :256, :512]
    latents = vae().encode(pixels)
    assert torch.equal(vae(tiled=True).encode(pixels), latents)
    assert torch.equal(vae(tiled=True).decode(latents), vae().decode(latents))


def test_several_tiles_are_nearly_the_same_both_ways():
    """Not the same: Wan's middle block sees a whole frame, and with tiles a tile. (A real VAE's sees little there.)"""
    latents, frames = vae().encode(picture()), vae().decode(vae().encode(picture()))
    found = vae(tiled=True).encode(picture())
    assert 0 < (found - latents).norm() / latents.norm() < 0.06
    error = (vae(tiled=True).decode(latents).float() - frames.float()).abs().mean()
    assert 0 < error < 3


def test_a_clip_goes_through_in_tiles():
    clip = torch.rand(3, 5, 32, 768, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = vae(tiled=True).encode(clip)
    assert latents.shape == (48, 2, 2, 48)
    torch.testing.assert_close(latents[:, :1], vae(tiled=True).encode(clip[:, :1]), atol=1e-5, rtol=0)
    assert vae(tiled=True).decode(latents).shape == (5, 32, 768, 3)


def jump(decoded, borders):
    """How much more a decoded picture's error changes at some columns (in latents) than it does elsewhere."""
    error = decoded.float() - vae().decode(vae().encode(picture())).float()
    change = (error[:, :, 1:] - error[:, :, :-1]).abs().mean(dim=(0, 1, 3))
    return max(float(change[16 * border - 1]) for border in borders) / float(change.median())


def test_there_are_no_seams():
    latents = vae().encode(picture())
    borders = {place for span in spans(48, tiling.TILE, tiling.OVERLAP) for place in span} - {0, 48}
    assert borders
    faded = jump(vae(tiled=True).decode(latents), borders)
    halves = [vae().decode(part.contiguous()) for part in latents.chunk(2, dim=-1)]  # and this is what a seam looks like
    assert faded < 1.5
    assert jump(torch.cat(halves, dim=2), [24]) > 2 * faded


def test_tiles_take_less_memory():
    latents, most = torch.zeros(48, 1, 32, 48), []
    for decode in (vae()._decode, lambda x: decode_tiled(vae()._decode, x, 16, 4)):
        with torch.no_grad(), Alive() as alive:
            decode(latents[None])
        most.append(alive.most)
    assert most[1] < 0.4 * most[0]


def test_the_pipeline_and_the_command_line_offer_it():
    pipe = LancePipeline.from_pretrained(goldens.CHECKPOINT, device="cpu", tiled_vae=True)
    assert pipe.components.vae.tiled
    assert not LancePipeline.from_pretrained(goldens.CHECKPOINT, device="cpu").components.vae.tiled
    assert pipe(**tasks.arguments("image_edit") | {"steps": 1}).frames.shape[0] == 1
    arguments = ["t2i", "--model", "Lance", "--prompt", "a"]
    assert build_parser().parse_args([*arguments, "--tiled-vae"]).tiled_vae
    assert not build_parser().parse_args(arguments).tiled_vae
