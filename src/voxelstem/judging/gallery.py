"""The pictures of an evaluation: how each run answered beside its baselines, and its worst and best cases."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from voxelstem.answers import Answer
from voxelstem.features import examples_of
from voxelstem.heads.survival import Watched
from voxelstem.judging.contest import Repeats
from voxelstem.judging.evidence import Played
from voxelstem.judging.hits import RATE, count, painted, thresholds_of
from voxelstem.metrics import Score
from voxelstem.report import page
from voxelstem.report.agreement import Estimated, agreement_picture
from voxelstem.report.cases import Case, answers_log_loss, case_picture, cases_section, choose, log_loss
from voxelstem.report.curves import froc_picture, precision_recall_picture, reliability_picture, roc_picture
from voxelstem.report.dots import structures_picture
from voxelstem.report.figures import Picture
from voxelstem.report.survival import kaplan_meier_picture
from voxelstem.report.sweeps import Judged
from voxelstem.store import Record
from voxelstem.tasks.classify import Classify
from voxelstem.tasks.detect import Detect
from voxelstem.tasks.regress import Regress
from voxelstem.tasks.retrieve import Retrieve
from voxelstem.tasks.segment import Segment, numbered, of_kind
from voxelstem.tasks.survive import Survive
from voxelstem.truth import is_aligned

CASES = 2
"""Of each kind that are shown."""
CONTESTANTS = 5
"""In one picture."""
FEWEST = 4
"""Held-out subjects that are told apart into worst and best."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Figure:
    """By what cases are chosen."""

    name: str
    of: Callable[[Any], float]
    """NaN of whom nothing can be said: they stand in neither list."""
    less_is_better: bool
    counted: bool = False
    """Whether it counts something."""
    unsaid: str = ""
    """Why nothing can be said of some."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shown:
    """What is shown of a run's answers."""

    pictures: list[Picture]
    lacking: list[str]
    """Which pictures there are none of, and why."""


def gallery(played: Played, repeats: Mapping[str, Repeats], table: Sequence[Score], head: Any) -> list[page.Section]:
    """Sections with the pictures of one run; `repeats` hold its own answers first, `table` its lines and those beside.

    Which pictures there cannot be stands there in words.
    """
    task: Any = played.contest.task
    title = f"Pictures: {played.name}"
    if is_aligned(task):
        return [page.section(title, page.bullets(["no picture: answers by prompts are shown in figures alone"]))]
    shown = _answers(played, dict(list(repeats.items())[:CONTESTANTS]), table, head)
    cases, lacking = _cases(played, head)
    lines = [f"no picture {line}" for line in (*shown.lacking, *lacking)]
    parts = [*map(page.picture, shown.pictures), *([page.bullets(lines)] if lines else [])]
    return [*([page.section(title, *parts)] if parts else []), *cases]


def _answers(played: Played, some: Mapping[str, Repeats], table: Sequence[Score], head: Any) -> _Shown:
    """How the run and what it must beat answered, in the way of its task."""
    task: Any = played.contest.task
    if isinstance(task, Classify):
        return _of_classes(played, some)
    if isinstance(task, Detect):
        return _of_boxes(played, some)
    pictures: list[Picture] = []
    if isinstance(task, Regress):
        several = [
            Estimated.of(name, {s: [(o.truth, o.predicted) for o in own] for s, own in one.items()})
            for name, one in some.items()
        ]
        pictures = [agreement_picture(several, about=played.name, unit=_unit(task))]
    elif isinstance(task, Survive):
        pictures = [_of_times(played, head)]
    elif isinstance(task, Segment):
        pictures = [structures_picture(table, "dice")]
    why = "of all answers together: a list of like cases has no curve, and its figures stand in the table"
    return _Shown(pictures=pictures, lacking=[] if pictures else [why])


def _of_classes(played: Played, repeats: Mapping[str, Repeats]) -> _Shown:
    """Curves of each class, or of the second where there are two; none of a class that nobody or everybody has.

    Where each class is there or not, they are of those of whom that is known.
    """
    classes = played.contest.classes
    found: list[Picture] = []
    lacking: list[str] = []
    several = len(classes) > 2 or bool(played.contest.truth.findings)  # noqa: PLR2004 - the usual yes or no
    for at in range(len(classes)) if several else (len(classes) - 1,):
        told = {name: _told_of(at, one) for name, one in repeats.items()}
        if not all(told.values()):
            lacking.append(f"of '{classes[at]}': of no test subject is known whether it is there")
            continue
        judged = [Judged.of(name, by_subject) for name, by_subject in told.items()]
        if 0 < judged[0].truth.sum() < len(judged[0].truth):
            about = f"{played.name}: {classes[at]}"
            pictures = (roc_picture, precision_recall_picture, reliability_picture)
            found += [draw(judged, about=about) for draw in pictures]
        else:
            who = "every" if judged[0].truth.all() else "no"
            lacking.append(f"of '{classes[at]}': {who} test subject of whom that is known has it")
    return _Shown(pictures=found, lacking=lacking)


def _of_boxes(played: Played, repeats: Mapping[str, Repeats]) -> _Shown:
    """The FROC curve of each class of which there is anything to be found."""
    found: list[Picture] = []
    lacking: list[str] = []
    for name in played.contest.classes:
        told = {who: {s: [o.by_class[name] for o in own] for s, own in one.items()} for who, one in repeats.items()}
        if any(matched.truths for own in told[played.name].values() for matched in own):
            found.append(froc_picture(told, about=f"{played.name}: {name}"))
        else:
            lacking.append(f"of '{name}': no test subject has any")
    return _Shown(pictures=found, lacking=lacking)


def _told_of(at: int, repeats: Repeats) -> dict[str, list[tuple[bool, float]]]:
    """Of subjects of whom it is known: whether a class is true of them, and how probable it was in each repeat."""
    if not all(isinstance(own[0], Answer) for own in repeats.values()):
        return {s: [(o.truth == at, o.scores[at]) for o in own] for s, own in repeats.items()}
    return {
        s: [(bool(o.truth[at]), o.scores[at]) for o in own]
        for s, own in repeats.items()
        if not np.isnan(own[0].truth[at])
    }


def _loss_of(one: Any) -> float:
    """Minus the logarithm of the probability of what is true; of many classes the mean over those that are known."""
    if not isinstance(one, Answer):
        return log_loss(one.truth, one.scores)
    return answers_log_loss(one.truth, one.scores)


def _of_times(played: Played, head: Any) -> Picture:
    """Groups by the median risk of the labelled subjects, which is fixed before anybody is tested."""
    task: Any = played.contest.task
    known: dict[str, list[float]] = {}
    for record in played.contest.labelled:
        known.setdefault(record.subject, []).append(task.answer(head, played.features(record.key)).risk)
    threshold = float(np.median([np.mean(risks) for risks in known.values()]))
    subjects = sorted(played.outcomes)
    return kaplan_meier_picture(
        Watched.of(played.outcomes[subject].truth for subject in subjects),
        np.array([played.outcomes[subject].risk for subject in subjects]),
        threshold=threshold,
        name=played.name,
        unit="unit of the label file",
    )


def _figure_of(played: Played) -> _Figure:
    """By what the cases of a task are told apart."""
    task: Any = played.contest.task
    if isinstance(task, Classify):
        return _Figure(name="log loss", of=_loss_of, less_is_better=True)
    if isinstance(task, Regress):
        return _Figure(name="absolute error", of=lambda one: abs(one.truth - one.predicted), less_is_better=True)
    if isinstance(task, Survive):
        return _Figure(
            name="the subject's part of the integrated Brier score",
            of=lambda one: one.brier if one.truth.event or one.alive[-1] else math.nan,
            less_is_better=True,
            unsaid="they were lost from sight before the horizon, and how well they were foretold is not known",
        )
    if isinstance(task, Detect):
        thresholds = thresholds_of(played.outcomes)
        return _Figure(
            name=f"missed things and false boxes, at {RATE:g} false positive of each class per scan",
            of=lambda one: float(count(one, thresholds).errors),
            less_is_better=True,
            counted=True,
        )
    if isinstance(task, Retrieve):
        return _Figure(name="average precision", of=lambda one: one.average_precision, less_is_better=False)
    return _Figure(
        name="mean Dice",
        of=lambda one: float(np.mean(list(of_kind(one, "dice").values()))) if one else math.nan,
        less_is_better=False,
        unsaid="none of the structures is there",
    )


def _cases(played: Played, head: Any) -> tuple[list[page.Section], list[str]]:
    """The section of worst and best cases, or why there is none."""
    figure = _figure_of(played)
    every = {subject: figure.of(one) for subject, one in played.outcomes.items()}
    figures = {subject: value for subject, value in every.items() if np.isfinite(value)}
    left = len(every) - len(figures)
    why = f"{left} of {len(every)} test subjects stand in neither list: {figure.unsaid or 'they have no such figure'}"
    if len(figures) < FEWEST:
        said = f"of worst and best cases: {len(figures)} test subjects can be told apart, {FEWEST} are the least"
        return [], [f"{said}; {why}" if left else said]
    chosen = choose(figures, CASES, less_is_better=figure.less_is_better)
    first: dict[str, Record] = {}
    for record in played.contest.tested:
        first.setdefault(record.subject, record)
    sides: list[list[Picture]] = []
    for word, names in (("worst", chosen.worst), ("best", chosen.best)):
        cases = [replace(_case(played, head, first[name], figures[name]), counted=figure.counted) for name in names]
        sides.append(
            [
                case_picture(case, metric=figure.name, place=f"{word} {place} of {len(figures)}")
                for place, case in enumerate(cases, 1)
            ]
        )
    made = cases_section(*sides, metric=figure.name, title=f"Worst and best cases: {played.name}")
    return [replace(made, body=made.body + page.paragraph(f"{why}.")) if left else made], []


def _case(played: Played, head: Any, record: Record, value: float) -> Case:
    task: Any = played.contest.task
    contest, scan = played.contest, played.contest.store.volume(record.key)
    if isinstance(task, Segment | Detect):
        return _outlined(played, head, record, value)
    outcome = played.outcomes[record.subject]
    if isinstance(task, Classify):
        chances = dict(zip(contest.classes, outcome.scores, strict=True))
        true = (
            tuple(name for name, there in zip(contest.classes, outcome.truth, strict=True) if there == 1)
            if isinstance(outcome, Answer)
            else (contest.classes[outcome.truth],)
        )
        return Case(key=record.key, figure=value, scan=scan, chances=chances, true_classes=true)
    if isinstance(task, Retrieve):
        near = zip(contest.classes, outcome.shares, strict=True)
        found = ", ".join(f"{share:.0%} {name}" for name, share in near if share)
        said = {"true": contest.classes[outcome.truth], f"of the nearest {task.k}": found}
    elif isinstance(task, Survive):
        said = _foretold(outcome, head)
    else:
        said = {"true": f"{outcome.truth:.4g}", "predicted": f"{outcome.predicted:.4g} {_unit(task)}".rstrip()}
    return Case(key=record.key, figure=value, scan=scan, said=said)


def _unit(task: Regress) -> str:
    """The unit as it is told: a plain number has none, and "17.81 1" would be read as two."""
    return "" if task.unit == "1" else task.unit


def _foretold(outcome: Any, head: Any) -> dict[str, str]:
    """What came, and what chance was given that it had not come by then, or by the horizon where that is nearer."""
    moments, truth = head.arrays["moments"], outcome.truth
    by = min(truth.time, float(moments[-1]))
    chance = float(np.interp(by, moments, outcome.chances))
    came = f"event at {truth.time:.4g}" if truth.event else f"none until {truth.time:.4g}"
    return {"true": came, "predicted": f"{chance:.0%} none by {by:.4g}", "risk": f"{outcome.risk:.3g}"}


def _outlined(played: Played, head: Any, record: Record, value: float) -> Case:
    """A case with the voxels of what is there and of what was said."""
    contest, task = played.contest, played.contest.task
    scan = contest.store.volume(record.key)
    (example,) = examples_of(contest.store, [record], contest.truth, played.features, task)
    assert example.labels is not None
    truth = numbered(example.labels, contest.classes)
    if isinstance(task, Segment):
        marked = task.predict(head, example.features, record.affine_ras, record.shape_ijk)
        return Case(key=record.key, figure=value, scan=scan, truth=truth, predicted=marked.array)
    assert isinstance(task, Detect)
    thresholds = thresholds_of(played.outcomes)
    boxes = task.predict(head, example.features, record.affine_ras, record.shape_ijk)
    drawn = [box for box in boxes if box.score >= thresholds[box.name]]
    counted = count(played.outcomes[record.subject], thresholds)
    said = {"found": f"{counted.found} of {counted.found + counted.missed}", "false boxes": f"{counted.false}"}
    predicted = painted(drawn, record.affine_ras, record.shape_ijk)
    return Case(key=record.key, figure=value, scan=scan, truth=truth, predicted=predicted, said=said)
