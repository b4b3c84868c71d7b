"""A guided denoising step of ours against the reference implementation's, with the same random weights.

Theirs is its own sampling function on its key-value cache, unchanged: a hook at the start of each of its steps stops its
clock and lets our loop take one step, so that the two take turns in one run. A step is both guidance branches, guidance
and the Euler update; the prefill is outside. First both must find the same velocities from the same noise. ``ratio`` is
the median over the turns of their seconds over ours: above 1, ours is the faster.

Needs torch, transformers 4.49 to 4.50, einops, numpy, safetensors and tokenizers. What a CPU does not have is stood in
for: flash-attn by our own attention, so that it is no part of the difference, and in float32 the casts to bfloat16 that
the reference has fixed in its code by none.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from bench import Bench, config_of, make_context
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lance_runtime.components import assign, build_lance
from lance_runtime.config import LanceConfig
from lance_runtime.context import Layout, VisionTokens, layout, unconditional_layout
from lance_runtime.denoise import Branches, Step, denoise, flow_sigmas, predict_velocity
from lance_runtime.engine import Engine
from lance_runtime.guidance import Guidance
from lance_runtime.model.attention import causal_attention, full_attention
from lance_runtime.prefill import Branch, branch
from lance_runtime.types import SPATIAL_STRIDE, TEMPORAL_STRIDE, LatentShape, PixelShape

COMMIT = "4baeee0"  # of the reference, that this was written against
SEED, SCALE, SHIFT = 1, 4.0, 3.5
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}  # of velocities around 1


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--reference", type=Path, required=True, metavar="DIR", help="a clone of github.com/bytedance/Lance")
    add("--hidden", type=int, default=2048, help="a multiple of 128; heads and MLP keep the real proportions")
    sizes = {"layers": 2, "vocabulary": 8192, "height": 256, "width": 256, "frames": 1, "prompt-tokens": 128}
    for name, size in sizes.items():
        add(f"--{name}", type=int, default=size, help=f"(default: {size})")
    add("--dtype", choices=tuple(TOLERANCE), default="float32")
    add("--threads", type=int, help="of the CPU (default: torch's own choice)")
    add("--repeats", type=int, default=10, help="turns, of which the median is taken (default: 10)")
    add("--record", metavar="MACHINE", help="also append the result to results.jsonl, under this name of the machine")
    add("--device", default="cpu")
    add("--compile", action="store_true", help="our layers through torch.compile; the reference stays as it is")
    add("--cuda-graphs", action="store_true", help="our steps as CUDA graphs; the reference stays as it is")
    parser.set_defaults(edit=False)
    options = parser.parse_args(argv)
    if options.hidden % 128:
        parser.error(f"--hidden {options.hidden} is not a multiple of 128, the width of a head")
    if not (options.reference / "modeling" / "lance" / "lance.py").is_file():
        parser.error(f"--reference {options.reference} is no clone of bytedance/Lance: it has no modeling/lance/lance.py")
    return options


def random_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights that keep the size of what passes through, so that attention and positions show in the velocities."""

    def draw(name: str, shape: torch.Size) -> Tensor:
        if len(shape) == 1:
            return 0.1 * torch.randn(shape) + ("norm" in name)
        return torch.randn(shape) / (1 if "embed_tokens" in name else shape[1] ** 0.5)

    return {name: draw(name, parameter.shape) for name, parameter in model.named_parameters()}


def flash_attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, causal: bool = False, **__: Any) -> Tensor:
    """flash-attn's function of packed q (L, H, d), k and v (S, Hkv, d), for the one sequence that a step has."""
    heads = (x.transpose(0, 1)[None] for x in (q, k, v))
    attended = causal_attention(*heads) if causal else full_attention(*heads)
    return attended[0].unflatten(-1, q.shape[1:])


def stand_in(name: str, **contents: Any) -> None:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)  # transformers asks for it
    vars(module).update(contents)
    sys.modules[name] = module


class SingleTorch(ModuleType):
    """torch for a module that says bfloat16 where it computes in float32 here."""

    bfloat16 = torch.float32

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def load_reference(folder: Path, config: LanceConfig, vision: VisionTokens, target: LatentShape, own: nn.Module) -> Any:
    """Their model around the very tensors of ours."""
    stand_in("flash_attn", flash_attn_varlen_func=flash_attention)
    if find_spec("imageio") is None:
        stand_in("imageio")  # for files of video only
    sys.path.insert(0, str(folder.resolve()))
    from common.utils.misc import AutoEncoderParams
    from modeling.lance import Lance, qwen2_navit
    from modeling.lance import LanceConfig as TheirConfig
    from modeling.qwen2.configuration_qwen2 import Qwen2Config

    dtype = own.llm2vae.weight.dtype
    if dtype == torch.float32:
        qwen2_navit.torch = SingleTorch("torch")
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    language = Qwen2Config(
        **{name: getattr(config, name) for name in (*sizes, "vocab_size", "rms_norm_eps", "rope_theta")},
        rope_scaling={"rope_type": "default", "mrope_section": list(config.mrope_section)},
        vision_config={"spatial_merge_size": 2, "tokens_per_second": 2},
        image_token_id=-1,  # as with the checkpoints, none is in the sequence
        video_token_id=vision.pad,
        vision_start_token_id=vision.start,
        layer_module="Qwen2MoTDecoderLayer",
        apply_qwen_2_5_vl_pos_emb=True,
        _attn_implementation="eager",
    )
    around = TheirConfig(
        visual_und=False,
        llm_config=language,
        vae_config=AutoEncoderParams(SPATIAL_STRIDE, TEMPORAL_STRIDE, config.latent_channels),
        latent_patch_size=(1, 1, 1),
        max_num_frames=target.pixels().frames,
        max_latent_size=max(target.height, target.width),
    )
    model = Lance(qwen2_navit.Qwen2ForCausalLM(language), vit_model=None, config=around)
    found = model.load_state_dict(own.state_dict(), strict=False, assign=True)
    if found.unexpected_keys or found.missing_keys != ["latent_pos_embed.pos_embed"]:
        raise SystemExit(f"The weights do not fit the reference: {found}.\nCheck out its commit {COMMIT}.")
    return model.to(own.llm2vae.weight.device, dtype).eval()  # as inference_lance.py does: with the rotary frequencies


def arguments(sequence: Layout, options: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    """What their sampling function takes for one picture or clip from text."""
    ids, grid = sequence.input_ids.to(bench.device), sequence.target.segment.grid
    latent = ids == sequence.vision.pad
    places = dict.fromkeys(("val_packed_vae_token_indexes", "val_mse_loss_indexes"), latent.nonzero().flatten())
    guidance = {"timestep_shift": SHIFT, "cfg_text_scale": SCALE, "cfg_interval": (0, 1), "validation_noise_seed": SEED}
    common = {"apply_qwen_2_5_vl_pos_emb": True, "device": bench.device, "dtype": bench.dtype}
    return {
        **dict.fromkeys(("val_packed_vit_tokens", "val_packed_vit_token_indexes")),
        "val_packed_text_ids": ids,
        "val_packed_text_indexes": (~latent).nonzero().flatten(),
        "val_packed_position_ids": torch.arange(len(ids), device=bench.device),
        "val_sample_lens": [len(ids)],
        "val_sample_N_target": [1],
        "val_split_lens": sequence.split_lens,
        "val_attn_modes": sequence.attn_modes,
        "video_grid_thw": [torch.tensor([[grid.frames, 2 * grid.height, 2 * grid.width]], device=bench.device)],
        "video_sizes": [(options.frames, options.height, options.width)],
        "sample_task": torch.zeros_like(ids),
        "sample_modality": sequence.modality.to(bench.device),
        **(places | guidance | common),
    }


class Launches(TorchDispatchMode):
    """Counts operators that compute or move something: what a device would be asked to launch, and a host to start."""

    FREE = ("aten::_unsafe_view", "aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided", "aten::detach")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shared = [result.alias_info for result in operator._schema.returns]
        view = bool(shared) and all(alias is not None and not alias.is_write for alias in shared)
        self.count += not view and operator._schema.name not in self.FREE
        return operator(*args, **(kwargs or {}))


class Race:
    """Both models on one noise: their velocities, and the seconds of their steps in turns."""

    def __init__(self, bench: Bench, engine: Engine, branches: list[Branch], reference: Any, request: dict[str, Any]):
        self.bench, self.engine, self.branches, self.reference, self.request = bench, engine, branches, reference, request
        grid = branches[0].layout.target.segment.grid
        # What their function draws; in bfloat16 other numbers than in float32.
        generator, like = torch.Generator(bench.device).manual_seed(SEED), {"dtype": bench.dtype, "device": bench.device}
        rows = torch.randn(grid.tokens, engine.model.config.latent_channels, generator=generator, **like)
        self.noise = rows.T.reshape(1, -1, *grid)

    def difference(self) -> float:
        """The largest one between the velocities of the first step, branch by branch."""
        found: list[Tensor] = []
        handle = self.reference.llm2vae.register_forward_hook(lambda *call: found.append(call[-1][1:-1]))
        self._sample(steps=1)
        handle.remove()
        latents, times = self.noise.repeat(2, 1, 1, 1, 1), self.noise.new_ones(2, self.noise.shape[2], dtype=torch.float32)
        own = predict_velocity(self.engine, latents, times, self.branches).flatten(2).transpose(1, 2)
        return (own.float() - torch.stack(found).float()).abs().max().item()

    def launches(self) -> tuple[int, int]:
        """Of one guided step, ours and theirs."""
        marks: list[int] = []
        steps = self._steps(turns=2)
        next(steps)  # reads the prompts, too
        with Launches() as own:
            next(steps)
        with Launches() as theirs:
            handle = self.reference.time_embedder.register_forward_pre_hook(lambda *_: marks.append(theirs.count))
            self._sample(steps=4)
        handle.remove()
        return own.count, marks[-1] - marks[-2]

    def _steps(self, turns: int) -> Iterator[Step]:
        cond, text = self.branches
        branches = Branches(self.engine, lambda: cond.layout, lambda: text.layout)
        sigmas = flow_sigmas(turns + 1, SHIFT)
        return denoise(self.engine, self.noise, sigmas, branches, Guidance(scale=SCALE, interval=(0.0, 1.0)))

    def run(self, turns: int) -> tuple[list[tuple[float, float]], float]:
        """Seconds of the turns, (ours, theirs), after one to warm up; the difference of the last latents."""
        own, theirs, last, steps = [], [], self.noise, self._steps(turns)
        begun: float | None = None

        def at_start(*_: Any) -> None:
            """Before their time embedding, which is the first thing in a step; its first call belongs to the prefill."""
            nonlocal begun, last
            stopped = self._now()
            if begun is not None:
                theirs.append(stopped - begun)
                with torch.autocast(self.bench.device.type, enabled=False):
                    start = self._now()
                    last = next(steps).latents
                    own.append(self._now() - start)
            begun = self._now()

        handle = self.reference.time_embedder.register_forward_pre_hook(at_start)
        latents = self._sample(turns + 1)
        theirs.append(self._now() - begun)
        handle.remove()
        difference = (last[0].float() - latents.float()).abs().max().item()
        return list(zip(own, theirs[1:], strict=True))[1:], difference

    def _now(self) -> float:
        self.bench.wait()
        return time.perf_counter()

    def _sample(self, steps: int) -> Tensor:
        """Their latents (C, T, H, W) after some steps; in bfloat16 they count on autocast, which ours has no need of."""
        with torch.autocast(self.bench.device.type, torch.bfloat16, enabled=self.engine.dtype == torch.bfloat16):
            return self.reference.validation_gen_KVcache(**self.request, num_timesteps=steps)[0][0].permute(3, 0, 1, 2)


def prepare(options: argparse.Namespace, bench: Bench) -> Race:
    """Both models, and our branches prefilled."""
    text, target = config_of(options), PixelShape(options.frames, options.height, options.width).latent()
    # Random text must not hit the ids around a visual, which theirs looks for.
    vision = VisionTokens(*range(text.vocab_size, text.vocab_size + 3))
    config = replace(text, vocab_size=text.vocab_size + 3)
    model = build_lance(config)
    assign(model, random_weights(model), bench.dtype, bench.device)
    if options.compile:
        model.compile_layers()
    context = replace(make_context(options, text, target), vision=vision)
    engine = Engine(model, bench.dtype, bench.device, cuda_graphs=options.cuda_graphs)
    sequence = layout(context, target)
    branches = [branch(engine, each) for each in (sequence, unconditional_layout(context, target, "cached"))]
    reference = load_reference(options.reference, config, vision, target, model)
    return Race(bench, engine, branches, reference, arguments(sequence, options, bench))


@torch.no_grad()
def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    bench = Bench(options)
    race, allowed = prepare(options, bench), TOLERANCE[options.dtype]
    difference = race.difference()
    if not difference < allowed:
        raise SystemExit(f"The velocities differ by {difference:.3g} of {allowed} allowed.\nTheir times cannot be compared.")
    pairs, last = race.run(options.repeats)
    own_launches, their_launches = (None, None) if options.compile else race.launches()
    ratios = [theirs / own for own, theirs in pairs]
    bench.emit(
        "step_against_reference",
        ours_seconds=statistics.median(own for own, _ in pairs),
        reference_seconds=statistics.median(theirs for _, theirs in pairs),
        ratio=statistics.median(ratios),
        range=[round(min(ratios), 3), round(max(ratios), 3)],
        difference=difference,
        latents_difference=last,
        launches=own_launches,
        reference_launches=their_launches,
        tokens=race.noise[0, 0].numel() + 2,
        prefix=[one.cache.length for one in race.branches],
        **{name: getattr(options, name) for name in ("hidden", "layers", "height", "width", "frames", "dtype")},
        threads=torch.get_num_threads(),
        runs=len(pairs),
        load=os.getloadavg()[0],
        **{name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    )


if __name__ == "__main__":
    main()
