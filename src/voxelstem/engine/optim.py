"""AdamW, SGD or Muon in groups: how much slower each layer learns, what decays, how rate and decay move over a run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from voxelstem import schedules
from voxelstem.engine.muon import Muon, is_matrix

REFERENCE_BATCH = 1024
"""Samples of one step for which a rate is written down in the DINO family's papers."""
_TOKENS = ("prefix", "mask_token")
"""Parameters that stand for tokens: cls and registers, and what hides a patch."""
_LAST = ("prototypes", "direction")
"""The objective's last layers: a projector's, and those of the heads that align scans and reports."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """Settings of AdamW (Loshchilov and Hutter 2017), SGD or Muon, and the schedules of rate and decay."""

    kind: Literal["adamw", "sgd", "muon"] = "adamw"
    """`sgd`: with Nesterov's momentum, and decay added to the gradient, as nnU-Net and nnssl train. `muon`: matrices by
    `engine.muon`, everything else by AdamW."""
    momentum: float = 0.99
    """Of SGD and Muon (there 0.95 is usual); AdamW has `betas`."""
    matrix_scale: float = 10.0
    """With `muon`: how many times the rate of everything else a matrix moves by."""
    lr: float = 1e-3
    end_lr: float = 1e-5
    warm_up: float = 0.1
    """Share of the run over which the rate rises."""
    schedule: Literal["cosine", "poly"] = "cosine"
    """How the rate falls after its rise: along a cosine, or as (1 - progress)^0.9 (nnU-Net)."""
    lr_scaling: Literal["none", "sqrt", "linear"] = "none"
    """How the rate follows the number of samples in a step: not at all, with its square root (DINOv2, SPECTRE) or in
    proportion (Goyal et al. 2017)."""
    lr_batch: int = REFERENCE_BATCH
    """Samples of one step for which `lr` is meant, where the rate follows them."""
    weight_decay: float = 0.05
    weight_decay_growth: float = 1.0
    """At the end of the run the decay is this many times what it began with, along a cosine (Caron et al. 2021: 10)."""
    decay_tokens: bool = False
    """Whether cls, register and mask tokens decay too, as in SPECTRE's training."""
    decay_vectors: bool = False
    """Whether biases and norms decay too, as wherever nobody sorts parameters: nnU-Net, nnssl, FOMO25's winner."""
    betas: tuple[float, float] = (0.9, 0.95)
    layer_decay: float = 1.0
    """Each layer further from the output learns this much slower (Bao et al. 2021); 1 switches it off."""
    patch_embed_scale: float = 1.0
    """The layer that takes voxels in learns this much slower still (DINOv2 and SPECTRE: 0.2)."""
    frozen_prototypes: float = 0.0
    """Share of the run over which the objective's last layers stay as they were drawn (Caron et al. 2021 and SPECTRE:
    one epoch)."""
    clip_norm: float = 3.0
    fused: bool = True
    """One kernel updates a whole tensor: several times faster, and as repeatable. It differs from the plain formula by
    rounding alone."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: a rate, share, decay, scale or beta outside its range.
        """
        rates = 0 < self.lr < math.inf and 0 <= self.end_lr < math.inf
        if not (rates and 0 <= self.warm_up < 1 and 0 < self.layer_decay <= 1):
            raise ValueError("need lr > 0, end_lr >= 0, 0 <= warm_up < 1 and 0 < layer_decay <= 1")
        if not (0 <= self.weight_decay < math.inf and 0 <= self.weight_decay_growth < math.inf and self.clip_norm > 0):
            raise ValueError("need weight_decay >= 0, weight_decay_growth >= 0 and clip_norm > 0")
        if not (self.lr_batch >= 1 and 0 < self.patch_embed_scale < math.inf and 0 <= self.frozen_prototypes < 1):
            raise ValueError("need lr_batch >= 1, patch_embed_scale > 0 and 0 <= frozen_prototypes < 1")
        if not (0 < self.momentum < 1 and 0 < self.matrix_scale < math.inf):
            raise ValueError(
                f"momentum lies in (0, 1) and matrix_scale above 0, got {self.momentum} and {self.matrix_scale}"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas lie in [0, 1), got {self.betas}")

    def peak(self, batch: int) -> float:
        """The highest rate of a run whose steps hold `batch` samples."""
        share = batch / self.lr_batch
        return self.lr * {"none": 1.0, "sqrt": math.sqrt(share), "linear": share}[self.lr_scaling]


class _Kind(NamedTuple):
    """What the parameters of one group have in common."""

    depth: int
    decays: bool
    takes_voxels: bool
    last: bool
    matrix: bool


def make_optimizer(
    objective: nn.Module, layers: Iterable[tuple[int, list[tuple[str, nn.Parameter]]]], config: OptimConfig
) -> torch.optim.Optimizer:
    """Group the trainable parameters by depth, by whether they decay, and by what is special about a layer.

    `layers` are the trained backbone's (`Backbone.param_groups`); everything else of the objective counts as the
    deepest of them, as in BEiT and DINOv2. Vectors (biases, norms, scales) and tokens decay only if the config says
    so. Parameters that are sharded over processes are grouped like any others.
    """
    layers = list(layers)
    deepest = max(depth for depth, _ in layers)
    depth_of = {id(parameter): depth for depth, members in layers for _, parameter in members}
    groups: dict[_Kind, list[nn.Parameter]] = {}
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            own, depth = name.rpartition(".")[2], depth_of.get(id(parameter))
            token = own in _TOKENS
            kind = _Kind(
                depth=deepest if depth is None else depth,
                decays=config.decay_tokens if token else parameter.ndim > 1 or config.decay_vectors,
                takes_voxels=depth == 0 and not token,
                last=own in _LAST,
                matrix=config.kind == "muon" and not token and is_matrix(parameter),
            )
            groups.setdefault(kind, []).append(parameter)
    entries: list[dict[str, Any]] = [
        {
            "params": members,
            "lr_scale": config.layer_decay ** (deepest - kind.depth)
            * (config.patch_embed_scale if kind.takes_voxels else 1.0),
            "decays": kind.decays,
            "last": kind.last,
            "matrix": kind.matrix,
            "weight_decay": config.weight_decay if kind.decays else 0.0,
        }
        for kind, members in sorted(groups.items())
    ]
    if config.kind == "sgd":
        return torch.optim.SGD(entries, lr=config.lr, momentum=config.momentum, nesterov=True, fused=config.fused)
    if config.kind == "muon":
        return Muon(
            entries, lr=config.lr, momentum=config.momentum, matrix_scale=config.matrix_scale, betas=config.betas
        )
    return torch.optim.AdamW(entries, lr=config.lr, betas=config.betas, fused=config.fused)


def set_rate(
    optimizer: torch.optim.Optimizer, config: OptimConfig, *, progress: float, batch: int = REFERENCE_BATCH
) -> float:
    """Give every group its rate and its decay for this moment; return the rate of a layer that nothing slows down.

    `batch` is the number of samples of one step over all processes and micro-batches, which `lr_scaling` asks for.
    """
    falls = schedules.warm_up_poly if config.schedule == "poly" else schedules.warm_up_cosine
    rate = falls(progress, warm_up=config.warm_up, peak=config.peak(batch), end=config.end_lr)
    end = config.weight_decay * config.weight_decay_growth
    decay = schedules.cosine(progress, start=config.weight_decay, end=end)
    for group in optimizer.param_groups:
        entry: dict[str, Any] = group
        # A rate of 0 moves nothing: the decay is multiplied by the rate too.
        frozen = entry["last"] and progress < config.frozen_prototypes
        entry["lr"] = 0.0 if frozen else rate * entry["lr_scale"]
        entry["weight_decay"] = decay if entry["decays"] else 0.0
    return rate
