"""Do stated probabilities come true? Calibration errors, Brier score, slope and reliability, pure numpy.

One row is one subject: average a person's scans first, or intervals pretend to more people than there were. Functions
called `counted_*` measure many resampled draws at once, in each of which a row stands `counts` times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from voxelstem import metrics
from voxelstem.metrics import Interval

Binning = Literal["width", "mass"]
"""Parts of [0, 1] of one width, or parts that hold as many rows each."""
Kind = Literal["ece", "adaptive_ece", "brier", "slope", "in_the_large"]

SMALLEST = 1e-12
"""A probability is taken for no smaller than this where its logarithm is needed, nor for nearer to one."""
SUM_TOLERANCE = 1e-3
"""Probabilities in 16 bits add up to one no more exactly."""
_STEPS = 100
"""Newton's method takes about eight; what has not settled by then has no answer."""


@runtime_checkable
class Guessed(Protocol):
    """What a task says of a subject: `tasks.classify.Guess` has it."""

    @property
    def truth(self) -> int:
        """Number of the true class."""
        ...

    @property
    def scores(self) -> tuple[float, ...]:
        """Probability of each class."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Recalibration:
    """The line on which stated log-odds become true ones; a perfect forecast has slope 1 and intercept 0."""

    slope: float
    """Below 1: too sure of itself. NaN where it is infinite (a threshold parts the classes) or there is one class."""
    intercept: float
    """Of the same line, so for stated log-odds of 0."""
    in_the_large: float
    """The intercept with the slope held at 1: above 0 if things come true more often than was stated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReliabilityBin:
    """Rows of similar stated probability, and how often they came true."""

    low: float
    high: float
    """Edges of a bin of one width; smallest and largest probability in a bin of as many rows as the others."""
    rows: int
    mean_chance: float
    came_true: Interval
    """Share of the rows, with Wilson's interval."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationFigure(metrics.Counted):
    """A figure of calibration over subjects, for `metrics.bootstrap_interval` and `metrics.paired_difference`.

    Of two classes it is measured on the probability of class 1; of more, on that of the most probable class and
    whether it was true. `brier` of more than two classes sums over all of them.
    """

    kind: Kind
    """`ece` and `adaptive_ece` are `calibration_error`'s, `slope` and `in_the_large` those of `recalibration`."""
    bins: int = 10

    def __post_init__(self) -> None:
        """Guard the number of bins.

        Raises:
            ValueError: no bin.
        """
        _check_bins(self.bins)

    def counted(self, outcomes: Sequence[Guessed], counts: Float[np.ndarray, "draw row"]) -> Float[np.ndarray, "draw"]:
        """Compute the figure of each draw, in which a guess stands `counts` times; NaN or 0/0 where none stands.

        Raises:
            ValueError: scores that are no probabilities.
        """
        scores = check_probabilities(np.array([guess.scores for guess in outcomes], dtype=np.float64))
        truth = check_labels(np.array([guess.truth for guess in outcomes]), scores)
        if self.kind == "brier" and scores.shape[1] > 2:  # noqa: PLR2004 - yes and no
            return counts @ ((scores - np.eye(scores.shape[1])[truth]) ** 2).sum(axis=1) / counts.sum(axis=1)
        there, chance = truth == 1, scores[:, 1]
        if scores.shape[1] > 2:  # noqa: PLR2004
            there, chance = truth == scores.argmax(axis=1), scores.max(axis=1)
        match self.kind:
            case "ece":
                return metrics.counted_calibration_error(counts, there, chance, bins=self.bins)
            case "adaptive_ece":
                return counted_adaptive_error(counts, there, chance, bins=self.bins)
            case "brier":
                return counts @ (chance - there) ** 2 / counts.sum(axis=1)
            case "slope":
                return counted_recalibration(counts, there, chance)[:, 1]
            case "in_the_large":
                return counted_in_the_large(counts, there, chance)


def calibration_error(
    truth: Bool[np.ndarray, "row"], chance: Float[np.ndarray, "row"], *, bins: int = 10, binning: Binning = "width"
) -> float:
    """How far a stated probability is from how often it comes true, on average over rows.

    Guo et al. 2017, section 2, for bins of one width; Nguyen and O'Connor 2015, section 4, for bins that hold as many
    rows each (rows of one probability are never parted). It shrinks with fewer bins and grows with fewer rows: compare
    only what was measured alike.

    Raises:
        ValueError: no rows, not one truth for each, what is no probability, or no bin.
    """
    chance = check_chances(chance, truth)
    _check_bins(bins)
    counts = np.ones((1, len(truth)))
    measure = metrics.counted_calibration_error if binning == "width" else counted_adaptive_error
    return float(measure(counts, truth, chance, bins=bins)[0])


def counted_adaptive_error(
    counts: Float[np.ndarray, "draw row"],
    truth: Bool[np.ndarray, "row"],
    chance: Float[np.ndarray, "row"],
    *,
    bins: int,
) -> Float[np.ndarray, "draw"]:
    """`calibration_error` in bins of equal mass, in each draw; NaN without rows."""
    if len(chance) == 0:
        return np.full(len(counts), math.nan)
    order = np.argsort(chance, kind="stable")
    values, starts = np.unique(chance[order], return_index=True)
    rows = np.add.reduceat(counts[:, order], starts, axis=1)
    hits = np.add.reduceat((counts * truth)[:, order], starts, axis=1)
    places, surplus = _mass_bins(rows, bins), hits - rows * values
    gaps = sum(np.abs((surplus * (places == part)).sum(axis=1)) for part in range(bins))
    total = rows.sum(axis=1)
    return np.where(total > 0, gaps / np.maximum(total, SMALLEST), math.nan)


def brier_score(truth: Bool[np.ndarray, "row"], chance: Float[np.ndarray, "row"]) -> float:
    """Mean square of stated probability minus what was true, 0 to 1: Brier 1950, halved as is usual for yes or no.

    Raises:
        ValueError: no rows, not one truth for each, or what is no probability.
    """
    return float(np.mean((check_chances(chance, truth) - truth) ** 2))


def multiclass_brier_score(truth: Int[np.ndarray, "row"], probabilities: Float[np.ndarray, "row classes"]) -> float:
    """Squared distance of the probabilities from the true class, summed over classes, 0 to 2 (Brier 1950).

    Raises:
        ValueError: as `check_probabilities` and `check_labels`.
    """
    rows = check_probabilities(probabilities)
    return float(((rows - np.eye(rows.shape[1])[check_labels(truth, rows)]) ** 2).sum(axis=1).mean())


def recalibration(truth: Bool[np.ndarray, "row"], chance: Float[np.ndarray, "row"]) -> Recalibration:
    """Calibration slope and intercept: a logistic regression of what was true on stated log-odds (Cox 1958).

    `in_the_large` has the log-odds as an offset instead (Steyerberg 2019, chapter 15). Probabilities of 0 and 1 are
    taken for `SMALLEST` and 1 - `SMALLEST`.

    Raises:
        ValueError: no rows, not one truth for each, or what is no probability.
    """
    chance, counts = check_chances(chance, truth), np.ones((1, len(truth)))
    intercept, slope = counted_recalibration(counts, truth, chance)[0].tolist()
    in_the_large = float(counted_in_the_large(counts, truth, chance)[0])
    return Recalibration(slope=slope, intercept=intercept, in_the_large=in_the_large)


def counted_recalibration(
    counts: Float[np.ndarray, "draw row"], truth: Bool[np.ndarray, "row"], chance: Float[np.ndarray, "row"]
) -> Float[np.ndarray, "draw 2"]:
    """Intercept and slope of `recalibration` in each draw; NaN where the likelihood has no finite maximum.

    With one predictor it has one just where each class reaches beyond the other (Albert and Anderson 1984).
    """
    odds = log_odds(chance)
    there, gone = (counts > 0) & truth, (counts > 0) & ~truth
    lowest = [np.where(rows, odds, math.inf).min(axis=1, initial=math.inf) for rows in (there, gone)]
    highest = [np.where(rows, odds, -math.inf).max(axis=1, initial=-math.inf) for rows in (there, gone)]
    overlap = (highest[0] > lowest[1]) & (highest[1] > lowest[0])
    found = np.full((len(counts), 2), math.nan)
    if overlap.any():
        # Standardised, so that one step fits all sizes of log-odds.
        middle, spread = odds.mean(), odds.std()
        columns = np.stack([np.ones(len(odds)), (odds - middle) / spread], axis=1)
        line = _logistic(counts[overlap], truth, columns, np.zeros(len(odds)))
        found[overlap] = np.stack([line[:, 0] - line[:, 1] * middle / spread, line[:, 1] / spread], axis=1)
    return found


def counted_in_the_large(
    counts: Float[np.ndarray, "draw row"], truth: Bool[np.ndarray, "row"], chance: Float[np.ndarray, "row"]
) -> Float[np.ndarray, "draw"]:
    """`recalibration`'s `in_the_large` in each draw; NaN where only one class is."""
    both = (counts @ truth > 0) & (counts @ ~truth > 0)
    found = np.full(len(counts), math.nan)
    if both.any():
        found[both] = _logistic(counts[both], truth, np.ones((len(truth), 1)), log_odds(chance))[:, 0]
    return found


def reliability_curve(
    truth: Bool[np.ndarray, "row"],
    chance: Float[np.ndarray, "row"],
    *,
    bins: int = 10,
    binning: Binning = "width",
    level: float = 0.95,
) -> tuple[ReliabilityBin, ...]:
    """How often each stated probability came true, from the smallest to the largest; bins without rows are left out.

    The bins are those of `calibration_error`. One row is one subject: Wilson's interval takes them for independent.

    Raises:
        ValueError: no rows, not one truth for each, what is no probability, no bin, or a level outside (0, 1).
    """
    chance = check_chances(chance, truth)
    _check_bins(bins)
    if binning == "width":
        places = np.minimum((chance * bins).astype(np.int64), bins - 1)
    else:
        _, of, rows = np.unique(chance, return_inverse=True, return_counts=True)
        places = _mass_bins(rows[None].astype(np.float64), bins)[0][of]
    curve: list[ReliabilityBin] = []
    for part in np.unique(places).tolist():
        inside = places == part
        stated, rows = chance[inside], int(inside.sum())
        low, high = (part / bins, (part + 1) / bins) if binning == "width" else (stated.min(), stated.max())
        share = wilson_interval(float(truth[inside].mean()), rows, level=level)
        mean = float(stated.mean())
        curve.append(ReliabilityBin(low=float(low), high=float(high), rows=rows, mean_chance=mean, came_true=share))
    return tuple(curve)


def wilson_interval(share: float, subjects: int, *, level: float = 0.95) -> Interval:
    """Interval of a share of independent subjects (Wilson 1927): right for few, and for all or none of them.

    `share` may be a mean of shares within subjects, of each one's scans say: such numbers vary less than yes or no does
    around the same mean, so the interval is then rather too wide.

    Raises:
        ValueError: no subject, a share outside [0, 1], or a level outside (0, 1).
    """
    if subjects < 1 or not 0 <= share <= 1 or not 0 < level < 1:
        raise ValueError(
            f"a share needs a subject, lies in [0, 1], and its level in (0, 1): got {subjects}, {share} and {level}"
        )
    squared = NormalDist().inv_cdf((1 + level) / 2) ** 2
    middle = (share + squared / (2 * subjects)) / (1 + squared / subjects)
    variance = share * (1 - share) / subjects + squared / (4 * subjects**2)
    half = math.sqrt(squared * variance) / (1 + squared / subjects)
    # The ends are 0 and 1 themselves for none and all, and a rounding beside them otherwise.
    low = 0.0 if share == 0 else max(0.0, middle - half)
    high = 1.0 if share == 1 else min(1.0, middle + half)
    return Interval(estimate=share, low=low, high=high, subjects=subjects, level=level)


def log_odds(chance: Float[np.ndarray, "row"]) -> Float[np.ndarray, "row"]:
    """log(p / (1 - p)) in 64 bits, finite for 0 and 1 too (see `SMALLEST`)."""
    inside = np.clip(chance.astype(np.float64), SMALLEST, 1 - SMALLEST)
    return np.log(inside) - np.log1p(-inside)


def check_chances(chance: Float[np.ndarray, "row"], truth: Bool[np.ndarray, "any"]) -> Float[np.ndarray, "row"]:
    """Return the probabilities of a yes in 64 bits.

    Raises:
        ValueError: no rows, not one truth for each, NaN, or a number outside [0, 1].
    """
    if len(chance) == 0 or len(chance) != len(truth):
        raise ValueError(f"every row needs a probability and a truth, got {len(chance)} and {len(truth)}")
    _check_range(chance[:, None])
    return chance.astype(np.float64)


def check_probabilities(probabilities: Float[np.ndarray, "row classes"]) -> Float[np.ndarray, "row classes"]:
    """Return the probabilities in 64 bits, each row brought to a sum of exactly one.

    Raises:
        ValueError: no rows, fewer than two classes, NaN, a number outside [0, 1], or a row that does not add up to one
            (within `SUM_TOLERANCE`).
    """
    if len(probabilities) == 0 or probabilities.shape[1] < 2:  # noqa: PLR2004
        raise ValueError(f"there must be a row and two classes at least, got {probabilities.shape}")
    _check_range(probabilities)
    rows = probabilities.astype(np.float64)
    sums = rows.sum(axis=1, keepdims=True)
    odd = np.flatnonzero(np.abs(sums[:, 0] - 1) > SUM_TOLERANCE)
    if odd.size:
        raise ValueError(
            f"probabilities of a row must add up to 1, {odd.size} of {len(rows)} rows do not; the first, row {odd[0]}, "
            f"adds up to {sums[odd[0], 0]:.4f}: logits need a softmax first, and chances that do not exclude one "
            "another are calibrated one by one"
        )
    return rows / sums


def check_labels(
    truth: Int[np.ndarray, "any"], rows_of_classes: Shaped[np.ndarray, "row classes"]
) -> Int[np.ndarray, "any"]:
    """Return the numbers of the true classes, one for each row of what has a column for each class.

    Raises:
        ValueError: not one for each row, or a number that is no class.
    """
    rows, classes = rows_of_classes.shape
    if len(truth) != rows or not ((truth >= 0) & (truth < classes)).all():
        raise ValueError(f"{rows} rows of {classes} classes need as many labels from 0 to {classes - 1}")
    return truth


def _check_range(rows: Float[np.ndarray, "row column"]) -> None:
    odd = np.flatnonzero(~((rows >= 0) & (rows <= 1)).all(axis=1))
    if odd.size:
        raise ValueError(
            f"a probability lies in [0, 1], {odd.size} of {len(rows)} rows do not; the first, row {odd[0]}, is "
            f"{rows[odd[0]].tolist()}"
        )


def _check_bins(bins: int) -> None:
    if bins < 1:
        raise ValueError(f"there must be a bin at least, got {bins}")


def _mass_bins(rows: Float[np.ndarray, "draw value"], bins: int) -> Int[np.ndarray, "draw value"]:
    """Bin of each value where `rows` counts how often it occurs, values rising: by the middle one of its rows."""
    last = rows.cumsum(axis=1)
    total = np.maximum(last[:, -1:], 1)
    return np.minimum(bins * (2 * last - rows) / (2 * total), bins - 1).astype(np.int64)


def _logistic(
    counts: Float[np.ndarray, "draw row"],
    truth: Bool[np.ndarray, "row"],
    columns: Float[np.ndarray, "row column"],
    offset: Float[np.ndarray, "row"],
) -> Float[np.ndarray, "draw column"]:
    """Logistic regression of each draw by Newton's method, a step being halved until it leads down; NaN if it fails."""
    sign = np.where(truth, 1.0, -1.0)
    products = (columns[:, :, None] * columns[:, None, :]).reshape(len(columns), -1)
    width = columns.shape[1]

    def loss(at: Float[np.ndarray, "draw column"]) -> Float[np.ndarray, "draw"]:
        return (counts * np.logaddexp(0.0, -sign * (at @ columns.T + offset))).sum(axis=1)

    found, settled = np.zeros((len(counts), width)), np.zeros(len(counts), dtype=np.bool_)
    height = loss(found)
    for _ in range(_STEPS):
        chance = 0.5 * (1 + np.tanh((found @ columns.T + offset) / 2))
        slope = (counts * (chance - truth)) @ columns
        bend = ((counts * chance * (1 - chance)) @ products).reshape(-1, width, width) + SMALLEST * np.eye(width)
        step = np.linalg.solve(bend, slope[:, :, None])[:, :, 0]
        while (worse := loss(found - step) > height + SMALLEST * (1 + np.abs(height))).any():
            step[worse] /= 2
        found = found - step
        height, settled = loss(found), np.abs(step).max(axis=1) < 1e-9 * (1 + np.abs(found).max(axis=1))
        if settled.all():
            break
    return np.where(settled[:, None], found, math.nan)
