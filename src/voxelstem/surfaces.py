"""How well two masks agree at their surfaces: what an expert would have to draw anew, rather than how much overlaps."""

from __future__ import annotations

import itertools
import math

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from scipy.spatial import KDTree


def surface_dice(
    predicted: Bool[np.ndarray, "i j k"],
    truth: Bool[np.ndarray, "i j k"],
    spacing_mm: tuple[float, float, float],
    *,
    tolerance_mm: float,
) -> float:
    """Share of both surfaces' areas that lies within a tolerance of the other surface (normalised surface Dice).

    Nikolov et al. 2021 (JMIR 23(7):e26151, equation 1). Surface elements and their areas are those of marching cubes
    on 2x2x2 neighbourhoods, distances go between the elements' places, in millimetres. No distance beyond the
    tolerance is ever measured, which is what makes it fast where marks lie scattered over a scan.

    Returns:
        1 where all of both surfaces is near enough, 0 where one mask is empty; NaN where both are.

    Raises:
        ValueError: masks of different shapes, a spacing or a tolerance that is not positive.
    """
    if predicted.shape != truth.shape or min(spacing_mm) <= 0 or not 0 < tolerance_mm < math.inf:
        raise ValueError(
            f"masks need one shape, spacing and tolerance more than 0 mm: got {predicted.shape} and {truth.shape}, "
            f"{spacing_mm} mm and {tolerance_mm} mm"
        )
    there, wanted = bool(predicted.any()), bool(truth.any())
    if not there or not wanted:
        return 0.0 if there or wanted else math.nan
    (ours, our_mm2), (theirs, their_mm2) = (_surface(mask, spacing_mm) for mask in (predicted, truth))
    agreed_mm2 = our_mm2[_near(ours, theirs, tolerance_mm)].sum() + their_mm2[_near(theirs, ours, tolerance_mm)].sum()
    return float(agreed_mm2 / (our_mm2.sum() + their_mm2.sum()))


def _surface(
    mask: Bool[np.ndarray, "i j k"], spacing_mm: tuple[float, float, float]
) -> tuple[Float[np.ndarray, "elements 3"], Float[np.ndarray, " elements"]]:
    """Where the surface's elements lie, in mm from voxel (0, 0, 0), and the area of each in mm2."""
    from monai.metrics.utils import get_code_to_measure_table

    table, kernel = get_code_to_measure_table(spacing_mm)
    low, codes = _neighbourhoods(mask, kernel[0, 0].numpy().astype(np.uint8))
    at = np.nonzero((codes != 0) & (codes != np.uint8(255)))
    return (np.stack(at, axis=1) + low) * np.asarray(spacing_mm), table.numpy().astype(np.float64)[codes[at]]


def _neighbourhoods(
    mask: Bool[np.ndarray, "i j k"], kernel: UInt8[np.ndarray, "2 2 2"]
) -> tuple[Int[np.ndarray, " 3"], UInt8[np.ndarray, "a b c"]]:
    """Which of each 2x2x2 voxels are in the mask, as bits, within the mask's box; and where the first of them lies.

    One empty voxel is put around, so that what touches the scan's edge has a surface there.
    """
    spans = [np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    box = tuple(slice(int(span[0]), int(span[-1]) + 1) for span in spans)
    padded = np.pad(mask[box], 1).astype(np.uint8)
    a, b, c = (side - 1 for side in padded.shape)
    codes = np.zeros((a, b, c), np.uint8)
    for i, j, k in itertools.product((0, 1), repeat=3):
        codes |= padded[i : i + a, j : j + b, k : k + c] * kernel[i, j, k]
    return np.array([edge.start - 1 for edge in box]), codes


def _near(
    places_mm: Float[np.ndarray, "n 3"], others_mm: Float[np.ndarray, "m 3"], tolerance_mm: float
) -> Bool[np.ndarray, " n"]:
    """Which places have one of the others within the tolerance.

    Voxel sizes that come from an affine are off by a rounding, so distances are compared as float32: three voxels of
    1 mm are not beyond 3 mm.
    """
    reach = tolerance_mm * (1 + 1e-6)
    tree = KDTree(others_mm, leafsize=64, compact_nodes=False, balanced_tree=False)  # asked once: quick to build
    away_mm, _ = tree.query(places_mm, distance_upper_bound=reach)
    return away_mm.astype(np.float32) <= np.float32(tolerance_mm)
