"""Self-distillation: the student's distribution over prototypes should be the teacher's (Caron et al. 2021)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def centred_softmax(
    logits: Float[Tensor, "*rows prototype"], centre: Float[Tensor, " prototype"], *, temperature: float
) -> Float[Tensor, "*rows prototype"]:
    """Teacher's targets: subtract the running mean, sharpen (Caron et al. 2021, section 3.1)."""
    return ((logits.float() - centre) / temperature).softmax(dim=-1)


def cross_entropy(
    student: Float[Tensor, "*rows prototype"], target: Float[Tensor, "*rows prototype"], *, temperature: float
) -> Float[Tensor, "*rows"]:
    """Row by row: minus the sum of target times log softmax of the student's logits."""
    return -(target * (student.float() / temperature).log_softmax(dim=-1)).sum(dim=-1)


def dino(
    student: Float[Tensor, "view sample prototype"],
    target: Float[Tensor, "global sample prototype"],
    *,
    temperature: float = 0.1,
) -> Float[Tensor, ""]:
    """Mean cross-entropy over all pairs (global view of the teacher, other view of the student).

    The first views of the student are the teacher's global views; a view is never compared with itself.
    """
    terms = [
        cross_entropy(student[view], target[other], temperature=temperature).mean()
        for other in range(len(target))
        for view in range(len(student))
        if view != other
    ]
    return torch.stack(terms).mean()
