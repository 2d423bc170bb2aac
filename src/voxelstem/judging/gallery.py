"""The pictures of an evaluation: how each run answered beside its baselines, and its worst and best cases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from voxelstem.answers import Answer
from voxelstem.features import examples_of
from voxelstem.heads.survival import Watched
from voxelstem.judging.contest import Repeats
from voxelstem.judging.evidence import Played
from voxelstem.metrics import Score
from voxelstem.report import page
from voxelstem.report.agreement import Estimated, agreement_picture
from voxelstem.report.cases import Case, answers_log_loss, case_picture, cases_section, choose, log_loss
from voxelstem.report.curves import precision_recall_picture, reliability_picture, roc_picture
from voxelstem.report.dots import structures_picture
from voxelstem.report.figures import Picture
from voxelstem.report.survival import kaplan_meier_picture
from voxelstem.report.sweeps import Judged
from voxelstem.store import Record
from voxelstem.tasks.classify import Classify
from voxelstem.tasks.regress import Regress
from voxelstem.tasks.retrieve import Retrieve
from voxelstem.tasks.segment import Segment, numbered, of_kind
from voxelstem.tasks.survive import Survive

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
    less_is_better: bool


def gallery(played: Played, repeats: Mapping[str, Repeats], table: Sequence[Score], head: Any) -> list[page.Section]:
    """Sections with the pictures of one run; `repeats` hold its own answers first, `table` its lines and those beside.

    A task of another kind has none.
    """
    task: Any = played.contest.task
    some = dict(list(repeats.items())[:CONTESTANTS])
    pictures: list[Picture] = []
    if isinstance(task, Classify):
        pictures = _of_classes(played, some)
    elif isinstance(task, Regress):
        several = [
            Estimated.of(name, {s: [(o.truth, o.predicted) for o in own] for s, own in one.items()})
            for name, one in some.items()
        ]
        pictures = [agreement_picture(several, about=played.name, unit=task.unit)]
    elif isinstance(task, Survive):
        pictures = [_of_times(played, head)]
    elif isinstance(task, Segment):
        pictures = [structures_picture(table, "dice")]
    sections = [page.section(f"Pictures: {played.name}", *map(page.picture, pictures))] if pictures else []
    return [*sections, *_cases(played, head)]


def _of_classes(played: Played, repeats: Mapping[str, Repeats]) -> list[Picture]:
    """Curves of each class, or of the second where there are two; none of a class that nobody or everybody has.

    Where each class is there or not, they are of those of whom that is known.
    """
    classes = played.contest.classes
    found: list[Picture] = []
    several = len(classes) > 2 or bool(played.contest.truth.findings)  # noqa: PLR2004 - the usual yes or no
    for at in range(len(classes)) if several else (len(classes) - 1,):
        told = {name: _told_of(at, one) for name, one in repeats.items()}
        if not all(told.values()):
            continue
        judged = [Judged.of(name, by_subject) for name, by_subject in told.items()]
        if 0 < judged[0].truth.sum() < len(judged[0].truth):
            about = f"{played.name}: {classes[at]}"
            pictures = (roc_picture, precision_recall_picture, reliability_picture)
            found += [draw(judged, about=about) for draw in pictures]
    return found


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


def _figure_of(task: Any) -> _Figure | None:
    if isinstance(task, Classify):
        return _Figure(name="log loss", of=_loss_of, less_is_better=True)
    if isinstance(task, Regress):
        return _Figure(name="absolute error", of=lambda one: abs(one.truth - one.predicted), less_is_better=True)
    if isinstance(task, Retrieve):
        return _Figure(name="average precision", of=lambda one: one.average_precision, less_is_better=False)
    if isinstance(task, Segment):
        return _Figure(
            name="mean Dice",
            of=lambda one: float(np.mean(list(of_kind(one, "dice").values()))) if one else float("nan"),
            less_is_better=False,
        )
    return None


def _cases(played: Played, head: Any) -> list[page.Section]:
    figure = _figure_of(played.contest.task)
    if figure is None or len(played.outcomes) < FEWEST:
        return []
    figures = {subject: figure.of(one) for subject, one in played.outcomes.items()}
    figures = {subject: value for subject, value in figures.items() if np.isfinite(value)}
    chosen = choose(figures, CASES, less_is_better=figure.less_is_better)
    first: dict[str, Record] = {}
    for record in played.contest.tested:
        first.setdefault(record.subject, record)
    sides: list[list[Picture]] = []
    for word, names in (("worst", chosen.worst), ("best", chosen.best)):
        cases = [_case(played, head, first[name], figures[name]) for name in names]
        sides.append(
            [
                case_picture(case, metric=figure.name, place=f"{word} {place} of {len(figures)}")
                for place, case in enumerate(cases, 1)
            ]
        )
    return [cases_section(*sides, metric=figure.name, title=f"Worst and best cases: {played.name}")]


def _case(played: Played, head: Any, record: Record, value: float) -> Case:
    task: Any = played.contest.task
    contest, scan = played.contest, played.contest.store.volume(record.key)
    if isinstance(task, Segment):
        (example,) = examples_of(contest.store, [record], contest.truth, played.features, task)
        assert example.labels is not None
        marked = task.predict(head, example.features, record.affine_ras, record.shape_ijk)
        truth = numbered(example.labels, contest.classes)
        return Case(key=record.key, figure=value, scan=scan, truth=truth, predicted=marked.array)
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
        return Case(key=record.key, figure=value, scan=scan, said=said)
    said = {"true": f"{outcome.truth:.4g}", "predicted": f"{outcome.predicted:.4g} {task.unit}"}
    return Case(key=record.key, figure=value, scan=scan, said=said)
