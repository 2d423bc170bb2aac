"""Resampling of a tilted or uneven stack of slices to a straight, even one; only on request, and always noted."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from voxelstem import geometry
from voxelstem.sources import raster
from voxelstem.sources.grid import TOLERANCE_MM, Grid

SNAP = 1e-3  # of a voxel: nearer than this counts as on it, and the voxel is copied as it is


def straighten(
    array: Float[np.ndarray, "column row slice"], grid: Grid
) -> tuple[Float[np.ndarray, "c r s"], Float[np.ndarray, "4 4"], tuple[str, ...]]:
    """Shear slices back to where they were measured, and interpolate between them to even steps; both linear.

    Everything measured keeps its place in the patient: slices move sideways as their positions say, the canvas grows
    so that nothing falls off it, and the first and last slice stay the ends. What was not measured gets the scan's
    lowest value, which in CT is air or the scanner's own padding.

    Args:
        array: The slices of `grid` in its order, float32. It is returned as it is where `grid` needs no repair.
        grid: From `grid.place(..., repair=True)`.

    Returns:
        The even stack, its affine (RAS+), and what was done, in plain words for the provenance.

    Raises:
        ValueError: the array has another shape than the grid.
        IngestError: `too-large` when the straight stack would be.
    """
    if array.shape != grid.shape:
        raise ValueError(f"the array {array.shape} does not fill the grid {grid.shape}")
    repair = grid.repair
    if repair is None:
        return array, grid.affine_ras, ()
    fill = float(array.min())
    shift = repair.slide_mm / np.array(geometry.spacing_mm(grid.affine_ras)[:2])  # (slice, axis) in voxels
    low = np.floor(shift.min(axis=0) + SNAP)
    shift = shift - low
    extra = np.ceil(shift.max(axis=0) - SNAP).astype(int)
    heights = np.arange(round(repair.height_mm[-1] / repair.step_mm) + 1) * repair.step_mm
    shape = (grid.shape[0] + int(extra[0]), grid.shape[1] + int(extra[1]), len(heights))
    raster.check_size("the straightened series", shape, 4)
    out = np.empty(shape, np.float32)
    made_up = 0
    for index, height in enumerate(heights):
        below, share = _between(repair.height_mm, float(height))
        out[:, :, index] = _moved(array[:, :, below], shift[below], shape[:2], fill)
        if share:
            made_up += 1
            out[:, :, index] *= 1 - share
            out[:, :, index] += share * _moved(array[:, :, below + 1], shift[below + 1], shape[:2], fill)
    affine = grid.affine_ras.copy()
    affine[:3, 3] += affine[:3, :2] @ low
    return out, affine, _notes(grid, made_up=made_up, fill=fill)


def _between(measured: Float[np.ndarray, " slice"], height: float) -> tuple[int, float]:
    """The measured slice at or below a height, and how far on the way to the next one it lies; 0 means on it."""
    nearest = int(np.abs(measured - height).argmin())
    if abs(measured[nearest] - height) <= TOLERANCE_MM:
        return nearest, 0.0
    below = int(np.searchsorted(measured, height)) - 1
    return below, float((height - measured[below]) / (measured[below + 1] - measured[below]))


def _moved(
    picture: Float[np.ndarray, "column row"], shift: Float[np.ndarray, "2"], shape: tuple[int, int], fill: float
) -> Float[np.ndarray, "c r"]:
    """One slice on the larger canvas, moved along both axes by voxels (not negative); `fill` where it has no data."""
    for axis in range(2):
        lines = np.moveaxis(picture, axis, 0)
        out = np.full((shape[axis], lines.shape[1]), fill, np.float32)
        start = int(np.floor(shift[axis] + SNAP))
        share = float(shift[axis]) - start
        if abs(share) <= SNAP:
            out[start : start + len(lines)] = lines
        else:  # voxels that only half of the slice reaches stay empty
            out[start + 1 : start + len(lines)] = (1 - share) * lines[1:] + share * lines[:-1]
        picture = np.moveaxis(out, 0, axis)
    return picture


def _notes(grid: Grid, *, made_up: int, fill: float) -> tuple[str, ...]:
    assert grid.repair is not None
    slide, heights, step = grid.repair.slide_mm, grid.repair.height_mm, grid.repair.step_mm
    notes: list[str] = []
    far = float(np.linalg.norm(slide, axis=1).max())
    if far:
        degrees = np.degrees(np.arctan2(far, heights[-1]))
        notes.append(
            f"repaired a gantry tilt of {degrees:.1f} degrees: slices moved back by up to {far:.1f} mm in their plane, "
            f"by linear interpolation; {fill:g} fills what was not measured"
        )
    if made_up:
        gaps = np.diff(heights)
        notes.append(
            f"repaired uneven slices {gaps.min():.2f} to {gaps.max():.2f} mm apart: now every {step:.2f} mm; "
            f"{made_up} of {round(heights[-1] / step) + 1} slices made up by linear interpolation"
        )
    return tuple(notes)
