"""Lance's guidance as patches of a MODEL: an interval that skips the unconditional pass, and the renorm."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.patcher_extension
from torch import Tensor

from ..lance_runtime.guidance import Guidance

KEY = "lance_guidance"
# A guider's scales, and what turns each off.
SCALES = {"cfg": 1.0, "cfg1": 1.0, "cfg2": 1.0, "neg_scale": 0.0}


def patched(model: Any, guidance: Guidance) -> Any:
    """A clone of the MODEL with this guidance; it acts in every sampler and guider that has a scale.

    ``ValueError`` where another node has given the MODEL a CFG function, of which ComfyUI keeps one.
    """
    clone = model.clone()
    clone.remove_wrappers_with_key(comfy.patcher_extension.WrappersMP.PREDICT_NOISE, KEY)
    clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.PREDICT_NOISE, KEY, _interval(guidance))
    found = clone.model_options.get("sampler_cfg_function")
    if isinstance(found, Renorm):
        del clone.model_options["sampler_cfg_function"]
    if guidance.renorm == "none":
        return clone
    if found is not None and not isinstance(found, Renorm):
        name = getattr(found, "__qualname__", type(found).__name__).split(".")[0]
        raise ValueError(
            f"This MODEL has another node's guidance already ({name}), which renorm {guidance.renorm!r} would replace.\n"
            "Set renorm to 'none' to keep that one, or take its node out."
        )
    clone.set_model_sampler_cfg_function(Renorm(guidance))
    return clone


def _interval(guidance: Guidance) -> Callable[..., Tensor]:
    def predict_noise(
        executor: Any, x: Tensor, timestep: Tensor, model_options: dict | None = None, seed: int | None = None
    ) -> Tensor:
        options = model_options or {}
        if guidance.within(timestep.flatten()[0]):
            return executor(x, timestep, options, seed)
        # At scale 1 ComfyUI leaves the other passes out; a cfg function would come too late for that. Functions before it
        # (Adaptive Projected Guidance, say) would take the zeros that stand for them for a prediction.
        options = {name: option for name, option in options.items() if name != "sampler_pre_cfg_function"}
        guider = executor.class_obj
        scales = {name: getattr(guider, name) for name in SCALES if hasattr(guider, name)}
        try:
            for name in scales:
                setattr(guider, name, SCALES[name])
            return executor(x, timestep, options, seed)
        finally:
            for name, scale in scales.items():
                setattr(guider, name, scale)

    return predict_noise


@dataclass(frozen=True)
class Renorm:
    """Guidance with the renorm as ComfyUI's CFG function.

    cond and uncond come as sigma * velocity; a ratio of norms does not mind the factor.
    """

    guidance: Guidance

    def __call__(self, arguments: dict) -> Tensor:
        cond, uncond, scale = arguments["cond"], arguments["uncond"], arguments["cond_scale"]
        if scale == 1.0 or arguments.get("input_uncond", ()) is None:
            return cond
        return self.guidance.renormed(uncond + scale * (cond - uncond), cond, _free_frames(arguments))


def _free_frames(arguments: dict) -> Tensor | None:
    """Indices of the frames that are drawn, where the norms leave given ones out.

    The reference's dense path does; its cached path counts all (the conditioning's recipe tells which it is).
    """
    conds = [part["model_conds"] for part in arguments.get("input_uncond") or () if "given_mask" in part["model_conds"]]
    if not conds or conds[0]["prefix"].cond.recipe.conditional is not None:
        return None
    return conds[0]["given_mask"].cond.amax(dim=(0, 1, 3, 4)).nonzero().flatten()
