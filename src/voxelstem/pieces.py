"""From a label map to findings: how large each class and each of its pieces is, and where it lies in the patient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Integer
from scipy import ndimage

from voxelstem import geometry
from voxelstem.findings import Finding, Place, Point, Unsaid, Weights

MOST_PARTS = 64
"""Pieces of one class that are listed; noise has thousands, and nobody reads them."""
_TOUCHING = np.ones((3, 3, 3), dtype=bool)  # 26 neighbours: voxels that share a corner belong together


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
    boxes = ndimage.find_objects(labels, max(classes, default=1))
    findings: list[Finding] = []
    absent: list[str] = []
    unsaid: list[Unsaid] = []
    for value, name in sorted(classes.items()):
        box = boxes[value - 1]
        if box is None:
            absent.append(name)
            continue
        mask = labels[box] == value
        pieces = np.empty(mask.shape, dtype=np.int32)
        count: Any = ndimage.label(mask, _TOUCHING, output=pieces)
        sizes = np.bincount(pieces.ravel(), minlength=count + 1)[1:]
        large = np.flatnonzero(sizes * voxel_mm3 >= least_mm3)
        if not large.size:
            why = f"its largest piece of {count} has {sizes.max() * voxel_mm3:.4g} mm3, less than {least_mm3:g}"
            unsaid.append(Unsaid(what=name, why=why))
            continue
        listed = large[np.argsort(-sizes[large], kind="stable")][:most_parts]
        places = [_place(mask, box, affine_ras)]
        if count > 1:
            inner = ndimage.find_objects(pieces, count)
            places += [_place(pieces[inner[n]] == n + 1, _within(box, inner[n]), affine_ras) for n in listed]
            unsaid += _why(name, least=count - len(large), most=len(large) - len(listed), least_mm3=least_mm3)
        findings += [
            Finding(name=name, kind="segment", weights=weights, place=place, part=part)
            for part, place in enumerate(places)
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


def _within(box: tuple[slice, ...], inner: tuple[slice, ...]) -> tuple[slice, ...]:
    return tuple(slice(a.start + b.start, a.start + b.stop) for a, b in zip(box, inner, strict=True))


def _place(mask: Bool[np.ndarray, "a b c"], box: tuple[slice, ...], affine_ras: Float[np.ndarray, "4 4"]) -> Place:
    """Volume, centre of mass and box of a mask that was cut out at `box`."""
    start = np.array([edge.start for edge in box], dtype=np.float64)
    others = ((1, 2), (0, 2), (0, 1))
    along = [mask.sum(axis=axes, dtype=np.int64) for axes in others]
    count = int(along[0].sum())
    middle = start + [float(counts @ np.arange(counts.size)) / count for counts in along]
    # In each line of voxels only the first and the last can be the farthest in any direction.
    lines = mask.any(axis=2)
    first = mask.argmax(axis=2)[lines]
    last = mask.shape[2] - 1 - mask[:, :, ::-1].argmax(axis=2)[lines]
    a, b = np.nonzero(lines)
    ends = np.concatenate([np.stack([a, b, c], axis=1) for c in (first, last)])
    corners = geometry.voxel_to_patient(ends + start, affine_ras)
    half = np.abs(affine_ras[:3, :3]).sum(axis=1) / 2
    return Place(
        centre_ras_mm=_point(geometry.voxel_to_patient(middle[None], affine_ras)[0]),
        low_ras_mm=_point(corners.min(axis=0) - half),
        high_ras_mm=_point(corners.max(axis=0) + half),
        volume_mm3=count * float(abs(np.linalg.det(affine_ras[:3, :3]))),
    )


def _point(mm: Float[np.ndarray, "3"]) -> Point:
    return float(mm[0]), float(mm[1]), float(mm[2])


def _why(name: str, *, least: int, most: int, least_mm3: float) -> list[Unsaid]:
    small = f"its pieces smaller than {least_mm3:g} mm3 ({least}) are counted in its volume and not listed"
    many = f"its further pieces ({most}) are counted in its volume and not listed"
    return [Unsaid(what=name, why=why) for count, why in ((least, small), (most, many)) if count]
