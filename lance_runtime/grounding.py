"""Boxes in an answer: Qwen2.5-VL names them as ``"bbox_2d": [x1, y1, x2, y2]`` in pixels of the picture it saw."""

from __future__ import annotations

import json
import re

from .preprocess import Area, Size

NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
BOX = re.compile(
    rf"\[{NUMBER},{NUMBER},{NUMBER},{NUMBER}\]|<\|box_start\|>\({NUMBER},{NUMBER}\),\({NUMBER},{NUMBER}\)<\|box_end\|>"
)
LABEL = re.compile(r'"label"\s*:\s*("(?:[^"\\]|\\.)*")')


def find_boxes(answer: str, seen: Size, area: Area, picture: Size) -> list[dict]:
    """Every box of an answer as {x, y, width, height, label}, in whole pixels of a picture.

    seen: height and width of what the model saw (``vit_size``). area: where that lies in the picture (``vit_area``).
    picture: its height and width; boxes are cut to it, and empty ones are left out.
    """
    boxes = []
    for match in BOX.finditer(answer):
        left, top, right, bottom = (float(value) for value in match.groups() if value is not None)
        horizontal = _span((left, right), area.width / seen[1], area.left, picture[1])
        vertical = _span((top, bottom), area.height / seen[0], area.top, picture[0])
        if horizontal[1] > 0 and vertical[1] > 0:
            box = {"x": horizontal[0], "y": vertical[0], "width": horizontal[1], "height": vertical[1]}
            boxes.append({**box, "label": _label(answer, match)})
    return boxes


def _label(answer: str, box: re.Match[str]) -> str:
    """What stands in the same braces as a box, before or behind it."""
    begin, end = answer.rfind("{", 0, box.start()), answer.find("}", box.end())
    found = LABEL.search(answer, begin + 1, end + 1 or len(answer))
    try:
        return json.loads(found[1], strict=False) if found else ""
    except ValueError:  # no escape that JSON knows
        return found[1][1:-1] if found else ""


def _span(ends: tuple[float, float], scale: float, offset: float, size: int) -> tuple[int, int]:
    """Start and length along one axis of the picture."""
    start, end = (round(min(max(offset + value * scale, 0), size)) for value in sorted(ends))
    return start, end - start
