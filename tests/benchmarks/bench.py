"""``make bench``: how fast the parts are, one JSON line a measurement, with random weights of any size.

The share of a denoising step, ``share_of_mm``, is the rate of its linear layers and attention (operations that were
counted while it ran, over the whole time of the step) over the rate of ``torch.mm`` at the shapes of those same linear
layers. Both are timed in turns in one run, so that a busy machine slows both; ``share_of_mm`` is the median of the turns'
shares, ``share_of_best`` compares the fastest step with the fastest ``torch.mm``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from counting import attending, count, yardstick  # noqa: E402
from loading import bench_loading, draw_weights, process_peak_bytes  # noqa: E402

from lance_runtime.config import LanceConfig  # noqa: E402
from lance_runtime.context import Context, Segment, VisionTokens, layout  # noqa: E402
from lance_runtime.decode import decode  # noqa: E402
from lance_runtime.denoise import BATCHED_TOKENS, Velocities  # noqa: E402
from lance_runtime.engine import Engine  # noqa: E402
from lance_runtime.kv_cache import KVCache  # noqa: E402
from lance_runtime.prefill import Branch, branch, prefill  # noqa: E402
from lance_runtime.terminal import DTYPES  # noqa: E402
from lance_runtime.types import LatentShape, Modality, PixelShape  # noqa: E402
from lance_runtime.vae import WanVAE, build_vae, original_name  # noqa: E402

REAL_WIDTH = {"hidden": 2048, "layers": 2, "height": 768, "width": 768, "vocabulary": 151936, "vae": 160}
SYSTEM_TOKENS, CLOSING_TOKENS = 32, 8  # about what the templates around a prompt take
GIGA = 1e9
COPIED = {"cpu": 256 * 2**20}  # bytes; of a card many more, beside which a launch is nothing
COPIED_ON_A_CARD = 2 * 2**30
RESULTS = Path(__file__).with_name("results.jsonl")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--real-width", action="store_true", help="two layers of Lance 3B's own width, 768 x 768, the real VAE's width")
    add("--hidden", type=int, default=512, help="a multiple of 128; heads and MLP keep the real proportions")
    add("--layers", type=int, default=4)
    add("--vocabulary", type=int, default=8192)
    add("--vae", type=int, default=40, help="base width of the VAE's encoder; its decoder has 8/5 of it (default: 40)")
    add("--height", type=int, default=256)
    add("--width", type=int, default=256)
    add("--frames", type=int, default=1)
    add("--prompt-tokens", type=int, default=128)
    add("--edit", action="store_true", help="put an edit source (ViT tokens and latents) into the context")
    add("--tokens", type=int, help="to decode (default: 32, and 256 with --cuda-graphs, whose recording takes some)")
    add("--dtype", choices=tuple(DTYPES), default="float32")
    add("--device", default="cpu")
    add("--threads", type=int, help="of the CPU (default: torch's own choice)")
    add("--until", choices=("loading", "network", "vae"), default="vae", help="the last thing to measure (default: vae)")
    add("--no-loading", action="store_true", help="draw the weights on the device, without a file")
    add("--compile", action="store_true", help="torch.compile the layers")
    add("--cuda-graphs", action="store_true", help="launch steps and tokens as CUDA graphs")
    add("--repeats", type=int, default=10, help="of which the median is taken (default: 10)")
    add("--seconds", type=float, default=5, help="end the repeats of all but the step after this time (default: 5)")
    add("--record", metavar="MACHINE", help="also append the results to results.jsonl, under this name of the machine")
    add("--profile", action="store_true", help="also write torch.profiler's table of a step to the error stream")
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser()
    if parser.parse_known_args(argv)[0].real_width:
        parser.set_defaults(**REAL_WIDTH)  # sizes given beside it still win
    options = parser.parse_args(argv)
    if options.hidden % 128:
        parser.error(f"--hidden {options.hidden} is not a multiple of 128, the width of a head")
    options.tokens = options.tokens or (256 if options.cuda_graphs else 32)
    return options


def config_of(options: argparse.Namespace) -> LanceConfig:
    real, heads = LanceConfig(), options.hidden // 128
    return replace(
        real,
        hidden_size=options.hidden,
        intermediate_size=real.intermediate_size * options.hidden // real.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 8),
        vocab_size=options.vocabulary,
    )


class Bench:
    """The device, its clock, and the stream of results."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device, self.dtype = options, torch.device(options.device), DTYPES[options.dtype]

    def emit(self, name: str, **values: Any) -> None:
        rounded = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in values.items()}
        print(json.dumps({"bench": name, **rounded}), flush=True)
        if self.options.record:
            same = ("dtype", "hidden", "layers", "compile", "cuda_graphs")
            known = {"machine": self.options.record, "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
            known |= {name: getattr(self.options, name) for name in same}
            with RESULTS.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"bench": name, **known, **rounded}) + "\n")

    def timed(self, run: Callable[[], object]) -> float:
        self.wait()
        start = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - start

    def median(self, run: Callable[[], object]) -> tuple[float, int]:
        """Median seconds after one run to warm up, and of how many; a run that takes all the time counts itself."""
        first, deadline = self.timed(run), time.perf_counter() + self.options.seconds
        times: list[float] = []
        while len(times) < self.options.repeats and time.perf_counter() + first < deadline:
            times.append(self.timed(run))
        return statistics.median(times or [first]), len(times or [first])

    def reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int:
        """The accelerator's peak since it was reset, or the process's."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return process_peak_bytes()

    def wait(self) -> None:
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize(self.device)


def make_context(options: argparse.Namespace, config: LanceConfig, target: LatentShape) -> Context:
    def text(count: int, modality: Modality = Modality.TEMPLATE) -> Segment:
        return Segment.text(torch.randint(config.vocab_size, (count,)).tolist(), modality)

    visuals = []
    if options.edit:
        grid = LatentShape(target.frames, options.height // 28, options.width // 28)
        visuals.append(Segment.vit(torch.randn(grid.tokens, config.hidden_size), grid))
        visuals.append(Segment.latents(torch.randn(config.latent_channels, *target), Modality.EDIT_SOURCE))
    segments = (text(SYSTEM_TOKENS), *visuals, text(options.prompt_tokens, Modality.PROMPT), text(CLOSING_TOKENS))
    return Context(segments, VisionTokens(start=1, pad=2, end=3))


def bench_prefill(bench: Bench, engine: Engine, context: Context) -> None:
    sequence = layout(context)
    tokens = sum(len(split) for split in sequence.prefix)
    seconds, runs = bench.median(lambda: prefill(engine, sequence))
    bench.emit("prefill", seconds=seconds, tokens=tokens, tokens_per_second=tokens / seconds, runs=runs)


def bench_decode(bench: Bench, engine: Engine, context: Context) -> None:
    """Tokens a second, and what share that is of reading their weights at the rate of a plain copy, in turns."""
    cache, states = prefill(engine, layout(context))
    read = [cache.committed(index) for index in range(len(cache.layers))]
    vocabulary, tokens = engine.model.config.vocab_size, bench.options.tokens
    copied = COPIED.get(engine.device.type, COPIED_ON_A_CARD)
    source = torch.zeros(copied, dtype=torch.uint8, device=engine.device)
    target = torch.empty_like(source)

    def run(engine: Engine = engine) -> None:
        own = KVCache(engine.model.config, cache.length + tokens, engine.dtype, engine.device)
        own.fill(read)
        answer = decode(engine, own, states[:, -1:], own.length, vocabulary=vocabulary, stop=-1, max_new_tokens=tokens)
        assert len(list(answer)) == tokens

    counted = count(engine, run)
    weights = sum(layer.weight.nbytes for layer in {layer for layer, _ in counted.linears})
    run(), target.copy_(source)
    pairs = [(bench.timed(run), bench.timed(lambda: target.copy_(source))) for _ in range(bench.options.repeats)]
    rates = [(tokens * weights / own / GIGA, 2 * copied / other / GIGA) for own, other in pairs]
    seconds = statistics.median(own for own, _ in pairs)
    bench.emit(
        "decoding",
        seconds=seconds,
        tokens=tokens,
        tokens_per_second=tokens / seconds,
        prefix=cache.length,
        weights_gb=weights / GIGA,
        share_of_copy=statistics.median(own / other for own, other in rates),
        copy_gb_per_second=statistics.median(other for _, other in rates),
        runs=len(pairs),
    )


def bench_step(bench: Bench, engine: Engine, branches: list[Branch], target: LatentShape) -> None:
    """All branches at one time, as the loop takes a guided step: together while their tokens are few."""
    latents = torch.randn(1, engine.model.config.latent_channels, *target, device=engine.device)
    timesteps = torch.full((1, target.frames), 0.7, device=engine.device)
    velocities = Velocities(engine)

    def step() -> list[Tensor]:
        return velocities(latents, timesteps, branches)

    counted = count(engine, lambda other: Velocities(other)(latents, timesteps, branches))
    bench.reset_peak()
    step(), step()  # the first as it is, the second recorded where the engine records
    multiply, attend = yardstick(engine, counted), attending(engine, counted, len(branches) * target.tokens <= BATCHED_TOKENS)
    multiply(), attend()
    pairs = [(bench.timed(step), bench.timed(multiply)) for _ in range(bench.options.repeats)]
    operations = counted.linear + counted.attention
    shares = [operations / counted.linear * other / own for own, other in pairs]
    seconds, other = (statistics.median(times) for times in zip(*pairs, strict=True))
    bench.emit(
        "denoising_step",
        branches=len(branches),
        seconds=seconds,
        tokens=target.tokens + 2,
        prefix=[one.cache.length for one in branches],
        linear_gflop=counted.linear / GIGA,
        attention_gflop=counted.attention / GIGA,
        gflop_per_second=operations / GIGA / seconds,
        mm_gflop_per_second=counted.linear / GIGA / other,
        share_of_mm=statistics.median(shares),
        share_range=[round(min(shares), 3), round(max(shares), 3)],
        attention_seconds=bench.median(attend)[0],
        share_of_best=operations / counted.linear * min(times[1] for times in pairs) / min(times[0] for times in pairs),
        runs=len(pairs),
        peak_gb=bench.peak_bytes() / GIGA,
        load=os.getloadavg()[0],
    )
    if bench.options.profile:
        profile(step)


def profile(step: Callable[[], object]) -> None:
    with torch.profiler.profile(record_shapes=True) as found:
        for _ in range(3):
            step()
    where = "cuda" if torch.cuda.is_available() else "cpu"
    table = found.key_averages(group_by_input_shape=True).table(sort_by=f"self_{where}_time_total", row_limit=40)
    print(table, file=sys.stderr)


def make_vae(bench: Bench) -> WanVAE:
    encoder = bench.options.vae
    with torch.device("meta"):
        shapes = build_vae(encoder, encoder * 8 // 5).state_dict()
    tensors = {
        original_name(name): torch.empty(shape.shape, dtype=bench.dtype, device=bench.device).uniform_(-0.03, 0.03)
        for name, shape in shapes.items()
    }
    return WanVAE.from_tensors(tensors)


def bench_vae(bench: Bench, pixels: PixelShape) -> None:
    vae = make_vae(bench)
    picture = torch.rand(3, *pixels) * 2 - 1
    latents = torch.randn(48, *pixels.latent())
    size = pixels.frames * pixels.height * pixels.width / 1e6
    for name, run in (("vae_encode", lambda: vae.encode(picture)), ("vae_decode", lambda: vae.decode(latents))):
        seconds, runs = bench.median(run)
        bench.emit(name, seconds=seconds, megapixels=size, megapixels_per_second=size / seconds, runs=runs)


def stages(bench: Bench, options: argparse.Namespace) -> Iterator[str]:
    """Run everything; yields the name of each stage behind it."""
    config, pixels = config_of(options), PixelShape(options.frames, options.height, options.width)
    target = pixels.latent()
    model = draw_weights(bench, config) if options.no_loading else bench_loading(bench, config)
    engine = Engine(model, bench.dtype, bench.device, cuda_graphs=options.cuda_graphs)
    yield "loading"
    if options.until == "loading":
        return
    if options.compile:
        engine.model.compile_layers()
    context = make_context(options, config, target)
    bench_prefill(bench, engine, context)
    branches = [branch(engine, layout(context, target)), branch(engine, layout(context.without(Modality.PROMPT), target))]
    bench_step(bench, engine, branches[:1], target)
    bench_step(bench, engine, branches, target)
    bench_decode(bench, engine, context)
    yield "network"
    del engine, branches
    if options.until == "vae":
        bench_vae(bench, pixels)
        yield "vae"


@torch.no_grad()
def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    bench, peaks = Bench(options), {}
    known = {name: value for name, value in vars(options).items() if name not in ("profile", "real_width")}
    known["threads"] = torch.get_num_threads()
    bench.emit("settings", **known, torch=torch.__version__)
    for stage in stages(bench, options):
        peaks[f"after_{stage}_gb"] = bench.peak_bytes() / GIGA
        bench.reset_peak()
    bench.emit("peak_memory", **peaks)


if __name__ == "__main__":
    main()
