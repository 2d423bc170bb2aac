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


def moved_centre(
    centre: Float[Tensor, " prototype"],
    total: Float[Tensor, " prototype"],
    number: Float[Tensor, ""],
    *,
    momentum: float,
) -> Float[Tensor, " prototype"]:
    """The running mean after `number` more rows of logits that sum to `total`; after none it is what it was."""
    return centre.lerp(total / number.clamp(min=1), (1 - momentum) * (number > 0))


def cross_entropy(
    student: Float[Tensor, "*rows prototype"], target: Float[Tensor, "*rows prototype"], *, temperature: float
) -> Float[Tensor, "*rows"]:
    """Row by row: minus the sum of target times log softmax of the student's logits."""
    return -(target * (student.float() / temperature).log_softmax(dim=-1)).sum(dim=-1)


def entropy(target: Float[Tensor, "*rows prototype"]) -> Float[Tensor, "*rows"]:
    """Row by row: how evenly the teacher spreads its word, from 0 (one prototype) to log(prototypes)."""
    return torch.special.entr(target).sum(dim=-1)


def dino(
    student: Float[Tensor, "view sample prototype"],
    target: Float[Tensor, "global sample prototype"],
    *,
    temperature: float = 0.1,
) -> Float[Tensor, ""]:
    """Mean cross-entropy over all pairs (global view of the teacher, other view of the student).

    The first views of the student are the teacher's global views; a view is never compared with itself. The logarithms
    are taken once for each view, however many it is compared with, and all pairs are one product.
    """
    said = (student.float() / temperature).log_softmax(dim=-1)
    # A lower precision here would lose what the sharpened targets differ by.
    with torch.autocast(said.device.type, enabled=False):
        pairs = -(target.flatten(1) @ said.flatten(1).T) / student.shape[1]
    itself = torch.eye(*pairs.shape, dtype=torch.bool, device=pairs.device)
    return pairs.masked_fill(itself, 0.0).sum() / (pairs.numel() - min(pairs.shape))
