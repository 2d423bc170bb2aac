"""What stands beside scores: whether probabilities come true, which scans are strange, which of two runs is better."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from voxelstem import metrics
from voxelstem.adapted import Adapted
from voxelstem.answers import Answer, shares
from voxelstem.certainty.assurance import Assurance, groups_each
from voxelstem.certainty.calibration import CalibrationFigure, wilson_interval
from voxelstem.certainty.crossfit import rows_of, scale_of
from voxelstem.certainty.strangeness import KnownClasses, NearestKnown
from voxelstem.certainty.thresholds import coverage
from voxelstem.certainty.vennabers import held_frequency
from voxelstem.features import FeaturesOf
from voxelstem.judging.contest import Contest, Outcomes, Repeats, once
from voxelstem.judging.groups import groups_of
from voxelstem.metrics import Interval
from voxelstem.report.evidence import Compared, Prevalence, Sureness

FIGURES = ("ece", "brier", "slope")


@dataclass(frozen=True, kw_only=True, slots=True)
class Played:
    """A run that was scored on the test subjects."""

    name: str
    task: str
    contest: Contest
    outcomes: Outcomes
    assurance: Assurance
    features: FeaturesOf


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationOfEach:
    """A figure of calibration of answers about many classes: of each class by those of whom it is known, averaged."""

    figure: CalibrationFigure

    repeated: bool = False
    """Each subject holds a sequence of repeats: the figure is taken within every repeat, then averaged over them."""

    def __call__(self, sample: Sequence[Any]) -> float:
        """Compute the figure; NaN without subjects."""
        return float(self.resampled(sample, np.arange(len(sample))[None])[0]) if sample else math.nan

    def resampled(self, sample: Sequence[Any], picks: Int[np.ndarray, "draw pick"]) -> Float[np.ndarray, "draw"]:
        """Compute the figure of each row of picked subjects; NaN where no class has one.

        Raises:
            ValueError: scores that are no probabilities.
        """
        counts = np.stack([np.bincount(row, minlength=len(sample)) for row in picks]).astype(np.float64)
        repeats: Sequence[Sequence[Answer]] = list(zip(*sample, strict=True)) if self.repeated else [sample]
        return metrics.defined_mean(np.stack([self._of(answers, counts) for answers in repeats], axis=1), 1)

    def _of(self, answers: Sequence[Answer], counts: Float[np.ndarray, "draw subject"]) -> Float[np.ndarray, "draw"]:
        each = np.full((len(counts), len(answers[0].classes)), math.nan)
        for at, name in enumerate(answers[0].classes):
            known = [row for row, answer in enumerate(answers) if name in answer]
            own = counts[:, known]
            there = own.sum(axis=1) > 0
            if there.any():
                each[there, at] = self.figure.counted([_yes_or_no(answers[row], at) for row in known], own[there])
        return metrics.defined_mean(each, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class _YesOrNo:
    """One class of an answer, as `CalibrationFigure` takes it."""

    truth: int
    scores: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Held:
    """Whose truth the sets or intervals held, in the order of subjects."""

    truth: Bool[np.ndarray, "subject"]
    sizes: Float[np.ndarray, "subject"]
    """How many classes each set holds; NaN of intervals."""


def sureness(played: Played) -> Sureness:
    """Measure a run's own statements about how sure it is, as `predict` states them."""
    sure, outcomes = played.assurance, played.outcomes
    stated: dict[str, Interval] = {}
    calibrated: dict[str, Interval] = {}
    held: _Held | None = None
    first = next(iter(outcomes.values()))
    subjects = sorted(outcomes)
    if isinstance(first, Answer):
        stated = _figures_of_each(outcomes)
        calibrated = {} if sure.yesno is None else _figures_of_each(_answers(sure, outcomes))
    elif hasattr(first, "scores") and hasattr(first, "truth") and isinstance(first.truth, int):
        stated = _figures(once(outcomes))
        after = {name: replace(one, scores=_chances(sure, one.scores)) for name, one in outcomes.items()}
        calibrated = _figures(once(after)) if sure.calibrator is not None else {}
        held = None if sure.sets is None else _held(played, lambda own, part: _in_sets(own, _some(after, part)))
    elif hasattr(first, "predicted") and sure.intervals is not None:
        held = _held(played, lambda own, part: _in_intervals(own, _some(outcomes, part)))
    by_group: dict[str, Mapping[str, Interval]] = {}
    if held is not None:
        for facet, of in groups_of(played.contest.tested).items():
            by_group[facet] = coverage(held.truth, subjects, groups=[of[name] for name in subjects]).by_group
    return Sureness(
        run=played.name,
        subjects=sure.subjects,
        stated=stated,
        calibrated=calibrated,
        covered=None if held is None else coverage(held.truth, subjects).overall,
        level=None if held is None else _level(sure),
        set_size=None if held is None or np.isnan(held.sizes).any() else float(held.sizes.mean()),
        flagged=_flagged(played, played.assurance.known),
        notes=sure.notes,
        by_group=by_group,
        **_between(sure, outcomes),
        flagged_by_centres=_flagged(played, played.assurance.centres),
        unmeasured=_unmeasured(sure, first),
    )


def between(played: Sequence[Played]) -> list[Compared]:
    """Every two runs of one task that were tested on the same subjects, in each metric."""
    found: list[Compared] = []
    for one, other in itertools.combinations(played, 2):
        if one.task != other.task or set(one.outcomes) != set(other.outcomes):
            continue
        if one.contest.classes != other.contest.classes:
            continue
        for metric in one.contest.task.metrics:
            sides = (other, one) if scale_of(metric).less_is_better else (one, other)
            statistic = metrics.averaged(one.contest.task.statistic(metric))
            difference = metrics.paired_difference(once(sides[0].outcomes), once(sides[1].outcomes), statistic)
            found.append(Compared(task=one.task, metric=metric, one=one.name, other=other.name, difference=difference))
    return found


def against(played: Played, name: str, repeats: Repeats) -> list[Compared]:
    """A run and one of its baselines, in each metric."""
    found: list[Compared] = []
    for metric in played.contest.task.metrics:
        statistic = metrics.averaged(played.contest.task.statistic(metric))
        sides = (once(played.outcomes), repeats)
        one, other = reversed(sides) if scale_of(metric).less_is_better else sides
        difference = metrics.paired_difference(one, other, statistic)
        found.append(Compared(task=played.task, metric=metric, one=played.name, other=name, difference=difference))
    return found


def prevalence(played: Played) -> Prevalence | None:
    """Shares of classes among subjects, where scans have one class each, or each class is there or not."""
    told = played.contest.truth.labels
    if not (told or played.contest.truth.findings) or not played.contest.labelled:
        return None
    sides = (sorted({record.subject for record in played.contest.labelled}), played.contest.subjects)
    if not told:
        known, names = played.contest.truth.findings, played.contest.classes
        there = [dict(zip(names, shares([known[subject] for subject in side], names), strict=True)) for side in sides]
        said = [
            {name: [known[subject][name] for subject in side if name in known[subject]] for name in names}
            for side in sides
        ]
        shift = {
            name: difference_of_shares(*((sum(side[name]), len(side[name])) for side in said[::-1]), looks=len(names))
            for name in names
            if all(side[name] for side in said)
        }
        return Prevalence(run=played.name, labelled=there[0], tested=there[1], shift=shift)
    counts = [Counter(told[subject] for subject in side) for side in sides]
    labelled, tested = (
        {name: count[name] / max(count.total(), 1) for name in played.contest.classes} for count in counts
    )
    shift = {
        name: difference_of_shares(
            (counts[1][name], counts[1].total()),
            (counts[0][name], counts[0].total()),
            looks=len(played.contest.classes),
        )
        for name in played.contest.classes
    }
    return Prevalence(run=played.name, labelled=labelled, tested=tested, shift=shift)


def difference_of_shares(one: tuple[int, int], other: tuple[int, int], *, looks: int = 1) -> Interval:
    """One share minus another, each `(how many, of how many)`, with its 95 % interval.

    Newcombe 1998 (Statistics in Medicine 17:873), method 10, from Wilson's intervals of both. With several `looks` the
    interval is that wide that all of them hold at once (Bonferroni).

    Raises:
        ValueError: shares of nobody, or no look.
    """
    if min(one[1], other[1], looks) < 1:
        raise ValueError(f"shares need somebody to count, got {one} and {other}")
    level = 1 - 0.05 / looks
    a, b = (wilson_interval(part / whole, whole, level=level) for part, whole in (one, other))
    assert a.low is not None and a.high is not None and b.low is not None and b.high is not None  # noqa: PT018
    gap = a.estimate - b.estimate
    down = ((a.estimate - a.low) ** 2 + (b.high - b.estimate) ** 2) ** 0.5
    up = ((a.high - a.estimate) ** 2 + (b.estimate - b.low) ** 2) ** 0.5
    return Interval(estimate=gap, low=gap - down, high=gap + up, subjects=one[1] + other[1], level=level)


def question(adapted: Adapted, contest: Contest, name: str) -> dict[str, Any]:
    """What a run was asked in words, and of how many."""
    facts = adapted.head.facts
    truth = contest.truth
    if truth.labels:
        counts = {word: sum(truth.labels[subject] == word for subject in contest.subjects) for word in contest.classes}
    else:
        told = [truth.findings[subject] for subject in contest.subjects]
        counts = {word: sum(word in one for one in told) for word in contest.classes}
    return {
        "run": name,
        "prompts": facts["prompts"],
        "version": int(facts["prompts_version"]),
        "sha256": facts["prompts_sha256"],
        "prompts_said": int(facts["prompts_said"]),
        "answers": adapted.config.head.answers,
        "mode": adapted.config.mode,
        "calibrated_on": len(adapted.subjects),
        "pool": len(contest.tested),
        "subjects": len(contest.subjects),
        "classes": counts,
        "counted": "test subjects of which this is true" if truth.labels else "test subjects of whom this is known",
    }


def _figures(repeats: Repeats) -> dict[str, Interval]:
    return {
        kind: metrics.bootstrap_interval(repeats, CalibrationFigure(kind=kind, repeated=True))  # pyright: ignore[reportArgumentType]
        for kind in FIGURES
    }


def _figures_of_each(outcomes: Mapping[str, Answer]) -> dict[str, Interval]:
    return {
        kind: metrics.bootstrap_interval(outcomes, CalibrationOfEach(figure=CalibrationFigure(kind=kind)))  # pyright: ignore[reportArgumentType]
        for kind in FIGURES
    }


def _yes_or_no(answer: Answer, at: int) -> _YesOrNo:
    return _YesOrNo(truth=int(answer.truth[at]), scores=(1 - answer.scores[at], answer.scores[at]))


def _answers(sure: Assurance, outcomes: Mapping[str, Answer]) -> dict[str, Answer]:
    """The same with calibrated probabilities, where there are some."""
    return {
        subject: replace(
            one,
            scores=tuple(
                sure.present(name, chance).probability for name, chance in zip(one.classes, one.scores, strict=True)
            ),
        )
        for subject, one in outcomes.items()
    }


def _some(outcomes: Mapping[str, Any], subjects: Sequence[str]) -> dict[str, Any]:
    return {name: outcomes[name] for name in subjects}


def _held(played: Played, hold: Callable[[Assurance, Sequence[str]], _Held]) -> _Held:
    """Ask each group's own sets or intervals about its subjects, as `predict` does; of no one group, the common ones.

    `hold` is given those of a group and its subjects, sorted.
    """
    subjects = sorted(played.outcomes)
    groups = groups_each((record.subject, record.acquisition) for record in played.contest.tested)
    own = np.array([groups.get(name, "") for name in subjects])
    truth, sizes = np.zeros(len(subjects), dtype=np.bool_), np.full(len(subjects), math.nan)
    for group in np.unique(own).tolist():
        rows = np.flatnonzero(own == group)
        found = hold(played.assurance.of_group(group), [subjects[row] for row in rows])
        truth[rows], sizes[rows] = found.truth, found.sizes
    return _Held(truth=truth, sizes=sizes)


def _in_sets(sure: Assurance, outcomes: Mapping[str, Any]) -> _Held:
    rows = rows_of(outcomes)
    assert sure.sets is not None
    sets = sure.sets.apply(rows.probabilities)
    return _Held(truth=sets.holds(rows.truth), sizes=sets.sizes.astype(np.float64))


def _in_intervals(sure: Assurance, outcomes: Mapping[str, Any]) -> _Held:
    predicted, truth = (
        np.array([getattr(outcomes[name], side) for name in sorted(outcomes)], dtype=np.float64)
        for side in ("predicted", "truth")
    )
    assert sure.intervals is not None
    return _Held(truth=sure.intervals.apply(predicted).holds(truth), sizes=np.full(len(truth), math.nan))


def _unmeasured(sure: Assurance, outcome: Any) -> tuple[str, ...]:
    """What findings state of how sure they are, and nothing here looks at."""
    found: list[str] = []
    if sure.volumes is not None:
        found.append("how often intervals of volumes hold the true volume")
    if sure.yesno is not None:
        boxes = not isinstance(outcome, Answer)
        found += ["how often boxes are right that are said to be"] * boxes
        found.append(f"intervals of the probability of {'a box' if boxes else 'yes or no'}")
    return tuple(found)


def _chances(sure: Assurance, scores: Sequence[float]) -> tuple[float, ...]:
    return tuple(sure.chances(np.array(scores, dtype=np.float64)).tolist())


def _level(sure: Assurance) -> float | None:
    part: Any = sure.sets or sure.intervals
    return None if part is None else float(part.thresholds.level)


def _between(sure: Assurance, outcomes: Outcomes) -> dict[str, Any]:
    """How wide the interval of the answer's probability is on average, and whether bins hold what was observed."""
    if sure.between is None:
        return {}
    rows = rows_of(outcomes)
    answers = np.array([sure.chances(row).argmax() for row in rows.probabilities])
    ends = np.array([sure.ends(row) for row in rows.probabilities])[np.arange(len(answers)), :, answers]
    bins = held_frequency(ends[:, 0], ends[:, 1], answers == rows.truth)
    return {"width": float((ends[:, 1] - ends[:, 0]).mean()), "bins": bins}


def _flagged(played: Played, known: NearestKnown | KnownClasses | None) -> Interval | None:
    """The share of test scans, with the interval of as many answers as there are subjects."""
    if known is None:
        return None
    rows = np.stack([played.features(record.key).scan for record in played.contest.tested]).astype(np.float64)
    strange = known.apply(rows).flagged
    return wilson_interval(float(strange.mean()), len(played.contest.subjects))
