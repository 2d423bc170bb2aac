"""From a label map to findings: how large each class and each of its pieces is, and where it lies in the patient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Integer

from voxelstem import components, geometry
from voxelstem.findings import Finding, Place, Point, Unsaid, Weights

MOST_PARTS = 64
"""Pieces of one class that are listed; noise has thousands, and nobody reads them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pieces:
    """What a label map holds."""

    findings: tuple[Finding, ...]
    """Of each class that is found, all its voxels first (part 0), then its pieces from the largest on."""
    absent: tuple[str, ...]
    """Classes without a voxel."""
    unsaid: tuple[Unsaid, ...]
    """Pieces that were not listed, and classes that have no others."""


def measure(
    labels: Integer[np.ndarray, "i j k"],
    affine_ras: Float[np.ndarray, "4 4"],
    classes: Mapping[int, str],
    *,
    weights: Weights,
    least_mm3: float,
    most_parts: int = MOST_PARTS,
) -> Pieces:
    """Measure every class of a label map, and each of its pieces whose voxels touch by a face, an edge or a corner.

    Volumes count voxels, centres are their centres of mass, and boxes enclose the voxels to their edges: all in
    millimetres, along R, A and S also where the scan is oblique. A class of one piece has no piece listed: it is it.

    Args:
        labels: Class numbers; 0 is background.
        affine_ras: From voxel indices to millimetres.
        classes: The name of every other number that occurs.
        weights: What made the label map.
        least_mm3: Pieces smaller than this are counted in their class's volume and not listed; a class that has no
            larger one is not found.
        most_parts: Of one class, so many pieces are listed at most.

    Raises:
        ValueError: a number without a name, a name given twice, a bad affine, or a limit that is negative.
    """
    geometry.check_affine(affine_ras)
    check_classes(labels, classes)
    if least_mm3 < 0 or most_parts < 0:
        raise ValueError("least_mm3 and most_parts must not be negative")
    voxel_mm3 = float(abs(np.linalg.det(affine_ras[:3, :3])))
    least = _least_voxels(least_mm3, voxel_mm3)
    found = components.survey(labels, affine_ras[:3, :3].astype(np.float64), least=least, most=most_parts)
    findings: list[Finding] = []
    absent: list[str] = []
    unsaid: list[Unsaid] = []
    for value, name in sorted(classes.items()):
        one = found.get(value)
        if one is None:
            absent.append(name)
            continue
        if not one.large:
            why = f"its largest piece of {one.count} has {one.largest * voxel_mm3:.4g} mm3, less than {least_mm3:g}"
            unsaid.append(Unsaid(what=name, why=why))
            continue
        parts = [one.whole]
        if one.count > 1:
            parts += one.listed
            unsaid += _why(name, least=one.count - one.large, most=one.large - len(one.listed), least_mm3=least_mm3)
        findings += [
            Finding(name=name, kind="segment", weights=weights, place=_place(piece, affine_ras), part=part)
            for part, piece in enumerate(parts)
        ]
    return Pieces(findings=tuple(findings), absent=tuple(absent), unsaid=tuple(unsaid))


def check_classes(labels: Integer[np.ndarray, "i j k"], classes: Mapping[int, str]) -> None:
    """Accept only label maps whose every number has one name.

    Raises:
        ValueError: a number without a name, a name that two numbers have, or one that belongs to the background.
    """
    if min(classes, default=1) < 1:
        raise ValueError("classes are numbered from 1: 0 is background")
    if len(set(classes.values())) < len(classes):
        raise ValueError("two classes of the label map have one name")
    low = int(labels.min(initial=0))
    if low < 0:
        raise ValueError(f"the label map holds {low}, and class numbers are not negative")
    nameless = sorted(present(labels) - classes.keys())
    if nameless:
        raise ValueError(f"the label map holds {nameless[0]}, which no class is named for")


def present(labels: Integer[np.ndarray, "i j k"]) -> set[int]:
    """The class numbers that occur; `labels` holds none below 0."""
    seen = np.zeros(int(labels.max(initial=0)) + 1, dtype=bool)
    for plane in labels:  # plane by plane: the index of a whole scan would take eight times its memory
        seen[plane] = True
    return {int(value) for value in np.flatnonzero(seen)} - {0}


def _least_voxels(least_mm3: float, voxel_mm3: float) -> int:
    """The fewest voxels whose volume is not below a limit."""
    count = max(int(least_mm3 / voxel_mm3) - 1, 0)
    while count * voxel_mm3 < least_mm3:
        count += 1
    return count


def _place(piece: components.Component, affine_ras: Float[np.ndarray, "4 4"]) -> Place:
    """Volume, centre of mass and box of a piece in the patient."""
    voxel = affine_ras.astype(np.float64)
    half = np.abs(voxel[:3, :3]).sum(axis=1) / 2
    return Place(
        centre_ras_mm=_point(geometry.voxel_to_patient(np.array([piece.centre_ijk]), voxel)[0]),
        low_ras_mm=_point(np.array(piece.low) + voxel[:3, 3] - half),
        high_ras_mm=_point(np.array(piece.high) + voxel[:3, 3] + half),
        volume_mm3=piece.voxels * float(abs(np.linalg.det(affine_ras[:3, :3]))),
    )


def _point(mm: Float[np.ndarray, "3"]) -> Point:
    return float(mm[0]), float(mm[1]), float(mm[2])


def _why(name: str, *, least: int, most: int, least_mm3: float) -> list[Unsaid]:
    small = f"its pieces smaller than {least_mm3:g} mm3 ({least}) are counted in its volume and not listed"
    many = f"its further pieces ({most}) are counted in its volume and not listed"
    return [Unsaid(what=name, why=why) for count, why in ((least, small), (most, many)) if count]
