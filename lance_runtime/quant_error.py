"""What quantised weights do to the network: the same inputs through both, and the difference after every layer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .context import Layout, layout
from .denoise import predict_velocity
from .dequantize import DequantizedTensors
from .engine import Engine
from .model.transformer import Streams
from .pipeline import LancePipeline, Output, Progress
from .prefill import branch, prefill

DRAWING, ANSWERING = "drawing", "answering"
# Where along the schedule velocities are compared: noise alone, half made, and nearly done.
SCHEDULE_POINTS = (0.0, 0.5, 0.9)
ANSWER_TOKENS = 32


@dataclass(frozen=True)
class Settings:
    """What is run: pictures drawn from prompts, and a question about each. size: height and width in pixels."""

    prompts: tuple[str, ...] = ()
    question: str = ""
    size: int = 512
    steps: int = 10

    def complete(self) -> Settings:
        """The bundled prompts and question where there are none."""
        bundled = _bundled()
        return replace(self, prompts=self.prompts or tuple(bundled["prompts"]), question=self.question or bundled["question"])


@cache
def _bundled() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("calibration.json").read_text("utf-8"))


@dataclass(frozen=True, eq=False)
class Sample:
    """One input of the network: a picture on its way (latents at a sigma), or a question and an answer of some tokens."""

    sequence: Layout
    latents: Tensor | None = None
    sigma: float = 0.0
    answer_tokens: int = 0

    @property
    def kind(self) -> str:
        return ANSWERING if self.latents is None else DRAWING


@dataclass(eq=False)
class Trace:
    """What a network made of samples: hidden states (tokens, D) by kind and layer, and the output of every sample."""

    states: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Comparison:
    """Relative errors against the full weights.

    layers: after each layer, when drawing and when answering, as the mean over tokens. velocities: (sigma, error).
    logits: at all tokens of the answers, less their mean; same: at how many of these ``answer_tokens`` the likeliest token is
    the same.
    """

    layers: list[tuple[float, float]]
    velocities: list[tuple[float, float]]
    logits: float
    same: int
    answer_tokens: int


@torch.no_grad()
def compare(
    pipe: LancePipeline, weights: DequantizedTensors, settings: Settings | None = None, progress: Progress | None = None
) -> Comparison:
    """Run a pipeline, put a quantised file's weights in the place of its own (they stay there), and run it again.

    Where ComfyUI quantises the inputs of a weight as well (int8), so does the second run. The samples are the first run's
    own: pictures on their way, and what it says about them. progress: called with (runs done, runs in all).
    """
    settings = (settings or Settings()).complete()
    count = len(settings.prompts) * (len(SCHEDULE_POINTS) + 1)
    samples: list[Sample] = []
    for index, prompt in enumerate(settings.prompts):
        samples += _samples(pipe, prompt, settings)
        _tell(progress, index + 1, len(settings.prompts) + 2 * count)
    total = len(settings.prompts) + 2 * count
    before = _trace(pipe, samples, lambda done: _tell(progress, len(settings.prompts) + done, total))
    put(pipe.components.model, weights)
    pipe.forget()
    after = _trace(pipe, samples, lambda done: _tell(progress, len(settings.prompts) + count + done, total))
    return _compared(samples, before, after)


def _samples(pipe: LancePipeline, prompt: str, settings: Settings) -> Iterator[Sample]:
    """A picture at some points of its way, and a question about it with the answer."""
    request = pipe.request("t2i", prompt, height=settings.size, width=settings.size, steps=settings.steps)
    sequence, sigmas = layout(pipe.context(request), request.target()), pipe.sigmas(request)
    steps: list[Any] = list(pipe.stream("t2i", prompt, height=settings.size, width=settings.size, steps=settings.steps))
    start = pipe.noise(request, pipe.context(request), request.target())
    latents = [start, *(step.latents[None] for step in steps)]
    for point in SCHEDULE_POINTS:
        index = int(point * settings.steps)
        yield Sample(sequence, latents[index], float(sigmas[index]))
    picture = Output(latents=latents[-1][0], decode_latents=pipe.components.vae.decode).frames[0]
    asked: dict[str, Any] = {"images": [picture], "question": settings.question, "max_new_tokens": ANSWER_TOKENS}
    ids = pipe("x2t_image", **asked).token_ids or []
    context = pipe.context(pipe.request("x2t_image", **asked))
    yield Sample(layout(context.with_text(ids) if ids else context), answer_tokens=len(ids) + 1)


def _trace(pipe: LancePipeline, samples: Sequence[Sample], tell: Callable[[int], None]) -> Trace:
    trace, engine = Trace(), pipe.components.engine
    for index, sample in enumerate(samples):
        watched = replace(engine, layer_hook=_recorder(trace, sample.kind))
        trace.outputs.append(_run(engine, watched, sample).float().cpu())
        tell(index + 1)
    return trace


def _run(engine: Engine, watched: Engine, sample: Sample) -> Tensor:
    """The velocity, or the logits (answer_tokens, V)."""
    if sample.latents is None:
        _, states = prefill(watched, sample.sequence)
        return engine.model.logits(states[0, -sample.answer_tokens :])
    latents = sample.latents.to(engine.device, engine.dtype)
    times = torch.full((1, latents.shape[2]), sample.sigma, device=engine.device)
    return predict_velocity(watched, latents, times, [branch(engine, sample.sequence)])


def _recorder(trace: Trace, kind: str) -> Callable[[int, Callable[[Streams], Streams], Streams], Streams]:
    """Keeps what a layer gives: the generation expert's states when drawing, the understanding expert's when answering."""

    def record(index: int, layer: Callable[[Streams], Streams], hidden: Streams) -> Streams:
        found = layer(hidden)
        part = found.und if kind == ANSWERING else found.gen
        trace.states.setdefault((kind, index), []).append(part[0].cpu())
        return found

    return record


def put(model: nn.Module, weights: DequantizedTensors) -> None:
    """A file's quantised weights in the place of a network's own, one at a time, and what ComfyUI does to their inputs."""
    for name in weights.layers:
        owner, _, leaf = name.rpartition(".")
        module, rounded = model.get_submodule(owner), weights.layers[name].format.inputs
        parameter = nn.Parameter(weights[name].to(module.get_parameter(leaf)), requires_grad=False)
        module.register_parameter(leaf, parameter)
        if rounded is not None:
            module.register_forward_pre_hook(partial(_with_inputs, rounded))


def _with_inputs(rounded: Callable[[Tensor], Tensor], _: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (rounded(inputs[0]),)


def _compared(samples: Sequence[Sample], before: Trace, after: Trace) -> Comparison:
    def layers(kind: str) -> list[float]:
        numbers = sorted(index for found, index in before.states if found == kind)
        return [_token_error(before.states[kind, index], after.states[kind, index]) for index in numbers]

    pairs = list(zip(samples, before.outputs, after.outputs, strict=True))
    drawn, said = ([pair for pair in pairs if pair[0].kind == kind] for kind in (DRAWING, ANSWERING))
    sigmas = sorted({sample.sigma for sample, *_ in drawn}, reverse=True)
    at = {sigma: [_error(a, b) for sample, a, b in drawn if sample.sigma == sigma] for sigma in sigmas}
    logits = [torch.cat(side) for side in ([a for _, a, _ in said], [b for _, _, b in said])]
    centred = [part - part.mean(dim=1, keepdim=True) for part in logits]
    return Comparison(
        layers=list(zip(layers(DRAWING), layers(ANSWERING), strict=True)),
        velocities=[(sigma, sum(errors) / len(errors)) for sigma, errors in at.items()],
        logits=_error(*centred),
        same=int((logits[0].argmax(1) == logits[1].argmax(1)).sum()),
        answer_tokens=len(logits[0]),
    )


def _error(exact: Tensor, found: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def _token_error(exact: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """The mean over tokens: a few of Qwen2.5's have states thousands of times as large, and would hide the others."""
    pairs = [(a.float(), b.float()) for a, b in zip(exact, found, strict=True)]
    return float(torch.cat([(b - a).norm(dim=-1) / a.norm(dim=-1) for a, b in pairs]).mean())


def _tell(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)
