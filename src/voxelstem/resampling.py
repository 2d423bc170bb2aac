"""Separable resampling in plain numpy: one small matrix for each axis, exact against the textbook formula."""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Float, Float32, Int, Shaped

Mode = Literal["linear", "nearest"]
ROWS = 16
"""Output planes (and columns) made at a time: bounds the memory, and keeps the banded matrices nearly full."""
SAME_VOXELS = 0.05
"""An axis at whose far end the two grids are no further apart, in voxels, has the wanted spacing already."""


def grid_coordinates(count: int, *, start: float, step: float) -> Float[np.ndarray, "out"]:
    """Input indices of `count` output voxel centres.

    `start` is where the first output voxel begins and `step` how wide each is, both in input voxels
    measured from the low edge of the input. Centres lie half a voxel inside the edges.
    """
    return start + (np.arange(count) + 0.5) * step - 0.5


def resampled_count(count: int, spacing_mm: float, wanted_mm: float) -> int:
    """How many voxels of `wanted_mm` cover `count` voxels of `spacing_mm`. Rounds up: nothing is cut away."""
    return max(1, int(np.ceil(count * spacing_mm / wanted_mm - 1e-6)))


def weights(coordinates: Float[np.ndarray, "out"], size: int, *, step: float) -> Float[np.ndarray, "out in"]:
    """Interpolation matrix of one axis: linear between neighbours, a triangle as wide as the step when thinning.

    Coordinates up to half a voxel beyond the first or last centre still lie inside the scan and repeat the
    edge; what lies further out has weight nowhere (the row sums to less than 1), see `views.resample.sample`.

    Args:
        coordinates: Where to read, as input voxel indices; fractions are allowed.
        size: Input voxels along the axis.
        step: Input voxels from one coordinate to the next. A single coordinate cannot tell it.
    """
    inside = (coordinates >= -0.5 - 1e-9) & (coordinates <= size - 0.5 + 1e-9)
    centre = np.where(inside, np.clip(coordinates, 0, size - 1), coordinates)
    width = max(1.0, abs(float(step)))
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


def area_weights(size: int, count: int) -> Float[np.ndarray, "out in"]:
    """Matrix that stretches `size` voxels to `count` by averaging areas, as torch's `interpolate(mode="area")` does.

    Output o is the plain mean of all voxels that its share [o * size / count, (o + 1) * size / count) of the axis
    touches, however little of them: where `count` does not divide `size`, neighbours share voxels.

    >>> area_weights(3, 2)
    array([[0.5, 0.5, 0. ],
           [0. , 0.5, 0.5]])

    Args:
        size: Input voxels along the axis.
        count: Output voxels; more than `size` repeats voxels.
    """
    out, index = np.arange(count)[:, None], np.arange(size)
    low, high = out * size // count, -(-(out + 1) * size // count)
    return ((low <= index) & (index < high)) / (high - low)


def grid_affine(affine_ras: Float[np.ndarray, "4 4"], step_ijk: tuple[float, float, float]) -> Float[np.ndarray, "4 4"]:
    """Affine of a grid whose voxels are `step_ijk` times as wide, and which begins at the same low corner.

    The corner is the outer edge of the first voxel, not its centre.

    >>> grid_affine(np.eye(4), (2.0, 1.0, 4.0)).diagonal().tolist(), grid_affine(np.eye(4), (2.0, 1.0, 4.0))[:3, 3]
    ([2.0, 1.0, 4.0, 1.0], array([0.5, 0. , 1.5]))
    """
    affine = affine_ras.astype(np.float64).copy()
    for axis, step in enumerate(step_ijk):
        affine[:3, axis] *= step
        affine[:3, 3] += affine_ras[:3, axis] * (0.5 * step - 0.5)
    return affine


def steps_ijk(
    affine_ras: Float[np.ndarray, "4 4"], shape_ijk: tuple[int, ...], spacing_mm: tuple[float, float, float]
) -> tuple[float, float, float]:
    """How many voxels of a grid one voxel of `spacing_mm` spans, along each axis; exactly 1 where it has it already.

    >>> steps_ijk(np.diag([0.75, 0.75, 2.000001, 1.0]), (512, 512, 300), (1.5, 3.0, 2.0))
    (2.0, 4.0, 1.0)
    """
    have = np.linalg.norm(affine_ras[:3, :3], axis=0)
    steps = (float(wanted / old) for wanted, old in zip(spacing_mm, have, strict=True))
    i, j, k = (
        1.0 if abs(step - 1.0) * size <= SAME_VOXELS else step for step, size in zip(steps, shape_ijk, strict=True)
    )
    return i, j, k


def resample(
    array: Shaped[np.ndarray, "channel i j k"],
    affine_ras: Float[np.ndarray, "4 4"],
    spacing_mm: tuple[float, float, float],
    *,
    mode: Mode = "linear",
) -> tuple[Shaped[np.ndarray, "channel a b c"], Float[np.ndarray, "4 4"]]:
    """Bring voxels to `spacing_mm`, along the axes they have.

    The new grid begins at the same low corner and covers everything: the last voxel of an axis may reach over the
    far edge by a part of itself, and repeats what lies at the edge. `linear` interpolates between neighbours where
    the grid becomes finer, and averages under a triangle as wide as the step where it becomes coarser, so that
    nothing is skipped and nothing aliases. `nearest` copies values and is for labels. An axis that has the spacing
    already, up to `SAME_VOXELS` over its length, is copied bit for bit and keeps its own.

    Args:
        array: (channel, i, j, k); computed and returned in float32 for `linear`, in its own type for `nearest`.
        affine_ras: Where the voxels lie, in millimetres.
        spacing_mm: Wanted edge lengths along i, j and k.
        mode: How values are made.

    Returns:
        The new voxels and their affine. Besides them and the input it takes the memory of a few planes.

    Raises:
        ValueError: a spacing is not a positive number.
    """
    if not all(0 < edge < np.inf for edge in spacing_mm):
        raise ValueError(f"spacing_mm must be positive numbers, got {tuple(spacing_mm)}")
    sizes = array.shape[1:]
    steps = steps_ijk(affine_ras, sizes, spacing_mm)
    places = [
        # What reaches over the far edge repeats the edge.
        np.minimum(grid_coordinates(resampled_count(size, 1.0, step), start=0.0, step=step), size - 0.5)
        for size, step in zip(sizes, steps, strict=True)
    ]
    affine = grid_affine(affine_ras, steps)
    if mode == "nearest":
        index = [_nearest(place, size) for place, size in zip(places, sizes, strict=True)]
        return array[:, index[0][:, None, None], index[1][:, None], index[2]], affine
    matrices = [
        weights(place, size, step=step).astype(np.float32)
        for place, size, step in zip(places, sizes, steps, strict=True)
    ]
    return _apply(matrices, array), affine


def _nearest(places: Float[np.ndarray, "out"], size: int) -> Int[np.ndarray, "out"]:
    # Halfway between two voxels the higher one is taken, whatever the rounding of the coordinate.
    return np.clip(np.floor(places + 0.5 + 1e-6).astype(np.intp), 0, size - 1)


def _apply(
    matrices: list[Float32[np.ndarray, "out in"]], array: Shaped[np.ndarray, "channel i j k"]
) -> Float32[np.ndarray, "channel a b c"]:
    """Multiply every axis by its matrix, a few planes at a time."""
    over_i, over_j, over_k = matrices
    result = np.empty((array.shape[0], *(len(matrix) for matrix in matrices)), np.float32)
    wide = np.empty((ROWS, len(over_j), array.shape[3]), np.float32)
    for channel, target in zip(array, result, strict=True):
        for at in range(0, len(over_i), ROWS):
            rows = slice(at, at + ROWS)
            low, high = _band(over_i[rows])
            planes = np.asarray(channel[low:high], np.float32).reshape(high - low, -1)
            slab = (over_i[rows, low:high] @ planes).reshape(-1, *channel.shape[1:])
            part = wide[: len(slab)]
            for over in range(0, len(over_j), ROWS):
                columns = slice(over, over + ROWS)
                low, high = _band(over_j[columns])
                np.matmul(over_j[columns, low:high], slab[:, low:high], out=part[:, columns])
            target[rows] = (part.reshape(-1, part.shape[2]) @ over_k.T).reshape(len(part), len(over_j), -1)
    return result


def _band(rows: Float32[np.ndarray, "out in"]) -> tuple[int, int]:
    """The columns in which any of these rows is not zero; each row has some."""
    used = np.flatnonzero(rows.any(axis=0))
    return int(used[0]), int(used[-1]) + 1
