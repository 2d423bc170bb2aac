"""What a bottleneck must know of anatomy and health: volumes of structures, and whether something is wrong.

Nobody knows everything of every scan: what is NaN has no part in a loss.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from voxelstem.losses.terms import Average, Counted, alone, counted_mean

Form = Literal["huber", "cosine", "released"]


def volume_regression(
    predicted: Float[Tensor, "row column"],
    volumes: Float[Tensor, "row column"],
    *,
    form: Form = "huber",
    average: Average = alone,
) -> Counted:
    """How far predicted volumes are from known ones; NaN where nobody knows.

    `huber`: mean over known values of the Huber loss with delta 1, for columns of mean 0 and standard deviation 1.
    `cosine`: mean over rows of 1 - cosine, over the columns that are known of a row. `released`: minus the cosine, as
    SSL3D's winner has it, whose columns are shares of the intracranial volume: all positive, so that any two subjects'
    vectors lie close together and little is left to learn from.

    `count` is of values for `huber`, of rows with a known value otherwise.
    """
    known = ~volumes.isnan()
    truth, predicted = torch.where(known, volumes, 0.0).float(), predicted.float()
    if form == "huber":
        return counted_mean(F.smooth_l1_loss(predicted, truth, reduction="none"), known, average=average)
    cosine = F.cosine_similarity(torch.where(known, predicted, 0.0), truth, dim=1)
    return counted_mean(-cosine if form == "released" else 1 - cosine, known.any(dim=1), average=average)


def pathology(logits: Float[Tensor, "row class"], truth: Float[Tensor, " row"], *, average: Average = alone) -> Counted:
    """Mean cross-entropy of the rows of which the class is known; NaN where nobody knows."""
    known = ~truth.isnan()
    errors = F.cross_entropy(logits.float(), torch.where(known, truth, 0.0).long(), reduction="none")
    return counted_mean(errors, known, average=average)
