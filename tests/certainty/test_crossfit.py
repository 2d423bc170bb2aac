from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from tests.draws import counts_of
from tests.madeup import Counting, Memory, Seen, classed, example

from voxelstem import metrics
from voxelstem.certainty.calibrators import fit_temperature, log_probabilities
from voxelstem.certainty.conformal import fit_sets
from voxelstem.certainty.crossfit import (
    SCALES,
    CrossFitted,
    Figure,
    Unseen,
    answering,
    as_facts,
    cross_fit,
    out_of_fold,
    rows_of,
    scale_of,
    seed_of,
)
from voxelstem.certainty.folds import Folds, draw_folds, plan_folds, strata_of
from voxelstem.protocols import Example, Task
from voxelstem.study import LabelMap, Survival
from voxelstem.tasks import TASKS
from voxelstem.tasks.classify import Classify, Guess
from voxelstem.tasks.regress import Regress
from voxelstem.tasks.segment import Segment
from voxelstem.tasks.survive import Survive

CLASSES = ("no", "yes")
PLAIN = Classify(folds=99)
"""Too few subjects for it to choose its C, which takes time."""


def cloud(count: int, *, gap: float, seed: int = 0, scans: int = 1) -> list[Example]:
    """Subjects of two classes whose first feature differs by `gap`."""
    rng = np.random.default_rng(seed)
    return [
        example(
            f"s{place:03d}",
            key=f"{place} {scan}",
            scan=rng.normal(size=6) + gap * (place % 2) * np.eye(6)[0],
            label=CLASSES[place % 2],
        )
        for place in range(count)
        for scan in range(scans)
    ]


def fitted(task: Task, examples: list[Example], classes: tuple[str, ...], *, count: int, repeats: int) -> CrossFitted:
    plan = plan_folds(strata_of(examples, classes), count=count, repeats=repeats, seed=0)
    return cross_fit(answering(task, examples, classes, mode=task.modes[0]), plan, seed=0)


@pytest.mark.parametrize("whim", [0.0, 0.1])
def test_who_knows_subjects_by_heart_scores_at_chance_out_of_fold(whim: float) -> None:
    task, examples = Memory(whim=whim), classed(no=61, yes=40)
    head = task.fit(examples, CLASSES, mode="probe", seed=0)
    assert task.statistic("auroc")([task.outcome(head, one) for one in examples]) == 1.0
    auroc = fitted(task, examples, CLASSES, count=5, repeats=3).figure(task, "auroc")
    assert auroc.low is not None
    assert auroc.high is not None
    assert auroc.low <= 0.5 <= auroc.high
    assert auroc.estimate == pytest.approx(0.5, abs=0.12)


def test_scores_of_different_folds_are_not_ranked_against_each_other() -> None:
    # Where one more of a class is held out, one fewer was learned from: over all folds together, saying nothing but
    # how many there were would look worse than chance.
    task = Memory()
    found = fitted(task, classed(no=13, yes=12), CLASSES, count=5, repeats=4)
    pooled = metrics.bootstrap_interval(found.repeats, metrics.averaged(task.statistic("auroc")))
    assert pooled.high is not None
    assert pooled.high < 0.5
    assert found.figure(task, "auroc").estimate == 0.5


@dataclass
class Spy:
    """A classifier that keeps a list of the subjects whom each fit and each outcome saw."""

    inner: Classify
    fits: list[set[str]]
    asked: list[tuple[int, str]]
    modes = Classify.modes
    metrics = Classify.metrics
    voxels = False

    def fit(self, examples: Any, classes: tuple[str, ...], *, mode: str, seed: int) -> Any:
        self.fits.append({one.subject for one in examples})
        head = self.inner.fit(examples, classes, mode=mode, seed=seed)
        return replace(head, facts={**head.facts, "fit": float(len(self.fits) - 1)})

    def outcome(self, head: Any, example: Example) -> Any:
        self.asked.append((int(head.facts["fit"]), example.subject))
        return self.inner.outcome(head, example)

    def combine(self, outcomes: Any) -> Any:
        return self.inner.combine(outcomes)

    def statistic(self, metric: str) -> Any:
        return self.inner.statistic(metric)


def test_a_fit_and_all_that_it_chooses_see_nobody_who_is_held_out() -> None:
    spy = Spy(Classify(), [], [])
    found = fitted(spy, cloud(30, gap=2.0, scans=2), CLASSES, count=3, repeats=2)
    assert len(spy.fits) == 6
    assert all(subject not in spy.fits[fit] for fit, subject in spy.asked)
    everybody = {f"s{place:03d}" for place in range(30)}
    for repeat in range(2):
        asked = [subject for fit, subject in spy.asked if fit // 3 == repeat]
        assert sorted(asked) == sorted([*everybody, *everybody])
    assert found.count == 2


def test_out_of_fold_equals_fitting_by_hand() -> None:
    task, examples = PLAIN, cloud(24, gap=1.0, scans=2)
    folds = draw_folds(strata_of(examples, CLASSES), count=4, seed=3)
    found = out_of_fold(task, examples, CLASSES, mode="probe", seed=5, folds=folds)
    by_hand: dict[str, Any] = {}
    for fold, held in enumerate(folds.held):
        others = [one for one in examples if one.subject not in held]
        head = task.fit(others, CLASSES, mode="probe", seed=seed_of(5, 0, fold))
        for subject in held:
            own = [task.outcome(head, one) for one in examples if one.subject == subject]
            by_hand[subject] = Guess(truth=own[0].truth, scores=tuple(np.mean([one.scores for one in own], axis=0)))
    assert found.keys() == by_hand.keys()
    for subject, guess in found.items():
        assert guess.truth == by_hand[subject].truth
        assert guess.scores == pytest.approx(by_hand[subject].scores)


def test_every_repeat_fits_other_folds_with_another_seed() -> None:
    task = Counting(says=lambda _kept, _who, seed: float(seed))
    found = fitted(task, classed(no=6, yes=6), CLASSES, count=3, repeats=4)
    seeds = {one.outcome for own in found.by_subject.values() for one in own}
    assert len(seeds) == 12
    assert len(set(task.seen)) == 12
    assert found.outcomes(2) == {subject: own[2] for subject, own in found.repeats.items()}


def numbers(count: int) -> list[Example]:
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(count, 4))
    return [
        example(f"s{at:02d}", scan=row, value=float(70 + 10 * row[0] + rng.normal())) for at, row in enumerate(rows)
    ]


def fates(count: int) -> list[Example]:
    rng = np.random.default_rng(2)
    rows = rng.normal(size=(count, 4))
    times = rng.exponential(np.exp(-1.5 * rows[:, 0]))
    ends = rng.exponential(2.0, count)
    return [
        example(f"s{at:02d}", scan=row, survival=Survival(time=float(min(time, end)), event=bool(time <= end)))
        for at, (row, time, end) in enumerate(zip(rows, times, ends, strict=True))
    ]


def organs(count: int) -> list[Example]:
    rng, found = np.random.default_rng(3), []
    for at in range(count):
        truth = np.zeros((8, 8, 8), np.int16)
        truth[: 4 + at % 2] = 1
        cells = truth.reshape(4, 2, 4, 2, 4, 2).mean(axis=(1, 3, 5))
        tokens = np.stack([cells, 1 - cells, rng.normal(size=cells.shape)], axis=-1)
        affine = np.diag([2.0, 2.0, 2.0, 1.0])
        affine[:3, 3] = 0.5
        seen = Seen(np.zeros(1), tokens, affine)
        labels = LabelMap(array=truth, classes={1: "liver"})
        found.append(replace(example(f"s{at}", labels=labels), features=seen))
    return found


@pytest.mark.parametrize(
    ("task", "examples", "classes", "at_least"),
    [
        (PLAIN, cloud(40, gap=3.0), CLASSES, {"auroc": 0.9, "balanced_accuracy": 0.7}),
        (Regress(), numbers(40), (), {"mae": -3.0, "r": 0.9}),
        (Survive(fewest=1000), fates(40), (), {"harrell_c": 0.65, "uno_c": 0.6, "integrated_brier": -0.25}),
        (Segment(iterations=15), organs(4), ("liver",), {"dice": 0.9, "nsd": 0.5}),
    ],
    ids=["classify", "regress", "survive", "segment"],
)
def test_any_task_is_cross_fitted(
    task: Task, examples: list[Example], classes: tuple[str, ...], at_least: dict[str, float]
) -> None:
    found = fitted(task, examples, classes, count=2, repeats=2)
    assert set(task.metrics) == set(at_least)
    for metric, bound in at_least.items():
        figure = found.figure(task, metric)
        assert figure.estimate * (-1 if scale_of(metric).less_is_better else 1) > bound
        assert figure.low is not None
        assert figure.high is not None
        assert figure.low <= figure.estimate <= figure.high
        assert figure.subjects == len(examples)


def test_whether_more_is_better_is_known_of_every_metric_of_every_task() -> None:
    named = {metric for name in TASKS for metric in TASKS[name].metrics}
    assert named <= set(SCALES)
    assert scale_of("dice:liver") == SCALES["dice"]
    with pytest.raises(ValueError, match="whether more of 'speed' is better is not known"):
        scale_of("speed")


def test_a_margin_is_a_share_only_where_figures_have_the_unit_of_labels() -> None:
    assert scale_of("mae").margin(0.02, -50.0) == 1.0
    assert scale_of("auroc").margin(0.02, 50.0) == 0.02


def made(count: int, repeats: int, *, folds: int = 3, seed: int = 0) -> CrossFitted:
    rng = np.random.default_rng(seed)
    chances = rng.random((count, repeats))
    parts = np.stack([rng.permutation(np.arange(count) % folds) for _ in range(repeats)], axis=1)
    return CrossFitted(
        by_subject={
            f"s{at:02d}": tuple(
                Unseen(outcome=Guess(truth=at % 2, scores=(1 - chances[at, r], chances[at, r])), fold=int(parts[at, r]))
                for r in range(repeats)
            )
            for at in range(count)
        }
    )


def naive(sample: list[tuple[Unseen, ...]], statistic: Callable[[list[Any]], float]) -> float:
    """Repeat by repeat and fold by fold, each fold weighing as much as it has subjects."""
    figures = []
    for repeat in range(len(sample[0])):
        total, weight = 0.0, 0
        for fold in {own[repeat].fold for own in sample}:
            within = [own[repeat].outcome for own in sample if own[repeat].fold == fold]
            value = statistic(within)
            if not math.isnan(value):
                total, weight = total + len(within) * value, weight + len(within)
        figures.append(total / weight if weight else math.nan)
    return metrics.mean(figures)


def test_a_figure_within_folds_equals_loops() -> None:
    task, found = Classify(), made(14, 3)
    figure = Figure.of(task, "auroc")
    sample = list(found.by_subject.values())
    picks = np.random.default_rng(1).integers(0, 14, (25, 14))
    slow = [naive([sample[index] for index in row], task.statistic("auroc")) for row in picks.tolist()]
    assert figure.of_draws(sample, counts_of(picks, 14)) == pytest.approx(np.array(slow), nan_ok=True)
    assert figure(sample) == pytest.approx(naive(sample, task.statistic("auroc")))
    assert math.isnan(figure([]))


@pytest.mark.parametrize("metric", ["balanced_accuracy", "mae"])
def test_a_figure_over_all_folds_is_that_of_plain_repeats(metric: str) -> None:
    task: Task = Classify() if metric == "balanced_accuracy" else Counting(says=lambda *_: 0.0)
    found = made(12, 3)
    if metric == "mae":
        found = CrossFitted(
            by_subject={
                subject: tuple(replace(one, outcome=one.outcome.scores[1]) for one in own)
                for subject, own in found.by_subject.items()
            }
        )
    plain = metrics.bootstrap_interval(found.repeats, metrics.averaged(task.statistic(metric)))
    ours = found.figure(task, metric)
    assert (ours.estimate, ours.low, ours.high) == pytest.approx((plain.estimate, plain.low, plain.high))


def test_better_is_above_zero_also_where_less_is_better() -> None:
    by_who = {f"s{place}": float(place) for place in range(8)}
    plan = plan_folds(strata_of([example(who, value=1.0) for who in by_who], ()), count=2, repeats=2, seed=0)
    low, high = (
        cross_fit(lambda _kept, held, _seed, add=add: {who: by_who[who] + add for who in held}, plan, seed=0)
        for add in (0.0, 2.0)
    )
    task = Counting(says=lambda *_: 0.0)
    assert high.better_than(low, task, "dice").estimate == pytest.approx(2.0)
    assert low.better_than(high, task, "mae").estimate == pytest.approx(2.0)
    assert high.better_than(low, task, "mae").low == pytest.approx(-2.0)


def test_other_folds_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="same plan"):
        made(12, 2).better_than(made(12, 2, seed=1), Classify(), "auroc")


def test_rows_are_what_calibrators_and_sets_take() -> None:
    found = fitted(PLAIN, cloud(60, gap=1.5), CLASSES, count=5, repeats=2)
    rows = rows_of(found.outcomes(1))
    assert rows.subjects == tuple(sorted(found.by_subject))
    assert rows.truth.tolist() == [place % 2 for place in range(60)]
    assert rows.probabilities.shape == (60, 2)
    assert rows.probabilities[7].tolist() == pytest.approx(found.outcomes(1)["s007"].scores)
    calibrator = fit_temperature(log_probabilities(rows.probabilities), rows.truth)
    sets = fit_sets(calibrator.apply(rows.probabilities), rows.truth, level=0.8)
    assert sets.apply(rows.probabilities).holds(rows.truth).mean() >= 0.75
    with pytest.raises(ValueError, match="no outcome"):
        rows_of({})


def test_an_answer_must_name_everybody_who_is_held_out() -> None:
    plan = [Folds(held=(frozenset("ab"), frozenset("c")))]
    with pytest.raises(ValueError, match="a fold of 2 subjects needs their outcomes, got 1"):
        cross_fit(lambda *_: {"a": 1.0}, plan, seed=0)


def test_every_fold_is_reported() -> None:
    done: list[int] = []
    plan = [Folds(held=(frozenset("ab"), frozenset("c")))] * 2
    advance = lambda amount, **_: done.append(amount)  # noqa: E731
    cross_fit(lambda _kept, held, _seed: dict.fromkeys(held, 1.0), plan, seed=0, advance=advance)
    assert done == [1, 1, 1, 1]


@pytest.mark.parametrize(
    "plan", [[], [Folds(held=(frozenset("a"), frozenset("b"))), Folds(held=(frozenset("a"), frozenset("c")))]]
)
def test_a_plan_is_of_one_set_of_subjects(plan: list[Folds]) -> None:
    with pytest.raises(ValueError, match="all of the same subjects"):
        cross_fit(lambda *_: {}, plan, seed=0)


@pytest.mark.parametrize("repeats", [(), (0, 0), (1, 2)])
def test_uneven_repeats_are_refused(repeats: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="same number of repeats"):
        CrossFitted(by_subject={str(at): (Unseen(outcome=0, fold=0),) * count for at, count in enumerate(repeats)})


def test_facts_are_json_and_undefined_figures_become_none() -> None:
    facts = as_facts(metrics.Interval(estimate=math.nan, low=None, high=None, subjects=2))
    assert json.loads(json.dumps(facts, allow_nan=False))["estimate"] is None
