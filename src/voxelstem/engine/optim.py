"""AdamW with layer-wise decay. The learning rate follows the run's progress; weight decay stays as it is set."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from voxelstem import schedules


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW's settings (Loshchilov and Hutter 2017) and the schedule of its rate."""

    lr: float = 1e-3
    end_lr: float = 1e-5
    warm_up: float = 0.1
    """Share of the run over which the rate rises."""
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    layer_decay: float = 1.0
    """Each layer further from the output learns this much slower (Bao et al. 2021); 1 switches it off."""
    clip_norm: float = 3.0

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: a rate, share, decay or beta outside its range.
        """
        rates = 0 < self.lr < math.inf and 0 <= self.end_lr < math.inf
        if not (rates and 0 <= self.warm_up < 1 and 0 < self.layer_decay <= 1):
            raise ValueError("need lr > 0, end_lr >= 0, 0 <= warm_up < 1 and 0 < layer_decay <= 1")
        if not (self.weight_decay >= 0 and self.clip_norm > 0):
            raise ValueError("need weight_decay >= 0 and clip_norm > 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas lie in [0, 1), got {self.betas}")


def make_optimizer(
    objective: nn.Module, layers: Iterable[tuple[int, list[tuple[str, nn.Parameter]]]], config: OptimConfig
) -> torch.optim.AdamW:
    """Group the trainable parameters by depth and by whether they decay.

    `layers` are the trained backbone's (`Backbone.param_groups`); everything else of the objective counts as
    the output. Vectors (biases, norms, scales, tokens) do not decay.
    """
    layers = list(layers)
    deepest = max(depth for depth, _ in layers) + 1
    depth_of = {id(parameter): depth for depth, members in layers for _, parameter in members}
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for parameter in objective.parameters():
        if parameter.requires_grad:
            key = (depth_of.get(id(parameter), deepest), parameter.ndim > 1)
            groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": members,
                "lr_scale": config.layer_decay ** (deepest - depth),
                "weight_decay": config.weight_decay if decays else 0.0,
            }
            for (depth, decays), members in sorted(groups.items(), key=lambda item: item[0])
        ],
        lr=config.lr,
        betas=config.betas,
    )


def set_rate(optimizer: torch.optim.Optimizer, config: OptimConfig, *, progress: float) -> float:
    """Give every group its rate for this moment; return the undecayed one."""
    rate = schedules.warm_up_cosine(progress, warm_up=config.warm_up, peak=config.lr, end=config.end_lr)
    for group in optimizer.param_groups:
        entry: dict[str, Any] = group
        entry["lr"] = rate * entry["lr_scale"]
    return rate
