"""Which kind wins at every voxel of a scan, from logits that come a slab at a time: never all kinds of all voxels."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from voxelstem.views import resample
from voxelstem.views.cells import CellGrid
from voxelstem.views.slide import Slab, Stripe

VALUES_AT_ONCE = 1 << 22
"""How many logits are interpolated in one go (16 MiB), one row of the scan at least; bounds the memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """Rows of a scan along one axis, and the rows of cells between which they lie."""

    voxels: Stripe
    cells: Stripe


def shares(grid: CellGrid, *, axis: int, most: int) -> list[Share]:
    """Cut a scan into as few shares along an axis as need no more than `most` rows of cells each, as even as can be.

    Where even a single row of voxels needs more, each row is a share of its own.
    """
    places, count = _places(grid)[axis], grid.shape_ijk[axis]
    step = grid.scale[axis] * grid.sub
    margin = math.ceil(max(step, 1.0)) + 1
    found: list[Share] = []
    for parts in range(1, count + 1):
        edges = [round(count * part / parts) for part in range(parts + 1)]
        found = []
        for start, stop in pairwise(edges):
            low = max(0, math.floor(places[start]) - margin)
            high = min(grid.cells_ijk[axis], math.ceil(places[stop - 1]) + margin + 1)
            voxels = Stripe(axis=axis, start=start, stop=stop)
            found.append(Share(voxels=voxels, cells=Stripe(axis=axis, start=low, stop=high)))
        if max(one.cells.stop - one.cells.start for one in found) <= most:
            break
    return found


def winners(
    slabs: Iterable[Slab], grid: CellGrid, *, axis: int, share: Share | None = None
) -> Int[np.ndarray, "i j k"]:
    """Interpolate logits between the centres of cells and take the largest, at every voxel of a scan.

    Of equal ones the first wins. Cells beyond the scan's own (of padding) are never asked.

    Args:
        slabs: Logits of the cells, in order along `axis`, together all of them.
        grid: The cells over the scan.
        axis: 0, 1 or 2.
        share: Only these voxels, from slabs of only those cells; None for all.

    Raises:
        ValueError: the slabs do not follow one another, or are not all the cells.
    """
    steps = [scale * grid.sub for scale in grid.scale]
    places, shape = _places(grid), list(grid.shape_ijk)
    if share is not None:
        across, rows = share.voxels.axis, slice(share.voxels.start, share.voxels.stop)
        places[across] = places[across][rows] - share.cells.start
        shape[across] = share.voxels.stop - share.voxels.start
    found = np.empty(shape, dtype=np.int16)
    margin = math.ceil(max(steps[axis], 1.0)) + 1
    first, done, held = 0, 0, torch.zeros(0)
    for slab in slabs:
        if slab.start != first + (held.shape[1 + axis] if held.ndim > 1 else 0):
            raise ValueError(f"a slab begins at cell {slab.start}, which does not follow the one before")
        held = torch.cat([held, slab.values], dim=1 + axis) if held.ndim > 1 else slab.values
        end = first + held.shape[1 + axis]
        ready = grid.cells_ijk[axis] if end >= grid.cells_ijk[axis] else end - margin
        stop = int(np.searchsorted(places[axis], ready - 1, side="right"))
        if stop > done:
            _fill(found, held, first, (done, stop), places, steps, axis)
            done = stop
        keep = max(0, min(end, math.floor(places[axis][min(done, len(places[axis]) - 1)]) - margin) - first)
        held, first = held.narrow(1 + axis, keep, held.shape[1 + axis] - keep), first + keep
    if done < grid.shape_ijk[axis]:
        raise ValueError(f"the slabs end before cell {grid.cells_ijk[axis]}")
    return found


def _places(grid: CellGrid) -> list[Float[np.ndarray, "place"]]:
    """Where voxels lie among cells, never between a cell of the scan and one of the padding."""
    return [
        np.clip(place, member.min(), member.max()) for place, member in zip(grid.places(), grid.members(), strict=True)
    ]


def _fill(
    found: Int[np.ndarray, "i j k"],
    held: Float[Tensor, "kind i j k"],
    first: int,
    rows: tuple[int, int],
    places: list[Float[np.ndarray, "place"]],
    steps: list[float],
    axis: int,
) -> None:
    """Take the winners of some rows of the scan from the cells `first` and following."""
    area = found.size // found.shape[axis]
    at_once = max(1, VALUES_AT_ONCE // (len(held) * area))
    margin = math.ceil(max(steps[axis], 1.0)) + 1
    # The few rows come first: with few along the last axis, products of matrices take four times as long.
    order = [axis, *(place for place in range(3) if place != axis)]
    step_ijk = (steps[order[0]], steps[order[1]], steps[order[2]])
    held, rows_first = held.movedim(1 + axis, 1), np.moveaxis(found, axis, 0)
    for start in range(rows[0], rows[1], at_once):
        stop = min(start + at_once, rows[1])
        wanted = places[axis][start:stop] - first
        low = max(0, math.floor(wanted[0]) - margin)
        near = held.narrow(1, low, min(held.shape[1], math.ceil(wanted[-1]) + margin + 1) - low)
        over = [wanted - low, places[order[1]], places[order[2]]]
        dense = near
        if not _is_same(over, tuple(near.shape[1:])):
            dense = resample.sample(
                near.float().contiguous(), (over[0], over[1], over[2]), step_ijk=step_ijk, outside=0.0
            )
        else:
            for place, where in enumerate(over):
                dense = dense.narrow(1 + place, round(float(where[0])), len(where))
        rows_first[start:stop] = largest(dense)


def largest(logits: Float[Tensor, "kind i j k"]) -> Int[np.ndarray, "i j k"]:
    """The first of the largest kinds at every voxel; six times as fast as argmax over the first axis."""
    best, winner = logits[0].numpy().copy(), np.zeros(tuple(logits.shape[1:]), dtype=np.int16)
    for kind in range(1, len(logits)):
        values = logits[kind].numpy()
        better = values > best
        np.copyto(best, values, where=better)
        winner[better] = kind
    return winner


def _is_same(over: list[Float[np.ndarray, "place"]], cells_ijk: tuple[int, ...]) -> bool:
    """Whether every place is the centre of a cell, and along the axes the next one's is the next cell's."""
    return all(
        0 <= round(float(where[0])) <= size - len(where)
        and np.abs(where - np.rint(where[0]) - np.arange(len(where))).max() < 1e-6  # noqa: PLR2004
        for where, size in zip(over, cells_ijk, strict=True)
    )
