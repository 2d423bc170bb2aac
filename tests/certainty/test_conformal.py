from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mapie.classification import SplitConformalClassifier
from mapie.conformity_scores import ResidualNormalisedScore
from mapie.metrics.classification import classification_coverage_score, classification_mean_width_score
from mapie.metrics.regression import regression_coverage_score
from mapie.regression import SplitConformalRegressor
from safetensors.numpy import load_file, save_file
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin

from voxelstem.certainty.conformal import ConformalIntervals, ConformalSets, fit_intervals, fit_sets
from voxelstem.certainty.thresholds import Thresholds, conformal_quantile, coverage


class Classes(ClassifierMixin, BaseEstimator):
    """A classifier whose features are its probabilities."""

    def fit(self, rows: np.ndarray, truth: np.ndarray) -> Classes:  # noqa: ARG002
        self.classes_, self.n_features_in_ = np.arange(rows.shape[1]), rows.shape[1]
        return self

    def predict_proba(self, rows: np.ndarray) -> np.ndarray:
        return rows

    def predict(self, rows: np.ndarray) -> np.ndarray:
        return rows.argmax(axis=1)


class Numbers(RegressorMixin, BaseEstimator):
    """A regression whose features are its prediction and its spread."""

    def __init__(self, column: int = 0) -> None:
        self.column = column

    def fit(self, rows: np.ndarray, truth: np.ndarray) -> Numbers:  # noqa: ARG002
        self.n_features_in_ = rows.shape[1]
        return self

    def predict(self, rows: np.ndarray) -> np.ndarray:
        return rows[:, self.column]


def answers(rows: int, *, classes: int = 4, boldness: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and probabilities that are honest for a `boldness` of 1 and else too sure or too shy."""
    rng = np.random.default_rng(seed)
    honest = rng.dirichlet(np.full(classes, 0.6), rows)
    truth = (rng.random(rows)[:, None] > honest.cumsum(axis=1)).sum(axis=1).clip(max=classes - 1)
    stated = np.maximum(honest, 1e-9) ** boldness
    return stated / stated.sum(axis=1, keepdims=True), truth


def numbers(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predictions, their spreads, and true numbers."""
    rng = np.random.default_rng(seed)
    predicted, spread = rng.normal(50, 10, rows), rng.uniform(0.5, 4, rows)
    return predicted, spread, predicted + spread * rng.standard_t(4, rows)


@pytest.mark.parametrize("level", [0.6, 0.8, 0.9, 0.95])
def test_sets_of_lac_are_mapies(level: float) -> None:
    probabilities, truth = answers(100)
    new, new_truth = answers(150, seed=1)
    oracle = SplitConformalClassifier(Classes().fit(probabilities, truth), confidence_level=level, prefit=True)
    theirs = oracle.conformalize(probabilities, truth).predict_set(new)[1][:, :, 0]
    ours = fit_sets(probabilities, truth, level=level).apply(new)
    np.testing.assert_array_equal(ours.members, theirs)
    assert ours.holds(new_truth).mean() == pytest.approx(
        np.mean(classification_coverage_score(new_truth, theirs[:, :, None]))
    )
    assert ours.sizes.mean() == pytest.approx(np.mean(classification_mean_width_score(theirs[:, :, None])))


@pytest.mark.parametrize("level", [0.6, 0.8, 0.9])
@pytest.mark.parametrize("seed", [0, 5])
def test_randomised_adaptive_sets_are_mapies(level: float, seed: int) -> None:
    probabilities, truth = answers(100)
    new, _ = answers(150, seed=1)
    oracle = SplitConformalClassifier(
        Classes().fit(probabilities, truth),
        confidence_level=level,
        conformity_score="aps",
        prefit=True,
        random_state=seed,
    ).conformalize(probabilities, truth)
    theirs = oracle.predict_set(new, conformity_score_params={"include_last_label": "randomized"})[1][:, :, 0]
    # Both take a part u of a class's own mass or 1 - u; the generator is begun anew for each question.
    drawn, again = (1 - np.random.RandomState(seed).uniform(size=count) for count in (100, 150))
    ours = fit_sets(probabilities, truth, score="aps", level=level, draws=drawn)
    assert ours.thresholds.values[0] == pytest.approx(conformal_quantile(oracle.conformity_scores[:, 0], level=level))
    np.testing.assert_array_equal(ours.apply(new, draws=again).members, theirs)


@pytest.mark.parametrize("level", [0.7, 0.9, 0.95])
def test_intervals_are_mapies(level: float) -> None:
    predicted, spread, truth = numbers(100)
    new, new_spread, new_truth = numbers(80, seed=1)
    rows, new_rows = np.stack([predicted, spread], axis=1), np.stack([new, new_spread], axis=1)
    plain = SplitConformalRegressor(Numbers().fit(rows, truth), confidence_level=level, prefit=True)
    scaled = SplitConformalRegressor(
        Numbers().fit(rows, truth),
        confidence_level=level,
        prefit=True,
        conformity_score=ResidualNormalisedScore(residual_estimator=Numbers(1).fit(rows, truth), prefit=True),
    )
    theirs = plain.conformalize(rows, truth).predict_interval(new_rows)[1]
    ours = fit_intervals(predicted, truth, level=level).apply(new)
    np.testing.assert_allclose(np.stack([ours.low, ours.high], axis=1), theirs[:, :, 0])
    assert ours.holds(new_truth).mean() == pytest.approx(regression_coverage_score(new_truth, theirs)[0])
    theirs = scaled.conformalize(rows, truth).predict_interval(new_rows)[1]
    ours = fit_intervals(predicted, truth, level=level, spread=spread).apply(new, spread=new_spread)
    np.testing.assert_allclose(np.stack([ours.low, ours.high], axis=1), theirs[:, :, 0])


def naive_set(
    calibration: list[list[float]], truth: list[int], row: list[float], level: float, draws: list[float] | None
) -> set[int]:
    """APS by hand: classes from the most to the least probable, each with the mass that came before it."""

    def strange(stated: list[float], label: int, draw: float) -> float:
        before = 0.0
        for other in sorted(range(len(stated)), key=lambda number: (-stated[number], number)):
            if other == label:
                return before + draw * stated[label]
            before += stated[other]
        raise AssertionError

    parts = draws or [0.0] * (len(truth) + 1)
    scores = sorted(strange(s, t, u) for s, t, u in zip(calibration, truth, parts[:-1], strict=True))
    limit = scores[math.ceil((len(scores) + 1) * level - 1e-9) - 1]
    return {label for label in range(len(row)) if strange(row, label, parts[-1]) <= limit + 1e-9}


@given(st.integers(0, 500), st.sampled_from([0.5, 0.8, 0.9]), st.booleans())
@settings(max_examples=60)
def test_adaptive_sets_agree_with_loops(seed: int, level: float, randomised: bool) -> None:
    # Tenths, so that classes are equally probable now and then.
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(10, np.full(3, 1 / 3), 16)
    probabilities, truth = counts / 10, rng.integers(0, 3, 15)
    draws = rng.random(16) if randomised else None
    ours = fit_sets(probabilities[:15], truth, score="aps", level=level, draws=None if draws is None else draws[:15])
    said = ours.apply(probabilities[15:], draws=None if draws is None else draws[15:]).members[0]
    wanted = naive_set(
        probabilities[:15].tolist(),
        truth.tolist(),
        probabilities[15].tolist(),
        level,
        None if draws is None else draws.tolist(),
    )
    assert set(np.flatnonzero(said)) == wanted


KINDS = [("lac", False), ("aps", False), ("aps", True)]


@pytest.mark.parametrize(("score", "randomised"), KINDS)
@pytest.mark.parametrize("boldness", [0.3, 1.0, 4.0])
def test_sets_hold_the_truth_as_often_as_they_say(score: str, randomised: bool, boldness: float) -> None:
    # Whether probabilities are honest or not: 300 calibrations of 60 subjects, and 40 new ones for each.
    level, held = 0.9, []
    probabilities, truth = answers(300 * 100, boldness=boldness)
    draws = np.random.default_rng(9).random(len(truth))
    for first in range(0, len(truth), 100):
        part, rest = slice(first, first + 60), slice(first + 60, first + 100)
        found = fit_sets(
            probabilities[part], truth[part], score=score, level=level, draws=draws[part] if randomised else None
        )
        held.append(found.apply(probabilities[rest], draws=draws[rest] if randomised else None).holds(truth[rest]))
    share = np.array(held).mean(axis=1)
    assert share.mean() >= level - 4 * share.std() / math.sqrt(len(share))
    if score == "lac" or randomised:  # without ties the level is met exactly, but for one part in n + 1
        assert share.mean() <= level + 1 / 61 + 4 * share.std() / math.sqrt(len(share))


@given(st.integers(0, 10_000), st.sampled_from(KINDS), st.sampled_from([0.3, 1.0, 4.0]))
@settings(max_examples=40)
def test_sets_and_intervals_grow_with_the_level(seed: int, kind: tuple[str, bool], boldness: float) -> None:
    probabilities, truth = answers(60, boldness=boldness, seed=seed)
    draws = np.random.default_rng(seed).random(60) if kind[1] else None
    old, new = slice(0, 40), slice(40, 60)
    predicted, spread, value = numbers(60, seed)
    members, low, high = None, None, None
    for level in (0.5, 0.7, 0.9, 0.97):
        rule = fit_sets(
            probabilities[old], truth[old], score=kind[0], level=level, draws=None if draws is None else draws[old]
        )
        larger = rule.apply(probabilities[new], draws=None if draws is None else draws[new]).members
        wider = fit_intervals(predicted[old], value[old], level=level, spread=spread[old]).apply(
            predicted[new], spread=spread[new]
        )
        if members is not None:
            assert (larger | ~members).all()
            assert (wider.low <= low).all()
            assert (wider.high >= high).all()
        members, low, high = larger, wider.low, wider.high


@given(st.integers(0, 10_000), st.sampled_from(KINDS))
@settings(max_examples=30)
def test_a_more_probable_class_is_never_left_out_first(seed: int, kind: tuple[str, bool]) -> None:
    probabilities, truth = answers(60, seed=seed)
    draws = np.random.default_rng(seed).random(60) if kind[1] else None
    rule = fit_sets(probabilities, truth, score=kind[0], level=0.8, draws=draws)
    said = rule.apply(probabilities, draws=draws).members
    for row, members in zip(probabilities, said, strict=True):
        if members.any() and not members.all():
            assert row[members].min() >= row[~members].max()


def test_adaptive_sets_without_draws_are_never_empty() -> None:
    for boldness in (0.3, 1.0, 6.0):
        probabilities, truth = answers(200, boldness=boldness)
        assert fit_sets(probabilities, truth, score="aps", level=0.5).apply(probabilities).sizes.min() >= 1


def test_an_empty_set_says_that_no_class_looks_as_it_should() -> None:
    probabilities, truth = np.tile([0.96, 0.02, 0.02], (40, 1)), np.zeros(40, dtype=int)
    rule = fit_sets(probabilities, truth, level=0.9)
    np.testing.assert_array_equal(rule.apply(np.array([[0.5, 0.3, 0.2], [0.97, 0.02, 0.01]])).sizes, [0, 1])


def test_a_group_of_its_own_threshold_is_covered_where_the_common_one_fails() -> None:
    probabilities, truth = answers(4000)
    # On scanner B labels have nothing to do with what is stated.
    scanner = np.where(np.arange(4000) % 4 == 0, "B", "A")
    truth = np.where(scanner == "B", np.random.default_rng(1).integers(0, 4, 4000), truth)
    old, new = slice(0, 2000), slice(2000, 4000)
    subjects = [f"s{n}" for n in range(2000)]
    groups = scanner.tolist()
    common = fit_sets(probabilities[old], truth[old]).apply(probabilities[new])
    own = fit_sets(probabilities[old], truth[old], groups=groups[:2000]).apply(probabilities[new], groups=groups[2000:])
    told = {
        name: coverage(sets.holds(truth[new]), subjects, groups=groups[2000:])
        for name, sets in (("common", common), ("own", own))
    }
    assert told["common"].overall.estimate == pytest.approx(0.9, abs=0.03)
    assert told["common"].by_group["B"].high is not None
    assert told["common"].by_group["B"].high < 0.9
    for group in "AB":
        assert told["own"].by_group[group].estimate == pytest.approx(0.9, abs=0.04)
    assert own.lacking == ()
    assert not own.uncalibrated.any()


def test_groups_without_enough_subjects_get_every_class_and_are_named() -> None:
    probabilities, truth = answers(40)
    groups = ["A"] * 35 + ["B"] * 5
    rule = fit_sets(probabilities, truth, groups=groups)
    assert rule.thresholds.lacking == ("B",)
    said = rule.apply(probabilities[:4], groups=["A", "new", "B", "B"])
    np.testing.assert_array_equal(said.sizes[1:], 4)
    np.testing.assert_array_equal(said.uncalibrated, [False, True, True, True])
    assert said.lacking == ("B", "new")
    assert rule.apply(probabilities[:2], groups=["A", "A"]).lacking == ()
    predicted, _, value = numbers(40)
    between = fit_intervals(predicted, value, groups=groups).apply(predicted[:2], groups=["A", "B"])
    assert between.lacking == ("B",)
    assert np.isfinite([between.low[0], between.high[0]]).all()
    assert (between.low[1], between.high[1]) == (-math.inf, math.inf)


def test_intervals_hold_the_truth_as_often_as_they_say_and_scaled_ones_where_it_is_hard_too() -> None:
    level, plain, scaled, hard = 0.9, [], [], []
    for seed in range(200):
        predicted, spread, value = numbers(100, seed)
        old, new = slice(0, 60), slice(60, 100)
        wide = spread[new] > 3
        plain.append(fit_intervals(predicted[old], value[old]).apply(predicted[new]).holds(value[new]))
        rule = fit_intervals(predicted[old], value[old], level=level, spread=spread[old])
        scaled.append(rule.apply(predicted[new], spread=spread[new]).holds(value[new]))
        hard.append((plain[-1][wide].mean(), scaled[-1][wide].mean()))
    for held in (plain, scaled):
        assert level - 0.012 <= np.mean(held) <= level + 1 / 61 + 0.012
    assert np.mean(hard, axis=0)[0] < 0.85
    assert np.mean(hard, axis=0)[1] == pytest.approx(level, abs=0.02)


def test_rules_rest_on_disk(tmp_path: Path) -> None:
    probabilities, truth = answers(40)
    draws = np.random.default_rng(0).random(40)
    predicted, spread, value = numbers(40)
    for rule in (
        fit_sets(probabilities, truth),
        fit_sets(probabilities, truth, score="aps", level=0.8, groups=["A"] * 30 + ["B"] * 10, draws=draws),
        fit_intervals(predicted, value),
        fit_intervals(predicted, value, groups=["A"] * 32 + ["B"] * 8, spread=spread),
    ):
        save_file(rule.arrays(), tmp_path / "rule.safetensors")
        assert type(rule).of(load_file(tmp_path / "rule.safetensors")) == rule


def test_a_damaged_rule_is_refused() -> None:
    probabilities, truth = answers(40)
    arrays = fit_sets(probabilities, truth).arrays()
    with pytest.raises(ValueError, match="there is no score"):
        ConformalSets.of({name: value for name, value in arrays.items() if name != "score"})
    with pytest.raises(ValueError, match="there is no thresholds"):
        ConformalSets.of({name: value for name, value in arrays.items() if name != "thresholds"})
    with pytest.raises(ValueError, match="there is no scaled"):
        ConformalIntervals.of(arrays)
    with pytest.raises(ValueError, match="sets need two classes"):
        ConformalSets.of(arrays | {"randomised": np.array(True)})
    with pytest.raises(ValueError, match="sets need two classes"):
        ConformalSets(
            score="raps",  # pyright: ignore[reportArgumentType]
            classes=3,
            randomised=False,
            thresholds=Thresholds(level=0.9, values=(0.5,), subjects=(20,)),
        )


def test_probabilities_that_are_none_are_refused() -> None:
    probabilities, truth = answers(40)
    broken = probabilities.copy()
    broken[7, 0] = math.nan
    with pytest.raises(ValueError, match="the first, row 7"):
        fit_sets(broken, truth)
    with pytest.raises(ValueError, match="must add up to 1"):
        fit_sets(probabilities * 2 / 3, truth)
    with pytest.raises(ValueError, match="there must be a row"):
        fit_sets(probabilities[:0], truth[:0])
    with pytest.raises(ValueError, match="labels from 0 to 3"):
        fit_sets(probabilities, truth[1:])
    with pytest.raises(ValueError, match="needs 9 calibration subjects, there are 8"):
        fit_sets(probabilities[:8], truth[:8])
    rule = fit_sets(probabilities, truth)
    with pytest.raises(ValueError, match="the first, row 7"):
        rule.apply(broken)
    with pytest.raises(ValueError, match="these sets take 4 classes"):
        rule.apply(np.full((2, 2), 0.5))
    with pytest.raises(ValueError, match="labels from 0 to 3"):
        rule.apply(probabilities).holds(truth + 1)


def test_draws_are_given_where_they_are_needed_and_nowhere_else() -> None:
    probabilities, truth = answers(40)
    draws = np.random.default_rng(0).random(40)
    with pytest.raises(ValueError, match="lac takes no draws"):
        fit_sets(probabilities, truth, draws=draws)
    with pytest.raises(ValueError, match="a draw from"):
        fit_sets(probabilities, truth, score="aps", draws=draws[1:])
    with pytest.raises(ValueError, match="a draw from"):
        fit_sets(probabilities, truth, score="aps", draws=draws + 1)
    with pytest.raises(ValueError, match="and no draws"):
        fit_sets(probabilities, truth, score="aps").apply(probabilities, draws=draws)
    with pytest.raises(ValueError, match="a draw for each row"):
        fit_sets(probabilities, truth, score="aps", draws=draws).apply(probabilities)


def test_numbers_that_are_none_are_refused() -> None:
    predicted, spread, value = numbers(40)
    hole = np.where(np.arange(40) == 3, math.nan, 1.0)
    with pytest.raises(ValueError, match="a finite truth"):
        fit_intervals(predicted, value * hole)
    with pytest.raises(ValueError, match="a finite truth"):
        fit_intervals(predicted, value[1:])
    with pytest.raises(ValueError, match="every one of 40 predictions"):
        fit_intervals(predicted * hole, value)
    for wrong in (spread * hole, spread * 0, -spread, spread[1:]):
        with pytest.raises(ValueError, match="every one of 40 predictions"):
            fit_intervals(predicted, value, spread=wrong)
    with pytest.raises(ValueError, match="take no spread"):
        fit_intervals(predicted, value).apply(predicted, spread=spread)
    with pytest.raises(ValueError, match="take a spread for each row"):
        fit_intervals(predicted, value, spread=spread).apply(predicted)
    with pytest.raises(ValueError, match="got 39 for 40"):
        fit_intervals(predicted, value).apply(predicted).holds(value[1:])
