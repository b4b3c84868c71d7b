"""What the registry would publish: its files, its size, what its scanner objects to, and that it runs by itself."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from comfy_server import ComfyServer
from goldens import CHECKPOINT
from graphs import text_to_image
from PIL import Image

ROOT = Path(__file__).parents[1]
LIMIT = 15_000_000
NEEDED = {"__init__.py", "pyproject.toml", "LICENSE", "NOTICE", "README.md", "CHANGELOG.md"}
NETWORK = {"huggingface_hub", "requests", "httpx", "httpx2", "aiohttp", "urllib", "urllib3", "http", "socket", "ftplib"}
PROCESSES = {"subprocess", "multiprocessing", "pty", "ctypes", "signal"}
LOADERS = {"importlib", "pickle", "marshal", "runpy", "pip", "imp", "zipimport"}
BUILTINS = {"eval", "exec", "__import__"}  # however they are used; compile, a field's word, only where it is called
SYSTEM = {"system", "popen", "getenv", "environ", "environb", "putenv", "startfile", "fork"}  # of the module os


def git(*arguments):
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("the archive is what git tracks, and this is no git checkout")
    listed = subprocess.run(["git", *arguments, "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in listed.split("\0") if name}


@pytest.fixture(scope="module")
def files():
    """As comfy-cli packs: tracked files, less .comfyignore's, plus the includes of pyproject.toml (there are none)."""
    ignored = git("ls-files", "--cached", "--ignored", "--exclude-from=.comfyignore")
    assert "includes" not in (ROOT / "pyproject.toml").read_text("utf-8")
    return sorted(name for name in git("ls-files") - ignored if (ROOT / name).exists())


@pytest.fixture(scope="module")
def archive(files, tmp_path_factory):
    """The published files alone, unpacked as ComfyUI's Manager does."""
    folder = tmp_path_factory.mktemp("custom_nodes") / "lance-native"
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def python(files):
    return [name for name in files if name.endswith(".py")]


def test_what_is_in_the_archive(files):
    assert set(files) >= NEEDED
    rooms = {name.split("/")[0] for name in files if "/" in name}
    assert rooms <= {"nodes", "lance_runtime", "workflows", "subgraphs", "web", "locales"}
    assert rooms >= {"nodes", "lance_runtime", "workflows", "subgraphs", "web"}


def test_no_test_and_no_tool_of_development_is_in_it(files):
    assert not [name for name in files if re.search(r"(^|/)(tests?|benchmarks?|conftest\.py|test_[^/]*|\.[^/]+)(/|$)", name)]
    assert "lance_runtime/download.py" not in files


def test_every_other_file_of_the_code_is_in_it(files):
    code = {
        path.relative_to(ROOT).as_posix() for folder in ("nodes", "lance_runtime") for path in (ROOT / folder).rglob("*.py")
    }
    assert code & git("ls-files") - set(files) == {"lance_runtime/download.py"}


def test_the_archive_is_small(files, record_property):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in files:
            target.write(ROOT / name, name)
    plain = sum((ROOT / name).stat().st_size for name in files)
    record_property("archive", f"{len(files)} files, {plain} bytes, {packed.tell()} packed")
    assert packed.tell() < LIMIT, f"{packed.tell()} bytes where {LIMIT} are the limit"
    assert plain < LIMIT + 2_000_000


def forbidden(source):
    """What the registry's scanner is known to object to, line by line."""
    for node in ast.walk(ast.parse(source)):
        yield from (f"line {node.lineno}: {name}" for name in objections(node))


def objections(node):
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if outside(alias.name))
    elif isinstance(node, ast.ImportFrom) and not node.level:
        yield from [node.module] if outside(node.module) else []
        yield from (alias.name for alias in node.names if node.module == "os" and alias.name in SYSTEM)
    elif isinstance(node, ast.Name):
        yield from {node.id} & BUILTINS
    elif isinstance(node, ast.Attribute):
        # The scanner has taken model.eval() for the built-in.
        yield from {node.attr} & ({"eval", "exec"} | (SYSTEM if getattr(node.value, "id", "") == "os" else set()))
    elif isinstance(node, ast.Call) and ast.unparse(node.func) == "compile":
        yield "compile"
    elif isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
        safe = any(keyword.arg == "weights_only" and keyword.value.value is True for keyword in node.keywords)
        yield from () if safe else ["torch.load without weights_only"]


def outside(module):
    return module.split(".")[0] in NETWORK | PROCESSES | LOADERS


@pytest.mark.parametrize(
    "source",
    [
        "import subprocess",
        "from urllib.request import urlopen",
        "def f():\n    import huggingface_hub.utils",
        "import importlib.util",
        "import os\nos.environ['A']",
        "import os\nos.system('ls')",
        "from os import getenv\ngetenv('A')",
        "eval('1')",
        "run = eval",
        "compile('1', 'file', 'exec')",
        "model.eval()",
        "torch.load(path)",
    ],
)
def test_the_search_finds(source):
    assert list(forbidden(source))


@pytest.mark.parametrize(
    "source",
    [
        "from .download import Hub",
        "import re\nre.compile('a')",
        "def f(compile=False):\n    return compile",
        "torch.load(path, weights_only=True)",
    ],
)
def test_the_search_lets_pass(source):
    assert not list(forbidden(source))


def test_nothing_in_it_is_what_the_scanner_objects_to(files):
    found = {name: list(forbidden((ROOT / name).read_text("utf-8"))) for name in python(files)}
    assert len(found) > 40
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_scripts_of_the_page_run_no_text_as_code(files):
    for name in files:
        if name.endswith((".js", ".mjs")):
            assert not re.search(r"\beval\(|new Function\(|https?://", (ROOT / name).read_text("utf-8")), name


def test_it_installs_nothing(files):
    assert not {"requirements.txt", "install.py", "prestartup_script.py", "setup.py"} & set(files)


# It runs by itself


def run(archive, *words):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *words], cwd=archive, env=environment, capture_output=True, text=True, check=False, timeout=300
    )


def test_every_module_of_the_runtime_imports(archive):
    found = [path.relative_to(archive).with_suffix("").as_posix() for path in (archive / "lance_runtime").rglob("*.py")]
    modules = sorted(name.replace("/", ".").removesuffix(".__init__") for name in found)
    result = run(archive, "-c", f"import {', '.join(modules)}; print(lance_runtime.__file__)")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(archive / "lance_runtime" / "__init__.py")


def test_the_command_line_draws(archive, tmp_path):
    size = ["--height", "32", "--width", "48", "--steps", "1", "--device", "cpu"]
    words = ["t2i", "--model", str(CHECKPOINT), "--prompt", "a fox", *size, "--output", str(tmp_path / "a.png")]
    result = run(archive, "-m", "lance_runtime", *words)
    assert result.returncode == 0, result.stderr
    assert Image.open(tmp_path / "a.png").size == (48, 32)


def test_the_download_says_why_it_is_not_there(archive, tmp_path):
    result = run(archive, "-m", "lance_runtime", "download", "--to", str(tmp_path))
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "holds no download.py" in result.stderr
    assert "README" in result.stderr


@pytest.mark.comfy
def test_it_works_in_comfyui(archive, comfy_models):
    snapshot = json.loads((ROOT / "tests" / "schema.json").read_text("utf-8"))
    with ComfyServer(comfy_models, nodes={"lance-native": archive}) as server:
        ours = {name for name in server.object_info() if name.startswith("LanceNative")}
        assert ours == set(snapshot)
        assert len(ours) >= 17
        templates = server.get("/workflow_templates")["lance-native"]
        assert sorted(templates) == sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
        boxes = [box for box in server.get("/global_subgraphs").values() if box["info"]["node_pack"].endswith("lance-native")]
        assert len(boxes) == len(list((ROOT / "subgraphs").glob("*.json")))
        assert server.run(text_to_image(steps=1)).image("save").size == (96, 64)


# What the registry's page shows


def settings():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def test_fields_of_the_registry():
    project, comfy = settings()["project"], settings()["tool"]["comfy"]
    assert project["name"] == "lance-native"
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert project["requires-python"] == ">=3.10"
    assert {"Repository", "Issues"} <= set(project["urls"])
    assert comfy["PublisherId"]
    assert comfy["DisplayName"] == "Lance Native"
    assert re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])  # of two numbers it would be dropped
    assert "web" not in comfy  # a second registration of WEB_DIRECTORY
    assert f"## [{project['version']}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")


@pytest.mark.parametrize(("field", "name"), [("Icon", "icon.png"), ("Banner", "banner.png")])
def test_pictures_of_the_registry(field, name, files):
    place = f"web/brand/{name}"
    assert place in files
    repository = settings()["project"]["urls"]["Repository"]
    raw = repository.replace("https://github.com/", "https://raw.githubusercontent.com/")
    assert settings()["tool"]["comfy"][field] == f"{raw}/main/{place}"
    width, height = Image.open(ROOT / place).size
    assert (width == height <= 400) if field == "Icon" else (width * 9 == height * 21)


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_forms_and_workflows_are_well_formed(path):
    yaml = pytest.importorskip("yaml")
    found = yaml.safe_load(path.read_text("utf-8"))
    if path.parent.name == "ISSUE_TEMPLATE" and path.name != "config.yml":
        assert {"name", "description", "body"} <= set(found)
        named = [part["id"] for part in found["body"] if part["type"] != "markdown"]
        assert len(named) == len(set(named))
        assert all(part["attributes"]["label"] for part in found["body"] if part["type"] != "markdown")
    if path.parent.name == "workflows":
        assert found["permissions"] == {"contents": "read"}
