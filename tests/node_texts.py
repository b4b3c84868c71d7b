"""What the interface shows of our nodes, from the live schema, in the form that ComfyUI reads translations in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LANGUAGES = ("en", "zh", "ja", "ko")
FILES = ("main", "nodeDefs")


def read(language: str, file: str = "nodeDefs") -> dict[str, Any]:
    return json.loads((ROOT / "locales" / language / f"{file}.json").read_text("utf-8"))


def write(language: str, file: str, values: dict[str, Any]) -> None:
    path = ROOT / "locales" / language / f"{file}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")


def english(schemas: dict[str, Any]) -> dict[str, Any]:
    """nodeDefs.json in English: schemas are those of /object_info."""
    return {name: _node(schemas[name]) for name in sorted(schemas)}


def _node(schema: dict[str, Any]) -> dict[str, Any]:
    names = [(part, name) for part in ("required", "optional") for name in schema["input_order"].get(part, ())]
    inputs = {name: {"name": name, "tooltip": _tooltip(schema["input"][part][name])} for part, name in names}
    outputs = {}
    for index, (name, kind, tooltip) in enumerate(zip(schema["output_name"], schema["output"], schema["output_tooltips"])):
        # The interface looks for an output's own name only where it differs from its type, which it translates itself.
        outputs[str(index)] = {**({} if name == kind else {"name": name}), "tooltip": tooltip}
    return {
        "display_name": schema["display_name"],
        "description": schema["description"],
        "inputs": inputs,
        "outputs": outputs,
    }


def _tooltip(declared: list[Any]) -> str | None:
    return declared[1].get("tooltip") if len(declared) > 1 else None


def strings(values: Any, path: str = "") -> dict[str, Any]:
    """Every leaf by its dotted path."""
    if not isinstance(values, dict):
        return {path: values}
    return {key: leaf for name, value in values.items() for key, leaf in strings(value, f"{path}.{name}".lstrip(".")).items()}
