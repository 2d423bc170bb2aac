"""Times until an event, some of them censored: Cox's partial likelihood, and the likelihood of hazards by interval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

Ties = Literal["efron", "breslow"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fates:
    """What is known of each row in each interval."""

    passed: Bool[Tensor, "row interval"]
    """The interval is known to have been passed without the event."""
    came: Bool[Tensor, "row interval"]
    """The event came in it."""


def cox_loss(
    log_risk: Float[Tensor, " row"],
    time: Float[Tensor, " row"],
    event: Bool[Tensor, " row"],
    *,
    ties: Ties = "efron",
) -> Float[Tensor, ""]:
    """Negative log of Cox's partial likelihood (Cox 1972), as the mean over events; 0 where there is none.

    At each event the row's risk stands against the sum of all rows that are still watched, rows whose watch ends at
    that very time among them. It compares rows of a batch with one another: means of parts are not the whole's.

    Args:
        log_risk: Logarithm of each row's hazard ratio.
        time: When the event came or the watch ended, in any unit.
        event: Whether it came.
        ties: What stands against the l-th (from 0) of d events at one time: `efron` takes l / d of their own risk from
            the sum, as if they had come one after the other (Efron 1977); `breslow` takes nothing (Breslow 1974).
    """
    order = time.argsort(descending=True, stable=True)
    risk, event = log_risk.to(torch.promote_types(log_risk.dtype, torch.float32))[order], event[order]
    _, group, sizes = torch.unique_consecutive(time[order], return_inverse=True, return_counts=True)
    # From the latest on: after the last row of a time all who reach that time have been added up.
    watched = risk.logcumsumexp(dim=0)[sizes.cumsum(dim=0) - 1][group]
    if ties == "efron":
        rank, tied = _ranks(group, event)
        own = _logsumexp(torch.where(event, risk, -torch.inf), group, len(sizes))[group]
        # Where there is no event `own` is endless: it must not meet the 0 that it is multiplied by.
        share = torch.where(rank > 0, own - watched, -torch.inf).exp() * rank / tied
        watched = watched + torch.log1p(-share)
    return torch.where(event, watched - risk, 0.0).sum() / event.sum().clamp_min(1)


def fates(time: Float[Tensor, " row"], event: Bool[Tensor, " row"], edges: Float[Tensor, " edge"]) -> Fates:
    """What times say of the intervals [edge, next edge) (Gensheimer & Narasimhan 2019).

    A row whose watch ends in an interval has passed it if it saw at least its half. What lies at or beyond the last
    edge has passed all of them.

    Raises:
        ValueError: fewer than two edges, or edges that do not rise.
    """
    if len(edges) < 2 or not (edges.diff() > 0).all():  # noqa: PLR2004 - an interval has two
        raise ValueError("intervals need two or more edges, one after the other")
    low, high = edges[:-1], edges[1:]
    until = torch.where(event[:, None], high, (low + high) / 2)
    came = event[:, None] & (time[:, None] >= low) & (time[:, None] < high)
    return Fates(passed=time[:, None] >= until, came=came)


def hazard_loss(logits: Float[Tensor, "row interval"], known: Fates) -> Float[Tensor, ""]:
    """Negative log likelihood of hazards by interval, as the mean over rows (Gensheimer & Narasimhan 2019).

    A hazard is the chance that the event comes in an interval if it has not come before.

    Args:
        logits: Log odds of the hazards.
        known: `fates` of the rows.
    """
    passed, came = F.softplus(logits), F.softplus(-logits)
    return (torch.where(known.passed, passed, 0.0) + torch.where(known.came, came, 0.0)).sum(dim=1).mean()


def hazard_curve(logits: Float[Tensor, "row interval"]) -> Float[Tensor, "row interval"]:
    """Chance that the event has not come by the end of each interval."""
    return (-F.softplus(logits).cumsum(dim=1)).exp()


def _ranks(group: Int[Tensor, " row"], event: Bool[Tensor, " row"]) -> tuple[Int[Tensor, " row"], Int[Tensor, " row"]]:
    """For each row how many events of its time stand before it, and how many there are (at least 1)."""
    count = torch.zeros(len(group), dtype=torch.long, device=group.device).index_add_(0, group, event.long())
    before = event.long().cumsum(dim=0) - event.long()
    first = torch.full_like(count, len(group)).scatter_reduce_(0, group, before, "amin")
    return torch.where(event, before - first[group], 0), count[group].clamp_min(1)


def _logsumexp(values: Float[Tensor, " row"], group: Int[Tensor, " row"], groups: int) -> Float[Tensor, " group"]:
    """Log of the sum of exponentials in each group; minus infinity where every value is."""
    top = torch.full((groups,), -torch.inf, dtype=values.dtype, device=values.device)
    top = top.scatter_reduce(0, group, values.detach(), "amax")
    level = torch.where(top.isfinite(), top, 0.0)
    total = torch.zeros_like(top).index_add(0, group, (values - level[group]).exp())
    return torch.where(total > 0, total, 1.0).log() + torch.where(total > 0, level, -torch.inf)
