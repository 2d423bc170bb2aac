"""What keeps the two halves of a latent apart: one that all scans of a subject share, one of each scan's contrast."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from voxelstem.losses.terms import Counted, counted_mean


def kl(mean: Float[Tensor, "*shape"], logvar: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Mean over all numbers of the divergence of N(mean, exp(logvar)) from N(0, 1) (Kingma and Welling 2013).

    (exp(logvar) + mean^2 - 1 - logvar) / 2, averaged and not summed, as FOMO25's winner does.
    """
    mean, logvar = mean.float(), logvar.float()
    return (logvar.exp() + mean.square() - 1 - logvar).mean() / 2


def row_cosines(one: Float[Tensor, "row *rest"], other: Float[Tensor, "row *rest"]) -> Float[Tensor, " row"]:
    """Cosine of each row with its partner, everything in a row strung together; a row of zeros has 0."""
    return F.cosine_similarity(one.float().flatten(1), other.float().flatten(1), dim=1)


def subject_cosine(one: Float[Tensor, "row *rest"], other: Float[Tensor, "row *rest"]) -> Float[Tensor, ""]:
    """Mean of 1 - cosine: two scans of a subject say the same of the subject."""
    return (1 - row_cosines(one, other)).mean()


def contrast_repulsion(
    one: Float[Tensor, "row *rest"],
    other: Float[Tensor, "row *rest"],
    *,
    skip: Bool[Tensor, " row"] | None = None,
    count: Float[Tensor, ""] | None = None,
) -> Counted:
    """Mean cosine, to be made small: two contrasts are not told by the same words.

    It is smallest at -1. Rows to `skip` are pairs of one scan and its copy, which have one contrast: to push them
    apart would ask for a difference that is not there. `count` as in `counted_mean`.
    """
    cosine = row_cosines(one, other)
    return counted_mean(cosine, torch.ones_like(cosine, dtype=torch.bool) if skip is None else ~skip, count=count)
