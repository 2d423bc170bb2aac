"""How well predicted numbers agree with true ones: side by side, and as differences (Bland and Altman 1986)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from voxelstem.metrics import Interval
from voxelstem.report.figures import INK, Picture, blank, to_png
from voxelstem.report.marks import BAND, Mark, marks_of, plain_axes, written
from voxelstem.report.sweeps import interval_of

NORMAL_95 = 1.959964
"""95 % of a normal distribution lie within so many standard deviations."""
MARGIN = 0.06
"""Of the range, beyond the outermost points."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Estimated:
    """A contestant's number for each held-out subject, and the true one, in one unit."""

    name: str
    truth: Float[np.ndarray, "subject"]
    predicted: Float[np.ndarray, "subject repeat"]

    def __post_init__(self) -> None:
        """Guard the shapes and numbers.

        Raises:
            ValueError: nobody, no repeat, not one truth for each row, or what is no number.
        """
        if self.predicted.ndim != 2 or len(self.truth) != len(self.predicted) or not self.predicted.size:  # noqa: PLR2004
            raise ValueError(f"predictions must be (subject, repeat) with a truth each, got {self.predicted.shape}")
        if not (np.isfinite(self.truth).all() and np.isfinite(self.predicted).all()):
            raise ValueError(f"the numbers of '{self.name}' hold what is no finite number")

    @classmethod
    def of(cls, name: str, by_subject: Mapping[str, Sequence[tuple[float, float]]]) -> Estimated:
        """Take each subject's true and predicted number of every repeat, subjects in the order of the tables.

        Raises:
            ValueError: as above, or repeats that do not agree on the truth.
        """
        rows = [by_subject[subject] for subject in sorted(by_subject)]
        if any(len({truth for truth, _ in row}) != 1 or len(row) != len(rows[0]) for row in rows):
            raise ValueError("all subjects need as many repeats, and a subject one truth in all of them")
        return cls(
            name=name,
            truth=np.array([row[0][0] for row in rows], dtype=np.float64),
            predicted=np.array([[said for _, said in row] for row in rows], dtype=np.float64),
        )

    @property
    def differences(self) -> Float[np.ndarray, "subject repeat"]:
        """Predicted minus true."""
        return self.predicted - self.truth[:, None]

    @property
    def means(self) -> Float[np.ndarray, "subject repeat"]:
        """Of predicted and true."""
        return (self.predicted + self.truth[:, None]) / 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Where differences lie; NaN limits where one subject has no spread. Intervals are over subjects."""

    bias: Interval
    """Mean of predicted minus true."""
    low: Interval
    high: Interval
    """Limits of agreement: the bias, 1.96 standard deviations of the differences down and up."""


def limits_of_agreement(estimated: Estimated) -> Limits:
    """Bias and 95 % limits of agreement (Bland and Altman 1986), each with a bootstrap interval over subjects.

    Several repeats: the mean of their biases, and the root mean square of their standard deviations. Means of several
    predictions would agree better than any of them does.
    """
    gaps = estimated.differences

    def bias(counts: np.ndarray) -> np.ndarray:
        return (counts @ gaps / counts.sum(axis=1, keepdims=True)).mean(axis=1)

    # About their mean, so that large numbers do not lose the digits of their small differences.
    inside = gaps - gaps.mean(axis=0)

    def spread(counts: np.ndarray) -> np.ndarray:
        total = counts.sum(axis=1, keepdims=True)
        squares = np.maximum(counts @ inside**2 - (counts @ inside) ** 2 / total, 0.0)
        return np.sqrt((squares / np.where(total > 1, total - 1, np.nan)).mean(axis=1))

    def limit(side: int) -> Interval:
        return interval_of(len(gaps), lambda counts: bias(counts) + side * NORMAL_95 * spread(counts))

    return Limits(bias=interval_of(len(gaps), bias), low=limit(-1), high=limit(1))


def agreement_picture(contestants: Sequence[Estimated], *, about: str, unit: str) -> Picture:
    """A row for each contestant: predicted against true, and their difference against their mean.

    Args:
        contestants: The run first, then what it must beat; at most five.
        about: What the number is.
        unit: Of the number; the label file's own.

    Raises:
        ValueError: contestants of different subjects, or too many of them.
    """
    marks = marks_of([one.name for one in contestants])
    if any(not np.array_equal(one.truth, contestants[0].truth) for one in contestants):
        raise ValueError("contestants of one picture must have been asked about the same subjects")
    limits = [limits_of_agreement(one) for one in contestants]
    figure = blank(6.4, 3.1 * len(contestants))
    numbers = np.concatenate([contestants[0].truth, *(one.predicted.ravel() for one in contestants)])
    ends = _ends(numbers)
    drawn = [one.differences.ravel() for one in contestants]
    outer = [np.array([value.estimate for value in (one.low, one.high)]) for one in limits]
    gaps = _ends(np.concatenate([*drawn, *(one[np.isfinite(one)] for one in outer)]))
    for row, (one, limit) in enumerate(zip(contestants, limits, strict=True)):
        sides = [figure.add_subplot(len(contestants), 2, 2 * row + column) for column in (1, 2)]
        last = row == len(contestants) - 1
        _beside(sides[0], one, marks[one.name], ends, unit if last else "")
        _apart(sides[1], one, limit, marks[one.name], ends=ends, gaps=gaps, unit=unit if last else "")
    said = "; ".join(f"{one.name}: {_in_words(limit, unit)}" for one, limit in zip(contestants, limits, strict=True))
    people = len(contestants[0].truth)
    several = any(one.predicted.shape[1] > 1 for one in contestants)
    return Picture(
        png=to_png(figure),
        alt=f"Predicted against true {about} of {people} held-out subjects, and their differences. {said}",
        caption=f"Left: predicted against true {about}; on the dotted line both are equal. Right: predicted minus true "
        "against the mean of both (Bland and Altman). Solid line: bias; dashed lines: limits of agreement, bias "
        "± 1.96 standard deviations, between which about 95 % of single subjects fall if differences spread alike over "
        "the range. Bands: 95 % bootstrap intervals of these three lines over subjects. A slope of the points on the "
        "right means that extremes are drawn towards the mean."
        + (" Contestants with several seeds show a point for each seed." if several else ""),
    )


def _beside(axes: Any, one: Estimated, mark: Mark, ends: tuple[float, float], unit: str) -> None:
    error = float(np.abs(one.differences).mean())
    plain_axes(
        axes,
        across=f"true ({unit})" if unit else "",
        up="predicted",
        title=f"{written(one.name)}\nmean absolute error {error:.3g}",
    )
    axes.plot(ends, ends, color=INK, lw=0.9, ls=(0, (1, 2)))
    _dots(axes, np.repeat(one.truth, one.predicted.shape[1]), one.predicted.ravel(), mark)
    axes.set_xlim(*ends)
    axes.set_ylim(*ends)


def _apart(
    axes: Any,
    one: Estimated,
    limits: Limits,
    mark: Mark,
    *,
    ends: tuple[float, float],
    gaps: tuple[float, float],
    unit: str,
) -> None:
    across = f"mean of predicted and true ({unit})" if unit else ""
    title = f"bias {_figure(limits.bias)}\nlimits {limits.low.estimate:+.3g} to {limits.high.estimate:+.3g}"
    plain_axes(axes, across=across, up="predicted - true", title=title)
    axes.axhline(0, color=INK, lw=0.9, ls=(0, (1, 2)))
    for value, line in ((limits.bias, "-"), (limits.low, "--"), (limits.high, "--")):
        if np.isfinite(value.estimate):
            axes.axhline(value.estimate, color=mark.colour, lw=1.4, ls=line)
        if value.low is not None and value.high is not None:
            axes.axhspan(value.low, value.high, color=mark.colour, alpha=BAND, lw=0)
    _dots(axes, one.means.ravel(), one.differences.ravel(), mark)
    axes.set_xlim(*ends)
    axes.set_ylim(*gaps)


def _dots(axes: Any, across: np.ndarray, up: np.ndarray, mark: Mark) -> None:
    # Many points must leave room to see that they are many.
    opacity = float(np.clip(20 / np.sqrt(len(across)) / 3, 0.25, 0.85))
    axes.scatter(across, up, s=16, color=mark.colour, marker=mark.marker, alpha=opacity, linewidths=0)


def _ends(values: Float[np.ndarray, "number"]) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    spare = MARGIN * (high - low) or max(abs(high), 1.0) * MARGIN
    return low - spare, high + spare


def _in_words(limits: Limits, unit: str) -> str:
    of = f" {unit}" if unit else ""
    return f"bias {_figure(limits.bias)}{of}, limits of agreement {_figure(limits.low)} to {_figure(limits.high)}{of}"


def _figure(value: Interval) -> str:
    if value.low is None or value.high is None:
        return f"{value.estimate:+.3g} ({value.note})"
    return f"{value.estimate:+.3g} [{value.low:+.3g}, {value.high:+.3g}]"
