"""Every workflow with nothing changed but model_name to Nano: no error, and results of Nano's own size."""

from __future__ import annotations

import copy
import json
import re

import av
import numpy as np
import pytest
from comfy_browser import graph_errors, load_workflow, open_ui, queue_and_wait
from comfy_server import ComfyServer
from nano.gates import COLOUR, DRAWS, EDITS, gated
from nano.score import same_scene, seen
from nano.world import BIG, FRAMES, PLACES, SIDE, Scene, Thing
from single_files import example_media
from test_workflows import NAMES, OF_NANO, template
from workflow_definitions import WORKFLOWS
from workflow_nodes import NANO

pytestmark = pytest.mark.comfy
BLUE_STAR = Scene((Thing("star", "blue", BIG, *PLACES["middle"]),), "pink")
# ComfyUI's node makes the cells of a grid as large as they are asked for.
SIZES = {"Grid of Seeds and Settings": (3 * 512 + 2 * 8,) * 2}
# What a person does: the one combo, in the page. The folder of models is empty, so all other names stay unknown.
CHOOSE = """(name) => {
    for (const node of app.graph._nodes.filter(({type}) => type === "LanceNativeLoader"))
        node.widgets.find((widget) => widget.name === "model_name").value = name;
}"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """ComfyUI without any model file."""
    from comfy_fixtures import require_comfyui

    require_comfyui()
    folder = tmp_path_factory.mktemp("nano")
    with ComfyServer() as running:
        for media in example_media(folder):
            running.upload_image(media)
        yield running


def switched(workflow):
    graph = copy.deepcopy(workflow.graph)
    graph["load"]["inputs"]["model_name"] = NANO
    return graph


def frames_of(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=NAMES)
def test_runs_with_nano(workflow, server):
    result = server.run(switched(workflow))
    if "save" not in workflow.graph:
        assert result.outputs["show"]["text"][0].strip()
        return
    path = result.path("save")
    if path.suffix == ".mp4":
        made = frames_of(path)
        assert made.shape[1:] == (SIDE, SIDE, 3)
        assert len(made) == FRAMES
    else:
        assert result.image("save").size == SIZES.get(workflow.name, (SIDE, SIDE))


@gated(DRAWS, EDITS, COLOUR)
def test_draw_edit_and_ask(server):
    """The star turns blue, and Nano says so."""
    result = server.run(next(workflow.graph for workflow in OF_NANO if "Ask" in workflow.name))
    assert same_scene(seen(np.asarray(result.image("save").convert("RGB"))), BLUE_STAR)
    assert result.outputs["show"]["text"] == ["blue"]


def test_from_the_page(server):
    """Templates as saved, in the page, with Nano chosen in the combo: they run.

    The loader alone keeps its red outline: the page still misses the other files that the template names.
    """
    with open_ui(server) as page:
        for name in ("Text to Image", "Edit an Image", "Try Lance Nano, Edit and Ask"):
            load_workflow(page, json.loads(json.dumps(template(name))))
            page.evaluate(CHOOSE, NANO)
            queue_and_wait(page, 300)
            outlined = re.compile(r"missing model|drawn with an error: \d+ \(LanceNativeLoader\)")
            complaints = [text for text in graph_errors(page) if not outlined.search(text)]
            assert complaints == [], name
