"""What stands beside scores: whether probabilities come true, which scans are strange, which of two runs is better."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from voxelstem import metrics
from voxelstem.adapted import Adapted
from voxelstem.answers import shares
from voxelstem.certainty.assurance import Assurance
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


def sureness(played: Played) -> Sureness:
    """Measure a run's own statements about how sure it is."""
    sure, outcomes = played.assurance, played.outcomes
    stated: dict[str, Interval] = {}
    calibrated: dict[str, Interval] = {}
    held: np.ndarray | None = None
    size: float | None = None
    first = next(iter(outcomes.values()))
    subjects = sorted(outcomes)
    if hasattr(first, "scores") and hasattr(first, "truth") and isinstance(first.truth, int):
        stated = _figures(once(outcomes))
        after = {name: replace(one, scores=_chances(sure, one.scores)) for name, one in outcomes.items()}
        calibrated = _figures(once(after)) if sure.calibrator is not None else {}
        if sure.sets is not None:
            rows = rows_of(after)
            sets = sure.sets.apply(rows.probabilities)
            held, size = sets.holds(rows.truth), float(sets.sizes.mean())
    elif hasattr(first, "predicted") and sure.intervals is not None:
        predicted, truth = (
            np.array([getattr(outcomes[name], side) for name in subjects], dtype=np.float64)
            for side in ("predicted", "truth")
        )
        held = sure.intervals.apply(predicted).holds(truth)
    by_group: dict[str, Mapping[str, Interval]] = {}
    if held is not None:
        told = groups_of(played.contest.tested)
        by_group |= {f: coverage(held, subjects, groups=[of[s] for s in subjects]).by_group for f, of in told.items()}
    return Sureness(
        run=played.name,
        subjects=sure.subjects,
        stated=stated,
        calibrated=calibrated,
        covered=None if held is None else coverage(held, subjects).overall,
        level=None if held is None else _level(sure),
        set_size=size,
        flagged=_flagged(played, played.assurance.known),
        notes=sure.notes,
        by_group=by_group,
        **_between(sure, outcomes),
        flagged_by_centres=_flagged(played, played.assurance.centres),
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
    """A scan at a time: their share, as if each were one more subject."""
    if known is None:
        return None
    rows = np.stack([played.features(record.key).scan for record in played.contest.tested]).astype(np.float64)
    strange = known.apply(rows).flagged
    return wilson_interval(float(strange.mean()), len(played.contest.subjects))
