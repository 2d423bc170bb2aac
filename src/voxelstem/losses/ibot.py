"""Masked patches: the student names what the teacher sees behind the mask (Zhou et al. 2021, iBOT)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from voxelstem.losses.dino import cross_entropy


def ibot(
    student: Float[Tensor, "row patch prototype"],
    target: Float[Tensor, "row patch prototype"],
    masked: Bool[Tensor, "row patch"],
    *,
    temperature: float = 0.1,
) -> Float[Tensor, ""]:
    """Mean over rows of the mean cross-entropy over that row's masked patches; rows without any count not."""
    per_patch = cross_entropy(student, target, temperature=temperature) * masked
    count = masked.sum(dim=1)
    rows = count > 0
    if not bool(rows.any()):
        return torch.zeros((), device=student.device)
    return (per_patch.sum(dim=1)[rows] / count[rows]).mean()
