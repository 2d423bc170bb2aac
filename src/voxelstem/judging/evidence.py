"""What stands beside scores: whether probabilities come true, which scans are strange, which of two runs is better."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from voxelstem import metrics
from voxelstem.adapted import Adapted
from voxelstem.answers import Answer, shares
from voxelstem.certainty.assurance import Assurance, groups_each
from voxelstem.certainty.calibration import CalibrationFigure, wilson_interval
from voxelstem.certainty.crossfit import rows_of, scale_of
from voxelstem.certainty.strangeness import KnownClasses, NearestKnown
from voxelstem.certainty.thresholds import coverage
from voxelstem.certainty.vennabers import held_frequency
from voxelstem.certainty.volumes import Sizes
from voxelstem.features import FeaturesOf
from voxelstem.finetune.tune import strangeness_of
from voxelstem.judging.claims import FIGURES, Told, calibrated, claims_of, ends_of_each, figures_of_each
from voxelstem.judging.contest import Contest, Outcomes, Repeats, once
from voxelstem.judging.groups import groups_of
from voxelstem.judging.volumes import subjects_of_each, volumes_held
from voxelstem.metrics import FEWEST_SUBJECTS, Interval
from voxelstem.report.evidence import Compared, Ends, Prevalence, Sureness, VolumesHeld
from voxelstem.tasks.detect import Detected

NONE = "the run has none"


@dataclass(frozen=True, kw_only=True, slots=True)
class Played:
    """A run that was scored on the test subjects."""

    name: str
    task: str
    contest: Contest
    outcomes: Outcomes
    assurance: Assurance
    features: FeaturesOf
    sizes: Mapping[str, Sequence[Sizes]] = field(default_factory=dict[str, Sequence[Sizes]])
    """Structures of each test subject's scans, as marked and as drawn, where the run has intervals of volumes."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Held:
    """Whose truth the sets or intervals held, in the order of subjects."""

    truth: Bool[np.ndarray, "subject"]
    sizes: Float[np.ndarray, "subject"]
    """How many classes each set holds; NaN of intervals."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Claimed:
    """What was said to be there, and how that came true."""

    stated: Mapping[str, Interval] = field(default_factory=dict[str, Interval])
    calibrated: Mapping[str, Interval] = field(default_factory=dict[str, Interval])
    ends: Mapping[str, Ends] = field(default_factory=dict[str, Ends])
    boxes: int = 0
    lacking: Mapping[str, str] = field(default_factory=dict[str, str])
    """What was not measured, and why."""


def sureness(played: Played) -> Sureness:
    """Measure a run's own statements about how sure it is, as `predict` states them."""
    sure, outcomes = played.assurance, played.outcomes
    stated: Mapping[str, Interval] = {}
    after_all: Mapping[str, Interval] = {}
    held: _Held | None = None
    first = next(iter(outcomes.values()))
    subjects = sorted(outcomes)
    claimed, volumes = _claimed(sure, outcomes), volumes_held(sure, played.sizes)
    if isinstance(first, Answer | Detected):
        stated, after_all = claimed.stated, claimed.calibrated
    elif hasattr(first, "scores") and hasattr(first, "truth") and isinstance(first.truth, int):
        stated = _figures(once(outcomes))
        after = {name: replace(one, scores=_chances(sure, one.scores)) for name, one in outcomes.items()}
        after_all = _figures(once(after)) if sure.calibrator is not None else {}
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
        calibrated=after_all,
        covered=None if held is None else coverage(held.truth, subjects).overall,
        level=None if held is None else _level(sure),
        set_size=None if held is None or np.isnan(held.sizes).any() else float(held.sizes.mean()),
        flagged=_flagged(played, sure.known or sure.inside),
        notes=sure.notes,
        by_group=by_group,
        **_between(sure, outcomes),
        flagged_by_centres=_flagged(played, played.assurance.centres),
        ends=claimed.ends,
        boxes=claimed.boxes,
        volumes=volumes,
        unmeasured={**claimed.lacking, **_volumes_lacking(played, volumes)},
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


def _claimed(sure: Assurance, outcomes: Outcomes) -> _Claimed:
    """Answers of yes or no, and boxes; of other tasks nothing."""
    first = next(iter(outcomes.values()))
    if not isinstance(first, Answer | Detected):
        return _Claimed()
    boxes = isinstance(first, Detected)
    told = {subject: claims_of(one) for subject, one in outcomes.items()}
    ends, lacking = ends_of_each(sure, told), _ends_lacking(sure, told, "a box" if boxes else "yes or no")
    have = sum(len(own) > 0 for own in told.values())
    if boxes and have < FEWEST_SUBJECTS:
        lacking = {"how often boxes are right that are said to be": _too_few(have)} | lacking
        return _Claimed(ends=ends, lacking=lacking)
    after = {} if sure.yesno is None else {who: calibrated(sure, own) for who, own in told.items()}
    if boxes and sure.yesno is not None:  # no probability is stated of boxes of the others
        after = {who: {name: own[name] for name in own if name in sure.yesno.names} for who, own in after.items()}
    return _Claimed(
        stated=figures_of_each(told),
        calibrated=figures_of_each(after) if any(after.values()) else {},
        ends=ends,
        boxes=sum(len(one.chances) for own in told.values() for one in own.values()) if boxes else 0,
        lacking=lacking,
    )


def _ends_lacking(sure: Assurance, told: Mapping[str, Told], what: str) -> dict[str, str]:
    about = f"intervals of the probability of {what}"
    if sure.yesno is None:
        return {about: NONE}
    have = {name: sum(name in own for own in told.values()) for name in sure.yesno.names}
    return {f"{about}, '{name}'": _too_few(count) for name, count in have.items() if count < FEWEST_SUBJECTS}


def _volumes_lacking(played: Played, held: VolumesHeld | None) -> dict[str, str]:
    about, sure = "how often intervals of volumes hold the true volume", played.assurance
    if not hasattr(played.contest.task, "mark"):
        return {}
    if sure.volumes is None:
        return {about: NONE}
    have = subjects_of_each(sure, played.sizes)
    if held is None:
        return {about: _too_few(max(have.values(), default=0))}
    return {f"{about}, '{name}'": _too_few(count) for name, count in have.items() if count < FEWEST_SUBJECTS}


def _too_few(subjects: int) -> str:
    return f"{subjects} test subjects have any, {FEWEST_SUBJECTS} are the least"


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
    keys = [record.key for record in played.contest.tested]
    rows = np.stack([strangeness_of(played.features, key) for key in keys]).astype(np.float64)
    strange = known.apply(rows).flagged
    return wilson_interval(float(strange.mean()), len(played.contest.subjects))
