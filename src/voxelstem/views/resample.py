"""Separable linear resampling: one small matrix for each axis, exact against the textbook formula."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def grid_coordinates(count: int, *, start: float, step: float) -> Float[np.ndarray, "out"]:
    """Input indices of `count` output voxel centres.

    `start` is where the first output voxel begins and `step` how wide each is, both in input voxels
    measured from the low edge of the input. Centres lie half a voxel inside the edges.
    """
    return start + (np.arange(count) + 0.5) * step - 0.5


def resampled_count(count: int, spacing_mm: float, wanted_mm: float) -> int:
    """How many voxels of `wanted_mm` cover `count` voxels of `spacing_mm`. Rounds up: nothing is cut away."""
    return max(1, int(np.ceil(count * spacing_mm / wanted_mm - 1e-6)))


def weights(coordinates: Float[np.ndarray, "out"], size: int) -> Float[np.ndarray, "out in"]:
    """Interpolation matrix of one axis: linear between neighbours, a triangle as wide as the step when thinning.

    Coordinates up to half a voxel beyond the first or last centre still lie inside the scan and repeat the
    edge; what lies further out has weight nowhere (the row sums to less than 1), see `sample`.
    """
    inside = (coordinates >= -0.5 - 1e-9) & (coordinates <= size - 0.5 + 1e-9)
    centre = np.where(inside, np.clip(coordinates, 0, size - 1), coordinates)
    step = abs(coordinates[1] - coordinates[0]) if len(coordinates) > 1 else 1.0
    width = max(1.0, float(step))
    # Normalising over the whole integer lattice, not only the voxels that exist, keeps the outside outside. A
    # position up to one width beyond the last voxel still sees it, and sees the lattice one width further out.
    reach = int(np.ceil(2 * width))
    lattice = np.arange(-reach, size + reach)
    full = np.clip(1.0 - np.abs(lattice[None] - centre[:, None]) / width, 0.0, None)
    total = full.sum(axis=1, keepdims=True)
    full = np.divide(full, total, out=np.zeros_like(full), where=total > 0)
    kept = full[:, reach : reach + size]
    # A thinning filter that reaches over the edge from inside repeats the edge instead of mixing in air.
    rows = kept.sum(axis=1, keepdims=True)
    return np.where(inside[:, None] & (rows > 0), kept / np.where(rows > 0, rows, 1.0), kept)


def sample(
    array: Float[Tensor, "channel i j k"],
    coordinates: tuple[np.ndarray, np.ndarray, np.ndarray],
    *,
    outside: float,
) -> Float[Tensor, "channel a b c"]:
    """Read `array` at the outer product of three coordinate lists (input voxel indices, fractions allowed).

    Positions beyond the scan get `outside` (the low end of the window: air for CT).
    """
    result = array - outside
    for axis, wanted in enumerate(coordinates, start=1):
        matrix = torch.from_numpy(weights(wanted, array.shape[axis])).to(result)
        result = torch.movedim(F.linear(torch.movedim(result, axis, -1), matrix), -1, axis)
    return result + outside
