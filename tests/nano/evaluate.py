"""What Nano can do, measured on held-out prompts through ``LancePipeline`` -> ``RESULTS.md``.

python tests/nano/evaluate.py [--number 200] [--write]
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from lance_runtime import Guidance, LancePipeline  # noqa: E402
from lance_runtime import context as context_room  # noqa: E402
from lance_runtime.types import Modality  # noqa: E402
from nano.score import same_scene, same_things, seen  # noqa: E402
from nano.tasks import Example, examples, frames  # noqa: E402
from nano.world import Clip, Scene, draw_scene, render  # noqa: E402

NANO = ROOT / "lance_runtime" / "nano"
RESULTS = Path(__file__).with_name("RESULTS.md")
UNCHANGED = 6.0  # of 255: the mean difference that the rest of an edited picture may have
TURNS = tuple(range(0, 70, 5))
SEED = 2026


def run(pipe: LancePipeline, example: Example, seed: int = 0, **settings: Any) -> np.ndarray | str:
    """Frames uint8 (T, H, W, 3), or the answer."""
    sources = [frames(source) for source in example.sources]
    given: dict[str, Any] = {}
    if example.task in ("video_edit", "x2t_video"):
        given = {"video": sources[0], "fps": 12.0}
    elif sources:
        given = {"images": [source[0] for source in sources]}
    if example.answers:
        return str(pipe(example.task, question=example.prompt, max_new_tokens=40, **given).text)
    return pipe(example.task, example.prompt, seed=seed, **given, **settings).frames


def right_things(made: np.ndarray, example: Example) -> bool:
    """The shapes and colours that were asked for, no others."""
    return same_things(seen(made[0]), wanted_scene(example))


def right_scene(made: np.ndarray, example: Example) -> bool:
    return same_scene(seen(made[0]), wanted_scene(example))


def wanted_scene(example: Example) -> Scene:
    if not isinstance(example.wanted, Scene):
        raise TypeError(f"{example.task} wants no scene")
    return example.wanted


def right_edit(made: np.ndarray, example: Example) -> bool:
    """The scene that was asked for, and the rest of the picture as it was."""
    return right_scene(made, example) and rest_error(made[0], example) <= UNCHANGED


def rest_error(picture: np.ndarray, example: Example) -> float:
    """Mean difference from the right picture where the edit changes nothing."""
    before, after = render(example.sources[0]).astype(int), render(wanted_scene(example)).astype(int)  # type: ignore[arg-type]
    changed = ndimage.binary_dilation(np.abs(before - after).max(-1) > 8, iterations=4)
    difference = np.abs(picture.astype(int) - after).mean(-1)
    return float(difference[~changed].mean()) if (~changed).any() else 0.0


def right_motion(made: np.ndarray, example: Example) -> bool:
    """One thing throughout, of the right shape and colour, that does what was asked for."""
    clip = example.wanted
    if not isinstance(clip, Clip):
        raise TypeError(f"{example.task} wants no clip")
    angles = TURNS if clip.motion == "turns" else (0,)
    found = [seen(made[index], angles) for index in (0, len(made) - 1)]
    wanted = (clip.thing.shape, clip.thing.colour)
    if any(len(scene.things) != 1 or (scene.things[0].shape, scene.things[0].colour) != wanted for scene in found):
        return False
    return motion_of(*(scene.things[0] for scene in found)) == clip.motion


def motion_of(first: Any, last: Any) -> str:
    """What happened between two sights of a thing."""
    right, down = last.x - first.x, last.y - first.y
    if math.hypot(right, down) > 14:
        return ("right" if right > 0 else "left") if abs(right) > abs(down) else ("down" if down > 0 else "up")
    if not 0.78 < last.size / first.size < 1.28:
        return "grows" if last.size > first.size else "shrinks"
    return "turns" if abs(last.angle - first.angle) >= 20 else "stands"


def keeps_first(made: np.ndarray, example: Example) -> bool:
    return float(np.abs(made[0].astype(int) - frames(example.sources[0])[0]).mean()) <= UNCHANGED


def right_answer(made: str, example: Example) -> bool:
    return made.strip() == example.wanted


Judge = Callable[[Any, Example], bool]
# Name, task, what is drawn, judge, gate.
MEASURED: tuple[tuple[str, str, dict[str, Any], Judge, float | None], ...] = (
    ("text to image: one thing, colour and shape", "t2i", {"count": 1}, right_things, 0.9),
    ("text to image: two things", "t2i", {"count": 2}, right_things, None),
    ("text to image: three things", "t2i", {"count": 3}, right_things, None),
    ("edit: colour, the rest unchanged", "image_edit", {"kind": "colour"}, right_edit, 0.8),
    ("edit: remove", "image_edit", {"kind": "remove"}, right_edit, None),
    ("edit: move", "image_edit", {"kind": "move"}, right_edit, None),
    ("edit: add", "image_edit", {"kind": "add"}, right_edit, None),
    ("edit: background", "image_edit", {"kind": "background"}, right_scene, None),
    ("question: colour", "x2t_image", {"kind": "colour"}, right_answer, 0.9),
    ("question: shape", "x2t_image", {"kind": "shape"}, right_answer, 0.9),
    ("question: how many", "x2t_image", {"kind": "count"}, right_answer, 0.9),
    ("question: left or right", "x2t_image", {"kind": "side"}, right_answer, 0.9),
    ("question: background", "x2t_image", {"kind": "background"}, right_answer, 0.9),
    ("caption, word for word", "x2t_image", {"kind": "caption"}, right_answer, None),
    ("question about a clip: what moves where", "x2t_video", {"kind": "motion"}, right_answer, 0.9),
    ("text to video: thing and motion", "t2v", {}, right_motion, None),
    ("image to video: first frame kept", "i2v", {}, keeps_first, None),
    ("image to video: thing and motion", "i2v", {}, right_motion, None),
    ("subject in a picture: shape and colour kept", "subject_image", {"count": 1}, right_things, None),
    ("two subjects in a picture", "subject_image", {"count": 2}, right_things, None),
    ("subject in a clip: thing and motion", "subject_video", {}, right_motion, None),
    ("edit of a clip: thing and motion", "video_edit", {}, right_motion, None),
)


def interval(right: int, number: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    share, spread = right / number, z * z / number
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / number + spread / (4 * number))
    return max(0.0, middle - half), min(1.0, middle + half)


def measure(
    pipe: LancePipeline, task: str, drawn: dict[str, Any], judges: list[Judge], number: int, **settings: Any
) -> list[int]:
    """How many of the held-out examples each judge finds right."""
    counts = [0] * len(judges)
    for index, example in enumerate(examples(SEED, task, number, **drawn)):
        made = run(pipe, example, index, **settings)
        for place, judge in enumerate(judges):
            counts[place] += judge(made, example)
    return counts


def through_vae(pipe: LancePipeline, shown: np.ndarray) -> np.ndarray:
    """Frames uint8 (T, H, W, 3), encoded and decoded."""
    pixels = torch.tensor(shown).movedim(-1, 0).float().div(127.5).sub(1)
    return pipe.components.vae.decode(pipe.components.vae.encode(pixels)).numpy()


def measure_vae(pipe: LancePipeline, number: int) -> int:
    """Pictures whose things keep shape and colour through encoding and decoding."""
    rng = random.Random(SEED)
    scenes = [draw_scene(rng, held_out=True) for _ in range(number)]
    return sum(same_things(seen(through_vae(pipe, render(scene)[None])[0]), scene) for scene in scenes)


def measure_vae_clips(pipe: LancePipeline, number: int) -> int:
    """Clips whose thing keeps shape, colour and motion: no clip that is drawn comes out better."""
    return sum(right_motion(through_vae(pipe, frames(one.wanted)), one) for one in examples(SEED, "t2v", number))  # type: ignore[arg-type]


@contextmanager
def positions_changed(change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """``change`` in the place of MaPE: positions (3, L) and the modality of each token -> positions."""
    kept = context_room.apply_mape
    context_room.apply_mape = change  # type: ignore[assignment]
    try:
        yield
    finally:
        context_room.apply_mape = kept


def without_mape(pipe: LancePipeline) -> AbstractContextManager[None]:
    return positions_changed(lambda positions, modality: positions)


def shifted_positions(pipe: LancePipeline) -> AbstractContextManager[None]:
    """The target one row and one column beside its place."""
    mape = context_room.apply_mape

    def shifted(positions: torch.Tensor, modality: torch.Tensor) -> torch.Tensor:
        moved = mape(positions, modality)
        moved[1:, modality == Modality.TARGET] += 1
        return moved

    return positions_changed(shifted)


@contextmanager
def swapped_experts(pipe: LancePipeline) -> Iterator[None]:
    model = pipe.components.model

    def swap() -> None:
        state = model.state_dict()
        model.load_state_dict({_other(name, state): value.clone() for name, value in state.items()})

    swap()
    try:
        yield
    finally:
        swap()


def _other(name: str, state: dict) -> str:
    if "_moe_gen" in name:
        return name.replace("_moe_gen", "")
    parts = name.split(".")
    return next(
        (
            other
            for i in range(len(parts))
            if (other := ".".join([*parts[:i], parts[i] + "_moe_gen", *parts[i + 1 :]])) in state
        ),
        name,
    )


@contextmanager
def unchanged(pipe: LancePipeline) -> Iterator[None]:
    yield


# Rows that need more examples: guidance saves one prompt in sixteen, which the intervals of 200 cannot tell from none.
MORE = {"text to image: three things": 600}
NO_GUIDANCE = {"guidance": Guidance(scale=1.0)}  # what an unconditional pass that is fed the prompt amounts to
ABLATIONS: tuple[tuple[str, Callable, dict[str, Any], tuple[str, ...]], ...] = (
    ("MaPE off", without_mape, {}, ("edit: move", "two subjects in a picture")),
    ("experts swapped", swapped_experts, {}, ("text to image: one thing, colour and shape", "question: colour")),
    ("target's positions shifted", shifted_positions, {}, ("text to image: one thing, colour and shape", "edit: remove")),
    ("unconditional pass fed the prompt", unchanged, NO_GUIDANCE, ("text to image: two things", "text to image: three things")),
)


VAE_ROWS: tuple[tuple[str, Callable[[LancePipeline, int], int], float | None], ...] = (
    ("VAE: shape and colour kept", measure_vae, 0.97),
    ("VAE: a clip's thing and motion kept", measure_vae_clips, None),
)
_loaded: dict[str, LancePipeline] = {}  # of a process


def load(model: Path) -> None:
    torch.set_num_threads(1)
    _loaded["pipe"] = LancePipeline.from_pretrained(model, "image", device="cpu")


def count_right(names: list[str], number: int, broken: str = "") -> list[int]:
    """How many of ``number`` examples are right, by the judges of rows that share them; broken: the title of an ablation."""
    pipe = _loaded["pipe"]
    kept = [measured(pipe, number) for name, measured, _ in VAE_ROWS if name in names]
    if kept:
        return kept
    rows = [row for row in MEASURED if row[0] in names]
    change, settings = next(((change, more) for title, change, more, _ in ABLATIONS if title == broken), (unchanged, {}))
    with change(pipe):
        return measure(pipe, rows[0][1], rows[0][2], [judge for _, _, _, judge, _ in rows], number, **settings)


def sharing(rows: list[str]) -> Iterator[list[str]]:
    """Names of rows that are measured on the same examples."""
    drawn = {name: str((task, how)) for name, task, how, _, _ in MEASURED}
    for _, group in groupby(rows, key=lambda name: drawn.get(name, name)):
        yield list(group)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=NANO)
    parser.add_argument("--number", type=int, default=200)
    parser.add_argument("--ungated", type=int, default=200, help="examples for rows without a gate")
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--ablations", action="store_true")
    parser.add_argument("--write", action="store_true", help="write RESULTS.md")
    options = parser.parse_args()
    gates = {name: gate for name, _, gate in VAE_ROWS} | {name: gate for name, _, _, _, gate in MEASURED}
    jobs = [(names, "") for names in sharing([name for name in gates if options.only in name])]
    if options.ablations:
        jobs += [([name], title) for title, _, _, names in ABLATIONS for name in names if options.only in name]
    found: dict[tuple[str, str], int] = {}
    with ProcessPoolExecutor(options.processes, initializer=load, initargs=(options.model,)) as pool:
        numbers = {name: options.number if gate is not None else options.ungated for name, gate in gates.items()} | MORE
        waiting = [(names, broken, pool.submit(count_right, names, numbers[names[0]], broken)) for names, broken in jobs]
        for names, broken, future in waiting:
            found |= {(name, broken): right for name, right in zip(names, future.result(), strict=True)}
            print(broken, {name: found[name, broken] for name in names}, flush=True)
    text = RESULTS_HEAD + "\n".join(tables(found, gates, numbers)) + "\n"
    print(text)
    if options.write:
        RESULTS.write_text(text, "utf-8")


PARTS = "What the parts are for: the same examples without them. Where the intervals overlap, the task does without the part."


def tables(found: dict[tuple[str, str], int], gates: dict[str, float | None], numbers: dict[str, int]) -> Iterator[str]:
    """What is right by row, and beside it what a broken network gets right of the same examples."""
    yield from ("| what | right | of | 95 % interval | gate |", "| --- | ---: | ---: | --- | --- |")
    for (name, broken), right in found.items():
        if not broken:
            gate, number = gates[name], numbers[name]
            verdict = "" if gate is None else f"{100 * gate:.0f} %: {'passed' if right / number >= gate else 'missed'}"
            yield f"| {name} | {shares(right, number)} | {verdict} |"
    if any(broken for _, broken in found):
        yield from ("", PARTS, "")
        yield "| without | what | right | of | 95 % interval | with | of | 95 % interval |"
        yield "| --- | --- | ---: | ---: | --- | ---: | ---: | --- |"
        for (name, broken), right in found.items():
            if broken:
                yield f"| {broken} | {name} | {shares(right, numbers[name])} | {shares(found[name, ''], numbers[name])} |"


def shares(right: int, number: int) -> str:
    low, high = interval(right, number)
    return f"{100 * right / number:.1f} % | {number} | {100 * low:.1f} to {100 * high:.1f} %"


RESULTS_HEAD = """# What Lance Nano can do

Measured by `python tests/nano/evaluate.py --ablations --write` on held-out examples (their combinations of colour, shape
and background never occur in training), with the files that ship, through `LancePipeline`: 30 steps, cfg 4,
float32 on a CPU. A picture is right where the scorer (`score.py`) reads the right things back from its pixels; the scorer
itself is right on all true renders (`test_nano_world.py`). One fifth of the prompts is Chinese.

"""


if __name__ == "__main__":
    main()
