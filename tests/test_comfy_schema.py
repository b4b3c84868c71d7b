"""The nodes' schemas are a promise to saved workflows: they may only grow at their ends.

After an intended change: ``LANCE_WRITE_SCHEMA=1 pytest tests/test_comfy_schema.py``.
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest

SNAPSHOT = Path(__file__).parent / "schema.json"
MODEL_FILES = ("model_name", "vit_name", "vae_name", "lora_name")
KEPT = ("default", "min", "max", "step", "multiline", "dynamicPrompts", "control_after_generate", "multiselect", "template")
SELF_EVIDENT = {"MODEL", "CLIP", "VAE"}


def snapshot(schema: dict[str, Any]) -> dict[str, Any]:
    """What saved workflows rely on, of one node of /object_info."""
    return {
        "inputs": {
            part: [_input(schema, part, name) for name in names] for part, names in sorted(schema["input_order"].items())
        },
        "outputs": [list(output) for output in zip(schema["output_name"], schema["output"], schema["output_is_list"])],
        "output_node": schema["output_node"],
    }


def _input(schema: dict[str, Any], part: str, name: str) -> dict[str, Any]:
    kind, options = (*schema["input"][part][name], {})[:2]
    found = {"name": name, "type": kind, **{key: options[key] for key in KEPT if key in options}}
    return found if name in MODEL_FILES or kind != "COMBO" else {**found, "options": options["options"]}


def breaks(old: Any, new: Any, path: str = "") -> list[str]:
    """What has changed other than by values appended to a list or by new nodes."""
    if isinstance(old, dict) and isinstance(new, dict):
        if path and old.keys() != new.keys() and not path.endswith(".inputs"):
            return [f"{path}: {sorted(old.keys() ^ new.keys())}"]
        return [
            text
            for key in old
            for text in (breaks(old[key], new[key], f"{path}.{key}") if key in new else [f"{path}.{key}: gone"])
        ]
    if isinstance(old, list) and isinstance(new, list):
        short = [f"{path}: {len(old)} entries, now {len(new)}"] if len(new) < len(old) else []
        return short + [text for i, (a, b) in enumerate(zip(old, new)) for text in breaks(a, b, f"{path}[{i}]")]
    return [] if old == new and type(old) is type(new) else [f"{path}: {old!r}, now {new!r}"]


EXAMPLE = {
    "Node": {
        "inputs": {"required": [{"name": "size", "type": "COMBO", "default": "a", "options": ["a", "b"]}]},
        "outputs": [["LATENT", "LATENT", False]],
        "output_node": False,
    }
}


def changed(edit):
    schema = copy.deepcopy(EXAMPLE)
    edit(schema["Node"])
    return schema


@pytest.mark.parametrize(
    "edit",
    [
        lambda node: node["inputs"]["required"].append({"name": "new", "type": "INT"}),
        lambda node: node["inputs"].update(optional=[{"name": "new", "type": "INT"}]),
        lambda node: node["outputs"].append(["new", "INT", False]),
        lambda node: node["inputs"]["required"][0]["options"].append("c"),
    ],
)
def test_appending_is_allowed(edit):
    assert breaks(EXAMPLE, changed(edit)) == []


@pytest.mark.parametrize(
    "edit",
    [
        lambda node: node["inputs"]["required"].insert(0, {"name": "new", "type": "INT"}),
        lambda node: node["inputs"]["required"].clear(),
        lambda node: node["inputs"].pop("required"),
        lambda node: node["inputs"]["required"][0].update(name="other"),
        lambda node: node["inputs"]["required"][0].update(type="INT"),
        lambda node: node["inputs"]["required"][0].update(default="b"),
        lambda node: node["inputs"]["required"][0].update(min=1),
        lambda node: node["inputs"]["required"][0]["options"].reverse(),
        lambda node: node["outputs"].insert(0, ["new", "INT", False]),
        lambda node: node["outputs"].clear(),
        lambda node: node.update(output_node=True),
    ],
)
def test_any_other_change_is_seen(edit):
    assert breaks(EXAMPLE, changed(edit))


def test_a_node_that_is_gone_is_seen():
    assert breaks(EXAMPLE, {}) == [".Node: gone"]


@pytest.fixture(scope="module")
def schemas(comfy_server):
    return {name: schema for name, schema in comfy_server.object_info().items() if name.startswith("LanceNative")}


@pytest.mark.comfy
def test_saved_workflows_still_fit(schemas):
    found = {name: snapshot(schema) for name, schema in sorted(schemas.items())}
    if os.environ.get("LANCE_WRITE_SCHEMA") == "1":
        SNAPSHOT.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    stored = json.loads(SNAPSHOT.read_text("utf-8"))
    assert breaks(stored, found) == []
    assert sorted(stored) == sorted(found), "a new node belongs into the snapshot"


@pytest.mark.comfy
def test_nodes_explain_themselves(schemas):
    assert len(schemas) >= 17
    for name, schema in schemas.items():
        assert schema["category"] == "Lance", name
        assert schema["description"].endswith("."), name
        assert schema["search_aliases"], name
        assert schema["display_name"] != name


@pytest.mark.comfy
def test_inputs_explain_themselves(schemas):
    missing = [
        f"{name}.{key}"
        for name, schema in schemas.items()
        for part in ("required", "optional")
        for key, (kind, *options) in schema["input"].get(part, {}).items()
        if kind not in SELF_EVIDENT and not (options and options[0].get("tooltip"))
    ]
    assert missing == []
