"""Scores and their uncertainty, pure numpy. Intervals always resample subjects, never rows."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

Value = TypeVar("Value")
Statistic = Callable[[Sequence[Value]], float]
"""What is measured over subjects: gets one value for each (resampled) subject; NaN means undefined."""

FEWEST_SUBJECTS = 3
"""Below this number of subjects no interval is given."""
FEW_SUBJECTS = 10
"""Below this number an interval is given and called rough."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A figure with its subject-level bootstrap interval. `low` and `high` are None where none can be given."""

    estimate: float
    low: float | None
    high: float | None
    subjects: int
    level: float = 0.95
    note: str = ""

    def __str__(self) -> str:
        """`0.712 [0.655, 0.770]`, or the figure and why it has no interval."""
        if self.low is None or self.high is None:
            return f"{self.estimate:.3f} ({self.note})"
        return f"{self.estimate:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """A line of a results table: one contestant, one metric, the held-out subjects."""

    name: str
    """`scratch`, `intensity`, `atlas`, `majority`, or the name of a run."""
    task: str
    mode: str
    metric: str
    budget: int | None
    """Labelled subjects; None means all there were."""
    labelled: int
    """How many these were in fact."""
    repeats: int
    """Seeds or draws of labels over which every subject's figure is averaged."""
    value: Interval
    over_scratch: Interval | None = None
    """Paired difference to the same network untrained; None for that network itself."""
    over_intensity: Interval | None = None
    """Paired difference to intensity features; None for these themselves."""
    parts: Mapping[str, Interval] = field(default_factory=dict)
    """The same figure for each organ."""
    each: tuple[float, ...] = ()
    """Every subject's own figure, given only where they are too few for an interval."""


def mean(values: Sequence[float]) -> float:
    """Average of the values that are defined; NaN if none is."""
    defined = [value for value in values if not math.isnan(value)]
    return float(np.mean(defined)) if defined else math.nan


@dataclass(frozen=True, slots=True)
class Counted(ABC):
    """A statistic that is computed for all draws of a bootstrap at once, of how often each subject was drawn."""

    repeated: bool = field(default=False, kw_only=True)
    """Each subject holds a sequence of repeats: the figure is taken within every repeat, then averaged over them."""

    def __call__(self, sample: Sequence[Any]) -> float:
        """Compute the figure of everybody, each once; NaN without subjects."""
        return float(self.of_draws(sample, np.ones((1, len(sample))))[0]) if sample else math.nan

    def of_draws(self, sample: Sequence[Any], counts: Float[np.ndarray, "draw subject"]) -> Float[np.ndarray, "draw"]:
        """Compute the figure of each draw, averaged over the repeats in which it is defined."""
        return defined_mean(self.by_repeat(sample, counts), 1)

    def by_repeat(
        self, sample: Sequence[Any], counts: Float[np.ndarray, "draw subject"]
    ) -> Float[np.ndarray, "draw repeat"]:
        """Compute the figure of each repeat in each draw."""
        repeats = list(zip(*sample, strict=True)) if self.repeated else [sample]
        return np.stack([self.counted(outcomes, counts) for outcomes in repeats], axis=1)

    @abstractmethod
    def counted(self, outcomes: Sequence[Any], counts: Float[np.ndarray, "draw subject"]) -> Float[np.ndarray, "draw"]:
        """Compute the figure of one outcome for each subject, each of whom stands `counts` times in a draw."""


@dataclass(frozen=True, slots=True)
class MeanOf(Counted):
    """The mean of a value of each subject, of those that are defined."""

    each: Callable[[Any], float]

    def counted(self, outcomes: Sequence[Any], counts: Float[np.ndarray, "draw subject"]) -> Float[np.ndarray, "draw"]:
        """Compute the mean in each draw."""
        values = np.array([self.each(outcome) for outcome in outcomes], dtype=np.float64)
        defined = ~np.isnan(values)
        return _share(counts @ np.where(defined, values, 0.0), counts @ defined)


MEAN = MeanOf(float)
"""The mean of plain numbers, one for each subject."""


def balanced_accuracy(truth: Shaped[np.ndarray, "row"], predicted: Shaped[np.ndarray, "row"]) -> float:
    """Mean recall over the classes that occur in the truth; NaN if fewer than two occur."""
    return float(counted_balance(np.ones((1, len(truth))), truth, predicted)[0])


def auroc(truth: Bool[np.ndarray, "row"], score: Float[np.ndarray, "row"]) -> float:
    """Chance that a positive row scores above a negative one, ties count half; NaN if one kind is missing.

    Hanley & McNeil 1982: the Mann-Whitney U statistic divided by the number of pairs.
    """
    return float(counted_auroc(np.ones((1, len(truth))), truth, score)[0])


def counted_auroc(
    counts: Float[np.ndarray, "draw row"], truth: Bool[np.ndarray, "row"], score: Float[np.ndarray, "row"]
) -> Float[np.ndarray, "draw"]:
    """`auroc` of each draw in which a row stands `counts` times; work grows with rows, not with their pairs.

    Raises:
        ValueError: a score that is no number.
    """
    if np.isnan(score).any():
        raise ValueError("scores that are ranked must be numbers")
    if not len(score):
        return np.full(len(counts), math.nan)
    order = np.argsort(score, kind="stable")
    rising = score[order]
    levels = np.flatnonzero(np.append(True, rising[1:] != rising[:-1]))  # where a higher score begins
    there, gone = (np.add.reduceat((counts * of)[:, order], levels, axis=1) for of in (truth, ~truth))
    below = np.cumsum(gone, axis=1) - gone
    return _share((there * (below + gone / 2)).sum(axis=1), there.sum(axis=1) * gone.sum(axis=1))


def counted_macro_auroc(
    counts: Float[np.ndarray, "draw row"], truth: Int[np.ndarray, "row"], scores: Float[np.ndarray, "row classes"]
) -> Float[np.ndarray, "draw"]:
    """Mean one-against-the-rest AUROC over the classes for which it is defined, in each draw.

    With two classes this is the AUROC of class 1. NaN if fewer than two classes occur, as by `over_classes`.
    """
    if scores.shape[1] == 2:  # noqa: PLR2004 - the usual yes or no
        return counted_auroc(counts, truth == 1, scores[:, 1] - scores[:, 0])
    return over_classes(
        lambda few, label: counted_auroc(few, truth == label, scores[:, label]), range(scores.shape[1]), counts
    )


def counted_balance(
    counts: Float[np.ndarray, "draw row"], truth: Shaped[np.ndarray, "row"], predicted: Shaped[np.ndarray, "row"]
) -> Float[np.ndarray, "draw"]:
    """`balanced_accuracy` of each draw in which a row stands `counts` times; NaN where it leaves a class out."""
    kinds = [truth == kind for kind in np.unique(truth)]
    if len(kinds) < 2:  # noqa: PLR2004 - one class says nothing about telling classes apart
        return np.full(len(counts), math.nan)
    return np.mean([_share(counts @ (of & (predicted == truth)), counts @ of) for of in kinds], axis=0)


def counted_f1(
    counts: Float[np.ndarray, "draw row"], truth: Bool[np.ndarray, "row"], predicted: Bool[np.ndarray, "row"]
) -> Float[np.ndarray, "draw"]:
    """Harmonic mean of precision and recall of what is true, in each draw; NaN if nothing is (van Rijsbergen 1979)."""
    there, said = counts @ truth, counts @ predicted
    return np.where(there > 0, _share(2.0 * (counts @ (truth & predicted)), there + said), math.nan)


def counted_calibration_error(
    counts: Float[np.ndarray, "draw row"],
    truth: Bool[np.ndarray, "row"],
    chance: Float[np.ndarray, "row"],
    *,
    bins: int,
) -> Float[np.ndarray, "draw"]:
    """How far a stated chance is from how often it comes true, in each draw (Guo et al. 2017, section 2).

    Rows fall into `bins` equal parts of [0, 1]; each part's gap counts by its share of the rows. NaN without rows.
    """
    parts = np.eye(bins)[np.minimum((chance * bins).astype(np.int64), bins - 1)]
    gaps = counts @ (parts * (truth - chance)[:, None])
    return _share(np.abs(gaps).sum(axis=1), counts.sum(axis=1))


def averaged(statistic: Statistic[Any]) -> Statistic[Any]:
    """Turn a statistic of one value per subject into one of several repeats per subject.

    Each subject then holds a sequence of values, one for each repeat (another seed, another draw of
    labels); the statistic is computed within every repeat and averaged over them.
    """
    if isinstance(statistic, Counted):
        return dataclasses.replace(cast(Any, statistic), repeated=True)

    def over_repeats(sample: Sequence[Sequence[Any]]) -> float:
        repeats = len(sample[0]) if sample else 0
        return mean([statistic([values[repeat] for values in sample]) for repeat in range(repeats)])

    return over_repeats


def bootstrap_interval(
    by_subject: Mapping[str, Value],
    statistic: Statistic[Value] = MEAN,
    *,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap over subjects (Efron & Tibshirani 1993, chapter 13).

    Draws in which the statistic is undefined (a sample with one class only) are left out; if that
    happens in half of them or more, no interval is given. With fewer than three subjects none is
    given either, and `note` says so.

    Raises:
        ValueError: no subjects, a level outside (0, 1), or fewer than 100 draws.
    """
    sample = [by_subject[subject] for subject in sorted(by_subject)]
    return _percentiles(
        lambda counts: of_draws(statistic, sample, counts), len(sample), level=level, draws=draws, seed=seed
    )


def paired_difference(
    a_by_subject: Mapping[str, Any],
    b_by_subject: Mapping[str, Any],
    statistic: Statistic[Any] = MEAN,
    *,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Interval:
    """How much better `a` is than `b`: the same resampled subjects for both in every draw.

    Raises:
        ValueError: the two do not hold the same subjects, or as `bootstrap_interval`.
    """
    if set(a_by_subject) != set(b_by_subject):
        raise ValueError("a paired difference needs the same subjects on both sides")
    subjects = sorted(a_by_subject)
    a, b = ([side[subject] for subject in subjects] for side in (a_by_subject, b_by_subject))
    return _percentiles(
        lambda counts: of_draws(statistic, a, counts) - of_draws(statistic, b, counts),
        len(subjects),
        level=level,
        draws=draws,
        seed=seed,
    )


def effective_rank(rows: Float[np.ndarray, "row dim"]) -> float:
    """How many directions are really used: exp of the entropy of the normalised singular values.

    Roy and Vetterli 2007. Rows are centred first; 1 means that all rows lie on a line, `dim` that they fill space.
    """
    values = np.linalg.svd(rows.astype(np.float64) - rows.mean(axis=0, dtype=np.float64), compute_uv=False)
    share = values / max(float(values.sum()), 1e-12)
    return float(np.exp(-(share * np.log(np.maximum(share, 1e-12))).sum()))


def of_draws(
    statistic: Statistic[Any], sample: Sequence[Any], counts: Float[np.ndarray, "draw subject"]
) -> Float[np.ndarray, "draw"]:
    """Compute any statistic in each draw, in which a subject of the sample stands `counts` times."""
    if isinstance(statistic, Counted):
        return statistic.of_draws(sample, counts)
    rows = [np.repeat(np.arange(len(sample)), row.astype(np.int64)).tolist() for row in counts]
    return np.array([statistic([sample[index] for index in row]) for row in rows], dtype=np.float64)


def drawn(subjects: int, *, draws: int, seed: int | Sequence[int]) -> Float[np.ndarray, "draw subject"]:
    """How often each subject stands in each draw of a bootstrap: as many as there are, with replacement."""
    picks = np.random.default_rng(seed).integers(0, subjects, (draws, subjects))
    places = (picks + subjects * np.arange(draws)[:, None]).ravel()
    return np.bincount(places, minlength=draws * subjects).reshape(draws, subjects).astype(np.float64)


def _share(part: Float[np.ndarray, "draw"], whole: Float[np.ndarray, "draw"]) -> Float[np.ndarray, "draw"]:
    """`part` / `whole`; NaN where there is nothing."""
    return np.where(whole > 0, part / np.maximum(whole, 1e-300), math.nan)


def over_classes(
    figure: Callable[[Float[np.ndarray, "draw row"], Any], Float[np.ndarray, "draw"]],
    classes: Iterable[Any],
    counts: Float[np.ndarray, "draw row"],
) -> Float[np.ndarray, "draw"]:
    """Mean of a figure of each class, in each draw, over the classes for which it is defined where everybody counts.

    NaN where a draw leaves one of these undefined: the mean over the rest would be another figure, and the spread
    between the two no uncertainty of either.

    Args:
        figure: Takes counts and a class.
        classes: The classes.
        counts: How often each row stands in each draw.
    """
    whole = np.concatenate([np.ones((1, counts.shape[1])), counts])
    each = [values for values in (figure(whole, one) for one in classes) if not math.isnan(values[0])]
    return np.mean(each, axis=0)[1:] if each else np.full(len(counts), math.nan)


def defined_mean(values: Float[np.ndarray, "..."], axis: int) -> Float[np.ndarray, "..."]:
    """Mean along an axis over what is not NaN; NaN where nothing is."""
    defined = ~np.isnan(values)
    count = defined.sum(axis=axis)
    total = np.where(defined, values, 0.0).sum(axis=axis)
    return np.where(count > 0, total / np.maximum(count, 1), math.nan)


def _percentiles(
    measure: Callable[[Float[np.ndarray, "draw subject"]], Float[np.ndarray, "draw"]],
    count: int,
    *,
    level: float,
    draws: int,
    seed: int,
) -> Interval:
    if count == 0:
        raise ValueError("no subjects to resample")
    if not 0 < level < 1 or draws < 100:  # noqa: PLR2004 - fewer draws have no 2.5 % tail
        raise ValueError(f"level must lie in (0, 1) and draws be at least 100, got {level} and {draws}")
    estimate = float(measure(np.ones((1, count)))[0])

    def without(note: str) -> Interval:
        return Interval(estimate=estimate, low=None, high=None, subjects=count, level=level, note=note)

    if count < FEWEST_SUBJECTS:
        return without(f"n={count}, no interval")
    values = measure(drawn(count, draws=draws, seed=seed))
    defined = values[~np.isnan(values)]
    if len(defined) <= draws / 2:
        return without("undefined in most resamples, no interval")
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    note = f"n={count}: rough interval" if count < FEW_SUBJECTS else ""
    return Interval(estimate=estimate, low=float(low), high=float(high), subjects=count, level=level, note=note)
