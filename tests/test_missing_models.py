"""The page's list of missing models, with no model files at all: every template offers its files, each with a button."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from build_workflows import URLS
from comfy_browser import STORE, load_workflow, open_ui, screenshot
from comfy_server import ComfyServer
from workflow_definitions import WORKFLOWS

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.comfy
SHOW_ERRORS = re.compile("See Errors|View details")  # 1.49, 1.58
# The browser's own download would leave the loopback: what a click hands to it is written down instead.
CATCH_CLICKS = """() => {
    window.clicked = [];
    HTMLAnchorElement.prototype.click = function () { window.clicked.push([this.download, this.href]); };
}"""
CANDIDATES = f"""() => {{ const store = {STORE};
    return (store("missingModel").missingModelCandidates ?? []).map(({{name, url, directory}}) => [name, url, directory]);
}}"""


@pytest.fixture(scope="module")
def page():
    from comfy_fixtures import require_comfyui

    require_comfyui()
    # The list is a part of the window's width, and in a narrow one it hides the names.
    with ComfyServer({}) as server, open_ui(server, width=2200, height=1100) as page:
        yield page


def saved(path):
    return json.loads((ROOT / path).read_text("utf-8"))


def named(graph):
    """The files that the loaders of a graph name, in boxes too."""
    boxes = graph.get("definitions", {}).get("subgraphs", [])
    nodes = [*graph["nodes"], *(node for box in boxes for node in box["nodes"])]
    values = [value for node in nodes if node["type"] == "LanceNativeLoader" for value in node["widgets_values"]]
    return sorted(value for value in values if value in URLS)


def offered(page, count):
    page.wait_for_function(f"(count) => ({CANDIDATES})().length === count", arg=count)
    return sorted(page.evaluate(CANDIDATES))


TEMPLATES = [f"workflows/{workflow.name}.json" for workflow in WORKFLOWS]
BOXES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "subgraphs").glob("*.json"))


@pytest.mark.parametrize("path", [*TEMPLATES, *BOXES])
def test_every_missing_file_is_offered(path, page):
    graph = saved(path)
    load_workflow(page, graph)
    names = named(graph)
    assert len(names) in ((0,) if "Nano" in path else (2, 3))
    assert offered(page, len(names)) == [[name, *URLS[name]] for name in names]


def test_the_list_downloads_under_the_names_that_the_graph_uses(page):
    load_workflow(page, saved("workflows/Edit an Image.json"))
    offered(page, 3)
    page.get_by_role("button", name=SHOW_ERRORS).click()
    group = page.get_by_test_id("error-group-missing-model")
    group.get_by_text("Lance_3B.safetensors").wait_for()
    assert re.search(r"Missing Models \(3\)|3\s+Missing Models", group.inner_text())
    (ROOT / "build" / "screenshots").mkdir(parents=True, exist_ok=True)
    screenshot(page, ROOT / "build" / "screenshots" / "missing_models.png")
    page.evaluate(CATCH_CLICKS)
    page.get_by_test_id("missing-model-download-all").click()
    page.wait_for_function("() => window.clicked.length === 3")
    names = ("Lance_3B.safetensors", "qwen2.5_vl_vit.safetensors", "wan2.2_vae.safetensors")
    assert sorted(page.evaluate("() => window.clicked")) == [[name, URLS[name][0]] for name in names]
