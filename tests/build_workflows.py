"""Builds ``workflows/``, ``subgraphs/`` and ``tests/workflows/`` with the real ComfyUI and its web page.

Run: ``python tests/build_workflows.py [NAME ...]`` with COMFYUI_PATH set (or comfy-cli's default workspace) and Chromium
installed. Without names, all of them.
"""

from __future__ import annotations

import json
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
sys.path.append(str(HERE.parent))

from comfy_browser import load_workflow, open_ui, screenshot  # noqa: E402
from comfy_server import ComfyServer  # noqa: E402
from single_files import example_media, template_models  # noqa: E402
from workflow_definitions import WORKFLOWS, Workflow  # noqa: E402

HUB = "https://huggingface.co/bytedance-research/Lance/resolve/main"
WAN = "https://huggingface.co/Comfy-Org/Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files/vae/wan2.2_vae.safetensors"
URLS = {
    "Lance_3B.safetensors": (f"{HUB}/Lance_3B/model.safetensors", "diffusion_models"),
    "Lance_3B_Video.safetensors": (f"{HUB}/Lance_3B_Video/model.safetensors", "diffusion_models"),
    "qwen2.5_vl_vit.safetensors": (f"{HUB}/Qwen2.5-VL-ViT/vit.safetensors", "text_encoders"),
    "wan2.2_vae.safetensors": (WAN, "vae"),  # not the hub's .pth: Desktop downloads safetensors alone
}
VERSION = "0.1.0"
NUMBERS_EACH = 100  # for the nodes of a template
GAP, TOP, ROW_GAP, NOTE_HEIGHT = 40, 80, 50, 120
# Sizes of their own, [width, height]: texts need room, and no node shall be wider than its longest label.
SIZES = {
    "LanceNativeSampler": [380, 520],
    "LanceNativeLoader": [345, 200],
    "CLIPTextEncode": [380, 180],
    "LanceNativeAsk": [380, 380],
    "LanceNativeEnhancePrompt": [380, 300],
    "LanceNativeEmptyLatent": [345, 240],
    "LanceNativeEdit": [280, 150],
    "LanceNativeSubject": [280, 150],
    "LanceNativeVideoStart": [280, 190],
    "LanceNativeVAEEncode": [280, 150],
    "VAEDecode": [200, 50],
    "LoadImage": [300, 320],
    "LoadVideo": [300, 320],
    "PreviewAny": [320, 160],
    "SaveImage": [340, 380],
    "SaveVideo": [340, 380],
    "ImageCompare": [340, 350],
    "PrimitiveStringMultiline": [290, 130],
    "GetVideoComponents": [280, 90],
    "SetLatentNoiseMask": [280, 50],
}
# What a node needs below its title in Nodes 2.0, where that is more: widgets are taller there, and a button shows the rest.
# And what it grows to when it runs: some write below their widgets, a sampler shows its picture there too.
TALL = {
    "LanceNativeSampler": 740,
    "LanceNativeAsk": 460,
    "LanceNativeEnhancePrompt": 380,
    "LanceNativeLoader": 250,
    "LanceNativeEmptyLatent": 390,
    "LanceNativeEdit": 220,
    "LanceNativeSubject": 210,
    "LanceNativeVideoStart": 240,
    "LanceNativeVAEEncode": 220,
    "LanceNativeGuidance": 210,
    "LoadImage": 350,
    "CreateVideo": 140,
    "GetVideoComponents": 120,
    "VAEDecode": 75,
    "BatchImagesNode": 150,
    "RebatchImages": 85,
    "ImageGrid": 165,
    "SetLatentNoiseMask": 75,
    "KSampler": 320,
}
ONLY_THE_GRAPH = """
body * { visibility: hidden }
#graph-canvas, .dom-widget, .dom-widget * { visibility: visible }
"""
ARRANGE = """({columns, sizes, tall, gap, rowGap, top, note}) => {
    const nodes = [...app.graph._nodes], byType = (type) => nodes.filter((node) => node.type === type);
    const taken = new Set(), place = (type) => byType(type).find((node) => !taken.has(node.id));
    const memo = LiteGraph.createNode("MarkdownNote");
    memo.pos = [40, top]; memo.size = [sizes.LanceNativeLoader[0], note.height]; memo.title = note.title;
    app.graph.add(memo);
    // Only now: on its way in, the widget takes what the page remembers of the last graph's note.
    memo.widgets[0].value = note.text;
    const title = LiteGraph.NODE_TITLE_HEIGHT;
    let x = 40, below = top + note.height + rowGap + title;
    for (const column of columns) {
        let y = below, width = 0;
        below = top;
        for (const type of column) {
            const node = place(type);
            taken.add(node.id);
            if (sizes[type]) node.setSize([...sizes[type]]);
            // Behind a link the page keeps a text of the graph before.
            for (const {widget} of node.inputs.filter(({widget, link, type}) => widget && link != null && type === "STRING"))
                node.widgets.find(({name}) => name === widget.name).value = "";
            node.pos = [x, y];
            y += Math.max(node.size[1], tall[type] ?? 0) + rowGap + title; width = Math.max(width, node.size[0]);
        }
        x += width + gap;
    }
    const box = app.graph._nodes.reduce((edge, node) => [Math.max(edge[0], node.pos[0] + node.size[0]),
        Math.max(edge[1], node.pos[1] + node.size[1])], [0, 0]);
    const scale = Math.min(1400 / (box[0] + 40), 850 / (box[1] + 40), 1);
    app.canvas.ds.scale = scale;
    app.canvas.ds.offset = [0, 0];
    app.canvas.setDirty(true, true);
    return JSON.stringify(app.graph.serialize()); // which leaves out what is undefined: None to Python, which makes it null
}"""


# Blueprints: the templates of the nine tasks as one box each, named for people.
BLUEPRINTS = {
    "Text to Image": "Lance Text to Image",
    "Text to Video": "Lance Text to Video",
    "Image to Video": "Lance Image to Video",
    "Edit an Image": "Lance Edit Image",
    "Edit a Video": "Lance Edit Video",
    "Subject in a New Scene": "Lance Subject Image",
    "Subject in a Video": "Lance Subject Video",
    "Ask about an Image": "Lance Ask Image",
    "Ask about a Video": "Lance Ask Video",
}
# What stays outside of the box, and the widgets that the box shows.
OUTSIDE = ["LoadImage", "LoadVideo", "SaveImage", "SaveVideo", "PreviewAny", "MarkdownNote"]
PROMOTED = [
    ["LanceNativeSampler", "prompt"],
    ["PrimitiveStringMultiline", "value", "question"],
    ["LanceNativeEmptyLatent", "size"],
    ["LanceNativeEmptyLatent", "frames"],
    ["LanceNativeEmptyLatent", "batch_size"],
    ["LanceNativeEdit", "batch_size"],
    ["LanceNativeSampler", "seed"],
    ["LanceNativeSampler", "steps"],
    ["LanceNativeSampler", "cfg"],
    ["LanceNativeLoader", "model_name"],
    ["LanceNativeLoader", "vae_name"],
]
CONVERT = """({outside, promoted, name, description}) => {
    // Unpacked, a box sets its values by the number of the slot, and Ask has one picture less then: words come from a node.
    const ask = app.graph._nodes.find(({type}) => type === "LanceNativeAsk");
    if (ask) {
        const words = LiteGraph.createNode("PrimitiveStringMultiline");
        words.title = "Question";
        words.pos = [40, ask.pos[1]];
        words.setSize([345, 130]);
        words.widgets[0].value = ask.widgets.find(({name}) => name === "question").value;
        app.graph.add(words);
        words.connect(0, ask, ask.inputs.findIndex(({name}) => name === "question"));
    }
    const inner = app.graph._nodes.filter((node) => !outside.includes(node.type));
    const {subgraph, node} = app.graph.convertToSubgraph(new Set(inner));
    subgraph.name = node.title = name;
    for (const [type, widget, label] of promoted) {
        const free = (input) => input.widget?.name === widget && input.link == null;
        const target = subgraph._nodes.find((one) => one.type === type && one.inputs.some(free));
        if (!target) continue;
        const slot = target.inputs.find(free);
        subgraph.addInput(label ?? widget, slot.type).connect(slot, target);
    }
    node.pos = [80, 80];
    node.setSize([420, 360]);
    const graph = app.graph.serialize();
    Object.assign(graph.definitions.subgraphs[0], {category: "Lance", description});
    return JSON.stringify({...graph, links: [], nodes: graph.nodes.filter((one) => one.id === node.id)});
}"""


def blueprint(page: Any, workflow: Workflow) -> dict[str, Any]:
    """A template as one box, without the nodes that load and save."""
    arranged(page, workflow)
    named = workflow.graph["load"]["inputs"]["vit_name"] != "auto"
    promoted = [*PROMOTED, ["LanceNativeLoader", "vit_name"]] if named else PROMOTED
    video = any(node["class_type"] == "SaveVideo" for node in workflow.graph.values())
    promoted = [one for one in promoted if one[1] != ("batch_size" if video else "frames")]
    arguments = {"outside": OUTSIDE, "promoted": promoted, "name": BLUEPRINTS[workflow.name], "description": workflow.note}
    graph = json.loads(page.evaluate(CONVERT, arguments))
    for node in graph["nodes"]:
        for slot in (*node["inputs"], *node["outputs"]):
            slot.update({"link": None} if "link" in slot else {"links": []})
    for node in graph["definitions"]["subgraphs"][0]["nodes"]:
        _describe(node)
    return numbered({**graph, "extra": {}}, workflow)


def numbered(graph: dict[str, Any], workflow: Workflow) -> dict[str, Any]:
    """The same graph with numbers for nodes that no other template has.

    What comes for a node while it runs, the page writes into the node of that number in whatever workflow is on screen.
    """
    inner = graph.get("definitions", {}).get("subgraphs", [])
    nodes = [node for part in (graph, *inner) for node in part["nodes"]]
    first = NUMBERS_EACH * (1 + WORKFLOWS.index(workflow))
    ids = {node["id"]: number for number, node in enumerate(nodes, first)}
    texts = {str(one): str(number) for one, number in ids.items()}
    for node in nodes:
        node["id"] = ids[node["id"]]
        if shown := node["properties"].get("proxyWidgets"):
            node["properties"]["proxyWidgets"] = [[texts[one], *rest] for one, *rest in shown]
    for link in graph["links"]:
        link[1], link[3] = ids[link[1]], ids[link[3]]
    for link in (link for part in inner for link in part["links"]):
        link.update({end: ids.get(link[end], link[end]) for end in ("origin_id", "target_id")})
    graph["last_node_id"] = max(ids.values())
    for part in inner:
        part["state"]["lastNodeId"] = graph["last_node_id"]
    return graph


def arranged(page: Any, workflow: Workflow) -> dict[str, Any]:
    """The graph as the web page itself would save it, laid out in our columns under a note."""
    load_workflow(page, workflow.graph)
    page.wait_for_timeout(400)  # nodes grow around a loaded picture, whatever their size was set to before
    columns = [[node["class_type"] for node in column.values()] for column in workflow.columns]
    note = {"title": workflow.name, "text": workflow.note, "height": NOTE_HEIGHT}
    sizes = {**SIZES, **workflow.sizes}
    places = {"columns": columns, "sizes": sizes, "tall": TALL, "gap": GAP, "rowGap": ROW_GAP, "top": TOP, "note": note}
    return json.loads(page.evaluate(ARRANGE, places))


def ui_format(page: Any, workflow: Workflow) -> dict[str, Any]:
    """The template as it is published."""
    graph = arranged(page, workflow)
    for node in graph["nodes"]:
        _describe(node)
    graph["extra"] = {}
    graph["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, f"lance-native/{workflow.slug}"))
    return numbered(graph, workflow)


def _describe(node: dict[str, Any]) -> None:
    ours = node["type"].startswith("LanceNative")
    node["properties"] |= {"cnr_id": "lance-native" if ours else "comfy-core", "ver": VERSION if ours else "0.26.0"}
    node["properties"].setdefault("Node name for S&R", node["type"])
    values = node.get("widgets_values") or []
    # A fixed seed: opening a template twice shall give the same picture twice.
    node["widgets_values"] = ["fixed" if value == "randomize" else value for value in values]
    if node["type"] == "LanceNativeLoader":
        named = [value for value in values if value in URLS]
        node["properties"]["models"] = [{"name": name, "url": URLS[name][0], "directory": URLS[name][1]} for name in named]


def build(folder: Path, names: list[str]) -> None:
    with ComfyServer(template_models(folder)) as server:
        for media in example_media(folder):
            server.upload_image(media)
        with open_ui(server) as page:
            page.add_style_tag(content=ONLY_THE_GRAPH)
            _write(page, folder, [workflow for workflow in WORKFLOWS if workflow.name in names or not names])


def _write(page: Any, folder: Path, workflows: list[Workflow]) -> None:
    for workflow in workflows:
        graph = ui_format(page, workflow)
        page.wait_for_timeout(800)
        target = HERE.parent / "workflows" / f"{workflow.name}.json"
        target.write_text(json.dumps(graph, indent=1, ensure_ascii=False) + "\n", "utf-8")
        twin = HERE / "workflows" / f"{workflow.slug}.api.json"
        twin.write_text(json.dumps(workflow.graph, indent=1, ensure_ascii=False) + "\n", "utf-8")
        _thumbnail(page, folder / "shot.png", target.with_suffix(".jpg"))
    for workflow in workflows:
        if workflow.name in BLUEPRINTS:
            box = HERE.parent / "subgraphs" / f"{BLUEPRINTS[workflow.name]}.json"
            box.write_text(json.dumps(blueprint(page, workflow), indent=1, ensure_ascii=False) + "\n", "utf-8")


def _thumbnail(page: Any, shot: Path, target: Path) -> None:
    """The graph itself, without the page around it."""
    from PIL import Image

    screenshot(page, shot)
    picture = Image.open(shot).convert("RGB")
    picture.resize((640, round(640 * picture.height / picture.width))).save(target, quality=82)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), sys.argv[1:])
