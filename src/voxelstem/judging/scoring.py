"""Scores: outcomes of contestants on the same subjects, as lines of a table with intervals and paired differences."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from voxelstem import metrics
from voxelstem.features import FeaturesOf
from voxelstem.judging.contest import Contest, Outcomes, Repeats, remembered
from voxelstem.metrics import Score
from voxelstem.progress import progress
from voxelstem.study import InputSpec
from voxelstem.truth import class_names, draw

REFERENCES = ("scratch", "intensity")
"""Beside whom everybody is put, where they take part."""


def few_label_table(
    contest: Contest,
    contestants: Mapping[str, Sequence[Callable[[], FeaturesOf]]],
    *,
    task: str,
    budgets: Sequence[int] = (1, 2, 5),
    draws: int = 3,
    atlas: InputSpec | None = None,
) -> list[Score]:
    """Label efficiency: every contestant at every budget, averaged over draws of the labelled subjects.

    `contestants` maps a name to one maker of features for each of its seeds. A maker is called once and
    its features are kept in memory while it is its turn; heads are refitted for every budget and draw.
    `contest.labelled` is not used. With `atlas` (the InputSpec), the nearest atlas competes too.
    """
    repeats: dict[int, dict[str, list[Outcomes]]] = {budget: {} for budget in budgets}
    rounds = {(budget, index): _with_draw(contest, budget, index) for budget in budgets for index in range(draws)}
    turns = [(name, maker) for name, makers in contestants.items() for maker in makers]
    with progress("few labels", len(rounds) * (len(turns) + (atlas is not None))) as advance:
        for name, maker in turns:
            features = remembered(maker())
            for (budget, _), drawn in rounds.items():
                repeats[budget].setdefault(name, []).append(drawn.fit_and_score(features))
                advance(1, note=f"{name}, {budget} labelled")
        for (budget, _), drawn in rounds.items() if atlas is not None else ():
            repeats[budget].setdefault("atlas", []).append(drawn.atlas(atlas or InputSpec()))
            advance(1, note="atlas")
    scores: list[Score] = []
    for budget, by_name in repeats.items():
        joined = {
            name: {subject: tuple(outcome[subject] for outcome in outcomes) for subject in outcomes[0]}
            for name, outcomes in by_name.items()
        }
        scores += table_of(rounds[budget, 0], joined, task=task, budget=budget)
    return scores


def table_of(contest: Contest, repeats: Mapping[str, Repeats], *, task: str, budget: int | None) -> list[Score]:
    """Turn outcomes into scores with subject-level intervals and paired differences to the references."""
    scores: list[Score] = []
    parts = contest.classes if contest.task.voxels or contest.truth.findings else ()
    for metric in contest.task.metrics:
        statistic = metrics.averaged(contest.task.statistic(metric))
        for name, own in repeats.items():
            over = {
                other: metrics.paired_difference(own, repeats[other], statistic)
                for other in REFERENCES
                if other in repeats and other != name
            }
            value = metrics.bootstrap_interval(own, statistic)
            few = value.subjects < metrics.FEWEST_SUBJECTS and contest.task.voxels
            scores.append(
                Score(
                    name=name,
                    task=task,
                    mode=contest.mode,
                    metric=metric,
                    budget=budget,
                    labelled=len({record.subject for record in contest.labelled}),
                    repeats=len(next(iter(own.values()))),
                    value=value,
                    over_scratch=over.get("scratch"),
                    over_intensity=over.get("intensity"),
                    parts=_parts(contest, metric, parts, own),
                    each=tuple(statistic([own[subject]]) for subject in sorted(own)) if few else (),
                )
            )
    return scores


def _with_draw(contest: Contest, budget: int, index: int) -> Contest:
    labelled = draw(contest.truth, budget, index, voxels=contest.task.voxels)
    classes = contest.classes or class_names(contest.truth, labelled, voxels=contest.task.voxels)
    return dataclasses.replace(contest, labelled=labelled, classes=classes, seed=index)


def _parts(contest: Contest, metric: str, organs: tuple[str, ...], own: Repeats) -> dict[str, metrics.Interval]:
    """The figure of each organ, or of each class that is there or not, over the subjects whose truth holds it."""
    parts: dict[str, metrics.Interval] = {}
    for organ in organs:
        having = {subject: outcomes for subject, outcomes in own.items() if organ in outcomes[0]}
        if having:
            statistic = metrics.averaged(contest.task.statistic(f"{metric}:{organ}"))
            parts[organ] = metrics.bootstrap_interval(having, statistic)
    return parts
