"""Masked patches: the student names what the teacher sees behind the mask (Zhou et al. 2021, iBOT)."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from voxelstem.losses.dino import cross_entropy


def patch_weights(masked: Bool[Tensor, "row patch"]) -> Float[Tensor, " hidden"]:
    """What each masked patch counts for, in C-order: the masked patches of a row share 1 / rows.

    As in DINOv2 (Oquab et al. 2023): rows without a masked patch are rows too. So the sum over processes that hold
    equally many rows, divided by their number, is the sum over all rows, whoever holds the masked ones.
    """
    count = masked.sum(dim=1, keepdim=True).clamp(min=1)
    return (1 / (count * len(masked))).expand_as(masked)[masked]


def ibot(
    student: Float[Tensor, "hidden prototype"],
    target: Float[Tensor, "hidden prototype"],
    weights: Float[Tensor, " hidden"],
    *,
    temperature: float = 0.1,
) -> Float[Tensor, ""]:
    """Weighted sum of the cross-entropy over masked patches (`patch_weights`); 0 where there are none."""
    return (cross_entropy(student, target, temperature=temperature) * weights).sum()
