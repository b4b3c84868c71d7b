"""Drive ComfyUI's real web interface in a headless Chromium (Python playwright, the system's browser)."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from comfy_server import ComfyServer

if TYPE_CHECKING:
    from playwright.sync_api import Page, Route

NO_BROWSER = "no browser for ComfyUI's interface"
READY_SECONDS = 90
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    # Routing below stops the page; this stops the browser's own requests.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
ITS_OWN = "input.link is deprecated"  # what the page (1.58) says of itself when a graph with pictures is loaded
USUAL_LOOK = {"Comfy.VueNodes.Enabled": False, "Comfy.ColorPalette": "dark"}
STORE = """(name) => document.querySelector("#vue-app").__vue_app__.config.globalProperties.$pinia._s.get(name)"""
# The interface opens with an example graph and complains, some time later, about that graph's missing models.
START_BLANK = """
const blank = {last_node_id: 0, last_link_id: 0, nodes: [], links: [], groups: [], version: 0.4};
let app;
Object.defineProperty(window, "app", {get: () => app, set(value) {
    app = value;
    const load = value.loadGraphData.bind(value);
    value.loadGraphData = async (graph, ...rest) => {
        await load(graph ?? blank, ...rest);
        window.startedBlank = true;
    };
}});"""
LOAD = """async ({graph, api}) => {
    if (api) await window.app.loadApiJson(graph, "test");
    else await window.app.loadGraphData(graph, true, true);
}"""
QUEUE = """async (timeout) => {
    const app = window.app, kinds = ["execution_success", "execution_error", "execution_interrupted"];
    const controller = new AbortController();
    const end = new Promise((resolve) => {
        for (const type of kinds)
            app.api.addEventListener(type, ({detail}) => resolve({type, detail}), {signal: controller.signal});
        setTimeout(() => resolve({type: "timeout", detail: {}}), timeout);
    });
    try {
        if (!(await app.queuePrompt(0))) return {type: "rejected", detail: {...app.lastNodeErrors}};
        return await end;
    } finally {
        controller.abort();
    }
}"""
ERRORS = (
    f"""() => {{ const store = {STORE};"""
    + """
    const found = [];
    const visit = (graph, path) => {
        for (const node of graph.nodes) {
            const name = `${path}${node.id} (${node.type})`;
            const inner = node.isSubgraphNode?.() && node.subgraph;
            if (!inner && !(node.type in LiteGraph.registered_node_types)) found.push(`missing node type: ${name}`);
            else if (node.has_errors) found.push(`drawn with an error: ${name}`);
            if (inner) visit(inner, `${path}${node.id}:`);
        }
    };
    visit(app.rootGraph ?? app.graph, "");
    for (const {nodeId, nodeType, name} of store("missingModel").missingModelCandidates ?? [])
        found.push(`missing model: ${name} of ${nodeId} (${nodeType})`);
    for (const {nodeId, nodeType, name} of store("missingMedia").missingMediaCandidates ?? [])
        found.push(`missing file: ${name} of ${nodeId} (${nodeType})`);
    for (const [id, {errors}] of Object.entries(app.lastNodeErrors ?? {}))
        for (const error of errors) found.push(`node ${id}: ${error.message} ${error.details}`);
    return found;
}"""
)


@contextmanager
def open_ui(
    server: ComfyServer, width: int = 1400, height: int = 850, zoom: float = 1, console: list[str] | None = None
) -> Iterator[Page]:
    """A page with ComfyUI's interface ready; the test is skipped when this machine has no browser.

    width, height: of the window, in pixels of the screen. zoom: the browser's own. console: takes the page's warnings and
    errors once it is ready, and before that those that name this pack (the page itself has some then).
    """
    executable = find_chromium()
    if executable is None or importlib.util.find_spec("playwright") is None:
        missing = "playwright is not installed" if executable else "no chromium executable; set CHROMIUM_PATH"
        pytest.skip(f"{NO_BROWSER}: {missing}")
    from playwright.sync_api import sync_playwright  # optional: most tests run without a browser

    server.post("/settings/Comfy.TutorialCompleted", value=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=list(ARGUMENTS))
        window = {"width": round(width / zoom), "height": round(height / zoom)}
        context = browser.new_context(viewport=window, device_scale_factor=zoom, service_workers="block")
        context.route("**/*", _loopback_only)
        context.add_init_script(START_BLANK)
        page = context.new_page()
        if console is not None:
            page.on("console", lambda message: _note(message, console))
            page.on("pageerror", lambda error: console.append(f"uncaught: {error}"))
        page.goto(server.url)
        page.wait_for_function("window.startedBlank", timeout=READY_SECONDS * 1000)
        if console is not None:
            console[:] = [text for text in console if "lance" in text.lower()]
        yield page
        browser.close()


@contextmanager
def looking(server: ComfyServer, renderer: str, theme: str = "dark") -> Iterator[None]:
    """Pages that are opened within have this renderer ("classic" or "nodes2") and theme ("dark" or "light")."""
    wanted = {"Comfy.VueNodes.Enabled": renderer == "nodes2", "Comfy.ColorPalette": theme}
    try:
        for setting, value in wanted.items():
            server.post(f"/settings/{setting}", value)
        yield
    finally:
        for setting, value in USUAL_LOOK.items():
            server.post(f"/settings/{setting}", value)


def find_chromium() -> str | None:
    """The browser's executable: CHROMIUM_PATH, else a chromium on the PATH, else None."""
    return os.environ.get("CHROMIUM_PATH") or next(filter(None, map(shutil.which, BROWSERS)), None)


def load_workflow(page: Page, workflow: Mapping[str, Any]) -> None:
    """Put a workflow on the canvas, in the interface's own format or in the API format."""
    api = "nodes" not in workflow
    page.evaluate(LOAD, {"graph": dict(workflow), "api": api})
    page.wait_for_function("(count) => app.graph.nodes.length === count", arg=len(workflow if api else workflow["nodes"]))


def queue_and_wait(page: Page, timeout: float = 120) -> dict[str, Any]:
    """Press Run, in effect, and wait for the end; AssertionError says why it was not a success."""
    end = page.evaluate(QUEUE, timeout * 1000)
    assert end["type"] == "execution_success", f"{end['type']}: {end['detail']}\n{graph_errors(page)}"
    return end["detail"]


def graph_errors(page: Page) -> list[str]:
    """What the canvas shows as wrong: unknown node types, nodes drawn with errors, inputs that were refused."""
    return page.evaluate(ERRORS)


def screenshot(page: Page, path: Path) -> Path:
    # Nodes grow around their previews when they are drawn, and that takes a second drawing.
    for _ in range(2):
        page.evaluate("app.canvas.setDirty(true, true)")
        page.wait_for_timeout(500)
    page.screenshot(path=path)
    return path


def _note(message: Any, console: list[str]) -> None:
    address = urlsplit(message.location.get("url", ""))
    ours = address.hostname in (None, "127.0.0.1") and not message.text.startswith(ITS_OWN)
    if message.type in ("error", "warning") and ours:
        console.append(f"{message.type}: {message.text} {address.path}")


def _loopback_only(route: Route) -> None:
    address = urlsplit(route.request.url)
    if address.scheme in ("data", "blob") or address.hostname == "127.0.0.1":
        route.continue_()
    else:
        route.abort()
