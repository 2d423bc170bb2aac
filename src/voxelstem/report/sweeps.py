"""Curves of a threshold that sweeps over scores, as numbers: ROC, precision and recall, FROC; reliability beside them.

Bands and intervals resample subjects, in the very draws of `metrics.bootstrap_interval`. Where several repeats stand
for a contestant (untrained networks of several seeds), its curve is the mean of theirs at each place across (vertical
averaging, Fawcett 2006, section 8.1), so that its area is the mean of theirs, which is what the tables say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from voxelstem import metrics
from voxelstem.certainty.calibration import ReliabilityBin, check_chances, reliability_curve, wilson_interval
from voxelstem.heads.boxes import RATES, Matched, Sweep
from voxelstem.metrics import FEWEST_SUBJECTS, Interval

DRAWS, LEVEL = 1000, 0.95
"""Of every band and interval here, as in `metrics`."""
STEPS = 100
"""A band is measured at so many equal steps across."""
CELLS_AT_ONCE = 1 << 22
"""Subjects times draws that are swept in one go; bounds the memory."""
_ROUNDING = 1e-6
"""Of counts of subjects: far below one, far above what rows raised above one another lose in digits."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Judged:
    """What a contestant said of each held-out subject, and what is true."""

    name: str
    truth: Bool[np.ndarray, "subject"]
    chance: Float[np.ndarray, "subject repeat"]
    """That it is true; of every repeat."""

    def __post_init__(self) -> None:
        """Guard the shapes and numbers.

        Raises:
            ValueError: nobody, no repeat, not one truth for each row, or a score that is no number.
        """
        if self.chance.ndim != 2 or len(self.truth) != len(self.chance) or not self.chance.size:  # noqa: PLR2004
            raise ValueError(f"scores must be (subject, repeat) with a truth each, got {self.chance.shape}")
        if not np.isfinite(self.chance).all():
            raise ValueError(f"the scores of '{self.name}' hold what is no finite number")

    @classmethod
    def of(cls, name: str, by_subject: Mapping[str, Sequence[tuple[bool, float]]]) -> Judged:
        """Take each subject's truth and score of every repeat, subjects in the order of the tables.

        Raises:
            ValueError: as above, or repeats that do not agree on what is true.
        """
        rows = [by_subject[subject] for subject in sorted(by_subject)]
        if any(len({truth for truth, _ in row}) != 1 or len(row) != len(rows[0]) for row in rows):
            raise ValueError("all subjects need as many repeats, and a subject one truth in all of them")
        return cls(
            name=name,
            truth=np.array([row[0][0] for row in rows], dtype=np.bool_),
            chance=np.array([[score for _, score in row] for row in rows], dtype=np.float64),
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Line:
    """Points of a curve that never turns back across; where it rises at once, two points share a place."""

    x: Float[np.ndarray, "point"]
    y: Float[np.ndarray, "point"]

    def before(self, at: Float[np.ndarray, "place"]) -> Float[np.ndarray, "place"]:
        """Heights between the points, and at a jump where it begins."""
        right = np.minimum(np.searchsorted(self.x, at, side="left"), len(self.x) - 1)
        left = np.maximum(right - 1, 0)
        width = self.x[right] - self.x[left]
        share = np.where(width > 0, (self.x[right] - at) / np.where(width > 0, width, 1.0), 0.0)
        return self.y[right] - np.clip(share, 0, 1) * (self.y[right] - self.y[left])

    def after(self, at: Float[np.ndarray, "place"]) -> Float[np.ndarray, "place"]:
        """Heights between the points, and at a jump where it ends."""
        left = np.maximum(np.searchsorted(self.x, at, side="right") - 1, 0)
        right = np.minimum(left + 1, len(self.x) - 1)
        width = self.x[right] - self.x[left]
        share = np.where(width > 0, (at - self.x[left]) / np.where(width > 0, width, 1.0), 0.0)
        return self.y[left] + np.clip(share, 0, 1) * (self.y[right] - self.y[left])


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Band:
    """Between `low` and `high` lie 95 % of the curves of resampled subjects, at each place across by itself."""

    x: Float[np.ndarray, "place"]
    low: Float[np.ndarray, "place"]
    high: Float[np.ndarray, "place"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Trace:
    """A contestant's curve, what lies under it, and how far both would move with other subjects."""

    name: str
    repeats: int
    line: Line
    area: Interval
    band: Band | None
    """None where there are too few subjects for an interval, or most resamples have no curve."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reliability:
    """How often what a contestant stated came true."""

    name: str
    repeats: int
    bins: tuple[ReliabilityBin, ...]
    ece: Interval


def roc_points(truth: Bool[np.ndarray, "row"], score: Float[np.ndarray, "row"]) -> Line:
    """Sensitivity against the share of false alarms, from the highest threshold down (Fawcett 2006, section 4).

    Rows of equal score pass a threshold together, which makes a slope.

    Raises:
        ValueError: one kind of rows is missing.
    """
    _check_both(truth)
    right, false = next(_counted(truth, score, np.ones((1, len(truth)))))
    return Line(x=false[0] / false[0, -1], y=right[0] / right[0, -1])


def precision_points(truth: Bool[np.ndarray, "row"], score: Float[np.ndarray, "row"]) -> Line:
    """Precision against recall, as the steps under which average precision lies: never a line between two points.

    Which lines between points would be too kind is in Davis and Goadrich 2006, section 3.

    Raises:
        ValueError: one kind of rows is missing.
    """
    _check_both(truth)
    right, false = next(_counted(truth, score, np.ones((1, len(truth)))))
    recall = np.unique(right[0][1:])
    recall = recall[recall > 0] / right[0, -1]
    return _stairs(recall, _precision_at(right, false, recall)[0])


def roc(judged: Judged) -> Trace:
    """ROC curve with AUROC.

    Raises:
        ValueError: one kind of subjects is missing.
    """
    lines = [roc_points(judged.truth, score) for score in judged.chance.T]
    places = np.unique(np.concatenate([line.x for line in lines]))
    left, right = (np.mean([side(line, places) for line in lines], axis=0) for side in (Line.before, Line.after))

    return Trace(
        name=judged.name,
        repeats=judged.chance.shape[1],
        line=Line(x=np.repeat(places, 2), y=np.stack([left, right], axis=1).ravel()),
        area=_area(judged, _roc_area),
        band=_band(judged, _sensitivity_at),
    )


def precision_recall(judged: Judged) -> Trace:
    """Precision against recall, with average precision.

    Raises:
        ValueError: one kind of subjects is missing.
    """
    lines = [precision_points(judged.truth, score) for score in judged.chance.T]
    recall = np.unique(np.concatenate([line.x for line in lines]))[1:]
    height = np.mean([line.before(recall) for line in lines], axis=0)

    return Trace(
        name=judged.name,
        repeats=judged.chance.shape[1],
        line=_stairs(recall, height),
        area=_area(judged, _precision_area),
        band=_band(judged, _precision_at),
    )


def froc(name: str, by_subject: Mapping[str, Sequence[Matched]]) -> Trace:
    """Sensitivity against false positives per scan, from 1/8 to 8, with the mean sensitivity at `boxes.RATES`.

    That mean is LUNA16's score (Setio et al. 2017). Points lie at equal steps of the logarithm.

    Raises:
        ValueError: no subject, not one record for every repeat, or nothing is there to be found.
    """
    rows = [by_subject[subject] for subject in sorted(by_subject)]
    if not rows or any(len(row) != len(rows[0]) or not row for row in rows):
        raise ValueError("a FROC curve needs subjects, all with as many repeats")
    if not any(one.truths for row in rows for one in row):
        raise ValueError("a FROC curve needs something that is there to be found")
    sweeps = [Sweep.of(repeat) for repeat in zip(*rows, strict=True)]
    places = np.geomspace(RATES[0], RATES[-1], 97)  # sixteen to a doubling: each of `RATES` is one of them

    def at(counts: np.ndarray, rates: Sequence[float]) -> np.ndarray:
        return metrics.defined_mean(np.stack([sweep.sensitivity_at(counts, rates) for sweep in sweeps]), 0)

    whole = at(np.ones((1, len(rows))), places.tolist())[0]
    return Trace(
        name=name,
        repeats=len(sweeps),
        line=Line(x=places, y=whole),
        area=interval_of(len(rows), lambda counts: at(counts, RATES).mean(axis=1)),
        band=band_of(places, at(draws_of(len(rows)), places.tolist()), len(rows)),
    )


def reliability(judged: Judged, *, bins: int = 10) -> Reliability:
    """How often each stated probability came true, in bins of one width, with the calibration error over subjects.

    With several repeats a bin holds what all of them stated, and counts for as many subjects as it holds of each on
    average: repeats of one subject are no other subjects.

    Raises:
        ValueError: what is no probability, or no bin.
    """
    repeats = judged.chance.shape[1]
    for column in judged.chance.T:
        check_chances(column, judged.truth)
    pooled = reliability_curve(np.repeat(judged.truth, repeats), judged.chance.ravel(), bins=bins)

    def error(counts: np.ndarray) -> np.ndarray:
        each = [metrics.counted_calibration_error(counts, judged.truth, c, bins=bins) for c in judged.chance.T]
        return np.mean(each, axis=0)

    return Reliability(
        name=judged.name,
        repeats=repeats,
        bins=tuple(_thinned(one, repeats) for one in pooled),
        ece=interval_of(len(judged.truth), error),
    )


@dataclass(frozen=True, slots=True)
class Recounted(metrics.Counted):
    """A figure that is computed of how often each subject was drawn; for `metrics.bootstrap_interval`."""

    measure: Callable[[Float[np.ndarray, "draw subject"]], Float[np.ndarray, "draw"]]

    def counted(self, outcomes: Sequence[Any], counts: Float[np.ndarray, "draw subject"]) -> Float[np.ndarray, "draw"]:
        """Compute the figure in each draw."""
        del outcomes  # `measure` knows them
        return self.measure(counts)


def interval_of(
    subjects: int, measure: Callable[[Float[np.ndarray, "draw subject"]], Float[np.ndarray, "draw"]]
) -> Interval:
    """A figure with its interval, where `measure` says what it is when a subject stands so many times.

    Raises:
        ValueError: no subject.
    """
    return metrics.bootstrap_interval({f"{row:09}": row for row in range(subjects)}, Recounted(measure))


def draws_of(subjects: int) -> Float[np.ndarray, "draw subject"]:
    """How often each subject stands in each draw: the draws of `metrics.bootstrap_interval` with its own settings."""
    return metrics.drawn(subjects, draws=DRAWS, seed=0)


def band_of(places: Float[np.ndarray, "place"], values: Float[np.ndarray, "draw place"], subjects: int) -> Band | None:
    """The band of resampled curves, or None by the rules of `bootstrap_interval`. A draw without a curve is NaN."""
    defined = values[~np.isnan(values).any(axis=1)]
    if subjects < FEWEST_SUBJECTS or len(defined) <= len(values) / 2:
        return None
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return Band(x=places, low=low, high=high)


def _check_both(truth: Bool[np.ndarray, "row"]) -> None:
    if truth.all() or not truth.any():
        raise ValueError(f"a curve needs rows of both kinds, got {int(truth.sum())} of {len(truth)} that are true")


def _counted(
    truth: Bool[np.ndarray, "row"], score: Float[np.ndarray, "row"], counts: Float[np.ndarray, "draw row"]
) -> Iterator[tuple[Float[np.ndarray, "part point"], Float[np.ndarray, "part point"]]]:
    """True and false positives at every threshold, from (0, 0) on, for some draws at a time."""
    order = np.argsort(-score, kind="stable")
    # Rows of equal score lie on one side of any threshold.
    ends = np.append(np.flatnonzero(np.diff(score[order])), len(score) - 1)
    draws = max(1, CELLS_AT_ONCE // len(score))
    for start in range(0, len(counts), draws):
        each = counts[start : start + draws][:, order]
        right = np.cumsum(each * truth[order], axis=1)[:, ends]
        said = np.cumsum(each, axis=1)[:, ends]
        yield np.pad(right, ((0, 0), (1, 0))), np.pad(said - right, ((0, 0), (1, 0)))


def _sensitivity_at(
    right: Float[np.ndarray, "draw point"], false: Float[np.ndarray, "draw point"], alarms: Float[np.ndarray, "place"]
) -> Float[np.ndarray, "draw place"]:
    """`Line.after` of the ROC curve of each draw."""
    wanted = alarms * false[:, -1:]
    here = _search(false, wanted + _ROUNDING, "right") - 1
    further = np.minimum(here + 1, false.shape[1] - 1)
    (x, next_x), (y, next_y) = ([np.take_along_axis(rows, at, 1) for at in (here, further)] for rows in (false, right))
    share = np.clip((wanted - x) / np.where(next_x > x, next_x - x, 1.0), 0, 1)
    return (y + share * (next_y - y)) / right[:, -1:]


def _precision_at(
    right: Float[np.ndarray, "draw point"], false: Float[np.ndarray, "draw point"], recall: Float[np.ndarray, "place"]
) -> Float[np.ndarray, "draw place"]:
    """Precision of each draw at the first threshold that reaches each recall, and finds one at least."""
    wanted = np.maximum(recall * right[:, -1:] - _ROUNDING, _ROUNDING)
    first = np.minimum(_search(right, wanted, "left"), right.shape[1] - 1)
    found, wrong = (np.take_along_axis(rows, first, 1) for rows in (right, false))
    return found / np.maximum(found + wrong, 1.0)


def _search(
    rows: Float[np.ndarray, "draw point"], wanted: Float[np.ndarray, "draw place"], side: Literal["left", "right"]
) -> Int[np.ndarray, "draw place"]:
    """`np.searchsorted` in each row; all at once, the rows laid end to end and each raised above the one before."""
    start = np.arange(len(rows))[:, None]
    raised = start * (rows.max(initial=0.0) + 1.0)
    flat = np.searchsorted((rows + raised).ravel(), (wanted + raised).ravel(), side)
    return flat.reshape(wanted.shape) - start * rows.shape[1]


def _stairs(recall: Float[np.ndarray, "step"], height: Float[np.ndarray, "step"]) -> Line:
    """Steps that end at each recall, from 0 on."""
    return Line(x=np.repeat(np.append(0.0, recall), 2)[1:-1], y=np.repeat(height, 2))


def _roc_area(right: Float[np.ndarray, "draw point"], false: Float[np.ndarray, "draw point"]) -> np.ndarray:
    area = (np.diff(false, axis=1) * (right[:, 1:] + right[:, :-1]) / 2).sum(axis=1)
    return area / (right[:, -1] * false[:, -1])


def _precision_area(right: Float[np.ndarray, "draw point"], false: Float[np.ndarray, "draw point"]) -> np.ndarray:
    precision = right[:, 1:] / np.maximum(right[:, 1:] + false[:, 1:], 1.0)
    return (np.diff(right, axis=1) * precision).sum(axis=1) / right[:, -1]


def _area(judged: Judged, under: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Interval:
    """The mean area of the repeats, undefined in draws of one kind only."""

    def measure(counts: np.ndarray) -> np.ndarray:
        areas = np.full((len(judged.chance.T), len(counts)), math.nan)
        both = _both(judged, counts)
        for row, score in enumerate(judged.chance.T):
            parts = [under(right, false) for right, false in _counted(judged.truth, score, counts[both])]
            areas[row, both] = np.concatenate(parts) if parts else 0.0
        return areas.mean(axis=0)

    return interval_of(len(judged.truth), measure)


def _band(judged: Judged, heights: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]) -> Band | None:
    counts, places = draws_of(len(judged.truth)), np.linspace(0, 1, STEPS + 1)
    values = np.full((len(counts), len(places)), math.nan)
    both = _both(judged, counts)
    curves = [
        np.concatenate([heights(*part, places) for part in _counted(judged.truth, score, counts[both])])
        for score in (judged.chance.T if both.any() else ())
    ]
    values[both] = np.mean(curves, axis=0) if curves else math.nan
    return band_of(places, values, len(judged.truth))


def _both(judged: Judged, counts: Float[np.ndarray, "draw subject"]) -> Bool[np.ndarray, "draw"]:
    """Draws that hold subjects of both kinds."""
    return (counts @ judged.truth > 0) & (counts @ ~judged.truth > 0)


def _thinned(one: ReliabilityBin, repeats: int) -> ReliabilityBin:
    subjects = max(1, round(one.rows / repeats))
    share = wilson_interval(one.came_true.estimate, subjects, level=LEVEL)
    return ReliabilityBin(low=one.low, high=one.high, rows=subjects, mean_chance=one.mean_chance, came_true=share)
