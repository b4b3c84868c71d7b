"""How all of Nano's stages learn: their optimisers, and the rise and fall of the learning rate."""

from __future__ import annotations

import math
import os

import torch
from torch import nn


def share_gradients(parameters: list[nn.Parameter]) -> None:
    """The sum over the processes, in one vector; nothing where there is only one."""
    if not torch.distributed.is_initialized():
        return
    joined = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in parameters])
    torch.distributed.all_reduce(joined)
    for parameter, part in zip(parameters, joined.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)


def join_processes() -> int:
    """The number of this process among those that torchrun started; 0 where there is only one."""
    if "RANK" not in os.environ:
        return 0
    torch.distributed.init_process_group("gloo")
    return torch.distributed.get_rank()


def schedule(step: int, total: int) -> float:
    """A short rise, then a cosine down to a hundredth."""
    return min(1, (step + 1) / 200) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / total)))


class Learner:
    """Muon for the matrices of layers (a third fewer steps here than AdamW alone), AdamW for all else."""

    def __init__(self, nets: nn.Module, rate: float, steps: int) -> None:
        self.parameters, self.rate, self.steps = list(nets.parameters()), rate, steps
        named = list(nets.named_parameters())
        inner = {name for name, value in named if value.ndim == 2 and ("layers." in name or "blocks." in name)}
        matrices, others = ([value for name, value in named if (name in inner) == wanted] for wanted in (True, False))
        self.optimizers: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.01),
        )

    def update(self, step: int) -> None:
        """One step along the gradients, which are then let go."""
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.rate * schedule(step, self.steps)
            optimizer.step()
            optimizer.zero_grad()

    def state_dict(self) -> list[dict]:
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states: list[dict]) -> None:
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)
