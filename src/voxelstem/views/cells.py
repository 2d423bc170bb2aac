"""Voxels of a scan and the cells of a token grid laid over it: which voxel lies in which cell, exactly.

A token grid runs along the scan's own axes, so everything here works on three separate index lists
instead of on coordinates for every voxel. A token may be cut into `sub` cells along each axis.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Integer

VOXELS_AT_ONCE = 1 << 22
"""How many voxels are counted in one go; bounds the memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CellGrid:
    """`shape_ijk` voxels seen through `tokens_ijk` tokens of `sub`^3 cells each.

    Along each axis, token index = `scale` * voxel index + `offset`; whole numbers are centres.
    """

    shape_ijk: tuple[int, int, int]
    tokens_ijk: tuple[int, int, int]
    scale: tuple[float, float, float]
    offset: tuple[float, float, float]
    sub: int = 1

    @property
    def cells_ijk(self) -> tuple[int, int, int]:
        """Cells along each axis."""
        i, j, k = (count * self.sub for count in self.tokens_ijk)
        return i, j, k

    def places(self) -> tuple[Float[np.ndarray, "i"], Float[np.ndarray, "j"], Float[np.ndarray, "k"]]:
        """Position of every voxel centre along each axis, as a fractional cell index."""
        i, j, k = (
            (scale * np.arange(count) + offset + 0.5) * self.sub - 0.5
            for count, scale, offset in zip(self.shape_ijk, self.scale, self.offset, strict=True)
        )
        return i, j, k

    def members(self) -> tuple[Int[np.ndarray, "i"], Int[np.ndarray, "j"], Int[np.ndarray, "k"]]:
        """Index of the cell that holds each voxel centre; voxels beyond the grid go to its edge."""
        i, j, k = (
            np.clip(np.floor(place + 0.5 + 1e-6).astype(np.int64), 0, cells - 1)
            for place, cells in zip(self.places(), self.cells_ijk, strict=True)
        )
        return i, j, k


def lay(
    affine_ras: Float[np.ndarray, "4 4"],
    shape_ijk: tuple[int, int, int],
    tokens_affine_ras: Float[np.ndarray, "4 4"],
    tokens_ijk: tuple[int, int, int],
    *,
    sub: int = 1,
) -> CellGrid:
    """Lay a token grid over a scan, both placed in the patient by their affines.

    Raises:
        ValueError: the token axes do not run along the scan's axes.
    """
    between = np.linalg.inv(tokens_affine_ras) @ affine_ras
    scale = np.diag(between)[:3]
    # Crooked by so much that the far corner of the scan would move by a tenth of a token or more?
    drift = np.abs(between[:3, :3] - np.diag(scale)) @ np.array(shape_ijk)
    if (scale <= 0).any() or (drift > 0.1).any():  # noqa: PLR2004
        raise ValueError("the token grid does not run along the axes of the scan")
    return CellGrid(
        shape_ijk=shape_ijk,
        tokens_ijk=tokens_ijk,
        scale=(float(scale[0]), float(scale[1]), float(scale[2])),
        offset=(float(between[0, 3]), float(between[1, 3]), float(between[2, 3])),
        sub=sub,
    )


def cover(
    affine_ras: Float[np.ndarray, "4 4"],
    shape_ijk: tuple[int, int, int],
    token_mm: tuple[float, float, float],
) -> tuple[Float[np.ndarray, "4 4"], tuple[int, int, int]]:
    """Affine and size of a token grid that covers a scan from its low edge with tokens of `token_mm`."""
    step = np.array(token_mm) / np.linalg.norm(affine_ras[:3, :3], axis=0)
    counts = np.maximum(1, np.ceil(np.array(shape_ijk) / step - 1e-6)).astype(int)
    affine = affine_ras.astype(np.float64).copy()
    affine[:3, :3] = affine_ras[:3, :3] * step
    affine[:3, 3] = affine_ras[:3, 3] + affine_ras[:3, :3] @ ((step - 1) / 2)
    return affine, (int(counts[0]), int(counts[1]), int(counts[2]))


def tally(values: Integer[np.ndarray, "i j k"], grid: CellGrid, kinds: int) -> Float[np.ndarray, "ci cj ck kinds"]:
    """Count, in every cell, the voxels of each value from 0 to `kinds` - 1. Negative values are not counted.

    Raises:
        ValueError: the values lie on another grid, or one of them is `kinds` or more.
    """
    if values.shape != grid.shape_ijk:
        raise ValueError(f"values {values.shape} do not lie on the grid {grid.shape_ijk}")
    if values.size and int(values.max()) >= kinds:
        raise ValueError(f"value {int(values.max())} has no place among {kinds} kinds")
    in_i, in_j, in_k = grid.members()
    _, cells_j, cells_k = grid.cells_ijk
    counts = np.zeros((*grid.cells_ijk, kinds), dtype=np.float32)
    plane = (in_j[:, None] * cells_k + in_k[None]) * kinds
    rows = max(1, VOXELS_AT_ONCE // max(plane.size, 1))
    for start in range(0, len(in_i), rows):
        part = slice(start, start + rows)
        low, high = int(in_i[part].min()), int(in_i[part].max()) + 1
        slab = values[part].astype(np.int64)
        place = (in_i[part, None, None] - low) * (cells_j * cells_k * kinds) + plane + slab
        flat = place.ravel() if slab.min() >= 0 else place[slab >= 0]
        found = np.bincount(flat, minlength=(high - low) * cells_j * cells_k * kinds)
        counts[low:high] += found.reshape(high - low, cells_j, cells_k, kinds)
    return counts
