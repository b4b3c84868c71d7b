"""Boxes in an answer: Qwen2.5-VL names them as ``"bbox_2d": [x1, y1, x2, y2]`` in pixels of the picture it saw."""

from __future__ import annotations

import re

Size = tuple[int, int]
NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
BOX = re.compile(
    rf"\[{NUMBER},{NUMBER},{NUMBER},{NUMBER}\]|<\|box_start\|>\({NUMBER},{NUMBER}\),\({NUMBER},{NUMBER}\)<\|box_end\|>"
)
LABEL = re.compile(r'"label"\s*:\s*"([^"]*)"')


def find_boxes(answer: str, seen: Size, picture: Size) -> list[dict]:
    """Every box of an answer, scaled from the size that was seen to the picture's, both (height, width).

    Boxes are {x, y, width, height, label} in whole pixels, cut to the picture; empty ones are left out.
    """
    boxes = []
    for match in BOX.finditer(answer):
        left, top, right, bottom = (float(value) for value in match.groups() if value is not None)
        horizontal = _span(left, right, seen[1], picture[1])
        vertical = _span(top, bottom, seen[0], picture[0])
        if horizontal[1] > 0 and vertical[1] > 0:
            label = LABEL.search(answer, match.end(), answer.find("}", match.end()) + 1 or len(answer))
            box = {"x": horizontal[0], "y": vertical[0], "width": horizontal[1], "height": vertical[1]}
            boxes.append({**box, "label": label.group(1) if label else ""})
    return boxes


def _span(first: float, last: float, seen: int, size: int) -> tuple[int, int]:
    """Start and length of one axis in the picture."""
    start, end = (min(max(round(value * size / seen), 0), size) for value in sorted((first, last)))
    return start, end - start
