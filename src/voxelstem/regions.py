"""Regions of a scan: how to name one, and one vector for it from the tokens that lie there.

A region is a mask on the scan's own grid. Pooling tokens over the whole scan drowns a small lesion; over its region it
says what the network saw there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Float

from voxelstem.geometry import patient_to_voxel
from voxelstem.protocols import Features
from voxelstem.study import LabelMap
from voxelstem.views import cells

EDGE = 1e-6
"""In cells: a voxel this close below an edge belongs to the cell above it, as `cells.CellGrid.members` counts."""

How = Literal["mean", "max", "both"]
"""`mean` weighs tokens by the share of their cell inside the region; `max` is the largest of each feature over all
tokens with a voxel of it; `both` joins them, the mean first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pooled:
    """What the tokens of a region say together. A task sees it like any features of a scan."""

    scan: Float[np.ndarray, "dim"]
    seen: float
    """Share of the region's voxels that lie in a token's cell."""
    count: int
    """Tokens that hold a voxel of the region."""
    tokens: None = None
    tokens_affine_ras: None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """How a region and the cells of a token grid lie in one another."""

    of_cells: Float[np.ndarray, "ti tj tk"]
    """Share of each cell's voxels that lie in the region. What of a cell lies beyond the scan does not count."""
    of_region: float
    """Share of the region's voxels that lie in a cell."""


def of_class(labels: LabelMap, name: str) -> Bool[np.ndarray, "i j k"]:
    """Where an expert saw this class.

    Raises:
        ValueError: the map names no such class, or no voxel has it.
    """
    values = [value for value, called in labels.classes.items() if called == name]
    if not values:
        raise ValueError(f"no class is called '{name}'; there are {', '.join(labels.classes.values()) or 'none'}")
    region = np.isin(labels.array, values)
    if not region.any():
        raise ValueError(f"no voxel is labelled '{name}': there is no region")
    return region


def of_voxels(
    shape_ijk: tuple[int, int, int], start_ijk: tuple[int, int, int], stop_ijk: tuple[int, int, int]
) -> Bool[np.ndarray, "i j k"]:
    """The box of voxels from `start_ijk` up to, but not with, `stop_ijk`.

    Raises:
        ValueError: the box is empty or reaches beyond the scan.
    """
    ends = tuple(zip(start_ijk, stop_ijk, shape_ijk, strict=True))
    if not all(0 <= start < stop <= count for start, stop, count in ends):
        raise ValueError(f"the box from {start_ijk} to {stop_ijk} is empty or not within a scan of {shape_ijk} voxels")
    region = np.zeros(shape_ijk, dtype=np.bool_)
    region[tuple(slice(start, stop) for start, stop, _ in ends)] = True
    return region


def of_box(
    affine_ras: Float[np.ndarray, "4 4"],
    shape_ijk: tuple[int, int, int],
    *,
    low_ras_mm: tuple[float, float, float],
    high_ras_mm: tuple[float, float, float],
) -> Bool[np.ndarray, "i j k"]:
    """Voxels whose centres lie in a box along the patient's axes, its faces included.

    Args:
        affine_ras: Of the scan.
        shape_ijk: Of the scan.
        low_ras_mm: The corner at the left, the back and the feet.
        high_ras_mm: The opposite corner.

    Raises:
        ValueError: a corner is not finite, low is above high, or no voxel's centre lies inside.
    """
    low, high = np.array(low_ras_mm, dtype=np.float64), np.array(high_ras_mm, dtype=np.float64)
    if not (np.isfinite([low, high]).all() and (low <= high).all()):
        raise ValueError(f"a box runs from low to high, got {low_ras_mm} to {high_ras_mm}")
    corners = np.stack(np.meshgrid(*np.stack([low, high], axis=1), indexing="ij"), axis=-1).reshape(8, 3)
    at = patient_to_voxel(corners, affine_ras)
    # Only what lies between the box's corners along the scan's axes is looked at; half a voxel covers rounding.
    first = np.clip(np.floor(at.min(axis=0) - 0.5).astype(int), 0, shape_ijk)
    last = np.clip(np.ceil(at.max(axis=0) + 0.5).astype(int) + 1, first, shape_ijk)
    near = tuple(slice(int(start), int(stop)) for start, stop in zip(first, last, strict=True))
    i, j, k = np.ogrid[near]
    held = np.ones((i.size, j.size, k.size), dtype=np.bool_)
    for axis in range(3):
        (along_i, along_j, along_k), start = affine_ras[axis, :3], affine_ras[axis, 3]
        place = along_i * i + along_j * j + along_k * k + start
        held &= (place >= low[axis]) & (place <= high[axis])
    if not held.any():
        raise ValueError("no voxel's centre lies in the box: there is no region")
    region = np.zeros(shape_ijk, dtype=np.bool_)
    region[near] = held
    return region


def pool(
    features: Features, region: Bool[np.ndarray, "i j k"], affine_ras: Float[np.ndarray, "4 4"], *, how: How = "mean"
) -> Pooled:
    """Make one vector of the tokens of a region.

    A voxel belongs to the token whose cell holds its centre, so where tokens are smaller than voxels, those that hold
    no centre have no say. Voxels beyond all tokens are not seen; `Pooled.seen` tells how much that leaves.

    Args:
        features: With tokens.
        region: Which voxels, on the scan's grid.
        affine_ras: Of that grid.
        how: What becomes of several tokens.

    Raises:
        ValueError: there are no tokens, the region is no mask or is empty, no token lies in it, one that does is not
            finite, or the tokens do not run along the scan's axes.
    """
    if how not in get_args(How):
        raise ValueError(f"how must be one of {', '.join(get_args(How))}, got '{how}'")
    if features.tokens is None or features.tokens_affine_ras is None:
        raise ValueError("pooling over a region needs tokens, and these features have none")
    if region.dtype != np.bool_ or not region.any():
        raise ValueError(f"a region is a mask (bool) with a voxel in it at least, got {region.dtype}")
    i, j, k = features.tokens.shape[:3]
    shares = overlap(region, affine_ras, features.tokens_affine_ras, (i, j, k))
    held = shares.of_cells > 0
    if not held.any():
        raise ValueError("no token lies in the region: the network did not see it")
    kind = np.result_type(features.tokens.dtype, np.float32)
    rows, weights = features.tokens[held].astype(np.float64), shares.of_cells[held]
    if not np.isfinite(rows).all():
        raise ValueError("a token of the region is not finite")
    parts = {"mean": weights @ rows / weights.sum(), "max": rows.max(axis=0)}
    wanted = parts.values() if how == "both" else (parts[how],)
    return Pooled(scan=np.concatenate(list(wanted)).astype(kind), seen=shares.of_region, count=int(held.sum()))


def overlap(
    region: Bool[np.ndarray, "i j k"],
    affine_ras: Float[np.ndarray, "4 4"],
    tokens_affine_ras: Float[np.ndarray, "4 4"],
    tokens_ijk: tuple[int, int, int],
) -> Shares:
    """Lay a grid of tokens over a scan and tell how a region lies in its cells.

    Raises:
        ValueError: the region is empty, or the tokens do not run along the scan's axes.
    """
    if not region.any():
        raise ValueError("the region is empty: it lies nowhere")
    i, j, k = region.shape
    grid = cells.lay(affine_ras, (i, j, k), tokens_affine_ras, tokens_ijk)
    covered = [
        (place >= -0.5 - EDGE) & (place < count - 0.5 - EDGE)
        for place, count in zip(grid.places(), grid.cells_ijk, strict=True)
    ]
    # The members of a grid hold what lies beyond it too, in the cells at its edge: such voxels are not counted.
    inside = region & covered[0][:, None, None] & covered[1][:, None] & covered[2]
    counts = cells.tally(inside.astype(np.int8) - 1, grid, 1)[..., 0].astype(np.float64)
    whole = [
        np.bincount(member[within], minlength=count)
        for member, within, count in zip(grid.members(), covered, grid.cells_ijk, strict=True)
    ]
    voxels = whole[0][:, None, None] * whole[1][:, None] * whole[2]
    return Shares(of_cells=counts / np.maximum(voxels, 1), of_region=float(counts.sum() / region.sum()))
