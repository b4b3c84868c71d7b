"""The help pages: one a node and language, in step with the live schema, the translations and the errors in the code."""

from __future__ import annotations

import ast
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
from build_help import EXAMPLES, graph_of
from comfy_browser import open_ui
from node_texts import read
from PIL import Image

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "web" / "docs"
HEADINGS = {"en": ["Inputs", "Outputs", "Tips", "What can go wrong"], "zh": ["\u8f93\u5165", "\u8f93\u51fa", "\u63d0\u793a"]}
NODES = sorted(read("en"))
PAGES = [(node, language) for node in NODES for language in ("en", "zh")]
PICTURES_TOGETHER, PICTURE_WIDTH = 1_200_000, 900
DEFAULT = "(?:default|\u9ed8\u8ba4) "
LEAST_OF_A_MESSAGE = 12
SHOWN = ("LanceNativeAsk", "LanceNativeLoader", "LanceNativeSampler")
CHOICES = ("as is",)  # of a combo, with a blank in it
every_page = pytest.mark.parametrize(("node", "language"), PAGES, ids=lambda value: value)


def path_of(node, language):
    return DOCS / f"{node}.md" if language == "en" else DOCS / node / f"{language}.md"


def sections(node, language):
    """The parts of a page by heading, in order; the first, "", is what stands before them."""
    head, *rest = re.split(r"^## (.+)\n", path_of(node, language).read_text("utf-8"), flags=re.MULTILINE)
    return {"": head, **dict(zip(rest[::2], rest[1::2]))}


def entries(node, language, index):
    """The entries of a section's list: the bold head of each, and what follows it."""
    lines = list(sections(node, language).values())[index].splitlines()
    return [re.fullmatch(r"- \*\*(.+?)\*\*(?:: |\uff1a|<br>)(.+)", line).groups() for line in lines if line]


def quoted(cell):
    return re.findall(r"`([^`]+)`", cell)


@cache
def messages():
    """Every text in the code as a pattern of its first line, values standing for anything."""
    found = []
    for path in [*(ROOT / "nodes").glob("*.py"), *(ROOT / "lance_runtime").rglob("*.py")]:
        for part in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(part, ast.JoinedStr):
                texts = [value.value if isinstance(value, ast.Constant) else "\0" for value in part.values]
            elif isinstance(part, ast.Constant) and isinstance(part.value, str):
                texts = [re.sub(r"%[sd]", "\0", part.value)]
            else:
                continue
            line = "".join(texts).strip().split("\n")[0]
            if len(line.replace("\0", "")) >= LEAST_OF_A_MESSAGE:
                found.append(re.compile(".+".join(map(re.escape, line.split("\0")))))
    return found


@every_page
def test_page_has_all_its_parts(node, language):
    parts = sections(node, language)
    title, purpose, picture = (line for line in parts[""].splitlines() if line)
    assert title == f"# {read(language)[node]['display_name']}"
    assert re.search(r"[.\u3002]$", purpose)
    assert picture.endswith(f"](images/{node}.{language}.webp)")
    assert list(parts)[1 : 1 + len(HEADINGS[language])] == HEADINGS[language]
    assert len(parts) == 5
    assert list(parts.values())[3].count("\n- ") >= 1
    assert len(entries(node, language, 4)) >= 2
    assert min(len(text) for index in (1, 2, 4) for _, text in entries(node, language, index)) >= 5


@every_page
def test_page_names_every_input_and_output_as_shown(node, language):
    texts = read(language)[node]
    shown = [quoted(name)[0] for name, _ in entries(node, language, 1)]
    assert sorted(shown) == sorted(value["name"] for value in texts["inputs"].values())
    listed = entries(node, language, 2)
    assert len(listed) == len(texts["outputs"])
    for value, (name, _) in zip(texts["outputs"].values(), listed):
        assert value.get("name", name.strip("`")) == quoted(name)[0] or name.endswith("`\uff09")


@every_page
def test_errors_are_quoted_as_the_code_says_them(node, language):
    symptoms = [quoted(symptom) for symptom, _ in entries(node, language, 4)]
    errors = [quote for quotes in symptoms for quote in quotes if " " in quote]
    unknown = [error for error in errors if not any(message.fullmatch(error) for message in messages())]
    assert [error for error in unknown if error not in CHOICES] == []


def test_an_error_that_nobody_raises_is_seen():
    for text in ("Lance is out of memory.", "This CLIP is a Foo, not Flux's."):
        assert not any(message.fullmatch(text) for message in messages())
    assert any(message.fullmatch("This CLIP is a Foo, not Lance's.") for message in messages())


@pytest.fixture(scope="module")
def schemas(comfy_server):
    return {name: schema for name, schema in comfy_server.object_info().items() if name.startswith("LanceNative")}


def facts(name, kind, options=None):
    """Patterns of what a page must say about an input's values: limits, default and, of short lists, every choice."""
    if kind in ("INT", "FLOAT"):
        limits = [options["min"], *([options["max"]] if options["max"] < 2**63 else [])]
        return [*map(number, limits), DEFAULT + number(options["default"])]
    if kind == "COMBO":
        choices = options["options"] if len(options["options"]) <= 10 and not name.endswith("_name") else []
        default = [f"{DEFAULT}`{options['default']}`"] if options.get("default") else []
        return [*(f"`{choice}`" for choice in choices), *default]
    return []


def number(value):
    return rf"(?<![\d.]){re.escape(f'{value:g}' if isinstance(value, float) else str(value))}(?!\.?\d)"


@pytest.mark.comfy
@every_page
def test_limits_defaults_and_choices_are_the_schemas(node, language, schemas):
    names = {name: value["name"] for name, value in read(language)[node]["inputs"].items()}
    described = {quoted(head)[0]: text.split("<br>")[-1] for head, text in entries(node, language, 1)}
    for inputs in schemas[node]["input"].values():
        for name, (kind, *options) in inputs.items():
            if name not in names:
                continue  # hidden
            text = described[names[name]]
            missing = [fact for fact in facts(name, kind, *options) if not re.search(fact, text, flags=re.IGNORECASE)]
            assert missing == [], f"{name}: {text}"


def test_there_is_nothing_but_pages_and_their_pictures():
    pages = {path_of(*page) for page in PAGES}
    pictures = {DOCS / "images" / f"{node}.{language}.webp" for node, language in PAGES}
    assert {path for path in DOCS.rglob("*") if path.is_file()} == pages | pictures
    assert sorted(EXAMPLES) == NODES


def test_pictures_are_small_and_wide_enough():
    pictures = list((DOCS / "images").glob("*.webp"))
    assert sum(path.stat().st_size for path in pictures) < PICTURES_TOGETHER
    for path in pictures:
        with Image.open(path) as picture:
            assert 400 <= picture.width <= PICTURE_WIDTH, path.name


@pytest.mark.parametrize("node", NODES)
def test_a_picture_shows_its_node(node):
    assert node in {value["class_type"] for value in graph_of(node).values()}


def test_pages_pictures_and_translations_are_published():
    """What the registry's archive holds is what git tracks, less .comfyignore."""
    inside = ["ls-files", "--", "web", "locales"]
    out = ["ls-files", "-i", "-c", "--exclude-from=.comfyignore", "--", "web", "locales", "__init__.py"]
    tracked, ignored = (
        subprocess.run(["git", *line], check=False, cwd=ROOT, capture_output=True, text=True) for line in (inside, out)
    )
    if tracked.returncode:
        pytest.skip("not a git checkout")
    files = {path.relative_to(ROOT).as_posix() for part in ("web", "locales") for path in (ROOT / part).rglob("*.*")}
    assert files <= set(tracked.stdout.splitlines())
    assert ignored.stdout == ""


SELECT = """(type) => {
    app.graph.clear();
    const node = LiteGraph.createNode(type);
    node.pos = [300, 200];
    app.graph.add(node);
    app.canvas.selectItems([node]);
    app.canvas.setDirty(true, true);
    return node.title;
}"""
PICTURE = """(name) => {
    const picture = document.querySelector(".node-help-content img");
    return picture?.src.endsWith(name) && picture.complete && picture.naturalWidth;
}"""


@pytest.mark.comfy
@pytest.mark.parametrize("language", ["en", "zh"])
def test_help_in_the_web_page(comfy_server, language):
    """The button with the i over a node opens our page, in the language of the interface, with its picture."""
    comfy_server.post("/settings/Comfy.Locale", language)
    try:
        with open_ui(comfy_server, 1600, 1000) as page:
            for node in NODES:
                title = page.evaluate(SELECT, node)
                if node == NODES[0]:
                    page.click("[data-testid=info-button]")
                check_panel(page, node, language)
                assert title == read(language)[node]["display_name"]
    finally:
        comfy_server.post("/settings/Comfy.Locale", "en")


def check_panel(page, node, language):
    width = page.wait_for_function(PICTURE, arg=f"/docs/images/{node}.{language}.webp", timeout=20_000)
    assert width.json_value() >= 400
    title, _, purpose = path_of(node, language).read_text("utf-8").splitlines()[:3]
    text = page.inner_text(".node-help-content")
    assert text.startswith(title.removeprefix("# "))
    assert purpose in text
    keep_screenshot(page, node, language)


def keep_screenshot(page, node, language):
    """Kept to be looked at: build/screenshots, an artifact of CI."""
    if node in SHOWN:
        folder = ROOT / "build" / "screenshots"
        folder.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=folder / f"help {node} {language}.png")
