"""The pack's workflows: one per task and one per idea, as graphs whose nodes are laid out in columns.

``build_workflows.py`` turns them into templates (``workflows/``) with the real web page, and into their twins in API
format (``tests/workflows/``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from graphs import Graph, node

IMAGE_MODEL, VIDEO_MODEL, VAE = "Lance_3B.safetensors", "Lance_3B_Video.safetensors", "wan2.2_vae.safetensors"
VIT = "qwen2.5_vl_vit.safetensors"  # named where the image checkpoint looks at pictures, so that the page can offer it
FOX = (
    "A red fox sits in deep snow at the edge of a pine forest, looking at the camera. Soft morning light from the left, "
    "breath visible in the cold air, close-up, shallow depth of field."
)
FOX_RUNS = (
    "A red fox runs through deep snow towards the camera, throwing up powder with every leap. Pine forest behind it, low "
    "winter sun, the camera glides backwards at the fox's height."
)


@dataclass(frozen=True)
class Workflow:
    """A template: its name for people, what to know about it, and its nodes by columns."""

    name: str
    note: str
    columns: tuple[Graph, ...]

    @property
    def slug(self) -> str:
        return self.name.lower().replace(" ", "_").replace(",", "")

    @property
    def graph(self) -> Graph:
        return {key: value for column in self.columns for key, value in column.items()}


def load(model: str = IMAGE_MODEL, vit: str = "auto") -> Graph:
    settings = {"vit_name": vit, "vae_name": VAE, "variant": "auto", "weight_type": "default"}
    return {"load": node("LanceNativeLoader", model_name=model, **settings)}


def empty(size: str = "image 1:1", frames: int = 1, batch: int = 1) -> dict[str, Any]:
    """Sizes of the model that is loaded: Lance Nano's are small."""
    sizes = {"size": size, "width": 768, "height": 768, "frames": frames, "seconds": 0.0, "batch_size": batch}
    return node("LanceNativeEmptyLatent", **sizes, model=["load", 0])


def sampler(prompt: Any, latent: list, context: list | None = None, **settings: Any) -> dict[str, Any]:
    inputs = {
        "model": ["load", 0],
        "clip": ["load", 1],
        "latent": latent,
        "prompt": prompt,
        "negative_prompt": "",
        "seed": 42,
        "steps": 30,
        "cfg": 4.0,
        "shift": 3.5,
        "denoise": 1.0,
        "interval_start": 0.4,
        "interval_end": 1.0,
        "renorm": "global",
        "renorm_min": 0.0,
        "uncond_positions": "cached",
        **settings,
    }
    return node("LanceNativeSampler", **inputs, **({} if context is None else {"context": context}))


def decoded(name: str = "decode", samples: str = "sample") -> Graph:
    return {name: node("VAEDecode", samples=[samples, 0], vae=["load", 2])}


def save_image(images: str = "decode", prefix: str = "Lance") -> dict[str, Any]:
    return node("SaveImage", images=[images, 0], filename_prefix=prefix)


def compared(before: str, after: str) -> dict[str, Any]:
    """ComfyUI's slider between two pictures."""
    return node("ImageCompare", image_a=[before, 0], image_b=[after, 0], compare_view="")


def save_video(audio: list | None = None) -> Graph:
    """Lance's clips play at 12 frames a second."""
    sound = {} if audio is None else {"audio": audio}
    return {
        "video": node("CreateVideo", images=["decode", 0], fps=12.0, **sound),
        "save": node("SaveVideo", video=["video", 0], filename_prefix="video/Lance", format="auto", codec="auto"),
    }


def picture(key: str = "picture", file: str = "example.png") -> Graph:
    return {key: node("LoadImage", image=file)}


def clip(key: str = "clip") -> Graph:
    return {key: node("LoadVideo", file="example.mp4")}


def edit(**sources: list) -> dict[str, Any]:
    named = {name.replace("image_", "images.image_"): link for name, link in sources.items()}
    return node("LanceNativeEdit", clip=["load", 1], vae=["load", 2], resolution="auto", batch_size=1, **named)


def subject(**images: list) -> dict[str, Any]:
    named = {f"images.{name}": link for name, link in images.items()}
    return node("LanceNativeSubject", clip=["load", 1], vae=["load", 2], resolution="auto", **named)


def video_start(**given: Any) -> dict[str, Any]:
    return node("LanceNativeVideoStart", vae=["load", 2], latent=["empty", 0], middle_at=0.5, overlap=9, **given)


def ask(question: str, **sources: list) -> dict[str, Any]:
    named = {name.replace("image_", "images.image_"): link for name, link in sources.items()}
    settings = {"resolution": "auto", "max_length": 256, "temperature": 0.0, "top_p": 1.0, "seed": 42}
    return node("LanceNativeAsk", clip=["load", 1], question=question, **settings, **named)


def show(key: str = "ask") -> Graph:
    return {"show": node("PreviewAny", source=[key, 0])}


def classic() -> tuple[Graph, ...]:
    guidance = {"interval_start": 0.4, "interval_end": 1.0, "renorm": "global", "renorm_min": 0.0}
    ksampler = node(
        "KSampler",
        model=["guidance", 0],
        positive=["positive", 0],
        negative=["negative", 0],
        latent_image=["empty", 0],
        seed=42,
        steps=25,
        cfg=4.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )
    return (
        {**load(), "empty": empty()},
        {
            "guidance": node("LanceNativeGuidance", model=["load", 0], **guidance),
            "positive": node("CLIPTextEncode", clip=["load", 1], text=FOX),
            "negative": node("CLIPTextEncode", clip=["load", 1], text=""),
        },
        {"sample": ksampler},
        {**decoded(), "save": save_image()},
    )


def grid(*scales: float) -> tuple[Graph, ...]:
    """One row of pictures for each guidance scale, one column for each seed of a batch."""
    rows = range(len(scales))
    joined: Graph = {}
    for row in rows[1:]:
        before = ["decode0" if row == 1 else f"join{row - 1}", 0]
        joined[f"join{row}"] = node("ImageBatch", image1=before, image2=[f"decode{row}", 0])
    apart = node("RebatchImages", images=[f"join{rows[-1]}", 0], batch_size=1)
    cells = {"columns": len(scales), "cell_width": 512, "cell_height": 512, "padding": 8}
    return (
        {**load(), "empty": empty(batch=len(scales))},
        {f"sample{row}": sampler(FOX, ["empty", 0], cfg=scale) for row, scale in enumerate(scales)},
        {key: value for row in rows for key, value in decoded(f"decode{row}", f"sample{row}").items()},
        {**joined, "apart": apart},
        {"grid": node("ImageGrid", images=["apart", 0], **cells), "save": save_image("grid")},
    )


WORKFLOWS = (
    Workflow(
        "Text to Image",
        "Long, literal prompts work best: say what is where, the light, the camera. 30 steps and cfg 4 are Lance's own.",
        ({**load(), "empty": empty()}, {"sample": sampler(FOX, ["empty", 0])}, {**decoded(), "save": save_image()}),
    ),
    Workflow(
        "Text to Video",
        "49 frames are four seconds at 12 a second; up to 121 were trained. Name the movement and the camera in the prompt.",
        (
            {**load(VIDEO_MODEL), "empty": empty("480p 16:9", 49)},
            {"sample": sampler(FOX_RUNS, ["empty", 0])},
            {**decoded(), **save_video()},
        ),
    ),
    Workflow(
        "Image to Video",
        "The picture is the first frame; it is cut to the video's aspect ratio. Say in the prompt what happens next.",
        (
            {**load(VIDEO_MODEL), **picture(), "empty": empty("480p 16:9", 49)},
            {"start": video_start(first=["picture", 0])},
            {"sample": sampler(FOX_RUNS, ["start", 0])},
            {**decoded(), **save_video()},
        ),
    ),
    Workflow(
        "First and Last Frame",
        "Lance fills in what happens between two pictures. They should show the same scene.",
        (
            {**load(VIDEO_MODEL), **picture("first"), **picture("last")},
            {"empty": empty("480p 16:9", 49), "start": video_start(first=["first", 0], last=["last", 0])},
            {"sample": sampler(FOX_RUNS, ["start", 0])},
            {**decoded(), **save_video()},
        ),
    ),
    Workflow(
        "Continue a Video",
        "The last 9 frames of the clip are the first of the new one. The clip should play at 12 frames a second.",
        (
            {**load(VIDEO_MODEL), "empty": empty("480p 16:9", 49), **clip()},
            {
                "frames": node("GetVideoComponents", video=["clip", 0]),
                "start": video_start(continue_from=["frames", 0]),
            },
            {"sample": sampler(FOX_RUNS, ["start", 0])},
            {**decoded(), **save_video()},
        ),
    ),
    Workflow(
        "Edit an Image",
        "Say the change as an instruction. The result is as large as the trained size nearest to the picture's shape.",
        (
            {**load(vit=VIT), **picture()},
            {"edit": edit(image_0=["picture", 0])},
            {"sample": sampler("Make it a cold winter evening with falling snow.", ["edit", 1], ["edit", 0])},
            {**decoded(), "save": save_image(), "compare": compared("picture", "decode")},
        ),
    ),
    Workflow(
        "Edit a Video",
        "Up to six seconds are seen, at 12 frames a second. The clip's sound goes into the result.",
        (
            {**load(VIDEO_MODEL), **clip()},
            {"edit": edit(video=["clip", 0]), "parts": node("GetVideoComponents", video=["clip", 0])},
            {"sample": sampler("Make it night.", ["edit", 1], ["edit", 0])},
            {**decoded(), **save_video(["parts", 1])},
        ),
    ),
    Workflow(
        "Multi-turn Edit",
        "The result of one edit is the source of the next. Decode in between: nothing is lost to a file.",
        (
            {**load(vit=VIT), **picture()},
            {
                "edit": edit(image_0=["picture", 0]),
                "sample": sampler("Make it a cold winter evening.", ["edit", 1], ["edit", 0]),
            },
            {**decoded(), "edit2": edit(image_0=["decode", 0])},
            {"sample2": sampler("Add falling snow.", ["edit2", 1], ["edit2", 0])},
            {**decoded("decode2", "sample2"), "save": save_image("decode2")},
        ),
    ),
    Workflow(
        "Subject in a New Scene",
        "The subject is kept, the scene is the prompt's.",
        (
            {**load(vit=VIT), **picture(), "empty": empty()},
            {"subject": subject(image_0=["picture", 0])},
            {"sample": sampler("The subject stands on a sunny beach, wide shot.", ["empty", 0], ["subject", 0])},
            {**decoded(), "save": save_image()},
        ),
    ),
    Workflow(
        "Subject in a Video",
        "The subject is kept, the scene and the movement are the prompt's.",
        (
            {**load(VIDEO_MODEL), **picture(), "empty": empty("480p 16:9", 49)},
            {"subject": subject(image_0=["picture", 0])},
            {"sample": sampler("The subject walks along a sunny beach, the camera follows.", ["empty", 0], ["subject", 0])},
            {**decoded(), **save_video()},
        ),
    ),
    Workflow(
        "Two Subjects",
        "Say in the prompt which is where. More than two tend to melt into one.",
        (
            {**load(vit=VIT), **picture("first"), **picture("second")},
            {"empty": empty(), "subject": subject(image_0=["first", 0], image_1=["second", 0])},
            {"sample": sampler("The two subjects sit side by side on a bench.", ["empty", 0], ["subject", 0])},
            {**decoded(), "save": save_image()},
        ),
    ),
    Workflow(
        "Ask about an Image",
        "The answer appears in the node while it is written. Without a question, Lance describes what it sees.",
        ({**load(vit=VIT), **picture()}, {"ask": ask("What is happening here?", image_0=["picture", 0])}, show()),
    ),
    Workflow(
        "Ask about a Video",
        "Up to six seconds are seen, at 12 frames a second.",
        ({**load(VIDEO_MODEL), **clip()}, {"ask": ask("What happens in this video?", video=["clip", 0])}, show()),
    ),
    Workflow(
        "Read Text",
        "Lance reads signs, labels and pages.",
        ({**load(vit=VIT), **picture()}, {"ask": ask("Read all the text in the image.", image_0=["picture", 0])}, show()),
    ),
    Workflow(
        "Find Things and Replace Them",
        "Lance names a box, the box becomes a mask, and only what is under the mask is drawn again.",
        (
            {**load(vit=VIT), **picture()},
            {
                "ask": ask("Locate the main object, and output its bbox coordinates in JSON format.", image_0=["picture", 0]),
                "encode": node("LanceNativeVAEEncode", vae=["load", 2], source=["picture", 0], resolution="auto", fps=24.0),
            },
            {
                "masked": node("SetLatentNoiseMask", samples=["encode", 0], mask=["ask", 2]),
                "sample": sampler("A golden statue.", ["masked", 0]),
            },
            {**decoded(), "save": save_image()},
        ),
    ),
    Workflow(
        "Reason over Two Images",
        "Any number of pictures can be asked about together.",
        (
            {**load(vit=VIT), **picture("first"), **picture("second")},
            {"ask": ask("What differs between the two images?", image_0=["first", 0], image_1=["second", 0])},
            show(),
        ),
    ),
    Workflow(
        "Caption, then Redraw",
        "Lance describes a picture and draws it anew from the words alone.",
        (
            {**load(vit=VIT), **picture(), "empty": empty()},
            {"ask": ask("", image_0=["picture", 0])},
            {"sample": sampler(["ask", 0], ["empty", 0]), **show()},
            {**decoded(), "save": save_image()},
        ),
    ),
    Workflow(
        "Enhance a Prompt",
        "Lance rewrites a short prompt as the long, literal one that it draws best from.",
        (
            {**load(), "empty": empty()},
            {
                "enhance": node(
                    "LanceNativeEnhancePrompt",
                    clip=["load", 1],
                    prompt="a fox in the snow",
                    style="image",
                    max_length=256,
                    temperature=0.0,
                    top_p=1.0,
                    seed=42,
                )
            },
            {"sample": sampler(["enhance", 0], ["empty", 0]), **show("enhance")},
            {**decoded(), "save": save_image()},
        ),
    ),
    Workflow(
        "Grid of Seeds and Settings",
        "Each row is one cfg, each column one seed: seed, seed + 1, ... of the batch. Change any sampler to compare others.",
        grid(2.0, 4.0, 6.0),
    ),
    Workflow(
        "Classic KSampler",
        "Lance among ComfyUI's own nodes. 25 steps with scheduler 'simple' are Lance's exact schedule; keep cfg at 4.",
        classic(),
    ),
)
