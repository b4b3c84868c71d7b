"""Which of Nano's tasks have passed their gates, for end-to-end tests that only hold then."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

RESULTS = Path(__file__).with_name("RESULTS.md")
DRAWS = "text to image: one thing, colour and shape"
EDITS = "edit: colour, the rest unchanged"
COLOUR = "question: colour"


def gated(*rows: str) -> pytest.MarkDecorator:
    """Skips a test unless every one of these rows of RESULTS.md passed its gate; says which did not."""
    text = RESULTS.read_text("utf-8")
    missed = [row for row in rows if not re.search(rf"^\| {re.escape(row)} .*passed", text, re.MULTILINE)]
    return pytest.mark.skipif(bool(missed), reason=f"Nano has not passed its gate yet: {', '.join(missed)}")
