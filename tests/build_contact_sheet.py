"""Draws ``docs/workflows.jpg``, a sheet of all templates as the page shows them (Nodes 2.0, dark).

Run: ``python tests/build_contact_sheet.py`` with COMFYUI_PATH set (or comfy-cli's default workspace) and Chromium installed.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
sys.path.append(str(HERE.parent))

from comfy_browser import load_workflow, looking, open_ui  # noqa: E402
from comfy_server import ComfyServer  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402
from single_files import example_media, template_models  # noqa: E402
from workflow_definitions import WORKFLOWS  # noqa: E402

SHEET = HERE.parent / "docs" / "workflows.jpg"
COLUMNS, CELL, TITLE, GAP = 3, (520, 340), 30, 14
BACKGROUND, LETTERS = (24, 24, 27), (225, 225, 230)
ONLY_THE_GRAPH = """
body * { visibility: hidden }
#graph-canvas, .dom-widget, .dom-widget *, [data-node-id], [data-node-id] * { visibility: visible }
[data-node-id] .invisible, [data-node-id] .invisible * { visibility: hidden }
"""
FILL = """([width, height]) => {
    const boxes = app.graph._nodes.map((node) => [...node.getBounding()]);
    const left = Math.min(...boxes.map(([x]) => x)), top = Math.min(...boxes.map(([, y]) => y));
    const right = Math.max(...boxes.map(([x, , wide]) => x + wide));
    const bottom = Math.max(...boxes.map(([, y, , high]) => y + high)) + 40;  // a button below the last one
    const margin = 30, scale = Math.min(width / (right - left + 2 * margin), height / (bottom - top + 2 * margin), 1);
    app.canvas.show_info = false;
    app.canvas.ds.scale = scale;
    app.canvas.ds.offset = [(width / scale - left - right) / 2, (height / scale - top - bottom) / 2];
    app.canvas.setDirty(true, true);
}"""


def shot(page: Any, name: str, target: Path) -> Image.Image:
    load_workflow(page, json.loads((HERE.parent / "workflows" / f"{name}.json").read_text("utf-8")))
    page.wait_for_timeout(1200)  # pictures load, and nodes grow around them
    page.evaluate(FILL, [page.viewport_size["width"], page.viewport_size["height"]])
    page.wait_for_timeout(600)
    page.screenshot(path=target)
    with Image.open(target) as picture:
        return picture.convert("RGB").resize(CELL, Image.Resampling.LANCZOS)


def sheet(cells: dict[str, Image.Image]) -> Image.Image:
    """The cells in rows, each under its name."""
    rows = -(-len(cells) // COLUMNS)
    across, down = CELL[0] + GAP, CELL[1] + TITLE + GAP
    whole = Image.new("RGB", (COLUMNS * across + GAP, rows * down + GAP), BACKGROUND)
    pen, font = ImageDraw.Draw(whole), ImageFont.load_default(18)
    for index, (name, picture) in enumerate(cells.items()):
        x, y = GAP + index % COLUMNS * across, GAP + index // COLUMNS * down
        pen.text((x + 4, y + 3), name, LETTERS, font)
        whole.paste(picture, (x, y + TITLE))
    return whole


def build(folder: Path) -> None:
    with ComfyServer(template_models(folder)) as server:
        for media in example_media(folder):
            server.upload_image(media)
        with looking(server, "nodes2"), open_ui(server, 2 * CELL[0], 2 * CELL[1]) as page:
            page.add_style_tag(content=ONLY_THE_GRAPH)
            cells = {workflow.name: shot(page, workflow.name, folder / "shot.png") for workflow in WORKFLOWS}
    SHEET.parent.mkdir(exist_ok=True)
    sheet(cells).save(SHEET, quality=80, optimize=True, progressive=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        build(Path(temporary))
