"""What a bottleneck must know of anatomy and health: volumes of structures, and whether something is wrong.

Nobody knows everything of every scan: what is NaN has no part in a loss.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from voxelstem.losses.terms import Counted, counted_mean

Form = Literal["huber", "cosine", "released"]


def known_volumes(
    volumes: Float[Tensor, "row column"], form: Form = "huber"
) -> Bool[Tensor, "row column"] | Bool[Tensor, " row"]:
    """What a form counts: values that are known for `huber`, rows with a known value otherwise."""
    known = ~volumes.isnan()
    return known if form == "huber" else known.any(dim=1)


def volume_regression(
    predicted: Float[Tensor, "row column"],
    volumes: Float[Tensor, "row column"],
    *,
    form: Form = "huber",
    count: Float[Tensor, ""] | None = None,
) -> Counted:
    """How far predicted volumes are from known ones; NaN where nobody knows.

    `huber`: mean over known values of the Huber loss with delta 1, for columns of mean 0 and standard deviation 1.
    `cosine`: mean over rows of 1 - cosine, over the columns that are known of a row. `released`: minus the cosine, as
    SSL3D's winner has it, whose columns are shares of the intracranial volume: all positive, so that any two subjects'
    vectors lie close together and little is left to learn from.

    What is counted says `known_volumes`; `count` as in `counted_mean`.
    """
    known, counted = ~volumes.isnan(), known_volumes(volumes, form)
    truth, predicted = torch.where(known, volumes, 0.0).float(), predicted.float()
    if form == "huber":
        return counted_mean(F.smooth_l1_loss(predicted, truth, reduction="none"), counted, count=count)
    cosine = F.cosine_similarity(torch.where(known, predicted, 0.0), truth, dim=1)
    return counted_mean(-cosine if form == "released" else 1 - cosine, counted, count=count)


def known_class(
    logits: Float[Tensor, "row class"], truth: Float[Tensor, " row"], *, count: Float[Tensor, ""] | None = None
) -> Counted:
    """Mean cross-entropy of the rows of which the class is known; NaN where nobody knows. `count`: `counted_mean`."""
    known = ~truth.isnan()
    errors = F.cross_entropy(logits.float(), torch.where(known, truth, 0.0).long(), reduction="none")
    return counted_mean(errors, known, count=count)
