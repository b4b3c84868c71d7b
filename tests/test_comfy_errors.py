"""What is wrong is said in one clear sentence, with what to do, and the next run works."""

from __future__ import annotations

import subprocess
from pathlib import Path

import goldens
import pytest
from comfy_server import PromptRejectedError, comfyui_python, find_comfyui
from graphs import empty, loader, node, text_to_image

pytestmark = pytest.mark.comfy
SCRIPT = Path(__file__).with_name("comfy_foreign_models.py")
LANCE_CLIP, LANCE_VAE = ["load", 1], ["load", 2]


@pytest.fixture(scope="module")
def server(comfy_server):
    """The session's ComfyUI with files of other models beside the tiny checkpoint, and a picture."""
    comfyui = find_comfyui()
    command = [comfyui_python(comfyui), SCRIPT, comfy_server.base / "models"]
    subprocess.run(command, cwd=comfyui, check=True, capture_output=True, timeout=120)
    comfy_server.upload_image(goldens.PARITY / "media" / "wide.png")
    yield comfy_server
    comfy_server.free()


def drawn(model=None, **changes):
    """One step of a small picture; changes: whole nodes by name, or inputs of the sampler."""
    graph = text_to_image(steps=1, model=model)
    del graph["decode"], graph["save"]
    for name, value in changes.items():
        if isinstance(value, dict):
            graph[name] = value
        else:
            graph["sample"]["inputs"][name] = value
    return graph


def shown(**nodes):
    """A graph of the loader, a picture and these nodes, of which "show" is the output."""
    return {"load": loader(), "picture": node("LoadImage", image="wide.png"), **nodes}


SOUND = node("EmptyLatentAudio", seconds=1.0, batch_size=1)


def sampler(**changes):
    settings = {"prompt": "a hat", "negative_prompt": "", "seed": 1, "steps": 1, "cfg": 4.0, "shift": 3.5, "denoise": 1.0}
    guidance = {"interval_start": 0.4, "interval_end": 1.0, "renorm": "global", "renorm_min": 0.0, "uncond_positions": "cached"}
    links = {"model": ["load", 0], "clip": LANCE_CLIP, "latent": ["empty", 0]}
    return node("LanceNativeSampler", **{**settings, **guidance, **links, **changes})


def guidance(**changes):
    values = {"interval_start": 0.4, "interval_end": 1.0, "renorm": "global", "renorm_min": 0.0, **changes}
    return {"model": node("LanceNativeGuidance", model=["load", 0], **values)}


REFUSED = {
    "interval upside down": (drawn(model=guidance(interval_start=0.8, interval_end=0.2)), "0.8 to 0.2", "0.4 to 1"),
    "interval beyond 1": (drawn(model=guidance(interval_end=5.0)), "5.0", "0 to 1"),
    "interval of the sampler": (drawn(sample=sampler(interval_start=-1.0)), "-1.0", "0 to 1"),
    "no steps": (drawn(sample=sampler(steps=0)), "0 smaller than min of 1"),
    "unknown renorm": (drawn(sample=sampler(renorm="local")), "'local' not in", "global"),
    "picture where a latent belongs": (
        drawn(picture=node("LoadImage", image="wide.png"), sample=sampler(latent=["picture", 0])),
        "IMAGE",
        "LATENT",
    ),
    "latent where a context belongs": (drawn(sample=sampler(context=["empty", 0])), "LATENT", "LANCE_CONTEXT"),
    "prompt that is no text": (drawn(sample=sampler(steps="many")), "steps", "many"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_the_run(name, server):
    graph, *texts = REFUSED[name]
    with pytest.raises(PromptRejectedError) as refusal:
        server.queue(graph)
    for text in texts:
        assert text in str(refusal.value), refusal.value


def test_linked_interval_is_accepted(server):
    graph = drawn(model=guidance(interval_start=["number", 0]), number=node("PrimitiveFloat", value=0.3))
    server.run(graph)


def test_a_damaged_file_of_another_model_is_passed_over(server):
    """Whoever looks for the vision tower opens all that lies beside it."""
    broken = server.base / "models" / "text_encoders" / "A_broken.safetensors"
    broken.write_bytes(bytes([24]) + bytes(25))
    try:
        edit = node("LanceNativeEdit", **{**EDIT, "resolution": "image_256res"}, **{"images.image_0": ["picture", 0]})
        start = shown(edit=edit, show=preview(["edit", 1]))
        start["load"] = loader("Lance_3B_Video")
        assert server.run(start, check=False).error is None
        assert "A_broken.safetensors" in server.log()
    finally:
        broken.unlink()


def test_linked_names_are_looked_up_when_the_node_runs(server):
    """A switch gives anything, so that ComfyUI cannot know the name before the run."""
    switch = {
        "name": node("PrimitiveString", value="Lance_3B/model.safetensors"),
        "switch": node("ComfySwitchNode", switch=True, on_true=["name", 0], on_false=["name", 0]),
    }
    linked = loader() | {"inputs": {**loader()["inputs"], "model_name": ["switch", 0]}}
    assert server.run(drawn(load=linked, seed=31, **switch)).paths("latent")


def prompt(text="a hat", clip=LANCE_CLIP):
    return node("CLIPTextEncode", clip=clip, text=text)


def foreign_latents(vae):
    return {"vae": node("VAELoader", vae_name=vae), "code": node("VAEEncode", pixels=["picture", 0], vae=["vae", 0])}


def foreign_start(vae):
    """KSampler beginning with the latents of another model."""
    return drawn(latent_image=["code", 0], picture=node("LoadImage", image="wide.png"), **foreign_latents(vae))


def preview(source):
    return node("PreviewAny", source=source)


def context(role, visual):
    settings = {"clip": LANCE_CLIP, "task": "image_edit", "role": role, "text": "", "system": ""}
    return node("LanceNativeContext", **settings, **{"visuals.visual_0": visual})


OTHER_CLIP = {"clip": node("CLIPLoader", clip_name="clip_l.safetensors", type="stable_diffusion")}
SAMPLER_SETTINGS = {"resolution": "image_256res", "fps": 24.0}
ANSWER = {"max_length": 3, "temperature": 0.0, "top_p": 1.0, "seed": 1}
EDIT = {"clip": LANCE_CLIP, "vae": LANCE_VAE, "resolution": "image_256res", "batch_size": 1}
VIDEO_START = {"vae": LANCE_VAE, "latent": ["empty", 0], "middle_at": 0.5, "overlap": 9}


def merged(class_type, **settings):
    nodes = {"first": prompt(), "second": prompt("a very red cat")}
    merge = node(class_type, conditioning_to=["first", 0], conditioning_from=["second", 0], **settings)
    return drawn(positive=["merge", 0], merge=merge, **nodes)


FAILING = {
    "other CLIP in Lance Conditioning": (
        drawn(sample=sampler(clip=["clip", 0]), **OTHER_CLIP),
        "not Lance's",
        "CLIP of Load Lance",
    ),
    "other CLIP in Lance Ask": (
        shown(
            **OTHER_CLIP,
            show=preview(["ask", 0]),
            ask=node(
                "LanceNativeAsk",
                clip=["clip", 0],
                question="what",
                resolution="auto",
                **ANSWER,
            ),
        ),
        "not Lance's",
        "CLIP of Load Lance",
    ),
    "prompt of another CLIP": (
        drawn(**OTHER_CLIP, positive=prompt(clip=["clip", 0])),
        "not made for Lance",
        "CLIP of Load Lance",
    ),
    "concatenated prompts": (merged("ConditioningConcat"), "merged", "Conditioning (Combine)"),
    "averaged prompts": (
        merged("ConditioningAverage", conditioning_to_strength=0.5),
        "merged",
        "Conditioning (Combine)",
    ),
    "4-channel VAE in Lance Edit": (
        shown(
            vae=node("VAELoader", vae_name="taesd"),
            edit=node("LanceNativeEdit", **{**EDIT, "vae": ["vae", 0]}, **{"images.image_0": ["picture", 0]}),
            show=preview(["edit", 0]),
        ),
        "4 channels",
        "48",
        "VAE of Load Lance",
    ),
    "Wan 2.1 VAE in Lance VAE Encode": (
        shown(
            vae=node("VAELoader", vae_name="wan21.safetensors"),
            code=node("LanceNativeVAEEncode", vae=["vae", 0], source=["picture", 0], **SAMPLER_SETTINGS),
            show=preview(["code", 1]),
        ),
        "16 channels",
        "48",
        "VAE of Load Lance",
    ),
    "Wan 2.1 VAE in Load Lance": (
        drawn(load=loader() | {"inputs": {**loader()["inputs"], "vae_name": "wan21.safetensors"}}),
        "wan21.safetensors is",
        "48 channels",
        "wan2.2_vae.safetensors",
    ),
    "other checkpoint in Load Lance": (
        drawn(load=loader() | {"inputs": {**loader()["inputs"], "model_name": "wan21.safetensors"}}),
        "wan21.safetensors",
        "Lance",
    ),
    "other MODEL in Lance Sampler": (
        drawn(
            other=node("UNETLoader", unet_name="wan21.safetensors", weight_dtype="default"),
            sample=sampler(model=["other", 0]),
        ),
        "not Lance's",
        "MODEL of Load Lance",
    ),
    "latents of 4 channels": (foreign_start("taesd"), "4 channels", "48", "Empty Lance Latent"),
    "latents of sound": (drawn(latent_image=["sound", 0], sound=SOUND), "3 axes", "5", "Empty Lance Latent"),
    "latents of sound in Lance Sampler": (
        drawn(sample=sampler(latent=["sound", 0]), sound=SOUND),
        "3 axes",
        "5",
        "Empty Lance Latent",
    ),
    "other MODEL in Lance Guidance": (
        drawn(
            model={
                "other": node("UNETLoader", unet_name="wan21.safetensors", weight_dtype="default"),
                "model": guidance()["model"] | {"inputs": guidance()["model"]["inputs"] | {"model": ["other", 0]}},
            }
        ),
        "not Lance's",
        "MODEL of Load Lance",
    ),
    "latents of Wan 2.1": (foreign_start("wan21.safetensors"), "16 channels", "48", "Empty Lance Latent"),
    "latents of 4 channels in a context": (
        shown(**foreign_latents("taesd"), look=context("subject", ["code", 0]), show=preview(["look", 0])),
        "4 channels",
        "VAE of Load Lance",
    ),
    "latents to look at": (
        shown(empty=empty(96, 64), look=context("look", ["empty", 0]), show=preview(["look", 0])),
        "ViT tokens",
        "Lance ViT Encode",
    ),
    "image latent for a video's start": (
        shown(
            empty=node("EmptyLatentImage", width=96, height=64, batch_size=1),
            start=node("LanceNativeVideoStart", **VIDEO_START, first=["picture", 0]),
            show=preview(["start", 0]),
        ),
        "4 channels",
        "Empty Lance Latent",
    ),
    "no given frame": (
        shown(empty=empty(96, 64, 5), start=node("LanceNativeVideoStart", **VIDEO_START), show=preview(["start", 0])),
        "0 given frames",
        "Connect a picture",
    ),
    "nothing to describe": (
        shown(
            ask=node(
                "LanceNativeAsk",
                clip=LANCE_CLIP,
                question=" ",
                resolution="auto",
                **ANSWER,
            )
        ),
        "0 pictures",
        "write a question",
    ),
    "nothing to rewrite": (
        shown(
            better=node(
                "LanceNativeEnhancePrompt",
                clip=LANCE_CLIP,
                prompt="",
                style="image",
                **ANSWER,
            )
        ),
        "0 words",
        "what to draw",
    ),
    "nothing to edit": (
        shown(edit=node("LanceNativeEdit", **EDIT), show=preview(["edit", 0])),
        "0 pictures",
        "Connect an image or a video",
    ),
    "pictures within a prompt": (
        drawn(
            picture=node("LoadImage", image="wide.png"),
            positive=node("TextEncodeQwenImageEdit", clip=LANCE_CLIP, prompt="a hat", image=["picture", 0]),
        ),
        "got 1",
        "Lance Edit",
    ),
    "reference latents": (
        drawn(
            words=prompt(),
            positive=node("ReferenceLatent", conditioning=["words", 0], latent=["empty", 0]),
        ),
        "1 reference latents",
        "Lance Edit",
    ),
    "two ways of guidance": (
        drawn(sample=sampler(model=["rescale", 0]), rescale=node("RescaleCFG", model=["load", 0], multiplier=0.7)),
        "RescaleCFG",
        "renorm to 'none'",
    ),
    "linked interval upside down": (
        drawn(model=guidance(interval_start=["number", 0], interval_end=0.2), number=node("PrimitiveFloat", value=0.9)),
        "interval",
        "0.4, 1.0",
    ),
}


@pytest.mark.parametrize("name", FAILING)
def test_one_clear_error_and_the_next_run_works(name, server):
    graph, *texts = FAILING[name]
    error = server.run(graph, check=False).error
    assert error is not None
    lines = error["exception_message"].strip().splitlines()
    assert error["exception_type"] == "ValueError", error
    assert len(lines) == 2, lines
    for text in texts:
        assert text in "\n".join(lines)
    assert server.run(drawn(seed=len(name))).paths("latent")


WARNING = "checkpoint draws this better"


@pytest.mark.parametrize(
    ("checkpoint", "frames", "cfg", "warnings"),
    [("Lance_3B", 5, 4.0, 1), ("Lance_3B_Video", 1, 4.0, 1), ("Lance_3B", 1, 4.0, 0), ("Lance_3B_Video", 5, 1.0, 0)],
)
def test_warns_once_of_a_checkpoint_that_does_not_fit(checkpoint, frames, cfg, warnings, server):
    before = server.log().count(WARNING)
    server.run(drawn(load=loader(checkpoint), empty=empty(96, 64, frames), cfg=cfg, seed=100 + frames))
    assert server.log().count(WARNING) - before == warnings
