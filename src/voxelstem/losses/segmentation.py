"""A soft segmentation against its truth, against volumes that somebody measured, and against its mirror image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from voxelstem.losses.terms import Counted, counted_mean

LEAST_MM3 = 1000.0
"""Volumes are compared relative to their size, but to no less than this: a voxel more or less is not a great error."""


def soft_segmentation(logits: Float[Tensor, "row class i j k"], truth: Int[Tensor, "row i j k"]) -> Float[Tensor, ""]:
    """Cross-entropy plus 1 - soft Dice, which is the mean over rows and over the classes that are there in a row.

    Dice counts each row by itself (Milletari et al. 2016), so that a loss does not depend on what shares a batch.
    """
    logits = logits.float()
    entropy = F.cross_entropy(logits, truth.long())
    shares = logits.softmax(dim=1).flatten(2)
    true = F.one_hot(truth.flatten(1).long(), logits.shape[1]).mT.to(shares)
    present = true.sum(dim=2) > 0
    dice = 2 * (shares * true).sum(dim=2) / (shares.sum(dim=2) + true.sum(dim=2)).clamp_min(1e-6)
    each = torch.where(present, dice, 0.0).sum(dim=1) / present.sum(dim=1)
    return entropy + 1 - each.mean()


def soft_volumes(
    logits: Float[Tensor, "row class i j k"], voxel_mm3: Float[Tensor, " row"]
) -> Float[Tensor, "row class"]:
    """Volume of each class in mm3, with a slope: the sum of its softmax over the voxels, times a voxel's volume."""
    return logits.float().softmax(dim=1).sum(dim=(2, 3, 4)) * voxel_mm3[:, None]


def volume_consistency(
    volumes_mm3: Float[Tensor, "row class"],
    target_mm3: Float[Tensor, "row class"],
    *,
    beta: float = 0.1,
) -> Counted:
    """How far the integral of a soft segmentation is from volumes that are known; NaN where nobody knows.

    Smooth L1 with `beta` of the error as a share of the known volume (of at least `LEAST_MM3`), so that a
    hippocampus weighs as much as the white matter.
    """
    known = ~target_mm3.isnan()
    truth = torch.where(known, target_mm3, 0.0).float()
    error = (volumes_mm3.float() - truth) / truth.clamp_min(LEAST_MM3)
    return counted_mean(F.smooth_l1_loss(error, torch.zeros_like(error), beta=beta, reduction="none"), known)


def opposite(names: Sequence[str]) -> tuple[int, ...]:
    """For each class the place of the one on the other side of the body; its own where a class has no side.

    A side is the word `left` or `right` in a name, with blanks or `_` between words.

    Raises:
        ValueError: a class of one side has none on the other.

    >>> opposite(["csf", "hippocampus_left", "hippocampus_right"])
    (0, 2, 1)
    """
    places: list[int] = []
    for name in names:
        parts = name.replace("_", " ").split()
        swapped = [{"left": "right", "right": "left"}.get(part, part) for part in parts]
        others = [place for place, other in enumerate(names) if other.replace("_", " ").split() == swapped]
        if not others:
            raise ValueError(f"'{name}' has a side, and no class is its other side: name both or neither")
        places.append(others[0])
    return tuple(places)


def mirror_symmetry(
    logits: Float[Tensor, "row class i j k"],
    mirrored: Float[Tensor, "row class i j k"],
    swap: Sequence[int],
) -> Float[Tensor, ""]:
    """How far the segmentation of a mirrored image is from the mirrored segmentation, left and right exchanged.

    Args:
        logits: Of the images.
        mirrored: Of the same images mirrored along axis i, which runs from left to right.
        swap: `opposite` of the classes.

    Returns:
        Mean squared difference of the two softmaxes; 0 for a network that knows sides and nothing else about them.
    """
    back = mirrored.float().softmax(dim=1).flip(2)[:, list(swap)]
    return (logits.float().softmax(dim=1) - back).square().mean()
