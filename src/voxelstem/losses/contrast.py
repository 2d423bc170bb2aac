"""Two views of each of many subjects: alike within a pair, unlike (NT-Xent) or spread out (VICReg) among pairs.

Rows are those of all processes (`distributed.rows`), so that every process computes the loss of the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

_LEAST_VARIANCE = 1e-12


def nt_xent(
    one: Float[Tensor, "row dim"],
    other: Float[Tensor, "row dim"],
    *,
    same: Bool[Tensor, "row row"] | None = None,
    temperature: float = 0.1,
) -> Float[Tensor, ""]:
    """Cross-entropy of finding a view's partner among all other views of the batch (Chen et al. 2020, SimCLR).

    Similarity is the cosine by `temperature`; each of the 2 * row views is asked once, never about itself.

    Args:
        one: A view of each row.
        other: Its partner.
        same: Whether two rows show one subject. Their views are not to be told apart: none stands among the others
            that a partner is looked for among. None: every row is another subject's.
        temperature: Of the softmax.
    """
    # A lower precision here would lose what decides about the first among many.
    with torch.autocast(one.device.type, enabled=False):
        views = F.normalize(torch.cat([one, other]).float(), dim=1)
        logits = views @ views.T / temperature
    left_out = torch.eye(len(views), dtype=torch.bool, device=views.device)
    partner = torch.arange(len(views), device=views.device).roll(len(one))
    if same is not None:
        found = F.one_hot(partner, len(views)).bool()
        left_out = left_out | (same.to(views.device).repeat(2, 2) & ~found)
    return F.cross_entropy(logits.masked_fill(left_out, -torch.inf), partner)


def standardised(
    one: Float[Tensor, "row dim"], other: Float[Tensor, "row dim"], *, eps: float = 1e-3
) -> tuple[Float[Tensor, "row dim"], Float[Tensor, "row dim"]]:
    """Both views with each column's mean over all of them taken off, and divided by its standard deviation.

    What all scans share says nothing of whose they are, and in a fresh network it is nearly all that there is: every
    cosine is then 1, and nothing is learned from it. `eps` times the mean deviation is added to each: a column that
    does not vary stays near 0.
    """
    with torch.autocast(one.device.type, enabled=False):
        both = torch.cat([one, other]).float()
        # A root has no slope at 0, where columns that do not vary would lie.
        spread = (both.var(dim=0, correction=0) + _LEAST_VARIANCE).sqrt()
        first, second = ((both - both.mean(dim=0)) / (spread + eps * spread.mean())).chunk(2)
    return first, second


def between_groups(values: Float[Tensor, "row dim"], group: Float[Tensor, " row"]) -> Float[Tensor, ""]:
    """The share of the columns' variance that lies between groups, averaged over columns (Fisher's correlation ratio).

    0 where all groups have one mean, and no linear reader can tell them apart; 1 where a group's rows are all alike.
    Rows of whom nobody knows the group (NaN) are left out; 0 without a slope where fewer than two groups are left. Of
    n rows in g groups (g - 1) / (n - 1) are to be expected where there is nothing.
    """
    rows, group = values.float()[~group.isnan()], group[~group.isnan()]
    names = group.unique()
    if len(names) < 2:  # noqa: PLR2004 - nothing lies between one group and itself
        return 0.0 * values.float().sum()
    with torch.autocast(values.device.type, enabled=False):
        centred = rows - rows.mean(dim=0)
        member = (group[:, None] == names).to(centred)
        between = ((member.T @ centred).square() / member.sum(dim=0)[:, None]).sum(dim=0)
        return (between / (centred.square().sum(dim=0) + _LEAST_VARIANCE)).mean()


def same_subject(number: Float[Tensor, "row 1"]) -> Bool[Tensor, "row row"]:
    """Which rows have one subject's number; NaN, whom nobody knows, is like no other."""
    return number == number.mT


@dataclass(frozen=True, kw_only=True, slots=True)
class Vicreg:
    """The three parts of VICReg before their weights (25, 25 and 1 in the paper)."""

    invariance: Float[Tensor, ""]
    variance: Float[Tensor, ""]
    covariance: Float[Tensor, ""]


def vicreg(
    one: Float[Tensor, "row dim"], other: Float[Tensor, "row dim"], *, deviation: float = 1.0, eps: float = 1e-4
) -> Vicreg:
    """Partners alike, each column spread at least by `deviation`, columns uncorrelated (Bardes et al. 2021).

    Invariance is the mean squared difference. Variance is how far a column's standard deviation falls short, averaged
    over columns and over both sides. Covariance is the sum of squares beside the diagonal by the number of columns,
    summed over both sides.

    Raises:
        ValueError: fewer than two rows, of which no variance is.
    """
    if len(one) < 2:  # noqa: PLR2004 - a variance
        raise ValueError(f"vicreg needs two rows or more, got {len(one)}")
    with torch.autocast(one.device.type, enabled=False):
        sides = [side.float() for side in (one, other)]
        short = [F.relu(deviation - (side.var(dim=0) + eps).sqrt()).mean() for side in sides]
        shared = [_squares_beside_diagonal(side) for side in sides]
        return Vicreg(
            invariance=F.mse_loss(sides[0], sides[1]),
            variance=torch.stack(short).mean(),
            covariance=torch.stack(shared).sum(),
        )


def _squares_beside_diagonal(side: Float[Tensor, "row dim"]) -> Float[Tensor, ""]:
    centred = side - side.mean(dim=0)
    covariance = centred.T @ centred / (len(side) - 1)
    return (covariance.square().sum() - covariance.diagonal().square().sum()) / side.shape[1]
