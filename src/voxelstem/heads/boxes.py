"""Boxes about findings, in the patient's millimetres: where they are, how they overlap, and how well they were found.

A box runs along the patient's axes. In arrays it is six numbers: its low corner (R, A, S), then its high one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import ndimage

from voxelstem.geometry import voxel_to_patient
from voxelstem.study import LabelMap

RATES = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0)
"""False positives per scan at which LUNA16 reads the FROC curve (Setio et al. 2017)."""

Kind = Literal["radius", "inside", "iou"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Box:
    """One thing, labelled or found, in millimetres (RAS+)."""

    name: str
    """Its class."""
    low_ras_mm: tuple[float, float, float]
    high_ras_mm: tuple[float, float, float]
    score: float = 1.0
    """How sure a prediction is; a label is certain."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: a number is not finite, or the box has no extent.
        """
        if not np.isfinite([*self.low_ras_mm, *self.high_ras_mm, self.score]).all():
            raise ValueError("a box must have finite corners and a finite score")
        if any(low >= high for low, high in zip(self.low_ras_mm, self.high_ras_mm, strict=True)):
            raise ValueError(f"a box must run from low to high, got {self.low_ras_mm} to {self.high_ras_mm}")

    @property
    def centre_ras_mm(self) -> tuple[float, float, float]:
        """The middle between its corners."""
        r, a, s = ((low + high) / 2 for low, high in zip(self.low_ras_mm, self.high_ras_mm, strict=True))
        return r, a, s


@dataclass(frozen=True, kw_only=True, slots=True)
class Hit:
    """When a predicted box has found a true one.

    `radius`: its centre lies in the ellipsoid that fits the true box; for a ball, within its radius, as LUNA16 asks
    (Setio et al. 2017). `inside`: its centre lies in the true box. `iou`: they overlap by `iou` at least.

    Another prediction that finds only what was found before is passed over by `radius` and `inside`, as LUNA16 does,
    and is a false positive for `iou`, as in PASCAL VOC (Everingham et al. 2010).
    """

    kind: Kind = "radius"
    iou: float = 0.1

    def __post_init__(self) -> None:
        """Guard the settings.

        Raises:
            ValueError: an unknown kind, or an overlap outside (0, 1].
        """
        if self.kind not in get_args(Kind):
            raise ValueError(f"a hit is one of {', '.join(get_args(Kind))}, got '{self.kind}'")
        if not 0 < self.iou <= 1:
            raise ValueError(f"the overlap of a hit must lie in (0, 1], got {self.iou}")

    def closeness(
        self, predicted: Float[np.ndarray, "box 6"], truths: Float[np.ndarray, "truth 6"]
    ) -> Float[np.ndarray, "box truth"]:
        """How well each prediction finds each truth; minus infinity where it does not."""
        if self.kind == "iou":
            overlap = iou(predicted, truths)
            return np.where(overlap >= self.iou, overlap, -math.inf)
        away = centre_distance(predicted, truths, within="ellipsoid" if self.kind == "radius" else "box")
        return np.where(away <= 1, -away, -math.inf)


@dataclass(frozen=True, kw_only=True, slots=True)
class Matched:
    """What was said of one class in the scans of one subject, and how much of it is there."""

    scores: tuple[float, ...]
    """Of the predictions that count."""
    hits: tuple[bool, ...]
    """Whether each of them found something that none before it had found."""
    truths: int
    scans: int = 1

    def __post_init__(self) -> None:
        """Guard the counts.

        Raises:
            ValueError: a score without a verdict, more hits than truths, or no scan.
        """
        if len(self.scores) != len(self.hits) or not np.isfinite(self.scores).all():
            raise ValueError("every prediction needs a finite score and a verdict")
        if sum(self.hits) > self.truths:
            raise ValueError(f"{sum(self.hits)} hits are more than the {self.truths} things that are there")
        if self.scans < 1:
            raise ValueError(f"a match is of one scan at least, got {self.scans}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """A FROC curve, from no prediction to all of them."""

    false_per_scan: Float[np.ndarray, "point"]
    sensitivity: Float[np.ndarray, "point"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """How many predictions of one class are right and wrong as the threshold falls, ready to be counted over and over.

    Predictions of equal score lie on one side of any threshold. Of thresholds between which nothing is found only the
    ends are kept: the curve runs straight there, and a resampled sample is a small product.
    """

    false: Float[np.ndarray, "subject point"]
    """Of each subject, false positives at a threshold and above, from no prediction to all of them."""
    right: Float[np.ndarray, "subject point"]
    truths: Int[np.ndarray, "subject"]
    scans: Int[np.ndarray, "subject"]

    @staticmethod
    def of(sample: Sequence[Matched]) -> Sweep:
        """Sort what was matched, one record for each subject."""
        scores = np.array([score for one in sample for score in one.scores], dtype=np.float64)
        hits = np.array([hit for one in sample for hit in one.hits], dtype=bool)
        subject = np.repeat(np.arange(len(sample)), [len(one.scores) for one in sample])
        falling, level = np.unique(-scores, return_inverse=True)
        finds = np.bincount(level[hits], minlength=len(falling)) > 0
        # A level ends a straight line if it or the next one finds something.
        kept = finds | np.append(finds[1:], True)[: len(finds)]
        point = (np.cumsum(kept) - kept)[level]
        counted = np.zeros((2, len(sample), 1 + int(kept.sum())))
        np.add.at(counted, (hits.astype(np.int64), subject, 1 + point), 1.0)
        false, right = counted.cumsum(axis=2)
        return Sweep(
            false=false,
            right=right,
            truths=np.array([one.truths for one in sample], dtype=np.int64),
            scans=np.array([one.scans for one in sample], dtype=np.int64),
        )

    def curve(self) -> Curve:
        """The FROC curve of the sample as it is (Bunch et al. 1978); the sensitivity is NaN where nothing is there."""
        there, scans = float(self.truths.sum()) or math.nan, max(int(self.scans.sum()), 1)
        return Curve(false_per_scan=self.false.sum(axis=0) / scans, sensitivity=self.right.sum(axis=0) / there)

    def sensitivity_at(
        self, counts: Float[np.ndarray, "draw subject"], rates: Sequence[float]
    ) -> Float[np.ndarray, "draw rate"]:
        """Sensitivity at these mean numbers of false positives per scan, where a subject stands `counts` times.

        Points of the curve are joined by lines, the first with (0, 0); beyond the last it stays as it is (Setio et al.
        2017). NaN in a draw in which nothing is there.
        """
        there = counts @ self.truths
        wanted = np.multiply.outer(counts @ self.scans, rates)
        curves = zip(wanted, counts @ self.false, counts @ self.right, strict=True)
        found = np.array([np.interp(*curve) for curve in curves]).reshape(wanted.shape)
        return np.where(there[:, None] > 0, found / np.maximum(there, 1)[:, None], math.nan)

    def average_precision(self, counts: Float[np.ndarray, "draw subject"]) -> Float[np.ndarray, "draw"]:
        """Area under precision against recall, where a subject stands `counts` times.

        The precision at a recall is the best at that recall or a higher one (Everingham et al. 2015, from 2010 on, at
        all points). NaN in a draw in which nothing is there.
        """
        there, false, right = counts @ self.truths, counts @ self.false, counts @ self.right
        precision = right / np.maximum(false + right, 1)
        best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        area = (np.diff(right, axis=1) * best[:, 1:]).sum(axis=1)
        return np.where(there > 0, area / np.maximum(there, 1), math.nan)


def corners(boxes: Sequence[Box]) -> Float[np.ndarray, "box 6"]:
    """The boxes as an array."""
    return np.array([[*box.low_ras_mm, *box.high_ras_mm] for box in boxes], dtype=np.float64).reshape(-1, 6)


def iou(boxes: Float[np.ndarray, "box 6"], others: Float[np.ndarray, "other 6"]) -> Float[np.ndarray, "box other"]:
    """Shared volume over the volume of both together (Jaccard 1912), of each box with each other one."""
    low = np.maximum(boxes[:, None, :3], others[None, :, :3])
    high = np.minimum(boxes[:, None, 3:], others[None, :, 3:])
    shared = np.maximum(high - low, 0.0).prod(axis=2)
    sizes, other_sizes = ((side[:, 3:] - side[:, :3]).prod(axis=1) for side in (boxes, others))
    union = sizes[:, None] + other_sizes[None] - shared
    # The two roundings of equal boxes differ in the last digit.
    return np.minimum(shared / np.maximum(union, 1e-300), 1.0)


def centre_distance(
    boxes: Float[np.ndarray, "box 6"],
    truths: Float[np.ndarray, "truth 6"],
    *,
    within: Literal["ellipsoid", "box"] = "ellipsoid",
) -> Float[np.ndarray, "box truth"]:
    """How far the centre of each box lies from that of each true one, in half edges of the true one.

    It is 1 on the surface of the ellipsoid that fits the true box, or of that box itself. With a cube about a ball the
    first is the distance over the radius, by which LUNA16 decides (Setio et al. 2017).
    """
    half = (truths[:, 3:] - truths[:, :3]) / 2
    gap = (boxes[:, None, :3] + boxes[:, None, 3:]) / 2 - (truths[None, :, :3] + truths[None, :, 3:]) / 2
    away = np.abs(gap) / np.maximum(half, 1e-300)
    return np.sqrt((away**2).sum(axis=2)) if within == "ellipsoid" else away.max(axis=2)


def suppress(
    boxes: Float[np.ndarray, "box 6"], scores: Float[np.ndarray, "box"], *, overlap: float, most: int
) -> Int[np.ndarray, "kept"]:
    """Non-maximum suppression: which boxes stay, best first, at most `most` of them.

    A box goes if one that stays scores at least as high and their IoU is above `overlap`; of equal scores the first
    stays.
    """
    left = np.argsort(-scores, kind="stable")
    kept: list[int] = []
    while len(left) and len(kept) < most:
        kept.append(int(left[0]))
        rest = left[1:]
        left = rest[iou(boxes[left[:1]], boxes[rest])[0] <= overlap]
    return np.array(kept, dtype=np.int64)


def of_labels(
    labels: LabelMap,
    affine_ras: Float[np.ndarray, "4 4"],
    classes: Sequence[str],
    *,
    smallest_mm3: float = 0.0,
) -> tuple[Box, ...]:
    """The box of every connected piece of these classes whose volume is `smallest_mm3` at least.

    Voxels that touch at a corner are connected. A box holds its voxels whole, not only their centres; where the scan's
    axes are oblique it is larger than the piece for that.
    """
    spots = ndimage.find_objects(labels.array)
    found: list[Box] = []
    for name in dict.fromkeys(classes):
        values = [value for value, said in labels.classes.items() if said == name and 0 < value <= len(spots)]
        where = [spot for value in values if (spot := spots[value - 1]) is not None]
        if where:
            # One class may have several values, and its pieces may run through them.
            hull = tuple(
                slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*where, strict=True)
            )
            start = np.array([axis.start for axis in hull])
            found += _pieces(name, np.isin(labels.array[hull], values), start, affine_ras, smallest_mm3)
    return tuple(found)


def match(predicted: Sequence[Box], truths: Sequence[Box], hit: Hit) -> Matched:
    """Compare the boxes of one class in one scan.

    Predictions choose in falling order of score, each the truth that it finds best among those still free. See `Hit`
    for what becomes of one that finds nothing new.
    """
    order = sorted(range(len(predicted)), key=lambda place: -predicted[place].score)
    closeness = hit.closeness(corners(predicted), corners(truths))
    free = np.ones(len(truths), dtype=bool)
    scores: list[float] = []
    hits: list[bool] = []
    for place in order:
        finds = closeness[place] > -math.inf
        new = bool((finds & free).any())
        if new:
            free[np.where(free, closeness[place], -math.inf).argmax()] = False
        elif finds.any() and hit.kind != "iou":
            continue
        scores.append(float(predicted[place].score))
        hits.append(new)
    return Matched(scores=tuple(scores), hits=tuple(hits), truths=len(truths))


def joined(matched: Sequence[Matched]) -> Matched:
    """What was matched in several scans of one subject, together."""
    return Matched(
        scores=tuple(score for one in matched for score in one.scores),
        hits=tuple(hit for one in matched for hit in one.hits),
        truths=sum(one.truths for one in matched),
        scans=sum(one.scans for one in matched),
    )


def _pieces(
    name: str,
    mask: Bool[np.ndarray, "i j k"],
    start_ijk: Int[np.ndarray, "3"],
    affine_ras: Float[np.ndarray, "4 4"],
    smallest_mm3: float,
) -> Iterator[Box]:
    pieces = np.empty(mask.shape, dtype=np.int32)
    ndimage.label(mask, structure=np.ones((3, 3, 3)), output=pieces)
    voxel_mm3 = abs(float(np.linalg.det(affine_ras[:3, :3])))
    reach = np.abs(affine_ras[:3, :3]).sum(axis=1) / 2
    for number, part in enumerate(ndimage.find_objects(pieces), start=1):
        inside = np.argwhere(pieces[part] == number) + [axis.start for axis in part]
        if len(inside) * voxel_mm3 < smallest_mm3 * (1 - 1e-9):  # a determinant of 8 may come out as 7.999...
            continue
        centres = voxel_to_patient(inside + start_ijk, affine_ras)
        low, high = (centres.min(axis=0) - reach).tolist(), (centres.max(axis=0) + reach).tolist()
        yield Box(name=name, low_ras_mm=(low[0], low[1], low[2]), high_ras_mm=(high[0], high[1], high[2]))
