"""``make demo``: a picture, an edit and an answer with the tiny bundled checkpoint, through the command line's own code."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from lance_runtime.__main__ import build_parser, run  # noqa: E402

CHECKPOINT, MEDIA, DEMO = (Path(name) for name in ("tests/data/parity/checkpoint", "tests/data/parity/media", "demo"))
SOURCE = DEMO / "source.png"
PROMPT = "A red fox in the snow, close-up, soft morning light"
EDIT = "Make it night."
QUESTION = "What is in this picture?"
FEW = ("--steps", "12")  # no number of steps makes more of random weights
COMMANDS = (
    ("t2i", "--prompt", PROMPT, "--height", "256", "--width", "256", *FEW, "--output", DEMO / "t2i.png"),
    ("image_edit", "--image", SOURCE, "--prompt", EDIT, "--resolution", "image_256res", *FEW, "--output", DEMO / "edit.png"),
    ("x2t_image", "--image", SOURCE, "--question", QUESTION, "--max-new-tokens", "24", "--output", DEMO / "answer.txt"),
)
NOTICE = (
    "The bundled checkpoint is tiny and its weights are random. So the pictures are noise and the answer is gibberish: "
    "they prove that the machinery runs, and show nothing of what Lance can draw. For that, put the real checkpoint in "
    "the place of tests/data/parity/checkpoint in the commands."
)
WIDTH, MARGIN, LINE = 300, 20, 18


def shown(arguments: Sequence[object]) -> str:
    """A command as one would type it."""
    words = [str(argument) for argument in arguments]
    return "python -m lance_runtime " + " ".join(f'"{word}"' if " " in word else word for word in words)


def main() -> None:
    os.chdir(ROOT)
    DEMO.mkdir(exist_ok=True)
    shutil.copy(MEDIA / "wide.png", SOURCE)
    print(f"\n{textwrap.fill(NOTICE, 100)}\n")
    lines, answer, start = [], "", time.perf_counter()
    for task, *rest in COMMANDS:
        arguments = [str(argument) for argument in (task, "--model", CHECKPOINT, *rest)]
        lines.append(shown(arguments))
        print(f"$ {lines[-1]}", flush=True)
        answer = run(build_parser().parse_args(arguments))
    # The tiny tokenizer may write any byte: what a terminal or a font cannot show is spelled out.
    readable = answer.encode("unicode_escape").decode("ascii")
    print(readable)
    write_readme(lines)
    contact_sheet(readable)
    print(f"\n{time.perf_counter() - start:.0f} s. Written: {', '.join(sorted(str(path) for path in DEMO.iterdir()))}")
    print("The weights are random: noise and gibberish are the right result here. (demo/README.txt)")


def write_readme(lines: Sequence[str]) -> None:
    contents = (
        ("t2i.png", "a picture from a prompt"),
        ("source.png, edit.png", "a picture, and the same changed as a prompt asked for"),
        ("answer.txt", "an answer to a question about source.png"),
        ("sheet.png", "all of it on one sheet"),
    )
    listed = "\n".join(f"{name:<22}{what}" for name, what in contents)
    commands = "\n".join(lines)
    text = f"{textwrap.fill(NOTICE, 100)}\n\n{listed}\n\nMade by:\n\n{commands}\n"
    (DEMO / "README.txt").write_text(text, "utf-8")


def contact_sheet(answer: str) -> None:
    """Every picture with its words under it, and the warning above them all."""
    columns = (
        (DEMO / "t2i.png", f"t2i: {PROMPT}"),
        (SOURCE, "the source of the edit and of the question"),
        (DEMO / "edit.png", f"image_edit: {EDIT}"),
        (SOURCE, f"x2t_image: {QUESTION}\n-> {answer}"),
    )
    font, step = ImageFont.load_default(14), WIDTH + MARGIN
    sheet = Image.new("RGB", (step * len(columns) + MARGIN, WIDTH + 11 * LINE), "white")
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((MARGIN, MARGIN), textwrap.fill(NOTICE, 150), fill="firebrick", font=font)
    for index, (path, words) in enumerate(columns):
        left, top = MARGIN + index * step, MARGIN + 3 * LINE
        with Image.open(path) as picture:
            scaled = picture.convert("RGB").resize((WIDTH, round(WIDTH * picture.height / picture.width)))
        sheet.paste(scaled, (left, top))
        wrapped = "\n".join(textwrap.fill(line, 40) for line in words.splitlines())
        draw.multiline_text((left, top + WIDTH + LINE // 2), wrapped, fill="black", font=font)
    sheet.save(DEMO / "sheet.png")


if __name__ == "__main__":
    main()
