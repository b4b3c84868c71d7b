"""The pack's workflows: one per task and one per idea, as graphs whose nodes are laid out in columns.

``build_workflows.py`` turns them into templates (``workflows/``) with the real web page, and into their twins in API
format (``tests/workflows/``). At three quarters of a window of 1400 x 850, which is how the page opens them, labels are
drawn up to a size of 1830 x 1110; browsers at 125 % leave 1640 x 990.
"""

from __future__ import annotations

from graphs import Graph, node
from workflow_nodes import (
    NANO,
    VIDEO_MODEL,
    VIT,
    Workflow,
    ask,
    clip,
    compared,
    decoded,
    edit,
    empty,
    enhance,
    load,
    picture,
    sampler,
    save_image,
    save_video,
    show,
    subject,
    video_start,
)

FOX = (
    "A red fox sits in deep snow at the edge of a pine forest, looking at the camera. Soft morning light from the left, "
    "breath visible in the cold air, close-up, shallow depth of field."
)
FOX_RUNS = (
    "A red fox runs through deep snow towards the camera, throwing up powder with every leap. Pine forest behind it, low "
    "winter sun, the camera glides backwards at the fox's height."
)
STAR = "a big red star in the middle on a pink background"
# Five columns side by side.
NARROW = {
    "LanceNativeLoader": [290, 200],
    "LanceNativeSampler": [290, 480],
    "LanceNativeEmptyLatent": [290, 240],
    "LanceNativeEdit": [290, 150],
    "LanceNativeAsk": [290, 320],
    "ImageCompare": [290, 330],
    "SaveImage": [290, 330],
    "PreviewAny": [290, 160],
    "PrimitiveStringMultiline": [290, 90],
}


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
    """One row of pictures for each guidance scale, one column for each seed of a batch; one prompt for all."""
    rows = range(len(scales))
    samplers = [sampler(["words", 0], ["empty", 0], cfg=scale) for scale in scales]
    batch = node("BatchImagesNode", **{f"images.image{row}": [f"decode{row}", 0] for row in rows})
    cells = {"columns": len(scales), "cell_width": 512, "cell_height": 512, "padding": 8}
    return (
        {**load(), "words": node("PrimitiveStringMultiline", value=FOX), "empty": empty(batch=len(scales))},
        *({f"sample{row}": samplers[row], **decoded(f"decode{row}", f"sample{row}")} for row in rows),
        {
            "batch": batch,
            "apart": node("RebatchImages", images=["batch", 0], batch_size=1),
            "grid": node("ImageGrid", images=["apart", 0], **cells),
            "save": save_image("grid"),
        },
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
            {**load(VIDEO_MODEL), "empty": empty("480p 16:9", 49)},
            {**picture(), "start": video_start(first=["picture", 0])},
            {"sample": sampler(FOX_RUNS, ["start", 0])},
            {**decoded(), **save_video()},
        ),
    ),
    Workflow(
        "First and Last Frame",
        "Lance fills in what happens between two pictures. They should show the same scene.",
        (
            {**load(VIDEO_MODEL), "empty": empty("480p 16:9", 49)},
            {**picture("first"), **picture("last")},
            {"start": video_start(first=["first", 0], last=["last", 0]), "sample": sampler(FOX_RUNS, ["start", 0])},
            {**decoded(), **save_video()},
        ),
    ),
    Workflow(
        "Continue a Video",
        "The last 9 frames of the video, taken 12 times a second, are the first of the new one.",
        (
            {**load(VIDEO_MODEL), "empty": empty("480p 16:9", 49)},
            {
                **clip(),
                "start": video_start(continue_from=["clip", 0]),
            },
            {"sample": sampler(FOX_RUNS, ["start", 0])},
            {**decoded(), **save_video()},
        ),
    ),
    Workflow(
        "Edit an Image",
        "Say the change as an instruction. The result is as large as the trained size nearest to the picture's shape. The "
        "slider of Compare Images needs Nodes 2.0 (in the menu of the logo).",
        (
            {**load(vit=VIT), **picture()},
            {"edit": edit(image_0=["picture", 0])},
            {"sample": sampler("Make it a cold winter evening with falling snow.", ["edit", 1], ["edit", 0])},
            {**decoded(), "save": save_image(), "compare": compared("picture", "decode")},
        ),
        {"SaveImage": [340, 310], "ImageCompare": [340, 310]},
    ),
    Workflow(
        "Edit a Video",
        "The video is seen at 12 frames a second; one longer than six seconds is thinned to 69 frames, so cut it into parts. "
        "Its sound goes into the result.",
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
            {
                **decoded(),
                "edit2": edit(image_0=["decode", 0]),
                "sample2": sampler("Add falling snow.", ["edit2", 1], ["edit2", 0]),
            },
            {**decoded("decode2", "sample2"), "save": save_image("decode2")},
        ),
        {"LanceNativeSampler": [380, 470]},
    ),
    Workflow(
        "Subject in a New Scene",
        "The subject is kept, the scene is the prompt's.",
        (
            {**load(vit=VIT), "empty": empty()},
            picture(),
            {
                "subject": subject(image_0=["picture", 0]),
                "sample": sampler("The subject stands on a sunny beach, wide shot.", ["empty", 0], ["subject", 0]),
            },
            {**decoded(), "save": save_image()},
        ),
    ),
    Workflow(
        "Subject in a Video",
        "The subject is kept, the scene and the movement are the prompt's.",
        (
            {**load(VIDEO_MODEL), "empty": empty("480p 16:9", 49)},
            picture(),
            {
                "subject": subject(image_0=["picture", 0]),
                "sample": sampler("The subject walks along a sunny beach, the camera follows.", ["empty", 0], ["subject", 0]),
            },
            {**decoded(), **save_video()},
        ),
    ),
    Workflow(
        "Two Subjects",
        "Say in the prompt which is where. More than two tend to melt into one.",
        (
            {**load(vit=VIT), "empty": empty()},
            {**picture("first"), **picture("second")},
            {
                "subject": subject(image_0=["first", 0], image_1=["second", 0]),
                "sample": sampler("The two subjects sit side by side on a bench.", ["empty", 0], ["subject", 0]),
            },
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
        "The video is seen at 12 frames a second; one longer than six seconds is thinned to 69 frames, spread over all of it.",
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
            load(vit=VIT),
            {**picture("first"), **picture("second")},
            {"ask": ask("What differs between the two images?", image_0=["first", 0], image_1=["second", 0])},
            show(),
        ),
    ),
    Workflow(
        "Caption, then Redraw",
        "Lance describes a picture and draws it anew from the words alone.",
        (
            {**load(vit=VIT), **picture()},
            {"ask": ask("", image_0=["picture", 0]), "empty": empty()},
            {"sample": sampler(["ask", 0], ["empty", 0])},
            {**decoded(), "save": save_image(), **show()},
        ),
    ),
    Workflow(
        "Enhance a Prompt",
        "Lance rewrites a short prompt as the long, literal one that it draws best from. The node shows both.",
        (
            {**load(), "empty": empty()},
            {"enhance": enhance("a fox in the snow"), **show("enhance")},
            {"sample": sampler(["enhance", 0], ["empty", 0])},
            {**decoded(), "save": save_image()},
        ),
    ),
    Workflow(
        "Grid of Seeds and Settings",
        "Each row is one cfg, each column one seed: seed, seed + 1, ... of the batch. Change any sampler to compare others.",
        grid(2.0, 4.0, 6.0),
        {**NARROW, "BatchImagesNode": [270, 110], "SaveImage": [290, 270]},
    ),
    Workflow(
        "Classic KSampler",
        "Lance among ComfyUI's own nodes. 25 steps with scheduler 'simple' are Lance's exact schedule; keep cfg at 4.",
        classic(),
    ),
    Workflow(
        "Try Lance Nano",
        "Runs at once, without any download. Nano is a tiny Lance that knows plain shapes and colours, at 96 x 96: circles, "
        "squares, triangles, stars. Try *three yellow triangles on a black background*.",
        (
            {**load(NANO), "empty": empty()},
            {"sample": sampler(STAR, ["empty", 0])},
            {**decoded(), "save": save_image()},
        ),
    ),
    Workflow(
        "Try Lance Nano, Edit and Ask",
        "Without any download: Nano draws a star, makes it blue, and says what it sees. The slider of Compare Images needs "
        "Nodes 2.0 (in the menu of the logo).",
        (
            {**load(NANO), "empty": empty()},
            {"sample": sampler(STAR, ["empty", 0]), **decoded()},
            {
                "edit": edit(image_0=["decode", 0]),
                "sample2": sampler("make the star blue", ["edit", 1], ["edit", 0]),
            },
            {
                **decoded("decode2", "sample2"),
                "save": save_image("decode2"),
                "compare": compared("decode", "decode2"),
            },
            {"ask": ask("What color is the star?", image_0=["decode2", 0]), **show()},
        ),
        NARROW,
    ),
)
