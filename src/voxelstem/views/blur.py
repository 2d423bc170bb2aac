"""Gaussian blur of many views at once, each with its own width: one small matrix for each axis."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Edge = Literal["inside", "air"]


def gaussian_matrix(
    sigma: Float[Tensor, " row"], size: int, *, edge: Edge = "inside"
) -> Float[Tensor, "row size size"]:
    """For each row the matrix that blurs an axis of `size` voxels by a Gaussian of `sigma` voxels.

    A weight is the Gaussian's share within the voxel. What reaches over the edge of the view is left out and the rest
    scaled up (`inside`), or counts as zeros (`air`).

    Raises:
        ValueError: a sigma that is not above 0.
    """
    if not (sigma > 0).all():
        raise ValueError(f"a Gaussian needs sigma > 0, got {sigma.min():g}")
    places = torch.arange(size, device=sigma.device, dtype=torch.float64)
    distance = (places[:, None] - places[None])[None]
    scale = (sigma.double() * math.sqrt(2))[:, None, None]
    weight = 0.5 * (torch.erf((distance + 0.5) / scale) - torch.erf((distance - 0.5) / scale))
    if edge == "inside":
        weight = weight / weight.sum(dim=2, keepdim=True)
    return weight.float()


def blur(
    views: Float[Tensor, "row channel i j k"], sigma_ijk: Float[Tensor, "row 3"], *, edge: Edge = "inside"
) -> Float[Tensor, "row channel i j k"]:
    """Blur each row by its own widths along its three axes, in voxels."""
    over_i, over_j, over_k = (
        gaussian_matrix(sigma, size, edge=edge) for sigma, size in zip(sigma_ijk.T, views.shape[2:], strict=True)
    )
    return torch.stack(
        [
            _blur_row(row, (along_i, along_j, along_k))
            for row, along_i, along_j, along_k in zip(views, over_i, over_j, over_k, strict=True)
        ]
    )


def _blur_row(
    row: Float[Tensor, "channel i j k"], matrices: tuple[Tensor, Tensor, Tensor]
) -> Float[Tensor, "channel i j k"]:
    over_i, over_j, over_k = matrices
    result = ((over_i @ row.flatten(2)).reshape(row.shape) @ over_k.mT).flatten(0, 1)
    # Not `@`: to broadcast, that copies the matrix for each plane.
    return torch.bmm(over_j.expand(len(result), -1, -1), result).reshape(row.shape)
