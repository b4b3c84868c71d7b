"""Draws the pictures of the help pages (``web/docs/images``): a small graph around each node, from the real web page.

Run: ``python tests/build_help.py [NODE_ID ...]`` with COMFYUI_PATH set (or comfy-cli's default workspace) and Chromium
installed, and a font with Chinese letters. Without arguments all pictures are drawn, in English and in Chinese.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
sys.path.append(str(HERE.parent))

from build_workflows import ONLY_THE_GRAPH  # noqa: E402
from comfy_browser import load_workflow, open_ui  # noqa: E402
from comfy_server import ComfyServer  # noqa: E402
from graphs import Graph, custom_sampling, node  # noqa: E402
from PIL import Image  # noqa: E402
from single_files import example_media, template_models  # noqa: E402
from workflow_nodes import (  # noqa: E402
    ask,
    decoded,
    edit,
    empty,
    enhance,
    load,
    picture,
    sampler,
    show,
    subject,
    video_start,
)

IMAGES = HERE.parent / "web" / "docs" / "images"
LANGUAGES = ("en", "zh")
WIDTH, HEIGHT, MARGIN, GAP = 1700, 1000, 16, 50
# The widest that a picture is kept: side panels are narrower than that.
KEPT_WIDTH = 800
FOX = "A red fox sits in deep snow at the edge of a pine forest, looking at the camera. Soft morning light from the left."
RUNS = "The fox runs towards the camera, which glides back."
SEEN = {"source": ["picture", 0], "resolution": "auto"}
GUIDANCE = {"interval_start": 0.4, "interval_end": 1.0, "renorm": "global", "renorm_min": 0.0}
LORA_FILE = "fox_style.safetensors"
STRENGTHS = {"lora_name": LORA_FILE, "strength_model": 1.0, "strength_clip": 1.0}
LORA = node("LanceNativeLoraLoader", model=["load", 0], clip=["load", 1], **STRENGTHS)
CONTEXT = {"clip": ["load", 1], "task": "image_edit", "role": "edit source", "text": "", "system": ""}
BOTH = {"visuals.visual_0": ["vit", 0], "visuals.visual_1": ["vae", 0]}


def prompts() -> Graph:
    return {key: node("CLIPTextEncode", clip=["load", 1], text=text) for key, text in (("positive", FOX), ("negative", ""))}


def conditioning(**context: Any) -> Graph:
    settings = {"prompt": "Make it night.", "negative_prompt": "", "uncond_positions": "cached"}
    return {"conds": node("LanceNativeConditioning", clip=["load", 1], **settings, **context)}


def guider(model: str, **links: list) -> Graph:
    return {"guider": node("CFGGuider", model=[model, 0], cfg=4.0, **links)}


def custom(*keys: str) -> Graph:
    """These nodes of ComfyUI's custom sampling, around our noise and schedule."""
    nodes = custom_sampling(["load", 0], 42, 30, 3.5, 4.0, None)
    return {key: nodes[key] for key in keys}


def encoders() -> Graph:
    return {
        "vit": node("LanceNativeViTEncode", clip=["load", 1], fps=24.0, **SEEN),
        "vae": node("LanceNativeVAEEncode", vae=["load", 2], fps=24.0, **SEEN),
    }


def drawn(latent: list, prompt: Any = FOX, context: list | None = None) -> Graph:
    return {"sample": sampler(prompt, latent, context)}


# Columns of each picture; a link to a node that is not in the picture is left out.
EXAMPLES: dict[str, tuple[Graph, ...]] = {
    "LanceNativeLoader": (load(), prompts()),
    "LanceNativeLoraLoader": (load(), {"lora": LORA}, {"guidance": node("LanceNativeGuidance", model=["lora", 0], **GUIDANCE)}),
    "LanceNativeEmptyLatent": ({"empty": empty("480p 16:9", 49)}, drawn(["empty", 0], RUNS)),
    "LanceNativeVideoStart": (
        {**picture(), "empty": empty("480p 16:9", 49)},
        {"start": video_start(first=["picture", 0])},
        drawn(["start", 0], RUNS),
    ),
    "LanceNativeViTEncode": (picture(), encoders(), {"context": node("LanceNativeContext", **CONTEXT, **BOTH)}),
    "LanceNativeVAEEncode": (
        picture(),
        {
            "vae": encoders()["vae"],
            "ask": ask("Locate the fox, and output its bbox coordinates in JSON.", image_0=["picture", 0]),
        },
        {"masked": node("SetLatentNoiseMask", samples=["vae", 0], mask=["ask", 2])},
    ),
    "LanceNativeContext": (
        encoders(),
        {"context": node("LanceNativeContext", **CONTEXT, **BOTH)},
        {"more": node("LanceNativeContext", **{**CONTEXT, "text": "Now the same at night."}, context=["context", 0])},
    ),
    "LanceNativeEdit": (
        {**picture()},
        {"edit": edit(image_0=["picture", 0])},
        drawn(["edit", 1], "Make it a cold winter evening with falling snow.", ["edit", 0]),
    ),
    "LanceNativeSubject": (
        {**picture(), "empty": empty()},
        {"subject": subject(image_0=["picture", 0])},
        drawn(["empty", 0], "The subject stands on a sunny beach, wide shot.", ["subject", 0]),
    ),
    "LanceNativeConditioning": (
        {"edit": edit()},
        conditioning(context=["edit", 0]),
        guider("load", positive=["conds", 0], negative=["conds", 1]),
    ),
    "LanceNativeGuidance": (
        load(),
        {"guidance": node("LanceNativeGuidance", model=["load", 0], **GUIDANCE)},
        guider("guidance"),
    ),
    "LanceNativeScheduler": (custom("sigmas", "euler"), custom("sample")),
    "LanceNativeNoise": (custom("noise", "sigmas"), custom("sample")),
    "LanceNativeSampler": ({**load(), "empty": empty()}, drawn(["empty", 0]), decoded()),
    "LanceNativeAsk": (picture(), {"ask": ask("What is happening here?", image_0=["picture", 0])}, show()),
    "LanceNativeEnhancePrompt": ({"enhance": enhance("a fox in the snow")}, drawn(["empty", 0], ["enhance", 0])),
    "LanceNativeContextInspector": (
        {"edit": edit()},
        {
            "look": node(
                "LanceNativeContextInspector",
                clip=["load", 1],
                context=["edit", 0],
                latent=["edit", 1],
                prompt="Make it night.",
            )
        },
        {"show": node("PreviewImage", images=["look", 0])},
    ),
}
SIZES = {
    "LanceNativeLoader": [320, 0],
    "LanceNativeLoraLoader": [260, 0],
    "LanceNativeSampler": [340, 470],
    "LanceNativeAsk": [320, 330],
    "LanceNativeEnhancePrompt": [330, 280],
    "LanceNativeContext": [300, 260],
    "LanceNativeConditioning": [300, 260],
    "LanceNativeContextInspector": [300, 170],
    "CLIPTextEncode": [320, 130],
    "LoadImage": [220, 270],
    "PreviewAny": [220, 120],
    "PreviewImage": [200, 90],
    "SamplerCustomAdvanced": [270, 0],
    "SetLatentNoiseMask": [230, 0],
    "VAEDecode": [160, 0],
}
# Widest pictures are read at the width of a side panel: no badges, and nothing but the graph.
SETTINGS = {"Comfy.NodeBadge.NodeSourceBadgeMode": "None", "Comfy.NodeBadge.NodeIdBadgeMode": "None"}
ARRANGE = """({columns, sizes, gap, margin}) => {
    const nodes = [...app.graph._nodes], taken = new Set();
    let x = margin, bottom = 0;
    for (const column of columns) {
        let y = margin + LiteGraph.NODE_TITLE_HEIGHT, width = 0;
        for (const type of column) {
            const node = nodes.find((one) => one.type === type && !taken.has(one));
            taken.add(node);
            const least = node.computeSize(), [wide, high] = sizes[type] ?? [0, 0];
            node.setSize([Math.max(wide, least[0]), Math.max(high, least[1])]);
            const control = node.widgets?.find((widget) => widget.name === "control_after_generate");
            if (control) control.value = "fixed";
            node.pos = [x, y];
            bottom = Math.max(bottom, y + node.size[1]);
            y += node.size[1] + gap + LiteGraph.NODE_TITLE_HEIGHT;
            width = Math.max(width, node.size[0]);
        }
        x += width + gap;
    }
    Object.assign(app.canvas.ds, {scale: 1, offset: [0, 0]});
    app.canvas.setDirty(true, true);
    return [x - gap + margin, bottom + margin];
}"""


def graph_of(name: str) -> Graph:
    """A picture's nodes, without links that lead out of it."""
    nodes = {key: value for column in EXAMPLES[name] for key, value in column.items()}
    return {key: {**value, "inputs": _inside(value["inputs"], nodes)} for key, value in nodes.items()}


def _inside(inputs: dict[str, Any], nodes: Graph) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if not isinstance(value, list) or value[0] in nodes}


def draw(page: Any, name: str, shot: Path, target: Path) -> None:
    load_workflow(page, graph_of(name))
    columns = [[value["class_type"] for value in column.values()] for column in EXAMPLES[name]]
    arguments = {"columns": columns, "sizes": SIZES, "gap": GAP, "margin": MARGIN}
    for _ in range(2):  # nodes grow around a loaded picture, and that moves those below
        page.wait_for_timeout(600)
        width, height = page.evaluate(ARRANGE, arguments)
    page.wait_for_timeout(800)
    page.screenshot(path=shot, clip={"x": 0, "y": 0, "width": width, "height": height})
    with Image.open(shot) as picture:
        size = picture.size if width <= KEPT_WIDTH else (KEPT_WIDTH, round(KEPT_WIDTH * height / width))
        picture.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(target, quality=82, method=6)


def build(names: list[str], folder: Path) -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    models = template_models(folder)
    models[f"loras/{LORA_FILE}"] = next(iter(models.values()))  # only its name is shown
    with ComfyServer(models) as server:
        for media in example_media(folder):
            server.upload_image(media)
        for language in LANGUAGES:
            for setting, value in {**SETTINGS, "Comfy.Locale": language}.items():
                server.post(f"/settings/{setting}", value)
            with open_ui(server, WIDTH, HEIGHT) as page:
                page.add_style_tag(content=ONLY_THE_GRAPH)
                for name in names:
                    draw(page, name, folder / "shot.png", IMAGES / f"{name}.{language}.webp")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        build(sys.argv[1:] or list(EXAMPLES), Path(temporary))
