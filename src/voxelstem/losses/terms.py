"""Named terms of a loss: each with its weight, and where not everything is known, with how much it rests on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from voxelstem.protocols import StepOutput


@dataclass(frozen=True, kw_only=True, slots=True)
class Counted:
    """A mean over what is known, and how many values that is.

    The mean of `value` over the micro-batches and processes of a step is the mean over everything that is known in all
    of them. Where nothing is known `value` is 0 without a slope. Where nothing is in any of them `count` is 0, and
    `add_up` says nothing of the term but that.
    """

    value: Float[Tensor, ""]
    count: Float[Tensor, ""]
    """Values known in a micro-batch, on average over those of all processes."""


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
    values: Float[Tensor, "*shape"], known: Bool[Tensor, "*shape"], *, count: Float[Tensor, ""] | None = None
) -> Counted:
    """Mean of the values that are known; what stands at the others must be finite, and counts for nothing.

    Args:
        values: Of this micro-batch.
        known: Which of them are.
        count: How many are in a micro-batch, on average over all of a step (`protocols.Batch.known`); as many as here
            where it is not given.
    """
    return shared(torch.where(known, values, 0.0).sum(), known.sum().float() if count is None else count)


def shared(total: Float[Tensor, ""], count: Float[Tensor, ""]) -> Counted:
    """What was added up here, by how much there is in a micro-batch on average."""
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
