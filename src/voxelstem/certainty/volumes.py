"""How large structures are said to be and are, of unseen subjects: what intervals of volumes are fitted to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Float, Integer

from voxelstem.protocols import Example, Features, Head


class Marker(Protocol):
    """A task that labels voxels; `tasks.segment.Segment` is one."""

    def fit(self, examples: Sequence[Example], classes: tuple[str, ...], *, mode: str, seed: int) -> Head:
        """Fit a head to labelled examples."""
        ...

    def mark(
        self, head: Head, features: Features, affine_ras: Float[np.ndarray, "4 4"], shape_ijk: tuple[int, int, int]
    ) -> Integer[np.ndarray, "i j k"]:
        """Number every voxel by its class, from 1; 0 is background."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Volumes of a subject's structures; of several scans their means. Structures that nobody drew are not there."""

    predicted_mm3: Mapping[str, float]
    true_mm3: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sized:
    """A task that labels voxels, of which only the volumes are looked at: for `crossfit.answering`."""

    task: Marker

    def fit(self, examples: Sequence[Example], classes: tuple[str, ...], *, mode: str, seed: int) -> Head:
        """Fit the task's head."""
        return self.task.fit(examples, classes, mode=mode, seed=seed)

    def outcome(self, head: Head, example: Example) -> Sizes:
        """Measure one scan, as the head marks it and as the expert drew it.

        Raises:
            ValueError: the example has no voxel labels.
        """
        truth = example.labels
        if truth is None:
            raise ValueError("volumes need voxel labels")
        i, j, k = truth.array.shape
        marked = self.task.mark(head, example.features, example.affine_ras, (i, j, k))
        voxel_mm3 = float(abs(np.linalg.det(example.affine_ras[:3, :3])))
        found, drawn = _counts(marked, len(head.classes)), _counts(truth.array, max(truth.classes, default=0))
        numbers = {name: [value for value, said in truth.classes.items() if said == name] for name in head.classes}
        known = [name for name in head.classes if numbers[name]]
        return Sizes(
            predicted_mm3={name: float(found[1 + head.classes.index(name)]) * voxel_mm3 for name in known},
            true_mm3={name: float(drawn[numbers[name]].sum()) * voxel_mm3 for name in known},
        )

    def combine(self, outcomes: Sequence[Sizes]) -> Sizes:
        """Average each structure over a subject's scans."""
        predicted, true = ([getattr(one, side) for one in outcomes] for side in ("predicted_mm3", "true_mm3"))
        return Sizes(predicted_mm3=_means(predicted), true_mm3=_means(true))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SizeRows:
    """Volumes of all structures under each other: one row is one structure in one subject."""

    structures: tuple[str, ...]
    predicted_mm3: Float[np.ndarray, "row"]
    true_mm3: Float[np.ndarray, "row"]


def rows_of_sizes(outcomes: Mapping[str, Sizes]) -> SizeRows:
    """Rows of all structures that were found at all, which are those of which a volume is said.

    So an interval's promise is about scans in which the structure is found. A structure that is found where none is
    counts with its true volume of 0.
    """
    rows = [
        (name, one.predicted_mm3[name], one.true_mm3[name])
        for _, one in sorted(outcomes.items())
        for name in one.true_mm3
        if one.predicted_mm3[name] > 0
    ]
    return SizeRows(
        structures=tuple(row[0] for row in rows),
        predicted_mm3=np.array([row[1] for row in rows], dtype=np.float64),
        true_mm3=np.array([row[2] for row in rows], dtype=np.float64),
    )


def _counts(array: Integer[np.ndarray, "i j k"], largest: int) -> Integer[np.ndarray, "kind"]:
    """How many voxels each number from 0 has; plane by plane, as a scan's numbers in 64 bits take much memory."""
    found = np.zeros(largest + 1, dtype=np.int64)
    for plane in array:
        found += np.bincount(plane.ravel(), minlength=largest + 1)[: largest + 1]
    return found


def _means(sides: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for side in sides for name in side)
    return {name: float(np.mean([side[name] for side in sides if name in side])) for name in names}
