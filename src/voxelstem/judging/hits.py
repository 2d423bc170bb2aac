"""What a run that draws boxes finds and misses in each subject, at one rate of false positives."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from voxelstem.geometry import patient_to_voxel, voxel_to_patient
from voxelstem.heads.boxes import Box, Matched
from voxelstem.tasks.detect import Detected

RATE = 1.0
"""False positives per scan at which cases are told apart: the middle one of those at which the FROC curve is read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Counted:
    """Boxes of one subject from the threshold on, all classes together."""

    found: int
    missed: int
    false: int

    @property
    def errors(self) -> int:
        """What was missed and what is not there."""
        return self.missed + self.false


def thresholds_of(outcomes: Mapping[str, Detected], *, rate: float = RATE) -> dict[str, float]:
    """For each class the lowest score at which no more than `rate` false positives come upon a scan on average.

    Boxes of equal score lie on one side. Infinite where even the highest score has more: then no box counts.
    """
    names = dict.fromkeys(name for one in outcomes.values() for name in one.by_class)
    return {name: _threshold([o.by_class[name] for o in outcomes.values() if name in o], rate) for name in names}


def count(one: Detected, thresholds: Mapping[str, float]) -> Counted:
    """Count a subject's boxes from the threshold of each class on."""
    found = false = truths = 0
    for name, matched in one.by_class.items():
        said = [hit for score, hit in zip(matched.scores, matched.hits, strict=True) if score >= thresholds[name]]
        found, false, truths = found + sum(said), false + len(said) - sum(said), truths + matched.truths
    return Counted(found=found, missed=truths - found, false=false)


def painted(
    boxes: Iterable[Box], affine_ras: Float[np.ndarray, "4 4"], shape_ijk: tuple[int, int, int]
) -> Int[np.ndarray, "i j k"]:
    """The boxes as voxels of a scan's grid: 1, 2, 3 in their order, the first on top; 0 where there is none.

    A voxel belongs to a box that its centre lies in.
    """
    array, given = np.zeros(shape_ijk, dtype=np.int16), list(boxes)
    for number, box in reversed(list(enumerate(given, start=1))):
        sides = list(zip(box.low_ras_mm, box.high_ras_mm, strict=True))
        ends = np.stack(np.meshgrid(*sides, indexing="ij"), axis=-1).reshape(-1, 3)
        reach = patient_to_voxel(ends, affine_ras)
        first = np.clip(np.floor(reach.min(axis=0)), 0, shape_ijk).astype(np.int64)
        last = np.clip(np.ceil(reach.max(axis=0)) + 1, 0, shape_ijk).astype(np.int64)
        within = tuple(slice(low, high) for low, high in zip(first.tolist(), last.tolist(), strict=True))
        index = np.stack(np.meshgrid(*(np.arange(s.start, s.stop) for s in within), indexing="ij"), axis=-1)
        centres = voxel_to_patient(index.reshape(-1, 3).astype(np.float64), affine_ras)
        low, high = (np.array(corner) for corner in (box.low_ras_mm, box.high_ras_mm))
        inside = ((centres >= low) & (centres <= high)).all(axis=1).reshape(index.shape[:3])
        array[within][inside] = number
    return array


def _threshold(matched: Sequence[Matched], rate: float) -> float:
    scores = np.array([score for one in matched for score in one.scores], dtype=np.float64)
    hits = np.array([hit for one in matched for hit in one.hits], dtype=np.bool_)
    falling, level = np.unique(-scores, return_inverse=True)
    false = np.cumsum(np.bincount(level[~hits], minlength=len(falling)))
    within = np.flatnonzero(false <= rate * sum(one.scans for one in matched))
    return float(-falling[within[-1]]) if within.size else math.inf
