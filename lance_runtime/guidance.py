"""Classifier-free guidance as a value: where it acts, and how branches are combined."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from .types import check_choice

RENORM_KINDS = ("global", "channel", "none")
UNCOND_POSITIONS = ("cached", "dense")
EPSILON = 1e-8


@dataclass(frozen=True)
class Guidance:
    """Text guidance, and a second one on the visual conditions.

    v = v_none + scale * (v - v_text) + visual_scale * (v_text - v_none), where v_text has no prompt and v_none neither
    prompt nor visuals; with visual_scale 1 that is the ordinary v_text + scale * (v - v_text).

    interval: text guidance acts while interval[0] < sigma <= interval[1]; outside it the conditional velocity stands
    alone and no other branch is run. renorm: scale the result down to the conditional's norm over the whole target
    ("global"), per token ("channel"), or not ("none"); renorm_min bounds the factor from below.
    uncond_positions: see ``context.unconditional_layout``. (Reference: modeling/lance/lance.py, validation_gen_KVcache.)
    """

    scale: float = 4.0
    interval: tuple[float, float] = (0.4, 1.0)
    renorm: str = "global"
    renorm_min: float = 0.0
    visual_scale: float = 1.0
    uncond_positions: str = "cached"

    def __post_init__(self) -> None:
        check_choice("renorm", self.renorm, RENORM_KINDS)
        check_choice("uncond_positions", self.uncond_positions, UNCOND_POSITIONS)
        for name in ("scale", "visual_scale", "renorm_min"):
            if not isinstance(getattr(self, name), Real) or not math.isfinite(getattr(self, name)):
                raise ValueError(f"Guidance {name} is {getattr(self, name)!r}, not a finite number.\nThe default scale is 4.")
        if len(self.interval) != 2 or not self.interval[0] <= self.interval[1]:
            raise ValueError(f"Guidance interval {self.interval} is not (low, high).\nThe default is (0.4, 1.0).")

    @property
    def enabled(self) -> bool:
        return self.scale != 1.0 or self.needs_visual

    @property
    def needs_visual(self) -> bool:
        """Whether the branch without prompt and visuals is needed."""
        return self.visual_scale != 1.0

    def acts_at(self, sigma: Tensor) -> bool:
        """Whether the other branches are run at this sigma; compared in float32, as the reference does.

        It guides at scales above 1 only; here those below 1 have their meaning, too.
        """
        return self.enabled and self.within(sigma)

    def within(self, sigma: Tensor) -> bool:
        """Whether a sigma lies within the interval, whatever the scales."""
        low, high = torch.tensor(self.interval, dtype=torch.float32)
        # A shift of 2.14 makes 1 + 1e-7 of the first, which the reference does not guide.
        sigma = sigma.detach().float().cpu().clamp(max=1.0)
        return bool(low < sigma) and bool(sigma <= high)

    def combine(self, velocities: Sequence[Tensor], free: Tensor | None = None) -> Tensor:
        """Velocities (B, C, T, H, W) of the active branches (v, v_text, v_none) -> the guided velocity.

        free: indices of the latent frames that are denoised; with "dense" positions the norms leave the given frames
        out, with "cached" they do not (as in the reference).
        """
        if len(velocities) == 1:
            return velocities[0]
        cond, text, *rest = velocities
        if rest:
            guided = rest[0] + self.scale * (cond - text) + self.visual_scale * (text - rest[0])
        else:
            guided = text + self.scale * (cond - text)
        return self.renormed(guided, cond, free if self.uncond_positions == "dense" else None)

    def renormed(self, guided: Tensor, cond: Tensor, free: Tensor | None = None) -> Tensor:
        """Scale ``guided`` down to the norm of ``cond``, each sample by itself."""
        if self.renorm == "none":
            return guided
        if self.renorm == "channel":
            norms = [x.norm(dim=1, keepdim=True) for x in (cond, guided)]
        else:
            counted = [x if free is None else x[:, :, free] for x in (cond, guided)]
            norms = [x.flatten(1).norm(dim=1).view(-1, 1, 1, 1, 1) for x in counted]
        return guided * (norms[0] / (norms[1] + EPSILON)).clamp(min=self.renorm_min, max=1.0)
