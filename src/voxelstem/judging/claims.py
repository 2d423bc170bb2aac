"""Do claims come true? Of classes that are there or not, and of boxes: probabilities and their ends, as `predict` says.

A subject makes one claim of each class that is known of it, or one for each box that counts in the task's own scores.
Boxes of one subject are no independent answers, so whatever is said of their chance resamples subjects.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from voxelstem import metrics
from voxelstem.answers import HALF, Answer
from voxelstem.certainty.assurance import Assurance
from voxelstem.certainty.calibration import CalibrationFigure, wilson_interval
from voxelstem.certainty.vennabers import held_frequency
from voxelstem.metrics import FEWEST_SUBJECTS, Interval
from voxelstem.report.evidence import Ends
from voxelstem.tasks.detect import Detected

FIGURES = ("ece", "brier", "slope")
AT_ONCE = 1 << 22
"""So many claims are counted in one go (32 MiB): boxes are many, and so are draws."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Claims:
    """What was said of one class about one subject."""

    chances: tuple[float, ...]
    """That it is there: of an answer one, of boxes one for each."""
    there: tuple[bool, ...]
    """Whether it is."""

    def __post_init__(self) -> None:
        """Guard the pairs.

        Raises:
            ValueError: a chance without a truth, or no claim.
        """
        if not self.chances or len(self.chances) != len(self.there):
            raise ValueError(f"every claim has a chance and a truth, got {len(self.chances)} and {len(self.there)}")


Told = Mapping[str, Claims]
"""Class to what was said of it about one subject; without those of which nothing is known, or nothing was said."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationOfEach(metrics.Counted):
    """A figure of calibration of claims about many classes: of each class by its claims, averaged over classes."""

    figure: CalibrationFigure

    def counted(self, outcomes: Sequence[Told], counts: Float[np.ndarray, "draw subject"]) -> Float[np.ndarray, "draw"]:
        """Compute the figure in each draw; NaN where no class has a claim.

        Raises:
            ValueError: chances that are no probabilities.
        """
        names = dict.fromkeys(name for told in outcomes for name in told)
        each = [self._of_class([told.get(name) for told in outcomes], counts) for name in names]
        return metrics.defined_mean(np.stack([np.full(len(counts), math.nan), *each], axis=1), 1)

    def _of_class(
        self, own: Sequence[Claims | None], counts: Float[np.ndarray, "draw subject"]
    ) -> Float[np.ndarray, "draw"]:
        said = [one for one in own if one is not None]
        rows = [_YesOrNo.of(*pair) for one in said for pair in zip(one.chances, one.there, strict=True)]
        owner = np.repeat(np.arange(len(own)), [0 if one is None else len(one.chances) for one in own])
        found = np.full(len(counts), math.nan)
        there = np.flatnonzero(counts[:, np.unique(owner)].sum(axis=1) > 0)
        for part in np.array_split(there, math.ceil(len(there) * len(rows) / AT_ONCE)) if len(there) else []:
            found[part] = self.figure.counted(rows, counts[np.ix_(part, owner)])
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class _YesOrNo:
    """One claim, as `CalibrationFigure` takes it."""

    truth: int
    scores: tuple[float, ...]

    @classmethod
    def of(cls, chance: float, there: bool) -> _YesOrNo:
        return cls(truth=int(there), scores=(1 - chance, chance))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Share(metrics.Counted):
    """How many of all claims are true, each subject holding whether its own are."""

    def counted(
        self, outcomes: Sequence[Sequence[bool]], counts: Float[np.ndarray, "draw subject"]
    ) -> Float[np.ndarray, "draw"]:
        true, all_ = (np.array([count(one) for one in outcomes], dtype=np.float64) for count in (sum, len))
        return (counts @ true) / (counts @ all_)


def claims_of(outcome: Answer | Detected) -> dict[str, Claims]:
    """What was claimed about a subject, by the head's own chances.

    Of boxes those that count in the task's scores, as calibrators are fitted to: by hits of kind `radius` and `inside`
    a box that finds again what another one found is none of them.
    """
    if isinstance(outcome, Answer):
        said = zip(outcome.classes, outcome.scores, outcome.truth, strict=True)
        return {n: Claims(chances=(score,), there=(true > HALF,)) for n, score, true in said if n in outcome}
    return {
        name: Claims(chances=one.scores, there=one.hits) for name, one in outcome.by_class.items() if len(one.scores)
    }


def calibrated(sure: Assurance, told: Told) -> dict[str, Claims]:
    """The same with the probabilities that findings state; a class that was not calibrated keeps its own."""
    return {
        name: replace(own, chances=tuple(sure.present(name, chance).probability for chance in own.chances))
        for name, own in told.items()
    }


def figures_of_each(by_subject: Mapping[str, Told]) -> dict[str, Interval]:
    """`ece`, `brier` and `slope`, each the mean over classes, with intervals over subjects."""
    return {
        kind: metrics.bootstrap_interval(by_subject, CalibrationOfEach(figure=CalibrationFigure(kind=kind)))  # pyright: ignore[reportArgumentType]
        for kind in FIGURES
    }


def ends_of_each(sure: Assurance, by_subject: Mapping[str, Told]) -> dict[str, Ends]:
    """Does what comes true lie between the ends that findings state? Of each class that has ends.

    Venn-Abers promises that one of the two ends is calibrated, whichever belongs to the truth, so a share of many
    claims lies between the means of their ends. A class of which fewer than three subjects have claims is left out.

    Args:
        sure: What `predict` asks.
        by_subject: What the head said, by its own chances.
    """
    names = () if sure.yesno is None else sure.yesno.names
    own = {name: [told[name] for _, told in sorted(by_subject.items()) if name in told] for name in names}
    return {name: _ends(sure, name, said) for name, said in own.items() if len(said) >= FEWEST_SUBJECTS}


def _ends(sure: Assurance, name: str, said: Sequence[Claims]) -> Ends:
    stated = [sure.present(name, chance) for one in said for chance in one.chances]
    low, high = (np.array([getattr(one, side) for one in stated], dtype=np.float64) for side in ("low", "high"))
    there = np.array([true for one in said for true in one.there], dtype=np.bool_)
    (overall,) = held_frequency(low, high, there, bins=1)
    if len(there) == len(said):
        return Ends(overall=overall, bins=held_frequency(low, high, there))
    share = metrics.bootstrap_interval({f"{at:09d}": one.there for at, one in enumerate(said)}, _Share())
    if there.all() or not there.any():
        # Where all claims are alike, so are all draws: then subjects are counted as if each had made one.
        share = wilson_interval(float(there.mean()), len(said))
    return Ends(overall=replace(overall, came_true=share))
