"""Predicting features instead of voxels (Assran et al. 2023, I-JEPA)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def normalise_features(tokens: Float[Tensor, "*rows dim"], *, eps: float = 1e-6) -> Float[Tensor, "*rows dim"]:
    """Each token to mean 0 and variance 1, so that a teacher cannot make the task easy by shrinking."""
    return F.layer_norm(tokens.float(), tokens.shape[-1:], eps=eps)


def feature_error(
    predicted: Float[Tensor, "*rows dim"], target: Float[Tensor, "*rows dim"], *, beta: float = 1.0
) -> Float[Tensor, ""]:
    """Mean over all numbers of the smooth L1 distance: d^2 / (2 beta) below `beta`, d - beta / 2 above.

    A `beta` larger than any distance makes it the squared error over 2 beta; 0 makes it the absolute one.
    """
    return F.smooth_l1_loss(predicted.float(), target, beta=beta)
