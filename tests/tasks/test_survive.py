from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from lifelines import CoxPHFitter
from tests.draws import counts_of
from tests.fewlabelled import settle_key

from voxelstem import adapt, evaluate, metrics
from voxelstem.adapted import read_run
from voxelstem.card import Card, write_weights
from voxelstem.errors import AuditError
from voxelstem.heads.attending import AttendConfig
from voxelstem.heads.risks import Cox, Hazard, Seen, minimised
from voxelstem.heads.survival import (
    Watched,
    breslow,
    censoring,
    harrell_c,
    integrated_brier,
    interval_edges,
    kaplan_meier,
    uno_c,
)
from voxelstem.model import make_model
from voxelstem.protocols import Example, Head
from voxelstem.sources.cohort import CohortConfig, cohort, write_survival
from voxelstem.store import Fractions, Store, write
from voxelstem.store.subjects import pseudonym
from voxelstem.study import InputSpec, Survival
from voxelstem.tasks.survive import Foretold, Survive


@dataclass(frozen=True)
class Row:
    scan: np.ndarray
    tokens: None = None
    tokens_affine_ras: None = None


def example(row: np.ndarray, told: Survival | None, index: int, key: str = "") -> Example:
    return Example(
        subject=f"s{index:04d}", key=key or f"k{index}", features=Row(row), affine_ras=np.eye(4), survival=told
    )


def people(count: int, noise: int = 3, seed: int = 0, whole_months: bool = False) -> list[Example]:
    """Two columns that decide, others that do not, and watches that end by chance."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(count, 2 + noise)) * np.array([1.0, 5.0, *[1.0] * noise])
    came = 10 * rng.exponential(size=count) * np.exp(-rows[:, 0] + 0.2 * rows[:, 1])
    ended = rng.uniform(2, 40, count)
    times = np.minimum(came, ended)
    times = np.ceil(times) if whole_months else times
    return [example(rows[i], Survival(time=float(times[i]), event=bool(came[i] <= ended[i])), i) for i in range(count)]


def watched_of(seen: list[Example]) -> Watched:
    return Watched.of(one.survival for one in seen if one.survival is not None)


def rows_of(seen: list[Example]) -> np.ndarray:
    return np.stack([one.features.scan for one in seen])


def fitted(task: Survive, seen: list[Example], seed: int = 0) -> Head:
    return task.fit(seen, (), mode="probe", seed=seed)


KINDS = [
    Survive(),
    Survive(ties="breslow"),
    Survive(kind="hazard"),
    Survive(kind="hazard", by_interval=True, intervals=4),
]


# ------------------------------------------------------------------------------------------- the fit


@pytest.mark.parametrize("strength", [1e-9, 8.0])
def test_cox_is_lifelines_with_ties_and_with_a_penalty(strength: float) -> None:
    seen = people(80, whole_months=True)
    rows, watched = rows_of(seen), watched_of(seen)
    head = fitted(Survive(strengths=(strength,)), seen)
    # lifelines standardises by the other spread (n - 1), and takes the mean of the likelihood over subjects.
    table = pd.DataFrame(rows).assign(time=watched.time, event=watched.event)
    peer = CoxPHFitter(penalizer=strength * 79 / 80**2).fit(table, "time", "event", fit_options={"precision": 1e-12})
    assert head.arrays["weight"] / head.arrays["scale"] == pytest.approx(peer.params_.to_numpy(), abs=1e-5)
    lines = peer.baseline_survival_.iloc[:, 0]
    baseline = dict(zip(head.arrays["time"].tolist(), head.arrays["baseline"].tolist(), strict=True))
    assert [baseline[at] for at in lines.index if at in baseline] == pytest.approx(
        [float(lines[at]) for at in lines.index if at in baseline], abs=1e-5
    )
    curve = Survive().predict(head, rows[5]).curve
    wanted = peer.predict_survival_function(table.iloc[[5]], times=curve.time).to_numpy()[:, 0]
    assert curve.value == pytest.approx(wanted, abs=1e-5)
    assert len(np.unique(watched.time[watched.event])) < watched.event.sum()  # there were ties


@pytest.mark.parametrize("task", KINDS)
def test_where_the_fit_ends_no_small_step_is_better(task: Survive) -> None:
    """The penalised likelihood, from plain formulas, about the weights of the head."""
    seen = people(60, whole_months=True)
    watched = watched_of(seen)
    head = fitted(replace(task, strengths=(5.0,)), seen)
    standard = (rows_of(seen) - head.arrays["middle"]) / head.arrays["scale"]

    def loss(weight: np.ndarray, bias: np.ndarray) -> float:
        if task.kind == "cox":
            return naive_cox(standard @ weight, watched, task.ties) + 2.5 * float((weight**2).sum())
        squares = (weight**2).sum() if task.by_interval else (weight[0] ** 2).sum()
        return naive_hazard(standard @ weight.T + bias, watched, head.arrays["edges"]) + 2.5 * float(squares)

    weight, bias = head.arrays["weight"], head.arrays.get("bias", np.zeros(0))
    least = loss(weight, bias)
    rng = np.random.default_rng(0)
    for _ in range(20):
        one = rng.normal(size=weight.shape if task.by_interval else weight.shape[-1])
        assert loss(weight + 0.01 * one, bias + 0.01 * rng.normal(size=bias.shape)) > least
        assert loss(weight, bias) == least


def naive_cox(risk: np.ndarray, watched: Watched, ties: str) -> float:
    total = 0.0
    for moment in np.unique(watched.time[watched.event]):
        tied = np.flatnonzero((watched.time == moment) & watched.event)
        whole, own = np.exp(risk[watched.time >= moment]).sum(), np.exp(risk[tied]).sum()
        for rank, i in enumerate(tied):
            total += math.log(whole - (rank / len(tied) * own if ties == "efron" else 0)) - risk[i]
    return total


def naive_hazard(logits: np.ndarray, watched: Watched, edges: np.ndarray) -> float:
    total = 0.0
    for row, until, event in zip(logits, watched.time, watched.event, strict=True):
        for k, logit in enumerate(row):
            hazard = 1 / (1 + math.exp(-logit))
            if event and edges[k] <= until < edges[k + 1]:
                total -= math.log(hazard)
            elif until >= (edges[k + 1] if event else (edges[k] + edges[k + 1]) / 2):
                total -= math.log(1 - hazard)
    return total


@pytest.mark.parametrize("task", KINDS)
def test_a_head_that_sees_the_causes_comes_near_the_true_ranking_and_beats_kaplan_and_meier(task: Survive) -> None:
    seen = people(400, noise=20)
    head, blind = fitted(task, seen[:250]), task.usual(seen[:250], ())
    tested = seen[250:]
    outcomes = [task.outcome(head, one) for one in tested]
    usual = [task.outcome(blind, replace(one, features=Row(np.zeros(0)))) for one in tested]
    true = harrell_c(watched_of(tested), rows_of(tested)[:, 0] - 0.2 * rows_of(tested)[:, 1])
    assert task.statistic("harrell_c")(outcomes) > true - 0.05
    assert task.statistic("uno_c")(outcomes) > 0.7
    assert task.statistic("integrated_brier")(outcomes) < task.statistic("integrated_brier")(usual) - 0.02
    assert [task.statistic(name)(usual) for name in ("harrell_c", "uno_c")] == [0.5, 0.5]


def test_weights_of_their_own_find_an_effect_that_turns() -> None:
    """What harms before 3 and protects after: one weight for all intervals can only know the mean of it."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=600)
    early = 3 + rng.exponential(size=600) * 10 * np.exp(x)
    first = rng.exponential(size=600) * 10 * np.exp(-x)
    came = np.where(first < 3, first, early)
    seen = [
        example(np.array([x[i]]), Survival(time=min(came[i], 25.0), event=bool(came[i] < 25)), i) for i in range(600)
    ]
    own = fitted(Survive(kind="hazard", by_interval=True, intervals=6), seen).arrays
    early_end = int(np.searchsorted(own["edges"], 3.0)) - 1
    assert early_end >= 1
    assert (own["weight"][:early_end, 0] > 0.4).all()
    assert (own["weight"][early_end + 1 :, 0] < -0.4).all()
    shared = fitted(Survive(kind="hazard", intervals=6), seen).arrays["weight"]
    assert (shared == shared[0]).all()


@pytest.mark.parametrize("task", KINDS)
def test_the_strength_is_the_one_that_cross_validates_best(task: Survive) -> None:
    """Folds made anew; each part is what those left out change of the likelihood of all (Verweij, van Houwelingen)."""
    task = replace(task, strengths=(0.5, 20.0, 5000.0), folds=3)
    seen = people(45, noise=8, whole_months=True)
    watched = watched_of(seen)
    head = fitted(task, seen)
    standard = (rows_of(seen) - head.arrays["middle"]) / head.arrays["scale"]
    order = np.random.default_rng([0, 17]).permutation(45)
    order = np.array([*[i for i in order if not watched.event[i]], *[i for i in order if watched.event[i]]])
    edges = interval_edges(watched, task.intervals)

    def misfit(arrays: dict[str, np.ndarray], rows: np.ndarray, of: Watched) -> float:
        if task.kind == "cox":
            return naive_cox(rows @ arrays["weight"], of, task.ties)
        return naive_hazard(rows @ arrays["weight"].T + arrays["bias"], of, edges)

    def loss(strength: float) -> float:
        total = 0.0
        for fold in range(3):
            kept = np.array([i for place, i in enumerate(order) if place % 3 != fold])
            arrays = refit(replace(task, strengths=(strength,)), standard[kept], watched, kept)
            part = Watched(time=watched.time[kept], event=watched.event[kept])
            total += misfit(arrays, standard, watched) - misfit(arrays, standard[kept], part)
        return total

    assert head.facts["strength"] == min(task.strengths, key=loss)


def refit(task: Survive, rows: np.ndarray, watched: Watched, kept: np.ndarray) -> dict[str, np.ndarray]:
    """Weights for given columns as they are, in the intervals of all."""

    part = Watched(time=watched.time[kept], event=watched.event[kept])
    model = Cox(ties=task.ties) if task.kind == "cox" else Hazard.of(watched, task.intervals, own=task.by_interval)
    seen = Seen.of(rows, part)
    return model.arrays(minimised(model, seen, task.strengths[0]), seen, np.eye(rows.shape[1]))


def test_with_few_events_the_strength_is_the_default() -> None:
    seen = people(12)
    assert fitted(Survive(fewest=100), seen).facts["strength"] == 100.0
    assert fitted(Survive(fewest=5, strengths=(7.0,)), seen).facts["strength"] == 7.0


def test_the_fit_is_the_same_every_time_and_the_seed_only_makes_the_folds() -> None:
    seen, few = people(40), Survive(strengths=(1.0, 100.0), folds=2)
    one, again = fitted(few, seen), fitted(few, seen)
    for name, array in one.arrays.items():
        np.testing.assert_array_equal(array, again.arrays[name])
    other = fitted(Survive(strengths=(10.0,)), seen, seed=5)
    np.testing.assert_array_equal(other.arrays["weight"], fitted(Survive(strengths=(10.0,)), seen).arrays["weight"])


def test_more_columns_than_subjects_and_columns_that_never_vary_are_no_trouble() -> None:
    rng = np.random.default_rng(4)
    seen = [
        replace(one, features=Row(np.append(rng.normal(size=300), [0.1, 7.0]).astype(np.float32))) for one in people(30)
    ]
    for task in KINDS:
        head = fitted(replace(task, strengths=(10.0,)), seen)
        assert all(np.isfinite(array).all() for array in head.arrays.values())
        assert head.arrays["weight"][..., -2:] == pytest.approx(np.zeros((*head.arrays["weight"].shape[:-1], 2)))
        assert math.isfinite(task.predict(head, np.full(302, 1e6)).risk)


def test_a_subject_with_two_scans_is_one_subject() -> None:
    """Halves of everybody's row: as if their mean had been seen once, in the fit and in every outcome."""
    seen, rng = people(40), np.random.default_rng(5)
    gaps = rng.normal(size=(40, 5))
    halves = [
        replace(one, features=Row(one.features.scan + sign * gap), key=f"{one.key}{sign}")
        for one, gap in zip(seen, gaps, strict=True)
        for sign in (1, -1)
    ]
    task = Survive(strengths=(3.0,))
    whole, split = fitted(task, seen), fitted(task, halves)
    assert split.arrays["weight"] == pytest.approx(whole.arrays["weight"])
    assert split.arrays["censoring"] == pytest.approx(whole.arrays["censoring"])
    joined = task.combine([task.outcome(split, half) for half in halves[:2]])
    alone = task.outcome(whole, seen[0])
    assert joined.risk == pytest.approx(alone.risk)
    curves = [task.outcome(split, half).chances for half in halves[:2]]
    assert joined.chances == pytest.approx(np.mean(curves, axis=0))
    assert (joined.truth, joined.alive, joined.weight) == (alone.truth, alone.alive, alone.weight)


# ------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize("task", KINDS)
def test_figures_are_those_of_the_formulas(task: Survive) -> None:
    seen = people(120)
    head = fitted(task, seen[:80])
    tested = seen[80:]
    outcomes = [task.outcome(head, one) for one in tested]
    watched, known = watched_of(tested), censoring(watched_of(seen[:80]))
    said = [task.predict(head, one.features.scan) for one in tested]
    risk, moments = np.array([one.risk for one in said]), head.arrays["moments"]
    assert len(moments) == 51
    assert known.at(moments[-1:])[0] >= task.least
    assert task.statistic("harrell_c")(outcomes) == pytest.approx(harrell_c(watched, risk))
    assert task.statistic("uno_c")(outcomes) == pytest.approx(uno_c(watched, risk, uncensored=known, tau=moments[-1]))
    if task.kind == "cox":
        chances = np.stack([one.curve.at(moments) for one in said])
    else:
        chances = np.stack([evenly(one.curve.time, one.curve.value, moments) for one in said])
    wanted = integrated_brier(watched, chances, moments, uncensored=known)
    assert task.statistic("integrated_brier")(outcomes) == pytest.approx(wanted)


def evenly(ends: np.ndarray, values: np.ndarray, moments: np.ndarray) -> list[float]:
    """Within an interval the same share of those left is lost in equal times."""
    found = []
    for moment in moments:
        before, begin = 1.0, 0.0
        for end, value in zip(ends, values, strict=True):
            if moment <= end:
                found.append(before * (value / before) ** ((moment - begin) / (end - begin)))
                break
            before, begin = value, end
    return found


def test_figures_of_draws_are_those_of_drawn_subjects_and_repeats_are_averaged() -> None:
    task, seen = Survive(), people(60)
    heads = [fitted(Survive(strengths=(strength,)), seen[:40]) for strength in (0.1, 1000.0)]
    both = [tuple(task.outcome(head, one) for head in heads) for one in seen[40:]]
    picks = np.random.default_rng(6).integers(0, 20, (15, 20))
    for name in task.metrics:
        plain, repeated = task.statistic(name), metrics.averaged(task.statistic(name))
        assert isinstance(repeated, metrics.Counted)
        drawn = repeated.of_draws(both, counts_of(picks, 20))
        for row, found in zip(picks, drawn, strict=True):
            each = [plain([both[i][k] for i in row]) for k in range(2)]
            assert found == pytest.approx(np.mean(each))
        assert repeated(both) == pytest.approx(np.mean([plain([pair[k] for pair in both]) for k in range(2)]))


def test_without_a_comparable_pair_there_is_no_figure() -> None:
    task = Survive()
    head = fitted(task, people(30))
    late = example(np.zeros(5), Survival(time=3.0, event=False), 0)
    assert math.isnan(task.statistic("harrell_c")([task.outcome(head, late)] * 2))
    assert math.isnan(task.statistic("uno_c")([]))


def test_who_was_watched_for_longer_than_anybody_labelled_is_judged_until_the_horizon() -> None:
    task = Survive()
    head = fitted(task, people(30))
    found = task.outcome(head, example(np.zeros(5), Survival(time=1e6, event=True), 0))
    assert all(found.alive)
    assert found.weight == 0.0
    assert found.brier > 0


# ------------------------------------------------------------------------------------------- what is said


@pytest.mark.parametrize("task", KINDS)
def test_a_higher_risk_is_a_lower_curve(task: Survive) -> None:
    head = fitted(replace(task, by_interval=False), people(150))
    said = [task.predict(head, row) for row in (np.array([a, 0.0, 0, 0, 0]) for a in (-2.0, 0.0, 2.0))]
    risks = [one.risk for one in said]
    assert risks == sorted(risks)
    for low, high in pairwise(said):
        assert (low.curve.value >= high.curve.value).all()
        assert (np.diff(low.curve.value) <= 0).all()


def test_the_usual_head_is_the_curve_of_kaplan_and_meier_for_everybody() -> None:
    seen = people(30)
    curve = kaplan_meier(watched_of(seen))
    for task in KINDS:
        said = task.predict(task.usual(seen, ()), np.zeros(0))
        assert said.risk == 0.0
        np.testing.assert_array_equal(said.curve.value, curve.value)
        np.testing.assert_array_equal(said.curve.time, curve.time)


def test_a_curve_that_ends_in_certainty_is_no_trouble() -> None:
    """Nobody is censored: Kaplan and Meier's curve ends at 0, and is judged until then."""
    seen = [replace(one, survival=Survival(time=one.survival.time, event=True)) for one in people(30) if one.survival]
    for task in KINDS:
        blind, head = task.usual(seen, ()), fitted(replace(task, strengths=(10.0,)), seen)
        assert blind.arrays["baseline"][-1] == 0
        assert blind.arrays["moments"][-1] == max(one.survival.time for one in seen if one.survival)
        for one in seen:
            assert math.isfinite(task.outcome(head, one).brier)
            assert math.isfinite(task.outcome(blind, replace(one, features=Row(np.zeros(0)))).brier)


# ------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ([Survival(time=1.0, event=True)], "at least two subjects"),
        ([Survival(time=1.0, event=False), Survival(time=2.0, event=False)], "an event after time 0"),
        ([Survival(time=0.0, event=True), Survival(time=2.0, event=False)], "an event after time 0"),
        ([Survival(time=1.0, event=True), None], "needs a time"),
    ],
)
def test_too_little_to_learn_from_is_refused(told: list[Survival | None], message: str) -> None:
    seen = [example(np.ones(2), one, index) for index, one in enumerate(told)]
    with pytest.raises(ValueError, match=message):
        fitted(Survive(), seen)


def test_watches_that_hardly_anybody_was_kept_under_are_told() -> None:
    told = [Survival(time=0.0, event=False)] * 9 + [Survival(time=1.0, event=True)]
    seen = [example(np.ones(2), one, index) for index, one in enumerate(told)]
    with pytest.raises(AuditError, match=r"less than 0\.2 of 10 labelled subjects are watched beyond time 0"):
        fitted(Survive(), seen)


@pytest.mark.parametrize(
    "changes",
    [
        {"intervals": 0},
        {"moments": 0},
        {"folds": 1},
        {"fewest": 4},
        {"strength": 0.0},
        {"strengths": ()},
        {"strengths": (-1.0,)},
        {"least": 0.0},
        {"least": 1.0},
    ],
)
def test_settings_without_sense_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must|every fold"):
        Survive(**changes)


def test_modes_are_known() -> None:
    with pytest.raises(ValueError, match="survive has no mode 'tree'"):
        Survive().fit(people(5), (), mode="tree", seed=0)


def test_an_outcome_is_plain_and_can_be_compared() -> None:
    task, seen = Survive(), people(20)
    head = fitted(task, seen)
    assert task.outcome(head, seen[3]) == task.outcome(head, seen[3])
    assert isinstance(task.outcome(head, seen[3]), Foretold)
    with pytest.raises(ValueError, match="needs a time"):
        task.outcome(head, example(np.zeros(5), None, 0))


# ------------------------------------------------------------------------------------------- other modes


def unseen(task: Survive, labelled: list[Example], held: list[Example]) -> list[Foretold]:
    """Everybody gets the labelled subjects' curve."""
    head = task.usual(labelled, ())
    return [task.outcome(head, replace(one, features=Row(np.zeros(0)))) for one in held]


def naive_neighbours(task: Survive, seen: list[Example], row: np.ndarray) -> list[float]:
    """Kaplan and Meier's curve of the nearest by what each weighs, at every labelled time, by loops."""
    told = []
    for one in seen:
        lengths = [math.sqrt(sum(x * x for x in each)) for each in (one.features.scan, row)]
        product = sum(a * b for a, b in zip(one.features.scan, row, strict=True))
        told.append((product / lengths[0] / lengths[1], one.survival))
    near = sorted(told, key=lambda pair: -pair[0])[: task.neighbours]
    found, left = [], 1.0
    for moment in sorted({one.survival.time for one in seen if one.survival}):
        at_risk = sum(math.exp(c / task.temperature) for c, known in near if known.time >= moment)
        came = sum(math.exp(c / task.temperature) for c, known in near if known.time == moment and known.event)
        left *= 1 - came / at_risk if at_risk else 1.0
        found.append(left)
    return found


@pytest.mark.parametrize("neighbours", [1, 6, 100])
def test_neighbours_draw_their_own_curve(neighbours: int) -> None:
    task, seen = Survive(neighbours=neighbours, temperature=0.3), people(30, whole_months=True)
    head = task.fit(seen[:25], (), mode="knn", seed=0)
    assert head.facts["kind"] == "knn"
    for one in seen[25:]:
        said = task.answer(head, one.features)
        assert said.curve.value == pytest.approx(naive_neighbours(task, seen[:25], one.features.scan))
        moments = head.arrays["moments"]
        lost = 1 - float(np.trapezoid(said.curve.at(moments), moments)) / moments[-1]
        assert said.risk == pytest.approx(lost)


def test_neighbours_tell_who_fares_worse() -> None:
    rng = np.random.default_rng(7)
    angles = rng.uniform(0, math.pi, 160)
    came = 10 * rng.exponential(size=160) * np.exp(2 - 1.5 * angles)
    ended = rng.uniform(5, 60, 160)
    seen = [
        example(
            np.array([math.cos(angle), math.sin(angle)]),
            Survival(time=float(min(a, b)), event=bool(a <= b)),
            at,
        )
        for at, (angle, a, b) in enumerate(zip(angles, came, ended, strict=True))
    ]
    task = Survive()
    head = task.fit(seen[:80], (), mode="knn", seed=0)
    outcomes = [task.outcome(head, one) for one in seen[80:]]
    floor = unseen(task, seen[:80], seen[80:])
    assert task.statistic("harrell_c")(outcomes) > 0.65
    assert task.statistic("integrated_brier")(outcomes) < task.statistic("integrated_brier")(floor)


@dataclass(frozen=True)
class Patches:
    scan: np.ndarray
    tokens: np.ndarray
    tokens_affine_ras: np.ndarray


def speckled(count: int, seed: int) -> list[Example]:
    """Scans in which three marked patches hold the risk, and the mean over patches is 0."""
    rng = np.random.default_rng(seed)
    seen = []
    for at in range(count):
        risk = float(rng.uniform(-2, 2))
        tokens = rng.normal(size=(40, 8))
        marked = rng.permutation(40)[:3]
        tokens[marked, 0] += 6
        tokens[marked, 1] += 2 * risk
        tokens = (tokens - tokens.mean(axis=0)).reshape(2, 4, 5, 8).astype(np.float32)
        came, ended = 10 * rng.exponential() * math.exp(-risk), rng.uniform(5, 60)
        told = Survival(time=min(came, ended), event=came <= ended)
        features = Patches(tokens.mean(axis=(0, 1, 2)), tokens, np.eye(4))
        name = f"s{seed}-{at:04d}"
        seen.append(Example(subject=name, key=name, features=features, affine_ras=np.eye(4), survival=told))
    return seen


@pytest.mark.parametrize(
    "task",
    [
        Survive(intervals=4),
        Survive(kind="hazard", intervals=4),
        Survive(kind="hazard", intervals=3, by_interval=True),
    ],
    ids=["cox", "hazard", "by interval"],
)
def test_attention_reads_a_risk_from_a_few_patches_and_is_the_same_again(task: Survive) -> None:
    train, held = speckled(60, 0), speckled(60, 1)
    head = task.fit(train, (), mode="attention", seed=0)
    outcomes = [task.outcome(head, one) for one in held]
    floor = unseen(task, train, held)
    assert task.statistic("harrell_c")(outcomes) > 0.65
    assert task.statistic("integrated_brier")(outcomes) < task.statistic("integrated_brier")(floor)
    again = task.fit(train, (), mode="attention", seed=0)
    assert all(np.array_equal(array, again.arrays[name]) for name, array in head.arrays.items())
    assert head.facts["bag"] == "tokens"


def test_curves_above_attention_are_breslow_s_of_its_risks() -> None:
    task, seen = Survive(attention=AttendConfig(few_steps=5)), speckled(12, 2)
    head = task.fit(seen, (), mode="attention", seed=0)
    risks = np.array([task.answer(head, one.features).risk for one in seen])
    assert risks.std() > 0
    assert risks.mean() == pytest.approx(0, abs=1e-5)
    assert head.arrays["baseline"] == pytest.approx(breslow(watched_of(seen), risks).value, abs=1e-5)


def test_scans_of_a_subject_are_one_bag() -> None:
    task, seen = Survive(attention=AttendConfig(few_steps=5)), speckled(8, 3)
    tokens = np.concatenate([seen[0].features.tokens, seen[1].features.tokens])
    second = replace(seen[1], subject=seen[0].subject, survival=seen[0].survival)
    joined = replace(seen[0], features=Patches(seen[0].features.scan, tokens, np.eye(4)))
    two = task.fit([seen[0], second, *seen[2:]], (), mode="attention", seed=0)
    one = task.fit([joined, *seen[2:]], (), mode="attention", seed=0)
    assert all(np.array_equal(array, one.arrays[name]) for name, array in two.arrays.items())


def test_attention_is_not_asked_of_one_vector_and_patches_only_where_they_are_looked_at() -> None:
    task = Survive(attention=AttendConfig(few_steps=1))
    head = task.fit(speckled(6, 0), (), mode="attention", seed=0)
    with pytest.raises(ValueError, match="not at the scan's one vector"):
        task.predict(head, np.zeros(8))
    assert task.looks_at_tokens("attention")
    assert not task.looks_at_tokens("knn")


# ------------------------------------------------------------------------------------------- the whole way

SPEC = InputSpec(spacing_mm=(12.0, 12.0, 12.0), low_hu=-200.0, high_hu=300.0, block_ijk=(16, 16, 16))
ARCHITECTURE = {
    "name": "scan_vit",
    "block_ijk": (16, 16, 16),
    "block.dim": 24,
    "block.depth": 1,
    "block.heads": 2,
    "scan.depth": 0,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of a coarse phantom cohort, its label file, and weights."""
    folder = tmp_path_factory.mktemp("survive")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VOXELSTEM_KEY", str(folder / "site.key"))
        store = Store.create(folder / "store", fractions=Fractions(train=0.6, validation=0.0, test=0.4))
        known = []
        for study in cohort(CohortConfig(spacing_mm=(14.0, 14.0, 14.0)), range(30)):
            write(store, replace(study, subject=pseudonym(study.subject, settle_key())))
            known.append(replace(study, volumes=()))
        write_survival(folder / "survival.csv", known)
        model = make_model(Card(architecture=ARCHITECTURE, spec=SPEC), seed=0)
        write_weights(folder / "weights", model.backbone.state_dict(), model.card)
    return folder


@pytest.mark.parametrize("kind", ["cox", "hazard"])
def test_a_cohort_is_adapted_to_and_evaluated_beside_its_floors(
    place: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VOXELSTEM_KEY", str(place / "site.key"))
    settings = {"head.kind": kind, "head.folds": 2, "head.strengths": [10.0, 1000.0], "head.intervals": 3}
    run = adapt.run(
        weights=place / "weights",
        store=place / "store",
        labels=place / "survival.csv",
        task="survive",
        mode="probe",
        out=place / kind,
        budget=14,
        settings=settings,
    )
    read = read_run(run)
    assert (read.task.kind, read.head.facts["kind"], len(read.subjects)) == (kind, kind, 14)  # pyright: ignore
    found = evaluate.run([run], store=place / "store", labels=place / "survival.csv", out=place / f"{kind}-report")
    by_name = {(score.name, score.metric): score for score in found.scores}
    assert {name for name, _ in by_name} == {kind, "scratch", "intensity", "radiomics", "kaplan_meier"}
    assert {metric for _, metric in by_name} == set(Survive.metrics)
    for metric in ("harrell_c", "uno_c"):
        assert by_name["kaplan_meier", metric].value.estimate == 0.5
        assert 0 <= by_name[kind, metric].value.estimate <= 1
        assert by_name[kind, metric].over_scratch is not None
    for name in (kind, "scratch", "intensity", "kaplan_meier"):
        assert 0 < by_name[name, "integrated_brier"].value.estimate < 1
        assert by_name[name, "integrated_brier"].value.low is not None
    written = json.loads((place / f"{kind}-report" / "evaluation.json").read_text())
    assert {score["metric"] for score in written["scores"]} == set(Survive.metrics)
    assert "kaplan_meier" in (place / f"{kind}-report" / "index.html").read_text()
