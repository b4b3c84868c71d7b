"""Pictures against the reference's tables and patches, and everything a user may hand in."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).resolve().parents[1]))

from goldens import CASES, PARITY, sources

from lance_runtime.config import VisionConfig
from lance_runtime.preprocess import centre, presets, sample_frames, to_frames, vae_pixels, vae_size, vit_patches, vit_size

TABLES = json.loads((PARITY / "preprocess.json").read_text("utf-8"))
VISUAL_CASES = [name for name, case in CASES.items() if case["task"] not in ("t2i", "t2v", "i2v")]
VIT = VisionConfig()


def picture(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def refusal(call, *args):
    """Both lines of the error: what is wrong, and what to do."""
    with pytest.raises(ValueError, match="\n") as caught:
        call(*args)
    first, second = str(caught.value).split("\n")
    assert all((first, second))
    return first, second


@pytest.mark.parametrize("name", VISUAL_CASES)
def test_patches_are_the_references(name):
    golden = load_file(PARITY / "cases" / f"{name}.safetensors")
    for index, frames in enumerate(sources(CASES[name])):
        patches, grid = vit_patches(frames, CASES[name]["settings"]["resolution"], VIT)
        assert list(grid) == golden["vit_grid_thw"][index].tolist()
        assert patches.shape == (grid[0] * grid[1] * grid[2], 1176)
        assert patches.dtype == torch.float32
        head = golden[f"vit_patches_head_{index}"]
        torch.testing.assert_close(patches[: len(head)], head, atol=1e-6, rtol=0)


def test_frames_are_sampled_as_the_reference_samples_them():
    for row in TABLES["frame_sampling"]["rows"]:
        assert sample_frames(row["frames"], row["fps"]) == row.get("indices", [0]), row
    assert any("upstream_error" in row for row in TABLES["frame_sampling"]["rows"])


def test_frame_rates_are_rounded_and_never_zero():
    assert sample_frames(48, 23.976) == sample_frames(48, 24)
    assert sample_frames(3, 0.2) == sample_frames(3, 1)
    assert sample_frames(10**6, 1e9) == [0]


@pytest.mark.parametrize("fps", [0, -12.0, float("nan"), float("inf")])
def test_impossible_frame_rates_are_refused(fps):
    assert str(fps) in refusal(sample_frames, 24, fps)[0]


def test_empty_clips_are_refused():
    assert "0 frames" in refusal(sample_frames, 0, 24.0)[0]


@pytest.mark.parametrize("preset", list(TABLES["presets"]))
def test_every_bucket_is_found_by_its_own_size(preset):
    table = TABLES["presets"][preset]
    for height, width in table["vae_buckets_hw"]:
        assert vae_size(height, width, preset) == (height, width)
    for before, after in zip(table["vit_buckets_hw_before_crop"], table["vit_hw_after_crop_28"], strict=True):
        assert vit_size(*before, preset, VIT) == tuple(after)


def test_unknown_presets_are_refused_with_the_known_ones():
    assert set(presets()) == {*TABLES["presets"], "image_96res", "video_96p"}  # the last two are Nano's
    first, second = refusal(vae_pixels, picture(32, 32, 3), "video_720p")
    assert "video_720p" in first
    assert all(name in second for name in presets())
    refusal(vit_patches, picture(32, 32, 3), "video_720p", VIT)


def test_vae_pixels_keep_a_picture_that_has_its_buckets_size():
    frames = picture(2, 256, 256, 3)
    pixels = vae_pixels(frames, "image_256res")
    assert pixels.shape == (3, 2, 256, 256)
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()
    assert pixels.min() >= -1
    assert pixels.max() <= 1
    back = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()
    np.testing.assert_array_equal(back, frames)


def test_crop_comes_before_scaling():
    """Bright margins that the crop removes must not bleed into the picture."""
    frames = np.full((1, 100, 200, 3), 255, dtype=np.uint8)
    left, width = (200 - 175) // 2, 175  # image_256res, 16:9: 192 x 336, ratio 1.75
    frames[:, :, left : left + width] = 0
    assert (vae_pixels(frames, "image_256res") == -1).all()


@pytest.mark.parametrize(
    ("height", "width", "kept"),
    [
        (480, 854, (480, 854)),  # 16:9 as players round it; the bucket's own ratio would take 853
        (768, 1366, (768, 1366)),
        (1080, 1920, (1080, 1920)),
        (667, 1000, (667, 889)),  # 4:3 is the nearest, and narrower
        (600, 601, (600, 600)),
        (600, 620, (600, 600)),
    ],
)
def test_a_picture_of_nearly_the_buckets_ratio_stays_whole(height, width, kept):
    """As torchvision's RandomResizedCrop, by which the reference crops: the whole area first, then what fits."""
    bucket = vae_size(height, width, "image_768res")
    cut = centre(picture(1, height, width, 3), kept)
    expected = [np.asarray(Image.fromarray(frame).resize(bucket[::-1], Image.Resampling.BICUBIC)) for frame in cut]
    found = vae_pixels(picture(1, height, width, 3), "image_768res")
    assert torch.equal(((found + 1) * 127.5).round().to(torch.uint8).movedim(0, -1), torch.from_numpy(np.stack(expected)))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (10, 20000), (20000, 10), (1, 3000), (3000, 1), (1, 2)])
def test_any_size_works(height, width):
    frames = picture(height, width, 3)
    pixels = vae_pixels(frames, "video_192p")
    assert pixels.shape[2:] == vae_size(height, width, "video_192p")
    assert pixels.isfinite().all()
    patches, grid = vit_patches(frames, "video_192p", VIT)
    assert len(patches) == grid[0] * grid[1] * grid[2]
    assert patches.isfinite().all()


def test_odd_frame_counts_repeat_the_last_frame():
    frames = picture(3, 64, 64, 3)
    patches, grid = vit_patches(frames, "image_256res", VIT)
    longer, same = vit_patches(frames[[0, 1, 2, 2]], "image_256res", VIT)
    assert grid == same == (2, 16, 16)
    assert torch.equal(patches, longer)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "F", "I", "I;16", "I;16B"])
def test_opaque_pillow_modes_become_rgb(mode):
    image = Image.new(mode, (5, 4))
    frames = to_frames(image)
    assert frames.shape == (1, 4, 5, 3)
    assert frames.dtype == np.uint8


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA"])
def test_transparent_pillow_modes_are_laid_on_white(mode):
    image = Image.new("RGBA", (5, 4), (10, 10, 10, 0))
    image.putpixel((1, 2), (0, 0, 0, 255))
    if mode == "PA":  # Pillow's own conversion to PA drops the alpha channel
        image = Image.merge("LA", [Image.new("L", image.size), image.getchannel("A")])
        image = Image.frombytes("PA", image.size, image.tobytes())
        image.putpalette([0, 0, 0])
    frames = to_frames(image.convert("LA").convert(mode) if mode == "La" else image.convert(mode))
    assert frames[0, 0, 0].tolist() == [255, 255, 255]
    assert frames[0, 2, 1].max() <= 1


def test_transparent_colours_of_palettes_are_white():
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([9, 9, 9, 30, 60, 90])
    palette.putpixel((0, 0), 0)
    palette.info["transparency"] = 0
    assert to_frames(palette)[0, 0].tolist() == [[255, 255, 255], [30, 60, 90]]


def test_16_bit_pictures_keep_their_brightness():
    values = np.array([[0, 128, 257, 32768, 65535]], dtype=np.uint16)
    expected = [0, 0, 1, 128, 255]
    assert to_frames(Image.fromarray(values))[0, 0, :, 0].tolist() == expected
    assert to_frames(Image.fromarray(values.astype(np.int32)))[0, 0, :, 0].tolist() == expected


def test_arrays_and_tensors():
    clip, still, grey = picture(3, 4, 5, 3), picture(4, 5, 3), picture(4, 5)
    np.testing.assert_array_equal(to_frames(clip), clip)
    np.testing.assert_array_equal(to_frames(torch.from_numpy(clip)), clip)
    np.testing.assert_array_equal(to_frames(still), still[None])
    np.testing.assert_array_equal(to_frames(grey), np.stack([grey] * 3, axis=-1)[None])
    np.testing.assert_array_equal(to_frames(clip[..., :1]), np.repeat(clip[..., :1], 3, axis=-1))


def test_alpha_of_arrays_is_laid_on_white_as_of_files():
    image = Image.open(PARITY / "media" / "alpha.png")
    array = np.array(image)
    np.testing.assert_array_equal(to_frames(array), to_frames(image))
    np.testing.assert_array_equal(to_frames(np.stack([array] * 2)), np.concatenate([to_frames(image)] * 2))


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (np.zeros((4, 4, 3), np.float32), "float32"),
        (torch.zeros(4, 4, 3), "float32"),
        (np.zeros((4, 4, 3), np.uint16), "uint16"),
        (np.zeros((4, 4), bool), "bool"),
        (np.zeros((3, 4, 5), np.uint8), "(3, 4, 5)"),
        (np.zeros((2, 3, 64, 64), np.uint8), "(2, 3, 64, 64)"),
        (np.zeros((0, 4, 4, 3), np.uint8), "(0, 4, 4, 3)"),
        (np.zeros((4, 4, 2), np.uint8), "(4, 4, 2)"),
        (np.zeros(4, np.uint8), "(4)"),
        (np.zeros((1, 1, 4, 4, 3), np.uint8), "(1, 1, 4, 4, 3)"),
        (Image.new("RGB", (0, 3)), "0 x 3"),
        ("cat.png", "str"),
        ([[1, 2]], "list"),
        (None, "NoneType"),
    ],
)
def test_other_inputs_are_refused_by_name(value, named):
    assert named in refusal(to_frames, value)[0]
