"""Targets that use every prototype equally often (Cuturi 2013; Caron et al. 2020, SwaV; Oquab et al. 2023, DINOv2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


def sinkhorn(
    logits: Float[Tensor, "row prototype"],
    *,
    temperature: float,
    peak: Float[Tensor, ""],
    total: Callable[[Tensor], Tensor],
    iterations: int = 3,
) -> Float[Tensor, "row prototype"]:
    """Teacher's targets: exp(logits / temperature), in turns balanced over prototypes and brought to 1 in each row.

    The rows are this process's share of a batch, and may be none. `total` sums over processes; only the prototypes'
    sums need it, because a row lies whole in one share: with it every share gets the rows that the whole batch would.
    `peak` is the largest logit of the whole batch; it cancels, and keeps the powers finite.

    The papers' further factors (sum to 1, numbers of rows and prototypes) cancel in the next division.
    """
    with torch.no_grad():
        shares = ((logits.float() - peak) / temperature).exp()
        least = torch.finfo(shares.dtype).tiny
        for _ in range(iterations):
            shares = shares / total(shares.sum(dim=0)).clamp(min=least)
            shares = shares / shares.sum(dim=1, keepdim=True).clamp(min=least)
    return shares
