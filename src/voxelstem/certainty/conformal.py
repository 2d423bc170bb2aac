"""Sets of classes and intervals that hold the truth as often as they say: split-conformal prediction.

The promise needs no right network and no right probabilities, only that a new subject is drawn like those of the
calibration, and that these took no part in fitting anything (see `thresholds`). One row is one subject.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from voxelstem.certainty.calibration import check_labels, check_probabilities
from voxelstem.certainty.thresholds import ROUNDING, Thresholds, as_bytes, fit_thresholds, from_bytes, read_arrays

Score = Literal["lac", "aps"]
"""`lac`: the smallest sets on average; `aps`: sets that are larger where a scan is harder."""
_SCORES: tuple[Score, ...] = ("lac", "aps")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PredictedSets:
    """Which classes are possible for each scan. An empty set says that none of them looks as it should."""

    members: Bool[np.ndarray, "row classes"]
    uncalibrated: Bool[np.ndarray, "row"]
    """These hold all classes because their group had too few calibration subjects, or none."""
    lacking: tuple[str, ...] = ()
    """The names of these groups."""

    @property
    def sizes(self) -> Int[np.ndarray, "row"]:
        """How many classes each set holds; the answer is certain with one."""
        return self.members.sum(axis=1)

    def holds(self, truth: Int[np.ndarray, "row"]) -> Bool[np.ndarray, "row"]:
        """Whether each set holds the true class.

        Raises:
            ValueError: as `calibration.check_labels`.
        """
        return self.members[np.arange(len(self.members)), check_labels(truth, self.members)]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PredictedIntervals:
    """Between which numbers the truth lies; from -inf to inf where the group had too few calibration subjects."""

    low: Float[np.ndarray, "row"]
    high: Float[np.ndarray, "row"]
    lacking: tuple[str, ...] = ()
    """The names of such groups."""

    def holds(self, truth: Float[np.ndarray, "row"]) -> Bool[np.ndarray, "row"]:
        """Whether each interval holds the true number.

        Raises:
            ValueError: not one number for each interval.
        """
        if len(truth) != len(self.low):
            raise ValueError(f"every interval needs a truth, got {len(truth)} for {len(self.low)}")
        return (self.low <= truth) & (truth <= self.high)


@dataclass(frozen=True, kw_only=True, slots=True)
class ConformalSets:
    """Turns probabilities into sets of classes."""

    score: Score
    classes: int
    randomised: bool
    """Whether `aps` takes a random part of each class's own probability: then coverage is the level and no more."""
    thresholds: Thresholds

    def __post_init__(self) -> None:
        """Guard the settings.

        Raises:
            ValueError: no such score, `lac` with randomisation, or fewer than two classes.
        """
        if self.score not in _SCORES or (self.randomised and self.score == "lac") or self.classes < 2:  # noqa: PLR2004
            raise ValueError(f"sets need two classes and one of {_SCORES}, lac without randomisation, got {self}")

    def apply(
        self,
        probabilities: Float[np.ndarray, "row classes"],
        *,
        groups: Sequence[str] = (),
        draws: Float[np.ndarray, "row"] | None = None,
    ) -> PredictedSets:
        """The set of each row. `groups` and `draws` are needed just where the calibration had some (`fit_sets`).

        Raises:
            ValueError: other classes, groups or draws missing or not asked for, or as
                `calibration.check_probabilities`.
        """
        if probabilities.shape[1] != self.classes or (draws is not None) != self.randomised:
            raise ValueError(
                f"these sets take {self.classes} classes and {'a draw for each row' if self.randomised else 'no draws'}"
            )
        limits = self.thresholds.of_rows(len(probabilities), groups)
        members = _scores(self.score, probabilities, draws) <= limits[:, None] + ROUNDING
        return PredictedSets(members=members, uncalibrated=np.isinf(limits), lacking=_lacking(limits, groups))

    def arrays(self) -> dict[str, np.ndarray]:
        """As they rest on disk."""
        facts = {"classes": np.array(self.classes), "randomised": np.array(self.randomised)}
        return self.thresholds.arrays() | facts | {"score": as_bytes(self.score)}

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> ConformalSets:
        """Read what `arrays` gave.

        Raises:
            ValueError: an array is missing, or they do not fit together.
        """
        classes, randomised, score = read_arrays(arrays, "classes", "randomised", "score")
        thresholds = Thresholds.of(arrays)
        known: Any = from_bytes(score)
        return cls(score=known, classes=int(classes), randomised=bool(randomised), thresholds=thresholds)


@dataclass(frozen=True, kw_only=True, slots=True)
class ConformalIntervals:
    """Puts an interval around a predicted number."""

    scaled: bool
    """Whether each prediction brings a spread of its own, by which its interval is wider or narrower."""
    thresholds: Thresholds

    def apply(
        self,
        predicted: Float[np.ndarray, "row"],
        *,
        groups: Sequence[str] = (),
        spread: Float[np.ndarray, "row"] | None = None,
    ) -> PredictedIntervals:
        """The interval of each row. `groups` and `spread` are needed just where the calibration had some.

        Raises:
            ValueError: groups or spread missing or not asked for, NaN, or a spread that is not positive.
        """
        if (spread is not None) != self.scaled:
            raise ValueError(f"these intervals take {'a spread for each row' if self.scaled else 'no spread'}")
        limits = self.thresholds.of_rows(len(predicted), groups)
        half = limits * _spread_of(predicted, spread)
        return PredictedIntervals(low=predicted - half, high=predicted + half, lacking=_lacking(limits, groups))

    def arrays(self) -> dict[str, np.ndarray]:
        """As they rest on disk."""
        return self.thresholds.arrays() | {"scaled": np.array(self.scaled)}

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> ConformalIntervals:
        """Read what `arrays` gave.

        Raises:
            ValueError: an array is missing, or they do not fit together.
        """
        (scaled,) = read_arrays(arrays, "scaled")
        return cls(scaled=bool(scaled), thresholds=Thresholds.of(arrays))


def fit_sets(
    probabilities: Float[np.ndarray, "row classes"],
    truth: Int[np.ndarray, "row"],
    *,
    score: Score = "lac",
    level: float = 0.9,
    groups: Sequence[str] = (),
    draws: Float[np.ndarray, "row"] | None = None,
) -> ConformalSets:
    """Find how much a set must hold so that it holds the truth for a share `level` of new subjects.

    Args:
        probabilities: Of the calibration subjects, one row each.
        truth: Number of the true class.
        score: `lac` is Sadinle, Lei and Wasserman 2019, section 2; `aps` Romano, Sesia and Candès 2020, section 2.
        level: Share of new subjects, 0.9 for nine of ten.
        groups: Of each row, if each group is to have its own threshold.
        draws: For `aps`, a number from [0, 1) for each row, drawn by `numpy.random.default_rng(seed).random(rows)`;
            without them nothing is random, and sets are a little larger.

    Raises:
        ValueError: too few subjects for the level (in all groups, if there are some), not one label, group or draw for
            each row, draws for `lac`, or as `calibration.check_probabilities`.
    """
    rows = check_probabilities(probabilities)
    strange = _scores(score, rows, draws)[np.arange(len(rows)), check_labels(truth, rows)]
    thresholds = fit_thresholds(strange, level=level, groups=groups)
    return ConformalSets(score=score, classes=rows.shape[1], randomised=draws is not None, thresholds=thresholds)


def fit_intervals(
    predicted: Float[np.ndarray, "row"],
    truth: Float[np.ndarray, "row"],
    *,
    level: float = 0.9,
    groups: Sequence[str] = (),
    spread: Float[np.ndarray, "row"] | None = None,
) -> ConformalIntervals:
    """Find how wide an interval must be so that it holds the truth for a share `level` of new subjects.

    Lei et al. 2018, section 2.2; with a `spread` for each prediction, in any unit that is used again for new subjects,
    section 5.2 (locally weighted).

    Raises:
        ValueError: too few subjects for the level (in all groups, if there are some), not one truth, group or spread
            for each row, NaN, or a spread that is not positive.
    """
    if len(predicted) != len(truth) or not np.isfinite(truth).all():
        raise ValueError(f"every row needs a finite truth, got {len(truth)} for {len(predicted)} rows")
    strange = np.abs(truth.astype(np.float64) - predicted) / _spread_of(predicted, spread)
    return ConformalIntervals(scaled=spread is not None, thresholds=fit_thresholds(strange, level=level, groups=groups))


def _scores(
    score: Score, probabilities: Float[np.ndarray, "row classes"], draws: Float[np.ndarray, "row"] | None
) -> Float[np.ndarray, "row classes"]:
    """How strange each class would be as the truth."""
    rows = check_probabilities(probabilities)
    if score == "lac":
        if draws is not None:
            raise ValueError("lac takes no draws: nothing in it is random")
        return 1 - rows
    if draws is not None and (len(draws) != len(rows) or not ((draws >= 0) & (draws <= 1)).all()):
        raise ValueError(f"every row needs a draw from [0, 1), got {len(draws)} for {len(rows)} rows")
    # Mass of the classes that are more probable, and a random part of the class's own.
    order = np.argsort(-rows, axis=1, kind="stable")
    sorted_rows = np.take_along_axis(rows, order, axis=1)
    above = np.zeros_like(rows)
    np.put_along_axis(above, order, np.cumsum(sorted_rows, axis=1) - sorted_rows, axis=1)
    return above if draws is None else above + draws[:, None] * rows


def _spread_of(
    predicted: Float[np.ndarray, "row"], spread: Float[np.ndarray, "row"] | None
) -> Float[np.ndarray, "row"]:
    known = np.ones(len(predicted)) if spread is None else spread.astype(np.float64)
    if not np.isfinite(predicted).all() or len(known) != len(predicted) or not ((known > 0) & (known < math.inf)).all():
        raise ValueError(f"every one of {len(predicted)} predictions is finite, its spread positive and finite")
    return known


def _lacking(limits: Float[np.ndarray, "row"], groups: Sequence[str]) -> tuple[str, ...]:
    return tuple(sorted({name for name, limit in zip(groups, limits.tolist(), strict=False) if limit == math.inf}))
