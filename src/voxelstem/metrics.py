"""Scores and their uncertainty, pure numpy. Intervals always resample subjects, never rows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

Value = TypeVar("Value")
Statistic = Callable[[Sequence[Value]], float]
"""What is measured over subjects: gets one value for each (resampled) subject; NaN means undefined."""

FEWEST_SUBJECTS = 3
"""Below this number of subjects no interval is given."""
FEW_SUBJECTS = 10
"""Below this number an interval is given and called rough."""

FEW_ROWS = 64
"""Up to this many rows, comparing all pairs is faster than ranking."""


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
class MeanOf:
    """A statistic that is the mean of a value of each subject: resampled all at once instead of draw by draw."""

    each: Callable[[Any], float]
    repeated: bool = False
    """Each subject holds a sequence of repeats: the mean is taken within every repeat, then over them."""

    def __call__(self, sample: Sequence[Any]) -> float:
        """Compute the mean of the values that are defined."""
        return float(self.resampled(sample, np.arange(len(sample))[None])[0]) if sample else math.nan

    def resampled(self, sample: Sequence[Any], picks: Int[np.ndarray, "draw pick"]) -> Float[np.ndarray, "draw"]:
        """Compute the statistic of each row of picked subjects."""
        rows = [[self.each(value) for value in (held if self.repeated else (held,))] for held in sample]
        return defined_mean(defined_mean(np.array(rows, dtype=np.float64)[picks], 1), 1)


@runtime_checkable
class Resampled(Protocol):
    """A statistic that is computed for all draws at once. A dataclass, like `MeanOf`."""

    repeated: bool

    def __call__(self, sample: Sequence[Any]) -> float:
        """Compute the statistic."""
        ...

    def resampled(self, sample: Sequence[Any], picks: Int[np.ndarray, "draw pick"]) -> Float[np.ndarray, "draw"]:
        """Compute the statistic of each row of picked subjects."""
        ...


MEAN = MeanOf(float)
"""The mean of plain numbers, one for each subject."""


def accuracy(truth: Shaped[np.ndarray, "row"], predicted: Shaped[np.ndarray, "row"]) -> float:
    """Share of rows that are right; NaN without rows."""
    return float((truth == predicted).mean()) if len(truth) else math.nan


def balanced_accuracy(truth: Shaped[np.ndarray, "row"], predicted: Shaped[np.ndarray, "row"]) -> float:
    """Mean recall over the classes that occur in the truth; NaN if fewer than two occur."""
    classes = np.unique(truth)
    if len(classes) < 2:  # noqa: PLR2004 - one class says nothing about telling classes apart
        return math.nan
    return float(np.mean([(predicted[truth == label] == label).mean() for label in classes]))


def auroc(truth: Bool[np.ndarray, "row"], score: Float[np.ndarray, "row"]) -> float:
    """Chance that a positive row scores above a negative one, ties count half; NaN if one kind is missing.

    Hanley & McNeil 1982: the Mann-Whitney U statistic divided by the number of pairs.
    """
    positives = int(truth.sum())
    negatives = len(truth) - positives
    if positives == 0 or negatives == 0:
        return math.nan
    if len(truth) <= FEW_ROWS:
        gaps = np.subtract.outer(score[truth], score[~truth])
        return float(((gaps > 0).sum() + (gaps == 0).sum() / 2) / gaps.size)
    from scipy.stats import rankdata  # takes a second to import

    rank_sum = rankdata(score)[truth].sum()
    return float((rank_sum - positives * (positives + 1) / 2) / (positives * negatives))


def macro_auroc(truth: Int[np.ndarray, "row"], scores: Float[np.ndarray, "row classes"]) -> float:
    """Mean one-against-the-rest AUROC over the classes for which it is defined.

    With two classes this is the AUROC of class 1. NaN if fewer than two classes occur.
    """
    if scores.shape[1] == 2:  # noqa: PLR2004 - the usual yes or no
        return auroc(truth == 1, scores[:, 1] - scores[:, 0])
    return mean([auroc(truth == label, scores[:, label]) for label in range(scores.shape[1])])


def counted_auroc(
    counts: Float[np.ndarray, "draw row"], truth: Bool[np.ndarray, "row"], score: Float[np.ndarray, "row"]
) -> Float[np.ndarray, "draw"]:
    """`auroc` of each draw in which a row stands `counts` times."""
    wins = np.subtract.outer(score[truth], score[~truth])
    wins = (wins > 0) + 0.5 * (wins == 0)
    there, gone = counts[:, truth], counts[:, ~truth]
    return _share(((there @ wins) * gone).sum(axis=1), there.sum(axis=1) * gone.sum(axis=1))


def counted_balance(
    counts: Float[np.ndarray, "draw row"], truth: Shaped[np.ndarray, "row"], predicted: Shaped[np.ndarray, "row"]
) -> Float[np.ndarray, "draw"]:
    """`balanced_accuracy` of each draw in which a row stands `counts` times."""
    kinds = [truth == kind for kind in np.unique(truth)]
    recalls = [_share(counts @ (of & (predicted == truth)), counts @ of) for of in kinds]
    recalls = np.stack(recalls, axis=1) if kinds else np.full((len(counts), 1), math.nan)
    return np.where((~np.isnan(recalls)).sum(axis=1) > 1, defined_mean(recalls, 1), math.nan)


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
    if isinstance(statistic, Resampled):
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
        lambda picks: _resampled(statistic, sample, picks), len(sample), level=level, draws=draws, seed=seed
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
        lambda picks: _resampled(statistic, a, picks) - _resampled(statistic, b, picks),
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


def _resampled(
    statistic: Statistic[Any], sample: Sequence[Any], picks: Int[np.ndarray, "draw pick"]
) -> Float[np.ndarray, "draw"]:
    if isinstance(statistic, Resampled):
        return statistic.resampled(sample, picks)
    return np.array([statistic([sample[index] for index in row]) for row in picks.tolist()])


def _share(part: Float[np.ndarray, "draw"], whole: Float[np.ndarray, "draw"]) -> Float[np.ndarray, "draw"]:
    """`part` / `whole`; NaN where there is nothing."""
    return np.where(whole > 0, part / np.maximum(whole, 1e-300), math.nan)


def defined_mean(values: Float[np.ndarray, "..."], axis: int) -> Float[np.ndarray, "..."]:
    """Mean along an axis over what is not NaN; NaN where nothing is."""
    defined = ~np.isnan(values)
    count = defined.sum(axis=axis)
    total = np.where(defined, values, 0.0).sum(axis=axis)
    return np.where(count > 0, total / np.maximum(count, 1), math.nan)


def _percentiles(
    measure: Callable[[Int[np.ndarray, "draw pick"]], Float[np.ndarray, "draw"]],
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
    estimate = float(measure(np.arange(count)[None])[0])

    def without(note: str) -> Interval:
        return Interval(estimate=estimate, low=None, high=None, subjects=count, level=level, note=note)

    if count < FEWEST_SUBJECTS:
        return without(f"n={count}, no interval")
    values = measure(np.random.default_rng(seed).integers(0, count, (draws, count)))
    defined = values[~np.isnan(values)]
    if len(defined) <= draws / 2:
        return without("undefined in most resamples, no interval")
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    note = f"n={count}: rough interval" if count < FEW_SUBJECTS else ""
    return Interval(estimate=estimate, low=float(low), high=float(high), subjects=count, level=level, note=note)
