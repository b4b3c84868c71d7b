"""Lance among ComfyUI's own nodes: what one node gives, the next one takes."""

from __future__ import annotations

import av
import goldens
import numpy as np
import pytest
from comfy_results import TOLERANCE, difference, saved_latents
from graphs import empty, loader, node
from PIL import Image
from workflow_nodes import ask, edit, sampler, video_start

from lance_runtime.types import PixelShape

pytestmark = pytest.mark.comfy
SMALL = {"resolution": "image_256res"}
CLIP_FRAMES, CLIP_FPS = goldens.clip("clip24.npz")[0][:13], 12.0


@pytest.fixture(scope="module")
def server(comfy_server, tmp_path_factory):
    """ComfyUI with a picture, a smaller one of 96 x 64, and a clip of 13 frames."""
    folder = tmp_path_factory.mktemp("media")
    goldens.image("wide.png").resize((96, 64)).save(folder / "reduced.png")
    first, *rest = (Image.fromarray(frame) for frame in CLIP_FRAMES)
    first.save(folder / "clip.png", save_all=True, append_images=rest)
    for path in (goldens.PARITY / "media" / "wide.png", goldens.PARITY / "media" / "tall.png", *folder.iterdir()):
        comfy_server.upload_image(path)
    return comfy_server


def changed(graph_node, **inputs):
    return {**graph_node, "inputs": {**graph_node["inputs"], **inputs}}


def draws(latent, prompt="a red hat", context=None, **settings):
    return sampler(prompt, latent, context, **{"steps": 2, "seed": 3, **settings})


def decode(samples):
    return node("VAEDecode", samples=[samples, 0], vae=["load", 2])


def graph_of(checkpoint="Lance_3B", **nodes):
    """The loader, pictures, and these nodes; "sample" is saved."""
    files = {name: node("LoadImage", image=f"{name}.png") for name in ("wide", "tall", "reduced", "clip")}
    return {
        "load": loader(checkpoint),
        **files,
        **nodes,
        "latent": node("SaveLatent", samples=["sample", 0], filename_prefix="l"),
    }


def latents(server, **nodes):
    found = saved_latents(server.run(graph_of(**nodes)))
    assert found.isfinite().all()
    return found


def frames(file):
    return np.asarray(goldens.image(file).convert("RGB"))


def test_edit_of_an_edit(server):
    """A picture from another node, edited, scaled, and edited again."""
    turns = {
        "inverted": node("ImageInvert", image=["wide", 0]),
        "edit1": changed(edit(image_0=["inverted", 0]), **SMALL),
        "sample1": draws(["edit1", 1], "make it night", ["edit1", 0]),
        "decode1": decode("sample1"),
        "scaled": node("ImageScale", image=["decode1", 0], upscale_method="lanczos", width=160, height=128, crop="center"),
        "edit2": changed(edit(image_0=["scaled", 0]), **SMALL),
        "sample": draws(["edit2", 1], "add snow", ["edit2", 0]),
    }
    twice = latents(server, **turns)
    other = latents(server, **{**turns, "sample1": draws(["edit1", 1], "make it day", ["edit1", 0])})
    assert twice.shape[-1] > twice.shape[-2]  # the scaled picture's shape, not the first one's
    assert difference(twice, other) > 1e-4


def test_answer_as_a_prompt(server):
    asked = changed(ask("", image_0=["wide", 0]), max_length=12, **SMALL)
    drawn = draws(["empty", 0], ["ask", 0])
    result = server.run(graph_of(empty=empty(96, 64), ask=asked, sample=drawn))
    text = result.outputs["ask"]["text"][0]
    assert text
    assert difference(saved_latents(result), latents(server, empty=empty(96, 64), sample=draws(["empty", 0], text))) == 0


def vae_encode(pixels="reduced"):
    return node("VAEEncode", pixels=[pixels, 0], vae=["load", 2])


def own_encode(source, resolution="as is"):
    return node("LanceNativeVAEEncode", vae=["load", 2], source=[source, 0], resolution=resolution, fps=24.0)


def context(visuals=(), context=None, text="", role="edit source"):
    links = {f"visuals.visual_{i}": [name, 0] for i, name in enumerate(visuals)}
    more = {} if context is None else {"context": [context, 0]}
    settings = {"task": "image_edit", "role": role, "text": text, "system": ""}
    return node("LanceNativeContext", clip=["load", 1], **settings, **links, **more)


def test_core_latents_in_a_context(server):
    def edited(encode):
        nodes = {"code": encode, "context": context(["code"]), "sample": draws(["code", 0], context=["context", 0])}
        return latents(server, **nodes)

    assert difference(edited(vae_encode()), edited(own_encode("reduced"))) < TOLERANCE


@pytest.mark.parametrize("ours", [False, True])
def test_core_latents_to_begin_with(ours, server):
    start = latents(server, sample=vae_encode())

    def redrawn(denoise):
        if ours:
            return latents(server, code=vae_encode(), sample=draws(["code", 0], steps=3, denoise=denoise))
        prompt = node("CLIPTextEncode", clip=["load", 1], text="a red hat")
        settings = {"seed": 3, "steps": 3, "cfg": 2.0, "sampler_name": "euler", "scheduler": "simple", "denoise": denoise}
        links = {"model": ["load", 0], "positive": ["prompt", 0], "negative": ["prompt", 0], "latent_image": ["code", 0]}
        return latents(server, code=vae_encode(), prompt=prompt, sample=node("KSampler", **settings, **links))

    near, far = (float((redrawn(denoise) - start).abs().mean()) for denoise in (0.1, 1.0))
    assert 0 < near < far / 2


def core_draws(latent):
    """ComfyUI's own prompt and sampler on a latent."""
    settings = {"seed": 3, "steps": 2, "cfg": 2.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    links = {"model": ["load", 0], "positive": ["prompt", 0], "negative": ["prompt", 0], "latent_image": latent}
    prompt = node("CLIPTextEncode", clip=["load", 1], text="a red hat")
    return {"prompt": prompt, "sample": node("KSampler", **settings, **links)}


@pytest.mark.parametrize("ours", [False, True])
def test_wan_start_latents_keep_their_first_frame(ours, server):
    start = node(
        "Wan22ImageToVideoLatent", vae=["load", 2], width=96, height=64, length=9, batch_size=1, start_image=["reduced", 0]
    )
    if ours:
        nodes = {"sample": draws(["start", 0])}
    else:
        nodes = core_draws(["start", 0])
    video = latents(server, checkpoint="Lance_3B_Video", start=start, **nodes)
    picture = latents(server, checkpoint="Lance_3B_Video", sample=vae_encode())
    assert video.shape[2] == 3
    assert difference(video[:, :, :1], picture) < TOLERANCE
    own = changed(video_start(first=["reduced", 0]), latent=["empty", 0])
    if ours:
        nodes = {"start": own, "empty": empty(96, 64, 9), "sample": draws(["start", 0])}
        assert difference(video, latents(server, checkpoint="Lance_3B_Video", **nodes)) < TOLERANCE


def test_video_with_its_sound(server):
    """A clip with sound goes in; what comes out is drawn, and sounds the same."""
    nodes = {
        "silence": node("EmptyAudio", duration=1.0, sample_rate=44100, channels=2),
        "film": node("CreateVideo", images=["clip", 0], fps=CLIP_FPS, audio=["silence", 0]),
        "edit": changed(edit(video=["film", 0]), resolution="video_192p"),
        "sample": draws(["edit", 1], "make it night", ["edit", 0], steps=1),
        "frames": decode("sample"),
        "parts": node("GetVideoComponents", video=["film", 0]),
        "out": node("CreateVideo", images=["frames", 0], fps=12.0, audio=["parts", 1]),
        "save": node("SaveVideo", video=["out", 0], filename_prefix="film", format="mp4", codec="h264"),
    }
    result = server.run(graph_of("Lance_3B_Video", **nodes))
    with av.open(str(result.path("save"))) as film:
        assert film.streams.video[0].average_rate == 12
        assert sum(1 for _ in film.decode(video=0)) == 13
    with av.open(str(result.path("save"))) as film:
        assert film.streams.audio[0].sample_rate == 44100
        assert sum(frame.samples for frame in film.decode(audio=0)) >= 44100


@pytest.mark.parametrize("ours", [False, True])
def test_inpainting_keeps_what_is_outside_the_mask(ours, server):
    masks = {
        "black": node("SolidMask", value=0.0, width=96, height=64),
        "white": node("SolidMask", value=1.0, width=48, height=64),
        "mask": node("MaskComposite", destination=["black", 0], source=["white", 0], x=48, y=0, operation="add"),
        "code": vae_encode(),
        "masked": node("SetLatentNoiseMask", samples=["code", 0], mask=["mask", 0]),
    }
    if ours:
        sample = {"sample": draws(["masked", 0])}
    else:
        sample = core_draws(["masked", 0])
    painted, before = latents(server, **masks, **sample), latents(server, sample=vae_encode())
    assert difference(painted[..., :3], before[..., :3]) < 1e-4
    assert (painted - before)[..., 3:].abs().mean() > 0.1


def test_context_of_parts_is_lance_edit(server):
    parts = {
        "vit": node("LanceNativeViTEncode", clip=["load", 1], source=["wide", 0], fps=24.0, **SMALL),
        "code": own_encode("wide", **SMALL),
    }
    whole = {"edit": changed(edit(image_0=["wide", 0]), **SMALL)}
    expected = latents(server, **whole, sample=draws(["edit", 1], context=["edit", 0]))
    at_once = {"context": context(["vit", "code"])}
    chained = {"first": context(["vit"]), "context": context(["code"], "first")}
    words = {"first": context(["vit"], text="this, and"), "context": context(["code"], "first")}
    drawn = [
        latents(server, **parts, **nodes, sample=draws(["code", 0], context=["context", 0], denoise=1.0, seed=3))
        for nodes in (at_once, chained, words)
    ]
    assert difference(drawn[0], expected) == 0
    assert difference(drawn[1], expected) == 0
    assert difference(drawn[2], expected) > 1e-4


def test_inspector_shows_picture_and_words(server):
    nodes = {
        "edit": changed(edit(image_0=["wide", 0], image_1=["tall", 0]), **SMALL),
        "inspect": node(
            "LanceNativeContextInspector", clip=["load", 1], context=["edit", 0], prompt="make it night", latent=["edit", 1]
        ),
        "save": node("SaveImage", images=["inspect", 0], filename_prefix="inspector"),
        "sample": vae_encode(),
    }
    result = server.run(graph_of(**nodes))
    lines = result.outputs["inspect"]["text"][0].splitlines()
    for word in ("ViT", "edit source", "prompt", "target", "understanding expert", "generation expert", "MB"):
        assert any(word in line for line in lines), word
    picture = np.asarray(result.image("save"))
    assert picture.shape[1] == 960
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 6


@pytest.mark.parametrize("given", ["first and last", "middle", "continued", "continued at 24 a second"])
def test_given_frames_are_the_runtimes(given, server, video_pipe):
    kinds = {
        "first and last": ({"first": ["wide", 0], "last": ["tall", 0]}, {0: frames("wide.png"), -1: frames("tall.png")}),
        "middle": ({"middle": ["wide", 0]}, {1: frames("wide.png")}),
        "continued": (
            {"continue_from": ["clip", 0]},
            {0: CLIP_FRAMES[4:5], 1: CLIP_FRAMES[5:9], 2: CLIP_FRAMES[9:13]},
        ),
        # Every second frame, up to the last: 12 a second.
        "continued at 24 a second": ({"continue_from": ["fast", 0]}, {0: CLIP_FRAMES[4:5], 1: CLIP_FRAMES[6:13:2]}),
    }
    links, pictures = kinds[given]
    settings = {"steps": 3, "seed": 3}
    nodes = {"empty": empty(96, 64, 13 if given == "continued" else 9), "start": video_start(**links)}
    nodes["fast"] = node("CreateVideo", images=["clip", 0], fps=24.0)
    found = latents(server, checkpoint="Lance_3B_Video", **nodes, sample=draws(["start", 0], **settings))
    size = {"height": 64, "width": 96, "num_frames": PixelShape(nodes["empty"]["inputs"]["frames"], 64, 96).frames}
    out = video_pipe("t2v", "a red hat", given_frames=pictures, **size, **settings)
    assert difference(found[0], out.latents) < TOLERANCE
