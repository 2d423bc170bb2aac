"""Answers about many classes of which each is there or not, whatever the others are, and how they are scored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from voxelstem import metrics
from voxelstem.protocols import Example

HALF = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What is true of a subject and what was answered, class by class."""

    classes: tuple[str, ...]
    truth: tuple[float, ...]
    """1 where it is there, 0 where not, NaN where nobody said."""
    scores: tuple[float, ...]
    """Probabilities."""
    thresholds: tuple[float, ...]
    """From these on the answer is yes."""

    def __contains__(self, name: object) -> bool:
        """Whether the truth is known for this class."""
        return name in self.classes and not math.isnan(self.truth[self.classes.index(str(name))])


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure(metrics.Counted):
    """A figure over subjects who each have an `Answer`."""

    kind: str
    only: str = ""
    """The one class that counts; all if empty."""
    one: bool = False
    """One of the classes is true."""
    bins: int = 10

    def counted(
        self, outcomes: Sequence[Answer], counts: Float[np.ndarray, "draw subject"]
    ) -> Float[np.ndarray, "draw"]:
        """Compute the figure in each draw."""
        truth = np.array([answer.truth for answer in outcomes])
        scores = np.array([answer.scores for answer in outcomes])
        best, true = scores.argmax(axis=1), truth.argmax(axis=1)
        if self.one and not self.only and self.kind == "balanced_accuracy":
            return metrics.counted_balance(counts, true, best)
        if self.one and not self.only and self.kind == "ece":
            return metrics.counted_calibration_error(counts, true == best, scores.max(axis=1), bins=self.bins)
        said = np.eye(scores.shape[1])[best] > 0 if self.one else scores >= np.array(outcomes[0].thresholds)
        places = [outcomes[0].classes.index(self.only)] if self.only else range(scores.shape[1])
        return metrics.over_classes(
            lambda few, at: self._of_class(truth[:, at], scores[:, at], said[:, at], few), places, counts
        )

    def _of_class(
        self, truth: np.ndarray, scores: np.ndarray, said: np.ndarray, counts: np.ndarray
    ) -> Float[np.ndarray, "draw"]:
        known = ~np.isnan(truth)
        there, scores, said, counts = truth[known] > HALF, scores[known], said[known], counts[:, known]
        match self.kind:
            case "auroc":
                return metrics.counted_auroc(counts, there, scores)
            case "balanced_accuracy":
                return metrics.counted_balance(counts, there, said)
            case "f1":
                return metrics.counted_f1(counts, there, said)
            case _:
                return metrics.counted_calibration_error(counts, there, scores, bins=self.bins)


def truth_of(classes: Sequence[str], example: Example) -> tuple[float, ...]:
    """1 for what is true of an example, 0 for what is not, NaN for what nobody said."""
    said = example.findings
    if said is None:
        return tuple(float(name == example.label) for name in classes)
    return tuple(float(said[name]) if name in said else math.nan for name in classes)


def shares(truths: Sequence[Mapping[str, bool]], classes: Sequence[str]) -> tuple[float, ...]:
    """Share of the labelled in which each class is there: what one can say about a scan without seeing it."""
    said = [[truth[name] for truth in truths if name in truth] for name in classes]
    return tuple(sum(known) / len(known) if known else HALF for known in said)


def best_threshold(scores: Float[np.ndarray, "row"], there: Bool[np.ndarray, "row"]) -> float:
    """The threshold of the best balanced accuracy: amid two neighbouring scores, the one nearest to 0.5 of equals."""
    steps = np.unique(scores)
    between = np.concatenate([[steps[0]], (steps[:-1] + steps[1:]) / 2])
    figures = np.array([metrics.balanced_accuracy(there, scores >= limit) for limit in between])
    best = between[figures >= figures.max() - 1e-12]
    return float(best[np.abs(best - HALF).argmin()])
