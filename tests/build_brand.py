"""Draws the icon and the banner of the registry's page: ``python tests/build_brand.py``.

A lance whose streamers are links of a graph, in the colours that ComfyUI gives to what Load Lance puts out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

TARGET = Path(__file__).parents[1] / "web" / "brand"
SCALE = 4  # drawn larger and reduced: smooth edges
NIGHT, DUSK = (28, 29, 51), (74, 64, 136)
STEEL, SHADE, GRIP, BRONZE = (242, 244, 252), (164, 170, 200), (255, 178, 92), (220, 128, 58)
MODEL, CLIP, VAE = (179, 157, 219), (255, 213, 0), (255, 110, 110)

Point = tuple[float, float]


class Canvas:
    """A picture in units of the final pixels."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.image = Image.new("RGBA", (width * SCALE, height * SCALE))
        self.draw = ImageDraw.Draw(self.image)

    def gradient(self, begin: tuple[int, ...], end: tuple[int, ...]) -> None:
        """From the lower left to the upper right."""
        small = Image.new("RGB", (64, 64))
        for x in range(64):
            for y in range(64):
                share = (x + 63 - y) / 126
                small.putpixel((x, y), tuple(round(a + (b - a) * share) for a, b in zip(begin, end)))
        self.image.paste(small.resize(self.image.size, Image.Resampling.BICUBIC))

    def polygon(self, points: Sequence[Point], colour: tuple[int, ...]) -> None:
        self.draw.polygon([(x * SCALE, y * SCALE) for x, y in points], fill=colour)

    def disc(self, centre: Point, radius: float, colour: tuple[int, ...]) -> None:
        box = [(value + side * radius) * SCALE for side in (-1, 1) for value in centre]
        self.draw.ellipse(box, fill=colour)

    def curve(self, points: Sequence[Point], width: float, colour: tuple[int, ...]) -> None:
        for at in curve(points):
            self.disc(at, width / 2, colour)

    def finished(self) -> Image.Image:
        return self.image.resize((self.width, self.height), Image.Resampling.LANCZOS)


def curve(points: Sequence[Point], steps: int = 900) -> list[Point]:
    """A cubic Bezier curve of four points, as the page draws links."""
    found = []
    for step in range(steps + 1):
        t = step / steps
        parts = [weight * (1 - t) ** (3 - i) * t**i for i, weight in enumerate((1, 3, 3, 1))]
        found.append((sum(p * x for p, (x, _) in zip(parts, points)), sum(p * y for p, (_, y) in zip(parts, points))))
    return found


class Lance:
    """A lance between two points; ``at`` gives places along (0 butt, 1 tip) and across it, in units of its length."""

    def __init__(self, butt: Point, tip: Point) -> None:
        self.butt, self.tip = butt, tip
        self.length = math.dist(butt, tip)
        self.along = tuple((b - a) / self.length for a, b in zip(butt, tip))

    def at(self, along: float, across: float = 0.0) -> Point:
        (x, y), (dx, dy) = self.butt, self.along
        return x + self.length * (along * dx - across * dy), y + self.length * (along * dy + across * dx)

    def half(self, outline: Sequence[Point], side: int) -> list[Point]:
        """The outline (along, across) of one side, closed along the middle."""
        edge = [self.at(along, side * across) for along, across in outline]
        return [*edge, self.at(outline[-1][0]), self.at(outline[0][0])]

    def part(self, canvas: Canvas, outline: Sequence[Point], light: tuple[int, ...], dark: tuple[int, ...]) -> None:
        canvas.polygon(self.half(outline, -1), light)
        canvas.polygon(self.half(outline, 1), dark)

    def paint(self, canvas: Canvas) -> None:
        self.part(canvas, [(0.0, 0.014), (0.10, 0.021), (0.19, 0.026)], STEEL, SHADE)
        self.part(canvas, [(0.205, 0.100), (0.240, 0.094), (0.36, 0.027)], GRIP, BRONZE)
        self.part(canvas, [(0.35, 0.027), (0.78, 0.018)], STEEL, SHADE)
        self.part(
            canvas, [(0.74, 0.018), (0.775, 0.040), (0.815, 0.053), (0.86, 0.048), (0.93, 0.027), (1.0, 0.0)], STEEL, SHADE
        )


def streamers(canvas: Canvas, starts: Sequence[Point], ends: Sequence[Point], width: float) -> None:
    """Links with a socket at the end, as the page draws them."""
    for start, end, colour in zip(starts, ends, (MODEL, CLIP, VAE)):
        pull = 0.6 * (end[0] - start[0])
        canvas.curve([start, (start[0] + pull, start[1]), (end[0] - pull, end[1]), end], width, colour)
        canvas.disc(end, width * 1.5, colour)


def rounded(image: Image.Image, radius: int) -> Image.Image:
    mask = Image.new("L", (image.width * SCALE, image.height * SCALE))
    ImageDraw.Draw(mask).rounded_rectangle([0, 0, mask.width - 1, mask.height - 1], radius * SCALE, fill=255)
    image.putalpha(mask.resize(image.size, Image.Resampling.LANCZOS))
    return image


def icon() -> Image.Image:
    canvas = Canvas(400, 400)
    canvas.gradient(NIGHT, DUSK)
    lance = Lance((42, 358), (362, 38))
    starts = [lance.at(along) for along in (0.66, 0.57, 0.48)]
    streamers(canvas, starts, [(342, 194), (342, 264), (342, 334)], 17)
    lance.paint(canvas)
    return rounded(canvas.finished(), 84)


def dots(canvas: Canvas, step: int) -> None:
    """The page's grid, faintly."""
    for x in range(step // 2, canvas.width, step):
        for y in range(step // 2, canvas.height, step):
            canvas.disc((x, y), 1.6, (255, 255, 255, 255))


def banner() -> Image.Image:
    ground = Canvas(1680, 720)
    ground.gradient(NIGHT, DUSK)
    grid = Canvas(1680, 720)
    dots(grid, 40)
    image = Image.blend(ground.finished(), Image.alpha_composite(ground.finished(), grid.finished()), 0.10)
    canvas = Canvas(1680, 720)
    lance = Lance((900, 640), (1600, 80))
    streamers(canvas, [lance.at(along) for along in (0.66, 0.57, 0.48)], [(1590, 350), (1590, 475), (1590, 600)], 26)
    lance.paint(canvas)
    drawn = canvas.finished()
    glow = ImageChops.multiply(drawn, Image.new("RGBA", drawn.size, (255, 255, 255, 120))).filter(ImageFilter.GaussianBlur(28))
    image = Image.alpha_composite(Image.alpha_composite(image, glow), drawn)
    write(image, (110, 246), "Lance Native", 128, (255, 255, 255), 2)
    write(image, (116, 418), "Draws, edits and answers, with the nodes", 43, (203, 204, 226), 0)
    write(image, (116, 474), "that you know. For ComfyUI.", 43, (203, 204, 226), 0)
    return image.convert("RGB")


def write(image: Image.Image, at: Point, text: str, size: int, colour: tuple[int, ...], weight: int) -> None:
    """Pillow's own typeface, so that every machine draws the same."""
    ImageDraw.Draw(image).text(at, text, colour, ImageFont.load_default(size), stroke_width=weight, stroke_fill=colour)


def main() -> None:
    TARGET.mkdir(parents=True, exist_ok=True)
    icon().save(TARGET / "icon.png", optimize=True)
    banner().save(TARGET / "banner.png", optimize=True)


if __name__ == "__main__":
    main()
