"""The harness itself: ComfyUI starts, runs graphs over HTTP and in the browser, and its failures reach the test."""

from __future__ import annotations

from pathlib import Path

import pytest
from comfy_browser import graph_errors, load_workflow, open_ui, queue_and_wait, screenshot
from comfy_server import ComfyServer, PromptRejectedError
from PIL import Image

pytestmark = pytest.mark.comfy

WIDTH, HEIGHT = 96, 64


def image_graph(color: int = 0x336699) -> dict[str, dict]:
    empty = {"width": WIDTH, "height": HEIGHT, "batch_size": 1, "color": color}
    return {
        "1": {"class_type": "EmptyImage", "inputs": empty},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "harness"}},
    }


def interface_graph(node_type: str, values: list[str]) -> dict:
    node = {"id": 7, "type": node_type, "pos": [100, 100], "size": [300, 100], "flags": {}, "order": 0, "mode": 0}
    return {"last_node_id": 7, "last_link_id": 0, "nodes": [node | {"widgets_values": values}], "links": [], "version": 0.4}


def test_core_nodes_are_there(comfy_server: ComfyServer) -> None:
    assert "KSampler" in comfy_server.object_info()
    assert "seed" in comfy_server.object_info("KSampler")["input"]["required"]


def test_a_graph_runs_over_http(comfy_server: ComfyServer) -> None:
    result = comfy_server.run(image_graph())
    assert result.image("2").size == (WIDTH, HEIGHT)
    assert result.image("2").getpixel((0, 0)) == (0x33, 0x66, 0x99)
    assert result.path("2").parent == comfy_server.base / "output"
    assert comfy_server.history(result.prompt_id)[result.prompt_id]["status"]["status_str"] == "success"


def test_an_uploaded_image_and_a_saved_latent_come_back(comfy_server: ComfyServer, tmp_path: Path) -> None:
    Image.new("RGB", (32, 48), "red").save(tmp_path / "red.png")
    name = comfy_server.upload_image(tmp_path / "red.png")
    graph = {
        "1": {"class_type": "LoadImage", "inputs": {"image": name}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
        "3": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "4": {"class_type": "SaveLatent", "inputs": {"samples": ["3", 0], "filename_prefix": "harness"}},
    }
    result = comfy_server.run(graph)
    assert result.image("2").size == (32, 48)
    assert result.path("4").suffix == ".latent"


def test_a_refused_graph_says_why(comfy_server: ComfyServer) -> None:
    graph = image_graph()
    graph["1"]["inputs"]["width"] = -1
    with pytest.raises(PromptRejectedError, match="width"):
        comfy_server.run(graph)


def test_an_error_while_running_reaches_the_test(comfy_server: ComfyServer, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"not an image")
    graph = image_graph()
    graph["1"] = {"class_type": "LoadImage", "inputs": {"image": comfy_server.upload_image(tmp_path / "broken.png")}}
    with pytest.raises(AssertionError, match="node 1: cannot identify image file"):
        comfy_server.run(graph)
    result = comfy_server.run(graph, check=False)
    assert result.error["node_type"] == "LoadImage"
    assert not result.outputs


def test_a_comfyui_that_cannot_start_shows_its_log() -> None:
    with pytest.raises(RuntimeError, match="unrecognized arguments: --no-such-option"), ComfyServer({}, ["--no-such-option"]):
        pass


def test_the_interface_runs_a_graph(comfy_server: ComfyServer, tmp_path: Path) -> None:
    with open_ui(comfy_server) as page:
        load_workflow(page, image_graph(0x993366))
        done = queue_and_wait(page)
        assert graph_errors(page) == []
        assert screenshot(page, tmp_path / "interface.png").stat().st_size > 10_000
    outputs = comfy_server.history(done["prompt_id"])[done["prompt_id"]]["outputs"]
    assert outputs["2"]["images"][0]["filename"].startswith("harness")


def test_the_interface_shows_an_unknown_node(comfy_server: ComfyServer) -> None:
    with open_ui(comfy_server) as page:
        load_workflow(page, interface_graph("NoSuchNode", []))
        assert graph_errors(page) == ["missing node type: 7 (NoSuchNode)"]
        with pytest.raises(AssertionError, match="rejected"):
            queue_and_wait(page)


def test_the_interface_shows_a_missing_model(comfy_server: ComfyServer) -> None:
    with open_ui(comfy_server) as page:
        load_workflow(page, interface_graph("UNETLoader", ["nothing.safetensors", "default"]))
        assert "missing model: nothing.safetensors of 7 (UNETLoader)" in graph_errors(page)
