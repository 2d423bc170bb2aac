"""What a segmentation is trained with: cross entropy beside an overlap, background left out of the overlap."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

Overlap = Literal["dice_ce", "ce_tversky"]
EPS = 1e-5
"""Voxels: a class that is neither there nor said is no mistake."""


def overlap(
    logits: Float[Tensor, "row kind i j k"], truth: Int[Tensor, "row i j k"], *, kind: Overlap
) -> Float[Tensor, ""]:
    """Cross entropy and 1 - an overlap, which is counted over the whole batch and averaged over classes.

    `dice_ce`: their sum (nnU-Net, Isensee et al. 2021). `ce_tversky`: half the cross entropy and Tversky's index, in
    which what was missed weighs 0.7 and what was said too much 0.3, for small things (FOMO25).
    """
    entropy = F.cross_entropy(logits, truth)
    if kind == "dice_ce":
        return entropy + 1 - tversky(logits, truth, missed=0.5, too_much=0.5)
    return 0.5 * entropy + 1 - tversky(logits, truth, missed=0.7, too_much=0.3)


def tversky(
    logits: Float[Tensor, "row kind i j k"], truth: Int[Tensor, "row i j k"], *, missed: float, too_much: float
) -> Float[Tensor, ""]:
    """Share of hits among hits and weighted mistakes, softly (Salehi et al. 2017); Dice where both weigh 0.5."""
    share = logits.softmax(dim=1)[:, 1:].transpose(0, 1).flatten(1)
    there = F.one_hot(truth, logits.shape[1]).movedim(-1, 1)[:, 1:].transpose(0, 1).flatten(1)
    hits, said = (share * there).sum(dim=1), share.sum(dim=1)
    mistakes = missed * (there.sum(dim=1) - hits) + too_much * (said - hits)
    return ((hits + EPS) / (hits + mistakes + EPS)).mean()
