"""``make demo``: what the built-in Lance Nano draws, edits and answers, on one contact sheet."""

from __future__ import annotations

import logging
import os
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from lance_runtime import NANO, LancePipeline  # noqa: E402
from lance_runtime.media import write_video  # noqa: E402

DEMO = Path("demo")
PROMPTS = (
    "a big red star on a pink background",
    "a green circle to the left of a yellow square on a black background",
    "three purple triangles on a striped background",
    "a small blue square at the top on a white background",
)
# The picture to start from (made by the prompt), and what to do with it.
EDITS = (
    ("a big orange circle in the middle on a gray background", "make the circle blue"),
    ("a red square to the left of a blue star on a striped background", "remove the square"),
    ("a small green triangle on the left on a white background", "add a yellow star on the right"),
    ("a big purple star in the middle on a black background", "make the background pink"),
)
CLIPS = ("a yellow star moves to the right on a black background", "a blue circle grows on a white background")
QUESTIONS = ("What color is the star?", "How many shapes are there?", "Which shape is orange?", "")
SIDE, GAP, LINE, STRIP = 192, 24, 20, (0, 2, 4, 6, 8)


@dataclass(frozen=True)
class Card:
    """Pictures side by side, and the words under them."""

    pictures: Sequence[np.ndarray]
    words: str


def main() -> None:
    os.chdir(ROOT)
    DEMO.mkdir(exist_ok=True)
    logging.basicConfig(level=logging.WARNING)
    start = time.perf_counter()
    pipe = LancePipeline.from_pretrained(NANO, "image")
    pictures, edits = drawn(pipe), edited(pipe)
    rows = [pictures, edits, *([clip] for clip in clips(pipe)), answered(pipe, [*pictures[:2], edits[0], pictures[3]])]
    titles = ("Text to picture", "A picture changed", "Text to clip", "", "Picture to clip", "Questions")
    sheet = contact_sheet(list(zip(titles, rows, strict=True)))
    sheet.save(DEMO / "sheet.png")
    print(f"{time.perf_counter() - start:.0f} s. Look at {DEMO / 'sheet.png'}; every picture and clip lies beside it.")


def drawn(pipe: LancePipeline) -> list[Card]:
    return [Card([picture(pipe, prompt, f"picture {index}")], prompt) for index, prompt in enumerate(PROMPTS, 1)]


def picture(pipe: LancePipeline, prompt: str, name: str) -> np.ndarray:
    frame = pipe("t2i", prompt, seed=1).frames[0]
    Image.fromarray(frame).save(DEMO / f"{name}.png")
    return frame


def edited(pipe: LancePipeline) -> list[Card]:
    cards = []
    for index, (prompt, change) in enumerate(EDITS, 1):
        before = picture(pipe, prompt, f"edit {index} before")
        after = pipe("image_edit", change, images=[before], seed=1).frames[0]
        Image.fromarray(after).save(DEMO / f"edit {index} after.png")
        cards.append(Card([before, after], change))
    return cards


def clips(pipe: LancePipeline) -> list[Card]:
    first = picture(pipe, "a big green triangle on the left on a pink background", "first frame")
    made = [(prompt, pipe("t2v", prompt, seed=1).frames) for prompt in CLIPS]
    moved = "the triangle moves to the right"
    continued = pipe("i2v", moved, images=[first], seed=1).frames
    for index, (_, frames) in enumerate([*made, (moved, continued)], 1):
        write_video(DEMO / f"clip {index}.mp4", frames)
    strips = [Card([frames[i] for i in STRIP], prompt) for prompt, frames in made]
    return [*strips, Card([continued[i] for i in STRIP], f"the first picture is given; {moved}")]


def answered(pipe: LancePipeline, about: Sequence[Card]) -> list[Card]:
    """A question about the first picture of each card."""
    cards = []
    for question, card in zip(QUESTIONS, about, strict=True):
        seen = card.pictures[0]
        answer = pipe("x2t_image", images=[seen], question=question, max_new_tokens=40).text
        cards.append(Card([seen], f"{question or '(no question)'}\n{answer}"))
    return cards


def contact_sheet(rows: Sequence[tuple[str, Sequence[Card]]]) -> Image.Image:
    """Every card with its words under it, a title over each row that has one."""
    font, bold = ImageFont.load_default(15), ImageFont.load_default(20)
    width = max(sum(card_width(card) + GAP for card in cards) for _, cards in rows) + GAP
    sheet, top = Image.new("RGB", (width, len(rows) * 2 * SIDE), "white"), GAP
    draw = ImageDraw.Draw(sheet)
    for title, cards in rows:
        draw.text((GAP, top), title, fill="black", font=bold)
        left, top, lines = GAP, top + (LINE * 2 if title else 0), 1
        for card in cards:
            for index, frame in enumerate(card.pictures):
                scaled = Image.fromarray(frame).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
                sheet.paste(scaled, (left + index * (SIDE + 4), top))
            columns = card_width(card) // 8
            words = "\n".join(textwrap.fill(line, columns) for line in card.words.splitlines())
            draw.multiline_text((left, top + SIDE + 6), words, fill="#333333", font=font)
            left, lines = left + card_width(card) + GAP, max(lines, words.count("\n") + 1)
        top += SIDE + LINE * (lines + 1)
    return sheet.crop((0, 0, width, top))


def card_width(card: Card) -> int:
    return len(card.pictures) * (SIDE + 4) - 4


if __name__ == "__main__":
    main()
