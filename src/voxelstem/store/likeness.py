"""Are two scans the same picture? Answered by their voxels: where one lies in the other, and how well they then agree.

The same picture survives another spacing, a crop, noise, a kernel, an offset, a gain or rounding. Another patient,
another day, another contrast phase or another MR sequence is not the same picture, however similar the anatomy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32
from scipy import fft, ndimage

from voxelstem.resampling import grid_coordinates, resample, weights

Array = Float32[np.ndarray, "i j k"]

KEPT_CELLS = 80
"""A sketch has this many cells along the edge of a cube of the scan's volume; it is what comparing needs, no more."""
COMPARED_CELLS = 32
"""The same for the smaller of two scans while they are compared."""
TISSUE_HU = (-160.0, 240.0)
"""From fat to enhanced vessels: two CTs of one person differ here, when lungs and bones do not."""
DARK = 0.1
"""What is darker than this share of the range belongs to the background, where values have no unit."""
FINE, COARSE = 0.7, 2.5
"""Cells; details between these two widths decide where one scan lies in the other."""
SMOOTH = 1.0
"""Cells; values are compared after smoothing by this much, which noise does not survive and a contrast phase does."""
FEWEST = 64
"""Cells of tissue that a verdict can rest on."""
ROUNDS = 5
"""Of fitting gain and offset to the seven tenths of the cells that agree best."""
FLAT = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sketch:
    """A volume as coarse as comparing allows: 2 MB at most, whatever the scan's size."""

    modality: str
    array: Array
    edge_mm: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Likeness:
    """How alike two scans are, where they overlap best."""

    correlation: float
    """Of their details, -1 to 1."""
    difference: float
    """What nine of ten cells of tissue do not differ by, after the best gain and offset, in standard deviations of
    the tissue: 0 for equals, about 1 for another contrast phase."""
    overlap: float
    """Share of the smaller scan that the larger one shows."""


UNLIKE = Likeness(correlation=0.0, difference=math.inf, overlap=0.0)


def sketch(array: Float[np.ndarray, "channel i j k"], affine_ras: Float[np.ndarray, "4 4"], modality: str) -> Sketch:
    """Draw the sketch of a volume in RAS+; of several channels the first is taken."""
    edges = np.linalg.norm(affine_ras[:3, :3], axis=0)
    coarse = _edge_mm(array.shape[1:], edges, KEPT_CELLS)
    i, j, k = (max(float(edge), coarse) for edge in edges)
    drawn, affine = resample(array[:1], affine_ras, (i, j, k))
    i, j, k = (float(edge) for edge in np.linalg.norm(affine[:3, :3], axis=0))
    return Sketch(modality=modality, array=drawn[0], edge_mm=(i, j, k))


def compare(first: Sketch, second: Sketch, *, overlap: float = 0.5) -> Likeness:
    """Lay one scan over the other where their details agree best, then compare their values.

    Places are found by masked normalised cross-correlation with the Fourier transform (Padfield 2012): the scans are
    shifted, not turned and not stretched. Their positions in space are not believed, as a re-export may change them.

    Args:
        first: One scan.
        second: The other.
        overlap: Share of the smaller scan that must lie in the larger one.

    Returns:
        `UNLIKE` where the modality differs, or there is too little to compare.
    """
    if first.modality != second.modality:
        return UNLIKE
    smaller = min(first, second, key=lambda one: float(np.prod(one.array.shape) * np.prod(one.edge_mm)))
    cell_mm = max(
        _edge_mm(smaller.array.shape, np.array(smaller.edge_mm), COMPARED_CELLS),
        *(math.prod(one.edge_mm) ** (1 / 3) for one in (first, second)),
    )
    one, two = _lay(first, cell_mm, (0.0, 0.0, 0.0)), _lay(second, cell_mm, (0.0, 0.0, 0.0))
    place = _place(_details(one, first.modality), _details(two, first.modality), overlap)
    if place is None:
        return UNLIKE
    shift, part = place
    # The second scan is cut into cells once more, by the missing part of a cell, so that cell lies on cell.
    two = _lay(second, cell_mm, (-part[0] * cell_mm, -part[1] * cell_mm, -part[2] * cell_mm))
    here, there = _shared(one.shape, two.shape, shift)
    share = math.prod(_lengths(here)) / min(one.size, two.size)
    fine = [_details(array, first.modality)[where] for array, where in ((one, here), (two, there))]
    return Likeness(
        correlation=_correlation(fine[0], fine[1]),
        difference=_difference(one[here], two[there], first.modality),
        overlap=min(1.0, share),
    )


def _edge_mm(shape: Sequence[int], edges_mm: Float[np.ndarray, "3"], cells: int) -> float:
    """Edge of a cell, so that a cube of the volume's size has `cells` along its edge."""
    return float(np.prod(shape) * np.prod(edges_mm)) ** (1 / 3) / cells


def _lay(one: Sketch, cell_mm: float, start_mm: tuple[float, float, float]) -> Array:
    """Average a sketch into cubes of `cell_mm` from `start_mm` on; what lies beyond its edge repeats the edge."""
    array = one.array
    for axis, (edge, start) in enumerate(zip(one.edge_mm, start_mm, strict=True)):
        size = array.shape[axis]
        count = max(1, int(size * edge / cell_mm + 1e-3))
        places = grid_coordinates(count, start=start / edge, step=cell_mm / edge)
        matrix = weights(np.clip(places, -0.5, size - 0.5), size, step=cell_mm / edge).astype(np.float32)
        array = np.moveaxis(np.tensordot(matrix, array, axes=(1, axis)), 0, axis)
    return np.ascontiguousarray(array)


def _range(array: Array, modality: str) -> tuple[float, float]:
    """Values of tissue: fixed for CT; for others from the background's end to the brightest hundredth."""
    if modality == "CT":
        return TISSUE_HU
    low, high = (float(value) for value in np.percentile(array, [1, 99]))
    return low + DARK * (high - low), high


def _details(array: Array, modality: str) -> Array:
    clipped = np.clip(array, *_range(array, modality))
    fine, coarse = (ndimage.gaussian_filter(clipped, width, mode="nearest") for width in (FINE, COARSE))
    return fine - coarse


def _place(one: Array, two: Array, overlap: float) -> tuple[tuple[int, ...], tuple[float, ...]] | None:
    """Find the shift, in whole cells and the part of a cell, at which `one[x]` is most like `two[x - shift]`."""
    shape = [fft.next_fast_len(a + b - 1, real=True) for a, b in zip(one.shape, two.shape, strict=True)]

    def transform(array: Array) -> Any:
        return fft.rfftn(array, shape)

    def across(left: Any, right: Any) -> Any:
        return fft.irfftn(left * np.conj(right), shape)

    energies = float((one**2).sum()), float((two**2).sum())
    if min(energies) <= FLAT * one.size:
        return None
    a, b = transform(one), transform(two)
    a_here, b_here = (transform(np.ones_like(array)) for array in (one, two))
    count = np.maximum(across(a_here, b_here), 0.5)
    sum_a, sum_b = across(a, b_here), across(a_here, b)
    spread_a = np.maximum(across(transform(one**2), b_here) - sum_a**2 / count, 0)
    spread_b = np.maximum(across(a_here, transform(two**2)) - sum_b**2 / count, 0)
    # Some detail must be there: two corners of air agree perfectly and say nothing.
    telling = np.maximum(spread_a / energies[0], spread_b / energies[1]) >= overlap / 2
    allowed = telling & (count >= (overlap - 1e-3) * min(one.size, two.size))
    if not allowed.any():
        return None
    score = (across(a, b) - sum_a * sum_b / count) / np.sqrt(spread_a * spread_b + FLAT * math.prod(energies))
    score = np.where(allowed, score, -1.0)
    at = np.unravel_index(int(np.argmax(score)), score.shape)
    shift = tuple(int(i - n if i >= size else i) for i, n, size in zip(at, score.shape, one.shape, strict=True))
    return shift, tuple(_peak(score, at, axis) for axis in range(3))


def _peak(score: Float[np.ndarray, "i j k"], at: Sequence[np.intp], axis: int) -> float:
    """Say how far beyond a cell's centre the best place lies: the top of a parabola through three cells."""
    before, here, behind = (
        float(score[tuple((i + step) % score.shape[n] if n == axis else i for n, i in enumerate(at))])
        for step in (-1, 0, 1)
    )
    bend = before - 2 * here + behind
    if min(before, behind) <= -1 or bend >= 0:
        return 0.0
    return min(0.5, max(-0.5, 0.5 * (before - behind) / bend))


def _shared(
    one: Sequence[int], two: Sequence[int], shift: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """The boxes in which two arrays overlap, in each one's own indices."""
    spans = [(max(0, by), min(a, b + by), by) for a, b, by in zip(one, two, shift, strict=True)]
    return (
        tuple(slice(low, high) for low, high, _ in spans),
        tuple(slice(low - by, high - by) for low, high, by in spans),
    )


def _lengths(box: tuple[slice, ...]) -> list[int]:
    return [part.stop - part.start for part in box]


def _correlation(one: Array, two: Array) -> float:
    one, two = one - one.mean(), two - two.mean()
    return float((one * two).sum() / math.sqrt(float((one**2).sum() * (two**2).sum()) + FLAT))


def _difference(one: Array, two: Array, modality: str) -> float:
    """Compare values of tissue away from its edges, where a fraction of a cell of misplacement does not count."""
    low, high = _range(one, modality)
    tissue = (one > low) & (one < high)
    core: Bool[np.ndarray, "i j k"] = ndimage.binary_erosion(tissue, border_value=1)
    if core.sum() < FEWEST:
        return math.inf
    near = np.maximum(ndimage.gaussian_filter(tissue.astype(np.float32), SMOOTH, mode="nearest"), 1e-3)
    x, y = (
        (ndimage.gaussian_filter(array * tissue, SMOOTH, mode="nearest") / near)[core].astype(np.float64)
        for array in (one, two)
    )
    off, agree = np.zeros_like(x), np.ones(x.shape, dtype=bool)
    gain = 0.0
    for _ in range(ROUNDS):
        spread = float(x[agree].var())
        gain = float(np.cov(x[agree], y[agree], bias=True)[0, 1]) / (spread + FLAT)
        off = np.abs(y - y[agree].mean() - gain * (x - x[agree].mean()))
        agree = off <= np.quantile(off, 0.7)
    # A gain below zero turns dark into bright: another sequence.
    return float(np.quantile(off, 0.9)) / (gain * float(x.std())) if gain > FLAT else math.inf
