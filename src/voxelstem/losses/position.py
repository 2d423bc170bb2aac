"""Where in the body is this? Learned from distances within one scan, which need no expert."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def relative_position(
    predicted: Float[Tensor, "sample token 3"], true_mm: Float[Tensor, "sample token 3"], *, scale_mm: float = 100.0
) -> Float[Tensor, ""]:
    """Smooth L1 between predicted and true places, each taken relative to the mean over the sample's tokens.

    Only differences within one scan count: no scan's field of view, table height or body length enters, and yet
    one map of the body is the cheapest way to satisfy all scans at once. In the spirit of relative position
    regression (Lei et al. 2021, RPR-Loc), here for every patch token. Units of the loss: `scale_mm`.
    """
    truth = true_mm / scale_mm
    return F.smooth_l1_loss(
        predicted.float() - predicted.float().mean(dim=1, keepdim=True), truth - truth.mean(dim=1, keepdim=True)
    )


def place_of(
    positions: Float[Tensor, "row patch 3"],
    places_mm: Float[Tensor, "sample view 2 3"],
    grid: tuple[int, int, int] = (1, 1, 1),
) -> Float[Tensor, "sample token 3"]:
    """Millimetres in the scan of patch centres that are given as positions (-1, 1) within their block.

    Rows run over samples, their views and the blocks of a view; `places_mm` holds low corner and extent.
    """
    samples, views = places_mm.shape[:2]
    cells = torch.cartesian_prod(*[(torch.arange(size) + 0.5) / size for size in grid]).to(positions)
    inside = positions.unflatten(0, (samples, views, -1)) / 2 / torch.tensor(grid).to(positions)
    share = cells[:, None] + inside
    start, extent = places_mm[:, :, 0, None, None], places_mm[:, :, 1, None, None]
    return (start + share * extent).flatten(1, 3)
