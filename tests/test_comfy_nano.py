"""The built-in Nano in the real ComfyUI: what comes out of the graph is what was asked for, told from its pixels."""

from __future__ import annotations

import io
import random
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from comfy_server import ComfyServer
from graphs import Graph, node
from nano.evaluate import right_motion
from nano.gates import DRAWS, EDITS, gated
from nano.score import same_scene, same_things, seen
from nano.tasks import Example, frames
from nano.words import caption
from nano.world import CORNERS, PAIRS, PLACES, SHAPES, Clip, Scene, Thing, draw_scene, render
from PIL import Image
from test_comfy_memory import report
from workflow_nodes import ask, edit, sampler, subject, video_start

from lance_runtime.checkpoint import TensorFile
from lance_runtime.files import NANO as NANO_FOLDER
from lance_runtime.quantize import Plan, quantize

pytestmark = pytest.mark.comfy
NANO = "Lance Nano (built in)"
BIG_STAR = Scene((Thing("star", "red", 21, *PLACES["middle"]),), "pink")
PROMPT = "a big red star in the middle on a pink background"
PAIR = Scene((Thing("square", "green", 16, *PAIRS[0][0]), Thing("circle", "blue", 16, *PAIRS[0][1])), "white")

THREE = Scene(tuple(Thing("triangle", "yellow").at(corner) for corner in CORNERS), "black")


def load(weight_type: str = "default", **others: str) -> dict[str, Any]:
    """Nano, though a workflow names other files (which are not there)."""
    names = {"vit_name": "auto", "vae_name": "wan2.2_vae.safetensors", **others}
    return node("LanceNativeLoader", model_name=NANO, variant="auto", weight_type=weight_type, **names)


def empty(size: str = "image 1:1", frames: int = 1) -> dict[str, Any]:
    """A size of the big model: Nano draws its own."""
    sizes = {"size": size, "width": 768, "height": 768, "frames": frames, "seconds": 0.0, "batch_size": 1}
    return node("LanceNativeEmptyLatent", **sizes, model=["load", 0])


def decoded(samples: str = "sample") -> Graph:
    return {
        "decode": node("VAEDecode", samples=[samples, 0], vae=["load", 2]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="nano"),
    }


def draw(prompt: str, latent: list, context: list | None = None, **settings: Any) -> dict[str, Any]:
    return sampler(prompt, latent, context, seed=3, **settings)


def pictures(server: ComfyServer, graph: Graph) -> np.ndarray:
    """Every frame that the graph saved, uint8 (T, H, W, 3)."""
    paths = server.run(graph).paths("save")
    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])


@pytest.fixture(scope="module")
def server(comfy_server, tmp_path_factory):
    """ComfyUI with pictures of the world among its inputs."""
    folder = tmp_path_factory.mktemp("world")
    for name, scene in (("star", BIG_STAR), ("pair", PAIR)):
        Image.fromarray(render(scene)).save(folder / f"nano_{name}.png")
    clip = [Image.fromarray(frame) for frame in frames(Clip(Thing("circle", "red"), "gray", "right"))]
    clip[0].save(folder / "nano_clip.png", save_all=True, append_images=clip[1:])
    for path in folder.iterdir():
        comfy_server.upload_image(path)
    return comfy_server


@gated(DRAWS)
def test_the_classic_graph(server):
    settings = {"seed": 1, "steps": 25, "cfg": 4.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    graph = {
        "load": load(),
        "positive": node("CLIPTextEncode", clip=["load", 1], text=PROMPT),
        "negative": node("CLIPTextEncode", clip=["load", 1], text=""),
        "empty": node("EmptyLatentImage", width=96, height=96, batch_size=1),
        "sample": node(
            "KSampler",
            model=["load", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["empty", 0],
            **settings,
        ),
        **decoded(),
    }
    assert same_scene(seen(pictures(server, graph)[0]), BIG_STAR)


@gated(DRAWS)
@pytest.mark.parametrize(
    ("prompt", "scene"),
    [
        (PROMPT, BIG_STAR),
        ("a green square to the left of a blue circle on a white background", PAIR),
        ("白色背景上，绿色正方形在蓝色圆形的左边", PAIR),
        ("three yellow triangles on a black background", THREE),
    ],
)
def test_text_to_image(server, prompt, scene):
    made = pictures(server, {"load": load(), "empty": empty(), "sample": draw(prompt, ["empty", 0]), **decoded()})
    assert made.shape == (1, 96, 96, 3)
    assert same_things(seen(made[0]), scene)


@gated(EDITS)
@pytest.mark.parametrize(
    ("picture", "change", "scene"),
    [
        ("star", "make the star blue", Scene((Thing("star", "blue", 21, *PLACES["middle"]),), "pink")),
        ("pair", "remove the circle", Scene(PAIR.things[:1], "white")),
        ("pair", "make the square purple", Scene((Thing("square", "purple", 16, *PAIRS[0][0]), PAIR.things[1]), "white")),
    ],
)
def test_edit(server, picture, change, scene):
    graph = {
        "load": load(),
        "picture": node("LoadImage", image=f"nano_{picture}.png"),
        "edit": edit(image_0=["picture", 0]),
        "sample": draw(change, ["edit", 1], ["edit", 0]),
        **decoded(),
    }
    assert same_scene(seen(pictures(server, graph)[0]), scene)


@pytest.mark.parametrize(
    ("picture", "question", "answer"),
    [
        pytest.param("star", "What color is the star?", "red", marks=gated("question: colour")),
        pytest.param("pair", "How many shapes are there?", "two", marks=gated("question: how many")),
        pytest.param("pair", "Which shape is green?", "square", marks=gated("question: shape")),
        pytest.param("pair", "Is the circle on the left or on the right?", "right", marks=gated("question: left or right")),
        pytest.param("star", "背景是什么样的？", "粉色", marks=gated("question: background")),
    ],
)
def test_question(server, picture, question, answer):
    graph = {
        "load": load(),
        "picture": node("LoadImage", image=f"nano_{picture}.png"),
        "ask": ask(question, image_0=["picture", 0]),
        "show": node("PreviewAny", source=["ask", 0]),
    }
    assert server.run(graph).outputs["ask"]["text"] == [answer]


@gated("question about a clip: what moves where")
def test_question_about_a_clip(server):
    graph = {
        "load": load(),
        "frames": node("LoadImage", image="nano_clip.png"),
        "clip": node("CreateVideo", images=["frames", 0], fps=12.0),
        "ask": ask("What does the circle do?", video=["clip", 0]),
        "show": node("PreviewAny", source=["ask", 0]),
    }
    assert server.run(graph).outputs["ask"]["text"] == ["It moves to the right."]


def test_nano_draws_its_own_sizes(server):
    for size, frames_, shape in (("image 16:9", 1, (1, 96, 96, 3)), ("480p 16:9", 49, (9, 96, 96, 3))):
        graph = {"load": load(), "empty": empty(size, frames_), "sample": draw(PROMPT, ["empty", 0], steps=2), **decoded()}
        assert pictures(server, graph).shape == shape


@gated(DRAWS)
def test_text_to_video(server):
    prompt = "a red circle moves to the right on a gray background"
    graph = {"load": load(), "empty": empty("480p 16:9", 49), "sample": draw(prompt, ["empty", 0]), **decoded()}
    made = pictures(server, graph)
    assert right_motion(made, Example("t2v", prompt, Clip(Thing("circle", "red"), "gray", "right")))


@gated(DRAWS)
def test_image_to_video_keeps_its_first_frame(server):
    graph = {
        "load": load(),
        "picture": node("LoadImage", image="nano_star.png"),
        "empty": empty("480p 1:1", 49),
        "start": video_start(first=["picture", 0]),
        "sample": draw("the star shrinks", ["start", 0]),
        **decoded(),
    }
    assert same_scene(seen(pictures(server, graph)[0]), BIG_STAR)


@gated(DRAWS)
def test_subject(server):
    graph = {
        "load": load(),
        "picture": node("LoadImage", image="nano_star.png"),
        "empty": empty(),
        "subject": subject(image_0=["picture", 0]),
        "sample": draw("this shape, small, on the left on a black background", ["empty", 0], ["subject", 0]),
        **decoded(),
    }
    assert same_things(seen(pictures(server, graph)[0]), BIG_STAR)


def test_sizes_are_said_and_beyond_the_trained_ones_warned_of(server):
    # A size that no other test asks for: what ComfyUI has in its cache says nothing.
    graph = {"load": load(), "empty": empty("image 3:2"), "sample": draw(PROMPT, ["empty", 0], steps=1), **decoded()}
    assert server.run(graph).outputs["empty"]["text"] == ["96 x 96, 1 picture, 36 tokens"]
    graph["empty"]["inputs"].update(size="custom", width=192, height=96)
    note = server.run(graph).outputs["empty"]["text"][0]
    assert "192 x 96" in note
    assert "This model was not trained beyond 96 x 96 pixels" in note


@gated(DRAWS)
@pytest.mark.parametrize("weight_type", ["bfloat16", "float32", "fp8_e4m3fn"])
def test_smaller_weights_draw_the_same_thing(server, weight_type):
    graph = {"load": load(weight_type), "empty": empty(), "sample": draw(PROMPT, ["empty", 0]), **decoded()}
    assert same_scene(seen(pictures(server, graph)[0]), BIG_STAR)


@gated(DRAWS)
def test_previews_have_the_colours_of_the_picture(server):
    result = server.run({"load": load(), "empty": empty(), "sample": draw(PROMPT, ["empty", 0]), **decoded()})
    shown = Image.open(io.BytesIO(result.previews[-1])).convert("RGB").resize((6, 6), Image.Resampling.BOX)
    drawn = result.image("save").convert("RGB").resize((6, 6), Image.Resampling.BOX)
    apart = np.abs(np.asarray(shown, dtype=float) - np.asarray(drawn, dtype=float))
    assert apart.mean() < 30  # with Wan 2.2's factors it is 94


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"frames": 17}, "17 frames were asked for; this model makes 9 at most."),
        ({"size": "custom", "width": 32, "height": 32, "frames": 8}, "8 frames were asked for; videos have 4k+1."),
        ({"frames": 9}, None),
    ],
)
def test_other_frames_than_were_asked_for_are_said(server, changes, said):
    size = empty()
    size["inputs"].update(changes)
    result = server.run({"load": load(), "empty": size, "show": node("PreviewAny", source=["empty", 3])})
    (text,) = result.outputs["empty"]["text"]
    assert (text.split("\n")[1:] or [None]) == [said]


@gated(DRAWS)
def test_a_saved_model_draws_the_same_thing(server):
    save = {"save": node("ModelSave", model=["load", 0], filename_prefix="diffusion_models/nano")}
    server.run({"load": load(), **save})
    graph = {"load": load(), "empty": empty(), "sample": draw(PROMPT, ["empty", 0]), **decoded()}
    # The CLIP too: words, configuration and variant came along with the weights.
    graph["saved"] = node(
        "LanceNativeLoader",
        model_name="nano_00001_.safetensors",
        vit_name="auto",
        vae_name=NANO,
        variant="auto",
        weight_type="default",
    )
    graph["sample"]["inputs"].update(model=["saved", 0], clip=["saved", 1])
    picture = pictures(server, graph)[0]
    assert same_scene(seen(picture), BIG_STAR)
    # And pictures: of the towers that there are, it takes the one that is as wide.
    asked = {"clip": ["saved", 1], "question": "What shape is it?", "images.image_0": ["decode", 0]}
    settings = {"resolution": "auto", "max_length": 8, "temperature": 0.0, "top_p": 1.0, "seed": 1}
    graph |= {"ask": node("LanceNativeAsk", **asked, **settings), "show": node("PreviewAny", source=["ask", 0])}
    assert server.run(graph).outputs["show"]["text"] == ["star"]


@gated(DRAWS)
@pytest.mark.parametrize("kind", ["fp8", "int8", "nvfp4"])
def test_a_quantised_file_draws_the_same_thing(server, kind):
    path = server.base / "models" / "diffusion_models" / f"nano_{kind}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    quantize(TensorFile(NANO_FOLDER / "Lance_3B" / "model.safetensors"), path, Plan(kind))
    loader = load(vit_name="auto", vae_name=NANO)
    loader["inputs"].update(model_name=path.name, variant="image")
    graph = {"load": loader, "empty": empty(), "sample": draw(PROMPT, ["empty", 0]), **decoded()}
    assert same_scene(seen(pictures(server, graph)[0]), BIG_STAR)


@gated(DRAWS)
def test_a_run_with_hardly_any_memory_draws_the_same_thing():
    found = report("nano", NANO_FOLDER)
    assert found["low"]
    assert found["bytes loaded"] < found["bytes"] / 2
    assert same_scene(seen(np.array(found["pixels"], dtype=np.uint8)), BIG_STAR)


NEW_NAME, ITS_COLOUR = "azure", "blue"  # a word that Nano has never read
LESSONS, LESSON_STEPS, MOST_SECONDS = 24, 160, 120
WHERE = (("in the middle", "white"), ("on the left", "gray"))
GUIDANCE = {"interval_start": 0.4, "interval_end": 1.0, "renorm": "global", "renorm_min": 0.0}


@pytest.fixture(scope="module")
def lessons(server):
    """Pictures of blue things among ComfyUI's inputs, whose captions call them by the new name."""
    folder = server.base / "input" / "azure"
    folder.mkdir(parents=True)
    rng = random.Random(4)
    for index in range(LESSONS):
        scene = draw_scene(rng, 1)
        scene = replace(scene, things=(replace(scene.things[0], colour=ITS_COLOUR),))
        Image.fromarray(render(scene)).save(folder / f"{index:02}.png")
        (folder / f"{index:02}.txt").write_text(caption(scene).replace(ITS_COLOUR, NEW_NAME), "utf-8")
    return "azure"


def azure(server, model: Graph) -> int:
    """How many of eight azure things come out blue; model: a graph whose node "model" is the MODEL."""
    prompts = [f"a big {NEW_NAME} {shape} {place} on a {back} background" for shape in SHAPES for place, back in WHERE]
    right = 0
    for seed, prompt in enumerate(prompts):
        sample = draw(prompt, ["empty", 0], model=["model", 0])
        sample["inputs"]["seed"] = seed
        made = pictures(server, {"load": load(), "empty": empty(), **model, "sample": sample, **decoded()})
        things = seen(made[0]).things
        right += len(things) == 1 and things[0].colour == ITS_COLOUR
    return right


@gated(DRAWS)
def test_a_lora_teaches_a_new_colour_name(server, lessons):
    fixed = {"grad_accumulation_steps": 1, "existing_lora": "[None]", "bucket_mode": False, "bypass_mode": False}
    numbers = {"batch_size": 4, "steps": LESSON_STEPS, "learning_rate": 0.005, "rank": 8, "seed": 1, "checkpoint_depth": 1}
    types = {"training_dtype": "fp32", "lora_dtype": "fp32", "quantized_backward": False, "algorithm": "LoRA"}
    how = {"optimizer": "AdamW", "loss_function": "MSE", "gradient_checkpointing": False, "offloading": False}
    graph = {
        "load": load(),
        "folder": node("LoadImageTextDataSetFromFolder", folder=lessons),
        "data": node("MakeTrainingDataset", images=["folder", 0], vae=["load", 2], clip=["load", 1], texts=["folder", 1]),
        "train": node(
            "TrainLoraNode",
            model=["load", 0],
            latents=["data", 0],
            positive=["data", 1],
            **fixed, **numbers, **types, **how,
        ),
        "keep": node("SaveLoRA", lora=["train", 0], prefix="loras/azure", steps=["train", 2]),
    }  # fmt: skip
    started = time.monotonic()
    server.run(graph)
    assert time.monotonic() - started < MOST_SECONDS
    plain = {"model": node("LanceNativeGuidance", model=["load", 0], **GUIDANCE)}
    lora = node("LoraLoaderModelOnly", model=["load", 0], lora_name=f"azure_{LESSON_STEPS}_steps_00001_.safetensors")
    lora["inputs"]["strength_model"] = 1.0
    before, after = azure(server, plain), azure(server, {"model": lora})
    assert after >= 7, (before, after)
    assert before <= 4, (before, after)
