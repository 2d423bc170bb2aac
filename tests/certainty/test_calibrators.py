from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from scipy.special import expit, log_softmax, softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.metrics import log_loss

from voxelstem.certainty.calibration import SMALLEST, calibration_error, log_odds, multiclass_brier_score, recalibration
from voxelstem.certainty.calibrators import (
    HIGHEST,
    LOWEST,
    Platt,
    Temperature,
    best_line,
    best_temperature,
    fit_platt,
    fit_temperature,
    for_prevalence,
    log_probabilities,
)


class Said(ClassifierMixin, BaseEstimator):
    """A scikit-learn classifier whose features are its logits."""

    def fit(self, rows: np.ndarray, truth: np.ndarray) -> Said:  # noqa: ARG002
        self.classes_ = np.unique(truth)
        return self

    def decision_function(self, rows: np.ndarray) -> np.ndarray:
        return rows[:, 0] if rows.shape[1] == 1 else rows

    def predict(self, rows: np.ndarray) -> np.ndarray:
        best = rows[:, 0] > 0 if rows.shape[1] == 1 else rows.argmax(axis=1)
        return self.classes_[np.asarray(best, dtype=int)]


def classes_said(rows: int, *, boldness: float, classes: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are `boldness` times too large, and labels drawn from what they should have been."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.5, (rows, classes))
    truth = np.array([rng.choice(classes, p=row) for row in softmax(logits, axis=1)])
    return boldness * logits, truth


def yes_said(rows: int, *, scale: float, shift: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    odds = rng.normal(-0.5, 1.5, rows)
    return scale * odds + shift, rng.random(rows) < expit(odds)


@pytest.mark.parametrize("boldness", [0.3, 1.0, 4.0])
def test_the_temperature_is_scikit_learns(boldness: float) -> None:
    logits, truth = classes_said(150, boldness=boldness)
    ours = fit_temperature(logits, truth)
    frozen = FrozenEstimator(Said().fit(logits, truth))
    theirs = CalibratedClassifierCV(frozen, method="temperature", cv=2, ensemble=False).fit(logits, truth)
    beta = theirs.calibrated_classifiers_[0].calibrators[0].beta_
    assert ours.temperature == pytest.approx(1 / beta, rel=1e-5)
    np.testing.assert_allclose(ours.apply_to_logits(logits), theirs.predict_proba(logits), atol=1e-5)
    stated = softmax(logits, axis=1)
    small = stated.min(axis=1) < SMALLEST
    np.testing.assert_allclose(ours.apply(stated)[~small], ours.apply_to_logits(logits)[~small], atol=1e-9)
    assert small.sum() < 5


@pytest.mark.parametrize(("scale", "shift"), [(0.5, 0.3), (2.0, -1.0), (6.0, 4.0)])
def test_platts_line_is_scikit_learns(scale: float, shift: float) -> None:
    logits, truth = yes_said(120, scale=scale, shift=shift)
    ours = fit_platt(logits, truth)
    frozen = FrozenEstimator(Said().fit(logits[:, None], truth))
    theirs = CalibratedClassifierCV(frozen, method="sigmoid", cv=2, ensemble=False).fit(logits[:, None], truth)
    inner = theirs.calibrated_classifiers_[0].calibrators[0]
    assert (ours.scale, ours.shift) == pytest.approx((-inner.a_, -inner.b_), abs=2e-4)
    np.testing.assert_allclose(ours.apply_to_logits(logits), theirs.predict_proba(logits[:, None])[:, 1], atol=1e-4)


def test_no_temperature_on_a_grid_is_more_likely() -> None:
    logits, truth = classes_said(80, boldness=2.5)
    best = log_loss(truth, fit_temperature(logits, truth).apply_to_logits(logits), labels=range(4))
    for power in np.linspace(math.log(LOWEST), math.log(HIGHEST), 200):
        naive = 0.0
        for row, label in zip((logits / math.exp(power)).tolist(), truth.tolist(), strict=True):
            naive += math.log(sum(math.exp(value - max(row)) for value in row)) + max(row) - row[label]
        naive /= len(truth)
        assert naive >= best - 1e-9


def test_no_line_near_platts_has_a_smaller_loss() -> None:
    logits, truth = yes_said(60, scale=2.0, shift=1.0)
    found = fit_platt(logits, truth)
    there, gone = int(truth.sum()), int((~truth).sum())

    def naive(scale: float, shift: float) -> float:
        total = 0.0
        for logit, true in zip(logits.tolist(), truth.tolist(), strict=True):
            target = (there + 1) / (there + 2) if true else 1 / (gone + 2)
            chance = 1 / (1 + math.exp(-(scale * logit + shift)))
            total -= target * math.log(chance) + (1 - target) * math.log(1 - chance)
        return total

    best = naive(found.scale, found.shift)
    for scale in np.linspace(-0.1, 0.1, 9):
        for shift in np.linspace(-0.1, 0.1, 9):
            assert naive(found.scale + scale, found.shift + shift) >= best - 1e-9


def test_calibration_mends_what_was_too_sure() -> None:
    logits, truth = classes_said(4000, boldness=4.0)
    found = fit_temperature(logits[:2000], truth[:2000])
    assert found.temperature == pytest.approx(4.0, rel=0.1)
    assert not found.at_bound
    before, after = softmax(logits[2000:], axis=1), found.apply_to_logits(logits[2000:])
    new = truth[2000:]
    right = before.argmax(axis=1) == new
    assert calibration_error(right, before.max(axis=1)) > 0.2
    assert calibration_error(right, after.max(axis=1)) < 0.05
    assert multiclass_brier_score(new, after) < multiclass_brier_score(new, before)
    odds, there = yes_said(4000, scale=3.0, shift=2.0)
    line = fit_platt(odds[:2000], there[:2000])
    assert recalibration(there[2000:], expit(odds[2000:])).slope < 0.5
    mended = recalibration(there[2000:], line.apply(expit(odds[2000:])))
    assert (mended.slope, mended.in_the_large) == pytest.approx((1, 0), abs=0.15)


@given(
    st.integers(0, 1000),
    st.floats(LOWEST, HIGHEST),
    st.integers(2, 5),
)
@settings(max_examples=50)
def test_a_temperature_keeps_the_order_of_classes(seed: int, temperature: float, classes: int) -> None:
    rows = np.random.default_rng(seed).dirichlet(np.full(classes, 0.3), 20)
    after = Temperature(temperature=temperature, classes=classes, subjects=20).apply(rows)
    np.testing.assert_allclose(after.sum(axis=1), 1)
    below = rows[:, :, None] < rows[:, None, :]
    assert (after[:, :, None] <= after[:, None, :])[below].all()


@given(st.integers(0, 1000), st.booleans(), st.floats(0.1, 8))
@settings(max_examples=50)
def test_platts_line_keeps_the_order_of_rows(seed: int, reverse: bool, scale: float) -> None:
    odds, there = yes_said(30, scale=-scale if reverse else scale, shift=0.5, seed=seed)
    if min(there.sum(), (~there).sum()) < 3:
        return
    found = fit_platt(odds, there)
    assert found.scale >= 0
    after = found.apply(expit(odds))
    assert (np.diff(after[np.argsort(odds)]) >= 0).all()


def test_what_ranks_the_wrong_way_round_becomes_one_probability() -> None:
    odds, there = yes_said(60, scale=-2.0, shift=0.0)
    found = fit_platt(odds, there)
    assert found.scale == 0
    after = found.apply(expit(odds))
    assert np.ptp(after) == 0
    assert after[0] == pytest.approx(there.mean(), abs=0.03)


def test_data_without_an_error_make_nothing_certain() -> None:
    there = np.arange(20) >= 10
    found = fit_platt(np.where(there, 3.0, -3.0), there)
    assert found.apply_to_logits(np.array([3.0, -3.0])) == pytest.approx([11 / 12, 1 / 12], abs=1e-4)
    far = fit_platt(1e4 * np.where(there, 3.0, -3.0) + 1e5, there)
    assert far.apply_to_logits(np.array([1.3e5, 0.7e5])) == pytest.approx([11 / 12, 1 / 12], abs=1e-4)
    logits = np.where(np.eye(2)[there.astype(int)] > 0, 1.0, -1.0)
    cold = fit_temperature(logits, there.astype(int))
    assert cold.temperature == LOWEST
    assert cold.at_bound
    hot = fit_temperature(logits, 1 - there.astype(int))
    assert hot.temperature == HIGHEST
    assert hot.at_bound


def test_a_class_that_was_ruled_out_keeps_probabilities_finite() -> None:
    probabilities = np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]] * 10)
    found = fit_temperature(log_probabilities(probabilities), np.array([1, 0] * 10))
    after = found.apply(probabilities)
    assert np.isfinite(after).all()
    assert (after[:, 0] >= after[:, 2]).all()


def test_probabilities_and_logits_say_the_same() -> None:
    logits, truth = classes_said(50, boldness=2.0)
    by_chance = fit_temperature(log_probabilities(softmax(logits, axis=1)), truth)
    assert by_chance.temperature == pytest.approx(fit_temperature(logits, truth).temperature, rel=1e-5)
    odds, there = yes_said(50, scale=1.0, shift=0.0)
    a, b = fit_platt(log_odds(expit(odds)), there), fit_platt(odds, there)
    assert (a.scale, a.shift) == pytest.approx((b.scale, b.shift), rel=1e-5)


def test_calibrators_rest_on_disk_as_numbers(tmp_path: Path) -> None:
    logits, truth = classes_said(50, boldness=2.0)
    odds, there = yes_said(50, scale=1.0, shift=0.0)
    for found in (fit_temperature(logits, truth), fit_platt(odds, there)):
        save_file(found.arrays(), tmp_path / "calibrator.safetensors")
        assert type(found).of(load_file(tmp_path / "calibrator.safetensors")) == found


def test_a_damaged_calibrator_is_refused() -> None:
    arrays = Temperature(temperature=2.0, classes=3, subjects=40).arrays()
    with pytest.raises(ValueError, match="not so: temperature"):
        Temperature.of({name: value for name, value in arrays.items() if name != "temperature"})
    with pytest.raises(ValueError, match="not so: classes"):
        Temperature.of(arrays | {"classes": np.zeros(2)})
    with pytest.raises(ValueError, match="a temperature is positive"):
        Temperature.of(arrays | {"temperature": np.array(math.nan)})
    with pytest.raises(ValueError, match="not so: scale, shift"):
        Platt.of(arrays | {"positives": np.array(1.0), "negatives": np.array(1.0)})
    with pytest.raises(ValueError, match="scale is finite"):
        Platt(scale=-1.0, shift=0.0, positives=5, negatives=5)


def test_too_few_subjects_are_refused_with_their_counts() -> None:
    logits, truth = classes_said(9, boldness=1.0)
    with pytest.raises(ValueError, match="there are 9 of"):
        fit_temperature(logits, truth)
    with pytest.raises(ValueError, match="there are 12 of 1"):
        fit_temperature(np.random.default_rng(0).normal(size=(12, 3)), np.ones(12, dtype=int))
    with pytest.raises(ValueError, match="there are 0 of 0"):
        fit_temperature(np.zeros((0, 3)), np.zeros(0, dtype=int))
    odds, there = np.linspace(-1, 1, 12), np.arange(12) >= 10
    with pytest.raises(ValueError, match="2 positive and 10 negative"):
        fit_platt(odds, there)
    with pytest.raises(ValueError, match="0 positive and 12 negative"):
        fit_platt(odds, np.zeros(12, dtype=bool))
    with pytest.raises(ValueError, match="3 positive and 3 negative"):
        fit_platt(odds[:6], np.arange(6) >= 3)


def test_bad_logits_are_refused() -> None:
    logits, truth = classes_said(20, boldness=1.0)
    broken = logits.copy()
    broken[3, 1] = math.nan
    with pytest.raises(ValueError, match="1 of 80 are not"):
        fit_temperature(broken, truth)
    with pytest.raises(ValueError, match="no temperature changes that"):
        fit_temperature(np.repeat(logits[:, :1], 4, axis=1), truth)
    with pytest.raises(ValueError, match="labels from 0 to 3"):
        fit_temperature(logits, truth + 4)
    with pytest.raises(ValueError, match="labels from 0 to 3"):
        fit_temperature(logits, truth[:-1])
    there = np.arange(20) >= 10
    with pytest.raises(ValueError, match="1 of 20 are not"):
        fit_platt(np.where(np.arange(20) == 4, np.inf, 0.0), there)
    with pytest.raises(ValueError, match="logits of all 20 rows are the same"):
        fit_platt(np.full(20, 0.7), there)
    with pytest.raises(ValueError, match="got 20 for 19"):
        fit_platt(np.zeros(19), there)
    found = Temperature(temperature=2.0, classes=3, subjects=40)
    with pytest.raises(ValueError, match="fitted to 3 classes, got 4"):
        found.apply_to_logits(logits)
    with pytest.raises(ValueError, match="must add up to 1"):
        found.apply(np.full((2, 3), 0.5))
    with pytest.raises(ValueError, match="lies in"):
        Platt(scale=1.0, shift=0.0, positives=5, negatives=5).apply(np.array([math.nan]))


def test_probabilities_of_another_prevalence_are_bayes_rule() -> None:
    rng = np.random.default_rng(0)
    fitted, known = np.array([0.5, 0.3, 0.2]), np.array([0.05, 0.15, 0.8])
    likelihood = rng.random((10, 3))
    there, here = (likelihood * shares for shares in (fitted, known))
    there, here = there / there.sum(axis=1, keepdims=True), here / here.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(for_prevalence(there, fitted=fitted, known=known), here, atol=1e-12)
    np.testing.assert_allclose(for_prevalence(here, fitted=known, known=fitted), there, atol=1e-12)
    np.testing.assert_allclose(for_prevalence(there, fitted=fitted, known=fitted), there, atol=1e-12)


def test_corrected_for_prevalence_chances_come_true_in_the_other_place() -> None:
    rng = np.random.default_rng(1)
    there = rng.random(20_000) < 0.1
    sign = rng.normal(np.where(there, 1.0, -1.0), 1.0)
    stated = expit(2 * sign)  # right where half of the people are ill
    corrected = for_prevalence(
        np.stack([1 - stated, stated], axis=1), fitted=np.array([0.5, 0.5]), known=np.array([0.9, 0.1])
    )[:, 1]
    assert recalibration(there, stated).in_the_large < -1.5
    assert recalibration(there, corrected).in_the_large == pytest.approx(0, abs=0.1)
    assert calibration_error(there, corrected) < 0.01


def test_shares_that_are_none_are_refused() -> None:
    rows, even = np.full((2, 2), 0.5), np.array([0.5, 0.5])
    with pytest.raises(ValueError, match="known needs a share for each of 2 classes, got 3"):
        for_prevalence(rows, fitted=even, known=np.full(3, 1 / 3))
    with pytest.raises(ValueError, match="known has"):
        for_prevalence(rows, fitted=even, known=np.array([0.0, 1.0]))
    with pytest.raises(ValueError, match="must add up to 1"):
        for_prevalence(rows, fitted=np.array([0.5, 0.6]), known=even)
    with pytest.raises(ValueError, match="lies in"):
        for_prevalence(np.array([[math.nan, 0.5]]), fitted=even, known=even)


def test_the_naive_softmax_is_ours() -> None:
    logits = np.random.default_rng(2).normal(size=(5, 3))
    after = Temperature(temperature=2.0, classes=3, subjects=40).apply_to_logits(logits)
    for row, said in zip(logits, after, strict=True):
        powers = [math.exp(value / 2) for value in row]
        assert said.tolist() == pytest.approx([power / sum(powers) for power in powers])
    np.testing.assert_allclose(np.log(after), log_softmax(logits / 2, axis=1))


def naive_line(logits: np.ndarray, there: np.ndarray) -> tuple[float, float]:
    """Slow descent over the two numbers, one row after the other."""
    positives = sum(there)
    negatives = len(there) - positives
    targets = [(positives + 1) / (positives + 2) if one else 1 / (negatives + 2) for one in there]
    scale, shift = 1.0, 0.0
    for _ in range(4000):
        slope = lift = 0.0
        for logit, target in zip(logits.tolist(), targets, strict=True):
            error = 1 / (1 + math.exp(-(scale * logit + shift))) - target
            slope, lift = slope + error * logit, lift + error
        scale, shift = max(0.0, scale - 0.1 * slope), shift - 0.1 * lift
    return scale, shift


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_line_of_few_rows_is_its_slow_twin(seed: int) -> None:
    rng = np.random.default_rng(seed)
    there = rng.random(20) < 0.4
    logits = rng.normal(size=20) + 1.5 * there - 0.7
    assert best_line(logits, there) == pytest.approx(naive_line(logits, there), abs=2e-3)


def test_a_line_does_not_turn_the_order_round_and_stays_finite() -> None:
    there = np.array([True, True, False, False])
    assert best_line(np.array([0.0, 1.0, 2.0, 3.0]), there)[0] == 0.0
    scale, shift = best_line(np.array([0.1002, 0.1003, 0.1001, 0.1000]), there)
    assert scale > 0
    assert np.isfinite([scale, shift]).all()


def test_a_temperature_far_from_one_is_the_best_of_many() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, 50)
    logits = 8 * (rng.normal(size=(50, 3)) + np.eye(3)[truth])

    def loss(factor: float) -> float:
        rows = np.exp(factor * logits)
        return -sum(math.log(row[kind] / row.sum()) for row, kind in zip(rows, truth, strict=True))

    grid = np.exp(np.linspace(-4, 1, 400))
    assert 1 / best_temperature(logits, truth, lowest=math.exp(-7), highest=math.exp(7)) == pytest.approx(
        min(grid, key=loss), rel=0.02
    )


def test_a_modest_temperature_is_the_best_for_targets_that_few_subjects_show() -> None:
    logits, truth = classes_said(20, boldness=2.5)
    classes = logits.shape[1]
    found = fit_temperature(logits, truth, modest=True).temperature

    def naive(temperature: float) -> float:
        total = 0.0
        for row, label in zip(softmax(logits / temperature, axis=1), truth, strict=True):
            own = int((truth == label).sum())
            for kind in range(classes):
                target = ((own if kind == label else 0) + 1) / (own + classes)
                total -= target * math.log(row[kind])
        return total

    assert all(naive(found) <= naive(found * factor) for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0))
    plain = fit_temperature(*classes_said(20_000, boldness=2.5)).temperature
    assert fit_temperature(*classes_said(20_000, boldness=2.5), modest=True).temperature == pytest.approx(
        plain, rel=5e-3
    )


def test_a_dozen_right_answers_make_no_later_one_certain() -> None:
    truth = np.array([0, 1] * 6)
    votes = np.where(np.eye(2)[truth] > 0, 11 / 12, 1 / 12)  # five neighbours of five, softened
    sure = fit_temperature(log_probabilities(votes), truth, modest=True).apply(votes)
    assert sure.max() == pytest.approx(7 / 8)  # six of six: (6 + 1) / (6 + 2)
    assert fit_temperature(log_probabilities(votes), truth).apply(votes).max() > 0.999
