"""The command line: ``python -m lance_runtime TASK --model FOLDER ...`` and its commands (``commands.py``)."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .checkpoint import TensorFile
from .commands import COMMANDS
from .files import NANO, VIT_CHOICES, find_model, read_config
from .guidance import RENORM_KINDS, UNCOND_POSITIONS, Guidance
from .media import check_suffix, read_image, read_video, write_image, write_video
from .memory import OFFLOAD_KINDS, is_out_of_memory
from .pipeline import LancePipeline, Output
from .preprocess import presets
from .prompts import TASKS, UNDERSTANDING_TASKS, UNSEEING_TASKS, VIDEO_TASKS
from .terminal import DTYPES, Parser, Progress
from .types import VIDEO_FPS

DESCRIPTION = "Draw, edit and understand pictures and clips with ByteDance's Lance."
EPILOG = """tasks:
  t2i            a picture from a prompt
  t2v            a clip from a prompt (the video checkpoint, as for all tasks with a clip)
  i2v            a clip that begins with --image
  image_edit     --image changed as the prompt says (several --image: the last gives the size)
  video_edit     --video changed as the prompt says
  subject_image  the subjects of one or more --image in a new picture
  subject_video  the same in a clip
  x2t_image      an answer to --question about one or more --image (no question: a caption)
  x2t_video      an answer to --question about --video

examples:
  python -m lance_runtime t2i --prompt "a big red star on a pink background" --output star.png
  python -m lance_runtime t2i --model Lance --prompt "A red fox in the snow, close-up" --output fox.png
  python -m lance_runtime image_edit --model Lance --image fox.png --prompt "Make it night." --output night.png
  python -m lance_runtime t2v --model Lance --prompt "A fox runs towards the camera" --frames 49 --output fox.mp4
  python -m lance_runtime x2t_image --model Lance --image fox.png --question "What animal is it?"

commands (each with a --help of its own):
  download       fetch the weights from the hub into ComfyUI's model folders
  quantize       write a smaller checkpoint for ComfyUI (fp8, int8, nvfp4, mxfp8) and say what it costs
  convert        make a quantised file bfloat16 again

--model is the folder that holds Lance_3B/, Lance_3B_Video/, Qwen2.5-VL-ViT/ and Wan2.2_VAE.pth as on the hub
(bytedance-research/Lance), or ComfyUI's models folder with them in its own folders. Long, literal prompts that name
camera and motion work best; 30 steps, shift 3.5 and guidance 4 are the model's own settings. Sizes are multiples of
16, frame counts 4k+1, clips play at 12 a second.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m lance_runtime",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", choices=TASKS, metavar="TASK", help="one of the nine tasks below")
    for add in (_add_model, _add_inputs, _add_drawing, _add_guidance, _add_answer):
        add(parser)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        type=Path,
        default=NANO,
        metavar="PATH",
        help="folder or file of the weights (default: the built-in Lance Nano, which knows plain shapes and colours only)",
    )
    group.add_argument("--variant", choices=("image", "video"), help="checkpoint (default: video for tasks with a clip)")
    group.add_argument(
        "--vit",
        choices=VIT_CHOICES,
        default="auto",
        help="vision tower: the checkpoint's own, the separate one or none (default: its own where it has one)",
    )
    group.add_argument("--device", help="cpu, cuda, mps, ... (default: the accelerator that torch finds)")
    group.add_argument("--dtype", choices=tuple(DTYPES), help="default: bfloat16 on an accelerator, float32 on a CPU")
    group.add_argument(
        "--offload",
        choices=OFFLOAD_KINDS,
        default="none",
        help="none: all on the device; model: one part at a time; layer: weights pass through, for cards smaller than the "
        "network (default: %(default)s)",
    )
    group.add_argument("--compile", action="store_true", help="torch.compile the layers: slow at first, faster after")
    group.add_argument(
        "--cuda-graphs", action="store_true", help="launch a step as one CUDA graph, where the CPU is the bottleneck"
    )
    group.add_argument("--tiled-vae", action="store_true", help="encode and decode pictures in tiles, in less memory")


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to do")
    group.add_argument("--prompt", default="", help="what to draw or change")
    group.add_argument("--negative-prompt", help="what to keep away from (default: no prompt at all)")
    group.add_argument("--image", type=Path, action="append", default=[], help="a source or reference; may be repeated")
    group.add_argument(
        "--video",
        type=Path,
        help="a source video (seen at 12 frames a second; of more than 6 s, 69 frames over all of it)",
    )
    group.add_argument("--question", default="", help="for the x2t tasks; without one they describe what they see")
    group.add_argument("--instruction", help="system sentence of your own instead of the task's")
    group.add_argument("--output", type=Path, help="file to write (default: TASK.png, TASK.mp4, or the terminal)")


def _add_drawing(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("drawing")
    group.add_argument("--height", type=int, help="pixels, a multiple of 16 (default: as trained: 768, clips 480)")
    group.add_argument("--width", type=int, help="pixels, a multiple of 16 (default: as trained: 768, clips 848)")
    group.add_argument(
        "--frames", type=int, help="frames of a clip, 4k+1 (default: 49, and trained up to 121; of Lance Nano 9)"
    )
    group.add_argument("--resolution", choices=presets(), help="size class of sources (default: the largest that was trained)")
    group.add_argument("--steps", type=int, default=30, help="denoising steps (default: %(default)s)")
    group.add_argument("--shift", type=float, default=3.5, help="schedule shift (default: %(default)s)")
    group.add_argument("--seed", type=int, default=42, help="of the noise, or of sampled text (default: %(default)s)")
    group.add_argument(
        "--batch", type=int, default=1, help="number of results; their seeds count up from --seed and end the files' names"
    )


def _add_guidance(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("guidance")
    group.add_argument("--guidance", type=float, default=4.0, help="scale; 1 turns it off (default: %(default)s)")
    group.add_argument("--visual-guidance", type=float, default=1.0, help="scale on the sources (default: %(default)s)")
    group.add_argument(
        "--interval",
        type=float,
        nargs=2,
        default=(0.4, 1.0),
        metavar=("LOW", "HIGH"),
        help="sigmas with guidance (default: 0.4 1.0)",
    )
    group.add_argument(
        "--renorm", choices=RENORM_KINDS, default="global", help="keep the norm of the unguided velocity (default: %(default)s)"
    )
    group.add_argument("--renorm-min", type=float, default=0.0, help="renorm shrinks no further (default: %(default)s)")
    group.add_argument(
        "--uncond-positions",
        choices=UNCOND_POSITIONS,
        default="cached",
        help="how positions count without a prompt: the reference's default (cached) or its other path (dense)",
    )


def _add_answer(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("answering")
    group.add_argument("--max-new-tokens", type=int, default=256, help="length of an answer at most (default: %(default)s)")
    group.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: %(default)s)")
    group.add_argument("--top-p", type=float, default=1.0, help="share of probability to sample from (default: %(default)s)")


def arguments_of(options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """The pipeline's arguments from the command line's. seconds: the longest video that the model sees whole."""
    arguments: dict[str, Any] = {
        "images": [read_image(path) for path in options.image],
        "guidance": Guidance(
            scale=options.guidance,
            interval=tuple(options.interval),
            renorm=options.renorm,
            renorm_min=options.renorm_min,
            visual_scale=options.visual_guidance,
            uncond_positions=options.uncond_positions,
        ),
        "num_frames": options.frames,
    }
    same = "negative_prompt question instruction height width resolution steps shift seed batch max_new_tokens"
    same += " temperature top_p"
    arguments.update({name: getattr(options, name) for name in same.split()})
    if options.video is not None:
        arguments["video"], arguments["fps"] = read_video(options.video, seconds), VIDEO_FPS
    return arguments


def run(options: argparse.Namespace) -> str:
    """Do the task and write its file; returns the line to print."""
    output = output_of(options)
    variant = options.variant or ("video" if options.task in VIDEO_TASKS else "image")
    sizes = read_config(TensorFile(find_model(options.model, variant))).sizes
    arguments = arguments_of(options, sizes.seconds)  # sources are refused before the weights are read
    dtype = DTYPES.get(options.dtype)
    pipe = LancePipeline.from_pretrained(
        options.model,
        variant,
        device=options.device,
        dtype=dtype,
        # 1.3 GB that need not be loaded, nor be there.
        vit="none" if options.vit == "auto" and options.task in UNSEEING_TASKS else options.vit,
        offload=options.offload,
        tiled_vae=options.tiled_vae,
        compile=options.compile,
        cuda_graphs=options.cuda_graphs,
    )
    with Progress(options.task, "token" if options.task in UNDERSTANDING_TASKS else "step") as progress:
        out = pipe(options.task, options.prompt, progress=progress, **arguments)
    if options.batch == 1:
        return save(out, output, options.task)
    seeds = range(options.seed, options.seed + options.batch)
    return "\n".join(
        save(one, output and output.with_stem(f"{output.stem}_{seed}"), options.task)
        for one, seed in zip(out.apart(), seeds, strict=True)
    )


def output_of(options: argparse.Namespace) -> Path | None:
    """The file to write, None for an answer that is only printed; refused before anything is computed."""
    if options.output is not None and options.output.is_dir():
        raise ValueError(f"{options.output} is a folder.\nName a file in it.")
    if options.task in UNDERSTANDING_TASKS:
        return options.output
    video = options.task in VIDEO_TASKS
    path = options.output or Path(f"{options.task}.{'mp4' if video else 'png'}")
    check_suffix(path, video)
    return path


def save(out: Output, path: Path | None, task: str) -> str:
    if path is None:
        return out.text or ""
    path.parent.mkdir(parents=True, exist_ok=True)
    if out.text is not None:
        path.write_text(out.text + "\n", "utf-8")
        return out.text
    if task in VIDEO_TASKS:
        write_video(path, out.frames)
    else:
        write_image(path, out.frames[0])
    return str(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, 2 with one line on what is wrong, or 130 where a download was stopped."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    command = COMMANDS.get(arguments[0]) if arguments else None
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # an answer in Chinese, on a terminal that knows none
    try:
        print(command(arguments[1:]) if command else run(build_parser().parse_args(arguments)))
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        print(f"error: {str(error).splitlines()[0]} Add --offload layer, and --tiled-vae.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if command is not COMMANDS["download"]:
            raise
        print("stopped: the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
