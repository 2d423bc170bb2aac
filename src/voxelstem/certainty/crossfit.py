"""Cross-fitting: every labelled subject is predicted by a head that never saw it (Stone 1974).

What comes out measures a way to adapt without one further label, and is what calibrators and thresholds are fitted to.
Whatever a task chooses by itself it chooses inside each fold, because `Task.fit` sees nobody else: otherwise figures
come out too good (Varma & Simon 2006).

Intervals resample subjects and not heads, and heads of one repeat share most of what they learned from: with few
subjects they are too narrow (Bates, Hastie & Tibshirani 2023). They compare ways to adapt on one set of labels; what
is claimed of the chosen one belongs to subjects that had no part in the choice.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from voxelstem import metrics
from voxelstem.certainty.calibration import Guessed
from voxelstem.certainty.folds import Folds
from voxelstem.metrics import Interval, Statistic
from voxelstem.progress import Advance
from voxelstem.protocols import Example, Task

Outcomes = dict[str, Any]
"""Subject to outcome, as the task's `combine` gives it."""
Repeats = dict[str, tuple[Any, ...]]
"""Subject to the outcomes of several repeats."""
Answer = Callable[[frozenset[str], frozenset[str], int], Outcomes]
"""From who is learned from, who is held out and a seed: the outcomes of all who are held out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """How the figures of a metric are to be read."""

    best: float = 1.0
    """No figure can be better."""
    less_is_better: bool = False
    in_units: bool = False
    """It has the unit of the labels: what is a small difference depends on how large the figure is."""
    of_pairs: bool = False
    """It ranks subjects against each other. Scores of two heads need not be on one scale, so it is taken within folds
    (Forman & Scholz 2010, section 3)."""

    def margin(self, share: float, figure: float) -> float:
        """A difference of `share`: as it is, or as a share of a figure in the labels' unit."""
        return share * abs(figure) if self.in_units else share


SCALES: Mapping[str, Scale] = MappingProxyType(
    {
        "auroc": Scale(of_pairs=True),
        "average_precision": Scale(),
        "balanced_accuracy": Scale(),
        "dice": Scale(),
        "ece": Scale(best=0.0, less_is_better=True),
        "f1": Scale(),
        "froc": Scale(),
        "harrell_c": Scale(of_pairs=True),
        "integrated_brier": Scale(best=0.0, less_is_better=True),
        "mae": Scale(best=0.0, less_is_better=True, in_units=True),
        "nsd": Scale(),
        "precision_at_k": Scale(),
        "r": Scale(),
        "uno_c": Scale(of_pairs=True),
    }
)
"""Metrics of tasks. Whether more is better cannot be guessed from a name."""


def scale_of(metric: str) -> Scale:
    """How to read a metric; `dice:liver` is read like `dice`.

    Raises:
        ValueError: it is not in `SCALES`.
    """
    name = metric.partition(":")[0]
    if name not in SCALES:
        raise ValueError(f"whether more of '{name}' is better is not known; it is of {', '.join(SCALES)}")
    return SCALES[name]


@dataclass(frozen=True, kw_only=True, slots=True)
class Unseen:
    """What came of a subject by a head that had not seen it, and in which fold of its repeat that was."""

    outcome: Any
    fold: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossFitted:
    """Every subject as unseen, once for each repeat."""

    by_subject: Mapping[str, tuple[Unseen, ...]]

    def __post_init__(self) -> None:
        """Guard the repeats.

        Raises:
            ValueError: nobody is there, or subjects have no or different numbers of repeats.
        """
        if len({len(own) for own in self.by_subject.values()} | {0}) != 2:  # noqa: PLR2004 - zero, and one other
            raise ValueError("cross-fitted subjects have the same number of repeats each, one or more")

    @property
    def count(self) -> int:
        """How many repeats there are."""
        return len(next(iter(self.by_subject.values())))

    @property
    def repeats(self) -> Repeats:
        """Plain outcomes, for whatever takes repeats and need not know of folds."""
        return {subject: tuple(one.outcome for one in own) for subject, own in self.by_subject.items()}

    def outcomes(self, repeat: int = 0) -> Outcomes:
        """Plain outcomes of one repeat: one for each subject, by a single head each."""
        return {subject: own[repeat].outcome for subject, own in self.by_subject.items()}

    def figure(self, task: Task, metric: str) -> Interval:
        """A metric, averaged over repeats, with its interval over subjects.

        Raises:
            ValueError: as `scale_of`.
        """
        return metrics.bootstrap_interval(self.by_subject, Figure.of(task, metric))

    def better_than(self, other: CrossFitted, task: Task, metric: str) -> Interval:
        """By how much a metric is better than that of `other`, subject by subject; below 0 where it is worse.

        Raises:
            ValueError: not the same subjects in the same folds, or as `scale_of`.
        """
        mine, theirs = (
            {subject: [one.fold for one in own] for subject, own in side.by_subject.items()} for side in (self, other)
        )
        if mine != theirs:
            raise ValueError("only what was cross-fitted with the same plan can be compared")
        sides = (other, self) if scale_of(metric).less_is_better else (self, other)
        return metrics.paired_difference(sides[0].by_subject, sides[1].by_subject, Figure.of(task, metric))


def cross_fit(answer: Answer, plan: Sequence[Folds], *, seed: int, advance: Advance | None = None) -> CrossFitted:
    """Hold out every fold of every repeat in turn; `advance` counts folds.

    `answer` may fit whatever it likes, a whole network too: `answering` gives that of a task on frozen features. The
    seed that it gets differs from fold to fold, and is the same for whatever else is fitted with this plan and seed.

    Raises:
        ValueError: folds of different subjects, or not one outcome for everybody who is held out.
    """
    if len({folds.subjects for folds in plan}) != 1:
        raise ValueError("a plan has one repeat or more, all of the same subjects")
    found: dict[str, list[Unseen]] = {subject: [] for subject in sorted(plan[0].subjects)}
    for repeat, folds in enumerate(plan):
        for fold, held in enumerate(folds.held):
            outcomes = answer(folds.subjects - held, held, seed_of(seed, repeat, fold))
            if set(outcomes) != held:
                raise ValueError(f"a fold of {len(held)} subjects needs their outcomes, got {len(outcomes)}")
            for subject, outcome in outcomes.items():
                found[subject].append(Unseen(outcome=outcome, fold=fold))
            if advance is not None:
                advance(1)
    return CrossFitted(by_subject={subject: tuple(own) for subject, own in found.items()})


def seed_of(seed: int, repeat: int, fold: int) -> int:
    """The seed of what is fitted while a fold of a repeat is held out."""
    return int(np.random.default_rng([seed, repeat, fold, 47]).integers(1 << 31))


def answering(task: Task, examples: Sequence[Example], classes: tuple[str, ...], *, mode: str) -> Answer:
    """Fit a task's head to the scans of those who are learned from; several scans of one subject become one outcome."""

    def answer(kept: frozenset[str], held: frozenset[str], seed: int) -> Outcomes:
        head = task.fit([example for example in examples if example.subject in kept], classes, mode=mode, seed=seed)
        by_subject: dict[str, list[Any]] = {}
        for example in examples:
            if example.subject in held:
                by_subject.setdefault(example.subject, []).append(task.outcome(head, example))
        return {subject: task.combine(outcomes) for subject, outcomes in by_subject.items()}

    return answer


def out_of_fold(
    task: Task, examples: Sequence[Example], classes: tuple[str, ...], *, mode: str, seed: int, folds: Folds
) -> Outcomes:
    """Outcome of every subject by a head that was fitted to the other folds.

    Raises:
        ValueError: as `cross_fit` and the task's `fit`.
    """
    return cross_fit(answering(task, examples, classes, mode=mode), [folds], seed=seed).outcomes()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rows:
    """Truth and probabilities as calibrators, thresholds and conformal sets take them: one row is one subject."""

    subjects: tuple[str, ...]
    truth: Int[np.ndarray, "row"]
    probabilities: Float[np.ndarray, "row classes"]


def rows_of(outcomes: Mapping[str, Guessed]) -> Rows:
    """Rows of one repeat's outcomes of a classification, in the order of subjects.

    They come from heads that learned from a fold less than the final one does: what is fitted to them is a little too
    careful. Sets and intervals of `conformal` then have no promise that needs no assumption (Barber et al. 2021, on the
    jackknife), only that of heads which differ little. Do not stack repeats: they are the same subjects again.

    Raises:
        ValueError: no outcome.
    """
    if not outcomes:
        raise ValueError("no outcome to make rows of")
    subjects = tuple(sorted(outcomes))
    return Rows(
        subjects=subjects,
        truth=np.array([outcomes[subject].truth for subject in subjects], dtype=np.int64),
        probabilities=np.array([outcomes[subject].scores for subject in subjects], dtype=np.float64),
    )


@dataclass(frozen=True, slots=True)
class Figure(metrics.Counted):
    """A metric of subjects that were held out: within folds if it ranks them, else over all; averaged over repeats."""

    statistic: Statistic[Any]
    within_folds: bool
    repeated: bool = field(default=True, kw_only=True)
    """Each subject holds its repeats, always."""

    @classmethod
    def of(cls, task: Task, metric: str) -> Figure:
        """The figure of a task's metric.

        Raises:
            ValueError: as `scale_of`.
        """
        return cls(task.statistic(metric), scale_of(metric).of_pairs)

    def counted(
        self, outcomes: Sequence[Unseen], counts: Float[np.ndarray, "draw subject"]
    ) -> Float[np.ndarray, "draw"]:
        """Compute the figure of one repeat in each draw; a fold counts by those of it who were drawn."""
        plain = [one.outcome for one in outcomes]
        if not self.within_folds:
            return metrics.of_draws(self.statistic, plain, counts)
        folds = np.array([one.fold for one in outcomes])
        values, weights = np.full((2, len(counts), folds.max() + 1), math.nan)
        for fold in range(folds.max() + 1):
            own = np.flatnonzero(folds == fold)
            weights[:, fold] = counts[:, own].sum(axis=1)
            there = weights[:, fold] > 0
            if there.any():
                sample = [plain[at] for at in own]
                values[there, fold] = metrics.of_draws(self.statistic, sample, counts[np.ix_(there, own)])
        weights[np.isnan(values)] = 0.0
        total = weights.sum(axis=1)
        return np.where(total > 0, (weights * np.nan_to_num(values)).sum(axis=1) / np.maximum(total, 1.0), math.nan)


def as_facts(record: Any) -> dict[str, Any]:
    """A record as plain data for JSON; an undefined figure becomes None."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(inner) for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return [plain(inner) for inner in value]
        return None if isinstance(value, float) and math.isnan(value) else value

    return plain(dataclasses.asdict(record))
