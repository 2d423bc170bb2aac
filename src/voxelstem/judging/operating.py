"""What a yes-or-no answer is worth at one threshold, which was fixed before anybody was tested."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from voxelstem.adapted import TUNED, Adapted
from voxelstem.answers import best_threshold
from voxelstem.certainty.calibration import wilson_interval
from voxelstem.certainty.crossfit import out_of_fold, rows_of
from voxelstem.certainty.folds import asked_folds, strata_of
from voxelstem.choosing.ladder import CANNOT
from voxelstem.features import examples_of
from voxelstem.judging.contest import Outcomes
from voxelstem.judging.evidence import Played
from voxelstem.judging.groups import groups_of
from voxelstem.metrics import Interval
from voxelstem.report.evidence import OperatingPoint
from voxelstem.samepeople import same_people

FEWEST, FEWEST_OF_A_KIND = 10, 3
"""Subjects that a threshold is fixed on at least, and of each of the two classes."""
TWO = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Fixed:
    """A threshold and on whom it was fixed, or why there is none."""

    threshold: float = math.nan
    on: str = ""
    why: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Shares of four kinds, each over its own subjects, with Wilson's interval."""

    sensitivity: Interval
    specificity: Interval
    ppv: Interval
    """Of those that were called positive, how many are."""
    npv: Interval
    """Of those that were called negative, how many are."""
    subjects: int = field(default=0)

    def facts(self) -> dict[str, Interval]:
        """By name."""
        names = ("sensitivity", "specificity", "ppv", "npv")
        return {name: getattr(self, name) for name in names}


def operating_point(played: Played, adapted: Adapted, folder: Path) -> OperatingPoint | None:
    """Judge a run with two classes by what `predict` answers, and at a threshold that no test subject had a say in.

    None for other runs. `predict` says the more probable class; the threshold is what might be said instead.
    The threshold is that of the best balanced accuracy on labelled validation subjects whom the head did not learn
    from; without enough of them, on the labelled subjects themselves, each answered by a head of another fold.
    """
    classes, outcomes = played.contest.classes, played.outcomes
    first = next(iter(outcomes.values()))
    if len(classes) != TWO or not isinstance(getattr(first, "truth", None), int) or not hasattr(first, "scores"):
        return None
    rows, sure = rows_of(outcomes), played.assurance
    there = rows.truth == 1
    answered = np.array([sure.certainty(classes, row)[0] == classes[1] for row in rows.probabilities])
    answers = rates(there, answered).facts()
    fixed = fix_threshold(played, adapted, folder)
    if fixed.why:
        return OperatingPoint(run=played.name, positive=classes[1], why=fixed.why, answers=answers)
    said = rows.probabilities[:, 1] >= fixed.threshold
    by_facet: dict[str, dict[str, Mapping[str, Interval]]] = {}
    for facet, of in groups_of(played.contest.tested).items():
        kinds = np.array([of[subject] for subject in rows.subjects])
        names = sorted(set(kinds.tolist()))
        by_facet[facet] = {name: rates(there[kinds == name], said[kinds == name]).facts() for name in names}
    return OperatingPoint(
        run=played.name,
        positive=classes[1],
        threshold=fixed.threshold,
        shown=float(sure.chances(np.array([1 - fixed.threshold, fixed.threshold]))[1]),
        fixed_on=fixed.on,
        figures=rates(there, said).facts(),
        answers=answers,
        by_group=by_facet,
    )


def fix_threshold(played: Played, adapted: Adapted, folder: Path) -> Fixed:
    """Fix the threshold on validation subjects, else on cross-fitted labelled ones; or say why neither can be."""
    contest = played.contest
    learned = {record.subject for record in contest.labelled}
    known = contest.truth.labels
    held = tuple(
        record
        for record in contest.truth.of("validation")
        if record.subject not in learned and known.get(record.subject) in contest.classes
    )
    if _enough([known[subject] for subject in {record.subject for record in held}], contest.classes):
        outcomes = replace(contest, tested=held).score(adapted.head, played.features)
        return Fixed(threshold=_best(outcomes), on=f"{len(outcomes)} validation subjects")
    said = f"validation holds {len({record.subject for record in held})} labelled subjects"
    if adapted.config.mode in TUNED:
        return Fixed(why=f"{said}, and to cross-fit the others every fold would have to train the network anew")
    if not _enough([known[subject] for subject in learned], contest.classes):
        return Fixed(
            why=f"{said}, and {len(learned)} are learned from: {FEWEST} are needed, {FEWEST_OF_A_KIND} a class"
        )
    try:
        outcomes = _cross_fitted(played, adapted, folder)
    except CANNOT as error:
        return Fixed(why=f"{said}, and those who are learned from cannot be cross-fitted: {error}")
    return Fixed(threshold=_best(outcomes), on=f"{len(outcomes)} labelled subjects, each by a head of another fold")


def rates(there: Bool[np.ndarray, "row"], said: Bool[np.ndarray, "row"]) -> Rates:
    """Sensitivity, specificity and predictive values (Altman & Bland 1994), with Wilson's intervals; NaN of nobody."""
    return Rates(
        sensitivity=_share(said[there]),
        specificity=_share(~said[~there]),
        ppv=_share(there[said]),
        npv=_share(~there[~said]),
        subjects=len(there),
    )


def _share(right: Bool[np.ndarray, "row"]) -> Interval:
    if not len(right):
        return Interval(estimate=math.nan, low=None, high=None, subjects=0, note="nobody")
    return wilson_interval(float(right.mean()), len(right))


def _enough(labels: Sequence[str], classes: Sequence[str]) -> bool:
    return len(labels) >= FEWEST and all(labels.count(name) >= FEWEST_OF_A_KIND for name in classes)


def _best(outcomes: Outcomes) -> float:
    rows = rows_of(outcomes)
    return best_threshold(rows.probabilities[:, 1], rows.truth == 1)


def _cross_fitted(played: Played, adapted: Adapted, folder: Path) -> dict[str, Any]:
    contest, config = played.contest, adapted.config
    examples = list(examples_of(contest.store, contest.labelled, contest.truth, played.features, contest.task))
    together = same_people(contest.store, contest.labelled, folder)
    strata = strata_of(examples, contest.classes, together=together)
    (folds,) = asked_folds(strata, count="auto", told=contest.truth.folds, repeats=1, seed=config.seed)
    return out_of_fold(contest.task, examples, contest.classes, mode=config.mode, seed=config.seed, folds=folds)
