"""What nodes write into themselves while they run, and inputs that grow, in both of the page's renderers.

The pack's only script shows a node's text again where its result is still there and the node need not run.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
from comfy_browser import graph_errors, load_workflow, looking, open_ui, queue_and_wait, screenshot
from comfy_server import ComfyServer
from graphs import node
from single_files import example_media, template_models
from test_workflows import kept, small
from workflow_definitions import WORKFLOWS
from workflow_nodes import edit, enhance, load, picture

pytestmark = pytest.mark.comfy
ROOT = Path(__file__).parents[1]
RENDERERS = {"classic": 1, "nodes2": 2}  # seeds: what was run before is not run again
# Each text that comes for a node, and each that stands in it, with whether a person can see it: somewhere on the page.
WATCH = """() => {
    window.written = {};
    const listening = "sent" in window;
    window.sent = {};
    if (!listening) app.api.addEventListener("progress_text", ({detail}) => {
        const texts = (sent[app.graph.getNodeById(detail.nodeId)?.type] ??= []);
        if (texts.at(-1) !== detail.text) texts.push(detail.text); // the last one is written once more when the run has ended
    });
    const letters = (text) => text.replace(/[^\\\\p{L}\\\\p{N}]/gu, "");
    window.watch = setInterval(() => {
        for (const node of app.graph._nodes) {
            const text = node.widgets?.find(({name}) => name === "$$node-text-preview")?.value;
            if (!text) continue;
            const places = document.querySelectorAll(`[data-node-id="${node.id}"], .dom-widget`);
            const shown = [...places].some((place) => letters(place.innerText).includes(letters(text)));
            const texts = (written[node.type] ??= []);
            if (texts.at(-1)?.[0] !== text) texts.push([text, shown]);
            else texts.at(-1)[1] ||= shown;
        }
    }, 4);
}"""
# What stands in each node that has a text, by type.
STANDING = """() => Object.fromEntries(app.graph._nodes
    .map(({type, widgets}) => [type, widgets?.find(({name}) => name === "$$node-text-preview")?.value])
    .filter(([, text]) => text))"""
GROW = """async ({pictures}) => {
    app.graph.clear();
    const ask = LiteGraph.createNode("LanceNativeAsk"), names = [];
    ask.pos = [600, 200];
    app.graph.add(ask);
    const images = () => ask.inputs.map(({name}) => name).filter((name) => name.startsWith("images."));
    const settled = () => new Promise((resolve) => setTimeout(resolve, 300));
    names.push(images());
    for (let index = 0; index < pictures; index++) {
        const source = LiteGraph.createNode("LoadImage");
        source.pos = [100, 100 + 400 * index];
        app.graph.add(source);
        source.connect(0, ask, ask.inputs.findIndex(({name}) => name === `images.image_${index}`));
        await settled();
        names.push(images());
    }
    const {output} = await app.graphToPrompt();
    return {names, sent: Object.keys(output[ask.id].inputs).filter((name) => name.startsWith("images")),
        shown: document.querySelector(`[data-node-id="${ask.id}"]`)?.innerText ?? null};
}"""
ASK_IN_A_BOX = """(question) => {
    const [box] = app.graph._nodes, ask = box.subgraph.nodes.find(({type}) => type === "LanceNativeAsk");
    const set = (node, name, value) => { node.widgets.find((widget) => widget.name === name).value = value; };
    box.widgets.find(({name, label}) => [name, label].includes("question")).value = question;
    set(ask, "resolution", "image_256res");
    set(ask, "max_length", 12);
    const picture = LiteGraph.createNode("LoadImage");
    app.graph.add(picture);
    picture.pos = [-400, 80];
    set(picture, "image", "example.png");
    picture.connect(0, box, 0);
}"""
OPEN_BOX = """() => {
    const box = app.graph._nodes.find((node) => node.isSubgraphNode?.());
    app.canvas.openSubgraph(box.subgraph, box);
}"""
ON_SCREEN = STANDING.replace("app.graph.", "app.canvas.graph.")
SHOWN_PICTURE = """() => {
    const node = app.graph._nodes.find(({type}) => type === "LanceNativeContextInspector");
    const picture = document.querySelector(`[data-node-id="${node.id}"] img`) ?? node.imgs?.[0];
    return picture ? [picture.naturalWidth, picture.naturalHeight] : null;
}"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    from comfy_fixtures import require_comfyui

    require_comfyui()
    folder = tmp_path_factory.mktemp("front_end")
    with ComfyServer(template_models(folder)) as running:
        for media in example_media(folder):
            running.upload_image(media)
        yield running


@pytest.fixture(params=RENDERERS, scope="module")
def renderer(request, server):
    """A page of each renderer, its seed, and what it complains about."""
    console = []
    with looking(server, request.param), open_ui(server, console=console) as page:
        yield page, RENDERERS[request.param], console


@pytest.fixture
def opened(renderer):
    """The page and its seed; nothing that a test does there makes the page complain."""
    page, seed, console = renderer
    yield page, seed
    page.evaluate("() => clearInterval(window.watch)")
    assert graph_errors(page) == []
    assert console == []


def template(name, seed, **settings):
    """A workflow at a size for a CPU, never run before."""
    graph = small(next(copy.deepcopy(workflow.graph) for workflow in WORKFLOWS if workflow.name == name))
    for part in graph.values():
        part["inputs"].update({key: value for key, value in {"seed": seed, **settings}.items() if key in part["inputs"]})
    return graph


def run(page, graph, picture_name):
    """What stood in the nodes, by type, in order: texts, and whether each was on the page; and all that was sent for them."""
    load_workflow(page, graph)
    page.evaluate("() => app.graph.arrange(50)")
    page.evaluate(WATCH)
    queue_and_wait(page)
    page.wait_for_timeout(500)
    screenshot(page, kept(picture_name))
    written, sent = page.evaluate("() => [window.written, window.sent]")
    # Newer pages take texts away when a run has ended.
    assert page.evaluate(STANDING) == {name: texts[-1][0] for name, texts in written.items()}
    return written, sent


def test_an_answer_streams_into_its_node(opened):
    page, seed = opened
    question = f"What is in picture {seed}?"
    graph = template("Ask about an Image", seed, question=question, max_length=300)
    written, sent = run(page, graph, f"streamed {seed}.png")
    texts = [text for text, _ in written["LanceNativeAsk"]]
    assert len(sent["LanceNativeAsk"]) >= 20
    assert len(texts) >= 3  # a busy page draws some of them together
    assert [len(text) for text in texts] == sorted(len(text) for text in texts)
    assert written["LanceNativeAsk"][-1][1]


def test_size_and_steps_are_written_into_their_nodes(opened):
    page, seed = opened
    sizes = {"width": 96 + 16 * seed, "steps": 12}
    written, sent = run(page, template("Text to Image", seed, **sizes), f"stepped {seed}.png")
    width = sizes["width"]
    assert written["LanceNativeEmptyLatent"] == [[f"{width} x 64, 1 picture, {width // 4} tokens", True]]
    steps = [text for text, shown in written["LanceNativeSampler"] if shown]
    assert re.fullmatch(r"12 steps, [\d.e-]+ s each, guidance in \d+", steps[-1])
    first, *others = sent["LanceNativeSampler"]
    assert re.fullmatch(r"reading \d+ tokens, then 12 steps", first)
    assert [text.split(",")[0] for text in others] == [*(f"step {step} of 12" for step in range(1, 12)), "12 steps"]
    assert others[0].endswith("guidance on")


def test_both_prompts_are_written_into_the_node(opened):
    page, seed = opened
    graph = {**load(), "enhance": enhance(f"a fox in the snow {seed}")}
    graph["enhance"]["inputs"]["max_length"] = 12
    graph["show"] = node("PreviewAny", source=["enhance", 0])
    written, _ = run(page, graph, f"enhanced {seed}.png")
    text, shown = written["LanceNativeEnhancePrompt"][-1]
    assert text.startswith(f"a fox in the snow {seed}\n\u2192 ")
    assert shown


def test_the_inspector_shows_its_picture_in_the_node(opened):
    page, seed = opened
    source = {"clip": ["load", 1], "context": ["edit", 0], "latent": ["edit", 1], "prompt": f"Make it night {seed}."}
    graph = {**load(), **picture(), "edit": edit(image_0=["picture", 0])}
    graph["edit"]["inputs"]["resolution"] = "image_256res"
    graph["look"] = node("LanceNativeContextInspector", **source)
    run(page, graph, f"inspected {seed}.png")
    width, height = page.wait_for_function(SHOWN_PICTURE, timeout=20_000).json_value()
    assert width > 900
    assert height > 300


def test_picture_inputs_grow_with_their_links(opened):
    page, _ = opened
    grown = page.evaluate(GROW, {"pictures": 3})
    assert [len(names) for names in grown["names"]] == [1, 2, 3, 4]
    assert sorted(grown["sent"]) == ["images.image_0", "images.image_1", "images.image_2"]
    if grown["shown"] is not None:
        assert "image_3" in grown["shown"]


def test_an_answer_is_there_again_when_the_node_need_not_run(opened):
    page, seed = opened
    graph = template("Ask about an Image", seed, question=f"What stays of picture {seed}?", max_length=12)
    before, _ = run(page, graph, f"asked {seed}.png")
    again, sent = run(page, graph, f"asked again {seed}.png")
    assert again["LanceNativeAsk"][-1] == before["LanceNativeAsk"][-1]
    assert again["LanceNativeAsk"][-1][1]
    assert len(sent["LanceNativeAsk"]) == 1  # it did not run


def test_texts_are_there_again_after_another_workflow_and_after_undo(opened):
    page, seed = opened
    graph = template("Caption, then Redraw", seed, question=f"What comes back of picture {seed}?", max_length=12, steps=3)
    written, _ = run(page, graph, f"asked before {seed}.png")
    expected = {name: written[f"LanceNative{name}"][-1][0] for name in ("Ask", "Sampler", "EmptyLatent")}
    for commands in (("Comfy.NewBlankWorkflow", "Workspace.PreviousOpenedWorkflow"), ("Comfy.Undo",)):
        for command in commands:
            page.evaluate("(command) => app.extensionManager.command.execute(command)", command)
        stand = f"([name, text]) => ({STANDING})()[`LanceNative${{name}}`] === text"
        for item in expected.items():
            page.wait_for_function(stand, arg=list(item), timeout=10_000)


def need_page(page, lack):
    version = page.evaluate("() => __COMFYUI_FRONTEND_VERSION__")
    if [int(part) for part in version.split(".")[:2]] < [1, 57]:
        pytest.skip(f"the page {version} {lack}")


def test_a_box_shows_what_its_node_writes(opened):
    page, seed = opened
    need_page(page, "does not look for nodes inside a box")
    load_workflow(page, json.loads((ROOT / "subgraphs" / "Lance Ask Image.json").read_text("utf-8")))
    page.evaluate(ASK_IN_A_BOX, f"What is in box {seed}?")
    queue_and_wait(page)
    page.wait_for_timeout(500)
    ((_, answer),) = page.evaluate(STANDING).items()
    screenshot(page, kept(f"box {seed}.png"))
    page.evaluate(OPEN_BOX)
    page.wait_for_function(f"(text) => ({ON_SCREEN})().LanceNativeAsk === text", arg=answer, timeout=10_000)
    screenshot(page, kept(f"box opened {seed}.png"))


def test_a_box_of_questions_can_be_unpacked(opened):
    page, seed = opened
    need_page(page, "loses a link behind a picture input that has grown")
    load_workflow(page, json.loads((ROOT / "subgraphs" / "Lance Ask Image.json").read_text("utf-8")))
    page.evaluate(ASK_IN_A_BOX, f"What comes out of box {seed}?")
    page.evaluate("() => app.canvas.selectItems(app.graph._nodes.filter((node) => node.isSubgraphNode?.()))")
    page.evaluate("() => app.extensionManager.command.execute('Comfy.Graph.UnpackSubgraph')")
    page.wait_for_function("() => app.graph._nodes.length === 4")
    sent = page.evaluate("async () => Object.values((await app.graphToPrompt()).output)")
    (ask,) = (node["inputs"] for node in sent if node["class_type"] == "LanceNativeAsk")
    (words,) = (node["inputs"] for node in sent if node["class_type"] == "PrimitiveStringMultiline")
    assert words["value"] == f"What comes out of box {seed}?"
    assert (type(ask["question"]), ask["resolution"], ask["max_length"]) == (list, "image_256res", 12)
    queue_and_wait(page)
    screenshot(page, kept(f"unpacked {seed}.png"))


def test_the_page_loads_one_script_of_ours(server):
    assert [path.rpartition("/")[2] for path in server.get("/extensions") if "lance" in path.lower()] == ["kept_texts.js"]
