"""Resampling of tensors: the matrices of `voxelstem.resampling`, applied by torch."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from voxelstem.resampling import weights


def sample(
    array: Float[Tensor, "channel i j k"],
    coordinates: tuple[np.ndarray, np.ndarray, np.ndarray],
    *,
    step_ijk: tuple[float, float, float],
    outside: float,
) -> Float[Tensor, "channel a b c"]:
    """Read `array` at the outer product of three coordinate lists (input voxel indices, fractions allowed).

    `step_ijk` says how far apart the coordinates of each list are: a step above 1 averages what lies between.
    Positions beyond the scan get `outside` (the low end of the window: air for CT).
    """
    result = array - outside
    for axis, (wanted, step) in enumerate(zip(coordinates, step_ijk, strict=True), start=1):
        matrix = torch.from_numpy(weights(wanted, array.shape[axis], step=step)).to(result)
        result = torch.movedim(F.linear(torch.movedim(result, axis, -1), matrix), -1, axis)
    return result + outside
