"""How well two masks agree at their surfaces: what an expert would have to draw anew, rather than how much overlaps."""

from __future__ import annotations

import math
import warnings

import numpy as np
import torch
from jaxtyping import Bool


def surface_dice(
    predicted: Bool[np.ndarray, "i j k"],
    truth: Bool[np.ndarray, "i j k"],
    spacing_mm: tuple[float, float, float],
    *,
    tolerance_mm: float,
) -> float:
    """Share of both surfaces' areas that lies within a tolerance of the other surface (normalised surface Dice).

    Nikolov et al. 2021 (JMIR 23(7):e26151, equation 1). Surface elements and their areas are those of marching cubes
    on 2x2x2 neighbourhoods, distances go between the elements' places, in millimetres. Only the box of both masks is
    looked at, which changes nothing: all surface lies in it.

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
    from monai.metrics.surface_dice import compute_surface_dice

    box = tuple(slice(int(along.min()), int(along.max()) + 1) for along in np.nonzero(predicted | truth))
    # One empty voxel around, so that what touches the scan's edge has a surface there.
    sides = [torch.from_numpy(np.pad(mask[box], 1).astype(np.float32))[None, None] for mask in (predicted, truth)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI calls itself by an argument that it will drop
        value = compute_surface_dice(
            sides[0],
            sides[1],
            class_thresholds=[tolerance_mm],
            include_background=True,
            spacing=list(spacing_mm),
            use_subvoxels=True,
        )
    return float(value[0, 0])
