"""Where other ports of Lance went wrong, one test each; and what nothing here may need."""

import ast
import subprocess
import sys
from pathlib import Path

import full_pass
import goldens
import numpy as np
import pytest
import tasks
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lance_runtime import Guidance
from lance_runtime.context import Context, Segment, VisionTokens, layout
from lance_runtime.denoise import predict_velocity
from lance_runtime.prefill import branch
from lance_runtime.preprocess import presets, vae_pixels, vae_size
from lance_runtime.prompts import system_sentence
from lance_runtime.types import LatentShape, Modality

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lance_runtime"


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def trees():
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text("utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def names(tree):
    """Every name, attribute and imported module of a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}", *(alias.name for alias in node.names))


# One a line of the list


def test_the_video_checkpoints_own_vision_tower_wins(video_pipe):
    """Previously, other ports loaded the separate ViT over the one in the video checkpoint."""
    context = video_pipe.context(video_pipe.request(**goldens.arguments("x2t_video_vqa")))
    expected = goldens.tensors("x2t_video_vqa")["vit_embeds_0"]
    torch.testing.assert_close(context.visuals[0].values, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("task", ["image_edit", "video_edit"])
def test_the_edit_sentence_has_its_typographic_apostrophe(task, image_pipe):
    """Previously, other ports wrote user's with the ASCII apostrophe: other tokens than the model was trained on."""
    sentence = system_sentence(task)
    assert sentence.count("user\u2019s") == 2
    assert "'" not in sentence
    tokenizer = image_pipe.components.tokenizer
    assert tokenizer.encode(sentence) != tokenizer.encode(sentence.replace("\u2019", "'"))


@pytest.mark.parametrize(("task", "opening"), [("x2t_image", "Look at the image"), ("x2t_video", "Watch the video")])
def test_a_question_gets_its_own_sentence(task, opening):
    """Previously, other ports put the caption sentence before questions, and greedy decoding ended at once."""
    assert system_sentence(task, "What is it?").startswith(opening)
    assert system_sentence(task, "What is it?").endswith("answer the question.")
    assert "description" in system_sentence(task)
    assert "{" not in system_sentence(task)


@pytest.mark.parametrize("question", ["What color is the car?", ""])
def test_greedy_decoding_does_not_end_at_once(question, image_pipe):
    """Previously, other ports found an empty answer where the sentence or the template was wrong."""
    assert len(image_pipe(**tasks.arguments("x2t_image") | {"question": question}).token_ids) == 5


def test_i2v_has_no_vision_tokens_and_positions_that_never_go_back(video_pipe):
    """Previously, other ports put the image into the prompt of i2v as ViT tokens, and rewound the positions after it."""
    sequence = video_pipe.layout(**tasks.arguments("i2v"))
    assert sequence.attn_modes == ["causal", "causal", "causal", "noise", "causal"]
    assert Modality.VIT not in sequence.modality
    starts = [int(split.positions.min()) for split in sequence.splits]
    ends = [int(split.positions.max()) for split in sequence.splits]
    assert starts == [0, *(end + 1 for end in ends[:-1])]
    assert sequence.input_ids.tolist() == video_pipe.layout("t2v", **i2v_as_t2v(video_pipe)).input_ids.tolist()


def i2v_as_t2v(pipe):
    arguments = tasks.arguments("i2v")
    size = pipe.request(**arguments).target().pixels()
    return {"prompt": arguments["prompt"], "num_frames": size.frames, "height": size.height, "width": size.width}


def test_more_latent_frames_than_any_table_holds(video_pipe):
    """Previously, other ports sized the position table for 25 latent frames, and were out of range at 50."""
    out = video_pipe("t2v", "a red hat", height=16, width=32, num_frames=4 * 50 + 1, steps=1, guidance=Guidance(scale=1))
    assert out.latents.shape == (48, 51, 1, 2)
    engine, grid = video_pipe.components.engine, LatentShape(51, 1, 2)
    context = Context((Segment.text([5, 6, 7]),), VisionTokens(*video_pipe.context(video_pipe.request("t2v", "a")).vision))
    latents, times = torch.randn(48, *grid, generator=torch.Generator().manual_seed(0)), torch.ones(51)
    found = predict_velocity(engine, latents[None], times[None], [branch(engine, layout(context, grid))])[0]
    expected = full_pass.velocity(engine.model, layout(context, grid), latents, times)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "changed",
    [
        {"scale": 2.0},
        {"interval": (0.95, 1.0)},
        {"renorm": "none"},
        {"renorm": "channel"},
        {"renorm_min": 0.99},
        {"uncond_positions": "dense"},
    ],
)
def test_every_guidance_setting_is_connected(changed, image_pipe):
    """Previously, other ports showed a guidance slider that nothing read."""
    arguments = tasks.arguments("t2i") | {"steps": 4}
    usual = {"scale": 6.0, "interval": (0.0, 1.0)}
    first, second = (image_pipe(**arguments | {"guidance": Guidance(**usual | more)}).latents for more in ({}, changed))
    assert (first - second).abs().max() > 1e-4


@pytest.mark.parametrize("changed", [{"steps": 3}, {"shift": 1.0}, {"seed": 1}, {"prompt": "a cat"}, {"instruction": "Draw:"}])
def test_every_setting_is_connected(changed, image_pipe):
    """As for the guidance: what is on offer acts."""
    arguments = tasks.arguments("t2i")
    assert (image_pipe(**arguments).latents - image_pipe(**arguments | changed).latents).abs().max() > 1e-4


def test_videos_have_their_own_buckets(video_pipe):
    """Previously, other ports used the image buckets for video sources."""
    request = video_pipe.request("i2v", "a", images=[goldens.image("wide.png")])
    assert request.preset == "video_480p"
    assert request.target().pixels()[1:] == vae_size(*request.images[0].shape[1:3], "video_480p")
    assert vae_size(*request.images[0].shape[1:3], "video_480p") != vae_size(*request.images[0].shape[1:3], "image_768res")
    for preset in presets():
        if preset.startswith("image"):
            with pytest.raises(ValueError, match=preset):
                video_pipe.request("i2v", "a", images=[goldens.image("wide.png")], resolution=preset)


def test_nothing_relies_on_one_make_of_device():
    """Previously, other ports ran under autocast("cuda") and called .cuda() on machines that have none."""
    for name, tree in trees().items():
        found = set(names(tree)) & {"autocast", "amp"}
        assert not found, f"{name}: {found}"
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert not [call for call in calls if isinstance(call, ast.Attribute) and call.attr in ("cuda", "xpu", "mps")], name


def test_frames_pass_from_step_to_step_unpacked(video_pipe):
    """Previously, other ports wrote a lossy mp4 between two steps: the model saw its own artefacts."""
    first = video_pipe("t2v", "a red hat", height=64, width=96, num_frames=5, steps=1, guidance=Guidance(scale=1))
    frames = first.frames
    np.testing.assert_array_equal(frames, video_pipe.components.vae.decode(first.latents).numpy())
    request = video_pipe.request("video_edit", "red", video=frames, fps=12.0, resolution=tasks.VIDEO)
    source = video_pipe.context(request).visuals[1].values
    assert torch.equal(source, video_pipe.components.vae.encode(vae_pixels(request.video, tasks.VIDEO)))
    users = [
        name for name, tree in trees().items() if any(found.split(".")[0] in ("av", "imageio", "cv2") for found in names(tree))
    ]
    assert users == ["lance_runtime/media.py"]


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))])
        return out


def test_a_long_clip_makes_no_mask(video_pipe, monkeypatch):
    """Previously, other ports built a 33 GB attention mask for a clip of 10 s."""
    engine, grid = video_pipe.components.engine, LatentShape(13, 10, 12)
    source = Segment.latents(torch.zeros(48, *grid), Modality.EDIT_SOURCE)
    vision = video_pipe.context(video_pipe.request("t2v", "a")).vision
    sequence = layout(Context((Segment.text([5, 6]), source, Segment.text([7, 8, 9])), vision), grid)
    masks, plain = [], F.scaled_dot_product_attention

    def record(q, k, v, attn_mask=None, **options):
        masks.append((q.shape[2], k.shape[2], attn_mask))
        return plain(q, k, v, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    with Largest() as largest:
        predict_velocity(engine, torch.zeros(1, 48, *grid), torch.ones(1, 13), [branch(engine, sequence)])
    assert all(mask is None or mask.numel() <= 3 * sum(sequence.split_lens) for _, _, mask in masks)
    assert max(keys for _, keys, _ in masks) == sum(sequence.split_lens)
    assert largest.elements < grid.tokens**2 / 2


# What nothing may need


RUN = """
import socket, sys

ABSENT = "comfy comfy_api folder_paths nodes flash_attn xformers sageattention".split()
sys.modules.update(dict.fromkeys(ABSENT))  # None: an import of it fails

def refused(*args, **options):
    raise OSError("no network")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refused
import pkgutil, lance_runtime
for module in pkgutil.walk_packages(lance_runtime.__path__, "lance_runtime."):
    if not module.name.endswith("__main__"):
        __import__(module.name)
from lance_runtime import LancePipeline
pipe = LancePipeline.from_pretrained(sys.argv[1], device="cpu")
out = pipe("t2i", "a red hat", height=32, width=48, steps=2)
print(out.frames.shape, [name for name in ABSENT if sys.modules[name] is not None])
"""


def test_import_and_a_picture_need_no_flash_attention_no_comfyui_and_no_network():
    """Previously, other ports imported flash-attn at the top, or asked a hub on the way."""
    offline = {"HF_HUB_OFFLINE": "0", "PATH": "", "PYTHONPATH": str(ROOT), "HOME": "/nonexistent"}
    command = [sys.executable, "-c", RUN, str(goldens.CHECKPOINT)]
    result = subprocess.run(command, capture_output=True, text=True, env=offline, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "(1, 32, 48, 3) []"


def test_no_file_names_a_foreign_library():
    foreign = {
        "comfy",
        "comfy_api",
        "comfy_extras",
        "folder_paths",
        "flash_attn",
        "xformers",
        "apex",
        "deepspeed",
        "huggingface_hub",
    }
    for name, tree in trees().items():
        imported = {found.split(".")[0] for found in names(tree)}
        own = {"huggingface_hub"} if name.endswith("download.py") else set()  # it fetches the weights
        assert not imported & (foreign - own), name
