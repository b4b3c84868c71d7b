"""The house rules of the code, read from its syntax trees."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Data flows one way: a room imports only from rooms above it.
ORDER = [
    "types",
    "config",
    "quant_formats",
    "checkpoint",
    "dequantize",
    "saving",
    "tokenizer",
    "prompts",
    "preprocess",
    "positions",
    "context",
    "model.rope",
    "model.layers",
    "model.attention",
    "model.embeddings",
    "model.transformer",
    "model.vision",
    "streaming",
    "engine",
    "tiling",
    "vae",
    "kv_cache",
    "recorded",
    "prefill",
    "reuse",
    "guidance",
    "denoise",
    "decode",
    "files",
    "download",
    "components",
    "quantize",
    "convert",
    "memory",
    "visuals",
    "request",
    "pipeline",
    "quant_error",
    "media",
    "grounding",
    "terminal",
    "commands",
    "__init__",
    "__main__",
]
COMFYUI = {
    "comfy",
    "comfy_api",
    "comfy_extras",
    "comfy_execution",
    "folder_paths",
    "nodes",
    "server",
    "execution",
    "latent_preview",
}
RUNTIME = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "lance_runtime").rglob("*.py"))
NODES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "nodes").rglob("*.py"))
FILES = [*RUNTIME, *NODES, "__init__.py"]


@cache
def text(name):
    return (ROOT / name).read_text("utf-8")


@cache
def nodes_of(name):
    return list(ast.walk(ast.parse(text(name))))


def of(name, *kinds):
    return [node for node in nodes_of(name) if isinstance(node, kinds)]


def functions(name):
    return of(name, ast.FunctionDef, ast.AsyncFunctionDef)


def imported(name):
    """First parts of the modules that a file imports by absolute name."""
    modules = [alias.name for node in of(name, ast.Import) for alias in node.names]
    modules += [node.module for node in of(name, ast.ImportFrom) if not node.level]
    return {module.split(".")[0] for module in modules}


def room(name):
    found = name.removeprefix("lance_runtime/").removesuffix(".py").replace("/", ".")
    return found if found == "__init__" else found.removesuffix(".__init__")


def rooms_imported(name):
    """Rooms of the runtime that a file imports, wherever the import stands."""
    package = name.removeprefix("lance_runtime/").split("/")[:-1]
    for node in of(name, ast.ImportFrom):
        if node.level:
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            yield from {".".join(base), *(".".join([*base, alias.name]) for alias in node.names)} & set(ORDER)


def test_every_room_has_its_place():
    assert {room(name) for name in RUNTIME} - {"model"} == set(ORDER)


@pytest.mark.parametrize("name", RUNTIME)
def test_a_room_imports_only_from_rooms_above_it(name):
    if room(name) == "model":
        assert not list(rooms_imported(name))
        return
    below = [other for other in rooms_imported(name) if ORDER.index(other) >= ORDER.index(room(name))]
    # The package hands the pipeline out when it is asked for; nothing is imported on the way in.
    assert [other for other in below if room(name) != "__init__"] == []


def test_the_order_is_not_empty_words():
    assert sum(len(list(rooms_imported(name))) for name in RUNTIME) > 60


@pytest.mark.parametrize("name", RUNTIME)
def test_the_runtime_knows_nothing_of_comfyui(name):
    assert not imported(name) & COMFYUI
    assert not [node for node in of(name, ast.ImportFrom) if node.level > len(Path(name).parts) - 1]


@pytest.mark.parametrize("name", NODES)
def test_the_programming_interface_of_nodes_is_imported_in_one_place(name):
    if name != "nodes/schema.py":
        assert "comfy_api" not in imported(name)


@pytest.mark.parametrize("name", RUNTIME)
def test_every_function_is_annotated(name):
    for function in functions(name):
        arguments = function.args
        named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        bare = [a.arg for a in named if a is not None and a.annotation is None and a.arg not in ("self", "cls")]
        assert not bare, f"{function.name}, line {function.lineno}: {bare}"
        assert function.returns is not None, f"{function.name}, line {function.lineno}"


@pytest.mark.parametrize("name", FILES)
def test_functions_and_files_are_short(name):
    assert text(name).count("\n") <= 350
    long = [f"{f.name}: {f.end_lineno - f.lineno + 1}" for f in functions(name) if f.end_lineno - f.lineno >= 60]
    assert not long


@pytest.mark.parametrize("name", FILES)
def test_code_is_ascii(name):
    assert text(name).isascii()


@pytest.mark.parametrize("name", FILES)
def test_nothing_prints_but_the_command_line(name):
    if name != "lance_runtime/__main__.py":
        assert not [node.lineno for node in of(name, ast.Call) if getattr(node.func, "id", "") == "print"]


@pytest.mark.parametrize("name", FILES)
def test_no_error_is_swallowed_whole(name):
    assert not [node.lineno for node in of(name, ast.ExceptHandler) if node.type is None]


@pytest.mark.parametrize("name", FILES)
def test_users_meet_no_assertion(name):
    """Python drops assertions under -O, and their messages have no remedy."""
    assert not [node.lineno for node in of(name, ast.Assert)]


@pytest.mark.parametrize("name", FILES)
def test_no_global_state_is_assigned(name):
    assert not [node.lineno for node in of(name, ast.Global)]


@pytest.mark.parametrize("name", RUNTIME)
def test_public_rooms_say_what_they_are(name):
    assert ast.get_docstring(ast.parse(text(name)))
