"""Gram anchoring: patches resemble each other as they did for an earlier teacher (Siméoni et al. 2025, DINOv3)."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Negatives = Literal["keep", "drop", "drop_teacher"]
"""What becomes of cosines below 0: they count; they count as 0; or only the teacher's count as 0."""


def gram(
    student: Float[Tensor, "row patch dim"],
    teacher: Float[Tensor, "row patch dim"],
    *,
    negatives: Negatives = "keep",
) -> Float[Tensor, ""]:
    """Mean squared difference of the cosines between the patches of each row (section 4.2, equation 2).

    The cosines of a whole batch's patches with one another are asked for by making one row of them.
    """
    with torch.autocast(student.device.type, enabled=False):
        mine, theirs = (_cosines(patches) for patches in (student, teacher))
    if negatives != "keep":
        theirs = theirs.relu()
    if negatives == "drop":
        mine = mine.relu()
    return (mine - theirs).square().mean()


def _cosines(patches: Float[Tensor, "row patch dim"]) -> Float[Tensor, "row patch patch"]:
    unit = F.normalize(patches.float(), dim=-1)
    return unit @ unit.transpose(-1, -2)
