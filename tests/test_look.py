"""Every template as a person opens it: in both renderers and themes, at 100 and 125 %; nothing overlaps, all is readable."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from comfy_browser import load_workflow, looking, open_ui
from comfy_server import ComfyServer
from PIL import Image
from single_files import example_media, template_models
from workflow_definitions import WORKFLOWS

pytestmark = pytest.mark.comfy
ROOT = Path(__file__).parents[1]
LOOKS = [("classic", "dark", 1), ("nodes2", "light", 1), ("classic", "light", 1.25), ("nodes2", "dark", 1.25)]
SHEET = ROOT / "docs" / "workflows.jpg"
LARGEST_SHEET = 700_000
# Where every node is on the page, title included: in Nodes 2.0 they are elements, otherwise they are painted.
BOXES = """() => app.graph._nodes.map((node) => {
    const element = document.querySelector(`[data-node-id="${node.id}"]`), {scale, offset} = app.canvas.ds;
    if (element) {
        const {left, top, right, bottom} = element.getBoundingClientRect();
        return [node.type, left, top, right, bottom];
    }
    const [x, y, width, height] = node.getBounding(), corner = app.canvas.canvas.getBoundingClientRect();
    const left = (x + offset[0]) * scale + corner.left, top = (y + offset[1]) * scale + corner.top;
    return [node.type, left, top, left + width * scale, top + height * scale];
})"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    from comfy_fixtures import require_comfyui

    require_comfyui()
    folder = tmp_path_factory.mktemp("look")
    with ComfyServer(template_models(folder)) as running:
        for media in example_media(folder):
            running.upload_image(media)
        yield running


def overlaps(boxes):
    """Pairs of nodes that share more than their outlines."""
    edge = 1
    return [
        (one[0], other[0])
        for index, one in enumerate(boxes)
        for other in boxes[:index]
        if min(one[3], other[3]) - max(one[1], other[1]) > edge and min(one[4], other[4]) - max(one[2], other[2]) > edge
    ]


@pytest.mark.parametrize(("renderer", "theme", "zoom"), LOOKS, ids=str)
def test_every_template_is_whole_and_readable(server, renderer, theme, zoom):
    folder = ROOT / "build" / "screenshots" / f"{renderer} {theme} {round(zoom * 100)}"
    folder.mkdir(parents=True, exist_ok=True)
    console, wrong = [], {}
    with looking(server, renderer, theme), open_ui(server, zoom=zoom, console=console) as page:
        for workflow in WORKFLOWS:
            load_workflow(page, json.loads((ROOT / "workflows" / f"{workflow.name}.json").read_text("utf-8")))
            page.wait_for_timeout(1200)  # pictures load, nodes grow around them, the page fits the graph
            page.screenshot(path=folder / f"{workflow.name}.png")
            boxes, window = page.evaluate(BOXES), page.viewport_size
            outside = [box[0] for box in boxes if box[1] < 0 or box[2] < 0 or box[3] > window["width"]]
            outside += [box[0] for box in boxes if box[4] > window["height"]]
            unlabelled = renderer == "classic" and page.evaluate("() => app.canvas.low_quality")
            if found := [*overlaps(boxes), *outside, *(["no labels at this zoom"] if unlabelled else [])]:
                wrong[workflow.name] = found
    assert wrong == {}
    assert console == []


def test_overlapping_nodes_are_seen():
    loader, note = ["LanceNativeLoader", 40, 250, 385, 480], ["MarkdownNote", 40, 50, 385, 200]
    assert overlaps([loader, note]) == []
    assert overlaps([loader, ["MarkdownNote", 40, 50, 385, 260]]) == [("MarkdownNote", "LanceNativeLoader")]


def test_the_contact_sheet_is_small_and_in_the_readme():
    assert f"docs/{SHEET.name}" in (ROOT / "README.md").read_text("utf-8")
    assert SHEET.stat().st_size < LARGEST_SHEET
    with Image.open(SHEET) as sheet:
        assert sheet.width >= 1200
