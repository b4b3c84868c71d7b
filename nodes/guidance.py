"""Lance's guidance as patches of a MODEL: an interval that skips the unconditional pass, and the renorm."""

from collections.abc import Callable
from typing import Any

import comfy.patcher_extension
from torch import Tensor

from ..lance_runtime.guidance import Guidance

KEY = "lance_guidance"
SCALES = ("cfg", "cfg1", "cfg2")


def patched(model: Any, guidance: Guidance) -> Any:
    """A clone of the MODEL with this guidance; it acts in every sampler and guider that has a scale."""
    clone = model.clone()
    clone.remove_wrappers_with_key(comfy.patcher_extension.WrappersMP.PREDICT_NOISE, KEY)
    clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.PREDICT_NOISE, KEY, _interval(guidance))
    if guidance.renorm == "none":
        clone.model_options.pop("sampler_cfg_function", None)
    else:
        clone.set_model_sampler_cfg_function(_renorm(guidance))
    return clone


def _interval(guidance: Guidance) -> Callable[..., Tensor]:
    def predict_noise(executor: Any, x: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if guidance.within(timestep.flatten()[0]):
            return executor(x, timestep, *args, **kwargs)
        # At scale 1 ComfyUI leaves the other passes out; a cfg function would come too late for that.
        guider = executor.class_obj
        scales = {name: getattr(guider, name) for name in SCALES if hasattr(guider, name)}
        try:
            for name in scales:
                setattr(guider, name, 1.0)
            return executor(x, timestep, *args, **kwargs)
        finally:
            for name, scale in scales.items():
                setattr(guider, name, scale)

    return predict_noise


def _renorm(guidance: Guidance) -> Callable[[dict], Tensor]:
    """cond and uncond come as sigma * velocity; a ratio of norms does not mind the factor."""

    def cfg(arguments: dict) -> Tensor:
        cond, uncond, scale = arguments["cond"], arguments["uncond"], arguments["cond_scale"]
        if scale == 1.0 or arguments.get("input_uncond", ()) is None:
            return cond
        return guidance.renormed(uncond + scale * (cond - uncond), cond, _free_frames(arguments))

    return cfg


def _free_frames(arguments: dict) -> Tensor | None:
    """Indices of the frames that are drawn, where the norms shall leave given ones out.

    The reference's dense path does; its cached path counts all (the conditioning's recipe tells which it is).
    """
    conds = [part["model_conds"] for part in arguments.get("input_uncond") or () if "given_mask" in part["model_conds"]]
    if not conds or conds[0]["prefix"].cond.recipe.conditional is not None:
        return None
    return conds[0]["given_mask"].cond.amax(dim=(0, 1, 3, 4)).nonzero().flatten()
