"""Binary cross entropy over classes of which each is there or not, and of some of which nobody knows."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def kind_weights(truth: Float[Tensor, "scan classes"]) -> Float[Tensor, "2 classes"]:
    """How much a scan weighs that has not (row 0) or has (row 1) a class, so that both kinds of all classes are alike.

    Of N scans n are known to be of a kind: each of these weighs N / 2n. A kind that nobody shows weighs nothing. NaN
    in `truth` means that nobody knows.
    """
    counts = torch.stack([(truth == kind).sum(dim=0) for kind in (0, 1)]).to(truth.dtype)
    return torch.where(counts > 0, len(truth) / (2 * counts.clamp(min=1)), 0.0)


def balanced_binary_entropy(
    logits: Float[Tensor, "row classes"], truth: Float[Tensor, "row classes"], weights: Float[Tensor, "2 classes"]
) -> Float[Tensor, ""]:
    """Sum of -w log p over what is known, p being the probability given to the truth, by rows and classes.

    The weights w are those of `kind_weights`; what is NaN in `truth` counts nowhere.
    """
    there = torch.nan_to_num(truth).to(logits.dtype)
    weight = torch.where(there > 0, weights[1], weights[0]).to(logits) * ~torch.isnan(truth)
    return F.binary_cross_entropy_with_logits(logits, there, weight=weight)
