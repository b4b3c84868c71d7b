"""Commands beside the nine tasks: ``download``, ``quantize`` and ``convert``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from .checkpoint import TensorFile
from .convert import convert, find_quantised
from .denoise import flow_sigmas
from .dequantize import plain_tensors
from .files import VARIANT_FOLDERS, find_model, find_sources
from .memory import checked_device, is_out_of_memory
from .pipeline import LancePipeline
from .quant_error import Comparison, Settings, compare
from .quant_formats import FORMATS
from .quantize import SCOPES, Plan, Written, quantize
from .terminal import DTYPES, Parser, Progress
from .types import PixelShape

QUANTIZE = """Write a quantised copy of a Lance checkpoint that ComfyUI loads natively, and say what that costs.

The file carries configuration and tokenizer in its header; put it into ComfyUI/models/diffusion_models. Embeddings, head,
norms, glue, the vision tower and (unless --keep-layers says otherwise) the first and the last layer stay in bfloat16.
Then the network runs with both weights on the same inputs: pictures on their way, and a question about them. The table has
relative errors: of the weights of each layer, and of what comes out behind it. --model needs the whole tree for that.
"""
CONVERT = """Write a bfloat16 copy of a quantised Lance file: the community's AWQ-INT4 and NVFP4, or ComfyUI's formats."""


def download_parser() -> Parser:
    parser = Parser(
        prog="python -m lance_runtime download",
        description="Fetch Lance's weights from the hub into ComfyUI's model folders. What is there is checked and kept, what "
        "was interrupted goes on where it stopped, and how much disk it takes is said before anything is fetched.",
    )
    parser.add_argument(
        "--variant",
        choices=("image", "video", "all"),
        default="image",
        help="for pictures (with the vision tower), for clips, or both (default: %(default)s)",
    )
    parser.add_argument(
        "--to", type=Path, metavar="MODELS", help="ComfyUI's models folder (default: that of the ComfyUI around this pack)"
    )
    return parser


def run_download(arguments: Sequence[str]) -> str:
    """Fetch a variant from the hub; returns the line to print at the end."""
    options = download_parser().parse_args(arguments)
    if not Path(__file__).with_name("download.py").is_file():
        raise ValueError(
            "This copy holds no download.py: the registry's archive leaves out what talks to the network.\n"
            "Run the command in a git clone, or fetch the files by hand as the README says."
        )
    from .download import Hub, download, make_plan, models_around

    models = options.to or models_around(Path(__file__))
    if models is None:
        raise ValueError("This pack is in no ComfyUI's custom_nodes.\nSay where the files are to go: --to .../ComfyUI/models")
    hub = Hub()
    plan = make_plan(models, options.variant, hub)
    for line in plan.lines():
        tqdm.write(line)
    download(plan, hub, tqdm.write)
    return f"{len(plan.files)} files of the {options.variant} variant are complete in {models}"


def quantize_parser() -> Parser:
    parser = Parser(
        "python -m lance_runtime quantize", description=QUANTIZE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, required=True, metavar="PATH", help="the hub's tree, ComfyUI's models folder, or a single file"
    )
    parser.add_argument("--variant", choices=tuple(VARIANT_FOLDERS), default="image", help="checkpoint (default: %(default)s)")
    parser.add_argument(
        "--format", choices=tuple(FORMATS), required=True, help="fp8, int8, mxfp8: nearly 60 % of the size; nvfp4: 40 %"
    )
    parser.add_argument(
        "--scope", choices=SCOPES, default="both", help="expert: gen draws, und reads and answers (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, required=True, help="file to write, .safetensors")
    parser.add_argument("--keep-layers", default="0,-1", help="layers to leave alone; '' for none (default: %(default)s)")
    parser.add_argument("--no-measure", action="store_true", help="write the file and do not run the network")
    parser.add_argument("--prompt", action="append", default=[], help="measure with this; may be repeated (default: bundled)")
    parser.add_argument("--size", type=int, default=512, help="pixels of the pictures to measure with (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="steps of these pictures (default: %(default)s)")
    parser.add_argument("--report", type=Path, help="write all errors, weight by weight, as JSON")
    parser.add_argument("--device", help="to measure on (default: the accelerator that torch finds)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="to measure in (default: bfloat16, float32 on a CPU)")
    return parser


def convert_parser() -> Parser:
    parser = Parser("python -m lance_runtime convert", description=CONVERT)
    parser.add_argument("--model", type=Path, required=True, metavar="FILE", help="the quantised file, or its folder")
    parser.add_argument("--output", type=Path, required=True, help="file to write, .safetensors")
    parser.add_argument(
        "--files", type=Path, metavar="FOLDER", help="where llm_config.json and the tokenizer are (Lance_3B of the hub)"
    )
    return parser


def run_quantize(arguments: Sequence[str]) -> str:
    """Do it; returns the lines to print."""
    options = quantize_parser().parse_args(arguments)
    plan = Plan(options.format, options.scope, _layers(options.keep_layers))
    file = TensorFile(find_model(options.model, options.variant))
    if not options.no_measure:
        _check_can_be_measured(options)
    if options.report is not None:
        options.report.parent.mkdir(parents=True, exist_ok=True)
    with Progress("writing", "B") as bar:
        written = quantize(file, options.output, plan, bar)
    result, notes = None, _without_tokenizer(options.output)
    try:
        result = None if options.no_measure else _measured(options, written)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        notes.append(f"Not measured: {str(error).splitlines()[0]} Measure with --device cpu.")
    if options.report is not None:
        values = {"weights": written.errors, **({} if result is None else asdict(result))}
        options.report.write_text(json.dumps(values, indent=1) + "\n", "utf-8")
    return "\n".join([*notes, *table(written, result), str(options.output)])


def run_convert(arguments: Sequence[str]) -> str:
    """Do it; returns the lines to print."""
    options = convert_parser().parse_args(arguments)
    file = find_quantised(options.model)
    with Progress("writing", "B") as bar:
        count = convert(file, options.output, bar, options.files)
    lines = [f"{count} quantised weights are bfloat16 now.", str(options.output)]
    return "\n".join([*_without_tokenizer(options.output, " name the folder of the original with --files, or"), *lines])


def _without_tokenizer(path: Path, advice: str = "") -> list[str]:
    """A line about a file that cannot stand alone."""
    alone = {"tokenizer_json", "vocab_json"} & set(TensorFile(path).metadata)
    return [] if alone else [f"No tokenizer was found:{advice} put its files beside the copy."]


def _check_can_be_measured(options: argparse.Namespace) -> None:
    """Before minutes are spent on writing."""
    checked_device(options.device)
    try:
        import diffusers  # noqa: F401
    except ImportError as error:
        said = "To measure, the network runs outside ComfyUI, and diffusers is missing."
        raise ValueError(
            f"{said}\nInstall the extra 'standalone' of pyproject.toml, or write the file alone: --no-measure"
        ) from error
    PixelShape(1, options.size, options.size).latent()
    flow_sigmas(options.steps)
    try:
        find_sources(options.model, options.variant)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} Or write the file without measuring: --no-measure.") from error


def _measured(options: argparse.Namespace, written: Written) -> Comparison:
    pipe = LancePipeline.from_pretrained(options.model, options.variant, options.device, DTYPES.get(options.dtype))
    settings = Settings(tuple(options.prompt), size=options.size, steps=options.steps)
    with Progress("measuring", "run") as bar:
        return compare(pipe, plain_tensors(TensorFile(written.path)), settings, bar)


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ValueError(
            f"Layers {text!r} are no numbers with commas between them.\nUse 0,-1 for the first and last."
        ) from error


def table(written: Written, result: Comparison | None) -> list[str]:
    """Lines with the errors, layer by layer, and of the network as a whole."""
    weights: dict[int, dict[bool, list[float]]] = {}
    for name, error in written.errors.items():
        weights.setdefault(int(name.split(".")[3]), {}).setdefault("_moe_gen" in name, []).append(error)
    behind = [] if result is None else result.layers
    lines = [
        f"{'layer':>5}  {'weights und':>11}  {'weights gen':>11}" + (f"  {'drawing':>8}  {'answering':>9}" if behind else "")
    ]
    for layer in range(max([len(behind), *(index + 1 for index in weights)])):
        errors = [weights.get(layer, {}).get(gen) for gen in (False, True)]
        cells = [_percent(sum(found) / len(found)) if found else "-" for found in errors]
        row = f"{layer:>5}  {cells[0]:>11}  {cells[1]:>11}"
        lines.append(row + (f"  {_percent(behind[layer][0]):>8}  {_percent(behind[layer][1]):>9}" if behind else ""))
    if result is not None:
        lines += [f"velocity at sigma {sigma:.3f}: {_percent(error)}" for sigma, error in result.velocities]
        lines.append(
            f"logits: {_percent(result.logits)}; the likeliest token is the same for {result.same} of {result.answer_tokens}"
        )
    lines.append(f"{len(written.errors)} weights quantised; {_size(written.before)} in bfloat16 are {_size(written.after)}")
    return lines


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


COMMANDS = {"download": run_download, "quantize": run_quantize, "convert": run_convert}
