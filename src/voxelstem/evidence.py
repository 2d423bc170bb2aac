"""What stands beside scores: whether probabilities come true, which scans are strange, which of two runs is better."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from voxelstem import metrics
from voxelstem.adapted import Adapted
from voxelstem.assurance import Assurance
from voxelstem.calibration import CalibrationFigure, wilson_interval
from voxelstem.contest import Contest, Outcomes, Repeats, once
from voxelstem.crossfit import rows_of, scale_of
from voxelstem.features import FeaturesOf
from voxelstem.metrics import Interval
from voxelstem.report.evidence import Compared, Prevalence, Sureness
from voxelstem.thresholds import coverage

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
    return Sureness(
        run=played.name,
        subjects=sure.subjects,
        stated=stated,
        calibrated=calibrated,
        covered=None if held is None else coverage(held, subjects).overall,
        level=None if held is None else _level(sure),
        set_size=size,
        flagged=_flagged(played),
        notes=sure.notes,
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


def prevalence(played: Played) -> Prevalence | None:
    """Shares of classes among subjects, where scans have one class each."""
    told = played.contest.truth.labels
    if not told or not played.contest.labelled:
        return None
    sides = (sorted({record.subject for record in played.contest.labelled}), played.contest.subjects)
    counts = [Counter(told[subject] for subject in side) for side in sides]
    labelled, tested = (
        {name: count[name] / max(count.total(), 1) for name in played.contest.classes} for count in counts
    )
    return Prevalence(run=played.name, labelled=labelled, tested=tested)


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


def _flagged(played: Played) -> Interval | None:
    """A scan at a time: their share, as if each were one more subject."""
    known = played.assurance.known
    if known is None:
        return None
    rows = np.stack([played.features(record.key).scan for record in played.contest.tested]).astype(np.float64)
    strange = known.apply(rows).flagged
    return wilson_interval(float(strange.mean()), len(played.contest.subjects))
