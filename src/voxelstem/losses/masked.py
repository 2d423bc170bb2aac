"""Errors of reconstructed voxels: over what was hidden, over everything, and never over what does not count."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from voxelstem.losses.terms import Counted, counted_mean


def among(masked: Bool[Tensor, "*shape"], counted: Bool[Tensor, "*shape"] | None) -> Bool[Tensor, "*shape"]:
    """What is masked and counts."""
    return masked if counted is None else masked & counted


def masked_mse(
    predicted: Float[Tensor, "*shape"],
    truth: Float[Tensor, "*shape"],
    masked: Bool[Tensor, "*shape"],
    *,
    counted: Bool[Tensor, "*shape"] | None = None,
    count: Float[Tensor, ""] | None = None,
) -> Counted:
    """Squared error summed over masked voxels, by their number (He et al. 2021; nnssl's masked autoencoder).

    Voxels that are not `counted` (background, a face that was removed) are in neither sum. With `~masked` it is the
    error of the visible ones: a term of its own, with a weight of its own. `count` as in `counted_mean`.
    """
    return counted_mean((predicted.float() - truth.float()).square(), among(masked, counted), count=count)


def smooth_l1(
    predicted: Float[Tensor, "*shape"],
    truth: Float[Tensor, "*shape"],
    *,
    beta: float = 0.1,
    counted: Bool[Tensor, "*shape"] | None = None,
    count: Float[Tensor, ""] | None = None,
) -> Counted:
    """Mean of d^2 / (2 beta) where the distance d is below `beta`, of d - beta / 2 where it is not (Girshick 2015).

    Over all voxels, or over those that are `counted`; `count` as in `counted_mean`. FOMO25's winner reconstructs with
    beta 0.1.
    """
    errors = F.smooth_l1_loss(predicted.float(), truth.float(), reduction="none", beta=beta)
    return counted_mean(errors, torch.ones_like(errors, dtype=torch.bool) if counted is None else counted, count=count)
