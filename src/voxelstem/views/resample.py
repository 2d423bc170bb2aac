"""Resampling of tensors: the matrices of `voxelstem.resampling`, applied by torch one axis after another."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from voxelstem.resampling import weights

ROWS = (16, 64)
"""Rows of the first and second axis' matrix that a processor multiplies at a time. A row touches its neighbours only,
so a few rows together need a few input planes; the second axis pays for each product once for every plane. A GPU has
better things to do than many small products."""


def sample(
    array: Float[Tensor, "channel i j k"],
    coordinates: tuple[np.ndarray, np.ndarray, np.ndarray],
    *,
    step_ijk: tuple[float, float, float],
    outside: float,
    flip_axes: tuple[int, ...] = (),
) -> Float[Tensor, "channel a b c"]:
    """Read `array` at the outer product of three coordinate lists (input voxel indices, fractions allowed).

    Args:
        array: Voxels on any device; the result lies there too.
        coordinates: One list for each axis.
        step_ijk: How far apart the coordinates of each list are: a step above 1 averages what lies between.
        outside: What positions beyond the scan get (the low end of the window: air for CT).
        flip_axes: Axes (0 to 2) of which the result is mirrored, at no cost: their matrices are.
    """
    matrices: list[Float64[np.ndarray, "out in"]] = []
    for axis, (wanted, step) in enumerate(zip(coordinates, step_ijk, strict=True)):
        matrix = weights(wanted, array.shape[1 + axis], step=step)
        matrices.append(matrix[::-1] if axis in flip_axes else matrix)
    result = array - outside if outside else array
    # The axis that shrinks most goes first: the others then have less to do.
    for axis in sorted(range(3), key=lambda axis: len(matrices[axis]) / matrices[axis].shape[1]):
        result = _along(result, matrices[axis], axis)
    return result + outside if outside else result


def _along(
    array: Float[Tensor, "channel i j k"], matrix: Float64[np.ndarray, "out in"], axis: int
) -> Float[Tensor, "channel a b c"]:
    """Multiply one axis by a matrix."""
    factor = torch.from_numpy(np.ascontiguousarray(matrix)).to(array)
    if axis == 2:  # noqa: PLR2004 - the last axis lies in memory as a matrix product wants it
        return (array.flatten(0, 2) @ factor.T).reshape(*array.shape[:3], -1)
    # Axis 0 is a product of two matrices for each channel, axis 1 one for each plane.
    planes = array.flatten(2) if axis == 0 else array.flatten(0, 1)
    result = planes.new_empty((len(planes), len(matrix), planes.shape[2]))
    for rows, columns in _bands(matrix, ROWS[axis] if array.device.type == "cpu" else len(matrix)):
        factors = factor[rows, columns].expand(len(planes), -1, -1)
        # Written to where it belongs: a product that has to be copied takes as long again.
        torch.bmm(factors, planes[:, columns], out=result[:, rows])
    shape = list(array.shape)
    shape[1 + axis] = len(matrix)
    return result.reshape(shape)


def _bands(matrix: Float64[np.ndarray, "out in"], rows: int) -> list[tuple[slice, slice]]:
    """A few rows at a time, with the columns in which any of them is not zero (one at least)."""
    found: list[tuple[slice, slice]] = []
    for start in range(0, len(matrix), rows):
        used = np.flatnonzero(matrix[start : start + rows].any(axis=0))
        low, high = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
        found.append((slice(start, min(start + rows, len(matrix))), slice(low, high)))
    return found
