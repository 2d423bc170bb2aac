"""Two scans of one person, some time apart: formulas for what changes and how fast.

What nobody knows is NaN in a target and counts for nothing.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from voxelstem.losses.terms import Counted, shared

SHORTEST_YEARS = 0.1
"""Below about five weeks the error of measuring a volume is larger than what a year changes: no rate is taken."""


def trusted(
    target: Float[Tensor, "row *rest"], trust: Float[Tensor, "row 1"] | None = None
) -> Float[Tensor, "row *rest"]:
    """How much each value counts: 0 where the target is not known, else the trust in its row."""
    weight = target.isfinite().float()
    return weight if trust is None else weight * trust.float().nan_to_num(0.0).view(-1, *[1] * (target.ndim - 1))


def known_huber(
    predicted: Float[Tensor, "row *rest"],
    target: Float[Tensor, "row *rest"],
    trust: Float[Tensor, "row 1"] | None = None,
    *,
    delta: float = 1.0,
    count: Float[Tensor, ""] | None = None,
) -> Counted:
    """Mean of Huber's loss over the targets that are known, each row counted by how far it is trusted.

    Huber 1964: half the square below `delta`, then `delta` times (distance - half of `delta`): a wrongly segmented
    scan pulls no harder than one that is `delta` off.

    Args:
        predicted: May be anything where the target is NaN.
        target: NaN where nobody knows.
        trust: Of each row, >= 0: a quality score, say, or 0 to leave it out. None trusts all alike; NaN is no trust.
        delta: In the target's unit.
        count: Trust in a micro-batch, on average over all of a step (`protocols.Batch.known`); as much as here where it
            is not given.
    """
    known, weight = target.isfinite(), trusted(target, trust)
    gap = torch.where(known, predicted.float() - target.float().nan_to_num(0.0), 0.0)
    each = F.huber_loss(gap, torch.zeros_like(gap), reduction="none", delta=delta)
    return shared((weight * each).sum(), weight.sum() if count is None else count)


def annualised(
    first: Float[Tensor, "sample column"],
    second: Float[Tensor, "sample column"],
    years: Float[Tensor, "sample 1"],
    *,
    shortest_years: float = SHORTEST_YEARS,
) -> Float[Tensor, "sample column"]:
    """Change per year of each column; NaN where a volume or the time between is unknown, or the time too short.

    Args:
        first: Volumes of scan a (shares of the intracranial volume, or these standardised).
        second: Volumes of scan b in the same unit.
        years: Age or date of b minus that of a; negative where b is the earlier scan: the rate stays the same.
        shortest_years: A pair closer in time than this has no rate.
    """
    enough = years.abs() >= shortest_years
    return torch.where(enough, (second - first) / torch.where(enough, years, 1.0), torch.nan)


def latent_dynamics(
    foreseen: Float[Tensor, "row channel *cell"],
    came: Float[Tensor, "row channel *cell"],
    trust: Float[Tensor, "row 1"],
    *,
    delta: float = 1.0,
    count: Float[Tensor, ""] | None = None,
) -> Counted:
    """Huber's loss between the state that was foreseen and the state that came; no gradient runs into the latter.

    Without this stop both sides could agree on a constant at once (Chen and He 2021).

    Args:
        foreseen: f(state of a, years, age).
        came: State of b.
        trust: 1 where the time between is known and b is another scan; 0 leaves a row out.
        delta: As in `known_huber`.
        count: As in `known_huber`, of rows.
    """
    gaps = F.huber_loss(foreseen.float(), came.detach().float(), reduction="none", delta=delta).flatten(1).mean(dim=1)
    weight = trust.float().nan_to_num(0.0)[:, 0]
    return shared((weight * gaps).sum(), weight.sum() if count is None else count)
