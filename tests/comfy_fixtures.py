"""pytest fixtures and hooks for tests that need the real ComfyUI; conftest.py lists this file in `pytest_plugins`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from comfy_browser import NO_BROWSER
from comfy_server import ComfyServer, find_comfyui

NO_COMFYUI = "the real ComfyUI is missing"
ADVICE = {
    NO_COMFYUI: "that need the real ComfyUI were skipped: set COMFYUI_PATH or install it with comfy-cli",
    NO_BROWSER: "of ComfyUI's interface were skipped: install playwright and a chromium, or set CHROMIUM_PATH",
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "comfy: needs the real ComfyUI (COMFYUI_PATH); LANCE_REQUIRE_COMFY=1 forbids skipping")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files, which are those with a ComfyUI, come first: with several processes, the others fill up the end."""
    items.sort(key=lambda item: item.get_closest_marker("comfy") is None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("comfy"):
        require_comfyui()


def require_comfyui() -> Path:
    """The ComfyUI checkout; without one the test is skipped, or fails under LANCE_REQUIRE_COMFY=1."""
    if path := find_comfyui():
        return path
    if os.environ.get("LANCE_REQUIRE_COMFY") == "1":
        pytest.fail(f"{NO_COMFYUI} and LANCE_REQUIRE_COMFY=1", pytrace=False)
    pytest.skip(NO_COMFYUI)


@pytest.fixture(scope="session")
def comfy_models() -> dict[str, Path]:
    """What `comfy_server` finds under models/; conftest.py overrides this with the tiny checkpoint."""
    return {}


@pytest.fixture(scope="session")
def comfy_server(comfy_models: dict[str, Path]) -> Iterator[ComfyServer]:
    """One ComfyUI with this pack for all tests of the session."""
    require_comfyui()
    with ComfyServer(comfy_models) as server:
        yield server


def report_skipped(terminalreporter: pytest.TerminalReporter) -> None:
    """One loud line for each reason that kept tests from the real thing."""
    reasons = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", ())]
    for reason, advice in ADVICE.items():
        if count := sum(reason in text for text in reasons):
            terminalreporter.write_line(f"{count} tests {advice}", red=True, bold=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    report_skipped(terminalreporter)
