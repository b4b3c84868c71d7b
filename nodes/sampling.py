"""Nodes around the sampler: conditioning, guidance, schedule, noise, and all of it in one."""

from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ..lance_runtime.context import Context
from ..lance_runtime.denoise import draw_noise, flow_sigmas
from ..lance_runtime.guidance import RENORM_KINDS, UNCOND_POSITIONS, Guidance
from ..lance_runtime.types import LatentShape
from .conditioning import conditionings
from .guidance import patched
from .model import check_model
from .pictures import check_axes
from .progress import Narrated, node_of
from .recipe import CONDITIONING_KEY
from .schema import CATEGORY, LanceContext, io

PROMPT = "Long, literal prompts that name camera and motion work best."
NEGATIVE = "What to keep away from. Empty, as in training: no prompt at all."
CONTEXT = "Pictures that the prompt refers to (Lance Edit, Lance Subject, Lance Context). Without it: text only."
SEED = "The noise to begin with; the same seed draws the same again."
SHIFT = "How long the steps stay at high noise. 3.5 is the model's own (3 for VBench's videos)."
DENOISE = "Below 1, begin inside the schedule, from a picture that is already there."
POSITIONS = (
    "How positions are counted where the negative prompt is empty. Leave 'cached', the reference's default, unless you compare "
    "with its 'dense' path."
)


class LanceNativeConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LanceNativeConditioning",
            display_name="Lance Conditioning",
            category=CATEGORY,
            description="A prompt, with the pictures it refers to, as positive and negative conditioning for any sampler.",
            search_aliases=["lance prompt", "lance text encode", "lance conditioning"],
            inputs=[
                io.Clip.Input("clip", tooltip="The CLIP of Load Lance."),
                io.String.Input("prompt", multiline=True, dynamic_prompts=True, default="", tooltip=PROMPT),
                io.String.Input("negative_prompt", multiline=True, dynamic_prompts=True, default="", tooltip=NEGATIVE),
                LanceContext.Input("context", optional=True, tooltip=CONTEXT),
                io.Combo.Input(
                    "uncond_positions", options=list(UNCOND_POSITIONS), default="cached", tooltip=POSITIONS, advanced=True
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="The prompt, after the pictures."),
                io.Conditioning.Output(display_name="negative", tooltip="Without the prompt; the pictures stay."),
                io.Conditioning.Output(
                    display_name="without visuals",
                    tooltip="Without prompt and pictures: 'negative' of Dual CFG Guider, to guide by the pictures too.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, clip: Any, prompt: str, negative_prompt: str, uncond_positions: str, context: Context | None = None
    ) -> io.NodeOutput:
        return io.NodeOutput(*conditionings(clip, context, prompt, negative_prompt, uncond_positions))


class LanceNativeGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LanceNativeGuidance",
            display_name="Lance Guidance",
            category=CATEGORY,
            description="Lance's own way of guidance, for any sampler: only while the noise is high, and without overshooting. "
            "The scale itself is the sampler's cfg: use 4.",
            search_aliases=["cfg interval", "cfg renorm", "guidance interval", "lance cfg"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL of Load Lance."),
                *guidance_inputs(),
            ],
            outputs=[io.Model.Output(tooltip="The MODEL with this guidance, for any sampler.")],
        )

    @classmethod
    def execute(cls, model: Any, interval_start: float, interval_end: float, renorm: str, renorm_min: float) -> io.NodeOutput:
        guidance = Guidance(interval=(interval_start, interval_end), renorm=renorm, renorm_min=renorm_min)
        check_model(model)
        return io.NodeOutput(patched(model, guidance))

    @classmethod
    def validate_inputs(cls, interval_start: float | None, interval_end: float | None) -> bool | str:
        """ComfyUI leaves the limits of these two to us; a linked one comes as None."""
        known = [value for value in (interval_start, interval_end) if value is not None]
        if any(not 0 <= value <= 1 for value in known) or known != sorted(known):
            return f"interval {interval_start} to {interval_end} does not rise within 0 to 1. The default is 0.4 to 1."
        return True


def guidance_inputs(advanced: bool = False) -> list[io.Input]:
    return [
        io.Float.Input(
            "interval_start",
            default=0.4,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Guidance acts above this noise level (sigma); below it the unconditional pass is saved.",
            advanced=advanced,
        ),
        io.Float.Input(
            "interval_end",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Guidance acts up to this noise level (sigma).",
            advanced=advanced,
        ),
        io.Combo.Input(
            "renorm",
            options=list(RENORM_KINDS),
            default="global",
            tooltip="Scale the guided prediction down to the unguided one's size: over the whole picture ('global'), for each "
            "place ('channel'), or not ('none'). Prevents burnt colours.",
            advanced=advanced,
        ),
        io.Float.Input(
            "renorm_min",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Least factor that the renorm may apply; 1 turns it off.",
            advanced=True,
        ),
    ]


class LanceNativeScheduler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LanceNativeScheduler",
            display_name="Lance Scheduler",
            category=CATEGORY,
            description="The reference's own schedule, exact for every number of steps.",
            search_aliases=["sigmas", "shift", "lance sigmas"],
            inputs=[
                io.Int.Input(
                    "steps", default=30, min=1, max=1000, tooltip="30 is the model's own; its picture benchmarks use 50."
                ),
                io.Float.Input(
                    "shift",
                    default=3.5,
                    min=0.01,
                    max=100.0,
                    step=0.01,
                    tooltip=SHIFT,
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=DENOISE,
                ),
            ],
            outputs=[io.Sigmas.Output(tooltip="Noise levels that fall to 0, for SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, steps: int, shift: float, denoise: float) -> io.NodeOutput:
        return io.NodeOutput(schedule(steps, shift, denoise))


def schedule(steps: int, shift: float, denoise: float) -> Tensor:
    """The last ``steps`` steps of a schedule of steps / denoise, as ComfyUI's schedulers do it."""
    if denoise <= 0:
        return torch.FloatTensor([])
    return flow_sigmas(max(steps, int(steps / denoise)), shift)[-(steps + 1) :]


class LanceNoise:
    """ComfyUI's NOISE interface: the reference's draw, for each sample of a batch with a seed of its own."""

    def __init__(self, seed: int, context: Context | None) -> None:
        self.seed, self.context = seed, context

    def generate_noise(self, input_latent: dict) -> Tensor:
        samples = input_latent["samples"]
        check_axes(samples)
        frames = samples.shape[2:-2] or (1,)  # latents of pictures have none
        channels, grid = samples.shape[1], LatentShape(*frames, *samples.shape[-2:])
        indices = input_latent.get("batch_index", range(samples.shape[0]))
        drawn = [draw_noise(self.context, grid, (self.seed + index) % 2**64, channels) for index in indices]
        return torch.stack(drawn).view(len(drawn), *samples.shape[1:])


class LanceNativeNoise(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LanceNativeNoise",
            display_name="Lance Noise",
            category=CATEGORY,
            description="Noise as the reference draws it on a CPU: a seed gives the same picture there and here.",
            search_aliases=["random noise", "seed", "lance seed"],
            inputs=[
                io.Int.Input("noise_seed", default=42, min=0, max=2**64 - 1, control_after_generate=True, tooltip=SEED),
                LanceContext.Input(
                    "context",
                    optional=True,
                    tooltip="The reference draws noise for the pictures of the context too, before that of the target. "
                    "Connect it to repeat its edits.",
                ),
            ],
            outputs=[io.Noise.Output(tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, noise_seed: int, context: Context | None = None) -> io.NodeOutput:
        return io.NodeOutput(LanceNoise(noise_seed, context))


class LanceNativeSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LanceNativeSampler",
            display_name="Lance Sampler",
            category=CATEGORY,
            description="Draws with the reference's own settings in one node: conditioning, guidance, schedule, noise, steps.",
            search_aliases=["ksampler", "lance generate", "text to image", "t2i", "t2v", "img2img", "inpaint"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL of Load Lance."),
                io.Clip.Input("clip", tooltip="The CLIP of Load Lance."),
                io.Latent.Input("latent", tooltip="What to begin with: its size, and its frames where it has a noise mask."),
                io.String.Input("prompt", multiline=True, dynamic_prompts=True, default="", tooltip=PROMPT),
                io.String.Input("negative_prompt", multiline=True, dynamic_prompts=True, default="", tooltip=NEGATIVE),
                LanceContext.Input("context", optional=True, tooltip=CONTEXT),
                io.Int.Input("seed", default=42, min=0, max=2**64 - 1, control_after_generate=True, tooltip=SEED),
                io.Int.Input(
                    "steps", default=30, min=1, max=1000, tooltip="30 is the model's own; its picture benchmarks use 50."
                ),
                io.Float.Input("cfg", default=4.0, min=0.0, max=100.0, step=0.1, tooltip="4 is the model's own; 1 is off."),
                io.Float.Input("shift", default=3.5, min=0.01, max=100.0, step=0.01, tooltip=SHIFT, advanced=True),
                io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip=DENOISE, advanced=True),
                *guidance_inputs(advanced=True),
                io.Combo.Input(
                    "uncond_positions", options=list(UNCOND_POSITIONS), default="cached", tooltip=POSITIONS, advanced=True
                ),
            ],
            outputs=[io.Latent.Output(tooltip="The result, for VAE Decode.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        latent: dict,
        prompt: str,
        negative_prompt: str,
        seed: int,
        steps: int,
        cfg: float,
        shift: float,
        denoise: float,
        uncond_positions: str,
        context: Context | None = None,
        **guidance: Any,
    ) -> io.NodeOutput:
        check_model(model)
        positive, negative, _ = conditionings(clip, context, prompt, negative_prompt, uncond_positions)
        interval = guidance.pop("interval_start"), guidance.pop("interval_end")
        chosen, sigmas = Guidance(interval=interval, **guidance), schedule(steps, shift, denoise)
        guider = comfy.samplers.CFGGuider(patched(model, chosen))
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        callback = latent_preview.prepare_callback(guider.model_patcher, len(sigmas) - 1)
        if len(sigmas) > 1:
            guided = [cfg != 1 and chosen.within(sigma) for sigma in sigmas[:-1]]
            callback = Narrated(callback, node_of(cls), positive[0][1][CONDITIONING_KEY].length, guided)
        drawn = sample(guider, latent, LanceNoise(seed, context), sigmas, callback)
        return io.NodeOutput(drawn, ui={"text": [callback.text]} if isinstance(callback, Narrated) else None)

    @classmethod
    def validate_inputs(cls, interval_start: float | None, interval_end: float | None) -> bool | str:
        return LanceNativeGuidance.validate_inputs(interval_start, interval_end)


def sample(guider: Any, latent: dict, noise: LanceNoise, sigmas: Tensor, callback: Any) -> dict:
    """Euler steps through ComfyUI's own sampler, with its previews, progress and interruption."""
    ratios = (latent.get(f"downscale_ratio_{axis}") for axis in ("spacial", "temporal"))
    samples = comfy.sample.fix_empty_latent_channels(guider.model_patcher, latent["samples"], *ratios)
    start = {**latent, "samples": samples}
    drawn = guider.sample(
        noise.generate_noise(start),
        samples,
        comfy.samplers.sampler_object("euler"),
        sigmas,
        denoise_mask=latent.get("noise_mask"),
        callback=callback,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=noise.seed,
    )
    kept = {key: value for key, value in latent.items() if not key.startswith("downscale_ratio")}
    return {**kept, "samples": drawn.to(comfy.model_management.intermediate_device())}
