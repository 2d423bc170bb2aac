"""Named terms of a loss: each with its weight, and where not everything is known, with how much it rests on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from voxelstem.protocols import StepOutput

Average = Callable[[Tensor], Tensor]
"""The mean of a statistic over the processes that train together: `distributed.mean`, or `alone`."""


def alone(value: Tensor) -> Tensor:
    """The mean over one process: what it was given, without a graph."""
    return value.detach()


@dataclass(frozen=True, kw_only=True, slots=True)
class Counted:
    """A mean over what is known, and how many values that is.

    The mean over processes of `value` is the mean over everything that is known in all of them. Where nothing is
    known `value` is 0 without a slope and `count` is 0: `add_up` then says nothing of the term but its count.
    """

    value: Float[Tensor, ""]
    count: Float[Tensor, ""]
    """Values known in one process, on average over processes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Term:
    """One named part of a loss, as it stands before its weight."""

    weight: float
    value: Float[Tensor, ""]
    count: Float[Tensor, ""] | None = None
    """How much it rests on, where that changes from batch to batch."""

    @classmethod
    def of(cls, weight: float, counted: Counted) -> Term:
        """A term that rests on what is known."""
        return cls(weight=weight, value=counted.value, count=counted.count)


def counted_mean(
    values: Float[Tensor, "*shape"], known: Bool[Tensor, "*shape"], *, average: Average = alone
) -> Counted:
    """Mean of the values that are known; what stands at the others must be finite, and counts for nothing."""
    count = average(known.sum().float())
    total = torch.where(known, values, 0.0).sum()
    return Counted(value=total / torch.where(count > 0, count, 1.0), count=count)


def add_up(terms: Mapping[str, Term]) -> StepOutput:
    """The weighed sum, and `loss/<name>` of every term, unweighed, with `known/<name>` where it counts.

    A term that rests on nothing has no `loss/<name>`: a 0 would look like a perfect answer. Its `known/<name>` is 0.
    """
    loss = torch.stack([term.weight * term.value for term in terms.values()]).sum()
    figures = {f"loss/{name}": term.value.detach() for name, term in terms.items()}
    figures |= {f"known/{name}": term.count for name, term in terms.items() if term.count is not None}
    # One transfer for all of them: each would let the device run dry.
    said = dict(zip(figures, torch.stack(list(figures.values())).tolist(), strict=True))
    absent = {f"loss/{name}" for name in terms if said.get(f"known/{name}") == 0}
    return StepOutput(loss=loss, scalars={name: value for name, value in said.items() if name not in absent})
